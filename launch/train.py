"""Trains one configuration: `deepspeed launch/train.py --config launch/NAME.json`.

`python launch/train.py` does the same in one process, and so does `isofast train`.
"""

import sys

from isofast import cli


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.main(["train", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
