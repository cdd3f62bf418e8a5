"""Check a folder's images before the first step; results are remembered in the data root.

The decoder that reads a file in training judges it: DALI, or Pillow for resident images.
"""

import contextlib
import functools
import importlib.util
import io
import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

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
_FORMAT = 5
_REMEDY = (
    "Replace or delete these files (download a damaged archive again), or leave them out with "
    "data.on_bad_image=skip (`isofast prepare`: --on-bad-image skip), then start again"
)
_of_thread = threading.local()


class _Entry(NamedTuple):
    """The result for one file; ``problem`` is empty for a good one."""

    bytes: int
    mtime_ns: int
    judge: str
    height: int = 0
    width: int = 0
    problem: str = ""


_Memory = dict[str, _Entry]


def check_folder(
    dataset: ImageFolder,
    *,
    check: Check = "full",
    decoder: Decoder | None = None,
    on_bad: OnBad = "stop",
    progress: bool = True,
) -> ImageFolder:
    """Check every image; return the data set with ``sizes`` and ``stamps`` filled in.

    Results are kept in the data root (`.isofast-checked-SPLIT.json`) by path, file size and
    modification time, so later checks read only new or changed files. A read-only root is checked
    each time. JPEG has no checksums: no decoder notices damage in the middle of one.

    Args:
        dataset: what to check.
        check: "full" decodes every file, "headers" reads formats and sizes, "off" returns the data
            set unchecked. After the latter two a damaged file ends the training run that reaches
            it; DALI may crash the process.
        decoder: "dali" or "pillow"; DALI by default where it is installed.
        on_bad: "stop" refuses unreadable files; "skip" drops them and lists them in ``skipped``.
        progress: show a bar on stderr.

    Raises:
        UserError: unreadable files, named; with "skip" only if a class, or the whole set, has no
            image left.
    """
    if check == "off":
        return dataset
    judge = "headers" if check == "headers" else decoder or default_decoder()
    known = _read_memory(dataset)
    found: _Memory = {}
    bad: dict[str, str] = {}
    pending: list[tuple[str, Stamp]] = []
    for path in dataset.paths:
        try:
            status = os.stat(dataset.root / path)
        except OSError as error:
            bad[path] = error.strerror or str(error)
            continue
        stamp = (status.st_size, status.st_mtime_ns)
        entry = known.get(path)
        # every judge reads the headers
        same = entry and entry[:2] == stamp and judge in (entry.judge, "headers")
        # a bad file that stopped a run may have been repaired, whatever its stamp
        if entry and same and (on_bad == "skip" or not entry.problem):
            found[path] = entry
        else:
            pending.append((path, stamp))
    _decode_all(dataset, judge, pending, found, bad, progress)
    if found != known:
        _write_memory(dataset, found)
    bad |= {path: entry.problem for path, entry in found.items() if entry.problem}
    if bad and on_bad == "stop":
        raise UserError(f"{_bad_files(dataset, bad)}. {_REMEDY}")
    kept = [k for k, path in enumerate(dataset.paths) if path not in bad]
    paths, labels = tuple(dataset.paths[k] for k in kept), dataset.labels[kept]
    empty = [name for k, name in enumerate(dataset.classes) if not (labels == k).any()]
    if empty or not kept:
        what = f"the class {empty[0]}" if empty else "the data set"
        raise UserError(
            f"{_bad_files(dataset, bad)}. That leaves no image of {what}: replace these files, or "
            "remove the class folder from train and val"
        )
    entries = [found[path] for path in paths]
    return replace(
        dataset,
        paths=paths,
        labels=labels,
        sizes=np.array([(entry.height, entry.width) for entry in entries], dtype=np.int64),
        stamps=tuple(entry[:2] for entry in entries),
        skipped=dict(sorted(bad.items())),
        fingerprint=fingerprint_of(paths, labels, [entry.bytes for entry in entries])
        if bad
        else dataset.fingerprint,
    )


def default_decoder() -> Decoder:
    """DALI where it is installed, else Pillow."""
    return "dali" if has_dali() else "pillow"


@functools.cache
def has_dali() -> bool:
    """Whether DALI is installed, without importing it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def read_sizes(dataset: ImageFolder, indices: Iterable[int]) -> npt.NDArray[np.int64]:
    """Return heights and widths (N, 2) of some images, reading the headers of unchecked ones.

    Raises:
        RunError: a file has no readable header.
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
                f"cannot read the size of {path}: {error}. data.check=full finds such files "
                "before the first step"
            ) from error
    return np.array(sizes, dtype=np.int64)


def skipped_note(dataset: ImageFolder) -> str:
    """One line on the files that the check left out; "" if there are none."""
    if not dataset.skipped:
        return ""
    return printable(f"{_bad_files(dataset, dataset.skipped, root='')}. They are left out")


def remember_bad(dataset: ImageFolder, indices: Sequence[int], reason: str) -> None:
    """Record images that passed the check as bad, so that "skip" leaves them out."""
    memory = _read_memory(dataset)
    for path in (dataset.paths[index] for index in indices):
        if path in memory:
            memory[path] = memory[path]._replace(problem=reason)
    _write_memory(dataset, memory)


def _decode_all(
    dataset: ImageFolder,
    judge: str,
    pending: list[tuple[str, Stamp]],
    found: _Memory,
    bad: dict[str, str],
    progress: bool,
) -> None:
    """Add results to ``found``, and errors that may pass to ``bad``."""

    def decode(item: tuple[str, Stamp]) -> _Entry | OSError:
        path, stamp = item
        try:
            return _decode(dataset.root / path, stamp, judge)
        except OSError as error:
            return error

    # decoding releases the interpreter's lock, so threads scale
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        bar = tqdm(
            zip(pending, pool.map(decode, pending), strict=True),
            desc=f"checking {dataset.split} images",
            total=len(pending),
            unit="image",
            # None: no bar unless stderr is a terminal
            disable=None if progress and pending else True,
        )
        for (path, _), result in bar:
            if isinstance(result, OSError):
                bad[path] = result.strerror or str(result)
            else:
                found[path] = result
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(path: Path, stamp: Stamp, judge: str) -> _Entry:
    """Judge one file; OSError if the disk, the permissions or DALI as a whole fail."""
    try:
        with open(path, "rb") as file:
            # Pillow reads no more of the file than it needs for the header
            content = b"" if judge == "headers" else file.read()
            image = Image.open(file if judge == "headers" else io.BytesIO(content))
        if image.format not in _FORMATS:
            return _Entry(*stamp, judge, problem=f"{image.format}, not PNG or JPEG")
        if judge == "pillow":
            # verify() tests the checksums, after which the pixels need a new open()
            image.verify()
            image = Image.open(io.BytesIO(content))
            image.load()
    # Pillow raises nearly anything for damaged files (SyntaxError for PNG, struct.error, ...)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        problem = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            problem = "cannot identify it as an image" if stamp[0] else "empty file"
        return _Entry(*stamp, judge, problem=problem)
    problem = ""
    if judge == "dali" and not _dali_decodes(content):
        # out of memory or threads is no file's fault
        if not _dali_decodes(_pixel()):
            raise OSError("DALI decodes nothing at all at the moment")
        problem = "DALI cannot decode it"
    return _Entry(*stamp, judge, image.height, image.width, problem)


def _dali_decodes(content: bytes) -> bool:
    # imported late: it loads slowly, and is not needed if all files are known
    from isofast.data.dali import SingleDecoder

    if not hasattr(_of_thread, "decoder"):
        _of_thread.decoder = SingleDecoder()
    decoder: SingleDecoder = _of_thread.decoder
    return decoder.decodes(content)


@functools.cache
def _pixel() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue()


def _bad_files(dataset: ImageFolder, bad: Mapping[str, str], root: Path | str | None = None) -> str:
    root = dataset.root if root is None else root
    shown = "; ".join(f"{os.path.join(root, path)} ({bad[path]})" for path in sorted(bad)[:_SHOWN])
    more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    total = len(dataset) + len(dataset.skipped)
    return f"{len(bad)} of {total} {dataset.split} images cannot be read: {shown}{more}"


def _read_memory(dataset: ImageFolder) -> _Memory:
    # a missing or damaged file only costs checking everything again
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        content = json.loads(_memory_path(dataset).read_text())
        if content["format"] == _FORMAT:
            return {path: _Entry(*entry) for path, entry in content["files"].items()}
    return {}


def _write_memory(dataset: ImageFolder, memory: _Memory) -> None:
    content = json.dumps({"format": _FORMAT, "fields": _Entry._fields, "files": memory})
    # a read-only or full data root only costs the check at the next start
    with contextlib.suppress(OSError):
        write_atomically(_memory_path(dataset), lambda part: part.write_text(content))


def _memory_path(dataset: ImageFolder) -> Path:
    return dataset.root / f".isofast-checked-{dataset.split}.json"
