"""One self-contained HTML file that verifies a bundle in a browser, without a network.

The file holds the bundle's files as inert data, and one program, which its content security policy pins by hash
(docs/decisions/0026-a-page-that-verifies.md). The program's source is the directory `page` beside this module: plain
scripts that are joined in the order of `SCRIPTS`. `PRIVET` in them is `constants()`.

The same bundle gives the same bytes, so two people can compare the digests of their pages.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from importlib.resources import files as resources
from typing import Any

from pydantic import BaseModel, TypeAdapter

from privet.common.audit.bundle import CHECKPOINT, Files
from privet.common.audit.checks import IN_PAGE, NOT_IN_PAGE
from privet.common.audit.fields import MODELS
from privet.common.errors import VerificationError
from privet.common.log import statements
from privet.common.pki.words import WORDS

SCRIPTS = ("bytes.js", "tree.js", "notes.js", "statements.js", "history.js", "bundle.js", "view.js")
_WEIGHTS = ".safetensors"
_NULL = {"type": "null"}


def schema() -> dict[str, Any]:
    """Return the JSON Schema of all statements, as their canonical bytes have it.

    Validation also takes statements whose optional fields are missing or null. Bytes in the one canonical form have
    every field, and those that earlier versions lack only where they say something.
    """
    found = TypeAdapter(statements.Statement).json_schema()
    for name, part in found["$defs"].items():
        model: type[BaseModel] = getattr(statements, name)
        later = {field for field, info in model.model_fields.items() if info.exclude_if is not None}
        part["required"] = [field for field in model.model_fields if field not in later]
        for field in later:
            part["properties"][field]["anyOf"].remove(_NULL)
    kinds = {kind: f"#/$defs/{model.__name__}" for kind, model in MODELS.items()}
    return {"kinds": kinds, "$defs": {name: _bare(part) for name, part in found["$defs"].items()}}


def _bare(part: Any) -> Any:
    """Return a schema without its texts."""
    if isinstance(part, list):
        return [_bare(each) for each in part]
    if not isinstance(part, dict):
        return part
    # Below `properties` stand names of fields, not keywords.
    return {
        key: {name: _bare(each) for name, each in value.items()} if key == "properties" else _bare(value)
        for key, value in part.items()
        if key not in ("title", "description", "default")
    }


def constants() -> dict[str, Any]:
    """Return what the page's program takes from Python, so that it is written once."""
    checks = {"here": [asdict(each) for each in IN_PAGE], "elsewhere": [asdict(each) for each in NOT_IN_PAGE]}
    return {"schema": schema(), "words": WORDS, "checks": checks}


@lru_cache(maxsize=2)
def program(scripts: tuple[str, ...] = SCRIPTS) -> str:
    """Return the page's program, or some of it: without `view.js` it only verifies."""
    parts = [_source(name) for name in scripts]
    return "\n".join(['"use strict";', f"const PRIVET = {_inert(constants())};", *parts])


def page(files: Files, title: str) -> bytes:
    """Return the page of a bundle.

    Args:
        files: The bundle's files. Weights are left out of the page, which says so.
        title: Name of the bundle, for the reader.

    Raises:
        VerificationError: There is no checkpoint among the files, so that there is nothing to verify.
    """
    if CHECKPOINT not in files:
        raise VerificationError(f"{CHECKPOINT} is missing in the bundle")
    kept = {name: base64.b64encode(data).decode() for name, data in sorted(files.items()) if not _is_weights(name)}
    absent = {name: len(data) for name, data in sorted(files.items()) if _is_weights(name)}
    script, style = program(), _source("page.css")
    parts = {
        "@POLICY@": _policy(script, style),
        "@STYLE@": style,
        "@DATA@": _inert({"title": title, "files": kept, "absent": absent}),
        "@SCRIPT@": script,
    }
    return _filled(_source("page.html"), parts).encode()


def _policy(script: str, style: str) -> str:
    """Return the content security policy: no network, this program and this style, and nothing else."""
    return (
        f"default-src 'none'; script-src '{_pin(script)}'; style-src '{_pin(style)}'; img-src data:; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _pin(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _filled(template: str, parts: Mapping[str, str]) -> str:
    """Fill a template whose marks stand in the order of `parts`. What is filled in is not searched for marks."""
    found = []
    for mark, text in parts.items():
        before, _, template = template.partition(mark)
        found += [before, text]
    return "".join([*found, template])


def _inert(value: Any) -> str:
    """Return JSON that cannot end the element that it stands in, whatever texts it holds."""
    text = json.dumps(value, separators=(",", ":"))  # non-ASCII is escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _is_weights(name: str) -> bool:
    return name.endswith(_WEIGHTS)


def _source(name: str) -> str:
    return (resources("privet.common.audit") / "page" / name).read_text(encoding="utf-8")
