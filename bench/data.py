"""Times how fast augmented batches are made: source images a second, both views counted as one.

    python bench/data.py [--root DIR] [--recipe tinyimagenet] [--rounds 9] [--seconds 3]

Contenders, on the same files with the same recipe: torchvision's DataLoader with Pillow images and
with the v2 transforms on tensors, DALI, and images that are resident; with a GPU also DALI and
resident there, and every batch ends on it. Each round times every contender once, in an order that
turns; before, a pause lets the others' workers finish what they make ahead, and the contender's
own batches made ahead are thrown away. Without --root the files are JPEGs cut from two photographs.
What is timed is tested first. Results go to bench/results/data-NNN.csv and .png.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Timing, at_least
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.datasets import ImageFolder as TorchvisionFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from isofast.config.schema import ViewConfig
from isofast.data import (
    ImageFolder,
    Recipe,
    check_folder,
    make_train_loader,
    open_dataset,
    recipe_for,
)
from isofast_kernels.dispatch import INTERPRET

TESTS = ["kernels/test_augment.py", "kernels/test_augment_triton.py", "data/test_resident.py"]
GENERATED = 3000
_PAUSE_S = 1.0


@dataclass
class Feeder:
    """A way of making batches: `batches` is endless; ms a batch, one value a round."""

    name: str
    batches: Iterator[Any]
    note: str = ""
    times_ms: list[float] = field(default_factory=list)


class BothViews:
    """A transform a view, for torchvision's own data set."""

    def __init__(self, first: Callable[[Any], Any], second: Callable[[Any], Any]) -> None:
        self._both = first, second

    def __call__(self, image: Any) -> tuple[Any, ...]:
        return tuple(view(image) for view in self._both)


def pillow_transform(recipe: Recipe, row: ViewConfig) -> Callable[[Any], Any]:
    """One view by torchvision's classic transforms on Pillow images."""
    return _compose(v1, recipe, row, [v1.ToTensor()])


def tensor_transform(recipe: Recipe, row: ViewConfig) -> Callable[[Any], Any]:
    """One view by torchvision's v2 transforms on uint8 tensors."""
    return _compose(v2, recipe, row, [v2.ToDtype(torch.float32, scale=True)])


def _compose(t: Any, recipe: Recipe, row: ViewConfig, to_float: list[Any]) -> Callable[[Any], Any]:
    jitter = t.ColorJitter(row.brightness, row.contrast, row.saturation, row.hue)
    # torchvision's blur takes one size of window for every sigma: the widest
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
            *to_float,
            t.Normalize(recipe.mean, recipe.std),
        ]
    )


def read_tensor(path: str) -> torch.Tensor:
    return decode_image(path, ImageReadMode.RGB)


def torchvision_batches(
    root: Path, recipe: Recipe, kind: str, batch: int, workers: int, device: torch.device
) -> Iterator[Any]:
    """Batches as a user of torchvision configures them, without end."""
    transform = pillow_transform if kind == "pillow" else tensor_transform
    views = BothViews(transform(recipe, recipe.view1), transform(recipe, recipe.view2))
    reader = {} if kind == "pillow" else {"loader": read_tensor}
    cuda = device.type == "cuda"
    loader = DataLoader(
        TorchvisionFolder(root / "train", views, **reader),
        batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
        pin_memory=cuda,
    )
    while True:
        for (x1, x2), y in loader:
            yield [x.to(device, non_blocking=True) for x in (x1, x2, y)]


def feeders(
    dataset: ImageFolder, recipe: Recipe, batch: int, workers: int, stack: contextlib.ExitStack
) -> list[Feeder]:
    """Every contender that this machine has."""
    cpu = torch.device("cpu")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else cpu

    def ours(backend: str, where: torch.device) -> Iterator[Any]:
        loader = make_train_loader(
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
        return loader if where == device else ([x.to(device) for x in made] for made in loader)

    def theirs(kind: str) -> Iterator[Any]:
        return torchvision_batches(dataset.root, recipe, kind, batch, workers, device)

    found = [
        Feeder(f"torchvision, Pillow, {workers} workers", theirs("pillow")),
        Feeder(f"torchvision, v2 tensors, {workers} workers", theirs("tensors")),
        Feeder(f"isofast, DALI on the CPU, {workers} threads", ours("dali", cpu)),
    ]
    if device == cpu:
        note = "the kernel's reference, decoded before"
        return [*found, Feeder("isofast, resident on the CPU", ours("resident", cpu), note)]
    return [
        *found,
        Feeder(f"isofast, DALI on the GPU, {workers} threads", ours("dali", device)),
        Feeder("isofast, resident on the GPU", ours("resident", device), "decoded before"),
    ]


def time_batches(feeder: Feeder, count: int) -> float:
    """Milliseconds a batch, over `count` of them, to the end of the work on the device."""
    _wait()
    began = time.perf_counter()
    for _ in range(count):
        next(feeder.batches)
    _wait()
    return (time.perf_counter() - began) * 1e3 / count


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(found: list[Feeder], rounds: int, seconds: float, workers: int) -> None:
    """Fill in the feeders' times."""
    # more than is made ahead: a DataLoader makes two batches a worker, DALI two in all. Resident
    # makes none, but may have the parameters of 4,096 images drawn, which is 25 ms of a core's work
    drained = max(3, 2 * workers + 1)
    counts = []
    for feeder in found:
        # workers start, and kernels are compiled, in the first; the next are made ahead
        time_batches(feeder, drained)
        counts.append(max(2, round(1e3 * seconds / time_batches(feeder, drained))))
    for turn in range(rounds):
        for offset in range(len(found)):
            index = (turn + offset) % len(found)
            time.sleep(_PAUSE_S)
            time_batches(found[index], drained)
            found[index].times_ms.append(time_batches(found[index], counts[index]))


def versions() -> dict[str, str]:
    """Of the packages that the contenders are made of, beside what the harness names."""
    # DALI's package is named after its CUDA
    dali = [d.version for d in metadata.distributions() if d.name.startswith("nvidia-dali-cuda")]
    named = {name: metadata.version(name) for name in ("torchvision", "pillow")}
    return {"dali": " and ".join(dali) or "absent", **named}


def timings_of(found: list[Feeder], question: str, batch: int, recipe: Recipe) -> list[Timing]:
    """As the harness writes them; notes have images a second, and how many times the first's."""
    made = 2 * batch * 3 * recipe.crop**2 * 4
    bytes_per_ms, _ = harness.limits()
    timings = []
    for feeder in found:
        median = statistics.median(feeder.times_ms)
        note = f"{1e3 * batch / median:,.0f} images/s"
        if feeder is not found[0]:
            note += f"; {times_as_fast(feeder, found[0])} of {found[0].name} (paired)"
        note += f"; {feeder.note}" if feeder.note else ""
        low, high = harness.spread(feeder.times_ms)
        timings.append(
            Timing(
                question,
                feeder.name,
                n=len(feeder.times_ms),
                median_ms=median,
                low_ms=low,
                high_ms=high,
                bytes=made,
                floor_ms=made / bytes_per_ms,
                note=note,
            )
        )
    return timings


def times_as_fast(feeder: Feeder, other: Feeder) -> str:
    """How many times the other's images a second, round by round: the median and its spread."""
    times = [a / b for a, b in zip(other.times_ms, feeder.times_ms, strict=True)]
    low, high = harness.spread(times)
    return f"x{statistics.median(times):.2f} [{low:.2f}, {high:.2f}]"


def show(found: list[Feeder], batch: int) -> str:
    """Images a second with their spread, and how many times the first contender's."""
    lines = []
    for feeder in found:
        slow, fast = harness.spread(feeder.times_ms)[::-1]
        median = statistics.median(feeder.times_ms)
        lines.append(
            f"  {feeder.name:38} {1e3 * batch / median:10,.0f} images/s "
            f"[{1e3 * batch / slow:,.0f}, {1e3 * batch / fast:,.0f}]  "
            f"{times_as_fast(feeder, found[0])}  {feeder.note}"
        )
    return "\n".join(lines)


def generate(root: Path, side: int) -> None:
    """JPEGs of random squares of the two photographs that scikit-learn ships."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(image) for image in load_sample_images().images]
    draws = torch.Generator().manual_seed(0)
    for k in range(GENERATED):
        photo = photos[k % 2]
        # a small photograph has smaller squares, which are made larger
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
    parser.add_argument("--recipe", default="tinyimagenet", help="which preset's augmentation")
    batch_help = "images of a batch; presets: 256"
    parser.add_argument("--batch", type=at_least(1), default=256, help=batch_help)
    parser.add_argument("--workers", type=at_least(1), default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=at_least(2), default=9, help="n")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a contender in a round")
    parser.add_argument("--dry", action="store_true", help="write no result")
    options = parser.parse_args(arguments)
    if INTERPRET:
        parser.error("TRITON_INTERPRET=1 times the interpreter; unset it")
    if not harness.tests_pass([f"tests/{path}" for path in TESTS]):
        print("not timed: its tests fail (above)")
        return 1
    recipe = recipe_for(options.recipe)
    with contextlib.ExitStack() as stack:
        root = options.root
        if root is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            generate(root, recipe.crop)
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
            print("there is no GPU: resident is the kernel's reference in torch on the CPU")
        found = feeders(dataset, recipe, options.batch, options.workers, stack)
        compare(found, options.rounds, options.seconds, options.workers)
        print(f"\n{question} (n = {options.rounds})\n{show(found, options.batch)}")
    if not options.dry:
        timings = timings_of(found, question, options.batch, recipe)
        print(*harness.write("data", timings, **versions()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
