"""The places at a port: how many connections outsiders and members may hold. Pure: no socket, no clock.

A connection is a stranger's until its caller has proved to be a member. Strangers share a fixed number of places. No
newcomer is refused: when all of these places are taken, another stranger gives way. So whoever holds connections open,
from however many addresses, keeps nobody else out. Which stranger gives way:

1. one from an address that holds more than `_FAIR` of these places, so that many addresses lose nothing to one,
2. one from an address where no member has called from, so that outsiders' newcomers displace no member,
3. of these, the oldest.

A member has places of its own, and its own oldest connection gives way when they are taken. So members in league take
places from nobody else.
"""

from __future__ import annotations

import ipaddress
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

_FAIR = 4
# Addresses that are remembered for each member: an institution has few, and a member must not fill the memory.
_REMEMBERED = 4


@dataclass(frozen=True)
class Share:
    """How many connections a port serves at a time.

    Attributes:
        strangers: Of callers that have not proved to be members, in all.
        address: Of these, from one address (IPv6: from one /64 network).
        member: Of each member.
    """

    strangers: int = 128
    address: int = 32
    member: int = 8

    def most(self, members: int) -> int:
        """Return the most connections with so many members."""
        return self.strangers + members * self.member


class Place:
    """One connection's place. `close` must end the connection soon, without blocking; the owner of a port sets it."""

    __slots__ = ("address", "close", "gone", "member", "number", "peer")

    def __init__(self, peer: tuple[str, int], address: str, number: int, close: Callable[[], object]) -> None:
        self.peer, self.address, self.number, self.close = peer, address, number, close
        self.member = ""
        self.gone = False


class Places:
    """The places at one port. Threads may share it; `close` of a place that gives way runs in the newcomer's thread."""

    def __init__(self, share: Share, crowded: Callable[[Place], None] = lambda place: None) -> None:
        """Start with no connections.

        Args:
            share: The limits.
            crowded: Called with each place that gives way.
        """
        self.share, self._crowded = share, crowded
        self._lock, self._numbers = threading.Lock(), count()
        self._strangers: OrderedDict[Place, None] = OrderedDict()
        self._members: dict[str, OrderedDict[Place, None]] = {}
        self._peers: dict[tuple[str, int], Place] = {}
        self._addresses: Counter[str] = Counter()
        self._remembered: dict[str, OrderedDict[str, None]] = {}

    def __len__(self) -> int:
        return len(self._peers)

    @property
    def strangers(self) -> int:
        """How many connections of strangers there are."""
        return len(self._strangers)

    def everybody(self) -> list[Place]:
        """Return all places that are taken."""
        with self._lock:
            return list(self._peers.values())

    def enter(self, peer: tuple[str, int], close: Callable[[], object]) -> Place:
        """Give a new connection a stranger's place; another stranger's connection may be closed for it.

        Args:
            peer: Address and port of the caller.
            close: Ends the connection.
        """
        place = Place(peer, network_of(peer[0]), next(self._numbers), close)
        with self._lock:
            out = self._who_gives_way(place.address)
            if out is not None:
                self._remove(out)
            self._strangers[place] = None
            self._addresses[place.address] += 1
            self._peers[peer] = place
        self._end(out)
        return place

    def belongs(self, peer: tuple[str, int] | None, member: str) -> None:
        """Move a connection to the places of a member that has proved to use it; the member's oldest may be closed."""
        out = None
        with self._lock:
            place = self._peers.get(peer) if peer is not None else None
            if place is None or place.member == member:
                return
            self._remove(place)
            own = self._members.setdefault(member, OrderedDict())
            if len(own) >= self.share.member:
                out = next(iter(own))
                self._remove(out)
            place.gone, place.member = False, member
            self._members.setdefault(member, OrderedDict())[place] = None
            self._peers[place.peer] = place
            seen = self._remembered.setdefault(member, OrderedDict())
            seen[place.address] = None
            seen.move_to_end(place.address)
            if len(seen) > _REMEMBERED:
                seen.popitem(last=False)
        self._end(out)

    def leave(self, place: Place) -> None:
        """Free the place of a connection that has ended."""
        with self._lock:
            self._remove(place)

    def close_oldest(self) -> bool:
        """Close the stranger that gives way first, as when files run out; return whether there was one."""
        with self._lock:
            out = self._oldest()
            if out is not None:
                self._remove(out)
        self._end(out)
        return out is not None

    def _who_gives_way(self, address: str) -> Place | None:
        if self._addresses[address] >= self.share.address:
            return next(place for place in self._strangers if place.address == address)
        return self._oldest() if len(self._strangers) >= self.share.strangers else None

    def _oldest(self) -> Place | None:
        known = {address for seen in self._remembered.values() for address in seen}
        return min(
            self._strangers,
            key=lambda each: (self._addresses[each.address] <= _FAIR, each.address in known, each.number),
            default=None,
        )

    def _remove(self, place: Place) -> None:
        if place.gone:
            return
        place.gone = True
        self._peers.pop(place.peer, None)
        if place.member:
            own = self._members[place.member]
            del own[place]
            if not own:
                del self._members[place.member]
        else:
            del self._strangers[place]
            self._addresses[place.address] -= 1
            if not self._addresses[place.address]:
                del self._addresses[place.address]

    def _end(self, out: Place | None) -> None:
        if out is not None:
            self._crowded(out)
            out.close()


def network_of(address: str) -> str:
    """Return the name under which an address is counted: IPv4 as it is, IPv6 by /64, which one host may own whole."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((int(found), 64), strict=False))
