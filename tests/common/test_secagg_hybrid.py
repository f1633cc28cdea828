"""Attacks on the hybrid suites: each ends in an error that names its author, and no wrong mask is ever removed."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from pydantic import ValidationError

from privet.client.site import FloorSection
from privet.common.errors import ProtocolError, RefusedError, VerificationError
from privet.common.secagg import encoding, links, masks, messages, site, suites, terms, transcript
from privet.common.secagg.coordinator import Total
from privet.common.secagg.messages import HYBRID_SEALED_BYTES, Delivery, Roster, Sealed
from privet.common.secagg.signatures import pair_commitment
from privet.common.secagg.suites import CIPHERTEXT_BYTES, Suite

world = importlib.import_module("tests.support.secagg_world")
HYBRID = [suite for suite in Suite if suite.hybrid]


@pytest.fixture(autouse=True, params=HYBRID, ids=lambda suite: suite.value)
def suite(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """Every attack is tried in both suites."""
    monkeypatch.setattr(world, "SUITE", request.param)
    chosen: Suite = request.param
    return chosen


def signed(play: Any, message: Any) -> Any:
    """Sign as the message's own site would."""
    key = world.identity(message.site).key
    return dataclasses.replace(message, signature=key.sign(transcript.signed_bytes(message, play.coordinator._binding)))


def shared(number: int = 1, sites: int = 5, **more: Any) -> Any:
    """A round in which all have shared."""
    return world.World(world.parameters(sites, number=number, **{"dropouts": 2, **more})).advertise().share()


def exact(play: Any, total: Total) -> bool:
    return bool(np.array_equal(total.words, sum(play.words[i] for i in total.survivors)))


def with_item(delivery: Delivery, sender: int, data: bytes) -> Delivery:
    sealed = tuple(Sealed(s.site, data) if s.site == sender else s for s in delivery.sealed)
    return dataclasses.replace(delivery, sealed=sealed)


def item(play: Any, sender: int, receiver: int) -> bytes:
    """What `sender` sent to `receiver`."""
    (data,) = (s.data for s in play.deliveries[receiver].sealed if s.site == sender)
    return bytes(data)


# ---- Keys


def test_no_key_follows_from_one_of_the_two_schemes_alone() -> None:
    # Whoever has broken either scheme has one of the two secrets, and derives other keys from it.
    one, two, th, c = b"1" * 32, b"2" * 32, b"t" * 32, b"c" * CIPHERTEXT_BYTES
    right = masks.hybrid_channel(one + two, th, 0, 1, c).tag(b"x")
    for secret in (one + bytes(32), bytes(32) + two, one, two, two + one):
        assert masks.hybrid_channel(secret, th, 0, 1, c).tag(b"x") != right
    other = masks.hybrid_channel(one + two, th, 0, 1, c[:-1] + b"d")
    assert other.tag(b"x") != right
    # Under the same keys but another ciphertext, nothing of the channel agrees.
    with pytest.raises(VerificationError, match="cannot be decrypted"):
        other.open(masks.hybrid_channel(one + two, th, 0, 1, c).seal(b"shares"))


def test_the_two_private_keys_and_the_seed_that_is_shared_are_independent(suite: Suite) -> None:
    # A drop-out's seed is reconstructed. The channels must stay closed.
    drawn = iter((b"a" * 32, b"s" * 32, b"b" * 32, b"s" * 32))
    one, two = (links.make_keys(suite, b"p" * 32, lambda count: next(drawn)) for _ in range(2))
    assert one.seed == two.seed
    assert not set(one.public()) & (set(two.public()) - {b""})


@pytest.mark.parametrize("where", [0, 600, 1183])
def test_a_kem_key_that_was_changed_on_the_way_is_refused(where: int) -> None:
    play = world.World(world.parameters(4)).advertise()
    key = bytearray(play.adverts[2].kem_key)
    key[where] ^= 1
    advert = dataclasses.replace(play.adverts[2], kem_key=bytes(key))
    forged = Roster((*play.roster.adverts[:2], advert, *play.roster.adverts[3:]))
    with pytest.raises(VerificationError, match="Advertise message of site-0002 does not match its signature"):
        site.share(play.advertised[0], forged)


def test_a_malformed_kem_key_leaves_out_its_author_alone() -> None:
    play = world.World(world.parameters(4, dropouts=1))
    _, honest = site.advertise(
        world.identity(3), play.parameters, world.INPUTS, world.pins(4), world.LOW, world.Drbg(b"x")
    )
    advert = signed(play, dataclasses.replace(honest, kem_key=b"\xff" * 1184))  # no coefficient is below 3329
    with pytest.raises(VerificationError, match="site-0003 sent for this round is not a usable ML-KEM-768 key"):
        play.coordinator.admit(advert)
    assert exact(play, play.finish({"advertise": {3}}))
    # A coordinator that passes it on all the same stops the sites.
    told = world.World(world.parameters(4, dropouts=1)).advertise()
    with pytest.raises(VerificationError, match="site-0003 sent for this round is not a usable ML-KEM-768 key"):
        site.share(told.advertised[0], Roster((*told.roster.adverts[:3], advert)))


@pytest.mark.parametrize("point", [b"\x04" + bytes(64), bytes(65), b"\x02" + bytes(64), b"\x06" + b"\x01" * 64])
def test_what_is_no_point_of_the_curve_is_refused(suite: Suite, point: bytes) -> None:
    if suite is not Suite.P256_MLKEM768:
        pytest.skip("every 32 bytes are a point of X25519; those of low order are tried elsewhere")
    play = world.World(world.parameters(4)).advertise()
    advert = signed(world.World(world.parameters(4)), dataclasses.replace(play.adverts[3], share_key=point))
    with pytest.raises(VerificationError, match="site-0003 sent for this round is not a usable P-256 key"):
        world.World(world.parameters(4)).coordinator.admit(advert)
    with pytest.raises(VerificationError, match="site-0003 sent for this round is not a usable P-256 key"):
        site.share(play.advertised[0], Roster((*play.roster.adverts[:3], advert)))


# ---- Ciphertexts on the way


@pytest.mark.parametrize("where", [0, 500, 1087, 1088, 1119, 1120, HYBRID_SEALED_BYTES - 1])
def test_no_byte_of_an_item_can_be_changed(where: int) -> None:
    # In the ciphertext (ML-KEM decapsulates it to another secret), in the commitment, and in the box.
    play = shared()
    data = bytearray(item(play, 1, 0))
    data[where] ^= 1
    with pytest.raises(VerificationError, match="site number 1 to site number 0 of the cohort cannot be decrypted"):
        site.open_delivery(play.shared[0], with_item(play.deliveries[0], 1, bytes(data)))


def spliced(play: Any, earlier: Any) -> Iterator[tuple[str, bytes]]:
    """Items for site 0 from site 1 that hold a ciphertext, or all, of another pair, direction or round."""
    own = item(play, 1, 0)
    for name, other in {
        "another sender": item(play, 2, 0),
        "another receiver": item(play, 1, 2),
        "the other direction": item(play, 0, 1),
        "an earlier round": item(earlier, 1, 0),
    }.items():
        yield f"item of {name}", other
        yield f"ciphertext of {name}", other[:CIPHERTEXT_BYTES] + own[CIPHERTEXT_BYTES:]
        yield f"box of {name}", own[:CIPHERTEXT_BYTES] + other[CIPHERTEXT_BYTES:]
        yield (
            f"commitment of {name}",
            own[:CIPHERTEXT_BYTES] + other[CIPHERTEXT_BYTES : CIPHERTEXT_BYTES + 32] + (own[CIPHERTEXT_BYTES + 32 :]),
        )


def test_nothing_of_another_pair_direction_or_round_passes() -> None:
    play, earlier = shared(2), shared(1)
    tried = 0
    for _, data in spliced(play, earlier):
        with pytest.raises(VerificationError, match="cannot be decrypted"):
            site.open_delivery(play.shared[0], with_item(play.deliveries[0], 1, data))
        tried += 1
    assert tried == 16
    # The state is not used up: the round goes on with what is genuine, and its sum is exact.
    assert exact(play, play.mask().confirm().reveal().coordinator.total())


def test_a_ciphertext_of_one_round_does_not_open_in_the_next_under_the_same_keys() -> None:
    # A site whose generator repeats makes the same keys in two rounds; the digest of the parameters is in all of them.
    one, two = (world.World(world.parameters(3, number=n), seed=b"same").advertise().share() for n in (1, 2))
    assert one.adverts[0].kem_key != two.adverts[0].kem_key
    with pytest.raises(VerificationError, match="cannot be decrypted"):
        site.open_delivery(two.shared[0], with_item(two.deliveries[0], 1, item(one, 1, 0)))


# ---- Sites that lie


def lying(monkeypatch: pytest.MonkeyPatch, play: Any, liar: int, lie: Callable[[Any, int, bytes], bytes]) -> None:
    """Take the sharing step, where `liar` makes its items with `lie(links, receiver, shares)`."""
    play.shared, play.shares = {}, {}
    honest = links._Hybrid.seal
    for i, state in play.advertised.items():
        with monkeypatch.context() as patched:
            if i == liar:
                patched.setattr(links._Hybrid, "seal", lie)
            play.shared[i], play.shares[i] = site.share(state, play.roster)
        play.coordinator.admit(world.over_the_wire(play.shares[i]))
    assert links._Hybrid.seal is honest
    play.deliveries = {i: world.over_the_wire(m) for i, m in play.coordinator.deliveries().items()}


def test_a_secret_other_than_the_one_committed_to_names_its_sender_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def lie(self: Any, other: int, shares: bytes) -> bytes:
        committed = pair_commitment(self._roster, self._me, other, self._own[other])
        return bytes(self._channels.seal(other, shares + bytes(32), committed))

    play = world.World(world.parameters(5, dropouts=2)).advertise()
    lying(monkeypatch, play, 1, lie)
    with pytest.raises(VerificationError, match="site-0001 sent this site for their common mask is not the one"):
        site.open_delivery(play.shared[0], play.deliveries[0])


def invented(self: Any, other: int, shares: bytes) -> bytes:
    """An item with a secret that does not follow from the seed, and a commitment that fits it."""
    self._own[other] = b"invented" * 4
    committed = pair_commitment(self._roster, self._me, other, self._own[other])
    return bytes(self._channels.seal(other, shares + self._own[other], committed))


@pytest.mark.parametrize("liar", [0, 2, 4])
def test_a_drop_out_whose_secrets_do_not_follow_from_its_seed_is_named(
    monkeypatch: pytest.MonkeyPatch, liar: int
) -> None:
    play = world.World(world.parameters(5, dropouts=2)).advertise()
    lying(monkeypatch, play, liar, invented)
    play.mask({liar}).confirm().reveal()
    with pytest.raises(VerificationError, match=f"secret of site-000{liar} for its common mask with") as caught:
        play.coordinator.total()
    assert f"without site-000{liar}" in (caught.value.hint or "")


def test_such_a_liar_that_stays_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    # Both ends use what was sent, so the masks cancel.
    play = world.World(world.parameters(5, dropouts=2)).advertise()
    lying(monkeypatch, play, 2, invented)
    assert exact(play, play.mask({4}).confirm().reveal().coordinator.total())


def test_a_seed_other_than_the_one_committed_to_is_found() -> None:
    play = world.World(world.parameters(4, dropouts=1)).advertise()
    play.shared = {}
    for i, state in play.advertised.items():
        play.shared[i], out = site.share(state, play.roster)
        play.coordinator.admit(signed(play, dataclasses.replace(out, seed_commitment=bytes(32))) if i == 1 else out)
    play.deliveries = play.coordinator.deliveries()
    play.mask({1}).confirm().reveal()
    with pytest.raises(VerificationError, match="secret of site-0001 cannot be reconstructed"):
        play.coordinator.total()


@pytest.mark.parametrize("dropped", [3, 2, 0])
def test_a_wrong_wrap_is_found_where_it_is_needed_and_names_its_author(dropped: int) -> None:
    # Site 1 wraps wrongly. If site 3 or 2 drops out, that wrap is needed; if site 0 does, it is not.
    play = shared()
    for i, state in play.shared.items():
        if i == dropped:
            continue
        play.words[i] = play.encoded(i)
        play.masking[i], out = site.mask(state, play.deliveries[i], play.words[i].copy(), play.journals[i])
        if i == 1:
            out = signed(
                play, dataclasses.replace(out, wraps=tuple(messages.Wrap(w.site, bytes(32)) for w in out.wraps))
            )
        play.coordinator.admit(out)
    play.survivors = play.coordinator.survivors()
    play.confirm().reveal()
    if dropped < 1:
        assert exact(play, play.coordinator.total())
        return
    with pytest.raises(VerificationError, match=f"site-0001 for its common mask with site-000{dropped} is not the one"):
        play.coordinator.total()


def test_wraps_must_be_for_the_neighbours_of_higher_number() -> None:
    play = shared()
    _, out = site.mask(play.shared[1], play.deliveries[1], play.encoded(1), play.journals[1])
    assert [wrap.site for wrap in out.wraps] == [2, 3, 4]
    for wraps in ((), out.wraps[1:], (messages.Wrap(0, bytes(32)), *out.wraps)):
        with pytest.raises(ProtocolError, match="site-0001 must send the encrypted secret of the common mask"):
            play.coordinator.admit(signed(play, dataclasses.replace(out, wraps=wraps)))
    # Nobody can change them on the way: they are signed.
    with pytest.raises(VerificationError, match="Masked message of site-0001 does not match its signature"):
        play.coordinator.admit(
            dataclasses.replace(out, wraps=tuple(messages.Wrap(w.site, bytes(32)) for w in out.wraps))
        )
    play.coordinator.admit(out)


# ---- Downgrade


def test_a_floor_refuses_the_classical_suite_unless_it_says_otherwise(suite: Suite) -> None:
    def accept(suite: Suite, **floor: Any) -> None:
        parameters = world.parameters(5, corrupt=1, suite=suite)
        site.advertise(
            world.identity(0), parameters, world.INPUTS, world.pins(5), terms.Floor(**floor), world.Drbg(b"")
        )

    accept(suite)
    accept(Suite.X25519, classical=True)
    with pytest.raises(RefusedError, match="only suites with ML-KEM-768, the coordinator proposed x25519"):
        accept(Suite.X25519)
    accept(Suite.P256_MLKEM768, fips=True)
    for other in (Suite.X25519, Suite.X25519_MLKEM768):
        with pytest.raises(RefusedError, match="only the suite p256-mlkem768"):
            accept(other, fips=True, classical=True)


def test_the_site_file_says_so_and_an_older_one_keeps_its_digest() -> None:
    assert FloorSection().terms() == terms.Floor()
    assert FloorSection(classical=True).terms() == terms.Floor(classical=True)
    assert FloorSection(fips=True).terms() == terms.Floor(fips=True)
    assert not {"classical", "fips"} & FloorSection().model_dump(mode="json").keys()
    assert FloorSection(fips=True).model_dump(mode="json")["fips"] is True
    with pytest.raises(ValidationError, match="exclude each other"):
        FloorSection(fips=True, classical=True)


@pytest.mark.parametrize("other", list(Suite), ids=lambda suite: suite.value)
def test_no_message_of_another_suite_enters_a_round(suite: Suite, other: Suite) -> None:
    # Two coordinators' proposals differ in the suite alone. A site in league signs whatever is asked of it.
    if other is suite:
        pytest.skip("the round's own suite")
    play = world.World(world.parameters(4, dropouts=1)).advertise()
    weak = world.World(world.parameters(4, dropouts=1, suite=other)).advertise()
    assert play.adverts[0].parameters != weak.adverts[0].parameters
    fresh = world.World(play.parameters)
    with pytest.raises(ProtocolError, match="other parameters"):
        fresh.coordinator.admit(weak.adverts[3])
    relabelled = signed(fresh, dataclasses.replace(weak.adverts[3], parameters=play.adverts[3].parameters))
    with pytest.raises(ProtocolError, match=f"a message of the suite {other.value}, the round has {suite.value}"):
        fresh.coordinator.admit(relabelled)
    # The coordinator is in league, too.
    roster = Roster((*play.roster.adverts[:3], relabelled))
    with pytest.raises(ProtocolError, match=f"another suite than {suite.value}"):
        site.share(play.advertised[0], roster)
    # A roster of mixed suites has no bytes either.
    with pytest.raises(ProtocolError):
        encoding.encode(roster)
    play.share()
    d = play.deliveries[0]
    size = HYBRID_SEALED_BYTES if other.hybrid else messages.SEALED_BYTES
    swapped = dataclasses.replace(d, suite=other, sealed=tuple(Sealed(s.site, bytes(size)) for s in d.sealed))
    with pytest.raises(ProtocolError, match="shares of another suite"):
        site.open_delivery(play.shared[0], world.over_the_wire(swapped))


def test_bytes_of_one_suite_are_not_bytes_of_another(suite: Suite) -> None:
    play = shared()
    sent: list[Any] = [play.parameters, play.adverts[0], play.roster, play.shares[0], play.deliveries[0]]
    for message in sent:
        data = encoding.encode(message)
        assert data[3] == suite.version
        for other in Suite:
            if other is not suite:
                changed = data[:3] + bytes([other.version]) + data[4:]
                try:
                    found: Any = encoding.decode(type(message), changed)
                except ProtocolError:
                    continue
                assert found.suite is other  # the parameters have the same fields, and another digest
                assert encoding.encode(found) == changed
        with pytest.raises(ProtocolError, match="another kind or version"):
            encoding.decode(type(message), data[:3] + b"\x04" + data[4:])
    with pytest.raises(ProtocolError):
        encoding.decode(Roster, b"PSA" + bytes([suite.version, 3]) + bytes(4))  # a roster of no suite


def test_each_message_has_exactly_one_encoding() -> None:
    play = shared().mask()
    for message in (play.shares[0], play.deliveries[1], play.masked[0], play.adverts[0]):
        kind: Any = type(message)
        data = encoding.encode(message)
        assert encoding.encode(encoding.decode(kind, data)) == data
        for cut in (*range(0, len(data), 97), len(data) - 1):
            with pytest.raises(ProtocolError):
                encoding.decode(kind, data[:cut])
        with pytest.raises(ProtocolError, match="too many"):
            encoding.decode(kind, data + b"\0")


# ---- Who drops out where


@pytest.mark.parametrize(
    "missing",
    [
        {"mask": {0}},
        {"mask": {4}},
        {"mask": {0, 4}},
        {"mask": {1, 2}},
        {"share": {0}, "mask": {3}},
        {"advertise": {4}, "mask": {0}},
        {"mask": {2}, "confirm": {0}, "reveal": {6}},
    ],
    ids=str,
)
def test_the_sum_is_exact_whoever_drops_out(missing: dict[str, set[int]]) -> None:
    # The lowest site has made all its pairs' secrets, the highest none. Of two drop-outs no mask is in the sum.
    play = world.World(world.parameters(7, dropouts=3))
    assert exact(play, play.finish(missing))


@pytest.mark.parametrize(("sites", "degree"), [(30, 0), (40, 12)])
def test_the_sum_is_exact_in_large_and_sparse_cohorts(sites: int, degree: int) -> None:
    parameters = world.parameters(
        sites, degree=degree, threshold=sites // 2 + 1 if not degree else 7, min_survivors=sites // 2 + 1
    )
    play = world.World(parameters)
    total = play.finish({"share": {11}, "mask": {0, 13, sites - 1}, "confirm": {5}, "reveal": {20}})
    assert exact(play, total)
    assert len(total.survivors) == sites - 4


# ---- What can be read


def test_what_one_drop_out_reveals_opens_none_of_the_channels_and_no_other_sites_masks() -> None:
    # 6 sites; 4 is declared dropped though its vector arrived. Its seed gives its masks, and pads of its neighbours.
    play = world.World(world.parameters(6, dropouts=2)).advertise().share().mask()
    th = play.coordinator._binding.roster
    seed = play.advertised[4].keys.seed
    opened = {i: site.open_delivery(play.shared[i], play.deliveries[i]) for i in range(6)}
    known = {masks.pair_secret(seed, th, 4, j) for j in range(6) if j != 4}
    for i in range(4):
        known.add(
            masks.exclusive_or({w.site: w.data for w in play.masked[i].wraps}[4], masks.pair_secret(seed, th, 4, i))
        )
    known.add(masks.exclusive_or({w.site: w.data for w in play.masked[4].wraps}[5], masks.pair_secret(seed, th, 4, 5)))
    learnt = {masks.pair_mask_key(secret, th, i, j) for secret in known for i in range(6) for j in range(i)}
    for i in range(6):
        for j, link in opened[i].items():
            assert (link.pair_key in learnt) == (4 in (i, j))
    # Its vector is still under its self mask, and its channel keys do not follow from the seed.
    from_seed = links.Keys(suites.private_key(world.SUITE, seed.ljust(48, b"\0")[: world.SUITE.seed_bytes]), seed, None)
    assert suites.public_bytes(from_seed.share) != play.adverts[4].share_key
    kem = MLKEM768PrivateKey.from_seed_bytes(seed * 2)
    assert kem.public_key().public_bytes_raw() != play.adverts[4].kem_key


def test_no_secret_stands_in_any_message() -> None:
    play = world.World(world.parameters(5, dropouts=2))
    play.finish({"mask": {3}})
    sent = b"".join(
        encoding.encode(message)
        for name in ("adverts", "shares", "deliveries", "masked", "survivors", "confirms", "proofs", "reveals")
        for message in getattr(play, name).values()
    )
    th = play.coordinator._binding.roster
    for i in range(5):
        keys = play.advertised[i].keys
        assert keys.seed not in sent
        for j in set(range(5)) - {i}:
            assert masks.pair_secret(keys.seed, th, i, j) not in sent
    assert repr(suites.Encapsulated(b"secret", b"")) == "<Encapsulated>"
    assert "bytes" not in repr(play.advertised[0].keys)
