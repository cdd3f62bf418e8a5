"""Kernels for non-contrastive self-supervised learning.

The asymmetric losses of IsoLoss, DirectPred and DirectCopy, as functions and as the module
`IsoLoss`, the correlation matrix they share, the predictor computed from it, and augmentation of
images stored on the device. CUDA tensors run Triton, CPU tensors the plain torch of `reference`
and `augment_reference`. Requires torch and, for CUDA, triton.
"""

from .augment_ops import augment_views
from .iso_loss import IsoLoss
from .ops import (
    asymmetric_loss,
    asymmetric_loss_pair,
    correlation_ema_,
    matrix_power,
    second_moment,
)

__all__ = [
    "IsoLoss",
    "asymmetric_loss",
    "asymmetric_loss_pair",
    "augment_views",
    "correlation_ema_",
    "matrix_power",
    "second_moment",
]
