"""The egress gate of a run: what its candidate needs in order to leave, and whether the log says that it has it.

A run whose study has a gate ends with a candidate: the adapter of its last round. `Gate` collects what the log says of
it, and has the rules that `privet.common.log.replay` applies to reviews, decisions and exports
(docs/decisions/0023-a-release-passes-a-gate.md has the states and the reasons). Nothing here does I/O.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from privet.common.errors import VerificationError
from privet.common.log.statements import (
    CanaryCounts,
    EgressDecision,
    EgressReview,
    RunOpen,
    StatedGate,
    Tested,
)

DAY = 86_400
CLOCKS = 300
"""Seconds by which the clocks of a site and the coordinator may differ."""
UNCLAIMED_DELTA = 1e-5
"""Delta at which canaries bound the epsilon of a run without privacy."""
State = Literal["running", "candidate", "accepted", "expired", "refused"]
# A bound is computed to 1e-4 and stated with two places: half of the last, and what machines may differ in.
_PLACES, _NEAR = 2, 0.0051


@dataclass(frozen=True)
class Facts:
    """What the log says of a candidate at a time.

    Attributes:
        epsilon: Most that a site has spent in the run; None if it is not private, or not stated of each site.
        bound: Largest lower bound on epsilon that the counted reviews' canaries show; None where none was audited.
        quality: Last value of the gate's metric, of a loss its negative; None without one.
        signed: The sites whose signatures count, ascending.
        refused: The sites that refuse, ascending.
        failed: For each condition that a refusal names, the sites that name it.
        expires: When the first counted signature ends; None without one.
    """

    epsilon: float | None
    bound: float | None
    quality: float | None
    signed: tuple[str, ...]
    refused: tuple[str, ...]
    failed: Mapping[str, tuple[str, ...]]
    expires: int | None


@dataclass
class Gate:
    """The gate of a run, and what the log says of it.

    Attributes:
        run: The run-open.
        terms: The conditions.
        candidate: Digest of the adapter of the last round; None while the run goes on.
        answered: The sites that answered a round and have not left the consortium since.
        made: The adapters that its rounds led to, also those that were not published.
        spent: Epsilon of each site, by the last end of a round.
        measured: The metrics of the last round that had any.
        reviews: The last review of each site.
        decision: The last decision.
        decided: Number of its leaf.
        exported: Whether the candidate was exported.
    """

    run: RunOpen
    terms: StatedGate
    candidate: str | None = None
    answered: set[str] = field(default_factory=set)
    made: set[str] = field(default_factory=set)
    spent: Mapping[str, float] | None = None
    measured: Mapping[str, float] | None = None
    reviews: dict[str, EgressReview] = field(default_factory=dict)
    decision: EgressDecision | None = None
    decided: int = -1
    exported: bool = False

    def state(self, time: int) -> State:
        """Return how far the candidate is at a time, in Unix seconds."""
        if self.decision is None:
            return "running" if self.candidate is None else "candidate"
        if self.decision.expires is None:
            return "refused"
        return "accepted" if time < self.decision.expires else "expired"

    def facts(self, time: int) -> Facts:
        """Return what the log says of the candidate at a time."""
        # A refusal stands until its site says otherwise: neither time nor the site's removal does away with it.
        # Signatures that never held at one time do not count together, whatever time a decision names.
        standing = {
            site: each
            for site, each in sorted(self.reviews.items())
            if each.verdict == "refused" or each.time - CLOCKS <= time < each.expires
        }
        signed = tuple(site for site, each in standing.items() if each.verdict == "signed")
        failed: dict[str, tuple[str, ...]] = {}
        for site, each in standing.items():
            for condition in each.failed:
                failed[condition] = (*failed.get(condition, ()), site)
        bounds = [self.bound_of(each.canaries) for each in standing.values() if each.canaries is not None]
        spent = self.spent or {}
        return Facts(
            epsilon=max(spent.values(), default=None) if self.answered <= spent.keys() else None,
            bound=max(bounds, default=None),
            quality=quality_of(self.measured, self.terms.metric),
            signed=signed,
            refused=tuple(site for site, each in standing.items() if each.verdict == "refused"),
            failed=failed,
            expires=min((standing[site].expires for site in signed), default=None),
        )

    def bound_of(self, counts: CanaryCounts) -> float:
        """Return the lower bound on epsilon that a site's canaries show."""
        delta = UNCLAIMED_DELTA if self.run.privacy is None else self.run.privacy.delta
        return _bound(counts.planted, counts.guesses, counts.right, delta)

    @property
    def tests(self) -> tuple[Tested, ...]:
        """The conditions that each signer must have tested, ascending. Canaries are not everybody's."""
        return tuple(name for name in _BY_SITES if name != "canary" and getattr(self.terms, name) is not None)

    def unmet(self, facts: Facts) -> dict[str, str]:
        """Return the conditions that are not met, by name, each with a sentence; none if the candidate may leave."""
        terms, promise, found = self.terms, self.run.privacy, dict[str, str]()
        if promise is not None:
            # A round's end states epsilon with four places, rounded up.
            most = math.ceil(promise.epsilon * 10_000 - 1e-6) / 10_000
            if facts.epsilon is None or facts.epsilon > most:
                spent = "not stated of each site" if facts.epsilon is None else f"{facts.epsilon}"
                found["privacy"] = f"the epsilon that is spent is {spent}, the study promises {promise.epsilon:g}"
        if terms.epsilon is not None:
            if not self._audited(facts):
                found["canary"] = f"no signer has audited {terms.canaries} canaries or more"
            elif facts.bound is not None and facts.bound > terms.epsilon:
                found["canary"] = f"canaries show an epsilon of at least {facts.bound:.4f}, above {terms.epsilon:g}"
        if terms.least is not None and not (facts.quality is not None and facts.quality >= terms.least):
            value = "not measured" if facts.quality is None else f"{facts.quality:.4g}"
            found["quality"] = f"{terms.metric} is {value}, at least {terms.least:g} is needed"
        for condition, sites in facts.failed.items():
            found[condition] = f"failed in the test of {', '.join(sites)}"
        if len(facts.signed) < terms.signatures:
            found["signatures"] = f"{len(facts.signed)} sites have signed, {terms.signatures} are needed"
        return found

    def _audited(self, facts: Facts) -> bool:
        counts = (self.reviews[site].canaries for site in facts.signed)
        return any(each is not None and each.planted >= (self.terms.canaries or 0) for each in counts)

    # The rules of the log

    def leave(self, site: str) -> None:
        """Take note that a site has left the consortium: its signature ends, its refusal stands.

        Whoever joins under its name later has trained nothing of this run, and speaks neither for nor against it.
        """
        self.answered.discard(site)
        if site in self.reviews and self.reviews[site].verdict == "signed":
            del self.reviews[site]

    def review(self, review: EgressReview) -> None:
        """Take a site's review.

        Raises:
            VerificationError: It is of another candidate, too late or too long, the site has spoken or took no part,
                or it signs without the tests that the gate asks for, or against what its canaries show.
        """
        where = f"run {review.run}, review of site {review.site}"
        self._check_candidate(where, review.study, review.adapter)
        if review.site not in self.answered:
            raise VerificationError(f"{where}: the site answered no round of the run, and so reviews nothing of it")
        if self.state(review.time) in ("accepted", "refused") or self.exported:
            raise VerificationError(f"{where}: the candidate was decided about already")
        earlier = self.reviews.get(review.site)
        takes_back = earlier is not None and earlier.verdict == "signed" and review.verdict == "refused"
        if earlier is not None and review.time < earlier.expires and not takes_back:
            raise VerificationError(
                f"{where}: the site has {earlier.verdict} already; a signature may be followed by a refusal alone"
            )
        if review.expires > review.time + self.terms.days * DAY:
            raise VerificationError(f"{where}: the gate lets a review count for at most {self.terms.days} days")
        if review.verdict == "signed":
            lacking = sorted(set(self.tests) - set(review.tested))
            if lacking:
                raise VerificationError(f"{where}: the site signs without a test of {', '.join(lacking)}")
            if review.canaries is not None and self.terms.epsilon is not None:
                bound = self.bound_of(review.canaries)
                if bound > self.terms.epsilon:
                    raise VerificationError(
                        f"{where}: the site signs, though its canaries show an epsilon of at least {bound:.4f}, above "
                        f"{self.terms.epsilon:g}"
                    )
        self.reviews[review.site] = review

    def decide(self, decision: EgressDecision, leaf: int) -> None:
        """Take the coordinator's decision, which has this number in the log.

        Raises:
            VerificationError: It is of another candidate, the candidate was decided about already, a figure is not the
                one that follows from the log, or it accepts what does not meet every condition.
        """
        where = f"run {decision.run}, egress decision"
        self._check_candidate(where, decision.study, decision.adapter)
        state = self.state(decision.time)
        if state in ("accepted", "refused") or self.exported:
            raise VerificationError(f"{where}: the candidate was decided about already; it is {state}")
        facts = self.facts(decision.time)
        for name, found, right in (
            ("epsilon", decision.epsilon, facts.epsilon),
            ("quality", decision.quality, facts.quality),
            ("signed", decision.signed, facts.signed),
            ("refused", decision.refused, facts.refused),
        ):
            if found != right:
                raise VerificationError(f"{where}: {name}: expected {right}, found {found}")
        if not _same_bound(decision.bound, facts.bound):
            raise VerificationError(f"{where}: bound: expected {stated_bound(facts.bound)}, found {decision.bound}")
        unmet = self.unmet(facts)
        if decision.verdict == "accepted":
            if unmet:
                name, why = next(iter(unmet.items()))
                raise VerificationError(f"{where}: it accepts a candidate that fails the condition {name}: {why}")
            if decision.expires != facts.expires:
                raise VerificationError(f"{where}: expires: expected {facts.expires}, found {decision.expires}")
        self.decision, self.decided = decision, leaf

    def _check_candidate(self, where: str, study: str, adapter: str) -> None:
        if self.candidate is None:
            raise VerificationError(f"{where}: the run has not ended, so it has no candidate")
        for what, expected, found in (("study", self.run.study, study), ("adapter", self.candidate, adapter)):
            if expected != found:
                raise VerificationError(f"{where}: digest of the {what}: expected {expected}, found {found}")

    def withheld(self, time: int) -> str:
        """Return why the candidate may not be exported at a time; empty if it may."""
        state = self.state(time)
        if state == "accepted":
            return ""
        run, decision = self.run.run, self.decision
        if state == "refused" and decision is not None:
            return f"the adapter of run {run} was refused at its gate: {decision.reason}"
        if state == "expired":
            return f"the decision that the adapter of run {run} may leave has expired, and it was not released in time"
        if state == "running":
            return f"run {run} has not ended, and its adapter has to pass a gate then"
        return f"the adapter of run {run} is a candidate: no egress decision has accepted it"


_BY_SITES: tuple[Tested, ...] = ("canary", "membership", "repeated")


def quality_of(metrics: Mapping[str, float] | None, metric: str | None) -> float | None:
    """Return the value of a metric that a floor is compared with: of a loss, its negative; None if there is none."""
    value = None if metrics is None or metric is None else metrics.get(metric)
    if value is None or metric is None:
        return None
    return -value if metric.endswith("_loss") else value


@lru_cache(maxsize=256)
def _bound(planted: int, guesses: int, right: int, delta: float) -> float:
    # SciPy takes a third of a second to load, and few logs have a gate.
    from privet.common.privacy.one_run import bound_of_best

    return bound_of_best(planted, guesses, right, delta)


def stated_bound(bound: float | None) -> float | None:
    """Return a bound as a decision states it."""
    return None if bound is None else round(bound, _PLACES)


def _same_bound(stated: float | None, computed: float | None) -> bool:
    """Whether a stated bound is the computed one. Machines may differ in the last digits of what they compute."""
    if stated is None or computed is None:
        return stated is computed
    return stated == stated_bound(stated) and abs(stated - computed) <= _NEAR
