"""The paper's Fig. 2, 5 and 6 from simulations, as PNG and NPZ."""

import textwrap
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from isofast.data.files import write_atomically
from isofast.paper.figures import STYLE, make_folder, save
from isofast.paper.toy import SHORTEST, Toy, Trajectory, initial_weights, randn, simulate, stream

METRICS = ("euclidean", "cosine")
# for the Euclidean loss the paper's derivative is the true one
MISSING = ("euclidean", "paper_gradient")
# name in the NPZ -> title and ablation
VARIANTS: dict[str, tuple[str, dict[str, bool]]] = {
    "no_stop_gradient": ("no stop-gradient", {"stop_gradient": False}),
    "paper_gradient": (
        "no stop-gradient,\npaper's derivative",
        {"stop_gradient": False, "paper_gradient": True},
    ),
    "no_predictor": ("no predictor", {"predictor": False}),
    "plain": ("stop-gradient and\npredictor", {}),
    "iso": ("IsoLoss", {}),
}
PLANE: dict[str, Any] = {"inputs": 6, "outputs": 2, "lr": 0.01}
# in the plane the cosine's gradient, about 1 / |z|, has no finite variance: all losses run equally
# long, on more samples, because 100,000 steps on few would show a random walk
PLANE_STEPS, PLANE_SAMPLES = 1500, 10
INITIALISATIONS = ("V0", "2 V0", "randn / 2")
RECORDS = 301
# points followed in the plane: the longest of many candidates show the motion best
POINTS, CANDIDATES = 20, 5000
NOTE = (
    "The derivative that the paper prints for the cosine without stop-gradient (App. C.2) has an "
    "error: it divides a term of the target side by $a^3 b$ in place of $a\\,b^3$, with a = |W z| "
    "and b = |t|. Both are shown below. Under the true one the trace stays and dimensions "
    "collapse; the paper's diverges (mind its axes)."
)
RELU_NOTE = (
    "With a ReLU the means of two cosine gradients need a bound on lengths. IsoLoss: views below "
    f"{SHORTEST:g} of their root mean square are left out. Paper's derivative: has none, so its "
    "plane shows the leaps of single samples."
)
# from the Okabe-Ito palette, safe for colour-blind readers
START, END, LINE = "#D55E00", "#0072B2", "#9A9A9A"
THREE = ("#0072B2", "#E69F00", "#009E73")
GRID = {"axes.grid": True, "axes.axisbelow": True, "grid.color": "0.93"}
# range of eigenvalues, as in the paper; a panel that exceeds it has its own scale
LOW, HIGH = 1e-2, 10.0
# so has a plane whose embeddings exceed their initial reach by this factor
OWN_SCALE = 3.0


class Panel(NamedTuple):
    """A figure's simulation: its prefix in the NPZ and the arguments of `simulate`."""

    name: str
    toy: Toy
    starts_SMN: torch.Tensor | None = None
    points_PN: torch.Tensor | None = None


def write_figure(
    figure: str,
    folder: Path,
    *,
    say: Callable[[str], None],
    seed: int = 0,
    samples: int = Toy.samples,
    steps: int | None = None,
) -> list[Path]:
    """Simulate and draw one of the paper's figures.

    Args:
        figure: "figure2", "figure5" or "figure6".
        folder: folder for the PNG and the NPZ, created if missing.
        say: called with progress messages.
        seed, samples, steps: as in `Toy`, for all simulations.

    Returns:
        The two files. The NPZ holds NAME_steps (T,), NAME_eigenvalues and NAME_weight_eigenvalues
        (T, S, M), and for planes also NAME_points (T, S, P, M).

    Raises:
        UserError: `Toy` rejects a value, or the folder cannot be written to.
        RunError: a simulation became non-finite.
    """
    panels = panels_of(figure, seed=seed, samples=samples, steps=steps)
    make_folder(folder)
    found = {}
    for name, toy, starts_SMN, points_PN in panels:
        found[name] = simulate(toy, starts_SMN, points_PN=points_PN, records=RECORDS)
        say(f"simulated {name}")
    with mpl.rc_context(STYLE | GRID):
        picture = _starts(found) if figure == "figure5" else _losses(panels, found)
        path = save(picture, folder / f"{figure}.png")
    arrays = folder / f"{figure}.npz"
    fields: dict[str, Any] = {
        f"{name}_{field}": values
        for name, trajectory in found.items()
        for field, values in vars(trajectory).items()
        if values.size
    }
    write_atomically(arrays, lambda part: np.savez_compressed(part, **fields))
    return [path, arrays]


def panels_of(
    figure: str, *, seed: int = 0, samples: int = Toy.samples, steps: int | None = None
) -> list[Panel]:
    """Return the simulations of a figure; see `write_figure`."""
    plane = {
        **PLANE,
        "seed": seed,
        "samples": PLANE_SAMPLES * samples,
        "steps": PLANE_STEPS if steps is None else steps,
    }
    toy = Toy(**plane)
    candidates_PN = randn((CANDIDATES, PLANE["inputs"]), stream(seed, 2))
    points_PN = candidates_PN[candidates_PN.norm(dim=-1).argsort(descending=True)[:POINTS]]
    if figure == "figure5":
        v_1MN = initial_weights(toy)
        other_1MN = randn(tuple(v_1MN.shape), stream(seed, 3)) / 2
        starts_SMN = torch.cat([v_1MN, 2 * v_1MN, other_1MN])
        return [
            Panel(metric, Toy(loss=metric, **plane), starts_SMN, points_PN) for metric in METRICS
        ]
    panels = []
    for metric, (variant, (_, ablation)) in product(METRICS, VARIANTS.items()):
        if (metric, variant) == MISSING:
            continue
        loss = f"iso_{metric}" if variant == "iso" else metric
        settings: dict[str, Any] = {"loss": loss, "relu": figure == "figure6", **ablation}
        spectrum = Toy(**settings, seed=seed, samples=samples, steps=steps)
        panels += [
            Panel(f"{metric}_{variant}_spectrum", spectrum),
            Panel(f"{metric}_{variant}_plane", Toy(**settings, **plane), points_PN=points_PN),
        ]
    return panels


def _losses(panels: list[Panel], trajectories: Mapping[str, Trajectory]) -> Figure:
    """Draw Fig. 2 or 6: one column per loss, and per metric embeddings above their spectrum."""
    relu = panels[0].toy.relu
    picture = Figure(figsize=(12.5, 10.8), layout="constrained")
    axes = picture.subplots(4, len(VARIANTS))
    for place, (metric, variant) in enumerate(product(METRICS, VARIANTS)):
        row, column = divmod(place, len(VARIANTS))
        above, below = axes[2 * row : 2 * row + 2, column]
        if (metric, variant) == MISSING:
            _explain(above, below, axes[:2, 0], f"{NOTE}\n\n{RELU_NOTE}" if relu else NOTE)
            continue
        above.set_title(VARIANTS[variant][0])
        plane = trajectories[f"{metric}_{variant}_plane"]
        _draw_plane(above, plane, 0, _reach(trajectories, metric, variant))
        _draw_spectrum(below, trajectories[f"{metric}_{variant}_spectrum"])
        if metric == "euclidean" and not relu:
            below.axhline(1, color="0.4", linewidth=0.8, linestyle=":")
        if column == 0:
            matrix = "E[z z$^T$]" if relu else "V V$^T$"
            above.set_ylabel(f"{metric.capitalize()}\nembedding $z_2$")
            below.set_ylabel(f"{metric.capitalize()}\neigenvalues of {matrix}")
    kind = "ReLU" if relu else "Linear"
    picture.suptitle(f"{kind} toy networks (P Fig. {6 if relu else 2})")
    return picture


def _explain(above: Axes, below: Axes, drawn: Iterable[Axes], text: str) -> None:
    """Put a note and a legend for ``drawn`` in the panels without a simulation."""
    text = "\n\n".join(textwrap.fill(part, 38) for part in text.split("\n\n"))
    note = above.text(-0.2, 1.0, text, va="top", transform=above.transAxes)
    handles = [handle for axes in drawn for handle in axes.get_legend_handles_labels()[0]]
    place: Any = {"loc": "upper left", "bbox_to_anchor": (-0.26, 0.96)}
    legend = below.legend(handles=handles, **place)
    for axes, artist in ((above, note), (below, legend)):
        axes.set_axis_off()
        artist.set_in_layout(False)


def _reach(trajectories: Mapping[str, Trajectory], metric: str, variant: str) -> float:
    """Return half a plane's side: one scale per metric, or its own if the embeddings exceed it."""
    names = [name for name in trajectories if name.startswith(metric) and name.endswith("plane")]
    start = float(abs(trajectories[names[0]].points[0]).max())
    reached = {name: float(abs(trajectories[name].points).max()) for name in names}
    shared = max(reach for reach in reached.values() if reach <= OWN_SCALE * start)
    own = reached[f"{metric}_{variant}_plane"]
    return 1.08 * (own if own > OWN_SCALE * start else shared)


def _draw_plane(axes: Axes, trajectory: Trajectory, start: int, reach: float) -> None:
    points_TPM = trajectory.points[:, start]
    (x, y), (last_x, last_y) = points_TPM[0].T, points_TPM[-1].T
    circle: Any = {"s": 22, "facecolors": "none", "edgecolors": START, "linewidths": 1.1}
    axes.scatter(x, y, zorder=3, label="embedding, first step", **circle)
    axes.scatter(last_x, last_y, s=16, color=END, zorder=2, label="embedding, last step")
    paths = axes.plot(points_TPM[..., 0], points_TPM[..., 1], color=LINE, linewidth=0.9, zorder=1)
    paths[0].set_label("in between")
    low = -reach if points_TPM.min() < 0 else -0.05 * reach
    axes.set(xlim=(low, reach), ylim=(low, reach), aspect="equal", xlabel="embedding $z_1$")
    axes.locator_params(nbins=4)


def _draw_spectrum(axes: Axes, trajectory: Trajectory) -> None:
    values_TM = trajectory.eigenvalues[:, 0]
    axes.set_prop_cycle(color=colormaps["cividis"](np.linspace(0.9, 0.0, values_TM.shape[1])))
    # a collapsed mode leaves the panel at the bottom
    axes.semilogy(trajectory.steps, np.maximum(values_TM, LOW / 10), linewidth=1.2)
    axes.lines[0].set_label("largest eigenvalue")
    axes.lines[-1].set_label("smallest eigenvalue")
    top = values_TM.max()
    axes.set_ylim(LOW, HIGH if top < HIGH else 10 ** np.ceil(np.log10(top)))
    _step_axis(axes, trajectory)


def _step_axis(axes: Axes, trajectory: Trajectory) -> None:
    # zero steps still need an axis
    axes.set_xlim(0, max(1, trajectory.steps[-1]))
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _starts(trajectories: Mapping[str, Trajectory]) -> Figure:
    """Draw Fig. 5: one column per initialisation, then the eigenvalues of all three."""
    picture = Figure(figsize=(12.5, 6.4), layout="constrained")
    axes = picture.subplots(len(METRICS), len(INITIALISATIONS) + 1)
    reach = 1.08 * max(float(abs(trajectories[metric].points).max()) for metric in METRICS)
    for (*planes, spectra), metric in zip(axes, METRICS, strict=True):
        trajectory, euclidean = trajectories[metric], metric == "euclidean"
        for start, (plane, name) in enumerate(zip(planes, INITIALISATIONS, strict=True)):
            _draw_plane(plane, trajectory, start, reach)
            plane.set_title(f"from {name}")
            values_TM = trajectory.eigenvalues[:, start]
            lines = spectra.semilogy(trajectory.steps, values_TM, color=THREE[start])
            lines[0].set_label(name)
            spectra.axhline(
                1 if euclidean else values_TM[0].mean(),
                color="0.4" if euclidean else THREE[start],
                linewidth=0.8,
                linestyle=":",
            )
        planes[0].set_ylabel(f"{metric.capitalize()}\nembedding $z_2$")
        _step_axis(spectra, trajectory)
        end = "1" if euclidean else "trace / 2"
        spectra.set(ylim=(LOW, HIGH), ylabel="eigenvalues of V V$^T$")
        spectra.set_title(f"dotted: expected end, {end}")
        spectra.legend(loc="upper right", ncols=3, columnspacing=1)
    picture.suptitle(
        "Where the plain losses go from three initialisations (P Fig. 5); "
        "circles: first step, dots: last step"
    )
    return picture
