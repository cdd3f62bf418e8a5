"""CIFAR's pickles, read without running anything that they name.

A pickle is a program that may call any function of any package. Here it finds stand-ins for the
few names that an array of bytes needs, and nothing else.
"""

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt


class _Dtype:
    """Stands for numpy.dtype; only bytes exist."""

    def __init__(self, name: str, *_: object) -> None:
        if name not in ("u1", "|u1"):
            raise pickle.UnpicklingError(f"an array of {name!r}; only bytes are allowed")

    def __setstate__(self, state: object) -> None:
        """Take byte order and fields, which bytes have none of."""


class _Array:
    """Stands for numpy.ndarray."""

    values: npt.NDArray[np.uint8]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, columns_first, data = state
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array without a dtype")
        content = data.encode("latin1") if isinstance(data, str) else data
        values = np.frombuffer(content, np.uint8)
        # what Fortran stores is the transpose of what C stores
        self.values = values.reshape(shape[::-1]).T if columns_first else values.reshape(shape)


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    """Python 3 writes bytes like this for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes written as {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,
}


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file does")
        return _ALLOWED[module, name]


def load_plain(content: bytes) -> dict[str, Any]:
    """Unpickle a dict of numbers, text, lists and uint8 arrays; Python 2's text is latin1.

    Raises:
        ValueError: it is something else, or no pickle.
    """
    try:
        loaded = _Plain(io.BytesIO(content), encoding="latin1").load()
        items = dict(loaded).items()
        return {
            str(key): value.values if isinstance(value, _Array) else value for key, value in items
        }
    # what a pickle program can do wrong has no end
    except Exception as error:
        raise ValueError(f"it is no pickle of arrays and lists ({error})") from error
