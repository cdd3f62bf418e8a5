"""Train one configuration: `deepspeed launch/train.py --config launch/NAME.json`.

`python launch/train.py` and `isofast train` do the same in one process.
"""

import sys

from isofast import cli


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    return cli.main(["train", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
