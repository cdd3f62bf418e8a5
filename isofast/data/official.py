"""CIFAR-10, CIFAR-100, STL-10 and TinyImageNet as folders of images, from their official archives.

torchvision knows, downloads, verifies and reads them. Pixels stay as they are; the file name of a
written PNG is the image's place in the official order of its split.
"""

import errno
import lzma
import shutil
import socket
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import numpy.typing as npt
from PIL import Image
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, download_url
from tqdm import tqdm

from isofast.data.folder import UNLABELED
from isofast.errors import UserError

_TORCHVISION: dict[str, Any] = {
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "stl10": datasets.STL10,
}
# torchvision has no TinyImageNet; the checksum is the one that is widely published
_TINYIMAGENET = (
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "tiny-imagenet-200.zip",
    "90528d7ca1a48142e341f4ef8d21d0de",
)
_SILENCE_S = 60.0
_NETWORK_ERRORS = (URLError, HTTPException, ConnectionError, TimeoutError)


def write_official(name: str, archive: Path, folder: Path) -> None:
    """Write an archive's images as folder/train/CLASS/, folder/val/CLASS/ and folder/unlabeled/.

    Args:
        name: "cifar10", "cifar100", "stl10" or "tinyimagenet".
        archive: a tar or zip with the official files, whose md5 must be right; of TinyImageNet,
            which publishes none, the official layout with any number of classes.
        folder: an empty folder to write into.

    Raises:
        UserError: the archive is missing, damaged, unsafe, or not the official one.
        OSError: the disk is full, or the archive cannot be read.
    """
    raw = folder / ".raw"
    _unpack(archive, raw)
    if name == "tinyimagenet":
        _write_tinyimagenet(archive, raw, folder)
    else:
        _verify(name, archive, raw)
        (_write_stl10 if name == "stl10" else _write_cifar)(name, archive, raw, folder)
    shutil.rmtree(raw)


def fetch(name: str, folder: Path) -> Path:
    """Download an official archive into ``folder``, unless it is there or beside it, and verify it.

    Raises:
        UserError: the host cannot be reached, or what came is not the official archive.
        OSError: the disk is full.
    """
    dataset = _TORCHVISION.get(name)
    url, filename, md5 = (
        (dataset.url, dataset.filename, dataset.tgz_md5) if dataset else _TINYIMAGENET
    )
    for place in (folder, folder.parent):
        if check_integrity(place / filename, md5):
            return place / filename
    # urllib would wait for ever
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE_S)
    try:
        download_url(url, folder, filename, md5)
    # a RuntimeError is another md5
    except (*_NETWORK_ERRORS, RuntimeError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"cannot download {url}: {error}. Try again later, or get {filename} in another way (a "
            "browser, another machine) and give it as --archive FILE"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return folder / filename


def _unpack(archive: Path, folder: Path) -> None:
    if not archive.is_file():
        raise UserError(f"there is no archive {archive}; give its path as --archive FILE")
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened_zip:
                opened_zip.extractall(folder)
        else:
            with tarfile.open(archive) as opened:
                opened.extractall(folder, filter=_files_alone)
    except tarfile.FilterError as error:
        raise UserError(f"{archive} is unsafe: {error}") from error
    # RuntimeError: a zip with a password
    except (
        *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError),
        *(RuntimeError, NotImplementedError),
    ) as error:
        raise _damaged(archive, error) from error
    except OSError as error:
        # those of decompression have no number
        if error.errno is None:
            raise _damaged(archive, error) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or error.filename not in (None, archive):
            raise
        raise UserError(
            f"cannot read the archive {archive}: {error.strerror}. Give a file that you may read, "
            "on a disk that works, as --archive FILE"
        ) from error


def _files_alone(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    """tarfile's filter for data, and no links, for the images of a link are not the archive's."""
    if member.issym() or member.islnk():
        raise tarfile.FilterError(f"{member.name!r} is a link")
    return tarfile.data_filter(member, folder)


def _damaged(archive: Path, error: Exception) -> UserError:
    # tarfile says in further lines what each of its readers thinks
    reason = str(error).partition(":\n")[0]
    return UserError(
        f"{archive} is not a whole tar or zip file ({reason}); it was cut short or damaged. "
        "Download it again"
    )


def _verify(name: str, archive: Path, raw: Path) -> None:
    dataset = _TORCHVISION[name]
    members = [*dataset.train_list, *dataset.test_list]
    if meta := getattr(dataset, "meta", None):
        members.append([meta["filename"], meta["md5"]])
    folder = raw / dataset.base_folder
    wrong = [member for member, md5 in members if not check_integrity(folder / member, md5)]
    if wrong:
        raise UserError(
            f"{archive} is not the official archive {dataset.filename}: missing, or with another "
            f"md5: {', '.join(f'{dataset.base_folder}/{member}' for member in wrong)}. Download "
            "it again"
        )


def _write_cifar(name: str, archive: Path, raw: Path, folder: Path) -> None:
    for split in ("train", "val"):
        part = _TORCHVISION[name](raw, train=split == "train")
        _write_split(archive, folder / split, part.data, part.targets, part.classes)


def _write_stl10(name: str, archive: Path, raw: Path, folder: Path) -> None:
    for split, theirs in (("train", "train"), ("val", "test"), (UNLABELED, "unlabeled")):
        part = _TORCHVISION[name](raw, theirs)
        images_NHW3 = part.data.transpose(0, 2, 3, 1)
        if split == UNLABELED:
            (folder / split).mkdir()
            paths = [folder / split / f"{number:06d}.png" for number in range(len(images_NHW3))]
            _write_images(images_NHW3, paths, split)
        else:
            # torchvision leaves them out where their file is missing
            classes = getattr(part, "classes", [])
            _write_split(archive, folder / split, images_NHW3, part.labels, classes)


def _write_split(
    archive: Path,
    folder: Path,
    images: Sequence[npt.NDArray[np.uint8]],
    labels: Sequence[int],
    classes: Sequence[str],
) -> None:
    # of STL-10's names no checksum is published
    plain = all(name.replace("_", "a").isalnum() for name in classes)
    if not plain or len(set(classes)) < len(classes) or {*labels} != {*range(len(classes))}:
        raise UserError(
            f"{archive} is unsafe: its classes are {str(classes)[:100]}, and must be different "
            "plain names, one for each label"
        )
    for name in classes:
        (folder / name).mkdir(parents=True)
    paths = [folder / classes[label] / f"{number:05d}.png" for number, label in enumerate(labels)]
    _write_images(images, paths, folder.name)


def _write_images(
    images: Iterable[npt.NDArray[np.uint8]], paths: Sequence[Path], description: str
) -> None:
    """Write PNGs one after the other: Pillow holds the interpreter's lock, threads gain nothing."""
    # disable=None: no bar where there is no terminal
    bar = tqdm(paths, f"writing {description}", unit="image", disable=None)
    for image, path in zip(images, bar, strict=True):
        Image.fromarray(np.ascontiguousarray(image)).save(path, compress_level=1)


def _write_tinyimagenet(archive: Path, raw: Path, folder: Path) -> None:
    """Move the files: wnids.txt (the classes), train/WNID/images/*, val/images/*, annotations."""
    tops = [path.parent for path in raw.glob("*/wnids.txt")]
    if len(tops) != 1:
        raise UserError(
            f"{archive} is no TinyImageNet archive: it has {len(tops)} files FOLDER/wnids.txt, "
            "and needs one. The official file is tiny-imagenet-200.zip"
        )
    (top,) = tops
    classes = [*dict.fromkeys((top / "wnids.txt").read_text("utf-8", "replace").split())]
    if not all(name.isalnum() for name in classes):
        raise UserError(f"{archive} is unsafe: wnids.txt has class names that are no plain names")
    for split in ("train", "val"):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
    for name in classes:
        for path in (top / "train" / name / "images").glob("*"):
            path.rename(folder / "train" / name / path.name)
    annotations = top / "val" / "val_annotations.txt"
    lines = annotations.read_text("utf-8", "replace") if annotations.exists() else ""
    for line in lines.splitlines():
        filename, wnid = (*line.split("\t"), "")[:2]
        path = top / "val" / "images" / Path(filename).name
        if wnid not in classes or not path.is_file():
            raise UserError(
                f"{archive}: val_annotations.txt says {line!r}, but the class or the image is not "
                "in the archive, or the image has a class already. Download it again"
            )
        path.rename(folder / "val" / wnid / path.name)
    for split in ("train", "val"):
        empty = [name for name in classes if not any((folder / split / name).iterdir())]
        if empty:
            raise UserError(
                f"{archive} has no {split} images of {len(empty)} of its {len(classes)} classes: "
                f"{', '.join(sorted(empty)[:5])}. Download it again"
            )
