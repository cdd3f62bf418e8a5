"""The resident backend: against the files and DALI, when it is chosen, what it refuses."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from isofast.config.schema import ViewConfig
from isofast.data import recipe_for, resolve_backend
from isofast.data.draw import draw
from isofast.data.resident import parameter_rows, resident_gb
from isofast.errors import UserError
from isofast_kernels.augment_reference import COLUMNS

from ..support.runs import assert_equal_trees
from .conftest import CPU, checked, numbered, take

GPU = torch.device("cuda")
COUNT, HEIGHT, WIDTH = 51, 28, 22


def test_files_do_not_matter_once_they_are_decoded(tmp_path, photo_set, make_loader):
    shutil.copytree(photo_set.root, tmp_path / "data")
    dataset = checked(tmp_path / "data")
    loader = make_loader(dataset, backend="resident")
    shutil.rmtree(tmp_path / "data")
    assert_equal_trees(take(loader, 14), take(make_loader(backend="resident"), 14))


# operations that both backends define identically: everything but jitter
ALIKE = ViewConfig(jitter_p=0.0, blur_p=0.5, solarize_p=0.2)
OTHER = ALIKE.model_copy(update={"solarize_p": 0.5, "solarize_threshold": 64})


def test_dali_sees_the_same_images_with_the_same_parameters(photo_set, make_loader):
    pytest.importorskip("nvidia.dali")
    recipe = replace(recipe_for("tinyimagenet", crop=24), view1=ALIKE, view2=OTHER)
    loaders = [
        make_loader(numbered(photo_set), recipe, backend=backend, batch_size=17)
        for backend in ("dali", "resident")
    ]
    assert [loader.backend for loader in loaders] == ["dali", "resident"]
    levels = 255 * torch.tensor(recipe.std).view(3, 1, 1)
    for _ in range(4):
        a, b = (next(loader) for loader in loaders)
        assert torch.equal(a.y_B, b.y_B)
        for x_BCHW, y_BCHW in zip(a.x_NCHW.chunk(2), b.x_NCHW.chunk(2), strict=True):
            distance = ((x_BCHW - y_BCHW) * levels).abs()
            # the resize rounds differently; at solarize's threshold, one level becomes a jump
            assert distance.median() <= 0.01
            assert distance.mean() <= 0.35
        other = ((a.x1_BCHW - a.x2_BCHW) * levels).abs().mean()
        assert other > 20, "the other view must be far away"


@pytest.mark.parametrize("blurred", ["view1", "view2"])
def test_a_blur_of_one_view_alone_is_done(make_loader, blurred):
    sharp = recipe_for("tinyimagenet", crop=24)
    soft = replace(sharp, **{blurred: getattr(sharp, blurred).model_copy(update={"blur_p": 1.0})})
    (a,), (b,) = (take(make_loader(row=row, backend="resident"), 1) for row in (sharp, soft))
    assert torch.equal(a.x1_BCHW, b.x1_BCHW) is (blurred == "view2")
    assert torch.equal(a.x2_BCHW, b.x2_BCHW) is (blurred == "view1")


def test_rows_hold_what_was_drawn():
    recipe = recipe_for("stl10")
    sizes, indices = np.full((500, 2), 96), np.arange(500)
    drawn = [draw(recipe, v, sizes, indices, seed=0, epoch=0) for v in (1, 2)]
    rows = parameter_rows(recipe, drawn)
    assert rows.shape == (2, 500, 16) and rows.dtype == np.float32
    for view, row in zip(drawn, rows, strict=True):
        column = dict(zip(COLUMNS, row.T, strict=True))
        assert np.array_equal(row[:, :4], view.window_N4)
        assert np.array_equal(row[:, 8:12], view.order_N4)
        for name in ("brightness", "contrast", "saturation", "hue", "gray", "blur_sigma", "flip"):
            assert np.array_equal(column[name], getattr(view, f"{name}_N")), name
        assert np.array_equal(column["solarize_from"] == 128, view.solarize_N)
        assert set(column["solarize_from"]) <= {128, 256}


def test_auto_takes_resident_on_a_gpu_where_set_and_recipe_allow_it(photo_set, train_set):
    pytest.importorskip("nvidia.dali")
    recipe = recipe_for("cifar10")
    gb = resident_gb(COUNT, HEIGHT, WIDTH)
    assert gb == COUNT * HEIGHT * WIDTH * 3 / 1e9
    assert resolve_backend("auto", photo_set, recipe, GPU, gb) == "resident"
    assert resolve_backend("auto", photo_set, recipe, CPU, gb) == "dali"
    assert resolve_backend("auto", photo_set, recipe, GPU, 0.99 * gb) == "dali"
    assert resolve_backend("auto", train_set, recipe, GPU, 8.0) == "dali"
    assert resolve_backend("auto", photo_set, recipe_for("digits"), GPU, 8.0) == "dali"
    turned = replace(recipe, view2=recipe_for("digits").view2)
    assert resolve_backend("auto", photo_set, turned, GPU, 8.0) == "dali"
    # whose sizes could only be read one by one
    assert resolve_backend("auto", replace(photo_set, sizes=None), recipe, GPU, 8.0) == "dali"
    assert resolve_backend("dali", photo_set, recipe, GPU, 8.0) == "dali"
    assert resolve_backend("resident", photo_set, recipe, CPU, 8.0) == "resident"


@pytest.mark.parametrize(
    ("name", "crop", "limit", "message"),
    [
        ("digits", None, 8.0, "'digits' recipe rotates.*'dali'"),
        ("cifar10", None, 1e-6, "51 decoded images take 9.42e-05 GB.*_limit_gb is 1e-06.*raise"),
        ("stl10", 6, 8.0, "sigma 2 reaches beyond a view of 6 pixels.*data.crop"),
        ("sizes", None, 8.0, "51 .* have 12 sizes, from 24 x 24 to 28 x 33 pixels.*or use 'dali'"),
    ],
)
def test_resident_says_why_it_cannot(photo_set, train_set, name, crop, limit, message):
    dataset, name = (train_set, "cifar10") if name == "sizes" else (photo_set, name)
    with pytest.raises(UserError, match=message):
        resolve_backend("resident", dataset, recipe_for(name, crop=crop), CPU, limit)
