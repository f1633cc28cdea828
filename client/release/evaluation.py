"""Evaluate a trained adapter beside its base, on files of a person's own.

The base alone is the same model with the study's initial adapter, whose B is zero. Both answer the same records, and
`privet.client.release.bootstrap` compares them. The result is a document of figures. It holds no text of a record:
what `Evaluation.shown` holds besides is for the site's own screen.

An evaluation at a site is not private: its figures follow from real records without noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from privet.client.release.answer_figures import (
    likelihood,
    sizes,
)
from privet.client.release.asking import ARMS, Asked, Made, Work, check_asked, make, prepare, trained_records
from privet.client.release.bootstrap import (
    CONFIDENCE,
    Figure,
    Measured,
    Resampling,
    compare,
    plain,
    verdict,
)
from privet.client.release.class_figures import classified
from privet.client.release.details import answer_details, class_details, entity_details, measures_document
from privet.client.release.entity_figures import entity_sums, tagged
from privet.client.release.group_figures import group_document
from privet.client.release.material import (
    MOST_GROUPS,
    UNNAMED,
    Material,
    prompt_text,
    read_material,
    readable_records,
    rows_trained_on,
    shared_rows,
    trained_on,
)
from privet.client.release.opened import Release, mounted
from privet.client.release.pair_figures import BY_DEFINITION, preferred
from privet.client.release.scoring import (
    Watch,
    silent,
)
from privet.client.site import Resources
from privet.client.training.forms import prompt_of, reference_of
from privet.client.training.model import initial_adapter

PRIMARY = {
    "text-classification": "accuracy",
    "token-classification": "f1",
    "causal-lm": "perplexity",
    "preference": "accuracy",
}
NOT_PRIVATE = (
    "These figures follow from the records without noise. They are not differentially private: they stay at the site, "
    "or leave it under the site's own rules for releasing figures."
)
_RESOURCES = Resources()
# Words that name the units of a column in a sentence; other columns are named themselves.
_UNITS = frozenset({"patient", "document", "person", "subject", "case", "report", "note", "article", "author"})


@dataclass(frozen=True)
class Evaluation:
    """The result.

    Attributes:
        document: Figures as JSON values, without a text of a record.
        shown: Texts of records with what base and tuned model make of them: for the site's own screen alone.
    """

    document: dict[str, Any]
    shown: tuple[dict[str, str], ...] = ()


def evaluate_release(
    release: Release, asked: Asked, resources: Resources = _RESOURCES, watch: Watch = silent
) -> Evaluation:
    """Evaluate a trained adapter beside its base.

    Args:
        release: The adapter and its study.
        asked: What to evaluate.
        resources: The machine; `physical_batch` bounds the records of a pass.
        watch: Receives progress.

    Raises:
        StudyError: The question does not fit the study's task, or the base cannot be opened.
        DataError: A file does not fit the study.
        VerificationError: The base is not the study's.
    """
    study = release.study
    check_asked(study, asked)
    material = read_material(study, asked.files, asked.by, asked.forms, asked.withdrawn)
    with mounted(release, resources) as host:
        work = prepare(host, study, asked, material)
        made = {}
        for arm, adapter in zip(ARMS, (initial_adapter(study, host), release.adapter), strict=True):
            host.mount(adapter)
            made[arm] = make(host, study, asked, work, resources.physical_batch, arm, watch)
        host.mount(release.adapter)
        texts = sizes(work.features, host.tokenizer) if study.task.kind == "causal-lm" else np.zeros((0, 2))
    watch("computing intervals", 0, 1)
    resampling = Resampling(material.records.units, asked.seed, asked.replicates)
    base, tuned = made["base"], made["tuned"]
    right: Figure | None = None
    if study.task.kind == "causal-lm":
        measured: Measured = likelihood(base.scores, tuned.scores, texts)
        details, right = answer_details(asked, material, work, base, tuned)
    elif study.task.kind == "preference":
        measured = preferred(base.pairs, tuned.pairs)
        details, right = answer_details(asked, material, work, base, tuned)
    elif study.task.kind == "text-classification":
        truth = np.array([row["label"] for row in material.records.rows], np.int64)
        measured = classified(truth, base.probabilities, tuned.probabilities)
        details = class_details(study, asked, material, resampling, truth, base.probabilities, tuned.probabilities)
    else:
        rows = [entity_sums(own.scores, study.task.labels) for own in (base, tuned)]
        measured = tagged(rows[0], rows[1], study.task.labels)
        details = entity_details(study, asked, material, resampling, rows[0], rows[1])
    document = _document(release, asked, material, resampling, measured, details, right)
    cut = sum(len(feature.ids) >= study.data.max_length for feature in work.features)
    document["reach_max_length"] = cut
    document["notes"] = _notes(release, asked, material, cut)
    watch("computing intervals", 1, 1)
    return Evaluation(document, _texts(asked, material, work, base, tuned))


# --- the document ----------------------------------------------------------------------------------------


def _document(
    release: Release,
    asked: Asked,
    material: Material,
    resampling: Resampling,
    measured: Measured,
    details: Mapping[str, Any],
    right: Figure | None,
) -> dict[str, Any]:
    study, units = release.study, material.records.units
    found = compare(measured, resampling)
    names = [measure.name for measure in measured.measures]
    primary = names.index(PRIMARY[study.task.kind])
    measure = measured.measures[primary]
    of_what = f"{len(units)} records of {_counted(resampling.units, material.unit_column)}"
    groups = {}
    kinds: dict[str, Sequence[str]] = dict(material.groups)
    if set(material.sites) != {UNNAMED}:
        kinds = {"site": material.sites, **kinds}
    for kind, values in kinds.items():
        groups[kind] = group_document(kind, values, measured, measure, resampling, units, asked.smallest, MOST_GROUPS)
    document: dict[str, Any] = {
        "run": release.path.name,
        "study": study.name,
        "study_digest": study.digest,
        "adapter_digest": release.adapter.digest,
        "task": study.task.kind,
        "files": list(material.files),
        "records": len(units),
        "units": resampling.units,
        "unit_column": material.unit_column,
        "dropped": dict(material.dropped),
        "confidence": CONFIDENCE,
        "replicates": asked.replicates,
        "seed": asked.seed,
        "smallest": asked.smallest,
        "primary": measure.name,
        "verdict": verdict(Figure(measure, found[primary], of_what), *([] if right is None else [right])),
        "measures": measures_document(measured.measures, found) | details.get("measures", {}),
        "groups": groups,
    }
    return document | {key: plain(value) for key, value in details.items() if key != "measures"}


def _counted(units: int, column: str | None) -> str:
    if column is None:
        return f"{units} distinct texts"
    if column in _UNITS:
        return f"{units} {column}{'' if units == 1 else 's'}"
    return f"{units} values of {column}"


def _notes(release: Release, asked: Asked, material: Material, cut: int) -> list[str]:
    study, notes = release.study, [NOT_PRIVATE]
    trained = trained_on(release.path, asked.files)
    if trained:
        notes.append(
            f"WARNING: this run was trained on {', '.join(trained)}. Figures on training records say nothing about "
            "others."
        )
    elif known := rows_trained_on(release.path, study, material.records):
        notes.append(
            f"WARNING: {known} of {len(material.records)} records are equal to records that this run was trained on. "
            "Figures on training records say nothing about others."
        )
    elif own := shared_rows(material.records, readable_records(study, asked.own, asked.forms.of)):
        notes.append(
            f"WARNING: {own} of {len(material.records)} records are in this site's training files. Figures on records "
            "that trained the model say nothing about others."
        )
    if asked.train:
        shared = shared_rows(material.records, trained_records(study, asked))
        if shared:
            notes.append(f"WARNING: {shared} of {len(material.records)} records are also in the files of --train.")
    if study.task.kind == "preference":
        notes.append(BY_DEFINITION)
    if not study.task.generates:
        notes.append("The base alone has no trained head: it gives all labels the same probability.")
    if cut:
        notes.append(
            f"{cut} of {len(material.records)} records reach data.max_length ({study.data.max_length} tokens). Of "
            "these, only the part that fits is evaluated."
        )
    if material.unit_column is None and study.data.unit is not None:
        notes.append(
            f"The files have no column {study.data.unit}, so each distinct record counts as a unit. If several records "
            "are of one patient or document, the intervals are too narrow."
        )
    return notes


def _texts(asked: Asked, material: Material, work: Work, base: Made, tuned: Made) -> tuple[dict[str, str], ...]:
    """Return texts of a few records for the screen."""
    found = []
    for place, index in enumerate(work.chosen[: asked.show]):
        row = material.records.rows[index]
        answers = {arm: own.answers[place] for arm, own in zip(ARMS, (base, tuned), strict=True)}
        found.append({"prompt": prompt_text(prompt_of(row)), "reference": reference_of(row), **answers})
    return tuple(found)
