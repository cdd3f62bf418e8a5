"""The paper's Fig. 2, 5 and 6, drawn from simulations: PNG to look at, NPZ to calculate with."""

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from isofast.data.files import write_atomically
from isofast.errors import UserError
from isofast.paper.theory import SHORTEST, Trajectory
from isofast.paper.toy_panels import (
    INITIALISATIONS,
    METRICS,
    VARIANTS,
    Panel,
    arrays_of,
    panels_of,
    run_panels,
)

TITLES = {
    "no_stop_gradient": "no stop-gradient",
    "paper_gradient": "no stop-gradient,\npaper's derivative",
    "no_predictor": "no predictor",
    "plain": "stop-gradient and\npredictor",
    "iso": "IsoLoss",
}
NOTE = (
    "The derivative that the paper prints\n"
    "for the cosine without stop-gradient\n"
    "(App. C.2) has an error: it divides\n"
    "a term of the target side by $a^3 b$\n"
    "in place of $a\\,b^3$, with a = |W z|\n"
    "and b = |t|. Both are shown below.\n"
    "Under the true one the trace stays\n"
    "and dimensions collapse; the\n"
    "paper's diverges (mind its axes)."
)
RELU_NOTE = (
    "\n\nWith a ReLU the means of two cosine\n"
    "gradients need a bound on lengths.\n"
    f"IsoLoss: views below {SHORTEST:g} of their root\n"
    "mean square are left out. Paper's\n"
    "derivative: has none, so its plane\n"
    "shows the leaps of single samples."
)
# of Okabe and Ito's palette, told apart by colour-blind readers
START, END, LINE = "#D55E00", "#0072B2", "#9A9A9A"
THREE = ("#0072B2", "#E69F00", "#009E73")
LOW, HIGH = 1e-2, 10.0
"""Eigenvalues shown, as in the paper; a panel that leaves them upwards has a scale of its own."""
OWN_SCALE = 3.0
"""A plane that embeddings leave by so many times their first reach has a scale of its own."""


def write_figure(
    figure: str,
    folder: Path,
    *,
    workers: int | None = None,
    done: Callable[[str], None] = print,
    **changes: Any,
) -> list[Path]:
    """Simulates and draws a figure of the paper.

    Args:
        figure: "figure2", "figure5" or "figure6".
        folder: where the PNG and the NPZ go; made if missing.
        workers, done: as in `run_panels`.
        **changes: as in `panels_of`.

    Returns:
        The two files written.

    Raises:
        UserError: a value that `Toy` refuses, or a folder that cannot be made or written to.
        RunError: a simulation left the finite numbers.
    """
    panels = panels_of(figure, **changes)
    # before the minutes of simulation, not after
    _make_writable(folder)
    trajectories = run_panels(panels, workers=workers, done=done)
    picture = _starts(trajectories) if figure == "figure5" else _losses(panels, trajectories)
    paths = [folder / f"{figure}.png", folder / f"{figure}.npz"]
    FigureCanvasAgg(picture)
    arrays = arrays_of(trajectories)
    try:
        write_atomically(paths[0], lambda path: picture.savefig(path, dpi=150, format="png"))
        write_atomically(paths[1], lambda path: _save(path, arrays))
    except OSError as error:
        raise UserError(
            f"output: {figure}.png and {figure}.npz cannot be written to {folder}: "
            f"{error.strerror}; choose another folder with --output"
        ) from error
    return paths


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # a folder may exist and take no file, on a read-only disk even from root
        with NamedTemporaryFile(dir=folder, prefix=".probe-"):
            pass
    except OSError as error:
        raise UserError(
            f"output: {folder} is no folder to write to: {error.strerror}; choose another "
            "with --output"
        ) from error


def _save(path: Path, arrays: Mapping[str, Any]) -> None:
    # a file object: numpy appends .npz to a name that has not got it
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _losses(panels: list[Panel], trajectories: Mapping[str, Trajectory]) -> Figure:
    """Fig. 2 and 6: a column a loss; for each metric embeddings above their spectrum."""
    toys = {panel.name: panel.toy for panel in panels}
    relu = panels[0].toy.relu
    picture = Figure(figsize=(12.5, 10.8), layout="constrained")
    axes = picture.subplots(4, len(VARIANTS))
    for row, metric in enumerate(METRICS):
        for column, variant in enumerate(VARIANTS):
            above, below = axes[2 * row, column], axes[2 * row + 1, column]
            plane = trajectories.get(f"{metric}_{variant}_plane")
            spectrum = trajectories.get(f"{metric}_{variant}_spectrum")
            if plane is None or spectrum is None:
                above.set_axis_off()
                below.set_axis_off()
                text = NOTE + RELU_NOTE if relu else NOTE
                note = above.text(-0.2, 1.0, text, va="top", fontsize=9, transform=above.transAxes)
                note.set_in_layout(False)
                _legend(below)
                continue
            above.set_title(TITLES[variant], fontsize=11)
            _draw_plane(above, plane, 0, _reach(trajectories, metric, variant))
            _draw_spectrum(below, spectrum, toys[f"{metric}_{variant}_spectrum"].metric, relu)
        name = metric.capitalize()
        axes[2 * row, 0].set_ylabel(f"{name}\nembedding $z_2$")
        matrix = "E[z z$^T$]" if relu else "V V$^T$"
        axes[2 * row + 1, 0].set_ylabel(f"{name}\neigenvalues of {matrix}")
    kind = "ReLU" if relu else "Linear"
    picture.suptitle(f"{kind} toy networks (P Fig. {6 if relu else 2})", fontsize=13)
    return picture


def _reach(trajectories: Mapping[str, Trajectory], metric: str, variant: str) -> float:
    """Half the side of a plane: one scale a metric, and one of its own for what grows beyond it."""
    names = [name for name in trajectories if name.startswith(metric) and name.endswith("plane")]
    start = float(abs(trajectories[names[0]].points[0]).max())
    reached = {name: float(abs(trajectories[name].points).max()) for name in names}
    shared = max(reach for reach in reached.values() if reach <= OWN_SCALE * start)
    own = reached[f"{metric}_{variant}_plane"]
    return 1.08 * (own if own > OWN_SCALE * start else shared)


def _draw_plane(axes: Axes, trajectory: Trajectory, start: int, reach: float) -> None:
    points_TPM = trajectory.points[:, start]
    axes.plot(points_TPM[..., 0], points_TPM[..., 1], color=LINE, linewidth=0.9, zorder=1)
    (x, y), (last_x, last_y) = points_TPM[0].T, points_TPM[-1].T
    axes.scatter(x, y, s=22, facecolors="none", edgecolors=START, linewidths=1.1, zorder=3)
    axes.scatter(last_x, last_y, s=16, color=END, zorder=2)
    low = -reach if points_TPM.min() < 0 else -0.05 * reach
    axes.set(xlim=(low, reach), ylim=(low, reach), aspect="equal", xlabel="embedding $z_1$")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    axes.grid(True, color="0.93")
    axes.set_axisbelow(True)


def _draw_spectrum(axes: Axes, trajectory: Trajectory, metric: str, relu: bool) -> None:
    values_TM = trajectory.eigenvalues[:, 0]
    shades = colormaps["cividis"](np.linspace(0.9, 0.0, values_TM.shape[1]))
    for values_T, shade in zip(values_TM.T, shades, strict=True):
        # a collapsed mode leaves the picture downwards
        axes.semilogy(trajectory.steps, np.maximum(values_T, LOW / 10), color=shade, linewidth=1.2)
    if metric == "euclidean" and not relu:
        axes.axhline(1, color="0.4", linewidth=0.8, linestyle=":")
    top = values_TM.max()
    axes.set_ylim(LOW, HIGH if top < HIGH else 10 ** np.ceil(np.log10(top)))
    _step_axis(axes, trajectory)


def _step_axis(axes: Axes, trajectory: Trajectory) -> None:
    # without a step there is still an axis
    axes.set_xlim(0, max(1, trajectory.steps[-1]))
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{int(step):,}"))
    axes.grid(True, color="0.93")
    axes.set_axisbelow(True)


def _legend(axes: Axes) -> None:
    shades = colormaps["cividis"]([0.9, 0.0])
    point: dict[str, Any] = {"linestyle": "none", "marker": "o"}
    handles = [
        Line2D([], [], color=START, markerfacecolor="none", **point, label="embedding, first step"),
        Line2D([], [], color=END, **point, label="embedding, last step"),
        Line2D([], [], color=LINE, label="in between"),
        Line2D([], [], color=shades[0], label="largest eigenvalue"),
        Line2D([], [], color=shades[1], label="smallest eigenvalue"),
    ]
    legend = axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(-0.26, 1), frameon=False, fontsize=9
    )
    legend.set_in_layout(False)


def _starts(trajectories: Mapping[str, Trajectory]) -> Figure:
    """Fig. 5: a column an initialisation, and the eigenvalues of all three beside them."""
    picture = Figure(figsize=(12.5, 6.4), layout="constrained")
    axes = picture.subplots(len(METRICS), len(INITIALISATIONS) + 1)
    reach = 1.08 * max(float(abs(trajectories[metric].points).max()) for metric in METRICS)
    for row, metric in zip(axes, METRICS, strict=True):
        trajectory = trajectories[metric]
        for start, name in enumerate(INITIALISATIONS):
            _draw_plane(row[start], trajectory, start, reach)
            row[start].set_title(f"from {name}", fontsize=11)
            values_TM = trajectory.eigenvalues[:, start]
            for index, values_T in enumerate(values_TM.T):
                label = name if index == 0 else None
                row[-1].semilogy(trajectory.steps, values_T, color=THREE[start], label=label)
            row[-1].axhline(
                1 if metric == "euclidean" else values_TM[0].mean(),
                color="0.4" if metric == "euclidean" else THREE[start],
                linewidth=0.8,
                linestyle=":",
            )
        _step_axis(row[-1], trajectory)
        row[-1].set_ylim(0.1, 10)
        row[0].set_ylabel(f"{metric.capitalize()}\nembedding $z_2$")
        row[-1].set_ylabel("eigenvalues of V V$^T$")
        end = "1" if metric == "euclidean" else "trace / 2"
        row[-1].set_title(f"dotted: expected end, {end}", fontsize=11)
        row[-1].legend(frameon=False, fontsize=9, loc="upper right", ncols=3, columnspacing=1)
    picture.suptitle(
        "Where the plain losses go from three initialisations (P Fig. 5); "
        "circles: first step, dots: last step",
        fontsize=13,
    )
    return picture
