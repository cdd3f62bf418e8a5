"""Data sets, augmentation recipes and the loaders that feed the training loop.

DALI is imported only when a loader is made: listing, checking and preparing data need none of it.
"""

from typing import TYPE_CHECKING, Any

from isofast.data.datasets import ImageFolder, left_out_note, verify_images
from isofast.data.listing import open_dataset
from isofast.data.order import Batch
from isofast.data.recipe import Recipe, ViewRecipe, recipe_for
from isofast.errors import UserError

if TYPE_CHECKING:
    from isofast.data.loaders import EvalLoader, TrainLoader

BACKENDS = ("dali",)

__all__ = [
    "BACKENDS",
    "Batch",
    "EvalLoader",
    "ImageFolder",
    "Recipe",
    "TrainLoader",
    "ViewRecipe",
    "left_out_note",
    "make_eval_loader",
    "make_train_loader",
    "open_dataset",
    "recipe_for",
    "verify_images",
]


def make_train_loader(
    backend: str, dataset: ImageFolder, recipe: Recipe, **options: Any
) -> "TrainLoader":
    """Make the endless loader of augmented batches; options as for `TrainLoader`.

    Raises:
        UserError: the backend is unknown or not installed, and what `TrainLoader` raises.
    """
    _check_backend(backend)
    loader: TrainLoader = __getattr__("TrainLoader")(dataset, recipe, **options)
    return loader


def make_eval_loader(
    backend: str, dataset: ImageFolder, recipe: Recipe, indices: Any, **options: Any
) -> "EvalLoader":
    """Make the loader of clean images; indices and options as for `EvalLoader`.

    Raises:
        UserError: the backend is unknown or not installed, and what `EvalLoader` raises.
    """
    _check_backend(backend)
    loader: EvalLoader = __getattr__("EvalLoader")(dataset, recipe, indices, **options)
    return loader


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise UserError(f"data.backend is {backend!r}; allowed is {' or '.join(BACKENDS)}")


def __getattr__(name: str) -> Any:
    """Import the loaders, and DALI with them, on first use."""
    if name not in ("EvalLoader", "TrainLoader"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from isofast.data import loaders
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("nvidia"):
            raise
        raise UserError(
            "NVIDIA DALI is not installed, and data.backend 'dali' needs it (Linux only). "
            "Install it with `pip install nvidia-dali-cuda130` (nvidia-dali-cuda120 for CUDA 12)"
        ) from error
    return getattr(loaders, name)
