"""CIFAR and STL-10: the same pixels and labels as torchvision's readers give, and no trust."""

import bz2
import gzip
import hashlib
import io
import lzma
import pickle
import subprocess
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets as theirs

from isofast.data import open_dataset, tars, verify_images
from isofast.data.prepare import prepare
from isofast.data.sources import Source, source_of
from isofast.data.unpickle import load_plain
from isofast.errors import UserError

Files = dict[str, bytes]
RNG = np.random.default_rng(0)
FINE_NAMES = {"fine_label_names": ["aquarium_fish", "bed", "cup"]}


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def cifar_part(labels: list[int], key: str, **more: list[int]) -> bytes:
    data = RNG.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    # protocol 2 is what the official files have
    return pickle.dumps(more | {"data": data, key: labels, "batch_label": "part"}, protocol=2)


def cifar100_files() -> tuple[Files, Source]:
    source = source_of("cifar100")
    files = {
        "train": cifar_part([2, 0, 1, 1, 0, 2, 0], "fine_labels", coarse_labels=[0, 1] * 3 + [1]),
        "test": cifar_part([1, 0, 2, 2], "fine_labels", coarse_labels=[0, 1, 1, 0]),
        "meta": pickle.dumps({"coarse_label_names": ["fish", "things"]} | FINE_NAMES, protocol=2),
        "file.txt~": b"not wanted",
    }
    return files, certified(source, files)


def stl10_files() -> tuple[Files, Source]:
    def images(count: int) -> bytes:
        return RNG.integers(0, 256, count * 3 * 96 * 96, dtype=np.uint8).tobytes()

    files = {
        "unlabeled_X.bin": images(7),
        "test_X.bin": images(4),
        "test_y.bin": bytes([2, 1, 2, 1]),
        "train_X.bin": images(5),
        "class_names.txt": b"airplane\nbird\n",
        "fold_indices.txt": b"0 1",
        "train_y.bin": bytes([2, 2, 1, 2, 1]),
    }
    return files, certified(source_of("stl10"), files)


def certified(source: Source, files: Files) -> Source:
    """The source with the checksums of generated files in place of the official ones."""
    train, val, others = (
        {name: md5(files[name]) for name in table}
        for table in (source.train, source.val, source.others)
    )
    return replace(source, train=train, val=val, others=others)


def write_tar(path: Path, folder: str, files: Files, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def unpacked(root: Path, folder: str, files: Files) -> Path:
    (root / folder).mkdir(parents=True)
    for name, content in files.items():
        (root / folder / name).write_bytes(content)
    return root


def assert_same_images(
    root: Path, split: str, pixels_NHWC: np.ndarray, names: list[str], step: int = 1
) -> None:
    """Every step-th image, and the place of all of them."""
    place = "unlabeled/{0:06d}.png" if split == "unlabeled" else split + "/{1}/{0:05d}.png"
    expected = {place.format(number, name) for number, name in enumerate(names)}
    assert {str(path.relative_to(root)) for path in (root / split).rglob("*.png")} == expected
    for number in range(0, len(names), step):
        with Image.open(root / place.format(number, names[number])) as image:
            assert np.array_equal(np.asarray(image), pixels_NHWC[number]), number


@pytest.mark.slow
def test_real_cifar10_is_torchvisions(cifar10: tuple[Path, Path]) -> None:
    root, unpacked_root = cifar10
    for split, train, count in (("train", True, 5000), ("val", False, 1000)):
        reader = theirs.CIFAR10(unpacked_root, train=train)
        ours = open_dataset(root, split)
        assert list(ours.classes) == reader.classes
        assert Counter(ours.labels.tolist()) == dict.fromkeys(range(10), count)
        names = [reader.classes[label] for label in reader.targets]
        assert_same_images(root, split, reader.data, names, step=7)
        # all of them were decoded by prepare, and are not again
        assert (verify_images(ours, progress=False).sizes == 32).all()


def test_real_tinyimagenet_keeps_its_files(tiny_zip: Path, tiny_root: Path) -> None:
    with zipfile.ZipFile(tiny_zip) as archive:
        stored = {
            Path(name).name: archive.read(name)
            for name in archive.namelist()
            if name.endswith(".JPEG") and "/test/" not in name
        }
    ours = {path.name: path.read_bytes() for path in tiny_root.rglob("*.JPEG")}
    assert len(ours) == 11_000
    assert ours == stored


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_cifar100_is_torchvisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    files, source = cifar100_files()
    archive = write_tar(tmp_path / "any.name", source.folder, files, mode)
    counts = prepare("cifar100", tmp_path / "root", archive, source=source)
    assert (counts.classes, counts.train, counts.val, counts.unlabeled) == (3, 7, 4, 0)
    monkeypatch.setattr(theirs.CIFAR100, "train_list", list(source.train.items()))
    monkeypatch.setattr(theirs.CIFAR100, "test_list", list(source.val.items()))
    monkeypatch.setitem(theirs.CIFAR100.meta, "md5", source.others["meta"])
    folder = unpacked(tmp_path / "unpacked", source.folder, files)
    for split, train in (("train", True), ("val", False)):
        reader = theirs.CIFAR100(folder, train=train)
        names = [reader.classes[label] for label in reader.targets]
        assert_same_images(tmp_path / "root", split, reader.data, names)
        assert list(open_dataset(tmp_path / "root", split).classes) == reader.classes


def test_stl10_is_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, source = stl10_files()
    archive = write_tar(tmp_path / "stl.tar.gz", source.folder, files)
    root = tmp_path / "root"
    counts = prepare("stl10", root, archive, source=source)
    assert (counts.classes, counts.train, counts.val, counts.unlabeled) == (2, 12, 4, 7)
    assert "12 train (7 without a label) and 4 val" in str(counts)
    monkeypatch.setattr(theirs.STL10, "train_list", list(source.train.items()))
    monkeypatch.setattr(theirs.STL10, "test_list", list(source.val.items()))
    folder = unpacked(tmp_path / "unpacked", source.folder, files)
    for split, ours in (("train", "train"), ("test", "val"), ("unlabeled", "unlabeled")):
        reader = theirs.STL10(folder, split=split)
        # the last class of the list stands for -1
        names = [[*reader.classes, "none"][label] for label in reader.labels]
        assert_same_images(root, ours, reader.data.transpose(0, 2, 3, 1), names)
    train = open_dataset(root, "train")
    assert train.classes == ("airplane", "bird")
    assert Counter(train.labels.tolist()) == {0: 2, 1: 3, -1: 7}
    assert prepare("stl10", root).already_there
    (root / "unlabeled" / "000003.png").unlink()
    with pytest.raises(UserError, match=r"has changed.*1 class folder\(s\), unlabeled"):
        prepare("stl10", root)


def test_sources_are_torchvisions() -> None:
    for name, reader in (
        ("cifar10", theirs.CIFAR10),
        ("cifar100", theirs.CIFAR100),
        ("stl10", theirs.STL10),
    ):
        source = source_of(name)
        assert (source.url, source.md5) == (reader.url, reader.tgz_md5)
        for file, checksum in (*reader.train_list, *reader.test_list):
            assert source.checksums[file] == checksum
    assert source_of("cifar10").checksums["batches.meta"] == theirs.CIFAR10.meta["md5"]


class Malicious:
    """Unpickled by anyone else, this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return subprocess.check_call, (["touch", str(self.path)],)


def test_pickles_run_nothing(tmp_path: Path) -> None:
    content = pickle.dumps({"data": Malicious(tmp_path / "evil")}, protocol=2)
    with pytest.raises(ValueError, match=r"asks for \w+\.check_call"):
        load_plain(content)
    # not even where someone vouches for the file
    files, source = cifar100_files()
    files["train"] = content
    archive = write_tar(tmp_path / "evil.tar.gz", source.folder, files)
    with pytest.raises(UserError, match=r"train cannot be used.*check_call"):
        prepare("cifar100", tmp_path / "root", archive, source=certified(source, files))
    # and without, it is not looked into
    with pytest.raises(UserError, match=r"train is not the official file: its md5 is"):
        prepare("cifar100", tmp_path / "root", archive, source=source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.tar.gz"]


def refuse(tmp_path: Path, archive: Path, name: str, source: Source, match: str) -> None:
    """The archive is refused, and nothing of it stays."""
    with pytest.raises(UserError, match=match) as caught:
        prepare(name, tmp_path / "root", archive, source=source)
    assert archive.name in str(caught.value)
    assert not (tmp_path / "root").exists()


SPOILED_CIFAR: dict[str, tuple[Callable[[Files], object], str]] = {
    "a file missing": (lambda f: f.pop("test"), r"lacks cifar-100-python/test"),
    "class that escapes": (
        lambda f: f.update(meta=pickle.dumps({"fine_label_names": ["..", "b", "c"]}, 2)),
        r"unsafe: its classes",
    ),
    "label of no class": (
        lambda f: f.update(train=cifar_part([0, 1, 2, 3], "fine_labels")),
        r"train labels and the 3 classes do not fit: 3",
    ),
    "class without images": (
        lambda f: f.update(test=cifar_part([0, 1], "fine_labels")),
        r"val labels and the 3 classes do not fit: 2",
    ),
    "more labels than rows": (
        lambda f: f.update(
            train=pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0]}, 2)
        ),
        "one row of 3072 bytes and one label",
    ),
    "no labels": (
        lambda f: f.update(train=pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}, 2)),
        "one row of 3072 bytes and one label",
    ),
}


@pytest.mark.parametrize("name", SPOILED_CIFAR)
def test_spoiled_cifar_is_refused(tmp_path: Path, name: str) -> None:
    files, source = cifar100_files()
    spoil, match = SPOILED_CIFAR[name]
    spoil(files)
    if "test" in files:
        source = certified(source, files)
    archive = write_tar(tmp_path / "spoiled.tar.gz", source.folder, files)
    refuse(tmp_path, archive, "cifar100", source, match)


def test_spoiled_stl10_is_refused(tmp_path: Path) -> None:
    for spoil, match in (
        ({"train_y.bin": bytes([1, 2, 1])}, "train_y.bin has not one label for each image"),
        ({"unlabeled_X.bin": bytes(27_650)}, "27,650 bytes, not a multiple"),
        ({"class_names.txt": b"a\nb\nc"}, "labels and the 3 classes do not fit"),
        ({"class_names.txt": bytes(2 << 20)}, "class_names.txt unpacks to 2,097,152 bytes"),
    ):
        files, source = stl10_files()
        files |= spoil
        archive = write_tar(tmp_path / "spoiled.tar.gz", source.folder, files)
        refuse(tmp_path, archive, "stl10", certified(source, files), match)
    # one changed pixel, which only the checksum tells, after all of the images were written
    files, source = stl10_files()
    files["unlabeled_X.bin"] = (
        bytes([files["unlabeled_X.bin"][0] ^ 1]) + (files["unlabeled_X.bin"][1:])
    )
    archive = write_tar(tmp_path / "spoiled.tar.gz", source.folder, files)
    refuse(tmp_path, archive, "stl10", source, "unlabeled_X.bin is not the official file")


@pytest.mark.parametrize(
    ("member", "match"),
    [
        ({"name": "../evil"}, "points outside"),
        ({"name": "/tmp/evil"}, "points outside"),
        ({"name": "x", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is a link or a dev"),
        ({"name": "x", "type": tarfile.LNKTYPE, "linkname": "train"}, "is a link or a dev"),
        ({"name": "x", "type": tarfile.CHRTYPE}, "is a link or a dev"),
        ({"name": "x", "type": tarfile.FIFOTYPE}, "is a link or a dev"),
    ],
    ids=["escapes", "absolute", "symlink", "hard link", "device", "fifo"],
)
def test_unsafe_members_are_refused(tmp_path: Path, member: dict[str, object], match: str) -> None:
    files, source = cifar100_files()
    archive = tmp_path / "unsafe.tar"
    with tarfile.open(archive, "w") as opened:
        info = tarfile.TarInfo()
        for key, value in member.items():
            setattr(info, key, value)
        opened.addfile(info)
        for name, content in files.items():
            info = tarfile.TarInfo(f"{source.folder}/{name}")
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    refuse(tmp_path, archive, "cifar100", source, match)


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, source = cifar100_files()
    files["bomb"] = bytes(1 << 20)
    archive = write_tar(tmp_path / "bomb.tar.gz", source.folder, files)
    monkeypatch.setattr(tars, "_MAX_TOTAL_BYTES", 500_000)
    refuse(tmp_path, archive, "cifar100", source, "more than 1,000 files or 500,000 bytes")
    monkeypatch.undo()
    monkeypatch.setattr(tars, "_MAX_MEMBERS", 4)
    refuse(tmp_path, archive, "cifar100", source, "more than 4 files")
    monkeypatch.undo()
    # a name of 100 MB of zeros, which packs to nothing
    with tarfile.open(archive, "w:gz") as opened:
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 100 << 20
        opened.addfile(info, io.BytesIO(bytes(info.size)))
    assert archive.stat().st_size < 1 << 20
    refuse(tmp_path, archive, "cifar100", source, r"a header of 104,857,600 bytes")


def test_archives_that_are_no_whole_tar_are_named(tmp_path: Path) -> None:
    files, source = cifar100_files()
    plain = write_tar(tmp_path / "plain.tar", source.folder, files, "w").read_bytes()
    packed = gzip.compress(plain)
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    damaged = "is not a whole tar file.*Download it again"
    for name, content, match in (
        ("cut.tar", plain[: len(plain) // 3], damaged),
        ("between.tar", plain[: 512 + 512 * -(-len(files["train"]) // 512)], "lacks .*cut short"),
        ("cut.tar.gz", packed[: len(packed) // 2], damaged),
        ("cut.tar.bz2", bz2.compress(plain)[:-100], damaged),
        ("cut.tar.xz", lzma.compress(plain)[: len(packed) // 2], damaged),
        ("flipped.tar.gz", bytes(flipped), "not a whole tar file|not the official file"),
        ("text.tar.gz", b"<html>404 not found</html>", damaged),
        ("empty.tar.gz", b"", damaged),
    ):
        (tmp_path / name).write_bytes(content)
        refuse(tmp_path, tmp_path / name, "cifar100", source, match)
    refuse(tmp_path, tmp_path / "nowhere.tar", "cifar100", source, "there is no archive")
    # the right kind of archive of another data set
    other = write_tar(tmp_path / "cifar-10.tar", "cifar-10-batches-py", files, "w")
    refuse(tmp_path, other, "cifar100", source, "lacks cifar-100-python/train")
