"""Renewal of a site's certificate while the site serves: over a connection with the present certificate, for a new key.

A renewal is due when two thirds of the certificate's life are over, plus up to a twelfth of its life. The certificate's
serial number decides how much, so that sites that joined together do not renew together. A failed attempt is repeated
after one minute, and then after twice as long each time, up to one hour. The service refuses a revoked site, and a
certificate that a newer one has replaced. These and expired certificates are not renewed here: they need the identity
key, and an operator decides whether to use it (`privet site renew`).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from cryptography.x509 import Certificate

from privet.client.repeating import repeating
from privet.common.errors import PrivetError, RefusedError
from privet.common.pki.certificates import life_of, renewal_of

_log = logging.getLogger("privet.site")
# Never waits longer than this: the clock may be set meanwhile, and the machine may sleep.
_LOOK = 3600.0
_FIRST_WAIT, _LONGEST_WAIT = 60.0, 3600.0
_DOUBLED = 10
_LATEST = 12


class Paper(Protocol):
    """Keeps the certificate (`privet.client.network.enrolment.Enrolment`)."""

    @property
    def certificate(self) -> Certificate:
        """The present certificate."""


class Issuer(Protocol):
    """Renews the certificate (`privet.client.network.consortium.ConsortiumClient`)."""

    @property
    def enrolment(self) -> Paper:
        """The directory that keeps the certificate."""

    @property
    def clock(self) -> Callable[[], datetime]:
        """Returns the time."""

    def renew(self) -> Certificate:
        """Get a new certificate and store it."""


def _chance() -> float:
    return secrets.randbelow(1000) / 1000


@dataclass
class Renewal:
    """Renews a site's certificate.

    Attributes:
        issuer: Renews the certificate.
        until: Called with the expiry of the present certificate.
        chance: Returns a number from 0 to 1, which spreads repeated attempts in time.
    """

    issuer: Issuer
    until: Callable[[datetime], None] = lambda time: None
    chance: Callable[[], float] = _chance
    _failed: int = 0

    def tend(self) -> float:
        """Renew the certificate if it is due, and return the seconds until the next check. Never raises."""
        try:
            wait = self._tend()
        except RefusedError as error:
            extra = {"event": "renewal-refused", "reason": error.message}
            _log.error("the certificate is not renewed: %s; run `privet site renew SITE`", error.message, extra=extra)
            return _LONGEST_WAIT
        except Exception as error:  # any error: the thread must go on. Only our own errors have texts safe to log
            said = str(error) if isinstance(error, PrivetError) else type(error).__name__
            wait = min(_FIRST_WAIT * 2.0**self._failed, _LONGEST_WAIT) * (0.5 + self.chance() / 2)
            self._failed = min(self._failed + 1, _DOUBLED)
            extra = {"event": "renewal-failed", "reason": type(error).__name__}
            _log.warning("renewal of the certificate failed, next attempt in %.0f s: %s", wait, said, extra=extra)
            return wait
        self._failed = 0
        return wait

    def _tend(self) -> float:
        present, now = self.issuer.enrolment.certificate, self.issuer.clock()
        end = present.not_valid_after_utc
        self.until(end)
        if now >= end:
            extra = {"event": "certificate-expired"}
            _log.error("the certificate expired at %s: run `privet site renew SITE`", end.isoformat(), extra=extra)
            return _LONGEST_WAIT
        due = due_at(present)
        if now < due:
            return min((due - now).total_seconds(), _LOOK)
        renewed = self.issuer.renew()
        self.until(renewed.not_valid_after_utc)
        until = renewed.not_valid_after_utc.isoformat()
        _log.info("the certificate was renewed; it is valid until %s", until, extra={"event": "certificate-renewed"})
        return _FIRST_WAIT


def due_at(certificate: Certificate) -> datetime:
    """Return when renewal is due: after two thirds of the certificate's life, plus up to a twelfth of it."""
    return renewal_of(certificate) + life_of(certificate) / _LATEST * (certificate.serial_number % 1000 / 1000)


@contextmanager
def renewing(renewal: Renewal) -> Iterator[None]:
    """Renew a site's certificate in a thread, until the block ends."""
    with repeating("renewal", renewal.tend):
        yield
