"""Custom methods, encoders and loggers, named in a config by import path."""

import difflib
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError

from isofast.config.presets import METHODS


def import_object(path: str) -> Any:
    """Import ``module:attribute``; modules are also looked up in the working directory."""
    module, _, attribute = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return getattr(importlib.import_module(module), attribute)


def method_class(name: Any) -> Any:
    """Return the class that ``method.name`` refers to, a built-in name or module:Class.

    Raises:
        PydanticCustomError: there is no such class, or its module fails to import.
    """

    def refuse(reason: str) -> PydanticCustomError:
        return PydanticCustomError("method_name", "{reason}", {"reason": reason, "got": name})

    path = METHODS.get(str(name), str(name))
    if ":" not in path:
        close = difflib.get_close_matches(path, METHODS, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        allowed = ", ".join(map(repr, METHODS))
        raise refuse(f"{hint}allowed are {allowed}, or module:Class for your own class")
    try:
        found = import_object(path)
    except Exception as error:
        where = f" (looked up in {Path.cwd()} too)" * isinstance(error, ModuleNotFoundError)
        raise refuse(f"cannot import it: {type(error).__name__}: {error}{where}") from error
    if not (inspect.isclass(found) and hasattr(found, "loss") and hasattr(found, "Config")):
        raise refuse("not a class derived from isofast.methods.Method")
    return found
