"""How long the training records of a plan are in tokens, for `privet check`."""

from __future__ import annotations

from typing import Any

from privet.client.training.data import concatenate, load_records
from privet.client.training.features import Lengths, measure_records
from privet.simulations.data.federation import Plan

_MOST = 10_000


def training_lengths(plan: Plan, tokenizer: Any) -> Lengths | None:
    """Return the lengths of a plan's training records, of the first 10,000; None if the plan names no file that exists.

    Raises:
        StudyError, DataError: The files do not fit the study, or the base's chat template does not take them.
    """
    simulation = plan.simulation
    sources = [*simulation.sites.values(), *([] if simulation.partition is None else [simulation.partition])]
    placed = [source.within(plan.root) for source in sources]
    named = [(path, source.form_of(path)) for source in placed for path in source.train]
    parts, left = [], _MOST
    for path, form in named:
        if left and path.is_file():
            records, _ = load_records(path, plan.study, rule=simulation.patient_ids, form=form)
            parts.append(records.select(range(min(left, len(records)))))
            left -= len(parts[-1])
    return measure_records(plan.study, tokenizer, concatenate(parts)) if parts else None
