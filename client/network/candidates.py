"""A candidate at a site: fetched for tests, and the site's signed review of it.

It is kept apart from the adapters that the site received, and has no egress decision among its files, so it is opened
for tests alone (`privet.common.audit.egress`). Which adapter is the candidate stands in the round log, which this site
replays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privet.client.bases.names import keep_bases
from privet.client.network.adapters import Ask, Tell, arriving, fetch, study_of
from privet.client.network.proposals import NewestLog
from privet.client.site import SiteConfig
from privet.common.audit.release import ADAPTER, STUDY
from privet.common.canonical import canonical_json, digest
from privet.common.errors import ProtocolError, RefusedError, StateError, VerificationError
from privet.common.files import write_durably
from privet.common.log.encoding import parse_statement
from privet.common.log.envelope import SALT_BYTES, Envelope, commit, sign_envelope
from privet.common.log.gate import DAY, Gate
from privet.common.log.replay import LoggedRun, Replay
from privet.common.log.statements import EgressReview
from privet.common.study.adapter import Adapter, read_layout
from privet.common.study.terms import check_until

if TYPE_CHECKING:
    from privet.client.release.candidate import Outcome  # it loads models

FOLDER = "candidates"
"""Directory of candidates, beside the site file: one directory for each run."""
MARK, TEST = "candidate.json", "test.json"
_REVIEW = ".review.json"
_COMMITTED = "egress-test"


@dataclass(frozen=True)
class Waiting:
    """A run with a candidate that this site may review.

    Attributes:
        run: The run, as the log has it.
        gate: Its gate.
        adapter: Digest of the candidate.
    """

    run: LoggedRun
    gate: Gate
    adapter: str

    @property
    def name(self) -> str:
        """The run's name."""
        return self.run.statement.run


def waiting(history: Replay, site: str, time: datetime) -> tuple[Waiting, ...]:
    """Return the candidates that wait at their gates and that a site may review, newest first."""
    found = []
    for run in reversed(history.runs.values()):
        gate = run.gate
        if gate is None or gate.candidate is None or gate.exported or site not in gate.answered:
            continue
        if gate.state(int(time.timestamp())) in ("candidate", "expired"):
            found.append(Waiting(run, gate, gate.candidate))
    return tuple(found)


def waiting_as(history: Replay, site: str, name: str, time: datetime) -> Waiting:
    """Return the candidate of a run.

    Raises:
        StateError: There is none that this site may review.
    """
    found = [each for each in waiting(history, site, time) if each.name == name]
    if found:
        return found[0]
    run = history.runs.get(name)
    why = "the log has no such run" if run is None else "its study has no gate"
    if run is not None and run.gate is not None:
        taken = site in run.gate.answered
        state = "released" if run.gate.exported else run.gate.state(int(time.timestamp()))
        why = f"it is {state}" if taken else "this site took no part in it"
    raise StateError(
        f"run {name} has no candidate for this site to review: {why}", "list what there is: `privet site adapters SITE`"
    )


def fetch_candidate(site: SiteConfig, folder: Path, found: Waiting, ask: Ask, time: datetime, tell: Tell) -> Path:
    """Fetch a candidate for tests, verify it, and keep it. One that is here already is verified again.

    Args:
        site: The site.
        folder: Where the site keeps candidates.
        found: The candidate.
        ask: Gives parts of files.
        time: The present time.
        tell: Hears how far it is.

    Returns:
        Its directory.

    Raises:
        RefusedError: The coordinator does not give it to this site, or the terms of its study have ended.
        VerificationError: A file is not what the log says.
        ProtocolError: The coordinator cannot be reached, or answers in another form. StateError: The disk is full.
    """
    target = folder / found.name
    if not target.is_dir():
        folder.mkdir(mode=0o700, exist_ok=True)
        with arriving(target) as staging:
            fetch(staging / STUDY, found.name, STUDY, ask, tell)
            study = study_of(staging, found.run)
            check_until(study, time)
            # Nothing else: the log has the digests of these two alone, and a test reads no other file.
            fetch(staging / ADAPTER, found.name, ADAPTER, ask, tell)
            _check(staging, found)
            keep_bases(staging, {name: at for name, at in site.resources.bases.items() if name == study.model.base})
            mark = {"run": found.name, "study": study.digest, "adapter": found.adapter, "state": "candidate"}
            (staging / MARK).write_bytes(canonical_json(mark) + b"\n")
    _check(target, found)
    return target


def _check(folder: Path, found: Waiting) -> None:
    study_of(folder, found.run)  # its thresholds decide about the test
    try:
        data = (folder / ADAPTER).read_bytes()
    except OSError as error:
        raise StateError(
            f"{folder / ADAPTER} cannot be read ({error.strerror})", f"remove {folder}, and try again"
        ) from None
    if digest(data) != found.adapter:
        raise VerificationError(
            f"run {found.name}: the round log has the candidate {found.adapter}, but this file has {digest(data)}",
            f"remove {folder}, and try again; if that does not help, sign nothing and ask the coordinator's operator",
        )
    Adapter.read(read_layout(data), data).check_finite("the candidate")


def keep_test(folder: Path, found: Waiting, outcome: Outcome) -> None:
    """Keep the figures of a test with a fresh salt, readable by the owner alone, before anything is signed of them."""
    document = {
        "adapter": found.adapter,
        "salt": os.urandom(SALT_BYTES).hex(),
        "tested": list(outcome.tested),
        "failed": list(outcome.failed),
        "canaries": None if outcome.canaries is None else outcome.canaries.model_dump(mode="json"),
        "figures": outcome.figures,
    }
    write_durably(folder / TEST, canonical_json(document) + b"\n", mode=0o600)


def kept_test(folder: Path, found: Waiting) -> Mapping[str, Any] | None:
    """Return the kept test of a candidate; None if there is none of this adapter."""
    try:
        document: dict[str, Any] = json.loads((folder / TEST).read_bytes())
    except (OSError, ValueError):
        return None
    return document if document.get("adapter") == found.adapter else None


def signature(site: SiteConfig, folder: Path, found: Waiting, time: datetime) -> EgressReview:
    """Return the site's signature of a candidate.

    Raises:
        RefusedError: It has no test of all conditions, or the test failed.
    """
    test, lacking = kept_test(folder, found), set(found.gate.tests)
    if test is None or lacking - set(test["tested"]):
        what = ", ".join(sorted(lacking - set(test["tested"] if test else ()))) or "this candidate"
        raise RefusedError(
            f"run {found.name}: this site has not tested {what}", "test it first: `privet gate test SITE RUN`"
        )
    if test["failed"]:
        raise RefusedError(
            f"run {found.name}: the candidate failed this site's test of {', '.join(test['failed'])}",
            "refuse it: `privet gate refuse SITE RUN --reason REASON`",
        )
    return _review(site, found, test, time, "signed", "")


def refusal(site: SiteConfig, folder: Path, found: Waiting, reason: str, time: datetime) -> EgressReview:
    """Return the site's refusal of a candidate, with the conditions that its test found broken, if it made one.

    Raises:
        ValueError: The reason has other characters than printable ASCII, is too long, or there is none.
    """
    return _review(site, found, kept_test(folder, found), time, "refused", reason)


def _review(
    site: SiteConfig, found: Waiting, test: Mapping[str, Any] | None, time: datetime, verdict: str, reason: str
) -> EgressReview:
    now = int(time.timestamp())
    named = test is not None and bool(test["tested"])
    return EgressReview.model_validate_json(
        canonical_json(
            {
                "time": now,
                "site": site.name,
                "run": found.name,
                "study": found.run.statement.study,
                "adapter": found.adapter,
                "verdict": verdict,
                "tested": test["tested"] if test else [],
                "failed": test["failed"] if test else [],
                "canaries": test["canaries"] if test else None,
                "test": commit(_COMMITTED, test["figures"], bytes.fromhex(test["salt"])) if test and named else None,
                "reason": reason,
                "expires": now + found.gate.terms.days * DAY,
            }
        )
    )


def signed(site: SiteConfig, log: NewestLog, review: EgressReview) -> bytes:
    """Return a review as a leaf, signed with the site's keys, after the rules of the log have admitted it.

    Raises:
        StateError: The site file names no identity key.
        RefusedError: The rules do not allow it, as where the site has spoken already.
    """
    gate = log.history.runs[review.run].gate
    key = site.identity_key()
    if key is None or gate is None:
        raise StateError("the site file names no identity key", "complete the set-up: `privet site setup SITE`")
    try:
        gate.review(review)
    except VerificationError as error:
        raise RefusedError(error.message, "see where the candidate is: `privet site adapters SITE`") from None
    return sign_envelope(review, key, site.mldsa_key())


def keep_signed(folder: Path, review: EgressReview, leaf: bytes) -> None:
    """Keep a signed review beside the candidate, before it is sent: it proves what the site said.

    With it stays the test that it commits to, as a later test has another salt.
    """
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    kept = folder.with_name(f"{review.run}.{review.verdict}")
    if review.test is not None:
        write_durably(kept.with_name(f"{kept.name}.{TEST}"), (folder / TEST).read_bytes(), mode=0o600)
    write_durably(kept.with_name(f"{kept.name}{_REVIEW}"), leaf, mode=0o600)


def omitted(history: Replay, folder: Path) -> tuple[str, ...]:
    """Return the runs that were decided about in a log that lacks what this site said of their candidates.

    Raises:
        StateError: A kept review cannot be read.
    """
    found = []
    for path in sorted(folder.glob(f"*{_REVIEW}")):
        try:
            review = parse_statement(Envelope.decode(path.read_bytes()).payload)
        except (OSError, ProtocolError) as error:
            raise StateError(f"{path} cannot be read ({type(error).__name__})", "restore it from a backup") from None
        run = history.runs.get(review.run) if isinstance(review, EgressReview) else None
        if run is None or run.gate is None or run.gate.decision is None or not isinstance(review, EgressReview):
            continue
        logged = run.gate.reviews.get(review.site)
        # A signature that was taken back is followed by the refusal.
        if logged != review and not (logged is not None and logged.time > review.time):
            found.append(review.run)
    return tuple(dict.fromkeys(found))
