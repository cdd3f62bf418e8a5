"""The resident backend: who sees what, resume, against DALI, when it is taken, what is refused."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from isofast.config.schema import ViewConfig
from isofast.data import (
    Batch,
    ImageFolder,
    Recipe,
    TrainLoader,
    check_folder,
    open_dataset,
    recipe_for,
    resolve_backend,
)
from isofast.data.draw import draw
from isofast.data.resident import decode_images, parameter_rows, resident_gb
from isofast.errors import RunError, UserError
from isofast_kernels.augment_reference import COLUMNS

from .conftest import CPU, train_loader

GPU = torch.device("cuda")
COUNT, HEIGHT, WIDTH = 51, 28, 22
MakeLoader = Callable[..., TrainLoader]


def write_photos(root: Path, split: str = "train") -> None:
    """Smooth coloured PNGs of one size in three classes."""
    rng = np.random.default_rng(0)
    for k in range(COUNT):
        folder = root / split / f"class{k % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8))
        coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(folder / f"{k:03d}.png")


@pytest.fixture(scope="module")
def photo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    write_photos(root)
    return root


@pytest.fixture(scope="module")
def photo_set(photo_root: Path) -> ImageFolder:
    return check_folder(open_dataset(photo_root, "train"), progress=False)


@pytest.fixture
def make_resident(photo_set: ImageFolder, recipe: Recipe) -> Iterator[MakeLoader]:
    """Make loaders that are closed after the test."""
    made: list[TrainLoader] = []

    def make(dataset: ImageFolder = photo_set, row: Recipe = recipe, **changes: Any) -> TrainLoader:
        made.append(train_loader(dataset, row, backend="resident", **changes))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def take(loader: TrainLoader, count: int) -> list[Batch]:
    return list(islice(loader, count))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


def test_the_stored_images_are_the_files(photo_set: ImageFolder) -> None:
    images = decode_images(photo_set, np.arange(COUNT), CPU, threads=2, progress=False)
    assert images.shape == (COUNT, HEIGHT, WIDTH, 3) and images.dtype == torch.uint8
    for image, path in zip(images, photo_set.paths, strict=True):
        with Image.open(photo_set.root / path) as file:
            assert np.array_equal(image.numpy(), np.asarray(file.convert("RGB")))


def test_more_images_than_are_decoded_at_once(
    photo_set: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = np.arange(COUNT)
    whole = decode_images(photo_set, everything, CPU, threads=1, progress=False)
    for size in (17, 20):
        monkeypatch.setattr("isofast.data.resident._DECODED_AT_ONCE", size)
        again = decode_images(photo_set, everything, CPU, threads=1, progress=False)
        assert torch.equal(again, whole)


@pytest.mark.parametrize("k", [1, 11, 12, 17])
def test_resume_is_bit_exact(
    make_resident: MakeLoader, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    """12 steps an epoch, drawn five at a time: resumed within, before, at and after its end."""
    monkeypatch.setattr("isofast.data.loaders._DRAWN_AT_ONCE", 20)
    whole = make_resident()
    assert whole.steps_per_epoch == 12
    take(whole, k)
    assert whole.state_dict()["step"] == k
    resumed = make_resident(start_step=k)
    assert_same(take(whole, 14), take(resumed, 14))
    assert whole.state_dict() == resumed.state_dict()


def test_what_is_drawn_ahead_changes_nothing(
    make_resident: MakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = take(make_resident(), 14)
    monkeypatch.setattr("isofast.data.loaders._DRAWN_AT_ONCE", 1)
    assert_same(whole, take(make_resident(), 14))


def test_a_global_batch_does_not_depend_on_the_number_of_ranks(make_resident: MakeLoader) -> None:
    one = make_resident(batch_size=8)
    two = [make_resident(batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(8):
        parts = [next(loader) for loader in two]
        whole = next(one)
        assert torch.equal(whole.y_B, torch.cat([part.y_B for part in parts]))
        for view in range(2):
            together = torch.cat([part[view] for part in parts])
            # the CPU's matrix products may round a batch of another size to another level
            assert ((whole[view] - together).abs() > 1e-3).float().mean() < 1e-3


def test_layout_and_dtype(make_resident: MakeLoader, recipe: Recipe) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        batch = next(make_resident(dtype=dtype))
        for x in (batch.x1_BCHW, batch.x2_BCHW):
            assert x.shape == (4, 3, recipe.crop, recipe.crop)
            assert x.dtype == dtype
            assert x.is_contiguous(memory_format=torch.channels_last)
        assert batch.y_B.dtype == torch.int64


def test_kept_batches_stay_as_they_were(make_resident: MakeLoader) -> None:
    loader = make_resident()
    kept = take(loader, 14)
    copies = [Batch(*(x.clone() for x in batch)) for batch in kept]
    take(loader, 14)
    loader.close()
    assert_same(kept, copies)
    with pytest.raises(RunError, match="make a new one"):
        next(loader)


def test_files_do_not_matter_once_they_are_decoded(
    tmp_path: Path, photo_root: Path, make_resident: MakeLoader
) -> None:
    shutil.copytree(photo_root, tmp_path / "data")
    dataset = check_folder(open_dataset(tmp_path / "data", "train"), progress=False)
    loader = make_resident(dataset)
    shutil.rmtree(tmp_path / "data")
    assert_same(take(loader, 14), take(make_resident(), 14))


def test_a_file_lost_before_it_is_decoded_is_named(tmp_path: Path, photo_root: Path) -> None:
    shutil.copytree(photo_root, tmp_path / "data")
    dataset = check_folder(open_dataset(tmp_path / "data", "train"), progress=False)
    (dataset.root / dataset.paths[7]).unlink()
    with pytest.raises(RunError, match=f"{dataset.paths[7]} is not what it was"):
        decode_images(dataset, np.arange(COUNT), CPU, threads=1, progress=False)


def test_labels_pass_through_also_where_there_is_none(
    photo_set: ImageFolder, make_resident: MakeLoader
) -> None:
    labels = np.arange(COUNT) - 1
    batch = take(make_resident(replace(photo_set, labels=labels), batch_size=COUNT), 1)[0]
    assert sorted(batch.y_B.tolist()) == labels.tolist()


# the operations that both backends define alike: everything but the jitter
ALIKE = ViewConfig(jitter_p=0.0, blur_p=0.5, solarize_p=0.2)


def test_dali_sees_the_same_images_with_the_same_parameters(photo_set: ImageFolder) -> None:
    numbered = replace(photo_set, labels=np.arange(COUNT))
    recipe = replace(recipe_for("tinyimagenet", crop=24), view1=ALIKE, view2=ALIKE)
    loaders = [
        train_loader(numbered, recipe, backend=backend, batch_size=17)
        for backend in ("dali", "resident")
    ]
    assert [loader.backend for loader in loaders] == ["dali", "resident"]
    levels = 255 * torch.tensor(recipe.std).view(3, 1, 1)
    for _ in range(4):
        a, b = (next(loader) for loader in loaders)
        assert torch.equal(a.y_B, b.y_B)
        for view in range(2):
            distance = ((a[view] - b[view]) * levels).abs()
            # rounding of the resize; at the threshold of solarize a level is a jump
            assert distance.median() <= 0.01
            assert distance.mean() <= 0.35
        other = ((a.x1_BCHW - a.x2_BCHW) * levels).abs().mean()
        assert other > 20, "another view is far away"
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("backend", ["dali", "resident"])
def test_either_backend_makes_views_of_the_asked_dtype(
    photo_set: ImageFolder, recipe: Recipe, backend: str
) -> None:
    loader = train_loader(photo_set, recipe, backend=backend, dtype=torch.bfloat16)
    batch = next(loader)
    assert batch.x1_BCHW.dtype == batch.x2_BCHW.dtype == torch.bfloat16
    loader.close()


@pytest.mark.parametrize("blurred", ["view1", "view2"])
def test_a_blur_of_one_view_alone_is_done(make_resident: MakeLoader, blurred: str) -> None:
    sharp = recipe_for("tinyimagenet", crop=24)
    soft = replace(sharp, **{blurred: getattr(sharp, blurred).model_copy(update={"blur_p": 1.0})})
    (a,), (b,) = (take(make_resident(row=row), 1) for row in (sharp, soft))
    assert torch.equal(a.x1_BCHW, b.x1_BCHW) is (blurred == "view2")
    assert torch.equal(a.x2_BCHW, b.x2_BCHW) is (blurred == "view1")


def test_rows_hold_what_was_drawn() -> None:
    recipe = recipe_for("stl10")
    sizes, indices = np.full((500, 2), 96), np.arange(500)
    drawn = [draw(recipe, v, sizes, indices, seed=0, epoch=0) for v in (1, 2)]
    rows = parameter_rows(recipe, drawn)
    assert rows.shape == (2, 500, 16) and rows.dtype == np.float32
    for view, row in zip(drawn, rows, strict=True):
        column = dict(zip(COLUMNS, row.T, strict=True))
        assert np.array_equal(row[:, :4], view.window_N4)
        assert np.array_equal(row[:, 8:12], view.order_N4)
        assert np.array_equal(column["hue"], view.hue_N)
        assert np.array_equal(column["contrast"], view.contrast_N)
        assert np.array_equal(column["blur_sigma"], view.blur_sigma_N)
        assert np.array_equal(column["flip"] == 1, view.flip_N)
        assert np.array_equal(column["solarize_from"] == 128, view.solarize_N)
        assert set(column["solarize_from"]) <= {128, 256}


def test_auto_takes_resident_on_a_gpu_where_set_and_recipe_allow_it(
    photo_set: ImageFolder, train_set: ImageFolder
) -> None:
    recipe = recipe_for("cifar10")
    gb = resident_gb(COUNT, HEIGHT, WIDTH)
    assert gb == COUNT * HEIGHT * WIDTH * 3 / 1e9
    assert resolve_backend("auto", photo_set, recipe, GPU, gb) == "resident"
    assert resolve_backend("auto", photo_set, recipe, CPU, gb) == "dali"
    assert resolve_backend("auto", photo_set, recipe, GPU, 0.99 * gb) == "dali"
    assert resolve_backend("auto", train_set, recipe, GPU, 8.0) == "dali"
    assert resolve_backend("auto", photo_set, recipe_for("digits"), GPU, 8.0) == "dali"
    assert resolve_backend("dali", photo_set, recipe, GPU, 8.0) == "dali"
    assert resolve_backend("resident", photo_set, recipe, CPU, 8.0) == "resident"


@pytest.mark.parametrize(
    ("name", "crop", "limit", "message"),
    [
        ("digits", None, 8.0, "'digits' recipe rotates.*'dali'"),
        (
            "cifar10",
            None,
            1e-6,
            r"51 decoded images take 9.42e-05 GB.*resident_limit_gb is 1e-06.*raise",
        ),
        ("stl10", 6, 8.0, "sigma 2 reaches beyond a view of 6 pixels.*data.crop"),
    ],
)
def test_resident_says_why_it_cannot(
    photo_set: ImageFolder, name: str, crop: int | None, limit: float, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolve_backend("resident", photo_set, recipe_for(name, crop=crop), CPU, limit)


def test_images_of_many_sizes_are_refused_by_resident(train_set: ImageFolder) -> None:
    message = "51 training images have 12 sizes, from 24 x 24 to 28 x 33 pixels.*or use 'dali'"
    with pytest.raises(UserError, match=message):
        train_loader(train_set, recipe_for("cifar10"), backend="resident")


def test_fewer_images_than_a_global_batch(photo_set: ImageFolder, recipe: Recipe) -> None:
    with pytest.raises(UserError, match="fewer than one global batch of 60"):
        train_loader(photo_set, recipe, backend="resident", batch_size=30, world_size=2)
