"""Kernels of non-contrastive self-supervised learning.

The asymmetric losses of IsoLoss, DirectPred and DirectCopy, the correlation state they share and
the predictor made of it. CUDA tensors run Triton, CPU tensors the plain torch of `reference`.
Needs torch and, for CUDA, triton.
"""

from .ops import (
    asymmetric_loss,
    asymmetric_loss_pair,
    correlation_ema_,
    matrix_power,
    second_moment,
)

__all__ = [
    "asymmetric_loss",
    "asymmetric_loss_pair",
    "correlation_ema_",
    "matrix_power",
    "second_moment",
]
