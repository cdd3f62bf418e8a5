"""Train the runs of one of the paper's tables, and print them next to the paper's results."""

import json
import shlex
import signal
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import psutil

from isofast.data.files import write_text
from isofast.errors import RunError, UserError
from isofast.paper.figures import draw
from isofast.paper.tables import DATASETS, PlannedRun, Request
from isofast.run.metrics import read_metrics

# column -> key in the summary and scale factor
_COLUMNS = {
    "k-NN before": ("knn_top1_initial", 100),
    "k-NN": ("knn_top1", 100),
    "probe": ("val_top1", 100),
    "effective rank": ("effective_rank", 1),
}
_PATIENCE_S = 10.0


def reproduce(request: Request, say: Callable[[str], None], *, dry_run: bool = False) -> None:
    """Train all runs of a request one after another, then write and print the table.

    Finished runs are skipped and stopped ones continue. A crashed run is a result; a failed one
    does not stop the others.

    Args:
        request: the runs to train.
        say: called with progress messages and the table.
        dry_run: only write the config files and print the commands.

    Raises:
        UserError: the request is invalid, data sets are missing, or the launcher does not start.
        RunError: some runs failed.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP; all processes of the run have been ended.
    """
    runs = request.plan()
    if not dry_run:
        _check_data(request, runs)
    for run in runs:
        run.write_config()
        if dry_run:
            say(f"{run.title} ({run.state()}):\n  {shlex.join(run.command)}")
    if dry_run:
        return
    places = (f"[{number}/{len(runs)}] {run.title}" for number, run in enumerate(runs, 1))
    failed = [run.title for run, place in zip(runs, places, strict=True) if _fails(run, place, say)]
    path, table = request.table_path, render(request, runs)
    write_text(path, table)
    say(f"\n{table}\n{path}")
    if request.scale == "small":
        try:
            _draw_figures(runs, path.with_suffix(""), say)
        except UserError as error:
            say(f"no figures: {error}")
    if failed:
        raise RunError(
            f"{len(failed)} of {len(runs)} runs failed, for the reasons above: "
            f"{'; '.join(failed)}. Rerun the same command to retry them"
        )


def _check_data(request: Request, runs: Sequence[PlannedRun]) -> None:
    missing = [
        f"isofast prepare {dataset} --root {request.root / dataset}"
        for dataset in dict.fromkeys(run.dataset for run in runs)
        if not all((request.root / dataset / split).is_dir() for split in ("train", "val"))
    ]
    if missing:
        raise UserError(
            f"data sets are missing under --root {request.root}. Prepare them (--archive uses a "
            "file you already have):\n  " + "\n  ".join(missing)
        )


def _fails(run: PlannedRun, place: str, say: Callable[[str], None]) -> bool:
    """Train a run that has not ended; return whether it failed."""
    if run.has_ended:
        say(f"{place}: {run.state()} before")
        return False
    say(f"{place}: {'starts' if run.state() == 'new' else 'continues'}, in {run.run_dir}")
    code = run_command(run.command)
    if run.state() == "crashed":
        say(f"{place}: crashed")
    elif code != 0 or not run.has_ended:
        early = "" if code else ", before its run ended: use srun to wait for it, not sbatch"
        say(f"{place}: FAILED with exit code {code}{early}")
        return True
    return False


def run_command(command: Sequence[str]) -> int:
    """Run a command and return its exit code; an interrupt ends all of its processes.

    Raises:
        UserError: the command cannot be started.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        # nohup ignores SIGHUP
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        # in its own session, because DeepSpeed's launcher forwards no signals
        process = psutil.Popen(command, start_new_session=True)
        try:
            return int(process.wait())
        except KeyboardInterrupt:
            _end(process)
            raise
    except OSError as error:
        raise UserError(f"cannot start {command[0]}: {error.strerror}; check --launcher") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(leader: psutil.Process) -> None:
    """Interrupt, then terminate, then kill the process tree; another Ctrl-C skips the waiting."""
    alive = {leader}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with suppress(KeyboardInterrupt):
            for parent in list(alive):
                with suppress(psutil.NoSuchProcess):
                    alive.update(parent.children(recursive=True))
            for process in alive:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            alive = set(psutil.wait_procs(alive, timeout=_PATIENCE_S)[1])


def render(request: Request, runs: Sequence[PlannedRun]) -> str:
    """Return a Markdown table of the runs that have ended."""
    scale = "" if request.scale == "paper" else f", {request.scale} scale"
    lines = [f"# {request.table.replace('table', 'Table ')}{scale}"]
    header = ["model", "alpha", "EMA", *_COLUMNS, "crashed", "paper"]
    for dataset, of_dataset in groupby(runs, attrgetter("dataset")):
        rows = [header, ["---"] * len(header)]
        for row, of_row in groupby(of_dataset, attrgetter("row")):
            ended = [run for run in of_row if run.has_ended]
            spreads = [_spread(ended, *column) for column in _COLUMNS.values()]
            crashed = sum(bool(run.summary()["collapse"]) for run in ended)
            reported = row.reported.get(dataset, "-")
            rows.append([*row.cells, *spreads, f"{crashed} of {len(ended)}", reported])
        lines += ["", f"## {DATASETS.get(dataset, dataset)}", ""]
        lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([*lines, "", *_notes(runs)]) + "\n"


def _spread(runs: Sequence[PlannedRun], key: str, scale: float) -> str:
    """Return mean and standard deviation, from the last recorded value of each run."""
    known = []
    for run in runs:
        records = [*read_metrics(run.run_dir / "metrics.jsonl"), run.summary()]
        known += [scale * r[key] for r in records if r.get(key) is not None][-1:]
    if not known:
        return "-"
    deviation = f" +- {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{deviation}"


def _notes(runs: Sequence[PlannedRun]) -> list[str]:
    configs = [run.config for run in runs]
    epochs = " or ".join(map(str, sorted({config.train.epochs for config in configs})))
    widths = " or ".join(map(str, sorted({config.encoder.width for config in configs})))
    notes = [
        "k-NN and probe: top-1 in percent on the validation images, mean +- standard deviation "
        f"over the seeds. Networks of width {widths}, {epochs} epochs; before: untrained.",
        "Crashed: the embeddings had collapsed by the end; the accuracies are the last recorded.",
        "Paper: the probe over five seeds, width 64, 1,000 epochs; BYOL on CIFAR is solo-learn's. "
        "Its two tables are split by alpha here: table2 has the trained predictors and alpha 0.5, "
        "table3 has alpha 1.",
    ]
    if any(config.method.correlation == "directions" for config in configs):
        notes.append(
            "What compares with the paper in short runs is IsoLoss against DirectPred without EMA: "
            "the effective rank, on CIFAR-10 also k-NN. Accuracy and the order of all methods do "
            "not, nor who crashes: these runs use C of directions and isofast's own optimizers, "
            "with which DirectPred learns. --set method.correlation=embeddings uses the paper's C."
        )
    machines = set()
    for path in (run.run_dir / "environment.json" for run in runs):
        if path.exists():
            made: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            versions = f"torch {made['versions']['torch']}, isofast {made['versions']['isofast']}"
            machines.add(f"Made on {made['device']}, {made['ranks']} process(es), {versions}.")
    return [*notes, *sorted(machines)]


def _draw_figures(runs: Sequence[PlannedRun], folder: Path, say: Callable[[str], None]) -> None:
    """Draw figure 3 from the first seed's runs and figure 7 from its closed forms, per data set."""
    for dataset, of_dataset in groupby(runs, attrgetter("dataset")):
        ended = [run for run in of_dataset if run.seed == 0 and run.has_ended]
        closed = [run for run in ended if run.row.alpha is not None]
        methods = [run.row.method for run in closed]
        pairs = [run for run in closed if methods.count(run.row.method) == 2]
        for number, drawn in ((3, ended), (7, pairs)):
            if drawn:
                paths = draw(number, [run.run_dir for run in drawn], folder / dataset)
                say("\n".join(map(str, paths)))
