"""`isofast prepare --preview`: originals and both views, as the loader makes them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isofast.cli import main
from isofast.config.presets import VIEWS_OF_DATASET
from isofast.data.preview import write_preview
from isofast.data.recipe import recipe_for
from isofast.errors import UserError

GAP, MARGIN, TOP = 4, 12, 48


def tiles(name: str, root: Path, side: int = 96) -> list[list[np.ndarray]]:
    """Cut the tiles out of a preview: rows of nine (side, side, 3), counted from the right."""
    write_preview(name, root, root / "preview.png")
    with Image.open(root / "preview.png") as image:
        sheet = np.asarray(image)
    step = side + GAP
    rows = range(TOP, sheet.shape[0] - MARGIN, step)
    # a pair of views stands apart from the next one
    lefts = [
        sheet.shape[1] - MARGIN - (9 - column) * step - (5 - (column + 1) // 2) * MARGIN
        for column in range(9)
    ]
    return [[sheet[top : top + side, left : left + side] for left in lefts] for top in rows]


@pytest.mark.parametrize("name", VIEWS_OF_DATASET)
def test_every_recipe_is_drawn(tmp_path: Path, pictures: Path, name: str) -> None:
    path = tmp_path / "views.png"
    write_preview(name, pictures, path)
    crop = recipe_for(name).crop
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 9 * crop and image.height > 8 * crop
    assert [path.name for path in tmp_path.iterdir()] == ["views.png"]


def test_views_are_of_the_images_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight plain colours: without jitter every view of an image has that image's colour."""
    colours = [(30 * k + 10, 200 - 20 * k, 90) for k in range(8)]
    for k, colour in enumerate(colours):
        folder = tmp_path / "train" / f"c{k}"
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 50), colour).save(folder / "x.png")
    still = {"jitter_p": 0.0, "gray_p": 0.0, "solarize_p": 0.0}
    monkeypatch.setitem(VIEWS_OF_DATASET, "cifar10", {"view1": still, "view2": still})
    rows = tiles("cifar10", tmp_path)
    assert [len(row) for row in rows] == [9] * 8
    for row, colour in zip(rows, colours, strict=True):
        # the original is taller than wide, so that white is left and right of it
        assert (row[0][:, 0] == 255).all() and (row[0][:, 48] == colour).all()
        for view in row[1:]:
            assert view.shape == (96, 96, 3)
            assert np.abs(view.astype(int) - colour).max() <= 1


def test_views_differ_by_draw(tiny_root: Path) -> None:
    rows = tiles("tinyimagenet", tiny_root, side=128)
    assert [len({view.tobytes() for view in row[1:]}) for row in rows] == [8] * 8


def test_the_command_prepares_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "digits.png"
    command = ["prepare", "digits", "--root", str(tmp_path / "digits"), "--preview", str(path)]
    assert main(command) == 0
    first = path.read_bytes()
    assert f"views of digits: {path}" in capsys.readouterr().out
    # the same pictures, whenever it is asked
    assert main(command) == 0
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("views.jpg", "must be a .png file"),
        ("views", "must be a .png file"),
        ("nowhere/views.png", "there is no folder .*nowhere"),
        ("folder.png", "is a folder"),
    ],
)
def test_bad_paths_are_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, match: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    root = tmp_path / "digits"
    path = tmp_path / name
    assert main(["prepare", "digits", "--root", str(root), "--preview", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    with pytest.raises(UserError, match=match):
        write_preview("digits", root, path)
    assert not root.exists()


def test_few_images_and_pictures_without_labels(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "unlabeled").mkdir()
    for k in range(3):
        shutil.copy(pictures / f"train/class{k}/000.jpg", tmp_path / f"unlabeled/{k}.jpg")
    write_preview("cifar10", tmp_path, tmp_path / "views.png")
    with Image.open(tmp_path / "views.png") as image:
        assert image.height < 4 * 100 + 60


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_original_is_as_bright_as_its_views(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type[np.integer]
) -> None:
    """Gray of 8 and of 16 bits, of which Pillow keeps the low end and calls the rest white."""
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    levels = (0, 40, 130, 255)
    for level in levels:
        value = level * np.iinfo(dtype).max // 255
        Image.fromarray(np.full((32, 32), value, dtype)).save(folder / f"{level:03d}.png")
    still = {"jitter_p": 0.0}
    monkeypatch.setitem(VIEWS_OF_DATASET, "cifar10", {"view1": still, "view2": still})
    rows = tiles("cifar10", tmp_path)
    for row, level in zip(rows, levels, strict=True):
        for tile in row:
            assert np.abs(tile.astype(int) - level).max() <= 1


def test_what_cannot_be_read_is_left_out_of_the_preview(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, path = tmp_path / "root", tmp_path / "views.png"
    shutil.copytree(pictures, root, ignore=shutil.ignore_patterns(".isofast*"))
    (root / "train" / "class0" / "000.jpg").write_text("no picture")
    command = ["prepare", "imagefolder", "--root", str(root), "--preview", str(path)]
    assert main(command) == 2 and not path.exists()
    capsys.readouterr()
    assert main([*command, "--on-bad-image", "skip"]) == 0, capsys.readouterr().err
    with Image.open(path) as image:
        assert image.format == "PNG"
