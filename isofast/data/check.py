"""Check a folder's images before the first step, and cache the results in the data root.

Files are checked by the decoder that reads them in training: DALI, or Pillow for resident images.
"""

import functools
import importlib.util
import io
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from isofast.data.bar import Bar
from isofast.data.checked import Entry, read_known, write_known
from isofast.data.folder import NAMED, ImageFolder, fingerprint_of, printable, some_of
from isofast.data.parallel import in_processes, in_threads
from isofast.data.recipe import Recipe
from isofast.data.resident import rgb
from isofast.distributed import usable_cores
from isofast.errors import UserError

Check = Literal["full", "headers", "off"]
OnBad = Literal["stop", "skip"]
Decoder = Literal["dali", "pillow"]

# MPO is a JPEG followed by more images, as written by many cameras
_DALI_FORMATS = ("PNG", "JPEG", "MPO")
_FORMATS = (*_DALI_FORMATS, "WEBP", "BMP", "TIFF")
_REMEDY = (
    "Replace or delete these files (download a damaged archive again), or skip them with "
    "data.on_bad_image=skip (`isofast prepare`: --on-bad-image skip), then start again"
)
_of_thread = threading.local()


def check_folder(
    dataset: ImageFolder,
    *,
    check: Check = "full",
    decoder: Decoder | None = None,
    on_bad: OnBad = "stop",
) -> ImageFolder:
    """Check every image; return the data set with ``sizes`` and ``stamps`` filled in.

    Results are cached in the data root (`.isofast-checked-SPLIT.json`) by path, file size and
    modification time, so later checks read only new or changed files. A read-only root is checked
    every time. JPEG has no checksums: no decoder notices damage in the middle of a file.

    Args:
        check: "full" decodes every file, "headers" reads formats and sizes, "off" returns the data
            set unchecked. With the last two, a damaged file ends the run once reached, and may
            crash DALI.
        decoder: "dali" or "pillow"; DALI by default if it is installed.
        on_bad: "stop" refuses unreadable files; "skip" drops them, listed in ``skipped``.

    Raises:
        UserError: there are unreadable files; with "skip", only if a class, or the whole set, has
            no image left.
        RunError: a decoding process was killed.
    """
    if check == "off":
        return dataset
    judge = "headers" if check == "headers" else decoder or default_decoder()
    known = read_known(dataset)
    stamps = zip(*dataset.stamps.T.tolist(), strict=True)
    entries = [
        _remembered(known.get(path), stamp, judge, on_bad)
        for path, stamp in zip(dataset.paths, stamps, strict=True)
    ]
    pending = [k for k, entry in enumerate(entries) if entry is None]
    # a forked process cannot use DALI
    spread = in_threads if judge == "dali" else in_processes
    cores = min(16, usable_cores())
    with closing(spread(lambda k: _judge(dataset, k, judge), pending, cores)) as judged:
        bar = Bar(
            judged,
            desc=f"checking {dataset.split} images",
            total=len(pending),
            unit="image",
            disable=not pending,
        )
        for k, entry in zip(pending, bar, strict=True):
            entries[k] = entry
    found = [entry for entry in entries if entry is not None]
    lasting = {path: e for path, e in zip(dataset.paths, found, strict=True) if e.judge}
    if lasting != known:
        write_known(dataset, lasting)
    checked = replace(
        dataset,
        sizes=np.array([(entry.height, entry.width) for entry in found], np.int64),
        stamps=np.array([entry[:2] for entry in found], np.int64),
    )
    bad = {k: entry.problem for k, entry in enumerate(found) if entry.problem}
    if not bad:
        return checked
    named = {dataset.where(k): problem for k, problem in bad.items()}
    problems = _bad_files(dataset, named, shown=100)
    if on_bad == "stop":
        raise UserError(f"{problems}. {_REMEDY}")
    kept = checked.subset([k for k in range(len(dataset)) if k not in bad])
    empty = sorted(set(range(len(dataset.classes))) - set(kept.labels.tolist()))
    if empty or not len(kept):
        what = f"the class {dataset.classes[empty[0]]}" if empty else "the data set"
        raise UserError(
            f"{problems}. That leaves no image of {what}: replace these files, or remove the class "
            "folder from train and val"
        )
    return replace(
        kept,
        skipped={dataset.paths[k]: problem for k, problem in bad.items()},
        fingerprint=fingerprint_of(kept.paths, kept.labels, kept.stamps[:, 0]),
    )


def default_decoder() -> Decoder:
    """Return "dali" if it is installed, else "pillow"."""
    return "dali" if has_dali() else "pillow"


@functools.cache
def has_dali() -> bool:
    """Return whether DALI is installed, without importing it."""
    return all(importlib.util.find_spec(name) for name in ("nvidia", "nvidia.dali"))


def notes_on(splits: Sequence[ImageFolder]) -> list[str]:
    """Return a line per split with skipped files, and per split with ignored ones."""
    skipped = [f"{_bad_files(s, s.skipped)}. They are skipped" for s in splits if s.skipped]
    ignored = [
        f"{len(s.ignored):,} {s.split} file(s) look like images but are not used: "
        f"{some_of(s.ignored)}. Used are {NAMED} in a class folder or in unlabeled/"
        for s in splits
        if s.ignored
    ]
    return [printable(note) for note in skipped + ignored]


def note_on_size(train: ImageFolder, recipe: Recipe) -> list[str]:
    """Return a note if the crops of a folder's images have at least twice their side."""
    if recipe.name != "imagefolder" or train.sizes is None:
        return []
    side = max(8, int(np.median(train.sizes.min(axis=1))))
    if recipe.crop < 2 * side:
        return []
    return [
        f"note: half of the images have at most {side} pixels on their shorter side; a data.crop "
        f"of {recipe.crop} costs more time and shows no more of them. Consider data.crop={side}"
    ]


def hand_on(source: ImageFolder, copy: ImageFolder) -> None:
    """Record that a byte-for-byte copy is as good as its checked source."""
    assert source.sizes is not None
    judge = default_decoder()
    rows = zip(copy.paths, copy.stamps.tolist(), source.sizes.tolist(), strict=True)
    memory = {
        path: Entry(size, mtime_ns, judge, height, width)
        for path, (size, mtime_ns), (height, width) in rows
    }
    write_known(copy, memory)


def _remembered(
    entry: Entry | None, stamp: tuple[int, int], judge: str, on_bad: OnBad
) -> Entry | None:
    """Return the cached result for a file with this stamp; None if it must be judged now."""
    # every judge reads the headers
    if entry is None or entry[:2] != stamp or judge not in (entry.judge, "headers"):
        return None
    # a bad file that stopped a run may have been repaired, whatever its stamp
    return None if entry.problem and on_bad == "stop" else entry


def _judge(dataset: ImageFolder, index: int, judge: str) -> Entry:
    """Judge one file; for errors of the disk, permissions or DALI itself, leave ``judge`` empty."""
    try:
        with dataset.open(index) as file:
            # Pillow reads only as much of the file as the header needs
            image = file if judge == "headers" else io.BytesIO(file.read())
            stamp = (image.seek(0, os.SEEK_END), os.fstat(file.fileno()).st_mtime_ns)
            image.seek(0)
            height, width, problem = _decode(image, judge)
            return Entry(*stamp, judge, height, width, problem)
    except OSError as error:
        return Entry(0, 0, "", problem=error.strerror or str(error))


def _decode(file: BinaryIO, judge: str) -> tuple[int, int, str]:
    """Return the height, width and problem of an image."""
    try:
        image = Image.open(file)
        if image.format not in _FORMATS:
            return 0, 0, f"{image.format}, not {', '.join(_FORMATS)}"
        by_dali = judge == "dali" and image.format in _DALI_FORMATS
        if judge != "headers" and not by_dali:
            # verify() tests the checksums; loading the pixels then needs a new open()
            image.verify()
            image = Image.open(file)
            image.load()
            if image.format not in _DALI_FORMATS:
                # refuses pixels without a standard range
                rgb(image)
    except UnidentifiedImageError:
        some = file.seek(0, os.SEEK_END)
        return 0, 0, "cannot identify it as an image" if some else "empty file"
    # Pillow raises nearly anything for damaged files (SyntaxError for PNG, struct.error, ...)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return 0, 0, str(error) or type(error).__name__
    problem = ""
    if by_dali and not _dali_decodes(file):
        problem = "DALI cannot decode it"
        pixel = io.BytesIO()
        Image.new("RGB", (1, 1)).save(pixel, "PNG")
        # running out of memory or threads is not the file's fault
        if not _dali_decodes(pixel):
            raise OSError("DALI currently decodes no image at all")
    return image.height, image.width, problem


def _dali_decodes(file: BinaryIO) -> bool:
    # imported late: it loads slowly, and is not needed if all files are known
    from isofast.data.dali import SingleDecoder

    if not hasattr(_of_thread, "decoder"):
        _of_thread.decoder = SingleDecoder()
    decoder: SingleDecoder = _of_thread.decoder
    file.seek(0)
    return decoder.decodes(file.read())


def _bad_files(dataset: ImageFolder, bad: Mapping[str, str], shown: int = 5) -> str:
    some = some_of([f"{name} ({problem})" for name, problem in bad.items()], "; ", shown)
    total = len(dataset) + len(dataset.skipped)
    return f"{len(bad)} of {total} {dataset.split} images cannot be read: {some}"
