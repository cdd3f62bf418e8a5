"""Label-free metrics against k-NN accuracy, over all evaluations of runs."""

import csv
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from isofast.data.files import write_atomically
from isofast.errors import UserError
from isofast.paper.figures import PALETTE, STYLE, legend_below, make_folder, new_figure, save
from isofast.run.metrics import read_spectra
from isofast.run.stored import Run, labels, read_run

Row = dict[str, Any]
_OF_EMBEDDINGS = ("rankme", "lidar", "alpha_req", "uniformity", "view_alignment")
# one row of panels each; from metrics.jsonl, or from spectrum.npz for C
_ROWS = {
    "features": _OF_EMBEDDINGS,
    "projector": tuple(f"{name}_z" for name in _OF_EMBEDDINGS),
    "C": ("effective_rank", "effective_rank_entropy"),
}
# not as many as the palette has colours: their pairs would repeat
_MARKERS = "os^Dv<"


def draw_metrics(folders: Sequence[Path], output: Path) -> list[Path]:
    """Draw ``output``/metrics.png from runs, and write its numbers to metrics.csv.

    Raises:
        UserError: a folder is not a run, no run has an evaluation, or ``output`` is not writable.
    """
    rows = table([read_run(folder) for folder in dict.fromkeys(folders)])
    with mpl.rc_context(STYLE):
        figure = metrics_figure(rows)
        make_folder(output)
        picture, numbers = save(figure, output / "metrics.png"), output / "metrics.csv"
    write_atomically(numbers, partial(_write_csv, rows))
    return [picture, numbers]


def table(runs: Sequence[Run]) -> list[Row]:
    """Return one row per evaluation: run, name, step, epoch, final, accuracies, metrics.

    Raises:
        UserError: there is no evaluation.
    """
    rows: list[Row] = []
    for run, name in zip(runs, labels(runs), strict=True):
        spectra = read_spectra(run.path / "spectrum.npz")
        for record in run.evaluations:
            row: Row = {"run": str(run.path), "name": name}
            row |= {key: record[key] for key in ("step", "epoch")}
            row["final"] = record is run.evaluations[-1]
            row |= {key: record[key] for key in ("knn_top1", "val_top1")}
            row |= {key: record.get(key) for key in (*_ROWS["features"], *_ROWS["projector"])}
            spectrum = spectra.get(record["step"])
            ranks = {key: getattr(spectrum, key, np.nan) for key in _ROWS["C"]}
            row |= {key: rank if np.isfinite(rank) else None for key, rank in ranks.items()}
            rows.append(row)
    if not rows:
        raise UserError(
            "none of these runs has been evaluated yet; train with --set evaluation.every_epochs=1 "
            "and validation images"
        )
    return rows


def metrics_figure(rows: Sequence[Row]) -> Figure:
    """Draw each metric in ``table`` against k-NN accuracy, with larger final evaluations."""
    shown = {}
    for kind, metrics in _ROWS.items():
        if keys := [key for key in metrics if any(row[key] is not None for row in rows)]:
            shown[kind] = keys
    if not shown:
        raise UserError("none of these evaluations has a metric; see evaluation.metrics_images")
    columns = max(len(keys) for keys in shown.values())
    figure = new_figure(len(shown), columns)
    axes = figure.subplots(len(shown), columns, squeeze=False)
    for row_of_axes, (kind, keys) in zip(axes, shown.items(), strict=True):
        for axis, key in zip(row_of_axes, keys, strict=False):
            _panel(axis, rows, key, kind)
        row_of_axes[0].set_ylabel("k-NN top-1")
        for axis in row_of_axes[len(keys) :]:
            axis.set_axis_off()
    legend_below(figure, axes[0, 0], columns)
    return figure


def spearman(rows: Sequence[Row], key: str) -> tuple[float, int]:
    """Return Spearman's correlation of a metric with k-NN accuracy, and the sample size.

    NaN for fewer than three rows, or if either is constant.
    """
    pairs = [(row[key], row["knn_top1"]) for row in rows if row[key] is not None]
    if len(pairs) < 3 or any(len(set(values)) == 1 for values in zip(*pairs, strict=True)):
        return float("nan"), len(pairs)
    return float(spearmanr(pairs).statistic), len(pairs)


def _panel(axis: Axes, rows: Sequence[Row], key: str, kind: str) -> None:
    for place, run in enumerate(dict.fromkeys(row["run"] for row in rows)):
        own = [row for row in rows if row["run"] == run]
        values = [np.nan if row[key] is None else row[key] for row in own]
        accuracies = [row["knn_top1"] for row in own]
        label = own[0]["name"].replace("$", r"\$")
        shared: Row = {
            "color": PALETTE[place % len(PALETTE)],
            "marker": _MARKERS[place % len(_MARKERS)],
        }
        axis.plot(values, accuracies, linewidth=0.5, markersize=3, alpha=0.5, **shared)
        last = values[-1:], accuracies[-1:]
        axis.scatter(*last, s=50, edgecolor="black", zorder=3, label=label, **shared)
    # of one run, evaluations only follow its course
    correlation, count = spearman([row for row in rows if row["final"]], key)
    title = f"{key.removesuffix('_z')} of {kind}"
    if np.isfinite(correlation):
        title += f"\nSpearman {correlation:.2f} (n = {count} runs)"
    axis.set_title(title)


def _write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
