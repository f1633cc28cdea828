"""The members of the consortium: invitations, requests, members and their certificates, in one SQLite file.

::

    invite    creates an invitation; the file has only the hash of its token
    ask       takes a request to join: a token admits one request, which may be repeated, first within 24 hours
    approve   makes the site a member and issues a certificate, after two people compared the fingerprint of its keys
    found     writes the genesis of the round log, with the members so far; each later change is a statement of its own
    revoke    ends a membership: the service refuses the site's next call, whatever its certificate says

Each step is one transaction, durable on return (WAL, synchronous=FULL). A change to the members and its statement for
the round log are in the same transaction; `statements` returns the statements that are not logged yet. Every call opens
the file itself, so threads and processes may share it. The file has no secret: nobody can join with a stolen copy.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cryptography.x509 import Certificate

from privet.common.canonical import digest
from privet.common.errors import RefusedError, StateError, VerificationError
from privet.common.files import sync_directory
from privet.common.log.checkpoint import Policy
from privet.common.log.encoding import encode_statement, parse_statement
from privet.common.log.envelope import MAX_STATEMENT_BYTES
from privet.common.log.note import NoteKey
from privet.common.log.statements import Genesis, Join, Member, Renew, Revoke, StatedFloor, Statement
from privet.common.pki.certificates import read_certificate, to_pem
from privet.common.pki.enrolment import JoinRequest, KeysRequest, SiteKeys, Terms
from privet.common.pki.token import TOKEN_LIFE, hash_of
from privet.common.pki.words import mistyped
from privet.server.consortium.membership import (
    NO_TOKEN,
    Consortium,
    Listed,
    Row,
    check_new_keys,
    check_token,
    next_quorum,
)
from privet.server.consortium.reasons import Reason

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
            StateError: The path exists already, or cannot be written.
        """
        if path.exists():
            raise StateError(f"{path} exists already", "choose a new directory for the coordinator")
        staging = path.with_name(f".{path.name}.partial")
        with _storage_errors(path):
            staging.unlink(missing_ok=True)  # left by a creation that was interrupted
            with closing(sqlite3.connect(staging, isolation_level=None)) as database:
                database.execute("PRAGMA journal_mode = WAL")
                database.executescript(f"BEGIN; {_TABLES} PRAGMA application_id = {_APPLICATION}; COMMIT;")
            staging.chmod(0o600)
            staging.rename(path)
            sync_directory(path.parent)
        return cls(path, consortium)

    def invite(self, secrets: Mapping[str, bytes], now: datetime) -> None:
        """Store invitations, all or none, by site. Withdraws earlier ones, and requests that were made with them.

        Raises:
            RefusedError: A site is a member.
        """
        expires = int((now + TOKEN_LIFE).timestamp())
        with self._transaction() as database:
            for site, secret in secrets.items():
                if _is_member(database, site):
                    raise RefusedError(
                        f"{site} is a member already",
                        "it needs no invitation. Only if it has lost its keys, revoke it first, which cuts it off: "
                        f"`privet coordinator revoke {site} --reason left`",
                    )
                database.execute(
                    "UPDATE requests SET state = 'withdrawn' WHERE site = ? AND state = 'pending'", (site,)
                )
                row = (site, hash_of(secret), expires)
                database.execute("INSERT OR REPLACE INTO invitations (site, hash, expires) VALUES (?, ?, ?)", row)

    def invited(self, sites: Sequence[str], now: datetime) -> list[str]:
        """Return those of some sites whose token, or whose request, another invitation would make invalid."""
        waiting = "SELECT site FROM requests WHERE state = 'pending' "
        waiting += "UNION SELECT site FROM invitations WHERE expires > ?"
        with self._transaction() as database:
            known = {str(row["site"]) for row in _all(database, waiting, int(now.timestamp()))}
        return [site for site in sites if site in known]

    def ask(self, request: JoinRequest, now: datetime) -> Row:
        """Take a request to join, and return its state.

        Raises:
            RefusedError: The token does not admit it, or a key was used before.
        """
        keys, number = request.keys, request.digest
        with self._transaction() as database:
            secret = hash_of(bytes.fromhex(request.secret))
            invitation = _one(database, "SELECT * FROM invitations WHERE hash = ?", secret)
            first = check_token(invitation, number, int(now.timestamp()))
            # The coordinator gave the name with the token: a site must not choose the name of another one.
            if invitation is None or invitation["site"] != keys.site:
                raise RefusedError(NO_TOKEN, "use the site name that the token contains")
            if first:
                others = [_keys(row) for row in _all(database, "SELECT keys FROM requests WHERE state <> 'withdrawn'")]
                check_new_keys(keys, others, self.consortium.reserved)
                database.execute("UPDATE invitations SET request = ? WHERE site = ?", (number, keys.site))
                row = (number, keys.site, keys.encode().decode("ascii"), int(now.timestamp()))
                database.execute(
                    "INSERT INTO requests (digest, site, keys, received, state) VALUES (?, ?, ?, ?, 'pending')", row
                )
            found = _one(database, f"{_ROWS} WHERE r.digest = ?", number)
        if found is None or found["state"] not in ("pending", "member"):
            raise RefusedError(NO_TOKEN, "ask the coordinator for a new one")
        return _row(found)

    def ask_renewal(self, site: str, asked: KeysRequest, now: datetime) -> Row:
        """Take a member's request for an ML-DSA-65 key, and return its state: pending until it is approved and logged.

        Raises:
            RefusedError: The site is not a member, the key was used before, the request changes more, or a key has not
                signed it.
        """
        with self._transaction() as database:
            member = _one(database, f"{_ROWS} WHERE r.site = ? AND r.state = 'member'", site)
            if member is None:
                raise RefusedError(f"{site} is not a member", "join with `privet site join @TOKEN DIRECTORY`")
            present = _keys(member)
            try:
                keys = asked.keys(self.consortium.name, present)
            except VerificationError as error:
                raise RefusedError(error.message, "use this site's own keys: `privet site renew SITE --keys`") from None
            if keys == present and not _renewal_waits(database, keys):
                return _row(member)
            found = _one(database, f"{_ROWS} WHERE r.site = ? AND r.state = 'pending'", site)
            if keys != present and (found is None or _keys(found) != keys):
                check_new_keys(keys, _others(database, site), self.consortium.reserved)
                database.execute(
                    "UPDATE requests SET state = 'withdrawn' WHERE site = ? AND state = 'pending'", (site,)
                )
                # The proof stands where a revoked member has its reason, until the statement holds it.
                row = (
                    digest(asked.encode()), site, keys.encode().decode("ascii"), int(now.timestamp()), asked.proof,
                )  # fmt: skip
                database.execute(
                    "INSERT OR REPLACE INTO requests (digest, site, keys, received, state, reason) "
                    "VALUES (?, ?, ?, ?, 'pending', ?)",
                    row,
                )
        return Row(keys, "pending", int(now.timestamp()), "", None)

    def check_asked(self, site: str) -> None:
        """Raise `RefusedError` unless a site waits for approval."""
        with self._transaction() as database:
            _asked(database, site)

    def approve(self, site: str, told: str, certify: Callable[[SiteKeys], Certificate], now: datetime) -> Row:
        """Make a site a member, after its operator and the coordinator's operator compared the fingerprint of its keys.

        Args:
            site: Its name.
            told: The words, or the fingerprint, that the site's operator read out.
            certify: Issues its first certificate.
            now: Time by the coordinator's clock.

        Raises:
            RefusedError: It has not asked to join, the fingerprint is not that of the received keys, or one of them was
                used before.
        """
        with self._transaction() as database:
            found = _asked(database, site)
            keys = _keys(found)
            if not keys.is_told(told):
                raise RefusedError(
                    f"the words are not those of the keys that asked to join as {site}{mistyped(told)}",
                    "have them read out again; if they still differ, someone else used the token: run "
                    f"`privet coordinator invite {site}` again",
                )
            # Again: a rotation may have brought one since. The log would refuse such a member, and all that follows.
            check_new_keys(keys, _others(database, site), self.consortium.reserved)
            member = _one(database, "SELECT * FROM requests WHERE site = ? AND state = 'member'", site)
            if member is not None:
                _renew_keys(database, member, found, int(now.timestamp()))
                return _row(_one(database, f"{_ROWS} WHERE r.digest = ?", found["digest"]) or found)
            # Member, certificate and statement in one transaction: no member is ever missing from the log.
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
        """Store a member's new certificate. The one used for the request is valid until the new one is used (`admits`).

        Args:
            site: Its name.
            certificate: The new certificate.
            now: Time by the coordinator's clock.
            over: The certificate used for the request. Certificates issued after it were never used, because their
                answers were lost, and are withdrawn. None if the request was signed with the identity key: then all
                earlier certificates are withdrawn. Otherwise a thief of one could keep renewing it, and withdraw the
                new one before its first use.

        Raises:
            RefusedError: The site is not a member, or `over` was replaced meanwhile.
        """
        with self._transaction() as database:
            found = _one(database, "SELECT digest FROM requests WHERE site = ? AND state = 'member'", site)
            if found is None or (over is not None and not _withdraw(database, site, over, ">")):
                raise RefusedError(
                    f"site {site} is not a member, or the certificate that it uses was replaced by a newer one",
                    "if the site did not renew its certificate itself, its key was copied: tell the coordinator",
                )
            if over is None:
                database.execute("DELETE FROM certificates WHERE request = ?", (found["digest"],))
            _add_certificate(database, found["digest"], certificate, int(now.timestamp()))

    def revoke(self, site: str, reason: Reason, now: datetime) -> None:
        """End a site's membership: its certificates and keys are invalid from now on.

        The revocation is logged, except that of the last member: without members the log has no quorum, and a new
        consortium is needed.

        Raises:
            RefusedError: The site is not a member.
        """
        with self._transaction() as database:
            found = _one(database, f"{_ROWS} WHERE r.site = ? AND r.state = 'member'", site)
            if found is None:
                raise RefusedError(f"{site} is not a member", "list the members with `privet coordinator members`")
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

    def found(self, floor: StatedFloor, now: datetime) -> tuple[Genesis | Join, ...]:
        """Make the genesis of the round log from the members so far. Those for which it has no room join after it.

        Raises:
            RefusedError: It exists already, or there are too few members for a quorum.
        """
        with self._transaction() as database:
            if _founded(database):
                raise RefusedError(
                    "the consortium is founded already",
                    "approve further sites with `privet coordinator approve`: each is added to the round log",
                )
            rows = _all(database, "SELECT keys FROM requests WHERE state = 'member' ORDER BY site")
            members = tuple(_keys(row).member for row in rows)
            least = max(self.consortium.colluding, 1) + 1
            if len(members) < least:
                raise RefusedError(
                    f"the consortium has {len(members)} members, but needs at least {least} if "
                    f"{self.consortium.colluding} of them may collude with the coordinator",
                    "approve more sites with `privet coordinator approve`",
                )
            genesis = self._genesis(members, floor, now)
            if len(genesis.members) < least:
                raise RefusedError(
                    f"the first statement of the round log has room for {len(genesis.members)} members, but needs "
                    f"{least} if {self.consortium.colluding} of them may collude with the coordinator",
                    "make a consortium that tolerates fewer: `privet coordinator init --colluding NUMBER`",
                )
            rest = enumerate(members[len(genesis.members) :], start=len(genesis.members) + 1)
            joins = (Join(time=genesis.time, member=member, quorum=self._quorum(count)) for count, member in rest)
            founded: tuple[Genesis | Join, ...] = (genesis, *joins)
            for statement in founded:
                _say(database, statement)
        return founded

    def _genesis(self, members: tuple[Member, ...], floor: StatedFloor, now: datetime) -> Genesis:
        """Return the genesis with the first members, as many as a leaf has room for. The others join right after it."""
        count = len(members)
        while True:
            genesis = Genesis(
                time=int(now.timestamp()),
                consortium=self.consortium.name,
                log=self.consortium.log.text,
                coordinator=self.consortium.coordinator,
                members=members[:count],
                quorum=self._quorum(count),
                floor=floor,
            )
            if count == 1 or len(encode_statement(genesis)) <= MAX_STATEMENT_BYTES:
                return genesis
            count -= 1

    def _quorum(self, members: int) -> int:
        return next_quorum(members, self.consortium.colluding)

    # Queries

    def founded(self) -> bool:
        """Whether the round log's genesis was made."""
        with self._transaction() as database:
            return _founded(database)

    def rows(self) -> tuple[Row, ...]:
        """Return the sites that asked to join, are members or were revoked, by name."""
        with self._transaction() as database:
            found = _all(database, _SEEN)
        return tuple(map(_row, found))

    def listed(self) -> tuple[Listed, ...]:
        """Return the same sites for a page. Their keys were verified when they came, and are not verified again."""
        with self._transaction() as database:
            return tuple(_listed(row) for row in database.execute(_SEEN))

    def members(self) -> tuple[SiteKeys, ...]:
        """Return the members, ascending by name."""
        return tuple(row.keys for row in self.rows() if row.state == "member")

    def check_not_revoked(self, site: str, proves: Callable[[SiteKeys], bool] = lambda keys: True) -> None:
        """Say so if a site was revoked and has not joined again.

        Args:
            site: The site.
            proves: Whether who asks has proved to own the keys that were revoked. Nobody else is told.

        Raises:
            RefusedError: It was revoked.
        """
        rows = [row for row in self.rows() if row.keys.site == site]
        if any(row.state == "member" for row in rows):
            return
        for row in rows:
            if row.state == "revoked" and proves(row.keys):
                raise RefusedError(
                    f"site {site} was revoked ({row.reason}) and is not a member any more; it may join anew, with new "
                    "keys in a new directory",
                    "join with another token: `privet site join @TOKEN NEW-DIRECTORY`",
                )

    def admits(self, site: str, certificate: Certificate) -> bool:
        """Whether a certificate was issued to a current member and has not been replaced.

        By using it the site proves that it has received it. All certificates issued before it are withdrawn, so that
        one in an old backup is useless to a thief.
        """
        with self._transaction() as database:
            return _withdraw(database, site, certificate, "<")

    def policy(self) -> Policy | None:
        """Return the round log's policy for the current members; None before the consortium is founded."""
        with self._transaction() as database:
            if not _founded(database):
                return None
            rows = _all(database, "SELECT keys FROM requests WHERE state = 'member' ORDER BY site")
        witnesses = tuple(NoteKey.parse(_keys(row).witness) for row in rows)
        if not witnesses:
            return None
        return Policy(self.consortium.log, witnesses, next_quorum(len(witnesses), self.consortium.colluding))

    def terms(self) -> Terms:
        """Return the consortium's addresses, keys, policy and members, for a member."""
        policy, own = self.policy(), self.consortium
        return Terms(
            consortium=own.name,
            address=own.address,
            enrolment=own.enrolment,
            fleet=own.fleet,
            coordinator=own.coordinator,
            log=own.log.text,
            colluding=own.colluding,
            policy="" if policy is None else policy.text,
            members=self.members(),
        )

    def statements(self) -> tuple[tuple[int, Statement], ...]:
        """Return the statements that are not in the round log yet, with their numbers, in order."""
        with self._transaction() as database:
            rows = _all(database, "SELECT number, body FROM statements WHERE logged = 0 ORDER BY number")
        return tuple((row["number"], parse_statement(row["body"])) for row in rows)

    def mark_logged(self, number: int) -> None:
        """Record that a statement is in the round log."""
        with self._transaction() as database:
            database.execute("UPDATE statements SET logged = 1 WHERE number = ?", (number,))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        if not self.path.is_file():
            raise StateError(
                f"the members' file {self.path} does not exist",
                "name the coordinator's directory with --directory, or create one with `privet coordinator init`",
            )
        with _storage_errors(self.path), closing(sqlite3.connect(self.path, 30, isolation_level=None)) as database:
            database.row_factory = sqlite3.Row
            database.execute("PRAGMA synchronous = FULL")
            # Locked from the start: what is read below is still true when it is written.
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
_SEEN = f"{_ROWS} WHERE r.state <> 'withdrawn' ORDER BY r.site, r.received"


def _one(database: sqlite3.Connection, query: str, *values: str) -> dict[str, Any] | None:
    row = database.execute(query, values).fetchone()
    return None if row is None else dict(row)


def _all(database: sqlite3.Connection, query: str, *values: object) -> list[dict[str, Any]]:
    return [dict(row) for row in database.execute(query, values)]


def _asked(database: sqlite3.Connection, site: str) -> Mapping[str, Any]:
    """Return a site's request that waits for approval. Raises `RefusedError` if there is none."""
    found = _one(database, f"{_ROWS} WHERE r.site = ? AND r.state = 'pending'", site)
    if found is not None:
        return found
    if _is_member(database, site):
        raise RefusedError(
            f"{site} is a member already, and waits for nothing",
            "nothing is left to do; `privet coordinator members` lists the members",
        )
    invited = _one(database, "SELECT expires FROM invitations WHERE site = ? AND request IS NULL", site)
    if invited is not None:
        until = datetime.fromtimestamp(int(invited["expires"]), UTC)
        raise RefusedError(
            f"{site} has not asked to join yet; its token is valid until {until:%Y-%m-%d %H:%M} UTC",
            "wait until its operator has run `privet site join @TOKEN DIRECTORY`. If the token is lost or expired, "
            f"`privet coordinator invite {site}` makes another, and the first is not valid any more",
        )
    raise RefusedError(
        f"{site} has not asked to join",
        f"run `privet coordinator invite {site}`, and let the site run `privet site join @TOKEN DIRECTORY`",
    )


def _is_member(database: sqlite3.Connection, site: str) -> bool:
    return _one(database, "SELECT 1 AS found FROM requests WHERE site = ? AND state = 'member'", site) is not None


def _keys(row: Mapping[str, Any]) -> SiteKeys:
    return SiteKeys.decode(row["keys"].encode())


def _row(row: Mapping[str, Any]) -> Row:
    certificate = None if row["pem"] is None else read_certificate(row["pem"])
    return Row(_keys(row), row["state"], row["decided"] or row["received"], _reason(row), certificate)


def _listed(row: sqlite3.Row) -> Listed:
    node = str(json.loads(row["keys"])["node"])
    certificate = None if row["pem"] is None else read_certificate(row["pem"])
    valid = None if certificate is None else (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
    return Listed(row["site"], row["state"], row["decided"] or row["received"], _reason(row), node, valid)


def _reason(row: Mapping[str, Any] | sqlite3.Row) -> str:
    return row["reason"] or "" if row["state"] == "revoked" else ""


def _others(database: sqlite3.Connection, site: str) -> list[SiteKeys]:
    """Return the keys of all other sites, and those that a site had when it was revoked."""
    query = "SELECT keys FROM requests WHERE state = 'revoked' OR (state <> 'withdrawn' AND site <> ?)"
    return [_keys(row) for row in _all(database, query, site)]


def _renew_keys(database: sqlite3.Connection, member: Mapping[str, Any], wanted: Mapping[str, Any], time: int) -> None:
    """Replace a member's keys by those of a pending request. Its certificates stay: the key for TLS is the same."""
    database.execute("UPDATE requests SET state = 'withdrawn', decided = ? WHERE digest = ?", (time, member["digest"]))
    database.execute(
        "UPDATE requests SET state = 'member', decided = ?, reason = NULL WHERE digest = ?", (time, wanted["digest"])
    )
    database.execute("UPDATE certificates SET request = ? WHERE request = ?", (wanted["digest"], member["digest"]))
    if _founded(database):
        _say(database, Renew(time=time, member=_keys(wanted).member, proof=wanted["reason"]))


def _renewal_waits(database: sqlite3.Connection, keys: SiteKeys) -> bool:
    """Return whether the statement that gave a member its present keys is not in the round log yet."""
    waiting = [parse_statement(row["body"]) for row in _all(database, "SELECT body FROM statements WHERE logged = 0")]
    return any(isinstance(each, Renew) and each.member == keys.member for each in waiting)


def _founded(database: sqlite3.Connection) -> bool:
    return bool(_all(database, "SELECT 1 FROM statements LIMIT 1"))


def _say(database: sqlite3.Connection, statement: Statement) -> None:
    database.execute("INSERT INTO statements (body) VALUES (?)", (encode_statement(statement),))


def _add_certificate(database: sqlite3.Connection, request: str, certificate: Certificate, time: int) -> None:
    row = (_serial(certificate), request, to_pem(certificate), time)
    database.execute("INSERT INTO certificates VALUES (?, ?, ?, ?)", row)


def _withdraw(database: sqlite3.Connection, site: str, certificate: Certificate, which: Literal["<", ">"]) -> bool:
    """Withdraw what was issued to a member before or after a certificate; return whether that certificate is valid."""
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
        hint = "check the disk space and the permissions, then repeat the command"
        raise StateError(f"the members' file {path} cannot be read or written ({type(error).__name__})", hint) from None
