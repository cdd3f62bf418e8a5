"""Images and random parameter rows for the augmentation tests."""

import functools

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from isofast_kernels.augment_reference import COLUMNS

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER = ("brightness", "contrast", "saturation", "hue")
NEUTRAL = dict.fromkeys(("brightness", "contrast", "saturation"), 1.0) | {
    "second": 1.0,
    "third": 2.0,
    "fourth": 3.0,
    "solarize_from": 256.0,
}


@functools.cache
def photos(side=64):
    """Square crops of scikit-learn's two photographs, (60 at 64 pixels, side, side, 3)."""
    squares = [
        image[top : top + side, left : left + side]
        for image in load_sample_images().images
        for top in range(0, 427 - side, side)
        for left in range(0, 640 - side, 2 * side)
    ]
    return torch.from_numpy(np.stack(squares))


def noise(count, height, width, seed=0):
    """Random 8-bit levels, 0 and 255 more often than others."""
    levels = np.random.default_rng(seed).integers(-60, 316, (count, height, width, 3))
    return torch.from_numpy(levels.clip(0, 255).astype(np.uint8))


def rows(views, batch, whole_height, whole_width, **columns):
    """Neutral parameters for whole images, except for the given columns (values or arrays)."""
    values = NEUTRAL | {"height": whole_height, "width": whole_width} | columns
    shape = (views, batch)
    table = [np.broadcast_to(values.get(name, 0.0), shape) for name in COLUMNS]
    return torch.from_numpy(np.stack(table, axis=-1).astype(np.float32))


def random_rows(views, batch, height, width, *, blur, seed=0):
    """Every operation at its usual strength, some left out at random."""
    rng = np.random.default_rng(seed)
    shape = (views, batch)

    def maybe(p, values, otherwise):
        return np.where(rng.random(shape) < p, values, otherwise)

    h, w = rng.integers(3, height + 1, shape), rng.integers(3, width + 1, shape)
    orders = rng.permuted(np.broadcast_to(np.arange(4), (*shape, 4)), axis=-1)
    jittered = rng.random(shape) < 0.8

    def factor(strength):
        return np.where(jittered, rng.uniform(1 - strength, 1 + strength, shape), 1.0)

    return rows(
        views,
        batch,
        h,
        w,
        top=rng.integers(0, height - h + 1),
        left=rng.integers(0, width - w + 1),
        brightness=factor(0.4),
        contrast=factor(0.4),
        saturation=factor(0.2),
        hue=np.where(jittered, rng.uniform(-0.1, 0.1, shape), 0.0),
        **dict(
            zip(("first", "second", "third", "fourth"), np.moveaxis(orders, -1, 0), strict=True)
        ),
        gray=maybe(0.2, 1.0, 0.0),
        blur_sigma=maybe(0.7 if blur else 0.0, rng.uniform(0.1, 2.0, shape), 0.0),
        solarize_from=maybe(0.3, 128.0, 256.0),
        flip=maybe(0.5, 1.0, 0.0),
    )


def by_torchvision(image, row, side=64):
    """The view that a parameter row describes, of a Pillow image or a (3, H, W) tensor."""
    column = dict(zip(COLUMNS, row.tolist(), strict=True))
    window = [int(column[name]) for name in ("top", "left", "height", "width")]
    image = F.resized_crop(image, *window, [side, side], InterpolationMode.BICUBIC)
    for place in ("first", "second", "third", "fourth"):
        name = JITTER[int(column[place])]
        if column[name] != (0 if name == "hue" else 1):
            image = getattr(F, f"adjust_{name}")(image, column[name])
    if column["gray"]:
        image = F.to_grayscale(image, 3)
    if (sigma := column["blur_sigma"]) > 0:
        width = int(2 * np.ceil(3 * np.float32(sigma)) + 1)
        image = F.gaussian_blur(image, [width, width], [sigma, sigma])
    if column["solarize_from"] < 256:
        image = F.solarize(image, column["solarize_from"])
    return F.hflip(image) if column["flip"] else image


def levels_of(views):
    """Normalised views (..., 3, S, S) as 8-bit levels, float64."""
    std, mean = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (STD, MEAN))
    return (views.double().cpu() * std + mean) * 255


def assert_levels(got, expected, share=2e-3):
    difference = (levels_of(got) - levels_of(expected)).abs()
    assert (difference > 0.5).double().mean() <= share
    assert difference.mean() <= 0.01
    # equal levels have equal values, up to the normalisation's rounding
    assert difference[difference < 0.5].max() < 1e-3
