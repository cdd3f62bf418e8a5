"""Argument checks of the public operations; a ValueError says what is allowed and what to do."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import augment_reference, reference

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_FEATURES = 8192
"""Largest D of the losses on CUDA, limited by a block's registers."""


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Reject a name that is not in ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")


def check_same_device(names: str, tensors: Sequence[Tensor]) -> None:
    """Reject tensors on different devices."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        listed = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"{names} are on different devices ({listed}); move them to one with .to(device)."
        )


def check_square(name: str, x_DD: Tensor) -> None:
    """Reject anything but a (D, D) matrix of a dtype that C and W may have."""
    if x_DD.ndim != 2 or x_DD.shape[0] != x_DD.shape[1] or x_DD.shape[0] == 0:
        raise ValueError(
            f"{name} has shape {tuple(x_DD.shape)}; it must be (D, D) with D at least 1."
        )
    if x_DD.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} is {x_DD.dtype}; it must be torch.float32 (torch.float64 on the CPU). "
            "Keep it out of autocast and convert with .float()."
        )
    if x_DD.is_cuda and x_DD.dtype == torch.float64:
        raise ValueError(
            f"{name} is torch.float64 on {x_DD.device}; the CUDA kernels need torch.float32. "
            "Convert with .float(), or call isofast_kernels.reference."
        )


def check_rows(name: str, x_BD: Tensor) -> None:
    """Reject anything but a batch of rows (B, D) of a dtype that the kernels support."""
    if x_BD.ndim != 2 or 0 in x_BD.shape:
        raise ValueError(
            f"{name} has shape {tuple(x_BD.shape)}; it must be (B, D) with B and D at least 1."
        )
    allowed = KERNEL_DTYPES if x_BD.is_cuda else (*KERNEL_DTYPES, torch.float64)
    if x_BD.dtype not in allowed:
        raise ValueError(
            f"{name} is {x_BD.dtype} on {x_BD.device}; it must be one of "
            f"{', '.join(map(str, allowed))}. Convert with .float()."
        )


def check_loss_arguments(
    zs: dict[str, Tensor], targets: dict[str, Tensor], w_DD: Tensor, metric: str
) -> None:
    """Reject embeddings, targets and a W that do not match each other."""
    check_choice("metric", metric, reference.METRICS)
    check_square("w_DD", w_DD)
    first = next(iter(zs.values()))
    if first.is_cuda and first.shape[-1] > MAX_FEATURES:
        raise ValueError(
            f"D is {first.shape[-1]}; on CUDA the losses support at most {MAX_FEATURES} features. "
            "Use isofast_kernels.reference.losses_reference for wider embeddings."
        )
    for name, x_BD in (zs | targets).items():
        check_rows(name, x_BD)
        if x_BD.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(x_BD.shape)} and {next(iter(zs))} has "
                f"{tuple(first.shape)}; embeddings and targets must have the same shape (B, D)."
            )
    for group in (zs, targets):
        dtypes = {x_BD.dtype for x_BD in group.values()}
        if len(dtypes) > 1:
            raise ValueError(
                f"{', '.join(group)} have dtypes {', '.join(sorted(map(str, dtypes)))}; both "
                "directions must have the same dtype. Convert with .to(dtype)."
            )
    if w_DD.shape[0] != first.shape[1]:
        raise ValueError(
            f"w_DD has shape {tuple(w_DD.shape)} and the embeddings have D = {first.shape[1]}; "
            "w_DD must be (D, D) with the same D."
        )
    everything = {**zs, **targets, "w_DD": w_DD}
    check_same_device(", ".join(everything), list(everything.values()))


def as_views(z_BD: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return one tensor or a sequence of tensors as a list of matching, detached views."""
    views = [z_BD] if isinstance(z_BD, Tensor) else list(z_BD)
    if not views:
        raise ValueError("z_BD is an empty sequence; give at least one tensor (B, D).")
    for index, view in enumerate(views):
        name = "z_BD" if isinstance(z_BD, Tensor) else f"z_BD[{index}]"
        check_rows(name, view)
        if view.shape[1] != views[0].shape[1] or view.dtype != views[0].dtype:
            raise ValueError(
                f"{name} is (B, {view.shape[1]}) of {view.dtype} and the first view is "
                f"(B, {views[0].shape[1]}) of {views[0].dtype}; all views must have the same D "
                "and dtype."
            )
    check_same_device("the views", views)
    return [view.detach() for view in views]


def as_updating_views(
    corr_DD: Tensor, z_BD: Tensor | Sequence[Tensor], decay: float
) -> list[Tensor]:
    """Return the views that update C, as a list."""
    views = as_views(z_BD)
    check_square("corr_DD", corr_DD)
    if not corr_DD.is_contiguous():
        raise ValueError(
            f"corr_DD has strides {corr_DD.stride()}; it is updated in place and must be "
            "contiguous. Keep the state in its own tensor (.contiguous() makes a copy)."
        )
    if corr_DD.shape[0] != views[0].shape[1]:
        raise ValueError(
            f"corr_DD has shape {tuple(corr_DD.shape)} and the views have D = "
            f"{views[0].shape[1]}; corr_DD must be (D, D) with the same D."
        )
    if not 0 <= decay <= 1:
        raise ValueError(f"decay is {decay}; it must be between 0 and 1.")
    check_same_device("corr_DD and the views", [corr_DD, views[0]])
    return views


def check_augment_arguments(
    images: Tensor,
    index: Tensor,
    parameters: Tensor,
    side: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> None:
    """Reject what cannot be augmented; values of indices and parameters are not checked."""
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(
            f"images_NHW3 has shape {tuple(images.shape)}; it must be (N, H, W, 3) and not empty."
        )
    if images.dtype != torch.uint8 or not images.is_contiguous():
        raise ValueError(
            f"images_NHW3 is {images.dtype} with strides {images.stride()}; it must be "
            "torch.uint8 and contiguous. Convert once, before training."
        )
    if index.ndim != 1 or index.dtype != torch.int64 or len(index) == 0:
        raise ValueError(
            f"index_B is {index.dtype} of shape {tuple(index.shape)}; it must be torch.int64, (B,) "
            "with B at least 1."
        )
    columns = len(augment_reference.COLUMNS)
    allowed = (len(index), columns)
    if parameters.ndim != 3 or tuple(parameters.shape[1:]) != allowed or len(parameters) == 0:
        raise ValueError(
            f"parameters_VBP has shape {tuple(parameters.shape)}; it must be (V, {len(index)}, "
            f"{columns}) with the columns of isofast_kernels.augment_reference.COLUMNS."
        )
    if parameters.dtype != torch.float32:
        raise ValueError(f"parameters_VBP is {parameters.dtype}; it must be torch.float32.")
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"dtype is {dtype}; allowed are {', '.join(map(str, KERNEL_DTYPES))}.")
    if side < 1:
        raise ValueError(f"side is {side}; it must be at least 1 pixel.")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(
            f"mean is {tuple(mean)} and std is {tuple(std)}; both need three values, std above 0."
        )
    check_same_device("images_NHW3, index_B and parameters_VBP", [images, index, parameters])
