"""Detection of a lost or hung rank, for which collectives would wait silently."""

import os
import threading
import time
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from isofast.distributed import World
from isofast.errors import GOES_ON, tell

INTERVAL_S = 2.0
LIMIT_S = 30.0
TURN_S = 4.0


class Heartbeat:
    """Ends this process when another rank has not answered for ``LIMIT_S``.

    A thread increments this rank's counter in the launcher's store and reads the others', however
    long a step, a check or an evaluation takes. It exits the process with code 1, because the main
    thread is stuck in a collective; the last checkpoint is kept. The first rank on each machine
    says why, or the second if the first hangs.

    Args:
        world: the ranks; a single rank is not watched, nor a caller's own group without
            MASTER_ADDR and MASTER_PORT, where the store is.
        told: set once the launcher has asked this process to end because another one has.
    """

    def __init__(self, world: World, told: threading.Event) -> None:
        self._world, self._told = world, told
        self._closed, self._ends = threading.Event(), threading.Event()
        now = time.monotonic()
        self._heard = dict.fromkeys(range(world.size), now)
        self._threads = [
            threading.Thread(target=job, daemon=True) for job in (self._beat, self._watch)
        ]

    def __enter__(self) -> "Heartbeat":
        if self._world.size > 1 and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        for thread in self._threads:
            if thread.is_alive():
                # a thread alive at interpreter exit aborts the process; the store may not answer
                thread.join(None if self._ends.is_set() else INTERVAL_S)

    def _beat(self) -> None:
        """Exchange counters; without rank 0's store every rank falls silent."""
        mine = self._world.rank
        others = [rank for rank in self._heard if rank != mine]
        try:
            store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timedelta(seconds=LIMIT_S),
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
            # the store ends with rank 0
            return

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(1.0):
            now = time.monotonic()
            if now - last > LIMIT_S / 2:
                # this process was the one suspended
                self._heard = dict.fromkeys(self._heard, now)
            last = now
            if self._silent():
                self._end()

    def _silent(self) -> list[int]:
        now = time.monotonic()
        return [rank for rank, heard in self._heard.items() if now - heard > LIMIT_S]

    def _end(self) -> None:
        self._ends.set()
        # by then all have noticed; once a rank has reported and exited, the launcher ends the rest
        time.sleep(TURN_S)
        silent = self._silent()
        if not silent:
            self._ends.clear()
            return
        rank, turn = self._world.rank, self._world.local_rank
        if turn == 0 or (not self._told.wait(min(turn, 2) * TURN_S) and turn == 1):
            # without the store every rank is silent, this one included
            which = f"rank {', '.join(map(str, silent))}"
            which = "rank 0, its launcher or its machine" if rank in silent else which
            tell(
                f"\nerror on rank {rank}: {which} has not answered for {LIMIT_S:g} s (lost, "
                f"hung or cut off). The last checkpoint is intact; {GOES_ON}\n"
            )
        os._exit(1)


def _key(rank: int) -> str:
    return f"isofast/heartbeat/{rank}"
