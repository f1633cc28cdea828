"""What each site brings and gains: the records that it trains on, and the results on its own test records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from privet.client.training.data import concatenate, count_labels, load_files
from privet.client.training.scores import Tally
from privet.common.study.study import Study
from privet.simulations.engines.memory import load_sites

_LOWER = {"perplexity"}


def better(metric: str, value: float, other: float) -> bool:
    """Return whether a value of a metric is better than another one. Equal values are not."""
    return value < other if lower_is_better(metric) else value > other


def lower_is_better(metric: str) -> bool:
    """Return whether less of a metric is better."""
    return metric in _LOWER


def own_records(
    federated: Mapping[str, Tally], alone: Mapping[str, Tally], labels: Sequence[str], metric: str
) -> dict[str, dict[str, float | None]]:
    """Return each site's results on its own test records.

    Args:
        federated: Statistics of the federated adapter, by site.
        alone: Statistics of the adapter that each site trained alone, on the site's own test records; a site that was
            not trained alone is missing.
        labels: The labels of the study.
        metric: The metric to return.

    Returns:
        By site: the number of `records`, and the metric of the federated adapter (`together`) and of the site's own
        baseline (`alone`, None without it).
    """
    found: dict[str, dict[str, float | None]] = {}
    for site, tally in federated.items():
        together = tally.metrics(labels)
        value = alone[site].metrics(labels)[metric] if site in alone else None
        found[site] = {"records": together["records"], "together": together[metric], "alone": value}
    return found


def better_together(rows: Mapping[str, Mapping[str, Any]], metric: str) -> dict[str, int] | None:
    """Return how many sites (`better`, of `sites`) do better together than alone; None if no site trained alone."""
    pairs = [(row["together"], row["alone"]) for row in rows.values() if row.get("alone") is not None]
    if not pairs:
        return None
    return {"better": sum(better(metric, *pair) for pair in pairs), "sites": len(pairs)}


def training_records(study: Study, files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return how many records, and patients where the study names their column, each site's training files hold.

    Where they hold no record of some of the study's labels, these are named as well: such a site learns of them from
    the others alone.

    Units that are held out for validation count.

    Raises:
        StudyError, DataError: A file does not fit the study.
    """
    found: dict[str, dict[str, Any]] = {}
    for site in load_sites(files):
        records = concatenate(load_files(site, study)[0])
        patients = None if study.data.unit is None else len(records.by_unit())
        found[site.name] = {"records": len(records), "patients": patients}
        if missing := [label for label, count in count_labels(records, study).items() if not count]:
            found[site.name]["missing_labels"] = missing
    return found
