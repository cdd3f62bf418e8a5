"""The algorithm on one page: everything with a gradient, in one forward call.

Shapes: B images per rank, C x H x W pixels, D embedding dimensions, K classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from isofast.data import Batch
from isofast.errors import UserError
from isofast.methods import Method, Views
from isofast.methods.networks import Branch
from isofast.methods.probe import ProbeOutput, probe_loss
from isofast.training.parts import part


@dataclass(frozen=True)
class StepOutput:
    """One step's results; only ``loss`` and ``probe.loss`` carry a gradient."""

    loss: Tensor
    """The method's loss, a scalar."""
    probe: ProbeOutput
    z1_BD: Tensor
    """The first view's embeddings, detached."""


class Online(nn.Module):
    """The branch, the probe on its detached features, and the method.

    BatchNorm normalises each view separately and updates the running statistics once per view.
    ``uneven_labels`` tells the probe that ranks may have a different number of labelled images.
    """

    def __init__(
        self, branch: Branch, probe: nn.Linear, method: Method, *, uneven_labels: bool = False
    ) -> None:
        super().__init__()
        self.branch = branch
        self.probe = probe
        self.method = method
        self.uneven_labels = uneven_labels

    def forward(self, batch: Batch, targets: tuple[Tensor, Tensor] | None = None) -> StepOutput:
        """Run a training step up to the loss; ``targets`` (t1_BD, t2_BD) default to (z1, z2)."""
        with part("forward"):
            (h1_BF, z1_BD), (h2_BF, z2_BD) = self.branch.of_views(batch)
        t1_BD, t2_BD = targets or (z1_BD, z2_BD)
        with part("correlation"):
            self.method.correlation.update(z1_BD.detach(), z2_BD.detach())
        with part("loss"):
            loss = self.method.loss(Views(z1_BD, z2_BD, t1_BD.detach(), t2_BD.detach()))
            if z1_BD.requires_grad and not loss.requires_grad:
                # the probe's loss would let the step pass
                raise UserError("the method's loss has no gradient; compute it from z1_BD, z2_BD")
        with part("probe"):
            logits1_BK, logits2_BK = (self.probe(h_BF.detach().float()) for h_BF in (h1_BF, h2_BF))
            probe = probe_loss(logits1_BK, logits2_BK, batch.y_B, uneven=self.uneven_labels)
        return StepOutput(loss, probe, z1_BD.detach())


@torch.no_grad()
def embedding_scalars(z_BD: Tensor) -> dict[str, Tensor]:
    """Return the logged statistics of embeddings (B, D), each a scalar.

    embedding_std: mean over dimensions of the std of z / |z|; healthy is 1/sqrt(D).
    embedding_norm: root mean square of |z|.
    mean_share: |mean z|^2 / mean |z|^2; 1 if all embeddings are equal.
    norm_spread: 95th percentile of |z| over its median; long embeddings dominate a raw C.
    """
    z_BD = z_BD.float()
    # keep the statistics of a collapsed batch finite
    z_B = z_BD.norm(dim=1).clamp(min=1e-8)
    return {
        "embedding_std": functional.normalize(z_BD, dim=1).std(0).mean(),
        "embedding_norm": z_B.square().mean().sqrt(),
        "mean_share": z_BD.mean(0).square().sum() / z_B.square().mean(),
        "norm_spread": z_B.quantile(0.95) / z_B.median(),
    }
