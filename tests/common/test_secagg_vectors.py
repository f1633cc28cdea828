"""The implementation and the reference in plain integers agree on whole transcripts, byte for byte."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey

from privet.common.secagg import block, dealt, encoding, masks, messages, quantize, site, suites
from privet.common.secagg.block_sums import BlockAggregator
from privet.common.secagg.coordinator import Aggregator
from privet.common.secagg.dealt_sums import DealtAggregator
from privet.common.secagg.quantize import Segment
from privet.common.secagg.suites import Suite
from privet.common.secagg.terms import Floor

HERE = Path(__file__).parents[1]
VECTORS = sorted((HERE / "vectors" / "secagg").glob("*.json"))


reference = importlib.import_module("tests.support.secagg_reference")


def drawn(step: Callable[..., Any], state: Any, roster: messages.Roster, random: Callable[[int], bytes]) -> Any:
    """Take the step with ciphertexts that follow from `random`: `cryptography` makes no reproducible ones."""

    def encapsulate(public: bytes, *, whose: str) -> suites.Encapsulated:
        return suites.Encapsulated(*reference.mlkem_encapsulate(public, random(32)))

    with mock.patch.object(suites, "encapsulate", encapsulate):
        return step(state, roster)


FLOOR = Floor(cohort=2, survivors=2, threshold=1, corrupt=0, corrupt_fraction=0, classical=True)


class Cast:
    """The sites of a case, with their random bytes and the parameters."""

    def __init__(self, case: dict[str, Any]) -> None:
        seeds = [bytes.fromhex(member["identity_seed"]) for member in case["cohort"]]
        self.case = case
        self.who = [
            site.Identity(member["name"], Ed25519PrivateKey.from_private_bytes(seed))
            for member, seed in zip(case["cohort"], seeds, strict=True)
        ]
        self.random = [reference.Random(bytes.fromhex(member["random_seed"])).take for member in case["cohort"]]
        self.pins = {one.name: one.key.public_key().public_bytes_raw() for one in self.who}
        self.parameters = messages.Parameters(
            session=bytes.fromhex(case["session"]),
            round=case["round"],
            inputs=bytes.fromhex(case["inputs"]),
            cohort=tuple(messages.CohortMember(name, key) for name, key in self.pins.items()),
            degree=case["degree"],
            threshold=case["threshold"],
            corrupt=case["corrupt"],
            security=case["security"],
            min_survivors=case["min_survivors"],
            bits=case["bits"],
            segments=tuple(Segment(**segment) for segment in case["segments"]),
            suite=Suite(case.get("suite", "x25519")),
        )
        kind = {"block": messages.BlockParameters, "dealt": messages.DealtParameters}.get(reference.kind_of(case))
        if kind is not None:
            self.parameters = kind(**vars(self.parameters), rounds=case["rounds"])

    def advertise(self, i: int) -> Any:
        parameters = self.parameters
        return site.advertise(self.who[i], parameters, parameters.inputs, self.pins, FLOOR, self.random[i])

    def words(self, i: int) -> Any:
        chosen = {name: np.array(value) for name, value in self.case["values"][i].items()}
        return quantize.quantise(self.parameters.layout, chosen, self.random[i]).words


def play(case: dict[str, Any]) -> dict[str, Any]:
    """Play the case with the product's code."""
    return {"round": play_round, "block": play_block, "dealt": play_dealt}[reference.kind_of(case)](Cast(case))


def play_round(cast: Cast) -> dict[str, Any]:
    case, random, parameters = cast.case, cast.random, cast.parameters
    missing = {step: set(case["missing"].get(step, [])) for step in ("advertise", "share", "mask", "confirm", "reveal")}
    out: dict[str, Any] = {"parameters": encoding.encode(parameters)}
    coordinator = Aggregator(parameters)
    states: dict[int, Any] = {}
    message: Any

    def send(kind: str, i: int, message: Any) -> None:
        coordinator.admit(message)
        out.setdefault(kind, {})[i] = encoding.encode(message)

    for i in range(len(cast.who)):
        if i not in missing["advertise"]:
            states[i], message = cast.advertise(i)
            send("advertise", i, message)
    roster = coordinator.roster()
    out["roster"] = encoding.encode(roster)
    for i in sorted(states.keys() - missing["share"]):
        states[i], message = drawn(site.share, states[i], roster, random[i])
        send("shares", i, message)
    deliveries = coordinator.deliveries()
    out["delivery"] = {i: encoding.encode(message) for i, message in deliveries.items()}
    for i in sorted(deliveries.keys() - missing["mask"]):
        states[i], message = site.mask(states[i], deliveries[i], cast.words(i), lambda entry: None)
        send("masked", i, message)
    survivors = coordinator.survivors()
    out["survivors"] = {i: encoding.encode(message) for i, message in survivors.items()}
    for i in sorted(survivors.keys() - missing["confirm"]):
        states[i], message = site.confirm(states[i], survivors[i])
        send("confirm", i, message)
    proofs = coordinator.proofs()
    out["proof"] = {i: encoding.encode(message) for i, message in proofs.items()}
    for i in sorted(proofs.keys() - missing["reveal"]):
        send("reveal", i, site.reveal(states[i], proofs[i], lambda entry: None))
    out["total"] = coordinator.total().words.tobytes()
    return out


def play_block(cast: Cast) -> dict[str, Any]:
    case, sites = cast.case, range(len(cast.who))
    assert isinstance(cast.parameters, messages.BlockParameters)
    coordinator = BlockAggregator(cast.parameters)
    out: dict[str, Any] = {"parameters": encoding.encode(cast.parameters)}

    def send(kind: str, i: int, message: Any) -> None:
        coordinator.admit(message)
        out.setdefault(kind, {})[i] = encoding.encode(message)

    states: dict[int, Any] = {}
    for i in sites:
        states[i], message = cast.advertise(i)
        send("advertise", i, message)
    roster = coordinator.roster()
    out["roster"] = encoding.encode(roster)
    for i in sites:
        states[i], message = drawn(block.link, states[i], roster, cast.random[i])
        send("links", i, message)
    deliveries = coordinator.deliveries()
    out["link_delivery"] = {i: encoding.encode(delivery) for i, delivery in deliveries.items()}
    for i in sites:
        states[i], message = block.join(states[i], deliveries[i])
        send("joined", i, message)
    digests = [bytes.fromhex(each) for each in (case["inputs"], *case["later_inputs"])]
    for number, inputs in zip(case["played"], digests, strict=True):
        out["step"] = encoding.encode(coordinator.begin(number, inputs))
        for i in sites:
            masked = states[i].mask(number, inputs, cast.words(i), lambda entry: None)
            send(f"masked of round {number}", i, masked)
        out[f"total of round {number}"] = coordinator.total().words.tobytes()
    return out


def play_dealt(cast: Cast) -> dict[str, Any]:
    case, everyone = cast.case, range(len(cast.who))
    assert isinstance(cast.parameters, messages.DealtParameters)
    coordinator = DealtAggregator(cast.parameters)
    out: dict[str, Any] = {"parameters": encoding.encode(cast.parameters)}
    missing = {step: set(case["missing"].get(step, [])) for step in ("advertise", "deal", "join")}

    def send(kind: str, i: int, message: Any) -> None:
        coordinator.admit(message)
        out.setdefault(kind, {})[i] = encoding.encode(message)

    def all_of(kind: str, sent: dict[int, Any]) -> dict[int, Any]:
        out[kind] = {i: encoding.encode(message) for i, message in sent.items()}
        return sent

    states: dict[int, Any] = {}
    for i in set(everyone) - missing["advertise"]:
        states[i], message = cast.advertise(i)
        send("advertise", i, message)
    roster = coordinator.roster()
    out["roster"] = encoding.encode(roster)
    for i in sorted(states.keys() - missing["deal"]):
        states[i], message = drawn(dealt.deal, states[i], roster, cast.random[i])
        send("deal", i, message)
    deliveries = all_of("deal_delivery", coordinator.deliveries())
    for i in sorted(deliveries.keys() - missing["join"]):
        states[i], message = dealt.join(states[i], deliveries[i])
        send("joined", i, message)
    digests = [bytes.fromhex(each) for each in (case["inputs"], *case["later_inputs"])]
    for number, inputs in zip(case["played"], digests, strict=True):
        name, drops = f" of round {number}", case["drops"].get(str(number), {})
        expected = coordinator.begin(number, inputs)
        out["expected" + name] = encoding.encode(expected)
        for i in sorted(set(expected.sites) - set(drops.get("mask", []))):
            masked = states[i].mask(number, inputs, expected.sites, cast.words(i), lambda entry: None)
            send("masked" + name, i, masked)
        if coordinator.complete:
            asked, answer = all_of("finish" + name, coordinator.finishes()), "finish"
        else:
            for i, message in all_of("survivors" + name, coordinator.survivors()).items():
                if i not in drops.get("confirm", []):
                    send("confirm" + name, i, states[i].confirm(message, lambda entry: None))
            asked, answer = all_of("proof" + name, coordinator.proofs()), "reveal"
        for i, message in asked.items():
            if i not in drops.get("reveal", []):
                send("reveal" + name, i, getattr(states[i], answer)(message, lambda entry: None))
        out["total" + name] = coordinator.total().words.tobytes()
    return out


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_the_product_reproduces_the_committed_transcript(path: Path) -> None:
    case = json.loads(path.read_text())
    assert reference.summary(play(case), full=case["full"]) == case["messages"]


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_the_reference_reproduces_the_committed_transcript(path: Path) -> None:
    case = json.loads(path.read_text())
    assert reference.summary(reference.transcript(case), full=case["full"]) == case["messages"]


def test_there_is_a_vector_for_every_case() -> None:
    assert [path.stem for path in VECTORS] == sorted([*reference.CASES, *reference.BLOCKS, *reference.DEALT])


def test_hkdf_and_aes_streams_have_known_values() -> None:
    # RFC 5869, test case 1.
    okm = reference.hkdf(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)
    assert okm.hex().startswith("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf")
    # AES-256-CTR from counter 0 is the encryption of 0, 1, ...; this is its first word for the key 00..1f.
    words = np.zeros(3, quantize.WORD)
    masks.apply(words, [bytes(range(32))], [])
    assert int(words[0]) == 0xD09F492AB60090F2
    assert words.tobytes() == reference.aes_ctr(bytes(range(32)), 0, 24)
    # FIPS 197, appendix C.3.
    keys = reference._round_keys(bytes(range(32)))
    block = bytes.fromhex("00112233445566778899aabbccddeeff")
    assert reference._aes(keys, block).hex() == "8ea2b7ca516745bfeafc49904b496089"


def test_reference_curves_have_known_values() -> None:
    # RFC 7748, section 5.2, one iteration; RFC 8032, section 7.1, test 1.
    nine = (9).to_bytes(32, "little")
    assert reference.x25519(nine, nine).hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert reference.ed25519_public(seed).hex() == public
    key = Ed25519PrivateKey.from_private_bytes(seed)
    assert reference.ed25519_sign(seed, b"privet") == key.sign(b"privet")


def test_the_reference_and_the_library_agree_on_ml_kem_and_p256() -> None:
    seed = bytes(range(64))
    key = MLKEM768PrivateKey.from_seed_bytes(seed)
    public, private = reference.mlkem_keys(seed)
    assert key.public_key().public_bytes_raw() == public
    secret, ciphertext = reference.mlkem_encapsulate(public, bytes(32))
    assert suites.decapsulate(key, ciphertext) == secret == reference.mlkem_decapsulate(private, ciphertext)
    sent = suites.encapsulate(public, whose="x")
    assert reference.mlkem_decapsulate(private, sent.ciphertext) == sent.secret
    # Implicit rejection: another ciphertext gives another secret, the same at both.
    changed = bytes([ciphertext[0] ^ 1]) + ciphertext[1:]
    assert secret != suites.decapsulate(key, changed) == reference.mlkem_decapsulate(private, changed)
    one = suites.private_key(Suite.P256_MLKEM768, b"1" * 48)
    scalar = 1 + int.from_bytes(b"1" * 48, "big") % (reference.N256 - 1)
    other = suites.public_bytes(suites.private_key(Suite.P256_MLKEM768, b"2" * 48))
    assert suites.public_bytes(one) == reference.p256(scalar)
    assert suites.agree(one, other, whose="x") == reference.p256(scalar, other)[1:33]
