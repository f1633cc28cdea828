"""The coordinator's side of a round: collect messages, drop sites that miss a step, and unmask the sum.

::

    round = Aggregator(parameters)
    round.admit(Advertise) ...      roster()      -> Roster, the same for all
    round.admit(Shares) ...         deliveries()  -> one Delivery per site that shared
    round.admit(Masked) ...         survivors()   -> one Survivors per site that masked
    round.admit(Confirm) ...        proofs()      -> one Proof per site that confirmed
    round.admit(Reveal) ...         total()       -> the sum of the vectors

Each call on the right ends its step: a site whose message was not admitted by then has dropped out. An
`Aggregator` keeps the running sum of the masked vectors, and no single vector. Sites do not rely on any check
here. These checks keep the round of an honest coordinator alive, and name the site that breaks the protocol.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, count, islice

import numpy as np

from privet.common.errors import ProtocolError, TooFewSitesError, VerificationError
from privet.common.secagg import graph, masks, shamir, suites
from privet.common.secagg.links import mask_public
from privet.common.secagg.messages import (
    DIGEST_BYTES,
    Advertise,
    Confirm,
    Delivery,
    Links,
    Masked,
    Parameters,
    Proof,
    Reveal,
    Roster,
    Sealed,
    Shares,
    Signed,
    Survivors,
    Tag,
)
from privet.common.secagg.quantize import WORD, Words
from privet.common.secagg.signatures import check_signature, commitment, pair_commitment, seed_commitment
from privet.common.secagg.suites import CIPHERTEXT_BYTES, Suite
from privet.common.secagg.transcript import Binding, lists_digest, parameters_digest, roster_digest, sharers_digest

_STEPS: tuple[type[Signed], ...] = (Advertise, Shares, Masked, Confirm, Reveal)
# Sets of shares that are tried if some are wrong. After that the round is given up: the number of sets is exponential.
_MOST_TRIES = 512
LEFT_OUT = "install the same version of privet at that site; if it happens again, leave the site out of the cohort"


class BrokenPromiseError(VerificationError):
    """A site's signed messages contradict each other. The coordinator holds them, so the site alone is to blame.

    Attributes:
        site: The site's number.
    """

    def __init__(self, message: str, hint: str, site: int) -> None:
        super().__init__(message, hint)
        self.site = site


@dataclass(frozen=True, eq=False)
class Total:
    """The outcome of a round.

    Attributes:
        words: The sum of the survivors' vectors, unmasked, for `privet.common.secagg.quantize.dequantise`.
        survivors: The sites whose vectors are in it.
        transcript: SHA-256 over the digests and signatures of all messages that led to it. It holds no secret.
    """

    words: Words
    survivors: tuple[int, ...]
    transcript: bytes


class Collector:
    """What the coordinator does in a round and in a block alike: admit signed messages, step by step.

    Args:
        parameters: As sent to the sites.
        steps: Kinds of the sites' messages, in order.
    """

    def __init__(self, parameters: Parameters, steps: tuple[type[Signed], ...]) -> None:
        self.parameters = parameters
        self._steps = steps
        self._binding = Binding(parameters.session, parameters.round, parameters_digest(parameters))
        self._words, self._sent = parameters.layout.words, parameters.sent_words
        self._step = 0
        self._adverts: dict[int, Advertise] = {}
        self._keys: set[bytes] = set()
        # A private key of no importance: agreeing with it fails for a public key of low order.
        self._probe = suites.private_key(parameters.suite, bytes(parameters.suite.seed_bytes))
        self._signatures: dict[int, bytes] = {}
        self._sum: Words = np.zeros(0, WORD)
        self._transcript = hashlib.sha256(self._binding.parameters)

    def admit(self, message: Signed) -> None:
        """Verify a site's message and keep it. Admitting the same message again changes nothing.

        Raises:
            ProtocolError: The message is of another step or round, from a site that dropped out, malformed, or
                different from one that the site sent before in this step.
            VerificationError: Its signature is wrong.
        """
        if self._step == len(self._steps) or type(message) is not self._steps[self._step]:
            raise ProtocolError(f"the round {self._expects()} now, got a message {type(message).__name__}", LEFT_OUT)
        if not 0 <= message.site < len(self.parameters.cohort):
            raise ProtocolError(
                f"the cohort has {len(self.parameters.cohort)} sites, numbered from 0; got a message from site "
                f"number {message.site}",
                LEFT_OUT,
            )
        self._check_round(message)
        self._check_suite(message)
        check_signature(self.parameters, self._binding, message)
        known = self._signatures.get(message.site)
        if known is not None:
            # Ed25519 signatures are deterministic, so a retry has the same signature. A vector must be added only once.
            if known != message.signature:
                raise ProtocolError(
                    f"{self._name(message.site)} sent two different {type(message).__name__} messages in one round",
                    LEFT_OUT,
                )
            return
        self._admit(message)
        self._signatures[message.site] = message.signature

    def _admit(self, message: Signed) -> None:
        """Keep a message of the present step whose signature is right."""
        raise NotImplementedError

    def _check_round(self, message: Signed) -> None:
        if isinstance(message, Advertise):
            if message.parameters != self._binding.parameters:
                raise ProtocolError(
                    f"{self._name(message.site)} sent keys for other parameters of secure aggregation than this "
                    "round has",
                    LEFT_OUT,
                )
        elif message.roster != self._binding.roster:
            raise ProtocolError(
                f"{self._name(message.site)} sent a message for another list of keys (roster) than this round has",
                LEFT_OUT,
            )

    def _check_suite(self, message: Signed) -> None:
        # A site that signs keys of another suite could weaken the round for its neighbours.
        if isinstance(message, Advertise | Links | Shares | Masked) and message.suite is not self.parameters.suite:
            raise ProtocolError(
                f"{self._name(message.site)} sent a message of the suite {message.suite.value}, the round has "
                f"{self.parameters.suite.value}",
                LEFT_OUT,
            )

    def _expects(self) -> str:
        return f"expects {self._steps[self._step].__name__} messages" if self._step < len(self._steps) else "is over"

    def _name(self, site: int) -> str:
        return self.parameters.cohort[site].name

    def _admit_advert(self, message: Advertise) -> None:
        # Every site makes these checks and stops if they fail. Made here, they leave out one site instead of all.
        name = self._name(message.site)
        keys = set(message.keys)
        suites.agree(self._probe, message.share_key, whose=name)
        if message.suite.hybrid:
            suites.check_kem_key(message.kem_key, whose=name)
        else:
            suites.agree(self._probe, message.mask_key, whose=name)
        if len(keys) < 2 or keys & self._keys:
            raise ProtocolError(f"{name} sent a key for this round that another site, or itself, sent before", LEFT_OUT)
        self._keys |= keys
        self._adverts[message.site] = message

    def _add(self, message: Masked) -> None:
        """Add a vector. It is not kept: memory does not grow with the sites, and no single vector lies around."""
        name = self._name(message.site)
        if message.words.shape != (self._sent,):
            raise ProtocolError(
                f"{name} must send a masked vector of {self._sent} words of 64 bits, got {message.words.size}",
                LEFT_OUT,
            )
        if self.parameters.packed:
            masks.add_packed(self._sum, message.words, whose=name)
        else:
            np.add(self._sum, message.words, out=self._sum)

    def _close(self, step: int, present: int, least: int, what: str) -> None:
        if self._step != step:
            raise ProtocolError(
                f"the round {self._expects()} now; the step to be closed is over or not yet open",
                "report this as a bug",
            )
        if present < least:
            raise TooFewSitesError(
                f"secure aggregation: {present} sites {what}, the round needs at least {least}",
                "start a new round when more sites can be reached",
            )
        # By site number, so that the transcript does not depend on the order in which messages arrived.
        for site in sorted(self._signatures):
            self._transcript.update(site.to_bytes(2, "big") + self._signatures[site])
        self._signatures = {}
        self._step += 1

    def roster(self) -> Roster:
        """End the first step and return the keys of all sites that advertised.

        Raises:
            TooFewSitesError: Fewer sites advertised than the sum needs.
        """
        # With fewer sites than the threshold, no secret could be reconstructed later.
        least = max(self.parameters.min_survivors, self.parameters.threshold)
        self._close(0, len(self._adverts), least, "sent their keys")
        roster = Roster(tuple(self._adverts[site] for site in sorted(self._adverts)))
        self._binding = self._binding.with_roster(roster_digest(self._binding.parameters, roster))
        return roster


class Unmasking(Collector):
    """What the coordinator does in a round and in one of a block with drop-outs alike, from the masked vectors on.

    Args:
        parameters: As sent to the sites.
        steps: Kinds of the sites' messages, in order. The last three are `Masked`, `Confirm` and `Reveal`.
    """

    def __init__(self, parameters: Parameters, steps: tuple[type[Signed], ...]) -> None:
        super().__init__(parameters, steps)
        self._masking = steps.index(Masked)
        self._graph = graph.Graph((), 0, 0)
        # Of the sites that shared secrets, by number: the digests of the seeds of self mask and pair masks, and of what
        # they sent each neighbour for their common mask.
        self._committed: dict[int, tuple[bytes, bytes]] = {}
        self._promised: dict[int, dict[int, bytes]] = {}
        # The sites that may send a vector, and the digest that they agree on with it.
        self._sharers: tuple[int, ...] = ()
        self._agreed = b""
        # What commitments and what the masks' keys are bound to.
        self._dealt, self._keyed = b"", b""
        self._clear()

    def _clear(self) -> None:
        """Forget the messages of a round, and begin a new sum."""
        self._sum = np.zeros(self._words, WORD)
        self._wraps: dict[int, dict[int, bytes]] = {}
        self._tags: dict[int, dict[int, bytes]] = {}
        self._confirms: dict[int, Confirm] = {}
        self._reveals: dict[int, dict[int, bytes]] = {}
        self._survivors: tuple[int, ...] = ()
        self._revealing: frozenset[int] = frozenset()
        self._lists = b""
        self._weights: dict[tuple[int, ...], list[int]] = {}

    def _admit(self, message: Signed) -> None:
        if isinstance(message, Advertise):
            self._admit_advert(message)
        elif isinstance(message, Masked):
            self._admit_masked(message)
        elif isinstance(message, Confirm):
            self._admit_confirm(message)
        elif isinstance(message, Reveal):
            self._admit_reveal(message)

    def _admit_masked(self, message: Masked) -> None:
        name = self._name(message.site)
        if message.site not in self._sharers:
            raise ProtocolError(f"{name} sent a masked vector, but no shares before it", LEFT_OUT)
        if message.sharers != self._agreed:
            raise ProtocolError(
                f"{name} masked its vector for another list of sharing sites than the coordinator sent", LEFT_OUT
            )
        peers = [other for other in self._graph.neighbours(message.site) if other in self._sharers]
        if [tag.site for tag in message.tags] != peers:
            raise ProtocolError(
                f"{name} must send one confirmation tag to each of its {len(peers)} neighbours that sent shares",
                LEFT_OUT,
            )
        higher = []
        if message.suite.hybrid:
            near = self._graph.neighbours(message.site)
            higher = [other for other in near if other in self._committed and other > message.site]
        if [wrap.site for wrap in message.wraps] != higher:
            raise ProtocolError(
                f"{name} must send the encrypted secret of the common mask with each of its {len(higher)} neighbours "
                "of higher number that sent shares",
                LEFT_OUT,
            )
        self._add(message)
        self._tags[message.site] = {tag.site: tag.data for tag in message.tags}
        self._wraps[message.site] = {wrap.site: wrap.data for wrap in message.wraps}

    def _admit_confirm(self, message: Confirm) -> None:
        if message.site not in self._survivors:
            raise ProtocolError(f"{self._name(message.site)} confirmed the survivors, but is not one of them", LEFT_OUT)
        if message.lists != self._lists:
            raise ProtocolError(
                f"{self._name(message.site)} confirmed other lists of sharing sites and survivors than the "
                "coordinator sent",
                LEFT_OUT,
            )
        peers = [other for other in self._graph.neighbours(message.site) if other in self._tags]
        if [tag.site for tag in message.tags] != peers:
            raise ProtocolError(
                f"{self._name(message.site)} must send one confirmation tag to each of its {len(peers)} surviving "
                "neighbours",
                LEFT_OUT,
            )
        self._confirms[message.site] = message

    def _admit_reveal(self, message: Reveal) -> None:
        if message.site not in self._revealing or message.lists != self._lists:
            raise ProtocolError(
                f"{self._name(message.site)} revealed shares for a list of survivors that it did not confirm", LEFT_OUT
            )
        owners = [site for site in self._graph.holders(message.site) if site in self._committed]
        if [item.site for item in message.shares] != owners:
            raise ProtocolError(
                f"{self._name(message.site)} must reveal one share for each of {len(owners)} sites, in ascending order",
                LEFT_OUT,
            )
        self._reveals[message.site] = {item.site: item.data for item in message.shares}

    def survivors(self) -> dict[int, Survivors]:
        """End the step of the vectors and return, by site, the list of survivors with the tags that are for it.

        Raises:
            TooFewSitesError: Fewer sites sent a vector than the sum needs.
        """
        self._close(self._masking, len(self._tags), self.parameters.min_survivors, "sent a masked vector")
        self._survivors = tuple(sorted(self._tags))
        self._lists = lists_digest(self._agreed, self._survivors)
        return {
            site: Survivors(self._binding.roster, site, self._survivors, self._tags_for(site))
            for site in self._survivors
        }

    def _tags_for(self, site: int) -> tuple[Tag, ...]:
        """Return the tags that came with vectors and are for this site."""
        return tuple(
            Tag(other, self._tags[other][site]) for other in self._graph.neighbours(site) if other in self._tags
        )

    def proofs(self) -> dict[int, Proof]:
        """End the step of the confirmations and return, by site, those of a quorum for it to check.

        Raises:
            TooFewSitesError: Fewer sites than a quorum confirmed.
        """
        quorum = graph.quorum(len(self.parameters.cohort), self.parameters.corrupt)
        self._close(self._masking + 1, len(self._confirms), quorum, "confirmed the survivors")
        self._revealing = frozenset(self._confirms)
        confirmed = sorted(self._confirms)
        tags = {site: {tag.site: tag.data for tag in self._confirms[site].tags} for site in confirmed}
        # A confirmation passed on to strangers needs no tags: these are for the sender's neighbours.
        bare = {site: replace(self._confirms[site], tags=()) for site in confirmed}
        result = {}
        for site in confirmed:
            # A tag is far cheaper to check than a signature, so neighbours' tags come first. Signatures complete the
            # quorum where a site has too few neighbours. The site itself is one of the quorum.
            peers = [other for other in self._graph.neighbours(site) if other in tags]
            others = sorted(tags.keys() - {site, *peers})[: max(0, quorum - 1 - len(peers))]
            result[site] = Proof(
                self._binding.roster,
                site,
                tuple(Tag(other, tags[other][site]) for other in peers),
                tuple(bare[other] for other in others),
            )
        return result

    def total(self, *, workers: int = 1) -> Total:
        """End the round: reconstruct the survivors' self masks and the drop-outs' pair masks, and remove them.

        Args:
            workers: Threads that compute masks.

        Raises:
            TooFewSitesError: A secret has fewer shares than the threshold. More messages may still be admitted.
            VerificationError: A secret cannot be reconstructed because holders sent wrong shares.
            BrokenPromiseError: A site's secret for a mask is not the one that it committed to.
        """
        owners = sorted(self._committed)
        held = [len(self._reveals.keys() & set(self._graph.holders(owner))) for owner in owners]
        what = "revealed a share of one site's secret"
        self._close(self._masking + 2, min(held, default=0), self.parameters.threshold, what)
        # Keys of masks to add and to subtract. Of a site, either the self mask (survivor) or the pair masks (drop-out)
        # can be reconstructed, never both.
        plus: list[bytes] = []
        minus: list[bytes] = []
        alive = set(self._survivors)
        for site in self._survivors:
            seed = self._reconstruct(site, alive=True)
            minus.append(masks.self_mask_key(seed, self._keyed, site))
        for site in owners:
            if site not in alive:
                seed = self._reconstruct(site, alive=False)
                for other in self._graph.neighbours(site):
                    if other in alive:
                        secret = self._pair_secret(seed, site, other)
                        # The survivor added the mask if the dropped site has the higher number.
                        (minus if site > other else plus).append(masks.pair_mask_key(secret, self._keyed, site, other))
        masks.apply(self._sum, plus, minus, workers=workers)
        if self.parameters.packed:
            np.bitwise_and(self._sum, masks.LOW, out=self._sum)
        return Total(self._sum, self._survivors, self._transcript.digest())

    def _pair_secret(self, seed: bytes, dropped: int, other: int) -> bytes:
        """Return the secret of the mask that a drop-out, of the reconstructed `seed`, shares with a survivor."""
        if self.parameters.suite is Suite.X25519:
            key = suites.private_key(Suite.X25519, seed)
            return suites.agree(key, self._adverts[other].mask_key, whose=self._name(other))
        own = masks.pair_secret(seed, self._dealt, dropped, other)
        self._check_promised(dropped, other, own)
        if dropped < other:
            return own
        secret = masks.exclusive_or(self._wraps[other][dropped], own)
        self._check_promised(other, dropped, secret)
        return secret

    def _check_promised(self, sender: int, receiver: int, secret: bytes) -> None:
        if pair_commitment(self._dealt, sender, receiver, secret) != self._promised[sender][receiver]:
            raise BrokenPromiseError(
                f"the secret of {self._name(sender)} for its common mask with {self._name(receiver)} is not the one "
                "that it committed to",
                f"start a new round without {self._name(sender)}: its mask cannot be removed from the sum",
                sender,
            )

    def _reconstruct(self, owner: int, *, alive: bool) -> bytes:
        """Return a site's secret, from a set of shares that agrees with what the site committed to."""
        shares: dict[int, bytes] = {}
        for holder in self._graph.holders(owner):
            if holder in self._reveals:
                shares[holder + 1] = self._reveals[holder][owner]
        for points in islice(_subsets(tuple(shares), self.parameters.threshold), _MOST_TRIES):
            try:
                secret = shamir.combine({point: shares[point] for point in points}, self._lagrange(points))
            except ProtocolError:
                continue
            # Shares carry no proof of their own: one wrong share gives a wrong secret, so the result is checked.
            if self._fits(owner, secret, alive=alive):
                return secret
        raise VerificationError(
            f"the secret of {self._name(owner)} cannot be reconstructed from the shares that sites revealed",
            "start a new round; this site, or sites that hold its shares, sent wrong ones: if it happens again, "
            "leave it out",
        )

    def _fits(self, owner: int, secret: bytes, *, alive: bool) -> bool:
        of_self, of_seed = self._committed[owner]
        if alive:
            return commitment(self._dealt, owner, secret) == of_self
        if self.parameters.suite is Suite.X25519:
            return mask_public(secret) == self._adverts[owner].mask_key
        return seed_commitment(self._dealt, owner, secret) == of_seed

    def _lagrange(self, points: tuple[int, ...]) -> list[int]:
        if points not in self._weights:
            self._weights[points] = shamir.weights(points)
        return self._weights[points]


class Aggregator(Unmasking):
    """The coordinator's state of one round.

    Args:
        parameters: As sent to the sites.
    """

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters, _STEPS)
        self._shares: dict[int, Shares] = {}

    def _admit(self, message: Signed) -> None:
        if isinstance(message, Shares):
            self._admit_shares(message)
        else:
            super()._admit(message)

    def _admit_shares(self, message: Shares) -> None:
        if message.site not in self._adverts:
            raise ProtocolError(f"{self._name(message.site)} sent shares, but no keys for this round before", LEFT_OUT)
        if [item.site for item in message.sealed] != list(self._graph.neighbours(message.site)):
            raise ProtocolError(
                f"{self._name(message.site)} must send one encrypted item of shares to each of its neighbours, in "
                "ascending order",
                LEFT_OUT,
            )
        self._shares[message.site] = message
        self._committed[message.site] = message.commitment, message.seed_commitment
        if message.suite.hybrid:
            self._promised[message.site] = {
                item.site: item.data[CIPHERTEXT_BYTES : CIPHERTEXT_BYTES + DIGEST_BYTES] for item in message.sealed
            }

    def roster(self) -> Roster:
        """End the first step and return the keys of all sites that advertised. Raises as `Collector.roster`."""
        roster, p = super().roster(), self.parameters
        self._dealt = self._keyed = self._binding.roster
        self._graph = graph.build_graph(
            self._binding.roster, tuple(sorted(self._adverts)), p.corrupt, p.degree, p.security
        )
        return roster

    def deliveries(self) -> dict[int, Delivery]:
        """End the second step and return, by site, the shares that are for it.

        Raises:
            TooFewSitesError: Fewer sites shared than the sum needs.
        """
        self._close(1, len(self._shares), self.parameters.min_survivors, "sent shares")
        self._sharers = tuple(sorted(self._shares))
        self._agreed = sharers_digest(self._binding.roster, self._sharers)
        inbox: dict[int, list[Sealed]] = {site: [] for site in self._sharers}
        for sender in self._sharers:
            for item in self._shares[sender].sealed:
                if item.site in inbox:  # a receiver that did not share has dropped out
                    inbox[item.site].append(Sealed(sender, item.data))
        # Passed on, and not needed again: of a hybrid suite, they are the largest part of what is kept.
        self._shares.clear()
        return {
            site: Delivery(self._binding.roster, site, self._sharers, tuple(sealed), self.parameters.suite)
            for site, sealed in inbox.items()
        }


def _subsets(points: tuple[int, ...], size: int) -> Iterator[tuple[int, ...]]:
    """Yield sets of `size` points; endlessly, unless there are few.

    Consecutive runs come first: each point is left out of at least one of them, if any may be left out. Then come all
    sets, if they are few enough to be tried. Otherwise the sets are pseudorandom, so that wrong shares are left out
    wherever they are.
    """
    for start in range(len(points)):
        rotated = points[start:] + points[:start]
        yield tuple(sorted(rotated[:size]))
        if size == len(points):
            return
    if math.comb(len(points), size) <= _MOST_TRIES - len(points):
        yield from combinations(points, size)
        return
    for number in count():
        drawn = sorted(points, key=lambda point: hashlib.sha256(b"%d %d" % (number, point)).digest())
        yield tuple(sorted(drawn[:size]))
