"""The resolution of a value, and how the sites of a step share the noise at that resolution."""

from __future__ import annotations

from privet.common.errors import StudyError
from privet.common.masking.groups import corrupt_sites, survivors_of
from privet.common.privacy.accounting import multipliers, plan
from privet.common.privacy.shared_noise import LEAST_LEVEL_BITS, SharedNoise, level_bits
from privet.common.secagg.quantize import MIN_BITS, lane_bits
from privet.common.study.study import Study

_THREE_LANES, _TWO_LANES = 21, 32
_FEWEST_BITS = 16
# Allowance for units drawn in a step, over the number expected if every site declares the largest count.
_MOST_DRAWN = 2.0


def bits_of(study: Study, sites: int, *, head: bool = False) -> int:
    """Return the resolution of a value when `sites` vectors are summed, of a head start or of a step of training."""
    if study.secure_aggregation.bits is not None:
        return study.secure_aggregation.bits
    carry = (sites - 1).bit_length()
    three, two = _THREE_LANES - carry, max(MIN_BITS, min(24, _TWO_LANES - carry))
    if not study.distributed:
        return three if three >= _FEWEST_BITS else two
    # Shares are rounded after the noise is added, so few bits cost no accuracy as long as they hold the sum.
    return three if three >= MIN_BITS and _level_bits(study, sites, three, head) >= LEAST_LEVEL_BITS else two


def shared_noise(study: Study, sites: int, *, head: bool = False) -> SharedNoise:
    """Return how the sites of a round's cohort share the noise of a step of training, or of a head start.

    It follows from the study and the size of the cohort, which all sites of a sum have confirmed.

    Raises:
        StudyError: The study does not share noise, or its lanes are too narrow for it.
    """
    bits = bits_of(study, sites, head=head)
    found = _level_bits(study, sites, bits, head)
    if found < LEAST_LEVEL_BITS:
        raise StudyError(
            f"secure_aggregation.bits: {bits} bits for the gradients of {sites} sites leave {found} bits for one "
            "standard "
            f"deviation of a site's noise, at least {LEAST_LEVEL_BITS} are needed",
            "raise secure_aggregation.bits, or lower aggregation.largest_count or training.sampling_rate",
        )
    survivors, corrupt = survivors_of(study, sites, sites), corrupt_sites(study, sites)
    multiplier, least = _multiplier(study, head), _least_multiplier(study, head)
    return SharedNoise(survivors, corrupt, multiplier, study.privacy.promise.clip_norm, found, least)


def _least_multiplier(study: Study, head: bool) -> float:
    """Return the noise multiplier with which a site's shares of the whole study cost `privacy.epsilon_alone`."""
    alone = study.privacy.epsilon_alone
    return 0.0 if alone is None else multipliers(study, alone).of(head=head)


def _level_bits(study: Study, sites: int, bits: int, head: bool) -> int:
    """Return the bits left for a deviation of one share of the noise, if all gradients point the same way."""
    helpers = survivors_of(study, sites, sites) - corrupt_sites(study, sites)
    rate = 1.0 if head else study.training.sampling_rate
    units = _MOST_DRAWN * rate * study.aggregation.largest_count * sites
    return level_bits(lane_bits(bits, sites), sites, helpers, _multiplier(study, head), units)


def _multiplier(study: Study, head: bool) -> float:
    mechanism = plan(study)
    if mechanism is None or not mechanism.training.shared:
        raise StudyError(
            "privacy.mode: sites add shares of the noise only if it is distributed, found another mode",
            'set mode = "distributed"',
        )
    return mechanism.event(head=head).noise_multiplier
