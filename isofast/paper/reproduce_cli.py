"""`isofast reproduce`: its arguments, and what it prints."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isofast.errors import RunError, UserError

if TYPE_CHECKING:
    from isofast.paper.reproduce import PlannedRun

TABLES = ("table2", "table3")
DATASETS = ("cifar10", "cifar100", "stl10", "tinyimagenet", "digits")


def add_reproduce(commands: Any) -> None:
    """Adds the command to the subparsers of `isofast`."""
    parser = commands.add_parser(
        "reproduce",
        help="train the runs of one of the paper's tables, and print it beside the paper's",
        description="Trains every method of the table with several seeds, one run after the "
        "other. The same command skips what is finished and goes on with what was stopped.",
    )
    parser.add_argument(
        "table",
        choices=TABLES,
        help="table2: byol, simsiam and alpha 0.5 (directpred, isoloss); "
        "table3: alpha 1 (directcopy, isoloss)",
    )
    parser.add_argument(
        "--datasets",
        type=_words,
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"some of {', '.join(DATASETS)} (default: all but digits; with --scale small cifar10)",
    )
    parser.add_argument(
        "--methods", type=_words, nargs="+", default=[], metavar="NAME", help="only these"
    )
    parser.add_argument(
        "--scale",
        choices=("paper", "small"),
        default="paper",
        help="small: a narrow network for 10 epochs (20 on the digits), one seed; the table says "
        "what of it compares with the paper's, and figures 3 and 7 are drawn",
    )
    parser.add_argument(
        "--seeds", type=_count, metavar="N", help="seeds 0 to N-1 (5; with --scale small 1)"
    )
    parser.add_argument(
        "--epochs", type=_count, metavar="N", help="default: the scale's, 1,000 for the paper's"
    )
    parser.add_argument(
        "--root", type=Path, required=True, metavar="DIR", help="holds each data set as DIR/NAME"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="where runs go"
    )
    parser.add_argument(
        "--launcher",
        metavar="COMMAND",
        help="what stands before launch/train.py, such as 'deepspeed --num_gpus 4' or 'srun "
        ".venv/bin/python' (default: this Python)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key in every run; may be repeated",
    )
    parser.add_argument("--train-script", type=Path, metavar="FILE", help="launch/train.py")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="write the runs' config files and print the commands, for a scheduler or by hand; "
        "start nothing",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors too")
    parser.set_defaults(run=_reproduce)


def _reproduce(args: argparse.Namespace) -> None:
    from isofast.data.files import write_atomically
    from isofast.paper.reproduce import (
        PAPER_SEEDS,
        SMALL_SEEDS,
        TRAIN_SCRIPT,
        Request,
        check_data,
        execute,
        make_folder,
        plan,
    )
    from isofast.paper.tables import draw_figures, markdown_table, small_table

    small = args.scale == "small"
    datasets = list(dict.fromkeys(name for names in args.datasets for name in names))
    datasets = datasets or (["cifar10"] if small else [*DATASETS[:-1]])
    unknown = sorted({*datasets} - {*DATASETS})
    if unknown:
        raise UserError(f"unknown data set {', '.join(unknown)}; allowed: {', '.join(DATASETS)}")
    request = Request(
        table=args.table,
        datasets=datasets,
        root=args.root,
        runs=args.runs,
        seeds=args.seeds or (SMALL_SEEDS if small else PAPER_SEEDS),
        scale=args.scale,
        epochs=args.epochs,
        methods=[name for names in args.methods for name in names],
        overrides=args.set,
        launcher=_split(args.launcher or "") or [sys.executable],
        train_script=args.train_script or TRAIN_SCRIPT,
    )
    runs = plan(request)
    if args.dry_run:
        make_folder(request)
        for run in runs:
            _print_command(run)
        return
    check_data(request)
    make_folder(request)
    failed = execute(runs, lambda text: print(text, flush=True))
    table = (small_table if small else markdown_table)(args.table, runs)
    path = request.table_path
    write_atomically(path, lambda part: part.write_text(table, encoding="utf-8"))
    print(f"\n{table}\n{path}")
    if small:
        try:
            for drawn in draw_figures(runs, path.with_suffix("")):
                print(drawn)
        except UserError as error:
            print(f"no figures: {error}")
    if failed:
        raise RunError(
            f"{len(failed)} of {len(runs)} runs failed, for the reasons above: "
            f"{'; '.join(run.title for run in failed)}. The same command goes on with them"
        )


def _print_command(run: "PlannedRun") -> None:
    """With its config file written, so that the command can be given as it is."""
    from isofast.paper.reproduce import write_config

    note = ""
    # a job that waits may be about to read it
    if run.has_other_config():
        note = "; its config file differs and stays as it is"
    else:
        write_config(run)
    print(f"{run.title} ({run.state()}{note}):\n  {shlex.join(run.command)}")


def _split(launcher: str) -> list[str]:
    try:
        return shlex.split(launcher)
    except ValueError as error:
        raise UserError(
            f"--launcher {launcher!r}: {error}; quote it as in a shell, each quotation mark closed"
        ) from None


def _words(text: str) -> list[str]:
    """ "a,b" as ["a", "b"]."""
    words = [word for word in text.split(",") if word]
    if not words:
        raise argparse.ArgumentTypeError(f"at least one name is wanted, got {text!r}")
    return words


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is wanted, got {text!r}")
    return int(text)
