"""The command that gives back what a site's ledger has reserved for a study that will not go on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from privet.common.errors import StateError
from privet.common.options import SiteFile
from privet.common.progress import doing

if TYPE_CHECKING:
    from privet.client.site import SiteConfig


@doing("Reading what {site} has reserved")
def cancel(
    site: SiteFile,
    study: Annotated[
        str,
        typer.Argument(
            help="A study file; the study's digest as `privet site budget` prints it, or 8 of its digits or more; or "
            "the name of a run.",
            metavar="STUDY",
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Cancel without asking.")] = False,
) -> None:
    """Cancel what is reserved for a study, for example after the coordinator withdrew its run.

    A site reserves a round when it is about to train in that round. An approval reserves nothing.
    Only rounds that have not begun here are cancelled: no random number was drawn for them, so nothing of them can have
    left the site. What was charged stays charged. Do not cancel if the very same study is to be run again: this site
    would refuse the cancelled rounds.
    """
    from privet.client.budget.accounts import RoundKey
    from privet.client.budget.releases import open_ledger
    from privet.client.site import load_site

    config = load_site(site)
    ledger = open_ledger(config)
    try:
        digest = _digest_of(site, config, study, {item.study for item in ledger.items(str(config.dataset))})
        rounds = ledger.reserved(str(config.dataset), digest)
        if not rounds:
            typer.echo(
                "nothing to cancel: no round of this study waits to begin here. A site reserves a round when it is "
                "about to train in that round; an approval reserves nothing"
            )
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


def _digest_of(file: Path, config: SiteConfig, study: str, known: set[str]) -> str:
    """Return the digest of the study that an argument names. `known`: those in the ledger, also of ended studies."""
    from privet.client.commands.policy import named_study, study_is_exact
    from privet.client.network.proposals import LEAST_PREFIX

    text = study.removeprefix("sha256:")
    begins = [each for each in known if each.removeprefix("sha256:").startswith(text)]
    if len(begins) == 1 and len(text) >= LEAST_PREFIX:
        return begins[0]
    if study.startswith("sha256:") and study_is_exact(study):
        return study
    return named_study(file, config, study, read=True)[0].digest
