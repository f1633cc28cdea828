"""What a command says to the person who waits: help at once, a first line at once, progress, and a result."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import time
from importlib.metadata import entry_points

import pytest
from typer.testing import CliRunner

from privet.common.cli import build_command
from privet.common.progress import Stages, closing, doing, duration, first_line, folded
from tests.conftest import Run

COMMANDS = {entry.name: entry for entry in entry_points(group="privet.commands")}
AT_ONCE = {
    "site.identity", "site.init", "site.policy", "site.migrate",
    "coordinator.init", "coordinator.charter", "coordinator.found",
    "coordinator.revoke", "coordinator.members", "coordinator.sign", "coordinator.rotate",
    "site.cancel",
}  # fmt: skip
"""Commands that load no library which takes seconds, and wait for nobody: their result is their first line."""
LOGGED = {"site.serve", "coordinator.serve"}
"""Services, whose first line is a line of their log."""

HELP = """
import io, json, sys
from contextlib import redirect_stdout
from privet.common.cli import build_command
HEAVY = ("torch", "transformers", "peft", "opacus", "flwr", "grpc", "scipy", "numpy", "pydantic", "cryptography",
         "pyarrow", "matplotlib", "jinja2", "safetensors")
found = {}
for path in json.loads(sys.argv[1]):
    with redirect_stdout(io.StringIO()) as said:
        try:
            build_command([*path, "--help"])([*path, "--help"], standalone_mode=False)
        except SystemExit:
            pass
    assert "Usage" in said.getvalue(), path
    loaded = [name for name in HEAVY if name in sys.modules]
    if loaded:
        found[" ".join(path)] = loaded
        break
print(json.dumps(found))
"""

FIRST = """
import io, json, os, sys
from privet.common.cli import main
HEAVY = {"torch", "transformers", "peft", "opacus", "flwr", "grpc", "scipy", "numpy", "pydantic", "cryptography"}

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            os._exit(0)

sys.meta_path.insert(0, Stop())
found = {}
for name, words in json.loads(sys.argv[1]).items():
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2), os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["privet", *name.split("."), *words]
        try:
            main()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as said:
        found[name] = said.readline()
        said.read()
    os.waitpid(child, 0)
print(json.dumps(found))
"""


def run(program: str, argument: object) -> dict[str, str]:
    command = [sys.executable, "-c", program, json.dumps(argument)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_no_help_imports_a_library_that_takes_long() -> None:
    groups = {name.split(".")[0] for name in COMMANDS if "." in name}
    assert run(HELP, [[], *([group] for group in groups), *(name.split(".") for name in sorted(COMMANDS))]) == {}


def required(name: str) -> list[str]:
    """Return words for the parameters that a command asks for."""
    words: list[str] = []
    for parameter in inspect.signature(COMMANDS[name].load(), eval_str=True).parameters.values():
        if parameter.default is inspect.Parameter.empty:
            option, value = (
                "OptionInfo" in str(parameter.annotation),
                "1" if "[int" in str(parameter.annotation) else "x",
            )
            named = next((each.param_decls for each in getattr(parameter.annotation, "__metadata__", ())), None)
            words += [(named or [f"--{parameter.name.replace('_', '-')}"])[0], value] if option else [value]
    return words


def test_each_command_says_first_what_it_does() -> None:
    names = set(COMMANDS) - AT_ONCE - LOGGED - {"simulate"}
    said = run(FIRST, {name: required(name) for name in sorted(names)} | {"simulate": ["x"]})
    wrong = {name: line for name, line in said.items() if not line.endswith(" …\n")}
    assert wrong == {}, "give the command a first line with @doing, or name it in AT_ONCE"
    assert said["simulate"] == "Simulating x …\n"
    assert said["check"].startswith("Checking x")


def test_services_begin_with_a_line_of_their_log() -> None:
    for line in run(FIRST, {name: required(name) for name in sorted(LOGGED)}).values():
        assert json.loads(line)["message"].startswith("opening ")


def test_a_first_line_is_not_for_programs() -> None:
    @doing("Checking {study}")
    def command(study: str, as_json: bool = False) -> None: ...

    assert first_line(command, {"study": "a", "as_json": False}) == "Checking a …"
    assert first_line(command, {"study": "a", "as_json": True}) is None
    assert first_line(lambda: None, {}) is None


def test_a_list_of_commands_is_the_same_whether_they_are_read_or_imported() -> None:
    groups = sorted({name.split(".")[0] for name in COMMANDS if "." in name})
    for path in ([], *([group] for group in groups)):
        asked = [*path, "--help"]
        told = CliRunner().invoke(build_command(asked), asked).output
        assert told == CliRunner().invoke(build_command(), asked).output
        assert len(told.splitlines()) > 5


def test_progress_is_plain_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Stages() as stages:
        stages.tell("loading")
        stages.tell("training", 0, 10)
        for done in range(1, 10):
            now += 10
            stages.tell("training", done, 10, f"round {done}")
        stages.tell("training", 10, 10)
        stages.tell("copying")
        now += 60
        stages.tell("copying", where="file a")
        stages.line("[b]as it is[/b]")
    with Stages(quiet=True) as stages:
        stages.tell("not told")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "loading …",
        "training …",
        "training: round 3, 30 %, about 70 s left …",
        "training: round 6, 60 %, about 40 s left …",
        "training: round 9, 90 %, about 10 s left …",
        "copying …",
        "copying: file a …",
        "[b]as it is[/b]",
    ]


def test_words_for_times_and_ends() -> None:
    assert [duration(seconds) for seconds in (0.1, 59, 150, 4000, 8100)] == [
        "1 s",
        "59 s",
        "2 min",
        "67 min",
        "2 h 15 min",
    ]
    assert closing("Done.", "go on").splitlines() == ["Done.", "next: go on"]


def test_an_engine_that_is_not_installed_is_refused_before_anything_is_read(
    privet: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("ray", "psutil"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)  # Python's own way to say that a module is not there
            code, _, err = privet("simulate", "no-such-study.toml", "--engine", "ray")
        assert code == 2
        assert f"not installed (missing: {package})" in err
        assert "`pip install 'privet[ray]'`" in err


def test_a_terminal_gets_lines_that_end_between_words_and_whole_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "words  " + " ".join(["bamboo"] * 12)
    assert folded(words, 7) == words  # not for a file or a pipe
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "50")
    assert folded(words, 7) == f"words  {' '.join(['bamboo'] * 6)}\n       {' '.join(['bamboo'] * 6)}"
    command = "`privet site setup /srv/site.toml --patient-column COLUMN`"
    assert command in folded(f"the file has no such column: run {command} and then the doctor")
    assert folded("first\n\n  last") == "first\n\n  last"
