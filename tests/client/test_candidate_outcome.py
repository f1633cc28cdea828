"""A site's own test of a candidate: figures of canaries, of membership and of repeated words, from real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from privet.client.release import candidate
from privet.client.release.candidate import outcome_of
from privet.client.release.opened import Release
from privet.client.site import Resources
from privet.client.training.canaries import Planting
from privet.client.training.data import load_files
from privet.client.training.loading import load_data
from privet.client.training.model import open_host
from privet.common.errors import StateError
from privet.common.log.agreement import gate_of
from privet.common.log.gate import Gate
from privet.common.log.statements import CanaryCounts
from privet.common.study.study import Study
from privet.simulations.attacks.arms import Workshop
from privet.simulations.sites import load_simulated
from tests.common.test_egress import review, town
from tests.support.tiny import class_rows, private, random_adapter, rows_for, site_toml, tiny_study

CPU = Resources(device="cpu", precision="fp32")
ROOT = Path(__file__).resolve().parents[2]


def site_of(folder: Path, study: Study, count: int = 40) -> Path:
    return site_toml(folder, "north", rows_for(study, count), rows_for(study, count, 7))


def released(path: Path, study: Study, seed: int = 0) -> Release:
    return Release(path, study, random_adapter(open_host(study, CPU).spec, seed))


def test_a_candidate_is_held_against_each_condition(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, gate={"signatures": 1, "canaries": 20, "epsilon": 3.0, "membership": 0.9})
    site = load_simulated(site_of(tmp_path, study))
    found = outcome_of(released(tmp_path, study), site, b"k" * 32, Planting(60, b"k" * 32))
    assert (found.tested, found.failed) == (("canary", "membership"), ())
    assert found.canaries is not None
    assert (found.canaries.planted, found.figures["canary"]["guesses"]) == (60, found.canaries.guesses)
    assert found.figures["membership"]["loss"]["positives"] == 40
    json.dumps(found.figures)
    bare = outcome_of(released(tmp_path, study), site, b"k" * 32, None)  # it planted none, so it tests none
    assert (bare.tested, bare.canaries) == (("membership",), None)
    strict = tiny_study(bert, gate={"signatures": 1, "membership": 0.51})
    found = outcome_of(released(tmp_path, strict), site, b"k" * 32, Planting(60, b"k" * 32))
    assert (found.tested, found.failed) == (("membership",), ("membership",))


def test_what_cannot_be_tested_is_not_signed(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, gate={"signatures": 1, "membership": 0.9})
    few = load_simulated(site_of(tmp_path / "few", study, 12))
    with pytest.raises(StateError, match="at least 20 records on each side of the figure, found 12"):
        outcome_of(released(tmp_path, study), few, b"k" * 32, None)
    none = load_simulated(site_toml(tmp_path / "none", "north", class_rows(40)))
    with pytest.raises(StateError, match="names no test files"):
        outcome_of(released(tmp_path, study), none, b"k" * 32, None)
    # Records that are in both files are no control: they would hide that members are told apart.
    same = load_simulated(site_toml(tmp_path / "same", "north", class_rows(40), class_rows(40)))
    with pytest.raises(StateError, match="found 0"):
        outcome_of(released(tmp_path, study), same, b"k" * 32, None)


def test_repeated_words_of_training_answers_are_counted(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(
        llama, **{"task.kind": "causal-lm", "data.max_length": 128}, gate={"signatures": 1, "repeated": 0.1}
    )
    words = "after work the nurse saw the lamp and the road in the rain by the river with no bread at noon"
    rows = [{"prompt": f"case {n}", "answer": f"{n} {words} {words}", "patient": f"p{n}"} for n in range(24)]
    site = load_simulated(site_toml(tmp_path, "north", rows, rows))
    found = outcome_of(released(tmp_path, study), site, b"k" * 32, None)
    assert (found.tested, found.failed) == (("repeated",), ("repeated",))  # so few answers bound nothing below 0.1
    assert (found.figures["repeated"]["answers"], found.figures["repeated"]["repeated"]) == (24, 0)
    calls: list[int] = []

    def parrot(host: Any, heads: Any, *_: Any) -> list[str]:
        calls.append(len(heads))
        return [f"{words} {words}" if len(calls) == 2 else "" for _ in heads]

    monkeypatch.setattr(candidate, "continuations_of", parrot)
    found = outcome_of(released(tmp_path, study), site, b"k" * 32, None)
    assert found.figures["repeated"]["repeated"] == 24


# The canary condition


def test_the_measured_arm_without_privacy_fails_the_canary_condition_and_the_private_ones_pass() -> None:
    """The committed audit of MiniLM on MedQuAD with 1000 canaries: its counts, as a site would state them."""
    arms = json.loads((ROOT / "benchmarks/results/attacks.json").read_bytes())["details"]["canaries"]["arms"]
    held = {}
    for arm in arms:
        counts = CanaryCounts(
            planted=arm["audit"]["canaries"], guesses=arm["audit"]["guesses"], right=arm["audit"]["right"]
        )
        world = town()
        world.say(review(world, "berlin"), "berlin")
        world.gate.reviews["berlin"] = world.gate.reviews["berlin"].model_copy(update={"canaries": counts})
        facts = world.gate.facts(world.now)
        held[arm["arm"]] = "canary" not in world.gate.unmet(facts), facts.bound
    assert held["no privacy"][0] is False
    assert (held["no privacy"][1] or 0) > 3
    assert all(ok for name, (ok, _) in held.items() if name != "no privacy")


@pytest.mark.slow
def test_canaries_planted_in_training_stop_a_model_that_memorises_and_pass_a_private_one(
    bert: Path, tmp_path: Path
) -> None:
    rates = {"learning_rate": 0.1, "head_learning_rate": 0.3, "sampling_rate": 1.0, "rounds": 1, "local_steps": 40}
    planting, bounds = Planting(120, b"k" * 32), {}
    for name, privacy, claim in (("bare", {"mode": "none"}, 0.5), ("private", private(epsilon=0.5), 0.5)):
        study = tiny_study(
            bert, training=rates, privacy=privacy, gate={"signatures": 1, "canaries": 100, "epsilon": claim}
        )
        site = load_simulated(site_of(tmp_path / name, study, 24))
        records = planting.planted(study, open_host(study, CPU).tokenizer, load_files(site, study)[0][0])
        (tmp_path / name / "shop").mkdir()
        trail = Workshop(tmp_path / name / "shop", CPU).run("arm", study, {"north": records}, declared={"north": 84})
        found = outcome_of(Release(tmp_path / name, study, trail.released), site, b"k" * 32, planting)
        terms = gate_of(study)
        assert terms is not None
        assert found.canaries is not None
        bounds[name] = Gate(town().history.runs["flu"].statement, terms).bound_of(found.canaries)
        assert found.failed == (("canary",) if name == "bare" else ()), bounds
    assert bounds["bare"] > 0.5 >= bounds["private"]


def test_planted_canaries_are_trained_on_and_change_no_public_number(bert: Path, tmp_path: Path) -> None:
    gate = {"signatures": 1, "canaries": 20, "epsilon": 3.0}
    study = tiny_study(bert, gate=gate, **{"data.validation_fraction": 0.2})
    site, host = load_simulated(site_of(tmp_path, study)), open_host(study, CPU)
    planting = Planting(60, b"k" * 32)
    bare = load_data(site, study, host, b"k" * 32, distinct=False)
    planted = load_data(site, study, host, b"k" * 32, distinct=False, planting=planting)
    assert len(planted.training.features) == len(bare.training.features) + sum(planting.coins())
    assert len(planted.training.units) == len(bare.training.units) + sum(planting.coins())
    assert planted.training.declared == bare.training.declared
    assert planted.validation == bare.validation  # a canary that is held out would count as included
