"""A run of real sites is read as a simulated one is, also from a copy: report, bundle, privacy statement."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from privet.common.errors import StateError
from privet.server.commands.audit import bundle, privacy
from privet.server.rounds.rounds import run_study
from privet.server.rounds.run_log import RunLog
from privet.server.rounds.state import RunDirectory
from privet.server.studies import line_of
from privet.simulations.commands import compare
from privet.simulations.reporting.commands import report
from privet.simulations.reporting.gather import gather
from privet.simulations.reporting.page import page
from tests.conftest import Run
from tests.simulations.test_reporting import inert
from tests.support.consortium_world import run
from tests.support.logged_world import QUICK, LoggedWorld, world_of
from tests.support.masked_world import masked_study
from tests.support.synthetic import PEFT_CONFIG, start_adapter
from tests.support.tiny import private

PRIVATE = {"privacy": private(), "data": {"validation_fraction": 0.2}, "training": {"rounds": 3}}


def deployed(folder: Path, world: LoggedWorld, name: str = "flu") -> Path:
    """Run the world's study in the layout of a coordinator's directory, and return the run's directory."""
    home = folder / "coordinator"
    directory = RunDirectory.create(home / "runs" / name, world.study, start_adapter(), PEFT_CONFIG)
    with world.journal() as journal:
        run_study(RunLog(journal, directory, name, home / "public"), world.exchange, timing=QUICK)
    return directory.path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> LoggedWorld:
    made = world_of(tmp_path_factory.mktemp("world"), masked_study(**PRIVATE))
    for site in made.sites.values():
        # Units, loss over its cap, and units that are right, as a site of that round would measure them.
        site.metrics = lambda number: (10.0, 10.0 * 0.1 / number, 4.0 + number)
    return made


@pytest.fixture(scope="module")
def path(world: LoggedWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deployed(tmp_path_factory.mktemp("deployed"), world)


def test_a_round_says_what_was_measured_before_it(path: Path) -> None:
    first, _, last = RunDirectory.open(path).load().statements
    for statement, share in ((first, 0.5), (last, 0.7)):
        # Thirty units, and the noise of three sites on both sums.
        units, noise = (statement["metrics"][f"validation_{name}"] for name in ("units", "noise"))
        variance = share * (1 - share) / units + (noise / units) ** 2 * (1 + share**2)
        within = round(196 * variance**0.5)
        assert within > round(196 * (share * (1 - share) / 30) ** 0.5)
        assert f"; before it, validation accuracy {share:.1%} (\u00b1 {within}), loss ".replace("%", " %") in line_of(
            statement
        )


def test_a_report_shows_the_validation_of_each_round_and_says_what_it_lacks(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    result = run(report, path, "--out", out)
    assert result.exit_code == 0, result.output
    read = inert(out.read_text())
    said = read.said
    assert "3 sites trained one model together in 3 rounds" in said
    assert "validation accuracy 50.0 %" in said
    assert "and validation accuracy 70.0 %" in said
    assert "a test on each site's records" in said
    assert "privet site evaluate SITE RUN" in said
    assert "epsilon spent, at most" in said
    assert "site-0000, site-0001, site-0002" in said
    assert "A simulation" not in said
    assert "public seed" not in said


def test_a_copy_elsewhere_gives_the_same_report_and_privacy_statement(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "flu"
    shutil.copytree(path, copy)
    assert page([gather(copy)]) == page([gather(path)])
    assert run(privacy, copy, "--json").output == run(privacy, path, "--json").output
    assert json.loads((copy / "privacy_statement.json").read_bytes())["simulated"] is False
    with pytest.raises(StateError, match="is neither in") as caught:
        run(bundle, copy, "--out", tmp_path / "copy.tar")
    assert "--public" in caught.value.hint


def test_a_bundle_of_a_deployed_run_needs_no_options_and_verifies(
    privet: Run, world: LoggedWorld, path: Path, tmp_path: Path
) -> None:
    tar, policy = tmp_path / "flu.tar", world.folder / "log" / "policy"
    assert privet("audit", "bundle", path, "--out", tar)[0] == 0
    code, out, _ = privet("audit", "verify", tar, "--policy", policy)
    assert (code, out.split(":")[0]) == (0, "verified")
    code, out, _ = privet("audit", "show", tar, "--policy", policy)
    assert "validation_accuracy 0.7" in out


def test_a_run_without_validation_and_one_within_its_rounds_are_reported(tmp_path: Path) -> None:
    world = world_of(tmp_path / "world", masked_study(training={"rounds": 2}))
    path = deployed(tmp_path, world)
    read = inert(page([gather(path), gather(path)]))
    assert "Nobody has measured how good this model is" in read.said
    assert "not measured" in read.said
    # Before the last round is cosigned, its statement is not published; what it cost is known all the same.
    (path / "rounds/0002.json").unlink()
    assert "Round 2 is counted, but not published yet" in run(privacy, path).output
    (path / "rounds/0001.json").unlink()
    with pytest.raises(Exception, match=r"0001\.json is missing"):
        run(privacy, path)


def test_what_was_never_begun_is_no_deployed_run(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run", masked_study(), start_adapter(), PEFT_CONFIG)
    with pytest.raises(StateError, match="not finished"):
        gather(directory.path)


def test_runs_of_real_sites_are_compared_by_what_they_measured(
    world: LoggedWorld, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    blind = world_of(tmp_path / "blind", masked_study(**{**PRIVATE, "data": {}, "training": {"rounds": 2}}))
    other = deployed(tmp_path / "other", blind, "blind")
    said = run(compare, path, other).output
    assert all(len(line) <= 80 for line in said.splitlines() if "│" in line)
    text = " ".join(said.split())
    for part in (
        "│ flu │ ",
        " 3 of 3 │ 50.0 % │ 70.0 % │",
        " 2 of 2 │ - │ - │",
        "blind: no figure of quality, as its study holds out no units for validation",
        "data.validation_fraction │ 0.2 │ 0 │",
        "training.rounds │ 3 │ 2 │",
        "Highest validation accuracy before the last round: flu with 70.0 %.",
    ):
        assert part in text, part
    document = json.loads(run(compare, path, other, "--json").output)
    assert [row["federated"] for row in document["rows"]] == [pytest.approx(0.7, abs=1e-3), None]
    assert set(document["differs"]) == {"data.validation_fraction", "training.rounds"}
    assert "none has a figure of quality" in run(compare, other).output
