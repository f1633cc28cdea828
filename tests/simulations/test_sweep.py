"""Sweeps and comparisons: checked as a whole, resumed without repeating, marked for what tuning costs."""

from __future__ import annotations

import json
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.common.errors import StateError, StudyError
from privet.common.privacy.accounting import epsilon, plan
from privet.common.study.reading import validate
from privet.simulations.data.federation import plan_of
from privet.simulations.runs import sweep as module
from privet.simulations.runs.compare import ask, compare_runs, load_question
from privet.simulations.runs.sweep import Span, Sweep, composed_promise, load_sweep, run_sweep, tuning_of
from privet.simulations.runs.toml import to_toml
from privet.simulations.terminal.tables import answer_table, runs_tables, save_sweep_figure, sweep_table
from tests.conftest import Run
from tests.support.forks import training_processes
from tests.support.scenarios import scenario_file
from tests.support.tiny import private, tiny_study

WHOLE = {"training": {"sampling_rate": 1.0}}  # what is not sampled is accounted fast
QUICK = {"training.rounds": 1, "training.local_steps": 1, "secure_aggregation.mode": "plain"}


def sweep_file(folder: Path, base: Path, document: dict[str, Any], overrides: dict[str, Any] | None = None) -> Path:
    scenario_file(folder, base, overrides={**QUICK, **(overrides or {})})
    path = folder / "sweep.toml"
    path.write_text(to_toml({"study": "study.toml", "data": "public", **document}))
    return path


# What is asked


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ({"fields": {}}, "fields"),
        ({"fields": {"seed": []}}, "fields"),
        ({"fields": {"seed": [1]}, "samples": 3}, "samples"),
        ({"fields": {"seed": [1]}, "search": "random"}, "samples"),
        ({"fields": {"lora.rank": {"low": 1, "high": 4}}}, "takes a list"),
        ({"fields": {"seed": {"low": 4, "high": 1}}, "search": "random", "samples": 1}, "expected low < high"),
        (
            {"fields": {"seed": {"low": 0, "high": 1, "scale": "log"}}, "search": "random", "samples": 1},
            "expected a number above 0",
        ),
        ({"fields": {"seed": [1]}, "data": "mine"}, "data"),
        ({"fields": {"lora.rang": [1]}}, "lora.rang: unknown key"),
        ({"fields": {"lora.rank": [4, 0]}}, "1 of 2 settings give no valid study"),
        ({"fields": {"name.x": [1]}}, "name is not a table"),
        ({"fields": {"simulation.partition.sites": [3, 1]}}, "1 of 2 settings"),
        ({"fields": {"seed": [1]}, "study": "missing.toml"}, "no study file"),
        ({"fields": {"seed": [1]}, "colour": 1}, "colour: unknown key"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_as_a_whole(
    document: dict[str, Any], complaint: str, tmp_path: Path, bert: Path
) -> None:
    with pytest.raises(StudyError, match=complaint):
        load_sweep(sweep_file(tmp_path, bert, document))


def test_a_grid_has_every_combination_and_each_is_a_run_of_its_own(tmp_path: Path, bert: Path) -> None:
    fields = {"lora.rank": [2, 4], "aggregation.method": ["ffa", "fedavg"], "training.learning_rate": [0.1, 0.01]}
    _, entries = load_sweep(sweep_file(tmp_path, bert, {"fields": fields}))
    assert len(entries) == len({entry.identity for entry in entries}) == 8
    assert entries[1].plan.study.training.learning_rate == 0.01
    assert entries[1].plan.study.lora.rank == 2
    assert [entry.identity for entry in load_sweep(tmp_path / "sweep.toml")[1]] == [e.identity for e in entries]


@given(st.floats(0, 1, exclude_max=True), st.sampled_from(["linear", "log"]), st.booleans())
def test_a_span_stays_within_its_ends(fraction: float, scale: Any, integer: bool) -> None:
    value = Span(low=2, high=64, scale=scale, integer=integer).at(fraction)
    assert 2 <= value <= 64
    assert isinstance(value, int) == integer


def test_a_random_search_is_its_seeds(tmp_path: Path, bert: Path) -> None:
    fields = {"training.learning_rate": {"low": 1e-4, "high": 1e-1, "scale": "log"}, "lora.rank": [2, 4]}
    asked = {"search": "random", "samples": 6, "fields": fields}
    _, entries = load_sweep(sweep_file(tmp_path, bert, asked))
    again = load_sweep(sweep_file(tmp_path, bert, asked))[1]
    other = load_sweep(sweep_file(tmp_path, bert, {**asked, "seed": 1}))[1]
    assert [entry.fields for entry in entries] == [entry.fields for entry in again]
    assert [entry.fields for entry in entries] != [entry.fields for entry in other]
    rates = [entry.plan.study.training.learning_rate for entry in entries]
    assert len(set(rates)) == 6
    assert 1e-4 <= min(rates) <= max(rates) <= 1e-1


def test_the_study_files_of_runs_mean_the_same_anywhere(tmp_path: Path, bert: Path) -> None:
    _, (entry,) = load_sweep(sweep_file(tmp_path, bert, {"fields": {"seed": [3]}}))
    written = tomllib.loads(to_toml(entry.document))
    assert plan_of(written, Path("/nowhere")).study == entry.plan.study
    assert written["simulation"]["partition"]["train"] == [str(tmp_path / "train.jsonl")]


# Resuming


def finished(out: Path) -> dict[str, int]:
    return {file.parent.name: file.stat().st_mtime_ns for file in out.glob("runs/*/summary.json")}


def sweep_at(file: Path, out: Path) -> None:
    run_sweep(*load_sweep(file), out, lambda entry, row: None)


@pytest.mark.slow
def test_a_sweep_killed_half_way_resumes_without_repeating(tmp_path: Path, bert: Path) -> None:
    file = sweep_file(tmp_path, bert, {"fields": {"seed": [1, 2, 3]}})
    out = tmp_path / "out"
    process = training_processes().Process(target=sweep_at, args=(file, out))
    process.start()
    deadline = time.monotonic() + 120
    while not finished(out) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    before = finished(out)
    assert 1 <= len(before) < 3, "the kill came too late to show anything"
    sweep, entries = load_sweep(file)
    result = run_sweep(sweep, entries, out, lambda entry, row: None)
    after = finished(out)
    assert {name: after[name] for name in before} == before
    assert len(after) == result["finished"] == 3
    whole = run_sweep(sweep, entries, tmp_path / "whole", lambda entry, row: None)
    drop = [{key: value for key, value in row.items() if key != "seconds"} for row in result["rows"]]
    assert drop == [{key: value for key, value in row.items() if key != "seconds"} for row in whole["rows"]]


def test_a_directory_holds_one_sweep(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "run_entry", lambda entry, out, **_: {"outcome": {"ended": "DivergedError"}})
    run_sweep(*load_sweep(sweep_file(tmp_path, bert, {"fields": {"seed": [1]}})), tmp_path / "out", lambda e, r: None)
    other = load_sweep(sweep_file(tmp_path, bert, {"fields": {"seed": [2]}}))
    with pytest.raises(StateError, match="other settings"):
        run_sweep(*other, tmp_path / "out", lambda e, r: None)
    with module.claimed(tmp_path / "held", {}), pytest.raises(StateError, match="another process uses"):
        run_sweep(*other, tmp_path / "held", lambda e, r: None)


def test_a_run_that_diverges_is_a_result_and_not_repeated(tmp_path: Path, bert: Path) -> None:
    overrides = {"training.optimizer": "sgd", "training.local_steps": 3}
    fields = {"lora.alpha": [8.0, 1e30]}
    sweep, entries = load_sweep(sweep_file(tmp_path, bert, {"fields": fields}, overrides))
    result = run_sweep(sweep, entries, tmp_path / "out", lambda entry, row: None)
    assert [row["outcome"] for row in result["rows"]] == ["completed", "DivergedError"]
    assert result["best"] == result["rows"][0]["id"]
    assert run_sweep(sweep, entries, tmp_path / "out", lambda entry, row: None) == result
    assert save_sweep_figure(result, tmp_path / "sweep.png") is None  # one value has no result
    sweep_table(result)


# What tuning costs


def test_tuning_on_private_data_says_what_all_runs_cost(bert: Path) -> None:
    studies = [tiny_study(bert, privacy=private(epsilon=value), **WHOLE) for value in (2.0, 8.0)]
    found = tuning_of("private", studies)
    events = [event for study in studies if (p := plan(study)) for event in [p.training] * study.training.rounds]
    assert found["composed"]["epsilon"] == pytest.approx(epsilon(events, 1e-3, "rdp"), abs=1e-3)
    assert found["composed"]["epsilon"] > 8.0
    assert "TUNED ON PRIVATE DATA" in found["says"]
    assert f"epsilon {found['composed']['epsilon']:.2f}" in found["says"]
    assert composed_promise([*studies, tiny_study(bert)]) is None
    assert "no epsilon bounds the cost" in tuning_of("private", [tiny_study(bert)])["says"]
    assert "public data" in tuning_of("public", studies)["says"]


def test_units_held_out_in_one_run_and_trained_on_in_another_pay_for_both(bert: Path) -> None:
    study = tiny_study(bert, privacy=private(), data={"validation_fraction": 0.2}, **WHOLE)
    alone = composed_promise([study])
    assert alone is not None
    assert alone["epsilon"] > 8.0


# The commands


@pytest.mark.slow
def test_the_sweep_command(privet: Run, tmp_path: Path, bert: Path) -> None:
    document = {"fields": {"lora.rank": [2, 4], "aggregation.method": ["ffa", "fedavg"]}, "data": "private"}
    file = sweep_file(tmp_path, bert, document, {"privacy": private(), "training.sampling_rate": 1.0})
    code, out, err = privet("sweep", file, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result == json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert len(result["rows"]) == result["asked"] == 4
    assert result["tuning"]["composed"]["epsilon"] > 8
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 5_000
    code, out, _ = privet("sweep", file, "--out", tmp_path / "out")
    assert code == 0
    assert "TUNED ON PRIVATE DATA" in " ".join(out.split())
    runs = sorted((tmp_path / "out" / "runs").iterdir())
    code, out, _ = privet("compare", *runs, "--json")
    assert code == 0
    assert {row["aggregation"].split(",")[0] for row in json.loads(out)["rows"]} == {"ffa", "fedavg"}
    assert privet("compare", tmp_path / "nothing")[0] == 6


@pytest.mark.slow
def test_one_command_answers_the_first_question(tmp_path: Path, bert: Path) -> None:
    overrides = {"aggregation.optimizer": "fedadam", "aggregation.method": "ffa", **QUICK}
    question = load_question(scenario_file(tmp_path, bert, overrides=overrides))
    assert list(question.entries) == ["ffa", "fedavg"]
    assert "fedsvd changes the basis" in question.left_out["fedsvd"]
    answer = ask(question, tmp_path / "out", lambda method: lambda report: None)
    arms = [arm["arm"] for arm in answer["arms"]]
    assert arms == [
        "nothing (before)",
        *(f"site-{number:03d} alone" for number in range(1, 6)),
        "mean of the sites alone",
        "federated, ffa",
        "federated, fedavg",
        "all data pooled",
    ]
    assert all(arm["value"] is not None for arm in answer["arms"])
    assert answer == json.loads((tmp_path / "out" / "compare.json").read_text())
    before = finished(tmp_path / "out")
    assert ask(question, tmp_path / "out", lambda method: lambda report: None) == answer
    assert finished(tmp_path / "out") == before
    assert answer_table(answer).row_count == len(arms)
    compared = compare_runs(sorted((tmp_path / "out" / "runs").iterdir()))
    assert compared["notes"] == []
    assert sorted(compared["differs"]["aggregation.method"]) == ["fedavg", "ffa"]
    assert [table.row_count for table in runs_tables(compared)] == [2, 2, len(compared["differs"])]


def test_values_go_to_toml_and_back() -> None:
    document = {
        "name": 'quote " and \\ and \u007f and é',
        "seed": 3,
        "rate": 1e-05,
        "on": True,
        "list": [1, 2],
        "table": {"a b": {"x.y": "z"}, "empty": {}},
        "malicious": [{"attack": "nan", "sites": ["a", "b"]}, {"attack": "scale", "sites": 1}],
    }
    assert tomllib.loads(to_toml(document)) == document
    assert validate(Sweep, {"study": "s", "data": "public", "fields": {"seed": [1, 2]}}, what="s").fields == {
        "seed": (1, 2)
    }
