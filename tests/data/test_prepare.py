"""`prepare`: what it writes, that it writes all or nothing, and what it refuses."""

import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from isofast.cli import main
from isofast.config.presets import VIEWS_OF_DATASET
from isofast.data import open_dataset
from isofast.data import prepare as module
from isofast.data.prepare import prepare
from isofast.errors import UserError

from .conftest import write_images
from .test_official import tiny_files, write_archive

# seconds; nothing here takes nearly as long unless it hangs
LONG = 30


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def without(files: dict[str, bytes], part: str) -> dict[str, bytes]:
    """Return the files whose names do not contain ``part``."""
    return {name: content for name, content in files.items() if part not in name}


def test_digits(digits, tmp_path):
    counts = prepare("digits", tmp_path / "digits")
    assert "10 classes, 1,442 train and 355 val images" in str(counts)
    train, val = (open_dataset(tmp_path / "digits", split) for split in ("train", "val"))
    assert train.classes == val.classes == tuple("0123456789")
    assert Counter(load_digits().target) == Counter(train.labels) + Counter(val.labels)
    # stratified: a fifth of every class
    for label in range(10):
        share = (val.labels == label).sum() / ((train.labels == label).sum() + 35)
        assert 0.17 < share < 0.22
    with Image.open(tmp_path / "digits" / "train" / "0" / "000.png") as image:
        first_zero = load_digits().images[0]
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), np.rint(first_zero * 255 / 16))
    # the same as from another call
    assert open_dataset(digits, "train").fingerprint == train.fingerprint
    images = without(snapshot(tmp_path / "digits"), ".isofast")
    assert images == without(snapshot(digits), ".isofast")
    # no image is in both splits
    content = Counter(images.values())
    assert max(content.values()) == 1


def test_a_second_call_checks_and_changes_nothing(tmp_path):
    archive = write_archive(tmp_path / "tiny.zip", tiny_files())
    first = prepare("tinyimagenet", tmp_path / "root", archive)
    before = snapshot(tmp_path / "root")
    # the archive is no longer needed
    second = prepare("tinyimagenet", tmp_path / "root")
    assert (first.already_there, second.already_there) == (False, True)
    assert (second.classes, second.train, second.val) == (2, 6, 4)
    assert "already there" in str(second) and "2 classes, 6 train and 4 val" in str(second)
    assert snapshot(tmp_path / "root") == before
    with pytest.raises(UserError, match="holds tinyimagenet, not digits"):
        prepare("digits", tmp_path / "root")
    (tmp_path / "root" / "train" / "n002" / "n002_1.JPEG").write_bytes(b"changed")
    with pytest.raises(UserError, match=r"has changed.*train/n002.*prepare it again"):
        prepare("tinyimagenet", tmp_path / "root")
    shutil.rmtree(tmp_path / "root" / "val")
    (tmp_path / "root" / ".isofast-prepared.json").write_text("{")
    with pytest.raises(UserError, match=r"has changed.*2 place\(s\), train/n001, train/n002\."):
        prepare("tinyimagenet", tmp_path / "root")


def test_an_interrupted_build_starts_over_and_an_interrupted_move_goes_on(tmp_path, monkeypatch):
    root = tmp_path / "root"
    # killed while building: the partial folder stays, without its manifest
    (root / ".partial" / "train" / "n009").mkdir(parents=True)
    (root / ".partial" / "train" / "n009" / "x.JPEG").write_bytes(b"half")
    archive = write_archive(tmp_path / "tiny.zip", tiny_files())
    rename = Path.rename

    def stop_at_val(self: Path, target: Path) -> Path:
        if self.name == "val":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop_at_val)
    with pytest.raises(KeyboardInterrupt):
        prepare("tinyimagenet", root, archive)
    monkeypatch.undo()
    assert (root / "train").exists() and not (root / "val").exists()
    # only as the same data set
    with pytest.raises(UserError, match=r"already holds train, not made by .*prepare stl10`"):
        prepare("stl10", root)
    counts = prepare("tinyimagenet", root)
    assert (counts.classes, counts.train, counts.val) == (2, 6, 4)
    assert not (root / ".partial").exists()
    # left by a command that was stopped after its last move
    (root / ".partial").mkdir()
    (root / ".download").mkdir()
    assert prepare("tinyimagenet", root).already_there
    assert not (root / ".partial").exists() and not (root / ".download").exists()


@pytest.mark.slow
def test_a_really_full_disk_is_a_users_error(small_disk, refused):
    words = "No space left on device", "another --root"
    assert refused(["prepare", "digits", "--root", small_disk / "digits"], *words) == ""
    assert not any((small_disk / "digits").iterdir())


def test_other_peoples_folders_are_left_alone(tmp_path, pictures):
    shutil.copytree(pictures, tmp_path / "mine")
    before = snapshot(tmp_path / "mine")
    with pytest.raises(
        UserError, match=r"already holds train and val.*isofast prepare imagefolder"
    ):
        prepare("digits", tmp_path / "mine")
    assert snapshot(tmp_path / "mine") == before
    counts = prepare("imagefolder", tmp_path / "mine")
    assert (counts.classes, counts.train, counts.val) == (3, 51, 15)
    (tmp_path / "mine" / "val" / "class0" / "000.jpg").write_text("no picture")
    with pytest.raises(UserError, match="1 of 15 val images cannot be read"):
        prepare("imagefolder", tmp_path / "mine")
    # classes without validation images can be trained on
    shutil.rmtree(tmp_path / "mine" / "val")
    counts = prepare("imagefolder", tmp_path / "mine")
    assert (counts.classes, counts.train, counts.val) == (3, 51, 0)
    assert "evaluation.every_epochs=0" in str(counts)


def test_impossible_requests_are_refused(tmp_path):
    names = "digits, cifar10, cifar100, stl10, tinyimagenet, imagefolder"
    with pytest.raises(UserError, match=f"unknown data set 'mnist'.*{names}"):
        prepare("mnist", tmp_path)
    for name in ("digits", "imagefolder"):
        with pytest.raises(UserError, match=f"{name} needs no archive"):
            prepare(name, tmp_path, tmp_path / "x.zip")
    assert tuple(VIEWS_OF_DATASET) == module.NAMES
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"Not a directory: .*give another --root"):
        prepare("digits", tmp_path / "file" / "root")


def test_what_file_managers_leave_changes_nothing(own_digits):
    for folder in (own_digits / "train", own_digits / "train" / "3"):
        (folder / ".DS_Store").write_bytes(b"x")
    (own_digits / "val" / ".thumbnails").mkdir()
    assert prepare("digits", own_digits).already_there


def test_ctrl_c_says_what_is_kept(tmp_path, monkeypatch, capsys):
    def stop(folder: Path) -> None:
        (folder / "train").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write_digits", stop)
    assert main(["prepare", "digits", "--root", str(tmp_path / "root")]) == 130
    assert "to continue from what is complete, or to start over" in capsys.readouterr().err
    assert not any((tmp_path / "root").iterdir())


def test_changes_of_a_prepared_root_are_named(own_digits):
    train = own_digits / "train"
    (train / "notes.txt").write_text("x")
    (train / "2" / "x.png").symlink_to(train / "nowhere")
    # which keeps the files' order, and so their concatenated contents
    max((train / "3").iterdir()).rename(train / "3" / "999.png")
    places = r"3 place\(s\), train/2, train/3, train/notes\.txt\. Undo this"
    with pytest.raises(UserError, match=f"has changed .* {places}"):
        prepare("digits", own_digits)


@pytest.mark.parametrize("fails", [False, True])
def test_a_second_command_waits_for_the_first(tmp_path, monkeypatch, capsys, fails):
    root = tmp_path / "new" / "root"
    building, going_on = threading.Event(), threading.Event()

    def build(folder: Path) -> None:
        # hold up only the first build
        if not building.is_set():
            building.set()
            assert going_on.wait(LONG)
            if fails:
                raise UserError("spoiled")
        for split in ("train", "val"):
            write_images(folder, split, 3)

    monkeypatch.setattr(module, "_write_digits", build)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(prepare, "digits", root)
        assert building.wait(LONG)
        second = threads.submit(prepare, "digits", root)
        said, ends = "", time.monotonic() + LONG
        while "waiting" not in said and not second.done() and time.monotonic() < ends:
            said += capsys.readouterr().err
            time.sleep(0.01)
        waited = not second.done()
        going_on.set()
    assert said == f"another isofast prepare is using {root}; waiting for it to end\n" and waited
    assert isinstance(first.exception(), UserError) is fails
    # the second finds what the first built, or builds it if the first failed
    assert second.result().already_there is not fails
