"""The online linear probe: a classifier on detached features, trained alongside the encoder."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from isofast.data.folder import UNLABELLED
from isofast.distributed import mean_over_ranks_, world_size


class ProbeOutput(NamedTuple):
    """The probe's loss and accuracy on a batch."""

    loss: Tensor
    """Cross-entropy over both views, scalar fp32; 0 without labels."""
    top1: Tensor
    """Accuracy over both views, scalar, without gradient."""


def probe_loss(
    logits1_BK: Tensor, logits2_BK: Tensor, y_B: Tensor, *, uneven: bool = False
) -> ProbeOutput:
    """Score both views' logits (B, K) against labels (B,) int64; -1 marks unlabelled images.

    If ranks have an ``uneven`` number of labels, their mean weighs all labels of the batch equally.
    """
    logits_NK = torch.cat([logits1_BK, logits2_BK])
    y_N = torch.cat([y_B, y_B])
    labelled = (y_N != UNLABELLED).sum()
    if uneven:
        labelled = mean_over_ranks_(labelled.float())
    labelled = labelled.clamp(min=1 / world_size())
    total = functional.cross_entropy(logits_NK, y_N, ignore_index=UNLABELLED, reduction="sum")
    right = (logits_NK.detach().argmax(1) == y_N).sum()
    return ProbeOutput(total / labelled, right / labelled)
