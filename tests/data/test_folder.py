"""Listing data roots and reading their files: what is found, what is refused, what is ignored."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isofast.cli import main
from isofast.data import check_folder, open_dataset, recipe_for
from isofast.data.check import notes_on
from isofast.data.folder import read_files
from isofast.data.images import Images
from isofast.data.prepare import prepare
from isofast.errors import RunError, UserError

from ..support.runs import ISOFAST, UNPRIVILEGED, call
from .conftest import checked, write_images


def test_listing(pictures):
    train = open_dataset(pictures, "train")
    assert train.classes == ("class0", "class1", "class2")
    assert len(train) == len(train.paths) == 51
    assert train.paths == tuple(sorted(train.paths))
    assert train.paths[0] == "train/class0/000.jpg"
    assert train.labels.dtype == np.int64
    assert [train.classes[label] for label in train.labels] == [
        p.split("/")[1] for p in train.paths
    ]
    checked = check_folder(train)
    for path, (height, width) in zip(checked.paths, checked.sizes, strict=True):
        with Image.open(pictures / path) as image:
            assert (height, width) == (image.height, image.width)


def test_fingerprint_changes_with_names_labels_and_sizes(root):
    first = open_dataset(root, "train").fingerprint
    assert open_dataset(str(root), "train").fingerprint == first
    path = root / "train" / "class0" / "000.jpg"
    seen = {first}
    for change in (
        lambda: path.write_bytes(path.read_bytes() + b"\0"),
        lambda: path.rename(path.with_name("999.jpg")),
        lambda: (root / "train" / "class2").rename(root / "train" / "class3"),
        lambda: (root / "train" / "class1" / "001.png").unlink(),
    ):
        change()
        fingerprint = open_dataset(root, "train").fingerprint
        assert fingerprint not in seen
        seen.add(fingerprint)


def test_missing_folders_are_explained(tmp_path, root):
    with pytest.raises(UserError, match=r"nowhere is not a folder.*isofast prepare"):
        open_dataset(tmp_path / "nowhere", "train")
    (root / "train" / "class1" / "sub").mkdir()
    for path in (root / "train" / "class1").glob("*.*"):
        path.unlink()
    with pytest.raises(UserError, match=r"class folder .*/train/class1 has no images"):
        open_dataset(root, "train")
    shutil.rmtree(root / "train" / "class1")
    with pytest.raises(UserError, match=r"differ; only in val: class1"):
        open_dataset(root, "val")
    shutil.rmtree(root / "train")
    with pytest.raises(UserError, match="has no folder 'train'"):
        open_dataset(root, "train")
    (root / "train").mkdir()
    with pytest.raises(UserError, match="train has no class folder"):
        open_dataset(root, "train")


@pytest.mark.parametrize("name", ["train/class3", "unlabeled"])
def test_a_folder_that_is_a_broken_link_is_refused(root, name):
    (root / name).symlink_to(root / "unmounted")
    with pytest.raises(UserError, match=rf"{name}.* is a broken link to .*unmounted"):
        open_dataset(root, "train")


def test_a_broken_link_within_a_folder_is_refused(root):
    (root / "train/class0/2024").symlink_to(root / "unmounted")
    with pytest.raises(UserError, match=r"class0/2024: No such file.*links must not be broken"):
        open_dataset(root, "train")


def test_a_link_to_a_folder_is_a_class(root, tmp_path):
    (root / "train" / "class1").rename(tmp_path / "elsewhere")
    (root / "train" / "class1").symlink_to(tmp_path / "elsewhere")
    assert len(open_dataset(root, "train")) == 51


def test_folders_within_folders_are_read(tmp_path, pictures):
    """Through links too, but not forever."""
    below = tmp_path / "unlabeled" / "2024" / "may"
    below.mkdir(parents=True)
    (below / "first").symlink_to(pictures / "train" / "class0")
    (below / "again").symlink_to(tmp_path / "unlabeled")
    shutil.copy(pictures / "train/class1/000.jpg", below)
    names = sorted(path.name for path in (pictures / "train/class0").iterdir())
    train = checked(tmp_path)
    assert train.paths == (
        "unlabeled/2024/may/000.jpg",
        *(f"unlabeled/2024/may/first/{name}" for name in names),
    )
    assert train.ignored == () and len(read_files(train, range(len(train)))) == 18


def test_pictures_that_are_not_used_are_counted(root, capsys):
    assert notes_on([open_dataset(root, "train")]) == []
    folder = root / "train" / "class0"
    used = ("ZZ.JPEG", "a.webp", "b.BMP", "more/deep/c.png")
    ignored = ("more/deep/d.gif", "e.jp2", "../stray.png")
    for name in (*used, *ignored, ".thumbnails/f.png", ".g.jpg", "../.cache/h.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)
    (folder / "notes.txt").write_text("x")
    train = checked(root)
    assert len(train) == 51 + len(used) and train.labels.tolist()[:21] == [0] * 21
    assert {f"train/class0/{name}" for name in used} < set(train.paths)
    assert train.ignored == (
        "train/class0/e.jp2",
        "train/class0/more/deep/d.gif",
        "train/stray.png",
    )
    (note,) = notes_on([train])
    assert note.startswith("3 train file(s) look like images but are not used: train/class0/e.jp")
    assert "\n" not in note
    assert main(["prepare", "imagefolder", "--root", str(root)]) == 0
    assert note in capsys.readouterr().out.splitlines()
    images = Images(train, open_dataset(root, "val"))
    assert images.notes(recipe_for("imagefolder", crop=24)) == [note]


def test_crops_of_twice_the_images_size_are_noted(tmp_path, capsys):
    write_images(tmp_path, "train", 9, one_size=True)
    train = open_dataset(tmp_path, "train")
    twice = recipe_for("imagefolder", crop=44)
    assert Images(train, None).notes(twice) == []
    images = Images(check_folder(train), None)
    (note,) = images.notes(twice)
    assert "Consider data.crop=22" in note
    assert images.notes(recipe_for("imagefolder", crop=43)) == []
    assert images.notes(recipe_for("cifar10", crop=44)) == []
    assert main(["prepare", "imagefolder", "--root", str(tmp_path)]) == 0
    assert note.replace("44", "224") in capsys.readouterr().out.splitlines()


def add_unlabeled(root: Path, count: int) -> None:
    (root / "unlabeled").mkdir()
    for k in range(count):
        Image.new("RGB", (24, 24), (40 * k, 90, 160)).save(root / "unlabeled" / f"{k}.png")


def test_unlabeled_pictures_are_trained_on(root, make_loader):
    before = open_dataset(root, "train")
    add_unlabeled(root, 5)
    train, val = open_dataset(root, "train"), open_dataset(root, "val")
    assert train.classes == val.classes == before.classes
    assert train.paths == (*before.paths, *(f"unlabeled/{k}.png" for k in range(5)))
    assert train.labels.tolist() == [*before.labels.tolist(), *[-1] * 5]
    assert train.fingerprint != before.fingerprint
    assert len(val) == 15
    batch = next(make_loader(train, batch_size=56))
    assert Counter(batch.y_B.tolist()) == {0: 17, 1: 17, 2: 17, -1: 5}
    counts = prepare("imagefolder", root)
    assert (counts.classes, counts.train, counts.val, counts.unlabeled) == (3, 56, 15, 5)
    assert "56 train (5 without a label) and 15 val" in str(counts)


def test_pictures_alone_are_a_data_set(tmp_path, pictures):
    add_unlabeled(tmp_path, 4)
    train = open_dataset(tmp_path, "train")
    assert train.classes == () and train.labels.tolist() == [-1] * 4
    assert check_folder(train).sizes.tolist() == [[24, 24]] * 4
    counts = prepare("imagefolder", tmp_path)
    assert (counts.classes, counts.train, counts.val, counts.unlabeled) == (0, 4, 0, 4)
    assert "evaluation.every_epochs=0" in str(counts)
    with pytest.raises(UserError, match=r"no folder 'val'.*evaluation.every_epochs=0"):
        open_dataset(tmp_path, "val")
    # validation classes require training classes
    shutil.copytree(pictures / "val", tmp_path / "val")
    with pytest.raises(UserError, match=r"no folder 'train'.*go into .*/unlabeled"):
        open_dataset(tmp_path, "val")
    for path in (tmp_path / "unlabeled").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"folder .*/unlabeled has no images"):
        open_dataset(tmp_path, "train")


def test_names_that_are_not_utf8_are_taken_and_printed(root, capsys):
    """For skipped and ignored files, and for the root."""
    for name in (b"/\xff.png", b"/\xff.gif"):
        Path(os.fsdecode(os.fsencode(root / "train" / "class0") + name)).write_text("no picture")
    there = os.fsdecode(os.fsencode(root) + b"\xff")
    root.rename(there)
    assert main(["prepare", "imagefolder", "--root", there, "--on-bad-image", "skip"]) == 0
    printed = capsys.readouterr().out
    assert r"data\udcff" in printed
    assert r"class0/\udcff.png (cannot identify" in printed
    assert r"not used: train/class0/\udcff.gif" in printed


def test_only_the_files_that_were_checked_are_read(root):
    dataset = checked(root, "val")
    paths = [root / path for path in dataset.paths]
    assert read_files(dataset, [2, 0]) == [paths[2].read_bytes(), paths[0].read_bytes()]
    paths[3].unlink()
    os.utime(paths[5], ns=(1, 1))
    stamp = paths[7].stat().st_mtime_ns
    paths[7].write_bytes(paths[7].read_bytes()[:-1])
    os.utime(paths[7], ns=(stamp, stamp))
    with pytest.raises(RunError, match=f"{paths[3]} .*No such file"):
        read_files(dataset, [0, 3])
    for changed in (5, 7):
        with pytest.raises(RunError, match=f"{paths[changed]} .*has changed"):
            read_files(dataset, [0, changed])


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() == 0 and not shutil.which("setpriv"), reason="needs setpriv")
@pytest.mark.parametrize(
    ("forbidden", "mode", "named"),
    [
        ("root/train/class1/001.png", 0o000, "root/train/class1/001.png (Permission denied)"),
        ("root/train", 0o400, "root/train"),
        (".", 0o600, "root"),
        ("out", 0o600, "out/views.png"),
    ],
)
def test_what_may_not_be_read_is_named(forbidden, mode, named, pictures, tmp_path):
    place = tmp_path / "place"
    (place / "out").mkdir(parents=True)
    shutil.copytree(pictures, place / "root", ignore=shutil.ignore_patterns(".isofast*"))
    preview = place / "out/views.png" if forbidden == "out" else tmp_path / "views.png"
    command = [*UNPRIVILEGED, *ISOFAST, "prepare", "imagefolder"]
    command += ["--root", str(place / "root"), "--preview", str(preview)]
    (place / forbidden).chmod(mode)
    try:
        printed = call(command, code=2).stderr
    finally:
        (place / forbidden).chmod(0o700)
    words = "is not writable" if forbidden == "out" else "Permission denied"
    assert words in printed and f"{place}/{named}" in printed
