"""The base of every method, built in or your own.

Shapes: B images a rank, D embedding dimensions.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from isofast.config.schema import MethodConfig, ProjectorConfig
from isofast.methods.correlation import Correlation


@dataclass(frozen=True)
class Views:
    """The embeddings of a step's two views, each (B, D) in the networks' precision."""

    z1_BD: Tensor
    """Online, neither normalised nor centred; differentiable."""
    z2_BD: Tensor
    t1_BD: Tensor
    """Targets, without gradient: the EMA network's, or z1 where there is none."""
    t2_BD: Tensor


class Method(nn.Module):
    """Makes the loss of two views. A subclass implements ``loss``; the rest is optional.

    Parameters that it registers are trained, their gradients averaged over the ranks; they and
    its buffers are saved with the run. Encoder, EMA target, probe, evaluation and records are the
    run's.

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
        """The loss of a step, a scalar; gradients flow through z1 and z2."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Called after the optimizer's step, with the share of the run before it, in [0, 1)."""

    def scalars(self) -> dict[str, Tensor]:
        """What the record of the last step says beside the loss, each a scalar on the device.

        ``alignment``, where it is among them, is the mean cosine of prediction and target.
        """
        return {}

    def matrix(self) -> Tensor | None:
        """A trained (D, D) predictor, p = W z, whose alignment with C is recorded; else None."""
        return None

    def describe(self) -> str:
        """The settings, in a few words for the first line of a run."""
        return f"{'EMA target' if self.config.ema else 'no EMA'}, C of {self.config.correlation}"


@torch.no_grad()
def prediction_scalars(z_BD: Tensor, p_BD: Tensor, t_BD: Tensor) -> dict[str, Tensor]:
    """How predictions lie to embeddings and targets, each (B, D).

    alignment: mean cosine of p and t.
    prediction_norm: median |p| / |z|; the isotropic gradient goes with its inverse.
    """
    z_BD, p_BD, t_BD = z_BD.float(), p_BD.float(), t_BD.float()
    # a collapsed batch has finite numbers
    z_B = z_BD.norm(dim=1).clamp(min=1e-8)
    return {
        "alignment": torch.cosine_similarity(p_BD, t_BD, dim=1).mean(),
        "prediction_norm": (p_BD.norm(dim=1) / z_B).median(),
    }
