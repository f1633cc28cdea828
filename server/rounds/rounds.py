"""A study, and one round of it, as straight-line functions over an `Exchange`.

The same code runs in tests, in simulations and in deployment. Each round has these steps: open the round, collect the
sum of the updates, check it, take the server step, refactor where the aggregation asks for it, make the state durable,
publish.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from privet.common.clock import now
from privet.common.errors import ProtocolError, TooFewSitesError
from privet.common.log.agreement import RoundStatement
from privet.common.masking.bounds import bound_of, largest_term
from privet.common.masking.groups import check_columns, corrupt_sites, groups_of
from privet.common.masking.isolation import drawn_cohort
from privet.common.masking.noise_shares import shared_noise
from privet.common.masking.vector import VALIDATION_SUMS, released
from privet.common.study.adapter import Adapter
from privet.common.study.columns import own_values, weights_by_value
from privet.common.study.messages import RoundOpen
from privet.common.study.study import Study
from privet.common.study.terms import check_permit
from privet.server.exchange import Exchange
from privet.server.rounds.blocks import Blocks
from privet.server.rounds.collect import Shape, collect
from privet.server.rounds.consent import gather_participants
from privet.server.rounds.frozen import Copies
from privet.server.rounds.headstart import deviation_of_sums
from privet.server.rounds.masked import Waits, collect_masked
from privet.server.rounds.participants import Participant, RoundSum
from privet.server.rounds.run_log import RunLog, Unlogged
from privet.server.rounds.state import RunState
from privet.server.rounds.statements import aborted, closed, isolation_of, lost_in_a_row, round_statement
from privet.server.rounds.timing import PATIENT, Timing
from privet.server.rounds.watch import Watch

Observer = Callable[[RoundStatement, Adapter], None]
"""Called after each closed or aborted round with its statement and the adapter that is published after it."""
# Values at their bound are rounded to levels, up or down.
_ROUNDING = 1.001
# Units drawn in a step, over those expected by the declared counts.
_MOST_DRAWN = 4.0
_ANEW = (
    "mend these reasons; then make the same study with another seed, as sites run each round of a study once: "
    "`privet new --from STUDY --seed NUMBER --name NAME --out FILE`; run that with `privet coordinator run FILE`"
)
# Reasons of aborted rounds that an error lists.
_LISTED = 10
# Rounds in a row that may be aborted before the run stops: each may have cost the sites privacy.
_MOST_LOST = 3


def run_study(
    log: RunLog | Unlogged,
    exchange: Exchange,
    observe: Observer = lambda statement, adapter: None,
    timing: Timing = PATIENT,
    watch: Watch | None = None,
) -> RunState:
    """Run a study from the last closed round to its end, and return the final state.

    Args:
        log: The run's place in the round log, with the run's directory. `Unlogged` keeps no log: real sites refuse to
            take part without one, so only simulated sites accept it.
        exchange: Reaches the sites.
        observe: Is called after each round.
        timing: How long to wait.
        watch: Is told what the run waits for.

    Raises:
        TooFewSitesError: Too few sites consented, cosigned the log, or delivered: in one round, or under secure
            aggregation in three in a row. The run can be resumed.
        DivergedError: The aggregate is not finite; the last closed round's adapter is kept.
        ProtocolError: As for too few deliveries, where the sites' sum cannot be used.
        RefusedError: The study's permit has expired. The run can be withdrawn.
        StateError: The first round did not change the adapter; or state and log do not match.
    """
    run = log.run
    if watch is not None:
        exchange = watch.over(exchange)
    give_up = partial(given_up, run.study)
    participants: dict[str, Participant] = {}
    copies, blocks = Copies(), Blocks()
    # One process for each run: two would open the same round, each with a nonce of its own.
    with run.locked():
        loaded = run.load()
        state = log.settle(loaded, give_up)
        _observe_news(loaded, state, observe)
        while not state.stopped:
            # A site that was revoked since the last round must not enter the cohort that is drawn below.
            log.keep_in_step()
            check_permit(run.study, now())
            participants = gather_participants(exchange, log, state.adapter, timing.gathering, participants, watch)
            check_permit(run.study, now())  # again: sites may have been waited for past midnight
            left = log.left
            # The log has this cohort; another one would be a second `round-open` of the same round. If one of its
            # sites is missing, the round cannot be run as logged, so it is aborted.
            if left is not None and not participants.keys() >= set(left.cohort):
                before, state = state, log.give_up(state, give_up)
                _observe_news(before, state, observe)
                continue
            opened = open_round(run.study, state, participants)
            if left is not None:
                opened = replace(opened, nonce=left.nonce, cohort=left.cohort)
            # The round is in the log, cosigned by a quorum, before a site is asked to train: a coordinator cannot run
            # a round and deny it later. The same quorum covers the end of the last round, which is published now.
            asked = log.open(exchange, participants, opened, timing.gathering)
            log.publish(state)
            asked = copies.over(asked, state, run.study.aggregation.method, participants)
            state = run_round(run.study, state, asked, participants, opened, timing, blocks)
            # State first, then its end in the log. After a crash in between, `settle` takes the end from the state; in
            # the other order the log would have a closed round whose adapter is lost.
            run.store(state)
            log.close(state)
            observe(state.statements[-1], state.adapter)
            _check_progress(run.study, state)
        if not log.released:
            participants = gather_participants(exchange, log, state.adapter, timing.gathering, participants, watch)
            log.release(exchange, participants, state, timing.gathering)
        # After the release, which also publishes the aborted rounds: what they cost is on record.
        if lost_in_a_row(state) == len(state.statements):
            raise _without_result(state)
        return state


def _observe_news(before: RunState, after: RunState, observe: Observer) -> None:
    """Pass on the round that was given up between two states, if it counts: the one in which the run was stopped."""
    if len(after.statements) > len(before.statements):
        observe(after.statements[-1], after.adapter)


def _without_result(state: RunState) -> TooFewSitesError:
    """Return the error of a run of which every round was aborted: with the reasons, as a resumed run has shown none."""
    listed = state.statements[-_LISTED:]
    reasons = "".join(f"\n  round {each['round']}: {'; '.join(each['reason'].split(chr(10)))}" for each in listed)
    more = len(state.statements) - len(listed)
    return TooFewSitesError(
        "the run has no result: every round of the study was aborted, and no round is left"
        + (f"; the reasons of the last {len(listed)}:" if more else "; the reasons:")
        + reasons,
        _ANEW,
    )


def _check_progress(study: Study, state: RunState) -> None:
    lost, last = lost_in_a_row(state), state.statements[-1]
    most = _MOST_LOST
    if last.get("spoiled"):
        # A search for the site that spoils ends by itself. It halves the suspects with each spoiled sum.
        most = max(most, len(state.statements[-lost]["cohort"]).bit_length() + 1)
    if state.stopped and lost == len(state.statements):
        return  # told once the end is on record
    if lost >= min(most, study.rounds):
        raise TooFewSitesError(
            f"{lost} rounds in a row were aborted; reason of the last one: " + state.statements[-1]["reason"],
            "the rounds that closed have a result, which a resumed run releases"
            if state.stopped
            else "mend the reason first, as each aborted round uses up one of the study's rounds",
        )


def given_up(
    study: Study, state: RunState, opened: RoundOpen, reason: str = "the coordinator was stopped during the round"
) -> RunState:
    """Return the state after a round in which the coordinator was stopped, or failed, or withdrew the run."""
    common = round_statement(study, state, opened, None, time.time())
    return aborted(common, state, ProtocolError(reason), study.rounds)


def open_round(study: Study, state: RunState, participants: Mapping[str, Participant]) -> RoundOpen:
    """Return the message that opens the next round, to a cohort drawn from the participants.

    Raises:
        TooFewSitesError: Without the sites that are left out, there are too few; or too few have one of the ranks.
    """
    isolation = isolation_of(state.statements)
    cohort = drawn_cohort(study, state.round + 1, sorted(participants), isolation)
    if len(cohort) < min(study.cohort.min_sites, len(participants)):
        out = ", ".join(isolation.left_out)
        raise TooFewSitesError(
            f"the sites {out} are left out, as each spoiled the sums that it was in; {len(cohort)} sites remain, but "
            f"cohort.min_sites demands {study.cohort.min_sites}",
            "invite more sites, or find out at these sites what they send, and begin a new run",
        )
    if study.secure_aggregation.mode == "masked":
        for group in groups_of(study, state.round + 1, cohort):
            check_columns(study, group, corrupt_sites(study, len(cohort)), state.round + 1)
    return RoundOpen(
        study=study.document(),
        round=state.round + 1,
        nonce=os.urandom(16).hex(),
        adapter_digest=state.adapter.digest,
        cohort=cohort,
        adapter=state.adapter.data,
    )


def run_round(
    study: Study,
    state: RunState,
    exchange: Exchange,
    participants: Mapping[str, Participant],
    opened: RoundOpen,
    timing: Timing,
    blocks: Blocks | None = None,
) -> RunState:
    """Run one round and return the state after it. Raises as `run_study`.

    Under secure aggregation a failed round is recorded as aborted, and its number is not used again: a site may have
    masked an update for it, and it masks one update a round only. In the clear the same holds once too many sites have
    spent the round and lost their updates.
    """
    started = time.time()
    cohort = {name: participants[name] for name in opened.cohort}
    total: RoundSum | None = None
    try:
        total = collect_sum(study, state, exchange, cohort, opened, timing, blocks)
        check_norm(study, state, total)
    except ProtocolError as error:
        # Without masks nothing is lost with the round: it is opened again when the run is resumed. But where too many
        # sites have spent it, it would be opened for ever.
        final = isinstance(error, TooFewSitesError) and error.final
        if study.secure_aggregation.mode == "plain" and not final:
            raise
        common = round_statement(study, state, opened, total, started, error.spoiled)
        return aborted(common, state, error, study.rounds)
    return closed(study, state, opened, total, started)


def collect_sum(
    study: Study,
    state: RunState,
    exchange: Exchange,
    cohort: Mapping[str, Participant],
    opened: RoundOpen,
    timing: Timing,
    blocks: Blocks | None = None,
) -> RoundSum:
    """Collect the round's sum, masked unless the study asks for plain aggregation."""
    spec, head, weight = state.adapter.spec, study.sums_units(opened.round), study.aggregation.weight
    if study.secure_aggregation.mode == "masked":
        collected = collect_masked if study.secure_aggregation.block is None else (blocks or Blocks()).collect
        total = collected(exchange, study, spec, cohort, opened, Waits(timing.step, timing.round))
    else:
        validates = study.data.validation_fraction > 0
        size = sum(tensor.size for tensor in released(study, spec, head=head))
        own = partial(own_values, study, spec) if not head else lambda site: None
        shape = Shape(size, VALIDATION_SUMS if validates else 0, weight, own)
        total = collect(exchange, cohort, opened, shape, min_sites=study.cohort.min_sites, timeout=timing.round)
    if head or not study.lora.site_ranks:
        return total
    # Of the sites in the sum alone: the others' ranks and counts must not enter the divisors.
    weights = {site: weight(cohort[site].consent.weight) for site in total.survivors}
    expected = study.training.sampling_rate if study.distributed else 1.0
    by_value = weights_by_value(study, spec, weights)
    return replace(total, weights=None if by_value is None else expected * by_value)


def check_norm(study: Study, state: RunState, total: RoundSum) -> None:
    """Check the norm of the mean update against the largest norm that sites following the study can produce.

    Raises:
        ProtocolError: It is larger. `apply_update` checks for NaN and infinity.
    """
    limit = study.aggregation.max_norm
    if study.sums_units(state.round + 1):
        size = sum(tensor.size for tensor in released(study, state.adapter.spec, head=True))
        limit = _longest(study, size, total, deviation_of_sums(study, total))
    elif limit is None:
        trained = study.trained(state.adapter.spec)
        if study.distributed:
            shares = shared_noise(study, len(total.groups[0]["sites"]))
            noise = shares.deviation * len(total.survivors) ** 0.5
            if shares.band is not None:
                # Twice what it spreads leaves room for steps whose noise a drop-out did not take back.
                noise *= 2 * shares.band.spread(study.total_steps)
            limit = _longest(study, sum(tensor.size for tensor in trained), total, noise)
        else:
            limit = float(np.sqrt(sum(tensor.size * bound_of(study, tensor.role) ** 2 for tensor in trained)))
    norm = float(np.linalg.norm(total.mean))
    if np.isfinite(norm) and norm > _ROUNDING * limit:
        error = ProtocolError(
            f"the sites' mean update has the norm {norm:.3g}, but the study allows at most {limit:.3g}",
            "lower training.learning_rate or raise aggregation.max_norm; if both are right, a site sent a false update",
        )
        error.spoiled = (frozenset({*total.survivors, *total.failures}),)
        raise error


def _longest(study: Study, size: int, total: RoundSum, deviation: float) -> float:
    """Return a norm that a mean of clipped terms [size] with its noise exceeds with a probability below 10^-13.

    Terms are clipped, and at most `_MOST_DRAWN` times the expected number of units is drawn. The norm of noise whose
    values have the deviations s_i exceeds |s| + t max(s_i) with a probability of at most exp(-t²/2); here t = 8. Where
    sites have unequal ranks, the values that the same sites train are one block, and each block's mean is so bounded.
    """
    largest = _MOST_DRAWN * largest_term(study)
    if total.weights is None:
        return float(largest + deviation * (size**0.5 + 8) / total.weight)
    trained = total.weights[total.weights > 0]
    blocks, noise = len(np.unique(trained)), deviation / trained
    return float(largest * blocks**0.5 + np.linalg.norm(noise) + 8 * noise.max())
