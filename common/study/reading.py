"""Read a TOML file and validate it. Errors name the field."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from privet.common.errors import StudyError

_T = TypeVar("_T", bound=BaseModel)

# Keys that other libraries have, with what to do here.
_ELSEWHERE = {
    "lora.use_dora": "DoRA is not supported: it divides each weight by a norm that the adapter changes; remove the key",
    "lora.use_rslora": "unknown key; set rslora = true instead",
    "lora.r": "unknown key; set rank instead",
    "lora.lora_alpha": "unknown key; set alpha instead",
    "lora.target_modules": "unknown key; set targets instead",
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
        lines = [_complaint(dict(item)) for item in error.errors(include_url=False)]
        raise StudyError(
            f"the {what} is not valid:\n  " + "\n  ".join(lines), "correct each field named above"
        ) from None


def _complaint(item: dict[str, Any]) -> str:
    field = ".".join(str(part) for part in item["loc"]) or "study"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{field}: is missing"
    if item["type"] == "extra_forbidden":
        if field in _ELSEWHERE:
            return f"{field}: {_ELSEWHERE[field]}"
        return f"{field}: unknown key; remove it or check its spelling"
    if item["type"] == "value_error":
        return f"{field}: {message}"
    return f"{field}: {message[0].lower()}{message[1:]}, got {item['input']!r}"


def read_toml(path: Path, *, what: str) -> dict[str, Any]:
    """Read a TOML file into plain values.

    Raises:
        StudyError: The file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors of Windows write a byte order mark
    except FileNotFoundError:
        raise StudyError(f"there is no {what} file at {path}", "check the path") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise StudyError(
            f"the {what} file {path} is not text in UTF-8: line {line}", "save the file as UTF-8 in your editor"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise StudyError(
            f"the {what} file {path} is not valid TOML: {error}", "correct the file at the line and column named"
        ) from None
