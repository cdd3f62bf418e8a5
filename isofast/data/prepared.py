"""What `isofast prepare` has made: counts and checksums, kept beside the images."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from isofast.data.datasets import ImageFolder, OnBad, left_out_note, verify_images
from isofast.data.listing import SPLITS, UNLABELED, open_dataset, overlooked_note
from isofast.errors import UserError
from isofast.files import write_atomically
from isofast.probe import UNLABELLED

MANIFEST = ".isofast-prepared.json"
_SHOWN = 5


@dataclass(frozen=True)
class PreparedCounts:
    """What a data root holds, and whether it was there before.

    Attributes:
        name: of the data set. root: where it is.
        classes: number of classes. train: training images, with and without a label.
        val: validation images. unlabeled: how many training images have no label.
        left_out: a line for each split that has unreadable files, and one for each that has files
            which look like pictures and are not taken for images; neither are counted.
    """

    name: str
    root: Path
    classes: int
    train: int
    val: int
    already_there: bool
    unlabeled: int = 0
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it in one line, and one for the files of each split that are left out."""
        state = "was already there, checked" if self.already_there else "ready"
        aside = f" ({self.unlabeled:,} without a label)" if self.unlabeled else ""
        lines = [
            f"{self.name} {state}: {self.classes} classes, {self.train:,} train{aside} and "
            f"{self.val:,} val images in {self.root}",
            *self.left_out,
        ]
        if not self.val:
            lines.append("without val images nothing can be evaluated: evaluation.every_epochs=0")
        return "\n".join(lines)


def count_images(
    name: str, root: Path, on_bad: OnBad, *, already_there: bool = False
) -> PreparedCounts:
    """Decode every image of a data root that was not decoded before, and count them.

    A root of pictures without classes needs no validation images; any other one does.

    Raises:
        UserError: what is wrong with the root, by name; unreadable images, unless they are to be
            skipped.
    """
    train = verify_images(open_dataset(root, "train"), on_bad=on_bad, unpacked=not already_there)
    val: ImageFolder | None = None
    if train.classes or (root / "val").exists():
        val = verify_images(open_dataset(root, "val"), on_bad=on_bad, unpacked=not already_there)
    notes = (
        note(split)
        for note in (left_out_note, overlooked_note)
        for split in (train, val)
        if split is not None
    )
    return PreparedCounts(
        name,
        root,
        len(train.classes),
        len(train),
        0 if val is None else len(val),
        already_there,
        int((train.labels == UNLABELLED).sum()),
        tuple(note for note in notes if note),
    )


def write_manifest(name: str, folder: Path, on_bad: OnBad) -> None:
    """Count and check what was built in ``folder``, and write that down in it.

    Raises:
        UserError: as `count_images`.
        OSError: the disk is full.
    """
    counts = count_images(name, folder, on_bad)
    content = {
        "name": name,
        "classes": counts.classes,
        "train": counts.train,
        "val": counts.val,
        "unlabeled": counts.unlabeled,
        "left_out": counts.left_out,
        "sha256_by_class": _class_digests(folder),
    }
    text = json.dumps(content, indent=1)
    write_atomically(folder / MANIFEST, lambda part: part.write_text(text))


def prepared_name(root: Path) -> str | None:
    """Name the data set that `isofast prepare` made in root; None where it did not."""
    try:
        return str(json.loads((root / MANIFEST).read_text())["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_counts(name: str, root: Path, *, already_there: bool) -> PreparedCounts:
    """Give the counts of a root as they were written down."""
    manifest = json.loads((root / MANIFEST).read_text())
    return PreparedCounts(
        name,
        root,
        manifest["classes"],
        manifest["train"],
        manifest["val"],
        already_there,
        manifest.get("unlabeled", 0),
        tuple(manifest.get("left_out", ())),
    )


def check_prepared(name: str, root: Path) -> PreparedCounts:
    """Compare a prepared root with its checksums.

    Raises:
        UserError: it holds another data set, has changed since, or something was put into it.
    """
    remedy = f"Delete {root} and prepare it again"
    try:
        manifest = json.loads((root / MANIFEST).read_text())
        expected = dict(manifest["sha256_by_class"])
        found_name = str(manifest["name"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root / MANIFEST} is damaged. {remedy}") from error
    if found_name != name:
        raise UserError(f"{root} holds {found_name}, not {name}; give another --root")
    try:
        if strays := _strays(root):
            shown = ", ".join(str(path) for path in strays[:_SHOWN])
            more = f" and {len(strays) - _SHOWN:,} more" if len(strays) > _SHOWN else ""
            raise UserError(
                f"{root} holds what `isofast prepare` has not put there: {shown}{more}. Remove "
                f"{'it' if len(strays) == 1 else 'them'}, then give the same command again"
            )
        found = _class_digests(root)
    except OSError as error:
        raise UserError(f"{root} is no longer whole: {error}. {remedy}") from error
    changed = sorted(k for k in expected | found if expected.get(k) != found.get(k))
    if changed:
        raise UserError(
            f"{name} in {root} has changed since it was prepared: {len(changed)} class folder(s), "
            f"{', '.join(changed[:_SHOWN])}. {remedy}"
        )
    return read_counts(name, root, already_there=True)


def _class_folders(root: Path) -> list[Path]:
    """What lies in the splits, and the folder of images without a label."""
    # what file managers put beside the images (.DS_Store) is none of them
    folders = sorted(
        folder
        for split in SPLITS
        for folder in (root / split).iterdir()
        if not folder.name.startswith(".")
    )
    if (root / UNLABELED).is_dir():
        folders.append(root / UNLABELED)
    return folders


def _strays(root: Path) -> list[Path]:
    """Files among the class folders, and what is no file in one."""
    folders = _class_folders(root)
    strays = [folder for folder in folders if not folder.is_dir()]
    for folder in folders:
        if folder.is_dir():
            with os.scandir(folder) as entries:
                strays += [
                    Path(entry)
                    for entry in entries
                    if not entry.name.startswith(".") and not entry.is_file()
                ]
    return sorted(strays)


def _class_digests(root: Path) -> dict[str, str]:
    """sha256 of each folder's names and contents, by "split/class" or "unlabeled"."""
    folders = _class_folders(root)
    digests = {}
    for folder in tqdm(folders, desc="checksums", unit="class", leave=False, disable=None):
        digest = hashlib.sha256()
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            digest.update(os.fsencode(path.name))
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        digests[str(folder.relative_to(root))] = digest.hexdigest()
    return digests
