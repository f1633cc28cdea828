"""The registry of released adapters: what the round log and run directories say of each, and what is decided of it.

The registry has no database of its own, which could differ from the log: which adapters were released, from which
adapter each began and what became of it are leaves. A decision waits in a file until it is in the log
(`privet.server.consortium.waiting`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from privet.common.audit.egress import check_logged, check_origin
from privet.common.audit.verify import Tree
from privet.common.canonical import canonical_json
from privet.common.clock import now
from privet.common.errors import PrivetError, StateError, StudyError
from privet.common.log.merkle import leaf_hash
from privet.common.log.replay import STATES, LoggedRun, Released, Replay, admit
from privet.common.log.statements import AdapterState
from privet.server.consortium.coordinator import Coordinator
from privet.server.consortium.waiting import Waiting
from privet.server.log.journal import Journal
from privet.server.log.logfile import LogFile
from privet.server.rounds.state import RunDirectory

_LEAVES, _BYTES = 4096, 1 << 24
Decision = Literal["superseded", "retired", "revoked"]


@dataclass(frozen=True)
class Entry:
    """A released adapter.

    Attributes:
        run: The run that released it, as the log has it.
        released: The release.
        parent: The run whose release it began from; None if it began from the base.
        decided: What is decided about it and not in the log yet.
        study: Name of the study; empty if the run's directory cannot be read.
        metrics: What the sites measured together, with noise, in the last round.
        spent: Most epsilon that a site has spent in the run; None if it is not private.
        tainted: The nearest run that it continues, directly or not, whose release is revoked; None if there is none.
    """

    run: LoggedRun
    released: Released
    parent: str | None
    decided: AdapterState | None = None
    study: str = ""
    metrics: dict[str, float] | None = None
    spent: float | None = None
    tainted: str | None = None

    @property
    def name(self) -> str:
        """The run's name."""
        return self.run.statement.run

    @property
    def change(self) -> AdapterState | None:
        """What became of it, also where the log does not have it yet."""
        return self.decided or self.released.change

    @property
    def state(self) -> str:
        """Its state: one of `privet.common.log.replay.STATES`."""
        return STATES[0] if self.change is None else self.change.state

    def document(self) -> dict[str, Any]:
        """Return the entry as JSON."""
        privacy, change = self.run.statement.privacy, self.change
        return {
            "run": self.name,
            "study": self.study,
            "study_digest": self.run.statement.study,
            "round": self.released.statement.round,
            "adapter": self.released.statement.adapter,
            "released": self.released.statement.time,
            "leaf": self.released.index,
            "parent": self.parent,
            "revoked_origin": self.tainted,
            "state": self.state,
            "logged": self.decided is None,
            "by": None if change is None else change.by,
            "reason": "" if change is None else change.reason,
            "epsilon": None if privacy is None else privacy.epsilon,
            "spent": self.spent,
            "metrics": self.metrics,
        }


def logged_history(made: Coordinator) -> Replay:
    """Replay the round log, also while another process has it open.

    Raises:
        StateError: The log cannot be read. VerificationError: It breaks the rules.
    """
    return history_in(made.log_directory)


def history_in(directory: Path) -> Replay:
    """Replay the round log in a directory. Raises as `logged_history`."""
    log, history, tree = LogFile(directory), Replay(), Tree()
    size = log.size()
    while (at := tree.frontier.size) < size:
        for index, data in enumerate(log.leaves(at, min(_LEAVES, size - at), _BYTES), start=at):
            admit(history, index, data, tree.root_at)
            tree.append(leaf_hash(data))
    return history


def entries(made: Coordinator) -> tuple[Entry, ...]:
    """Return the releases of all runs, newest first. Raises as `logged_history`."""
    return tuple(_told(entry, made.directory / "runs" / entry.name) for entry in _decided(made, logged_history(made)))


def _decided(made: Coordinator, history: Replay) -> tuple[Entry, ...]:
    """Return the entries as far as log and decisions tell them. No run's state is read, which holds whole adapters."""
    waiting = sorted((change for _, change in _decisions(made).all()), key=_place)
    owners = {each.statement.adapter: name for name, run in history.runs.items() for each in run.releases}
    found = []
    for name, run in history.runs.items():
        for each in run.releases[-1:]:
            decided = [change for change in waiting if (change.run, change.adapter) == (name, each.statement.adapter)]
            found.append(Entry(run, each, owners.get(run.statement.adapter), decided[-1] if decided else None))
    runs = {entry.name: entry for entry in found}
    found = [replace(entry, tainted=_tainted(entry, runs)) for entry in found]
    return tuple(sorted(found, key=lambda entry: -entry.released.index))


def _tainted(entry: Entry, runs: Mapping[str, Entry]) -> str | None:
    # A run begins from an earlier release, so the chain ends; `seen` holds if a log says otherwise.
    seen, parent = {entry.name}, entry.parent
    while parent is not None and parent not in seen:
        if runs[parent].state == "revoked":
            return parent
        seen.add(parent)
        parent = runs[parent].parent
    return None


def descendants(made: Coordinator, name: str) -> tuple[str, ...]:
    """Return the runs that continue from a run's release, directly or not, in the order of the log.

    Runs without a release are among them. Raises as `logged_history`.
    """
    runs = logged_history(made).runs
    family, adapters = [], {each.statement.adapter for each in runs[name].releases}
    for run, each in runs.items():  # a run is opened after the release that it begins from
        if run != name and each.statement.adapter in adapters:
            family.append(run)
            adapters |= {release.statement.adapter for release in each.releases}
    return tuple(family)


def entry_of(made: Coordinator, name: str) -> Entry:
    """Return the release of a run. Raises as `logged_history`; StateError: It has released none.

    Raises:
        RefusedError: The gate of its study withholds the adapter.
    """
    history = logged_history(made)
    return _told(_named(_decided(made, history), name, history), made.directory / "runs" / name)


def _named(found: Sequence[Entry], name: str, history: Replay) -> Entry:
    """Return the entry of a run. Raises StateError if it has released none, and RefusedError if its gate is closed."""
    if name in history.runs:
        check_logged(history.runs[name], int(now().timestamp()))
    for entry in found:
        if entry.name == name:
            return entry
    raise StateError(
        f"run {name} has released no adapter; released have: {', '.join(each.name for each in found) or 'none yet'}",
        "list them: `privet registry list`",
    )


def decide(
    made: Coordinator, name: str, state: Decision, reason: str, time: datetime, by: str | None = None
) -> AdapterState:
    """Decide what becomes of a released adapter. The decision is durable on return; `log_decisions` logs it.

    Args:
        made: The coordinator.
        name: The run that released it.
        state: What becomes of it.
        reason: Why. The round log shows it to all sites.
        time: The present time.
        by: For superseded: the run whose release takes its place.

    Raises:
        StateError: There is no such release, or it is in this state or a later one.
        StudyError: The reason has other characters than printable ASCII, or is too long.
    """
    history = logged_history(made)
    found = _decided(made, history)
    entry = _named(found, name, history)
    if STATES.index(state) <= STATES.index(entry.state):
        raise StateError(
            f"the adapter of run {name} is {entry.state} already",
            f"`privet registry show {name}` says why; no adapter goes back to an earlier state",
        )
    if by is not None and (by == name or STATES.index(_named(found, by, history).state) > STATES.index("superseded")):
        raise StateError(
            f"run {by} has no other adapter that is in use",
            "name a run whose adapter takes the place: `privet registry list`",
        )
    adapter = entry.released.statement.adapter
    try:
        change = AdapterState(time=int(time.timestamp()), run=name, adapter=adapter, state=state, by=by, reason=reason)
    except ValidationError:
        raise StudyError(
            "--reason: expected 1 to 300 printable ASCII characters", "write such a reason in one line"
        ) from None
    # The file's name is the decision's, so that the same decision, made twice, is one.
    _decisions(made).keep(f"{name}.{state}", canonical_json(change.model_dump(mode="json")))
    return change


def log_decisions(made: Coordinator, journal: Journal) -> int:
    """Log the decisions that are not in the round log yet. Returns how many were waiting.

    Raises:
        StateError: The log or a decision's file could not be written.
    """

    def say(change: AdapterState) -> bool:
        run = journal.history.runs.get(change.run)
        now = [each.state for each in (run.releases if run else ()) if each.statement.adapter == change.adapter]
        if now and STATES.index(now[-1]) < _place(change):
            journal.say(change)
        return True

    return _decisions(made).settle(journal, say, _place)


def waits(made: Coordinator) -> bool:
    """Return whether a decision is not known to be in the log."""
    return _decisions(made).any()


def check_in_use(made: Coordinator, adapter: str, say: Callable[[str], None]) -> None:
    """Check that a study does not begin from an adapter that was retired or revoked, or that a gate withholds.

    Args:
        made: The coordinator.
        adapter: Digest of the adapter.
        say: Told of one that is superseded.

    Raises:
        StateError: It was. RefusedError: The gate of a run withholds it.
    """
    history = logged_history(made)
    check_origin(history, adapter)
    for entry in _decided(made, history):
        if entry.released.statement.adapter != adapter or entry.change is None:
            continue
        said = f"the adapter of run {entry.name} is {entry.state}: {entry.change.reason}"
        if entry.state != "superseded":
            raise StateError(said, "begin from an adapter that is in use: `privet registry list`")
        say(f"note: {said}")


def _decisions(made: Coordinator) -> Waiting[AdapterState]:
    """Return the decisions that are not known to be in the log."""
    return Waiting(
        made.directory / "decisions",
        AdapterState.model_validate_json,
        "remove the file, and decide again with `privet registry revoke`, `retire` or `supersede`",
    )


def _place(change: AdapterState) -> int:
    """Return the place of a decision in the order of states."""
    return STATES.index(change.state)


def _told(entry: Entry, path: Path) -> Entry:
    """Return an entry with what the run's directory adds to the log."""
    try:
        run = RunDirectory.open(path)
        statements = run.load().statements
    except PrivetError:  # the directory was archived elsewhere; the log has the rest
        return entry
    closed = [statement for statement in statements if statement["type"] == "round-close"]
    spent = (closed[-1]["privacy"] or {}).get("epsilon") if closed else None
    metrics = next((each["metrics"] for each in reversed(closed) if each["metrics"]), None)
    return replace(entry, study=run.study.name, metrics=metrics, spent=max(spent.values()) if spent else None)
