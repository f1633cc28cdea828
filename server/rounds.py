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
from typing import Any

import numpy as np

from privet.common.adapter import Adapter
from privet.common.errors import StateError, TooFewSitesError
from privet.common.messages import VALIDATION_LOSS_CAP, Consent, Failure, Message, Offer, RoundOpen
from privet.common.noise import SeededRandomness
from privet.common.privacy import PrivacyPlan, plan
from privet.common.study import NAME_PATTERN, Study
from privet.server.aggregate import ServerOptimizer, apply_update, refactor
from privet.server.collect import Member, RoundSum, Shape, collect
from privet.server.exchange import Exchange
from privet.server.state import RunDirectory, RunState

Statement = Mapping[str, Any]
Observer = Callable[[Statement, Adapter], None]
"""Called after each closed round with its statement and the adapter it published."""

_POLL = 0.5


@dataclass(frozen=True)
class Timing:
    """How long the coordinator waits, in seconds."""

    gathering: float = 600.0
    """For enough sites to consent."""
    round: float = 3600.0
    """For a round's contributions."""


def run_study(
    run: RunDirectory,
    exchange: Exchange,
    observe: Observer = lambda statement, adapter: None,
    timing: Timing = Timing(),
) -> RunState:
    """Run a study from the last closed round to its end, and return the final state.

    Raises:
        TooFewSitesError: Too few sites consented, or delivered in a round; the run can be resumed.
        DivergedError: The aggregate is not finite; the last closed round's adapter is kept.
        StateError: The first round did not move the adapter.
    """
    with run.locked():
        state = run.load()
        run.publish(state, every=True)
        if state.stopped:
            return state
        members: dict[str, Member] = {}
        while not state.stopped:
            members = gather(exchange, run.study, state.adapter, timing.gathering, members)
            state = run_round(run.study, state, exchange, members, timing.round)
            run.commit(state)
            observe(state.statements[-1], state.adapter)
        return state


def gather(
    exchange: Exchange, study: Study, adapter: Adapter, timeout: float, known: Mapping[str, Member]
) -> dict[str, Member]:
    """Offer the study to every node that is not `known`, and return all sites that consent to this very study.

    Called before each round, so that a site that comes late takes part from the next round on. Waits for more
    nodes only while there are fewer sites than the study's minimum.

    Raises:
        TooFewSitesError: Fewer than the minimum consent within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    members = dict(known)
    refusals: dict[int, Failure] = {}
    while True:
        settled = {member.node for member in members.values()} | set(refusals)
        offers = {node: Offer(study.document()) for node in exchange.nodes() if node not in settled}
        left = max(deadline - time.monotonic(), _POLL)
        for node, reply in sorted(exchange.ask(offers, timeout=left).items()):
            problem = _objection(reply, study, adapter, members)
            if isinstance(reply, Consent) and problem is None:
                members[reply.site] = Member(node, reply)
            else:
                refusals[node] = problem or Failure("ProtocolError", "no consent", "")
        if len(members) >= study.cohort.min_sites:
            return members
        if time.monotonic() >= deadline:
            raise TooFewSitesError(
                f"{len(members)} sites consented, the study demands {study.cohort.min_sites}"
                + "".join(f"\n  node {node}: {failure.message}" for node, failure in refusals.items()),
                next((failure.hint for failure in refusals.values() if failure.hint), ""),
            )
        time.sleep(_POLL)


def _objection(reply: Message, study: Study, adapter: Adapter, members: Mapping[str, Member]) -> Failure | None:
    """Return why a reply to an offer makes no member, or None where it does."""
    if isinstance(reply, Failure):
        return reply
    if not isinstance(reply, Consent):
        return Failure("ProtocolError", f"answered an offer with {reply.kind}", "")
    if not re.fullmatch(NAME_PATTERN, reply.site):
        return Failure("ProtocolError", "a site's name has characters that names may not have", "")
    if reply.study_digest != study.digest or reply.spec_digest != adapter.spec.digest or reply.weight < 1:
        return Failure("ProtocolError", f"{reply.site}: consented to something else", "")
    if reply.site in members:
        return Failure("ProtocolError", f"{reply.site}: the name is taken", "")
    return None


def draw_cohort(study: Study, round_number: int, members: Mapping[str, Member]) -> dict[str, Member]:
    """Draw a round's cohort: the study's fraction of the sites, at least its minimum, from the public seed."""
    names = sorted(members)
    size = min(len(names), max(study.cohort.min_sites, round(study.cohort.fraction * len(names))))
    if size < len(names):
        order = np.argsort(SeededRandomness(study.seed, "cohort", round_number).uniform(len(names)), kind="stable")
        names = sorted(names[index] for index in order[:size])
    return {name: members[name] for name in names}


def run_round(
    study: Study, state: RunState, exchange: Exchange, members: Mapping[str, Member], timeout: float
) -> RunState:
    """Run one round and return the state after it. Raises as `run_study`."""
    number, started = state.round + 1, time.time()
    cohort = draw_cohort(study, number, members)
    opened = RoundOpen(
        study=study.document(),
        round=number,
        nonce=os.urandom(16).hex(),
        adapter_digest=state.adapter.digest,
        cohort=tuple(cohort),
        adapter=state.adapter.data,
    )
    optimizer = ServerOptimizer(study.aggregation, study.training.rounds, state.adapter.spec)
    if state.optimizer is not None:
        optimizer.load_state_dict(*state.optimizer)
    validates = study.data.validation_fraction > 0
    shape = Shape(sum(t.size for t in optimizer.trained), 3 if validates else 0, study.aggregation.weighting)
    total = collect(exchange, cohort, opened, shape, min_sites=study.cohort.min_sites, timeout=timeout)
    adapter = next_adapter(study, state, optimizer, total)
    metrics = validation_metrics(total)
    state = with_best(study, state, metrics)
    stopping = gave_up(study, state, number)
    published = state.best[2] if stopping and state.best is not None else adapter
    statement = close_statement(study, state, opened, total, (adapter, published), metrics, started)
    ended = stopping or number == study.training.rounds
    return RunState(number, published, optimizer.state_dict(), (*state.statements, statement), state.best, ended)


def next_adapter(study: Study, state: RunState, optimizer: ServerOptimizer, total: RoundSum) -> Adapter:
    """Step on the weighted mean; refactor B·A where the study asks for it in this round."""
    adapter = apply_update(state.adapter, total.update / total.weight, optimizer, state.round)
    # Here, because refactoring may change A where nothing was learnt.
    if state.round == 0 and adapter.digest == state.adapter.digest:
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
    """Whether `patience` rounds have passed since the best validation loss."""
    patience = study.training.patience
    return patience is not None and state.best is not None and number - 1 - state.best[1] >= patience


def close_statement(
    study: Study,
    state: RunState,
    opened: RoundOpen,
    total: RoundSum,
    adapters: tuple[Adapter, Adapter],
    metrics: Mapping[str, float] | None,
    started: float,
) -> dict[str, Any]:
    """Return the round's statement: who took part, what came out, what it cost.

    `adapters` are what the round made and what was published after it: the same, but for an early stop, which
    publishes the best adapter of an earlier round.
    """
    return {
        "type": "round-close",
        "format": 1,
        "study": study.digest,
        "round": opened.round,
        "nonce": opened.nonce,
        "cohort": list(opened.cohort),
        "survivors": list(total.survivors),
        "failures": {site: f"{failure.error}: {failure.message}" for site, failure in total.failures.items()},
        "adapter_before": opened.adapter_digest,
        "adapter_after": adapters[0].digest,
        "adapter_published": adapters[1].digest,
        "aggregation": study.aggregation.method,
        "secure_aggregation": study.secure_aggregation.mode,
        "metrics": None if metrics is None else dict(metrics),
        "privacy": spent_by_site(study, state, opened),
        "started": round(started, 3),
        "seconds": round(time.time() - started, 3),
    }


def spent_by_site(study: Study, state: RunState, opened: RoundOpen) -> dict[str, Any] | None:
    """Return each site's epsilon after this round. A site pays for every closed round that it was asked into."""
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
