"""BatchNorm with statistics for each view of a batch, over one rank or all.

Shapes: V views of B images each, stacked to N = V * B rows; C channels.
"""

from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from isofast_kernels.norm_pool_ops import norm_pool, norm_pool_gradient, norm_pool_sums


class ViewBatchNorm(_NormBase):
    """BatchNorm of N rows that hold ``views`` batches one after the other.

    In training each batch is normalised by its own mean and variance, and moves the running
    statistics in turn, so that one call equals ``views`` calls of torch's BatchNorm. In evaluation
    it is torch's. Parameters and buffers have torch's names; there is no ``num_batches_tracked``,
    a counter that costs a launch a layer.

    Args:
        num_features: C.
        views: batches in a call; N must be a multiple of it.
        synchronised: take the statistics over all ranks, in one collective a call, in either
            direction. Each rank must have the same number of rows.
        fused: be made of plain operations, which torch.compile joins on a GPU with what is beside
            them. Otherwise one rank calls torch's own kernels, faster in eager mode and on a CPU.
        eps, momentum, affine, device, dtype: as in torch.nn.BatchNorm2d.

    Raises:
        ValueError: N is not a multiple of ``views``.
    """

    def __init__(
        self,
        num_features: int,
        *,
        views: int = 2,
        synchronised: bool = False,
        fused: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, True, device, dtype)
        self.num_batches_tracked = None
        self.views = views
        self.synchronised = synchronised
        self.fused = fused

    def forward(self, x: Tensor, relu: bool = False, pool: bool = False) -> Tensor:
        """(N, C, ...) -> the same shape and dtype, through a ReLU if asked.

        With ``pool`` through a ReLU and a ResNet's max pool, (N, C, H, W) -> half of H and W.
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
        ranks = dist.get_world_size() if self.synchronised else 1
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

    Only x is kept for the backward, which makes the ReLU's mask anew.
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
        # a cast to its own type has torch 2.11's compiler lose the gradient
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
    """The same through a ReLU and the max pool, by kernels that write none of what is between."""

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
    """Mean, variance and 1 / standard deviation of each view, (V, C).

    The variance is E[x^2] - E[x]^2, two sums that the compiler takes in one pass; in fp32 it is
    off by about 1e-7 (mean / std)^2 of itself.
    """
    wide = _wide(x)
    # not relative to running_mean: torch 2.14's compiler reads that anew in the backward, after
    # its update, and the gradients are wrong
    mean_VC, square_VC = _means(wide, views), _means(wide.square(), views)
    if synchronised:
        mean_VC, square_VC = _over_ranks(mean_VC, square_VC)
    var_VC = (square_VC - mean_VC.square()).clamp(min=0)
    return mean_VC, var_VC, (var_VC + eps).rsqrt()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _means(x: Tensor, views: int) -> Tensor:
    """(N, C, ...) -> (V, C), over the rest."""
    x_VBC = torch.unflatten(x, 0, (views, -1))
    return x_VBC.mean([dim for dim in range(x_VBC.ndim) if dim not in (0, 2)])


def _rows(of_VC: Tensor, x: Tensor) -> Tensor:
    """(V, C) -> (N, C, 1, ...), its view's for each row of x.

    To view x as (V, B, C, ...) would make a view of y, which no ReLU behind may change in place.
    """
    of_NC = of_VC.repeat_interleave(len(x) // len(of_VC), 0)
    return of_NC.view(*of_NC.shape, *[1] * (x.ndim - 2))


def _over_ranks(*of_VC: Tensor) -> Tensor:
    means_KVC: Tensor = torch.ops.isofast.mean_over_ranks(torch.stack(of_VC))
    return means_KVC


def convert_batch_norm(
    module: nn.Module, *, views: int, synchronised: bool = False, fused: bool = False
) -> nn.Module:
    """Replace each BatchNorm below ``module`` by a ViewBatchNorm with the same tensors.

    Those that ``foreign_batch_norms`` names stay as they are.

    Args:
        module: changed in place, unless it is itself a BatchNorm.
        views, synchronised, fused: as in ViewBatchNorm.

    Returns:
        ``module`` or what stands in its place.
    """
    if isinstance(module, _BatchNorm) and not _is_foreign(module):
        norm = ViewBatchNorm(
            module.num_features,
            views=views,
            synchronised=synchronised,
            fused=fused,
            eps=module.eps,
            momentum=cast(float, module.momentum),
            affine=module.affine,
        )
        norm.weight, norm.bias = module.weight, module.bias
        norm.running_mean, norm.running_var = module.running_mean, module.running_var
        return norm.train(module.training)
    for name, child in module.named_children():
        ours = convert_batch_norm(child, views=views, synchronised=synchronised, fused=fused)
        setattr(module, name, ours)
    return module


def foreign_batch_norms(module: nn.Module) -> set[str]:
    """Names of the classes of BatchNorm below ``module`` that cannot be replaced.

    They are subclasses of torch's, such as timm's with an activation, and any without a moving
    average of its statistics.
    """
    norms = (norm for norm in module.modules() if isinstance(norm, _BatchNorm))
    return {type(norm).__name__ for norm in norms if _is_foreign(norm)}


def _is_foreign(norm: _BatchNorm) -> bool:
    ours = type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return not ours or not norm.track_running_stats or norm.momentum is None


@torch.library.custom_op("isofast::mean_over_ranks", mutates_args=())
def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean over the ranks, differentiable, with two or more of them.

    An operation of its own, so that torch.compile keeps the collective in its graph.
    """
    mean = x.clone()
    dist.all_reduce(mean)
    return mean.div_(dist.get_world_size())


@mean_over_ranks.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


mean_over_ranks.register_autograd(
    lambda context, grad: torch.ops.isofast.mean_over_ranks(grad.contiguous())
)
