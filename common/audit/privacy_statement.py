"""The privacy statement of a run: what it guarantees, to whom, by which mechanism, and what it does not cover.

`privacy_document` makes it from the study and the statements of the rounds, and first computes every number in them
again. `privet.common.audit.privacy_text` renders it. Both follow the order of the evaluation pyramid of NIST SP
800-226 (2025): epsilon and the unit first, then the algorithm, then trust, implementation and their basis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from privet.common.canonical import canonical_json, digest
from privet.common.errors import VerificationError
from privet.common.log.agreement import RoundStatement
from privet.common.masking.groups import survivors_of
from privet.common.masking.noise_shares import shared_noise
from privet.common.privacy.accounting import PrivacyEvent, PrivacyPlan, epsilon, plan
from privet.common.study.counts import cells_of
from privet.common.study.study import Study

# Relative difference that another version of an accountant may make.
_TOLERANCE = 1e-6
# Relative difference between two calibrated noise multipliers: each is within 0.1 %.
_CALIBRATION = 2e-3
# exp of it is a float64, and no promise is near it.
_MOST_EXPONENT = 700.0

NOT_COVERED = {
    "tuning": "Settings that were chosen by looking at these data, in earlier runs or by hand.",
    "pre-processing": "Filters, label sets and thresholds fitted to these data; the base model's own training data.",
    "choice of study": "That this study was proposed, agreed to or stopped, if that depended on the data.",
    "declared counts": "The count that each site declares: public by the site's own decision.",
    "failures and timing": "That a site failed, why, and how long it took: statements carry it in clear.",
    "validation split": "Units whose name varies. If one person appears under two names, or under a name that changes, "
    "the name decides whether records are trained on or held out for validation. Epsilon covers each name by itself, "
    "not the person behind all of them.",
    "other studies": "What the same people's data cost in other studies, at other sites or under another ledger. A "
    "site's own ledger adds up what it knows.",
    "facts about groups": "What a model learns about people in general, it also tells about people like them.",
}
"""Risks that the numbers do not cover."""

_WORDED_BEFORE = {
    "validation split": "Units that go by several names, or by names that change: its name decides whether a unit is "
    "held out, and it pays for that side only.",
}
"""Sentences of formats 1 and 2, which auditors still compute byte by byte."""

SIDE_CHANNELS = {
    "timing": "A step takes longer the more units it draws. Whoever measures a site's time or power learns about it.",
    "the site's machine": "Memory, swap, backups and logs are the site's to protect.",
    "errors": "Their texts name rules and shapes, never a record. A gradient that is not finite counts as zero, in "
    "silence.",
}
"""Side channels around the mechanism, and how far they are closed."""


@dataclass(frozen=True)
class Spend:
    """The cost of a run to the units of one site.

    Attributes:
        rounds: Number of rounds that the site was asked into, with aborted ones.
        epsilon: Epsilon by PRV, which is reported.
        rdp: Epsilon by RDP, which is looser and checks it.
    """

    rounds: int
    epsilon: float
    rdp: float


FORMATS = (1, 2, 3)
"""Formats of the document. Format 1 lacks the cost of replacing a unit; its text says that it is twice the epsilon.
Formats 1 and 2 word the risk of the validation split less clearly."""


def privacy_document(
    study: Study, statements: Sequence[RoundStatement], *, simulated: bool = False, form: int = FORMATS[-1]
) -> dict[str, Any]:
    """Return the privacy statement as plain JSON values.

    Args:
        study: The run's study.
        statements: The statements of its rounds, oldest first.
        simulated: Whether the sites were simulated, with noise that everyone can compute.
        form: The format; an older one to verify a statement that was written in it.

    Raises:
        VerificationError: A statement is of another study, or a number in it is wrong.
    """
    mechanism = check_statements(study, statements)
    head = {
        "type": "privacy-statement",
        "format": form,
        "order": "NIST SP 800-226",
        "study": {"name": study.name, "digest": study.digest},
        "run": _run(study, statements),
        "private": mechanism is not None,
        "simulated": simulated,
        "trust": {
            "model": study.privacy.mode,
            "secure_aggregation": study.secure_aggregation.mode,
            "sites_in_league": study.secure_aggregation.corrupt,
            **(_shares(study, mechanism, statements) if mechanism is not None and study.distributed else {}),
        },
        "versions": {name: version(name) for name in ("privet", "opacus", "numpy", "cryptography")},
    }
    if mechanism is None:
        return head
    return {
        **head,
        "epsilon": _costs(mechanism, statements)
        | ({} if form == 1 else {"replacing": _replacing(mechanism, statements)}),
        "unit": {
            "unit": study.privacy.unit,
            "column": study.data.unit if study.privacy.unit == "patient" else None,
            "neighbouring": mechanism.training.document()["neighbouring"],
        },
        "mechanism": _mechanism(study, mechanism),
        "accounting": {"accountant": "prv", "package": "opacus", "version": version("opacus"), "check": "rdp"},
        "randomness": {
            "stream": "AES-256-CTR",
            "key": "public seed" if simulated else "operating system",
            "noise": "discrete Gaussian on a lattice of 2^-40 deviations",
        },
        "side_channels": SIDE_CHANNELS,
        "not_covered": NOT_COVERED | (_WORDED_BEFORE if form < 3 else {}),
    }


def check_statements(study: Study, statements: Sequence[RoundStatement]) -> PrivacyPlan | None:
    """Compute the privacy part of every statement again, and return the mechanism that they state.

    Without statements, the mechanism is the one that follows from the study. It is None if the study is not private.

    Raises:
        VerificationError: A statement is of another study, states a mechanism that does not follow from the study,
            names other sites than those asked, states another epsilon, or exceeds the promise.
    """
    expected = plan(study)
    found = expected
    for index, statement in enumerate(statements):
        where = f"round {statement.get('round')}"
        if statement.get("study") != study.digest:
            raise VerificationError(
                f"{where}: the run has study {study.digest}, but the statement is of study {statement.get('study')}"
            )
        stated = statement.get("privacy")
        if expected is None or stated is None:
            if expected is None and stated is not None:
                raise VerificationError(f"{where}: the statement has a privacy cost, but the study is not private")
            if expected is not None and statement.get("type") == "round-close":
                raise VerificationError(f"{where}: the statement has no privacy cost, but the study is private")
            continue
        found = _stated_plan(where, stated, expected)
        _check_costs(where, stated, found, rounds_by_site(statements[: index + 1]))
        if study.distributed:
            _check_survivors(where, study, statement)
    return found


def rounds_by_site(statements: Sequence[RoundStatement]) -> dict[str, tuple[int, ...]]:
    """Return the numbers of the rounds that each site was asked into. It pays for all: it may have sent its update.

    Raises:
        VerificationError: A statement of a round has no number.
    """
    cohorts = [(_number(statement), set(statement.get("cohort", ()))) for statement in statements]
    sites = sorted(set().union(*(cohort for _, cohort in cohorts)))
    return {site: tuple(number for number, cohort in cohorts if site in cohort) for site in sites}


def _number(statement: RoundStatement) -> int:
    number = statement.get("round")
    if type(number) is not int:
        raise VerificationError(f"a statement must have the number of its round, found {number!r}")
    return number


def spend_by_site(mechanism: PrivacyPlan, statements: Sequence[RoundStatement]) -> dict[str, Spend]:
    """Return the cost of the run to the units of each site."""
    return {
        site: Spend(len(rounds), mechanism.spent(rounds), mechanism.spent(rounds, "rdp"))
        for site, rounds in rounds_by_site(statements).items()
    }


def _stated_plan(where: str, stated: Mapping[str, Any], expected: PrivacyPlan) -> PrivacyPlan:
    """Return the mechanism that a statement states. It must be the study's, up to the precision of calibration."""
    try:
        training, validation = _stated_event(stated["training"]), _stated_event(stated["validation"])
        head = _stated_event(stated.get("head"))
        terms = stated["delta"], stated["target"], stated["accountant"], stated["unit"]
    except (KeyError, TypeError, ValueError) as error:
        raise VerificationError(
            f"{where}: the field privacy of the statement is malformed ({type(error).__name__})"
        ) from None
    same = terms == (expected.delta, expected.target, "prv", expected.training.unit)
    pairs = (training, expected.training), (validation, expected.validation), (head, expected.head)
    if not (same and all(_alike(*pair) for pair in pairs)):
        raise VerificationError(
            f"{where}: the statement has another mechanism (noise, sampling rate, steps, delta) than the study gives",
            "compare it with the output of `privet check STUDY`",
        )
    return replace(expected, training=training or expected.training, validation=validation, head=head)


def _stated_event(document: Mapping[str, Any] | None) -> PrivacyEvent | None:
    return None if document is None else PrivacyEvent.parse(document)


def _alike(found: PrivacyEvent | None, expected: PrivacyEvent | None) -> bool:
    if found is None or expected is None:
        return found is expected
    same = replace(found, noise_multiplier=expected.noise_multiplier) == expected
    return same and math.isclose(found.noise_multiplier, expected.noise_multiplier, rel_tol=_CALIBRATION)


def _check_costs(
    where: str, stated: Mapping[str, Any], mechanism: PrivacyPlan, rounds: Mapping[str, Sequence[int]]
) -> None:
    costs = stated.get("epsilon")
    if not isinstance(costs, Mapping) or set(costs) != set(rounds):
        raise VerificationError(
            f"{where}: the statement must have the epsilon of exactly these sites: {', '.join(rounds)}"
        )
    for site, numbers in rounds.items():
        found, expected, count = costs[site], mechanism.spent(numbers), len(numbers)
        number = isinstance(found, int | float)
        if not number or not math.isclose(found, expected, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
            raise VerificationError(
                f"{where}: site {site} spent epsilon {expected} in {count} rounds, but the statement says {found}"
            )
        if not expected <= mechanism.target * (1 + _TOLERANCE):
            raise VerificationError(
                f"{where}: site {site} spent epsilon {expected}, but the study allows at most {mechanism.target}"
            )


def _run(study: Study, statements: Sequence[RoundStatement]) -> dict[str, Any]:
    kinds = [statement.get("type") for statement in statements]
    return {
        "rounds_planned": study.rounds,
        "rounds_closed": kinds.count("round-close"),
        "rounds_aborted": kinds.count("round-abort"),
        "statements": digest(canonical_json({"statements": [dict(statement) for statement in statements]})),
    }


def _costs(mechanism: PrivacyPlan, statements: Sequence[RoundStatement]) -> dict[str, Any]:
    spent = spend_by_site(mechanism, statements)
    everywhere = [
        event for rounds in rounds_by_site(statements).values() for side in mechanism.sides(rounds) for event in side
    ]
    return {
        "target": mechanism.target,
        "delta": mechanism.delta,
        "run": max((each.epsilon for each in spent.values()), default=0.0),
        # With shared noise, the gradients of a unit at several sites enter one sum. That is one release with a larger
        # sensitivity, not a composition of releases.
        "at_every_site": None if mechanism.training.shared else epsilon(everywhere, mechanism.delta),
        "sites": {
            site: {"rounds": each.rounds, "epsilon": each.epsilon, "epsilon_rdp": each.rdp}
            for site, each in spent.items()
        },
    }


def _replacing(mechanism: PrivacyPlan, statements: Sequence[RoundStatement]) -> dict[str, Any]:
    """Return the guarantee for data sets that differ by replacing one unit of one site.

    It has a pair of epsilon and delta by group privacy, and an epsilon at the statement's own delta. What exceeds 1, or
    is infinite, promises nothing and is None.
    """
    rounds = max(rounds_by_site(statements).values(), key=mechanism.spent, default=())
    one = mechanism.spent(rounds)
    delta = (1 + math.exp(min(one, _MOST_EXPONENT))) * mechanism.delta if rounds else mechanism.delta
    same = mechanism.replacing(rounds)
    return {
        "epsilon": 2 * one if math.isfinite(one) and delta < 1 else None,
        "delta": delta if math.isfinite(one) and delta < 1 else None,
        "epsilon_at_same_delta": same if math.isfinite(same) else None,
    }


def _shares(study: Study, mechanism: PrivacyPlan, statements: Sequence[RoundStatement]) -> dict[str, Any]:
    """Return how sites shared the noise, by size of the cohort, and the epsilon of one site's own shares.

    That epsilon is the largest over all sites; None if it is infinite.
    """
    cohorts = [statement["cohort"] for statement in statements]
    sizes = sorted({len(cohort) for cohort in cohorts}) or [study.cohort.min_sites]
    shares = {size: shared_noise(study, size, head=not study.training.rounds) for size in sizes}
    own = 0.0
    for site, numbers in rounds_by_site(statements).items():
        events = [_own(study, mechanism, statement) for statement in statements if site in statement["cohort"]]
        if mechanism.training.band > 1:  # one multiplier in all rounds that train
            trains = [event for event in events if event.band > 1]
            counted = mechanism.training.counted_rounds(mechanism.trained(numbers))
            events = [event for event in events if event.band == 1] + trains[:1] * counted
        own = max(own, epsilon(events, mechanism.delta))
    return {
        "own_share_epsilon": own if math.isfinite(own) else None,
        "shares": [
            {"sites": size, "survivors": each.survivors, "corrupt": each.corrupt, "helpers": each.helpers}
            for size, each in shares.items()
        ],
    }


def _own(study: Study, mechanism: PrivacyPlan, statement: RoundStatement) -> PrivacyEvent:
    """Return what one site's share in a round is worth alone."""
    head = study.sums_units(statement["round"])
    share = shared_noise(study, len(statement["cohort"]), head=head)
    return replace(mechanism.event(head=head), noise_multiplier=share.own_multiplier)


def _check_survivors(where: str, study: Study, statement: RoundStatement) -> None:
    """Check that the sum of a closed step had the number of sites for which its noise is accounted."""
    asked, stayed = len(statement.get("cohort", ())), len(statement.get("survivors", ()))
    least = survivors_of(study, asked, asked)
    if statement.get("type") == "round-close" and stayed < least:
        raise VerificationError(
            f"{where}: {stayed} of {asked} sites are in the sum, but at least {least} are needed for enough noise"
        )


def _counts(study: Study) -> dict[str, Any]:
    cells = cells_of(study)
    return {"kind": study.kind, "cells": list(cells.titles.values()), "bound": cells.bound, "scale": cells.scale}


def _mechanism(study: Study, mechanism: PrivacyPlan) -> dict[str, Any]:
    privacy = study.privacy
    clipping = {"kind": privacy.clipping, "norm": privacy.clip_norm}
    if privacy.clipping == "automatic":
        clipping["stability"] = privacy.stability
    if privacy.head_clip_share is not None:
        clipping["head_share"] = privacy.head_clip_share
    if privacy.clipping == "adaptive":
        clipping |= {"quantile": privacy.quantile, "rate": privacy.quantile_rate, "share": privacy.quantile_share}
    validation = mechanism.validation
    return {
        "sampling": "poisson",
        "records_per_unit_and_step": privacy.max_records_per_unit if privacy.unit == "patient" else 1,
        "clipping": clipping,
        "training_per_round": mechanism.training.document(),
        "validation_per_round": None if validation is None else validation.document(),
        **({} if not study.counts else {"counts": _counts(study)}),
        **({} if not study.training.starts_head else {"head_start": mechanism.event(head=True).document()}),
    }
