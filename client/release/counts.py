"""Counts of what an adapter answered at a site, and how far they have drifted from the site's own reference.

A count holds no text and no identifier: of each input its length, the predicted classes, and how sure the model was,
each only as one more in a class or an interval. The intervals are fixed, so the memory does not grow. The counts are
exact, and follow from real records: they are the site's own, and nothing here sends them anywhere.

What is published follows behind, so that no step of a figure is one person's: a state is published once `LEAST` more
inputs were answered, and counts of classes and intervals are rounded down to a multiple of `LEAST`.

Drift compares the newest inputs (between `WINDOW` and twice as many) with the reference, histogram by histogram:

* the population stability index, sum (p - q) ln(p / q), in nats, with 1/2 added to each count (Yurdakul, "Statistical
  properties of population stability index", 2018, section 2);
* the Jensen-Shannon divergence to base 2, between 0 and 1 (Lin, "Divergence measures based on the Shannon entropy",
  IEEE Trans. Inf. Theory 37(1), 1991, equation 3.1).
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt, model_validator

from privet.common.study.study import Study

LEAST = 10
"""Inputs that one step of a published figure holds at least."""
WINDOW = 1000
CONFIDENCE = tuple(round(place / 20, 2) for place in range(1, 21))
"""Upper ends of the intervals of a probability."""
CHARACTERS = tuple(round(8 * 2 ** (place / 2)) for place in range(27))
"""Upper ends of the intervals of a length: 8 to 65,536 characters. Longer ones have an interval of their own."""
TOKENS = tuple(2**place for place in range(13))
"""The same for answers, in tokens."""
FINISHED, CUT = "finished", "cut"
NO_SPAN = "no span"
Reason = Literal["no_text", "too_long", "malformed", "too_many_waiting", "failed"]
REASONS: tuple[Reason, ...] = ("no_text", "too_long", "malformed", "too_many_waiting", "failed")
Part = Literal["classes", "confidence", "characters", "tokens"]
PARTS: tuple[Part, ...] = ("classes", "confidence", "characters", "tokens")
_CHANCE = 3.0902
"""Standard normal quantile of 0.999."""


@dataclass(frozen=True)
class Outcome:
    """What is counted of one answered input.

    Attributes:
        characters: Length of the input.
        classes: The predicted classes: one of a text, one for each span of words, or how an answer ended.
        confidence: The probability of each, where there is one.
        tokens: Length of a generated answer.
    """

    characters: int
    classes: Sequence[str]
    confidence: Sequence[float] = ()
    tokens: int | None = None


class _Stored(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Tally(_Stored):
    """Counts of some inputs.

    Attributes:
        inputs: Their number.
        classes: By class.
        confidence, characters, tokens: By interval; the last interval has no upper end.
    """

    inputs: NonNegativeInt = 0
    classes: list[NonNegativeInt]
    confidence: list[NonNegativeInt]
    characters: list[NonNegativeInt]
    tokens: list[NonNegativeInt]

    @classmethod
    def empty(cls, classes: int) -> Self:
        """Return the counts of no input."""
        return cls(
            classes=[0] * classes,
            confidence=[0] * (len(CONFIDENCE) + 1),
            characters=[0] * (len(CHARACTERS) + 1),
            tokens=[0] * (len(TOKENS) + 1),
        )

    def of(self, part: Part) -> list[int]:
        """Return one histogram."""
        found: list[int] = getattr(self, part)
        return found

    def fits(self, other: Tally) -> bool:
        """Return whether both have the same classes and intervals."""
        return all(len(self.of(part)) == len(other.of(part)) for part in PARTS)

    def plus(self, other: Tally) -> Tally:
        """Return the counts of both."""
        both = self.model_copy(deep=True)
        both.inputs += other.inputs
        for part in PARTS:
            both.of(part)[:] = [a + b for a, b in zip(self.of(part), other.of(part), strict=True)]
        return both


class Shown(_Stored):
    """What is published, of `state`'s moment: counts as they were, and drift to two decimals."""

    tally: Tally
    recent: NonNegativeInt = 0
    """Number of inputs that drift is measured over."""
    drift: dict[Part, tuple[float, float, float]] = {}
    """By histogram: stability index, divergence, and the index that chance alone exceeds once in 1,000 windows."""


class State(_Stored):
    """The counts of one adapter, as they are kept in a file."""

    format: Literal[1] = 1
    adapter: str
    classes: tuple[str, ...]
    total: Tally
    window: Tally
    before: Tally
    shown: Shown
    refused: dict[Reason, NonNegativeInt]

    @classmethod
    def new(cls, adapter: str, classes: Sequence[str]) -> Self:
        """Return the state before the first input."""
        total, window, before, shown = (Tally.empty(len(classes)) for _ in range(4))
        return cls(
            adapter=adapter, classes=tuple(classes), total=total, window=window, before=before,
            shown=Shown(tally=shown), refused=dict.fromkeys(REASONS, 0),
        )  # fmt: skip

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        expected = Tally.empty(len(self.classes))
        if not all(each.fits(expected) for each in (self.total, self.window, self.before, self.shown.tally)):
            raise ValueError("the counts have other classes or intervals")
        if set(self.refused) != set(REASONS):
            raise ValueError("the counts have other reasons")
        return self


def classes_of(study: Study) -> tuple[str, ...]:
    """Return the classes that are counted for a study: its labels, labels of spans, or how answers end."""
    if study.task.generates:
        return FINISHED, CUT
    if study.task.kind == "token-classification":
        return (*dict.fromkeys(label[2:] for label in study.task.labels if label[1:2] == "-"), NO_SPAN)
    return study.task.labels


class Counts:
    """Counts inputs, from any thread."""

    def __init__(self, state: State, reference: Tally | None = None) -> None:
        """Go on from a state, and compare with a reference."""
        self._state, self._reference = state, reference
        self._places = {name: place for place, name in enumerate(state.classes)}
        self._lock = threading.Lock()

    def answered(self, outcome: Outcome) -> None:
        """Count an answered input. This takes microseconds."""
        classes = [self._places[name] for name in outcome.classes]
        sure = [bisect_left(CONFIDENCE, value) for value in outcome.confidence]
        length = bisect_left(CHARACTERS, outcome.characters)
        tokens = None if outcome.tokens is None else bisect_left(TOKENS, outcome.tokens)
        state = self._state
        with self._lock:
            if state.window.inputs >= WINDOW:
                state.before, state.window = state.window, Tally.empty(len(state.classes))
            for tally in (state.total, state.window):
                tally.inputs += 1
                tally.characters[length] += 1
                for place in classes:
                    tally.classes[place] += 1
                for place in sure:
                    tally.confidence[place] += 1
                if tokens is not None:
                    tally.tokens[tokens] += 1

    def refused(self, reason: Reason) -> None:
        """Count an input that got no answer."""
        with self._lock:
            self._state.refused[reason] += 1

    def state(self) -> State:
        """Return a copy of the state, whose published part follows once enough inputs were answered."""
        with self._lock:
            state = self._state
            if state.total.inputs - state.shown.tally.inputs >= LEAST:
                recent = state.window.plus(state.before)
                found = {} if self._reference is None else drifts(recent, self._reference)
                state.shown = Shown(tally=state.total.model_copy(deep=True), recent=recent.inputs, drift=found)
            return state.model_copy(deep=True)


def drifts(recent: Tally, reference: Tally) -> dict[Part, tuple[float, float, float]]:
    """Return the drift of each histogram that holds something, as `Shown.drift`, rounded to two decimals."""
    found = {}
    for part in PARTS:
        now, then = recent.of(part), reference.of(part)
        if sum(now) and sum(then):
            values = stability(now, then), divergence(now, then), by_chance(now, then)
            found[part] = (round(values[0], 2), round(values[1], 2), round(values[2], 2))
    return found


def stability(now: Sequence[int], then: Sequence[int]) -> float:
    """Return the population stability index of two histograms, in nats, over intervals that either of them fills."""
    pairs = [(a + 0.5, b + 0.5) for a, b in zip(now, then, strict=True) if a or b]
    here, there = sum(a for a, _ in pairs), sum(b for _, b in pairs)
    return sum((a / here - b / there) * math.log((a / here) / (b / there)) for a, b in pairs)


def divergence(now: Sequence[int], then: Sequence[int]) -> float:
    """Return the Jensen-Shannon divergence of two histograms to base 2: 0 for equal shares, 1 for disjoint ones."""
    here, there, bits = sum(now), sum(then), 0.0
    for a, b in zip(now, then, strict=True):
        p, q = a / here, b / there
        bits += sum(0.5 * x * math.log2(2 * x / (p + q)) for x in (p, q) if x)
    return min(max(bits, 0.0), 1.0)


def by_chance(now: Sequence[int], then: Sequence[int]) -> float:
    """Return the stability index that two samples of one distribution exceed with probability 0.001.

    Of n and m values in k intervals, it is about (1/n + 1/m) times a chi-squared variable with k - 1 degrees of freedom
    (Yurdakul 2018, section 3). Its quantile is Wilson and Hilferty's (PNAS 17, 1931).
    """
    free = sum(1 for a, b in zip(now, then, strict=True) if a or b) - 1
    if not free:
        return 0.0
    quantile = free * (1 - 2 / (9 * free) + _CHANCE * math.sqrt(2 / (9 * free))) ** 3
    return quantile * (1 / sum(now) + 1 / sum(then))
