"""Figures of classifiers: accuracy, F1, confusion, calibration, and thresholds for one class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privet.client.pages.suppression import hidden
from privet.client.release.bootstrap import (
    Array,
    Compared,
    Measure,
    Measured,
    Resampling,
    compared,
    divided,
    interval,
    ratio,
)

BINS = 10
_TOP = (3, 5)
_SMALLEST_PROBABILITY = 1e-12  # so that one wrong certainty leaves the mean log loss finite
_GRID = tuple(n / 10 for n in range(1, 10))

Labels = NDArray[np.int64]


def class_measures(classes: int) -> tuple[Measure, ...]:
    """Return the measures of `class_sums`, of which accuracy is the first."""
    top = [k for k in _TOP if k < classes - 1]
    return (
        Measure("accuracy", "accuracy", "higher", ratio(0, 1), percent=True),
        Measure("macro_f1", "macro-F1", "higher", lambda sums: macro_f1(sums[..., 4 + len(top) :]), percent=True),
        Measure("log_loss", "log loss", "lower", ratio(2, 1)),
        Measure("brier", "Brier score", "lower", ratio(3, 1)),
        *(
            Measure(f"top_{k}", f"top-{k} accuracy", "higher", ratio(4 + place, 1), percent=True)
            for place, k in enumerate(top)
        ),
    )


def class_sums(truth: Labels, probabilities: Array) -> Array:
    """Return for each text [n, k]: right, 1, log loss, Brier score, right among the first k, and 3 counts a class.

    The counts of a class are: right, predicted, true. The Brier score is the sum over the classes (Brier 1950), from
    0 to 2.

    Args:
        truth: Class of each text [n].
        probabilities: Of each class [n, classes].
    """
    count, classes = probabilities.shape
    predicted, of_truth = probabilities.argmax(1), probabilities[np.arange(count), truth]
    true, guess = np.eye(classes)[truth], np.eye(classes)[predicted]
    # Ties count against the model: a base without a head gives all classes the same probability.
    rank = (probabilities >= of_truth[:, None]).sum(1)
    columns = [
        predicted == truth,
        np.ones(count),
        -np.log(np.maximum(of_truth, _SMALLEST_PROBABILITY)),
        ((probabilities - true) ** 2).sum(1),
        *(rank <= k for k in _TOP if k < classes - 1),
    ]
    return np.column_stack([*columns, true * guess, guess, true]).astype(np.float64)


def classified(truth: Labels, base: Array, tuned: Array) -> Measured:
    """Return the sums of base and tuned model, from their probabilities [n, classes]."""
    return Measured(class_measures(base.shape[1]), class_sums(truth, base), class_sums(truth, tuned))


def macro_f1(sums: Array) -> Array:
    """Return the mean F1 of the classes that occur in truth or prediction, from counts [..., 3 * classes]."""
    right, found, true = np.split(sums, 3, axis=-1)
    occurs = found + true > 0
    scores = np.where(occurs, 2 * right / np.maximum(found + true, 1), 0.0)
    return divided(scores.sum(-1), occurs.sum(-1))


def _f1(sums: Array) -> Array:
    return divided(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


ONE_CLASS = (
    Measure("precision", "precision", "higher", ratio(0, 1), percent=True),
    Measure("recall", "recall", "higher", ratio(0, 2), percent=True),
    Measure("f1", "F1", "higher", _f1, percent=True),
)


def by_class(truth: Labels, base: Array, tuned: Array, one: int) -> Measured:
    """Return the sums of one class [n, 3]: right, predicted, true."""
    sums = []
    for probabilities in (base, tuned):
        guess, true = probabilities.argmax(1) == one, truth == one
        sums.append(np.column_stack([guess & true, guess, true]).astype(np.float64))
    return Measured(ONE_CLASS, sums[0], sums[1])


def confusion(
    truth: Labels, probabilities: Array, labels: Sequence[str], units: Sequence[str], smallest: int
) -> list[dict[str, Any]]:
    """Return for each class the share of its texts that is predicted as each class, in percent.

    The row of a class with too few units is hidden, with a second one if it would follow from the others.

    Args:
        truth: Class of each text [n].
        probabilities: Of each class [n, classes].
        labels: Names of the classes.
        units: Unit of each text [n].
        smallest: Least number of units of a row that is shown.
    """
    predicted, names = probabilities.argmax(1), np.array(units)
    counts = {label: float(len(set(names[truth == place].tolist()))) for place, label in enumerate(labels)}
    secret, rows = hidden(counts, smallest), []
    for place, label in enumerate(labels):
        own = predicted[truth == place]
        shares = None
        if label not in secret and len(own):
            shares = {
                other: round(100 * float(np.mean(own == column)), 1)
                for column, other in enumerate(labels)
                if (own == column).any()
            }
        rows.append({"label": label, "hidden": label in secret, "predicted": shares})
    return rows


# --- calibration -----------------------------------------------------------------------------------------


def reliability(truth: Labels, probabilities: Array, bins: int = BINS) -> tuple[float, list[dict[str, float]]]:
    """Return the expected calibration error and its table: bins with equally many texts, by the largest probability.

    Nixon et al. 2019, "Measuring Calibration in Deep Learning": bins of equal mass, as most probabilities of a
    classifier lie close together. Texts of one probability share a bin. The error has no interval: it is a sum of
    absolute values, which resampling can only raise.

    Args:
        truth: Class of each text [n].
        probabilities: Of each class [n, classes].
        bins: Most bins.
    """
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == truth
    edges = np.unique(np.quantile(confidence, np.linspace(0, 1, bins + 1)[1:-1]))
    place = np.searchsorted(edges, confidence, side="left")
    rows, error = [], 0.0
    for number in np.unique(place):
        own = place == number
        stated, found = float(confidence[own].mean()), float(right[own].mean())
        error += float(own.mean()) * abs(stated - found)
        rows.append({"texts": int(own.sum()), "stated": stated, "right": found})
    return error, rows


# --- thresholds for one class ----------------------------------------------------------------------------


def auroc(weights: Array, positive: NDArray[np.bool_], scores: Array) -> Array:
    """Return the area under the ROC curve for each row of weights [r, n]; NaN without both kinds of texts.

    The probability that a positive text scores above a negative one; ties count half.
    """
    good, bad = _by_score(weights, positive, scores)
    above = np.cumsum(good, axis=1) - good
    return divided((bad * (above + good / 2)).sum(1), good.sum(1) * bad.sum(1))


def auprc(weights: Array, positive: NDArray[np.bool_], scores: Array) -> Array:
    """Return the average precision for each row of weights [r, n]; NaN without positive texts."""
    good, bad = _by_score(weights, positive, scores)
    right = np.cumsum(good, axis=1)
    precision = right / np.maximum(right + np.cumsum(bad, axis=1), 1e-300)
    return divided((good * precision).sum(1), good.sum(1))


def _by_score(weights: Array, positive: NDArray[np.bool_], scores: Array) -> tuple[Array, Array]:
    """Return the weight of positive and negative texts at each distinct score [r, k], from the highest score down."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    sums = [np.add.reduceat((weights * kind)[:, order], starts, axis=1) for kind in (positive, ~positive)]
    return sums[0], sums[1]


RANKING = (
    (Measure("auroc", "AUROC", "higher", lambda sums: sums), auroc),
    (Measure("auprc", "AUPRC", "higher", lambda sums: sums), auprc),
)


def ranking(
    positive: NDArray[np.bool_], base: Array, tuned: Array, resampling: Resampling
) -> list[tuple[Measure, Compared]]:
    """Return AUROC and AUPRC of one class for base and tuned model, from its probabilities [n]."""
    found, once = [], np.ones((1, len(positive)))
    for measure, area in RANKING:
        whole, replicates = [], []
        for scores in (base, tuned):
            whole.append(float(area(once, positive, scores)[0]))
            replicates.append(resampling.replicated(lambda w, s=scores, a=area: a(w, positive, s)))  # type: ignore[misc]
        both = compared((whole[0], whole[1]), (replicates[0], replicates[1]), len(positive), resampling.units)
        found.append((measure, both))
    return found


def youden(positive: NDArray[np.bool_], scores: Array) -> float:
    """Return the threshold with the largest sensitivity plus specificity (Youden 1950), the highest of equals."""
    good, bad = _by_score(np.ones((1, len(scores))), positive, scores)
    index = np.cumsum(good[0]) / max(good.sum(), 1) - np.cumsum(bad[0]) / max(bad.sum(), 1)
    return float(np.unique(scores)[::-1][int(np.argmax(index))])


def thresholds(positive: NDArray[np.bool_], scores: Array, resampling: Resampling) -> list[dict[str, Any]]:
    """Return sensitivity, specificity, PPV and NPV at some thresholds, with intervals.

    A text counts as positive from the threshold up. The threshold by Youden is chosen on these very texts, so its
    figures are better than they will be on other texts.

    Args:
        positive: Whether each text is of the class [n].
        scores: The model's probability of the class [n].
        resampling: Of the texts.
    """
    best = youden(positive, scores)
    cuts = sorted({*_GRID, best})
    counts = []
    for cut in cuts:
        flagged = scores >= cut
        counts += [flagged & positive, flagged, positive, ~flagged & ~positive, ~flagged, ~positive]
    sums = np.column_stack(counts).astype(np.float64)
    drawn, whole = resampling.sums(sums), sums.sum(0)
    rows = []
    for place, cut in enumerate(cuts):
        own = slice(6 * place, 6 * (place + 1))
        row: dict[str, Any] = {"threshold": cut, "youden": cut == best, "flagged": float(np.mean(scores >= cut))}
        for name, (over, under) in _RATES.items():
            of = ratio(over, under)
            row[name] = interval(float(of(whole[own])), of(drawn[:, own]))
        rows.append(row)
    return rows


_RATES = {"sensitivity": (0, 2), "specificity": (3, 5), "ppv": (0, 1), "npv": (3, 4)}
