"""Load a configuration from a JSON file and --set overrides, with errors that name the fix."""

import copy
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from isofast.config.plugins import method_class
from isofast.config.presets import merge
from isofast.config.schema import Config, MethodConfig
from isofast.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
# the shipped configs: inside an installed package, next to it in a checkout
LAUNCH = next(p / "launch" for p in (_PACKAGE, _PACKAGE.parent) if (p / "launch").is_dir())


def load_config(
    path: str | PathLike[str], overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Config:
    """Read ``path``, apply overrides and presets, and validate.

    Overrides are those of ``--set`` (["train.epochs=100"]) or a mapping ({"train.epochs": 100}).
    {"train": {"epochs": 100}} changes only those keys; a method given with its name is replaced.

    If ``path`` is not a file, it may name a shipped config, such as tinyimagenet.

    Raises:
        UserError: the file is missing or not JSON, or a key or value is not allowed; the message
            lists every wrong key, and suggests valid ones.
    """
    path = Path(path)
    shipped = LAUNCH / f"{path}.json"
    if not path.is_file() and shipped.is_file():
        path = shipped
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_section)
    except FileNotFoundError:
        known = ", ".join(sorted(str(p) for p in path.parent.glob("*.json"))) or "none"
        names = ", ".join(sorted({p.stem for p in LAUNCH.glob("*.json")} - {"config.schema"}))
        raise UserError(
            f"no config file {path}. JSON files in that folder: {known}. Shipped configs: {names}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must contain a JSON object of sections, got {type(raw).__name__}")
    config = validate(raw, overrides)
    if config.warmup_epochs > config.train.epochs:
        raise UserError(
            f"schedule.warmup_epochs={config.warmup_epochs:g} is more than the run has, "
            f"train.epochs={config.train.epochs}; lower it, or leave it out for a tenth of the run"
        )
    return config


def validate(raw: Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """Build a config from nested sections and overrides, filling in presets.

    Raises:
        UserError: a key or value is not allowed.
    """
    tree = copy.deepcopy(dict(raw))
    if isinstance(overrides, Mapping):
        overrides = [f"{k}={json.dumps(v, default=_plain)}" for k, v in overrides.items()]
    for override in overrides:
        _apply_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        known = list(_keys(Config, _method_section(tree)))
        lines = [
            _explain(dict(item), known)
            for item in error.errors()
            # presets that depend on a wrong key
            if item["type"] != "default_factory_not_called"
        ]
        raise UserError("the configuration is not valid:\n  " + "\n  ".join(lines)) from None


def read_stored(path: Path) -> Config:
    """Read a run's config.json, which an older version may have written.

    Older files lack method.correlation (C was that of the embeddings), may have a null alpha for
    trained predictors, and have a key for TensorBoard.

    Raises:
        OSError, ValueError: the file cannot be read or is not a config.
    """
    raw = json.loads(path.read_text(encoding="utf-8"))
    match raw:
        case {"method": dict(method), "logging": dict(logging)}:
            logging.pop("tensorboard", None)
            method.setdefault("correlation", "embeddings")
            for key in ("alpha", "eps", "normalize"):
                if method.get(key, 0) is None:
                    del method[key]
    return validate(raw)


def _plain(value: Any) -> Any:
    """Return the numbers of a NumPy scalar or array, and the text of paths."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _section(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    section = dict(pairs)
    if len(section) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(k for k in keys if keys.count(k) > 1)!r} is there twice")
    return section


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
        value = json.loads(text)
    except ValueError:
        # Python's names, as an f-string writes them, too
        value = {"True": True, "False": False, "None": None}.get(text, text)
    if key == "method" and isinstance(value, dict) and "name" in value:
        # another method has other keys
        node.pop(name, None)
    node.update(merge(node, {name: value}))


def _explain(item: dict[str, Any], known: Sequence[str]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key. {_nearest(key, known)}"
    if item["type"] == "method_name":
        return f"method.name: got {item['ctx']['got']!r}; {item['msg']}"
    if item["type"] == "missing":
        key = "data.root" if key == "data" else key
        return f"{key}: missing. Set it in the file or with --set {key}=VALUE"
    got, message = item["input"], item["msg"].removeprefix("Value error, ")
    example = next((name for name in known if name.startswith(f"{key}.")), None)
    if example is not None and not isinstance(got, dict):
        message = f"this is a section; set one of its keys, such as {example}"
    return f"{key}: got {got!r}; {message[:1].lower()}{message[1:]}"


def _nearest(key: str, known: Sequence[str]) -> str:
    section, _, leaf = key.rpartition(".")
    siblings = {
        name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section
    }
    # the right key in the wrong section is as common as a typo
    close = [name for name in known if name.rpartition(".")[2] == leaf]
    close += [siblings[slip] for slip in difflib.get_close_matches(leaf, siblings, 1)]
    return f"Did you mean {close[0]}?" if close else "Allowed: " + ", ".join(siblings.values())


def _keys(section: Any, method: type[MethodConfig], prefix: str = "") -> Iterator[str]:
    """Yield a section's keys; the method section has those of ``method``."""
    if isinstance(section, type) and issubclass(section, BaseModel):
        for name, field in section.model_fields.items():
            yield f"{prefix}{name}"
            inner = method if field.annotation is MethodConfig else field.annotation
            yield from _keys(inner, method, f"{prefix}{name}.")


def _method_section(raw: Mapping[str, Any]) -> type[MethodConfig]:
    method = raw.get("method")
    name = method.get("name", "isoloss") if isinstance(method, Mapping) else "isoloss"
    try:
        section: type[MethodConfig] = method_class(name).Config
    except ValueError:
        return MethodConfig
    return section
