"""The coordinator's side of a block that tolerates drop-outs (`privet.common.secagg.dealt`).

::

    block = DealtAggregator(parameters)
    block.admit(Advertise) ...      roster()              -> Roster, the same for all
    block.admit(Deal) ...           deliveries()          -> one DealDelivery per member
    block.admit(Joined) ...
    for each round:                 begin(round, inputs)  -> Expected, the same for all expected sites
    block.admit(Masked) ...         finishes()            -> one Finish per site, if all of them sent a vector
                                    or survivors()        -> one Survivors per site that did
    block.admit(Confirm) ...        proofs()              -> one Proof per site that confirmed (after survivors)
    block.admit(Reveal) ...         total()               -> the sum of the vectors

A site that misses a round is not expected in the later ones of the block.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Final

from privet.common.errors import ProtocolError
from privet.common.secagg import graph
from privet.common.secagg.coordinator import LEFT_OUT, Unmasking
from privet.common.secagg.messages import (
    DEALT_BYTES,
    DIGEST_BYTES,
    LINK_BYTES,
    Advertise,
    Confirm,
    Deal,
    DealDelivery,
    DealtParameters,
    Expected,
    Finish,
    Joined,
    Masked,
    Reveal,
    Sealed,
    Signed,
)
from privet.common.secagg.suites import CIPHERTEXT_BYTES
from privet.common.secagg.transcript import expected_digest, members_digest, slot_digest, step_digest

_STEPS: Final = (Advertise, Deal, Joined, Masked, Confirm, Reveal)
_JOINING: Final = _STEPS.index(Joined)


class DealtAggregator(Unmasking):
    """The coordinator's state of a block that tolerates drop-outs.

    Args:
        parameters: As sent to the sites.
    """

    def __init__(self, parameters: DealtParameters) -> None:
        super().__init__(parameters, _STEPS)
        self._rounds = parameters.rounds
        self._first = parameters.round
        self._deals: dict[int, Deal] = {}
        self._joined: set[int] = set()
        self._round, self._roster, self._set_up = parameters.round - 1, b"", b""

    def _admit(self, message: Signed) -> None:
        if isinstance(message, Deal):
            self._admit_deal(message)
        elif isinstance(message, Joined):
            if message.site not in self._deals:
                raise ProtocolError(f"{self._name(message.site)} joined the block, but shared no secrets", LEFT_OUT)
            self._joined.add(message.site)
        else:
            super()._admit(message)

    def _admit_deal(self, message: Deal) -> None:
        name = self._name(message.site)
        length = CIPHERTEXT_BYTES + self._rounds * (DIGEST_BYTES + DEALT_BYTES) + LINK_BYTES
        others = [site for site in sorted(self._adverts) if site != message.site]
        if message.site not in self._adverts:
            raise ProtocolError(f"{name} sent shares, but no keys for this block before", LEFT_OUT)
        if [item.site for item in message.sealed] != others or {len(item.data) for item in message.sealed} != {length}:
            raise ProtocolError(
                f"{name} must send one encrypted item of {length} bytes to each of the {len(others)} other sites, in "
                "ascending order",
                LEFT_OUT,
            )
        if len(message.commitments) != self._rounds:
            raise ProtocolError(
                f"{name} must commit to its secrets of {self._rounds} rounds, found {len(message.commitments)}",
                LEFT_OUT,
            )
        self._deals[message.site] = message

    def deliveries(self) -> dict[int, DealDelivery]:
        """End the second step and return, by site, the items for it. The sites that dealt are the members.

        Raises:
            TooFewSitesError: Fewer sites dealt than a sum needs.
        """
        p, roster = self.parameters, self._binding.roster
        self._close(1, len(self._deals), max(p.min_survivors, p.threshold), "shared their secrets")
        members = tuple(sorted(self._deals))
        self._roster = roster
        self._graph = graph.build_graph(roster, members, p.corrupt, p.degree, p.security)
        inbox: dict[int, list[Sealed]] = {site: [] for site in members}
        for sender in members:
            kept = []
            for item in self._deals[sender].sealed:
                if item.site in inbox:  # a receiver that did not deal is no member
                    inbox[item.site].append(Sealed(sender, item.data))
                    promised = item.data[CIPHERTEXT_BYTES : CIPHERTEXT_BYTES + self._rounds * DIGEST_BYTES]
                    kept.append(Sealed(item.site, promised))
            self._deals[sender] = replace(self._deals[sender], sealed=tuple(kept))
        self._binding = self._binding.with_roster(members_digest(roster, members))
        return {site: DealDelivery(roster, site, tuple(sealed), p.suite) for site, sealed in inbox.items()}

    @property
    def asked(self) -> tuple[int, ...]:
        """The sites that the present round expects; none before the first one."""
        return self._sharers

    @property
    def expected(self) -> tuple[int, ...]:
        """The sites that the next round expects: they joined, and stayed to the end of each round since."""
        sites = self._joined if self._round < self._first else self._joined & self._reveals.keys()
        return tuple(sorted(sites))

    def holds(self, round_number: int) -> bool:
        """Return whether a round can be begun without a new set-up: it follows the last, which enough sites ended."""
        follows = self._round < round_number < self._first + self._rounds
        return bool(self._set_up) and follows and len(self.expected) >= self.parameters.min_survivors

    def begin(self, round_number: int, inputs: bytes) -> Expected:
        """Begin a round, and return the message for the expected sites.

        Args:
            round_number: A round that the block holds.
            inputs: Digest of the study and the model of the round, as each site computes it.

        Raises:
            TooFewSitesError: Too few sites have joined the block.
            ProtocolError: The block does not hold the round.
        """
        if self._step == _JOINING:
            self._close(_JOINING, len(self._joined), self.parameters.min_survivors, "opened the items of all others")
            self._set_up = self._transcript.digest()
        if not self.holds(round_number):
            raise ProtocolError(f"the block has no set-up for round {round_number}", "report this as a bug")
        expected, members = self.expected, self._binding.roster
        self._joined, self._round = set(expected), round_number
        self._sharers, self._dealt = expected, slot_digest(self._roster, round_number)
        self._keyed = step_digest(members, round_number, inputs)
        self._agreed = expected_digest(self._keyed, expected)
        place = round_number - self._first
        for site, deal in self._deals.items():
            both = deal.commitments[place]
            self._committed[site] = both[:DIGEST_BYTES], both[DIGEST_BYTES:]
            self._promised[site] = {
                item.site: item.data[place * DIGEST_BYTES : (place + 1) * DIGEST_BYTES] for item in deal.sealed
            }
        self._binding = replace(self._binding, round=round_number)
        self._transcript = hashlib.sha256(self._set_up + self._agreed)
        self._signatures, self._step = {}, self._masking
        self._clear()
        return Expected(members, expected)

    @property
    def complete(self) -> bool:
        """Whether every expected site has sent its vector of the round."""
        return len(self._tags) == len(self._sharers)

    def finishes(self) -> dict[int, Finish]:
        """End the step of the vectors, where all are there, and return the tags for each site to check.

        Raises:
            TooFewSitesError: An expected site has sent no vector.
        """
        self._close(self._masking, len(self._tags), len(self._sharers), "sent a masked vector")
        self._step = _STEPS.index(Reveal)
        self._survivors, self._revealing, self._lists = self._sharers, frozenset(self._sharers), self._agreed
        return {site: Finish(self._binding.roster, site, self._tags_for(site)) for site in self._sharers}
