"""Canonical JSON (RFC 8785) and digests: equal values always give equal bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rfc8785

_BLOCK = 1 << 20


def canonical_json(value: Mapping[str, Any]) -> bytes:
    """Return `value` as canonical JSON.

    Raises:
        rfc8785.CanonicalizationError: JSON cannot hold a value exactly, such as NaN or an integer above 2^53.
    """
    return rfc8785.dumps(dict(value))


def digest(data: bytes) -> str:
    """Return the SHA-256 of `data` as `sha256:<hex>`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of the file at `path` in hexadecimal, reading it block by block."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest()
