"""A study's rounds under secure aggregation: what enters the vector, and the parameters that follow from the study.

Coordinator and sites derive both from the study, each for itself; a site takes part only if they agree, so
the coordinator has nothing to choose but the cohort. The vector of a site holds its weight w, how many of its
values were cut, its validation sums and w times its update, tensor by tensor: all that a site says about its
data is inside the sum. Where sites share the noise, it is the step's gradient sum and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from privet.common.canonical import canonical_json, digest
from privet.common.errors import ProtocolError, RefusedError, StudyError
from privet.common.privacy.accounting import noise_multiplier, plan
from privet.common.privacy.noise import SeededRandomness
from privet.common.privacy.shared_noise import LEAST_LEVEL_BITS, SharedNoise, decode, level_bits, pack, unpack
from privet.common.secagg import graph
from privet.common.secagg.messages import Member, Parameters
from privet.common.secagg.quantize import MIN_BITS, Layout, Segment, Sums, Values, Words, encode, lane_bits
from privet.common.secagg.shamir import RandomBytes
from privet.common.secagg.terms import least_survivors, part_of
from privet.common.study.adapter import AdapterSpec, TensorSpec
from privet.common.study.messages import Contribution, RoundOpen
from privet.common.study.study import Study

VALIDATION_SUMS = 3
"""Units, capped losses and correct units."""

_WEIGHT, _CUT, _VALIDATION, _GRADIENT = "weight", "cut", "validation", "gradient"
_THREE_LANES, _TWO_LANES = 21, 32
_FEWEST_BITS = 16
_SMALLEST_COHORT_IN_GROUPS, _SMALLEST_GROUP = 30, 5
# What a step can change a value by: Adam's first step after long silence is (1 - b1) / sqrt(1 - b2) = 3.2 times its
# learning rate (Kingma and Ba 2015, section 2.1); a clipped gradient's largest value is the clip norm, beside noise.
_MARGIN = 4.0
_WITHOUT_CLIPPING = 1.0
_BOUNDS = (1e-9, 1e9)
# Units drawn in a step, over those expected of sites with the largest count.
_MOST_DRAWN = 2.0
# Standard deviations within which noise on a validation sum lies, but for once in 10^22.
_LARGEST_NORMAL = 10.0


def session_of(study_digest: str) -> bytes:
    """Return the 32 bytes that name the study in secure aggregation.

    They follow from the study and not from the coordinator's run, because a site's record of what it has masked
    is kept by them: a coordinator that could choose them could have one update masked twice.
    """
    return bytes.fromhex(study_digest.removeprefix("sha256:"))


def inputs_of(study_digest: str, round_number: int, adapter_digest: str, sites: int = 0) -> bytes:
    """Return the digest of all that the sites' vectors of a round depend on beside their data, 32 bytes.

    The study pins the base model and says how to train, so it covers them. A site's record of what it released names
    the cohort's size too where sites share the noise: what was noised for many sites is too little for fewer.
    """
    document: dict[str, str | int] = {"study": study_digest, "round": round_number, "adapter": adapter_digest}
    if sites:
        document["sites"] = sites
    return bytes.fromhex(digest(canonical_json(document)).removeprefix("sha256:"))


def corrupt_sites(study: Study, sites: int) -> int:
    """Return c: how many of `sites` may be in league with the coordinator."""
    section = study.secure_aggregation
    return max(section.corrupt, part_of(section.corrupt_fraction, sites))


def groups_of(study: Study, round_number: int, cohort: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the groups in which a round's cohort is summed, each in name order.

    The order in which sites are dealt out follows from the study's seed and the round. A group holds at least
    five sites and three more than may be corrupt. Cohorts below 30, or too small for three groups, are one.
    """
    names = sorted(cohort)
    least = max(_SMALLEST_GROUP, corrupt_sites(study, len(names)) + 3)
    count = min(study.secure_aggregation.groups, len(names) // least)
    if count < 3 or len(names) < _SMALLEST_COHORT_IN_GROUPS:
        return [tuple(names)]
    draws = SeededRandomness(study.seed, "groups", round_number).uniform(len(names))
    order = [names[index] for index in np.argsort(draws, kind="stable")]
    return [tuple(sorted(order[number::count])) for number in range(count)]


def smallest_sum(study: Study) -> int:
    """Return the least number of sites whose updates a study may come to sum apart, whatever its cohort."""
    if study.secure_aggregation.groups < 3:
        return study.cohort.min_sites
    least = max(_SMALLEST_GROUP, corrupt_sites(study, max(study.cohort.min_sites, _SMALLEST_COHORT_IN_GROUPS)) + 3)
    return min(study.cohort.min_sites, least)


def bound_of(study: Study, role: str) -> float:
    """Return the largest change of one value of a tensor in a round that is carried whole."""
    section, training = study.secure_aggregation, study.training
    explicit = section.bound if role != "full" else section.head_bound or section.bound
    if explicit is not None:
        return _within_range(explicit)
    rate = training.learning_rate if role != "full" else training.head_learning_rate or training.learning_rate
    largest = rate * training.steps * _MARGIN
    if training.optimizer == "sgd":
        clip = study.privacy.promise[2] if study.private else _WITHOUT_CLIPPING / _MARGIN
        largest *= clip / (1 - training.momentum)
    return _within_range(largest)


def _within_range(bound: float) -> float:
    """Return the bound that is nearest to `bound` among those that a segment can carry with any weight."""
    return min(max(bound, _BOUNDS[0]), _BOUNDS[1])


def segments_of(study: Study, spec: AdapterSpec) -> tuple[Segment, ...]:
    """Return the vector's parts. They do not depend on who takes part, so nobody's choice changes their scale."""
    largest_count = study.aggregation.largest_count
    trained = spec.trained(study.aggregation.method)
    weight = largest_count if study.aggregation.weighting == "declared" else 1
    parts = [
        Segment(_WEIGHT, 1, float(largest_count), count=True),
        Segment(_CUT, 1, float(sum(tensor.size for tensor in trained) + VALIDATION_SUMS), count=True),
    ]
    if study.data.validation_fraction > 0:
        mechanism = plan(study)
        noise = 0.0
        if mechanism is not None and mechanism.validation is not None:
            noise = _LARGEST_NORMAL * mechanism.validation.noise_multiplier * VALIDATION_SUMS**0.5
        parts.append(Segment(_VALIDATION, VALIDATION_SUMS, largest_count + noise))
    parts += [Segment(tensor.name, tensor.size, weight * bound_of(study, tensor.role)) for tensor in trained]
    return tuple(parts)


def _step_segments(study: Study, spec: AdapterSpec, sites: int) -> tuple[Segment, ...]:
    """Return the vector of a round that is one step with shared noise: a gradient sum, up to what a lane can hold."""
    trained = sum(tensor.size for tensor in spec.trained(study.aggregation.method))
    lane = lane_bits(bits_of(study, sites), sites)
    return (Segment(_GRADIENT, trained, shared_noise(study, sites).level * 2.0 ** (lane - 1)),)


def bits_of(study: Study, sites: int) -> int:
    """Return the resolution of a value when `sites` vectors are summed."""
    if study.secure_aggregation.bits is not None:
        return study.secure_aggregation.bits
    carry = (sites - 1).bit_length()
    three, two = _THREE_LANES - carry, max(MIN_BITS, min(24, _TWO_LANES - carry))
    if not study.distributed:
        return three if three >= _FEWEST_BITS else two
    # Shares of noise are rounded last, so that few bits cost nothing as long as they hold the sum.
    return three if three >= MIN_BITS and _level_bits(study, sites, three) >= LEAST_LEVEL_BITS else two


def survivors_of(study: Study, sites: int, cohort: int) -> int:
    """Return the least number of sites in the sum over a group of `sites` of a cohort, or over all of it."""
    least = least_survivors(sites, corrupt_sites(study, cohort))
    if sites == cohort:
        least = max(least, min(study.cohort.min_sites, sites))  # the round's minimum, not a group's
    if study.distributed:
        section = study.privacy
        least = max(least, sites - max(section.dropouts, part_of(section.dropout_fraction, sites)))
    return least


def shared_noise(study: Study, sites: int) -> SharedNoise:
    """Return how the sites of a round's cohort share the noise of a step.

    Everything follows from the study and the cohort's size, which all sites of a sum have confirmed alike.

    Raises:
        StudyError: The study does not share noise, or its lanes are too narrow for it.
    """
    bits = bits_of(study, sites)
    found = _level_bits(study, sites, bits)
    if found < LEAST_LEVEL_BITS:
        raise StudyError(
            f"secure_aggregation: {bits} bits leave {found} for a deviation of the noise beside the gradients of "
            f"{sites} sites, {LEAST_LEVEL_BITS} are needed",
            "set secure_aggregation.bits higher, or aggregation.largest_count or training.sampling_rate lower",
        )
    survivors, corrupt = survivors_of(study, sites, sites), corrupt_sites(study, sites)
    return SharedNoise(
        survivors, corrupt, _multiplier(study), study.privacy.promise[2], found, _least_multiplier(study)
    )


def _least_multiplier(study: Study) -> float:
    """Return the noise multiplier with which a site's shares of the whole study cost `privacy.epsilon_alone`."""
    alone = study.privacy.epsilon_alone
    if alone is None:
        return 0.0
    return noise_multiplier(alone, study.privacy.promise[1], study.training.sampling_rate, study.total_steps)


def _level_bits(study: Study, sites: int, bits: int) -> int:
    """Return the bits that are left for a deviation of one share of the noise, however the gradients point."""
    helpers = survivors_of(study, sites, sites) - corrupt_sites(study, sites)
    units = _MOST_DRAWN * study.training.sampling_rate * study.aggregation.largest_count * sites
    return level_bits(lane_bits(bits, sites), sites, helpers, _multiplier(study), units)


def _multiplier(study: Study) -> float:
    mechanism = plan(study)
    if mechanism is None or not mechanism.training.shared:
        raise StudyError("privacy.mode: only a study of mode distributed shares noise")
    return mechanism.training.noise_multiplier


def parameters_of(study: Study, spec: AdapterSpec, opened: RoundOpen, members: Mapping[str, bytes]) -> Parameters:
    """Return the parameters of secure aggregation for one group of a round.

    Args:
        study: The study.
        spec: Layout of the adapter.
        opened: The round; its cohort is the whole one, and all its corrupt sites may be in this group.
        members: Identity key of each site of the group, 32 bytes, by name.

    Raises:
        StudyError: No parameters allow so many corrupt sites among so few.
    """
    sites, corrupt = len(members), corrupt_sites(study, len(opened.cohort))
    if corrupt > sites - 2:
        raise StudyError(
            f"secure aggregation: {sites} sites cannot withstand {corrupt} in league with the coordinator",
            'gather more sites, lower secure_aggregation.corrupt, or ask for secure_aggregation.mode = "plain"',
        )
    dropouts = part_of(study.secure_aggregation.dropout_fraction, sites) if sites > graph.COMPLETE_UP_TO else 0
    choice = graph.choose(sites, corrupt, dropouts, study.secure_aggregation.security)
    return Parameters(
        session=session_of(study.digest),
        round=opened.round,
        inputs=inputs_of(study.digest, opened.round, opened.adapter_digest),
        cohort=tuple(Member(name, members[name]) for name in sorted(members)),
        degree=choice.degree,
        threshold=choice.threshold,
        corrupt=corrupt,
        security=study.secure_aggregation.security,
        min_survivors=survivors_of(study, sites, len(opened.cohort)),
        bits=bits_of(study, sites),
        segments=_step_segments(study, spec, sites) if study.distributed else segments_of(study, spec),
    )


def check_proposal(study: Study, spec: AdapterSpec, opened: RoundOpen, proposed: Parameters, declared: int) -> None:
    """Check that what the coordinator proposes is what follows from the study, for a site that declared `declared`.

    Raises:
        RefusedError: The site's count is above the study's, or the cohort is not one that the study allows.
        ProtocolError: The proposal is another than the study's.
    """
    if declared > study.aggregation.largest_count:
        raise RefusedError(
            f"this site declares {declared} units, the study allows {study.aggregation.largest_count}",
            "declare fewer, or agree on a larger aggregation.largest_count",
        )
    if len(opened.cohort) < study.cohort.min_sites or list(opened.cohort) != sorted(set(opened.cohort)):
        raise RefusedError(
            f"round {opened.round}: the study demands {study.cohort.min_sites} different sites in name order, "
            f"the round's cohort has {len(opened.cohort)}"
        )
    strangers = set(opened.cohort) - set(study.cohort.sites)
    if study.cohort.sites and strangers:
        raise RefusedError(
            f"round {opened.round}: the cohort holds {len(strangers)} sites that the study does not name"
        )
    members = {member.name: member.identity for member in proposed.cohort}
    if tuple(members) not in groups_of(study, opened.round, opened.cohort):
        raise ProtocolError(
            f"round {opened.round}: the sites proposed for one sum are not a group of the round's cohort",
            "the coordinator chose them otherwise than the study says; do not take part",
        )
    if proposed != parameters_of(study, spec, opened, members):
        raise ProtocolError(
            f"round {opened.round}: the parameters of secure aggregation are not those that follow from the study",
            "coordinator and sites must run the same version of privet",
        )


def words_of(
    study: Study, spec: AdapterSpec, contribution: Contribution, layout: Layout, random_bytes: RandomBytes
) -> Words:
    """Return a contribution as the words that are masked.

    Raises:
        ProtocolError, DivergedError: It does not fit the layout, or is not finite.
    """
    if not study.distributed:
        return encode(layout, vector_of(study, spec, contribution, layout), random_bytes).words
    if contribution.update.shape != (layout.length,) or contribution.update.dtype != np.int64:
        raise ProtocolError(f"the step's sum must be {layout.length} integers")
    return pack(contribution.update.astype(np.int64), layout.lane_bits)


def vector_of(study: Study, spec: AdapterSpec, contribution: Contribution, layout: Layout) -> Values:
    """Return a contribution as the values of the vector's segments, the update's cut to weight times bound."""
    trained = spec.trained(study.aggregation.method)
    bounds = {segment.name: segment.bound for segment in layout.segments}
    # The segments' bounds are for the largest weight; this site's values stay within its own.
    declared = study.aggregation.weighting == "declared"
    share = contribution.weight / study.aggregation.largest_count if declared else 1.0
    values: dict[str, NDArray[np.floating | np.integer]] = {_WEIGHT: np.array([contribution.weight])}
    cut = 0
    for tensor, part in zip(trained, _split(trained, np.asarray(contribution.update, np.float32)), strict=True):
        limit = np.float32(share * bounds[tensor.name])
        beyond = int(np.count_nonzero(np.abs(part) > limit))
        # What is not finite is left for `encode` to refuse.
        values[tensor.name] = np.clip(part, -limit, limit) if beyond and np.isfinite(part).all() else part
        cut += beyond
    if contribution.metrics.size:
        values[_VALIDATION] = contribution.metrics
        cut += int(np.count_nonzero(np.abs(contribution.metrics) > bounds[_VALIDATION]))
    values[_CUT] = np.array([cut])
    return values


def _split(trained: Sequence[TensorSpec], update: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    return np.split(update, np.cumsum([tensor.size for tensor in trained])[:-1])


def read_step(study: Study, words: Words, layout: Layout) -> NDArray[np.float64]:
    """Return the sum of gradients and noise [d] of a round that is one step.

    Raises:
        ProtocolError: The sum has another number of words.
    """
    return decode(unpack(words, layout.length, layout.lane_bits), shared_noise(study, layout.sites))


def read_sums(
    study: Study, spec: AdapterSpec, sums: Sums
) -> tuple[float, int, NDArray[np.float64], NDArray[np.float64]]:
    """Return a group's sums: of the weights, of the values cut, of w times update [d], of the validation sums [k]."""
    trained = spec.trained(study.aggregation.method)
    update = np.concatenate([sums.values[tensor.name].astype(np.float64) for tensor in trained])
    metrics = sums.values.get(_VALIDATION, np.empty(0)).astype(np.float64)
    return float(sums.values[_WEIGHT][0]), int(sums.values[_CUT][0]), update, metrics
