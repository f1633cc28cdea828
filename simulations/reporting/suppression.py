"""Small cells are not shown: what a table says of very few records says it of each of them.

Where one row alone is hidden and a total is shown, the row follows by subtraction. So a second one, the smallest of
the others, is hidden with it.
"""

from __future__ import annotations

from collections.abc import Mapping

SMALLEST = 10
"""Records that a row needs to be shown."""


def hidden(counts: Mapping[str, float], smallest: int = SMALLEST) -> frozenset[str]:
    """Return the rows that are not shown beside a total.

    A row of no records has nothing to hide, but that it is empty is told of nobody either; it stays.

    Args:
        counts: Records of each row.
        smallest: Records that a row needs.
    """
    small = {name for name, count in counts.items() if 0 < count < smallest}
    others = sorted((count, name) for name, count in counts.items() if count >= smallest)
    if small and sum(counts[name] for name in small) < smallest and len(small) == 1 and others:
        small.add(others[0][1])
    return frozenset(small)
