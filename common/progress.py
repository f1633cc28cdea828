"""How long work tells what it is doing."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]
"""Takes one line for the person who waits."""
