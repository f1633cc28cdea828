"""The people who were withdrawn from a site's data, and whether the whole dataset was: marks, and never ids.

A mark is HMAC-SHA256 of an id under a key of the site. Ids of patients are few and easily guessed, so a plain hash
would name its patient to whoever tries them all; a slow one would in days. The marks lie beside the ledger, and the key
beside the ledger's key, in another directory. A thief of a backup of the marks alone learns how many there are.

The marks are rows of a hash chain with an anchor of its own, as the ledger is (`client/budget/chain.py`), and no rows
of the ledger. Each statement of a site in the round log names its ledger's last row by number: a row for each
withdrawal would tell everybody when one person left. See docs/decisions/0024-tombstones-and-sources.md.

Fails closed. Without the key, with an old copy of the marks, or where the site file names patients by another column
than the marks are of, nothing is read from any file. The site file says that there are marks (`withdrawals`), so that
they are missed also where all of them are lost, or where the ledger was moved without them.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privet.client.budget.chain import Chain, Head
from privet.client.budget.sealing import KEY_BYTES, key_beside, read_secret
from privet.client.site import SiteConfig
from privet.common.errors import RefusedError, StateError, VerificationError
from privet.common.files import write_new

_TABLES = """
CREATE TABLE entries (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    content TEXT NOT NULL,
    head TEXT NOT NULL
) STRICT;
CREATE TRIGGER entries_keep BEFORE UPDATE ON entries BEGIN SELECT raise(ABORT, 'rows are final'); END;
CREATE TRIGGER entries_stay BEFORE DELETE ON entries BEGIN SELECT raise(ABORT, 'rows are final'); END;
"""
_RESTORE = (
    "restore the newest copies of the marks, their key and their anchor from backups; until then this site reads no "
    "file"
)
Names = Mapping[str, str]
"""The names of one id, by the rule of ids that gives it (`privet.client.training.ids.names_by_rule`)."""


@dataclass(frozen=True)
class Places:
    """Where the marks of a site lie.

    Attributes:
        marks: The hash chain, beside the ledger.
        key: The key, beside the ledger's key.
        anchor: The chain's last head, beside the ledger's anchor; None if the site has none.
    """

    marks: Path
    key: Path
    anchor: Path | None

    @classmethod
    def of(cls, site: SiteConfig) -> Places | None:
        """Return the places of a site; None if its file names no ledger, as of a simulated site."""
        if site.ledger is None:
            return None
        key = withdrawn_key(site.ledger_key or key_beside(site.ledger))
        anchor = None if site.anchor is None else _anchor_beside(site.anchor)
        return cls(site.ledger.with_suffix(".withdrawn"), key, anchor)

    @property
    def files(self) -> list[Path]:
        """All of them."""
        return [self.marks, self.key, *([] if self.anchor is None else [self.anchor])]


@dataclass(frozen=True)
class Withdrawn:
    """Who is left out of everything that a site reads.

    Attributes:
        column: Column of the site's files that identifies patients.
        head: Number and head of the last row of the chain: another one means that somebody was withdrawn since.
        left: Whether the whole dataset was withdrawn.
    """

    column: str | None
    head: Head
    left: bool
    _marks: frozenset[str] = field(repr=False)
    _key: bytes = field(repr=False)

    def __bool__(self) -> bool:
        """Whether anybody is left out."""
        return bool(self._marks)

    def document(self) -> dict[str, Any]:
        """Return this as JSON values, for the site's own trainer. They hold the key of the marks."""
        about = {"column": self.column, "head": list(self.head), "left": self.left}
        return {**about, "marks": sorted(self._marks), "key": self._key.hex()}

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Withdrawn:
        """Read what `document` wrote."""
        head = int(found["head"][0]), str(found["head"][1])
        return cls(found["column"], head, bool(found["left"]), frozenset(found["marks"]), bytes.fromhex(found["key"]))

    def holds(self, names: Names) -> bool:
        """Return whether the id with these names was withdrawn."""
        return any(_mark(self._key, rule, name) in self._marks for rule, name in names.items())


@dataclass(frozen=True)
class Entry:
    """One withdrawal, as a certificate names it.

    Attributes:
        row: Its row of the chain.
        head: Head of that row.
        time: Time of the row, ISO 8601.
        mark: The person's mark; empty for the whole dataset.
        again: Whether the person was withdrawn before; the row is then that of the first time.
    """

    row: int
    head: str
    time: str
    mark: str
    again: bool = False


class Withdrawals:
    """The open chain of a site's withdrawals."""

    def __init__(self, site: SiteConfig, chain: Chain, key: bytes) -> None:
        self._site = site
        self._chain = chain
        self._key = key

    @classmethod
    @contextmanager
    def open(cls, site: SiteConfig, *, create: bool = False) -> Iterator[Withdrawals | None]:
        """Open a site's withdrawals for the block; None if there never were any.

        Args:
            site: The site file.
            create: Whether to make them where there never were any.

        Raises:
            StateError: One of marks, key and anchor is missing or cannot be read; or with `create`, the site file names
                no ledger.
            VerificationError: A row was changed, or an old copy was restored. Private, as it tells that somebody was
                withdrawn.
        """
        places = Places.of(site)
        if places is None:
            if create or site.withdrawals:
                raise StateError(
                    f"the site file of {site.name} names no ledger, beside which withdrawals are kept",
                    "run `privet site setup SITE`, which puts the line back",
                )
            yield None
            return
        there = [path for path in places.files if path.exists()]
        begun = site.withdrawals or (bool(there) and not _is_unfinished(places))
        if not begun and not create:
            yield None
            return
        if begun and len(there) < len(places.files):
            gone = ", ".join(str(path) for path in places.files if path not in there)
            raise StateError(f"people were withdrawn from this site's data, but {gone} is missing", _RESTORE)
        if not begun:
            _create(places)
        try:
            chain = Chain.open(places.marks, _TABLES, places.anchor)
        except VerificationError as error:
            error.private = True
            raise
        try:
            yield cls(site, chain, read_secret(places.key, "the key of withdrawals", _RESTORE))
        finally:
            chain.close()

    def withdrawn(self) -> Withdrawn:
        """Return who is left out.

        Raises:
            StateError: The site file names patients by another column than the marks are of, or the key is another one
                than that of the marks.
        """
        rows, head = self._rows()
        self._check_key(rows)
        # Also by the rule of the day on which somebody was withdrawn: what was one id then stays left out as one.
        rules = (self._site.patient_ids,) if self._site.patient_ids is not None else ("plain", "number", "text", "case")
        marks = frozenset(
            mark
            for row in rows
            if row["kind"] == "withdraw"
            for rule, mark in row["marks"].items()
            if rule in rules or rule == row.get("rule")
        )
        columns = [row["column"] for row in rows if row["kind"] in ("withdraw", "renamed")]
        own = self._site.patient_column
        if marks and columns[-1] != own:
            raise StateError(
                f"people were withdrawn by their ids in the column {columns[-1]}, but patient_column in the site file "
                f"is {own}: nobody could be left out",
                "put `patient_column` back; or, if the column has only got another name and holds the same ids, run "
                "`privet site withdraw SITE --renamed`",
            )
        left = any(row["kind"] == "leave" for row in rows)
        return Withdrawn(own, head, left, marks, self._key)

    def add(self, people: Iterable[Names]) -> list[Entry]:
        """Withdraw people, each with all names of an id. Durable on return. Who was withdrawn before stays so."""
        found = []
        with self._chain.transaction():
            self._check_key(rows := self._read())
            known = {
                mark: Entry(row["row"], row["head"], row["time"], row["marks"]["plain"], again=True)
                for row in rows
                if row["kind"] == "withdraw"
                for mark in row["marks"].values()
            }
            for names in people:
                marks = {rule: _mark(self._key, rule, name) for rule, name in names.items()}
                if marks["plain"] in known:
                    found.append(known[marks["plain"]])
                    continue
                about = {"column": self._site.patient_column, "rule": self._site.patient_ids, "check": self._check}
                self._chain.append({"kind": "withdraw", **about, "marks": marks})
                row = self._read()[-1]
                found.append(Entry(row["row"], row["head"], row["time"], marks["plain"]))
                known[marks["plain"]] = found[-1]
        self._chain.keep_anchor()
        return found

    def leave(self) -> Entry:
        """Withdraw the whole dataset: this site takes part in no later round. Durable on return, and for good."""
        with self._chain.transaction():
            before = [row for row in self._read() if row["kind"] == "leave"]
            if not before:
                self._chain.append({"kind": "leave", "dataset": self._site.dataset})
            row = before[0] if before else self._read()[-1]
        self._chain.keep_anchor()
        return Entry(row["row"], row["head"], row["time"], "", again=bool(before))

    def rename(self) -> None:
        """Record that the present `patient_column` holds the ids that the marks are of. Durable on return."""
        with self._chain.transaction():
            self._chain.append({"kind": "renamed", "column": self._site.patient_column})
        self._chain.keep_anchor()

    @property
    def _check(self) -> str:
        """What stands for the key in each row of a person."""
        return _mark(self._key, "check", "")

    def _check_key(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Raise `StateError` where marks were made with another key: nobody would be left out by them."""
        if any(row.get("check", self._check) != self._check for row in rows):
            raise StateError("the key of withdrawals is another one than the marks were made with", _RESTORE)

    def _rows(self) -> tuple[list[dict[str, Any]], Head]:
        with self._chain.reading():
            return self._read(), self._chain.last()

    def _read(self) -> list[dict[str, Any]]:
        """Return all rows, within a transaction, each with its number and head."""
        rows = self._chain.query("SELECT sequence, head, content FROM entries ORDER BY sequence", {})
        return [{**json.loads(content), "row": sequence, "head": head} for sequence, head, content in rows]


def _is_unfinished(places: Places) -> bool:
    """Return whether marks were begun and nobody was withdrawn: the key is made last, before the first row."""
    if places.key.exists() or not places.marks.exists():
        return False
    chain = Chain.open(places.marks, _TABLES)
    try:
        with chain.reading():
            return chain.last()[0] == 1
    finally:
        chain.close()


def _create(places: Places) -> None:
    """Make marks, anchor and key, or what an interrupted attempt has not made. Nothing is replaced."""
    if not places.marks.exists():
        Chain.create(places.marks, _TABLES, places.anchor).close()
    elif places.anchor is not None and not places.anchor.exists():
        chain = Chain.open(places.marks, _TABLES)
        try:
            chain.start_anchor(places.anchor)
        finally:
            chain.close()
    write_new(places.key, os.urandom(KEY_BYTES).hex().encode() + b"\n")


def anybody_withdrawn(site: SiteConfig) -> bool:
    """Return whether there is any file of withdrawals, readable or not, or the site file says so."""
    places = Places.of(site)
    return site.withdrawals or (places is not None and any(path.exists() for path in places.files))


def withdrawn_of(site: SiteConfig) -> Withdrawn | None:
    """Return who is left out of everything that a site reads; None if nobody ever was. Raises as `Withdrawals.open`."""
    with Withdrawals.open(site) as found:
        return None if found is None else found.withdrawn()


def withdrawn_key(ledger_key: Path) -> Path:
    """Return where the key of marks lies, beside the ledger's key."""
    return ledger_key.with_name(f"{ledger_key.stem}-withdrawn.key")


def anchor_withdrawals(site: SiteConfig, anchor: Path) -> None:
    """Keep the head of the marks beside the ledger's new anchor as well. Nothing happens if nobody was ever withdrawn.

    Args:
        site: The site file, which names the old anchor or none.
        anchor: The ledger's new anchor.

    Raises:
        StateError, VerificationError: As `Withdrawals.open`.
    """
    places, target = Places.of(site), _anchor_beside(anchor)
    if places is None or not places.marks.exists() or target == places.anchor:
        return
    old = places.anchor if places.anchor is not None and places.anchor.exists() else None
    chain = Chain.open(places.marks, _TABLES, old)
    try:
        if not target.exists():  # an interrupted attempt has made it
            chain.start_anchor(target)
    finally:
        chain.close()


def _anchor_beside(anchor: Path) -> Path:
    return anchor.with_name(f"{anchor.stem}-withdrawn.json")


def check_left(site: SiteConfig) -> None:
    """Check that a site's dataset was not withdrawn as a whole.

    Raises:
        RefusedError: It was.
        StateError, VerificationError: As `Withdrawals.open`.
    """
    found = withdrawn_of(site)
    if found is not None and found.left:
        error = RefusedError(
            f"site {site.name} has withdrawn its dataset from all studies, for good",
            "continue without this site; its operator may ask the coordinator to revoke it",
        )
        error.code, error.rule, error.asked, error.allowed = "E_WITHDRAWN", "dataset", "a round", "no round"
        raise error


def _mark(key: bytes, rule: str, name: str) -> str:
    return hmac.digest(_key_of(key, rule), name.encode(), "sha256").hex()


@lru_cache(maxsize=16)
def _key_of(key: bytes, rule: str) -> bytes:
    return HKDF(SHA256(), KEY_BYTES, None, f"privet withdrawal 1: {rule}".encode()).derive(key)
