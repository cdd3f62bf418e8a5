"""The two ways a command ends badly: the user's mistake, and a run that cannot go on."""


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, what is allowed, what to do.

    Commands end with exit code 2 and print the message without a traceback.
    """


class RunError(RuntimeError):
    """A run cannot go on (non-finite loss, collapse, lost data); commands end with exit code 1."""
