"""One HTML file about one or several runs: verdict, curves, spectrum, neighbours, settings."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from isofast.data import open_dataset
from isofast.data.files import check_output, read_json, write_text
from isofast.data.folder import printable
from isofast.errors import UserError
from isofast.evaluation.chart import Line, chart
from isofast.evaluation.intervals import wilson
from isofast.evaluation.pictures import Pictures, look
from isofast.evaluation.verdict import findings, judge
from isofast.run.spectrum import effective_rank
from isofast.run.stored import Run, labels, read_run

_MOST_ROWS, _MOST_LINES = 12, 32
_CURVES = {
    "loss": "Loss",
    "lr": "Learning rate",
    "probe_top1": "Probe top-1, training views",
    "val_top1": "Probe top-1, validation",
    "knn_top1": "k-NN top-1, validation",
    "effective_rank": "Effective rank of C",
    "rankme": "RankMe of the features",
    "embedding_std": "Spread of the embeddings",
    "alignment": "Cosine of prediction and target",
}
_RANKS = {
    "effective_rank": "effective rank of C, participation ratio",
    "effective_rank_entropy": "effective rank of C, by entropy",
    "rankme": "RankMe of the features",
    "rankme_z": "RankMe of the embeddings",
    "lidar": "LiDAR of the features",
    "lidar_z": "LiDAR of the embeddings",
    "alpha_req": "alpha-ReQ of the features",
}


def write_report(
    folders: Sequence[Path], output: Path, *, root: Path | None = None, pictures: bool = True
) -> None:
    """Write one self-contained HTML file, atomically.

    Args:
        folders: runs, finished or not.
        output: the HTML file.
        root: folder of the images, if they are no longer in the runs' data.root.
        pictures: also run the encoders on some images.

    Raises:
        UserError: a folder is not a run or has no records yet, or ``output`` cannot be written.
    """
    check_output(output)
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    pages = [
        _page(run, name, root or run.config.data.root, pictures)
        for run, name in zip(runs, labels(runs), strict=True)
    ]
    keys = dict.fromkeys(key for page in pages for key in page["settings"])
    curves = {}
    for key, title in _CURVES.items():
        lines = [
            Line(page["name"], epochs_T, values_T, place)
            for place, page in enumerate(pages)
            for epochs_T, values_T in [page["run"].curve(key)]
            if len(values_T)
        ]
        if lines:
            curves[title] = chart(lines)
    environment = Environment(
        loader=PackageLoader("isofast.evaluation", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        # file names may not be valid text
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    text = environment.get_template("report.html").render(
        pages=pages,
        curves=curves,
        settings={key: [page["settings"].get(key) for page in pages] for key in keys},
    )
    write_text(output, text)


def _page(run: Run, name: str, root: Path, with_pictures: bool) -> dict[str, Any]:
    """Return a run as the template expects it."""
    summary, environment = (
        read_json(run.path / f"{what}.json") for what in ("summary", "environment")
    )
    pictures, why = None, "the run failed; isofast report draws them"
    if with_pictures:
        try:
            pictures, why = look(run.path, run.config, root), ""
        # RuntimeError includes an out-of-memory GPU
        except (UserError, RuntimeError, OSError) as error:
            why = str(error)
    val_images = environment.get("val_images")
    if not val_images:
        with suppress(UserError):
            val_images = len(open_dataset(root, "val"))
    ranks = {title: run.curve(key)[1] for key, title in _RANKS.items()}
    places = np.unique(np.linspace(0, len(run.records) - 1, _MOST_ROWS).astype(int))
    return {
        "name": name,
        "folder": run.path.absolute().name,
        "run": run,
        "summary": summary,
        "verdict": judge(run, summary, val_images, pictures),
        "warnings": [found.message for found in findings(run)[0]],
        "spectrum": _spectrum(run),
        "ranks": [
            (title, *values_T[[0, -1]]) for title, values_T in ranks.items() if len(values_T)
        ],
        "baselines": _baselines(run, summary, val_images, pictures),
        "records": [_with_evaluation(run, run.records[place]) for place in places],
        "pictures": pictures,
        "no_pictures": why,
        "settings": _flat(run.config.model_dump(mode="json")),
        "environment": _flat(environment),
    }


def _baselines(
    run: Run, summary: dict[str, Any], n: int | None, pictures: Pictures | None
) -> list[dict[str, Any]]:
    rows: list[tuple[str, str, float | None, int | None]] = []
    compared = bool(run.evaluations) and run.evaluations[0]["step"] == 0
    if run.evaluations:
        first, last = run.evaluations[0], run.evaluations[-1]
        knn = f"k-NN, k = {run.config.evaluation.knn_k}"
        rows.append(("this run", knn, last["knn_top1"], n))
        if compared:
            rows.append(("before training", knn, first["knn_top1"], n))
        rows.append(("raw pixels", knn, summary.get("knn_top1_pixels"), n))
        rows.append(("this run", "online linear probe", last["val_top1"], n))
    if pictures is not None and not compared:
        rows += [
            (one.name, "k-NN, on the sample", one.knn_top1, pictures.queries)
            for one in pictures.measured
        ]
    return [
        {"name": name, "what": what, "top1": top1, "n": n, "interval": n and wilson(top1, n)}
        for name, what, top1, n in rows
        if top1 is not None
    ]


def _spectrum(run: Run) -> Markup:
    """Return a chart of the eigenvalues over time; larger ones have stronger lines."""
    values_TD = run.eigenvalues_TD
    dim = values_TD.shape[1]
    largest = np.nanmax(values_TD, initial=0)
    # smaller ones are rounding error
    shown_TD = np.where(values_TD > 1e-8 * largest, values_TD, np.nan)
    places = np.unique(np.geomspace(1, dim, min(dim, _MOST_LINES)).round().astype(int)) - 1
    lines = [
        Line(str(place + 1), run.epochs_T, shown_TD[:, place], 0, 1 - 0.75 * place / dim)
        for place in places[::-1]
    ]
    ends = [
        f"epoch {run.epochs_T[t]:.3g}: largest {values_TD[t, 0]:.2g}, median "
        f"{np.median(values_TD[t]):.2g}, effective rank {effective_rank(values_TD[t]):.1f}"
        for t in (0, -1)
    ]
    return chart(lines, log=True, alt=f"{dim} eigenvalues of C. {'. '.join(ends)}")


def _with_evaluation(run: Run, record: dict[str, Any]) -> dict[str, Any]:
    """Return a record merged with the last evaluation up to its step."""
    before = [one for one in run.evaluations if one["step"] <= record["step"]]
    return (before[-1] if before else {}) | record


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, dict) and value
        rows |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return rows
