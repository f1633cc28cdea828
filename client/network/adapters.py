"""The adapters that a consortium released: listed from the round log, received, and followed until they are revoked.

Nothing is believed because the coordinator says it. Which adapters there are, the digest of each file and what became
of them stand in the round log, which this site replays from its first leaf. A file is kept if it has its digest, and
all files together if the release's signature covers them, the study is the one that the run was opened for, and a
quorum has cosigned the leaf that exports them. What was received needs no coordinator from then on.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from privet.client.bases.names import keep_bases
from privet.client.network.proposals import NewestLog
from privet.client.policy.rules import judge_adapter, load_policy
from privet.client.release.received import RECEIVED, Received, check_received, keep_received, read_received
from privet.client.rounds.history import policy_of
from privet.client.site import SiteConfig
from privet.client.trust import read_trusted
from privet.common.audit.egress import check_kept, check_logged, check_origin
from privet.common.audit.release import ADAPTER, FILES, KEY, SIGNATURE, STUDY, verify_digests
from privet.common.errors import ProtocolError, RefusedError, StateError, VerificationError
from privet.common.files import staged, sync_directory, sync_files
from privet.common.log.checkpoint import Checkpoint, LeafProof, verify_leaf
from privet.common.log.encoding import parse_statement
from privet.common.log.envelope import Envelope
from privet.common.log.note import parse_note
from privet.common.log.replay import STATES, LoggedRun, Released, Replay
from privet.common.log.statements import AdapterState, Export
from privet.common.study.adapter import Adapter, read_layout
from privet.common.study.study import Study, kept_study
from privet.common.study.terms import check_receiver, check_until

FOLDER = "adapters"
"""Directory of received adapters, beside the site file: one directory for each run."""
PROOF, LEAF = "export.tlog-proof", "export.leaf"
_MOST_SMALL, _MOST_ADAPTER = 1 << 26, 1 << 34
_DAMAGED = "do not use these files, and ask the coordinator's operator to explain the difference"
Tell = Callable[[str, int, int], None]
"""Called with what is done, the number of bytes that have arrived, and their number in all."""
Ask = Callable[[str, str, int], tuple[bytes, int]]
"""From the name of a run, that of a file and a number of bytes to the part after these, and the size of the whole."""


class Source(Protocol):
    """The consortium service, as far as this needs it (`privet.client.network.consortium.ConsortiumClient`)."""

    def accepted(self) -> bytes:
        """Return the newest checkpoint that a quorum cosigned."""

    def leaves(self, first: int) -> list[bytes]:
        """Return leaves from a number on."""

    def inclusion(self, index: int, size: int) -> tuple[bytes, ...]:
        """Return the proof that a leaf is in the log."""

    def released(self, run: str, file: str, first: int) -> tuple[bytes, int]:
        """Return a part of a released file, and the size of the whole."""


@dataclass(frozen=True)
class Offered:
    """An adapter that a run of the consortium released.

    Attributes:
        run: The run, as the log has it.
        released: Its last release.
        own: Whether this site's records are in it: the site answered a round of the run.
        kept: What the site knows of it; None if it has not received it.
    """

    run: LoggedRun
    released: Released
    own: bool
    kept: Received | None

    @property
    def name(self) -> str:
        """The run's name."""
        return self.run.statement.run


def offered(history: Replay, site: str, folder: Path) -> tuple[Offered, ...]:
    """Return what the runs of the log released, newest first. Raises StateError as `read_received`."""
    found = [
        Offered(
            run,
            run.releases[-1],
            any(site in each.answered for each in run.rounds.values()),
            read_received(folder / name),
        )
        for name, run in history.runs.items()
        if run.releases
    ]
    return tuple(sorted(found, key=lambda each: -each.released.index))


def follow(history: Replay, folder: Path) -> tuple[Received, ...]:
    """Bring what the site knows of its received adapters up to the log, and return those that changed.

    Raises:
        StateError: A file cannot be read or written. All others were brought up to the log.
    """
    changed, unreadable = list[Received](), None
    for path in sorted(folder.glob(f"*/{RECEIVED}")):
        try:
            kept = read_received(path.parent)
        except StateError as error:  # its adapter is refused; the others may be revoked
            unreadable = unreadable or error
            continue
        run = None if kept is None else history.runs.get(kept.run)
        if kept is None or run is None:
            continue
        changes = [each.change for each in run.releases if each.statement.adapter == kept.adapter]
        change = changes[-1] if changes else None
        # A state never goes back, also where the coordinator shows a log that no quorum has cosigned yet.
        if change is None or STATES.index(change.state) <= STATES.index(kept.state):
            continue
        now = _changed(kept, change)
        keep_received(path.parent, now)
        changed.append(now)
    if unreadable is not None:
        raise unreadable
    return tuple(changed)


def receive(
    site: SiteConfig, folder: Path, name: str, log: NewestLog, source: Source, time: datetime, tell: Tell
) -> Path:
    """Fetch what a run released, verify it, and keep it. Nothing is kept of what fails.

    Args:
        site: The site.
        folder: Where the site keeps adapters.
        name: Name of the run.
        log: The round log, replayed.
        source: Gives the files.
        time: The present time.
        tell: Hears how far it is.

    Returns:
        The directory of the adapter.

    Raises:
        StateError: The log has no release of such a run, the adapter is here already, or the disk is full.
        RefusedError: It was revoked or retired, the coordinator does not give it to this site, or this site's policy,
            the terms of the release or the gate of its study do not admit it.
        VerificationError: A file is not what the log says, or a quorum has not cosigned the release yet.
        ProtocolError: The coordinator cannot be reached, or answers in another form.
    """
    run = log.history.runs.get(name)
    if run is not None:
        check_logged(run, int(time.timestamp()))
    if run is None or not run.releases:
        raise StateError(
            f"the round log has no release of a run {name}", "list what there is: `privet site adapters SITE`"
        )
    # A run without a gate may have been said to have made it, before the run that did was closed.
    check_origin(log.history, run.releases[-1].statement.adapter)
    released, target = run.releases[-1], folder / name
    if released.state in ("retired", "revoked"):
        reason = "" if released.change is None else released.change.reason
        raise RefusedError(
            f"run {name}: its adapter is {released.state}: {reason}",
            "list the adapters that are in use: `privet site adapters SITE`",
        )
    export = released.statement
    with arriving(target) as staging:
        # No file that a release does not have: this directory has files that only the site writes, and that say whether
        # the adapter may be used, and where its base is.
        wanted = [file for file in export.files if file in FILES]
        for file in sorted(wanted, key=lambda each: each != STUDY):  # the study's terms decide about the rest
            fetched = fetch(staging / file, name, file, source.released, tell)
            if f"sha256:{fetched}" != export.files[file]:
                raise VerificationError(
                    f"run {name}: the round log exports {file} with digest {export.files[file]}, but the file that the "
                    f"coordinator gives has sha256:{fetched}",
                    _DAMAGED,
                )
            if file == STUDY:
                _check_admitted(site, study_of(staging, run), run, time)
        study = _verified(staging, run, export)
        check_kept(study, export.adapter, staging)
        _prove(staging, site, log, released, source)
        keep_bases(staging, {base: path for base, path in site.resources.bases.items() if base == study.model.base})
        keep_received(staging, _received(released, log.history, time))
    return target


def adapter_at(folder: Path, name: str) -> Path:
    """Return the directory of a received adapter that may be used.

    Raises:
        StateError: It was not received.
        RefusedError, VerificationError: It was revoked, or changed since (`check_received`).
    """
    path = folder / name
    if not (path / RECEIVED).is_file():
        raise StateError(
            f"this site has not received the adapter of run {name}",
            f"receive it with `privet site get SITE {name}`",
        )
    with (path / ADAPTER).open("rb") as file:
        check_received(path, f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}")
    return path


def _received(released: Released, history: Replay, time: datetime) -> Received:
    export, change = released.statement, released.change
    if history.genesis is None:  # a release comes after it
        raise VerificationError("the round log has no genesis", _DAMAGED)
    found = Received(
        consortium=history.genesis.consortium,
        run=export.run,
        round=export.round,
        adapter=export.adapter,
        leaf=released.index,
        time=int(time.timestamp()),
    )
    return found if change is None else _changed(found, change)


def _changed(received: Received, change: AdapterState) -> Received:
    return received.model_copy(update={"state": change.state, "by": change.by, "reason": change.reason})


def fetch(path: Path, run: str, file: str, ask: Ask, tell: Tell) -> str:
    """Fetch a file of a run, and return its SHA-256 in hexadecimal. The memory that it takes is that of one part."""
    hashed, taken, size = hashlib.sha256(), 0, None
    with path.open("xb") as target:
        while size is None or taken < size:
            part, whole = ask(run, file, taken)
            if size is None:
                size = whole
                _check_room(path, run, file, size)
            if whole != size or (not part and taken < size) or taken + len(part) > size:
                raise ProtocolError(
                    f"run {run}: the coordinator's answers about the file {file} contradict each other",
                    f"run the command again: `privet site get SITE {run}`",
                )
            target.write(part)
            hashed.update(part)
            taken += len(part)
            tell(f"fetching {file}", taken, size)
    return hashed.hexdigest()


def _check_room(path: Path, run: str, file: str, size: int) -> None:
    most = _MOST_ADAPTER if file == ADAPTER else _MOST_SMALL
    if size > most:
        raise ProtocolError(
            f"run {run}: the coordinator says that {file} has {size} bytes, more than the {most} that such a file may "
            "have",
            _DAMAGED,
        )
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise StateError(
            f"run {run}: {file} has {size} bytes, but the disk of {path.parent.parent} has room for {free}",
            "make room there, and run the command again",
        )


def _verified(folder: Path, run: LoggedRun, export: Export) -> Study:
    """Check the files of a release against each other and against the log, and return the study.

    Args:
        folder: Where they are, with the digests that the log exports.
        run: The run, as the log has it.
        export: The release, as the log has it.

    Raises:
        VerificationError: They do not fit.
    """
    if export.files.get(ADAPTER) != export.adapter:
        raise VerificationError(
            f"run {run.statement.run}: the round log exports another adapter than the file {ADAPTER}", _DAMAGED
        )
    study = study_of(folder, run)
    try:
        public, signed = (folder / KEY).read_bytes(), (folder / SIGNATURE).read_bytes()
        data = (folder / ADAPTER).read_bytes()
    except OSError as error:
        raise _lacking(run, error) from None
    signed_over = {name: each.removeprefix("sha256:") for name, each in export.files.items() if name != SIGNATURE}
    verify_digests(signed_over, public, signed, study.name)
    Adapter.read(read_layout(data), data).check_finite("the released adapter")
    return study


def study_of(folder: Path, run: LoggedRun) -> Study:
    """Return the study of a release, which must be the one that the run was opened for."""
    try:
        study = kept_study(folder / STUDY)
    except (OSError, ValueError, AttributeError) as error:
        raise _lacking(run, error) from None
    if study.digest != run.statement.study:
        raise VerificationError(
            f"run {run.statement.run} was opened for study {run.statement.study}, but the release has study "
            f"{study.digest}",
            _DAMAGED,
        )
    return study


def _lacking(run: LoggedRun, error: Exception) -> VerificationError:
    return VerificationError(
        f"run {run.statement.run}: the release lacks a file, or its study is none ({type(error).__name__})",
        "ask the coordinator's operator for a release of a newer version of privet",
    )


def _check_admitted(site: SiteConfig, study: Study, run: LoggedRun, time: datetime) -> None:
    """Check that the terms of a release and this site's policy admit receiving it. Raises RefusedError."""
    participants = {each for opened in run.rounds.values() for each in opened.survivors}
    check_until(study, time)
    check_receiver(study, site.name, participants)
    if site.policy is None:
        return
    findings = judge_adapter(load_policy(site.policy), study, own=site.name in participants)
    if findings:
        reasons = "; ".join(
            f"{each.code}: {each.rule}: found {each.asked}, allowed {each.allowed}" for each in findings
        )
        raise RefusedError(
            f"the policy of site {site.name} does not admit the adapter of run {run.statement.run}: {reasons}",
            f"if this site wants it, change the table [adapters] in {site.policy.name}",
        )


def _prove(folder: Path, site: SiteConfig, log: NewestLog, released: Released, source: Source) -> None:
    """Check that a quorum cosigned the leaf of a release, and keep the proof for an auditor.

    Raises:
        VerificationError: It has not, or the leaf is another one.
    """
    note = source.accepted()
    size = Checkpoint.parse(parse_note(note).text).size if note else 0
    if released.index >= size or site.trusted is None:
        raise VerificationError(
            f"run {released.statement.run}: a quorum of members has not cosigned the release yet",
            "try again when the coordinator has finished the run",
        )
    leaf = next(iter(source.leaves(released.index)), b"")
    proof = LeafProof(released.index, source.inclusion(released.index, size), note)
    verify_leaf(proof, leaf, policy_of(log.history, read_trusted(site.trusted), site.name, size))
    if parse_statement(Envelope.decode(leaf).payload) != released.statement:
        raise VerificationError(
            f"run {released.statement.run}: the coordinator proves another leaf than the release", _DAMAGED
        )
    (folder / PROOF).write_bytes(proof.encode())
    (folder / LEAF).write_bytes(leaf)


@contextmanager
def arriving(target: Path) -> Iterator[Path]:
    """Yield a new directory that takes the name `target`, durably, when the block ends without error."""
    again = f"use it, or move it away first: `mv {target} {target}.old`"
    try:
        with staged(target, again) as staging:
            staging.chmod(0o700)
            yield staging
            sync_files(staging)
        sync_directory(target.parent)
    except OSError as error:
        raise StateError(
            f"{target} cannot be written ({error.strerror})", "check the disk space and the permissions"
        ) from None
