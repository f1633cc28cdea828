"""Personal adapters: better where the site differs, the shared one where it does not, and never away from the site."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privet.client.commands import adapters
from privet.client.release.opened import caution, open_release
from privet.client.release.personal import keep_personal, personalise_release
from privet.client.release.received import RECEIVED, Received, keep_received
from privet.client.site import Resources, load_site
from privet.client.training import personal
from privet.client.training.features import encode_records
from privet.client.training.host import ModelHost
from privet.client.training.model import initial_adapter, open_host, peft_config_text
from privet.client.training.personal import Material, Personal, mixed, personalise
from privet.client.training.train import Draws, TrainingSet
from privet.common.audit.release import ADAPTER, STUDY
from privet.common.canonical import canonical_json
from privet.common.errors import DataError, RefusedError
from privet.common.privacy.noise import SeededRandomness
from privet.common.study.adapter import Adapter
from privet.common.study.study import Study
from privet.simulations.runs.personal import spread
from privet.simulations.runs.simulate import prepare, run_simulation
from tests.simulations.test_simulate import study_file
from tests.support.consortium_world import run
from tests.support.tiny import class_rows, private, random_adapter, records_of, site_toml, tiny_study

CPU = Resources(device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def study(bert: Path) -> Study:
    return tiny_study(bert, privacy=private(), **{"aggregation.method": "fedsvd"})


@pytest.fixture(scope="module")
def host(study: Study) -> ModelHost:
    return open_host(study, CPU)


def material(study: Study, host: ModelHost, rows: list[dict[str, Any]], held: int) -> Material:
    features = encode_records(study, host.tokenizer, records_of(study, rows))
    training, out = features[held:], features[:held]
    units = [[row] for row in range(len(training))]
    return Material(TrainingSet(training, units, 10_000), out, [[row] for row in range(held)])


def made(study: Study, host: ModelHost, shared: Adapter, found: Material, seed: int = 0) -> Personal:
    draws = Draws(SeededRandomness(seed, "sampling"), SeededRandomness(seed, "noise"))
    with host.lock:
        return personalise(host, study, shared, found, draws, 32, lambda *_: None)


def test_a_site_that_differs_gets_a_better_adapter_and_the_same_twice(study: Study, host: ModelHost) -> None:
    shared = initial_adapter(study, host)
    found = material(study, host, class_rows(90, seed=1), 30)
    first = made(study, host, shared, found)
    assert first.chosen.share > 0
    assert first.chosen.loss < first.shared.loss
    assert first.chosen.correct > first.shared.correct + 0.2
    moved = {
        t.role for t in shared.spec.tensors if not np.array_equal(first.adapter.values[t.name], shared.values[t.name])
    }
    assert moved == {"lora_B", "full"}
    assert first.units == (60, 30)
    assert made(study, host, shared, found).adapter.digest == first.adapter.digest


def test_where_labels_are_noise_the_shared_adapter_stays(study: Study, host: ModelHost) -> None:
    shared, rng = initial_adapter(study, host), np.random.default_rng(0)
    rows = class_rows(60, seed=2)
    labels = rng.permutation([row["label"] for row in rows])
    rows = [{**row, "label": str(label)} for row, label in zip(rows, labels, strict=True)]
    kept = made(study, host, shared, material(study, host, rows, 30))
    assert kept.chosen.share == 0
    assert kept.adapter.digest == shared.digest


def test_training_that_diverges_leaves_the_shared_adapter(
    study: Study, host: ModelHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(personal, "RATES", (1e30,))
    shared = random_adapter(host.spec)
    kept = made(study, host, shared, material(study, host, class_rows(40), 12))
    assert kept.adapter.digest == shared.digest


def test_too_few_units_are_refused(study: Study, host: ModelHost) -> None:
    with pytest.raises(DataError, match="at least 20 units to train and compare on, found 19"):
        made(study, host, initial_adapter(study, host), material(study, host, class_rows(19), 4))


def test_a_mixture_mixes_the_weights_that_the_base_gets(host: ModelHost) -> None:
    """B A is linear in B, so with one A the mixture of adapters is that of the weights they add."""
    one, other = random_adapter(host.spec, 1), random_adapter(host.spec, 2)
    other = other.replace({t.name: one.values[t.name] for t in host.spec.tensors if t.role == "lora_A"})
    half = mixed(one, other, 0.5)
    pairs = [(t.name, t.name.replace("lora_A", "lora_B")) for t in host.spec.tensors if t.role == "lora_A"]
    assert pairs
    for a, b in pairs:
        expected = (one.values[b] @ one.values[a] + other.values[b] @ other.values[a]) / 2
        assert np.allclose(half.values[b] @ half.values[a], expected, atol=1e-6)
    assert mixed(one, other, 0.0).digest == one.digest


def test_a_personal_adapter_lies_beside_the_received_one_and_is_revoked_with_it(
    study: Study, host: ModelHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A real site's split and draws are secret; here they are the same each time.
    monkeypatch.setattr("privet.client.release.personal.secrets.token_bytes", lambda count: bytes(count))
    monkeypatch.setattr("privet.client.release.personal.SecretRandomness", lambda: SeededRandomness(0, "site"))
    received, shared = tmp_path / "site/adapters/flu", initial_adapter(study, host)
    received.mkdir(parents=True)
    (received / ADAPTER).write_bytes(shared.data)
    (received / STUDY).write_bytes(canonical_json(study.document()))
    (received / "adapter_config.json").write_text(peft_config_text(host, study))
    known = Received(consortium="north", run="flu", round=1, adapter=shared.digest, leaf=9, time=1)
    keep_received(received, known)
    file = site_toml(tmp_path / "site", "berlin", class_rows(90, seed=1), seed=None)
    config, release = load_site(file), open_release(received)
    found = personalise_release(release, config.model_copy(update={"resources": CPU}), lambda *_: None)
    assert found.chosen.share > 0
    path = keep_personal(release, config.name, found)
    opened = open_release(path)
    assert opened.adapter.digest == found.adapter.digest
    assert "trained on records of site berlin without privacy; it must not leave" in caution(opened)
    assert json.loads((path / "personal.json").read_text())["shared"] == shared.digest
    assert RECEIVED not in {each.name for each in path.iterdir()}
    monkeypatch.setattr("privet.client.release.personal.personalise_release", lambda *_: found)
    said = run(adapters.personalise, file, "flu").output
    assert f"`privet evaluate {path} --data FILE --format {file}`" in said
    keep_received(received, known.model_copy(update={"state": "revoked", "reason": "a canary was found"}))
    with pytest.raises(RefusedError, match="a canary was found"):
        open_release(path)


@pytest.mark.slow
def test_a_simulation_reports_what_sites_gain_by_their_own(bert: Path, tmp_path: Path) -> None:
    file = study_file(tmp_path, bert, {"privacy": private(), "training.rounds": 1}, {"baselines": ["personal"]})
    simulated = prepare(file, tmp_path / "run")
    told: list[tuple[str, int, int | None]] = []
    found = run_simulation(simulated, tell=lambda *what: told.append(what))["personal"]
    for site in (1, 2, 3):
        where = f"personal adapters, site {site} of 3"
        steps = [done for what, done, _ in told if what == f"{where}: training"]
        assert len(steps) >= 16  # after each step, as a stage may take minutes
        assert steps == sorted(steps)
        assert {f"{where}: reading the records", f"{where}: testing the adapters"} <= {what for what, _, _ in told}
    assert len(found["per_site"]) == 3
    for each in found["per_site"].values():
        assert each["chosen"] >= each["shared"]
    assert found["chosen"]["worst_value"] >= found["shared"]["worst_value"]
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run/personal").iterdir()}
    (tmp_path / "run/summary.json").unlink()
    assert run_simulation(replace(simulated, tests=None))["personal"] == found
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run/personal").iterdir()} == before


def test_the_spread_of_sites_knows_where_less_is_better() -> None:
    values = {"a": 2.0, "b": 5.0, "c": 3.0}
    assert spread(values, "accuracy") == {"mean": 10 / 3, "worst": "a", "worst_value": 2.0, "gap": 3.0}
    assert spread(values, "perplexity")["worst"] == "b"
    assert spread({}, "accuracy") == {}
