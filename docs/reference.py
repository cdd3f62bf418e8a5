"""A hook of mkdocs: writes the pages of every config key and every command."""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from isofast.cli import parser_of_all

SCHEMA = Path(__file__).resolve().parent.parent / "launch" / "config.schema.json"


def on_files(files: Files, config: Any) -> Files:
    """Add reference/config.md and reference/commands.md to the site."""
    for name, content in (("config", keys()), ("commands", commands())):
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def commands() -> str:
    """What `--help` prints of each command, as Markdown."""
    helps = (f"## {name}\n\n```\n{text}```\n" for name, text in _helps(parser_of_all()))
    return "# Every command\n\n" + "\n".join(helps)


def _helps(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _helps(command)
            return
    parser.formatter_class = partial(argparse.HelpFormatter, width=90)
    yield parser.prog, parser.format_help()


def keys() -> str:
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
