"""Figures of base and tuned model: as of scikit-learn, sacrebleu, rouge and seqeval; intervals; sentences."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from numpy.typing import NDArray
from rich.console import Console
from rouge_score.rouge_scorer import RougeScorer
from seqeval import metrics as seqeval
from seqeval.metrics.sequence_labeling import get_entities
from sklearn import metrics as sklearn  # type: ignore[import-untyped]

from privet.client.pages.html import visible
from privet.client.release import memorisation
from privet.client.release.answer_figures import (
    ANSWERS,
    LIKELIHOOD,
    answer_sums,
    bleu,
    choice_sums,
    closed,
    likelihood,
    normalised,
    part_sums,
    right_part,
    word_f1,
)
from privet.client.release.bootstrap import (
    Array,
    Compared,
    Estimate,
    Figure,
    Measure,
    Measured,
    Resampling,
    compare,
    plain,
    ratio,
    shown,
    tendency,
    verdict,
)
from privet.client.release.class_figures import (
    auprc,
    auroc,
    by_class,
    class_measures,
    class_sums,
    confusion,
    reliability,
    thresholds,
    youden,
)
from privet.client.release.entity_figures import ENTITIES, entity_sums, of_type, spans, tagged, types_of
from privet.client.release.evaluation_text import texts_shown
from privet.client.release.group_figures import group_document
from privet.client.training.features import Feature
from privet.client.training.passes import Score
from privet.common.errors import DataError

MINUS = "\N{MINUS SIGN}"
MEAN = Measure("mean", "mean", "higher", ratio(0, 1))
TAGS = ("O", "B-drug", "I-drug", "B-dose", "I-dose")
WORDS = [
    "the",
    "patient",
    "has",
    "a",
    "mild",
    "fever",
    "and",
    "an",
    "itchy",
    "rash",
    "on",
    "both",
    "arms",
    "since",
    "monday",
    "after",
    "work",
]


def units(count: int) -> list[str]:
    return [f"u{number}" for number in range(count)]


def measured(base: Array, tuned: Array) -> Measured:
    ones = np.ones(len(base))
    return Measured((MEAN,), np.column_stack([base, ones]), np.column_stack([tuned, ones]))


# --- intervals -------------------------------------------------------------------------------------------


def test_an_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    (found,) = compare(measured(values, values + 1), Resampling(units(400), seed=1))
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.base.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.base.high == pytest.approx(values.mean() + half, abs=0.03)
    # The pair is resampled together: a constant difference has no spread at all.
    assert found.difference.low == pytest.approx(1, abs=1e-9)
    assert found.difference.high == pytest.approx(1, abs=1e-9)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(2), 0
    for trial in range(200):
        values = rng.exponential(1.0, 60)
        (found,) = compare(measured(values, values), Resampling(units(60), seed=trial, replicates=400))
        covered += found.base.low <= 1.0 <= found.base.high
    assert 0.87 <= covered / 200 <= 0.99


def test_records_of_one_unit_are_drawn_together() -> None:
    values = np.repeat(np.random.default_rng(3).normal(size=30), 10)
    owners = [f"u{number // 10}" for number in range(300)]
    (grouped,) = compare(measured(values, values), Resampling(owners, seed=0))
    (alone,) = compare(measured(values, values), Resampling(units(300), seed=0))
    widths = [found.base.high - found.base.low for found in (grouped, alone)]
    assert widths[0] == pytest.approx(math.sqrt(10) * widths[1], rel=0.2)
    assert (grouped.records, grouped.units) == (300, 30)


def test_replicates_follow_from_the_seed_and_not_from_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(4).normal(size=(50, 3))
    whole = Resampling(units(50), seed=5, replicates=100).sums(rows)
    assert np.array_equal(whole, Resampling(units(50), seed=5, replicates=100).sums(rows))
    assert not np.array_equal(whole, Resampling(units(50), seed=6, replicates=100).sums(rows))
    monkeypatch.setattr("privet.client.release.bootstrap._ENTRIES", 170)
    assert np.allclose(whole, Resampling(units(50), seed=5, replicates=100).sums(rows))
    total = Resampling(units(50), seed=5, replicates=100).replicated(lambda weights: weights @ rows[:, 0])
    assert np.allclose(total, whole[:, 0])


def test_a_loss_that_is_not_finite_spoils_only_the_records_that_have_it() -> None:
    values = np.ones(40)
    values[0] = math.nan
    resampling = Resampling(units(40), seed=0)
    (whole,) = compare(measured(np.ones(40), values), resampling)
    assert math.isnan(whole.tuned.value)
    rest = np.arange(40) > 0
    (found,) = compare(measured(np.ones(40), values), resampling, rest)
    assert found.tuned.value == 1
    assert plain(whole.tuned)["value"] is None


# --- sentences -------------------------------------------------------------------------------------------


def told(base: float, tuned: float, low: float, high: float, count: int = 131) -> Compared:
    return Compared(
        Estimate(base, base, base), Estimate(tuned, tuned, tuned), Estimate(tuned - base, low, high), 148, count
    )


def test_a_verdict_is_a_sentence_with_its_interval() -> None:
    perplexity = LIKELIHOOD[0]
    said = verdict(Figure(perplexity, told(12.5, 7.3, -5.9, -4.4), "148 records of 131 documents"))
    assert said.replace(MINUS, "-") == (
        "Tuned is better: perplexity per token 12.5 → 7.30, difference -5.20 (95 % -5.90 to -4.40), 148 records of 131 "
        "documents."
    )
    percent = Measure("accuracy", "accuracy", "higher", ratio(0, 1), percent=True)
    said = verdict(Figure(percent, told(0.4, 0.38, -0.06, 0.02), "x"))
    assert (
        said.replace(MINUS, "-")
        == "No clear difference: accuracy 40.0 % → 38.0 %, difference -2.0 points (95 % -6.0 to +2.0), x."
    )


@pytest.mark.parametrize(
    ("right", "lead"),
    [
        (told(0.0, 0.4, 0.3, 0.5), "Tuned is better: "),
        (told(0.4, 0.41, -0.1, 0.1), "Tuned is better in perplexity per token alone: "),
        (told(0.4, 0.1, -0.4, -0.2), "Tuned is better by one figure and worse by the other: "),
    ],
)
def test_a_verdict_weighs_right_answers_beside_the_likelihood(right: Compared, lead: str) -> None:
    likely = Figure(LIKELIHOOD[0], told(12.5, 7.3, -5.9, -4.4), "131 records")
    said = verdict(likely, Figure(right_part("Refer to"), right, "48 answers"))
    assert said.startswith(lead)
    assert f"; right “Refer to” {100 * right.base.value:.1f} % → {100 * right.tuned.value:.1f} %" in said
    assert said.endswith(", 48 answers.")


def test_a_part_of_an_answer_is_compared_by_its_words() -> None:
    references = ["Refer to: cardiology. When: today.", "Refer to: the skin clinic. When: routine."]
    answers = ["When: never. refer to : Cardiology", "Do not refer to: skin"]
    assert part_sums(references, answers, "Refer to").tolist() == [[1.0, 1.0], [0.0, 1.0]]
    assert part_sums(references, ["When: today", ""], "When").tolist() == [[1.0, 1.0], [0.0, 1.0]]
    with pytest.raises(DataError, match="in each reference answer, found it in 0 of 2") as caught:
        part_sums(references, answers, "Reason")
    assert "cardiology" not in str(caught.value)


def test_answers_of_a_closed_set_are_right_or_wrong() -> None:
    assert closed(["Cardiology.", "skin", "cardiology", "skin"])
    assert not closed(["cardiology", "skin", "eye"])  # none recurs
    assert not closed(["refer to the heart clinic today", "skin"] * 20)
    assert not closed(["yes"] * 20)


@pytest.mark.parametrize(
    ("low", "high", "better", "count", "expected"),
    [
        (-2, -1, "lower", 50, "better"),
        (-2, -1, "higher", 50, "worse"),
        (1, 2, "higher", 50, "better"),
        (1, 2, "lower", 50, "worse"),
        (-1, 2, "lower", 50, "unclear"),
        (0, 2, "higher", 50, "unclear"),
        (0, 0, "higher", 50, "equal"),
        (1, 2, "higher", 9, "few"),
        (math.nan, math.nan, "higher", 50, "few"),
    ],
)
def test_a_tendency_needs_an_interval_on_one_side(
    low: float, high: float, better: str, count: int, expected: str
) -> None:
    assert tendency(told(1, 1, low, high, count), better) == expected  # type: ignore[arg-type]


def test_numbers_have_three_digits() -> None:
    assert [shown(v) for v in (0.0, 7.256, 1234.6, 0.08312, -0.5, math.nan, math.inf)] == [
        "0",
        "7.26",
        "1235",
        "0.0831",
        f"{MINUS}0.500",
        "not defined",
        "infinite",
    ]


# --- answers ---------------------------------------------------------------------------------------------


def sentences(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(0, 14))) for _ in range(count)]


def test_bleu_and_rouge_are_those_of_their_packages() -> None:
    references, answers = [text or "fever" for text in sentences(60, 0)], sentences(60, 1)
    answers[:10] = references[:10]
    sums = answer_sums(references, answers)
    values = {measure.name: float(measure.of(sums.sum(0))) for measure in ANSWERS}
    assert values["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score, abs=1e-9)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(references, answers, strict=True)
    assert values["rouge_l"] == pytest.approx(np.mean([scorer.score(r, a)["rougeL"].fmeasure for r, a in pairs]))
    assert 0 < values["exact_match"] < values["token_f1"] < 1


@pytest.mark.parametrize("part", [slice(0, 1), slice(3, 5), slice(20, 21), slice(0, 0)])
def test_bleu_of_few_sentences_is_smoothed_as_by_its_package(part: slice) -> None:
    references, answers = ["a mild fever since monday", *sentences(40, 2)][part], sentences(41, 3)[part]
    if not references:
        assert float(bleu(np.zeros(10))) == 0
        return
    sums = answer_sums(references, answers)[:, 4:].sum(0)
    assert float(bleu(sums)) == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score, abs=1e-9)


def test_exact_match_looks_past_case_punctuation_and_articles() -> None:
    assert normalised("The Itchy-rash, a mild  fever.") == ["itchy", "rash", "mild", "fever"]
    assert normalised("10/12") != normalised("1012")
    assert word_f1(["mild", "fever"], ["fever", "fever"]) == pytest.approx(0.5)
    assert (word_f1([], []), word_f1([], ["x"])) == (1, 0)


def test_perplexities_compare_between_tokenizers() -> None:
    losses = [np.array([1.0, 2.0], np.float32), np.array([3.0], np.float32)]
    scores = [Score(loss, np.zeros(len(loss), np.int64), np.zeros(len(loss), np.int64)) for loss in losses]
    found = likelihood(scores, scores, np.array([[2.0, 12.0], [1.0, 4.0]]))
    values = [float(measure.of(found.base.sum(0))) for measure in LIKELIHOOD]
    assert values == pytest.approx([math.exp(2), math.exp(2), 6 / 16 / math.log(2)])


def test_a_choice_is_judged_by_likelihood_and_per_byte() -> None:
    sums = choice_sums([[3.0, 4.0], [1.0, 9.0]], [["no", "certainly"], ["yes", "no"]], [1, 0])
    assert sums.tolist() == [[0, 1, 1], [1, 1, 1]]


# --- classes ---------------------------------------------------------------------------------------------


def classes(count: int = 300, kinds: int = 5, seed: int = 0) -> tuple[NDArray[np.int64], Array]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, kinds, count)
    logits = rng.normal(size=(count, kinds)) + 1.5 * np.eye(kinds)[truth]
    odds = np.exp(logits)
    return truth, odds / odds.sum(1, keepdims=True)


def test_figures_of_classes_are_those_of_scikit_learn() -> None:
    truth, probabilities = classes()
    predicted = probabilities.argmax(1)
    sums = class_sums(truth, probabilities).sum(0)
    values = {measure.name: float(measure.of(sums)) for measure in class_measures(5)}
    assert values["accuracy"] == pytest.approx(sklearn.accuracy_score(truth, predicted))
    assert values["macro_f1"] == pytest.approx(sklearn.f1_score(truth, predicted, average="macro"))
    assert values["log_loss"] == pytest.approx(sklearn.log_loss(truth, probabilities))
    assert values["top_3"] == pytest.approx(sklearn.top_k_accuracy_score(truth, probabilities, k=3))
    assert values["brier"] == pytest.approx(((probabilities - np.eye(5)[truth]) ** 2).sum(1).mean())
    for one in range(5):
        own = by_class(truth, probabilities, probabilities, one)
        found = [float(measure.of(own.tuned.sum(0))) for measure in own.measures]
        wanted = sklearn.precision_recall_fscore_support(truth == one, predicted == one, average="binary")[:3]
        assert found == pytest.approx(list(wanted))


def test_equal_probabilities_put_no_class_first() -> None:
    sums = class_sums(np.array([0, 3]), np.full((2, 5), 0.2)).sum(0)
    assert {m.name: float(m.of(sums)) for m in class_measures(5)}["top_3"] == 0


@pytest.mark.parametrize("decimals", [6, 1])
def test_areas_are_those_of_scikit_learn_with_weights_and_ties(decimals: int) -> None:
    rng = np.random.default_rng(1)
    positive = rng.random(120) < 0.3
    scores: Array = np.round(rng.random(120) + 0.4 * positive, decimals).astype(np.float64)
    weights = rng.integers(0, 4, (7, 120)).astype(np.float64)
    curves, precisions = auroc(weights, positive, scores), auprc(weights, positive, scores)
    for row, curve, precision in zip(weights, curves, precisions, strict=True):
        assert curve == pytest.approx(sklearn.roc_auc_score(positive, scores, sample_weight=row))
        assert precision == pytest.approx(sklearn.average_precision_score(positive, scores, sample_weight=row))
    assert np.isnan(auroc(weights, np.zeros(120, bool), scores)).all()


def test_the_best_threshold_is_that_of_youden_and_says_so() -> None:
    rng = np.random.default_rng(2)
    positive = rng.random(200) < 0.4
    scores = np.clip(rng.normal(0.4 + 0.3 * positive, 0.15), 0, 1)
    false, true, cuts = sklearn.roc_curve(positive, scores)
    assert youden(positive, scores) == pytest.approx(cuts[np.argmax(true - false)])
    table = thresholds(positive, scores, Resampling(units(200), seed=0, replicates=200))
    assert len(table) == 10
    assert [row["youden"] for row in table].count(True) == 1
    for row in table:
        flagged = scores >= row["threshold"]
        assert row["sensitivity"].value == pytest.approx(sklearn.recall_score(positive, flagged))
        assert row["specificity"].value == pytest.approx(sklearn.recall_score(~positive, ~flagged))
        if flagged.any():
            assert row["ppv"].value == pytest.approx(sklearn.precision_score(positive, flagged))
        assert row["sensitivity"].low <= row["sensitivity"].value <= row["sensitivity"].high


def test_calibration_is_measured_in_bins_of_equally_many_texts() -> None:
    rng = np.random.default_rng(3)
    stated = rng.uniform(0.5, 1, 4000)
    probabilities = np.column_stack([stated, 1 - stated])
    truth = (rng.random(4000) > stated).astype(np.int64)
    error, table = reliability(truth, probabilities)
    assert error < 0.03
    assert [row["texts"] for row in table] == [400] * 10
    error, table = reliability(np.zeros(10, np.int64), np.full((10, 2), 0.5))
    assert (error, len(table)) == (0.5, 1)  # one probability is one bin


def test_a_rare_class_has_no_row_of_confusion_and_neither_has_a_second_one() -> None:
    truth, probabilities = classes(400, 3)
    truth[:] = np.repeat([0, 1, 2], [300, 95, 5])
    rows = confusion(truth, probabilities, ("a", "b", "c"), units(400), 10)
    assert [row["hidden"] for row in rows] == [False, True, True]
    shares = rows[0]["predicted"]
    table = sklearn.confusion_matrix(truth, probabilities.argmax(1), normalize="true")[0]
    assert [shares.get(label, 0) for label in "abc"] == pytest.approx((100 * table).round(1).tolist())


# --- entities --------------------------------------------------------------------------------------------


def tag_rows(count: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, len(TAGS), rng.integers(0, 12)).tolist() for _ in range(count)]


def scored(truth: list[list[int]], predicted: list[list[int]]) -> list[Score]:
    pairs = zip(truth, predicted, strict=True)
    return [Score(np.zeros(len(t), np.float32), np.array(t, int), np.array(p, int)) for t, p in pairs]


def test_entities_are_those_of_seqeval() -> None:
    truth = tag_rows(150, 0)
    rng = np.random.default_rng(1)
    predicted = [[int(rng.integers(5)) if rng.random() < 0.3 else tag for tag in row] for row in truth]
    names = [[[TAGS[tag] for tag in row] for row in rows] for rows in (truth, predicted)]
    assert [spans(row) for row in names[0]] == [set(get_entities(row)) for row in names[0]]
    sums = entity_sums(scored(truth, predicted), TAGS)
    report = seqeval.classification_report(*names, output_dict=True, zero_division=0)
    whole = tagged(sums, sums, TAGS)
    assert float(ENTITIES[0].of(whole.tuned.sum(0))) == pytest.approx(seqeval.f1_score(*names))
    assert types_of(TAGS) == ["dose", "drug"]
    for place, kind in enumerate(types_of(TAGS)):
        own = of_type(sums, sums, place).tuned.sum(0)
        values = {measure.name: float(measure.of(own)) for measure in ENTITIES}
        assert values["f1"] == pytest.approx(report[kind]["f1-score"])
        assert values["precision"] == pytest.approx(report[kind]["precision"])
        assert values["recall"] == pytest.approx(report[kind]["recall"])
        assert values["overlap_f1"] >= values["f1"]


def test_spans_that_overlap_count_beside_exact_ones() -> None:
    # drug at words 0 to 2 and 4; found at 1 to 2, and at 3 for nothing.
    sums = entity_sums(scored([[1, 2, 2, 0, 1]], [[0, 1, 2, 1, 0]]), TAGS)
    own = of_type(sums, sums, 1).tuned[0]
    assert own.tolist() == [0, 2, 2, 1, 1]
    assert {m.name: float(m.of(own)) for m in ENTITIES}["overlap_f1"] == pytest.approx(0.5)


# --- groups ----------------------------------------------------------------------------------------------


def grouped(sizes: dict[str, int], right: dict[str, float], owners: list[str] | None = None) -> dict[str, Any]:
    names = [name for name, size in sizes.items() for _ in range(size)]
    rng = np.random.default_rng(0)
    tuned = np.array([float(rng.random() < right[name]) for name in names])
    own = owners or units(len(names))
    return group_document(
        "site", names, measured(np.zeros(len(names)), tuned), MEAN, Resampling(own, 0, 300), own, smallest=10, most=30
    )


def test_small_groups_are_hidden_with_another_that_would_follow() -> None:
    found = grouped({"north": 60, "south": 50, "east": 12, "west": 4}, dict.fromkeys("nsew", 0) | EVEN)
    rows = {row["group"]: row["hidden"] for row in found["groups"]}
    assert rows == {"north": False, "south": False, "east": True, "west": True}
    assert "2 groups are hidden" in str(found["says"])
    assert "value" not in str([row for row in found["groups"] if row["hidden"]])


EVEN = dict.fromkeys(("north", "south", "east", "west"), 0.5)


def test_a_group_is_as_large_as_its_units() -> None:
    owners = [f"n{number}" for number in range(60)] + ["one patient"] * 40
    found = grouped({"north": 60, "south": 40}, EVEN, owners)
    assert "fewer than two groups" in str(found["says"])


def test_the_gap_between_groups_has_an_interval_and_a_sentence() -> None:
    found = grouped({"north": 200, "south": 200}, {"north": 0.9, "south": 0.4})
    gap = found["gap"]["tuned"]
    assert (gap["worst"], gap["best"]) == ("south", "north")
    assert gap["gap"]["low"] < 0.5 < gap["gap"]["high"]
    assert gap["gap"]["low"] > 0.3
    assert "tuned is better in 2 of 2 groups, worse in none" in str(found["says"])


def test_a_column_of_ids_is_not_shown() -> None:
    names = units(31)
    own = measured(np.zeros(31), np.ones(31))
    found = group_document("id", names, own, MEAN, Resampling(names, 0, 10), names, 1, 30)
    assert found["groups"] == []
    assert "31 values" in found["says"]


# --- memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("continuation", "run"),
    [
        ("the patient has a mild fever and an itchy rash", 10),
        ("So: the patient has a MILD fever, and then nothing", 7),
        ("nothing", 0),
        ("", 0),
    ],
)
def test_the_longest_run_of_words_that_two_texts_share(continuation: str, run: int) -> None:
    assert memorisation.longest_run(WORDS, memorisation.words_of(continuation)) == run


class Letters:
    """A tokenizer whose tokens are the words above."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(WORDS[token % len(WORDS)] for token in ids)


def test_an_opening_is_of_the_longest_answer_of_a_conversation() -> None:
    ignored = -100
    ids = tuple(range(60))
    labels = (*[ignored] * 4, *ids[4:10], *[ignored] * 5, *ids[15:50], *[ignored] * 10)
    (found,) = memorisation.openings([Feature(ids, labels)], Letters(), 5, 0)
    assert found.head == ids[: 15 + memorisation.PREFIX]
    assert found.rest == tuple(WORDS[token % len(WORDS)] for token in ids[31:50])
    short = Feature(ids, (*[ignored] * 4, *ids[4:24], *[ignored] * 36))
    assert memorisation.openings([short], Letters(), 5, 0) == []
    assert memorisation.openings([Feature(ids, (ignored,) * 60), Feature(ids, 1)], Letters(), 5, 0) == []


def test_runs_that_the_base_repeats_as_well_are_not_new() -> None:
    openings = [memorisation.Opening((1,), tuple(WORDS))] * 3
    texts = [" ".join(WORDS[:14]), " ".join(WORDS[:9]), "no"]
    rows, longest = memorisation.run_sums(openings, [[text, "other"] for text in texts])
    assert rows.tolist() == [[1, 1, 1], [1, 0, 1], [0, 0, 1]]
    assert memorisation.newly([9, 0, 0], longest, 8) == 1


def test_alternatives_keep_the_form_of_a_secret() -> None:
    canary = memorisation.Canary("code?", "The code is Ab-731, room 5.", "Ab-731")
    found = memorisation.alternatives(canary, 50, seed=0, place=0)
    assert len(set(found)) > 45
    assert all(text.startswith("The code is ") and text.endswith(", room 5.") and text[14] == "-" for text in found)
    assert all(text[12].isupper() and text[13].islower() and text[15:18].isdigit() for text in found)
    digits = memorisation.alternatives(memorisation.Canary("", "Ab-731", ""), 50, 0, 0)
    assert all(text.startswith("Ab-") for text in digits)


def test_exposure_is_the_rank_in_bits() -> None:
    rows = memorisation.canary_sums([[1.0, 2.0, 3.0, 4.0], [3.0, 2.0, 1.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    assert rows[:, 0].tolist() == pytest.approx([2, 2 - math.log2(3), 0])
    assert rows[:, 1].tolist() == [1, 0, 0]


def test_exposure_without_memory_is_about_1_44_bits() -> None:
    losses = np.random.default_rng(0).normal(size=(3000, 101)).tolist()
    assert memorisation.canary_sums(losses)[:, 0].mean() == pytest.approx(math.log2(math.e), abs=0.1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json 4711", "line 2 is not one JSON object"),
        ('{"q": "x"}', "line 2 is not one JSON object"),
        ('{"q": "x", "a": "y 4711", "secret": "zz"}', "line 2: expected a secret"),
        ('{"q": "x", "a": "yes"}', "line 2 has no `secret`"),
    ],
)
def test_a_wrong_canary_is_named_by_its_line_alone(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "canaries.jsonl"
    file.write_text('{"q": "pin?", "a": "It is 4711"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=said) as caught:
        memorisation.read_canaries(file, "q", "a")
    assert "4711" not in f"{caught.value.message}{caught.value.hint}"


def test_canaries_and_alternatives_are_scored_in_order() -> None:
    canaries = [memorisation.Canary("p", "7", ""), memorisation.Canary("q", "No. 8", "")]
    seen: list[tuple[str, str]] = []

    def losses(pairs: list[tuple[str, str]]) -> list[float]:
        seen.extend(pairs)
        return [float(len(seen) - len(pairs) + place) for place in range(len(pairs))]

    take: Callable[..., list[list[float]]] = memorisation.canary_losses
    found = take(canaries, 20, 0, losses)
    assert (seen[0], seen[len(found[0])]) == (("p", "7"), ("q", "No. 8"))
    assert "7" not in [text for _, text in seen[1 : len(found[0])]]
    assert [value for own in found for value in own] == sorted(value for own in found for value in own)


def test_no_text_of_a_record_or_a_model_controls_a_terminal() -> None:
    evil = "\x1b]52;c;ZXZpbA==\x07[link=file:///etc]a[/link][/red]\u202e"
    screen = io.StringIO()
    Console(file=screen, force_terminal=True, width=400).print(
        texts_shown([dict.fromkeys(("prompt", "reference", "base", "tuned"), evil)])
    )
    assert "\x1b]" not in screen.getvalue()
    assert "\u202e" not in screen.getvalue()
    assert "[link=file:///etc]a[/link][/red]" in screen.getvalue()
    assert visible("a\tb\nc") == "a\tb\nc"
