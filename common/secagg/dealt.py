"""A site's side of a block that tolerates drop-outs: the secrets of all its rounds are shared in one set-up.

::

    advertise(identity, DealtParameters, ...)            -> Advertised, Advertise
    deal(Advertised, Roster)                             -> Dealt, Deal
    join(Dealt, DealDelivery)                            -> DealtBlock, Joined
    DealtBlock.mask(round, inputs, expected, ...)        -> Masked      (once for each round)
    DealtBlock.finish(Finish, record)                    -> Reveal      (if all expected sites sent a vector)
    DealtBlock.confirm(Survivors, record)                -> Confirm     (if one is missing)
    DealtBlock.reveal(Proof, record)                     -> Reveal

A site either finishes a round or confirms survivors in it, and stores which before it answers. So at most one sum of a
round can be unmasked. Secrets of different rounds are independent. The argument is in docs/secure-aggregation.md,
section 15.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from privet.common.errors import ProtocolError
from privet.common.secagg import graph, masks, shamir
from privet.common.secagg import site as protocol
from privet.common.secagg.links import HybridChannels, check_promised, pair_of, wrap_of
from privet.common.secagg.messages import (
    DEALT_BYTES,
    DIGEST_BYTES,
    SECRET_BYTES,
    Confirm,
    Deal,
    DealDelivery,
    DealtParameters,
    Finish,
    Joined,
    Masked,
    Proof,
    Reveal,
    Roster,
    Sealed,
    Survivors,
    Tag,
    Wrap,
)
from privet.common.secagg.quantize import Words
from privet.common.secagg.shamir import SHARE_BYTES
from privet.common.secagg.signatures import commitment, pair_commitment, seed_commitment
from privet.common.secagg.site import (
    TAKE_NO_PART,
    Advertised,
    Context,
    Once,
    RecordedStep,
    Recorder,
    Secret,
    check_address,
    check_ascending,
    check_enough,
    check_roster,
    check_words,
    expect,
    sign,
)
from privet.common.secagg.transcript import (
    expected_digest,
    members_digest,
    roster_digest,
    slot_digest,
    step_digest,
)

_T = TypeVar("_T")
_HELD = 2 * SHARE_BYTES
_NEW_BLOCK = "set up a new block; until then, continue without this site"


@dataclass(frozen=True, repr=False, eq=False)
class _Own(Secret):
    """A site's own secrets of one round.

    Attributes:
        self_seed: 32 bytes, from which its self mask follows.
        pairs: What it sends each other site for their common mask, by number.
        shares: Its own shares of its two secrets, 66 bytes.
    """

    self_seed: bytes
    pairs: dict[int, bytes]
    shares: bytes


@dataclass(frozen=True, repr=False, eq=False)
class Dealt(Secret):
    """After `deal`: the site has sent its shares of all rounds. `own` are its secrets, by round."""

    context: Context
    channels: HybridChannels
    roster: frozenset[int]
    own: dict[int, _Own]
    once: Once = field(default_factory=Once)


@dataclass(frozen=True, repr=False, eq=False)
class _Slot(Secret):
    """What a site keeps for one round of a block.

    Attributes:
        self_seed: Seed of its self mask.
        pairs: The secret of the mask with each other member.
        wraps: That secret under a one-time pad, for each member of higher number.
        shares: The shares that it holds, by owner, 66 bytes each.
    """

    self_seed: bytes
    pairs: dict[int, bytes]
    wraps: tuple[Wrap, ...]
    shares: dict[int, bytes]


def deal(state: Advertised, roster: Roster) -> tuple[Dealt, Deal]:
    """Check the keys of all sites, draw this site's secrets of all rounds, and share them among all sites.

    Raises:
        ProtocolError: The state is used up or of another kind of round, or the roster is malformed or of another block.
        TooFewSitesError: The roster has too few sites for enough survivors.
        VerificationError: A signature is not that of the pinned key, this site's own keys were changed, or a key is
            not usable.
    """
    expect(state, Advertised)
    context, parameters = state.context, _parameters(state.context)
    adverts = check_roster(state, roster)
    binding = context.binding.with_roster(roster_digest(context.binding.parameters, roster))
    context, me = replace(context, binding=binding), context.site
    others = {other: advert for other, advert in adverts.items() if other != me}
    names = parameters.cohort
    channels = HybridChannels(state.keys, binding.roster, me, others, lambda other: names[other].name, context.kem)
    state.once.take("deal")
    own: dict[int, _Own] = {}
    commitments: list[bytes] = []
    plain: dict[int, list[bytes]] = {other: [] for other in others}
    beside: dict[int, list[bytes]] = {other: [] for other in others}
    for number in range(parameters.round, parameters.round + parameters.rounds):
        slot = slot_digest(binding.roster, number)
        own[number], both, dealt = _drawn(context, slot, tuple(adverts))
        commitments.append(both)
        for other in others:
            secret = own[number].pairs[other]
            plain[other].append(dealt[other] + secret)
            beside[other].append(pair_commitment(slot, me, other, secret))
    sealed = tuple(
        Sealed(other, channels.seal(other, b"".join(plain[other]), b"".join(beside[other]))) for other in sorted(others)
    )
    message = Deal(binding.roster, me, tuple(commitments), sealed, suite=parameters.suite)
    message = replace(message, signature=sign(context, message))
    return Dealt(context, channels, frozenset(adverts), own), message


def _drawn(context: Context, slot: bytes, holders: Sequence[int]) -> tuple[_Own, bytes, dict[int, bytes]]:
    """Draw the secrets of one round; return them, the commitments to them, and the two shares of each holder."""
    me, random_bytes = context.site, context.random_bytes
    # Drawn for this round alone. If two rounds had one seed, what is revealed of it in one would open the other.
    self_seed, seed = random_bytes(SECRET_BYTES), random_bytes(SECRET_BYTES)
    points, threshold = [holder + 1 for holder in holders], context.parameters.threshold
    of_self = shamir.split(self_seed, points, threshold, random_bytes)
    of_mask = shamir.split(seed, points, threshold, random_bytes)
    shares = {holder: a + b for holder, a, b in zip(holders, of_self, of_mask, strict=True)}
    pairs = {other: masks.pair_secret(seed, slot, me, other) for other in holders if other != me}
    both = commitment(slot, me, self_seed) + seed_commitment(slot, me, seed)
    return _Own(self_seed, pairs, shares[me]), both, shares


def join(state: Dealt, delivery: DealDelivery) -> tuple[DealtBlock, Joined]:
    """Open the items of all other members, and return the block and the confirmation that this site is in it.

    Raises:
        ProtocolError: The state is used up, or the items are not of this block and of sites of its roster.
        TooFewSitesError: Too few sites dealt.
        VerificationError: An item does not decrypt, or a secret does not fit its commitment.
    """
    expect(state, Dealt)
    context, parameters, me = state.context, _parameters(state.context), state.context.site
    check_address(context, delivery.roster, delivery.site)
    others = [item.site for item in delivery.sealed]
    check_ascending(others, len(parameters.cohort))
    if not state.roster.issuperset(others) or me in others or delivery.suite is not parameters.suite:
        raise ProtocolError(
            f"the coordinator must deliver items of the suite {parameters.suite.value} from other sites of the roster, "
            f"one from each, got {len(others)} that are not",
            TAKE_NO_PART,
        )
    members = tuple(sorted([*others, me]))
    check_enough(len(members), max(parameters.min_survivors, parameters.threshold), "shared their secrets")
    opened = {item.site: _opened(state, item) for item in delivery.sealed}
    # Nothing was used up by a delivery that failed a check above.
    state.once.take("join")
    channels = {other: (state.channels.there(other).for_tags(), each[1].for_tags()) for other, each in opened.items()}
    slots = {}
    for place, (number, own) in enumerate(state.own.items()):
        parts = {other: each[0][place * DEALT_BYTES :][:DEALT_BYTES] for other, each in opened.items()}
        theirs = {other: part[_HELD:] for other, part in parts.items()}
        slots[number] = _Slot(
            own.self_seed,
            {other: pair_of(own.pairs[other], theirs[other], me, other) for other in others},
            tuple(Wrap(other, wrap_of(own.pairs[other], theirs[other], me, other)) for other in others if other > me),
            {me: own.shares, **{other: part[:_HELD] for other, part in parts.items()}},
        )
    # Its items hold shares of rounds to come, and the coordinator has them: no key that opens one is kept.
    state.own.clear()
    context = replace(context, binding=context.binding.with_roster(members_digest(context.binding.roster, members)))
    message = Joined(context.binding.roster, me)
    return DealtBlock(context, members, channels, slots), replace(message, signature=sign(context, message))


def _opened(state: Dealt, item: Sealed) -> tuple[bytes, masks.Channel]:
    """Return the plain text of another site's item, and the channel from the site."""
    context, parameters, sender = state.context, _parameters(state.context), item.site
    rounds, name = parameters.rounds, parameters.cohort[item.site].name
    plain, beside, back = state.channels.open(sender, item.data, rounds * DIGEST_BYTES, rounds * DEALT_BYTES)
    for place in range(rounds):
        slot = slot_digest(context.binding.roster, parameters.round + place)
        promised = beside[place * DIGEST_BYTES :][:DIGEST_BYTES]
        secret = plain[place * DEALT_BYTES + _HELD :][:SECRET_BYTES]
        check_promised(promised, slot, sender, context.site, secret, name)
    return plain, back


def _parameters(context: Context) -> DealtParameters:
    if not isinstance(context.parameters, DealtParameters):
        raise ProtocolError("this round of secure aggregation is of no block that tolerates drop-outs", TAKE_NO_PART)
    return context.parameters


class DealtBlock(Secret):
    """The secrets of the rounds of a block that are still to come, and the round that is live.

    Args:
        context: The block's context, bound to its members.
        members: R.
        channels: The channels to and from each other member, for tags.
        slots: What the site keeps for each round.
    """

    def __init__(
        self,
        context: Context,
        members: tuple[int, ...],
        channels: dict[int, tuple[masks.Channel, masks.Channel]],
        slots: dict[int, _Slot],
    ) -> None:
        self._context, self._members, self._channels, self._slots = context, members, channels, slots
        parameters = context.parameters
        self._graph = graph.build_graph(
            context.binding.roster, members, parameters.corrupt, parameters.degree, parameters.security
        )
        self._next, self._end = parameters.round, max(slots, default=parameters.round - 1) + 1
        self._masked: protocol.MaskedState | None = None
        self._confirmed: protocol.Confirmed | None = None
        self._lock = threading.Lock()

    @property
    def roster(self) -> bytes:
        """Digest of the block's members, which names the block."""
        return self._context.binding.roster

    def check(self, round_number: int, expected: Sequence[int]) -> None:
        """Check that a round can still be masked with these sites. A caller does so before it computes the vector.

        Raises:
            ProtocolError: The round is not of the block or not later than the last one that was masked, or the
                expected sites are not members, or not this one.
            TooFewSitesError: Fewer sites are expected than a sum needs.
        """
        context, parameters = self._context, self._context.parameters
        if not self._next <= round_number < self._end:
            raise ProtocolError(
                f"round {round_number}: this site has keys for rounds {self._next} to {self._end - 1} of the block; a "
                "round is masked once, and no earlier round after a later one",
                "set up a new block for this round",
            )
        check_ascending(tuple(expected), len(parameters.cohort))
        if not set(expected) <= set(self._members) or context.site not in expected:
            raise ProtocolError(
                f"round {round_number}: the sites that the coordinator expects must include this site, and only "
                "members of the block",
                TAKE_NO_PART,
            )
        check_enough(len(expected), max(parameters.min_survivors, parameters.threshold), "are expected")

    def mask(self, round_number: int, inputs: bytes, expected: Sequence[int], words: Words, record: Recorder) -> Masked:
        """Mask this site's vector of a round. The secrets of all earlier rounds are then gone.

        Args:
            round_number: A round of the block. Rounds may be left out.
            inputs: Digest of the study and the model that the vector is computed from, as this site computes it.
            expected: F, the sites that the coordinator expects to answer, ascending.
            words: The vector's words, shape (layout.words,). They are masked in place; the caller must not use them
                again.
            record: As `site.mask` has it.

        Raises:
            ProtocolError, TooFewSitesError: As `check`; or the vector does not fit the block.
            StateError: `record` found that this round was masked before.
        """
        parameters, me = self._context.parameters, self._context.site
        check_words(parameters, words)
        with self._lock:
            self.check(round_number, expected)
            # Used up before anything can fail: after an error the round is lost, and never masked a second time.
            self._next, self._masked, self._confirmed = round_number + 1, None, None
            slot = self._slots[round_number]
            self._slots = {number: each for number, each in self._slots.items() if number > round_number}
            context = replace(self._context, binding=replace(self._context.binding, round=round_number))
            step = step_digest(self.roster, round_number, inputs)
            what = expected_digest(step, expected)
            record(RecordedStep(context.binding.session, round_number, "mask", self.roster, what))
            keys = {other: masks.pair_mask_key(secret, step, me, other) for other, secret in slot.pairs.items()}
            plus = [masks.self_mask_key(slot.self_seed, step, me)]
            plus += [key for other, key in keys.items() if other > me]
            # With all members, expected or not: which of them are in the sum is not known yet.
            masks.apply(words, plus, [key for other, key in keys.items() if other < me])
            if parameters.packed:
                words = masks.pack(words)
            tags = tuple(Tag(other, self._channels[other][0].tag(what)) for other in expected if other != me)
            message = Masked(self.roster, me, what, tags, words, wraps=slot.wraps, suite=parameters.suite)
            message = replace(message, signature=sign(context, message))
            self._masked = protocol.MaskedState(
                context, self._graph, tuple(expected), what, slot.shares, self._channels
            )
            return message

    def finish(self, message: Finish, record: Recorder) -> Reveal:
        """Reveal shares for the expected sites, all of which have masked for the same round, model and sites.

        Raises:
            ProtocolError: This site has masked no such round, or has chosen before.
            VerificationError: An expected site masked for another round, model, or list of sites.
            StateError: `record` found that this site has chosen in this round before.
        """
        with self._lock:
            state = _live(self._masked)
            context = state.context
            check_address(context, message.roster, message.site)
            others = [other for other in state.sharers if other != context.site]
            if [tag.site for tag in message.tags] != others:
                raise ProtocolError(
                    f"the coordinator must deliver one confirmation tag of each of the {len(others)} other expected "
                    f"sites, in ascending order, got {len(message.tags)}",
                    TAKE_NO_PART,
                )
            for tag in message.tags:
                state.channels[tag.site][1].check(state.sharers_digest, tag.data)
            # The same lock as `confirm` takes: never both.
            state.once.take("finish")
            self._masked = None
            _choose(record, context, state.sharers_digest)
            return protocol.reveal_for(context, state.shares, state.sharers, state.sharers_digest)

    def confirm(self, survivors: Survivors, record: Recorder) -> Confirm:
        """Sign the one list of survivors that this site accepts in a round. It can then not finish the round.

        Raises:
            ProtocolError: This site has masked no such round or has chosen before, or the list does not fit.
            TooFewSitesError: The sum would be over too few sites.
            VerificationError: A survivor masked for another round, model, or list of sites.
            StateError: `record` found that this site has chosen in this round before.
        """
        with self._lock:
            state = _live(self._masked)
            confirmed, message = protocol.confirm(state, survivors)
            self._masked = None
            # On disk before it leaves: a copy of this process must not finish the round.
            _choose(record, state.context, confirmed.lists)
            self._confirmed = confirmed
            return message

    def reveal(self, proof: Proof, record: Recorder) -> Reveal:
        """Reveal shares for the survivors that this site and a quorum have confirmed. Raises as `site.reveal`."""
        with self._lock:
            state = _live(self._confirmed)
            message = protocol.reveal(state, proof, record)
            self._confirmed = None
            return message


def _live(state: _T | None) -> _T:
    if state is None:
        raise ProtocolError(
            "this site has no round of the block to answer for: it has answered, or has masked no vector", _NEW_BLOCK
        )
    return state


def _choose(record: Recorder, context: Context, lists: bytes) -> None:
    binding = context.binding
    record(RecordedStep(binding.session, binding.round, "choice", binding.roster, lists))
