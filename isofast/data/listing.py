"""Listing a data root: root/train/CLASS/, root/val/CLASS/ and pictures without labels.

Images are *.png, *.jpg and *.jpeg, the direct children of their folder. Those in root/unlabeled/
are trained on as well, with the label -1; a root may hold nothing else.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from isofast.data.datasets import ImageFolder, fingerprint_of
from isofast.errors import UserError
from isofast.probe import UNLABELLED

SPLITS = ("train", "val")
UNLABELED = "unlabeled"
EXTENSIONS = (".png", ".jpg", ".jpeg")
_SHOWN = 5


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
            f"`isofast prepare NAME --root {root}` (NAME: digits, cifar10, cifar100, stl10, "
            "tinyimagenet) or point data.root at a folder with train/CLASS and val/CLASS"
        )
    unlabeled = split == "train" and (root / UNLABELED).is_dir()
    # pictures without labels need no classes beside them
    classes = () if unlabeled and not (root / split).exists() else _class_names(root, split)
    if split == "val" and any((root / name).is_dir() for name in ("train", UNLABELED)):
        _same_classes(root, classes)
    folders = [(f"{split}/{name}", label) for label, name in enumerate(classes)]
    if unlabeled:
        folders.append((UNLABELED, UNLABELLED))
    paths: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    for folder, label in folders:
        found = sorted(_images_in(root / folder))
        if not found:
            raise UserError(
                f"the {'class ' if label >= 0 else ''}folder {root / folder} has no image; images "
                f"are its direct children named *{', *'.join(EXTENSIONS)}. Add images or remove "
                "the folder"
            )
        paths += [f"{folder}/{filename}" for filename, _ in found]
        labels += [label] * len(found)
        sizes += [size for _, size in found]
    return ImageFolder(
        root,
        split,
        classes,
        tuple(paths),
        np.array(labels, np.int64),
        fingerprint_of(paths, labels, sizes),
    )


def _class_names(root: Path, split: str) -> tuple[str, ...]:
    folder = root / split
    if not folder.is_dir():
        raise UserError(
            f"{root} has no folder {split!r}; a data root has train/CLASS/ and val/CLASS/ with "
            "the images of each class. Move the images there, or give another data.root"
            + (
                "; without validation images, train with --set evaluation.every_epochs=0"
                if split == "val"
                else f"; pictures without classes go into {root / UNLABELED}"
            )
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
