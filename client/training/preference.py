"""Preference tuning (DPO): the loss of a pair of answers, and its gradient.

Let N be the sum of the negative log-probabilities of an answer's tokens, up to the end of the turn, and s the logistic
function. The loss of a pair is -log s(β·m) for the margin m = (N_rejected - N_chosen) - (N_rejected - N_chosen, of the
reference) (Rafailov et al. 2023, arXiv:2305.18290, equation 7). Its gradient is β·s(-β·m)·(∇N_chosen - ∇N_rejected).
So passes compute the gradients of N alone, and one factor scales the difference of two.

The reference is the base without an adapter, whatever adapter a study starts from. It is a function of the base and
of the pair.

Everything here depends on one pair alone, bit for bit: the sums N come from passes in which a record's losses do not
depend on others (`docs/privacy.md`), and what follows is computed pair by pair. A pair whose margin is not finite has a
gradient that is not a number, which clipping takes as zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from privet.client.training.features import IGNORED, Feature, Pair
from privet.client.training.host import ModelHost
from privet.client.training.packing import pack
from privet.client.training.passes import Score, descend, passes_of, score
from privet.client.training.persample import PerSampleGradients
from privet.common.errors import StateError


class Judged(Protocol):
    """What the model makes of one record of any task."""

    @property
    def loss(self) -> float:
        """The record's loss."""

    @property
    def correct(self) -> float:
        """Share of the record that is predicted right, 0 to 1."""


@dataclass(frozen=True)
class PairScore:
    """What the model makes of a pair.

    Attributes:
        chosen: Log-probability of the chosen answer, in nats.
        rejected: Log-probability of the rejected answer.
        tokens: Tokens of the chosen and of the rejected answer, with their ends.
        reference: Log-probability of the chosen answer less that of the rejected one, under the reference.
        beta: Of the loss.
    """

    chosen: float
    rejected: float
    tokens: tuple[int, int]
    reference: float
    beta: float

    @property
    def margin(self) -> float:
        """By how much more than the reference the model prefers the chosen answer, in nats."""
        return self.chosen - self.rejected - self.reference

    @property
    def loss(self) -> float:
        """The pair's loss."""
        return pair_loss(self.beta, self.margin)

    @property
    def correct(self) -> float:
        """1 if the margin is positive, 1/2 if it is zero, as it is without training, otherwise 0."""
        return _share(self.margin)

    @property
    def likelier(self) -> float:
        """1 if the chosen answer is the likelier one, 1/2 if both are equally likely, otherwise 0."""
        return _share(self.chosen - self.rejected)

    @property
    def likelier_per_token(self) -> float:
        """The same of log-probabilities per token, which do not favour short answers."""
        return _share(self.chosen / max(self.tokens[0], 1) - self.rejected / max(self.tokens[1], 1))


def _share(difference: float) -> float:
    return 0.5 if difference == 0 else float(difference > 0)


def pair_loss(beta: float, margin: float) -> float:
    """Return -log s(β·m), s the logistic function."""
    x = beta * margin
    return max(-x, 0.0) + math.log1p(math.exp(-abs(x)))


def pair_factor(beta: float, margin: float) -> float:
    """Return β·s(-β·m), by which the difference of two gradients is scaled; not a number if m is not finite."""
    if not math.isfinite(margin):
        return math.nan
    x = beta * margin
    # One exponential, of a value that is not positive: it cannot overflow. Python's, as NumPy's may differ in last bits
    # with the place of a value in an array.
    small = math.exp(-abs(x))
    return beta * (small / (1 + small) if x >= 0 else 1 / (1 + small))


def judge(host: ModelHost, features: Sequence[Feature], most: int = 64) -> Sequence[Judged]:
    """Return the score of each record under the mounted adapter, of any task. Arguments as `score_pairs`."""
    return score(host, features, most) if host.beta is None else score_pairs(host, features, most)


def score_pairs(host: ModelHost, features: Sequence[Feature], most: int = 64) -> list[PairScore]:
    """Return the score of each pair under the mounted adapter.

    Args:
        host: The model; its lock is held by the caller.
        features: The pairs.
        most: Most sequences of a pass.
    """
    known = reference_margins(host, features, most)
    scores, beta = _both(host, features, most), _beta(host)
    return [
        PairScore(-first.total, -second.total, (len(first.truth), len(second.truth)), known[pair], beta)
        for pair, (first, second) in zip(_pairs(features), scores, strict=True)
    ]


def reference_margins(host: ModelHost, features: Sequence[Feature], most: int = 64) -> Mapping[Pair, float]:
    """Return what the reference makes of pairs: log-probability of the chosen answer less that of the rejected one.

    Each pair is scored once per host. The mounted adapter stays as it is. Arguments as `score_pairs`.
    """
    unknown = list(dict.fromkeys(pair for pair in _pairs(features) if pair not in host.references))
    if unknown:
        with host.bare():
            found = _both(host, unknown, most)
        margins = (second.total - first.total for first, second in found)
        host.references.update(zip(unknown, margins, strict=True))
    return host.references


def _both(host: ModelHost, features: Sequence[Feature], most: int) -> list[tuple[Score, Score]]:
    """Return the scores of each pair's sequences."""
    found = score(host, [sequence for pair in _pairs(features) for sequence in pair.sequences], most)
    return list(zip(found[::2], found[1::2], strict=True))


def _pairs(features: Sequence[Feature]) -> list[Pair]:
    pairs = [feature for feature in features if isinstance(feature, Pair)]
    if len(pairs) != len(features):
        raise StateError("records of preference: expected pairs, found single answers", "report this as a bug")
    return pairs


def _beta(host: ModelHost) -> float:
    if host.beta is None:
        raise StateError("a model of preference tuning: expected beta, found none", "report this as a bug")
    return host.beta


def windows(host: ModelHost, pairs: Sequence[Pair], most: int) -> Iterator[list[Pair]]:
    """Yield pairs in order, as many at a time as one pass holds: the gradients of their sequences are kept together.

    Args:
        host: The model.
        pairs: The pairs.
        most: Most sequences of a pass.
    """
    largest = host.shape.sizes[-1] if host.shape.packed else 0
    window: list[Pair] = []
    rows = 0
    for pair in pairs:
        needed = sum(host.shape.width(len(sequence.ids)) for sequence in pair.sequences)
        if window and (rows + needed > largest or 2 * len(window) + 2 > most):
            yield window
            window, rows = [], 0
        window.append(pair)
        rows += needed
    if window:
        yield window


def pair_gradients(
    host: ModelHost, pairs: Sequence[Pair], most: int, per_sample: PerSampleGradients
) -> list[torch.Tensor]:
    """Return the gradient of each pair's loss, [P] in float32, inside `host.passing`. The references must be known.

    Args:
        host: The model; its lock is held by the caller.
        pairs: Of one window.
        most: Most sequences of a pass.
        per_sample: Where gradients of single sequences come from.
    """
    sequences = [sequence for pair in pairs for sequence in pair.sequences]
    found: dict[int, tuple[torch.Tensor, float]] = {}
    for passed in passes_of(host, sequences, pack(host.shape, sequences, range(len(sequences)), most)):
        per_sample.begin(passed.layout)
        with host.meter.phase("passes"):
            losses = descend(host, passed).cpu().numpy()
        gradients, labelled = per_sample.take(), passed.labels.cpu().numpy() != IGNORED
        for gradient, record, (start, length) in zip(gradients, passed.records, passed.layout.spans, strict=True):
            rows = slice(start, start + length)
            found[record] = gradient, float(np.sum(losses[rows][labelled[rows]], dtype=np.float64))
    joined, loss, beta = [], 0.0, _beta(host)
    with host.meter.phase("clipping"):
        for place, pair in enumerate(pairs):
            (chosen, nats), (rejected, others) = found[2 * place], found[2 * place + 1]
            margin = others - nats - host.references[pair]
            joined.append((chosen - rejected).mul_(pair_factor(beta, margin)))
            loss += pair_loss(beta, margin)
    host.meter.passed([len(sequence.ids) for sequence in sequences], loss, records=len(pairs))
    return joined
