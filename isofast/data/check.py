"""Checking a folder's images before the first step; what was found is remembered in the root.

The decoder that will read a file in training is its judge: DALI, or Pillow for resident images.
"""

import contextlib
import functools
import importlib.util
import io
import json
import os
import stat
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from isofast.data.files import write_atomically
from isofast.data.folder import ImageFolder, Stamp, fingerprint_of, printable
from isofast.errors import RunError, UserError

Check = Literal["full", "headers", "off"]
OnBad = Literal["stop", "skip"]
Decoder = Literal["dali", "pillow"]

# MPO is a JPEG with further pictures behind the first, as many cameras write it
_FORMATS = ("PNG", "JPEG", "MPO")
_SHOWN = 5
# of the memory; raised when more is checked than before
_FORMAT = 4
REPLACE = (
    "Replace or delete these files, or leave them out with data.on_bad_image=skip "
    "(`isofast prepare`: --on-bad-image skip), then start again"
)
_of_thread = threading.local()


class DecodeResult(NamedTuple):
    """What came of decoding a file; `lasting` is False for errors that may pass (I/O, memory)."""

    problem: str
    height: int = 0
    width: int = 0
    lasting: bool = True


class _Memory(NamedTuple):
    """What is known of files by path: stamp, then height and width, or what is wrong."""

    good: dict[str, tuple[int, int, int, int]]
    bad: dict[str, tuple[int, int, str]]


def check_folder(
    dataset: ImageFolder,
    *,
    check: Check = "full",
    decoder: Decoder | None = None,
    on_bad: OnBad = "stop",
    progress: bool = True,
    remedy: str = REPLACE,
    named_in: str | None = None,
) -> ImageFolder:
    """Check every image, and give the data set with ``sizes`` and ``stamps`` filled in.

    What was found is kept in the data root (`.isofast-checked-SPLIT.json`) by path, file size and
    time of change, so only new or changed files are read the next time. A root that cannot be
    written to is checked each time.

    Neither decoder notices a JPEG that is damaged in the middle, which has no checksums.

    Args:
        dataset: what to check.
        check: "full" decodes every file, "headers" reads formats and sizes, "off" opens none and
            gives the data set back. After the latter two a damaged file is found in training,
            which it ends; DALI may take the process down with it.
        decoder: "dali" or "pillow"; by default DALI where it is installed.
        on_bad: "stop" refuses a data set with unreadable files; "skip" leaves them out, as if they
            were not there, and lists them in ``skipped``.
        progress: show a bar on stderr while files are being read.
        remedy: what to do about unreadable files.
        named_in: the folder in which messages name files; by default the root.

    Raises:
        UserError: unreadable files, named; with "skip" only where that leaves a class, or
            everything, without an image.
    """
    if check == "off":
        return dataset
    judge = "headers" if check == "headers" else decoder or default_decoder()
    known_by, known = _read_memory(dataset)
    # any judge has read the headers
    if judge not in ("headers", known_by):
        known = _Memory({}, {})
    found = _Memory({}, {})
    bad: dict[str, str] = {}
    pending: list[tuple[int, Stamp]] = []
    for index, path in enumerate(dataset.paths):
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
            pending.append((index, stamp))
    _decode_all(dataset, judge, pending, found, bad, progress)
    if found != known:
        _write_memory(dataset, judge, found)
    bad |= {path: reason for path, (_, _, reason) in found.bad.items()}
    if bad and on_bad == "stop":
        raise UserError(f"{_bad_files(dataset, bad, named_in)}. {remedy}")
    kept = [k for k, path in enumerate(dataset.paths) if path not in bad]
    paths, labels = tuple(dataset.paths[k] for k in kept), dataset.labels[kept]
    empty = [name for k, name in enumerate(dataset.classes) if not (labels == k).any()]
    if empty or not kept:
        raise UserError(
            f"{_bad_files(dataset, bad, named_in)}. That leaves no image of "
            f"{f'the class {empty[0]}' if empty else 'the data set'}: replace these files"
            f"{', or remove the class folder from train and val' if empty else ''}"
        )
    stamps = tuple(found.good[path][:2] for path in paths)
    return replace(
        dataset,
        paths=paths,
        labels=labels,
        sizes=np.array([found.good[path][2:] for path in paths], dtype=np.int64),
        stamps=stamps,
        skipped=dict(sorted(bad.items())),
        fingerprint=fingerprint_of(paths, labels, [size for size, _ in stamps])
        if bad
        else dataset.fingerprint,
    )


def default_decoder() -> Decoder:
    """DALI where it is installed, else Pillow."""
    return "dali" if has_dali() else "pillow"


@functools.cache
def has_dali() -> bool:
    """Whether DALI is installed; it is not imported for that."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def read_sizes(dataset: ImageFolder, indices: Iterable[int]) -> npt.NDArray[np.int64]:
    """Height and width of some images of a folder, (N, 2), from their headers where not known.

    Raises:
        RunError: a file has no header to be read; it is named.
    """
    if dataset.sizes is not None:
        known: npt.NDArray[np.int64] = dataset.sizes[np.asarray(indices)]
        return known
    sizes = []
    for index in indices:
        path = dataset.root / dataset.paths[index]
        try:
            with Image.open(path) as image:
                sizes.append((image.height, image.width))
        except Exception as error:
            raise RunError(
                f"cannot read the size of {path}: {error}. With data.check=full such files are "
                "found before the first step"
            ) from error
    return np.array(sizes, dtype=np.int64)


def skipped_note(dataset: ImageFolder) -> str:
    """One line on the files that the check left out; "" where there are none."""
    if not dataset.skipped:
        return ""
    return printable(f"{_bad_files(dataset, dataset.skipped, '')}. They are left out")


def remember_bad(dataset: ImageFolder, indices: Sequence[int], reason: str) -> None:
    """Note that images which passed the check are bad after all, so that "skip" leaves them out."""
    if dataset.stamps is None:
        return
    # the judge stays who it was, or the next check would take this for another's memory
    judge, memory = _read_memory(dataset)
    for index in indices:
        path = dataset.paths[index]
        memory.good.pop(path, None)
        memory.bad[path] = (*dataset.stamps[index], reason)
    _write_memory(dataset, judge or default_decoder(), memory)


def _decode_all(
    dataset: ImageFolder,
    judge: str,
    pending: list[tuple[int, Stamp]],
    found: _Memory,
    bad: dict[str, str],
    progress: bool,
) -> None:
    """Sort the pending files into what is found, and what is bad for now."""
    # decoding releases the interpreter's lock, so threads do scale here
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        results = pool.map(lambda item: _decode(dataset, item[0], judge), pending)
        bar = tqdm(
            zip(pending, results, strict=True),
            desc=f"checking {dataset.split} images",
            total=len(pending),
            unit="image",
            # None: no bar where there is no terminal
            disable=None if progress and pending else True,
        )
        for (index, stamp), result in bar:
            path = dataset.paths[index]
            if not result.problem:
                found.good[path] = (*stamp, result.height, result.width)
            elif result.lasting:
                found.bad[path] = (*stamp, result.problem)
            else:
                bad[path] = result.problem
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(dataset: ImageFolder, index: int, judge: str) -> DecodeResult:
    path = dataset.root / dataset.paths[index]
    try:
        with open(path, "rb") as file:
            # of headers Pillow reads no more than it needs
            content = b"" if judge == "headers" else file.read()
            image = Image.open(file if judge == "headers" else io.BytesIO(content))
        if image.format not in _FORMATS:
            return DecodeResult(f"{image.format}, not PNG or JPEG")
        if judge == "pillow":
            # checksums, then pixels, for which it has to be opened again
            image.verify()
            image = Image.open(io.BytesIO(content))
            image.load()
    # Pillow raises nearly anything for damaged files (SyntaxError for PNG, struct.error, ...)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            # the disk's fault or the permissions', which may pass
            return DecodeResult(error.strerror or str(error), lasting=False)
        return DecodeResult(_reason(path, error))
    if judge == "dali" and not _dali_decodes(content):
        if not _dali_decodes(_pixel()):
            # out of memory or threads, which is no file's fault
            return DecodeResult("DALI decodes nothing at all at the moment", lasting=False)
        return DecodeResult("DALI cannot decode it")
    return DecodeResult("", image.height, image.width)


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify it as an image" if path.stat().st_size else "empty file"
    return str(error) or type(error).__name__


def _dali_decodes(content: bytes) -> bool:
    # late: it takes its time to load, and where all files are known nothing needs it
    from isofast.data.dali import SingleDecoder

    if not hasattr(_of_thread, "decoder"):
        _of_thread.decoder = SingleDecoder()
    decoder: SingleDecoder = _of_thread.decoder
    return decoder.decodes(content)


@functools.cache
def _pixel() -> bytes:
    """A picture that every decoder takes."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue()


def _bad_files(dataset: ImageFolder, bad: Mapping[str, str], named_in: str | None = None) -> str:
    root = dataset.root if named_in is None else named_in
    shown = "; ".join(f"{os.path.join(root, path)} ({bad[path]})" for path in sorted(bad)[:_SHOWN])
    more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    total = len(dataset) + len(dataset.skipped)
    return f"{len(bad)} of {total} {dataset.split} images cannot be read: {shown}{more}"


def _read_memory(dataset: ImageFolder) -> tuple[str, _Memory]:
    """What an earlier check found, and its judge."""
    try:
        content = json.loads(_memory_path(dataset).read_text())
        good: dict[str, Any] = {name: tuple(map(int, row)) for name, row in content["good"].items()}
        bad = {name: (int(a), int(b), str(c)) for name, (a, b, c) in content["bad"].items()}
        if content["format"] == _FORMAT and all(len(row) == 4 for row in good.values()):
            return str(content["judge"]), _Memory(good, bad)
    # missing or damaged: everything is checked again
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return "", _Memory({}, {})


def _write_memory(dataset: ImageFolder, judge: str, memory: _Memory) -> None:
    path = _memory_path(dataset)
    fields = {"good": "bytes, mtime_ns, height, width", "bad": "bytes, mtime_ns, what is wrong"}
    content = {"format": _FORMAT, "judge": judge, "fields": fields, **memory._asdict()}
    # a read-only or full data root only costs the check at the next start
    with contextlib.suppress(OSError):
        write_atomically(path, lambda part: part.write_text(json.dumps(content)))


def _memory_path(dataset: ImageFolder) -> Path:
    return dataset.root / f".isofast-checked-{dataset.split}.json"
