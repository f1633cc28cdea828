"""Accounting: epsilons against other implementations and closed forms, calibration that meets its target."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from privet.common.errors import StudyError
from privet.common.privacy import accounting
from privet.common.privacy.accounting import PrivacyEvent, epsilon, noise_multiplier, plan
from privet.common.study.study import Study

DELTA = 1e-5
RATE = 1 / 32


def event(z: float = 1.0, rate: float = RATE, steps: int = 192) -> PrivacyEvent:
    return PrivacyEvent(z, rate, steps, "record")


def elsewhere(events: list[PrivacyEvent], delta: float, accountant: Any) -> float:
    """Return epsilon by Google's dp-accounting, an independent implementation."""
    for each in events:
        step = PoissonSampledDpEvent(each.sampling_rate, GaussianDpEvent(each.noise_multiplier))
        accountant.compose(step, each.steps)
    return float(accountant.get_epsilon(delta))


def pld() -> Any:
    return PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)


def gaussian_epsilon(z: float, steps: int, delta: float) -> float:
    """Return the exact epsilon of unsampled Gaussian releases (Balle and Wang 2018, theorem 8)."""
    mu = steps**0.5 / z

    def excess(eps: float) -> float:
        return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)) - delta

    return float(brentq(excess, 0, 100))


def study(privacy: dict[str, Any], validation_fraction: float = 0.0, rounds: int = 4) -> Study:
    return Study.parse(
        {
            "name": "s",
            "model": {"base": "b", "sha256": {"model.safetensors": "0" * 64}},
            "task": {"kind": "causal-lm"},
            "data": {
                "columns": {"prompt": "p", "answer": "a"},
                "unit": "patient",
                "validation_fraction": validation_fraction,
            },
            "lora": {"targets": ["q"]},
            "training": {"learning_rate": 0.1, "rounds": rounds, "local_steps": 10, "sampling_rate": 0.1},
            "privacy": privacy,
            "secure_aggregation": {"mode": "plain"},
        }
    )


LOCAL = {"mode": "local", "epsilon": 2.0, "delta": 1e-4, "clip_norm": 1.0}


# --- epsilon ---------------------------------------------------------------------------------------------


def test_known_values() -> None:
    # Opacus 1.6's own accountants, run apart from this package.
    assert epsilon([event()], DELTA) == pytest.approx(2.8844, abs=1e-3)
    assert epsilon([event()], DELTA, "rdp") == pytest.approx(3.3146, abs=1e-3)
    assert epsilon([event(steps=64)], DELTA) == pytest.approx(1.8868, abs=1e-3)
    assert epsilon([event(z=0.6)], DELTA) == pytest.approx(10.19, abs=1e-2)
    assert epsilon([event(z=1.5)], DELTA) == pytest.approx(1.3872, abs=1e-3)


@pytest.mark.parametrize(
    ("z", "rate", "steps", "delta"), [(1.0, RATE, 192, DELTA), (0.8, 0.1, 50, 1e-4), (2.0, 0.3, 20, 1e-6)]
)
def test_epsilon_agrees_with_an_independent_accountant(z: float, rate: float, steps: int, delta: float) -> None:
    found = epsilon([event(z, rate, steps)], delta)
    expected = elsewhere([event(z, rate, steps)], delta, pld())
    # Both are upper bounds; PRV's adds its numerical error of at most 0.01.
    assert expected - 1e-3 <= found <= expected + 0.02
    rdp = elsewhere([event(z, rate, steps)], delta, RdpAccountant(neighboring_relation=pld().neighboring_relation))
    assert epsilon([event(z, rate, steps)], delta, "rdp") == pytest.approx(rdp, rel=1e-2)


@pytest.mark.parametrize(("z", "steps"), [(5.0, 1), (10.0, 40), (3.0, 4)])
def test_epsilon_without_sampling_is_the_gaussian_mechanisms(z: float, steps: int) -> None:
    exact = gaussian_epsilon(z, steps, DELTA)
    assert exact - 1e-3 <= epsilon([event(z, 1.0, steps)], DELTA) <= exact + 0.02


def test_rounds_compose_as_one_run() -> None:
    whole = epsilon([event()], DELTA)
    assert epsilon([event(steps=64)] * 3, DELTA) == whole
    assert epsilon([event(steps=1)] * 192, DELTA) == whole
    # Adding the rounds' epsilons instead would double the price.
    assert 3 * epsilon([event(steps=64)], DELTA) > 1.9 * whole


@pytest.mark.slow
def test_different_mechanisms_compose_in_any_order() -> None:
    events = [event(1.0, RATE, 60), event(2.0, 0.1, 30), event(4.0, 1.0, 3)]
    found = epsilon(events, DELTA)
    expected = elsewhere(events, DELTA, pld())
    assert expected - 1e-3 <= found <= expected + 0.02
    for other in itertools.permutations(events):
        assert epsilon(other, DELTA) == pytest.approx(found, abs=1e-3)
    assert found < sum(epsilon([each], DELTA) for each in events)
    assert found > max(epsilon([each], DELTA) for each in events)


def test_nothing_released_costs_nothing_and_no_noise_costs_everything() -> None:
    assert epsilon([], DELTA) == 0.0
    assert epsilon([event(steps=0)], DELTA) == 0.0
    assert epsilon([event(z=0.0, steps=0)], DELTA) == 0.0
    assert epsilon([event(), event(z=0.0, steps=1)], DELTA) == math.inf
    assert epsilon([event(z=-1.0, steps=1)], DELTA, "rdp") == math.inf


def test_more_noise_costs_less_and_more_steps_or_sampling_cost_more() -> None:
    by_noise = [epsilon([event(z=z)], DELTA) for z in (0.7, 1.0, 2.0)]
    by_steps = [epsilon([event(steps=steps)], DELTA) for steps in (50, 192, 400)]
    by_rate = [epsilon([event(rate=rate)], DELTA) for rate in (0.01, RATE, 0.1)]
    assert by_noise == sorted(by_noise, reverse=True)
    assert by_steps == sorted(by_steps)
    assert by_rate == sorted(by_rate)


def test_an_event_says_everything_about_its_mechanism() -> None:
    assert PrivacyEvent(1.5, 0.25, 7, "patient").document() == {
        "mechanism": "poisson-subsampled-gaussian",
        "version": 1,
        "neighbouring": "add-or-remove-one-unit",
        "unit": "patient",
        "noise_multiplier": 1.5,
        "sampling_rate": 0.25,
        "steps": 7,
    }


# --- calibration -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("target", "known"), [(8.0, 0.657), (3.0, 0.983), (1.0, 1.895)])
def test_calibration_meets_its_target_and_wastes_nothing(target: float, known: float) -> None:
    z = noise_multiplier(target, DELTA, RATE, 192)
    assert z == pytest.approx(known, rel=1e-2)  # Opacus's own search stops 0.01 below the target
    assert epsilon([event(z=z)], DELTA) <= target
    assert epsilon([event(z=z * 0.998)], DELTA) > target


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps"), [(6.0, 1e-3, 0.5, 3), (0.3, 1e-6, 0.02, 30), (4.0, 1e-4, 1.0, 10)]
)
def test_calibration_holds_far_from_the_usual(target: float, delta: float, rate: float, steps: int) -> None:
    z = noise_multiplier(target, delta, rate, steps)
    assert epsilon([event(z, rate, steps)], delta) <= target < epsilon([event(z * 0.998, rate, steps)], delta)
    assert elsewhere([event(z, rate, steps)], delta, pld()) <= target


def test_next_to_no_noise_counts_as_none_and_is_never_chosen() -> None:
    # The accountant's grid would fill the memory there: a loose target must not end the process.
    assert epsilon([event(z=0.29, steps=1)], DELTA) == math.inf
    assert epsilon([event(z=0.05, steps=1)], DELTA, "rdp") == math.inf
    z = noise_multiplier(1000.0, DELTA, 0.01, 5)
    assert z == pytest.approx(0.3, rel=1e-2)
    assert epsilon([event(z, 0.01, 5)], DELTA) <= 1000.0


def test_a_promise_that_no_noise_can_keep_is_refused() -> None:
    with pytest.raises(StudyError, match="cannot be reached"):
        noise_multiplier(1e-9, DELTA, 0.1, 3)


# --- the plan of a study ---------------------------------------------------------------------------------


def test_a_study_without_privacy_has_no_plan() -> None:
    assert plan(study({"mode": "none"})) is None


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["record", "patient"])
def test_a_plan_spends_the_promised_epsilon_over_the_whole_study(unit: str) -> None:
    found = plan(study({**LOCAL, "unit": unit}))
    assert found is not None
    assert found.training.sampling_rate == 0.1
    assert found.training.steps == 10
    assert found.training.unit == unit
    assert found.validation is None
    assert (found.target, found.delta) == (2.0, 1e-4)
    spent = [found.spent(rounds) for rounds in range(5)]
    assert spent[0] == 0.0
    assert spent == sorted(spent)
    assert 0.99 * 2.0 < spent[4] <= 2.0
    z = found.training.noise_multiplier
    assert elsewhere([event(z, 0.1, 40)], 1e-4, pld()) <= 2.0


def test_validation_costs_its_own_units_and_both_stay_within_the_promise() -> None:
    with_it, without = plan(study(LOCAL, 0.2)), plan(study(LOCAL))
    assert with_it is not None
    assert without is not None
    assert with_it.training == without.training
    assert with_it.validation is not None
    assert (with_it.validation.sampling_rate, with_it.validation.steps) == (1.0, 1)
    assert gaussian_epsilon(with_it.validation.noise_multiplier, 4, 1e-4) <= 2.0
    for rounds in (1, 4):
        costs = [epsilon([each] * rounds, 1e-4) for each in (with_it.training, with_it.validation)]
        assert with_it.spent(rounds) == max(costs) <= 2.0


# --- what a calibration may cost -------------------------------------------------------------------------


def test_a_study_of_too_many_steps_is_refused_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "_calibrated", lambda *_: pytest.fail("calibrated"))
    with pytest.raises(StudyError, match="expected at most 65536 steps in all rounds"):
        noise_multiplier(8.0, 1e-5, 0.01, accounting.MOST_CALIBRATED_STEPS + 1)


@pytest.mark.parametrize(("largest", "refused"), [(math.inf, True), (20.0, False)])
def test_an_answer_and_a_refusal_are_computed_once(
    largest: float, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def reaches(history: Any, delta: float, target: float) -> bool:
        asked.append(history[0][0])
        return bool(asked[-1] > largest)

    monkeypatch.setattr(accounting, "_reaches", reaches)
    counts = []
    for _ in range(2):
        if refused:
            with pytest.raises(StudyError, match="cannot be reached"):
                noise_multiplier(0.0321, 1e-5, 0.5, 7)
        else:
            assert noise_multiplier(0.0322, 1e-5, 0.5, 7) == pytest.approx(20.0, rel=2e-3)
        counts.append(len(asked))
    assert 0 < counts[0] == counts[1] < 30


@pytest.mark.parametrize(("target", "rate", "steps"), [(8.0, 0.02, 300), (1.0, 1.0, 10), (40.0, 0.3, 30)])
def test_short_cuts_change_no_bit_of_a_calibration(
    target: float, rate: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting, "_LARGE_GRID", 2**12)
    quick = accounting._calibrated.__wrapped__(target, 1e-5, rate, steps)
    whole = lambda h, delta, most: accounting._epsilon(h, delta - accounting.SAMPLER_DELTA, "prv") <= most  # noqa: E731
    monkeypatch.setattr(accounting, "_reaches", whole)
    assert accounting._calibrated.__wrapped__(target, 1e-5, rate, steps) == quick
