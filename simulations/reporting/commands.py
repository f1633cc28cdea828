"""The command that writes a report."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from privet.common.errors import PrivetError, StudyError
from privet.common.files import write_durably
from privet.common.progress import Stages, closing, doing


@doing("Writing a report of {runs}")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Finished run directories.", metavar="RUN...")],
    out: Annotated[
        Path | None,
        typer.Option(help="The HTML file to write. Default: report.html in the run directory; for several runs, here."),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(help="Column of the test files to group results by. Give the option once for each column."),
    ] = None,
    groups: Annotated[bool, typer.Option(help="Evaluate the adapter on groups of test records.")] = True,
    watts: Annotated[
        float, typer.Option(help="Assumed power of the machine in watts, for the energy estimate.")
    ] = 100.0,
) -> None:
    """Write an HTML report of finished runs, for readers who do not program.

    The report shows settings, results, privacy spent, attacks and costs. It is one file without scripts, and it
    requests nothing from the network. Rows of fewer than 10 records are not shown.
    """
    from privet.server.rounds.state import RunDirectory
    from privet.simulations.reporting.gather import gather, require_finished
    from privet.simulations.reporting.page import conclusion, page
    from privet.simulations.reporting.subgroups import Groups, evaluate_groups

    if not 0 < watts < float("inf"):
        raise StudyError(
            f"--watts: expected a finite number of watts above 0, got {watts}",
            "give the power of your machine in watts, or leave --watts out",
        )
    file = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    for run in runs:
        require_finished(run)
    if not file.parent.is_dir():
        raise StudyError(
            f"--out: there is no directory {file.parent}",
            f"make it with `mkdir -p {quote(str(file.parent))}`, or correct --out",
        )
    found = []
    with Stages() as stages:
        for number, run in enumerate(runs):
            stages.tell("reading runs", number, len(runs), str(run))
            told: Groups = {}
            why = "groups were switched off with --no-groups"
            if groups and not RunDirectory.open(run).study.counts:
                try:
                    told, why = evaluate_groups(run, by or (), stages.tell), ""
                except PrivetError as error:
                    if by:  # The user named the column: report the error instead of leaving the group out.
                        raise
                    why = error.message
            found.append(gather(run, told, why))
    write_durably(file, page(found, watts).encode())
    typer.echo(f"written  {file}")
    following = f"open {file} in a browser; what the privacy figures mean: `privet privacy {quote(str(runs[0]))}`"
    typer.echo(closing(conclusion(found[0]) if len(found) == 1 else f"{len(found)} runs, one page.", following))
