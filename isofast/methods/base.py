"""Base classes of all methods, built-in or your own.

Shapes: B images per rank, D embedding dimensions.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from isofast.config.schema import MethodConfig, ProjectorConfig
from isofast.methods.correlation import Correlation
from isofast_kernels import asymmetric_loss_pair


@dataclass(frozen=True)
class Views:
    """The embeddings of a step's two views, each (B, D) in the networks' precision."""

    z1_BD: Tensor
    """Online, neither normalised nor centred; differentiable."""
    z2_BD: Tensor
    t1_BD: Tensor
    """Targets, without gradient: from the EMA network, or z1 if there is none."""
    t2_BD: Tensor


class Method(nn.Module):
    """Computes the loss of two views. Subclasses implement ``loss``; the rest is optional.

    Registered parameters are trained, with gradients averaged over the ranks; parameters and
    buffers are saved in checkpoints.

    Args:
        config: the config's method section, an instance of the class's ``Config``.
        projector: the config's projector section, whose ``output`` is D.

    Attributes:
        config: the method section.
        correlation: C of the embeddings, updated before each call of ``loss``.
    """

    Config: TypeAlias = MethodConfig
    config: MethodConfig

    def __init__(self, config: MethodConfig, projector: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        self.correlation = Correlation(projector.output, config)

    def loss(self, views: Views) -> Tensor:
        """Return the step's loss, a scalar; gradients flow through z1 and z2."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Hook after the optimizer step; ``progress`` is the fraction of the run, in [0, 1)."""

    def scalars(self) -> dict[str, Tensor]:
        """Return scalars of the last step to record with the loss, on the device.

        ``alignment``, if present, is the mean cosine similarity of prediction and target.
        """
        return {}

    def matrix(self) -> Tensor | None:
        """Return a trained (D, D) W with p = W z, to record its alignment with C, or None."""
        return None


class PredictorMethod(Method):
    """Predicts each view's target from the other view: 2 (L(p1 -> t2) + L(p2 -> t1)), fp32.

    Subclasses implement ``predict``.
    """

    isotropic: ClassVar[bool] = False
    """Whether the gradient with respect to z omits the factor W."""

    class Config(Method.Config):
        """Settings shared by all methods with a predictor."""

        ema: bool = True
        """Take targets from an EMA copy of the network; false uses the online embeddings."""
        metric: Literal["cosine", "euclidean"] = "cosine"
        """Distance between prediction and target."""

    config: Config
    _last: tuple[Tensor, Tensor, Tensor, Tensor]

    def predict(self, views: Views) -> tuple[Tensor, Tensor, Tensor]:
        """Return x1_BD, x2_BD and a symmetric w_DD, fp32; the predictions are x W."""
        raise NotImplementedError

    def loss(self, views: Views) -> Tensor:
        x1_BD, x2_BD, w_DD = self.predict(views)
        self._last = views.z1_BD.detach(), x1_BD.detach(), w_DD, views.t2_BD
        return 2 * asymmetric_loss_pair(
            x1_BD,
            x2_BD,
            views.t1_BD,
            views.t2_BD,
            w_DD,
            metric=self.config.metric,
            isotropic=self.isotropic,
        )

    @torch.no_grad()
    def scalars(self) -> dict[str, Tensor]:
        """Return the mean cosine similarity of p and t, and the median |p| / |z|, with whose
        inverse the isotropic gradient scales."""
        z_BD, x_BD, w_DD, t_BD = self._last
        p_BD = x_BD.float() @ w_DD
        # keep the scalars of a collapsed batch finite
        z_B = z_BD.float().norm(dim=1).clamp(min=1e-8)
        return {
            "alignment": torch.cosine_similarity(p_BD, t_BD.float(), dim=1).mean(),
            "prediction_norm": (p_BD.norm(dim=1) / z_B).median(),
        }
