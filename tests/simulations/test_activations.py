"""Remembered outputs of frozen layers: the same training, the same bits on any path, and none where they may differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from privet.client.release.generation import greedy_answers
from privet.client.site import Resources
from privet.client.training.data import Records
from privet.client.training.features import encode_records
from privet.client.training.host import ModelHost
from privet.client.training.model import initial_adapter, open_host
from privet.client.training.passes import score
from privet.client.training.tasks import evaluate
from privet.client.training.train import Draws, train_round
from privet.common.privacy.accounting import plan
from privet.common.privacy.noise import SeededRandomness
from privet.common.study.adapter import Vector
from privet.common.study.study import Study
from privet.simulations.engines import activations
from privet.simulations.engines.activations import frozen_layers, remembering
from tests.support.tiny import class_rows, private, random_adapter, site_toml, tiny_study, worker_of

FP32 = Resources(device="cpu", precision="fp32", threads=1)


def trained(host: ModelHost, study: Study, folder: Path, rounds: int = 2) -> Vector:
    """Train a site for some rounds from a random adapter, one round's update from the same start each time."""
    data, _ = worker_of(site_toml(folder, "ash", class_rows(60), resources={"threads": 1})).open(study)
    mechanism = plan(study)
    updates = []
    for number in range(rounds):
        draws = Draws(SeededRandomness(1, number, "sampling"), SeededRandomness(1, number, "noise"))
        adapter = random_adapter(host.spec, seed=number)
        updates.append(
            train_round(
                host,
                study,
                adapter,
                data.training,
                draws,
                first_step=number * study.training.steps,
                mechanism=None if mechanism is None else mechanism.training,
                physical_batch=7,
            )
        )
    return np.concatenate(updates)


@pytest.fixture(autouse=True)
def cold() -> None:
    activations._outputs.cache_clear()


@pytest.mark.parametrize("privacy", [{"mode": "none"}, private()], ids=["plain", "private"])
@pytest.mark.parametrize("method", ["ffa", "fedavg"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])  # last, and so one after the other: each is opened once
def test_training_on_remembered_outputs_gives_the_same_update(
    family: str, privacy: dict[str, object], method: str, optimizer: str, bases: Mapping[str, Path], tmp_path: Path
) -> None:
    study = tiny_study(
        bases[family],
        privacy=privacy,
        lora={"layers": 1},
        aggregation={"method": method},
        training={"optimizer": optimizer, "learning_rate": 0.5 if optimizer == "sgd" else 0.02},
    )
    host = open_host(study, FP32)
    anew = trained(host, study, tmp_path)
    with remembering(host, study, 100) as outputs:
        first = trained(host, study, tmp_path)
        assert outputs is not None
        assert 0 < outputs.misses == len(outputs.known) <= 60
        warm = trained(host, study, tmp_path)
        assert outputs.misses == len(outputs.known)
        assert outputs.hits > outputs.misses
    assert np.abs(anew).max() > 1e-3
    np.testing.assert_array_equal(first, anew)
    np.testing.assert_array_equal(first, warm)
    np.testing.assert_array_equal(trained(host, study, tmp_path), anew)  # the host is as it was


def test_no_room_changes_nothing_but_the_time(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, lora={"layers": 1})
    host = open_host(study, FP32)
    with remembering(host, study, 100):
        roomy = trained(host, study, tmp_path)
    activations._outputs.cache_clear()
    with remembering(host, study, 1) as outputs:
        assert outputs is not None
        outputs.limit = 20_000
        tight = trained(host, study, tmp_path)
        assert 0 < outputs.size <= 20_000
        assert outputs.misses > len(outputs.known)
    np.testing.assert_array_equal(roomy, tight)


def test_evaluation_scores_the_same(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, lora={"layers": 1})
    host = open_host(study, FP32)
    data, _ = worker_of(site_toml(tmp_path, "ash", class_rows(50))).open(study)
    host.mount(random_adapter(host.spec))
    anew = evaluate(host, study, data.training.features).metrics(study.task.labels)
    with remembering(host, study, 100):
        again = evaluate(host, study, data.training.features).metrics(study.task.labels)
    assert again == anew


@pytest.mark.parametrize(
    "overrides",
    [
        {"training.dropout": 0.1, "lora.layers": 1},
        {},
        {"lora.layers": 2},
        {"task.kind": "causal-lm", "lora.layers": 1, "lora.modules_to_save": ["lm_head"]},
    ],
    ids=["dropout", "all layers adapted", "as many as there are", "a last layer that is trained"],
)
def test_nothing_is_remembered_where_it_could_differ(overrides: dict[str, object], bases: Mapping[str, Path]) -> None:
    study = tiny_study(bases["llama" if "task.kind" in overrides else "bert"], **overrides)
    host = open_host(study, FP32)
    assert frozen_layers(host, study) is None
    with remembering(host, study, 100) as outputs:
        assert outputs is None


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_a_language_model_is_remembered_too(family: str, bases: Mapping[str, Path], tmp_path: Path) -> None:
    study = tiny_study(bases[family], privacy=private(), **{"task.kind": "causal-lm", "lora.layers": 1})
    host = open_host(study, FP32)
    rows = [{"prompt": f"why {n % 7}", "answer": f"because of {n % 5}"} for n in range(40)]
    records = encode_records(study, host.tokenizer, Records(tuple(rows), tuple(map(str, range(40)))))
    host.mount(random_adapter(host.spec))
    anew = score(host, records)
    with remembering(host, study, 100) as outputs:
        assert outputs is not None
        first, second = score(host, records), score(host, records)
        assert outputs.hits > 0
    for found in (first, second):
        assert all(np.array_equal(a.losses, b.losses) for a, b in zip(anew, found, strict=True))


def test_a_trained_embedding_is_not_frozen(bert: Path) -> None:
    study = tiny_study(bert, lora={"layers": 1, "modules_to_save": ["word_embeddings"]})
    assert frozen_layers(open_host(study, FP32), study) is None


def test_the_model_keeps_its_parameters(bert: Path) -> None:
    study = tiny_study(bert, lora={"layers": 1})
    host = open_host(study, FP32)
    before, adapter = host.base_parameters, initial_adapter(study, host)
    with remembering(host, study, 100):
        assert host.base_parameters == before
    assert host.base_parameters == before
    assert initial_adapter(study, host).digest == adapter.digest


def test_answers_are_generated_through_all_layers(bases: Mapping[str, Path]) -> None:
    study = tiny_study(bases["llama"], **{"task.kind": "causal-lm", "lora.layers": 1})
    host = open_host(study, FP32)
    host.mount(random_adapter(host.spec))
    prompts = ["why red", "because of blue", "heart"]
    expected = greedy_answers(host, study, prompts)
    rows = [{"prompt": prompt, "answer": "because"} for prompt in prompts]
    records = encode_records(study, host.tokenizer, Records(tuple(rows), ("a", "b", "c")))
    with remembering(host, study, 100) as outputs:
        score(host, records)
        assert greedy_answers(host, study, prompts) == expected
        score(host, records)
        assert outputs is not None
        assert outputs.hits == 3
