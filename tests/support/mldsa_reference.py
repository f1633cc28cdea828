"""ML-DSA-65 verification (FIPS 204, algorithms 3 and 8), in plain Python: slow, and written from the standard alone."""

from __future__ import annotations

import hashlib

Q, N, D = 8380417, 256, 13
ROWS, COLUMNS = 6, 5
TAU, GAMMA_1, GAMMA_2, OMEGA = 49, 1 << 19, (Q - 1) // 32, 55
BETA = TAU * 4  # eta is 4
CHALLENGE = 48

Poly = list[int]


def _reversed(value: int) -> int:
    return int(f"{value:08b}"[::-1], 2)


ZETAS = [pow(1753, _reversed(m), Q) for m in range(N)]


def ntt(given: Poly) -> Poly:
    w, m, length = list(given), 0, N // 2
    while length:
        for start in range(0, N, 2 * length):
            m += 1
            for j in range(start, start + length):
                t = ZETAS[m] * w[j + length] % Q
                w[j], w[j + length] = (w[j] + t) % Q, (w[j] - t) % Q
        length //= 2
    return w


def inverse_ntt(given: Poly) -> Poly:
    w, m, length = list(given), N, 1
    while length < N:
        for start in range(0, N, 2 * length):
            m -= 1
            for j in range(start, start + length):
                t = w[j]
                w[j], w[j + length] = (t + w[j + length]) % Q, -ZETAS[m] * (t - w[j + length]) % Q
        length *= 2
    return [x * 8347681 % Q for x in w]


def shake256(data: bytes, length: int) -> bytes:
    return hashlib.shake_256(data).digest(length)


def unpacked(data: bytes, bits: int) -> Poly:
    whole = int.from_bytes(data, "little")
    return [whole >> (bits * i) & ((1 << bits) - 1) for i in range(N)]


def uniform(rho: bytes, row: int, column: int) -> Poly:
    """Algorithm 30, RejNTTPoly."""
    stream, found = hashlib.shake_128(rho + bytes([column, row])).digest(3 * 400), Poly()
    for i in range(0, len(stream), 3):
        value = int.from_bytes(stream[i : i + 3], "little") & 0x7FFFFF
        if value < Q and len(found) < N:
            found.append(value)
    if len(found) < N:
        raise ValueError("too short a stream")
    return found


def in_ball(seed: bytes) -> Poly:
    """Algorithm 29, SampleInBall."""
    stream, c = iter(shake256(seed, 1000)), [0] * N
    signs = int.from_bytes(bytes(next(stream) for _ in range(8)), "little")
    for i in range(N - TAU, N):
        j = next(x for x in stream if x <= i)
        c[i], c[j] = c[j], 1 - 2 * (signs >> (i + TAU - N) & 1)
    return c


def hints(data: bytes) -> list[list[int]] | None:
    """Algorithm 21, HintBitUnpack."""
    found, index = [[0] * N for _ in range(ROWS)], 0
    for row in range(ROWS):
        end = data[OMEGA + row]
        if not index <= end <= OMEGA:
            return None
        for i in range(index, end):
            if i > index and data[i - 1] >= data[i]:
                return None
            found[row][data[i]] = 1
        index = end
    return None if any(data[index:OMEGA]) else found


def high_bits(r: int, hint: int) -> int:
    """Algorithms 36 and 40, Decompose and UseHint."""
    low = r % (2 * GAMMA_2)
    if low > GAMMA_2:
        low -= 2 * GAMMA_2
    high, low = (0, low - 1) if r - low == Q - 1 else ((r - low) // (2 * GAMMA_2), low)
    return (high + (1 if low > 0 else -1) * hint) % 16


def verify(public: bytes, message: bytes, signature: bytes, context: bytes) -> bool:
    packed = public[32:]
    t1 = [unpacked(packed[320 * i : 320 * (i + 1)], 10) for i in range(ROWS)]
    challenge, rest = signature[:CHALLENGE], signature[CHALLENGE:]
    z = [[GAMMA_1 - x for x in unpacked(rest[640 * i : 640 * (i + 1)], 20)] for i in range(COLUMNS)]
    h = hints(rest[640 * COLUMNS :])
    if h is None or max(abs(x) for poly in z for x in poly) >= GAMMA_1 - BETA:
        return False
    return challenge == answer(public, t1, message, context, challenge, z, h)


def answer(
    public: bytes, t1: list[Poly], message: bytes, context: bytes, challenge: bytes, z: list[Poly], h: list[list[int]]
) -> bytes:
    """Return the challenge that z and h answer."""
    rho = public[:32]
    mu = shake256(shake256(public, 64) + bytes([0, len(context)]) + context + message, 64)
    c, z_ntt = ntt(in_ball(challenge)), [ntt([x % Q for x in poly]) for poly in z]
    encoded = b""
    for row in range(ROWS):
        total = [-a * b % Q for a, b in zip(c, ntt([x << D for x in t1[row]]), strict=True)]
        for column in range(COLUMNS):
            entry = uniform(rho, row, column)
            total = [(t + a * b) % Q for t, a, b in zip(total, entry, z_ntt[column], strict=True)]
        w1 = [high_bits(x, hint) for x, hint in zip(inverse_ntt(total), h[row], strict=True)]
        encoded += bytes(w1[i] | w1[i + 1] << 4 for i in range(0, N, 2))
    return shake256(mu + encoded, CHALLENGE)


def forged(public: bytes, message: bytes, context: bytes) -> bytes:
    """Return a signature of nobody under a key whose t1 is 0: the challenge does not matter, so z may be 0."""
    nothing = [[0] * N for _ in range(ROWS)]
    challenge = answer(public, nothing, message, context, bytes(CHALLENGE), nothing[:COLUMNS], nothing)
    zeros = sum(GAMMA_1 << 20 * i for i in range(N)).to_bytes(640, "little")
    return challenge + zeros * COLUMNS + bytes(OMEGA + ROWS)
