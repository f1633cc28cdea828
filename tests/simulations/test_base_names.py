"""Bases in simulations: a path becomes a name, missing pins are added, and old run directories go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from privet.client.bases.files import pins_of
from privet.client.bases.names import kept_bases
from privet.client.release.opened import mounted, open_release
from privet.common.canonical import canonical_json
from privet.common.errors import StudyError, VerificationError
from privet.server.rounds.state import RunDirectory
from privet.simulations.data.federation import load_plan, plan_of_run, site_files
from privet.simulations.runs.simulate import prepare, reopen
from privet.simulations.runs.toml import absolute_paths
from privet.simulations.sites import load_simulated
from tests.conftest import Run
from tests.simulations.test_simulate import study_file


@pytest.fixture
def folder(bert: Path, tmp_path: Path) -> Path:
    """A study beside its base, called `small`, of which it pins the weights alone."""
    shutil.copytree(bert, tmp_path / "work" / "small")
    weights = {"model.safetensors": pins_of(bert)["model.safetensors"]}
    study_file(tmp_path / "work", bert, {"model.base": "./small", "model.sha256": weights})
    return tmp_path / "work"


def test_a_path_becomes_a_name_and_every_file_is_pinned(folder: Path) -> None:
    plan = load_plan(folder / "study.toml")
    assert plan.study.model.base == "small"
    assert plan.study.model.sha256 == pins_of(folder / "small")
    assert plan.simulation.resources.bases == {"small": (folder / "small").resolve()}
    assert "tokenizer.json" in plan.lines()[0]
    assert "`privet base DIRECTORY`" in plan.lines()[0]


def test_a_digest_does_not_depend_on_where_a_base_is(folder: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    text = (moved / "study.toml").read_text()
    (moved / "study.toml").write_text(text.replace('"./small"', json.dumps(str(folder / "small"))))
    plans = [load_plan(place / "study.toml") for place in (folder, moved)]
    assert plans[0].study.digest == plans[1].study.digest
    # A mapped name means the same, too, and a study that pins everything is not changed.
    (moved / "study.toml").write_text(
        text.replace('"./small"', '"small"') + '["simulation"."resources"."bases"]\n"small" = "small"\n'
    )
    mapped = load_plan(moved / "study.toml")
    assert mapped.study.digest == plans[0].study.digest
    assert mapped.simulation.resources.bases == {"small": (moved / "small").resolve()}


def test_a_wrong_pin_is_not_mended(folder: Path) -> None:
    text = (folder / "study.toml").read_text()
    (folder / "study.toml").write_text(text.replace(pins_of(folder / "small")["model.safetensors"], "0" * 64))
    with pytest.raises(VerificationError, match="expected SHA-256"):
        prepare(folder / "study.toml", folder / "run")


def test_a_base_that_is_not_here_leaves_the_study_as_it_is(folder: Path) -> None:
    text = (folder / "study.toml").read_text()
    (folder / "study.toml").write_text(text.replace('"./small"', '"package:no_such_package_here"'))
    plan = load_plan(folder / "study.toml")
    assert (list(plan.study.model.sha256), plan.added, plan.lines()) == (["model.safetensors"], (), [])
    (folder / "study.toml").write_text(text.replace('"./small"', '"./gone"'))
    with pytest.raises(StudyError, match="there is no directory"):
        load_plan(folder / "study.toml")


def test_no_path_enters_a_runs_study_or_adapter_and_the_run_opens_from_anywhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    simulated = prepare(folder / "study.toml", folder / "run", say=said.append)
    assert any("pinned here" in line for line in said)
    run = simulated.path
    for file in (run / "study.json", *(run / "adapter").glob("*.json")):
        assert str(folder) not in file.read_text()
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "small"
    assert kept_bases(run) == {"small": (folder / "small").resolve()}
    assert load_simulated(site_files(run)[0]).resources.bases == kept_bases(run)
    monkeypatch.chdir("/")
    assert reopen(run).plan.study == simulated.plan.study
    with mounted(open_release(run)):
        pass


def test_a_run_of_an_earlier_version_goes_on_with_its_own_study(folder: Path) -> None:
    whole = pins_of(folder / "small")
    run = prepare(folder / "study.toml", folder / "run").path
    # As it was written before: with the path, and with pinned weights alone.
    old = json.loads((run / "study.json").read_text())
    old["model"] |= {"base": str(folder / "small"), "sha256": {"model.safetensors": whole["model.safetensors"]}}
    (run / "study.json").write_bytes(canonical_json(old))
    (run / "bases.json").unlink()
    begun = RunDirectory.open(run).study
    assert plan_of_run(run, begun).study == begun
    assert reopen(run).plan.study == begun
    with mounted(open_release(run)):
        pass
    # Another base is another study.
    text = (run / "study.toml").read_text()
    (run / "study.toml").write_text(text.replace(whole["model.safetensors"], "0" * 64))
    with pytest.raises(StudyError):
        reopen(run)


def test_a_sweeps_studies_lead_to_the_base_from_another_directory(folder: Path) -> None:
    document = {
        "model": {"base": "./small", "sha256": {"model.safetensors": "0" * 64}},
        "simulation": {"resources": {"bases": {"other": "./small"}}},
    }
    changed = absolute_paths(document, folder)
    assert changed["model"]["base"] == str((folder / "small").resolve())
    assert changed["simulation"]["resources"]["bases"] == {"other": str((folder / "small").resolve())}


def test_check_says_what_it_pinned(privet: Run, folder: Path) -> None:
    code, out, err = privet("check", folder / "study.toml")
    assert code == 0, err
    assert "pinned here" in out
