"""Time augmented batches: source images per second, both views counted as one.

    python bench/data.py [--root DIR] [--recipe tinyimagenet] [--rounds 9] [--seconds 3]

Contenders, on the same files with the same recipe: torch's DataLoader with torchvision's transforms
on Pillow images and its v2 transforms on tensors, DALI on the CPU, and resident images; with a GPU,
DALI also runs and images reside there, and every batch ends up on it. Each round times every
contender once, in rotating order, after a pause in which the other contenders' workers finish
prefetching; its own prefetched batches are discarded. Without --root the files are JPEGs cropped
from two photographs. Their tests run first. Results go to bench/results/data-NNN.csv and .png.
"""

import argparse
import contextlib
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Contender, Work
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.datasets import ImageFolder as TorchvisionFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from isofast.config.presets import VIEWS_OF_DATASET
from isofast.config.schema import ViewConfig
from isofast.data import (
    ImageFolder,
    Recipe,
    TrainLoader,
    check_folder,
    open_dataset,
    recipe_for,
)
from isofast.data.check import has_dali
from isofast_kernels.dispatch import INTERPRET

NAMES = ("kernels/test_augment", "kernels/test_augment_triton", "data/test_resident")
TESTS = [f"tests/{name}.py" for name in NAMES]
GENERATED = 3000
_PAUSE_S = 1.0


def both(views: list[Callable[[Any], Any]], image: Any) -> tuple[Any, ...]:
    """Return every view of an image."""
    return tuple(view(image) for view in views)


def transform(t: Any, recipe: Recipe, row: ViewConfig) -> Callable[[Any], Any]:
    """Return one view's torchvision transform: v1 for Pillow images or v2 for uint8 tensors."""
    to_float = v1.ToTensor() if t is v1 else v2.ToDtype(torch.float32, scale=True)
    jitter = t.ColorJitter(row.brightness, row.contrast, row.saturation, row.hue)
    # torchvision uses one kernel size for every sigma: the largest
    window = 2 * round(3 * row.blur_sigma[1]) + 1
    blur = [t.RandomApply([t.GaussianBlur(window, row.blur_sigma)], row.blur_p)]
    solarize = [t.RandomSolarize(row.solarize_threshold, row.solarize_p)]
    return t.Compose(
        [
            t.RandomResizedCrop(
                recipe.crop,
                row.crop_scale,
                row.crop_ratio,
                interpolation=v1.InterpolationMode.BICUBIC,
            ),
            t.RandomApply([jitter], row.jitter_p),
            t.RandomGrayscale(row.gray_p),
            *(blur if row.blur_p else []),
            *(solarize if row.solarize_p else []),
            t.RandomHorizontalFlip(row.flip_p),
            to_float,
            t.Normalize(recipe.mean, recipe.std),
        ]
    )


def torchvision_batches(
    root: Path, recipe: Recipe, t: Any, batch: int, workers: int, device: torch.device
) -> Iterator[Any]:
    """Yield endless batches, configured as torchvision's users do."""
    views = [transform(t, recipe, row) for row in (recipe.view1, recipe.view2)]
    decode = functools.partial(decode_image, mode=ImageReadMode.RGB)
    reader = {"loader": decode} if t is v2 else {}
    loader = DataLoader(
        TorchvisionFolder(root / "train", functools.partial(both, views), **reader),
        batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    while True:
        for (x1, x2), y in loader:
            yield [x.to(device, non_blocking=True) for x in (x1, x2, y)]


def contenders(
    dataset: ImageFolder, recipe: Recipe, batch: int, workers: int, stack: contextlib.ExitStack
) -> list[Contender]:
    """Return every contender for this machine; each call makes one batch."""
    cpu = torch.device("cpu")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else cpu

    def ours(name: str, backend: str, where: torch.device, note: str = "") -> Contender:
        loader = TrainLoader(
            backend,
            dataset,
            recipe,
            batch_size=batch,
            seed=0,
            device=where,
            threads=workers,
            resident_limit_gb=64.0,
        )
        stack.callback(loader.close)
        batches = loader if where == device else ([x.to(device) for x in made] for made in loader)
        return Contender(f"isofast, {name}", lambda: next(batches), note)

    def theirs(name: str, t: Any) -> Contender:
        batches = torchvision_batches(dataset.root, recipe, t, batch, workers, device)
        return Contender(f"torchvision, {name}, {workers} workers", lambda: next(batches))

    found = [theirs("Pillow", v1), theirs("v2 tensors", v2)]
    if has_dali():
        found.append(ours(f"DALI on the CPU, {workers} threads", "dali", cpu))
    if device == cpu:
        note = "the kernel's reference, decoded in advance"
        return [*found, ours("resident on the CPU", "resident", cpu, note)]
    if has_dali():
        found.append(ours(f"DALI on the GPU, {workers} threads", "dali", device))
    return [*found, ours("resident on the GPU", "resident", device, "decoded in advance")]


def time_batches(contender: Contender, count: int) -> float:
    """Return ms per batch over ``count`` batches, including the final device sync."""
    _wait()
    began = time.perf_counter()
    for _ in range(count):
        contender.call()
    _wait()
    return (time.perf_counter() - began) * 1e3 / count


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(found: list[Contender], rounds: int, seconds: float, workers: int) -> None:
    """Fill in the contenders' times."""
    # more than is prefetched: a DataLoader prefetches two batches per worker, DALI two in total,
    # resident none, but it may draw the parameters of 4,096 images, 25 ms of one core
    drained = max(3, 2 * workers + 1)
    counts = []
    for contender in found:
        # the first batches start workers and compile kernels
        time_batches(contender, drained)
        counts.append(max(2, round(1e3 * seconds / time_batches(contender, drained))))
    for turn in range(rounds):
        for offset in range(len(found)):
            index = (turn + offset) % len(found)
            time.sleep(_PAUSE_S)
            time_batches(found[index], drained)
            found[index].times_ms.append(time_batches(found[index], counts[index]))


def versions() -> dict[str, str]:
    """Return the versions of packages that the contenders use, in addition to the harness's."""
    # DALI's package is named after its CUDA version
    dali = [d.version for d in metadata.distributions() if d.name.startswith("nvidia-dali-cuda")]
    named = {name: metadata.version(name) for name in ("torchvision", "pillow")}
    return {"dali": " and ".join(dali) or "absent", **named}


def add_speeds(found: list[Contender], batch: int) -> None:
    """Add images per second, and the ratio to the first contender's, to the notes."""
    first = found[0]
    for contender in found:
        speed = f"{1e3 * batch / statistics.median(contender.times_ms):,.0f} images/s"
        if contender is not first:
            pairs = zip(first.times_ms, contender.times_ms, strict=True)
            ratios = [theirs_ms / own_ms for theirs_ms, own_ms in pairs]
            low, high = harness.spread(ratios)
            speed += f"; x{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}] of {first.name}"
            speed += " (paired)"
        contender.note = "; ".join(filter(None, [speed, contender.note]))


def generate(root: Path, side: int, images: int) -> None:
    """Write JPEGs of random square crops of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(image) for image in load_sample_images().images]
    draws = torch.Generator().manual_seed(0)
    for k in range(images):
        photo = photos[k % 2]
        # crops of a small photograph are upscaled
        most = min(4 * side, *photo.size)
        size = int(torch.randint(min(side, most - 1), most, (), generator=draws))
        left = int(torch.randint(photo.width - size, (), generator=draws))
        top = int(torch.randint(photo.height - size, (), generator=draws))
        square = photo.crop((left, top, left + size, top + size)).resize((side, side))
        folder = root / "train" / f"class{k % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        square.save(folder / f"{k:05}.jpg", quality=90)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="prepared images of one size; default: generated")
    parser.add_argument("--recipe", choices=[*VIEWS_OF_DATASET], default="tinyimagenet")
    parser.add_argument(
        "--batch", type=int, default=256, help="images per batch (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=9, help="n")
    parser.add_argument("--seconds", type=float, default=3.0, help="per contender and round")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args(arguments)
    if INTERPRET:
        parser.error("TRITON_INTERPRET=1 times the interpreter; unset it")
    if not harness.tests_pass(*TESTS):
        print(harness.NOT_TIMED)
        return 1
    recipe = recipe_for(options.recipe)
    with contextlib.ExitStack() as stack:
        root = options.root
        if root is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            generate(root, recipe.crop, GENERATED)
        dataset = check_folder(open_dataset(root, "train"))
        kind = "generated JPEGs" if options.root is None else f"files of {root.name}"
        height, width = dataset.sizes[0]
        question = (
            f"two views of a batch of {options.batch}, {recipe.name} recipe, {len(dataset):,} "
            f"{kind}, {height} x {width}"
        )
        for key, value in (harness.environment() | versions()).items():
            print(f"{key}: {value}")
        if not torch.cuda.is_available():
            print("no GPU: resident is the kernel's torch reference on the CPU")
        found = contenders(dataset, recipe, options.batch, options.workers, stack)
        compare(found, options.rounds, options.seconds, options.workers)
    add_speeds(found, options.batch)
    timings = harness.summarize(question, found, Work(2 * options.batch * 3 * recipe.crop**2 * 4))
    print(harness.table(timings))
    if not options.dry:
        print(*harness.write("data", timings, **versions()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
