"""Turn official archives of CIFAR-10, CIFAR-100, STL-10 and TinyImageNet into image folders.

torchvision downloads, verifies and reads them. Pixels are unchanged; a PNG's file name is the
image's index in the official order of its split.
"""

import errno
import os
import shutil
import socket
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import numpy.typing as npt
from PIL import Image
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, download_url

from isofast.data.bar import Bar
from isofast.data.folder import UNLABELED
from isofast.errors import UserError

_TORCHVISION: dict[str, Any] = {
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "stl10": datasets.STL10,
}
# in label order; the archive's own list has no published checksum
_STL10_CLASSES = (
    *("airplane", "bird", "car", "cat", "deer"),
    *("dog", "horse", "monkey", "ship", "truck"),
)
# torchvision has no TinyImageNet; the checksum is the widely published one
_TINYIMAGENET = (
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "tiny-imagenet-200.zip",
    "90528d7ca1a48142e341f4ef8d21d0de",
)
_SILENCE_S = 60.0


def write_official(name: str, archive: Path, folder: Path) -> None:
    """Write an archive's images as folder/train/CLASS/, folder/val/CLASS/ and folder/unlabeled/.

    Args:
        name: "cifar10", "cifar100", "stl10" or "tinyimagenet".
        archive: a tar or zip of the official files, or the folder that it unpacks to. Their md5
            must match; TinyImageNet publishes none, and may have any number of classes.
        folder: an empty folder to write into.

    Raises:
        UserError: the archive is missing, damaged, unsafe, or not the official one.
        OSError: the disk is full.
    """
    raw = folder / ".raw"
    dataset = _TORCHVISION.get(name)
    if archive.is_dir():
        raw.mkdir()
        (raw / getattr(dataset, "base_folder", "top")).symlink_to(archive.resolve())
    else:
        _unpack(archive, raw)
    if dataset is None:
        _write_tinyimagenet(archive, raw, folder)
    else:
        try:
            (_write_stl10 if name == "stl10" else _write_cifar)(dataset, raw, folder)
        # torchvision verifies each file before it reads it
        except RuntimeError as error:
            raise UserError(
                f"{archive} is not the official archive {dataset.filename}: a file in it is "
                "missing or has a different md5. Download it again"
            ) from error
    shutil.rmtree(raw)


def fetch(name: str, folder: Path) -> Path:
    """Download an official archive to ``folder`` and verify it, unless it or its parent has it.

    Raises:
        UserError: the host cannot be reached, or the download is not the official archive.
        OSError: the disk is full.
    """
    dataset = _TORCHVISION.get(name)
    url, filename, md5 = (
        (dataset.url, dataset.filename, dataset.tgz_md5) if dataset else _TINYIMAGENET
    )
    if check_integrity(folder.parent / filename, md5):
        return folder.parent / filename
    # urllib has no time limit by default
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE_S)
    try:
        download_url(url, folder, filename, md5)
    # torchvision raises RuntimeError for a wrong md5
    except (URLError, HTTPException, ConnectionError, TimeoutError, RuntimeError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"cannot download {url}: {error}. Try again later, or get {filename} elsewhere (a "
            "browser, another machine) and pass it as --archive FILE"
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
                _extract(opened, folder.absolute())
    # tarfile, zipfile and the decompressors raise nearly anything for damaged files
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        # tarfile then lists the complaint of each of its readers
        reason = str(error).partition(":\n")[0]
        raise UserError(
            f"cannot unpack {archive}: {reason}. It is not a complete and safe tar or zip file; "
            "download it again"
        ) from error


def _extract(archive: tarfile.TarFile, folder: Path) -> None:
    """Write the files; tarfile's own filters came with Python 3.11.4, and Debian 12 has 3.11.2."""
    for member in archive:
        path = Path(os.path.abspath(folder / member.name))
        if not path.is_relative_to(folder):
            raise tarfile.TarError(f"{member.name} is outside the destination")
        if (content := archive.extractfile(member)) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                shutil.copyfileobj(content, file)


def _write_cifar(dataset: Any, raw: Path, folder: Path) -> None:
    for split in ("train", "val"):
        part = dataset(raw, train=split == "train")
        _write_images(folder / split, part.data, [part.classes[label] for label in part.targets])


def _write_stl10(dataset: Any, raw: Path, folder: Path) -> None:
    for split, theirs in (("train", "train"), ("val", "test"), (UNLABELED, "unlabeled")):
        part = dataset(raw, theirs)
        images_NHW3 = part.data.transpose(0, 2, 3, 1)
        names = [_STL10_CLASSES[label] if label >= 0 else "" for label in part.labels]
        _write_images(folder / split, images_NHW3, names)


def _write_images(folder: Path, images_NHW3: npt.NDArray[np.uint8], classes: Sequence[str]) -> None:
    """Write folder/CLASS/NUMBER.png; Pillow holds the GIL, so threads don't help."""
    for name in set(classes):
        (folder / name).mkdir(parents=True)
    bar = Bar(classes, f"writing {folder.name}", unit="image")
    digits = 5 if any(classes) else 6
    for number, (image, name) in enumerate(zip(images_NHW3, bar, strict=True)):
        path = folder / name / f"{number:0{digits}d}.png"
        Image.fromarray(np.ascontiguousarray(image)).save(path, compress_level=1)


def _write_tinyimagenet(archive: Path, raw: Path, folder: Path) -> None:
    """Take the files of train/WNID/images/, and sort those of val/images/ by val_annotations.txt.

    Classes without training or validation images are detected when the folder is listed.
    """
    found = [*raw.glob("*/val/val_annotations.txt")]
    if len(found) != 1:
        raise UserError(
            f"{archive} is not a TinyImageNet archive: it has {len(found)} files "
            "FOLDER/val/val_annotations.txt, and needs one. The official file is "
            "tiny-imagenet-200.zip"
        )
    top = found[0].parents[1]
    classes = {path.parts[-2] for path in top.glob("train/*/images")}
    # the user's own folder stays as it is
    put: Callable[[Path, Path], object] = shutil.copyfile if archive.is_dir() else Path.rename
    for name in classes:
        (folder / "train" / name).mkdir(parents=True)
        for path in (top / "train" / name / "images").iterdir():
            put(path, folder / "train" / name / path.name)
    for line in found[0].read_text("utf-8", "replace").splitlines():
        filename, wnid = (*line.split("\t"), "")[:2]
        path = top / "val" / "images" / Path(filename).name
        if wnid not in classes or not path.is_file():
            raise UserError(
                f"{archive}: val_annotations.txt says {line!r}, but the class or the image is not "
                "in the archive, or the image already has a class. Download it again"
            )
        (folder / "val" / wnid).mkdir(parents=True, exist_ok=True)
        put(path, folder / "val" / wnid / path.name)
