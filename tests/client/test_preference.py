"""Preference tuning: the loss of pairs and its gradient, their units, their forms, and their figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from privet.client.release.applied import predict
from privet.client.release.asking import Asked
from privet.client.release.evaluation import evaluate_release
from privet.client.release.exports import export_release
from privet.client.release.generation import greedy_answers
from privet.client.release.material import UNNAMED
from privet.client.release.opened import mounted, open_release
from privet.client.site import Resources
from privet.client.training import preference
from privet.client.training.data import load_records
from privet.client.training.dp import clip_units, per_sample_gradients
from privet.client.training.features import (
    ANSWER,
    IGNORED,
    QUESTION,
    Feature,
    Pair,
    encode_records,
    measure_records,
)
from privet.client.training.host import ModelHost
from privet.client.training.model import initial_adapter, open_host
from privet.client.training.passes import Score, score
from privet.client.training.preference import pair_factor, pair_loss, reference_margins, score_pairs
from privet.client.training.tasks import collate, evaluate, forward
from privet.client.training.train import Draws, Steps, TrainingSet, clipping_of, prepare, term_sum, train_round
from privet.client.training.validation import EXACT, validation_points
from privet.common.audit.release import CARD
from privet.common.errors import DataError, DivergedError, StateError, StudyError
from privet.common.privacy.accounting import PrivacyEvent
from privet.common.privacy.noise import SeededRandomness
from privet.common.study.study import Study
from tests.client.test_dp import single_passes
from tests.support.invariance import poison
from tests.support.losses import token_losses
from tests.support.released import run_of
from tests.support.tiny import Row, pair_rows, private, random_adapter, records_of, rows_for, tiny_study, write_rows

CPU = Resources(device="cpu", precision="fp32")
MESSAGES = {"messages": "messages", "chosen": "chosen", "rejected": "rejected"}


def study_of(base: Path, **more: Any) -> Study:
    return tiny_study(base, **{"task.kind": "preference", **more})


def opened(study: Study, rows: int = 6) -> tuple[ModelHost, list[Feature]]:
    """Return the study's host, and drawn pairs."""
    host = open_host(study, CPU)
    return host, encode_records(study, host.tokenizer, records_of(study, rows_for(study, rows)))


def pairs_in(features: Sequence[Feature]) -> list[Pair]:
    return [feature for feature in features if isinstance(feature, Pair)]


def steps_of(host: ModelHost, study: Study, features: Sequence[Feature], most: int = 32) -> Steps:
    trained = host.train_only(host.spec.trained(study.aggregation.method))
    data = TrainingSet(features, [[row] for row in range(len(features))], len(features))
    prepare(host, data, most)
    return Steps(host, study, data, [parameter for _, parameter in trained], most)


def gradients_of(steps: Steps, drawn: Mapping[int, Sequence[int]]) -> torch.Tensor:
    """Return the gradient of each pair [n, P], in the order of the passes."""
    host, found = steps.host, []
    collecting = per_sample_gradients(host.model, steps.parameters, packed=host.shape.packed)
    with host.passing(training=True), collecting as per_sample:
        for gradients, _ in steps.pairs(drawn, per_sample):
            found += gradients
    return torch.stack(found)


def log_probability(host: ModelHost, feature: Feature) -> torch.Tensor:
    """Return the log-probability of an answer by a plain forward pass of its own."""
    batch = collate(host, [feature])
    return -token_losses(host.kind, forward(host, batch), batch)[0][0]


def direct_loss(host: ModelHost, pair: Pair, beta: float) -> torch.Tensor:
    """Return the loss of equation 7, by PyTorch's own functions."""
    with host.bare(), torch.no_grad():
        reference = [log_probability(host, sequence) for sequence in pair.sequences]
    chosen, rejected = (log_probability(host, sequence) for sequence in pair.sequences)
    return -functional.logsigmoid(beta * ((chosen - reference[0]) - (rejected - reference[1])))


def direct_gradient(host: ModelHost, pair: Pair, beta: float, steps: Steps) -> tuple[torch.Tensor, float]:
    """Return the gradient [P] of `direct_loss`, and the loss."""
    loss = direct_loss(host, pair, beta)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(steps.parameters))]), loss.item()


# --- loss and gradient -----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["packed", "single"])
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("family", ["llama", "llama-chat", "gpt2"])
def test_the_gradient_of_a_pair_is_that_of_the_loss(
    bases: Mapping[str, Path], family: str, beta: float, engine: str
) -> None:
    study = study_of(bases[family], **{"task.beta": beta, "aggregation.method": "fedavg", "data.max_length": 64})
    host, features = opened(study)
    host.mount(random_adapter(host.spec, scale=0.2))
    with single_passes(host, engine):
        assert host.shape.packed == (engine == "packed")
        steps = steps_of(host, study, features, most=5)
        order = [row for row, _ in sorted(enumerate(features), key=lambda item: (steps._longest(item[0]), item[0]))]
        found = gradients_of(steps, {row: [row] for row in order})
        scored = score_pairs(host, features)
    for gradient, row in zip(found, order, strict=True):
        (pair,) = pairs_in([features[row]])
        wanted, loss = direct_gradient(host, pair, beta, steps)
        assert scored[row].loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
        allowed = 1e-5 * float(wanted.norm()) + 1e-7
        if float((gradient - wanted).norm()) > allowed:
            # Two nearly equal gradients are subtracted: plain autograd in float32 is itself off, by processors
            # differently far. Ours may be twice as far from float64, and no more.
            host.model.double()
            exact = direct_gradient(host, pair, beta, steps)[0].float()
            host.model.float()
            assert float((gradient - exact).norm()) <= max(allowed, 2 * float((wanted - exact).norm()))


@pytest.mark.parametrize("margin", [0.0, 1e-3, -1e-3, 3.0, -3.0, 700.0, -700.0, 1e6, -1e6])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_loss_and_factor_are_those_of_the_logistic_function(beta: float, margin: float) -> None:
    x = torch.tensor(beta * margin, dtype=torch.float64)
    assert pair_loss(beta, margin) == pytest.approx(float(-functional.logsigmoid(x)), rel=1e-12)
    assert pair_factor(beta, margin) == pytest.approx(beta * float(torch.sigmoid(-x)), rel=1e-12)


def test_a_pair_without_a_finite_margin_has_no_factor() -> None:
    for margin in (math.nan, math.inf, -math.inf):
        assert math.isnan(pair_factor(0.1, margin))


def test_before_training_margins_are_exactly_zero(llama: Path) -> None:
    study = study_of(llama)
    host, features = opened(study)
    host.mount(initial_adapter(study, host))
    found = score_pairs(host, features)
    assert [(pair.margin, pair.correct) for pair in found] == [(0.0, 0.5)] * len(features)
    metrics = evaluate(host, study, features).metrics(())
    assert metrics == {"loss": pytest.approx(math.log(2)), "accuracy": 0.5, "margin": 0.0, "records": len(features)}


def test_the_reference_is_the_base_whatever_is_mounted_and_is_scored_once(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(llama, **{"name": "once", "lora.rank": 3, "lora.modules_to_save": ["lm_head"]})
    host, features = opened(study)
    host.references.clear()
    host.mount(initial_adapter(study, host))
    first = dict(reference_margins(host, features[:3]))
    host.references.clear()
    adapter = random_adapter(host.spec)
    host.mount(adapter)
    counted: list[int] = []

    def counting(host: ModelHost, found: Sequence[Feature], most: int) -> list[Score]:
        counted.append(len(found))
        return score(host, found, most)

    monkeypatch.setattr(preference, "score", counting)
    assert dict(reference_margins(host, features[:3])) == first
    reference_margins(host, features)
    reference_margins(host, features)
    assert counted == [6, 2 * (len(features) - 3)]
    assert all(np.array_equal(host.parameters[n].detach().numpy(), v) for n, v in adapter.values.items())


def test_without_privacy_a_pair_without_a_finite_loss_ends_the_round(llama: Path) -> None:
    study = study_of(llama, **{"training.sampling_rate": 1.0, "lora.rank": 3})  # a host of its own: it counts losses
    host, features = opened(study)
    sources = Draws(SeededRandomness(1, "sampling"), SeededRandomness(1, "noise"))
    with poison(host) as token:
        (pair,) = pairs_in(features[:1])
        bad = replace(pair, rejected=replace(pair.rejected, ids=(token, *pair.rejected.ids[1:])))
        data = TrainingSet([bad, *features[1:]], [[row] for row in range(len(features))], len(features))
        with pytest.raises(DivergedError):
            train_round(
                host, study, initial_adapter(study, host), data, sources, first_step=0, mechanism=None, physical_batch=8
            )


# --- units -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["packed", "single"])
def test_a_patient_s_pairs_are_added_before_they_are_clipped(llama: Path, engine: str) -> None:
    study = study_of(llama, privacy=private(clip_norm=0.01, unit="patient"), **{"data.unit": "patient"})
    host, features = opened(study)
    host.mount(random_adapter(host.spec))
    clipping = clipping_of(study.privacy, 0.01, 1.0)
    with single_passes(host, engine):
        steps = steps_of(host, study, features, most=3)
        own = {row: gradients_of(steps, {0: [row]})[0] for row in range(4)}
        collecting = per_sample_gradients(host.model, steps.parameters, packed=host.shape.packed)
        with host.passing(training=True), collecting as per_sample:
            terms = term_sum(steps, {0: [0, 1], 1: [2, 3]}, per_sample, clipping)
    wanted, norms = clip_units(torch.stack([own[0] + own[1], own[2] + own[3]]), clipping)
    assert torch.equal(terms.total, wanted)
    assert terms.balance == -1  # both are longer than the clip norm
    assert bool((norms > clipping.norm).all())


@pytest.mark.parametrize("private_", [False, True])
def test_a_round_takes_pairs_as_records_and_counts_them(llama: Path, private_: bool) -> None:
    privacy = private() if private_ else {"mode": "none"}
    study = study_of(llama, privacy=privacy, **{"training.sampling_rate": 1.0, "training.local_steps": 2})
    host, features = opened(study)
    before = host.meter.copy()
    data = TrainingSet(features, [[row] for row in range(len(features))], len(features))
    sources = Draws(SeededRandomness(1, "sampling"), SeededRandomness(1, "noise"))
    mechanism = PrivacyEvent(0.5, 1.0, 2, "record") if private_ else None
    update = train_round(
        host, study, initial_adapter(study, host), data, sources, first_step=0, mechanism=mechanism, physical_batch=5
    )
    assert np.isfinite(update).all()
    assert update.any()
    found = host.meter.since(before)
    assert found.records == 2 * len(features)
    assert found.tokens == 2 * sum(len(s.ids) for pair in pairs_in(features) for s in pair.sequences)
    assert found.mean_loss == pytest.approx(math.log(2), rel=0.2)


def test_validation_sums_count_pairs(llama: Path) -> None:
    study = study_of(llama)
    host, features = opened(study)
    data = _site_data(features)
    found = validation_points(host, random_adapter(host.spec), data, EXACT) * EXACT
    scored = score_pairs(host, features)
    assert found[0] == len(features)
    assert found[2] == sum(pair.correct for pair in scored)


def _site_data(features: Sequence[Feature]) -> Any:
    from privet.client.training.loading import SiteData

    return SiteData(TrainingSet([], [], 1), features, [[row] for row in range(len(features))], ())


def test_single_answers_are_no_pairs(llama: Path) -> None:
    host, features = opened(study_of(llama))
    with pytest.raises(StateError, match="expected pairs"):
        score_pairs(host, [Feature(features[0].ids, features[0].labels)])


# --- forms -----------------------------------------------------------------------------------------------


def test_pairs_without_a_difference_or_without_a_text_are_dropped(llama: Path, tmp_path: Path) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows: list[Row] = [good, good, {**good, "chosen": " c "}, {**good, "rejected": ""}, {**good, "chosen": None}]
    records, report = load_records(write_rows(tmp_path / "p.jsonl", rows), study_of(llama))
    assert records.rows == (good,)
    assert report.dropped == {
        "missing value": 1,
        "empty text": 1,
        "equal chosen and rejected answers": 1,
        "exact duplicate": 1,
    }


def test_a_missing_column_of_pairs_is_named(llama: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b"}])
    with pytest.raises(DataError, match="rejected"):
        load_records(file, study_of(llama))


def test_a_conversation_s_last_question_has_two_answers(bases: Mapping[str, Path], tmp_path: Path) -> None:
    study = study_of(bases["llama-chat"], **{"data.columns": MESSAGES, "data.max_length": 100})
    turns = [{"role": r, "content": c} for r, c in (("user", "chest"), ("assistant", "pain"), ("user", "work"))]
    row = {"messages": turns, "chosen": "mild", "rejected": "again"}
    file = write_rows(tmp_path / "p.jsonl", [row, {**row, "messages": turns[1:2]}])
    records, report = load_records(file, study)
    assert records.rows == (row,)
    assert report.dropped == {"no user's turn before the answer": 1}
    host = open_host(study, CPU)
    (pair,) = pairs_in(encode_records(study, host.tokenizer, records))
    for sequence, answer in zip(pair.sequences, ("mild", "again"), strict=True):
        assert not isinstance(sequence.labels, int)
        learnt = host.tokenizer.decode([label for label in sequence.labels if label != IGNORED])
        assert learnt.replace(" ", "") == f"{answer}</s>"  # not the earlier answer
        assert "pain" in host.tokenizer.decode(sequence.ids)


@pytest.mark.parametrize("family", ["llama", "llama-chat"])
def test_both_answers_follow_the_same_prompt_where_it_is_cut(bases: Mapping[str, Path], family: str) -> None:
    study = study_of(bases[family], **{"data.max_length": 32})
    host = open_host(study, CPU)
    row = {"prompt": "chest pain since monday " * 10, "chosen": "mild", "rejected": "after work again " * 12}
    records = records_of(study, [row])
    (pair,) = pairs_in(encode_records(study, host.tokenizer, records))
    heads = []
    for sequence in pair.sequences:
        assert len(sequence.ids) <= 32
        assert not isinstance(sequence.labels, int)
        first = next(place for place, label in enumerate(sequence.labels) if label != IGNORED)
        assert sequence.ids[first:] == sequence.labels[first:]
        heads.append(sequence.ids[:first])
    assert heads[0] == heads[1]
    lengths = measure_records(study, host.tokenizer, records)
    assert lengths.cut == 1
    assert lengths.cuts == {QUESTION: 1, ANSWER: 1}


# --- studies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task.kind": "causal-lm", "task.beta": 0.1}, "beta: causal-lm compares no answers"),
        ({"task.train_on": "all"}, "train_on: preference compares last answers"),
        ({"task.beta": 0.0}, "beta"),
        ({"lora.dropout": 0.1}, "preference compares the model with its base"),
        ({"data.columns": {"prompt": "prompt", "chosen": "chosen"}}, "needs exactly chosen, prompt, rejected; or"),
    ],
)
def test_a_study_that_pairs_do_not_fit_is_refused(llama: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        study_of(llama, **change)


def test_beta_is_part_of_the_digest_only_where_it_is_set(llama: Path) -> None:
    assert "beta" not in tiny_study(llama).document()["task"]
    assert study_of(llama).digest != study_of(llama, **{"task.beta": 0.1}).digest
    assert open_host(study_of(llama), CPU).beta == 0.1


# --- use -------------------------------------------------------------------------------------------------


def test_a_tuned_model_is_used_as_a_language_model(llama: Path, tmp_path: Path) -> None:
    run, study = run_of(tmp_path / "run", llama, "preference")
    proof = export_release(open_release(run), tmp_path / "peft", "peft")
    assert proof["largest_difference"] <= proof["bound"]
    assert (
        json.loads((tmp_path / "peft" / "adapter_config.json").read_text(encoding="utf-8"))["task_type"] == "CAUSAL_LM"
    )
    assert "AutoModelForCausalLM" in (tmp_path / "peft" / CARD).read_text(encoding="utf-8")
    with mounted(open_release(run), CPU) as host:
        found = predict(host, study, ["chest pain", [{"role": "user", "content": "chest pain"}]])
        assert [result["answer"] for result in found] == greedy_answers(host, study, ["chest pain"]) * 2


def test_an_evaluation_compares_preferences_pair_by_pair(llama: Path, tmp_path: Path) -> None:
    run, study = run_of(tmp_path / "run", llama, "preference", {"data.unit": "patient"})
    host, adapter = open_host(study, CPU), open_release(run).adapter
    file = write_rows(tmp_path / "own.jsonl", pair_rows(36))
    asked = Asked(files=((UNNAMED, file),), replicates=100, answers=0)
    document = evaluate_release(open_release(run), asked, CPU).document
    found = document["measures"]
    assert document["primary"] == "accuracy"
    assert found["accuracy"]["base"]["value"] == 0.5
    assert found["loss"]["base"]["value"] == pytest.approx(math.log(2))
    assert found["margin"]["base"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert any("by definition" in note for note in document["notes"])
    records, _ = load_records(file, study, training=False)
    features = encode_records(study, host.tokenizer, records)
    host.mount(adapter)
    metrics = evaluate(host, study, features).metrics(())
    for name in ("accuracy", "loss", "margin"):
        assert found[name]["tuned"]["value"] == pytest.approx(metrics[name])
    for arm in ("base", "tuned"):
        host.mount(initial_adapter(study, host) if arm == "base" else adapter)
        with torch.no_grad():
            rows = [[log_probability(host, s) for s in pair.sequences] for pair in pairs_in(features)]
        tokens = [[sum(label != IGNORED for label in s.labels) for s in pair.sequences] for pair in pairs_in(features)]  # type: ignore[union-attr]
        likelier = np.mean([float(a > b) for a, b in rows])
        per_token = np.mean([float(a / n > b / m) for (a, b), (n, m) in zip(rows, tokens, strict=True)])
        assert found["likelier"][arm]["value"] == pytest.approx(likelier)
        assert found["likelier_per_token"][arm]["value"] == pytest.approx(per_token)
