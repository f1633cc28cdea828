"""The state after a round, and the statement about the round's result and its cost."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from privet.common.errors import ProtocolError, StateError
from privet.common.log.agreement import SPOILED_NAMES
from privet.common.masking.isolation import Isolation, Sums
from privet.common.privacy.accounting import PrivacyPlan, plan
from privet.common.study.adapter import Adapter
from privet.common.study.average import counts, extended
from privet.common.study.counts import cells_of
from privet.common.study.messages import RoundOpen
from privet.common.study.sections import VALIDATION_LOSS_CAP, VALIDATION_SENSITIVITY
from privet.common.study.study import Study
from privet.server.rounds.aggregate import ServerOptimizer, apply_update, refactor
from privet.server.rounds.headstart import started
from privet.server.rounds.participants import RoundSum
from privet.server.rounds.state import RunState


def lost_in_a_row(state: RunState) -> int:
    """Return how many of the last rounds were aborted, one after the other."""
    kinds = [statement["type"] for statement in reversed(state.statements)]
    return next((count for count, kind in enumerate(kinds) if kind != "round-abort"), len(kinds))


def closed(study: Study, state: RunState, opened: RoundOpen, total: RoundSum, started: float) -> RunState:
    """Return the state after a round whose sum is `total`."""
    if study.counts:
        return _after_counting(study, state, opened, total, started)
    settings, training = study.aggregation, study.training
    optimizer = ServerOptimizer(settings, training.rounds, state.adapter.spec, head=training.train_head)
    if state.optimizer is not None:
        optimizer.load_state_dict(*state.optimizer)
    adapter = next_adapter(study, state, optimizer, total)
    metrics = validation_metrics(study, total)
    state = with_best(study, state, metrics)
    stopping = gave_up(study, state, opened.round)
    published = state.best[2] if stopping and state.best is not None else adapter
    mean = extended(study, state.mean, adapter) if counts(study, opened.round) else None
    averaged = mean is not None and opened.round == study.rounds
    if averaged and mean is not None:
        published = mean.adapter(adapter.spec)
        published.check_finite("the average of the adapters")
    statement = {
        **round_statement(study, state, opened, total, started),
        "type": "round-close",
        "adapter_after": adapter.digest,
        # The same as adapter_after, except after an early stop, which publishes the best adapter of an earlier round,
        # and at the end of a study that averages.
        "adapter_published": published.digest,
        **({"average": study.aggregation.average} if averaged else {}),
        "metrics": metrics,
    }
    ended = stopping or opened.round == study.rounds
    return RunState(
        round=opened.round,
        adapter=published,
        optimizer=optimizer.state_dict(),
        statements=(*state.statements, statement),
        best=state.best,
        stopped=ended,
        mean=mean,
        part=adapter if mean is not None else None,
    )


def _after_counting(study: Study, state: RunState, opened: RoundOpen, total: RoundSum, started: float) -> RunState:
    """Return the state after the one round of a study that counts: the adapter is as it was."""
    statement = {
        **round_statement(study, state, opened, total, started),
        "type": "round-close",
        "adapter_after": state.adapter.digest,
        "adapter_published": state.adapter.digest,
        "metrics": counted(study, total),
    }
    return replace(state, round=opened.round, statements=(*state.statements, statement), stopped=True)


def aborted(common: Mapping[str, Any], state: RunState, error: ProtocolError, rounds: int) -> RunState:
    """Return the state after an aborted round: the adapter is unchanged, and the privacy cost is recorded."""
    statement = {
        **common,
        "type": "round-abort",
        "reason": f"{type(error).__name__}: {error.message}",
        "adapter_after": common["adapter_before"],
        "adapter_published": common["adapter_before"],
        "metrics": None,
    }
    ended = statement["round"] == rounds
    return replace(state, round=statement["round"], statements=(*state.statements, statement), stopped=ended, part=None)


def next_adapter(study: Study, state: RunState, optimizer: ServerOptimizer, total: RoundSum) -> Adapter:
    """Step on the weighted mean; refactor B·A where the study asks for it in this round."""
    if study.is_head_start(state.round + 1):
        return started(study, state.adapter, total)
    trained = study.trained_before(state.round + 1)
    moving = None if total.weights is None else total.weights > 0
    adapter = apply_update(state.adapter, total.mean, optimizer, trained, moving)
    # Before refactoring, which may change A although the step changed nothing.
    first = all(statement["type"] == "round-abort" for statement in state.statements)
    if first and adapter.digest == state.adapter.digest:
        raise StateError(
            "the run cannot continue: the first round did not change the adapter, so training has no effect",
            "check training.learning_rate, aggregation.learning_rate and lora.targets in the study file",
        )
    if study.aggregation.method == "fedsvd" and (trained + 1) % study.aggregation.refactor_every == 0:
        adapter, bases = refactor(adapter)
        optimizer.change_basis(bases)
    return adapter


def validation_metrics(study: Study, total: RoundSum) -> dict[str, float] | None:
    """Return the loss and accuracy of the adapter that the round started from, from the validation sums.

    Beside them, how many units were measured, and the standard deviation of the noise on each sum: what is needed to
    say how far the two can be believed.
    """
    if not total.metrics.size:
        return None
    # Noise can make the number of units zero or negative.
    units = max(float(total.metrics[0]), 1.0)
    return {
        "validation_loss": float(total.metrics[1]) * VALIDATION_LOSS_CAP / units,
        "validation_accuracy": float(total.metrics[2]) / units,
        "validation_units": units,
        "validation_noise": noise_of(study, len(total.survivors)),
    }


def noise_of(study: Study, survivors: int) -> float:
    """Return the standard deviation of the noise on each validation sum, in units; 0 without privacy.

    Args:
        study: The study.
        survivors: Sites in the sum. Each adds all of its own noise.
    """
    mechanism = plan(study)
    if mechanism is None or mechanism.validation is None:
        return 0.0
    return float(mechanism.validation.noise_multiplier * VALIDATION_SENSITIVITY * survivors**0.5)


def counted(study: Study, total: RoundSum) -> dict[str, float]:
    """Return the sum of all survivors' counts by cell, with the noise that the sites added."""
    cells = cells_of(study)
    return {name: float(value) for name, value in zip(cells.names, total.update / cells.scale, strict=True)}


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
    study: Study,
    state: RunState,
    opened: RoundOpen,
    total: RoundSum | None,
    started: float,
    spoiled: Sequence[frozenset[str]] = (),
) -> dict[str, Any]:
    """Return the fields that statements of closed and of aborted rounds share: the cohort, the sum, the privacy cost.

    `total` is the sum that was collected, also if it was rejected afterwards. `spoiled` are the sites of each sum that
    could not be used, besides those in `total`.
    """
    failures = {} if total is None else total.failures
    survivors = () if total is None or spoiled else total.survivors
    return {
        "format": 1,
        "study": study.digest,
        "round": opened.round,
        "nonce": opened.nonce,
        "cohort": list(opened.cohort),
        "survivors": [] if total is None else list(total.survivors),
        "failures": {site: f"{failure.error}: {failure.message}" for site, failure in failures.items()},
        "masking": [] if total is None else [dict(group) for group in total.groups],
        **_spoiled_by(
            state, frozenset(opened.cohort), spoiled if total is None else (*total.spoiled, *spoiled), survivors
        ),
        "adapter_before": opened.adapter_digest,
        "aggregation": study.aggregation.method,
        "secure_aggregation": study.secure_aggregation.mode,
        "privacy": spent_by_site(study, state, opened),
        "started": round(started, 3),
        "seconds": round(time.time() - started, 3),
    }


def isolation_of(statements: Iterable[Mapping[str, Any]]) -> Isolation:
    """Return what the statements of the rounds so far say about who spoils."""
    return Isolation.after(_sums_of(statement) for statement in statements)


def _sums_of(statement: Mapping[str, Any]) -> Sums:
    spoiled = tuple(frozenset(sites or statement["cohort"]) for sites in statement.get("spoiled", ()))
    usable = (frozenset(statement["survivors"]),) if statement["type"] == "round-close" else ()
    return Sums(spoiled, usable)


def _spoiled_by(
    state: RunState, cohort: frozenset[str], spoiled: Sequence[frozenset[str]], survivors: Sequence[str]
) -> dict[str, list[str] | list[list[str]]]:
    """Return the fields about spoiled sums; none where no sum of the run was spoiled."""
    if sum(len(name) + 3 for sites in spoiled if sites != cohort for name in sites) > SPOILED_NAMES:
        spoiled = (cohort,)  # which says less, and fits into a leaf of the log
    found = isolation_of(state.statements)
    before = found.left_out
    found.note(Sums(tuple(spoiled), (frozenset(survivors),) if survivors else ()))
    fields: dict[str, list[str] | list[list[str]]] = {}
    if spoiled:
        fields["spoiled"] = [[] if sites == cohort else sorted(sites) for sites in spoiled]
    if found.left_out != before:
        fields["left_out"] = sorted(set(found.left_out) - set(before))
    return fields


def spent_by_site(study: Study, state: RunState, opened: RoundOpen) -> dict[str, Any] | None:
    """Return each site's epsilon after this round. A site is charged for every round whose cohort it is in."""
    mechanism: PrivacyPlan | None = plan(study)
    if mechanism is None:
        return None
    # The whole cohort, not the survivors alone: a site that dropped out may have sent its update all the same.
    cohorts = [(statement["round"], statement["cohort"]) for statement in state.statements]
    cohorts.append((opened.round, list(opened.cohort)))
    sites = sorted({site for _, cohort in cohorts for site in cohort})
    rounds = {site: [number for number, cohort in cohorts if site in cohort] for site in sites}
    head = {} if mechanism.head is None else {"head": mechanism.head.document()}
    return {
        "unit": study.privacy.unit,
        "delta": mechanism.delta,
        "target": mechanism.target,
        "accountant": "prv",
        "training": mechanism.training.document(),
        "validation": None if mechanism.validation is None else mechanism.validation.document(),
        **head,
        "epsilon": {site: mechanism.spent(numbers) for site, numbers in rounds.items()},
    }
