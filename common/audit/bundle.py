"""A bundle: one archive of a run for an auditor, with the whole round log and the files whose digests it holds.

It is an uncompressed tar of plain files::

    bundle.json                     the name of the run
    checkpoint, tile/...            the log as C2SP tlog-tiles
    study.json, software.json       the documents that `run-open` names by digest
    rounds/0001.json ...            the run's statements, of which `round-close` and `round-abort` are extracts
    release/...                     the files that `export` names by digest; the weights only on demand
    proofs/....tlog-proof           single leaves with their proofs, for tools that check one leaf

`check_bundle` first verifies the log alone (`privet.common.audit.verify`), and then all other files against it.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privet.common.audit.privacy_statement import FORMATS, privacy_document
from privet.common.audit.privacy_text import privacy_markdown
from privet.common.audit.release import ADAPTER, PRIVACY, verify_files
from privet.common.audit.verify import Verdict, verify_bundle
from privet.common.canonical import canonical_json, digest
from privet.common.errors import PrivetError, ProtocolError, StateError, VerificationError
from privet.common.log.agreement import follows, round_ended
from privet.common.log.checkpoint import Checkpoint, Policy, open_checkpoint
from privet.common.log.encoding import one_line
from privet.common.log.replay import Leaf, Replay
from privet.common.log.statements import Export, RoundAbort, RoundClose, RoundOpened, RunOpen, SiteRound, Statement
from privet.common.log.tiles import read_leaf_hashes, read_leaves
from privet.common.study.study import Study

MANIFEST, CHECKPOINT, STUDY, SOFTWARE = "bundle.json", "checkpoint", "study.json", "software.json"
ROUNDS, RELEASE, PROOFS = "rounds/", "release/", "proofs/"
# What the order of additions can change in a number, relative to it, with a wide margin.
_ROUNDING = 1e-9
MAX_FILES = 200_000
MAX_BUNDLE_BYTES = 2**31

Files = Mapping[str, bytes]
Told = list[tuple[Leaf, Statement]]


@dataclass(frozen=True)
class Report:
    """The result of checking a bundle.

    Attributes:
        verdict: The verdict on the log alone.
        reason: What is wrong outside the log; empty if nothing is.
        where: The file or directory that is wrong.
        checked: What was checked against the log, one sentence each.
    """

    verdict: Verdict
    reason: str = ""
    where: str = ""
    checked: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return self.verdict.ok and not self.reason

    def __str__(self) -> str:
        if self.ok:
            return "\n".join([str(self.verdict), *(f"checked: {line}" for line in self.checked)])
        return str(self.verdict) if not self.verdict.ok else f"FAILED at {self.where}: {self.reason}"


@dataclass
class _Run:
    """The statements of a log about one run.

    Attributes:
        opened: Its `run-open`.
        rounds: Hash and statement of each `round-open`, by nonce.
        ends: `round-close` or `round-abort` of each round, by the hash of its `round-open`.
        ledgers: For each `site-round`, whether it names a ledger. A simulated site has none.
        export: The last `export`.
    """

    opened: RunOpen
    rounds: dict[str, tuple[str, RoundOpened]] = field(default_factory=dict)
    ends: dict[str, RoundClose | RoundAbort] = field(default_factory=dict)
    ledgers: list[bool] = field(default_factory=list)
    export: Export | None = None


def write_archive(path: Path, files: Files) -> None:
    """Write an archive. The same files always give the same bytes.

    Raises:
        StateError: `path` exists already, or cannot be written.
    """
    try:
        with path.open("xb") as target, tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for name, data in sorted(files.items()):
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(data), 0o644
                archive.addfile(entry, io.BytesIO(data))
    except OSError as error:
        raise StateError(
            f"{path} cannot be written ({error.strerror})", "choose a new file in a directory that you may write to"
        ) from None


def read_archive(path: Path) -> dict[str, bytes]:
    """Read an archive, or a directory of the same files, into memory. Nothing is unpacked.

    Raises:
        StateError: It cannot be read, or is not an archive.
        ProtocolError: It holds anything but plain files with plain names, holds a name twice, or is too large.
    """
    try:
        found = dict[str, bytes]()
        total = 0
        for name, data in _directory(path) if path.is_dir() else _tar(path):
            total += len(data)
            # Names are not used as paths here. But an auditor may unpack the archive with another tool, so no name may
            # lead out of its directory. The limits keep a hostile archive from filling the memory.
            plain = name and not name.startswith("/") and ".." not in name.split("/") and name.isprintable()
            if not plain or name in found or len(found) >= MAX_FILES or total > MAX_BUNDLE_BYTES:
                raise ProtocolError(
                    f"bundle: {name[:100]!r}: its name is no plain relative path or appears twice, or the bundle "
                    f"has more than {MAX_FILES} files or {MAX_BUNDLE_BYTES} bytes"
                )
            found[name] = data
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:  # `tarfile` reads numbers in headers with int()
        raise StateError(
            f"{path} is not a bundle ({type(error).__name__})",
            "name a file that `privet audit bundle RUN --out FILE` wrote, or the directory of a published log",
        ) from None
    return found


def _tar(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path, mode="r:") as archive:
        for entry in archive:
            plain = entry.isreg() and not entry.issparse() and entry.size <= MAX_BUNDLE_BYTES
            data = archive.extractfile(entry) if plain else None
            if data is None:
                raise ProtocolError(
                    f"bundle: {entry.name[:100]!r} is not a plain file of at most {MAX_BUNDLE_BYTES} bytes"
                )
            yield entry.name, data.read()


def _directory(path: Path) -> Iterator[tuple[str, bytes]]:
    for file in sorted(path.rglob("*")):
        if file.is_file() and not file.is_symlink():
            yield file.relative_to(path).as_posix(), file.read_bytes()


def head_of(files: Files, policy: Policy) -> Checkpoint:
    """Return the bundle's checkpoint. Cosignatures are not checked.

    Raises:
        ProtocolError, VerificationError: The checkpoint is missing, or the log did not sign it.
    """
    return open_checkpoint(_fetch(files, CHECKPOINT), policy.log)[0]


def leaves_of(files: Files, size: int) -> Iterator[bytes]:
    """Yield the leaves of a bundle's log. Raises as `read_leaves`."""
    return read_leaves(size, lambda name: _fetch(files, name))


def check_bundle(files: Files, policy: Policy) -> Report:
    """Verify a bundle: first its log, then all other files against the log.

    Any error in between, also an unforeseen one, makes the bundle fail. It never passes by an error.
    """
    runs: dict[str, _Run] = {}
    try:
        size = head_of(files, policy).size
    except PrivetError as error:
        return Report(Verdict(error.message))
    verdict = verify_bundle(
        lambda: leaves_of(files, size),
        files[CHECKPOINT],
        policy,
        lambda: read_leaf_hashes(size, lambda name: _fetch(files, name)),
        lambda leaf, statement: _note(runs, leaf, statement),
    )
    where = MANIFEST
    checked = []
    if not verdict.ok or all(_is_log(name) for name in files):
        return Report(verdict)
    try:
        run = runs[_read(files, MANIFEST)["run"]]
        for part, check in _CHECKS.items():
            where = part
            checked.append(check(files, run))
    except PrivetError as error:
        return Report(verdict, one_line(error.message), where)  # the message may quote a file
    except Exception as error:  # as in `verify_bundle`: a file that cannot be read fails
        return Report(verdict, f"cannot be read ({type(error).__name__})", where)
    return Report(verdict, checked=tuple(line for line in checked if line))


def _note(runs: dict[str, _Run], leaf: Leaf, statement: Statement) -> None:
    """Keep the statements against which the other files of a bundle are checked."""
    if isinstance(statement, RunOpen):
        runs[statement.run] = _Run(statement)
    elif isinstance(statement, RoundClose | RoundAbort):
        runs[statement.run].ends[statement.opened] = statement
    elif isinstance(statement, Export):
        runs[statement.run].export = statement
    elif isinstance(statement, RoundOpened):
        runs[statement.run].rounds[statement.nonce] = leaf.hash, statement
    elif isinstance(statement, SiteRound):
        runs[statement.run].ledgers.append(statement.ledger is not None)


def _check_study(files: Files, run: _Run) -> str:
    study = _study(files)
    if not follows(run.opened, study):
        raise VerificationError(
            f"run {run.opened.run} was opened with study {run.opened.study}, but the bundle's {STUDY} has digest "
            f"{study.digest}, or other privacy terms than the log"
        )
    return f"the study is the one for which run {run.opened.run} was opened"


def _check_software(files: Files, run: _Run) -> str:
    found = digest(_fetch(files, SOFTWARE))
    if found != run.opened.software:
        raise VerificationError(
            f"run {run.opened.run} was opened with software {run.opened.software}, but the bundle's {SOFTWARE} has "
            f"{found}"
        )
    return "the coordinator's software is the one in the log"


def _check_rounds(files: Files, run: _Run) -> str:
    """Check that each end of a round in the log is an extract of one statement of the run, and the other way round."""
    statements = _statements(files)
    held = dict(run.ends)
    for statement in statements:
        opened, stated = run.rounds.get(statement["nonce"], ("", None))
        end = held.pop(opened, None)
        if end is None or stated is None:
            raise VerificationError(
                f"round {statement['round']}: the log has no round-close or round-abort for the bundle's statement"
            )
        if list(stated.cohort) != statement["cohort"]:  # the privacy cost of each site follows from it
            raise VerificationError(
                f"round {statement['round']}: the bundle's statement has another cohort than the log's round-open"
            )
        ended = isinstance(end, RoundClose) and end.ended
        if round_ended(run.opened.run, opened, statement, ended, end.time) != end:
            raise VerificationError(
                f"round {statement['round']}: the bundle's statement differs from the log's {end.type}"
            )
    # A plain round that was aborted is opened again. Its abort is in the log, but not among the run's statements.
    if any(isinstance(end, RoundClose) or run.opened.secure_aggregation == "masked" for end in held.values()):
        raise VerificationError(
            f"the log has {len(held)} ended rounds of which {ROUNDS} in the bundle has no statement"
        )
    return f"the statements of {len(statements)} rounds agree with the log"


def _check_release(files: Files, run: _Run) -> str:
    """Check the released files: their digests in the log, the signature, and the privacy statement by computing it."""
    released = {name.removeprefix(RELEASE): data for name, data in files.items() if name.startswith(RELEASE)}
    if run.export is None:
        if released:
            raise VerificationError(
                f"the bundle has released files in {RELEASE}, but the log has no export statement of the run"
            )
        return ""
    for name, expected in run.export.files.items():
        if name not in released and name != ADAPTER:
            raise VerificationError(
                f"{name}: the log's export statement lists this file, but the bundle does not have it"
            )
        if name in released and digest(released.pop(name)) != expected:
            raise VerificationError(f"{name}: the file's digest differs from the one in the log's export statement")
    if released:
        raise VerificationError(f"{next(iter(released))}: the log's export statement does not list this file")
    if run.export.files.get(ADAPTER) != run.export.adapter:
        raise VerificationError(
            f"{ADAPTER}: the log's export statement lists digest {run.export.files.get(ADAPTER)} for this file, but "
            f"its round published the adapter {run.export.adapter}"
        )
    said = _check_privacy(files, run)
    whole = {name.removeprefix(RELEASE): data for name, data in files.items() if name.startswith(RELEASE)}
    if ADAPTER not in whole:
        return f"the release is the one that the log exports (weights not included: {run.export.files[ADAPTER]}){said}"
    verify_files(whole, _study(files).name)
    return f"the release is the one that the log exports, and its signature matches{said}"


def _check_privacy(files: Files, run: _Run) -> str:
    """Check the privacy statement and its text by computing both. Versions are the coordinator's own claims.

    Returns:
        A remark on a statement of an earlier format, which is verified in that format; else the empty string.
    """
    stated = _read(files, f"{RELEASE}{PRIVACY}.json")
    form = stated.get("format")
    if form not in FORMATS or type(form) is not int:
        raise VerificationError(
            f"{PRIVACY}.json: its format must be one of {', '.join(map(str, FORMATS))}, found {form!r}",
            "verify the bundle with the version of privet that wrote it, or a newer one",
        )
    document = privacy_document(_study(files), _statements(files), simulated=not any(run.ledgers), form=form)
    document["versions"] = {name: stated["versions"][name] for name in document["versions"]}
    if "accounting" in document:
        document["accounting"]["version"] = stated["accounting"]["version"]
    if not _agree(document, stated):
        raise VerificationError(
            f"{PRIVACY}.json: its content differs from what the study and the statements of the rounds give"
        )
    if _fetch(files, f"{RELEASE}{PRIVACY}.md") != privacy_markdown(_restated(document, stated)).encode():
        raise VerificationError(f"{PRIVACY}.md: its text differs from what {PRIVACY}.json gives")
    if form == 1 and document["private"]:
        return "; its privacy statement has the first format, whose text understates the cost of replacing a unit"
    return ""


def _agree(computed: Any, stated: Any) -> bool:
    """Whether a stated JSON value is the computed one, but for the rounding of what was computed as a float.

    Integers are exact: a count that is nearly right is a lie. JSON writes 8.0 as 8, so either stands for a float. The
    accountant adds up on as many threads as a machine has, and the order of additions decides the last bits: an
    auditor's machine must not find fault with another machine's rounding.
    """
    if isinstance(computed, dict) and isinstance(stated, dict):
        return computed.keys() == stated.keys() and all(_agree(computed[key], stated[key]) for key in computed)
    if isinstance(computed, list | tuple) and isinstance(stated, list):
        return len(computed) == len(stated) and all(map(_agree, computed, stated))
    if isinstance(computed, float):
        return type(stated) in (int, float) and math.isclose(computed, stated, rel_tol=_ROUNDING)
    return type(computed) is type(stated) and bool(computed == stated)


def _restated(computed: Any, stated: Any) -> Any:
    """Return a computed document with the numbers of the stated one, with which it agrees."""
    if isinstance(computed, dict):
        return {key: _restated(value, stated[key]) for key, value in computed.items()}
    if isinstance(computed, list | tuple):
        return [_restated(value, other) for value, other in zip(computed, stated, strict=True)]
    return float(stated) if isinstance(computed, float) else computed


_CHECKS: dict[str, Callable[[Files, _Run], str]] = {
    STUDY: _check_study,
    SOFTWARE: _check_software,
    ROUNDS: _check_rounds,
    RELEASE: _check_release,
}


def _study(files: Files) -> Study:
    return Study.parse(_read(files, STUDY))


def _statements(files: Files) -> list[dict[str, Any]]:
    names = sorted(name for name in files if name.startswith(ROUNDS))
    return [_read(files, name) for name in names]


def _is_log(name: str) -> bool:
    return name == CHECKPOINT or name.startswith("tile/")


def _read(files: Files, name: str) -> dict[str, Any]:
    """Read a JSON object in canonical form: two readers could understand another form differently."""
    data = _fetch(files, name)
    document: dict[str, Any] = json.loads(data)
    if canonical_json(document) != data.removesuffix(b"\n"):
        raise VerificationError(f"{name} is not canonical JSON (keys sorted, no surplus spaces)")
    return document


def _fetch(files: Files, name: str) -> bytes:
    if name not in files:
        raise VerificationError(f"{name} is missing in the bundle")
    return files[name]


def history_of(files: Files, policy: Policy) -> tuple[Verdict, Told]:
    """Verify a bundle's log alone. Return the verdict, and the leaves up to the first wrong one."""
    told: Told = []
    try:
        size = head_of(files, policy).size
    except PrivetError as error:
        return Verdict(error.message, history=Replay()), told
    verdict = verify_bundle(
        lambda: leaves_of(files, size),
        files[CHECKPOINT],
        policy,
        observe=lambda leaf, statement: told.append((leaf, statement)),
    )
    return verdict, told
