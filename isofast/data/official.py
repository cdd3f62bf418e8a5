"""Writing CIFAR-10, CIFAR-100 and STL-10 as folders of PNGs from their official archives.

Pixels stay as they are. An image's file name is its place in the official order of its split.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from isofast.data.listing import UNLABELED
from isofast.data.sources import Source
from isofast.data.tars import TarMember, tar_members
from isofast.data.unpickle import load_plain
from isofast.errors import UserError

Pixels = npt.NDArray[np.uint8]

_CIFAR_SIDE, _STL_SIDE = 32, 96
# the largest CIFAR file has 154 MB
_MAX_CIFAR_BYTES = 256 << 20
_MAX_TEXT_BYTES = 1 << 20
_STL_IMAGE_BYTES = 3 * _STL_SIDE**2


def write_cifar(archive: Path, folder: Path, source: Source) -> None:
    """Write CIFAR-10 or CIFAR-100 (fine labels) as folder/train/CLASS/ and folder/val/CLASS/.

    Args:
        archive: a tar with the pickles that ``source`` lists.
        folder: an empty folder to write into.
        source: names and md5 of the files; nothing is unpickled before its md5 is the right one.

    Raises:
        UserError: the archive is missing, damaged, unsafe, or not the official one.
        OSError: the disk is full.
    """
    contents = {
        member.name: member.content(_MAX_CIFAR_BYTES)
        for member in tar_members(archive, source.folder, source.checksums)
    }

    def load(name: str) -> dict[str, Any]:
        try:
            return load_plain(contents[name])
        except ValueError as error:
            raise UserError(f"{archive}: {name} cannot be used: {error}") from error

    meta = load(source.classes_file)
    classes = _class_names(meta.get("label_names", meta.get("fine_label_names")), archive)
    for split, files in (("train", source.train), ("val", source.val)):
        parts = [_cifar_part(load(name), name, archive) for name in files]
        labels = np.concatenate([labels for _, labels in parts])
        images = (image for pixels, _ in parts for image in pixels)
        _write_split(folder / split, images, labels, classes, archive)


def write_stl10(archive: Path, folder: Path, source: Source) -> None:
    """Write STL-10: train and val in classes, and the images without a label in folder/unlabeled/.

    The archive is read twice, for the labels and for the images, which are never in memory as a
    whole.

    Args:
        archive: a tar with the files that ``source`` lists.
        folder: an empty folder to write into.
        source: names and md5 of the files.

    Raises:
        UserError: the archive is missing, damaged, unsafe, or not the official one.
        OSError: the disk is full.
    """
    train_x, train_y, unlabeled_x = source.train
    val_x, val_y = source.val
    checksums = source.checksums | {source.classes_file: ""}
    texts = {
        name: checksums[name] for name in (train_y, val_y, source.classes_file) if name in checksums
    }
    small = {
        member.name: member.content(_MAX_TEXT_BYTES)
        for member in tar_members(archive, source.folder, texts)
    }
    names = small[source.classes_file].decode("utf-8", "replace").split()
    classes = _class_names(names, archive)
    splits = {train_x: ("train", train_y), val_x: ("val", val_y)}
    pixels = {name: checksums[name] for name in (train_x, unlabeled_x, val_x)}
    for member in tar_members(archive, source.folder, pixels):
        images = _stl_images(member, archive)
        if member.name == unlabeled_x:
            count = member.size // _STL_IMAGE_BYTES
            paths = (folder / UNLABELED / f"{number:06d}.png" for number in range(count))
            _write_images(images, paths, count, UNLABELED)
        else:
            split, labels_file = splits[member.name]
            # labels count from 1
            labels = np.frombuffer(small[labels_file], np.uint8).astype(np.int64) - 1
            if len(labels) * _STL_IMAGE_BYTES != member.size:
                raise UserError(f"{archive}: {labels_file} has not one label for each image")
            _write_split(folder / split, images, labels, classes, archive)


def _cifar_part(
    content: dict[str, Any], name: str, archive: Path
) -> tuple[Pixels, npt.NDArray[np.int64]]:
    """One file's images (N, 32, 32, 3) and labels (N,)."""
    columns = 3 * _CIFAR_SIDE**2
    data, labels = content.get("data"), content.get("labels", content.get("fine_labels"))
    if (
        not isinstance(data, np.ndarray)
        or not isinstance(labels, list)
        or not all(isinstance(label, int) for label in labels)
        or data.shape != (len(labels), columns)
    ):
        raise UserError(
            f"{archive}: {name} cannot be used: it has not one row of {columns} bytes and one "
            "label for each image"
        )
    images = data.reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE).transpose(0, 2, 3, 1)
    return images, np.array(labels, np.int64)


def _stl_images(member: TarMember, archive: Path) -> Iterator[Pixels]:
    """The images (96, 96, 3) of a file, which has them channel by channel and column by column."""
    if member.size % _STL_IMAGE_BYTES:
        raise UserError(
            f"{archive}: {member.name} has {member.size:,} bytes, not a multiple of the "
            f"{_STL_IMAGE_BYTES:,} of an image"
        )
    for chunk in member.chunks(64 * _STL_IMAGE_BYTES):
        channels = np.frombuffer(chunk, np.uint8).reshape(-1, 3, _STL_SIDE, _STL_SIDE)
        yield from channels.transpose(0, 3, 2, 1)


def _class_names(names: object, archive: Path) -> list[str]:
    """The names, if they can be names of folders."""
    if (
        not isinstance(names, list)
        or not names
        or len(set(names)) != len(names)
        or not all(isinstance(name, str) and name.replace("_", "a").isalnum() for name in names)
    ):
        raise UserError(
            f"{archive} is unsafe: its classes are {str(names)[:100]}, and they must be different "
            "names of letters and digits"
        )
    return names


def _write_split(
    folder: Path,
    images: Iterable[Pixels],
    labels: npt.NDArray[np.int64],
    classes: list[str],
    archive: Path,
) -> None:
    wrong = set(range(len(classes))) ^ {int(label) for label in labels}
    if wrong:
        raise UserError(
            f"{archive}: the {folder.name} labels and the {len(classes)} classes do not fit: "
            f"{', '.join(str(label) for label in sorted(wrong)[:5])} is only in one of them"
        )
    paths = (folder / classes[k] / f"{number:05d}.png" for number, k in enumerate(labels))
    _write_images(images, paths, len(labels), folder.name)


def _write_images(
    images: Iterable[Pixels], paths: Iterable[Path], count: int, description: str
) -> None:
    """Write PNGs one after the other: Pillow holds the interpreter's lock, threads gain nothing."""
    folders: set[Path] = set()
    # disable=None: no bar where there is no terminal
    bar = tqdm(paths, f"writing {description}", count, unit="image", disable=None)
    for image, path in zip(images, bar, strict=True):
        if path.parent not in folders:
            path.parent.mkdir(parents=True, exist_ok=True)
            folders.add(path.parent)
        Image.fromarray(np.ascontiguousarray(image)).save(path, compress_level=1)
