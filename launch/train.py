"""Trains one configuration: `deepspeed launch/train.py --config launch/NAME.json`.

`python launch/train.py` does the same in one process.
"""

import argparse
import sys
from pathlib import Path

from isofast.config.load import load_config
from isofast.distributed import launched_rank
from isofast.errors import exit_code_of


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, as the launcher hands it on."""
    parser = argparse.ArgumentParser(description="Train a self-supervised encoder.")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="JSON config")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key, such as train.epochs=100; may be repeated",
    )
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="where results go (default: runs/NAME)"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over in a new folder beside the run dir"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors too")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    args = parse_arguments(arguments)

    def command() -> None:
        # imported late, so that a wrong key is refused at once
        config = load_config(args.config, args.set)
        from isofast.run.directory import choose_run_dir
        from isofast.training.loop import fit

        fit(config, choose_run_dir(args.config, args.run_dir, args.fresh))

    return exit_code_of(command, debug=args.debug, rank=launched_rank())


if __name__ == "__main__":
    sys.exit(main())
