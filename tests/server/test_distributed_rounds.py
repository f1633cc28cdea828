"""Steps with shared noise through whole rounds: exact sums, drop-outs to the floor, attacks on the noise."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from privet.client.budget.accounts import Limit, composed_epsilon
from privet.client.budget.releases import Releases, open_ledger
from privet.common.audit.bundle import history_of, read_archive
from privet.common.errors import (
    PolicyError,
    ProtocolError,
    RefusedError,
    SpentRoundError,
    StateError,
    StudyError,
)
from privet.common.log.statements import SiteRound
from privet.common.masking.groups import survivors_of
from privet.common.masking.noise_shares import bits_of, shared_noise
from privet.common.masking.parameters import parameters_of
from privet.common.privacy.accounting import epsilon, plan
from privet.common.secagg.encoding import decode, encode
from privet.common.secagg.messages import Masked, Parameters, Survivors
from privet.common.secagg.quantize import lane_bits
from privet.common.study.adapter import Adapter
from privet.common.study.messages import Contribution, Failure, Message, RoundOpen, Secured
from privet.common.study.study import Study
from privet.server.rounds.rounds import run_study
from privet.server.rounds.run_log import Unlogged
from privet.server.rounds.state import RunDirectory
from tests.support.logged_world import world_of
from tests.support.masked_world import (
    QUICK,
    REVEAL,
    STEP,
    kind_of,
    masked_study,
    one_round,
    sharing_study,
    stage_of,
)
from tests.support.noise_world import moved, shared, sharing, sites_of
from tests.support.secagg_world import identity, pins
from tests.support.sharing_world import SITES, Workers, initial, real_sites, worker_study
from tests.support.synthetic import PEFT_CONFIG, SPEC, size, start_adapter
from tests.support.tiny import private, worker_of, write_policy

Array = NDArray[np.float64]
MASKED = 6  # the type of the message that brings a vector


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What survives a power cut is not the subject here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- the step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asleep", [(), ("mask",), ("share",), ("reveal",)])
def test_a_step_is_the_exact_sum_of_the_survivors_integers_over_the_expected_batch(asleep: tuple[str, ...]) -> None:
    study = sharing_study()
    exchange = sharing(study, 6)
    sites = sites_of(exchange)
    sites[2].asleep = asleep
    state = one_round(study, exchange)
    statement = state.statements[-1]
    assert statement["type"] == "round-close"
    present = [site for site in sites if site.name in statement["survivors"]]
    assert len(present) == (5 if asleep in (("mask",), ("share",)) else 6)
    shares = shared_noise(study, 6)
    expected = -shares.level * np.sum([site.sent[1] for site in present], axis=0)
    expected /= study.training.sampling_rate * sum(site.weight for site in present)
    assert moved(study, state) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    noise = statement["masking"][0]["noise"]
    assert noise["noise_multiplier"] == shares.noise_multiplier == statement["privacy"]["training"]["noise_multiplier"]
    assert noise["of_this_sum"] == pytest.approx(shares.noise_multiplier * ((len(present) - 1) / 4) ** 0.5)
    assert statement["privacy"]["training"]["mechanism"] == "poisson-subsampled-shared-gaussian"
    vectors = [
        decode(Masked, reply.body).words
        for replies in exchange.replies
        for reply in replies.values()
        if isinstance(reply, Secured) and kind_of(reply) == MASKED
    ]
    assert {len(words) for words in vectors} == {-(-size(study) // 3)}  # three numbers to 8 bytes, and nothing else


def test_the_noise_of_whole_rounds_is_the_noise_accounted_for() -> None:
    # Six of seven stay and one of them is silent: the worst that is admitted. Its integers are subtracted.
    study = sharing_study(aggregation={"largest_count": 60, "learning_rate": 1.0})
    shares = shared_noise(study, 7)
    assert (shares.survivors, shares.corrupt, shares.helpers) == (6, 1, 5)
    found: list[Array] = []
    for _ in range(150):
        exchange = sharing(study, 7, silent=1)
        sites = sites_of(exchange)
        sites[0].asleep = ("mask",)
        state = one_round(study, exchange)
        present = sites[1:]
        batch = study.training.sampling_rate * sum(site.weight for site in present)
        found.append(-moved(study, state) * batch - np.sum([site.gradients[1] for site in present], axis=0))
    noise = np.concatenate(found) / (shares.noise_multiplier * shares.clip_norm)
    assert len(noise) == 150 * size(study)
    # The noise is secret, so each run of the test draws anew: one in a million may fail by chance. Noise of half the
    # deviation, or of one helper less, is beyond that by far.
    spread = float(np.sum(noise**2))
    assert 1e-6 < stats.chi2.cdf(spread, len(noise)) < 1 - 1e-6
    assert stats.kstest(noise, "norm").pvalue > 1e-6


def test_sharing_makes_a_step_less_noisy_than_noise_of_ones_own() -> None:
    study = sharing_study()
    for sites in (9, 20, 30):
        shares = shared_noise(study, sites)
        of_the_sum = shares.deviation * sites**0.5
        own = shares.noise_multiplier * shares.clip_norm * sites**0.5
        assert own / of_the_sum == pytest.approx(shares.helpers**0.5)
        assert of_the_sum < 1.3 * shares.noise_multiplier * shares.clip_norm


@pytest.mark.parametrize(("sites", "survivors"), [(3, 3), (5, 4), (9, 8), (10, 9), (20, 18), (30, 27)])
def test_the_floor_leaves_room_for_the_drop_outs_that_the_study_allows(sites: int, survivors: int) -> None:
    study = sharing_study()
    assert survivors_of(study, sites, sites) == survivors
    assert shared_noise(study, sites).helpers == survivors - max(1, sites // 10)
    # Three numbers fit a word up to 128 sites.
    assert 64 // lane_bits(bits_of(study, sites), sites) == 3
    fewer = sharing_study(privacy={"dropouts": 0, "dropout_fraction": 0.0})
    assert survivors_of(fewer, sites, sites) == sites


def test_lanes_are_as_wide_as_the_gradients_of_a_step_can_need() -> None:
    for most, rate, lanes in ((60, 0.1, 3), (1_000_000, 1.0, 2)):
        study = sharing_study(aggregation={"largest_count": most}, training={"sampling_rate": rate})
        assert 64 // lane_bits(bits_of(study, 9), 9) == lanes
        assert shared_noise(study, 9).level_bits >= 3
    narrow = sharing_study(
        aggregation={"largest_count": 1_000_000}, training={"sampling_rate": 1.0}, secure_aggregation={"bits": 14}
    )
    with pytest.raises(StudyError, match="14 bits for the gradients of 9 sites leave"):
        shared_noise(narrow, 9)


def test_a_share_keeps_by_itself_what_the_study_promises_of_it() -> None:
    plain, kept = sharing_study(), sharing_study(privacy={"epsilon_alone": 6.0})
    mechanism = plan(kept)
    assert mechanism is not None
    shares, without = shared_noise(kept, 9), shared_noise(plain, 9)
    event = replace(mechanism.training, noise_multiplier=shares.own_multiplier, steps=kept.total_steps)
    assert 5.9 < epsilon([event], mechanism.delta) <= 6.0
    assert shares.deviation == shares.own_multiplier * kept.privacy.promise.clip_norm > without.deviation
    # What the sum is accounted for stays, and what it has is more.
    assert shares.noise_multiplier == without.noise_multiplier
    assert shares.effective_multiplier(shares.survivors) > shares.noise_multiplier
    assert without.effective_multiplier(without.survivors) == pytest.approx(without.noise_multiplier)
    # A promise that the shares keep anyway changes nothing.
    assert shared_noise(sharing_study(privacy={"epsilon_alone": 1e6}), 3).deviation == shared_noise(plain, 3).deviation


def test_a_study_with_noise_of_its_own_shares_none() -> None:
    with pytest.raises(StudyError, match="shares of the noise only if it is distributed"):
        shared_noise(masked_study(), 5)


@pytest.mark.parametrize("optimizer", ["adam", "fedadam", "fedavgm"])
def test_a_killed_run_goes_on_with_the_optimizer_where_it_was(optimizer: str, tmp_path: Path) -> None:
    study = sharing_study(
        aggregation={"method": "ffa", "optimizer": optimizer, "learning_rate": 0.01},
        training={"rounds": 4},
        privacy={"epsilon": 100.0},
    )
    run = RunDirectory.create(tmp_path / "run", study, start_adapter(), PEFT_CONFIG)

    class KilledError(Exception):
        pass

    def kill(statement: Mapping[str, Any], published: Adapter) -> None:
        if statement["round"] == 2:
            raise KilledError

    with pytest.raises(KilledError):
        run_study(Unlogged(run), sharing(study, 5), kill, QUICK)
    state = run_study(Unlogged(RunDirectory.open(tmp_path / "run")), sharing(study, 5), timing=QUICK)
    assert [statement["round"] for statement in state.statements] == [1, 2, 3, 4]
    assert {statement["type"] for statement in state.statements} == {"round-close"}


def test_a_study_with_shared_noise_leaves_a_log_that_an_auditor_verifies(tmp_path: Path) -> None:
    study = sharing_study(training={"rounds": 2}, aggregation={"learning_rate": 0.01})
    world = world_of(tmp_path, study, 5)
    for site in world.sites.values():
        site.contribute = partial(shared, site)  # type: ignore[method-assign]
    state = world.play()
    assert [statement["type"] for statement in state.statements] == ["round-close"] * 2
    verdict, found = history_of(read_archive(tmp_path / "run" / "public"), world.policy)
    assert verdict.ok, verdict
    stated = [each.charge.training for _, each in found if isinstance(each, SiteRound) and each.charge]
    assert {each.mechanism for each in stated} == {"poisson-subsampled-shared-gaussian"}
    assert len(stated) == 10
    card = (tmp_path / "run" / "release" / "README.md").read_text()
    assert "together with" in card


# --- attacks on the noise --------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["share", "mask"])
def test_a_step_that_loses_more_sites_than_were_allowed_for_reveals_nothing(stage: str) -> None:
    study = sharing_study()
    exchange = sharing(study, 6)
    for site in sites_of(exchange)[:2]:
        site.asleep = (stage,)
    state = one_round(study, exchange)
    assert state.statements[-1]["type"] == "round-abort"
    assert REVEAL not in exchange.kinds()
    assert state.adapter.digest == start_adapter().digest
    # It costs what any round does, since vectors may have gone out.
    mechanism = plan(study)
    assert mechanism is not None
    assert set(state.statements[-1]["privacy"]["epsilon"].values()) == {mechanism.spent(1)}


def test_a_coordinator_that_drops_sites_to_thin_the_noise_is_refused_by_every_site() -> None:
    study = sharing_study()
    exchange = sharing(study, 7)

    def thinned(node: int, message: Message) -> Message:
        if stage_of(message) != "confirm" or not isinstance(message, Secured):
            return message
        survivors = decode(Survivors, message.body)
        fewer = replace(survivors, survivors=survivors.survivors[:5])
        return replace(message, body=encode(fewer))

    exchange.alter = thinned
    state = one_round(study, exchange)
    assert state.statements[-1]["type"] == "round-abort"
    assert REVEAL not in exchange.kinds()
    said = [reply for replies in exchange.replies for reply in replies.values() if isinstance(reply, Failure)]
    assert len(said) >= 5


def test_a_coordinator_cannot_lower_the_floor() -> None:
    study = sharing_study()
    exchange = sharing(study, 7)

    def lowered(node: int, message: Message) -> Message:
        if not isinstance(message, RoundOpen):
            return message
        parameters = decode(Parameters, message.masking)
        return replace(message, masking=encode(replace(parameters, min_survivors=5)))

    exchange.alter = lowered
    assert one_round(study, exchange).statements[-1]["type"] == "round-abort"
    replies = [reply for replies in exchange.replies for reply in replies.values() if isinstance(reply, Failure)]
    assert all("do not follow from the study" in reply.message for reply in replies)
    assert sum(len(site.trained) for site in sites_of(exchange)) == 0


def test_a_step_is_masked_once_whatever_the_coordinator_replays() -> None:
    study = sharing_study()
    exchange = sharing(study, 6)
    one_round(study, exchange)
    sent = [site.sent[1].copy() for site in sites_of(exchange)]
    for site in sites_of(exchange):
        site.restart()
    # The same step again, with another nonce: each site trains it again, and none masks it.
    again = one_round(study, exchange)
    assert again.statements[-1]["type"] == "round-abort"
    revealed = [REVEAL in map(kind_of, replies.values()) for replies in exchange.replies]
    assert revealed.count(True) == 1
    masked = [entry for site in sites_of(exchange) for entry in site.journal.entries if entry.step == "mask"]
    assert len(masked) == len(sent)


def test_shares_follow_the_cohort_that_all_sites_confirmed() -> None:
    # A larger cohort means smaller shares, so no site may be told another size than its neighbours.
    study = sharing_study()
    exchange = sharing(study, 7)
    shrunk = [identity(i).name for i in range(6)]

    def fewer(node: int, message: Message) -> Message:
        if not isinstance(message, RoundOpen) or node != 2:
            return message
        opened = replace(message, cohort=tuple(shrunk))
        keys = {name: pins(6)[name] for name in shrunk}
        return replace(opened, masking=encode(parameters_of(study, SPEC, opened, keys)))

    exchange.alter = fewer
    state = one_round(study, exchange)
    assert identity(0).name not in state.statements[-1]["survivors"]
    assert exchange.sites[2].trained == []


def test_a_step_that_no_clipped_gradients_make_is_not_taken() -> None:
    study = sharing_study(aggregation={"max_norm": None})
    exchange = sharing(study, 6)
    assert one_round(study, exchange).statements[-1]["type"] == "round-close"
    poisoned = sharing(study, 6)
    sites_of(poisoned)[3].learn = lambda study, adapter: np.full(size(study), 100.0)
    statement = one_round(study, poisoned).statements[-1]
    assert statement["type"] == "round-abort"
    assert "mean update has the norm" in statement["reason"]


def test_a_share_never_travels_in_the_clear() -> None:
    contribution = Contribution("a", 1, "nonce", 1.0, np.zeros(3, np.int64), np.empty(0))
    with pytest.raises(ProtocolError, match="must not leave the site without a mask"):
        contribution.parts()


def test_an_update_of_another_kind_is_not_masked_as_a_step() -> None:
    study = sharing_study()
    exchange = sharing(study, 5)
    site = sites_of(exchange)[0]
    honest = site.contribute
    site.contribute = lambda opened: replace(honest(opened), update=np.zeros(size(study), np.float32))  # type: ignore[method-assign]
    state = one_round(study, exchange)
    assert site.name not in state.statements[-1]["survivors"]
    assert "integers" in state.statements[-1]["failures"][site.name]


# --- workers and their ledgers ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_site_that_was_killed_and_one_that_was_away_are_charged_for_what_they_took_part_in(
    bert: Path, tmp_path: Path
) -> None:
    study = worker_study(bert)
    files = real_sites(tmp_path, study)
    exchange = Workers({name: worker_of(file) for name, file in zip(SITES, files, strict=True)})
    start = initial(exchange.workers["ash"], study)
    for number in range(1, 6):  # all from one adapter: a site pays for no more of them
        away = number in (2, 3)
        total = exchange.play(study, start, number, SITES[:3] if away else SITES)
        assert total.survivors == (SITES[:3] if away else SITES)
        if number == 2:  # killed and started anew
            exchange.workers["ash"] = worker_of(files[0])
    mechanism = plan(study)
    assert mechanism is not None
    for name, rounds in zip(SITES, (5, 5, 5, 3), strict=True):
        ledger = open_ledger(exchange.workers[name].site.config)
        items = [item for item in ledger.items(name) if item.charged]
        assert sum(item.rounds for item in items) == rounds
        cost = items[0].cost
        assert cost is not None
        assert cost.training.shared
        assert cost.training.noise_multiplier == mechanism.training.noise_multiplier
        spent = composed_epsilon([(item.cost, item.rounds) for item in items], Limit("record", 5.0, 1e-3))
        assert spent == mechanism.spent(rounds) <= 4.0


@pytest.mark.parametrize("mode", ["distributed", "local"])
def test_a_site_that_lost_its_round_sits_it_out_and_the_study_goes_on(
    bert: Path, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = worker_study(bert) if mode == "distributed" else worker_study(bert, privacy=private(epsilon=4.0))
    files = real_sites(tmp_path, study)
    exchange = Workers({name: worker_of(file) for name, file in zip(SITES, files, strict=True)})
    start = initial(exchange.workers["ash"], study)
    ash, charge = exchange.workers["ash"], Releases.charge

    def full(releases: Releases, of: Study, contribution: Contribution) -> None:
        if contribution.site == "ash":
            raise StateError("the disk is full")
        charge(releases, of, contribution)

    with monkeypatch.context() as patched:
        patched.setattr(Releases, "charge", full)
        total = exchange.play(study, start, 1, SITES)
    assert total.survivors == SITES[1:]
    assert total.failures["ash"].error == "StateError"
    # The coordinator opens the same round again: whoever has its bytes sends them, but masks once; ash has none.
    opened = RoundOpen(study.document(), 1, "f" * 32, start.digest, SITES, start.data)
    for _ in range(3):
        with pytest.raises(SpentRoundError):
            ash._contribution(opened)
    assert exchange.play(study, start, 2, SITES).survivors == SITES
    ledger = open_ledger(ash.site.config)
    assert [(item.charged, item.rounds) for item in ledger.items("ash")] == [(True, 2)]
    assert [receipt.round for receipt in ledger.receipts("ash")] == [2]


@pytest.mark.slow
def test_a_changed_sampling_rate_is_another_study_which_no_site_agreed_to(bert: Path, tmp_path: Path) -> None:
    study = worker_study(bert)
    worker = worker_of(real_sites(tmp_path, study)[0])
    other = worker_study(bert, training={**STEP, "rounds": 6, "sampling_rate": 0.5})
    start = initial(worker, study)
    opened = RoundOpen(other.document(), 1, "nonce", start.digest, SITES, start.data, declared=30)
    keys = {name: bytes.fromhex(key) for name, key in worker.site.config.peers.items()}
    with pytest.raises(RefusedError, match="has not approved study"):
        worker.advertise(replace(opened, masking=encode(parameters_of(other, start.spec, opened, keys))))


@pytest.mark.slow
def test_a_workers_share_is_its_clipped_sum_and_noise_and_what_the_ledger_stored(bert: Path, tmp_path: Path) -> None:
    study = worker_study(bert, training={**STEP, "rounds": 6, "sampling_rate": 1.0})
    worker = worker_of(real_sites(tmp_path, study)[0])
    start = initial(worker, study)
    opened = RoundOpen(study.document(), 1, "nonce", start.digest, SITES, start.data, declared=30)
    worker.open(study)
    first = worker._contribution(opened)
    again = worker._contribution(opened)
    assert first.update.dtype == np.int64
    assert np.array_equal(first.update, again.update)
    shares = shared_noise(study, len(SITES))
    # Thirty units of norm at most C, and a share of the noise in each coordinate.
    bound = 30 * shares.clip_norm + 1.2 * shares.deviation * first.update.size**0.5
    assert float(np.linalg.norm(first.update * shares.level)) < bound
    assert float(np.std(first.update)) > 0.9 * 2.0**shares.level_bits


@pytest.mark.slow
def test_a_share_for_many_sites_is_not_released_to_fewer(bert: Path, tmp_path: Path) -> None:
    # Trained and stored, but not masked: the process was killed. The round is then opened again to a smaller cohort.
    study = worker_study(bert, **{"privacy.dropouts": 0, "privacy.dropout_fraction": 0.0})
    worker = worker_of(real_sites(tmp_path, study)[0])
    start = initial(worker, study)
    opened = RoundOpen(study.document(), 1, "nonce", start.digest, SITES, start.data, declared=30)
    worker._contribution(opened)
    assert shared_noise(study, 3).own_multiplier > shared_noise(study, 4).own_multiplier
    with pytest.raises(RefusedError, match="for the adapter and cohort with digest"):
        worker._contribution(replace(opened, nonce="again", cohort=SITES[:3]))


def test_a_policy_that_changed_during_a_step_keeps_its_share_at_the_site(bert: Path, tmp_path: Path) -> None:
    study = worker_study(bert)
    files = real_sites(tmp_path, study)
    worker = worker_of(files[0])
    start = initial(worker, study)
    opened = RoundOpen(study.document(), 1, "nonce", start.digest, SITES, start.data, declared=30)
    values = sum(tensor.size for tensor in start.spec.trained(study.aggregation.method))
    policy = files[0].with_name(f"{worker.name}.policy.toml")
    write_policy(policy, **{"limits.max_upload_bytes": 4 * values - 1})
    with pytest.raises(PolicyError) as caught:
        worker._contribution(opened)
    assert [finding.code for finding in caught.value.findings] == ["E_UPLOAD"]
    assert all(not item.charged for item in open_ledger(worker.site.config).items(worker.name))
    write_policy(policy, **{"limits.max_upload_bytes": 4 * values})  # as the policy counts: 4 bytes for each value
    assert worker._contribution(opened).update.size == values


def test_the_study_is_calibrated_for_the_worst_case() -> None:
    study = sharing_study()
    mechanism = plan(study)
    assert mechanism is not None
    assert mechanism.training.shared
    assert epsilon([mechanism.training] * 30, 1e-4) <= 4.0
    assert mechanism.validation is None
