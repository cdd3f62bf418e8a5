"""A command in processes of its own, of which none is left running when it is interrupted."""

import os
import signal
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from types import FrameType

from isofast.errors import UserError

# Interrupted processes get this long for each of the signals, the mildest first.
_PATIENCE_S = 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
_POLL_S = 0.1


def run_to_its_end(command: Sequence[str]) -> int:
    """Starts ``command`` and waits for its exit code; when interrupted, ends all of its processes.

    The command gets a session of its own, so that all it starts can be told apart from others and
    reached at once: launchers like DeepSpeed's pass no signal on. A terminal's Ctrl-C does not
    reach that session, and is forwarded.

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


def groups_of(leader: int, known: Collection[int] = ()) -> set[int]:
    """Process groups in which something lives of what the process ``leader`` has started.

    Args:
        leader: the process at the head of a session.
        known: groups found before; a group of its own is known by its parents, which may end first.
    """
    parents, living, members = {}, {}, {leader}
    for folder in Path("/proc").iterdir():
        # a process may end while it is read
        with suppress(OSError):
            if not folder.name.isdigit():
                continue
            # the name before, in brackets, may hold anything
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            pid, (parent, group, session) = int(folder.name), map(int, fields[1:4])
            parents[pid] = parent
            if session == leader or group in known:
                members.add(pid)
            # what has ended and waits for its parent cannot be ended again
            if fields[0] not in "ZX":
                living[pid] = group
    while children := {pid for pid, parent in parents.items() if parent in members} - members:
        members |= children
    return {group for pid, group in living.items() if pid in members}


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Signals everything that ``process`` has started, ever more sternly, until it is gone.

    A further interruption, as of someone pressing Ctrl-C again, comes to the next signal at once.
    """
    hurried = Event()
    # no exception from here on: it could come between finding processes and remembering them
    before = signal.signal(signal.SIGINT, lambda number, frame: hurried.set())
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: hurried.set())
    groups: set[int] = set()
    for number in _SIGNALS:
        hurried.clear()
        groups = groups_of(process.pid, groups)
        for group in groups:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, number)
        until = time.monotonic() + _PATIENCE_S
        while groups and time.monotonic() < until and not hurried.is_set():
            time.sleep(_POLL_S)
            groups = groups_of(process.pid, groups)
        if not groups:
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
