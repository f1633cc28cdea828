"""Whom a site trusts: the charter of its consortium and the keys of its members, each confirmed by a person.

The file `consortium/trusted.json` begins with the site's own keys alone. The charter and each other member are added by
`privet site trust`, after the operator typed the words that the other side's operator read out. From nothing else does
a site derive whose statements, whose cosignatures and whose masks it accepts.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Self

from pydantic import model_validator

from privet.common.errors import ProtocolError, StateError, VerificationError
from privet.common.files import write_durably
from privet.common.log.statements import Member
from privet.common.pki.charter import Charter
from privet.common.pki.enrolment import SiteKeys, Spoken
from privet.common.pki.words import mistyped

TRUSTED = "consortium/trusted.json"
"""Path in a site's directory."""


class Trusted(Spoken):
    """What a site's operator has confirmed."""

    charter: Charter | None = None
    """None until it is confirmed; the site takes part in nothing before."""
    members: tuple[SiteKeys, ...] = ()
    """Ascending by name. The site itself is one of them."""

    @model_validator(mode="after")
    def _once(self) -> Self:
        names = [keys.site for keys in self.members]
        if names != sorted(set(names)):
            raise ValueError("members: expected each name once, in ascending order")
        return self

    @property
    def keys(self) -> Mapping[str, SiteKeys]:
        """The members' keys by name."""
        return {keys.site: keys for keys in self.members}

    @property
    def pins(self) -> Mapping[str, bytes]:
        """The members' identity keys by name, 32 bytes each."""
        return {keys.site: bytes.fromhex(keys.identity) for keys in self.members}

    @property
    def stated(self) -> Mapping[str, Member]:
        """The members as the round log has to name them."""
        return {keys.site: keys.member for keys in self.members}

    def with_charter(self, claimed: Charter, told: str) -> Trusted:
        """Confirm a charter by the words that the coordinator's operator read out.

        Raises:
            VerificationError: The words are others.
        """
        if not claimed.is_told(told):
            raise VerificationError(
                f"the words are not those of the charter of {claimed.consortium} that this site received"
                + mistyped(told),
                "have them read out again. If they still differ, somebody shows this site another consortium: trust "
                "nothing, and warn the coordinator's operator",
            )
        return self.model_copy(update={"charter": claimed})

    def with_member(self, keys: SiteKeys, told: str) -> Trusted:
        """Confirm a member by the words, or the fingerprint, that its operator read out.

        Raises:
            VerificationError: They are not those of the keys that the coordinator names.
        """
        if not keys.is_told(told):
            raise VerificationError(
                f"the words are not those of the keys that the coordinator names for site {keys.site}{mistyped(told)}",
                "have them read out again. If they still differ, the coordinator names keys that are not that site's: "
                "do not trust it, and warn the other sites",
            )
        return self._replaced({**self.keys, keys.site: keys})

    def without(self, name: str) -> Trusted:
        """Trust a member no longer.

        Raises:
            ProtocolError: It was not trusted.
        """
        if name not in self.keys:
            raise ProtocolError(
                f"this site does not trust a site {name}", "list whom it trusts: `privet site roster SITE`"
            )
        return self._replaced({site: keys for site, keys in self.keys.items() if site != name})

    def _replaced(self, members: Mapping[str, SiteKeys]) -> Trusted:
        return self.model_copy(update={"members": tuple(members[name] for name in sorted(members))})


def read_trusted(path: Path) -> Trusted:
    """Read the file of confirmed keys.

    Raises:
        StateError: It is missing or malformed.
    """
    try:
        if path.stat().st_mode & 0o022:
            raise StateError(
                f"other users of this machine can write the file {path} of the keys that this site trusts",
                f"run `chmod go-w {path}`, and compare everybody's words again: `privet site roster SITE`",
            )
        return _parsed(path.read_bytes())
    except (OSError, ProtocolError) as error:
        raise StateError(
            f"trusted: the file {path} of the keys that this site trusts is missing or malformed "
            f"({type(error).__name__})",
            "restore it from a backup, or make it anew with `privet site setup SITE` and confirm everybody again",
        ) from None


def write_trusted(path: Path, trusted: Trusted) -> None:
    """Replace the file, durably.

    Raises:
        StateError: It cannot be written.
    """
    try:
        write_durably(path, trusted.encode(), 0o600)
    except OSError as error:
        raise StateError(
            f"{path} cannot be written ({error.strerror})", "check the disk space and the permissions, then try again"
        ) from None


@contextmanager
def changing(path: Path) -> Iterator[None]:
    """Hold the file's lock while it is read and replaced: of two commands, one could undo what the other has changed.

    Raises:
        StateError: The lock cannot be taken.
    """
    try:
        descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateError(
            f"{path} cannot be changed ({error.strerror})", "check the permissions of its directory, then try again"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@lru_cache(maxsize=8)
def _parsed(data: bytes) -> Trusted:
    return Trusted.decode(data)
