"""`isofast prepare --preview`: originals and both views, as produced by the loader."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isofast.cli import main
from isofast.config.presets import VIEWS_OF_DATASET
from isofast.data.preview import write_preview

GAP = 4


def tiles(path: Path, side: int = 96) -> list[list[np.ndarray]]:
    """Cut a preview into its tiles: rows of nine (side, side, 3) images."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        sheet = np.asarray(image)
    tops, lefts = (range(GAP, length - GAP, side + GAP) for length in sheet.shape[:2])
    return [[sheet[top : top + side, left : left + side] for left in lefts] for top in tops]


@pytest.mark.parametrize("name", VIEWS_OF_DATASET)
def test_every_recipe_is_drawn(tmp_path, pictures, name):
    path = tmp_path / "views.png"
    write_preview(name, pictures, path)
    side = {"tinyimagenet": 128, "imagefolder": 224}.get(name, 96)
    rows = tiles(path, side)
    # every view is a different draw
    assert [len({view.tobytes() for view in row[1:]}) for row in rows] == [8] * 8
    assert [path.name for path in tmp_path.iterdir()] == ["views.png"]


def test_views_are_of_the_images_beside_them(tmp_path, monkeypatch):
    """Plain colours: without jitter, every view has its image's colour."""
    colours = [(30 * k + 10, 200 - 20 * k, 90) for k in range(7)]
    plain = [Image.new("RGB", (40, 50), colour) for colour in colours]
    # Pillow would keep the low end of the 16-bit range and clip the rest to white
    plain.append(Image.fromarray(np.full((50, 40), 130 * 257, np.uint16)))
    for k, image in enumerate(plain):
        folder = tmp_path / "train" / f"c{k}"
        folder.mkdir(parents=True)
        image.save(folder / "x.png")
    still = {"jitter_p": 0.0, "gray_p": 0.0, "solarize_p": 0.0}
    monkeypatch.setitem(VIEWS_OF_DATASET, "cifar10", {"view1": still, "view2": still})
    write_preview("cifar10", tmp_path, tmp_path / "preview.png")
    for row, colour in zip(tiles(tmp_path / "preview.png"), [*colours, (130,) * 3], strict=True):
        assert len(row) == 9
        # the original is taller than wide, so it has white margins left and right
        assert (row[0][:, 0] == 255).all() and (row[0][:, 48] == colour).all()
        for view in row[1:]:
            assert np.abs(view.astype(int) - colour).max() <= 1


def test_the_command_prepares_and_draws(tmp_path, capsys):
    path = tmp_path / "digits.png"
    command = ["prepare", "digits", "--root", str(tmp_path / "digits"), "--preview", str(path)]
    assert main(command) == 0
    first = path.read_bytes()
    assert f"views of digits: {path}" in capsys.readouterr().out
    # the same preview on every call
    assert main(command) == 0
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("views.jpg", "must be a .png file"),
        ("nowhere/views.png", "there is no folder"),
        ("folder.png", "is a folder"),
    ],
)
def test_bad_paths_are_refused_before_the_work(tmp_path, refused, name, words):
    (tmp_path / "folder.png").mkdir()
    root = tmp_path / "digits"
    refused(["prepare", "digits", "--root", root, "--preview", tmp_path / name], words)
    assert not root.exists()


def test_few_images_without_labels_one_of_them_spoiled(tmp_path, pictures):
    root, path = tmp_path / "root", tmp_path / "views.png"
    (root / "unlabeled").mkdir(parents=True)
    for k in range(3):
        shutil.copy(pictures / f"train/class{k}/000.jpg", root / f"unlabeled/{k}.jpg")
    (root / "unlabeled/1.jpg").write_text("no picture")
    command = ["prepare", "imagefolder", "--root", str(root), "--preview", str(path)]
    assert main(command) == 2 and not path.exists()
    assert main([*command, "--on-bad-image", "skip"]) == 0
    assert len(tiles(path, side=224)) == 2
