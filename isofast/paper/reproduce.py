"""`isofast reproduce`: the runs of one of the paper's tables, planned, started, gone on with.

Each run is launch/train.py in processes of its own, so one that fails leaves the others alone; what
is finished is known by its summary.json, and what was stopped goes on from its checkpoint.
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

from isofast.config.load import read_stored, resolve
from isofast.config.presets import merge
from isofast.config.schema import SCHEMA_KEY, Config, changed_keys
from isofast.data.files import write_atomically
from isofast.errors import UserError
from isofast.paper.processes import run_to_its_end
from isofast.paper.results import DATASETS, TABLES, Row

State = Literal["new", "stopped", "finished", "crashed"]
TRAIN_SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "train.py"
# The shipped config of each data set, beside the train script. Digits have no place in the paper:
# they show in a minute that everything works.
SHIPPED = {"digits": "quickstart.json"} | {name: f"{name}.json" for name in DATASETS}
PAPER_SEEDS, SMALL_SEEDS = 5, 1
Scale = Literal["paper", "small"]
# What --scale small says over the shipped config.
_SMALL: dict[str, Any] = {
    "encoder": {"width": 16},
    "train": {"epochs": 10},
    "evaluation": {"at_start": True, "every_epochs": 2},
}
_SMALL_DIGITS: dict[str, Any] = {"train": {"epochs": 20}, "evaluation": {"at_start": True}}
# What the table decides, and so no --set.
_OWN_KEYS: dict[str, Callable[[Config], Any]] = {
    **{
        key: attrgetter(key)
        for key in ("seed", "train.epochs", "data.root", "data.dataset", "method.name")
    },
    "method.ema": attrgetter("method.ema"),
    # which a trained predictor has not
    "method.alpha": lambda config: getattr(config.method, "alpha", None),
}


@dataclass(frozen=True)
class Request:
    """What the user asks for; see `isofast reproduce --help`."""

    table: str
    datasets: Sequence[str]
    root: Path
    runs: Path
    seeds: int = PAPER_SEEDS
    scale: Scale = "paper"
    epochs: int | None = None
    methods: Sequence[str] = ()
    overrides: Sequence[str] = ()
    launcher: Sequence[str] = (sys.executable,)
    train_script: Path = TRAIN_SCRIPT

    @property
    def folder(self) -> Path:
        """Where the table's runs are, and the table."""
        return self.runs / (self.table if self.scale == "paper" else f"{self.table}-{self.scale}")

    @property
    def table_path(self) -> Path:
        """The table's file, named by what was asked for, so that a part replaces no whole table."""
        parts = ["table"]
        if {*self.datasets} != {*DATASETS}:
            parts += [name for name in SHIPPED if name in self.datasets]
        known = dict.fromkeys(row.method for row in TABLES[self.table])
        if self.methods and {*self.methods} != {*known}:
            parts += [name for name in known if name in self.methods]
        if self.seeds != PAPER_SEEDS:
            parts.append(f"seeds-{self.seeds}")
        return self.folder / f"{'-'.join(parts)}.md"


@dataclass(frozen=True)
class PlannedRun:
    """One seed of one cell of the table."""

    dataset: str
    row: Row
    seed: int
    run_dir: Path
    settings: dict[str, Any]
    """What its config file holds."""
    config: Config
    """The same with presets and --set."""
    command: tuple[str, ...]

    @property
    def title(self) -> str:
        """For a person."""
        alpha = "" if self.row.alpha is None else f" alpha {self.row.alpha:g}"
        ema = "EMA" if self.row.ema else "no EMA"
        return f"{self.dataset}, {self.row.title}{alpha}, {ema}, seed {self.seed}"

    @property
    def config_path(self) -> Path:
        """Its config file, beside the run dir."""
        return self.run_dir.with_suffix(".json")

    @property
    def text(self) -> str:
        """Of its config file."""
        return json.dumps(self.settings, indent=2) + "\n"

    def has_other_config(self) -> bool:
        """Whether it has begun with a config file that says something else than ``text``."""
        try:
            written = self.config_path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.config_path}: {error}; remove it") from None
        return self.state() != "new" and written != self.text

    def summary(self) -> dict[str, Any] | None:
        """What is in summary.json; None while there is none."""
        path = self.run_dir / "summary.json"
        try:
            summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}; remove it to go on") from None
        return summary

    def state(self) -> State:
        """How far the run is; crashed is one that ended by a collapse, which is a result."""
        stored = self.stored_config()
        if stored is None:
            return "new"
        summary = self.summary()
        if summary is None or stored.train.max_steps != self.config.train.max_steps:
            return "stopped"
        if summary["completed"]:
            return "finished"
        # what has failed otherwise may hold the warning of a collapse too
        failure = summary.get("failure")
        return "crashed" if failure and failure == summary.get("collapse") else "stopped"

    def stored_config(self) -> Config | None:
        """The config of the run on the disk; None where there is no run."""
        path = self.run_dir / "config.json"
        try:
            return read_stored(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}; name another --runs") from None


def plan(request: Request) -> list[PlannedRun]:
    """All runs of a request, validated; nothing is started or written.

    Raises:
        UserError: an unknown table, data set or method, a key that the table decides, a missing
            train script, or a run on the disk of another configuration.
    """
    _refuse_own_keys(override.partition("=")[0] for override in request.overrides)
    known = dict.fromkeys(row.method for row in TABLES[request.table])
    unknown = [method for method in request.methods if method not in known]
    if unknown:
        raise UserError(f"{request.table} has no {' or '.join(unknown)}; it has {', '.join(known)}")
    rows = [row for row in TABLES[request.table] if row.method in (request.methods or known)]
    if not request.train_script.is_file():
        raise UserError(
            f"there is no train script {request.train_script}: isofast is run from a checkout, "
            "which has launch/train.py. Name it with --train-script"
        )
    runs = [
        _planned(request, dataset, row, seed)
        for dataset in request.datasets
        for row in rows
        for seed in range(request.seeds)
    ]
    _refuse_other_configs(runs)
    return runs


def check_data(request: Request) -> None:
    """Raises a UserError that names the data sets still to prepare, and the command for each."""
    missing = [
        f"isofast prepare {dataset} --root {request.root / dataset}"
        for dataset in request.datasets
        if not all((request.root / dataset / split).is_dir() for split in ("train", "val"))
    ]
    if missing:
        raise UserError(
            f"data sets are missing under --root {request.root}. Prepare them (with --archive "
            "where the data set comes in a file of yours):\n  " + "\n  ".join(missing)
        )


def make_folder(request: Request) -> None:
    """Makes the folder of the runs; raises a UserError where nothing can be written there."""
    try:
        request.folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=request.folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to {request.folder}: {error.strerror}; name another --runs"
        ) from None


def write_config(run: PlannedRun) -> None:
    """Writes the config file that the run's command names."""
    run.run_dir.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(run.config_path, lambda part: part.write_text(run.text, encoding="utf-8"))


def execute(runs: Sequence[PlannedRun], say: Callable[[str], None]) -> list[PlannedRun]:
    """Starts what is not finished, one run after the other; gives those that failed.

    A crashed run has not failed: its accuracy is in the table. An interruption ends the run that
    is going on and is raised again.
    """
    failed = []
    for number, run in enumerate(runs, 1):
        place = f"[{number}/{len(runs)}] {run.title}"
        state = run.state()
        if state in ("finished", "crashed"):
            say(f"{place}: {state} before")
            continue
        say(f"{place}: {'starts' if state == 'new' else 'goes on'}, in {run.run_dir}")
        write_config(run)
        code = run_to_its_end(run.command)
        state = run.state()
        if state == "crashed":
            say(f"{place}: crashed")
        elif code != 0:
            say(f"{place}: FAILED with exit code {code}; the others go on")
            failed.append(run)
        elif state != "finished":
            say(
                f"{place}: FAILED: --launcher ended before the run, with exit code 0. It has to "
                "wait for what it starts, as srun does and sbatch does not; the others go on"
            )
            failed.append(run)
    return failed


def _planned(request: Request, dataset: str, row: Row, seed: int) -> PlannedRun:
    run_dir = request.folder / dataset / row.folder / f"seed-{seed}"
    config_path = run_dir.with_suffix(".json")
    settings = _settings(request, dataset, row, seed)
    command = [*request.launcher, str(request.train_script), "--config", str(config_path)]
    command += ["--run-dir", str(run_dir)]
    command += [word for override in request.overrides for word in ("--set", override)]
    config = resolve(settings, request.overrides)
    # a whole section may be overridden as well, such as method={"name": "isoloss"}
    decided = resolve(settings)
    _refuse_own_keys(key for key, get in _OWN_KEYS.items() if get(config) != get(decided))
    return PlannedRun(dataset, row, seed, run_dir, settings, config, tuple(command))


def _settings(request: Request, dataset: str, row: Row, seed: int) -> dict[str, Any]:
    """The shipped config of the data set with the table's method on top."""
    path = request.train_script.parent / SHIPPED[dataset]
    try:
        shipped: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the config of {dataset}, {path}: {error}") from None
    shipped.pop(SCHEMA_KEY, None)
    # the quickstart's optimizer was chosen for IsoLoss with EMA, its decay of C for EMA
    shipped.pop("optimizer", None)
    method = shipped.pop("method", {})
    kept = {"decay": method["decay"]} if row.ema and "decay" in method else {}
    # the table is of the end of each run
    shipped = merge(shipped, {"evaluation": {"at_start": False, "knn_pixels": False}})
    if request.scale == "small":
        shipped = merge(shipped, _SMALL_DIGITS if dataset == "digits" else _SMALL)
    return merge(
        shipped,
        {
            "seed": seed,
            "data": {"root": str(request.root / dataset)},
            "method": kept | row.settings,
            "train": {} if request.epochs is None else {"epochs": request.epochs},
        },
    )


def _refuse_own_keys(keys: Iterable[str]) -> None:
    """Raises a UserError where ``keys`` of --set have one that the table decides."""
    for key in keys:
        if key in _OWN_KEYS:
            raise UserError(
                f"--set {key} is what the table decides; use --seeds, --epochs, --root, "
                "--datasets or --methods"
            )


def _refuse_other_configs(runs: Sequence[PlannedRun]) -> None:
    for run in runs:
        stored = run.stored_config()
        changes = [] if stored is None else changed_keys(stored, run.config)
        if changes:
            raise UserError(
                f"{run.run_dir} holds a run of another configuration:\n  "
                + "\n  ".join(changes)
                + "\nGive the old values back, or name another --runs"
            )
