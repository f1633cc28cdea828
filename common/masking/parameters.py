"""The parameters of secure aggregation that follow from a study, and the check that a proposal has no others."""

from __future__ import annotations

from collections.abc import Mapping

from privet.common.canonical import canonical_json, digest
from privet.common.errors import ProtocolError, RefusedError, StudyError
from privet.common.masking.groups import corrupt_sites, groups_of, survivors_of
from privet.common.masking.noise_shares import bits_of
from privet.common.masking.vector import segments_of, step_segments
from privet.common.secagg import graph
from privet.common.secagg.messages import CohortMember, Parameters
from privet.common.secagg.terms import fraction_of
from privet.common.study.adapter import AdapterSpec
from privet.common.study.messages import RoundOpen
from privet.common.study.study import Study


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
    dropouts = fraction_of(study.secure_aggregation.dropout_fraction, sites) if sites > graph.COMPLETE_UP_TO else 0
    choice = graph.choose(sites, corrupt, dropouts, study.secure_aggregation.security)
    return Parameters(
        session=session_of(study.digest),
        round=opened.round,
        inputs=inputs_of(study.digest, opened.round, opened.adapter_digest),
        cohort=tuple(CohortMember(name, members[name]) for name in sorted(members)),
        degree=choice.degree,
        threshold=choice.threshold,
        corrupt=corrupt,
        security=study.secure_aggregation.security,
        min_survivors=survivors_of(study, sites, len(opened.cohort)),
        bits=bits_of(study, sites),
        segments=step_segments(study, spec, sites) if study.distributed else segments_of(study, spec),
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
