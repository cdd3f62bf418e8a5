"""`isofast prepare`: put a data set on disk as root/train/CLASS/ and root/val/CLASS/, whole or not.

Everything is built and checked in root/.partial and moved into place at the end, so a command that
was stopped leaves nothing half-written but a download: given again it goes on with that, starts
over, or finishes the move.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from tqdm import tqdm

from isofast.data.archives import extract_tinyimagenet
from isofast.data.datasets import OnBad
from isofast.data.listing import SPLITS, UNLABELED
from isofast.data.prepared import (
    MANIFEST,
    PreparedCounts,
    check_prepared,
    count_images,
    prepared_name,
    read_counts,
    write_manifest,
)
from isofast.errors import UserError

if TYPE_CHECKING:
    from isofast.data.sources import Source

NAMES = ("digits", "cifar10", "cifar100", "stl10", "tinyimagenet", "imagefolder")
_PARTIAL = ".partial"
_DOWNLOAD = ".download"


def prepare(
    name: str,
    root: Path | str,
    archive: Path | str | None = None,
    *,
    on_bad: OnBad = "stop",
    source: "Source | None" = None,
) -> PreparedCounts:
    """Make a data set ready under root; a second call only checks what is there.

    Args:
        name: one of `NAMES`.
        root: the data root, made where it is missing.
        archive: the official file, for the data sets that come in one; without it the file is
            downloaded.
        on_bad: "stop" refuses unreadable images, "skip" leaves them out of the counts, and of
            a run with ``data.on_bad_image`` "skip".
        source: another place and other checksums of the archive than the official ones.

    Raises:
        UserError: unknown name, an archive that is missing, damaged, not the official one or not
            wanted, a failed download, or a root that holds something else or has changed since.
    """
    root = Path(root)
    if name not in NAMES:
        raise UserError(f"there is no data set {name!r} to prepare; allowed are {', '.join(NAMES)}")
    if archive is not None and name in ("digits", "imagefolder"):
        raise UserError(f"{name} is made without an archive; leave out --archive {archive}")
    if name == "digits":
        return prepare_digits(root)
    if name == "imagefolder":
        return prepare_imagefolder(root, on_bad=on_bad)
    return prepare_official(
        name, root, None if archive is None else Path(archive), on_bad=on_bad, source=source
    )


def prepare_digits(root: Path) -> PreparedCounts:
    """Write the 1,797 8x8 gray digits that scikit-learn ships, as PNG, every fifth of a class val.

    Raises:
        UserError: the root holds something else, or has changed since it was prepared.
    """
    return _prepare("digits", root, _write_digits, "stop")


def prepare_official(
    name: str,
    root: Path,
    archive: Path | None,
    *,
    on_bad: OnBad = "stop",
    source: "Source | None" = None,
) -> PreparedCounts:
    """Unpack cifar10, cifar100, stl10 or tinyimagenet; arguments and errors as for `prepare`.

    The archive's files are verified by the md5 that torchvision lists; a downloaded archive is
    also verified as a whole. TinyImageNet has no list, so an archive of any number of its classes
    will do, and its JPEGs stay as they are.
    """

    def build(folder: Path) -> None:
        # only here, because torchvision takes its time to load
        from isofast.data.download import fetch
        from isofast.data.official import write_cifar, write_stl10
        from isofast.data.sources import source_of

        known = source or source_of(name)
        given = archive or fetch(known, root / _DOWNLOAD)
        if name == "tinyimagenet":
            extract_tinyimagenet(given, folder)
        elif name == "stl10":
            write_stl10(given, folder, known)
        else:
            write_cifar(given, folder, known)

    return _prepare(name, root, build, on_bad)


def prepare_imagefolder(root: Path, *, on_bad: OnBad = "stop") -> PreparedCounts:
    """Check a folder of one's own: layout, classes, and that every image can be read.

    Raises:
        UserError: what is wrong with it, by name.
    """
    return count_images("imagefolder", root, on_bad, already_there=True)


def _prepare(name: str, root: Path, build: Callable[[Path], None], on_bad: OnBad) -> PreparedCounts:
    try:
        with _locked(root):
            return _prepare_locked(name, root, build, on_bad)
    except OSError as error:
        raise UserError(_failure(name, root, error)) from error


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
    if os.path.exists(root / _DOWNLOAD):
        remedy += f". What was downloaded is kept in {root / _DOWNLOAD}"
    return f"cannot prepare {name} in {root}: {reason}. {remedy}"


def _prepare_locked(
    name: str, root: Path, build: Callable[[Path], None], on_bad: OnBad
) -> PreparedCounts:
    partial = root / _PARTIAL
    if (root / MANIFEST).exists():
        counts = check_prepared(name, root)
        # of a command that was stopped after its last move
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(root / _DOWNLOAD, ignore_errors=True)
        return counts
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
            write_manifest(name, partial, on_bad)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    for entry in sorted(partial.iterdir(), key=lambda path: path.name == MANIFEST):
        entry.rename(root / entry.name)
    partial.rmdir()
    shutil.rmtree(root / _DOWNLOAD, ignore_errors=True)
    return read_counts(name, root, already_there=False)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Make a root and let one process at a time prepare it; the others wait and find it done.

    The folders that were made for it go again where nothing was put into them.
    """
    made: set[Path] = set()
    with contextlib.ExitStack() as stack:
        try:
            stack.callback(os.close, _lock(root, made))
            yield
        finally:
            # before the lock is given up: whoever waits for it then sees that the root is gone
            for folder in sorted(made, key=lambda path: len(path.parts), reverse=True):
                # only succeeds where it is empty
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _lock(root: Path, made: set[Path]) -> int:
    """Give a descriptor that has the root locked, and note the folders that were missing."""
    while True:
        made |= {folder for folder in (root, *root.parents) if not folder.exists()}
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            descriptor = os.open(root, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            _wait_for(descriptor, root)
            # a command that has failed removes the root that it made, and so what was locked here
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(root)):
                    stack.pop_all()
                    return descriptor


def _wait_for(descriptor: int, root: Path) -> None:
    # some network file systems have no locks; then nobody waits
    with contextlib.suppress(OSError):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note = f"another isofast prepare works on {root}; waiting for it to end"
            tqdm.write(note, file=sys.stderr)
            fcntl.flock(descriptor, fcntl.LOCK_EX)


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
