"""The resolution of a value, and how the sites of a step share the noise at that resolution."""

from __future__ import annotations

from privet.common.errors import StudyError
from privet.common.masking.groups import corrupt_sites, survivors_of
from privet.common.privacy.accounting import multipliers, plan
from privet.common.privacy.correlated import Band, band_of
from privet.common.privacy.shared_noise import SharedNoise, least_level_bits, level_bits
from privet.common.secagg.messages import MAX_SITES
from privet.common.secagg.quantize import MIN_BITS, lane_bits
from privet.common.study.study import Study

_THREE_LANES, _TWO_LANES = 21, 32
_FEWEST_BITS = 16
# Allowance for units drawn in a step, over the number expected if every site declares the largest count.
_MOST_DRAWN = 2.0
# Beyond it a band is far from what the server's momentum asks for, and noise that is not taken back weighs too much.
_MOST_SPREAD = 4.0
_FEWEST_HELPERS = 2


def bits_of(study: Study, sites: int, *, head: bool = False) -> int:
    """Return the resolution of a value when `sites` vectors are summed, of a head start or of a step of training."""
    if study.secure_aggregation.bits is not None:
        return study.secure_aggregation.bits
    carry = (sites - 1).bit_length()
    three, two = _THREE_LANES - carry, max(MIN_BITS, min(24, _TWO_LANES - carry))
    if not study.distributed:
        return three if three >= _FEWEST_BITS else two
    # Shares are rounded after the noise is added, so few bits cost no accuracy as long as they hold the sum.
    least = least_level_bits(band_in(study, head=head))
    return three if three >= MIN_BITS and _level_bits(study, sites, three, head) >= least else two


def momentum_of(study: Study) -> float:
    """Return the momentum that a study's noise is correlated for; 0: none.

    Adaptive optimizers divide by the size of each step's sum, which a band for momentum makes much noisier. On them, a
    band for none has gained accuracy where one for their momentum lost it (`docs/correlated-noise.md`).
    """
    return study.aggregation.momentum if study.aggregation.optimizer == "fedavgm" else 0.0


def band_in(study: Study, *, head: bool = False) -> Band | None:
    """Return how a study's noise is correlated over steps; None if each step's is fresh, as that of a head start is.

    Raises:
        StudyError: The band does not fit the server's momentum.
    """
    if study.privacy.band is None or head:
        return None
    momentum = momentum_of(study)
    band = band_of(study.privacy.band, momentum)
    spread = band.spread(study.total_steps)
    if spread > _MOST_SPREAD:
        raise StudyError(
            f"privacy.band: over {band.steps} steps, a server with momentum {momentum:g} would need noise with "
            f"{spread:.3g} times the deviation of independent noise, expected at most {_MOST_SPREAD:g}",
            "raise privacy.band, or lower aggregation.momentum, in the study",
        )
    return band


def shared_noise(study: Study, sites: int, *, head: bool = False) -> SharedNoise:
    """Return how the sites of a round's cohort share the noise of a step of training, or of a head start.

    It follows from the study and the size of the cohort, which all sites of a sum have confirmed.

    Raises:
        StudyError: The study does not share noise, or its lanes are too narrow for it.
    """
    bits, band = bits_of(study, sites, head=head), band_in(study, head=head)
    found, least = _level_bits(study, sites, bits, head), least_level_bits(band)
    if found < least:
        raise StudyError(
            f"secure_aggregation.bits: {bits} bits for the gradients of {sites} sites leave {found} bits for one "
            "standard "
            f"deviation of a site's noise, at least {least} are needed",
            "raise secure_aggregation.bits, or lower aggregation.largest_count or training.sampling_rate",
        )
    survivors, corrupt = survivors_of(study, sites, sites), corrupt_sites(study, sites)
    return SharedNoise(
        survivors,
        corrupt,
        _multiplier(study, head),
        study.privacy.promise.clip_norm,
        found,
        _least_multiplier(study, head),
        band,
        0 if band is None else least_helpers(study),
    )


def deviation_of_sum(study: Study, sites: int, survivors: int) -> float:
    """Return the standard deviation of the noise on one value of a sum over all units; 0 without privacy.

    Args:
        study: The study, with a head start or of counts.
        sites: Sites that were asked into the sum.
        survivors: Sites that are in it.
    """
    mechanism = plan(study)
    if mechanism is None:
        return 0.0
    own = mechanism.event(head=True).noise_multiplier * study.privacy.promise.clip_norm
    if study.distributed:
        own = shared_noise(study, sites, head=True).deviation
    return float(own * survivors**0.5)


def least_helpers(study: Study) -> int:
    """Return the least number of honest sites in any sum of a study with shared noise, over all cohorts it admits."""
    most, found = len(study.cohort.sites) or MAX_SITES, MAX_SITES
    privacy, masks = study.privacy, study.secure_aggregation
    for sites in range(min(study.cohort.min_sites, most), most + 1):
        # Drop-outs and corrupt sites are fractions rounded down, so a larger cohort may have fewer honest sites. Where
        # there are enough without rounding, there are in every larger cohort.
        kept = sites - max(privacy.dropouts, privacy.dropout_fraction * sites)
        kept -= max(masks.corrupt, masks.corrupt_fraction * sites)
        if kept >= found and privacy.dropout_fraction + masks.corrupt_fraction < 1:
            break
        helpers = survivors_of(study, sites, sites) - corrupt_sites(study, sites)
        if helpers >= _FEWEST_HELPERS:  # with fewer, no sum is made
            found = min(found, helpers)
    return found


def _least_multiplier(study: Study, head: bool) -> float:
    """Return the noise multiplier with which a site's shares of the whole study cost `privacy.epsilon_alone`."""
    alone = study.privacy.epsilon_alone
    return 0.0 if alone is None else multipliers(study, alone).of(head=head)


def _level_bits(study: Study, sites: int, bits: int, head: bool) -> int:
    """Return the bits left for a deviation of one share of the noise, if all gradients point the same way."""
    helpers = survivors_of(study, sites, sites) - corrupt_sites(study, sites)
    rate = 1.0 if head else study.training.sampling_rate
    units = _MOST_DRAWN * rate * study.aggregation.largest_count * sites
    band = band_in(study, head=head)
    spread = 1.0 if band is None else band.spread(study.total_steps)
    return level_bits(lane_bits(bits, sites), sites, helpers, _multiplier(study, head), units, spread)


def _multiplier(study: Study, head: bool) -> float:
    mechanism = plan(study)
    if mechanism is None or not mechanism.training.shared:
        raise StudyError(
            "privacy.mode: sites add shares of the noise only if it is distributed, found another mode",
            'set mode = "distributed"',
        )
    return mechanism.event(head=head).noise_multiplier
