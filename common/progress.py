"""How long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]
"""Called with one line of text for the user who waits."""
