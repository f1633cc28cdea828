"""The studies that the coordinator proposes, as a site may believe them.

The coordinator sends the text of a study. The site computes its digest, and compares it with the `run-open` in the
round log, which the coordinator signed and which this site replays from its first leaf.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from privet.client.network.consortium import ConsortiumClient
from privet.client.network.enrolment import Enrolment
from privet.client.rounds.history import LogCopy
from privet.client.rounds.logbook import COPY, open_witness
from privet.client.site import SiteConfig
from privet.client.trust import read_trusted
from privet.common.clock import now
from privet.common.errors import StateError, StudyError, VerificationError
from privet.common.log.checkpoint import Checkpoint, Policy
from privet.common.log.replay import Replay
from privet.common.pki.enrolment import Proposal
from privet.common.study.study import Study

LEAST_PREFIX = 8
"""Least number of hexadecimal digits of a digest that names a study, for a person who then reads what it asks."""
SURE_PREFIX = 32
"""Digits that name a study where nobody reads it. Fewer can be forged: a study with 8 given digits takes an hour."""
_DIGITS = re.compile(f"[0-9a-f]{{{LEAST_PREFIX},}}")


@dataclass(frozen=True)
class Proposed:
    """A run that the coordinator proposes.

    Attributes:
        run: Its name.
        study: Its study.
        round: Number of rounds that are over, closed or aborted, as the coordinator says.
        ended: Whether it has ended, as the coordinator says.
        logged: Whether the round log opens this run for this very study; False if it does not hold the run yet.
        closed: Number of closed rounds by the round log; None if it does not hold the run yet.
    """

    run: str
    study: Study
    round: int
    ended: bool
    logged: bool
    closed: int | None = None


@dataclass(frozen=True)
class NewestLog:
    """The round log up to its newest checkpoint.

    Attributes:
        newest: That checkpoint.
        policy: Who has to cosign the newest checkpoint that this site cosigned.
        history: The statements, replayed.
    """

    newest: Checkpoint
    policy: Policy
    history: Replay


@dataclass
class LogReader:
    """Reads the round log beyond what this site has cosigned, for an answer to its operator.

    It goes on from the leaves of the site's own copy, and then from those that it has read itself, so only new leaves
    are fetched. All of them are hashed, and must give the root of the checkpoint that the log signed: that proves more
    than a proof of consistency would. The copy's file is only read: the worker of a site that serves adds to it.

    Attributes:
        site: The site.
    """

    site: SiteConfig
    _copy: LogCopy | None = None

    def read(self, service: ConsortiumClient, note: bytes | None = None) -> NewestLog | None:
        """Replay the round log up to its newest checkpoint, against all that this site's operator confirmed.

        Args:
            service: The consortium service.
            note: The newest checkpoint, if the caller has asked for it.

        Returns:
            The log; None while it is empty.

        Raises:
            VerificationError: It is not the log of the charter, or not signed with its present key; or it breaks the
                rules.
            PrivetError: As `ConsortiumClient.call`. StateError: The site's files cannot be read.
        """
        note = service.checkpoint() if note is None else note
        if not note or self.site.trusted is None or self.site.log is None:
            return None
        witness = open_witness(self.site, self.site.log)
        seen, head = witness.last, witness.open(note)[0]
        newest, path = head if head.size > seen.size else seen, self.site.trusted
        copy = self._copy or LogCopy(
            self.site.name,
            self.site.log.state / COPY,
            lambda: read_trusted(path),
            lambda: newest,
            service.leaves,
            writes=False,
        )
        self._copy, copy.newest, copy.fetch = copy, lambda: newest, service.leaves
        return NewestLog(newest, copy.policy(seen if seen.size else newest), copy.history(newest))


def consulted(
    file: Path, config: SiteConfig, clock: Callable[[], datetime], reader: LogReader | None = None
) -> tuple[ConsortiumClient, NewestLog | None]:
    """Return a site's access to the consortium service, and the round log as `LogReader.read`.

    Args:
        file: The site file.
        config: Its content.
        clock: Returns the time.
        reader: Goes on from the leaves that it has read before; None: from the site's own copy.

    Raises:
        StateError: The site is not set up. PrivetError: As `LogReader.read`.
    """
    if config.log is None:
        raise StateError(f"{file} has no [log] table", f"complete the set-up: `privet site setup {file}`")
    service = ConsortiumClient(Enrolment(file.parent), clock)
    return service, (reader or LogReader(config)).read(service)


def proposed_studies(file: Path, config: SiteConfig, clock: Callable[[], datetime] = now) -> Sequence[Proposed]:
    """Return the studies that the coordinator proposes, compared with the round log. Raises as `consulted`."""
    service, log = consulted(file, config, clock)
    return compared(service.proposals(), None if log is None else log.history)


def compared(proposals: Sequence[Proposal], history: Replay | None) -> tuple[Proposed, ...]:
    """Return the proposals with their studies, compared with the round log.

    Raises:
        VerificationError: The log opens a run for another study than the coordinator shows.
        StudyError: A study is not one that this version knows.
    """
    return tuple(_compared(each, history) for each in proposals)


def _compared(proposal: Proposal, history: Replay | None) -> Proposed:
    try:
        study = Study.parse(json.loads(proposal.study))
    except (ValueError, AttributeError, RecursionError, StudyError) as error:
        raise StudyError(
            f"the coordinator proposes run {proposal.run} with a study that this version does not know "
            f"({type(error).__name__})",
            "run the same version of privet at the site and at the coordinator",
        ) from None
    logged = None if history is None else history.runs.get(proposal.run)
    if logged is not None and logged.statement.study != study.digest:
        raise VerificationError(
            f"run {proposal.run}: the coordinator shows study {study.digest}, but the round log opens this run for "
            f"study {logged.statement.study}",
            "approve nothing, and ask the coordinator's operator to explain the difference",
        )
    closed = None if logged is None else len(logged.published)
    return Proposed(proposal.run, study, proposal.round, proposal.ended, logged is not None, closed)


def chosen(proposals: Sequence[Proposed], name: str, *, read: bool = True) -> Proposed:
    """Return the proposal that a run's name or the beginning of a study's digest names.

    Args:
        proposals: All of them.
        name: The name of a run, or digits.
        read: Whether a person reads what the study asks, and confirms it.

    Raises:
        StateError: None of them, or several studies; or nobody reads it, and the name could be another study's, too.
    """
    text = name.removeprefix("sha256:")
    begins = [each for each in proposals if each.study.digest.removeprefix("sha256:").startswith(text)]
    # The coordinator names the runs. One that is called like another study's digest must not pass for that study.
    found = [each for each in proposals if each.run == name] + (begins if len(text) >= LEAST_PREFIX else [])
    if len({each.study.digest for each in found}) != 1:
        several = "several studies" if found else "no study"
        raise StateError(
            f"{name!r}: expected a study file, the name of a run, or at least {LEAST_PREFIX} digits of a study's "
            f"digest; the coordinator proposes {several} of this name",
            "list what is proposed: `privet site studies SITE`",
        )
    sure = found[0] in begins and len(text) >= SURE_PREFIX
    if not read and _DIGITS.fullmatch(text) and not sure:
        raise StateError(
            f"{name!r}: expected at least {SURE_PREFIX} digits of a study's digest where nobody reads the study: "
            "another study, or a run, can be made that fewer digits name as well",
            "name the whole digest, or leave out --yes to read and confirm what the study asks",
        )
    return found[0]
