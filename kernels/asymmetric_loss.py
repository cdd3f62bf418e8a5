"""The asymmetric losses in Triton: a matmul, then the value and gradient of every row.

`reference.losses_and_gradients_reference` defines what is computed. Shape letters: B rows of a
batch, D features, V directions (z1 -> t2 and z2 -> t1 in the same launches), K a step of the inner
dimension, N partial sums of losses.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import NORM_FLOOR

_NORM_FLOOR = tl.constexpr(NORM_FLOOR)


@triton.jit
def _tile_times_w(x_ptr, w_ptr, out_ptr, B, D, BLOCK_B, BLOCK_D, BLOCK_K):
    """Compute a tile of X W, accumulated in fp32 along D in a fixed order."""
    # 64 bits only here: B * D may exceed 2^31, offsets within a block do not
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    row_B = tl.arange(0, BLOCK_B)
    col_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_B = row_B < B - first
    acc_BD = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        k_K = start + tl.arange(0, BLOCK_K)
        x_BK = tl.load(
            x_ptr + first * D + row_B[:, None] * D + k_K[None, :],
            mask=mask_B[:, None] & (k_K[None, :] < D),
            other=0.0,
        )
        w_KD = tl.load(
            w_ptr + k_K[:, None] * D + col_D[None, :],
            mask=(k_K[:, None] < D) & (col_D[None, :] < D),
            other=0.0,
        )
        if x_BK.dtype == tl.bfloat16:
            # split fp32 into three bf16 numbers, whose products with x are exact; sum from zero,
            # smallest first, because tensor cores truncate what they add to an accumulator
            high_KD = w_KD.to(tl.bfloat16)
            w_KD -= high_KD.to(tl.float32)
            mid_KD = w_KD.to(tl.bfloat16)
            low_KD = (w_KD - mid_KD.to(tl.float32)).to(tl.bfloat16)
            sum_BD = tl.dot(x_BK, mid_KD, tl.dot(x_BK, low_KD))
            acc_BD += tl.dot(x_BK, high_KD, sum_BD)
        else:
            # for few features 3xTF32 would be less accurate than fp32
            precision: tl.constexpr = "ieee" if D <= BLOCK_K else "tf32x3"
            acc_BD = tl.dot(x_BK.to(tl.float32), w_KD, acc_BD, input_precision=precision)
    tl.store(
        out_ptr + first * D + row_B[:, None] * D + col_D[None, :],
        acc_BD,
        mask=mask_B[:, None] & (col_D[None, :] < D),
    )


# one build for all B, so that other batch sizes do not recompile
@triton.jit(do_not_specialize=["B"])
def _rows_times_w_kernel(
    x1_ptr,
    x2_ptr,
    w_ptr,
    out_ptr,
    count_ptr,
    B,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[v] = X_v W, grid (B tiles, D tiles, V). Each X has its own pointer, to keep alignment.

    Also zeroes the counter of `_loss_kernel`.
    """
    if tl.program_id(2) == 0:
        tl.store(count_ptr, 0, mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))
        _tile_times_w(x1_ptr, w_ptr, out_ptr, B, D, BLOCK_B, BLOCK_D, BLOCK_K)
    else:
        second_ptr = out_ptr + B.to(tl.int64) * D
        _tile_times_w(x2_ptr, w_ptr, second_ptr, B, D, BLOCK_B, BLOCK_D, BLOCK_K)


@triton.jit
def _loss_and_gradient_rows(pointers, scale, B, D, EUCLIDEAN, ISOTROPIC, BLOCK_B, BLOCK_D):
    """Store a block's summed loss and its gradient in p, or in z if isotropic, times `scale`."""
    z_ptr, target_ptr, p_ptr, loss_ptr, g_ptr = pointers
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    row_B = tl.arange(0, BLOCK_B)
    col_D = tl.arange(0, BLOCK_D)
    offset_BD = first * D + row_B[:, None] * D + col_D[None, :]
    mask_B = row_B < B - first
    mask_BD = mask_B[:, None] & (col_D[None, :] < D)
    p_BD = tl.load(p_ptr + offset_BD, mask=mask_BD, other=0.0)
    t_BD = tl.load(target_ptr + offset_BD, mask=mask_BD, other=0.0).to(tl.float32)
    if EUCLIDEAN:
        g_BD = p_BD - t_BD
        loss_B = tl.sum(g_BD * g_BD, axis=1) * 0.5
    else:
        inv_a_B = 1.0 / tl.maximum(tl.sqrt_rn(tl.sum(p_BD * p_BD, axis=1)), _NORM_FLOOR)
        inv_b_B = 1.0 / tl.maximum(tl.sqrt_rn(tl.sum(t_BD * t_BD, axis=1)), _NORM_FLOOR)
        p_BD = p_BD * inv_a_B[:, None]
        t_BD = t_BD * inv_b_B[:, None]
        cosine_B = tl.sum(p_BD * t_BD, axis=1)
        g_BD = (cosine_B[:, None] * p_BD - t_BD) * inv_a_B[:, None]
        loss_B = -cosine_B
        if ISOTROPIC:
            # P Eq. 17 is z.g minus half of its z.p term
            z_BD = tl.load(z_ptr + offset_BD, mask=mask_BD, other=0.0).to(tl.float32)
            half_B = 0.5 * cosine_B * tl.sum(z_BD * p_BD, axis=1) * inv_a_B
            loss_B = tl.sum(z_BD * g_BD, axis=1) - half_B
    tl.store(g_ptr + offset_BD, g_BD * scale, mask=mask_BD)
    # rows beyond B have a loss of 0
    tl.store(loss_ptr + tl.program_id(0), tl.sum(loss_B, axis=0) * scale)


@triton.jit(do_not_specialize=["B"])
def _loss_kernel(
    z1_ptr,
    z2_ptr,
    target1_ptr,
    target2_ptr,
    p_ptr,
    loss_ptr,
    sum_ptr,
    count_ptr,
    g_ptr,
    scale,
    B,
    D: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    ISOTROPIC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (row blocks, V). The last program to finish adds all sums in a fixed order."""
    if tl.program_id(1) == 0:
        rows = z1_ptr, target1_ptr, p_ptr, loss_ptr, g_ptr
        _loss_and_gradient_rows(rows, scale, B, D, EUCLIDEAN, ISOTROPIC, BLOCK_B, BLOCK_D)
    else:
        start = B.to(tl.int64) * D
        others = z2_ptr, target2_ptr, p_ptr + start, loss_ptr + tl.num_programs(0), g_ptr + start
        _loss_and_gradient_rows(others, scale, B, D, EUCLIDEAN, ISOTROPIC, BLOCK_B, BLOCK_D)
    # store the loss before counting this program as done
    tl.debug_barrier()
    ended = tl.atomic_add(count_ptr, 1)
    total = tl.num_programs(0) * tl.num_programs(1)
    if ended == total - 1:
        sum_N = tl.zeros([BLOCK_N], dtype=tl.float32)
        for start in range(0, total, BLOCK_N):
            n_N = start + tl.arange(0, BLOCK_N)
            # .cg reads where other multiprocessors' stores are visible
            sum_N += tl.load(loss_ptr + n_N, mask=n_N < total, other=0.0, cache_modifier=".cg")
        tl.store(sum_ptr, tl.sum(sum_N, axis=0))


def product_tiles(features: int) -> dict[str, int]:
    """Return tiles and warps of the matmul; tiles are small, to fill the device at D = 256."""
    return {
        "BLOCK_B": 16,
        "BLOCK_D": 32 if features <= 256 else 64,
        "BLOCK_K": 32,
        "num_warps": 4,
        "num_stages": 4,
    }


def row_tiles(features: int) -> dict[str, int]:
    """Return tiles and warps of the losses for D = `features`."""
    block_d = max(32, triton.next_power_of_2(features))
    return {
        "BLOCK_B": max(1, 1024 // block_d),
        "BLOCK_D": block_d,
        "BLOCK_N": 128,
        "num_warps": 4,
        "num_stages": 1,
    }


def asymmetric_loss_launch(
    zs: list[Tensor], targets: list[Tensor], w_DD: Tensor, metric: str, isotropic: bool
) -> tuple[Tensor, Tensor]:
    """Compute value and gradient of the V = 1 or 2 directions zs[v] -> targets[v].

    Args:
        zs, targets: V tensors (B, D) each, float32, float16 or bfloat16; all zs have one dtype,
            all targets have one dtype.
        w_DD: the predictor, (D, D), symmetric, float32.
        metric: "cosine" or "euclidean".
        isotropic: the IsoLoss of that metric.

    Returns:
        loss, (), the sum over directions of the mean over B, and dz_VBD, (V, B, D), its gradient
        in each z; both float32.
    """
    rows, features = zs[0].shape
    directions = len(zs)
    zs = [z_BD.contiguous() for z_BD in zs]
    targets = [target_BD.contiguous() for target_BD in targets]
    w_DD = w_DD.contiguous()

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=w_DD.device)

    count = empty(dtype=torch.int32)
    p_VBD = empty(directions, rows, features)
    dz_VBD = empty(directions, rows, features)
    loss = empty()

    def times_w(xs: list[Tensor] | Tensor, out_VBD: Tensor) -> None:
        tiles = product_tiles(features)
        blocks = (triton.cdiv(rows, tiles["BLOCK_B"]), triton.cdiv(features, tiles["BLOCK_D"]))
        _rows_times_w_kernel[(*blocks, directions)](
            xs[0], xs[-1], w_DD, out_VBD, count, rows, D=features, **tiles
        )

    times_w(zs, p_VBD)
    tiles = row_tiles(features)
    blocks = triton.cdiv(rows, tiles["BLOCK_B"])
    _loss_kernel[(blocks, directions)](
        zs[0],
        zs[-1],
        targets[0],
        targets[-1],
        p_VBD,
        empty(directions, blocks),
        loss,
        count,
        # the gradient in p overwrites p, row by row
        dz_VBD if isotropic else p_VBD,
        1.0 / rows,
        rows,
        D=features,
        EUCLIDEAN=metric == "euclidean",
        ISOTROPIC=isotropic,
        **tiles,
    )
    if not isotropic:
        times_w(p_VBD, dz_VBD)
    return loss, dz_VBD
