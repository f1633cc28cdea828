"""A personal adapter: the shared one, trained further at one site on its own records, and never released.

It spends no privacy budget, because nothing of it leaves the site: a guarantee is owed for what others see. From the
moment a copy leaves, it would be a release without noise.

Whether it is better is decided on units that training does not see. The shared adapter is one of the candidates, and
what lies between it and the trained ones are others. It is left only for a candidate whose loss on these units is lower
by more than the standard error of the difference, so that a site of few units keeps what all sites made together. Only
B and the modules trained in full move, A stays: then a mixture of two adapters is a mixture of their functions' weights
(B A is linear in B).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from privet.client.training.features import Feature
from privet.client.training.host import ModelHost
from privet.client.training.preference import judge
from privet.client.training.train import Draws, TrainingSet, train_round
from privet.common.errors import DataError, DivergedError
from privet.common.study.adapter import Adapter
from privet.common.study.sections import Schedule
from privet.common.study.study import Study

RATES = (3e-4, 1e-3, 3e-3)
"""Learning rates that are tried."""
STAGES, PATIENCE = 10, 2
"""Most stages at a rate, and stages without a better one after which it ends. Candidates are compared after each."""
BATCH, LEAST_STEPS, MOST_STEPS = 16, 16, 64
"""Units of a step, and steps of a stage: one pass over the units, or as near to it as these bounds allow."""
HELD_OUT = 0.2
"""Share of the units on which candidates are compared."""
LEAST_UNITS = 20
"""Least number of units with which this is tried at all."""
MIXTURES = (0.25, 0.5, 0.75)
"""Shares of the trained adapter in what is mixed from it and the shared one."""
_BIG = 1e3

Tell = Callable[[str, int, int], None]
"""Called with what is done, how far it is, and how far it goes."""


@dataclass(frozen=True)
class Candidate:
    """An adapter that a site may use.

    Attributes:
        share: Share of training in it: 0 is the shared adapter, 1 the trained one.
        rate: Learning rate of its training; 0 for the shared adapter.
        stages: Stages of its training.
        loss: Mean loss of the units held out.
        correct: Share of them that is predicted right; of units with several records, their mean.
    """

    share: float
    rate: float
    stages: int
    loss: float
    correct: float


@dataclass(frozen=True)
class Personal:
    """What personalisation found.

    Attributes:
        adapter: What the site should use.
        chosen: How it was made.
        shared: The shared adapter, measured likewise.
        trained: The best one that was trained, unmixed.
        trained_adapter: That adapter.
        mixture: The best mixture of it and the shared one.
        units: Units that were trained on, and units held out.
    """

    adapter: Adapter
    chosen: Candidate
    shared: Candidate
    trained: Candidate
    trained_adapter: Adapter
    mixture: Candidate
    units: tuple[int, int]


@dataclass(frozen=True)
class Material:
    """A site's records for this: units to train on, and units held out [units of rows of `held`]."""

    training: TrainingSet
    held: Sequence[Feature]
    held_units: Sequence[Sequence[int]]


def personal_study(study: Study) -> Study:
    """Return the study under which a site trains for itself: no privacy, no round with others, B and heads alone."""
    rate = {"learning_rate": RATES[0], "head_learning_rate": None, "weight_decay": 0.0, "fedprox_mu": 0.0}
    rest = {"optimizer": "adamw", "momentum": 0.0, "schedule": Schedule(), "patience": None, "rounds": STAGES}
    rest |= {"head_start": "none", "head_start_share": None}
    training = study.training.model_copy(update={**rate, **rest})
    return study.model_copy(
        update={
            "training": training,
            "privacy": study.privacy.model_copy(update={"mode": "none"}),
            "data": study.data.model_copy(update={"validation_fraction": HELD_OUT}),
            "aggregation": study.aggregation.model_copy(update={"method": "ffa"}),
        }
    )


def personalise(
    host: ModelHost, study: Study, shared: Adapter, material: Material, draws: Draws, most: int, tell: Tell
) -> Personal:
    """Train a site's own adapter from the shared one, and choose between them. The host's lock is held by the caller.

    Args:
        host: The model.
        study: The study of the shared adapter.
        shared: The shared adapter.
        material: The site's records.
        draws: Which units a step draws. What is drawn for noise is not used.
        most: Most records of a pass.
        tell: Hears how far it is.

    Raises:
        DataError: There are too few units to compare on.
    """
    own, count = personal_study(study), len(material.training.units)
    if count + len(material.held_units) < LEAST_UNITS or not material.held_units:
        raise DataError(
            f"a personal adapter needs at least {LEAST_UNITS} units to train and compare on, found "
            f"{count + len(material.held_units)}",
            "use the shared adapter",
        )
    rate = min(1.0, BATCH / count)
    stage = min(MOST_STEPS, max(LEAST_STEPS, round(1 / rate)))
    steps = own.training.model_copy(update={"sampling_rate": rate, "local_steps": stage, "local_epochs": None})
    data = replace(material.training, declared=count)
    compared = _Comparison(host, material, most)
    base = compared.measure(shared)
    best: tuple[Candidate, Adapter, NDArray[np.float64]] | None = None
    for number, speed in enumerate(RATES):
        trial = own.model_copy(update={"training": steps.model_copy(update={"learning_rate": speed})})

        def stepped(done: int, earlier: int = number * STAGES * stage) -> None:
            tell("training", earlier + done, len(RATES) * STAGES * stage)

        adapters = _trained(host, trial, shared, data, draws, most, stepped)
        since, lowest = 0, math.inf
        for passed, adapter in enumerate(adapters, start=1):
            losses, correct = compared.measure(adapter)
            found = Candidate(1.0, speed, passed, float(losses.mean()), float(correct.mean()))
            if best is None or found.loss < best[0].loss:
                best = found, adapter, losses
            since, lowest = (0, found.loss) if found.loss < lowest else (since + 1, lowest)
            if since >= PATIENCE:
                break
    before = Candidate(0.0, 0.0, 0, float(base[0].mean()), float(base[1].mean()))
    if best is None:  # every rate diverged
        return Personal(shared, before, before, before, shared, before, (count, len(material.held_units)))
    trained, adapter, losses = best
    mixtures = []
    for number, share in enumerate(MIXTURES):
        tell("comparing mixtures", number, len(MIXTURES))
        between, correct = compared.measure(mixed(shared, adapter, share))
        mixture = replace(trained, share=share, loss=float(between.mean()), correct=float(correct.mean()))
        mixtures.append((mixture, between))
    chosen, least = min([(trained, losses), *mixtures], key=_loss)
    if not _is_lower(base[0], least):
        chosen = before
    taken = shared if chosen is before else adapter if chosen is trained else mixed(shared, adapter, chosen.share)
    mixture, _ = min(mixtures, key=_loss)
    return Personal(taken, chosen, before, trained, adapter, mixture, (count, len(material.held_units)))


def _loss(candidate: tuple[Candidate, NDArray[np.float64]]) -> float:
    return candidate[0].loss


def mixed(shared: Adapter, trained: Adapter, share: float) -> Adapter:
    """Return the adapter between two that have the same A: `share` of the second one."""
    values = {
        name: np.asarray((1 - share) * value + share * trained.values[name], np.float32)
        for name, value in shared.values.items()
    }
    return replace(shared, values=values)


def _is_lower(before: NDArray[np.float64], after: NDArray[np.float64]) -> bool:
    """Return whether losses [units] fell by more than the standard error of the mean difference."""
    fallen = before - after
    return bool(fallen.mean() > fallen.std(ddof=1) / math.sqrt(len(fallen))) if len(fallen) > 1 else False


def _later(stepped: Callable[[int], None], first: int, done: int) -> None:
    """Tell steps of a stage as steps of all stages: `first` were done before."""
    stepped(first + done)


def _trained(
    host: ModelHost,
    study: Study,
    shared: Adapter,
    data: TrainingSet,
    draws: Draws,
    most: int,
    stepped: Callable[[int], None],
) -> Iterator[Adapter]:
    """Yield the adapter after each stage, until a loss is not finite. `stepped` hears the steps done in all stages."""
    adapter, trained = shared, study.trained(shared.spec)
    for stage in range(STAGES):
        first = stage * study.training.steps
        try:
            update = train_round(
                host,
                study,
                adapter,
                data,
                draws,
                first_step=first,
                mechanism=None,
                physical_batch=most,
                stepped=partial(_later, stepped, first),
            )
        except DivergedError:
            return
        values, place = dict(adapter.values), 0
        for tensor in trained:
            moved = update[place : place + tensor.size].reshape(tensor.shape)
            values[tensor.name] = values[tensor.name] + moved
            place += tensor.size
        adapter = replace(adapter, values=values)
        yield adapter


@dataclass(frozen=True)
class _Comparison:
    """Measures adapters on the units held out."""

    host: ModelHost
    material: Material
    most: int

    def measure(self, adapter: Adapter) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return loss and share of right predictions of each unit held out, [units] each."""
        self.host.mount(adapter)
        scores = judge(self.host, self.material.held, self.most)
        # A loss that is not finite must not be the better one.
        worth = [each.loss if math.isfinite(each.loss) else _BIG for each in scores]
        losses = [float(np.mean([worth[row] for row in rows])) for rows in self.material.held_units]
        correct = [float(np.mean([scores[row].correct for row in rows])) for rows in self.material.held_units]
        return np.array(losses), np.array(correct)
