"""One round's collection under secure aggregation: five exchanges, then nothing but the sum.

::

    RoundOpen with Parameters  ->  Advertise
    Roster                     ->  Shares
    Delivery                   ->  Masked       (the site trains here)
    Survivors                  ->  Confirm
    Proof                      ->  Reveal

Each exchange ends when all have answered or at its deadline. A site that misses one, or whose message does
not verify, has dropped out; below the threshold nothing more is asked, so nothing is revealed. In large
cohorts several groups run side by side, each with a sum of its own, and a group whose mean update is far
longer than the others' is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privet.common.errors import ProtocolError, TooFewSitesError, VerificationError
from privet.common.masking.groups import groups_of
from privet.common.masking.noise_shares import shared_noise
from privet.common.masking.parameters import parameters_of
from privet.common.masking.vector import read_step, read_sums
from privet.common.secagg.coordinator import Aggregator
from privet.common.secagg.encoding import decode as read
from privet.common.secagg.encoding import encode
from privet.common.secagg.messages import Advertise, Confirm, Masked, Parameters, Reveal, Shares, Signed
from privet.common.secagg.quantize import dequantise
from privet.common.study.adapter import AdapterSpec
from privet.common.study.messages import Failure, Message, RoundOpen, Secured
from privet.common.study.study import Study
from privet.server.exchange import Exchange
from privet.server.rounds.participants import Participant, RoundSum, too_few

# A group is left out if its mean update is longer than this many times the median group's.
_OUTLYING = 2.0
_LATE = Failure("TimeoutError", "no answer before the deadline", "")
AnswerKind = type[Advertise] | type[Shares] | type[Masked] | type[Confirm] | type[Reveal]


@dataclass(frozen=True)
class Waits:
    """Seconds that one exchange may take: an ordinary one, and the one in which sites train."""

    step: float
    training: float


@dataclass(eq=False)
class _Group:
    """The sites of one sum.

    Attributes:
        nodes: Their addresses, by number of the site.
        failures: Why sites dropped out, by name.
        lost: Why the whole group did, if it did.
    """

    names: tuple[str, ...]
    nodes: tuple[int, ...]
    parameters: Parameters
    coordinator: Aggregator
    failures: dict[str, Failure] = field(default_factory=dict)
    lost: ProtocolError | VerificationError | None = None


@dataclass(frozen=True, eq=False)
class _GroupSum:
    """What a group gives the coordinator. Sums as in `RoundSum`."""

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
        StudyError: The cohort is too small for what masking has to withstand.
        TooFewSitesError: Too few sites stayed to the end; nothing was revealed of any group that lost too many.
        DivergedError: None did, because training diverged at every site.
    """
    groups = [_group(study, spec, opened, names, cohort) for names in groups_of(study, opened.round, tuple(cohort))]

    study_digest = study.digest

    def secured(bodies: Mapping[int, Any]) -> dict[int, Message]:
        return {site: Secured(study_digest, opened.round, opened.nonce, encode(b)) for site, b in bodies.items()}

    def proposal(group: _Group) -> dict[int, Message]:
        masking = encode(group.parameters)
        declared = [cohort[name].consent.weight for name in group.names]
        return {site: replace(opened, masking=masking, declared=count) for site, count in enumerate(declared)}

    def roster(group: _Group) -> dict[int, Message]:
        message = group.coordinator.roster()
        asked = Secured(study_digest, opened.round, opened.nonce, encode(message))
        return dict.fromkeys((advert.site for advert in message.adverts), asked)

    steps: list[tuple[AnswerKind, Callable[[_Group], dict[int, Message]], float]] = [
        (Advertise, proposal, waits.step),
        (Shares, roster, waits.step),
        (Masked, lambda group: secured(group.coordinator.deliveries()), waits.training),
        (Confirm, lambda group: secured(group.coordinator.survivors()), waits.step),
        (Reveal, lambda group: secured(group.coordinator.proofs()), waits.step),
    ]
    for kind, requests, timeout in steps:
        _take(exchange, groups, kind, requests, timeout)
    return _combine(study, [(group, _finish(study, spec, group, cohort)) for group in groups], opened)


def _group(
    study: Study, spec: AdapterSpec, opened: RoundOpen, names: tuple[str, ...], cohort: Mapping[str, Participant]
) -> _Group:
    identities = {name: bytes.fromhex(cohort[name].consent.identity) for name in names}
    parameters = parameters_of(study, spec, opened, identities)
    return _Group(names, tuple(cohort[name].node for name in names), parameters, Aggregator(parameters))


def _take(
    exchange: Exchange,
    groups: Sequence[_Group],
    kind: AnswerKind,
    requests: Callable[[_Group], Mapping[int, Message]],
    timeout: float,
) -> None:
    """Take one step with all groups at once. A group that cannot take it is lost for this round."""
    asked: dict[int, Message] = {}
    awaited: dict[int, tuple[_Group, int]] = {}
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
        if node in awaited:
            group, site = awaited.pop(node)
            failure = _admit(group, site, kind, reply)
            if failure is not None:
                group.failures[group.names[site]] = failure
    for group, site in awaited.values():
        group.failures[group.names[site]] = _LATE


def _admit(group: _Group, site: int, kind: AnswerKind, reply: Message) -> Failure | None:
    """Hand a site's answer to the protocol; return why it dropped out, if it did."""
    if isinstance(reply, Failure):
        return reply
    if not isinstance(reply, Secured):
        return Failure("ProtocolError", f"expected a message of secure aggregation, got {reply.kind}", "")
    try:
        message: Signed = read(kind, reply.body)  # type: ignore[type-var]  # a TypeVar takes no union of its kinds
        if message.site != site:
            raise ProtocolError("the message is another site's")
        group.coordinator.admit(message)
    except (ProtocolError, VerificationError) as error:
        return Failure(type(error).__name__, error.message, error.hint)
    return None


def _finish(study: Study, spec: AdapterSpec, group: _Group, cohort: Mapping[str, Participant]) -> _GroupSum | None:
    """Unmask a group's sum, or return None where too few sites are left for it or some site spoilt it."""
    if group.lost is not None:
        return None
    try:
        return _unmask(study, spec, group, cohort)
    except (ProtocolError, VerificationError) as error:
        group.lost = error
        return None


def _unmask(study: Study, spec: AdapterSpec, group: _Group, cohort: Mapping[str, Participant]) -> _GroupSum:
    """Unmask a group's sum.

    Raises:
        TooFewSitesError: Too few sites revealed.
        VerificationError: Shares were wrong, so that masks cannot be removed.
        ProtocolError: The sum is not one of vectors as the study has them.
    """
    total = group.coordinator.total(workers=2)
    p = group.parameters
    survivors = tuple(group.names[site] for site in total.survivors)
    declared = study.aggregation.weighting == "declared"
    expected = float(sum(cohort[name].consent.weight if declared else 1 for name in survivors))
    document = {
        "sites": list(group.names),
        "survivors": list(survivors),
        "threshold": p.threshold,
        "degree": p.degree,
        "corrupt": p.corrupt,
        "min_survivors": p.min_survivors,
        "bits": p.bits,
        "transcript": f"sha256:{total.transcript.hex()}",
    }
    if study.distributed:
        # The mean gradient is the sum over the units that were to be expected, which is public. Sites step against it.
        step, drawn = -read_step(study, total.words, p.layout), study.training.sampling_rate * expected
        document["noise"] = shared_noise(study, len(group.names)).document(len(survivors))
        return _GroupSum(drawn, 0, step, np.empty(0), survivors, document)
    weight, cut, update, metrics = read_sums(study, spec, dequantise(p.layout, total.words, len(survivors)))
    if weight != expected:
        raise ProtocolError(
            f"the weights in the sum add up to {weight:g}, the sites declared {expected:g}",
            "a site sent another weight than it declared; the round is lost",
        )
    return _GroupSum(weight, cut, update, metrics, survivors, {**document, "values_cut": cut})


def _without_outliers(sums: Sequence[_GroupSum]) -> list[_GroupSum]:
    """Return the sums but those far longer than the median group's; all of them where there are fewer than three.

    Noise makes a light group's mean update long, so its sum may be as long as that of a group of median weight.
    """
    if len(sums) < 3:
        return list(sums)
    limit = _OUTLYING * float(np.median([total.norm for total in sums]))
    usual = float(np.median([total.weight for total in sums]))
    return [total for total in sums if total.norm * total.weight <= limit * max(total.weight, usual)]


def _combine(study: Study, finished: Sequence[tuple[_Group, _GroupSum | None]], opened: RoundOpen) -> RoundSum:
    """Add the sums of all groups but those far longer than the median."""
    failures = {name: failure for group, _ in finished for name, failure in group.failures.items()}
    sums = [total for _, total in finished if total is not None]
    kept = _without_outliers(sums)
    for group, total in finished:
        if total is None or total not in kept:
            lost = group.lost or ProtocolError("the group's mean update is over twice as long as the median group's")
            left = {name: Failure(type(lost).__name__, lost.message, lost.hint) for name in group.names}
            failures = {**left, **failures}
    survivors = tuple(sorted(name for total in kept for name in total.survivors))
    failures = {name: failures[name] for name in sorted(failures) if name not in survivors}
    if 2 * len(kept) < len(finished) or len(survivors) < study.cohort.min_sites:
        raise too_few(opened, survivors, failures, study.cohort.min_sites)
    return RoundSum(
        sum(total.weight for total in kept),
        np.sum([total.update for total in kept], axis=0),
        np.sum([total.metrics for total in kept], axis=0),
        survivors,
        failures,
        tuple({**total.document, "kept": total in kept} for total in sums),
    )
