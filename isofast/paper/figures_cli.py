"""`isofast figures`: its arguments, and what it prints."""

import argparse
from pathlib import Path
from typing import Any

from isofast.errors import STARTS_OVER


def add_figures(commands: Any) -> None:
    """Adds the command to the subparsers of `isofast`."""
    parser = commands.add_parser(
        "figures",
        help="draw the paper's figures 3, 4, 7 and 8 from runs",
        description="3: C's eigenvalues and the accuracy of each run; 4: alignment of trained "
        "linear predictors with C's eigenvectors; 7: with an EMA target beside without; "
        "8: weight decays.",
    )
    parser.add_argument("number", type=int, metavar="3|4|7|8", help="which figure")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where it goes")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors too")
    parser.set_defaults(run=_figures, interrupted=STARTS_OVER)


def _figures(args: argparse.Namespace) -> None:
    # matplotlib takes a second to import
    from isofast.paper.figures import draw

    for path in draw(args.number, args.runs, args.output):
        print(path)
