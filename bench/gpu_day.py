"""Run every measurement that needs a GPU, stage by stage, in half an hour.

    python bench/gpu_day.py [--output DIR] [--data DIR] [--minutes 30] [--stage N [N ...]]

Tests come first, then benchmarks, then training runs. A stage is one or more programs under a time
limit, with its own log, DIR/NN-NAME.log. A stage that fails or times out does not stop the others;
one that lacks a requirement is skipped. The same command resumes: stages that passed are left out
unless --stage names them, and an interrupted run continues. DIR/stages.json records the outcomes,
DIR/summary.md the outcomes and the tables. Only DIR/work, which holds the runs, is large.

--data is CIFAR-10 as prepared by `isofast prepare cifar10`; without it the runs use scikit-learn's
digits. --dry-run runs everything on a CPU, at sizes too small to measure anything.
"""

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

import harness
import torch

MINUTES = 30
# a run that is asked to stop saves a checkpoint first
GRACE_S = 20.0
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "-rP"]
# these need only torch and Triton, and none of the other tests' fixtures
KERNEL_TESTS = [*PYTEST, "--confcutdir=tests/kernels", "tests/kernels"]
# most of the time goes into compiling
AT_ONCE = ["-n", "8"] if importlib.util.find_spec("xdist") else []
# every kernel at a few small shapes
SANITIZED = (
    "3x17 or 37x129-fp32 or 37x129-bf16 or test_correlation_ema or test_whole_views "
    "or (test_matrix_power and 37-) or (test_norm_pool and 4x80x6x7)"
)
ISOFAST = [sys.executable, "-c", "import sys; from isofast.cli import main; sys.exit(main())"]
TINY = ("encoder.width=4", "projector.hidden=32", "train.batch_size=64")
PACKAGES = ("torchvision", "deepspeed", "nvidia-dali-cuda130", "numpy")
TIMES = ("question", "contender", "median_ms", "low_ms", "high_ms", "n", "share_of_floor", "note")
RESULTS = ("epochs", "knn_top1_initial", "knn_top1", "val_top1", "effective_rank", "images_per_s")
Outcomes = dict[str, dict[str, Any]]


class Stage(NamedTuple):
    """Programs to run in sequence within ``minutes``, and the modules they import."""

    name: str
    minutes: float
    commands: list[list[str]]
    modules: tuple[str, ...] = ()
    gpu: bool = False


def plan(work: Path, data: Path | None, epochs: int, dry: bool) -> list[Stage]:
    """Return all stages, most important first; their limits sum to MINUTES."""

    def script(name: str, full: str, tiny: str) -> list[str]:
        return [sys.executable, f"bench/{name}.py", *(tiny if dry else full).split()]

    def settings(*pairs: str) -> list[str]:
        return [f"--set={pair}" for pair in pairs]

    def run(name: str, ema: str, *ends: object) -> list[list[str]]:
        train = [sys.executable, "launch/train.py", "--run-dir", str(work / name), *config]
        return [[*train, *settings(ema, f"train.max_steps={end}")] for end in ends]

    images = data or work / "digits"
    root = ["--root", str(images)] if data or dry else []
    config = ["--config", "launch/cifar10.json"]
    config += settings(f"data.root={images}", f"train.epochs={epochs}", *TINY * dry)
    profile = [*ISOFAST, "profile", *config, "--output", str(work / "profile")]
    # on a busy machine Python does not reach the GPU within the default ten seconds
    sanitizer = ["compute-sanitizer", "--launch-timeout=60", "--error-exitcode=1", "--tool"]
    few = [*KERNEL_TESTS, "-k", SANITIZED]
    training = ["tests/training", "tests/run", "tests/methods"]
    power, tiny = "--batch 32 --features 32 --rounds 3 --only power", "--batch 8 --rounds 2"
    colds = ("--cold",) if dry else ("", "--cold")
    kernels = [script("kernels", cold, f"{power} {cold}") for cold in colds]
    step = script("step", "--presets cifar10", f"{tiny} --width 4")
    peers = script(
        "peers", "--rounds 5 --steps 25", f"{tiny} --width 4 --steps 1 --workers 1 --only fp32"
    )
    loaders = script("data", "--rounds 5 --seconds 1", f"{tiny} --seconds 0.1 --workers 1")
    embed = script("embed", "", "--images 256 --width 4 --rounds 2")
    isofast = ("isofast.training.loop", "torchvision")
    # a run stops after some steps, then resumes
    ends = (4, 8) if dry else (150, "null")
    return [
        Stage("kernel-tests", 4, [[*KERNEL_TESTS, *AT_ONCE]], ("pytest",), gpu=True),
        Stage("tests", 3, [[*PYTEST, *training]], ("pytest", *isofast), gpu=True),
        *(
            Stage(tool, minutes, [[*sanitizer, tool, *few]], ("pytest",), gpu=True)
            for tool, minutes in (("memcheck", 1.5), ("racecheck", 2.5), ("initcheck", 1.5))
        ),
        Stage("kernels", 2, kernels),
        Stage("step", 4, [step], isofast),
        Stage("peers", 3, [[*peers, *root]], isofast),
        Stage("data", 1.5, [[*loaders, "--recipe", "cifar10", *root], embed], isofast),
        Stage("profile", 1, [[*profile, "--steps", "2" if dry else "20"]], isofast),
        Stage("run", 3, run("run", "method.ema=false", *ends), isofast),
        Stage("run-ema", 3, run("run-ema", "method.ema=true", ends[1]), isofast),
    ]


def lacking(stage: Stage) -> str:
    """Return what keeps a stage from running here; empty if nothing does."""
    if stage.gpu and not torch.cuda.is_available():
        return "needs a GPU"
    program = stage.commands[0][0]
    if not shutil.which(program):
        return f"needs {program}"
    for module in stage.modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            return f"{module}: {error}"
    return ""


def call(command: list[str], log: IO[str], limit_s: float) -> int | None:
    """Run a program; return its exit code, or None if it hit the limit."""
    process = subprocess.Popen(
        command, cwd=harness.ROOT, stdout=log, stderr=log, start_new_session=True
    )
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # also after Ctrl-C; children may outlive their parent
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_stage(stage: Stage, log: Path, limit_s: float) -> dict[str, Any]:
    """Run a stage's programs until one fails or time runs out."""
    began, code = time.monotonic(), None
    with log.open("w+", errors="replace") as file:
        for command in stage.commands:
            print(f"$ {shlex.join(command)}", file=file, flush=True)
            code = call(command, file, max(0.0, began + limit_s - time.monotonic()))
            if code != 0:
                break
        file.seek(0)
        last = [line.strip() for line in file if line.strip()][-1][:200]
    status = "passed" if code == 0 else "failed"
    if code is None:
        status, last = "timed out", f"limit {limit_s:.0f} s: {last}"
    seconds = round(time.monotonic() - began, 1)
    return {"status": status, "why": last, "seconds": seconds, "exit_code": code}


def run_stages(
    stages: list[Stage], output: Path, *, scale: float = 1.0, only: Iterable[int] = ()
) -> Outcomes:
    """Run the stages that have not passed yet, or ``only`` those; save and return all outcomes."""
    kept = output / "stages.json"
    outcomes: Outcomes = json.loads(kept.read_text()) if kept.exists() else {}
    commit = harness.environment()["commit"]
    for number, stage in enumerate(stages, 1):
        before = outcomes.get(stage.name, {})
        done = before.get("status") == "passed" and before["commands"] == stage.commands
        if (number not in only) if only else done:
            continue
        print(f"{number:2} {stage.name} ...", end=" ", flush=True)
        if why := lacking(stage):
            outcome = {"status": "skipped", "why": why, "seconds": 0.0, "exit_code": None}
        else:
            log = output / f"{number:02}-{stage.name}.log"
            outcome = run_stage(stage, log, 60 * scale * stage.minutes)
        print(f"{outcome['status']}, {outcome['seconds']:.0f} s: {outcome['why']}", flush=True)
        outcomes[stage.name] = outcome | {"commit": commit, "commands": stage.commands}
        new = kept.with_suffix(".new")
        new.write_text(json.dumps(outcomes, indent=1) + "\n")
        new.replace(kept)
    return outcomes


def table(title: str, head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a section with a table."""
    cells = [[str(cell).replace("|", "/") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([f"## {title}\n", lines[0], "|" + " --- |" * len(cells[0]), *lines[1:], ""])


def near_budgets(log: Path) -> list[tuple[str, ...]]:
    """Return test, error, budget and ratio of the ten errors largest relative to their budgets."""
    rows, test = [], ""
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        if heading := re.fullmatch(r"_+ (\S.*) _+", line):
            test = heading[1]
        elif found := re.fullmatch(r"(\w+): relative error (\S+), budget (\S+)", line):
            ratio = float(found[2]) / float(found[3])
            rows.append((f"{test}, {found[1]}", found[2], found[3], f"{ratio:.2f}"))
    return sorted(rows, key=lambda row: -float(row[3]))[:10]


def summary(output: Path, outcomes: Outcomes) -> Iterator[str]:
    """Yield the page's sections: machine, stages, errors, benchmarks, runs."""
    about = harness.environment()
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        about["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    for name in PACKAGES:
        about[name] = next((d.version for d in metadata.distributions(name=name)), "absent")
    yield table("Machine", ("what", "version"), about.items())
    keys = ("status", "seconds", "exit_code", "commit", "why")
    rows = ([name, *(outcome[key] for key in keys)] for name, outcome in outcomes.items())
    yield table("Stages", ("stage", *keys), rows)
    head = ("test", "relative error", "budget", "ratio")
    yield table("Nearest to their budgets", head, near_budgets(output / "01-kernel-tests.log"))
    for path in sorted(output.glob("*.csv")):
        with path.open(newline="") as file:
            records = list(csv.DictReader(line for line in file if line[0] != "#"))
        yield table(path.name, TIMES, ([record[key] for key in TIMES] for record in records))
    runs = sorted(output.glob("work/*/summary.json"))
    results = ([path.parent.name, *map(json.loads(path.read_text()).get, RESULTS)] for path in runs)
    yield table("Runs", ("run", *RESULTS), results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=harness.ROOT / "runs" / "gpu-day")
    parser.add_argument("--data", type=Path, help="prepared CIFAR-10; default: digits")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all stages (30)")
    parser.add_argument("--stage", type=int, nargs="+", default=[], metavar="N", help="only these")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at tiny sizes")
    options = parser.parse_args()
    if options.dry_run:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    elif not torch.cuda.is_available():
        parser.error("torch finds no GPU; --dry-run runs the stages on the CPU")
    if options.data and not options.data.is_dir():
        parser.error(f"--data {options.data} is not a folder; isofast prepare cifar10 makes one")
    # like Ctrl-C: the stage's programs end too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    output, data = options.output.resolve(), options.data and options.data.resolve()
    work = output / "work"
    stages = plan(work, data, max(1, round(2 * options.minutes)), options.dry_run)
    if unknown := set(options.stage) - set(range(1, len(stages) + 1)):
        parser.error(f"there is no stage {min(unknown)}, only 1 to {len(stages)}")
    packages = work / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    # this checkout, installed or not
    with contextlib.suppress(FileExistsError):
        (packages / "isofast_kernels").symlink_to(harness.ROOT / "kernels")
    own = [str(harness.ROOT), str(packages)]
    sys.path[:0] = own
    paths = os.pathsep.join([*own, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ |= {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    # the benchmarks need not run their tests: the first stages do
    os.environ |= {"BENCH_RESULTS": str(output), "BENCH_UNTESTED": "1"}
    digits = work / "digits"
    if not data and not digits.exists():
        subprocess.run([*ISOFAST, "prepare", "digits", "--root", str(digits)])
    outcomes = run_stages(stages, output, scale=options.minutes / MINUTES, only=options.stage)
    page = output / "summary.md"
    page.write_text("\n".join(["# A day on a GPU\n", *summary(output, outcomes)]))
    print(page)
    return int(any(outcome["status"] in ("failed", "timed out") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
