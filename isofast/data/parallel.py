"""A function over many items, by processes or threads, in the order of the items.

Pillow decodes small pictures under Python's lock, so that only processes make it faster.
"""

import ctypes
import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, TypeVar

from isofast.errors import RunError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# enough to outweigh handing it to a process or thread
_PIECE = 16
_PR_SET_PDEATHSIG = 1

# of this process, which was forked for it
_function: Callable[[Any], Any]


def in_processes(
    function: Callable[[_Item], _Result], items: Sequence[_Item], processes: int
) -> Generator[_Result, None, None]:
    """Yield ``function`` of each item, in order; of few items in the caller's own process.

    The processes are forked: ``function`` need not be pickled. They end with the generator and with
    the caller, and work a few dozen items ahead each.

    Args:
        function: for the CPU; it must use neither CUDA nor DALI. What it returns or raises is
            pickled.
        processes: how many, at most.

    Raises:
        RunError: a process was killed.
    """
    processes = min(processes, -(-len(items) // _PIECE))
    if processes < 2 or multiprocessing.current_process().daemon:
        yield from map(function, items)
        return
    begin = _begin, (function, os.getpid())
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), *begin)
    try:
        with warnings.catch_warnings():
            # of locks that other threads hold (Python 3.12): nothing here takes one of theirs
            warnings.filterwarnings("ignore", "This process .* multi-threaded", DeprecationWarning)
            yield from _in_order(pool, _results, items, processes)
    except BrokenProcessPool as error:
        raise RunError(
            "a process that reads images was killed, most often for want of memory: free some, or "
            "take fewer processes (data.threads, or `taskset` ahead of the command), and give the "
            "same command again"
        ) from error


def in_threads(
    function: Callable[[_Item], _Result], items: Sequence[_Item], threads: int
) -> Generator[_Result, None, None]:
    """Yield the same, for what cannot be forked and for large results, which are not copied."""
    pool = ThreadPoolExecutor(threads, "isofast-work")
    yield from _in_order(pool, partial(_results, function=function), items, threads)


def _in_order(
    pool: Executor, work: Callable[[Sequence[_Item]], list[Any]], items: Sequence[_Item], ahead: int
) -> Generator[Any, None, None]:
    futures: deque[Future[list[Any]]] = deque()
    try:
        for k in range(0, len(items), _PIECE):
            futures.append(pool.submit(work, items[k : k + _PIECE]))
            if len(futures) > 2 * ahead:
                yield from futures.popleft().result()
        while futures:
            yield from futures.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function
    # the caller's affairs: Ctrl-C, and what its handlers do
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # nobody else would end this process if the caller is killed
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _results(items: Sequence[Any], function: Callable[[Any], Any] | None = None) -> list[Any]:
    return [*map(function or _function, items)]
