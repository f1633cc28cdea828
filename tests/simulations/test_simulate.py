"""Whole simulations on tiny models: what comes out, that it is reproducible, and that it survives a kill."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from safetensors.numpy import load_file

from privet.client.training.model import load_bare
from privet.common.errors import StateError, StudyError, TooFewSitesError
from privet.common.privacy.accounting import epsilon, plan
from privet.server.rounds.state import RunDirectory
from privet.simulations.reporting.gather import gather
from privet.simulations.reporting.page import page
from privet.simulations.runs.continued import continuation
from privet.simulations.runs.simulate import RoundReport, keeping_only_progress, prepare, reopen, run_simulation
from privet.simulations.terminal import continued
from privet.simulations.terminal.report import round_line
from tests.support.forks import training_processes
from tests.support.scenarios import scenario_file
from tests.support.tiny import LABELS, class_rows, private, tiny_document, write_rows

SITES = ("alpha", "beta", "gamma")
MASKED = {"cohort.min_sites": 3, "secure_aggregation.mode": "masked"}
WHOLE = {"training.sampling_rate": 1.0}  # what is not sampled is accounted fast
pytestmark = pytest.mark.slow


def study_file(
    folder: Path, base: Path, overrides: dict[str, Any] | None = None, simulation: dict[str, Any] | None = None
) -> Path:
    """Write a study over three tiny sites and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    sites = {}
    for number, name in enumerate(SITES):
        train = write_rows(folder / f"{name}.jsonl", class_rows(60, seed=number))
        test = write_rows(folder / f"{name}-test.jsonl", class_rows(20, seed=100 + number))
        sites[name] = {"train": [train.name], "test": [test.name]}
    document = tiny_document(base, {"training.rounds": 3, **MASKED, **(overrides or {})})
    simulated = {"data": "files", "sites": sites, **(simulation or {})}
    return write_study(folder / "study.toml", {**document, "simulation": simulated})


def write_study(path: Path, document: dict[str, Any]) -> Path:
    """Write a study file and return its path."""
    lines: list[str] = []
    _toml(document, "", lines)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _toml(table: dict[str, Any], prefix: str, lines: list[str]) -> None:
    if prefix:
        lines.append(f"[{prefix}]")
    lines += [
        f"{json.dumps(k)} = {json.dumps(v)}" for k, v in table.items() if not isinstance(v, dict) and v is not None
    ]
    for key, value in table.items():
        if isinstance(value, dict):
            _toml(value, f"{prefix}.{json.dumps(key)}" if prefix else key, lines)


def test_a_simulation_whose_sites_share_the_noise_against_one_place_that_adds_all_of_it(
    tmp_path: Path, bert: Path
) -> None:
    step = {"rounds": 2, "local_steps": 1, "optimizer": "sgd", "learning_rate": 1.0}
    server = {"method": "ffa", "optimizer": "adam", "learning_rate": 0.02, "tau": 1e-6, "largest_count": 100}
    overrides = {"privacy": private(mode="distributed"), "training": step, "aggregation": server}
    file = study_file(tmp_path, bert, overrides, {"baselines": ["pooled"]})
    summary = run_simulation(prepare(file, tmp_path / "run"))
    assert summary["accuracy"]["pooled"] is not None
    statements = RunDirectory.open(tmp_path / "run").load().statements
    alone = RunDirectory.open(tmp_path / "run" / "baselines" / "pooled").load().statements
    shared, own = (each[-1]["privacy"] for each in (statements, alone))
    # The same noise accounted for the same epsilon; added by three sites together, and by one.
    assert shared["training"]["noise_multiplier"] == own["training"]["noise_multiplier"]
    assert shared["training"]["mechanism"] != own["training"]["mechanism"]
    assert statements[-1]["masking"][0]["noise"]["of_this_sum"] == pytest.approx(own["training"]["noise_multiplier"])


def test_a_simulation_in_blocks_that_tolerate_drop_outs_has_the_sums_of_one_without(tmp_path: Path, bert: Path) -> None:
    step = {"rounds": 2, "local_steps": 1, "optimizer": "sgd", "learning_rate": 1.0}
    server = {"method": "ffa", "optimizer": "adam", "learning_rate": 0.02, "tau": 1e-6, "largest_count": 100}
    overrides = {"privacy": private(mode="distributed"), "training": step, "aggregation": server, "cohort.min_sites": 4}
    found = {}
    for name, more in (("each", {}), ("block", {"secure_aggregation.block": 2})):
        file = scenario_file(tmp_path / name, bert, overrides={**overrides, **more})
        summary = run_simulation(prepare(file, tmp_path / f"run-{name}"))
        statements = RunDirectory.open(tmp_path / f"run-{name}").load().statements
        masking = [statement["masking"][0] for statement in statements]
        found[name] = summary["adapter_digest"], [(each.get("block"), each["min_survivors"]) for each in masking]
    # Five sites, of which four are enough. Noise and rounding follow from the seed, and the sums are exact.
    assert found["each"][0] == found["block"][0]
    assert (found["each"][1], found["block"][1]) == ([(None, 4)] * 2, [(1, 4)] * 2)


def test_a_simulation_with_correlated_noise_is_the_same_after_an_interruption(tmp_path: Path, bert: Path) -> None:
    step = {"rounds": 4, "local_steps": 1, "optimizer": "sgd", "learning_rate": 1.0, "sampling_rate": 0.5}
    server = {"method": "ffa", "optimizer": "adam", "learning_rate": 0.02, "tau": 1e-6, "largest_count": 100}
    overrides = {"training": step, "aggregation": server}
    digests = {}
    for name in ("banded", "independent"):
        privacy = {**private(mode="distributed"), **({"noise": "banded", "band": 2} if name == "banded" else {})}
        file = study_file(tmp_path / name, bert, {**overrides, "privacy": privacy}, {"baselines": ["pooled"]})
        summary = run_simulation(prepare(file, tmp_path / f"run-{name}"))
        digests[name] = summary["adapter_digest"]
        assert 0 < summary["epsilon"] <= 8.0
    assert len(set(digests.values())) == 2
    assert not list((tmp_path / "run-banded").rglob("*.added"))  # after the last round nothing is kept

    class KilledError(Exception):
        pass

    def kill(report: RoundReport) -> None:
        if report.arm == "federated" and report.round == 2:
            raise KilledError

    with pytest.raises(KilledError):
        run_simulation(prepare(tmp_path / "banded" / "study.toml", tmp_path / "killed"), kill)
    assert run_simulation(reopen(tmp_path / "killed"))["adapter_digest"] == digests["banded"]


def test_sites_of_unequal_rank_and_labels_end_alike_after_an_interruption(tmp_path: Path, bert: Path) -> None:
    server = {"method": "ffa", "optimizer": "fedavgm", "weight_power": 0.5}
    overrides = {
        "aggregation": server,
        "lora.rank": 4,
        "lora.site_ranks": {"alpha": 1, "beta": 2},
        "training.rounds": 2,
    }
    with pytest.raises(TooFewSitesError, match="1 of 3 sites train 4 columns of B"):
        prepare(study_file(tmp_path, bert, overrides), tmp_path / "masked")
    file = study_file(tmp_path, bert, {**overrides, "secure_aggregation.mode": "plain"})
    write_rows(tmp_path / "beta.jsonl", class_rows(60, seed=1, labels=LABELS[:2]))
    said: list[str] = []
    whole = run_simulation(prepare(file, tmp_path / "whole", say=said.append))
    # A site that has no record of a label trains all the same, and it is said.
    line = f"beta: no training record has the label {LABELS[2]}; it learns of it from the others"
    assert [each for each in said if "no training record" in each] == [line]
    assert whole["training_records"]["beta"]["missing_labels"] == [LABELS[2]]
    assert "missing_labels" not in whole["training_records"]["alpha"]
    assert whole["log_verified"]
    shown = page([gather(tmp_path / "whole")])
    assert f"No training record of the label</dt><dd>beta: {LABELS[2]}" in shown

    class KilledError(Exception):
        pass

    def kill(report: RoundReport) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        run_simulation(prepare(file, tmp_path / "killed"), kill)
    assert run_simulation(reopen(tmp_path / "killed"))["adapter_digest"] == whole["adapter_digest"]


def test_ranks_of_sites_that_are_not_simulated_are_refused(tmp_path: Path, bert: Path) -> None:
    file = study_file(tmp_path, bert, {"aggregation.method": "ffa", "lora.site_ranks": {"delta": 1}})
    with pytest.raises(
        StudyError, match=r"lora.site_ranks: the simulation has no site delta; its sites are alpha, beta"
    ):
        prepare(file, tmp_path / "run")


def test_a_private_simulation_with_its_baselines(tmp_path: Path, bert: Path) -> None:
    file = study_file(tmp_path, bert, {"privacy": private(), **WHOLE}, {"baselines": ["local", "pooled"]})
    simulated = prepare(file, tmp_path / "run")
    seen: list[RoundReport] = []
    summary = run_simulation(simulated, seen.append)
    assert {report.arm for report in seen} == {"federated", "pooled", *(f"local-{name}" for name in SITES)}
    assert set(summary["accuracy"]["local"]) == set(SITES)
    assert 0 < summary["epsilon"] <= 8.0
    assert [point["round"] for point in summary["curve"]] == [1, 2, 3]
    assert summary["federated"]["records"] == 60
    for site, row in summary["own_records"].items():
        alone = RunDirectory.open(tmp_path / "run" / "baselines" / f"local-{site}").load().adapter
        tally = simulated.evaluator().tallies(alone)[site]
        own = tally.metrics(simulated.plan.study.task.labels)["accuracy"]
        assert row == {"records": 20, "together": summary["federated_per_site"][site]["accuracy"], "alone": own}
    assert summary["better_together"]["sites"] == 3
    assert summary["training_records"]["alpha"] == {"records": 60, "patients": None}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["adapter_digest"] == summary["adapter_digest"]
    for number in (1, 2, 3):
        statement = json.loads((tmp_path / "run" / "rounds" / f"{number:04d}.json").read_text())
        assert statement["survivors"] == sorted(SITES)
        assert set(statement["privacy"]["epsilon"]) == set(SITES)


@pytest.mark.parametrize("more", [{"privacy": private()}, {"training.dropout": 0.1}], ids=["private", "dropout"])
def test_the_same_study_and_seed_twice_give_the_same_bits(tmp_path: Path, bert: Path, more: dict[str, Any]) -> None:
    file = study_file(tmp_path, bert, {"data.validation_fraction": 0.2, **more})
    digests = {run_simulation(prepare(file, tmp_path / name))["adapter_digest"] for name in ("one", "two")}
    assert len(digests) == 1
    other = study_file(tmp_path / "other", bert, {"seed": 99, **more})
    assert run_simulation(prepare(other, tmp_path / "three"))["adapter_digest"] not in digests


def test_a_private_study_with_dropout_is_refused(tmp_path: Path, bert: Path) -> None:
    file = study_file(tmp_path, bert, {"privacy": private(), "training.dropout": 0.1})
    with pytest.raises(StudyError, match=r"training.dropout: expected 0 in a private study, found 0.1"):
        prepare(file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_released_adapter_loads_with_peft_and_predicts_the_same(tmp_path: Path, bert: Path) -> None:
    import torch

    simulated = prepare(study_file(tmp_path, bert, {"training.learning_rate": 0.05}), tmp_path / "run")
    run_simulation(simulated)
    study = simulated.plan.study
    model = PeftModel.from_pretrained(load_bare(study), tmp_path / "run" / "adapter").eval()
    assert any(value.any() for name, value in load_file(tmp_path / "run/adapter/adapter_model.safetensors").items())
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert logits.shape == (1, 3)
    assert not torch.allclose(logits, torch.zeros_like(logits))


def test_a_finished_run_is_continued_by_a_new_study(tmp_path: Path, bert: Path) -> None:
    promise = {"privacy": private(), **WHOLE}
    first = prepare(study_file(tmp_path / "a", bert, promise), tmp_path / "run-a")
    alone = run_simulation(first)
    assert "continued" not in alone
    changed = {**promise, "seed": 5, "training.rounds": 2, "privacy": private(epsilon=3.0)}
    second = prepare(study_file(tmp_path / "b", bert, changed), tmp_path / "run-b", start=tmp_path / "run-a")
    start = RunDirectory.open(tmp_path / "run-b").load()
    assert start.round == 0
    assert start.adapter.digest == RunDirectory.open(tmp_path / "run-a").load().adapter.digest
    summary = run_simulation(second)
    found = summary["continued"]
    assert found["missing"] == {}
    old, new = found["tests"]["old"], found["tests"]["new"]
    assert (old["before"], new["after"]) == (alone["accuracy"]["federated"], summary["accuracy"]["federated"])
    assert old["records"] == new["records"] == 60
    # One accountant over both runs, for a unit that trains in both.
    plans = [plan(each.plan.study) for each in (first, second)]
    events = [each.training for each, rounds in zip(plans, (3, 2), strict=True) if each for _ in range(rounds)]
    together = epsilon(events, found["epsilon"]["delta"])
    assert found["epsilon"]["together"] == pytest.approx(together, abs=1e-6)
    assert max(found["epsilon"]["before"], found["epsilon"]["this"]) < together
    assert found["epsilon"]["this"] == pytest.approx(summary["epsilon"], abs=1e-6)
    text = " ".join(str(cell) for row in continued.cells(found) for cell in row)
    assert "forgetting" in text
    assert f"epsilon {together:.2f} at delta" in continued.sentences(found)[0]
    (tmp_path / "run-a").rename(tmp_path / "moved")
    gone = continuation(tmp_path / "run-b", second.plan.study, second.evaluator(), start.adapter)
    assert gone is not None
    assert set(gone["missing"]) == {"tests", "epsilon"}  # a cost that is not known is not given
    assert gone["epsilon"] is None
    (tmp_path / "moved").rename(tmp_path / "run-a")
    wider = study_file(tmp_path / "c", bert, {"lora.rank": 3})
    with pytest.raises(StateError, match="does not fit"):
        prepare(wider, tmp_path / "run-c", start=tmp_path / "run-a")
    assert not (tmp_path / "run-c").exists()


def simulate_at(file: Path, path: Path) -> None:
    run_simulation(prepare(file, path))


def test_a_killed_simulation_resumes_to_the_same_adapter(tmp_path: Path, bert: Path) -> None:
    overrides = {"privacy": private(), "training.rounds": 10, "aggregation.optimizer": "fedavgm", **WHOLE}
    file = study_file(tmp_path, bert, overrides)
    whole = run_simulation(prepare(file, tmp_path / "whole"))["adapter_digest"]
    killed = tmp_path / "killed"
    process = training_processes().Process(target=simulate_at, args=(file, killed))
    process.start()
    while not (killed / "rounds" / "0002.json").exists() and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    closed = RunDirectory.open(killed).load().round
    assert 2 <= closed < 10, "the kill came too late to show anything"
    assert run_simulation(reopen(killed))["adapter_digest"] == whole
    assert len(list((killed / "rounds").glob("*.json"))) == 10


def test_a_run_that_fails_before_its_first_round_leaves_nothing(tmp_path: Path, bert: Path) -> None:
    steep = {"lora.alpha": 1e12, "training.learning_rate": 1e4, "training.local_steps": 3}
    file = study_file(tmp_path, bert, {"training.optimizer": "sgd", **steep})
    simulated = prepare(file, tmp_path / "run")
    with pytest.raises(StateError, match="training diverged"), keeping_only_progress(simulated):
        run_simulation(simulated)
    assert not (tmp_path / "run").exists()


def test_resuming_needs_the_study_that_the_run_began_with(tmp_path: Path, bert: Path) -> None:
    simulated = prepare(study_file(tmp_path, bert), tmp_path / "run")
    run_simulation(simulated)
    text = (tmp_path / "run" / "study.toml").read_text()
    (tmp_path / "run" / "study.toml").write_text(text.replace('"rounds" = 3', '"rounds" = 4'))
    with pytest.raises(Exception, match="no longer the study"):
        reopen(tmp_path / "run")


def test_one_host_serves_all_sites(tmp_path: Path, bert: Path) -> None:
    from privet.client.training import model

    model._host.cache_clear()
    run_simulation(prepare(study_file(tmp_path, bert, None, {"baselines": ["local", "pooled"]}), tmp_path / "run"))
    assert model._host.cache_info().misses == 1


def test_local_arms_train_on_one_site_only(tmp_path: Path, bert: Path) -> None:
    simulated = prepare(study_file(tmp_path, bert, None, {"baselines": ["local"]}), tmp_path / "run")
    run_simulation(simulated)
    states = [RunDirectory.open(tmp_path / "run" / "baselines" / f"local-{name}").load() for name in SITES]
    for name, state in zip(SITES, states, strict=True):
        assert state.statements[-1]["survivors"] == [name]
    names = states[0].adapter.spec.names
    assert not np.array_equal(states[0].adapter.flatten(names), states[1].adapter.flatten(names))


@pytest.mark.parametrize("private_", [False, True])
def test_each_round_says_what_training_took(private_: bool, tmp_path: Path, bert: Path) -> None:
    overrides = {"privacy": private()} if private_ else {}
    simulated = prepare(study_file(tmp_path, bert, overrides), tmp_path / "run")
    seen: list[RoundReport] = []
    run_simulation(simulated, seen.append)
    lines = [json.loads(line) for line in (tmp_path / "run" / "training.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(1, simulated.plan.study.training.rounds + 1))
    for line in lines:
        assert line["tokens"] > 0
        assert line["tokens_per_second"] > 0
        assert line["seconds"]["passes"] > 0
        assert (line["seconds"]["clipping"] > 0) == private_
        # The loss of a batch is a function of records, and not a release with noise.
        assert ("loss" in line) == (not private_)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["seconds"] > 0 and line["sites"] for line in metrics)
    assert all(("epsilon" in line) == private_ for line in metrics)
    line = round_line(seen[0], "accuracy")
    assert ("training loss" in line) == (not private_)
    assert len(line) <= 80
