"""The stem's BatchNorm, ReLU and max pool as custom ops: dispatch and fake shapes.

CUDA tensors run Triton, CPU tensors `reference`, which defines the shape letters. The caller
computes the statistics, over whichever ranks it likes.
"""

import torch
from torch import Tensor

from . import reference
from .dispatch import HAS_TRITON, device_of, runs_triton

if HAS_TRITON:
    from .norm_pool import norm_pool_gradient_launch, norm_pool_launch, norm_pool_sums_launch


@torch.library.custom_op("isofast_kernels::norm_pool", mutates_args=())
def norm_pool(x: Tensor, mean: Tensor, slope: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return `reference.norm_pool_reference`, outside autograd, in channels_last."""
    if _runs_triton(x):
        with device_of(x):
            return norm_pool_launch(_last(x), mean, slope, bias)
    y, taps = reference.norm_pool_reference(x, mean, slope, bias)
    return _last(y), _last(taps)


@norm_pool.register_fake
def _(x: Tensor, mean: Tensor, slope: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    n, channels, height, width = x.shape
    y = x.new_empty((n, channels, (height + 1) // 2, (width + 1) // 2))
    y = y.to(memory_format=torch.channels_last)
    return y, torch.empty_like(y, dtype=torch.uint8)


@torch.library.custom_op("isofast_kernels::norm_pool_sums", mutates_args=())
def norm_pool_sums(dy: Tensor, taps: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """Return sums of g and g (x - mean) over each view, (2, V, C), with g as in `reference`."""
    if _runs_triton(x, dy):
        with device_of(x):
            return norm_pool_sums_launch(_last(dy), _last(taps), _last(x), mean)
    g = reference.norm_pool_gradient_reference(dy, taps, x, mean.dtype)
    both = torch.stack([g, g * (x - reference.of_images(mean, x))])
    return both.unflatten(1, (len(mean), -1)).sum((2, 4, 5))


@norm_pool_sums.register_fake
def _(dy: Tensor, taps: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    return mean.new_empty((2, *mean.shape))


@torch.library.custom_op("isofast_kernels::norm_pool_gradient", mutates_args=())
def norm_pool_gradient(
    dy: Tensor,
    taps: Tensor,
    x: Tensor,
    mean: Tensor,
    slope: Tensor,
    shift: Tensor,
    along: Tensor,
) -> Tensor:
    """Return dx = slope g - shift - along (x - mean), in x's dtype, channels_last."""
    if _runs_triton(x, dy):
        with device_of(x):
            parts = _last(dy), _last(taps), _last(x)
            return norm_pool_gradient_launch(*parts, mean, slope, shift, along)
    g = reference.norm_pool_gradient_reference(dy, taps, x, mean.dtype)
    of_x = [reference.of_images(of_VC, x) for of_VC in (mean, slope, shift, along)]
    return _last((g * of_x[1] - of_x[2] - (x - of_x[0]) * of_x[3]).to(x.dtype))


@norm_pool_gradient.register_fake
def _(
    dy: Tensor,
    taps: Tensor,
    x: Tensor,
    mean: Tensor,
    slope: Tensor,
    shift: Tensor,
    along: Tensor,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _runs_triton(*tensors: Tensor) -> bool:
    # the kernels compute in fp32
    return tensors[0].dtype != torch.float64 and runs_triton(*tensors)


def _last(x_NCHW: Tensor) -> Tensor:
    return x_NCHW.contiguous(memory_format=torch.channels_last)
