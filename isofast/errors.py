"""Errors that commands raise, and their exit codes."""

import errno
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

GOES_ON = "rerun the same command to continue"


class UserError(ValueError):
    """A user's mistake; the message says what was wrong, what is allowed and what to do.

    Commands print it without a traceback and exit with code 2.
    """


class RankError(UserError):
    """A user's mistake that only some ranks see; each of them prints it."""


class RunError(RuntimeError):
    """A run cannot continue (non-finite loss, collapse, lost data). Commands exit with code 1."""


class Stopped(BaseException):
    """A signal stopped a run, which can continue.

    Like KeyboardInterrupt it is not an Exception, so that a loop over runs ends too.

    Args:
        number: the signal. After SIGUSR1 commands exit with code 0, else with 128 + ``number``.
        message: for the user.
    """

    def __init__(self, number: signal.Signals, message: str) -> None:
        super().__init__(message)
        self.exit_code = 0 if number == signal.SIGUSR1 else 128 + number


def tell(text: str) -> None:
    """Print on stderr; a closed terminal or a full disk must not end a run."""
    with suppress(OSError):
        sys.stderr.write(text)


def exit_code_of(
    command: Callable[[], None], *, debug: bool, rank: int = 0, local_rank: int = 0
) -> int:
    """Run ``command``; return 0, or print its error and return that error's exit code.

    Args:
        command: what to run.
        debug: also print tracebacks of user errors.
        rank: rank of this process, named in messages of all but rank 0.
        local_rank: rank on this machine; rank 0 on each prints users' errors.
    """
    try:
        command()
    except (UserError, RunError) as error:
        if debug:
            traceback.print_exc()
        elif rank == 0:
            tell(f"\nerror: {error}\n")
        elif local_rank == 0 or isinstance(error, RunError | RankError):
            tell(f"\nerror on rank {rank}: {error}\n")
        return 2 if isinstance(error, UserError) else 1
    except Stopped as stopped:
        if rank == 0:
            tell(f"\n{stopped}\n")
        return stopped.exit_code
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
            if debug:
                traceback.print_exc()
            elif local_rank == 0:
                tell(f"\nerror{f' on rank {rank}' if rank else ''}: {error}\n")
            return 2
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        if rank == 0:
            tell(f"\nerror: {error}. Free some space, then rerun the same command\n")
        return 1
    except KeyboardInterrupt:
        if rank == 0:
            tell(f"\ninterrupted; {GOES_ON} from what is complete, or to start over\n")
        return 130
    return 0
