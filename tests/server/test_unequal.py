"""Sites of unequal rank and weight: each column's mean is over the sites that train it, masked or not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privet.client.rounds.worker import Worker
from privet.client.training.train import Draws, release_step
from privet.common.errors import StudyError, TooFewSitesError
from privet.common.masking.noise_shares import shared_noise
from privet.common.privacy.noise import SeededRandomness
from privet.common.privacy.shared_noise import contribute
from privet.common.secagg.terms import Floor
from privet.common.study.adapter import Adapter
from privet.common.study.columns import own_values, weights_by_value
from privet.common.study.messages import RoundOpen
from privet.common.study.study import Study
from privet.server.rounds.aggregate import ServerOptimizer, apply_update
from privet.server.rounds.rounds import run_study
from privet.server.rounds.run_log import Unlogged
from privet.server.rounds.state import RunDirectory, RunState
from tests.support.masked_world import QUICK, REVEAL, Relay, federation, masked_study, one_round, sharing_study
from tests.support.secagg_world import identity
from tests.support.synthetic import (
    NAMES,
    PEFT_CONFIG,
    SPEC,
    Array,
    Learner,
    MemoryExchange,
    Site,
    exchange_of,
    flat,
    optima,
    start_adapter,
    study_of,
    towards,
)
from tests.support.tiny import class_rows, private, random_adapter, site_toml, tiny_study, worker_of

FFA = {"method": "ffa"}
MASKED = {"secure_aggregation.mode": "masked", "cohort.min_sites": 3}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What survives a power cut is not the subject here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def of_rank(study: Study, site: str, learn: Learner) -> Learner:
    """Return a learner that trains what the study gives a site."""
    own = own_values(study, SPEC, site)
    return learn if own is None else lambda given, adapter: np.where(own, learn(given, adapter), 0.0)


def plain_sites(study: Study, **answers: Any) -> MemoryExchange:
    found = [of_rank(study, name, towards(x)) for name, x in zip(NAMES, optima(study, 3), strict=False)]
    weights = [10, 20, 30]
    sites = [Site(name, learn, weight) for name, learn, weight in zip(NAMES, found, weights, strict=False)]
    return exchange_of(*(replace(site, **answers.get(site.name, {})) for site in sites))


def run(path: Path, study: Study, exchange: MemoryExchange) -> tuple[RunState, list[Adapter]]:
    seen = [start_adapter()]
    log = Unlogged(RunDirectory.create(path, study, seen[0], PEFT_CONFIG))
    return run_study(log, exchange, lambda statement, published: seen.append(published), QUICK), seen


def second_column(flat_values: Array) -> Array:
    """Return B's second column; the head's three values come first."""
    return flat_values[3:].reshape(4, 2)[:, 1]


def masked_ranks(form: Mapping[str, Any]) -> tuple[list[str], Study, Relay]:
    """Return six sites of a masked study, of which those of odd numbers train both columns of B."""
    names = [identity(number).name for number in range(6)]
    ranks = {names[0]: 1, names[2]: 1, names[4]: 1}
    study = masked_study(lora={"site_ranks": ranks}, aggregation={**FFA, **form}, training={"rounds": 2})
    learners = [of_rank(study, name, towards(x)) for name, x in zip(names, optima(study, 6), strict=True)]
    return names, study, federation(study, 6, learners=learners)


# --- the mean ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [{}, {"weighting": "equal"}, {"weight_power": 0.5}], ids=["counts", "equal", "root"])
def test_a_masked_mean_of_each_column_is_that_of_the_sites_that_train_it(form: dict[str, Any]) -> None:
    names, study, exchange = masked_ranks(form)
    state = one_round(study, exchange)
    weights = {"weighting": [1.0] * 6, "weight_power": [(10 * n) ** 0.5 for n in range(1, 7)]}
    weight = np.array(weights[next(iter(form))] if form else [10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
    sent = np.array([site.contributions[1].update for site in exchange.sites.values()], np.float64)
    count = np.zeros(sent.shape[1])
    for name, each in zip(names, weight, strict=True):
        own = own_values(study, SPEC, name)
        count += each if own is None else each * own
    # A level of the sum is 60 x 8 / 2^17; six sites, each less than one off.
    level = 6 * study.aggregation.weight(60) * 8 / 2**17
    moved = flat(study, state.adapter) - flat(study, start_adapter())
    assert np.abs(moved - sent.sum(0) / count).max() < level / count.min()
    assert state.statements[-1]["survivors"] == names


@pytest.mark.parametrize("stage", ["advertise", "mask"])
@pytest.mark.parametrize(("node", "rank"), [(3, 2), (2, 1)], ids=["a column", "a difference of columns"])
def test_no_column_is_unmasked_that_too_few_sites_train(stage: str, node: int, rank: int) -> None:
    _, study, exchange = masked_ranks({})
    exchange.sites[node].asleep = (stage,)  # one of the three that have its rank
    state = one_round(study, exchange)
    assert state.statements[-1]["type"] == "round-abort"
    assert f"2 of 5 sites train {rank} columns of B" in str(state.statements)
    assert REVEAL not in exchange.kinds()
    assert state.adapter.digest == start_adapter().digest


@pytest.mark.parametrize("broken", [False, True], ids=["sites check", "no site checks"])
def test_sites_refuse_what_a_coordinator_does_not_check(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _, study, exchange = masked_ranks({})
    monkeypatch.setattr("privet.server.rounds.masked.check_columns", lambda *_: None)
    exchange.sites[3].asleep = ("mask",)
    if broken:  # then shares are revealed, so it is the sites' check that this test sees
        monkeypatch.setattr("privet.client.rounds.masked.MaskedRounds._check_columns", lambda *_: None)
    state = one_round(study, exchange)
    assert (REVEAL in exchange.kinds()) == broken
    assert (state.statements[-1]["type"] == "round-close") == broken


def test_a_floor_holds_for_the_sites_of_its_sites_rank() -> None:
    _, study, exchange = masked_ranks({})
    exchange.sites[3].rounds.floor = Floor(survivors=4)  # of the six sites of the sum, three have its rank
    state = one_round(study, exchange)
    assert state.statements[-1]["type"] == "round-abort"
    assert "3 of 6 sites train 2 columns of B, as this site does" in str(exchange.replies)
    assert REVEAL not in exchange.kinds()


def test_a_round_that_could_not_hide_a_column_is_not_opened() -> None:
    _, study, exchange = masked_ranks({})
    exchange = Relay({node: site for node, site in exchange.sites.items() if node != 3})
    with pytest.raises(TooFewSitesError, match="2 of 5 sites train 2 columns of B"):
        one_round(study, exchange)


@pytest.mark.parametrize("optimizer", ["fedavgm", "adam", "fedyogi"])
def test_a_column_that_nobody_in_the_sum_trains_stays_with_its_momentum(optimizer: str, tmp_path: Path) -> None:
    study = study_of(
        lora={"site_ranks": {NAMES[0]: 1, NAMES[1]: 1}},
        aggregation={**FFA, "optimizer": optimizer},
        training={"rounds": 3},
    )
    # The one site of full rank misses round 2.
    away = {"answer": lambda asked, honest: None if getattr(asked, "round", 0) == 2 else honest}
    state, seen = run(tmp_path / "run", study, plain_sites(study, **{NAMES[2]: away}))
    before, without, again = (second_column(flat(study, adapter)) for adapter in seen[1:])
    assert before.any()
    assert without.tobytes() == before.tobytes()
    assert not np.array_equal(again, without)
    assert [list(statement["survivors"]) for statement in state.statements] == [
        list(NAMES[:3]),
        list(NAMES[:2]),
        list(NAMES[:3]),
    ]
    # For the column there was no round 2: round 3 is as if it came right after round 1. Adam alone counts steps.
    if optimizer != "adam":
        size, moving = len(flat(study, seen[0])), np.ones(len(flat(study, seen[0])), np.bool_)
        moving[4::2] = False
        rng = np.random.default_rng(0)
        one, two, three = rng.standard_normal((3, size)) / 100
        still, straight = (ServerOptimizer(study.aggregation, 3, SPEC) for _ in range(2))
        held = apply_update(apply_update(start_adapter(), one, still, 0), np.where(moving, two, 0), still, 1, moving)
        held = apply_update(held, three, still, 2)
        direct = apply_update(apply_update(start_adapter(), one, straight, 0), three, straight, 2)
        assert np.array_equal(second_column(flat(study, held)), second_column(flat(study, direct)))


def test_a_site_that_sends_more_columns_than_it_counts_in_is_left_out(tmp_path: Path) -> None:
    study = study_of(lora={"site_ranks": {NAMES[0]: 1}}, aggregation=FFA, training={"rounds": 1})
    liar = {"learn": towards(optima(study, 1)[0])}
    state, _ = run(tmp_path / "run", study, plain_sites(study, **{NAMES[0]: liar}))
    assert "beyond the rank that lora.site_ranks gives it" in state.statements[0]["failures"][NAMES[0]]


def test_a_study_of_equal_ranks_has_the_digest_and_the_divisor_that_it_had() -> None:
    study = study_of(aggregation=FFA)
    assert "site_ranks" not in study.document()["lora"]
    assert "weight_power" not in study.document()["aggregation"]
    assert weights_by_value(study, SPEC, {NAMES[0]: 1.0}) is None
    assert own_values(study_of(lora={"site_ranks": {NAMES[0]: 2}}, aggregation=FFA), SPEC, NAMES[0]) is None


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"aggregation": {"method": "fedsvd"}}, "fedsvd turns the columns of B"),
        ({"aggregation": {"method": "fedavg"}}, "fedavg trains A as well"),
        ({"lora": {"site_ranks": {"alder": 3}}}, "at most 2, the adapter's own, found alder = 3"),
        ({"cohort": {"sites": ["birch", "cedar"]}}, "cohort.sites does not name alder"),
        ({"aggregation": {**FFA, "weighting": "equal", "weight_power": 0.5}}, "takes no count"),
    ],
)
def test_what_would_not_be_exact_is_refused(sections: Mapping[str, Any], said: str) -> None:
    given: dict[str, Any] = {"lora": {"site_ranks": {"alder": 1}}, "aggregation": FFA, **sections}
    with pytest.raises(StudyError, match=said):
        study_of(**given)


def test_weights_by_a_power_are_refused_where_sites_share_the_noise() -> None:
    with pytest.raises(StudyError, match=r"weight_power: in privacy\.mode distributed all units count equally"):
        sharing_study(aggregation={"weight_power": 0.5})


class Late(MemoryExchange):
    """The first site connects once the others have closed a round."""

    def nodes(self) -> list[int]:
        return [node for node in super().nodes() if node != 2 or self.rounds]


def test_a_site_that_joins_in_the_middle_trains_and_pays_from_the_next_round_on(tmp_path: Path) -> None:
    privacy = {"mode": "local", "epsilon": 4.0, "delta": 1e-4, "clip_norm": 0.5}
    study = study_of(
        lora={"site_ranks": {NAMES[0]: 1}},
        aggregation=FFA,
        privacy=privacy,
        training={"rounds": 3, "sampling_rate": 1.0},
    )
    state, seen = run(tmp_path / "run", study, Late(plain_sites(study).sites))
    assert [statement["cohort"] for statement in state.statements] == [list(NAMES[1:3]), *[list(NAMES[:3])] * 2]
    spent = state.statements[-1]["privacy"]["epsilon"]
    assert 0 < spent[NAMES[0]] < spent[NAMES[1]] == spent[NAMES[2]]
    # Its weight is in the divisors of its own columns from round 2 on.
    weights = [np.array([0.0, 20, 30]), np.array([10.0, 20, 30])]
    for number, weight in enumerate(weights):
        sent = np.array(
            [of_rank(study, n, towards(x))(study, seen[number]) for n, x in zip(NAMES, optima(study, 3), strict=False)]
        )
        ranks = np.array(
            [own if (own := own_values(study, SPEC, n)) is not None else np.ones(11, np.bool_) for n in NAMES[:3]]
        )
        mean = (weight[:, None] * sent).sum(0) / (weight[:, None] * ranks).sum(0)
        assert flat(study, seen[number + 1]) - flat(study, seen[number]) == pytest.approx(mean, abs=1e-6)


# --- at the site -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, dict[str, Worker]]:
    """Return a study of ranks 2, 4 and 8, and its sites."""
    study = ranked(bert)
    folder = tmp_path_factory.mktemp("three")
    rows = {"ash": 30, "elm": 40, "oak": 50}
    return study, {
        name: worker_of(site_toml(folder / name, name, class_rows(count, seed=count))) for name, count in rows.items()
    }


def ranked(bert: Path, **more: Any) -> Study:
    given = {"lora.rank": 8, "lora.site_ranks": {"ash": 2, "elm": 4}, "aggregation.method": "ffa"}
    return tiny_study(bert, **{**given, "secure_aggregation.mode": "plain", **more})


def opened(study: Study, adapter: Adapter) -> RoundOpen:
    return RoundOpen(study.document(), 1, "1" * 32, adapter.digest, ("ash", "elm", "oak"), adapter.data)


def test_ranks_2_4_and_8_give_the_exact_mean_of_each_column(three: tuple[Study, dict[str, Worker]]) -> None:
    study, workers = three
    spec = workers["ash"].open(study)[1].spec
    adapter = random_adapter(spec, scale=0.1)
    sent = {name: worker.update(opened(study, adapter)) for name, worker in workers.items()}
    divisor = weights_by_value(study, spec, {name: each.weight for name, each in sent.items()})
    total = np.sum([each.update.astype(np.float64) for each in sent.values()], axis=0)
    optimizer = ServerOptimizer(study.aggregation, study.training.rounds, spec)
    assert divisor is not None
    after = apply_update(adapter, total / divisor, optimizer, 0)
    weights, ranks = {"ash": 30, "elm": 40, "oak": 50}, {"ash": 2, "elm": 4, "oak": 8}
    place = 0
    for tensor in spec.trained("ffa"):
        parts = {n: each.update[place : place + tensor.size].reshape(tensor.shape) for n, each in sent.items()}
        moved = after.values[tensor.name].astype(np.float64) - adapter.values[tensor.name]
        for column in range(tensor.shape[-1]) if tensor.role == "lora_B" else ():
            own = [name for name in parts if column < ranks[name]]
            mean = sum(parts[n][:, column].astype(np.float64) for n in own) / sum(weights[n] for n in own)
            assert np.abs(moved[:, column] - mean).max() < 1e-6
            assert all(parts[n][:, column].any() == (n in own) for n in parts)
        place += tensor.size


def test_equal_rows_of_a_tell_the_difference_between_ranks(three: tuple[Study, dict[str, Worker]]) -> None:
    """Why each rank needs as many sites as a sum: the coordinator chooses the adapter that a round starts from."""
    study, workers = three
    spec = workers["ash"].open(study)[1].spec
    adapter = random_adapter(spec, scale=0.1)
    chosen = {}
    for tensor in spec.tensors:
        value = adapter.values[tensor.name].copy()
        if tensor.role == "lora_A":
            value[2] = value[0]
        elif tensor.role == "lora_B":
            value[:, 2] = value[:, 0]
        chosen[tensor.name] = value
    adapter = adapter.replace(chosen)
    sent = {name: worker.update(opened(study, adapter)).update for name, worker in workers.items()}
    total: Array = np.sum(list(sent.values()), axis=0, dtype=np.float64)
    place = 0
    for tensor in spec.trained("ffa"):
        part = slice(place, place + tensor.size)
        place += tensor.size
        if tensor.role == "lora_B":
            summed, alone = total[part].reshape(tensor.shape), sent["ash"][part].reshape(tensor.shape)
            # The sum over all sites less that over the two of higher rank is the update of the third.
            assert np.abs(summed[:, 0] - summed[:, 2] - alone[:, 0]).max() < 1e-3 * np.abs(alone[:, 0]).max()


def test_a_site_trains_its_columns_as_if_the_rest_were_frozen(bert: Path, tmp_path: Path) -> None:
    more = {"training.weight_decay": 0.1, "training.fedprox_mu": 0.1, "training.sampling_rate": 1.0}
    study = ranked(bert, privacy=private(), **more)
    worker = worker_of(site_toml(tmp_path, "ash", class_rows(30), declared_count=30))
    spec = worker.open(study)[1].spec
    own = own_values(study, spec, "ash")
    sent = worker.update(opened(study, random_adapter(spec, scale=0.1)))
    assert own is not None
    assert not sent.update[~own].any()  # no noise either
    assert sent.update[own].all()


def test_shared_noise_is_on_every_value_and_terms_on_the_own_ones(
    bert: Path, three: tuple[Study, dict[str, Worker]]
) -> None:
    step = {"local_steps": 1, "optimizer": "sgd", "learning_rate": 1.0, "momentum": 0.0, "sampling_rate": 1.0}
    study = ranked(bert, privacy=private(mode="distributed"), training=step, **MASKED)
    data, host = three[1]["ash"].open(three[0])
    shares, own = shared_noise(study, 3), own_values(study, host.spec, "ash")
    assert own is not None
    adapter = random_adapter(host.spec, scale=0.1)

    def sent(part: Any) -> Any:
        draws = Draws(SeededRandomness(1, "sampling"), SeededRandomness(1, "noise"))
        with host.lock:
            return release_step(host, study, adapter, data.training, draws, shares=shares, physical_batch=32, own=part)

    noise = contribute(np.zeros(own.size, np.int64), shares, SeededRandomness(1, "noise"))
    found = sent(own)
    assert np.array_equal(found[~own], noise[~own])
    assert not np.array_equal(found[own], noise[own])
    assert noise[~own].std() == pytest.approx(noise[own].std(), rel=0.2)
    assert not np.array_equal(sent(None)[~own], noise[~own])  # a site that forgot its rank would be seen here
