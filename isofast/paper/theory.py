"""The paper's toy networks: one layer V, its spectrum followed through gradient descent.

P is Halvagal, Laborieux, Zenke (NeurIPS 2023). With x1 ~ N(0, I) and x2 = x1 + 0.1 n, the views'
embeddings are z1 = V x1 and z2 = V x2, the predictor is W = V V^T (alpha = 1, no normalisation),
held constant in every gradient. The linear Euclidean gradients are those of the population:

- Euclidean:                   dV = W (W - I) V
- iso Euclidean:               dV = (W - I) V
- without stop-gradient:       dV = ((W - I)^2 + 0.01 I) V
- without predictor (W = I):   dV = 0

so that an eigenvalue lambda = s^2 of V V^T, s a singular value of V, follows under V' = -eta dV

- Euclidean:        s' = eta lambda (1 - lambda) s,    lambda' = 2 eta lambda^2 (1 - lambda)
- iso Euclidean:    s' = eta (1 - lambda) s,           lambda' = 2 eta lambda (1 - lambda)

which are the paper's rates eta lambda (1 - lambda) and eta (1 - lambda) of an embedding's
component; lambda, being its square, moves at twice the rate. A Euclidean ReLU network without
predictor drifts outwards, dV = -c V (`RELU_DRIFT`). All other gradients are sampled.

Shape letters: S initialisations, B samples, N inputs, M outputs, P points, T recorded steps.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isofast.errors import RunError, UserError
from isofast.paper.toy import Toy
from isofast_kernels.reference import (
    NORM_FLOOR,
    losses_and_gradients_reference,
    two_sided_gradients_reference,
)

NOISE = 0.1
"""Standard deviation of what tells view 2 from view 1."""
RELU_DRIFT = (NOISE - math.atan(NOISE)) / (2 * math.pi)
"""c = E[relu(r) 1[u > 0] u] - E[relu(u)^2] for u ~ N(0, 1) and r = u + NOISE n: the noisy view is
longer in the mean, so that without a predictor z1 grows after it, by NOISE^3 / (6 pi) a unit of
time. The first mean is one of Cho and Saul's (2009), for the angle atan(NOISE) between u and r."""
SHORTEST = 0.1
"""Of the root mean square: below it a ReLU network's sample does not count in the iso cosine loss,
whose mean needs such a bound (`_has_direction`). At the start that is 4 % of the samples with
defined cosine in the plane, 0.6 % in the spectrum. In the plane it decides the end: from the V of
seed 0 a trace of 0.60, 0.61 and 0.63 with 0.2, 0.1 and 0.05; with 0.01 the two rows of V are
driven apart, to a trace of 5.6 that still grows."""
INITIAL_SCALE = 0.25
"""Standard deviation of V's elements at the start."""


@dataclass(frozen=True)
class Trajectory:
    """What was recorded of a simulation; the first record is the start, the last the end.

    Attributes:
        steps: (T,), the steps recorded.
        eigenvalues: (T, S, M), of ``toy.matrix``, descending.
        weight_eigenvalues: (T, S, M), of V V^T, descending; the same for linear networks.
        points: (T, S, P, M), the embeddings of the points given.
        weights: (S, M, N), the last V.
    """

    steps: NDArray[np.int64]
    eigenvalues: NDArray[np.float64]
    weight_eigenvalues: NDArray[np.float64]
    points: NDArray[np.float64]
    weights: NDArray[np.float64]


def initial_weights(toy: Toy) -> Tensor:
    """V_SMN of one initialisation, S = 1, float64, from randn / 4."""
    shape = (1, toy.outputs, toy.inputs)
    return INITIAL_SCALE * randn(shape, stream(toy.seed, 0))


def simulate(
    toy: Toy,
    v_SMN: Tensor | None = None,
    *,
    points_PN: Tensor | None = None,
    records: int = 2,
) -> Trajectory:
    """Follows gradient descent from ``v_SMN``, all initialisations at once and on the same samples.

    Args:
        toy: which loss, for how long.
        v_SMN: initial weights (S, M, N), float64; those of `initial_weights` if left out.
        points_PN: inputs (P, N), float64, whose embeddings are recorded.
        records: how many steps to record, from the first to the last; all, if more than there are.

    Returns:
        The recorded trajectory, the same for the same seed on the same machine.

    Raises:
        RunError: V left the finite numbers.
        UserError: the sizes of ``toy`` do not fit into memory.
    """
    with _memory_for(toy):
        return _follow(toy, v_SMN, points_PN, records)


def _follow(toy: Toy, v_SMN: Tensor | None, points_PN: Tensor | None, records: int) -> Trajectory:
    v_SMN = initial_weights(toy) if v_SMN is None else v_SMN
    points_PN = v_SMN.new_zeros(0, toy.inputs) if points_PN is None else points_PN
    generator = stream(toy.seed, 1)
    steps = np.unique(np.linspace(0, toy.default_steps, max(records, 2)).round().astype(np.int64))
    wanted = set(steps.tolist())
    spectra, weight_spectra, points = [], [], []
    for step in range(toy.default_steps + 1):
        if step > 0:
            v_SMN = v_SMN - toy.default_lr * population_gradient(toy, v_SMN, generator)
        if step in wanted:
            if not v_SMN.isfinite().all():
                raise RunError(
                    f"the weights are not finite at step {step:,}: lr {toy.default_lr:g} is too "
                    "large; give a smaller --lr"
                )
            spectra.append(_spectrum(correlation(toy, v_SMN)))
            weight_spectra.append(_spectrum(v_SMN @ v_SMN.mT))
            points.append(embed(toy, points_PN, v_SMN))
    return Trajectory(
        steps=steps,
        eigenvalues=torch.stack(spectra).numpy(),
        weight_eigenvalues=torch.stack(weight_spectra).numpy(),
        points=torch.stack(points).numpy(),
        weights=v_SMN.numpy(),
    )


@contextmanager
def _memory_for(toy: Toy) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # torch has no type for it on the CPU
        if not re.search(r"allocate memory|size calculation overflowed", str(error)):
            raise
        raise UserError(
            f"inputs {toy.inputs:,}, outputs {toy.outputs:,} and samples {toy.samples:,} do not "
            "fit into memory; give smaller ones"
        ) from None


def population_gradient(toy: Toy, v_SMN: Tensor, generator: torch.Generator) -> Tensor:
    """dV_SMN, in closed form where there is one, from ``toy.samples`` fresh pairs elsewhere."""
    return _exact_gradient(toy, v_SMN) if toy.exact else sampled_gradient(toy, v_SMN, generator)


def sampled_gradient(toy: Toy, v_SMN: Tensor, generator: torch.Generator) -> Tensor:
    """The mean over ``toy.samples`` pairs of views of the loss's gradient in V.

    Args:
        toy: which loss.
        v_SMN: the weights, (S, M, N), float64; all initialisations see the same pairs.
        generator: where the pairs come from.

    Returns:
        dV_SMN, (S, M, N), float64.
    """
    x1_BN = randn((toy.samples, toy.inputs), generator)
    x2_BN = x1_BN + NOISE * randn((toy.samples, toy.inputs), generator)
    z_SBM, t_SBM = embed(toy, x1_BN, v_SMN), embed(toy, x2_BN, v_SMN)
    w_SMM = _predictor(toy, v_SMN)
    counts_SB1 = _has_direction(toy, z_SBM @ w_SMM, t_SBM) if toy.relu else None
    if toy.stop_gradient:
        _, dz_SBM = losses_and_gradients_reference(
            z_SBM, t_SBM, w_SMM, metric=toy.metric, isotropic=toy.isotropic
        )
        return _to_weights(dz_SBM, z_SBM, x1_BN, counts_SB1)
    dz_SBM, dt_SBM = two_sided_gradients_reference(
        z_SBM, t_SBM, w_SMM, metric=toy.metric, paper_gradient=toy.paper_gradient
    )
    dv_SMN = _to_weights(dz_SBM, z_SBM, x1_BN, counts_SB1)
    return dv_SMN + _to_weights(dt_SBM, t_SBM, x2_BN, counts_SB1)


def _exact_gradient(toy: Toy, v_SMN: Tensor) -> Tensor:
    """E over the views of the Euclidean gradient; if linear from E x1 x1^T = E x2 x1^T = I."""
    if toy.relu:
        # each row of V by itself, and by symmetry along itself
        return -RELU_DRIFT * v_SMN
    w_SMM = _predictor(toy, v_SMN)
    error_SMN = w_SMM @ v_SMN - v_SMN
    dv_SMN = error_SMN if toy.isotropic else w_SMM @ error_SMN
    if not toy.stop_gradient:
        # E x2 x2^T = (1 + NOISE^2) I, and x2 meets itself in t alone
        dv_SMN = dv_SMN - error_SMN + NOISE**2 * v_SMN
    return dv_SMN


def _to_weights(dz_SBM: Tensor, z_SBM: Tensor, x_BN: Tensor, counts_SB1: Tensor | None) -> Tensor:
    """The mean of dz x^T, through the ReLU where there is one."""
    if counts_SB1 is not None:
        dz_SBM = torch.where((z_SBM > 0) & counts_SB1, dz_SBM, 0.0)
    return dz_SBM.mT @ x_BN / len(x_BN)


def _has_direction(toy: Toy, p_SBM: Tensor, t_SBM: Tensor) -> Tensor:
    """Whether a sample counts, (S, B, 1); for the Euclidean losses every one does.

    A ReLU that silences all outputs but one makes short embeddings frequent. Below the norm floor
    the clamped gradient, of about 1e8, is no longer orthogonal to them: one such sample in ten
    million would throw V off for good, where the derivative of the cosine is zero.

    IsoLoss needs more. With one output u left, g = -sin^2(theta) / (u |W_1|), theta between the
    row W_1 and its axis, and u has a density at 0: with two outputs half of the samples are such,
    E|g| does not exist, and V would leap with the shortest sample met. (The plain cosine has W g
    there, which is 0.) So its samples with |p| or |t| below `SHORTEST` of the batch's root mean
    square are left out. The mean of the others grows as log(1 / SHORTEST). The paper's form
    without stop-gradient has no mean there either, but is no gradient to be mended.
    """
    if toy.metric == "euclidean":
        return torch.ones(1, dtype=torch.bool)
    return _long_enough(toy, p_SBM) & _long_enough(toy, t_SBM)


def _long_enough(toy: Toy, x_SBM: Tensor) -> Tensor:
    length_SB1: Tensor = torch.linalg.vector_norm(x_SBM, dim=-1, keepdim=True)
    if not toy.isotropic:
        return length_SB1 > NORM_FLOOR
    rms_S11 = length_SB1.square().mean(-2, keepdim=True).sqrt()
    return length_SB1 > (SHORTEST * rms_S11).clamp_min(NORM_FLOOR)


def embed(toy: Toy, x_BN: Tensor, v_SMN: Tensor) -> Tensor:
    """The embeddings z_SBM of inputs x_BN."""
    z_SBM = x_BN @ v_SMN.mT
    return z_SBM.relu() if toy.relu else z_SBM


def correlation(toy: Toy, v_SMN: Tensor) -> Tensor:
    """E[z z^T] over x ~ N(0, I), (S, M, M): V V^T, or its ReLU counterpart in closed form.

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
    if toy.predictor:
        return v_SMN @ v_SMN.mT
    return torch.eye(toy.outputs, dtype=v_SMN.dtype)


def _spectrum(matrix_SMM: Tensor) -> Tensor:
    ascending_SM: Tensor = torch.linalg.eigvalsh(matrix_SMM)
    return ascending_SM.flip(-1).clamp_min(0)


def stream(seed: int, index: int) -> torch.Generator:
    """One of the streams of random numbers of a seed; no two have anything to do with each other.

    Args:
        seed: of the simulation.
        index: 0 for the initial weights, 1 for the samples, 2 and more for what others draw.
    """
    state = np.random.SeedSequence([seed, index]).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def randn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal, float64: drawn in float32, which is four times as fast."""
    return torch.randn(shape, generator=generator, dtype=torch.float32).double()
