"""A hook of mkdocs: writes the page of every config key from the schema."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

SCHEMA = Path(__file__).resolve().parent.parent / "launch" / "config.schema.json"


def on_files(files: Files, config: Any) -> Files:
    """Add reference/config.md to the site."""
    files.append(File.generated(config, "reference/config.md", content=page()))
    return files


def page() -> str:
    """The schema as Markdown, a table a section."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    lines = ["# Every key", "", "A config is JSON; `--set key.path=value` sets one of its keys."]
    for name, description, rows in _sections(schema, schema, ""):
        lines += ["", f"## {name or 'Top level'}", "", description, ""]
        lines += ["| key | type | default | |", "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _sections(root: Any, section: Any, path: str) -> Iterator[tuple[str, str, list[str]]]:
    rows, inner = [], []
    for key, field in section.get("properties", {}).items():
        full = f"{path}.{key}".lstrip(".")
        given = field.get("anyOf", [field])
        titles = [kind["$ref"].rsplit("/", 1)[-1] for kind in given if "$ref" in kind]
        kinds = [_resolve(root, kind) for kind in given]
        objects = [kind for kind in kinds if "properties" in kind]
        if objects:
            asides = [f" ({title})" for title in titles] if len(objects) > 1 else [""]
            inner += [(full, *pair) for pair in zip(asides, objects, strict=True)]
        else:
            kind = " or ".join(_type(kind) for kind in kinds)
            default = json.dumps(field["default"]) if "default" in field else ""
            text = " ".join(field.get("description", "").split()).replace("|", "\\|")
            rows.append(f"| `{full}` | {kind} | `{default}` | {text} |".replace("| `` |", "| |"))
    if rows:
        yield path, " ".join(section.get("description", "").split()), rows
    for full, aside, kind in inner:
        for name, description, rows in _sections(root, kind, full):
            yield name + aside, description, rows


def _resolve(root: Any, kind: Any) -> Any:
    if "$ref" in kind:
        return root["$defs"][kind["$ref"].rsplit("/", 1)[-1]]
    return kind


def _type(kind: Any) -> str:
    if "enum" in kind:
        return " \\| ".join(f"`{value}`" for value in kind["enum"])
    if "const" in kind:
        return f"`{kind['const']}`"
    return str(kind.get("type", "any"))
