"""Which backend makes the training images: the one place where "auto" is decided."""

import math

import numpy as np
import torch

from isofast.data.datasets import ImageFolder, verify_images
from isofast.data.recipe import Recipe
from isofast.errors import UserError
from isofast_kernels.augment_reference import BLUR_REACH

BACKENDS = ("auto", "dali", "resident")
CHANNELS = 3


def resolve_backend(
    asked: str, dataset: ImageFolder, recipe: Recipe, device: torch.device, limit_gb: float
) -> str:
    """Decide between DALI a batch and images that stay on the device.

    "auto" takes resident on a GPU where set and recipe allow it, else dali: on a CPU the resident
    backend runs the reference of its kernel, which is there to be right rather than fast. The
    answer depends on nothing that changes between two starts of a run on the same kind of device.

    Args:
        asked: data.backend.
        dataset: the training images.
        recipe: the augmentation.
        device: where batches are made.
        limit_gb: data.resident_limit_gb.

    Returns:
        "dali" or "resident".

    Raises:
        UserError: no such backend, or resident was asked for and cannot be.
    """
    if asked not in BACKENDS:
        allowed = ", ".join(BACKENDS[:-1])
        raise UserError(f"data.backend is {asked!r}; allowed are {allowed} and {BACKENDS[-1]}")
    if asked == "dali" or (asked == "auto" and device.type != "cuda"):
        return "dali"
    reason = why_not_resident(dataset, recipe, limit_gb)
    if reason is None:
        return "resident"
    if asked == "resident":
        raise UserError(f"data.backend 'resident' cannot be used: {reason}, or use 'dali'")
    return "dali"


def why_not_resident(dataset: ImageFolder, recipe: Recipe, limit_gb: float) -> str | None:
    """Say why a set cannot stay on the device and what would help; None where it can."""
    views = (recipe.view1, recipe.view2)
    if any(view.has_affine for view in views):
        return (
            f"the {recipe.name!r} recipe rotates, moves, scales or shears images, which it does "
            f"not do; take a recipe without"
        )
    widest = max(view.blur_sigma[1] if view.blur_p > 0 else 0.0 for view in views)
    if math.ceil(BLUR_REACH * widest) >= recipe.crop:
        return (
            f"a blur of sigma {widest:g} reaches beyond a view of {recipe.crop} pixels; raise "
            f"data.crop"
        )
    sizes = (dataset if dataset.sizes is not None else verify_images(dataset)).sizes
    assert sizes is not None
    kinds = np.unique(sizes, axis=0)
    if len(kinds) > 1:
        low, high = kinds[0], kinds[-1]
        return (
            f"it takes images of one size, and the {len(dataset):,} training images have "
            f"{len(kinds)} sizes, from {low[0]} x {low[1]} to {high[0]} x {high[1]} pixels; bring "
            f"them to one size on the disk"
        )
    needed = resident_gb(len(dataset), int(sizes[0, 0]), int(sizes[0, 1]))
    if needed > limit_gb:
        return (
            f"the {len(dataset):,} decoded images take {needed:.3g} GB and "
            f"data.resident_limit_gb is {limit_gb:g}; raise it if the device has the room"
        )
    return None


def resident_gb(images: int, height: int, width: int) -> float:
    """What decoded images of one size take, in 10^9 bytes."""
    return images * height * width * CHANNELS / 1e9
