"""What a data root holds beside its images: links that lead nowhere, pictures that are not used."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from isofast.cli import main
from isofast.data import open_dataset, overlooked_note, verify_images
from isofast.errors import UserError
from isofast.images import Images


@pytest.fixture
def root(tmp_path: Path, pictures: Path) -> Path:
    shutil.copytree(pictures, tmp_path / "data", ignore=shutil.ignore_patterns(".isofast*"))
    return tmp_path / "data"


@pytest.mark.parametrize("name", ["train/class1", "val/class3", "unlabeled", "train"])
def test_a_folder_that_is_a_link_to_nowhere_is_refused(root: Path, name: str) -> None:
    for split in ("train", "val"):
        # where both splits lose it, the classes still agree
        if name == "train/class1":
            shutil.rmtree(root / split / "class1")
    if name == "train":
        (root / "unlabeled").mkdir()
        shutil.copy(root / "train" / "class0" / "000.jpg", root / "unlabeled")
        shutil.rmtree(root / "train")
    (root / name).symlink_to(root / "unmounted")
    with pytest.raises(UserError, match=rf"{name}.* is a link that leads nowhere \(.*unmounted\)"):
        open_dataset(root, name.split("/")[0].replace("unlabeled", "train"))


def test_a_link_to_a_folder_is_a_class(root: Path, tmp_path: Path) -> None:
    (root / "train" / "class1").rename(tmp_path / "elsewhere")
    (root / "train" / "class1").symlink_to(tmp_path / "elsewhere")
    assert len(open_dataset(root, "train")) == 51


def test_pictures_that_are_not_used_are_counted(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert overlooked_note(open_dataset(root, "train")) == ""
    folder = root / "train" / "class0"
    image = Image.new("RGB", (4, 4))
    image.save(folder / "a.webp")
    image.save(folder / "b.BMP")
    image.save(root / "train" / "stray.png")
    (folder / "more" / "deep").mkdir(parents=True)
    image.save(folder / "more" / "c.png")
    image.save(folder / "more" / "deep" / "d.gif")
    # neither of these is a picture of the data set
    (folder / "notes.txt").write_text("x")
    (folder / ".thumbnails").mkdir()
    image.save(folder / ".thumbnails" / "e.png")
    image.save(folder / ".f.gif")

    train = verify_images(open_dataset(root, "train"), progress=False)
    assert len(train) == 51
    assert train.overlooked == (
        "train/class0/a.webp",
        "train/class0/b.BMP",
        "train/class0/more/c.png",
        "train/class0/more/deep/d.gif",
        "train/stray.png",
    )
    note = overlooked_note(train)
    assert note.startswith("5 train file(s) look like pictures and are not used: train/class0/a.w")
    assert "\n" not in note
    assert main(["prepare", "imagefolder", "--root", str(root)]) == 0
    assert note in capsys.readouterr().out.splitlines()
    assert Images(train, open_dataset(root, "val")).notes() == [note]
