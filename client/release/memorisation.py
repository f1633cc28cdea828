"""What the tuned model repeats of its training data and the base does not: runs of words, and planted canaries.

Runs of words. The model continues the beginning of a training answer, and we look for the longest run of words that it
shares with the rest of that answer (Carlini et al. 2021, "Extracting Training Data from Large Language Models"). A
model may also repeat what it never saw, because a domain has set phrases. So the same is done with answers that it was
not trained on.

Canaries. Strings with a random part were planted in the training data. Their exposure is log2 of how far up a canary
ranks, by its likelihood, among equal strings with other random parts (Carlini et al. 2019, "The Secret Sharer", section
4): log2(R) - log2(rank) for a canary and R - 1 random alternatives. A model that has not memorised ranks a canary
anywhere: its mean exposure is about log2(e) = 1.44 bits.

Results hold counts. Texts of records are returned for the site's own screen alone, and stand in no error.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from privet.client.release.bootstrap import Array, Measure, Measured, ratio
from privet.client.training.features import IGNORED, Feature
from privet.common.errors import DataError
from privet.common.privacy.noise import SeededRandomness

RUNS = (8, 13)
"""Words in a row that count as repeated; 13 is a common length in tests for training data in benchmarks."""

PREFIX = 16
"""Tokens of an answer that the model is given."""

CONTINUED = 48
"""Most tokens that it adds."""


# --- runs of words ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opening:
    """The beginning of an answer, and what follows.

    Attributes:
        head: Tokens of the prompt and of the answer's beginning.
        rest: The words that follow in the answer.
    """

    head: tuple[int, ...]
    rest: tuple[str, ...]


def openings(features: Sequence[Feature], tokenizer: Any, most: int, seed: int) -> list[Opening]:
    """Return up to `most` openings, of records that are drawn by a seed.

    Answers with fewer than `RUNS[0]` words after `PREFIX` tokens have none.
    """
    found: list[Opening] = []
    for index in shuffled(len(features), seed, "openings"):
        labels = features[index].labels
        if len(found) == most or isinstance(labels, int):
            break
        opening = _opening(features[index].ids, labels, tokenizer)
        if opening is not None:
            found.append(opening)
    return found


def _opening(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> Opening | None:
    runs, place = [(0, 0)], 0
    for labelled, own in groupby(labels, lambda label: label != IGNORED):
        length = len(list(own))
        runs += [(place, place + length)] if labelled else []
        place += length
    # Of a conversation, the longest answer; of equal ones, the first.
    start, end = max(runs, key=lambda run: run[1] - run[0])
    cut = start + PREFIX
    rest = words_of(tokenizer.decode(list(ids[cut:end]), skip_special_tokens=True)) if cut < end else []
    return Opening(tuple(ids[:cut]), tuple(rest)) if len(rest) >= RUNS[0] else None


def shuffled(count: int, seed: int, purpose: str) -> list[int]:
    """Return the numbers below `count` in an order that the seed decides."""
    return [int(index) for index in np.argsort(SeededRandomness(seed, purpose).uniform(count), kind="stable")]


def words_of(text: str) -> list[str]:
    """Return the words of a text without case and outer punctuation."""
    stripped = (word.strip(string.punctuation) for word in text.casefold().split())
    return [word for word in stripped if word]


def longest_run(rest: Sequence[str], continuation: Sequence[str]) -> int:
    """Return the number of words of the longest run that both texts hold."""
    best, before = 0, [0] * (len(continuation) + 1)
    for word in rest:
        row = [0] * (len(continuation) + 1)
        for place, other in enumerate(continuation, start=1):
            if word == other:
                row[place] = before[place - 1] + 1
        best, before = max(best, *row), row
    return best


REPEATED = tuple(
    Measure(f"repeated_{run}", f"repeats {run} words in a row", "lower", ratio(place, len(RUNS)), percent=True)
    for place, run in enumerate(RUNS)
)


def run_sums(found: Sequence[Opening], continuations: Sequence[Sequence[str]]) -> tuple[Array, list[int]]:
    """Return for each opening whether a continuation repeats so many words, and 1 [n, runs + 1]; and its longest run.

    Args:
        found: The openings.
        continuations: One or more continuations of each opening.
    """
    longest = [
        max(longest_run(opening.rest, words_of(text)) for text in texts)
        for opening, texts in zip(found, continuations, strict=True)
    ]
    rows = np.array([[float(run >= n) for n in RUNS] + [1.0] for run in longest], np.float64)
    return rows.reshape(-1, len(RUNS) + 1), longest


def repeated(base: Array, tuned: Array) -> Measured:
    """Return the sums of base and tuned model."""
    return Measured(REPEATED, base, tuned)


def newly(base: Sequence[int], tuned: Sequence[int], run: int) -> int:
    """Return how many openings the tuned model continues with a run of so many words, and the base does not."""
    return sum(b < run <= t for b, t in zip(base, tuned, strict=True))


# --- canaries --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Canary:
    """A planted record: its prompt, its answer, and the part of the answer that was drawn at random."""

    prompt: str
    answer: str
    secret: str


def read_canaries(path: Path, prompt: str, answer: str) -> list[Canary]:
    """Read planted records: JSON Lines with the study's columns of prompt and answer, and optionally `secret`.

    The secret is the part of the answer that was drawn at random; without it, the digits of the answer are.

    Raises:
        DataError: The file cannot be read, a line lacks a column, or an answer has no random part. Errors hold line
            numbers, and nothing of a line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the canaries {path.name} cannot be read ({type(error).__name__})", "check the path; the file is UTF-8"
        ) from None
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found.append(_canary(line, number, path.name, prompt, answer))
    if not found:
        raise DataError(f"the canaries {path.name}: expected at least 1 line, found none", "name the file of canaries")
    return found


def _canary(line: str, number: int, file: str, prompt: str, answer: str) -> Canary:
    try:
        row = json.loads(line)
        texts = row[prompt], row[answer], row.get("secret")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        texts = None, None, None
    asked, given, secret = texts
    if not isinstance(asked, str) or not isinstance(given, str) or not isinstance(secret, str | None):
        raise DataError(
            f"{file}: line {number} is not one JSON object with the texts {prompt} and {answer}",
            f'write each canary as {{"{prompt}": "...", "{answer}": "...", "secret": "..."}} on a line of its own',
        )
    if secret is not None and (secret not in given or not any(map(_is_drawn, secret))):
        raise DataError(
            f"{file}: line {number}: expected a secret with letters or digits that is part of the answer",
            "copy the random part of the answer into `secret`",
        )
    if secret is None and not any(character in string.digits for character in given):
        raise DataError(
            f"{file}: line {number} has no `secret`, and its answer no digits that could be the random part",
            "add the random part of the answer as `secret`",
        )
    return Canary(asked, given.strip(), secret or "")


def _is_drawn(character: str) -> bool:
    return character in string.ascii_letters or character in string.digits


def alternatives(canary: Canary, count: int, seed: int, place: int) -> list[str]:
    """Return answers with other random parts of the same form: digits for digits, letters for letters of that case.

    Args:
        canary: The planted record.
        count: How many.
        seed: The same seed gives the same alternatives.
        place: Number of the canary, so that equal canaries get different alternatives.
    """
    draws = SeededRandomness(seed, "alternatives", place)

    def drawn(text: str, kinds: Sequence[str]) -> str:
        chosen = draws.uniform(len(text))
        return "".join(_another(c, kinds, x) for c, x in zip(text, chosen, strict=True))

    if not canary.secret:
        return [drawn(canary.answer, (string.digits,)) for _ in range(count)]
    kinds = (string.digits, string.ascii_lowercase, string.ascii_uppercase)
    before, _, after = canary.answer.partition(canary.secret)
    return [before + drawn(canary.secret, kinds) + after for _ in range(count)]


def _another(character: str, kinds: Sequence[str], draw: float) -> str:
    kind = next((kind for kind in kinds if character in kind), "")
    return kind[int(draw * len(kind))] if kind else character


def canary_sums(losses: Sequence[Sequence[float]]) -> Array:
    """Return for each canary [n, 3]: its exposure in bits, whether it ranks first, 1.

    Alternatives as likely as the canary rank above it, so that equal losses show no exposure.

    Args:
        losses: Of each canary and its alternatives, canary first.
    """
    rows = []
    for canary, *others in losses:
        rank = 1 + sum(not other > canary for other in others)
        rows.append([math.log2(len(others) + 1) - math.log2(rank), float(rank == 1), 1.0])
    return np.array(rows, np.float64).reshape(-1, 3)


def canary_measures(most: float) -> tuple[Measure, ...]:
    """Return the measures of canaries, whose largest exposure is `most` bits."""
    return (
        Measure("exposure", f"mean exposure in bits, of at most {most:.1f}", "lower", ratio(0, 2)),
        Measure("first", "canaries that rank first", "lower", ratio(1, 2), percent=True),
    )


Losses = Callable[[Sequence[tuple[str, str]]], Sequence[float]]
"""From pairs of prompt and answer to the negative log-likelihood of each answer, in nats."""


def canary_losses(planted: Sequence[Canary], count: int, seed: int, losses: Losses) -> list[list[float]]:
    """Return the losses of each canary and its alternatives, canary first. Alternatives equal to it are left out."""
    texts = [
        [canary.answer, *(text for text in alternatives(canary, count, seed, place) if text != canary.answer)]
        for place, canary in enumerate(planted)
    ]
    pairs = [(canary.prompt, text) for canary, own in zip(planted, texts, strict=True) for text in own]
    flat = iter(losses(pairs))
    return [[next(flat) for _ in own] for own in texts]
