"""A bundle: one archive of a run for an auditor, with the whole round log and the files whose digests it holds.

It is an uncompressed tar of plain files::

    bundle.json                     the name of the run
    checkpoint, tile/...            the log as C2SP tlog-tiles
    study.json, software.json       the documents that `run-open` names by digest
    rounds/0001.json ...            the run's statements, of which `round-close` and `round-abort` are extracts
    averaged/0001.safetensors ...   the adapters of which the released one is the average, with the weights
    release/...                     the files that `export` names by digest; the weights only on demand
    proofs/....tlog-proof           single leaves with their proofs, for tools that check one leaf

`check_bundle` first verifies the log alone (`privet.common.audit.verify`) and the privacy costs that it states
(`privet.common.audit.accounts`), and then all other files against it. It refuses a file that it does not know. The
directory of a published log may also hold the files in `SERVED`, and tiles of the log when it was shorter.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from privet.common.audit.accounts import AccountCost, Accounts
from privet.common.audit.counts import COUNTS, check_counts, counts_document
from privet.common.audit.privacy_statement import FORMATS, privacy_document
from privet.common.audit.privacy_text import privacy_markdown
from privet.common.audit.release import ADAPTER, EGRESS, PRIVACY, verify_files
from privet.common.audit.verify import LeafObserver, Tree, Verdict, verify_bundle
from privet.common.canonical import canonical_json, digest
from privet.common.errors import PrivetError, ProtocolError, StateError, VerificationError
from privet.common.log.agreement import follows, round_ended
from privet.common.log.checkpoint import Checkpoint, LeafProof, LogAt, Policy, open_checkpoint
from privet.common.log.encoding import one_line
from privet.common.log.merkle import leaf_hash
from privet.common.log.note import NoteKey, parse_note
from privet.common.log.replay import Leaf
from privet.common.log.statements import (
    AdapterState,
    EgressDecision,
    Export,
    RoundAbort,
    RoundClose,
    RoundOpened,
    RunOpen,
    SiteRound,
    Statement,
)
from privet.common.log.tiles import Tile, bundle_bytes, read_bundle, read_leaf_hashes, read_leaves, tile_bytes, tiles
from privet.common.masking.groups import groups_of
from privet.common.masking.isolation import Isolation, Sums, drawn_cohort
from privet.common.masking.parameters import suite_of
from privet.common.study.adapter import Adapter, read_layout
from privet.common.study.average import AVERAGED, averaged_name, counts, extended
from privet.common.study.study import Study

MANIFEST, CHECKPOINT, STUDY, SOFTWARE = "bundle.json", "checkpoint", "study.json", "software.json"
ROUNDS, RELEASE, PROOFS = "rounds/", "release/", "proofs/"
PROVED = (RunOpen, RoundClose, Export, AdapterState, EgressDecision)
"""The statements about its run of which a bundle has proofs."""
SERVED = ("log.policy", "log.vkey", "root.pem")
"""Files that a consortium publishes beside its log. An audit reads none of them."""
_TILES = "tile/"
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
        unchecked: What was not checked, one phrase each.
        alone: Whether there is nothing but a log.
        costs: Privacy costs of the log's accounts, as computed.
        together: Epsilon of each site with several accounts, if all of them held the same people.
    """

    verdict: Verdict
    reason: str = ""
    where: str = ""
    checked: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    alone: bool = False
    costs: tuple[AccountCost, ...] = ()
    together: Mapping[str, float] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether every check passed that could be made, also if there is nothing but a log."""
        return self.verdict.ok and not self.reason

    @property
    def ok(self) -> bool:
        """Whether every check passed, and the bundle has what a run needs."""
        return self.holds and not self.alone

    def __str__(self) -> str:
        if not self.holds:
            return str(self.verdict) if not self.verdict.ok else f"FAILED at {self.where}: {self.reason}"
        first = str(self.verdict)
        if self.alone:
            first = f"LOG ALONE: {first}"
        accounts = [
            f"checked: site {cost.site} spent epsilon {cost.computed:.4g} of account {cost.account[7:19]} at delta "
            f"{cost.delta:g} in {cost.rounds} rounds of this log; {_stated(cost)}"
            for cost in self.costs
        ]
        several = [
            f"site {site} says that its accounts are of different people; if not, epsilon is {cost:.4g}"
            for site, cost in self.together.items()
        ]
        classical = self.verdict.classical
        return "\n".join(
            [
                first,
                *(f"Ed25519 alone: {line}" for line in classical),
                *(f"checked: {line}" for line in self.checked),
                *accounts,
            ]
            + [f"author's word: {line}" for line in several]
            + [f"not checked: {line}" for line in self.unchecked]
        )


def _stated(cost: AccountCost) -> str:
    stated = f"{cost.stated:.4g}"
    if cost.stated <= cost.computed or stated == f"{cost.computed:.4g}":
        return f"the site states {stated} for the account, which agrees"
    return (
        f"the site states {stated}, which is more. Its account also counts rounds that are not stated in this log: "
        "rounds that it began and that were aborted, or rounds of another log"
    )


@dataclass
class _Run:
    """The statements of a log about one run.

    Attributes:
        opened: Its `run-open`.
        rounds: Hash and statement of each `round-open`, by nonce.
        ends: `round-close` or `round-abort` of each round, by the hash of its `round-open`.
        ledgers: For each `site-round`, whether it names a ledger. A simulated site has none.
        export: The last `export`.
        change: What became of the released adapter since; None if it is in use.
        decision: The last egress decision, with the hash of its leaf; None without one.
        proved: Number and type of the statements of which a bundle has proofs.
    """

    opened: RunOpen
    rounds: dict[str, tuple[str, RoundOpened]] = field(default_factory=dict)
    ends: dict[str, RoundClose | RoundAbort] = field(default_factory=dict)
    ledgers: list[bool] = field(default_factory=list)
    export: Export | None = None
    change: AdapterState | None = None
    decision: tuple[str, EgressDecision] | None = None
    proved: list[tuple[int, str]] = field(default_factory=list)


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


def head_of(files: Files, log: NoteKey | LogAt) -> Checkpoint:
    """Return the bundle's checkpoint. Cosignatures are not checked.

    Raises:
        ProtocolError, VerificationError: The checkpoint is missing, or the log did not sign it (`open_checkpoint`).
    """
    return open_checkpoint(_fetch(files, CHECKPOINT), log)[0]


def leaves_of(files: Files, size: int) -> Iterator[bytes]:
    """Yield the leaves of a bundle's log. Raises as `read_leaves`."""
    return read_leaves(size, lambda name: _fetch(files, name))


def check_bundle(files: Files, policy: Policy, told: Told | None = None) -> Report:
    """Verify a bundle: first its log, then all other files against the log.

    Any error in between, also an unforeseen one, makes the bundle fail. It never passes by an error.

    Args:
        files: The bundle's files by name.
        policy: The log and the witnesses that the reader trusts.
        told: Receives the leaves with their statements, up to the first wrong one.
    """
    runs: dict[str, _Run] = {}
    accounts = Accounts()

    def observe(leaf: Leaf, statement: Statement) -> None:
        accounts.observe(leaf, statement)
        _note(runs, leaf, statement)
        if told is not None:
            told.append((leaf, statement))

    verdict = _verify_log(files, policy, accounts, observe)
    if not verdict.ok:
        return Report(verdict)
    report = Report(verdict, costs=accounts.costs(), together=accounts.together())
    where, checked = "", list[str]()
    try:
        where = _check_tiles(files, verdict) or MANIFEST
        if where == MANIFEST and all(_is_log(name) for name in files):
            return replace(report, alone=True, unchecked=_beyond(runs, None))
        if where != MANIFEST:
            raise VerificationError("the file is missing, or is not what the log's leaves give, or no file of the log")
        run = runs[_manifest(files)["run"]]
        where = _stranger(files) or where
        if where != MANIFEST:
            raise VerificationError("a bundle has no file of this name")
        for part, check in _CHECKS.items():
            where = part
            checked.append(check(files, run))
        where = PROOFS
        checked.append(_check_proofs(files, run, verdict.tree))
    except PrivetError as error:
        return replace(report, reason=one_line(error.message), where=where)  # the message may quote a file
    except Exception as error:  # as in `verify_bundle`: a file that cannot be read fails
        return replace(report, reason=f"cannot be read ({type(error).__name__})", where=where)
    unchecked = [*_beyond(runs, run)]
    if run.export is None:
        unchecked.append(f"a release of run {run.opened.run}, which the log does not export{_withheld(run)}")
    elif f"{RELEASE}{ADAPTER}" not in files:
        unchecked.append(f"{RELEASE}{ADAPTER} and the release's signature: the weights are not in the bundle")
    averages = [end for end in run.ends.values() if isinstance(end, RoundClose) and end.average is not None]
    if averages and not any(name.startswith(AVERAGED) for name in files):
        unchecked.append("that the published adapter is the average: the adapters are not in the bundle")
    return replace(report, checked=tuple(line for line in checked if line), unchecked=tuple(unchecked))


def _verify_log(files: Files, policy: Policy, accounts: Accounts, observe: LeafObserver) -> Verdict:
    """Verify the log of a bundle and the privacy costs in it. `observe` passes each statement to `accounts`."""
    try:
        # Who signed it is checked first of all; here it says how many leaves there are to read.
        size = Checkpoint.parse(parse_note(_fetch(files, CHECKPOINT)).text).size
    except PrivetError as error:
        return Verdict(error.message)
    verdict = verify_bundle(
        lambda: leaves_of(files, size),
        files[CHECKPOINT],
        policy,
        lambda: read_leaf_hashes(size, lambda name: _fetch(files, name)),
        observe,
    )
    if verdict.ok:
        try:
            accounts.finish()
        except Exception as error:  # as in `verify_bundle`
            why = error.message if isinstance(error, PrivetError) else f"could not be checked ({type(error).__name__})"
            return replace(verdict, reason=why)
    return verdict


def _beyond(runs: Mapping[str, _Run], run: _Run | None) -> tuple[str, ...]:
    """Return which runs of a log have no files in the bundle."""
    others = [name for name in runs if run is None or name != run.opened.run]
    return (f"study, software, statements and release of: run {', run '.join(others)}",) if others else ()


def _check_tiles(files: Files, verdict: Verdict) -> str:
    """Return the first file of the log that is missing or wrong; empty if none is."""
    size, hashes = verdict.size, verdict.tree.hashes
    current = {(tile.level, tile.number): tile for tile in tiles(size)}
    missing = [tile.path for tile in current.values() if tile.path not in files]
    if missing:
        return missing[0]
    for name in sorted(name for name in files if name.startswith(_TILES)):
        try:
            tile = Tile.parse(name)
        except ProtocolError:
            return name
        now = current.get((tile.level, tile.number))
        if now is None or tile.width > now.width:
            return name
        if tile.level is None:
            leaves = read_bundle(now, files[now.path])
            right = bundle_bytes(leaves[: tile.width])
        else:
            right = tile_bytes(tile, lambda places: [hashes[place] for place in places])
        if files[name] != right:
            return name
    return ""


def _stranger(files: Files) -> str:
    """Return a file that has no place in a bundle; empty if there is none. The checks go through the directories."""
    known = {MANIFEST, CHECKPOINT, STUDY, SOFTWARE}
    parts = (_TILES, ROUNDS, AVERAGED, RELEASE, PROOFS)
    return next((name for name in sorted(files) if name not in known and not name.startswith(parts)), "")


def _manifest(files: Files) -> dict[str, Any]:
    document = _read(files, MANIFEST)
    if document.keys() != {"format", "run"} or document["format"] != 1 or document["format"] is True:
        raise VerificationError(f"{MANIFEST} must hold the format 1 and the name of a run")
    return document


def _check_proofs(files: Files, run: _Run, tree: Tree) -> str:
    """Check that the proofs are those of the run's leaves that a coordinator packs, each byte by byte."""
    note = files[CHECKPOINT]
    right = {proof_name(index, kind): LeafProof(index, tree.prove(index), note) for index, kind in run.proved}
    found = {name: data for name, data in files.items() if name.startswith(PROOFS)}
    for name in sorted(found.keys() | right.keys()):
        if name not in found or name not in right or found[name] != right[name].encode():
            raise VerificationError(f"{name}: it is missing, or is not the proof of a leaf of run {run.opened.run}")
    return f"the proofs of {len(right)} leaves are those of the log"


def proof_name(index: int, kind: str) -> str:
    """Return the name of the proof of a leaf of this number and statement type."""
    return f"{PROOFS}{index:06d}-{kind}.tlog-proof"


def _note(runs: dict[str, _Run], leaf: Leaf, statement: Statement) -> None:
    """Keep the statements against which the other files of a bundle are checked."""
    if isinstance(statement, RunOpen):
        runs[statement.run] = _Run(statement)
    elif isinstance(statement, RoundClose | RoundAbort):
        runs[statement.run].ends[statement.opened] = statement
    elif isinstance(statement, Export):
        runs[statement.run].export = statement
    elif isinstance(statement, AdapterState):
        runs[statement.run].change = statement
    elif isinstance(statement, EgressDecision):
        runs[statement.run].decision = leaf.hash, statement
    elif isinstance(statement, RoundOpened):
        runs[statement.run].rounds[statement.nonce] = leaf.hash, statement
    elif isinstance(statement, SiteRound):
        runs[statement.run].ledgers.append(statement.ledger is not None)
    if isinstance(statement, PROVED):
        runs[statement.run].proved.append((leaf.index, statement.type))


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


def _check_ends(study: Study, run: _Run) -> None:
    """Check what the ends of rounds owe to the study: the way of summing, and when a run ends."""
    for end in run.ends.values():
        if not isinstance(end, RoundClose):
            continue
        where = f"round {end.round}"
        if end.aggregation != study.aggregation.method:
            raise VerificationError(
                f"{where}: the study sums by {study.aggregation.method}, but the log's round-close states "
                f"{end.aggregation}"
            )
        last, stops = end.round == study.rounds, study.training.patience is not None
        if last > end.ended or end.ended > (last or stops):
            raise VerificationError(
                f"{where}: a run ends with its last round, or at an early stop where the study sets one; the log's "
                f"round-close says {'that it ended' if end.ended else 'that it goes on'}"
            )
        averages = study.aggregation.average if last and study.aggregation.average != "none" else None
        if end.average != averages:
            raise VerificationError(
                f"{where}: by the study, the round publishes {averages or 'no'} average of adapters; the log's "
                f"round-close states {end.average or 'none'}"
            )
        if end.adapter_published != end.adapter_after and not (stops or averages):
            raise VerificationError(
                f"{where}: only an early stop publishes the adapter of an earlier round, and the study sets none"
            )


def _check_draws(study: Study, run: _Run) -> None:
    """Check that each cohort is what the study's seed draws from the participants that the log states."""
    isolation = Isolation()
    for leaf, opened in run.rounds.values():
        if opened.participants is not None:
            drawn = drawn_cohort(study, opened.round, opened.participants, isolation)
            if drawn != opened.cohort:
                raise VerificationError(
                    f"round {opened.round}: of the participants that the log's round-open states, the study's seed "
                    f"draws {len(drawn)} others than the {len(opened.cohort)} sites of the cohort"
                )
        end = run.ends.get(leaf)
        if end is not None:
            _check_spoiled(study, opened, end)
            usable = (frozenset(end.survivors),) if isinstance(end, RoundClose) else ()
            spoiled = tuple(frozenset(names or opened.cohort) for names in end.spoiled or ())
            isolation.note(Sums(spoiled, usable))


def _check_spoiled(study: Study, opened: RoundOpened, end: RoundClose | RoundAbort) -> None:
    """Check that each sum that is said to be spoiled is one of the round.

    A sum is over a group. Only in a hybrid suite can signatures show which one site of it spoiled.
    """
    groups = {frozenset(names) for names in groups_of(study, opened.round, opened.cohort)} if end.spoiled else set()
    for names in end.spoiled or ():
        alone = len(names) == 1 and suite_of(study).hybrid
        whole = not names and (isinstance(end, RoundAbort) or len(groups) > 1)
        if not (alone or whole or frozenset(names) in groups):
            raise VerificationError(
                f"round {opened.round}: the log states a spoiled sum over {len(names) or len(opened.cohort)} sites, "
                "but the round had no such sum"
            )


def _check_rounds(files: Files, run: _Run) -> str:
    """Check that each end of a round in the log is an extract of one statement of the run, and the other way round."""
    study = _study(files)
    _check_ends(study, run)
    _check_draws(study, run)
    names = {name: _read(files, name)["round"] for name in files if name.startswith(ROUNDS)}
    for name, number in names.items():
        if type(number) is not int or name != f"{ROUNDS}{number:04d}.json":
            raise VerificationError(f"{name}: the file is not named by the number of its round")
    statements = _statements(files)
    held = dict(run.ends)
    for statement in statements:
        opened, stated = run.rounds.get(statement["nonce"], ("", None))
        end = held.pop(opened, None)
        if end is None or stated is None:
            raise VerificationError(
                f"round {statement['round']}: the log has no round-close or round-abort for the bundle's statement"
            )
        if statement["type"] != end.type:
            raise VerificationError(
                f"round {statement['round']}: the bundle's statement is of another type than the log's {end.type}"
            )
        if list(stated.cohort) != statement["cohort"]:  # the privacy cost of each site follows from it
            raise VerificationError(
                f"round {statement['round']}: the bundle's statement has another cohort than the log's round-open"
            )
        ended = isinstance(end, RoundClose) and end.ended
        if study.counts and isinstance(end, RoundClose):
            check_counts(study, statement)
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


def _check_average(files: Files, run: _Run) -> str:
    """Check that the adapters in an average are those of the log, and compute the average again."""
    held = {name: data for name, data in files.items() if name.startswith(AVERAGED)}
    if not held:
        return ""
    study, mean, spec = _study(files), None, None
    closed = [end for end in run.ends.values() if isinstance(end, RoundClose) and counts(study, end.round)]
    for end in sorted(closed, key=lambda each: each.round):
        data = held.pop(averaged_name(end.round), b"")
        if digest(data) != end.adapter_after:
            raise VerificationError(
                f"{averaged_name(end.round)}: the file is missing, or is not the adapter in the log's round-close"
            )
        spec = spec or read_layout(data)
        mean = extended(study, mean, Adapter.read(spec, data))
        if end.average is None:
            continue
        found, released = mean.adapter(spec), files.get(f"{RELEASE}{ADAPTER}")
        # Where bases change, products of matrices enter, whose last bits differ between machines.
        close = released is not None and _near(found, Adapter.read(spec, released))
        if found.digest != end.adapter_published and not close:
            raise VerificationError(
                f"round {end.round}: the published adapter {end.adapter_published} is not the study's average"
            )
    if held:
        raise VerificationError(f"{min(held)}: the adapter of this round is in no average of the study")
    return f"the average of {len(closed)} adapters is the published one" if run.export else ""


def _near(first: Adapter, second: Adapter) -> bool:
    """Whether two adapters of one layout differ by no more than rounding."""
    return all(
        np.allclose(value, second.values[name], rtol=1e-4, atol=1e-6 * float(np.abs(value).max(initial=0)))
        for name, value in first.values.items()
    )


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
    if (held := files.get(f"{RELEASE}{STUDY}")) is not None and held != files[STUDY]:
        raise VerificationError(f"{RELEASE}{STUDY}: the released study differs from the run's study")
    if run.export.files.get(ADAPTER) != run.export.adapter:
        raise VerificationError(
            f"{ADAPTER}: the log's export statement lists digest {run.export.files.get(ADAPTER)} for this file, but "
            f"its round published the adapter {run.export.adapter}"
        )
    _check_result(files)
    _check_egress(files, run)
    said = _check_privacy(files, run) + _later(run)
    whole = {name.removeprefix(RELEASE): data for name, data in files.items() if name.startswith(RELEASE)}
    if ADAPTER not in whole:
        return f"the release is the one that the log exports (weights not included: {run.export.files[ADAPTER]}){said}"
    verify_files(whole, _study(files).name)
    return f"the release is the one that the log exports, and its signature matches{said}"


def _check_result(files: Files) -> None:
    """Check the released result of a study that counts, by computing it from the statements."""
    study = _study(files)
    if not study.counts:
        return
    computed = counts_document(study, _statements(files))
    if not _agree(computed, _read(files, f"{RELEASE}{COUNTS}")):
        raise VerificationError(f"{COUNTS}: its content differs from what the study and the round's statement give")


def _check_egress(files: Files, run: _Run) -> None:
    """Check that a release holds the egress decision that the log has, and none where the study has no gate."""
    held = files.get(f"{RELEASE}{EGRESS}")
    if (held is None) != (run.opened.gate is None):
        raise VerificationError(f"{EGRESS}: a release has it exactly where the study has a gate")
    if held is not None and (run.decision is None or f"sha256:{leaf_hash(held).hex()}" != run.decision[0]):
        raise VerificationError(f"{EGRESS}: it is not the egress decision in the log")


def _withheld(run: _Run) -> str:
    if run.opened.gate is None:
        return ""
    if run.decision is None:
        return ": it is a candidate, and no egress decision has accepted it"
    decision = run.decision[1]
    return f": it was {decision.verdict} at its gate" + (f": {decision.reason}" if decision.reason else "")


def _later(run: _Run) -> str:
    """Return what the log says that became of the release since; empty if it is in use."""
    if run.change is None:
        return ""
    return f"; it is {run.change.state}, as the coordinator said later: {run.change.reason}"


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
    AVERAGED: _check_average,
    RELEASE: _check_release,
}


def _study(files: Files) -> Study:
    return Study.parse(_read(files, STUDY))


def _statements(files: Files) -> list[dict[str, Any]]:
    names = sorted(name for name in files if name.startswith(ROUNDS))
    return [_read(files, name) for name in names]


def _is_log(name: str) -> bool:
    return name == CHECKPOINT or name in SERVED or name.startswith(_TILES)


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
    """Verify a bundle's log alone, with its privacy costs. Return the verdict, and the leaves up to the first wrong."""
    told: Told = []
    accounts = Accounts()

    def observe(leaf: Leaf, statement: Statement) -> None:
        accounts.observe(leaf, statement)
        told.append((leaf, statement))

    return _verify_log(files, policy, accounts, observe), told
