"""The sums of a head start: one unit moves them by its own term alone, within the clip norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from privet.client.site import Resources
from privet.client.training.dp import Clipping
from privet.client.training.features import encode_records
from privet.client.training.headstart import class_sums
from privet.client.training.host import ModelHost
from privet.client.training.model import initial_adapter, open_host
from privet.client.training.sums import Summing, release_sum, share_sum
from privet.client.training.train import TrainingSet
from privet.common.masking.noise_shares import shared_noise
from privet.common.masking.vector import COUNT_WEIGHT
from privet.common.privacy.accounting import plan
from privet.common.privacy.noise import SeededRandomness
from privet.common.study.study import Study
from tests.support.tiny import TAGS, private, records_of, rows_for, tiny_study

CPU = Resources(device="cpu", precision="fp32")
HEAD = {"training.head_start": "class-means", "training.sampling_rate": 1.0, "data.unit": "patient"}
NORM = 0.5


def opened(base: Path, **overrides: Any) -> tuple[Study, ModelHost, TrainingSet]:
    """Return a study with a head start, its host, and units of three rows each."""
    study = tiny_study(base, **{"privacy": private(unit="patient", clip_norm=NORM), **HEAD, **overrides})
    host = open_host(study, CPU)
    records = records_of(study, rows_for(study, 12))
    features = encode_records(study, host.tokenizer, records)
    return study, host, TrainingSet(features, list(records.by_unit().values()), 4)


def sums(study: Study, host: ModelHost, data: TrainingSet, norm: float = NORM) -> np.ndarray[Any, Any]:
    """Return the integer sums of some units."""
    with host.lock:
        return adding(study, host, data)(Clipping(norm, 2.0**-40))


def adding(study: Study, host: ModelHost, data: TrainingSet) -> Summing:
    """Return what adds up the terms of all units."""
    return partial(class_sums, host, study, initial_adapter(study, host), data, 64)


def without(data: TrainingSet, unit: int) -> TrainingSet:
    """Return the data without one unit."""
    return replace(data, units=[rows for index, rows in enumerate(data.units) if index != unit])


def moved(study: Study, host: ModelHost, data: TrainingSet) -> list[float]:
    """Return by how much each unit moves the sums, after checking that it is by its own term."""
    whole, norms = sums(study, host, data), []
    for unit, rows in enumerate(data.units):
        term = sums(study, host, replace(data, units=[rows]))
        assert (whole - sums(study, host, without(data, unit)) == term).all()
        norms.append(float(np.linalg.norm(term.astype(np.float64))) * 2.0**-40)
    return norms


@pytest.mark.parametrize(
    "task",
    [
        {"task.kind": "text-classification"},
        {"task.kind": "token-classification"},
        {"task.kind": "token-classification", "task.head_reads": "all-layers"},
    ],
    ids=lambda task: "-".join(task.values()),
)
def test_a_unit_moves_the_sums_by_its_own_term_within_the_clip_norm(bert: Path, task: dict[str, str]) -> None:
    study, host, data = opened(bert, **task)
    norms = moved(study, host, data)
    assert max(norms) <= NORM
    assert min(norms) > 0.99 * NORM  # and no unit counts for less


def test_without_scaling_a_unit_would_move_them_further(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unscaled(gradients: torch.Tensor, clipping: Clipping) -> tuple[torch.Tensor, torch.Tensor]:
        return (gradients.double() / clipping.lattice).trunc().sum(0).long(), torch.zeros(len(gradients))

    monkeypatch.setattr("privet.client.training.dp.clip_units", unscaled)
    study, host, data = opened(bert)
    assert max(moved(study, host, data)) > NORM


def test_a_term_holds_mean_features_and_counts_of_its_classes(bert: Path) -> None:
    study, host, data = opened(bert)
    unit = [data.units[0][0]]
    term = sums(study, host, replace(data, units=[unit])).reshape(len(study.task.labels), -1) * 2.0**-40
    label = data.features[unit[0]].labels
    assert [bool(row.any()) for row in term] == [index == label for index in range(len(term))]
    features, count = term[label][:-1], term[label][-1]
    # Features have root mean square 1, so their norm is that of the count over its weight.
    assert np.linalg.norm(features) == pytest.approx(count / COUNT_WEIGHT, rel=1e-4)


def test_the_noise_is_that_of_the_plan(bert: Path) -> None:
    study, host, data = opened(bert)
    mechanism = plan(study)
    assert mechanism is not None
    assert mechanism.head is not None
    released = [_started(study, host, data, number) for number in range(4)]
    exact = sums(study, host, data) * 2.0**-40 / data.declared
    noise = np.concatenate([found - exact for found in released]) * data.declared
    assert noise.std() == pytest.approx(mechanism.head.noise_multiplier * NORM, rel=0.15)


def _started(study: Study, host: ModelHost, data: TrainingSet, seed: int) -> np.ndarray[Any, Any]:
    mechanism = plan(study)
    with host.lock:
        event = None if mechanism is None else mechanism.event(head=True)
        noise = SeededRandomness(seed, "test")
        found = release_sum(study, adding(study, host, data), len(data.units), noise, event, host.meter)
    return found / data.declared


def test_shares_have_the_noise_of_the_head_start_and_not_of_a_step(bert: Path) -> None:
    terms = {
        "training.optimizer": "sgd",
        "training.learning_rate": 1.0,
        "training.local_steps": 1,
        "training.rounds": 40,
    }
    masked = {"secure_aggregation.mode": "masked", "cohort.min_sites": 4, **terms}
    shared = {**private(unit="patient", clip_norm=NORM), "mode": "distributed"}
    study, host, data = opened(bert, privacy=shared, **masked)
    shares, steps = shared_noise(study, 5, head=True), shared_noise(study, 5)
    assert 2 * shares.own_multiplier < steps.own_multiplier
    with host.lock:
        noise = SeededRandomness(1, "test")
        found = share_sum(adding(study, host, data), len(data.units), noise, shares, host.meter)
    added = found * shares.level - sums(study, host, data) * 2.0**-40
    assert added.std() == pytest.approx(shares.deviation, rel=0.2)


def test_without_privacy_the_sums_are_released_as_they_are(bert: Path) -> None:
    study, host, data = opened(bert, privacy={"mode": "none"})
    exact = sums(study, host, data, 1.0) * 2.0**-40 / data.declared
    assert _started(study, host, data, 0) == pytest.approx(exact, abs=1e-6)


def test_tags_take_the_mean_of_their_tokens(bert: Path) -> None:
    study, host, data = opened(bert, **{"task.kind": "token-classification"})
    row = next(row for row, feature in enumerate(data.features) if len(_tags(feature.labels)) == len(TAGS))
    term = sums(study, host, replace(data, units=[[row]])).reshape(len(TAGS), -1)
    # Of all tags present the count is the same, also of the most frequent.
    assert len(set(term[:, -1].tolist())) == 1


def _tags(labels: int | Sequence[int]) -> set[int]:
    return set() if isinstance(labels, int) else {label for label in labels if label >= 0}


def test_the_sums_watch_the_classifier_only_while_they_are_taken(bert: Path) -> None:
    study, host, data = opened(bert)
    before = len(host.model.get_base_model().classifier._forward_pre_hooks)
    sums(study, host, data)
    assert len(host.model.get_base_model().classifier._forward_pre_hooks) == before
