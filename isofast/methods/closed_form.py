"""IsoLoss, DirectPred and DirectCopy: the predictor is W = f(C), a power of the correlation matrix.

Implicit variance regularization in non-contrastive SSL (Halvagal, Laborieux, Zenke, NeurIPS 2023).
Shapes: B images per rank, D embedding dimensions.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from isofast.methods.base import PredictorMethod, Views
from isofast_kernels import matrix_power


class ClosedForm(PredictorMethod):
    """p = W z with W = (C / lambda_max(C) + eps I)^alpha."""

    class Config(PredictorMethod.Config):
        """A predictor computed from C."""

        decay: float = Field(
            default_factory=lambda data: 0.998 if data.get("ema", True) else 0.5, ge=0, lt=1
        )
        """EMA decay of C per step. Preset: 0.998 with EMA, as in the paper; 0.5 without, as in the
        released code. In short runs and on other pictures, which take C of directions: 0.9 with
        EMA; 0, C of the batch alone, for image folders and, without EMA, all but the digits."""
        alpha: float = Field(0.5, gt=0)
        """Power of the correlation matrix."""
        normalize: Literal["spectral", "none"] = Field(
            default_factory=lambda data: "none" if data.get("metric") == "euclidean" else "spectral"
        )
        """Whether to divide C by its largest eigenvalue. Preset: none for the Euclidean losses,
        which regularise "around one"."""
        eps: float = Field(default_factory=lambda data: _eps_of(data), ge=0)
        """Shift added to the (normalised) eigenvalues before the power. Preset: 0.25 at alpha 1
        with normalised eigenvalues, else 0."""

    config: Config

    @torch.no_grad()
    def predictor(self) -> Tensor:
        """Return the symmetric W, fp32 (D, D)."""
        config = self.config
        return matrix_power(
            self.correlation.corr_DD, config.alpha, eps=config.eps, normalize=config.normalize
        )

    def predict(self, views: Views) -> tuple[Tensor, Tensor, Tensor]:
        return views.z1_BD, views.z2_BD, self.predictor()


class IsoLoss(ClosedForm):
    """The paper's method: every eigenvalue's gradient loses its factor lambda^alpha."""

    isotropic = True


class DirectPred(ClosedForm):
    """The plain loss, with a power of C as the predictor.

    Tian, Chen, Ganguli: Understanding self-supervised learning dynamics (ICML 2021).
    """


class DirectCopy(ClosedForm):
    """Wang et al.: Towards demystifying representation learning with SSL (2021)."""

    class Config(ClosedForm.Config):
        """The plain loss, with C itself as the predictor."""

        alpha: float = Field(1.0, gt=0)
        """Power of the correlation matrix."""


def _eps_of(data: dict[str, Any]) -> float:
    # the released code shifts only at alpha 1, the paper's Eq. 1 never; without normalisation a
    # shift would move "around one" to 0.75
    return 0.25 if data.get("alpha") == 1 and data.get("normalize") == "spectral" else 0.0
