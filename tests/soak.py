"""Kill runs over and over, and compare their final results with those of uninterrupted runs.

`python -m tests.soak --kills 100 --ranks 1 2` trains on the digits, kills ranks with SIGKILL at
random moments, including saves and evaluations, and reruns the same command. Exits with 1 if a
record, an eigenvalue or a weight differs in the end, or if a run hangs or fails in another way.
"""

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file

from isofast.config.presets import merge

from .conftest import SMALL
from .support.runs import (
    ISOFAST,
    assert_equal_trees,
    assert_same_run,
    call,
    command_of,
    environment,
    train,
)

CHANGES: dict[str, Any] = {
    "train": {"epochs": 3, "batch_size": 128, "max_steps": None},
    "evaluation": {"every_epochs": 1, "at_start": True, "knn_images": 200, "metrics_images": 50},
}
KILLS_A_RUN = 10
MOMENTS = ("start", "step", "save", "evaluation")
HANGS_AFTER_S = 120


@dataclass
class Launch:
    """One launch of a run: its process tree, and what it is doing."""

    process: "subprocess.Popen[bytes]"
    run_dir: Path
    log: Path
    began: float

    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def steps(self) -> bool:
        metrics = self.run_dir / "metrics.jsonl"
        return metrics.exists() and metrics.stat().st_mtime > self.began

    def saves(self) -> bool:
        parts = self.run_dir.glob("checkpoints/.*.part")
        try:
            return any(part.stat().st_mtime > self.began for part in parts)
        except FileNotFoundError:
            return False

    def evaluates(self) -> bool:
        printed = self.printed()
        return printed.rfind("evaluating on") > printed.rfind("validation top-1")

    def training(self) -> list[psutil.Process]:
        """Return the ranks that a launcher has started; none without a launcher."""
        tree = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in tree if any("--local_rank" in word for word in p.cmdline())]

    def wait_for(self, moment: str, draw: random.Random) -> bool:
        """Wait for a moment to kill at; return False if the run ends first."""
        at = self.began + draw.uniform(0, 8) if moment == "start" else None
        self.ranks: list[psutil.Process] = []
        while self.process.poll() is None:
            now = time.time()
            if at is None and self.steps():
                at = now + draw.uniform(0, 1.5)
                self.ranks = self.training()
            if at is not None and now > at and (moment in MOMENTS[:2] or self.is_in(moment)):
                time.sleep(draw.uniform(0, 0.02))
                return True
            time.sleep(0.001)
        return False

    def is_in(self, moment: str) -> bool:
        return self.saves() if moment == "save" else self.evaluates()

    def wait(self) -> int:
        """Return the exit code; if the run hangs, PYTHONFAULTHANDLER prints where."""
        try:
            return self.process.wait(HANGS_AFTER_S)
        except subprocess.TimeoutExpired:
            launched = psutil.Process(self.process.pid)
            for process in [*launched.children(recursive=True), launched]:
                process.send_signal(signal.SIGABRT)
            self.process.wait()
            raise AssertionError(f"hangs\n{self.printed()}") from None

    def kill(self, draw: random.Random) -> str:
        """Kill one rank, or everything at once; return which."""
        victim = draw.choice([*self.ranks, None])
        launched = psutil.Process(self.process.pid)
        for process in [victim] if victim else [*launched.children(recursive=True), launched]:
            process.kill()
        self.wait()
        return "all" if victim is None else f"rank {self.ranks.index(victim)}"


def soak(ranks: int, kills: int, folder: Path, draw: random.Random) -> Counter[str]:
    """Kill runs of ``ranks`` processes ``kills`` times; return the counts by moment."""
    config, whole = folder / "soak.json", folder / f"whole-{ranks}"
    train(config, whole, ranks=ranks)
    counts: Counter[str] = Counter(kills=0)
    while counts["kills"] < kills:
        run_dir = folder / f"ranks-{ranks}-run-{counts['runs'] + 1}"
        killed = _train_and_kill(config, run_dir, ranks, kills - counts["kills"], draw)
        assert_same_run(whole, run_dir)
        newest = [max(run.glob("checkpoints/step_*")) for run in (whole, run_dir)]
        encoders = [load_file(path / "encoder.safetensors") for path in newest]
        assert_equal_trees(*encoders, "encoder")
        counts += killed
        counts["runs"] += 1
    return counts


def _train_and_kill(
    config: Path, run_dir: Path, ranks: int, most: int, draw: random.Random
) -> Counter[str]:
    counts: Counter[str] = Counter()
    said = ""
    while True:
        log = run_dir.with_suffix(f".{counts['kills']}.log")
        command = command_of(config, run_dir, ranks=ranks if ranks > 1 else 0)
        with log.open("wb") as file:
            env = environment(PYTHONFAULTHANDLER="1")
            process = subprocess.Popen(command, env=env, stdout=file, stderr=file)
        launch = Launch(process, run_dir, log, time.time())
        more = counts["kills"] < min(most, KILLS_A_RUN)
        moment = draw.choice(MOMENTS)
        killed = more and launch.wait_for(moment, draw)
        who = launch.kill(draw) if killed else ""
        code = launch.wait()
        printed = launch.printed()
        if said:
            found = re.search(r"^steps (\d+) to", printed, re.MULTILINE)
            print(
                f"{said}, {f'resumed at step {found[1]}' if found else 'killed again before that'}"
            )
        assert "Traceback" not in printed, printed
        if not killed:
            assert code == 0, printed
            return counts
        # what it was doing when killed, whichever moment was waited for
        moment = "save" if launch.saves() else "evaluation" if launch.evaluates() else "elsewhere"
        counts.update(["kills", moment])
        said = f"{run_dir.name}: kill {counts['kills']} ({who}, {moment})"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="total, split evenly over --ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0, help="random seed of the moments")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        call([*ISOFAST, "prepare", "digits", "--root", f"{name}/digits"])
        settings = merge(merge(SMALL, CHANGES), {"data": {"root": f"{name}/digits"}})
        (folder / "soak.json").write_text(json.dumps(settings))
        for k, ranks in enumerate(args.ranks):
            kills = args.kills * (k + 1) // len(args.ranks) - args.kills * k // len(args.ranks)
            began = time.monotonic()
            try:
                counts = soak(ranks, kills, folder, random.Random(args.seed + ranks))
            except AssertionError as error:
                print(f"{ranks} rank(s): failed: {error}", file=sys.stderr)
                return 1
            print(
                f"{ranks} rank(s): {counts['kills']} kills ({counts['save']} during a save, "
                f"{counts['evaluation']} during an evaluation, {counts['elsewhere']} elsewhere) in "
                f"{counts['runs']} runs, all bitwise equal to the uninterrupted run; "
                f"{time.monotonic() - began:.0f} s"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
