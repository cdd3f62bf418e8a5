"""The EMA target: a slowly updated copy of the online branch."""

import copy
import math

import torch
from torch import Tensor, nn

from isofast.data import Batch
from isofast.methods.foreach import lerp_
from isofast.methods.networks import Branch


class EmaTarget(nn.Module):
    """Parameters <- tau target + (1 - tau) online; BatchNorm statistics are the target's own.

    Args:
        online: the branch to copy.
        base: tau at the first step; it rises to 1 along a half cosine.
    """

    _weight: Tensor

    def __init__(self, online: Branch, base: float) -> None:
        super().__init__()
        # a custom encoder may be in eval mode, which would freeze its statistics
        self.branch = copy.deepcopy(online).requires_grad_(False).train()
        self._base = base
        device = next(online.parameters()).device
        # holds 1 - tau, because float32 has few digits left for a tau near 1
        self.register_buffer("_weight", torch.zeros((), device=device), persistent=False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return t1_BD, t2_BD."""
        (_, t1_BD), (_, t2_BD) = self.branch.of_views(batch)
        return t1_BD, t2_BD

    def set_decay(self, progress: float) -> None:
        """Set tau for ``progress``, the fraction of the run in [0, 1], without a host sync."""
        self._weight.fill_(1 - ema_decay(progress, self._base))

    @torch.no_grad()
    def move_(self, online: Branch) -> None:
        """Move the parameters towards the online ones; a CUDA graph uses the current tau."""
        self.lerp_(list(self.branch.parameters()), list(online.parameters()), self._weight)

    # torch.compile turns it into a single pass
    lerp_ = staticmethod(lerp_)


def ema_decay(progress: float, base: float) -> float:
    """Return tau = 1 - (1 - base) (cos(pi progress) + 1) / 2."""
    return 1 - (1 - base) * (math.cos(math.pi * min(progress, 1.0)) + 1) / 2
