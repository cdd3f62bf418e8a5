"""SIGTERM, SIGINT, SIGUSR1, SIGHUP during training: finish the step, save, then stop."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from isofast.distributed import World
from isofast.errors import GOES_ON, Stopped, tell
from isofast.training.stall import StallWatch

# Slurm kills 30 s after SIGTERM by default; a rank waiting for a lost peer would never save
GRACE_S = 60.0
# Ctrl-C reaches every process of the terminal; a launcher among them then sends SIGTERM as well
ECHO_S = 3.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Signals:
    """Holds back the signals that ask a run to stop or save; the loop polls between steps.

    The process exits after ``grace_s`` without a step or a batch, or if another signal arrives more
    than ``ECHO_S`` after the first.

    Args:
        told: set once a signal has arrived.
        group: the ranks, a gloo group, which must all poll after the same steps; None for one rank.
        grace_s: timeout in seconds.
    """

    def __init__(self, told: threading.Event, group: Any = None, grace_s: float = GRACE_S) -> None:
        self._grace_s, self._told, self._group = grace_s, told, group
        self._received = 0
        self._handled = threading.Event()
        self._watch: StallWatch | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._threads: list[threading.Thread] = []
        self._exchange: tuple[Any, torch.Tensor] | None = None

    def hold(self, watch: StallWatch) -> None:
        """Hold signals back until the context exits; ``watch`` counts the batches."""
        self._watch = watch
        if threading.current_thread() is not threading.main_thread():
            # Python delivers signals only to the main thread
            return
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        # a Python handler does not run while a collective blocks
        self._wakeup = signal.set_wakeup_fd(self._writer)
        # nohup ignores SIGHUP, which a terminal that closes sends
        closes = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
        numbers = _SIGNALS if closes else _SIGNALS[:-1]
        self._handlers = {number: signal.signal(number, _ignore) for number in numbers}
        self._start(self._listen)

    def __exit__(self, *exception: object) -> None:
        self._handled.set()
        if not self._handlers:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)
        # a thread alive at interpreter exit aborts the process
        for thread in self._threads:
            thread.join()

    def done(self) -> None:
        """Stop waiting for a step: the loop has ended."""
        self._handled.set()

    @property
    def received(self) -> signal.Signals | None:
        """The first signal that asked this process to stop."""
        return signal.Signals(self._received) if self._received else None

    def poll(self, save: bool = False) -> tuple[bool, signal.Signals | None]:
        """Return whether to save now and which signal stops the run, the same on all ranks.

        With several ranks the answer is that of the previous poll, so that a step hides the
        all-reduce.

        Args:
            save: request a checkpoint.
        """
        # 1 to save, or a signal's number plus 1
        asked = self._received + 1 if self._received or save else 0
        if self._group is not None:
            before, mine = self._exchange, torch.tensor(asked)
            maximum = dist.ReduceOp.MAX
            work = dist.all_reduce(mine, maximum, group=self._group, async_op=True)
            self._exchange = work, mine
            asked = 0
            if before is not None:
                work, number = before
                work.wait()
                asked = int(number)
        return asked > 0, signal.Signals(asked - 1) if asked > 1 else None

    def _listen(self) -> None:
        while data := os.read(self._reader, 1):
            if data[0] not in _SIGNALS:
                continue
            if not self._received:
                self._received, began = data[0], time.monotonic()
                self._told.set()
                self._start(self._give_up)
            # Slurm answers a requeue with SIGTERM, while a run that has saved closes its files
            elif time.monotonic() - began > ECHO_S and not (
                self._handled.is_set()
                and (self._received, data[0]) == (signal.SIGUSR1, signal.SIGTERM)
            ):
                if not self._handled.is_set():
                    name = signal.Signals(data[0]).name
                    tell(f"\n{name} again: ended without saving\n")
                os._exit(128 + data[0])
        os.close(self._reader)

    def _start(self, job: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=job, daemon=True))
        self._threads[-1].start()

    def _give_up(self) -> None:
        before = -1
        # an evaluation takes many batches and may take longer
        while (batches := 0 if self._watch is None else self._watch.batches) != before:
            before = batches
            if self._handled.wait(self._grace_s):
                return
        name = signal.Signals(self._received).name
        what = f"{name}, then no step or batch for {self._grace_s:g} s; the work was not saved"
        tell(f"\nerror: {what}\n")
        os._exit(128 + self._received)


def stopped(
    number: signal.Signals, step: int, world: World, failure: Exception | None = None
) -> Stopped:
    """Return the exception that ends a run which saved ``step`` or failed in the next one.

    After SIGUSR1, ask Slurm to requeue the job.
    """
    what = "which is saved" if failure is None else f"in a {type(failure).__name__}"
    message = f"stopped by {number.name} after step {step}, {what}; {GOES_ON}"
    env = os.environ
    if number == signal.SIGUSR1 and "SLURM_JOB_ID" in env and world.is_main:
        job = env["SLURM_JOB_ID"]
        if "SLURM_ARRAY_JOB_ID" in env:
            # the id of an array's last task is the array's: it would requeue all tasks
            job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
        try:
            subprocess.run(["scontrol", "requeue", job], check=True)
            message += ". Slurm was asked to requeue the job"
        # a container may lack scontrol, and a partition may forbid requeueing
        except (OSError, subprocess.CalledProcessError) as error:
            message += f". Slurm will not requeue the job ({error})"
    return Stopped(number, message)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing: the signal arrives through the wake-up pipe."""
