"""BatchNorm with separate statistics per view, over one rank or all.

Shapes: V views of B images each, stacked to N = V * B rows; C channels.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from isofast.distributed import mean_over_ranks_, world_size
from isofast_kernels.norm_pool_ops import norm_pool, norm_pool_gradient, norm_pool_sums


class ViewBatchNorm(_NormBase):
    """BatchNorm of N rows that hold ``views`` batches one after the other.

    In training mode each batch is normalised by its own mean and variance and updates the running
    statistics in turn, so one call equals ``views`` calls of torch's BatchNorm. In eval mode it is
    torch's BatchNorm. Parameters and buffers have torch's names, without ``num_batches_tracked``,
    which would cost one kernel launch per layer. `convert_batch_norm` makes one of torch's.

    Attributes:
        views: number of batches per call; N must be a multiple of it.
        synchronised: compute statistics over all ranks, with one all-reduce per call in the forward
            and one in the backward pass. Each rank must have the same number of rows.
        fused: use plain operations that torch.compile can fuse with their neighbours on a GPU. If
            false, a single rank calls torch's kernels, faster in eager mode and on a CPU.

    Raises:
        ValueError: N is not a multiple of ``views``.
    """

    views: int
    synchronised: bool
    fused: bool

    def forward(self, x: Tensor, relu: bool = False, pool: bool = False) -> Tensor:
        """Map (N, C, ...) to the same shape and dtype; ``relu`` adds a ReLU.

        ``pool`` adds a ReLU and a ResNet's max pool: (N, C, H, W) with H and W halved.
        """
        views = self.views if self.training else 1
        if len(x) % views:
            raise ValueError(f"{len(x)} rows do not hold {views} views of equal size")
        if self.training and (self.fused or self.synchronised):
            return self._normalise_fused(x, relu, pool)
        if views == 1:
            y = self._normalise(x)
        else:
            y = torch.cat([self._normalise(view) for view in x.chunk(views)])
        y = y.relu() if relu or pool else y
        return functional.max_pool2d(y, 3, 2, 1) if pool else y

    def _normalise(self, x: Tensor) -> Tensor:
        return functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            cast(float, self.momentum),
            self.eps,
        )

    def _normalise_fused(self, x: Tensor, relu: bool, pool: bool) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        ranks = world_size() if self.synchronised else 1
        n = x.numel() // (self.views * self.num_features) * ranks
        if n == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got {x.shape}")
        weight = torch.ones_like(self.running_var) if self.weight is None else self.weight
        bias = torch.zeros_like(self.running_mean) if self.bias is None else self.bias
        apply = _PooledNormalisation.apply if pool else partial(_Normalisation.apply, relu)
        y, mean_VC, var_VC = apply(x, weight, bias, self.views, self.eps, self.synchronised)
        with torch.no_grad():
            momentum = cast(float, self.momentum)
            for mean_C, var_C in zip(mean_VC, var_VC, strict=True):
                self.running_mean.lerp_(mean_C, momentum)
                self.running_var.lerp_(var_C * (n / (n - 1)), momentum)
        return cast(Tensor, y)


class _Normalisation(torch.autograd.Function):
    """x, weight, bias -> y, and each view's mean and variance, which carry no gradient.

    Of the activations only x is saved for the backward pass; the ReLU mask is recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        relu: bool,
        x: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        views: int,
        eps: float,
        synchronised: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean_VC, var_VC, scale_VC = _statistics(x, views, eps, synchronised)
        y = (_wide(x) - _rows(mean_VC, x)) * _rows(scale_VC * weight_C, x) + _rows(bias_C[None], x)
        ctx.save_for_backward(x, mean_VC, scale_VC, weight_C, bias_C)
        ctx.relu, ctx.synchronised = relu, synchronised
        ctx.mark_non_differentiable(mean_VC, var_VC)
        y = y.relu() if relu else y
        # torch 2.11's compiler loses the gradient of a cast to the same dtype
        return y if y.dtype == x.dtype else y.to(x.dtype), mean_VC, var_VC

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, mean_VC, scale_VC, weight_C, bias_C = ctx.saved_tensors
        views, n = len(mean_VC), x.numel() // mean_VC.numel()
        centred, slope = _wide(x) - _rows(mean_VC, x), _rows(scale_VC * weight_C, x)
        g = _wide(dy)
        if ctx.relu:
            g = torch.where(centred * slope + _rows(bias_C[None], x) > 0, g, 0.0)
        g_VC, along_VC = _means(g, views), _means(g * centred, views) * scale_VC
        dweight_C, dbias_C = (n * of_VC.sum(0) for of_VC in (along_VC, g_VC))
        if ctx.synchronised:
            g_VC, along_VC = _over_ranks(g_VC, along_VC)
        dx = (g - _rows(g_VC, x) - centred * _rows(along_VC * scale_VC, x)) * slope
        return None, dx.to(x.dtype), dweight_C, dbias_C, None, None, None


class _PooledNormalisation(torch.autograd.Function):
    """The same followed by ReLU and max pool, in kernels that store no intermediate."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        views: int,
        eps: float,
        synchronised: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean_VC, var_VC, scale_VC = _statistics(x, views, eps, synchronised)
        y, taps = norm_pool(x, mean_VC, scale_VC * weight_C, bias_C)
        ctx.save_for_backward(x, taps, mean_VC, scale_VC, weight_C)
        ctx.synchronised = synchronised
        ctx.mark_non_differentiable(mean_VC, var_VC)
        return y, mean_VC, var_VC

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, mean_VC, scale_VC, weight_C = ctx.saved_tensors
        n = x.numel() // mean_VC.numel()
        g_VC, along_VC = norm_pool_sums(dy, taps, x, mean_VC) / n
        along_VC = along_VC * scale_VC
        dweight_C, dbias_C = (n * of_VC.sum(0) for of_VC in (along_VC, g_VC))
        if ctx.synchronised:
            g_VC, along_VC = _over_ranks(g_VC, along_VC)
        slope_VC = scale_VC * weight_C
        back = slope_VC, slope_VC * g_VC, slope_VC * along_VC * scale_VC
        dx = norm_pool_gradient(dy, taps, x, mean_VC, *back)
        return dx, dweight_C, dbias_C, None, None, None


def _statistics(
    x: Tensor, views: int, eps: float, synchronised: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and 1 / standard deviation of each view, (V, C).

    The variance is E[x^2] - E[x]^2, two sums that the compiler computes in one pass; its relative
    error in fp32 is about 1e-7 (mean / std)^2.
    """
    wide = _wide(x)
    # not shifted by running_mean: torch 2.14's compiler rereads it in the backward pass, after its
    # update, and the gradients are wrong
    mean_VC, square_VC = _means(wide, views), _means(wide.square(), views)
    if synchronised:
        mean_VC, square_VC = _over_ranks(mean_VC, square_VC)
    var_VC = (square_VC - mean_VC.square()).clamp(min=0)
    return mean_VC, var_VC, (var_VC + eps).rsqrt()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _means(x: Tensor, views: int) -> Tensor:
    """(N, C, ...) -> (V, C), over all other dimensions."""
    x_VBC = torch.unflatten(x, 0, (views, -1))
    return x_VBC.mean([dim for dim in range(x_VBC.ndim) if dim not in (0, 2)])


def _rows(of_VC: Tensor, x: Tensor) -> Tensor:
    """(V, C) -> (N, C, 1, ...), repeated for each row of x.

    Viewing x as (V, B, C, ...) would make y a view, which an in-place ReLU may not modify.
    """
    of_NC = of_VC.repeat_interleave(len(x) // len(of_VC), 0)
    return of_NC.view(*of_NC.shape, *[1] * (x.ndim - 2))


def _over_ranks(*of_VC: Tensor) -> Tensor:
    means_KVC: Tensor = torch.ops.isofast.mean_over_ranks(torch.stack(of_VC))
    return means_KVC


def convert_batch_norm(
    module: nn.Module, *, views: int, synchronised: bool = False, fused: bool = False
) -> nn.Module:
    """Turn each BatchNorm in ``module`` into a ViewBatchNorm, in place; return ``module``.

    Classes listed by ``foreign_batch_norms`` are left alone; other arguments as in ViewBatchNorm.
    """
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) and not _is_foreign(norm):
            norm.__class__ = ViewBatchNorm  # type: ignore[assignment]
            norm.num_batches_tracked = None
            vars(norm).update(views=views, synchronised=synchronised, fused=fused)
    return module


def foreign_batch_norms(module: nn.Module) -> set[str]:
    """Return the class names of BatchNorms in ``module`` that cannot be replaced.

    These are subclasses of torch's, such as timm's with an activation, and any without an
    exponential moving average of its statistics.
    """
    norms = (norm for norm in module.modules() if isinstance(norm, _BatchNorm))
    return {type(norm).__name__ for norm in norms if _is_foreign(norm)}


def _is_foreign(norm: _BatchNorm) -> bool:
    ours = type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return not ours or not norm.track_running_stats or norm.momentum is None


@torch.library.custom_op("isofast::mean_over_ranks", mutates_args=())
def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean over two or more ranks, differentiably.

    A custom op, so that torch.compile keeps the collective in its graph.
    """
    return mean_over_ranks_(x.clone())


@mean_over_ranks.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


mean_over_ranks.register_autograd(
    lambda context, grad: torch.ops.isofast.mean_over_ranks(grad.contiguous())
)
