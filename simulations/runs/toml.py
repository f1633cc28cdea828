"""Write study files: plain values as TOML."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privet.client.bases.names import as_name

_NONE: Mapping[str, str] = {}
_WIDTH = 112
_COLUMN = 28
"""Where comments begin, behind shorter values."""
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(document: Mapping[str, Any], comments: Mapping[str, str] = _NONE) -> str:
    """Return plain values as TOML. In a table, values come before tables. None is left out.

    Strings, numbers, booleans and arrays of them in JSON are valid TOML, except that DEL must be escaped.

    Args:
        document: The values.
        comments: Comments by dotted name of a value or of a table, each of one line. With any, blank lines part tables.
    """
    lines: list[str] = []
    _write(document, (), lines, comments)
    return "\n".join(lines) + "\n"


def _write(table: Mapping[str, Any], path: tuple[str, ...], lines: list[str], comments: Mapping[str, str]) -> None:
    tables = {key: value for key, value in table.items() if isinstance(value, Mapping) or _is_tables(value)}
    values = {key: value for key, value in table.items() if key not in tables and value is not None}
    if path:
        comment = comments.get(".".join(path))
        lines += ([""] if comments and (values or comment) else []) + ([f"# {comment}"] if comment else [])
        lines += [f"[{'.'.join(map(_key, path))}]"] if values or comment or not comments else []
    for key, value in values.items():
        line, comment = f"{_key(key)} = {_value(value)}", comments.get(".".join((*path, key)), "")
        if not comment:
            lines.append(line)
        elif len(line) + len(comment) + 4 <= _WIDTH:
            lines.append(f"{line:<{_COLUMN}}  # {comment}")
        else:
            lines += [f"# {comment}", line]
    for key, value in tables.items():
        if isinstance(value, Mapping):
            _write(value, (*path, key), lines, comments)
            continue
        for each in value:
            lines.append(f"[[{'.'.join(map(_key, (*path, key)))}]]")
            lines += [f"{_key(k)} = {_value(v)}" for k, v in each.items() if v is not None]


def _is_tables(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(each, Mapping) for each in value)


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _value(key)


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False).replace("\x7f", "\\u007f")


def absolute_paths(document: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Return the plain values of a study file with absolute paths of its base and of its simulation's data files."""
    changed = copy.deepcopy(dict(document))
    model = changed.get("model")
    if isinstance(model, dict) and isinstance(model.get("base"), str):
        named = as_name(model["base"], root)
        model["base"] = model["base"] if named is None else str(named[1])
    simulation = changed.get("simulation", {})
    if not isinstance(simulation, dict):
        return changed
    resources = simulation.get("resources", {})
    bases = resources.get("bases", {}) if isinstance(resources, dict) else {}
    if isinstance(bases, dict) and bases:
        resources["bases"] = {name: str((root / str(path)).resolve()) for name, path in bases.items()}
    sites = simulation.get("sites", {})
    tables = [simulation.get("partition", {}), *(sites.values() if isinstance(sites, dict) else ())]
    for table in tables:
        for part in ("train", "test"):
            if isinstance(table, dict) and isinstance(table.get(part), list):
                table[part] = [str((root / file).resolve()) if isinstance(file, str) else file for file in table[part]]
        form = table.get("format") if isinstance(table, dict) else None
        if isinstance(form, dict) and isinstance(form.get("files"), dict):
            form["files"] = {str((root / file).resolve()): own for file, own in form["files"].items()}
    return changed
