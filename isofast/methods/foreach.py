"""Fused in-place updates of lists of tensors, scaled by scalars on the device.

All tensors of a call are on one device, and paired tensors have equal shapes. A CPU is limited by
memory traffic, so each tensor takes one pass with the scalar expanded. A GPU is limited by
launches: temporaries cost less than one launch per tensor, and torch.compile removes them.
``one_pass=None`` chooses by device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def add_scaled_(
    tensors: list[Tensor],
    others: list[Tensor],
    factor: Tensor,
    value: float = 1.0,
    *,
    one_pass: bool | None = None,
) -> None:
    """tensors += value * factor * others, with a 0-dimensional ``factor``."""
    if tensors[0].is_cpu if one_pass is None else one_pass:
        factors = [factor.expand_as(tensor) for tensor in tensors]
        torch._foreach_addcmul_(tensors, others, factors, value=value)
    else:
        torch._foreach_add_(tensors, torch._foreach_mul(others, factor), alpha=value)


def add_each_scaled_(
    tensors: list[Tensor], others: list[Tensor], factors: Sequence[Tensor]
) -> None:
    """tensors[i] += factors[i] * others[i], with 0-dimensional factors."""
    expanded = [factor.expand_as(t) for factor, t in zip(factors, tensors, strict=True)]
    torch._foreach_addcmul_(tensors, others, expanded)


def lerp_(
    tensors: list[Tensor], ends: list[Tensor], weight: Tensor, *, one_pass: bool | None = None
) -> None:
    """tensors += weight * (ends - tensors), with a 0-dimensional ``weight``."""
    if tensors[0].is_cpu if one_pass is None else one_pass:
        weights = [weight.expand_as(tensor) for tensor in tensors]
        torch._foreach_lerp_(tensors, ends, weights)
    else:
        differences = list(torch._foreach_sub(ends, tensors))
        add_scaled_(tensors, differences, weight, one_pass=False)
