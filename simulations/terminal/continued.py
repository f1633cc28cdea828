"""What a run that continues another forgot and learned, for table and report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from privet.simulations.terminal.figures import as_text

HEAD = ["test records", "records", "before", "after", "change"]
_NAMES = {"old": "of the run before (forgetting)", "new": "of this run"}


def title(found: Mapping[str, Any]) -> str:
    """Return the title of the table."""
    return f"{found['metric']} of the adapter of {found['run']} (before), and of this run's (after)"


def cells(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the table: old and new test records, before and after."""
    metric, rows = found["metric"], []
    for key, name in _NAMES.items():
        row = found["tests"].get(key)
        if row is not None:
            change = row["after"] - row["before"]
            moved = f"{change:+.2f}" if metric == "perplexity" else f"{100 * change:+.1f} points"
            figures = (as_text(metric, row[when]) for when in ("before", "after"))
            rows.append([name, f"{row['records']:,.0f}", *figures, moved])
    return rows


def sentences(found: Mapping[str, Any]) -> list[str]:
    """Return the budget of all runs together, and what could not be computed."""
    lines, cost = [], found["epsilon"]
    if cost is not None:
        unit, delta = cost["unit"], f"{cost['delta']:g}"
        if cost["together"] is None:
            lines.append(
                "The runs have no guarantee together: one of them is not private, or protects another unit than a "
                f"{unit}."
            )
        else:
            lines.append(
                f"Together with the runs before, a {unit} has spent epsilon {cost['together']:.2f} at delta {delta}: "
                f"{cost['before']:.2f} before, {cost['this']:.2f} in this run, as one account of all."
            )
    lines += [f"Not computed ({what}): {why}." for what, why in found["missing"].items()]
    return lines
