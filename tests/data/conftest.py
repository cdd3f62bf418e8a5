"""Small data roots, made once a session, and the real pictures where they are at hand."""

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isofast.data import ImageFolder, Recipe, TrainLoader, open_dataset, recipe_for, verify_images
from isofast.data.prepare import prepare
from isofast.data.sources import source_of
from isofast.data.tars import tar_members

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TINY_ZIP = SHARED / "tiny-imagenet-20-classes.zip"
CIFAR10_TAR = SHARED / "cifar-10-batches-py.tar.xz"


def write_images(root: Path, *, train: int, val: int, classes: int = 3, side: int = 24) -> None:
    """Fill a data root with smooth coloured pictures, PNG and JPEG in turn, of several sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for k in range(count):
                coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
                size = (side + 3 * (k % 4), side + 2 * (k % 3))
                image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
                image.save(folder / f"{k:03d}.{'png' if k % 2 else 'jpg'}")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with 3 classes, 51 train and 15 val images; only to be read."""
    root = tmp_path_factory.mktemp("pictures")
    write_images(root, train=17, val=5)
    return root


@pytest.fixture(scope="session")
def train_set(pictures: Path) -> ImageFolder:
    return verify_images(open_dataset(pictures, "train"), progress=False)


@pytest.fixture(scope="session")
def val_set(pictures: Path) -> ImageFolder:
    return verify_images(open_dataset(pictures, "val"), progress=False)


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """The full TinyImageNet recipe at 16 pixels, so that many batches are cheap."""
    return recipe_for("tinyimagenet", crop=16)


@pytest.fixture
def make_loader(train_set: ImageFolder, recipe: Recipe) -> Iterator[Callable[..., TrainLoader]]:
    """Make loaders over `train_set` that are closed after the test."""
    made: list[TrainLoader] = []

    def make(**changes: object) -> TrainLoader:
        options = {
            "batch_size": 4,
            "seed": 5,
            "device": torch.device("cpu"),
            "threads": 2,
        } | changes
        made.append(TrainLoader(train_set, recipe, **options))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


@pytest.fixture(scope="session")
def tiny_zip() -> Path:
    """20 classes of the real TinyImageNet, in the official layout."""
    if not TINY_ZIP.exists():
        pytest.skip(f"needs {TINY_ZIP.name}, which is not in {TINY_ZIP.parent}")
    return TINY_ZIP


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory, tiny_zip: Path) -> Path:
    """The same, prepared."""
    root = tmp_path_factory.mktemp("tinyimagenet")
    prepare("tinyimagenet", root, tiny_zip)
    return root


@pytest.fixture(scope="session")
def photos(tiny_root: Path) -> ImageFolder:
    """The 1,000 real validation pictures, 64 x 64, some of them gray."""
    return verify_images(open_dataset(tiny_root, "val"), progress=False)


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The real CIFAR-10: prepared from its archive, and unpacked for torchvision's own reader."""
    if not CIFAR10_TAR.exists():
        pytest.skip(f"needs {CIFAR10_TAR.name}, which is not in {CIFAR10_TAR.parent}")
    source = source_of("cifar10")
    folder = tmp_path_factory.mktemp("cifar10")
    files = folder / "unpacked" / source.folder
    files.mkdir(parents=True)
    # xz takes its time, so that it is read once, and prepared from what came out
    for member in tar_members(CIFAR10_TAR, source.folder, source.checksums):
        (files / member.name).write_bytes(member.content(1 << 28))
    with tarfile.open(folder / "repacked.tar", "w") as archive:
        archive.add(files, source.folder)
    prepare("cifar10", folder / "root", folder / "repacked.tar")
    return folder / "root", folder / "unpacked"
