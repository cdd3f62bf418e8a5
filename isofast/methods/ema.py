"""The EMA target, a copy of the online branch that follows it slowly."""

import copy
import math

import torch
from torch import Tensor, nn

from isofast.data import Batch
from isofast.methods.foreach import lerp_
from isofast.methods.networks import Branch


class EmaTarget(nn.Module):
    """Parameters <- tau target + (1 - tau) online; BatchNorm keeps separate statistics.

    Args:
        online: the branch to copy.
        base: tau at the run's first step; it rises to 1 along a half cosine.
    """

    _weight: Tensor

    def __init__(self, online: Branch, base: float) -> None:
        super().__init__()
        # an encoder of your own may come in eval mode, whose statistics would stay as they came
        self.branch = copy.deepcopy(online).requires_grad_(False).train()
        self._base = base
        device = next(online.parameters()).device
        # 1 - tau, because near 1 float32 has few digits left for tau
        self.register_buffer("_weight", torch.zeros((), device=device), persistent=False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return t1_BD, t2_BD."""
        (_, t1_BD), (_, t2_BD) = self.branch.of_views(batch)
        return t1_BD, t2_BD

    def set_decay(self, progress: float) -> None:
        """Set tau at ``progress`` in [0, 1] of the run, without waiting for the device."""
        self._weight.fill_(1 - ema_decay(progress, self._base))

    @torch.no_grad()
    def move_(self, online: Branch) -> None:
        """Move the parameters towards the online ones; a CUDA graph follows the tau that is set."""
        self.lerp_(list(self.branch.parameters()), list(online.parameters()), self._weight)

    # torch.compile makes one pass of it
    lerp_ = staticmethod(lerp_)


def ema_decay(progress: float, base: float) -> float:
    """Return tau = 1 - (1 - base) (cos(pi progress) + 1) / 2."""
    return 1 - (1 - base) * (math.cos(math.pi * min(progress, 1.0)) + 1) / 2
