"""A block of rounds: exact sums with one set-up, and nothing but the one sum of each round, whatever is tried."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from privet.common.errors import ProtocolError, RefusedError, StateError, TooFewSitesError, VerificationError
from privet.common.secagg import block, encoding, masks, messages, site, transcript
from privet.common.secagg.block_sums import BlockAggregator
from privet.common.secagg.messages import LinkDelivery, Roster, Sealed
from privet.common.secagg.quantize import WORD
from privet.common.secagg.suites import Suite

world = importlib.import_module("tests.support.secagg_world")
blocks = importlib.import_module("tests.support.block_world")
SUITES = list(Suite)


@pytest.fixture(params=SUITES, ids=lambda suite: suite.value)
def suite(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """Every attack is tried in every suite."""
    monkeypatch.setattr(world, "SUITE", request.param)
    chosen: Suite = request.param
    return chosen


def begun(sites: int = 3, rounds: int = 4, seed: bytes = b"block", **changes: Any) -> Any:
    """A block that has been set up."""
    return blocks.BlockWorld(blocks.block_parameters(sites, rounds, **changes), seed).join()


def equal(total: Any, play: Any, number: int) -> bool:
    low = masks.LOW if play.parameters.packed else np.uint64(2**64 - 1)
    return bool(np.array_equal(total.words & low, play.expected(number) & low))


@pytest.mark.parametrize("sites", [2, 3, 5])
@pytest.mark.parametrize("bits", [16, 14])
def test_every_round_of_a_block_has_the_exact_sum(suite: Suite, sites: int, bits: int) -> None:
    play = begun(sites, rounds=5, bits=bits, size=200)
    for number in (1, 2, 4, 5):  # the third is left out
        total = play.play(number)
        assert equal(total, play, number)
        assert total.survivors == tuple(range(sites))
    assert [entry.round for entry in play.journals[0].entries] == [1, 2, 4, 5]


def test_some_layout_is_packed_and_some_is_not() -> None:
    assert {begun(3, bits=bits, size=200).parameters.packed for bits in (16, 14)} == {True, False}


def test_a_round_that_one_site_misses_has_no_sum_and_the_next_one_has(suite: Suite) -> None:
    play = begun(4)
    with pytest.raises(TooFewSitesError, match="3 sites of a block sent a masked vector, the round needs at least 4"):
        play.play(1, missing={2})
    assert equal(play.play(2), play, 2)


def test_transcripts_of_rounds_differ_and_are_reproducible() -> None:
    first, again = begun(3), begun(3)
    found = [first.play(number).transcript for number in (1, 2, 3)]
    assert len(set(found)) == 3
    # ML-KEM draws from the operating system, so only the digests' form can be compared between two set-ups.
    assert all(len(each) == 32 for each in [*found, again.play(1).transcript])


# ---- what a site refuses


def test_a_round_is_masked_once_and_never_an_earlier_one(suite: Suite) -> None:
    play = begun(3, rounds=4)
    play.mask(0, 2)
    for number in (2, 1, 0, 5, 6):
        with pytest.raises(ProtocolError, match=f"round {number}: this site has keys for rounds 3 to 4"):
            play.mask(0, number)
    play.mask(0, 4)
    with pytest.raises(ProtocolError):
        play.mask(0, 4)


def test_a_round_on_record_is_not_masked_in_a_second_block(suite: Suite) -> None:
    play, second = begun(3), begun(3)
    play.mask(0, 1)
    second.journals[0] = play.journals[0]
    with pytest.raises(StateError, match="on record"):
        second.mask(0, 1)
    # After that error the round is lost in this block as well: its keys are gone.
    second.journals[0] = world.Journal()
    with pytest.raises(ProtocolError):
        second.mask(0, 1)


def test_nothing_leaves_before_the_record_is_durable() -> None:
    play = begun(3)

    def fails(entry: site.RecordedStep) -> None:
        raise StateError("the disk is full")

    words = play.words(0, 1)
    with pytest.raises(StateError, match="disk"):
        play.blocks[0].mask(1, world.INPUTS, words, fails)
    assert np.array_equal(words, play.words(0, 1))


def test_secrets_are_neither_copied_nor_stored_nor_printed() -> None:
    play = begun(3)
    for secret in (play.blocks[0], play.linked[0]):
        attempts: list[Any] = [copy.copy, copy.deepcopy, type(secret).__reduce__]
        for attempt in attempts:
            with pytest.raises(StateError):
                attempt(secret)
        assert repr(secret) == f"<{type(secret).__name__} of one round>"


def test_steps_of_a_round_and_of_a_block_do_not_mix(suite: Suite) -> None:
    play = blocks.BlockWorld(blocks.block_parameters(3))
    with pytest.raises(ProtocolError, match="shares no secret"):
        site.share(play.advertised[0], play.roster)
    single = world.World(world.parameters(3, corrupt=1)).advertise()
    with pytest.raises(ProtocolError, match="is no block"):
        block.link(single.advertised[0], single.roster)
    assert transcript.parameters_digest(play.parameters) != transcript.parameters_digest(
        world.parameters(3, corrupt=1, min_survivors=3, degree=0)
    )


def test_each_state_answers_once(suite: Suite) -> None:
    play = begun(3)
    with pytest.raises(ProtocolError, match="answers once"):
        block.link(play.advertised[0], play.roster)
    with pytest.raises(ProtocolError, match="answers once"):
        block.join(play.linked[0], play.deliveries[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"min_survivors": 3}, "least number of survivors in a block must be at least 4"),
        ({"degree": 2, "threshold": 3, "corrupt": 0, "min_survivors": 4}, "degree"),
        ({"rounds": 0}, "number of rounds in a block must be at least 1"),
        ({"rounds": 65_536}, "number of rounds in a block must be at most 65535"),
    ],
)
def test_parameters_that_a_block_cannot_have_are_refused(changes: dict[str, Any], words: str) -> None:
    parameters = blocks.block_parameters(4, **changes)
    with pytest.raises(RefusedError, match=words):
        site.advertise(world.identity(0), parameters, world.INPUTS, world.pins(4), world.LOW, world.Drbg(b""))


def test_a_roster_without_one_site_is_refused(suite: Suite) -> None:
    play = blocks.BlockWorld(blocks.block_parameters(4))
    with pytest.raises(TooFewSitesError):
        block.link(play.advertised[0], Roster(play.roster.adverts[:3]))


def tampered(play: Any, change: Callable[[list[Sealed]], list[Sealed]]) -> LinkDelivery:
    delivery: LinkDelivery = play.deliveries[0]
    return dataclasses.replace(delivery, sealed=tuple(change(list(delivery.sealed))))


@pytest.mark.parametrize(
    "change",
    [
        lambda items: items[:1],
        lambda items: items[::-1],
        lambda items: [Sealed(1, items[1].data), Sealed(2, items[0].data)],
        lambda items: [Sealed(1, items[0].data[:-1] + bytes([items[0].data[-1] ^ 1])), items[1]],
        lambda items: [Sealed(1, items[0].data[:-1]), items[1]],
        lambda items: [Sealed(1, bytes([items[0].data[0] ^ 1]) + items[0].data[1:]), items[1]],
    ],
)
def test_items_that_were_changed_are_refused_and_the_true_ones_accepted_after(
    suite: Suite, change: Callable[[list[Sealed]], list[Sealed]]
) -> None:
    play = blocks.BlockWorld(blocks.block_parameters(3)).link()
    with pytest.raises((ProtocolError, VerificationError)):
        block.join(play.linked[0], tampered(play, change))
    assert block.join(play.linked[0], play.deliveries[0])[0].roster == play.deliveries[0].roster


def test_an_item_of_another_block_is_refused(suite: Suite) -> None:
    play, second = (blocks.BlockWorld(blocks.block_parameters(3), seed).link() for seed in (b"block", b"second"))
    with pytest.raises(ProtocolError, match="list of keys"):
        block.join(play.linked[0], second.deliveries[0])
    foreign = dataclasses.replace(second.deliveries[0], roster=play.deliveries[0].roster)
    with pytest.raises(VerificationError):
        block.join(play.linked[0], foreign)


# ---- what the coordinator refuses


def test_the_coordinator_names_a_site_that_breaks_the_protocol(suite: Suite) -> None:
    play = begun(3)
    key = world.identity(0).key

    def signed(message: Any) -> Any:
        return dataclasses.replace(
            message, signature=key.sign(transcript.signed_bytes(message, play.coordinator._binding))
        )

    good = play.mask(0, 1)
    for changes, words in (
        ({"sharers": bytes(32)}, "another round or model"),
        ({"tags": (messages.Tag(1, bytes(16)),)}, "tags or secrets"),
        ({"words": good.words[:-1]}, "must send a masked vector of"),
    ):
        with pytest.raises(ProtocolError, match=f"site-0000.*{words}"):
            play.coordinator.admit(signed(dataclasses.replace(good, **changes)))
    with pytest.raises(VerificationError, match="signature"):
        play.coordinator.admit(dataclasses.replace(good, signature=bytes(64)))
    play.coordinator.admit(good)
    play.coordinator.admit(good)  # again: changes nothing
    for i in (1, 2):
        play.coordinator.admit(play.mask(i, 1))
    assert equal(play.coordinator.total(), play, 1)


def test_a_vector_of_an_earlier_round_does_not_enter_a_later_one(suite: Suite) -> None:
    play = begun(3)
    late = play.mask(0, 1)
    play.coordinator.begin(2, blocks.inputs_of(2))
    with pytest.raises(ProtocolError, match="another round or model"):
        play.coordinator.admit(late)


def test_no_round_begins_before_every_site_has_joined(suite: Suite) -> None:
    play = blocks.BlockWorld(blocks.block_parameters(3)).link()
    for i in (0, 1):
        _, joined = block.join(play.linked[i], play.deliveries[i])
        play.coordinator.admit(world.over_the_wire(joined))
        forged = dataclasses.replace(joined, site=2)
        with pytest.raises(VerificationError, match="Joined message of site-0002"):
            play.coordinator.admit(forged)
    with pytest.raises(TooFewSitesError, match="2 sites opened the items of all others"):
        play.coordinator.begin(1, world.INPUTS)


def test_a_coordinator_begins_only_rounds_that_the_block_holds() -> None:
    play = begun(3, rounds=3)
    assert not play.coordinator.holds(1)
    assert play.coordinator.holds(3)
    assert not BlockAggregator(play.parameters).holds(2)
    for number in (1, 4):
        with pytest.raises(ProtocolError):
            play.coordinator.begin(number, world.INPUTS)


# ---- what a coordinator can compute


def test_a_site_that_was_given_another_model_is_in_no_sum(suite: Suite) -> None:
    """Model inconsistency (Pasquini et al. 2022): the update of one site must not come out."""
    play = begun(4)
    total = np.zeros(play.parameters.sent_words, WORD)
    for i in range(4):
        words = play.mask(i, 1, b"\x01" * 32 if i == 2 else None).words
        np.add(total, words, out=total)
    # No signed sum of the four vectors is free of masks: `rank` shows it for the keys, this for the numbers.
    low = masks.LOW if play.parameters.packed else np.uint64(2**64 - 1)
    assert not np.array_equal(total & low, play.expected(1)[: total.size] & low)


class Captured:
    """The keys that each site adds and subtracts, in place of masks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: list[tuple[list[bytes], list[bytes]]] = []
        monkeypatch.setattr(
            masks, "apply", lambda words, plus, minus, **more: self.keys.append((list(plus), list(minus)))
        )


def combinations_free_of_masks(rows: list[tuple[list[bytes], list[bytes]]], known: set[bytes]) -> np.ndarray:
    """Return a basis of the combinations of vectors in which no unknown mask is left: shape (basis, sites)."""
    unknown = sorted({key for plus, minus in rows for key in (*plus, *minus)} - known)
    place = {key: column for column, key in enumerate(unknown)}
    matrix = np.zeros((len(rows), len(unknown)))
    for row, (plus, minus) in enumerate(rows):
        for keys, sign in ((plus, 1), (minus, -1)):
            for key in keys:
                if key in place:
                    matrix[row, place[key]] += sign
    u, s, _ = np.linalg.svd(matrix)
    rank = int((s > 1e-9).sum())
    return u[:, rank:].T


def opened_anyway(linked: block.Linked) -> block.Block:
    """What a site in the suite x25519 would have that checks no item."""
    pairs: dict[int, bytes] = linked.links._pairs  # type: ignore[attr-defined]
    return block.Block(linked.context, dict(pairs))


@pytest.mark.parametrize(("sites", "corrupt"), [(3, 0), (3, 1), (4, 1), (4, 2), (5, 2)])
def test_only_the_sum_of_all_honest_vectors_is_free_of_masks(
    monkeypatch: pytest.MonkeyPatch, sites: int, corrupt: int
) -> None:
    """By enumeration: the coordinator gives each honest site one of two rosters and one of two models.

    A roster can differ only in the keys of corrupt sites, as an honest site signs one advert. Masks between an honest
    and a corrupt site are known. Of the honest vectors, at most their whole sum can be computed, and only if all were
    given the same.
    """
    monkeypatch.setattr(world, "SUITE", Suite.X25519)  # keys follow from the roster alone, so sites can be mixed
    honest = list(range(corrupt, sites))
    parameters = blocks.block_parameters(sites, corrupt=corrupt, min_survivors=sites)
    for rosters in itertools.product([0, 1] if corrupt else [0], repeat=len(honest)):
        play = blocks.BlockWorld(parameters)
        lists = [play.roster, play.roster]
        if corrupt:
            _, other = site.advertise(
                world.identity(0), parameters, world.INPUTS, world.pins(sites), world.LOW, world.Drbg(b"second")
            )
            lists[1] = Roster((other, *play.roster.adverts[1:]))
        linked = {i: block.link(play.advertised[i], lists[which])[0] for i, which in zip(honest, rosters, strict=True)}
        for models in itertools.product([0, 1], repeat=len(honest)):
            captured = Captured(monkeypatch)
            for i, model in zip(honest, models, strict=True):
                # Between two rosters no item opens, and a site would stop. Here it goes on, with the keys that it has.
                joined = opened_anyway(linked[i])
                joined.mask(1, bytes([model]) * 32, play.words(i, 1), world.Journal())
            # Corrupt sites have the lowest numbers, so a site subtracts the masks that it shares with them first.
            known = {key for _, minus in captured.keys for key in minus[:corrupt]}
            free = combinations_free_of_masks(captured.keys, known)
            if len({*rosters}) == len({*models}) == 1:
                assert len(free) == 1
                assert np.allclose(free[0], free[0][0])
            else:
                assert len(free) == 0


def copied(state: block.Block) -> block.Block:
    """What a fork or a copy of the process's memory has; the product lets nobody make one."""
    other = block.Block(state._context, dict(state._links))
    other._next = state._next
    return other


class Coordinator:
    """A coordinator that plays at random: new blocks, two rosters, two models, forked sites, rounds in any order.

    Site 0 is corrupt. Every honest site has one durable record, whatever is done to its memory.
    """

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch, record: Callable[[], Any]) -> None:
        self.dice, self.n = random.Random(seed), 4
        self.captured = Captured(monkeypatch)
        self.honest = range(1, self.n)
        self.records = {i: record() for i in self.honest}
        self.live: dict[int, list[block.Block]] = {i: [] for i in self.honest}
        self.rows: list[tuple[int, int, tuple[bytes, bytes]]] = []  # site, round, what its masks are bound to
        self.refused: set[type] = set()

    def set_up(self) -> None:
        first, inputs = self.dice.randint(1, 3), bytes([self.dice.randint(0, 1)]) * 32
        parameters = dataclasses.replace(blocks.block_parameters(self.n, rounds=3), round=first, inputs=inputs)

        def advertise(i: int) -> Any:
            draws = world.Drbg(self.dice.randbytes(8))
            return site.advertise(world.identity(i), parameters, inputs, world.pins(self.n), world.LOW, draws)

        sent = {i: advertise(i) for i in range(self.n)}
        rosters = [Roster((corrupt[1], *(sent[i][1] for i in self.honest))) for corrupt in (sent[0], advertise(0))]
        mixed = self.dice.random() < 0.3
        for i in self.honest:
            linked, _ = block.link(sent[i][0], self.dice.choice(rosters) if mixed else rosters[0])
            # A true site of mixed rosters opens no item and stops. Here it goes on with the keys that it has.
            joined = opened_anyway(linked)
            self.live[i] = [joined] if self.dice.random() < 0.8 else [*self.live[i], joined]

    def fork(self) -> None:
        i = self.dice.choice(self.honest)
        self.live[i] += [copied(state) for state in self.live[i][-1:]]

    def ask(self, i: int, number: int, inputs: bytes) -> None:
        state = self.dice.choice(self.live[i])
        try:
            state.mask(number, inputs, np.zeros(self.words(state), WORD), self.records[i])
        except (ProtocolError, StateError) as error:
            self.refused.add(type(error))
        else:
            self.rows.append((i, number, (state.roster, inputs)))

    def words(self, state: block.Block) -> int:
        return int(state._context.parameters.layout.words)

    def play(self, moves: int) -> Coordinator:
        self.set_up()
        for _ in range(moves):
            move, number, inputs = self.dice.random(), self.dice.randint(1, 5), bytes([self.dice.randint(0, 1)]) * 32
            if move < 0.1:
                self.set_up()
            elif move < 0.2:
                self.fork()
            elif move < 0.4:
                for i in self.honest:
                    self.ask(i, number, inputs)
            else:
                self.ask(self.dice.choice(self.honest), number, inputs)
        return self

    def sums(self) -> list[int]:
        """The rounds of which a sum is free of masks. Fails if anything else is."""
        keys = self.captured.keys
        known = {minus[0] for _, minus in keys}  # of the pair with site 0, the lowest
        found = []
        for number in sorted({row[1] for row in self.rows}):
            places = [place for place, row in enumerate(self.rows) if row[1] == number]
            free = combinations_free_of_masks([keys[place] for place in places], known)
            if len(free):
                chosen = [self.rows[place] for place in places]
                assert len(free) == 1, "a site's vector can be told from the others'"
                assert [*self.honest] == sorted(row[0] for row in chosen)
                assert np.allclose(free[0], free[0][0])
                assert len({row[2] for row in chosen}) == 1, "a sum over different models"
                found.append(number)
        assert len(combinations_free_of_masks(keys, known)) == len(found), "rounds can be combined"
        return found


def test_whatever_a_coordinator_asks_a_round_has_one_sum_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "SUITE", Suite.X25519)
    plays = [Coordinator(seed, monkeypatch, world.Journal).play(25) for seed in range(25)]
    assert sum(len(each.sums()) for each in plays) > 10
    assert {kind for each in plays for kind in each.refused} == {ProtocolError, StateError}


@pytest.mark.parametrize("broken", ["no record", "no inputs"])
def test_the_random_coordinator_breaks_a_build_that_lacks_a_check(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    monkeypatch.setattr(world, "SUITE", Suite.X25519)
    record: Callable[[], Any] = world.Journal
    if broken == "no record":
        record = lambda: lambda entry: None  # noqa: E731
    else:
        monkeypatch.setattr(block, "step_digest", lambda th, t, inputs: transcript.step_digest(th, t, bytes(32)))
    plays = [Coordinator(seed, monkeypatch, record).play(25) for seed in range(25)]
    with pytest.raises(AssertionError):
        [each.sums() for each in plays]


@pytest.mark.parametrize("put_back", [1, 2])
def test_a_record_that_is_put_back_at_one_site_opens_no_second_sum(
    monkeypatch: pytest.MonkeyPatch, put_back: int
) -> None:
    """Of the honest sites, one with its record is enough: it masks no second vector of the round."""
    monkeypatch.setattr(world, "SUITE", Suite.X25519)
    captured = Captured(monkeypatch)
    first, second = begun(3), begun(3, seed=b"second")
    for i in (1, 2):
        first.mask(i, 1)
        second.journals[i] = world.Journal() if i == put_back else first.journals[i]
    second.mask(put_back, 1)
    with pytest.raises(StateError, match="on record"):
        second.mask(3 - put_back, 1)
    known = {minus[0] for _, minus in captured.keys}
    (free,) = combinations_free_of_masks(captured.keys, known)
    assert np.allclose(free, [free[0], free[0], 0])


def test_a_memory_that_was_copied_with_its_record_masks_twice_under_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """What section 14 does not claim: a snapshot of memory and record, put back, shows two vectors' difference."""
    play = begun(3)
    other, before = copied(play.blocks[0]), list(play.journals[0].entries)
    sent = play.mask(0, 1)
    play.journals[0].entries = before
    words = np.zeros_like(play.words(0, 1))
    again = other.mask(1, blocks.inputs_of(1), words, play.journals[0])
    low = masks.LOW if play.parameters.packed else np.uint64(2**64 - 1)
    kept = sent.words.size
    difference = (sent.words - again.words) & low
    assert np.array_equal(difference, (play.words(0, 1) & low)[:kept] & low)


def test_of_threads_that_ask_for_one_round_one_is_answered() -> None:
    play = begun(3)
    barrier, answers, errors = threading.Barrier(8), [], []

    def ask() -> None:
        barrier.wait()
        try:
            answers.append(play.mask(0, 1))
        except ProtocolError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(answers), len(errors), len(play.journals[0].entries)) == (1, 7, 1)


def test_a_site_that_was_asked_into_no_round_for_long_comes_back_once() -> None:
    play = begun(3, rounds=3000)
    assert equal(play.play(2999), play, 2999)
    for number in (2, 2998, 2999, 3001):
        with pytest.raises(ProtocolError):
            play.mask(1, number)


def resigned(play: Any, index: int, **changes: Any) -> Roster:
    """The roster with one advert that its own site changed and signed."""
    advert = dataclasses.replace(play.adverts[index], **changes)
    binding = play.advertised[index].context.binding
    signature = world.identity(index).key.sign(transcript.signed_bytes(advert, binding))
    adverts = list(play.roster.adverts)
    adverts[index] = dataclasses.replace(advert, signature=signature)
    return Roster(tuple(adverts))


def test_unusable_repeated_and_replayed_keys_are_refused(suite: Suite) -> None:
    play = blocks.BlockWorld(blocks.block_parameters(3))
    field = "kem_key" if suite.hybrid else "mask_key"
    bad = {
        "low order": resigned(play, 1, **{field: b"\xff" * 1184 if suite.hybrid else bytes(32)}),
        "another site's": resigned(play, 1, **{field: getattr(play.adverts[2], field)}),
        "not signed": Roster((play.adverts[0], dataclasses.replace(play.adverts[1], nonce=bytes(16)), play.adverts[2])),
        "of a later round": resigned(play, 1, parameters=bytes(32)),
    }
    for roster in bad.values():
        with pytest.raises((ProtocolError, VerificationError)):
            block.link(play.advertised[0], roster)
    block.link(play.advertised[0], play.roster)


def test_what_a_site_holds_after_a_round_does_not_open_it(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    play = begun(3, rounds=6)
    captured = Captured(monkeypatch)
    play.mask(0, 1)
    play.mask(0, 3)
    seized = dict(play.blocks[0]._links)
    of = {t: transcript.step_digest(play.blocks[0].roster, t, blocks.inputs_of(t)) for t in range(1, 7)}
    found = {masks.pair_mask_key(key, of[t], 0, other) for t in of for other, key in seized.items()}
    for number in range(4, 7):
        for other, key in seized.items():
            found.add(masks.pair_mask_key(key, of[number], 0, other))
            seized[other] = masks.next_link(key, play.blocks[0].roster, number, 0, other)
    earlier = {key for plus, minus in captured.keys for key in (*plus, *minus)}
    assert len(earlier) == 4
    assert not earlier & found


def test_masks_of_rounds_models_and_blocks_are_all_different(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = begun(3), begun(3, seed=b"second")
    captured = Captured(monkeypatch)
    for play, number, inputs in ((first, 1, None), (first, 2, None), (first, 3, world.INPUTS), (second, 1, None)):
        for i in range(3):
            play.mask(i, number, inputs)
    keys = [key for plus, minus in captured.keys for key in (*plus, *minus)]
    # Each key is used by the two sites of its pair, and by nobody else.
    assert sorted(map(keys.count, set(keys))) == [2] * 12


def test_messages_of_a_block_have_one_encoding(suite: Suite) -> None:
    play = begun(3)
    step = play.coordinator.begin(2, blocks.inputs_of(2))
    for message in (play.parameters, play.items[0], play.deliveries[0], play.joined[0], step, play.mask(0, 2)):
        data = encoding.encode(message)
        assert encoding.encode(encoding.decode(type(message), data)) == data
        for cut in (data[:-1], data + b"\0"):
            with pytest.raises(ProtocolError):
                encoding.decode(type(message), cut)
    with pytest.raises(ProtocolError):
        encoding.decode(messages.Parameters, encoding.encode(play.parameters))
