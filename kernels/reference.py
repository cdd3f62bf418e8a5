"""The specification in plain torch: any floating dtype up to float64, any device, any shape.

P is Halvagal, Laborieux, Zenke, "Implicit variance regularization in non-contrastive SSL"
(NeurIPS 2023), cited by equation number. Shape letters: B rows of a batch, D features. A row z is a
row vector, so the predictor output W z with a symmetric W is written z @ W.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

METRICS = ("cosine", "euclidean")
NORMALIZATIONS = ("spectral", "none")
NORM_FLOOR = 1e-8
"""Lower bound of norms, as in torch.nn.functional.cosine_similarity."""


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any tensor is float64, float32 otherwise."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


@contextmanager
def full_precision() -> Iterator[None]:
    """Disable autocast, which would round these products, C and W included, to bf16."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@full_precision()
def losses_reference(
    z_BD: Tensor, target_BD: Tensor, w_DD: Tensor, *, metric: str, isotropic: bool
) -> Tensor:
    """Return the per-sample losses as the paper defines them, for autograd to differentiate in z.

    With p = W z, t = stop-gradient(target), a = |p|, b = |t|, d = p.t, [.] a stop-gradient:

    - cosine (P L^cos):      -d / (a b)
    - iso cosine (P 17):     -(z.t) / ([a] b) + [d] |W^(1/2) z|^2 / (2 [a]^3 b),
      where |W^(1/2) z|^2 = z.W z, so no root of W is needed
    - euclidean:             |p - t|^2 / 2
    - iso euclidean (P 15):  |z - [z - p + t]|^2 / 2, whose value is |p - t|^2 / 2

    Args:
        z_BD: embeddings, (B, D).
        target_BD: the stop-gradient side, (B, D); detached here.
        w_DD: the predictor, (D, D), symmetric; detached here.
        metric: "cosine" or "euclidean".
        isotropic: the IsoLoss of that metric.

    Returns:
        loss_B, (B,), float32, or float64 for float64 arguments.
    """
    dtype = accumulation_dtype(z_BD, target_BD, w_DD)
    z_BD, t_BD, w_DD = z_BD.to(dtype), target_BD.detach().to(dtype), w_DD.detach().to(dtype)
    p_BD = z_BD @ w_DD
    if metric == "euclidean":
        residual_BD = z_BD - (z_BD - p_BD + t_BD).detach() if isotropic else p_BD - t_BD
        return residual_BD.square().sum(-1) / 2
    a_B = torch.linalg.vector_norm(p_BD, dim=-1).clamp_min(NORM_FLOOR)
    b_B = torch.linalg.vector_norm(t_BD, dim=-1).clamp_min(NORM_FLOOR)
    d_B = (p_BD * t_BD).sum(-1)
    if not isotropic:
        return -d_B / (a_B * b_B)
    # divide by a and b separately: a^3 b underflows in float32 long before the quotient does
    cosine_B = (d_B / a_B / b_B).detach()
    a_B = a_B.detach()
    zt_B, zp_B = (z_BD * t_BD).sum(-1), (z_BD * p_BD).sum(-1)
    return -zt_B / a_B / b_B + cosine_B * zp_B / (2 * a_B * a_B)


@full_precision()
def losses_and_gradients_reference(
    z_BD: Tensor, target_BD: Tensor, w_DD: Tensor, *, metric: str, isotropic: bool
) -> tuple[Tensor, Tensor]:
    """Return the per-sample losses and their gradients in z, in closed form.

    With g = (1/(ab)) (-t + (d/a^2) p), and the symbols of `losses_reference`:

    - cosine:         dz = W g
    - iso cosine:     dz = g
    - euclidean:      dz = W (p - t)
    - iso euclidean:  dz = p - t

    Below the norm floor g keeps this form with the clamped a and b and stays continuous; autograd
    of the clamped cosine drops the p term there. At p = 0 the two agree.

    Args:
        z_BD, target_BD, w_DD, metric, isotropic: as in `losses_reference`. Leading dimensions
            before (B, D) and (D, D) are batches and broadcast.

    Returns:
        loss_B, (B,), and dz_BD, (B, D), per row (not divided by B), float32, or float64 for
        float64 arguments.
    """
    dtype = accumulation_dtype(z_BD, target_BD, w_DD)
    z_BD, t_BD, w_DD = z_BD.to(dtype), target_BD.to(dtype), w_DD.to(dtype)
    p_BD = z_BD @ w_DD
    if metric == "euclidean":
        g_BD = p_BD - t_BD
        loss_B = g_BD.square().sum(-1) / 2
    else:
        a_B = torch.linalg.vector_norm(p_BD, dim=-1).clamp_min(NORM_FLOOR)
        b_B = torch.linalg.vector_norm(t_BD, dim=-1).clamp_min(NORM_FLOOR)
        # divide by one norm at a time: a^3 b underflows in float32 long before the quotient does
        cosine_B = torch.linalg.vecdot(p_BD, t_BD) / a_B / b_B
        along_p_B, along_t_B = cosine_B / a_B / a_B, 1 / a_B / b_B
        g_BD = torch.addcmul(along_p_B[..., None] * p_BD, along_t_B[..., None], t_BD, value=-1)
        if isotropic:
            zt_B, zp_B = torch.linalg.vecdot(z_BD, t_BD), torch.linalg.vecdot(z_BD, p_BD)
            loss_B = along_p_B * zp_B / 2 - along_t_B * zt_B
        else:
            loss_B = -cosine_B
    return loss_B, g_BD if isotropic else g_BD @ w_DD


@full_precision()
def two_sided_gradients_reference(
    z_BD: Tensor, target_BD: Tensor, w_DD: Tensor, *, metric: str, paper_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Return gradients of the plain losses in both arguments, for the no-stop-gradient ablation.

    dz is that of `losses_and_gradients_reference`. With its symbols, and W held constant:

    - euclidean:                     dt = t - p
    - cosine:                        dt = -p / (a b) + d t / (a b^3)
    - cosine, ``paper_gradient``:    dt = -p / (a b) + d t / (a^3 b)

    The last is printed in P App. C.2 and is not the loss's derivative: dt then has a component
    along t, so the length of t is no longer irrelevant and embeddings diverge. Without a predictor
    W is the identity.

    Args:
        z_BD, target_BD, w_DD, metric: as in `losses_reference`; nothing is detached. Leading
            dimensions before (B, D) and (D, D) are batches and broadcast.
        paper_gradient: use the form in P App. C.2, for the cosine only.

    Returns:
        dz_BD and dt_BD, (B, D), per row, float32, or float64 for float64 arguments.

    Raises:
        ValueError: ``paper_gradient`` with the Euclidean metric, for which the paper is correct.
    """
    _, dz_BD = losses_and_gradients_reference(z_BD, target_BD, w_DD, metric=metric, isotropic=False)
    t_BD, p_BD = target_BD.to(dz_BD.dtype), z_BD.to(dz_BD.dtype) @ w_DD.to(dz_BD.dtype)
    if metric == "euclidean":
        if paper_gradient:
            raise ValueError("paper_gradient=True is for metric 'cosine', got 'euclidean'")
        return dz_BD, t_BD - p_BD
    a_B1 = torch.linalg.vector_norm(p_BD, dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
    b_B1 = torch.linalg.vector_norm(t_BD, dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
    cosine_B1 = torch.linalg.vecdot(p_BD, t_BD)[..., None] / a_B1 / b_B1
    stated_B1 = a_B1 if paper_gradient else b_B1
    return dz_BD, cosine_B1 / stated_B1 / stated_B1 * t_BD - p_BD / a_B1 / b_B1


@full_precision()
def second_moment_reference(views: Sequence[Tensor]) -> Tensor:
    """Return the mean of z z^T over all rows of all views (P Eq. 1 without the moving average).

    Args:
        views: tensors (B, D) with the same D and any B.

    Returns:
        moment_DD, (D, D), bitwise symmetric, float32, or float64 for float64 views.
    """
    features = views[0].shape[1]
    moment_DD = views[0].new_zeros((features, features), dtype=accumulation_dtype(*views))
    return mirror_lower(_add_moment_(moment_DD, views, 0.0))


@full_precision()
def correlation_ema_reference_(corr_DD: Tensor, views: Sequence[Tensor], decay: float) -> Tensor:
    """Update C <- decay C + (1 - decay) mean z z^T in place, over all rows of all views (P Eq. 1).

    Args:
        corr_DD: the state C, (D, D), float32 or float64; only its lower triangle is used.
        views: tensors (B, D) with the same D and any B.
        decay: the weight that C keeps, in [0, 1].

    Returns:
        corr_DD, bitwise symmetric.
    """
    return corr_DD.copy_(mirror_lower(_add_moment_(corr_DD, views, decay)))


def _add_moment_(x_DD: Tensor, views: Sequence[Tensor], keep: float) -> Tensor:
    """X <- keep X + (1 - keep) mean z z^T, in X's dtype."""
    rows = sum(view.shape[0] for view in views)
    for index, view in enumerate(views):
        z_BD = view.to(x_DD.dtype)
        beta = keep if index == 0 else 1.0
        x_DD.addmm_(z_BD.T, z_BD, beta=beta, alpha=(1 - keep) / rows)
    return x_DD


def mirror_lower(x_DD: Tensor) -> Tensor:
    """Return the symmetric matrix with x_DD's lower triangle, bit for bit."""
    return x_DD.tril() + x_DD.tril(-1).T


@full_precision()
def matrix_power_reference(
    corr_DD: Tensor, alpha: float, *, eps: float = 0.0, normalize: str = "spectral"
) -> Tensor:
    """Return W = U diag((s + eps)^alpha) U^T for C = U diag(s) U^T (P Eq. 1) by eigendecomposition.

    s is clamped at 0 and, with normalize="spectral", divided by its largest value; eps is then
    added before the power. C = 0 gives eps^alpha I. At alpha = 1 nothing is clamped and only the
    largest eigenvalue is needed: W = C / lambda_max + eps I. A NaN or infinity in C makes every
    element of W NaN without raising an error.

    Args:
        corr_DD: C, (D, D), symmetric, float32 or float64.
        alpha: the power, > 0.
        eps: the shift, >= 0.
        normalize: "spectral", or "none" for Eq. 1 as it stands.

    Returns:
        w_DD, (D, D), bitwise symmetric, in C's dtype.
    """
    # NaN if any element is NaN or infinite, which makes LAPACK raise, and 0 otherwise
    poison = corr_DD.sum() * 0
    corr_DD = torch.nan_to_num(corr_DD, nan=0.0, posinf=0.0, neginf=0.0)
    if alpha == 1:
        w_DD = corr_DD
        if normalize == "spectral":
            w_DD = divided_or_zero(w_DD, torch.linalg.eigvalsh(corr_DD)[-1])
        shift_DD = eps * torch.eye(len(corr_DD), dtype=corr_DD.dtype, device=corr_DD.device)
        return w_DD + shift_DD + poison
    # upper in row-major order is lower in LAPACK's column-major order, which is a tenth faster
    s_D, u_DD = torch.linalg.eigh(corr_DD, UPLO="U")
    s_D = s_D.clamp_min(0) + poison
    if normalize == "spectral":
        s_D = divided_or_zero(s_D, s_D[-1])
    w_DD = (u_DD * (s_D + eps) ** alpha) @ u_DD.T
    return mirror_lower(w_DD)


def divided_or_zero(x: Tensor, top: Tensor) -> Tensor:
    """Return x / top, or 0 where top <= 0, so that a zero matrix stays zero when normalised."""
    # no reciprocal, which overflows for a subnormal number
    return torch.where(top <= 0, torch.zeros_like(x), x / top)


def norm_pool_reference(
    x_NCHW: Tensor, mean_VC: Tensor, slope_VC: Tensor, bias_C: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply BatchNorm's map, a ReLU and a 3 x 3 max pool with stride 2.

    Args:
        x_NCHW: N images, grouped by the V views.
        mean_VC, slope_VC, bias_C: y = (x - mean) slope + bias, in fp32 or float64.

    Returns:
        y_NCPQ, P = (H + 1) // 2, Q = (W + 1) // 2, in x's dtype, and taps_NCPQ, uint8: the index of
        y in its window's nine pixels, row by row, the first if equal; 9 where y is not above 0.
    """
    h_NCHW = (x_NCHW.to(mean_VC.dtype) - of_images(mean_VC, x_NCHW)) * of_images(slope_VC, x_NCHW)
    h_NCHW = (h_NCHW + bias_C[:, None, None]).relu()
    y_NCPQ, index_NCPQ = max_pool2d(h_NCHW, 3, 2, 1, return_indices=True)
    first_PQ = _first_of_windows(y_NCPQ, x_NCHW)
    row_NCPQ = index_NCPQ // x_NCHW.shape[3] - first_PQ[0]
    tap_NCPQ = 3 * row_NCPQ + index_NCPQ % x_NCHW.shape[3] - first_PQ[1]
    return y_NCPQ.to(x_NCHW.dtype), torch.where(y_NCPQ > 0, tap_NCPQ, 9).to(torch.uint8)


def norm_pool_gradient_reference(
    dy_NCPQ: Tensor, taps_NCPQ: Tensor, x_NCHW: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return g_NCHW, the gradient that `norm_pool_reference`'s ReLU and pool send to each pixel."""
    width = x_NCHW.shape[3]
    first_PQ = _first_of_windows(dy_NCPQ, x_NCHW)
    active_NCPQ, tap_NCPQ = taps_NCPQ < 9, taps_NCPQ.long()
    index_NCPQ = (first_PQ[0] + tap_NCPQ // 3) * width + first_PQ[1] + tap_NCPQ % 3
    g_NCK = torch.zeros_like(x_NCHW, dtype=dtype).flatten(2)
    dy_NCPQ = torch.where(active_NCPQ, dy_NCPQ.to(dtype), 0)
    g_NCK.scatter_add_(2, torch.where(active_NCPQ, index_NCPQ, 0).flatten(2), dy_NCPQ.flatten(2))
    return g_NCK.view(x_NCHW.shape)


def of_images(of_VC: Tensor, x_NCHW: Tensor) -> Tensor:
    """(V, C) -> (N, C, 1, 1), repeated for each image of a view."""
    return of_VC.repeat_interleave(len(x_NCHW) // len(of_VC), 0)[:, :, None, None]


def _first_of_windows(y_NCPQ: Tensor, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and column of each window's first tap, -1 at the upper and left border."""
    rows_P, columns_Q = (
        2 * torch.arange(size, device=x_NCHW.device) - 1 for size in y_NCPQ.shape[2:]
    )
    return rows_P[:, None], columns_Q
