"""Listing and checking folders: what is found, what is refused, what is remembered."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isofast.data import EvalLoader, datasets, open_dataset, recipe_for, verify_images
from isofast.data.prepare import prepare_digits
from isofast.errors import RunError, UserError


@pytest.fixture
def root(tmp_path: Path, pictures: Path) -> Path:
    """A copy of the pictures that a test may spoil."""
    shutil.copytree(pictures, tmp_path / "data", ignore=shutil.ignore_patterns(".isofast*"))
    return tmp_path / "data"


def test_listing(pictures: Path) -> None:
    train = open_dataset(pictures, "train")
    assert train.classes == ("class0", "class1", "class2")
    assert len(train) == len(train.paths) == 51
    assert train.paths == tuple(sorted(train.paths))
    assert train.paths[0] == "train/class0/000.jpg"
    assert train.labels.dtype == np.int64
    assert [train.classes[label] for label in train.labels] == [
        p.split("/")[1] for p in train.paths
    ]
    checked = verify_images(train, progress=False)
    for path, (height, width) in zip(checked.paths, checked.sizes, strict=True):
        with Image.open(pictures / path) as image:
            assert (height, width) == (image.height, image.width)


def test_fingerprint_changes_with_names_labels_and_sizes(root: Path) -> None:
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


def test_hidden_and_other_files_are_no_images(root: Path) -> None:
    before = open_dataset(root, "train").paths
    folder = root / "train" / "class0"
    (folder / ".hidden.jpg").write_text("x")
    (folder / "notes.txt").write_text("x")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "README").write_text("x")
    shutil.copy(folder / "000.jpg", folder / "ZZ.JPEG")
    assert set(open_dataset(root, "train").paths) - set(before) == {"train/class0/ZZ.JPEG"}


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
    with pytest.raises(UserError, match=r"differ; only in val: class1"):
        open_dataset(root, "val")
    shutil.rmtree(root / "train")
    with pytest.raises(UserError, match="has no folder 'train'"):
        open_dataset(root, "train")
    (root / "train").mkdir()
    with pytest.raises(UserError, match="train has no class folder"):
        open_dataset(root, "train")


def test_bad_files_are_named_with_what_is_wrong(root: Path) -> None:
    folder = root / "train" / "class1"
    whole = (folder / "000.jpg").read_bytes()
    (folder / "000.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:-40])
    (folder / "002.jpg").write_text("this is no picture")
    (folder / "004.jpg").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(folder / "006.jpg", format="GIF")
    with pytest.raises(UserError) as caught:
        verify_images(open_dataset(root, "train"), progress=False)
    message = str(caught.value)
    assert message.startswith("5 of 51 train images cannot be read")
    for name, reason in (
        ("000.jpg", "truncated"),
        ("001.png", "truncated"),
        ("002.jpg", "cannot identify"),
        ("004.jpg", "empty file"),
        ("006.jpg", "gif, not png or jpeg"),
    ):
        found = message.split(f"{folder / name} (")[1].split(")")[0]
        assert reason in found.lower(), name
    assert "Replace or delete" in message
    for name in ("008.jpg", "010.jpg"):
        (folder / name).write_text("neither")
    with pytest.raises(UserError, match=r"7 of 51.*and 2 more"):
        verify_images(open_dataset(root, "train"), progress=False)


def test_what_was_checked_is_remembered_until_it_changes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    check = datasets.look_at

    def counting(path: Path) -> object:
        opened.append(path.name)
        return check(path)

    monkeypatch.setattr(datasets, "look_at", counting)
    first = verify_images(open_dataset(root, "train"), progress=False)
    assert len(opened) == 51
    opened.clear()
    again = verify_images(open_dataset(root, "train"), progress=False)
    assert opened == []
    assert np.array_equal(first.sizes, again.sizes)
    # a new time of change, a new size, a new file: those three are read again
    folder = root / "train" / "class0"
    os.utime(folder / "000.jpg", ns=(1, 1))
    Image.new("RGB", (9, 7)).save(folder / "001.png")
    shutil.copy(folder / "002.jpg", folder / "new.jpg")
    changed = verify_images(open_dataset(root, "train"), progress=False)
    assert sorted(opened) == ["000.jpg", "001.png", "new.jpg"]
    assert changed.sizes[changed.paths.index("train/class0/001.png")].tolist() == [7, 9]
    # a damaged memory is no reason to stop
    opened.clear()
    (root / ".isofast-checked-train.json").write_text('{"files": {"a": [1]}}')
    verify_images(open_dataset(root, "train"), progress=False)
    assert len(opened) == 52
    assert len(json.loads((root / ".isofast-checked-train.json").read_text())["files"]) == 52
    assert [path.name for path in root.iterdir() if ".part" in path.name] == []


def test_files_found_bad_are_looked_at_again(root: Path) -> None:
    path = root / "train" / "class0" / "000.jpg"
    good = path.read_bytes()
    stamp = path.stat().st_mtime_ns
    path.write_bytes(b"x" * len(good))
    os.utime(path, ns=(stamp, stamp))
    with pytest.raises(UserError, match=r"000\.jpg"):
        verify_images(open_dataset(root, "train"), progress=False)
    path.write_bytes(good)
    os.utime(path, ns=(stamp, stamp))
    assert verify_images(open_dataset(root, "train"), progress=False).sizes is not None


def test_a_root_that_cannot_be_written_is_checked_without_memory(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, data: str) -> int:
        raise PermissionError(13, "Permission denied", str(self))

    # the tests may run as a user whom no permission stops
    monkeypatch.setattr(Path, "write_text", refuse)
    assert len(verify_images(open_dataset(root, "val"), progress=False)) == 15
    assert not (root / ".isofast-checked-val.json").exists()


def test_unusual_images_are_read_as_pillow_reads_them(tmp_path: Path) -> None:
    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("L").save(folder / "gray.jpg")
    image.convert("P").save(folder / "palette.png")
    image.convert("RGBA").save(folder / "rgba.png")
    image.convert("LA").save(folder / "gray_alpha.png")
    image.convert("1").save(folder / "bits.png")
    image.save(folder / "progressive.jpg", progressive=True)
    image.save(folder / "png_named.jpg", format="PNG")
    image.save(folder / "camera.jpg", format="MPO", save_all=True, append_images=[image])
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(folder / "turned.jpg", exif=turned)
    levels = np.asarray(image.convert("L"))
    Image.fromarray(levels.astype(np.uint16) * 257).save(folder / "sixteen.png")

    dataset = verify_images(open_dataset(tmp_path, "val"), progress=False)
    recipe = recipe_for("cifar10")
    loader = EvalLoader(
        dataset,
        recipe,
        range(len(dataset)),
        batch_size=16,
        device=torch.device("cpu"),
        threads=1,
    )
    ((x, _),) = loader
    std, mean = torch.tensor(recipe.std).view(3, 1, 1), torch.tensor(recipe.mean).view(3, 1, 1)
    ours = ((x * std + mean) * 255).permute(0, 2, 3, 1).numpy()
    for pixels, path in zip(ours, dataset.paths, strict=True):
        with Image.open(tmp_path / path) as stored:
            # Pillow clips 16 bits where it should scale them
            theirs = stored.convert("RGB") if "sixteen" not in path else image.convert("L")
            theirs = np.asarray(theirs.convert("RGB"), np.float32)
        assert np.abs(pixels - theirs).max() <= 1, path


def test_only_the_files_that_were_checked_are_read(root: Path) -> None:
    dataset = open_dataset(root, "val")
    with pytest.raises(ValueError, match="verify_images"):
        datasets.read_files(dataset, [0])
    dataset = verify_images(dataset, progress=False)
    paths = [root / path for path in dataset.paths]
    assert datasets.read_files(dataset, [2, 0]) == [paths[2].read_bytes(), paths[0].read_bytes()]
    paths[3].unlink()
    os.utime(paths[5], ns=(1, 1))
    with pytest.raises(RunError, match=f"{paths[3]} .*No such file"):
        datasets.read_files(dataset, [0, 3])
    with pytest.raises(RunError, match=f"{paths[5]} .*has changed"):
        datasets.read_files(dataset, [5])
    assert len(datasets.read_files(dataset, [0, 1, 2])) == 3


def test_a_file_that_comes_in_parts_is_read_to_its_end(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = verify_images(open_dataset(root, "val"), progress=False)
    path = root / dataset.paths[0]
    whole, read = path.read_bytes(), os.read
    monkeypatch.setattr(os, "read", lambda descriptor, size: read(descriptor, min(size, 50)))
    assert len(whole) > 100 and datasets.read_files(dataset, [0]) == [whole]
    stamp = path.stat().st_mtime_ns
    for changed in (whole[:-1], whole + b"x"):
        path.write_bytes(changed)
        os.utime(path, ns=(stamp, stamp))
        with pytest.raises(RunError, match="has changed"):
            datasets.read_files(dataset, [0])


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    root = tmp_path / "digits"
    prepare_digits(root)
    (root / "train" / "3" / "gone.png").symlink_to(tmp_path / "unmounted.png")
    with pytest.raises(UserError, match=r"gone\.png \(No such file"):
        verify_images(open_dataset(root, "train"), progress=False)


def test_a_link_to_what_is_no_file_is_named(root: Path, tmp_path: Path) -> None:
    """In a process of its own, for whoever opens the pipe waits and cannot be stopped."""
    os.mkfifo(tmp_path / "pipe")
    (root / "val" / "class0" / "z.png").symlink_to(tmp_path / "pipe")
    (root / "val" / "class1" / "folder.jpg").symlink_to(tmp_path)
    command = [sys.executable, "-m", "isofast.cli", "prepare", "imagefolder", "--root", str(root)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "2 of 17 val images cannot be read" in result.stderr
    assert f"{root}/val/class0/z.png (not a file); {root}/val/class1/folder.jpg (not a file)" in (
        result.stderr
    )


def test_names_that_are_not_utf8_are_taken(tmp_path: Path) -> None:
    root = tmp_path / "digits"
    prepare_digits(root)
    folder = os.fsencode(root / "train" / "3")
    first = sorted(os.listdir(folder))[0]
    os.rename(os.path.join(folder, first), os.path.join(folder, b"\xff.png"))
    assert len(verify_images(open_dataset(root, "train"), progress=False)) == 1442
    with pytest.raises(UserError, match="changed"):
        prepare_digits(root)
