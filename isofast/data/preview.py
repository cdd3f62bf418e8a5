"""Preview pictures of a recipe: originals and both views."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.utils import make_grid

from isofast.data.check import OnBad, check_folder
from isofast.data.files import check_output, write_atomically
from isofast.data.folder import ImageFolder, open_dataset
from isofast.data.loaders import Batch, draw_views
from isofast.data.recipe import Recipe, recipe_for
from isofast.data.resident import rgb
from isofast.errors import UserError

_IMAGES = 8
_DRAWS = 4
# minimum, in pixels
_TILE = 96
_GAP = 4


def check_preview_path(path: Path) -> None:
    """Refuse a path that cannot be written to, before any work is done.

    Raises:
        UserError: it is not named .png, or as for `check_output`.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"--preview {path} must be a .png file, as in --preview views.png")
    check_output(path, "--preview")


def write_preview(name: str, root: Path, path: Path, *, on_bad: OnBad = "stop") -> None:
    """Draw one row per image for a few training images: the original, then draws of both views.

    Args:
        name: the data set whose recipe is used.
        root: the data root.
        path: the PNG to write.
        on_bad: as for `check_folder`.

    Raises:
        UserError: the root cannot be used, or the picture cannot be written.
    """
    recipe = recipe_for(name)
    images = check_folder(open_dataset(root, "train"), on_bad=on_bad)
    count = min(_IMAGES, len(images))
    # spread over the data set
    chosen = images.subset(np.arange(count) * len(images) // count + len(images) // (2 * count))
    pairs = draw_views("auto", chosen, recipe, _DRAWS, device=torch.device("cpu"), threads=1)
    views = [_levels(x_BCHW, recipe) for pair in pairs for x_BCHW in pair]
    side = views[0].shape[-1]
    originals = torch.stack([_original(chosen, k, side) for k in range(count)])
    try:
        _write([originals, *views], path)
    except OSError as error:
        raise UserError(f"cannot write --preview {path}: {error.strerror or error}") from error


def write_views(batch: Batch, recipe: Recipe, path: Path) -> None:
    """Draw one row per image for the first images of a batch: view 1 and view 2."""
    views = (batch.x1_BCHW[:_IMAGES], batch.x2_BCHW[:_IMAGES])
    _write([_levels(x_BCHW.float().cpu(), recipe) for x_BCHW in views], path)


def _write(columns: list[torch.Tensor], path: Path) -> None:
    """Write a grid of tiles (B, 3, side, side) uint8, one column per tensor."""
    tiles = torch.stack(columns, dim=1).flatten(0, 1)
    sheet = make_grid(tiles, nrow=len(columns), padding=_GAP, pad_value=255)
    picture = Image.fromarray(sheet.permute(1, 2, 0).numpy())
    write_atomically(path, lambda part: picture.save(part))


def _original(dataset: ImageFolder, index: int, side: int) -> torch.Tensor:
    """Return the whole stored image, padded to a square, (3, side, side) uint8."""
    with dataset.open(index) as file, Image.open(file) as stored:
        image = Image.fromarray(rgb(stored))
    resampling = Image.Resampling
    method = resampling.NEAREST if max(image.size) <= side else resampling.LANCZOS
    square = ImageOps.pad(image, (side, side), method, color="white")
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def _levels(x_BCHW: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Undo the normalisation and enlarge, (B, 3, side, side) uint8."""
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in (recipe.mean, recipe.std))
    levels_BCHW = (255 * (x_BCHW * std + mean)).round().clamp(0, 255).to(torch.uint8)
    # integer factors keep small images' pixels sharp
    zoom = -(-_TILE // recipe.crop)
    return levels_BCHW.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
