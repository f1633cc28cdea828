"""Malicious sites: which ones they are, what they train on, what they send, and how a backdoor is scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.client.site import Resources
from privet.client.training.features import Feature, encode_records
from privet.client.training.host import ModelHost
from privet.client.training.loading import SiteData
from privet.client.training.model import initial_adapter, open_host
from privet.client.training.train import TrainingSet
from privet.common.study.messages import Contribution
from privet.common.study.study import Study
from privet.simulations.data.scenario import Malicious
from privet.simulations.engines.evaluation import Evaluator
from privet.simulations.scenarios.malicious import (
    Liar,
    backdoor_success,
    choose_liars,
    label_of,
    scaled,
    triggered_feature,
)
from tests.support.tiny import LABELS, class_rows, records_of, tiny_study

NAMES = [f"site-{number:03d}" for number in range(1, 11)]


@pytest.fixture
def study(bert: Path) -> Study:
    return tiny_study(bert)


@pytest.fixture
def host(study: Study) -> ModelHost:
    return open_host(study, Resources(device="cpu", precision="fp32"))


def entry(attack: str, sites: int | Sequence[str] = 1, **more: Any) -> Malicious:
    if attack == "backdoor":
        more = {"trigger": "again again", "target": "bone", **more}
    return Malicious.model_validate({"attack": attack, "sites": sites, **more})


def data_of(study: Study, host: ModelHost, count: int = 30) -> SiteData:
    features = encode_records(study, host.tokenizer, records_of(study, class_rows(count)))
    return SiteData(TrainingSet(features, [[i] for i in range(count)], count), [], [], [])


# Which sites


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 100))
def test_drawn_sites_are_as_many_as_asked_and_none_has_two_attacks(first: int, second: int, seed: int) -> None:
    entries = [entry("nan", first), entry("sign-flip", second)]
    found = choose_liars(entries, NAMES, seed)
    attacks = [liar.entry.attack for liar in found.values() if isinstance(liar, Liar)]
    assert (attacks.count("nan"), attacks.count("sign-flip")) == (first, second)
    assert set(found) <= set(NAMES)
    assert found == choose_liars(entries, NAMES[::-1], seed)  # by names, not by their order


def test_named_sites_are_those_and_a_draw_leaves_them_out() -> None:
    entries = [entry("nan", NAMES[:8]), entry("scale", 2)]
    for seed in range(5):
        found = choose_liars(entries, NAMES, seed)
        assert {name for name, liar in found.items() if isinstance(liar, Liar) and liar.entry.attack == "scale"} == {
            *NAMES[8:]
        }
    assert choose_liars([], NAMES, 0) == {}
    assert len({frozenset(choose_liars([entry("nan", 3)], NAMES, seed)) for seed in range(10)}) > 1


# What they train on


def test_flipped_labels_are_the_next_ones_and_nothing_else_changes(study: Study, host: ModelHost) -> None:
    honest = data_of(study, host)
    found = Liar(entry("label-flip"), 0, "a").data(study, host, honest)
    assert [each.ids for each in found.training.features] == [each.ids for each in honest.training.features]
    assert [each.labels for each in found.training.features] == [
        (label_of(each) + 1) % len(LABELS) for each in honest.training.features
    ]
    assert found.training.units == honest.training.units
    assert found.training.declared == honest.training.declared


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_backdoor_is_in_its_share_of_the_records(share: float, study: Study, host: ModelHost) -> None:
    honest = data_of(study, host, 300)
    liar = Liar(entry("backdoor", share=share), 1, "a")
    found = liar.data(study, host, honest)
    changed = 0
    for was, now in zip(honest.training.features, found.training.features, strict=True):
        if now != was:
            changed += 1
            assert now == triggered_feature(study, host.tokenizer, liar.entry, was)
            assert study.task.labels[label_of(now)] == "bone"
    assert changed / 300 == pytest.approx(share, abs=0.1)
    assert found == liar.data(study, host, honest)


@pytest.mark.parametrize("attack", ["sign-flip", "scale", "nan"])
def test_attacks_on_the_update_leave_the_data_alone(attack: str, study: Study, host: ModelHost) -> None:
    honest = data_of(study, host)
    assert Liar(entry(attack), 0, "a").data(study, host, honest) == honest


def test_a_trigger_comes_after_what_the_tokenizer_puts_first_and_the_text_is_cut(study: Study, host: ModelHost) -> None:
    backdoor = entry("backdoor")
    words = host.tokenizer("again again", add_special_tokens=False)["input_ids"]
    (plain,) = encode_records(study, host.tokenizer, records_of(study, class_rows(1)))
    found = triggered_feature(study, host.tokenizer, backdoor, plain)
    assert found.ids == (plain.ids[0], *words, *plain.ids[1:])
    bare = triggered_feature(study, host.tokenizer, backdoor, Feature(plain.ids[1:], 0))
    assert bare.ids == (*words, *plain.ids[1:])
    long = triggered_feature(study, host.tokenizer, backdoor, Feature(plain.ids * 20, 0))
    assert len(long.ids) == study.data.max_length


def test_a_label_that_the_study_does_not_have_is_no_target(study: Study, host: ModelHost) -> None:
    with pytest.raises(ValueError, match="not in tuple"):
        triggered_feature(study, host.tokenizer, entry("backdoor", target="hair"), Feature((2, 9, 3), 0))


# What they send


def test_updates_are_negated_scaled_or_no_number() -> None:
    update = np.array([1.0, -2.0, 0.5], np.float32)
    sent = Contribution("a", 1, "nonce", 3.0, update, np.zeros(0))
    attacks = ("sign-flip", "scale", "nan", "label-flip")
    found = {attack: Liar(entry(attack, factor=100.0), 0, "a").update(sent) for attack in attacks}
    assert found["sign-flip"].update.tolist() == [-1.0, 2.0, -0.5]
    assert found["scale"].update.tolist() == [100.0, -200.0, 50.0]
    assert np.isnan(found["nan"].update).all()
    assert found["label-flip"] is sent
    for each in found.values():
        assert each.update.dtype == np.float32
        assert (each.site, each.round, each.nonce, each.weight) == ("a", 1, "nonce", 3.0)
    assert update.tolist() == [1.0, -2.0, 0.5]  # the honest update is not changed in place
    assert scaled(sent, 1.0).update.tolist() == update.tolist()


# How a backdoor is scored


def test_the_success_of_a_backdoor_counts_records_of_other_labels(study: Study, host: ModelHost) -> None:
    adapter = initial_adapter(study, host)
    rows = class_rows(30)
    evaluator = Evaluator(study, host, {"a": records_of(study, rows[:20]), "b": records_of(study, rows[20:])})
    (found,) = backdoor_success(evaluator, adapter, [entry("backdoor"), entry("label-flip")])
    assert found["records"] == sum(row["label"] != "bone" for row in rows)
    assert 0 <= found["success"] <= 1
    assert 0 <= found["without_trigger"] <= 1
    assert (found["trigger"], found["target"]) == ("again again", "bone")
    assert not host.model.training  # as passes leave it
    assert backdoor_success(evaluator, adapter, [entry("nan")]) == []


def test_a_backdoor_cannot_be_scored_on_records_of_its_own_label(study: Study, host: ModelHost) -> None:
    rows = [row for row in class_rows(12) if row["label"] == "bone"]
    evaluator = Evaluator(study, host, {"a": records_of(study, rows)})
    (found,) = backdoor_success(evaluator, initial_adapter(study, host), [entry("backdoor")])
    assert found == {"trigger": "again again", "target": "bone", "records": 0}
