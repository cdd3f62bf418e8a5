"""The paper's tables 2 and 3, and the runs that reproduce them.

Rows are regrouped by the predictor's power, so that the methods within a table differ in one thing:
table 2 has the trained predictors and alpha 0.5, table 3 has alpha 1.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from isofast.config.load import LAUNCH, validate
from isofast.config.presets import merge
from isofast.config.schema import SCHEMA_KEY, Config, changed_keys
from isofast.data.files import read_json, write_json
from isofast.errors import UserError
from isofast.run.stored import TITLES, read_config

DATASETS = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "stl10": "STL-10",
    "tinyimagenet": "TinyImageNet",
}
# shipped config of each data set; digits is not in the paper but checks everything quickly
SHIPPED = {"digits": "quickstart.json"} | {name: f"{name}.json" for name in DATASETS}
# changes to the shipped configs: the table reports only the end of each run
_PAPER: dict[str, Any] = {"evaluation": {"at_start": False, "knn_pixels": False}}
_SMALL: dict[str, Any] = {
    "encoder": {"width": 16},
    "train": {"epochs": 10},
    "evaluation": {"at_start": True, "every_epochs": 2},
}
_SMALL_DIGITS: dict[str, Any] = {"train": {"epochs": 40}, "evaluation": {"at_start": True}}
_SEEDS = {"paper": 5, "small": 1}
# keys fixed by the table, which --set may not change
_FIXED_KEYS = (
    *("seed", "train.epochs", "data.root", "data.dataset"),
    *("method.name", "method.ema", "method.alpha"),
)


@dataclass(frozen=True)
class Row:
    """A method in a table, with the paper's results."""

    method: str
    alpha: float | None
    """None for a trained predictor."""
    ema: bool
    reported: Mapping[str, str]
    """The paper's top-1 in percent by data set, as printed."""

    @property
    def cells(self) -> list[str]:
        """Name, alpha and EMA as printed."""
        alpha = "-" if self.alpha is None else f"{self.alpha:g}"
        return [TITLES[self.method], alpha, "yes" if self.ema else "no"]


def _row(method: str, alpha: float | None, ema: bool, *cells: str) -> Row:
    return Row(method, alpha, ema, dict(zip(DATASETS, cells, strict=True)))


TABLES: dict[str, tuple[Row, ...]] = {
    "table2": (
        _row("byol", None, True, "92.6", "70.5", "91.7", "38.3"),
        _row("simsiam", None, False, "90.7", "66.3", "87.5", "39.8"),
        _row("directpred", 0.5, True, "92.0", "66.6", "88.8", "40.1"),
        _row("directpred", 0.5, False, "12.1 (crashed)", "1.6", "10.4", "1.3"),
        _row("isoloss", 0.5, True, "91.5", "69.0", "89.0", "44.8"),
        _row("isoloss", 0.5, False, "91.5", "64.3", "87.4", "40.4"),
    ),
    "table3": (
        _row("directcopy", 1.0, True, "91.3", "68.7", "89.3", "45.3"),
        _row("directcopy", 1.0, False, "12.1 (crashed)", "1.5", "10.3", "0.6"),
        _row("isoloss", 1.0, True, "91.5", "69.3", "89.1", "45.6"),
        _row("isoloss", 1.0, False, "91.4", "63.0", "86.9", "38.5"),
    ),
}


@dataclass(frozen=True)
class Request:
    """What to reproduce; empty fields take the defaults listed by `isofast reproduce --help`."""

    table: str
    root: Path
    runs: Path
    datasets: Sequence[str] = ()
    seeds: int | None = None
    scale: Literal["paper", "small"] = "paper"
    epochs: int | None = None
    methods: Sequence[str] = ()
    overrides: Sequence[str] = ()
    launcher: Sequence[str] = (sys.executable,)

    @property
    def folder(self) -> Path:
        """The folder of the table and its runs."""
        return self.runs / (self.table if self.scale == "paper" else f"{self.table}-{self.scale}")

    @property
    def table_path(self) -> Path:
        """The table's file; a partial table has its own, named after its contents."""
        datasets, methods, seeds = self._selected()
        parts = ["table"]
        if {*datasets} != {*DATASETS}:
            parts += [name for name in SHIPPED if name in datasets]
        if {*methods} != {row.method for row in TABLES[self.table]}:
            parts += methods
        if seeds != _SEEDS["paper"]:
            parts.append(f"seeds-{seeds}")
        return self.folder / f"{'-'.join(parts)}.md"

    def plan(self) -> list["PlannedRun"]:
        """Return all runs, validated, without writing anything.

        Raises:
            UserError: a data set or method is unknown, an override sets a key that the table fixes,
                or a run directory holds another configuration.
        """
        datasets, methods, seeds = self._selected()
        rows = [row for row in TABLES[self.table] if row.method in methods]
        return [self._planned(*place) for place in product(datasets, rows, range(seeds))]

    def _selected(self) -> tuple[list[str], list[str], int]:
        """Return data sets, methods in the table's order, and number of seeds."""
        datasets = self.datasets or (["cifar10"] if self.scale == "small" else [*DATASETS])
        unknown = {*datasets} - {*SHIPPED}
        if unknown:
            raise UserError(f"unknown data set {', '.join(unknown)}; allowed: {', '.join(SHIPPED)}")
        known = list(dict.fromkeys(row.method for row in TABLES[self.table]))
        unknown = {*self.methods} - {*known}
        if unknown:
            raise UserError(f"{self.table} has no {', '.join(unknown)}; it has {', '.join(known)}")
        methods = [name for name in known if name in (self.methods or known)]
        return list(dict.fromkeys(datasets)), methods, self.seeds or _SEEDS[self.scale]

    def _planned(self, dataset: str, row: Row, seed: int) -> "PlannedRun":
        no_ema = "" if row.ema or row.method == "simsiam" else "-no-ema"
        run_dir = self.folder / dataset / f"{row.method}{no_ema}" / f"seed-{seed}"
        settings = self._settings(dataset, row, seed)
        config, fixed = validate(settings, self.overrides), validate(settings)
        for key in _FIXED_KEYS:
            if _value(config, key) != _value(fixed, key):
                raise UserError(
                    f"--set {key} is fixed by the table; use --seeds, --epochs, --root, "
                    "--datasets or --methods"
                )
        command = [*self.launcher, str(LAUNCH / "train.py")]
        command += ["--config", str(run_dir.with_suffix(".json")), "--run-dir", str(run_dir)]
        command += [word for override in self.overrides for word in ("--set", override)]
        run = PlannedRun(dataset, row, seed, run_dir, settings, config, tuple(command))
        stored = run.stored_config()
        if stored is not None and (changes := changed_keys(stored, config)):
            raise UserError(
                "\n  ".join([f"{run_dir} holds a run with another configuration:", *changes])
                + "\nRestore the old values, or use another --runs"
            )
        return run

    def _settings(self, dataset: str, row: Row, seed: int) -> dict[str, Any]:
        """Return the data set's shipped config with the table's changes."""
        path = LAUNCH / SHIPPED[dataset]
        shipped: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # quickstart.json has an optimizer and a method, for IsoLoss with EMA
        for key in (SCHEMA_KEY, "optimizer", "method"):
            shipped.pop(key, None)
        settings = merge(shipped, _PAPER)
        if self.scale == "small":
            settings = merge(settings, _SMALL_DIGITS if dataset == "digits" else _SMALL)
        method: dict[str, Any] = {"name": row.method, "ema": row.ema}
        if row.alpha is not None:
            method["alpha"] = row.alpha
        train = {} if self.epochs is None else {"epochs": self.epochs}
        own = {"seed": seed, "data": {"root": str(self.root / dataset)}}
        return merge(settings, own | {"method": method, "train": train})


@dataclass(frozen=True)
class PlannedRun:
    """One seed of one method on one data set."""

    dataset: str
    row: Row
    seed: int
    run_dir: Path
    settings: dict[str, Any]
    """Contents of its config file."""
    config: Config
    """The same with presets and overrides."""
    command: tuple[str, ...]
    """The command that trains it."""

    @property
    def title(self) -> str:
        """Data set, method and seed."""
        alpha = "" if self.row.alpha is None else f" alpha {self.row.alpha:g}"
        ema = "EMA" if self.row.ema else "no EMA"
        return f"{self.dataset}, {TITLES[self.row.method]}{alpha}, {ema}, seed {self.seed}"

    def write_config(self) -> None:
        """Write the config file that the command names."""
        path = self.run_dir.with_suffix(".json")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, self.settings)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; use another --runs") from None

    def summary(self) -> dict[str, Any]:
        """Return the contents of summary.json; empty if it does not exist yet."""
        return read_json(self.run_dir / "summary.json")

    def state(self) -> Literal["new", "stopped", "finished", "crashed"]:
        """Return the run's state; a run ended by a collapse has crashed, which is a result."""
        stored, summary = self.stored_config(), self.summary()
        if stored is None:
            return "new"
        if not summary or stored.train.max_steps != self.config.train.max_steps:
            return "stopped"
        if summary["completed"]:
            return "finished"
        # a run may fail for another reason after a collapse warning
        failure = summary["failure"]
        return "crashed" if failure and failure == summary["collapse"] else "stopped"

    @property
    def has_ended(self) -> bool:
        """Whether there is a result."""
        return self.state() in ("finished", "crashed")

    def stored_config(self) -> Config | None:
        """Return the config in the run directory, or None."""
        exists = (self.run_dir / "config.json").exists()
        return read_config(self.run_dir) if exists else None


def _value(config: Config, key: str) -> Any:
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, name, None)
