"""What a tracking tool may hold of a run: what the run's release and the round log publish, and nothing else.

A run directory holds more: files of simulated sites, curves over test records, and rounds whose end no quorum has
cosigned. None of it is read here. A run without a release has no figures for others yet, so it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privet.common.audit.egress import check_kept
from privet.common.audit.privacy_statement import check_statements
from privet.common.audit.release import ADAPTER, CARD, LINEAGE, SIGNATURE, STUDY, verify_files
from privet.common.canonical import canonical_json
from privet.common.errors import ProtocolError, RefusedError, VerificationError
from privet.common.study.study import Study
from privet.server.consortium.coordinator import open_coordinator
from privet.server.consortium.registry import entry_of
from privet.server.rounds.run_log import RELEASE
from privet.server.rounds.state import RunDirectory, unfinished

_PRIVATE = {
    "personal.json": "an adapter that a site trained for itself",
    "received.json": "an adapter that a site received",
    "evaluation.json": "a site's own evaluation",
}
_LONGEST = 500
"""Characters of a parameter: earlier versions of MLflow refuse longer ones. The study itself is among the files."""


@dataclass(frozen=True)
class Point:
    """The published figures of one round.

    Attributes:
        round: Number of the round.
        time: When it was opened, in Unix seconds.
        figures: By name. Validation figures are of the adapter with which the round began.
    """

    round: int
    time: float
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Tracked:
    """A released run.

    Attributes:
        name: The run's name.
        study: Its study.
        adapter: Digest of the released adapter.
        folder: Directory of the released files.
        files: Their names.
        parameters: The fields of the study, by dotted name, as text.
        tags: What identifies run and adapter.
        points: One for each round.
        card: The model card.
    """

    name: str
    study: Study
    adapter: str
    folder: Path
    files: tuple[str, ...]
    parameters: Mapping[str, str]
    tags: Mapping[str, str]
    points: tuple[Point, ...]
    card: str


def tracked(path: Path) -> Tracked:
    """Return what may be handed on of a run.

    Args:
        path: A run directory: of a coordinator, or of a simulation.

    Raises:
        StateError: It is no run directory.
        RefusedError: It is not released, or a candidate; or its adapter is revoked or retired; or it is a site's own.
        VerificationError: The released files were changed, or are not those of the run.
    """
    for file, what in _PRIVATE.items():
        if (path / file).exists():
            raise RefusedError(
                f"{path} is {what}, which stays at the site", "name the run directory of the coordinator's run"
            )
    run = RunDirectory.open(path)
    state, folder = run.load(), path / RELEASE
    check_kept(run.study, state.adapter.digest, path)
    if not folder.is_dir():
        raise RefusedError(
            f"the run {path} has released nothing, so its figures are not published: it has closed {state.round} of "
            f"{run.study.rounds} rounds",
            f"finish it first: {unfinished(run)}",
        )
    _check_in_use(path.resolve())
    files = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}
    name = _verified(run, state.adapter.digest, files)
    check_statements(run.study, state.statements)
    return Tracked(
        name=name,
        study=run.study,
        adapter=state.adapter.digest,
        folder=folder,
        files=tuple(files),
        parameters=dict(_flat("", run.study.document())),
        tags={
            "privet.run": name,
            "privet.study": run.study.digest,
            "privet.adapter": state.adapter.digest,
            "privet.base": run.study.model.base,
            "privet.simulated": str(run.simulated).lower(),
        },
        points=tuple(_point(statement) for statement in state.statements),
        card=files[CARD].decode(),
    )


def _check_in_use(path: Path) -> None:
    """Check in the round log that a coordinator's run is not revoked or retired. A simulation has no registry."""
    home = path.parent.parent
    if not (home / "coordinator.toml").is_file():
        return
    entry = entry_of(open_coordinator(home), path.name)
    if entry.state in ("revoked", "retired"):
        reason = "" if entry.change is None else entry.change.reason
        raise RefusedError(
            f"the adapter of run {path.name} is {entry.state}: {reason}",
            f"list the adapters that are in use: `privet registry list --directory {home}`",
        )


def _verified(run: RunDirectory, adapter: str, files: Mapping[str, bytes]) -> str:
    """Check that released files are whole, and of this run. Return the run's name in the log."""
    lacking = {ADAPTER, CARD, LINEAGE, SIGNATURE} - set(files)
    again = f"restore {run.path / RELEASE} from a backup; the round log has the digests of its files"
    if lacking:
        raise VerificationError(f"the release of {run.path} lacks {', '.join(sorted(lacking))}", again)
    try:
        verify_files(files, run.study.name)
        lineage = json.loads(files[LINEAGE])
        name, released = str(lineage["run"]), lineage["released"]
    except (VerificationError, ProtocolError) as error:
        raise VerificationError(f"{run.path}: {error.message}", again) from None
    except (ValueError, KeyError, TypeError) as error:
        raise VerificationError(f"the release of {run.path} has no lineage ({type(error).__name__})", again) from None
    same = files.get(STUDY, canonical_json(run.study.document())) == canonical_json(run.study.document())
    if released != adapter or not same:
        raise VerificationError(f"the release of {run.path} is of another study or adapter than the run", again)
    return name


def _point(statement: Mapping[str, Any]) -> Point:
    epsilon = (statement["privacy"] or {}).get("epsilon", {})
    figures = {
        **(statement["metrics"] or {}),
        "sites": float(len(statement["survivors"])),
        **({"epsilon": max(epsilon.values())} if epsilon else {}),
    }
    return Point(statement["round"], float(statement["started"]), figures)


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else key, inner)
        return
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) <= _LONGEST:
        yield name, text
