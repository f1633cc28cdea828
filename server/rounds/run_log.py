"""A run's place in the round log: which statements are written about it, and in which order.

The order within a run, each step durable before the next::

    run-open
    round-open  ->  a quorum cosigns it and all before it  ->  the result of the last round is published
                ->  the round is run; the sites' statements are appended as they arrive
                ->  the run's state is stored  ->  round-close, or round-abort
    a quorum cosigns the end  ->  the adapter is published

Where the study has a gate, the run ends before its `export`, with a candidate. It goes on when an egress decision has
accepted that (`privet.server.consortium.candidates`).

After a crash at any point, `RunLog.settle` makes log and state agree again. If the state has the end of a round and
the log does not, the end is logged. If a round is still open, it is aborted where a quorum has cosigned it, since it
may have reached sites; before that it has reached no site, and is run. A simulation always runs it: its sites give the
same answers again.

`Unlogged` has the same methods for a run without a log: tests, and the baselines of simulations.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from privet.common.audit.bundle import SOFTWARE
from privet.common.canonical import canonical_json
from privet.common.errors import StateError, TooFewSitesError
from privet.common.files import staged, write_durably
from privet.common.log.agreement import RoundStatement, check_leaf_size, round_ended, round_opened, run_opened, software
from privet.common.log.replay import LoggedRun
from privet.common.log.statements import Export
from privet.common.log.statements import RoundOpened as OpenedStatement
from privet.common.study.counts import cells_of
from privet.common.study.messages import Consent, Failure, RoundOpen
from privet.server.exchange import Exchange
from privet.server.log.journal import Journal, Listening
from privet.server.rounds.participants import Participant
from privet.server.rounds.release import digests_of, release_files
from privet.server.rounds.state import TAKEN, RunDirectory, RunState

GiveUp = Callable[[RunState, RoundOpen], RunState]
"""Returns the state after a round during which the coordinator was stopped."""

RELEASE = "release"
"""In a run directory: the files of the release."""
# Seconds: between two requests for cosignatures, and what one may take.
_PAUSE = 0.5
_ATTEMPT = 10.0
_RESTORE = "restore the newest backup of both the run directory and the log; a state older than its log cannot be used"
_ONLINE = "start the missing sites, then resume the run"


@dataclass
class RunLog:
    """A run in the round log.

    Attributes:
        journal: The round log.
        run: The run's directory.
        name: Its name in the log.
        public: Directory where the log is published as files.
        keep_in_step: Called before each round, to log decisions about members.
    """

    journal: Journal
    run: RunDirectory
    name: str
    public: Path
    keep_in_step: Callable[[], None] = lambda: None

    @property
    def entry(self) -> LoggedRun:
        """The log's statements about the run, replayed."""
        return self.journal.history.runs[self.name]

    @property
    def keys(self) -> dict[str, str]:
        """Public keys of the consortium's sites by name, in hexadecimal: only these sites take part."""
        return {name: member.key for name, member in self.journal.history.members.items()}

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the consortium's sites."""
        return tuple(sorted(self.journal.history.members))

    def admits(self, consent: Consent) -> bool:
        """Whether a member of the consortium has this name and this identity key."""
        member = self.journal.history.members.get(consent.site)
        return member is not None and member.key == consent.identity

    def listening(self, exchange: Exchange) -> Exchange:
        """Return the exchange to offer the study over: it enters refusals in the log."""
        return Listening(exchange, self.journal)

    def settle(self, state: RunState, give_up: GiveUp) -> RunState:
        """Make log and state agree, and return the state to continue from.

        Raises:
            StateError: One of the two is older than the other, or the log has another run of this name.
        """
        study = self.run.study
        if self.name not in self.journal.history.runs and not state.statements:
            # The file first: the log's statement holds its digest, and an auditor needs what the digest is of.
            write_durably(self.run.path / SOFTWARE, canonical_json(software()))
            self.journal.say(run_opened(self.name, study, state.adapter.digest, self.journal.clock()))
            self.journal.flush()
            return state
        if self.name not in self.journal.history.runs or self.entry.statement.study != study.digest:
            raise StateError(
                f"the round log has no run of this study with the name {self.name}",
                "check the directories of run and log; `privet audit show BUNDLE --policy FILE` lists the log's runs",
            )
        if self.entry.open is not None:
            left = self.entry.rounds[self.entry.open].statement
            # The nonce, not the number: a plain round that was given up is opened again under the same number.
            ended = bool(state.statements) and state.statements[-1]["nonce"] == left.nonce
            if ended:
                self.close(state)
            elif self._reached() and not self.run.simulated:
                state = self.give_up(state, give_up)
        entry = self.entry
        # Never continue from a restored backup: sites would train a round again that the log already has.
        # A state that counts an aborted plain round has given its number up.
        numbers = (entry.next, entry.next + 1) if entry.skips else (entry.next,)
        if entry.adapter != state.adapter.digest or state.round + 1 not in numbers:
            raise StateError(
                f"run {self.name}: the run directory and the round log do not fit: the saved state ends with round "
                f"{state.round}, the log's next round is {entry.next}, or their adapters differ",
                _RESTORE,
            )
        return state

    def _reached(self) -> bool:
        """Whether sites may have received the request for the round that is open."""
        opened = self.entry.open
        # Once cosigned, it may have been sent; a site's logged answer proves that it was.
        return opened is not None and (self.journal.accepts(opened) or bool(self.entry.rounds[opened].answered))

    @property
    def left(self) -> OpenedStatement | None:
        """The round that the log has open."""
        return None if self.entry.open is None else self.entry.rounds[self.entry.open].statement

    def give_up(self, state: RunState, give_up: GiveUp) -> RunState:
        """Abort the round that the log has open, and return the state after it.

        Raises:
            StateError: The open round does not follow the state.
        """
        left = self.left
        if left is None or (left.round, left.adapter) != (state.round + 1, state.adapter.digest):
            raise StateError(
                f"run {self.name}: the round that is open in the round log does not follow the saved state",
                _RESTORE,
            )
        document = self.run.study.document()
        opened = RoundOpen(document, left.round, left.nonce, left.adapter, left.cohort, state.adapter.data)
        after = give_up(state, opened)
        if self.run.study.secure_aggregation.mode == "masked":
            # A site masks one update a round only, so the number is used up: the state counts the round.
            self.run.store(after)
            self.close(after)
            return after
        # Without masks the same round is opened again, so the state must not count it.
        self._say_end(after.statements[-1], ended=False)
        return state

    def open(
        self, exchange: Exchange, participants: Mapping[str, Participant], opened: RoundOpen, timeout: float
    ) -> Exchange:
        """Log a round, unless it is open already; once a quorum has cosigned it, return the exchange to run it over.

        Raises:
            TooFewSitesError: Too few sites cosigned within `timeout` seconds. The run can be resumed.
            StateError: The log cannot be written.
            StudyError: The cohort, or the counts of a study that counts, are too many for a leaf of the log.
        """
        leaf = self.entry.open
        if leaf is None:
            # Under privacy the round's end names every site that was ever asked, with its epsilon: check now that it
            # will fit, because a round that is open has to be ended.
            asked = {site for each in self.entry.rounds.values() for site in each.statement.cohort} | {*opened.cohort}
            charged, hybrid = asked if self.run.study.private else (), self.journal.keys.pq is not None
            counts = cells_of(self.run.study).names if self.run.study.counts else ()
            check_leaf_size(opened.cohort, charged, participants, hybrid=hybrid, counts=counts)
            masked = self.run.study.secure_aggregation.mode == "masked"
            keys = {name: self.keys[name] for name in opened.cohort} if masked else None
            leaf = self.journal.say(round_opened(self.name, opened, keys, self.journal.clock(), participants))
        self.witness(exchange, participants, timeout)
        names = {participant.node: name for name, participant in participants.items()}
        return Listening(exchange, self.journal, names, leaf, self.journal.evidence(self.name, leaf))

    def witness(self, exchange: Exchange, participants: Mapping[str, Participant], timeout: float) -> None:
        """Wait until a quorum has cosigned the log as it is now.

        Raises:
            TooFewSitesError: No quorum did within `timeout` seconds.
            StateError: The log cannot be written.
        """
        deadline = time.monotonic() + timeout
        nodes = {name: participant.node for name, participant in participants.items()}
        while True:
            # Short attempts: a site that has just gone offline must not delay the others, which may be a quorum.
            left = min(max(deadline - time.monotonic(), _PAUSE), _ATTEMPT)
            failures = self.journal.witness(exchange, nodes, left)
            if self.journal.witnessed:
                return
            if time.monotonic() >= deadline:
                raise _unwitnessed(self.journal, failures)
            time.sleep(_PAUSE)

    def close(self, state: RunState) -> None:
        """Log the end of the state's last round: durable on return."""
        self._say_end(state.statements[-1], ended=state.stopped)

    def _say_end(self, statement: RoundStatement, *, ended: bool) -> None:
        if self.entry.open is None:
            raise StateError(
                f"run {self.name}: the state in the run directory ends a round, but no round is open in the round log",
                _RESTORE,
            )
        self.journal.say(round_ended(self.name, self.entry.open, statement, ended, self.journal.clock()))
        self.journal.flush()

    def publish(self, state: RunState) -> None:
        """Publish what a quorum has cosigned: the log's files, and the run's files for readers."""
        # The log first: every published statement can then be looked up in it.
        self.journal.publish(self.public)
        self.run.publish(state, every=True)

    @property
    def released(self) -> bool:
        """Whether a quorum has cosigned the end of the run, as far as its gate lets it go."""
        named = self.journal.exported(self.name) is not None or not self.entry.published or bool(self.withheld)
        return named and self.journal.witnessed and not self._staged.exists()

    def release(
        self, exchange: Exchange, participants: Mapping[str, Participant], state: RunState, timeout: float
    ) -> None:
        """Publish the result of a run, once a quorum has cosigned it. Raises as `witness`."""
        if self.entry.published and self.journal.exported(self.name) is None and not self.withheld:
            self._export(state)
        self.witness(exchange, participants, timeout)
        self.publish(state)
        # The rename comes last: a release that exists is in a published log that a quorum has cosigned.
        if self._staged.exists():
            self._staged.rename(self.run.path / RELEASE)

    @property
    def withheld(self) -> str:
        """Why the gate of the study withholds the adapter now; empty if it does not, or there is none."""
        gate = self.entry.gate
        return "" if gate is None or gate.exported else gate.withheld(self.journal.clock())

    @property
    def _staged(self) -> Path:
        return self.run.path / f".{RELEASE}.next"

    def _export(self, state: RunState) -> None:
        """Make the files of the release durable, then log their digests."""
        # In this order, because an ECDSA signature differs each time it is made: files that were lost after their
        # digests were logged could not be made again.
        shutil.rmtree(self._staged, ignore_errors=True)
        gate = self.entry.gate
        egress = None if gate is None else self.journal.leaf_at(gate.decided)
        files = release_files(self.run, state, self.name, self.journal.keys.release, egress)
        with staged(self._staged, TAKEN) as directory:
            for name, data in files.items():
                write_durably(directory / name, data)
        last = max(self.entry.published)
        export = Export(
            time=self.journal.clock(),
            run=self.name,
            round=last,
            adapter=self.entry.published[last],
            files=digests_of(files),
        )
        self.journal.say(export)


@dataclass
class Unlogged:
    """A run without a round log. It has the methods of `RunLog`; any site may take part, and each round is published.

    Attributes:
        run: The run's directory.
    """

    run: RunDirectory
    name: ClassVar[str] = ""
    left: ClassVar[None] = None
    released: ClassVar[bool] = True
    members: ClassVar[tuple[str, ...]] = ()

    def keep_in_step(self) -> None:
        """Do nothing: there are no members."""

    def admits(self, consent: Consent) -> bool:
        """Admit every site."""
        return True

    def listening(self, exchange: Exchange) -> Exchange:
        """Return the exchange as it is."""
        return exchange

    def settle(self, state: RunState, give_up: GiveUp) -> RunState:
        """Publish the state again, as a crash may have left some of its files unwritten; return it."""
        self.run.publish(state, every=True)
        return state

    def give_up(self, state: RunState, give_up: GiveUp) -> RunState:
        """Return the state: no round is ever left open."""
        return state

    def open(
        self, exchange: Exchange, participants: Mapping[str, Participant], opened: RoundOpen, timeout: float
    ) -> Exchange:
        """Return the exchange as it is."""
        return exchange

    def publish(self, state: RunState) -> None:
        """Do nothing: `close` has published the state."""

    def close(self, state: RunState) -> None:
        """Publish the state's last round."""
        self.run.publish(state, every=False)

    def release(
        self, exchange: Exchange, participants: Mapping[str, Participant], state: RunState, timeout: float
    ) -> None:
        """Do nothing: a release names leaves of a log."""


def _unwitnessed(journal: Journal, failures: Mapping[str, Failure]) -> TooFewSitesError:
    policy = journal.policy
    return TooFewSitesError(
        f"the round log needs cosignatures of {policy.needed} of its {len(policy.witnesses)} witnesses (sites), and "
        "they did not arrive in time" + "".join(f"\n  {site}: {failure}" for site, failure in failures.items()),
        next((failure.hint for failure in failures.values() if failure.hint), _ONLINE),
    )
