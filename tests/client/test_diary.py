"""What a site logs of its rounds: each step once, what it cost, and nothing about its records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from privet.client.rounds.answers import answer
from privet.client.rounds.diary import ROUNDS, Diary
from privet.common.refusals import BURST, sparing
from privet.common.study.messages import Contribution, Offer, RoundOpen
from tests.client.test_worker import adapter_of, in_log, make_worker, round_open
from tests.server.test_refusals import Written
from tests.support.tiny import private, tiny_study


@pytest.fixture
def written() -> Iterator[Written]:
    ROUNDS.setLevel("INFO")
    with Written.of(ROUNDS.name) as found:
        yield found
    ROUNDS.setLevel("NOTSET")


def test_each_round_is_logged_in_plain_sentences(bert: Path, tmp_path: Path, written: Written) -> None:
    study = tiny_study(bert, privacy=private())
    worker = make_worker(tmp_path, study, seed=None)
    diary = Diary(worker.name, "notes")
    worker.charged = diary.charged
    answer(lambda: Offer(study.document(), "flu"), lambda: worker, diary)
    diary.arrived()
    opened = in_log(worker, round_open(study, adapter_of(worker, study)))
    for _ in range(2):  # the second time, the same bytes are sent
        assert isinstance(answer(lambda: opened, lambda: worker, diary), Contribution)
        diary.arrived()
        diary.arrived()  # of a message that carries no update
    events = [entry["event"] for entry in written.entries]
    assert events == ["consented", *(["received", "cost", "trained", "sent"] * 2)]
    first = written.entries[2]
    assert (first["site"], first["round"]) == (worker.name, 1)
    assert first["message"].startswith(f"cost: with round 1 of study {study.name}, dataset notes has spent epsilon ")
    assert "of at most" in first["message"]
    received = f"received: round 1 of {study.training.rounds} of study {study.name}, for {len(opened.cohort)} sites"
    assert written.entries[1]["message"] == received


def test_a_coordinator_that_asks_without_end_does_not_fill_the_log(
    bert: Path, tmp_path: Path, written: Written
) -> None:
    study = tiny_study(bert)
    diary, asked = Diary("north", "notes"), RoundOpen(study.document(), 1, "1" * 32, "", ("north",), b"")
    with sparing(ROUNDS):
        for _ in range(5 * BURST):
            diary.asked(asked)
    assert len(written.entries) == BURST


def test_a_round_that_led_to_nothing_is_logged_once_if_it_was_paid_for(
    bert: Path, tmp_path: Path, written: Written
) -> None:
    study = tiny_study(bert, privacy=private())
    worker = make_worker(tmp_path, study, seed=None)
    diary = Diary(worker.name, "notes")
    worker.charged = diary.charged
    opened = in_log(worker, round_open(study, adapter_of(worker, study)))
    answer(lambda: opened, lambda: worker, diary)
    for _ in range(2):
        diary.lost(study, frozenset({1, 2}))  # the second one was refused here, and cost nothing
    lost = [entry["message"] for entry in written.entries if entry["event"] == "lost"]
    assert lost == [
        f"lost: round 1 of study {study.name} was aborted; no model came of it, and what it cost stays spent"
    ]
