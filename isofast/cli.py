"""The `isofast` command."""

import argparse
import atexit
import io
import json
import os
import shlex
import sys
import warnings
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from isofast.errors import RunError, UserError, exit_code_of, tell


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parser_of_all().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # the terminal's encoding may not represent a file name
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    # Pillow warns that a large image could be an attack
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\)")
    ranks = {}
    if args.command == "train":
        from isofast.distributed import launched_local_rank, launched_rank

        ranks = {"rank": launched_rank(), "local_rank": launched_local_rank()}
    return exit_code_of(lambda: args.run(args), debug=args.debug, **ranks)


def parser_of_all() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    description = "Train, evaluate and export non-contrastive self-supervised encoders."
    parser = argparse.ArgumentParser(prog="isofast", description=description)
    try:
        own = version("isofast")
    except PackageNotFoundError:
        own = "(a checkout, not installed)"
    parser.add_argument("--version", action="version", version=f"isofast {own}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_prepare(commands)
    _add_train(commands)
    _add_doctor(commands)
    _add_profile(commands)
    _add_evaluate(commands)
    _add_embed(commands)
    _add_export(commands)
    _add_report(commands)
    _add_theory(commands)
    _add_figures(commands)
    _add_reproduce(commands)
    return parser


def _command(commands: Any, name: str, run: Any, **words: str) -> argparse.ArgumentParser:
    """Add a command, with the options common to all."""
    parser: argparse.ArgumentParser = commands.add_parser(name, **words)
    parser.add_argument("--debug", action="store_true", help="also show tracebacks of user errors")
    parser.set_defaults(run=run)
    return parser


def _add_prepare(commands: Any) -> None:
    parser = _command(commands, "prepare", _prepare, help="turn a data set into class folders")
    parser.add_argument(
        "name",
        help="digits, cifar10, cifar100, stl10, tinyimagenet or imagefolder; pack: write the "
        "images in --root to --output as tar shards",
    )
    parser.add_argument("--root", type=Path, required=True, help="folder to fill or check")
    parser.add_argument("--output", type=Path, help="pack: output folder")
    parser.add_argument("--shard-mib", type=int, default=256, help="pack: shard size (default 256)")
    parser.add_argument(
        "--archive",
        type=Path,
        help="the official archive, or the folder that it unpacks to, instead of a download",
    )
    parser.add_argument(
        "--on-bad-image",
        choices=("stop", "skip"),
        default="stop",
        help="what to do about unreadable images: stop (default) or skip them",
    )
    parser.add_argument(
        "--preview", type=Path, help="also draw some images with their two augmented views"
    )


def _prepare(args: argparse.Namespace) -> None:
    from isofast.data.prepare import prepare
    from isofast.data.preview import check_preview_path, write_preview

    if args.preview is not None:
        check_preview_path(args.preview)
    packs = args.name == "pack"
    if packs != (args.output is not None) or (packs and (args.archive or args.preview)):
        raise UserError(
            "`isofast prepare pack` takes --root and --output, but no --archive or --preview; the "
            "other names take no --output"
        )
    if packs:
        from isofast.data.pack import pack

        print(pack(args.root, args.output, shard_mib=args.shard_mib, on_bad=args.on_bad_image))
        return
    print(prepare(args.name, args.root, args.archive, on_bad=args.on_bad_image))
    if args.preview is not None:
        write_preview(args.name, args.root, args.preview, on_bad=args.on_bad_image)
        print(f"views of {args.name}: {args.preview}")


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        _train,
        help="train a configuration, or resume its run",
        description="Trains in one process. For several, start it with a launcher: deepspeed "
        "launch/train.py --config ..., or, without a checkout, deepspeed --no_python "
        "--no_local_rank isofast train --config ...",
    )
    _add_config(parser)
    parser.add_argument("--run-dir", type=Path, help="where results go (default: runs/NAME)")
    parser.add_argument(
        "--fresh", action="store_true", help="start over in a new folder next to the run dir"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def _train(args: argparse.Namespace) -> None:
    # the slow imports come later, so that a wrong key is reported at once
    from isofast.config.load import load_config

    config = load_config(args.config, args.set)
    from isofast.run.directory import choose_run_dir
    from isofast.training.loop import fit

    run_dir = choose_run_dir(args.config, args.run_dir, args.fresh)
    try:
        fit(config, run_dir)
    except RunError:
        # after the message, because a launcher may soon kill this process; without pictures,
        # because the GPU may have failed
        atexit.register(_write_own_report, run_dir, pictures=False)
        raise
    _write_own_report(run_dir, pictures=True)


def _write_own_report(run_dir: Path, *, pictures: bool) -> None:
    """Write the run's report, on rank 0 only; an error here does not change how the run ended."""
    from isofast.distributed import launched_rank

    metrics = run_dir / "metrics.jsonl"
    # a run that failed before its first record has nothing to show
    if launched_rank() > 0 or not metrics.exists() or not metrics.stat().st_size:
        return
    try:
        from isofast.evaluation.report import write_report

        write_report([run_dir], run_dir / "report.html", pictures=pictures)
        tell(f"report: {run_dir / 'report.html'}\n")
    except Exception as error:
        tell(f"no report ({error}); write it with `isofast report {run_dir}`\n")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        help="JSON config, or the name of a shipped one, such as tinyimagenet",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key, such as train.epochs=100; may be repeated",
    )


def _add_doctor(commands: Any) -> None:
    parser = _command(
        commands,
        "doctor",
        _doctor,
        help="check whether training can run here, and what is missing",
        description="Imports every library and runs kernels on every device. Exits with 1 if "
        "training cannot run.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _doctor(args: argparse.Namespace) -> None:
    try:
        from isofast.run.doctor import examine
    # a broken library may raise anything
    except Exception as error:
        verdict = "training cannot run here"
        problem = f"isofast cannot be imported: {type(error).__name__}: {error}"
        if args.json:
            print(json.dumps({"ok": False, "verdict": verdict, "problems": [problem]}))
        raise RunError(f"{verdict}: {problem}. Reinstall that library") from error

    report = examine()
    print(json.dumps(asdict(report)) if args.json else str(report))
    if not report.ok:
        raise RunError(report.verdict)


def _add_profile(commands: Any) -> None:
    parser = _command(
        commands,
        "profile",
        _profile,
        help="show where a training step spends its time",
        description="Trains for a few steps and saves only a trace of them.",
    )
    _add_config(parser)
    parser.add_argument("--steps", type=_count, default=20, help="default 20")
    parser.add_argument("--output", type=Path, default=Path("runs/profile"), help="output folder")


def _profile(args: argparse.Namespace) -> None:
    # set before torch is loaded: silences the start and end messages of its profiler
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from isofast.config.load import load_config
    from isofast.training.profile import profile_steps

    print(profile_steps(load_config(args.config, args.set), args.output, args.steps))


def _add_evaluate(commands: Any) -> None:
    parser = _command(
        commands,
        "evaluate",
        _evaluate,
        help="evaluate a run's frozen features: k-NN, logistic regression, few labels",
        description="Uses the encoder of the newest checkpoint, and the run's clean training and "
        "validation images.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--protocol",
        choices=("knn", "linear", "few", "all"),
        default="all",
        help="knn: weighted vote, k = 20 and 200; linear: logistic regression; few: the same with "
        "1, 5 and 10 labels per class (default: all)",
    )
    parser.add_argument(
        "--baselines",
        type=_words,
        default=[],
        metavar="NAME,...",
        help="compare with random (the untrained network), pixels (for small images) or weight "
        "files of the same encoder (.safetensors)",
    )
    parser.add_argument(
        "--train-images",
        type=_count,
        default=50_000,
        help="maximum number of labelled training images (default 50,000)",
    )
    parser.add_argument("--root", type=Path, help="data root (default: the run's data.root)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _evaluate(args: argparse.Namespace) -> None:
    from isofast.evaluation.offline import PROTOCOLS, evaluate

    report = evaluate(
        args.run_dir,
        PROTOCOLS if args.protocol == "all" else [args.protocol],
        args.baselines,
        train_images=args.train_images,
        root=args.root,
        say=lambda text: print(text, file=sys.stderr),
    )
    print(json.dumps(asdict(report)) if args.json else str(report))


def _add_embed(commands: Any) -> None:
    parser = _command(commands, "embed", _embed, help="write the features of a folder of images")
    _add_source(parser)
    parser.add_argument("--images", type=Path, required=True, help="image folder, read recursively")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help=".npz or .pt with embeddings (N, F) and filenames, or .csv with one row per image",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _embed(args: argparse.Namespace) -> None:
    from isofast.evaluation.embed import embed

    done = embed(args.source, args.images, args.output)
    for name, problem in done.skipped.items():
        print(f"{name}: {problem}", file=sys.stderr)
    if done.skipped:
        print(f"{len(done.skipped)} unreadable file(s) skipped", file=sys.stderr)
    if args.json:
        print(json.dumps(asdict(done)))
    else:
        print(
            f"{done.images:,} embeddings of {done.features} features, {done.images_per_s:,.0f} "
            f"images/s: {done.output}"
        )


def _add_export(commands: Any) -> None:
    parser = _command(
        commands,
        "export",
        _export,
        help="export an encoder to other libraries",
        description="Writes the encoder without a classifier, and prints how to load it.",
    )
    _add_source(parser)
    parser.add_argument(
        "--format",
        choices=("safetensors", "torchvision", "timm", "onnx", "huggingface"),
        required=True,
        help="torchvision and timm: a state dict (.pth or .safetensors); huggingface: a folder "
        "for timm",
    )
    parser.add_argument("--output", type=Path, required=True)


def _export(args: argparse.Namespace) -> None:
    from isofast.evaluation.export import export

    print(export(args.source, args.format, args.output))


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="RUN|FILE",
        help="a run's folder, its encoder.safetensors, or a torchvision or timm checkpoint",
    )


def _add_report(commands: Any) -> None:
    parser = _command(
        commands,
        "report",
        _report,
        help="write a one-file HTML report on runs: verdict, curves, spectrum, neighbours",
        description="Neither writing nor reading the report needs network access. Training writes "
        "one to each run's folder.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="report.html")
    parser.add_argument("--root", type=Path, help="data root (default: each run's data.root)")


def _report(args: argparse.Namespace) -> None:
    from isofast.evaluation.report import write_report

    write_report(args.runs, args.output, root=args.root)
    print(args.output)


def _add_theory(commands: Any) -> None:
    theory = commands.add_parser("theory", help="the paper's toy networks")
    what = theory.add_subparsers(dest="theory", required=True)
    parser = _command(what, "simulate", _simulate, help="train one network and print its spectrum")
    parser.add_argument(
        "--loss", choices=("euclidean", "iso_euclidean", "cosine", "iso_cosine"), required=True
    )
    for name, text in (
        ("stop-gradient", "let the gradient flow through the target"),
        ("predictor", "use W = I instead of V V^T"),
    ):
        dest = name.replace("-", "_")
        parser.add_argument(f"--no-{name}", dest=dest, action="store_false", help=text)
    parser.add_argument("--relu", action="store_true", help="apply a ReLU to the embeddings")
    parser.add_argument(
        "--paper-gradient",
        action="store_true",
        help="cosine without stop-gradient: the gradient that the paper prints, not the derivative",
    )
    parser.add_argument("--inputs", type=int, default=15, help="default 15")
    parser.add_argument("--outputs", type=int, default=10, help="default 10")
    parser.add_argument(
        "--lr", type=float, help="default 0.1, or 0.01 for the Euclidean losses with a predictor"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_descent(parser)
    for name, text in (
        ("figure2", "linear networks under every loss: embeddings and eigenvalues"),
        ("figure5", "the Euclidean and the cosine loss from three initialisations"),
        ("figure6", "like figure2, with a ReLU on the embeddings"),
    ):
        description = f"P Fig. {name[-1]}: {text}. The planes use ten times --samples."
        parser = _command(what, name, _toy_figure, help=text, description=description)
        parser.add_argument("--output", type=Path, required=True, help="output folder (PNG, NPZ)")
        _add_descent(parser)


def _add_descent(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, help="default 1,500, or 100,000 without predictor")
    parser.add_argument(
        "--samples",
        type=int,
        default=1000,
        help="pairs of views per step, where the gradient has no closed form (default 1,000)",
    )
    parser.add_argument("--seed", type=int, default=0)


def _simulate(args: argparse.Namespace) -> None:
    import torch

    from isofast.paper.toy import Toy, simulate

    toy = Toy(**{field.name: getattr(args, field.name) for field in fields(Toy)})
    # the matrices are small: threads cost more than they gain
    torch.set_num_threads(1)
    initial, final = simulate(toy).eigenvalues[[0, -1], 0]
    trace = [initial.sum(), final.sum()]
    if args.json:
        spectra = {"initial": initial.tolist(), "final": final.tolist(), "trace": trace}
        print(json.dumps({"loss": toy.loss, "matrix": toy.matrix, **spectra}))
        return
    print(f"{toy}, {toy.default_steps:,} steps at lr {toy.default_lr:g}, seed {toy.seed}")
    print(f"eigenvalues of {toy.matrix}\n{'':>5}  {'initial':>10}  {'final':>10}")
    for mode, (first, last) in enumerate(zip(initial, final, strict=True), 1):
        print(f"{mode:>5}  {first:>10.4f}  {last:>10.4f}")
    print(f"trace  {trace[0]:>10.4f}  {trace[1]:>10.4f}")


def _toy_figure(args: argparse.Namespace) -> None:
    import torch

    from isofast.paper.toy_figures import write_figure

    torch.set_num_threads(1)
    settings = {"seed": args.seed, "samples": args.samples, "steps": args.steps}
    paths = write_figure(
        args.theory, args.output, say=lambda text: print(text, file=sys.stderr), **settings
    )
    print("\n".join(map(str, paths)))


def _add_figures(commands: Any) -> None:
    parser = _command(
        commands,
        "figures",
        _figures,
        help="draw the paper's figures 3, 4, 7 and 8, or the metrics, from runs",
        description="3: eigenvalues of C and accuracy of each run; 4: alignment of trained linear "
        "predictors with C's eigenvectors; 7: runs with and without an EMA target; 8: weight "
        "decays; metrics: each label-free metric against k-NN accuracy, over all evaluations, as "
        "PNG and CSV.",
    )
    parser.add_argument("what", choices=("3", "4", "7", "8", "metrics"), help="which figure")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--output", type=Path, required=True, help="output folder")


def _figures(args: argparse.Namespace) -> None:
    from isofast.paper.figures import draw
    from isofast.paper.metrics_figure import draw_metrics

    if args.what == "metrics":
        paths = draw_metrics(args.runs, args.output)
    else:
        paths = draw(int(args.what), args.runs, args.output)
    print("\n".join(map(str, paths)))


def _add_reproduce(commands: Any) -> None:
    parser = _command(
        commands,
        "reproduce",
        _reproduce,
        help="train the runs of one of the paper's tables, and compare with its results",
        description="Trains every method of the table with several seeds, one run after "
        "another. Repeat the command to skip finished runs and resume stopped ones.",
    )
    parser.add_argument(
        "table",
        choices=("table2", "table3"),
        help="table2: byol, simsiam and alpha 0.5 (directpred, isoloss); "
        "table3: alpha 1 (directcopy, isoloss)",
    )
    parser.add_argument(
        "--datasets",
        type=_words,
        nargs="+",
        default=[],
        metavar="NAME",
        help="any of cifar10, cifar100, stl10, tinyimagenet, digits (default: all but digits, or "
        "cifar10 with --scale small)",
    )
    parser.add_argument(
        "--methods", type=_words, nargs="+", default=[], metavar="NAME", help="only these"
    )
    parser.add_argument(
        "--scale",
        choices=("paper", "small"),
        default="paper",
        help="small: a narrow network for 10 epochs (40 on digits), one seed, with figures 3 and 7",
    )
    parser.add_argument("--seeds", type=_count, help="seeds 0 to N-1 (default 5; small: 1)")
    parser.add_argument("--epochs", type=_count, help="default: set by --scale; 1,000 for paper")
    parser.add_argument("--root", type=Path, required=True, help="holds each data set as ROOT/NAME")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), help="where runs go")
    parser.add_argument(
        "--launcher",
        type=shlex.split,
        default=[sys.executable],
        help="how to start launch/train.py, such as 'deepspeed --num_gpus 4' or 'srun "
        ".venv/bin/python' (default: this Python)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key in every run; may be repeated",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="write the config files and print the commands, to run by hand or by a scheduler; "
        "start nothing",
    )


def _reproduce(args: argparse.Namespace) -> None:
    from isofast.paper.reproduce import reproduce
    from isofast.paper.tables import Request

    request = Request(
        table=args.table,
        root=args.root,
        runs=args.runs,
        datasets=[name for names in args.datasets for name in names],
        seeds=args.seeds,
        scale=args.scale,
        epochs=args.epochs,
        methods=[name for names in args.methods for name in names],
        overrides=args.set,
        launcher=args.launcher,
    )
    reproduce(request, print, dry_run=args.dry_run)


def _words(text: str) -> list[str]:
    """Split at commas."""
    words = [word for word in text.split(",") if word]
    if not words:
        raise argparse.ArgumentTypeError(f"expected at least one name, got {text!r}")
    return words


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
