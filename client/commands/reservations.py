"""The command that gives back what a site's ledger has reserved for a study that will not go on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from privet.common.errors import StateError
from privet.common.options import SiteFile


def cancel(
    site: SiteFile,
    study: Annotated[
        str, typer.Argument(help="The study file, or the study's digest as `privet site budget` prints it.")
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Cancel without asking.")] = False,
) -> None:
    """Cancel what is reserved for a study, for example after the coordinator withdrew its run.

    Only rounds that have not begun here are cancelled: no random number was drawn for them, so nothing of them can have
    left the site. What was charged stays charged. Do not cancel if the very same study is to be run again: this site
    would refuse the cancelled rounds.
    """
    from privet.client.budget.accounts import RoundKey
    from privet.client.budget.releases import open_ledger
    from privet.client.site import load_site
    from privet.common.study.study import load_study

    config = load_site(site)
    digest = study if study.startswith("sha256:") else load_study(Path(study)).digest
    ledger = open_ledger(config)
    try:
        rounds = ledger.reserved(str(config.dataset), digest)
        if not rounds:
            typer.echo("nothing is reserved for this study that has not begun, so there is nothing to cancel")
            return
        named = f"round{'s'[: len(rounds) != 1]} {', '.join(map(str, rounds))}"
        typer.echo(f"reserved and not begun: {named} of study {digest}")
        if not yes and not sys.stdin.isatty():
            raise StateError("there is no terminal to ask whether to cancel", "add --yes to the command")
        if not yes and not typer.confirm(
            "Cancel? The site will refuse these rounds, also if the same study is run again."
        ):
            return
        for number in rounds:
            ledger.cancel(RoundKey(str(config.dataset), digest, number))
        typer.echo(f"cancelled: {named}")
    finally:
        ledger.close()
