"""Attacks by a coordinator and by sites in league with it. Each must fail with an error that names it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib
import itertools
from collections.abc import Collection
from typing import Any
from unittest import mock

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey

from privet.common.errors import (
    ProtocolError,
    RefusedError,
    StateError,
    TooFewSitesError,
    VerificationError,
)
from privet.common.secagg import encoding, graph, masks, messages, quantize, shamir, site, suites, terms, transcript
from privet.common.secagg.messages import Advertise, Confirm, Proof, Roster, Sealed, Survivors, Tag
from privet.common.secagg.quantize import Segment
from privet.common.secagg.suites import Suite

world = importlib.import_module("tests.support.secagg_world")
reference = importlib.import_module("tests.support.secagg_reference")


@pytest.fixture(autouse=True, params=list(Suite), ids=lambda suite: suite.value)
def suite(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """Every attack is tried in every suite."""
    monkeypatch.setattr(world, "SUITE", request.param)
    chosen: Suite = request.param
    return chosen


def floor_of(**changes: Any) -> terms.Floor:
    """The default floor of a site that accepts every suite."""
    return terms.Floor(**{"classical": True, **changes})


def second_key(suite: Suite) -> str:
    """The second of the two keys in an advert."""
    return "kem_key" if suite.hybrid else "mask_key"


def some_key(suite: Suite, field: str) -> bytes:
    """A sound key that no site of these rounds has made."""
    if field == "kem_key":
        return MLKEM768PrivateKey.from_seed_bytes(b"\x07" * 64).public_key().public_bytes_raw()
    return suites.public_bytes(suites.private_key(suite, b"\x07" * suite.seed_bytes))


def pair_keys(play: Any, i: int) -> dict[int, bytes]:
    """The keys of the masks of site i, by neighbour."""
    return {j: link.pair_key for j, link in site.open_delivery(play.shared[i], play.deliveries[i]).items()}


def signed(play: Any, message: Any) -> Any:
    """Sign as the message's own site would: what a site in league with the coordinator can do."""
    key = world.identity(message.site).key
    binding = play.coordinator._binding
    return dataclasses.replace(message, signature=key.sign(transcript.signed_bytes(message, binding)))


def with_advert(roster: Roster, index: int, **changes: Any) -> Roster:
    adverts = list(roster.adverts)
    adverts[index] = dataclasses.replace(adverts[index], **changes)
    return Roster(tuple(adverts))


def lists_for(play: Any, i: int, survivors: Collection[int]) -> Survivors:
    """The Survivors message that names `survivors`, with the tags that the coordinator has."""
    peers = [j for j in play.coordinator._graph.neighbours(i) if j in survivors]
    tags = tuple(Tag(j, play.coordinator._tags[j][i]) for j in peers)
    return Survivors(play.survivors[i].roster, i, tuple(sorted(survivors)), tags)


# ---- A site listed as both alive and dropped


def tag_for(play: Any, confirm: Confirm, i: int) -> Tag:
    """The tag that `confirm` holds for site i, or zeros where its sender thinks that i has dropped out."""
    return Tag(confirm.site, next((tag.data for tag in confirm.tags if tag.site == i), bytes(16)))


@pytest.mark.parametrize("told_alive", [1, 2, 3, 4, 5])
def test_a_victim_named_alive_to_some_and_dropped_to_others_is_revealed_one_way(told_alive: int) -> None:
    # 7 sites, site 6 in league with the coordinator, which tells some that site 0 is alive and others that it
    # is not. Site 6 confirms both lists. A quorum is 5.
    play = world.World(world.parameters(7, corrupt=1, dropouts=1)).advertise().share().mask()
    everyone = set(range(7))
    groups = (set(range(told_alive)), set(range(told_alive, 6)))
    confirmed, confirms = {}, {}
    for group, told in zip(groups, (everyone, everyone - {0}), strict=True):
        for i in group:
            confirmed[i], confirms[i] = site.confirm(play.masking[i], lists_for(play, i, told))
    revealing = set()
    for group, others in (groups, groups[::-1]):
        for i in group:
            roster = play.survivors[i].roster
            tags = [tag_for(play, confirms[j], i) for j in sorted(group - {i})]
            tags.append(Tag(6, play.masking[6].channels[i][0].tag(confirms[i].lists)))
            # Confirmations of the other list do not help; the dropped site's would not even be counted.
            mixed = tags + [tag_for(play, confirms[j], i) for j in others if j != 0]
            mixed.sort(key=lambda tag: tag.site)
            if len(mixed) > len(tags):
                with pytest.raises(VerificationError, match=r"did not confirm to site number \d+ the list of sites"):
                    site.reveal(confirmed[i], Proof(roster, i, tuple(mixed), ()), play.journals[i])
            try:
                site.reveal(confirmed[i], Proof(roster, i, tuple(tags), ()), play.journals[i])
                revealing.add(frozenset(group))
            except TooFewSitesError:
                assert len(group) + 1 < 5
    assert len(revealing) <= 1
    assert (len(revealing) == 1) == (max(map(len, groups)) >= 4)


def test_no_message_holds_both_shares_of_a_site() -> None:
    play = world.World(world.parameters(5, dropouts=2)).advertise().share().mask({1}).confirm().reveal()
    reveal = play.reveals[0]
    assert [share.site for share in reveal.shares] == [0, 1, 2, 3, 4]
    twice = dataclasses.replace(reveal, shares=(*reveal.shares, reveal.shares[-1]))
    with pytest.raises(ProtocolError, match="ascend"):
        encoding.encode(twice)
    # And what is revealed is of the right kind: half of 66 bytes held, never the other half.
    held = play.masking[0].shares
    for share in reveal.shares:
        kept, other = held[share.site][:33], held[share.site][33:]
        assert share.data == (other if share.site == 1 else kept)


@pytest.mark.parametrize("n", range(2, 10))
def test_no_two_revealing_groups_can_open_both_secrets(n: int) -> None:
    # Whatever each honest holder was told, of one owner's two secrets at most one can be reconstructed.
    for corrupt in range(n - 1):
        for degree in (0, *range(2, n - 1, 2)):
            holders = n if graph.is_complete(n, degree) else degree + 1
            bad = min(corrupt, holders - 1)
            threshold = graph.least_threshold(n, corrupt, degree, 80)
            honest = holders - bad
            assert not any(a + bad >= threshold and honest - a + bad >= threshold for a in range(honest + 1))


# ---- Substituted keys


@pytest.mark.parametrize("key", ["share_key", "second", "nonce"])
def test_a_peers_substituted_key_is_refused(suite: Suite, key: str) -> None:
    play = world.World(world.parameters(4)).advertise()
    field = second_key(suite) if key == "second" else key
    forged = with_advert(play.roster, 2, **{field: bytes(16) if key == "nonce" else some_key(suite, field)})
    with pytest.raises(VerificationError, match="Advertise message of site-0002 does not match its signature"):
        site.share(play.advertised[0], forged)


def test_a_peers_key_signed_by_another_site_is_refused(suite: Suite) -> None:
    play = world.World(world.parameters(4)).advertise()
    field = second_key(suite)
    advert = dataclasses.replace(play.adverts[2], **{field: some_key(suite, field)})
    key = world.identity(3).key
    binding = transcript.Binding(play.parameters.session, 1, transcript.parameters_digest(play.parameters))
    advert = dataclasses.replace(advert, signature=key.sign(transcript.signed_bytes(advert, binding)))
    with pytest.raises(VerificationError, match="site-0002"):
        site.share(play.advertised[0], with_advert(play.roster, 2, **vars(advert)))


def test_own_keys_changed_or_left_out_are_noticed() -> None:
    play = world.World(world.parameters(4)).advertise()
    with pytest.raises(VerificationError, match="own keys"):
        site.share(play.advertised[0], with_advert(play.roster, 0, nonce=bytes(16)))
    with pytest.raises(VerificationError, match="own keys"):
        site.share(play.advertised[0], Roster(play.roster.adverts[1:]))


@pytest.mark.parametrize("key", ["share_key", "second"])
def test_a_key_replayed_as_another_sites_is_refused(suite: Suite, key: str) -> None:
    # Site 3 is in league and advertises site 1's keys as its own, properly signed.
    play = world.World(world.parameters(4)).advertise()
    field = second_key(suite) if key == "second" else key
    copied = dataclasses.replace(play.adverts[3], **{field: getattr(play.adverts[1], field)})
    binding = transcript.Binding(play.parameters.session, 1, transcript.parameters_digest(play.parameters))
    copied = dataclasses.replace(copied, signature=world.identity(3).key.sign(transcript.signed_bytes(copied, binding)))
    with pytest.raises(VerificationError, match="holds a key twice"):
        site.share(play.advertised[0], with_advert(play.roster, 3, **vars(copied)))
    fresh = world.coordinator.Aggregator(play.parameters)
    fresh.admit(play.adverts[1])
    with pytest.raises(
        ProtocolError, match="site-0003 sent a key for this round that another site, or itself, sent before"
    ):
        fresh.admit(copied)


def test_substituted_identities_are_refused() -> None:
    parameters = world.parameters(4)
    members = list(parameters.cohort)
    members[2] = dataclasses.replace(members[2], identity=world.identity(9).key.public_key().public_bytes_raw())
    forged = dataclasses.replace(parameters, cohort=tuple(members))
    with pytest.raises(VerificationError, match="another identity key for site site-0002"):
        site.advertise(world.identity(0), forged, world.INPUTS, world.pins(4), world.LOW, world.Drbg(b""))


def test_invented_sites_are_refused() -> None:
    parameters = world.parameters(6)
    with pytest.raises(RefusedError, match="names site site-0004, but the site file has no identity key"):
        site.advertise(world.identity(0), parameters, world.INPUTS, world.pins(4), world.LOW, world.Drbg(b""))
    same = [dataclasses.replace(m, identity=parameters.cohort[0].identity) for m in parameters.cohort[:3]]
    pins = {m.name: m.identity for m in same}
    with pytest.raises(RefusedError, match="same identity key"):
        site.advertise(
            world.identity(0),
            dataclasses.replace(world.parameters(3), cohort=tuple(same)),
            world.INPUTS,
            pins,
            world.LOW,
            world.Drbg(b""),
        )


@pytest.mark.parametrize("key", ["share_key", "mask_key"])
@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31), (2**255 - 20).to_bytes(32, "little")])
def test_a_low_order_point_is_refused(suite: Suite, key: str, point: bytes) -> None:
    # A site in league signs a key of low order, whose agreement everyone could compute.
    if suite is Suite.P256_MLKEM768 or (suite.hybrid and key == "mask_key"):
        pytest.skip("the suite has no such key")
    play = world.World(world.parameters(4)).advertise()
    advert = dataclasses.replace(play.adverts[3], **{key: point})
    binding = transcript.Binding(play.parameters.session, 1, transcript.parameters_digest(play.parameters))
    advert = dataclasses.replace(advert, signature=world.identity(3).key.sign(transcript.signed_bytes(advert, binding)))
    with pytest.raises(VerificationError, match="site-0003 sent for this round is not a usable X25519 key"):
        site.share(play.advertised[0], with_advert(play.roster, 3, **vars(advert)))
    with pytest.raises(VerificationError, match="site-0003 sent for this round is not a usable X25519 key"):
        world.coordinator.Aggregator(play.parameters).admit(advert)


# ---- Cohort of one, low thresholds, low everything


def test_a_cohort_of_one_is_refused() -> None:
    one = dataclasses.replace(world.parameters(2), cohort=world.parameters(2).cohort[:1], threshold=1)
    with pytest.raises(RefusedError, match="cohort must be at least 2, the coordinator proposed 1"):
        site.advertise(world.identity(0), one, world.INPUTS, world.pins(1), world.LOW, world.Drbg(b""))


def test_a_roster_of_one_honest_site_is_refused() -> None:
    # 5 sites, 3 in league: the coordinator lists only the victim and its friends.
    parameters = world.parameters(5, corrupt=3)
    assert parameters.min_survivors == 5
    play = world.World(parameters).advertise()
    alone = Roster(tuple(play.roster.adverts[i] for i in (0, 2, 3, 4)))
    with pytest.raises(TooFewSitesError, match="4 sites sent their keys, the round needs at least 5"):
        site.share(play.advertised[0], alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 6}, "threshold for 10 sites must be at least 7, the coordinator proposed 6"),
        ({"threshold": 1}, "threshold for 10 sites must be at least 7, the coordinator proposed 1"),
        ({"threshold": 11}, "threshold must be at most 10, the coordinator proposed 11"),
        ({"corrupt": 0}, "corrupt sites that it withstands must be at least 2, the coordinator proposed 0"),
        ({"corrupt": 9, "degree": 4}, "corrupt sites that it withstands must be at most 8, the coordinator proposed 9"),
        ({"min_survivors": 6}, "survivors must be at least 7, the coordinator proposed 6"),
        ({"min_survivors": 11}, "survivors must be at most 10"),
        ({"bits": 14}, "bits for one value must be at least 15, the coordinator proposed 14"),
        ({"bits": 25}, "layout of the vector is not valid: secure_aggregation.bits must be 14 to 24, got 25"),
        ({"degree": 3}, "must be even, got 3"),
        ({"degree": 4, "security": 40}, "security in bits must be at least 80, the coordinator proposed 40"),
        (
            {"degree": 4, "threshold": 5},
            "half the number of neighbours of each of 10 sites must be at least 3, the coordinator proposed 2",
        ),
        ({"degree": 6, "threshold": 4}, "threshold for 10 sites must be at least 5, the coordinator proposed 4"),
        ({"segments": ()}, "at least one segment"),
        ({"segments": (Segment("x", 2**31, 1.0),)}, "words of the vector must be at most 1000"),
    ],
)
def test_parameters_below_the_rules_or_the_floor_are_refused(change: dict[str, Any], message: str) -> None:
    floor = floor_of(cohort=10, corrupt_fraction=0.2, bits=15, max_words=1000)
    parameters = dataclasses.replace(world.parameters(10, corrupt=2, dropouts=3, min_survivors=7), **change)
    with pytest.raises(RefusedError, match=message):
        site.advertise(world.identity(0), parameters, world.INPUTS, world.pins(10), floor, world.Drbg(b""))


@pytest.mark.parametrize(
    ("floor", "message"),
    [
        ({"cohort": 11}, "cohort must be at least 11"),
        ({"survivors": 9}, "survivors must be at least 9"),
        ({"threshold": 8}, "threshold must be at least 8"),
        ({"corrupt": 3}, "corrupt sites that it withstands must be at least 3"),
        ({"corrupt_fraction": 0.3}, "corrupt sites that it withstands must be at least 3"),
    ],
)
def test_a_sites_own_floor_is_kept(floor: dict[str, Any], message: str) -> None:
    parameters = world.parameters(10, corrupt=2, dropouts=2)
    site.advertise(world.identity(0), parameters, world.INPUTS, world.pins(10), floor_of(), world.Drbg(b""))
    with pytest.raises(RefusedError, match=message):
        site.advertise(world.identity(0), parameters, world.INPUTS, world.pins(10), floor_of(**floor), world.Drbg(b""))


def test_a_floors_fraction_is_taken_as_it_is_written() -> None:
    # 0.29 * 100 is below 29 in floating point.
    parameters = world.parameters(100, corrupt=28)
    with pytest.raises(
        RefusedError, match="corrupt sites that it withstands must be at least 29, the coordinator proposed 28"
    ):
        terms.check_parameters(parameters, world.pins(100), floor_of(corrupt_fraction=0.29))


def test_sites_that_were_given_different_models_are_in_no_common_sum() -> None:
    # A model made so that all other sites' updates vanish would leave the victim's alone in the sum.
    parameters = world.parameters(5, corrupt=1)
    other = hashlib.sha256(b"study and another model").digest()
    pins, floor = world.pins(5), floor_of()
    with pytest.raises(VerificationError, match=r"adapter of digest .*, this site has digest"):
        site.advertise(world.identity(0), parameters, other, pins, floor, world.Drbg(b""))
    # If each site is told what it was given, their signatures are on different parameters.
    play = world.World(parameters)
    told = dataclasses.replace(parameters, inputs=other)
    _, advert = site.advertise(world.identity(0), told, other, pins, floor, world.Drbg(b""))
    with pytest.raises(ProtocolError, match="other parameters"):
        play.coordinator.admit(advert)
    play.advertise()
    mixed = Roster((advert, *play.roster.adverts[1:]))
    with pytest.raises(ProtocolError, match="other parameters"):
        site.share(play.advertised[1], mixed)


def test_a_site_outside_the_cohort_or_with_another_key_does_not_join() -> None:
    parameters = world.parameters(4)
    with pytest.raises(RefusedError, match="does not include this site"):
        site.advertise(world.identity(7), parameters, world.INPUTS, world.pins(8), world.LOW, world.Drbg(b""))
    impostor = site.Identity("site-0000", world.identity(7).key)
    with pytest.raises(
        VerificationError, match="cohort lists for this site, site-0000, is not the key that the site holds"
    ):
        site.advertise(impostor, parameters, world.INPUTS, world.pins(4), world.LOW, world.Drbg(b""))


def test_a_smaller_roster_makes_the_same_corrupt_sites_weigh_more() -> None:
    # Degree and threshold that are safe for 1000 sites and 100 corrupt ones are not for 500 and the same 100.
    choice = graph.choose(1000, 100, 100)
    parameters = world.parameters(3, corrupt=100, degree=choice.degree, threshold=choice.threshold, proposed=False)
    terms.check_sharing(parameters, 1000)
    terms.check_sharing(parameters, 990)
    with pytest.raises(RefusedError, match="threshold for 500 sites must be at least"):
        terms.check_sharing(parameters, 500)


# ---- Two lists


def test_a_second_list_of_survivors_is_refused() -> None:
    play = world.World(world.parameters(5, dropouts=2)).advertise().share().mask()
    site.confirm(play.masking[0], lists_for(play, 0, {0, 1, 2, 3, 4}))
    with pytest.raises(ProtocolError, match="already answered in the confirm step"):
        site.confirm(play.masking[0], lists_for(play, 0, {0, 1, 2, 3}))


def test_confirmations_of_another_list_are_noticed() -> None:
    # On the ring others than neighbours confirm by signature, which must be on this list, from this round.
    parameters = world.parameters(9, dropouts=2, degree=4, threshold=3, min_survivors=7)
    play = world.World(parameters).advertise().share().mask().confirm()
    assert any(proof.confirms for proof in play.proofs.values()) is False
    strangers = sorted(set(range(9)) - set(play.coordinator._graph.holders(0)))
    lists = play.confirmed[0].lists
    genuine = tuple(dataclasses.replace(play.confirms[j], tags=()) for j in strangers)
    proof = Proof(play.proofs[0].roster, 0, (), genuine)
    assert len(genuine) == 4
    other = signed(play, Confirm(proof.roster, strangers[0], bytes(32), ()))
    with pytest.raises(VerificationError, match="confirmed another list of survivors than this site"):
        site.reveal(play.confirmed[0], Proof(proof.roster, 0, (), (other, *genuine[1:])), play.journals[0])
    unsigned = Confirm(proof.roster, strangers[0], lists, ())
    with pytest.raises(VerificationError, match="does not match its signature"):
        site.reveal(play.confirmed[0], Proof(proof.roster, 0, (), (unsigned, *genuine[1:])), play.journals[0])
    site.reveal(play.confirmed[0], proof, play.journals[0])


def test_a_site_cannot_be_counted_twice_or_from_outside_the_survivors() -> None:
    parameters = world.parameters(9, dropouts=2, degree=4, threshold=3, min_survivors=7)
    play = world.World(parameters).advertise().share()
    dropped = sorted(set(range(9)) - set(play.coordinator._graph.holders(0)))[0]
    play.mask({dropped}).confirm()
    tags = play.proofs[0].tags
    # The same neighbours by tag and by signature are still the same sites.
    doubled = tuple(dataclasses.replace(play.confirms[t.site], tags=()) for t in tags[:3])
    with pytest.raises(TooFewSitesError, match="4 sites confirmed"):
        site.reveal(play.confirmed[0], Proof(play.proofs[0].roster, 0, tags[:3], doubled), play.journals[0])
    outsider = signed(play, Confirm(play.proofs[0].roster, dropped, play.confirmed[0].lists, ()))
    with pytest.raises(ProtocolError, match="a site that is no survivor"):
        site.reveal(play.confirmed[0], Proof(play.proofs[0].roster, 0, tags, (outsider,)), play.journals[0])
    repeated = (*tags[:2], tags[1])
    with pytest.raises(ProtocolError, match="ascend"):
        site.reveal(play.confirmed[0], Proof(play.proofs[0].roster, 0, repeated, ()), play.journals[0])


def test_different_sharers_told_to_a_victim_leave_its_seed_closed() -> None:
    # The coordinator tells site 0 that only its friends 5 and 6 and two that will "drop out" have shared, so
    # that it is masked with them alone. To all others, site 0 is an ordinary survivor.
    parameters = world.parameters(7, corrupt=2, dropouts=2)
    assert parameters.threshold == 5
    play = world.World(parameters).advertise().share()
    told = (0, 1, 2, 5, 6)
    d = play.deliveries[0]
    play.deliveries[0] = dataclasses.replace(d, sharers=told, sealed=tuple(s for s in d.sealed if s.site in told))
    for i in (0, 3, 4, 5, 6):
        words = play.encoded(i)
        play.masking[i], play.masked[i] = site.mask(play.shared[i], play.deliveries[i], words, play.journals[i])
    tags = {i: {t.site: t.data for t in play.masked[i].tags} for i in play.masked}
    alive = (0, 3, 4, 5, 6)
    for i in (3, 4):
        # Site 0 was told that 3 and 4 had not shared: it has no tag for them.
        forged = tuple(Tag(j, tags[j].get(i, tags[0][5])) for j in alive if j != i)
        with pytest.raises(VerificationError, match="site number 0 of the cohort did not confirm to site"):
            site.confirm(play.masking[i], Survivors(d.roster, i, alive, forged))
    # The honest coordinator's check names the site too.
    with pytest.raises(ProtocolError, match="site-0000 masked its vector for another list of sharing sites"):
        play.coordinator.admit(play.masked[0])


def test_different_rosters_do_not_mix() -> None:
    parameters = world.parameters(6, dropouts=2)
    play = world.World(parameters).advertise()
    short = Roster(play.roster.adverts[:5])
    state, _ = site.share(play.advertised[0], short)
    play.advertised.pop(0)
    play.share()
    mixed = messages.Delivery(state.context.binding.roster, 0, (0, 1, 2, 3, 4), (), play.parameters.suite)
    sealed = tuple(Sealed(i, play.shares[i].sealed[0].data) for i in range(1, 5))
    with pytest.raises(VerificationError, match="cannot be decrypted"):
        site.mask(state, dataclasses.replace(mixed, sealed=sealed), play.encoded(0), play.journals[0])


def test_chosen_dropouts_cannot_cut_the_ring() -> None:
    # Two runs of drop-outs, each as long as a site sees, would leave two groups whose sums come apart.
    n = 24
    parameters = world.parameters(n, degree=6, threshold=4, min_survivors=13)
    play = world.World(parameters).advertise().share()
    ring = play.coordinator._graph.ring
    cut = {ring[p] for p in (0, 1, 2, 12, 13, 14)}
    assert n - len(cut) >= parameters.min_survivors
    play.mask(cut)
    for i in sorted(play.masking)[:4]:
        with pytest.raises(VerificationError, match="split in two or more parts"):
            site.confirm(play.masking[i], play.survivors[i])
    # The same number of drop-outs elsewhere is fine.
    again = world.World(parameters).advertise().share()
    again.mask({again.coordinator._graph.ring[p] for p in (0, 1, 5, 12, 13, 17)}).confirm()


# ---- Replays and swaps


def test_nothing_of_one_round_passes_in_another() -> None:
    first = world.World(world.parameters(4, number=1), seed=b"1")
    first.finish()
    second = world.World(world.parameters(4, number=2), seed=b"2", journals=first.journals)
    second.advertise()
    with pytest.raises(ProtocolError, match="other parameters"):
        world.coordinator.Aggregator(second.parameters).admit(first.adverts[1])
    with pytest.raises(ProtocolError, match="other parameters"):
        site.share(second.advertised[0], with_advert(second.roster, 1, **vars(first.adverts[1])))
    # Not even an old advert under the new parameters' digest.
    relabelled = dataclasses.replace(first.adverts[1], parameters=second.adverts[1].parameters)
    with pytest.raises(VerificationError, match="does not match its signature"):
        site.share(second.advertised[0], with_advert(second.roster, 1, **vars(relabelled)))
    second.share()
    with pytest.raises(ProtocolError, match="expects Masked messages now, got a message Shares"):
        second.coordinator.admit(first.shares[1])
    with pytest.raises(ProtocolError, match="site-0001 sent a message for another list of keys"):
        second.coordinator.admit(first.masked[1])
    with pytest.raises(ProtocolError, match=r"message is for the list of keys .roster. .*, this round has"):
        site.mask(second.shared[0], first.deliveries[0], second.encoded(0), second.journals[0])
    replayed = dataclasses.replace(second.deliveries[0], sealed=first.deliveries[0].sealed)
    with pytest.raises(VerificationError, match="cannot be decrypted"):
        site.mask(second.shared[0], replayed, second.encoded(0), second.journals[0])
    second.mask()
    with pytest.raises(ProtocolError, match=r"message is for the list of keys .roster. .*, this round has"):
        site.confirm(second.masking[0], first.survivors[0])
    stale = dataclasses.replace(second.survivors[0], tags=first.survivors[0].tags)
    with pytest.raises(VerificationError, match="did not confirm"):
        site.confirm(second.masking[0], stale)
    second.confirm()
    stale_proof = dataclasses.replace(second.proofs[0], tags=first.proofs[0].tags)
    with pytest.raises(VerificationError, match="did not confirm"):
        site.reveal(second.confirmed[0], stale_proof, second.journals[0])
    second.reveal()


def test_swapped_ciphertexts_are_refused() -> None:
    play = world.World(world.parameters(4)).advertise().share()
    d = play.deliveries[0]
    one, two, three = d.sealed
    swapped = (Sealed(1, two.data), Sealed(2, one.data), three)
    with pytest.raises(
        VerificationError, match="shares from site number 1 to site number 0 of the cohort cannot be decrypted"
    ):
        site.mask(play.shared[0], dataclasses.replace(d, sealed=swapped), play.encoded(0), play.journals[0])
    for sealed in ((one, two), (one, two, two), (two, one, three)):
        with pytest.raises(ProtocolError, match="in ascending order"):
            site.mask(play.shared[0], dataclasses.replace(d, sealed=sealed), play.encoded(0), play.journals[0])
    reflected = (Sealed(1, play.shares[0].sealed[0].data), two, three)
    with pytest.raises(VerificationError, match="cannot be decrypted"):
        site.mask(play.shared[0], dataclasses.replace(d, sealed=reflected), play.encoded(0), play.journals[0])
    misdirected = play.deliveries[1]
    with pytest.raises(ProtocolError, match="for site number 1 of the cohort, this is number 0"):
        site.mask(play.shared[0], misdirected, play.encoded(0), play.journals[0])


def test_a_tag_meant_for_another_site_or_purpose_is_refused() -> None:
    play = world.World(world.parameters(4)).advertise().share().mask().confirm()
    with pytest.raises(VerificationError, match="did not confirm"):
        site.reveal(
            play.confirmed[0],
            dataclasses.replace(play.proofs[0], tags=play.survivors[0].tags),
            play.journals[0],
        )
    other = tuple(Tag(t.site, u.data) for t, u in zip(play.proofs[0].tags, play.proofs[3].tags, strict=True))
    with pytest.raises(VerificationError, match="did not confirm"):
        site.reveal(play.confirmed[0], dataclasses.replace(play.proofs[0], tags=other), play.journals[0])


# ---- Forged shares


def test_a_forged_share_index_neither_passes_nor_spoils_the_sum() -> None:
    # The index of a share is its sender, and the sender signs. Site 0 is in league and sends what it has of
    # site 1's secret under site 2's owner number, and tries to speak as site 3.
    play = world.World(world.parameters(5, dropouts=2)).advertise().share().mask().confirm()
    reveals = {i: site.reveal(state, play.proofs[i], play.journals[i]) for i, state in play.confirmed.items()}
    as_another = dataclasses.replace(reveals[0], site=3)
    with pytest.raises(VerificationError, match="Reveal message of site-0003 does not match its signature"):
        play.coordinator.admit(as_another)
    shares = list(reveals[0].shares)
    shares[1], shares[2] = (
        dataclasses.replace(shares[1], data=shares[2].data),
        dataclasses.replace(shares[2], data=shares[1].data),
    )
    missing = dataclasses.replace(reveals[0], shares=reveals[0].shares[1:])
    with pytest.raises(ProtocolError, match="one share for each of 5 sites"):
        play.coordinator.admit(signed(play, missing))
    play.coordinator.admit(signed(play, dataclasses.replace(reveals[0], shares=tuple(shares))))
    for i in (1, 2, 3):
        play.coordinator.admit(reveals[i])
    assert np.array_equal(play.coordinator.total().words, sum(play.words.values()))


def test_a_site_that_shares_another_seed_than_it_committed_to_is_found() -> None:
    play = world.World(world.parameters(4)).advertise()
    for i, state in play.advertised.items():
        play.shared = getattr(play, "shared", {})
        play.shared[i], out = site.share(state, play.roster)
        if i == 1:
            out = signed(play, dataclasses.replace(out, commitment=bytes(32)))
        play.coordinator.admit(out)
    play.deliveries = play.coordinator.deliveries()
    play.mask().confirm().reveal()
    with pytest.raises(VerificationError, match="secret of site-0001 cannot be reconstructed"):
        play.coordinator.total()


# ---- Restarts


def test_a_restarted_worker_reveals_nothing_twice() -> None:
    play = world.World(world.parameters(4, dropouts=1)).advertise().share().mask().confirm()
    state = play.confirmed[0]
    keepers: tuple[Any, ...] = (copy.copy, copy.deepcopy, lambda kept: kept.__reduce_ex__(4))
    for keep in keepers:
        with pytest.raises(StateError, match="must not be copied or stored"):
            keep(state)
    site.reveal(state, play.proofs[0], play.journals[0])
    # Had a restart brought the state back by force, the durable record would still stand.
    revived = dataclasses.replace(state, once=site.Once())
    with pytest.raises(StateError, match="on record already"):
        site.reveal(revived, play.proofs[0], play.journals[0])


def test_the_record_is_made_before_anything_leaves_and_stops_it_if_it_fails() -> None:
    play = world.World(world.parameters(4, dropouts=1)).advertise().share()

    def broken(entry: site.RecordedStep) -> None:
        raise StateError("the disk is full")

    words = play.encoded(0)
    before = words.copy()
    with pytest.raises(StateError, match="disk is full"):
        site.mask(play.shared[0], play.deliveries[0], words, broken)
    assert np.array_equal(words, before)
    with pytest.raises(ProtocolError, match="already answered"):
        site.mask(play.shared[0], play.deliveries[0], words, play.journals[0])
    play.shared.pop(0)
    play.mask()


def test_one_vector_is_not_masked_for_two_rosters_of_one_round() -> None:
    # The coordinator runs the round twice, once without some sites, to subtract the sums.
    parameters = world.parameters(5, dropouts=2)
    first = world.World(parameters, seed=b"1").advertise().share().mask()
    second = world.World(parameters, seed=b"2", journals=first.journals).advertise({4}).share()
    with pytest.raises(StateError, match="mask step is on record already"):
        second.mask()


# ---- What can be read


def all_bytes(play: Any) -> dict[str, Any]:
    out: dict[str, Any] = {"roster": encoding.encode(play.roster)}
    for name in ("adverts", "shares", "deliveries", "survivors", "confirms", "proofs", "reveals"):
        out[name] = {i: encoding.encode(message) for i, message in getattr(play, name).items()}
    out["masked"] = {i: encoding.encode_parts(message)[0] for i, message in play.masked.items()}
    return out


def test_vectors_weights_and_metrics_show_in_the_masked_words_only() -> None:
    # With the same randomness, two rounds on different data differ in nothing but the masked words.
    def data(scale: float, examples: int) -> Any:
        return lambda index: {"examples": np.array([examples + index]), "update": np.full(7, scale * index)}

    plays = [world.World(world.parameters(5, dropouts=1), vector=data(*args)) for args in ((0.01, 10), (0.2, 99_999))]

    def encapsulate(public: bytes, *, whose: str) -> suites.Encapsulated:
        return suites.Encapsulated(*reference.mlkem_encapsulate(public, hashlib.sha256(public).digest()))

    with mock.patch.object(suites, "encapsulate", encapsulate):  # the library's takes no randomness from a caller
        for play in plays:
            play.finish({"mask": {3}})
    assert all_bytes(plays[0]) == all_bytes(plays[1])
    for i in plays[0].masked:
        assert not np.array_equal(plays[0].masked[i].words, plays[1].masked[i].words)
    parameters = encoding.encode(plays[0].parameters)
    assert b"99999" not in parameters


def test_what_coordinator_and_corrupt_sites_hold_does_not_open_a_survivor() -> None:
    # 7 sites, 2 in league. What they and the coordinator hold of site 0's secrets stays below the threshold,
    # and its vector without all masks that they know is not its vector.
    play = world.World(world.parameters(7, corrupt=2, dropouts=2))
    total = play.finish({"mask": {6}})
    bad = (4, 5)
    for which in (slice(0, 33), slice(33, 66)):
        points = {i + 1: play.masking[i].shares[0][which] for i in bad}
        assert len(points) < play.parameters.threshold
    roster = play.coordinator._binding.roster
    known = [masks.self_mask_key(play.shared[0].self_seed, roster, 0)]
    plus = [pair_keys(play, 0)[j] for j in (*bad, 6)]
    rest = play.masked[0].words.copy()
    masks.apply(rest, [], [*known, *plus])
    used = masks.LOW if play.parameters.packed else np.uint64(2**64 - 1)
    assert not np.array_equal(rest & used, play.words[0])
    assert total.survivors == (0, 1, 2, 3, 4, 5)
    # Only together with all other honest survivors do the remaining masks go.
    for size in (1, 2, 3):
        for group in itertools.combinations((0, 1, 2, 3), size):
            part = sum((unmasked(play, j, (*bad, 6)) for j in group), np.zeros_like(rest)) & used
            truth = sum((play.words[j] for j in group), np.zeros_like(rest))
            assert not np.array_equal(part, truth)
    everyone = sum((unmasked(play, j, (*bad, 6)) for j in (0, 1, 2, 3)), np.zeros_like(rest)) & used
    assert np.array_equal(everyone, sum(play.words[j] for j in (0, 1, 2, 3)))


def unmasked(play: Any, i: int, known: tuple[int, ...]) -> Any:
    """A survivor's vector without its self mask and the masks that it shares with `known` sites."""
    roster = play.coordinator._binding.roster
    words = play.masked[i].words.copy()
    keys = [masks.self_mask_key(play.shared[i].self_seed, roster, i)]
    of_pair = pair_keys(play, i)
    masks.apply(words, [of_pair[j] for j in known if j < i], keys + [of_pair[j] for j in known if j > i])
    return words


def test_states_do_not_print_their_secrets() -> None:
    play = world.World(world.parameters(3)).advertise().share().mask().confirm()
    for state in (play.advertised[0], play.shared[0], play.masking[0], play.confirmed[0]):
        assert repr(state) == f"<{type(state).__name__} of one round>"
        assert "0x" not in str(state)
    assert "key" not in repr(world.identity(0)) or "Ed25519" not in repr(world.identity(0))
    assert "words" not in repr(quantize.Encoded(play.encoded(0), 0))


def test_errors_carry_no_key_or_share() -> None:
    play = world.World(world.parameters(4)).advertise().share()
    d = play.deliveries[0]
    broken = dataclasses.replace(d, sealed=(Sealed(1, bytes(len(d.sealed[0].data))), *d.sealed[1:]))
    with pytest.raises(VerificationError) as caught:
        site.mask(play.shared[0], broken, play.encoded(0), play.journals[0])
    text = str(caught.value)
    assert bytes(8).hex() not in text
    assert caught.value.__cause__ is None
    assert shamir.SHARE_BYTES == 33


def test_a_site_that_did_not_take_part_in_a_step_cannot_join_the_next() -> None:
    play = world.World(world.parameters(7, dropouts=3)).advertise({5}).share({4}).mask({3})
    late = signed(play, Confirm(play.survivors[0].roster, 3, play.coordinator._lists, ()))
    with pytest.raises(ProtocolError, match="site-0003 confirmed the survivors, but is not one of them"):
        play.coordinator.admit(late)
    with pytest.raises(ProtocolError, match="cohort has 7 sites"):
        play.coordinator.admit(dataclasses.replace(late, site=9))
    with pytest.raises(ProtocolError, match="confirmed other lists"):
        play.coordinator.admit(signed(play, Confirm(late.roster, 0, bytes(32), ())))


def test_an_advert_with_one_key_for_both_purposes_does_not_stop_the_others(suite: Suite) -> None:
    if suite.hybrid:
        pytest.skip("the keys have different lengths")
    # Every site refuses a roster with a key twice, so that the coordinator has to leave its sender out.
    play = world.World(world.parameters(4, dropouts=1))
    key = some_key(suite, "share_key")
    advert = signed(play, Advertise(play.coordinator._binding.parameters, 3, key, key, bytes(16)))
    with pytest.raises(
        ProtocolError, match="site-0003 sent a key for this round that another site, or itself, sent before"
    ):
        play.coordinator.admit(advert)
    play.finish({"advertise": {3}})


def test_an_advert_for_the_coordinator_is_checked_too() -> None:
    play = world.World(world.parameters(3))
    _, advert = site.advertise(
        world.identity(0), play.parameters, world.INPUTS, world.pins(3), world.LOW, world.Drbg(b"x")
    )
    with pytest.raises(VerificationError, match="does not match its signature"):
        play.coordinator.admit(Advertise(advert.parameters, 1, *list(vars(advert).values())[2:]))


# ---- Lists that a coordinator makes up


def test_a_thinned_out_roster_is_refused_where_corrupt_sites_could_crowd_a_neighbourhood() -> None:
    parameters = world.parameters(1000, corrupt=100, dropouts=100, min_survivors=551)
    state, own = site.advertise(
        world.identity(0), parameters, world.INPUTS, world.pins(1000), world.LOW, world.Drbg(b"a")
    )
    made_up = tuple(
        Advertise(own.parameters, i, i.to_bytes(32, "big"), (i + 5000).to_bytes(32, "big"), bytes(16))
        for i in range(1, 560)
    )
    with pytest.raises(RefusedError, match="threshold for 560 sites must be at least"):
        site.share(state, Roster((own, *made_up)))


def test_a_site_whose_neighbours_are_missing_does_not_mask_or_confirm() -> None:
    # Enough sites in all, but too few that hold shares of this one: no sum with it could be opened.
    parameters = world.parameters(12, dropouts=4, degree=6, threshold=7, min_survivors=8)
    play = world.World(parameters).advertise()
    g = graph.build_graph(
        transcript.roster_digest(transcript.parameters_digest(parameters), play.roster),
        tuple(range(12)),
        0,
        6,
        80,
    )
    gone = g.neighbours(0)[0]
    play.share({gone})
    with pytest.raises(
        TooFewSitesError, match="6 sites among this site and its neighbours sent shares, the round needs at least 7"
    ):
        site.mask(play.shared[0], play.deliveries[0], play.encoded(0), play.journals[0])


def test_lists_may_only_shrink() -> None:
    parameters = world.parameters(9, dropouts=3, degree=4, threshold=3, min_survivors=5)
    play = world.World(parameters).advertise({8}).share({7}).mask()
    told = play.survivors[0]
    i = next(i for i in play.masking if 7 not in play.coordinator._graph.neighbours(i))
    for extra in (7, 8):
        more = dataclasses.replace(play.survivors[i], survivors=(*told.survivors, extra))
        with pytest.raises(ProtocolError, match="survivors must include this site"):
            site.confirm(play.masking[i], more)
    without = dataclasses.replace(play.survivors[i], survivors=tuple(j for j in told.survivors if j != i))
    with pytest.raises(ProtocolError, match="include this site"):
        site.confirm(play.masking[i], without)
    again = world.World(parameters).advertise({8}).share({7})
    more_sharers = dataclasses.replace(again.deliveries[0], sharers=(*again.deliveries[0].sharers, 8))
    with pytest.raises(ProtocolError, match="must include this site, and only sites of the roster"):
        site.mask(again.shared[0], more_sharers, again.encoded(0), again.journals[0])
