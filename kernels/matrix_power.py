"""C^alpha of a correlation matrix."""

from torch import Tensor

from .reference import matrix_power_reference


def matrix_power_launch(corr_DD: Tensor, alpha: float, eps: float, normalize: str) -> Tensor:
    """`reference.matrix_power_reference` on C's device."""
    return matrix_power_reference(corr_DD, alpha, eps=eps, normalize=normalize)
