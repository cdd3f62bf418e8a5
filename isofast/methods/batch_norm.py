"""BatchNorm with statistics for each view of a batch, over one rank or all.

Shapes: V views of B images each, stacked to N = V * B rows; C channels.
"""

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


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

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape and dtype."""
        views = self.views if self.training else 1
        if len(x) % views:
            raise ValueError(f"{len(x)} rows do not hold {views} views of equal size")
        if self.synchronised and self.training:
            return self._normalise_over_ranks(x)
        if views == 1:
            return self._normalise(x)
        return torch.cat([self._normalise(view) for view in x.chunk(views)])

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

    def _normalise_over_ranks(self, x: Tensor) -> Tensor:
        x_VBC = torch.unflatten(x, 0, (self.views, -1))
        over = [dim for dim in range(x_VBC.ndim) if dim not in (0, 2)]
        shape = [self.views, 1, -1, *[1] * (x.ndim - 2)]
        assert self.running_mean is not None and self.running_var is not None
        wide = x_VBC if x.dtype == torch.float64 else x_VBC.float()
        var_VC, mean_VC = torch.var_mean(wide, over, correction=0)
        # not relative to running_mean: torch 2.14's compiler reads that anew in the backward, after
        # its update, and the gradients are wrong
        moments_2VC = torch.stack([mean_VC, var_VC + mean_VC.square()])
        mean_VC, square_VC = torch.ops.isofast.mean_over_ranks(moments_2VC)
        var_VC = (square_VC - mean_VC.square()).clamp(min=0)
        with torch.no_grad():
            rows = x_VBC[0].numel() // x.shape[1] * dist.get_world_size()
            momentum = cast(float, self.momentum)
            for mean_C, var_C in zip(mean_VC, var_VC, strict=True):
                self.running_mean.lerp_(mean_C, momentum)
                self.running_var.lerp_(var_C * (rows / (rows - 1)), momentum)
        scale_VC = (var_VC + self.eps).rsqrt()
        if self.weight is not None:
            scale_VC = scale_VC * self.weight
        offset_VC = -mean_VC * scale_VC
        if self.bias is not None:
            offset_VC = offset_VC + self.bias
        normalised: Tensor = wide * scale_VC.view(shape) + offset_VC.view(shape)
        return normalised.to(x.dtype).flatten(0, 1)


def convert_batch_norm(module: nn.Module, *, views: int, synchronised: bool) -> nn.Module:
    """Replace each BatchNorm below ``module`` by a ViewBatchNorm with the same tensors.

    Those that ``foreign_batch_norms`` names stay as they are.

    Args:
        module: changed in place, unless it is itself a BatchNorm.
        views, synchronised: as in ViewBatchNorm.

    Returns:
        ``module`` or what stands in its place.
    """
    if isinstance(module, _BatchNorm) and not _is_foreign(module):
        norm = ViewBatchNorm(
            module.num_features,
            views=views,
            synchronised=synchronised,
            eps=module.eps,
            momentum=cast(float, module.momentum),
            affine=module.affine,
        )
        norm.weight, norm.bias = module.weight, module.bias
        norm.running_mean, norm.running_var = module.running_mean, module.running_var
        return norm.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, convert_batch_norm(child, views=views, synchronised=synchronised))
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
