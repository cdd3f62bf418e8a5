"""Images in tar files (WebDataset layout), read by random access.

A folder of *.tar files is treated as if they had been unpacked there. The offset of each member is
read once from the headers, and cached in the folder.
"""

import contextlib
import functools
import io
import os
import posixpath
import resource
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from isofast.data.bar import Bar
from isofast.data.files import write_atomically
from isofast.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
PICTURES = (*EXTENSIONS, ".gif", ".jfif", ".jp2", ".heic", ".avif")
_INDEX = ".isofast-index.npz"
_FORMAT = 1
# further tars are opened for each image
_KEPT_OPEN = min(512, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


class Tar(NamedTuple):
    """A tar file: its path, size in bytes, and modification time in ns."""

    path: str
    size: int
    mtime_ns: int


class Index(NamedTuple):
    """The images in a folder's tars.

    names: those of N images, relative to the folder. places_N3: int64, index of the tar, offset and
    size in bytes of each.
    """

    tars: tuple[Tar, ...]
    names: list[str]
    places_N3: npt.NDArray[np.int64]


def read_index(folder: Path | str) -> Index | None:
    """Return the index of a folder's tars; None if it is missing or has folders, images or no tar.

    The headers are read if a tar is new or has a new size or time.

    Raises:
        UserError: a tar is damaged, compressed or contains a link, or two images share a name.
        OSError: the folder or a tar cannot be read.
    """
    tars = _tars_in(folder)
    if not tars:
        return None
    path = Path(folder, _INDEX)
    of: dict[str, Any] = {
        "format": _FORMAT,
        "tars": _packed(os.path.basename(tar.path) for tar in tars),
        "stamps": np.array([tar[1:] for tar in tars]),
    }
    # a missing or damaged index only costs reading the headers again
    with (
        contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile),
        np.load(path) as kept,
    ):
        if all(np.array_equal(kept[key], value) for key, value in of.items()):
            return Index(tars, _unpacked(kept["names"]), kept["places"])
    found = _read_headers(tars)
    of |= {"names": _packed(found.names), "places": found.places_N3}
    # if it cannot be stored, it is rebuilt at every start
    with contextlib.suppress(OSError):
        write_atomically(path, lambda part: np.savez(part, **of))
    return found


def open_member(tar: Tar, offset: int, size: int) -> BinaryIO:
    """Open a tar member as a file.

    Raises:
        OSError: the tar is missing, or has changed since it was indexed.
    """
    file = _opened(tar)
    status = os.fstat(file.fileno())
    if (status.st_size, status.st_mtime_ns) != tar[1:]:
        raise OSError("the tar has changed")
    return io.BufferedReader(_Member(file, offset, size))


@functools.lru_cache(_KEPT_OPEN)
def _opened(tar: Tar) -> io.FileIO:
    return io.FileIO(tar.path)


class _Member(io.RawIOBase):
    """Reads at its own offset, so that threads can share the file."""

    def __init__(self, file: io.FileIO, begin: int, size: int) -> None:
        self._file, self._begin, self._size, self._at = file, begin, size, 0

    def fileno(self) -> int:
        return self._file.fileno()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        rest = max(0, self._size - self._at)
        count = os.preadv(self.fileno(), [memoryview(buffer)[:rest]], self._begin + self._at)
        self._at += count
        return count

    def readall(self) -> bytes:
        # in one read, not in io's own small chunks
        return self.read(self._size) or b""


def _tars_in(folder: Path | str) -> tuple[Tar, ...]:
    if not os.path.isdir(folder):
        return ()
    tars: list[Tar] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.endswith(".tar"):
                status = entry.stat()
                tars.append(Tar(entry.path, status.st_size, status.st_mtime_ns))
            elif entry.is_dir() or entry.name.lower().endswith(PICTURES):
                return ()
    return tuple(sorted(tars))


def _read_headers(tars: tuple[Tar, ...]) -> Index:
    places: dict[str, tuple[int, int, int]] = {}
    for number, tar in enumerate(Bar(tars, "reading tar headers", unit="tar")):
        for name, offset, size in _members(tar.path):
            if name in places:
                raise UserError(
                    f"{tars[places[name][0]].path} and {tar.path} both contain {name}; give "
                    "images unique names, or remove one of the tars"
                )
            places[name] = (number, offset, size)
    return Index(tars, [*places], np.array([*places.values()], np.int64).reshape(-1, 3))


def _members(path: str) -> list[tuple[str, int, int]]:
    """Return the name, offset and size of each image in a tar."""
    found: list[tuple[str, int, int]] = []
    classes: dict[str, str] = {}
    try:
        # "r:" refuses compressed tars, which have no random access
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = posixpath.normpath(member.name).lstrip("/")
                # also ..
                if name.startswith(".") or "/." in name:
                    continue
                if name.lower().endswith(PICTURES):
                    if not member.isreg() or member.issparse():
                        raise UserError(
                            f"{path}: {name} is a link, a sparse file or a folder; pack files as "
                            "they are (GNU tar: --dereference --hard-dereference)"
                        )
                    found.append((name, member.offset_data, member.size))
                elif name.endswith(".cls") and (content := tar.extractfile(member)):
                    classes[_key(name)] = content.read().decode("utf-8", "replace").strip()
            # tarfile mistakes a damaged header, or a file cut between members, for the end
            file.seek(tar.offset)
            # two blocks and padding of the last record; more is a hole in the file or another tar
            most = tarfile.BLOCKSIZE + tarfile.RECORDSIZE
            rest = file.read(most + 1)
            if not tarfile.BLOCKSIZE <= len(rest) <= most or any(rest):
                raise tarfile.ReadError(f"no header and no end at byte {tar.offset:,}")
    except tarfile.TarError as error:
        raise UserError(
            f"{path} is not a complete, uncompressed tar file: {error}. Create or copy it again "
            "(with GNU tar, without -b)"
        ) from error
    if not classes or os.path.basename(os.path.dirname(path)) == "unlabeled":
        return found
    for k, (name, offset, size) in enumerate(found):
        if (label := classes.get(_key(name))) is not None:
            if not label or label.startswith(".") or "/" in label or "\0" in label:
                raise UserError(f"{path}: the class of {name} is {label!r}, not a valid name")
            found[k] = (f"{label}/{name.replace('/', '_')}", offset, size)
    return found


def _key(name: str) -> str:
    """Return WebDataset's sample key: the path up to the first dot of its last part."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"


def _packed(names: Iterable[str]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(os.fsencode("\0".join(names)), np.uint8)


def _unpacked(text: npt.NDArray[np.uint8]) -> list[str]:
    return os.fsdecode(text.tobytes()).split("\0") if text.size else []
