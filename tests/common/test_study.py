"""The study: refused with a readable reason unless it means something, and identified by its digest."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from privet.common.errors import StudyError
from privet.common.study.sections import CohortSection
from privet.common.study.study import Study, load_study

Path_ = tuple[str, ...]

FULL: dict[str, Any] = {
    "format": 1,
    "name": "full",
    "seed": 3,
    "model": {"base": "package:some", "sha256": {"model.safetensors": "a" * 64}, "revision": "v1"},
    "task": {
        "kind": "text-classification",
        "labels": ["no", "yes"],
        "pooling": "cls",
        "system_prompt": "be kind",
        "max_new_tokens": 32,
    },
    "data": {
        "columns": {"text": "note", "label": "ward"},
        "unit": "patient",
        "max_length": 64,
        "unicode": "NFC",
        "validation_fraction": 0.1,
    },
    "lora": {
        "rank": 4,
        "alpha": 8.0,
        "dropout": 0.1,
        "targets": ["query", "value"],
        "layers": 2,
        "modules_to_save": ["pooler"],
        "rank_pattern": {"layer.1.attention.self.query": 2},
        "alpha_pattern": {"value": 12.0},
        "rslora": True,
    },
    "training": {
        "learning_rate": 0.01,
        "head_learning_rate": 0.02,
        "schedule": {"shape": "cosine", "warmup": 0.1, "floor": 0.1},
        "optimizer": "sgd",
        "rounds": 5,
        "local_steps": 3,
        "local_epochs": None,
        "sampling_rate": 0.25,
        "weight_decay": 0.01,
        "momentum": 0.5,
        "betas": [0.9, 0.99],
        "dropout": 0.05,
        "fedprox_mu": 0.1,
        "patience": 2,
    },
    "aggregation": {
        "learning_rate": 0.9,
        "head_learning_rate": 0.8,
        "schedule": {"shape": "linear", "warmup": 0.0, "floor": 0.5},
        "method": "ffa",
        "refactor_every": 2,
        "optimizer": "fedavgm",
        "momentum": 0.8,
        "betas": [0.8, 0.9],
        "tau": 0.01,
        "weighting": "equal",
        "largest_count": 5000,
        "max_norm": 3.0,
    },
    "cohort": {"fraction": 0.5, "sites": ["ash", "elm", "fir", "oak"], "min_sites": 3},
    "privacy": {
        "mode": "local",
        "unit": "patient",
        "epsilon": 4.0,
        "delta": 1e-5,
        "clip_norm": 0.5,
        "dropouts": 2,
        "epsilon_alone": None,
        "dropout_fraction": 0.2,
        "max_records_per_unit": 2,
        "clipping": "adaptive",
        "stability": 0.02,
        "quantile": 0.6,
        "quantile_rate": 0.3,
        "quantile_share": 0.05,
    },
    "secure_aggregation": {
        "mode": "masked",
        "corrupt": 1,
        "corrupt_fraction": 0.2,
        "dropout_fraction": 0.2,
        "security": 100,
        "bits": 20,
        "bound": 0.5,
        "head_bound": 0.75,
        "groups": 5,
    },
}

# Another allowed value for every leaf that has one. A field that is added to the study must be added here.
OTHER: dict[str, Any] = {
    "name": "other",
    "seed": 4,
    "model.base": "package:other",
    "model.sha256.model.safetensors": "b" * 64,
    "model.revision": "v2",
    "task.labels.0": "never",
    "task.labels.1": "always",
    "task.pooling": "last",
    "task.system_prompt": "",
    "task.max_new_tokens": 33,
    "data.columns.text": "letter",
    "data.columns.label": "clinic",
    "data.unit": "document",
    "data.max_length": 65,
    "data.unicode": "none",
    "data.validation_fraction": 0.2,
    "lora.rank": 5,
    "lora.alpha": 8.5,
    "lora.dropout": 0.0,
    "lora.targets.0": "key",
    "lora.targets.1": "dense",
    "lora.layers": None,
    "lora.modules_to_save.0": "norm",
    "lora.rank_pattern.layer.1.attention.self.query": 3,
    "lora.alpha_pattern.value": 13.0,
    "lora.rslora": False,
    "training.learning_rate": 0.011,
    "training.head_learning_rate": None,
    "training.schedule.shape": "linear",
    "training.schedule.warmup": 0.2,
    "training.schedule.floor": 0.0,
    "training.optimizer": "adamw",
    "training.rounds": 6,
    "training.local_steps": 4,
    "training.local_epochs": 2.0,
    "training.sampling_rate": 0.5,
    "training.weight_decay": 0.02,
    "training.momentum": 0.25,
    "training.betas.0": 0.95,
    "training.betas.1": 0.999,
    "training.dropout": 0.0,
    "training.fedprox_mu": 0.0,
    "training.patience": None,
    "aggregation.learning_rate": 1.0,
    "aggregation.head_learning_rate": None,
    "aggregation.schedule.shape": "constant",
    "aggregation.schedule.warmup": 0.1,
    "aggregation.schedule.floor": 0.6,
    "aggregation.method": "fedavg",
    "aggregation.refactor_every": 1,
    "aggregation.optimizer": "fedadam",
    "aggregation.momentum": 0.9,
    "aggregation.betas.0": 0.81,
    "aggregation.betas.1": 0.91,
    "aggregation.tau": 0.02,
    "aggregation.weighting": "declared",
    "aggregation.max_norm": None,
    "aggregation.largest_count": 6000,
    "cohort.fraction": 0.6,
    "cohort.min_sites": 4,
    "cohort.sites.0": "yew",
    "cohort.sites.1": "yew",
    "cohort.sites.2": "yew",
    "cohort.sites.3": "yew",
    "privacy.unit": "record",
    "privacy.epsilon": 4.5,
    "privacy.delta": 1e-6,
    "privacy.clip_norm": 0.6,
    "privacy.dropouts": 0,
    "privacy.dropout_fraction": 0.3,
    "privacy.max_records_per_unit": 3,
    "privacy.clipping": "automatic",
    "privacy.stability": 0.05,
    "privacy.quantile": 0.7,
    "privacy.quantile_rate": 0.1,
    "privacy.quantile_share": 0.1,
    "secure_aggregation.mode": "plain",
    "secure_aggregation.corrupt": 0,
    "secure_aggregation.corrupt_fraction": 0.1,
    "secure_aggregation.dropout_fraction": 0.1,
    "secure_aggregation.bits": None,
    "secure_aggregation.security": 80,
    "secure_aggregation.bound": None,
    "secure_aggregation.head_bound": None,
    "secure_aggregation.groups": 1,
}
DISTRIBUTED: dict[str, Any] = {
    "privacy.mode": "distributed",
    "privacy.clipping": "flat",
    "training.local_steps": 1,
    "training.optimizer": "sgd",
    "training.learning_rate": 1.0,
    "training.head_learning_rate": None,
    "training.schedule": {"shape": "constant", "warmup": 0.0, "floor": 0.0},
    "training.weight_decay": 0.0,
    "training.momentum": 0.0,
    "training.fedprox_mu": 0.0,
    "training.patience": None,
    "aggregation.weighting": "declared",
    "secure_aggregation.mode": "masked",
    "secure_aggregation.groups": 1,
    "data.validation_fraction": 0.0,
}
# What has one value only, or must change together with other fields to stay valid.
FIXED = {"format"}
TOGETHER: dict[str, dict[str, Any]] = {
    "task.kind": {
        "task.kind": "token-classification",
        "task.labels": ["O", "B-x", "I-x"],
        "data.columns": {"tokens": "note", "tags": "ward"},
    },
    "privacy.mode": {
        "privacy.mode": "none",
        "privacy.epsilon": None,
        "privacy.delta": None,
        "privacy.clip_norm": None,
        "privacy.clipping": "flat",
    },
    "privacy.epsilon_alone": {**DISTRIBUTED, "privacy.epsilon_alone": 100.0},
    "training.local_epochs": {"training.local_epochs": 2.0, "training.local_steps": None},
    "training.local_steps": {"training.local_epochs": 0.75, "training.local_steps": None},
    "training.optimizer": {"training.optimizer": "adamw", "training.momentum": 0.0},
}


def leaves(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, str(index)))
    else:
        yield path, value


def changed(path: str, value: Any, document: dict[str, Any] = FULL) -> dict[str, Any]:
    """Return a copy of the document with one leaf or table replaced; keys may contain dots."""
    result = copy.deepcopy(document)
    node: Any = result
    rest = path
    while True:
        if isinstance(node, list):
            key, _, rest = rest.partition(".")
            if not rest:
                node[int(key)] = value
                return result
            node = node[int(key)]
            continue
        known = next((k for k in node if rest == k or rest.startswith(f"{k}.")), None)
        if known is None or known == rest:
            node[rest] = value
            return result
        node, rest = node[known], rest[len(known) + 1 :]


def changed_all(values: dict[str, Any]) -> dict[str, Any]:
    document = FULL
    for path, value in values.items():
        document = changed(path, value, document)
    return document


def error_of(document: dict[str, Any]) -> str:
    with pytest.raises(StudyError) as caught:
        Study.parse(document)
    assert caught.value.exit_code == 2
    return caught.value.message


# The digest


def test_the_table_of_changes_covers_every_leaf_of_the_full_study() -> None:
    study = Study.parse(FULL)
    assert study.document() == FULL, "the full document must spell out every field"
    assert {".".join(path) for path, _ in leaves(FULL)} == set(OTHER) | FIXED | set(TOGETHER)


@pytest.mark.parametrize("path", sorted(set(OTHER) | set(TOGETHER)))
def test_the_digest_changes_with_every_field(path: str) -> None:
    document = changed_all(TOGETHER.get(path, {path: OTHER.get(path)}))
    other = Study.parse(document)
    assert other.document() == document, "the value must arrive where it was written"
    assert other.digest != Study.parse(FULL).digest


def test_all_those_studies_have_different_digests() -> None:
    documents = [changed_all(TOGETHER.get(path, {path: OTHER.get(path)})) for path in {**OTHER, **TOGETHER}]
    assert len({Study.parse(document).digest for document in documents}) == len(documents)


@given(st.randoms(use_true_random=False))
def test_the_digest_does_not_depend_on_the_order_of_keys(random: Any) -> None:
    def shuffled(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        keys = list(value)
        random.shuffle(keys)
        return {key: shuffled(value[key]) for key in keys}

    assert Study.parse(shuffled(FULL)).digest == Study.parse(FULL).digest


def test_defaults_count_as_if_they_were_written() -> None:
    assert Study.parse(minimal()).digest == Study.parse(Study.parse(minimal()).document()).digest


@given(st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=8), max_size=4))
def test_the_simulation_table_is_no_part_of_the_study(table: dict[str, Any]) -> None:
    assert Study.parse({**FULL, "simulation": table}) == Study.parse(FULL)


def test_the_digest_is_that_of_the_canonical_json() -> None:
    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: whole(item) for key, item in value.items()}
        if isinstance(value, list):
            return [whole(item) for item in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    # Sorted keys, no spaces, 2.0 as 2: for this study, whose other floats Python prints alike, that is RFC 8785.
    study = Study.parse(changed("privacy.delta", 0.00025))
    text = json.dumps(whole(study.document()), sort_keys=True, separators=(",", ":"))
    assert study.digest == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def test_a_changed_copy_has_a_digest_of_its_own() -> None:
    study = Study.parse(FULL)
    before = study.digest
    copied = study.model_copy(update={"cohort": CohortSection(min_sites=1)})
    assert copied.digest != before
    assert study.digest == before
    assert study.model_copy().digest == before


def test_a_study_is_frozen() -> None:
    study = Study.parse(FULL)
    with pytest.raises(ValidationError, match="frozen"):
        study.seed = 9
    with pytest.raises(ValidationError, match="frozen"):
        study.privacy.epsilon = 100.0


# What is refused


@pytest.mark.parametrize(
    ("path", "value", "allowed"),
    [
        ("format", 2, "1"),
        ("name", "Not a name", "[a-z0-9]"),
        ("name", "a" * 64, "62"),
        ("name", "a\n", "[a-z0-9]"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**53, str(2**53)),
        ("model.base", "", "at least 1"),
        ("model.sha256", {}, "at least 1"),
        ("model.sha256.model.safetensors", "A" * 64, "[0-9a-f]{64}"),
        ("task.kind", "regression", "'causal-lm'"),
        ("task.pooling", "max", "'mean', 'cls' or 'last'"),
        ("task.max_new_tokens", 0, "1"),
        ("task.labels.0", "", "at least 1"),
        ("data.unicode", "NFD", "'NFC', 'NFKC' or 'none'"),
        ("data.max_length", 3, "4"),
        ("data.max_length", 131073, "131072"),
        ("data.validation_fraction", 0.6, "0.5"),
        ("data.unit", "", "at least 1"),
        ("lora.rank", 0, "1"),
        ("lora.rank", 513, "512"),
        ("lora.alpha", 0.0, "greater than 0"),
        ("lora.dropout", 1.0, "less than 1"),
        ("lora.targets", [], "at least 1"),
        ("lora.targets", "query", "array"),
        ("lora.layers", 0, "1"),
        ("training.learning_rate", -0.1, "greater than 0"),
        ("training.learning_rate", 10_001.0, "less than or equal to 10000"),
        ("training.head_learning_rate", 1e30, "less than or equal to 10000"),
        ("training.weight_decay", 101.0, "less than or equal to 100"),
        ("training.fedprox_mu", 1001.0, "less than or equal to 1000"),
        ("aggregation.learning_rate", 1e5, "less than or equal to 10000"),
        ("training.rounds", 0, "1"),
        ("training.rounds", 100_001, "100000"),
        ("training.local_steps", 0, "1"),
        ("training.sampling_rate", 0.0, "greater than 0"),
        ("training.sampling_rate", 1.5, "1"),
        ("training.optimizer", "adam", "'adamw' or 'sgd'"),
        ("training.betas.1", 1.0, "less than 1"),
        ("training.schedule.shape", "step", "'constant', 'linear' or 'cosine'"),
        ("training.schedule.warmup", 1.0, "less than 1"),
        ("training.schedule.floor", 1.5, "1"),
        ("training.patience", 0, "1"),
        ("aggregation.method", "mean", "'fedsvd', 'ffa' or 'fedavg'"),
        ("aggregation.optimizer", "adagrad", "'adam'"),
        ("aggregation.tau", 0.0, "greater than 0"),
        ("aggregation.weighting", "exact", "'declared' or 'equal'"),
        ("cohort.fraction", 0.0, "greater than 0"),
        ("cohort.min_sites", 0, "1"),
        ("privacy.mode", "central", "'distributed' or 'none'"),
        ("privacy.unit", "visit", "'record' or 'patient'"),
        ("privacy.epsilon", 0.0, "greater than 0"),
        ("privacy.delta", 0.1, "less than 0.1"),
        ("privacy.clip_norm", -1.0, "greater than or equal to 0.000001"),
        ("secure_aggregation.mode", "magic", "'masked' or 'plain'"),
        ("secure_aggregation.bits", 25, "less than or equal to 24"),
        ("secure_aggregation.corrupt_fraction", 1.0, "less than 1"),
        ("secure_aggregation.bound", 0.0, "greater than 0"),
    ],
)
def test_a_wrong_value_is_named_with_field_value_and_what_is_allowed(path: str, value: Any, allowed: str) -> None:
    message = error_of(changed(path, value))
    assert f"{path}" in message
    assert repr(value) in message
    assert allowed in message


@pytest.mark.parametrize(
    ("optimizer", "fields", "says"),
    [
        ("sgd", {"learning_rate": 2.0, "fedprox_mu": 0.6}, "weight_decay + fedprox_mu of at most 1, found 2 * 0.6"),
        ("sgd", {"learning_rate": 2.0, "fedprox_mu": 0.3, "weight_decay": 0.21}, "found 2 * 0.51"),
        ("sgd", {"head_learning_rate": 11.0, "weight_decay": 0.1}, "found 11 * 0.1"),
        ("adamw", {"learning_rate": 0.5, "weight_decay": 2.1}, "times weight_decay of at most 1, found 0.5 * 2.1"),
        ("sgd", {"learning_rate": 2.0, "fedprox_mu": 0.25, "weight_decay": 0.25}, ""),
        ("adamw", {"learning_rate": 0.01, "head_learning_rate": 0.01, "fedprox_mu": 1e3, "weight_decay": 100.0}, ""),
    ],
)
def test_a_pull_that_would_overshoot_is_refused(optimizer: str, fields: dict[str, float], says: str) -> None:
    plain = {"momentum": 0.0, "weight_decay": 0.0, "fedprox_mu": 0.0, "learning_rate": 0.1, "head_learning_rate": 0.1}
    study = changed("training.optimizer", optimizer)
    study["training"] |= plain | fields
    if says:
        assert says in error_of(study)
    else:
        Study.parse(study)


def test_no_field_takes_a_value_of_another_kind() -> None:
    for path in (".".join(path) for path, _ in leaves(FULL)):
        for value in ({"a": 1}, [["x"]], float("nan"), float("inf"), -1.5):
            assert path in error_of(changed(path, value))


def test_neither_a_truth_value_nor_text_is_a_number() -> None:
    for path in (".".join(p) for p, v in leaves(FULL) if type(v) in (int, float) and p != ("format",)):
        for value in (True, "1"):
            assert f"{path}: input should be a valid" in error_of(changed(path, value))
            assert f"got {value!r}" in error_of(changed(path, value))


def test_no_integer_is_too_large_for_the_digest() -> None:
    for path in (".".join(p) for p, v in leaves(FULL) if type(v) is int):
        assert path in error_of(changed(path, 2**53))


def test_a_pair_of_betas_is_two() -> None:
    assert "training.betas.1: is missing" in error_of(changed("training.betas", [0.9]))
    assert "training.betas: tuple should have at most 2 items" in error_of(changed("training.betas", [0.9] * 3))


@pytest.mark.parametrize(
    ("path", "home"),
    [
        ("training.seed", "at the top level, before every [table]"),
        ("clip_norm", "in [privacy]"),
        ("lora.min_sites", "in [cohort]"),
    ],
)
def test_a_key_in_the_wrong_table_is_told_where_it_belongs(path: str, home: str) -> None:
    assert f"{path}: unknown key; it belongs {home}" in error_of(changed(path, 1))


@pytest.mark.parametrize("table", ["", *[k for k, v in FULL.items() if isinstance(v, dict)], "training.schedule"])
def test_an_unknown_key_is_refused_in_every_table(table: str) -> None:
    path = f"{table}.epsilonn".removeprefix(".")
    message = error_of(changed(path, 1))
    assert f"{path}: unknown key; " in message
    hint = "did you mean epsilon?" if table == "privacy" else "remove it or check its spelling"
    assert message.count("unknown key") == message.count(hint) == 1


@pytest.mark.parametrize(
    "path",
    [
        *("name", "model", "task", "data", "lora", "training", "privacy"),
        *(
            "model.base",
            "model.sha256",
            "task.kind",
            "data.columns",
            "lora.targets",
            "training.learning_rate",
        ),
        *("training.rounds", "training.sampling_rate", "privacy.mode"),
    ],
)
def test_a_missing_key_is_named(path: str) -> None:
    document = copy.deepcopy(FULL)
    table, _, key = path.rpartition(".")
    del (document[table] if table else document)[key]
    assert f"{path}: is missing" in error_of(document)


def test_all_wrong_fields_are_named_at_once() -> None:
    message = error_of(changed_all({"seed": -1, "lora.rank": 0, "privacy.clip_norm": 0.0}))
    assert all(f"\n  {path}: " in message for path in ("seed", "lora.rank", "privacy.clip_norm"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task.labels": ["one"]}, "task: labels: text-classification needs at least 2, got 1"),
        ({"task.labels": ["a", "b", "a"]}, "task: labels: a label is named twice"),
        ({"task.kind": "causal-lm"}, "task: labels: causal-lm has no labels"),
        (
            {"task.kind": "causal-lm", "task.labels": []},
            "data.columns: causal-lm needs exactly answer, prompt; or messages; or instruction, output (optional: "
            "input), got label, text",
        ),
        ({"task.kind": "token-classification"}, "labels: token-classification needs O"),
        ({"task.kind": "token-classification", "task.labels": ["O", "B-x"]}, "needs O, and both B-x and I-x"),
        ({"task.kind": "token-classification", "task.labels": ["B-x", "I-x"]}, "needs O, and both B-x and I-x"),
        (
            {"data.columns": {"text": "t"}},
            "data.columns: text-classification needs exactly label, text, got text",
        ),
        ({"data.columns": {}}, "got none"),
        ({"data.columns": {"text": "t", "label": "l", "tags": "g"}}, "needs exactly label, text"),
        ({"training.local_epochs": 1.0}, "training: set exactly one of local_steps and local_epochs"),
        ({"training.local_steps": None}, "training: set exactly one of local_steps and local_epochs"),
        ({"training.optimizer": "adamw"}, "training: momentum: optimizer adamw has none"),
        (
            {"aggregation.method": "fedsvd", "aggregation.optimizer": "fedadam"},
            "optimizer: fedadam keeps squared",
        ),
        (
            {"aggregation.method": "fedsvd", "aggregation.optimizer": "fedyogi"},
            "optimizer: fedyogi keeps squared",
        ),
        (
            {"aggregation.method": "fedsvd", "aggregation.optimizer": "adam"},
            "optimizer: adam keeps squared",
        ),
        ({"privacy.mode": "distributed", "privacy.delta": None}, "privacy: mode distributed needs delta"),
        ({"privacy.mode": "distributed", "privacy.clipping": "adaptive"}, "adaptive needs mode local"),
        ({"privacy.epsilon": None}, "privacy: mode local needs epsilon"),
        (
            {"privacy.epsilon": None, "privacy.delta": None, "privacy.clip_norm": None},
            "epsilon, delta, clip_norm",
        ),
        ({"privacy.mode": "none"}, "privacy: mode none takes no epsilon, delta, clip_norm"),
        ({"data.unit": None}, "privacy.unit: patient needs data.unit"),
        ({"data.validation_fraction": 0.0}, "training.patience: needs data.validation_fraction above 0"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(changes: dict[str, Any], said: str) -> None:
    assert said in error_of(changed_all(changes))


# A round of mode distributed is one step that the coordinator takes.


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("training.local_steps", 2, "training: in privacy.mode distributed a round is one step"),
        ("training.optimizer", "adamw", "training: in privacy.mode distributed a round is one step"),
        ("training.learning_rate", 0.1, "training: in privacy.mode distributed a round is one step"),
        ("training.head_learning_rate", 1.0, "training: in privacy.mode distributed a round is one step"),
        ("training.schedule", {"warmup": 0.1}, "training: in privacy.mode distributed a round is one step"),
        ("training.weight_decay", 0.1, "training: in privacy.mode distributed a round is one step"),
        ("training.momentum", 0.1, "training: in privacy.mode distributed a round is one step"),
        ("training.fedprox_mu", 0.1, "training: in privacy.mode distributed a round is one step"),
        (
            "aggregation.weighting",
            "equal",
            "aggregation.weighting: in privacy.mode distributed all units count equally",
        ),
        ("secure_aggregation.mode", "plain", "only the sum over all sites is private"),
        ("secure_aggregation.groups", 3, "only the sum over all sites is private"),
        ("data.validation_fraction", 0.1, "privacy.mode distributed releases only gradients"),
        ("privacy.epsilon_alone", 1e-3, "epsilon_alone: needs mode distributed and a value above epsilon"),
    ],
)
def test_what_shared_noise_does_not_cover_is_refused(path: str, value: Any, said: str) -> None:
    study = Study.parse(changed_all(DISTRIBUTED))
    assert study.distributed
    assert study.private
    assert said in error_of(changed_all(DISTRIBUTED | {path: value}))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5))
def test_nothing_but_a_study_error_comes_of_any_value(value: Any) -> None:
    for path in ("name", "training", "training.betas", "task.labels", "privacy.epsilon", "model.sha256"):
        try:
            study = Study.parse(changed(path, value))
        except StudyError:
            continue
        assert study.digest.startswith("sha256:")


def test_text_that_utf8_cannot_hold_is_refused() -> None:
    surrogate = changed("model.sha256", {"\ud800": "a" * 64})
    with pytest.raises(StudyError):
        Study.parse(surrogate)


# What it works out


def test_epochs_become_steps_at_the_sampling_rate() -> None:
    study = Study.parse(changed_all({"training.local_steps": None, "training.local_epochs": 2.0}))
    assert study.training.steps == 8
    assert study.total_steps == 40
    few = Study.parse(changed_all({"training.local_steps": None, "training.local_epochs": 0.01}))
    assert few.training.steps == 1


def test_a_study_is_private_unless_it_says_otherwise() -> None:
    assert Study.parse(FULL).private
    assert not Study.parse(changed_all(TOGETHER["privacy.mode"])).private


@pytest.mark.parametrize("corrupt", [0, 1, 5])
def test_masking_needs_a_cohort_in_which_a_site_can_hide(corrupt: int) -> None:
    anyone: dict[str, Any] = {"cohort.sites": []}
    document = changed_all({"secure_aggregation.corrupt": corrupt, "cohort.min_sites": corrupt + 2, **anyone})
    assert Study.parse(document).secure_aggregation.mode == "masked"
    if corrupt:
        short = changed_all({"secure_aggregation.corrupt": corrupt, "cohort.min_sites": corrupt + 1, **anyone})
        assert f"cohort.min_sites: a sum hides a site only among {corrupt + 2} or more" in error_of(short)
        short["secure_aggregation"]["mode"] = "plain"
        Study.parse(short)


def test_named_sites_are_different_and_enough() -> None:
    assert "cohort.sites: a site is named twice" in error_of(changed("cohort.sites", ["ash", "elm", "elm"]))
    assert "cohort.sites: must name at least cohort.min_sites = 3 sites, got 2" in error_of(
        changed("cohort.sites", ["ash", "elm"])
    )


def test_two_groups_are_refused_as_neither_is_the_outlying_one() -> None:
    assert "secure_aggregation.groups" in error_of(changed("secure_aggregation.groups", 2))


def test_updates_are_masked_unless_the_study_asks_for_plain_aggregation() -> None:
    document = minimal()
    del document["secure_aggregation"]
    assert Study.parse(document).secure_aggregation.mode == "masked"


# Files


def minimal() -> dict[str, Any]:
    return {
        "name": "small",
        "model": {"base": "here", "sha256": {"model.safetensors": "0" * 64}},
        "task": {"kind": "causal-lm"},
        "data": {"columns": {"prompt": "q", "answer": "a"}},
        "lora": {"targets": ["q_proj"]},
        "training": {"learning_rate": 0.1, "rounds": 1, "local_steps": 1, "sampling_rate": 0.5},
        "privacy": {"mode": "none"},
        "secure_aggregation": {"mode": "plain"},
    }


def toml(document: dict[str, Any], table: str = "") -> str:
    """Write plain values as TOML; None is left out, as TOML has none."""
    plain = {k: v for k, v in document.items() if not isinstance(v, dict) and v is not None}
    lines = [f"{json.dumps(k)} = {json.dumps(v)}" for k, v in plain.items()]
    for key, value in document.items():
        if isinstance(value, dict):
            inner = f"{table}.{json.dumps(key)}".removeprefix(".")
            lines += [f"[{inner}]", toml(value, inner)]
    return "\n".join(lines)


@pytest.mark.parametrize("document", [FULL, minimal(), {**FULL, "simulation": {"data": "notes"}}])
def test_a_study_survives_the_way_through_a_file(document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(toml(document), encoding="utf-8")
    study = load_study(tmp_path / "study.toml")
    assert study == Study.parse(document)
    assert study.digest == Study.parse(json.loads(json.dumps(study.document()))).digest


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no study file at .*absent\.toml") as caught:
        load_study(tmp_path / "absent.toml")
    assert caught.value.hint == "check the path; `privet new FILES` makes a study from data files"


@pytest.mark.parametrize("content", [b"name = ", b"[a]\n[a]\n", b"a = 1\na = 2\n"])
def test_a_file_that_is_not_toml_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_bytes(content)
    with pytest.raises(StudyError, match=r"study\.toml is not valid TOML"):
        load_study(file)


def test_a_file_that_an_editor_saved_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_bytes(b"\xef\xbb\xbf" + toml(minimal()).encode())
    assert load_study(file).digest == Study.parse(minimal()).digest
    file.write_bytes(b"# a\n# \xe4\n")
    with pytest.raises(StudyError, match=r"study\.toml is not valid TOML: line 2 is not text in UTF-8"):
        load_study(file)


def test_a_date_is_no_name(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(toml(minimal()).replace('"small"', "2026-01-01T00:00:00"), encoding="utf-8")
    with pytest.raises(StudyError, match="name: string should match"):
        load_study(file)
