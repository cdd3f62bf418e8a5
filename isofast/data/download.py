"""Fetching an official archive: verified as a whole, and gone on with where it was cut."""

import contextlib
import sys
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import cast
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from torchvision.datasets.utils import calculate_md5, check_integrity
from tqdm import tqdm

from isofast.data.sources import Source
from isofast.errors import UserError

_SILENCE_S = 60.0
_CHUNK = 1 << 18
_RANGE_NOT_SATISFIABLE = 416


class _NetworkError(Exception):
    """The connection failed, or ended before the file did."""


def fetch(source: Source, folder: Path) -> Path:
    """Give the verified archive, downloaded where it is not in ``folder``, nor beside it.

    What has come of a download that is cut stays in ``folder`` as a file that ends in .part, and
    the next call asks for the rest. A whole archive is kept until the data set is in place.

    Args:
        source: address, file name and md5.
        folder: where the archive goes; made where it is missing, and removed again where nothing
            came.

    Raises:
        UserError: the host cannot be reached, or what came is not the official archive.
        OSError: the disk is full; nothing of the download stays.
    """
    archive = folder / source.filename
    for place in (archive, folder.parent / source.filename):
        if check_integrity(place, source.md5):
            return place
    archive.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(archive.name + ".part")
    remedy = (
        f"or get {source.filename} in another way (a browser, another machine) and give it as "
        "--archive FILE"
    )
    try:
        _transfer(source, part)
    except (_NetworkError, HTTPError) as error:
        kept = _size(part)
        state = f"{kept:,} bytes are kept in {part}, and the same command goes on from there"
        raise UserError(
            f"cannot download {source.url}: {error}. "
            f"{state if kept else 'Nothing came; try again later'}, {remedy}"
        ) from error
    except OSError:
        # of the disk, which may be full
        part.unlink(missing_ok=True)
        raise
    finally:
        _leave_nothing_empty(part)
    if (md5 := calculate_md5(part)) != source.md5:
        size = _size(part)
        part.unlink()
        _leave_nothing_empty(part)
        raise UserError(
            f"what came from {source.url} is not {source.title}'s official archive: {size:,} bytes "
            f"with the md5 {md5}, and {source.md5} is expected. It was deleted; try again later, "
            f"{remedy}"
        )
    return part.rename(archive)


def _transfer(source: Source, part: Path) -> None:
    """Append what is missing of the file; write it anew where the server knows no ranges."""
    have = _size(part)
    where = f", from byte {have:,} on" if have else ""
    tqdm.write(f"downloading {source.url}{where}", file=sys.stderr)
    headers = {"User-Agent": "isofast"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with _network():
            response = cast(
                HTTPResponse, urlopen(Request(source.url, headers=headers), timeout=_SILENCE_S)
            )
    except HTTPError as error:
        if error.code != _RANGE_NOT_SATISFIABLE or not have:
            raise
        # there is no more of it: all came before, or it is of another file
        if not check_integrity(part, source.md5):
            part.unlink()
            _transfer(source, part)
        return
    with response:
        goes_on = (response.getheader("Content-Range") or "").startswith(f"bytes {have}-")
        begun = have if response.status == 206 and goes_on else 0
        length = response.getheader("Content-Length")
        whole = None if length is None else begun + int(length)
        name = source.filename
        # disable=None: only on terminals
        bar = tqdm(desc=name, total=whole, initial=begun, unit="B", unit_scale=True, disable=None)
        with bar, part.open("ab" if begun else "wb") as file:
            while chunk := _read(response):
                file.write(chunk)
                bar.update(len(chunk))
    if (size := _size(part)) < (whole or 1):
        raise _NetworkError(f"the connection was cut after {size:,} of {whole or 1:,} bytes")


def _read(response: HTTPResponse) -> bytes:
    with _network():
        return response.read(_CHUNK)


@contextlib.contextmanager
def _network() -> Iterator[None]:
    """Let errors of the network, many of which are plain OSErrors, be told from the disk's."""
    try:
        yield
    except HTTPError:
        raise
    except (OSError, HTTPException) as error:
        raise _NetworkError(str(error) or type(error).__name__) from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _leave_nothing_empty(part: Path) -> None:
    if _size(part) == 0:
        part.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        # only succeeds where nothing is in it
        part.parent.rmdir()
