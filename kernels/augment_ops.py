"""The augmentation as a custom op: dispatch and fake shapes; `ops` has the other ops.

CUDA tensors run Triton, CPU tensors `augment_reference`, which defines the shape letters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import augment_reference
from .arguments import check_augment_arguments
from .dispatch import HAS_TRITON, device_of, runs_triton

if HAS_TRITON:
    from .augment import augment_launch


@torch.library.custom_op("isofast_kernels::augment_views", mutates_args=())
def _augment_views(
    images: Tensor,
    index: Tensor,
    parameters: Tensor,
    side: int,
    mean: list[float],
    std: list[float],
    blur: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return views_VBSS3, the channels_last memory layout."""
    if runs_triton(parameters):
        with device_of(images):
            return augment_launch(images, index, parameters, side, mean, std, blur, dtype)
    if not blur:
        parameters = augment_reference.without_blur(parameters)
    return augment_reference.augment_views_reference(
        images, index, parameters, side=side, mean=mean, std=std, dtype=dtype
    )


@_augment_views.register_fake
def _(
    images: Tensor,
    index: Tensor,
    parameters: Tensor,
    side: int,
    mean: list[float],
    std: list[float],
    blur: bool,
    dtype: torch.dtype,
) -> Tensor:
    return images.new_empty((*parameters.shape[:2], side, side, 3), dtype=dtype)


def augment_views(
    images_NHW3: Tensor,
    index_B: Tensor,
    parameters_VBP: Tensor,
    *,
    side: int,
    mean: Sequence[float],
    std: Sequence[float],
    blur: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Create every view of a batch from stored 8-bit images in one launch.

    A window is resized (bicubic, antialiased), colour-jittered in its drawn order, converted to
    gray, blurred, solarized, flipped and normalised: torchvision's operations on Pillow images,
    rounded to levels where Pillow rounds. `isofast_kernels.augment_reference` spells them out.
    Nothing is random here: the same arguments give the same bits.

    Args:
        images_NHW3: the stored images, (N, H, W, 3), uint8, RGB, contiguous.
        index_B: indices of the batch's images, (B,), int64, each from 0 to N - 1.
        parameters_VBP: transform parameters, (V, B, 16), float32, for V views. The columns, in
            this order (`augment_reference.COLUMNS`):
            top, left, height, width: the window of the stored image that the view shows, in pixels,
            within the image;
            brightness, contrast, saturation: factors, 1 changes nothing; hue: shift as a fraction
            of the colour circle, in [-1, 1], 0 changes nothing;
            first, second, third, fourth: their order: 0 brightness, 1 contrast, 2 saturation, 3
            hue;
            gray: 0 or 1; blur_sigma: in pixels of the view, 0 for none; solarize_from: levels from
            here up are inverted, 256 for none; flip: 0 or 1.
        side: side of a view in pixels.
        mean, std: per channel, for pixels in [0, 1].
        blur: whether any row blurs; if false, column blur_sigma is ignored. A blur reaches
            ceil(3 sigma) pixels, which must be less than `side`.
        dtype: dtype of the views: float32, float16 or bfloat16.

    Returns:
        views_VBCSS, (V, B, 3, side, side); each view is contiguous as channels_last.

    Raises:
        ValueError: a shape, dtype, device or size is not allowed. Values on the device are not
            checked, which would need a host sync: an index or window out of range is undefined.
    """
    check_augment_arguments(images_NHW3, index_B, parameters_VBP, side, mean, std, dtype)
    views_VBSS3 = _augment_views(
        images_NHW3,
        index_B,
        parameters_VBP,
        side,
        [float(value) for value in mean],
        [float(value) for value in std],
        blur,
        dtype,
    )
    return views_VBSS3.permute(0, 1, 4, 2, 3)
