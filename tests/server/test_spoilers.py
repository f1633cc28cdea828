"""A site that spoils masked sums, in whatever way, is found, named and left out, and the study goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from privet.common.errors import TooFewSitesError
from privet.common.masking import vector
from privet.common.masking.vector import vector_of
from privet.common.secagg import quantize
from privet.common.secagg.encoding import decode, encode
from privet.common.secagg.messages import Masked, Wrap
from privet.common.secagg.quantize import Layout, Words
from privet.common.secagg.transcript import signed_bytes
from privet.common.study.adapter import AdapterSpec
from privet.common.study.messages import Contribution, Message, Secured
from privet.common.study.study import Study
from privet.server.rounds.state import RunState
from privet.server.rounds.statements import isolation_of
from tests.server.test_masked_rounds import FFA, filling_vectors, forging_shares, last, names
from tests.support.masked_world import Relay, federation, kind_of, masked_study, one_round
from tests.support.secagg_world import identity
from tests.support.synthetic import start_adapter

Spoiling = Callable[[pytest.MonkeyPatch, Relay, int], None]


def too_long(monkeypatch: pytest.MonkeyPatch, exchange: Relay, number: int) -> None:
    """Send an update at the bound of every value, which the study's largest norm does not allow the mean."""
    filling_vectors(monkeypatch, names(number))


def out_of_form(monkeypatch: pytest.MonkeyPatch, exchange: Relay, number: int) -> None:
    """Send words that no vector in the study's form has."""
    (name,) = names(number)

    def cheat(study: Study, spec: AdapterSpec, sent: Contribution, layout: Layout, random_bytes: Any) -> Words:
        honest = quantize.quantise(layout, vector_of(study, spec, sent, layout), random_bytes).words
        return np.full_like(honest, 2**64 - 1) if sent.site == name else honest

    monkeypatch.setattr("privet.client.rounds.masked.words_of", cheat)


def wrong_shares(monkeypatch: pytest.MonkeyPatch, exchange: Relay, number: int) -> None:
    """Commit to another secret than the one that is shared, so that its masks cannot be removed."""
    forging_shares(exchange, 2 + number)


SPOILINGS: list[Spoiling] = [too_long, out_of_form, wrong_shares]


def played(study: Study, exchange: Relay, rounds: int) -> list[RunState]:
    """Play rounds until a site is left out, and return the state after each."""
    states = [RunState(0, start_adapter())]
    while len(states) <= rounds:
        states.append(one_round(study, exchange, states[-1]))
        if len(states) > 2 and "left_out" in last(states[-1]):
            break
    return states[1:]


@pytest.mark.parametrize("count", [6, 8, 11])
@pytest.mark.parametrize("spoiling", SPOILINGS, ids=lambda spoiling: spoiling.__name__)
def test_a_spoiler_is_named_and_left_out_and_the_study_goes_on(
    monkeypatch: pytest.MonkeyPatch, spoiling: Spoiling, count: int
) -> None:
    study = masked_study(aggregation={**FFA, "max_norm": 2.0}, training={"rounds": 40})
    for culprit in (0, count // 2, count - 1):
        with monkeypatch.context() as patched:
            exchange = federation(study, count, weights=[20] * count)
            spoiling(patched, exchange, culprit)
            states = played(study, exchange, 12)
        statements, (name,) = states[-1].statements, names(culprit)
        # The last round closes, with all others: that names the site.
        assert (statements[-1]["type"], statements[-1]["left_out"]) == ("round-close", [name])
        assert statements[-1]["survivors"] == [site for site in names(*range(count)) if site != name]
        assert len(statements) - 2 <= math.ceil(math.log2(count)) + 2  # rounds after the first
        spoiled = [each for each in statements if "spoiled" in each]
        assert all(each["type"] == "round-abort" and name in each["cohort"] for each in spoiled)
        assert len(spoiled) <= math.ceil(math.log2(count)) + 1
        assert states[0].adapter.digest == start_adapter().digest


def test_a_site_that_wraps_secrets_wrongly_is_named_by_its_own_signature() -> None:
    # Its wraps are used when a site of higher number drops out: site 5 does, in the first round.
    study = masked_study(aggregation={**FFA, "max_norm": 2.0}, training={"rounds": 40})
    exchange = federation(study, 7, weights=[20] * 7)
    liar = exchange.sites[4]

    def answer(asked: Message, honest: Message) -> Message:
        if kind_of(honest) != 6 or not isinstance(honest, Secured):
            return honest
        state: Any = liar.rounds._live[honest.study].state
        sent = decode(Masked, honest.body)
        forged = replace(sent, wraps=tuple(Wrap(each.site, bytes(32)) for each in sent.wraps))
        signature = identity(liar.number).key.sign(signed_bytes(forged, state.context.binding))
        return replace(honest, body=encode(replace(forged, signature=signature)))

    liar.answer = answer
    exchange.sites[7].asleep = ("mask",)
    state = one_round(study, exchange, RunState(0, start_adapter()))
    assert (last(state)["type"], last(state)["spoiled"]) == ("round-abort", [names(2)])
    exchange.sites[7].asleep = ()
    for _ in range(2):
        if "left_out" not in last(state):
            state = one_round(study, exchange, state)
    assert (last(state)["type"], last(state)["left_out"]) == ("round-close", names(2))


def test_a_sum_of_three_names_nobody_and_says_who_was_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    study = masked_study(aggregation={**FFA, "max_norm": 2.0}, training={"rounds": 40})
    exchange = federation(study, 3)
    too_long(monkeypatch, exchange, 1)
    state = RunState(0, start_adapter())
    for _ in range(4):
        state = one_round(study, exchange, state)
    assert all(each["spoiled"] == [[]] for each in state.statements)
    assert isolation_of(state.statements).suspects == frozenset(names(0, 1, 2))
    assert not any("left_out" in each for each in state.statements)


def test_too_few_sites_beside_the_one_left_out_end_the_run_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    study = masked_study(aggregation={**FFA, "max_norm": 2.0}, training={"rounds": 40}, cohort={"min_sites": 4})
    exchange, state = federation(study, 5), RunState(0, start_adapter())
    too_long(monkeypatch, exchange, 2)
    while "left_out" not in last(state := one_round(study, exchange, state)):
        assert state.round < 12
    exchange.sites = {node: site for node, site in exchange.sites.items() if node != 6}
    with pytest.raises(TooFewSitesError, match=r"site-0002 are left out.*cohort\.min_sites demands 4"):
        one_round(study, exchange, state)


def test_an_ordinary_study_says_nothing_of_spoilers() -> None:
    study = masked_study()
    state = one_round(study, federation(study, 6))
    assert not {"spoiled", "left_out"} & set(last(state))
    assert vector.VALIDATION_SUMS == 3
