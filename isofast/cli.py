"""The `isofast` command."""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

from isofast.data.prepare import NAMES, prepare
from isofast.data.preview import check_preview_path, write_preview
from isofast.errors import GOES_ON, exit_code_of
from isofast.paper.figures_cli import add_figures
from isofast.paper.reproduce_cli import add_reproduce
from isofast.paper.theory_cli import add_theory

_PREPARE_INTERRUPTED = (
    "the same command starts over, but for a whole download and a build that is complete"
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = _parser().parse_args(arguments)
    return exit_code_of(lambda: args.run(args), debug=args.debug, interrupted=args.interrupted)


def _prepare(args: argparse.Namespace) -> None:
    if args.preview is not None:
        check_preview_path(args.preview)
    _say(str(prepare(args.name, args.root, args.archive, on_bad=args.on_bad_image)))
    if args.preview is not None:
        write_preview(args.name, args.root, args.preview, on_bad=args.on_bad_image)
        _say(f"views of {args.name}: {args.preview}")


def _say(text: str) -> None:
    """Print what may hold file names, which need not be text in the terminal's encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="isofast", description=__doc__)
    parser.set_defaults(interrupted=GOES_ON)
    parser.add_argument("--version", action="version", version=f"isofast {version('isofast')}")
    commands = parser.add_subparsers(dest="command", required=True)
    prep = commands.add_parser("prepare", help="turn a data set into folders of classes")
    prep.add_argument("name", choices=NAMES, help="which data set")
    prep.add_argument("--root", type=Path, required=True, help="folder to fill, or to check")
    prep.add_argument("--archive", type=Path, help="the official archive; nothing is downloaded")
    prep.add_argument(
        "--on-bad-image",
        choices=("stop", "skip"),
        default="stop",
        help="what to do about unreadable images: stop (default) or leave them out",
    )
    prep.add_argument(
        "--preview",
        type=Path,
        metavar="FILE.png",
        help="also draw some images with both of their augmented views",
    )
    prep.add_argument("--debug", action="store_true", help="show tracebacks of user errors too")
    prep.set_defaults(run=_prepare, interrupted=_PREPARE_INTERRUPTED)
    add_theory(commands)
    add_figures(commands)
    add_reproduce(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
