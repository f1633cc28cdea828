"""Rounds under secure aggregation: the plain rounds' result, nothing readable, drop-outs, attacks, groups."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privet.common.errors import DivergedError, PrivetError, ProtocolError, TooFewSitesError, VerificationError
from privet.common.masking import vector
from privet.common.masking.groups import groups_of
from privet.common.masking.parameters import parameters_of
from privet.common.masking.vector import vector_of
from privet.common.privacy import accounting
from privet.common.privacy.accounting import PrivacyEvent, PrivacyPlan
from privet.common.secagg import suites
from privet.common.secagg.encoding import decode, encode
from privet.common.secagg.messages import Advertise, Confirm, Masked, Parameters, Reveal, Roster, Shares
from privet.common.secagg.quantize import Layout, Values
from privet.common.secagg.terms import Floor
from privet.common.secagg.transcript import signed_bytes
from privet.common.study.adapter import Adapter, AdapterSpec
from privet.common.study.messages import Consent, Contribution, Failure, Message, Offer, RoundOpen, Secured
from privet.common.study.study import Study
from privet.server.rounds import statements
from privet.server.rounds.consent import gather_participants
from privet.server.rounds.rounds import run_study
from privet.server.rounds.run_log import Unlogged
from privet.server.rounds.state import RunDirectory, RunState
from tests.support import secagg_reference as reference
from tests.support.masked_world import (
    QUICK,
    REVEAL,
    STAGES,
    Answer,
    MaskedSite,
    Relay,
    exact_mean,
    federation,
    kind_of,
    masked_study,
    one_round,
    opened_for,
    signed_consent,
    silence,
    stage_of,
    tamper,
)
from tests.support.secagg_world import identity, pins
from tests.support.synthetic import (
    PEFT_CONFIG,
    SPEC,
    Array,
    Site,
    exchange_of,
    flat,
    optima,
    product,
    size,
    start_adapter,
    study_of,
    towards,
    towards_product,
    unlogged,
)

FFA = {"method": "ffa"}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What survives a power cut is not the subject here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def run(path: Path, study: Study, exchange: Any) -> tuple[RunState, list[Adapter]]:
    """Run or resume a study; return its final state and the adapters that were published, the first one included."""
    start = start_adapter()
    directory = RunDirectory.open(path) if path.exists() else RunDirectory.create(path, study, start, PEFT_CONFIG)
    seen = [start]
    state = run_study(Unlogged(directory), exchange, lambda statement, published: seen.append(published), QUICK)
    return state, seen


def change(study: Study, before: Adapter, after: Adapter) -> Array:
    return flat(study, after) - flat(study, before)


def last(state: RunState) -> Mapping[str, Any]:
    return state.statements[-1]


def names(*indices: int) -> list[str]:
    return [identity(index).name for index in indices]


# A level of the sums below is some 1e-5, single precision of an adapter 1e-7: this tells any two sums apart.
EXACT = 3e-7


# --- the same result -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["declared", "equal"])
@pytest.mark.parametrize("method", ["fedsvd", "ffa", "fedavg"])
def test_a_masked_federation_ends_where_the_plain_one_does(method: str, weighting: str, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "aggregation": {"method": method, "weighting": weighting, "optimizer": "fedavgm", "momentum": 0.3},
        "data": {"validation_fraction": 0.1},
        "training": {"rounds": 3},
    }
    masked, plain = masked_study(**sections), study_of(**sections, cohort={"min_sites": 3})
    targets = [np.random.default_rng(3 + i).standard_normal((4, 5)) for i in range(4)]
    found = optima(plain, 4)
    learners = [towards(x) for x in found] if method == "fedavg" else [towards_product(x) for x in targets]
    weights = [10, 20, 30, 40]

    def metrics(number: int) -> Sequence[float]:
        return (10.0, 10 * 0.3, 7.0)

    ended, seen = run(tmp_path / "m", masked, federation(masked, 4, learners=learners, metrics=metrics))
    sites = [Site(names(i)[0], learners[i], weights[i], metrics) for i in range(4)]
    reference, expected = run(tmp_path / "p", plain, exchange_of(*sites))
    assert ended.round == reference.round == 3
    for here, there in zip(seen, expected, strict=True):
        # Four sites, each less than a level of 60 x 8 / 2^18 off, over a weight of 100; halved from round to round.
        assert product(here) == pytest.approx(product(there), abs=3e-4)
        if method != "fedsvd":
            assert flat(masked, here) == pytest.approx(flat(plain, there), abs=3e-4)
    for said, before in zip(ended.statements, reference.statements, strict=True):
        assert said["type"] == "round-close"
        assert said["survivors"] == before["survivors"] == names(0, 1, 2, 3)
        assert said["metrics"] == pytest.approx(before["metrics"], abs=1e-3)
        assert (said["secure_aggregation"], before["secure_aggregation"]) == ("masked", "plain")
        assert [group["values_cut"] for group in said["masking"]] == [0]
        assert before["masking"] == []


def test_a_round_ends_at_the_exact_mean_of_what_the_vectors_carry() -> None:
    study = masked_study(aggregation=FFA)
    exchange = federation(study, 5, seed=None)
    state = one_round(study, exchange)
    mean = exact_mean(study, exchange, 1, names(0, 1, 2, 3, 4))
    assert change(study, start_adapter(), state.adapter) == pytest.approx(mean, abs=EXACT)
    real = np.average([0.5 * x for x in optima(study, 5)], axis=0, weights=[10, 20, 30, 40, 50])
    assert mean == pytest.approx(real - 0.5 * flat(study, start_adapter()), abs=5 * 60 * 8.0 / 2**17 / 150)
    assert np.abs(mean - real).max() > 0  # rounding is there, so that the comparison above means something


def test_the_same_study_and_seeds_give_the_same_bits_twice_and_other_seeds_other_bits(tmp_path: Path) -> None:
    svd = {"method": "fedsvd", "optimizer": "fedavgm"}
    study = masked_study(aggregation=svd, cohort={"fraction": 0.7}, training={"rounds": 2})
    digests = []
    for index, seed in enumerate((b"one", b"one", None)):
        _, seen = run(tmp_path / str(index), study, federation(study, 6, seed=seed))
        digests.append([adapter.digest for adapter in seen])
    assert digests[0] == digests[1]
    assert len({tuple(found) for found in digests}) == 2  # rounding differs, and with it the last bits


def test_values_beyond_the_bound_are_cut_and_the_statement_counts_them() -> None:
    study = masked_study(aggregation={**FFA, "largest_count": 10}, secure_aggregation={"bound": 0.5})
    update = np.linspace(-1.0, 1.0, size(study))
    exchange = federation(study, 3, learners=[lambda study, adapter: update] * 3, weights=[10, 10, 10])
    state = one_round(study, exchange)
    assert last(state)["masking"][0]["values_cut"] == 3 * int(np.sum(np.abs(update) > 0.5)) == 18
    found = change(study, start_adapter(), state.adapter)
    assert found == pytest.approx(np.clip(update, -0.5, 0.5), abs=1e-5)


def saturated(weights: Sequence[int], bound: float) -> tuple[Study, RunState]:
    """Run a round in which every site trained every value to 9, far beyond the study's bounds."""
    study = masked_study(
        aggregation={**FFA, "max_norm": None, "largest_count": max(weights)},
        secure_aggregation={"bound": bound, "head_bound": bound / 3},
    )
    learner = [lambda study, adapter: np.full(size(study), 9.0)] * len(weights)
    return study, one_round(study, federation(study, len(weights), learners=learner, weights=weights))


def test_a_mean_at_the_bound_everywhere_is_not_too_long() -> None:
    for bound, weight in ((0.1, 1), (0.3, 7), (0.3, 30), (0.7, 30), (1.1, 1)):
        study, state = saturated([weight] * 3, bound)
        assert last(state).get("reason") is None
        found = change(study, start_adapter(), state.adapter)
        assert found == pytest.approx([bound / 3] * 3 + [bound] * 8, rel=1e-4)


def test_every_site_is_cut_at_the_studys_bound_whatever_its_weight() -> None:
    # All three followed the study, and the norm check calls them dishonest.
    study, state = saturated([10, 20, 30], 0.5)
    assert last(state).get("reason") is None
    assert last(state)["masking"][0]["values_cut"] == 3 * size(study)


def test_sites_that_all_diverge_end_the_run(tmp_path: Path) -> None:
    study = masked_study(aggregation=FFA)
    learner = [lambda study, adapter: np.full(size(study), np.nan)] * 4
    with pytest.raises(DivergedError, match="not finite"):
        run(tmp_path / "run", study, federation(study, 4, learners=learner))
    assert RunDirectory.open(tmp_path / "run").load().round == 0


def test_a_site_that_diverges_is_left_out() -> None:
    study = masked_study(aggregation=FFA)
    learners = [towards(x) for x in optima(study, 6)]
    learners[2] = lambda study, adapter: np.full(size(study), np.inf)
    exchange = federation(study, 6, learners=learners)
    state = one_round(study, exchange)
    assert last(state)["survivors"] == names(0, 1, 3, 4, 5)
    assert last(state)["failures"] == {
        "site-0002": f"DivergedError: segment {SPEC.trained('ffa')[0].name} of the site's vector: "
        "a value is not finite (infinite or NaN)"
    }


# --- nothing readable ------------------------------------------------------------------------------------


def test_the_coordinator_receives_consents_and_secured_messages_alone(tmp_path: Path) -> None:
    study = masked_study(data={"validation_fraction": 0.1}, training={"rounds": 2})
    exchange = federation(study, 4, weights=[17, 23, 31, 41], metrics=lambda number: (17.0, 5.5, 12.25))
    run(tmp_path / "run", study, exchange)
    replies = [reply for replies in exchange.replies for reply in replies.values()]
    assert Counter(type(reply) for reply in replies) == {Consent: 4, Secured: 2 * 5 * 4}
    assert Counter(map(kind_of, replies)) == {0: 4, 2: 8, 4: 8, 6: 8, 8: 8, 10: 8}
    # What each site's own data gave: none of it stands in any of its messages, as numbers or as text.
    for site in exchange.sites.values():
        for sent in site.contributions.values():
            mine = b"".join(r.body for r in replies if isinstance(r, Secured))
            update = sent.update
            secrets = [update.tobytes()[:8], (update / sent.weight).astype("<f4").tobytes()[:8]]
            secrets += [value.tobytes() for value in update if value] + [sent.metrics.astype("<f8").tobytes()]
            secrets += [sent.metrics[1:2].tobytes(), b"5.5", b"12.25"]
            assert not any(secret in mine for secret in secrets)
    for reply in replies:
        if isinstance(reply, Secured):
            assert set(reply.parts().fields) == {"study", "round", "nonce"}
            assert reply.parts().blobs == {"body": reply.body, "statement": b""}


def masked_words(exchange: Relay, number: int) -> dict[int, Any]:
    """Return the words of each node's masked vector in a round."""
    found = {}
    for replies in exchange.replies:
        for node, reply in replies.items():
            if kind_of(reply) == 6 and isinstance(reply, Secured) and reply.round == number:
                found[node] = decode(Masked, reply.body).words
    return found


def test_the_control_messages_do_not_depend_on_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def encapsulate(public: bytes, *, whose: str) -> suites.Encapsulated:
        return suites.Encapsulated(*reference.mlkem_encapsulate(public, bytes(32)))

    monkeypatch.setattr(suites, "encapsulate", encapsulate)  # the library's takes no randomness from a caller
    # With the same randomness, two federations with different data differ in the masked words alone.
    bodies, words = [], []
    for scale in (0.01, 1.0):
        study = masked_study(aggregation=FFA, data={"validation_fraction": 0.1})
        learner = [lambda study, adapter, scale=scale: np.full(size(study), scale)] * 4
        exchange = federation(study, 4, learners=learner, metrics=lambda number, scale=scale: (9.0, scale, 9 * scale))  # type: ignore[misc]
        one_round(study, exchange)
        sent = [(node, reply) for replies in exchange.replies for node, reply in replies.items()]
        bodies.append([(node, reply.body) for node, reply in sent if kind_of(reply) not in (0, 6)])  # type: ignore[attr-defined]
        words.append(masked_words(exchange, 1))
    assert bodies[0] == bodies[1]
    assert len(bodies[0]) == 4 * 4
    assert all(not np.any(words[0][node] == words[1][node]) for node in words[0])


def test_equal_inputs_in_two_rounds_and_at_two_sites_have_independent_masks() -> None:
    # Were a mask used twice, the difference of two masked vectors of equal inputs would be that of their rounding.
    study = masked_study(aggregation={"method": "ffa", "learning_rate": 1e-12}, training={"rounds": 30})
    exchange = federation(study, 4, learners=[lambda study, adapter: np.full(size(study), 0.25)] * 4, weights=[9] * 4)
    state = RunState(0, start_adapter())
    for _ in range(20):
        state = one_round(study, exchange, state, offer=False)
    sent = [masked_words(exchange, number) for number in range(1, 21)]
    for node in exchange.sites:
        stack = np.array([words[node] for words in sent])
        assert len(np.unique(stack)) == stack.size
    differences = [sent[r][n] - sent[r - 1][n] for r in range(1, 20) for n in exchange.sites]
    differences += [sent[r][3] - sent[r][2] for r in range(20)]
    octets = np.frombuffer(np.concatenate(differences).tobytes(), np.uint8)
    assert octets.size > 3000
    assert stats.chisquare(np.bincount(octets, minlength=256)).pvalue > 1e-6  # masks are secret, so each run draws anew


# --- drop-outs -------------------------------------------------------------------------------------------

# Six sites, one of them corrupt: a quorum and threshold of four, so that two may drop out at any stage.
SIX = range(6)


def garbage(asked: Message, honest: Message) -> Message:
    return replace(honest, body=b"PSA\x01 garbage") if isinstance(honest, Secured) else honest


def forged(asked: Message, honest: Message) -> Message:
    """Sign with another key."""
    kind: Any = {2: Advertise, 4: Shares, 6: Masked, 8: Confirm, 10: Reveal}.get(kind_of(honest))
    if kind is None or not isinstance(honest, Secured):
        return honest
    message = decode(kind, honest.body)
    return replace(honest, body=encode(replace(message, signature=identity(9).key.sign(b"anything"))))


def refusal(asked: Message, honest: Message) -> Message:
    return Failure("RefusedError", "not this time", "ask again")


def in_the_clear(asked: Message, honest: Message) -> Message:
    return Contribution("site-0001", 1, "n", 20.0, np.zeros(11, np.float32), np.empty(0))


def fail(exchange: Relay, stages: Mapping[int, str], how: str, rounds: set[int] | None = None) -> None:
    """Let sites, by their number, fail at a stage."""
    heard: list[Message] = []

    def overheard(asked: Message, honest: Message) -> Message:
        heard.append(honest)
        return honest

    ways: dict[str, Answer] = {
        "silence": silence,
        "failure": refusal,
        "garbage": garbage,
        "forged": forged,
        "clear": in_the_clear,
        "another's": lambda asked, honest: heard[-1],
    }
    # The last node is asked first, so that the others can repeat its messages.
    exchange.sites[max(exchange.sites)].answer = overheard
    for index, stage in stages.items():
        exchange.sites[index + 2].answer = tamper((stage,), ways[how], rounds)


SAID = {
    "silence": "TimeoutError: the site did not answer before the deadline",
    "failure": "RefusedError: not this time",
    "garbage": "ProtocolError: expected a",
    "forged": "VerificationError: the",
    "another's": "ProtocolError: the site's message names another site as its sender",
    "clear": "ProtocolError: the site must answer with a message of secure aggregation, "
    "found a message of type contribution",
}


@pytest.mark.parametrize("how", SAID)
@pytest.mark.parametrize("stage", STAGES)
def test_a_round_closes_over_those_who_stayed(stage: str, how: str) -> None:
    study = masked_study(aggregation=FFA)
    exchange = federation(study, 6)
    fail(exchange, {1: stage, 3: stage}, how)
    state = one_round(study, exchange)
    statement = last(state)
    assert statement["type"] == "round-close"
    # Who has masked is in the sum, whether or not it stays for the rest.
    gone = (1, 3) if stage in ("advertise", "share", "mask") else ()
    stayed = names(*(i for i in SIX if i not in gone))
    assert statement["survivors"] == stayed == statement["masking"][0]["survivors"]
    assert list(statement["failures"]) == names(*gone)
    assert all(text.startswith(SAID[how]) for text in statement["failures"].values())
    expected = exact_mean(study, exchange, 1, stayed)
    assert change(study, start_adapter(), state.adapter) == pytest.approx(expected, abs=EXACT)
    everyone = np.average([0.5 * x for x in optima(study, 6)], axis=0, weights=[10 * (i + 1) for i in SIX])
    assert (np.abs(expected - everyone).max() > 0.01) == bool(gone)


@pytest.mark.parametrize(
    ("stage", "how"), [*((stage, "silence") for stage in STAGES), ("mask", "garbage"), ("reveal", "garbage")]
)
def test_below_the_threshold_nothing_is_learnt_and_the_next_round_goes_on(stage: str, how: str, tmp_path: Path) -> None:
    study = masked_study(aggregation=FFA, training={"rounds": 2})
    exchange = federation(study, 6)
    fail(exchange, dict.fromkeys((0, 2, 5), stage), how, {1})
    state, seen = run(tmp_path / "run", study, exchange)
    aborted, closed = state.statements
    assert (aborted["type"], aborted["round"]) == ("round-abort", 1)
    assert aborted["reason"].startswith("TooFewSitesError: round 1: 0 of 6 sites delivered")
    assert all(f"\n  {name}: " in aborted["reason"] for name in names(*SIX))
    assert aborted["survivors"] == aborted["masking"] == []
    assert aborted["metrics"] is None
    assert seen[1].digest == seen[0].digest == aborted["adapter_after"] == aborted["adapter_published"]
    reveals = [r for rs in exchange.replies for r in rs.values() if kind_of(r) == REVEAL and r.round == 1]  # type: ignore[attr-defined]
    # At the last stage, three reveal, and four shares are needed for any secret.
    assert len(reveals) == (3 if stage == "reveal" else 0)
    assert (closed["type"], closed["round"]) == ("round-close", 2)
    assert closed["adapter_before"] == aborted["adapter_before"]
    mean = exact_mean(study, exchange, 2, names(*SIX))
    assert change(study, seen[1], seen[2]) == pytest.approx(mean, abs=EXACT)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from([None, None, None, *STAGES]), min_size=6, max_size=6),
    st.sampled_from(["silence", "failure", "garbage", "forged", "another's"]),
)
def test_whoever_drops_out_when_the_sum_is_that_of_the_survivors_or_none(drops: list[str | None], how: str) -> None:
    study = masked_study(aggregation=FFA)
    exchange = federation(study, 6)
    drops[5] = None  # the one whose messages are repeated
    fail(exchange, {index: stage for index, stage in enumerate(drops) if stage}, how)
    state = one_round(study, exchange)
    reached = [STAGES.index(stage) if stage else len(STAGES) for stage in drops]
    stayed = [sum(place > step for place in reached) for step in range(len(STAGES))]
    if min(stayed) >= 4:
        survivors = names(*(i for i in SIX if reached[i] > STAGES.index("mask")))
        assert last(state)["survivors"] == survivors
        expected = exact_mean(study, exchange, 1, survivors)
        assert change(study, start_adapter(), state.adapter) == pytest.approx(expected, abs=EXACT)
    else:
        assert last(state)["type"] == "round-abort"
        assert state.adapter.digest == start_adapter().digest
        assert (REVEAL in exchange.kinds()) == (stayed[3] >= 4 and stayed[4] > 0)


def test_who_dropped_out_is_asked_again_in_the_next_round(tmp_path: Path) -> None:
    study = masked_study(aggregation=FFA, training={"rounds": 3})
    exchange = federation(study, 6)
    fail(exchange, {4: "share"}, "silence", {2})
    state, _ = run(tmp_path / "run", study, exchange)
    assert [len(statement["survivors"]) for statement in state.statements] == [6, 5, 6]
    asked = [[stage_of(messages[6]) for messages in exchange.asked if 6 in messages][1:]][0]
    assert asked == [*STAGES, "advertise", "share", *STAGES]


PRIVATE = {"mode": "local", "epsilon": 3.0, "delta": 1e-5, "clip_norm": 1.0}


def test_a_round_that_came_to_nothing_costs_what_any_round_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An accountant that counts steps: each round has two, and who was asked may have released an update.
    step = PrivacyPlan(PrivacyEvent(1.0, 0.1, 2, "record"), None, 1e-5, 3.0)
    monkeypatch.setattr(statements, "plan", lambda study: step)
    monkeypatch.setattr(accounting, "epsilon", lambda events, delta, *_: float(sum(event.steps for event in events)))
    study = masked_study(privacy=PRIVATE, training={"rounds": 3})
    exchange = federation(study, 6)
    fail(exchange, dict.fromkeys((0, 2, 5), "confirm"), "silence", {2})
    state, _ = run(tmp_path / "run", study, exchange)
    assert [statement["type"] for statement in state.statements] == ["round-close", "round-abort", "round-close"]
    for number, statement in enumerate(state.statements, start=1):
        assert statement["privacy"]["epsilon"] == dict.fromkeys(names(*SIX), 2.0 * number)


def test_three_rounds_in_a_row_without_a_sum_end_the_run_and_it_goes_on_with_the_next_number(tmp_path: Path) -> None:
    study = masked_study(aggregation=FFA, training={"rounds": 6})
    exchange = federation(study, 6)
    fail(exchange, dict.fromkeys((0, 2, 5), "mask"), "silence", {2, 3, 4})
    with pytest.raises(
        TooFewSitesError, match=r"3 rounds in a row were aborted; reason of the last one: .*round 4: 0 of 6"
    ):
        run(tmp_path / "run", study, exchange)
    kept = RunDirectory.open(tmp_path / "run").load()
    assert [s["type"] for s in kept.statements] == ["round-close", *["round-abort"] * 3]
    assert (kept.round, kept.stopped) == (4, False)
    assert kept.adapter.digest == kept.statements[0]["adapter_after"]
    state, _ = run(tmp_path / "run", study, exchange)
    assert [(s["round"], s["type"]) for s in state.statements[4:]] == [(5, "round-close"), (6, "round-close")]
    assert state.statements[4]["adapter_before"] == kept.adapter.digest
    assert state.stopped


def test_two_lost_rounds_do_not_end_a_run(tmp_path: Path) -> None:
    study = masked_study(training={"rounds": 6})
    exchange = federation(study, 6)
    fail(exchange, dict.fromkeys((0, 2, 5), "mask"), "silence", {1, 2, 4, 5})
    state, _ = run(tmp_path / "run", study, exchange)
    assert [s["type"] == "round-close" for s in state.statements] == [False, False, True, False, False, True]


def test_a_study_of_which_no_round_closed_ends_with_the_reason_of_each(tmp_path: Path) -> None:
    study = masked_study(training={"rounds": 2})
    exchange = federation(study, 6)
    fail(exchange, dict.fromkeys((0, 2, 5), "mask"), "silence", {1, 2})
    for _ in range(2):  # a resumed run has shown no round, so the error lists them
        with pytest.raises(
            TooFewSitesError, match=r"no round is left; the reasons:\n  round 1: .*\n  round 2: "
        ) as told:
            run(tmp_path / "run", study, exchange)
        assert "`privet new --from STUDY --seed NUMBER --name NAME --out FILE`" in told.value.hint


def test_a_run_whose_last_rounds_are_lost_still_has_a_result(tmp_path: Path) -> None:
    study = masked_study(training={"rounds": 4})
    exchange = federation(study, 6)
    fail(exchange, dict.fromkeys((0, 2, 5), "mask"), "silence", {2, 3, 4})
    with pytest.raises(TooFewSitesError) as told:
        run(tmp_path / "run", study, exchange)
    assert "a resumed run releases" in told.value.hint
    state, _ = run(tmp_path / "run", study, exchange)
    assert state.stopped


# --- a coordinator that is killed ------------------------------------------------------------------------


class KilledError(Exception):
    """The coordinator's end in these tests."""


def killing(exchange: Relay, stage: str, number: int, after: int) -> Relay:
    """Kill the coordinator in a stage of a round, when `after` sites have answered."""
    answered = 0

    def alter(node: int, message: Message) -> Message:
        if stage_of(message) == stage and getattr(message, "round", None) == number:
            exchange.sites[node].answer = lambda asked, honest: count(honest)
        return message

    def count(honest: Message) -> Message:
        nonlocal answered
        if answered == after:
            raise KilledError
        answered += 1
        return honest

    exchange.alter = alter
    return exchange


def revived(exchange: Relay) -> Relay:
    exchange.alter = lambda node, message: message
    for site in exchange.sites.values():
        site.answer = lambda asked, honest: honest
    return exchange


@pytest.mark.parametrize(
    ("stage", "after", "masked"),
    [("share", 3, 0), ("mask", 1, 2), ("confirm", 0, 6), ("reveal", 5, 6)],
)
def test_sites_that_had_masked_refuse_a_killed_round_and_the_run_goes_on(
    stage: str, after: int, masked: int, tmp_path: Path
) -> None:
    study = masked_study(aggregation=FFA, training={"rounds": 3})
    exchange = killing(federation(study, 6), stage, 2, after)
    with pytest.raises(KilledError):
        run(tmp_path / "run", study, exchange)
    assert RunDirectory.open(tmp_path / "run").load().round == 1
    # The last node is asked first, and the site that kills had taken its step.
    taken = [site.name for site in exchange.sites.values() if any(e.round == 2 for e in site.journal.entries)]
    assert taken == names(*range(6 - masked, 6))
    state, _ = run(tmp_path / "run", study, revived(exchange))
    again = state.statements[1]
    assert [s["round"] for s in state.statements] == [1, 2, 3]
    if masked <= 2:
        assert again["survivors"] == names(*range(6 - masked))
        assert set(again["failures"]) == set(taken)
        assert all("on record already" in text for text in again["failures"].values())
    else:
        assert again["type"] == "round-abort"
        assert "on record already" in again["reason"]
        assert again["adapter_after"] == state.statements[0]["adapter_after"]
    assert state.statements[2]["survivors"] == names(*SIX)
    # Nobody masked a round twice.
    for site in exchange.sites.values():
        steps = [(entry.round, entry.step) for entry in site.journal.entries]
        assert len(set(steps)) == len(steps)


# --- a hostile coordinator -------------------------------------------------------------------------------


def refused(state: RunState, *texts: str) -> None:
    assert last(state)["type"] == "round-abort"
    assert all(text in last(state)["reason"] for text in texts), last(state)["reason"]


def altered(exchange: Relay, stage: str, nodes: Iterable[int], how: Callable[[Any], Message]) -> Relay:
    chosen = set(nodes)
    exchange.alter = lambda node, m: how(m) if node in chosen and stage_of(m) == stage else m
    return exchange


def proposing(**changes: Any) -> Callable[[Any], Message]:
    """Return the opened round with some of the proposed parameters changed."""
    return lambda m: replace(m, masking=encode(replace(decode(Parameters, m.masking), **changes)))


@pytest.mark.parametrize(
    "changes", [{"threshold": 1}, {"corrupt": 0}, {"min_survivors": 2}, {"bits": 14}, {"session": bytes(32)}]
)
def test_weaker_parameters_than_the_studys_reach_no_site(changes: Mapping[str, Any]) -> None:
    study = masked_study()
    exchange = altered(federation(study, 6), "advertise", range(2, 8), proposing(**changes))
    refused(one_round(study, exchange), "do not follow from the study")
    assert exchange.kinds() == {0}
    assert not any(site.trained for site in exchange.sites.values())


def test_a_smaller_group_than_the_cohort_that_was_announced_is_refused() -> None:
    study = masked_study()
    exchange = federation(study, 6)

    def shrunk(m: RoundOpen) -> Message:
        members = {member.name: member.identity for member in decode(Parameters, m.masking).cohort[:3]}
        return replace(m, masking=encode(parameters_of(study, SPEC, m, members)))

    refused(one_round(study, altered(exchange, "advertise", (2, 3, 4), shrunk)), "not a group of the round's cohort")


def test_a_site_keeps_its_own_floor() -> None:
    study = masked_study()
    exchange = federation(study, 6)
    for node, floor in ((2, Floor(cohort=7)), (3, Floor(corrupt=2)), (4, Floor(threshold=5))):
        exchange.sites[node].floor = floor
        exchange.sites[node].restart()
    refused(
        one_round(study, exchange),
        "site-0000: secure aggregation: number of sites in the cohort must be at least 7, the coordinator proposed 6",
        "site-0001: secure aggregation: number of corrupt sites that it withstands must be at least 2, the "
        "coordinator proposed 1",
        "site-0002: secure aggregation: threshold must be at least 5, the coordinator proposed 4",
    )


def test_an_identity_that_is_not_the_pinned_one_is_refused_by_every_site() -> None:
    study = masked_study()
    exchange = federation(study, 6)
    exchange.sites[7].answer = lambda asked, honest: (
        signed_consent(honest, asked, 9) if isinstance(honest, Consent) else honest
    )
    refused(
        one_round(study, exchange), "lists another identity key for site site-0005 than the key pinned in the site file"
    )
    assert exchange.kinds() == {0}


def test_a_site_that_the_others_do_not_know_is_refused_by_them() -> None:
    study = masked_study()
    exchange = federation(study, 6)
    for site in exchange.sites.values():
        site.pins = {name: key for name, key in pins(6).items() if name != "site-0005"}
        site.restart()
    refused(one_round(study, exchange), "its cohort holds 1 sites whose public keys this site has not pinned")


def test_different_adapters_for_different_sites_meet_in_no_sum() -> None:
    # A model made so that the others' updates vanish would leave the victim's alone in the sum.
    study = masked_study(aggregation=FFA)
    other = start_adapter(5)

    def silently(m: RoundOpen) -> Message:
        return replace(m, adapter=other.data, adapter_digest=other.digest)

    def consistently(m: RoundOpen) -> Message:
        told = replace(m, adapter=other.data, adapter_digest=other.digest)
        p = decode(Parameters, m.masking)
        members = {member.name: member.identity for member in p.cohort}
        return replace(told, masking=encode(parameters_of(study, SPEC, told, members)))

    for how, said in (
        (silently, "do not follow from the study"),
        (consistently, "for other parameters of secure aggregation than this round has"),
    ):
        exchange = altered(federation(study, 6), "advertise", (3,), how)
        state = one_round(study, exchange)
        assert last(state)["survivors"] == names(0, 2, 3, 4, 5)
        assert said in last(state)["failures"]["site-0001"]
    # And if the coordinator puts the victim's keys on the roster all the same, neither it nor the others share.
    exchange = federation(study, 6)

    def mixed(node: int, m: Message) -> Message:
        if stage_of(m) == "advertise" and isinstance(m, RoundOpen):
            return consistently(m) if node == 3 else m
        if stage_of(m) != "share" or not isinstance(m, Secured):
            return m
        reply = exchange.replies[1][3]
        assert isinstance(reply, Secured)
        adverts = (*decode(Roster, m.body).adverts, decode(Advertise, reply.body))
        return replace(m, body=encode(Roster(tuple(sorted(adverts, key=lambda advert: advert.site)))))

    exchange.alter = mixed
    refused(one_round(study, exchange), "holds keys that a site sent for other parameters")
    to_others = exchange.asked[2][2]
    assert isinstance(to_others, Secured)
    with pytest.raises(ProtocolError, match="for other parameters"):
        exchange.sites[3].respond(to_others)


@pytest.mark.parametrize("declared", [0, 10, 21, 60])
def test_a_site_takes_part_with_the_count_that_it_consented_with(declared: int) -> None:
    # Told another count, it would be in a sum whose weights it did not agree to.
    study = masked_study()
    exchange = altered(federation(study, 6), "advertise", (3,), lambda m: replace(m, declared=declared))
    assert (
        "declared count has changed since this site consented"
        in last(one_round(study, exchange))["failures"]["site-0001"]
    )


def test_an_adapter_that_is_not_the_announced_one_is_refused() -> None:
    study = masked_study()
    exchange = altered(federation(study, 6), "advertise", (3,), lambda m: replace(m, adapter=start_adapter(5).data))
    assert "expected adapter" in last(one_round(study, exchange))["failures"]["site-0001"]


def rounds_of(exchange: Relay, node: int) -> tuple[MaskedSite, list[Message], list[Message]]:
    """Return a site, and what it was asked and answered in its only round, in order."""
    asked = [m[node] for m in exchange.asked if stage_of(m.get(node, Offer({})))]
    return exchange.sites[node], asked, [r[node] for r in exchange.replies if kind_of(r.get(node, Offer({})))]


def stopped_before(stage: str | None, seed: bytes = b"seed") -> tuple[Study, Relay]:
    """Run a round in which the site at node 4 takes no step from `stage` on."""
    study = masked_study(aggregation=FFA)
    exchange = federation(study, 6, seed=seed)
    exchange.sites[4].asleep = () if stage is None else STAGES[STAGES.index(stage) :]
    one_round(study, exchange)
    exchange.sites[4].asleep = ()
    return study, exchange


@pytest.mark.parametrize("stage", [None, "share", "mask", "confirm", "reveal"])
def test_the_same_message_again_gets_the_same_bytes_again(stage: str | None) -> None:
    # Whatever the site has answered in a round that is still open, it repeats, in any order, and nothing else changes.
    _, exchange = stopped_before(stage)
    site, asked, answers = rounds_of(exchange, 4)
    done = len(STAGES) if stage is None else STAGES.index(stage)
    trained = list(site.trained)
    pairs = list(zip(asked[:done], answers[:done], strict=True))
    for question, answer in pairs[-1:] if stage is None else [*pairs[::-1], *pairs]:
        assert site.honest(question) == answer
    assert site.trained == trained


def test_after_the_reveal_nothing_else_of_the_round_is_answered() -> None:
    _, exchange = stopped_before(None)
    site, asked, _ = rounds_of(exchange, 4)
    for question in asked[:4]:
        with pytest.raises(ProtocolError, match="has revealed its shares, so the round is over"):
            site.respond(question)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_another_message_in_the_place_of_an_answered_one_is_refused(stage: str) -> None:
    # The other message is genuine: what an honest coordinator asked the same site in the same round, with other keys.
    index = STAGES.index(stage)
    following = STAGES[index + 1] if index + 1 < len(STAGES) else None
    _, exchange = stopped_before(following)
    site, asked, answers = rounds_of(exchange, 4)
    _, others, _ = rounds_of(stopped_before(None, b"other")[1], 4)
    question, other = asked[index], others[index]
    assert isinstance(question, Secured)
    assert isinstance(other, Secured)
    assert other.body != question.body
    with pytest.raises(ProtocolError):
        site.respond(replace(question, body=other.body))
    assert site.honest(question) == answers[index]


def test_a_message_that_does_not_verify_uses_nothing_up() -> None:
    _, exchange = stopped_before("share")
    site, asked, _ = rounds_of(exchange, 4)
    question = asked[1]
    assert isinstance(question, Secured)
    spoilt = bytearray(question.body)
    spoilt[-1] ^= 1  # in the last advert's signature
    for body in (b"", b"PSA", question.body + b"\0", question.body[:-1], bytes(spoilt)):
        with pytest.raises(PrivetError):
            site.respond(replace(question, body=body))
    found = site.respond(question)
    assert isinstance(found, Secured)
    decode(Shares, found.body)
    assert site.trained == []


def test_a_delivery_that_does_not_verify_costs_no_training() -> None:
    _, exchange = stopped_before("mask")
    site, asked, _ = rounds_of(exchange, 4)
    question = asked[2]
    assert isinstance(question, Secured)
    spoilt = bytearray(question.body)
    spoilt[-1] ^= 1
    with pytest.raises(VerificationError, match="cannot be decrypted"):
        site.respond(replace(question, body=bytes(spoilt)))
    assert site.trained == []
    assert kind_of(site.respond(question)) == 6
    assert site.trained == [1]


def test_messages_of_another_study_or_round_are_not_answered() -> None:
    _, exchange = stopped_before("mask")
    site, asked, answers = rounds_of(exchange, 4)
    question = asked[1]
    assert isinstance(question, Secured)
    for changes in ({"study": "sha256:" + "0" * 64}, {"round": 2}, {"round": 0}, {"nonce": "0" * 32}):
        with pytest.raises(ProtocolError, match="this site is not in the round, or has restarted since it began"):
            site.respond(replace(question, **changes))
    assert site.respond(question) == answers[1]


def test_a_masked_round_is_not_masked_again_under_another_nonce_or_adapter() -> None:
    # The coordinator says that the round failed, and runs it again with fewer sites or another model.
    study, exchange = stopped_before("confirm")
    first = masked_words(exchange, 1)
    assert len(first) == 6
    other = start_adapter(7)
    for state in (RunState(0, start_adapter()), RunState(0, other)):
        again = Relay({node: exchange.sites[node] for node in range(2, 7)})
        ended = one_round(study, again, state)
        refused(ended, "site-0000: this round's mask step is on record already")
        assert masked_words(again, 1) == {}
        # Nor after a restart, which forgets everything but the record.
        for site in again.sites.values():
            site.restart()


def test_a_site_that_was_restarted_has_dropped_out_until_the_next_round() -> None:
    study = masked_study(aggregation=FFA, training={"rounds": 2})
    exchange = restarting(federation(study, 6), {"share": 2, "mask": 3})
    state = one_round(study, exchange)
    assert last(state)["survivors"] == names(2, 3, 4, 5)
    assert list(last(state)["failures"]) == names(0, 1)
    assert all("has restarted since it began" in text for text in last(state)["failures"].values())
    assert last(one_round(study, exchange, state))["survivors"] == names(*SIX)


def restarting(exchange: Relay, nodes: Mapping[str, int]) -> Relay:
    """Restart a site just before it is asked for a stage of the first round."""

    def alter(node: int, message: Message) -> Message:
        if nodes.get(stage_of(message)) == node and getattr(message, "round", None) == 1:
            exchange.sites[node].restart()
        return message

    exchange.alter = alter
    return exchange


def test_a_site_that_comes_back_at_another_address_takes_part_in_the_next_round(tmp_path: Path) -> None:
    study = masked_study(aggregation=FFA, training={"rounds": 2})
    exchange = federation(study, 6)
    sites = dict(exchange.sites)
    exchange.sites = sites

    def move(statement: Mapping[str, Any], adapter: Adapter) -> None:
        if statement["round"] == 1:
            sites[99] = sites.pop(4)
            sites[99].restart()

    directory = RunDirectory.create(tmp_path / "run", study, start_adapter(), PEFT_CONFIG)
    state = run_study(Unlogged(directory), exchange, move, QUICK)
    assert [statement["survivors"] for statement in state.statements] == [names(*SIX)] * 2
    assert 99 in exchange.rounds[1]


def test_a_site_that_was_restarted_between_confirm_and_reveal_reveals_nothing() -> None:
    study = masked_study(aggregation=FFA, training={"rounds": 2})
    exchange = restarting(federation(study, 6), {"reveal": 4})
    state = one_round(study, exchange)
    # Its vector is in the sum, which the others open without it.
    assert last(state)["survivors"] == names(*SIX)
    steps = {node: [entry.step for entry in site.journal.entries] for node, site in exchange.sites.items()}
    assert steps == {node: ["mask"] if node == 4 else ["mask", "reveal"] for node in range(2, 8)}
    reveals = {node for replies in exchange.replies for node, reply in replies.items() if kind_of(reply) == REVEAL}
    assert reveals == {2, 3, 5, 6, 7}
    state = one_round(study, exchange, state)
    assert last(state)["survivors"] == names(*SIX)


def test_a_reply_of_an_earlier_round_is_no_answer_to_this_one() -> None:
    study = masked_study(aggregation=FFA, training={"rounds": 2})
    exchange = federation(study, 6)
    state = one_round(study, exchange)
    _, _, old = rounds_of(exchange, 4)
    for stage, reply in zip(STAGES, old, strict=True):
        exchange.sites[4].answer = tamper((stage,), lambda asked, honest, reply=reply: reply)  # type: ignore[misc]
        for site in exchange.sites.values():
            site.journal.entries = [entry for entry in site.journal.entries if entry.round == 1]
        again = one_round(study, exchange, state)
        expected = "other parameters" if stage == "advertise" else "another list of keys (roster)"
        if stage in ("advertise", "share", "mask"):
            assert expected in last(again)["failures"]["site-0002"]
            assert last(again)["survivors"] == names(0, 1, 3, 4, 5)
        else:
            assert last(again)["survivors"] == names(*SIX)


def test_a_round_in_the_clear_is_not_answered_by_a_masked_site() -> None:
    study = masked_study()
    exchange = altered(federation(study, 6), "advertise", range(2, 8), lambda m: replace(m, masking=b""))
    refused(one_round(study, exchange), "not opened as the study says")
    assert not any(isinstance(r, Contribution) for replies in exchange.replies for r in replies.values())


# --- sites that do not follow the protocol ---------------------------------------------------------------


def test_the_declared_weights_count_and_no_other_can_be_sent() -> None:
    for method, weight in (("declared", 11.0), ("declared", 60.0), ("equal", 2.0)):
        study = masked_study(aggregation={**FFA, "weighting": method})
        exchange = federation(study, 6)
        exchange.sites[2].forge = lambda honest, weight=weight: replace(honest, weight=weight)  # type: ignore[misc]
        state = one_round(study, exchange)
        assert last(state)["type"] == "round-close"  # nothing is spoiled: the weight is no part of what is masked
        assert "spoiled" not in last(state)


def test_an_update_that_is_too_long_aborts_the_round() -> None:
    study = masked_study(aggregation={**FFA, "max_norm": 2.0})
    exchange = federation(study, 6)
    exchange.sites[7].forge = lambda honest: replace(honest, update=np.full_like(honest.update, 60 * 8.0))
    state = one_round(study, exchange)
    refused(state, "the sites' mean update has the norm", "the study allows at most 2")
    assert state.adapter.digest == start_adapter().digest
    exchange = federation(study, 6)
    assert last(one_round(study, exchange))["type"] == "round-close"


def filling_vectors(monkeypatch: pytest.MonkeyPatch, sites: Collection[str]) -> None:
    """Let sites put the largest values into their vectors that have room there, whatever they trained."""

    def cheat(study: Study, spec: AdapterSpec, sent: Contribution, layout: Layout) -> Values:
        values = dict(vector_of(study, spec, sent, layout))
        if sent.site in sites:
            values |= {s.name: np.full(s.size, s.bound) for s in layout.segments if not s.count}
        return values

    monkeypatch.setattr(vector, "vector_of", cheat)


def test_a_light_site_cannot_send_more_than_the_studys_bounds_allow_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    # The vector has room for the heaviest site's values; where the mean shows that a light one used it, the round
    # is lost.
    study = masked_study(aggregation={**FFA, "max_norm": None, "largest_count": 1000})
    heavy = [lambda study, adapter: np.full(size(study), 7.9)] * 3
    weights = [1, 1, 1000]
    assert last(one_round(study, federation(study, 3, learners=heavy, weights=weights)))["type"] == "round-close"
    exchange = federation(study, 3, learners=heavy, weights=weights)
    filling_vectors(monkeypatch, names(0))
    refused(one_round(study, exchange), "the sites' mean update has the norm", "the study allows at most 26.5")


def forging_shares(exchange: Relay, node: int) -> None:
    """Let a site commit to another seed than the one it shares, signed as it should be."""
    site = exchange.sites[node]

    def answer(asked: Message, honest: Message) -> Message:
        if kind_of(honest) != 4 or not isinstance(honest, Secured):
            return honest
        live = site.rounds._live[honest.study]
        state: Any = live.state
        forged = replace(decode(Shares, honest.body), commitment=bytes(32))
        key = identity(site.number).key
        signed = replace(forged, signature=key.sign(signed_bytes(forged, state.context.binding)))
        return replace(honest, body=encode(signed))

    site.answer = answer


def test_a_site_that_shares_another_seed_than_it_committed_to_aborts_the_round_only() -> None:
    study = masked_study(aggregation=FFA)
    exchange = federation(study, 6)
    forging_shares(exchange, 4)
    refused(one_round(study, exchange), "site-0002")


def offered(*answers: Answer) -> tuple[list[str], str]:
    """Return which sites become members if the last ones answer the offer so, and what the others are told."""
    study = masked_study()
    exchange = federation(study, 4 + len(answers))
    for node, answer in enumerate(answers, start=6):
        exchange.sites[node].answer = lambda asked, honest, answer=answer: (  # type: ignore[misc]
            answer(asked, honest) if isinstance(asked, Offer) else honest
        )
    members = gather_participants(exchange, unlogged(study), start_adapter(), 0.0, {})
    strict = masked_study(cohort={"min_sites": 9})
    with pytest.raises(TooFewSitesError) as caught:
        gather_participants(exchange, unlogged(strict), start_adapter(), 0.0, {})
    return sorted(members), caught.value.message


@pytest.mark.parametrize(
    "identity_text",
    ["", "ab" * 31, "ab" * 33, "AB" * 32, "g0" * 32, "0x" + "ab" * 31, "ab" * 32 + "\n", " " + "ab" * 32],
)
def test_a_consent_without_an_identity_key_makes_no_member(identity_text: str) -> None:
    found, said = offered(lambda asked, honest: replace(honest, identity=identity_text))  # type: ignore[type-var]
    assert found == names(0, 1, 2, 3)
    assert "site-0004: the site's consent has no valid identity key, which secure aggregation needs" in said


def test_a_site_that_the_study_does_not_name_makes_no_member() -> None:
    study = masked_study(cohort={"sites": names(0, 1, 2, 4)})
    found = gather_participants(federation(study, 6), unlogged(study), start_adapter(), 0.0, {})
    assert sorted(found) == names(0, 1, 2, 4)


def test_an_identity_key_makes_one_member() -> None:
    first = identity(0).key.public_key().public_bytes_raw().hex()
    found, _ = offered(lambda asked, honest: replace(honest, identity=first))  # type: ignore[type-var]
    assert found == names(0, 1, 2, 3)


@pytest.mark.parametrize("weight", [61, 2**48, 2**52])
def test_a_count_that_the_vector_has_no_room_for_makes_no_member(weight: int) -> None:
    found, said = offered(lambda asked, honest: replace(honest, weight=weight))  # type: ignore[type-var]
    assert found == names(0, 1, 2, 3)
    assert "site-0004: the site declared more units than the study's aggregation.largest_count allows (raise " in said
    most = offered(lambda asked, honest: signed_consent(replace(honest, weight=60), asked, 4))  # type: ignore[type-var]
    assert most[0] == names(0, 1, 2, 3, 4)
    assert offered(lambda asked, honest: replace(honest, weight=60))[0] == names(0, 1, 2, 3)  # type: ignore[type-var]


# --- groups ----------------------------------------------------------------------------------------------

# Thirty sites in five groups of six, three of them corrupt wherever they are: five of six have to stay.
THIRTY = range(30)


def grouped(groups: int = 5, largest: int = 300) -> Study:
    return masked_study(aggregation={**FFA, "largest_count": largest}, secure_aggregation={"groups": groups})


def nodes_of(group: Sequence[str]) -> list[int]:
    return [int(name[-4:]) + 2 for name in group]


def test_groups_are_summed_apart_and_together_make_the_mean_of_all() -> None:
    study = grouped()
    exchange = federation(study, 30)
    state = one_round(study, exchange)
    masking = last(state)["masking"]
    assert [tuple(group["sites"]) for group in masking] == groups_of(study, 1, names(*THIRTY))
    assert all(group["kept"] and group["survivors"] == group["sites"] for group in masking)
    assert {(group["corrupt"], group["min_survivors"], group["threshold"]) for group in masking} == {(3, 5, 5)}
    assert last(state)["survivors"] == names(*THIRTY)
    expected = exact_mean(study, exchange, 1, names(*THIRTY))
    assert change(study, start_adapter(), state.adapter) == pytest.approx(expected, abs=EXACT)


def test_a_group_with_an_outlying_sum_is_left_out_and_the_others_mean_is_exact() -> None:
    study = grouped(largest=20)
    exchange = federation(study, 30, weights=[20] * 30)
    exchange.sites[13].forge = lambda honest: replace(honest, update=1000 * honest.update)
    state = one_round(study, exchange)
    bad = next(group for group in groups_of(study, 1, names(*THIRTY)) if "site-0011" in group)
    good = [name for name in names(*THIRTY) if name not in bad]
    assert last(state)["survivors"] == good
    assert [group["kept"] for group in last(state)["masking"]].count(False) == 1
    assert list(last(state)["failures"]) == list(bad)
    assert {"over twice the median group" in text for text in last(state)["failures"].values()} == {True}
    expected = exact_mean(study, exchange, 1, good)
    assert change(study, start_adapter(), state.adapter) == pytest.approx(expected, abs=EXACT)
    # The same site in one sum over all moves the mean.
    whole = grouped(1, largest=20)
    together = federation(whole, 30, weights=[20] * 30)
    together.sites[13].forge = exchange.sites[13].forge
    spoilt = change(whole, start_adapter(), one_round(whole, together).adapter)
    assert np.linalg.norm(spoilt - expected) > 3 * np.linalg.norm(expected - 0.5 * np.mean(optima(study, 30), axis=0))


@pytest.mark.parametrize("kept", [True, False])
def test_a_light_groups_mean_may_be_long_if_its_sum_is_not(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Noise alone makes it so: the mean of few units has much of it, and little weight.
    study = grouped(largest=20)
    light = groups_of(study, 1, names(*THIRTY))[2]
    weights = [1 if name in light else 20 for name in names(*THIRTY)]
    exchange = federation(study, 30, weights=weights)
    for node in nodes_of(light):
        exchange.sites[node].forge = lambda honest: replace(honest, update=10 * honest.update)
    if not kept:
        filling_vectors(monkeypatch, light)
    state = one_round(study, exchange)
    assert [group["kept"] for group in last(state)["masking"]] == [True, True, kept, True, True]
    stayed = [name for name in names(*THIRTY) if kept or name not in light]
    assert last(state)["survivors"] == stayed
    expected = exact_mean(study, exchange, 1, stayed)
    assert change(study, start_adapter(), state.adapter) == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("stage", ["share", "mask", "reveal"])
def test_a_group_that_loses_too_many_leaves_the_others(stage: str) -> None:
    study = grouped()
    exchange = federation(study, 30)
    dealt = groups_of(study, 1, names(*THIRTY))
    for node in nodes_of(dealt[1][:2]) + nodes_of(dealt[3][:1]):
        exchange.sites[node].answer = tamper((stage,), silence)
    state = one_round(study, exchange)
    gone = {*dealt[1]} | ({dealt[3][0]} if stage in STAGES[:3] else set())
    stayed = [name for name in names(*THIRTY) if name not in gone]
    assert last(state)["survivors"] == stayed
    failures = last(state)["failures"]
    assert set(failures) == gone
    for name in dealt[1]:
        assert failures[name].startswith("TimeoutError" if name in dealt[1][:2] else "TooFewSitesError")
    expected = exact_mean(study, exchange, 1, stayed)
    assert change(study, start_adapter(), state.adapter) == pytest.approx(expected, abs=EXACT)
    revealed = {n for rs in exchange.replies for n, r in rs.items() if kind_of(r) == REVEAL}
    assert revealed.isdisjoint(nodes_of(dealt[1])) == (stage != "reveal")


@pytest.mark.parametrize(("lost", "closes"), [(2, True), (3, False), (5, False)])
def test_a_round_needs_half_of_its_groups(lost: int, closes: bool) -> None:
    study = grouped()
    exchange = federation(study, 30)
    dealt = groups_of(study, 1, names(*THIRTY))
    for group in dealt[:lost]:
        for node in nodes_of(group[:2]):
            exchange.sites[node].answer = tamper(("mask",), silence)
    state = one_round(study, exchange)
    assert (last(state)["type"] == "round-close") == closes
    if closes:
        assert last(state)["survivors"] == sorted(name for group in dealt[lost:] for name in group)
    else:
        assert state.adapter.digest == start_adapter().digest


def test_a_site_that_breaks_the_protocol_costs_its_own_group_alone() -> None:
    study = grouped()
    exchange = federation(study, 30)
    forging_shares(exchange, 13)
    state = one_round(study, exchange)
    bad = next(group for group in groups_of(study, 1, names(*THIRTY)) if "site-0011" in group)
    assert last(state)["survivors"] == [name for name in names(*THIRTY) if name not in bad]
    assert last(state)["spoiled"] == [list(bad)]


def test_opened_rounds_tell_each_site_its_own_groups_parameters() -> None:
    study = grouped(3)
    exchange = federation(study, 30)
    one_round(study, exchange)
    for group in groups_of(study, 1, names(*THIRTY)):
        for node in nodes_of(group):
            opened = opened_for(exchange, node, 1)
            assert opened.cohort == tuple(names(*THIRTY))
            assert [member.name for member in decode(Parameters, opened.masking).cohort] == list(group)
