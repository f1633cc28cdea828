"""The figures of each task, as JSON values: similarity, classes, calibration, thresholds, entities, memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from privet.client.pages.suppression import hidden
from privet.client.release import memorisation
from privet.client.release.answer_figures import (
    ANSWERS,
    CHOICES,
    EXACT,
    answer_sums,
    choice_sums,
    closed,
    part_sums,
    right_part,
)
from privet.client.release.asking import ARMS, Asked, Made, Work
from privet.client.release.bootstrap import (
    Array,
    Compared,
    Figure,
    Measure,
    Measured,
    Resampling,
    as_document,
    between,
    compare,
    plain,
    shown,
)
from privet.client.release.class_figures import by_class, confusion, ranking, reliability, thresholds
from privet.client.release.entity_figures import of_type, types_of
from privet.client.release.material import (
    Material,
)
from privet.client.training.forms import reference_of
from privet.common.progress import number_of
from privet.common.study.study import Study


def measures_document(measures: Sequence[Measure], found: Sequence[Compared]) -> dict[str, Any]:
    """Return comparisons as JSON values, by the measure's name."""
    return {measure.name: as_document(measure, own) for measure, own in zip(measures, found, strict=True)}


def answer_details(
    asked: Asked, material: Material, work: Work, base: Made, tuned: Made
) -> tuple[dict[str, Any], Figure | None]:
    """Return the figures of generated answers and multiple choice, and what the model repeats.

    Where answers, or a part of them, are right or wrong, the share of right ones comes as a figure too.

    Raises:
        DataError: A reference answer lacks the part that is compared.
    """
    details: dict[str, Any] = {}
    right: Figure | None = None
    measures: dict[str, Any] = {}
    if work.chosen:
        rows, units = material.records.rows, material.records.units
        references = [reference_of(rows[index]) for index in work.chosen]
        sums = [answer_sums(references, own.answers) for own in (base, tuned)]
        resampling = Resampling([units[index] for index in work.chosen], asked.seed, asked.replicates)
        found = compare(Measured(ANSWERS, sums[0], sums[1]), resampling)
        measures |= measures_document(ANSWERS, found)
        of_what = number_of(len(references), "answer")
        if asked.part is not None:
            measured = (right_part(asked.part),)
            parts = [part_sums(references, own.answers, asked.part) for own in (base, tuned)]
            shares = compare(Measured(measured, parts[0], parts[1]), resampling)
            measures |= measures_document(measured, shares)
            right = Figure(measured[0], shares[0], of_what)
        elif closed(references):
            place = ANSWERS.index(EXACT)
            right = Figure(EXACT, found[place], of_what)
    if work.questions:
        texts, places = [q.choices for q in work.questions], [q.right for q in work.questions]
        sums = [choice_sums(own.choices, texts, places) for own in (base, tuned)]
        resampling = Resampling([q.unit for q in work.questions], asked.seed, asked.replicates)
        measures |= measures_document(CHOICES, compare(Measured(CHOICES, sums[0], sums[1]), resampling))
        chance = float(np.mean([1 / len(choices) for choices in texts]))
        details["chance"] = chance
    details["measures"] = measures
    if work.trained:
        details["repeated"] = _repeated_document(asked, work, base, tuned)
    if work.canaries:
        details["canaries"] = _canary_document(asked, work, base, tuned)
    return details, right


def _repeated_document(asked: Asked, work: Work, base: Made, tuned: Made) -> dict[str, Any]:
    document: dict[str, Any] = {"prefix_tokens": memorisation.PREFIX, "continued_tokens": memorisation.CONTINUED}
    document["samples"] = asked.samples
    longest: dict[str, dict[str, list[int]]] = {}
    for name, openings in (("trained", work.trained), ("unseen", work.unseen)):
        if not openings:
            document[name] = None
            continue
        rows = {}
        longest[name] = {}
        for arm, own in zip(ARMS, (base, tuned), strict=True):
            rows[arm], longest[name][arm] = memorisation.run_sums(openings, getattr(own, name))
        resampling = Resampling([str(place) for place in range(len(openings))], asked.seed, asked.replicates)
        found = compare(memorisation.repeated(rows["base"], rows["tuned"]), resampling)
        document[name] = {"answers": len(openings), "measures": measures_document(memorisation.REPEATED, found)}
        document[name]["only_tuned"] = {
            str(run): memorisation.newly(longest[name]["base"], longest[name]["tuned"], run)
            for run in memorisation.RUNS
        }
    run = memorisation.RUNS[0]
    only = document["trained"]["only_tuned"][str(run)]
    says = (
        f"{run} words in a row that tuned repeats and base does not: in {only} of {len(work.trained)} training answers"
    )
    if document["unseen"]:
        others = document["unseen"]["only_tuned"][str(run)]
        says += f", and in {others} of {len(work.unseen)} answers outside the training files"
    says += "."
    document["says"] = says
    return document


def _canary_document(asked: Asked, work: Work, base: Made, tuned: Made) -> dict[str, Any]:
    most = float(np.log2(asked.alternatives + 1))
    sums = [memorisation.canary_sums(own.canaries) for own in (base, tuned)]
    measures = memorisation.canary_measures(most)
    resampling = Resampling([str(place) for place in range(len(work.canaries))], asked.seed, asked.replicates)
    found = compare(Measured(measures, sums[0], sums[1]), resampling)
    first = [int(own[:, 1].sum()) for own in sums]
    says = (
        f"Tuned ranks {first[1]} of {len(work.canaries)} planted canaries first among {asked.alternatives} "
        f"alternatives, base {first[0]}. Mean exposure: tuned {shown(found[0].tuned.value)} bits, base "
        f"{shown(found[0].base.value)}; about 1.4 without memory, at most {most:.1f}. What training left "
        f"shows in the difference: {between(found[0].difference, signed=True)} bits."
    )
    return {
        "canaries": len(work.canaries),
        "alternatives": asked.alternatives,
        "largest": most,
        "measures": measures_document(measures, found),
        "says": says,
    }


def class_details(
    study: Study,
    asked: Asked,
    material: Material,
    resampling: Resampling,
    truth: Any,
    base: Array,
    tuned: Array,
) -> dict[str, Any]:
    """Return figures by class, confusion, calibration, and thresholds, from probabilities [n, classes]."""
    labels, units = study.task.labels, material.records.units
    counts = _units_of([labels[place] for place in truth], units)
    secret = hidden(counts, asked.smallest)
    classes = []
    for place, label in enumerate(labels):
        if label in secret:
            classes.append({"label": label, "hidden": True})
            continue
        measured = by_class(truth, base, tuned, place)
        found = measures_document(measured.measures, compare(measured, resampling))
        row = {"label": label, "hidden": False, "records": int(np.sum(truth == place)), "measures": found}
        classes.append(row)
    calibration = {}
    for arm, own in zip(ARMS, (base, tuned), strict=True):
        error, table = reliability(truth, own)
        calibration[arm] = {"ece": error, "table": table}
    details: dict[str, Any] = {
        "classes": classes,
        "confusion": confusion(truth, tuned, labels, units, asked.smallest),
        "calibration": calibration,
        "most_frequent": {
            "label": labels[int(np.bincount(truth).argmax())],
            "accuracy": float(np.bincount(truth).max() / len(truth)),
        },
    }
    if asked.positive is not None:
        details["positive"] = _positive_document(asked, labels, truth, base, tuned, resampling, secret)
    return details


def _positive_document(
    asked: Asked,
    labels: Sequence[str],
    truth: Any,
    base: Array,
    tuned: Array,
    resampling: Resampling,
    secret: frozenset[str],
) -> dict[str, Any]:
    label = str(asked.positive)
    place = labels.index(label)
    positive = truth == place
    if label in secret or not positive.any() or positive.all():
        return {"label": label, "says": f"{label}: not shown, as the file has too few texts of it or of the others."}
    areas = ranking(positive, base[:, place], tuned[:, place], resampling)
    table = thresholds(positive, tuned[:, place], resampling)
    best = next(row for row in table if row["youden"])
    return {
        "label": label,
        "measures": {measure.name: as_document(measure, found) for measure, found in areas},
        "thresholds": plain(table),
        "says": f"Best threshold by Youden's index: {best['threshold']:.2g}. It was chosen on this very file, so its "
        "figures are too good: check it on another file before use.",
    }


def entity_details(
    study: Study, asked: Asked, material: Material, resampling: Resampling, base: Array, tuned: Array
) -> dict[str, Any]:
    """Return figures by type of entity, from `entity_sums` of base and tuned model."""
    labels, units = study.task.labels, np.array(material.records.units, dtype=object)
    types, rows = types_of(labels), []
    holds = {
        kind: np.array([any(labels[tag][2:] == kind for tag in row["tags"]) for row in material.records.rows])
        for kind in types
    }
    counts = {kind: float(len(set(units[own].tolist()))) for kind, own in holds.items()}
    secret = hidden(counts, asked.smallest)
    for place, kind in enumerate(types):
        if kind in secret:
            rows.append({"label": kind, "hidden": True})
            continue
        measured = of_type(base, tuned, place)
        found = measures_document(measured.measures, compare(measured, resampling))
        rows.append({"label": kind, "hidden": False, "records": int(holds[kind].sum()), "measures": found})
    return {"entities": rows}


def _units_of(names: Sequence[str], units: Sequence[str]) -> dict[str, float]:
    """Return the number of units of each name."""
    found: dict[str, set[str]] = {}
    for name, unit in zip(names, units, strict=True):
        found.setdefault(name, set()).add(unit)
    return {name: float(len(own)) for name, own in found.items()}
