"""Write files that are whole or absent, whenever the machine stops."""

import os
import threading
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, sync it to disk, then rename it.

    That file has the suffix of ``path``, by which libraries choose a format.

    Raises:
        OSError: the disk is full or not writable; ``path`` is as it was.
    """
    part = path.with_name(f".{path.name}.{threading.get_native_id()}.part{path.suffix}")
    try:
        write(part)
        sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Sync a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
