"""`isofast theory`: the paper's toy networks on the command line. Imports torch when it runs."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isofast.errors import STARTS_OVER, UserError
from isofast.paper.toy import LOSSES, Toy

if TYPE_CHECKING:
    from isofast.paper.theory import Trajectory

FIGURES = {
    "figure2": "linear networks under every loss: embeddings and eigenvalues",
    "figure5": "the Euclidean and the cosine loss from three initialisations",
    "figure6": "as figure2, with a ReLU on the embeddings",
}


def add_theory(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `theory` and what follows it; the parsed arguments carry their handler in ``run``."""
    theory = commands.add_parser("theory", help="the paper's toy networks")
    theory.set_defaults(interrupted=STARTS_OVER)
    what = theory.add_subparsers(dest="theory", required=True, metavar="WHAT")
    simulation = what.add_parser("simulate", help="one network; prints its spectrum")
    _add_simulation(simulation)
    simulation.set_defaults(run=_simulate)
    for name, text in FIGURES.items():
        figure = what.add_parser(
            name,
            help=text,
            description=f"P Fig. {name[-1]}: {text}. The planes take ten times --samples.",
        )
        figure.add_argument("--output", type=Path, required=True, help="folder for PNG and NPZ")
        figure.add_argument(
            "--workers",
            type=int,
            help="processes of up to 600 MB (default: one a core, up to where the longest "
            "simulation alone decides the time; 1 for a few seconds' work)",
        )
        figure.set_defaults(run=_figure)
        _add_common(figure)


def _add_simulation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loss", choices=LOSSES, required=True)
    parser.add_argument("--no-stop-gradient", action="store_true", help="learn through the target")
    parser.add_argument("--no-predictor", action="store_true", help="W = I in place of V V^T")
    parser.add_argument("--relu", action="store_true", help="a ReLU on the embeddings")
    parser.add_argument(
        "--paper-gradient",
        action="store_true",
        help="of the cosine without stop-gradient, the paper's form, which is not the derivative",
    )
    parser.add_argument("--inputs", type=int, default=Toy.inputs, metavar="N", help="default 15")
    parser.add_argument("--outputs", type=int, default=Toy.outputs, metavar="M", help="default 10")
    parser.add_argument(
        "--lr", type=float, help="default 0.1; for the Euclidean losses with a predictor 0.01"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, help="default 1,500; without predictor 100,000")
    parser.add_argument(
        "--samples",
        type=int,
        default=Toy.samples,
        help="pairs of views a step, where the gradient has no closed form (default 1,000)",
    )
    parser.add_argument("--seed", type=int, default=Toy.seed)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors too")


def _simulate(args: argparse.Namespace) -> None:
    toy = Toy(
        loss=args.loss,
        stop_gradient=not args.no_stop_gradient,
        predictor=not args.no_predictor,
        relu=args.relu,
        paper_gradient=args.paper_gradient,
        inputs=args.inputs,
        outputs=args.outputs,
        steps=args.steps,
        samples=args.samples,
        lr=args.lr,
        seed=args.seed,
    )
    # torch takes seconds to import; `isofast --help` and refused arguments do without
    import torch

    from isofast.paper.theory import simulate

    # the matrices are small: threads cost more than they give
    torch.set_num_threads(1)
    trajectory = simulate(toy)
    if args.json:
        print(json.dumps(_summary(toy, trajectory)))
    else:
        print(_table(toy, trajectory))


def _summary(toy: Toy, trajectory: "Trajectory") -> dict[str, Any]:
    initial, final = trajectory.eigenvalues[[0, -1], 0]
    return {
        "loss": toy.loss,
        "matrix": toy.matrix,
        "initial": initial.tolist(),
        "final": final.tolist(),
        "trace": [initial.sum(), final.sum()],
    }


def _table(toy: Toy, trajectory: "Trajectory") -> str:
    initial, final = trajectory.eigenvalues[[0, -1], 0]
    steps, lr = toy.default_steps, toy.default_lr
    lines = [
        f"{toy.describe()}, {steps:,} steps at lr {lr:g}, seed {toy.seed}",
        f"eigenvalues of {toy.matrix}",
        f"{'':>5}  {'initial':>10}  {'final':>10}",
    ]
    rows = [*zip(range(1, len(initial) + 1), initial, final, strict=True)]
    lines += [f"{mode:>5}  {first:>10.4f}  {last:>10.4f}" for mode, first, last in rows]
    return "\n".join([*lines, f"trace  {initial.sum():>10.4f}  {final.sum():>10.4f}"])


def _figure(args: argparse.Namespace) -> None:
    if args.workers is not None and args.workers < 1:
        raise UserError(f"workers: got {args.workers}; give a number of at least 1")
    # refuses bad values before torch is imported
    Toy(steps=args.steps, samples=args.samples, seed=args.seed)
    import torch

    from isofast.paper.toy_figures import write_figure

    torch.set_num_threads(1)
    paths = write_figure(
        args.theory,
        args.output,
        workers=args.workers,
        done=lambda name: print(f"simulated {name}", file=sys.stderr),
        steps=args.steps,
        samples=args.samples,
        seed=args.seed,
    )
    for path in paths:
        print(path)
