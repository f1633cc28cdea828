"""The evidence for a dossier: a run whose log, study, statements and release were verified, and what lies beside them.

Nothing here is taken from a run that does not verify.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from privet.common.audit.bundle import MANIFEST, ROUNDS, STUDY, Report, check_bundle, read_archive
from privet.common.audit.privacy_statement import privacy_document
from privet.common.errors import PrivetError, ProtocolError, StateError, VerificationError
from privet.common.log.checkpoint import Checkpoint, Policy
from privet.common.log.note import parse_note
from privet.common.log.replay import Leaf
from privet.common.log.statements import Genesis, Join, Renew, Revoke, Rotate, SiteRound, Statement
from privet.common.log.tiles import read_leaves
from privet.common.study.study import Study
from privet.server.rounds.archive import bundle_files, own_policy, published_log
from privet.server.rounds.state import RunDirectory
from privet.simulations.dossier.sources import OfFile, OfLeaf, OfLog, OfStudy
from privet.simulations.reporting.gather import attacks_of

Kind = TypeVar("Kind", bound=Statement)
_MEMBERSHIP = (Genesis, Join, Revoke, Renew, Rotate)


@dataclass(frozen=True)
class Evidence:
    """What is known about a run, verified.

    Attributes:
        run: Its name in the log.
        study: Its study.
        report: The result of verifying it.
        policy: Whose log and witnesses were trusted.
        told: The leaves about the consortium and about this run, in the log's order.
        files: The run's files by name; of attacks, `attacks/NAME.json`.
        statements: The statements of its rounds, oldest first.
        privacy: Its privacy statement, with every number computed again.
        simulated: Whether its sites were simulated.
        attacks: Results of attacks by name. They are files of the run's owner, which no log covers.
    """

    run: str
    study: Study
    report: Report
    policy: Policy
    told: Sequence[tuple[Leaf, Statement]]
    files: Mapping[str, bytes]
    statements: Sequence[Mapping[str, Any]]
    privacy: Mapping[str, Any]
    simulated: bool
    attacks: Mapping[str, Mapping[str, Any]]

    @property
    def log(self) -> OfLog:
        """The log as a whole."""
        head = Checkpoint.parse(parse_note(self.files["checkpoint"]).text)
        return OfLog(head.origin, head.size, head.root.hex())

    def all(self, kind: type[Kind]) -> list[tuple[OfLeaf, Kind]]:
        """Return the statements of one kind about the consortium or this run, each with its leaf."""
        return [(self.at(leaf, each), each) for leaf, each in self._kinds.get(kind, ()) if isinstance(each, kind)]

    @cached_property
    def _kinds(self) -> Mapping[type[Any], Sequence[tuple[Leaf, Statement]]]:
        """The statements by kind. A log may hold a hundred thousand leaves, and documents ask for a kind often."""
        found: dict[type[Any], list[tuple[Leaf, Statement]]] = {}
        for leaf, each in self.told:
            found.setdefault(type(each), []).append((leaf, each))
        return found

    def at(self, leaf: Leaf, statement: Statement) -> OfLeaf:
        """Return a leaf as a source."""
        return OfLeaf(leaf.index, statement.type, leaf.hash)

    def field(self, name: str) -> OfStudy:
        """Return a field or a table of the study as a source. Raises `KeyError` if the study has none of this name."""
        found: Any = self.study.document()
        for part in name.split("."):
            found = found[part]
        return OfStudy(name, self.study.digest)

    def file(self, name: str) -> OfFile:
        """Return a file of the run as a source. Raises `KeyError` if there is none of this name."""
        return OfFile(name, hashlib.sha256(self.files[name]).hexdigest())

    def leaf_bytes(self) -> list[bytes]:
        """Return all leaves of the log as bytes."""
        return list(read_leaves(self.log.size, lambda name: self.files[name]))


def is_bundle(run: Path) -> bool:
    """Whether a path is a bundle, as an archive or unpacked, and no run directory."""
    return run.is_file() or (run / MANIFEST).is_file()


def gather(run: Path, policy: Path | None = None, public: Path | None = None) -> Evidence:
    """Read and verify a run.

    Args:
        run: A run directory, or a bundle.
        policy: The file that says whose log and witnesses to trust. None: the one beside the run's log.
        public: Where the log of a run directory is published. None: beside the run.

    Raises:
        StateError: Nothing is there that can be read, or no policy.
        VerificationError: The run does not verify.
    """
    bundled = is_bundle(run)
    trusted = _policy(policy or own_policy(run))
    files = read_archive(run) if bundled else _packed(run, public or published_log(run))
    told = list[tuple[Leaf, Statement]]()
    report = check_bundle(files, trusted, told)
    if not report.ok:
        raise _refused(str(report).splitlines()[0])
    study, name = Study.parse(json.loads(files[STUDY])), str(json.loads(files[MANIFEST])["run"])
    statements = [json.loads(files[each]) for each in sorted(files) if each.startswith(ROUNDS)]
    own = [(leaf, each) for leaf, each in told if isinstance(each, _MEMBERSHIP) or getattr(each, "run", None) == name]
    ledgers = [each.ledger is not None for _, each in own if isinstance(each, SiteRound)]
    simulated = not any(ledgers) if ledgers else not bundled and RunDirectory.open(run).simulated
    attacks = {} if bundled else attacks_of(run, study)
    held = {f"attacks/{each}.json": (run / "attacks" / f"{each}.json").read_bytes() for each in attacks}
    return Evidence(
        run=name,
        study=study,
        report=report,
        policy=trusted,
        told=own,
        files={**files, **held},
        statements=statements,
        privacy=privacy_document(study, statements, simulated=simulated),
        simulated=simulated,
        attacks=attacks,
    )


def _packed(run: Path, public: Path) -> dict[str, bytes]:
    try:
        return bundle_files(RunDirectory.open(run), public, with_weights=False)
    except (ProtocolError, VerificationError) as error:
        raise _refused(error.message) from None


def _refused(why: str) -> VerificationError:
    return VerificationError(
        f"there is no dossier of a run that does not verify: {why}",
        "find out with `privet audit verify BUNDLE --policy FILE` what was changed; of a run directory, restore a "
        "backup, or resume the run once",
    )


def _policy(path: Path) -> Policy:
    try:
        return Policy.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, PrivetError) as error:
        raise StateError(
            f"{path} is no policy of a round log ({type(error).__name__})",
            "name the log's policy (a C2SP policy file) with --policy: a site keeps one in consortium/log.policy",
        ) from None
