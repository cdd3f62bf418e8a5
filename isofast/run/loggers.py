"""Loggers beside metrics.jsonl: TensorBoard, or a class of your own."""

from pathlib import Path
from typing import Protocol

from torch.utils.tensorboard import SummaryWriter

from isofast.config.plugins import import_object
from isofast.config.schema import Config
from isofast.errors import UserError

Record = dict[str, float | int | None]


class Logger(Protocol):
    """Receives a run's records, on the background thread."""

    def __init__(self, run_dir: Path, config: Config, step: int) -> None:
        """Start, or continue from ``step``; records of later steps come again."""

    def log(self, record: Record) -> None:
        """Log a record of metrics.jsonl."""

    def flush(self) -> None:
        """Write what is pending to the disk; called before each checkpoint."""

    def close(self) -> None:
        """End the log."""


class TensorBoard:
    """Event files in the run's folder tensorboard/."""

    def __init__(self, run_dir: Path, config: Config, step: int) -> None:
        folder = str(run_dir / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=step + 1 if step else 0)
        self.flush, self.close = self._writer.flush, self._writer.close

    def log(self, record: Record) -> None:
        for name, value in record.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, record["step"])


def make_loggers(run_dir: Path, config: Config, step: int) -> list[Logger]:
    """Start the loggers of ``logging.loggers``.

    Raises:
        UserError: one of them cannot be imported or started.
    """
    loggers: list[Logger] = []
    for name in config.logging.loggers:
        path = "isofast.run.loggers:TensorBoard" if name == "tensorboard" else name
        try:
            loggers.append(import_object(path)(run_dir, config, step))
        except Exception as error:
            raise UserError(
                f"logging.loggers: cannot start {name!r}: {type(error).__name__}: {error}. Fix it "
                f"or leave it out"
            ) from error
    return loggers
