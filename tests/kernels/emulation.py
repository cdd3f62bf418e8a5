"""The matrix power's steps in plain torch, with any matrix product."""

import torch
from torch import Tensor

from isofast_kernels.matrix_power import DEAD, LOW_SCALE, SQUARE_SCALE, SQUARINGS


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the fp16 numbers, as fp32, that represent x as high + low / 2^11."""
    high = x.half().float()
    return high, ((x - high) * LOW_SCALE).half().float()


def product_of_halves(x: Tensor, y: Tensor) -> Tensor:
    """x @ y as in the kernels, from three fp16 products."""
    (x_high, x_low), (y_high, y_low) = halves(x), halves(y)
    return x_high @ y_high + (x_low @ y_high + x_high @ y_low) / LOW_SCALE


def truncated_sums(x: Tensor, y: Tensor, restart: int) -> Tensor:
    """x @ y with an accumulator truncated to fp32 every 4 rows and restarted every `restart` rows.

    This model of tensor cores fits an H100's results over 2,048 rows (NUMERICS.md).
    """
    total = torch.zeros(len(x), y.shape[1])
    for start in range(0, len(y), restart):
        acc = total.double() * 0
        for row in range(start, min(start + restart, len(y)), 4):
            acc += x[:, row : row + 4].double() @ y[row : row + 4].double()
            acc.view(torch.int64).bitwise_and_(-1 << 29)
        total += acc.float()
    return total


def product_on_tensor_cores(x: Tensor, y: Tensor, restart: int = 64) -> Tensor:
    """product_of_halves with truncated sums; only the high halves' sums restart."""
    (x_high, x_low), (y_high, y_low) = halves(x), halves(y)
    lows = truncated_sums(x_low, y_high, len(y)) + truncated_sums(x_high, y_low, len(y))
    return truncated_sums(x_high, y_high, restart) + lows / LOW_SCALE


def reciprocal_or_zero(x: Tensor) -> Tensor:
    """1 / x, but 0 where x counts as 0, as in the kernels."""
    return torch.where(x.abs() < DEAD, 0, 1 / x)


class TorchSteps:
    """`isofast_kernels.matrix_power.Steps` over `matmul`; counts the products."""

    def __init__(self, corr_DD, matmul):
        self.corr_DD, self.matmul, self.products, self.traces = corr_DD, matmul, 0, []
        self.identity = torch.eye(len(corr_DD), dtype=corr_DD.dtype)

    def product(self, x_DD, y_DD):
        self.products += 1
        return self.matmul(x_DD, y_DD)

    def square(self, m_DD, index):
        assert index == len(self.traces)
        trace = m_DD.trace()
        self.traces.append(trace)
        scale = reciprocal_or_zero(trace)
        if index == 0:
            m_DD, scale = m_DD * scale, 1.0
        return self.product(m_DD * SQUARE_SCALE, m_DD * SQUARE_SCALE) * (scale / SQUARE_SCALE) ** 2

    def find_largest(self, m_DD, index):
        for square in range(index, SQUARINGS + 1):
            m_DD = self.square(m_DD, square)
        self.largest = (m_DD * self.corr_DD).sum() * reciprocal_or_zero(m_DD.trace())

    def shift(self, m_DD, index, eps, spectral, bounded):
        self.r = torch.ones(())
        scale = reciprocal_or_zero(self.largest) if spectral else torch.ones(())
        if not bounded:
            return self.corr_DD * scale + eps * self.identity
        factors = [*self.traces[:index], torch.linalg.matrix_norm(m_DD)]
        bound = torch.stack([x ** (2.0**-s) for s, x in enumerate(factors)]).prod()
        self.r = bound * scale + eps
        inverse = reciprocal_or_zero(self.r)
        return self.corr_DD * (scale * inverse) + eps * inverse * self.identity

    def polynomial(self, p_DD, a, b, c):
        return a * self.identity + b * p_DD + c * self.product(p_DD, p_DD)

    def advance(self, y_DD, q_DD, z_DD):
        return self.product(y_DD, q_DD), self.product(q_DD, z_DD)

    def finish(self, x_DD, y_DD, power, scaled):
        r = self.r * reciprocal_or_zero(self.largest) if scaled else self.r
        w_DD = self.product(x_DD, y_DD) * r**power
        return w_DD.tril() + w_DD.tril(-1).T
