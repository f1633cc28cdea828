"""Whether a log has the refusals that a site signed: for the site itself, and for an auditor who has its receipts."""

from __future__ import annotations

from privet.common.log.replay import Replay
from privet.common.log.statements import Refusal


def omitted(history: Replay, refusal: Refusal) -> bool | None:
    """Return whether a log lacks a refusal that it should have.

    A site is asked again before every round, and the log takes its refusal of a run or round once. So any refusal of
    the same site, study, run and round will do.

    Args:
        history: The log so far.
        refusal: What the site signed.

    Returns:
        False if the log has it; True if the log opened a round that the refusal precedes or is about, without having
        it; None if the log has not come to that.
    """
    found = history.refusals.get((refusal.site, refusal.run, refusal.round))
    if found is not None and found.study == refusal.study:
        return False
    run = history.runs.get(refusal.run)
    if run is None:
        return None
    # Of a round, its round-open; of a run, any.
    came = any(refusal.round in (0, each.statement.round) for each in run.rounds.values())
    return True if came else None


def where_of(refusal: Refusal) -> str:
    """Return the run and round that a refusal is about, for a message."""
    return f"run {refusal.run}" + (f", round {refusal.round}" if refusal.round else "") + f" ({refusal.code})"
