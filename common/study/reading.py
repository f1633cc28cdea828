"""Read a TOML file and validate it. Errors name the field."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from privet.common.errors import StudyError
from privet.common.files import MAKES

_T = TypeVar("_T", bound=BaseModel)
_KIND = re.compile(r"^[a-z-]+[\[(].*[\])]|^function-")

_NEAR = 0.75
"""Likeness, from 0 to 1, from which on an unknown key is taken for a slip of a known one."""

# Keys that other libraries have, with what to do here.
_ELSEWHERE = {
    "lora.use_dora": "DoRA is not supported: it divides each weight by a norm that the adapter changes; remove the key",
    "lora.use_rslora": "unknown key; set rslora = true instead",
    "lora.r": "unknown key; set rank instead",
    "lora.lora_alpha": "unknown key; set alpha instead",
    "lora.target_modules": "unknown key; set targets instead",
}
# Endings of files that hold records.
_RECORDS = {".csv", ".tsv", ".jsonl", ".json", ".parquet", ".xlsx"}
# Keys that tell one kind of file from the others.
_TELLING = {
    "study": {"model", "task", "data", "lora"},
    "sweep": {"study", "fields"},
    "site": {"train", "dataset"},
    "policy": {"tasks", "cohort", "metrics"},
    "coordinator": {"origin", "enrolment", "fleet"},
}


def validate(model: type[_T], document: dict[str, Any], *, what: str) -> _T:
    """Validate `document` as `model`, and report every error as one readable line.

    Types are those of JSON: neither `true` nor `"5"` is a number, and an integer has no decimal point.

    Raises:
        StudyError: The document is not valid. The message names each wrong field, the value found and what is allowed.
    """
    try:
        return model.model_validate_json(json.dumps(document, default=str), strict=True)
    except ValidationError as error:
        lines = [_complaint(dict(item), model) for item in error.errors(include_url=False)]
        raise StudyError(
            f"the {what} is not valid:\n  " + "\n  ".join(lines), "correct each field named above"
        ) from None


def _complaint(item: dict[str, Any], model: type[BaseModel]) -> str:
    # Where a value may be of several kinds, the parts name these, too, in words of the library.
    field = ".".join(str(part) for part in item["loc"] if not _KIND.search(str(part))) or "study"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{field}: is missing"
    if item["type"] == "extra_forbidden":
        if field in _ELSEWHERE:
            return f"{field}: {_ELSEWHERE[field]}"
        near = get_close_matches(str(item["loc"][-1]), _keys(model, item["loc"][:-1]), 1, _NEAR)
        if near:
            return f"{field}: unknown key; did you mean {near[0]}?"
        home = _homes(model, str(item["loc"][-1]))
        advice = f"it belongs {' or '.join(home)}" if home else "remove it or check its spelling"
        return f"{field}: unknown key; {advice}"
    if item["type"] == "value_error":
        return f"{field}: {message}"
    return f"{field}: {message[0].lower()}{message[1:]}, got {item['input']!r}"


def _homes(model: type[BaseModel], key: str) -> list[str]:
    """Return where a document of this kind has a key of this name: at its top level, or in which of its tables."""
    tables = [name for name in model.model_fields if key in _keys(model, [name])]
    return ["at the top level, before every [table]"] * (key in model.model_fields) + [
        f"in [{name}]" for name in tables
    ]


def _keys(kind: Any, path: Sequence[str | int]) -> list[str]:
    """Return the keys of the table at `path` in a document of this kind; none if the path does not lead to one table.

    Args:
        kind: A model, or another annotation of a field.
        path: Keys of the tables around it, the outermost first.
    """
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if not path:
            return list(kind.model_fields)
        found = kind.model_fields.get(str(path[0]))
        return [] if found is None else _keys(found.annotation, path[1:])
    within = [each for each in get_args(kind) if each not in (str, type(None))]
    mapping = getattr(kind, "__origin__", None) in (dict, Mapping)
    return [name for each in within for name in _keys(each, path[1:] if mapping else path)]


def read_toml(path: Path, *, what: str) -> dict[str, Any]:
    """Read a TOML file into plain values.

    Raises:
        StudyError: The file is missing, cannot be read, is not TOML, or is a file of another kind than `what`.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors of Windows write a byte order mark
    except FileNotFoundError:
        makes = MAKES.get(what)
        raise StudyError(
            f"there is no {what} file at {path}", "check the path" + (f"; {makes}" if makes else "")
        ) from None
    except IsADirectoryError:
        raise StudyError(
            f"expected a {what} file, found the directory {path}", f"name the {what} file (TOML)"
        ) from None
    except OSError as error:
        raise StudyError(
            f"the {what} file {path} cannot be read ({error.strerror})", "check the path, and who may read the file"
        ) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _not_toml(path, what, error) from None
    _check_kind(path, document, what)
    return document


def _not_toml(path: Path, what: str, error: ValueError) -> StudyError:
    """Return the error of a file that is not TOML: it may hold records."""
    if _RECORDS & {suffix.lower() for suffix in path.suffixes}:
        makes = f"make a study from it: `privet new {shlex.quote(str(path))}`"
        return StudyError(
            f"expected a {what} file, found the data file {path}", makes if what == "study" else f"name the {what} file"
        )
    if isinstance(error, UnicodeDecodeError):
        line = error.object[: error.start].count(b"\n") + 1
        fault, hint = f"line {line} is not text in UTF-8", "save the file as UTF-8, as TOML demands"
    else:
        fault, hint = str(error), "correct the file at the line and column named"
    return StudyError(f"the {what} file {path} is not valid TOML: {fault}", hint)


def _check_kind(path: Path, document: dict[str, Any], what: str) -> None:
    """Raise `StudyError` where the keys of a document are those of another kind of file."""
    if what not in _TELLING or document.keys() & _TELLING[what]:
        return
    for other, keys in _TELLING.items():
        if keys <= document.keys():
            raise StudyError(f"expected a {what} file, found the {other} file {path}", f"name the {what} file (TOML)")
