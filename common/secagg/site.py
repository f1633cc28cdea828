"""A site's side of a round: five steps, each from a state and a message to the next state and a message.

::

    advertise(identity, parameters, ...)      -> Advertised, Advertise
    share(Advertised, Roster)                 -> Shared, Shares
    mask(Shared, Delivery, words, record)     -> MaskedState, Masked
    confirm(MaskedState, Survivors)           -> Confirmed, Confirm
    reveal(Confirmed, Proof, record)          -> Reveal

Each state lets exactly one step succeed, so that a site never gives two different answers: a second list,
roster or vector raises `ProtocolError`. A message that fails a check does not use up the state. States hold the
round's secrets, in memory only: they cannot be copied or pickled, and a site that restarts has dropped out of the
round. To retry, a site sends the same bytes again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NoReturn

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privet.common.errors import ProtocolError, RefusedError, StateError, TooFewSitesError, VerificationError
from privet.common.secagg import graph, masks, shamir
from privet.common.secagg.codec import ascends
from privet.common.secagg.links import Keys, Link, Links, make_keys, make_links
from privet.common.secagg.messages import (
    Advertise,
    Confirm,
    Delivery,
    Masked,
    Parameters,
    Proof,
    Reveal,
    Roster,
    Sealed,
    SeveralRounds,
    Share,
    Shares,
    Signed,
    Survivors,
    Tag,
    Wrap,
)
from privet.common.secagg.quantize import WORD, Words
from privet.common.secagg.shamir import SHARE_BYTES, RandomBytes
from privet.common.secagg.signatures import check_signature, commitment, seed_commitment
from privet.common.secagg.suites import MLKEM, Kem
from privet.common.secagg.terms import Floor, Pins, check_parameters, check_sharing
from privet.common.secagg.transcript import (
    Binding,
    lists_digest,
    parameters_digest,
    roster_digest,
    sharers_digest,
    signed_bytes,
)


@dataclass(frozen=True, repr=False)
class Identity:
    """A site's name and identity key.

    Attributes:
        name: Name of the site in the study.
        key: Its long-term Ed25519 private key.
    """

    name: str
    key: Ed25519PrivateKey


@dataclass(frozen=True)
class RecordedStep:
    """The entry that must be on disk before a masked vector or a reveal leaves the site.

    Attributes:
        session: 32 bytes that name the study.
        round: Number of the round.
        step: "mask" or "reveal"; in a block with drop-outs, also "choice" between all expected sites and a list of
            survivors. A site takes each once per session and round, whatever the roster: an update masked twice, for
            overlapping cohorts, is in two sums, and their difference may reveal it.
        roster: Digest of the roster, or of the members of a block with drop-outs.
        lists: Digest of the sharers (mask), or of sharers and survivors (reveal). In a block with drop-outs, of the
            expected sites (mask, choice), or of these and the survivors (choice, reveal).
    """

    session: bytes
    round: int
    step: Literal["mask", "reveal", "choice"]
    roster: bytes
    lists: bytes


Recorder = Callable[[RecordedStep], None]
"""Stores the entry durably; raises StateError if an entry of the same session, round and step exists."""


TAKE_NO_PART = "take part in no further round until the coordinator runs the same version of privet and explains it"


class Once:
    """Lets exactly one caller pass, also among threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def take(self, step: str) -> None:
        """Pass, the first time; raise `ProtocolError` afterwards."""
        if not self._lock.acquire(blocking=False):
            raise ProtocolError(
                f"this site has already answered in the {step} step of this round, and answers once",
                "send the stored answer again to retry",
            )


class Secret:
    """Base of all states. They are never copied, stored or printed: a copy could answer a second time."""

    def __reduce__(self) -> NoReturn:
        raise StateError(
            "the secrets of a round of secure aggregation must not be copied or stored",
            "wait for the next round after a restart of the site",
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of one round>"


@dataclass(frozen=True, repr=False, eq=False)
class Context(Secret):
    """The part of a state that stays the same throughout a round, or a block of rounds."""

    parameters: Parameters
    binding: Binding
    site: int
    identity: Identity
    random_bytes: RandomBytes
    kem: Kem


@dataclass(frozen=True, repr=False, eq=False)
class Advertised(Secret):
    """After `advertise`: the site has sent its keys."""

    context: Context
    keys: Keys
    advert: Advertise
    once: Once = field(default_factory=Once)


@dataclass(frozen=True, repr=False, eq=False)
class Shared(Secret):
    """After `share`: the site has sent its shares. `links` are its agreements with its neighbours."""

    context: Context
    graph: graph.Graph
    roster: frozenset[int]
    self_seed: bytes
    own_shares: bytes
    links: Links
    once: Once = field(default_factory=Once)


@dataclass(frozen=True, repr=False, eq=False)
class MaskedState(Secret):
    """After `mask`: the site has sent its masked vector. `shares` are the shares that it holds, by owner.

    `channels` (to, from) are by neighbour.
    """

    context: Context
    graph: graph.Graph
    sharers: tuple[int, ...]
    sharers_digest: bytes
    shares: dict[int, bytes]
    channels: dict[int, tuple[masks.Channel, masks.Channel]]
    once: Once = field(default_factory=Once)


@dataclass(frozen=True, repr=False, eq=False)
class Confirmed(Secret):
    """After `confirm`: the site has signed one pair of lists."""

    context: Context
    survivors: tuple[int, ...]
    lists: bytes
    shares: dict[int, bytes]
    channels: dict[int, tuple[masks.Channel, masks.Channel]]
    once: Once = field(default_factory=Once)


def advertise(
    identity: Identity,
    parameters: Parameters,
    inputs: bytes,
    pins: Pins,
    floor: Floor,
    random_bytes: RandomBytes,
    *,
    kem: Kem = MLKEM,
) -> tuple[Advertised, Advertise]:
    """Accept the coordinator's parameters and make the round's keys.

    Args:
        identity: This site.
        parameters: The coordinator's proposal.
        inputs: Digest of the study and the model that this site's vector is computed from. Compute it from these,
            never take it from `parameters`: a coordinator that gave sites different models could make all updates
            but one vanish from the sum.
        pins: The identity keys of all sites that this site knows, itself included.
        floor: This site's minima.
        random_bytes: The CSPRNG for every secret of the round; `os.urandom` in production.
        kem: Encapsulates secrets for neighbours, in a hybrid suite, with randomness of its own.

    Raises:
        RefusedError: The parameters are below the rules or the floor, or this site is not in the cohort.
        VerificationError: A site's identity key differs from the pinned one, the key pinned for this site is not
            its own, or the round is for other inputs.
    """
    check_parameters(parameters, pins, floor)
    if parameters.inputs != inputs:
        raise VerificationError(
            "the coordinator proposed a round with study, round number and adapter of digest "
            f"{parameters.inputs.hex()[:16]}, "
            f"this site has digest {inputs.hex()[:16]}",
            "take part in no further round until the coordinator explains it: it gave the sites different studies "
            "or adapters",
        )
    names = [member.name for member in parameters.cohort]
    if identity.name not in names:
        raise RefusedError(
            f"the cohort that the coordinator proposed does not include this site, {identity.name}",
            "ask the coordinator why",
        )
    site = names.index(identity.name)
    if parameters.cohort[site].identity != identity.key.public_key().public_bytes_raw():
        raise VerificationError(
            f"the identity key that the cohort lists for this site, {identity.name}, is not the key that the site "
            "holds",
            "check the site's own key in [peers] of the site file",
        )
    binding = Binding(parameters.session, parameters.round, parameters_digest(parameters))
    context = Context(parameters, binding, site, identity, random_bytes, kem)
    keys = make_keys(parameters.suite, binding.parameters, random_bytes)
    share_key, mask_key, kem_key = keys.public()
    advert = Advertise(
        binding.parameters,
        site,
        share_key,
        mask_key,
        random_bytes(16),
        kem_key=kem_key,
        suite=parameters.suite,
    )
    advert = replace(advert, signature=sign(context, advert))
    return Advertised(context, keys, advert), advert


def share(state: Advertised, roster: Roster) -> tuple[Shared, Shares]:
    """Check the keys of all sites, agree on masks, and share this site's two secrets among its neighbours.

    Raises:
        ProtocolError: The state is used up, or the roster is malformed or that of another round.
        RefusedError: Too many sites are missing for the threshold to be safe.
        TooFewSitesError: The roster has too few sites for enough survivors.
        VerificationError: A signature is not that of the pinned key (substituted keys), this site's own keys
            were changed, or a key is not usable.
    """
    expect(state, Advertised)
    context, parameters = state.context, state.context.parameters
    if isinstance(parameters, SeveralRounds):
        raise ProtocolError("in a block of rounds, a site shares no secret for one of them", TAKE_NO_PART)
    me = context.site
    adverts = check_roster(state, roster)
    # From here on every key and signature is bound to the roster's digest. Sites that were given different rosters
    # derive different masks, and their messages do not verify.
    binding = context.binding.with_roster(roster_digest(context.binding.parameters, roster))
    context = replace(context, binding=binding)
    masking = graph.build_graph(
        binding.roster, tuple(adverts), parameters.corrupt, parameters.degree, parameters.security
    )
    neighbours, holders = masking.neighbours(me), masking.holders(me)
    around = {other: adverts[other] for other in neighbours}
    links = make_links(state.keys, binding.roster, me, around, lambda other: parameters.cohort[other].name, context.kem)
    # Only now is the state used up: a roster that failed a check above must not end the round for this site.
    state.once.take("share")
    # Shamir points are site numbers from 1 up: the share at point 0 would be the secret itself.
    points = [holder + 1 for holder in holders]
    self_seed = context.random_bytes(shamir.SECRET_BYTES)
    of_self = shamir.split(self_seed, points, parameters.threshold, context.random_bytes)
    of_mask = shamir.split(state.keys.seed, points, parameters.threshold, context.random_bytes)
    plain = {holder: a + b for holder, a, b in zip(holders, of_self, of_mask, strict=True)}
    sealed = tuple(Sealed(other, links.seal(other, plain[other])) for other in neighbours)
    suite = parameters.suite
    message = Shares(
        binding.roster,
        me,
        commitment(binding.roster, me, self_seed),
        sealed,
        seed_commitment=seed_commitment(binding.roster, me, state.keys.seed) if suite.hybrid else b"",
        suite=suite,
    )
    message = replace(message, signature=sign(context, message))
    return Shared(context, masking, frozenset(adverts), self_seed, plain[me], links), message


def check_roster(state: Advertised, roster: Roster) -> dict[int, Advertise]:
    """Check all adverts and return them by site."""
    context, parameters = state.context, state.context.parameters
    sites = [advert.site for advert in roster.adverts]
    check_ascending(sites, len(parameters.cohort))
    if state.advert not in roster.adverts:
        raise VerificationError(
            "the round's list of keys (roster) does not hold this site's own keys as the site sent them",
            "take part in no further round until the coordinator explains it: the keys were changed",
        )
    check_enough(len(sites), max(parameters.min_survivors, parameters.threshold), "sent their keys")
    check_sharing(parameters, len(sites))
    if any(advert.suite is not parameters.suite for advert in roster.adverts):
        raise ProtocolError(
            f"the round's list of keys (roster) holds keys of another suite than {parameters.suite.value}",
            TAKE_NO_PART,
        )
    keys = [key for advert in roster.adverts for key in advert.keys]
    if len(set(keys)) != len(keys):
        raise VerificationError(
            "the round's list of keys (roster) holds a key twice",
            "take part in no further round until the coordinator explains it: one site's key was used for another",
        )
    for advert in roster.adverts:
        if advert.parameters != context.binding.parameters:
            raise ProtocolError(
                "the round's list of keys (roster) holds keys that a site sent for other parameters of secure "
                "aggregation",
                "take part in no further round until the coordinator explains it: the keys belong to another round",
            )
        if advert.site != context.site:
            check_signature(parameters, context.binding, advert)
    return {advert.site: advert for advert in roster.adverts}


def mask(state: Shared, delivery: Delivery, words: Words, record: Recorder) -> tuple[MaskedState, Masked]:
    """Open the neighbours' shares and mask this site's vector.

    Args:
        state: From `share`.
        delivery: The list of sites that shared, and the shares for this site.
        words: The vector's words, shape (layout.words,). They are masked in place; the caller must not use them
            again.
        record: Called before the vector is masked. It must store the entry durably, and raise if the round has
            one.

    Raises:
        ProtocolError: The state is used up, or lists or vector do not fit the round.
        TooFewSitesError: Too few sites shared.
        VerificationError: A share does not decrypt or fit its commitment, or the sharers leave a gap around the ring.
        StateError: `record` found that this round was masked before.
    """
    links = open_delivery(state, delivery)
    context, parameters = state.context, state.context.parameters
    me, roster = context.site, context.binding.roster
    peers = [item.site for item in delivery.sealed]
    check_words(parameters, words)
    what = sharers_digest(roster, delivery.sharers)
    state.once.take("mask")
    # On disk before the vector is masked. After a restart the site must refuse to mask for this round again: one vector
    # masked twice could be brought into two sums over different sets of sites.
    record(RecordedStep(context.binding.session, context.binding.round, "mask", roster, what))
    # A pair's masks cancel in the sum: the site with the lower number adds, the other one subtracts. The self mask
    # hides a vector that arrives after its site was declared dropped and its pairwise masks were reconstructed.
    plus = [masks.self_mask_key(state.self_seed, roster, me)]
    plus += [links[other].pair_key for other in peers if other > me]
    masks.apply(words, plus, [links[other].pair_key for other in peers if other < me])
    if parameters.packed:
        words = masks.pack(words)
    tags = tuple(Tag(other, links[other].there.tag(what)) for other in peers)
    wraps = tuple(Wrap(other, links[other].wrap) for other in peers if links[other].wrap)
    message = Masked(roster, me, what, tags, words, wraps=wraps, suite=parameters.suite)
    message = replace(message, signature=sign(context, message))
    held = {me: state.own_shares, **{other: link.shares for other, link in links.items()}}
    channels = {other: (link.there, link.back) for other, link in links.items()}
    return MaskedState(context, state.graph, delivery.sharers, what, held, channels), message


def check_words(parameters: Parameters, words: Words) -> None:
    """Check that a vector fits the layout and can be masked in place.

    Raises:
        ProtocolError: It does not.
    """
    flags = words.flags
    if words.shape != (parameters.layout.words,) or words.dtype != WORD or not (flags.c_contiguous and flags.writeable):
        raise ProtocolError(
            f"the site's vector must be {parameters.layout.words} writable little-endian 64-bit words, got an array "
            f"of shape {words.shape} and type {words.dtype}",
            "report this as a bug",
        )


def open_delivery(state: Shared, delivery: Delivery) -> dict[int, Link]:
    """Check a delivery and return what this site has with each neighbour that shared, by its number.

    It does not use up the state, so a caller can check the delivery before it computes the vector.

    Raises:
        ProtocolError, TooFewSitesError, VerificationError: As `mask`.
    """
    expect(state, Shared)
    context, parameters = state.context, state.context.parameters
    me = context.site
    check_address(context, delivery.roster, delivery.site)
    check_ascending(delivery.sharers, len(parameters.cohort))
    sharers = frozenset(delivery.sharers)
    if not sharers <= state.roster or me not in sharers:
        raise ProtocolError(
            "the coordinator's list of the sites that sent shares must include this site, and only sites of the roster",
            TAKE_NO_PART,
        )
    _check_list(context, state.graph, sharers, "sent shares")
    peers = [other for other in state.graph.neighbours(me) if other in sharers]
    if [item.site for item in delivery.sealed] != peers:
        raise ProtocolError(
            f"the coordinator must deliver the shares of the {len(peers)} neighbours that sent any, in ascending "
            "order, got "
            f"those of {len(delivery.sealed)} sites",
            TAKE_NO_PART,
        )
    if delivery.suite is not parameters.suite:
        raise ProtocolError(
            f"the coordinator delivered shares of another suite than {parameters.suite.value}", TAKE_NO_PART
        )
    return {item.site: state.links.open(item.site, item.data) for item in delivery.sealed}


def confirm(state: MaskedState, survivors: Survivors) -> tuple[Confirmed, Confirm]:
    """Sign the one list of survivors that this site accepts.

    Raises:
        ProtocolError: The state is used up (a second list), or the list does not fit the round.
        TooFewSitesError: The sum would be over too few sites.
        VerificationError: A neighbour masked for other sharers, or the survivors may fall apart into groups
            whose sums the coordinator would learn separately.
    """
    expect(state, MaskedState)
    context = state.context
    me = context.site
    check_address(context, survivors.roster, survivors.site)
    check_ascending(survivors.survivors, len(context.parameters.cohort))
    alive = frozenset(survivors.survivors)
    if not alive <= frozenset(state.sharers) or me not in alive:
        raise ProtocolError(
            "the coordinator's list of survivors must include this site, and only sites that sent shares", TAKE_NO_PART
        )
    _check_list(context, state.graph, alive, "survived")
    peers = [other for other in state.graph.neighbours(me) if other in alive]
    if [tag.site for tag in survivors.tags] != peers:
        raise ProtocolError(
            f"the coordinator must deliver one confirmation tag of each of the {len(peers)} surviving neighbours, in "
            "ascending "
            f"order, got {len(survivors.tags)}",
            TAKE_NO_PART,
        )
    # The coordinator could give a neighbour another list of sharers, to leave it alone with corrupt sites. Then the tag
    # does not match, and this site reveals no share of that neighbour's self mask.
    for tag in survivors.tags:
        state.channels[tag.site][1].check(state.sharers_digest, tag.data)
    # A site confirms once. Any two quorums share an honest site, so only one pair of lists can ever get a quorum.
    state.once.take("confirm")
    lists = lists_digest(state.sharers_digest, survivors.survivors)
    tags = tuple(Tag(other, state.channels[other][0].tag(lists)) for other in peers)
    message = Confirm(context.binding.roster, me, lists, tags)
    message = replace(message, signature=sign(context, message))
    return Confirmed(context, survivors.survivors, lists, state.shares, state.channels), message


def reveal(state: Confirmed, proof: Proof, record: Recorder) -> Reveal:
    """Reveal one share for each site, once a quorum has confirmed the same lists.

    For a survivor it is the share of the seed of its self mask. For a site that dropped out after sharing it is the
    share of the seed of its mask key. Nobody may learn both secrets of a site: together they unmask its vector.

    Args:
        state: From `confirm`.
        proof: Confirmations of a quorum of the cohort: neighbours' by MAC, others' by signature. This site's own
            counts and is not sent.
        record: Called before anything is returned. It must store the entry durably, and raise if the round has one.

    Raises:
        ProtocolError: The state is used up, or the proof is malformed.
        TooFewSitesError: Fewer sites than a quorum confirmed.
        VerificationError: A confirmation is for other lists, or its signature is wrong.
        StateError: `record` found that this round was revealed before.
    """
    expect(state, Confirmed)
    context = state.context
    _check_proof(state, proof)
    state.once.take("reveal")
    binding = context.binding
    # On disk before any share leaves, so that a restarted site never reveals for a second pair of lists.
    record(RecordedStep(binding.session, binding.round, "reveal", binding.roster, state.lists))
    return reveal_for(context, state.shares, state.survivors, state.lists)


def reveal_for(context: Context, held: Mapping[int, bytes], alive: Collection[int], lists: bytes) -> Reveal:
    """Return one share for each owner: of its self mask's seed if it is in `alive`, or else of its mask key's."""
    shares = tuple(
        Share(owner, both[:SHARE_BYTES] if owner in alive else both[SHARE_BYTES:])
        for owner, both in sorted(held.items())
    )
    message = Reveal(context.binding.roster, context.site, lists, shares)
    return replace(message, signature=sign(context, message))


def _check_proof(state: Confirmed, proof: Proof) -> None:
    context, parameters = state.context, state.context.parameters
    check_address(context, proof.roster, proof.site)
    tagged, signed = [tag.site for tag in proof.tags], [message.site for message in proof.confirms]
    check_ascending(tagged, len(parameters.cohort))
    check_ascending(signed, len(parameters.cohort))
    # The quorum is of the whole cohort. If the neighbours' confirmations were enough, the coordinator could give two
    # arcs of the ring different lists.
    senders = {*tagged, *signed, context.site}
    if not senders <= set(state.survivors) or not set(tagged) <= set(state.channels):
        raise ProtocolError(
            "the coordinator delivered a confirmation of a site that is no survivor, or a tag of a site that is no "
            "neighbour",
            TAKE_NO_PART,
        )
    quorum = graph.quorum(len(parameters.cohort), parameters.corrupt)
    check_enough(len(senders), quorum, "confirmed the survivors")
    for tag in proof.tags:
        state.channels[tag.site][1].check(state.lists, tag.data)
    for message in proof.confirms:
        if message.lists != state.lists or message.roster != context.binding.roster:
            raise VerificationError(
                f"site {parameters.cohort[message.site].name} confirmed another list of survivors than this site",
                "take part in no further round until the coordinator explains it: it gave the sites different "
                "lists; nothing was revealed",
            )
        check_signature(parameters, context.binding, message)


def sign(context: Context, message: Signed) -> bytes:
    """Return the site's signature of a message."""
    return context.identity.key.sign(signed_bytes(message, context.binding))


def expect(state: object, kind: type) -> None:
    """Raise `ProtocolError` unless a step is given the state that it needs."""
    if not isinstance(state, kind):
        raise ProtocolError(
            f"this step of secure aggregation needs the state {kind.__name__}, but the site is in the state "
            f"{type(state).__name__}",
            "report this as a bug",
        )


def check_address(context: Context, roster: bytes, site: int) -> None:
    """Raise `ProtocolError` unless a message is for this roster and this site."""
    if roster != context.binding.roster:
        raise ProtocolError(
            f"the coordinator's message is for the list of keys (roster) {roster.hex()[:16]}, this round has "
            f"{context.binding.roster.hex()[:16]}",
            "take part in no further round until the coordinator explains it: the message is of another round, or "
            "the list changed",
        )
    if site != context.site:
        raise ProtocolError(
            f"the coordinator's message is for site number {site} of the cohort, this is number {context.site}",
            TAKE_NO_PART,
        )


def check_ascending(sites: list[int] | tuple[int, ...], cohort: int) -> None:
    """Check a list of sites: in the cohort, ascending, none twice."""
    if not ascends(sites) or (sites and not 0 <= sites[0] <= sites[-1] < cohort):
        raise ProtocolError(
            "a list of sites in the coordinator's message must be ascending, name each site once and only sites of "
            "the cohort",
            TAKE_NO_PART,
        )


def check_enough(count: int, least: int, what: str) -> None:
    """Raise `TooFewSitesError` if too few sites did something that the round needs."""
    if count < least:
        raise TooFewSitesError(
            f"secure aggregation: {count} sites {what}, the round needs at least {least}",
            "wait for the next round; nothing was revealed",
        )


def _check_list(context: Context, masking: graph.Graph, present: frozenset[int], what: str) -> None:
    """Check that `present` are enough sites, in all and around this site, and that they stay connected."""
    parameters = context.parameters
    check_enough(len(present), parameters.min_survivors, what)
    around = sum(holder in present for holder in masking.holders(context.site))
    check_enough(around, parameters.threshold, f"among this site and its neighbours {what}")
    if not masking.holds_together(present):
        raise VerificationError(
            f"the sites that {what} are split in two or more parts without common masks, so each part could be "
            "summed alone",
            "take part in no further round until the coordinator explains it: it may have chosen the drop-outs; "
            "nothing was revealed",
        )
