"""Who belongs to the consortium: invitations, requests, members and their certificates, in one SQLite file.

::

    invite    a site is given a token; the file keeps its hash
    ask       the token serves one request, as often as that one is repeated, and for its first use 24 hours
    approve   two people have compared the fingerprint of the keys that arrived; the site gets a certificate
    found     the members so far stand in the log's genesis; from then on each change is a statement of its own
    revoke    from the next call on nothing is answered, whatever the certificate says

Each step is one transaction, durable on return (WAL, synchronous=FULL), and a change to the members and the statement
that the log is to hold of it are in the same one: `statements` gives what has not been logged yet. Every call opens
the file for itself, so threads and processes may share it. The file holds no secret: a thief cannot join with it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from cryptography.x509 import Certificate

from privet.common.errors import RefusedError, StateError
from privet.common.files import sync_directory
from privet.common.log.checkpoint import Policy
from privet.common.log.encoding import encode_statement, parse_statement
from privet.common.log.note import NoteKey
from privet.common.log.statements import Genesis, Join, Revoke, StatedFloor, Statement
from privet.common.pki.certificates import TOKEN_LIFE, hash_of, read_certificate, same_fingerprint, to_pem
from privet.common.pki.enrolment import JoinRequest, SiteKeys, Terms
from privet.server.consortium.membership import NO_TOKEN, Consortium, Row, check_new_keys, check_token, next_quorum

Reason = Literal["left", "key-compromise", "expelled"]
_APPLICATION = 0x70767433
_TABLES = """
CREATE TABLE invitations (
    site TEXT PRIMARY KEY, hash TEXT NOT NULL UNIQUE, expires INTEGER NOT NULL, request TEXT
) STRICT;
CREATE TABLE requests (
    digest TEXT PRIMARY KEY, site TEXT NOT NULL, keys TEXT NOT NULL, received INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pending', 'member', 'withdrawn', 'revoked')),
    decided INTEGER, reason TEXT
) STRICT;
CREATE UNIQUE INDEX one_of_each ON requests (site, state) WHERE state IN ('pending', 'member');
CREATE TABLE certificates (
    serial TEXT PRIMARY KEY, request TEXT NOT NULL REFERENCES requests (digest), pem TEXT NOT NULL,
    issued INTEGER NOT NULL
) STRICT;
CREATE TABLE statements (
    number INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL, logged INTEGER NOT NULL DEFAULT 0
) STRICT;
"""


class Members:
    """The members' file. Every method is one transaction."""

    def __init__(self, path: Path, consortium: Consortium) -> None:
        self.path = path
        self.consortium = consortium

    @classmethod
    def create(cls, path: Path, consortium: Consortium) -> Members:
        """Create the file of a consortium without members.

        Raises:
            StateError: There is something at the path already, or it cannot be written.
        """
        if path.exists():
            raise StateError(f"{path} exists already", "open it")
        staging = path.with_name(f".{path.name}.partial")
        with _storage_errors(path):
            staging.unlink(missing_ok=True)  # of a creation that was cut short
            with closing(sqlite3.connect(staging, isolation_level=None)) as database:
                database.execute("PRAGMA journal_mode = WAL")
                database.executescript(f"BEGIN; {_TABLES} PRAGMA application_id = {_APPLICATION}; COMMIT;")
            staging.chmod(0o600)
            staging.rename(path)
            sync_directory(path.parent)
        return cls(path, consortium)

    def invite(self, site: str, secret: bytes, now: datetime) -> None:
        """Note an invitation. An earlier one of the site, and a request that came with it, are withdrawn.

        Raises:
            RefusedError: The site is a member.
        """
        with self._transaction() as database:
            if _one(database, "SELECT 1 AS found FROM requests WHERE site = ? AND state = 'member'", site):
                raise RefusedError(f"{site} is a member already", "revoke it first, if it has to join with new keys")
            database.execute("UPDATE requests SET state = 'withdrawn' WHERE site = ? AND state = 'pending'", (site,))
            expires = int((now + TOKEN_LIFE).timestamp())
            row = (site, hash_of(secret), expires)
            database.execute("INSERT OR REPLACE INTO invitations (site, hash, expires) VALUES (?, ?, ?)", row)

    def ask(self, request: JoinRequest, now: datetime) -> Row:
        """Take a request to join, and say how it stands.

        Raises:
            RefusedError: The token does not admit it, or a key was used before.
        """
        keys, number = request.keys, request.digest
        with self._transaction() as database:
            secret = hash_of(bytes.fromhex(request.secret))
            invitation = _one(database, "SELECT * FROM invitations WHERE hash = ?", secret)
            first = check_token(invitation, number, int(now.timestamp()))
            if invitation is None or invitation["site"] != keys.site:
                raise RefusedError(NO_TOKEN, "a token is for one site; use the name in it")
            if first:
                others = [_keys(row) for row in _all(database, "SELECT keys FROM requests WHERE state <> 'withdrawn'")]
                check_new_keys(keys, others, frozenset({self.consortium.coordinator, self.consortium.log.public.hex()}))
                database.execute("UPDATE invitations SET request = ? WHERE site = ?", (number, keys.site))
                row = (number, keys.site, keys.encode().decode("ascii"), int(now.timestamp()))
                database.execute(
                    "INSERT INTO requests (digest, site, keys, received, state) VALUES (?, ?, ?, ?, 'pending')", row
                )
            found = _one(database, f"{_ROWS} WHERE r.digest = ?", number)
        if found is None or found["state"] not in ("pending", "member"):
            raise RefusedError(NO_TOKEN, "ask the coordinator for a new one")
        return _row(found)

    def approve(self, site: str, told: str, certify: Callable[[SiteKeys], Certificate], now: datetime) -> Row:
        """Make a member of a site whose keys were compared by its operator and the coordinator's.

        Args:
            site: Its name.
            told: Fingerprint that the site's operator gave.
            certify: Issues its first certificate.
            now: By the coordinator's clock.

        Raises:
            RefusedError: It has not asked, or the fingerprint is not that of the keys that arrived.
        """
        with self._transaction() as database:
            found = _one(database, f"{_ROWS} WHERE r.site = ? AND r.state = 'pending'", site)
            if found is None:
                raise RefusedError(f"{site} has not asked to join", "invite it, and let it run `privet site join`")
            keys = _keys(found)
            if not same_fingerprint(told, keys.fingerprint):
                raise RefusedError(
                    f"{site}: the fingerprint is not that of the keys that arrived",
                    "have it read out again; if it stays so, somebody else used the token: invite the site anew",
                )
            time = int(now.timestamp())
            database.execute(
                "UPDATE requests SET state = 'member', decided = ? WHERE digest = ?", (time, found["digest"])
            )
            _add_certificate(database, found["digest"], certify(keys), time)
            if _founded(database):
                count = len(_all(database, "SELECT 1 FROM requests WHERE state = 'member'"))
                quorum = next_quorum(count, self.consortium.colluding)
                _say(database, Join(time=time, member=keys.member, quorum=quorum))
            row = _one(database, f"{_ROWS} WHERE r.digest = ?", found["digest"])
        return _row(row or found)

    def renew(self, site: str, certificate: Certificate, now: datetime, over: Certificate | None = None) -> None:
        """Note a member's new certificate. The one that it was asked for with stays good until it is in use (`admits`).

        Args:
            site: Its name.
            certificate: The new one.
            now: By the coordinator's clock.
            over: The one that it was asked for with. What was issued after that has never been used: it was lost on
                its way, and does not count any longer. None where the identity key asked: no earlier one counts then,
                or else a thief of one could go on renewing it, and withdraw the new one before its first use.

        Raises:
            RefusedError: The site is no member, or `over` was replaced meanwhile.
        """
        with self._transaction() as database:
            found = _one(database, "SELECT digest FROM requests WHERE site = ? AND state = 'member'", site)
            if found is None or (over is not None and not _withdraw(database, site, over, ">")):
                raise RefusedError(f"{site} is no member, or its certificate was replaced")
            if over is None:
                database.execute("DELETE FROM certificates WHERE request = ?", (found["digest"],))
            _add_certificate(database, found["digest"], certificate, int(now.timestamp()))

    def revoke(self, site: str, reason: Reason, now: datetime) -> None:
        """End a site's membership: none of its certificates and keys counts from here on.

        The log is told, except of the last member: without one it has no quorum, and needs a new consortium.

        Raises:
            RefusedError: The site is no member.
        """
        with self._transaction() as database:
            found = _one(database, f"{_ROWS} WHERE r.site = ? AND r.state = 'member'", site)
            if found is None:
                raise RefusedError(f"{site} is no member", "`privet coordinator members` lists them")
            time = int(now.timestamp())
            database.execute(
                "UPDATE requests SET state = 'revoked', decided = ?, reason = ? WHERE digest = ?",
                (time, reason, found["digest"]),
            )
            database.execute("DELETE FROM invitations WHERE site = ?", (site,))
            left = len(_all(database, "SELECT 1 FROM requests WHERE state = 'member'"))
            if _founded(database) and left:
                quorum = next_quorum(left, self.consortium.colluding)
                key = _keys(found).identity
                _say(database, Revoke(time=time, site=site, key=key, reason=reason, quorum=quorum))

    def found(self, floor: StatedFloor, now: datetime) -> Genesis:
        """Make the genesis of the log from the members so far.

        Raises:
            RefusedError: It was made before, or the members are too few for a quorum.
        """
        with self._transaction() as database:
            if _founded(database):
                raise RefusedError("the consortium was founded before", "sites that are approved now join its log")
            rows = _all(database, "SELECT keys FROM requests WHERE state = 'member' ORDER BY site")
            members = tuple(_keys(row).member for row in rows)
            if len(members) <= max(self.consortium.colluding, 1):
                raise RefusedError(
                    f"{len(members)} members are too few, as {self.consortium.colluding} may lie together",
                    "approve more sites first",
                )
            genesis = Genesis(
                time=int(now.timestamp()),
                consortium=self.consortium.name,
                log=self.consortium.log.text,
                coordinator=self.consortium.coordinator,
                members=members,
                quorum=next_quorum(len(members), self.consortium.colluding),
                floor=floor,
            )
            _say(database, genesis)
        return genesis

    # What is in it

    def rows(self) -> tuple[Row, ...]:
        """Return who has asked, is a member or was revoked, by name."""
        with self._transaction() as database:
            found = _all(database, f"{_ROWS} WHERE r.state <> 'withdrawn' ORDER BY r.site, r.received")
        return tuple(map(_row, found))

    def members(self) -> tuple[SiteKeys, ...]:
        """Return the members, ascending by name."""
        return tuple(row.keys for row in self.rows() if row.state == "member")

    def admits(self, site: str, certificate: Certificate) -> bool:
        """Whether a certificate was issued to a member that still is one, and has not been replaced.

        With its use the site shows that it has this one: those issued before do not count any longer, so that whoever
        finds one in an old backup has found nothing.
        """
        with self._transaction() as database:
            return _withdraw(database, site, certificate, "<")

    def policy(self) -> Policy | None:
        """Return whose checkpoints to accept now; None before the consortium was founded."""
        with self._transaction() as database:
            if not _founded(database):
                return None
            rows = _all(database, "SELECT keys FROM requests WHERE state = 'member' ORDER BY site")
        witnesses = tuple(NoteKey.parse(_keys(row).witness) for row in rows)
        if not witnesses:
            return None
        return Policy(self.consortium.log, witnesses, next_quorum(len(witnesses), self.consortium.colluding))

    def terms(self) -> Terms:
        """Return what a member has to know."""
        policy, own = self.policy(), self.consortium
        return Terms(
            consortium=own.name,
            address=own.address,
            enrolment=own.enrolment,
            fleet=own.fleet,
            coordinator=own.coordinator,
            policy="" if policy is None else policy.text,
            members=self.members(),
        )

    def statements(self) -> tuple[tuple[int, Statement], ...]:
        """Return the statements that the log does not hold yet, with their numbers, in order."""
        with self._transaction() as database:
            rows = _all(database, "SELECT number, body FROM statements WHERE logged = 0 ORDER BY number")
        return tuple((row["number"], parse_statement(row["body"])) for row in rows)

    def mark_logged(self, number: int) -> None:
        """Note that the log holds a statement."""
        with self._transaction() as database:
            database.execute("UPDATE statements SET logged = 1 WHERE number = ?", (number,))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        if not self.path.is_file():
            raise StateError(f"there is no members' file at {self.path}", "`privet coordinator init` creates it")
        with _storage_errors(self.path), closing(sqlite3.connect(self.path, 30, isolation_level=None)) as database:
            database.row_factory = sqlite3.Row
            database.execute("PRAGMA synchronous = FULL")
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            finally:
                if database.in_transaction:
                    database.execute("ROLLBACK")


_ROWS = (
    "SELECT r.*, (SELECT pem FROM certificates c WHERE c.request = r.digest ORDER BY issued DESC, rowid DESC LIMIT 1) "
    "AS pem FROM requests r"
)


def _one(database: sqlite3.Connection, query: str, *values: str) -> dict[str, Any] | None:
    row = database.execute(query, values).fetchone()
    return None if row is None else dict(row)


def _all(database: sqlite3.Connection, query: str) -> list[dict[str, Any]]:
    return [dict(row) for row in database.execute(query)]


def _keys(row: Mapping[str, Any]) -> SiteKeys:
    return SiteKeys.decode(row["keys"].encode())


def _row(row: Mapping[str, Any]) -> Row:
    certificate = None if row["pem"] is None else read_certificate(row["pem"])
    return Row(_keys(row), row["state"], row["decided"] or row["received"], row["reason"] or "", certificate)


def _founded(database: sqlite3.Connection) -> bool:
    return bool(_all(database, "SELECT 1 FROM statements LIMIT 1"))


def _say(database: sqlite3.Connection, statement: Statement) -> None:
    database.execute("INSERT INTO statements (body) VALUES (?)", (encode_statement(statement),))


def _add_certificate(database: sqlite3.Connection, request: str, certificate: Certificate, time: int) -> None:
    row = (_serial(certificate), request, to_pem(certificate), time)
    database.execute("INSERT INTO certificates VALUES (?, ?, ?, ?)", row)


def _withdraw(database: sqlite3.Connection, site: str, certificate: Certificate, which: Literal["<", ">"]) -> bool:
    """Withdraw what was issued to a member before or after a certificate; return whether this one counts at all."""
    query = (
        "SELECT c.pem, c.request, c.rowid FROM certificates c JOIN requests r ON r.digest = c.request "
        "WHERE c.serial = ? AND r.site = ? AND r.state = 'member'"
    )
    found = _one(database, query, _serial(certificate), site)
    if found is None or read_certificate(found["pem"]) != certificate:
        return False
    withdraw = f"DELETE FROM certificates WHERE request = ? AND rowid {which} ?"  # noqa: S608 - one of two signs
    database.execute(withdraw, (found["request"], found["rowid"]))
    return True


def _serial(certificate: Certificate) -> str:
    return f"{certificate.serial_number:x}"


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        hint = "check disk space and permissions, then repeat"
        raise StateError(f"members: {path} cannot be read or written ({type(error).__name__})", hint) from None
