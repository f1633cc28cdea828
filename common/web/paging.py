"""Long lists in pages of a fixed size, found by a part of a name; all of it works by addresses, without script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import urlencode

T = TypeVar("T")
_LONGEST = 64
"""Characters of a text that is searched for."""


@dataclass(frozen=True)
class Piece(Generic[T]):
    """One page of a list.

    Attributes:
        rows: What stands on it.
        first: Number of the first row in the list, from 1; 0 if there is none.
        count: Rows of the list.
        all: Rows before the search.
        search: Text that was searched for.
        before: Address of the page before this one; empty: there is none.
        after: Address of the page after it.
    """

    rows: Sequence[T]
    first: int
    count: int
    all: int
    search: str
    before: str
    after: str

    @property
    def last(self) -> int:
        """Number of the last row in the list."""
        return self.first + len(self.rows) - 1 if self.rows else 0


def searched(query: Mapping[str, str]) -> str:
    """Return the text that an address searches for."""
    return query.get("search", "").strip()[:_LONGEST]


def piece(rows: Sequence[T], query: Mapping[str, str], most: int, name: Callable[[T], str] | None = None) -> Piece[T]:
    """Return the page of a list that an address asks for; the last one where it asks for too much.

    Args:
        rows: The list.
        query: `page`, from 1, and `search`.
        most: Rows of a page.
        name: What the search looks at, whatever the case of its letters; None: nothing is searched.
    """
    search = searched(query) if name is not None else ""
    found = rows if name is None or not search else [each for each in rows if search.lower() in name(each).lower()]
    pages = max(-(-len(found) // most), 1)
    text = query.get("page", "1")
    page = min(max(int(text), 1), pages) if text.isdecimal() and len(text) < 10 else 1
    shown = found[(page - 1) * most : page * most]

    def address(number: int) -> str:
        asked = {"search": search, "page": str(number)} if search else {"page": str(number)}
        return f"?{urlencode(asked)}" if 1 <= number <= pages else ""

    first = (page - 1) * most + 1 if shown else 0
    return Piece(shown, first, len(found), len(rows), search, address(page - 1), address(page + 1))
