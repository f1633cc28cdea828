"""A site's side of a block: consecutive rounds of one cohort with one set-up, in which nobody may drop out.

::

    advertise(identity, BlockParameters, ...)          -> Advertised, Advertise
    link(Advertised, Roster)                           -> Linked, Links
    join(Linked, LinkDelivery)                         -> Block, Joined
    Block.mask(round, inputs, words, record)           -> Masked       (once for each round)

A vector is hidden by the masks of its pairs alone. They cancel in the sum of the whole cohort, and in no other sum, so
there is no self mask, no share, and nothing that a site could reveal. A round in which one site is missing has no sum.
The argument is in docs/secure-aggregation.md, section 14.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace

from privet.common.errors import ProtocolError
from privet.common.secagg import masks
from privet.common.secagg.links import Links as PairLinks
from privet.common.secagg.links import make_links
from privet.common.secagg.messages import (
    BlockParameters,
    Joined,
    LinkDelivery,
    Links,
    Masked,
    Roster,
    Sealed,
)
from privet.common.secagg.quantize import Words
from privet.common.secagg.site import (
    TAKE_NO_PART,
    Advertised,
    Context,
    Once,
    RecordedStep,
    Recorder,
    Secret,
    check_address,
    check_roster,
    check_words,
    expect,
    sign,
)
from privet.common.secagg.transcript import roster_digest, step_digest


@dataclass(frozen=True, repr=False, eq=False)
class Linked(Secret):
    """After `link`: the site has sent an item to every other site of the cohort."""

    context: Context
    links: PairLinks
    once: Once = field(default_factory=Once)


def link(state: Advertised, roster: Roster) -> tuple[Linked, Links]:
    """Check the keys of all sites of the cohort, and agree with each of them on a secret.

    Raises:
        ProtocolError: The state is used up or of a single round, or the roster is malformed or of another block.
        TooFewSitesError: A site of the cohort is missing.
        VerificationError: A signature is not that of the pinned key, this site's own keys were changed, or a key is
            not usable.
    """
    expect(state, Advertised)
    context, parameters = state.context, state.context.parameters
    if not isinstance(parameters, BlockParameters):
        raise ProtocolError("this round of secure aggregation is no block", TAKE_NO_PART)
    # The rules demand as many survivors as the cohort has sites, so the roster holds all of them.
    adverts = check_roster(state, roster)
    binding = context.binding.with_roster(roster_digest(context.binding.parameters, roster))
    context = replace(context, binding=binding)
    others = {other: advert for other, advert in adverts.items() if other != context.site}
    links = make_links(
        state.keys, binding.roster, context.site, others, lambda other: parameters.cohort[other].name, context.kem
    )
    state.once.take("link")
    sealed = tuple(Sealed(other, links.seal(other, b"")) for other in sorted(others))
    message = Links(binding.roster, context.site, sealed, suite=parameters.suite)
    return Linked(context, links), replace(message, signature=sign(context, message))


def join(state: Linked, delivery: LinkDelivery) -> tuple[Block, Joined]:
    """Open the items of all other sites, and return the block and the confirmation that this site is in it.

    Without confirmations, a corrupt site could send one other site an item that does not open, in each set-up: that
    site would stop, and all others would train and be charged for rounds without a sum.

    Raises:
        ProtocolError: The state is used up, or the items are not one from each other site of this block.
        VerificationError: An item does not decrypt, or does not fit its commitment.
    """
    expect(state, Linked)
    context, parameters = state.context, state.context.parameters
    check_address(context, delivery.roster, delivery.site)
    others = [site for site in range(len(parameters.cohort)) if site != context.site]
    if [item.site for item in delivery.sealed] != others or delivery.suite is not parameters.suite:
        raise ProtocolError(
            f"the coordinator must deliver one item of the suite {parameters.suite.value} from each of the "
            f"{len(others)} other sites of the block, in ascending order, got {len(delivery.sealed)}",
            TAKE_NO_PART,
        )
    opened = {item.site: state.links.open(item.site, item.data, held=0) for item in delivery.sealed}
    # Nothing was used up by a delivery that failed a check above.
    state.once.take("join")
    message = Joined(context.binding.roster, context.site)
    message = replace(message, signature=sign(context, message))
    return Block(context, {other: each.pair_key for other, each in opened.items()}), message


class Block(Secret):
    """The secrets that a site shares with each other one, moved on from round to round.

    Args:
        context: The block's context.
        links: The first secret of each pair, 32 bytes, by the other site's number.
    """

    def __init__(self, context: Context, links: dict[int, bytes]) -> None:
        self._context, self._links = context, links
        parameters = context.parameters
        rounds = parameters.rounds if isinstance(parameters, BlockParameters) else 1
        self._next, self._end = parameters.round, parameters.round + rounds
        self._lock = threading.Lock()

    @property
    def roster(self) -> bytes:
        """Digest of the block's roster, which names the block."""
        return self._context.binding.roster

    def check(self, round_number: int) -> None:
        """Check that a round can still be masked. A caller does so before it computes the vector.

        Raises:
            ProtocolError: The round is not of the block, or not later than the last one that was masked.
        """
        if not self._next <= round_number < self._end:
            raise ProtocolError(
                f"round {round_number}: this site has keys for rounds {self._next} to {self._end - 1} of the block; a "
                "round is masked once, and no earlier round after a later one",
                "set up a new block for this round",
            )

    def mask(self, round_number: int, inputs: bytes, words: Words, record: Recorder) -> Masked:
        """Mask this site's vector of a round. The secrets of this and of all earlier rounds are then gone.

        Args:
            round_number: A round of the block. Rounds may be left out.
            inputs: Digest of the study and the model that the vector is computed from, as this site computes it: masks
                cancel only between sites of the same inputs.
            words: The vector's words, shape (layout.words,). They are masked in place; the caller must not use them
                again.
            record: As `site.mask` has it.

        Raises:
            ProtocolError: As `check`; or the vector does not fit the block.
            StateError: `record` found that this round was masked before.
        """
        context, parameters = self._context, self._context.parameters
        check_words(parameters, words)
        me, roster = context.site, self.roster
        what = step_digest(roster, round_number, inputs)
        with self._lock:
            self.check(round_number)
            # Used up before anything can fail: after an error the round is lost, and never masked a second time.
            first, self._next = self._next, round_number + 1
            keys = {other: self._moved(other, first, round_number, what) for other in self._links}
        record(RecordedStep(context.binding.session, round_number, "mask", roster, what))
        plus = [key for other, key in keys.items() if other > me]
        masks.apply(words, plus, [key for other, key in keys.items() if other < me])
        if parameters.packed:
            words = masks.pack(words)
        message = Masked(roster, me, what, (), words, suite=parameters.suite)
        return replace(message, signature=sign(context, message))

    def _moved(self, other: int, first: int, last: int, what: bytes) -> bytes:
        """Move a pair's secret on beyond round `last`, and return the key of its mask in that round."""
        me, key = self._context.site, b""
        for number in range(first, last + 1):
            if number == last:
                # The salt names round and inputs: a pair that was given different models has different masks.
                key = masks.pair_mask_key(self._links[other], what, me, other)
            self._links[other] = masks.next_link(self._links[other], self.roster, number, me, other)
        return key
