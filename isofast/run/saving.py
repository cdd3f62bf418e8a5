"""Checkpoints written in the background, during training."""

import copy
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from isofast.config.schema import CheckpointConfig
from isofast.errors import RunError
from isofast.run.background import HostCopy
from isofast.run.checkpoint import REMEDY, State, save_checkpoint


class Saver:
    """Copies the state and writes it in the background, one checkpoint at a time.

    Up to ``max_failures`` in a row may fail; the older checkpoints and the run are unaffected.

    Args:
        folder: the run's checkpoints folder.
        config: the config's checkpoint section.
        report: called with a line for the user.
        about: metadata of encoder.safetensors.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        report: Callable[[str], None],
        about: Mapping[str, str] | None = None,
    ) -> None:
        self._folder, self._config, self._about = folder, config, about
        self._allowed = config.max_failures
        self._last = time.monotonic()
        self._report = report
        self._thread = ThreadPoolExecutor(1, "isofast-checkpoint")
        self._pending: Future[None] | None = None

    def is_due(self) -> bool:
        """Whether ``every_minutes`` have passed since the last checkpoint or the last True."""
        minutes, now = self._config.every_minutes, time.monotonic()
        due = minutes is not None and now - self._last > 60 * minutes
        if due:
            self._last = now
        return due

    def save(
        self,
        step: int,
        state: State,
        encoder: dict[str, Tensor],
        best_step: int | None = None,
        records: Future[OSError | None] | None = None,
    ) -> None:
        """Save a step like `save_checkpoint`; wait only for the previous checkpoint.

        The checkpoint is written once ``records``, the earlier records, are on disk.

        Raises:
            RunError: too many checkpoints in a row could not be written.
        """
        try:
            self.wait()
            self._allowed = self._config.max_failures
        except RunError as error:
            if self._allowed == 0:
                raise
            self._allowed -= 1
            self._report(f"warning: {error}")
        self._last = time.monotonic()
        copies = _each(lambda x: HostCopy(x) if isinstance(x, Tensor) else x, (state, encoder))
        self._pending = self._thread.submit(self._write, step, copies, best_step, records)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            RunError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish the checkpoint that is being written."""
        self._thread.shutdown()

    def _write(
        self,
        step: int,
        copies: Any,
        best_step: int | None,
        records: Future[OSError | None] | None,
    ) -> None:
        state, encoder = _each(lambda x: x.get() if isinstance(x, HostCopy) else x, copies)
        if records is not None and (error := records.result()) is not None:
            raise RunError(f"could not write the records up to step {step}: {error}. {REMEDY}")
        keep, about = self._config.keep, self._about
        save_checkpoint(self._folder, step, state, encoder, keep, about, best_step)


def _each(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply ``function`` to the leaves of ``tree``."""
    if isinstance(tree, dict):
        # a copy keeps the versions in a module's state dict
        copied = copy.copy(tree)
        copied.update({key: _each(function, value) for key, value in tree.items()})
        return copied
    if isinstance(tree, list | tuple):
        return type(tree)(_each(function, value) for value in tree)
    return function(tree)
