"""Looking at one file: whether it is an image that Pillow and DALI both decode."""

import functools
import importlib.util
import io
import threading
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from isofast.data.png import png_problem

# MPO is a JPEG with further pictures behind the first, as many cameras write it
_FORMATS = ("PNG", "JPEG", "MPO")
REFUSED = "DALI cannot decode it"

# a thread's own decoder: one of DALI's takes one file at a time
_of_thread = threading.local()


class Look(NamedTuple):
    """One file decoded: what is wrong with it ("": nothing), and whether that is sure to stay."""

    problem: str
    height: int = 0
    width: int = 0
    lasting: bool = True


def look_at(path: Path) -> Look:
    """Decode a file with Pillow, and with DALI where that is installed, and say what came of it.

    Threads may call it side by side.
    """
    try:
        with Image.open(path) as image:
            if image.format not in _FORMATS:
                return Look(f"{image.format}, not PNG or JPEG")
            image.load()
            content = path.read_bytes()
            problem = png_problem(content) if image.format == "PNG" else ""
            look = Look(problem, image.height, image.width)
    # Pillow raises nearly anything for damaged files (SyntaxError for PNG, struct.error, ...)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            # the disk's or the permissions' fault, which may pass: not to be remembered
            return Look(error.strerror or str(error), lasting=False)
        reason = "empty file" if path.exists() and path.stat().st_size == 0 else str(error)
        return Look(reason.replace(f" {str(path)!r}", "") or type(error).__name__)
    if look.problem or not has_dali() or _dali_decodes(content):
        return look
    if _dali_decodes(_pixel()):
        return Look(REFUSED)
    # it is out of memory or threads, which is no file's fault
    return Look("DALI decodes nothing at all at the moment", lasting=False)


@functools.cache
def has_dali() -> bool:
    """Whether DALI is installed; it is not imported for that."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def _dali_decodes(content: bytes) -> bool:
    # late: it takes its time to load, and where all files are known nothing needs it
    from isofast.data.dali import SingleDecoder

    if not hasattr(_of_thread, "decoder"):
        _of_thread.decoder = SingleDecoder()
    decoder: SingleDecoder = _of_thread.decoder
    return decoder.decodes(content)


@functools.cache
def _pixel() -> bytes:
    """A picture that every decoder takes."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue()
