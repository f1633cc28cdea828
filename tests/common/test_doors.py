"""Who holds a place at a port, and who gives way: for all orders of connections, and for the attacks that matter."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.common.doors.files import SPARE, check_limit, raise_limit
from privet.common.doors.places import Place, Places, Share, network_of
from privet.common.errors import StateError

SHARE = Share(strangers=8, address=6, member=2)
HOME = ("10.0.0.1", 1)


class Crowd:
    """Connections to a port, and which of them were closed."""

    def __init__(self, share: Share = SHARE) -> None:
        self.places, self.closed, self.ports = Places(share), list[tuple[str, int]](), 1000

    def come(self, address: str) -> Place:
        self.ports += 1
        peer = (address, self.ports)
        return self.places.enter(peer, lambda: self.closed.append(peer))

    def prove(self, place: Place, member: str) -> None:
        self.places.belongs(place.peer, member)


moves = st.lists(
    st.one_of(
        st.tuples(st.just("come"), st.integers(0, 5)),
        st.tuples(st.just("prove"), st.integers(0, 30), st.integers(0, 3)),
        st.tuples(st.just("leave"), st.integers(0, 30)),
    ),
    max_size=80,
)


@given(moves)
def test_no_share_is_ever_exceeded_and_nobody_new_is_refused(attack: list[tuple[object, ...]]) -> None:
    crowd, come = Crowd(), list[Place]()
    for move, *more in attack:
        numbers = [int(str(each)) for each in more]
        if move == "come":
            come.append(crowd.come(f"10.0.0.{numbers[0]}"))
            assert not come[-1].gone
        elif come and move == "prove":
            crowd.prove(come[numbers[0] % len(come)], f"member {numbers[1]}")
        elif come:
            crowd.places.leave(come[numbers[0] % len(come)])
        here = [place for place in come if not place.gone]
        assert len(crowd.places) == len(here)
        strangers = [place for place in here if not place.member]
        assert crowd.places.strangers == len(strangers) <= SHARE.strangers
        for place in here:
            same = [each for each in here if each.member == place.member]
            if place.member:
                assert len(same) <= SHARE.member
            else:
                assert sum(each.address == place.address for each in same) <= SHARE.address


def test_one_address_takes_no_place_from_another() -> None:
    crowd = Crowd()
    mine = [crowd.come("10.0.0.1") for _ in range(2)]  # a site uses two connections
    for _ in range(500):
        crowd.come("10.0.0.2")
    assert not any(place.gone for place in mine)


def test_newcomers_from_many_addresses_displace_nobody_who_comes_from_where_a_member_has_called() -> None:
    crowd = Crowd()
    first = crowd.come("10.0.0.1")
    crowd.prove(first, "berlin")
    again = crowd.come("10.0.0.1")
    for number in range(500):
        crowd.come(f"10.1.{number // 250}.{number % 250}")
    assert not first.gone
    assert not again.gone


def test_of_strangers_on_equal_terms_the_oldest_gives_way() -> None:
    crowd = Crowd()
    come = [crowd.come(f"10.0.0.{number}") for number in range(9)]
    assert [place.gone for place in come] == [True] + [False] * 8
    assert crowd.closed == [come[0].peer]
    assert crowd.places.close_oldest()
    assert come[1].gone


def test_members_in_league_take_no_place_from_another_member() -> None:
    crowd = Crowd()
    mine = [crowd.come("10.0.0.1") for _ in range(2)]
    for place in mine:
        crowd.prove(place, "berlin")
    for number in range(400):
        crowd.prove(crowd.come(f"10.2.0.{number % 200}"), f"member {number % 4}")
    assert not any(place.gone for place in mine)
    crowd.prove(crowd.come("10.0.0.1"), "berlin")
    assert [place.gone for place in mine] == [True, False]  # its own oldest, which may have died on the way


def test_a_member_fills_no_memory_with_the_addresses_it_calls_from() -> None:
    crowd = Crowd()
    for number in range(200):
        crowd.prove(crowd.come(f"10.2.0.{number}"), "berlin")
    assert sum(map(len, crowd.places._remembered.values())) <= 4


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("fe80::1%eth0", "fe80::2", True),
        ("10.0.0.1", "10.0.0.2", False),
    ],
)
def test_a_host_with_many_addresses_is_counted_as_one(one: str, other: str, same: bool) -> None:
    assert (network_of(one) == network_of(other)) is same


def test_too_few_files_are_said_with_what_to_do() -> None:
    check_limit(100 + SPARE, 100, "tests")
    check_limit(-1, 100, "tests")
    with pytest.raises(StateError, match=f"may open 99 files; {100 + SPARE} are needed: 100 for tests") as caught:
        check_limit(99, 100, "tests")
    assert "LimitNOFILE" in caught.value.hint
    assert raise_limit() == raise_limit()
