"""A picture of what a recipe does: originals and both views."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from isofast.data.check import OnBad, check_folder
from isofast.data.files import write_atomically
from isofast.data.folder import ImageFolder, open_dataset
from isofast.data.loaders import draw_views
from isofast.data.recipe import Recipe, recipe_for
from isofast.data.resident import rgb
from isofast.errors import UserError

Pixels = npt.NDArray[np.uint8]

_IMAGES = 8
_DRAWS = 4
# pixels, at least
_TILE = 96
_LONGEST_NAME = 24
_SHARP = Image.Resampling.NEAREST
_GAP, _MARGIN, _LINE = 4, 12, 18


def check_preview_path(path: Path) -> None:
    """Refuse a path that no picture can be written to, before any work is done.

    Raises:
        UserError: it is not named .png, its folder is missing or may not be entered, or it is a
            folder itself.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"--preview {path} must be a .png file, as in --preview views.png")
    try:
        if not path.parent.is_dir():
            raise UserError(f"--preview {path}: there is no folder {path.parent}; make it first")
        if path.is_dir():
            raise UserError(f"--preview {path} is a folder; name a file in it")
    except OSError as error:
        raise UserError(f"--preview {path}: {error.strerror}; name another place") from error


def write_preview(name: str, root: Path, path: Path, *, on_bad: OnBad = "stop") -> None:
    """Draw some training images of a prepared root, each with several draws of both views.

    Args:
        name: the data set whose recipe it is.
        root: the data root.
        path: the PNG to write.
        on_bad: as for `check_folder`.

    Raises:
        UserError: the root cannot be used, or the picture cannot be written.
    """
    check_preview_path(path)
    recipe = recipe_for(name)
    chosen = _spread_out(check_folder(open_dataset(root, "train"), on_bad=on_bad))
    # in whole multiples of their size, so that small images keep sharp pixels
    side = recipe.crop * -(-_TILE // recipe.crop)
    rows = [[_original(root / image, side)] for image in chosen.paths]
    cpu = torch.device("cpu")
    for views in draw_views("auto", chosen, recipe, _DRAWS, device=cpu, threads=1):
        for row, *pair in zip(rows, *(_pixels(x_NCHW, recipe) for x_NCHW in views), strict=True):
            row += [Image.fromarray(view).resize((side, side), _SHARP) for view in pair]
    names = [chosen.classes[k] if k >= 0 else "no label" for k in chosen.labels]
    # what the file system takes as a name need not be text
    names = [name.encode("utf-8", "replace").decode()[:_LONGEST_NAME] for name in names]
    sheet = _sheet(f"{name}, {recipe.crop} x {recipe.crop} pixels", rows, names, side)
    try:
        write_atomically(path, lambda part: sheet.save(part, format="PNG"))
    except OSError as error:
        raise UserError(f"cannot write --preview {path}: {error.strerror or error}") from error


def _spread_out(dataset: ImageFolder) -> ImageFolder:
    """A few images from all over the data set, as a data set."""
    count = min(_IMAGES, len(dataset))
    return dataset.take(np.arange(count) * len(dataset) // count + len(dataset) // (2 * count))


def _original(path: Path, side: int) -> Image.Image:
    """The stored image as it is, whole, in a square."""
    with Image.open(path) as stored:
        image = Image.fromarray(rgb(stored))
    zoom = side / max(image.size)
    size = [max(1, round(length * zoom)) for length in image.size]
    smooth = _SHARP if zoom >= 1 else Image.Resampling.LANCZOS
    square = Image.new("RGB", (side, side), "white")
    square.paste(image.resize(size, smooth), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def _pixels(x_BCHW: torch.Tensor, recipe: Recipe) -> Pixels:
    """Undo the normalisation: (B, H, W, 3) uint8."""
    unit = x_BCHW.permute(0, 2, 3, 1).numpy() * np.array(recipe.std) + np.array(recipe.mean)
    levels: Pixels = np.rint(255 * unit).clip(0, 255).astype(np.uint8)
    return levels


def _sheet(title: str, rows: list[list[Image.Image]], names: list[str], side: int) -> Image.Image:
    font = ImageFont.load_default(_LINE * 2 / 3)
    step = side + _GAP
    names_width = _MARGIN + max(int(font.getlength(name)) for name in names)

    def left(column: int) -> int:
        """A pair of views stands apart from the next one."""
        return names_width + _MARGIN + column * step + (column + 1) // 2 * _MARGIN

    width = left(1 + 2 * _DRAWS) + _MARGIN
    top = _MARGIN + 2 * _LINE
    sheet = Image.new("RGB", (width, top + len(rows) * step + _MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN), title, "black", font)
    for column in range(1 + 2 * _DRAWS):
        caption = f"view {2 - column % 2}" if column else "original"
        pen.text((left(column), _MARGIN + _LINE), caption, "black", font)
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = top + number * step
        pen.text((_MARGIN, y + side // 2 - _LINE // 2), name, "black", font)
        for column, tile in enumerate(row):
            sheet.paste(tile, (left(column), y))
    return sheet
