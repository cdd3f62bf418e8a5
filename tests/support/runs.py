"""Runs as the tests start them, always on the CPU with one thread, and how they are compared."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isofast.config.load import validate
from isofast.run.checkpoint import newest_checkpoint
from isofast.run.metrics import read_metrics

from .launcher import launcher_of

ROOT = Path(__file__).resolve().parents[2]
Done = subprocess.CompletedProcess[str]
# what a clock decides
TIMED = ("images_per_s", "data_wait")
# processes that have imported everything already; DeepSpeed allows one run in each
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["isofast.training.loop", "deepspeed"])


def environment(**more: str) -> dict[str, str]:
    """One thread and no GPU: bitwise the same however busy the machine is."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def command_of(config: Path, run_dir: Path, *options: str, ranks: int = 0) -> list[str]:
    """`python launch/train.py ...`, or through DeepSpeed's launcher with ``ranks`` processes."""
    launcher = launcher_of(ranks) if ranks else []
    program = [str(ROOT / "launch" / "train.py"), "--config", str(config)]
    return [sys.executable, *launcher, *program, "--run-dir", str(run_dir), *options]


def train(
    config: Path, run_dir: Path, *options: str, ranks: int = 0, code: int = 0, **env: str
) -> str:
    """Run launch/train.py to its end, with exit code ``code``; return what it printed."""
    return call(command_of(config, run_dir, *options, ranks=ranks), code=code, **env).stderr


def call(command: list[str], *, code: int = 0, cwd: Path | None = None, **env: str) -> Done:
    """Run a command; it must exit with ``code`` and without a traceback."""
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=400, env=environment(**env)
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def fit_apart(settings: dict[str, Any], run_dir: Path) -> None:
    """``fit`` in its own process."""
    process = _PROCESSES.Process(target=_fit, args=(settings, run_dir))
    process.start()
    process.join(timeout=200)
    assert process.exitcode == 0


def _fit(settings: dict[str, Any], run_dir: Path) -> None:
    from isofast.training.loop import fit

    fit(validate(settings), run_dir)


def timeless(run_dir: Path) -> list[dict[str, Any]]:
    """A run's records without what a clock decides."""
    records = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMED} for record in records]


def assert_same_run(one: Path, other: Path) -> None:
    """Records, spectra and the last checkpoint are bitwise the same."""
    assert timeless(one) and timeless(one) == timeless(other)
    with np.load(one / "spectrum.npz") as a, np.load(other / "spectrum.npz") as b:
        assert a.files == b.files
        assert all(np.array_equal(a[name], b[name]) for name in a.files)
    found = [newest_checkpoint(folder / "checkpoints") for folder in (one, other)]
    assert found[0] is not None and found[1] is not None and found[0].step == found[1].step
    states = [checkpoint.load() for checkpoint in found if checkpoint is not None]
    for state in states:
        del state["totals"]
    assert_equal_trees(*states)


def assert_equal_trees(a: Any, b: Any, where: str = "") -> None:
    """Nested containers with bitwise equal tensors."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal_trees(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_equal_trees(*pair, f"{where}[{index}]")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where
