"""The coordinator's commands about its studies: what `run` takes, `resume` takes too."""

from __future__ import annotations

import inspect

import typer
from click import Option
from typer.main import get_command

from privet.server.commands import service
from privet.server.rounds.timing import PATIENT, Timing

SHARED = {"directory", "passphrase_file", "metrics_port", "gather", "round_time", "step_time"}


def options(command: object) -> dict[str, dict[str, object]]:
    """Return all that a user sees of a command's options, by parameter."""
    app = typer.Typer()
    app.command()(command)  # type: ignore[type-var]
    return {each.name or "": each.to_info_dict() for each in get_command(app).params if isinstance(each, Option)}


def test_run_and_resume_take_the_same_options_with_the_same_defaults() -> None:
    begun, resumed = options(service.run), options(service.resume)
    assert begun.keys() & resumed.keys() >= SHARED
    assert {name: begun[name] for name in SHARED} == {name: resumed[name] for name in SHARED}
    # A run has an adapter, of its own or of another run, and a name, once, and may found the consortium; nothing else
    # tells the two apart.
    assert begun.keys() - resumed.keys() == {"adapter", "continued", "name", "yes"}
    assert resumed.keys() <= begun.keys()


def test_the_commands_wait_as_long_as_the_round_loop_does() -> None:
    for command in (service.run, service.resume):
        taken = inspect.signature(command).parameters
        waits = [taken[name].default for name in ("gather", "round_time", "step_time")]
        assert Timing(*waits) == PATIENT == Timing()
