"""Rounds over a synthetic federation: what is learnt, who takes part, what is stated, when it stops."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.common.errors import DivergedError, StateError, TooFewSitesError
from privet.common.log.agreement import RoundStatement
from privet.common.masking.isolation import Isolation, drawn_cohort
from privet.common.study.adapter import Adapter
from privet.common.study.messages import Consent, Contribution, Failure, Message, Offer, RoundOpen
from privet.common.study.study import Study
from privet.server.rounds.consent import gather_participants
from privet.server.rounds.participants import Participant
from privet.server.rounds.rounds import run_study
from privet.server.rounds.run_log import Unlogged
from privet.server.rounds.state import RunDirectory, RunState
from privet.server.rounds.timing import Timing
from privet.server.rounds.watch import Watch
from tests.support.synthetic import (
    NAMES,
    PEFT_CONFIG,
    SPEC,
    A,
    Array,
    B,
    MemoryExchange,
    Site,
    exchange_of,
    flat,
    optima,
    product,
    quadratic,
    size,
    start_adapter,
    study_of,
    towards,
    towards_product,
    unlogged,
)

QUICK = Timing(gathering=0.0, round=5.0)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What survives a power cut is not the subject here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def run(
    path: Path, study: Study, exchange: MemoryExchange, start: Adapter | None = None
) -> tuple[RunState, list[Adapter]]:
    """Run a whole study; return its final state and the adapter of every round, the first one included."""
    adapter = start_adapter() if start is None else start
    directory = RunDirectory.create(path / "run", study, adapter, PEFT_CONFIG)
    seen = [adapter]
    state = run_study(Unlogged(directory), exchange, lambda statement, published: seen.append(published), QUICK)
    return state, seen


def contributions(exchange: MemoryExchange) -> list[list[Contribution]]:
    sent = [[m for m in replies.values() if isinstance(m, Contribution)] for replies in exchange.replies]
    return [sorted(messages, key=lambda m: m.site) for messages in sent if messages]


def trained_values(study: Study, received: Adapter, sent: Contribution) -> dict[str, Array]:
    """Return what a site had trained, by tensor, float64."""
    tensors = SPEC.trained(study.aggregation.method)
    parts = np.split(sent.update / sent.weight, np.cumsum([t.size for t in tensors])[:-1])
    return {t.name: received.values[t.name] + part.reshape(t.shape) for t, part in zip(tensors, parts, strict=True)}


def failing(rounds: set[int], answer: Message | None) -> Any:
    return lambda asked, honest: answer if isinstance(asked, RoundOpen) and asked.round in rounds else honest


# What is learnt


@pytest.mark.parametrize("weighting", ["declared", "equal"])
@pytest.mark.parametrize("method", ["fedavg", "ffa"])
def test_quadratic_sites_converge_to_the_weighted_mean_of_their_optima(
    method: str, weighting: str, tmp_path: Path
) -> None:
    study = study_of(training={"rounds": 20}, aggregation={"method": method, "weighting": weighting})
    exchange = quadratic(study)
    state, seen = run(tmp_path, study, exchange)
    weights = [10, 20, 30] if weighting == "declared" else [1, 1, 1]
    mean = np.average(optima(study, 3), axis=0, weights=weights)
    start = flat(study, start_adapter())
    for number, adapter in enumerate(seen):
        # Each round halves the distance, as the sites' step is half of their gradient.
        assert flat(study, adapter) == pytest.approx(mean + 0.5**number * (start - mean), abs=1e-6)
    assert flat(study, state.adapter) == pytest.approx(mean, abs=1e-5)
    assert state.round == 20
    assert state.stopped


def test_ffa_keeps_a_bit_for_bit(tmp_path: Path) -> None:
    study = study_of(aggregation={"method": "ffa"})
    _, seen = run(tmp_path, study, quadratic(study))
    assert all(adapter.values[A].tobytes() == seen[0].values[A].tobytes() for adapter in seen)
    assert seen[-1].values[B].any()


def targets(seed: int = 3) -> list[Array]:
    return [np.random.default_rng(seed + i).standard_normal((4, 5)) for i in range(3)]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_fedsvd_makes_each_product_the_weighted_mean_of_the_sites_products(every: int, tmp_path: Path) -> None:
    study = study_of(training={"rounds": 6}, aggregation={"method": "fedsvd", "refactor_every": every})
    sites = [Site(NAMES[i], towards_product(target), weight=i + 1) for i, target in enumerate(targets())]
    exchange = exchange_of(*sites)
    _, seen = run(tmp_path, study, exchange)
    for number, sent in enumerate(contributions(exchange), start=1):
        before, after = seen[number - 1], seen[number]
        a = before.values[A].astype(np.float64)
        trained = [trained_values(study, before, c)[B] for c in sent]
        mean = np.average([b @ a for b in trained], axis=0, weights=[c.weight for c in sent])
        assert product(after) == pytest.approx(mean, abs=1e-5)
        if number % every == 0:
            gram = after.values[B].T @ after.values[B]
            assert abs(gram[0, 1]) < 1e-5 * np.trace(gram)  # B = U S: columns at right angles
        else:
            assert after.values[A].tobytes() == before.values[A].tobytes()
        assert after.values[A] @ after.values[A].T == pytest.approx(np.eye(2), abs=1e-5)


@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm"])
def test_fedsvd_learns_the_same_products_as_ffa(optimizer: str, tmp_path: Path) -> None:
    found = {}
    for method in ("ffa", "fedsvd"):
        settings = {"method": method, "optimizer": optimizer, "momentum": 0.5, "learning_rate": 0.5}
        study = study_of(training={"rounds": 6}, aggregation=settings, cohort={"min_sites": 1})
        # A site more each round, so that the singular directions turn.
        sites = [Site(NAMES[i], towards_product(target)) for i, target in enumerate(targets())]
        sites[1].answer, sites[2].answer = failing({1}, None), failing({1, 2}, None)
        (tmp_path / method).mkdir()
        _, seen = run(tmp_path / method, study, exchange_of(*sites))
        found[method] = [product(adapter) for adapter in seen]
    # From one orthonormal A, plain gradients and momentum do not notice a rotation of its rows.
    assert np.array(found["fedsvd"]) == pytest.approx(np.array(found["ffa"]), abs=1e-5)


def test_naive_averaging_of_both_factors_misses_the_mean_product(tmp_path: Path) -> None:
    study = study_of(training={"rounds": 1}, aggregation={"method": "fedavg"})
    exchange = quadratic(study)
    _, seen = run(tmp_path, study, exchange)
    sent = contributions(exchange)[0]
    parts = [trained_values(study, seen[0], c) for c in sent]
    products = [part[B] @ part[A] for part in parts]
    exact = np.average(products, axis=0, weights=[c.weight for c in sent])
    assert np.abs(product(seen[1]) - exact).max() > 0.01


@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm", "fedadam", "fedyogi"])
def test_every_server_optimizer_comes_closer(optimizer: str, tmp_path: Path) -> None:
    rate = 0.1 if optimizer in ("fedadam", "fedyogi", "fedavgm") else 1.0
    study = study_of(
        training={"rounds": 25},
        aggregation={"method": "ffa", "optimizer": optimizer, "learning_rate": rate, "momentum": 0.5},
    )
    _, seen = run(tmp_path, study, quadratic(study))
    mean = np.average(optima(study, 3), axis=0, weights=[10, 20, 30])
    distances = [float(np.linalg.norm(flat(study, adapter) - mean)) for adapter in seen]
    assert distances[-1] < 0.3 * distances[0]


def test_server_momentum_carries_over_rounds(tmp_path: Path) -> None:
    settings = {"method": "ffa", "optimizer": "fedavgm", "momentum": 0.6, "learning_rate": 0.3}
    study = study_of(training={"rounds": 6}, aggregation=settings)
    _, seen = run(tmp_path, study, quadratic(study))
    mean = np.average(optima(study, 3), axis=0, weights=[10, 20, 30])
    value, buffer = flat(study, seen[0]), np.zeros(size(study))
    for adapter in seen[1:]:
        # Hsu et al. 2019: the sites' mean update is half of the distance.
        buffer = 0.6 * buffer + 0.5 * (mean - value)
        value = value + 0.3 * buffer
        assert flat(study, adapter) == pytest.approx(value, abs=1e-5)


def test_the_same_study_gives_the_same_bits_twice(tmp_path: Path) -> None:
    study = study_of(cohort={"fraction": 0.7}, aggregation={"method": "fedsvd", "optimizer": "fedavgm"})
    digests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        _, seen = run(tmp_path / name, study, quadratic(study, 4))
        digests.append([adapter.digest for adapter in seen])
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == len(digests[0])


# What goes over the wire, and what is stated


def test_each_round_opens_from_the_adapter_the_last_one_closed_with(tmp_path: Path) -> None:
    study = study_of()
    exchange = quadratic(study)
    state, seen = run(tmp_path, study, exchange)
    nonces = set()
    for number, (opened, statement) in enumerate(zip(exchange.rounds, state.statements, strict=True), start=1):
        message = opened[2]
        assert list(opened.values()) == [message] * 3
        assert message.round == number
        assert message.adapter_digest == seen[number - 1].digest == statement["adapter_before"]
        assert Adapter.read(SPEC, message.adapter).digest == message.adapter_digest
        assert statement["adapter_after"] == seen[number].digest
        assert Study.parse(dict(message.study)).digest == study.digest == statement["study"]
        assert list(message.cohort) == statement["cohort"] == statement["survivors"] == list(NAMES[:3])
        assert statement["nonce"] == message.nonce
        assert statement["round"] == number
        assert statement["privacy"] is None
        assert statement["metrics"] is None
        nonces.add(message.nonce)
    assert len(nonces) == 4
    assert all(len(bytes.fromhex(nonce)) == 16 for nonce in nonces)


def test_the_observer_sees_each_round_after_it_is_durable(tmp_path: Path) -> None:
    study = study_of()
    directory = RunDirectory.create(tmp_path / "run", study, start_adapter(), PEFT_CONFIG)
    seen: list[int] = []

    def observe(statement: RoundStatement, adapter: Adapter) -> None:
        state = RunDirectory.open(tmp_path / "run").load()
        assert state.round == statement["round"]
        assert state.adapter.digest == adapter.digest == statement["adapter_after"]
        seen.append(state.round)

    run_study(Unlogged(directory), quadratic(study), observe, QUICK)
    assert seen == [1, 2, 3, 4]


def validating(losses: Sequence[float], units: float = 10.0) -> Any:
    """Return sums of `units` units with the loss of each round, and half of them right."""
    return lambda number: (units, units * losses[number - 1] / 10.0, units / 2)


def test_validation_sums_become_means_over_all_sites(tmp_path: Path) -> None:
    study = study_of(training={"rounds": 2}, data={"validation_fraction": 0.1})
    found = optima(study, 2)
    sites = [
        Site("alder", towards(found[0]), metrics=lambda number: (30.0, 30 * 0.2, 30.0)),
        Site("birch", towards(found[1]), metrics=lambda number: (10.0, 10 * 0.6, 0.0)),
    ]
    state, _ = run(tmp_path, study, exchange_of(*sites))
    for statement in state.statements:
        # Losses travel as a tenth; the mean over 40 units of 30 x 2 and 10 x 6 is 3.
        assert statement["metrics"]["validation_loss"] == pytest.approx(3.0)
        assert statement["metrics"]["validation_accuracy"] == pytest.approx(0.75)


PRIVATE = {"mode": "local", "epsilon": 3.0, "delta": 1e-5, "clip_norm": 1.0}


@pytest.mark.parametrize("validation", [0.0, 0.1])
def test_epsilon_grows_round_by_round_and_ends_at_the_target(validation: float, tmp_path: Path) -> None:
    study = study_of(privacy=PRIVATE, data={"validation_fraction": validation})
    found = optima(study, 3)
    metrics = validating([1.0] * 4) if validation else (lambda number: ())
    exchange = exchange_of(*[Site(NAMES[i], towards(x), metrics=metrics) for i, x in enumerate(found)])
    state, _ = run(tmp_path, study, exchange)
    spent = [statement["privacy"]["epsilon"] for statement in state.statements]
    for site in NAMES[:3]:
        curve = [epsilon[site] for epsilon in spent]
        assert all(before < after for before, after in pairwise(curve))
        assert 0 < curve[0] < curve[-1] <= 3.0
        assert curve[-1] > 0.98 * 3.0
    for statement in state.statements:
        privacy = statement["privacy"]
        assert (privacy["target"], privacy["delta"], privacy["unit"]) == (3.0, 1e-5, "record")
        assert privacy["training"]["steps"] == study.training.steps
        assert (privacy["validation"] is None) == (validation == 0)


def test_a_site_pays_for_the_rounds_it_was_asked_into_and_no_others(tmp_path: Path) -> None:
    study = study_of(privacy=PRIVATE, cohort={"fraction": 0.5, "min_sites": 1})
    exchange = quadratic(study, 4)
    exchange.sites[2].answer = lambda asked, honest: (
        Failure("DataError", "broken", "") if isinstance(asked, RoundOpen) and asked.round > 1 else honest
    )
    state, _ = run(tmp_path, study, exchange)
    by_count: dict[int, set[float]] = {}
    for last in range(1, 5):
        epsilon = state.statements[last - 1]["privacy"]["epsilon"]
        for site in NAMES:
            count = sum(site in statement["cohort"] for statement in state.statements[:last])
            assert (site in epsilon) == (count > 0)
            if count:
                by_count.setdefault(count, set()).add(epsilon[site])
    assert all(len(values) == 1 for values in by_count.values())
    assert max(max(values) for values in by_count.values()) <= 3.0


# Sites that fail


@pytest.mark.parametrize("answer", [None, Failure("DivergedError", "not finite", "lower it")])
def test_a_site_that_fails_in_some_rounds_is_left_out_of_those(answer: Message | None, tmp_path: Path) -> None:
    study = study_of(training={"rounds": 4}, aggregation={"method": "ffa"})
    exchange = quadratic(study)
    exchange.sites[3].answer = failing({2, 3}, answer)
    state, seen = run(tmp_path, study, exchange)
    found, value = optima(study, 3), flat(study, seen[0])
    for number, statement in enumerate(state.statements, start=1):
        here = [0, 2] if number in (2, 3) else [0, 1, 2]
        assert statement["survivors"] == [NAMES[i] for i in here]
        assert list(statement["failures"]) == ([] if len(here) == 3 else ["birch"])
        mean = np.average([found[i] for i in here], axis=0, weights=[10 * (i + 1) for i in here])
        value = value + 0.5 * (mean - value)
        assert flat(study, seen[number]) == pytest.approx(value, abs=1e-5)


def test_too_few_deliveries_keep_the_last_round_and_can_be_resumed(tmp_path: Path) -> None:
    study = study_of(cohort={"min_sites": 3})
    directory = RunDirectory.create(tmp_path / "run", study, start_adapter(), PEFT_CONFIG)
    exchange = quadratic(study)
    exchange.sites[4].answer = failing({3}, None)
    with pytest.raises(TooFewSitesError, match=r"round 3: 2 of 3 sites delivered.*\n  cedar: the site did not answer"):
        run_study(Unlogged(directory), exchange, timing=QUICK)
    assert directory.load().round == 2
    resumed = run_study(Unlogged(directory), quadratic(study), timing=QUICK)
    (tmp_path / "whole").mkdir()
    whole, _ = run(tmp_path / "whole", study, quadratic(study))
    assert resumed.adapter.digest == whole.adapter.digest


@pytest.mark.parametrize("method", ["fedsvd", "ffa", "fedavg"])
def test_a_first_round_that_moves_nothing_is_an_error(method: str, tmp_path: Path) -> None:
    study = study_of(aggregation={"method": method})
    sites = [Site(name, lambda study, adapter: np.zeros(size(study))) for name in NAMES[:2]]
    with pytest.raises(StateError, match="did not change the adapter"):
        run(tmp_path, study, exchange_of(*sites))
    assert RunDirectory.open(tmp_path / "run").load().round == 0


def test_a_later_round_may_stand_still(tmp_path: Path) -> None:
    study = study_of(aggregation={"method": "ffa"})
    optimum = flat(study, start_adapter()) + 1.0
    _, seen = run(tmp_path, study, exchange_of(*[Site(name, towards(optimum, 1.0)) for name in NAMES[:2]]))
    assert seen[1].digest == seen[-1].digest


def test_an_aggregate_out_of_range_ends_the_run_and_keeps_the_last_adapter(tmp_path: Path) -> None:
    study = study_of(training={"rounds": 3}, aggregation={"method": "ffa"})

    def learn(study: Study, adapter: Adapter) -> Array:
        now = flat(study, adapter)
        return np.full(size(study), 1.0) if not now.any() else np.full(size(study), 3.4e38)

    study_fast = study_of(training={"rounds": 3}, aggregation={"method": "ffa", "learning_rate": 10.0})
    with pytest.raises(DivergedError):
        run(tmp_path, study_fast, exchange_of(*[Site(name, learn) for name in NAMES[:2]]))
    state = RunDirectory.open(tmp_path / "run").load()
    assert state.round == 1
    assert np.all(flat(study, state.adapter) == 10.0)


@pytest.mark.parametrize("metrics", [(1e308, 1e308, 1e308), (1.0, -1e308, 0.0), (float("inf"), 0.0, 0.0)])
def test_one_sites_metrics_cannot_break_the_federated_ones(metrics: tuple[float, ...], tmp_path: Path) -> None:
    study = study_of(data={"validation_fraction": 0.1}, training={"rounds": 2})
    found = optima(study, 3)
    sites = [Site(NAMES[i], towards(x), metrics=validating([2.0, 1.0])) for i, x in enumerate(found)]
    sites[0].metrics = lambda number: metrics
    state, _ = run(tmp_path, study, exchange_of(*sites))
    for statement, loss in zip(state.statements, (2.0, 1.0), strict=True):
        assert statement["survivors"] == ["birch", "cedar"]
        assert statement["metrics"]["validation_loss"] == pytest.approx(loss)


# Early stopping


def early(losses: Sequence[float], patience: int, path: Path) -> tuple[RunState, list[Adapter]]:
    study = study_of(training={"rounds": len(losses), "patience": patience}, data={"validation_fraction": 0.1})
    found = optima(study, 2)
    return run(
        path, study, exchange_of(*[Site(NAMES[i], towards(x), metrics=validating(losses)) for i, x in enumerate(found)])
    )


def test_early_stopping_returns_the_best_adapter(tmp_path: Path) -> None:
    # Round n validates what it starts from: round 3 finds the adapter of round 2 to be the best.
    state, seen = early([5.0, 4.0, 3.0, 3.5, 3.6, 1.0, 1.0], 2, tmp_path)
    assert state.stopped
    assert state.round == 5
    assert state.adapter.digest == seen[2].digest
    assert RunDirectory.open(tmp_path / "run").load().adapter.digest == seen[2].digest
    published = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert published == seen[2].data


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0]), min_size=2, max_size=6), st.integers(1, 3))
def test_patience_counts_rounds_without_a_better_loss(
    tmp_path_factory: pytest.TempPathFactory, losses: list[float], patience: int
) -> None:
    state, seen = early(losses, patience, tmp_path_factory.mktemp("early"))
    best, expected = 0, len(losses)
    for index, loss in enumerate(losses):
        if loss < losses[best]:
            best = index
        if index - best >= patience:
            expected = index + 1
            break
    assert state.round == expected
    gave_up = expected - 1 - best >= patience
    if gave_up:
        assert state.adapter.digest == seen[best].digest
    else:
        assert state.adapter.digest == state.statements[-1]["adapter_after"]


def test_a_run_that_ended_is_not_run_again(tmp_path: Path) -> None:
    state, _ = early([5.0, 6.0, 7.0, 8.0], 1, tmp_path)
    nobody = MemoryExchange({})
    again = run_study(Unlogged(RunDirectory.open(tmp_path / "run")), nobody, timing=QUICK)
    assert again.adapter.digest == state.adapter.digest
    assert nobody.asked == []


# Cohorts


def members_of(names: Sequence[str]) -> dict[str, Participant]:
    return {name: Participant(i, Consent(name, "d", "s", 1)) for i, name in enumerate(names, start=2)}


@given(
    st.lists(st.text("abcdefgh", min_size=1, max_size=3), min_size=1, max_size=12, unique=True),
    st.floats(0.01, 1.0),
    st.integers(1, 6),
    st.integers(0, 2**53 - 1),
    st.integers(1, 1000),
)
def test_a_cohort_is_the_fraction_and_at_least_the_minimum(
    names: list[str], fraction: float, least: int, seed: int, number: int
) -> None:
    study = study_of(cohort={"fraction": fraction, "min_sites": least}).model_copy(update={"seed": seed})
    members = members_of(names)
    cohort = drawn_cohort(study, number, sorted(members), Isolation())
    assert len(cohort) == min(len(names), max(least, round(fraction * len(names))))
    assert list(cohort) == sorted(cohort)
    assert set(cohort) <= members.keys()
    assert drawn_cohort(study, number, sorted(members, reverse=True), Isolation()) == cohort


def test_cohorts_differ_by_round_and_seed_and_treat_sites_alike() -> None:
    members = [f"s{i}" for i in range(10)]
    study = study_of(cohort={"fraction": 0.3, "min_sites": 1})
    drawn = [drawn_cohort(study, number, members, Isolation()) for number in range(1, 401)]
    other = [drawn_cohort(study.model_copy(update={"seed": 7}), n, members, Isolation()) for n in range(1, 401)]
    assert len(set(drawn)) > 90  # of 120
    assert drawn != other
    counts = [sum(name in cohort for cohort in drawn) for name in members]
    # 400 draws at 0.3: mean 120, standard deviation 9.2.
    assert all(abs(count - 120) < 5 * 9.2 for count in counts)


def test_only_the_cohort_is_asked(tmp_path: Path) -> None:
    study = study_of(cohort={"fraction": 0.5, "min_sites": 2}, training={"rounds": 6})
    exchange = quadratic(study, 4)
    state, _ = run(tmp_path, study, exchange)
    for opened, statement in zip(exchange.rounds, state.statements, strict=True):
        assert [NAMES[node - 2] for node in sorted(opened)] == statement["cohort"]
        assert len(opened) == 2
    assert len({tuple(s["cohort"]) for s in state.statements}) > 1


# Consent

OTHER_TERMS = "dogwood: the site consented to a different study or adapter layout, or declared no units"


def offered(*sites: Site, min_sites: int = 2, timeout: float = 0.0) -> tuple[dict[str, Participant], MemoryExchange]:
    study = study_of(cohort={"min_sites": min_sites})
    exchange = exchange_of(*sites)
    return gather_participants(exchange, unlogged(study), start_adapter(), timeout, {}), exchange


def plain(name: str, answer: Any = None) -> Site:
    site = Site(name, towards(np.zeros(1)), weight=5)
    return site if answer is None else replace(site, answer=answer)


def altered(**values: Any) -> Any:
    return lambda asked, honest: replace(honest, **values)


def test_consenting_sites_are_gathered_with_their_addresses() -> None:
    members, exchange = offered(plain("birch"), plain("alder"))
    assert {name: member.node for name, member in members.items()} == {"birch": 2, "alder": 3}
    assert all(member.consent.weight == 5 for member in members.values())
    study = study_of()
    assert [type(m) for m in exchange.asked[0].values()] == [Offer, Offer]
    assert exchange.asked[0][2] == Offer(study.document(), node="2")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda asked, honest: Failure("RefusedError", "the policy says no", "ask the site"), "the policy says no"),
        (
            altered(study_digest="sha256:" + "0" * 64),
            OTHER_TERMS,
        ),
        (
            altered(spec_digest="sha256:" + "0" * 64),
            OTHER_TERMS,
        ),
        (altered(weight=0), OTHER_TERMS),
        (altered(weight=-3), OTHER_TERMS),
        (altered(site="alder"), "alder: another process has consented under this site's name"),
        (
            lambda asked, honest: asked,
            "a site must answer the offer of a study with its consent, found a message of type offer",
        ),
    ],
)
def test_what_is_no_consent_to_this_study_does_not_count(answer: Any, said: str) -> None:
    bad = plain("dogwood", answer)
    members, _ = offered(plain("alder"), plain("birch"), bad)
    assert sorted(members) == ["alder", "birch"]
    with pytest.raises(TooFewSitesError) as caught:
        offered(plain("alder"), bad)
    assert "1 site consented to the study, but cohort.min_sites demands 2" in caught.value.message
    assert f"\n  unnamed site 2: {said}" in caught.value.message


def test_the_hint_of_a_refusal_is_passed_on() -> None:
    refusal = plain("alder", lambda asked, honest: Failure("RefusedError", "no", "write a policy"))
    with pytest.raises(TooFewSitesError) as caught:
        offered(refusal, refusal, timeout=0.0)
    assert caught.value.hint == "write a policy"


def test_no_one_at_all_is_too_few() -> None:
    with pytest.raises(TooFewSitesError, match="0 sites consented"):
        offered()


def test_no_round_is_opened_without_enough_consents(tmp_path: Path) -> None:
    study = study_of(cohort={"min_sites": 3})
    exchange = exchange_of(plain("alder"), plain("birch"))
    with pytest.raises(TooFewSitesError, match=r"2 sites consented to the study, but cohort\.min_sites demands 3"):
        run(tmp_path, study, exchange)
    assert exchange.rounds == []
    assert RunDirectory.open(tmp_path / "run").load().round == 0


def test_a_site_that_comes_late_is_waited_for() -> None:
    class Late(MemoryExchange):
        looks = 0

        def nodes(self) -> Sequence[int]:
            self.looks += 1
            return super().nodes()[: self.looks]

        def ask(self, requests: Mapping[int, Message], *, timeout: float) -> Iterable[tuple[int, Message]]:
            assert timeout > 0
            return super().ask(requests, timeout=timeout)

    exchange = Late({2: plain("alder"), 3: plain("birch")})
    members = gather_participants(exchange, unlogged(study_of()), start_adapter(), 30.0, {})
    assert sorted(members) == ["alder", "birch"]
    # Nobody is asked twice.
    assert [sorted(asked) for asked in exchange.asked if asked] == [[2], [3]]


def test_a_slow_site_does_not_keep_another_from_being_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_POLL", 0.01), ("_LOOK", 0.02), ("_AGAIN", 0.0)):
        monkeypatch.setattr(f"privet.server.rounds.consent.{name}", value)
    refused = 3
    told: list[Mapping[str, str]] = []

    class Slow(MemoryExchange):
        """Node 4 never answers, node 2 connects late, and node 3 is approved in between."""

        looks = 0

        def nodes(self) -> Sequence[int]:
            self.looks += 1
            return [node for node in super().nodes() if node != 2 or self.looks > 2]

    def answer(asked: Any, honest: Any) -> Any:
        nonlocal refused
        refused -= 1
        return Failure("RefusedError", "not approved", "") if refused >= 0 else honest

    slow = replace(plain("cedar"), answer=lambda asked, honest: None)
    exchange = Slow({2: plain("alder"), 3: plain("birch", answer), 4: slow})
    watch = Watch(lambda wait: told.append(wait.missing), lambda: {2: "alder", 3: "birch", 4: "cedar"})
    monkeypatch.setattr("privet.server.rounds.consent._FIRST", 0.05)
    members = gather_participants(exchange, unlogged(study_of()), start_adapter(), 30.0, {}, watch)
    assert sorted(members) == ["alder", "birch"]
    assert {"birch": "not approved", "cedar": ""} in told  # alder has connected and consented meanwhile


def test_a_site_that_leaves_while_others_are_waited_for_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privet.server.rounds.consent._POLL", 0.01)

    class Leaves(MemoryExchange):
        def nodes(self) -> Sequence[int]:
            return super().nodes() if not self.asked else [3]

    exchange = Leaves({2: plain("alder"), 3: plain("birch")})
    with pytest.raises(TooFewSitesError, match="1 site consented"):
        gather_participants(exchange, unlogged(study_of(cohort={"min_sites": 3})), start_adapter(), 0.1, {})


def test_only_the_sites_that_consented_take_part(tmp_path: Path) -> None:
    study = study_of()
    exchange = quadratic(study, 4)
    exchange.sites[5].answer = lambda asked, honest: Failure("RefusedError", "no", "")
    state, _ = run(tmp_path, study, exchange)
    assert all(sorted(opened) == [2, 3, 4] for opened in exchange.rounds)
    assert all(statement["cohort"] == list(NAMES[:3]) for statement in state.statements)
    assert all(math.isfinite(statement["seconds"]) for statement in state.statements)
