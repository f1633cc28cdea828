"""Choose the settings of a study by simulating stand-ins: many choices briefly, the better ones longer.

Successive halving (Karnin, Koren and Somekh 2013; Jamieson and Talwalkar 2016): every rung draws each choice that is
left on the same worlds, keeps the better part, and the next rung adds worlds. Choices meet on equal records and seeds,
so their differences have less noise than their accuracies.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from privet.common.errors import StudyError
from privet.common.progress import Tell, silent
from privet.common.study.study import Study
from privet.simulations.plan.settings import Choice, alone, changed, grid, neighbours, with_promise
from privet.simulations.plan.surrogate import Outcome, stand_in
from privet.simulations.plan.world import EASY, HARD, USUAL, Consortium, Separability, World, draw_world

Document = Mapping[str, Any]
# Choices of the first rung, the part that each rung keeps, and worlds of each rung.
_FIRST, _KEPT, _WORLDS = 60, 3, (1, 3, 6)
_FINAL = 6
# Moves from the best choice of the grid, worlds in which each change is tried, and the most rounds that are proposed:
# every round takes the sites' time.
_MOVES, _CLIMBING, _MOST_ROUNDS = 3, 4, 160
EPSILONS = (8.0, 3.0, 1.0)


@dataclass(frozen=True)
class Estimate:
    """An accuracy, or a difference of two.

    Attributes:
        value: Mean over worlds, in points (0 to 100).
        half: Half the width of its 95 % interval over worlds (Student's t); infinite with one world.
    """

    value: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Return the estimate from values of 0 to 1, one for each world."""
        mean, count = 100 * statistics.mean(values), len(values)
        if count < 2:
            return cls(mean, math.inf)
        deviation = 100 * statistics.stdev(values)
        return cls(mean, float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count))

    def document(self) -> dict[str, float | None]:
        """Return the estimate as plain JSON values."""
        return {"value": round(self.value, 2), "half": None if math.isinf(self.half) else round(self.half, 2)}


@dataclass(frozen=True)
class Advice:
    """What a planner recommends.

    Attributes:
        choice: The settings.
        study: The study.
        accuracy: By how well classes come apart: "hard", "usual", "easy".
        without: The same without privacy.
        ratio: Noise over signal of a round's mean gradient.
        costs: What other choices would gain, on equal worlds, in words; negative is a loss.
        promises: Accuracy of the recommended settings under another promise, in words.
        tried: Number of choices that were simulated.
    """

    choice: Choice
    study: Study
    accuracy: Mapping[str, Estimate]
    without: Mapping[str, Estimate]
    ratio: float
    costs: Mapping[str, Estimate]
    promises: Mapping[str, Estimate]
    tried: int


@dataclass
class Bench:
    """Simulates choices on worlds, and remembers what came out."""

    document: Document
    consortium: Consortium
    _worlds: dict[tuple[Separability, int, int], World] = field(default_factory=dict)
    _found: dict[Any, Outcome] = field(default_factory=dict)

    @property
    def sites(self) -> int:
        """Number of sites."""
        return len(self.consortium.units)

    def study(self, choice: Choice, document: Document | None = None) -> Study:
        """Return the study of a choice.

        Raises:
            StudyError: Its settings do not go together.
        """
        return Study.parse(changed(document or self.document, choice, max(self.consortium.units)))

    def outcome(self, study: Study, rank: int, apart: Separability, seed: int) -> Outcome:
        """Return what a study reaches in one world."""
        key = study.digest, apart, seed
        if key not in self._found:
            place = apart, rank, seed
            if place not in self._worlds:
                sized = Consortium(**{**vars(self.consortium), "rank": rank})
                self._worlds[place] = draw_world(sized, apart, seed)
            self._found[key] = stand_in(study, self._worlds[place], self.sites, seed)
        return self._found[key]

    def reached(
        self, choice: Choice, document: Document | None = None, worlds: int | None = None
    ) -> list[float] | None:
        """Return the accuracies of a choice, in as many worlds as a result has; None if its settings do not fit."""
        try:
            return self.accuracies(self.study(choice, document), choice.rank, worlds or _FINAL)
        except StudyError:
            return None

    def accuracies(self, study: Study, rank: int, worlds: int, apart: Separability = USUAL) -> list[float]:
        """Return the accuracy in each of the first worlds."""
        return [self.outcome(study, rank, apart, seed).accuracy for seed in range(worlds)]


def advise(document: Document, consortium: Consortium, *, seed: int = 0, tell: Tell = silent) -> Advice:
    """Recommend settings for a study.

    Args:
        document: The study file's values.
        consortium: What sites declare.
        seed: Decides which part of the grid is tried.
        tell: Hears what is done.

    Raises:
        StudyError: No choice makes a valid study whose noise can be calibrated.
    """
    bench = Bench(document, consortium)
    study = Study.parse(dict(document))
    every = list(grid(study))
    rng = np.random.default_rng(seed)
    drawn = [every[0]] + [every[place] for place in rng.permutation(len(every) - 1)[: _FIRST - 1] + 1]
    left = _valid(bench, drawn, tell)
    tried = len(left)
    for worlds in _WORLDS:
        scores = {}
        for done, (choice, candidate) in enumerate(left.items()):
            tell(f"simulating {len(left)} choices, {worlds} times each", done, len(left))
            scores[choice] = statistics.mean(bench.accuracies(candidate, choice.rank, worlds))
        ranked = sorted(left, key=lambda choice: -scores[choice])
        left = {choice: left[choice] for choice in ranked[: max(1, len(ranked) // _KEPT)]}
    best, more = _climbed(bench, next(iter(left)), study, tell)
    return _described(bench, best, study, tried + more, tell)


def _climbed(bench: Bench, best: Choice, study: Study, tell: Tell) -> tuple[Choice, int]:
    """Return the choice to which single changes lead that gain beyond chance, and the number of changes tried.

    The grid is coarse: the best rate or number of rounds often lies beside it.
    """
    tried = 0
    for move in range(_MOVES):
        tell("changing one setting at a time", move, _MOVES)
        own, gains = bench.accuracies(bench.study(best), best.rank, _CLIMBING), {}
        for _, other in neighbours(best, study):
            tried += 1
            if other.rounds <= _MOST_ROUNDS and (found := bench.reached(other, worlds=_CLIMBING)) is not None:
                gains[other] = Estimate.of([b - a for a, b in zip(own, found, strict=True)])
        surest = max(gains, key=lambda other: gains[other].value - gains[other].half, default=best)
        if surest == best or gains[surest].value <= gains[surest].half:
            break
        best = surest
    return best, tried


def _valid(bench: Bench, choices: Sequence[Choice], tell: Tell) -> dict[Choice, Study]:
    """Return the choices that make a study, each with it; calibrating the noise takes most of the time."""
    found: dict[Choice, Study] = {}
    error: StudyError | None = None
    for done, choice in enumerate(choices):
        tell("calibrating the noise of each choice", done, len(choices))
        try:
            candidate = bench.study(choice)
            bench.outcome(candidate, choice.rank, USUAL, 0)
        except StudyError as refused:
            error = refused
            continue
        found[choice] = candidate
    if not found and error is not None:
        raise error
    return found


def _described(bench: Bench, best: Choice, study: Study, tried: int, tell: Tell) -> Advice:
    chosen = bench.study(best)
    kinds = {"hard": HARD, "usual": USUAL, "easy": EASY}
    open_ = bench.study(best, with_promise(bench.document, mode="none"))
    tell("simulating what each choice costs", 0, None)
    own = bench.accuracies(chosen, best.rank, _FINAL)
    costs = {}
    for words, other in neighbours(best, study):
        found = bench.reached(other)
        if found is not None:
            costs[words] = Estimate.of([b - a for a, b in zip(own, found, strict=True)])
    promises = {}
    for words, document in _promises(bench.document, study):
        both = [bench.reached(choice, document) for choice in dict.fromkeys((best, alone(study)))]
        most = max((found for found in both if found is not None), key=statistics.mean, default=None)
        if most is not None:
            promises[words] = Estimate.of(most)
    return Advice(
        choice=best,
        study=chosen,
        accuracy={n: Estimate.of(bench.accuracies(chosen, best.rank, _FINAL, each)) for n, each in kinds.items()},
        without={n: Estimate.of(bench.accuracies(open_, best.rank, _FINAL, each)) for n, each in kinds.items()},
        ratio=bench.outcome(chosen, best.rank, USUAL, 0).noise_to_signal,
        costs=costs,
        promises=promises,
        tried=tried,
    )


def _promises(document: Document, study: Study) -> Iterator[tuple[str, Document]]:
    """Yield a study file's values with other promises, in words."""
    for epsilon in EPSILONS:
        alone_at = study.privacy.epsilon_alone
        if epsilon != study.privacy.promise.epsilon and (alone_at is None or epsilon < alone_at):
            yield f"epsilon {epsilon:g}", with_promise(document, epsilon=epsilon)
    if study.distributed:
        privacy = {key: value for key, value in document["privacy"].items() if key != "epsilon_alone"}
        yield "mode local: each site adds all its noise", with_promise({**document, "privacy": privacy}, mode="local")
