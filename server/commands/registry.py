"""The coordinator's commands about released adapters."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from privet.common.clock import now
from privet.common.errors import StateError
from privet.common.options import HERE, Directory, Json
from privet.common.progress import doing, folded, in_directory, printable

if TYPE_CHECKING:
    from privet.server.consortium.coordinator import Coordinator
    from privet.server.consortium.registry import Decision

RunArgument = Annotated[str, typer.Argument(help="Name of the run that released the adapter.")]
Reason = Annotated[str, typer.Option(help="Why. The round log shows it to all sites.")]


@doing("Reading the registry of {directory}")
def list_(directory: Directory = HERE, as_json: Json = False) -> None:
    """List the released adapters, newest first: the run, its state, its privacy cost, and what it began from."""
    from privet.server.consortium.coordinator import open_coordinator
    from privet.server.consortium.registry import entries

    rows = [entry.document() for entry in entries(open_coordinator(directory))]
    if as_json:
        typer.echo(json.dumps({"adapters": rows}))
        return
    if not rows:
        typer.echo("no run has released an adapter yet")
    for row in rows:
        began = (f"continues {row['parent']}" if row["parent"] else "from the base") + _origin(row)
        typer.echo(folded(f"{row['run']}  {row['adapter'][7:19]}  {_state(row)}; {_cost(row)}; {began}", 2))
        if row["reason"]:
            typer.echo(folded(f"  {printable(row['reason'])}", 4))


@doing("Reading the registry of {directory}")
def show(run: RunArgument, directory: Directory = HERE, as_json: Json = False) -> None:
    """Show what is known of a released adapter: study, rounds, privacy cost, quality, what it began from, its state."""
    from privet.server.consortium.coordinator import open_coordinator
    from privet.server.consortium.registry import entry_of

    row = entry_of(open_coordinator(directory), run).document()
    if as_json:
        typer.echo(json.dumps(row))
        return
    released = datetime.fromtimestamp(row["released"], UTC).strftime("%Y-%m-%d %H:%M UTC")
    began = (f"the release of run {row['parent']}" if row["parent"] else "the base") + _origin(row)
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in sorted((row["metrics"] or {}).items()))
    lines = {
        "run": row["run"],
        "study": f"{row['study']} {row['study_digest']}".strip(),
        "adapter": f"{row['adapter']}, after round {row['round']}",
        "released": f"{released}, leaf {row['leaf']} of the round log",
        "began from": began,
        "privacy": _cost(row),
        "quality": f"{metrics} (by all sites together, with noise)" if metrics else "no validation in the study",
        "state": _state(row) + (f": {printable(row['reason'])}" if row["reason"] else ""),
    }
    for name, text in lines.items():
        typer.echo(folded(f"{name:<12}{text}", 12))


@doing("Deciding about the adapter of {run}")
def supersede(
    run: RunArgument,
    by: Annotated[str, typer.Option(help="Name of the run whose adapter takes its place.")],
    reason: Reason,
    directory: Directory = HERE,
) -> None:
    """Say that another adapter takes the place of one. Who uses the old one is told; nothing is refused."""
    _decide(directory, run, "superseded", reason, by)


@doing("Deciding about the adapter of {run}")
def retire(run: RunArgument, reason: Reason, directory: Directory = HERE) -> None:
    """Take an adapter out of use: no site receives it any more, and no study continues from it.

    A site that has it is told, and may go on using it.
    """
    _decide(directory, run, "retired", reason)


@doing("Deciding about the adapter of {run}")
def revoke(run: RunArgument, reason: Reason, directory: Directory = HERE) -> None:
    """Revoke an adapter for good: sites refuse to use it as soon as they have read the round log.

    What has left a site's own privet, such as an exported or merged model, cannot be reached by this.
    """
    from privet.server.consortium.coordinator import open_coordinator
    from privet.server.consortium.registry import descendants, entries

    _decide(directory, run, "revoked", reason)
    made = open_coordinator(directory)
    states = {entry.name: entry.state for entry in entries(made)}
    for child in descendants(made, run):
        state = states.get(child)
        if state == "revoked":
            continue
        said = "is going on or has ended without a release" if state is None else f"stays {state}, and sites use it"
        further = f"privet coordinator withdraw {child}" if state is None else f"privet registry revoke {child}"
        note = f"note       run {child} began from it and {said}; next: {further} --reason TEXT"
        typer.echo(folded(in_directory(note, directory), 11))


def _decide(directory: Path, run: str, state: Decision, reason: str, by: str | None = None) -> None:
    from privet.server.consortium.coordinator import open_coordinator
    from privet.server.consortium.registry import decide

    made = open_coordinator(directory)
    decide(made, run, state, reason, now(), by)
    typer.echo(f"{state:<11}{run}: {reason}")
    _log(made)


def _log(made: Coordinator) -> None:
    """Log what was decided. While another process has the log open, it waits for that process."""
    from privet.server.consortium.registry import log_decisions
    from privet.server.log.journal import open_journal

    try:
        with open_journal(made.log_directory, made.keys) as journal:
            log_decisions(made, journal)
    except StateError as error:
        typer.echo(f"log        written later, by the process that has it open: {error.message}")
        return
    typer.echo(
        "log        the decision is in the round log; sites read it within 15 minutes, or at `privet site adapters`"
    )


def _state(row: dict[str, Any]) -> str:
    by = f" by {row['by']}" if row["by"] else ""
    return f"{row['state']}{by}" + ("" if row["logged"] else " (not in the round log yet)")


def _origin(row: dict[str, Any]) -> str:
    origin = row["revoked_origin"]
    if origin is None:
        return ""
    return ", which is revoked" if origin == row["parent"] else f", which began from {origin}, which is revoked"


def _cost(row: dict[str, Any]) -> str:
    if row["epsilon"] is None:
        return "not private"
    return f"epsilon at most {row['epsilon']:g}" + (
        "" if row["spent"] is None else f", spent at most {row['spent']:.3g}"
    )
