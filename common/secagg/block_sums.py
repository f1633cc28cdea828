"""The coordinator's side of a block: one set-up, then a sum for each round (`privet.common.secagg.block`).

::

    block = BlockAggregator(parameters)
    block.admit(Advertise) ...      roster()              -> Roster, the same for all
    block.admit(Links) ...          deliveries()          -> one LinkDelivery per site
    block.admit(Joined) ...
    for each round:                 begin(round, inputs)  -> Step, the same for all
    block.admit(Masked) ...         total()               -> the sum of the vectors of the whole cohort

Nothing is unmasked: the masks cancel in the sum. If one vector is missing, there is no sum, and the round is over.
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np

from privet.common.errors import ProtocolError
from privet.common.secagg import masks
from privet.common.secagg.coordinator import LEFT_OUT, Collector, Total
from privet.common.secagg.messages import (
    Advertise,
    BlockParameters,
    Joined,
    LinkDelivery,
    Links,
    Masked,
    Sealed,
    Signed,
    Step,
)
from privet.common.secagg.quantize import WORD
from privet.common.secagg.transcript import step_digest

_STEPS: Final = (Advertise, Links, Joined, Masked)
_JOINING: Final = _STEPS.index(Joined)


class BlockAggregator(Collector):
    """The coordinator's state of a block.

    Args:
        parameters: As sent to the sites.
    """

    def __init__(self, parameters: BlockParameters) -> None:
        super().__init__(parameters, _STEPS)
        self._links: dict[int, Links] = {}
        self._joined: set[int] = set()
        self._present: set[int] = set()
        self._round, self._what = parameters.round - 1, b""
        self._end = parameters.round + parameters.rounds
        self._set_up = b""

    def _admit(self, message: Signed) -> None:
        if isinstance(message, Advertise):
            self._admit_advert(message)
        elif isinstance(message, Links):
            self._admit_links(message)
        elif isinstance(message, Joined):
            self._joined.add(message.site)
        elif isinstance(message, Masked):
            self._admit_masked(message)

    def _admit_links(self, message: Links) -> None:
        if [item.site for item in message.sealed] != [site for site in sorted(self._adverts) if site != message.site]:
            raise ProtocolError(
                f"{self._name(message.site)} must send one encrypted item to each other site of the block, in "
                "ascending order",
                LEFT_OUT,
            )
        self._links[message.site] = message

    def _admit_masked(self, message: Masked) -> None:
        name = self._name(message.site)
        if message.sharers != self._what:
            raise ProtocolError(f"{name} masked its vector for another round or model than this one", LEFT_OUT)
        if message.tags or message.wraps:
            raise ProtocolError(f"{name} sent tags or secrets beside its vector, which a block does not have", LEFT_OUT)
        self._add(message)
        self._present.add(message.site)

    def deliveries(self) -> dict[int, LinkDelivery]:
        """End the second step and return, by site, the items for it.

        Raises:
            TooFewSitesError: A site has sent no items.
        """
        self._close(1, len(self._links), len(self.parameters.cohort), "sent an item to every other site")
        inbox: dict[int, list[Sealed]] = {site: [] for site in self._links}
        for sender in sorted(self._links):
            for item in self._links[sender].sealed:
                inbox[item.site].append(Sealed(sender, item.data))
        self._links.clear()
        return {
            site: LinkDelivery(self._binding.roster, site, tuple(sealed), self.parameters.suite)
            for site, sealed in inbox.items()
        }

    def holds(self, round_number: int) -> bool:
        """Return whether a round can be begun without a new set-up: it follows the last one, within the block."""
        return bool(self._set_up) and self._round < round_number < self._end

    def begin(self, round_number: int, inputs: bytes) -> Step:
        """Begin a round, and return the message for all sites.

        Args:
            round_number: A round that the block holds.
            inputs: Digest of the study and the model of the round, as each site computes it.

        Raises:
            TooFewSitesError: A site has not joined the block.
            ProtocolError: The block does not hold the round.
        """
        if self._step == _JOINING:
            self._close(_JOINING, len(self._joined), len(self.parameters.cohort), "opened the items of all others")
            self._set_up = self._transcript.digest()
        if not self.holds(round_number):
            raise ProtocolError(f"the block has no set-up for round {round_number}", "report this as a bug")
        self._round = round_number
        self._what = step_digest(self._binding.roster, round_number, inputs)
        self._transcript = hashlib.sha256(self._set_up + self._what)
        self._signatures, self._present = {}, set()
        self._sum = np.zeros(self._words, WORD)
        self._step = len(_STEPS) - 1
        return Step(self._binding.roster)

    def total(self, *, workers: int = 1) -> Total:
        """End the round and return the sum.

        Args:
            workers: Not used: there are no masks to remove.

        Raises:
            TooFewSitesError: A site's vector is missing.
        """
        cohort = len(self.parameters.cohort)
        self._close(len(_STEPS) - 1, len(self._present), cohort, "of a block sent a masked vector")
        if self.parameters.packed:
            np.bitwise_and(self._sum, masks.LOW, out=self._sum)
        return Total(self._sum, tuple(range(cohort)), self._transcript.digest())
