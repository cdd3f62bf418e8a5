"""A background thread for the training loop."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

_Result = TypeVar("_Result")
# With this many jobs pending, the loop waits for the oldest, which bounds memory.
_MOST_PENDING = 16


class Background:
    """Runs jobs in order on one thread; the next ``do`` or ``wait`` raises a job's error.

    Args:
        one_core: for a loop that computes on the CPU: limit this thread, and all that start before
            ``close``, to one core. With a second OpenMP team, libgomp's threads sleep at each of
            the loop's barriers, and digits train at 390 images/s instead of 690 on two cores.
    """

    def __init__(self, *, one_core: bool = False) -> None:
        # read first: a thread's first call resets it to the value that any thread set last
        self._threads = torch.get_num_threads() if one_core else None
        initializer = partial(torch.set_num_threads, 1) if one_core else None
        self._pool = ThreadPoolExecutor(1, "isofast-background", initializer)
        self._pending: deque[Future[object]] = deque()

    def do(self, job: Callable[[], _Result]) -> "Future[_Result]":
        """Queue ``job`` and return at once."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= _MOST_PENDING):
            self._pending.popleft().result()
        future = self._pool.submit(job)
        self._pending.append(future)  # type: ignore[arg-type]
        return future

    def wait(self) -> None:
        """Wait for all queued jobs; raise the first error."""
        pending, self._pending = self._pending, deque()
        errors = [error for future in pending if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Finish queued jobs and end the thread. Raises nothing."""
        self._pool.shutdown(wait=True)
        self._pending.clear()
        if self._threads is not None:
            torch.set_num_threads(self._threads)


class HostCopy:
    """A snapshot of a tensor, on the CPU.

    Copies from a GPU are asynchronous but ordered on the current stream: later writes don't show.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._host = tensor.detach().clone()
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor.detach(), non_blocking=True)
        # blocking: the waiting thread sleeps instead of spinning
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(tensor.device))

    def get(self) -> Tensor:
        """Wait for the copy and return it."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
