"""A study, and one round of it, as straight-line functions over an `Exchange`.

The same code runs in tests, in simulation and in deployment. Each round: open, collect the sum, step,
refactor where the aggregation asks for it, check, make durable, publish.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from privet.common.errors import ProtocolError, StateError, TooFewSitesError
from privet.common.masking import VALIDATION_SUMS, bound_of, shared_noise
from privet.common.privacy.accounting import PrivacyPlan, plan
from privet.common.privacy.noise import SeededRandomness
from privet.common.study.adapter import Adapter
from privet.common.study.messages import VALIDATION_LOSS_CAP, Consent, Failure, Message, Offer, RoundOpen
from privet.common.study.study import NAME_PATTERN, Study
from privet.server.exchange import Exchange
from privet.server.log.journal import Listening
from privet.server.rounds.aggregate import ServerOptimizer, apply_update, refactor
from privet.server.rounds.collect import Member, RoundSum, Shape, collect
from privet.server.rounds.masked import Waits, collect_masked
from privet.server.rounds.record import Record
from privet.server.rounds.state import RunDirectory, RunState

Statement = Mapping[str, Any]
Observer = Callable[[Statement, Adapter], None]
"""Called after each closed round with its statement and the adapter it published."""

_POLL = 0.5
# Seconds that a round waits for a further site's consent once there are enough.
_LATECOMER = 5.0
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
    record: Record | None = None,
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
        members: dict[str, Member] = {}
        while not state.stopped:
            if record is not None:
                record.keep_in_step()
            members = gather(exchange, run.study, state.adapter, timing.gathering, members, record)
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
            members = gather(exchange, run.study, state.adapter, timing.gathering, members, record)
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


def lost_in_a_row(state: RunState) -> int:
    """Return how many of the last rounds were aborted, one after the other."""
    kinds = [statement["type"] for statement in reversed(state.statements)]
    return next((count for count, kind in enumerate(kinds) if kind != "round-abort"), len(kinds))


def gather(
    exchange: Exchange,
    study: Study,
    adapter: Adapter,
    timeout: float,
    known: Mapping[str, Member],
    record: Record | None = None,
) -> dict[str, Member]:
    """Offer the study to every node that is not `known`, and return all sites that consent to this very study.

    Called before each round, so that a site that comes late, or comes back at another address, takes part from the
    next round on; one that has gone is forgotten. Waits for more nodes only while there are fewer sites than the
    study's minimum. Where a log is kept, only its members are sites.

    Raises:
        TooFewSitesError: Fewer than the minimum consent within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    online = set(exchange.nodes()) if known else set()
    members = {name: member for name, member in known.items() if member.node in online}
    refusals: dict[int, Failure] = {}
    keys = None if record is None else record.keys
    offer = Offer(study.document(), "" if record is None else record.name)
    asked = exchange if record is None else Listening(exchange, record.journal)
    while True:
        settled = {member.node for member in members.values()} | set(refusals)
        offers = {node: offer for node in exchange.nodes() if node not in settled}
        enough = len(members) >= study.cohort.min_sites
        left = max(min(deadline - time.monotonic(), _LATECOMER if enough else timeout), _POLL)
        for node, reply in sorted(asked.ask(offers, timeout=left), key=lambda item: item[0]):
            problem = _objection(reply, study, adapter, members, keys)
            if isinstance(reply, Consent) and problem is None:
                members[reply.site] = Member(node, reply)
            else:
                refusals[node] = problem or Failure("ProtocolError", "no consent", "")
        if len(members) >= study.cohort.min_sites:
            return members
        if time.monotonic() >= deadline:
            raise TooFewSitesError(
                f"{len(members)} sites consented, the study demands {study.cohort.min_sites}"
                + "".join(f"\n  node {node}: {failure}" for node, failure in refusals.items()),
                next((failure.hint for failure in refusals.values() if failure.hint), ""),
            )
        time.sleep(_POLL)


def _objection(
    reply: Message, study: Study, adapter: Adapter, members: Mapping[str, Member], keys: Mapping[str, str] | None
) -> Failure | None:
    """Return why a reply to an offer makes no member, or None where it does."""
    if isinstance(reply, Failure):
        return reply
    if not isinstance(reply, Consent):
        return Failure("ProtocolError", f"answered an offer with {reply.kind}", "")
    if not re.fullmatch(NAME_PATTERN, reply.site):
        return Failure("ProtocolError", "a site's name has characters that names may not have", "")
    if reply.study_digest != study.digest or reply.spec_digest != adapter.spec.digest or reply.weight < 1:
        return Failure("ProtocolError", f"{reply.site}: consented to something else", "")
    if study.cohort.sites and reply.site not in study.cohort.sites:
        return Failure("ProtocolError", f"{reply.site}: the study does not name this site", "")
    if keys is not None and keys.get(reply.site) != reply.identity:
        return Failure("ProtocolError", f"{reply.site}: no member of the consortium has this name and key", "")
    if reply.weight > study.aggregation.largest_count:
        return Failure("ProtocolError", f"{reply.site}: declared more than aggregation.largest_count", "")
    if reply.site in members:
        return Failure("ProtocolError", f"{reply.site}: the name is taken", "")
    if study.secure_aggregation.mode == "masked" and not re.fullmatch("[0-9a-f]{64}", reply.identity):
        return Failure("ProtocolError", f"{reply.site}: named no identity key, which masking needs", "")
    if reply.identity and reply.identity in {member.consent.identity for member in members.values()}:
        return Failure("ProtocolError", f"{reply.site}: named another site's identity key", "")
    return None


def cohort_size(study: Study, members: int) -> int:
    """Return how many of so many members are asked into a round."""
    return min(members, max(study.cohort.min_sites, round(study.cohort.fraction * members)))


def draw_cohort(study: Study, round_number: int, members: Mapping[str, Member]) -> dict[str, Member]:
    """Draw a round's cohort: the study's fraction of the sites, at least its minimum, from the public seed."""
    names = sorted(members)
    size = cohort_size(study, len(names))
    if size < len(names):
        order = np.argsort(SeededRandomness(study.seed, "cohort", round_number).uniform(len(names)), kind="stable")
        names = sorted(names[index] for index in order[:size])
    return {name: members[name] for name in names}


def open_round(study: Study, state: RunState, members: Mapping[str, Member]) -> RoundOpen:
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
    members: Mapping[str, Member],
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
    cohort: Mapping[str, Member],
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
    return float(_MOST_DRAWN * study.privacy.promise[2] + noise * (size**0.5 + 8) / total.weight)


def closed(study: Study, state: RunState, opened: RoundOpen, total: RoundSum, started: float) -> RunState:
    """Return the state after a round whose sum is `total`."""
    optimizer = ServerOptimizer(study.aggregation, study.training.rounds, state.adapter.spec)
    if state.optimizer is not None:
        optimizer.load_state_dict(*state.optimizer)
    adapter = next_adapter(study, state, optimizer, total)
    metrics = validation_metrics(total)
    state = with_best(study, state, metrics)
    stopping = gave_up(study, state, opened.round)
    published = state.best[2] if stopping and state.best is not None else adapter
    statement = {
        **round_statement(study, state, opened, total, started),
        "type": "round-close",
        "adapter_after": adapter.digest,
        # What was published: the same, but for an early stop, which publishes the best adapter of an earlier round.
        "adapter_published": published.digest,
        "metrics": metrics,
    }
    ended = stopping or opened.round == study.training.rounds
    return RunState(opened.round, published, optimizer.state_dict(), (*state.statements, statement), state.best, ended)


def aborted(common: Mapping[str, Any], state: RunState, error: ProtocolError, rounds: int) -> RunState:
    """Return the state after a round that came to nothing: the adapter stays, and the cost is kept."""
    statement = {
        **common,
        "type": "round-abort",
        "reason": f"{type(error).__name__}: {error.message}",
        "adapter_after": common["adapter_before"],
        "adapter_published": common["adapter_before"],
        "metrics": None,
    }
    ended = statement["round"] == rounds
    return replace(state, round=statement["round"], statements=(*state.statements, statement), stopped=ended)


def next_adapter(study: Study, state: RunState, optimizer: ServerOptimizer, total: RoundSum) -> Adapter:
    """Step on the weighted mean; refactor B·A where the study asks for it in this round."""
    adapter = apply_update(state.adapter, total.update / total.weight, optimizer, state.round)
    # Here, because refactoring may change A where nothing was learnt.
    first = all(statement["type"] == "round-abort" for statement in state.statements)
    if first and adapter.digest == state.adapter.digest:
        raise StateError("the first round did not move the adapter", "check the learning rates and lora.targets")
    if study.aggregation.method == "fedsvd" and (state.round + 1) % study.aggregation.refactor_every == 0:
        adapter, bases = refactor(adapter)
        optimizer.change_basis(bases)
    return adapter


def validation_metrics(total: RoundSum) -> dict[str, float] | None:
    """Turn validation sums into the loss and accuracy of the adapter that the round started from."""
    if not total.metrics.size:
        return None
    units = max(float(total.metrics[0]), 1.0)
    return {
        "validation_loss": float(total.metrics[1]) * VALIDATION_LOSS_CAP / units,
        "validation_accuracy": float(total.metrics[2]) / units,
    }


def with_best(study: Study, state: RunState, metrics: Mapping[str, float] | None) -> RunState:
    """Remember the round's starting adapter if early stopping is on and its validation loss is the lowest yet."""
    if study.training.patience is None or metrics is None:
        return state
    loss = metrics["validation_loss"]
    if state.best is None or loss < state.best[0]:
        return replace(state, best=(loss, state.round, state.adapter))
    return state


def gave_up(study: Study, state: RunState, number: int) -> bool:
    """Whether the adapter has been validated `patience` times since the best validation loss."""
    patience = study.training.patience
    if patience is None or state.best is None:
        return False
    # A round validates the adapter of the round before; an aborted one validates nothing.
    validating = [s["round"] for s in state.statements if s["type"] == "round-close"] + [number]
    best = state.best[1]
    return len([each for each in validating if each - 1 > best]) >= patience


def round_statement(
    study: Study, state: RunState, opened: RoundOpen, total: RoundSum | None, started: float
) -> dict[str, Any]:
    """Return what the statements of closed and of aborted rounds have in common: who was asked, what it cost.

    `total` is the sum that was collected, also where it was then not used.
    """
    failures = {} if total is None else total.failures
    return {
        "format": 1,
        "study": study.digest,
        "round": opened.round,
        "nonce": opened.nonce,
        "cohort": list(opened.cohort),
        "survivors": [] if total is None else list(total.survivors),
        "failures": {site: f"{failure.error}: {failure.message}" for site, failure in failures.items()},
        "masking": [] if total is None else [dict(group) for group in total.groups],
        "adapter_before": opened.adapter_digest,
        "aggregation": study.aggregation.method,
        "secure_aggregation": study.secure_aggregation.mode,
        "privacy": spent_by_site(study, state, opened),
        "started": round(started, 3),
        "seconds": round(time.time() - started, 3),
    }


def spent_by_site(study: Study, state: RunState, opened: RoundOpen) -> dict[str, Any] | None:
    """Return each site's epsilon after this round. A site pays for every round that it was asked into."""
    mechanism: PrivacyPlan | None = plan(study)
    if mechanism is None:
        return None
    cohorts = [statement["cohort"] for statement in state.statements] + [list(opened.cohort)]
    rounds = {site: sum(site in cohort for cohort in cohorts) for site in sorted({s for c in cohorts for s in c})}
    return {
        "unit": study.privacy.unit,
        "delta": mechanism.delta,
        "target": mechanism.target,
        "accountant": "prv",
        "training": mechanism.training.document(),
        "validation": None if mechanism.validation is None else mechanism.validation.document(),
        "epsilon": {site: mechanism.spent(count) for site, count in rounds.items()},
    }
