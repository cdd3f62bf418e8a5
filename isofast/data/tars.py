"""Reading files out of tar archives of any compression; nothing is unpacked to the disk."""

import bz2
import contextlib
import gzip
import hashlib
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

from isofast.data.archives import reading
from isofast.errors import UserError

# some times what STL-10, the largest, holds (3.1 GB in 9 files)
_MAX_TOTAL_BYTES = 8 << 30
_MAX_MEMBERS = 1000
# a header says how much of the archive is its own, so that one of a few bytes could fill the memory
_MAX_READ_BYTES = 64 << 20

_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}


class TarMember:
    """A file in an archive, to be read once, from its beginning to its end.

    Attributes:
        name: without its folder.
        size: in bytes.
    """

    def __init__(self, archive: Path, name: str, size: int, file: IO[bytes], md5: str) -> None:
        """Take an open file, and the md5 that it must have; "" where none is published."""
        self.name, self.size = name, size
        self._archive, self._file, self._md5 = archive, file, md5

    def chunks(self, size: int) -> Iterator[bytes]:
        """Give pieces of ``size`` bytes, the last one what is left.

        Raises:
            UserError: after the last piece, that the content is not the official one; at any
                time, that the archive is cut short or damaged.
        """
        digest = hashlib.md5(usedforsecurity=False)
        left = self.size
        while left:
            with _damage_named(self._archive):
                chunk = self._file.read(min(size, left))
                if len(chunk) < min(size, left):
                    raise EOFError(f"{self.name} ends early")
            digest.update(chunk)
            left -= len(chunk)
            yield chunk
        if self._md5 and digest.hexdigest() != self._md5:
            raise UserError(
                f"{self._archive}: {self.name} is not the official file: its md5 is "
                f"{digest.hexdigest()}, and {self._md5} is expected. Download the archive again"
            )

    def content(self, limit: int) -> bytes:
        """Give all of it, verified.

        Raises:
            UserError: as `chunks`; or it has more than ``limit`` bytes.
        """
        if self.size > limit:
            raise UserError(
                f"{self._archive} is unsafe: {self.name} unpacks to {self.size:,} bytes, and at "
                f"most {limit:,} are expected"
            )
        return b"".join(self.chunks(1 << 20))


def tar_members(archive: Path, folder: str, wanted: Mapping[str, str]) -> Iterator[TarMember]:
    """Give the wanted files of an archive, in its order; each is read before the next is asked for.

    Args:
        archive: a tar, plain or compressed by gzip, bzip2 or xz.
        folder: the folder in the archive that the files are in.
        wanted: their names in the folder, with the md5 of each, "" where none is published.

    Raises:
        UserError: no archive, a damaged or unsafe one, or one that lacks a wanted file.
    """
    with reading(archive):
        if not archive.is_file():
            raise UserError(f"there is no archive {archive}; give its path as --archive FILE")
    missing = dict(wanted)
    with contextlib.ExitStack() as stack:
        with _damage_named(archive):
            raw = stack.enter_context(_opener(archive)(archive))
            opened = stack.enter_context(tarfile.TarFile(fileobj=_Sparing(raw)))  # type: ignore[arg-type]
        for info in _safe_members(opened, archive):
            path = PurePosixPath(info.name)
            if str(path.parent) != folder or path.name not in missing:
                continue
            md5 = missing.pop(path.name)
            file = opened.extractfile(info)
            # only of links and folders there is none, and links are refused
            if file is None:
                raise UserError(f"{archive} is unsafe: {info.name!r} is a folder, not a file")
            yield TarMember(archive, path.name, info.size, file, md5)
    if missing:
        raise UserError(
            f"{archive} lacks {', '.join(f'{folder}/{name}' for name in missing)}: it is another "
            "archive, or was cut short. Download it again"
        )


class _Sparing:
    """A file of which no one call may read much."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell = file.seek, file.tell
        self._file = file

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_READ_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


def _opener(archive: Path) -> Callable[[Path], Any]:
    with archive.open("rb") as file:
        start = file.read(6)
    for magic, opener in _OPENERS.items():
        if start.startswith(magic):
            return opener
    return lambda path: path.open("rb")


def _safe_members(opened: tarfile.TarFile, archive: Path) -> Iterator[tarfile.TarInfo]:
    count, total = 0, 0
    while True:
        with _damage_named(archive):
            info = opened.next()
        if info is None:
            return
        path = PurePosixPath(info.name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{archive} is unsafe: {info.name!r} points outside of it")
        if not (info.isfile() or info.isdir()):
            raise UserError(f"{archive} is unsafe: {info.name!r} is a link or a device, not a file")
        count, total = count + 1, total + info.size
        if count > _MAX_MEMBERS or total > _MAX_TOTAL_BYTES:
            raise UserError(
                f"{archive} is unsafe: it unpacks to more than {_MAX_MEMBERS:,} files or "
                f"{_MAX_TOTAL_BYTES:,} bytes"
            )
        yield info


@contextlib.contextmanager
def _damage_named(archive: Path) -> Iterator[None]:
    try:
        # the disk's fault is not the archive's
        with reading(archive):
            yield
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise UserError(
            f"{archive} is not a whole tar file ({error}); it was cut short or damaged. "
            "Download it again"
        ) from error
