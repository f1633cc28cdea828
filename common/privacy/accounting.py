"""Privacy accounting: the epsilon that a study costs, and the noise that its promise needs.

A mechanism is described by data (`PrivacyEvent`), which accountants interpret. Neighbouring data sets differ by adding
or removing one unit. Epsilons are never added up: events are composed first, then converted to one epsilon.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from privet.common.errors import StudyError
from privet.common.privacy import accountants, apart
from privet.common.privacy.accountants import ORDERS
from privet.common.privacy.noise import SAMPLER_DISTANCE, SAMPLER_FACTOR
from privet.common.study.sections import HEAD_START_SHARE, MOST_BAND
from privet.common.study.study import Study

Accountant = Literal["prv", "rdp"]
OWN_NOISE, SHARED_NOISE = "poisson-subsampled-gaussian", "poisson-subsampled-shared-gaussian"
BANDED_NOISE = "poisson-subsampled-shared-banded-gaussian"
_History = tuple[tuple[float, float, int], ...]
"""Noise multiplier, sampling rate, steps."""

# Relative precision of a calibrated noise multiplier, which is rounded up: rounding down would break the promise.
_PRECISION = 1e-3
_LARGEST_NOISE = 1e4
# The PRV accountant's grid grows without bound as the noise multiplier goes to 0. Less noise than this protects
# nobody, so its epsilon is infinite and calibration never chooses it.
_SMALLEST_NOISE = 0.3
# Largest number of cells of the PRV accountant's grid: about half a GB and 5 s.
_LARGEST_GRID = 2**22
_MOST_ITERATIONS = 32
# exp of it is a float64, and no promise is near it.
_LARGEST_EXPONENT = 700.0
# Errors that numerical composition may make: of epsilon, and of delta as a fraction of it. Opacus's defaults.
_EPSILON_ERROR, _DELTA_ERROR = 0.01, 1e-3

# Cells of a grid above which calibration first looks on a coarser one, and the error of epsilon on that.
_LARGE_GRID, _COARSE = 2**18, 0.1
_calibrating = threading.RLock()

MOST_CALIBRATED_STEPS = 2**16
"""Most steps of a private study, over all rounds. Calibrating so many takes about 10 s and 1.5 GB (epsilon 8)."""
MOST_VARIATES, MOST_STEPS = 2.0**50, 2.0**20
"""More noise than any study draws: numbers times steps times sites of a sum. Drawing 2^50 takes a core half a year."""
SAMPLER_DELTA = 2.0**-66
"""The delta that the sampler of noise adds to a study. Epsilons are computed at delta minus this (`sampler_errors`)."""


@dataclass(frozen=True)
class PrivacyEvent:
    """`steps` releases of a Poisson-subsampled Gaussian mechanism (Abadi et al. 2016, Mironov et al. 2019).

    With correlated noise, a round is such a release to the units of its class, and to no others: `counted_rounds`.

    Attributes:
        noise_multiplier: Standard deviation of the noise, divided by the L2 sensitivity of the sum.
        sampling_rate: Probability with which each unit enters a step; 1: no sampling.
        steps: Number of releases.
        unit: The unit of privacy: record or patient.
        shared: Whether several sites add the noise together. The multiplier is then that of the worst case admitted
            (`privet.common.privacy.shared_noise`). The cost is the same, but the adversary covered is weaker.
        band: Number of classes of units, of which one is drawn in a round (`privet.common.privacy.correlated`); 1: all
            units may be drawn in each round. Only shared noise has bands.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int
    unit: str
    shared: bool = False
    band: int = 1

    def counted_rounds(self, rounds: int | Iterable[int]) -> int:
        """Return in how many of `rounds` one unit may be drawn: all; with a band, those of the largest class.

        Args:
            rounds: Numbers of different rounds; an integer n means the rounds 1 to n.
        """
        numbers = range(1, rounds + 1) if isinstance(rounds, int) else rounds
        return max(Counter(number % self.band for number in numbers).values(), default=0)

    def document(self) -> dict[str, Any]:
        """Return the event as plain JSON values."""
        kind = SHARED_NOISE if self.shared else OWN_NOISE
        return {
            "mechanism": BANDED_NOISE if self.band > 1 else kind,
            "version": 1,
            "neighbouring": "add-or-remove-one-unit",
            "unit": self.unit,
            "noise_multiplier": self.noise_multiplier,
            "sampling_rate": self.sampling_rate,
            "steps": self.steps,
            **({"band": self.band} if self.band > 1 else {}),
        }

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> PrivacyEvent:
        """Read what `document` returned.

        Raises:
            ValueError, TypeError, KeyError: It is not an event of this version.
        """
        steps, shared, band = document["steps"], document["mechanism"] != OWN_NOISE, document.get("band", 1)
        multiplier, rate = float(document["noise_multiplier"]), float(document["sampling_rate"])
        if type(steps) is not int or type(band) is not int or not 1 <= band <= MOST_BAND:
            raise ValueError("not a mechanism of version 1")
        event = cls(multiplier, rate, steps, document["unit"], shared, band)
        if event.document() != dict(document):
            raise ValueError("not a mechanism of version 1")
        return event


def epsilon(events: Iterable[PrivacyEvent], delta: float, accountant: Accountant = "prv") -> float:
    """Return the epsilon that the composition of `events` spends at `delta`.

    `prv` is the upper bound of numerical composition (Gopi et al. 2021). `rdp` is Mironov (2017) with the conversion
    of Balle et al. (2020). Both are Opacus's. If float64 or memory do not suffice for `prv`, the result is that of
    `rdp`, which is larger. The result is never NaN and never below 0; it may be infinite. `SAMPLER_DELTA` of delta is
    left for the errors of the noise; a smaller delta promises nothing.

    The parameters of the events must be fixed in advance. What a step computes may depend on earlier releases: each
    step is dominated by the same pair of distributions, and the composition of these pairs dominates (Zhu et al. 2022,
    theorem 10). For parameters chosen after earlier releases, use `filtered_epsilon`.
    """
    merged: dict[tuple[float, float], int] = {}
    for event in events:
        key = (event.noise_multiplier, event.sampling_rate)
        merged[key] = merged.get(key, 0) + event.steps
    history = tuple((z, q, steps) for (z, q), steps in merged.items() if steps > 0)
    if not history:
        return 0.0
    return _epsilon(history, delta - SAMPLER_DELTA, accountant) if delta > SAMPLER_DELTA else math.inf


def filtered_epsilon(events: Iterable[PrivacyEvent], delta: float, limit: float) -> float:
    """Return the epsilon that `events` count against a limit, if each could be chosen after the releases before it.

    Guarantee (Feldman and Zrnic 2021, theorem 4.3; Lécuyer 2021): if mechanisms are admitted only while this value
    stays within `limit`, everything that was admitted is (limit, delta)-differentially private together. It is the sum
    of the Rényi divergences at one order, converted to epsilon (Balle et al. 2020). The order follows from limit and
    delta alone, because it must not depend on releases: it is the one with which a limit admits most Gaussian noise
    without sampling. Well below the limit the value is therefore loose.

    Args:
        events: Everything admitted, in any order.
        delta: Delta of the composition.
        limit: Epsilon that they must not exceed.
    """
    history = [(event.noise_multiplier, event.sampling_rate, event.steps) for event in events if event.steps > 0]
    if not history:
        return 0.0
    if delta <= SAMPLER_DELTA or any(z < _SMALLEST_NOISE for z, _, _ in history):
        return math.inf
    orders = np.asarray(ORDERS, np.float64)
    costs = _conversion(orders, delta - SAMPLER_DELTA)
    chosen = int(np.argmax((limit - costs) / orders))
    found = float(sum(steps * _rdp(z, q)[chosen] for z, q, steps in history) + costs[chosen])
    return found if math.isfinite(found) else math.inf


def replacing_epsilon(sides: Sequence[Sequence[PrivacyEvent]], delta: float) -> float:
    """Return the epsilon, at the same delta, for data sets that differ by replacing one unit; infinite if unknown.

    Replacing is removing one unit and adding another. If each is within (e, d), both are within (2e, (1 + exp(e)) d).
    So the result is 2e with an e for which (1 + exp(e)) d(e) <= delta, found by iteration. Where every unit enters each
    step it is smaller: a sum moves by up to twice the clip norm, which is a Gaussian mechanism of half the noise
    multiplier, and a unit that leaves one side for another moves each by less than that.

    Args:
        sides: Mechanisms of which a unit pays for one list: of training, or of validation.
        delta: Delta of the result.
    """
    if all(event.sampling_rate == 1 for side in sides for event in side):
        halved = [[replace(event, noise_multiplier=event.noise_multiplier / 2) for event in side] for side in sides]
        exact = max(epsilon(side, delta) for side in halved)
        if math.isfinite(exact):
            return exact
    one = max(epsilon(side, delta) for side in sides)
    # Each successor is the epsilon at the delta that the last one leaves. An e that is not below its successor is a
    # bound; the sequence rises, and 0.1 % more in each step lets it end.
    for _ in range(_MOST_ITERATIONS):
        if not one < _LARGEST_EXPONENT:
            break
        following = max(epsilon(side, delta / (1 + math.exp(one))) for side in sides)
        if following <= one:
            return 2 * one
        one = following * (1 + _PRECISION)
    return math.inf


def sampler_errors(target: float, steps: float = MOST_STEPS, variates: float = MOST_VARIATES) -> tuple[float, float]:
    """Return what the sampler's errors add to (target, delta): to epsilon, and to delta beside that factor.

    Let P be the sampler, Q its ideal up to a factor of 1 ± f for each value, f = 2^-46, and G the Gaussian. By Azuma's
    inequality, over N variates log(Q / G) is within f sqrt(2 N ln(1/b)) + N f² except with probability b; b is
    2^-100 exp(-target). P differs from Q by the variate's distance t = 2^-126. Its tails end at 14 deviations, and a
    step moves the noise by 1/z deviations, so outputs that the neighbour cannot give have a probability of at most
    Phi(1/z - 14) a step (`docs/privacy.md`).

    Args:
        target: Epsilon of the mechanism with ideal noise.
        steps: Number of steps of the study.
        variates: N.
    """
    logarithm = target + 100 * math.log(2)
    drift = SAMPLER_FACTOR * math.sqrt(2 * variates * logarithm) + variates * SAMPLER_FACTOR**2
    beyond = steps * math.erfc((14 - 1 / _SMALLEST_NOISE) / math.sqrt(2)) / 2
    return 2 * drift + 2 * variates * SAMPLER_DISTANCE, 2 * variates * SAMPLER_DISTANCE + 3 * 2.0**-100 + beyond


@lru_cache(maxsize=512)
@apart.able
def _epsilon(history: _History, delta: float, accountant: Accountant) -> float:
    if any(z < _SMALLEST_NOISE for z, _, _ in history):
        return math.inf
    bound = _rdp_bound(history, delta)
    if accountant == "rdp":
        return bound
    half, mesh = _grid(history, delta)
    # PRV raises a spectrum to the power of the steps, which multiplies its rounding error by their number. If that
    # error comes near delta, PRV understates epsilon (by 0.14 at delta 1e-12 after 10^5 steps), so RDP answers instead.
    if _steps(history) * 2.0**-52 > delta / 100 or not 2 * half / mesh <= _LARGEST_GRID:
        return bound
    _, found = _composed(history, delta, half, mesh)
    # NaN must not come out: it compares as "not above the limit". Both are upper bounds, so the smaller one holds.
    return min(max(found, 0.0), bound) if math.isfinite(found) else bound


def _steps(history: _History) -> int:
    return sum(count for _, _, count in history)


def _grid(history: _History, delta: float, error: float = _EPSILON_ERROR) -> tuple[float, float]:
    """Return the end of the grid of privacy losses, on both sides of 0, and its mesh for an error of epsilon.

    Gopi et al. (2021), remark 5.6 and theorem 5.5, as Opacus's accountant chooses them. Opacus itself computes each
    Rényi divergence again for every number of steps, which takes most of its time; here they are cached.
    """
    half = _rdp_bound(history, delta * _DELTA_ERROR / 4)
    half = max(half, *(_rdp_bound(((z, q, 1),), delta * _DELTA_ERROR / (8 * _steps(history))) for z, q, _ in history))
    mesh = error / math.sqrt(_steps(history) * math.log(12 / (delta * _DELTA_ERROR)) / 2)
    return max(half, error) + 3, mesh


def _composed(
    history: _History, delta: float, half: float, mesh: float, error: float = _EPSILON_ERROR
) -> tuple[float, float]:
    """Return the lower and the upper bound on epsilon by numerical composition on a grid."""
    library = accountants.prv()
    with quiet_warnings():
        domain = library.Domain.create_aligned(-half, half, mesh)
        losses = [library.PoissonSubsampledGaussianPRV(q, z) for z, q, _ in history]
        cut = [library.TruncatedPrivacyRandomVariable(loss, domain.t_min, domain.t_max) for loss in losses]
        one = [library.discretize(each, domain) for each in cut]
        every = library.compose_heterogeneous(dprvs=one, num_self_compositions=[count for _, _, count in history])
        lower, _, upper = every.compute_epsilon(delta, delta * _DELTA_ERROR, error)
        return float(lower), float(upper)


def _rdp_bound(history: _History, delta: float) -> float:
    with quiet_warnings():
        divergence = sum(n * _rdp(z, q) for z, q, n in history)
        spent, _ = accountants.rdp().get_privacy_spent(orders=ORDERS, rdp=divergence, delta=delta)
    return max(float(spent), 0.0) if not math.isnan(spent) else math.inf


@lru_cache(maxsize=512)
def _rdp(noise_multiplier: float, sampling_rate: float) -> NDArray[np.float64]:
    """Return the Rényi divergence of one step at each of Opacus's orders."""
    return np.asarray(_divergences(noise_multiplier, sampling_rate))


@apart.able
def _divergences(noise_multiplier: float, sampling_rate: float) -> list[float]:
    found = accountants.rdp().compute_rdp(q=sampling_rate, noise_multiplier=noise_multiplier, steps=1, orders=ORDERS)
    return [float(each) for each in found]


def _conversion(orders: NDArray[np.float64], delta: float) -> NDArray[np.float64]:
    """Return what is added to a Rényi divergence of each order for epsilon (Balle et al. 2020, theorem 21)."""
    found: NDArray[np.float64] = np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return found


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Silence the warnings of a library whose results are checked in other ways."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def noise_multiplier(
    target: float, delta: float, sampling_rate: float, steps: int, beside: float | None = None
) -> float:
    """Return the smallest noise multiplier, to 0.1 % and rounded up, with which `steps` cost at most `target`.

    With `beside`, they cost it together with one release of that noise multiplier in which every unit takes part.

    It is calibrated once for a whole study, with the PRV accountant. It is never below 0.3, whatever the target.
    Answers and refusals are cached, and one calibration runs at a time: it may take about 10 s and 1.5 GB.

    Raises:
        StudyError: No noise multiplier up to 10^4 reaches the target, or `steps` is more than `MOST_CALIBRATED_STEPS`.
    """
    if steps > MOST_CALIBRATED_STEPS:
        raise StudyError(
            f"training.rounds: expected at most {MOST_CALIBRATED_STEPS} steps in all rounds of a private study "
            f"together, found {steps}",
            "take fewer rounds or fewer steps in a round; raise training.sampling_rate to see as many records",
        )
    with _calibrating:
        found = _calibrated(target, delta, sampling_rate, steps, beside)
    if math.isinf(found):
        raise StudyError(
            f"privacy.epsilon: {target:g} at delta {delta:g} cannot be reached in {steps} steps with a noise "
            f"multiplier up to {_LARGEST_NOISE:g}",
            "raise privacy.epsilon (the accountant's bound alone adds 0.01), take fewer steps, or lower "
            "training.sampling_rate",
        )
    return found


@lru_cache(maxsize=512)
@apart.able
def _calibrated(target: float, delta: float, sampling_rate: float, steps: int, beside: float | None = None) -> float:
    """Return the noise multiplier; infinite where none reaches the target."""
    fixed: _History = () if beside is None else ((beside, 1.0, 1),)

    def reaches(z: float) -> bool:
        return _reaches(((z, sampling_rate, steps), *fixed), delta, target)

    high = 1.0
    while not reaches(high):
        high *= 2
        if high > _LARGEST_NOISE:
            return math.inf
    low = high / 2
    while low >= _SMALLEST_NOISE and reaches(low):
        high, low = low, low / 2
    low = max(low, min(_SMALLEST_NOISE, high))
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def _reaches(history: _History, delta: float, target: float) -> bool:
    """Whether `epsilon` of a history is at most a target, without a composition on a fine grid where others show it.

    The Rényi bound is never below `epsilon`. A coarse grid gives a bound from below, with the same guarantee as the
    bound from above that `epsilon` reports (Gopi et al. 2021).
    """
    left = delta - SAMPLER_DELTA
    if left <= 0 or any(z < _SMALLEST_NOISE for z, _, _ in history):
        return False
    if _rdp_bound(history, left) <= target:
        return True
    half, mesh = _grid(history, left)
    if _LARGE_GRID < 2 * half / mesh <= _LARGEST_GRID:
        half, mesh = _grid(history, left, _COARSE)
        if _composed(history, left, half, mesh, _COARSE)[0] > target:
            return False
    return _epsilon(history, left, "prv") <= target  # not `>`, so that NaN counts as too much


def split_noise(multiplier: float, share: float) -> tuple[float, float]:
    """Split one noise multiplier between the gradient sum and the count that steers an adaptive clip norm.

    Both sums are released at once. The gradients' sum has sensitivity C and deviation z_g·C. The count, of ±1/2 per
    unit, has sensitivity 1/2 and deviation d. Scaled to unit deviations, they are one Gaussian release of squared
    sensitivity 1/z_g² + 1/(2d)², which is 1/z² with z_g = (1/z² - 1/(2d)²)^(-1/2), and is accounted as z (Andrew
    et al. 2021, arXiv:1905.03871, theorem 1). The paper fixes d. Here the count takes the fraction `share` of 1/z²,
    so that the split exists for every z that a study is calibrated to.

    Returns:
        z_g, which the caller multiplies by the clip norm, and d.
    """
    return multiplier / math.sqrt(1 - share), multiplier / (2 * math.sqrt(share))


@dataclass(frozen=True)
class PrivacyPlan:
    """The mechanisms of a private study: noise for training, and noise for validation metrics.

    Training and validation units are disjoint, and a unit's side depends on that unit alone. So each unit pays for one
    of the two mechanisms, and the study's epsilon is the larger cost, not the sum.

    Attributes:
        training: Training event of one round; of a study without rounds that train, that of its head start.
        validation: Validation event of one round; None if the study does not validate.
        delta: Delta of the whole study.
        target: Epsilon of the whole study.
        head: Training event of round 1 where that is a head start before rounds that train; otherwise None.
    """

    training: PrivacyEvent
    validation: PrivacyEvent | None
    delta: float
    target: float
    head: PrivacyEvent | None = None

    def event(self, *, head: bool) -> PrivacyEvent:
        """Return the training event of a head start, or of a round that trains."""
        return self.head if self.head is not None and head else self.training

    @property
    def kinds(self) -> list[PrivacyEvent]:
        """The event of each kind of release."""
        return [event for event in (self.head, self.training, self.validation) if event is not None]

    def trained(self, numbers: Sequence[int]) -> list[int]:
        """Return those of some numbers of rounds whose event is `training`."""
        return [number for number in numbers if self.head is None or number != 1]

    def sides(self, rounds: int | Iterable[int]) -> list[list[PrivacyEvent]]:
        """Return the mechanisms that a unit pays for, of one list: of training, or of validation.

        Args:
            rounds: Numbers of the rounds that its site takes part in; an integer n means the rounds 1 to n.
        """
        numbers = tuple(range(1, rounds + 1) if isinstance(rounds, int) else rounds)
        trains = self.trained(numbers)
        first = [] if self.head is None else [self.head] * (len(numbers) - len(trains))
        sides = [first + [self.training] * self.training.counted_rounds(trains)]
        return sides if self.validation is None else [*sides, [self.validation] * len(numbers)]

    def spent(self, rounds: int | Iterable[int], accountant: Accountant = "prv") -> float:
        """Return the epsilon spent after taking part in `rounds`: the first so many, or those with these numbers."""
        return max(epsilon(side, self.delta, accountant) for side in self.sides(rounds))

    def replacing(self, rounds: int | Iterable[int]) -> float:
        """Return the epsilon of replacing one unit, at the same delta, after `rounds`; infinite if unknown."""
        return replacing_epsilon(self.sides(rounds), self.delta)


def plan(study: Study) -> PrivacyPlan | None:
    """Derive the mechanisms from the study; None if the study is not private.

    The noise multiplier covers everything that a step releases: with an adaptive clip norm, the gradients and the count
    together (`split_noise`).
    """
    if not study.private:
        return None
    training, unit = study.training, study.privacy.unit
    promise = study.privacy.promise
    target, delta = promise.epsilon, promise.delta
    found = multipliers(study, target)
    rate, steps = (study.draws[0], training.steps) if training.rounds else (1.0, 1)
    validation = None
    if study.data.validation_fraction > 0:
        validation = PrivacyEvent(noise_multiplier(target, delta, 1.0, study.rounds), 1.0, 1, unit)
    return PrivacyPlan(
        training=PrivacyEvent(found.training, rate, steps, unit, study.distributed, study.privacy.band or 1),
        validation=validation,
        delta=delta,
        target=target,
        head=None if found.head is None else PrivacyEvent(found.head, 1.0, 1, unit, study.distributed),
    )


class Multipliers(NamedTuple):
    """Noise multipliers of a study.

    Attributes:
        head: Of a head start before rounds that train; None without one.
        training: Of each step of training; of a study without rounds that train, of its head start.
    """

    head: float | None
    training: float

    def of(self, *, head: bool) -> float:
        """Return the noise multiplier of a head start, or of a step of training."""
        return self.head if self.head is not None and head else self.training


def multipliers(study: Study, target: float) -> Multipliers:
    """Return the noise multipliers with which a private study costs epsilon `target`.

    The head start alone costs its share of the target. Training gets what composition leaves of it.
    """
    training, delta = study.training, study.privacy.promise.delta
    if not training.rounds:
        return Multipliers(None, noise_multiplier(target, delta, 1.0, 1))
    if not training.starts_head:
        return Multipliers(None, noise_multiplier(target, delta, *study.draws))
    share = training.head_start_share or HEAD_START_SHARE
    head = noise_multiplier(share * target, delta, 1.0, 1)
    return Multipliers(head, noise_multiplier(target, delta, *study.draws, head))
