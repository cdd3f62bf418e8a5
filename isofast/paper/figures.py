"""The paper's Figures 3, 4, 7 and 8 from your runs, as PNG and SVG."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from isofast.config.schema import leaves
from isofast.data.files import write_atomically
from isofast.errors import UserError
from isofast.run.spectrum import effective_rank
from isofast.run.stored import Array, Run, labels, read_run

# Okabe-Ito palette, safe for colour-blind readers
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
_COLUMNS = 3
# characters that fit over a panel, and in an inch of a legend; inches from line to line
_TITLE, _LEGEND, _LINE = 38, 10, 0.17
_EIGENVALUES = r"eigenvalues $\lambda_i$ of $C$"
# more would only enlarge the files
_MOST_LINES, _MOST_POINTS = 48, 500
# smaller eigenvalues, relative to the largest, are rounding error
_LEAST_SHARE = 1e-8
# what may differ between paired runs: EMA and the presets that depend on it
_EMA_KEYS = ("method.ema", "method.ema_base", "method.decay", "optimizer.name", "optimizer.lr")
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.markersize": 3,
    "legend.frameon": False,
    # equal figures give equal files
    "svg.hashsalt": "isofast",
}


def draw(number: int, folders: Sequence[Path], output: Path) -> list[Path]:
    """Draw figure 3, 4, 7 or 8 of runs to ``output``/figureN.png and .svg.

    Raises:
        UserError: a folder is not a run or has nothing to draw, the runs do not fit this figure, or
            ``output`` cannot be written to.
    """
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    with mpl.rc_context(STYLE):
        figure = FIGURES[number](runs)
        make_folder(output)
        return [save(figure, output / f"figure{number}.{kind}") for kind in ("png", "svg")]


def make_folder(output: Path) -> None:
    """Create a folder for figures if it is missing.

    Raises:
        UserError: files cannot be written to it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error}; use another --output") from None


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG or SVG, reproducibly; return ``path``."""
    metadata = {"Date": None} if path.suffix == ".svg" else None
    write_atomically(path, partial(figure.savefig, dpi=160, metadata=metadata))
    return path


def figure3(runs: Sequence[Run], first: Sequence[str] = ()) -> Figure:
    """Draw C's eigenvalues over epochs, one panel per run, above all accuracies.

    Args:
        runs: one per panel, in order.
        first: keys that appear in every title.
    """
    # four runs make a square
    columns = 2 if len(runs) == 4 else min(_COLUMNS, len(runs))
    rows = -(-len(runs) // columns)
    figure = new_figure(rows + 1, max(columns, 2))
    grid = figure.add_gridspec(rows + 1, columns)
    panels = [figure.add_subplot(grid[divmod(place, columns)]) for place in range(len(runs))]
    below = figure.add_subplot(grid[rows, :])
    names = _names(runs, first)
    for place, (axis, run, name) in enumerate(zip(panels, runs, names, strict=True)):
        axis.sharex(below)
        if place > 0:
            axis.sharey(panels[0])
        _eigenvalues(axis, run)
        axis.set_title(f"{fill(name, _TITLE)}{_rank(run)}")
        if place % columns == 0:
            axis.set_ylabel(_EIGENVALUES)
        if place + columns >= len(runs):
            axis.set_xlabel("epoch")
    _accuracies(below, runs, names)
    below.set_xlabel("epoch")
    _explain(figure, panels, below, columns)
    return figure


def figure4(runs: Sequence[Run]) -> Figure:
    """Draw the alignment of linear predictors with C's eigenvectors, above C's eigenvalues."""
    figure = new_figure(2, len(runs))
    axes = figure.subplots(2, len(runs), sharex=True, sharey="row", squeeze=False)
    for above, below, run, name in zip(*axes, runs, _names(runs), strict=True):
        if run.alignment_TD is None:
            raise UserError(
                f"{run.path} has method {run.config.method.name} and no alignment in spectrum.npz. "
                "Figure 4 needs a trained linear predictor; use runs with --set method.name=linear"
            )
        _modes(above, run.epochs_T, run.alignment_TD)
        # zero or infinite C
        with np.errstate(invalid="ignore"):
            weights_TD = run.eigenvalues_TD / run.eigenvalues_TD.sum(1, keepdims=True)
        mean_T = (weights_TD * run.alignment_TD).sum(1)
        label = "mean, weighted by the eigenvalues"
        above.plot(run.epochs_T, mean_T, color="#D55E00", linewidth=2, label=label)
        above.set_title(f"{fill(name, _TITLE)}{_blow_up(run)}")
        above.axhline(1, color="0.8", linewidth=0.8, zorder=0)
        _eigenvalues(below, run)
        below.set_xlabel("epoch")
    axes[0, 0].set_ylabel(r"alignment $\cos(W u_i, u_i)$")
    axes[1, 0].set_ylabel(_EIGENVALUES)
    _explain(figure, axes.flat, axes[0, 0], 1)
    return figure


def figure7(runs: Sequence[Run]) -> Figure:
    """Draw runs with and without an EMA target side by side, one row per pair, with accuracies."""
    pairs = _ema_pairs(runs)
    figure = new_figure(len(pairs), 3)
    axes = figure.subplots(len(pairs), 3, sharex="row", squeeze=False)
    firsts = _names([pair[0] for pair in pairs])
    kinds = ("EMA", "no EMA")
    for row, pair, name in zip(axes, pairs, firsts, strict=True):
        row[1].sharey(row[0])
        for axis, run, kind in zip(row, pair, kinds, strict=False):
            _eigenvalues(axis, run)
            axis.set_title(f"{fill(f'{name}, {kind}', _TITLE)}{_rank(run)}")
        row[0].set_ylabel(_EIGENVALUES)
        _accuracies(row[2], pair, kinds)
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    _explain(figure, axes.flat, axes[0, 2], 2)
    return figure


def figure8(runs: Sequence[Run]) -> Figure:
    """Draw eigenvalues by weight decay, the largest first, above the accuracies."""
    decays = {run.config.optimizer.weight_decay for run in runs}
    if len(decays) < 2:
        decay = decays.pop()
        raise UserError(
            f"figure 8 compares weight decays, but all runs have {decay:g}. Add a run with "
            f"another one, such as --set optimizer.weight_decay={decay / 10 or 1e-5:g}"
        )
    ordered = sorted(runs, key=lambda run: -run.config.optimizer.weight_decay)
    return figure3(ordered, ["optimizer.weight_decay"])


FIGURES = {3: figure3, 4: figure4, 7: figure7, 8: figure8}


def _names(runs: Sequence[Run], first: Sequence[str] = ()) -> list[str]:
    """Return the runs' labels, with $ escaped."""
    return [label.replace("$", r"\$") for label in labels(runs, first)]


def _ema_pairs(runs: Sequence[Run]) -> list[list[Run]]:
    """Return pairs (with EMA, without) of equal settings, ordered by the run with EMA."""
    alike: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: not run.config.method.ema):
        settings = {key: value for key, value in leaves(run.config) if key not in _EMA_KEYS}
        # SimSiam is BYOL without EMA
        if settings["method.name"] == "simsiam":
            settings["method.name"] = "byol"
        alike[repr(sorted(settings.items()))].append(run)
    names = dict(zip([run.path for run in runs], labels(runs), strict=True))
    unpaired = [
        f"{run.path}: {names[run.path]}"
        for kind in alike.values()
        for run in kind
        if [run.config.method.ema for run in kind] != [True, False]
    ]
    if unpaired:
        raise UserError(
            "figure 7 needs, for each run with an EMA target, exactly one without, identical but "
            f"for EMA, optimizer and learning rate. Unpaired: {'; '.join(unpaired)}. Leave them "
            "out, or train the other one with --set method.ema=false or true"
        )
    return [*alike.values()]


def new_figure(rows: int, columns: int) -> Figure:
    """Return a figure for panels of 3.3 x 2.5 inches."""
    return Figure(figsize=(3.3 * columns + 0.8, 2.5 * rows + 0.2), layout="constrained")


def _eigenvalues(axis: Axes, run: Run) -> None:
    largest = np.nanmax(run.eigenvalues_TD, initial=0)
    shown_TD = np.where(run.eigenvalues_TD > _LEAST_SHARE * largest, run.eigenvalues_TD, np.nan)
    axis.set_yscale("log")
    _modes(axis, run.epochs_T, shown_TD)


def _modes(axis: Axes, epochs_T: Array, values_TD: Array) -> None:
    """Draw one line per eigenvector of C, coloured by its rank."""
    count, dim = values_TD.shape
    rows = np.unique(np.linspace(0, count - 1, min(count, _MOST_POINTS)).astype(int))
    # densest among the largest
    places = np.unique(np.geomspace(1, dim, min(dim, _MOST_LINES)).round().astype(int)) - 1
    segments = [np.stack([epochs_T[rows], values_TD[rows, place]], axis=1) for place in places]
    lines = LineCollection(segments, cmap="viridis", norm=LogNorm(1, dim), linewidths=1)
    lines.set_array(places + 1)
    axis.add_collection(lines)
    axis.autoscale_view()
    axis.margins(x=0.02)


def _explain(figure: Figure, panels: Iterable[Axes], named: Axes, columns: int) -> None:
    """Add a colour bar beside ``panels``, and a legend for ``named`` below the figure."""
    panels = [*panels]
    lines = panels[0].collections[0]
    figure.colorbar(lines, ax=panels, label="place $i$, largest first", shrink=0.8)
    legend_below(figure, named, columns)


def legend_below(figure: Figure, named: Axes, columns: int) -> None:
    """Enlarge the figure by a legend for ``named``, with fewer ``columns`` if they do not fit."""
    handles, names = named.get_legend_handles_labels()
    fitting = _LEGEND * figure.get_figwidth() // max(map(len, names), default=1)
    columns = max(1, min(columns, int(fitting)))
    figure.set_figheight(figure.get_figheight() + _LINE * math.ceil(len(names) / columns))
    figure.legend(handles, names, loc="outside lower center", ncols=columns)


def _rank(run: Run) -> str:
    """Return the final effective rank, for a title."""
    return _blow_up(run) or f"\neffective rank {effective_rank(run.eigenvalues_TD[-1]):.1f}"


def _blow_up(run: Run) -> str:
    """Return when C became NaN or infinite, for a title; empty if it did not."""
    unsound = ~np.isfinite(run.eigenvalues_TD).all(1)
    return f"\nNaN from epoch {run.epochs_T[unsound.argmax()]:.3g}" if unsound.any() else ""


def _accuracies(axis: Axes, runs: Sequence[Run], names: Sequence[str]) -> None:
    """Draw validation accuracies if all runs have a curve of them, else those on training views."""
    validated = all(len(run.curve("val_top1")[0]) >= 3 for run in runs)
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        epochs_T, values_T = run.curve("val_top1" if validated else "probe_top1")
        axis.plot(
            epochs_T,
            values_T,
            color=PALETTE[place % len(PALETTE)],
            linestyle=_DASHES[place % len(_DASHES)],
            marker="o" if len(epochs_T) < (40 if validated else 2) else None,
            label=name,
        )
    axis.set(ylim=(0, 1.02), ylabel=f"top-1, {'validation' if validated else 'training views'}")
