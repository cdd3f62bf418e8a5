"""Time a run's start-up on many small images, as a folder of files and as tar shards.

    python bench/start_up.py DIR [--images 1000000]

Makes DIR/folder (32-pixel JPEGs in 1,000 classes) and packs it into DIR/shards, unless they exist.
Each start is a separate process that lists the images, checks their headers and makes the first
batch of 256 with DALI on one thread. The first start of each has no cache from an earlier one; the
three that follow do. Disk caches are warm. Prints a table of wall-clock seconds, and of CPU seconds
over all threads.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import harness
import numpy as np
import torch
from PIL import Image

from isofast.data import TrainLoader, check_folder, open_dataset, recipe_for
from isofast.data.pack import pack

CLASSES = 1000
COLUMNS = ("list s", "list CPU s", "check s", "check CPU s", "batch s", "batch CPU s")
_AGAIN = 3


def write_folder(root: Path, images: int) -> None:
    """Write ``images`` training images and one validation image per class."""
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(64):
        file = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        contents.append(file.getvalue())
    for split, count in (("train", images // CLASSES), ("val", 1)):
        for label in range(CLASSES):
            folder = root / split / f"c{label:03d}"
            folder.mkdir(parents=True)
            for k in range(count):
                (folder / f"img_{k:06d}.jpg").write_bytes(contents[(label + k) % 64])


def measure(root: Path) -> dict[str, float]:
    """Return wall-clock and CPU seconds for each phase of a start."""
    laps = [(time.perf_counter(), time.process_time())]
    dataset = open_dataset(root, "train")
    laps.append((time.perf_counter(), time.process_time()))
    dataset = check_folder(dataset, check="headers")
    laps.append((time.perf_counter(), time.process_time()))
    recipe, cpu = recipe_for("cifar10"), torch.device("cpu")
    loader = TrainLoader("dali", dataset, recipe, batch_size=256, seed=0, device=cpu, threads=1)
    next(loader)
    laps.append((time.perf_counter(), time.process_time()))
    loader.close()
    return dict(zip(COLUMNS, np.diff(laps, axis=0).ravel().tolist(), strict=True))


def apart(root: Path) -> dict[str, float]:
    """Return the same from a separate process."""
    command = [sys.executable, __file__, str(root), "--measure"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def row(name: str, starts: list[dict[str, float]]) -> str:
    """Return a row of the table: medians."""
    cells = [f"{statistics.median(s[key] for s in starts):.2f}" for key in COLUMNS]
    return f"| {name} | {' | '.join(cells)} | {len(starts)} |"


def main() -> None:
    """Make the images and time the starts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.dir)))
        return
    folder, shards = args.dir / "folder", args.dir / "shards"
    if not folder.exists():
        write_folder(folder, args.images)
    if not shards.exists():
        began = time.perf_counter()
        pack(folder, shards, shard_mib=256)
        print(f"packed, after checking every image, in {time.perf_counter() - began:.0f} s")
    for key, value in harness.environment().items():
        print(f"{key}: {value}")
    print(f"| {args.images:,} images, start | {' | '.join(COLUMNS)} | n |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for root in (folder, shards):
        for memory in [*root.glob(".isofast-checked-*"), *root.glob("*/.isofast-index.npz")]:
            memory.unlink()
        print(row(f"{root.name}, first", [apart(root)]), flush=True)
        print(row(f"{root.name}, again", [apart(root) for _ in range(_AGAIN)]), flush=True)


if __name__ == "__main__":
    main()
