"""The coordinator's commands about candidates at their gates."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from privet.common.clock import now
from privet.common.options import HERE, Directory, Json
from privet.common.progress import doing, folded, in_directory, printable

if TYPE_CHECKING:
    from privet.server.consortium.candidates import Candidate


@doing("Reading the gates of {directory}")
def status(
    run: Annotated[
        str | None, typer.Argument(help="Name of a run.  [default: all runs whose study has a gate]")
    ] = None,
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Show candidates: who signed or refused, which conditions are not met, and what was decided."""
    from privet.server.consortium.candidates import candidate_of, candidates
    from privet.server.consortium.coordinator import open_coordinator

    made = open_coordinator(directory)
    found = candidates(made, now()) if run is None else (candidate_of(made, run, now()),)
    if as_json:
        typer.echo(json.dumps({"gates": [each.document() for each in found]}))
        return
    if not found:
        typer.echo("no run of this consortium has a study with a gate")
    for each in found:
        for line in _lines(each):
            typer.echo(in_directory(line, directory))


def _lines(found: Candidate) -> list[str]:
    row = found.document()
    until = "" if row["expires"] is None else f", until {_day(row['expires'])}"
    why = f": {printable(row['reason'])}" if row["reason"] else ""
    lines = [folded(f"run {row['run']}  {row['state']}{until}{why}", 2)]
    if row["adapter"]:
        lines.append(f"  adapter     {row['adapter']}")
    for each in row["reviews"]:
        said = printable(each["reason"]) or f"tested {', '.join(each['tested']) or 'nothing'}"
        lines.append(folded(f"  {each['site']:<12}{each['verdict']}: {said}; until {_day(each['expires'])}", 14))
    if row["state"] in ("candidate", "expired"):
        lines += [folded(f"  not met     {name}: {text}", 14) for name, text in row["unmet"].items()]
        lines += [] if row["unmet"] else [f"  next: privet gate decide {row['run']}"]
    if row["state"] == "accepted":
        lines.append(f"  next: privet coordinator resume {row['run']}")
    return lines


def _day(time: int) -> str:
    return datetime.fromtimestamp(min(time, 253_402_300_799), UTC).strftime("%Y-%m-%d %H:%M UTC")


@doing("Deciding about the candidate of {run}")
def decide(
    run: Annotated[str, typer.Argument(help="Name of the run.")],
    refuse: Annotated[
        str | None, typer.Option(help="Refuse it for this reason, for good. The round log shows it to all sites.")
    ] = None,
    directory: Directory = HERE,
) -> None:
    """Sign the egress decision: the candidate may leave, if every condition is met; or, with --refuse, it may not.

    Run `privet coordinator resume RUN` afterwards, which makes the release.
    """
    from privet.server.consortium.candidates import decide_egress
    from privet.server.consortium.coordinator import open_coordinator
    from privet.server.log.journal import open_journal

    made = open_coordinator(directory)
    with open_journal(made.log_directory, made.keys) as journal:
        decision = decide_egress(made, journal, run, "accepted" if refuse is None else "refused", refuse or "", now())
    if decision.expires is None:
        typer.echo(folded(f"refused    {run}: {decision.reason}", 11))
        typer.echo("log        the decision is in the round log; nothing of this run is released")
        typer.echo(in_directory(f"next: privet coordinator resume {run}, so that sites cosign it", directory))
        return
    typer.echo(f"accepted   {run}: signed by {', '.join(decision.signed)}; until {_day(decision.expires)}")
    typer.echo(in_directory(f"next: privet coordinator resume {run}", directory))
