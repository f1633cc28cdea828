"""A site's part in the secure aggregation of a round: one live round per study, and one answer to each message.

The protocol's steps are `privet.common.secagg.site`; here is what surrounds them. A round begins with a
`RoundOpen`, which ends the one before. The same message again gets the same bytes again; another one in its
place is refused by the protocol. The secrets live in this object alone: a site that restarts has dropped out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from privet.common.errors import ProtocolError, RefusedError
from privet.common.masking.parameters import check_proposal, inputs_of
from privet.common.masking.vector import words_of
from privet.common.secagg import site as protocol
from privet.common.secagg.encoding import decode as read
from privet.common.secagg.encoding import encode
from privet.common.secagg.messages import Delivery, Parameters, Proof, ProtocolMessage, Roster, Survivors
from privet.common.secagg.shamir import RandomBytes
from privet.common.secagg.terms import Floor, Pins
from privet.common.study.adapter import AdapterSpec
from privet.common.study.messages import Contribution, RoundOpen, Secured
from privet.common.study.study import Study

Contribute = Callable[[RoundOpen], Contribution]
"""Trains for an opened round, or returns what was trained for it before."""

State = Callable[[RoundOpen, bytes], bytes]
"""From the round and the masked vector to what the site states of it for the round log."""

_State = protocol.Advertised | protocol.Shared | protocol.MaskedState | protocol.Confirmed | None


@dataclass
class _Round:
    """The live round of a study.

    Attributes:
        state: Where the protocol stands; None once the site has revealed.
        steps: How many messages have been answered.
        answers: What was answered, by SHA-256 of what was asked.
    """

    study: Study
    study_digest: str
    spec: AdapterSpec
    opened: RoundOpen
    parameters: Parameters
    random_bytes: RandomBytes
    state: _State
    steps: int = 0
    answers: dict[bytes, Secured] = field(default_factory=dict)


@dataclass
class MaskedRounds:
    """A site's rounds under secure aggregation.

    Attributes:
        identity: The site's name and long-term key.
        pins: The identity keys of all sites that it knows.
        floor: Its minima.
        record: Stores once per round that the site has masked, and that it has revealed.
        state: States the upload for the round log.
    """

    identity: protocol.Identity
    pins: Pins
    floor: Floor
    record: protocol.Recorder
    state: State = lambda opened, upload: b""
    _live: dict[str, _Round] = field(default_factory=dict)

    def open(
        self, study: Study, spec: AdapterSpec, opened: RoundOpen, declared: int, random_bytes: RandomBytes
    ) -> Secured:
        """Accept a round, whose adapter has been checked, and return this site's keys for it.

        Raises:
            ProtocolError, RefusedError, VerificationError: The round is not what the study, the pinned keys and
                this site's floor allow.
        """
        study_digest = study.digest
        live = self._live.get(study_digest)
        if live is not None and live.opened == opened:
            return self._again(live)
        if opened.declared != declared:
            raise RefusedError(
                f"round {opened.round}: this site consented with another count than it has now",
                "set `declared_count` in the site file, so that new data does not change it",
            )
        check_known(opened, self.pins)
        parameters = read(Parameters, opened.masking)
        check_proposal(study, spec, opened, parameters, declared)
        inputs = inputs_of(study_digest, opened.round, opened.adapter_digest)
        state, advert = protocol.advertise(self.identity, parameters, inputs, self.pins, self.floor, random_bytes)
        live = _Round(study, study_digest, spec, opened, parameters, random_bytes, state)
        self._live[study_digest] = live
        return _answer(live, opened.masking, advert)

    def _again(self, live: _Round) -> Secured:
        answer = live.answers.get(_key(live.opened.masking))
        if answer is None:
            raise ProtocolError(f"round {live.opened.round}: this site has revealed, the round is over")
        return answer

    def steps(self, asked: Secured) -> int:
        """Return how many messages of the round that `asked` belongs to were answered here; 0 if it is not live."""
        return 0 if self.opened(asked) is None else self._live[asked.study].steps

    def opened(self, asked: Secured) -> RoundOpen | None:
        """Return how the round was opened that `asked` belongs to; None if it is not live."""
        live = self._live.get(asked.study)
        if live is None or (live.opened.round, live.opened.nonce) != (asked.round, asked.nonce):
            return None
        return live.opened

    def answer(self, asked: Secured, contribute: Contribute) -> Secured:
        """Return this site's answer to one message of the coordinator; the one to a `Delivery` takes training.

        Raises:
            ProtocolError: The round is not this site's live one, or the message is not the one it waits for.
            PrivetError: As the protocol's steps and `contribute` raise it. The round can go on with a message
                that verifies.
        """
        if not self.steps(asked):
            raise ProtocolError(
                f"round {asked.round}: this site is not in it, or was restarted since", "it has dropped out"
            )
        live = self._live[asked.study]
        known = live.answers.get(_key(asked.body))
        if known is not None:
            return known
        message: ProtocolMessage
        statement = b""
        match live.state:
            case protocol.Advertised():
                live.state, message = protocol.share(live.state, read(Roster, asked.body))
            case protocol.Shared():
                delivery = read(Delivery, asked.body)
                protocol.open_delivery(live.state, delivery)  # before training, which may cost privacy
                layout = live.parameters.layout
                words = words_of(live.study, live.spec, contribute(live.opened), layout, live.random_bytes)
                live.state, message = protocol.mask(live.state, delivery, words, self.record)
                statement = self.state(live.opened, encode(message))
            case protocol.MaskedState():
                live.state, message = protocol.confirm(live.state, read(Survivors, asked.body))
            case protocol.Confirmed():
                message = protocol.reveal(live.state, read(Proof, asked.body), self.record)
                live.state = None
                live.answers.clear()  # the vector among them
            case _:
                raise ProtocolError(f"round {asked.round}: this site has revealed, the round is over")
        return _answer(live, asked.body, message, statement)


def check_known(opened: RoundOpen, pins: Pins) -> None:
    """Raise `RefusedError` unless all sites of a round's cohort have pinned keys."""
    unknown = [name for name in opened.cohort if name not in pins]
    if unknown:
        raise RefusedError(
            f"round {opened.round}: its cohort names {len(unknown)} sites that this one does not know",
            "list every site's public key under [peers] in the site file",
        )


def _answer(live: _Round, asked: bytes, message: ProtocolMessage, statement: bytes = b"") -> Secured:
    answer = Secured(live.study_digest, live.opened.round, live.opened.nonce, encode(message), statement)
    live.answers[_key(asked)] = answer
    live.steps += 1
    return answer


def _key(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()
