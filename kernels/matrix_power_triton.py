"""The arithmetic of matrix_power.py in Triton: one launch per step or two, no host sync.

Between launches a matrix is stored as two fp16 halves, X = high + low / 2^11, with 22 bits; a
product of two takes three fp16 products, whose terms are exact in fp32 (NUMERICS.md). D is a
multiple of the tile: other widths are padded with zeros, which stay decoupled in every product. So
no tile needs a mask, and every width up to 1024 can be compiled ahead of time. Shape letters: D
features, I, J, K a tile's rows, columns and inner dimension, T tiles, S squares, H halves.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from .matrix_power import (
    DEAD,
    LOW_SCALE,
    SQUARE_SCALE,
    SQUARINGS,
    power_by_products,
    runs_by_products,
)
from .reference import matrix_power_reference

_DEAD = tl.constexpr(DEAD)
_LOW_SCALE = tl.constexpr(LOW_SCALE)
_SQUARE_SCALE = tl.constexpr(SQUARE_SCALE)


@triton.jit
def _store_halves(ptr, offset, x, D: tl.constexpr):
    high = x.to(tl.float16)
    tl.store(ptr + offset, high)
    tl.store(ptr + D * D + offset, ((x - high.to(tl.float32)) * _LOW_SCALE).to(tl.float16))


@triton.jit
def _load_halves(ptr, offset, D: tl.constexpr):
    low = tl.load(ptr + D * D + offset).to(tl.float32)
    return tl.load(ptr + offset).to(tl.float32) + low * (1.0 / _LOW_SCALE)


@triton.jit
def _tile_product(x_ptr, y_ptr, i_I, j_J, D, BLOCK_I, BLOCK_J, BLOCK_K):
    """Compute a tile of X Y, accumulated in fp32 along D in a fixed order."""
    high_IJ = tl.zeros([BLOCK_I, BLOCK_J], dtype=tl.float32)
    left_IJ = tl.zeros([BLOCK_I, BLOCK_J], dtype=tl.float32)
    right_IJ = tl.zeros([BLOCK_I, BLOCK_J], dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        k_K = start + tl.arange(0, BLOCK_K)
        x_ptr_IK = x_ptr + i_I[:, None] * D + k_K[None, :]
        y_ptr_KJ = y_ptr + k_K[:, None] * D + j_J[None, :]
        x_IK, x_low_IK = tl.load(x_ptr_IK), tl.load(x_ptr_IK + D * D)
        y_KJ, y_low_KJ = tl.load(y_ptr_KJ), tl.load(y_ptr_KJ + D * D)
        left_IJ = tl.dot(x_low_IK, y_KJ, left_IJ)
        right_IJ = tl.dot(x_IK, y_low_KJ, right_IJ)
        # added outside the tensor cores, which truncate what they add to an accumulator; sums with
        # low halves may lose as much, as they weigh 2^11 times less. Last, or registers spill
        high_IJ += tl.dot(x_IK, y_KJ, max_num_imprecise_acc=BLOCK_K)
    return high_IJ + (left_IJ + right_IJ) * (1.0 / _LOW_SCALE)


@triton.jit
def _reciprocal_or_zero(x):
    """Return 1 / x, or 0 where x counts as 0; NaN stays NaN."""
    return tl.where(tl.abs(x) < _DEAD, 0.0, 1.0 / x)


@triton.jit
def _inverse_largest(sums_ptr, TILES: tl.constexpr, BLOCK_T: tl.constexpr):
    """Return 1 / lambda_max from `TILES` parts of <N, C> and tr N, added in a fixed order."""
    t_T = tl.arange(0, BLOCK_T)
    inner = tl.sum(tl.load(sums_ptr + t_T, mask=t_T < TILES, other=0.0), axis=0)
    trace = tl.sum(tl.load(sums_ptr + TILES + t_T, mask=t_T < TILES, other=0.0), axis=0)
    return _reciprocal_or_zero(inner * _reciprocal_or_zero(trace))


@triton.jit
def _normalize_kernel(
    corr_ptr,
    out_ptr,
    trace_ptr,
    D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store M = C / tr C and tr C before the first product, as squares of a small C underflow."""
    d_D = tl.arange(0, BLOCK_D)
    trace = tl.sum(tl.load(corr_ptr + d_D * (D + 1), mask=d_D < D, other=0.0), axis=0)
    i_I = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    j_J = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    offset_IJ = i_I[:, None] * D + j_J[None, :]
    m_IJ = tl.load(corr_ptr + offset_IJ) * _reciprocal_or_zero(trace)
    _store_halves(out_ptr, offset_IJ, m_IJ * _SQUARE_SCALE, D)
    tl.store(trace_ptr, trace, mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))


# one build for every index and for zero, one or two products
@triton.jit(do_not_specialize=["index", "products"])
def _product_kernel(
    x1_ptr,
    y1_ptr,
    x2_ptr,
    y2_ptr,
    out_ptr,
    a,
    b,
    c,
    products,
    m_ptr,
    n_ptr,
    corr_ptr,
    trace_ptr,
    sums_ptr,
    index,
    D: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    SQUARE: tl.constexpr,
    QUOTIENT: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[n] = X_n Y_n, n = program_id(2), or a I + b X + c X Y; after the products a square.

    The square is N = (M / tr M)^2, with a tile's part of |N|^2 or, for the quotient, of <N, C> and
    tr N.
    """
    i_I = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    j_J = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    offset_IJ = i_I[:, None] * D + j_J[None, :]
    if tl.program_id(2) < products:
        if POLYNOMIAL or tl.program_id(2) == 0:
            first_IJ = _tile_product(x1_ptr, y1_ptr, i_I, j_J, D, BLOCK_I, BLOCK_J, BLOCK_K)
            if POLYNOMIAL:
                x_IJ = _load_halves(x1_ptr, offset_IJ, D)
                identity_IJ = tl.where(i_I[:, None] == j_J[None, :], a, 0.0)
                first_IJ = c * first_IJ + b * x_IJ + identity_IJ
            _store_halves(out_ptr, offset_IJ, first_IJ, D)
        else:
            second_IJ = _tile_product(x2_ptr, y2_ptr, i_I, j_J, D, BLOCK_I, BLOCK_J, BLOCK_K)
            _store_halves(out_ptr + 2 * D * D, offset_IJ, second_IJ, D)
    elif SQUARE:
        d_D = tl.arange(0, BLOCK_D)
        diagonal_D = _load_halves(m_ptr, tl.where(d_D < D, d_D * (D + 1), 0), D)
        trace = tl.sum(tl.where(d_D < D, diagonal_D, 0.0), axis=0) * (1.0 / _SQUARE_SCALE)
        inverse = _reciprocal_or_zero(trace) * (1.0 / _SQUARE_SCALE)
        n_IJ = _tile_product(m_ptr, m_ptr, i_I, j_J, D, BLOCK_I, BLOCK_J, BLOCK_K)
        n_IJ = n_IJ * inverse * inverse
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tiles = tl.num_programs(0) * tl.num_programs(1)
        # the first trace is C's
        tl.store(trace_ptr + index, trace, mask=(tile == 0) & (index > 0))
        if QUOTIENT:
            corr_IJ = tl.load(corr_ptr + offset_IJ)
            diagonal_IJ = tl.where(i_I[:, None] == j_J[None, :], n_IJ, 0.0)
            tl.store(sums_ptr + tile, tl.sum(tl.sum(n_IJ * corr_IJ, axis=1), axis=0))
            tl.store(sums_ptr + tiles + tile, tl.sum(tl.sum(diagonal_IJ, axis=1), axis=0))
        else:
            _store_halves(n_ptr, offset_IJ, n_IJ * _SQUARE_SCALE, D)
            tl.store(sums_ptr + 2 * tiles + tile, tl.sum(tl.sum(n_IJ * n_IJ, axis=1), axis=0))


@triton.jit
def _shift_kernel(
    corr_ptr,
    trace_ptr,
    sums_ptr,
    out_ptr,
    r_ptr,
    eps,
    D: tl.constexpr,
    SPECTRAL: tl.constexpr,
    BOUNDED: tl.constexpr,
    TILES: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """A and r of `Steps.shift`, after SQUARES squares; A is fp32 if not bounded."""
    scale = 1.0
    shift = eps
    if SPECTRAL:
        scale = _inverse_largest(sums_ptr, TILES, BLOCK_T)
    r = 1.0
    if BOUNDED:
        # |C^n|^(1/n) >= lambda_max with n = 2^S: C^n is the last normalised square M_S times
        # the traces before it, tr(M_s)^(2^(S-s))
        s_S = tl.arange(0, BLOCK_S)
        t_T = tl.arange(0, BLOCK_T)
        norm_T = tl.load(sums_ptr + 2 * TILES + t_T, mask=t_T < TILES, other=0.0)
        trace_S = tl.load(trace_ptr + s_S, mask=s_S < SQUARES, other=1.0)
        trace_S = tl.where(s_S == SQUARES, tl.sqrt(tl.sum(norm_T, axis=0)), trace_S)
        weighted_S = tl.log2(trace_S) * tl.exp2(-s_S.to(tl.float32))
        bound = tl.exp2(tl.sum(weighted_S, axis=0))
        r = bound * scale + eps
        scale = scale * _reciprocal_or_zero(r)
        shift = eps * _reciprocal_or_zero(r)
    i_I = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    j_J = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    offset_IJ = i_I[:, None] * D + j_J[None, :]
    corr_IJ = tl.load(corr_ptr + offset_IJ)
    out_IJ = corr_IJ * scale + tl.where(i_I[:, None] == j_J[None, :], shift, 0.0)
    if BOUNDED:
        _store_halves(out_ptr, offset_IJ, out_IJ, D)
    else:
        tl.store(out_ptr + offset_IJ, out_IJ)
    tl.store(r_ptr, r, mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))


@triton.jit
def _finish_kernel(
    x_ptr,
    y_ptr,
    r_ptr,
    sums_ptr,
    out_ptr,
    power,
    D: tl.constexpr,
    SCALED: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """r^power X Y or (r / lambda_max)^power X Y, in fp32, with the lower triangle mirrored."""
    if (tl.program_id(0) + 1) * BLOCK_I > tl.program_id(1) * BLOCK_J:
        i_I = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
        j_J = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
        product_IJ = _tile_product(x_ptr, y_ptr, i_I, j_J, D, BLOCK_I, BLOCK_J, BLOCK_K)
        r = tl.load(r_ptr)
        if SCALED:
            r = r * _inverse_largest(sums_ptr, TILES, BLOCK_T)
        # 0 if r = 0, where C counts as 0
        factor = tl.exp2(power * tl.log2(r))
        i_II, j_JJ = i_I[:, None], j_J[None, :]
        lower_IJ = j_JJ <= i_II
        tl.store(out_ptr + i_II * D + j_JJ, product_IJ * factor, mask=lower_IJ)
        tl.store(out_ptr + j_JJ * D + i_II, product_IJ * factor, mask=j_JJ < i_II)


def tile_options(features: int) -> dict[str, int]:
    """Return tiles and warps for D = `features`; tiles are small, to fill the device at D = 256.

    They divide the launched width (`padded`) and are wide, so that Triton lays the warps side by
    side: stacked, half of them would repeat the others' work.
    """
    small = features <= 256
    return {
        "BLOCK_I": 16 if small else 32,
        "BLOCK_J": 32 if features <= 192 else 64,
        "BLOCK_K": 64,
        "num_warps": 4,
        "num_stages": 3 if small else 2,
    }


def padded(features: int) -> int:
    """Return the launched width for D = `features`: the next that tiles divide."""
    return triton.cdiv(features, 64) * 64


class TritonSteps:
    """`Steps` in Triton, one launch per method, for an fp32 C (D, D) with D divisible by the tiles.

    Matrices are halves, (2, D, D) in fp16. The squares of `find_largest` share the launches of
    the products that follow it.
    """

    def __init__(self, corr_DD: Tensor) -> None:
        self.corr_DD = corr_DD
        self.features = corr_DD.shape[0]
        self.options = tile_options(self.features)
        self.blocks = {name: self.options[name] for name in ("BLOCK_I", "BLOCK_J")}
        self.grid = tuple(self.features // block for block in self.blocks.values())
        self.block_d = triton.next_power_of_2(self.features)
        tiles = math.prod(self.grid)
        self.tiles = {"TILES": tiles, "BLOCK_T": triton.next_power_of_2(tiles)}
        self.traces_S = self._empty(SQUARINGS + 1)
        # parts of the quotient's <N, C> and tr N, and of the last square's norm
        self.sums_3T = self._empty(3, tiles)
        self.r = self._empty(1)
        self.next_square: tuple[Tensor, int] | None = None

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.corr_DD.device)

    def _halves(self, matrices: int = 1) -> Tensor:
        shape = 2 * matrices, self.features, self.features
        return torch.empty(shape, dtype=torch.float16, device=self.corr_DD.device)

    def _launch(
        self, out: Tensor, *factors: Tensor, abc: tuple[float, float, float] | None = None
    ) -> Tensor:
        """Compute X Y of each pair of factors or their polynomial, and a square; return `out`."""
        products = len(factors) // 2
        m_HDD, index = self.next_square or (out, 0)
        # not next to two products, which fill the device
        square = self.next_square is not None and products < 2
        quotient = square and index == SQUARINGS
        n_HDD = self._halves() if square and not quotient else out
        a, b, c = abc or (0.0, 0.0, 1.0)
        _product_kernel[(*self.grid, products + square)](
            # unread tensors stand in for missing ones
            *(*factors, *[m_HDD] * 4)[:4],
            out,
            a,
            b,
            c,
            products,
            m_HDD,
            n_HDD,
            self.corr_DD,
            self.traces_S,
            self.sums_3T,
            index,
            D=self.features,
            POLYNOMIAL=abc is not None,
            SQUARE=square,
            QUOTIENT=quotient,
            BLOCK_D=self.block_d,
            **self.options,
        )
        if square:
            self.next_square = None if quotient else (n_HDD, index + 1)
        return out

    def square(self, m_DD: Tensor, index: int) -> Tensor:
        if index == 0:
            m_DD = self._normalize()
        self.next_square = m_DD, index
        self._launch(m_DD)
        assert self.next_square is not None
        (n_HDD, _), self.next_square = self.next_square, None
        return n_HDD

    def _normalize(self) -> Tensor:
        out_HDD = self._halves()
        _normalize_kernel[self.grid](
            self.corr_DD,
            out_HDD,
            self.traces_S,
            D=self.features,
            BLOCK_D=self.block_d,
            **self.blocks,
        )
        return out_HDD

    def find_largest(self, m_DD: Tensor, index: int) -> None:
        self.next_square = m_DD, index

    def _found_largest(self) -> Tensor:
        while self.next_square is not None:
            self._launch(self.next_square[0])
        return self.sums_3T

    def shift(self, m_DD: Tensor, index: int, eps: float, spectral: bool, bounded: bool) -> Tensor:
        out = self._halves() if bounded else self._empty(self.features, self.features)
        _shift_kernel[self.grid](
            self.corr_DD,
            self.traces_S,
            self._found_largest() if spectral else self.sums_3T,
            out,
            self.r,
            eps,
            D=self.features,
            SPECTRAL=spectral,
            BOUNDED=bounded,
            **self.tiles,
            SQUARES=index,
            BLOCK_S=triton.next_power_of_2(index + 1),
            **self.blocks,
        )
        return out

    def polynomial(self, p_DD: Tensor, a: float, b: float, c: float) -> Tensor:
        return self._launch(self._halves(), p_DD, p_DD, abc=(a, b, c))

    def product(self, x_DD: Tensor, y_DD: Tensor) -> Tensor:
        return self._launch(self._halves(), x_DD, y_DD)

    def advance(self, y_DD: Tensor, q_DD: Tensor, z_DD: Tensor) -> tuple[Tensor, Tensor]:
        out = self._launch(self._halves(2), y_DD, q_DD, q_DD, z_DD)
        return out[:2], out[2:]

    def finish(self, x_DD: Tensor, y_DD: Tensor, power: float, scaled: bool) -> Tensor:
        out_DD = self._empty(self.features, self.features)
        _finish_kernel[self.grid](
            x_DD,
            y_DD,
            self.r,
            self._found_largest() if scaled else self.sums_3T,
            out_DD,
            power,
            D=self.features,
            SCALED=scaled,
            **self.tiles,
            **self.options,
        )
        return out_DD


def matrix_power_launch(corr_DD: Tensor, alpha: float, eps: float, normalize: str) -> Tensor:
    """Return W of `matrix_power_reference`, by products if `runs_by_products`, else by eigh.

    Args:
        corr_DD: C, (D, D), symmetric, float32.
        alpha, eps, normalize: as in `matrix_power_reference`.

    Returns:
        w_DD, (D, D), bitwise symmetric, float32. By products there is no host sync, and the
        launches do not depend on C's values, so that a CUDA graph can capture them.
    """
    if not runs_by_products(alpha, eps, normalize):
        return matrix_power_reference(corr_DD, alpha, eps=eps, normalize=normalize)
    features = len(corr_DD)
    width = padded(features) - features
    corr_DD = functional.pad(corr_DD, (0, width, 0, width)) if width else corr_DD.contiguous()
    w_DD = power_by_products(corr_DD, alpha, eps, normalize, TritonSteps(corr_DD))
    return w_DD[:features, :features].contiguous() if width else w_DD
