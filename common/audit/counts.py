"""The result of a study that counts: its sums with intervals, the figures that follow, and what an auditor checks.

An interval covers what is not known with 95 %: of a count, the noise; of a mean over units, also which units there
are. Everything here follows from the study and the statement of its round, so anybody can compute it again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

from privet.common.errors import VerificationError
from privet.common.log.agreement import RoundStatement
from privet.common.masking.noise_shares import deviation_of_sum, shared_noise
from privet.common.study.counts import CONFUSION, CORRECT, LABEL, LENGTH, LOSS, MISSING, RECORDS, UNITS, cells_of
from privet.common.study.sections import VALIDATION_LOSS_CAP
from privet.common.study.study import Study

COUNTS = "counts.json"
"""Name of the file in a release."""

CONFIDENCE = 0.95
_QUANTILE = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
# A sum of whole levels is kept in float64: so far may it lie from a whole number of them.
_OFF = 1e-3


def counts_document(study: Study, statements: Sequence[RoundStatement]) -> dict[str, Any]:
    """Return the result of a study that counts as plain JSON values.

    Args:
        study: The study.
        statements: Of its rounds, of which the last closed one holds the result.

    Returns:
        `cells`: name, meaning, count and interval of each; `figures`: what follows from them, with intervals. Both are
        empty where no round was closed.
    """
    closed = [statement for statement in statements if statement["type"] == "round-close"]
    document: dict[str, Any] = {
        "format": 1,
        "kind": study.kind,
        "study": study.digest,
        "unit": study.privacy.unit,
        "sites": 0,
        "confidence": CONFIDENCE,
        "deviation": 0.0,
        "cells": [],
        "figures": [],
    }
    if not closed:
        return document
    statement = closed[-1]
    deviation, metrics = deviation_of(study, statement), statement["metrics"]
    document |= {
        "sites": len(statement["survivors"]),
        "deviation": deviation,
        "cells": [
            {"name": name, "title": title, **_interval(metrics[name], _QUANTILE * deviation)}
            for name, title in cells_of(study).titles.items()
        ],
        "figures": (_shares if study.kind == "statistics" else _scores)(study, metrics, deviation),
    }
    return document


def deviation_of(study: Study, statement: RoundStatement) -> float:
    """Return the standard deviation of the noise on each count of a closed round; 0 without privacy."""
    asked, survivors = len(statement["cohort"]), len(statement["survivors"])
    return deviation_of_sum(study, asked, survivors) / cells_of(study).scale


def _interval(value: float, margin: float, low: float = -math.inf, high: float = math.inf) -> dict[str, float]:
    return {"value": value, "low": max(value - margin, low), "high": min(value + margin, high)}


def _shares(study: Study, metrics: Mapping[str, float], deviation: float) -> list[dict[str, Any]]:
    """Return the share of each label and of incomplete records; intervals cover the noise."""
    complete = records_of(metrics)
    if complete <= 0:
        return []
    found = [
        {"title": f"share of {title}", **_ratio(metrics[name], complete, deviation, 0.0)}
        for name, title in cells_of(study).titles.items()
        if name.startswith(f"{LABEL}.")
    ]
    every = complete + metrics[MISSING]
    title = f"share of {cells_of(study).titles[MISSING]}"
    return [*found, {"title": title, **_ratio(metrics[MISSING], every, deviation, 0.0)}] if every > 0 else found


def records_of(metrics: Mapping[str, float]) -> float:
    """Return the number of complete records: counted as such, or units less incomplete ones where each is one."""
    return metrics[RECORDS] if RECORDS in metrics else metrics[UNITS] - metrics[MISSING]


def _scores(study: Study, metrics: Mapping[str, float], deviation: float) -> list[dict[str, Any]]:
    """Return accuracy and loss, and what follows from the confusion matrix; intervals cover noise and sampling."""
    units = metrics[UNITS]
    if units <= 0:
        return []
    # Of values from 0 to 1, p (1 - p) is the largest variance.
    found = [{"title": "accuracy", **_ratio(metrics[CORRECT], units, deviation, 1.0)}]
    loss = _ratio(metrics[LOSS], units, deviation, 1.0)
    found.append({"title": "loss", **{name: value * VALIDATION_LOSS_CAP for name, value in loss.items()}})
    names, classes = cells_of(study).names, len(study.task.labels)
    if f"{CONFUSION}.0" in names:
        rows = [[metrics[f"{CONFUSION}.{i * classes + j}"] for j in range(classes)] for i in range(classes)]
        for k, label in enumerate(study.task.labels):
            right, true = rows[k][k], sum(rows[k])
            if true > 0:
                found.append({"title": f"recall of {label}", **_ratio(right, true, deviation, 1.0, classes)})
    return found


def _ratio(part: float, whole: float, deviation: float, sampled: float, cells: int = 1) -> dict[str, float]:
    """Return a ratio of two noisy counts within 0 to 1, by the delta method.

    Args:
        part: The numerator.
        whole: The denominator, above 0.
        deviation: Of the noise on one cell.
        sampled: 1 where the units are a sample, whose own variance counts; 0 where they are all there is.
        cells: Cells that are added up to the denominator.
    """
    ratio = min(max(part / whole, 0.0), 1.0)
    noise = deviation**2 * (1 + cells * ratio**2) / whole**2
    # Agresti and Coull (1998): two more successes and failures, so that 0 and 1 have an interval as well.
    adjusted = (ratio * whole + 2) / (whole + 4)
    sampling = sampled * adjusted * (1 - adjusted) / (whole + 4)
    return _interval(ratio, _QUANTILE * math.sqrt(noise + sampling), 0.0, 1.0)


def check_counts(study: Study, statement: RoundStatement) -> None:
    """Check what the statement of a closed round owes to a study that counts.

    Raises:
        VerificationError: It trained something, has other cells than the study, or values that no such sum has.
    """
    where, metrics = f"round {statement['round']}", statement["metrics"]
    if statement["adapter_after"] != statement["adapter_before"]:
        raise VerificationError(f"{where}: a study of kind {study.kind} trains nothing, but the adapter has changed")
    names = cells_of(study).names
    if metrics is None or set(metrics) != set(names):
        raise VerificationError(f"{where}: expected the {len(names)} counts of the study, found others")
    if not study.distributed:
        return
    # Shares of the noise are whole levels, so the sum is. Another value was not unmasked, but made up.
    unit = shared_noise(study, len(statement["cohort"]), head=True).level / cells_of(study).scale
    for name in names:
        levels = metrics[name] / unit
        if not math.isfinite(levels) or abs(levels - round(levels)) > _OFF:
            raise VerificationError(f"{where}: the count {name} is no sum of whole levels of the sites' noise")


def drift(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return by how much the shares of labels and of lengths moved between two results.

    The distance is that of total variation: half the sum of the absolute differences of shares, 0 to 1. `noise` is its
    mean where nothing moved, from the noise alone. It computes with what was released, so it costs no privacy.

    Args:
        before: An earlier result, as `counts_document` returns it.
        after: A later one.
    """
    found = []
    for block in (LABEL, LENGTH):
        first, second = (_block(document, block) for document in (before, after))
        if [cell["title"] for cell in first] != [cell["title"] for cell in second] or not first:
            continue
        totals = [sum(cell["value"] for cell in cells) for cells in (first, second)]
        if min(totals) <= 0:
            continue
        shares = [
            [cell["value"] / total for cell in cells] for cells, total in zip((first, second), totals, strict=True)
        ]
        deviation = math.hypot(before["deviation"] / totals[0], after["deviation"] / totals[1])
        distance = sum(abs(a - b) for a, b in zip(*shares, strict=True)) / 2
        # E|N(0, s²)| = s sqrt(2 / pi)
        noise = len(first) * deviation * math.sqrt(2 / math.pi) / 2
        found.append({"block": block, "distance": min(distance, 1.0), "noise": min(noise, 1.0)})
    return found


def _block(document: Mapping[str, Any], block: str) -> list[Mapping[str, Any]]:
    return [cell for cell in document["cells"] if cell["name"].startswith(f"{block}.")]


def count_lines(document: Mapping[str, Any]) -> list[str]:
    """Return a result as lines of text: each cell and figure with its interval."""
    rows = count_rows(document)
    width = max((len(title) for title, *_ in rows), default=0)
    return [f"{title:<{width}}  {value:>10}  {interval}" for title, value, interval in rows]


def count_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of a result's table: meaning, value and interval of each count and figure."""
    parts = ((document["cells"], ",.1f"), (document["figures"], ".3f"))
    return [
        [each["title"], format(each["value"], form), f"{each['low']:{form}} to {each['high']:{form}}"]
        for rows, form in parts
        for each in rows
    ]
