"""Figures of language models: likelihood of the reference answers, similarity of generated answers, multiple choice."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from privet.client.release.bootstrap import Array, Measure, Measured, divided, ratio
from privet.client.training.features import IGNORED, Feature
from privet.client.training.passes import Score
from privet.client.training.scores import optional
from privet.common.errors import DataError

_ORDER = 4  # n-grams of BLEU
_ARTICLES = frozenset({"a", "an", "the"})


# --- likelihood ------------------------------------------------------------------------------------------


def _perplexity(under: int) -> Any:
    def of(sums: Array) -> Array:
        found: Array = np.exp(divided(sums[..., 0], sums[..., under]))
        return found

    return of


def _bits(sums: Array) -> Array:
    return divided(sums[..., 0], sums[..., 3]) / math.log(2)


LIKELIHOOD = (
    Measure("perplexity", "perplexity per token", "lower", _perplexity(1)),
    Measure("word_perplexity", "perplexity per word", "lower", _perplexity(2)),
    Measure("bits_per_byte", "bits per byte", "lower", _bits),
)
"""Perplexities of models with different tokenizers compare per word or per byte, not per token."""


def sizes(features: Sequence[Feature], tokenizer: Any) -> Array:
    """Return the words and bytes (UTF-8) of each record's labelled tokens [n, 2]: of the text that is scored."""
    found = []
    for feature in features:
        labels = () if isinstance(feature.labels, int) else feature.labels
        text = tokenizer.decode([label for label in labels if label != IGNORED], skip_special_tokens=True)
        found.append((len(text.split()), len(text.strip().encode())))
    return np.array(found, np.float64).reshape(-1, 2)


def likelihood(base: Sequence[Score], tuned: Sequence[Score], texts: Array) -> Measured:
    """Return the likelihood of the reference answers: nats, tokens, words and bytes of each record.

    Tokens include the end of the answer.
    """
    sums = [
        np.column_stack([[found.total for found in scores], [len(found.truth) for found in scores], texts])
        for scores in (base, tuned)
    ]
    return Measured(LIKELIHOOD, sums[0], sums[1])


# --- generated answers -----------------------------------------------------------------------------------


def bleu(sums: Array) -> Array:
    """Return the corpus BLEU in 0..100 of sums [..., 10]: right n-grams, n-grams, answer length, reference length.

    As sacrebleu's default (Papineni et al. 2002; exponential smoothing as in Chen and Cherry 2014, method 3).
    """
    right, total = sums[..., :_ORDER], sums[..., _ORDER : 2 * _ORDER]
    length, reference = sums[..., 2 * _ORDER], sums[..., 2 * _ORDER + 1]
    smoothing = np.power(2.0, np.cumsum(right == 0, axis=-1))
    precision = divided(np.where(right == 0, 1.0 / smoothing, right), total)
    with np.errstate(all="ignore"):
        brevity = np.where(length < reference, np.exp(1 - reference / length), 1.0)
        mean = np.exp(np.log(precision).mean(axis=-1))
    empty = (right.sum(-1) == 0) | (total == 0).any(axis=-1) | (length == 0)
    found: Array = np.where(empty, 0.0, 100 * brevity * mean)
    return found


EXACT = Measure("exact_match", "exact match", "higher", ratio(2, 3), percent=True)
ANSWERS = (
    Measure("rouge_l", "ROUGE-L", "higher", ratio(0, 3), percent=True),
    Measure("token_f1", "word F1", "higher", ratio(1, 3), percent=True),
    EXACT,
    Measure("bleu", "BLEU", "higher", lambda sums: bleu(sums[..., 4:])),
)


def normalised(text: str) -> list[str]:
    """Return the words of an answer without case, punctuation and the articles a, an, the (Rajpurkar et al. 2016)."""
    text = unicodedata.normalize("NFKC", text).casefold()
    # White space in place of punctuation: "10/12" and "10 12" stay two numbers.
    text = "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in text)
    return [word for word in re.split(r"\s+", text) if word and word not in _ARTICLES]


def word_f1(reference: Sequence[str], answer: Sequence[str]) -> float:
    """Return the F1 of two bags of words; 1 if both are empty."""
    if not reference or not answer:
        return float(not reference and not answer)
    shared = sum((Counter(reference) & Counter(answer)).values())
    return 2 * shared / (len(reference) + len(answer))


def answer_sums(references: Sequence[str], answers: Sequence[str]) -> Array:
    """Return for each pair [n, 14]: ROUGE-L, word F1, exact match, 1, and the ten sums of `bleu`.

    Raises:
        StudyError: rouge_score or sacrebleu is not installed.
    """
    rouge = optional("rouge_score.rouge_scorer", extra="generation").RougeScorer(["rougeL"], use_stemmer=True)
    counted = optional("sacrebleu.metrics", extra="generation").BLEU(effective_order=True)
    rows = []
    for reference, answer in zip(references, answers, strict=True):
        true, given = normalised(reference), normalised(answer)
        found = counted.sentence_score(answer, [reference])
        row = [rouge.score(reference, answer)["rougeL"].fmeasure, word_f1(true, given), float(true == given), 1.0]
        rows.append([*row, *found.counts, *found.totals, found.sys_len, found.ref_len])
    return np.array(rows, np.float64).reshape(-1, 4 + 2 * _ORDER + 2)


# --- right answers ---------------------------------------------------------------------------------------

_MOST_ANSWERS = 20
"""Distinct answers: a study with more of them does not choose one of a closed set."""
_MOST_WORDS = 3


def closed(references: Sequence[str]) -> bool:
    """Return whether reference answers are few short ones that recur, so that an answer is right or wrong."""
    distinct = {tuple(normalised(text)) for text in references}
    few = 2 <= len(distinct) <= min(_MOST_ANSWERS, len(references) // 2)
    return few and all(len(words) <= _MOST_WORDS for words in distinct)


def part_of(text: str, part: str) -> list[str] | None:
    """Return the words of a part of an answer, `PART: value`, up to a full stop; None if it has no such part."""
    found = re.search(rf"(?<!\w){re.escape(part)}\s*:([^.;\n]*)", text, re.IGNORECASE)
    return None if found is None else normalised(found[1])


def right_part(part: str) -> Measure:
    """Return the measure of how often a part of the answer is right."""
    return Measure("right_part", f"right “{part}”", "higher", ratio(0, 1), percent=True)


def part_sums(references: Sequence[str], answers: Sequence[str], part: str) -> Array:
    """Return for each pair [n, 2]: whether the part is the same in both, 1.

    Raises:
        DataError: A reference answer has no such part.
    """
    wanted = [part_of(text, part) for text in references]
    if None in wanted:
        raise DataError(
            f"--part {part}: expected `{part}: …` in each reference answer, found it in "
            f"{len(wanted) - wanted.count(None)} of {len(wanted)}",
            "name a part that each answer has, or leave --part out",
        )
    given = [part_of(text, part) for text in answers]
    return np.array([[float(a == b), 1.0] for a, b in zip(wanted, given, strict=True)], np.float64).reshape(-1, 2)


# --- multiple choice -------------------------------------------------------------------------------------

CHOICES = (
    Measure("choice", "multiple choice", "higher", ratio(0, 2), percent=True),
    Measure("choice_normalised", "multiple choice, per byte", "higher", ratio(1, 2), percent=True),
)


def choice_sums(losses: Sequence[Sequence[float]], choices: Sequence[Sequence[str]], right: Sequence[int]) -> Array:
    """Return for each question [n, 3]: whether the right choice is the likeliest, whether it is per byte, 1.

    The choice per byte removes the advantage of short choices; language model benchmarks call it `acc_norm`.

    Args:
        losses: Negative log-likelihood of each choice of each question, in nats.
        choices: The choices.
        right: Index of the right one.
    """
    rows = []
    for nats, texts, true in zip(losses, choices, right, strict=True):
        per_byte = [loss / max(len(text.encode()), 1) for loss, text in zip(nats, texts, strict=True)]
        rows.append([float(np.argmin(nats) == true), float(np.argmin(per_byte) == true), 1.0])
    return np.array(rows, np.float64).reshape(-1, 3)
