"""What the site's approvers decided about studies: statements that each signed with a key of their own.

The site file names approvers and their public keys. The private key of each is a file that only a passphrase opens, so
that neither a session of the console nor a process of the site can approve. Each decision is one line, a DSSE envelope,
of a file beside that of the approvals; the keys are there as well. The newest decision of an approver about a study
replaces the earlier ones. Each one is dated after the earlier ones of its approver about its study, whatever the clock
says: a refusal counts also where an approval came from a clock that was ahead, or from the same second.

A study is approved if as many approvers as the policy asks for approve it, none of these approvals has expired, and
nobody's newest decision refuses it. What a line cannot prove counts for nothing: it stops the site with an error.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from privet.client.site import SiteConfig
from privet.common.errors import PrivetError, StateError
from privet.common.files import write_durably
from privet.common.log.envelope import PAYLOAD_TYPE, Envelope
from privet.common.log.statements import Digest
from privet.common.pki.keyfile import public_key, read_locked_key, write_locked_key
from privet.common.signed import sign_document
from privet.common.study.reading import validate
from privet.common.study.sections import NAME_PATTERN, Name, Section
from privet.common.study.study import Study

MOST_REASON = 500
"""Most characters of a reason."""
Seconds = Annotated[int, Field(ge=0, lt=2**53)]


class Decision(Section):
    """What one approver decided about one study."""

    type: Literal["study-decision"] = "study-decision"
    format: Literal[1] = 1
    site: Name
    study: Digest
    name: Name
    """The study's name, for readers."""
    by: Name
    """The approver."""
    decision: Literal["approve", "refuse"]
    reason: Annotated[str, Field(max_length=MOST_REASON)]
    """In the approver's words; may be empty where a study is approved."""
    time: Seconds
    until: Seconds | None
    """When an approval ends, in Unix seconds; None: not before the study does."""


def decide(
    site: SiteConfig,
    study: Study,
    by: str,
    passphrase: bytes,
    decision: Literal["approve", "refuse"],
    *,
    reason: str = "",
    until: datetime | None = None,
    now: datetime,
) -> Decision:
    """Sign a decision with an approver's key, and keep it. Durable on return.

    Args:
        site: The site file.
        study: The study.
        by: The approver's name.
        passphrase: Opens the approver's key.
        decision: What is decided.
        reason: Why. A refusal needs one.
        until: When an approval ends.
        now: The time.

    Raises:
        StateError: The site has no such approver, the passphrase or the key is wrong, the reason is missing or too
            long, or the file cannot be read or written.
    """
    reason = " ".join(reason.split())
    if decision == "refuse" and not reason:
        raise StateError("a refusal needs a reason", "say in a few words why the study is refused")
    if len(reason) > MOST_REASON:
        raise StateError(f"the reason has more than {MOST_REASON} characters", "say it in fewer words")
    if until is not None and until <= now:
        raise StateError("the approval would end before it begins", "choose a later day")
    key = approver_key(site, by, passphrase)
    made = Decision(
        site=site.name,
        study=study.digest,
        name=study.name,
        by=by,
        decision=decision,
        reason=reason,
        time=int(now.timestamp()),
        until=None if until is None else int(until.timestamp()),
    )
    return _append(site, made, key)


def end_of(day: date) -> datetime:
    """Return the end of an approval's last day (UTC). Raises StateError: There is no day after it."""
    try:
        return datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(days=1)
    except OverflowError:
        raise StateError(f"the last day {day:%Y-%m-%d} is too late", "choose an earlier day") from None


def approver_key(site: SiteConfig, by: str, passphrase: bytes) -> Ed25519PrivateKey:
    """Return an approver's key. Raises as `decide`."""
    if by not in site.approvers:
        raise StateError(
            f"this site has no approver {by!r}; its approvers are {', '.join(site.approvers) or 'none'}",
            "add one with `privet site approver SITE NAME`",
        )
    key = read_locked_key(_folder(site) / f"{by}.pem", passphrase, f"the key of approver {by}")
    if public_key(key) != site.approvers[by]:
        raise StateError(
            f"the key of approver {by} is not the one that the site file names",
            "restore key or site file from a backup",
        )
    return key


def make_approver(site: SiteConfig, by: str, passphrase: bytes) -> str:
    """Make an approver's key, encrypted under a passphrase, and return its public key.

    Raises:
        StateError: The name is none, there is a key of this name already, or its file cannot be written.
    """
    if not re.fullmatch(NAME_PATTERN, by):
        raise StateError(
            f"expected 1 to 63 lower-case letters, digits and dashes as a name, found {by!r}", "choose such a name"
        )
    folder = _folder(site)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = folder / f"{by}.pem"
    if file.exists():
        raise StateError(
            f"{file} is there, but the site file names no approver {by}: it is a former approver's key, or a command "
            "ended early",
            f"choose another name; or remove {file}, with which nobody can sign any more then, and try again",
        )
    key = Ed25519PrivateKey.generate()
    write_locked_key(file, key, passphrase)
    return public_key(key)


def decisions(site: SiteConfig) -> tuple[Decision, ...]:
    """Return all decisions of this site's present approvers, in the order in which they were made.

    Raises:
        StateError: Other users may write the file, or a line is not a decision that its approver signed.
    """
    path = _file(site)
    if not path.exists():
        return ()
    if path.stat().st_mode & 0o022:
        raise StateError(f"other users of this machine can write to {path}", f"run `chmod go-w {path}`")
    names = {bytes.fromhex(key): name for name, key in site.approvers.items()}
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            envelope = Envelope.decode(line)
            envelope.check(b"")
            made = validate(Decision, json.loads(envelope.payload), what="decision")
        except (PrivetError, ValueError):
            raise StateError(
                f"{path}: line {number} is not a signed decision about a study",
                "restore the file from a backup; or delete the line, and let its approver decide anew",
            ) from None
        # The key says who signed. One that was removed from the site file counts no more.
        if made.site == site.name and names.get(envelope.key) == made.by:
            found.append(made)
    return tuple(found)


def newest(found: Sequence[Decision], study: str) -> dict[str, Decision]:
    """Return the newest decision of each approver about a study."""
    return {each.by: each for each in sorted(found, key=lambda each: each.time) if each.study == study}


def admitted(found: Sequence[Decision], persons: int, now: datetime) -> frozenset[str]:
    """Return the studies that `persons` approvers or more approve at a time, and none refuses."""
    studies = set()
    for study in {each.study for each in found} - declined(found):
        valid = [each for each in newest(found, study).values() if each.until is None or now.timestamp() < each.until]
        if len(valid) >= persons:
            studies.add(study)
    return frozenset(studies)


def declined(found: Sequence[Decision]) -> frozenset[str]:
    """Return the studies that an approver's newest decision refuses."""
    studies = {each.study for each in found}
    return frozenset(
        study for study in studies if any(each.decision == "refuse" for each in newest(found, study).values())
    )


def needs_signature(site: SiteConfig) -> StateError:
    """Return the error where somebody would approve without a signature."""
    return StateError(
        f"the site file of {site.name} names approvers, so a decision needs the signature of one of them",
        f"add --as NAME to the command; the approvers are {', '.join(site.approvers)}",
    )


def _append(site: SiteConfig, made: Decision, key: Ed25519PrivateKey) -> Decision:
    """Sign a decision and add it. Return it, with a time that is later than those of the approver's earlier ones."""
    path = _file(site)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        earlier = newest(decisions(site), made.study).get(made.by)
        if earlier is not None and made.time <= earlier.time:
            made = made.model_copy(update={"time": earlier.time + 1})
        before = path.read_bytes() if path.exists() else b""
        # The whole file, replaced in one step: a process that is killed here has decided, or it has not.
        write_durably(path, before + sign_document(made.model_dump(mode="json"), PAYLOAD_TYPE, key), 0o600)
    return made


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _file(site: SiteConfig) -> Path:
    if site.approvals is None:
        raise StateError(
            f"the site file of {site.name} names no file in which to record approvals",
            "set `approvals` in the site file to a path",
        )
    return site.approvals.with_name(f"{site.approvals.name}.signed")


def _folder(site: SiteConfig) -> Path:
    return _file(site).with_name("approvers")
