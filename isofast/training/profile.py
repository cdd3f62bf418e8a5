"""Where the time of a training step goes: torch's profiler around some steps of a run."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from isofast.config.schema import Config
from isofast.data import ImageFolder, recipe_for, resolve_backend
from isofast.data.images import check_images, list_images
from isofast.distributed import World, launched_world_size
from isofast.errors import UserError
from isofast.run.directory import describe_environment
from isofast.training.build import build, train_loader
from isofast.training.graph import WARMUP_STEPS, GraphedStep
from isofast.training.optim import set_lr
from isofast.training.parallel import close_world, init_world
from isofast.training.parts import timed_parts


@dataclass(frozen=True)
class Profile:
    """Measured steps; times in milliseconds."""

    device: str
    step_ms: float
    """Median of a step as a run takes it, with its wait for the batch."""
    wait_ms: float
    """Median wait for the batch."""
    images_per_s: float
    parts_ms: dict[str, float]
    """Median of each part of an eager step, of the GPU where there is one."""
    operations: list[tuple[str, float, float]]
    """The slowest operations: name, calls a step, milliseconds a step without what they call."""
    memory_gb: float
    """Peak memory of the GPU, in 10^9 bytes; 0 without one."""
    advice: list[str]
    trace: Path
    """For https://ui.perfetto.dev or chrome://tracing."""

    def __str__(self) -> str:
        total = sum(self.parts_ms.values())
        rows = [
            f"{self.step_ms:.1f} ms a step, {self.images_per_s:,.0f} images/s, "
            f"{self.wait_ms:.1f} ms of it waiting for the batch; {self.device}",
            *([f"{self.memory_gb:.2f} GB of GPU memory at the peak"] if self.memory_gb else []),
            f"\n{'part of an eager step':30}{'ms':>9}{'share':>8}",
            *(f"{name:30}{ms:9.2f}{ms / total:8.0%}" for name, ms in self.parts_ms.items()),
            f"\n{'slowest operations':46}{'calls':>7}{'ms':>9}",
            *(f"{name[:45]:46}{calls:7.0f}{ms:9.2f}" for name, calls, ms in self.operations),
            "",
            *(f"try: {line}" for line in self.advice),
            f"trace: {self.trace}",
        ]
        return "\n".join(rows)


def profile_steps(config: Config, output: Path, steps: int = 20) -> Profile:
    """Time ``steps`` training steps of a run of one process, and write their trace.

    Nothing is saved but the trace. The first steps, in which kernels compile, are left out.

    Args:
        config: the run's.
        output: folder of trace.json; made if it does not exist.
        steps: to time, and as many again to trace.

    Raises:
        UserError: the configuration or the data does not allow the run, or ``output`` cannot be
            made.
    """
    if launched_world_size() > 1:
        raise UserError("isofast profile is for one process; start it without a launcher")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error}; name another --output") from None
    train = check_images(config, list_images(config)).train
    world = init_world()
    try:
        return _profile(config, train, world, output, steps)
    finally:
        close_world()


def _profile(config: Config, train: ImageFolder, world: World, output: Path, steps: int) -> Profile:
    data, cuda = config.data, world.device.type == "cuda"
    recipe = recipe_for(data.dataset, crop=data.crop, augmentation=data.augmentation)
    state = build(config, world, max(1, len(train.classes)))
    state.online.train()
    backend = resolve_backend(data.backend, train, recipe, world.device, data.resident_limit_gb)
    precision = state.online.branch.precision
    loader = train_loader(config, world, train, recipe, backend=backend, dtype=precision)
    take_step = GraphedStep(state.step, world.device) if state.graphed else state.step

    def synchronised_clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    # at the rate of the first step, the same throughout
    set_lr(state.optimizer, 0, loader.steps_per_epoch, config)
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
    return Profile(
        device=describe_environment(world)["device"],
        step_ms=step_ms,
        wait_ms=wait_ms,
        images_per_s=1e3 * config.batch_size_per_rank(world.size) / step_ms,
        parts_ms={name: statistics.median(times) for name, times in parts.items()},
        operations=_slowest(profiler, steps, cuda, set(parts)),
        memory_gb=memory_gb,
        advice=_advice(state.compiled, precision, backend, wait_ms / step_ms),
        trace=trace,
    )


def _slowest(
    profiler: profile, steps: int, cuda: bool, parts: set[str]
) -> list[tuple[str, float, float]]:
    kind = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = [
        (event.key, event.count / steps, getattr(event, kind) / steps / 1e3)
        for event in profiler.key_averages()
        if event.key not in parts
    ]
    return sorted(rows, key=lambda row: -row[2])[:10]


def _advice(compiled: bool, precision: torch.dtype, backend: str, waiting: float) -> list[str]:
    """What would make the step faster, most first."""
    advice = []
    if waiting > 0.1:
        also = "" if backend == "resident" else ", or data.backend=resident if the images fit"
        advice.append(f"more data.threads{also}: {waiting:.0%} of a step waits for the batch")
    if precision == torch.float32:
        advice.append("--set train.precision=bf16: the networks run in fp32")
    if not compiled:
        advice.append("--set train.compile=on: the networks run uncompiled")
    return advice
