"""Ask base and tuned model the same: what is prepared once, and what each of them makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from privet.client.budget.withdrawals import Withdrawn
from privet.client.formats import FormatSection
from privet.client.pages.suppression import SMALLEST
from privet.client.release import memorisation
from privet.client.release.bootstrap import (
    REPLICATES,
    Array,
)
from privet.client.release.material import (
    PLAINLY,
    Material,
    Question,
    read_questions,
    row_of,
)
from privet.client.release.scoring import (
    Watch,
    answers_of,
    class_probabilities,
    continuations_of,
    pairs_of,
    scores_of,
)
from privet.client.training.data import Records, load_records
from privet.client.training.features import Feature, encode_records
from privet.client.training.forms import prompt_of
from privet.client.training.host import ModelHost
from privet.client.training.passes import Score
from privet.client.training.preference import PairScore
from privet.common.errors import StudyError
from privet.common.study.study import Study

ARMS = ("base", "tuned")


@dataclass(frozen=True)
class Asked:
    """What to evaluate.

    Attributes:
        files: Site and path of each file of records; `material.UNNAMED` for a file of no named site.
        by: Columns to group by.
        seed: Decides replicates, samples and alternatives.
        replicates: Number of replicates of the bootstrap.
        smallest: Least number of units of a group that is shown.
        answers: For causal-lm and preference: most records whose answers are generated.
        show: Records whose texts are returned for the screen.
        positive: For text-classification: the class of the threshold table.
        choices: For causal-lm: column of choices.
        right: Column of the right choice; None: the study's answer.
        part: For causal-lm and preference: a part of each answer, written `PART: value.`, whose value is compared.
        train: Files that the run was trained on, to look for what the model repeats.
        openings: Most answers of these files that the model continues.
        samples: Sampled continuations of each, besides the greedy one.
        canaries: File of planted records.
        alternatives: Random alternatives of each canary.
        forms: How the files are written.
        withdrawn: Whose records are left out.
        own: Training files of the site that asks, written as `forms` says: a record of them is warned about.
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
    part: str | None = None
    train: tuple[Path, ...] = ()
    openings: int = 64
    samples: int = 0
    canaries: Path | None = None
    alternatives: int = 100
    forms: FormatSection = PLAINLY
    withdrawn: Withdrawn | None = None
    own: tuple[Path, ...] = ()


@dataclass
class Work:
    """What both models are asked."""

    features: Sequence[Feature]
    chosen: Sequence[int] = ()
    prompts: Sequence[Any] = ()
    questions: Sequence[Question] = ()
    trained: Sequence[memorisation.Opening] = ()
    unseen: Sequence[memorisation.Opening] = ()
    canaries: Sequence[memorisation.Canary] = ()


@dataclass
class Made:
    """What one model makes of it."""

    scores: Sequence[Score] = ()
    pairs: Sequence[PairScore] = ()
    probabilities: Array = field(default_factory=lambda: np.zeros((0, 0)))
    answers: Sequence[str] = ()
    choices: Sequence[Sequence[float]] = ()
    trained: Sequence[Sequence[str]] = ()
    unseen: Sequence[Sequence[str]] = ()
    canaries: Sequence[Sequence[float]] = ()


def check_asked(study: Study, asked: Asked) -> None:
    """Check that the question fits the study's task."""
    kind = study.task.kind
    for given, option, wanted in (
        (asked.positive, "--positive", "text-classification"),
        (asked.choices, "--choices", "causal-lm"),
        (asked.part, "--part", "causal-lm or preference"),
        (asked.train, "--train", "causal-lm or preference"),
        (asked.canaries, "--canaries", "causal-lm"),
        (asked.show, "--show", "causal-lm or preference"),
    ):
        if given and kind not in wanted.split(" or "):
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


def prepare(host: ModelHost, study: Study, asked: Asked, material: Material) -> Work:
    """Return what both models are asked: tokens of the records, prompts, questions, openings and canaries.

    Raises:
        StudyError, DataError: A file does not fit the study, or has nothing to ask.
    """
    rows, tokenizer = material.records.rows, host.tokenizer
    work = Work(encode_records(study, tokenizer, material.records))
    if not study.task.generates:
        return work
    work.chosen = sorted(memorisation.shuffled(len(rows), asked.seed, "answers")[: asked.answers])
    work.prompts = [prompt_of(rows[index]) for index in work.chosen]
    if asked.choices is not None:
        work.questions = read_questions(
            study, asked.files, asked.choices, asked.right, material.unit_column, asked.forms, asked.withdrawn
        )
    if asked.train:
        trained = trained_records(study, asked)
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


def trained_records(study: Study, asked: Asked) -> Records:
    """Return the records of the files that the run was trained on, without units."""
    bare = study.model_copy(update={"data": study.data.model_copy(update={"unit": None})})
    parts = [
        load_records(path, bare, training=False, form=asked.forms.of(path), withdrawn=asked.withdrawn)[0]
        for path in asked.train
    ]
    return Records(tuple(row for part in parts for row in part.rows), tuple(u for part in parts for u in part.units))


def make(host: ModelHost, study: Study, asked: Asked, work: Work, most: int, arm: str, watch: Watch) -> Made:
    """Return what the mounted model makes of it.

    Args:
        host: The model; its lock is held by the caller.
        study: The study.
        asked: What to evaluate.
        work: What was prepared.
        most: Most records of a pass.
        arm: Name of the model, for `watch`.
        watch: Receives progress.
    """
    if study.task.kind == "text-classification":
        return Made(probabilities=class_probabilities(host, work.features, most, f"{arm}: scoring", watch))
    if study.task.kind == "preference":
        made = Made(pairs=pairs_of(host, work.features, most, f"{arm}: scoring", watch))
    else:
        made = Made(scores=scores_of(host, work.features, most, f"{arm}: scoring", watch))
    if work.prompts:
        made.answers = answers_of(host, study, work.prompts, most, f"{arm}: answering", watch)

    def nats(pairs: Sequence[tuple[str, str]], what: str) -> list[float]:
        rows = tuple(row_of(*pair) for pair in pairs)
        features = encode_records(study, host.tokenizer, Records(rows, ("",) * len(rows)))
        return [score.total for score in scores_of(host, features, most, f"{arm}: {what}", watch)]

    if work.questions:
        flat = iter(nats([(q.prompt, text) for q in work.questions for text in q.choices], "choosing"))
        made.choices = [[next(flat) for _ in question.choices] for question in work.questions]
    if work.trained:
        made.trained = _continued(host, asked, work.trained, most, f"{arm}: continuing training answers", watch)
        made.unseen = _continued(host, asked, work.unseen, most, f"{arm}: continuing other answers", watch)
    if work.canaries:
        made.canaries = memorisation.canary_losses(
            work.canaries, asked.alternatives, asked.seed, lambda pairs: nats(pairs, "ranking canaries")
        )
    return made


def _continued(
    host: ModelHost, asked: Asked, openings: Sequence[memorisation.Opening], most: int, what: str, watch: Watch
) -> list[list[str]]:
    """Return the greedy and the sampled continuations of each opening."""
    heads = [opening.head for opening in openings]
    seeds = [None, *(asked.seed + number + 1 for number in range(asked.samples))]
    runs = [continuations_of(host, heads, memorisation.CONTINUED, most, seed, what, watch) for seed in seeds]
    return [list(texts) for texts in zip(*runs, strict=True)]
