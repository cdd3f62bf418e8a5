"""C's spectrum: effective ranks, and the alignment of a trained linear predictor with it.

Computed in float64, stored as float32. Shapes: D embedding dimensions.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of C = U diag(lambda) U^T, and a linear predictor's alignment with U."""

    eigenvalues_D: Array
    """Descending, clamped at 0, float32; NaN if C is not finite."""
    alignment_D: Array | None = None
    """cos(W u_i, u_i), in the order of the eigenvalues, float32; None without a linear W."""

    @property
    def effective_rank(self) -> float:
        """Participation ratio."""
        return effective_rank(self.eigenvalues_D)

    @property
    def effective_rank_entropy(self) -> float:
        """exp(-sum p log p) with p = lambda / sum lambda: D if all eigenvalues are equal.

        Never below the participation ratio: small eigenvalues count for more.
        """
        values_D = self.eigenvalues_D.astype(np.float64)
        if not np.isfinite(values_D).all():
            return float("nan")
        used = values_D[values_D > 0]
        p = used / used.sum()
        return float(np.exp(-(p * np.log(p)).sum())) if len(used) else 0.0

    @property
    def predictor_alignment(self) -> float | None:
        """Mean alignment, weighted by the eigenvalues because eigenvectors of small ones are
        arbitrary; None without a linear predictor."""
        if self.alignment_D is None:
            return None
        weights_D = self.eigenvalues_D.astype(np.float64)
        total = weights_D.sum()
        return float(weights_D @ self.alignment_D / total) if total != 0 else 0.0


@torch.no_grad()
def measure(corr_DD: Tensor, w_DD: Tensor | None = None) -> Spectrum:
    """Return the spectrum of C and, with ``w_DD``, the predictor's alignment with it.

    The alignment is cos(W u_i, u_i) = u_i^T W u_i / |W u_i|, P Fig. 4 (after Tian et al., 2021): 1
    if u_i is an eigenvector of W with a positive eigenvalue (so for any W = f(C)), -1 with a
    negative one, 0 if W u_i = 0. A random W gives 0 on average, with a spread of 1/sqrt(D).

    Args:
        corr_DD: C, symmetric (D, D), any dtype, on the CPU.
        w_DD: the weight (D, D) of a trained linear predictor p = W z; need not be symmetric.
    """
    corr_DD = corr_DD.double()
    if not torch.isfinite(corr_DD).all():
        lost_D = np.full(len(corr_DD), np.nan, dtype=np.float32)
        return Spectrum(lost_D, None if w_DD is None else lost_D)
    if w_DD is None:
        return Spectrum(_kept(torch.linalg.eigvalsh(corr_DD).flip(0).clamp(min=0)))
    eigenvalues_D, u_DD = torch.linalg.eigh(corr_DD)
    u_DD = u_DD.flip(1)
    moved_DD = w_DD.double() @ u_DD
    norm_D = moved_DD.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    cos_D = ((u_DD * moved_DD).sum(0) / norm_D).clamp(-1, 1)
    return Spectrum(_kept(eigenvalues_D.flip(0).clamp(min=0)), _kept(cos_D))


def effective_rank(eigenvalues_D: npt.ArrayLike) -> float:
    """Return the participation ratio (sum lambda)^2 / sum lambda^2: D if all are equal."""
    values_D = np.asarray(eigenvalues_D, dtype=np.float64)
    squares = np.square(values_D).sum()
    # inf / inf is NaN, as it should be
    with np.errstate(invalid="ignore"):
        return float(np.square(values_D.sum()) / squares) if squares != 0 else 0.0


def _kept(values_D: Tensor) -> Array:
    kept: Array = values_D.float().numpy()
    return kept
