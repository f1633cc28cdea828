"""Whom a site trusts: the charter of its consortium and the keys of its members, each confirmed by a person.

The file `consortium/trusted.json` begins with the site's own keys alone. The charter and each other member are added by
`privet site trust`, after the operator typed the words that the other side's operator read out. From nothing else does
a site derive whose statements, whose cosignatures and whose masks it accepts. Keys that a rotation has replaced stay in
the file, with their end, so that older checkpoints can be verified.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from privet.common.canonical import digest
from privet.common.errors import ProtocolError, StateError, VerificationError
from privet.common.files import write_durably
from privet.common.log.epochs import KeyEpoch
from privet.common.log.note import VKEY_CHARACTERS, NoteKey
from privet.common.log.statements import Hex32, Member, Natural
from privet.common.pki.charter import Charter
from privet.common.pki.enrolment import SiteKeys, Spoken
from privet.common.pki.words import mistyped

TRUSTED = "consortium/trusted.json"
"""Path in a site's directory."""


class EndedKeys(Spoken):
    """Keys of log and coordinator that a rotation has replaced: what they signed before stays valid."""

    log: Annotated[str, Field(max_length=VKEY_CHARACTERS)]
    coordinator: Hex32
    until: Natural
    """Size of the first checkpoint, and number of the first leaf, for which they count no longer."""

    @field_validator("log")
    @classmethod
    def _is_a_key(cls, text: str) -> str:
        try:
            NoteKey.parse(text)
        except ProtocolError as error:
            raise ValueError(error.message) from None
        return text


class Trusted(Spoken):
    """What a site's operator has confirmed."""

    charter: Charter | None = None
    """None until it is confirmed; the site takes part in nothing before."""
    members: tuple[SiteKeys, ...] = ()
    """Ascending by name. The site itself is one of them."""
    former: Annotated[tuple[EndedKeys, ...], Field(exclude_if=lambda value: not value)] = ()
    """The keys before those of the charter, the oldest first, as the log had them when a rotation was confirmed."""

    @model_validator(mode="after")
    def _once(self) -> Self:
        names = [keys.site for keys in self.members]
        if names != sorted(set(names)):
            raise ValueError("members: expected each name once, in ascending order")
        ends = [0, *(keys.until for keys in self.former)]
        if ends != sorted(set(ends)) or (self.former and self.charter is None):
            raise ValueError("former: expected keys that ended one after the other, before those of a charter")
        return self

    @property
    def epochs(self) -> Sequence[KeyEpoch]:
        """The keys of log and coordinator, and from when on they count. Empty before the charter is confirmed."""
        if self.charter is None:
            return ()
        keys = [*((each.log, each.coordinator) for each in self.former), (self.charter.log, self.charter.coordinator)]
        since = (0, *(each.until for each in self.former))
        return tuple(
            KeyEpoch(start, NoteKey.parse(log), bytes.fromhex(coordinator))
            for start, (log, coordinator) in zip(since, keys, strict=True)
        )

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
            VerificationError: The words are others; or its keys are others than those of the confirmed charter
                (`with_rotation`).
        """
        if not claimed.is_told(told):
            raise VerificationError(
                f"the words are not those of the charter of {claimed.consortium} that this site received"
                + mistyped(told),
                "have them read out again. If they still differ, somebody shows this site another consortium: trust "
                "nothing, and warn the coordinator's operator",
            )
        if self.charter is not None and claimed.keys != self.charter.keys:
            self.check_words(claimed, told)
            raise VerificationError(
                "the charter has other keys than the confirmed one: the site follows only if its log says so too",
                "confirm the rotation with the coordinator's service in reach: `privet site trust SITE`",
            )
        return self.model_copy(update={"charter": claimed})

    def check_words(self, claimed: Charter, told: str) -> None:
        """Check the words of a charter with new keys, or of one whose confirmation was lost.

        Raises:
            VerificationError: They are others, or more than keys would change.
        """
        if self.charter not in (None, claimed) and not claimed.renews(self.charter):
            raise VerificationError(
                "the charter that this site received changes more than the keys of log and coordinator",
                "trust nothing, and ask the coordinator's operator what has changed: a rotation replaces keys alone",
            )
        if not claimed.is_told(told):
            raise VerificationError(
                f"the words are not those of the charter of {claimed.consortium} with the keys that this site received",
                "have them read out again. If they still differ, the keys are not the coordinator's: trust nothing, "
                "and warn its operator",
            )

    def with_rotation(self, claimed: Charter, told: str, epochs: Sequence[KeyEpoch]) -> Trusted:
        """Confirm the charter with new keys, by its words and by the key epochs that the replayed log has.

        Where no charter is confirmed, the epochs come from the log alone, which ends with the keys of the words.

        Raises:
            VerificationError: As `check_words`; or the log does not lead from the confirmed keys to these.
        """
        self.check_words(claimed, told)
        known, last = self.epochs, epochs[-1]
        led = list(epochs[: len(known)]) == list(known)
        if known and not self.former:
            led = known[-1] in _from_any_start(epochs[:-1])
        if not led or (last.log.text, last.coordinator.hex()) != (claimed.log, claimed.coordinator):
            raise VerificationError(
                "the round log does not lead from the keys that this site has confirmed to those of the new charter",
                "take part in no round, and ask the operators of coordinator and sites",
            )
        if len(epochs) > 1 and last.charter != digest(claimed.encode()):
            raise VerificationError(
                f"leaf {last.since - 1} of the round log announces another charter with these keys",
                "take part in no round, and ask the coordinator's operator what has changed",
            )
        former = tuple(
            EndedKeys(log=was.log.text, coordinator=was.coordinator.hex(), until=at.since)
            for was, at in pairwise(epochs)
        )
        return self.model_copy(update={"charter": claimed, "former": former})

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


def _from_any_start(epochs: Sequence[KeyEpoch]) -> Sequence[KeyEpoch]:
    """Return the epochs as a site knows the first that it saw: a site that joined later knows of none before."""
    return [replace(epoch, since=0) for epoch in epochs]


@lru_cache(maxsize=8)
def _parsed(data: bytes) -> Trusted:
    return Trusted.decode(data)
