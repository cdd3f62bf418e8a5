"""Run a command, and end its whole process tree on an interrupt."""

import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event
from types import FrameType

import psutil

from isofast.errors import UserError

# for each of the signals, the mildest first
_PATIENCE_S = 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
_POLL_S = 0.1


def run_to_its_end(command: Sequence[str]) -> int:
    """Start ``command`` and wait for its exit code; when interrupted, end its whole process tree.

    The command gets a session of its own, since launchers like DeepSpeed's pass no signal on; a
    terminal's Ctrl-C does not reach that session and is forwarded.

    Raises:
        UserError: the command cannot be started.
        KeyboardInterrupt: by Ctrl-C, SIGTERM or SIGHUP; nothing of the command is left running.
    """
    with _signals_interrupt():
        try:
            process = subprocess.Popen(command, start_new_session=True)
        except OSError as error:
            raise UserError(
                f"cannot start {command[0]}: {error.strerror}; check --launcher"
            ) from None
        try:
            return process.wait()
        except KeyboardInterrupt:
            _end(process)
            raise


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Signal the whole process tree, ever more sternly, until it is gone.

    Another interruption, of someone who presses Ctrl-C again, moves on to the next signal at once.
    """
    hurried = Event()
    # no exception from here on: it could come between finding processes and remembering them
    before = signal.signal(signal.SIGINT, lambda number, frame: hurried.set())
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: hurried.set())
    alive: set[psutil.Process] = set()
    for number in _SIGNALS:
        hurried.clear()
        # a child outlives its parent under another one, so what was found is kept
        with suppress(psutil.NoSuchProcess):
            leader = psutil.Process(process.pid)
            alive |= {leader, *leader.children(recursive=True)}
        for member in alive:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                member.send_signal(number)
        until = time.monotonic() + _PATIENCE_S
        while alive and time.monotonic() < until and not hurried.is_set():
            process.poll()
            alive = set(psutil.wait_procs(alive, timeout=_POLL_S)[1])
        if not alive:
            break
    process.poll()
    signal.signal(signal.SIGINT, before)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """A scheduler's SIGTERM and a closed terminal's SIGHUP interrupt as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        # under nohup a run outlives its terminal
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
