"""Map a function over items with processes or threads, in order.

Pillow holds the GIL while decoding small images, so only processes make it faster. Each has its own
pipe, which closes when its writer ends and breaks when its reader does: with concurrent.futures'
single pipe, a process killed within a message left the caller waiting, and DataLoader reported it
as an error in whatever code the caller was running.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import signal
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

import torch

from isofast.errors import RunError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_FORK = multiprocessing.get_context("fork")
_PIECE = 16
# results that wait for the caller, in messages, over all processes
_READY = 8
# glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, in bytes
_MALLOPT = {-1: 128 << 20, -3: 32 << 20}


class _Raised(NamedTuple):
    """Takes the place of a result; without an error if the process has ended."""

    error: Exception | None = None


def in_processes(
    function: Callable[[_Item], _Result],
    items: Sequence[_Item],
    processes: int,
    *,
    piece: int = _PIECE,
) -> Generator[_Result, None, None]:
    """Yield ``function`` of each item, in order; few items are processed in the calling process.

    Processes are forked, so that only results are pickled. They end with the generator and with the
    caller, and are at most a few hundred items ahead of it.

    Args:
        function: runs on the CPU; must not use CUDA or DALI.
        processes: maximum number of processes, with one thread each.
        piece: number of items that make a process or a message worthwhile.

    Raises:
        RunError: a process was killed.
        Exception: what ``function`` raises, in place of its result.
    """
    processes = min(processes, -(-len(items) // piece))
    if processes < 2 or multiprocessing.current_process().daemon:
        yield from map(function, items)
        return
    ahead = -(-_READY * piece // processes)
    readers: list[Any] = []
    workers: list[BaseProcess] = []
    try:
        with _forking():
            for first in range(processes):
                reader, writer = _FORK.Pipe(duplex=False)
                readers.append(reader)
                results = _results(function, items[first::processes])
                work = (results, ahead, piece, readers, writer)
                workers.append(_FORK.Process(target=_work, args=work, daemon=True))
                workers[-1].start()
                writer.close()
        held: dict[Any, deque[Any]] = {reader: deque() for reader in readers}
        for k in range(len(items)):
            due = held[readers[k % processes]]
            while not due:
                for ready in wait([reader for reader in readers if not held[reader]]):
                    held[ready] += _received(ready)
            result = due.popleft()
            if isinstance(result, _Raised):
                raise result.error or _ended(workers[k % processes])
            yield result
    finally:
        for reader in readers:
            reader.close()
        for worker in workers:
            worker.kill()
            worker.join()


def in_threads(
    function: Callable[[_Item], _Result], items: Sequence[_Item], threads: int
) -> Generator[_Result, None, None]:
    """Yield the same from threads; for what must not be forked, or large results (not copied)."""
    piece = max(1, min(_PIECE, len(items) // threads))
    pool = ThreadPoolExecutor(threads, "isofast-work")
    ahead: deque[Future[list[_Result]]] = deque()
    try:
        for k in range(0, len(items), piece):
            ahead.append(pool.submit(lambda some: [*map(function, some)], items[k : k + piece]))
            if len(ahead) > 2 * threads:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _forking() -> Iterator[None]:
    # Ctrl-C is left to the caller, and stays blocked in the forked processes
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of locks that other threads hold; nothing here takes one of those
            warnings.filterwarnings("ignore", "This process .* multi-threaded", DeprecationWarning)
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(
    results: Iterator[object], ready: int, piece: int, readers: list[Any], writer: Connection
) -> None:
    # this fd tells the caller of its own signals
    signal.set_wakeup_fd(-1)
    for reader in readers:
        reader.close()
    # don't collect the caller's garbage: it may belong to a GPU
    gc.freeze()
    # OpenMP's threads do not survive a fork
    torch.set_num_threads(1)
    # otherwise a third of a photo's time goes into pages just returned to the system
    with contextlib.suppress(AttributeError):
        for parameter, value in _MALLOPT.items():
            ctypes.CDLL(None).mallopt(parameter, value)
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        while some := [*islice(results, ready)]:
            for k in range(0, len(some), piece):
                writer.send(some[k : k + piece])


def _results(function: Callable[[_Item], object], items: Sequence[_Item]) -> Iterator[object]:
    for item in items:
        try:
            yield function(item)
        except Exception as error:
            yield _Raised(error)
            return


def _received(reader: Any) -> list[Any]:
    try:
        return list(reader.recv())
    # EOFError between two messages, OSError within one
    except (EOFError, OSError):
        return [_Raised()]


def _ended(worker: BaseProcess) -> RunError:
    worker.join()
    code = worker.exitcode or 0
    how = f"was killed (signal {-code})" if code < 0 else f"ended (exit code {code})"
    return RunError(
        f"a process that reads images {how}, most often for lack of memory: free some, or use "
        "fewer processes (data.threads, or `taskset` before the command), then rerun the same "
        "command"
    )
