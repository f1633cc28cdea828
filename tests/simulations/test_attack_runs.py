"""The attacks on tiny models: they find what is there, nothing where nothing is, and the same with the same seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacks import tables
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from privet.client.site import Resources
from privet.client.training.canaries import flip_coins, make_canaries, vocabulary
from privet.client.training.data import Records, load_records
from privet.common.cli import build_command
from privet.common.errors import StudyError
from privet.common.privacy.noise import SeededRandomness
from privet.common.study.messages import Contribution
from privet.common.study.sections import FORMS, GENERATING
from privet.common.study.study import Study
from privet.simulations.attacks.arms import Workshop, at_epsilon, in_the_clear, without_privacy, write_records
from privet.simulations.attacks.canaries import run_audit
from privet.simulations.attacks.membership import (
    confidence,
    halves,
    likelihood_scores,
    pool_of,
    records_inside,
    run_membership,
)
from privet.simulations.attacks.poisoning import (
    TRIGGER,
    Turncoat,
    deal_in_turn,
    flipped,
    run_poisoning,
    triggered_records,
)
from privet.simulations.attacks.poisoning import poisoned_study as poisoned
from privet.simulations.attacks.reconstruction import draw, run_reconstruction
from privet.simulations.attacks.reconstruction import exposed_study as revealed
from tests.support.tiny import private, records_of, rows_for, tiny_study

CPU = Resources(device="cpu", precision="fp32")
ROOT = Path(__file__).resolve().parents[2]


def workshop(folder: Path) -> Workshop:
    folder.mkdir(exist_ok=True)
    return Workshop(folder, CPU)


def some(study: Study, count: int, seed: int = 0) -> Records:
    return records_of(study, rows_for(study, count, seed))


# Arms


@pytest.mark.parametrize("kind", list(FORMS))
def test_records_are_read_as_they_were_written(bert: Path, llama: Path, tmp_path: Path, kind: str) -> None:
    base = llama if kind in GENERATING else bert
    study = tiny_study(base, **{"task.kind": kind, "data.unit": "patient"})
    records = some(study, 12)
    read, _ = load_records(write_records(tmp_path / "a.jsonl", study, records), study)
    assert read == records


def test_an_arm_differs_from_its_study_in_what_it_says(bert: Path) -> None:
    study = tiny_study(bert, privacy=private(epsilon=2.0))
    assert without_privacy(study).privacy.mode == "none"
    assert without_privacy(study).training == study.training
    assert at_epsilon(study, 5.0).privacy.model_copy(update={"epsilon": 2.0}) == study.privacy
    assert at_epsilon(without_privacy(study), 5.0).privacy.promise == (5.0, 1e-5, 1.0)
    assert in_the_clear(study).privacy == study.privacy


def test_arms_of_one_workshop_know_nothing_of_each_other(bert: Path, tmp_path: Path) -> None:
    """Arms' files have the same names, and so have their sites: neither records nor lies may reach another arm."""
    study = in_the_clear(tiny_study(bert, training={"rounds": 2, "local_steps": 2}))
    sites = {"a": some(study, 12), "b": some(study, 9, seed=1)}
    arms: dict[str, Any] = {
        "plain": {"sites": sites},
        "lied": {"sites": sites, "behaviours": {"a": Turncoat(-2.0, turning=2)}},
        "changed": {"sites": {**sites, "a": some(study, 12, seed=5)}},
    }
    found = []
    for order in (list(arms), list(reversed(arms))):
        place = workshop(tmp_path / order[0])
        trails = {name: place.run(name, study, **arms[name]) for name in order}
        found.append({name: [adapter.digest for adapter in trail.adapters] for name, trail in trails.items()})
        for name, trail in trails.items():
            assert [statement["round"] for statement in trail.statements] == [1, 2]
            assert place.kept(name).released.digest == found[-1][name][-1]
    assert found[0] == found[1]
    assert len({digests[-1] for digests in found[0].values()}) == 3


def test_the_same_records_train_with_other_noise_from_another_seed(bert: Path, tmp_path: Path) -> None:
    """Shadows that shared the target's noise, which an attacker does not know, would find what it hides."""
    rates = {"rounds": 1, "local_steps": 1, "sampling_rate": 1.0}
    study = in_the_clear(tiny_study(bert, privacy=private(), training=rates))
    place = workshop(tmp_path)
    target, shadow = (place.run(str(seed), study, {"a": some(study, 12)}, seed=seed) for seed in (1, 2))
    assert target.adapters[0].digest == shadow.adapters[0].digest
    names = [tensor.name for tensor in target.released.spec.trained(study.aggregation.method)]
    one, other = (t.released.flatten(names) - t.adapters[0].flatten(names) for t in (target, shadow))
    # A step of AdamW goes by the sign of each value, which noise decides here: as often the same as not.
    assert 0.35 < float((np.sign(one) == np.sign(other)).mean()) < 0.65


# Canaries


def test_canaries_are_random_distinct_and_fit_the_task(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert)
    words = vocabulary(workshop(tmp_path).host(study).tokenizer)
    canaries, again, others = (
        make_canaries(study, words, 300, SeededRandomness(seed, "canaries")) for seed in (1, 1, 2)
    )
    assert len({row["text"] for row in canaries.rows}) == 300
    assert set(np.bincount([row["label"] for row in canaries.rows])) <= set(range(70, 131))
    assert canaries == again != others
    assert 100 < sum(flip_coins(300, SeededRandomness(1, "coins"))) < 200


@pytest.mark.slow
def test_an_audit_finds_what_a_study_without_privacy_remembers(bert: Path, tmp_path: Path) -> None:
    rates = {"learning_rate": 0.1, "head_learning_rate": 0.3, "sampling_rate": 1.0}
    study = tiny_study(bert, training={**rates, "rounds": 2, "local_steps": 30})
    sites = {"north": some(study, 4)}
    found = run_audit(workshop(tmp_path / "a"), study, sites, canaries=40)
    (bare,) = found["arms"]
    assert bare["claimed_epsilon"] is None
    assert bare["audit"]["epsilon"] > 0.3
    assert bare["auc"] > 0.8
    assert json.dumps(run_audit(workshop(tmp_path / "b"), study, sites, canaries=40)) == json.dumps(found)


@pytest.mark.slow
def test_an_audit_leaves_a_promise_standing_that_is_kept(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, training={"learning_rate": 0.05, "sampling_rate": 1.0, "rounds": 1, "local_steps": 4})
    found = run_audit(workshop(tmp_path), study, {"north": some(study, 30)}, canaries=100, epsilons=[8.0])
    assert [arm["arm"] for arm in found["arms"]] == ["no privacy", "epsilon 8"]
    assert found["arms"][1]["holds"]
    assert found["arms"][1]["audit"]["epsilon"] < 2


# Membership


@given(st.lists(st.floats(0, 50), min_size=1, max_size=20))
def test_confidence_falls_with_the_loss_and_is_the_logit(losses: list[float]) -> None:
    found = confidence(losses)
    assert np.isfinite(found).all()
    p = np.exp(-np.maximum(losses, 1e-12))
    for value, chance in zip(found, p, strict=True):
        if 1e-6 < chance < 1 - 1e-6:
            assert value == pytest.approx(np.log(chance / (1 - chance)), abs=1e-6)
    assert (np.diff(found[np.argsort(losses)]) <= 0).all()


def test_likelihood_scores_use_only_shadows_that_have_not_seen_the_record() -> None:
    seen = np.array([[True, False], [False, True], [False, False], [True, True]])
    shadows = np.array([[99.0, 1.0], [1.0, 99.0], [3.0, 5.0], [99.0, 99.0]])
    target = np.array([2.0, 9.0])
    scores, mean = likelihood_scores(target, shadows, seen)
    deviation = np.sqrt((1 + 1 + 4 + 4) / 2)  # pooled over both records, one degree of freedom each
    assert mean == pytest.approx([2.0, 3.0])
    assert scores == pytest.approx([0.0, 6.0 / deviation])


def test_halves_come_in_complements_and_keep_patients_whole(bert: Path) -> None:
    study = tiny_study(bert, **{"data.unit": "patient"})
    pool = pool_of({"a": some(study, 30), "b": some(study, 21, 1)}, {"a": some(study, 9, 2)})
    assert list(pool.trained) == [True] * 30 + [False] * 9 + [True] * 21
    coins = halves(pool, 6, seed=3)
    for one, other in zip(coins[::2], coins[1::2], strict=True):
        assert (one != other).all()
    for inside in coins:
        parts = records_inside(pool, inside)
        assert sum(len(records) for records in parts.values()) == inside.sum()
        for site, records in pool.sites.items():
            assert set(parts[site].units).isdisjoint(set(records.units) - set(parts[site].units))
            assert all(parts[site].units.count(u) == records.units.count(u) for u in set(parts[site].units))
    with pytest.raises(StudyError, match="non-members"):
        pool_of({"a": some(study, 30)}, {})


@pytest.mark.slow
def test_members_of_an_overtrained_study_are_found(bert: Path, tmp_path: Path) -> None:
    rates = {"learning_rate": 0.05, "head_learning_rate": 0.2, "sampling_rate": 0.5}
    study = tiny_study(bert, training={**rates, "rounds": 2, "local_steps": 40})
    rng = np.random.default_rng(0)  # labels that nothing but memory can tell
    noisy = [Records(tuple({**r, "label": int(rng.integers(3))} for r in p.rows), p.units)
             for p in (some(study, 60), some(study, 60, 9))]  # fmt: skip
    place = workshop(tmp_path)
    released = place.run("run", in_the_clear(study), {"a": noisy[0]}).released
    found = run_membership(place, study, pool_of({"a": noisy[0]}, {"a": noisy[1]}), released)
    assert [(arm["arm"], arm["target"]) for arm in found["arms"]] == [
        ("no privacy", "game"),
        ("no privacy", "released"),
    ]
    for arm in found["arms"]:
        assert arm["loss"]["interval"][0] > 0.5
        assert arm["lira"]["auc"] > 0.55
        assert abs(arm["blind"]["auc"] - 0.5) < 0.2
    with pytest.raises(StudyError, match="even"):
        run_membership(place, study, pool_of({"a": noisy[0]}, {"a": noisy[1]}), released, shadows=5)


# Reconstruction


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_words_are_read_off_one_update_and_off_nothing_else(
    bases: dict[str, Path], tmp_path: Path, family: str
) -> None:
    kind = "text-classification" if family == "bert" else "causal-lm"
    # The study's own steps may be too large for anything to be read after them, and say nothing.
    rates = {"training.learning_rate": 5.0, "training.head_learning_rate": 50.0}
    study = revealed(tiny_study(bases[family], **{"task.kind": kind, "data.max_length": 20, **rates}), rank=24)
    secrets, others = draw(some(study, 40), 5, seed=0)
    found = run_reconstruction(workshop(tmp_path), study, secrets, others, epsilon=8.0)
    alone, protected, together = found["arms"]
    assert alone["recovered"] == 1.0
    assert alone["records_exact"] == alone["records"] == 5
    assert alone["control"] < 0.5
    for arm in (protected, together):
        assert arm["records_exact"] == 0
        assert arm["recovered"] < 0.3
        assert arm["at_chance"]


@pytest.mark.slow
def test_an_update_with_more_positions_than_the_rank_gives_nothing_away(bert: Path, tmp_path: Path) -> None:
    study = revealed(tiny_study(bert, **{"data.max_length": 20}), rank=4)
    secrets, others = draw(some(study, 40), 3, seed=0)
    alone = run_reconstruction(workshop(tmp_path), study, secrets, others, epsilon=8.0)["arms"][0]
    assert alone["records_exact"] == 0
    assert alone["recovered"] < 0.3


def test_secrets_are_drawn_apart(bert: Path) -> None:
    records = some(tiny_study(bert), 12)
    secrets, others = draw(records, 4, seed=1)
    texts = [rows.rows[0]["text"] for rows in secrets.values()] + [row["text"] for row in others.rows]
    assert len(set(texts)) == 8
    with pytest.raises(StudyError):
        draw(records, 7, seed=1)


# Poisoning


def test_poison_is_what_it_says(bert: Path) -> None:
    study = tiny_study(bert)
    records = some(study, 30)
    assert [row["label"] for row in flipped(records, 3).rows] == [(row["label"] + 1) % 3 for row in records.rows]
    bad = triggered_records(records, 0)
    assert len(bad) == 20
    assert all(row["label"] == 0 and row["text"].startswith(TRIGGER) for row in bad.rows)
    dealt = deal_in_turn(records, 4, seed=0)
    assert sorted(row["text"] for part in dealt.values() for row in part.rows) == sorted(
        row["text"] for row in records.rows
    )
    with pytest.raises(StudyError, match="at least 4 sites, got the task text-classification and 3 sites"):
        poisoned(study, 3)


def test_a_turncoat_is_honest_until_its_round(bert: Path) -> None:
    turncoat, trained = Turncoat(-3.0, turning=2), np.array([1.0, -2.0], np.float32)
    for number, sent in ((1, trained), (2, [-3.0, 6.0]), (3, [-3.0, 6.0])):
        made = turncoat.update(Contribution("a", number, "nonce", 5.0, trained, np.empty(0)))
        assert made.update.dtype == np.float32
        assert list(made.update) == list(sent)


@pytest.mark.slow
def test_a_replaced_model_obeys_its_attacker_and_bounded_values_keep_more_of_the_others(
    bert: Path, tmp_path: Path
) -> None:
    rates = {"learning_rate": 0.02, "head_learning_rate": 0.05, "sampling_rate": 0.5}
    study = poisoned(tiny_study(bert, training={**rates, "rounds": 2, "local_steps": 8}), 5)
    sites, test = deal_in_turn(some(study, 100), 5, seed=0), some(study, 60, 7)
    found = run_poisoning(workshop(tmp_path), study, sites, test, malicious=1)
    arms: dict[tuple[str, str], Any] = {(arm["attack"], arm["defence"]): arm for arm in found["arms"]}
    assert set(arms) == {("none", "none")} | {(a, d) for a in ("label-flip", "backdoor") for d in ("none", "all")} | {
        (a, d) for a in ("replacement", "sign-flip") for d in ("none", "bound", "max norm", "all")
    }
    assert arms["none", "none"]["accuracy"] > 0.6
    assert arms["replacement", "none"]["success"] > arms["none", "none"]["success"] + 0.3
    assert arms["sign-flip", "none"]["accuracy"] < arms["none", "none"]["accuracy"] - 0.2
    assert arms["replacement", "bound"]["accuracy"] > arms["replacement", "none"]["accuracy"] + 0.1
    with pytest.raises(StudyError, match="malicious"):
        run_poisoning(workshop(tmp_path / "b"), study, sites, test, malicious=3)


# Commands


def test_every_attack_has_a_help_that_says_what_it_does() -> None:
    told = CliRunner().invoke(build_command(), ["attack", "--help"]).output
    for name in ("membership", "canaries", "reconstruction", "poisoning"):
        assert name in told
        shown = CliRunner().invoke(build_command(), ["attack", name, "--help"])
        assert shown.exit_code == 0
        assert "--json" in shown.output


# Documentation


def test_a_table_holds_each_arm_and_intervals_or_says_that_records_are_too_few() -> None:
    def told(auc: float, *, resolved: bool) -> dict[str, Any]:
        rate = {"at": 0.01, "tpr": 0.054, "interval": [0.02, 0.111], "resolved": resolved}
        return {"auc": auc, "interval": [0.4, 0.6], "rates": [{**rate, "at": 0.001, "tpr": 0.9}, rate]}

    scores = {"loss": told(0.51, resolved=True), "lira": told(0.52, resolved=False), "blind": told(0.5, resolved=True)}
    audited = {"right": 9, "guesses": 10, "epsilon": 1.234}
    words = {"recovered": 0.5, "interval": (0.25, 0.75), "records_exact": 1, "records": 3, "control": 0.009}
    spoilt = [{"attack": "flip", "defence": "all", "accuracy": 1.0, "success": success} for success in (0.0, 0.25)]
    found = {
        "canaries": {
            "canaries": 100,
            "arms": [{"arm": "x", "claimed_epsilon": e, "audit": audited} for e in (None, 8.0)],
        },
        "membership": {"scored": 7, "arms": [{"arm": "y", "target": "game", **scores}]},
        "reconstruction": {"rank": 64, "positions": 40, "arms": [{"arm": "z", **words}]},
        "poisoning": {"malicious": 1, "sites": 30, "arms": spoilt[:1]},
        "collusion": {"malicious": 6, "sites": 30, "arms": spoilt[1:]},
    }
    assert tables(found).splitlines() == [
        "| audit, 100 canaries | right guesses | epsilon at least | promised |",
        "| --- | --- | --- | --- |",
        "| x | 9 of 10 | 1.23 | nothing |",
        "| x | 9 of 10 | 1.23 | 8 |",
        "",
        "| membership, 7 records | target | score | AUC | TPR at 1 % FPR |",
        "| --- | --- | --- | --- | --- |",
        "| y | game | loss | 0.510 (0.400 to 0.600) | 5.4 % (2.0 to 11.1) |",
        "| y | game | lira | 0.520 (0.400 to 0.600) | too few records |",
        "| y | game | blind | 0.500 (0.400 to 0.600) | 5.4 % (2.0 to 11.1) |",
        "",
        "| reconstruction, rank 64, records of at most 40 tokens | words read | records read whole | chance |",
        "| --- | --- | --- | --- |",
        "| z | 50.0 % (25.0 to 75.0) | 1 of 3 | 0.9 % |",
        "",
        "| poisoning, of 30 sites | defence | 1 malicious: accuracy | 1 malicious: attack succeeds "
        "| 6 malicious: accuracy | 6 malicious: attack succeeds |",
        "| --- | --- | --- | --- | --- | --- |",
        "| flip | all | 100.0 % | 0.0 % | 100.0 % | 25.0 % |",
    ]


def test_the_documented_tables_are_those_of_the_committed_result() -> None:
    file = ROOT / "benchmarks" / "results" / "attacks.json"
    if not file.is_file():
        pytest.skip("no result of benchmarks/attacks.py is committed")
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["quick"] is False
    assert tables(document["details"]) in (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8")
