"""The algorithm on one page: Implicit variance regularization in non-contrastive SSL (2023).

Shapes: B images a rank, D embedding dimensions, K classes. Views 1 and 2; z online embeddings,
p predictions, t targets, C the correlation matrix of z, W the predictor where it is a matrix.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from isofast.config import Config
from isofast.correlation import Correlation
from isofast.data import Batch
from isofast.networks import Branch, ViewOutput
from isofast.passes import lerp_
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
    w_DD: Tensor | None
    """The predictor, p = W z: f(C), symmetric, or linear's weight, which is the live one and moves
    with the optimizer's step; None for byol and simsiam."""
    p1_BD: Tensor | None
    """A trained predictor's output for z1; None for the closed forms, whose p is W z."""

    @torch.no_grad()
    def scalars(self) -> dict[str, Tensor]:
        """What a record says of the step's first view, each a scalar.

        embedding_std: mean over dimensions of the std of z / |z|; healthy is 1/sqrt(D).
        alignment: mean cosine of prediction p1 and target t2.
        embedding_norm: root of the mean |z|^2.
        mean_share: |mean z|^2 / mean |z|^2, 1 where all embeddings are one.
        norm_spread: 95th percentile of |z| over its median; a raw C belongs to the long ones.
        prediction_norm: median |p| / |z|; the isotropic gradient goes with its inverse.
        """
        z_BD = self.z1_BD.float()
        if self.p1_BD is not None:
            p_BD = self.p1_BD.float()
        else:
            assert self.w_DD is not None
            p_BD = z_BD @ self.w_DD
        # a collapsed batch has finite numbers
        z_B = z_BD.norm(dim=1).clamp(min=1e-8)
        return {
            "embedding_std": functional.normalize(z_BD, dim=1).std(0).mean(),
            "alignment": torch.cosine_similarity(p_BD, self.t2_BD.float(), dim=1).mean(),
            "embedding_norm": z_B.square().mean().sqrt(),
            "mean_share": z_BD.mean(0).square().sum() / z_B.square().mean(),
            "norm_spread": z_B.quantile(0.95) / z_B.median(),
            "prediction_norm": (p_BD.norm(dim=1) / z_B).median(),
        }


class Method:
    """Every method of the paper, with an EMA target or without.

    IsoLoss, DirectPred and DirectCopy predict with W = f(C), applied inside the loss. BYOL, SimSiam
    and the linear predictor have predicted before: their loss is the plain one at W = I.

    Args:
        config: the run's.
        online: the forward of the online module.
        target: the EMA target; None without one.
        correlation: C, updated once a call.
        predictor: the trained predictor inside ``online``; None for the closed forms.
    """

    def __init__(
        self,
        config: Config,
        online: Forward,
        target: Branch | None,
        correlation: Correlation,
        predictor: nn.Module | None = None,
    ) -> None:
        self._config = config
        self._online = online
        self._target = target
        self._correlation = correlation
        self._predictor = predictor
        # Costs the fused loss two small products, which take less than the launches of a plain one.
        corr_DD = correlation.corr_DD
        self._identity_DD = torch.eye(len(corr_DD), dtype=corr_DD.dtype, device=corr_DD.device)

    def __call__(self, batch: Batch) -> StepOutput:
        view1, view2 = self._online(batch.x1_BCHW, batch.x2_BCHW)
        z1_BD, z2_BD = view1.z_BD, view2.z_BD

        self._correlation.update(z1_BD.detach(), z2_BD.detach())
        w_DD: Tensor | None
        if view1.p_BD is None or view2.p_BD is None:
            w_DD = applied_DD = self._correlation.predictor()
            q1_BD, q2_BD, p1_BD = z1_BD, z2_BD, None
        else:
            w_DD, applied_DD = self._trained_matrix(), self._identity_DD
            q1_BD, q2_BD, p1_BD = view1.p_BD, view2.p_BD, view1.p_BD.detach()

        if self._target is None:
            t1_BD, t2_BD = z1_BD, z2_BD
        else:
            with torch.no_grad():
                _, t1_BD = self._target(batch.x1_BCHW)
                _, t2_BD = self._target(batch.x2_BCHW)

        loss = 2 * asymmetric_loss_pair(
            q1_BD,
            q2_BD,
            t1_BD.detach(),
            t2_BD.detach(),
            applied_DD,
            metric=self._config.method.metric,
            isotropic=self._config.isotropic,
        )
        probe = probe_loss(view1.logits_BK, view2.logits_BK, batch.y_B)
        return StepOutput(loss, probe, z1_BD.detach(), t2_BD.detach(), w_DD, p1_BD)

    def _trained_matrix(self) -> Tensor | None:
        return self._predictor.weight.detach() if isinstance(self._predictor, nn.Linear) else None


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
    lerp_(list(target.parameters()), list(online.parameters()), weight)
