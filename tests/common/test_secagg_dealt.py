"""Blocks that tolerate drop-outs: exact sums over who stayed, and at most one sum of a round, whatever is tried."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from privet.common.errors import ProtocolError, RefusedError, StateError, TooFewSitesError, VerificationError
from privet.common.secagg import block, dealt, encoding, graph, masks, messages, shamir, site, transcript
from privet.common.secagg.coordinator import BrokenPromiseError
from privet.common.secagg.messages import Finish, Proof, Roster, Sealed, Survivors, Tag
from privet.common.secagg.quantize import WORD
from privet.common.secagg.shamir import SHARE_BYTES
from privet.common.secagg.suites import Suite
from tests.common.test_secagg_block import Captured, combinations_free_of_masks

world = importlib.import_module("tests.support.secagg_world")
blocks = importlib.import_module("tests.support.block_world")
dealt_world = importlib.import_module("tests.support.dealt_world")
HYBRID = [suite for suite in Suite if suite.hybrid]


@pytest.fixture(params=HYBRID, ids=lambda suite: suite.value)
def suite(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """In every suite that such blocks have."""
    monkeypatch.setattr(world, "SUITE", request.param)
    chosen: Suite = request.param
    return chosen


def begun(sites: int = 5, rounds: int = 3, seed: bytes = b"dealt", **changes: Any) -> Any:
    """A block that has been set up: of five sites, one may collude, and one may drop out."""
    return dealt_world.DealtWorld(
        dealt_world.dealt_parameters(sites, rounds, **{"dropouts": 1, **changes}), seed
    ).join()


# ---- Sums


@pytest.mark.parametrize("bits", [16, 14])
def test_every_round_has_the_exact_sum_over_the_sites_that_stayed(suite: Suite, bits: int) -> None:
    play = begun(6, rounds=6, corrupt=0, dropouts=2, bits=bits, size=200)
    found = []
    for number, drops in ((1, {}), (2, {"mask": {4}}), (4, {}), (6, {"mask": {0}, "confirm": ()})):
        total = play.play(number, drops)
        assert play.equal(total)
        found.append(total.survivors)
    # Who missed a round is not expected again.
    assert found == [(0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 5), (0, 1, 2, 3, 5), (1, 2, 3, 5)]
    steps = [[(entry.round, entry.step) for entry in play.journals[i].entries] for i in (1, 4)]
    finished, confirmed = ["mask", "choice"], ["mask", "choice", "reveal"]
    assert steps[0] == [
        (number, step)
        for number, each in ((1, finished), (2, confirmed), (4, finished), (6, confirmed))
        for step in each
    ]
    assert steps[1] == [(1, "mask"), (1, "choice")]


def test_some_layout_is_packed_and_some_is_not() -> None:
    assert {begun(4, bits=bits, size=200).parameters.packed for bits in (16, 14)} == {True, False}


@pytest.mark.parametrize("stage", ["advertise", "deal", "join", "mask", "confirm", "reveal"])
def test_a_site_may_drop_out_at_every_stage(stage: str) -> None:
    parameters = dealt_world.dealt_parameters(6, corrupt=0, dropouts=2)
    play = dealt_world.DealtWorld(parameters, missing={3} if stage == "advertise" else ())
    play.deal({3} if stage == "deal" else ()).join({3} if stage == "join" else ())
    # Someone has to be missing, or nobody confirms.
    drops = {stage: {3}, **({"mask": {5}} if stage == "confirm" else {})}
    total = play.play(1, drops)
    out = {"confirm": {5}, "reveal": set()}.get(stage, {3})
    assert set(total.survivors) == set(range(6)) - out
    assert play.equal(total)
    total = play.play(2)
    assert set(total.survivors) == set(range(6)) - out - {3}
    assert play.equal(total)


def test_a_round_with_too_few_vectors_confirmations_or_shares_has_no_sum() -> None:
    for drops, words in (
        ({"mask": {0, 1}}, "3 sites sent a masked vector, the round needs at least 4"),
        ({"mask": {0}, "confirm": {1}}, "3 sites confirmed the survivors"),
        ({"reveal": {0, 1}}, "3 sites revealed a share"),
    ):
        play = begun()
        with pytest.raises(TooFewSitesError, match=words):
            play.play(1, drops)
        assert not play.coordinator.holds(2)


def test_transcripts_of_rounds_and_lists_differ() -> None:
    play = begun(6, corrupt=0, dropouts=2)
    found = [play.play(number, drops).transcript for number, drops in ((1, {}), (2, {"mask": {4}}), (3, {}))]
    assert len(set(found)) == 3


def test_a_site_that_was_asked_into_no_round_for_long_comes_back_once() -> None:
    play = begun(4, rounds=60, corrupt=0, size=1)
    assert play.equal(play.play(59))
    for number in (2, 58, 59, 61):
        with pytest.raises(ProtocolError, match="has keys for rounds 60 to 60"):
            play.mask(1, number)


# ---- The argument, by enumeration


def known_secrets(
    n: int, corrupt: int, threshold: int, lists: list[tuple[frozenset[int], frozenset[int]]]
) -> tuple[set[int], set[int]]:
    """Honest sites whose b, and whose s, come out. `lists` are (honest sites that reveal, for which list)."""

    def shares(owner: int, of_self: bool) -> int:
        honest = {site for sites, listed in lists for site in sites if (owner in listed) == of_self}
        return len(honest) + corrupt

    honest = range(corrupt, n)
    return (
        {owner for owner in honest if shares(owner, True) >= threshold},
        {owner for owner in honest if shares(owner, False) >= threshold},
    )


def one_sum(
    n: int,
    corrupt: int,
    expected: frozenset[int],
    survivors: list[frozenset[int]],
    choices: tuple[int, ...],
    quorum: int,
    threshold: int,
) -> bool:
    """Whether what comes out is of one list. `choices`, of each honest site: 0 nothing, 1 reveal for F, 2 or 3 confirm.

    Corrupt sites have the lowest numbers and confirm everything.
    """
    honest = range(corrupt, n)
    chosen = {site: choice for site, choice in zip(honest, choices, strict=True) if site in expected}
    lists = [(frozenset(site for site in chosen if chosen[site] == 1), expected)]
    for number, listed in enumerate(survivors, start=2):
        confirmed = frozenset(site for site in chosen if chosen[site] == number and site in listed)
        if len(confirmed) + len(listed & set(range(corrupt))) >= quorum:
            lists.append((confirmed, listed))
    b, s = known_secrets(n, corrupt, threshold, lists)
    return any(b <= listed and not s & listed for listed in (expected, *survivors))


def subsets(sites: Iterable[int], least: int) -> list[frozenset[int]]:
    pool = tuple(sites)
    return [frozenset(c) for size in range(least, len(pool) + 1) for c in itertools.combinations(pool, size)]


def settings(n: int, corrupt: int, two: bool) -> Iterable[tuple[frozenset[int], list[frozenset[int]], tuple[int, ...]]]:
    q = graph.quorum(n, corrupt)
    for expected in subsets(range(n), q):
        if sorted(expected)[:1] != [0] and corrupt == 0:
            continue  # sites of one kind are alike
        found = subsets(expected, q)
        for first in found:
            for second in found if two else [first]:
                yield from (
                    (expected, [first, second] if two else [first], choices)
                    for choices in itertools.product(range(4 if two else 3), repeat=n - corrupt)
                )


@pytest.mark.parametrize(
    ("n", "corrupt", "two"), [(3, 0, True), (4, 0, True), (4, 1, True), (5, 1, True), (5, 0, False)]
)
def test_whatever_lists_are_given_and_chosen_one_sum_comes_out(n: int, corrupt: int, two: bool) -> None:
    q = graph.quorum(n, corrupt)
    for expected, survivors, choices in settings(n, corrupt, two):
        assert one_sum(n, corrupt, expected, survivors, choices, q, q), (expected, survivors, choices)


def sampled(dice: random.Random, lower: int) -> bool:
    n = dice.choice([6, 7])
    corrupt = dice.randint(0, n - 3)
    q = graph.quorum(n, corrupt)
    expected = dice.choice(subsets(range(n), q))
    survivors = [dice.choice(subsets(expected, q)) for _ in range(2)]
    # Two lists against each other, as a coordinator gives groups of sites one list each.
    kinds = dice.choice([(1, 2), (2, 3)])
    able = [[kind for kind in kinds if kind == 1 or i in survivors[kind - 2]] for i in range(corrupt, n)]
    choices = tuple(dice.choice(each or [0]) for each in able)
    return one_sum(n, corrupt, expected, survivors, choices, q, q - lower)


def test_samples_of_six_and_seven_sites_agree_and_find_a_threshold_that_is_too_low() -> None:
    dice = random.Random(7)
    assert all(sampled(dice, 0) for _ in range(4000))
    assert not all(sampled(dice, 1) for _ in range(4000))


def test_thresholds_without_one_list_would_open_a_sum_with_too_little_noise() -> None:
    """The example of section 15: n = 9, c = 1, q = 6. Its lists cannot both get a quorum, nor one of them with F."""
    q, four = graph.quorum(9, 1), [1, 2, 3, 4]
    everyone = frozenset(range(9))
    lists = [
        (frozenset({site}), everyone - (set(four) - {site} if site in four else set(four[:3]))) for site in range(1, 5)
    ]
    # Each of the other four sites leaves out another three of the four.
    lists += [(frozenset({5 + k}), everyone - set(three)) for k, three in enumerate(itertools.combinations(four, 3))]
    b, s = known_secrets(9, 1, q, lists)
    assert s == set(four)
    assert b == {5, 6, 7, 8}
    # In the protocol each list needs six confirmations, and each honest site gives one.
    assert all(len(sites) + 1 < q for sites, _ in lists)


# ---- What a coordinator can compute


def copied(state: dealt.DealtBlock) -> dealt.DealtBlock:
    """What a fork or a copy of the process's memory has; the product lets nobody make one."""
    other = dealt.DealtBlock(state._context, state._members, state._channels, dict(state._slots))
    other._next, other._end = state._next, state._end
    if state._masked is not None:
        other._masked = dataclasses.replace(state._masked, once=site.Once())
    if state._confirmed is not None:
        other._confirmed = dataclasses.replace(state._confirmed, once=site.Once())
    return other


@dataclasses.dataclass
class Vector:
    """A masked vector that the coordinator holds: whose, of which round, the names of its masks' keys."""

    site: int
    number: int
    step: bytes
    slot: bytes
    self_key: bytes
    pairs: dict[int, bytes]
    keys: tuple[list[bytes], list[bytes]]


class Adversary:
    """A coordinator that plays at random, with the sites below `corrupt` on its side.

    It sets up blocks with different members for different sites, opens rounds with any lists and models, in any order,
    copies sites' memories, keeps all tags and confirmations and sends them where they fit, and has the corrupt sites
    tag and confirm what it likes. Every honest site has one durable record.
    """

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch, record: Callable[[], Any]) -> None:
        self.dice, self.n, self.corrupt = random.Random(seed), *random.Random(seed).choice([(4, 1), (5, 0), (5, 1)])
        self.monkeypatch, self.captured = monkeypatch, Captured(monkeypatch)
        self.honest = range(self.corrupt, self.n)
        self.records = {i: record() for i in self.honest}
        self.live: dict[int, list[dealt.DealtBlock]] = {i: [] for i in self.honest}
        self.evil: dict[bytes, dealt.DealtBlock] = {}
        self.tags: dict[tuple[bytes, int, int], bytes] = {}  # what, from, to
        self.vectors: list[Vector] = []
        self.lists: dict[bytes, tuple[int, ...]] = {}  # F by its digest
        # Holders of shares that are known: of b or s, by slot and owner.
        self.shares: dict[tuple[bool, bytes, int], set[int]] = {}
        self.slots: dict[bytes, dict[int, tuple[bytes, dict[int, bytes]]]] = {}  # by slot: self seed, pairs, by owner
        self.refused: set[str] = set()
        self.sums: list[tuple[int, tuple[int, ...]]] = []

    def attempt(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (ProtocolError, StateError, VerificationError, TooFewSitesError) as error:
            self.refused.add(type(error).__name__)
            return None

    def set_up(self) -> None:
        dice, first = self.dice, self.dice.randint(1, 2)
        lost = self.n - graph.quorum(self.n, self.corrupt)
        parameters = dataclasses.replace(
            dealt_world.dealt_parameters(self.n, rounds=2, corrupt=self.corrupt, dropouts=lost, size=1), round=first
        )
        sent = {}
        for i in range(self.n):
            draws = world.Drbg(dice.randbytes(8))
            sent[i] = site.advertise(world.identity(i), parameters, world.INPUTS, world.pins(self.n), world.LOW, draws)
        roster = Roster(tuple(advert for _, advert in sent.values()))
        states, deals = {}, {}
        for i in range(self.n):
            states[i], deals[i] = dealt.deal(sent[i][0], roster)
        least, mixed = max(parameters.min_survivors, parameters.threshold), dice.random() < 0.3
        common = sorted(dice.sample(range(self.n), dice.randint(least, self.n)))
        for i in range(self.n):
            members = sorted(dice.sample(range(self.n), dice.randint(least, self.n))) if mixed else common
            if i not in members:
                continue
            items = tuple(
                Sealed(j, next(item.data for item in deals[j].sealed if item.site == i)) for j in members if j != i
            )
            delivery = messages.DealDelivery(
                transcript.roster_digest(transcript.parameters_digest(parameters), roster), i, items, parameters.suite
            )
            joined, _ = dealt.join(states[i], delivery)
            self.look(joined, i)
            if i in self.honest:
                self.live[i].append(joined)
                self.live[i] = self.live[i][-2:]
            else:
                self.evil[joined.roster] = joined

    def look(self, joined: dealt.DealtBlock, owner: int) -> None:
        """Note the secrets of a site, to name masks by, and what a corrupt site gives the coordinator of them."""
        for number, slot in joined._slots.items():
            name = b"%d" % number + joined.roster
            self.slots.setdefault(name, {})[owner] = (slot.self_seed, dict(slot.pairs))
            if owner < self.corrupt:
                for other in joined._members:
                    self.shares.setdefault((True, name, other), set()).add(owner)
                    self.shares.setdefault((False, name, other), set()).add(owner)

    def fork(self) -> None:
        i = self.dice.choice(self.honest)
        self.live[i] += [copied(state) for state in self.live[i][-1:]]

    def list_of(self, state: dealt.DealtBlock) -> tuple[int, ...]:
        least = state._context.parameters.threshold
        members = state._members
        return tuple(sorted(self.dice.sample(members, self.dice.randint(min(least, len(members)), len(members)))))

    def own_list(self, i: int) -> tuple[int, ...]:
        """A short list with a site and the lowest two: if sites reveal for such lists, the sum of the two comes out."""
        listed = {0, 1, i}
        rest = [j for j in range(self.n) if j not in listed]
        while len(listed) < graph.quorum(self.n, self.corrupt):
            listed.add(rest.pop(self.dice.randrange(len(rest))))
        return tuple(sorted(listed))

    def open(self, i: int, state: dealt.DealtBlock, number: int, expected: tuple[int, ...], inputs: bytes) -> None:
        words = np.zeros(state._context.parameters.layout.words, WORD)
        sent = self.attempt(lambda: state.mask(number, inputs, expected, words, self.records[i]))
        if sent is None:
            return
        plus, minus = self.captured.keys.pop()
        others = [other for other in state._members if other != i]
        higher = [other for other in others if other > i]
        pairs = dict(zip(higher, plus[1:], strict=True)) | dict(
            zip([other for other in others if other < i], minus, strict=True)
        )
        step = transcript.step_digest(state.roster, number, inputs)
        name = b"%d" % number + state.roster
        self.vectors.append(Vector(i, number, step, name, plus[0], pairs, (plus, minus)))
        self.lists[sent.sharers] = expected
        for tag in sent.tags:
            self.tags[sent.sharers, i, tag.site] = tag.data

    def tags_to(self, state: dealt.DealtBlock, sites: Iterable[int], what: bytes) -> tuple[Tag, ...]:
        """All tags on a digest that the coordinator has, or has a corrupt site make, for one site."""
        me, found = state._context.site, []
        for other in sites:
            if other == me:
                continue
            data = self.tags.get((what, other, me))
            if other < self.corrupt and state.roster in self.evil and me in self.evil[state.roster]._channels:
                data = self.evil[state.roster]._channels[me][0].tag(what)
            if data is None:
                # Of another list, if there is any: the site has to notice.
                data = next((d for (_, a, b), d in self.tags.items() if (a, b) == (other, me)), bytes(16))
            found.append(Tag(other, data))
        return tuple(found)

    def end(self, i: int, state: dealt.DealtBlock, survivors: tuple[int, ...]) -> None:
        """Try to finish a round, to confirm survivors, or to prove them."""
        masked, roster = state._masked, state.roster
        move = self.dice.random()
        if masked is not None and move < 0.4:
            tags = self.tags_to(state, masked.sharers, masked.sharers_digest)
            self.reveal(state, masked, self.attempt(lambda: state.finish(Finish(roster, i, tags), self.records[i])))
        elif masked is not None and i in survivors:
            tags = self.tags_to(state, survivors, masked.sharers_digest)
            sent = self.attempt(lambda: state.confirm(Survivors(roster, i, survivors, tags), self.records[i]))
            for tag in sent.tags if sent is not None else ():
                self.tags[sent.lists, i, tag.site] = tag.data
        confirmed = state._confirmed
        if confirmed is not None:
            have = {a for (what, a, b) in self.tags if (what, b) == (confirmed.lists, i)}
            tags = self.tags_to(
                state, sorted(have | {j for j in range(self.corrupt) if j in confirmed.survivors}), confirmed.lists
            )
            proof = Proof(roster, i, tags, ())
            self.reveal(state, confirmed, self.attempt(lambda: state.reveal(proof, self.records[i])))

    def reveal(self, state: dealt.DealtBlock, was: Any, sent: messages.Reveal | None) -> None:
        if sent is None:
            return
        listed = was.sharers if isinstance(was, site.MaskedState) else was.survivors
        name = b"%d" % was.context.binding.round + state.roster
        for share in sent.shares:
            self.shares.setdefault((share.site in listed, name, share.site), set()).add(sent.site)

    def play(self, moves: int) -> Adversary:
        self.set_up()
        for _ in range(moves):
            move, number = self.dice.random(), self.dice.randint(1, 3)
            if move < 0.06:
                self.set_up()
            elif move < 0.14:
                self.fork()
            else:
                ready = [state for i in self.honest for state in self.live[i][-1:]]
                if not ready:
                    continue
                one = self.dice.choice(ready)
                expected, survivors = self.list_of(one), self.list_of(one)
                if move < 0.45:
                    number = one._next if self.dice.random() < 0.7 else number
                    apart = self.dice.random() < 0.2
                    two = self.dice.random() < 0.2
                    for i in self.honest:
                        inputs = bytes([two and self.dice.random() < 0.3]) * 32
                        for state in self.live[i][-2:]:
                            if self.dice.random() < 0.95:
                                self.open(i, state, number, self.own_list(i) if apart else expected, inputs)
                else:
                    sites = [*self.honest] * 2
                    one_list = self.dice.random() < 0.7
                    for i in sites:
                        for state in self.live[i][-2:]:
                            if self.dice.random() < 0.95:
                                self.end(i, state, survivors if one_list else self.list_of(state))
        return self

    def known(self) -> set[bytes]:
        """The keys that the coordinator can compute, from shares and as corrupt sites."""
        found = set()
        for vector in self.vectors:
            threshold = graph.quorum(self.n, self.corrupt)
            if len(self.shares.get((True, vector.slot, vector.site), ())) >= threshold:
                found.add(vector.self_key)
            for other, key in vector.pairs.items():
                # s of one of the two, with the wrap that one of them sent, gives the secret of the pair.
                for owner in (vector.site, other):
                    if len(self.shares.get((False, vector.slot, owner), ())) >= threshold:
                        found.add(key)
                if other < self.corrupt:
                    found.add(key)
        return found

    def check(self) -> Adversary:
        """Find the sums that can be computed. Fail if anything else can."""
        known, least = self.known(), graph.quorum(self.n, self.corrupt)
        free_in_all = 0
        for number in sorted({vector.number for vector in self.vectors}):
            of_round = [vector for vector in self.vectors if vector.number == number]
            free = combinations_free_of_masks([vector.keys for vector in of_round], known)
            free_in_all += len(free)
            assert len(free) <= 1, "two sums of one round"
            for combination in free:
                inside = [v for v, part in zip(of_round, combination, strict=True) if abs(part) > 1e-9]
                parts = [part for part in combination if abs(part) > 1e-9]
                assert np.allclose(parts, parts[0]), "a difference of vectors"
                assert len(inside) >= least - self.corrupt, "too few honest vectors"
                assert len(inside) == len({v.site for v in inside})
                assert len({v.step for v in inside}) == 1, "a sum over different models"
                self.sums.append((number, tuple(v.site for v in inside)))
        if self.vectors:
            everything = combinations_free_of_masks([vector.keys for vector in self.vectors], known)
            assert len(everything) == free_in_all, "rounds can be combined"
        return self


def test_whatever_a_coordinator_asks_a_round_has_one_sum_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    plays = [Adversary(seed, monkeypatch, world.Journal).play(14).check() for seed in range(80)]
    assert sum(len(each.sums) for each in plays) > 15
    assert len({sites for each in plays for _, sites in each.sums}) > 5
    refused = set.union(*(each.refused for each in plays))
    assert refused == {"ProtocolError", "StateError", "VerificationError", "TooFewSitesError"}


@pytest.mark.parametrize("broken", ["no record", "no inputs", "both lists"])
def test_the_random_coordinator_breaks_a_build_that_lacks_a_check(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    record: Callable[[], Any] = world.Journal
    if broken == "no record":
        record = lambda: lambda entry: None  # noqa: E731
    elif broken == "no inputs":
        monkeypatch.setattr(dealt, "step_digest", lambda mh, t, inputs: transcript.step_digest(mh, t, bytes(32)))
    else:
        monkeypatch.setattr(site.Once, "take", lambda self, step: None)
        record = lambda: lambda entry: None  # noqa: E731
        keep = dealt.DealtBlock.finish

        def twice(self: dealt.DealtBlock, message: Finish, record: Any) -> messages.Reveal:
            state = self._masked
            sent = keep(self, message, record)
            self._masked = state
            return sent

        monkeypatch.setattr(dealt.DealtBlock, "finish", twice)
    with pytest.raises(AssertionError):
        [Adversary(seed, monkeypatch, record).play(14).check() for seed in range(200)]


@pytest.mark.parametrize("checked", [True, False])
def test_a_list_for_each_site_opens_no_sum_of_two(monkeypatch: pytest.MonkeyPatch, checked: bool) -> None:
    """Five sites, of which three are enough: each is given a list with the first two and itself.

    If they revealed, b of the first two and s of all others would come out, and so the sum of two vectors.
    """
    play = begun(5, corrupt=0, dropouts=2)
    captured = Captured(monkeypatch)
    lists = [(0, 1, 2), (0, 1, 3), (0, 1, 2), (0, 1, 3), (0, 1, 4)]
    sent = {i: play.mask(i, 1, expected) for i, expected in enumerate(lists)}
    if not checked:
        monkeypatch.setattr(masks.Channel, "check", lambda self, what, tag: None)
    revealed: dict[int, list[int]] = {owner: [] for owner in range(5)}
    for i, expected in enumerate(lists):
        tags = {j: {tag.site: tag.data for tag in sent[j].tags} for j in expected}
        answer = Finish(sent[i].roster, i, tuple(Tag(j, tags[j].get(i, bytes(16))) for j in expected if j != i))
        if checked:
            with pytest.raises(VerificationError, match="did not confirm to site number"):
                play.blocks[i].finish(answer, play.journals[i])
            continue
        for share in play.blocks[i].finish(answer, play.journals[i]).shares:
            revealed[share.site].append(i)
    if checked:
        return
    # s of the last three by three holders each, b of the first two by all: every mask but those of the two is known.
    known = {captured.keys[0][0][0], captured.keys[1][0][0]}
    known |= {key for plus, minus in captured.keys[2:] for key in (*plus[1:], *minus)}
    (free,) = combinations_free_of_masks(captured.keys, known)
    assert np.allclose(free, [free[0], free[0], 0, 0, 0])
    assert all(sum(owner not in lists[holder] for holder in revealed[owner]) >= 3 for owner in (2, 3, 4))


# ---- What a site refuses, and what a coordinator gets from it


def finish_of(play: Any, i: int, **changes: Any) -> Finish:
    """The true `Finish` for a site, changed."""
    sites = play.expected.sites
    found = {j: {tag.site: tag.data for tag in play.masked[j].tags} for j in sites if j in play.masked}
    message = Finish(play.blocks[i].roster, i, tuple(Tag(j, found[j][i]) for j in sites if j != i and j in found))
    return dataclasses.replace(message, **changes)


def survivors_of(play: Any, i: int, survivors: Iterable[int]) -> Survivors:
    """A list of survivors for a site, with their tags."""
    listed = tuple(survivors)
    found = {j: {tag.site: tag.data for tag in play.masked[j].tags} for j in listed}
    return Survivors(play.blocks[i].roster, i, listed, tuple(Tag(j, found[j][i]) for j in listed if j != i))


def masked_all(sites: int = 5, seed: bytes = b"dealt", **changes: Any) -> Any:
    """A block in whose first round all expected sites have sent vectors."""
    return begun(sites, seed=seed, **changes).collect(1)


def test_two_lists_given_to_two_halves_finish_nothing() -> None:
    play = begun(7, dropouts=2)
    play.begin(1)
    lists = {i: range(6) if i < 4 else range(1, 7) for i in range(7)}
    sent = {i: {tag.site: tag.data for tag in play.mask(i, 1, lists[i]).tags} for i in range(7)}
    for i, state in play.blocks.items():
        tags = tuple(Tag(j, sent[j].get(i, bytes(16))) for j in lists[i] if j != i)
        for each, error in ((tags, VerificationError), (tags[:-1], ProtocolError)):
            with pytest.raises(error):
                state.finish(Finish(state.roster, i, each), play.journals[i])
        assert [entry.step for entry in play.journals[i].entries] == ["mask"]


def shares_of(reveals: Iterable[messages.Reveal], owner: int) -> list[tuple[int, bytes]]:
    return [(each.site, share.data) for each in reveals for share in each.shares if share.site == owner]


def test_a_victim_that_finishes_alone_is_not_opened_by_those_that_leave_it_out() -> None:
    """F to the victim, U without it to all others: of b and s of the victim, one stays below the threshold."""
    play = masked_all(6, corrupt=1, dropouts=2)
    q, victim = graph.quorum(6, 1), 5
    alone = play.blocks[victim].finish(finish_of(play, victim), play.journals[victim])
    confirms = {i: play.blocks[i].confirm(survivors_of(play, i, range(5)), play.journals[i]) for i in range(5)}
    reveals = []
    for i in range(5):
        tags = tuple(Tag(j, next(tag.data for tag in confirms[j].tags if tag.site == i)) for j in range(5) if j != i)
        reveals.append(play.blocks[i].reveal(Proof(play.blocks[i].roster, i, tags, ()), play.journals[i]))
    assert len(shares_of(reveals, victim)) >= q  # s of the victim
    assert len(shares_of([alone], victim)) + 1 < q  # b of the victim, with the share of a corrupt site


def test_a_site_chooses_once_between_finishing_and_a_list() -> None:
    play = masked_all()
    play.blocks[0].confirm(survivors_of(play, 0, range(4)), play.journals[0])
    play.blocks[1].finish(finish_of(play, 1), play.journals[1])
    for i in (0, 1):
        state = play.blocks[i]
        tries: list[tuple[Any, Any]] = [(state.finish, finish_of(play, i))]
        tries += [(state.confirm, survivors_of(play, i, listed)) for listed in ((0, 1, 2, 4), range(4))]
        for action, message in tries:
            with pytest.raises(ProtocolError, match="has answered, or has masked no vector"):
                action(message, play.journals[i])
    with pytest.raises(ProtocolError, match="has answered"):
        play.blocks[1].reveal(Proof(play.blocks[1].roster, 1, (), ()), play.journals[1])


@pytest.mark.parametrize(
    ("survivors", "error"),
    [
        ((0, 1, 2), TooFewSitesError),
        ((1, 2, 3, 4), ProtocolError),
        ((0, 1, 2, 3, 5), ProtocolError),
        ((3, 2, 1, 0), ProtocolError),
    ],
)
def test_lists_that_do_not_fit_are_refused_and_a_fitting_one_is_taken_after(
    survivors: tuple[int, ...], error: type[Exception]
) -> None:
    play = masked_all(6, corrupt=0, dropouts=2) if 5 not in survivors else begun(6, corrupt=0, dropouts=2)
    if 5 in survivors:
        play.begin(1)
        play.masked = {i: play.mask(i, 1, range(5)) for i in range(5)} | {5: play.mask(5, 1, range(6))}
    with pytest.raises(error):
        play.blocks[0].confirm(survivors_of(play, 0, survivors), play.journals[0])
    assert play.blocks[0].confirm(survivors_of(play, 0, range(4)), play.journals[0]).site == 0


@pytest.mark.parametrize("attack", ["too few", "twice", "outside", "of the expected sites", "of another round", "own"])
def test_a_proof_that_is_none_is_refused(attack: str) -> None:
    play = begun(6, corrupt=1, dropouts=2)
    before = play.collect(1, {5}).confirm().proofs[0]
    for i, m in play.proofs.items():
        play.coordinator.admit(play.blocks[i].reveal(m, play.journals[i]))
    play.coordinator.total()
    play.collect(2, {4})
    # Only four of the five expected sent a vector, so the next step is a list of survivors.
    play.confirm()
    true = play.proofs[0]
    tags = {
        "too few": true.tags[:-1],
        "twice": (true.tags[0], *true.tags[:-1]),
        "outside": (*true.tags[:-1], Tag(4, true.tags[-1].data)),
        "of the expected sites": tuple(Tag(t.site, finish_of(play, 0).tags[k].data) for k, t in enumerate(true.tags)),
        "of another round": before.tags[: len(true.tags)],
        "own": (Tag(0, bytes(16)), *true.tags[1:]),
    }[attack]
    with pytest.raises((ProtocolError, VerificationError, TooFewSitesError)):
        play.blocks[0].reveal(dataclasses.replace(true, tags=tags), play.journals[0])
    assert play.blocks[0].reveal(true, play.journals[0]).site == 0


@pytest.mark.parametrize("attack", ["too few", "swapped", "of another round", "another site's"])
def test_tags_that_do_not_show_that_all_are_there_finish_no_round(attack: str) -> None:
    play = begun()
    before = finish_of(play.collect(1), 0)
    for i in range(5):
        play.coordinator.admit(play.mask(i, 1)) if i not in play.masked else None
    play.masked = {}
    for i in range(5):
        play.masked[i] = play.mask(i, 2, range(5))
    true = finish_of(play, 0)
    tags = {
        "too few": true.tags[:-1],
        "swapped": (Tag(1, true.tags[1].data), Tag(2, true.tags[0].data), *true.tags[2:]),
        "of another round": before.tags,
        "another site's": finish_of(play, 1).tags,
    }[attack]
    with pytest.raises((ProtocolError, VerificationError)):
        play.blocks[0].finish(dataclasses.replace(true, tags=tags), play.journals[0])
    with pytest.raises(ProtocolError, match="for site number 1"):
        play.blocks[0].finish(dataclasses.replace(true, site=1), play.journals[0])
    with pytest.raises(ProtocolError, match="list of keys"):
        play.blocks[0].finish(dataclasses.replace(true, roster=bytes(32)), play.journals[0])
    assert play.blocks[0].finish(true, play.journals[0]).site == 0


def test_a_site_that_was_given_another_model_ends_the_round_for_all() -> None:
    """Model inconsistency (Pasquini et al. 2022): neither its vector nor another sum comes out."""
    play = begun()
    play.begin(1)
    play.masked = {i: play.mask(i, 1, inputs=bytes(32) if i == 2 else None) for i in range(5)}
    for i in range(5):
        with pytest.raises(VerificationError, match="did not confirm"):
            play.blocks[i].finish(finish_of(play, i), play.journals[i])
    # The others can go on without it.
    for i in (0, 1, 3, 4):
        assert play.blocks[i].confirm(survivors_of(play, i, (0, 1, 3, 4)), play.journals[i]).site == i


def test_a_round_is_masked_once_and_never_an_earlier_one() -> None:
    play = begun(4, rounds=4, corrupt=0)
    play.begin(1)
    play.mask(0, 2)
    for number in (2, 1, 0, 5, 6):
        with pytest.raises(ProtocolError, match=f"round {number}: this site has keys for rounds 3 to 4"):
            play.mask(0, number, inputs=bytes(32))
    # Nothing of an earlier round is answered once a later one is open.
    play.masked = {i: play.mask(i, 1) for i in (1, 2, 3)}
    play.mask(1, 3)
    with pytest.raises(VerificationError):
        play.blocks[1].confirm(survivors_of(play, 1, (1, 2, 3)), play.journals[1])


@pytest.mark.parametrize(
    ("expected", "error"),
    [((0, 1, 2), TooFewSitesError), ((1, 2, 3, 4), ProtocolError), ((0, 2, 1, 3), ProtocolError), ((), ProtocolError)],
)
def test_expected_sites_that_do_not_fit_are_refused_before_training(
    expected: tuple[int, ...], error: type[Exception]
) -> None:
    play = begun()
    with pytest.raises(error):
        play.blocks[0].check(1, expected)
    with pytest.raises(error):
        play.mask(0, 1, expected)
    assert play.journals[0].entries == []
    stranger = dealt_world.DealtWorld(dealt_world.dealt_parameters(5, dropouts=1), missing={4}).join()
    with pytest.raises(ProtocolError, match="only members"):
        stranger.blocks[0].check(1, range(5))


def test_what_is_on_record_is_not_done_again_in_a_second_block_or_by_a_copy() -> None:
    play, second = masked_all(), begun(seed=b"second")
    second.journals = play.journals
    second.begin(1)
    with pytest.raises(StateError, match="mask step"):
        second.mask(0, 1)
    # After that error the round is lost in this block as well.
    second.journals = {0: world.Journal()}
    with pytest.raises(ProtocolError):
        second.mask(0, 1)
    twin = copied(play.blocks[0])
    play.blocks[0].confirm(survivors_of(play, 0, range(4)), play.journals[0])
    with pytest.raises(StateError, match="choice step"):
        twin.finish(finish_of(play, 0), play.journals[0])
    other = copied(play.blocks[1])
    play.blocks[1].finish(finish_of(play, 1), play.journals[1])
    with pytest.raises(StateError, match="choice step"):
        other.confirm(survivors_of(play, 1, range(4)), play.journals[1])


def test_nothing_leaves_before_the_record_is_durable() -> None:
    def fails(entry: site.RecordedStep) -> None:
        raise StateError("the disk is full")

    play = begun()
    play.begin(1)
    words = play.words(0, 1)
    with pytest.raises(StateError, match="disk"):
        play.blocks[0].mask(1, world.INPUTS, range(5), words, fails)
    assert np.array_equal(words, play.words(0, 1))
    play = masked_all()
    for action, message in (
        (play.blocks[0].finish, finish_of(play, 0)),
        (play.blocks[1].confirm, survivors_of(play, 1, range(4))),
    ):
        with pytest.raises(StateError, match="disk"):
            action(message, fails)
    # The round is lost for these sites, and nothing of it is left to answer with.
    for i in (0, 1):
        with pytest.raises(ProtocolError, match="has answered"):
            play.blocks[i].finish(finish_of(play, i), play.journals[i])


def test_a_vector_that_comes_late_stays_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    play = begun()
    captured = Captured(monkeypatch)
    play.play(1, {"mask": {4}})
    late = play.mask(4, 1, range(5))
    with pytest.raises(ProtocolError):
        play.coordinator.admit(late)
    # s of the late site is known, and so all its pair masks; its self mask is not.
    known = {key for plus, minus in captured.keys[-1:] for key in (*plus[1:], *minus)}
    known |= {plus[0] for plus, _ in captured.keys[:4]}
    vectors = [*captured.keys[:4], captured.keys[-1]]
    (free,) = combinations_free_of_masks(vectors, known)
    assert np.allclose(free, [*[free[0]] * 4, 0])
    assert len(shares_of(play.reveals.values(), 4)) >= play.parameters.threshold


def test_what_is_revealed_in_one_round_opens_no_other() -> None:
    play = begun(5, rounds=3)
    play.play(1)
    play.play(2, {"mask": {3}})
    shown = {share.data for each in play.reveals.values() for share in each.shares}
    for state in play.blocks.values():
        for slot in state._slots.values():
            for held in slot.shares.values():
                assert not shown & {held[:SHARE_BYTES], held[SHARE_BYTES:]}
    secrets = [
        value for state in play.dealt.values() for own in state.own.values() for value in (own.self_seed, own.shares)
    ]
    assert secrets == []  # the site's own were handed on, and forgotten


def test_what_a_site_holds_opens_no_item_and_no_round_that_is_over() -> None:
    """The coordinator keeps all items. Whoever seizes the site later finds no key to them."""
    play = begun(5, rounds=3)
    play.play(1)
    state = play.blocks[0]
    assert sorted(state._slots) == [2, 3]
    assert (state._masked, state._confirmed) == (None, None)
    for there, back in state._channels.values():
        for channel in (there, back):
            with pytest.raises(ValueError, match="AESGCM"):
                channel.open(play.deliveries[0].sealed[0].data)
    keys = ("share", "seed", "kem")
    assert not [name for name in vars(state) if name.strip("_") in keys]


def test_secrets_are_neither_copied_nor_stored_nor_printed() -> None:
    play = masked_all()
    slot = next(iter(play.blocks[0]._slots.values()))
    for secret in (play.blocks[0], play.dealt[0], slot, play.blocks[0]._masked):
        attempts: list[Any] = [copy.copy, copy.deepcopy, type(secret).__reduce__]
        for attempt in attempts:
            with pytest.raises(StateError):
                attempt(secret)
        assert repr(secret) == f"<{type(secret).__name__} of one round>"


# ---- Sites that lie, and items that were changed


def item_of(play: Any, sender: int, receiver: int) -> Sealed:
    delivery: messages.DealDelivery = play.deliveries[receiver]
    return next(item for item in delivery.sealed if item.site == sender)


@pytest.mark.parametrize("attack", ["swapped", "changed", "short", "of another block", "commitment", "twice", "own"])
def test_items_that_were_changed_are_refused_and_the_true_ones_accepted_after(suite: Suite, attack: str) -> None:
    parameters = dealt_world.dealt_parameters(4, rounds=2, dropouts=1)
    play, second = (dealt_world.DealtWorld(parameters, seed).deal() for seed in (b"dealt", b"second"))
    items = list(play.deliveries[0].sealed)
    data = items[0].data
    items[0] = {
        "swapped": Sealed(1, items[1].data),
        "changed": Sealed(1, data[:-1] + bytes([data[-1] ^ 1])),
        "short": Sealed(1, data[: -(messages.DEALT_BYTES + messages.DIGEST_BYTES)]),
        "of another block": item_of(second, 1, 0),
        "commitment": Sealed(1, data[:1088] + bytes([data[1088] ^ 1]) + data[1089:]),
        "twice": items[1],
        "own": Sealed(0, data),
    }[attack]
    with pytest.raises((ProtocolError, VerificationError)):
        dealt.join(play.dealt[0], dataclasses.replace(play.deliveries[0], sealed=tuple(items)))
    with pytest.raises(ProtocolError, match="list of keys"):
        dealt.join(play.dealt[0], second.deliveries[0])
    assert dealt.join(play.dealt[0], play.deliveries[0])[1].site == 0
    with pytest.raises(ProtocolError, match="answers once"):
        dealt.join(play.dealt[0], play.deliveries[0])


def test_a_member_list_without_one_site_for_some_makes_no_sum_with_the_others() -> None:
    """R without site 4 to the first two, with it to the others: their digests differ, and nobody finishes."""
    play = dealt_world.DealtWorld(dealt_world.dealt_parameters(5, corrupt=0, dropouts=2)).deal()
    for i in (0, 1):
        items = tuple(item for item in play.deliveries[i].sealed if item.site != 4)
        play.blocks[i], _ = dealt.join(play.dealt[i], dataclasses.replace(play.deliveries[i], sealed=items))
    for i in (2, 3, 4):
        play.blocks[i], _ = dealt.join(play.dealt[i], play.deliveries[i])
    assert play.blocks[0].roster != play.blocks[2].roster
    play.masked = {i: play.mask(i, 1, range(4)) for i in range(4)}
    for i in range(4):
        with pytest.raises(VerificationError):
            play.blocks[i].confirm(survivors_of(play, i, range(4)), play.journals[i])


def lying(monkeypatch: pytest.MonkeyPatch, liar: int, lie: Callable[..., Any], name: str, **changes: Any) -> Any:
    """Set up a block in which one site deals with another function in the place of `shamir.NAME`."""
    play = dealt_world.DealtWorld(dealt_world.dealt_parameters(5, rounds=2, **{"dropouts": 1, **changes}))
    honest = dealt.deal
    for i, state in play.advertised.items():
        with monkeypatch.context() as patched:
            if i == liar:
                patched.setattr(*{"split": (shamir, "split"), "pair": (masks, "pair_secret")}[name], lie)
            play.dealt[i], play.deals[i] = honest(state, play.roster)
        play.coordinator.admit(world.over_the_wire(play.deals[i]))
    play.deliveries = {i: world.over_the_wire(each) for i, each in play.coordinator.deliveries().items()}
    for i, state in play.dealt.items():
        play.blocks[i], play.joined[i] = dealt.join(state, play.deliveries[i])
        play.coordinator.admit(play.joined[i])
    return play


@pytest.mark.parametrize("wrong", [1, 3])
def test_wrong_shares_are_left_out_or_end_the_round(monkeypatch: pytest.MonkeyPatch, wrong: int) -> None:
    split = shamir.split

    def lie(secret: bytes, points: Any, threshold: int, draw: Any) -> list[bytes]:
        return [bytes(SHARE_BYTES)] * wrong + split(secret, points, threshold, draw)[wrong:]

    play = lying(monkeypatch, 4, lie, "split")
    if wrong == 1:
        assert play.equal(play.play(1))
        return
    with pytest.raises(VerificationError, match="the secret of site-0004 cannot be reconstructed"):
        play.play(1)


@pytest.mark.parametrize("liar", [0, 2, 4])
def test_a_drop_out_whose_secrets_do_not_follow_from_its_seed_is_named(
    monkeypatch: pytest.MonkeyPatch, liar: int
) -> None:
    play = lying(monkeypatch, liar, lambda seed, slot, me, other: b"invented" * 4, "pair")
    with pytest.raises(BrokenPromiseError, match=f"site-000{liar}"):
        play.play(1, {"mask": {liar}})


def test_rounds_that_a_dealer_swapped_are_lost_and_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    split, drawn = shamir.split, []

    def lie(secret: bytes, points: Any, threshold: int, draw: Any) -> list[bytes]:
        drawn.append(secret)
        # Of the second round it shares the seeds of the first.
        return split(drawn[len(drawn) - 3] if len(drawn) > 2 else secret, points, threshold, draw)

    play = lying(monkeypatch, 3, lie, "split")
    assert play.equal(play.play(1))
    with pytest.raises(VerificationError, match="the secret of site-0003 cannot be reconstructed"):
        play.play(2)


# ---- What the coordinator refuses


def test_the_coordinator_names_a_site_that_breaks_the_protocol() -> None:
    play = begun()
    play.begin(1)
    key = world.identity(0).key

    def signed(message: Any) -> Any:
        binding = play.coordinator._binding
        return dataclasses.replace(message, signature=key.sign(transcript.signed_bytes(message, binding)))

    good = play.mask(0, 1)
    for changes, words in (
        ({"sharers": bytes(32)}, "another list of sharing sites"),
        ({"tags": good.tags[:-1]}, "one confirmation tag to each of its 4"),
        ({"wraps": good.wraps[:-1]}, "with each of its 4 neighbours"),
        ({"words": good.words[:-1]}, "must send a masked vector of"),
    ):
        with pytest.raises(ProtocolError, match=f"site-0000.*{words}"):
            play.coordinator.admit(signed(dataclasses.replace(good, **changes)))
    with pytest.raises(VerificationError, match="signature"):
        play.coordinator.admit(dataclasses.replace(good, signature=bytes(64)))
    play.coordinator.admit(good)
    play.coordinator.admit(good)  # again: changes nothing
    play.masked[0] = good
    for i in range(1, 5):
        play.masked[i] = play.mask(i, 1)
        play.coordinator.admit(play.masked[i])
    finishes = play.coordinator.finishes()
    good_reveal = play.blocks[0].finish(finishes[0], play.journals[0])
    for changes, words in (
        ({"lists": bytes(32)}, "did not confirm"),
        ({"shares": good_reveal.shares[1:]}, "one share"),
    ):
        with pytest.raises(ProtocolError, match=words):
            play.coordinator.admit(signed(dataclasses.replace(good_reveal, **changes)))


def test_the_coordinator_refuses_deals_of_another_form() -> None:
    play = dealt_world.DealtWorld(dealt_world.dealt_parameters(4, rounds=2, dropouts=1))
    _, good = dealt.deal(play.advertised[0], play.roster)
    short = tuple(Sealed(item.site, item.data[:-1]) for item in good.sealed)
    for changes in ({"sealed": good.sealed[1:]}, {"sealed": short}, {"commitments": good.commitments[1:]}):
        changed = dataclasses.replace(good, **changes)
        binding = play.coordinator._binding
        signature = world.identity(0).key.sign(transcript.signed_bytes(changed, binding))
        with pytest.raises(ProtocolError, match="site-0000 must"):
            play.coordinator.admit(dataclasses.replace(changed, signature=signature))
    play.coordinator.admit(good)


def test_a_coordinator_begins_only_rounds_that_the_block_holds() -> None:
    play = begun(4, rounds=3, corrupt=0)
    play.play(1)
    assert not play.coordinator.holds(1)
    assert play.coordinator.holds(3)
    for number in (1, 4):
        with pytest.raises(ProtocolError):
            play.begin(number)


# ---- Parameters and forms


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"suite": Suite.X25519}, "has no suite x25519"),
        ({"threshold": 5}, "threshold in a block must be at most 4"),
        ({"threshold": 3}, "threshold for 5 sites must be at least 4"),
        ({"min_survivors": 3}, "least number of survivors must be at least 4"),
        ({"degree": 2, "threshold": 3, "corrupt": 0, "min_survivors": 4}, "degree"),
        ({"rounds": 0}, "number of rounds in a block must be at least 1"),
        ({"rounds": 2**16 - 1}, "product of sites and rounds of a block must be at most 262144"),
    ],
)
def test_parameters_that_such_a_block_cannot_have_are_refused(changes: dict[str, Any], words: str) -> None:
    parameters = dealt_world.dealt_parameters(5, **{"rounds": 3, "dropouts": 1, **changes})
    with pytest.raises(RefusedError, match=words):
        site.advertise(world.identity(0), parameters, world.INPUTS, world.pins(5), world.LOW, world.Drbg(b""))


def test_steps_of_rounds_and_of_the_two_kinds_of_block_do_not_mix() -> None:
    play = dealt_world.DealtWorld(dealt_world.dealt_parameters(4, dropouts=1))
    with pytest.raises(ProtocolError, match="shares no secret"):
        site.share(play.advertised[0], play.roster)
    with pytest.raises(ProtocolError, match="is no block"):
        block.link(play.advertised[0], play.roster)
    other = blocks.BlockWorld(blocks.block_parameters(4))
    with pytest.raises(ProtocolError, match="of no block that tolerates"):
        dealt.deal(other.advertised[0], other.roster)


def test_unusable_and_repeated_keys_are_refused() -> None:
    play = dealt_world.DealtWorld(dealt_world.dealt_parameters(4, dropouts=1))
    for changes in ({"kem_key": b"\xff" * 1184}, {"kem_key": play.adverts[2].kem_key}, {"nonce": bytes(16)}):
        adverts = list(play.roster.adverts)
        adverts[1] = dataclasses.replace(adverts[1], **changes)
        if "nonce" not in changes:
            signed = transcript.signed_bytes(adverts[1], play.advertised[1].context.binding)
            adverts[1] = dataclasses.replace(adverts[1], signature=world.identity(1).key.sign(signed))
        with pytest.raises((ProtocolError, VerificationError)):
            dealt.deal(play.advertised[0], Roster(tuple(adverts)))
    dealt.deal(play.advertised[0], play.roster)


def test_messages_of_such_a_block_have_one_encoding(suite: Suite) -> None:
    play = masked_all(4, corrupt=0)
    found = [play.parameters, play.deals[0], play.deliveries[0], play.joined[0], play.expected, finish_of(play, 0)]
    for message in found:
        data = encoding.encode(message)
        assert encoding.encode(encoding.decode(type(message), data)) == data
        for cut in (data[:-1], data + b"\0"):
            with pytest.raises(ProtocolError):
                encoding.decode(type(message), cut)
    classical = dataclasses.replace(play.deals[0], suite=Suite.X25519)
    with pytest.raises(ProtocolError, match="the suite x25519 has no Deal message"):
        encoding.encode(classical)
    with pytest.raises(ProtocolError):
        encoding.decode(messages.Deal, b"PSA\x01\x11" + encoding.encode(play.deals[0])[5:])
    # A list without items has the length 0.
    empty = encoding.encode(dataclasses.replace(play.deliveries[0], sealed=()))
    assert empty.endswith(bytes(8))
    with pytest.raises(ProtocolError, match="items of 1 bytes"):
        encoding.decode(messages.DealDelivery, empty[:-1] + b"\1")
