"""The command that says how long a coordinator keeps what, and deletes what is due."""

from __future__ import annotations

from typing import Annotated

import typer

from privet.common.errors import StateError
from privet.common.options import HERE, Directory, Json
from privet.common.progress import doing


@doing("Looking at what the coordinator in {directory} keeps")
def retention(
    directory: Directory = HERE,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete dossiers that are due, and sign a record of each.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say until when this coordinator keeps the round log and dossiers, by `[retention]` in coordinator.toml.

    Nothing is deleted before its time, and the log never. With --delete, a record of each deletion, signed with the
    coordinator's key, is written to `deleted/` first.
    """
    from privet.common import retention as rules_of
    from privet.common.clock import now
    from privet.server.consortium.coordinator import open_coordinator

    made, time = open_coordinator(directory), now()
    rules = made.settings.retention or rules_of.RetentionSection()

    def kept() -> list[rules_of.Item]:
        log = made.log_directory
        logs = [rules_of.Item("log", (log,), rules_of.changed(log))] if log.is_dir() else []
        return logs + rules_of.kept_dossiers(sorted(made.directory.glob("runs/*/dossier*")))

    records = []
    if delete:
        if made.settings.retention is None:
            raise StateError(
                "coordinator.toml has no table [retention]", "add `[retention]` with the years that you decide"
            )
        target, key = made.directory / rules_of.DELETED, made.keys.coordinator
        due = [each for each in kept() if each.removable and each.due(rules) <= time]
        records = [str(rules_of.delete(each, rules, time, made.settings.name, key, target)) for each in due]
    typer.echo(rules_of.printed(rules_of.report(kept(), rules, time), records, as_json=as_json))
