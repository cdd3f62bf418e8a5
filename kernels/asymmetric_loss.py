"""The asymmetric losses in Triton: value and gradient of every row in one pass.

`reference.losses_and_gradients_reference` says what is computed. Shape letters: B rows of a
batch, D features, V directions (z1 -> t2 and z2 -> t1 in one launch), K a step of the inner
dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from .reference import NORM_FLOOR

RAGGED_FEATURES = 512
"""Above, rows are padded to a multiple of 16 features."""
_NORM_FLOOR = tl.constexpr(NORM_FLOOR)


@triton.jit
def _rows_times_w(
    x_ptr,
    w_ptr,
    rows,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The first `rows` rows at x_ptr times w, accumulated in fp32 along D in a fixed order."""
    row_B = tl.arange(0, BLOCK_B)
    col_D = tl.arange(0, BLOCK_D)
    acc_BD = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        k_K = start + tl.arange(0, BLOCK_K)
        x_BK = tl.load(
            x_ptr + row_B[:, None] * D + k_K[None, :],
            mask=(row_B[:, None] < rows) & (k_K[None, :] < D),
            other=0.0,
        )
        w_KD = tl.load(
            w_ptr + k_K[:, None] * D + col_D[None, :],
            mask=(k_K[:, None] < D) & (col_D[None, :] < D),
            other=0.0,
        )
        if x_BK.dtype == tl.bfloat16 and BLOCK_K >= 32:
            # fp32 is three numbers in bf16, whose products with x are exact; summed from zero and
            # from the smallest, as tensor cores truncate what they add to an accumulator
            high_KD = w_KD.to(tl.bfloat16)
            w_KD -= high_KD.to(tl.float32)
            mid_KD = w_KD.to(tl.bfloat16)
            low_KD = (w_KD - mid_KD.to(tl.float32)).to(tl.bfloat16)
            sum_BD = tl.dot(x_BK, mid_KD, tl.dot(x_BK, low_KD))
            acc_BD += tl.dot(x_BK, high_KD, sum_BD)
        else:
            acc_BD = tl.dot(x_BK.to(tl.float32), w_KD, acc_BD, input_precision="tf32x3")
    return acc_BD


@triton.jit
def _loss_and_gradient_rows(
    z_ptr,
    target_ptr,
    w_ptr,
    loss_ptr,
    dz_ptr,
    scale,
    rows,
    D: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    ISOTROPIC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The block of rows that the pointers point at; loss and dz are multiplied by `scale`."""
    row_B = tl.arange(0, BLOCK_B)
    col_D = tl.arange(0, BLOCK_D)
    offset_BD = row_B[:, None] * D + col_D[None, :]
    mask_BD = (row_B[:, None] < rows) & (col_D[None, :] < D)

    p_BD = _rows_times_w(z_ptr, w_ptr, rows, D, BLOCK_B, BLOCK_D, BLOCK_K)
    if ISOTROPIC and not EUCLIDEAN:
        z_BD = tl.load(z_ptr + offset_BD, mask=mask_BD, other=0.0).to(tl.float32)
        zp_B = tl.sum(z_BD * p_BD, axis=1)
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
    tl.store(dz_ptr + offset_BD, g_BD * scale, mask=mask_BD)
    if ISOTROPIC and not EUCLIDEAN:
        # P Eq. 17 is z.g minus half of the term in z.p. z is read anew, after a store that keeps
        # the compiler from holding it: a third tile would spill at D = 1024.
        z_BD = tl.load(z_ptr + offset_BD, mask=mask_BD, other=0.0).to(tl.float32)
        half_B = 0.5 * cosine_B * (zp_B * inv_a_B) * inv_a_B
        loss_B = tl.sum(z_BD * g_BD, axis=1) - half_B
    tl.store(loss_ptr + row_B, loss_B * scale, mask=row_B < rows)
    if not ISOTROPIC:
        # A product along D needs g in slices, and registers cannot be sliced: g waits in the
        # rows of dz, which no other program touches. Both barriers order this block's threads.
        tl.debug_barrier()
        dz_BD = _rows_times_w(dz_ptr, w_ptr, rows, D, BLOCK_B, BLOCK_D, BLOCK_K)
        tl.debug_barrier()
        tl.store(dz_ptr + offset_BD, dz_BD, mask=mask_BD)


# one build for all B, so that batches of other sizes compile nothing anew
@triton.jit(do_not_specialize=["B"])
def _asymmetric_loss_kernel(
    z1_ptr,
    z2_ptr,
    target1_ptr,
    target2_ptr,
    w_ptr,
    loss_ptr,
    dz_ptr,
    scale,
    B,
    D: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    ISOTROPIC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (row blocks, V). Each direction has its own pointers, whose alignment is kept."""
    first = tl.program_id(0) * BLOCK_B
    rows = B - first
    # 64 bits here, once: B * D may pass 2^31, offsets within a block do not
    start = first.to(tl.int64) * D
    if tl.program_id(1) == 0:
        _loss_and_gradient_rows(
            z1_ptr + start,
            target1_ptr + start,
            w_ptr,
            loss_ptr + first,
            dz_ptr + start,
            scale,
            rows,
            D,
            EUCLIDEAN,
            ISOTROPIC,
            BLOCK_B,
            BLOCK_D,
            BLOCK_K,
        )
    else:
        _loss_and_gradient_rows(
            z2_ptr + start,
            target2_ptr + start,
            w_ptr,
            loss_ptr + B + first,
            dz_ptr + tl.program_id(1).to(tl.int64) * B * D + start,
            scale,
            rows,
            D,
            EUCLIDEAN,
            ISOTROPIC,
            BLOCK_B,
            BLOCK_D,
            BLOCK_K,
        )


# Triton before 3.8 multiplies 16 at a time or more, which spills registers at D = 1024
SHORTEST_PRODUCT = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 16


def tile_options(features: int) -> dict[str, int]:
    """Tile sizes and warps for D = `features`: the largest that spill nothing (see aot.py)."""
    block_d = max(32, triton.next_power_of_2(features))
    return {
        "BLOCK_B": 16,
        "BLOCK_D": block_d,
        "BLOCK_K": 32 if block_d <= 256 else 16 if block_d <= 512 else SHORTEST_PRODUCT,
        "num_warps": 4 if block_d <= 64 else 8,
        "num_stages": 2 if block_d <= 512 else 1,
    }


def asymmetric_loss_launch(
    zs: list[Tensor], targets: list[Tensor], w_DD: Tensor, metric: str, isotropic: bool
) -> tuple[Tensor, Tensor]:
    """Value and gradient of the V = 1 or 2 directions zs[v] -> targets[v], in one launch.

    Args:
        zs, targets: V tensors (B, D) each, float32, float16 or bfloat16; all zs of one dtype,
            all targets of one dtype.
        w_DD: the predictor, (D, D), symmetric, float32.
        metric: "cosine" or "euclidean".
        isotropic: the IsoLoss of that metric.

    Returns:
        loss, (), the sum over directions of the mean over B, and dz_VBD, (V, B, D), its gradient
        in each z; both float32.
    """
    rows, features = zs[0].shape
    if features > RAGGED_FEATURES and features % 16:
        # unaligned rows of this width would spill; zeros change no norm and no product
        width = -features % 16
        zs = [functional.pad(z_BD, (0, width)) for z_BD in zs]
        targets = [functional.pad(target_BD, (0, width)) for target_BD in targets]
        w_DD = functional.pad(w_DD, (0, width, 0, width))
        loss, dz_VBD = asymmetric_loss_launch(zs, targets, w_DD, metric, isotropic)
        return loss, dz_VBD[..., :features].contiguous()
    directions = len(zs)
    zs = [z_BD.contiguous() for z_BD in zs]
    targets = [target_BD.contiguous() for target_BD in targets]
    loss_VB = torch.empty((directions, rows), dtype=torch.float32, device=w_DD.device)
    dz_VBD = torch.empty((directions, rows, features), dtype=torch.float32, device=w_DD.device)
    options = tile_options(features)
    _asymmetric_loss_kernel[(triton.cdiv(rows, options["BLOCK_B"]), directions)](
        zs[0],
        zs[-1],
        targets[0],
        targets[-1],
        w_DD.contiguous(),
        loss_VB,
        dz_VBD,
        1.0 / rows,
        rows,
        D=features,
        EUCLIDEAN=metric == "euclidean",
        ISOTROPIC=isotropic,
        **options,
    )
    # rows come scaled by 1 / B; torch's sum has a fixed order
    return loss_VB.sum(), dz_VBD
