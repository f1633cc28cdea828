"""Who may use a console: links that work once, and the sessions that they open.

Both live in memory alone: a console that ends takes them along. A session reads, and starts what needs no signature. It
never signs: an approval needs the passphrase of a person's key each time.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

COOKIE = "__Host-privet"
"""Name of the cookie. Browsers take a cookie with this prefix only with Secure, with Path=/ and for one host."""
LINK_SECONDS, IDLE_SECONDS, WHOLE_SECONDS = 600.0, 1800.0, 8 * 3600.0
"""How long a link works; after how much idle time a session ends, and at the latest."""
_MOST_LINKS, _MOST_SESSIONS = 16, 32

Clock = Callable[[], float]
"""Returns seconds that never go back."""


class Role(StrEnum):
    """What a session may do: look, or also approve and steer."""

    VIEWER = "viewer"
    APPROVER = "approver"


@dataclass
class Session:
    """One browser that came by a link.

    Attributes:
        role: What it may do.
        began: When it began, by the clock of `Sessions`.
        used: When its last request came.
        token: Repeated by each of its forms, so that no other page can send one.
        language: Language that its user chose; empty: what the browser asks for.
    """

    role: Role
    began: float
    used: float
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    language: str = ""


class Sessions:
    """The links and the sessions of one console.

    Args:
        clock: Returns seconds that never go back.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # By digest: whoever compares or prints a key of these does not hold the secret, and a look-up takes the same
        # time however much of a guess is right.
        self._links: dict[bytes, tuple[Role, float]] = {}
        self._sessions: dict[bytes, Session] = {}

    def link(self, role: Role) -> str:
        """Return the secret of a new link. It works once, within `LINK_SECONDS`."""
        self._forget()
        if len(self._links) >= _MOST_LINKS:
            del self._links[next(iter(self._links))]
        secret = secrets.token_urlsafe(32)
        self._links[_name(secret)] = role, self._clock() + LINK_SECONDS
        return secret

    def enter(self, secret: str) -> str | None:
        """Use up a link; return the value of the new session's cookie, or None if the link does not work (any more)."""
        self._forget()
        found = self._links.pop(_name(secret), None)
        if found is None:
            return None
        if len(self._sessions) >= _MOST_SESSIONS:
            del self._sessions[min(self._sessions, key=lambda each: self._sessions[each].used)]
        value, now = secrets.token_urlsafe(32), self._clock()
        self._sessions[_name(value)] = Session(found[0], now, now)
        return value

    def of(self, value: str | None, *, touch: bool = True) -> Session | None:
        """Return the session of a cookie; None if there is none, or it has ended. `touch`: its user did something."""
        self._forget()
        found = None if value is None else self._sessions.get(_name(value))
        if found is not None and touch:
            found.used = self._clock()
        return found

    def leave(self, value: str | None) -> None:
        """End the session of a cookie."""
        if value is not None:
            self._sessions.pop(_name(value), None)

    def _forget(self) -> None:
        now = self._clock()
        self._links = {name: link for name, link in self._links.items() if now < link[1]}
        self._sessions = {
            name: each
            for name, each in self._sessions.items()
            if now - each.used < IDLE_SECONDS and now - each.began < WHOLE_SECONDS
        }


def _name(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


class Bucket:
    """Lets through so many events at once, and so many in a second on average.

    Args:
        burst: Events at once.
        rate: Events in a second.
        clock: Returns seconds that never go back.
    """

    def __init__(self, burst: int, rate: float, clock: Clock) -> None:
        self._burst, self._rate, self._clock = float(burst), rate, clock
        self._left, self._seen = self._burst, clock()

    def take(self) -> bool:
        """Return whether one more event is let through."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._seen) * self._rate)
        self._seen = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def give_back(self) -> None:
        """Let through one more: the last one was none of those that are to be limited."""
        self._left = min(self._burst, self._left + 1)
