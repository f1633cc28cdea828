"""The planner: its stand-in clips, samples and adds noise as a study says, and what it recommends is a valid study."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privet.common.errors import StateError, StudyError
from privet.common.masking.noise_shares import band_in
from privet.common.progress import silent
from privet.common.study.adapter import Adapter, AdapterSpec, TensorSpec
from privet.common.study.reading import read_toml
from privet.common.study.study import Study
from privet.simulations.plan import search, surrogate
from privet.simulations.plan.commands import plan
from privet.simulations.plan.declared import consortium_of
from privet.simulations.plan.search import Estimate
from privet.simulations.plan.settings import changed, grid, neighbours, with_promise
from privet.simulations.plan.surrogate import stand_in
from privet.simulations.plan.world import USUAL, Consortium, Records, Separability, World, draw_world
from privet.simulations.runs.toml import to_toml

CONSORTIUM = Consortium((30, 30, 40), 2.2, 3, 24, 2, 2)
PRIVACY = {"mode": "distributed", "unit": "patient", "epsilon": 8.0, "delta": 1e-4, "clip_norm": 1.0}
DOCUMENT: dict[str, Any] = {
    "name": "planned",
    "model": {"base": "nowhere", "sha256": {"model.safetensors": "0" * 64}},
    "task": {"kind": "text-classification", "labels": ["no", "maybe", "yes"]},
    "data": {"columns": {"text": "text", "label": "label"}, "unit": "patient"},
    "lora": {"rank": 2, "alpha": 4.0, "targets": ["query", "value"]},
    "training": {
        "rounds": 10,
        "local_steps": 1,
        "optimizer": "sgd",
        "learning_rate": 1.0,
        "sampling_rate": 0.1,
    },
    "privacy": PRIVACY,
}


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise by a rule of thumb, which falls with epsilon and grows with steps; accountants have tests of their own."""

    def multiplier(target: float, delta: float, rate: float, steps: int, beside: float | None = None) -> float:
        return 0.4 + 4 * rate * math.sqrt(steps) / target + (0.0 if beside is None else 0.1)

    monkeypatch.setattr("privet.common.privacy.accounting.noise_multiplier", multiplier)


def chosen(**more: Any) -> Study:
    """Return a study whose rounds are one step each."""
    choice = next(each for each in grid(Study.parse(DOCUMENT)) if each.rounds and not each.band)
    return Study.parse(changed(DOCUMENT, replace(choice, **more), 40))


@pytest.fixture(scope="module")
def world() -> World:
    return draw_world(CONSORTIUM, USUAL, 1)


# --- records ---------------------------------------------------------------------------------------------


def test_equal_counts_and_seeds_give_equal_records_of_the_units_declared(world: World) -> None:
    again, other = draw_world(CONSORTIUM, USUAL, 1), draw_world(CONSORTIUM, USUAL, 2)
    assert np.array_equal(world.train.seen, again.train.seen)
    assert not np.array_equal(world.train.seen[:50], other.train.seen[:50])
    assert len(np.unique(world.train.units)) == 100
    assert 1.8 < len(world.train.units) / 100 < 2.6
    np.testing.assert_allclose(np.linalg.norm(world.train.seen, axis=1), 24**0.5)


def test_classes_that_are_further_apart_are_told_apart_more_often(cheap: None) -> None:
    study = chosen(start="class means", share=0.5)
    found = [
        stand_in(study, draw_world(CONSORTIUM, Separability(seen, 2.2), 0), 3, 0).accuracy for seen in (0.02, 0.2, 2.0)
    ]
    assert found == sorted(found)
    assert found[0] < 0.6 < 0.9 < found[2]


@pytest.mark.parametrize("bad", [((), 1.0), ((0, 3), 1.0), ((3, 3), 0.5), ((50_000, 50_000), 1.0)])
def test_counts_that_make_no_consortium_are_refused(bad: tuple[tuple[int, ...], float]) -> None:
    with pytest.raises(StudyError, match="plan: expected"):
        Consortium(*bad, 3, 24, 2, 2)


# --- the stand-in ----------------------------------------------------------------------------------------


def test_squares_are_those_of_sums_of_outer_products() -> None:
    rng = np.random.default_rng(0)
    of_unit = np.repeat(np.arange(4), [1, 3, 2, 4])
    left, right = rng.standard_normal((10, 3)), rng.standard_normal((10, 5))
    expected = [
        np.linalg.norm(sum(np.outer(left[row], right[row]) for row in np.flatnonzero(of_unit == unit))) ** 2
        for unit in range(4)
    ]
    np.testing.assert_allclose(surrogate._squares(of_unit, left, right), expected)


@pytest.mark.parametrize(("head", "share"), [("with the adapter", None), ("apart", 0.3), ("fixed", None)])
def test_a_unit_moves_a_sum_by_at_most_the_clip_norm(world: World, head: str, share: float | None) -> None:
    study = chosen(head=head, start="class means", share=0.5)
    rng = np.random.default_rng(0)
    shapes = {"m.classifier.bias": (3,), "m.classifier.weight": (3, 24), "m.lora_A.weight": (4, 1)}
    spec = AdapterSpec.of(
        [TensorSpec(n, s, "lora_A" if "lora" in n else "full") for n, s in shapes.items()]
        + [TensorSpec("m.lora_B.weight", (24, 4), "lora_B")]
    )
    adapter = Adapter(spec, {t.name: rng.standard_normal(t.shape).astype(np.float32) for t in spec.tensors})
    longest = 0.0
    for unit in range(12):
        only = np.arange(100) == unit
        parts = surrogate._sums(study, adapter, world.train, only, np.random.default_rng(1))
        ours = np.linalg.norm(parts["m.lora_B.weight"])
        heads = np.hypot(np.linalg.norm(parts["m.classifier.weight"]), np.linalg.norm(parts["m.classifier.bias"]))
        if head == "fixed":
            assert ours <= 1 + 1e-9
        elif share is None:
            assert np.hypot(ours, heads) <= 1 + 1e-9
        else:
            assert ours <= (1 - share) ** 0.5
            assert heads <= share**0.5
        longest = max(longest, float(ours))
    assert longest > 0.5  # and the bounds are reached, nearly
    nobody = surrogate._sums(study, adapter, world.train, np.zeros(100, bool), rng)
    assert not any(part.any() for part in nobody.values())


def test_a_unit_of_many_records_enters_with_as_many_as_the_study_says() -> None:
    units = np.repeat(np.arange(3), [9, 2, 5])
    records = Records(np.zeros((16, 2)), np.zeros((16, 2)), np.zeros(16, np.int64), units)
    rows = surrogate._rows(chosen(), records, np.array([True, True, False]), np.random.default_rng(0))
    assert [int((units[rows] == unit).sum()) for unit in range(3)] == [4, 2, 0]
    assert len(set(rows.tolist())) == 6


def test_the_band_gives_back_white_noise_of_the_accounted_deviation(cheap: None) -> None:
    study = chosen(band=5)
    band = band_in(study)
    assert band is not None
    drawn = np.array(list(itertools.islice(surrogate._noise(study, 4000, 3, np.random.default_rng(0)), 20)))
    weights = [1.0, *(value / 2**14 for value in band.coefficients)]
    fresh = [sum(w * drawn[step - lag] for lag, w in enumerate(weights) if lag <= step) for step in range(20)]
    deviation = surrogate.sum_deviation(study, 3)
    assert [float(np.std(each)) / deviation for each in fresh] == pytest.approx([1.0] * 20, rel=0.06)
    assert abs(float(np.corrcoef(fresh[3], fresh[4])[0, 1])) < 0.06


def test_noise_costs_accuracy_and_its_ratio_is_told(cheap: None, world: World) -> None:
    found = [stand_in(chosen(speed=0.01), world, 3, 0)]
    found += [stand_in(Study.parse(with_promise(chosen(speed=0.01).document(), epsilon=0.05)), world, 3, 0)]
    assert found[0].accuracy > found[1].accuracy + 0.1
    assert 0 < found[0].noise_to_signal < found[1].noise_to_signal / 10
    assert found[0] == stand_in(chosen(speed=0.01), world, 3, 0)
    clear = Study.parse(with_promise(chosen(speed=0.01).document(), mode="none"))
    assert stand_in(clear, world, 3, 0).noise_to_signal == 0


# --- choices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["distributed", "local"])
def test_every_choice_is_a_study_with_the_same_promise(mode: str) -> None:
    document = {**DOCUMENT, "privacy": {**PRIVACY, "mode": mode, "dropouts": 0}}
    study, digests = Study.parse(document), set()
    for choice in grid(study):
        found = Study.parse(changed(document, choice, 40))
        digests.add(found.digest)
        for name in ("mode", "unit", "epsilon", "delta", "dropouts"):
            assert getattr(found.privacy, name) == getattr(study.privacy, name)
        assert (found.data, found.task, found.model) == (study.data, study.task, study.model)
        assert found.aggregation.largest_count >= 40
    assert len(digests) == len(list(grid(study))) > 60


def test_what_a_change_costs_is_told_for_each_kind_of_choice() -> None:
    study = Study.parse(DOCUMENT)
    for choice in grid(study):
        words = [name for name, _ in neighbours(choice, study)]
        assert len(words) == len(set(words))
        assert all(other != choice for _, other in neighbours(choice, study))
        assert bool(words) == bool(choice.rounds)


def test_single_changes_are_taken_as_long_as_they_gain_beyond_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_MOVES", 3)
    study = Study.parse(DOCUMENT)
    start = replace(next(each for each in grid(study) if each.rounds), speed=0.001, start="zero", head="apart")
    noise = {0: 0.001, 1: -0.001, 2: 0.0, 3: 0.0005}

    def accuracies(self: Any, found: Study, rank: int, worlds: int) -> list[float]:
        # Best at a rate of 0.009; rounds gain less than chance moves them.
        lost = abs(np.log(found.aggregation.learning_rate / 0.009)) / 10
        luck = (found.training.rounds - start.rounds) / start.rounds
        return [0.9 - lost + 0.0001 * luck + luck * noise[seed % 4] for seed in range(worlds)]

    monkeypatch.setattr(search.Bench, "accuracies", accuracies)
    best, tried = search._climbed(search.Bench(DOCUMENT, CONSORTIUM), start, study, silent)
    assert best.speed == pytest.approx(0.009)
    assert replace(best, speed=start.speed) == start
    assert tried > 10


def test_an_interval_is_students() -> None:
    assert Estimate.of([0.5, 0.7]).half == pytest.approx(12.706 * 10, rel=1e-3)
    assert Estimate.of([0.5]).document() == {"value": 50.0, "half": None}


# --- what is declared ------------------------------------------------------------------------------------


def test_counts_come_from_the_command_or_from_the_notes_that_are_simulated(tmp_path: Path) -> None:
    notes = {"data": "notes", "partition": {"split": "iid", "sites": 4, "patients": 100}}
    found = consortium_of({**DOCUMENT, "simulation": notes}, tmp_path, None, 2.2)
    assert (found.consortium.units, found.consortium.records, found.known) == ((25,) * 4, 2.2, False)
    record = {**DOCUMENT, "simulation": notes, "privacy": {**PRIVACY, "unit": "record"}}
    assert consortium_of(record, tmp_path, None, 2.2).consortium.units == (55,) * 4
    assert consortium_of(record, tmp_path, [9, 8, 7], 2.2).consortium.records == 1.0


def test_the_sizes_of_a_base_that_is_here_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"hidden_size": 48, "num_hidden_layers": 3}))
    document = {**DOCUMENT, "model": {"base": "./base"}}  # a simulation may leave out the pins
    found = consortium_of(document, tmp_path, [30, 30, 30], 2.2)
    assert (found.consortium.width, found.consortium.modules, found.known) == (48, 6, True)


@pytest.mark.parametrize(
    ("document", "units", "said"),
    [
        ({"privacy": {"mode": "none"}}, [9, 9, 9], "expected a private study"),
        ({"task": {"kind": "causal-lm"}, "data": {"columns": {"messages": "m"}, "unit": "p"}}, [9, 9, 9], "task.kind"),
        ({}, None, "found none"),
        ({}, [9, 9], "3 sites or more, found 2"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    tmp_path: Path, document: dict[str, Any], units: list[int] | None, said: str
) -> None:
    with pytest.raises(StudyError, match=said):
        consortium_of({**DOCUMENT, **document}, tmp_path, units, 2.2)


# --- the command -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_writes_a_study_that_says_what_it_printed(
    cheap: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"_FIRST": 4, "_WORLDS": (1, 2), "_FINAL": 2, "_MOVES": 1, "_CLIMBING": 2}.items():
        monkeypatch.setattr(search, name, value)
    file = tmp_path / "study.toml"
    file.write_text(to_toml({**DOCUMENT, "simulation": {"curious": True}}), encoding="utf-8")
    plan(file, units=[30, 30, 40], as_json=True)
    said = json.loads(capsys.readouterr().out)
    written = read_toml(tmp_path / "study-plan.toml", what="study")
    study = Study.parse(written)
    assert written["simulation"] == {"curious": True}
    assert (study.training.rounds, study.lora.rank) == (said["choice"]["rounds"], said["choice"]["rank"])
    assert study.privacy.epsilon == 8.0
    assert set(said["accuracy"]) == {"hard", "usual", "easy"}
    assert {"epsilon 3", "epsilon 1"} <= set(said["promises"])
    assert said["not_known"]
    with pytest.raises(StateError, match="found one that exists"):
        plan(file, units=[30, 30, 40])
    plan(file, units=[30, 30, 40], out=tmp_path / "other.toml")
    text = capsys.readouterr().out
    assert "what it does not know" in text
    assert "next: check it with `privet check" in text
    assert Study.parse(read_toml(tmp_path / "other.toml", what="study")) == study
