import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.common.errors import ProtocolError
from privet.common.secagg import shamir
from privet.common.secagg.shamir import PRIME, combine, split, weights


def stream(seed: bytes) -> shamir.RandomBytes:
    import hashlib

    counter = itertools.count()
    return lambda count: hashlib.shake_256(seed + next(counter).to_bytes(4, "big")).digest(count)


def probably_prime(n: int) -> bool:
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41):
        x = pow(base, odd, n)
        if x not in (1, n - 1) and all((x := x * x % n) != n - 1 for _ in range(twos - 1)):
            return False
    return True


def test_the_field_is_the_smallest_prime_above_all_secrets() -> None:
    assert probably_prime(PRIME)
    assert not any(probably_prime(candidate) for candidate in range(2**256 + 1, PRIME, 2))


@given(
    secret=st.binary(min_size=32, max_size=32),
    points=st.lists(st.integers(1, 5000), min_size=1, max_size=40, unique=True),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_threshold_of_shares_gives_the_secret(secret: bytes, points: list[int], data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, len(points)))
    shares = dict(zip(points, split(secret, points, threshold, stream(secret)), strict=True))
    chosen = data.draw(st.permutations(points))[:threshold]
    assert combine({x: shares[x] for x in chosen}) == secret


@given(points=st.lists(st.integers(1, 4097), min_size=1, max_size=30, unique=True))
def test_weights_interpolate_every_monomial_at_zero(points: list[int]) -> None:
    found = weights(points)
    for power in range(len(points)):
        expected = 1 if power == 0 else 0
        assert sum(w * pow(x, power, PRIME) for w, x in zip(found, points, strict=True)) % PRIME == expected


def test_shares_below_the_threshold_fit_every_secret() -> None:
    # For threshold - 1 shares and any secret there is exactly one polynomial through both: nothing is learnt.
    points = [1, 2, 3]
    secret, other = b"\x01" * 32, b"\x02" * 32
    shares = dict(zip(points, split(secret, points, 3, stream(b"a")), strict=True))
    w = weights(points)
    target = int.from_bytes(other, "big")
    known = w[0] * int.from_bytes(shares[1], "big") + w[1] * int.from_bytes(shares[2], "big")
    third = (target - known) * pow(w[2], -1, PRIME) % PRIME
    assert combine({1: shares[1], 2: shares[2], 3: third.to_bytes(33, "big")}) == other


def test_a_wrong_share_changes_the_secret() -> None:
    shares = dict(zip([1, 2, 3], split(b"\x05" * 32, [1, 2, 3], 2, stream(b"b")), strict=True))
    wrong = (int.from_bytes(shares[1], "big") ^ 1).to_bytes(33, "big")
    assert combine({1: wrong, 2: shares[2]}) != b"\x05" * 32
    # A share under another holder's index is a wrong share too.
    assert combine({3: shares[1], 2: shares[2]}) != b"\x05" * 32


def test_shares_spread_over_the_field() -> None:
    # The top byte of a uniform field element is 0 (the 257th bit is almost never set), the next is uniform.
    shares = [split(bytes(32), [1], 2 - 1, stream(b"c"))[0]]
    assert shares == [bytes(33)]
    counts = Counter(
        split(bytes(32), [1, 2], 2, stream(bytes([i, j])))[0][1] // 64 for i in range(40) for j in range(40)
    )
    expected = 400
    chi_square = sum((counts[q] - expected) ** 2 / expected for q in range(4))
    assert chi_square < 21.1  # 3 degrees of freedom, p = 1e-4


@pytest.mark.parametrize(
    ("secret", "points", "threshold"),
    [
        (bytes(31), [1, 2], 2),
        (bytes(32), [1, 2], 3),
        (bytes(32), [1, 2], 0),
        (bytes(32), [0, 2], 2),
        (bytes(32), [2, 2], 2),
    ],
)
def test_split_refuses_what_cannot_be_shared(secret: bytes, points: list[int], threshold: int) -> None:
    with pytest.raises(ProtocolError):
        split(secret, points, threshold, stream(b"d"))


def test_combine_refuses_malformed_shares() -> None:
    with pytest.raises(ProtocolError, match="and be below 2"):
        combine({1: PRIME.to_bytes(33, "big")})
    with pytest.raises(ProtocolError, match="33 bytes"):
        combine({1: bytes(32)})
    with pytest.raises(ProtocolError, match="no 32-byte secret"):
        combine({1: (2**256).to_bytes(33, "big")})
    with pytest.raises(ProtocolError, match="distinct"):
        weights([])
