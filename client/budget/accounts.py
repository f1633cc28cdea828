"""The cost of releases to a dataset: limits, mechanisms, and the one epsilon that a history composes to.

Pure: no file and no clock. `client/budget/ledger.py` keeps the history that these functions interpret.

Guarantee of `composed_epsilon`. Each unit has a hash h in [0, 1). A study with validation fraction f trains on the
units with h >= f and validates on the others. The caller makes sure that h depends on the unit alone and is the same
in every study of the dataset. Adding or removing one unit then moves no other unit. It touches either training or
validation of a study, never both. The distinct fractions cut [0, 1) into classes of units that paid for the same
mechanisms. The epsilon of the dataset is the epsilon of the class that paid most. Within a class, events are composed
and then converted to one epsilon. Epsilons are never added. It is proven for mechanisms that are fixed in advance, as
those of one study are.

Guarantee of `counted_epsilon`, which the limit applies to. The first study is fixed before any release of the dataset.
Later ones may have been designed after earlier results. As soon as there are several, everything counts by a Rényi
filter, which is proven for mechanisms chosen so (`filtered_epsilon`). Until then the one study counts by composition.

With correlated noise a round is a release to the units of one class, which the study's own hash decides. A study costs
its largest class's rounds (`paid_rounds`). Over studies hashes are unrelated, so a unit may be in the largest class of
each: these rounds are composed.

Two adversaries. A release with the site's own noise is private against everybody. A release with a share of the noise
has this cost against the coordinator with up to c corrupt sites only; against everybody, the share alone protects it.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from privet.common.errors import BudgetExhaustedError, RefusedError, StateError
from privet.common.privacy.accounting import PrivacyEvent, epsilon, filtered_epsilon
from privet.common.study.sections import NAME_PATTERN

Unit = Literal["record", "patient"]

_BUG = "check `dataset` in the site file and the study's privacy settings; if both are right, report this as a bug"
_UNITS = ("record", "patient")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(NAME_PATTERN)
# JSON holds integers exactly below this.
_LARGEST = 2**53
_MOST_CLASSES = 64
_LIMIT_STEP = 0.01
_LARGEST_LIMIT = 1000.0
"""Up to where a limit is searched that admits a study. A larger epsilon protects nobody."""


@dataclass(frozen=True)
class Limit:
    """What one dataset may spend in its lifetime.

    Attributes:
        unit: Unit of privacy. The limit covers mechanisms of this unit only. In particular, a patient-level mechanism
            is not record-level at the same epsilon: adding one record can rotate its patient's clipped sum, which
            moves it by up to 2C, while adding or removing the patient moves it by at most C.
        epsilon: Largest epsilon of all releases together, at `delta`.
        delta: Delta of the composed guarantee.
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
    """The key of a release: one round of one study on one dataset.

    Attributes:
        dataset: The name that the operator gave the dataset. A new version or path of the data keeps the name, and so
            keeps what was spent.
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
        training: Mechanism that a training unit pays for.
        validation: Mechanism that a validation unit pays for; None exactly where the fraction is 0.
        validation_fraction: In [0, 1). Units with a smaller hash are held out for validation, the others train.
        split: How the study names its units for the hash. Studies with equal splits give a unit the same hash.
        own_multiplier: Noise multiplier of the site's share by itself, where sites share the noise. None where they do
            not, and in rows of earlier versions.
        corrupt: Number of corrupt sites against which shared noise holds; None as above.
        drawn: With correlated noise, the class of units that the round may draw; None where the round is open.
    """

    training: PrivacyEvent
    validation: PrivacyEvent | None = None
    validation_fraction: float = 0.0
    split: str = ""
    own_multiplier: float | None = None
    corrupt: int | None = None
    drawn: int | None = None

    def __post_init__(self) -> None:
        fraction = self.validation_fraction
        _require(_is_number(fraction) and 0 <= fraction < 1, "validation_fraction", "a number in [0, 1)", fraction)
        if (self.validation is None) != (fraction == 0):
            raise RefusedError(
                "cost of a round: expected a validation mechanism exactly where the validation fraction is above 0, "
                f"found {'no' if self.validation is None else 'a'} mechanism and fraction {fraction:g}",
                _BUG,
            )
        for event in (self.training, self.validation):
            if event is not None:
                _check_event(event)
        if self.validation is not None and self.validation.unit != self.training.unit:
            raise RefusedError(
                "cost of a round: training and validation must protect the same unit of privacy; training protects "
                f"each {self.training.unit}, validation each {self.validation.unit}",
                _BUG,
            )
        own = self.own_multiplier
        if own is not None:
            known = self.training.shared and _is_number(own) and own > 0
            _require(known, "own noise multiplier", "a finite number above 0, and shared noise", own)
        if self.corrupt is not None:
            known = self.training.shared and type(self.corrupt) is int and 0 <= self.corrupt < _LARGEST
            _require(known, "corrupt sites", "an integer of 0 or more, and shared noise", self.corrupt)
        if self.drawn is not None:
            known = type(self.drawn) is int and 0 <= self.drawn < self.training.band and self.training.band > 1
            _require(known, "class", "one of the classes of correlated noise", self.drawn)

    @property
    def unit(self) -> str:
        """Unit of privacy of the mechanism."""
        return self.training.unit

    @property
    def alone(self) -> Cost | None:
        """The mechanism against everybody: with the site's own noise alone. None where that is unknown."""
        if not self.training.shared:
            return self
        if self.own_multiplier is None:
            return None
        own = replace(self.training, noise_multiplier=self.own_multiplier, shared=False)
        return Cost(own, self.validation, self.validation_fraction, self.split, drawn=self.drawn)

    def document(self) -> dict[str, Any]:
        """Return the cost as plain JSON values. Fields that only shared noise has are left out where unknown."""
        shared = {"own_multiplier": self.own_multiplier, "corrupt": self.corrupt, "drawn": self.drawn}
        return {
            "training": self.training.document(),
            "validation": None if self.validation is None else self.validation.document(),
            "validation_fraction": self.validation_fraction,
            "split": self.split,
            **{name: value for name, value in shared.items() if value is not None},
        }

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> Cost:
        """Read the output of `document`.

        Raises:
            StateError: It describes a mechanism that this version of privet does not know.
        """
        validation, own, corrupt, drawn = map(document.get, ("validation", "own_multiplier", "corrupt", "drawn"))
        return cls(
            _parse_event(document.get("training", {})),
            None if validation is None else _parse_event(validation),
            float(document.get("validation_fraction", math.nan)),
            str(document.get("split", "")),
            own,
            corrupt,
            drawn,
        )


History = Iterable[tuple[Cost | None, int]]
"""Mechanisms, each with a number of rounds. None is a release without privacy."""

Later = Sequence[tuple[Cost, int]]
"""Mechanisms of rounds to come, each with a number of rounds."""


@dataclass(frozen=True)
class Item:
    """A number of rounds of one study, all with the same cost, and all charged or all only reserved.

    A round that began counts as charged, whether or not its update was stored.
    """

    study: str
    cost: Cost | None
    charged: bool
    rounds: int


@dataclass(frozen=True)
class StudySpending:
    """What one study spent on a dataset.

    Attributes:
        study: Its digest.
        charged: Number of rounds charged: that began, also if their update was lost.
        reserved: Number of rounds reserved that have not begun.
        events: The charged mechanisms, each with its number of rounds.
        epsilon: Epsilon of the charged rounds alone, at the limit's delta.
    """

    study: str
    charged: int
    reserved: int
    events: tuple[tuple[Cost | None, int], ...]
    epsilon: float


@dataclass(frozen=True)
class Spending:
    """What was spent on a dataset, by study.

    Attributes:
        dataset: Its name.
        limit: Gives the unit and the delta of all epsilons here. An epsilon is infinite where a release does not
            protect that unit.
        studies: Studies in the order of their first reservation.
        epsilon: Epsilon of everything charged, composed as if it had been fixed in advance. Where noise is shared, it
            holds against the coordinator with `corrupt` sites.
        committed: Epsilon of everything charged and reserved, in the same way.
        everybody: Epsilon of everything charged against everybody: of a share of the noise, the site's own alone.
        everybody_committed: Epsilon of everything charged and reserved against everybody.
        counted: Epsilon of everything charged and reserved that counts against the limit (`counted_epsilon`).
        shared: Whether noise is shared in anything charged or reserved.
        corrupt: Number of corrupt sites that all of it allows for; None if no noise is shared, or a row of an earlier
            version does not say.
        head: Row number and head of the ledger at the time of reading.
    """

    dataset: str
    limit: Limit
    studies: tuple[StudySpending, ...]
    epsilon: float
    committed: float
    everybody: float
    everybody_committed: float
    counted: float
    shared: bool
    corrupt: int | None
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
            "shared_noise": self.shared,
            "corrupt": self.corrupt,
            "everybody": {"epsilon": _finite(self.everybody), "committed": _finite(self.everybody_committed)},
            "counted": _finite(self.counted),
            "head": {"sequence": self.head[0], "digest": self.head[1]},
        }


def paid_rounds(items: Iterable[Item]) -> list[tuple[Cost | None, int]]:
    """Return what a unit pays for: all rounds; of a study with correlated noise, those of its largest class.

    All rounds of such a study have one noise multiplier, so the largest class is the one with most rounds.
    """
    items = tuple(items)
    classes: dict[str, Counter[int | None]] = {}
    for item in items:
        if item.cost is not None and item.cost.training.band > 1:
            classes.setdefault(item.study, Counter())[item.cost.drawn] += item.rounds
    largest = {study: counts.most_common(1)[0][0] for study, counts in classes.items()}
    return [
        (item.cost, item.rounds)
        for item in items
        if item.cost is None or item.cost.training.band == 1 or item.cost.drawn == largest[item.study]
    ]


def whole_study(study: str, cost: Cost, rounds: int) -> Item:
    """Return the first `rounds` rounds of a study, as a unit pays for them."""
    return Item(study, replace(cost, drawn=None), False, cost.training.counted_rounds(rounds))


def composed_epsilon(
    history: History, limit: Limit, account: Callable[[Sequence[PrivacyEvent]], float] | None = None
) -> float:
    """Return the epsilon of a history, at the limit's delta, for the unit that pays most.

    In studies with the same split, a unit has one hash, and its class follows from the hash. Hashes of different splits
    are unrelated, so a unit may be in any combination of their classes.

    The result is infinite where a release has no privacy or protects another unit, or where more than 64 combinations
    of classes would have to be composed. There is no guarantee then.

    Args:
        history: Mechanisms with their numbers of rounds.
        limit: Gives unit and delta.
        account: Returns the epsilon of what a class paid for; by default that of composition (`epsilon`).
    """
    costs: list[tuple[Cost, int]] = []
    for cost, rounds in history:
        if cost is None or cost.unit != limit.unit:
            return math.inf
        costs.append((cost, rounds))
    # Classes of each split by their lower bounds: the class at 0 is held out in every study that validates, the class
    # at the largest fraction in none.
    bounds: dict[str, set[float]] = {}
    for cost, _ in costs:
        bounds.setdefault(cost.split if cost.validation else "", {0.0}).add(cost.validation_fraction)
    # Combinations multiply over splits. Infinity refuses the study; a bound without a guarantee would admit it.
    if math.prod(map(len, bounds.values())) > _MOST_CLASSES:
        return math.inf
    classes = [dict(zip(bounds, lower, strict=True)) for lower in itertools.product(*map(sorted, bounds.values()))]
    # The classes hold different units (parallel composition), so the dataset pays the largest epsilon, not the sum.
    paid = [_paid(costs, lower) for lower in classes]
    found = [epsilon(each, limit.delta) if account is None else account(each) for each in paid]
    return max(found, default=0.0) if all(map(math.isfinite, found)) else math.inf


def counted_epsilon(items: Iterable[Item], limit: Limit) -> float:
    """Return the epsilon that `items` count against a limit, never less than `composed_epsilon`.

    Several studies count by a Rényi filter too: a later study may have been designed after earlier results.
    """
    items = tuple(items)
    history = paid_rounds(items)
    found = composed_epsilon(history, limit)
    if len({item.study for item in items}) < 2 or not math.isfinite(found):
        return found
    filtered = composed_epsilon(history, limit, lambda paid: filtered_epsilon(paid, limit.delta, limit.epsilon))
    return max(found, filtered)


def admitting_epsilon(items: Iterable[Item], limit: Limit) -> float | None:
    """Return the least epsilon of a limit that covers `items`, in hundredths and at least `limit`'s own.

    The order of the Rényi filter follows from the limit, so the epsilon that items count as under one limit does not
    say which limit covers them. The result is checked: a limit of this epsilon covers the items.

    Returns:
        The epsilon; None where no limit up to 1000 covers them.
    """
    items = tuple(items)
    grid = range(math.floor(limit.epsilon / _LIMIT_STEP), math.ceil(_LARGEST_LIMIT / _LIMIT_STEP))

    def epsilon_at(step: int) -> float:
        return max(round(step * _LIMIT_STEP, 2), limit.epsilon)

    def covers(step: int) -> bool:
        each = replace(limit, epsilon=epsilon_at(step))
        return counted_epsilon(items, each) <= each.epsilon

    found = bisect.bisect_left(grid, True, key=covers)
    return epsilon_at(grid[found]) if found < len(grid) else None


def same_cost(stored: Mapping[str, Any] | None, cost: Cost | None) -> bool:
    """Whether a row states a cost. A row of an earlier version lacks the fields that shared noise has."""
    if stored is None or cost is None:
        return stored is None and cost is None
    lacking = {"own_multiplier", "corrupt"} - stored.keys()
    return dict(stored) == {name: value for name, value in cost.document().items() if name not in lacking}


def _paid(costs: Sequence[tuple[Cost, int]], lower: Mapping[str, float]) -> list[PrivacyEvent]:
    """Return the events that a class of units paid for. Each split has the lower bound of the class in `lower`."""
    paid = []
    for cost, rounds in costs:
        trains = cost.validation is None or lower[cost.split] >= cost.validation_fraction
        event = cost.training if trains or cost.validation is None else cost.validation
        paid.append(replace(event, steps=event.steps * rounds))
    # In one order: floating-point sums depend on it, and equal histories must give equal epsilons.
    return sorted(paid, key=lambda event: (event.noise_multiplier, event.sampling_rate, event.steps))


def check_cost(dataset: str, limit: Limit | None, cost: Cost | None) -> None:
    """Check that a limit can cover a study's mechanism at any epsilon.

    Raises:
        RefusedError: The study is not private, or protects another unit.
    """
    if limit is None:
        return
    if cost is None:
        raise RefusedError(
            f"limit of dataset {dataset}: expected a private study, as the site file limits epsilon to "
            f"{limit.epsilon:g}; the study has no privacy",
            "make the study private: a dataset with a limit admits only private studies",
        )
    if cost.unit != limit.unit:
        raise RefusedError(
            f"limit.unit of dataset {dataset}: the limit in the site file protects each {limit.unit}, but the study "
            f"protects each {cost.unit}",
            f'set privacy.unit = "{limit.unit}" in the study',
        )


def check_budget(
    release: RoundKey, limit: Limit, cost: Cost, items: Sequence[Item], left: int, later: Later = ()
) -> None:
    """Check that a dataset's limit covers a release and the rest of its study.

    Everything charged and reserved, plus the rounds left, must count as the limit's epsilon or less
    (`counted_epsilon`). What counts only grows, so the release alone is then covered too. The total stays the same
    while a study runs, so the accountant computes it once per study and looks it up for later rounds.

    Args:
        release: The release, for the message.
        limit: Limit of the dataset.
        cost: Cost of one round.
        items: Everything charged and reserved on the dataset.
        left: Rounds of the study beyond those: at least 1, unless the release is reserved already.
        later: Rounds of the study at other costs, which follow.

    Raises:
        BudgetExhaustedError: The limit does not cover them. The message gives spent, asked and allowed.
    """
    after = [*items, *(Item(release.study, each, False, rounds) for each, rounds in ((cost, left), *later))]
    left += sum(rounds for _, rounds in later)

    def drawn_by_class(item: Item) -> bool:
        return item.study == release.study and item.cost is not None and item.cost.training.band > 1

    own = [item for item in after if drawn_by_class(item)]
    if own and own[-1].cost is not None:
        # Which classes the rounds left are of, is not known here. All rounds of the study are the first ones at worst.
        whole = whole_study(release.study, own[-1].cost, sum(item.rounds for item in own))
        held = sum(rounds for _, rounds in paid_rounds(filter(drawn_by_class, items)))
        others = [item for item in after if not drawn_by_class(item)]
        after = [*others, replace(whole, rounds=max(whole.rounds, held))]
    if not counted_epsilon(after, limit) <= limit.epsilon:  # written so that NaN is refused
        raise _beyond(release, limit, items, after, left)


def _beyond(
    release: RoundKey, limit: Limit, items: Sequence[Item], after: Sequence[Item], left: int
) -> BudgetExhaustedError:
    """Return the error for a study of which `left` rounds do not fit. `items` are before the study, `after` with it."""
    needed = admitting_epsilon(after, limit)
    within = "no limit admits them" if needed is None else f"the least limit that admits them is epsilon {needed:g}"
    raised = (
        ""
        if needed is None
        else f". Or your site decides to raise the limit, which promises each {limit.unit} less: `privet site setup "
        f"SITE --epsilon {needed:g}`"
    )
    spent, counted = composed_epsilon(paid_rounds(items), limit), counted_epsilon(items, limit)
    # How much counts follows from the limit: far beyond it the figure means nothing.
    more = f", which counts as {counted:.4g}, as later studies may follow from earlier ones"
    return BudgetExhaustedError(
        f"limit.epsilon of dataset {release.dataset}: the limit is epsilon {limit.epsilon:g} for each {limit.unit} at "
        f"delta {limit.delta:g}; {spent:.4g} is spent or reserved{more if spent < counted <= limit.epsilon else ''}. "
        f"The {left} "
        f"remaining rounds of study {release.study} do not fit: {within}",
        f"ask the coordinator for fewer rounds or more noise{raised}. The limit is for the dataset's lifetime; spent "
        "epsilon never comes back",
    )


def spending(dataset: str, limit: Limit, items: Sequence[Item], head: tuple[int, str]) -> Spending:
    """Return what was spent on a dataset, from `items`: everything charged and reserved on it."""
    studies = []
    for study in dict.fromkeys(item.study for item in items):
        own = [item for item in items if item.study == study]
        events = tuple((item.cost, item.rounds) for item in own if item.charged)
        charged = sum(rounds for _, rounds in events)
        reserved = sum(item.rounds for item in own) - charged
        paid = composed_epsilon(paid_rounds(item for item in own if item.charged), limit)
        studies.append(StudySpending(study, charged, reserved, events, paid))
    everything, charges = paid_rounds(items), paid_rounds(item for item in items if item.charged)
    sharing = [cost for cost, _ in everything if cost is not None and cost.training.shared]
    corrupt = [cost.corrupt for cost in sharing if cost.corrupt is not None]
    return Spending(
        dataset=dataset,
        limit=limit,
        studies=tuple(studies),
        epsilon=composed_epsilon(charges, limit),
        committed=composed_epsilon(everything, limit),
        everybody=composed_epsilon([(cost and cost.alone, rounds) for cost, rounds in charges], limit),
        everybody_committed=composed_epsilon([(cost and cost.alone, rounds) for cost, rounds in everything], limit),
        counted=counted_epsilon(items, limit),
        shared=bool(sharing),
        corrupt=min(corrupt) if corrupt and len(corrupt) == len(sharing) else None,
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
    """Refuse an event that could cost nothing or less: a negative epsilon, once accepted, would raise the budget."""
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
            "the ledger has an entry whose noise mechanism this version of privet does not know",
            "install the version of privet that wrote the ledger, or a newer one",
        ) from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _require(held: bool, what: str, expected: str, got: object) -> None:
    if not held:
        raise RefusedError(f"ledger entry, {what}: expected {expected}, found {got!r}", _BUG)
