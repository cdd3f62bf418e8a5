"""Time isofast's training against other libraries' on the same work, data loading included.

    python bench/peers.py [--root DIR] [--methods simsiam byol] [--batch 256] [--width 64]

CIFAR-10-shaped files, ResNet-18 with the 3x3 stem, projector and predictor of equal sizes, SGD, two
views with the same recipe. isofast runs with its defaults and in fp32 (including the probe that it
always trains). The peers use torch's DataLoader with torchvision's v2 transforms, channels_last:
lightly's modules combined as in its documentation, in fp32 and under bf16 autocast, and a step
written as in solo-learn, with its online classifier. Each contender is a process that takes steps
on request, in rotating order. Memory is the GPU's peak or, on a CPU, what the process and its
workers hold. Without --root the files are cropped from two photographs. Without lightly its rows
are left out. Results go to bench/results/peers-NNN.csv and .png.
"""

import argparse
import copy
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path

import data
import harness
import psutil
import torch
from harness import Contender, Work
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from isofast.config.load import validate
from isofast.config.schema import EncoderConfig
from isofast.data import check_folder, open_dataset, recipe_for
from isofast.methods.networks import make_encoder
from isofast.training.build import build, is_graphed, train_loader
from isofast.training.graph import WARMUP_STEPS, GraphedStep
from isofast.training.optim import set_lr
from isofast.training.parallel import init_world

HIDDEN, OUTPUT = 4096, 256
Step = Callable[[], object]


def isofast_step(
    root: Path, method: str, batch: int, width: int, workers: int, precision: str
) -> Step:
    """A run's step, with its loader."""
    config = validate(
        {
            "data": {"dataset": "cifar10", "root": str(root), "threads": workers},
            "encoder": {"width": width},
            "projector": {"hidden": HIDDEN, "output": OUTPUT},
            "method": {"name": method},
            "optimizer": {"name": "sgd"},
            "train": {"batch_size": batch, "precision": precision},
        }
    )
    world = init_world()
    train, recipe = check_folder(open_dataset(root, "train")), recipe_for("cifar10")
    state = build(config, world, len(train.classes))
    state.online.train()
    dtype = state.online.branch.precision
    loader = train_loader(config, world, train, recipe, dtype=dtype)
    set_lr(state.optimizer, 0, loader.steps_per_epoch, config)
    graphed = is_graphed(config, world)
    take_step = GraphedStep(state.step, world.device) if graphed else state.step
    return lambda: take_step(next(loader))


def torchvision_views(
    root: Path, batch: int, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Both views and the labels, by torchvision's DataLoader, channels_last."""
    for x1, x2, y_B in data.torchvision_batches(
        root, recipe_for("cifar10"), v2, batch, workers, device
    ):
        yield *(x.to(memory_format=torch.channels_last) for x in (x1, x2)), y_B


def lightly_step(
    root: Path, method: str, batch: int, width: int, workers: int, precision: str
) -> Step:
    """The SimSiam or BYOL step from lightly's documentation."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = torchvision_views(root, batch, workers, device)
    encoder = make_encoder(EncoderConfig(stem="cifar", width=width))
    student = torch.nn.Sequential(encoder, BYOLProjectionHead(8 * width, HIDDEN, OUTPUT))
    student.to(device, memory_format=torch.channels_last)
    predictor = BYOLPredictionHead(OUTPUT, HIDDEN, OUTPUT).to(device)
    teacher = None
    if method == "byol":
        teacher = copy.deepcopy(student)
        deactivate_requires_grad(teacher)
    parameters = [*student.parameters(), *predictor.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=3e-5, momentum=0.9, weight_decay=1e-4)
    criterion = NegativeCosineSimilarity()

    def forward(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        z_BD = student(x_BCHW)
        p_BD = predictor(z_BD)
        return p_BD, z_BD.detach() if teacher is None else teacher(x_BCHW)

    def step() -> None:
        x1, x2, _ = next(batches)
        if teacher is not None:
            update_momentum(student, teacher, m=0.99)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            (p1_BD, t1_BD), (p2_BD, t2_BD) = forward(x1), forward(x2)
            loss = 0.5 * (criterion(p1_BD, t2_BD) + criterion(p2_BD, t1_BD))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def solo_step(
    root: Path, method: str, batch: int, width: int, workers: int, precision: str
) -> Step:
    """The step as solo-learn writes it, with its online classifier and accuracies."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = torchvision_views(root, batch, workers, device)

    def head(inputs: int) -> torch.nn.Sequential:
        return torch.nn.Sequential(
            torch.nn.Linear(inputs, HIDDEN),
            torch.nn.BatchNorm1d(HIDDEN),
            torch.nn.ReLU(),
            torch.nn.Linear(HIDDEN, OUTPUT),
        ).to(device)

    encoder = make_encoder(EncoderConfig(stem="cifar", width=width))
    online = torch.nn.ModuleList([encoder, head(8 * width)])
    online.to(device, memory_format=torch.channels_last)
    predictor, classifier = head(OUTPUT), torch.nn.Linear(8 * width, 10).to(device)
    momentum = copy.deepcopy(online).requires_grad_(False) if method == "byol" else None
    parameters = [p for part in (online, predictor, classifier) for p in part.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=3e-5, momentum=0.9, weight_decay=1e-4)

    def forward(x_BCHW: Tensor, y_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = online[0](x_BCHW)
        z_BD = online[1](features)
        logits = classifier(features.detach())
        # top-1 and top-5 accuracy, logged every step
        top = logits.topk(5)[1].eq(y_B[:, None])
        (top[:, 0].float().mean().item(), top.any(1).float().mean().item())
        with torch.no_grad():
            t_BD = z_BD if momentum is None else momentum[1](momentum[0](x_BCHW))
        return predictor(z_BD), t_BD.detach(), functional.cross_entropy(logits, y_B)

    def step() -> None:
        x1, x2, y_B = next(batches)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            p1_BD, t1_BD, class1 = forward(x1, y_B)
            p2_BD, t2_BD, class2 = forward(x2, y_B)
            cosines = functional.cosine_similarity(p1_BD, t2_BD).mean()
            cosines = cosines + functional.cosine_similarity(p2_BD, t1_BD).mean()
            loss = -cosines / 2 + (class1 + class2) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if momentum is not None:
            with torch.no_grad():
                for target, source in zip(momentum.parameters(), online.parameters(), strict=True):
                    target.data = 0.99 * target.data + 0.01 * source.data

    return step


def serve(asked: Connection, make: Callable[[], Step]) -> None:
    """Take each requested number of steps; reply with ms per step and 10^9 bytes held."""
    step = make()
    cuda = torch.cuda.is_available()
    process = psutil.Process()
    while steps := asked.recv():
        began = time.perf_counter()
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
        took_ms = 1e3 * (time.perf_counter() - began) / steps
        family = [process, *process.children(recursive=True)]
        held = sum(member.memory_info().rss for member in family)
        asked.send((took_ms, (torch.cuda.max_memory_allocated() if cuda else held) / 1e9))


class Served(Contender):
    """A contender in its own process."""

    def __init__(self, name: str, make: Callable[[], Step]) -> None:
        super().__init__(name, lambda: None)
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        # not a daemon: its loader starts processes
        self.process = spawn.Process(target=serve, args=(theirs, make))
        self.process.start()

    def take(self, steps: int) -> tuple[float, float]:
        """Take ``steps`` steps; return ms per step and 10^9 bytes held."""
        self.connection.send(steps)
        took_ms, held_gb = self.connection.recv()
        return took_ms, held_gb

    def stop(self) -> None:
        self.connection.send(0)
        self.process.join(20)
        self.process.terminate()


def contenders(options: argparse.Namespace, root: Path, method: str) -> Iterator[Served]:
    sizes = (root, method, options.batch, options.width, options.workers)
    steps = {
        "isofast, as it comes": partial(isofast_step, *sizes, "auto"),
        "isofast, fp32": partial(isofast_step, *sizes, "fp32"),
        "solo-learn's step, bf16": partial(solo_step, *sizes, "bf16"),
    }
    if importlib.util.find_spec("lightly"):
        steps["lightly, bf16"] = partial(lightly_step, *sizes, "bf16")
        steps["lightly, fp32"] = partial(lightly_step, *sizes, "fp32")
    yield from (Served(name, make) for name, make in steps.items() if options.only in name)


def compare(found: list[Served], options: argparse.Namespace) -> None:
    """Fill in times and notes; the first steps compile and warm up."""
    warmup = WARMUP_STEPS + 5 if torch.cuda.is_available() else 2
    for contender in found:
        contender.take(warmup)
    held: dict[str, float] = {}
    for turn in range(options.rounds):
        for offset in range(len(found)):
            contender = found[(turn + offset) % len(found)]
            took_ms, held[contender.name] = contender.take(options.steps)
            contender.times_ms.append(took_ms)
    for contender in found:
        contender.note = f"{held[contender.name]:.1f} GB"
    data.add_speeds(found[::-1], options.batch)


def main() -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="prepared images; default: generated")
    parser.add_argument("--methods", nargs="+", choices=("simsiam", "byol"), default=["simsiam"])
    parser.add_argument("--batch", type=int, default=256 if cuda else 64)
    parser.add_argument("--width", type=int, default=64 if cuda else 32)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=9, help="n")
    parser.add_argument("--steps", type=int, default=100 if cuda else 3, help="per round")
    names = ("isofast", "solo-learn", "lightly", "fp32", "bf16")
    parser.add_argument(
        "--only", choices=names, default="", help="only contenders whose name contains this"
    )
    options = parser.parse_args()
    if not importlib.util.find_spec("lightly"):
        print("lightly is not installed (pip install lightly): its rows are left out")
        if options.only == "lightly":
            return 1
    versions = {
        name: metadata.version(name)
        for name in ("torchvision", "lightly")
        if importlib.util.find_spec(name)
    }
    for key, value in (harness.environment() | versions).items():
        print(f"{key}: {value}")
    timings = []
    with tempfile.TemporaryDirectory() as folder:
        root = options.root
        if root is None:
            root = Path(folder)
            data.generate(root, 32, data.GENERATED)
        for method in options.methods:
            found = list(contenders(options, root, method))
            try:
                compare(found, options)
            finally:
                for contender in found:
                    contender.stop()
            question = f"{method}, ResNet-18 of width {options.width}, batch {options.batch}"
            # no floor: the networks take most of the time
            timings += harness.summarize(question, found, Work(0))
            print(harness.table(timings[-len(found) :]))
    print(*harness.write("peers", timings, **versions), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
