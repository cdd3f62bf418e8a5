"""The definition of the augmentation against torchvision, and the operation on the CPU.

Distances are mean absolute differences of 8-bit levels, on the same photographs with the same
parameters; each bound is just above the measured value (NUMERICS.md). The definition follows
torchvision on Pillow images; torchvision's tensor operations round at other points.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from isofast_kernels import augment_reference as reference
from isofast_kernels import augment_views

from .augment_problems import MEAN, STD, by_torchvision, levels_of, noise, photos, random_rows, rows

PHOTOS = photos()
N = len(PHOTOS)
RNG = np.random.default_rng(0)
FACTOR = RNG.uniform(0.6, 1.4, N).astype(np.float32)
HUE = RNG.uniform(-0.1, 0.1, N).astype(np.float32)
SIGMA = RNG.uniform(0.1, 2.0, N).astype(np.float32)
SIDES = RNG.integers(10, 65, (N, 2))
WINDOWS = np.concatenate([(RNG.random((N, 2)) * (65 - SIDES)).astype(int), SIDES], axis=1)


def augment(images, index, parameters, side, **options):
    options = {"mean": MEAN, "std": STD, "blur": True} | options
    return augment_views(images, index, parameters, side=side, **options)


def distances(table, side=64, **options):
    """Yield the views' distances to torchvision's on Pillow images and on tensors."""
    got = augment(PHOTOS, torch.arange(N), table, side, **options)
    got = levels_of(got[0]).permute(0, 2, 3, 1)
    # the views are normalised in float32
    assert (got - got.round()).abs().max() < 1e-3
    pictures = [Image.fromarray(photo.numpy()) for photo in PHOTOS]
    of_pictures = map(by_torchvision, pictures, table[0], N * [side])
    of_tensors = map(by_torchvision, PHOTOS.permute(0, 3, 1, 2), table[0], N * [side])
    for theirs in (
        torch.from_numpy(np.stack([np.asarray(image) for image in of_pictures])),
        torch.stack([*of_tensors]).permute(0, 2, 3, 1),
    ):
        yield (got.round() - theirs).abs().mean()


WINDOW = dict(zip(("top", "left", "height", "width"), WINDOWS.T, strict=True))
CASES = {
    # columns, side, allowed distance to Pillow images and to tensors
    "nothing": ({}, 64, 0.0, 0.0),
    "crop": (WINDOW, 64, 2e-4, 0.004),
    "crop, enlarged": (WINDOW, 100, 2e-4, 0.004),
    # Pillow 13 resizes along y before x where that is cheaper, and so rounds at other points
    "crop, reduced": (WINDOW, 24, 0.05, 0.004),
    "brightness": ({"brightness": FACTOR}, 64, 0.0, 0.0),
    "contrast": ({"contrast": FACTOR}, 64, 0.0, 0.15),
    "saturation": ({"saturation": FACTOR}, 64, 0.0, 0.15),
    "hue": ({"hue": HUE}, 64, 0.003, 0.5),
    "gray": ({"gray": 1}, 64, 0.0, 0.6),
    "blur": ({"blur_sigma": SIGMA}, 64, 5e-5, 5e-5),
    "solarize": ({"solarize_from": 128}, 64, 0.0, 0.0),
    "flip": ({"flip": 1}, 64, 0.0, 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_distance_to_torchvision(name):
    columns, side, to_pillow, to_tensors = CASES[name]
    of_pillow, of_tensors = distances(rows(1, N, 64, 64, **columns), side)
    assert of_pillow <= to_pillow and of_tensors <= to_tensors


@pytest.mark.parametrize("blurred", [False, True], ids=["no_blur", "blur"])
def test_distance_of_the_whole_recipe(blurred):
    table = random_rows(1, N, 64, 64, blur=blurred)
    of_pillow, of_tensors = distances(table, blur=blurred)
    # gray and hue differ, and at solarize's threshold one level becomes a jump
    assert of_pillow <= 0.01 and of_tensors <= 0.7


def test_layout_dtype_and_repetition():
    table = random_rows(2, N, 64, 64, blur=True)
    views = augment(PHOTOS, torch.arange(N), table, 32)
    assert views.shape == (2, N, 3, 32, 32) and views.dtype == torch.float32
    for view in views:
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(views, augment(PHOTOS, torch.arange(N), table, 32))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(
            augment(PHOTOS, torch.arange(N), table, 32, dtype=dtype), views.to(dtype)
        )


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(default):
    """As in a training_step under Lightning's bf16-true."""
    images, table = noise(2, 160, 160), random_rows(1, 2, 160, 160, blur=True)
    expected = augment(images, torch.arange(2), table, 160)
    torch.set_default_dtype(default)
    try:
        got = augment(images, torch.arange(2), table, 160)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)


def test_without_blur_the_column_is_not_looked_at():
    table = random_rows(1, N, 64, 64, blur=True)
    got = augment(PHOTOS, torch.arange(N), table, 16, blur=False)
    expected = augment(PHOTOS, torch.arange(N), reference.without_blur(table), 16)
    assert torch.equal(got, expected)
    assert not torch.equal(got, augment(PHOTOS, torch.arange(N), table, 16))


def test_opcheck_and_compile():
    images, index = noise(4, 12, 12), torch.tensor([2, 0, 3])
    table = random_rows(2, 3, 12, 12, blur=True)
    torch.library.opcheck(
        torch.ops.isofast_kernels.augment_views.default,
        (images, index, table, 9, list(MEAN), list(STD), True, torch.bfloat16),
    )

    def two(images, index, table):
        x1, x2 = augment(images, index, table, 9)
        return 2 * x1 + x2

    compiled = torch.compile(two, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, index, table), two(images, index, table))


IMAGES, INDEX, TABLE = noise(4, 8, 8), torch.tensor([1, 3]), rows(2, 2, 8, 8)


@pytest.mark.parametrize(
    ("call", "fragments"),
    [
        (lambda: augment(IMAGES[0], INDEX, TABLE, 8), ["images_NHW3", "(8, 8, 3)"]),
        (lambda: augment(IMAGES.float(), INDEX, TABLE, 8), ["float32", "uint8"]),
        (lambda: augment(IMAGES.mT, INDEX, TABLE, 8), ["(4, 8, 3, 8)", "(N, H, W, 3)"]),
        (lambda: augment(IMAGES[:, ::2], INDEX, TABLE, 8), ["strides", "contiguous"]),
        (lambda: augment(IMAGES, INDEX.int(), TABLE, 8), ["index_B", "int32", "int64"]),
        (lambda: augment(IMAGES, INDEX[:0], TABLE[:, :0], 8), ["index_B", "(0,)"]),
        (lambda: augment(IMAGES, INDEX, TABLE[:, :1], 8), ["(2, 1, 16)", "(V, 2, 16)"]),
        (lambda: augment(IMAGES, INDEX, TABLE.double(), 8), ["float64", "float32"]),
        (lambda: augment(IMAGES, INDEX, TABLE, 0), ["side", "0"]),
        (lambda: augment(IMAGES, INDEX, TABLE, 8, dtype=torch.int8), ["int8", "bfloat16"]),
        (lambda: augment(IMAGES, INDEX, TABLE, 8, std=(1, 0, 1)), ["std", "(1, 0, 1)"]),
        (lambda: augment(IMAGES, INDEX, TABLE.to("meta"), 8), ["cpu, meta"]),
    ],
)
def test_argument_errors_say_what_was_got_and_what_to_do(call, fragments):
    with pytest.raises(ValueError) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)
