"""The table of `isofast reproduce`: means and standard deviations beside the paper's numbers."""

import json
import statistics
from collections.abc import Sequence
from typing import Any

from isofast.metrics import read_metrics
from isofast.paper import DATASETS
from isofast.reproduce import PlannedRun


def markdown_table(table: str, runs: Sequence[PlannedRun]) -> str:
    """The table of all runs, with what there is of them.

    Args:
        table: its name, such as "table2".
        runs: the runs planned, finished or not.
    """
    datasets = list(dict.fromkeys(run.dataset for run in runs))
    folders = list(dict.fromkeys(run.row.folder for run in runs))
    header = ["model", "alpha", "EMA"]
    for dataset in datasets:
        name = DATASETS.get(dataset, dataset)
        header += [name, f"{name}, paper"]
    lines = [
        f"# {table.replace('table', 'Table ')}",
        "",
        _line(header),
        _line(["---"] * len(header)),
    ]
    for folder in folders:
        of_row = [run for run in runs if run.row.folder == folder]
        row = of_row[0].row
        alpha = "-" if row.alpha is None else f"{row.alpha:g}"
        cells = [row.title, alpha, "yes" if row.ema else "no"]
        for dataset in datasets:
            cells += [
                _cell([run for run in of_row if run.dataset == dataset]),
                row.reported.get(dataset, "-"),
            ]
        lines.append(_line(cells))
    return "\n".join([*lines, "", *_notes(runs)]) + "\n"


def _notes(runs: Sequence[PlannedRun]) -> list[str]:
    epochs = sorted({run.config.train.epochs for run in runs})
    byol_on_cifar = any(
        run.row.method == "byol" and run.dataset.startswith("cifar") for run in runs
    )
    return [
        "Top-1 in percent of the online linear probe on the validation images at the end of "
        f"{' or '.join(map(str, epochs))} epoch{'s' * (epochs != [1])}: mean +- standard "
        "deviation over n seeds.",
        "Crashed: the embeddings had collapsed at the end, or ended the run by it; the accuracy "
        "is the last one.",
        "The paper's numbers are of five seeds and 1,000 epochs"
        + ("; its numbers of BYOL on CIFAR are solo-learn's." if byol_on_cifar else "."),
        "The paper's two tables are split by alpha here: table2 has the trained predictors and "
        "alpha 0.5, table3 has alpha 1.",
        *_machines(runs),
    ]


def _machines(runs: Sequence[PlannedRun]) -> list[str]:
    """Where the runs were made, a line for each kind of machine."""
    found = set()
    for run in runs:
        try:
            environment = json.loads((run.run_dir / "environment.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        versions = environment["versions"]
        found.add(
            f"{environment['device']}, {environment['ranks']} process(es), "
            f"torch {versions['torch']}, isofast {versions['isofast']}"
        )
    return [f"Made on {machine}." for machine in sorted(found)]


def _cell(runs: Sequence[PlannedRun]) -> str:
    """Of the seeds of one method on one data set, those that have come to an end."""
    ended = [run for run in runs if run.state() in ("finished", "crashed")]
    if not ended:
        return "-"
    crashed = sum(bool((run.summary() or {}).get("collapse")) for run in ended)
    accuracies = [100 * top1 for run in ended if (top1 := _last_top1(run)) is not None]
    inside = [f"n = {len(ended)}"] + ([f"{crashed} crashed"] if crashed else [])
    if not accuracies:
        return f"no accuracy ({', '.join(inside)})"
    mean = f"{statistics.mean(accuracies):.1f}"
    if len(accuracies) > 1:
        mean += f" +- {statistics.stdev(accuracies):.1f}"
    return f"{mean} ({', '.join(inside)})"


def _last_top1(run: PlannedRun) -> float | None:
    summary: dict[str, Any] = run.summary() or {}
    if summary.get("val_top1") is not None:
        return float(summary["val_top1"])
    known = [r["val_top1"] for r in read_metrics(run.run_dir / "metrics.jsonl") if "val_top1" in r]
    return float(known[-1]) if known else None


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
