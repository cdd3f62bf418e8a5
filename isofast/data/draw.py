"""All random numbers of the data: image orders and augmentation parameters.

They are pure functions of (seed, epoch, image index, view), from the counter-based generator
Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), independent of
ranks, batch size, threads, resume and library versions.

Shapes: N images.
"""

from dataclasses import dataclass, fields
from itertools import permutations

import numpy as np
import numpy.typing as npt

from isofast.config.schema import ViewConfig
from isofast.data.recipe import Recipe

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]

_LUMA = np.array([0.299, 0.587, 0.114])
_TRIES = 10
_ORDER_STREAM = 0
_MASK = np.uint64(0xFFFFFFFF)
_ORDERS_24x4 = np.array(list(permutations(range(4))), dtype=np.int8)


@dataclass(frozen=True)
class ViewDraw:
    """The parameters of one view of N images, ready to be applied.

    window_N4: int32, top, left, height, width of the crop, in pixels of the stored image.
    affine_N23: float32, output to input, in crop pixels; (0, 0) is the first pixel's corner.
    brightness_N, contrast_N, saturation_N: float32 factors, 1 for no change.
    hue_N: float32, fraction of the colour circle. gray_N, solarize_N, flip_N: bool.
    order_N4: int8, the order of brightness (0), contrast (1), saturation (2) and hue (3), for
        backends that apply them one by one.
    blur_sigma_N: float32, in pixels of the crop, 0 for no blur.
    """

    window_N4: npt.NDArray[np.int32]
    affine_N23: npt.NDArray[np.float32]
    brightness_N: npt.NDArray[np.float32]
    contrast_N: npt.NDArray[np.float32]
    saturation_N: npt.NDArray[np.float32]
    hue_N: npt.NDArray[np.float32]
    order_N4: npt.NDArray[np.int8]
    gray_N: npt.NDArray[np.bool_]
    blur_sigma_N: npt.NDArray[np.float32]
    solarize_N: npt.NDArray[np.bool_]
    flip_N: npt.NDArray[np.bool_]

    def __getitem__(self, images: slice) -> "ViewDraw":
        """Return the parameters of some of the images."""
        return ViewDraw(*(getattr(self, field.name)[images] for field in fields(self)))


# T consecutive batches of B images, (T, B), and the parameters of both views of the T * B images
Chunk = tuple[Ints, ViewDraw, ViewDraw]


def philox(counter_X4: Words, seed: int) -> Words:
    """Return four random 32-bit words for each counter of four 32-bit words (Philox 4x32-10).

    Args:
        counter_X4: (..., 4) uint64, each value below 2**32.
        seed: the 64-bit key, low word first.

    Returns:
        (..., 4) uint64, each value below 2**32.
    """
    c0, c1, c2, c3 = (counter_X4[..., k] for k in range(4))
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    shift = np.uint64(32)
    for _ in range(10):
        product0 = c0 * np.uint64(0xD2511F53)
        product1 = c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ np.uint64(key0),
            product1 & _MASK,
            (product0 >> shift) ^ c3 ^ np.uint64(key1),
            product0 & _MASK,
        )
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def _words(indices_N: Ints, *, seed: int, epoch: int, stream: int, blocks: int) -> Words:
    counter = np.empty((len(indices_N), blocks, 4), dtype=np.uint64)
    counter[..., 0] = indices_N[:, None]
    counter[..., 1] = epoch
    counter[..., 2] = stream
    counter[..., 3] = np.arange(blocks)
    return philox(counter, seed).reshape(len(indices_N), 4 * blocks)


def epoch_order(images: int, *, seed: int, epoch: int) -> Ints:
    """Return the order of one epoch: a permutation of range(images), (images,) int64."""
    words = _words(np.arange(images), seed=seed, epoch=epoch, stream=_ORDER_STREAM, blocks=1)
    # a stable sort orders equal keys the same way everywhere
    return np.argsort((words[:, 0] << np.uint64(32)) | words[:, 1], kind="stable")


def draw(
    recipe: Recipe, view: int, sizes_N2: Ints, indices_N: Ints, *, seed: int, epoch: int
) -> ViewDraw:
    """Draw the parameters of view 1 or 2 for the given images of one epoch.

    Args:
        recipe: ranges and probabilities.
        view: 1 or 2.
        sizes_N2: height and width of each stored image, in pixels.
        indices_N: indices of the images in the data set, which key their random numbers.
        seed, epoch: the run's seed, and the epoch from 0.
    """
    row = {1: recipe.view1, 2: recipe.view2}[view]
    # every parameter has a fixed place: changing a strength or probability moves no other number
    words = _words(indices_N, seed=seed, epoch=epoch, stream=view, blocks=10)
    unit_NK: Floats = (words.astype(np.float64) + 0.5) / 2.0**32
    crop_u, other_u = unit_NK[:, : 2 * _TRIES + 2], unit_NK[:, 2 * _TRIES + 2 :]
    place, jitter = other_u[:, 0:5], other_u[:, 5:10]
    gray, blur, sigma, solarize, flip, order = other_u[:, 10:16].T
    jittered = jitter[:, 0] < row.jitter_p

    def factor(strength: float, u: Floats) -> npt.NDArray[np.float32]:
        drawn = _between((max(0.0, 1.0 - strength), 1.0 + strength), u)
        return np.where(jittered, drawn, 1.0).astype(np.float32)

    return ViewDraw(
        window_N4=_crop_windows(row, sizes_N2, crop_u),
        affine_N23=_affine(row, recipe.crop, place),
        brightness_N=factor(row.brightness, jitter[:, 1]),
        contrast_N=factor(row.contrast, jitter[:, 2]),
        saturation_N=factor(row.saturation, jitter[:, 3]),
        hue_N=np.where(jittered, _between((-row.hue, row.hue), jitter[:, 4]), 0).astype(np.float32),
        order_N4=_ORDERS_24x4[(24 * order).astype(np.int64)],
        gray_N=gray < row.gray_p,
        blur_sigma_N=np.where(blur < row.blur_p, _between(row.blur_sigma, sigma), 0).astype(
            np.float32
        ),
        solarize_N=solarize < row.solarize_p,
        flip_N=flip < row.flip_p,
    )


def colour_matrices(drawn: ViewDraw) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Combine colour jitter and gray into one affine map of RGB for each image.

    A pixel p of an image with mean pixel m becomes map_N33 @ p + mean_map_N33 @ m. Brightness
    scales, contrast pulls towards the image's mean luma, saturation and gray towards the pixel's
    luma (ITU-R 601, as in Pillow). These commute, so torchvision's random order matters only where
    values clip. Hue rotates about the gray axis, the linear map closest to a hue shift in HSV.

    Returns:
        map_N33, mean_map_N33, float32.
    """
    luma_33 = np.broadcast_to(_LUMA, (3, 3))
    eye_33 = np.eye(3)
    saturation = np.where(drawn.gray_N, 0.0, drawn.saturation_N)[:, None, None]
    saturate_N33 = saturation * eye_33 + (1.0 - saturation) * luma_33
    angle = 2.0 * np.pi * drawn.hue_N.astype(np.float64)[:, None, None]
    turn_33 = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3.0)
    hue_N33 = np.cos(angle) * eye_33 + np.sin(angle) * turn_33 + (1.0 - np.cos(angle)) / 3.0
    brightness = drawn.brightness_N.astype(np.float64)[:, None, None]
    contrast = drawn.contrast_N.astype(np.float64)[:, None, None]
    # saturation after hue, because gray is the luma of the jittered colour
    map_N33 = brightness * contrast * (saturate_N33 @ hue_N33)
    mean_map_N33 = brightness * (1.0 - contrast) * luma_33
    return map_N33.astype(np.float32), mean_map_N33.astype(np.float32)


def clean_windows(
    recipe: Recipe, sizes_N2: Ints
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the part of each stored image that its clean view shows.

    This is torchvision's Resize(resize_short), CenterCrop(crop) as a region of the stored image, so
    that a very long image is never resized as a whole.

    Returns:
        start_N2, end_N2: float32, (y, x) in pixels of the stored image.
    """
    short_N1 = sizes_N2.min(axis=1, keepdims=True)
    resized_N2 = recipe.resize_short * sizes_N2 // short_N1
    offset_N2 = np.rint((resized_N2 - recipe.crop) / 2.0)
    scale_N2 = sizes_N2 / resized_N2
    start_N2, end_N2 = offset_N2 * scale_N2, (offset_N2 + recipe.crop) * scale_N2
    return start_N2.astype(np.float32), end_N2.astype(np.float32)


def _between(bounds: tuple[float, float], u: Floats) -> Floats:
    return bounds[0] + (bounds[1] - bounds[0]) * u


def _crop_windows(row: ViewConfig, sizes_N2: Ints, u: Floats) -> npt.NDArray[np.int32]:
    """torchvision's RandomResizedCrop: ten tries, then the largest allowed central window."""
    height, width = sizes_N2[:, 0:1], sizes_N2[:, 1:2]
    low, high = row.crop_ratio
    area = height * width * _between(row.crop_scale, u[:, :_TRIES])
    ratio = np.exp(_between((np.log(low), np.log(high)), u[:, _TRIES : 2 * _TRIES]))
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = np.argmax(fits, axis=1)[:, None]
    w, h = np.take_along_axis(w, first, axis=1), np.take_along_axis(h, first, axis=1)
    top = (u[:, -2:-1] * (height - h + 1)).astype(np.int64)
    left = (u[:, -1:] * (width - w + 1)).astype(np.int64)
    # the fallback; at least one pixel, which torchvision doesn't ensure for very thin images
    fallback_w = np.clip(np.rint(height * high), 1, width).astype(np.int64)
    fallback_h = np.clip(np.rint(width / low), 1, height).astype(np.int64)
    found = fits.any(axis=1, keepdims=True)
    w, h = np.where(found, w, fallback_w), np.where(found, h, fallback_h)
    top = np.where(found, top, (height - h) // 2)
    left = np.where(found, left, (width - w) // 2)
    return np.concatenate([top, left, h, w], axis=1).astype(np.int32)


def _affine(row: ViewConfig, crop: int, u: Floats) -> npt.NDArray[np.float32]:
    """Rotate, shear in x and scale about the middle, then shift; given as output to input."""
    angle = np.radians(_between((-row.degrees, row.degrees), u[:, 0]))
    shear = np.tan(np.radians(_between((-row.shear, row.shear), u[:, 1])))
    scale = _between(row.scale, u[:, 2])
    move_N2 = crop * _between((-row.translate, row.translate), u[:, 3:5])
    cos, sin = np.cos(angle), np.sin(angle)
    # the inverse of scale * rotation(angle) @ [[1, -shear], [0, 1]]
    inverse_N22 = (
        np.stack([cos - shear * sin, sin + shear * cos, -sin, cos], axis=1).reshape(-1, 2, 2)
        / scale[:, None, None]
    )
    middle = crop / 2.0
    offset_N21 = middle - inverse_N22 @ (move_N2 + middle)[:, :, None]
    return np.concatenate([inverse_N22, offset_N21], axis=2).astype(np.float32)
