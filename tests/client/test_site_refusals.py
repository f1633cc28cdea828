"""What a site says no to: told in the same words at both ends, signed for the log, and in the site's own log."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from privet.client.budget.releases import open_ledger
from privet.client.network.fleet import Received, RunOverError
from privet.client.network.node import Connection, NodeState
from privet.client.policy.consent import policy_digest
from privet.client.rounds import answers
from privet.client.rounds.answers import answer
from privet.client.rounds.site import RealSite
from privet.client.rounds.worker import Worker
from privet.common.errors import ProtocolError, RefusedError
from privet.common.log.envelope import verify_envelope
from privet.common.log.statements import Refusal
from privet.common.pki.keyfile import public_key
from privet.common.refusals import BURST, SECONDS, Sparing
from privet.common.study.messages import Consent, Failure, Message, Offer, RoundOpen, Secured
from privet.common.study.study import Study
from tests.client.test_masked_worker import Workers, masked_study, one_round, proposed, real, workers
from tests.client.test_paid_rounds import STUDIES
from tests.client.test_worker import adapter_of, in_log, make_worker, round_open
from tests.server.test_refusals import Time, Written
from tests.support.fleet_world import Tally
from tests.support.masked_world import stage_of
from tests.support.tiny import RECORDS, private, random_adapter, tiny_study, write_policy
from tests.system.test_fleet import received_of


@pytest.fixture
def written() -> Iterator[Written]:
    """The site's own log."""
    with Written.of("privet.site") as found:
        answers._refusals._windows.clear()
        yield found


def asked_of(worker: Worker, asked: Message) -> Message:
    """Return what the site answers, as its node sends it."""
    return answer(lambda: asked, lambda: worker)


def refused(worker: Worker, asked: Message) -> tuple[Failure, Refusal]:
    """Return a site's refusal: what is told, and what it signed."""
    reply = asked_of(worker, asked)
    assert isinstance(reply, Failure), reply
    key = worker.site.config.identity_key()
    assert key is not None
    _, stated = verify_envelope(reply.statement, (bytes.fromhex(public_key(key)),))
    assert isinstance(stated, Refusal)
    assert (stated.site, stated.policy) == (worker.name, policy_digest(worker.site.config))
    return reply, stated


@pytest.fixture
def agreed(bert: Path, tmp_path: Path) -> tuple[Study, Worker, RoundOpen]:
    """A private study, a site that agreed to it, and its first round, in the log."""
    study = tiny_study(bert, privacy=private())
    worker = make_worker(tmp_path, study, seed=None)
    opened = in_log(worker, round_open(study, adapter_of(worker, study)))
    return study, worker, opened


def test_a_study_with_weaker_protection_than_was_agreed_is_refused(
    bert: Path, tmp_path: Path, agreed: tuple[Study, Worker, RoundOpen], written: Written
) -> None:
    _, worker, _ = agreed
    (tmp_path / "north-train.jsonl").unlink()  # nothing is opened for it
    for change in (
        {"privacy": {"mode": "none"}},
        {"privacy": private(epsilon=80.0)},
        {"privacy": private(), "data.unit": "text"},
    ):
        weaker = tiny_study(bert, **change)
        reply, stated = refused(worker, Offer(weaker.document(), "run"))
        assert "has not approved study" in reply.message
        assert (stated.run, stated.round) == ("run", 0)
        entry = written.last()
        assert (entry["event"], entry["peer"]) == ("refused", "coordinator")
        assert reply.message in entry["message"]
        # Nor is it let in by the back door, as a round.
        back = asked_of(worker, replace(round_open(weaker, random_adapter(worker.open(agreed[0])[1].spec))))
        assert isinstance(back, Failure)
        assert "has not approved" in back.message


def test_a_round_is_refused_by_a_policy_that_was_changed_since(
    tmp_path: Path, agreed: tuple[Study, Worker, RoundOpen], written: Written
) -> None:
    study, worker, opened = agreed
    assert isinstance(asked_of(worker, Offer(study.document(), "run")), Consent)
    write_policy(tmp_path / "north.policy.toml", **{"limits.hours_utc": ["03:00-03:01"], "model.max_rank": 3})
    reply, stated = refused(worker, opened)
    assert "E_RANK: model.max_rank: asked 4, allowed at most 3" in reply.message
    assert (stated.run, stated.round, stated.code) == ("run", 1, "E_RANK")
    assert (stated.asked, stated.allowed) == ("4", "at most 3")
    assert reply.message in written.last()["message"]
    assert written.last()["reason"] == "PolicyError E_RANK"


def test_an_update_is_refused_before_it_leaves(tmp_path: Path, agreed: tuple[Study, Worker, RoundOpen]) -> None:
    _, worker, opened = agreed
    write_policy(tmp_path / "north.policy.toml", **{"limits.max_upload_bytes": 100})
    _, stated = refused(worker, opened)
    assert (stated.run, stated.round, stated.code) == ("run", 1, "E_UPLOAD")
    assert open_ledger(worker.site.config).receipts("notes") == ()


def test_what_the_budget_does_not_cover_is_refused_without_a_number(
    bert: Path, tmp_path: Path, written: Written
) -> None:
    study = tiny_study(bert, privacy=private(epsilon=8.0))
    worker = make_worker(tmp_path, study, seed=None)
    adapter = adapter_of(worker, study)
    opened = in_log(worker, round_open(study, adapter))
    config = worker.site.config
    assert config.limit is not None
    poorer = config.model_copy(update={"limit": config.limit.model_copy(update={"epsilon": 0.1})})
    reply, stated = refused(Worker(RealSite(poorer)), opened)
    assert (reply.error, stated.code, stated.asked, stated.allowed) == ("BudgetExhaustedError", "E_BUDGET", "", "")
    assert "0.1" not in reply.message + reply.hint
    assert "0.1" in written.last()["message"]  # the site's own log says why


@pytest.mark.parametrize("mode", ["plain", "distributed"])
def test_a_masked_round_is_refused_while_it_is_played(bert: Path, tmp_path: Path, mode: str) -> None:
    if mode == "distributed":
        study = masked_study(bert, **STUDIES["distributed"])
        sites = workers(real(tmp_path, study, limit={**RECORDS, "epsilon": 50.0}))
    else:
        study = masked_study(bert)
        sites = workers(real(tmp_path, study))

    class Forbidding(Workers):
        """Each site's policy changes between its keys and its update."""

        def answer(self, node: int, asked: Message) -> Message:
            if stage_of(asked) == "mask":
                name = self.sites[node].name
                write_policy(tmp_path / f"{name}.policy.toml", **{"limits.max_upload_bytes": 100})
                _, stated = refused(self.sites[node], asked)
                assert (stated.run, stated.round, stated.code) == ("run", 1, "E_UPLOAD")
                raise RefusedError("as was asserted")
            return super().answer(node, asked)

    with pytest.raises(Exception, match="as was asserted"):
        one_round(study, sites, exchange=Forbidding(sites))


def test_a_round_of_no_run_in_the_log_is_refused_without_a_signature(
    bert: Path, agreed: tuple[Study, Worker, RoundOpen]
) -> None:
    # What a site signs is evidence: it does not name a run that only the caller has heard of.
    study, worker, opened = agreed
    (worker.site.config.approvals or Path()).write_text("")
    for bare in (
        replace(opened, evidence=type(opened.evidence)()),
        replace(opened, evidence=replace(opened.evidence, run=b"{}")),
        replace(opened, evidence=replace(opened.evidence, run=opened.evidence.opened)),
        # Nor does it put its name to a round, or to a study, that was opened as another one.
        replace(opened, round=2),
        replace(opened, nonce="f" * 32),
        replace(opened, study=tiny_study(bert, privacy=private(epsilon=80.0)).document()),
        Secured(study.digest, 1, "1" * 32, b""),
    ):
        reply = asked_of(worker, bare)
        assert isinstance(reply, Failure)
        assert reply.statement == b""
    stated = refused(worker, opened)[1]
    assert (stated.run, stated.study) == ("run", study.digest)


def test_a_coordinator_that_sends_two_sites_different_adapters(bert: Path, tmp_path: Path, written: Written) -> None:
    study = masked_study(bert)
    sites = workers(real(tmp_path, study))
    spec = next(iter(sites.values())).open(study)[1].spec
    first, second = (random_adapter(spec, seed, scale=0.1) for seed in (1, 2))
    opened = proposed(study, sites, first)  # what all sites have cosigned
    told = [
        opened,
        replace(opened, adapter=second.data),  # other bytes under the digest that was logged
        replace(opened, adapter=second.data, adapter_digest=second.digest),  # another adapter, openly
    ]
    replies = [asked_of(worker, asked) for worker, asked in zip(sites.values(), told, strict=True)]
    assert isinstance(replies[0], Secured)
    for reply, said in zip(
        replies[1:], ("expected adapter", "the round log does not hold the adapter that this site expects"), strict=True
    ):
        assert isinstance(reply, Failure)
        assert reply.error == "VerificationError"
        assert said in reply.message
        assert any(said in entry["message"] and entry["event"] == "refused" for entry in written.entries)


class Hasty:
    """A coordinator's side of a node's connection: its messages have expired when they arrive."""

    def __init__(self, received: Received, most: int) -> None:
        self.received, self.left, self.stop = received, most, threading.Event()

    def activate(self, before: int | None) -> int:
        return 7

    def beat(self) -> bool:
        return True

    def deactivate(self, node: int) -> None:
        pass

    def receive(self) -> Received:
        self.left -= 1
        if self.left == 0:
            self.stop.set()
        return self.received

    def fetch(self, received: Received) -> None:
        raise RunOverError

    def confirm(self, received: Received) -> None:
        pass


def test_a_coordinator_whose_messages_expire_at_once_does_not_fill_a_sites_disk(
    tmp_path: Path, written: Written, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "privet.site")
    monkeypatch.setattr("privet.client.network.node.write_durably", lambda path, data: None)  # it waits for the disk
    link = Hasty(received_of(Offer({}, "")), 500)
    link.received.header.metadata.ttl = 1e-9
    Connection(link, lambda read: read(), NodeState(tmp_path / "state"), Tally(), link.stop).serve()  # type: ignore[arg-type]
    assert link.left == 0
    assert 0 < len([entry for entry in written.entries if "no longer waits" in entry["message"]]) <= BURST
    assert len(written.entries) <= 4 * BURST


def test_of_what_is_said_too_often_the_number_is_kept() -> None:
    clock, found = Time(), Written()
    logger = logging.Logger("site")
    logger.addHandler(found.handler)
    logger.addFilter(Sparing(clock))
    for number in range(50):
        logger.warning("it was asked by %d", number)
    logger.warning("something else")
    assert [entry["message"] for entry in found.entries[BURST - 1 :]] == ["it was asked by 9", "something else"]
    clock.now = SECONDS
    logger.warning("it was asked by %d", 50)
    assert found.entries[-1]["suppressed"] == 50 - BURST
    logger.warning("it was asked by %d", 51)
    assert "suppressed" not in found.entries[-1]


def test_a_coordinator_that_asks_without_end_does_not_fill_a_sites_disk(
    agreed: tuple[Study, Worker, RoundOpen], written: Written
) -> None:
    _, worker, opened = agreed
    for _ in range(50):
        asked_of(worker, replace(opened, cohort=("south",)))
    assert len(written.entries) == BURST

    def spoilt() -> Worker:
        raise RuntimeError("a record")

    for _ in range(50):
        assert isinstance(answer(lambda: opened, spoilt), Failure)
    assert len(written.entries) == 2 * BURST
    assert "a record" not in written.stream.getvalue()


@pytest.mark.parametrize("raised", [MemoryError, torch.OutOfMemoryError])
def test_a_site_without_memory_reads_what_to_lower_and_the_coordinator_does_not(
    raised: type[Exception], agreed: tuple[Study, Worker, RoundOpen], written: Written
) -> None:
    def large() -> Worker:
        raise raised("a record")

    reply = answer(lambda: agreed[2], large)
    assert isinstance(reply, Failure)
    assert "memory" not in f"{reply.message} {reply.hint}"
    assert "lower resources.physical_batch" in written.stream.getvalue()
    assert "a record" not in written.stream.getvalue()


def test_the_sites_own_log_does_not_tell_the_coordinator_what_to_do() -> None:
    from privet.client.rounds import answers

    for more in (": it counts as a drop-out", ", and report this as a bug", ""):
        said = answers._for_the_site(ProtocolError("what", f"continue the round without this site{more}"))
        assert said.startswith("what (this site sits the round out, and takes part in the next one")
        assert ("report this as a bug" in said) == ("bug" in more)
    assert answers._for_the_site(ProtocolError("what", "do this")) == "what (do this)"
