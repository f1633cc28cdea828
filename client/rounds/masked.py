"""A site's part in the secure aggregation of a round: one live round per study, and one answer to each message.

In a block of rounds, the pairs' secrets outlive a round, and a later `RoundOpen` is answered with the masked vector.

The protocol's steps are in `privet.common.secagg.site`; this module keeps the state between them. A `RoundOpen` begins
a round and ends the one before. A message that comes again gets the same bytes again. The protocol refuses a different
message in its place. The secrets are in memory only: a site that restarts has dropped out of the round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from privet.common.errors import ProtocolError, RefusedError
from privet.common.masking.groups import check_columns
from privet.common.masking.parameters import check_proposal, check_step, inputs_of
from privet.common.masking.vector import words_of
from privet.common.secagg import block as blocks
from privet.common.secagg import dealt
from privet.common.secagg import site as protocol
from privet.common.secagg.encoding import begins_step, decode, encode, is_kind
from privet.common.secagg.messages import (
    BlockParameters,
    DealDelivery,
    DealtParameters,
    Delivery,
    Expected,
    Finish,
    LinkDelivery,
    Masked,
    Parameters,
    Proof,
    ProtocolMessage,
    Roster,
    Step,
    Survivors,
)
from privet.common.secagg.quantize import Words
from privet.common.secagg.shamir import RandomBytes
from privet.common.secagg.suites import MLKEM, Kem
from privet.common.secagg.terms import Floor, Pins, check_parameters
from privet.common.study.adapter import AdapterSpec
from privet.common.study.messages import Contribution, RoundOpen, Secured
from privet.common.study.study import Study

Contribute = Callable[[RoundOpen], Contribution]
"""Trains for an opened round, or returns the contribution that was trained for it before."""

Revealed = Callable[[Study, RoundOpen], None]
"""Is told that a round's sum holds this site's vector, and that this site has helped to unmask it."""

State = Callable[[RoundOpen, bytes], bytes]
"""Returns the site's signed statement for the round log, from the round and the masked vector."""

_OVER = "the coordinator must open a new round: a site answers nothing in a round after revealing its shares"
_State = (
    protocol.Advertised
    | protocol.Shared
    | protocol.MaskedState
    | protocol.Confirmed
    | blocks.Linked
    | blocks.Block
    | dealt.Dealt
    | dealt.DealtBlock
    | None
)
_Block = blocks.Block | dealt.DealtBlock


@dataclass
class _Round:
    """The live round of a study.

    Attributes:
        state: State of the protocol; None once the site has revealed. That of a block outlives its rounds.
        steps: Number of messages answered.
        answers: Answers, by SHA-256 of the message answered.
        begun: In a later round of a block, the nonce of its first one.
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
    begun: str | None = None


@dataclass
class MaskedRounds:
    """A site's rounds under secure aggregation.

    Attributes:
        identity: The site's name and long-term key.
        pins: The pinned identity keys of all sites.
        floor: Its minima.
        record: Stores, once per round, that the site has masked and that it has revealed.
        state: Signs the statement of the upload for the round log.
        kem: Encapsulates secrets for other sites.
        revealed: Is told when the site has revealed its part in a round.
    """

    identity: protocol.Identity
    pins: Pins
    floor: Floor
    record: protocol.Recorder
    state: State = lambda opened, upload: b""
    kem: Kem = MLKEM
    revealed: Revealed = lambda study, opened: None
    _live: dict[str, _Round] = field(default_factory=dict)

    def open(
        self,
        study: Study,
        spec: AdapterSpec,
        opened: RoundOpen,
        declared: int,
        random_bytes: RandomBytes,
        contribute: Contribute,
    ) -> Secured:
        """Accept a round whose adapter has been checked, and return this site's keys for it.

        In a later round of a block, return the masked vector.

        Raises:
            ProtocolError, RefusedError, VerificationError: The study, the pinned keys or this site's floor do not
                allow the round.
            PrivetError: As `contribute` raises it, in a later round of a block.
        """
        study_digest = study.digest
        live = self._live.get(study_digest)
        if live is not None and live.opened == opened:
            return self._again(live)
        if opened.declared != declared:
            raise RefusedError(
                f"round {opened.round}: the declared count has changed since this site consented",
                "set `declared_count` in the site file, so that new data does not change the count",
            )
        check_known(opened, self.pins)
        if begins_step(opened.masking):
            live, block = self._later(live, study, spec, opened, declared, random_bytes)
            answer = _answer(live, opened.masking, *self._in_block(live, block, opened.masking, contribute))
            # Not before: if training fails, the coordinator may ask for this round again.
            self._live[study_digest] = live
            return answer
        if live is not None and live.begun == opened.nonce:
            raise ProtocolError(
                f"round {opened.round}: this site has begun a block of rounds with this message, and is in a later one",
                "open a new round; a late copy of a message ends no block",
            )
        parameters = _proposed(study, opened.masking)
        # The site derives the parameters from the study itself: a coordinator that proposed weaker ones is refused.
        check_proposal(study, spec, opened, parameters, declared)
        self._check_columns(study, opened, parameters, [member.name for member in parameters.cohort])
        inputs = inputs_of(study_digest, opened.round, opened.adapter_digest)
        state, advert = protocol.advertise(
            self.identity, parameters, inputs, self.pins, self.floor, random_bytes, kem=self.kem
        )
        live = _Round(study, study_digest, spec, opened, parameters, random_bytes, state)
        self._live[study_digest] = live
        return _answer(live, opened.masking, advert)

    def _check_columns(self, study: Study, opened: RoundOpen, parameters: Parameters, sites: Collection[str]) -> None:
        """Check that enough sites of a sum have each rank: by the study, and of this site's rank by its floor too.

        Raises:
            TooFewSitesError: Fewer have one of the ranks than the study needs.
            RefusedError: Fewer have this site's rank than its floor demands.
        """
        check_columns(study, sites, parameters.corrupt, opened.round)
        if not study.lora.site_ranks or study.sums_units(opened.round):
            return
        own = study.rank_at(self.identity.name)
        alike = sum(study.rank_at(site) == own for site in sites)
        if alike < self.floor.survivors:
            raise RefusedError(
                f"round {opened.round}: {alike} of {len(sites)} sites train {own} columns of B, as this site does; its "
                f"floor demands {self.floor.survivors} sites in a sum",
                f"give this site a rank that {self.floor.survivors} sites have, in lora.site_ranks of a new study; or "
                "lower survivors under [floor] in the site file",
            )

    def _later(
        self,
        live: _Round | None,
        study: Study,
        spec: AdapterSpec,
        opened: RoundOpen,
        declared: int,
        random_bytes: RandomBytes,
    ) -> tuple[_Round, _Block]:
        """Return a later round of the block that this site has keys for, and the block.

        Raises:
            ProtocolError, RefusedError, VerificationError: As `open`; or this site has no keys for the block.
        """
        live, block = _block_of(live, opened.masking, opened.round)
        parameters = check_step(study, spec, opened, live.parameters, declared)
        # Again for each round: whom the site trusts may have changed since the block began.
        check_parameters(parameters, self.pins, self.floor)
        begun = live.opened.nonce if live.begun is None else live.begun
        return _Round(study, live.study_digest, spec, opened, parameters, random_bytes, block, begun=begun), block

    def _in_block(self, live: _Round, block: _Block, step: bytes, contribute: Contribute) -> tuple[Masked, bytes]:
        """Train for a round of a block, and return the masked vector and this site's statement of the round."""
        opened, number = live.opened, live.opened.round
        inputs = inputs_of(live.study_digest, number, opened.adapter_digest)
        # Checked before training, which costs the dataset privacy.
        if isinstance(block, dealt.DealtBlock):
            expected = decode(Expected, step).sites
            block.check(number, expected)
            self._check_survivors(live, expected)
            message = block.mask(number, inputs, expected, _trained(live, contribute), self.record)
        else:
            block.check(number)
            message = block.mask(number, inputs, _trained(live, contribute), self.record)
        return message, self.state(opened, encode(message))

    def _end(self, live: _Round, block: dealt.DealtBlock, asked: bytes) -> ProtocolMessage:
        """Answer a message that follows the masked vector, in a round of a block that tolerates drop-outs."""
        if is_kind(Survivors, asked):
            survivors = decode(Survivors, asked)
            self._check_survivors(live, survivors.survivors)
            return block.confirm(survivors, self.record)
        message = (
            block.finish(decode(Finish, asked), self.record)
            if is_kind(Finish, asked)
            else block.reveal(decode(Proof, asked), self.record)
        )
        # As after the reveal of a round with a set-up of its own.
        live.answers.clear()
        self.revealed(live.study, live.opened)
        return message

    def _check_survivors(self, live: _Round, sites: Collection[int]) -> None:
        """Check the sites that a sum is to hold, by number. Raises as `_check_columns`."""
        members = live.parameters.cohort
        names = [members[site].name for site in sites if site < len(members)]
        self._check_columns(live.study, live.opened, live.parameters, names)

    def _again(self, live: _Round) -> Secured:
        answer = live.answers.get(_key(live.opened.masking))
        if answer is None:
            raise ProtocolError(
                f"round {live.opened.round}: this site has revealed its shares, so the round is over", _OVER
            )
        return answer

    def steps(self, asked: Secured) -> int:
        """Return the number of messages answered in the round that `asked` belongs to; 0 if it is not the live one."""
        return 0 if self.opened(asked) is None else self._live[asked.study].steps

    def opened(self, asked: Secured) -> RoundOpen | None:
        """Return the `RoundOpen` of the round that `asked` belongs to; None if it is not the live one."""
        live = self._live.get(asked.study)
        if live is None or (live.opened.round, live.opened.nonce) != (asked.round, asked.nonce):
            return None
        return live.opened

    def answer(self, asked: Secured, contribute: Contribute) -> Secured:
        """Return this site's answer to one message of the coordinator.

        Only the answer to a `Delivery`, a `Step` or an `Expected` takes training.

        Raises:
            ProtocolError: The round is not this site's live one, or the message is not the next one.
            PrivetError: As the protocol's steps and `contribute` raise it. The round can continue with a message
                that verifies.
        """
        if not self.steps(asked):
            raise ProtocolError(
                f"round {asked.round}: this site is not in the round, or has restarted since it began",
                "continue the round without this site: it counts as a drop-out",
            )
        live = self._live[asked.study]
        # A repeated request gets the stored bytes: a second answer of other bytes could weaken the masks.
        known = live.answers.get(_key(asked.body))
        if known is not None:
            return known
        message: ProtocolMessage
        statement = b""
        match live.state:
            case protocol.Advertised() if isinstance(live.parameters, DealtParameters):
                live.state, message = dealt.deal(live.state, decode(Roster, asked.body))
            case dealt.Dealt():
                live.state, message = dealt.join(live.state, decode(DealDelivery, asked.body))
            case dealt.DealtBlock() if not begins_step(asked.body):
                message = self._end(live, live.state, asked.body)
            case protocol.Advertised() if isinstance(live.parameters, BlockParameters):
                live.state, message = blocks.link(live.state, decode(Roster, asked.body))
            case blocks.Linked():
                live.state, message = blocks.join(live.state, decode(LinkDelivery, asked.body))
            case blocks.Block() | dealt.DealtBlock():
                live, block = _block_of(live, asked.body, asked.round)
                message, statement = self._in_block(live, block, asked.body, contribute)
            case protocol.Advertised():
                live.state, message = protocol.share(live.state, decode(Roster, asked.body))
            case protocol.Shared():
                shares = decode(Delivery, asked.body)
                # Before training: a delivery that does not verify must not cost the dataset any privacy.
                protocol.open_delivery(live.state, shares)
                words = _trained(live, contribute)
                # `mask` stores durably, before it returns the vector, that this round is masked. Two vectors under one
                # set of masks would give their difference away, also after a restart.
                live.state, message = protocol.mask(live.state, shares, words, self.record)
                statement = self.state(live.opened, encode(message))
            case protocol.MaskedState():
                survivors = decode(Survivors, asked.body)
                confirmed, message = protocol.confirm(live.state, survivors)
                # Before the site goes on to a state that could reveal. Every site checks, not those of the smallest
                # rank class alone: the others may be enough for a quorum.
                self._check_survivors(live, survivors.survivors)
                live.state = confirmed
            case protocol.Confirmed():
                message = protocol.reveal(live.state, decode(Proof, asked.body), self.record)
                # With the shares revealed, masks can be removed: nothing of the round is kept or sent again.
                live.state = None
                live.answers.clear()
                self.revealed(live.study, live.opened)
            case _:
                raise ProtocolError(
                    f"round {asked.round}: this site has revealed its shares, so the round is over", _OVER
                )
        return _answer(live, asked.body, message, statement)


def check_known(opened: RoundOpen, pins: Pins) -> None:
    """Raise `RefusedError` unless this site has pinned a key for every site of a round's cohort."""
    unknown = [name for name in opened.cohort if name not in pins]
    if unknown:
        raise RefusedError(
            f"round {opened.round}: its cohort holds {len(unknown)} sites whose public keys this site has not pinned",
            "list the public key of every site of the cohort under [peers] in the site file",
        )


def _proposed(study: Study, masking: bytes) -> Parameters:
    """Return the parameters that the coordinator proposes, of the study's kind: of one round, or of a block."""
    if study.secure_aggregation.block is None:
        return decode(Parameters, masking)
    # Which of the two kinds of block it has to be follows from the study and the cohort (`check_proposal`).
    return decode(DealtParameters if is_kind(DealtParameters, masking) else BlockParameters, masking)


def _trained(live: _Round, contribute: Contribute) -> Words:
    """Train, and return the vector's words."""
    return words_of(live.study, live.spec, contribute(live.opened), live.parameters.layout, live.random_bytes)


def _block_of(live: _Round | None, step: bytes, round_number: int) -> tuple[_Round, _Block]:
    """Return the live round and its block; raise `ProtocolError` unless a `Step` or `Expected` is for that block."""
    block = None if live is None else live.state
    match block:
        case blocks.Block():
            roster = decode(Step, step).roster
        case dealt.DealtBlock():
            roster = decode(Expected, step).roster
        case _:
            roster = b""
    if live is None or not isinstance(block, _Block) or block.roster != roster:
        raise ProtocolError(
            f"round {round_number}: this site has no keys for this block of rounds, or has restarted since it began",
            "set up a new block: without this site, the round has no result",
        )
    return live, block


def _answer(live: _Round, asked: bytes, message: ProtocolMessage, statement: bytes = b"") -> Secured:
    answer = Secured(live.study_digest, live.opened.round, live.opened.nonce, encode(message), statement)
    live.answers[_key(asked)] = answer
    live.steps += 1
    return answer


def _key(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()
