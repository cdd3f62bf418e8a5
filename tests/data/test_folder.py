"""Listing a data root: classes, links, labels, fingerprints, and what is explained."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isofast.cli import main
from isofast.data import check_folder, ignored_note, open_dataset, recipe_for
from isofast.data.images import Images
from isofast.data.prepare import prepare
from isofast.errors import UserError

from .conftest import train_loader

# takes from root what lets it read everything; others have nothing to lose
UNPRIVILEGED = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]


@pytest.fixture
def root(tmp_path: Path, pictures: Path) -> Path:
    """A copy of the pictures that a test may spoil."""
    shutil.copytree(pictures, tmp_path / "data", ignore=shutil.ignore_patterns(".isofast*"))
    return tmp_path / "data"


def add_unlabeled(root: Path, count: int) -> None:
    (root / "unlabeled").mkdir()
    for k in range(count):
        Image.new("RGB", (24, 24), (40 * k, 90, 160)).save(root / "unlabeled" / f"{k}.png")


def test_images_are_listed_by_path_with_their_classes(pictures: Path) -> None:
    train = open_dataset(pictures, "train")
    assert train.classes == ("class0", "class1", "class2")
    assert len(train) == len(train.paths) == 51 and train.paths == tuple(sorted(train.paths))
    assert train.paths[0] == "train/class0/000.jpg" and train.labels.dtype == np.int64
    assert [train.classes[k] for k in train.labels] == [path.split("/")[1] for path in train.paths]
    # listing opens nothing
    assert train.sizes is None and train.stamps is None


def test_the_fingerprint_changes_with_names_labels_and_sizes(root: Path) -> None:
    seen = {open_dataset(root, "train").fingerprint}
    assert open_dataset(str(root), "train").fingerprint in seen
    path = root / "train" / "class0" / "000.jpg"
    for count, change in enumerate(
        (
            lambda: path.write_bytes(path.read_bytes() + b"\0"),
            lambda: path.rename(path.with_name("999.jpg")),
            lambda: (root / "train" / "class2").rename(root / "train" / "class3"),
            lambda: (root / "train" / "class1" / "001.png").unlink(),
            lambda: add_unlabeled(root, 1),
        )
    ):
        change()
        seen.add(open_dataset(root, "train").fingerprint)
        assert len(seen) == count + 2


def test_missing_folders_are_explained(tmp_path: Path, root: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a folder.*isofast prepare"):
        open_dataset(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="'test'; allowed are train, val"):
        open_dataset(root, "test")
    (root / "train" / "class1" / "sub").mkdir()
    for path in (root / "train" / "class1").glob("*.*"):
        path.unlink()
    with pytest.raises(UserError, match=r"class folder .*/train/class1 has no image"):
        open_dataset(root, "train")
    shutil.rmtree(root / "train" / "class1")
    with pytest.raises(UserError, match="differ; only in val: class1"):
        open_dataset(root, "val")
    shutil.rmtree(root / "train")
    with pytest.raises(UserError, match="has no folder 'train'"):
        open_dataset(root, "train")
    (root / "train").mkdir()
    with pytest.raises(UserError, match="train has no class folder"):
        open_dataset(root, "train")
    shutil.rmtree(root / "val")
    with pytest.raises(UserError, match=r"no folder 'val'.*evaluation.every_epochs=0"):
        open_dataset(root, "val")


@pytest.mark.parametrize("name", ["train/class1", "val/class3", "unlabeled", "train"])
def test_a_folder_that_is_a_link_to_nowhere_is_refused(root: Path, name: str) -> None:
    if name == "train/class1":
        # where both splits lose it, the classes still agree
        for split in ("train", "val"):
            shutil.rmtree(root / split / "class1")
    if name == "train":
        add_unlabeled(root, 1)
        shutil.rmtree(root / "train")
    (root / name).symlink_to(root / "unmounted")
    with pytest.raises(UserError, match=rf"{name}.* is a link that leads nowhere \(.*unmounted\)"):
        open_dataset(root, "val" if name.startswith("val") else "train")


def test_a_link_to_a_folder_is_a_class(root: Path, tmp_path: Path) -> None:
    (root / "train" / "class1").rename(tmp_path / "elsewhere")
    (root / "train" / "class1").symlink_to(tmp_path / "elsewhere")
    assert len(open_dataset(root, "train")) == 51


def test_pictures_that_are_not_used_are_counted(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = open_dataset(root, "train")
    assert before.ignored == () and ignored_note(before) == ""
    folder = root / "train" / "class0"
    ignored = ["class0/a.webp", "class0/b.BMP", "class0/more/c.png", "class0/more/deep/d.gif"]
    # hidden ones and text are no pictures of the data set
    others = ["class0/.thumbnails/e.png", "class0/.f.gif", "class0/notes.txt", "README", ".g/h.png"]
    for name in [*ignored, "stray.png", *others]:
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / name).write_text("x")
    shutil.copy(folder / "000.jpg", folder / "ZZ.JPEG")

    train = check_folder(open_dataset(root, "train"), progress=False)
    assert train.classes == before.classes
    assert set(train.paths) - set(before.paths) == {"train/class0/ZZ.JPEG"}
    assert train.ignored == tuple(f"train/{name}" for name in [*ignored, "stray.png"])
    note = ignored_note(train)
    assert note.startswith("5 train file(s) look like pictures and are not used: train/class0/a.w")
    assert "\n" not in note
    assert main(["prepare", "imagefolder", "--root", str(root)]) == 0
    assert note in capsys.readouterr().out.splitlines()
    assert Images(train, open_dataset(root, "val")).notes() == [note]


def test_unlabeled_pictures_are_trained_on(root: Path) -> None:
    before = open_dataset(root, "train")
    add_unlabeled(root, 5)
    train, val = open_dataset(root, "train"), open_dataset(root, "val")
    assert train.classes == val.classes == before.classes and len(val) == 15
    assert train.paths == (*before.paths, *(f"unlabeled/{k}.png" for k in range(5)))
    assert train.labels.tolist() == [*before.labels.tolist(), *[-1] * 5]
    train = check_folder(train, progress=False)
    loader = train_loader(train, recipe_for("cifar10"), batch_size=56)
    assert Counter(next(loader).y_B.tolist()) == {0: 17, 1: 17, 2: 17, -1: 5}
    loader.close()
    counts = prepare("imagefolder", root)
    assert (counts.classes, counts.train, counts.val, counts.unlabeled) == (3, 56, 15, 5)
    assert "56 train (5 without a label) and 15 val" in str(counts)


def test_pictures_alone_are_a_data_set(tmp_path: Path, pictures: Path) -> None:
    add_unlabeled(tmp_path, 4)
    train = open_dataset(tmp_path, "train")
    assert train.classes == () and train.labels.tolist() == [-1] * 4
    assert check_folder(train, progress=False).sizes.tolist() == [[24, 24]] * 4
    counts = prepare("imagefolder", tmp_path)
    assert (counts.classes, counts.train, counts.val, counts.unlabeled) == (0, 4, 0, 4)
    assert "evaluation.every_epochs=0" in str(counts)
    with pytest.raises(UserError, match=r"no folder 'val'.*evaluation.every_epochs=0"):
        open_dataset(tmp_path, "val")
    # validation classes ask for training classes
    shutil.copytree(pictures / "val", tmp_path / "val")
    with pytest.raises(UserError, match=r"no folder 'train'.*go into .*/unlabeled"):
        open_dataset(tmp_path, "val")
    for path in (tmp_path / "unlabeled").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"folder .*/unlabeled has no image"):
        open_dataset(tmp_path, "train")


def test_a_labelled_set_is_prepared_with_validation_images_only(root: Path) -> None:
    shutil.rmtree(root / "val")
    with pytest.raises(UserError, match=r"no folder 'val'.*evaluation.every_epochs=0"):
        prepare("imagefolder", root)


def test_names_need_not_be_utf8(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = os.fsencode(root / "train" / "class0")
    os.rename(folder + b"/000.jpg", folder + b"/\xfe.jpg")
    assert len(check_folder(open_dataset(root, "train"), progress=False)) == 51
    # neither those of files that are left out or ignored, nor that of the root
    for name in (b"/\xff.png", b"/\xff.gif"):
        Path(os.fsdecode(folder + name)).write_text("no picture")
    there = os.fsdecode(os.fsencode(root) + b"\xff")
    os.rename(root, there)
    command = ["prepare", "imagefolder", "--root", there, "--on-bad-image", "skip"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert all(rf"{name}\udcff" in printed for name in ("data", "class0/"))
    assert r"class0/\udcff.png" in printed and r"class0/\udcff.gif" in printed


@pytest.mark.skipif(os.getuid() == 0 and not shutil.which("setpriv"), reason="needs setpriv")
@pytest.mark.parametrize(
    ("forbidden", "mode", "named"),
    [
        ("root/train/class1/001.png", 0o000, "root/train/class1/001.png (Permission denied)"),
        ("root/train/class1", 0o000, "root/train/class1"),
        ("root/train", 0o400, "root/train"),
        ("root", 0o600, "root/"),
        (".", 0o600, "root"),
        ("out", 0o600, "out/views.png"),
    ],
)
def test_what_may_not_be_read_is_named(
    forbidden: str, mode: int, named: str, pictures: Path, tmp_path: Path
) -> None:
    """Without the privileges that root has."""
    place = tmp_path / "place"
    (place / "out").mkdir(parents=True)
    shutil.copytree(pictures, place / "root", ignore=shutil.ignore_patterns(".isofast*"))
    preview = place / "out/views.png" if forbidden == "out" else tmp_path / "views.png"
    command = [sys.executable, "-m", "isofast.cli", "prepare", "imagefolder"]
    command += ["--root", str(place / "root"), "--preview", str(preview)]
    (place / forbidden).chmod(mode)
    try:
        done = subprocess.run(
            [*(UNPRIVILEGED if os.getuid() == 0 else []), *command],
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        (place / forbidden).chmod(0o700)
    assert done.returncode == 2, done.stderr
    assert "Permission denied" in done.stderr and "Traceback" not in done.stderr
    assert f"{place}/{named}" in done.stderr
