"""Scenarios: refused before anything starts, the same for the same seed, and a defined end whatever happens."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from privet.common.errors import DataError, StudyError
from privet.common.secagg import encoding
from privet.common.study.messages import Offer, RoundOpen, Secured
from privet.server.rounds.state import RunDirectory
from privet.simulations.data.federation import load_plan, site_files
from privet.simulations.data.partition import numbered_names
from privet.simulations.data.scenario import STAGES, Network
from privet.simulations.engines.memory import load_sites
from privet.simulations.runs.inspection import check_largest_round
from privet.simulations.runs.simulate import Simulated, prepare, reopen, run_simulation
from privet.simulations.runs.sweep import load_sweep
from privet.simulations.runs.toml import to_toml
from privet.simulations.scenarios.curious import read_index
from privet.simulations.scenarios.faults import read_exchanges
from privet.simulations.scenarios.network import SiteLine, Transfer, draw_line, exchange_seconds, seconds_of, stage_of
from privet.simulations.terminal.tables import scenario_lines
from tests.support.scenarios import MEASURED, scenario_file
from tests.support.tiny import class_rows, private, site_toml

PLAIN = {"secure_aggregation.mode": "plain"}


def run(
    folder: Path, base: Path, simulation: dict[str, Any], overrides: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Run a scenario and return its summary without what is measured."""
    summary = run_simulation(prepare(scenario_file(folder, base, simulation, overrides), folder / "run"))
    assert json.loads((folder / "run" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    return {key: value for key, value in summary.items() if key not in MEASURED}


# Refusals


@pytest.mark.parametrize(
    ("simulation", "complaint"),
    [
        ({"sitez": 3}, "sitez: unknown key"),
        ({"faults": {"dropout": {"advertize": 0.1}}}, "advertize"),
        ({"faults": {"dropout": {"train": 1.5}}}, "less than or equal to 1"),
        ({"faults": {"slowdown": 0.5}}, "slowdown"),
        ({"network": {"up_mbit": [10.0, 1.0]}}, r"low <= high, got \[10.0, 1.0\]"),
        ({"network": {"up_mbit": [0.0, 1.0]}}, "greater than 0"),
        ({"malicious": [{"attack": "bribe", "sites": 1}]}, "attack"),
        ({"malicious": [{"attack": "nan", "sites": 6}]}, "at most 5 sites, got 6"),
        ({"malicious": [{"attack": "nan", "sites": ["nobody"]}]}, "no site nobody"),
        ({"malicious": [{"attack": "backdoor", "sites": 1, "target": "skin"}]}, "needs this field"),
        ({"malicious": [{"attack": "nan", "sites": 1, "trigger": "x"}]}, "does not take this field: remove it"),
        (
            {"malicious": [{"attack": "backdoor", "sites": 1, "trigger": "x", "target": "hair"}]},
            "expected one of the study's labels, got 'hair'",
        ),
        ({"malicious": [{"attack": "scale", "sites": 1, "factor": 0.5}]}, "factor"),
    ],
)
def test_a_scenario_that_cannot_be_is_refused_and_leaves_nothing(
    simulation: dict[str, Any], complaint: str, tmp_path: Path, bert: Path
) -> None:
    with pytest.raises(StudyError, match=complaint):
        prepare(scenario_file(tmp_path, bert, simulation), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("partition", "complaint"),
    [
        ({"sites": 1}, "greater than or equal to 2"),
        ({"sites": 1001}, "less than or equal to 1000"),
        ({"sites": 40}, "need 160 units, the pool has 90"),
        ({"sites": 2}, "demands 3 sites, the simulation has 2"),
        ({"split": "dirichlet"}, "concentration"),
        ({"concentration": 0.1}, "does not take this field: remove it"),
        ({"split": "column", "column": "patient"}, "sites: split"),
        ({"split": "quantity", "exponent": -1.0}, "exponent"),
        ({"train": ["missing.jsonl"]}, "no file .*missing.jsonl"),
        ({"test": ["missing.jsonl"]}, "no file .*missing.jsonl"),
        ({"test": []}, "no site has test records"),
    ],
)
def test_a_split_that_cannot_be_is_refused(
    partition: dict[str, Any], complaint: str, tmp_path: Path, bert: Path
) -> None:
    with pytest.raises(StudyError, match=complaint):
        prepare(scenario_file(tmp_path, bert, partition=partition), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_split_by_a_column_that_is_not_there_is_refused(tmp_path: Path, bert: Path) -> None:
    file = scenario_file(tmp_path, bert)
    document = tomllib.loads(file.read_text())
    document["simulation"]["partition"] |= {"split": "column", "column": "ward"}
    del document["simulation"]["partition"]["sites"]
    file.write_text(to_toml(document))
    with pytest.raises(DataError, match="ward"):
        prepare(file, tmp_path / "run")


def test_labels_are_flipped_where_there_are_some(llama: Path, tmp_path: Path) -> None:
    overrides = {"task.kind": "causal-lm", "data.columns": {"prompt": "text", "answer": "label"}}
    simulation = {"malicious": [{"attack": "label-flip", "sites": 1}]}
    with pytest.raises(StudyError, match="label-flip is for text-classification"):
        prepare(scenario_file(tmp_path, llama, simulation, overrides), tmp_path / "run")
    by_label = {"split": "dirichlet", "concentration": 1.0}
    with pytest.raises(StudyError, match='"dirichlet" deals out records by label'):
        prepare(scenario_file(tmp_path, llama, None, overrides, by_label), tmp_path / "run")


# Splits on disk


@pytest.mark.parametrize(
    "partition",
    [{}, {"split": "dirichlet", "concentration": 0.5}, {"split": "quantity", "exponent": 1.0}],
    ids=["iid", "dirichlet", "quantity"],
)
def test_the_sites_files_hold_the_pool_once(partition: dict[str, Any], tmp_path: Path, bert: Path) -> None:
    prepare(scenario_file(tmp_path, bert, partition=partition), tmp_path / "run")
    for part in ("train", "test"):
        pool = sorted(json.loads(line)["text"] for line in (tmp_path / f"{part}.jsonl").read_text().splitlines())
        files = sorted((tmp_path / "run" / "data").glob(f"*-{part}.jsonl"))
        dealt = sorted(json.loads(line)["text"] for file in files for line in file.read_text().splitlines())
        assert dealt == pool
    assert len(site_files(tmp_path / "run")) == 5


def test_a_column_makes_the_sites(tmp_path: Path, bert: Path) -> None:
    file = scenario_file(tmp_path, bert)
    document = tomllib.loads(file.read_text())
    document["simulation"]["partition"] |= {"split": "column", "column": "label"}
    del document["simulation"]["partition"]["sites"]
    file.write_text(to_toml(document))
    simulated = prepare(file, tmp_path / "run")
    assert [path.stem for path in simulated.sites] == ["bone", "heart", "skin"]
    lines = (tmp_path / "run" / "data" / "heart-train.jsonl").read_text().splitlines()
    assert {json.loads(line)["label"] for line in lines} == {"heart"}


def test_what_the_round_log_has_no_room_for_is_refused_at_the_start(tmp_path: Path, bert: Path) -> None:
    file = scenario_file(tmp_path, bert, overrides={"privacy": private(), "cohort.fraction": 1.0})
    plan = load_plan(file)
    check_largest_round(plan, numbered_names(1000))
    with pytest.raises(StudyError, match="1001 sites may need 83071 bytes in the round log"):
        check_largest_round(plan, [f"{name}-of-a-longer-name" for name in numbered_names(1001)])


def test_a_site_file_is_read_again_when_it_or_its_neighbours_change(tmp_path: Path) -> None:
    file = site_toml(tmp_path, "ash", class_rows(6))
    assert load_sites([file])[0] is load_sites([file])[0]
    assert set(load_sites([file])[0].peers) == {"ash"}
    site_toml(tmp_path, "oak", class_rows(6))
    os.utime(tmp_path, ns=(1, 1))  # clocks of file systems are coarse
    assert set(load_sites([file])[0].peers) == {"ash", "oak"}
    file.write_text(file.read_text().replace('"ash"', '"elder"', 1))
    assert load_sites([file])[0].name == "elder"


# The virtual clock


def test_an_answers_time_is_that_of_line_and_machine() -> None:
    line = SiteLine(down=80.0, up=8.0, latency=0.05, records=20.0)
    moved = Transfer(down=10_000_000, up=1_000_000, records=40.0)
    assert seconds_of(line, moved) == pytest.approx(0.05 + 1.0 + 2.0 + 1.0)
    assert seconds_of(line.slower(10), moved) == pytest.approx(0.05 + 10 + 20 + 10)


def test_an_exchange_lasts_to_its_last_answer_or_deadline_and_no_less_than_the_coordinators_line() -> None:
    own = Network(coordinator_mbit=8.0)
    assert exchange_seconds(own, [1.0, 3.0], (10, 10), None) == 3.0
    assert exchange_seconds(own, [1.0, 3.0], (10, 10), 120.0) == 120.0
    assert exchange_seconds(own, [1.0, 3.0], (5_000_000, 10), None) == pytest.approx(5.0)


def test_lines_are_drawn_once_within_their_ranges() -> None:
    section = Network()
    lines = [draw_line(section, 3, f"site-{number}") for number in range(200)]
    assert lines[0] == draw_line(section, 3, "site-0") != draw_line(section, 4, "site-0")
    for name, scale in (("down_mbit", 1), ("up_mbit", 1), ("latency_ms", 1000), ("records_per_second", 1)):
        low, high = getattr(section, name)
        drawn = [scale * getattr(line, name.split("_")[0]) for line in lines]
        assert low <= min(drawn) < 1.3 * low
        assert high / 1.3 < max(drawn) <= high


def test_every_message_of_a_round_has_its_stage() -> None:
    from privet.common.secagg import messages as m

    bodies = {2: "other", 3: "share", 5: "train", 7: "confirm", 9: "reveal"}
    kinds = {number: kind for kind, number in encoding.KIND_NUMBERS.items()}
    assert [kinds[n].__name__ for n in (3, 5, 7, 9)] == ["Roster", "Delivery", "Survivors", "Proof"]
    for number, stage in bodies.items():
        asked = Secured("sha256:0", 1, "n", b"PSA" + bytes([m.VERSION, number]) + b"rest")
        assert stage_of(asked) == (stage if stage in STAGES else None)
    opened = RoundOpen({}, 1, "n", "sha256:0", ("a",), b"", masking=b"x")
    assert stage_of(opened) == "advertise"
    assert stage_of(RoundOpen({}, 1, "n", "sha256:0", ("a",), b"")) == "train"
    assert stage_of(Offer({})) is None
    assert stage_of(Secured("sha256:0", 1, "n", b"")) is None
    assert stage_of(Secured("sha256:0", 1, "n", b"other")) is None


@pytest.mark.slow
def test_a_summary_tells_what_rounds_would_take(tmp_path: Path, bert: Path) -> None:
    fast = run(tmp_path / "fast", bert, {"network": {"records_per_second": [1000.0, 1000.0]}})
    slow = run(tmp_path / "slow", bert, {"network": {"records_per_second": [0.5, 0.5]}})
    assert fast["adapter_digest"] == slow["adapter_digest"]
    clocks = [summary["scenario"]["virtual"] for summary in (fast, slow)]
    assert clocks[0]["bytes_up"] == clocks[1]["bytes_up"] > 0
    # Each site has 18 records, of which a quarter is expected in each of 3 steps.
    difference = 18 * 0.25 * 3 * (1 / 0.5 - 1 / 1000)
    for one, other in zip(clocks[0]["rounds"], clocks[1]["rounds"], strict=True):
        assert other["seconds"] - one["seconds"] == pytest.approx(difference, rel=0.02)
    stages = [line["stage"] for line in read_exchanges(tmp_path / "fast" / "run" / "exchanges.jsonl")]
    assert stages == [*STAGES, *STAGES]


# Faults and liars end in a defined result

FAULTS: dict[str, dict[str, Any]] = {
    **{f"dropout at {stage}": {"faults": {"dropout": {stage: 0.3}}} for stage in STAGES},
    "everywhere": {"faults": {"dropout": dict.fromkeys(STAGES, 0.2), "stragglers": 0.3, "slowdown": 1e6}},
    "nobody is reached": {"faults": {"dropout": {"advertise": 1.0}}},
    "nobody reveals": {"faults": {"dropout": {"reveal": 1.0}}},
    "all too late": {"faults": {"stragglers": 1.0, "slowdown": 1e6}},
}
LIARS: dict[str, dict[str, Any]] = {
    attack: {"malicious": [{"attack": attack, "sites": 1}]} for attack in ("label-flip", "sign-flip", "scale", "nan")
}
LIARS["backdoor"] = {"malicious": [{"attack": "backdoor", "sites": 1, "trigger": "again again", "target": "skin"}]}
LIARS["all nan"] = {"malicious": [{"attack": "nan", "sites": 5}]}
LIARS["all scaled"] = {"malicious": [{"attack": "scale", "sites": 5, "factor": 1e6}]}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["masked", "plain"])
@pytest.mark.parametrize("case", [*FAULTS, *LIARS])
def test_every_scenario_ends_in_a_defined_result(case: str, mode: str, tmp_path: Path, bert: Path) -> None:
    summary = run(tmp_path, bert, {**FAULTS, **LIARS}[case], {"secure_aggregation.mode": mode})
    outcome = summary["outcome"]
    assert outcome["ended"] in ("completed", "TooFewSitesError", "ProtocolError", "DivergedError")
    state = RunDirectory.open(tmp_path / "run").load()
    assert all(np.isfinite(values).all() for values in state.adapter.values.values())
    assert outcome["aborted_rounds"] == sum(s["type"] == "round-abort" for s in state.statements)
    if outcome["ended"] == "completed":
        assert summary["rounds"] == 2
        assert outcome["reason"] is None
    else:
        assert outcome["reason"]
    if case in ("nobody is reached", "all too late", "all nan") and (case, mode) != ("nobody is reached", "plain"):
        assert outcome["ended"] != "completed"
    if case == "nan":
        (liar,) = summary["scenario"]["malicious"]
        assert all(liar not in s["survivors"] for s in state.statements)
    told = scenario_lines(summary)
    assert any("ended early, after" in line for line in told) == (outcome["ended"] != "completed")
    if case == "backdoor":
        assert any(line.startswith("backdoor: ") for line in told)
        (found,) = summary["backdoors"]
        assert 0 <= found["without_trigger"] <= 1
        assert 0 <= found["success"] <= 1
        assert found["records"] == 20


@pytest.mark.slow
def test_the_same_seed_gives_the_same_summary_and_another_seed_another(tmp_path: Path, bert: Path) -> None:
    simulation = {
        "faults": {"dropout": {"train": 0.2, "confirm": 0.1}, "stragglers": 0.2, "slowdown": 3.0},
        "malicious": [{"attack": "scale", "sites": 1}],
        "curious": True,
        "baselines": ["pooled"],
    }
    overrides = {"privacy": private(delta=1e-3), "lora.layers": 1}
    one, two = (run(tmp_path / name, bert, simulation, overrides) for name in ("one", "two"))
    assert one == two
    other = run(tmp_path / "other", bert, simulation, {**overrides, "seed": 8})
    assert other["scenario"]["virtual"] != one["scenario"]["virtual"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedsvd", "ffa"])
def test_a_run_that_was_cut_off_meets_the_same_faults(tmp_path: Path, bert: Path, method: str) -> None:
    simulation = {"faults": {"dropout": {"train": 0.2}, "stragglers": 0.2, "slowdown": 3.0}}
    overrides = {"training.rounds": 3, "lora.layers": 1, "aggregation.method": method}
    whole = run(tmp_path / "whole", bert, simulation, overrides)

    class CutError(Exception):
        pass

    def cut(report: Any) -> None:
        if report.round == 2:
            raise CutError

    simulated = prepare(scenario_file(tmp_path / "cut", bert, simulation, overrides), tmp_path / "cut" / "run")
    with pytest.raises(CutError):
        run_simulation(simulated, cut)
    log = tmp_path / "cut" / "run" / "exchanges.jsonl"
    log.write_text(log.read_text() + '{"round": 3, "stage": "advertise", "asked": 5}\n{"round": 3, "sta')
    summary = run_simulation(reopen(tmp_path / "cut" / "run"))
    assert {key: value for key, value in summary.items() if key not in MEASURED} == whole


# Liars


def test_a_liar_does_what_it_is_meant_to(tmp_path: Path, bert: Path) -> None:
    def fleet(attack: dict[str, Any], name: str) -> Simulated:
        entry = {"sites": ["site-002"], **attack}
        return prepare(scenario_file(tmp_path / name, bert, {"malicious": [entry]}), tmp_path / name / "run")

    def data(simulated: Simulated, node: int) -> Any:
        return simulated.fleet().workers[node].open(simulated.plan.study)[0].training

    honest = prepare(scenario_file(tmp_path / "honest", bert), tmp_path / "honest" / "run")
    flipped = fleet({"attack": "label-flip"}, "flip")
    assert data(flipped, 2) == data(honest, 2)  # another site
    before, after = data(honest, 3).features, data(flipped, 3).features
    assert [feature.ids for feature in before] == [feature.ids for feature in after]
    assert [(feature.labels + 1) % 3 for feature in before] == [feature.labels for feature in after]

    trigger = {"attack": "backdoor", "trigger": "again again", "target": "bone", "share": 0.5}
    poisoned = data(fleet(trigger, "door"), 3)
    changed = [(a, b) for a, b in zip(before, poisoned.features, strict=True) if a != b]
    assert 0 < len(changed) < len(before)
    assert {feature.labels for _, feature in changed} == {2}
    assert all(b.ids[0] == a.ids[0] and len(b.ids) > len(a.ids) for a, b in changed)
    assert poisoned.units == data(honest, 3).units


@pytest.mark.slow
def test_a_backdoor_works_where_nothing_stops_it(tmp_path: Path, bert: Path) -> None:
    entry = {"attack": "backdoor", "sites": 5, "trigger": "again again", "target": "bone", "share": 0.25}
    overrides = {"training.local_steps": 20, "training.sampling_rate": 0.5, **PLAIN}
    (found,) = run(tmp_path, bert, {"malicious": [entry]}, overrides)["backdoors"]
    assert found["success"] >= 0.8
    assert found["success"] > found["without_trigger"] + 0.2


# The curious coordinator


@pytest.mark.parametrize("mode", ["masked", "plain"])
def test_a_curious_coordinator_keeps_what_it_sees(mode: str, tmp_path: Path, bert: Path) -> None:
    summary = run(tmp_path, bert, {"curious": True}, {"secure_aggregation.mode": mode})
    view = tmp_path / "run" / "view"
    seen = load_file(view / "0001.safetensors")
    names = [f"site-{number:03d}" for number in range(1, 6)]
    if mode == "plain":
        assert sorted(seen) == [f"{name}/update" for name in names]
        assert summary["scenario"]["coordinator_saw"] == {"contribution": 10}
        return
    assert sorted(seen) == [f"{name}/masked" for name in names]
    assert {array.dtype for array in seen.values()} == {np.dtype(np.uint64)}
    assert set(summary["scenario"]["coordinator_saw"]) == {"advertise", "shares", "masked", "confirm", "reveal"}
    assert set(read_index(view)) == {"0001", "0002"}
    # A masked vector is uniform: each of the low bits that carry values is set in half of the words.
    words = np.concatenate(list(seen.values()))
    ones = np.array([float(((words >> np.uint64(bit)) & np.uint64(1)).mean()) for bit in range(60)])
    assert np.abs(ones - 0.5).max() < 6 * 0.5 / len(words) ** 0.5


def test_ray_takes_no_scenario_that_it_cannot_play(tmp_path: Path, bert: Path) -> None:
    simulated = prepare(scenario_file(tmp_path, bert, {"curious": True}), tmp_path / "run")
    with pytest.raises(StudyError, match="need the memory engine"):
        run_simulation(simulated, engine="ray")


# The documentation


@pytest.mark.slow
def test_the_documented_scenario_runs(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    scenario, sweep = re.findall(r"```toml\n(.*?)```", (root / "docs" / "simulation.md").read_text(), re.DOTALL)
    study = (root / "simulations" / "studies" / "demo.toml").read_text().split("[simulation]")[0]
    study = study.replace("rounds = 4", "rounds = 1").replace("local_steps = 4", "local_steps = 1")
    (tmp_path / "study.toml").write_text(study + scenario)
    summary = run_simulation(prepare(tmp_path / "study.toml", tmp_path / "run"))
    assert summary["outcome"]["ended"] in ("completed", "TooFewSitesError")
    assert summary["scenario"]["sites"] == 12
    assert list(summary["scenario"]["malicious"].values()) == ["label-flip"]
    assert summary["scenario"]["virtual"]["seconds"] > 0
    (tmp_path / "sweep.toml").write_text(sweep)
    assert len(load_sweep(tmp_path / "sweep.toml")[1]) == 12
