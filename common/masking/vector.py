"""The vector that a site masks: its segments, a contribution as words, and how a sum of words is read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from privet.common.errors import DivergedError, ProtocolError, StudyError
from privet.common.masking.bounds import bound_of, bound_of_sums
from privet.common.masking.noise_shares import bits_of, shared_noise
from privet.common.privacy.accounting import plan
from privet.common.privacy.shared_noise import pack_lanes, rescale, unpack_lanes
from privet.common.secagg.quantize import MAX_COUNT, Layout, Segment, Sums, Values, Words, lane_bits, quantise
from privet.common.secagg.shamir import RandomBytes
from privet.common.study.adapter import AdapterSpec, TensorSpec
from privet.common.study.counts import TENSOR, cells_of
from privet.common.study.messages import Contribution
from privet.common.study.study import Study

VALIDATION_SUMS = 3
"""Number of validation sums: of units, of capped losses, and of correct units."""

COUNT_WEIGHT = 0.3
"""A unit of a class counts so much in a head start's sums, beside features of norm 1. More makes counts more precise,
and takes room of the features within the clip norm. Chosen on generated notes and MedQuAD."""

_CUT, _VALIDATION, _GRADIENT = "cut", "validation", "gradient"
# Counts without noise are multiples of it: shares and losses are rounded to them.
_POINT = 2.0**-16
# The noise on a validation sum is within so many deviations, except with a probability of 10^-22.
_LARGEST_NORMAL = 10.0


def released(study: Study, spec: AdapterSpec, *, head: bool = False) -> tuple[TensorSpec, ...]:
    """Return the tensors that sites release: what they train in a round, or a sum over all units.

    Args:
        study: The study.
        spec: Layout of the adapter.
        head: Whether the round is a sum over all units: a head start, or the counts of a study that trains nothing.
    """
    if study.counts:
        return (cells_of(study).tensor,)
    return (spec.class_sums(),) if head else study.trained(spec)


def segments_of(study: Study, spec: AdapterSpec, *, head: bool = False) -> tuple[Segment, ...]:
    """Return the segments of the vector, of a head start or of a round that trains.

    They do not depend on the cohort, so nobody can change their scale.

    The weight is none of them: it is public, and a site that masked another one than it declared would spoil the sum
    without a name.
    """
    largest_count = study.aggregation.largest_count
    if exact(study):
        return _count_segments(study)
    trained = released(study, spec, head=head)
    weight = study.aggregation.weight(largest_count)
    parts = [
        Segment(_CUT, 1, float(sum(tensor.size for tensor in trained) + VALIDATION_SUMS), count=True),
    ]
    if study.data.validation_fraction > 0:
        mechanism = plan(study)
        noise = 0.0
        if mechanism is not None and mechanism.validation is not None:
            noise = _LARGEST_NORMAL * mechanism.validation.noise_multiplier * VALIDATION_SUMS**0.5
        parts.append(Segment(_VALIDATION, VALIDATION_SUMS, largest_count + noise))
    bounds = [bound_of_sums(study) if head else bound_of(study, tensor.role) for tensor in trained]
    parts += [Segment(tensor.name, tensor.size, weight * b) for tensor, b in zip(trained, bounds, strict=True)]
    return tuple(parts)


def exact(study: Study) -> bool:
    """Whether sites release counts without noise, which masks then carry as whole numbers."""
    return study.counts and not study.private


def _count_segments(study: Study) -> tuple[Segment, ...]:
    """Return the one segment of counts without noise, in multiples of `_POINT`."""
    cells = cells_of(study)
    largest = study.aggregation.largest_count * math.ceil(cells.bound / _POINT)
    if largest > MAX_COUNT:
        raise StudyError(
            f"aggregation.largest_count: expected at most {MAX_COUNT // math.ceil(cells.bound / _POINT)} for counts "
            f"without noise, found {study.aggregation.largest_count}",
            "lower aggregation.largest_count in the study, to about the count of the largest site",
        )
    return (Segment(TENSOR, cells.tensor.size, float(largest), count=True),)


def step_segments(study: Study, spec: AdapterSpec, sites: int, *, head: bool = False) -> tuple[Segment, ...]:
    """Return the one segment of a step with shared noise: a gradient sum. Its bound is the most that a lane holds.

    Raises:
        StudyError: So many sites cannot share the noise, or it is correlated and has more values than its proof admits.
    """
    size = sum(tensor.size for tensor in released(study, spec, head=head))
    lane, shares = lane_bits(bits_of(study, sites, head=head), sites), shared_noise(study, sites, head=head)
    if shares.band is not None:
        shares.band.check_rounding(shares.own_multiplier, shares.least_helpers, size)
    return (Segment(_GRADIENT, size, shares.level * 2.0 ** (lane - 1)),)


def words_of(
    study: Study, spec: AdapterSpec, contribution: Contribution, layout: Layout, random_bytes: RandomBytes
) -> Words:
    """Return a contribution as the words that are then masked.

    Raises:
        ProtocolError, DivergedError: The contribution does not fit the layout, or a value is not finite.
    """
    if not study.distributed:
        return quantise(layout, vector_of(study, spec, contribution, layout), random_bytes).words
    if contribution.update.shape != (layout.length,) or contribution.update.dtype != np.int64:
        raise ProtocolError(
            f"the site's gradient sum of a step must be {layout.length} 64-bit integers, got "
            f"{contribution.update.size} values of "
            f"type {contribution.update.dtype}",
            "report this as a bug",
        )
    return pack_lanes(contribution.update.astype(np.int64), layout.lane_bits)


def vector_of(study: Study, spec: AdapterSpec, contribution: Contribution, layout: Layout) -> Values:
    """Return a contribution as the values of the vector's segments. The update is cut to weight times bound."""
    if exact(study):
        return {TENSOR: np.rint(np.asarray(contribution.update, np.float64) / _POINT).astype(np.int64)}
    trained = released(study, spec, head=study.sums_units(contribution.round))
    bounds = {segment.name: segment.bound for segment in layout.segments}
    # The segments' bounds are for the largest weight. Cutting to this site's own weight times bound gives its update
    # the same bound as that of every other site.
    weight, largest = contribution.weight, study.aggregation.weight(study.aggregation.largest_count)
    share = weight / largest
    whole = study.aggregation.weight_power is None
    if not (1 <= weight <= largest and (weight == int(weight) or not whole)):
        raise DivergedError(
            f"the weight of the site's update: expected a {'whole ' if whole else ''}number from 1 to {largest:g}, "
            f"found {weight:g}",
            "set declared_count in the site file to at most aggregation.largest_count of the study",
        )
    values: dict[str, NDArray[np.floating | np.integer]] = {}
    cut = 0
    for tensor, part in zip(trained, _split(trained, np.asarray(contribution.update, np.float32)), strict=True):
        limit = np.float32(share * bounds[tensor.name])
        beyond = int(np.count_nonzero(np.abs(part) > limit))
        # Values that are not finite are left as they are: `quantise` refuses them.
        values[tensor.name] = np.clip(part, -limit, limit) if beyond and np.isfinite(part).all() else part
        cut += beyond
    if contribution.metrics.size:
        values[_VALIDATION] = contribution.metrics
        cut += int(np.count_nonzero(np.abs(contribution.metrics) > bounds[_VALIDATION]))
    values[_CUT] = np.array([cut])
    return values


def _split(trained: Sequence[TensorSpec], update: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    return np.split(update, np.cumsum([tensor.size for tensor in trained])[:-1])


def read_step(study: Study, words: Words, layout: Layout, *, head: bool = False) -> NDArray[np.float64]:
    """Return the sum of gradients and noise [d] of a round that is one step; `head`: of a head start's terms.

    Raises:
        ProtocolError: The number of words is not the layout's.
    """
    return rescale(unpack_lanes(words, layout.length, layout.lane_bits), shared_noise(study, layout.sites, head=head))


def read_sums(
    study: Study, spec: AdapterSpec, sums: Sums, *, head: bool = False
) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
    """Return a group's sums: of values cut, of w times update [d], and of validation sums [k]."""
    if exact(study):
        return 0, sums.values[TENSOR].astype(np.float64) * _POINT, np.empty(0)
    parts = released(study, spec, head=head)
    update = np.concatenate([sums.values[tensor.name].astype(np.float64) for tensor in parts])
    metrics = sums.values.get(_VALIDATION, np.empty(0)).astype(np.float64)
    return int(sums.values[_CUT][0]), update, metrics
