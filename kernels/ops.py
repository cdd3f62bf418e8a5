"""The public operations: dispatch, fake shapes for tracing, autograd.

CUDA tensors run Triton, CPU tensors the reference. If TRITON_INTERPRET=1 is set before the import,
CPU tensors in float32 and float16 run in Triton's interpreter. Shape letters: B rows of a batch, D
features, V directions, N = V B.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .arguments import (
    as_updating_views,
    as_views,
    check_choice,
    check_loss_arguments,
    check_square,
)
from .dispatch import HAS_TRITON, device_of, runs_triton

if HAS_TRITON:
    from .asymmetric_loss import asymmetric_loss_launch
    from .correlation import correlation_launch
    from .matrix_power_triton import matrix_power_launch


# torch custom ops


@torch.library.custom_op("isofast_kernels::asymmetric_loss", mutates_args=())
def _asymmetric_loss(
    zs: list[Tensor], targets: list[Tensor], w: Tensor, metric: str, isotropic: bool
) -> tuple[Tensor, Tensor]:
    """Return loss, (), and dz_VBD before the upstream gradient is applied, in fp32 or float64."""
    if runs_triton(*zs, *targets, w):
        with device_of(w):
            return asymmetric_loss_launch(zs, targets, w, metric, isotropic)
    # both directions at once: at these sizes a CPU spends as long on call overhead as on arithmetic
    loss_N, dz_ND = reference.losses_and_gradients_reference(
        torch.cat(zs), torch.cat(targets), w, metric=metric, isotropic=isotropic
    )
    rows = zs[0].shape[0]
    return loss_N.sum() / rows, dz_ND.div_(rows).unflatten(0, (len(zs), rows))


@_asymmetric_loss.register_fake
def _(
    zs: list[Tensor], targets: list[Tensor], w: Tensor, metric: str, isotropic: bool
) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulation_dtype(*zs, *targets, w)
    dz_VBD = zs[0].new_empty((len(zs), *zs[0].shape), dtype=dtype)
    return zs[0].new_empty((), dtype=dtype), dz_VBD


def _save_gradient(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.z_dtype = inputs[0][0].dtype
    ctx.target_count = len(inputs[1])
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _scale_gradient(ctx, grad_loss, grad_dz):  # type: ignore[no-untyped-def]
    if grad_dz is not None:
        raise RuntimeError("asymmetric_loss can be differentiated only once")
    (dz_VBD,) = ctx.saved_tensors
    if grad_loss is None:
        return [None] * len(dz_VBD), [None] * ctx.target_count, None, None, None
    # fp32 until here: the upstream gradient may be a loss scale, to apply before rounding; all
    # directions at once, because a launch costs more than the arithmetic
    dz_VBD = (dz_VBD * grad_loss).to(ctx.z_dtype)
    dzs = [dz_VBD[v] for v in range(len(dz_VBD))]
    return dzs, [None] * ctx.target_count, None, None, None


_asymmetric_loss.register_autograd(_scale_gradient, setup_context=_save_gradient)


@torch.library.custom_op("isofast_kernels::correlation_ema_", mutates_args=("corr",))
def _correlation_ema_(corr: Tensor, views: list[Tensor], decay: float) -> None:
    if runs_triton(corr, *views):
        with device_of(corr):
            correlation_launch(corr, views, decay)
    else:
        reference.correlation_ema_reference_(corr, views, decay)


@torch.library.custom_op("isofast_kernels::second_moment", mutates_args=())
def _second_moment(views: list[Tensor]) -> Tensor:
    if not runs_triton(*views):
        return reference.second_moment_reference(views)
    features = views[0].shape[1]
    moment_DD = torch.empty((features, features), dtype=torch.float32, device=views[0].device)
    with device_of(moment_DD):
        correlation_launch(moment_DD, views, None)
    return moment_DD


@_second_moment.register_fake
def _(views: list[Tensor]) -> Tensor:
    features = views[0].shape[1]
    dtype = reference.accumulation_dtype(*views)
    return views[0].new_empty((features, features), dtype=dtype)


@torch.library.custom_op("isofast_kernels::matrix_power", mutates_args=())
def _matrix_power(corr: Tensor, alpha: float, eps: float, normalize: str) -> Tensor:
    corr = corr.contiguous()
    if runs_triton(corr):
        with device_of(corr):
            return matrix_power_launch(corr, alpha, eps, normalize)
    return reference.matrix_power_reference(corr, alpha, eps=eps, normalize=normalize)


@_matrix_power.register_fake
def _(corr: Tensor, alpha: float, eps: float, normalize: str) -> Tensor:
    return corr.new_empty(corr.shape)


# Public


def asymmetric_loss(
    z_BD: Tensor,
    target_BD: Tensor,
    w_DD: Tensor,
    *,
    metric: str = "cosine",
    isotropic: bool = True,
) -> Tensor:
    """Return the mean over B of the asymmetric loss between p = W z and a stop-gradient target t.

    cosine: -p.t / (|p| |t|) (P L^cos); iso cosine: P Eq. 17; euclidean: |p - t|^2 / 2; iso
    euclidean: P Eq. 15, with the same value. The value of the iso cosine loss is meaningless; only
    its gradient matters. Norms are clamped at 1e-8, so a collapsed batch gives finite numbers
    (except in float16, where a gradient of order 1e8 at p = 0 becomes infinite). The formulas and
    gradients are spelled out in `isofast_kernels.reference`.

    Args:
        z_BD: embeddings, (B, D), float32, float16 or bfloat16 (on the CPU also float64), not
            normalised; D is at most 8192 on CUDA. The only argument with a gradient, which is
            computed in float32 and rounded to z's dtype at the end.
        target_BD: the stop-gradient side, (B, D), as z.
        w_DD: the predictor, (D, D), symmetric (as `matrix_power` returns it), float32.
        metric: "cosine" or "euclidean".
        isotropic: use the IsoLoss of that metric rather than the plain loss.

    Returns:
        The loss, (), float32 (float64 for float64 arguments). Differentiable once, by autograd:
        in forward mode the tangent of torch's custom ops is zero, and torch.func refuses them.

    Raises:
        ValueError: a shape, dtype, device or name is not allowed.
    """
    check_loss_arguments({"z_BD": z_BD}, {"target_BD": target_BD}, w_DD, metric)
    return _asymmetric_loss([z_BD], [target_BD.detach()], w_DD.detach(), metric, isotropic)[0]


def asymmetric_loss_pair(
    z1_BD: Tensor,
    z2_BD: Tensor,
    t1_BD: Tensor,
    t2_BD: Tensor,
    w_DD: Tensor,
    *,
    metric: str = "cosine",
    isotropic: bool = True,
) -> Tensor:
    """Return loss(z1 -> t2) + loss(z2 -> t1), each a mean over B, with the launches of one loss.

    Args:
        z1_BD, z2_BD: embeddings of the two views, (B, D), same dtype; both receive gradients.
        t1_BD, t2_BD: targets of the same views, (B, D), same dtype; no gradient.
        w_DD, metric, isotropic: as in `asymmetric_loss`.

    Returns:
        The sum of both directions, (), float32 (float64 for float64 arguments).

    Raises:
        ValueError: a shape, dtype, device or name is not allowed.
    """
    zs = {"z1_BD": z1_BD, "z2_BD": z2_BD}
    check_loss_arguments(zs, {"t1_BD": t1_BD, "t2_BD": t2_BD}, w_DD, metric)
    targets = [t2_BD.detach(), t1_BD.detach()]
    return _asymmetric_loss([z1_BD, z2_BD], targets, w_DD.detach(), metric, isotropic)[0]


def correlation_ema_(corr_DD: Tensor, z_BD: Tensor | Sequence[Tensor], decay: float) -> Tensor:
    """Update C <- decay C + (1 - decay) mean z z^T in place, over all rows of all views.

    P Eq. 1. The result is bitwise symmetric; only the lower triangle of the old C is used.

    Args:
        corr_DD: the state C, (D, D), float32 (float64 on the CPU), contiguous.
        z_BD: embeddings (B, D), or a sequence of them with the same D and dtype and any B,
            float32, float16 or bfloat16 (on the CPU also float64). No gradient flows back.
        decay: the weight that C keeps, in [0, 1].

    Returns:
        corr_DD itself.

    Raises:
        ValueError: a shape, dtype, device or decay is not allowed.
    """
    views = as_updating_views(corr_DD, z_BD, decay)
    _correlation_ema_(corr_DD, views, float(decay))
    return corr_DD


def second_moment(z_BD: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the mean of z z^T over all rows of all views, to all-reduce before the EMA update.

    Args:
        z_BD: embeddings (B, D), or a sequence of them, as in `correlation_ema_`.

    Returns:
        moment_DD, (D, D), bitwise symmetric, float32 (float64 for float64 views).

    Raises:
        ValueError: a shape, dtype or device is not allowed.
    """
    return _second_moment(as_views(z_BD))


def matrix_power(
    corr_DD: Tensor, alpha: float, *, eps: float = 0.0, normalize: str = "spectral"
) -> Tensor:
    """Return the predictor W = U diag((s + eps)^alpha) U^T of C = U diag(s) U^T (P Eq. 1).

    With normalize="spectral" s is first divided by its largest value; eps is then added before the
    power. alpha = 1 is DirectCopy's C / lambda_max + eps I. C = 0 gives eps^alpha I; a NaN or
    infinity in C makes all of W NaN without raising an error.

    On CUDA alpha = 1/2, 1 and 2, and 1/4 if s is normalised and eps >= 0.1, are computed by matrix
    products in a fixed number of launches without a host sync, so that a CUDA graph can capture
    them. Any other power uses torch.linalg.eigh, which syncs, cannot be captured, and multiplies
    in the precision set by torch's global switches.

    C should be what `correlation_ema_` returns: symmetric, which is not checked, and positive
    semi-definite up to rounding (about 1e-7 of its largest eigenvalue). The CPU clamps s at 0 if
    the power needs it; the CUDA products let eigenvalues below that grow, and treat a C whose
    largest eigenvalue is below 1e-25 as zero (see NUMERICS.md).

    Args:
        corr_DD: C, (D, D), symmetric, float32 (float64 on the CPU).
        alpha: the power, finite and > 0.
        eps: the shift, finite and >= 0.
        normalize: "spectral", or "none" for Eq. 1 as it stands.

    Returns:
        w_DD, (D, D), bitwise symmetric, in C's dtype, outside autograd.

    Raises:
        ValueError: a shape, dtype, alpha, eps or name is not allowed.
    """
    check_square("corr_DD", corr_DD)
    check_choice("normalize", normalize, reference.NORMALIZATIONS)
    # a compiler can trace comparisons, and NaN fails them
    if not 0 < alpha < math.inf:
        raise ValueError(
            f"alpha is {alpha}; it must be finite and greater than 0. To train without a "
            "predictor, pass the identity as w_DD."
        )
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps is {eps}; it must be finite and at least 0.")
    return _matrix_power(corr_DD.detach(), float(alpha), float(eps), normalize)
