"""Atomic writes: files are complete or absent, even after a crash."""

import errno
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from isofast.errors import UserError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file next to ``path``, sync it to disk, then rename it.

    The temporary file keeps the suffix of ``path``, from which libraries infer the format.

    Raises:
        OSError: the disk is full or not writable; ``path`` is unchanged.
    """
    # file systems allow 255 bytes, and a character has up to 4
    part = path.with_name(f".{path.stem[:50]}.{threading.get_native_id()}.part{path.suffix}")
    try:
        write(part)
        sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` atomically, as JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty if the file is missing, unreadable or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_output(path: Path, option: str = "--output") -> None:
    """Refuse an output file that cannot be written, before any work is done.

    Raises:
        UserError: its folder is missing or not writable, or it is a folder itself.
    """
    folder = path.parent
    if not os.path.isdir(folder):
        raise UserError(f"{option} {path}: there is no folder {folder}; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: the folder {folder} is not writable")
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; give a file, or a new folder")


def sync(path: Path) -> None:
    """Sync a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # some file systems cannot sync, least of all folders
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)
