"""SIGReg: views agree, and embeddings follow a standard normal along every direction.

Balestriero, LeCun: LeJEPA: provable and scalable self-supervised learning without the heuristics
(2025). Shapes: V views of B images per rank, D embedding dimensions, A directions, K knots.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from isofast.config.schema import MethodConfig, ProjectorConfig, Share
from isofast.distributed import world_size
from isofast.methods.base import Method, Views
from isofast.methods.batch_norm import mean_over_ranks


class SIGReg(Method):
    """(1 - weight) mean (z_v - mean_v z)^2 + weight S, with S the statistic of ``normality``.

    No predictor, target network or stop-gradient. A step's directions depend only on the run's
    seed and the step, and are the same on all ranks.
    """

    class Config(Method.Config):
        """Prediction of the mean view, and a test of normality along random directions."""

        ema: Literal[False] = False
        """Always false: there is no target network."""
        weight: Share = 0.05
        """Weight lambda of the test. The prediction error, a mean over images, views and
        dimensions, has weight 1 - lambda."""
        directions: int = Field(256, ge=1)
        """Number of random directions, redrawn every step."""
        knots: int = Field(17, ge=2)
        """Points of the trapezoidal rule, evenly spaced from 0 to method.limit."""
        limit: float = Field(3.0, gt=0)
        """Upper limit of the integral over the characteristic function, in units of 1/z."""

    config: Config
    t_K: Tensor
    w_K: Tensor
    step: Tensor
    seed: Tensor
    _terms: dict[str, Tensor]

    def __init__(self, config: MethodConfig, projector: ProjectorConfig) -> None:
        super().__init__(config, projector)
        t_K = torch.linspace(0, self.config.limit, self.config.knots)
        # the integrand is even: twice the integral from 0
        w_K = torch.full_like(t_K, 2 * self.config.limit / (self.config.knots - 1))
        w_K[0], w_K[-1] = w_K[0] / 2, w_K[-1] / 2
        self.register_buffer("t_K", t_K, persistent=False)
        self.register_buffer("w_K", w_K, persistent=False)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seed", torch.randint(2**62, ()))

    def loss(self, views: Views) -> Tensor:
        """Return the weighted sum of both terms, fp32."""
        z_VBD = torch.stack([views.z1_BD, views.z2_BD]).float()
        prediction = (z_VBD - z_VBD.mean(0)).square().mean()
        a_AD = directions(self.seed, self.step, self.config.directions, z_VBD.shape[2])
        test = normality(z_VBD, a_AD, self.t_K, self.w_K)
        # a tensor on the device, so that each replay of a CUDA graph draws new directions
        self.step += 1
        z1_BD, z2_BD = z_VBD.detach()
        alignment = functional.cosine_similarity(z1_BD, z2_BD, dim=1).mean()
        terms = {"alignment": alignment, "prediction_loss": prediction, "sigreg": test}
        self._terms = {name: term.detach() for name, term in terms.items()}
        return (1 - self.config.weight) * prediction + self.config.weight * test

    def scalars(self) -> dict[str, Tensor]:
        """Return both terms and the mean cosine similarity of the views."""
        return self._terms


def normality(z_VBD: Tensor, a_AD: Tensor, t_K: Tensor, w_K: Tensor) -> Tensor:
    """Return the Epps-Pulley statistic N T of x = a.z, averaged over views and directions.

    T = integral of |mean over N of exp(i t x) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt, over the N rows
    of all ranks. For a normal its mean is about 1.05 for any N; for a single point it grows with N.

    Args:
        z_VBD: embeddings, differentiable on all ranks.
        a_AD: unit vectors, the same on all ranks.
        t_K, w_K: knots and weights of the quadrature.

    Returns:
        A scalar, the same on all ranks.
    """
    tx_VBAK = (z_VBD @ a_AD.T)[..., None] * t_K
    parts = torch.stack([tx_VBAK.cos().mean(1), tx_VBAK.sin().mean(1)])
    if world_size() > 1:
        parts = mean_over_ranks(parts)
    normal_K = (-t_K.square() / 2).exp()
    gap_VAK = (parts[0] - normal_K).square() + parts[1].square()
    rows = z_VBD.shape[1] * world_size()
    return rows * (gap_VAK @ (w_K * normal_K)).mean()


def directions(seed: Tensor, step: Tensor, count: int, dim: int) -> Tensor:
    """Return random unit vectors a_AD, fp32, uniform on the sphere, from the arguments alone.

    torch's generators have state that other layers advance and that a CUDA graph may not set, so
    each number is a hash of its position (splitmix64), turned into a normal by Box-Muller.

    Args:
        seed, step: int64 scalars on the device.
        count, dim: A and D.
    """
    place_AD = torch.arange(count * dim, device=step.device).view(count, dim)
    bits_AD = _mix(_mix(seed + step) + place_AD)
    high_AD, low_AD = (((bits_AD >> shift) & 0xFFFFFFFF) + 0.5 for shift in (32, 0))
    radius_AD = (-2 * (high_AD * 2.0**-32).log()).sqrt()
    return functional.normalize(radius_AD * (low_AD * (2 * math.pi * 2.0**-32)).cos(), dim=1)


def _mix(x: Tensor) -> Tensor:
    """Return splitmix64's hash (Steele, Lea, Flood, 2014); int64 products wrap like uint64's."""
    x = x * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Return the logical right shift x >>> by."""
    return (x >> by) & ((1 << (64 - by)) - 1)
