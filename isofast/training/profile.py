"""Where a training step spends its time: torch's profiler around a few steps of a run."""

import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from isofast.config.schema import Config
from isofast.data import ImageFolder, recipe_for
from isofast.data.images import check_images, list_images
from isofast.distributed import World, launched_world_size
from isofast.errors import UserError
from isofast.run.directory import describe_environment
from isofast.run.progress import waiting
from isofast.training.build import build, has_bf16, train_loader
from isofast.training.graph import WARMUP_STEPS, GraphedStep
from isofast.training.optim import set_lr
from isofast.training.parallel import close_world, init_world
from isofast.training.parts import timed_parts


def profile_steps(config: Config, output: Path, steps: int = 20) -> str:
    """Profile training steps of a single-process run: write a trace and return a table.

    Only the trace is saved. The first steps, in which kernels compile, are left out.

    Args:
        config: the run's configuration.
        output: folder for trace.json, created if missing.
        steps: number of steps to time, and again to trace.

    Raises:
        UserError: the configuration or the data does not allow the run, or ``output`` cannot be
            created.
    """
    if launched_world_size() > 1:
        raise UserError("isofast profile runs in one process; start it without a launcher")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error}; use another --output") from None
    train = check_images(config, list_images(config)).train
    world = init_world()
    try:
        return _profile(config, train, world, output, steps)
    finally:
        close_world()


def _profile(config: Config, train: ImageFolder, world: World, output: Path, steps: int) -> str:
    data, cuda = config.data, world.device.type == "cuda"
    recipe = recipe_for(data.dataset, crop=data.crop, augmentation=data.augmentation)
    state = build(config, world, max(1, len(train.classes)))
    state.online.train()
    precision = state.online.branch.precision
    loader = train_loader(config, world, train, recipe, dtype=precision)
    take_step = GraphedStep(state.step, world.device) if state.graphed else state.step

    def synchronised_clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    # the first step's learning rate throughout
    set_lr(state.optimizer, 0, loader.steps_per_epoch, config)
    with waiting("compiling") if state.compiled else nullcontext():
        for _ in range(WARMUP_STEPS + 2 if state.graphed and cuda else 3):
            take_step(next(loader))
    waits, began = [], synchronised_clock()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(loader)
        waits.append(1e3 * (time.perf_counter() - asked))
        take_step(batch)
    step_ms = 1e3 * (synchronised_clock() - began) / steps
    memory_gb = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0

    batches = [next(loader) for _ in range(2)]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with timed_parts() as parts, profile(activities=activities) as profiler:
        for step in range(steps):
            state.step(batches[step % 2])
    loader.close()
    trace = output / "trace.json"
    profiler.export_chrome_trace(str(trace))
    wait_ms = statistics.median(waits)
    parts_ms = {name: statistics.median(times) for name, times in parts.items()}
    total = sum(parts_ms.values())
    could_be_bf16 = precision == torch.float32 and has_bf16(cuda)
    advice = _advice(state.compiled, could_be_bf16, loader.backend, wait_ms / step_ms)
    rows = [
        f"{step_ms:.1f} ms per step, {1e3 * config.train.batch_size / step_ms:,.0f} images/s, "
        f"{wait_ms:.1f} ms of it waiting for the batch; {describe_environment(world)['device']}",
        *([f"{memory_gb:.2f} GB of peak GPU memory"] if cuda else []),
        f"\n{'part of an eager step':30}{'ms':>9}{'share':>8}",
        *(f"{name:30}{ms:9.2f}{ms / total:8.0%}" for name, ms in parts_ms.items()),
        f"\n{'slowest operations':46}{'calls':>7}{'ms':>9}",
        *_slowest(profiler, steps, cuda, set(parts)),
        "",
        *(f"try: {line}" for line in advice),
        f"trace: {trace}",
    ]
    return "\n".join(rows)


def _slowest(profiler: profile, steps: int, cuda: bool, parts: set[str]) -> list[str]:
    """Return a line per slowest operation: name, calls per step, self time in ms per step."""
    kind = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [event for event in profiler.key_averages() if event.key not in parts]
    return [
        f"{event.key[:45]:46}{event.count / steps:7.0f}{getattr(event, kind) / steps / 1e3:9.2f}"
        for event in sorted(events, key=lambda event: -getattr(event, kind))[:10]
    ]


def _advice(compiled: bool, could_be_bf16: bool, backend: str, waiting: float) -> list[str]:
    """Return what would speed up the step, the largest gain first."""
    advice = []
    if waiting > 0.1:
        also = "" if backend == "resident" else ", or data.backend=resident if the images fit"
        advice.append(f"more data.threads{also}: {waiting:.0%} of a step waits for the batch")
    if could_be_bf16:
        advice.append("--set train.precision=bf16: the networks run in fp32")
    if not compiled:
        advice.append("--set train.compile=on: the networks run uncompiled")
    return advice
