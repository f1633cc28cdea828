"""The history of a log as text: who took part, when, what left each site, and its privacy cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from privet.common.log.note import NoteKey
from privet.common.log.replay import Leaf
from privet.common.log.statements import (
    AdapterState,
    EgressDecision,
    EgressReview,
    Export,
    Genesis,
    Join,
    Refusal,
    Renew,
    Revoke,
    Rotate,
    RoundAbort,
    RoundClose,
    RoundOpened,
    RunOpen,
    SiteRound,
    Statement,
)

_LAST = 253_402_300_799


def story(told: Iterable[tuple[Leaf, Statement]]) -> Iterator[str]:
    """Yield the lines of the history, one or more for each leaf."""
    for leaf, statement in told:
        # The author chose the time. One beyond the year 9999 cannot be formatted, so the last one before is shown.
        when = datetime.fromtimestamp(min(statement.time, _LAST), UTC).strftime("%Y-%m-%d %H:%M:%S")
        first, *rest = _lines(statement)
        yield f"{leaf.index:>6}  {when}  {first}"
        yield from (f"{'':29}{line}" for line in rest)


def _lines(statement: Statement) -> list[str]:
    match statement:
        case Genesis():
            witnesses = len([member for member in statement.members if member.witness is not None])
            return [
                f"consortium {statement.consortium} begins with {', '.join(m.site for m in statement.members)}",
                f"{statement.quorum} of {witnesses} witnesses must cosign; log {NoteKey.parse(statement.log).shown}",
            ]
        case Join():
            return [f"{statement.member.site} joins; {statement.quorum} witnesses must cosign from here on"]
        case Revoke():
            return [f"{statement.site} is revoked: {statement.reason}; {statement.quorum} witnesses must cosign"]
        case Renew():
            return [
                f"{statement.member.site} has an ML-DSA-65 key from here on; each site's operator confirms its words"
            ]
        case Rotate():
            return [
                f"the keys of log and coordinator are replaced; log {NoteKey.parse(statement.log).shown}",
                f"the charter with them is {_short(statement.charter)}; each site's operator confirms its words",
            ]
        case RunOpen():
            return _run(statement)
        case RoundOpened():
            return [
                f"  round {statement.round} opens for {len(statement.cohort)} sites, "
                f"from adapter {_short(statement.adapter)}"
            ]
        case SiteRound():
            return [f"    {statement.site} sends {_short(statement.upload)}{_cost(statement)}"]
        case RoundClose():
            return _close(statement)
        case RoundAbort():
            return [f"  round {statement.round} is aborted: {statement.reason}", *_missing(statement.failures)]
        case Refusal():
            what = f"round {statement.round} of run" if statement.round else "run"
            asked = f" asked {statement.asked}," if statement.asked else ""
            allowed = f" allowed {statement.allowed}" if statement.allowed else ""
            return [
                f"{statement.site} REFUSES {what} {statement.run}: {statement.code} {statement.rule}{asked}{allowed}"
            ]
        case Export():
            return [f"run {statement.run} releases adapter {_short(statement.adapter)} in {len(statement.files)} files"]
        case AdapterState():
            by = "" if statement.by is None else f" by the release of run {statement.by}"
            return [
                f"adapter {_short(statement.adapter)} of run {statement.run} is {statement.state}{by}: "
                f"{statement.reason}"
            ]
        case EgressReview():
            return _review(statement)
        case EgressDecision():
            return _decision(statement)


def _review(statement: EgressReview) -> list[str]:
    which = f"the candidate {_short(statement.adapter)} of run {statement.run}"
    tested = f"tested: {', '.join(statement.tested)}" if statement.tested else "tested nothing"
    if statement.verdict == "signed":
        return [f"{statement.site} signs {which}; {tested}"]
    failed = f"; failed: {', '.join(statement.failed)}" if statement.failed else ""
    return [f"{statement.site} REFUSES {which}: {statement.reason}", f"{tested}{failed}"]


def _decision(statement: EgressDecision) -> list[str]:
    figures = {"epsilon spent": statement.epsilon, "canaries": statement.bound, "quality": statement.quality}
    told = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if value is not None)
    signed = f"signed by {', '.join(statement.signed) or 'nobody'}"
    refused = f", refused by {', '.join(statement.refused)}" if statement.refused else ""
    return [
        f"the candidate {_short(statement.adapter)} of run {statement.run} is {statement.verdict}"
        + (f": {statement.reason}" if statement.reason else ""),
        f"{signed}{refused}{f'; {told}' if told else ''}",
    ]


def _run(statement: RunOpen) -> list[str]:
    privacy = statement.privacy
    promise = "the run promises no privacy"
    if privacy is not None:
        promise = (
            f"epsilon at most {privacy.epsilon:g} at delta {privacy.delta:g} for each {privacy.training.unit}, "
            f"noise multiplier {privacy.training.noise_multiplier:.4g}"
        )
        if privacy.head is not None:
            promise += f", in round 1 (a head start) {privacy.head.noise_multiplier:.4g}"
    gate = statement.gate
    gated = [] if gate is None else [f"its adapter has to pass a gate, which {gate.signatures} sites sign"]
    return [
        f"run {statement.run} begins: {statement.rounds} rounds, {statement.secure_aggregation} updates, "
        f"study {_short(statement.study)}",
        promise,
        *gated,
    ]


def _close(statement: RoundClose) -> list[str]:
    lines = [
        f"  round {statement.round} closes with {len(statement.survivors)} sites, "
        f"adapter {_short(statement.adapter_published)}"
        + ("" if statement.average is None else f" ({statement.average} average of the rounds' adapters)")
    ]
    if statement.metrics:
        lines.append("    " + ", ".join(f"{name} {value:.4g}" for name, value in sorted(statement.metrics.items())))
    if statement.epsilon:
        lines.append(f"    epsilon so far at most {max(statement.epsilon.values()):.4g}")
    return [*lines, *_missing(statement.failures), *(["  the run has ended"] if statement.ended else [])]


def _missing(failures: dict[str, str]) -> list[str]:
    return [f"    missing: {site}: {reason}" for site, reason in sorted(failures.items())]


def _cost(statement: SiteRound) -> str:
    charge = statement.charge
    if charge is None:
        return ""
    limit = "" if charge.limit is None else f" of {charge.limit:g}"
    return f"; its account has spent epsilon {charge.epsilon:.4g}{limit}"


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]
