"""Time a whole training step, from plain torch to isofast's own.

    python bench/step.py [--presets cifar10 stl10] [--width 64] [--batch 256] [--rounds 31]

Each row adds one thing to the row above, on batches already on the device: eager fp32,
channels_last, bf16, both views in one forward, torch.compile, a CUDA graph (on a CPU the same calls
without one). The last row runs the step through DeepSpeed's engine, if it is installed: its cost is
the difference from torch.compile. The FLOPs of the matrix products are counted on the eager step,
and the share is of the dense bf16 peak that a large product reaches here. Below the rows are the
parts of the compiled step without a graph, and of waiting for generated JPEGs of the crop's size.
On a CPU the defaults are a narrow network and one preset. Results go to bench/results/step-NNN.csv
and .png, never overwriting earlier ones.
"""

import argparse
import dataclasses
import importlib.util
import statistics
import sys
import tempfile
from contextlib import closing
from functools import partial
from pathlib import Path

import harness
import torch
from data import generate
from harness import Contender, Timing, Work
from torch.utils.flop_counter import FlopCounterMode

from isofast.config.load import LAUNCH, load_config, validate
from isofast.data import Batch, check_folder, open_dataset, recipe_for
from isofast.distributed import World
from isofast.methods.batch_norm import ViewBatchNorm
from isofast.methods.closed_form import ClosedForm
from isofast.run.progress import waiting
from isofast.training.build import TrainState, build, train_loader
from isofast.training.graph import WARMUP_STEPS, GraphedStep
from isofast.training.parallel import close_world, init_world
from isofast.training.parts import part, timed_parts

CLASSES = {
    "cifar10": 10,
    "cifar100": 100,
    "digits": 10,
    "imagefolder": 1000,
    "stl10": 10,
    "tinyimagenet": 200,
}
PRESETS = sorted({path.stem for path in LAUNCH.glob("*.json")} - {"config.schema"})


def make_state(
    world: World,
    settings: dict[str, dict[str, object]],
    *,
    precision: str = "fp32",
    channels_last: bool = False,
    stacked: bool = False,
    compiled: bool = False,
    engine: bool = False,
) -> TrainState:
    """Build a run's state for one rung of the ladder."""
    train = {
        "precision": precision,
        "compile": "on" if compiled else "off",
        "cuda_graph": "off" if engine else "on",
    }
    config = validate(settings | {"train": settings["train"] | train})
    state = build(config, world, CLASSES[config.data.dataset])
    state.online.train()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for module in (state.online, state.target):
        if module is not None:
            module.to(memory_format=layout)
    for branch in (state.online.branch, state.target and state.target.branch):
        if branch is not None:
            branch.stacked = stacked
            for norm in branch.modules():
                if isinstance(norm, ViewBatchNorm):
                    norm.views = 2 if stacked else 1
    return state


def ladder(
    world: World, settings: dict[str, dict[str, object]]
) -> tuple[list[Contender], TrainState, Batch]:
    """Return the contenders, and the state and batch of the last one before the engine."""
    make = partial(make_state, world, settings)
    best = {"precision": "bf16", "channels_last": True, "stacked": world.device.type == "cuda"}
    rungs: dict[str, dict[str, object]] = {
        "eager, fp32": {},
        "channels_last": {"channels_last": True},
        "bf16": {"channels_last": True, "precision": "bf16"},
        "both views in one forward": {**best, "stacked": True},
        "torch.compile": {**best, "compiled": True},
    }
    config = validate(settings)
    side = recipe_for(config.data.dataset).crop
    size, classes = config.train.batch_size, CLASSES[config.data.dataset]
    x_NCHW = torch.randn(2 * size, 3, side, side)
    batch = Batch(
        x_NCHW.to(world.device, memory_format=torch.channels_last),
        torch.randint(classes, (size,), device=world.device),
    )
    contenders = []
    for name, kind in rungs.items():
        state = make(**kind)
        contenders.append(Contender(name, partial(state.step, batch)))
    graphed = GraphedStep(state.step, world.device)
    for _ in range(WARMUP_STEPS + 1 if world.device.type == "cuda" else 0):
        graphed(batch)
    contenders.append(Contender("CUDA graph", partial(graphed, batch)))
    if not importlib.util.find_spec("deepspeed"):
        return contenders, state, batch
    through_engine = make(**best, compiled=True, engine=True)
    contenders.append(
        Contender("no graph, DeepSpeed's engine", partial(through_engine.step, batch))
    )
    return contenders, state, batch


def measure_memory(contender: Contender) -> str:
    """Return a step's peak GPU memory beyond what all contenders hold; empty on a CPU."""
    contender.call()
    if not torch.cuda.is_available():
        return ""
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contender.call()
    return f", {(torch.cuda.max_memory_allocated() - held) / 1e9:.2f} GB beyond what is kept"


def time_parts(
    world: World, settings: dict[str, dict[str, object]], state: TrainState, batch: Batch, n: int
) -> dict[str, list[float]]:
    """Return the milliseconds of each part of ``n`` steps, and of waiting for a batch."""
    config = validate(settings)
    recipe = recipe_for(config.data.dataset)
    assert isinstance(state.method, ClosedForm)
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), recipe.crop, 4 * config.train.batch_size)
        images = check_folder(open_dataset(Path(folder), "train"))
        precision = state.online.branch.precision
        with closing(train_loader(config, world, images, recipe, dtype=precision)) as loader:
            next(loader)
            with timed_parts() as parts:
                for _ in range(n):
                    with part("data wait"):
                        next(loader)
                    state.step(batch)
                    with part("root, a part of the loss"):
                        state.method.predictor()
    return parts


def time_preset(preset: str, ema: bool, args: argparse.Namespace, world: World) -> list[Timing]:
    """Time and print a preset's ladder and the parts of its last step; return the timings."""
    overrides = {
        "data.root": "none",
        "encoder.width": args.width,
        "method.ema": ema,
        "train.batch_size": args.batch,
    }
    settings = load_config(preset, overrides).model_dump()
    question = (
        f"{preset}, {'with' if ema else 'without'} EMA, batch {args.batch}, width {args.width}"
    )
    with waiting(f"{question}: compiling"):
        contenders, state, batch = ladder(world, settings)
        with FlopCounterMode(display=False) as counter:
            contenders[0].call()
        memory = [measure_memory(contender) for contender in contenders]
    work = Work(0, counter.get_total_flops(), torch.bfloat16)
    measured = harness.compare(question, contenders, rounds=args.rounds, work=work)
    timings = [
        dataclasses.replace(
            timing, note=f"{1e3 * args.batch / timing.median_ms:,.0f} images/s{peak}"
        )
        for timing, peak in zip(measured, memory, strict=True)
    ]
    print(harness.table(timings), flush=True)
    for name, times in time_parts(world, settings, state, batch, args.rounds).items():
        print(f"  {name:34} {statistics.median(times):10.4f} ms", flush=True)
    return timings


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # cifar100's step is cifar10's
    names = ["cifar10", "tinyimagenet", "stl10"] if cuda else ["cifar10"]
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=names)
    parser.add_argument("--width", type=int, default=64 if cuda else 16)
    parser.add_argument("--batch", type=int, default=256 if cuda else 64)
    parser.add_argument("--rounds", type=int, default=31 if cuda else 7)
    args = parser.parse_args()
    for key, value in harness.environment().items():
        print(f"{key}: {value}", flush=True)
    world = init_world()
    try:
        timings = [
            timing
            for preset in args.presets
            for ema in (True, False)
            for timing in time_preset(preset, ema, args, world)
        ]
    finally:
        close_world()
    print(*harness.write("step", timings), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
