"""Finding who spoils: within the rounds that are promised, at the cost that is promised, and nobody else."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.common.masking.isolation import Isolation, Sums

Spoils = Callable[[frozenset[str]], bool]


def named(count: int) -> list[str]:
    return [f"site-{number:03d}" for number in range(count)]


def play(
    count: int, least: int, spoils: Spoils, seed: int, rounds: int
) -> tuple[Isolation, list[tuple[frozenset[str], bool]]]:
    """Play rounds over all sites that may be drawn, until a site is left out."""
    found, played = Isolation(), list[tuple[frozenset[str], bool]]()
    for number in range(1, rounds + 1):
        cohort = frozenset(found.choose(named(count), least, seed, number))
        assert len(cohort) >= min(least, count - len(found.left_out))
        bad = spoils(cohort)
        found.note(Sums(spoiled=(cohort,)) if bad else Sums(usable=(cohort,)))
        played.append((cohort, bad))
        if found.left_out:
            break
    return found, played


@settings(max_examples=150, deadline=None)
@given(st.integers(6, 70), st.integers(0, 69), st.integers(0, 2**32))
def test_one_that_always_spoils_is_left_out_soon_and_costs_the_others_little(
    count: int, culprit: int, seed: int
) -> None:
    name, least = named(count)[culprit % count], max(3, count // 3)
    found, played = play(count, least, lambda cohort: name in cohort, seed, 40)
    assert found.left_out == (name,)
    last = max(index for index, (cohort, _) in enumerate(played) if name in cohort)
    assert last <= math.ceil(math.log2(count)) + 2  # rounds after the first, which shows that somebody spoils
    assert len(played) == last + 2  # named by the first usable sum
    for honest in set(named(count)) - {name}:
        assert sum(bad for cohort, bad in played if honest in cohort) <= math.ceil(math.log2(count)) + 1


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 40), st.integers(0, 39), st.floats(0.1, 0.9), st.integers(0, 2**32))
def test_one_that_spoils_now_and_then_spoils_few_sums_and_nobody_else_is_named(
    count: int, culprit: int, often: float, seed: int
) -> None:
    name, draws = named(count)[culprit % count], random.Random(seed)
    found, played = play(count, 3, lambda cohort: name in cohort and draws.random() < often, seed, 3000)
    assert found.left_out == (name,)
    assert sum(bad for _, bad in played) <= math.ceil(math.log2(count)) + 2


@settings(max_examples=60, deadline=None)
@given(st.integers(6, 20), st.integers(0, 2**32))
def test_one_that_spoils_only_beside_its_victim_cannot_have_it_named_alone(count: int, seed: int) -> None:
    """It knows the cohort, so it spoils exactly where the victim takes part as well."""
    names = named(count)
    spoiler, victim = names[0], names[1]
    found, played = play(count, 3, lambda cohort: {spoiler, victim} <= cohort, seed, 400)
    assert victim not in found.left_out
    assert sum(bad for _, bad in played) <= math.ceil(math.log2(count)) + 1  # and it costs them no more than that


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("count", [8, 12, 20])
def test_two_that_always_spoil_are_both_left_out_and_nobody_else(count: int, seed: int) -> None:
    names, found = named(count), Isolation()
    spoilers = set(random.Random(seed).sample(names, 2))
    for number in range(1, 200):
        cohort = frozenset(found.choose(names, 3, seed, number))
        found.note(Sums(spoiled=(cohort,)) if cohort & spoilers else Sums(usable=(cohort,)))
        if found.left_out and not found.benched and not found.suspects:
            break
    assert set(found.left_out) == spoilers
    assert found.choose(names, 3, 5, 300) == tuple(sorted(set(names) - spoilers))


def test_without_a_spoiled_sum_everybody_takes_part() -> None:
    found = Isolation.after([Sums(usable=(frozenset(named(5)),))] * 3)
    assert found == Isolation()
    assert found.choose(named(5)[::-1], 3, 1, 4) == tuple(named(5))


def test_as_few_sites_as_a_round_needs_cannot_be_told_apart() -> None:
    found = Isolation.after([Sums(spoiled=(frozenset(named(3)),))] * 5)
    assert found.choose(named(3), 3, 1, 6) == tuple(named(3))
    assert (found.suspects, found.left_out) == (frozenset(named(3)), ())


def test_spoiled_sums_with_nobody_in_common_name_nobody() -> None:
    found = Isolation.after([Sums(spoiled=(frozenset(each),)) for each in (("a", "b"), ("c", "d"))])
    assert (found.suspects, found.left_out) == (frozenset("cd"), ())


@pytest.mark.parametrize("order", [1, -1])
def test_what_follows_depends_on_no_order_of_names(order: int) -> None:
    found = Isolation.after([Sums(spoiled=(frozenset(named(9)),))])
    assert found.choose(named(9)[::order], 3, 7, 2) == Isolation.after([Sums(spoiled=(frozenset(named(9)),))]).choose(
        named(9), 3, 7, 2
    )
