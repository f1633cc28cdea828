"""What releases cost a dataset: limits, mechanisms, and the one epsilon that a history composes to.

Pure: no file and no clock. `client/budget/ledger.py` keeps the history that these functions interpret.

Guarantee of `composed`: let a study with validation fraction f train on the units whose hash h in [0, 1) is f or
more and validate on the others, h depending on the unit alone and being the same in every study of the dataset (the
caller sees to that). Adding or removing one unit then moves no other, and touches training or validation of each
study, never both. The distinct fractions cut [0, 1) into classes of units that paid for the same mechanisms; the
epsilon of the dataset is that of the class that paid most. Within a class the events are composed and turned into
one epsilon: epsilons are never added.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from privet.common.errors import BudgetExhaustedError, RefusedError, StateError
from privet.common.privacy.accounting import PrivacyEvent, epsilon
from privet.common.study.sections import NAME_PATTERN

Unit = Literal["record", "patient"]

_UNITS = ("record", "patient")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(NAME_PATTERN)
# JSON holds integers exactly below this.
_LARGEST = 2**53
_MOST_CLASSES = 64


@dataclass(frozen=True)
class Limit:
    """A site's promise for the lifetime of one dataset.

    Attributes:
        unit: Whom it protects. Only mechanisms of this very unit are within it. In particular a patient-level
            mechanism is not record-level at the same epsilon: one record more turns its patient's clipped sum,
            which moves up to 2C where the patient's coming or going moves C.
        epsilon: What all releases together may cost, at `delta`.
        delta: Of the composed guarantee.
    """

    unit: Unit
    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        _require(self.unit in _UNITS, "limit.unit", "record or patient", self.unit)
        _require(
            _is_number(self.epsilon) and self.epsilon > 0, "limit.epsilon", "a finite number above 0", self.epsilon
        )
        _require(_is_number(self.delta) and 0 < self.delta < 1, "limit.delta", "a number in (0, 1)", self.delta)


@dataclass(frozen=True)
class RoundKey:
    """What is released: one round of one study on one dataset.

    Attributes:
        dataset: The name that the operator gave the dataset. A new version or place of the data keeps it, and with
            it what was spent.
        study: Digest of the study, `sha256:<hex>`.
        round: From 1.
    """

    dataset: str
    study: str
    round: int

    def __post_init__(self) -> None:
        _require(bool(_NAME.fullmatch(self.dataset)), "dataset", "lower-case letters, digits and dashes", self.dataset)
        require_digest("study", self.study)
        require_count("round", self.round)


@dataclass(frozen=True)
class Cost:
    """The mechanism of one round, as data.

    Attributes:
        training: What a training unit pays.
        validation: What a validation unit pays; None exactly where the fraction is 0.
        validation_fraction: Units whose hash lies below it validate, the others train. In [0, 1).
        split: By what the units are named when they are hashed. Studies with the same have the same hash of each unit.
    """

    training: PrivacyEvent
    validation: PrivacyEvent | None = None
    validation_fraction: float = 0.0
    split: str = ""

    def __post_init__(self) -> None:
        fraction = self.validation_fraction
        _require(_is_number(fraction) and 0 <= fraction < 1, "validation_fraction", "a number in [0, 1)", fraction)
        if (self.validation is None) != (fraction == 0):
            raise RefusedError("cost: a validation event and a validation fraction above 0 go together")
        for event in (self.training, self.validation):
            if event is not None:
                _check_event(event)
        if self.validation is not None and self.validation.unit != self.training.unit:
            raise RefusedError("cost: training and validation must protect the same unit")

    @property
    def unit(self) -> str:
        """Whom the mechanism protects."""
        return self.training.unit

    def document(self) -> dict[str, Any]:
        """Return the cost as plain JSON values."""
        return {
            "training": self.training.document(),
            "validation": None if self.validation is None else self.validation.document(),
            "validation_fraction": self.validation_fraction,
            "split": self.split,
        }

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> Cost:
        """Read what `document` gave.

        Raises:
            StateError: It describes a mechanism that this version does not know.
        """
        validation = document.get("validation")
        return cls(
            _parse_event(document.get("training", {})),
            None if validation is None else _parse_event(validation),
            float(document.get("validation_fraction", math.nan)),
            str(document.get("split", "")),
        )


History = Iterable[tuple[Cost | None, int]]
"""Mechanisms, each with a number of rounds. None is a release without privacy."""


@dataclass(frozen=True)
class Item:
    """So many rounds of a study, all with the same cost, charged or only reserved."""

    study: str
    cost: Cost | None
    charged: bool
    rounds: int


@dataclass(frozen=True)
class StudySpending:
    """What one study spent on a dataset.

    Attributes:
        study: Its digest.
        charged: Rounds released.
        reserved: Rounds reserved and not yet charged.
        events: What was charged: each mechanism with its number of rounds.
        epsilon: Of the charged rounds alone, at the limit's delta.
    """

    study: str
    charged: int
    reserved: int
    events: tuple[tuple[Cost | None, int], ...]
    epsilon: float


@dataclass(frozen=True)
class Spending:
    """What was spent on a dataset, on what.

    Attributes:
        dataset: Its name.
        limit: Whose unit and delta all epsilons here are for. An epsilon is infinite where releases do not protect
            that unit.
        studies: In the order of their first reservation.
        epsilon: Of everything charged.
        committed: Of everything charged and reserved: what the limit is held against.
        head: Row and digest that this was read at.
    """

    dataset: str
    limit: Limit
    studies: tuple[StudySpending, ...]
    epsilon: float
    committed: float
    head: tuple[int, str]

    def document(self) -> dict[str, Any]:
        """Return plain JSON values; an infinite epsilon is None."""
        studies = [
            {
                "study": each.study,
                "charged": each.charged,
                "reserved": each.reserved,
                "events": [{"cost": cost and cost.document(), "rounds": rounds} for cost, rounds in each.events],
                "epsilon": _finite(each.epsilon),
            }
            for each in self.studies
        ]
        return {
            "dataset": self.dataset,
            "limit": asdict(self.limit),
            "studies": studies,
            "epsilon": _finite(self.epsilon),
            "committed": _finite(self.committed),
            "head": {"sequence": self.head[0], "digest": self.head[1]},
        }


def composed_epsilon(history: History, limit: Limit) -> float:
    """Return the epsilon, at the limit's delta, that a history costs the unit that pays most.

    In studies that name their units alike, a unit has one hash, and what it paid follows from the class in which the
    hash lies. Hashes of different names have nothing to do with each other, so that a unit may be in any class of each.

    Infinite where a release was made without privacy or protects another unit, or where more than 64 combinations of
    classes would have to be composed: nothing is promised then.
    """
    costs: list[tuple[Cost, int]] = []
    for cost, rounds in history:
        if cost is None or cost.unit != limit.unit:
            return math.inf
        costs.append((cost, rounds))
    # The class that begins at 0 validates wherever there is validation, the last class never.
    bounds: dict[str, set[float]] = {}
    for cost, _ in costs:
        bounds.setdefault(cost.split if cost.validation else "", {0.0}).add(cost.validation_fraction)
    if math.prod(map(len, bounds.values())) > _MOST_CLASSES:
        return math.inf
    classes = [dict(zip(bounds, lower, strict=True)) for lower in itertools.product(*map(sorted, bounds.values()))]
    found = [epsilon(_paid(costs, lower), limit.delta) for lower in classes]
    return max(found, default=0.0) if all(map(math.isfinite, found)) else math.inf


def _paid(costs: Sequence[tuple[Cost, int]], lower: Mapping[str, float]) -> list[PrivacyEvent]:
    """Return what the units whose hash under each split is `lower` paid, sorted: equal histories give equal sums."""
    paid = []
    for cost, rounds in costs:
        trains = cost.validation is None or lower[cost.split] >= cost.validation_fraction
        event = cost.training if trains or cost.validation is None else cost.validation
        paid.append(replace(event, steps=event.steps * rounds))
    return sorted(paid, key=lambda event: (event.noise_multiplier, event.sampling_rate, event.steps))


def check_cost(dataset: str, limit: Limit | None, cost: Cost | None) -> None:
    """Check that a study's mechanism is of the kind that a limit admits at all.

    Raises:
        RefusedError: It has no privacy, or protects another unit.
    """
    if limit is None:
        return
    if cost is None:
        raise RefusedError(
            f"limit of dataset {dataset}: the study has no privacy, and the limit allows epsilon {limit.epsilon:g}",
            "only private studies run on a dataset with a limit",
        )
    if cost.unit != limit.unit:
        raise RefusedError(
            f"limit.unit of dataset {dataset}: the limit protects each {limit.unit}, the study each {cost.unit}",
            f"the study must set privacy.unit to {limit.unit}",
        )


def check_budget(release: RoundKey, limit: Limit, cost: Cost, items: Sequence[Item], left: int) -> None:
    """Check that a dataset's limit covers a release and the rest of its study.

    All that is charged and reserved, plus the rounds left, must compose to the limit's epsilon or less. As composition
    only grows, the release alone is then covered too; and as the sum stays the same while a study goes on, its later
    rounds are looked up and not computed.

    Args:
        release: What is asked for, to say so.
        limit: Of the dataset.
        cost: Of one round.
        items: All that is charged and reserved on the dataset.
        left: Rounds of the study beyond those: at least 1, unless the release is reserved already.

    Raises:
        BudgetExhaustedError: It does not. The message gives spent, asked and allowed.
    """
    before = [(item.cost, item.rounds) for item in items]
    total = composed_epsilon([*before, (cost, left)], limit)
    if not total <= limit.epsilon:
        raise BudgetExhaustedError(
            f"limit.epsilon of dataset {release.dataset}: {composed_epsilon(before, limit):.4g} is spent or reserved; "
            f"the {left} rounds left of study {release.study} would make it {total:.4g}; {limit.epsilon:g} is allowed "
            f"for each {limit.unit}, at delta {limit.delta:g}",
            "the limit is for the dataset's lifetime and nothing resets it; fewer rounds or more noise cost less",
        )


def spending(dataset: str, limit: Limit, items: Sequence[Item], head: tuple[int, str]) -> Spending:
    """Return what `items`, all that is charged and reserved on a dataset, amount to."""
    studies = []
    for study in dict.fromkeys(item.study for item in items):
        own = [item for item in items if item.study == study]
        events = tuple((item.cost, item.rounds) for item in own if item.charged)
        charged = sum(rounds for _, rounds in events)
        reserved = sum(item.rounds for item in own) - charged
        studies.append(StudySpending(study, charged, reserved, events, composed_epsilon(events, limit)))
    return Spending(
        dataset=dataset,
        limit=limit,
        studies=tuple(studies),
        epsilon=composed_epsilon([(item.cost, item.rounds) for item in items if item.charged], limit),
        committed=composed_epsilon([(item.cost, item.rounds) for item in items], limit),
        head=head,
    )


def require_digest(what: str, value: str) -> None:
    """Raise `RefusedError` unless `value` is `sha256:` and 64 hexadecimal digits."""
    _require(bool(_DIGEST.fullmatch(value)), what, "sha256: and 64 hexadecimal digits", value)


def require_count(what: str, value: int) -> None:
    """Raise `RefusedError` unless `value` is an integer of 1 or more."""
    known = isinstance(value, int) and not isinstance(value, bool) and 1 <= value < _LARGEST
    _require(known, what, "an integer of 1 or more", value)


def _check_event(event: PrivacyEvent) -> None:
    """Refuse what would not cost anything: a negative epsilon, once accepted, raises a budget."""
    z, rate = event.noise_multiplier, event.sampling_rate
    _require(_is_number(z) and z > 0, "noise multiplier", "a finite number above 0", z)
    _require(_is_number(rate) and 0 < rate <= 1, "sampling rate", "a number in (0, 1]", rate)
    require_count("steps", event.steps)
    _require(event.unit in _UNITS, "unit of privacy", "record or patient", event.unit)


def _parse_event(document: Mapping[str, Any]) -> PrivacyEvent:
    try:
        return PrivacyEvent.parse(document)
    except (KeyError, TypeError, ValueError):
        raise StateError(
            "the ledger holds a mechanism that this version of privet does not know",
            "use the version that wrote it, or a newer one",
        ) from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _require(held: bool, what: str, expected: str, got: object) -> None:
    if not held:
        raise RefusedError(f"{what}: expected {expected}, got {got!r}")
