"""BYOL, SimSiam and the linear predictor: the predictor is a trained network.

Shapes: B images per rank, D embedding dimensions.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from isofast.config.schema import MethodConfig, ProjectorConfig
from isofast.methods.base import PredictorMethod, Views
from isofast.methods.networks import autocast, make_projector


class TrainedPredictor(PredictorMethod):
    """p = predictor(z), by default Linear - BatchNorm - ReLU - Linear as wide as the projector."""

    identity_DD: Tensor

    def __init__(self, config: MethodConfig, projector: ProjectorConfig) -> None:
        super().__init__(config, projector)
        self.predictor = self.make_predictor(projector)
        # the fused loss at W = I is the plain loss: two small matmuls cost less than its launches
        self.register_buffer("identity_DD", torch.eye(projector.output), persistent=False)

    def make_predictor(self, projector: ProjectorConfig) -> nn.Module:
        """Return the network z_BD -> p_BD."""
        return make_projector(projector.output, projector)

    def predict(self, views: Views) -> tuple[Tensor, Tensor, Tensor]:
        return self._of(views.z1_BD), self._of(views.z2_BD), self.identity_DD

    def _of(self, z_BD: Tensor) -> Tensor:
        # one context per view: a shared one would add both views' gradients in z's precision
        with autocast(z_BD, z_BD.dtype):
            p_BD: Tensor = self.predictor(z_BD)
        return p_BD


class BYOL(TrainedPredictor):
    """A trained two-layer predictor; Grill et al.: Bootstrap your own latent (NeurIPS 2020)."""


class SimSiam(TrainedPredictor):
    """BYOL without EMA, as in the paper's tables (after Chen and He, CVPR 2021)."""

    class Config(TrainedPredictor.Config):
        """BYOL without an EMA target."""

        ema: Literal[False] = False
        """Always false: with an EMA target this is byol."""


class Linear(TrainedPredictor):
    """A matrix without bias, as in the paper's theory and Figure 4."""

    def make_predictor(self, projector: ProjectorConfig) -> nn.Module:
        return nn.Linear(projector.output, projector.output, bias=False)

    def matrix(self) -> Tensor:
        assert isinstance(self.predictor, nn.Linear)
        return self.predictor.weight.detach()
