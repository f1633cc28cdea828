"""No message is taken in another's name: every kind of message, of every site, answered by every other site.

A member takes part under its own name alone. Whatever it sends that another one wrote, or that carries another one's
name, is its own failure, and costs the other one nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message as FlowerMessage
from flwr.supercore.task_identity import TaskIdentity

from privet.common.errors import RefusedError
from privet.common.flower.records import pack
from privet.common.study.messages import Consent, Contribution, Failure, Message, Offer, RoundOpen, Shown
from privet.server.network.grid import GridExchange
from tests.support.logged_world import LoggedWorld, world_of
from tests.support.masked_world import STAGES, masked_study, signed_consent, stage_of
from tests.support.synthetic import study_of

COUNT = 5
PAIRS = list(permutations(range(COUNT), 2))
Lie = Callable[[LoggedWorld, Message, int, int], Message]


def copied(world: LoggedWorld, asked: Message, member: int, victim: int) -> Message:
    """Send what the victim answers to the same message."""
    return world.exchange.sites[2 + victim].honest(asked)


def copied_consent(world: LoggedWorld, asked: Message, member: int, victim: int) -> Message:
    """Send the consent that the victim gives at its own node."""
    assert isinstance(asked, Offer)
    return world.exchange.sites[2 + victim].honest(replace(asked, node=str(2 + victim)))


def forged_consent(world: LoggedWorld, asked: Message, member: int, victim: int) -> Message:
    """Name the victim and its key, and sign with one's own."""
    honest = copied_consent(world, asked, member, victim)
    own = signed_consent(honest, asked, member)
    assert isinstance(honest, Consent)
    return replace(honest, proof=own.proof)


def own_key_in_its_name(world: LoggedWorld, asked: Message, member: int, victim: int) -> Message:
    """Name the victim, with one's own key and a signature that is right."""
    honest = world.exchange.sites[2 + victim].honest(asked)
    return signed_consent(honest, asked, member)


def of_another_run(world: LoggedWorld, asked: Message, member: int, victim: int) -> Message:
    """Send the victim's true signature, for this node, of another run."""
    assert isinstance(asked, Offer)
    return world.exchange.sites[2 + victim].honest(replace(asked, run="another"))


CONSENTS: list[Lie] = [copied_consent, forged_consent, own_key_in_its_name, of_another_run]


def play(world: LoggedWorld, lie: Lie, member: int, victim: int, here: Callable[[Message], bool]) -> None:
    world.exchange.sites[2 + member].answer = lambda asked, honest: (
        lie(world, asked, member, victim) if here(asked) else honest
    )
    world.play()


def check(world: LoggedWorld, member: int, victim: int, *, asked: bool) -> None:
    """Check that the victim took part as everybody else, and that the member did not, or failed under its own name."""
    statement = world.run.load().statements[-1]
    names = {number: f"site-{number:04d}" for number in range(COUNT)}
    assert statement["type"] == "round-close"
    assert names[victim] in statement["survivors"]
    assert names[member] not in statement["survivors"]
    assert (names[member] in statement["cohort"]) == asked
    assert set(statement["failures"]) == ({names[member]} if asked else set())


@pytest.mark.parametrize("lie", CONSENTS, ids=lambda lie: lie.__name__)
def test_nobody_consents_in_anothers_name(tmp_path: Path, lie: Lie) -> None:
    for number, (member, victim) in enumerate(PAIRS):
        world = world_of(tmp_path / str(number), masked_study(training={"rounds": 1}), COUNT)
        play(world, lie, member, victim, lambda asked: isinstance(asked, Offer))
        check(world, member, victim, asked=False)


@pytest.mark.parametrize("stage", STAGES)
def test_nobody_speaks_in_anothers_name_in_secure_aggregation(tmp_path: Path, stage: str) -> None:
    for number, (member, victim) in enumerate(PAIRS):
        world = world_of(tmp_path / str(number), masked_study(training={"rounds": 1}), COUNT)
        if stage == "reveal":  # a site that reveals answers nothing again: its bytes are taken when it sends them
            sent: dict[int, Message] = {}

            def kept(asked: Message, honest: Message, sent: dict[int, Message] = sent) -> Message:
                if stage_of(asked) == "reveal":
                    sent[0] = honest
                return honest

            world.exchange.sites[2 + victim].answer = kept

            def late(
                world: LoggedWorld, asked: Message, member: int, victim: int, sent: dict[int, Message] = sent
            ) -> Message:
                return sent.get(0, Failure("TimeoutError", "too early", ""))

            play(world, late, member, victim, lambda asked: stage_of(asked) == "reveal")
            statement = world.run.load().statements[-1]
            # What it masked is in the sum; its shares are not needed. Nobody else is blamed.
            assert statement["type"] == "round-close"
            assert set(statement["failures"]) <= {f"site-{member:04d}"}
            continue
        play(world, copied, member, victim, lambda asked, stage=stage: stage_of(asked) == stage)  # type: ignore[misc]
        statement = world.run.load().statements[-1]
        assert statement["type"] == "round-close"
        assert f"site-{victim:04d}" in statement["survivors"]
        assert set(statement["failures"]) <= {f"site-{member:04d}"}
        if stage in ("advertise", "share", "mask"):
            check(world, member, victim, asked=True)


def test_nobody_cosigns_in_anothers_name(tmp_path: Path) -> None:
    for number, (member, victim) in enumerate(PAIRS):
        world = world_of(tmp_path / str(number), masked_study(training={"rounds": 1}), COUNT)
        play(world, copied, member, victim, lambda asked: isinstance(asked, Shown))
        with world.journal() as journal:
            policy = journal.policy
            note = journal._log.accepted(policy)
        assert note is not None
        lines = [line for line in note.decode().split("\n") if line.startswith("— site-")]
        assert not any(f"site-{member:04d}" in line for line in lines)
        assert len(lines) == COUNT - 1


def test_nobody_refuses_in_anothers_name(tmp_path: Path) -> None:
    for number, (member, victim) in enumerate(PAIRS):
        world = world_of(tmp_path / str(number), masked_study(training={"rounds": 1}), COUNT)
        liar = world.sites[f"site-{member:04d}"]
        assert liar.logbook is not None
        speaker = replace(liar.logbook, site=f"site-{victim:04d}")

        def refused(world: LoggedWorld, asked: Message, member: int, victim: int, speaker: object = speaker) -> Message:
            assert isinstance(asked, RoundOpen)
            study = world.study
            run = speaker.run_of(study, asked)  # type: ignore[attr-defined]
            statement = speaker.refuse(  # type: ignore[attr-defined]
                study, run, asked.round, RefusedError("not at night"), "sha256:" + "0" * 64
            )
            return Failure("RefusedError", "not at night", "", statement)

        play(world, refused, member, victim, lambda asked: isinstance(asked, RoundOpen))
        with world.journal() as journal:
            assert not journal.history.refusals
        check(world, member, victim, asked=True)


def test_nobody_contributes_in_the_clear_in_anothers_name(tmp_path: Path) -> None:
    study = study_of(training={"rounds": 1})
    for number, (member, victim) in enumerate(PAIRS):
        world = world_of(tmp_path / str(number), study, COUNT)
        play(world, copied, member, victim, lambda asked: isinstance(asked, RoundOpen))
        check(world, member, victim, asked=True)


# --- the transport ---------------------------------------------------------------------------------------------


class Wire:
    """Flower's grid, as far as an exchange uses it: each node answers with what it is given."""

    def __init__(self, answers: dict[int, Message]) -> None:
        self.answers = answers
        self.sent: dict[str, FlowerMessage] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.answers)

    def push_messages(self, messages: list[FlowerMessage]) -> list[str]:
        ids = []
        for message in messages:
            identity = f"m{message.metadata.dst_node_id}"
            message.metadata.__dict__["_message_id"] = identity
            self.sent[identity] = message
            ids.append(identity)
        return ids

    def pull_messages(self, ids: list[str]) -> list[FlowerMessage]:
        replies = []
        for identity in ids:
            asked = self.sent[identity]
            node = asked.metadata.dst_node_id
            reply = FlowerMessage(pack(self.answers[node]), reply_to=asked)
            reply.metadata.__dict__["_reply_to_message_id"] = identity
            replies.append(reply)
        return replies


def test_a_node_is_heard_in_the_name_of_its_own_site_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1, raising=False)
    owners = {11: "ash", 12: "elm", 13: "oak"}
    empty = np.zeros(0, np.float32)
    for node, name in [(node, name) for node in owners for name in owners.values()]:
        for answer in (
            Consent(name, "s", "d", 1),
            Contribution(name, 1, "0" * 32, 1.0, empty, np.zeros(0), b""),
        ):
            exchange = GridExchange(Wire({node: answer}), owners=lambda: owners)  # type: ignore[arg-type]
            ((_, heard),) = exchange.ask({node: Offer({}, "run", str(node))}, timeout=1)
            assert isinstance(heard, Failure) == (owners[node] != name)
    # A node of nobody, such as one that was revoked in between, is not heard at all.
    exchange = GridExchange(Wire({99: Consent("ash", "s", "d", 1)}), owners=lambda: owners)  # type: ignore[arg-type]
    ((_, heard),) = exchange.ask({99: Offer({}, "run", "99")}, timeout=1)
    assert isinstance(heard, Failure)


def test_a_repeated_offer_is_sent_once_until_it_is_answered_or_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1, raising=False)

    class Slow(Wire):
        pushed = 0
        late: tuple[str, ...] = ()

        def push_messages(self, messages: list[FlowerMessage]) -> list[str]:
            ids = []
            for message in messages:
                self.pushed += 1
                message.metadata.__dict__["_message_id"] = identity = f"m{self.pushed}"
                self.sent[identity] = message
                ids.append(identity)
            return ids

        def pull_messages(self, ids: list[str]) -> list[FlowerMessage]:
            return super().pull_messages([identity for identity in ids if identity in self.late])

    wire, offer = Slow({11: Consent("ash", "s", "d", 1)}), Offer({}, "run", "11")
    exchange = GridExchange(wire, poll=0.001)  # type: ignore[arg-type]
    for _ in range(3):
        assert list(exchange.ask({11: offer}, timeout=0.002)) == []
    assert wire.pushed == 1
    wire.late = ("m1",)
    assert [node for node, _ in exchange.ask({11: offer}, timeout=1)] == [11]
    # Answered: the next one is a new question. Forgotten: the late answer to the old one is never read.
    wire.late = ()
    assert list(exchange.ask({11: offer}, timeout=0.002)) == []
    assert wire.pushed == 2
    monkeypatch.setattr("privet.server.network.grid._FORGOTTEN", 0.0)
    wire.late = ("m2",)
    assert list(exchange.ask({11: offer}, timeout=0.002)) == []
    assert wire.pushed == 3
