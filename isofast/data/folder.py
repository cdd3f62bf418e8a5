"""Data roots: root/train/CLASS/, root/val/CLASS/ and root/unlabeled/, listed and read.

Images are *.png, *.jpg and *.jpeg, the direct children of their folder. Those in root/unlabeled/
are trained on as well, with the label -1; a root may hold nothing else.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from isofast.errors import RunError, UserError

SPLITS = ("train", "val")
UNLABELED = "unlabeled"
UNLABELLED = -1
EXTENSIONS = (".png", ".jpg", ".jpeg")
_OTHER_EXTENSIONS = (".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".jp2", ".heic", ".avif")
_SHOWN = 5

# size in bytes and time of change (ns) tell whether a file is the one that was checked
Stamp = tuple[int, int]


class UndecodableError(RunError):
    """Images that a decoder refuses, though they are in the data set; ``indices`` says which."""

    def __init__(self, message: str, indices: Sequence[int]) -> None:
        super().__init__(message)
        self.indices = indices


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """The images of one split, sorted by path; images are numbered by their place here.

    Attributes:
        root: the data root. split: "train" or "val".
        classes: class names, sorted; a label is a place in it.
        paths: paths relative to root, with "/".
        labels: int64; -1 where an image has none.
        fingerprint: sha256 over the paths, labels and file sizes.
        ignored: files that look like pictures but are not taken for images, sorted.
        skipped: files that the check left out as asked, with what is wrong with each.
        sizes: (N, 2) int64, height and width in pixels as stored; None before they are read.
        stamps: of each file as checked; None where files are not checked.
    """

    root: Path
    split: str
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    fingerprint: str
    sizes: npt.NDArray[np.int64] | None = None
    stamps: tuple[Stamp, ...] | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)


def open_dataset(root: Path | str, split: str) -> ImageFolder:
    """List one split of a data root; no image is opened (that is `check_folder`).

    Raises:
        UserError: the root or the split is missing, holds no class folder, has a class without
            images or a folder that may not be read, or the validation classes are not the
            training classes.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed are {', '.join(SPLITS)}")
    try:
        return _listed(Path(root), split)
    except OSError as error:
        raise UserError(
            f"cannot list {os.fsdecode(error.filename or root)}: {error.strerror or error}. Every "
            "folder of the data, and above it, has to be one that you may read and enter"
        ) from error


def fingerprint_of(paths: Sequence[str], labels: Iterable[int], sizes: Iterable[int]) -> str:
    """sha256 over what is trained on: paths, labels and file sizes in bytes, in this order."""
    digest = hashlib.sha256()
    for path, label, size in zip(paths, labels, sizes, strict=True):
        digest.update(f"{path}\0{label}\0{size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def read_files(dataset: ImageFolder, indices: Iterable[int]) -> list[bytes]:
    """Read the given images' files; those of a checked folder must be the ones that were checked.

    Raises:
        RunError: a file is gone or has changed since; it is named.
    """
    contents = []
    for index in indices:
        path = os.path.join(dataset.root, dataset.paths[index])
        stamp = dataset.stamps[index] if dataset.stamps is not None else None
        try:
            content, changed_ns = _read_file(path, stamp[0] if stamp else None)
        except OSError as error:
            raise RunError(_lost_message(path, error.strerror or str(error))) from error
        if stamp not in (None, (len(content), changed_ns)):
            raise RunError(_lost_message(path, "it has changed"))
        contents.append(content)
    return contents


def ignored_note(dataset: ImageFolder) -> str:
    """One line on the pictures that are not taken for images; "" where there are none."""
    if not dataset.ignored:
        return ""
    shown = ", ".join(dataset.ignored[:_SHOWN])
    count = len(dataset.ignored)
    more = f" and {count - _SHOWN:,} more" if count > _SHOWN else ""
    note = (
        f"{count:,} {dataset.split} file(s) look like pictures and are not used: {shown}{more}. "
        f"Images are named *{', *'.join(EXTENSIONS)} and lie directly in their class's folder"
    )
    return printable(note)


def printable(text: str) -> str:
    """Text that may hold file names, which need not be valid UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def _read_file(path: str, size: int | None) -> tuple[bytes, int]:
    """A file's content and its time of change.

    In few system calls, since Python's threads wait for each other after every one; at most a byte
    more than ``size``.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        wanted = (os.fstat(descriptor).st_size if size is None else size) + 1
        content = os.read(descriptor, wanted)
        # a file system may give less at once
        while len(content) < wanted and (more := os.read(descriptor, wanted - len(content))):
            content += more
        return content, os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def _lost_message(path: str, reason: str) -> str:
    return (
        f"the image {path} is not what it was when the run began: {reason}. "
        "Bring the file back and give the same command again to continue"
    )


def _listed(root: Path, split: str) -> ImageFolder:
    if not root.is_dir():
        raise UserError(
            f"the data root {root} is not a folder. Make it with "
            f"`isofast prepare NAME --root {root}` (NAME: digits, cifar10, cifar100, stl10, "
            "tinyimagenet) or point data.root at a folder with train/CLASS and val/CLASS"
        )
    unlabeled = split == "train" and _is_folder(root / UNLABELED)
    # pictures without labels need no classes beside them
    classes = () if unlabeled and not os.path.lexists(root / split) else _class_names(root, split)
    if split == "val" and any((root / name).is_dir() for name in ("train", UNLABELED)):
        _same_classes(root, classes)
    folders = [(f"{split}/{name}", label) for label, name in enumerate(classes)]
    if unlabeled:
        folders.append((UNLABELED, UNLABELLED))
    paths: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    ignored = list(_pictures_beside(root, split)) if classes else []
    for folder, label in folders:
        found = sorted(_images_in(root / folder))
        if not found:
            raise UserError(
                f"the {'class ' if label >= 0 else ''}folder {root / folder} has no image; images "
                f"are its direct children named *{', *'.join(EXTENSIONS)}. Add images or remove "
                "the folder"
            )
        paths += [f"{folder}/{filename}" for filename, _ in found]
        labels += [label] * len(found)
        sizes += [size for _, size in found]
        ignored += _ignored_in(root, folder)
    return ImageFolder(
        root,
        split,
        classes,
        tuple(paths),
        np.array(labels, np.int64),
        fingerprint_of(paths, labels, sizes),
        ignored=tuple(sorted(ignored)),
    )


def _class_names(root: Path, split: str) -> tuple[str, ...]:
    folder = root / split
    if not _is_folder(folder):
        raise UserError(
            f"{root} has no folder {split!r}; a data root has train/CLASS/ and val/CLASS/ with "
            "the images of each class. Move the images there, or give another data.root"
            + (
                "; without validation images, train with --set evaluation.every_epochs=0"
                if split == "val"
                else f"; pictures without classes go into {root / UNLABELED}"
            )
        )
    with os.scandir(folder) as entries:
        names = sorted(
            e.name for e in entries if not e.name.startswith(".") and _is_folder(Path(e))
        )
    if not names:
        raise UserError(
            f"{folder} has no class folder; put each class's images into a folder of its own, "
            f"{folder}/CLASS/"
        )
    return tuple(names)


def _is_folder(path: Path) -> bool:
    """Whether a path is a folder; a broken link is an error, for it may be an unmounted disk."""
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{path} is a link that leads nowhere ({os.readlink(path)}), so it cannot be told "
            "which images are missing. Bring back what it leads to, or remove the link"
        )
    return path.is_dir()


def _same_classes(root: Path, val: tuple[str, ...]) -> None:
    train = _class_names(root, "train")
    if train == val:
        return
    only_train = sorted(set(train) - set(val))[:_SHOWN]
    only_val = sorted(set(val) - set(train))[:_SHOWN]
    raise UserError(
        f"the class folders of {root}/train ({len(train)}) and {root}/val ({len(val)}) differ"
        + (f"; only in train: {', '.join(only_train)}" if only_train else "")
        + (f"; only in val: {', '.join(only_val)}" if only_val else "")
        + ". Both splits need the same classes"
    )


def _pictures_beside(root: Path, split: str) -> Iterator[str]:
    """Pictures beside the class folders."""
    with os.scandir(root / split) as entries:
        yield from (f"{split}/{e.name}" for e in entries if _is_picture(e.name) and e.is_file())


def _ignored_in(root: Path, folder: str) -> Iterator[str]:
    """Pictures of other formats in a folder of images, and pictures of any in its subfolders."""
    with os.scandir(root / folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if not entry.name.startswith("."):
                    yield from _pictures_below(root, f"{folder}/{entry.name}")
            elif _is_picture(entry.name) and not entry.name.lower().endswith(EXTENSIONS):
                yield f"{folder}/{entry.name}"


def _pictures_below(root: Path, folder: str) -> Iterator[str]:
    for place, _, names in os.walk(root / folder):
        below = os.path.relpath(place, root)
        yield from (f"{below}/{name}" for name in names if _is_picture(name))


def _is_picture(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS + _OTHER_EXTENSIONS) and not name.startswith(".")


def _images_in(folder: Path) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if not name.lower().endswith(EXTENSIONS) or name.startswith("."):
                continue
            if entry.is_file():
                yield name, entry.stat().st_size
            elif entry.is_symlink():
                # a broken link: the check names it, instead of training on fewer images
                yield name, 0
