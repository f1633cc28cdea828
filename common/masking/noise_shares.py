"""How finely a value is carried, and how the sites of a step share its noise beside that."""

from __future__ import annotations

from privet.common.errors import StudyError
from privet.common.masking.groups import corrupt_sites, survivors_of
from privet.common.privacy.accounting import noise_multiplier, plan
from privet.common.privacy.shared_noise import LEAST_LEVEL_BITS, SharedNoise, level_bits
from privet.common.secagg.quantize import MIN_BITS, lane_bits
from privet.common.study.study import Study

_THREE_LANES, _TWO_LANES = 21, 32
_FEWEST_BITS = 16
# Units drawn in a step, over those expected of sites with the largest count.
_MOST_DRAWN = 2.0


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
        survivors, corrupt, _multiplier(study), study.privacy.promise.clip_norm, found, _least_multiplier(study)
    )


def _least_multiplier(study: Study) -> float:
    """Return the noise multiplier with which a site's shares of the whole study cost `privacy.epsilon_alone`."""
    alone = study.privacy.epsilon_alone
    if alone is None:
        return 0.0
    return noise_multiplier(alone, study.privacy.promise.delta, study.training.sampling_rate, study.total_steps)


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
