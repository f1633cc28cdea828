"""The accountants agree in the order they must: a committed table, and closed forms that need no accountant.

`benchmarks/accountants.py` makes the table, and computes all of it again; here a few lines are. True epsilon lies below
all of its columns: `pld` rounds up on a fine mesh and is nearly exact; `prv`, which privet reports, adds its error of
0.01; `rdp` is looser by nature.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from accountants import (
    BEYOND,
    CASES,
    COLUMNS,
    FILE,
    PACKAGES,
    TOO_LARGE,
    apart,
    checks_of,
    exact,
    gaussian_log_delta,
    of_all_units,
    of_one_step,
    opacus_prv,
    row,
    sampled_log_delta,
    solved,
    tolerance,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from privet.common.privacy.accounting import PrivacyEvent, epsilon

TABLE = json.loads(FILE.read_text(encoding="utf-8"))
ROWS: list[dict[str, Any]] = TABLE["cases"]
BEYOND_ROWS: list[dict[str, Any]] = TABLE["beyond"]

# Opacus asks PRV for an error of 0.01 in epsilon and reports the upper end. Numerical integration and a mesh of
# 0.01 / sqrt(steps) add up to 0.01 % of epsilon.
PRV_ERROR = 0.01


def named(line: dict[str, Any]) -> str:
    return f"{line['name']} {line['history']} {line['delta']}".replace(" ", "_")


# --- closed forms ----------------------------------------------------------------------------------------


def test_the_closed_forms_are_right() -> None:
    # Balle and Wang (2018), figure 1's setting: at delta 1e-5, sigma 1 costs 4.3772 (scipy's quad of the hockey
    # stick gives the same); a rate of 1 is no sampling.
    assert solved(lambda eps: gaussian_log_delta(1.0, eps), 1e-5) == pytest.approx(4.377180, abs=1e-5)
    for z in (0.5, 2.0, 8.0):
        whole = solved(lambda eps, z=z: gaussian_log_delta(1 / z, eps), 1e-6)
        assert solved(lambda eps, z=z: sampled_log_delta(z, 1 - 1e-12, eps), 1e-6) == pytest.approx(whole, abs=1e-6)
    # By brute force: the hockey stick divergence summed over a grid of outputs.
    z, q, eps = 0.7, 0.2, 1.0
    grid = [i * 1e-3 - 8 for i in range(17_000)]
    without = [norm.pdf(x, scale=z) for x in grid]
    having = [(1 - q) * p + q * norm.pdf(x - 1, scale=z) for x, p in zip(grid, without, strict=True)]
    sums = [
        sum(max(0.0, p - math.exp(eps) * r) for p, r in zip(a, b, strict=True)) * 1e-3
        for a, b in ((having, without), (without, having))
    ]
    assert math.exp(sampled_log_delta(z, q, eps)) == pytest.approx(max(sums), rel=1e-4)


# --- the committed table ---------------------------------------------------------------------------------


def test_the_table_covers_what_studies_are_and_more() -> None:
    assert len(ROWS) >= 36
    mechanisms = [mechanism for line in ROWS for mechanism in line["history"]]
    noises, rates, steps = zip(*mechanisms, strict=True)
    assert (min(noises), max(noises)) == (0.5, 8.0)
    assert (min(rates), max(rates)) == (1e-4, 1.0)
    assert (min(steps), max(steps)) == (1, 100_000)
    assert {line["delta"] for line in ROWS} == {1e-5, 1e-6, 1e-8}
    assert sum(len(line["history"]) > 1 for line in ROWS) >= 3
    assert sum(of_all_units(line) for line in ROWS) >= 8
    assert set(TABLE["versions"]) == set(PACKAGES)


def test_the_table_is_of_the_cases_in_the_script() -> None:
    for lines, cases in ((ROWS, CASES), (BEYOND_ROWS, BEYOND)):
        found = [(line["name"], [tuple(m) for m in line["history"]], line["delta"]) for line in lines]
        assert found == cases


@pytest.mark.parametrize("line", ROWS, ids=named)
def test_prv_lies_above_pld_by_its_own_error_and_rdp_above_both(line: dict[str, Any]) -> None:
    prv, pld = line["prv"], line["pld"]
    assert 0 <= pld <= prv <= pld + PRV_ERROR * 1.1 + 1e-4 * pld
    for rdp in (line["rdp"], line["rdp_dp_accounting"]):
        assert rdp >= prv - PRV_ERROR * 1.1
        assert rdp >= pld
    # RDP is looser, but of the same size: by 2.5 where one rare event is all that costs.
    assert line["rdp"] <= 1.25 * pld + 2.1


@pytest.mark.parametrize("line", [line for line in ROWS if of_all_units(line) or of_one_step(line)], ids=named)
def test_no_accountant_says_less_than_the_closed_form(line: dict[str, Any]) -> None:
    truth = exact(line)
    assert truth <= line["prv"] <= truth + PRV_ERROR * 1.1 + 1e-4 * truth
    assert truth - 1e-6 <= line["pld"] <= truth + 1e-3
    assert line["rdp"] >= truth
    assert line["rdp_dp_accounting"] >= truth


def test_composing_costs_more_than_each_and_less_than_the_sum() -> None:
    line = next(line for line in ROWS if line["name"] == "two studies")
    alone = [epsilon([PrivacyEvent(z, q, steps, "record")], line["delta"]) for z, q, steps in line["history"]]
    assert max(alone) < line["prv"] < sum(alone)
    # One accountant over both studies, round by round in any order, says the same.
    rounds = [PrivacyEvent(z, q, steps // 3, "record") for _ in range(3) for z, q, steps in line["history"]]
    assert epsilon(rounds, line["delta"]) == pytest.approx(line["prv"], abs=1e-6)


# Every kind of history, and the least and the most of each setting.
KEPT = [
    ("one step, all units", [(0.5, 1.0, 1)], 1e-5),
    ("one step, all units", [(8.0, 1.0, 1)], 1e-8),
    ("one step", [(0.5, 0.0001, 1)], 1e-5),
    ("rounds of all units", [(4.0, 1.0, 10)], 1e-6),
    ("a study", [(0.8, 0.1, 50)], 1e-5),
    ("tiny rate", [(0.5, 0.001, 100)], 1e-8),
    ("many steps", [(2.0, 0.001, 100000)], 1e-8),
    ("two studies", [(1.0, 0.03125, 192), (1.5, 0.0625, 96)], 1e-5),
    ("training and validation", [(0.8, 0.01, 500), (8.0, 1.0, 10)], 1e-6),
]


def test_what_is_computed_again_here_is_of_every_kind_and_extreme() -> None:
    assert {name for name, _, _ in KEPT} >= {name for name, _, _ in CASES} - {"years"}  # two studies, and more

    def extremes(cases: list[Any]) -> list[tuple[float, float]]:
        columns = zip(*(mechanism for _, history, _ in cases for mechanism in history), strict=True)
        return [(min(column), max(column)) for column in columns]

    assert extremes(KEPT) == extremes(CASES)
    assert {delta for _, _, delta in KEPT} == {delta for _, _, delta in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("case", KEPT, ids=lambda case: str(case).replace(" ", ""))
def test_computing_the_table_again_gives_the_same(case: tuple[str, Any, float]) -> None:
    committed, found = ROWS[CASES.index(case)], row(*case)
    assert {name: apart(found[name], committed[name], tolerance(TABLE)) <= 1 for name in COLUMNS} == dict.fromkeys(
        COLUMNS, True
    )


def test_the_benchmark_notices_any_other_figure() -> None:
    assert [check for check in checks_of(TABLE, TABLE) if not check.met] == []
    for part, column in (*(("cases", column) for column in COLUMNS), ("beyond", "reported"), ("beyond", "opacus_prv")):
        for more in (0.1, -0.1):
            line = {**TABLE[part][4], column: TABLE[part][4][column] + more}
            table = {**TABLE, part: [*TABLE[part][:4], line, *TABLE[part][5:]]}
            assert [check.name for check in checks_of(table, TABLE) if not check.met], (part, column, more)


# --- where the accountant itself fails -------------------------------------------------------------------


@pytest.mark.parametrize("line", BEYOND_ROWS, ids=named)
def test_what_is_reported_is_never_below_the_truth_nor_no_number(line: dict[str, Any]) -> None:
    history = [PrivacyEvent(z, q, steps, "record") for z, q, steps in line["history"]]
    found = epsilon(history, line["delta"])
    assert math.isfinite(found)
    assert found == pytest.approx(line["reported"], rel=1e-6, abs=1e-6)
    assert exact(line) <= found <= 1.1 * exact(line) + 0.5
    assert found <= epsilon(history, line["delta"], "rdp")


def test_the_accountant_alone_would_say_too_little() -> None:
    # If these no longer hold, the guard in `privacy.epsilon` can go.
    by_name: dict[str, list[dict[str, Any]]] = {}
    for line in BEYOND_ROWS:
        by_name.setdefault(line["name"], []).append(line)
    assert all(line["opacus_prv"] < exact(line) - 0.05 for line in by_name["float64 is too coarse"])
    assert all(line["opacus_prv"] < 0 for line in by_name["below zero"])
    assert all(line["opacus_prv"] is None for line in by_name["the grid overflows"])
    assert set(by_name) == {"float64 is too coarse", "below zero", "the grid overflows", TOO_LARGE}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", [BEYOND_ROWS[1], BEYOND_ROWS[4]], ids=named)
def test_the_accountant_alone_still_says_so(line: dict[str, Any]) -> None:
    found = opacus_prv([tuple(mechanism) for mechanism in line["history"]], line["delta"])
    assert found == pytest.approx(line["opacus_prv"], abs=0.05)  # rounding errors are the processor's


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.floats(-1.3, 1.0), st.floats(0, 5.3), st.floats(-12, -1.1))
def test_for_any_delta_and_any_number_of_releases_the_truth_is_covered(mu: float, steps: float, delta: float) -> None:
    count = round(10**steps)
    z = max(0.3, math.sqrt(count) / 10**mu)
    found = epsilon([PrivacyEvent(z, 1.0, count, "record")], 10**delta)
    assert exact({"history": [(z, 1.0, count)], "delta": 10**delta}) <= found < math.inf
