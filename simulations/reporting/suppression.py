"""Small cells are not shown: what a table says of very few records says it of each of them.

What is hidden follows from a total by subtraction, if it is one row, or of few records altogether. So further rows,
the smallest first, are hidden with it until it is neither.
"""

from __future__ import annotations

from collections.abc import Mapping

SMALLEST = 10
"""Records that a row needs to be shown."""


def hidden(counts: Mapping[str, float], smallest: int = SMALLEST) -> frozenset[str]:
    """Return the rows that are not shown beside a total.

    A row of no records tells of nobody, and stays.

    Args:
        counts: Records of each row.
        smallest: Records that a row needs.
    """
    secret = {name for name, count in counts.items() if 0 < count < smallest}
    others = sorted((count, name) for name, count in counts.items() if count >= smallest)
    for _, name in others:
        if not secret or (len(secret) > 1 and sum(counts[row] for row in secret) >= smallest):
            break
        secret.add(name)
    return frozenset(secret)
