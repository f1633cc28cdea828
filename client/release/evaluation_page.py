"""An evaluation as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def evaluation_page(document: Mapping[str, Any]) -> str:
    """Return the page."""
    return ""
