"""The images of a data root (`isofast.data.listing` finds them), and whether they can be read."""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from isofast.data.looks import has_dali, look_at
from isofast.errors import RunError, UserError
from isofast.files import write_atomically

_SHOWN = 5
# raised when more is looked at than before, so that what passed an earlier check is read again
_CHECK = 3
_CHECK_WITHOUT_DALI = 2
# images, at least, between two writings of what was found
_KEEP_EVERY = 2000

OnBad = Literal["stop", "skip"]
# size in bytes and time of change tell whether a file is the one that was checked
_Stamp = tuple[int, int]


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """The images of one split, sorted by path; images are numbered by their place here.

    Attributes:
        root: the data root. split: "train" or "val".
        classes: class names, sorted; a label is a place in it.
        paths: paths relative to root, with "/".
        labels: int64; -1 where an image has none.
        fingerprint: sha256 over the paths, labels and file sizes.
        overlooked: files that look like pictures but are not taken for images, sorted.
        left_out: unreadable files that `verify_images` was told to skip, with what is wrong.
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
    left_out: Mapping[str, str] = field(default_factory=dict)
    overlooked: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Give the number of images."""
        return len(self.paths)


def fingerprint_of(paths: Sequence[str], labels: Iterable[int], sizes: Iterable[int]) -> str:
    """sha256 over what is trained on: paths, labels and file sizes in bytes, in this order."""
    digest = hashlib.sha256()
    for path, label, size in zip(paths, labels, sizes, strict=True):
        digest.update(f"{path}\0{label}\0{size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def verify_images(
    dataset: ImageFolder,
    *,
    on_bad: OnBad = "stop",
    progress: bool = True,
    unpacked: bool = False,
) -> ImageFolder:
    """Decode every image once, and give the data set with `sizes` filled in.

    What was found is kept in the data root (`.isofast-checked-SPLIT.json`) by path, file size and
    time of change, so only new or changed files are read the next time. A root that cannot be
    written to is checked each time. It is kept now and then while files are being read, so a check
    that was stopped goes on from there.

    Pillow decodes each image, and DALI (on the CPU) what Pillow takes, for a file that it refuses
    would end a run. Without DALI the check goes without it, and is repeated once it is there.

    A PNG that is damaged anywhere is found by its checksums. JPEG has none: one that is damaged in
    the middle is a picture to both decoders, with a warning at most, and passes.

    Args:
        dataset: what to check.
        on_bad: "stop" refuses a data set with files that cannot be read as images; "skip" leaves
            them out, as if they were not there, and lists them in `left_out`.
        progress: show a bar on stderr while files are being read.
        unpacked: the files come from an archive and go where the check fails, so that a message
            names them below the root and sends for another archive.

    Raises:
        UserError: files that cannot be read as images, named; with "skip" only where that leaves a
            class, or everything, without an image.
    """
    memory = _memory_of(dataset)
    known = _read_memory(memory)
    found = _Findings({}, {})
    bad: dict[str, str] = {}
    pending: list[tuple[str, _Stamp]] = []
    for path in dataset.paths:
        try:
            status = os.stat(dataset.root / path)
        except OSError as error:
            bad[path] = error.strerror or str(error)
            continue
        # opening a pipe would wait for ever
        if not stat.S_ISREG(status.st_mode):
            bad[path] = "not a file"
            continue
        stamp = (status.st_size, status.st_mtime_ns)
        if path in known.good and known.good[path][:2] == stamp:
            found.good[path] = known.good[path]
        # someone who was stopped by a file may have mended it, whatever its time of change
        elif on_bad == "skip" and path in known.bad and known.bad[path][:2] == stamp:
            found.bad[path] = known.bad[path]
        else:
            pending.append((path, stamp))
    try:
        _look_at_all(dataset, pending, found, bad, progress)
    finally:
        if found != known:
            _write_memory(memory, found)
    bad |= {path: reason for path, (_, _, reason) in found.bad.items()}
    if bad and on_bad == "stop":
        if unpacked:
            raise UserError(
                f"{_bad_files(dataset, bad, Path())}. The archive is spoiled: get it again, or "
                "leave them out with --on-bad-image skip"
            )
        raise UserError(
            f"{_bad_files(dataset, bad, dataset.root)}. Replace or delete these files, or leave "
            "them out with data.on_bad_image=skip (`isofast prepare`: --on-bad-image skip), then "
            "start again"
        )
    return _with_findings(dataset, found, bad, unpacked)


def left_out_note(dataset: ImageFolder) -> str:
    """Say in one line what a check has left out; "" where nothing was."""
    if not dataset.left_out:
        return ""
    note = f"{_bad_files(dataset, dataset.left_out, Path())}. They are left out"
    # what the file system takes as a name need not be text
    return note.encode("utf-8", "backslashreplace").decode()


def remember_bad(dataset: ImageFolder, reasons: Mapping[int, str]) -> None:
    """Note that images which have passed the check are bad after all: "skip" leaves them out.

    Args:
        dataset: as `verify_images` has given it.
        reasons: what is wrong, by the number of the image.
    """
    assert dataset.stamps is not None
    memory = _memory_of(dataset)
    known = _read_memory(memory)
    for index, reason in reasons.items():
        path = dataset.paths[index]
        known.good.pop(path, None)
        known.bad[path] = (*dataset.stamps[index], reason)
    _write_memory(memory, known)


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
            content, changed_ns = _read_file(path, dataset.stamps[index][0])
        except OSError as error:
            raise RunError(_lost_message(path, error.strerror or str(error))) from error
        if (len(content), changed_ns) != dataset.stamps[index]:
            raise RunError(_lost_message(path, "it has changed"))
        contents.append(content)
    return contents


def _read_file(path: str, size: int) -> tuple[bytes, int]:
    """Read a file of `size` bytes, one more if it has more, and its time of change after that.

    In few system calls: Python's threads wait for each other after every one.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        content = os.read(descriptor, size + 1)
        # a file system may give less at once
        while len(content) < size and (more := os.read(descriptor, size + 1 - len(content))):
            content += more
        return content, os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def _lost_message(path: str, reason: str) -> str:
    return (
        f"the image {path} is not what it was when the run began: {reason}. "
        "Bring the file back and give the same command again to continue"
    )


class _Findings(NamedTuple):
    """What is known of files: size and time of change, then height and width, or what is wrong."""

    good: dict[str, tuple[int, int, int, int]]
    bad: dict[str, tuple[int, int, str]]


def _look_at_all(
    dataset: ImageFolder,
    pending: list[tuple[str, _Stamp]],
    found: _Findings,
    bad: dict[str, str],
    progress: bool,
) -> None:
    """Decode the pending files, and sort them into what is found and what is bad for now."""
    memory = _memory_of(dataset)
    written = len(found.good) + len(found.bad)
    # decoding releases the interpreter's lock, so threads do scale here
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        looks = pool.map(lambda item: look_at(dataset.root / item[0]), pending)
        bar = tqdm(
            zip(pending, looks, strict=True),
            desc=f"checking {dataset.split} images",
            total=len(pending),
            unit="image",
            # None: no bar where there is no terminal
            disable=None if progress and pending else True,
        )
        for (path, stamp), look in bar:
            if not look.problem:
                found.good[path] = (*stamp, look.height, look.width)
            elif look.lasting:
                found.bad[path] = (*stamp, look.problem)
            else:
                bad[path] = look.problem
            count = len(found.good) + len(found.bad)
            # all of it is written each time: in steps that grow, or a large set would take for ever
            if count - written >= max(_KEEP_EVERY, count // 8):
                _write_memory(memory, found)
                written = count
    finally:
        # who stops a check does not wait for the rest of it
        pool.shutdown(cancel_futures=True)


def _with_findings(
    dataset: ImageFolder, found: _Findings, bad: dict[str, str], unpacked: bool
) -> ImageFolder:
    """The data set with sizes and stamps, without the bad files."""
    kept = [k for k, path in enumerate(dataset.paths) if path not in bad]
    paths = tuple(dataset.paths[k] for k in kept)
    labels = dataset.labels[kept]
    empty = [name for k, name in enumerate(dataset.classes) if not (labels == k).any()]
    if empty or not kept:
        remedy = (
            "the archive is spoiled, get it again"
            if unpacked
            else "replace these files, or remove the class folder from train and val"
        )
        raise UserError(
            f"{_bad_files(dataset, bad, Path() if unpacked else dataset.root)}. That leaves no "
            f"image of {f'the class {empty[0]}' if empty else 'the data set'}: {remedy}"
        )
    stamps = tuple(found.good[path][:2] for path in paths)
    return replace(
        dataset,
        paths=paths,
        labels=labels,
        sizes=np.array([found.good[path][2:] for path in paths], dtype=np.int64),
        stamps=stamps,
        left_out=dict(sorted(bad.items())),
        fingerprint=fingerprint_of(paths, labels, [size for size, _ in stamps])
        if bad
        else dataset.fingerprint,
    )


def _bad_files(dataset: ImageFolder, bad: Mapping[str, str], root: Path) -> str:
    shown = "; ".join(f"{root / path} ({bad[path]})" for path in sorted(bad)[:_SHOWN])
    more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    total = len(dataset) + len(dataset.left_out)
    return f"{len(bad)} of {total} {dataset.split} images cannot be read: {shown}{more}"


def _memory_of(dataset: ImageFolder) -> Path:
    return dataset.root / f".isofast-checked-{dataset.split}.json"


def _check() -> int:
    return _CHECK if has_dali() else _CHECK_WITHOUT_DALI


def _read_memory(path: Path) -> _Findings:
    try:
        content = json.loads(path.read_text())
        if content["check"] < _check():
            return _Findings({}, {})
        good = {
            name: (int(a), int(b), int(c), int(d))
            for name, (a, b, c, d) in content["files"].items()
        }
        bad = {name: (int(a), int(b), str(c)) for name, (a, b, c) in content.get("bad", {}).items()}
        return _Findings(good, bad)
    # missing or damaged: everything is checked again
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return _Findings({}, {})


def _write_memory(path: Path, found: _Findings) -> None:
    fields = {"files": "bytes, mtime_ns, height, width", "bad": "bytes, mtime_ns, what is wrong"}
    content = json.dumps(
        {"check": _check(), "fields": fields, "files": found.good, "bad": found.bad}
    )
    # a read-only or full data root only costs the check at the next start
    with contextlib.suppress(OSError):
        write_atomically(path, lambda part: part.write_text(content))
