"""Data sets, augmentation recipes and the loaders that feed the training loop.

DALI is imported only when a loader is made or an image is checked for the first time; where it is
not installed, data can still be listed, checked (by Pillow alone) and prepared.
"""

import importlib
from typing import TYPE_CHECKING, Any

import torch

from isofast.data.backend import BACKENDS, resolve_backend
from isofast.data.datasets import ImageFolder, left_out_note, verify_images
from isofast.data.listing import open_dataset, overlooked_note
from isofast.data.order import Batch
from isofast.data.recipe import Recipe, recipe_for
from isofast.errors import UserError

if TYPE_CHECKING:
    from isofast.data.loaders import EvalLoader, TrainLoader
    from isofast.data.resident import ResidentLoader

# where each class that needs DALI is
_LAZY = {
    "EvalLoader": "isofast.data.loaders",
    "TrainLoader": "isofast.data.loaders",
    "ResidentLoader": "isofast.data.resident",
}

__all__ = [
    "BACKENDS",
    "Batch",
    "EvalLoader",
    "ImageFolder",
    "Recipe",
    "ResidentLoader",
    "TrainLoader",
    "left_out_note",
    "make_eval_loader",
    "make_train_loader",
    "open_dataset",
    "overlooked_note",
    "recipe_for",
    "resolve_backend",
    "verify_images",
]


def make_train_loader(
    backend: str,
    dataset: ImageFolder,
    recipe: Recipe,
    *,
    device: torch.device,
    resident_limit_gb: float = 8.0,
    dtype: torch.dtype = torch.float32,
    prefetch: int = 2,
    **options: Any,
) -> "TrainLoader | ResidentLoader":
    """Make the endless loader of augmented batches.

    Args:
        backend: "auto", "dali" or "resident"; `resolve_backend` says what auto takes.
        dataset: the training images; checked first where `verify_images` has not been called.
        recipe: the augmentation.
        device: where batches are made.
        resident_limit_gb: the most that decoded images may take, in 10^9 bytes.
        dtype: of the views.
        prefetch: batches that DALI makes ahead; a resident one is made when it is asked for.
        options: as for `TrainLoader`.

    Raises:
        UserError: the backend is unknown, not installed or cannot be used with this set and
            recipe, and what the loaders raise.
    """
    if backend != "dali":
        dataset = dataset if dataset.sizes is not None else verify_images(dataset)
        backend = resolve_backend(backend, dataset, recipe, device, resident_limit_gb)
    if backend == "resident":
        resident: type[ResidentLoader] = __getattr__("ResidentLoader")
        return resident(dataset, recipe, device=device, dtype=dtype, **options)
    dali: type[TrainLoader] = __getattr__("TrainLoader")
    return dali(dataset, recipe, device=device, dtype=dtype, prefetch=prefetch, **options)


def make_eval_loader(
    dataset: ImageFolder, recipe: Recipe, indices: Any, **options: Any
) -> "EvalLoader":
    """Make the loader of clean images, which is DALI's; indices and options as for `EvalLoader`.

    Raises:
        UserError: DALI is not installed, and what `EvalLoader` raises.
    """
    loader: type[EvalLoader] = __getattr__("EvalLoader")
    return loader(dataset, recipe, indices, **options)


def __getattr__(name: str) -> Any:
    """Import the loaders, and DALI with them, on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_LAZY[name])
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("nvidia"):
            raise
        raise UserError(
            "NVIDIA DALI is not installed, and every data.backend needs it (Linux only). "
            "Install it with `pip install nvidia-dali-cuda130` (nvidia-dali-cuda120 for CUDA 12)"
        ) from error
    return getattr(module, name)
