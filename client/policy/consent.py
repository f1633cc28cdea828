"""The site's verdict on a study, from its policy, its approvals and the studies that have begun.

An approval is a line of a file that the site owns: the study's digest, the time of approval, and the study's name. Only
the digest counts. A line that begins with "refused" says no, and the last line about a study counts. Where the site
file names approvers, it is a statement that one of them signed instead (`privet.client.policy.decisions`). Policy and
approvals are read again for each verdict, so a change applies from the next message on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from privet.client.policy.decisions import admitted, decisions, declined, needs_signature
from privet.client.policy.rules import DAY, MOST_LOST, Facts, SitePolicy, judge, load_policy, refuse
from privet.client.site import SiteConfig
from privet.common.canonical import canonical_json, digest
from privet.common.errors import Finding, StateError
from privet.common.files import write_durably
from privet.common.study.study import Study

Began = Callable[[], Mapping[str, datetime]]
"""Returns the time when each study began at this site, by its digest."""

_LINE = re.compile(r"(refused )?(sha256:[0-9a-f]{64}) \S+ [a-z0-9-]+(?(1) .*)")


def check_policy(site: SiteConfig, study: Study, began: Began, upload_bytes: int | None = None) -> None:
    """Check that a site consents to a study, or to an upload of `upload_bytes` for it.

    Raises:
        PolicyError: It does not; the error holds every finding of the policy.
        StudyError, StateError: The policy or the list of approvals cannot be read or trusted.
    """
    # Whoever sends studies must not choose what an answer costs: no noise is calibrated for one that is refused.
    policy, findings = verdict(site, study, began, upload_bytes, thorough=False)
    if findings:
        raise refuse(site.name, study, policy, findings)


def check_lost(site: SiteConfig, study: Study, lost: int) -> None:
    """Check that a site pays for another round of a study whose last rounds led to nothing.

    Args:
        site: The site file.
        study: The study.
        lost: Number of rounds in a row that this site has paid for since the adapter changed last.

    Raises:
        PolicyError: Its policy allows no more of them.
        StudyError, StateError: The policy cannot be read or trusted.
    """
    if site.policy is None:
        return
    policy = load_policy(site.policy)
    most = policy.limits.max_lost_rounds or MOST_LOST
    if lost >= most:
        finding = Finding(
            "E_LOST_ROUNDS", "limits.max_lost_rounds", f"round {lost + 1} in a row without a result", f"{most} of them"
        )
        raise refuse(site.name, study, _digest(site, policy), (finding,))


def verdict(
    site: SiteConfig, study: Study, began: Began, upload_bytes: int | None = None, *, thorough: bool = True
) -> tuple[str, tuple[Finding, ...]]:
    """Return the digest of the site's rules, and the findings of its policy against a study now, as `judge` does.

    Raises:
        StudyError, StateError: The policy or the list of approvals cannot be read or trusted.
    """
    if site.policy is None:
        nothing = Finding("E_NO_POLICY", "policy", "any study", "no study: the site file names no policy")
        return policy_digest(site), (nothing,)
    # Read for each verdict and not cached: an operator who tightens the policy stops the next message.
    policy, now = load_policy(site.policy), datetime.now(UTC)
    people = standing(site, policy.persons)
    facts = Facts(
        now=now,
        approved=study.digest in people.approved,
        declared=site.declared_count,
        began_before=began_before(began(), study.digest, now),
        upload_bytes=upload_bytes,
        patient_column=site.patient_column,
        floor=site.floor.terms(),
        site=site.name,
        refused=study.digest in people.refused,
    )
    return _digest(site, policy), judge(policy, study, facts, thorough=thorough)


def policy_digest(site: SiteConfig) -> str:
    """Return the digest of a site's rules for its statements: policy, limit, floor, and who its patients are.

    Raises:
        StudyError, StateError: The policy cannot be read or trusted.
    """
    return _digest(site, None if site.policy is None else load_policy(site.policy))


def _digest(site: SiteConfig, policy: SitePolicy | None) -> str:
    rules = site.model_dump(mode="json", include={"limit", "floor"})
    # Left out where unset: the digest of an older site file stays as it was.
    rules |= site.model_dump(mode="json", include={"patient_column", "patient_ids"}, exclude_none=True)
    stated = None if policy is None else policy.model_dump(mode="json")
    if stated is not None and stated["limits"]["max_lost_rounds"] is None:
        del stated["limits"]["max_lost_rounds"]
    return digest(canonical_json({**rules, "policy": stated}))


def began_before(began: Mapping[str, datetime], study: str, now: datetime) -> tuple[datetime, ...]:
    """Return when other studies began in the 24 hours before this one began, or before now; in order."""
    # From this study's own start: a later study must not make a running one exceed its limit.
    start = began.get(study, now)
    return tuple(sorted(time for other, time in began.items() if other != study and start - DAY < time <= start))


class Standing(NamedTuple):
    """What people at a site decided, by the digests of studies."""

    approved: frozenset[str]
    refused: frozenset[str]


def approved(site: SiteConfig, persons: int = 1) -> frozenset[str]:
    """Return the digests of the studies that people at the site approved. Arguments and errors as `standing`."""
    return standing(site, persons).approved


def standing(site: SiteConfig, persons: int = 1) -> Standing:
    """Return the studies that people at the site approved, and those that they refused and have not approved since.

    Where the site file names approvers, what they signed counts and nothing else.

    Args:
        site: The site file.
        persons: How many people have to approve a study.

    Raises:
        StateError: A line of the file is not an approval, or other users of this machine may write the file.
    """
    if site.approvers:
        made = decisions(site)
        return Standing(admitted(made, persons, datetime.now(UTC)), declined(made))
    said = _lines(site)
    refused = frozenset(study for study, approves in said.items() if not approves)
    # One file cannot tell one person from another.
    return Standing(frozenset(said) - refused if persons == 1 else frozenset(), refused)


def _lines(site: SiteConfig) -> dict[str, bool]:
    """Return whether each study is approved, by the last line about it."""
    path = site.approvals
    if path is None or not path.exists():
        return {}
    if path.stat().st_mode & 0o022:
        raise StateError(
            f"other users of this machine can write to the approvals file {path}", f"run `chmod go-w {path}`"
        )
    matches = [_LINE.fullmatch(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if None in matches:
        raise StateError(
            f"approvals file {path}: line {matches.index(None) + 1} is not an approval (digest, time and name of a "
            "study)",
            "delete the line, then approve the study with `privet site approve SITE STUDY`",
        )
    return {match[2]: match[1] is None for match in matches if match is not None}


def record_approval(site: SiteConfig, study: Study, now: datetime) -> None:
    """Record that a person at the site has read a study and approves it. Durable on return.

    Raises:
        StateError: The site file names no file for approvals, or the file cannot be read; or it names approvers, whose
            signature it takes (`privet.client.policy.decisions`).
    """
    path, said = _file(site), _lines(site)
    if not said.get(study.digest, False):
        _add(path, f"{study.digest} {_second(now)} {study.name}")


def record_refusal(site: SiteConfig, study: Study, reason: str, now: datetime) -> None:
    """Record that a person at the site has refused a study, and why. It ends an earlier approval. Durable on return.

    Raises:
        StateError: As `record_approval`.
    """
    path, _ = _file(site), _lines(site)  # nothing is added to a file that cannot be read
    said = "".join(each if each.isprintable() else " " for each in reason)
    _add(path, f"refused {study.digest} {_second(now)} {study.name} {said}")


def _file(site: SiteConfig) -> Path:
    """Return the file of a site without approvers. Raises `StateError` as `record_approval`."""
    if site.approvals is None:
        raise StateError(
            f"the site file of {site.name} names no file in which to record approvals",
            "set `approvals` in the site file to a path",
        )
    if site.approvers:
        raise needs_signature(site)
    return site.approvals


def _second(now: datetime) -> str:
    return now.astimezone(UTC).isoformat(timespec="seconds")


def _add(path: Path, line: str) -> None:
    before = path.read_bytes() if path.exists() else b""
    write_durably(path, before + line.encode() + b"\n", 0o600)
