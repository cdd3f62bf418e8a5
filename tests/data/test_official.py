"""CIFAR-100 and STL-10 against torchvision's readers, TinyImageNet, and archives that are refused.

Small archives replace the official ones, with their checksums patched into torchvision's tables.
"""

import hashlib
import io
import pickle
import shutil
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets as theirs

from isofast.data import open_dataset
from isofast.data.prepare import prepare
from isofast.errors import UserError

from .conftest import write_tar

Files = dict[str, bytes]
RNG = np.random.default_rng(0)
TOP = "tiny-imagenet-200"
CIFAR = "cifar-100-python"
STL = "stl10_binary"
WHOLE = "cannot unpack .*not a complete and safe tar or zip file; download it again"


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 255 - value)).save(buffer, format="JPEG")
    return buffer.getvalue()


def tiny_files() -> Files:
    """Two classes, three train and two val images each, in the official layout."""
    files = {
        f"{TOP}/wnids.txt": b"n001\nn002\n",
        f"{TOP}/words.txt": b"n001\tgoose\nn002\tchair\n",
        f"{TOP}/test/images/test_0.JPEG": jpeg(1),
    }
    lines = []
    for c, wnid in enumerate(("n001", "n002")):
        files[f"{TOP}/train/{wnid}/{wnid}_boxes.txt"] = b"boxes"
        for k in range(3):
            files[f"{TOP}/train/{wnid}/images/{wnid}_{k}.JPEG"] = jpeg(10 * c + k)
        for k in range(2):
            # validation images of both classes share one folder
            files[f"{TOP}/val/images/val_{2 * k + c}.JPEG"] = jpeg(100 + 10 * c + k)
            lines.append(f"val_{2 * k + c}.JPEG\t{wnid}\t0\t0\t7\t7")
    files[f"{TOP}/val/val_annotations.txt"] = "\n".join(lines).encode()
    return files


def cifar100_files() -> Files:
    def part(labels: list[int], coarse: list[int]) -> bytes:
        data = RNG.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        content = {"data": data, "fine_labels": labels, "coarse_labels": coarse}
        # the official files use protocol 2
        return pickle.dumps(content, protocol=2)

    names = {"coarse_label_names": ["fish"], "fine_label_names": ["aquarium_fish", "bed", "cup"]}
    return {
        f"{CIFAR}/train": part([2, 0, 1, 1, 0, 2, 0], [0] * 7),
        f"{CIFAR}/test": part([1, 0, 2, 2], [0] * 4),
        f"{CIFAR}/meta": pickle.dumps(names, protocol=2),
        f"{CIFAR}/file.txt~": b"not wanted",
    }


def stl10_files() -> Files:
    def images(count: int) -> bytes:
        return RNG.integers(0, 256, count * 3 * 96 * 96, dtype=np.uint8).tobytes()

    return {
        f"{STL}/unlabeled_X.bin": images(7),
        f"{STL}/test_X.bin": images(4),
        f"{STL}/test_y.bin": bytes([2, 1, 2, 1]),
        f"{STL}/train_X.bin": images(5),
        f"{STL}/class_names.txt": b"airplane\nbird\n",
        f"{STL}/fold_indices.txt": b"0 1",
        f"{STL}/train_y.bin": bytes([2, 2, 1, 2, 1]),
    }


def certify(patch: pytest.MonkeyPatch, dataset: Any, files: Files) -> None:
    """Make torchvision accept generated files as the official ones."""

    def checksum(name: str) -> str:
        return md5(files[f"{dataset.base_folder}/{name}"])

    for table in ("train_list", "test_list"):
        known = [[name, checksum(name)] for name, _ in getattr(dataset, table)]
        patch.setattr(dataset, table, known)
    if meta := getattr(dataset, "meta", None):
        patch.setattr(dataset, "meta", meta | {"md5": checksum(meta["filename"])})


def write_archive(path: Path, files: Files) -> Path:
    """Write a zip or a tar, compressed or not, according to the suffix; return its path."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, content in files.items():
                packed.writestr(name, content)
        return path
    write_tar(path, files, "w:" + path.suffix.removeprefix(".").replace("tar", ""))
    return path


def refuse(name: str, archive: Path, match: str) -> None:
    """Check that the archive is refused by name, and leaves nothing behind."""
    root = archive.parent / "root"
    with pytest.raises(UserError, match=match) as caught:
        prepare(name, root, archive)
    assert archive.name in str(caught.value)
    assert not any(root.iterdir())


def assert_same_images(root: Path, split: str, pixels_NHWC: np.ndarray, names: list[str]) -> None:
    place = "unlabeled/{0:06d}.png" if split == "unlabeled" else split + "/{1}/{0:05d}.png"
    expected = {place.format(number, name) for number, name in enumerate(names)}
    assert {str(path.relative_to(root)) for path in (root / split).rglob("*.png")} == expected
    for number in range(len(names)):
        with Image.open(root / place.format(number, names[number])) as image:
            assert np.array_equal(np.asarray(image), pixels_NHWC[number]), number


@pytest.mark.parametrize("form", ["tar.gz", "zip", "unpacked"])
def test_cifar100_is_torchvisions(tmp_path, monkeypatch, form):
    files, root = cifar100_files(), tmp_path / "root"
    certify(monkeypatch, theirs.CIFAR100, files)
    archive = write_archive(tmp_path / f"any.{form.replace('unpacked', 'zip')}", files)
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    given = archive
    if form == "unpacked":
        given = (tmp_path / "unpacked" / CIFAR).rename(tmp_path / "renamed")
        (tmp_path / "unpacked" / CIFAR).symlink_to(given)
    counts = prepare("cifar100", root, given)
    assert (counts.classes, counts.train, counts.val, counts.unlabeled) == (3, 7, 4, 0)
    for split, train in (("train", True), ("val", False)):
        reader = theirs.CIFAR100(tmp_path / "unpacked", train=train)
        names = [reader.classes[label] for label in reader.targets]
        assert_same_images(root, split, reader.data, names)
        assert list(open_dataset(root, split).classes) == reader.classes


def test_stl10_is_torchvisions(tmp_path, monkeypatch):
    files, root = stl10_files(), tmp_path / "root"
    certify(monkeypatch, theirs.STL10, files)
    archive = write_archive(tmp_path / "stl.tar.gz", files)
    counts = prepare("stl10", root, archive)
    assert (counts.classes, counts.train, counts.val, counts.unlabeled) == (2, 12, 4, 7)
    assert "12 train (7 without a label) and 4 val" in str(counts)
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    for split, ours in (("train", "train"), ("test", "val"), ("unlabeled", "unlabeled")):
        reader = theirs.STL10(tmp_path / "unpacked", split=split)
        # label -1 picks the last name
        names = [[*reader.classes, "none"][label] for label in reader.labels]
        assert_same_images(root, ours, reader.data.transpose(0, 2, 3, 1), names)
    train = open_dataset(root, "train")
    assert train.classes == ("airplane", "bird")
    assert Counter(train.labels.tolist()) == {0: 2, 1: 3, -1: 7}
    assert prepare("stl10", root).already_there
    (root / "unlabeled" / "000003.png").unlink()
    with pytest.raises(UserError, match=r"has changed.*1 place\(s\), unlabeled\."):
        prepare("stl10", root)


@pytest.mark.parametrize("form", ["zip", "tar.gz", "unpacked"])
def test_tinyimagenet_layout(tmp_path, form):
    files, root = tiny_files(), tmp_path / "root"
    given = write_archive(tmp_path / f"tiny.{form.replace('unpacked', 'zip')}", files)
    if form == "unpacked":
        shutil.unpack_archive(given, tmp_path / "unpacked")
        given = tmp_path / "unpacked" / TOP
        for path in given.rglob("*"):
            path.chmod(0o555)
    # the second needs what the first was given
    prepare("tinyimagenet", tmp_path / "first", given)
    counts = prepare("tinyimagenet", root, given)
    assert (counts.classes, counts.train, counts.val) == (2, 6, 4)
    expected = {
        f"train/{w}/{w}_{k}.JPEG": files[f"{TOP}/train/{w}/images/{w}_{k}.JPEG"]
        for w in ("n001", "n002")
        for k in range(3)
    } | {
        f"val/{w}/val_{k}.JPEG": files[f"{TOP}/val/images/val_{k}.JPEG"]
        for w, k in (("n001", 0), ("n001", 2), ("n002", 1), ("n002", 3))
    }
    written = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.JPEG")}
    assert written == expected


ANNOTATIONS = f"{TOP}/val/val_annotations.txt"
SPOILED_TINY: dict[str, tuple[dict[str, bytes | None], str]] = {
    "no annotations": ({ANNOTATIONS: None}, "has 0 files FOLDER/val/val_annotations.txt"),
    "two tops": ({"b/val/val_annotations.txt": b""}, "has 2 files FOLDER/val"),
    "annotated image missing": ({f"{TOP}/val/images/val_0.JPEG": None}, r"'val_0\.JPEG.*not in"),
    "annotated twice": (
        {ANNOTATIONS: b"val_0.JPEG\tn001\t0\nval_0.JPEG\tn002\t0"},
        "already has a class",
    ),
    "class that escapes": ({ANNOTATIONS: b"val_0.JPEG\t.."}, "the class or the image is not"),
    "image that escapes": ({ANNOTATIONS: b"../../../wnids.txt\tn001"}, "not in the archive"),
}


@pytest.mark.parametrize("name", SPOILED_TINY)
def test_spoiled_tinyimagenet_is_refused(tmp_path, name):
    changes, match = SPOILED_TINY[name]
    files = {k: v for k, v in (tiny_files() | changes).items() if v is not None}
    refuse("tinyimagenet", write_archive(tmp_path / "tiny.zip", files), match)


def test_a_spoiled_image_can_be_left_out(tmp_path):
    files, archive = tiny_files(), tmp_path / "tiny.zip"
    files[f"{TOP}/train/n001/images/n001_1.JPEG"] = b"text"
    write_archive(archive, files)
    unread = r"1 of 6 train images cannot be read: .*train/n001/n001_1\.JPEG \("
    with pytest.raises(
        UserError, match=rf"{unread}.*download a damaged archive again.*--on-bad-image skip"
    ):
        prepare("tinyimagenet", tmp_path / "root", archive)
    assert not any((tmp_path / "root").iterdir())
    counts = prepare("tinyimagenet", tmp_path / "root", archive, on_bad="skip")
    assert (counts.classes, counts.train, counts.val) == (2, 5, 4)
    assert "\n1 of 6 train images cannot be read: train/n001/n001_1.JPEG (" in str(counts)
    # the same on a second call
    again = prepare("tinyimagenet", tmp_path / "root", on_bad="skip")
    assert again.notes == counts.notes and again.train == 5
    write_archive(archive, files | {name: b"text" for name in files if "/n001/images/" in name})
    with pytest.raises(UserError, match="leaves no image of the class n001"):
        prepare("tinyimagenet", tmp_path / "other", archive, on_bad="skip")


def test_archives_of_something_else_are_refused(tmp_path, monkeypatch):
    files = cifar100_files()
    certify(monkeypatch, theirs.CIFAR100, files)
    whole = write_archive(tmp_path / "cifar.tar", files)
    refuse("stl10", whole, "not the official archive stl10_binary.tar.gz")
    refuse("tinyimagenet", whole, "not a TinyImageNet archive")
    files.pop(f"{CIFAR}/test")
    lacking = write_archive(tmp_path / "cifar.tar", files)
    unpacked = tmp_path / CIFAR
    unpacked.mkdir()
    for given in (lacking, unpacked):
        refuse("cifar100", given, "missing or has a different md5. Download it again")


def test_archives_that_are_not_whole_or_not_safe_are_refused(tmp_path):
    zipped = write_archive(tmp_path / "whole.zip", tiny_files()).read_bytes()
    packed = write_archive(tmp_path / "whole.tar.gz", tiny_files()).read_bytes()
    # inside an image's compressed bytes, so that only the checksum reveals it
    place = zipped.index(b"n002_2.JPEG") + 200
    locked = bytearray(zipped)
    # the lowest flag bit, in both headers of a file, marks it as encrypted
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[locked.index(header) + flags] |= 1
    escaping = write_archive(tmp_path / "escaping.tar", {"../evil": b"x"}).read_bytes()
    for name, content, match in (
        ("cut.tar.gz", packed[: len(packed) // 2], WHOLE),
        ("flipped.zip", zipped[:place] + bytes(8) + zipped[place + 8 :], WHOLE),
        ("locked.zip", bytes(locked), "password"),
        ("text.tar.gz", b"<html>404 not found</html>", WHOLE),
        ("escaping.tar", escaping, "outside the destination"),
    ):
        (tmp_path / name).write_bytes(content)
        refuse("tinyimagenet", tmp_path / name, match)
    refuse("cifar100", tmp_path / "nowhere.tar", r"there is no archive .*give its path as --arc")
