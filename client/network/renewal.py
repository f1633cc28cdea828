"""A site's certificate is renewed while the site serves: over the present one, for a new key, in the present name.

It begins when less than a third of its life is left, up to a twelfth of it later, by the certificate's number, so that
sites that joined together do not come together. An attempt that fails is repeated after a minute, and then after twice
as long each time, up to an hour. The service refuses a site that was revoked, and a certificate that another one has
replaced. Neither that nor an expired one is renewed here: the identity key speaks for the site then, and an operator
decides whether it should.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from cryptography.x509 import Certificate

from privet.common.errors import PrivetError, RefusedError
from privet.common.pki.certificates import life_of, renewal_of

_log = logging.getLogger("privet.site")
# The clock may be set meanwhile, and the machine may sleep.
_LOOK = 3600.0
_FIRST_WAIT, _LONGEST_WAIT = 60.0, 3600.0
_DOUBLED = 10
_LATEST = 12


class Paper(Protocol):
    """Where the certificate is kept (`privet.client.network.enrolment.Enrolment`)."""

    @property
    def certificate(self) -> Certificate:
        """The present one."""


class Issuer(Protocol):
    """Who renews it (`privet.client.network.consortium.ConsortiumClient`)."""

    @property
    def enrolment(self) -> Paper:
        """Where it is kept."""

    @property
    def clock(self) -> Callable[[], datetime]:
        """Returns the time."""

    def renew(self) -> Certificate:
        """Get a new certificate and keep it."""


def _chance() -> float:
    return secrets.randbelow(1000) / 1000


@dataclass
class Renewal:
    """Renews a site's certificate.

    Attributes:
        issuer: Renews it.
        until: Told when the present one expires.
        chance: Returns a number from 0 to 1, by which repeated attempts are spread.
    """

    issuer: Issuer
    until: Callable[[datetime], None] = lambda time: None
    chance: Callable[[], float] = _chance
    _failed: int = 0

    def tend(self) -> float:
        """Renew the certificate if it is time, and return the seconds until one should look again. Never raises."""
        try:
            wait = self._tend()
        except RefusedError as error:
            extra = {"event": "renewal-refused", "reason": error.message}
            _log.error("the certificate is not renewed: %s; run `privet site renew`", error.message, extra=extra)
            return _LONGEST_WAIT
        except Exception as error:  # whatever it is, the thread goes on; only what is ours is told in words
            said = str(error) if isinstance(error, PrivetError) else type(error).__name__
            wait = min(_FIRST_WAIT * 2.0**self._failed, _LONGEST_WAIT) * (0.5 + self.chance() / 2)
            self._failed = min(self._failed + 1, _DOUBLED)
            extra = {"event": "renewal-failed", "reason": type(error).__name__}
            _log.warning("the certificate could not be renewed, next try in %.0f s: %s", wait, said, extra=extra)
            return wait
        self._failed = 0
        return wait

    def _tend(self) -> float:
        present, now = self.issuer.enrolment.certificate, self.issuer.clock()
        end = present.not_valid_after_utc
        self.until(end)
        if now >= end:
            extra = {"event": "certificate-expired"}
            _log.error("the certificate expired at %s: run `privet site renew`", end.isoformat(), extra=extra)
            return _LONGEST_WAIT
        due = due_at(present)
        if now < due:
            return min((due - now).total_seconds(), _LOOK)
        renewed = self.issuer.renew()
        self.until(renewed.not_valid_after_utc)
        until = renewed.not_valid_after_utc.isoformat()
        _log.info("the certificate was renewed, until %s", until, extra={"event": "certificate-renewed"})
        return _FIRST_WAIT


def due_at(certificate: Certificate) -> datetime:
    """Return when a certificate is renewed: after two thirds of its life, and up to a twelfth of it later."""
    return renewal_of(certificate) + life_of(certificate) / _LATEST * (certificate.serial_number % 1000 / 1000)


@contextmanager
def renewing(renewal: Renewal) -> Iterator[None]:
    """Keep a site's certificate renewed, in a thread, until the block ends."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(renewal.tend()):
            pass

    threading.Thread(target=run, daemon=True, name="renewal").start()
    try:
        yield
    finally:
        ended.set()
