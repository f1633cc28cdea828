"""Evaluate a trained adapter beside its base, on files of a person's own.

The base alone is the same model with the study's initial adapter, whose B is zero. Both answer the same records, and
`privet.client.release.bootstrap` compares them. The result is a document of figures. It holds no text of a record:
what `Evaluation.shown` holds besides is for the site's own screen.

An evaluation at a site is not private: its figures follow from real records without noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from privet.client.pages.suppression import SMALLEST, hidden
from privet.client.release import memorisation
from privet.client.release.answer_figures import (
    ANSWERS,
    CHOICES,
    answer_sums,
    choice_sums,
    likelihood,
    sizes,
)
from privet.client.release.bootstrap import (
    CONFIDENCE,
    REPLICATES,
    Array,
    Compared,
    Measure,
    Measured,
    Resampling,
    as_document,
    compare,
    plain,
    shown,
    verdict,
)
from privet.client.release.class_figures import by_class, classified, confusion, ranking, reliability, thresholds
from privet.client.release.entity_figures import entity_sums, of_type, tagged, types_of
from privet.client.release.group_figures import group_document
from privet.client.release.material import (
    MOST_GROUPS,
    UNNAMED,
    Material,
    Question,
    pair_of,
    read_material,
    read_questions,
    row_of,
    shared_rows,
    trained_on,
)
from privet.client.release.opened import Release, mounted
from privet.client.release.scoring import (
    Watch,
    answers_of,
    class_probabilities,
    continuations_of,
    scores_of,
    silent,
)
from privet.client.site import Resources
from privet.client.training.data import Records, load_records
from privet.client.training.features import Feature, encode_records
from privet.client.training.host import ModelHost
from privet.client.training.model import initial_adapter
from privet.client.training.passes import Score
from privet.common.errors import StudyError
from privet.common.study.study import Study

PRIMARY = {"text-classification": "accuracy", "token-classification": "f1", "causal-lm": "perplexity"}
NOT_PRIVATE = (
    "These figures follow from real records without noise. They are not differentially private: they stay at the site, "
    "or leave it under the site's own rules for releasing figures."
)
_RESOURCES = Resources()
_ARMS = ("base", "tuned")
# Words that name the units of a column in a sentence; other columns are named themselves.
_UNITS = frozenset({"patient", "document", "person", "subject", "case", "report", "note", "article", "author"})


@dataclass(frozen=True)
class Asked:
    """What to evaluate.

    Attributes:
        files: Site and path of each file of records; `material.UNNAMED` for a file of no named site.
        by: Columns to group by.
        seed: Decides replicates, samples and alternatives.
        replicates: Number of replicates of the bootstrap.
        smallest: Least number of units of a group that is shown.
        answers: For causal-lm: most records whose answers are generated.
        show: Records whose texts are returned for the screen.
        positive: For text-classification: the class of the threshold table.
        choices: For causal-lm: column of choices.
        right: Column of the right choice; None: the study's answer.
        train: Files that the run was trained on, to look for what the model repeats.
        openings: Most answers of these files that the model continues.
        samples: Sampled continuations of each, besides the greedy one.
        canaries: File of planted records.
        alternatives: Random alternatives of each canary.
    """

    files: tuple[tuple[str, Path], ...]
    by: tuple[str, ...] = ()
    seed: int = 0
    replicates: int = REPLICATES
    smallest: int = SMALLEST
    answers: int = 64
    show: int = 0
    positive: str | None = None
    choices: str | None = None
    right: str | None = None
    train: tuple[Path, ...] = ()
    openings: int = 64
    samples: int = 0
    canaries: Path | None = None
    alternatives: int = 100


@dataclass(frozen=True)
class Evaluation:
    """The result.

    Attributes:
        document: Figures as JSON values, without a text of a record.
        shown: Texts of records with what base and tuned model make of them: for the site's own screen alone.
    """

    document: dict[str, Any]
    shown: tuple[dict[str, str], ...] = ()


@dataclass
class _Work:
    """What both models are asked."""

    features: Sequence[Feature]
    chosen: Sequence[int] = ()
    prompts: Sequence[str] = ()
    questions: Sequence[Question] = ()
    trained: Sequence[memorisation.Opening] = ()
    unseen: Sequence[memorisation.Opening] = ()
    canaries: Sequence[memorisation.Canary] = ()


@dataclass
class _Made:
    """What one model makes of it."""

    scores: Sequence[Score] = ()
    probabilities: Array = field(default_factory=lambda: np.zeros((0, 0)))
    answers: Sequence[str] = ()
    choices: Sequence[Sequence[float]] = ()
    trained: Sequence[Sequence[str]] = ()
    unseen: Sequence[Sequence[str]] = ()
    canaries: Sequence[Sequence[float]] = ()


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
    _check(study, asked)
    material = read_material(study, asked.files, asked.by)
    with mounted(release, resources) as host:
        work = _work(host, study, asked, material)
        made = {}
        for arm, adapter in zip(_ARMS, (initial_adapter(study, host), release.adapter), strict=True):
            host.mount(adapter)
            made[arm] = _make(host, study, asked, work, resources.physical_batch, arm, watch)
        host.mount(release.adapter)
        texts = sizes(work.features, host.tokenizer) if study.task.kind == "causal-lm" else np.zeros((0, 2))
    resampling = Resampling(material.records.units, asked.seed, asked.replicates)
    base, tuned = made["base"], made["tuned"]
    if study.task.kind == "causal-lm":
        measured: Measured = likelihood(base.scores, tuned.scores, texts)
        details = _answer_details(asked, material, work, base, tuned)
    elif study.task.kind == "text-classification":
        truth = np.array([row["label"] for row in material.records.rows], np.int64)
        measured = classified(truth, base.probabilities, tuned.probabilities)
        details = _class_details(study, asked, material, resampling, truth, base.probabilities, tuned.probabilities)
    else:
        rows = [entity_sums(own.scores, study.task.labels) for own in (base, tuned)]
        measured = tagged(rows[0], rows[1], study.task.labels)
        details = _entity_details(study, asked, material, resampling, rows[0], rows[1])
    document = _document(release, asked, material, resampling, measured, details)
    cut = sum(len(feature.ids) >= study.data.max_length for feature in work.features)
    document["reach_max_length"] = cut
    document["notes"] = _notes(release, asked, material, cut)
    return Evaluation(document, _texts(asked, material, work, base, tuned))


def _check(study: Study, asked: Asked) -> None:
    """Check that the question fits the study's task."""
    kind = study.task.kind
    for given, option, wanted in (
        (asked.positive, "--positive", "text-classification"),
        (asked.choices, "--choices", "causal-lm"),
        (asked.train, "--train", "causal-lm"),
        (asked.canaries, "--canaries", "causal-lm"),
        (asked.show, "--show", "causal-lm"),
    ):
        if given and kind != wanted:
            raise StudyError(
                f"{option}: expected a study of the task {wanted}, found one of the task {kind}",
                f"leave {option} out",
            )
    if asked.positive and asked.positive not in study.task.labels:
        raise StudyError(
            f"--positive: expected one of the labels {', '.join(study.task.labels)}, found {asked.positive}",
            "name one of these labels",
        )
    if asked.right and not asked.choices:
        raise StudyError("--right: expected --choices beside it", "name the column of choices with --choices COLUMN")


# --- asking both models ----------------------------------------------------------------------------------


def _work(host: ModelHost, study: Study, asked: Asked, material: Material) -> _Work:
    rows, tokenizer = material.records.rows, host.tokenizer
    work = _Work(encode_records(study, tokenizer, material.records))
    if study.task.kind != "causal-lm":
        return work
    work.chosen = sorted(memorisation.shuffled(len(rows), asked.seed, "answers")[: asked.answers])
    work.prompts = [pair_of(rows[index])[0] for index in work.chosen]
    if asked.choices is not None:
        work.questions = read_questions(study, asked.files, asked.choices, asked.right, material.unit_column)
    if asked.train:
        trained = _trained(study, asked)
        features = encode_records(study, tokenizer, trained)
        work.trained = memorisation.openings(features, tokenizer, asked.openings, asked.seed)
        # Records that are in both are no control.
        known = {feature.ids for feature in features}
        others = [feature for feature in work.features if feature.ids not in known]
        work.unseen = memorisation.openings(others, tokenizer, asked.openings, asked.seed)
        if not work.trained:
            raise StudyError(
                f"--train: expected answers of at least {memorisation.PREFIX} tokens and {memorisation.RUNS[0]} words "
                "more, found none",
                "leave --train out: so short answers hold no run of words to repeat",
            )
    if asked.canaries is not None:
        columns = study.data.columns
        work.canaries = memorisation.read_canaries(
            asked.canaries, columns.get("prompt", "prompt"), columns.get("answer", "answer")
        )
    return work


def _trained(study: Study, asked: Asked) -> Records:
    bare = study.model_copy(update={"data": study.data.model_copy(update={"unit": None})})
    parts = [load_records(path, bare, training=False)[0] for path in asked.train]
    return Records(tuple(row for part in parts for row in part.rows), tuple(u for part in parts for u in part.units))


def _make(host: ModelHost, study: Study, asked: Asked, work: _Work, most: int, arm: str, watch: Watch) -> _Made:
    if study.task.kind == "text-classification":
        return _Made(probabilities=class_probabilities(host, work.features, most, f"{arm}: scoring", watch))
    made = _Made(scores=scores_of(host, work.features, most, f"{arm}: scoring", watch))
    if work.prompts:
        made.answers = answers_of(host, study, work.prompts, f"{arm}: answering", watch)

    def nats(pairs: Sequence[tuple[str, str]], what: str) -> list[float]:
        rows = tuple(row_of(*pair) for pair in pairs)
        features = encode_records(study, host.tokenizer, Records(rows, ("",) * len(rows)))
        return [score.total for score in scores_of(host, features, most, f"{arm}: {what}", watch)]

    if work.questions:
        flat = iter(nats([(q.prompt, text) for q in work.questions for text in q.choices], "choosing"))
        made.choices = [[next(flat) for _ in question.choices] for question in work.questions]
    if work.trained:
        made.trained = _continued(host, asked, work.trained, f"{arm}: continuing training answers", watch)
        made.unseen = _continued(host, asked, work.unseen, f"{arm}: continuing other answers", watch)
    if work.canaries:
        made.canaries = memorisation.canary_losses(
            work.canaries, asked.alternatives, asked.seed, lambda pairs: nats(pairs, "ranking canaries")
        )
    return made


def _continued(
    host: ModelHost, asked: Asked, openings: Sequence[memorisation.Opening], what: str, watch: Watch
) -> list[list[str]]:
    """Return the greedy and the sampled continuations of each opening."""
    heads = [opening.head for opening in openings]
    seeds = [None, *(asked.seed + number + 1 for number in range(asked.samples))]
    runs = [continuations_of(host, heads, memorisation.CONTINUED, seed, what, watch) for seed in seeds]
    return [list(texts) for texts in zip(*runs, strict=True)]


# --- figures of each task --------------------------------------------------------------------------------


def _measures(measures: Sequence[Measure], found: Sequence[Compared]) -> dict[str, Any]:
    return {measure.name: as_document(measure, own) for measure, own in zip(measures, found, strict=True)}


def _answer_details(asked: Asked, material: Material, work: _Work, base: _Made, tuned: _Made) -> dict[str, Any]:
    details: dict[str, Any] = {}
    measures: dict[str, Any] = {}
    if work.chosen:
        rows, units = material.records.rows, material.records.units
        references = [pair_of(rows[index])[1] for index in work.chosen]
        sums = [answer_sums(references, own.answers) for own in (base, tuned)]
        resampling = Resampling([units[index] for index in work.chosen], asked.seed, asked.replicates)
        measures |= _measures(ANSWERS, compare(Measured(ANSWERS, sums[0], sums[1]), resampling))
    if work.questions:
        texts, right = [q.choices for q in work.questions], [q.right for q in work.questions]
        sums = [choice_sums(own.choices, texts, right) for own in (base, tuned)]
        resampling = Resampling([q.unit for q in work.questions], asked.seed, asked.replicates)
        measures |= _measures(CHOICES, compare(Measured(CHOICES, sums[0], sums[1]), resampling))
        chance = float(np.mean([1 / len(choices) for choices in texts]))
        details["chance"] = chance
    details["measures"] = measures
    if work.trained:
        details["repeated"] = _repeated_document(asked, work, base, tuned)
    if work.canaries:
        details["canaries"] = _canary_document(asked, work, base, tuned)
    return details


def _repeated_document(asked: Asked, work: _Work, base: _Made, tuned: _Made) -> dict[str, Any]:
    document: dict[str, Any] = {"prefix_tokens": memorisation.PREFIX, "continued_tokens": memorisation.CONTINUED}
    document["samples"] = asked.samples
    longest: dict[str, dict[str, list[int]]] = {}
    for name, openings in (("trained", work.trained), ("unseen", work.unseen)):
        if not openings:
            document[name] = None
            continue
        rows = {}
        longest[name] = {}
        for arm, own in zip(_ARMS, (base, tuned), strict=True):
            rows[arm], longest[name][arm] = memorisation.run_sums(openings, getattr(own, name))
        resampling = Resampling([str(place) for place in range(len(openings))], asked.seed, asked.replicates)
        found = compare(memorisation.repeated(rows["base"], rows["tuned"]), resampling)
        document[name] = {"answers": len(openings), "measures": _measures(memorisation.REPEATED, found)}
        document[name]["only_tuned"] = {
            str(run): memorisation.newly(longest[name]["base"], longest[name]["tuned"], run)
            for run in memorisation.RUNS
        }
    run = memorisation.RUNS[0]
    only = document["trained"]["only_tuned"][str(run)]
    says = (
        f"Tuned continues {only} of {len(work.trained)} training answers with {run} words in a row that base does not"
    )
    if document["unseen"]:
        others = document["unseen"]["only_tuned"][str(run)]
        says += f", and of {others} of {len(work.unseen)} answers outside the training files"
    says += "."
    document["says"] = says
    return document


def _canary_document(asked: Asked, work: _Work, base: _Made, tuned: _Made) -> dict[str, Any]:
    most = float(np.log2(asked.alternatives + 1))
    sums = [memorisation.canary_sums(own.canaries) for own in (base, tuned)]
    measures = memorisation.canary_measures(most)
    resampling = Resampling([str(place) for place in range(len(work.canaries))], asked.seed, asked.replicates)
    found = compare(Measured(measures, sums[0], sums[1]), resampling)
    first = [int(own[:, 1].sum()) for own in sums]
    says = (
        f"Tuned ranks {first[1]} of {len(work.canaries)} planted canaries first among {asked.alternatives} "
        f"alternatives, base {first[0]}. Mean exposure: tuned {shown(found[0].tuned.value)} bits, base "
        f"{shown(found[0].base.value)}; about 1.4 without memory, at most {most:.1f}."
    )
    return {
        "canaries": len(work.canaries),
        "alternatives": asked.alternatives,
        "largest": most,
        "measures": _measures(measures, found),
        "says": says,
    }


def _class_details(
    study: Study,
    asked: Asked,
    material: Material,
    resampling: Resampling,
    truth: Any,
    base: Array,
    tuned: Array,
) -> dict[str, Any]:
    labels, units = study.task.labels, material.records.units
    counts = _units_of([labels[place] for place in truth], units)
    secret = hidden(counts, asked.smallest)
    classes = []
    for place, label in enumerate(labels):
        if label in secret:
            classes.append({"label": label, "hidden": True})
            continue
        measured = by_class(truth, base, tuned, place)
        found = _measures(measured.measures, compare(measured, resampling))
        row = {"label": label, "hidden": False, "records": int(np.sum(truth == place)), "measures": found}
        classes.append(row)
    calibration = {}
    for arm, own in zip(_ARMS, (base, tuned), strict=True):
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


def _entity_details(
    study: Study, asked: Asked, material: Material, resampling: Resampling, base: Array, tuned: Array
) -> dict[str, Any]:
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
        found = _measures(measured.measures, compare(measured, resampling))
        rows.append({"label": kind, "hidden": False, "records": int(holds[kind].sum()), "measures": found})
    return {"entities": rows}


def _units_of(names: Sequence[str], units: Sequence[str]) -> dict[str, float]:
    """Return the number of units of each name."""
    found: dict[str, set[str]] = {}
    for name, unit in zip(names, units, strict=True):
        found.setdefault(name, set()).add(unit)
    return {name: float(len(own)) for name, own in found.items()}


# --- the document ----------------------------------------------------------------------------------------


def _document(
    release: Release,
    asked: Asked,
    material: Material,
    resampling: Resampling,
    measured: Measured,
    details: Mapping[str, Any],
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
        "verdict": verdict(measure, found[primary], of_what),
        "measures": _measures(measured.measures, found) | details.get("measures", {}),
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
    if asked.train:
        shared = shared_rows(material.records, _trained(study, asked))
        if shared:
            notes.append(f"WARNING: {shared} of {len(material.records)} records are also in the files of --train.")
    if study.task.kind != "causal-lm":
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


def _texts(asked: Asked, material: Material, work: _Work, base: _Made, tuned: _Made) -> tuple[dict[str, str], ...]:
    """Return texts of a few records for the screen."""
    found = []
    for place, index in enumerate(work.chosen[: asked.show]):
        prompt, reference = pair_of(material.records.rows[index])
        answers = {arm: own.answers[place] for arm, own in zip(_ARMS, (base, tuned), strict=True)}
        found.append({"prompt": prompt, "reference": reference, **answers})
    return tuple(found)
