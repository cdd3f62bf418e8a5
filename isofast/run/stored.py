"""Read runs back from their folders, and label them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from isofast.config.load import read_stored
from isofast.config.schema import Config, leaves
from isofast.data.folder import printable
from isofast.errors import UserError
from isofast.run.metrics import read_metrics, read_spectra

Array = npt.NDArray[np.float64]

TITLES = {
    "isoloss": "IsoLoss",
    "directpred": "DirectPred",
    "directcopy": "DirectCopy",
    "byol": "BYOL",
    "simsiam": "SimSiam",
    "linear": "linear predictor",
    "sigreg": "SIGReg",
}
# Named whenever runs differ in them; other keys only if needed to tell runs apart.
_ALWAYS_KEYS = ("method.metric", "method.correlation", "method.ema")
_WORDS = {
    "method.name": TITLES,
    "method.metric": {"cosine": "cosine", "euclidean": "Euclidean"},
    "method.correlation": {"embeddings": "C of embeddings", "directions": "C of directions"},
    "method.ema": {True: "EMA", False: "no EMA"},
}


@dataclass(frozen=True)
class Run:
    """A run, finished or not."""

    path: Path
    config: Config
    records: list[dict[str, Any]]
    """Records of training steps, in order; at least one."""
    evaluations: list[dict[str, Any]]
    epochs_T: Array
    """Epochs at which the spectra were taken."""
    eigenvalues_TD: Array
    """Descending in each row."""
    alignment_TD: Array | None
    """Alignment of a linear predictor with C; NaN where unknown."""

    def curve(self, name: str) -> tuple[Array, Array]:
        """Return the epochs and values of a recorded or evaluated metric."""
        known = [r for r in (*self.records, *self.evaluations) if r.get(name) is not None]
        return np.array([r["epoch"] for r in known]), np.array([float(r[name]) for r in known])


def read_config(path: Path) -> Config:
    """Read the config of a run.

    Raises:
        UserError: the folder is not a run, or is damaged.
    """
    config_path = path / "config.json"
    if not config_path.is_file():
        what = "has no config.json" if path.is_dir() else "is not a folder"
        raise UserError(
            f"{path} is not a run: it {what}. Give a folder passed as --run-dir, e.g. runs/NAME"
        )
    try:
        return read_stored(config_path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the run {path}: {error}") from None


def read_run(path: Path) -> Run:
    """Read what a run has written so far.

    Raises:
        UserError: the folder is not a run, has no records or spectra yet, or is damaged.
    """
    config = read_config(path)
    spectra = read_spectra(path / "spectrum.npz")
    found = read_metrics(path / "metrics.jsonl")
    records = [record for record in found if "loss" in record]
    if not records or not spectra:
        missing = "records in metrics.jsonl" if not records else "eigenvalues in spectrum.npz"
        raise UserError(
            f"the run {path} has no {missing} yet; they are written with each checkpoint, every "
            f"{config.checkpoint.every_steps} steps and at the end. Continue it, or leave it out"
        )
    steps_per_epoch = records[-1]["step"] / records[-1]["epoch"]
    known = [one.alignment_D for one in spectra.values() if one.alignment_D is not None]
    return Run(
        path,
        config,
        records,
        [record for record in found if "val_top1" in record],
        np.array([*spectra]) / steps_per_epoch,
        np.stack([one.eigenvalues_D for one in spectra.values()]).astype(np.float64),
        np.stack(known).astype(np.float64) if known else None,
    )


def labels(runs: Sequence[Run], first: Sequence[str] = ()) -> list[str]:
    """Return a short label for each run: its method and the settings in which it differs.

    Runs with the same settings are told apart by their folders, relative to a common parent.

    Args:
        runs: the runs of one figure.
        first: keys that are always named, such as optimizer.weight_decay.
    """
    settings = [dict(leaves(run.config)) for run in runs]

    def groups(*keys: str) -> int:
        """Count the groups of runs that these keys tell apart."""
        return len({repr([setting.get(key) for key in keys]) for setting in settings})

    differing = [key for key in _ALWAYS_KEYS if groups(key) > 1]
    wanted = list(dict.fromkeys(["method.name", *first, *differing]))
    for key in dict.fromkeys(["method.alpha", *settings[0]]):
        if groups(*wanted, key) > groups(*wanted):
            wanted.append(key)
    names = [
        printable(", ".join(_text(key, setting.get(key)) for key in wanted)) for setting in settings
    ]
    if len(set(names)) == len(names):
        return names
    paths = [run.path.absolute() for run in runs]
    top = os.path.commonpath([path.parent for path in paths])
    places = [printable(str(path.relative_to(top))) for path in paths]
    return [f"{name} ({place})" for name, place in zip(names, places, strict=True)]


def _text(key: str, value: Any) -> str:
    if key in _WORDS:
        return _WORDS[key].get(value, str(value))  # type: ignore[attr-defined,no-any-return]
    if key == "method.alpha" and value is None:
        return "trained predictor"
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{key.rpartition('.')[2].replace('_', ' ')} {shown}"
