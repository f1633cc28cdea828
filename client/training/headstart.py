"""A head start: before training, each site sums the features of each class, and the head is computed from the sums.

A unit's term has, for each class, the mean of the unit's features of that class, and a count. Its guarantee is that of
a step of training (`privet.client.training.dp`) in which every unit takes part: the term is scaled to at most the clip
norm C, cut to integers on the noise lattice and added exactly, so adding or removing the unit moves the sum by exactly
its term. One release with noise N(0, z²C²) is therefore the Gaussian mechanism of noise multiplier z. A feature is the
input of the classifier, which gives the gradient of its weights; the probe of the device compares those bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from privet.client.training.dp import Clipping, TermSum, noisy
from privet.client.training.features import IGNORED
from privet.client.training.host import ModelHost
from privet.client.training.passes import Pass, logits_of
from privet.client.training.train import MOST, MOST_SHARED, Steps, TrainingSet, check_room
from privet.common.masking.vector import COUNT_WEIGHT
from privet.common.privacy.accounting import PrivacyEvent, quiet_warnings
from privet.common.privacy.noise import LATTICE, Randomness, lattice_unit
from privet.common.privacy.shared_noise import Integers, SharedNoise, contribute
from privet.common.study.adapter import Adapter, Vector
from privet.common.study.study import Study

# Terms are scaled to C·|a| / (|a| + s): every unit counts nearly alike, however many classes it has.
_STABILITY = 1e-3


def start_head(
    host: ModelHost,
    study: Study,
    adapter: Adapter,
    data: TrainingSet,
    noise: Randomness,
    *,
    mechanism: PrivacyEvent | None,
    physical_batch: int,
) -> Vector:
    """Return a site's class sums, with noise of its own, divided by its declared count: float32 [classes (width + 1)].

    Args:
        host: The model; its lock is held by the caller.
        study: What was agreed.
        adapter: What the coordinator sent: features are those of the model with it.
        data: The site's training records.
        noise: A stream that nothing else uses.
        mechanism: Noise multiplier of the release; None releases the sums as they are.
        physical_batch: Most records of a pass.

    Raises:
        StateError: The noise is so small that sums could exceed 64 bits.
    """
    clip_norm = 1.0 if mechanism is None else study.privacy.promise.clip_norm
    lattice = LATTICE if mechanism is None else lattice_unit(mechanism.noise_multiplier * clip_norm)
    clipping = Clipping(clip_norm, lattice, _STABILITY)
    check_room(clipping, len(data.units), 1.0, MOST)
    total = class_sums(host, study, adapter, data, clipping, physical_batch).total
    with host.meter.phase("noise"):
        sums = (
            total.double() * lattice if mechanism is None else noisy(total, lattice, noise.lattice_normal(len(total)))
        )
    found: Vector = (sums / data.declared).cpu().numpy().astype(np.float32)
    return found


def share_head(
    host: ModelHost,
    study: Study,
    adapter: Adapter,
    data: TrainingSet,
    noise: Randomness,
    *,
    shares: SharedNoise,
    physical_batch: int,
) -> Integers:
    """Return a site's class sums plus its share of the noise, in levels, int64 [classes (width + 1)].

    Only a sum over enough sites is private. Arguments and errors as `start_head`; `shares` is how much of the noise is
    this site's.
    """
    clipping = Clipping(shares.clip_norm, shares.lattice, _STABILITY)
    check_room(clipping, len(data.units), 1.0, MOST_SHARED)
    terms = class_sums(host, study, adapter, data, clipping, physical_batch)
    with host.meter.phase("noise"):
        return contribute(terms.total.cpu().numpy(), shares, noise)


def class_sums(
    host: ModelHost, study: Study, adapter: Adapter, data: TrainingSet, clipping: Clipping, most: int
) -> TermSum:
    """Return the sum of all units' terms, int64 [classes (width + 1)], without noise."""
    host.mount(adapter)
    # Passes as in training, also where no gradient is taken: other kernels may add up in another order.
    host.train_only(study.trained(adapter.spec))
    steps = Steps(host, study, data, (), most)
    every = dict(enumerate(data.units))
    rows_of = {row: len(rows) for rows in data.units for row in rows}
    size = adapter.spec.class_sums().size
    terms = TermSum(clipping, torch.zeros(size, dtype=torch.int64, device=host.device))
    with host.passing(training=True), _watching(host) as seen, quiet_warnings():
        for passed in steps.passes(every):
            seen.clear()
            with host.meter.phase("passes"):
                logits_of(host, passed)
                rows = _terms(passed, seen[0], len(study.task.labels))
            with host.meter.phase("clipping"):
                terms.add(rows, [rows_of[record] for record in passed.records])
    return terms


def _terms(passed: Pass, inputs: torch.Tensor, classes: int) -> torch.Tensor:
    """Return each record's part of its unit's term, before it is scaled: [records, classes (width + 1)], float32.

    Args:
        passed: The pass.
        inputs: Of the classifier, [rows, width].
        classes: Number of classes.
    """
    width = inputs.shape[1]
    found = torch.zeros(len(passed.records), classes, width + 1, device=inputs.device)
    labels = passed.labels.tolist()
    for record, (start, length) in zip(found, passed.layout.spans, strict=True):
        places: dict[int, list[int]] = {}
        for row in range(start, start + length):
            if labels[row] != IGNORED:
                places.setdefault(labels[row], []).append(row)
        for label, rows in places.items():
            # Of tokens, the mean: else a record's most frequent tag would take all of its term.
            record[label, :width] = inputs[rows].mean(0) / width**0.5
            record[label, width] = COUNT_WEIGHT
    return found.flatten(1)


@contextmanager
def _watching(host: ModelHost) -> Iterator[list[torch.Tensor]]:
    """Collect the inputs of the classifier, [rows, width] of each pass, while the context is open."""
    seen: list[torch.Tensor] = []
    classifier = host.model.get_base_model().classifier

    def note(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0].detach().float().reshape(-1, inputs[0].shape[-1]))

    handle = classifier.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()
