"""The groups in which a cohort is summed, how many of its sites may be corrupt, and how many must survive."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from privet.common.privacy.noise import SeededRandomness
from privet.common.secagg.terms import fraction_of, least_survivors
from privet.common.study.study import Study

_SMALLEST_COHORT_IN_GROUPS, _SMALLEST_GROUP = 30, 5


def corrupt_sites(study: Study, sites: int) -> int:
    """Return c: how many of `sites` may collude with the coordinator."""
    section = study.secure_aggregation
    return max(section.corrupt, fraction_of(section.corrupt_fraction, sites))


def groups_of(study: Study, round_number: int, cohort: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the groups in which a round's cohort is summed, each in name order.

    The study's seed and the round determine how sites are assigned, so the coordinator cannot choose a group. A
    group holds at least five sites, and at least three more than may be corrupt. A cohort below 30 sites, or too
    small for three groups, is one group.
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
    """Return the smallest number of sites that a study may sum in one group, whatever its cohort."""
    if study.secure_aggregation.groups < 3:
        return study.cohort.min_sites
    least = max(_SMALLEST_GROUP, corrupt_sites(study, max(study.cohort.min_sites, _SMALLEST_COHORT_IN_GROUPS)) + 3)
    return min(study.cohort.min_sites, least)


def survivors_of(study: Study, sites: int, cohort: int) -> int:
    """Return the least number of survivors of a group of `sites` sites in a cohort of `cohort` sites.

    Args:
        study: The study.
        sites: Size of the group; that of the cohort if there is one group.
        cohort: Size of the round's cohort.
    """
    least = least_survivors(sites, corrupt_sites(study, cohort))
    if sites == cohort:
        least = max(least, min(study.cohort.min_sites, sites))  # `min_sites` is of the round; a group is smaller
    if study.distributed:
        # The noise of a step is accounted for this many shares. A sum of fewer sites would have too little.
        section = study.privacy
        least = max(least, sites - max(section.dropouts, fraction_of(section.dropout_fraction, sites)))
    return least
