"""A study, and one round of it, as straight-line functions over an `Exchange`.

The same code runs in tests, in simulation and in deployment. Each round: open, collect the sum, step,
refactor where the aggregation asks for it, check, make durable, publish.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from privet.common.errors import ProtocolError, TooFewSitesError
from privet.common.log.agreement import RoundStatement
from privet.common.masking.bounds import bound_of
from privet.common.masking.noise_shares import shared_noise
from privet.common.masking.vector import VALIDATION_SUMS
from privet.common.study.adapter import Adapter
from privet.common.study.messages import RoundOpen
from privet.common.study.study import Study
from privet.server.exchange import Exchange
from privet.server.rounds.collect import Shape, collect
from privet.server.rounds.consent import draw_cohort, gather_participants
from privet.server.rounds.masked import Waits, collect_masked
from privet.server.rounds.participants import Participant, RoundSum
from privet.server.rounds.run_log import RunLog
from privet.server.rounds.state import RunDirectory, RunState
from privet.server.rounds.statements import aborted, closed, lost_in_a_row, round_statement

Observer = Callable[[RoundStatement, Adapter], None]
"""Called after each closed round with its statement and the adapter it published."""
# Values at their bound are rounded to levels, up or down.
_ROUNDING = 1.001
# Units drawn in a step, over those expected by the declared counts.
_MOST_DRAWN = 4.0
_ANEW = "see to the sites named, then start a new study"
# Rounds in a row that may come to nothing before the run stops: each may have cost the sites privacy.
_MOST_LOST = 3


@dataclass(frozen=True)
class Timing:
    """How long the coordinator waits, in seconds."""

    gathering: float = 600.0
    """For enough sites to consent."""
    round: float = 3600.0
    """For a round's contributions."""
    step: float = 120.0
    """For each other exchange of a round under secure aggregation."""


def run_study(
    run: RunDirectory,
    exchange: Exchange,
    observe: Observer = lambda statement, adapter: None,
    timing: Timing = Timing(),
    record: RunLog | None = None,
) -> RunState:
    """Run a study from the last closed round to its end, and return the final state.

    Args:
        run: Its directory.
        exchange: Reaches the sites.
        observe: Watches rounds close.
        timing: How long to wait.
        record: The run's place in the round log; None keeps no log, which only simulated sites put up with.

    Raises:
        TooFewSitesError: Too few sites consented, cosigned the log, or delivered: in one round, or under secure
            aggregation in three in a row. The run can be resumed.
        DivergedError: The aggregate is not finite; the last closed round's adapter is kept.
        ProtocolError: As for too few deliveries, where the sites' sum cannot be used.
        StateError: The first round did not move the adapter; or state and log do not go together.
    """
    with run.locked():
        state = run.load()
        if record is None:
            run.publish(state, every=True)
        else:
            state = record.settle(state, partial(_given_up, run.study))
        members: dict[str, Participant] = {}
        while not state.stopped:
            if record is not None:
                record.keep_in_step()
            members = gather_participants(exchange, run.study, state.adapter, timing.gathering, members, record)
            opened = open_round(run.study, state, members)
            asked = exchange
            left = None if record is None else record.left
            if record is not None and left is not None and not members.keys() >= set(left.cohort):
                state = record.give_up(state, partial(_given_up, run.study))
                continue
            if left is not None:
                opened = replace(opened, nonce=left.nonce, cohort=left.cohort)
            if record is not None:
                asked = record.open(exchange, members, opened, timing.gathering)
                record.publish(state)
            state = run_round(run.study, state, asked, members, opened, timing)
            if record is None:
                run.commit(state)
            else:
                run.store(state)
                record.close(state)
            observe(state.statements[-1], state.adapter)
            _check_progress(run.study, state)
        if record is not None and not record.released:
            members = gather_participants(exchange, run.study, state.adapter, timing.gathering, members, record)
            record.release(exchange, members, state, timing.gathering)
        if lost_in_a_row(state) == len(state.statements):
            raise TooFewSitesError("no round of the study closed, and none is left", _ANEW)
        return state


def _check_progress(study: Study, state: RunState) -> None:
    lost = lost_in_a_row(state)
    if lost >= min(_MOST_LOST, study.training.rounds):
        raise TooFewSitesError(
            f"{lost} rounds in a row came to nothing; the last: " + state.statements[-1]["reason"],
            _ANEW if state.stopped else "see to the sites named, then resume the run",
        )


def _given_up(study: Study, state: RunState, opened: RoundOpen) -> RunState:
    """Return the state after a round in which the coordinator was stopped, or failed."""
    reason = ProtocolError("the coordinator was stopped during the round")
    return aborted(round_statement(study, state, opened, None, time.time()), state, reason, study.training.rounds)


def open_round(study: Study, state: RunState, members: Mapping[str, Participant]) -> RoundOpen:
    """Return how the next round is opened, to a cohort drawn from the members."""
    return RoundOpen(
        study=study.document(),
        round=state.round + 1,
        nonce=os.urandom(16).hex(),
        adapter_digest=state.adapter.digest,
        cohort=tuple(draw_cohort(study, state.round + 1, members)),
        adapter=state.adapter.data,
    )


def run_round(
    study: Study,
    state: RunState,
    exchange: Exchange,
    members: Mapping[str, Participant],
    opened: RoundOpen,
    timing: Timing,
) -> RunState:
    """Run one round and return the state after it. Raises as `run_study`.

    Under secure aggregation a round that comes to nothing is closed as aborted, and its number is not used again:
    sites may have masked an update for it, which they do once.
    """
    started = time.time()
    cohort = {name: members[name] for name in opened.cohort}
    total: RoundSum | None = None
    try:
        total = collect_sum(study, state, exchange, cohort, opened, timing)
        check_norm(study, state, total)
    except ProtocolError as error:
        if study.secure_aggregation.mode == "plain":
            raise
        return aborted(round_statement(study, state, opened, total, started), state, error, study.training.rounds)
    return closed(study, state, opened, total, started)


def collect_sum(
    study: Study,
    state: RunState,
    exchange: Exchange,
    cohort: Mapping[str, Participant],
    opened: RoundOpen,
    timing: Timing,
) -> RoundSum:
    """Collect the round's sum, masked unless the study asks for plain aggregation."""
    spec = state.adapter.spec
    if study.secure_aggregation.mode == "masked":
        return collect_masked(exchange, study, spec, cohort, opened, Waits(timing.step, timing.round))
    validates = study.data.validation_fraction > 0
    trained = sum(tensor.size for tensor in spec.trained(study.aggregation.method))
    shape = Shape(trained, VALIDATION_SUMS if validates else 0, study.aggregation.weighting)
    return collect(exchange, cohort, opened, shape, min_sites=study.cohort.min_sites, timeout=timing.round)


def check_norm(study: Study, state: RunState, total: RoundSum) -> None:
    """Check the length of the mean update against what sites that follow the study can send.

    Raises:
        ProtocolError: It is longer. NaN and infinity are left to `apply_update`, which says so.
    """
    limit = study.aggregation.max_norm
    if limit is None:
        trained = state.adapter.spec.trained(study.aggregation.method)
        if study.distributed:
            limit = _longest_step(study, sum(tensor.size for tensor in trained), total)
        else:
            limit = float(np.sqrt(sum(tensor.size * bound_of(study, tensor.role) ** 2 for tensor in trained)))
    norm = float(np.linalg.norm(total.update)) / total.weight
    if np.isfinite(norm) and norm > _ROUNDING * limit:
        raise ProtocolError(
            f"the mean update has norm {norm:.3g}, the study allows {limit:.3g}",
            "a site sent more than training gives, or the learning rate is too high; see aggregation.max_norm",
        )


def _longest_step(study: Study, size: int, total: RoundSum) -> float:
    """Return the largest norm of a step's mean gradient [size] with its noise, but for once in 10^13.

    Gradients are clipped, and their number is around the expected one. Noise of deviation s is longer than
    s (sqrt(size) + t) with a probability of exp(-t²/2) at most.
    """
    noise = shared_noise(study, len(total.groups[0]["sites"])).deviation * len(total.survivors) ** 0.5
    return float(_MOST_DRAWN * study.privacy.promise.clip_norm + noise * (size**0.5 + 8) / total.weight)
