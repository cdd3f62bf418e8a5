"""The algorithm on one page: Implicit variance regularization in non-contrastive SSL (2023).

Shapes: B images a rank, D embedding dimensions, K classes. Views 1 and 2; z online embeddings,
t targets, C their correlation matrix, W the predictor.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from isofast.config import Config
from isofast.correlation import Correlation
from isofast.data import Batch
from isofast.networks import Branch, ViewOutput
from isofast.probe import ProbeOutput, probe_loss
from isofast_kernels import asymmetric_loss_pair

Forward = Callable[[Tensor, Tensor], tuple[ViewOutput, ViewOutput]]


@dataclass(frozen=True)
class StepOutput:
    """One step's results; only ``loss`` and ``probe.loss`` carry a gradient."""

    loss: Tensor
    """2 (L(z1 -> t2) + L(z2 -> t1)), scalar fp32."""
    probe: ProbeOutput
    z1_BD: Tensor
    t2_BD: Tensor
    w_DD: Tensor

    @torch.no_grad()
    def alignment(self) -> Tensor:
        """Mean cosine of prediction W z1 and target t2, scalar."""
        p_BD = self.z1_BD.float() @ self.w_DD
        return torch.cosine_similarity(p_BD, self.t2_BD.float(), dim=1).mean()

    @torch.no_grad()
    def embedding_std(self) -> Tensor:
        """Mean over dimensions of the std of the L2-normalised z1, scalar; 1/sqrt(D) is healthy."""
        return torch.nn.functional.normalize(self.z1_BD.float(), dim=1).std(0).mean()


class Method:
    """IsoLoss, DirectPred and DirectCopy, with an EMA target or without (``target`` is None)."""

    def __init__(
        self, config: Config, online: Forward, target: Branch | None, correlation: Correlation
    ) -> None:
        self._config = config
        self._online = online
        self._target = target
        self._correlation = correlation

    def __call__(self, batch: Batch) -> StepOutput:
        view1, view2 = self._online(batch.x1_BCHW, batch.x2_BCHW)
        z1_BD, z2_BD = view1.z_BD, view2.z_BD

        self._correlation.update(z1_BD.detach(), z2_BD.detach())
        w_DD = self._correlation.predictor()

        if self._target is None:
            t1_BD, t2_BD = z1_BD, z2_BD
        else:
            with torch.no_grad():
                _, t1_BD = self._target(batch.x1_BCHW)
                _, t2_BD = self._target(batch.x2_BCHW)

        loss = 2 * asymmetric_loss_pair(
            z1_BD,
            z2_BD,
            t1_BD.detach(),
            t2_BD.detach(),
            w_DD,
            metric=self._config.method.metric,
            isotropic=self._config.isotropic,
        )
        probe = probe_loss(view1.logits_BK, view2.logits_BK, batch.y_B)
        return StepOutput(loss, probe, z1_BD.detach(), t2_BD.detach(), w_DD)


def ema_decay_at(step: int, total_steps: int, base: float) -> float:
    """tau_k = 1 - (1 - base) (cos(pi k / K) + 1) / 2: ``base`` at step 0, rising to 1 at K."""
    progress = min(step / total_steps, 1.0)
    return 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2


@torch.no_grad()
def move_target_(target: Branch, online: Branch, weight: Tensor) -> None:
    """Target parameters <- target + weight (online - target); BatchNorm buffers stay its own.

    Args:
        target, online: the two branches.
        weight: 1 - tau, 0-dimensional, on their device, where alone it is read. Not tau itself:
            near 1 float32 has few digits for what is left.
    """
    targets: list[Tensor] = list(target.parameters())
    onlines: list[Tensor] = list(online.parameters())
    # one pass over each tensor, the weight stretched over it without memory of its own
    weights: list[Tensor] = [weight.expand_as(tensor) for tensor in targets]
    torch._foreach_lerp_(targets, onlines, weights)
