"""The `privet` command: it finds its sub-commands, and turns errors into messages and exit codes.

Sub-commands are entry points of the group `privet.commands`, so this module imports no other part. The
entry points `site.join` and `site.serve` become `privet site join` and `privet site serve`. An entry point that has the
name of a group, such as `base`, is what the group does with other words: `privet base DIRECTORY`.
"""

from __future__ import annotations

import ast
import errno
import json
import shlex
import sqlite3
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points, version
from importlib.util import find_spec
from typing import Annotated, Any, NoReturn

import click
import typer
from typer.core import TyperCommand, TyperGroup

from privet.common.errors import Interrupted, PrivetError, StateError, StudyError
from privet.common.progress import at_site, first_line, folded, in_directory, printable
from privet.common.starting import begin

_GROUPS = {
    "attack": "Attack a run or a study, and compare with an unprotected baseline.",
    "base": "Pin a base model in a study (`privet base DIRECTORY`), or import one from another format.",
    "audit": "Verify a round log, read its history, and compare copies of it.",
    "coordinator": "Found a consortium, manage its members, serve it, and run studies.",
    "console": "Open a console in a browser, on this machine alone: of a site, or of a coordinator.",
    "gate": "Pass or refuse a candidate, the adapter of a study with a gate. Sites test and sign it.",
    "registry": "Follow released adapters: where each comes from, what it cost, and whether it is still in use.",
    "site": "Set up a site, decide which studies it admits, and show what left it and what its dataset spent.",
}


_INTERRUPTED = "Interrupted. To continue, run the same command again."
"""For a command that does not say it better: see `Interrupted`."""
_EXIT_INTERRUPTED = 130
"""As shells end a program that Ctrl-C stopped: 128 and the number of SIGINT."""


_SENTENCE = 400
"""Characters: more than a first sentence has."""
_OWN = "pin"
"""Name of a group's own command, which runs where no other is named."""


class _Listed(click.Command):
    """A command that a list of commands shows with its whole first sentence, which the list wraps, instead of a cut."""

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the first sentence of the help, whatever its length."""
        return super().get_short_help_str(max(limit, _SENTENCE))


class _Group(_Listed, TyperGroup):
    """A group that is a command as well: a first word that names no command is an argument of its own command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the arguments name, or the group's own."""
        own = _OWN in self.commands and args[0] not in self.commands
        return super().resolve_command(ctx, [_OWN, *args] if own else args)


class _Command(_Listed, TyperCommand):
    def get_help(self, ctx: click.Context) -> str:
        """Return the help without the backslashes that Typer writes before brackets, for rich, which is off here."""
        return super().get_help(ctx).replace("\\[", "[")

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Read the arguments. Raises `StudyError`, with what to do, where they cannot be meant."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            raise _of_the_arguments(error) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Say what the command does, run it, and say how to continue if Ctrl-C interrupts it."""
        try:
            line = first_line(self.callback, ctx.params)
            if line is not None:
                typer.echo(_printable(line), err=True)
            return super().invoke(ctx)
        except PrivetError as error:
            named = [each.name for each in self.params if "-C" in each.opts]
            error.hint = in_directory(error.hint, ctx.params[named[0]]) if named and named[0] else error.hint
            sites = [ctx.params[str(each.name)] for each in self.params if each.metavar == "SITE"]
            error.hint = at_site(error.hint, sites[0]) if sites and sites[0] else error.hint
            raise
        except KeyboardInterrupt as stopped:  # further up, Typer would turn it into an exit code and print nothing
            said = f"Interrupted. {stopped.standing}" if isinstance(stopped, Interrupted) else _INTERRUPTED
            typer.echo(_printable(said), err=True)
            raise typer.Exit(_EXIT_INTERRUPTED) from None


def _of_the_arguments(error: click.UsageError) -> StudyError:
    """Return the error for arguments that a command does not take, with what the missing one is for."""
    at, words = error.ctx, list[str]()
    while at is not None and at.parent is not None:
        words, at = [str(at.info_name), *words], at.parent
    message, did, like = error.format_message().rstrip(".").partition(" Did you mean")
    meant = f"Did you mean{like} " if did else ""
    if isinstance(error, click.MissingParameter) and error.param is not None and error.ctx is not None:
        name = error.param.opts[0] if isinstance(error.param, click.Option) else error.param.make_metavar(error.ctx)
        text = str(getattr(error.param, "help", None) or "").strip()
        meant = f"{name}: {text} " if text else ""
    command = shlex.join(["privet", *words])
    return StudyError(message.rstrip("."), f"{meant}`{command} --help` lists what the command takes")


def build_command(arguments: Sequence[str] | None = None) -> typer.Typer:
    """Return the command with the one sub-command that the arguments name; with all if they are None.

    Importing a sub-command takes time. A call imports the one that it runs, and none if it only lists them.
    """
    app = typer.Typer(
        name="privet",
        no_args_is_help=True,
        add_completion=False,
        suggest_commands=False,  # click suggests them already
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        help="Fine-tune one pretrained model across sites. Records never leave their site.",
    )
    app.callback()(_callback)
    groups: dict[str, typer.Typer] = {}
    installed = {entry.name: entry for entry in entry_points(group="privet.commands")}
    owning = {name for name in installed if any(other.startswith(f"{name}.") for other in installed)}
    words = arguments or ()
    named = [name for name in (".".join(words[:2]), *words[:1]) if name in installed][:1]
    if named and named[0] in owning:
        named = [name for name in sorted(installed) if name == named[0] or name.startswith(f"{named[0]}.")]
    listing = arguments is not None and not named
    for entry in (installed[name] for name in named or sorted(installed)):
        group, _, name = (entry.name, "", _OWN) if entry.name in owning else entry.name.rpartition(".")
        if group and group not in groups:
            groups[group] = typer.Typer(
                cls=_Group,
                context_settings={"ignore_unknown_options": group in owning},
                no_args_is_help=True,
                suggest_commands=False,
                help=_GROUPS.get(group),
                rich_markup_mode=None,
            )
            app.add_typer(groups[group], name=group)
        (groups[group] if group else app).command(name=name, cls=_Command)(_listed(entry) if listing else entry.load())
    return app


def _listed(entry: EntryPoint) -> Callable[[], None]:
    """Return a function with the help of a command, for a list of commands: the command is read, not imported."""

    def command() -> None:
        raise AssertionError(f"{entry.name} was only listed")

    command.__doc__ = _docstrings(entry.module).get(entry.attr) or entry.load().__doc__
    return command


@lru_cache
def _docstrings(module: str) -> dict[str, str]:
    """Return the docstrings of a module's functions, from its source; none if there is no source."""
    found = find_spec(module)
    source = getattr(found.loader, "get_source", lambda name: None)(module) if found is not None else None
    functions = [node for node in ast.parse(source or "").body if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.get_docstring(node) or "" for node in functions}


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
    """Return a text of several lines without control characters: an error may quote a site or a file."""
    return "\n".join(map(printable, text.split("\n")))


_REMEDIES = {
    errno.ENOSPC: "free space on the disk, then run the command again",
    errno.EDQUOT: "free space in your quota, then run the command again",
    errno.EACCES: "check who may read and write it, then run the command again",
    errno.EPERM: "check who may read and write it, then run the command again",
    errno.EROFS: "choose a place that can be written to",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`), then run the command again",
}


def _of_the_system(error: OSError | sqlite3.Error) -> StateError:
    """Return the error for a fault of the disk, the network or a database that no command has put into words."""
    if isinstance(error, sqlite3.Error):  # without its text, which may quote a row
        code = getattr(error, "sqlite_errorname", type(error).__name__)
        return StateError(f"a database cannot be read or written ({code})", "check the disk and its free space")
    what = "a file or connection" if error.filename is None else str(error.filename)
    hint = _REMEDIES.get(error.errno or 0, "check the path and the disk, then run the command again")
    return StateError(f"{what} cannot be used ({error.strerror or type(error).__name__})", hint)


def main() -> None:
    """Run the command. An expected error ends it with a message on stderr and the error's exit code."""
    begin()
    if not sys.warnoptions:  # what libraries tell developers; errors and the log are for people
        warnings.simplefilter("ignore")
    try:
        build_command(sys.argv[1:])()
    except PrivetError as error:
        _end(error)
    except (OSError, sqlite3.Error) as error:
        _end(_of_the_system(error))
    except KeyboardInterrupt:  # while a sub-command was imported
        typer.echo(_INTERRUPTED, err=True)
        sys.exit(_EXIT_INTERRUPTED)


def _end(error: PrivetError) -> NoReturn:
    if "--json" in sys.argv:
        document = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
        typer.echo(json.dumps(document))
    typer.echo(folded(f"error: {_printable(error.message)}", 7, err=True), err=True)
    if error.hint:
        typer.echo(folded(f" hint: {_printable(error.hint)}", 7, err=True), err=True)
    sys.exit(error.exit_code)
