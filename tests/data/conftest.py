"""Small data roots, made once a session, and the real pictures where they are at hand."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isofast.data import ImageFolder, Recipe, TrainLoader, open_dataset, recipe_for, verify_images
from isofast.data.prepare import prepare

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TINY_ZIP = SHARED / "tiny-imagenet-20-classes.zip"


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
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 classes of the real TinyImageNet, prepared from the archive."""
    if not TINY_ZIP.exists():
        pytest.skip(f"needs {TINY_ZIP.name}, which is not in {TINY_ZIP.parent}")
    root = tmp_path_factory.mktemp("tinyimagenet")
    prepare("tinyimagenet", root, TINY_ZIP)
    return root


@pytest.fixture(scope="session")
def photos(tiny_root: Path) -> ImageFolder:
    """The 1,000 real validation pictures, 64 x 64, some of them gray."""
    return verify_images(open_dataset(tiny_root, "val"), progress=False)
