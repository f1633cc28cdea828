"""Deal one pool of records out to sites: IID, by label, by quantity, or by a natural column.

Units of privacy are dealt out whole, so no patient is at two sites. Each class of units has a share for each site; the
class is the label if the split is by label. The numbers of units match the shares to the nearest unit. Then the largest
sites give units to sites that have fewer than the least number. The test pool is dealt out by the same shares.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privet.common.errors import StudyError
from privet.common.privacy.noise import derive_seed
from privet.simulations.data.scenario import Partition

ClassShares = Mapping[Hashable, NDArray[np.float64]]
"""By class: the fraction of its units that each site gets, [sites]. `None` has the shares of all other classes."""

_LONGEST_NAME = 63


@dataclass(frozen=True)
class Pool:
    """The unit and the class of each row. All rows of a unit are dealt out by the class of its first row."""

    units: Sequence[Hashable]
    classes: Sequence[Hashable]

    def members(self) -> dict[Hashable, list[list[int]]]:
        """Return the units of each class as lists of row indices, in order of first appearance."""
        rows: dict[Hashable, list[int]] = {}
        for index, unit in enumerate(self.units):
            rows.setdefault(unit, []).append(index)
        found: dict[Hashable, list[list[int]]] = {}
        for indices in rows.values():
            found.setdefault(self.classes[indices[0]], []).append(indices)
        return found


def draw_shares(section: Partition, sites: int, classes: Sequence[Hashable], seed: int) -> ClassShares:
    """Return the share of each site for a split by iid, dirichlet or quantity."""
    if section.split == "dirichlet" and section.concentration is not None:
        rng = generator(seed, "shares")
        drawn = rng.dirichlet(np.full(sites, section.concentration), size=len(classes))
        # A tiny concentration underflows to 0 / 0. Its limit is all of the class at one site, drawn uniformly.
        found = [row if np.isfinite(row).all() else np.eye(sites)[rng.integers(sites)] for row in drawn]
        return dict(zip(sorted(classes, key=str), found, strict=True)) | {None: np.full(sites, 1 / sites)}
    weights = np.arange(1.0, sites + 1) ** -(section.exponent or 0.0)
    return {None: weights / weights.sum()}


def deal(pool: Pool, shares: ClassShares, sites: int, seed: int, purpose: str) -> list[list[list[int]]]:
    """Return the units of each site as lists of row indices. Every unit is at exactly one site."""
    rng = generator(seed, "deal", purpose)
    dealt: list[list[list[int]]] = [[] for _ in range(sites)]
    for kind, units in sorted(pool.members().items(), key=lambda item: str(item[0])):
        order = [units[index] for index in rng.permutation(len(units))]
        sizes = apportion(len(units), shares.get(kind, shares[None]))
        ends = np.cumsum(sizes)
        for site, (end, size) in enumerate(zip(ends, sizes, strict=True)):
            dealt[site] += order[end - size : end]
    return dealt


def apportion(count: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Split `count` into whole parts by the largest-remainder method: each is less than one away from its share.

    The first of equal remainders is rounded upwards.
    """
    exact = count * shares
    parts = np.floor(exact).astype(np.int64)
    missing = count - int(parts.sum())
    parts[np.argsort(parts - exact, kind="stable")[:missing]] += 1
    return parts


def level(dealt: Sequence[list[list[int]]], least: int) -> None:
    """Move units, one at a time from the largest site, until every site has at least `least` units.

    Raises:
        StudyError: There are too few units.
    """
    total = sum(len(units) for units in dealt)
    if total < least * len(dealt):
        raise StudyError(
            f"simulation.partition: {len(dealt)} sites with at least {least} units (records or patients) each "
            f"need {least * len(dealt)} units, the pool has {total}",
            "use fewer sites, more data, or a smaller simulation.partition.least_units",
        )
    sizes = np.array([len(units) for units in dealt])
    for site in np.flatnonzero(sizes < least).tolist():
        while sizes[site] < least:
            largest = int(sizes.argmax())
            dealt[site].append(dealt[largest].pop())
            sizes[site] += 1
            sizes[largest] -= 1


def by_value(values: Sequence[Any], units: Sequence[Hashable], least: int) -> tuple[dict[str, list[int]], int]:
    """Return the rows of each site, one site for each value of a column, and the number of rows left out.

    All rows of a unit go to the site of its first row. Values with fewer than `least` units are left out.

    Raises:
        StudyError: Fewer than two values have enough units, or two values give the same site name.
    """
    home: dict[Hashable, Any] = {}
    rows: dict[Any, list[int]] = {}
    for index, (value, unit) in enumerate(zip(values, units, strict=True)):
        rows.setdefault(home.setdefault(unit, value), []).append(index)
    sizes = {value: len({units[index] for index in indices}) for value, indices in rows.items()}
    kept = {value: indices for value, indices in rows.items() if value is not None and sizes[value] >= least}
    if len(kept) < 2:
        raise StudyError(
            "simulation.partition.column: each value of the column becomes a site; "
            f"expected at least 2 values with {least} units or more, found {len(kept)}",
            "split by another column, or lower simulation.partition.least_units",
        )
    named = {site_name(value): indices for value, indices in kept.items()}
    if len(named) < len(kept):
        raise StudyError(
            "simulation.partition.column: two values of the column give the same site name, because only their letters "
            "and digits are used, without regard to case",
            "split by a column whose values differ in letters or digits",
        )
    return named, sum(len(indices) for value, indices in rows.items() if value not in kept)


def site_name(value: Any) -> str:
    """Return a value of a column as a site name: lower-case letters, digits and hyphens, at most 63 characters."""
    return re.sub(r"[^a-z0-9]+", "-", str(value).lower()).strip("-")[:_LONGEST_NAME].strip("-") or "unnamed"


def numbered_names(sites: int) -> list[str]:
    """Return the names `site-001`, `site-002` and so on; sorting keeps their order."""
    width = max(3, len(str(sites)))
    return [f"site-{number:0{width}d}" for number in range(1, sites + 1)]


def generator(seed: int, *purpose: str) -> np.random.Generator:
    """Return a random generator for one purpose of the partition, derived from the seed."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, "partition", *purpose)))
