"""The command that withdraws a person, or the whole dataset, from all later studies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from privet.common.errors import DataError, StateError, StudyError
from privet.common.files import most_like
from privet.common.options import SiteFile
from privet.common.progress import doing, number_of

if TYPE_CHECKING:
    from privet.client.budget.withdrawals import Names
    from privet.client.site import SiteConfig


@doing("Withdrawing from what {site} reads")
def withdraw(
    site: SiteFile,
    unit_file: Annotated[
        Path | None,
        typer.Option(help="File of the ids to withdraw, one a line, as the training files spell them; -: read them."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="Withdraw the whole dataset from all studies, for good.")
    ] = False,
    renamed: Annotated[
        bool,
        typer.Option("--renamed", help="Record that patient_column has a new name, and holds the same ids as before."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Directory for the certificates.  [default: certificates beside the site file]")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Withdraw without asking.")] = False,
) -> None:
    """Withdraw people from everything that this site reads from now on, and write a signed certificate for each.

    Their ids are kept as marks that nobody can read without the site's key, and never in clear. What was charged stays
    charged, and what has left cannot be taken back: the certificate says what differential privacy bounds, and what it
    does not. A withdrawal is for good.
    """
    from privet.client.budget.certificate import write_certificate
    from privet.client.budget.releases import open_ledger
    from privet.client.budget.withdrawals import Withdrawals
    from privet.client.setup import change
    from privet.client.site import load_site

    config = load_site(site)
    if (unit_file is not None) + everything + renamed != 1:
        raise StudyError(
            "expected one of --unit-file, --everything and --renamed",
            f"name a file of ids, one a line: `privet site withdraw {site} --unit-file FILE`",
        )
    people = [] if unit_file is None else _people(config, unit_file)
    if everything and not yes:
        _ask(f"Withdraw dataset {config.dataset} from all studies, for good? This site then takes part in no round.")
    ledger = open_ledger(config)
    try:
        with Withdrawals.open(config, create=not renamed) as found:
            if found is None:
                raise StateError(
                    "nobody was withdrawn at this site, so no ids need a new column", "nothing is to be done"
                )
            if renamed:
                found.rename()
                typer.echo(f"recorded  patient_column {config.patient_column} holds the ids that were withdrawn")
                return
            entries = [found.leave()] if everything else found.add(people)
            folder = out or site.resolve().parent / "certificates"
            paths = [write_certificate(config, ledger, each, folder) for each in entries]
    finally:
        ledger.close()
    new = sum(not each.again for each in entries)
    if everything:
        typer.echo(f"withdrawn  dataset {config.dataset}: this site refuses every round from now on")
        command = f"privet coordinator revoke {config.name}"
        typer.echo(f"next: ask the coordinator's operator to revoke this site (`{command}`)")
    else:
        typer.echo(f"withdrawn  {new} {'person' if new == 1 else 'people'}")
        if new < len(entries):
            typer.echo(f"           {len(entries) - new} more were withdrawn before")
        _tell_rows(config)
    for path in paths:
        typer.echo(f"written    {path}")
    # So that marks are missed where all of them are lost. Last, as the file may not be one that this user can change.
    change(site, {"withdrawals": True})


def _people(config: SiteConfig, file: Path) -> list[Names]:
    """Return the names of each id in a file. No id is printed."""
    from privet.client.training.ids import names_by_rule

    if config.patient_column is None:
        raise StateError(
            f"the site file of {config.name} names no patient_column, so nobody could be left out by an id",
            "name the column of patients: `privet site setup SITE --patient-column COLUMN`",
        )
    if config.declared_count is None:
        raise StateError(
            f"the site file of {config.name} declares no count, so the count that others see follows from the files: "
            "it would tell when a person left",
            "declare the count that others have seen until now: `privet site setup SITE --declared-count NUMBER`",
        )
    try:
        lines = sys.stdin.readlines() if str(file) == "-" else file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(
            f"{file} cannot be read ({type(error).__name__})",
            f"check the path{most_like(file)}; it holds one id a line",
        ) from None
    # As the files spell them: with a decimal comma, 101,0 is 101 there.
    forms = [config.form_of(path) for path in (*config.train, *config.test)]
    people: list[Names] = [
        names_by_rule(value)
        for line in lines
        if line.strip()
        for value in sorted({form.number(line.strip()) for form in forms})
    ]
    wrong = [row for row, names in enumerate(people, start=1) if (config.patient_ids or "plain") not in names]
    if wrong or not people:
        what = f"{len(wrong)} of {len(people)} lines are no ids under patient_ids of the site file" if wrong else "none"
        raise DataError(f"{file}: expected ids, one a line; found {what}", "write the ids as the training files do")
    return people


def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        raise StateError("there is no terminal to ask whether to withdraw", "add --yes to the command")
    if not typer.confirm(question):
        raise typer.Exit(1)


def _tell_rows(config: SiteConfig) -> None:
    """Say how many rows of the site's files are left out now: none may mean that an id is misspelt."""
    from privet.client.budget.withdrawals import withdrawn_of
    from privet.client.training.files import rows_left_out

    withdrawn = withdrawn_of(config)
    if withdrawn is None:
        return
    for path in (*config.train, *config.test):
        count = rows_left_out(path, withdrawn, config.form_of(path))
        typer.echo(f"           {number_of(count, 'row')} of {path} are left out from now on")
