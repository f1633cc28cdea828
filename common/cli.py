"""The `privet` command: finds its sub-commands, and turns errors into messages and exit codes.

Sub-commands are entry points of the group `privet.commands`, so this module imports no other part. Two
entry points `site.join` and `site.serve` become `privet site join` and `privet site serve`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points, version
from typing import Annotated, Any

import click
import typer
from typer.core import TyperCommand

from privet.common.errors import PrivetError

_GROUPS = {
    "attack": "Attack a run or a study, beside an arm without protection.",
    "audit": "Verify a round log, and see what it tells.",
    "base": "Look at a base model.",
    "coordinator": "Found a consortium, say who belongs to it, serve it, and run studies.",
    "data": "Look at a site's data.",
    "site": "Set up a site: what it admits, what has left it, and what its dataset has spent.",
}


_INTERRUPTED = (
    "Interrupted. A run directory keeps its completed rounds; "
    "continue a simulation with `privet simulate --resume RUN`."
)
_EXIT_INTERRUPTED = 130
"""As shells end a program that Ctrl-C stopped: 128 and the number of SIGINT."""


class _Command(TyperCommand):
    def get_help(self, ctx: click.Context) -> str:
        """Return the help. Typer escapes brackets for rich also where nothing is rich."""
        return super().get_help(ctx).replace("\\[", "[")

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Typer ends an interrupted one without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo(_INTERRUPTED, err=True)
            raise typer.Exit(_EXIT_INTERRUPTED) from None


def build_command(arguments: Sequence[str] = ()) -> typer.Typer:
    """Return the command with the sub-command that the arguments name, or with all where they name none.

    Some take seconds to import, which the others need not wait for.
    """
    app = typer.Typer(
        name="privet",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        help="Fine-tune one pretrained model across sites that keep their records to themselves.",
    )
    app.callback()(_callback)
    groups: dict[str, typer.Typer] = {}
    installed = {entry.name: entry for entry in entry_points(group="privet.commands")}
    named = [name for name in (".".join(arguments[:2]), *arguments[:1]) if name in installed]
    for entry in (installed[name] for name in named[:1] or sorted(installed)):
        group, _, name = entry.name.rpartition(".")
        if group and group not in groups:
            groups[group] = typer.Typer(no_args_is_help=True, help=_GROUPS.get(group), rich_markup_mode=None)
            app.add_typer(groups[group], name=group)
        (groups[group] if group else app).command(name=name, cls=_Command)(entry.load())
    return app


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"privet {version('privet')}")
        raise typer.Exit


def _callback(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _printable(text: str) -> str:
    """Return a text for a terminal: an error may quote what a site or a file said."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def main() -> None:
    """Run the command. An expected error ends it with its message on stderr and its exit code."""
    try:
        build_command(sys.argv[1:])()
    except PrivetError as error:
        if "--json" in sys.argv:
            document = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
            typer.echo(json.dumps(document))
        typer.echo(f"error: {_printable(error.message)}", err=True)
        if error.hint:
            typer.echo(f" hint: {_printable(error.hint)}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # while a sub-command was imported
        typer.echo(_INTERRUPTED, err=True)
        sys.exit(_EXIT_INTERRUPTED)
