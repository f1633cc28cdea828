"""The parameters of secure aggregation that follow from a study, and the check of a proposal against them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from privet.common.canonical import canonical_json, digest
from privet.common.errors import ProtocolError, RefusedError, StudyError
from privet.common.masking.groups import corrupt_sites, groups_of, survivors_of
from privet.common.masking.noise_shares import bits_of
from privet.common.masking.vector import segments_of, step_segments
from privet.common.secagg import graph
from privet.common.secagg.messages import (
    MAX_DEALT,
    BlockParameters,
    CohortMember,
    DealtParameters,
    Parameters,
    SeveralRounds,
)
from privet.common.secagg.suites import DEFAULT, Suite
from privet.common.secagg.terms import fraction_of
from privet.common.study.adapter import AdapterSpec
from privet.common.study.messages import RoundOpen
from privet.common.study.study import Study


def session_of(study_digest: str) -> bytes:
    """Return the 32 bytes that name the study in secure aggregation.

    They follow from the study, not from the coordinator's run: a site records under this name what it has masked. If
    the coordinator could choose the name, it could make a site mask one update twice.
    """
    return bytes.fromhex(study_digest.removeprefix("sha256:"))


def inputs_of(study_digest: str, round_number: int, adapter_digest: str, sites: int = 0) -> bytes:
    """Return the digest of everything but data that the sites' vectors of a round depend on, 32 bytes.

    The study pins the base model and the training, so its digest covers them. With shared noise, a site's record of a
    release also names the size of the cohort: a share made for many sites is too little noise for fewer.
    """
    document: dict[str, str | int] = {"study": study_digest, "round": round_number, "adapter": adapter_digest}
    if sites:
        document["sites"] = sites
    return bytes.fromhex(digest(canonical_json(document)).removeprefix("sha256:"))


def suite_of(study: Study) -> Suite:
    """Return the key agreement of a study's rounds."""
    named = study.secure_aggregation.suite
    return DEFAULT if named is None else Suite(named)


def parameters_of(study: Study, spec: AdapterSpec, opened: RoundOpen, members: Mapping[str, bytes]) -> Parameters:
    """Return the parameters of secure aggregation for one group of a round.

    Args:
        study: The study.
        spec: Layout of the adapter.
        opened: The round. All corrupt sites of its cohort may be in this group.
        members: Identity key of each site of the group, 32 bytes, by name.

    Raises:
        StudyError: No parameters allow so many corrupt sites among so few.
    """
    sites, corrupt = len(members), corrupt_sites(study, len(opened.cohort))
    head = study.sums_units(opened.round)
    if corrupt > sites - 2:
        raise StudyError(
            f"secure aggregation: a cohort of {sites} sites cannot withstand {corrupt} corrupt sites (they collude "
            "with the coordinator)",
            'gather more sites, lower secure_aggregation.corrupt, or set secure_aggregation.mode = "plain"',
        )
    block = study.secure_aggregation.block
    dropouts = fraction_of(study.secure_aggregation.dropout_fraction, sites) if sites > graph.COMPLETE_UP_TO else 0
    security = study.secure_aggregation.security
    if block is None:
        choice = graph.choose(sites, corrupt, dropouts, security)
    else:
        # All sites of a block mask with each other. Where they share secrets, the threshold is the quorum.
        choice = graph.Choice(0, graph.least_threshold(sites, corrupt, 0, security))
    parameters = Parameters(
        session=session_of(study.digest),
        round=opened.round,
        inputs=inputs_of(study.digest, opened.round, opened.adapter_digest),
        cohort=tuple(CohortMember(name, members[name]) for name in sorted(members)),
        degree=choice.degree,
        threshold=choice.threshold,
        corrupt=corrupt,
        security=security,
        min_survivors=survivors_of(study, sites, len(opened.cohort)),
        bits=bits_of(study, sites, head=head),
        segments=step_segments(study, spec, sites, head=head)
        if study.distributed
        else segments_of(study, spec, head=head),
        suite=suite_of(study),
    )
    if block is None:
        return parameters
    # The sums of a head start have another layout, so its round has a set-up of its own.
    rounds = 1 if head else min(block, study.rounds - opened.round + 1)
    if parameters.min_survivors == sites:
        # A round that one site misses has no sum: then nothing needs to be shared to remove its masks.
        return BlockParameters(**vars(parameters), rounds=rounds)
    return DealtParameters(**vars(parameters), rounds=min(rounds, MAX_DEALT // sites))


def check_step(study: Study, spec: AdapterSpec, opened: RoundOpen, begun: Parameters, declared: int) -> SeveralRounds:
    """Check a later round of a block against the study, and return its parameters, as if a block began with it.

    Args:
        study: The study.
        spec: Layout of the adapter.
        opened: The round.
        begun: What the site accepted when the block began.
        declared: Units that the site declared.

    Raises:
        RefusedError, ProtocolError: As `check_proposal`: the round has another cohort or form than the block.
    """
    members = {member.name: member.identity for member in begun.cohort}
    expected = parameters_of(study, spec, opened, members)
    check_proposal(study, spec, opened, expected, declared)
    if (
        not isinstance(expected, SeveralRounds)
        or not isinstance(begun, SeveralRounds)
        or (replace(expected, round=begun.round, inputs=begun.inputs, rounds=begun.rounds) != begun)
    ):
        raise ProtocolError(
            f"round {opened.round}: its parameters of secure aggregation differ from those of the block that it is in",
            "set up a new block for this round",
        )
    return expected


def check_count(study: Study, declared: int) -> None:
    """Check that a study has room for the units that a site declares.

    Raises:
        RefusedError: The site's count is above the study's largest.
    """
    if declared > study.aggregation.largest_count:
        raise RefusedError(
            f"this site declares {declared} units, the study allows at most {study.aggregation.largest_count} "
            "(aggregation.largest_count)",
            "use fewer units, or agree with the coordinator on a study with a larger aggregation.largest_count",
        )


def check_proposal(study: Study, spec: AdapterSpec, opened: RoundOpen, proposed: Parameters, declared: int) -> None:
    """Check that the coordinator's proposal follows from the study, at a site that declared `declared` units.

    Raises:
        RefusedError: The site's count is above the study's largest, or the study does not allow the cohort.
        ProtocolError: The proposal does not follow from the study.
    """
    check_count(study, declared)
    if len(opened.cohort) < study.cohort.min_sites or list(opened.cohort) != sorted(set(opened.cohort)):
        raise RefusedError(
            f"round {opened.round}: expected a cohort of at least {study.cohort.min_sites} different sites in name "
            f"order (cohort.min_sites), got {len(opened.cohort)} sites",
            "take part in no round of this run until the coordinator explains it",
        )
    strangers = set(opened.cohort) - set(study.cohort.sites)
    if study.cohort.sites and strangers:
        raise RefusedError(
            f"round {opened.round}: the cohort holds {len(strangers)} sites that cohort.sites of the study does not "
            "name",
            "take part in no round of this run until the coordinator explains it",
        )
    members = {member.name: member.identity for member in proposed.cohort}
    if tuple(members) not in groups_of(study, opened.round, opened.cohort):
        raise ProtocolError(
            f"round {opened.round}: the sites that the coordinator proposed for one sum are not a group "
            "of the round's cohort",
            "install the same version of privet at coordinator and sites; if it is the same, take part in no round "
            "of this run",
        )
    if proposed != parameters_of(study, spec, opened, members):
        raise ProtocolError(
            f"round {opened.round}: the proposed parameters of secure aggregation do not follow from the study",
            "install the same version of privet at coordinator and sites; if it is the same, take part in no round "
            "of this run",
        )
