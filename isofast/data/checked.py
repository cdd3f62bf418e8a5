"""The check results of a data root's images, cached next to them."""

import contextlib
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from isofast.data.files import write_text
from isofast.data.folder import ImageFolder
from isofast.errors import RunError

_FORMAT = 7


class Entry(NamedTuple):
    """The result for one file: no ``problem`` if it is good, no ``judge`` if not to be cached."""

    bytes: int
    mtime_ns: int
    judge: str
    height: int = 0
    width: int = 0
    problem: str = ""


def read_known(dataset: ImageFolder) -> dict[str, Entry]:
    """Return the results for a split's files, by path; empty if missing or damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        content = json.loads(_path(dataset).read_text())
        if content["format"] == _FORMAT:
            columns = (content[name] for name in Entry._fields)
            # skips the checks of _make(), which take seconds for a million files
            entries = map(functools.partial(tuple.__new__, Entry), zip(*columns, strict=True))
            return dict(zip(content["files"], entries, strict=True))
    return {}


def write_known(dataset: ImageFolder, known: dict[str, Entry]) -> None:
    """Store the results; if that fails, the next start checks again."""
    # in columns, which load four times as fast as rows
    columns = dict(zip(Entry._fields, zip(*known.values(), strict=True), strict=False))
    content = json.dumps({"format": _FORMAT, "files": list(known), **columns})
    with contextlib.suppress(OSError):
        write_text(_path(dataset), content)


def undecodable(dataset: ImageFolder, indices: Sequence[int], message: str) -> RunError:
    """Record images that passed the check as bad, which "skip" then drops; return the error."""
    known = read_known(dataset)
    for path in (dataset.paths[index] for index in indices):
        if path in known:
            known[path] = known[path]._replace(problem="it could not be decoded in training")
    write_known(dataset, known)
    # only checked images are recorded
    way_out = "data.on_bad_image=skip" if dataset.sizes is not None else "data.check=full"
    aside = ", or train without them: evaluation.every_epochs=0" * (dataset.split == "val")
    return RunError(
        f"{message}. Without a checkpoint, replace or delete these files, or start with {way_out} "
        "(with --fresh, in the same folder). A run with a checkpoint continues only on the same "
        f"images: restore intact copies{aside}, or start over with --fresh"
    )


def _path(dataset: ImageFolder) -> Path:
    return dataset.root / f".isofast-checked-{dataset.split}.json"
