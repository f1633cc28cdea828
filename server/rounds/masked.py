"""One round's collection under secure aggregation: five exchanges, after which the coordinator has only the sum.

::

    RoundOpen with Parameters  ->  Advertise
    Roster                     ->  Shares
    Delivery                   ->  Masked       (the site trains here)
    Survivors                  ->  Confirm
    Proof                      ->  Reveal

Each exchange ends when all sites have answered, or at its deadline. A site that misses one, or whose message does
not verify, has dropped out. Below the threshold the sites are asked nothing more, so nothing is revealed. A large
cohort is split into groups that run at the same time, each with its own sum; a group whose mean update has a far
larger norm than the others' is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privet.common.errors import ProtocolError, TooFewSitesError, VerificationError
from privet.common.masking.groups import check_columns, groups_of
from privet.common.masking.noise_shares import shared_noise
from privet.common.masking.parameters import parameters_of
from privet.common.masking.vector import read_step, read_sums
from privet.common.secagg.block_sums import BlockAggregator
from privet.common.secagg.coordinator import Aggregator, BrokenPromiseError, Unmasking
from privet.common.secagg.dealt_sums import DealtAggregator
from privet.common.secagg.encoding import decode as read
from privet.common.secagg.encoding import encode
from privet.common.secagg.messages import (
    Advertise,
    Confirm,
    Deal,
    Joined,
    Links,
    Masked,
    Parameters,
    Reveal,
    Shares,
    Signed,
)
from privet.common.secagg.quantize import dequantise
from privet.common.study.adapter import AdapterSpec
from privet.common.study.messages import Failure, Message, RoundOpen, Secured
from privet.common.study.study import Study
from privet.server.exchange import Exchange
from privet.server.rounds.participants import Participant, RoundSum, too_few

# A group is left out if the norm of its mean update is more than this many times the median group's.
_OUTLYING = 2.0
_FAR = "the norm of the group's mean update is over twice the median group's"
LATE = Failure(
    "TimeoutError",
    "the site did not answer before the deadline",
    "check that the site is running and online, or allow more time for a round",
)
_VERSION = "run the same version of privet at the site and at the coordinator"
AnswerKind = (
    type[Advertise]
    | type[Links]
    | type[Deal]
    | type[Joined]
    | type[Shares]
    | type[Masked]
    | type[Confirm]
    | type[Reveal]
)
Side = Aggregator | BlockAggregator | DealtAggregator
"""The coordinator's side of a round, or of a block."""


@dataclass(frozen=True)
class Waits:
    """Seconds that one exchange may take: an ordinary one, and the one in which sites train."""

    step: float
    training: float


@dataclass(eq=False)
class Group:
    """The sites of one sum, and what each exchange asks of them.

    Attributes:
        names: The sites, by their numbers in the protocol.
        nodes: Their addresses, in the same order.
        declared: Units that each declared, in the same order.
        opened: How the round was opened.
        study: The study.
        study_digest: Its digest, which takes time to compute.
        parameters: The protocol's parameters, with the sites' identity keys.
        coordinator: The coordinator's side of the protocol.
        failures: Why sites dropped out, by name.
        lost: Why the whole group is lost for the round, if it is.
        spoiled: The sites of which one spoiled the sum, if one did.
    """

    names: tuple[str, ...]
    nodes: tuple[int, ...]
    declared: tuple[int, ...]
    opened: RoundOpen
    study: Study
    study_digest: str
    parameters: Parameters
    coordinator: Side
    failures: dict[str, Failure] = field(default_factory=dict)
    lost: ProtocolError | VerificationError | None = None
    spoiled: frozenset[str] = frozenset()

    def proposal(self) -> dict[int, Message]:
        """Return the message that opens the round, by number of the site."""
        masking = encode(self.parameters)
        return {n: replace(self.opened, masking=masking, declared=count) for n, count in enumerate(self.declared)}

    def roster(self) -> dict[int, Message]:
        """Return the list of all sites' keys, for each site that sent its own."""
        roster = self.coordinator.roster()
        # One message for all: a copy for each site would take memory that grows with the square of the cohort.
        return dict.fromkeys((advert.site for advert in roster.adverts), self.secured(roster))

    def deliveries(self) -> dict[int, Message]:
        """Return the encrypted shares that the sites sent each other, by receiver."""
        return self.each(self.coordinator.deliveries())

    def survivors(self) -> dict[int, Message]:
        """Return whose updates arrived, for each site to confirm."""
        found = self._unmasking.survivors()
        check_columns(self.study, [self.names[site] for site in found], self.parameters.corrupt, self.opened.round)
        return self.each(found)

    def proofs(self) -> dict[int, Message]:
        """Return the proof that enough sites confirmed the same survivors; only then does a site reveal shares."""
        return self.each(self._unmasking.proofs())

    @property
    def _unmasking(self) -> Unmasking:
        if isinstance(self.coordinator, BlockAggregator):
            raise ProtocolError("a block without drop-outs has no list of survivors", "report this as a bug")
        return self.coordinator

    def each(self, bodies: Mapping[int, Any]) -> dict[int, Message]:
        """Return the messages of the protocol, by number of the site."""
        return {site: self.secured(body) for site, body in bodies.items()}

    def secured(self, body: Any) -> Message:
        """Return a message of the protocol for this round."""
        return Secured(self.study_digest, self.opened.round, self.opened.nonce, encode(body))


@dataclass(frozen=True, eq=False)
class GroupSum:
    """A group's result. Sums as in `RoundSum`."""

    weight: float
    cut: int
    update: NDArray[np.float64]
    metrics: NDArray[np.float64]
    survivors: tuple[str, ...]
    document: Mapping[str, Any]

    @property
    def norm(self) -> float:
        """L2 norm of the group's mean update."""
        return float(np.linalg.norm(self.update)) / self.weight


def collect_masked(
    exchange: Exchange,
    study: Study,
    spec: AdapterSpec,
    cohort: Mapping[str, Participant],
    opened: RoundOpen,
    waits: Waits,
) -> RoundSum:
    """Run one round's exchanges and return the sum over all groups.

    Raises:
        StudyError: The cohort is too small for the number of sites that masking has to protect against.
        TooFewSitesError: Too few sites stayed to the end. A group that lost too many has revealed nothing.
        DivergedError: No site delivered, because training diverged at every one.
    """
    names_of_groups = groups_of(study, opened.round, tuple(cohort))
    groups = [
        group_of(study, spec, opened, {name: cohort[name] for name in names}, Aggregator) for names in names_of_groups
    ]
    # Sites reveal shares last, after enough of them have confirmed one set of survivors. A coordinator that could name
    # two sets would get both secrets of a site, and read its update.
    take(exchange, groups, Advertise, Group.proposal, waits.step)
    take(exchange, groups, Shares, Group.roster, waits.step)
    take(exchange, groups, Masked, Group.deliveries, waits.training)
    take(exchange, groups, Confirm, Group.survivors, waits.step)
    take(exchange, groups, Reveal, Group.proofs, waits.step)
    return combine(study, [(group, finish(study, spec, group, cohort)) for group in groups], opened)


def group_of(
    study: Study,
    spec: AdapterSpec,
    opened: RoundOpen,
    members: Mapping[str, Participant],
    coordinator: Callable[[Any], Side],
) -> Group:
    """Return the state of one sum of a round, over `members` in name order.

    Args:
        study: The study.
        spec: Layout of the adapter.
        opened: How the round is opened.
        members: The sites of the sum, by name.
        coordinator: Makes the coordinator's side of the protocol from its parameters.

    Raises:
        StudyError: As `parameters_of`.
    """
    identities = {name: bytes.fromhex(member.consent.identity) for name, member in members.items()}
    parameters = parameters_of(study, spec, opened, identities)
    return Group(
        names=tuple(members),
        nodes=tuple(member.node for member in members.values()),
        declared=tuple(member.consent.weight for member in members.values()),
        opened=opened,
        study=study,
        study_digest=study.digest,
        parameters=parameters,
        coordinator=coordinator(parameters),
    )


def take(
    exchange: Exchange,
    groups: Sequence[Group],
    kind: AnswerKind,
    requests: Callable[[Group], Mapping[int, Message]],
    timeout: float,
) -> None:
    """Run one exchange with all groups at once. A group with too few sites for it is lost for this round."""
    asked: dict[int, Message] = {}
    awaited: dict[int, tuple[Group, int]] = {}
    for group in groups:
        if group.lost is None:
            try:
                messages = requests(group)
            except TooFewSitesError as error:
                group.lost = error
                continue
            for site, message in messages.items():
                asked[group.nodes[site]] = message
                awaited[group.nodes[site]] = (group, site)
    for node, reply in exchange.ask(asked, timeout=timeout):
        # One answer from each node: a second one, or one from a node that was not asked, is ignored.
        if node in awaited:
            group, site = awaited.pop(node)
            failure = _admit(group, site, kind, reply)
            if failure is not None:
                group.failures[group.names[site]] = failure
    for group, site in awaited.values():
        group.failures[group.names[site]] = LATE


def _admit(group: Group, site: int, kind: AnswerKind, reply: Message) -> Failure | None:
    """Pass a site's answer to the protocol; return why the site dropped out, if it did."""
    if isinstance(reply, Failure):
        return reply
    if not isinstance(reply, Secured):
        return Failure(
            "ProtocolError",
            f"the site must answer with a message of secure aggregation, found a message of type {reply.kind}",
            _VERSION,
        )
    try:
        message: Signed = read(kind, reply.body)  # type: ignore[type-var]  # a TypeVar takes no union of its kinds
        # The transport knows which node answers. Without this check a site could speak for another one.
        if message.site != site:
            raise ProtocolError("the site's message names another site as its sender", _VERSION)
        group.coordinator.admit(message)
    except (ProtocolError, VerificationError) as error:
        return Failure(type(error).__name__, error.message, error.hint)
    return None


def finish(study: Study, spec: AdapterSpec, group: Group, cohort: Mapping[str, Participant]) -> GroupSum | None:
    """Unmask a group's sum, or return None where too few sites are left or a site sent values that spoil it."""
    if group.lost is not None:
        return None
    try:
        return _unmask(study, spec, group, cohort)
    except TooFewSitesError as error:
        group.lost = error
    except BrokenPromiseError as error:
        # The one case in which what a site signed shows who it was.
        group.lost, group.spoiled = error, frozenset({group.names[error.site]})
    except (ProtocolError, VerificationError) as error:
        # Masks hide who it was. A site may also have spoiled the shares before it dropped out.
        group.lost, group.spoiled = error, frozenset(group.names)
    return None


def _unmask(study: Study, spec: AdapterSpec, group: Group, cohort: Mapping[str, Participant]) -> GroupSum:
    """Unmask a group's sum.

    Raises:
        TooFewSitesError: Too few sites revealed.
        VerificationError: Shares were wrong, so the masks cannot be removed.
        ProtocolError: The sum cannot be one of vectors in the study's form.
    """
    total, head = group.coordinator.total(workers=2), study.sums_units(group.opened.round)
    p = group.parameters
    survivors = tuple(group.names[site] for site in total.survivors)
    expected = float(sum(study.aggregation.weight(cohort[name].consent.weight) for name in survivors))
    document: dict[str, Any] = {
        "sites": list(group.names),
        "survivors": list(survivors),
        "threshold": p.threshold,
        "degree": p.degree,
        "corrupt": p.corrupt,
        "min_survivors": p.min_survivors,
        "bits": p.bits,
        "suite": p.suite.value,
        "transcript": f"sha256:{total.transcript.hex()}",
    }
    if isinstance(group.coordinator, BlockAggregator | DealtAggregator):
        document["block"] = group.coordinator.parameters.round
    if study.distributed:
        # The sum is divided by the expected number of units, which is public; the number drawn is private. That of
        # a step is negative, because sites step against the gradient.
        sums = read_step(study, total.words, p.layout, head=head)
        document["noise"] = shared_noise(study, len(group.names), head=head).document(len(survivors))
        if head:
            return GroupSum(expected, 0, sums, np.empty(0), survivors, document)
        return GroupSum(study.training.sampling_rate * expected, 0, -sums, np.empty(0), survivors, document)
    cut, update, metrics = read_sums(study, spec, dequantise(p.layout, total.words, len(survivors)), head=head)
    return GroupSum(expected, cut, update, metrics, survivors, {**document, "values_cut": cut})


def _without_outliers(sums: Sequence[GroupSum]) -> list[GroupSum]:
    """Return the sums without those far longer than the median group's; all of them where there are fewer than three.

    Noise makes the mean update of a group with little weight long, so the sum of such a group is compared with that of
    a group of median weight.
    """
    # Of two, neither is the outlier.
    if len(sums) < 3:
        return list(sums)
    limit = _OUTLYING * float(np.median([total.norm for total in sums]))
    usual = float(np.median([total.weight for total in sums]))
    return [total for total in sums if total.norm * total.weight <= limit * max(total.weight, usual)]


def combine(study: Study, finished: Sequence[tuple[Group, GroupSum | None]], opened: RoundOpen) -> RoundSum:
    """Add the sums of all groups, without those far longer than the median."""
    failures = {name: failure for group, _ in finished for name, failure in group.failures.items()}
    sums = [total for _, total in finished if total is not None]
    # In a masked sum one site's update cannot be checked. A group that a site has poisoned shows only as a whole, in a
    # norm that differs from the other groups'; leaving the group out limits what that site can do.
    kept = _without_outliers(sums)
    for group, total in finished:
        if total is None or total not in kept:
            lost = group.lost or ProtocolError(_FAR)
            left = {name: Failure(type(lost).__name__, lost.message, lost.hint) for name in group.names}
            # A site's own failure goes before the group's: it names the site to look at.
            failures = {**left, **failures}
    spoiled = tuple(group.spoiled for group, _ in finished if group.spoiled)
    survivors = tuple(sorted(name for total in kept for name in total.survivors))
    failures = {name: failures[name] for name in sorted(failures) if name not in survivors}
    if 2 * len(kept) < len(finished) or len(survivors) < study.cohort.min_sites:
        error = too_few(opened, survivors, failures, study.cohort.min_sites)
        if isinstance(error, ProtocolError):
            error.spoiled = spoiled
        raise error
    return RoundSum(
        sum(total.weight for total in kept),
        np.sum([total.update for total in kept], axis=0),
        np.sum([total.metrics for total in kept], axis=0),
        survivors,
        failures,
        tuple({**total.document, "kept": total in kept} for total in sums),
        spoiled,
    )
