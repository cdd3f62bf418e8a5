"""Small data roots, made once per session, and real images where available."""

import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from isofast.data import (
    Batch,
    EvalLoader,
    ImageFolder,
    Recipe,
    TrainLoader,
    check_folder,
    open_dataset,
    recipe_for,
)

CPU = torch.device("cpu")
MakeLoader = Callable[..., TrainLoader]
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TINY_ZIP = SHARED / "tiny-imagenet-20-classes.zip"


def write_images(root: Path, split: str, count: int, *, one_size: bool = False) -> None:
    """Write smooth colour images of three classes, alternating PNG and JPEG, in several sizes."""
    rng = np.random.default_rng(0)
    for k in range(count):
        folder = root / split / f"class{k % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        n = k // 3
        size = (22, 28) if one_size else (24 + 3 * (n % 4), 24 + 2 * (n % 3))
        name = f"{n:03d}.{'png' if one_size or n % 2 else 'jpg'}"
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / name)


def write_copies(root: Path, split: str, labels: str, count: int, content: bytes) -> None:
    """Write the same PNG ``count`` times for each class."""
    for label in labels:
        folder = root / split / label
        folder.mkdir(parents=True)
        for k in range(count):
            (folder / f"{k:02d}.png").write_bytes(content)


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **options) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def checked(root: Path, split: str = "train", **options: Any) -> ImageFolder:
    return check_folder(open_dataset(root, split), **options)


def numbered(dataset: ImageFolder) -> ImageFolder:
    """Return the same images, each labelled with its index, to see which ones are loaded."""
    return replace(dataset, labels=np.arange(len(dataset)))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with 3 classes, 51 train and 15 val images; read-only."""
    root = tmp_path_factory.mktemp("pictures")
    write_images(root, "train", 51)
    write_images(root, "val", 15)
    return root


@pytest.fixture
def root(tmp_path: Path, pictures: Path) -> Path:
    """A copy of ``pictures`` that a test may damage."""
    shutil.copytree(pictures, tmp_path / "data", ignore=shutil.ignore_patterns(".isofast*"))
    return tmp_path / "data"


@pytest.fixture(scope="session")
def train_set(pictures: Path) -> ImageFolder:
    return checked(pictures)


@pytest.fixture(scope="session")
def val_set(pictures: Path) -> ImageFolder:
    return checked(pictures, "val")


@pytest.fixture(scope="session")
def photo_set(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    """51 PNGs of 28 x 22 pixels."""
    root = tmp_path_factory.mktemp("photos")
    write_images(root, "train", 51, one_size=True)
    return checked(root)


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """The full TinyImageNet recipe at 16 pixels, so that many batches are cheap."""
    return recipe_for("tinyimagenet", crop=16)


def eval_loader(
    dataset: ImageFolder, recipe: Recipe, indices: Sequence[int], **changes: Any
) -> EvalLoader:
    """Return a loader of clean images on the CPU, using DALI by default."""
    options = {"backend": "dali", "batch_size": 2, "threads": 1, "device": CPU} | changes
    return EvalLoader(options.pop("backend"), dataset, recipe, indices, **options)


@pytest.fixture
def make_loader(photo_set: ImageFolder, recipe: Recipe) -> Iterator[MakeLoader]:
    """Makes CPU loaders, over `photo_set` with DALI by default; closes them after the test."""
    made: list[TrainLoader] = []

    def make(dataset: ImageFolder = photo_set, row: Recipe = recipe, **changes: Any) -> TrainLoader:
        options = {"backend": "dali", "batch_size": 4, "seed": 5, "threads": 2, "device": CPU}
        options |= changes
        made.append(TrainLoader(options.pop("backend"), dataset, row, **options))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def levels_of(x_BCHW: torch.Tensor, recipe: Recipe) -> np.ndarray:
    """Return the 8-bit levels before normalisation, (B, H, W, 3) float64."""
    return 255 * (x_BCHW.permute(0, 2, 3, 1).numpy().astype(float) * recipe.std + recipe.mean)


def take(loader: TrainLoader, count: int) -> list[Batch]:
    return list(islice(loader, count))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    """1,000 validation images of the real TinyImageNet, 64 x 64, some of them gray."""
    if not TINY_ZIP.exists():
        pytest.skip(f"needs {TINY_ZIP.name}, which is not in {TINY_ZIP.parent}")
    folder = tmp_path_factory.mktemp("tinyimagenet") / "unlabeled"
    folder.mkdir()
    with zipfile.ZipFile(TINY_ZIP) as archive:
        val = "tiny-imagenet-200/val"
        for line in archive.read(f"{val}/val_annotations.txt").decode().splitlines():
            name, wnid, *_ = line.split("\t")
            (folder / f"{wnid}-{name}").write_bytes(archive.read(f"{val}/images/{name}"))
    return checked(folder.parent)
