"""Loggers besides metrics.jsonl: TensorBoard, Weights & Biases, or your own class."""

import io
import os
import secrets
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from isofast.config.plugins import import_object
from isofast.config.schema import Config
from isofast.data.files import write_text
from isofast.errors import UserError

Record = dict[str, float | int | None]
# plotted at most: drawing takes time from training
_MOST_ROWS = 300


class Logger(Protocol):
    """Receives a run's records, on the background thread."""

    def __init__(self, run_dir: Path, config: Config, step: int) -> None:
        """Start, or resume from ``step``; later steps are logged again."""

    def log(self, record: Record) -> None:
        """Log a record of metrics.jsonl."""

    def flush(self) -> None:
        """Write pending records to disk; called at each checkpoint."""

    def close(self) -> None:
        """Close the log."""


class TensorBoard:
    """Event files in the run's tensorboard/ folder."""

    def __init__(self, run_dir: Path, config: Config, step: int) -> None:
        folder = str(run_dir / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=step + 1 if step else 0)
        self.flush, self.close = self._writer.flush, self._writer.close

    def log(self, record: Record) -> None:
        for name, value in _scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])


class WandB:
    """A Weights & Biases run, with its files in the run's wandb/ folder.

    A resumed run keeps the id in wandb/id; W&B keeps the first record of repeated steps. Each
    checkpoint logs a plot of C's eigenvalues so far, the first one also views.png.

    W&B's own environment variables apply: WANDB_MODE=offline, WANDB_PROJECT and the rest.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, run_dir: Path, config: Config, step: int) -> None:
        try:
            import wandb
        except ModuleNotFoundError:
            raise UserError(
                "logging.loggers has wandb, but the package is not installed. pip install wandb, "
                "or leave it out"
            ) from None
        known = run_dir / "wandb" / "id"
        if not known.exists():
            known.parent.mkdir(exist_ok=True)
            write_text(known, secrets.token_hex(4))
        self._picture = wandb.Image
        self._spectra = run_dir / "spectrum.npz"
        self._views = None if step else run_dir / "views.png"
        self._pictured = True
        # a run of the caller's, as in a sweep, gets the numbers, at its own steps, and stays open
        self._ours = wandb.run is None
        self._run = wandb.run or wandb.init(
            dir=run_dir,
            id=known.read_text(),
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "isofast"),
            name=os.environ.get("WANDB_NAME", run_dir.resolve().name),
        )
        # some keys may change when a run is resumed
        settings = config.model_dump(mode="json")
        self._run.config.update(settings, allow_val_change=True)  # type: ignore[no-untyped-call]

    def log(self, record: Record) -> None:
        self._step = int(record["step"] or 0)
        self._log(_scalars(record))
        self._pictured = False

    def flush(self) -> None:
        if self._pictured or not self._spectra.exists():
            return
        with np.load(self._spectra) as stored:
            picture = draw_spectra(stored["step"], stored["eigenvalues"])
        pictures = {"spectrum": self._picture(picture)}
        if self._views is not None and self._views.exists():
            pictures["views"] = self._picture(str(self._views))
            self._views = None
        self._log(pictures)
        self._pictured = True

    def close(self) -> None:
        if self._ours:
            self._run.finish()

    def _log(self, values: dict[str, Any]) -> None:
        if self._ours:
            self._run.log(values, step=self._step)
        else:
            self._run.log({"step": self._step, **values})


def draw_spectra(step_T: np.ndarray, eigenvalues_TD: np.ndarray) -> Image.Image:
    """Plot each eigenvalue of C over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    last = len(step_T) - 1
    places = np.unique(np.linspace(0, last, min(last, _MOST_ROWS) + 1).astype(int))
    # zeros have no logarithm
    shown_TD = np.where(eigenvalues_TD[places] > 0, eigenvalues_TD[places], np.nan)
    axes.plot(step_T[places], shown_TD, linewidth=0.7)
    axes.set(xlabel="step", ylabel="eigenvalues of C", yscale="log")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


def _scalars(record: Record) -> dict[str, float]:
    return {k: value for k, value in record.items() if k != "step" and value is not None}


_BUILT_IN: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WandB}


def make_loggers(run_dir: Path, config: Config, step: int) -> list[Logger]:
    """Start the loggers in ``logging.loggers``.

    Raises:
        UserError: one of them cannot be imported or started.
    """
    loggers: list[Logger] = []
    for name in config.logging.loggers:
        try:
            logger = _BUILT_IN.get(name) or import_object(name)
            loggers.append(logger(run_dir, config, step))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"logging.loggers: cannot start {name!r}: {type(error).__name__}: "
                f"{str(error).rstrip('.')}. Fix it or leave it out"
            ) from error
    return loggers
