"""The specification of the augmentation in plain torch: torchvision on Pillow images, batched.

Every operation returns 8-bit levels, as Pillow's do, so where values are rounded is part of the
definition. NUMERICS.md lists each operation's deviation from torchvision's.

Shape letters: N stored images of H x W pixels, B images of a batch, V views, X images processed at
once (V B, or some of them), S the side of a view, P the columns of a parameter row. Levels are
int32, 0 to 255, (X, H, W, 3).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

COLUMNS = (
    *("top", "left", "height", "width"),
    *("brightness", "contrast", "saturation", "hue"),
    *("first", "second", "third", "fourth"),
    *("gray", "blur_sigma", "solarize_from", "flip"),
)
"""Columns of a parameter row, which float32 represents exactly; see `augment_views`."""

_FACTORS = COLUMNS.index("brightness")
_ORDER = COLUMNS.index("first")
CUBIC_REACH = 2.0
"""Radius of the cubic filter, in pixels of the coarser grid."""
BLUR_REACH = 3.0
"""Radius of the blur, in standard deviations."""


def augment_views_reference(
    images_NHW3: Tensor,
    index_B: Tensor,
    parameters_VBP: Tensor,
    *,
    side: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Crop and resize, jitter in the drawn order, gray, blur, solarize, flip, normalise.

    Arguments as in `isofast_kernels.augment_views`.

    Returns:
        views_VBSS3, (V, B, side, side, 3), `dtype`.
    """
    views, batch = parameters_VBP.shape[:2]
    rows_XP = parameters_VBP.reshape(views * batch, len(COLUMNS)).float()
    column = dict(zip(COLUMNS, rows_XP.unbind(1), strict=True))
    stored_X = images_NHW3[index_B.repeat(views)]
    levels = resize(stored_X, rows_XP[:, :_FACTORS], side)
    levels = jitter(levels, rows_XP[:, _FACTORS:_ORDER], rows_XP[:, _ORDER : _ORDER + 4].long())
    levels = _where(column["gray"] > 0, levels, lambda chosen, _: gray(chosen))
    levels = blur(levels, column["blur_sigma"])
    levels = torch.where(levels >= column["solarize_from"].view(-1, 1, 1, 1), 255 - levels, levels)
    levels = _where(column["flip"] > 0, levels, lambda chosen, _: chosen.flip(2))
    mean_3, std_3 = (levels.new_tensor(values, dtype=torch.float32) for values in (mean, std))
    views_X = (levels - 255 * mean_3) / (255 * std_3)
    return views_X.to(dtype).contiguous().unflatten(0, (views, batch))


def without_blur(parameters_VBP: Tensor) -> Tensor:
    """Return the same parameters without blur."""
    parameters_VBP = parameters_VBP.clone()
    parameters_VBP[..., COLUMNS.index("blur_sigma")] = 0
    return parameters_VBP


def resize(images_XHW3: Tensor, windows_X4: Tensor, side: int) -> Tensor:
    """Resize windows (top, left, height, width) to side x side, bicubic and antialiased.

    First along x, then along y, each pass rounded to levels. Pixels outside the window are ignored.
    """
    top, left, height, width = windows_X4.float().unbind(1)
    weights_XSH = cubic_weights(top, height, images_XHW3.shape[1], side)
    weights_XSW = cubic_weights(left, width, images_XHW3.shape[2], side)
    levels = images_XHW3.float()
    levels = _to_levels(torch.einsum("xsw,xhwc->xhsc", weights_XSW, levels))
    levels = _to_levels(torch.einsum("xsh,xhtc->xstc", weights_XSH, levels))
    return levels.int()


def cubic_weights(start_X: Tensor, length_X: Tensor, stored: int, side: int) -> Tensor:
    """Return the weight of each of `stored` pixels in each of a resized window's `side` pixels.

    The filter is Keys's cubic with a = -1/2, widened when downscaling and normalised to sum to 1
    within the window.

    Returns:
        weights_XSL, (X, side, stored), float32.
    """
    place_S = torch.arange(side, device=start_X.device, dtype=torch.float32) + 0.5
    pixel_L = torch.arange(stored, device=start_X.device, dtype=torch.float32)
    scale_X1 = length_X[:, None] / side
    filter_scale_X11 = scale_X1.clamp(min=1)[..., None]
    center_XS1 = (place_S * scale_X1)[..., None]
    from_start_X1L = (pixel_L - start_X[:, None])[:, None]
    inside = (from_start_X1L >= 0) & (from_start_X1L < length_X[:, None, None])
    distance_XSL = (from_start_X1L + 0.5 - center_XS1).abs() / filter_scale_X11
    weights_XSL = torch.where(inside, _cubic(distance_XSL), 0)
    return weights_XSL / weights_XSL.sum(-1, keepdim=True)


def jitter(levels: Tensor, factors_X4: Tensor, order_X4: Tensor) -> Tensor:
    """Apply brightness, contrast, saturation and hue to each image in its own order."""
    operations = (brightness, contrast, saturation, hue)
    for step in range(len(operations)):
        for number, operation in enumerate(operations):
            factor_X = factors_X4[:, number]
            neutral = 0 if operation is hue else 1
            chosen_X = (order_X4[:, step] == number) & (factor_X != neutral)
            levels = _where(chosen_X, levels, operation, factor_X)
    return levels


def brightness(levels: Tensor, factor_X: Tensor) -> Tensor:
    """Blend with black; factors above 1 move away from it."""
    return _blend(torch.zeros_like(levels), levels, factor_X)


def contrast(levels: Tensor, factor_X: Tensor) -> Tensor:
    """Blend with the image's mean luma, rounded to a level."""
    pixels = levels.shape[1] * levels.shape[2]
    total_X = luma(levels).sum((1, 2), dtype=torch.int64)
    mean_X = (2 * total_X + pixels) // (2 * pixels)
    return _blend(mean_X.int().view(-1, 1, 1, 1), levels, factor_X)


def saturation(levels: Tensor, factor_X: Tensor) -> Tensor:
    """Blend with the grayscale image."""
    return _blend(luma(levels)[..., None], levels, factor_X)


def hue(levels: Tensor, shift_X: Tensor) -> Tensor:
    """Rotate the hue of 8-bit HSV by a fraction of the circle, truncated to steps of 1/255."""
    h, s, v = rgb_to_hsv(levels)
    steps_X = (shift_X * 255).trunc().int()
    # & 255 is Pillow's wrap: 256 steps, one of them with zero width
    return hsv_to_rgb((h + steps_X.view(-1, 1, 1)) & 255, s, v)


def gray(levels: Tensor) -> Tensor:
    """Return luma in all three channels."""
    return luma(levels)[..., None].expand_as(levels)


def luma(levels: Tensor) -> Tensor:
    """Return 0.299 R + 0.587 G + 0.114 B in 16-bit fixed point, rounded, (X, H, W)."""
    r, g, b = levels.unbind(-1)
    return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16


def rgb_to_hsv(levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return hue, saturation and value as levels, (X, H, W); integer quotients are truncated."""
    r, g, b = levels.unbind(-1)
    v = levels.amax(-1)
    spread = v - levels.amin(-1)
    # a gray pixel has hue and saturation 0, whatever the divisor
    divisor = spread.clamp(min=1)
    sixth = torch.where(
        r == v, g - b, torch.where(g == v, 2 * divisor + b - r, 4 * divisor + r - g)
    )
    sixth = torch.where(sixth < 0, sixth + 6 * divisor, sixth)
    h = torch.where(spread == 0, 0, 255 * sixth // (6 * divisor))
    return h, 255 * spread // v.clamp(min=1), v


def hsv_to_rgb(h: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """Invert `rgb_to_hsv`, with rounding; the hue circle has 255 steps."""
    sector, rest = 6 * h // 255 % 6, 6 * h % 255
    full = 255 * 255
    p = (2 * v * (255 - s) + 255) // (2 * 255)
    q = (2 * v * (full - s * rest) + full) // (2 * full)
    t = (2 * v * (full - s * (255 - rest)) + full) // (2 * full)

    def pick(*six: Tensor) -> Tensor:
        return torch.stack(six).gather(0, sector[None].long())[0]

    return torch.stack([pick(v, q, p, p, t, v), pick(t, v, v, q, p, p), pick(p, p, t, v, v, q)], -1)


def blur(levels: Tensor, sigma_X: Tensor) -> Tensor:
    """Apply a Gaussian blur of radius ceil(3 sigma), mirrored at the border; sigma 0 is none."""
    radius = int((BLUR_REACH * sigma_X).ceil().max())
    if radius == 0:
        return levels
    weights_XK = gauss_weights(sigma_X, radius)
    planes = levels.permute(0, 3, 1, 2).float()
    for dim, pad in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        windows = functional.pad(planes, pad, mode="reflect").unfold(dim, 2 * radius + 1, 1)
        planes = torch.einsum("xcijk,xk->xcij", windows, weights_XK)
    return _to_levels(planes).int().permute(0, 2, 3, 1)


def gauss_weights(sigma_X: Tensor, radius: int) -> Tensor:
    """Return Gaussians on [-radius, radius], cut at ceil(3 sigma), sum 1, (X, 2 radius + 1)."""
    offset_K = torch.arange(-radius, radius + 1, device=sigma_X.device, dtype=torch.float32)
    inverse_X1 = torch.where(sigma_X > 0, 1 / sigma_X, 0)[:, None]
    reach_X1 = (BLUR_REACH * sigma_X).ceil()[:, None]
    weights_XK = torch.exp(-0.5 * (offset_K * inverse_X1) ** 2)
    weights_XK = torch.where(offset_K.abs() <= reach_X1, weights_XK, 0)
    return weights_XK / weights_XK.sum(1, keepdim=True)


def _where(chosen_X: Tensor, levels: Tensor, operation, argument_X: Tensor | None = None) -> Tensor:  # type: ignore[no-untyped-def]
    """Apply `operation` to the chosen images only."""
    if not chosen_X.any():
        return levels
    argument = chosen_X if argument_X is None else argument_X
    levels = levels.clone()
    levels[chosen_X] = operation(levels[chosen_X], argument[chosen_X])
    return levels


def _blend(below: Tensor, levels: Tensor, factor_X: Tensor) -> Tensor:
    """Return below + factor (levels - below) in float32, clamped and truncated to levels."""
    factor = factor_X.view(-1, 1, 1, 1)
    return (below + factor * (levels - below).float()).clamp(0, 255).int()


def _cubic(distance: Tensor) -> Tensor:
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < CUBIC_REACH, far, 0))


def _to_levels(x: Tensor) -> Tensor:
    return (x + 0.5).floor().clamp(0, 255)
