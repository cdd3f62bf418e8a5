"""`isofast prepare`: put a data set on disk as root/train/CLASS/ and root/val/CLASS/, whole or not.

Everything is built and checked in root/.partial and moved into place at the end, so a command that
was stopped leaves nothing half-written: given again it starts over, or finishes the move.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from isofast.data.check import OnBad, check_folder, skipped_note
from isofast.data.files import write_atomically
from isofast.data.folder import SPLITS, UNLABELED, UNLABELLED, ignored_note, open_dataset
from isofast.errors import UserError

NAMES = ("digits", "cifar10", "cifar100", "stl10", "tinyimagenet", "imagefolder")
MANIFEST = ".isofast-prepared.json"
_PARTIAL = ".partial"
_DOWNLOAD = ".download"
_SHOWN = 5


@dataclass(frozen=True)
class PreparedCounts:
    """What a data root holds, and whether it was there before.

    Attributes:
        name: of the data set. root: where it is.
        classes: number of classes. train: training images, with and without a label.
        val: validation images. unlabeled: how many training images have no label.
        notes: a line for each split with unreadable files, and for each with ignored ones; neither
            are counted.
    """

    name: str
    root: Path
    classes: int
    train: int
    val: int
    already_there: bool
    unlabeled: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line, and the notes."""
        state = "was already there, checked" if self.already_there else "ready"
        aside = f" ({self.unlabeled:,} without a label)" if self.unlabeled else ""
        lines = [
            f"{self.name} {state}: {self.classes} classes, {self.train:,} train{aside} and "
            f"{self.val:,} val images in {self.root}",
            *self.notes,
        ]
        if not self.val:
            lines.append("without val images nothing can be evaluated: evaluation.every_epochs=0")
        return "\n".join(lines)


def prepare(
    name: str, root: Path | str, archive: Path | str | None = None, *, on_bad: OnBad = "stop"
) -> PreparedCounts:
    """Make a data set ready under root; a second call only checks what is there.

    Args:
        name: one of `NAMES`.
        root: the data root, made where it is missing.
        archive: the official file, for the data sets that come in one; without it the file is
            downloaded.
        on_bad: "stop" refuses unreadable images, "skip" leaves them out of the counts, and of
            a run with ``data.on_bad_image`` "skip".

    Raises:
        UserError: unknown name, an archive that is missing, damaged, not the official one or not
            wanted, a failed download, or a root that holds something else or has changed since.
    """
    root = Path(root)
    if name not in NAMES:
        raise UserError(f"there is no data set {name!r} to prepare; allowed are {', '.join(NAMES)}")
    if archive is not None and name in ("digits", "imagefolder"):
        raise UserError(f"{name} is made without an archive; leave out --archive {archive}")
    if name == "imagefolder":
        return _count(name, root, on_bad, already_there=True)

    def build(folder: Path) -> None:
        if name == "digits":
            _write_digits(folder)
            return
        # torchvision takes its time to load
        from isofast.data.official import fetch, write_official

        given = Path(archive) if archive is not None else fetch(name, root / _DOWNLOAD)
        write_official(name, given, folder)

    try:
        with _locked(root):
            return _prepare(name, root, build, on_bad)
    except OSError as error:
        raise UserError(_failure(name, root, error)) from error


def prepared_name(root: Path) -> str | None:
    """The data set that `isofast prepare` made in root; None where it did not."""
    try:
        return str(json.loads((root / MANIFEST).read_text())["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _prepare(name: str, root: Path, build: Callable[[Path], None], on_bad: OnBad) -> PreparedCounts:
    partial = root / _PARTIAL
    if (root / MANIFEST).exists():
        _verify_prepared(name, root)
        # of a command that was stopped after its last move
        for leftover in (partial, root / _DOWNLOAD):
            shutil.rmtree(leftover, ignore_errors=True)
        return _count(name, root, on_bad, already_there=True)
    # a finished build has its manifest: what was stopped is the move alone
    finished = prepared_name(partial)
    if finished not in (None, name):
        raise UserError(
            f"{root} holds {finished}, half moved into place; finish that with `isofast prepare "
            f"{finished} --root {root}`, or give another --root for {name}"
        )
    if finished is None:
        shutil.rmtree(partial, ignore_errors=True)
        present = [split for split in (*SPLITS, UNLABELED) if (root / split).exists()]
        if present:
            raise UserError(
                f"{root} already holds {' and '.join(present)}, not made by `isofast prepare`. "
                "Give another --root, or check your own folder with "
                f"`isofast prepare imagefolder --root {root}`"
            )
        try:
            partial.mkdir()
            build(partial)
            # the check comes first: unreadable images stop the build
            _count(name, partial, on_bad, already_there=False)
            _write_manifest(name, partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    for entry in sorted(partial.iterdir(), key=lambda path: path.name == MANIFEST):
        entry.rename(root / entry.name)
    partial.rmdir()
    shutil.rmtree(root / _DOWNLOAD, ignore_errors=True)
    return _count(name, root, on_bad, already_there=False)


def _failure(name: str, root: Path, error: OSError) -> str:
    """What the system refused, in what state that leaves the root, and what helps."""
    reason = error.strerror or str(error)
    if error.filename is not None:
        reason += f": {os.fsdecode(error.filename)}"
    # in a folder that may not be searched nothing exists
    if os.path.exists(root / _PARTIAL / MANIFEST):
        remedy = (
            "All is built and waits to be moved into place; give the same command again to finish"
        )
    else:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = (
            f"Nothing half-written was left; {'free space' if full else 'mend that'} or give "
            "another --root, then give the same command again"
        )
    return f"cannot prepare {name} in {root}: {reason}. {remedy}"


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Make a root and let one process at a time prepare it; the others wait and find it done."""
    made: set[Path] = set()
    descriptor = _lock(root, made)
    try:
        yield
    finally:
        # before the lock is given up: whoever waits for it then sees that the root is gone
        for folder in sorted(made, key=lambda path: len(path.parts), reverse=True):
            # only succeeds where nothing was put into it
            with contextlib.suppress(OSError):
                folder.rmdir()
        os.close(descriptor)


def _lock(root: Path, made: set[Path]) -> int:
    """A descriptor that has the root locked; notes the folders that were missing."""
    while True:
        made |= {folder for folder in (root, *root.parents) if not folder.exists()}
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root, os.O_RDONLY)
        # some network file systems have no locks; then nobody waits
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note = f"another isofast prepare works on {root}; waiting for it to end"
                tqdm.write(note, file=sys.stderr)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        # a command that has failed removes the root that it made, and so what was locked here
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(root)):
                return descriptor
        os.close(descriptor)


def _count(name: str, root: Path, on_bad: OnBad, *, already_there: bool) -> PreparedCounts:
    """Check every image of a data root that was not checked before, and count them.

    A root of pictures without classes needs no validation images; any other one does.
    """
    splits = [open_dataset(root, "train")]
    if splits[0].classes or (root / "val").exists():
        splits.append(open_dataset(root, "val"))
    splits = [check_folder(split, on_bad=on_bad) for split in splits]
    notes = (note(split) for note in (skipped_note, ignored_note) for split in splits)
    train = splits[0]
    return PreparedCounts(
        name,
        root,
        len(train.classes),
        len(train),
        len(splits[1]) if len(splits) > 1 else 0,
        already_there,
        int((train.labels == UNLABELLED).sum()),
        tuple(note for note in notes if note),
    )


def _write_manifest(name: str, folder: Path) -> None:
    text = json.dumps({"name": name, "sha256_by_class": _class_digests(folder)}, indent=1)
    write_atomically(folder / MANIFEST, lambda part: part.write_text(text))


def _verify_prepared(name: str, root: Path) -> None:
    """Compare a prepared root with its checksums.

    Raises:
        UserError: it holds another data set, has changed since, or something was put into it.
    """
    found = prepared_name(root)
    if found not in (None, name):
        raise UserError(f"{root} holds {found}, not {name}; give another --root")
    try:
        expected = json.loads((root / MANIFEST).read_text())["sha256_by_class"]
        present = _class_digests(root)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{root} is no longer whole ({error}). Delete it and prepare it again"
        ) from error
    changed = sorted(k for k in expected | present if expected.get(k) != present.get(k))
    if changed:
        raise UserError(
            f"{name} in {root} has changed since it was prepared: {len(changed)} place(s), "
            f"{', '.join(changed[:_SHOWN])}. Undo that, or delete {root} and prepare it again"
        )


def _class_digests(root: Path) -> dict[str, str]:
    """sha256 of each class's names and contents, by "split/class" or "unlabeled"."""
    # hidden files are what file managers put beside the images (.DS_Store)
    splits = [root / split for split in SPLITS]
    folders = sorted(p for s in splits for p in s.iterdir() if not p.name.startswith("."))
    folders += [folder for folder in [root / UNLABELED] if folder.is_dir()]
    digests = {}
    for folder in tqdm(folders, desc="checksums", unit="class", leave=False, disable=None):
        digest = hashlib.sha256()
        # a file among the class folders counts as a class of its own
        for path in sorted(folder.iterdir()) if folder.is_dir() else [folder]:
            if not path.name.startswith("."):
                digest.update(os.fsencode(path.name))
                content = path.read_bytes() if path.is_file() else b""
                digest.update(hashlib.sha256(content).digest())
        digests[str(folder.relative_to(root))] = digest.hexdigest()
    return digests


def _write_digits(folder: Path) -> None:
    """The 1,797 8x8 gray digits that scikit-learn ships, as PNG, every fifth of a class val."""
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
