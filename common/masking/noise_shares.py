"""The resolution of a value, and how the sites of a step share the noise at that resolution."""

from __future__ import annotations

from privet.common.errors import StudyError
from privet.common.masking.groups import corrupt_sites, survivors_of
from privet.common.privacy.accounting import noise_multiplier, plan
from privet.common.privacy.shared_noise import LEAST_LEVEL_BITS, SharedNoise, level_bits
from privet.common.secagg.quantize import MIN_BITS, lane_bits
from privet.common.study.study import Study

_THREE_LANES, _TWO_LANES = 21, 32
_FEWEST_BITS = 16
# Allowance for units drawn in a step, over the number expected if every site declares the largest count.
_MOST_DRAWN = 2.0


def bits_of(study: Study, sites: int) -> int:
    """Return the resolution of a value when `sites` vectors are summed."""
    if study.secure_aggregation.bits is not None:
        return study.secure_aggregation.bits
    carry = (sites - 1).bit_length()
    three, two = _THREE_LANES - carry, max(MIN_BITS, min(24, _TWO_LANES - carry))
    if not study.distributed:
        return three if three >= _FEWEST_BITS else two
    # Shares are rounded after the noise is added, so few bits cost no accuracy as long as they hold the sum.
    return three if three >= MIN_BITS and _level_bits(study, sites, three) >= LEAST_LEVEL_BITS else two


def shared_noise(study: Study, sites: int) -> SharedNoise:
    """Return how the sites of a round's cohort share the noise of a step.

    It follows from the study and the size of the cohort, which all sites of a sum have confirmed.

    Raises:
        StudyError: The study does not share noise, or its lanes are too narrow for it.
    """
    bits = bits_of(study, sites)
    found = _level_bits(study, sites, bits)
    if found < LEAST_LEVEL_BITS:
        raise StudyError(
            f"secure_aggregation.bits: {bits} bits for the gradients of {sites} sites leave {found} bits for one "
            "standard "
            f"deviation of a site's noise, at least {LEAST_LEVEL_BITS} are needed",
            "raise secure_aggregation.bits, or lower aggregation.largest_count or training.sampling_rate",
        )
    survivors, corrupt = survivors_of(study, sites, sites), corrupt_sites(study, sites)
    return SharedNoise(
        survivors, corrupt, _multiplier(study), study.privacy.promise.clip_norm, found, _least_multiplier(study)
    )


def _least_multiplier(study: Study) -> float:
    """Return the noise multiplier with which a site's shares of the whole study cost `privacy.epsilon_alone`."""
    alone = study.privacy.epsilon_alone
    if alone is None:
        return 0.0
    return noise_multiplier(alone, study.privacy.promise.delta, study.training.sampling_rate, study.total_steps)


def _level_bits(study: Study, sites: int, bits: int) -> int:
    """Return the bits left for a deviation of one share of the noise, if all gradients point the same way."""
    helpers = survivors_of(study, sites, sites) - corrupt_sites(study, sites)
    units = _MOST_DRAWN * study.training.sampling_rate * study.aggregation.largest_count * sites
    return level_bits(lane_bits(bits, sites), sites, helpers, _multiplier(study), units)


def _multiplier(study: Study) -> float:
    mechanism = plan(study)
    if mechanism is None or not mechanism.training.shared:
        raise StudyError(
            "privacy.mode: sites add shares of the noise only if it is distributed, found another mode",
            'set mode = "distributed"',
        )
    return mechanism.training.noise_multiplier
