"""Operations on a block of pixels in Triton: filters, blends and hue rotation.

`augment_reference` defines what is computed. Shape letters: I pixels of a block, as three tensors
r, g and b; S the side of a view. Levels are int32 or integral float32, 0 to 255.
"""

import triton
import triton.language as tl

from .augment_reference import BLUR_REACH, COLUMNS, CUBIC_REACH

_FACTORS = tl.constexpr(COLUMNS.index("brightness"))
_ORDER = tl.constexpr(COLUMNS.index("first"))
_CUBIC_REACH = tl.constexpr(CUBIC_REACH)
_BLUR_REACH = tl.constexpr(BLUR_REACH)
_BRIGHTNESS = tl.constexpr(0)
_SATURATION = tl.constexpr(2)


@triton.jit
def _cubic(distance):
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    return tl.where(distance < 1.0, near, tl.where(distance < _CUBIC_REACH, far, 0.0))


@triton.jit
def level(x):
    """Round to the nearest 8-bit level."""
    return tl.minimum(tl.maximum(tl.floor(x + 0.5), 0.0), 255.0)


@triton.jit
def resized(line_ptr_I, place_I, length, step, plane, mask_I, S, TAPS):
    """Return pixel `place` of a line of `length` pixels, `step` apart, resized to S pixels."""
    scale = length / S
    filter_scale = tl.maximum(scale, 1.0)
    center_I = (place_I.to(tl.float32) + 0.5) * scale
    first_I = tl.maximum(tl.floor(center_I - _CUBIC_REACH * filter_scale + 0.5), 0.0)
    total_I = tl.zeros_like(center_I)
    r_I, g_I, b_I = total_I, total_I, total_I
    for tap in range(TAPS):
        pixel_I = first_I + tap
        inside_I = mask_I & (pixel_I < length)
        weight_I = _cubic(tl.abs(pixel_I + 0.5 - center_I) / filter_scale)
        weight_I = tl.where(inside_I, weight_I, 0.0)
        ptr_I = line_ptr_I + pixel_I.to(tl.int32) * step
        total_I += weight_I
        r_I += weight_I * tl.load(ptr_I, mask=inside_I, other=0).to(tl.float32)
        g_I += weight_I * tl.load(ptr_I + plane, mask=inside_I, other=0).to(tl.float32)
        b_I += weight_I * tl.load(ptr_I + 2 * plane, mask=inside_I, other=0).to(tl.float32)
    total_I = tl.where(mask_I, total_I, 1.0)
    return level(r_I / total_I), level(g_I / total_I), level(b_I / total_I)


@triton.jit
def blurred(line_ptr_I, place_I, sigma, step, mask_I, S: tl.constexpr):
    """Return blurred pixel `place` of a line of S pixels, `step` apart; float32, not rounded."""
    inverse = tl.where(sigma > 0.0, 1.0 / tl.where(sigma > 0.0, sigma, 1.0), 0.0)
    reach = _BLUR_REACH * sigma
    radius = reach.to(tl.int32)
    radius += (radius < reach).to(tl.int32)
    total = 0.0
    r_I = tl.zeros_like(place_I).to(tl.float32)
    g_I, b_I = r_I, r_I
    for tap in range(0, 2 * radius + 1):
        x = (tap - radius) * inverse
        weight = tl.exp(-0.5 * x * x)
        # mirrored at the centres of the first and last pixel
        pixel_I = tl.abs(place_I + tap - radius)
        pixel_I = S - 1 - tl.abs(S - 1 - pixel_I)
        ptr_I = line_ptr_I + pixel_I * step
        total += weight
        r_I += weight * tl.load(ptr_I, mask=mask_I, other=0).to(tl.float32)
        g_I += weight * tl.load(ptr_I + S * S, mask=mask_I, other=0).to(tl.float32)
        b_I += weight * tl.load(ptr_I + 2 * S * S, mask=mask_I, other=0).to(tl.float32)
    return r_I / total, g_I / total, b_I / total


@triton.jit
def luma(r, g, b):
    return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16


@triton.jit
def blend(below, level, factor):
    x = below + factor * (level - below).to(tl.float32)
    return tl.minimum(tl.maximum(x, 0.0), 255.0).to(tl.int32)


@triton.jit
def _turned(r, g, b, steps):
    """Rotate the hue of 8-bit HSV by whole steps, all in integers."""
    v = tl.maximum(r, tl.maximum(g, b))
    spread = v - tl.minimum(r, tl.minimum(g, b))
    divisor = tl.maximum(spread, 1)
    sixth = tl.where(r == v, g - b, tl.where(g == v, 2 * divisor + b - r, 4 * divisor + r - g))
    sixth = tl.where(sixth < 0, sixth + 6 * divisor, sixth)
    h = tl.where(spread == 0, 0, 255 * sixth // (6 * divisor))
    s = 255 * spread // tl.maximum(v, 1)

    h = (h + steps) & 255
    sector = 6 * h // 255 % 6
    rest = 6 * h % 255
    p = (2 * v * (255 - s) + 255) // 510
    q = (2 * v * (65025 - s * rest) + 65025) // 130050
    t = (2 * v * (65025 - s * (255 - rest)) + 65025) // 130050
    even = (sector == 0) | (sector == 5)
    r = tl.where(even, v, tl.where(sector == 1, q, tl.where(sector == 4, t, p)))
    g = tl.where(
        (sector == 1) | (sector == 2), v, tl.where(sector == 0, t, tl.where(sector == 3, q, p))
    )
    b = tl.where(
        (sector == 3) | (sector == 4), v, tl.where(sector == 2, t, tl.where(sector == 5, q, p))
    )
    return r, g, b


@triton.jit
def jittered(r, g, b, row_ptr, begin, end):
    """Apply operations `begin` to `end` of the drawn order; none of them is the contrast."""
    for place in range(begin, end):
        operation = tl.load(row_ptr + _ORDER + place).to(tl.int32)
        factor = tl.load(row_ptr + _FACTORS + operation)
        if operation == _BRIGHTNESS:
            r, g, b = blend(0, r, factor), blend(0, g, factor), blend(0, b, factor)
        elif operation == _SATURATION:
            below = luma(r, g, b)
            r, g, b = blend(below, r, factor), blend(below, g, factor), blend(below, b, factor)
        elif factor != 0.0:
            r, g, b = _turned(r, g, b, (factor * 255.0).to(tl.int32))
    return r, g, b
