"""Train every method for a few steps with two versions of the source and compare them bitwise.

`python tests/golden.py [COMMIT]` trains COMMIT (default: HEAD~1) and the working tree's tracked
files on the digits, with one and two processes, stopped and resumed, and exits with 1 if any
record, eigenvalue or encoder weight differs. Both run here: other machines round differently.
"""

import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
TIMED = {"images_per_s", "data_wait"}
STEPS, RESUMED_AT = 24, 16
BASE: dict[str, Any] = {
    "data": {"dataset": "digits", "threads": 1},
    "encoder": {"width": 8},
    "projector": {"hidden": 64, "output": 32},
    "train": {"epochs": 2, "batch_size": 64, "max_steps": STEPS},
    "evaluation": {"every_epochs": 1},
    "checkpoint": {"every_steps": 8},
    "logging": {"every_steps": 1, "spectrum_every_steps": 1},
}
# name: (sections over BASE, processes)
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    **{
        name: ({"method": {"name": name}}, 1)
        for name in ("isoloss", "directpred", "directcopy", "byol", "simsiam", "linear", "sigreg")
    },
    "no-ema": ({"method": {"ema": False}}, 1),
    "euclidean": ({"method": {"metric": "euclidean"}, "optimizer": {"name": "adamw"}}, 1),
    "embeddings": ({"method": {"correlation": "embeddings"}}, 1),
    "bf16": ({"train": {"precision": "bf16"}, "method": {"name": "byol"}}, 1),
    "two-ranks": ({}, 2),
    "byol-two-ranks": ({"method": {"name": "byol"}}, 2),
}
# forked after importing the slow packages; DeepSpeed allows one run per process
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "deepspeed"])


def main(commit: str = "HEAD~1") -> int:
    """Run both versions; return 0 if all results are equal, else 1."""
    changes = subprocess.check_output(["git", "stash", "create"], cwd=ROOT, text=True).strip()
    with tempfile.TemporaryDirectory() as folder:
        old, new, data = (Path(folder) / name for name in ("old", "new", "digits"))
        for tree, version in ((old, commit), (new, changes or "HEAD")):
            archive = subprocess.check_output(["git", "archive", version], cwd=ROOT)
            tree.mkdir()
            subprocess.run(["tar", "x", "-C", tree], input=archive, check=True)
            (tree / "isofast_kernels").symlink_to("kernels")
            # a separate process, which imports from this tree
            subprocess.run(
                [sys.executable, __file__, "--tree", str(tree), str(data)],
                check=True,
                env=os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
            )
        differing = [name for name in RUNS if not equal(name, old / "golden", new / "golden")]
    print(f"{len(RUNS) - len(differing)} of {len(RUNS)} runs are equal", *differing)
    return 1 if differing else 0


def run_tree(tree: Path, data: Path) -> None:
    """Train all of RUNS with the source in ``tree``, writing to ``tree``/golden."""
    if not data.exists():
        command = [sys.executable, "-m", "isofast.cli", "prepare", "digits", "--root", str(data)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for name, (sections, ranks) in RUNS.items():
        run_dir = tree / "golden" / name
        run_dir.parent.mkdir(exist_ok=True)
        config = {key: {**BASE.get(key, {}), **sections.get(key, {})} for key in {*BASE, *sections}}
        config["data"]["root"] = str(data)
        path = run_dir.with_suffix(".json")
        path.write_text(json.dumps(config))
        command = ["--config", str(path), "--run-dir", str(run_dir)]
        train(tree, [*command, "--set", f"train.max_steps={RESUMED_AT}"], ranks)
        # delete the last checkpoint, so that some steps are repeated
        shutil.rmtree(run_dir / "checkpoints" / f"step_{RESUMED_AT:08d}")
        train(tree, command, ranks)


def train(tree: Path, arguments: list[str], ranks: int) -> None:
    """Run launch/train.py in ``ranks`` processes."""
    port = str(29600 + os.getpid() % 1000)
    processes = [
        PROCESSES.Process(target=launch, args=(tree, arguments, rank, ranks, port))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(f"failed: {tree.name} {' '.join(arguments)}")


def launch(tree: Path, arguments: list[str], rank: int, ranks: int, port: str) -> None:
    """Run launch/train.py as one rank."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    sys.exit(runpy.run_path(str(tree / "launch" / "train.py"))["main"](arguments))


def equal(name: str, old: Path, new: Path) -> bool:
    """Return whether both versions of a run gave the same numbers; print the first difference."""
    records, arrays = [], []
    for run in (old / name, new / name):
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        records.append([{k: v for k, v in line.items() if k not in TIMED} for line in lines])
        weights = load_file(run / f"checkpoints/step_{STEPS:08d}/encoder.safetensors")
        with np.load(run / "spectrum.npz") as spectrum:
            arrays.append(dict(spectrum) | weights)
    for left, right in zip(*records, strict=True):
        if left != right:
            keys = sorted(key for key in {*left, *right} if left.get(key) != right.get(key))
            shown = {key: (left.get(key), right.get(key)) for key in keys}
            print(f"{name}: step {left['step']}: {shown}")
            return False
    one, other = arrays
    wrong = [k for k in {*one, *other} if not np.array_equal(one.get(k, []), other.get(k, []))]
    if wrong:
        print(f"{name}: {', '.join(sorted(wrong))} differ")
    return not wrong


if __name__ == "__main__":
    if sys.argv[1:2] == ["--tree"]:
        run_tree(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main(*sys.argv[1:]))
