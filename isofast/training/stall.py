"""Detection of a loader that hangs, for example on a lost network file system."""

import os
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

from isofast.config.schema import DataConfig
from isofast.errors import GOES_ON, tell

_T = TypeVar("_T")


class StallWatch:
    """Exits this process with code 1 when a batch takes longer than ``data.stall_seconds``.

    The reader is then inside a system call that no exception can interrupt.

    Args:
        config: the config's data section.
        rank: rank named in the message.

    Attributes:
        batches: number of batches taken so far.
    """

    def __init__(self, config: DataConfig, rank: int) -> None:
        self._config, self._rank = config, rank
        self.batches, self._waiting = 0, False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "StallWatch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._thread.join()

    def over(self, batches: Iterable[_T]) -> Iterator[_T]:
        """Yield from ``batches``, watching how long each takes."""
        each = iter(batches)
        while True:
            self._waiting = True
            try:
                batch = next(each)
            except StopIteration:
                return
            finally:
                self._waiting = False
                self.batches += 1
            yield batch

    def _watch(self) -> None:
        # count seconds instead of reading a clock, which runs on while the process is suspended
        waited, before = 0, -1
        while not self._closed.wait(1.0):
            taken = self.batches
            waited = waited + 1 if self._waiting and taken == before else 0
            before = taken
            if waited >= self._config.stall_seconds:
                tell(
                    f"\nerror on rank {self._rank}: no batch of images for "
                    f"{self._config.stall_seconds:g} s (data.stall_seconds). Reading from "
                    f"{self._config.root} hangs or is too slow: check the disk or the network "
                    f"file system, or raise the limit. The last checkpoint is intact; {GOES_ON}\n"
                )
                os._exit(1)
