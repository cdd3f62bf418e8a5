"""A folder of classes on disk: what is in it, and whether every image in it can be read.

Layout: root/train/CLASS/*.png|jpg|jpeg and root/val/CLASS/*.png|jpg|jpeg.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from isofast.errors import RunError, UserError
from isofast.files import write_atomically

SPLITS = ("train", "val")
EXTENSIONS = (".png", ".jpg", ".jpeg")
# MPO is a JPEG with further pictures behind the first, as many cameras write it
_FORMATS = ("PNG", "JPEG", "MPO")
_SHOWN = 5

# size in bytes and time of change tell whether a file is the one that was checked
_Stamp = tuple[int, int]
_Checked = dict[str, tuple[int, int, int, int]]


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """The images of one split, sorted by path; images are numbered by their place here.

    Attributes:
        root: the data root. split: "train" or "val".
        classes: class names, sorted; a label is a place in it.
        paths: paths relative to root, with "/".
        labels: int64.
        fingerprint: sha256 over the paths, labels and file sizes.
        sizes: (N, 2) int64, height and width in pixels as stored; None before `verify_images`.
        stamps: bytes and time of change (ns) of each file as checked; None before `verify_images`.
    """

    root: Path
    split: str
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    fingerprint: str
    sizes: npt.NDArray[np.int64] | None = None
    stamps: tuple[_Stamp, ...] | None = None

    def __len__(self) -> int:
        """Give the number of images."""
        return len(self.paths)


def open_dataset(root: Path | str, split: str) -> ImageFolder:
    """List one split of a data root; no image is opened (that is `verify_images`).

    Raises:
        UserError: the root or the split is missing, holds no class folder, has a class without
            images, or the validation classes are not the training classes.
    """
    root = Path(root)
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed are {', '.join(SPLITS)}")
    if not root.is_dir():
        raise UserError(
            f"the data root {root} is not a folder. Make it with "
            f"`isofast prepare NAME --root {root}` (NAME: digits, tinyimagenet, ...) "
            "or point data.root at a folder with train/CLASS and val/CLASS"
        )
    classes = _class_names(root, split)
    if split == "val" and (root / "train").is_dir():
        _same_classes(root, classes)
    paths: list[str] = []
    labels: list[int] = []
    digest = hashlib.sha256()
    for label, name in enumerate(classes):
        found = sorted(_images_in(root / split / name))
        if not found:
            raise UserError(
                f"the class folder {root / split / name} has no image; images are its direct "
                f"children named *{', *'.join(EXTENSIONS)}. Add images or remove the folder"
            )
        for filename, size in found:
            path = f"{split}/{name}/{filename}"
            digest.update(f"{path}\0{label}\0{size}\n".encode("utf-8", "surrogateescape"))
            paths.append(path)
            labels.append(label)
    return ImageFolder(
        root, split, classes, tuple(paths), np.array(labels, np.int64), digest.hexdigest()
    )


def verify_images(dataset: ImageFolder, *, progress: bool = True) -> ImageFolder:
    """Decode every image once, and give the data set with `sizes` filled in.

    What was found is kept in the data root (`.isofast-checked-SPLIT.json`) by path, file size and
    time of change, so only new or changed files are read the next time. A root that cannot be
    written to is checked each time.

    Args:
        dataset: what to check.
        progress: show a bar on stderr while files are being read.

    Raises:
        UserError: files that cannot be read as images, named.
    """
    manifest = dataset.root / f".isofast-checked-{dataset.split}.json"
    known = _read_manifest(manifest)
    checked: _Checked = {}
    pending: list[tuple[str, _Stamp]] = []
    bad: dict[str, str] = {}
    for path in dataset.paths:
        try:
            status = os.stat(dataset.root / path)
        except OSError as error:
            bad[path] = error.strerror or str(error)
            continue
        stamp = (status.st_size, status.st_mtime_ns)
        entry = known.get(path)
        if entry is not None and entry[:2] == stamp:
            checked[path] = entry
        else:
            pending.append((path, stamp))
    # decoding releases the interpreter's lock, so threads do scale here
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda item: _image_problem(dataset.root / item[0]), pending)
        bar = tqdm(
            zip(pending, results, strict=True),
            desc=f"checking {dataset.split} images",
            total=len(pending),
            unit="image",
            # None: no bar where there is no terminal
            disable=None if progress and pending else True,
        )
        for (path, stamp), (problem, height, width) in bar:
            if problem:
                bad[path] = problem
            else:
                checked[path] = (*stamp, height, width)
    if checked != known:
        _write_manifest(manifest, checked)
    if bad:
        raise UserError(_bad_files_message(dataset, bad))
    sizes = np.array([checked[path][2:] for path in dataset.paths], dtype=np.int64)
    stamps = tuple(checked[path][:2] for path in dataset.paths)
    return replace(dataset, sizes=sizes, stamps=stamps)


def read_files(dataset: ImageFolder, indices: Iterable[int]) -> list[bytes]:
    """Read the given images' files, and make sure that they are the ones that were checked.

    Raises:
        RunError: a file is gone or has changed since; it is named.
        ValueError: the data set has not been through `verify_images`.
    """
    if dataset.stamps is None:
        raise ValueError("read_files needs a data set that verify_images has given")
    contents = []
    for index in indices:
        path = os.path.join(dataset.root, dataset.paths[index])
        try:
            with open(path, "rb", buffering=0) as file:
                content = file.read()
                status = os.fstat(file.fileno())
        except OSError as error:
            raise RunError(_lost_message(path, error.strerror or str(error))) from error
        if (len(content), status.st_mtime_ns) != dataset.stamps[index]:
            raise RunError(_lost_message(path, "it has changed"))
        contents.append(content)
    return contents


def _lost_message(path: str, reason: str) -> str:
    return (
        f"the image {path} is not what it was when the run began: {reason}. "
        "Bring the file back and give the same command again to continue"
    )


def _image_problem(path: Path) -> tuple[str, int, int]:
    """Decode one file; give ("", height, width), or (what is wrong with it, 0, 0)."""
    try:
        with Image.open(path) as image:
            if image.format not in _FORMATS:
                return f"{image.format}, not PNG or JPEG", 0, 0
            image.load()
            return "", image.height, image.width
    # Pillow raises nearly anything for damaged files (SyntaxError for PNG, struct.error, ...)
    except Exception as error:
        reason = "empty file" if path.exists() and path.stat().st_size == 0 else str(error)
        return reason.replace(f" {str(path)!r}", ""), 0, 0


def _class_names(root: Path, split: str) -> tuple[str, ...]:
    folder = root / split
    if not folder.is_dir():
        raise UserError(
            f"{root} has no folder {split!r}; a data root has train/CLASS/ and val/CLASS/ with "
            "the images of each class. Move the images there, or give another data.root"
        )
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise UserError(
            f"{folder} has no class folder; put each class's images into a folder of its own, "
            f"{folder}/CLASS/"
        )
    return tuple(names)


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


def _images_in(folder: Path) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if not name.lower().endswith(EXTENSIONS) or name.startswith("."):
                continue
            if entry.is_file():
                yield name, entry.stat().st_size
            elif entry.is_symlink():
                # it leads nowhere: verify_images names it, instead of training on fewer images
                yield name, 0


def _bad_files_message(dataset: ImageFolder, bad: dict[str, str]) -> str:
    shown = "; ".join(f"{dataset.root / path} ({bad[path]})" for path in sorted(bad)[:_SHOWN])
    more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return (
        f"{len(bad)} of {len(dataset)} {dataset.split} images cannot be read: {shown}{more}. "
        "Replace or delete these files, then start again"
    )


def _read_manifest(path: Path) -> _Checked:
    try:
        entries = json.loads(path.read_text())["files"]
        return {name: (int(a), int(b), int(c), int(d)) for name, (a, b, c, d) in entries.items()}
    # missing or damaged: everything is checked again
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_manifest(path: Path, checked: _Checked) -> None:
    content = json.dumps({"fields": "bytes, mtime_ns, height, width", "files": checked})
    # a read-only or full data root only costs the check at the next start
    with contextlib.suppress(OSError):
        write_atomically(path, lambda part: part.write_text(content))
