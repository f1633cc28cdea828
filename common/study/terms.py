"""The terms under which a study runs and its adapter is released: why, by which permit, to whom, and until when.

They are part of the study, so every site that took part has agreed to them, and the digest in the round log covers
them. A permit that has expired stops rounds at both ends. The coordinator gives no file against the terms, and a site's
own software neither receives nor opens one. That binds whoever runs privet as it is: nothing can be taken back from
others.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, date, datetime

from privet.common.errors import RefusedError
from privet.common.study.study import Study

PERMIT = "E_PERMIT", "purpose.permit.expires"
"""Code and rule of a refusal because of a permit."""
PERMIT_ALLOWED = "a permit that has not expired"


def check_until(study: Study, now: datetime) -> None:
    """Check that the released adapter of a study may still be received and used.

    Raises:
        RefusedError: The last day of its terms is over, in UTC.
    """
    terms = study.release
    if terms is not None and terms.until is not None and _over(terms.until, now):
        raise RefusedError(
            f"the terms of study {study.name} allow the use of its adapter until {terms.until} (UTC), which is over",
            "take an adapter of a later study; the sites may agree to new terms with it",
        )


def permit_ended(study: Study, now: datetime) -> bool:
    """Return whether the study has a permit whose last day is over, in UTC."""
    permit = None if study.purpose is None else study.purpose.permit
    return permit is not None and _over(permit.expires, now)


def check_permit(study: Study, now: datetime) -> None:
    """Check that the study's permit, where it has one, still holds.

    Raises:
        RefusedError: Its last day is over, in UTC; with the code that a site's policy gives, too.
    """
    if not permit_ended(study, now):
        return
    error = RefusedError(
        f"the permit of study {study.name} has expired, so no round of it begins: {permit_asked(study)}",
        "ask the body that issued the permit for a new one; then run a study with it, which the sites approve anew",
    )
    error.code, error.rule = PERMIT
    error.asked, error.allowed = permit_asked(study), PERMIT_ALLOWED
    raise error


def permit_asked(study: Study) -> str:
    """Return what a study with a permit asks, in words."""
    permit = None if study.purpose is None else study.purpose.permit
    return "no permit" if permit is None else f"a permit until {permit.expires} (UTC)"


def purpose_text(study: Study) -> str:
    """Return purpose, legal basis, contacts and permit in words; empty where the study states none."""
    found = study.purpose
    if found is None:
        return ""
    permit = ""
    if found.permit is not None:
        granted = _sentence(found.permit.purpose)
        permit = f" Permit {found.permit.number} until {found.permit.expires} (UTC), for: {granted}"
    basis, contacts = _sentence(found.legal_basis), _sentence("; ".join(found.contacts))
    return f"{_sentence(found.text)} Legal basis: {basis} Contacts: {contacts}{permit}"


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _over(day: str, now: datetime) -> bool:
    # Days, and not the midnight after: 9999-12-31, in use for "without end", has none.
    return now.astimezone(UTC).date() > date.fromisoformat(day)


def check_receiver(study: Study, site: str, participants: Collection[str]) -> None:
    """Check that a site may receive the released adapter of a study.

    Args:
        study: The study.
        site: Name of the site.
        participants: Names of the sites that took part: those in the sum of a closed round of the run.

    Raises:
        RefusedError: The terms are for the sites that took part, and this one did not.
    """
    if study.release is not None and study.release.to == "participants" and site not in participants:
        raise RefusedError(
            f"the terms of study {study.name} give its adapter to the sites that took part, and site {site} did not",
            "take part in the next study, or ask the coordinator's operator for one with other terms",
        )


def terms_text(study: Study) -> str:
    """Return the terms in words; empty where the study states none."""
    terms = study.release
    if terms is None:
        return ""
    who = "the sites that took part" if terms.to == "participants" else "every member that may see the study"
    purpose = "" if terms.purpose is None else f", for this purpose: {terms.purpose}"
    until = "" if terms.until is None else f", until {terms.until} (UTC)"
    return f"The adapter is for {who}{purpose}{until}."


def gate_conditions(study: Study) -> list[str]:
    """Return the conditions of a study's gate in words; none where it has no gate."""
    gate = study.gate
    if gate is None:
        return []
    claim = gate.epsilon or study.privacy.epsilon
    return [
        f"{gate.signatures} sites sign it after tests of their own, each for {gate.days} days",
        *([] if study.privacy.epsilon is None else ["the rounds cost no more than the study promises"]),
        *(
            []
            if gate.canaries is None
            else [f"an audit with {gate.canaries} planted canaries or more shows no epsilon above {claim:g}"]
        ),
        *(
            []
            if gate.membership is None
            else [f"membership inference has an AUC of at most {gate.membership:g}, where 0.5 is guessing"]
        ),
        *([] if gate.repeated is None else [f"at most {gate.repeated:.0%} of training answers are repeated"]),
        *([] if gate.metric is None else [f"{gate.metric} is at least {gate.least:g}"]),
    ]


def gate_text(study: Study) -> str:
    """Return the conditions of a study's gate for who approves it; empty where it has none."""
    if study.gate is None:
        return ""
    return (
        f"The adapter leaves only if {'; '.join(gate_conditions(study))}. This site's figures about its records stay "
        "here; whether it signs is seen by all."
    )
