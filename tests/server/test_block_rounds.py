"""Rounds of a block: the same sums as with a set-up each, in one exchange, whoever restarts, leaves or lies."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privet.client.budget.releases import open_ledger
from privet.client.policy.rules import MOST_LOST
from privet.client.rounds.worker import Worker
from privet.common.audit.bundle import history_of, read_archive
from privet.common.audit.privacy_statement import check_statements
from privet.common.errors import ProtocolError, RefusedError, StateError, StudyError, VerificationError
from privet.common.log.statements import SiteRound
from privet.common.masking.noise_shares import shared_noise
from privet.common.masking.parameters import check_step, parameters_of
from privet.common.masking.vector import read_step
from privet.common.privacy.accounting import plan
from privet.common.secagg import masks
from privet.common.secagg.block_sums import BlockAggregator
from privet.common.secagg.encoding import decode, encode, kind_of
from privet.common.secagg.messages import BlockParameters, LinkDelivery, Masked, Sealed, Step
from privet.common.secagg.quantize import WORD
from privet.common.secagg.terms import Floor, check_parameters
from privet.common.study.adapter import AdapterSpec, TensorSpec
from privet.common.study.messages import Message, RoundOpen, Secured
from privet.common.study.study import Study
from privet.server.rounds.blocks import Blocks, _goes_on
from privet.server.rounds.masked import Waits, group_of
from privet.server.rounds.participants import Participant
from privet.server.rounds.rounds import run_study
from privet.server.rounds.run_log import Unlogged
from privet.server.rounds.state import RunDirectory, RunState
from privet.server.rounds.statements import isolation_of
from tests.support.logged_world import world_of
from tests.support.masked_world import QUICK, Relay, members_of, sharing_study
from tests.support.noise_world import moved, shared, sharing, sites_of
from tests.support.secagg_world import pins
from tests.support.sharing_world import SITES, Workers, initial, real_sites, worker_study
from tests.support.site_log import logged
from tests.support.synthetic import PEFT_CONFIG, SPEC, start_adapter
from tests.support.tiny import worker_of

SET_UP = ["BlockParameters", "Roster", "LinkDelivery", "Step"]
NOBODY_LEAVES = {"dropouts": 0, "dropout_fraction": 0.0}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What survives a power cut is not the subject here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def block_study(rounds: int = 6, block: int | None = 4, **more: Any) -> Study:
    return sharing_study(
        training={"rounds": rounds, **more.pop("training", {})},
        privacy={**NOBODY_LEAVES, **more.pop("privacy", {})},
        secure_aggregation={"block": block, **more.pop("secure_aggregation", {})},
        **more,
    )


def run(folder: Path, study: Study, exchange: Relay) -> RunState:
    directory = RunDirectory.create(folder / "run", study, start_adapter(), PEFT_CONFIG)
    return run_study(Unlogged(directory), exchange, timing=QUICK)


def asked(exchange: Relay) -> dict[int, list[str]]:
    """The kinds of message that the coordinator sent in each round, in order."""
    found: dict[int, list[str]] = {}
    for requests in exchange.asked:
        first = next(iter(requests.values()), None)
        if isinstance(first, RoundOpen | Secured):
            kind = kind_of(first.masking if isinstance(first, RoundOpen) else first.body)
            found.setdefault(first.round, []).append("" if kind is None else kind.__name__)
    return found


def ends(state: RunState) -> list[str]:
    return [statement["type"].removeprefix("round-") for statement in state.statements]


def sum_of_rounds(study: Study, exchange: Relay, rounds: list[int]) -> Any:
    """The sum of the steps that these rounds' integers make."""
    sites = sites_of(exchange)
    level = shared_noise(study, len(sites)).level
    batch = study.training.sampling_rate * sum(site.weight for site in sites)
    return -level / batch * np.sum([site.sent[number] for site in sites for number in rounds], axis=0)


def test_a_run_sets_up_once_for_a_block_and_every_sum_is_exact(tmp_path: Path) -> None:
    study = block_study()
    exchange = sharing(study, 4)
    state = run(tmp_path, study, exchange)
    assert ends(state) == ["close"] * 6
    assert asked(exchange) == {1: SET_UP, 2: ["Step"], 3: ["Step"], 4: ["Step"], 5: SET_UP, 6: ["Step"]}
    assert moved(study, state) == pytest.approx(sum_of_rounds(study, exchange, [1, 2, 3, 4, 5, 6]), rel=1e-4, abs=1e-6)
    masking = [statement["masking"][0] for statement in state.statements]
    assert [each["block"] for each in masking] == [1, 1, 1, 1, 5, 5]
    assert len({each["transcript"] for each in masking}) == 6
    assert {each["min_survivors"] for each in masking} == {4}


def restart(exchange: Relay) -> None:
    sites_of(exchange)[1].restart()


def sleep(exchange: Relay) -> None:
    # The tests' stage of every `RoundOpen`.
    sites_of(exchange)[1].asleep = ("advertise",)


@pytest.mark.parametrize("happens", [restart, sleep])
def test_a_round_that_a_site_misses_is_aborted_and_the_next_one_sets_up_anew(
    happens: Callable[[Relay], None], tmp_path: Path
) -> None:
    study = block_study(rounds=5)
    exchange = sharing(study, 4)

    def alter(node: int, message: Message) -> Message:
        if isinstance(message, RoundOpen) and node == 2:
            if message.round == 2:
                happens(exchange)
            if message.round == 3:
                sites_of(exchange)[1].asleep = ()
        return message

    exchange.alter = alter
    state = run(tmp_path, study, exchange)
    assert ends(state) == ["close", "abort", "close", "close", "close"]
    found = asked(exchange)
    # A site that has lost the frozen part of the adapter is sent the round once more.
    assert (set(found[2]), found[3], found[4]) == ({"Step"}, SET_UP, ["Step"])
    assert moved(study, state) == pytest.approx(sum_of_rounds(study, exchange, [1, 3, 4, 5]), rel=1e-4, abs=1e-6)
    reason = state.statements[1]["reason"]
    assert "3 sites of a block sent a masked vector" in reason or "delivered" in reason, reason


def killed_and_resumed(folder: Path, study: Study, exchange: Relay, number: int) -> RunState:
    """Run a study whose coordinator is killed after a round, and resumed."""
    directory = RunDirectory.create(folder / "run", study, start_adapter(), PEFT_CONFIG)

    class KilledError(Exception):
        pass

    def kill(statement: Any, published: Any) -> None:
        if statement["round"] == number:
            raise KilledError

    with pytest.raises(KilledError):
        run_study(Unlogged(directory), exchange, kill, QUICK)
    return run_study(Unlogged(RunDirectory.open(folder / "run")), exchange, timing=QUICK)


def test_a_coordinator_that_restarts_begins_a_new_block(tmp_path: Path) -> None:
    study = block_study(rounds=4)
    exchange = sharing(study, 4)
    state = killed_and_resumed(tmp_path, study, exchange, 2)
    assert ends(state) == ["close"] * 4
    assert asked(exchange)[3] == SET_UP


def test_sites_that_were_given_two_models_leave_no_sum(tmp_path: Path) -> None:
    study = block_study(rounds=3)
    exchange = sharing(study, 4)
    other = start_adapter(7)

    def alter(node: int, message: Message) -> Message:
        if isinstance(message, RoundOpen) and message.round == 2 and node == 3:
            return replace(message, adapter=other.data, adapter_digest=other.digest)
        return message

    exchange.alter = alter
    state = run(tmp_path, study, exchange)
    # The site masks for the model that it was given, so its masks cancel with nobody's.
    assert ends(state)[:2] == ["close", "abort"]
    assert "masked its vector for another round or model" in state.statements[1]["reason"]


def begun(study: Study, exchange: Relay) -> dict[int, RoundOpen]:
    """Play the first round of a block, and return how a second one opens, by node."""
    blocks = Blocks()
    start = start_adapter()
    members = members_of(study, exchange)
    first, second = (
        RoundOpen(study.document(), number, f"{number:032x}", start.digest, tuple(members), start.data)
        for number in (1, 2)
    )
    blocks.collect(exchange, study, SPEC, members, first, Waits(60, 60))
    live = blocks._live
    assert live is not None
    step = encode(live.block.begin(2, bytes(32)))
    return {each.node: replace(second, masking=step, declared=each.consent.weight) for each in members.values()}


def test_a_step_that_comes_again_gets_the_same_bytes_and_no_other_is_answered() -> None:
    study = block_study()
    exchange = sharing(study, 4)
    opened = begun(study, exchange)[2]
    site = exchange.sites[2]
    answer = site.respond(opened)
    assert isinstance(answer, Secured)
    assert site.respond(opened) == answer
    assert site.trained.count(2) == 1
    with pytest.raises(ProtocolError, match="a round is masked once"):
        site.respond(replace(opened, nonce="0" * 32))
    assert site.trained.count(2) == 1


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"masking": encode(Step(bytes(32)))}, ProtocolError, "no keys for this block"),
        ({"cohort": ("site-0000", "site-0001", "site-0002")}, ProtocolError, "not a group"),
        ({"declared": 99}, RefusedError, "declared count has changed"),
        ({"round": 5}, ProtocolError, "a round is masked once"),
        ({"round": 1}, ProtocolError, "a round is masked once"),
    ],
)
def test_a_site_refuses_a_step_that_is_not_of_its_block(change: dict[str, Any], error: type, words: str) -> None:
    study = block_study()
    exchange = sharing(study, 4)
    opened = begun(study, exchange)[2]
    site = exchange.sites[2]
    with pytest.raises(error, match=words):
        site.respond(replace(opened, **change))
    assert site.trained == [1]
    assert isinstance(site.respond(opened), Secured)


def test_a_site_that_no_longer_trusts_a_member_masks_no_further_round() -> None:
    study = block_study()
    exchange = sharing(study, 4)
    opened = begun(study, exchange)[2]
    site = exchange.sites[2]
    site.rounds.pins = {**pins(4), "site-0003": bytes(32)}
    with pytest.raises(Exception, match="another identity key for site site-0003"):
        site.respond(opened)
    site.rounds.pins = {name: key for name, key in pins(4).items() if name != "site-0003"}
    with pytest.raises(RefusedError):
        site.respond(opened)
    assert site.trained == [1]


def test_a_round_that_was_answered_is_not_answered_for_another_model() -> None:
    study = block_study()
    exchange = sharing(study, 4)
    opened = begun(study, exchange)[2]
    site, other = exchange.sites[2], start_adapter(7)
    site.respond(opened)
    with pytest.raises(ProtocolError, match="a round is masked once"):
        site.respond(replace(opened, adapter=other.data, adapter_digest=other.digest))
    assert site.trained == [1, 2]


def test_a_round_in_which_training_failed_can_be_asked_for_again_or_left_out() -> None:
    """The secrets of a round are used up when the vector is masked, and not before."""
    study = block_study()
    exchange = sharing(study, 4)
    site = sites_of(exchange)[0]
    honest, failing = site.contribute, {1, 2}

    def contribute(opened: RoundOpen) -> Any:
        if opened.round in failing:
            raise StateError("the disk is full")
        return honest(opened)

    site.contribute = contribute  # type: ignore[method-assign]
    with pytest.raises(ProtocolError, match="the disk is full"):
        begun(study, exchange)
    step = exchange.asked[-1][2]
    assert isinstance(step, Secured)
    # A step of another block does not make the site train.
    failing.clear()
    with pytest.raises(ProtocolError, match="no keys for this block"):
        site.respond(replace(step, body=encode(Step(bytes(32)))))
    assert site.trained == []
    assert isinstance(site.respond(step), Secured)
    roster, start = decode(Step, step.body).roster, start_adapter()
    opened = RoundOpen(study.document(), 2, "2" * 32, start.digest, tuple(pins(4)), start.data)
    opened = replace(opened, masking=encode(Step(roster)), declared=site.weight)
    failing.add(2)
    with pytest.raises(StateError, match="disk is full"):
        site.respond(opened)
    assert isinstance(site.respond(replace(opened, round=3, nonce="3" * 32)), Secured)
    with pytest.raises(ProtocolError, match="a round is masked once"):
        site.respond(opened)
    assert [entry.round for entry in site.journal.entries] == [1, 3]


def test_an_item_that_does_not_open_costs_no_site_anything() -> None:
    """One corrupt site could otherwise have all others charged, round after round, for nothing."""
    study = block_study()
    exchange = sharing(study, 4)

    def alter(node: int, message: Message) -> Message:
        if not isinstance(message, Secured) or kind_of(message.body) is not LinkDelivery or node != 3:
            return message
        delivery = decode(LinkDelivery, message.body)
        sealed = (Sealed(0, bytes(len(delivery.sealed[0].data))), *delivery.sealed[1:])
        return replace(message, body=encode(replace(delivery, sealed=sealed)))

    exchange.alter = alter
    with pytest.raises(ProtocolError, match="from site number 0 to site number 1"):
        begun(study, exchange)
    assert [site.trained for site in sites_of(exchange)] == [[]] * 4


def test_a_late_copy_of_the_first_message_ends_no_block() -> None:
    study = block_study()
    exchange = sharing(study, 4)
    opened = begun(study, exchange)[2]
    site, first = exchange.sites[2], next(each[2] for each in exchange.asked if isinstance(each[2], RoundOpen))
    site.respond(opened)
    with pytest.raises(ProtocolError, match="is in a later one"):
        site.respond(first)
    assert isinstance(site.respond(replace(opened, round=3, nonce="3" * 32)), Secured)


def test_the_floor_is_kept_in_every_round_of_a_block() -> None:
    study = block_study()
    exchange = sharing(study, 4)
    opened = begun(study, exchange)[2]
    site = exchange.sites[2]
    site.rounds.floor = replace(site.rounds.floor, cohort=5)
    with pytest.raises(RefusedError, match="at least 5"):
        site.respond(opened)
    assert site.trained == [1]


def test_a_study_decides_whether_its_rounds_are_of_blocks() -> None:
    """Not the coordinator: a message of the other kind is refused before any training."""
    study, single = block_study(), block_study(block=None)
    exchange = sharing(study, 4)
    site = exchange.sites[2]
    members = pins(4)
    for asked_of, proposed_as in ((study, single), (single, study)):
        opened = RoundOpen(asked_of.document(), 1, "", start_adapter().digest, tuple(members), start_adapter().data)
        other = parameters_of(proposed_as, SPEC, opened, members)
        masking = replace(other, session=parameters_of(asked_of, SPEC, opened, members).session)
        with pytest.raises(ProtocolError):
            site.respond(replace(opened, masking=encode(masking), declared=site.weight))
    opened = RoundOpen(single.document(), 1, "", start_adapter().digest, tuple(members), start_adapter().data)
    with pytest.raises(ProtocolError, match="no keys for this block"):
        site.respond(replace(opened, masking=encode(Step(bytes(32))), declared=site.weight))
    assert site.trained == []


def test_a_second_set_up_ends_the_first_and_repeats_no_round() -> None:
    study = block_study()
    exchange = sharing(study, 4)
    step = begun(study, exchange)
    start, members = start_adapter(), members_of(study, exchange)

    def second(number: int) -> Any:
        opened = RoundOpen(study.document(), number, "f" * 32, start.digest, tuple(members), start.data)
        return Blocks().collect(exchange, study, SPEC, members, opened, Waits(60, 60))

    with pytest.raises(ProtocolError, match="on record"):
        second(1)
    second(2)
    for node, opened in step.items():
        with pytest.raises(ProtocolError, match="no keys for this block"):
            exchange.sites[node].respond(opened)
        with pytest.raises(ProtocolError, match="no keys for this block"):
            exchange.sites[node].respond(replace(opened, round=3))


def test_a_coordinator_may_keep_the_sum_of_a_round_that_it_says_was_lost(tmp_path: Path) -> None:
    """Every site records the round, and the run's statement charges it to all of them, with the noise of all."""
    study = block_study(rounds=3, aggregation={"learning_rate": 0.01})
    exchange = sharing(study, 4)
    kept: list[Masked] = []

    def hide(asked: Message, honest: Message) -> Message | None:
        if isinstance(asked, RoundOpen) and asked.round == 2 and isinstance(honest, Secured):
            kept.append(decode(Masked, honest.body))
            return None
        return honest

    exchange.sites[2].answer = hide
    state = run(tmp_path, study, exchange)
    assert ends(state) == ["close", "abort", "close"]
    kept += [
        decode(Masked, reply.body)
        for replies in exchange.replies
        for reply in replies.values()
        if isinstance(reply, Secured) and reply.round == 2
    ]
    members = pins(4)
    opened = RoundOpen(study.document(), 2, "", start_adapter().digest, tuple(members), b"")
    layout = parameters_of(study, SPEC, opened, members).layout
    total = np.zeros(layout.words, WORD)
    for message in kept:
        masks.add_packed(total, message.words, whose="a site")
    found = read_step(study, total & masks.LOW, layout)
    sites = sites_of(exchange)
    level = shared_noise(study, len(sites)).level
    assert found == pytest.approx(level * np.sum([site.sent[2] for site in sites], axis=0))
    assert all(2 in {entry.round for entry in site.journal.entries} for site in sites)
    mechanism = plan(study)
    assert mechanism is not None
    stated = state.statements[1]["privacy"]["epsilon"]
    assert stated == dict.fromkeys(members, mechanism.spent([1, 2]))
    assert mechanism.spent([1, 2]) > mechanism.spent([1])


def test_a_spoiler_is_found_in_blocks_that_follow_the_changing_cohort(tmp_path: Path) -> None:
    aggregation = {"learning_rate": 0.01, "max_norm": 1.0}
    study = block_study(rounds=8, block=20, privacy={"epsilon": 200.0}, aggregation=aggregation)
    exchange = sharing(study, 6)
    sites_of(exchange)[4].learn = lambda study, adapter: np.full(moved(study, RunState(0, start_adapter())).size, 100.0)
    state = run(tmp_path, study, exchange)
    assert list(isolation_of(state.statements).left_out) == ["site-0004"]
    for before, statement in zip(state.statements, state.statements[1:], strict=False):
        same = before["type"] == "round-close" and before["cohort"] == statement["cohort"]
        assert asked(exchange)[statement["round"]] == (["Step"] if same else SET_UP)
    assert ends(state)[-3:] == ["close"] * 3
    assert state.statements[-1]["masking"][0]["min_survivors"] == 5


def test_a_site_with_another_address_or_key_gets_a_new_block() -> None:
    study = block_study()
    exchange = sharing(study, 4)
    blocks, start, members = Blocks(), start_adapter(), members_of(study, exchange)

    def opened(number: int) -> RoundOpen:
        return RoundOpen(study.document(), number, f"{number:032x}", start.digest, tuple(members), start.data)

    def play(number: int) -> list[str]:
        blocks.collect(exchange, study, SPEC, members, opened(number), Waits(60, 60))
        return asked(exchange)[number]

    assert play(1) == SET_UP
    moved_away = sites_of(exchange)[3]
    moved_away.restart()
    exchange.sites = {**{node: site for node, site in exchange.sites.items() if site is not moved_away}, 9: moved_away}
    members["site-0003"] = replace(members["site-0003"], node=9)
    assert play(2) == SET_UP
    assert play(3) == ["Step"]
    live, other = blocks._live, members["site-0003"]
    assert live is not None
    for consent, same in ((other.consent, True), (replace(other.consent, identity="00" * 32), False)):
        now = {**members, "site-0003": replace(other, consent=consent)}
        assert _goes_on(live, group_of(study, SPEC, opened(4), now, BlockAggregator)) == same


def test_nothing_of_a_block_outlives_it() -> None:
    study = block_study(rounds=12, block=2)
    exchange = sharing(study, 4)
    blocks, start, members = Blocks(), start_adapter(), members_of(study, exchange)

    def count() -> dict[str, int]:
        gc.collect()
        kinds = ("Block", "Linked", "Advertised", "_Hybrid", "_Classical", "Keys", "Channel", "_Round")
        found = [type(each).__name__ for each in gc.get_objects() if type(each).__module__.startswith("privet.")]
        return {kind: found.count(kind) for kind in (*kinds, "BlockAggregator")}

    before = count()
    for number in range(1, 9):
        opened = RoundOpen(study.document(), number, f"{number:032x}", start.digest, tuple(members), start.data)
        blocks.collect(exchange, study, SPEC, members, opened, Waits(60, 60))
        left = {kind: now - before[kind] for kind, now in count().items()}
        # After its set-up a site holds a block's pair secrets and nothing else that is secret.
        assert left == {**dict.fromkeys(left, 0), "Block": 4, "_Round": 4, "BlockAggregator": 1}, number


def test_a_block_of_many_sites_has_a_complete_graph_and_passes_every_sites_checks() -> None:
    study = block_study(secure_aggregation={"corrupt_fraction": 0.1})
    members = pins(70)
    opened = RoundOpen(study.document(), 1, "", start_adapter().digest, tuple(members), b"")
    found = parameters_of(study, SPEC, opened, members)
    assert (found.degree, found.corrupt, found.min_survivors, found.threshold) == (0, 7, 70, 39)
    check_parameters(found, members, Floor())


def test_a_head_start_is_a_block_of_its_own() -> None:
    study = block_study(training={"rounds": 6, "head_start": "class-means"})
    members, spec = pins(4), AdapterSpec.of([*SPEC.tensors[1:], TensorSpec("m.classifier.weight", (3, 4), "full")])
    first, second = (
        RoundOpen(study.document(), number, "", start_adapter().digest, tuple(members), b"") for number in (1, 2)
    )
    found = parameters_of(study, spec, first, members)
    assert isinstance(found, BlockParameters)
    assert found.rounds == 1
    with pytest.raises(ProtocolError, match="differ from those of the block"):
        check_step(study, spec, second, replace(found, rounds=4), 10)


def test_a_block_has_the_parameters_of_its_rounds() -> None:
    study = block_study()
    members = pins(4)
    opened = RoundOpen(study.document(), 5, "", start_adapter().digest, tuple(members), b"")
    found = parameters_of(study, SPEC, opened, members)
    assert isinstance(found, BlockParameters)
    assert (found.round, found.rounds, found.degree, found.min_survivors) == (5, 2, 0, 4)
    assert decode(BlockParameters, encode(found)) == found
    with pytest.raises(ProtocolError, match="differ from those of the block"):
        check_step(study, SPEC, opened, replace(found, bits=found.bits - 1), 10)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"privacy": {"dropouts": 1}, "secure_aggregation": {"suite": "x25519"}}, "suite x25519 has no blocks that"),
        ({"privacy": {"noise": "banded", "band": 2}, "aggregation": {"optimizer": "fedavgm"}}, "banded"),
        ({"cohort": {"fraction": 0.5}}, "same sites in every round"),
    ],
)
def test_a_study_that_a_block_does_not_fit_is_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        block_study(**more)


def test_a_study_without_a_block_has_the_digest_that_it_had() -> None:
    study = block_study(block=None)
    assert "block" not in study.document()["secure_aggregation"]


def test_a_run_of_blocks_leaves_a_log_that_an_auditor_verifies(tmp_path: Path) -> None:
    study = block_study(rounds=3, block=2, aggregation={"learning_rate": 0.01})
    world = world_of(tmp_path, study, 4)
    for site in world.sites.values():
        site.contribute = partial(shared, site)  # type: ignore[method-assign]
    state = world.play()
    assert ends(state) == ["close"] * 3
    verdict, found = history_of(read_archive(tmp_path / "run" / "public"), world.policy)
    assert verdict.ok, verdict
    assert len([each for _, each in found if isinstance(each, SiteRound) and each.charge]) == 12
    check_statements(study, state.statements)
    last = dict(state.statements[-1])
    with pytest.raises(VerificationError, match="3 of 4 sites are in the sum, but at least 4 are needed"):
        check_statements(study, [*state.statements[:-1], {**last, "survivors": last["survivors"][:3]}])


def test_workers_charge_each_round_of_a_block_and_a_restarted_one_needs_a_new_block(tmp_path: Path, bert: Path) -> None:
    study = worker_study(
        bert, **{"secure_aggregation.block": 4, "privacy.dropouts": 0, "privacy.dropout_fraction": 0.0}
    )
    files = real_sites(tmp_path, study)
    workers: dict[str, Worker] = {name: worker_of(file) for name, file in zip(SITES, files, strict=True)}
    exchange = Workers(workers)
    start, blocks = initial(workers["ash"], study), Blocks()
    members = {name: Participant(SITES.index(name), workers[name].offer(study)) for name in SITES}

    def play(number: int) -> Any:
        nonce = f"{number:032x}"
        opened = RoundOpen(study.document(), number, nonce, start.digest, SITES, start.data)
        return blocks.collect(exchange, study, start.spec, members, logged(workers, opened), Waits(60, 60))

    sums = [play(number) for number in (1, 2)]
    assert all(total.survivors == SITES for total in sums)
    assert np.linalg.norm(sums[0].update - sums[1].update) > 0
    workers["elm"] = exchange.workers["elm"] = worker_of(files[1])
    with pytest.raises(ProtocolError, match="has restarted"):
        play(3)
    assert play(4).survivors == SITES
    # Whether there was a sum or not, a round was paid, and the adapter never changed: the policy ends it.
    assert play(MOST_LOST).survivors == SITES
    with pytest.raises(ProtocolError, match="in a row without a result"):
        play(MOST_LOST + 1)
    # elm has paid for one round less, and so for this one.
    paid = {n: [each.round for each in open_ledger(w.site.config).receipts(n)] for n, w in workers.items()}
    assert paid == {name: [1, 2, 4, 5, 6] if name == "elm" else [1, 2, 3, 4, 5] for name in SITES}
