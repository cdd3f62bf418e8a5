"""All views of a batch from stored 8-bit images in Triton, one launch.

`augment_reference` defines what is computed. A program owns one view of one image and processes it
in blocks of pixels. What a later pass reads from other pixels (resized rows, levels whose mean the
contrast needs, neighbours in a blur) is kept in scratch memory that only this program touches, with
a thread barrier in between. Shape letters as there, plus I for the pixels of a block. Scratch is
planar, (3, rows, S).
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .augment_pixels import blend, blurred, jittered, level, luma, resized
from .augment_reference import COLUMNS, CUBIC_REACH

_COLUMNS = tl.constexpr(len(COLUMNS))
_TOP = tl.constexpr(COLUMNS.index("top"))
_LEFT = tl.constexpr(COLUMNS.index("left"))
_HEIGHT = tl.constexpr(COLUMNS.index("height"))
_WIDTH = tl.constexpr(COLUMNS.index("width"))
_FACTORS = tl.constexpr(COLUMNS.index("brightness"))
_ORDER = tl.constexpr(COLUMNS.index("first"))
_GRAY = tl.constexpr(COLUMNS.index("gray"))
_SIGMA = tl.constexpr(COLUMNS.index("blur_sigma"))
_SOLARIZE = tl.constexpr(COLUMNS.index("solarize_from"))
_FLIP = tl.constexpr(COLUMNS.index("flip"))
_CONTRAST = tl.constexpr(1)


@triton.jit
def _load_levels(ptr_I, plane, mask_I):
    r_I = tl.load(ptr_I, mask=mask_I, other=0).to(tl.int32)
    g_I = tl.load(ptr_I + plane, mask=mask_I, other=0).to(tl.int32)
    b_I = tl.load(ptr_I + 2 * plane, mask=mask_I, other=0).to(tl.int32)
    return r_I, g_I, b_I


@triton.jit
def _store_rgb(ptr_I, plane, r_I, g_I, b_I, mask_I):
    tl.store(ptr_I, r_I.to(ptr_I.dtype.element_ty), mask=mask_I)
    tl.store(ptr_I + plane, g_I.to(ptr_I.dtype.element_ty), mask=mask_I)
    tl.store(ptr_I + 2 * plane, b_I.to(ptr_I.dtype.element_ty), mask=mask_I)


@triton.jit
def _store_view(out_ptr, row_ptr, pixel_I, rgb_I, mask_I, mean, inv, S: tl.constexpr):
    """Solarize, flip, normalise and write NHWC."""
    r_I, g_I, b_I = rgb_I
    solarize_from = tl.load(row_ptr + _SOLARIZE).to(tl.int32)
    r_I = tl.where(r_I >= solarize_from, 255 - r_I, r_I).to(tl.float32)
    g_I = tl.where(g_I >= solarize_from, 255 - g_I, g_I).to(tl.float32)
    b_I = tl.where(b_I >= solarize_from, 255 - b_I, b_I).to(tl.float32)
    x_I = pixel_I % S
    mirrored_I = pixel_I - x_I + (S - 1 - x_I)
    place_I = tl.where(tl.load(row_ptr + _FLIP) > 0.0, mirrored_I, pixel_I)
    r_I, g_I = (r_I - mean[0]) * inv[0], (g_I - mean[1]) * inv[1]
    b_I = (b_I - mean[2]) * inv[2]
    _store_rgb(out_ptr + place_I * 3, 1, r_I, g_I, b_I, mask_I)


@triton.jit
def _augment_kernel(
    images_ptr,
    index_ptr,
    parameters_ptr,
    levels_ptr,
    blurred_ptr,
    out_ptr,
    mean_r,
    mean_g,
    mean_b,
    inv_r,
    inv_g,
    inv_b,
    H: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    BLUR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B, V). Means and inverse standard deviations are in levels."""
    # 64 bits only here: the stored images may exceed 2^31 bytes, one program's data do not
    program = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    image_ptr = images_ptr + tl.load(index_ptr + tl.program_id(0)).to(tl.int64) * (H * W * 3)
    row_ptr = parameters_ptr + program * _COLUMNS
    lines_ptr = levels_ptr + program * (3 * S * (H + S))
    levels_ptr = lines_ptr + 3 * S * H
    out_ptr += program * (3 * S * S)
    top, left = tl.load(row_ptr + _TOP).to(tl.int32), tl.load(row_ptr + _LEFT).to(tl.int32)
    height, width = tl.load(row_ptr + _HEIGHT), tl.load(row_ptr + _WIDTH)
    lane_I = tl.arange(0, BLOCK)
    means, inverses = (mean_r, mean_g, mean_b), (inv_r, inv_g, inv_b)

    lines_pixels = height.to(tl.int32) * S
    for start in range(0, lines_pixels, BLOCK):
        pixel_I = start + lane_I
        mask_I = pixel_I < lines_pixels
        ptr_I = image_ptr + ((top + pixel_I // S) * W + left) * 3
        r_I, g_I, b_I = resized(ptr_I, pixel_I % S, width, 3, 1, mask_I, S, TAPS_X)
        _store_rgb(lines_ptr + pixel_I, S * H, r_I, g_I, b_I, mask_I)
    tl.debug_barrier()

    # contrast needs the mean of the image at its place in the order
    turn = 0
    for place in tl.static_range(1, 4):
        turn = tl.where(tl.load(row_ptr + _ORDER + place) == _CONTRAST, place, turn)
    total = 0
    for start in range(0, S * S, BLOCK):
        pixel_I = start + lane_I
        mask_I = pixel_I < S * S
        ptr_I = lines_ptr + pixel_I % S
        r_I, g_I, b_I = resized(ptr_I, pixel_I // S, height, S, S * H, mask_I, S, TAPS_Y)
        r_I, g_I, b_I = r_I.to(tl.int32), g_I.to(tl.int32), b_I.to(tl.int32)
        r_I, g_I, b_I = jittered(r_I, g_I, b_I, row_ptr, 0, turn)
        total += tl.sum(tl.where(mask_I, luma(r_I, g_I, b_I), 0), axis=0)
        _store_rgb(levels_ptr + pixel_I, S * S, r_I, g_I, b_I, mask_I)
    mean = (total + S * S // 2) // (S * S)
    contrast = tl.load(row_ptr + _FACTORS + _CONTRAST)
    tl.debug_barrier()

    for start in range(0, S * S, BLOCK):
        pixel_I = start + lane_I
        mask_I = pixel_I < S * S
        r_I, g_I, b_I = _load_levels(levels_ptr + pixel_I, S * S, mask_I)
        r_I = blend(mean, r_I, contrast)
        g_I = blend(mean, g_I, contrast)
        b_I = blend(mean, b_I, contrast)
        r_I, g_I, b_I = jittered(r_I, g_I, b_I, row_ptr, turn + 1, 4)
        if tl.load(row_ptr + _GRAY) > 0.0:
            r_I = luma(r_I, g_I, b_I)
            g_I, b_I = r_I, r_I
        if BLUR:
            _store_rgb(levels_ptr + pixel_I, S * S, r_I, g_I, b_I, mask_I)
        else:
            _store_view(out_ptr, row_ptr, pixel_I, (r_I, g_I, b_I), mask_I, means, inverses, S)

    if BLUR:
        sigma = tl.load(row_ptr + _SIGMA)
        blurred_ptr += program * (3 * S * S)
        tl.debug_barrier()
        for start in range(0, S * S, BLOCK):
            pixel_I = start + lane_I
            mask_I = pixel_I < S * S
            x_I = pixel_I % S
            ptr_I = levels_ptr + pixel_I - x_I
            r_I, g_I, b_I = blurred(ptr_I, x_I, sigma, 1, mask_I, S)
            _store_rgb(blurred_ptr + pixel_I, S * S, r_I, g_I, b_I, mask_I)
        tl.debug_barrier()
        for start in range(0, S * S, BLOCK):
            pixel_I = start + lane_I
            mask_I = pixel_I < S * S
            ptr_I = blurred_ptr + pixel_I % S
            r_I, g_I, b_I = blurred(ptr_I, pixel_I // S, sigma, S, mask_I, S)
            rgb_I = level(r_I), level(g_I), level(b_I)
            _store_view(out_ptr, row_ptr, pixel_I, rgb_I, mask_I, means, inverses, S)


def taps(stored: int, side: int) -> int:
    """Return the most pixels that a resize from at most `stored` pixels to `side` reads."""
    return math.ceil(2 * CUBIC_REACH * max(1.0, stored / side))


def tile_options(side: int) -> dict[str, int]:
    """Return block size and warps: 4 pixels per thread, as with 8 large builds spill (aot.py)."""
    return {
        "BLOCK": min(512, triton.next_power_of_2(side * side)),
        "num_warps": 4,
        "num_stages": 1,
    }


def augment_launch(
    images_NHW3: Tensor,
    index_B: Tensor,
    parameters_VBP: Tensor,
    side: int,
    mean: Sequence[float],
    std: Sequence[float],
    blur: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Create every view of a batch in one launch; arguments as in `isofast_kernels.augment_views`.

    Returns:
        views_VBSS3, (V, B, side, side, 3), `dtype`.
    """
    _, stored_height, stored_width, _ = images_NHW3.shape
    views, batch, _ = parameters_VBP.shape
    programs = views * batch
    device = images_NHW3.device
    scratch = 3 * side * (stored_height + side)
    levels = torch.empty((programs, scratch), dtype=torch.uint8, device=device)
    blurred = torch.empty(
        (programs, 3 * side * side) if blur else (1,), dtype=torch.float32, device=device
    )
    views_VBSS3 = torch.empty((views, batch, side, side, 3), dtype=dtype, device=device)
    _augment_kernel[(batch, views)](
        images_NHW3,
        index_B.contiguous(),
        parameters_VBP.contiguous(),
        levels,
        blurred,
        views_VBSS3,
        *(255.0 * value for value in mean),
        *(1.0 / (255.0 * value) for value in std),
        H=stored_height,
        W=stored_width,
        S=side,
        TAPS_Y=taps(stored_height, side),
        TAPS_X=taps(stored_width, side),
        BLUR=blur,
        # round products and sums separately, as the reference does, on every device
        enable_fp_fusion=False,
        **tile_options(side),
    )
    return views_VBSS3
