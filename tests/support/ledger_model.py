"""What the ledger must do, as a dictionary, and the mistakes that a test of it must find.

The model keeps every promise but survival: it is as simple as can be, and lives in memory. Each mutant breaks one
promise.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from scipy.optimize import brentq
from scipy.stats import norm

from privet.client.budget.accounts import Cost, Limit, RoundKey
from privet.common.errors import BudgetExhaustedError, RefusedError, SpentRoundError, StateError
from privet.common.privacy.accounting import PrivacyEvent


def gaussian_epsilon(events: Iterable[PrivacyEvent], delta: float, accountant: str = "exact") -> float:
    """Return the exact epsilon of Gaussian releases without sampling (Balle and Wang 2018, theorem 8)."""
    squares = 0.0
    for event in events:
        assert event.sampling_rate == 1.0
        squares += event.steps / event.noise_multiplier**2
    return _exact(math.sqrt(squares), delta) if squares else 0.0


@lru_cache(maxsize=4096)
def _exact(mu: float, delta: float) -> float:
    def excess(eps: float) -> float:
        return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)) - delta

    return float(brentq(excess, 0, 100))


@dataclass
class Kept:
    """What is known of one release."""

    cost: Cost | None
    inputs: str
    begun: bool = False
    payload: bytes | None = None
    arrived: bool = False
    cancelled: bool = False


@dataclass
class Model:
    """The promises of `Ledger`, in memory."""

    kept: dict[RoundKey, Kept] = field(default_factory=dict)

    def reserve(
        self, release: RoundKey, cost: Cost | None, inputs: str, limit: Limit | None, planned: int
    ) -> bytes | None:
        known = self.kept.get(release)
        if known is not None and known.cancelled:
            raise RefusedError("cancelled")
        if known is not None and known.begun and known.payload is None:
            raise SpentRoundError("begun, and lost")
        if known is not None and known.inputs != inputs:
            raise RefusedError("other inputs")
        if known is not None and known.payload is not None:
            if self.dropped(release):
                raise RefusedError("arrived, and no longer kept")
            return known.payload
        assert cost is not None
        assert limit is not None
        if self.epsilon(release, cost, planned, limit) > limit.epsilon:
            raise BudgetExhaustedError("too much")
        self.kept.setdefault(release, Kept(cost, inputs))
        return None

    def begin(self, release: RoundKey) -> None:
        known = self.kept.get(release)
        if known is None or known.cancelled:
            raise StateError("not reserved")
        if known.begun:
            raise SpentRoundError("begun before")
        known.begun = True

    def charge(self, release: RoundKey, payload: bytes) -> None:
        known = self.kept.get(release)
        if known is None or known.cancelled or not known.begun or known.payload not in (None, payload):
            raise StateError("not begun, or charged with other bytes")
        known.payload = payload

    def acknowledge(self, release: RoundKey) -> None:
        if release not in self.kept or self.kept[release].payload is None:
            raise StateError("not charged")
        self.kept[release].arrived = True

    def cancel(self, release: RoundKey) -> None:
        known = self.kept.get(release)
        if known is None:
            raise StateError("not reserved")
        if known.begun:
            raise RefusedError("begun")
        known.cancelled = True

    def stored(self, release: RoundKey) -> bytes | None:
        known = self.kept.get(release)
        return None if known is None or self.dropped(release) else known.payload

    def reopen(self) -> Model:
        """Return what the next process finds."""
        return copy.deepcopy(self)

    def gone(self, release: RoundKey) -> bool:
        return release in self.kept and self.kept[release].payload is not None and self.dropped(release)

    def dropped(self, release: RoundKey) -> bool:
        later = (
            other.round > release.round and kept.payload is not None
            for other, kept in self.kept.items()
            if (other.dataset, other.study) == (release.dataset, release.study)
        )
        return self.kept[release].arrived and any(later)

    def standing(self, release: RoundKey) -> list[RoundKey]:
        """Return the releases on the dataset that count."""
        return [each for each, kept in self.kept.items() if each.dataset == release.dataset and not kept.cancelled]

    def epsilon(self, release: RoundKey, cost: Cost, planned: int, limit: Limit) -> float:
        """Return what the dataset would have spent once the release's study has ended."""
        standing = self.standing(release)
        own = sum(each.study == release.study for each in standing)
        costs = [self.kept[each].cost for each in standing]
        costs += [cost] * max(planned - own, 0 if release in standing else 1)
        return class_epsilon([each for each in costs if each is not None], limit.delta, gaussian_epsilon)


def class_epsilon(costs: list[Cost], delta: float, epsilon: Callable[[Iterable[PrivacyEvent], float], float]) -> float:
    """Return the largest epsilon over units, by trying one unit between any two fractions."""
    fractions = sorted({0.0, 1.0, *(cost.validation_fraction for cost in costs)})
    units = [(low + high) / 2 for low, high in itertools.pairwise(fractions)]
    return max(epsilon([paid(cost, unit) for cost in costs], delta) for unit in units)


def paid(cost: Cost, unit: float) -> PrivacyEvent:
    """Return what a unit with this hash pays for one round."""
    if unit < cost.validation_fraction:
        assert cost.validation is not None
        return cost.validation
    return cost.training


class Forgetful(Model):
    """Keeps everything in memory alone."""

    def reopen(self) -> Model:
        return type(self)()


class TrainsAgain(Model):
    """Trains a charged round again when asked again, and stores the new bytes."""

    def reserve(
        self, release: RoundKey, cost: Cost | None, inputs: str, limit: Limit | None, planned: int
    ) -> bytes | None:
        if release in self.kept and self.kept[release].payload is not None:
            self.kept[release].payload = None
            self.kept[release].begun = False
        return super().reserve(release, cost, inputs, limit, planned)


class DrawsAgain(Model):
    """Takes up a round that was begun and not charged, as if it had been reserved alone."""

    def reserve(
        self, release: RoundKey, cost: Cost | None, inputs: str, limit: Limit | None, planned: int
    ) -> bytes | None:
        if release in self.kept and self.kept[release].payload is None:
            self.kept[release].begun = False
        return super().reserve(release, cost, inputs, limit, planned)


class Overwrites(Model):
    """Takes other bytes for a charge that was made."""

    def charge(self, release: RoundKey, payload: bytes) -> None:
        if release in self.kept:
            self.kept[release].payload = None
        super().charge(release, payload)


class CountsChargesAlone(Model):
    """Lets reservations pass each other at the limit."""

    def standing(self, release: RoundKey) -> list[RoundKey]:
        return [each for each in super().standing(release) if self.kept[each].payload is not None]


class WritesLate(Model):
    """Keeps a charge once its release has arrived."""

    def reopen(self) -> Model:
        found = type(self)(copy.deepcopy(self.kept))
        for kept in found.kept.values():
            kept.payload = kept.payload if kept.arrived else None
        return found


MUTANTS = (Forgetful, TrainsAgain, DrawsAgain, Overwrites, CountsChargesAlone, WritesLate)
# Found only in hundreds of histories.
RARE = (Overwrites, CountsChargesAlone)
