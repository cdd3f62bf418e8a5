"""All that only a GPU can tell, in stages: tests, kernels, the step, beside others, a run, a page.

    python bench/gpu_day.py --output DIR [--data CIFAR10] [--stage N ...] [--minutes 28] [--dry-run]

Each stage is a process with a time limit, its share of --minutes, and a log, OUTPUT/N-name.log.
What fails or lacks a package is noted and the next stage begins; given again, the stages that
passed are left out and a run continues. OUTPUT/results has the tables of bench/, OUTPUT/summary.md
all of it on one page. --data is prepared CIFAR-10, else the runs are on digits. --dry-run does the
same at tiny sizes, without what needs a GPU.
"""

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch

_GRACE_S = 30


@dataclass(frozen=True)
class Stage:
    """``minutes`` of 28; ``small`` is what a dry run does in its place, if it can without a GPU.

    {output}, {config} and {root} stand for paths; ``needs`` names packages and programs.
    """

    name: str
    minutes: float
    command: str
    small: str | None = None
    needs: tuple[str, ...] = ()


_TRAIN = (
    "launch/train.py --config {config} --set data.root={root} --set data.backend=auto "
    "--set checkpoint.every_minutes=1"
)
_RUN = ("isofast", "deepspeed", "pydantic")
_TINY = "--set encoder.width=4 --set train.batch_size=16 --set evaluation.every_epochs=0"
_SANITIZED = "-m pytest -m gpu -q -x tests/kernels -k 'loss or correlation or power'"
STAGES = (
    Stage("tests", 4, "-m pytest -m gpu -rA -q", "-m pytest -m gpu -q --collect-only"),
    *(
        Stage(
            tool, 1, f"compute-sanitizer --tool {tool} {{python}} {_SANITIZED}", None,
            ("compute-sanitizer",),
        )
        for tool in ("memcheck", "racecheck", "initcheck")
    ),
    Stage(
        "kernels", 3, "bench/kernels.py",
        "bench/kernels.py --rounds 2 --only correlation --batch 32 --features 32",
    ),
    Stage(
        "step", 4, "bench/step.py --datasets cifar10 tinyimagenet",
        "bench/step.py --datasets cifar10 --width 4 --batch 8 --rounds 2", _RUN,
    ),
    Stage(
        "profile", 1,
        "-m isofast.cli profile --config {config} --set data.root={root} --output {output}/profile",
        None, _RUN,
    ),
    Stage("data", 2, "bench/data.py", None, _RUN),
    Stage("peers", 2, "bench/peers.py", None, (*_RUN, "lightly")),
    # the first stops early, so that the second shows that it goes on
    Stage(
        "run", 1, f"{_TRAIN} --run-dir {{output}}/run --set method.ema=false "
        "--set train.epochs=20 --set train.max_steps=300",
        f"{_TRAIN} --run-dir {{output}}/run {_TINY} --set train.max_steps=2", _RUN,
    ),
    Stage(
        "run-on", 4, f"{_TRAIN} --run-dir {{output}}/run --set method.ema=false "
        "--set train.epochs=20",
        f"{_TRAIN} --run-dir {{output}}/run {_TINY} --set train.max_steps=4", _RUN,
    ),
    Stage(
        "run-ema", 4, f"{_TRAIN} --run-dir {{output}}/run-ema --set train.epochs=20", None, _RUN
    ),
)  # fmt: skip


def lacking(stage: Stage) -> list[str]:
    """What the stage needs and this machine has not."""
    return [
        name
        for name in stage.needs
        if not (shutil.which(name) or (name.isidentifier() and importlib.util.find_spec(name)))
    ]


def take(command: Sequence[str], log: Path, limit_s: float) -> tuple[str, int | None]:
    """Run to the end, or at the limit SIGTERM, on which a run saves: outcome and exit code."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=harness.ROOT, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
            return ("failed" if code else "passed"), code
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                return "out of time", process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                return "out of time", None
        finally:
            # and what it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def summary(done: dict[str, dict[str, Any]], output: Path) -> str:
    """The page: device and versions, stages, and each table."""
    lines = ["# On a GPU, stage by stage", ""]
    lines += [f"- {key}: {value}" for key, value in harness.environment().items()]
    lines += ["", "| stage | outcome | seconds | exit code |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {row['outcome']} | {row['seconds']} | {row['code']} |"
        for name, row in done.items()
    ]
    for path in sorted((output / "results").glob("*.csv")):
        with path.open(newline="") as file:
            first, *rows = csv.reader(line for line in file if not line.startswith("#"))
        lines += ["", f"## {path.stem}", "", f"| {' | '.join(first)} |", "|---" * len(first) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    for path in sorted(output.glob("*/summary.json")):
        lines += ["", f"## {path.parent.name}", "", "```", path.read_text().strip(), "```"]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="prepared CIFAR-10; default: digits")
    parser.add_argument("--stage", type=int, nargs="+", help=f"of 1 to {len(stages)}; default: all")
    parser.add_argument("--minutes", type=float, default=28.0, help="for all stages")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    output = options.output.resolve()
    (output / "results").mkdir(parents=True, exist_ok=True)
    record = output / "stages.json"
    done: dict[str, dict[str, Any]] = json.loads(record.read_text()) if record.exists() else {}
    root = options.data and options.data.resolve()
    if root is None and not lacking(Stage("", 0, "", needs=_RUN)):
        from isofast.data.prepare import prepare

        root = output / "digits"
        prepare("digits", root)
    paths = {
        "output": output,
        "root": root,
        "config": f"launch/{'cifar10' if options.data else 'quickstart'}.json",
        "python": sys.executable,
    }
    cuda = torch.cuda.is_available()
    for number, stage in enumerate(stages, 1):
        earlier = done.get(stage.name, {}).get("outcome")
        asked = number in options.stage if options.stage else earlier != "passed"
        if not asked:
            continue
        command = stage.small if options.dry_run else stage.command
        missing = lacking(stage)
        seconds, code = 0.0, None
        if command is None or (not cuda and not options.dry_run):
            outcome = "left out: needs a GPU"
        elif missing:
            outcome = f"left out: no {', '.join(missing)}"
        else:
            words = [word.format(**paths) for word in shlex.split(command)]
            if shutil.which(words[0]) is None:
                words = [sys.executable, *words]
            before = set(harness.RESULTS.glob("*"))
            began = time.perf_counter()
            log = output / f"{number}-{stage.name}.log"
            outcome, code = take(words, log, 60 * stage.minutes * options.minutes / 28)
            seconds = round(time.perf_counter() - began, 1)
            for path in set(harness.RESULTS.glob("*")) - before:
                shutil.move(path, output / "results")
        done[stage.name] = {"outcome": outcome, "seconds": seconds, "code": code}
        record.write_text(json.dumps(done, indent=1))
        print(f"{number:2} {stage.name:10} {outcome}, {seconds} s", flush=True)
    (output / "summary.md").write_text(summary(done, output))
    print(output / "summary.md")
    return int(any(row["outcome"] in ("failed", "out of time") for row in done.values()))


if __name__ == "__main__":
    sys.exit(main())
