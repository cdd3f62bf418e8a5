"""The base of every method, built in or your own.

Shapes: B images a rank, D embedding dimensions.
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
    """Targets, without gradient: the EMA network's, or z1 without one."""
    t2_BD: Tensor


class Method(nn.Module):
    """Computes the loss of two views. A subclass implements ``loss``; the rest is optional.

    Parameters it registers are trained, their gradients averaged over the ranks; parameters and
    buffers are saved with the run.

    Args:
        config: the config's method section, an instance of the class's ``Config``.
        projector: its ``output`` is D.

    Attributes:
        config: as given.
        correlation: C of the embeddings, updated before each call of ``loss``.
    """

    Config: TypeAlias = MethodConfig
    config: MethodConfig

    def __init__(self, config: MethodConfig, projector: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        self.correlation = Correlation(projector.output, config)

    def loss(self, views: Views) -> Tensor:
        """Return the loss of a step, a scalar; gradients flow through z1 and z2."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Run after the optimizer's step, at ``progress`` in [0, 1) of the run."""

    def scalars(self) -> dict[str, Tensor]:
        """Return what to record of the last step beside the loss, scalars on the device.

        ``alignment``, if present, is the mean cosine of prediction and target.
        """
        return {}

    def matrix(self) -> Tensor | None:
        """Return a trained (D, D) predictor, p = W z, to record its alignment with C; else None."""
        return None

    def describe(self) -> str:
        """Return the settings in a few words, for the first line of a run."""
        return f"{'EMA target' if self.config.ema else 'no EMA'}, C of {self.config.correlation}"


class PredictorMethod(Method):
    """Predicts each view's target from the other view: 2 (L(p1 -> t2) + L(p2 -> t1)), fp32.

    A subclass implements ``predict``.
    """

    isotropic: ClassVar[bool] = False
    """Whether the gradient in z leaves out the factor W."""

    class Config(Method.Config):
        """What all methods with a predictor have."""

        ema: bool = True
        """Targets from a slowly moving copy of the network; false reuses the online embeddings."""
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
        loss: Tensor = 2 * asymmetric_loss_pair(
            x1_BD,
            x2_BD,
            views.t1_BD,
            views.t2_BD,
            w_DD,
            metric=self.config.metric,
            isotropic=self.isotropic,
        )
        return loss

    @torch.no_grad()
    def scalars(self) -> dict[str, Tensor]:
        """Return the mean cosine of p and t, and the median |p| / |z|, with whose inverse the
        isotropic gradient scales."""
        z_BD, x_BD, w_DD, t_BD = self._last
        p_BD = x_BD.float() @ w_DD
        # a collapsed batch has finite numbers
        z_B = z_BD.float().norm(dim=1).clamp(min=1e-8)
        return {
            "alignment": torch.cosine_similarity(p_BD, t_BD.float(), dim=1).mean(),
            "prediction_norm": (p_BD.norm(dim=1) / z_B).median(),
        }
