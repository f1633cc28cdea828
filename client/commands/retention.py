"""The command that says how long a site keeps what, and deletes what is due."""

from __future__ import annotations

from typing import Annotated

import typer

from privet.common.errors import StateError
from privet.common.options import Json, SiteFile
from privet.common.progress import doing


@doing("Looking at what {site} keeps")
def retention(
    site: SiteFile,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete receipts and dossiers that are due, and sign a record of each.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say until when this site keeps log, ledger, receipts and dossiers, by `[retention]` in the site file.

    Nothing is deleted before its time, and log and ledger never. With --delete, a record of each deletion, signed with
    the site's identity key, is written to `deleted/` first.
    """
    from privet.client.retention import kept_by
    from privet.client.site import load_site
    from privet.common import retention as rules_of
    from privet.common.clock import now

    config, folder, time = load_site(site), site.resolve().parent, now()
    rules = config.retention or rules_of.RetentionSection()
    items = kept_by(config, folder)
    records = []
    if delete:
        key = config.identity_key()
        if config.retention is None or key is None:
            raise StateError(
                f"the site file {site} has no table [retention], or names no identity key",
                "add `[retention]` with the years that this site decides; `privet site identity FILE` makes a key",
            )
        due = [each for each in items if each.removable and each.due(rules) <= time]
        target = folder / rules_of.DELETED
        records = [str(rules_of.delete(each, rules, time, config.name, key, target)) for each in due]
        items = kept_by(config, folder)
    typer.echo(rules_of.printed(rules_of.report(items, rules, time), records, as_json=as_json))
    if config.retention is None and not as_json:
        typer.echo("the site file has no table [retention]: these are privet's defaults, and nothing can be deleted")
