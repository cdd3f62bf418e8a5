"""Unreadable images are left out where that is asked for, and pictures without labels taken in."""

import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isofast.cli import main
from isofast.data import (
    EvalLoader,
    TrainLoader,
    datasets,
    left_out_note,
    open_dataset,
    recipe_for,
    verify_images,
)
from isofast.data.looks import Look
from isofast.data.prepare import prepare
from isofast.errors import UserError

CPU = torch.device("cpu")
BAD = {
    "train/class0/000.jpg": "truncated",
    "train/class0/001.png": "truncated",
    "train/class1/002.jpg": "cannot identify",
    "train/class2/004.jpg": "empty file",
    "train/class2/gone.png": "No such file",
}


@pytest.fixture
def root(tmp_path: Path, pictures: Path) -> Path:
    """A copy of the pictures that a test may spoil."""
    shutil.copytree(pictures, tmp_path / "data", ignore=shutil.ignore_patterns(".isofast*"))
    return tmp_path / "data"


@pytest.fixture
def spoiled(root: Path) -> Path:
    """The copy, with each kind of bad file in it: 4 of its 51 images, and one more."""
    for name, reason in BAD.items():
        path = root / name
        if reason == "truncated":
            path.write_bytes(path.read_bytes()[:-60])
        elif reason == "cannot identify":
            path.write_text("this is no picture")
        elif reason == "empty file":
            path.write_bytes(b"")
        else:
            path.symlink_to(root / "nowhere.png")
    return root


def add_unlabeled(root: Path, count: int) -> None:
    (root / "unlabeled").mkdir()
    for k in range(count):
        Image.new("RGB", (24, 24), (40 * k, 90, 160)).save(root / "unlabeled" / f"{k}.png")


def test_bad_files_are_left_out_and_counted(spoiled: Path) -> None:
    listed = open_dataset(spoiled, "train")
    with pytest.raises(UserError, match=r"5 of 52 .* --on-bad-image skip"):
        verify_images(listed, progress=False)
    kept = verify_images(listed, on_bad="skip", progress=False)
    assert set(listed.paths) - set(kept.paths) == set(BAD)
    assert len(kept) == len(kept.labels) == len(kept.sizes) == len(kept.stamps) == 47
    for path, label in zip(kept.paths, kept.labels, strict=True):
        assert path.startswith(f"train/class{label}/")
    assert {path: reason in kept.left_out[path] for path, reason in BAD.items()} == dict.fromkeys(
        BAD, True
    )
    note = left_out_note(kept)
    assert note.startswith("5 of 52 train images cannot be read: train/class0/000.jpg (")
    assert "\n" not in note and all(name in note for name in BAD)
    # what is trained on is what the root would be without those files
    for name in BAD:
        (spoiled / name).unlink()
    clean = verify_images(open_dataset(spoiled, "train"), progress=False)
    assert clean.fingerprint == kept.fingerprint != listed.fingerprint
    assert clean.paths == kept.paths and left_out_note(clean) == ""


def test_what_was_found_bad_is_not_decoded_again(
    spoiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    look = datasets.look_at

    def counting(path: Path) -> object:
        opened.append(str(path.relative_to(spoiled)))
        return look(path)

    monkeypatch.setattr(datasets, "look_at", counting)
    listed = open_dataset(spoiled, "train")
    first = verify_images(listed, on_bad="skip", progress=False)
    # the link leads nowhere, so that there is nothing to decode
    assert len(opened) == 51
    opened.clear()
    again = verify_images(listed, on_bad="skip", progress=False)
    assert opened == [] and again.left_out == first.left_out
    assert again.fingerprint == first.fingerprint
    memory = json.loads((spoiled / ".isofast-checked-train.json").read_text())
    assert set(memory["bad"]) == set(BAD) - {"train/class2/gone.png"}
    # one that was mended is taken in again
    shutil.copy(spoiled / "train/class1/004.jpg", spoiled / "train/class1/002.jpg")
    mended = verify_images(open_dataset(spoiled, "train"), on_bad="skip", progress=False)
    assert opened == ["train/class1/002.jpg"]
    assert "train/class1/002.jpg" in mended.paths and len(mended) == 48


def test_a_file_that_cannot_be_read_now_is_tried_again(root: Path) -> None:
    """A file of the kernel's, which nobody can read from its start, not even root."""
    path = root / "train" / "class0" / "closed.jpg"
    path.symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"closed\.jpg \(Input/output error\)"):
        verify_images(open_dataset(root, "train"), progress=False)
    kept = verify_images(open_dataset(root, "train"), on_bad="skip", progress=False)
    assert set(kept.left_out) == {"train/class0/closed.jpg"}
    memory = json.loads((root / ".isofast-checked-train.json").read_text())
    assert memory["bad"] == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_forbidden_file_is_named(root: Path) -> None:
    (root / "train" / "class0" / "000.jpg").chmod(0)
    with pytest.raises(UserError, match=r"000\.jpg \(Permission denied\)"):
        verify_images(open_dataset(root, "train"), progress=False)


def test_a_class_without_readable_images_is_an_error(root: Path) -> None:
    for path in (root / "val" / "class1").iterdir():
        path.write_text("no picture")
    with pytest.raises(UserError, match=r"5 of 15 val images.*no image of the class class1"):
        verify_images(open_dataset(root, "val"), on_bad="skip", progress=False)


def test_prepare_skips_and_says_so(
    spoiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prepare", "imagefolder", "--root", str(spoiled)]
    assert main(command) == 2
    assert "5 of 52 train images cannot be read" in capsys.readouterr().err
    assert main([*command, "--on-bad-image", "skip"]) == 0
    printed = capsys.readouterr().out
    assert "3 classes, 47 train and 15 val images" in printed
    assert "\n5 of 52 train images cannot be read: train/class0/000.jpg" in printed


def test_loaders_take_what_is_left(spoiled: Path) -> None:
    dataset = verify_images(open_dataset(spoiled, "train"), on_bad="skip", progress=False)
    recipe = recipe_for("cifar10")
    loader = TrainLoader(dataset, recipe, batch_size=47, seed=0, device=CPU, threads=1)
    assert Counter(next(loader).y_B.tolist()) == Counter(dataset.labels.tolist())
    loader.close()


def test_unlabeled_pictures_are_trained_on(root: Path) -> None:
    before = open_dataset(root, "train")
    add_unlabeled(root, 5)
    train, val = open_dataset(root, "train"), open_dataset(root, "val")
    assert train.classes == val.classes == before.classes
    assert train.paths == (*before.paths, *(f"unlabeled/{k}.png" for k in range(5)))
    assert train.labels.tolist() == [*before.labels.tolist(), *[-1] * 5]
    assert train.fingerprint != before.fingerprint
    assert len(val) == 15
    loader = TrainLoader(train, recipe_for("cifar10"), batch_size=56, seed=0, device=CPU, threads=1)
    assert Counter(next(loader).y_B.tolist()) == {0: 17, 1: 17, 2: 17, -1: 5}
    loader.close()
    counts = prepare("imagefolder", root)
    assert (counts.classes, counts.train, counts.val, counts.unlabeled) == (3, 56, 15, 5)
    assert "56 train (5 without a label) and 15 val" in str(counts)


def test_pictures_alone_are_a_data_set(tmp_path: Path, pictures: Path) -> None:
    add_unlabeled(tmp_path, 4)
    train = open_dataset(tmp_path, "train")
    assert train.classes == () and train.labels.tolist() == [-1] * 4
    assert verify_images(train, progress=False).sizes.tolist() == [[24, 24]] * 4
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


def test_no_validation_images_is_an_error_that_says_what_to_do(root: Path) -> None:
    shutil.rmtree(root / "val")
    with pytest.raises(UserError, match=r"no folder 'val'.*evaluation.every_epochs=0"):
        prepare("imagefolder", root)


@pytest.mark.parametrize("size", [(1, 1), (4000, 10), (10, 4000)], ids=str)
def test_images_of_odd_sizes_are_trained_and_evaluated_on(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", size, (200, 100, 50)).save(tmp_path / split / "a" / "x.png")
    recipe = recipe_for("imagefolder", crop=32)
    loader = TrainLoader(
        open_dataset(tmp_path, "train"), recipe, batch_size=1, seed=0, device=CPU, threads=1
    )
    for _ in range(4):
        batch = next(loader)
        assert batch.x1_BCHW.shape == (1, 3, 32, 32) and batch.x2_BCHW.isfinite().all()
    loader.close()
    val = open_dataset(tmp_path, "val")
    ((x, _),) = EvalLoader(val, recipe, [0], batch_size=1, device=CPU, threads=1)
    levels = x[0].permute(1, 2, 0).numpy() * np.array(recipe.std) + np.array(recipe.mean)
    assert np.abs(255 * levels - [200, 100, 50]).max() < 1


def test_the_name_of_a_file_that_is_left_out_need_not_be_text(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = os.fsencode(root / "train" / "class0")
    with open(os.path.join(folder, b"\xff.png"), "wb") as file:
        file.write(b"no picture")
    assert main(["prepare", "imagefolder", "--root", str(root), "--on-bad-image", "skip"]) == 0
    assert r"train/class0/\udcff.png (cannot identify" in capsys.readouterr().out
    # a run says it too
    kept = verify_images(open_dataset(root, "train"), on_bad="skip", progress=False)
    assert b"class0/\\udcff.png" in left_out_note(kept).encode("utf-8")
    # and the root itself may have such a name
    os.rename(root, os.fsencode(root) + b"\xff")
    there = os.fsdecode(os.fsencode(root) + b"\xff")
    assert main(["prepare", "imagefolder", "--root", there, "--on-bad-image", "skip"]) == 0
    assert r"data\udcff" in capsys.readouterr().out


def test_a_check_that_was_stopped_goes_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = datasets.look_at
    opened: list[str] = []

    def counting(path: Path) -> object:
        opened.append(path.name)
        return look(path)

    def stopping(path: Path) -> object:
        if len(opened) == 30:
            raise KeyboardInterrupt
        return counting(path)

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(datasets, "look_at", stopping)
    with pytest.raises(KeyboardInterrupt):
        verify_images(open_dataset(root, "train"), progress=False)
    opened.clear()
    monkeypatch.setattr(datasets, "look_at", counting)
    assert len(verify_images(open_dataset(root, "train"), progress=False)) == 51
    assert len(opened) == 21


def test_who_stops_a_check_does_not_wait_for_its_end(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes while the first findings are being written down."""
    opened: list[str] = []

    def slow(path: Path) -> object:
        opened.append(path.name)
        time.sleep(0.05)
        return Look("", 1, 1)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(datasets, "look_at", slow)
    monkeypatch.setattr(datasets, "_KEEP_EVERY", 1)
    monkeypatch.setattr(datasets, "_write_memory", stop)
    with pytest.raises(KeyboardInterrupt):
        verify_images(open_dataset(root, "train"), progress=False)
    assert len(opened) < 40


def test_what_is_checked_is_written_while_the_check_goes_on(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a process that is killed, which can write nothing more."""
    written: list[int] = []
    write = datasets._write_memory

    def noting(path: Path, found: datasets._Findings) -> None:
        write(path, found)
        written.append(len(json.loads(path.read_text())["files"]))

    monkeypatch.setattr(datasets, "_write_memory", noting)
    monkeypatch.setattr(datasets, "_KEEP_EVERY", 10)
    verify_images(open_dataset(root, "train"), progress=False)
    assert written == [10, 20, 30, 40, 50, 51]
