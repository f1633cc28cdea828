"""Head starts in whole simulations: alone and before training, with noise of every kind, and with none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from privet.common.audit.bundle import check_bundle, history_of
from privet.common.audit.story import story
from privet.common.errors import StudyError
from privet.common.log.checkpoint import Policy
from privet.common.privacy.accounting import epsilon, plan
from privet.common.study.average import extended
from privet.server.app import LOG, PUBLIC
from privet.server.log.keys import POLICY
from privet.server.rounds.archive import bundle_files
from privet.server.rounds.state import RunDirectory
from privet.simulations.reporting.gather import gather
from privet.simulations.reporting.page import page
from privet.simulations.runs.simulate import RoundReport, prepare, reopen, run_simulation
from tests.simulations.test_simulate import study_file
from tests.support.tiny import private

pytestmark = pytest.mark.slow
HEAD = {"training.head_start": "class-means", "training.sampling_rate": 1.0}
STEP = {"training.local_steps": 1, "training.optimizer": "sgd", "training.learning_rate": 1.0}
SERVER = {"aggregation.method": "ffa", "aggregation.optimizer": "adam", "aggregation.learning_rate": 0.01}
KINDS: dict[str, dict[str, Any]] = {
    "local": {"privacy": private()},
    "shared": {"privacy": private(mode="distributed"), **STEP, **SERVER, "aggregation.largest_count": 100},
    "none": {},
}
BANDED = {
    **KINDS["shared"],
    "privacy": private(mode="distributed", noise="banded", band=2),
    "training.sampling_rate": 0.5,
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_head_start_alone_is_a_classifier_from_one_exchange(tmp_path: Path, bert: Path, kind: str) -> None:
    file = study_file(tmp_path, bert, {**HEAD, **KINDS[kind], "training.rounds": 0})
    summary = run_simulation(prepare(file, tmp_path / "run"))
    state = RunDirectory.open(tmp_path / "run").load()
    assert (state.round, state.stopped, len(state.statements)) == (1, True, 1)
    assert summary["log_verified"]
    assert summary["epsilon"] is None or 7.9 < summary["epsilon"] <= 8.0
    changed = {name for name, value in state.adapter.values.items() if value.any() and ".lora_A." not in name}
    assert changed == {tensor.name for tensor in state.adapter.spec.head()}
    if kind == "none":
        assert summary["accuracy"]["federated"] > summary["accuracy"]["before"]


@pytest.mark.parametrize("kind", list(KINDS))
def test_training_goes_on_from_it(tmp_path: Path, bert: Path, kind: str) -> None:
    file = study_file(tmp_path, bert, {**HEAD, **KINDS[kind], "training.rounds": 2}, {"baselines": ["pooled"]})
    simulated = prepare(file, tmp_path / "run")
    summary = run_simulation(simulated)
    state = RunDirectory.open(tmp_path / "run").load()
    assert summary["log_verified"]
    assert (state.round, state.stopped) == (3, True)
    assert [point["round"] for point in summary["curve"]] == [1, 2, 3]
    digests = [statement["adapter_published"] for statement in state.statements]
    assert len(set(digests)) == 3
    if kind != "none":
        privacy = state.statements[-1]["privacy"]
        mechanism = plan(simulated.plan.study)
        assert mechanism is not None
        assert mechanism.head is not None
        assert privacy["head"] == mechanism.head.document()
        assert epsilon([mechanism.head], mechanism.delta) <= 4.0  # half of the study's, as it is by default
        assert 7.5 < summary["epsilon"] <= 8.0
    assert "computes the head" in page([gather(tmp_path / "run")])


def test_a_head_that_stays_is_what_its_start_made_it_and_is_not_released_again(tmp_path: Path, bert: Path) -> None:
    fixed = {**HEAD, **KINDS["shared"], "training.rounds": 2, "training.train_head": False}
    simulated = prepare(study_file(tmp_path, bert, fixed), tmp_path / "run")
    heads = []

    def note(report: RoundReport) -> None:
        adapter = RunDirectory.open(tmp_path / "run").load().adapter
        heads.append([adapter.values[tensor.name].tobytes() for tensor in adapter.spec.head()])

    assert run_simulation(simulated, note)["log_verified"]
    state = RunDirectory.open(tmp_path / "run").load()
    assert len(heads) == 3
    assert heads[0] == heads[1] == heads[2]
    assert all(value.any() for value in state.adapter.values.values())  # B was trained
    assert not any(".classifier." in name for name in state.optimizer[1])  # type: ignore[index]


def test_correlated_noise_follows_it_and_an_auditor_agrees(tmp_path: Path, bert: Path) -> None:
    file = study_file(tmp_path, bert, {**HEAD, **BANDED, "training.rounds": 4})
    simulated = prepare(file, tmp_path / "run")
    summary = run_simulation(simulated)
    assert summary["log_verified"]
    mechanism = plan(simulated.plan.study)
    assert mechanism is not None
    assert mechanism.sides(5) == [[mechanism.head, mechanism.training, mechanism.training]]
    assert summary["epsilon"] == pytest.approx(mechanism.spent(5))
    assert 7.5 < summary["epsilon"] <= 8.0


def test_a_head_start_of_a_language_model_is_refused(tmp_path: Path, bert: Path) -> None:
    file = study_file(tmp_path, bert, {**HEAD, "task.kind": "causal-lm", "task.labels": []})
    with pytest.raises(StudyError, match="no classes whose means could start a head"):
        prepare(file, tmp_path / "run")


@pytest.mark.parametrize(("kind", "method"), [("tail", "ffa"), ("exponential", "fedsvd")])
def test_an_average_is_published_and_an_auditor_computes_it_again(
    tmp_path: Path, bert: Path, kind: str, method: str
) -> None:
    more = {"aggregation.average": kind, "aggregation.method": method, "training.rounds": 4}
    file = study_file(tmp_path, bert, more)
    summary = run_simulation(prepare(file, tmp_path / "run"))
    assert summary["log_verified"]
    run = RunDirectory.open(tmp_path / "run")
    last = run.load().statements[-1]
    assert (last["average"], last["adapter_published"]) == (kind, summary["adapter_digest"])
    assert last["adapter_after"] != last["adapter_published"]
    files = bundle_files(run, run.path / PUBLIC, with_weights=True)
    policy = Policy.parse((run.path / LOG / POLICY).read_text())
    report = check_bundle(files, policy)
    parts = {"tail": ("0003", "0004"), "exponential": ("0001", "0002", "0003", "0004")}[kind]
    names = [f"averaged/{number}.safetensors" for number in parts]
    assert [name for name in sorted(files) if name.startswith("averaged/")] == names
    assert f"the average of {len(parts)} adapters is the published one" in report.checked
    assert any(f"({kind} average of the rounds' adapters)" in line for line in story(history_of(files, policy)[1]))
    # Without the weights it is not checked, and the verdict says so.
    light = check_bundle(bundle_files(run, run.path / PUBLIC, with_weights=False), policy)
    assert light.ok
    assert any("is the average" in line for line in light.unchecked)
    # An adapter that is missing, changed, or of no average is found.
    for wrong in ({names[0]: files[names[0]][:-1] + b"x"}, {names[0]: None}, {"averaged/0009.safetensors": b""}):
        changed = {name: data for name, data in {**files, **wrong}.items() if data is not None}
        assert not check_bundle(changed, policy).ok


def test_a_coordinator_that_publishes_another_adapter_as_the_average_is_found(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "privet.server.rounds.statements.extended", lambda study, mean, adapter: extended(study, None, adapter)
    )
    file = study_file(tmp_path, bert, {"aggregation.average": "tail", "aggregation.method": "ffa"})
    assert run_simulation(prepare(file, tmp_path / "run"))["log_verified"] is False
    run = RunDirectory.open(tmp_path / "run")
    policy = Policy.parse((run.path / LOG / POLICY).read_text())
    report = check_bundle(bundle_files(run, run.path / PUBLIC, with_weights=True), policy)
    assert "is not the study's average" in report.reason


def test_a_resumed_run_has_the_same_average(tmp_path: Path, bert: Path) -> None:
    file = study_file(tmp_path, bert, {"aggregation.average": "exponential", "aggregation.method": "ffa"})
    whole = run_simulation(prepare(file, tmp_path / "whole"))["adapter_digest"]
    simulated, seen = prepare(file, tmp_path / "parts"), []

    def stop(report: RoundReport) -> None:
        seen.append(report.round)
        if report.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_simulation(simulated, stop)
    assert run_simulation(reopen(tmp_path / "parts"))["adapter_digest"] == whole
