"""Metrics from sums: equal to sklearn's and seqeval's, and additive over disjoint records."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from seqeval import metrics as seqeval
from sklearn import metrics as sklearn  # type: ignore[import-untyped]

from privet.client.training.scores import (
    Tally,
    answer_quality,
    binomial_interval,
    classification_tally,
    empty_tally,
    lm_tally,
    tally_size,
    token_tally,
)
from privet.common.errors import DataError, ProtocolError, StudyError

KINDS = ("text-classification", "token-classification", "causal-lm")
CLASSES = 4
LABELS = ("a", "b", "c", "d")
TAGS = ("O", "B-drug", "I-drug", "B-dose", "I-dose")

losses = st.floats(0, 100)
classified = st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1), losses), max_size=40)
tag = st.sampled_from(TAGS)
tagged = st.lists(st.tuples(st.lists(st.tuples(tag, tag), max_size=8), losses), max_size=12)
modelled = st.lists(st.tuples(st.floats(0, 1e4), st.integers(0, 500)), max_size=20)

Classified = list[tuple[int, int, float]]
Tagged = list[tuple[list[tuple[str, str]], float]]
Modelled = list[tuple[float, int]]


def classify(records: Classified) -> Tally:
    true, predicted, loss = [[record[i] for record in records] for i in range(3)]
    return classification_tally([int(t) for t in true], [int(p) for p in predicted], loss, CLASSES)


def tag_all(records: Tagged) -> Tally:
    true = [[pair[0] for pair in pairs] for pairs, _ in records]
    predicted = [[pair[1] for pair in pairs] for pairs, _ in records]
    return token_tally(true, predicted, [loss for _, loss in records])


def model(records: Modelled) -> Tally:
    return lm_tally([nll for nll, _ in records], [count for _, count in records])


@given(classified.filter(bool))
def test_classification_equals_sklearn(records: Classified) -> None:
    found = classify(records).metrics(LABELS)
    true, predicted = [r[0] for r in records], [r[1] for r in records]
    macro = sklearn.precision_recall_fscore_support(true, predicted, average="macro", zero_division=0)
    assert [found["precision"], found["recall"], found["f1"]] == pytest.approx(list(macro[:3]))
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(true, predicted))
    assert found["loss"] == pytest.approx(np.mean([r[2] for r in records]))
    assert found["records"] == len(records)


@given(classified.filter(bool))
def test_the_confusion_matrix_equals_sklearn(records: Classified) -> None:
    tally = classify(records)
    true, predicted = [r[0] for r in records], [r[1] for r in records]
    expected = sklearn.confusion_matrix(true, predicted, labels=range(CLASSES))
    assert np.array_equal(tally.sums[2:].reshape(CLASSES, CLASSES), expected)


@given(tagged.filter(bool))
def test_entities_equal_seqeval(records: Tagged) -> None:
    found = tag_all(records).metrics(TAGS)
    true = [[pair[0] for pair in pairs] for pairs, _ in records]
    predicted = [[pair[1] for pair in pairs] for pairs, _ in records]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # seqeval says when a denominator is 0, and takes 0 as we do
        assert found["f1"] == pytest.approx(seqeval.f1_score(true, predicted))
        assert found["precision"] == pytest.approx(seqeval.precision_score(true, predicted))
        assert found["recall"] == pytest.approx(seqeval.recall_score(true, predicted))
    pairs = [pair for sequence, _ in records for pair in sequence]
    right = sum(t == p for t, p in pairs)
    assert found["token_accuracy"] == pytest.approx(right / len(pairs) if pairs else 0)


def test_an_entity_counts_only_when_kind_and_span_are_right() -> None:
    true = [["B-drug", "I-drug", "O", "B-dose"]]
    predicted = [["B-drug", "O", "O", "B-dose"]]
    assert token_tally(true, predicted, [0.5]).sums.tolist() == [1, 0.5, 1, 2, 2, 3, 4]


def test_an_entity_does_not_run_over_into_the_next_record() -> None:
    tally = token_tally([["B-drug"], ["I-drug"]], [["B-drug"], ["I-drug"]], [0, 0])
    assert tally.sums.tolist() == [2, 0, 2, 2, 2, 2, 2]


@given(modelled)
def test_language_model_loss_is_per_token(records: Modelled) -> None:
    found = model(records).metrics(())
    tokens = sum(count for _, count in records)
    nll = sum(nll for nll, _ in records)
    assert found["loss"] == pytest.approx(nll / tokens if tokens else 0)
    assert found["perplexity"] >= 1
    assert math.isfinite(found["perplexity"])
    assert found["records"] == len(records)


def test_perplexity_is_the_exponential_of_the_loss_and_stops_at_the_largest_float() -> None:
    assert lm_tally([2.0, 4.0], [1, 2]).metrics(())["perplexity"] == pytest.approx(math.exp(2))
    assert lm_tally([1e6], [1]).metrics(())["perplexity"] == sys.float_info.max


def assert_additive(whole: Tally, parts: list[Tally]) -> None:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert total.kind == whole.kind
    # Counts exactly, the summed loss up to rounding.
    assert np.array_equal(np.delete(total.sums, 1), np.delete(whole.sums, 1))
    assert total.sums[1] == pytest.approx(whole.sums[1])


@given(classified, st.integers(0, 40))
def test_classification_adds_over_sites(records: Classified, cut: int) -> None:
    assert_additive(classify(records), [classify(records[:cut]), classify(records[cut:])])


@given(tagged, st.integers(0, 12))
def test_entities_add_over_sites(records: Tagged, cut: int) -> None:
    assert_additive(tag_all(records), [tag_all(records[:cut]), tag_all(records[cut:])])


@given(modelled, st.integers(0, 20))
def test_language_model_adds_over_sites(records: Modelled, cut: int) -> None:
    assert_additive(model(records), [model(records[:cut]), model(records[cut:])])


@given(st.sampled_from(KINDS), classified)
def test_the_empty_tally_is_neutral(kind: str, records: Classified) -> None:
    tally = classify(records)
    assert np.array_equal((tally + empty_tally("text-classification", CLASSES)).sums, tally.sums)
    assert empty_tally(kind, CLASSES).sums.size == tally_size(kind, CLASSES)


@pytest.mark.parametrize("kind", KINDS)
def test_no_records_are_zeros_and_not_nan(kind: str) -> None:
    found = empty_tally(kind, CLASSES).metrics(LABELS)
    assert {name: value for name, value in found.items() if value} == ({"perplexity": 1} if kind == "causal-lm" else {})
    made = {KINDS[0]: classify([]), KINDS[1]: tag_all([]), KINDS[2]: model([])}[kind]
    assert made.metrics(LABELS) == found


@given(st.sampled_from([math.nan, math.inf]), st.integers(0, 2))
def test_a_loss_that_is_not_finite_shows_after_every_sum(bad: float, at: int) -> None:
    values = [1.0, 2.0, 3.0]
    values[at] = bad
    tallies = [
        classification_tally([0, 1, 2], [0, 1, 2], values, CLASSES),
        token_tally([["O"]] * 3, [["O"]] * 3, values),
        lm_tally(values, [1, 2, 3]),
        lm_tally(values, [0, 0, 0]),
    ]
    for tally in tallies:
        found = (tally + empty_tally(tally.kind, CLASSES)).metrics(LABELS)
        assert not math.isfinite(found["loss"])
        assert math.isnan(found["loss"]) == math.isnan(bad)
        assert found["records"] == 3


@given(classified, tagged, modelled)
def test_metrics_are_plain_json(one: Classified, two: Tagged, three: Modelled) -> None:
    for tally in (classify(one), tag_all(two), model(three)):
        found = tally.metrics(LABELS)
        assert {type(value) for value in found.values()} == {float}
        assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_tally_cannot_be_changed_from_outside() -> None:
    sums = np.zeros(3)
    tally = Tally("causal-lm", sums)
    sums[0] = 7
    assert tally.sums[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        tally.sums[0] = 7


@pytest.mark.parametrize(
    "make",
    [
        lambda: empty_tally("causal-lm", 0) + empty_tally("token-classification", 0),
        lambda: empty_tally("text-classification", 2) + empty_tally("text-classification", 3),
        lambda: Tally("causal-lm", np.zeros(4)),
        lambda: Tally("token-classification", np.zeros(3)),
        lambda: Tally("text-classification", np.zeros(2 + 5)),
        lambda: Tally("text-classification", np.zeros(0)),
        lambda: Tally("causal-lm", np.zeros((1, 3))),
        lambda: Tally("regression", np.zeros(3)),
        lambda: tally_size("regression", 2),
        lambda: empty_tally("text-classification", 3).metrics(LABELS),
        lambda: binomial_interval(3, 2),
        lambda: binomial_interval(-1, 2),
        lambda: binomial_interval(math.nan, 2),
        lambda: binomial_interval(1, math.inf),
    ],
)
def test_what_does_not_fit_together_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ProtocolError):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: classification_tally([0], [0, 1], [0.0], 2),
        lambda: classification_tally([0], [0], [], 2),
        lambda: classification_tally([2], [0], [0.0], 2),
        lambda: classification_tally([0], [-1], [0.0], 2),
        lambda: token_tally([["O"]], [["O", "O"]], [0.0]),
        lambda: token_tally([["O"]], [], [0.0]),
        lambda: lm_tally([1.0], []),
        lambda: lm_tally([1.0], [-1]),
        lambda: answer_quality(["a"], []),
    ],
)
def test_data_that_does_not_fit_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(DataError):
        make()


@pytest.mark.parametrize("bad", ["", "Bob", "E-Bob", "Bob-B"])
def test_a_tag_that_is_none_is_refused_and_shown_nowhere(
    bad: str, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    with pytest.raises(DataError) as caught:
        token_tally([[bad]], [["O"]], [0.0])
    assert "Bob" not in str(caught.value)
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


def test_answers_equal_to_the_references_are_perfect() -> None:
    texts = ["Take two tablets with water every morning.", "See a doctor if the fever stays."]
    assert answer_quality(texts, texts) == pytest.approx({"rouge_l": 1, "bleu": 100})


def test_answer_quality_worked_by_hand() -> None:
    # Longest common subsequence "the cat sat": precision 3/3, recall 3/4, F 6/7; the stemmer joins sit/sits.
    found = answer_quality(["the cat sat down", "it sits"], ["the cat sat", "it sit"])
    assert found["rouge_l"] == pytest.approx((6 / 7 + 1) / 2)
    oracle = sacrebleu.corpus_bleu(["the cat sat", "it sit"], [["the cat sat down", "it sits"]])
    assert found["bleu"] == pytest.approx(oracle.score)


def test_empty_answers_and_no_answers_are_zero() -> None:
    assert answer_quality([], []) == {"rouge_l": 0, "bleu": 0}
    assert answer_quality(["some words"], [""]) == {"rouge_l": 0, "bleu": 0}


@pytest.mark.parametrize(
    ("module", "extra", "use"),
    [
        ("seqeval.metrics.sequence_labeling", "ner", lambda: token_tally([["O"]], [["O"]], [0.0])),
        ("rouge_score.rouge_scorer", "generation", lambda: answer_quality(["a"], ["a"])),
        ("sacrebleu", "generation", lambda: answer_quality(["a"], ["a"])),
    ],
)
def test_a_missing_package_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, extra: str, use: Callable[[], object]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(StudyError, match=rf"{module.partition('.')[0]}.*privet\[{extra}\]"):
        use()


def test_importing_the_module_loads_no_heavy_package() -> None:
    heavy = "{'torch', 'sklearn', 'seqeval', 'rouge_score', 'nltk', 'sacrebleu', 'scipy'}"
    code = f"import sys, privet.client.training.scores; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@given(st.integers(0, 500), st.integers(1, 500), st.floats(0.5, 0.999))
def test_the_interval_equals_scipys_and_holds_the_rate(successes: int, trials: int, confidence: float) -> None:
    successes = min(successes, trials)
    low, high = binomial_interval(successes, trials, confidence)
    oracle = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    assert (low, high) == pytest.approx((oracle.low, oracle.high), abs=1e-12)
    assert 0 <= low <= successes / trials <= high <= 1


def test_no_trials_say_nothing_and_a_wrong_confidence_is_refused() -> None:
    assert binomial_interval(0, 0) == (0, 1)
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(StudyError):
            binomial_interval(1, 2, confidence)
