"""Task metrics, computed from sums, so that secure aggregation can add them over sites.

A site never reports a metric. It reports a `Tally`: counts and summed losses over its own records. Tallies of disjoint
sets of records add up to the tally of their union. So the coordinator learns the metrics of all records together, and
of no single site. Counts are exact integers in float64 and add without error below 2^53. Summed losses add with
rounding errors. A loss that is NaN or infinite stays NaN or infinite in every sum and metric of it.

`sums` by kind of task (C classes)::

    text-classification    [records, loss sum, confusion matrix row by row: C*C, truth x prediction]
    token-classification   [records, loss sum, entities right, entities predicted, entities true,
                            tokens right, tokens]
    causal-lm              [records, sum of negative log-likelihoods, answer tokens]
    preference             [records, loss sum, pairs of positive margin (half of those of margin 0), margin sum]
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privet.common.errors import DataError, ProtocolError, StudyError

_HEAD = 2  # records and loss sum come first in every kind
_TOKEN_SIZE = 7
_LM_SIZE = 3
_PAIR_SIZE = 4


@dataclass(frozen=True, eq=False)
class Tally:
    """Additive statistics of one task over some records.

    Attributes:
        kind: The task kind, as in `study.task.kind`.
        sums: float64 [k], read-only; the module's docstring gives the layout.

    Raises:
        ProtocolError: Unknown kind, or `sums` is not a vector of a length that the kind can have.
    """

    kind: str
    sums: NDArray[np.float64]

    def __post_init__(self) -> None:
        sums = np.array(self.sums, dtype=np.float64)
        classes = math.isqrt(max(sums.size - _HEAD, 0))
        expected = tally_size(self.kind, classes)
        if sums.ndim != 1 or sums.size != expected:
            raise ProtocolError(
                f"validation counts for {self.kind}: expected a vector of the task's size, found "
                f"shape {list(sums.shape)}",
                "make sure that all sites run the same study",
            )
        sums.setflags(write=False)
        object.__setattr__(self, "sums", sums)

    def __add__(self, other: Tally) -> Tally:
        """Return the tally of both sets of records, which must be disjoint.

        Raises:
            ProtocolError: The kinds or the lengths differ.
        """
        if self.kind != other.kind or self.sums.size != other.sums.size:
            raise ProtocolError(
                f"validation counts that are added: expected {self.sums.size} numbers for {self.kind}, found "
                f"{other.sums.size} for {other.kind}",
                "make sure that all sites run the same study",
            )
        return Tally(self.kind, self.sums + other.sums)

    def metrics(self, labels: Sequence[str]) -> dict[str, float]:
        """Return the metrics of the tallied records; every value is a Python float.

        * text-classification: `loss` (mean per record), `accuracy`, and the unweighted means `precision`,
          `recall` and `f1` over the classes that occur in truth or prediction.
        * token-classification: `loss` (mean per record), `f1`, `precision` and `recall` over entities (an
          entity counts when kind and span are exactly right), `token_accuracy`.
        * causal-lm: `loss` (nats per answer token) and `perplexity`, its exponential, at most the largest
          finite float while the loss is finite.
        * preference: `loss` (mean per pair), `accuracy` (share of positive margins; margins of 0 count half),
          `margin` (mean, in nats).

        All add `records`. A ratio of nothing to nothing is 0, and so is the loss of no records.

        Args:
            labels: `study.task.labels`; its length must be the number of classes of a text-classification.

        Raises:
            ProtocolError: The number of labels is not the number of classes tallied.
        """
        if self.kind == "text-classification":
            return _classification_metrics(self, labels)
        if self.kind == "token-classification":
            return _token_metrics(self)
        if self.kind == "preference":
            return _pair_metrics(self)
        return _lm_metrics(self)


def tally_size(kind: str, classes: int) -> int:
    """Return the length of a tally's `sums`. Only text-classification depends on `classes`.

    Raises:
        ProtocolError: Unknown kind.
    """
    sizes = {
        "text-classification": _HEAD + classes * classes,
        "token-classification": _TOKEN_SIZE,
        "causal-lm": _LM_SIZE,
        "preference": _PAIR_SIZE,
    }
    if kind not in sizes:
        raise ProtocolError(f"task.kind: expected {', '.join(sizes)}, found {kind!r}", "correct task.kind in the study")
    return sizes[kind]


def empty_tally(kind: str, classes: int) -> Tally:
    """Return the tally of no records. Adding it changes nothing.

    Raises:
        ProtocolError: Unknown kind.
    """
    return Tally(kind, np.zeros(tally_size(kind, classes)))


def classification_tally(true: Sequence[int], predicted: Sequence[int], losses: Sequence[float], classes: int) -> Tally:
    """Tally class indices and losses, one of each per record.

    Raises:
        DataError: The lengths differ, or an index is not in 0..classes-1.
    """
    _same_length(true=true, predicted=predicted, losses=losses)
    rows = np.asarray(true, dtype=np.int64)
    columns = np.asarray(predicted, dtype=np.int64)
    for name, indices in (("true", rows), ("predicted", columns)):
        if indices.size and not (indices.min() >= 0 and indices.max() < classes):
            raise DataError(
                f"{name} labels of records: expected class numbers from 0 to {classes - 1}, found others",
                "check that task.labels in the study lists every label",
            )
    confusion = np.bincount(rows * classes + columns, minlength=classes * classes)
    return Tally("text-classification", _joined(losses, confusion))


def token_tally(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], losses: Sequence[float]) -> Tally:
    """Tally tag sequences (IOB2) and losses, one of each per record.

    Entities are read as in seqeval's default mode (lenient, like conlleval): an `I-x` outside an entity begins a new
    entity.

    Raises:
        DataError: The numbers of records, or of a record's tags, differ; or a tag is not O, B-x or I-x.
        StudyError: seqeval is not installed.
    """
    _same_length(true=true, predicted=predicted, losses=losses)
    get_entities = optional("seqeval.metrics.sequence_labeling", extra="ner").get_entities
    counts = np.zeros(_TOKEN_SIZE - _HEAD)
    for truth, guess in zip(true, predicted, strict=True):
        _same_length(true_tags=truth, predicted_tags=guess)
        _check_tags(truth)
        _check_tags(guess)
        actual, found = set(get_entities(list(truth))), set(get_entities(list(guess)))
        right = sum(t == g for t, g in zip(truth, guess, strict=True))
        counts += (len(actual & found), len(found), len(actual), right, len(truth))
    return Tally("token-classification", _joined(losses, counts))


def lm_tally(nll_sums: Sequence[float], token_counts: Sequence[int]) -> Tally:
    """Tally each record's summed negative log-likelihood (nats) and number of answer tokens.

    Raises:
        DataError: The lengths differ, or a count is negative.
    """
    _same_length(nll_sums=nll_sums, token_counts=token_counts)
    if any(count < 0 for count in token_counts):
        raise DataError(
            "numbers of tokens in records: expected 0 or more, found a negative number", "report this as a bug"
        )
    return Tally("causal-lm", _joined(nll_sums, np.array([sum(token_counts)])))


def pair_tally(correct: Sequence[float], margins: Sequence[float], losses: Sequence[float]) -> Tally:
    """Tally pairs of answers: 1 for a positive margin, 1/2 for none; the margin (nats); the loss.

    Raises:
        DataError: The lengths differ.
    """
    _same_length(correct=correct, margins=margins, losses=losses)
    return Tally("preference", _joined(losses, np.array([sum(correct), sum(margins)], np.float64)))


def answer_quality(references: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Return the similarity of answers to their references: `rouge_l` in 0..1 and `bleu` in 0..100.

    `rouge_l` is the mean F-measure over the pairs (Lin 2004; longest common subsequence of stemmed words).
    `bleu` is the corpus score (Papineni et al. 2002) with sacrebleu's default tokenizer and smoothing.
    It does not add over sites, so it is only for evaluation at the place of the references. No pairs give 0 and 0.

    Raises:
        DataError: The numbers of answers and references differ.
        StudyError: rouge_score or sacrebleu is not installed.
    """
    _same_length(references=references, answers=answers)
    rouge = optional("rouge_score.rouge_scorer", extra="generation")
    sacrebleu = optional("sacrebleu", extra="generation")
    if not references:
        return {"rouge_l": 0.0, "bleu": 0.0}
    scorer = rouge.RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(references, answers, strict=True)
    overlaps = [scorer.score(reference, answer)["rougeL"].fmeasure for reference, answer in pairs]
    # force: log no advice about text that looks tokenized
    bleu = sacrebleu.corpus_bleu(list(answers), [list(references)], force=True)
    return {"rouge_l": float(np.mean(overlaps)), "bleu": float(bleu.score)}


def binomial_interval(successes: float, trials: float, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a success probability.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference"; without continuity
    correction. Unlike the normal approximation it stays inside 0..1 and is not empty at 0 or all successes.
    Without trials, the interval is (0, 1).

    Raises:
        ProtocolError: Not 0 <= successes <= trials < infinity.
        StudyError: `confidence` is not strictly between 0 and 1.
    """
    if not 0 <= successes <= trials < math.inf:
        raise ProtocolError(
            f"a success rate: expected from 0 successes to as many as there are trials, found {successes} successes in "
            f"{trials} trials",
            "report this as a bug",
        )
    if not 0 < confidence < 1:
        raise StudyError(
            f"confidence: expected a number above 0 and below 1, found {confidence}", "choose for example 0.95"
        )
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, shrink = successes / trials, 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / trials + (z / (2 * trials)) ** 2)
    # At the ends the bounds are exactly 0 and 1; rounding would give values slightly off.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def _classification_metrics(tally: Tally, labels: Sequence[str]) -> dict[str, float]:
    confusion = _confusion(tally, labels)
    occurs = (confusion.sum(axis=0) + confusion.sum(axis=1)) > 0
    means = [_ratio(float(score[occurs].sum()), float(occurs.sum())) for score in _class_scores(confusion)]
    return {
        "loss": _mean_loss(tally),
        "accuracy": _ratio(float(np.trace(confusion)), float(confusion.sum())),
        "precision": means[0],
        "recall": means[1],
        "f1": means[2],
        "records": float(tally.sums[0]),
    }


def _token_metrics(tally: Tally) -> dict[str, float]:
    right, found, actual, tokens_right, tokens = (float(value) for value in tally.sums[_HEAD:])
    return {
        "loss": _mean_loss(tally),
        "f1": _ratio(2 * right, found + actual),
        "precision": _ratio(right, found),
        "recall": _ratio(right, actual),
        "token_accuracy": _ratio(tokens_right, tokens),
        "records": float(tally.sums[0]),
    }


def _pair_metrics(tally: Tally) -> dict[str, float]:
    records, _, right, margins = (float(value) for value in tally.sums)
    return {
        "loss": _mean_loss(tally),
        "accuracy": _ratio(right, records),
        "margin": _loss(margins, records),
        "records": records,
    }


def _lm_metrics(tally: Tally) -> dict[str, float]:
    records, nll, tokens = (float(value) for value in tally.sums)
    loss = _loss(nll, tokens)
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = sys.float_info.max
    return {"loss": loss, "perplexity": perplexity, "records": records}


def _confusion(tally: Tally, labels: Sequence[str]) -> NDArray[np.float64]:
    classes = math.isqrt(tally.sums.size - _HEAD)
    if len(labels) != classes:
        raise ProtocolError(
            f"validation counts: expected {len(labels)} classes, one for each label of the study, found {classes}",
            "make sure that all sites run the same study",
        )
    return tally.sums[_HEAD:].reshape(classes, classes)


def _class_scores(
    confusion: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return precision, recall and F1 [C] of each class, 0 where the denominator is 0."""
    right, found, actual = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    return _ratios(right, found), _ratios(right, actual), _ratios(2 * right, found + actual)


def _ratios(over: NDArray[np.float64], under: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(over, under, out=np.zeros_like(over), where=under != 0)


def _ratio(over: float, under: float) -> float:
    return over / under if under else 0.0


def _mean_loss(tally: Tally) -> float:
    return _loss(float(tally.sums[1]), float(tally.sums[0]))


def _loss(total: float, count: float) -> float:
    # A NaN or infinite total is reported even where nothing was counted.
    return _ratio(total, count) if math.isfinite(total) else total


def _joined(losses: Sequence[float], counts: NDArray[Any]) -> NDArray[np.float64]:
    return np.concatenate([[len(losses), np.sum(np.asarray(losses, dtype=np.float64))], counts])


def _same_length(**sequences: Sequence[object]) -> None:
    if len({len(sequence) for sequence in sequences.values()}) > 1:
        found = ", ".join(f"{len(sequence)} {name}" for name, sequence in sequences.items())
        raise DataError(f"values to score: expected one of each for each record, found {found}", "report this as a bug")


def _check_tags(tags: Sequence[str]) -> None:
    # Checked here, because seqeval quotes an unknown tag in a warning, and a tag found in data is private.
    if not all(tag == "O" or tag[:2] in ("B-", "I-") for tag in tags):
        raise DataError(
            "tags of words: expected the IOB2 form (O, B-NAME or I-NAME), found another tag",
            "convert the tags in the data file to IOB2, and list them in task.labels of the study",
        )


def optional(module: str, *, extra: str) -> Any:
    """Return a module of an optional dependency.

    Raises:
        StudyError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        package = module.partition(".")[0]
        raise StudyError(
            f"a metric of this task needs the Python package {package}, which is not installed",
            f"install it with `pip install 'privet[{extra}]'`",
        ) from None
