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
from dataclasses import replace

import torch
from torch import nn

from privet.client.training.dp import Clipping, TermSum
from privet.client.training.features import IGNORED
from privet.client.training.host import ModelHost
from privet.client.training.passes import Pass, logits_of
from privet.client.training.train import Steps, TrainingSet
from privet.common.masking.vector import COUNT_WEIGHT
from privet.common.privacy.accounting import quiet_warnings
from privet.common.privacy.shared_noise import Integers
from privet.common.study.adapter import Adapter
from privet.common.study.study import Study

# Terms are scaled to C·|a| / (|a| + s): every unit counts nearly alike, however many classes it has.
_STABILITY = 1e-3


def class_sums(
    host: ModelHost, study: Study, adapter: Adapter, data: TrainingSet, most: int, clipping: Clipping
) -> Integers:
    """Return the sum of all units' terms, int64 [classes (width + 1)], without noise.

    Args:
        host: The model; its lock is held by the caller.
        study: What was agreed.
        adapter: What the coordinator sent: features are those of the model with it.
        data: The site's training records.
        most: Most records of a pass.
        clipping: Clip norm and lattice.
    """
    clipping = replace(clipping, stability=_STABILITY)
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
    points: Integers = terms.total.cpu().numpy()
    return points


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
