"""VICReg as a custom method: `--set method.name=vicreg:VICReg`, with this file's folder as the
working directory (or on PYTHONPATH).

Bardes, Ponce, LeCun: VICReg: variance-invariance-covariance regularization (ICLR 2022).
"""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from isofast.methods import Method, Views


class VICReg(Method):
    """Aligns the views, keeps up the variance of each dimension, and decorrelates dimensions."""

    class Config(Method.Config):
        """The weights of the three terms."""

        invariance: float = Field(25.0, ge=0)
        """Weight of the mean squared distance between the views."""
        variance: float = Field(25.0, ge=0)
        """Weight of the hinge that keeps each dimension's standard deviation above 1."""
        covariance: float = Field(1.0, ge=0)
        """Weight of the squared covariances between dimensions."""

    config: Config

    def loss(self, views: Views) -> Tensor:
        """Return the weighted sum of the three terms in fp32."""
        z1_BD, z2_BD = views.z1_BD.float(), views.z2_BD.float()
        invariance = functional.mse_loss(z1_BD, z2_BD)
        variance = sum(_hinge(z_BD) for z_BD in (z1_BD, z2_BD)) / 2
        covariance = sum(_covariance(z_BD) for z_BD in (z1_BD, z2_BD))
        self._terms = {"variance_loss": variance.detach(), "covariance_loss": covariance.detach()}
        return (
            self.config.invariance * invariance
            + self.config.variance * variance
            + self.config.covariance * covariance
        )

    def scalars(self) -> dict[str, Tensor]:
        """Return the last step's terms for metrics.jsonl."""
        return self._terms


def _hinge(z_BD: Tensor) -> Tensor:
    return functional.relu(1 - torch.sqrt(z_BD.var(0) + 1e-4)).mean()


def _covariance(z_BD: Tensor) -> Tensor:
    cov_DD = torch.cov(z_BD.T)
    return (cov_DD.square().sum() - cov_DD.diagonal().square().sum()) / len(cov_DD)
