"""The online linear probe: a classifier on detached features, trained alongside the encoder."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from isofast.data.folder import UNLABELLED


class ProbeOutput(NamedTuple):
    """The probe's loss and accuracy on a batch."""

    loss: Tensor
    """Cross-entropy over both views, scalar fp32; 0 without labels."""
    top1: Tensor
    """Accuracy over both views, scalar, without gradient."""


def probe_loss(logits1_BK: Tensor, logits2_BK: Tensor, y_B: Tensor) -> ProbeOutput:
    """Score both views' logits (B, K) against labels (B,) int64; -1 marks unlabelled images."""
    logits_NK = torch.cat([logits1_BK, logits2_BK])
    y_N = torch.cat([y_B, y_B])
    labelled = (y_N != UNLABELLED).sum().clamp(min=1)
    total = functional.cross_entropy(logits_NK, y_N, ignore_index=UNLABELLED, reduction="sum")
    right = (logits_NK.detach().argmax(1) == y_N).sum()
    return ProbeOutput(total / labelled, right / labelled)
