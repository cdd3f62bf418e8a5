"""Label-free metrics of embeddings (docs/method/metrics.md).

Embeddings are z_NF of N images, or e_NVF of V views of each, with F dimensions, in any float dtype.
All metrics are computed in float64 on the CPU; NaN where one is undefined or the input is not
finite.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from isofast.run.loggers import Record

# RankMe's, added to every p_k
_EPS = 1e-7
# LiDAR's, added to the within-image scatter
_DELTA = 1e-4
# first and last eigenvalue of the power-law fit, counted from 1
FIRST, LAST = 5, 100
# eigenvalues smaller than this, relative to the largest, are rounding errors
_LEAST_SHARE = 1e-10


def label_free(z_NF: Tensor, e_NVF: Tensor) -> Record:
    """Return all metrics, by their names in metrics.jsonl.

    Args:
        z_NF: embeddings of unaugmented images.
        e_NVF: embeddings of augmented views, of the same or other images.
    """
    return {
        "rankme": rankme(z_NF),
        "alpha_req": alpha_req(z_NF),
        "uniformity": uniformity(z_NF),
        "lidar": lidar(e_NVF),
        "view_alignment": alignment(e_NVF),
    }


def rankme(z_NF: Tensor) -> float:
    """Return RankMe, the smooth rank exp(-sum p log p), p_k = sigma_k / sum sigma + 1e-7.

    sigma are the singular values of z_NF, not centred. From 1 to min(N, F); the same for c z.
    Garrido et al., "RankMe", ICML 2023, equations 1 and 2.
    """
    return _smooth_rank(_singular_values(z_NF))


def lidar(e_NVF: Tensor) -> float:
    """Return LiDAR, the smooth rank (as in RankMe) of what tells images apart in any view.

    The eigenvalues are those of S_w^(-1/2) S_b S_w^(-1/2): S_b is the covariance of the images'
    means, S_w the mean outer product of the views' deviations from them, plus 1e-4 I. At most N - 1
    are nonzero. The same for e Q, Q orthogonal. Thilak et al., "LiDAR", ICLR 2024, eqs. 1 to 4.
    """
    e_NVF = _double(e_NVF)
    images, views, dim = e_NVF.shape
    mean_N1F = e_NVF.mean(1, keepdim=True)
    within_MF = (e_NVF - mean_N1F).reshape(-1, dim)
    between_NF = (mean_N1F - mean_N1F.mean(0))[:, 0] / math.sqrt(images)
    within_FF = within_MF.T @ within_MF / (images * views)
    within_FF.diagonal().add_(_DELTA)
    root_FF, failed = torch.linalg.cholesky_ex(within_FF)
    if failed or not between_NF.isfinite().all():
        return math.nan
    # S_w = L L^T: the eigenvalues of L^-1 S_b L^-T, squares of singular values
    whitened_FN = torch.linalg.solve_triangular(root_FF, between_NF.T, upper=False)
    eigenvalues = torch.linalg.svdvals(whitened_FN).square()
    return _smooth_rank(functional.pad(eigenvalues, (0, dim - len(eigenvalues))))


def alpha_req(z_NF: Tensor) -> float:
    """Return alpha of lambda_k ~ k^-alpha, by least squares of log lambda_k on log k.

    lambda are the eigenvalues of z_NF's covariance, descending; the fit covers k = 5 to 100, or to
    the last one above 1e-10 of the first. Agrawal et al., "alpha-ReQ", NeurIPS 2022.
    """
    z_NF = _double(z_NF)
    eigenvalues = _singular_values(z_NF - z_NF.mean(0)).square()[:LAST]
    log_lambda = eigenvalues[eigenvalues > _LEAST_SHARE * eigenvalues[0]][FIRST - 1 :].log()
    if len(log_lambda) < 2:
        return math.nan
    log_k = np.log(np.arange(FIRST, FIRST + len(log_lambda)))
    return -float(np.polyfit(log_k, log_lambda.numpy(), 1)[0])


def alignment(e_NVF: Tensor) -> float:
    """Return the mean |u - u'|^2 over all pairs of views of one image, u = e / |e|.

    It is 0 to 2 V / (V - 1), and 2 for unrelated views.

    Wang and Isola, "Understanding contrastive representation learning through alignment and
    uniformity on the hypersphere", ICML 2020, alpha = 2. V is at least 2.
    """
    u_NVF = functional.normalize(_double(e_NVF), dim=2)
    # of V unit vectors, sum over pairs |u - u'|^2 = V sum |u - mean u|^2
    spread = (u_NVF - u_NVF.mean(1, keepdim=True)).square().sum(2).mean()
    views = e_NVF.shape[1]
    return float(2 * views / (views - 1) * spread)


def uniformity(z_NF: Tensor) -> float:
    """Return log mean exp(-2 |u - u'|^2) over all pairs of images, u = z / |z|: -8 to 0.

    Wang and Isola, ICML 2020 (as `alignment`), t = 2. N is at least 2. About -4 for u
    uniform on the sphere.
    """
    u_NF = functional.normalize(_double(z_NF), dim=1)
    return float(torch.pdist(u_NF).square().mul(-2).exp().mean().log())


def _smooth_rank(values: Tensor) -> float:
    shares = values / values.sum() + _EPS
    return float((-shares * shares.log()).sum().exp())


def _singular_values(z_NF: Tensor) -> Tensor:
    z_NF = _double(z_NF)
    if not z_NF.isfinite().all():
        return torch.full((min(z_NF.shape),), math.nan, dtype=torch.float64)
    values: Tensor = torch.linalg.svdvals(z_NF)
    return values


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
