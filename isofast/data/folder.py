"""List and read data roots: root/train/CLASS/, root/val/CLASS/ and root/unlabeled/.

Images lie in these folders or in folders within them. Those in root/unlabeled/ are trained on with
the label -1; a root may contain nothing else. root/train, root/val and root/unlabeled may each
contain tars instead (`isofast.data.shards`).
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import BinaryIO, Never

import numpy as np
import numpy.typing as npt
from PIL import Image

from isofast.data.shards import EXTENSIONS, PICTURES, Index, Tar, open_member, read_index
from isofast.errors import RunError, UserError

SPLITS = ("train", "val")
UNLABELED = "unlabeled"
UNLABELLED = -1
NAMED = f"*{', *'.join(EXTENSIONS)}"

# path, size in bytes, time in ns, index of the tar (-1: none), offset in it
_Row = tuple[str, int, int, int, int]


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """The images of one split, sorted by path and indexed in this order.

    Attributes:
        root: the data root. split: "train" or "val".
        classes: class names, sorted; labels index them.
        paths: relative to root, with "/".
        labels: int64; -1 for images without one.
        fingerprint: sha256 over paths, labels and file sizes.
        stamps: (N, 2) int64, size in bytes and modification time in ns of each file when checked,
            else when listed; in a tar, its size and the tar's time.
        tars: the tars that contain images.
        places: (N, 2) int64, index of the tar and offset in it; -1, 0 for a separate file.
        sizes: (N, 2) int64, height and width in pixels as stored; None if unchecked.
        skipped: files that the check dropped, with the problem of each.
        ignored: files that look like images but are not used, sorted.
    """

    root: Path
    split: str
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    fingerprint: str
    stamps: npt.NDArray[np.int64]
    tars: tuple[Tar, ...]
    places: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64] | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def subset(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> "ImageFolder":
        """Return some of the images, in the given order, with the whole set's fingerprint."""
        keep = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            paths=tuple(self.paths[k] for k in keep),
            labels=self.labels[keep],
            stamps=self.stamps[keep],
            places=self.places[keep],
            sizes=None if self.sizes is None else self.sizes[keep],
        )

    def open(self, index: int) -> BinaryIO:
        """Open an image's file, or its part of a tar.

        Raises:
            OSError: it is missing or not readable, or its tar has changed.
        """
        number, offset = self.places[index].tolist()
        if number < 0:
            return open(os.path.join(self.root, self.paths[index]), "rb")
        return open_member(self.tars[number], offset, int(self.stamps[index, 0]))

    def where(self, index: int) -> str:
        """Return the path of an image, or that of its tar and the image's name."""
        number, path = self.places[index, 0], self.paths[index]
        if number < 0:
            return os.path.join(self.root, path)
        return f"{self.tars[number].path}: {path.partition('/')[2]}"


def open_dataset(root: Path | str, split: str) -> ImageFolder:
    """List "train" or "val" of a data root without opening images (`check_folder` does).

    Raises:
        UserError: the root or the split is missing, a class has no images, a folder cannot be
            read, or training and validation classes differ.
    """
    try:
        return _listed(Path(root), split)
    except OSError as error:
        raise UserError(
            f"cannot list {os.fsdecode(error.filename or root)}: {error.strerror or error}. You "
            "need permission to read and enter every folder of the data and its parents, and links "
            "must not be broken"
        ) from error


def fingerprint_of(paths: Sequence[str], labels: Iterable[int], sizes: Iterable[int]) -> str:
    """Return the sha256 over paths, labels and file sizes in bytes, in this order."""
    digest = hashlib.sha256()
    for path, label, size in zip(paths, labels, sizes, strict=True):
        digest.update(f"{path}\0{label}\0{size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def read_sizes(dataset: ImageFolder, indices: Iterable[int]) -> npt.NDArray[np.int64]:
    """Return heights and widths (N, 2), int64, reading the headers of unchecked images.

    Raises:
        RunError: a file has no readable header.
    """
    if dataset.sizes is not None:
        return np.asarray(dataset.sizes[np.asarray(indices)])
    sizes = []
    for index in indices:
        try:
            with dataset.open(index) as file, Image.open(file) as image:
                sizes.append((image.height, image.width))
        except Exception as error:
            raise RunError(
                f"cannot read the size of {dataset.where(index)}: {error}. data.check=full finds "
                "such files before the first step"
            ) from error
    return np.array(sizes, dtype=np.int64)


def read_files(dataset: ImageFolder, indices: Iterable[int]) -> list[bytes]:
    """Read the files of some images; checked files must not have changed since.

    Raises:
        RunError: a file is missing or has changed.
    """
    contents = []
    for index in indices:
        try:
            with dataset.open(index) as file:
                content = file.read()
                now = [len(content), os.fstat(file.fileno()).st_mtime_ns]
            changed = dataset.sizes is not None and now != dataset.stamps[index].tolist()
            problem = "it has changed" if changed else ""
        except OSError as error:
            problem = error.strerror or str(error)
        if problem:
            raise RunError(
                f"the image {dataset.where(index)} is not as it was when the run began: "
                f"{problem}. Restore the file, then rerun the same command to continue"
            )
        contents.append(content)
    return contents


def walk(folder: Path, onerror: Callable[[OSError], object]) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below ``folder``, itself included, and the names of its pictures.

    Hidden ones are left out. Links to folders are followed, except to a folder that contains the
    link. ``onerror`` is called for folders that cannot be listed and links that may be to them.
    """
    for place, folders, files in os.walk(folder, onerror=onerror, followlinks=True):
        folders[:] = [n for n in folders if n[0] != "." and not _leads_back(Path(place, n))]
        pictures = []
        for name in (name for name in files if name[0] != "."):
            if name.lower().endswith(PICTURES):
                pictures.append(name)
            elif os.path.islink(path := os.path.join(place, name)):
                # perhaps to a folder on an unmounted disk
                try:
                    os.stat(path)
                except OSError as error:
                    onerror(error)
        yield place, pictures


def _leads_back(path: Path) -> bool:
    """Return whether a folder is a link to one that contains it, an endless loop."""
    if not path.is_symlink():
        return False
    target = path.resolve()
    return any(parent.resolve().is_relative_to(target) for parent in path.parents)


def some_of(names: Sequence[str], separator: str = ", ", shown: int = 5) -> str:
    """Join the first few names, and count the rest."""
    more = [f"and {len(names) - shown:,} more"] if len(names) > shown else []
    return separator.join([*names[:shown], *more])


def printable(text: str) -> str:
    """Escape what is not valid UTF-8 in file names."""
    return text.encode("utf-8", "backslashreplace").decode()


def _listed(root: Path, split: str) -> ImageFolder:
    if not _is_folder(root):
        raise UserError(
            f"the data root {root} is not a folder. Create it with `isofast prepare NAME --root "
            f"{root}` (NAME: digits, cifar10, cifar100, stl10, tinyimagenet) or point data.root "
            "(--root of evaluate and report) at a folder with train/CLASS and val/CLASS"
        )
    unlabeled = split == "train" and _is_folder(root / UNLABELED)
    tops = [split, UNLABELED] if unlabeled else [split]
    # unlabeled images alone need no classes
    if unlabeled and not os.path.lexists(root / split):
        tops.remove(split)
    indexes = {top: read_index(root / top) for top in tops}
    classes = _class_names(root, split, indexes[split]) if split in tops else ()
    if split == "val" and any(_is_folder(root / name) for name in ("train", UNLABELED)):
        _require_same_classes(root, classes)
    tars: list[Tar] = []
    ignored: list[str] = []
    rows: list[tuple[int, str, int, int, int, int]] = []
    for top, index in indexes.items():
        depth = 2 if top == split else 1
        folders = {f"{split}/{name}": label for label, name in enumerate(classes)}
        wanted = folders if top == split else {UNLABELED: UNLABELLED}
        found = []
        for row in _files(root, top) if index is None else _members(top, index, len(tars)):
            label = wanted.get("/".join(row[0].split("/", depth)[:depth]))
            if label is not None and row[0].lower().endswith(EXTENSIONS):
                found.append((label, *row))
            else:
                ignored.append(row[0])
        labelled = {row[0] for row in found}
        if empty := [name for name, label in wanted.items() if label not in labelled]:
            raise UserError(
                f"the {'class ' if top == split else ''}folder {root / empty[0]} has no images, "
                f"i.e. files named {NAMED}. Add images or remove the folder"
            )
        rows += sorted(found)
        tars += index.tars if index else ()
    labels, paths, sizes, times, numbers, offsets = zip(*rows, strict=True)
    return ImageFolder(
        root,
        split,
        classes,
        paths,
        np.array(labels, np.int64),
        fingerprint_of(paths, labels, sizes),
        np.stack([sizes, times], axis=1, dtype=np.int64),
        tuple(tars),
        np.stack([numbers, offsets], axis=1, dtype=np.int64),
        ignored=tuple(sorted(ignored)),
    )


def _class_names(root: Path, split: str, index: Index | None) -> tuple[str, ...]:
    folder = root / split
    if not _is_folder(folder):
        remedy = (
            "without validation images, train with --set evaluation.every_epochs=0"
            if split == "val"
            else f"images without classes go into {root / UNLABELED}"
        )
        raise UserError(
            f"{root} has no folder {split!r}; a data root has train/CLASS/ and val/CLASS/ with the "
            f"images of each class. Move the images there, or give another data.root; {remedy}"
        )
    if index is None:
        names = {n for n in os.listdir(folder) if n[0] != "." and _is_folder(folder / n)}
        problem = f"has no class folder; put the images of each class into {folder}/CLASS/"
    else:
        names = {name.partition("/")[0] for name in index.names if "/" in name}
        problem = (
            "has tars, but no images with a class: name them CLASS/1.jpg, or put the class in a "
            f"file 1.cls next to 1.jpg. Tars without classes go into {root / UNLABELED}"
        )
    if not names:
        raise UserError(f"{folder} {problem}")
    return tuple(sorted(names))


def _is_folder(path: Path) -> bool:
    """Whether a path is a folder; a broken link, perhaps to an unmounted disk, is an error."""
    # from Python 3.14 on, is_dir() returns False on any error, such as missing permission
    try:
        return S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise UserError(
                f"{path} is a broken link to {os.readlink(path)}. Restore its target, or remove "
                "the link to train without it"
            ) from None
        return False


def _require_same_classes(root: Path, val: tuple[str, ...]) -> None:
    train = _class_names(root, "train", read_index(root / "train"))
    only = {"train": set(train).difference(val), "val": set(val).difference(train)}
    if train != val:
        found = (f"only in {k}: {some_of(sorted(v))}" for k, v in only.items() if v)
        raise UserError(
            f"the class folders of {root}/train ({len(train)}) and {root}/val ({len(val)}) differ; "
            f"{'; '.join(found)}. Both splits need the same classes"
        )


def _files(root: Path, top: str) -> Iterator[_Row]:
    def fail(error: OSError) -> Never:
        raise error

    for place, names in walk(root / top, fail):
        below = os.path.relpath(place, root)
        for name in names:
            path = os.path.join(place, name)
            try:
                status = os.stat(path)
            except FileNotFoundError:
                # a broken link: let the check name it rather than train on fewer images
                yield f"{below}/{name}", 0, 0, -1, 0
            else:
                if S_ISREG(status.st_mode):
                    yield f"{below}/{name}", status.st_size, status.st_mtime_ns, -1, 0


def _members(top: str, index: Index, first: int) -> Iterator[_Row]:
    """Yield the images in tars; ``first`` is the index of the first tar."""
    for name, number, offset, size in zip(index.names, *index.places_N3.T.tolist(), strict=True):
        yield f"{top}/{name}", size, index.tars[number].mtime_ns, first + number, offset
