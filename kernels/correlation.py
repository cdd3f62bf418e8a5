"""The second moment of embeddings and its moving average in Triton, one launch, no atomics.

`reference.correlation_ema_reference_` defines what is computed. D is a multiple of the tile; other
widths are padded with zeros. Shape letters: D features, B rows of a view, I and J rows and columns
of a tile of the (D, D) result, K a step along B.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional


@triton.jit
def _add_view(acc_IJ, z_ptr, i_I, j_J, B, D, BLOCK_K):
    """acc += z[:, i]^T z[:, j], in fp32 along the rows in a fixed order.

    Tensor cores truncate what they add to their own accumulator, so they sum only K rows, and these
    sums are added outside; `max_num_imprecise_acc` keeps the compiler from fusing the two.
    """
    k_K = tl.arange(0, BLOCK_K)
    for start in range(0, B, BLOCK_K):
        left_KI = tl.load(
            z_ptr + k_K[:, None] * D + i_I[None, :], mask=k_K[:, None] < B - start, other=0.0
        )
        right_KJ = tl.load(
            z_ptr + k_K[:, None] * D + j_J[None, :], mask=k_K[:, None] < B - start, other=0.0
        )
        # advance the pointer, not the offsets: B * D may exceed 2^31
        z_ptr += BLOCK_K * D
        # fp16 and bf16 products are exact in fp32; the precision matters only for fp32 views
        acc_IJ += tl.dot(
            tl.trans(left_KI), right_KJ, input_precision="tf32x3", max_num_imprecise_acc=BLOCK_K
        )
    return acc_IJ


# one build for all B, so that other batch sizes do not recompile
@triton.jit(do_not_specialize=["B1", "B2"])
def _correlation_kernel(
    corr_ptr,
    z1_ptr,
    z2_ptr,
    decay,
    scale,
    B1,
    B2,
    D: tl.constexpr,
    EMA: tl.constexpr,
    VIEWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """corr <- decay corr + scale (z1^T z1 + z2^T z2). Grid: the tiles of the lower triangle.

    Only one program reads and writes a tile's entries below the diagonal and writes their mirror
    image, so there are no races and both triangles hold the same bits.
    """
    # pid = row (row + 1) / 2 + column; the root may be off by one, so correct it
    pid = tl.program_id(0)
    row = ((tl.sqrt(8.0 * pid + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > pid, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= pid, row + 1, row)
    column = pid - row * (row + 1) // 2
    i_I = row * BLOCK_D + tl.arange(0, BLOCK_D)
    j_J = column * BLOCK_D + tl.arange(0, BLOCK_D)

    acc_IJ = tl.zeros([BLOCK_D, BLOCK_D], dtype=tl.float32)
    acc_IJ = _add_view(acc_IJ, z1_ptr, i_I, j_J, B1, D, BLOCK_K)
    if VIEWS == 2:
        acc_IJ = _add_view(acc_IJ, z2_ptr, i_I, j_J, B2, D, BLOCK_K)
    acc_IJ = acc_IJ * scale

    # mirror the diagonal tile too: the order in which 3xTF32 adds its terms depends on which factor
    # is on the left
    i_II, j_JJ = i_I[:, None], j_J[None, :]
    lower_IJ = j_JJ <= i_II
    if EMA:
        old_IJ = tl.load(corr_ptr + i_II * D + j_JJ, mask=lower_IJ, other=0.0)
        acc_IJ = decay * old_IJ + acc_IJ
    tl.store(corr_ptr + i_II * D + j_JJ, acc_IJ, mask=lower_IJ)
    tl.store(corr_ptr + j_JJ * D + i_II, acc_IJ, mask=j_JJ < i_II)


def tile_options(features: int, element_size: int) -> dict[str, int]:
    """Return tile sizes and warps for D = `features` and views of `element_size` bytes per element.

    Tiles are small, to fill the device at D = 256. K is as long as tensor-core truncation allows:
    3xTF32 adds three products to each of its sums (NUMERICS.md).
    """
    if features > 512:
        # with four warps ptxas would spill for sm_100, at 80 registers
        return {"BLOCK_D": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_D": 32, "BLOCK_K": 128 // element_size, "num_warps": 4, "num_stages": 2}


def padded(features: int) -> int:
    """Return the launched width for D = `features`: the next multiple of the tile."""
    block = tile_options(features, 4)["BLOCK_D"]
    return triton.cdiv(features, block) * block


def correlation_launch(corr_DD: Tensor, views: list[Tensor], decay: float | None) -> None:
    """corr <- decay corr + (1 - decay) mean z z^T in place; with decay None, the mean alone.

    Args:
        corr_DD: the result and, with a decay, the state, (D, D), float32, contiguous.
        views: tensors (B, D) of one dtype, float32, float16 or bfloat16. Up to two are read in
            place; more are concatenated first.
        decay: the weight that corr keeps, or None to ignore the contents of corr.
    """
    features = corr_DD.shape[0]
    if len(views) > 2:
        views = [torch.cat(views)]
    width = padded(features) - features
    if width:
        wide_DD = functional.pad(corr_DD, (0, width, 0, width))
        correlation_launch(wide_DD, [functional.pad(view, (0, width)) for view in views], decay)
        corr_DD.copy_(wide_DD[:features, :features])
        return
    views = [view.contiguous() for view in views]
    rows = sum(view.shape[0] for view in views)
    options = tile_options(features, views[0].element_size())
    tiles = triton.cdiv(features, options["BLOCK_D"])
    _correlation_kernel[(tiles * (tiles + 1) // 2,)](
        corr_DD,
        views[0],
        views[-1],
        0.0 if decay is None else float(decay),
        (1.0 if decay is None else 1.0 - decay) / rows,
        views[0].shape[0],
        views[-1].shape[0],
        D=features,
        # with weight 0 the old contents are never read, NaN included, as with torch's beta = 0
        EMA=bool(decay),
        VIEWS=len(views),
        **options,
    )
