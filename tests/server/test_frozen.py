"""What no round changes is sent once: who gets the whole adapter, who gets a part, and that no round is lost by it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from privet.common.study.messages import Failure, Message, RoundOpen
from privet.common.study.study import Study
from privet.server.rounds.rounds import run_study
from privet.server.rounds.run_log import Unlogged
from privet.server.rounds.state import RunDirectory, RunState
from privet.server.rounds.timing import Timing
from tests.support.masked_world import federation, masked_study
from tests.support.synthetic import PEFT_CONFIG, SPEC, MemoryExchange, quadratic, start_adapter, study_of

ROUNDS = 4
FFA: dict[str, Mapping[str, Any]] = {"aggregation": {"method": "ffa"}, "training": {"rounds": ROUNDS}}
WHOLE = len(start_adapter().data)
PART = len(start_adapter().part("ffa").data)
QUICK = Timing(gathering=0.0, round=5.0)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def make(masked: bool, **sections: Mapping[str, Any]) -> tuple[Study, MemoryExchange]:
    """Return a study with a frozen A, and three sites of it."""
    if masked:
        study = masked_study(**{**FFA, **sections})
        return study, federation(study, 3)
    study = study_of(**{**FFA, **sections})
    return study, quadratic(study)


def run(path: Path, study: Study, exchange: MemoryExchange, observe: Callable[..., None] | None = None) -> RunState:
    directory = RunDirectory.create(path / "run", study, start_adapter(), PEFT_CONFIG)
    return run_study(Unlogged(directory), exchange, observe or (lambda statement, adapter: None), QUICK)


def sizes(exchange: MemoryExchange, node: int) -> list[int]:
    """Return the sizes of the adapters that a node was sent, in order."""
    return [len(messages[node].adapter) for messages in exchange.rounds if node in messages]


def delivered(state: RunState) -> list[int]:
    """Return the number of sites in each round's sum."""
    return [len(statement["survivors"]) for statement in state.statements]


def refuse_parts(exchange: MemoryExchange, nodes: Collection[int]) -> None:
    """Let sites answer as an earlier version does, which reads whole adapters only."""

    def answer(asked: Message, honest: Message) -> Message | None:
        if isinstance(asked, RoundOpen) and len(asked.adapter) != WHOLE:
            return Failure("ProtocolError", "adapter: other tensors", "")
        return honest

    for node in nodes:
        exchange.sites[node].answer = answer


@pytest.mark.parametrize("masked", [False, True])
def test_what_never_changes_is_sent_once(tmp_path: Path, masked: bool) -> None:
    study, exchange = make(masked)
    state = run(tmp_path / "parts", study, exchange)
    assert delivered(state) == [3] * ROUNDS
    for node in exchange.sites:
        assert sizes(exchange, node) == [WHOLE, *[PART] * (ROUNDS - 1)]
    saved = 4 * sum(tensor.size for tensor in SPEC.frozen("ffa"))
    assert WHOLE - PART >= saved > 0
    # The digests are those of whole adapters, and nothing that is learnt depends on what was sent.
    before = [statement["adapter_before"] for statement in state.statements]
    assert [next(iter(m.values())).adapter_digest for m in exchange.rounds] == before
    study, others = make(masked)
    refuse_parts(others, others.sites)
    assert run(tmp_path / "whole", study, others).adapter.digest == state.adapter.digest


@pytest.mark.parametrize("method", ["fedavg", "fedsvd"])
def test_what_may_change_is_sent_each_time(tmp_path: Path, method: str) -> None:
    study, exchange = make(False, aggregation={"method": method})
    run(tmp_path, study, exchange)
    assert {size for node in exchange.sites for size in sizes(exchange, node)} == {WHOLE}


def forgetting(exchange: MemoryExchange, node: int, after: int) -> Callable[[object, object], None]:
    """Return an observer that restarts a site after a round."""

    def forget(statement: object, adapter: object) -> None:
        if len(exchange.rounds) == after:
            exchange.sites[node].kept.clear()

    return forget


@pytest.mark.parametrize("masked", [False, True])
def test_a_site_that_restarts_makes_what_never_changes_anew(tmp_path: Path, masked: bool) -> None:
    study, exchange = make(masked)
    state = run(tmp_path, study, exchange, forgetting(exchange, 3, after=2))
    assert delivered(state) == [3] * ROUNDS
    assert sizes(exchange, 3) == [WHOLE, PART, PART, PART]


@pytest.mark.parametrize("masked", [False, True])
def test_a_site_that_cannot_gets_the_whole_adapter_in_the_same_round(tmp_path: Path, masked: bool) -> None:
    study, exchange = make(masked)
    exchange.sites[3].first = partial(start_adapter, 1)  # as on a machine whose last bits differ
    state = run(tmp_path, study, exchange, forgetting(exchange, 3, after=2))
    assert delivered(state) == [3] * ROUNDS
    assert not any(statement["failures"] for statement in state.statements)
    assert sizes(exchange, 3) == [WHOLE, PART, PART, WHOLE, PART]
    assert sizes(exchange, 2) == [WHOLE, PART, PART, PART]


@pytest.mark.parametrize("masked", [False, True])
def test_an_earlier_version_in_the_cohort_soon_gets_whole_adapters_only(tmp_path: Path, masked: bool) -> None:
    study, exchange = make(masked)
    refuse_parts(exchange, [4])
    state = run(tmp_path, study, exchange)
    assert delivered(state) == [3] * ROUNDS
    assert sizes(exchange, 4) == [WHOLE, PART, WHOLE, PART, WHOLE, WHOLE]
    assert sizes(exchange, 2) == [WHOLE, PART, PART, PART]


def test_a_site_that_refuses_a_round_is_not_asked_again(tmp_path: Path) -> None:
    study, exchange = make(False)

    def refuse(asked: Message, honest: Message) -> Message | None:
        number = asked.round if isinstance(asked, RoundOpen) else 0
        return Failure("RefusedError", "not today", "") if number == 2 else honest

    exchange.sites[4].answer = refuse
    state = run(tmp_path, study, exchange)
    assert delivered(state) == [3, 2, 3, 3]
    assert sizes(exchange, 4) == [WHOLE, PART, PART, PART]


def test_a_copy_of_another_adapter_never_passes(tmp_path: Path) -> None:
    study, exchange = make(False)

    def swap(statement: object, adapter: object) -> None:
        if len(exchange.rounds) == 1:
            exchange.sites[2].kept[study.digest] = start_adapter(seed=1).data

    state = run(tmp_path, study, exchange, swap)
    assert delivered(state) == [3] * ROUNDS
    assert sizes(exchange, 2) == [WHOLE, PART, WHOLE, PART, PART]
    replies = [reply[2] for reply in exchange.replies if isinstance(reply.get(2), Failure)]
    assert [reply.error for reply in replies if isinstance(reply, Failure)] == ["VerificationError"]


def test_a_run_that_is_resumed_sends_what_it_would_have_sent(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(statement: object, adapter: object) -> None:
        if len(exchange.rounds) == 2:
            raise KilledError

    study, exchange = make(True)
    whole = run(tmp_path / "whole", study, exchange)
    study, exchange = make(True)
    with pytest.raises(KilledError):
        run(tmp_path, study, exchange, kill)
    state = run_study(Unlogged(RunDirectory.open(tmp_path / "run")), exchange, timing=QUICK)
    assert sizes(exchange, 2) == [WHOLE, PART, PART, PART]
    assert state.adapter.digest == whole.adapter.digest


def test_a_site_that_joins_late_gets_the_whole_adapter_first(tmp_path: Path) -> None:
    study, exchange = make(False)
    everybody = exchange.sites
    exchange.sites = {node: site for node, site in everybody.items() if node != 4}

    def join(statement: object, adapter: object) -> None:
        exchange.sites = everybody

    state = run(tmp_path, study, exchange, join)
    assert delivered(state) == [2, 3, 3, 3]
    assert sizes(exchange, 4) == [WHOLE, PART, PART]
