"""The paper's toy networks: one layer V, whose spectrum is followed through gradient descent.

P is Halvagal, Laborieux, Zenke (NeurIPS 2023). With x1 ~ N(0, I) and x2 = x1 + 0.1 n, the views'
embeddings are z1 = V x1 and z2 = V x2, and the predictor W = V V^T (alpha = 1, no normalisation) is
held constant in every gradient. The linear Euclidean gradients are population gradients:

- Euclidean:                   dV = W (W - I) V
- iso Euclidean:               dV = (W - I) V
- without stop-gradient:       dV = ((W - I)^2 + 0.01 I) V
- without predictor (W = I):   dV = 0

so under V' = -eta dV an eigenvalue lambda = s^2 of V V^T, with s a singular value of V, follows

- Euclidean:        s' = eta lambda (1 - lambda) s,    lambda' = 2 eta lambda^2 (1 - lambda)
- iso Euclidean:    s' = eta (1 - lambda) s,           lambda' = 2 eta lambda (1 - lambda)

These are the paper's rates eta lambda (1 - lambda) and eta (1 - lambda) for an embedding component;
lambda, its square, moves at twice the rate. A Euclidean ReLU network without predictor drifts
outwards, dV = -c V (`RELU_DRIFT`). All other gradients are sampled.

Shape letters: S initialisations, B samples, N inputs, M outputs, P points, T recorded steps.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isofast.errors import RunError, UserError
from isofast_kernels.reference import (
    NORM_FLOOR,
    losses_and_gradients_reference,
    two_sided_gradients_reference,
)

NOISE = 0.1
"""Standard deviation of x2 - x1."""
RELU_DRIFT = (NOISE - math.atan(NOISE)) / (2 * math.pi)
"""c = E[relu(r) 1[u > 0] u] - E[relu(u)^2] for u ~ N(0, 1) and r = u + NOISE n (Cho and Saul 2009):
the noisy view is longer on average, so without a predictor z1 grows to follow it."""
SHORTEST = 0.1
"""Samples of a ReLU network shorter than this, relative to the root mean square, are left out of
the iso cosine loss (`_has_direction`): 6 % of those with a cosine in the plane at the start, 0.6 %
in the spectrum. The plane's trace, from the V of seed 0, ends at 0.60, 0.61 and 0.63 with 0.2, 0.1
and 0.05; with 0.01 it grows without bound."""
INITIAL_SCALE = 0.25
"""Standard deviation of V's initial elements."""


@dataclass(frozen=True, kw_only=True)
class Toy:
    """One linear or ReLU layer trained without labels (P Section 4, Fig. 2, 5 and 6).

    Attributes:
        loss: "euclidean", "iso_euclidean", "cosine" or "iso_cosine" (P Table 1).
        stop_gradient: hold the target constant.
        predictor: W = V V^T; without, W = I.
        relu: z = relu(V x) instead of V x.
        paper_gradient: for the cosine without stop-gradient, use the form printed in P App. C.2
            instead of the derivative.
        inputs: N, the length of x.
        outputs: M, the length of z.
        steps: steps of gradient descent; None for 1,500, or 100,000 without predictor.
        samples: fresh pairs of views per step, if the population gradient has no closed form.
        lr: learning rate; None for 0.1, or 0.01 for the Euclidean losses with a predictor.
        seed: seed of the initialisation and the samples.

    Raises:
        UserError: a value is out of range, or two values are incompatible.
    """

    loss: str = "euclidean"
    stop_gradient: bool = True
    predictor: bool = True
    relu: bool = False
    paper_gradient: bool = False
    inputs: int = 15
    outputs: int = 10
    steps: int | None = None
    samples: int = 1000
    lr: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {"inputs": (1, 10**4), "outputs": (1, 10**4), "samples": (1, 10**7)}
        for name, (low, high) in (ranges | {"steps": (0, 10**9), "seed": (0, 2**63 - 1)}).items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"{name}: got {value}; give a number from {low} to {high:,}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise UserError(f"lr: got {self.lr}; give a finite number above 0, such as 0.01")
        if self.isotropic and not (self.stop_gradient and self.predictor):
            raise UserError(
                f"loss: got {self.loss!r}, which needs both stop-gradient and predictor. Use "
                f"{self.metric!r} for this ablation"
            )
        if self.paper_gradient and (self.stop_gradient or self.metric != "cosine"):
            raise UserError(
                "paper_gradient: the paper's derivative differs from the true one only for loss "
                "'cosine' without stop-gradient; add --no-stop-gradient, or drop --paper-gradient"
            )

    @property
    def metric(self) -> str:
        """ "euclidean" or "cosine"."""
        return self.loss.removeprefix("iso_")

    @property
    def isotropic(self) -> bool:
        """Whether the loss is an IsoLoss."""
        return self.loss.startswith("iso_")

    @property
    def default_steps(self) -> int:
        """``steps``, or the number in the paper's figures for this loss."""
        default = 1500 if self.predictor else 100_000
        return default if self.steps is None else self.steps

    @property
    def default_lr(self) -> float:
        """``lr``, or the one in the paper's figures of spectra for this loss."""
        default = 0.01 if self.metric == "euclidean" and self.predictor else 0.1
        return default if self.lr is None else self.lr

    @property
    def matrix(self) -> str:
        """The matrix whose eigenvalues are recorded."""
        return "E[z z^T], z = relu(V x)" if self.relu else "V V^T"

    def __str__(self) -> str:
        """Return a description of the network."""
        target = "" if self.stop_gradient else " without stop-gradient"
        form = " (the paper's form, not the derivative)" if self.paper_gradient else ""
        predictor = "" if self.predictor else " without predictor"
        kind = "ReLU" if self.relu else "linear"
        return f"{self.loss}{target}{form}{predictor}, {kind} {self.inputs} -> {self.outputs}"


@dataclass(frozen=True)
class Trajectory:
    """A recorded simulation, from the start to the last step.

    Attributes:
        steps: (T,), the recorded steps.
        eigenvalues: (T, S, M), of ``toy.matrix``, descending.
        weight_eigenvalues: (T, S, M), of V V^T, descending; the same for linear networks.
        points: (T, S, P, M), embeddings of the given points.
    """

    steps: NDArray[np.int64]
    eigenvalues: NDArray[np.float64]
    weight_eigenvalues: NDArray[np.float64]
    points: NDArray[np.float64]


def initial_weights(toy: Toy) -> Tensor:
    """Return V of one initialisation, (1, M, N), float64, from randn / 4."""
    return INITIAL_SCALE * randn((1, toy.outputs, toy.inputs), stream(toy.seed, 0))


def simulate(
    toy: Toy,
    v_SMN: Tensor | None = None,
    *,
    points_PN: Tensor | None = None,
    records: int = 2,
) -> Trajectory:
    """Run gradient descent from ``v_SMN``, all initialisations at once on the same samples.

    Args:
        toy: the network and its loss.
        v_SMN: initial weights (S, M, N), float64; by default `initial_weights`.
        points_PN: inputs (P, N), float64, whose embeddings are recorded.
        records: number of steps to record, from the first to the last; at most all of them.

    Returns:
        The trajectory, the same for the same seed on the same machine.

    Raises:
        RunError: V is not finite.
    """
    v_SMN = initial_weights(toy) if v_SMN is None else v_SMN
    points_PN = v_SMN.new_zeros(0, toy.inputs) if points_PN is None else points_PN
    generator = stream(toy.seed, 1)
    steps = np.unique(np.linspace(0, toy.default_steps, max(records, 2)).round().astype(np.int64))
    wanted = set(steps.tolist())
    correlations, grams, points = [], [], []
    for step in range(toy.default_steps + 1):
        if step > 0:
            v_SMN = v_SMN - toy.default_lr * population_gradient(toy, v_SMN, generator)
        if step in wanted:
            if not v_SMN.isfinite().all():
                raise RunError(
                    f"the weights are not finite at step {step:,}: lr {toy.default_lr:g} is too "
                    "large; give a smaller --lr"
                )
            correlations.append(correlation(toy, v_SMN))
            grams.append(v_SMN @ v_SMN.mT)
            points.append(embed(toy, points_PN, v_SMN))
    spectra, weight_spectra = (
        torch.linalg.eigvalsh(torch.stack(matrices)).flip(-1).clamp_min(0).numpy()
        for matrices in (correlations, grams)
    )
    return Trajectory(steps, spectra, weight_spectra, torch.stack(points).numpy())


def population_gradient(toy: Toy, v_SMN: Tensor, generator: torch.Generator) -> Tensor:
    """Return dV (S, M, N), in closed form if there is one, else from ``toy.samples`` pairs."""
    drifts = toy.relu and toy.stop_gradient and not toy.predictor
    if toy.metric != "euclidean" or (toy.relu and not drifts):
        return sampled_gradient(toy, v_SMN, generator)
    if drifts:
        # each row of V independently and, by symmetry, along itself
        return -RELU_DRIFT * v_SMN
    w_SMM = _predictor(toy, v_SMN)
    # E x1 x1^T = E x2 x1^T = I
    error_SMN = w_SMM @ v_SMN - v_SMN
    dv_SMN = error_SMN if toy.isotropic else w_SMM @ error_SMN
    if not toy.stop_gradient:
        # E x2 x2^T = (1 + NOISE^2) I, only in the target's own term
        dv_SMN = dv_SMN - error_SMN + NOISE**2 * v_SMN
    return dv_SMN


def sampled_gradient(toy: Toy, v_SMN: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradient with respect to V (S, M, N), averaged over ``toy.samples`` view pairs.

    All initialisations see the same pairs.
    """
    x1_BN = randn((toy.samples, toy.inputs), generator)
    x2_BN = x1_BN + NOISE * randn((toy.samples, toy.inputs), generator)
    z_SBM, t_SBM = embed(toy, x1_BN, v_SMN), embed(toy, x2_BN, v_SMN)
    w_SMM = _predictor(toy, v_SMN)
    if toy.stop_gradient:
        _, dz_SBM = losses_and_gradients_reference(
            z_SBM, t_SBM, w_SMM, metric=toy.metric, isotropic=toy.isotropic
        )
        sides = [(dz_SBM, z_SBM, x1_BN)]
    else:
        dz_SBM, dt_SBM = two_sided_gradients_reference(
            z_SBM, t_SBM, w_SMM, metric=toy.metric, paper_gradient=toy.paper_gradient
        )
        sides = [(dz_SBM, z_SBM, x1_BN), (dt_SBM, t_SBM, x2_BN)]
    dv_SMN = torch.zeros_like(v_SMN)
    counts_SB1 = _has_direction(toy, z_SBM @ w_SMM, t_SBM)
    for gradient_SBM, out_SBM, x_BN in sides:
        if toy.relu:
            gradient_SBM = torch.where((out_SBM > 0) & counts_SB1, gradient_SBM, 0.0)
        dv_SMN += gradient_SBM.mT @ x_BN / len(x_BN)
    return dv_SMN


def _has_direction(toy: Toy, *sides: Tensor) -> Tensor:
    """Return whether a ReLU network's samples count, (S, B, 1), given predictions and targets.

    A ReLU that silences all outputs but one makes short embeddings frequent. Below the norm floor
    the clamped gradient of the cosine, about 1e8, points along them: one such sample would throw V
    off for good. IsoLoss needs the larger bound `SHORTEST`: with one output u left, |g| scales as
    1 / u and u has a density at 0, so E|g| does not exist; the plain cosine has W g = 0 there. The
    paper's form without stop-gradient has no mean either, but it is not a gradient to repair.
    """
    if not toy.relu or toy.metric == "euclidean":
        return torch.tensor(True)
    shortest = SHORTEST if toy.isotropic else 0.0
    lengths_2SB1 = torch.stack([x_SBM.norm(dim=-1, keepdim=True) for x_SBM in sides])
    rms_2S11 = lengths_2SB1.square().mean(-2, keepdim=True).sqrt()
    return (lengths_2SB1 > (shortest * rms_2S11).clamp_min(NORM_FLOOR)).all(0)


def embed(toy: Toy, x_BN: Tensor, v_SMN: Tensor) -> Tensor:
    """Return the embeddings (S, B, M) of inputs (B, N)."""
    z_SBM = x_BN @ v_SMN.mT
    return z_SBM.relu() if toy.relu else z_SBM


def correlation(toy: Toy, v_SMN: Tensor) -> Tensor:
    """Return E[z z^T] over x ~ N(0, I), (S, M, M): V V^T, or its ReLU counterpart.

    For two rows v, u of V at an angle theta, E[relu(v.x) relu(u.x)] =
    |v| |u| (sin theta + (pi - theta) cos theta) / (2 pi) (Cho and Saul 2009, Eq. 6).
    """
    gram_SMM = v_SMN @ v_SMN.mT
    if not toy.relu:
        return gram_SMM
    norm_SM = gram_SMM.diagonal(dim1=-2, dim2=-1).sqrt()
    norms_SMM = norm_SM[..., :, None] * norm_SM[..., None, :]
    cosine_SMM = (gram_SMM / norms_SMM.clamp_min(torch.finfo(gram_SMM.dtype).tiny)).clamp(-1, 1)
    theta_SMM = cosine_SMM.arccos()
    kernel_SMM = theta_SMM.sin() + (math.pi - theta_SMM) * cosine_SMM
    return norms_SMM * kernel_SMM / (2 * math.pi)


def _predictor(toy: Toy, v_SMN: Tensor) -> Tensor:
    return v_SMN @ v_SMN.mT if toy.predictor else torch.eye(toy.outputs, dtype=v_SMN.dtype)


def stream(seed: int, index: int) -> torch.Generator:
    """Return one of a seed's independent random number streams.

    Index 0 is for the initial weights, 1 for the samples, 2 and more for other draws.
    """
    state = np.random.SeedSequence([seed, index]).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def randn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return standard normal float64 values, drawn in float32, which is four times as fast."""
    return torch.randn(shape, generator=generator, dtype=torch.float32).double()
