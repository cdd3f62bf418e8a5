"""What a config names by import path: methods, encoders and loggers of your own."""

import difflib
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError

from isofast.config.presets import METHODS


def import_object(path: str) -> Any:
    """``module:attribute``; modules are looked up in the working directory too."""
    module, _, attribute = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return getattr(importlib.import_module(module), attribute)


def method_class(name: Any) -> Any:
    """The class of ``method.name``: a built-in method's, or module:Class of your own.

    Modules are looked up in the working directory too. The class has a ``Config``, its section.

    Raises:
        PydanticCustomError: there is no such class, or its module fails to import.
    """

    def refuse(reason: str) -> PydanticCustomError:
        return PydanticCustomError("method_name", "{reason}", {"reason": reason, "got": name})

    path = METHODS.get(name) if isinstance(name, str) else None
    if path is None and (not isinstance(name, str) or ":" not in name):
        close = difflib.get_close_matches(str(name), METHODS, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        allowed = ", ".join(map(repr, METHODS))
        raise refuse(f"{hint}allowed are {allowed} and module:Class, for a class of your own")
    try:
        found = import_object(path or name)
    except Exception as error:
        raise refuse(f"cannot import it: {type(error).__name__}: {error}") from error
    if not (inspect.isclass(found) and hasattr(found, "loss") and hasattr(found, "Config")):
        raise refuse("not a class derived from isofast.methods.Method")
    return found
