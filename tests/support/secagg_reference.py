"""A second implementation of `privet-secagg/1`, from docs/secure-aggregation.md, in plain integers.

It shares no code with privet and uses no cryptographic package: X25519 (RFC 7748), Ed25519 (RFC 8032),
AES-256 with its GCM and CTR modes, HKDF (RFC 5869) and Shamir's sharing are written out, slowly. `transcript`
plays a whole round and returns every message; the files in tests/vectors/secagg/ are its output:

    python tests/support/secagg_reference.py

writes them anew.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import math
import struct
from pathlib import Path
from typing import Any

VECTORS = Path(__file__).parents[1] / "vectors" / "secagg"


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def be(value: int, width: int) -> bytes:
    return value.to_bytes(width, "big")


# ---- HKDF, RFC 5869


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    key = hmac.new(salt, secret, "sha256").digest()
    out, block = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.new(key, block + info + bytes([counter]), "sha256").digest()
        out += block
    return out[:length]


# ---- X25519, RFC 7748 section 5

Q = 2**255 - 19


@functools.cache
def x25519(private: bytes, public: bytes = be(9, 32)[::-1]) -> bytes:
    scalar = int.from_bytes(private, "little")
    scalar = scalar & ~7 & ((1 << 254) - 1) | 1 << 254
    u = int.from_bytes(public, "little") % 2**255
    x2, z2, x3, z3, swap = 1, 0, u, 1, 0
    for t in range(254, -1, -1):
        bit = scalar >> t & 1
        if swap ^ bit:
            x2, z2, x3, z3 = x3, z3, x2, z2
        swap = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a, b * b, d * a, c * b
        e = aa - bb
        x3, z3 = (da + cb) ** 2 % Q, u * (da - cb) ** 2 % Q
        x2, z2 = aa * bb % Q, e * (aa + 121665 * e) % Q
    if swap:
        x2, z2 = x3, z3
    result = x2 * pow(z2, Q - 2, Q) % Q
    if result == 0:
        raise ValueError("low order")
    return result.to_bytes(32, "little")


# ---- Ed25519, RFC 8032 section 5.1, in affine coordinates

ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, Q) % Q
BASE_Y = 4 * pow(5, -1, Q) % Q
Point = tuple[int, int]


def _base() -> Point:
    xx = (BASE_Y**2 - 1) * pow(D * BASE_Y**2 + 1, -1, Q) % Q
    x = pow(xx, (Q + 3) // 8, Q)
    if x * x % Q != xx:
        x = x * pow(2, (Q - 1) // 4, Q) % Q
    return (x if x % 2 == 0 else Q - x), BASE_Y


BASE = _base()


def _add(p: Point, q: Point) -> Point:
    (x1, y1), (x2, y2) = p, q
    k = D * x1 * x2 * y1 * y2 % Q
    inverse = pow(1 - k * k, -1, Q)  # of (1 + k) (1 - k)
    return (x1 * y2 + x2 * y1) * (1 - k) * inverse % Q, (y1 * y2 + x1 * x2) * (1 + k) * inverse % Q


@functools.cache
def _times(scalar: int) -> bytes:
    result, power = (0, 1), BASE
    while scalar:
        if scalar & 1:
            result = _add(result, power)
        power, scalar = _add(power, power), scalar >> 1
    x, y = result
    return (y | (x & 1) << 255).to_bytes(32, "little")


def _expand(seed: bytes) -> tuple[int, bytes]:
    h = hashlib.sha512(seed).digest()
    return int.from_bytes(h[:32], "little") & ~7 & ((1 << 254) - 1) | 1 << 254, h[32:]


def ed25519_public(seed: bytes) -> bytes:
    return _times(_expand(seed)[0])


def ed25519_sign(seed: bytes, message: bytes) -> bytes:
    scalar, prefix = _expand(seed)
    r = int.from_bytes(hashlib.sha512(prefix + message).digest(), "little") % ORDER
    point = _times(r)
    k = int.from_bytes(hashlib.sha512(point + _times(scalar) + message).digest(), "little")
    return point + ((r + k * scalar) % ORDER).to_bytes(32, "little")


# ---- AES-256, FIPS 197; CTR, SP 800-38A; GCM, SP 800-38D


def _gmul(a: int, b: int) -> int:
    result = 0
    while b:
        if b & 1:
            result ^= a
        a, b = (a << 1) ^ (0x11B if a & 0x80 else 0), b >> 1
    return result


def _sbox(byte: int) -> int:
    inverse = 1
    for _ in range(254):  # the group has 255 elements, so x^254 is the inverse of x
        inverse = _gmul(inverse, byte)
    result = 0x63
    for shift in range(5):
        result ^= (inverse << shift | inverse >> (8 - shift)) & 0xFF
    return result


SBOX = [_sbox(byte) for byte in range(256)]
TIMES = {factor: [_gmul(byte, factor) for byte in range(256)] for factor in (2, 3)}


@functools.cache
def _round_keys(key: bytes) -> list[bytes]:
    words = [key[4 * i : 4 * i + 4] for i in range(8)]
    constant = 1
    for i in range(8, 60):
        word = words[-1]
        if i % 8 == 0:
            word = bytes(SBOX[b] for b in word[1:] + word[:1])
            word = bytes([word[0] ^ constant]) + word[1:]
            constant = _gmul(constant, 2)
        elif i % 8 == 4:
            word = bytes(SBOX[b] for b in word)
        words.append(bytes(a ^ b for a, b in zip(word, words[i - 8], strict=True)))
    return [b"".join(words[4 * i : 4 * i + 4]) for i in range(15)]


def _aes(keys: list[bytes], block: bytes) -> bytes:
    state = [a ^ b for a, b in zip(block, keys[0], strict=True)]
    for number in range(1, 15):
        state = [SBOX[state[(i + 4 * (i % 4)) % 16]] for i in range(16)]
        if number < 14:
            two, three = TIMES[2], TIMES[3]
            mixed = []
            for c in range(0, 16, 4):
                s = state[c : c + 4]
                mixed += [two[s[r]] ^ three[s[(r + 1) % 4]] ^ s[(r + 2) % 4] ^ s[(r + 3) % 4] for r in range(4)]
            state = mixed
        state = [a ^ b for a, b in zip(state, keys[number], strict=True)]
    return bytes(state)


def aes_ctr(key: bytes, counter: int, length: int) -> bytes:
    keys = _round_keys(key)
    blocks = -(-length // 16)
    return b"".join(_aes(keys, be((counter + i) % 2**128, 16)) for i in range(blocks))[:length]


def aes_gcm_seal(key: bytes, plain: bytes, bound: bytes) -> bytes:
    keys = _round_keys(key)
    h = int.from_bytes(_aes(keys, bytes(16)), "big")
    first = 1  # the counter block of a 12-byte zero nonce
    cipher = bytes(a ^ b for a, b in zip(plain, aes_ctr(key, first + 1, len(plain)), strict=True))

    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 16)

    hashed = padded(bound) + padded(cipher) + be(8 * len(bound), 8) + be(8 * len(cipher), 8)
    y = 0
    for at in range(0, len(hashed), 16):
        v, z = h, 0
        y ^= int.from_bytes(hashed[at : at + 16], "big")
        for bit in range(127, -1, -1):
            if y >> bit & 1:
                z ^= v
            v = v >> 1 ^ (0xE1 << 120 if v & 1 else 0)
        y = z
    return cipher + be(y ^ int.from_bytes(_aes(keys, be(first, 16)), "big"), 16)


# ---- Shamir

P = 2**256 + 297


def share_out(secret: bytes, points: list[int], coefficients: list[int]) -> list[bytes]:
    t = len(coefficients) + 1
    constant = int.from_bytes(secret, "big")
    return [be((constant + sum(c * x ** (t - 1 - i) for i, c in enumerate(coefficients))) % P, 33) for x in points]


def reconstruct(shares: dict[int, bytes]) -> bytes:
    total = 0
    for x, share in shares.items():
        num = math.prod(other for other in shares if other != x)
        den = math.prod(other - x for other in shares if other != x)
        total += int.from_bytes(share, "big") * num * pow(den, -1, P)
    return be(total % P, 32)


# ---- The protocol


def digest(purpose: str, data: bytes) -> bytes:
    return sha(b"privet-secagg/1 " + purpose.encode() + b"\0" + data)


def kdf(secret: bytes, th: bytes, purpose: str, *numbers: int, length: int = 32) -> bytes:
    info = b"privet-secagg/1 " + purpose.encode() + b"\0" + b"".join(be(n, 4) for n in numbers)
    return hkdf(secret, th, info, length)


STEPS = ("advertise", "share", "mask", "confirm", "reveal")


class Random:
    """The case's reproducible bytes for one site: SHA-256(seed || counter u64), one block after the other."""

    def __init__(self, seed: bytes) -> None:
        self.seed, self.used, self.left = seed, 0, b""

    def take(self, count: int) -> bytes:
        while len(self.left) < count:
            self.left += sha(self.seed + be(self.used, 8))
            self.used += 1
        result, self.left = self.left[:count], self.left[count:]
        return result


def single(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def lane_width(bits: int, sites: int) -> int:
    needed = bits + math.ceil(math.log2(sites))
    return 64 // (64 // needed)


def quantised(case: dict[str, Any], site: int, key: bytes) -> list[int]:
    """The numbers of a site's vector, then packed into words."""
    bits, n = case["bits"], len(case["cohort"])
    f, level = min(16, 32 - bits), 2 ** (bits - 1) - 1
    plan: list[tuple[str, Any, float]] = []
    for segment in case["segments"]:
        values = case["values"][site][segment["name"]]
        if segment["count"]:
            digits = -(-int(segment["bound"]).bit_length() // bits)
            plan += [("count", v >> bits * digit & 2**bits - 1, 0.0) for digit in range(digits) for v in values]
        else:
            plan += [("real", v, segment["bound"]) for v in values]
    width = lane_width(bits, n)
    m = -(-len(plan) // (64 // width))
    words = [0] * m
    for number, (kind, value, bound) in enumerate(plan):
        lane, word = divmod(number, m)
        if kind == "real":
            stream = aes_ctr(key, lane << 64, 2 * word + 2)
            u = (stream[-2] | stream[-1] << 8) >> 16 - f
            # Both factors have 24 bits: their product is exact in double precision before it becomes single.
            z = round(single(single(value) * single(level * 2**f / bound)))
            value = (max(-level << f, min(level << f, z)) + u >> f) + level
        words[word] |= value << lane * width
    return words


def pad(key: bytes, words: int) -> list[int]:
    stream = aes_ctr(key, 0, 8 * words)
    return [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(words)]


def ring_neighbours(th: bytes, sites: list[int], degree: int) -> dict[int, list[int]]:
    n = len(sites)
    if degree == 0 or degree >= n - 1:
        return {i: [j for j in sites if j != i] for i in sites}
    ring = sorted(sites, key=lambda i: sha(b"privet-secagg/1 ring" + th + be(i, 2)))
    steps = [s for s in range(-degree // 2, degree // 2 + 1) if s]
    return {i: sorted(ring[(p + s) % n] for s in steps) for p, i in enumerate(ring)}


def listed(items: list[bytes]) -> bytes:
    return be(len(items), 4) + b"".join(items)


def transcript(case: dict[str, Any]) -> dict[str, Any]:
    """Play the round of `case` and return all messages by kind and site, and the sum's words."""
    n, t, r = len(case["cohort"]), case["threshold"], case["round"]
    session = bytes.fromhex(case["session"])
    seeds = [bytes.fromhex(member["identity_seed"]) for member in case["cohort"]]
    random = [Random(bytes.fromhex(member["random_seed"])) for member in case["cohort"]]
    missing = {step: set(case["missing"].get(step, [])) for step in ("advertise", "share", "mask", "confirm", "reveal")}
    out: dict[str, Any] = {}

    def header(number: int) -> bytes:
        return b"PSA" + bytes([1, number])

    def text(value: str) -> bytes:
        return bytes([len(value)]) + value.encode()

    parameters = header(1) + session + be(r, 8) + bytes.fromhex(case["inputs"])
    parameters += listed(
        [text(m["name"]) + ed25519_public(seed) for m, seed in zip(case["cohort"], seeds, strict=True)]
    )
    parameters += be(case["degree"], 2) + be(t, 2) + be(case["corrupt"], 2) + be(case["security"], 1)
    parameters += be(case["min_survivors"], 2) + be(case["bits"], 1)
    parameters += listed(
        [
            text(s["name"]) + be(s["size"], 4) + struct.pack(">d", s["bound"]) + bytes([s["count"]])
            for s in case["segments"]
        ]
    )
    ph = digest("parameters", parameters)
    out["parameters"] = parameters

    def sign(i: int, number: int, th: bytes, body: bytes) -> bytes:
        head = b"privet-secagg/1 message\0" + bytes([number]) + session + be(r, 8) + ph + th
        return ed25519_sign(seeds[i], head + body)

    # Advertise
    u1 = [i for i in range(n) if i not in missing["advertise"]]
    share_key, mask_seed, adverts = {}, {}, {}
    for i in u1:
        share_key[i], mask_seed[i] = random[i].take(32), random[i].take(32)
        body = ph + be(i, 2) + x25519(share_key[i]) + x25519(mask_seed[i]) + random[i].take(16)
        adverts[i] = body + sign(i, 2, bytes(32), body)
    out["advertise"] = {i: header(2) + adverts[i] for i in u1}
    roster = header(3) + listed([adverts[i] for i in u1])
    th = digest("roster", ph + roster)
    out["roster"] = roster
    public = {i: (adverts[i][34:66], adverts[i][66:98]) for i in u1}

    # Share
    u2 = [i for i in u1 if i not in missing["share"]]
    near = ring_neighbours(th, u1, case["degree"])
    sealed: dict[tuple[int, int], bytes] = {}
    held: dict[tuple[int, int], tuple[bytes, bytes]] = {}  # (owner, holder)
    self_seed, commitments = {}, {}
    out["shares"] = {}

    def channel(i: int, j: int) -> tuple[bytes, bytes]:
        keys = kdf(x25519(share_key[i], public[j][0]), th, "channels", min(i, j), max(i, j), length=128)
        own = keys[:64] if i < j else keys[64:]
        return own[:32], own[32:]

    for i in u2:
        self_seed[i] = random[i].take(32)
        holders = sorted([*near[i], i])
        dealt = []
        for secret in (self_seed[i], mask_seed[i]):
            coefficients = [int.from_bytes(random[i].take(48), "big") % P for _ in range(t - 1)]
            dealt.append(share_out(secret, [j + 1 for j in holders], coefficients))
        for j, b, s in zip(holders, *dealt, strict=True):
            held[i, j] = (b, s)
            if j != i:
                sealed[i, j] = aes_gcm_seal(channel(i, j)[0], b + s, th + be(i, 2) + be(j, 2))
        commitments[i] = digest("commitment", th + be(i, 2) + self_seed[i])
        body = th + be(i, 2) + commitments[i] + listed([be(j, 2) + sealed[i, j] for j in near[i]])
        out["shares"][i] = header(4) + body + sign(i, 4, th, body)
    out["delivery"] = {
        i: header(5)
        + th
        + be(i, 2)
        + listed([be(j, 2) for j in u2])
        + listed([be(j, 2) + sealed[j, i] for j in near[i] if j in u2])
        for i in u2
    }

    # Mask
    u2h = digest("sharers", th + b"".join(be(j, 2) for j in u2))
    u3 = [i for i in u2 if i not in missing["mask"]]
    plain, masked, out["masked"] = {}, {}, {}

    def pair_key(i: int, j: int) -> bytes:
        return kdf(x25519(mask_seed[i], public[j][1]), th, "pair mask", min(i, j), max(i, j), 0)

    def tag(i: int, j: int, what: bytes) -> bytes:
        return hmac.new(channel(i, j)[1], th + be(i, 2) + be(j, 2) + what, "sha256").digest()[:16]

    for i in u3:
        plain[i] = quantised(case, i, random[i].take(32))
        m = len(plain[i])
        y = [a + b for a, b in zip(plain[i], pad(kdf(self_seed[i], th, "self mask", i, 0), m), strict=True)]
        for j in near[i]:
            if j in u2:
                sign_of = 1 if j > i else -1
                y = [a + sign_of * b for a, b in zip(y, pad(pair_key(i, j), m), strict=True)]
        masked[i] = [a % 2**64 for a in y]
        body = th + be(i, 2) + u2h
        tags = listed([be(j, 2) + tag(i, j, u2h) for j in near[i] if j in u2])
        words = b"".join(a.to_bytes(8, "little") for a in masked[i])
        out["masked"][i] = header(6) + body + tags + sign(i, 6, th, body) + be(m, 4) + words
    out["survivors"] = {
        i: header(7)
        + th
        + be(i, 2)
        + listed([be(j, 2) for j in u3])
        + listed([be(j, 2) + tag(j, i, u2h) for j in near[i] if j in u3])
        for i in u3
    }

    # Confirm
    lists = digest("lists", u2h + b"".join(be(j, 2) for j in u3))
    u4 = [i for i in u3 if i not in missing["confirm"]]
    signature, out["confirm"], out["proof"] = {}, {}, {}
    for i in u4:
        body = th + be(i, 2) + lists
        signature[i] = sign(i, 8, th, body)
        tags = listed([be(j, 2) + tag(i, j, lists) for j in near[i] if j in u3])
        out["confirm"][i] = header(8) + body + tags + signature[i]
    q = (n + case["corrupt"]) // 2 + 1
    for i in u4:
        peers = [j for j in near[i] if j in u4]
        others = [j for j in u4 if j != i and j not in peers][: max(0, q - 1 - len(peers))]
        out["proof"][i] = header(9) + th + be(i, 2) + listed([be(j, 2) + tag(j, i, lists) for j in peers])
        out["proof"][i] += listed([th + be(j, 2) + lists + be(0, 4) + signature[j] for j in others])

    # Reveal
    u5 = [i for i in u4 if i not in missing["reveal"]]
    out["reveal"] = {}
    revealed: dict[int, dict[int, bytes]] = {j: {} for j in u2}
    for i in u5:
        owners = [j for j in sorted([*near[i], i]) if j in u2]
        for j in owners:
            revealed[j][i + 1] = held[j, i][0 if j in u3 else 1]
        body = th + be(i, 2) + lists + listed([be(j, 2) + revealed[j][i + 1] for j in owners])
        out["reveal"][i] = header(10) + body + sign(i, 10, th, body)

    # Unmask
    m = len(masked[u3[0]])
    total = [sum(masked[i][w] for i in u3) for w in range(m)]
    for j in u2:
        secret = reconstruct(dict(list(revealed[j].items())[-t:]))
        if j in u3:
            if digest("commitment", th + be(j, 2) + secret) != commitments[j]:
                raise ValueError("wrong self mask seed")
            total = [a - b for a, b in zip(total, pad(kdf(secret, th, "self mask", j, 0), m), strict=True)]
        else:
            for i in near[j]:
                if i in u3:
                    key = kdf(x25519(secret, public[i][1]), th, "pair mask", min(i, j), max(i, j), 0)
                    sign_of = 1 if j > i else -1
                    total = [a - sign_of * b for a, b in zip(total, pad(key, m), strict=True)]
    total = [a % 2**64 for a in total]
    if total != [sum(plain[i][w] for i in u3) % 2**64 for w in range(m)]:
        raise ValueError("the sum is wrong")
    out["total"] = b"".join(a.to_bytes(8, "little") for a in total)
    return out


def summary(messages: dict[str, Any], *, full: bool) -> dict[str, Any]:
    """Messages as hexadecimal, or as the SHA-256 of each."""

    def show(data: bytes) -> str:
        return data.hex() if full else sha(data).hex()

    return {
        kind: show(value) if isinstance(value, bytes) else {str(i): show(data) for i, data in value.items()}
        for kind, value in messages.items()
    }


def make_case(name: str, n: int, missing: dict[str, list[int]], **changes: Any) -> dict[str, Any]:
    numbers = Random(b"values of " + name.encode())

    def real() -> float:
        return (int.from_bytes(numbers.take(2), "big") - 2**15) / 2**14  # -2 to 2, exact in single precision

    case: dict[str, Any] = {
        "about": "generated by tests/support/secagg_reference.py",
        "session": sha(b"session " + name.encode()).hex(),
        "round": 2**40 + n,
        "inputs": sha(b"inputs " + name.encode()).hex(),
        "cohort": [
            {
                "name": f"site-{i:02d}",
                "identity_seed": sha(b"identity %d" % i).hex(),
                "random_seed": sha(b"random %d " % i + name.encode()).hex(),
            }
            for i in range(n)
        ],
        "degree": 0,
        "threshold": n // 2 + 1,
        "corrupt": 0,
        "security": 80,
        "min_survivors": n // 2 + 1,
        "bits": 16,
        "segments": [
            {"name": "examples", "size": 1, "bound": 70000.0, "count": True},
            {"name": "update", "size": 9, "bound": 1.5, "count": False},
            {"name": "loss", "size": 1, "bound": 100.0, "count": False},
        ],
        "missing": missing,
        **changes,
    }
    case["values"] = [
        {"examples": [1000 * i + 7], "update": [real() for _ in range(9)], "loss": [real()]} for i in range(n)
    ]
    return case


CASES = {
    "three-sites": ({"n": 3, "missing": {}}, True),
    "five-sites-one-drops": (
        {"n": 5, "missing": {"mask": [1]}, "corrupt": 1, "threshold": 4, "min_survivors": 4},
        False,
    ),
    "every-stage-loses-one": (
        {
            "n": 12,
            "missing": {"advertise": [9], "share": [0], "mask": [4], "confirm": [2], "reveal": [7]},
            "bits": 20,
        },
        False,
    ),
    "ring-of-nine": (
        {"n": 9, "missing": {"mask": [3], "reveal": [5]}, "degree": 4, "threshold": 3, "bits": 14},
        False,
    ),
}


if __name__ == "__main__":
    VECTORS.mkdir(parents=True, exist_ok=True)
    for name, (arguments, full) in CASES.items():
        case = make_case(name, **arguments)  # type: ignore[arg-type]
        case["full"] = full
        case["messages"] = summary(transcript(case), full=full)
        (VECTORS / f"{name}.json").write_text(json.dumps(case, indent=1) + "\n")
