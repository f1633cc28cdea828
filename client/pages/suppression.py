"""Suppression of small cells: a figure about very few records reveals something about each of them.

A single hidden row follows from a total by subtraction. Several hidden rows of few records together reveal their sum in
the same way. Further rows are therefore hidden, the smallest first, until at least two rows with enough records are
hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

SMALLEST = 10
"""Least number of records of a row that is shown."""


def hidden(counts: Mapping[str, float], smallest: int = SMALLEST) -> frozenset[str]:
    """Return the rows to hide in a table whose total is known.

    A row without records reveals nothing about any record, so it is shown.

    Args:
        counts: Number of records of each row.
        smallest: Least number of records of a row that is shown.
    """
    secret = {name for name, count in counts.items() if 0 < count < smallest}
    others = sorted((count, name) for name, count in counts.items() if count >= smallest)
    for _, name in others:
        if not secret or (len(secret) > 1 and sum(counts[row] for row in secret) >= smallest):
            break
        secret.add(name)
    return frozenset(secret)
