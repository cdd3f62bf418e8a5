"""Fused in-place updates over parameter lists, scaled by a device scalar.

On a GPU launches count: one product and one sum over all tensors, whose temporaries cost less than
a launch per tensor. On a CPU memory counts: the scalar is expanded over each tensor for one pass.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def few_launches(tensors: Sequence[Tensor]) -> bool:
    """Whether to save launches rather than memory traffic."""
    return not tensors[0].is_cpu


def add_scaled_(
    tensors: Sequence[Tensor], others: Sequence[Tensor], factor: Tensor, value: float = 1.0
) -> None:
    """tensors += value * factor * others, in place.

    Args:
        tensors, others: equally many, of equal shapes, on one device.
        factor: 0-dimensional, on that device.
        value: a number.
    """
    if few_launches(tensors):
        torch._foreach_add_(_list(tensors), torch._foreach_mul(_list(others), factor), alpha=value)
    else:
        factors = [factor.expand_as(tensor) for tensor in tensors]
        torch._foreach_addcmul_(_list(tensors), _list(others), factors, value=value)


def add_each_scaled_(
    tensors: Sequence[Tensor], others: Sequence[Tensor], factors: Sequence[Tensor]
) -> None:
    """tensors[i] += factors[i] * others[i], in place, a launch a tensor.

    Args:
        tensors, others: equally many, of equal shapes, on one device.
        factors: as many, each 0-dimensional, on that device.
    """
    stretched = [x.expand_as(tensor) for x, tensor in zip(factors, tensors, strict=True)]
    torch._foreach_addcmul_(_list(tensors), _list(others), stretched)


def lerp_(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: Tensor) -> None:
    """tensors += weight * (ends - tensors), in place.

    Args:
        tensors, ends: equally many, of equal shapes, on one device.
        weight: 0-dimensional, on that device.
    """
    if few_launches(tensors):
        differences = torch._foreach_sub(_list(ends), _list(tensors))
        add_scaled_(tensors, differences, weight)
    else:
        weights: list[Tensor] = [weight.expand_as(tensor) for tensor in tensors]
        torch._foreach_lerp_(_list(tensors), _list(ends), weights)


def _list(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list(tensors)
