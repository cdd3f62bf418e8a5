"""Reading a configuration: a JSON file, --set overrides, errors that name the remedy."""

import copy
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from isofast.config.plugins import method_class
from isofast.config.schema import Config, MethodConfig
from isofast.errors import UserError


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads ``path``, applies ``--set`` overrides (``key.path=value``), fills presets, validates.

    Raises:
        UserError: the file is missing or not JSON, or a key or value is not allowed; the message
            names every wrong key with its nearest allowed name.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(str(p) for p in path.parent.glob("*.json"))) or "none"
        raise UserError(f"no config file {path}. JSON files beside it: {known}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config file {path}: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a JSON object of sections, got {type(raw).__name__}")
    return resolve(raw, overrides)


def resolve(raw: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The config of a tree of sections with ``--set`` overrides on top; ``raw`` is not changed.

    Raises:
        UserError: a key or value is not allowed.
    """
    tree = copy.deepcopy(dict(raw))
    for override in overrides:
        _apply_override(tree, override)
    return validate(tree)


def validate(raw: Mapping[str, Any]) -> Config:
    """The config of a tree of sections, presets filled in.

    Raises:
        UserError: a key or value is not allowed.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        known = list(_all_keys(raw))
        lines = [
            _explain(dict(item), known)
            for item in error.errors()
            # a preset that depends on a key that is wrong
            if item["type"] != "default_factory_not_called"
        ]
        raise UserError("the configuration is not valid:\n  " + "\n  ".join(lines)) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"--set takes key.path=value, got {override!r}. Example: train.epochs=100")
    *sections, name = key.split(".")
    node = raw
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {override}: {section} is a value, not a section")
    try:
        node[name] = json.loads(text)
    except json.JSONDecodeError:
        node[name] = text


def read_stored(path: Path) -> Config:
    """The config.json of a run, also of an earlier version.

    Before method.correlation C was that of embeddings; trained predictors had an alpha of null, and
    TensorBoard a key of its own.

    Raises:
        OSError, ValueError: it cannot be read or is no config.
    """
    raw = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(raw, dict) and isinstance(raw.get("method"), dict):
        raw["method"] = {"correlation": "embeddings", **raw["method"]}
        for key in ("alpha", "eps", "normalize"):
            if raw["method"].get(key, 0) is None:
                del raw["method"][key]
    if isinstance(raw, dict) and isinstance(raw.get("logging"), dict):
        raw["logging"].pop("tensorboard", None)
    return validate(raw)


def _explain(item: dict[str, Any], known: Sequence[str]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key. {_nearest(key, known)}"
    if item["type"] == "method_name":
        return f"method.name: got {item['ctx']['got']!r}; {item['msg']}"
    if item["type"] == "missing":
        key = "data.root" if key == "data" else key
        return f"{key}: missing. Give it in the file or with --set {key}=VALUE"
    message = item["msg"].removeprefix("Value error, ")
    got = item["input"]
    shown = "" if isinstance(got, BaseModel) else f"got {got!r}; "
    example = next((name for name in known if name.startswith(f"{key}.")), None)
    if example is not None and not isinstance(got, BaseModel | dict):
        return f"{key}: {shown}this is a section; set one of its keys, such as {example}"
    if item["type"] == "path_type":
        return f"{key}: {shown}a path is wanted, as text"
    return f"{key}: {shown}{message[:1].lower()}{message[1:]}"


def _nearest(key: str, known: Sequence[str]) -> str:
    section, _, leaf = key.rpartition(".")
    # a right leaf in a wrong section is as common as a slip of the finger
    elsewhere = [name for name in known if name.rpartition(".")[2] == leaf]
    siblings = [name for name in known if name.rpartition(".")[0] == section]
    by_leaf = {name.rpartition(".")[2]: name for name in siblings}
    slips = difflib.get_close_matches(leaf, by_leaf, 1, 0.6)
    close = (
        elsewhere
        or [by_leaf[slip] for slip in slips]
        or (difflib.get_close_matches(key, known, 1, 0.5) if section not in known else [])
    )
    if close:
        return f"Did you mean {close[0]}?"
    allowed = siblings or sorted({name.partition(".")[0] for name in known})
    return "Allowed: " + ", ".join(allowed)


def _all_keys(raw: Mapping[str, Any]) -> Iterator[str]:
    """Every key of a config with the method that ``raw`` names."""
    for name, field in Config.model_fields.items():
        yield name
        yield from _keys_of(_method_section(raw) if name == "method" else field.annotation, name)


def _keys_of(section: Any, prefix: str) -> Iterator[str]:
    if isinstance(section, type) and issubclass(section, BaseModel):
        for name, field in section.model_fields.items():
            yield f"{prefix}.{name}"
            yield from _keys_of(field.annotation, f"{prefix}.{name}")


def _method_section(raw: Mapping[str, Any]) -> type[MethodConfig]:
    method = raw.get("method")
    name = method.get("name", "isoloss") if isinstance(method, Mapping) else "isoloss"
    try:
        section: type[MethodConfig] = method_class(name).Config
    except ValueError:
        return MethodConfig
    return section
