"""The bound on one value of an update: larger changes are cut before secure aggregation."""

from __future__ import annotations

from privet.common.privacy.accounting import plan
from privet.common.study.counts import cells_of
from privet.common.study.study import Study

# Largest change of a value in one step, over the learning rate. Adam's first step after many zero gradients is
# (1 - b1) / sqrt(1 - b2) = 3.2 (Kingma and Ba 2015, section 2.1). For SGD, a value of a clipped gradient is at most the
# clip norm; the margin leaves room for the noise.
_MARGIN = 4.0
_WITHOUT_CLIPPING = 1.0
_BOUNDS = (1e-9, 1e9)


def bound_of(study: Study, role: str) -> float:
    """Return the largest change of one value of a tensor in a round that is not cut."""
    section, training = study.secure_aggregation, study.training
    explicit = section.bound if role != "full" else section.head_bound or section.bound
    if explicit is not None:
        return _within_range(explicit)
    rate = training.learning_rate if role != "full" else training.head_learning_rate or training.learning_rate
    largest = rate * training.steps * _MARGIN
    if training.optimizer == "sgd":
        clip = study.privacy.promise.clip_norm if study.private else _WITHOUT_CLIPPING / _MARGIN
        largest *= clip / (1 - training.momentum)
    return _within_range(largest)


def bound_of_sums(study: Study) -> float:
    """Return the largest value of a sum over all units, divided by the site's weight, that is not cut.

    It is a head start's, or that of a private study which counts. A unit's term is at most the clip norm. As much
    again for each deviation of the noise holds it at a site of ten units or more, except with a probability of 10^-22 a
    value.
    """
    mechanism = plan(study)
    if mechanism is None:
        return 1.0
    return _within_range(study.privacy.promise.clip_norm * (1 + mechanism.event(head=True).noise_multiplier))


def largest_term(study: Study) -> float:
    """Return the largest L2 norm of what one unit adds to a sum, at the scale at which it is released."""
    if study.private:
        return study.privacy.promise.clip_norm
    return cells_of(study).bound if study.counts else _WITHOUT_CLIPPING


def _within_range(bound: float) -> float:
    """Return the nearest bound that a segment can hold for every weight that a site may declare."""
    return min(max(bound, _BOUNDS[0]), _BOUNDS[1])
