"""Each sentence that derives one guarantee from another holds in a closed form. Sentence and test stay together.

A test names the sentence of `docs/privacy.md` that it is about by a phrase of it. Whoever changes the sentence finds
the test, and whoever deletes it fails the test. The closed forms need no accountant: releases of all units are one
Gaussian (Balle and Wang 2018, theorem 8), and one sampled step is a mixture of two.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accountants import gaussian_log_delta, sampled_log_delta, solved
from scipy.stats import norm

from privet.client.budget.accounts import Cost, Item, Limit, counted_epsilon, spending
from privet.client.budget.releases import cost_of_round
from privet.client.site import SiteConfig
from privet.common.masking.noise_shares import shared_noise
from privet.common.privacy.accounting import (
    SAMPLER_DELTA,
    PrivacyEvent,
    epsilon,
    filtered_epsilon,
    noise_multiplier,
    plan,
    replacing_epsilon,
    sampler_errors,
)
from tests.support.synthetic import study_of

PAGE = Path(__file__).parents[2] / "docs" / "privacy.md"
DELTA = 1e-5
# `prv` reports the upper end of its error of 0.01.
PRV = 0.0125
SHARED: dict[str, Any] = {
    "privacy": {"mode": "distributed", "epsilon": 3.0, "delta": DELTA, "clip_norm": 1.0},
    "training": {"local_steps": 1, "optimizer": "sgd", "learning_rate": 1.0, "sampling_rate": 1.0, "rounds": 4},
    "secure_aggregation": {"mode": "masked"},
    "cohort": {"min_sites": 3},
}


def says(*phrases: str) -> None:
    """Check that the page says something, whatever its line breaks."""
    text = re.sub(r"[\s>]+", " ", PAGE.read_text(encoding="utf-8"))
    for phrase in phrases:
        assert phrase in text, f"docs/privacy.md no longer says {phrase!r}: mend the sentence or this test"


def event(z: float, steps: int = 1, rate: float = 1.0) -> PrivacyEvent:
    return PrivacyEvent(z, rate, steps, "record")


def exact(mu: float, delta: float = DELTA) -> float:
    """Return the exact epsilon of a Gaussian mechanism of sensitivity `mu` deviations."""
    return solved(lambda eps: gaussian_log_delta(mu, eps), delta)


def gaussian_delta(mu: float, eps: float) -> float:
    return math.exp(gaussian_log_delta(mu, eps))


# --- the guarantee -----------------------------------------------------------------------------------------


def test_replacing_a_unit_is_group_privacy_and_at_the_same_delta_can_be_more_than_twice() -> None:
    says("within (2·epsilon, (1 + exp(epsilon))·delta)", "4.377 becomes 9.997", "can cost more than twice the epsilon")
    assert exact(1.0) == pytest.approx(4.377, abs=5e-4)
    assert exact(2.0) == pytest.approx(9.997, abs=5e-4)
    for z in (0.8, 1.0, 2.0, 5.0):
        one, replaced = exact(1 / z), exact(2 / z)
        assert gaussian_delta(2 / z, 2 * one) <= (1 + math.exp(one)) * DELTA
        assert gaussian_delta(2 / z, 2 * one) > DELTA  # so twice the epsilon is not enough at the same delta
        assert replaced - 1e-3 <= replacing_epsilon([[event(z)]], DELTA) <= replaced + PRV


def replaced_delta(z: float, q: float, eps: float) -> float:
    """Return delta of one sampled step in which a unit of gradient 1 is replaced by one of gradient -1."""
    grid = np.linspace(-1 - 12 * z, 1 + 12 * z, 400_001)
    old, new = ((1 - q) * norm.pdf(grid, 0, z) + q * norm.pdf(grid, at, z) for at in (1, -1))
    return float(np.maximum(old - math.exp(eps) * new, 0).sum() * (grid[1] - grid[0]))


@pytest.mark.parametrize(("z", "q"), [(1.0, 0.1), (0.7, 0.5), (2.0, 0.3)])
def test_so_it_is_with_sampling(z: float, q: float) -> None:
    says("within (2·epsilon, (1 + exp(epsilon))·delta)")
    one = solved(lambda eps: sampled_log_delta(z, q, eps), DELTA)
    assert replaced_delta(z, q, 2 * one) <= (1 + math.exp(one)) * DELTA
    same = replacing_epsilon([[event(z, 1, q)]], DELTA)
    assert replaced_delta(z, q, same) <= DELTA
    assert same >= 2 * one


def test_a_unit_replaced_across_the_sides_pays_no_more_than_two_of_the_costlier_one() -> None:
    says("the cost of replacing covers that")
    for training, validation in ((1.0, 1.0), (1.0, 3.0), (4.0, 1.0)):
        across = exact(math.hypot(1 / training, 1 / validation))
        found = replacing_epsilon([[event(training)], [event(validation)]], DELTA)
        assert across <= exact(2 / min(training, validation)) <= found + 1e-3


def test_a_unit_at_several_sites_pays_their_composition() -> None:
    says("A unit with data at several sites pays their composition")
    # K sites with T steps each are one Gaussian, of sqrt(K T) / z deviations.
    for sites, steps in ((2, 1), (4, 4), (9, 16)):
        found = epsilon([event(10.0, steps)] * sites, DELTA)
        assert exact(math.sqrt(sites * steps) / 10) - 1e-3 <= found <= exact(math.sqrt(sites * steps) / 10) + PRV


# --- why it holds ------------------------------------------------------------------------------------------


def test_steps_compose_to_one_gaussian() -> None:
    says("a study is an adaptive composition of (z, q) mechanisms: steps per round times rounds")
    for z, rounds, steps in ((5.0, 1, 4), (10.0, 10, 4), (40.0, 50, 20)):
        mu = math.sqrt(rounds * steps) / z
        assert exact(mu) - 1e-3 <= epsilon([event(z, steps)] * rounds, DELTA) <= exact(mu) + PRV


def test_sampling_makes_one_step_a_mixture() -> None:
    says("with step 1 a Poisson-subsampled one")
    for z, q in ((1.0, 0.01), (0.8, 0.2), (2.0, 0.5)):
        truth = solved(lambda eps, z=z, q=q: sampled_log_delta(z, q, eps), DELTA)
        found = epsilon([event(z, 1, q)], DELTA)
        assert truth - 1e-3 <= found <= truth + PRV + 1e-3 * truth
        assert truth < exact(1 / z)


def test_a_unit_pays_for_training_or_for_validation_and_epsilon_is_the_larger_cost() -> None:
    says("The unit then pays for one of the two mechanisms, and epsilon is the larger cost, not the sum")
    privacy = {"mode": "local", "epsilon": 3.0, "delta": DELTA, "clip_norm": 1.0}
    study = study_of(privacy=privacy, training={"sampling_rate": 1.0}, data={"validation_fraction": 0.2})
    mechanism = plan(study)
    assert mechanism is not None
    assert mechanism.validation is not None
    for rounds in (1, study.training.rounds):
        costs = [
            exact(math.sqrt(rounds * each.steps) / each.noise_multiplier)
            for each in (mechanism.training, mechanism.validation)
        ]
        assert max(costs) - 1e-3 <= mechanism.spent(rounds) <= max(costs) + PRV
        assert mechanism.spent(rounds) <= 3.0


# --- accounting --------------------------------------------------------------------------------------------


def test_several_studies_count_by_renyi_divergence_at_an_order_that_the_limit_fixes() -> None:
    says("applies to the sum of Rényi divergences at one order", "The order follows from the limit and delta alone")
    limit = 6.0
    nothing = filtered_epsilon([event(1e4)], DELTA, limit)
    slopes = {z: filtered_epsilon([event(z)], DELTA, limit) - nothing for z in (2.0, 4.0, 8.0)}
    # Without sampling the divergence is order / (2 z²) (Mironov 2017, corollary 3): the same order for all.
    orders = [2 * z**2 * slope for z, slope in slopes.items()]
    assert orders == pytest.approx([orders[0]] * 3, rel=1e-4)
    order = round(orders[0], 1)
    cost = math.log1p(-1 / order) - (math.log(DELTA) + math.log(order)) / (order - 1)
    assert filtered_epsilon([event(2.0, 3)], DELTA, limit) == pytest.approx(3 * order / 8 + cost, rel=1e-6)
    # It adds up whatever comes in between, and never says less than the truth.
    mixed = [event(2.0, 3), event(3.0, 2), event(1.0, 4, 0.05)]
    whole = filtered_epsilon(mixed, DELTA, limit)
    parts = sum(filtered_epsilon([each], DELTA, limit) - cost for each in mixed) + cost
    assert whole == pytest.approx(parts, rel=1e-9)
    for steps in (1, 4, 12):
        assert filtered_epsilon([event(3.0, steps)], DELTA, limit) >= exact(math.sqrt(steps) / 3)


@pytest.mark.parametrize("limit", [0.5, 1.0, 3.0, 8.0, 24.0])
def test_the_filter_costs_little_where_the_limit_is_reached(limit: float) -> None:
    says("It is the one with which the limit admits most noise without sampling")
    steps = next(n for n in range(1, 10**6) if filtered_epsilon([event(20.0, n)], DELTA, limit) > limit)
    assert exact(math.sqrt(steps - 1) / 20) <= limit
    assert exact(math.sqrt(steps) / 20) > 0.8 * limit


def test_one_study_counts_as_it_is_composed_and_two_by_the_filter() -> None:
    says("As soon as a ledger holds more than one study of a dataset")
    limit, cost = Limit("record", 6.0, DELTA), Cost(event(4.0))
    one = [Item("a", cost, True, 4)]
    assert exact(2 / 4) - 1e-3 <= counted_epsilon(one, limit) <= exact(2 / 4) + PRV
    two = [*one, Item("b", cost, False, 5)]
    assert counted_epsilon(two, limit) == filtered_epsilon([event(4.0, 9)], DELTA, 6.0) > exact(3 / 4)


# --- the sampler -------------------------------------------------------------------------------------------


def test_the_samplers_errors_are_within_what_the_page_says() -> None:
    says("at most 2·10^-5 in epsilon, and 10^-5·delta + 2^-66 in delta", "N up to 2^50, T up to 2^20")
    added, delta = sampler_errors(100.0)
    assert added <= 2e-5
    assert math.expm1(added / 2) <= 1e-5
    assert delta * math.exp(added) <= SAMPLER_DELTA == 2.0**-66
    assert pytest.approx(DELTA, rel=1e-14) == DELTA - SAMPLER_DELTA


@pytest.mark.parametrize(
    ("z", "steps", "delta"), [(1.0, 1, 1e-5), (10.0, 40, 1e-5), (2.0, 9, 1e-6), (50.0, 5000, 1e-8)]
)
def test_what_is_reported_has_room_for_the_samplers_errors(z: float, steps: int, delta: float) -> None:
    says("What is relative is within the 0.009 by which `prv` lies above the truth")
    left = (delta - SAMPLER_DELTA) * (1 - 1e-5)
    assert exact(math.sqrt(steps) / z, left) + 2e-5 <= epsilon([event(z, steps)], delta)


def test_a_delta_that_the_sampler_may_exceed_promises_nothing() -> None:
    says("Epsilons and noise multipliers are computed at delta - 2^-66")
    assert epsilon([event(4.0)], SAMPLER_DELTA) == math.inf
    assert filtered_epsilon([event(4.0)], SAMPLER_DELTA, 3.0) == math.inf
    assert epsilon([event(4.0)], 4 * SAMPLER_DELTA) < math.inf


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps", "known"),
    # Computed before anything was left for the sampler: no study's noise has moved.
    [
        (8.0, 1e-3, 0.5, 16, 1.1337890625),
        (8.0, 1e-3, 1.0, 8, 1.359375),
        (3.0, 1e-5, 1.0, 8, 3.9453125),
        (3.0, 1e-5, 1.0, 4, 2.791015625),
    ],
)
def test_noise_multipliers_are_what_they_were(
    target: float, delta: float, rate: float, steps: int, known: float
) -> None:
    assert noise_multiplier(target, delta, rate, steps) == known


# --- noise in shares ---------------------------------------------------------------------------------------


def test_a_sum_over_m_honest_sites_has_the_noise_that_is_charged() -> None:
    says("if at least n - t_drop - c sites add their noise", "s = z·C/√m", "*More than m honest sites* are m")
    study = study_of(**SHARED)
    mechanism = plan(study)
    assert mechanism is not None
    z = mechanism.training.noise_multiplier
    for sites in (3, 9, 40):
        shares = shared_noise(study, sites)
        assert math.sqrt(shares.helpers) * shares.own_multiplier == pytest.approx(z, rel=1e-12)
        for present in range(shares.survivors, sites + 1):
            assert shares.effective_multiplier(present) >= z * (1 - 1e-12)
        rounds = study.training.rounds
        assert mechanism.spent(rounds) == pytest.approx(exact(math.sqrt(rounds) / z), abs=PRV)


def test_the_ledger_has_one_total_for_shared_noise_and_one_for_a_sites_own_share() -> None:
    says("The first holds against the coordinator with up to c corrupt sites", "with the noise multiplier z/√m")
    says("A limit applies to the first", "it counts as nothing, and the second total is infinite")
    study, limit = study_of(**SHARED), Limit("record", 3.0, DELTA)
    site = SiteConfig(name="north", train=(Path("x.csv"),))
    cost, shares = cost_of_round(study, site, sites=9), shared_noise(study, 9)
    assert cost is not None
    assert (cost.own_multiplier, cost.corrupt) == (shares.own_multiplier, shares.corrupt)
    z = cost.training.noise_multiplier
    found = spending("notes", limit, [Item("a", cost, True, 4)], (1, ""))
    assert found.epsilon == pytest.approx(exact(2 / z), abs=PRV)
    assert found.everybody == pytest.approx(exact(2 * math.sqrt(shares.helpers) / z), abs=PRV)
    assert found.counted == found.epsilon
    assert found.corrupt == shares.corrupt
    old = replace(cost, own_multiplier=None, corrupt=None)
    found = spending("notes", limit, [Item("a", cost, True, 3), Item("a", old, True, 1)], (1, ""))
    assert found.epsilon == pytest.approx(exact(2 / z), abs=PRV)
    assert (found.everybody, found.corrupt) == (math.inf, None)


def test_shares_of_a_whole_study_cost_at_most_epsilon_alone() -> None:
    says("the noise with which a site's shares of the whole study cost epsilon 20 against everybody")
    for alone in (4.0, 20.0):
        study = study_of(**{**SHARED, "privacy": {**SHARED["privacy"], "epsilon_alone": alone}})
        for sites in (3, 9, 40):
            own = shared_noise(study, sites).own_multiplier
            assert exact(math.sqrt(study.training.rounds) / own) <= alone
