"""Data sets, augmentation recipes and the loaders that feed the training loop.

DALI is imported only if needed: by its own loader, and to check files that it will read.
"""

from isofast.data.check import check_folder
from isofast.data.folder import UNLABELLED, ImageFolder, open_dataset
from isofast.data.loaders import Batch, EvalLoader, TrainLoader, draw_views, resolve_backend
from isofast.data.recipe import Recipe, recipe_for

__all__ = [
    "UNLABELLED",
    "Batch",
    "EvalLoader",
    "ImageFolder",
    "Recipe",
    "TrainLoader",
    "check_folder",
    "draw_views",
    "open_dataset",
    "recipe_for",
    "resolve_backend",
]
