"""`isofast prepare`: put a data set on disk as root/train/CLASS/ and root/val/CLASS/, whole or not.

Everything is built and checked in root/.partial and moved into place at the end, so a command that
was stopped leaves nothing half-written: given again it starts over, or finishes the move.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from isofast.data.archives import extract_tinyimagenet
from isofast.data.datasets import verify_images
from isofast.data.listing import SPLITS, open_dataset
from isofast.errors import UserError

_MANIFEST = ".isofast-prepared.json"
_PARTIAL = ".partial"


@dataclass(frozen=True)
class PreparedCounts:
    """What a data root holds: number of classes and images, and whether it was there before."""

    name: str
    root: Path
    classes: int
    train: int
    val: int
    already_there: bool

    def __str__(self) -> str:
        """Say it in one line."""
        state = "was already there, checked" if self.already_there else "ready"
        return (
            f"{self.name} {state}: {self.classes} classes, {self.train:,} train and "
            f"{self.val:,} val images in {self.root}"
        )


def prepare(name: str, root: Path | str, archive: Path | str | None = None) -> PreparedCounts:
    """Make a data set ready under root; a second call only checks what is there.

    Args:
        name: one of `NAMES`.
        root: the data root, made where it is missing.
        archive: the official file, for the data sets that come in one.

    Raises:
        UserError: unknown name, an archive that is missing, damaged or not wanted, or a root that
            holds something else or has changed since.
    """
    root = Path(root)
    archive = None if archive is None else Path(archive)
    if name == "tinyimagenet":
        return prepare_tinyimagenet(root, archive)
    if archive is not None and name in NAMES:
        raise UserError(f"{name} is made without an archive; leave out --archive {archive}")
    if name == "digits":
        return prepare_digits(root)
    if name == "imagefolder":
        return prepare_imagefolder(root)
    raise UserError(f"there is no data set {name!r} to prepare; allowed are {', '.join(NAMES)}")


NAMES = ("digits", "tinyimagenet", "imagefolder")


def prepare_digits(root: Path) -> PreparedCounts:
    """Write the 1,797 8x8 gray digits that scikit-learn ships, as PNG, every fifth of a class val.

    Raises:
        UserError: the root holds something else, or has changed since it was prepared.
    """
    return _prepare("digits", root, _write_digits)


def prepare_tinyimagenet(root: Path, archive: Path | None) -> PreparedCounts:
    """Unpack TinyImageNet's official zip, of any number of classes; JPEGs stay as they are.

    Raises:
        UserError: no archive, a damaged one or one of another layout; a root that holds something
            else, or has changed since it was prepared.
    """

    def build(folder: Path) -> None:
        if archive is None:
            raise UserError(
                "TinyImageNet is unpacked from its official zip: download "
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip and give it as --archive FILE"
            )
        extract_tinyimagenet(archive, folder)

    return _prepare("tinyimagenet", root, build)


def prepare_imagefolder(root: Path) -> PreparedCounts:
    """Check a folder of one's own: layout, classes, and that every image can be read.

    Raises:
        UserError: what is wrong with it, by name.
    """
    train, val = (verify_images(open_dataset(root, split)) for split in SPLITS)
    return PreparedCounts(
        "imagefolder", root, len(train.classes), len(train), len(val), already_there=True
    )


def _prepare(name: str, root: Path, build: Callable[[Path], None]) -> PreparedCounts:
    made = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root):
            return _prepare_locked(name, root, build)
    except OSError as error:
        built = (root / _PARTIAL / _MANIFEST).exists()
        remedy = (
            "All is built and waits to be moved into place; give the same command again to finish"
            if built
            else "Nothing half-written was left; free space or give another --root, then give the "
            "same command again"
        )
        raise UserError(
            f"cannot prepare {name} in {root}: {error.strerror or error}. {remedy}"
        ) from error
    finally:
        if made:
            with contextlib.suppress(OSError):
                # only succeeds where nothing was put into it
                root.rmdir()


def _prepare_locked(name: str, root: Path, build: Callable[[Path], None]) -> PreparedCounts:
    if (root / _MANIFEST).exists():
        return _check_prepared(name, root)
    partial = root / _PARTIAL
    # a finished build has its manifest: what was stopped is the move alone
    if not (partial / _MANIFEST).exists():
        shutil.rmtree(partial, ignore_errors=True)
        present = [split for split in SPLITS if (root / split).exists()]
        if present:
            raise UserError(
                f"{root} already holds {' and '.join(present)}, not made by `isofast prepare`. "
                "Give another --root, or check your own folder with "
                f"`isofast prepare imagefolder --root {root}`"
            )
        try:
            partial.mkdir()
            build(partial)
            counts = _describe(name, partial)
            (partial / _MANIFEST).write_text(json.dumps(counts, indent=1))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    for entry in sorted(partial.iterdir(), key=lambda path: path.name == _MANIFEST):
        entry.rename(root / entry.name)
    partial.rmdir()
    return _counts(name, root, already_there=False)


def _describe(name: str, root: Path) -> dict[str, object]:
    """Counts and checksums of a data root whose images have all been decoded."""
    train, val = (verify_images(open_dataset(root, split)) for split in SPLITS)
    return {
        "name": name,
        "classes": len(train.classes),
        "train": len(train),
        "val": len(val),
        "sha256_by_class": _class_digests(root),
    }


def _class_digests(root: Path) -> dict[str, str]:
    """sha256 of each class folder's names and contents, by "split/class"."""
    folders = sorted(folder for split in SPLITS for folder in (root / split).iterdir())
    digests = {}
    for folder in tqdm(folders, desc="checksums", unit="class", leave=False, disable=None):
        digest = hashlib.sha256()
        for path in sorted(folder.iterdir()):
            digest.update(os.fsencode(path.name))
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        digests[f"{folder.parent.name}/{folder.name}"] = digest.hexdigest()
    return digests


def _check_prepared(name: str, root: Path) -> PreparedCounts:
    remedy = f"Delete {root} and prepare it again"
    try:
        manifest = json.loads((root / _MANIFEST).read_text())
        expected = dict(manifest["sha256_by_class"])
        found_name = str(manifest["name"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root / _MANIFEST} is damaged. {remedy}") from error
    if found_name != name:
        raise UserError(f"{root} holds {found_name}, not {name}; give another --root")
    try:
        found = _class_digests(root)
    except OSError as error:
        raise UserError(f"{root} is no longer whole: {error}. {remedy}") from error
    changed = sorted(k for k in expected | found if expected.get(k) != found.get(k))
    if changed:
        raise UserError(
            f"{name} in {root} has changed since it was prepared: {len(changed)} class folder(s), "
            f"{', '.join(changed[:5])}. {remedy}"
        )
    return _counts(name, root, already_there=True)


def _counts(name: str, root: Path, *, already_there: bool) -> PreparedCounts:
    manifest = json.loads((root / _MANIFEST).read_text())
    return PreparedCounts(
        name, root, manifest["classes"], manifest["train"], manifest["val"], already_there
    )


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Let one process at a time prepare a root; the others wait and find it done."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        # some network file systems have no locks; then nobody waits
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_digits(folder: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels_NHW = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    seen = [0] * 10
    for pixels, label in zip(pixels_NHW, digits.target, strict=True):
        split = "val" if seen[label] % 5 == 4 else "train"
        path = folder / split / str(label) / f"{seen[label]:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        seen[label] += 1
