"""The augmentation kernel against its definition, on a GPU or in Triton's interpreter.

Both round to levels after each operation, so another summation order may give another level.
"""

import pytest
import torch

from isofast_kernels import augment, augment_views
from isofast_kernels.augment_reference import augment_views_reference
from isofast_kernels.dispatch import INTERPRET

from .augment_problems import MEAN, STD, assert_levels, levels_of, noise, photos, random_rows, rows
from .cases import DEVICE, KERNELS_ONLY, ON_DEVICE, TRITON

pytestmark = ON_DEVICE
ROUNDED = pytest.mark.skipif(INTERPRET, reason="the interpreter truncates")

# stored height, width, side: not a power of two, one block or more, upscaled and downscaled
SHAPES = [(20, 20, 20), (37, 29, 15), (13, 11, 35), (64, 64, 64), (9, 50, 33)]


def both(images, index, table, side, *, blur, dtype=torch.float32):
    """Return the results of the kernel and of the definition for the same arguments."""
    kind = {"side": side, "mean": MEAN, "std": STD, "dtype": dtype}
    got = augment_views(
        images.to(DEVICE), index.to(DEVICE), table.to(DEVICE), blur=blur, **kind
    ).cpu()
    expected = augment_views_reference(images, index, table, **kind)
    return got, expected.permute(0, 1, 4, 2, 3)


@KERNELS_ONLY
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("blur", [False, True], ids=["no_blur", "blur"])
@pytest.mark.parametrize(("height", "width", "side"), SHAPES)
def test_whole_views(guard_inputs, height, width, side, blur):
    images, index = noise(3, height, width), torch.tensor([2, 0, 0, 1, 1, 2, 2, 0])[::2]
    table = guard_inputs(random_rows(2, 4, height, width, blur=blur))
    got, expected = both(images, index, table, side, blur=blur)
    assert got.shape == (2, 4, 3, side, side)
    assert_levels(got, expected)


OPERATIONS = {
    "nothing": {},
    "window": {"top": 5, "left": 2, "height": 30, "width": 41},
    "brightness": {"brightness": 1.3},
    "contrast": {"contrast": 0.7},
    "saturation": {"saturation": 1.2},
    "hue": {"hue": 0.09},
    "hue turned back": {"hue": -0.09},
    "gray": {"gray": 1},
    "blur": {"blur_sigma": 1.7},
    "narrow blur": {"blur_sigma": 0.1},
    "solarize": {"solarize_from": 100},
    "flip": {"flip": 1},
}


@KERNELS_ONLY
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation(name):
    # the first are of sky, without the levels around 100
    some = photos()[17:48:15] if name == "solarize" else photos()[:3]
    images, index = some[:, :48, :48].contiguous(), torch.arange(3)
    table = rows(1, 3, 48, 48, **OPERATIONS[name])
    got, expected = both(images, index, table, 48, blur="blur" in name)
    # only filters sum floats
    share = 1e-3 if name in ("window", "blur", "narrow blur") else 0.0
    assert_levels(got, expected, share)
    plain, _ = both(images, index, rows(1, 3, 48, 48), 48, blur=False)
    changed = (levels_of(got) - levels_of(plain)).abs().mean()
    assert changed > 0.3 or name in ("nothing", "narrow blur")
    if name == "blur":
        # without `blur` its column is not read
        assert torch.equal(both(images, index, table, 48, blur=False)[0], plain)


@KERNELS_ONLY
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=ROUNDED)])
def test_half_precision_views_are_the_rounded_ones(dtype):
    images, index = noise(3, 20, 20), torch.tensor([2, 0, 1])
    table = random_rows(2, 3, 20, 20, blur=True)
    half, _ = both(images, index, table, 20, blur=True, dtype=dtype)
    full, _ = both(images, index, table, 20, blur=True)
    assert half.dtype == dtype
    assert torch.equal(half, full.to(dtype))


@KERNELS_ONLY
def test_the_mean_of_a_large_white_view_is_white(monkeypatch):
    """Twice the sum of 2,051 x 2,051 levels would exceed 32 bits."""
    if INTERPRET:
        monkeypatch.setattr(augment, "tile_options", lambda side: {"BLOCK": 1 << 20})
    white = torch.full((1, 4, 4, 3), 255, dtype=torch.uint8, device=DEVICE)
    index = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    table = rows(1, 1, 4, 4, contrast=0.5).to(DEVICE)
    kind = {"side": 2051, "mean": [0.0] * 3, "std": [1.0] * 3, "blur": False}
    assert augment_views(white, index, table, **kind).min() > 0.99


def test_the_same_inputs_give_the_same_views_in_any_batch():
    images, index = noise(3, 20, 20), torch.tensor([2, 0, 1])
    table = random_rows(2, 3, 20, 20, blur=True)
    whole, _ = both(images, index, table, 20, blur=True)
    assert torch.equal(both(images, index, table, 20, blur=True)[0], whole)
    # on a CPU another batch may change a product's summation order, and so a level
    bound = 0 if TRITON else 1e-3
    for k in range(3):
        alone, _ = both(images, index[k : k + 1], table[:, k : k + 1], 20, blur=True)
        assert ((alone - whole[:, k : k + 1]).abs() > bound).float().mean() <= bound
