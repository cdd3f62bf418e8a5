"""Time `isofast embed`, its two halves (decoding and the network) and the training loader.

    python bench/embed.py [--images 10000] [--width 16] [--rounds 5]

The images are 64-pixel JPEGs cropped from two photographs, the encoder a ResNet-18 with the tiny
stem. Decoding is the command's own, up to the pixels that the network takes; the network is timed
on decoded pixels; the loader makes both views of the same number of images. On a GPU the command
should take as long as the slower half, on a CPU as long as both. Each round times every contender
once, in rotating order. Results go to bench/results/embed-NNN.csv and .png.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import torch
from data import generate
from harness import Contender, Work
from safetensors.torch import save_file

from isofast.config.schema import EncoderConfig
from isofast.data import TrainLoader, check_folder, open_dataset, recipe_for
from isofast.data.check import has_dali
from isofast.evaluation.embed import decoded, embed, features, list_pictures
from isofast.evaluation.encoders import read_encoder
from isofast.methods.networks import make_encoder
from isofast.methods.weights import describe

SIDE = 64


def contenders(folder: Path, width: int) -> list[Contender]:
    """Return the halves and the whole; each call processes all images below ``folder``."""
    source, config = folder / "encoder.safetensors", EncoderConfig(stem="tiny", width=width)
    about = describe(config, recipe_for("imagefolder", crop=SIDE))
    save_file(make_encoder(config).state_dict(), source, about)
    module, _, recipe = read_encoder(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module.to(device).to(memory_format=torch.channels_last)
    pictures = list_pictures(folder)
    pixels_NHW3 = np.stack([*decoded(pictures, recipe)])

    def decode() -> None:
        for _ in decoded(pictures, recipe):
            pass

    def forward() -> None:
        features(module, recipe, pixels_NHW3, device)

    found = [
        Contender("decode and resize", decode),
        Contender("network", forward),
        Contender("isofast embed", lambda: embed(source, folder, folder / "features.npz")),
    ]
    if not has_dali():
        return found
    loader = TrainLoader(
        "dali",
        check_folder(open_dataset(folder, "train")),
        recipe,
        batch_size=100,
        seed=0,
        device=device,
        threads=len(os.sched_getaffinity(0)),
        resident_limit_gb=0.0,
    )

    def load() -> None:
        for _ in range(len(pictures) // 100):
            next(loader)

    return [*found, Contender("training's loader, DALI, two views", load)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--rounds", type=int, default=5, help="n")
    options = parser.parse_args(arguments)
    if not harness.tests_pass("tests/evaluation/test_embed.py"):
        print(harness.NOT_TIMED)
        return 1
    with tempfile.TemporaryDirectory() as name:
        generate(Path(name), SIDE, options.images)
        found = contenders(Path(name), options.width)
        for turn in range(options.rounds):
            first = turn % len(found)
            for contender in found[first:] + found[:first]:
                began = time.perf_counter()
                contender.call()
                contender.times_ms.append((time.perf_counter() - began) * 1e3)
    for contender in found:
        speed = 1e3 * options.images / statistics.median(contender.times_ms)
        contender.note = f"{speed:,.0f} images/s"
    question = f"{options.images:,} JPEGs of {SIDE} pixels, ResNet-18 of width {options.width}"
    timings = harness.summarize(question, found, Work(0))
    print(harness.table(timings))
    print(*harness.write("embed", timings), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
