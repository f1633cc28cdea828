"""Synthetic sites whose updates travel masked, and an exchange that can be turned against them.

A `MaskedSite` surrounds `privet.client.rounds.masked` as a worker does: the same checks, a durable record that
outlives a restart, errors sent as failures. Only the training is a stand-in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privet.client.rounds.masked import MaskedRounds
from privet.client.rounds.received import completed
from privet.common.errors import PrivetError, ProtocolError
from privet.common.masking.vector import vector_of
from privet.common.secagg import quantize
from privet.common.secagg.encoding import decode
from privet.common.secagg.messages import Parameters
from privet.common.secagg.shamir import RandomBytes
from privet.common.secagg.terms import Floor
from privet.common.study.messages import Consent, Contribution, Failure, Message, Offer, RoundOpen, Secured, rebuild
from privet.common.study.study import Study
from privet.server.rounds.consent import gather_participants
from privet.server.rounds.participants import Participant
from privet.server.rounds.rounds import open_round, run_round
from privet.server.rounds.state import RunState
from privet.server.rounds.timing import Timing
from tests.support.secagg_world import Drbg, Journal, identity, pins
from tests.support.synthetic import (
    SPEC,
    Learner,
    MemoryExchange,
    Site,
    optima,
    start_adapter,
    study_of,
    towards,
    unlogged,
)

Answer = Callable[[Message, Message], Message | None]
STAGES = ("advertise", "share", "mask", "confirm", "reveal")
# The type of the message that asks for a step (docs/secure-aggregation.md, section 3), in the byte after the magic.
_ASKS = {3: "share", 5: "mask", 7: "confirm", 9: "reveal"}
_TYPE = 4
REVEAL = 10
QUICK = Timing(gathering=0.0, round=5.0, step=5.0)
DISTRIBUTED = {"mode": "distributed", "epsilon": 4.0, "delta": 1e-4, "clip_norm": 0.5}
STEP = {"local_steps": 1, "optimizer": "sgd", "learning_rate": 1.0, "rounds": 30}


def stage_of(asked: Message) -> str:
    """Return the step that a message of the coordinator asks a site for; nothing outside of rounds."""
    if isinstance(asked, RoundOpen):
        return "advertise"
    return _ASKS.get(asked.body[_TYPE], "") if isinstance(asked, Secured) else ""


def kind_of(reply: Message) -> int:
    """Return the type number of the message of secure aggregation in a reply; 0 where there is none."""
    return reply.body[_TYPE] if isinstance(reply, Secured) and len(reply.body) > _TYPE else 0


def masked_study(**sections: Mapping[str, Any]) -> Study:
    """Return the synthetic study with masked updates. Its bounds cut none of the synthetic sites' steps, and its
    largest count is that of six of them."""
    masking = {"mode": "masked", "bound": 8.0, **sections.pop("secure_aggregation", {})}
    cohort = {"min_sites": 3, **sections.pop("cohort", {})}
    aggregation = {"largest_count": 60, **sections.pop("aggregation", {})}
    return study_of(**sections, aggregation=aggregation, cohort=cohort, secure_aggregation=masking)


def sharing_study(**sections: Mapping[str, Any]) -> Study:
    """Return the synthetic study with shared noise: SGD at rate 1, one drop-out and one corrupt site."""
    privacy = {**DISTRIBUTED, **sections.pop("privacy", {})}
    training = {**STEP, **sections.pop("training", {})}
    aggregation = {"method": "ffa", **sections.pop("aggregation", {})}
    masking = {"bound": None, **sections.pop("secure_aggregation", {})}
    return masked_study(
        privacy=privacy, training=training, aggregation=aggregation, secure_aggregation=masking, **sections
    )


def signed_consent(consent: Message, asked: Message, number: int) -> Consent:
    """Return a consent with the identity of the site of that number, signed by it for the offer."""
    assert isinstance(consent, Consent)
    assert isinstance(asked, Offer)
    key = identity(number).key
    consent = replace(consent, identity=key.public_key().public_bytes_raw().hex())
    return replace(consent, proof=key.sign(consent.signed(asked.run, asked.node)).hex())


@dataclass
class MaskedSite(Site):
    """A site of a masked study.

    Attributes:
        pins: The identity keys that it knows.
        floor: Its minima.
        seed: Makes its keys and rounding reproducible; None takes them from the operating system.
        forge: What it puts into the vector in place of what it trained.
        asleep: Steps that it does not take at all.
        journal: Its durable record.
        trained: The rounds that it was asked to train for, in order.
        contributions: What it put into the vector, by round.
        rounding: The key of its stochastic rounding, by round.
    """

    number: int = 0
    pins: Mapping[str, bytes] = field(default_factory=dict)
    floor: Floor = field(default_factory=Floor)
    seed: bytes | None = None
    forge: Callable[[Contribution], Contribution] = lambda honest: honest
    asleep: Collection[str] = ()
    journal: Journal = field(default_factory=Journal)
    trained: list[int] = field(default_factory=list)
    contributions: dict[int, Contribution] = field(default_factory=dict)
    rounding: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget everything but the durable record, as a new process has."""
        self.kept = {}
        self.rounds = MaskedRounds(identity(self.number), self.pins, self.floor, self.journal)

    def honest(self, asked: Message) -> Message:
        """Return what a site that follows the protocol answers."""
        if stage_of(asked) in self.asleep:
            return Failure("TimeoutError", "asleep", "")
        try:
            return self.respond(asked)
        except PrivetError as error:
            return Failure(type(error).__name__, error.message, error.hint)

    def respond(self, asked: Message) -> Message:
        """Return the answer to a message, or raise what a worker would."""
        if isinstance(asked, Secured):
            return self.rounds.answer(asked, self.contribute)
        if isinstance(asked, RoundOpen):
            return self.open(asked)
        consent = super().honest(asked)
        return signed_consent(consent, asked, self.number) if isinstance(consent, Consent) else consent

    def open(self, opened: RoundOpen) -> Message:
        study = Study.parse(dict(opened.study))
        if (study.secure_aggregation.mode == "masked") != bool(opened.masking):
            raise ProtocolError("the round is not opened as the study says")
        if not opened.masking:
            return super().honest(opened)
        opened = completed(self, study, opened, self.first)
        return self.rounds.open(study, SPEC, opened, self.weight, self._random_bytes(opened.round), self.contribute)

    def contribute(self, opened: RoundOpen) -> Contribution:
        contribution = super().honest(opened)
        assert isinstance(contribution, Contribution)
        self.trained.append(opened.round)
        self.contributions[opened.round] = self.forge(contribution)
        return self.contributions[opened.round]

    def _random_bytes(self, number: int) -> RandomBytes:
        source = os.urandom if self.seed is None else Drbg(self.seed + f" {self.name} {number}".encode())

        def draw(count: int) -> bytes:
            data = source(count)
            self.rounding[number] = data  # the last draw of a round is the key of its rounding
            return data

        return draw


@dataclass
class Relay(MemoryExchange):
    """Carries messages in their wire form. `alter` is what the coordinator asks a node instead."""

    sites: Mapping[int, MaskedSite]
    alter: Callable[[int, Message], Message] = lambda node, message: message

    def ask(self, requests: Mapping[int, Message], *, timeout: float) -> Iterable[tuple[int, Message]]:
        asked = {node: rebuild(self.alter(node, message).parts()) for node, message in requests.items()}
        return [(node, rebuild(reply.parts())) for node, reply in super().ask(asked, timeout=timeout)]

    def kinds(self) -> set[int]:
        """The type numbers of all messages of secure aggregation that sites sent."""
        return {kind_of(reply) for replies in self.replies for reply in replies.values()}


def federation(
    study: Study,
    count: int,
    *,
    learners: Sequence[Learner] | None = None,
    weights: Sequence[int] | None = None,
    seed: bytes | None = b"seed",
    metrics: Callable[[int], Sequence[float]] = lambda number: (),
) -> Relay:
    """Return `count` sites, site-0000 at node 2 and so on, with optima of their own and weights 10, 20, ..."""
    chosen = learners or [towards(optimum) for optimum in optima(study, count)]
    counts = weights or [10 * (index + 1) for index in range(count)]
    known = pins(count)
    sites = [
        MaskedSite(identity(i).name, chosen[i], counts[i], metrics, number=i, pins=known, seed=seed)
        for i in range(count)
    ]
    return Relay(dict(enumerate(sites, start=2)))


def tamper(stages: Collection[str], answer: Answer, rounds: Collection[int] | None = None) -> Answer:
    """Return an answer that follows the protocol but in some stages of some rounds, or of all."""

    def chosen(asked: Message, honest: Message) -> Message | None:
        hit = stage_of(asked) in stages and (rounds is None or getattr(asked, "round", None) in rounds)
        return answer(asked, honest) if hit else honest

    return chosen


def silence(asked: Message, honest: Message) -> Message | None:
    """Answer nothing."""
    return None


def one_round(study: Study, exchange: Relay, state: RunState | None = None, *, offer: bool = True) -> RunState:
    """Run one round over the exchange's sites, from the start adapter or from `state`."""
    state = RunState(0, start_adapter()) if state is None else state
    members = (
        gather_participants(exchange, unlogged(study), state.adapter, 0.0, {}) if offer else members_of(study, exchange)
    )
    return run_round(study, state, exchange, members, open_round(study, state, members), QUICK)


def members_of(study: Study, exchange: Relay) -> dict[str, Participant]:
    """Return the sites as members, without asking them."""
    offer = Offer(study.document())
    consents = {node: site.honest(offer) for node, site in exchange.sites.items()}
    return {c.site: Participant(node, c) for node, c in consents.items() if isinstance(c, Consent)}


def opened_for(exchange: Relay, node: int, number: int) -> RoundOpen:
    """Return how a round was opened for a node."""
    return next(messages[node] for messages in exchange.rounds if messages.get(node, _NONE).round == number)


_NONE = RoundOpen({}, 0, "", "", (), b"")


def exact_mean(study: Study, exchange: Relay, number: int, survivors: Collection[str]) -> NDArray[np.float64]:
    """Return the weighted mean of what the survivors' vectors carry, computed in whole numbers without any mask."""
    nodes = [node for node, site in exchange.sites.items() if site.name in survivors]
    total = np.zeros(sum(tensor.size for tensor in SPEC.trained(study.aggregation.method)))
    weight = 0.0
    for layout, group in _by_layout(exchange, nodes, number):
        counts: NDArray[np.int64] = np.zeros(layout.length, np.int64)
        for site in group:
            sent, key = site.contributions[number], site.rounding[number]
            words = quantize.quantise(layout, vector_of(study, SPEC, sent, layout), lambda count, key=key: key).words  # type: ignore[misc]
            counts += quantize.dequantise(layout, words, 1).numbers
            weight += sent.weight
        parts = [
            (counts[start:end] - len(group) * layout.level) * (segment.bound / layout.level)
            for segment, start, end in zip(layout.segments, layout.starts, layout.starts[1:], strict=False)
            if segment.name in SPEC.names
        ]
        total += np.concatenate(parts)
    return total / weight


def _by_layout(exchange: Relay, nodes: Sequence[int], number: int) -> list[tuple[quantize.Layout, list[MaskedSite]]]:
    """Return the sites of each group with the layout of the group's vector, in order of the groups."""
    groups: dict[bytes, list[MaskedSite]] = {}
    for node in nodes:
        groups.setdefault(opened_for(exchange, node, number).masking, []).append(exchange.sites[node])
    return [(decode(Parameters, masking).layout, sites) for masking, sites in groups.items()]
