"""Runs that a coordinator proposes to a site which is set up."""

from __future__ import annotations

from pathlib import Path

from privet.client.commands.setup import setup
from privet.common.log.agreement import run_opened
from privet.common.study.study import Study, load_study
from privet.server.log.journal import open_journal
from privet.server.rounds.state import RunDirectory, RunState
from tests.support.consortium_world import World, run
from tests.support.synthetic import start_adapter

EXAMPLE = load_study(Path("simulations/studies/deploy.toml"))


def begin(world: World, name: str, study: Study, *, logged: bool = True, ended: bool = False) -> None:
    """Make a run as `privet coordinator run` does before its first round."""
    own, adapter = world.coordinator, start_adapter()
    directory = RunDirectory.create(own.directory / "runs" / name, study, adapter, "{}")
    if ended:
        directory.store(RunState(2, adapter, stopped=True))
    if logged:
        with open_journal(own.log_directory, own.keys) as journal:
            journal.say(run_opened(name, study, adapter.digest, journal.clock()))
            journal.sign_head()


def changed(study: Study, **privacy: object) -> Study:
    document = study.document()
    return Study.parse({**document, "privacy": {**document["privacy"], **privacy}})


def settle(world: World) -> Path:
    """Set up berlin, whose files fit `EXAMPLE`, and return its directory."""
    home = world.folder / "berlin"
    rows = (f"text,{EXAMPLE.task.labels[0]},{number}\n" for number in range(300))
    (home / "notes.csv").write_text("note,specialty,patient\n" + "".join(rows))
    done = run(
        setup, home, "--yes", "--train", home / "notes.csv", "--unit=record",
        "--anchor", home / "elsewhere/head.json", "--anchor-same-disk",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return home
