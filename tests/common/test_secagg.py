"""A round's result is exact, whoever drops out, or nothing is revealed; messages have one encoding."""

from __future__ import annotations

import dataclasses
import importlib
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from privet.common.errors import ProtocolError, RefusedError, TooFewSitesError, VerificationError
from privet.common.secagg import encoding, graph, masks, messages, quantize, site, terms, transcript
from privet.common.secagg.quantize import Segment
from privet.common.secagg.suites import Suite

world = importlib.import_module("tests.support.secagg_world")
STEPS = ("advertise", "share", "mask", "confirm", "reveal")


@st.composite
def rounds(draw: st.DrawFn) -> tuple[Any, dict[str, set[int]]]:
    """Draw parameters that pass the rules, and who drops out where."""
    n = draw(st.integers(2, 4) | st.integers(5, 10))
    corrupt = draw(st.integers(0, max(0, n - 2)) | st.integers(0, min(1, n - 2)))
    degree = draw(st.sampled_from([0, 0, *range(2, n - 1, 2)]))
    least = graph.least_threshold(n, corrupt, degree, graph.SECURITY)
    holders = n if graph.is_complete(n, degree) else degree + 1
    thin = degree > 0 and graph.window_minimum(n, corrupt, degree, graph.SECURITY) > degree // 2
    if thin or least > holders or terms.least_survivors(n, corrupt) > n:
        degree, corrupt = 0, 0
        least, holders = graph.quorum(n, 0), n
    bits = draw(st.integers(14, 24))
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    segments = tuple(Segment(f"s{i}", size, draw(st.sampled_from([0.01, 1.0, 20.0]))) for i, size in enumerate(sizes))
    fewest = terms.least_survivors(n, corrupt)
    threshold = draw(st.just(least) | st.integers(least, holders))
    min_survivors = draw(st.just(fewest) | st.integers(fewest, n))
    parameters = world.parameters(
        n,
        corrupt=corrupt,
        bits=bits,
        degree=degree,
        threshold=threshold,
        min_survivors=min_survivors,
        layout=(*segments, Segment("examples", 1, 3e5, count=True)),
        suite=draw(st.sampled_from(list(Suite))),
    )
    # Mostly as many as the round can lose, sometimes more.
    room = n - max(min_survivors, threshold if degree == 0 else 0, graph.quorum(n, corrupt))
    count = draw(st.sampled_from([room, room, room // 2, min(n, room + 1)]))
    who = draw(st.permutations(range(n)))[:count]
    leaving = dict(zip(who, draw(st.lists(st.sampled_from(STEPS), min_size=n, max_size=n)), strict=False))
    return parameters, {step: {i for i, when in leaving.items() if when == step} for step in STEPS}


@given(drawn=rounds(), seed=st.integers(0, 2**32))
@settings(max_examples=120, deadline=None)
def test_the_sum_is_exact_or_nothing_is_revealed(drawn: tuple[Any, dict[str, set[int]]], seed: int) -> None:
    parameters, missing = drawn
    rng = np.random.default_rng(seed)

    def vector(index: int) -> dict[str, Any]:
        real = {s.name: rng.uniform(-1.1, 1.1, s.size) * s.bound for s in parameters.segments if not s.count}
        return {**real, "examples": np.array([index * 1000])}

    play = world.World(parameters, seed=b"%d" % seed, vector=vector)
    total = None
    try:
        total = play.finish(missing)
    except TooFewSitesError:
        stopped = True
    except (VerificationError, RefusedError) as error:
        # In the sparse graph, a gap on the ring or too small a roster stop the sites.
        stopped = parameters.degree > 0 and ("are split in two" in error.message or "for " in error.message)
    else:
        stopped = False
    event(f"summed: {total is not None}, dropped: {any(missing.values())}, sparse: {parameters.degree > 0}")
    if total is None:
        assert stopped
        assert any(missing.values())
        return
    survivors = set(range(play.n)) - missing["advertise"] - missing["share"] - missing["mask"]
    assert set(total.survivors) == survivors
    expected = np.zeros(play.layout.words, quantize.WORD)
    for i in survivors:
        expected += play.words[i]
    assert np.array_equal(total.words, expected)
    sums = quantize.dequantise(play.layout, total.words, len(survivors))
    assert sums.values["examples"].tolist() == [1000 * sum(survivors)]
    numbers = np.sum([quantize.dequantise(play.layout, play.words[i], 1).numbers for i in survivors], axis=0)
    assert sums.numbers.tolist() == numbers.tolist()


@pytest.mark.parametrize("step", STEPS)
def test_one_site_too_many_stops_the_round(step: str) -> None:
    # n = 5, c = 0: threshold, quorum and least survivors are 3, so two may leave and three may not.
    two, three = {step: {0, 2}}, {step: {0, 2, 3}}
    parameters = world.parameters(5, dropouts=2)
    total = world.World(parameters).finish(two)
    assert len(total.survivors) == (5 if step in ("confirm", "reveal") else 3)
    play = world.World(parameters)
    with pytest.raises(TooFewSitesError):
        play.finish(three)
    if step != "reveal":
        assert not hasattr(play, "reveals")


def test_sites_refuse_to_go_below_the_threshold_whatever_the_coordinator_does() -> None:
    play = world.World(world.parameters(5, dropouts=2))
    play.advertise().share()
    few = messages.Delivery(play.deliveries[0].roster, 0, (0, 1), play.deliveries[0].sealed[:1])
    with pytest.raises(TooFewSitesError, match="2 sites sent shares, the round needs at least 3"):
        site.mask(play.shared[0], few, play.encoded(0), play.journals[0])
    play.mask()
    short = messages.Survivors(play.survivors[0].roster, 0, (0, 1), play.survivors[0].tags[:1])
    with pytest.raises(TooFewSitesError, match="2 sites survived"):
        site.confirm(play.masking[0], short)
    play.confirm()
    proof = messages.Proof(play.proofs[0].roster, 0, play.proofs[0].tags[:1], ())
    with pytest.raises(TooFewSitesError, match="2 sites confirmed the survivors, the round needs at least 3"):
        site.reveal(play.confirmed[0], proof, play.journals[0])
    assert [entry.step for entry in play.journals[0].entries] == ["mask"]
    # What does not verify uses nothing up: the honest messages still go through.
    assert len(play.reveal().coordinator.total().survivors) == 5


def test_the_order_of_sites_does_not_matter() -> None:
    parameters = world.parameters(6, dropouts=2)
    play = world.World(parameters)
    total = play.finish({"mask": {4}})
    again = world.World(parameters)
    again.advertise().share({})
    again.shared = dict(reversed(again.shared.items()))
    again.mask({4})
    assert np.array_equal(again.confirm().reveal().coordinator.total().words, total.words)


def test_a_large_cohort_uses_the_ring_and_stays_exact() -> None:
    parameters = world.parameters(70, corrupt=7, dropouts=7, size=5)
    assert parameters.degree == 30
    play = world.World(parameters)
    total = play.finish({"advertise": {1}, "share": {60}, "mask": {5, 6}, "confirm": {9}, "reveal": {20}})
    assert np.array_equal(total.words, sum(play.words[i] for i in total.survivors))
    assert len(total.survivors) == 66


def test_steps_out_of_order_are_refused() -> None:
    play = world.World(world.parameters(3))
    play.advertise()
    with pytest.raises(ProtocolError, match="needs the state Shared, but the site is in the state Advertised"):
        site.mask(play.advertised[0], MESSAGES[4], play.encoded(0), play.journals[0])
    with pytest.raises(ProtocolError, match="expects Shares messages now, got a message Advertise"):
        play.coordinator.admit(play.adverts[0])
    play.share()
    with pytest.raises(ProtocolError, match="already answered in the share step"):
        site.share(play.advertised[0], play.roster)
    play.mask()
    with pytest.raises(ProtocolError, match="already answered in the mask step"):
        site.mask(play.shared[0], play.deliveries[0], play.encoded(0), play.journals[0])
    play.confirm()
    with pytest.raises(ProtocolError, match="already answered in the confirm step"):
        site.confirm(play.masking[0], play.survivors[0])
    play.reveal()
    with pytest.raises(ProtocolError, match="already answered in the reveal step"):
        site.reveal(play.confirmed[0], play.proofs[0], play.journals[0])


def test_a_coordinator_takes_its_steps_once_and_in_order() -> None:
    play = world.World(world.parameters(3)).advertise()
    with pytest.raises(
        ProtocolError, match="expects Shares messages now; the step to be closed is over or not yet open"
    ):
        play.coordinator.roster()
    with pytest.raises(ProtocolError, match="not yet open"):
        play.coordinator.total()
    play.share().mask().confirm().reveal()
    play.coordinator.total()
    with pytest.raises(ProtocolError, match="the round is over now, got a message Reveal"):
        play.coordinator.admit(play.reveals[0])
    with pytest.raises(ProtocolError, match="the round is over now; the step to be closed is over or not yet open"):
        play.coordinator.total()


def test_workers_do_not_change_masks() -> None:
    size = 3 * masks._BLOCK + 77
    keys = [bytes([i]) * 32 for i in range(5)]
    one = np.arange(size, dtype=quantize.WORD)
    many = one.copy()
    masks.apply(one, keys[:3], keys[3:], workers=1)
    masks.apply(many, keys[:3], keys[3:], workers=3)
    assert np.array_equal(one, many)
    masks.apply(many, keys[3:], keys[:3], workers=2)
    assert np.array_equal(many, np.arange(size, dtype=quantize.WORD))


def all_messages() -> list[Any]:
    play = world.World(world.parameters(9, dropouts=2, degree=4, threshold=3, min_survivors=5))
    play.finish({"mask": {2}})
    first = min(play.confirmed)
    return [
        play.parameters,
        play.adverts[0],
        play.roster,
        play.shares[0],
        play.deliveries[first],
        play.masked[first],
        play.survivors[first],
        play.confirms[first],
        play.proofs[first],
        play.reveals[first],
    ]


MESSAGES = all_messages()


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_has_exactly_one_encoding(message: Any) -> None:
    data = encoding.encode(message)
    kind = type(message)
    again = encoding.decode(kind, data)
    assert encoding.encode(again) == data
    assert repr(again) == repr(message)
    for cut in (*range(min(len(data), 300)), *range(300, len(data), 61)):
        with pytest.raises(ProtocolError):
            encoding.decode(kind, data[:cut])
    with pytest.raises(ProtocolError, match="too many"):
        encoding.decode(kind, data + b"\0")
    for other in MESSAGES:
        if type(other) is not kind:
            with pytest.raises(ProtocolError, match="expected a"):
                encoding.decode(type(other), data)


@given(which=st.integers(0, len(MESSAGES) - 1), data=st.data())
@settings(max_examples=300, deadline=None)
def test_what_decodes_is_what_would_have_been_encoded(which: int, data: st.DataObject) -> None:
    message = MESSAGES[which]
    raw = bytearray(encoding.encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, min(len(raw), 400) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = encoding.decode(type(message), bytes(raw))
    except ProtocolError:
        return
    assert encoding.encode(decoded) == bytes(raw)


def test_sizes_are_limited_before_anything_is_allocated() -> None:
    head = encoding.encode(MESSAGES[5])
    at = head.rindex(struct.pack(">I", MESSAGES[5].words.size), 0, len(head) - 8 * MESSAGES[5].words.size)
    huge = head[:at] + struct.pack(">I", 2**32 - 1)
    with pytest.raises(ProtocolError, match="a masked vector may have"):
        encoding.decode(messages.Masked, huge)
    roster = encoding.encode(MESSAGES[2])[:5] + struct.pack(">I", 2**31)
    with pytest.raises(ProtocolError, match="a list in a message may have"):
        encoding.decode(messages.Roster, roster)
    with pytest.raises(ProtocolError, match="a Roster message may have"):
        encoding.decode(messages.Roster, bytes(messages.MAX_CONTROL_BYTES + 1))


def test_a_quorums_confirmations_are_read_without_tags() -> None:
    # With tags, 64 MiB would become a gigabyte of small objects at the receiver.
    confirm, proof = MESSAGES[7], MESSAGES[8]
    assert confirm.tags
    loaded = messages.Proof(proof.roster, proof.site, (), (confirm,))
    with pytest.raises(ProtocolError, match="at most 0 items"):
        encoding.encode(loaded)
    bare = dataclasses.replace(confirm, tags=())
    body = encoding.encode(confirm)[5:]
    head = encoding.encode(messages.Proof(proof.roster, proof.site, (), (bare,)))[: 5 + 32 + 2 + 4 + 4]
    with pytest.raises(ProtocolError, match="may have at most 0 items"):
        encoding.decode(messages.Proof, head + body)


def test_masked_words_are_not_copied_on_the_way_out_or_in() -> None:
    message = MESSAGES[5]
    head, words = encoding.encode_parts(message)
    assert words.obj is not None
    assert np.shares_memory(np.frombuffer(words, quantize.WORD), message.words)
    data = head + bytes(words)
    assert np.shares_memory(np.frombuffer(data, np.uint8), encoding.decode(messages.Masked, data).words)


def test_a_retry_changes_nothing_and_a_second_message_is_refused() -> None:
    play = world.World(world.parameters(3))
    play.advertise().share()
    play.mask()
    play.confirm()
    again = world.over_the_wire
    other = world.World(world.parameters(3), seed=b"other").advertise()
    fresh = world.coordinator.Aggregator(play.parameters)
    fresh.admit(play.adverts[0])
    fresh.admit(again(play.adverts[0]))
    with pytest.raises(ProtocolError, match="two different Advertise messages"):
        fresh.admit(other.adverts[0])
    play.reveal()
    play.coordinator.admit(again(play.reveals[1]))
    assert np.array_equal(play.coordinator.total().words, sum(play.words.values()))


def test_a_retried_vector_counts_once() -> None:
    play = world.World(world.parameters(3))
    play.advertise().share()
    for i in range(3):
        play.words[i] = play.encoded(i)
        _, out = site.mask(play.shared[i], play.deliveries[i], play.words[i].copy(), play.journals[i])
        play.coordinator.admit(out)
        play.coordinator.admit(world.over_the_wire(out))
        play.masked[i] = out
    assert np.array_equal(play.coordinator._sum, sum(m.words for m in play.masked.values()))


def test_the_coordinator_gets_over_as_many_liars_as_the_round_withstands() -> None:
    # They sit apart, so that no run of neighbouring shares leaves all of them out.
    play = world.World(world.parameters(14, corrupt=3)).advertise().share().mask().confirm()
    assert play.parameters.threshold == 9
    for i, state in play.confirmed.items():
        reveal = site.reveal(state, play.proofs[i], play.journals[i])
        if i in (0, 5, 10):
            shares = tuple(messages.Share(s.site, bytes(32) + b"\x07") for s in reveal.shares)
            reveal = dataclasses.replace(reveal, shares=shares)
            signed = transcript.signed_bytes(reveal, play.coordinator._binding)
            reveal = dataclasses.replace(reveal, signature=world.identity(i).key.sign(signed))
        play.coordinator.admit(reveal)
    total = play.coordinator.total()
    assert np.array_equal(total.words, sum(play.words.values()))


def test_shares_that_come_late_still_end_the_round() -> None:
    play = world.World(world.parameters(9, dropouts=2, degree=4, threshold=3, min_survivors=5))
    play.advertise().share().mask().confirm()
    ring = play.coordinator._graph.ring
    reveals = {i: site.reveal(state, play.proofs[i], play.journals[i]) for i, state in play.confirmed.items()}
    for place in (0, 1, 4, 5, 6):
        play.coordinator.admit(reveals[ring[place]])
    with pytest.raises(TooFewSitesError, match="2 sites revealed a share of one site's secret"):
        play.coordinator.total()
    for place in (2, 3, 7, 8):
        play.coordinator.admit(reveals[ring[place]])
    assert np.array_equal(play.coordinator.total().words, sum(play.words.values()))


def test_the_coordinator_gets_over_a_wrong_share_and_names_a_site_that_cannot_be_opened() -> None:
    parameters = world.parameters(5, dropouts=2)

    def spoil(reveal: messages.Reveal, owner: int) -> messages.Reveal:
        shares = tuple(messages.Share(s.site, bytes(32) + b"\x07") if s.site == owner else s for s in reveal.shares)
        play_binding = play.coordinator._binding
        unsigned = messages.Reveal(reveal.roster, reveal.site, reveal.lists, shares)
        signature = world.identity(reveal.site).key.sign(transcript.signed_bytes(unsigned, play_binding))
        return messages.Reveal(reveal.roster, reveal.site, reveal.lists, shares, signature)

    for liars, works in (({0, 3}, True), ({0, 1, 3}, False)):
        play = world.World(parameters)
        play.advertise().share().mask({4}).confirm()
        for i, state in play.confirmed.items():
            reveal = site.reveal(state, play.proofs[i], play.journals[i])
            play.coordinator.admit(spoil(reveal, 4 if i == 0 else 2) if i in liars else reveal)
        if works:
            total = play.coordinator.total()
            assert np.array_equal(total.words, sum(play.words[i] for i in total.survivors))
        else:
            with pytest.raises(VerificationError, match="cannot be reconstructed"):
                play.coordinator.total()
