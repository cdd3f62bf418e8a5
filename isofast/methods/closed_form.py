"""IsoLoss, DirectPred and DirectCopy: the predictor is W = f(C), a power of the correlation matrix.

Implicit variance regularization in non-contrastive SSL (Halvagal, Laborieux, Zenke, NeurIPS 2023).
Shapes: B images a rank, D embedding dimensions.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from isofast.methods.base import Method, Views, prediction_scalars
from isofast_kernels import asymmetric_loss_pair, matrix_power


class ClosedForm(Method):
    """p = W z with W = ((C / its largest eigenvalue) + eps)^alpha."""

    isotropic: ClassVar[bool] = False
    """Whether the gradient in z leaves out the factor W."""

    class Config(Method.Config):
        """A predictor made of C."""

        ema: bool = True
        """Targets from a slowly moving copy of the network; false reuses the online embeddings."""
        decay: float = Field(
            default_factory=lambda data: 0.998 if data.get("ema", True) else 0.5, ge=0, lt=1
        )
        """Weight kept by the moving average C each step. Preset: 0.998 with EMA, as in the paper,
        and 0.9 with method.correlation directions; 0.5 without, as in the released code."""
        metric: Literal["cosine", "euclidean"] = "cosine"
        """Distance between prediction and target."""
        alpha: float = Field(0.5, gt=0)
        """Power of the correlation matrix."""
        normalize: Literal["spectral", "none"] = Field(
            default_factory=lambda data: "none" if data.get("metric") == "euclidean" else "spectral"
        )
        """Division of C by its largest eigenvalue. Preset: none for the Euclidean losses, which
        regularise "around one"."""
        eps: float = Field(default_factory=lambda data: _eps_of(data), ge=0)
        """Shift of the (normalised) eigenvalues before the power. Preset: 0.25 at alpha 1 where
        they are normalised, else 0."""

    config: Config
    _last: tuple[Tensor, Tensor, Tensor]

    def loss(self, views: Views) -> Tensor:
        """2 (L(z1 -> t2) + L(z2 -> t1)), fp32."""
        w_DD = self.predictor()
        self._last = views.z1_BD.detach(), views.t2_BD, w_DD
        loss: Tensor = 2 * asymmetric_loss_pair(
            views.z1_BD,
            views.z2_BD,
            views.t1_BD,
            views.t2_BD,
            w_DD,
            metric=self.config.metric,
            isotropic=self.isotropic,
        )
        return loss

    @torch.no_grad()
    def predictor(self) -> Tensor:
        """W, symmetric, fp32 (D, D)."""
        config, corr_DD = self.config, self.correlation.corr_DD
        w_DD: Tensor = matrix_power(
            corr_DD, config.alpha, eps=config.eps, normalize=config.normalize
        )
        return w_DD

    def scalars(self) -> dict[str, Tensor]:
        z_BD, t_BD, w_DD = self._last
        return prediction_scalars(z_BD, z_BD.float() @ w_DD, t_BD)

    def describe(self) -> str:
        return f"{self.config.metric}, alpha {self.config.alpha:g}, {super().describe()}"


class IsoLoss(ClosedForm):
    """The paper's: every eigenvalue's gradient loses its factor lambda^alpha."""

    isotropic = True

    class Config(ClosedForm.Config):
        """The isotropic loss with a predictor made of C."""

        name: Literal["isoloss"] = "isoloss"
        """The method."""


class DirectPred(ClosedForm):
    """Tian, Chen, Ganguli: Understanding self-supervised learning dynamics (ICML 2021)."""

    class Config(ClosedForm.Config):
        """The plain loss with a root of C as the predictor."""

        name: Literal["directpred"] = "directpred"
        """The method."""


class DirectCopy(ClosedForm):
    """Wang et al.: Towards demystifying representation learning with SSL (2021)."""

    class Config(ClosedForm.Config):
        """The plain loss with C itself as the predictor."""

        name: Literal["directcopy"] = "directcopy"
        """The method."""
        alpha: float = Field(1.0, gt=0)
        """Power of the correlation matrix."""


def _eps_of(data: dict[str, Any]) -> float:
    """The released code shifts by 0.25 at alpha 1 only. The paper's Eq. 1 has no shift, and without
    normalisation one would move "around one" to 0.75."""
    return 0.25 if data.get("alpha") == 1 and data.get("normalize") == "spectral" else 0.0
