"""A second implementation of `privet-secagg/1` and of blocks, from docs/secure-aggregation.md, in plain integers.

It shares no code with privet and uses no cryptographic package: X25519 (RFC 7748), P-256 (SP 800-186), ML-KEM-768
(FIPS 203), Ed25519 (RFC 8032), AES-256 with its GCM and CTR modes, HKDF (RFC 5869) and Shamir's sharing are written
out, slowly. Each `m` of ML-KEM's encapsulation is drawn from the site's random bytes, before the seed of the self
mask where there is one, for the neighbours in ascending order. `transcript` plays a whole round, or a block of rounds,
and returns every message; the files in tests/vectors/secagg/ are its output:

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


# ---- P-256, SP 800-186 section 3.2.1.3, in affine coordinates

FIELD = 2**256 - 2**224 + 2**192 + 2**96 - 1
N256 = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
G256: Point = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)


def _sum256(p: Point | None, q: Point | None) -> Point | None:
    if p is None or q is None:
        return p or q
    if p[0] == q[0] and (p[1] + q[1]) % FIELD == 0:
        return None
    slope = (
        (3 * p[0] ** 2 - 3) * pow(2 * p[1], -1, FIELD) if p == q else (q[1] - p[1]) * pow(q[0] - p[0], -1, FIELD)
    ) % FIELD
    x = (slope**2 - p[0] - q[0]) % FIELD
    return x, (slope * (p[0] - x) - p[1]) % FIELD


@functools.cache
def p256(scalar: int, public: bytes | None = None) -> bytes:
    """The point that is `scalar` times `public` or the base: 0x04, x and y."""
    power: Point | None = G256 if public is None else (be_int(public[1:33]), be_int(public[33:]))
    result: Point | None = None
    while scalar:
        if scalar & 1:
            result = _sum256(result, power)
        power, scalar = _sum256(power, power), scalar >> 1
    if result is None:
        raise ValueError("the point at infinity")
    return b"\x04" + be(result[0], 32) + be(result[1], 32)


def be_int(data: bytes) -> int:
    return int.from_bytes(data, "big")


# ---- ML-KEM-768, FIPS 203. Algorithm numbers are those of the standard. A polynomial is a list of 256 integers.

KQ, K3 = 3329, 3
Poly = list[int]


def _reversed7(i: int) -> int:
    return int(f"{i:07b}"[::-1], 2)


ZETAS = [pow(17, _reversed7(i), KQ) for i in range(128)]
GAMMAS = [pow(17, 2 * _reversed7(i) + 1, KQ) for i in range(128)]


def _ntt(f: Poly) -> Poly:  # algorithm 9
    f, i, length = list(f), 1, 128
    while length >= 2:
        for start in range(0, 256, 2 * length):
            zeta, i = ZETAS[i], i + 1
            for j in range(start, start + length):
                t = zeta * f[j + length] % KQ
                f[j + length], f[j] = (f[j] - t) % KQ, (f[j] + t) % KQ
        length //= 2
    return f


def _inverse_ntt(f: Poly) -> Poly:  # algorithm 10
    f, i, length = list(f), 127, 2
    while length <= 128:
        for start in range(0, 256, 2 * length):
            zeta, i = ZETAS[i], i - 1
            for j in range(start, start + length):
                t = f[j]
                f[j], f[j + length] = (t + f[j + length]) % KQ, zeta * (f[j + length] - t) % KQ
        length *= 2
    return [x * 3303 % KQ for x in f]


def _dot(a: list[Poly], b: list[Poly]) -> Poly:
    """Sum of products in the NTT domain (algorithms 11 and 12)."""
    out = [0] * 256
    for f, g in zip(a, b, strict=True):
        for i, gamma in enumerate(GAMMAS):
            a0, a1, b0, b1 = f[2 * i], f[2 * i + 1], g[2 * i], g[2 * i + 1]
            out[2 * i] += a0 * b0 + a1 * b1 * gamma
            out[2 * i + 1] += a0 * b1 + a1 * b0
    return [x % KQ for x in out]


def _plus(f: Poly, g: Poly) -> Poly:
    return [(a + b) % KQ for a, b in zip(f, g, strict=True)]


def _pack(f: Poly, d: int) -> bytes:  # algorithm 5
    return sum(x << d * i for i, x in enumerate(f)).to_bytes(32 * d, "little")


def _unpack(data: bytes, d: int) -> Poly:  # algorithm 6
    whole = int.from_bytes(data, "little")
    return [whole >> d * i & (1 << d) - 1 for i in range(256)]


def _compress(f: Poly, d: int) -> Poly:
    return [(2 * x * 2**d + KQ) // (2 * KQ) % 2**d for x in f]


def _decompress(f: Poly, d: int) -> Poly:
    return [(2 * x * KQ + 2**d) // 2 ** (d + 1) for x in f]


@functools.cache
def _matrix(rho: bytes) -> list[list[Poly]]:  # algorithm 7 for each entry, row i and column j
    def entry(i: int, j: int) -> Poly:
        stream, out = hashlib.shake_128(rho + bytes([j, i])).digest(1344), []
        for at in range(0, len(stream), 3):
            a, b, c = stream[at : at + 3]
            out += [x for x in (a | (b & 15) << 8, b >> 4 | c << 4) if x < KQ]
        return out[:256] if len(out) >= 256 else []

    rows = [[entry(i, j) for j in range(K3)] for i in range(K3)]
    if any(not f for row in rows for f in row):
        raise ValueError("the stream was too short")  # has a probability of about 2^-260
    return rows


def _small(seed: bytes, number: int) -> Poly:  # algorithm 8 with eta = 2
    bits = int.from_bytes(hashlib.shake_256(seed + bytes([number])).digest(128), "little")
    nibbles = [bits >> 4 * i & 15 for i in range(256)]
    return [((n & 1) + (n >> 1 & 1) - (n >> 2 & 1) - (n >> 3 & 1)) % KQ for n in nibbles]


def _halves(data: bytes) -> tuple[bytes, bytes]:
    digest512 = hashlib.sha3_512(data).digest()
    return digest512[:32], digest512[32:]


@functools.cache
def mlkem_keys(seed: bytes) -> tuple[bytes, bytes]:
    """(ek, dk) of d || z: algorithms 13 and 16."""
    rho, sigma = _halves(seed[:32] + bytes([K3]))
    s = [_ntt(_small(sigma, i)) for i in range(K3)]
    e = [_ntt(_small(sigma, K3 + i)) for i in range(K3)]
    t = [_plus(_dot(row, s), e[i]) for i, row in enumerate(_matrix(rho))]
    ek = b"".join(_pack(f, 12) for f in t) + rho
    return ek, b"".join(_pack(f, 12) for f in s) + ek + hashlib.sha3_256(ek).digest() + seed[32:]


def _encrypt(ek: bytes, m: bytes, r: bytes) -> bytes:  # algorithm 14
    t, a = [_unpack(ek[384 * i : 384 * i + 384], 12) for i in range(K3)], _matrix(ek[1152:])
    y = [_ntt(_small(r, i)) for i in range(K3)]
    u = [
        _plus(_inverse_ntt(_dot([a[j][i] for j in range(K3)], y)), _small(r, K3 + i))  # the matrix is transposed
        for i in range(K3)
    ]
    v = _plus(_plus(_inverse_ntt(_dot(t, y)), _small(r, 2 * K3)), _decompress(_unpack(m, 1), 1))
    return b"".join(_pack(_compress(f, 10), 10) for f in u) + _pack(_compress(v, 4), 4)


@functools.cache
def mlkem_encapsulate(ek: bytes, m: bytes) -> tuple[bytes, bytes]:
    """(K, c) for the random bytes m: algorithm 17."""
    secret, r = _halves(m + hashlib.sha3_256(ek).digest())
    return secret, _encrypt(ek, m, r)


@functools.cache
def mlkem_decapsulate(dk: bytes, c: bytes) -> bytes:
    """K: algorithms 15 and 18."""
    s = [_unpack(dk[384 * i : 384 * i + 384], 12) for i in range(K3)]
    ek, hashed, z = dk[1152:2336], dk[2336:2368], dk[2368:]
    u = [_ntt(_decompress(_unpack(c[320 * i : 320 * i + 320], 10), 10)) for i in range(K3)]
    product = _inverse_ntt(_dot(s, u))
    w = [(a - b) % KQ for a, b in zip(_decompress(_unpack(c[960:], 4), 4), product, strict=True)]
    m = _pack(_compress(w, 1), 1)
    secret, r = _halves(m + hashed)
    return secret if _encrypt(ek, m, r) == c else hashlib.shake_256(z + c).digest(32)


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


def xored(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


VERSIONS = {"x25519": 1, "x25519-mlkem768": 2, "p256-mlkem768": 3}
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
    streams = [aes_ctr(key, lane << 64, 2 * m) for lane in range(64 // width)]
    for number, (kind, value, bound) in enumerate(plan):
        lane, word = divmod(number, m)
        if kind == "real":
            stream = streams[lane]
            u = (stream[2 * word] | stream[2 * word + 1] << 8) >> 16 - f
            # Both factors have 24 bits: their product is exact in double precision before it becomes single.
            z = round(single(single(value) * single(level * 2**f / bound)))
            value = (max(-level << f, min(level << f, z)) + u >> f) + level
        words[word] |= value << lane * width
    return words


def pad(key: bytes, words: int) -> list[int]:
    stream = aes_ctr(key, 0, 8 * words)
    return [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(words)]


def without_top_bits(y: list[int]) -> list[int]:
    """The words of 63 bits, the last 64th of them taken apart into the top bits of the others."""
    low = [word % 2**63 for word in y]
    spread = len(low) // 64
    out, parted = low[: len(low) - spread], low[len(low) - spread :]
    for place in range(63 * spread):
        bit, word = divmod(place, spread)
        out[place] += (parted[word] >> bit & 1) << 63
    return out


def with_top_bits(sent: list[int], m: int) -> list[int]:
    """The m words of 63 bits again."""
    spread = m // 64
    parted = [sum((sent[bit * spread + word] >> 63) << bit for bit in range(63)) for word in range(spread)]
    return [word % 2**63 for word in sent] + parted


def ring_neighbours(th: bytes, sites: list[int], degree: int) -> dict[int, list[int]]:
    n = len(sites)
    if degree == 0 or degree >= n - 1:
        return {i: [j for j in sites if j != i] for i in sites}
    ring = sorted(sites, key=lambda i: sha(b"privet-secagg/1 ring" + th + be(i, 2)))
    steps = [s for s in range(-degree // 2, degree // 2 + 1) if s]
    return {i: sorted(ring[(p + s) % n] for s in steps) for p, i in enumerate(ring)}


def listed(items: list[bytes]) -> bytes:
    return be(len(items), 4) + b"".join(items)


PARAMETERS = {"round": 1, "block": 11, "dealt": 16}


def kind_of(case: dict[str, Any]) -> str:
    """A round of its own, a block (section 14), or a block that tolerates drop-outs (section 15)."""
    return "round" if "rounds" not in case else "dealt" if "drops" in case else "block"


class Setup:
    """The set-up of a round or a block: parameters, adverts, roster, and the keys and items of each pair."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.n = case, len(case["cohort"])
        self.session = bytes.fromhex(case["session"])
        self.seeds = [bytes.fromhex(member["identity_seed"]) for member in case["cohort"]]
        self.random = [Random(bytes.fromhex(member["random_seed"])) for member in case["cohort"]]
        self.suite = case.get("suite", "x25519")
        self.hybrid, self.p_curve = self.suite != "x25519", self.suite.startswith("p256")
        self.lane = lane_width(case["bits"], self.n)
        # Three lanes of 21 bits leave a bit of each word.
        self.packs = self.hybrid and 64 // self.lane * self.lane == 63
        self.modulus = 2**63 if self.packs else 2**64
        self.parameters = self.header(PARAMETERS[kind_of(case)]) + self._fields()
        self.ph = digest("parameters", self.parameters)
        self.th = bytes(32)
        self.share_key: dict[int, Any] = {}
        self.mask_seed: dict[int, bytes] = {}
        self.dk: dict[int, bytes] = {}
        self.public: dict[int, tuple[bytes, bytes]] = {}
        self.encapsulated: dict[tuple[int, int], tuple[bytes, bytes]] = {}

    def header(self, number: int) -> bytes:
        named = number <= 6 or 11 <= number <= 13 or 16 <= number <= 18
        return b"PSA" + bytes([VERSIONS[self.suite] if named else 1, number])

    def _fields(self) -> bytes:
        def text(value: str) -> bytes:
            return bytes([len(value)]) + value.encode()

        case = self.case
        fields = self.session + be(case["round"], 8) + bytes.fromhex(case["inputs"])
        fields += listed(
            [text(m["name"]) + ed25519_public(seed) for m, seed in zip(case["cohort"], self.seeds, strict=True)]
        )
        fields += be(case["degree"], 2) + be(case["threshold"], 2) + be(case["corrupt"], 2) + be(case["security"], 1)
        fields += be(case["min_survivors"], 2) + be(case["bits"], 1)
        fields += listed(
            [
                text(s["name"]) + be(s["size"], 4) + struct.pack(">d", s["bound"]) + bytes([s["count"]])
                for s in case["segments"]
            ]
        )
        return fields + (be(case["rounds"], 2) if "rounds" in case else b"")

    def sign(self, i: int, number: int, body: bytes, at: int | None = None, bound: bytes | None = None) -> bytes:
        """Sign a message of the round `at`, by default the first; `bound` is in the place of th."""
        round_number = self.case["round"] if at is None else at
        head = b"privet-secagg/1 message\0" + bytes([number]) + self.session + be(round_number, 8)
        return ed25519_sign(self.seeds[i], head + self.ph + (self.th if bound is None else bound) + body)

    def advertise(self, sites: list[int]) -> tuple[dict[int, bytes], bytes]:
        """Return each site's `Advertise`, and `Roster`."""
        adverts = {}
        for i in sites:
            drawn, self.mask_seed[i] = self.random[i].take(32), self.random[i].take(32)
            if not self.hybrid:
                self.share_key[i] = drawn
                self.public[i] = (x25519(drawn), x25519(self.mask_seed[i]))
            else:
                ek, self.dk[i] = mlkem_keys(kdf(drawn, self.ph, "kem seed", length=64))
                if self.p_curve:
                    self.share_key[i] = 1 + be_int(kdf(drawn, self.ph, "share key", length=48)) % (N256 - 1)
                    self.public[i] = (p256(self.share_key[i]), ek)
                else:
                    self.share_key[i] = kdf(drawn, self.ph, "share key")
                    self.public[i] = (x25519(self.share_key[i]), ek)
            body = self.ph + be(i, 2) + b"".join(self.public[i]) + self.random[i].take(16)
            adverts[i] = body + self.sign(i, 2, body)
        roster = self.header(3) + listed([adverts[i] for i in sites])
        self.th = digest("roster", self.ph + roster)
        return {i: self.header(2) + advert for i, advert in adverts.items()}, roster

    def encapsulate(self, i: int, near: list[int]) -> None:
        if self.hybrid:
            for j in near:
                self.encapsulated[i, j] = mlkem_encapsulate(self.public[j][1], self.random[i].take(32))

    def agreed(self, i: int, j: int) -> bytes:
        if self.p_curve:
            return p256(self.share_key[i], self.public[j][0])[1:33]
        return x25519(self.share_key[i], self.public[j][0])

    def channel(self, i: int, j: int) -> tuple[bytes, bytes]:
        if self.hybrid:
            secret, c = self.encapsulated[i, j]
            if mlkem_decapsulate(self.dk[j], c) != secret or self.agreed(i, j) != self.agreed(j, i):
                raise ValueError("the two sites disagree")
            info = b"privet-secagg/1 hybrid channel\0" + be(i, 4) + be(j, 4) + c
            keys = hkdf(secret + self.agreed(i, j), self.th, info, 64)
            return keys[:32], keys[32:]
        keys = kdf(self.agreed(i, j), self.th, "channels", min(i, j), max(i, j), length=128)
        own = keys[:64] if i < j else keys[64:]
        return own[:32], own[32:]

    def pair_secret(self, i: int, j: int, seed: bytes) -> bytes:
        return kdf(seed, self.th, "pair secret", i, j)

    def pair_key(self, i: int, j: int) -> bytes:
        low, high = min(i, j), max(i, j)
        if self.hybrid:
            secret = self.pair_secret(low, high, self.mask_seed[low])
        else:
            secret = x25519(self.mask_seed[i], self.public[j][1])
        return kdf(secret, self.th, "pair mask", low, high, 0)

    def item(self, i: int, j: int, shares: bytes) -> bytes:
        """The encrypted item from i to j."""
        bound = self.th + be(i, 2) + be(j, 2)
        if not self.hybrid:
            return aes_gcm_seal(self.channel(i, j)[0], shares, bound)
        v = self.pair_secret(i, j, self.mask_seed[i])
        committed = digest("pair", bound + v)
        return (
            self.encapsulated[i, j][1] + committed + aes_gcm_seal(self.channel(i, j)[0], shares + v, bound + committed)
        )


def transcript(case: dict[str, Any]) -> dict[str, Any]:
    """Play the round or the block of `case` and return all messages by kind and site, and the sums' words."""
    return {"round": round_transcript, "block": block_transcript, "dealt": dealt_transcript}[kind_of(case)](case)


def round_transcript(case: dict[str, Any]) -> dict[str, Any]:
    play = Setup(case)
    n, t, random, hybrid, header = play.n, case["threshold"], play.random, play.hybrid, play.header
    missing = {step: set(case["missing"].get(step, [])) for step in STEPS}
    out: dict[str, Any] = {"parameters": play.parameters}

    # Advertise
    u1 = [i for i in range(n) if i not in missing["advertise"]]
    out["advertise"], out["roster"] = play.advertise(u1)
    th = play.th

    # Share
    u2 = [i for i in u1 if i not in missing["share"]]
    near = ring_neighbours(th, u1, case["degree"])
    sealed: dict[tuple[int, int], bytes] = {}
    held: dict[tuple[int, int], tuple[bytes, bytes]] = {}  # (owner, holder)
    self_seed, commitments = {}, {}
    out["shares"] = {}
    for i in u2:
        play.encapsulate(i, near[i])
        self_seed[i] = random[i].take(32)
        holders = sorted([*near[i], i])
        dealt = []
        for secret in (self_seed[i], play.mask_seed[i]):
            coefficients = [int.from_bytes(random[i].take(48), "big") % P for _ in range(t - 1)]
            dealt.append(share_out(secret, [j + 1 for j in holders], coefficients))
        for j, b, s in zip(holders, *dealt, strict=True):
            held[i, j] = (b, s)
            if j != i:
                sealed[i, j] = play.item(i, j, b + s)
        commitments[i] = digest("commitment", th + be(i, 2) + self_seed[i])
        of_seed = digest("seed", th + be(i, 2) + play.mask_seed[i]) if hybrid else b""
        body = th + be(i, 2) + commitments[i] + of_seed + listed([be(j, 2) + sealed[i, j] for j in near[i]])
        out["shares"][i] = header(4) + body + play.sign(i, 4, body)
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
    wraps: dict[tuple[int, int], bytes] = {}

    def tag(i: int, j: int, what: bytes) -> bytes:
        return hmac.new(play.channel(i, j)[1], th + be(i, 2) + be(j, 2) + what, "sha256").digest()[:16]

    for i in u3:
        plain[i] = quantised(case, i, random[i].take(32))
        m = len(plain[i])
        y = [a + b for a, b in zip(plain[i], pad(kdf(self_seed[i], th, "self mask", i, 0), m), strict=True)]
        for j in near[i]:
            if j in u2:
                sign_of = 1 if j > i else -1
                y = [a + sign_of * b for a, b in zip(y, pad(play.pair_key(i, j), m), strict=True)]
        masked[i] = [a % 2**64 for a in y]
        body = th + be(i, 2) + u2h
        if hybrid:
            for j in near[i]:
                if j in u2 and j > i:
                    wraps[i, j] = xored(
                        play.pair_secret(i, j, play.mask_seed[i]), play.pair_secret(j, i, play.mask_seed[j])
                    )
            body += listed([be(j, 2) + wraps[i, j] for j in near[i] if j in u2 and j > i])
        tags = listed([be(j, 2) + tag(i, j, u2h) for j in near[i] if j in u2])
        sent = without_top_bits(masked[i]) if play.packs else masked[i]
        words = b"".join(a.to_bytes(8, "little") for a in sent)
        out["masked"][i] = header(6) + body + tags + play.sign(i, 6, body) + be(len(sent), 4) + words
        if play.packs:
            masked[i] = with_top_bits(sent, m)
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
        signature[i] = play.sign(i, 8, body)
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
        out["reveal"][i] = header(10) + body + play.sign(i, 10, body)

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
                    if not hybrid:
                        agreement = x25519(secret, play.public[i][1])
                    else:
                        agreement = play.pair_secret(j, i, secret)
                        agreement = agreement if j < i else xored(wraps[i, j], agreement)
                    key = kdf(agreement, th, "pair mask", min(i, j), max(i, j), 0)
                    sign_of = 1 if j > i else -1
                    total = [a - sign_of * b for a, b in zip(total, pad(key, m), strict=True)]
    total = [a % play.modulus for a in total]
    if total != [sum(plain[i][w] for i in u3) % play.modulus for w in range(m)]:
        raise ValueError("the sum is wrong")
    out["total"] = b"".join(a.to_bytes(8, "little") for a in total)
    return out


def block_transcript(case: dict[str, Any]) -> dict[str, Any]:
    """Play the block of section 14, with the rounds of `case["played"]`."""
    play = Setup(case)
    sites, random, header = list(range(play.n)), play.random, play.header
    pairs = [(low, high) for low in sites for high in sites if low < high]
    out: dict[str, Any] = {"parameters": play.parameters}
    out["advertise"], out["roster"] = play.advertise(sites)
    th = play.th

    # Link
    sealed, out["links"] = {}, {}
    for i in sites:
        others = [j for j in sites if j != i]
        play.encapsulate(i, others)
        for j in others:
            sealed[i, j] = play.item(i, j, b"")
        body = th + be(i, 2) + listed([be(j, 2) + sealed[i, j] for j in others])
        out["links"][i] = header(12) + body + play.sign(i, 12, body)
    out["link_delivery"] = {
        i: header(13) + th + be(i, 2) + listed([be(j, 2) + sealed[j, i] for j in sites if j != i]) for i in sites
    }
    out["joined"] = {}
    for i in sites:
        body = th + be(i, 2)
        out["joined"][i] = header(15) + body + play.sign(i, 15, body)
    out["step"] = header(14) + th

    # The rounds
    chain = {(low, high): play.pair_key(low, high) for low, high in pairs}
    at = case["round"]
    for number, inputs in zip(case["played"], [case["inputs"], *case["later_inputs"]], strict=True):
        while at < number:
            for low, high in pairs:
                info = b"privet-secagg/1 next link\0" + be(low, 4) + be(high, 4) + be(at, 8)
                chain[low, high] = hkdf(chain[low, high], th, info, 32)
            at += 1
        sd = digest("step", th + be(number, 8) + bytes.fromhex(inputs))
        plain = [quantised(case, i, random[i].take(32)) for i in sites]
        y = [list(words) for words in plain]
        for low, high in pairs:
            mask = pad(kdf(chain[low, high], sd, "pair mask", low, high, 0), len(plain[0]))
            y[low] = [(a + b) % 2**64 for a, b in zip(y[low], mask, strict=True)]
            y[high] = [(a - b) % 2**64 for a, b in zip(y[high], mask, strict=True)]
        masked = {}
        for i in sites:
            sent = without_top_bits(y[i]) if play.packs else y[i]
            no_wraps, no_tags = (listed([]) if play.hybrid else b""), listed([])
            body = th + be(i, 2) + sd + no_wraps
            words = b"".join(a.to_bytes(8, "little") for a in sent)
            masked[i] = header(6) + body + no_tags + play.sign(i, 6, body) + be(len(sent), 4) + words
            if play.packs:
                y[i] = with_top_bits(sent, len(plain[i]))
        total = [sum(column) % play.modulus for column in zip(*y, strict=True)]
        if total != [sum(column) % play.modulus for column in zip(*plain, strict=True)]:
            raise ValueError("the sum is wrong")
        out[f"masked of round {number}"] = masked
        out[f"total of round {number}"] = b"".join(a.to_bytes(8, "little") for a in total)
    return out


def tag_of(key: bytes, th: bytes, i: int, j: int, what: bytes) -> bytes:
    return hmac.new(key, th + be(i, 2) + be(j, 2) + what, "sha256").digest()[:16]


def sites_listed(sites: list[int]) -> bytes:
    return listed([be(j, 2) for j in sites])


def items_listed(items: dict[int, bytes]) -> bytes:
    length = len(next(iter(items.values()))) if items else 0
    return be(len(items), 4) + be(length, 4) + b"".join(be(j, 2) + item for j, item in items.items())


def dealt_transcript(case: dict[str, Any]) -> dict[str, Any]:
    """Play the block of section 15: the rounds of `case["played"]`, each with its drop-outs of `case["drops"]`."""
    play = Setup(case)
    n, random, header, t0 = play.n, play.random, play.header, case["round"]
    rounds = range(t0, t0 + case["rounds"])
    missing = {step: set(case["missing"].get(step, [])) for step in ("advertise", "deal", "join")}
    q = (n + case["corrupt"]) // 2 + 1
    out: dict[str, Any] = {"parameters": play.parameters}
    advertised = [i for i in range(n) if i not in missing["advertise"]]
    out["advertise"], out["roster"] = play.advertise(advertised)
    th = play.th
    slot = {t: digest("slot", th + be(t, 8)) for t in rounds}

    # Deal
    members = [i for i in advertised if i not in missing["deal"]]
    b: dict[tuple[int, int], bytes] = {}
    s: dict[tuple[int, int], bytes] = {}
    v: dict[tuple[int, int, int], bytes] = {}
    held: dict[tuple[int, int, int], tuple[bytes, bytes]] = {}  # (owner, holder, round)
    items: dict[tuple[int, int], bytes] = {}
    both: dict[tuple[int, int], tuple[bytes, bytes]] = {}
    out["deal"] = {}
    for i in members:
        others = [j for j in advertised if j != i]
        play.encapsulate(i, others)
        for t in rounds:
            b[i, t], s[i, t] = random[i].take(32), random[i].take(32)
            dealt = []
            for secret in (b[i, t], s[i, t]):
                coefficients = [int.from_bytes(random[i].take(48), "big") % P for _ in range(q - 1)]
                dealt.append(share_out(secret, [j + 1 for j in advertised], coefficients))
            for j, share_b, share_s in zip(advertised, *dealt, strict=True):
                held[i, j, t] = (share_b, share_s)
            for j in others:
                v[i, j, t] = kdf(s[i, t], slot[t], "pair secret", i, j)
            mine = slot[t] + be(i, 2)
            both[i, t] = (digest("commitment", mine + b[i, t]), digest("seed", mine + s[i, t]))
        for j in others:
            beside = b"".join(digest("pair", slot[t] + be(i, 2) + be(j, 2) + v[i, j, t]) for t in rounds)
            plain = b"".join(b"".join(held[i, j, t]) + v[i, j, t] for t in rounds)
            box = aes_gcm_seal(play.channel(i, j)[0], plain, th + be(i, 2) + be(j, 2) + beside)
            items[i, j] = play.encapsulated[i, j][1] + beside + box
        body = th + be(i, 2) + listed([b"".join(both[i, t]) for t in rounds])
        body += items_listed({j: items[i, j] for j in others})
        out["deal"][i] = header(17) + body + play.sign(i, 17, body)

    # Join
    out["deal_delivery"] = {
        i: header(18) + th + be(i, 2) + items_listed({j: items[j, i] for j in members if j != i}) for i in members
    }
    mh = digest("members", th + b"".join(be(j, 2) for j in members))
    joined = [i for i in members if i not in missing["join"]]
    out["joined"] = {}
    for i in joined:
        out["joined"][i] = header(15) + mh + be(i, 2) + play.sign(i, 15, mh + be(i, 2), bound=mh)

    # The rounds
    expected = joined
    for t, inputs in zip(case["played"], [case["inputs"], *case["later_inputs"]], strict=True):
        drops = {step: set(case["drops"].get(str(t), {}).get(step, [])) for step in ("mask", "confirm", "reveal")}
        sd = digest("step", mh + be(t, 8) + bytes.fromhex(inputs))
        fh = digest("expected", sd + b"".join(be(j, 2) for j in expected))
        name = f" of round {t}"
        out["expected" + name] = header(19) + mh + sites_listed(expected)
        alive = [i for i in expected if i not in drops["mask"]]
        plain_words, y, masked = {}, {}, {}
        for i in alive:
            plain_words[i] = quantised(case, i, random[i].take(32))
            m = len(plain_words[i])
            own = pad(kdf(b[i, t], sd, "self mask", i, 0), m)
            y[i] = [a + c for a, c in zip(plain_words[i], own, strict=True)]
            for j in members:
                if j != i:
                    low, high = min(i, j), max(i, j)
                    mask = pad(kdf(v[low, high, t], sd, "pair mask", low, high, 0), m)
                    y[i] = [a + c if i == low else a - c for a, c in zip(y[i], mask, strict=True)]
            y[i] = [a % 2**64 for a in y[i]]
            wraps = listed([be(j, 2) + xored(v[i, j, t], v[j, i, t]) for j in members if j > i])
            body = mh + be(i, 2) + fh + wraps
            tags = listed([be(j, 2) + tag_of(play.channel(i, j)[1], th, i, j, fh) for j in expected if j != i])
            sent = without_top_bits(y[i]) if play.packs else y[i]
            words = b"".join(a.to_bytes(8, "little") for a in sent)
            masked[i] = header(6) + body + tags + play.sign(i, 6, body, t, mh) + be(len(sent), 4) + words
        out["masked" + name] = masked

        def tags_to(i: int, senders: list[int], what: bytes) -> bytes:
            return listed([be(j, 2) + tag_of(play.channel(j, i)[1], th, j, i, what) for j in senders if j != i])

        if alive == expected:
            lists, revealing = fh, alive
            out["finish" + name] = {i: header(20) + mh + be(i, 2) + tags_to(i, alive, fh) for i in alive}
        else:
            lists = digest("lists", fh + b"".join(be(j, 2) for j in alive))
            out["survivors" + name] = {
                i: header(7) + mh + be(i, 2) + sites_listed(alive) + tags_to(i, alive, fh) for i in alive
            }
            revealing = [i for i in alive if i not in drops["confirm"]]
            confirms = {}
            for i in revealing:
                body = mh + be(i, 2) + lists
                tags = listed([be(j, 2) + tag_of(play.channel(i, j)[1], th, i, j, lists) for j in alive if j != i])
                confirms[i] = header(8) + body + tags + play.sign(i, 8, body, t, mh)
            out["confirm" + name] = confirms
            out["proof" + name] = {
                i: header(9) + mh + be(i, 2) + tags_to(i, revealing, lists) + listed([]) for i in revealing
            }
        reveals: dict[int, bytes] = {}
        shares: dict[int, dict[int, bytes]] = {j: {} for j in members}
        for i in revealing:
            if i not in drops["reveal"]:
                for j in members:
                    shares[j][i + 1] = held[j, i, t][0 if j in alive else 1]
                body = mh + be(i, 2) + lists + listed([be(j, 2) + shares[j][i + 1] for j in members])
                reveals[i] = header(10) + body + play.sign(i, 10, body, t, mh)
        out["reveal" + name] = reveals

        m = len(plain_words[alive[0]])
        total = [sum(y[i][w] for i in alive) for w in range(m)]
        for j in members:
            secret = reconstruct(dict(list(shares[j].items())[-q:]))
            committed = "commitment" if j in alive else "seed"
            if digest(committed, slot[t] + be(j, 2) + secret) != both[j, t][0 if j in alive else 1]:
                raise ValueError("wrong secret")
            if j in alive:
                total = [a - c for a, c in zip(total, pad(kdf(secret, sd, "self mask", j, 0), m), strict=True)]
                continue
            for i in alive:
                agreed = kdf(secret, slot[t], "pair secret", j, i)
                if i < j:
                    agreed = xored(xored(v[i, j, t], v[j, i, t]), agreed)
                mask = pad(kdf(agreed, sd, "pair mask", min(i, j), max(i, j), 0), m)
                total = [a - c if i < j else a + c for a, c in zip(total, mask, strict=True)]
        total = [a % play.modulus for a in total]
        if total != [sum(plain_words[i][w] for i in alive) % play.modulus for w in range(m)]:
            raise ValueError("the sum is wrong")
        out["total" + name] = b"".join(a.to_bytes(8, "little") for a in total)
        expected = list(reveals)
    return out


def summary(messages: dict[str, Any], *, full: bool) -> dict[str, Any]:
    """Messages as hexadecimal, or as the SHA-256 of each."""

    def show(data: bytes) -> str:
        return data.hex() if full else sha(data).hex()

    return {
        kind: show(value) if isinstance(value, bytes) else {str(i): show(data) for i, data in value.items()}
        for kind, value in messages.items()
    }


def make_case(name: str, n: int, missing: dict[str, list[int]], size: int = 9, **changes: Any) -> dict[str, Any]:
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
            {"name": "update", "size": size, "bound": 1.5, "count": False},
            {"name": "loss", "size": 1, "bound": 100.0, "count": False},
        ],
        "missing": missing,
        **changes,
    }
    case["values"] = [
        {"examples": [1000 * i + 7], "update": [real() for _ in range(size)], "loss": [real()]} for i in range(n)
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
    "hybrid-three-sites": ({"n": 3, "missing": {}, "suite": "x25519-mlkem768"}, True),
    "hybrid-ring-of-nine": (
        {
            "n": 9,
            "missing": {"mask": [3], "reveal": [5]},
            "suite": "x25519-mlkem768",
            "degree": 4,
            "threshold": 3,
            "bits": 14,
        },
        False,
    ),
    "hybrid-every-stage-loses-one": (
        {
            "n": 10,
            "missing": {"advertise": [6], "share": [0], "mask": [3], "confirm": [2], "reveal": []},
            "suite": "x25519-mlkem768",
            "bits": 20,
        },
        False,
    ),
    # 135 words: two of them are taken apart, and seven of the others stay as they are.
    "hybrid-packed-words": (
        {"n": 3, "missing": {"mask": [1]}, "threshold": 2, "size": 400, "suite": "x25519-mlkem768"},
        False,
    ),
    "fips-three-sites": ({"n": 3, "missing": {}, "suite": "p256-mlkem768"}, True),
    "fips-five-sites-one-drops": (
        {
            "n": 5,
            "missing": {"mask": [1]},
            "suite": "p256-mlkem768",
            "corrupt": 1,
            "threshold": 4,
            "min_survivors": 4,
        },
        False,
    ),
}


def make_block(name: str, n: int, skipped: int, **changes: Any) -> dict[str, Any]:
    """A block of which one round is left out."""
    start = 2**40 + n
    played = [start + k for k in range(4) if k != skipped]
    everyone = {"threshold": n, "min_survivors": n, "corrupt": n - 2}
    more = {"rounds": 2**16 - 1, "played": played, "later_inputs": [sha(b"inputs %d" % k).hex() for k in played[1:]]}
    return make_case(name, n, {}, **{**everyone, **more, **changes})


BLOCKS = {
    "block-three-sites": ({"n": 3, "skipped": 1}, True),
    "block-hybrid-four-sites": ({"n": 4, "skipped": 2, "bits": 14, "suite": "x25519-mlkem768"}, False),
    # 135 words as in hybrid-packed-words.
    "block-hybrid-packed-words": ({"n": 2, "skipped": 1, "corrupt": 0, "size": 400, "suite": "x25519-mlkem768"}, False),
    "block-fips-three-sites": ({"n": 3, "skipped": 2, "suite": "p256-mlkem768"}, False),
}


def make_dealt(name: str, n: int, missing: dict[str, list[int]], drops: list[Any], **changes: Any) -> dict[str, Any]:
    """A block that tolerates drop-outs, of which the second round is left out."""
    start = 2**40 + n
    played = [start + k for k in range(len(drops) + 1) if k != 1]
    by_round = {str(t): each for t, each in zip(played, drops, strict=True)}
    more = {
        "rounds": len(drops) + 2,
        "played": played,
        "drops": by_round,
        "later_inputs": [sha(b"inputs %d" % t).hex() for t in played[1:]],
    }
    return make_case(name, n, missing, **{**more, **changes})


DEALT = {
    "dealt-three-sites": (
        {"n": 3, "missing": {}, "drops": [{"mask": [0]}, {}], "suite": "x25519-mlkem768", "size": 3},
        True,
    ),
    "dealt-every-stage-loses-one": (
        {
            "n": 9,
            "missing": {"advertise": [3], "deal": [7], "join": [5]},
            "drops": [{"mask": [0]}, {}],
            "suite": "x25519-mlkem768",
            "bits": 14,
            "size": 3,
        },
        False,
    ),
    # 68 words: one of them is taken apart, and four of the others stay as they are.
    "dealt-fips-packed-words": (
        {
            "n": 7,
            "missing": {},
            "drops": [{"mask": [2], "confirm": [4], "reveal": [1]}],
            "suite": "p256-mlkem768",
            "size": 200,
        },
        False,
    ),
}


if __name__ == "__main__":
    VECTORS.mkdir(parents=True, exist_ok=True)
    made = {name: (make_case(name, **arguments), full) for name, (arguments, full) in CASES.items()}  # type: ignore[arg-type]
    made |= {name: (make_block(name, **arguments), full) for name, (arguments, full) in BLOCKS.items()}  # type: ignore[arg-type]
    made |= {name: (make_dealt(name, **arguments), full) for name, (arguments, full) in DEALT.items()}  # type: ignore[arg-type]
    for name, (case, full) in made.items():
        case["full"] = full
        case["messages"] = summary(transcript(case), full=full)
        (VECTORS / f"{name}.json").write_text(json.dumps(case, indent=1) + "\n")
