"""A run's place in the round log: what is said of it, and when.

The order within a run, each step durable before the next::

    run-open
    round-open  ->  a quorum cosigns it and all before it  ->  what the last round gave is published
                ->  the round is played; what sites state of it is appended as it comes
                ->  the run's state is stored  ->  round-close, or round-abort
    a quorum cosigns the end  ->  the adapter is published

Killed anywhere, `Record.settle` brings log and state together again. A round that the state holds and the log does
not is closed there. One that was left open is aborted if a quorum has cosigned it, as it may have reached sites;
before that it has reached nobody, and is played. So is any round of a simulation, whose sites do the same again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from privet.common.audit.bundle import SOFTWARE
from privet.common.audit.replay import LoggedRun
from privet.common.canonical import canonical_json
from privet.common.errors import StateError, TooFewSitesError
from privet.common.files import write_durably
from privet.common.log.agreement import RoundStatement, check_leaf_size, round_ended, round_opened, run_opened, software
from privet.common.log.statements import Export
from privet.common.log.statements import RoundOpened as OpenedStatement
from privet.common.study.messages import Failure, RoundOpen
from privet.server.exchange import Exchange
from privet.server.log.journal import Journal, Listening
from privet.server.rounds.participants import Participant
from privet.server.rounds.release import digests_of, release_files
from privet.server.rounds.state import RunDirectory, RunState, staged

GiveUp = Callable[[RunState, RoundOpen], RunState]
"""Returns the state after a round that the coordinator was stopped in."""

RELEASE = "release"
"""In a run directory: the files of the release."""
_PAUSE = 0.5
_ATTEMPT = 10.0
_RESTORE = "restore the newest copy of both; a run never goes back behind its log"


@dataclass
class RunLog:
    """A run in a log.

    Attributes:
        journal: The log.
        run: The run's directory.
        name: Its name in the log.
        public: Where the log is published as files.
        keep_in_step: Called before each round, to log what was decided about members.
    """

    journal: Journal
    run: RunDirectory
    name: str
    public: Path
    keep_in_step: Callable[[], None] = lambda: None

    @property
    def entry(self) -> LoggedRun:
        """What the log says of the run."""
        return self.journal.history.runs[self.name]

    @property
    def keys(self) -> dict[str, str]:
        """Public keys of the consortium's sites by name, in hexadecimal: nobody else takes part."""
        return {name: member.key for name, member in self.journal.history.members.items()}

    def settle(self, state: RunState, give_up: GiveUp) -> RunState:
        """Bring log and state together, and return the state to go on from.

        Raises:
            StateError: One of the two is older than the other, or the log has another run of this name.
        """
        study = self.run.study
        if self.name not in self.journal.history.runs and not state.statements:
            write_durably(self.run.path / SOFTWARE, canonical_json(software()))
            self.journal.say(run_opened(self.name, study, state.adapter.digest, self.journal.clock()))
            self.journal.flush()
            return state
        if self.name not in self.journal.history.runs or self.entry.statement.study != study.digest:
            raise StateError(f"the log does not have this run under the name {self.name}", "see `privet audit show`")
        if self.entry.open is not None:
            left = self.entry.rounds[self.entry.open].statement
            ended = bool(state.statements) and state.statements[-1]["nonce"] == left.nonce
            if ended:
                self.close(state)
            elif self._reached() and not self.run.simulated:
                state = self.give_up(state, give_up)
        entry = self.entry
        if (entry.adapter, entry.next) != (state.adapter.digest, state.round + 1):
            raise StateError(
                f"run {self.name}: the state stands after round {state.round}, the log before round {entry.next}, "
                "or they have two adapters",
                _RESTORE,
            )
        return state

    def _reached(self) -> bool:
        """Whether sites may have been asked into the round that is open."""
        opened = self.entry.open
        return opened is not None and (self.journal.accepts(opened) or bool(self.entry.rounds[opened].answered))

    @property
    def left(self) -> OpenedStatement | None:
        """The round that the log has open."""
        return None if self.entry.open is None else self.entry.rounds[self.entry.open].statement

    def give_up(self, state: RunState, give_up: GiveUp) -> RunState:
        """Abort the round that the log has open, and return the state after it.

        Raises:
            StateError: The state stands elsewhere than the log.
        """
        left = self.left
        if left is None or (left.round, left.adapter) != (state.round + 1, state.adapter.digest):
            raise StateError(f"run {self.name}: the log has another round open than the state goes on with", _RESTORE)
        document = self.run.study.document()
        opened = RoundOpen(document, left.round, left.nonce, left.adapter, left.cohort, state.adapter.data)
        after = give_up(state, opened)
        if self.run.study.secure_aggregation.mode == "masked":
            self.run.store(after)
            self.close(after)
            return after
        self._say_end(after.statements[-1], ended=False)
        return state

    def open(
        self, exchange: Exchange, members: Mapping[str, Participant], opened: RoundOpen, timeout: float
    ) -> Listening:
        """Log a round, unless it is open already; once a quorum has cosigned it, return the exchange to play it over.

        Raises:
            TooFewSitesError: Too few sites cosigned within `timeout` seconds. The run can be resumed.
            StateError: The log cannot be written.
            StudyError: The cohort is too large for a leaf of the log.
        """
        leaf = self.entry.open
        if leaf is None:
            asked = {site for each in self.entry.rounds.values() for site in each.statement.cohort} | {*opened.cohort}
            check_leaf_size(opened.cohort, asked if self.run.study.private else ())
            masked = self.run.study.secure_aggregation.mode == "masked"
            keys = {name: self.keys[name] for name in opened.cohort} if masked else None
            leaf = self.journal.say(round_opened(self.name, opened, keys, self.journal.clock()))
        self.witness(exchange, members, timeout)
        names = {member.node: name for name, member in members.items()}
        return Listening(exchange, self.journal, names, leaf, self.journal.evidence(self.name, leaf))

    def witness(self, exchange: Exchange, members: Mapping[str, Participant], timeout: float) -> None:
        """Wait until a quorum has cosigned the log as it stands.

        Raises:
            TooFewSitesError: None did within `timeout` seconds.
            StateError: The log cannot be written.
        """
        deadline = time.monotonic() + timeout
        nodes = {name: member.node for name, member in members.items()}
        while True:
            # A site that is gone, and not yet known to be, is not worth waiting for where the others are enough.
            left = min(max(deadline - time.monotonic(), _PAUSE), _ATTEMPT)
            failures = self.journal.witness(exchange, nodes, left)
            if self.journal.witnessed:
                return
            if time.monotonic() >= deadline:
                raise _unwitnessed(self.journal, failures)
            time.sleep(_PAUSE)

    def close(self, state: RunState) -> None:
        """Log the end of the round that the state holds last: durable on return."""
        self._say_end(state.statements[-1], ended=state.stopped)

    def _say_end(self, statement: RoundStatement, *, ended: bool) -> None:
        if self.entry.open is None:
            raise StateError(f"run {self.name}: the log has no round open", _RESTORE)
        self.journal.say(round_ended(self.name, self.entry.open, statement, ended, self.journal.clock()))
        self.journal.flush()

    def publish(self, state: RunState) -> None:
        """Publish what a quorum has cosigned: the log's files, and what readers use of the run."""
        self.journal.publish(self.public)
        self.run.publish(state, every=True)

    @property
    def released(self) -> bool:
        """Whether a quorum has cosigned the end of the run."""
        named = self.journal.exported(self.name) is not None or not self.entry.published
        return named and self.journal.witnessed and not self._staged.exists()

    def release(self, exchange: Exchange, members: Mapping[str, Participant], state: RunState, timeout: float) -> None:
        """Publish what a run has come to, once a quorum has cosigned it. Raises as `witness`."""
        if self.entry.published and self.journal.exported(self.name) is None:
            self._export(state)
        self.witness(exchange, members, timeout)
        self.publish(state)
        if self._staged.exists():
            self._staged.rename(self.run.path / RELEASE)

    @property
    def _staged(self) -> Path:
        return self.run.path / f".{RELEASE}.next"

    def _export(self, state: RunState) -> None:
        """Make the files of the release durable, then log their digests: a signature is not made twice alike."""
        shutil.rmtree(self._staged, ignore_errors=True)
        files = release_files(self.run, state, self.name, self.journal.keys.release)
        with staged(self._staged) as directory:
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


def _unwitnessed(journal: Journal, failures: Mapping[str, Failure]) -> TooFewSitesError:
    policy = journal.policy
    return TooFewSitesError(
        f"the log waits for {policy.needed} cosignatures of its {len(policy.witnesses)} witnesses"
        + "".join(f"\n  {site}: {failure}" for site, failure in failures.items()),
        next((failure.hint for failure in failures.values() if failure.hint), "resume the run when more are online"),
    )
