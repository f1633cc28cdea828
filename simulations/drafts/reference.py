"""Every table and field of a study file, from the models that validate it: as a JSON Schema, and as a page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, create_model

from privet.common.study.sections import NAME_PATTERN
from privet.common.study.study import Study
from privet.simulations.data.federation import Simulation

_SCHEMA = "https://json-schema.org/draft/2020-12/schema"
_BOUNDS = {"minimum": "from {}", "exclusiveMinimum": "above {}", "maximum": "to {}", "exclusiveMaximum": "below {}"}
_HUGE = 2**48
"""Limits from here on are those of number formats, and say nothing to a reader."""
_PATTERNS = {NAME_PATTERN: "of lower-case letters, digits and dashes", "^[0-9a-f]{64}$": "of 64 hexadecimal digits"}
_LISTED = ("simulation.malicious",)
"""Tables of which a file may have several, one below the other."""
_INTRODUCTION = """# The study file

This page lists every table and field of a study file. It is generated from the models that validate study files
(`python tools/study_reference.py`), so it has the names, types, defaults and limits that the program checks.

`privet new DATA...` makes a study file from data files, with a comment on each line. `privet check STUDY` checks one.
A study file is TOML. Unknown fields are errors. Every field changes what is computed or released, and so the study's
digest, which sites agree to; `[simulation]` alone is no part of the study.

**In an editor.** `privet new --schema >study.schema.json` writes a JSON Schema. Editors that know Taplo (Even Better
TOML) then complete and check study files that begin with the line `#:schema study.schema.json`. `privet new` writes
that line if the file lies beside the study.
"""


def study_schema() -> dict[str, Any]:
    """Return the JSON Schema of study files, with the table of simulations."""
    simulated: Any = (Simulation | None, Field(default=None, description="For simulations; no part of the study."))
    model = create_model("StudyFile", __base__=Study, __doc__=Study.__doc__, simulation=simulated)
    return {"$schema": _SCHEMA, **model.model_json_schema(), "title": "privet study file"}


def study_page() -> str:
    """Return the page of every table and field, in Markdown."""
    schema = study_schema()
    lines = [_INTRODUCTION]
    for path, table in _tables(schema, schema, ()):
        name = ".".join(path)
        lines.append(f"## `{f'[[{name}]]' if name in _LISTED else f'[{name}]'}`\n" if path else "## Top level\n")
        if path and table.get("description"):
            lines.append(_prose(table["description"]) + "\n")
        lines += ["| field | values | default | meaning |", "|---|---|---|---|"]
        required = set(table.get("required", ()))
        for name, field in table["properties"].items():
            inner, whole = _table_of(field, schema, (*path, name))
            if inner is None:
                values = _values(field, schema)
            else:
                values = f"{'table' if whole == (*path, name) else 'tables'} [`[{'.'.join(whole)}]`](#{_anchor(whole)})"
            default = "needed" if name in required else _default(field)
            meaning = field.get("description") or (inner or {}).get("description", "").partition("\n\n")[0]
            lines.append(f"| `{name}` | {values} | {default} | {_cell(meaning)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _tables(
    table: Mapping[str, Any], schema: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield each table with its path, and then the tables in it."""
    yield path, table
    for name, field in table["properties"].items():
        inner, whole = _table_of(field, schema, (*path, name))
        if inner is not None:
            yield from _tables(inner, schema, whole)


def _table_of(
    field: Mapping[str, Any], schema: Mapping[str, Any], path: tuple[str, ...]
) -> tuple[Mapping[str, Any] | None, tuple[str, ...]]:
    """Return the table that a field is, or the tables, and their path; None if it is a value."""
    for each in field.get("anyOf", (field,)):
        if "properties" in (found := _resolved(each, schema)):
            return found, path
        if "properties" in (found := _resolved(_named(each) or {}, schema)):
            return found, (*path, "NAME")
        if "properties" in (found := _resolved(each.get("items", {}), schema)):
            return found, path
    return None, path


def _named(field: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what the values of a table are whose keys are names; None for other fields."""
    either = [field.get("additionalProperties"), *field.get("patternProperties", {}).values()]
    return next((found for found in either if isinstance(found, dict)), None)


def _resolved(field: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a reference names; anything else as it is."""
    found: Mapping[str, Any] = schema["$defs"][field["$ref"].rpartition("/")[2]] if "$ref" in field else field
    return found


def _values(field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Return the type and the allowed values of a field in words."""
    if "anyOf" in field:
        kinds = [_values(each, schema) for each in field["anyOf"] if each.get("type") != "null"]
        return "; or ".join(kinds)
    if "const" in field:
        return f"`{_toml(field['const'])}`"
    if "enum" in field:
        return ", ".join(f"`{_toml(value)}`" for value in field["enum"])
    kind = field.get("type")
    if kind == "array":
        return _array(field, schema)
    if kind == "object":
        return f"table of {_values(_named(field) or {}, schema)}, by name"
    words = {"string": "text", "number": "number", "integer": "whole number", "boolean": "`true`, `false`"}[str(kind)]
    if field.get("format") == "path":
        words = "path"
    return words + _limits(field)


def _array(field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    if "prefixItems" in field:
        return f"list of {len(field['prefixItems'])}, each a {_values(field['prefixItems'][0], schema)}"
    return f"list of {_values(field['items'], schema)}"


def _limits(field: Mapping[str, Any]) -> str:
    bounds = [words.format(f"{field[key]:.15g}") for key, words in _BOUNDS.items() if field.get(key, _HUGE) < _HUGE]
    if "maxLength" in field:
        bounds.append(f"of at most {field['maxLength']} characters")
    if "pattern" in field:
        bounds.append(_PATTERNS.get(field["pattern"]) or f"`{field['pattern']}`".replace("|", "\\|"))
    return "".join(f" {bound}" for bound in bounds)


def _default(field: Mapping[str, Any]) -> str:
    value = field.get("default")
    return "" if value in (None, [], {}) or isinstance(value, dict) else f"`{_toml(value)}`"


def _toml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def _prose(text: str) -> str:
    whole = "\n\n".join(re.sub(r"\s+", " ", part) for part in text.split("\n\n"))
    return re.sub(r"docs/([a-z-]+)\.md", r"[\1](\1.md)", whole)


def _anchor(path: tuple[str, ...]) -> str:
    return re.sub(r"[^a-z0-9_-]", "", ".".join(path).lower())
