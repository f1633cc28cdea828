"""A consortium as operators run it: every step a command, every party a process, and things going wrong on the way."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from privet.common.cli import build_command
from privet.common.errors import StateError
from privet.server.network.service import link_of
from privet.server.rounds.state import RunDirectory
from privet.simulations.deploy import Deployment, Interpreters, SitePlan, Starter, deployment
from tests.conftest import BASES
from tests.simulations.test_simulate import MASKED, study_file, write_study
from tests.support.forks import Forks
from tests.support.pages import commands, inline
from tests.support.tiny import counting_document, private

SITES = ("alpha", "beta", "gamma")
# Set where the tests run without a network.
ALONE = "PRIVET_TEST_ALONE"
PRIVATE = {"training.rounds": 3, "privacy": private()}


def study_of(folder: Path, base: Path, name: str, **more: object) -> Path:
    """Write a study without its simulation; its sites' data lies beside it."""
    file = study_file(folder / name, base, {**PRIVATE, **more})
    file.write_text(file.read_text().split("[simulation]")[0])
    return file


def coded(file: Path) -> SitePlan:
    """Write a site's records as another program exports them: semicolons, Latin-1, and codes instead of labels."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    labels = dict(zip("JNU", sorted({row["label"] for row in rows}), strict=True))
    codes = {label: code for code, label in labels.items()}
    lines = [f"über {row['text']};{codes[row['label']]};{row['patient']}" for row in rows]
    export = file.with_suffix(".csv")
    export.write_bytes("\r\n".join(["text;label;patient", *lines, ""]).encode("latin-1"))
    return SitePlan(export, len(rows), labels)


def closed_rounds(run: Path) -> int:
    if not (run / "study.json").exists():
        return 0
    statements = RunDirectory.open(run).load().statements
    return sum(statement["type"] == "round-close" for statement in statements)


def wait_for(run: Path, rounds: int, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while closed_rounds(run) < rounds:
        assert time.monotonic() < deadline, f"no {rounds} rounds within {seconds} s"
        time.sleep(0.05)


def start_of(made: Deployment, study: Path) -> Path:
    """Make the adapter that a study starts from; `coordinator run` itself starts an interpreter to make it."""
    start = study.parent / "start"
    made.privet("adapter", study, start)
    return start


def audit(made: Deployment, run: Path, folder: Path) -> tuple[dict[str, object], str]:
    """Pack the run, and verify and read it against the policy that a site holds."""
    tar, policy = folder / f"{run.name}.tar", made.folder / "alpha" / "consortium" / "log.policy"
    made.privet("audit", "bundle", run, "--out", tar)
    verdict = json.loads(made.privet("audit", "verify", tar, "--policy", policy, "--json"))
    return verdict, made.privet("audit", "show", tar, "--policy", policy)


AFTERWARDS = {
    "docs/operate-site.md": ("data", "site studies", "site check", "site budget", "site receipts", "site adapters",
                             "site personalise"),
    "docs/operate-coordinator.md": ("coordinator charter", "coordinator members", "audit bundle", "adapter"),
    "docs/site-policy.md": ("site policy SITE", "site check"),
    "docs/deployment.md": ("site doctor SITE",),
}  # fmt: skip
"""Commands of the operators' pages that are run, as they stand there, once a run has ended."""


def follow(made: Deployment, study: Path, base: Path) -> list[str]:
    """Run the operators' pages: each of these commands, with this deployment's names; return the commands.

    Within this process: starting one takes longer than most of them.
    """
    names = {
        "site/site.toml": made.site("alpha"), "site/": made.folder / "alpha", "SITE": made.site("alpha"),
        "DIR": made.coordinator, "DIR/runs/study": made.coordinator / "runs" / "first",
        "study.toml": study, "STUDY": study, "RUN": "first", "triage": "first", "DIRECTORY": base,
    }  # fmt: skip
    lines = [
        line
        for page, begins in AFTERWARDS.items()
        for line in dict.fromkeys((*commands(page), *inline(page)))
        if line.startswith(tuple(f"privet {begin}" for begin in begins))
        and "--init" not in line
        and not names.keys().isdisjoint(line.split())  # not a command that is only mentioned
    ]
    for line in lines:
        words = [str(names.get(word, word)) for word in shlex.split(line)[1:]]
        done = CliRunner().invoke(build_command(), words)
        # The study has been run, and sites run each of its rounds once.
        spent = done.exit_code == 3 and line.startswith("privet site check") and "E_SPENT" in done.output
        assert done.exit_code == 0 or spent, (line, done.output, done.exception)
    return lines


def namespaces() -> bool:
    """Whether this machine lets us cut programs off from its network."""
    return subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("command", [("--version",), ("privacy", "nowhere")], ids=" ".join)
def test_a_command_is_a_python_of_its_own_and_a_forked_one_is_like_it(
    tmp_path: Path, forks: Forks, command: tuple[str, ...]
) -> None:
    environment = {**os.environ, "COLUMNS": "200"}
    alone, forked = Interpreters().run(command, environment), forks.run(command, environment)
    assert (forked.returncode, forked.stdout) == (alone.returncode, alone.stdout)
    assert forked.stderr == alone.stderr
    starters: tuple[Starter, ...] = Interpreters(), forks
    for number, starter in enumerate(starters):
        file = tmp_path / str(number)
        with file.open("wb") as log:
            program = starter.start(command, environment, log)
        assert program.wait(60) == program.returncode == alone.returncode
        assert sorted(file.read_text().splitlines()) == sorted((alone.stdout + alone.stderr).splitlines())


@pytest.mark.slow
@pytest.mark.skipif(not namespaces(), reason="no network namespaces here: the study is run with a network, below")
def test_all_of_it_works_without_any_network_but_loopback(bert: Path, tmp_path: Path) -> None:
    test = f"{__file__}::{test_a_study_ends_though_everybody_is_killed_once_and_an_auditor_sees_it_all.__name__}"
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'inner'}", test]
    script = f"ip link set lo up && exec {shlex.join(run)}"
    environment = {**os.environ, ALONE: "1", BASES: str(bert.parent)}
    command = ["unshare", "-rn", "sh", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "1 passed" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(namespaces() and ALONE not in os.environ, reason="run above, without a network")
def test_a_study_ends_though_everybody_is_killed_once_and_an_auditor_sees_it_all(
    bert: Path, tmp_path: Path, forks: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ALONE in os.environ:
        assert [name for _, name in socket.if_nameindex()] == ["lo"]
    study = study_of(tmp_path, bert, "first")
    plans = {name: SitePlan(study.parent / f"{name}.jsonl", 60) for name in SITES}
    plans["gamma"] = coded(plans["gamma"].train)
    with deployment(tmp_path / "consortium", study, plans, lambda line: None, forks) as made:
        run = made.coordinator / "runs" / "first"
        start = ("--yes", "-C", made.coordinator, "--gather", 300)
        made.start("run", "coordinator", "run", study, "--name", "first", *start)
        wait_for(run, 1)
        made.end("run", kill=True)
        made.end("beta", kill=True)
        made.end("coordinator", kill=True)
        made.serve()
        made.start("beta", "site", "serve", made.site("beta"))
        made.connected(3)
        output = made.privet("coordinator", "resume", "first", "-C", made.coordinator, "--gather", 300)
        assert f"ended after round 3: {run / 'release'}" in output

        verdict, story = audit(made, run, tmp_path)
        assert verdict["ok"], verdict
        assert sorted(map(str, verdict["cosigners"])) == list(SITES)  # type: ignore[call-overload]
        statements = RunDirectory.open(run).load().statements
        closed = [statement for statement in statements if statement["type"] == "round-close"]
        assert len(statements) == 3
        assert len(closed) >= 2
        for name in SITES:
            receipts = json.loads(made.privet("site", "receipts", made.site(name), "--json"))["receipts"]
            taken = [receipt["round"] for receipt in receipts]
            assert len(taken) == len(set(taken))
            assert {statement["round"] for statement in closed if name in statement["survivors"]} <= set(taken)
        assert "consortium demo begins with alpha, beta, gamma" in story

        # A site receives what was released and measures it, also when the coordinator has gone; then it is revoked.
        alpha, records = made.site("alpha"), plans["alpha"].train
        assert "is verified" in made.privet("site", "get", alpha, "first")
        made.end("coordinator", kill=True)
        measured = json.loads(made.privet("site", "evaluate", alpha, "first", "--data", records, "--json"))
        assert measured["records"] == 60
        made.serve()
        made.connected(3)
        monkeypatch.chdir(tmp_path)
        assert len(follow(made, study, bert)) > 15
        at = ("-C", made.coordinator)
        assert "in the round log" in made.privet("registry", "revoke", "first", "--reason", "wrong labels", *at)
        (row,) = json.loads(made.privet("site", "adapters", alpha, "--json"))["adapters"]
        assert (row["state"], row["reason"]) == ("revoked", "wrong labels")
        with pytest.raises(StateError, match="revoked this adapter: wrong labels"):
            made.privet("site", "evaluate", alpha, "first", "--data", records)

        # A study that nobody approved is refused by each site, in words, with a statement in the log.
        other = study_of(tmp_path, bert, "second", **{"privacy.epsilon": 7.0})
        begun = ("--adapter", start_of(made, other))
        with pytest.raises(StateError, match="has not approved study"):
            made.privet("coordinator", "run", other, "--name", "second", *start[:-1], 20, *begun)
        # A site that is revoked is cut off, and the log says so.
        made.privet("coordinator", "revoke", "gamma", "--reason", "left", "-C", made.coordinator)
        link, deadline = link_of(made.coordinator), time.monotonic() + 60
        while sum(node.online for node in link.nodes()) > 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        status = json.loads(made.privet("coordinator", "status", "-C", made.coordinator, "--json"))
        assert status["nodes_online"] == 2
        assert made.programs["gamma"].poll() is None  # it goes on asking, and says why in its own log
        made.programs["alpha"].send_signal(signal.SIGTERM)
        assert made.programs["alpha"].wait(30) == 0


GATE = {"signatures": 3, "canaries": 20}


def restarted(made: Deployment, name: str, *lines: str) -> None:
    """Add lines to the top of a site's file, and start its process again."""
    site = made.site(name)
    site.write_text("\n".join([*lines, site.read_text()]))
    made.end(name)
    made.start(name, "site", "serve", site)
    made.connected(3)


def refused_by_one(made: Deployment, run: Path, at: tuple[object, ...]) -> None:
    """Let two of three sites sign the candidate of a run, and one refuse it: it is never released."""
    name, alpha = run.name, made.site("alpha")
    assert f"{name}  " in made.privet("site", "adapters", alpha)
    tested = json.loads(made.privet("gate", "test", alpha, name, "--json"))
    assert (tested["tested"], tested["failed"], tested["canary"]["canaries"]) == (["canary"], [], 40)
    with pytest.raises(StateError, match="is a candidate, for tests alone"):
        made.privet("predict", alpha.parent / "candidates" / name, "--text", "a note")
    made.privet("gate", "sign", alpha, name)
    for site in ("beta", "gamma"):
        assert "planted no canaries" in made.privet("gate", "test", made.site(site), name)
    made.privet("gate", "sign", made.site("beta"), name)
    made.privet("gate", "refuse", made.site("gamma"), name, "--reason", "our committee has not met")
    with pytest.raises(StateError, match="signatures: 2 sites have signed, 3 are needed"):
        made.privet("gate", "decide", name, *at)
    made.privet("gate", "decide", name, "--refuse", "one of three hospitals refuses", *at)
    for step in (
        ("coordinator", "resume", name, *at, "--gather", 300),
        ("gate", "status", name, *at),
    ):
        assert str(run / "release") not in made.privet(*step)
    assert not (run / "release").exists()
    for out in (
        ("site", "get", alpha, name),
        ("registry", "show", name, *at),
        ("export", run, run.parent / "out"),
    ):
        with pytest.raises(StateError, match=r"was refused at its gate|for tests alone"):
            made.privet(*out)


def passed_by_all(made: Deployment, run: Path, at: tuple[object, ...]) -> None:
    """Let all three sites sign the candidate of a run: it is released, and received."""
    for site in SITES:
        made.privet("gate", "test", made.site(site), run.name)
        made.privet("gate", "sign", made.site(site), run.name)
    assert "signed by alpha, beta, gamma" in made.privet("gate", "decide", run.name, *at)
    output = made.privet("coordinator", "resume", run.name, *at, "--gather", 300)
    assert f": {run / 'release'}" in output
    assert "is verified" in made.privet("site", "get", made.site("beta"), run.name)
    assert json.loads(made.privet("gate", "status", run.name, *at, "--json"))["gates"][0]["state"] == "released"


@pytest.mark.slow
def test_keys_are_rotated_between_two_rounds_and_the_run_goes_on(bert: Path, tmp_path: Path, forks: Forks) -> None:
    study = study_of(tmp_path, bert, "first", **{"training.rounds": 6, "gate": GATE})
    plans = {name: SitePlan(study.parent / f"{name}.jsonl", 60) for name in SITES}
    with deployment(tmp_path / "consortium", study, plans, lambda line: None, forks) as made:
        run, at = made.coordinator / "runs" / "first", ("-C", made.coordinator)
        restarted(made, "alpha", "canaries = 40")
        start = ("--yes", *at, "--gather", 300, "--adapter", start_of(made, study))
        made.start("run", "coordinator", "run", study, "--name", "first", *start)
        wait_for(run, 1)
        (run / "stop").touch()  # as `privet coordinator stop` does, which takes longer to start than a round
        assert made.programs["run"].wait(120) == 0
        assert closed_rounds(run) < 6
        early, _ = audit(made, run, tmp_path)
        assert early["verdict"] == "verified"
        (tmp_path / "first.tar").rename(tmp_path / "early.tar")
        old = tmp_path / "old.policy"
        old.write_bytes((made.folder / "alpha/consortium/log.policy").read_bytes())

        said = made.privet("coordinator", "rotate", "--keys", *at)
        words = json.loads(made.privet("coordinator", "charter", *at, "--json"))["words"]
        assert words in said
        # Nobody has confirmed the keys: no site cosigns, and each says what its operator has to do.
        with pytest.raises(StateError, match="has not confirmed that key") as refused:
            made.privet("coordinator", "resume", "first", *at, "--gather", 20)
        assert "privet site trust SITE" in refused.value.message
        for name in SITES:  # the sites' processes go on meanwhile
            made.privet("site", "trust", made.site(name), "--words", words)
        output = made.privet("coordinator", "resume", "first", *at, "--gather", 300)
        assert "ended after round 6 with a candidate" in output
        assert made.programs["coordinator"].poll() is None
        refused_by_one(made, run, at)

        again = study_of(tmp_path, bert, "again", **{"training.rounds": 1, "seed": 1, "gate": GATE})
        for name in SITES:
            made.privet("site", "approve", made.site(name), again)
        begun = (*at, "--gather", 300, "--adapter", start_of(made, again))
        assert "with a candidate" in made.privet("coordinator", "run", again, "--name", "again", *begun)
        passed_by_all(made, made.coordinator / "runs" / "again", at)
        verdict, story = audit(made, made.coordinator / "runs" / "again", tmp_path)
        assert verdict["verdict"] == "verified", verdict
        assert "gamma REFUSES the candidate" in story
        assert "is refused: one of three hospitals refuses" in story
        assert "is accepted" in story

        verdict, story = audit(made, run, tmp_path)
        assert verdict["verdict"] == "verified", verdict
        assert sorted(map(str, verdict["cosigners"])) == list(SITES)  # type: ignore[call-overload]
        assert "the keys of log and coordinator are replaced" in story
        policy = made.folder / "alpha/consortium/log.policy"
        made.privet("audit", "verify", tmp_path / "early.tar", "--policy", old)
        for bundle, trusted, why in (
            ("first.tar", old, "rotates the key that the policy trusts"),
            ("early.tar", policy, "use the policy of that time"),
        ):
            done = forks.run(("audit", "verify", tmp_path / bundle, "--policy", trusted), os.environ)
            assert done.returncode == 1
            assert why in done.stdout


@pytest.mark.slow
def test_a_head_start_alone_is_one_exchange_of_three_deployed_sites(bert: Path, tmp_path: Path, forks: Forks) -> None:
    step = {"training.local_steps": 1, "training.optimizer": "sgd", "training.learning_rate": 1.0}
    shared = {"privacy": private(mode="distributed"), "aggregation.largest_count": 100, **step}
    alone = {"training.rounds": 0, "training.head_start": "class-means"}
    study = study_of(tmp_path, bert, "means", **{**shared, **alone})
    plans = {name: SitePlan(study.parent / f"{name}.jsonl", 60) for name in SITES}
    with deployment(tmp_path / "consortium", study, plans, lambda line: None, forks) as made:
        run = made.coordinator / "runs" / "means"
        start = ("--yes", "-C", made.coordinator, "--gather", 300, "--adapter", start_of(made, study))
        output = made.privet("coordinator", "run", study, "--name", "means", *start)
        assert f"ended after round 1: {run / 'release'}" in output
        verdict, _ = audit(made, run, tmp_path)
        assert verdict["ok"], verdict
        (statement,) = RunDirectory.open(run).load().statements
        assert statement["survivors"] == list(SITES)
        assert statement["privacy"]["training"]["sampling_rate"] == 1.0
        assert "Round 1 is a head start" in (run / "release" / "privacy_statement.md").read_text()
        spent = json.loads(made.privet("site", "budget", made.site("alpha"), "--json"))
        assert 7.9 < spent["epsilon"] <= 8.0
        receipts = json.loads(made.privet("site", "receipts", made.site("alpha"), "--json"))["receipts"]
        assert [receipt["round"] for receipt in receipts] == [1]
        made.privet("report", run, "--out", tmp_path / "report.html")
        assert "computes the head" in (tmp_path / "report.html").read_text()

        # The same sites count their records, which each of them admits and approves; then they measure the adapter.
        released = statement["adapter_published"]
        asked: dict[str, dict[str, object]] = {
            "statistics": {"privacy": private(epsilon=1.0, mode="distributed")},
            "evaluate": {"privacy": private(epsilon=2.0, mode="distributed"), "evaluation": {"adapter": released}},
        }
        for kind, more in asked.items():
            document = counting_document(bert, kind, {**MASKED, **more, "aggregation.largest_count": 100, "name": kind})
            file = write_study(tmp_path / f"{kind}.toml", document)
            for name in SITES:
                policy = made.site(name).parent / "policy.toml"
                rules = policy.read_text().replace("allow = []", 'allow = ["statistics", "evaluate"]')
                policy.write_text(rules.replace("max_studies_per_day = 2", "max_studies_per_day = 3"))
                said = made.privet("site", "approve", made.site(name), file)
                assert "NOTHING is trained" in said
            source = () if kind == "statistics" else ("--continue", "means")
            output = made.privet("coordinator", "run", file, *source, "-C", made.coordinator, "--gather", 300)
            run = made.coordinator / "runs" / kind
            assert "ended after round 1" in output
            verdict, _ = audit(made, run, tmp_path)
            assert verdict["ok"], verdict
            units = json.loads((run / "release" / "counts.json").read_bytes())["cells"][0]
            assert abs(units["value"] - 180) < 3.1 * (units["high"] - units["value"])  # within 6 deviations
            made.privet("report", run, "--out", tmp_path / f"{kind}.html")
            assert "All sites together" in (tmp_path / f"{kind}.html").read_text()
        # One account composes what was trained, counted and measured.
        spent = json.loads(made.privet("site", "budget", made.site("alpha"), "--json"))
        assert 8.0 < spent["epsilon"] < 11.0
