"""Fair timing: interleaved contenders, medians with spread, and the environment.

`compare` warms up every contender, then times rounds in which each runs once, in rotating order, so
that clock drift and machine load affect all alike. CUDA contenders are timed with events around a
batch of calls, CPU contenders with the wall clock.
"""

import csv
import functools
import os
import platform
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(os.environ.get("BENCH_RESULTS") or Path(__file__).parent / "results")
ROOT = Path(__file__).parents[1]
# calls are repeated within a round until they take about this long
_BATCH_MS = 20.0
NOT_TIMED = "not timed: its tests fail (above)"


@dataclass(frozen=True)
class Timing:
    """n rounds of one contender, in milliseconds per call."""

    question: str
    contender: str
    n: int
    median_ms: float
    low_ms: float
    high_ms: float
    bytes: int
    floor_ms: float
    note: str = ""

    @property
    def gb_per_s(self) -> float:
        return self.bytes / self.median_ms / 1e6

    @property
    def share_of_floor(self) -> float:
        """1 at the floor; above 1 if a cache is faster than the memory that `limits` measures."""
        return self.floor_ms / self.median_ms


@dataclass(frozen=True)
class Work:
    """The minimum work that any contender must do.

    Attributes:
        bytes: read and written, each tensor once.
        flop: of the matrix products, two per multiply-add.
        dtype: of the matrix products, whose speed sets the compute floor.
    """

    bytes: int
    flop: int = 0
    dtype: torch.dtype = torch.float32


@dataclass
class Contender:
    """A callable to time."""

    name: str
    call: Callable[[], object]
    note: str = ""
    times_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    """What is timed, and the tests that must pass first."""

    name: str
    tests: list[str]
    contenders: Callable[[], tuple[list[Contender], Work]]


def environment() -> dict[str, str]:
    """Return the device, versions and commit of a measurement."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU, {_cpu_name()}, {torch.get_num_threads()} threads, no GPU"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    triton = [found.version for found in metadata.distributions(name="triton")]
    versions["triton"] = triton[0] if triton else "absent"
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    changed = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return {"device": device, **versions, "commit": commit + "+" * bool(changed)}


def _git(*arguments: str) -> str:
    """Return git's output; empty without git or a repository."""
    try:
        process = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return process.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} visible)" if names else platform.machine()


def compare(
    question: str,
    contenders: list[Contender],
    *,
    rounds: int,
    work: Work,
    cold: bool = False,
) -> list[Timing]:
    """Time the contenders side by side.

    Args:
        question: what is timed, for the table.
        contenders: what to time; each call does the whole work once.
        rounds: n, the number of timed rounds.
        work: the minimum work that any contender must do.
        cold: flush the caches before each call.
    """
    time_ms = _time_cold_ms if cold else _time_ms
    repeats = []
    for contender in contenders:
        for _ in range(3):
            contender.call()
        repeats.append(max(1, round(_BATCH_MS / max(time_ms(contender.call, 1), 1e-3))))
    for turn in range(rounds):
        for offset in range(len(contenders)):
            index = (turn + offset) % len(contenders)
            contender = contenders[index]
            contender.times_ms.append(time_ms(contender.call, repeats[index]))
    return summarize(question, contenders, work)


def summarize(question: str, contenders: list[Contender], work: Work) -> list[Timing]:
    """Return each contender's median with its 10th and 90th percentiles.

    The floor is the longer of the memory and compute times at the speeds that `limits` measures.
    """
    bytes_per_ms, flop_per_ms = limits(work.dtype)
    floor_ms = max(work.bytes / bytes_per_ms, work.flop / flop_per_ms)
    return [
        Timing(
            question,
            contender.name,
            len(contender.times_ms),
            statistics.median(contender.times_ms),
            *spread(contender.times_ms),
            work.bytes,
            floor_ms,
            contender.note,
        )
        for contender in contenders
    ]


@functools.cache
def limits(dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Return bytes per ms of a large in-place pass and flop per ms of a large random product.

    float32 products use TF32 on a GPU; both numbers are medians of 9.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensor = torch.ones(64 << 20, device=device)
    side = 4096 if device == "cuda" else 1024
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")

    def median(call: Callable[[], object]) -> float:
        return statistics.median(_time_ms(call, 1) for _ in range(9))

    try:
        # a copy on a CPU also reads what it overwrites
        moved = 2 * tensor.numel() * 4 / median(lambda: tensor.add_(1.0))
        return moved, 2 * side**3 / median(lambda: matrix @ matrix)
    finally:
        torch.set_float32_matmul_precision(before)


def spread(times_ms: list[float]) -> tuple[float, float]:
    """Return the 10th and 90th percentiles."""
    deciles = statistics.quantiles(times_ms, n=10, method="inclusive")
    return deciles[0], deciles[-1]


def _time_ms(call: Callable[[], object], repeats: int) -> float:
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) * 1e3 / repeats


def _time_cold_ms(call: Callable[[], object], repeats: int) -> float:
    # five times the L2 of an H100
    other = torch.empty(
        256 << 20, dtype=torch.uint8, device="cuda" if torch.cuda.is_available() else "cpu"
    )
    times_ms = []
    for _ in range(repeats):
        other.zero_()
        times_ms.append(_time_ms(call, 1))
    return statistics.fmean(times_ms)


@functools.cache
def tests_pass(*arguments: str) -> bool:
    """Return whether pytest passes with these arguments; show its output if not.

    With a GPU, also run the tests marked gpu, the only ones that see it. With BENCH_UNTESTED set,
    run none: the caller already has.
    """
    if os.environ.get("BENCH_UNTESTED"):
        return True
    for marked in ([], ["-m", "gpu"])[: 1 + torch.cuda.is_available()]:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *marked, *arguments]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        # 5: no test is marked gpu
        if process.returncode not in ((0, 5) if marked else (0,)):
            sys.stderr.write(process.stdout + process.stderr)
            return False
    return True


def run(
    name: str,
    questions: list[Question],
    rounds: int,
    results: Path = RESULTS,
    *,
    cold: bool = False,
) -> int:
    """Time every question whose tests pass, print and write the results; return the exit code."""
    for key, value in environment().items():
        print(f"{key}: {value}")
    timings, refused = [], not questions
    for question in questions:
        if not tests_pass(*question.tests):
            print(f"\n{question.name}: {NOT_TIMED}")
            refused = True
            continue
        contenders, work = question.contenders()
        timings += compare(question.name, contenders, rounds=rounds, work=work, cold=cold)
        print(table(timings[-len(contenders) :]), flush=True)
    if timings:
        print(*write(name, timings, results), sep="\n")
    return int(refused)


def write(name: str, timings: list[Timing], results: Path = RESULTS, **versions: str) -> list[Path]:
    """Write results/NAME-NNN.csv and .png, numbered after the last; return the paths.

    Args:
        name: the files' name, without the number.
        timings: the rows.
        results: the folder.
        versions: of packages that the contenders use, in addition to the `environment`.
    """
    multiplied = (f"{limits(d)[1] / 1e6:.1f} in {d}" for d in (torch.float32, torch.bfloat16))
    versions["limits"] = f"{limits()[0] / 1e6:.1f} GB/s moved; GFLOP/s: {', '.join(multiplied)}"
    names = [field.name for field in fields(Timing)]
    columns = [*names, "gb_per_s", "share_of_floor"]
    rows = [[getattr(timing, name) for name in columns] for timing in timings]
    table = write_rows(name, columns, rows, results, **versions)
    picture = table.with_suffix(".png")
    _plot(picture, timings)
    return [table, picture]


def write_rows(
    name: str,
    columns: list[str],
    rows: list[list[object]],
    results: Path = RESULTS,
    **about: str,
) -> Path:
    """Write results/NAME-NNN.csv, headed by the `environment` and ``about``; return the path."""
    results.mkdir(exist_ok=True)
    numbers = (int(path.stem[-3:]) for path in results.glob(f"{name}-[0-9][0-9][0-9].csv"))
    table = results / f"{name}-{max(numbers, default=0) + 1:03}.csv"
    load = f"{os.getloadavg()[0]:.1f} (one minute, {os.cpu_count()} cores)"
    about = environment() | about | {"date": time.strftime("%Y-%m-%d"), "load": load}
    with table.open("w", newline="") as file:
        for key, value in about.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            writer.writerow(f"{x:.5g}" if isinstance(x, float) else x for x in row)
    return table


def _plot(path: Path, timings: list[Timing]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    questions = list(dict.fromkeys(timing.question for timing in timings))
    figure, axes = plt.subplots(
        len(questions), figsize=(9, 1 + 0.42 * len(timings) + 0.5 * len(questions)), squeeze=False
    )
    for axis, question in zip(axes[:, 0], questions, strict=True):
        group = [timing for timing in timings if timing.question == question][::-1]
        medians = [timing.median_ms for timing in group]
        low = [timing.median_ms - timing.low_ms for timing in group]
        high = [timing.high_ms - timing.median_ms for timing in group]
        bars = axis.barh(
            [timing.contender for timing in group], medians, xerr=[low, high], capsize=3
        )
        axis.bar_label(bars, [f"{median:.3g} ms" for median in medians], padding=6)
        axis.set_xlim(0, max(timing.high_ms for timing in group) * 1.2)
        axis.set_title(textwrap.fill(f"{question} (n = {group[0].n})", 75), fontsize=10)
    about = environment()
    figure.suptitle(f"{about['device']}\ntorch {about['torch']}, {about['commit']}", fontsize=9)
    axes[-1, 0].set_xlabel("ms per call, median with 10th and 90th percentiles")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def table(timings: list[Timing]) -> str:
    """Return the timings of one question as text, each relative to the first contender."""
    first = timings[0]
    lines = [f"\n{first.question} (n = {first.n})"]
    for timing in timings:
        slower = timing.median_ms / first.median_ms
        lines.append(
            f"  {timing.contender:34} {timing.median_ms:10.4f} ms "
            f"[{timing.low_ms:.4f}, {timing.high_ms:.4f}]  x{slower:<8.2f}"
            + (f"{timing.share_of_floor:7.1%} of the floor's speed  " if timing.floor_ms else "")
            + timing.note
        )
    return "\n".join(lines)
