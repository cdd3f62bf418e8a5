"""Where records go beside metrics.jsonl: TensorBoard, or a class of your own."""

from pathlib import Path
from typing import Protocol

from torch.utils.tensorboard import SummaryWriter

from isofast.config.plugins import import_object
from isofast.config.schema import Config
from isofast.errors import UserError

Record = dict[str, float | int | None]


class Logger(Protocol):
    """Receives a run's records, in a thread beside the training loop."""

    def __init__(self, run_dir: Path, config: Config, step: int) -> None:
        """Begins, or continues a run from ``step``: records of later steps come again."""

    def log(self, record: Record) -> None:
        """Takes a record, as in metrics.jsonl."""

    def flush(self) -> None:
        """Makes what was logged durable; called before each checkpoint."""

    def close(self) -> None:
        """Ends."""


class TensorBoard:
    """Event files in the run's folder tensorboard/."""

    def __init__(self, run_dir: Path, config: Config, step: int) -> None:
        self._writer = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=step + 1 if step else 0
        )

    def log(self, record: Record) -> None:
        for name, value in record.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def make_loggers(run_dir: Path, config: Config, step: int) -> list[Logger]:
    """The loggers of ``logging.loggers``.

    Raises:
        UserError: one of them cannot be imported or started.
    """
    loggers = []
    for name in config.logging.loggers:
        path = "isofast.run.loggers:TensorBoard" if name == "tensorboard" else name
        try:
            logger: Logger = import_object(path)(run_dir, config, step)
        except Exception as error:
            raise UserError(
                f"logging.loggers: cannot start {name!r}: {type(error).__name__}: {error}. Fix it, "
                f"or leave it out"
            ) from error
        loggers.append(logger)
    return loggers
