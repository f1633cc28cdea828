"""The groups in which a cohort is summed, how many of its sites may be corrupt, and how many must survive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from privet.common.errors import TooFewSitesError
from privet.common.privacy.noise import SeededRandomness
from privet.common.secagg.graph import quorum
from privet.common.secagg.messages import MAX_SITES
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
    count = _count(study, len(names))
    if count == 1:
        return [tuple(names)]
    draws = SeededRandomness(study.seed, "groups", round_number).uniform(len(names))
    order = [names[index] for index in np.argsort(draws, kind="stable")]
    return [tuple(sorted(order[number::count])) for number in range(count)]


def _count(study: Study, sites: int) -> int:
    """Return the number of groups of a cohort of so many sites."""
    least = max(_SMALLEST_GROUP, corrupt_sites(study, sites) + 3)
    count = min(study.secure_aggregation.groups, sites // least)
    return 1 if count < 3 or sites < _SMALLEST_COHORT_IN_GROUPS else count


def smallest_groups(study: Study) -> Iterator[tuple[int, int]]:
    """Yield the size of the smallest group and that of its cohort, for each size of a cohort that a study admits.

    A cohort has any number of sites from `cohort.min_sites` up: sites may stay away, be drawn by lot, or be left out
    for spoiling sums. Of larger cohorts that are one group, only the smallest is named.
    """
    asked = study.secure_aggregation
    least, most = study.cohort.min_sites, len(study.cohort.sites) or MAX_SITES
    if asked.mode != "masked" or asked.groups < 3 or least < _SMALLEST_COHORT_IN_GROUPS:
        yield least, least
    if asked.mode != "masked" or asked.groups < 3:
        return
    for sites in range(max(least, _SMALLEST_COHORT_IN_GROUPS), max(least, most) + 1):
        yield sites // _count(study, sites), sites


def quorums_meet(study: Study) -> bool:
    """Return whether any two quorums, of any two cohorts of a study, share an honest site.

    A site answers for its live round alone. So if they do, the sites in a sum are settled before a later round's sum
    can be revealed. A study that does not name its sites admits cohorts without a common site.
    """
    most = len(study.cohort.sites)
    sizes = range(min(study.cohort.min_sites, most), most + 1)
    least = min(quorum(sites, corrupt_sites(study, sites)) for sites in sizes)
    return bool(most) and 2 * least > most + corrupt_sites(study, most)


def smallest_sum(study: Study) -> int:
    """Return the least number of sites whose updates a study may sum, whatever its cohort and whoever drops out.

    `cohort.min_sites` bounds the sites of a round. A group of them holds fewer, and some of these may drop out.
    """
    if study.secure_aggregation.mode != "masked":
        return study.cohort.min_sites
    return min(survivors_of(study, sites, cohort) for sites, cohort in smallest_groups(study))


def check_columns(study: Study, sites: Collection[str], corrupt: int, round_number: int) -> None:
    """Check that each rank that a site of a sum has is the rank of enough of them.

    Zeros are known to be zeros, so the sum of column j is over the sites of a rank above j, and the difference of two
    columns is over those of the ranks between, where the gradients of both columns are alike. They are where the
    layer's inputs have one direction in common, or where the adapter that the coordinator sent has equal rows of A. So
    the sites of each rank have to be as many as a whole sum needs, or a mask would hide what the study shows.

    Args:
        study: The study.
        sites: Those of one sum: of a group, or its survivors.
        corrupt: How many of them may collude with the coordinator.
        round_number: The round; a sum over units has no columns.

    Raises:
        TooFewSitesError: Fewer have one of the ranks.
    """
    if not study.lora.site_ranks or study.sums_units(round_number):
        return
    needed = max(smallest_sum(study), corrupt + 2)
    found = Counter(study.rank_at(site) for site in sites)
    rank, fewest = min(found.items(), key=lambda each: (each[1], -each[0]))
    if fewest < needed:
        raise TooFewSitesError(
            f"round {round_number}: {fewest} of {len(sites)} sites train {rank} columns of B, and a difference of "
            f"columns can be a sum over these alone; a sum that hides each of them needs {needed}",
            f"wait for more sites of rank {rank}; or give each rank in lora.site_ranks and lora.rank of a new study to "
            f"{needed} sites or more",
        )


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
