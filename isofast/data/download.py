"""Fetching an official archive: whole and verified, or not at all."""

import contextlib
import io
import socket
import ssl
import sys
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

from torchvision.datasets.utils import calculate_md5, check_integrity, download_url
from tqdm import tqdm

from isofast.data.sources import Source
from isofast.errors import UserError

_SILENCE_S = 60.0


def fetch(source: Source, folder: Path) -> Path:
    """Give the verified archive, downloaded where it is not in ``folder``, nor beside it.

    A download that is cut starts over; one that came whole is kept until the data set is in place.

    Args:
        source: address, file name and md5.
        folder: where the archive goes; made where it is missing, and removed again where nothing
            came.

    Raises:
        UserError: the host cannot be reached, or what came is not the official archive.
        OSError: the disk is full.
    """
    for place in (folder, folder.parent):
        if check_integrity(place / source.filename, source.md5):
            return place / source.filename
    archive = folder / source.filename
    archive.unlink(missing_ok=True)
    remedy = (
        f"Try again later (it starts over), or get {source.filename} in another way "
        "(a browser, another machine) and give it as --archive FILE"
    )
    tqdm.write(f"downloading {source.url}", file=sys.stderr)
    try:
        with _impatient(), _bar_on_terminals_only():
            download_url(source.url, folder, source.filename, source.md5)
    except (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        _discard(archive)
        raise UserError(f"cannot download {source.url}: {error}. {remedy}") from error
    except RuntimeError as error:
        # torchvision's word for a wrong checksum
        got = f"{archive.stat().st_size:,} bytes with the md5 {calculate_md5(archive)}"
        _discard(archive)
        raise UserError(
            f"what came from {source.url} is not {source.title}'s official archive: {got}, and "
            f"{source.md5} is expected. The connection was cut, or the file is another one. "
            f"{remedy}"
        ) from error
    except BaseException:
        _discard(archive)
        raise
    return archive


def _discard(archive: Path) -> None:
    archive.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        # only succeeds where nothing else is in it
        archive.parent.rmdir()


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """Let a host that says nothing for a minute be an error, instead of waiting for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _bar_on_terminals_only() -> Iterator[None]:
    """Keep torchvision's progress bar out of log files."""
    if sys.stderr.isatty():
        yield
    else:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
