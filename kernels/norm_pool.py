"""A ResNet stem's BatchNorm map, ReLU and 3 x 3 max pool in one pass, in Triton.

`reference.norm_pool_reference` and `reference.norm_pool_gradient_reference` define the computation.
Images are channels_last. Shape letters: N images, grouped by view, C channels, H x W pixels of an
image, P x Q pixels of the pooled map, K a tile's places in P x Q.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SUMMED_TILES = 8
"""Tiles that each program sums, one after another."""
FORWARD_TILE = 2048
"""Elements per tile in the forward, where larger is faster; in the backward it is slower."""


@triton.jit
def _norm_pool_kernel(
    x_ptr,
    mean_ptr,
    slope_ptr,
    bias_ptr,
    y_ptr,
    taps_ptr,
    images,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y and taps of a tile. Grid: tiles of places, image by image; tiles of channels.

    The map is monotonic in x, so a window's largest output is that of its largest or smallest x:
    one map per window instead of nine. A NaN in x makes its view's mean NaN too.
    """
    P: tl.constexpr = (H + 1) // 2
    Q: tl.constexpr = (W + 1) // 2
    TILES: tl.constexpr = (P * Q + BLOCK_K - 1) // BLOCK_K
    image = tl.program_id(0) // TILES
    k_K = tl.program_id(0) % TILES * BLOCK_K + tl.arange(0, BLOCK_K)
    c_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    of_C = image // images * C + c_C
    mean_C = tl.load(mean_ptr + of_C, mask=c_C < C, other=0.0)
    slope_C = tl.load(slope_ptr + of_C, mask=c_C < C, other=0.0)
    bias_C = tl.load(bias_ptr + c_C, mask=c_C < C, other=0.0)
    # 0 for a flat map, whose taps are all equal, so that the first counts
    sign_C = (slope_C > 0).to(tl.float32) - (slope_C < 0).to(tl.float32)
    # the image's offset may exceed 2^31
    x_ptr += image.to(tl.int64) * (H * W * C)
    place_KC = k_K[:, None] * C + c_C[None, :]
    kept_KC = (k_K[:, None] < P * Q) & (c_C[None, :] < C)
    best_KC = tl.full([BLOCK_K, BLOCK_C], float("-inf"), tl.float32)
    tap_KC = tl.full([BLOCK_K, BLOCK_C], 4, tl.int32)
    for tap in tl.static_range(9):
        h_K = k_K // Q * 2 + (tap // 3 - 1)
        w_K = k_K % Q * 2 + (tap % 3 - 1)
        inside_K = (h_K >= 0) & (h_K < H) & (w_K >= 0) & (w_K < W)
        read_KC = kept_KC & inside_K[:, None]
        x_KC = tl.load(x_ptr + (h_K * W + w_K)[:, None] * C + c_C[None, :], mask=read_KC, other=0.0)
        along_KC = tl.where(inside_K[:, None], x_KC.to(tl.float32) * sign_C[None, :], float("-inf"))
        tap_KC = tl.where(along_KC > best_KC, tap, tap_KC)
        best_KC = tl.maximum(best_KC, along_KC)
    y_KC = (best_KC * sign_C[None, :] - mean_C[None, :]) * slope_C[None, :] + bias_C[None, :]
    tap_KC = tl.where(y_KC > 0, tap_KC, 9)
    # NaN stays NaN
    y_KC = tl.where(y_KC <= 0, 0.0, y_KC)
    base = image.to(tl.int64) * (P * Q * C)
    tl.store(y_ptr + base + place_KC, y_KC.to(y_ptr.dtype.element_ty), mask=kept_KC)
    tl.store(taps_ptr + base + place_KC, tap_KC.to(tl.uint8), mask=kept_KC)


@triton.jit
def _from_window(dy_ptr, taps_ptr, place_KC, kept_KC):
    """Return a window's gradient and the tap that receives it."""
    dy_KC = tl.load(dy_ptr + place_KC, mask=kept_KC, other=0.0).to(tl.float32)
    return dy_KC, tl.load(taps_ptr + place_KC, mask=kept_KC, other=9)


@triton.jit
def _norm_pool_gradient_kernel(
    dy_ptr,
    taps_ptr,
    x_ptr,
    mean_ptr,
    slope_ptr,
    shift_ptr,
    along_ptr,
    out_ptr,
    images,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SUMS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Send window gradients back to the 2 x 2 pixels at, right of and below each centre.

    With g a pixel's total gradient: the program's sums of g and of g (x - mean), or
    dx = slope g - shift - along (x - mean). Grid: as above, but STEPS tiles of places per program.
    """
    P: tl.constexpr = (H + 1) // 2
    Q: tl.constexpr = (W + 1) // 2
    PROGRAMS: tl.constexpr = (P * Q + BLOCK_K * STEPS - 1) // (BLOCK_K * STEPS)
    image = tl.program_id(0) // PROGRAMS
    first = tl.program_id(0) % PROGRAMS * (BLOCK_K * STEPS)
    c_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    of_C = image // images * C + c_C
    mean_C = tl.load(mean_ptr + of_C, mask=c_C < C, other=0.0)
    if SUMS:
        sum_KC = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
        along_sum_KC = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    else:
        slope_C = tl.load(slope_ptr + of_C, mask=c_C < C, other=0.0)
        shift_C = tl.load(shift_ptr + of_C, mask=c_C < C, other=0.0)
        along_C = tl.load(along_ptr + of_C, mask=c_C < C, other=0.0)
    dy_ptr += image.to(tl.int64) * (P * Q * C)
    taps_ptr += image.to(tl.int64) * (P * Q * C)
    # the image's offset may exceed 2^31
    base = image.to(tl.int64) * (H * W * C)

    for step in range(STEPS):
        k_K = first + step * BLOCK_K + tl.arange(0, BLOCK_K)
        p_K, q_K = k_K // Q, k_K % Q
        place_KC = k_K[:, None] * C + c_C[None, :]
        here_KC = (k_K[:, None] < P * Q) & (c_C[None, :] < C)
        right_KC = here_KC & (q_K < Q - 1)[:, None]
        below_KC = here_KC & (p_K < P - 1)[:, None]
        dy0_KC, tap0_KC = _from_window(dy_ptr, taps_ptr, place_KC, here_KC)
        dy1_KC, tap1_KC = _from_window(dy_ptr, taps_ptr, place_KC + C, right_KC)
        dy2_KC, tap2_KC = _from_window(dy_ptr, taps_ptr, place_KC + Q * C, below_KC)
        place_KC += (Q + 1) * C
        dy3_KC, tap3_KC = _from_window(dy_ptr, taps_ptr, place_KC, right_KC & below_KC)
        for pixel in tl.static_range(4):
            g_KC = tl.where(tap0_KC == 4 + 3 * (pixel // 2) + pixel % 2, dy0_KC, 0.0)
            if pixel % 2 == 1:
                g_KC += tl.where(tap1_KC == 3 + 3 * (pixel // 2), dy1_KC, 0.0)
            if pixel // 2 == 1:
                g_KC += tl.where(tap2_KC == 1 + pixel % 2, dy2_KC, 0.0)
            if pixel == 3:
                g_KC += tl.where(tap3_KC == 0, dy3_KC, 0.0)
            h_K, w_K = p_K * 2 + pixel // 2, q_K * 2 + pixel % 2
            kept_KC = here_KC & ((h_K < H) & (w_K < W))[:, None]
            at_KC = (h_K * W + w_K)[:, None] * C + c_C[None, :]
            x_KC = tl.load(x_ptr + base + at_KC, mask=kept_KC, other=0.0).to(tl.float32)
            centred_KC = x_KC - mean_C[None, :]
            if SUMS:
                sum_KC += g_KC
                along_sum_KC += g_KC * centred_KC
            else:
                dx_KC = g_KC * slope_C[None, :] - shift_C[None, :] - centred_KC * along_C[None, :]
                dx_KC = dx_KC.to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + base + at_KC, dx_KC, mask=kept_KC)
    if SUMS:
        out_ptr += tl.program_id(0) * C + c_C
        tl.store(out_ptr, tl.sum(sum_KC, 0), mask=c_C < C)
        tl.store(out_ptr + tl.num_programs(0) * C, tl.sum(along_sum_KC, 0), mask=c_C < C)


def tile_options(channels: int, size: int = 1024) -> dict[str, int]:
    """Return sides and warps of a tile of `size` elements; 64 channels in 16 bits are 128 bytes."""
    block = min(64, triton.next_power_of_2(channels))
    return {"BLOCK_K": size // block, "BLOCK_C": block, "num_warps": 4}


def _shape(x_NCHW: Tensor) -> dict[str, int]:
    return dict(zip("CHW", x_NCHW.shape[1:], strict=True))


def _grid(x_NCHW: Tensor, channels: int, places: int) -> tuple[int, int]:
    """Return the grid for programs of `channels` channels and `places` places."""
    n, c, height, width = x_NCHW.shape
    pooled = ((height + 1) // 2) * ((width + 1) // 2)
    return n * triton.cdiv(pooled, places), triton.cdiv(c, channels)


def norm_pool_launch(
    x_NCHW: Tensor, mean_VC: Tensor, slope_VC: Tensor, bias_C: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y_NCPQ in x's dtype and taps_NCPQ (uint8), channels_last; other arguments are fp32."""
    n, channels, height, width = x_NCHW.shape
    shape = (n, channels, (height + 1) // 2, (width + 1) // 2)
    where = {"device": x_NCHW.device, "memory_format": torch.channels_last}
    y_NCPQ = torch.empty(shape, dtype=x_NCHW.dtype, **where)
    taps_NCPQ = torch.empty(shape, dtype=torch.uint8, **where)
    options = tile_options(channels, FORWARD_TILE)
    _norm_pool_kernel[_grid(x_NCHW, options["BLOCK_C"], options["BLOCK_K"])](
        x_NCHW,
        mean_VC.contiguous(),
        slope_VC.contiguous(),
        bias_C.contiguous(),
        y_NCPQ,
        taps_NCPQ,
        n // len(mean_VC),
        **_shape(x_NCHW),
        **options,
    )
    return y_NCPQ, taps_NCPQ


def norm_pool_sums_launch(
    dy_NCPQ: Tensor, taps_NCPQ: Tensor, x_NCHW: Tensor, mean_VC: Tensor
) -> Tensor:
    """Return each view's sums of g and g (x - mean), (2, V, C), fp32, bitwise reproducible."""
    options = tile_options(x_NCHW.shape[1])
    grid = _grid(x_NCHW, options["BLOCK_C"], options["BLOCK_K"] * SUMMED_TILES)
    mean_VC = mean_VC.contiguous()
    views, channels = mean_VC.shape
    shape = (2, views, grid[0] // views, channels)
    parts = torch.empty(shape, dtype=torch.float32, device=x_NCHW.device)
    _norm_pool_gradient_kernel[grid](
        dy_NCPQ,
        taps_NCPQ,
        x_NCHW,
        mean_VC,
        mean_VC,
        mean_VC,
        mean_VC,
        parts,
        len(x_NCHW) // views,
        **_shape(x_NCHW),
        SUMS=True,
        STEPS=SUMMED_TILES,
        **options,
    )
    return parts.sum(2)


def norm_pool_gradient_launch(
    dy_NCPQ: Tensor,
    taps_NCPQ: Tensor,
    x_NCHW: Tensor,
    mean_VC: Tensor,
    slope_VC: Tensor,
    shift_VC: Tensor,
    along_VC: Tensor,
) -> Tensor:
    """Return dx_NCHW = slope g - shift - along (x - mean), channels_last, in x's dtype."""
    dx_NCHW = torch.empty_like(x_NCHW, memory_format=torch.channels_last)
    options = tile_options(x_NCHW.shape[1])
    _norm_pool_gradient_kernel[_grid(x_NCHW, options["BLOCK_C"], options["BLOCK_K"])](
        dy_NCPQ,
        taps_NCPQ,
        x_NCHW,
        mean_VC.contiguous(),
        slope_VC.contiguous(),
        shift_VC.contiguous(),
        along_VC.contiguous(),
        dx_NCHW,
        len(x_NCHW) // len(mean_VC),
        **_shape(x_NCHW),
        SUMS=False,
        STEPS=1,
        **options,
    )
    return dx_NCHW
