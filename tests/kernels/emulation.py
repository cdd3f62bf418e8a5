"""The steps of the matrix power in plain torch, with a product of one's choice."""

import torch
from torch import Tensor

from isofast_kernels.matrix_power import DEAD, SQUARINGS


def rounded_to_tf32(x: Tensor) -> Tensor:
    """fp32 with 10 explicit bits of mantissa, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def product_3xtf32(x: Tensor, y: Tensor) -> Tensor:
    """x @ y as tensor cores do it with input_precision="tf32x3"."""
    x_high, y_high = rounded_to_tf32(x), rounded_to_tf32(y)
    x_low, y_low = rounded_to_tf32(x - x_high), rounded_to_tf32(y - y_high)
    return x_low @ y_high + x_high @ y_low + x_high @ y_high


def product_tf32(x: Tensor, y: Tensor) -> Tensor:
    """x @ y with one TF32 product: what a careless fp32 tl.dot does."""
    return rounded_to_tf32(x) @ rounded_to_tf32(y)


def reciprocal_or_zero(x: Tensor) -> Tensor:
    """1 / x, but 0 where x counts as 0, as the kernels have it."""
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
        return self.product(m_DD * scale, m_DD) * scale

    def find_largest(self, m_DD, index):
        for square in range(index, SQUARINGS + 1):
            m_DD = self.square(m_DD, square)
        self.largest = (m_DD * self.corr_DD).sum() * reciprocal_or_zero(m_DD.trace())

    def shift(self, m_DD, index, eps, spectral, bounded):
        self.r = torch.ones(())
        if m_DD is None:
            assert not spectral and not bounded
            return self.corr_DD + self.corr_DD.sum() * 0 + eps * self.identity
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
