"""Train a stand-in for a study: its noise, sampling, clipping, head start and server, on synthetic records.

A round is one step on the sum over all sites, as with `privacy.mode = "distributed"`; with local noise each site adds
its own to that sum. Everything that decides how much noise a step has comes from the study itself, through the
functions that sites and coordinator use: accountants, shares of the noise, bands, the closed form of a head start, the
server's optimizer and the average of adapters. What is simplified is the model (`privet.simulations.plan.world`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privet.common.masking.noise_shares import band_in, shared_noise
from privet.common.masking.vector import COUNT_WEIGHT
from privet.common.privacy.accounting import plan
from privet.common.study.adapter import Adapter, AdapterSpec, TensorSpec
from privet.common.study.average import Mean, counts, extended
from privet.common.study.study import Study
from privet.server.rounds.aggregate import ServerOptimizer, apply_update
from privet.server.rounds.headstart import class_means
from privet.simulations.plan.world import Matrix, Records, World

_BIAS, _WEIGHT, _A, _B = "m.classifier.bias", "m.classifier.weight", "m.lora_A.weight", "m.lora_B.weight"
# As the sites' own head start (`privet.client.training.headstart`).
_HEAD_STABILITY = 1e-3
_COEFFICIENTS = 2.0**14


@dataclass(frozen=True)
class Outcome:
    """What a stand-in reached.

    Attributes:
        accuracy: On test records, 0 to 1.
        noise_to_signal: Norm of the noise in a round's mean gradient over the norm of that gradient, on the mean over
            rounds; 0 without rounds that train, or without noise.
    """

    accuracy: float
    noise_to_signal: float


def sum_deviation(study: Study, sites: int, *, head: bool = False) -> float:
    """Return the standard deviation of the noise on one value of a round's sum over `sites` sites; 0: no privacy.

    With a band, it is that of fresh noise.
    """
    mechanism = plan(study)
    if mechanism is None:
        return 0.0
    own = mechanism.event(head=head).noise_multiplier * study.privacy.promise.clip_norm
    if study.distributed:
        own = shared_noise(study, sites, head=head).deviation
    return float(own * math.sqrt(sites))


def stand_in(study: Study, world: World, sites: int, seed: int) -> Outcome:
    """Train the stand-in of a study whose rounds are one step each, and test it.

    Args:
        study: A study that classifies texts.
        world: The records.
        sites: Number of sites that share them.
        seed: Of sampling and noise. Equal arguments give equal outcomes.

    Raises:
        StudyError: The noise cannot be calibrated, or shared among so many sites.
    """
    rng = np.random.default_rng([seed, 1])
    classes, width, hidden = int(world.train.labels.max()) + 1, world.train.seen.shape[1], world.train.hidden.shape[1]
    shapes = {_BIAS: (classes,), _WEIGHT: (classes, width), _A: (hidden, 1), _B: (width, hidden)}
    roles = {_A: "lora_A", _B: "lora_B"}
    spec = AdapterSpec.of(TensorSpec(name, shape, roles.get(name, "full")) for name, shape in shapes.items())  # type: ignore[arg-type]
    adapter = Adapter(spec, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    if study.training.starts_head:
        weights, biases = _head_start(study, world.train, classes, sites, rng)
        adapter = adapter.replace({_WEIGHT: weights.astype(np.float32), _BIAS: biases.astype(np.float32)})
    ratios: list[float] = []
    if study.training.rounds:
        adapter = _trained(study, adapter, world.train, sites, rng, ratios)
    found = _logits(world.test, adapter)[0].argmax(1) == world.test.labels
    return Outcome(float(found.mean()), float(np.mean(ratios)) if ratios else 0.0)


def _head_start(
    study: Study, records: Records, classes: int, sites: int, rng: np.random.Generator
) -> tuple[Matrix, Matrix]:
    width = records.seen.shape[1]
    kinds, places = np.unique(records.units * classes + records.labels, return_inverse=True)
    terms = np.zeros((len(kinds), width + 1))
    np.add.at(terms, places, np.column_stack([records.seen / math.sqrt(width), np.full(len(places), COUNT_WEIGHT)]))
    norms = np.sqrt(np.bincount(kinds // classes, (terms**2).sum(1)))
    terms /= (norms + _HEAD_STABILITY)[kinds // classes, None]
    sums = np.zeros((classes, width + 1))
    np.add.at(sums, kinds % classes, terms)
    norm = study.privacy.promise.clip_norm if study.private else 1.0
    deviation = sum_deviation(study, sites, head=True) / norm
    return class_means(sums + deviation * rng.standard_normal(sums.shape), deviation)


def _trained(
    study: Study, adapter: Adapter, records: Records, sites: int, rng: np.random.Generator, ratios: list[float]
) -> Adapter:
    training = study.training
    optimizer = ServerOptimizer(study.aggregation, training.rounds, adapter.spec, head=training.train_head)
    units = int(records.units.max()) + 1
    expected = training.sampling_rate * units
    noise = _noise(study, sum(tensor.size for tensor in optimizer.trained), sites, rng)
    classes = rng.integers(study.privacy.band or 1, size=units)
    mean: Mean | None = None
    for step in range(training.rounds):
        chosen = (rng.random(units) < study.draws[0]) & (classes == step % (study.privacy.band or 1))
        parts = _sums(study, adapter, records, chosen, rng)
        signal = np.concatenate([parts[tensor.name].ravel() for tensor in optimizer.trained])
        added = next(noise)
        ratios.append(float(np.linalg.norm(added) / max(float(np.linalg.norm(signal)), 1e-12)))
        adapter = apply_update(adapter, -(signal + added) / expected, optimizer, step)
        if counts(study, step + 1 + training.starts_head):
            mean = extended(study, mean, adapter)
    return adapter if mean is None else mean.adapter(adapter.spec)


def _noise(study: Study, size: int, sites: int, rng: np.random.Generator) -> Iterator[Matrix]:
    """Yield the noise of one step's sum after the other, [size], correlated as the study says."""
    deviation, band = sum_deviation(study, sites), band_in(study) if study.distributed else None
    past: list[Matrix] = []
    while True:
        fresh = deviation * rng.standard_normal(size) if deviation else np.zeros(size)
        if band is not None:
            for coefficient, before in zip(band.coefficients, past, strict=False):
                fresh -= coefficient / _COEFFICIENTS * before
            past = [fresh, *past[: band.steps - 2]]
        yield fresh


def _logits(records: Records, adapter: Adapter) -> tuple[Matrix, Matrix]:
    """Return logits [n, classes], and what they are made of [n, width]."""
    values = {name: value.astype(np.float64) for name, value in adapter.values.items()}
    inputs = records.seen + records.hidden @ values[_B].T
    return inputs @ values[_WEIGHT].T + values[_BIAS], inputs


def _sums(
    study: Study, adapter: Adapter, records: Records, chosen: NDArray[np.bool_], rng: np.random.Generator
) -> dict[str, Matrix]:
    """Return the sum of the clipped gradients of the units chosen, by tensor."""
    drawn = _rows(study, records, chosen, rng)
    part = Records(records.seen[drawn], records.hidden[drawn], records.labels[drawn], records.units[drawn])
    logits, inputs = _logits(part, adapter)
    errors = np.exp(logits - logits.max(1, keepdims=True))
    errors /= errors.sum(1, keepdims=True)
    errors[np.arange(len(errors)), part.labels] -= 1
    back = errors @ adapter.values[_WEIGHT].astype(np.float64)
    _, of_unit = np.unique(part.units, return_inverse=True)
    factors = np.ones((2, len(errors)))
    if study.private and len(errors):
        # Squared norms of sums of outer products: those of a unit's records meet pair by pair.
        head = _squares(of_unit, errors, np.column_stack([inputs, np.ones(len(inputs))]))
        factors = _factors(study, np.sqrt(_squares(of_unit, back, part.hidden)), np.sqrt(head))[:, of_unit]
    ours, heads = factors[0][:, None], factors[1][:, None]
    return {
        _B: (back * ours).T @ part.hidden,
        _WEIGHT: (errors * heads).T @ inputs,
        _BIAS: (errors * heads).sum(0),
    }


def _rows(study: Study, records: Records, chosen: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the rows of the units chosen: of each, as many as enter a step, at random."""
    rows = np.flatnonzero(chosen[records.units])
    if not (study.private and study.privacy.unit == "patient"):
        return rows
    order = rows[np.lexsort((rng.random(len(rows)), records.units[rows]))]
    units = records.units[order]
    first = np.concatenate([[True], units[1:] != units[:-1]]) if len(units) else np.zeros(0, bool)
    place = np.arange(len(order)) - np.flatnonzero(first)[np.cumsum(first) - 1] if len(units) else order
    return order[place < study.privacy.max_records_per_unit]


def _squares(of_unit: NDArray[np.int64], left: Matrix, right: Matrix) -> Matrix:
    """Return the squared norm of each unit's sum of outer products of its rows, [units].

    Rows of a unit lie together.
    """
    count = np.bincount(of_unit)
    place = np.arange(len(of_unit)) - (np.cumsum(count) - count)[of_unit]
    padded = []
    for rows in (left, right):
        filled = np.zeros((len(count), int(count.max()), rows.shape[1]))
        filled[of_unit, place] = rows
        padded.append(filled @ filled.transpose(0, 2, 1))
    found: Matrix = np.maximum((padded[0] * padded[1]).sum((1, 2)), 0)
    return found


def _factors(study: Study, adapter: Matrix, head: Matrix) -> Matrix:
    """Return what the adapter's and the head's part of units' gradients are multiplied by, [2, units]."""
    privacy, norm = study.privacy, study.privacy.promise.clip_norm
    if not study.training.train_head:
        head = np.zeros_like(head)
    share = privacy.head_clip_share
    if share is None:
        whole = np.hypot(adapter, head)
        pairs = [(whole, norm), (whole, norm)]
    else:
        pairs = [(adapter, norm * math.sqrt(1 - share)), (head, norm * math.sqrt(share))]
    if privacy.clipping == "automatic":
        return np.stack([most / (size + privacy.stability) for size, most in pairs])
    return np.stack([most / np.maximum(size, most) for size, most in pairs])
