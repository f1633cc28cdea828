"""Passes of a model over records: logits and losses for each row, scores for each record.

Every loss is the loss of one record and depends on that record alone. Models return losses averaged over a batch's
tokens. With these, one record's gradient would depend on the lengths of the others, which breaks differential privacy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from privet.client.training.features import IGNORED, Feature, row_labels
from privet.client.training.host import ModelHost
from privet.client.training.packing import Layout, Placed, pack
from privet.client.training.vocabulary import Vocabulary
from privet.common.study.sections import GENERATING


@dataclass(frozen=True)
class Pass:
    """Records as rows of tensors, on the host's device.

    Attributes:
        records: Index of each record, in the order of `layout.spans`.
        layout: Where they lie.
        ids: Tokens [1, rows].
        positions: Place of each row in its record [1, rows].
        labels: [rows]; `IGNORED` where a row is no part of the loss.
        weights: Share of each row's loss in its record's loss [rows], float32. Of preference, 1: losses of an answer's
            rows are added (`privet.client.training.preference`).
    """

    records: tuple[int, ...]
    layout: Layout
    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Score:
    """What the model makes of one record.

    Attributes:
        losses: Loss of each labelled row [k], float32.
        truth: Their labels [k].
        predicted: The model's [k].
    """

    losses: NDArray[np.float32]
    truth: NDArray[np.int64]
    predicted: NDArray[np.int64]

    @property
    def total(self) -> float:
        """Sum of the losses, in float64 and in the order of the rows."""
        return float(np.sum(self.losses, dtype=np.float64))

    @property
    def loss(self) -> float:
        """The record's loss: the mean over its labelled rows, 0 without any."""
        return self.total / max(len(self.losses), 1)

    @property
    def correct(self) -> float:
        """Share of its labelled rows that are predicted right, 0 without any."""
        return float(np.count_nonzero(self.truth == self.predicted)) / max(len(self.truth), 1)


def passes_of(host: ModelHost, features: Sequence[Feature], placed: Iterable[Placed]) -> Iterator[Pass]:
    """Yield passes, one at a time, of records whose place is known."""
    for found in placed:
        yield pass_of(host, features, found)


def pass_of(host: ModelHost, features: Sequence[Feature], placed: Placed) -> Pass:
    """Return one pass."""
    ids, positions = rows_of(host, features, placed)
    labels = np.full(placed.layout.rows, IGNORED, np.int64)
    weights = np.zeros(placed.layout.rows, np.float32)
    for record, (start, length) in zip(placed.records, placed.layout.spans, strict=True):
        span = slice(start, start + length)
        labels[span] = row_labels(host.kind, features[record])
        labelled = labels[span] != IGNORED
        weights[span] = labelled / (1 if host.beta is not None else max(1, int(labelled.sum())))
    third, fourth = (torch.from_numpy(array).to(host.device) for array in (labels, weights))
    return Pass(placed.records, placed.layout, ids, positions, third, fourth)


def rows_of(host: ModelHost, features: Sequence[Feature], placed: Placed) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens and the positions of a pass's rows, both [1, rows], on the host's device."""
    ids = np.full(placed.layout.rows, host.tokenizer.pad_token_id, np.int64)
    positions = np.full(placed.layout.rows, host.first_position, np.int64)
    for record, (start, length) in zip(placed.records, placed.layout.spans, strict=True):
        ids[start : start + length] = features[record].ids
        positions[start : start + length] = host.first_position + np.arange(length)
    return torch.from_numpy(ids)[None].to(host.device), torch.from_numpy(positions)[None].to(host.device)


def _inputs(host: ModelHost, passed: Pass) -> dict[str, Any]:
    where: dict[str, Any] = {"input_ids": passed.ids, "attention_mask": torch.ones_like(passed.ids)}
    if host.shape.packed:
        where = {"input_ids": passed.ids, "position_ids": passed.positions}
    if host.shape.packed or host.kind not in GENERATING:
        where["layout"] = passed.layout
    return where


def logits_of(host: ModelHost, passed: Pass) -> torch.Tensor:
    """Return the logits of a pass [rows, classes or vocabulary], inside `host.passing`."""
    with host.computing():
        output = host.model(**_inputs(host, passed))
    logits: torch.Tensor = output if isinstance(output, torch.Tensor) else output.logits
    return logits[0]


def hidden_of(host: ModelHost, passed: Pass, vocabulary: Vocabulary) -> torch.Tensor:
    """Return the last hidden states of a pass [rows, h], inside `host.passing`."""
    with host.computing():
        hidden: torch.Tensor = vocabulary.backbone(**_inputs(host, passed)).last_hidden_state
    return hidden[0]


@dataclass(frozen=True)
class Outcome:
    """What a pass gives for each of its rows.

    Attributes:
        values: Logits [rows, classes], or the last hidden states [rows, h] where `ModelHost.vocabulary` is taken in
            parts.
        losses: [rows], float32, 0 at rows without a label.
        predicted: The most probable class or token [rows]; 0 at rows of a language model without a label, and where
            its vocabulary is taken in parts for a gradient.
    """

    values: torch.Tensor
    losses: torch.Tensor
    predicted: torch.Tensor


def outcome_of(host: ModelHost, passed: Pass) -> Outcome:
    """Run a pass forwards, inside `host.passing`."""
    if host.vocabulary is None:
        logits = logits_of(host, passed)
        return Outcome(logits, losses_of(logits, passed), logits.detach().argmax(-1))
    hidden = hidden_of(host, passed, host.vocabulary)
    with host.computing():
        losses, predicted = host.vocabulary.losses(hidden, passed.labels)
    return Outcome(hidden, losses, predicted)


def losses_of(logits: torch.Tensor, passed: Pass) -> torch.Tensor:
    """Return the loss of each row [rows], float32: cross-entropy, 0 at rows without a label."""
    return functional.cross_entropy(logits.float(), passed.labels, ignore_index=IGNORED, reduction="none")


def backward(host: ModelHost, passed: Pass) -> None:
    """Run a pass forwards and backwards, from the sum of its records' losses."""
    with host.meter.phase("passes"):
        losses = descend(host, passed)
        host.meter.passed([length for _, length in passed.layout.spans], float(losses @ passed.weights))


def descend(host: ModelHost, passed: Pass) -> torch.Tensor:
    """Run a pass forwards and backwards. Return the loss of each row [rows]."""
    losses = outcome_of(host, passed).losses
    # A product instead of the sum itself: rows of padding stay out even if their loss is not finite.
    torch.autograd.backward(losses, passed.weights)
    return losses.detach()


@torch.no_grad()
def score(host: ModelHost, features: Sequence[Feature], most: int = 64) -> list[Score]:
    """Return the score of each record under the mounted adapter.

    A record of preference has two sequences: `privet.client.training.preference` scores pairs.

    Args:
        host: The model; its lock is held by the caller.
        features: The records.
        most: Most records of a pass.
    """
    scores: dict[int, Score] = {}
    with host.passing(training=False):
        for passed in passes_of(host, features, pack(host.shape, features, range(len(features)), most)):
            outcome, truth = outcome_of(host, passed), passed.labels.cpu().numpy()
            losses, predicted = outcome.losses.cpu().numpy(), outcome.predicted.cpu().numpy()
            for record, (start, length) in zip(passed.records, passed.layout.spans, strict=True):
                kept = start + np.flatnonzero(truth[start : start + length] != IGNORED)
                scores[record] = Score(losses[kept], truth[kept], predicted[kept])
    return [scores[record] for record in range(len(features))]
