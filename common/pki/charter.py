"""The charter: all that makes a consortium the one it is, in one short text that its people compare.

A site derives whom it believes from two kinds of things that were compared over the telephone: the words of the
charter, read out by the coordinator's operator, and the words of each member's keys, read out by that member's
operator. Nothing else that the coordinator says about keys, witnesses or quorums is believed.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

from cryptography.x509 import Certificate
from pydantic import Field, field_validator

from privet.common.errors import PrivetError, ProtocolError
from privet.common.log.note import ED25519, VKEY_CHARACTERS, NoteKey
from privet.common.log.statements import Hex32
from privet.common.pki.certificates import fingerprint, root_bytes
from privet.common.pki.enrolment import Spoken, Terms
from privet.common.pki.words import same_words, words_of
from privet.common.study.sections import Name


class Charter(Spoken):
    """What every member of a consortium trusts, and what never changes unless all members agree."""

    consortium: Name
    root: Hex32
    """SHA-256 of the root certificate (DER)."""
    log: Annotated[str, Field(max_length=VKEY_CHARACTERS)]
    """Key of the round log (vkey). Its name is the log's origin. A hybrid one has the coordinator's ML-DSA-65 key."""
    coordinator: Hex32
    """Ed25519: signs the coordinator's statements."""
    colluding: Annotated[int, Field(ge=0, le=1000)]
    """f: number of members that may collude with the coordinator. The quorum follows from it."""

    @field_validator("log")
    @classmethod
    def _is_a_log(cls, text: str) -> str:
        try:
            key = NoteKey.parse(text)
        except PrivetError as error:
            raise ValueError(error.message) from None
        if key.kind != ED25519:
            raise ValueError("expected the key of a log")
        return text

    @classmethod
    def make(cls, consortium: str, root: Certificate, log: str, coordinator: str, colluding: int) -> Charter:
        """Return the charter of a consortium."""
        digest = hashlib.sha256(root_bytes(root)).hexdigest()
        return cls(consortium=consortium, root=digest, log=log, coordinator=coordinator, colluding=colluding)

    @classmethod
    def claimed(cls, terms: Terms, root: Certificate) -> Charter:
        """Return the charter that the coordinator claims. It counts once its words were compared.

        Raises:
            ProtocolError: The coordinator runs a version that states no charter.
        """
        if terms.log is None or terms.colluding is None:
            raise ProtocolError(
                "the coordinator states no charter: it runs an earlier version of privet",
                "ask the coordinator's operator to install this version and to start `privet coordinator serve` again",
            )
        return cls.make(terms.consortium, root, terms.log, terms.coordinator, terms.colluding)

    @property
    def keys(self) -> tuple[str, str]:
        """The keys of log and coordinator, which a rotation replaces."""
        return self.log, self.coordinator

    def renews(self, other: Charter) -> bool:
        """Return whether the keys of log and coordinator differ from those of another charter, and nothing else.

        A charter with a hybrid key is renewed by one with a hybrid key alone.
        """
        log, coordinator = self.keys
        if not other.model_copy(update={"log": log, "coordinator": coordinator}) == self != other:
            return False
        was, new = NoteKey.parse(other.log), NoteKey.parse(log)
        return was.name == new.name and bool(new.pq) >= bool(was.pq)

    @property
    def words(self) -> str:
        """The words that the coordinator's operator reads out."""
        return words_of(self.encode())

    @property
    def fingerprint(self) -> str:
        """The same as 60 digits."""
        return fingerprint(self.encode())

    def is_told(self, told: str) -> bool:
        """Return whether words are those of this charter."""
        return same_words(told, self.words)
