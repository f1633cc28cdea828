"""The bounds behind degree and threshold, against scipy, brute force and simulation."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from privet.common.errors import StudyError
from privet.common.secagg import graph, terms
from privet.common.secagg.graph import choose, quorum, tail_quantile


@given(population=st.integers(1, 400), data=st.data(), tries=st.integers(1, 400), bits=st.integers(1, 90))
@settings(max_examples=150, deadline=None)
def test_the_tail_quantile_is_the_least_number_within_the_bound(
    population: int, data: st.DataObject, tries: int, bits: int
) -> None:
    marked = data.draw(st.integers(0, population))
    drawn = data.draw(st.integers(1, population))
    m = tail_quantile(population, marked, drawn, tries, bits)
    target = -bits * math.log(2) - math.log(tries)

    def log_tail(at_least: int) -> float:
        return float(hypergeom.logsf(at_least - 1, population, marked, drawn))

    assert log_tail(m + 1) <= target + 1e-6 * abs(target)
    if m > 0:
        assert log_tail(m) > target - 1e-6 * abs(target)


def test_the_tail_quantile_is_exact_where_floating_point_is_not() -> None:
    # Pr[HG(100, 20, 31) = 20] is about 2^-43: neither side of it may be rounded away.
    exact = Fraction(math.comb(20, 20) * math.comb(80, 11), math.comb(100, 31))
    bits = int(-math.log2(exact))
    assert tail_quantile(100, 20, 31, 1, bits) < 20
    assert tail_quantile(100, 20, 31, 1, bits + 1) == 20


@given(n=st.integers(2, 64), data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_complete_graph_meets_the_active_condition(n: int, data: st.DataObject) -> None:
    corrupt = data.draw(st.integers(0, n - 2))
    room = n - max(quorum(n, corrupt), corrupt + 2)
    choice = choose(n, corrupt, room)
    assert choice.degree == 0
    assert 2 * choice.threshold > n + corrupt
    assert 2 * (choice.threshold - 1) <= n + corrupt
    assert n - room >= choice.threshold
    with pytest.raises(StudyError, match="can lose"):
        choose(n, corrupt, room + 1)


@pytest.mark.parametrize(
    ("n", "corrupt", "dropouts"), [(65, 6, 6), (100, 10, 10), (100, 20, 10), (200, 40, 20), (1000, 100, 100)]
)
def test_the_sparse_graph_meets_its_bounds_by_scipy(n: int, corrupt: int, dropouts: int) -> None:
    k, t = (choice := choose(n, corrupt, dropouts)).degree, choice.threshold
    h, w = k // 2, graph.window_minimum(n, corrupt, k, 80) - 1

    def log2_union(population: int, marked: int, drawn: int, above: int) -> float:
        return float(hypergeom.logsf(above, population, marked, drawn) / math.log(2) + math.log2(n))

    # No honest site has so many corrupt neighbours that both its secrets could be had: 2t > k + 1 + c_max.
    assert log2_union(n - 1, corrupt, k, 2 * t - k - 2) <= -82 + 1e-6
    # No window is all corrupt once it holds more than w survivors.
    assert log2_union(n, corrupt, h, w) <= -82 + 1e-6
    # Random drop-outs leave t neighbours and more than w in each window.
    assert log2_union(n - 1, dropouts, k, k - t) <= -20
    assert log2_union(n, dropouts, h, h - w - 1) <= -20
    # And k is the least that does.
    smaller = k - 2
    least = graph.least_threshold(n, corrupt, smaller, 80)
    assert not graph._survives(n, corrupt, dropouts, smaller, least, 80)


def build(n: int, degree: int, corrupt: int, seed: int) -> graph.Graph:
    return graph.build_graph(seed.to_bytes(32, "big"), tuple(range(n)), corrupt, degree, 80)


@given(n=st.integers(4, 40), data=st.data(), seed=st.integers(0, 2**64))
@settings(max_examples=60, deadline=None)
def test_the_graph_is_regular_and_mutual(n: int, data: st.DataObject, seed: int) -> None:
    degree = data.draw(st.sampled_from([0, *range(2, n + 4, 2)]))
    g = build(n, degree, 0, seed)
    for i in range(n):
        neighbours = g.neighbours(i)
        assert list(neighbours) == sorted(set(neighbours) - {i})
        assert len(neighbours) == (n - 1 if graph.is_complete(n, degree) else degree)
        assert all(i in g.neighbours(j) for j in neighbours)
        assert g.holders(i) == tuple(sorted((*neighbours, i)))


def connected(g: graph.Graph, sites: set[int]) -> bool:
    if not sites:
        return True
    reached, todo = set(), [min(sites)]
    while todo:
        i = todo.pop()
        if i not in reached:
            reached.add(i)
            todo += [j for j in g.neighbours(i) if j in sites]
    return reached == sites


def test_lists_without_a_gap_leave_the_honest_connected_whatever_the_dropouts() -> None:
    # By brute force over all drop-outs: with w as many as there are corrupt sites, as the rule has it here.
    n, degree, corrupt = 11, 6, 1
    g = build(n, degree, corrupt, 5)
    assert g.window == 2
    passed = 0
    for size in range(7):
        for dropped in itertools.combinations(range(n), size):
            alive = set(range(n)) - set(dropped)
            if g.holds_together(alive):
                passed += 1
                for bad in alive:
                    assert connected(g, alive - {bad})
    assert passed > 50


def test_a_cut_is_a_gap() -> None:
    g = build(20, 6, 0, 1)
    apart = {g.ring[p] for p in (0, 1, 2, 10, 11, 12)}
    assert not connected(g, set(g.ring) - apart)
    assert not g.holds_together(set(g.ring) - apart)
    assert g.thinnest_window(set(g.ring)) == 3
    assert g.thinnest_window(set(g.ring) - {g.ring[19], g.ring[0]}) == 1


def test_the_ring_is_a_random_permutation() -> None:
    # Which of two sites comes first after site 0 is a fair coin, and every place is equally likely.
    places = np.zeros(12)
    first = 0
    for seed in range(3000):
        ring = build(12, 4, 0, seed).ring
        places[ring.index(3)] += 1
        first += (ring.index(1) - ring.index(0)) % 12 < (ring.index(2) - ring.index(0)) % 12
    assert ((places - 250) ** 2 / 250).sum() < 40  # chi-square, 11 degrees of freedom, p < 4e-5
    assert abs(first - 1500) < 5 * math.sqrt(750)


def test_the_document_gives_the_parameters_that_the_code_chooses() -> None:
    text = (Path(__file__).parents[2] / "docs" / "secure-aggregation.md").read_text()
    table = text.split("| n | c | drop-outs |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) >= 10
    for line in table:
        n, corrupt, dropouts, k, t, q, kept = (int(cell.split()[0]) for cell in line.strip("|").split("|"))
        choice = choose(n, corrupt, dropouts)
        assert (choice.degree or n - 1, choice.threshold, quorum(n, corrupt), k + 1) == (k, t, q, kept)


def test_the_chosen_parameters_pass_the_sites_own_rules() -> None:
    for n, corrupt, dropouts in ((2, 0, 0), (3, 0, 1), (10, 2, 1), (64, 12, 6), (100, 20, 10), (300, 30, 30)):
        choice = choose(n, corrupt, dropouts)
        assert choice.threshold >= graph.least_threshold(n, corrupt, choice.degree, 80)
        assert terms.least_survivors(n, corrupt) == max(quorum(n, corrupt), corrupt + 2) <= n - dropouts


@pytest.mark.parametrize(("n", "corrupt", "dropouts"), [(1, 0, 0), (3, 2, 0), (3, 1, 1), (10, -1, 0), (100, 60, 30)])
def test_impossible_demands_are_refused(n: int, corrupt: int, dropouts: int) -> None:
    with pytest.raises(StudyError):
        choose(n, corrupt, dropouts)
