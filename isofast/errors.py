"""The two ways a command ends badly, and the exit codes they become."""

import errno
import sys
import traceback
from collections.abc import Callable

GOES_ON = "the same command goes on from what is complete"
STARTS_OVER = "the same command starts over"


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, what is allowed, what to do.

    Commands end with exit code 2 and print the message without a traceback.
    """


class RankError(UserError):
    """A user's mistake that shows on some processes of a group only, so that they must tell."""


class RunError(RuntimeError):
    """A run cannot go on (non-finite loss, collapse, lost data); commands end with exit code 1."""


def exit_code_of(
    command: Callable[[], None], *, debug: bool, rank: int = 0, interrupted: str = GOES_ON
) -> int:
    """Runs ``command``; returns 0, or prints its error and returns that error's exit code.

    Args:
        command: what to run.
        debug: show tracebacks of the user's mistakes as well.
        rank: of this process in its group. Only the first tells what all of them find.
        interrupted: what the same command does after Ctrl-C.
    """
    try:
        command()
    except (UserError, RunError) as error:
        if debug:
            traceback.print_exc()
        elif rank == 0:
            sys.stderr.write(f"\nerror: {error}\n")
        elif isinstance(error, RunError | RankError):
            sys.stderr.write(f"\nerror on rank {rank}: {error}\n")
        return 2 if isinstance(error, UserError) else 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        if rank == 0:
            sys.stderr.write(f"\nerror: {error}. Make room, then give the same command again\n")
        return 1
    except KeyboardInterrupt:
        if rank == 0:
            sys.stderr.write(f"\ninterrupted; {interrupted}\n")
        return 130
    return 0
