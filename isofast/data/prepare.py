"""`isofast prepare`: write a data set to root/train/CLASS/ and root/val/CLASS/, all or nothing.

Everything is built and checked in root/.partial and moved into place at the end. When repeated, an
interrupted command starts over, or finishes the move.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from isofast.data.bar import Bar
from isofast.data.check import OnBad, check_folder, note_on_size, notes_on
from isofast.data.files import read_json, write_text
from isofast.data.folder import SPLITS, UNLABELED, UNLABELLED, ImageFolder, open_dataset, some_of
from isofast.data.recipe import recipe_for
from isofast.errors import UserError, tell

NAMES = ("digits", "cifar10", "cifar100", "stl10", "tinyimagenet", "imagefolder")
MANIFEST = ".isofast-prepared.json"
_PARTIAL = ".partial"
_DOWNLOAD = ".download"


@dataclass(frozen=True)
class PreparedCounts:
    """The contents of a data root, and whether an earlier command had prepared it.

    train: images with and without a label; unlabeled: those without. notes: one line per split with
    unreadable files, and per split with ignored ones, neither of which are counted, and one if the
    default crop is far larger than the images.
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
        """One line, followed by the notes."""
        state = "was already there, checked" if self.already_there else "ready"
        aside = f" ({self.unlabeled:,} without a label)" if self.unlabeled else ""
        lines = [
            f"{self.name} {state}: {self.classes} classes, {self.train:,} train{aside} and "
            f"{self.val:,} val images in {self.root}",
            *self.notes,
        ]
        if not self.val:
            lines.append("no val images, so nothing to evaluate: set evaluation.every_epochs=0")
        return "\n".join(lines)


def prepare(
    name: str, root: Path | str, archive: Path | str | None = None, *, on_bad: OnBad = "stop"
) -> PreparedCounts:
    """Prepare a data set under root; a second call only checks what is there.

    Args:
        name: one of `NAMES`.
        root: the data root, created if missing.
        archive: the official archive, or the folder that it unpacks to; downloaded if not given.
        on_bad: "stop" refuses unreadable images, "skip" does not count them.

    Raises:
        UserError: unknown name, an archive that is missing, damaged, not the official one or not
            needed, a failed download, or a root that holds something else or has changed since.
    """
    root = Path(root)
    if name not in NAMES:
        raise UserError(f"unknown data set {name!r}; allowed are {', '.join(NAMES)}")
    if archive is not None and name in ("digits", "imagefolder"):
        raise UserError(f"{name} needs no archive; leave out --archive {archive}")
    if name == "imagefolder":
        return _count(name, root, on_bad, already_there=False)

    def build(partial: Path) -> None:
        if name == "digits":
            _write_digits(partial)
        else:
            # torchvision loads slowly
            from isofast.data.official import fetch, write_official

            given = fetch(name, root / _DOWNLOAD) if archive is None else Path(archive)
            write_official(name, given, partial)

    return make_root(name, root, {"name": name}, build, on_bad)


def make_root(
    command: str,
    root: Path,
    content: Mapping[str, Any],
    build: Callable[[Path], None],
    on_bad: OnBad,
    option: str = "--root",
) -> PreparedCounts:
    """Create a data root, all or nothing; only check one that is already there.

    Args:
        command: `isofast prepare COMMAND`, for messages.
        root: the data root, created if missing.
        content: what it holds: the data set's "name", and whatever else distinguishes it.
        build: fills an empty folder.
        on_bad: as for `prepare`.
        option: the command's option for ``root``.

    Raises:
        UserError: it cannot be written, holds something else or has changed since.
    """
    partial = root / _PARTIAL
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root):
            already_there = (root / MANIFEST).exists()
            if already_there:
                _verify_prepared(command, root, content, option)
            else:
                # a finished build has its manifest: only the move was interrupted
                if not content.items() <= read_json(partial / MANIFEST).items():
                    _refuse_other_images(command, root, option)
                    _build(partial, content, build, on_bad)
                for entry in sorted(partial.iterdir(), key=lambda path: path.name == MANIFEST):
                    entry.rename(root / entry.name)
            # also those of a command interrupted after its last move
            for leftover in (partial, root / _DOWNLOAD):
                shutil.rmtree(leftover, ignore_errors=True)
            return _count(content["name"], root, on_bad, already_there=already_there)
    except OSError as error:
        raise UserError(
            f"cannot prepare {command} in {root}: {error}. Fix that or give another {option}, "
            "then repeat the command"
        ) from error


def prepared_name(root: Path) -> str | None:
    """Return the name of the data set that `isofast prepare` made in root, if any."""
    return read_json(root / MANIFEST).get("name")


def _refuse_other_images(command: str, root: Path, option: str) -> None:
    present = [split for split in (*SPLITS, UNLABELED) if (root / split).exists()]
    if present:
        raise UserError(
            f"{root} already holds {' and '.join(present)}, not made by `isofast prepare "
            f"{command}`. Give another {option}, or check your own folder with "
            f"`isofast prepare imagefolder --root {root}`"
        )


def _build(
    partial: Path, content: Mapping[str, Any], build: Callable[[Path], None], on_bad: OnBad
) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        build(partial)
        # before the manifest, because unreadable images stop the build
        checked_splits(partial, on_bad)
        text = json.dumps({**content, "sha256_by_class": _class_digests(partial)}, indent=1)
        write_text(partial / MANIFEST, text)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Let one process at a time prepare a root; others wait, then find it done."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        # without locks, as on some network file systems, nobody waits
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell(f"another isofast prepare is using {root}; waiting for it to end\n")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def checked_splits(root: Path, on_bad: OnBad) -> list[ImageFolder]:
    """Check all images of a data root not checked before, of train, and of val if there is one.

    Raises:
        UserError: as for `open_dataset` and `check_folder`.
    """
    splits = [open_dataset(root, "train")]
    if os.path.lexists(root / "val"):
        splits.append(open_dataset(root, "val"))
    return [check_folder(split, on_bad=on_bad) for split in splits]


def _count(name: str, root: Path, on_bad: OnBad, *, already_there: bool) -> PreparedCounts:
    splits = checked_splits(root, on_bad)
    train = splits[0]
    return PreparedCounts(
        name,
        root,
        len(train.classes),
        len(train),
        sum(map(len, splits[1:])),
        already_there,
        int((train.labels == UNLABELLED).sum()),
        (*notes_on(splits), *note_on_size(train, recipe_for(name))),
    )


def _verify_prepared(command: str, root: Path, content: Mapping[str, Any], option: str) -> None:
    found = read_json(root / MANIFEST)
    if found and not content.items() <= found.items():
        held, wanted = found.get("name"), command
        if "shards" in content:
            held = "shards of other images or another --shard-mib" if "shards" in found else held
            wanted = "these images as shards"
        raise UserError(f"{root} holds {held}, not {wanted}; give another {option}")
    expected, present = found.get("sha256_by_class", {}), _class_digests(root)
    changed = sorted(k for k in expected | present if expected.get(k) != present.get(k))
    if changed:
        raise UserError(
            f"{content['name']} in {root} has changed since it was prepared: {len(changed)} "
            f"place(s), {some_of(changed)}. Undo this, or delete {root} and prepare it again"
        )


def _class_digests(root: Path) -> dict[str, str]:
    """Return sha256 of each class's names and contents, by "split/class" or "unlabeled"."""
    # file managers put hidden files next to the images (.DS_Store)
    folders = sorted(p for s in SPLITS for p in (root / s).glob("*") if p.name[0] != ".")
    folders += [folder for folder in [root / UNLABELED] if folder.is_dir()]
    digests = {}
    for folder in Bar(folders, desc="checksums", unit="class", leave=False):
        digest = hashlib.sha256()
        # a file among the class folders counts as a class
        for path in sorted(folder.iterdir()) if folder.is_dir() else [folder]:
            if not path.name.startswith("."):
                digest.update(os.fsencode(path.name))
                # a tar may not fit in memory
                with path.open("rb") if path.is_file() else io.BytesIO() as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        digests[str(folder.relative_to(root))] = digest.hexdigest()
    return digests


def _write_digits(folder: Path) -> None:
    """Write scikit-learn's 1,797 8x8 gray digits as PNG; every fifth of a class goes to val."""
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
