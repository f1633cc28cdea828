"""How long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]
"""Receives one line of progress, without a line end, for the person who waits."""
