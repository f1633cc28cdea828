"""Candidates at their gates: given to sites for tests, their reviews, and the coordinator's egress decision.

As with the registry, there is no database that could differ from the log. A review that a site has sent waits in a file
until it is in the log (`privet.server.consortium.waiting`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from privet.common.audit.release import ADAPTER, STUDY
from privet.common.errors import PrivetError, ProtocolError, RefusedError, StateError, StudyError, VerificationError
from privet.common.log.encoding import parse_statement
from privet.common.log.envelope import Envelope
from privet.common.log.gate import Facts, Gate, stated_bound
from privet.common.log.replay import LoggedRun, Replay, admit
from privet.common.log.statements import EgressDecision, EgressReview
from privet.common.pki.certificates import SKEW
from privet.common.pki.enrolment import ReleasedReply, ReleasedRequest
from privet.server.consortium.coordinator import Coordinator
from privet.server.consortium.registry import history_in, logged_history
from privet.server.consortium.releases import part_of
from privet.server.consortium.waiting import Waiting
from privet.server.log.journal import Journal
from privet.server.log.logfile import LogFile
from privet.server.rounds.state import RunDirectory

_FILES: Mapping[str, str] = {STUDY: STUDY, ADAPTER: f"adapter/{ADAPTER}"}
"""The files of a candidate, and where a run directory has them."""


@dataclass(frozen=True)
class Candidate:
    """A run with a gate, as the log and the waiting reviews have it at a time.

    Attributes:
        run: Its name.
        gate: The gate.
        facts: What the reviews and rounds say.
        time: Unix seconds.
    """

    run: str
    gate: Gate
    facts: Facts
    time: int

    @property
    def unmet(self) -> dict[str, str]:
        """The conditions that are not met, by name."""
        return self.gate.unmet(self.facts)

    def document(self) -> dict[str, Any]:
        """Return it as JSON."""
        reviews = [
            {
                "site": site,
                "verdict": each.verdict,
                "tested": list(each.tested),
                "failed": list(each.failed),
                "reason": each.reason,
                "expires": each.expires,
            }
            for site, each in sorted(self.gate.reviews.items())
        ]
        decision = self.gate.decision
        return {
            "run": self.run,
            "study": self.gate.run.study,
            "adapter": self.gate.candidate,
            "state": "released" if self.gate.exported else self.gate.state(self.time),
            "epsilon": self.facts.epsilon,
            "bound": stated_bound(self.facts.bound),
            "quality": self.facts.quality,
            "signatures": {"needed": self.gate.terms.signatures, "signed": list(self.facts.signed)},
            "unmet": self.unmet,
            "reviews": reviews,
            "reason": "" if decision is None else decision.reason,
            "expires": None if decision is None else decision.expires,
        }


def candidates(made: Coordinator, now: datetime) -> tuple[Candidate, ...]:
    """Return the runs with a gate, newest first. Raises as `logged_history`; StateError: A review cannot be read."""
    history = _with_waiting(made)
    return tuple(_candidate(run, now) for run in reversed(history.runs.values()) if run.gate is not None)


def candidate_of(made: Coordinator, name: str, now: datetime) -> Candidate:
    """Return a run with a gate. Raises as `candidates`; StateError: There is no such run, or it has no gate."""
    return _candidate(_gated(_with_waiting(made), name), now)


def _gated(history: Replay, name: str) -> LoggedRun:
    run = history.runs.get(name)
    if run is None or run.gate is None:
        have = ", ".join(each for each, found in history.runs.items() if found.gate is not None)
        raise StateError(
            f"the round log has no run {name} whose study has a gate; such runs: {have or 'none'}",
            "list them: `privet gate status`",
        )
    return run


def _candidate(run: LoggedRun, now: datetime) -> Candidate:
    time, gate = int(now.timestamp()), run.gate
    if gate is None:
        raise StateError(f"run {run.statement.run} has no gate", "list those that have one: `privet gate status`")
    return Candidate(run.statement.run, gate, gate.facts(time), time)


def candidate_part(made: Coordinator, site: str, asked: ReleasedRequest) -> ReleasedReply:
    """Return a part of a file of a candidate, for the tests of a site that took part.

    Raises:
        RefusedError: There is no such candidate, it was refused, or the site answered no round. All have one text.
    """
    refused = RefusedError(
        f"run {asked.run} has no candidate, or none for site {site}",
        "a candidate is for the sites that took part, until it is refused: `privet site adapters SITE` lists them",
    )
    folder = made.directory / "runs" / asked.run
    if site not in _testers(made.log_directory, LogFile(made.log_directory).size()).get(asked.run, ()):
        raise refused
    if asked.file not in _FILES or not folder.is_dir() or RunDirectory.open(folder).withdrawn is not None:
        raise refused
    try:
        return part_of(folder / _FILES[asked.file], asked.first)
    except OSError:
        raise refused from None


@lru_cache(maxsize=4)
def _testers(log: Path, size: int) -> Mapping[str, frozenset[str]]:
    """Return by run the sites that may test its candidate, as a log of `size` leaves has it. Asked for each part."""
    return {
        name: frozenset(run.gate.answered)
        for name, run in history_in(log).runs.items()
        if run.gate is not None
        and run.gate.candidate is not None
        and not run.gate.exported
        and (run.gate.decision is None or run.gate.decision.verdict == "accepted")
    }


def keep_review(made: Coordinator, site: str, data: bytes, now: datetime) -> EgressReview:
    """Keep a site's review for the log. It is durable on return; the same review, sent twice, is kept once.

    Args:
        made: The coordinator.
        site: The site that sends it.
        data: Its signed statement.
        now: The present time.

    Raises:
        RefusedError: The rules of the log do not allow it, it is of another site, or of another time: it counts from
            its time on.
        ProtocolError: It is no such statement. StateError: It cannot be stored.
    """
    review = _review_in(data)
    if review.site != site:
        raise RefusedError(f"site {site} sent a review of site {review.site}", "each site sends its own")
    if abs(review.time - now.timestamp()) > SKEW.total_seconds():
        raise RefusedError("the review's time is too far from the service's clock", "set both clocks, then try again")
    name, waiting = f"{review.time:012d}.{site}.{review.run}", _reviews(made)
    if waiting.holds(name, data):
        return review
    # The log is replayed for a review, so not for those who have nothing to review.
    if site not in _testers(made.log_directory, LogFile(made.log_directory).size()).get(review.run, ()):
        raise RefusedError(
            f"run {review.run} has no candidate that site {site} may review: it took no part, or it was decided about",
            "see where the candidate is: `privet site adapters SITE`",
        )
    history = _with_waiting(made)
    try:
        _admit(history, made, data)
    except VerificationError as error:
        raise RefusedError(
            error.message, error.hint or "see where the candidate is: `privet site adapters SITE`"
        ) from None
    waiting.keep(name, data)
    return review


def log_reviews(made: Coordinator, journal: Journal) -> int:
    """Write the waiting reviews into the round log, as far as its rules still allow. Returns how many were waiting.

    Raises:
        StateError: The log or a review's file could not be written.
    """

    def say(data: bytes) -> bool:
        review = _review_in(data)
        run = journal.history.runs.get(review.run)
        if run is not None and run.gate is not None and run.gate.reviews.get(review.site) == review:
            return True
        try:
            journal.hear(data, review.site)
        except (VerificationError, ProtocolError):
            return False  # another statement came first, such as a decision: who sent it sees that in the log
        return True

    return _reviews(made).settle(journal, say)


def decide_egress(
    made: Coordinator, journal: Journal, name: str, verdict: Literal["accepted", "refused"], reason: str, now: datetime
) -> EgressDecision:
    """Decide whether a candidate may leave, after writing the waiting reviews into the log. Durable on return.

    Args:
        made: The coordinator.
        journal: The round log.
        name: The run.
        verdict: The decision.
        reason: Why it is refused. The round log shows it to all sites.
        now: The present time.

    Raises:
        StateError: There is no such run, it has not ended, or the log cannot be written.
        RefusedError: It was decided already, or it is to be accepted and does not meet every condition.
        StudyError: The reason has other characters than printable ASCII, or is too long.
    """
    log_reviews(made, journal)
    found = _candidate(_gated(journal.history, name), now)
    gate, facts, state = found.gate, found.facts, found.gate.state(found.time)
    if gate.candidate is None:
        raise StateError(
            f"run {name} has not ended, so it has no candidate", f"wait, or `privet coordinator resume {name}`"
        )
    if gate.exported or state in ("accepted", "refused"):
        raise RefusedError(
            f"the candidate of run {name} was decided about already: it is {'released' if gate.exported else state}",
            f"`privet gate status {name}` says why"
            + (f"; release it: `privet coordinator resume {name}`" if state == "accepted" else ""),
        )
    if verdict == "accepted" and found.unmet:
        reasons = "".join(f"\n  {condition}: {why}" for condition, why in found.unmet.items())
        raise RefusedError(
            f"the candidate of run {name} does not meet every condition of its gate:{reasons}",
            "sites test and sign it: `privet gate test SITE RUN`, `privet gate sign SITE RUN`; or refuse it: "
            f"`privet gate decide {name} --refuse REASON`",
        )
    try:
        decision = EgressDecision(
            time=found.time,
            run=name,
            study=gate.run.study,
            adapter=gate.candidate,
            verdict=verdict,
            epsilon=facts.epsilon,
            bound=stated_bound(facts.bound),
            quality=facts.quality,
            signed=facts.signed,
            refused=facts.refused,
            reason=reason,
            expires=facts.expires if verdict == "accepted" else None,
        )
    except ValidationError:
        raise StudyError(
            "--refuse: expected 1 to 300 printable ASCII characters", "write such a reason in one line"
        ) from None
    journal.say(decision)
    journal.sign_head()
    return decision


def _reviews(made: Coordinator) -> Waiting[bytes]:
    """Return the reviews that are not known to be in the log, oldest first, as their sites signed them."""

    def read(data: bytes) -> bytes:
        _review_in(data)
        return data

    return Waiting(made.directory / "reviews", read, "mend the disk, or let the site send its review again")


def _with_waiting(made: Coordinator) -> Replay:
    """Return the history of the log, and of the waiting reviews as if they were in it."""
    history = logged_history(made)
    for _, data in _reviews(made).all():
        try:
            _admit(history, made, data)
        except PrivetError:  # it is in the log, or comes too late
            continue
    return history


def _admit(history: Replay, made: Coordinator, data: bytes) -> None:
    # No review quotes a root, so none is computed.
    admit(history, LogFile(made.log_directory).size(), data, lambda size: b"")


def _review_in(data: bytes) -> EgressReview:
    statement = parse_statement(Envelope.decode(data).payload)
    if not isinstance(statement, EgressReview):
        raise ProtocolError(
            f"a review of a candidate must be a statement of type egress-review, found type {statement.type}",
            "run the same version of privet at the site and at the coordinator",
        )
    return statement
