"""Splits: every record at exactly one site, nobody's records at two, and the shares that were asked for."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.common.errors import StudyError
from privet.common.study.sections import NAME_PATTERN
from privet.simulations.data.partition import (
    Pool,
    apportion,
    by_value,
    deal,
    draw_shares,
    level,
    numbered_names,
    site_name,
)
from privet.simulations.data.scenario import Partition

pools = st.lists(st.tuples(st.integers(0, 40), st.sampled_from("abc")), min_size=1, max_size=120).map(
    lambda rows: Pool([unit for unit, _ in rows], [kind for _, kind in rows])
)
SECTIONS = {
    "iid": Partition(split="iid", sites=2),
    "dirichlet": Partition(split="dirichlet", sites=2, concentration=0.3),
    "quantity": Partition(split="quantity", sites=2, exponent=1.2),
}


@given(pools, st.integers(2, 30), st.sampled_from(sorted(SECTIONS)), st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_every_record_is_at_exactly_one_site_and_every_unit_too(pool: Pool, sites: int, split: str, seed: int) -> None:
    kinds = list(dict.fromkeys(pool.classes))
    shares = draw_shares(SECTIONS[split], sites, kinds, seed)
    dealt = deal(pool, shares, sites, seed, "train")
    rows = [row for units in dealt for unit in units for row in unit]
    assert sorted(rows) == list(range(len(pool.units)))
    homes = Counter(pool.units[unit[0]] for units in dealt for unit in units)
    assert set(homes.values()) == {1}
    assert deal(pool, shares, sites, seed, "train") == dealt


@given(st.integers(0, 500), st.integers(1, 40), st.integers(0, 2**32))
def test_parts_add_up_and_are_less_than_one_from_their_share(count: int, sites: int, seed: int) -> None:
    shares = np.random.default_rng(seed).dirichlet(np.full(sites, 0.3))
    parts = apportion(count, shares)
    assert parts.sum() == count
    assert (parts >= 0).all()
    assert np.abs(parts - count * shares).max() < 1 + 1e-9


@given(st.integers(2, 50), st.integers(0, 300), st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_iid_sites_differ_by_one_unit_at_most(sites: int, count: int, seed: int) -> None:
    pool = Pool(range(count), [None] * count)
    sizes = [len(units) for units in deal(pool, draw_shares(SECTIONS["iid"], sites, [None], seed), sites, seed, "x")]
    assert max(sizes) - min(sizes) <= 1


def test_sizes_follow_the_power_law() -> None:
    pool = Pool(range(10_000), [None] * 10_000)
    shares = draw_shares(SECTIONS["quantity"], 10, [None], 0)
    sizes = np.array([len(units) for units in deal(pool, shares, 10, 0, "train")])
    expected = np.arange(1, 11) ** -1.2
    assert np.abs(sizes - 10_000 * expected / expected.sum()).max() < 1


def test_a_small_concentration_gives_each_site_few_labels_and_a_large_one_all_alike() -> None:
    pool = Pool(range(6000), [index % 6 for index in range(6000)])

    def largest(concentration: float) -> float:
        section = Partition(split="dirichlet", sites=6, concentration=concentration)
        dealt = deal(pool, draw_shares(section, 6, range(6), 3), 6, 3, "train")
        counts = [Counter(pool.classes[unit[0]] for unit in units) for units in dealt if units]
        return float(np.mean([max(c.values()) / c.total() for c in counts]))

    assert largest(1000.0) < 0.25
    assert largest(0.05) > 0.6
    assert largest(1e-6) > 0.6  # where Dirichlet draws underflow


def test_sites_below_the_minimum_get_units_from_the_largest_and_none_is_lost() -> None:
    dealt = [[[index] for index in range(20)], [], [[20]]]
    level(dealt, 4)
    assert sorted(len(units) for units in dealt) == [4, 4, 13]
    assert sorted(row for units in dealt for unit in units for row in unit) == list(range(21))
    with pytest.raises(StudyError, match="need 24 units, the pool has 21"):
        level(dealt, 8)


def test_a_column_makes_a_site_of_each_value_with_enough_units() -> None:
    values = ["St. Mary"] * 6 + ["North"] * 5 + ["tiny"] + [None] * 3 + ["North"]
    units = [*range(11), 11, 12, 13, 14, 0]  # the last row is St. Mary's first patient
    found, left = by_value(values, units, 4)
    assert found == {"st-mary": [0, 1, 2, 3, 4, 5, 15], "north": [6, 7, 8, 9, 10]}
    assert left == 4
    with pytest.raises(StudyError, match="at least 2 values with 6 units or more, found 1"):
        by_value(values, units, 6)
    with pytest.raises(StudyError, match="same site name"):
        by_value(["a b", "a-b"] * 5, range(10), 2)


@given(st.text(max_size=80))
@settings(max_examples=40)
def test_a_sites_name_is_one_that_studies_accept(value: str) -> None:
    assert re.fullmatch(NAME_PATTERN, site_name(value))


def test_numbered_names_sort_as_they_count() -> None:
    assert numbered_names(1000) == sorted(numbered_names(1000))
    assert numbered_names(2) == ["site-001", "site-002"]
