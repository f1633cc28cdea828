"""What `privet check` derives from a study: sizes, traffic, memory, and the promise with its noise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from privet.client.site import Resources
from privet.client.training.model import open_host
from privet.client.training.packing import Shape
from privet.common.errors import PrivetError
from privet.common.masking.noise_shares import bits_of
from privet.common.secagg.quantize import lane_bits
from privet.simulations.data.federation import load_plan
from privet.simulations.terminal import explain
from privet.simulations.terminal.explain import (
    NETWORKS,
    bytes_up,
    explain_study,
    memory_bytes,
    seconds_on,
)
from privet.simulations.terminal.report import meaning_table
from tests.support.scenarios import scenario_file
from tests.support.tiny import private, tiny_study

WHOLE = {"training.sampling_rate": 1.0}  # accounted fast
SHARED = {
    "privacy": private(mode="distributed"),
    "training": {"local_steps": 1, "optimizer": "sgd", "learning_rate": 1.0, "sampling_rate": 1.0},
    "aggregation": {"method": "ffa", "optimizer": "adam", "learning_rate": 0.02, "largest_count": 100},
}


def explained(folder: Path, base: Path, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    found = explain_study(load_plan(scenario_file(folder, base, overrides=overrides)))
    assert json.loads(json.dumps(found)) == found  # --json prints it
    return found


def printed(meaning: dict[str, Any]) -> str:
    console = Console(width=500, record=True, quiet=True)
    with console.capture() as caught:
        console.quiet = False
        console.print(meaning_table(meaning))
    return " ".join(caught.get().split())


@pytest.mark.parametrize(
    ("server", "said"), [("fedavgm", "times smaller than with"), ("adam", "compare it with fedavgm")]
)
def test_correlated_noise_is_explained(tmp_path: Path, bert: Path, server: str, said: str) -> None:
    training = {**SHARED["training"], "rounds": 12, "sampling_rate": 0.25}
    privacy = {**SHARED["privacy"], "noise": "banded", "band": 4}
    aggregation = {**SHARED["aggregation"], "optimizer": server}
    found = explained(tmp_path, bert, {"privacy": privacy, "training": training, "aggregation": aggregation})
    assert found["shared_noise"]["band"]["steps"] == 4
    assert 1.2 < found["shared_noise"]["band"]["error_lower_by"] < 2.0
    assert said in printed(found)


def test_a_study_without_privacy_is_explained_and_has_no_promise(tmp_path: Path, bert: Path) -> None:
    found = explained(tmp_path, bert, {"training.rounds": 4, "training.local_steps": 3})
    assert found["privacy"] is None
    assert (found["rounds"], found["steps_per_round"], found["total_steps"]) == (4, 3, 12)
    assert found["passes_over_data"] == pytest.approx(12 * 0.25)
    assert 0 < found["trainable_parameters"] <= found["adapter_parameters"] < found["base_parameters"]
    text = printed(found)
    assert "none: the updates of the sites are not differentially private" in text
    assert "the coordinator sees only sums over sites" in text


def test_a_head_start_is_explained_beside_training_and_alone(tmp_path: Path, bert: Path) -> None:
    whole = {"privacy": private(), "training.sampling_rate": 1.0, "training.head_start": "class-means"}
    found = explained(tmp_path / "both", bert, whole)
    privacy = found["privacy"]
    assert privacy["epsilon_after_one_round"] < privacy["epsilon"] <= 8
    assert "1 round of a head start, in which every unit takes part, then 2 rounds of 3 steps" in printed(found)
    assert f"head start: noise multiplier {privacy['noise_multiplier_head_start']}, no sampling" in printed(found)
    alone = printed(explained(tmp_path / "alone", bert, {**whole, "training.rounds": 0}))
    assert "1 round of a head start, in which every unit takes part aggregation" in alone.replace("│ ", "")
    assert "no sampling" in alone


def test_a_block_of_rounds_takes_an_exchange_each_and_three_for_its_set_up(tmp_path: Path, bert: Path) -> None:
    alone = {"privacy.dropouts": 0, "privacy.dropout_fraction": 0.0, "training.rounds": 8}
    found = explained(tmp_path / "blocks", bert, {**SHARED, **alone, "secure_aggregation.block": 4})
    assert found["exchanges_per_round"] == 1.75
    assert "1.75 exchanges per round" in printed(found)
    short = explained(tmp_path / "short", bert, {**SHARED, **alone, "secure_aggregation.block": 400})
    assert short["exchanges_per_round"] == 1.375


def test_a_block_that_tolerates_drop_outs_takes_two_exchanges_and_its_shares(tmp_path: Path, bert: Path) -> None:
    more = {"training.rounds": 8, "cohort.min_sites": 4}
    alone = explained(tmp_path / "alone", bert, {**SHARED, **more})
    found = explained(tmp_path / "blocks", bert, {**SHARED, **more, "secure_aggregation.block": 4})
    assert (alone["exchanges_per_round"], found["exchanges_per_round"]) == (5, 2.75)
    dealt = 4 * (130 + 1104 / 4)
    assert found["bytes_down_per_round_and_site"] - alone["bytes_down_per_round_and_site"] == dealt + 4 * 16
    sent = found["bytes_up_per_round_and_site"] - alone["bytes_up_per_round_and_site"]
    assert sent == dealt + 64 + 4 * 16 + 2 * 32 + 5 * 33
    # A cohort that can lose nobody has a block of a single exchange.
    all_five = {**more, "cohort.min_sites": 5}
    small = explained(tmp_path / "small", bert, {**SHARED, **all_five, "secure_aggregation.block": 4})
    assert small["exchanges_per_round"] == 1.75


def test_traffic_is_that_of_the_messages(tmp_path: Path, bert: Path) -> None:
    masked = explained(tmp_path / "masked", bert)
    plain = explained(tmp_path / "plain", bert, {"secure_aggregation.mode": "plain"})
    assert plain["bytes_up_per_round_and_site"] == 4 * plain["trainable_parameters"]
    assert masked["bytes_down_per_round_and_site"] == 4 * masked["adapter_parameters"]
    assert (masked["exchanges_per_round"], plain["exchanges_per_round"]) == (5, 1)
    assert set(masked["network_seconds_per_round"]) == set(NETWORKS)
    assert "plain: the coordinator sees the update of each site" in printed(plain)


def test_a_frozen_tensor_is_sent_once(tmp_path: Path, bert: Path) -> None:
    found = explained(tmp_path, bert, {"aggregation.method": "ffa", "training.rounds": 10})
    frozen = found["adapter_parameters"] - found["trainable_parameters"]
    assert frozen > 0
    per_round = 4 * (found["trainable_parameters"] + frozen / 10)
    assert found["bytes_down_per_round_and_site"] == pytest.approx(per_round, abs=4)


def test_a_promise_is_within_its_limit_and_grows_with_the_rounds(tmp_path: Path, bert: Path) -> None:
    found = explained(tmp_path, bert, {"privacy": private(epsilon=2.0, delta=1e-4), **WHOLE})
    privacy = found["privacy"]
    assert 0 < privacy["epsilon_after_one_round"] < privacy["epsilon"] <= privacy["target"] == 2.0
    assert privacy["delta"] == 1e-4
    assert "shared_noise" not in found
    assert "everyone, including the coordinator" in printed(found)


def test_shared_noise_is_less_than_each_sites_own_and_a_share_alone_promises_less(tmp_path: Path, bert: Path) -> None:
    found = explained(tmp_path, bert, SHARED)
    shared = found["shared_noise"]
    assert 0 < shared["noise_of_a_step"] < shared["noise_of_a_step_if_local"]
    assert shared["corrupt"] < shared["survivors"] <= shared["sites"] == 5  # those of the partition
    alone = shared["epsilon_of_a_share_alone"]
    assert alone is None or alone > found["privacy"]["epsilon"]
    text = printed(found)
    assert f"the coordinator together with {shared['corrupt']} of {shared['sites']} sites" in text
    assert "everyone" not in text


def test_a_base_with_other_weights_than_the_study_names_is_refused(tmp_path: Path, bert: Path) -> None:
    file = scenario_file(tmp_path, bert)
    text = file.read_text()
    digest = tiny_study(bert).model.sha256["model.safetensors"]
    assert digest in text
    file.write_text(text.replace(digest, "0" * 64))
    with pytest.raises(PrivetError, match=r"model\.safetensors"):
        explain_study(load_plan(file))


@given(st.floats(0.1, 1e4), st.floats(0, 1), st.integers(0, 50), st.integers(0, 10**9))
def test_time_on_a_network_is_round_trips_and_transfer(rate: float, delay: float, exchanges: int, size: int) -> None:
    found = seconds_on(rate, delay, exchanges, size)
    assert found == pytest.approx(exchanges * delay + size / (rate * 125_000))
    assert found >= seconds_on(rate, delay, exchanges, 0) == pytest.approx(exchanges * delay)


@pytest.mark.parametrize("sites", [3, 10, 100])
def test_masked_words_hold_all_values_and_no_word_is_spare(sites: int, bert: Path) -> None:
    study = tiny_study(bert, **{"secure_aggregation.mode": "masked", "cohort.min_sites": sites})
    lanes = 64 // lane_bits(bits_of(study, sites), sites)
    for trainable in (1, lanes, lanes + 1, 1000):
        words, rest = divmod(bytes_up(study, trainable), 8)
        assert rest == 0
        assert (words - 1) * lanes < trainable <= words * lanes


def test_memory_grows_with_the_largest_pass_and_with_gradients_of_single_records(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain, "resident_bytes", lambda: 0)
    study = tiny_study(bert)
    host = open_host(study, Resources(device="cpu", precision="fp32"))
    least, most = host.shape.sizes[0], host.shape.sizes[-1]
    fit = least // host.shape.width(study.data.max_length)
    assert least < most
    one, full, more, all_of_it, beyond = (
        memory_bytes(study, host, 1000, batch) for batch in (1, fit, fit + 1, most, 2 * most)
    )
    values = (*host.model.parameters(), *host.model.buffers())
    weights = sum(each.numel() * each.element_size() for each in values)
    assert weights < one == full < more <= all_of_it == beyond
    for batch in (1, 2):
        single = memory_bytes(tiny_study(bert, privacy=private()), host, 1000, batch)
        assert single - one == 2 * 4 * batch * 1000  # per-sample gradients of each record, and a copy
    by_itself = replace(host, shape=Shape())
    assert weights < memory_bytes(study, by_itself, 1000, 1) == memory_bytes(study, by_itself, 1000, 9) < one


def test_what_this_process_holds_counts_where_it_is_more_than_the_weights(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(bert)
    host = open_host(study, Resources(device="cpu", precision="fp32"))
    assert explain.resident_bytes() > 10**7
    found = []
    for held in (0, 10**12):
        monkeypatch.setattr(explain, "resident_bytes", lambda held=held: held)
        found.append(memory_bytes(study, host, 1000, 1))
    values = (*host.model.parameters(), *host.model.buffers())
    weights = sum(each.numel() * each.element_size() for each in values)
    assert found[1] - found[0] == 10**12 - weights


@pytest.mark.parametrize(
    ("objection", "says"), [("", "records are computed in batches"), ("no rule", "one record at a time")]
)
def test_how_records_pass_is_said(objection: str, says: str, tmp_path: Path, bert: Path) -> None:
    found = explained(tmp_path, bert)
    assert found["passes"]["objection"] == ""
    assert found["passes"]["rows"] == sorted(found["passes"]["rows"]) != []
    found["passes"]["objection"] = objection
    text = printed(found)
    assert says in text
    assert objection in text
