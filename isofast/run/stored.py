"""Runs read back from their folders, and short names that tell them apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from isofast.config.load import read_stored
from isofast.config.schema import Config, leaves
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
}
# Named whenever runs differ in them; other keys only if needed to tell runs apart.
_ALWAYS_KEYS = ("method.metric", "method.ema")
_WORDS = {
    "method.name": TITLES,
    "method.metric": {"cosine": "cosine", "euclidean": "Euclidean"},
    "method.ema": {True: "EMA", False: "no EMA"},
}


@dataclass(frozen=True)
class Run:
    """A run as far as it has come."""

    path: Path
    config: Config
    records: list[dict[str, Any]]
    """Of training, in order; at least one."""
    evaluations: list[dict[str, Any]]
    epochs_T: Array
    """Of the spectra."""
    eigenvalues_TD: Array
    """Descending in each row."""
    alignment_TD: Array | None
    """Of a linear predictor; NaN where unknown."""

    def curve(self, name: str) -> tuple[Array, Array]:
        """Return epochs and values of a recorded or evaluated number, where known."""
        known = [r for r in (*self.records, *self.evaluations) if r.get(name) is not None]
        return np.array([r["epoch"] for r in known]), np.array([float(r[name]) for r in known])


def read_run(path: Path) -> Run:
    """Read what a run has written so far.

    Raises:
        UserError: the folder is not a run, has no records or spectra yet, or is damaged.
    """
    config_path = path / "config.json"
    if not config_path.is_file():
        what = "holds no config.json" if path.is_dir() else "is not a folder"
        raise UserError(
            f"{path} is no run: it {what}. Give the folder that --run-dir named, such as runs/NAME"
        )
    try:
        config = read_stored(config_path)
        spectra = read_spectra(path / "spectrum.npz")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the run {path}: {error}") from None
    found = read_metrics(path / "metrics.jsonl")
    records = [record for record in found if "loss" in record]
    if not records or not spectra:
        missing = "records in metrics.jsonl" if not records else "eigenvalues in spectrum.npz"
        raise UserError(
            f"the run {path} has no {missing} yet; they come with its first checkpoint, every "
            f"{config.checkpoint.every_steps} steps and at its end. Train it on, or leave it out"
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
    """Return a short name for each run: its method, and the settings that tell it apart.

    Args:
        runs: the runs of one figure.
        first: keys always named, such as optimizer.weight_decay.
    """
    settings = [dict(leaves(run.config)) for run in runs]
    differing = [key for key in _ALWAYS_KEYS if len({_key(one, [key]) for one in settings}) > 1]
    wanted = list(dict.fromkeys(["method.name", *first, *differing]))
    distinct = len({_key(setting, wanted) for setting in settings})
    for key in dict.fromkeys(["method.alpha", *settings[0]]):
        split = len({_key(setting, [*wanted, key]) for setting in settings})
        if split > distinct:
            wanted.append(key)
            distinct = split
    names = [", ".join(_text(key, setting.get(key)) for key in wanted) for setting in settings]
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({run.path.name})" for name, run in zip(names, runs, strict=True)]


def _key(setting: dict[str, Any], keys: Sequence[str]) -> str:
    return repr([setting.get(key) for key in keys])


def _text(key: str, value: Any) -> str:
    if key in _WORDS:
        return _WORDS[key].get(value, str(value))  # type: ignore[attr-defined,no-any-return]
    if key == "method.alpha" and value is None:
        return "trained predictor"
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{key.rpartition('.')[2].replace('_', ' ')} {shown}"
