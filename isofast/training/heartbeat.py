"""Notices a rank that is gone or hangs, which the collectives would wait for in silence."""

import os
import sys
import threading
import time
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from isofast.distributed import World
from isofast.errors import GOES_ON

INTERVAL_S = 2.0
LIMIT_S = 30.0
TURN_S = 4.0


class Heartbeat:
    """Ends this process when another rank has not answered for ``limit_s``.

    A thread counts up a number in the launcher's store and reads those of the others, however long
    a step, a check or an evaluation takes. The process ends with exit code 1, for its main thread
    waits in a collective; the run's last checkpoint stands. The first rank of a machine says why,
    the second where the first hangs.

    Args:
        world: the ranks; nothing is watched in a run of one.
        told: set once the launcher has asked this process to end, for another one has.
        limit_s: seconds.
    """

    def __init__(self, world: World, told: threading.Event, limit_s: float = LIMIT_S) -> None:
        self._world, self._told, self._limit_s = world, told, limit_s
        self._closed, self._ends = threading.Event(), threading.Event()
        now = time.monotonic()
        self._heard = dict.fromkeys(range(world.size), now)
        self._threads = [
            threading.Thread(target=job, daemon=True) for job in (self._beat, self._watch)
        ]

    def __enter__(self) -> "Heartbeat":
        if self._world.size > 1:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        for thread in self._threads:
            if thread.is_alive():
                # one that Python's end finds alive aborts the process; the store may be cut off
                thread.join(None if self._ends.is_set() else INTERVAL_S)

    def _beat(self) -> None:
        """Exchange the numbers; without rank 0's store nothing is heard any more."""
        mine = self._world.rank
        others = [rank for rank in self._heard if rank != mine]
        try:
            store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timedelta(seconds=self._limit_s),
            )
            before = dict.fromkeys(others, 0)
            while not self._closed.wait(INTERVAL_S):
                store.add(_key(mine), 1)
                for rank in others:
                    beats = store.add(_key(rank), 0)
                    if beats != before[rank]:
                        before[rank], self._heard[rank] = beats, time.monotonic()
                self._heard[mine] = time.monotonic()
        except (RuntimeError, OSError):
            # at the end of a run rank 0 takes the store with it
            return

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(1.0):
            now = time.monotonic()
            if now - last > self._limit_s / 2:
                # it is this process that was stopped
                self._heard = dict.fromkeys(self._heard, now)
            last = now
            if self._silent():
                self._end()

    def _silent(self) -> list[int]:
        now = time.monotonic()
        return [rank for rank, heard in self._heard.items() if now - heard > self._limit_s]

    def _end(self) -> None:
        self._ends.set()
        # all have noticed then; once a rank has spoken and ended, a launcher tells the others
        time.sleep(TURN_S)
        silent = self._silent()
        if not silent:
            self._ends.clear()
            return
        rank, turn = self._world.rank, self._world.local_rank
        if turn == 0 or (not self._told.wait(min(turn, 2) * TURN_S) and turn == 1):
            # without the store no rank is heard, and this one is silent itself
            which = f"rank {', '.join(map(str, silent))}"
            which = "rank 0 or its machine" if rank in silent else which
            sys.stderr.write(
                f"\nerror on rank {rank}: {which} has not answered for {self._limit_s:g} s (lost, "
                f"hung or cut off). The last checkpoint stands; {GOES_ON}\n"
            )
        os._exit(1)


def _key(rank: int) -> str:
    return f"isofast/heartbeat/{rank}"
