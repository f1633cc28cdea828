"""Figures by site and by subgroup, with small groups hidden, and the gap between the worst and the best group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from privet.client.pages.suppression import hidden
from privet.client.release.bootstrap import (
    Array,
    Compared,
    Estimate,
    Measure,
    Measured,
    Resampling,
    as_document,
    between,
    compare,
    interval,
    plain,
    tendency,
)


def group_document(
    kind: str,
    names: Sequence[str],
    measured: Measured,
    measure: Measure,
    resampling: Resampling,
    units: Sequence[str],
    smallest: int,
    most: int,
) -> dict[str, Any]:
    """Return one measure of each group, base and tuned, with the gaps between groups and a sentence.

    Args:
        kind: What the groups are, such as site.
        names: Group of each record [n].
        measured: Sums of all records.
        measure: One of its measures.
        resampling: Of the records.
        units: Unit of each record [n]; a group is as large as its number of units.
        smallest: Least number of units of a group that is shown.
        most: Most groups; a column with more values names individuals.
    """
    distinct = sorted(set(names))
    if len(distinct) > most:
        says = f"By {kind}: not shown, as {len(distinct)} values could name single persons (at most {most})."
        return {"measure": measure.name, "groups": [], "hidden": 0, "gap": None, "says": says}
    array = np.array(names, dtype=object)
    counts = Counter(name for name, _ in {(name, unit) for name, unit in zip(names, units, strict=True)})
    secret = hidden({name: float(count) for name, count in counts.items()}, smallest)
    place = measured.measures.index(measure)
    shown: dict[str, Compared] = {}
    rows = []
    for name in distinct:
        if name in secret:
            rows.append({"group": name, "hidden": True})
            continue
        found = compare(measured, resampling, array == name)[place]
        shown[name] = found
        rows.append({"group": name, "hidden": False, **as_document(measure, found)})
    gaps = _gaps(array, list(shown), measured, measure, resampling)
    return {
        "measure": measure.name,
        "groups": rows,
        "hidden": len(secret),
        "smallest": smallest,
        "gap": plain({arm: {"worst": low, "best": high, "gap": gap} for arm, (low, high, gap) in gaps.items()}),
        "says": _sentence(kind, shown, measure, gaps, len(secret)),
    }


Gaps = dict[str, tuple[str, str, Estimate]]
"""By arm: the worst group, the best group, and the size of the gap between these two."""


def _gaps(names: Any, shown: Sequence[str], measured: Measured, measure: Measure, resampling: Resampling) -> Gaps:
    found: Gaps = {}
    if len(shown) < 2:
        return found
    for arm, sums in (("base", measured.base), ("tuned", measured.tuned)):
        parts = [np.where((names == name)[:, None], sums, 0.0) for name in shown]
        with np.errstate(all="ignore"):
            values = [float(measure.of(part.sum(0))) for part in parts]
        ordered = sorted((value, place) for place, value in enumerate(values) if np.isfinite(value))
        if len(ordered) < 2:
            continue
        (least, low), (largest, high) = ordered[0], ordered[-1]
        both = np.concatenate([parts[low], parts[high]], axis=1)
        drawn, width = resampling.sums(both), sums.shape[1]
        with np.errstate(all="ignore"):
            replicates: Array = measure.of(drawn[:, width:]) - measure.of(drawn[:, :width])
        worst, best = (low, high) if measure.better == "higher" else (high, low)
        found[arm] = shown[worst], shown[best], interval(largest - least, replicates)
    return found


def _sentence(kind: str, shown: dict[str, Compared], measure: Measure, gaps: Gaps, secret: int) -> str:
    """Return what the groups say about fairness."""
    if len(shown) < 2:
        return f"By {kind}: fewer than two groups are large enough to compare" + (
            f" ({secret} hidden)." if secret else "."
        )
    told = {name: tendency(found, measure.better) for name, found in shown.items()}
    worse = [name for name, said in told.items() if said == "worse"]
    better = sum(said == "better" for said in told.values())
    parts = [f"By {kind}: tuned is better in {better} of {len(told)} groups"]
    parts[0] += f", worse in {', '.join(worse)}." if worse else ", worse in none."
    if "tuned" in gaps:
        low, high, gap = gaps["tuned"]
        sizes = between(gap, percent=measure.percent).replace(" (", " points (" if measure.percent else " (", 1)
        before = f"; with the base, {between(gaps['base'][2], percent=measure.percent)}" if "base" in gaps else ""
        chance = " This gap may be chance." if gap.low <= 0 else ""
        parts.append(f"Largest gap in {measure.title}: {sizes}, from {low} (worst) to {high} (best){before}.{chance}")
    if secret:
        parts.append(f"{secret} groups are hidden, as they are small or would follow from the others.")
    return " ".join(parts)
