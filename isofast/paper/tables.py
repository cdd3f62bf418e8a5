"""The tables of `isofast reproduce`: means and standard deviations beside the paper's numbers."""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from isofast.paper.reproduce import PlannedRun
from isofast.paper.results import DATASETS
from isofast.run.metrics import read_metrics


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


def small_table(table: str, runs: Sequence[PlannedRun]) -> str:
    """The table of ``--scale small``, a part for each data set.

    k-NN before and after, the rank and the collapse say more of short runs than the probe alone.
    """
    lines = [f"# {table.replace('table', 'Table ')}, small scale"]
    columns = ("k-NN before", "k-NN", "probe", "effective rank", "crashed")
    for dataset in dict.fromkeys(run.dataset for run in runs):
        name = DATASETS.get(dataset, dataset)
        header = ["model", "alpha", "EMA", *columns, "paper"]
        lines += ["", f"## {name}", "", _line(header), _line(["---"] * len(header))]
        of_dataset = [run for run in runs if run.dataset == dataset]
        for folder in dict.fromkeys(run.row.folder for run in of_dataset):
            of_row = [run for run in of_dataset if run.row.folder == folder]
            row = of_row[0].row
            ended = [
                s
                for run in of_row
                if run.state() in ("finished", "crashed") and (s := run.summary()) is not None
            ]
            crashed = sum(bool(summary.get("collapse")) for summary in ended)
            lines.append(
                _line(
                    [
                        row.title,
                        "-" if row.alpha is None else f"{row.alpha:g}",
                        "yes" if row.ema else "no",
                        _spread(ended, "knn_top1_initial", 100),
                        _spread(ended, "knn_top1", 100),
                        _spread(ended, "val_top1", 100),
                        _spread(ended, "effective_rank", 1),
                        f"{crashed} of {len(ended)}",
                        row.reported.get(dataset, "-"),
                    ]
                )
            )
    widths = sorted({run.config.encoder.width for run in runs})
    return "\n".join(
        [
            *lines,
            "",
            "k-NN and probe: top-1 in percent on the validation images, mean +- standard deviation "
            "over the seeds; before: the untrained network.",
            f"Networks of width {' and '.join(map(str, widths))} for "
            f"{' and '.join(str(e) for e in _epochs(runs))} epochs; the paper's is 64 wide and "
            "trains 1,000, so compare the order of the methods with it, not their accuracies. C of "
            "directions and the optimizers of short runs are isofast's: a method that the paper "
            "reports as crashed may learn with them. --set method.correlation=embeddings trains "
            "with the paper's C, optimizers and rates.",
            *_machines(runs),
            "",
        ]
    )


def draw_figures(runs: Sequence[PlannedRun], folder: Path) -> Iterator[Path]:
    """Figure 3 of all methods and figure 7 of the closed forms, of each data set.

    Drawn from the first seed's runs; what has no finished runs is left out.
    """
    from isofast.paper.figures import draw

    for dataset in dict.fromkeys(run.dataset for run in runs):
        done = [
            run
            for run in runs
            if run.dataset == dataset and run.seed == 0 and run.state() in ("finished", "crashed")
        ]
        output = folder / dataset
        if done:
            yield from draw(3, [run.run_dir for run in done], output)
        closed = [run for run in done if run.row.alpha is not None]
        both = [
            run.run_dir
            for run in closed
            if {other.row.ema for other in closed if other.row.method == run.row.method}
            == {True, False}
        ]
        if both:
            yield from draw(7, both, output)


def _epochs(runs: Sequence[PlannedRun]) -> list[int]:
    return sorted({run.config.train.epochs for run in runs})


def _spread(summaries: Sequence[dict[str, Any]], key: str, scale: float) -> str:
    """Mean and standard deviation of what is known."""
    known = [scale * s[key] for s in summaries if s.get(key) is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.1f}"
    return mean if len(known) == 1 else f"{mean} +- {statistics.stdev(known):.1f}"


def _notes(runs: Sequence[PlannedRun]) -> list[str]:
    epochs = _epochs(runs)
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
