"""A site's privacy ledger (budget): it charges every release once, before the release leaves the site.

::

    reserve      before any record is opened: does the dataset's limit cover the round, and its whole study?
    begin        before the first random draw of a private round: from here on its cost is spent; durable on return
    (train)      sample, clip, add noise
    charge       the exact bytes to be released and their cost, in one transaction, durable on return
    (send)       those bytes; after a crash, `reserve` returns them again
    acknowledge  the bytes have arrived; once a later round is charged as well, they are dropped

Guarantee, whichever process dies at whatever time. Bytes that `charge` or `reserve` let pass are on disk together with
their cost. A release has one charge and one payload. A private round is begun at most once: noise is drawn at most once
for it, and every draw is paid. Everything charged, begun and reserved on a dataset composes to at most its limit. What
is unknown counts as spent. Nothing is given back, except a reservation that the operator cancels before the round
begins; its round is then given up. There is no reset.

A round that began and has no payload is lost: its cost is spent, and `reserve` refuses it with `SpentRoundError`. The
site is killed, memory or disk runs out, the device fails, or an update is not finite: these are the ways. Whatever
fails before the first draw (policy, data, adapter, validation without its noise) leaves a reservation, and the round
can be asked for again. Training a lost round again would draw again, and what decides about a retry (an update that is
not finite, a refused upload) may depend on the draws. Two other ways would save such a round, and were rejected. A
stored key of the noise would give the same bytes again; but whoever gets a backup of the disk could then compute the
noise and subtract it from an update that was sent, and the rows here are never deleted. A second charge for each
attempt would let a coordinator, or a record that makes training fail, use up the budget.

Earlier versions wrote no `begin`. A private round that such a version reserved and did not charge may have drawn noise,
so it counts as begun.

Payloads are sealed (`client/budget/sealing.py`) under a key in another file. A site without that key reserves nothing.
Under a new key, a round whose payload was sealed under the old one is lost like one that has none.

The file is a hash chain (`client/budget/chain.py`), which reveals changed rows. It cannot reveal by itself that an old
copy was restored or a whole new file written. Heads kept elsewhere reveal that. Rows hold the time for human readers;
no decision about the budget reads it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from privet.client.budget.accounts import (
    Cost,
    Item,
    Later,
    Limit,
    RoundKey,
    Spending,
    admitting_epsilon,
    check_budget,
    check_cost,
    composed_epsilon,
    counted_epsilon,
    paid_rounds,
    require_count,
    require_digest,
    same_cost,
    spending,
    whole_study,
)
from privet.client.budget.chain import Chain, Head
from privet.client.budget.sealing import Sealer, is_sealed, key_beside
from privet.common.errors import RefusedError, SpentRoundError, StateError
from privet.common.secagg.site import RecordedStep

# The columns after `head` are computed from the chained content, so nothing outside the chain decides anything. The
# view lists the payloads that may be dropped: charged, arrived, and followed by a later charged round.
_TABLES = """
CREATE TABLE entries (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    content TEXT NOT NULL,
    head TEXT NOT NULL,
    kind TEXT AS (json_extract(content, '$.kind')),
    dataset TEXT AS (json_extract(content, '$.dataset')),
    study TEXT AS (json_extract(content, '$.study')),
    round INTEGER AS (json_extract(content, '$.round')),
    cost TEXT AS (json_extract(content, '$.cost')),
    payload TEXT AS (json_extract(content, '$.payload')),
    session TEXT AS (json_extract(content, '$.session')),
    step TEXT AS (json_extract(content, '$.step'))
) STRICT;
CREATE TABLE payloads (
    sequence INTEGER PRIMARY KEY REFERENCES entries (sequence),
    bytes BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX once ON entries (dataset, study, round, kind) WHERE dataset IS NOT NULL;
CREATE UNIQUE INDEX taken ON entries (session, round, step) WHERE session IS NOT NULL;
CREATE VIEW delivered AS
    SELECT c.sequence FROM entries c WHERE c.kind = 'charge'
    AND EXISTS (SELECT 1 FROM entries a WHERE a.kind = 'acknowledge'
        AND a.dataset = c.dataset AND a.study = c.study AND a.round = c.round)
    AND EXISTS (SELECT 1 FROM entries n WHERE n.kind = 'charge'
        AND n.dataset = c.dataset AND n.study = c.study AND n.round > c.round);
CREATE TRIGGER entries_keep BEFORE UPDATE ON entries BEGIN SELECT raise(ABORT, 'rows are final'); END;
CREATE TRIGGER entries_stay BEFORE DELETE ON entries BEGIN SELECT raise(ABORT, 'rows are final'); END;
CREATE TRIGGER payloads_keep BEFORE UPDATE ON payloads BEGIN SELECT raise(ABORT, 'payloads are final'); END;
CREATE TRIGGER payloads_stay BEFORE DELETE ON payloads
    WHEN NOT EXISTS (SELECT 1 FROM delivered d WHERE d.sequence = OLD.sequence)
    BEGIN SELECT raise(ABORT, 'payloads stay until they are delivered'); END;
"""
# A reservation that holds no `begins` is of an earlier version, whose private rounds count as begun.
_ITEMS = """
SELECT r.study, r.cost, EXISTS (SELECT 1 FROM entries c WHERE c.kind IN ('begin', 'charge')
        AND c.dataset = r.dataset AND c.study = r.study AND c.round = r.round)
    OR (r.cost IS NOT NULL AND json_extract(r.content, '$.begins') IS NULL), count(*)
FROM entries r
WHERE r.dataset = :dataset AND r.kind = 'reserve' AND NOT EXISTS (SELECT 1 FROM entries x
    WHERE x.dataset = r.dataset AND x.study = r.study AND x.round = r.round AND x.kind = 'cancel')
GROUP BY 1, 2, 3 ORDER BY min(r.sequence)
"""
# What of them is charged, with the year in which it began.
_PAID = """
SELECT substr(json_extract(first.content, '$.time'), 1, 4), r.study, r.cost, count(*)
FROM entries r JOIN entries first ON first.sequence = coalesce(
    (SELECT min(c.sequence) FROM entries c WHERE c.kind IN ('begin', 'charge')
        AND c.dataset = r.dataset AND c.study = r.study AND c.round = r.round),
    CASE WHEN r.cost IS NOT NULL AND json_extract(r.content, '$.begins') IS NULL THEN r.sequence END)
WHERE r.dataset = :dataset AND r.kind = 'reserve' AND NOT EXISTS (SELECT 1 FROM entries x
    WHERE x.dataset = r.dataset AND x.study = r.study AND x.round = r.round AND x.kind = 'cancel')
GROUP BY 1, 2, 3 ORDER BY 1, min(r.sequence)
"""


@dataclass(frozen=True)
class Receipt:
    """What left the site in one round.

    Attributes:
        row: Row of the ledger.
        time: Time of the charge, ISO 8601.
        study: Digest of the study.
        round: From 1.
        bytes: Length of the released payload, before masking.
        payload: Digest of the payload, or its HMAC under the ledger's key.
    """

    row: int
    time: str
    study: str
    round: int
    bytes: int
    payload: str


class Ledger:
    """One site's ledger. Threads may share it. Other processes open the file themselves.

    If a method raises, the caller must send nothing. Calling it again is safe.
    """

    def __init__(self, chain: Chain, sealer: Sealer) -> None:
        self._chain = chain
        self._sealer = sealer

    @classmethod
    def create(cls, path: Path, anchor: Path | None = None, key: Path | None = None) -> Ledger:
        """Create a new site's ledger: one file, readable by its owner alone, created completely or not at all.

        Args:
            path: Path of the new file, on a local disk.
            anchor: File that will keep the last head; in another directory, and better on another disk.
            key: File of the key that seals payloads, made where it does not exist; None: beside the ledger.

        Raises:
            StateError: Ledger or anchor exists already, the key cannot be made, or the file system is not a local one.
        """
        ledger = cls(Chain.create(path, _TABLES, anchor), Sealer(key or key_beside(path)))
        try:
            ledger.check_key()  # after a crash in between, the first reservation makes it
        except StateError:
            ledger.close()
            raise
        return ledger

    @classmethod
    def open(cls, path: Path, anchor: Path | None = None, key: Path | None = None) -> Ledger:
        """Open an existing ledger, verify it, and compare it with its anchor. The key is read when it is needed.

        Raises:
            StateError: Ledger or anchor is missing or cannot be read, or other users have rights on the ledger.
            VerificationError: A row was changed, or the ledger is behind its anchor: an old copy was restored.
        """
        return cls(Chain.open(path, _TABLES, anchor), Sealer(key or key_beside(path)))

    @classmethod
    def in_memory(cls) -> Ledger:
        """Return a ledger in memory: the same rules, but it ends with the process."""
        return cls(Chain.in_memory(_TABLES), Sealer(None))

    def close(self) -> None:
        """Close the file."""
        self._chain.close()

    # --- a release -------------------------------------------------------------------------------------------

    def reserve(
        self,
        release: RoundKey,
        cost: Cost | None,
        inputs: str,
        limit: Limit | None,
        planned: int,
        later: Later = (),
        naming: str | None = None,
    ) -> bytes | None:
        """Reserve a release before any record is opened for it.

        Args:
            release: The release to reserve.
            cost: Cost of this round; None for a study without privacy.
            inputs: Digest of everything that the round starts from, above all the adapter.
            limit: Limit of the dataset; None where the operator set none.
            planned: Number of rounds of the whole study, but for those in `later`.
            later: Rounds that follow at another cost, after a head start.
            naming: With correlated noise, what the names of units follow from. It must stay the same in all rounds of
                the study, which then come in their order: a unit must not be drawn in steps of two classes.

        Returns:
            None: `begin`, train, then `charge`. Also where the release was reserved before and has not begun.
            Bytes: the release was charged before; send exactly these again.

        Raises:
            BudgetExhaustedError: The limit does not cover the round and the rest of its study.
            SpentRoundError: The round began and has no payload, or one under a lost key: it is spent, its update lost.
            RefusedError: The limit does not admit this kind of study; or the round was reserved for other inputs or
                at another cost, was cancelled, or was delivered and followed by a later one; or, with correlated noise,
                a later round has begun, or units may have other names than before.
            StateError: The ledger cannot be read or written, or its key is missing.
        """
        require_digest("inputs", inputs)
        require_count("planned rounds", planned)
        # Before anything is drawn: a site that could not store its update would lose the round.
        self.check_key()
        with self._chain.reading():
            # The accountant may take seconds, and caches its results. Run here first, it blocks no other process.
            self._admit(release, cost, inputs, limit, planned, later)
        # Checked again under the write lock: another process may have reserved the last of the budget meanwhile.
        with self._chain.transaction():
            rows = self._admit(release, cost, inputs, limit, planned, later)
            payload = self._again(release, rows["charge"]) if "charge" in rows else None
            if naming is not None and payload is None:
                self._check_names(release, naming)
            if "reserve" not in rows:
                terms: dict[str, Any] = {"limit": None if limit is None else asdict(limit), "planned": planned}
                if naming is not None:
                    terms |= {"naming": self._sealer.mark(naming.encode())}
                content = {"inputs": inputs, "cost": _document(cost), "begins": True, **terms}
                self._chain.append({"kind": "reserve", **asdict(release), **content})
        if payload is not None:
            # The process that charged may have died before it wrote the anchor, and these bytes are about to leave.
            self._chain.keep_anchor()
        return payload

    def begin(self, release: RoundKey) -> None:
        """Spend the cost of a reserved release, before its first random draw. Durable on return.

        Nothing undoes it, and it succeeds once: of two processes that train one round, the second draws nothing. A
        release without privacy costs nothing, and may begin as often as it is trained.

        Raises:
            SpentRoundError: It began before.
            StateError: The release is not reserved or was cancelled; or the ledger cannot be written.
        """
        with self._chain.transaction():
            rows = self._reserved(release)
            if rows["reserve"]["cost"] is None:
                return
            if "charge" in rows or _began(rows):
                raise _spent(release)
            terms = {name: rows["reserve"][name] for name in ("inputs", "cost")}
            self._chain.append({"kind": "begin", **asdict(release), **terms})
        # Before the first draw: a ledger restored from a copy without this row would train the round again.
        self._chain.keep_anchor()

    def charge(self, release: RoundKey, payload: bytes) -> None:
        """Charge a begun release and store its payload. Both are durable on return.

        Charging the same bytes again changes nothing.

        Raises:
            StateError: The release is not reserved, has not begun although it is private, was cancelled, or was
                charged with other bytes; or the ledger cannot be written.
        """
        with self._chain.transaction() as database:
            rows = self._rows(release)
            if "charge" not in rows:
                rows = self._reserved(release)
                if rows["reserve"]["cost"] is not None and "begin" not in rows:
                    raise StateError(
                        f"{_say(release)} is private and never began, so its noise was drawn before its cost was spent",
                        "continue the round without this site, and report this as a bug",
                    )
                terms = {name: rows["reserve"][name] for name in ("inputs", "cost")}
                content = {"payload": self._sealer.mark(payload), "bytes": len(payload), **terms}
                # Cost and bytes in one transaction: noise drawn a second time would be a second release, so the bytes
                # themselves are kept, and not a seed.
                sequence = self._chain.append({"kind": "charge", **asdict(release), **content})
                sealed = self._sealer.seal(payload, _context({**asdict(release), **content, "sequence": sequence}))
                if not self._chain.sealed:
                    self._chain.mark_sealed()
                database.execute("INSERT INTO payloads (sequence, bytes) VALUES (?, ?)", (sequence, sealed))
                _drop_delivered(database)
            elif not self._sealer.is_marked(rows["charge"]["payload"], payload):
                raise StateError(
                    f"{_say(release)}: this update differs from the update that the ledger charged for the same round",
                    "send the stored update again; if no other process serves this site, report this as a bug",
                )
        # After the commit and before anything is sent: a restored older ledger is then behind its anchor.
        self._chain.keep_anchor()

    def acknowledge(self, release: RoundKey) -> None:
        """Record that a release has arrived.

        Its bytes are dropped once a later round of the study is charged as well. That round started from the sum that
        holds this release, so the coordinator does not request it again. The digest stays.

        Raises:
            StateError: It was not charged.
        """
        with self._chain.transaction() as database:
            rows = self._rows(release)
            if "charge" not in rows:
                raise StateError(
                    f"the ledger holds no charge for {_say(release)}, so its update cannot have arrived",
                    "check with `privet site doctor SITE` that the ledger is not an old copy",
                )
            if "acknowledge" not in rows:
                self._chain.append({"kind": "acknowledge", **asdict(release)})
                _drop_delivered(database)

    def cancel(self, release: RoundKey) -> None:
        """Give up a release that was reserved and has not begun. Only the site's operator may do so.

        The round cannot be reserved again: a process that still trains it must not find a new reservation.

        Raises:
            RefusedError: It began or was charged; both are final.
            StateError: It was not reserved.
        """
        with self._chain.transaction():
            rows = self._rows(release)
            if "charge" in rows:
                raise RefusedError(
                    f"{_say(release)} was charged, so it cannot be cancelled",
                    "keep the charge: its update may have left the site",
                )
            if _began(rows):
                raise RefusedError(
                    f"{_say(release)} began, so its cost is spent and it cannot be cancelled",
                    "nothing: the site takes part again in the next round",
                )
            if "reserve" not in rows:
                raise StateError(
                    f"the ledger has no reservation for {_say(release)}, so there is nothing to cancel",
                    "check the dataset, the study's digest and the round",
                )
            if "cancel" not in rows:
                self._chain.append({"kind": "cancel", **asdict(release)})

    def stored(self, release: RoundKey) -> bytes | None:
        """Return the bytes charged for a release; None where there are none, or none that the key opens."""
        with self._chain.reading():
            row = self._rows(release).get("charge")
            return None if row is None else self._bytes(row)

    def holds(self, release: RoundKey) -> bool:
        """Return whether the bytes charged for a release are kept, readable or not."""
        with self._chain.reading():
            row = self._rows(release).get("charge")
            return row is not None and self._sealed(row) is not None

    def counts(self, release: RoundKey) -> bool:
        """Return whether a release is reserved or spent, and was not cancelled."""
        with self._chain.reading():
            rows = self._rows(release)
        return "reserve" in rows and "cancel" not in rows

    def check_key(self) -> None:
        """Read the key that seals payloads. A ledger that never sealed any gets one.

        Raises:
            StateError: The key is missing, malformed, or readable by other users.
        """
        if self._sealer.missing:
            with self._chain.transaction():  # of two processes, one makes the key
                if self._sealer.missing and not self._chain.sealed:
                    self._sealer.make()
        self._sealer.ready()

    def replace_key(self) -> int:
        """Make a new key in place of one that was lost, and return the number of payloads that are lost with it.

        Raises:
            StateError: The key exists.
        """
        with self._chain.transaction():
            self._sealer.make()
            rows = self._chain.query("SELECT e.payload FROM entries e JOIN payloads USING (sequence)", {})
            return sum(is_sealed(mark) for (mark,) in rows)

    def take(self, entry: RecordedStep) -> None:
        """Record a step of secure aggregation, durably and once: the `Recorder` of `privet.common.secagg.site`.

        Raises:
            StateError: The step was taken in this session and round before, with any roster and lists; or the
                ledger cannot be written.
        """
        step = {"session": entry.session.hex(), "round": entry.round, "step": entry.step}
        lists = {"roster": entry.roster.hex(), "lists": entry.lists.hex()}
        with self._chain.transaction():
            # By session, round and step alone: a second vector with another roster is what lets sums be subtracted.
            if self._chain.query(
                "SELECT 1 FROM entries WHERE (session, round, step) = (:session, :round, :step)", step
            ):
                raise StateError(
                    f"round {entry.round}: this site has taken the {entry.step} step of this round already, and takes "
                    "each step of secure aggregation once",
                    "continue the round without this site",
                )
            self._chain.append({"kind": "take", **step, **lists})
        self._chain.keep_anchor()

    # --- what is in it ---------------------------------------------------------------------------------------

    def items(self, dataset: str) -> tuple[Item, ...]:
        """Return what is charged, begun and reserved on a dataset, studies in the order of their first reservation."""
        with self._chain.reading():
            return self._items(dataset)

    def statement(self, dataset: str, limit: Limit) -> Spending:
        """Return what was spent on a dataset, by study. The limit gives unit and delta of the epsilons."""
        with self._chain.reading():
            items, head = self._items(dataset), self._chain.last()
        return spending(dataset, limit, items, head)

    def datasets(self) -> tuple[str, ...]:
        """Return the names of all datasets that anything was ever reserved on, ascending."""
        with self._chain.reading():
            rows = self._chain.query("SELECT DISTINCT dataset FROM entries WHERE dataset IS NOT NULL ORDER BY 1", {})
        return tuple(name for (name,) in rows)

    def paid(self, dataset: str) -> tuple[tuple[int, Item], ...]:
        """Return what is charged on a dataset, each with the year in UTC in which it began, by this machine's clock."""
        with self._chain.reading():
            rows = self._chain.query(_PAID, {"dataset": dataset})
        return tuple(
            (int(year), Item(study, None if cost is None else Cost.parse(json.loads(cost)), True, rounds))
            for year, study, cost, rounds in rows
        )

    def began(self, dataset: str) -> dict[str, datetime]:
        """Return the time of each study's first reservation by the study's digest, from this machine's clock."""
        with self._chain.reading():
            rows = self._chain.query(
                "SELECT study, min(json_extract(content, '$.time')) FROM entries "
                "WHERE dataset = :dataset AND kind = 'reserve' GROUP BY study",
                {"dataset": dataset},
            )
        return {study: datetime.fromisoformat(time) for study, time in rows}

    def inputs(self, dataset: str, study: str) -> dict[int, str]:
        """Return what each round of a study that has begun or is charged started from, by the round's number."""
        with self._chain.reading():
            rows = self._chain.query(
                "SELECT round, json_extract(content, '$.inputs') FROM entries "
                "WHERE (dataset, study, kind) = (:dataset, :study, 'reserve') "
                "AND round IN (SELECT round FROM entries WHERE "
                "(dataset, study) = (:dataset, :study) AND kind IN ('begin', 'charge'))",
                {"dataset": dataset, "study": study},
            )
        return dict(rows)

    def reserved(self, dataset: str, study: str) -> tuple[int, ...]:
        """Return the rounds of a study that are reserved and were neither begun nor charged nor cancelled."""
        with self._chain.reading():
            numbers = self._chain.query(
                "SELECT round FROM entries WHERE (dataset, study, kind) = (:dataset, :study, 'reserve') ORDER BY round",
                {"dataset": dataset, "study": study},
            )
            found = {number: self._rows(RoundKey(dataset, study, number)) for (number,) in numbers}
        return tuple(
            number for number, rows in found.items() if not (_began(rows) or rows.keys() & {"charge", "cancel"})
        )

    def receipts(self, dataset: str) -> tuple[Receipt, ...]:
        """Return the receipts of everything charged on a dataset, oldest first."""
        with self._chain.reading():
            rows = self._chain.query(
                "SELECT sequence, content FROM entries WHERE dataset = :dataset AND kind = 'charge' ORDER BY sequence",
                {"dataset": dataset},
            )
        found = [(sequence, json.loads(content)) for sequence, content in rows]
        return tuple(
            Receipt(number, row["time"], row["study"], row["round"], row["bytes"], row["payload"])
            for number, row in found
        )

    @property
    def head(self) -> Head:
        """Number and head of the last row. They commit to everything before."""
        with self._chain.reading():
            return self._chain.last()

    def verify(self) -> None:
        """Check every row and every payload that the key opens.

        Raises:
            VerificationError: Something was changed or is missing; the message names the first bad row.
            StateError: The key is missing, malformed, or readable by other users.
        """
        self._chain.verify()
        with self._chain.reading():
            if self._chain.sealed or not self._sealer.missing:
                self._sealer.ready()
            rows = self._chain.query(
                "SELECT sequence, content FROM entries WHERE kind = 'charge' "
                "AND sequence NOT IN (SELECT sequence FROM delivered) ORDER BY 1",
                {},
            )
            for sequence, content in rows:
                row = {**json.loads(content), "sequence": sequence}
                if self._bytes(row) is None and (self._sealed(row) is None or self._sealer.opens(row["payload"])):
                    raise self._chain.wrong(f"the payload of row {sequence} was changed")

    def check_anchor(self, sequence: int, head: str) -> None:
        """Check that a head of this ledger, on record in a receipt or in the round log, is still part of it.

        Raises:
            VerificationError: It is not: the file was rolled back, rewritten or replaced.
        """
        self._chain.check_anchor(sequence, head)

    def start_anchor(self, anchor: Path) -> None:
        """Start to keep the last head in a file, for a ledger without an anchor.

        Raises:
            StateError: The file exists, is in the ledger's directory, or cannot be written.
        """
        self._chain.start_anchor(anchor)

    # --- inside a transaction --------------------------------------------------------------------------------

    def _admit(
        self,
        release: RoundKey,
        cost: Cost | None,
        inputs: str,
        limit: Limit | None,
        planned: int,
        later: Later,
    ) -> Mapping[str, Mapping[str, Any]]:
        """Check that a release may be reserved or sent again, and return its rows by kind."""
        rows = self._rows(release)
        before = rows.get("reserve")
        if "cancel" in rows:
            raise RefusedError(
                f"{_say(release)} was cancelled by the site's operator", "continue the round without this site"
            )
        if "charge" not in rows and _began(rows):
            raise _spent(release)
        if before is not None and before["inputs"] != inputs:
            raise RefusedError(
                f"the ledger reserved {_say(release)} for the adapter and cohort with digest {before['inputs']}; this "
                f"request for the same round has digest {inputs}",
                "the coordinator must repeat the round exactly as it first asked for it; training a round a second "
                "time would be an uncharged release",
            )
        if "charge" in rows:
            return rows
        if before is not None and not same_cost(before["cost"], cost):
            raise RefusedError(
                f"the ledger reserved {_say(release)} with another privacy cost than this version of privet computes "
                "for it",
                "install the versions of privet and opacus that reserved the round: other versions may calibrate other "
                "noise",
            )
        # The whole study must fit, not only this round: half a study spends budget and teaches nothing.
        check_cost(release.dataset, limit, cost)
        if limit is not None and cost is not None:
            items = self._items(release.dataset)
            done = sum(item.rounds for item in items if item.study == release.study)
            check_budget(release, limit, cost, items, max(planned - done, 0 if before else 1), later)
        return rows

    def _check_names(self, release: RoundKey, naming: str) -> None:
        """Refuse a round of correlated noise in which a unit could be drawn beside its class."""
        rows = self._chain.query(
            "SELECT round, kind, json_extract(content, '$.naming') FROM entries "
            "WHERE (dataset, study) = (:dataset, :study) AND kind IN ('reserve', 'begin')",
            asdict(release),
        )
        later = [number for number, kind, _ in rows if kind == "begin" and number > release.round]
        if later:
            raise RefusedError(
                f"{_say(release)} is earlier than round {max(later)}, which has begun: noise that is correlated over "
                "rounds takes them in their order",
                "continue the round without this site",
            )
        if any(mark is not None and not self._sealer.is_marked(mark, naming.encode()) for _, _, mark in rows):
            raise RefusedError(
                f"study {release.study} on dataset {release.dataset}: the noise is correlated over rounds, so the "
                "training files (for records), the rule of ids and the ledger's key must stay as they were in its "
                "first round; one of them has changed",
                "put back what has changed, or let the site sit out the rest of the study",
            )

    def _reserved(self, release: RoundKey) -> dict[str, dict[str, Any]]:
        """Return the rows of a release by kind. Raises `StateError` unless it is reserved and was not cancelled."""
        rows = self._rows(release)
        if "reserve" not in rows or "cancel" in rows:
            raise StateError(
                f"the ledger has no open reservation for {_say(release)}, so it cannot be charged",
                "continue the round without this site; if nobody cancelled the round, report this as a bug",
            )
        return rows

    def _rows(self, release: RoundKey) -> dict[str, dict[str, Any]]:
        """Return the rows of a release by kind. Each kind occurs at most once."""
        rows = self._chain.query(
            "SELECT kind, sequence, content FROM entries WHERE (dataset, study, round) = (:dataset, :study, :round)",
            asdict(release),
        )
        return {kind: {**json.loads(content), "sequence": sequence} for kind, sequence, content in rows}

    def _items(self, dataset: str) -> tuple[Item, ...]:
        rows = self._chain.query(_ITEMS, {"dataset": dataset})
        return tuple(
            Item(study, None if cost is None else Cost.parse(json.loads(cost)), bool(charged), rounds)
            for study, cost, charged, rounds in rows
        )

    def _again(self, release: RoundKey, row: Mapping[str, Any]) -> bytes:
        data = self._bytes(row)
        if data is not None:
            return data
        if self._sealed(row) is not None:
            raise SpentRoundError(
                f"{_say(release)} was charged, and its update cannot be read: the key that sealed it is lost",
                "nothing: the site sits this round out, and takes part again in the next one",
            )
        raise RefusedError(
            f"the update of {_say(release)} has arrived and a later round was charged, so the ledger no longer "
            "keeps the update",
            "the coordinator must continue the run from its saved state: `privet coordinator resume RUN`",
        )

    def _bytes(self, row: Mapping[str, Any]) -> bytes | None:
        """Return the payload of a charge; None where it was dropped, or was sealed under another key."""
        kept, mark = self._sealed(row), row["payload"]
        if kept is None or not self._sealer.opens(mark):
            return None
        data = self._sealer.open(kept, _context(row)) if is_sealed(mark) else kept
        if data is None or not self._sealer.is_marked(mark, data):
            raise self._chain.wrong(f"the payload of row {row['sequence']} was changed")
        return data

    def _sealed(self, row: Mapping[str, Any]) -> bytes | None:
        found = self._chain.query("SELECT bytes FROM payloads WHERE sequence = :sequence", row)
        return bytes(found[0][0]) if found else None


def _context(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a charge that its payload is bound to."""
    return {name: row[name] for name in ("dataset", "study", "round", "sequence", "payload")}


def cost_of(ledger: Ledger, dataset: str, limit: Limit, costs: Later) -> tuple[float, float, float | None]:
    """Return the epsilon of a dataset after a new study, with everything reserved: composed, and as counted.

    The third value is the least limit that admits the study (`admitting_epsilon`).

    Args:
        ledger: The site's ledger.
        dataset: Name of the dataset.
        limit: Gives unit and delta.
        costs: Costs of the study's rounds, each with its number of rounds.
    """
    items = [*ledger.items(dataset), *(whole_study("", cost, rounds) for cost, rounds in costs)]
    return composed_epsilon(paid_rounds(items), limit), counted_epsilon(items, limit), admitting_epsilon(items, limit)


def _document(cost: Cost | None) -> dict[str, Any] | None:
    return None if cost is None else cost.document()


def _began(rows: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether noise may have been drawn for a release, from its rows by kind."""
    reserved = rows.get("reserve")
    # An earlier version drew after reserving, and wrote no begin.
    old = reserved is not None and reserved["cost"] is not None and "begins" not in reserved
    return "begin" in rows or old


def _spent(release: RoundKey) -> SpentRoundError:
    return SpentRoundError(
        f"{_say(release)} began before and has no stored update: the round was charged, and its update was lost; "
        "training it again would be a second release",
        "nothing: the site sits this round out, and takes part again in the next one",
    )


def _drop_delivered(database: sqlite3.Connection) -> None:
    database.execute(
        "DELETE FROM payloads WHERE EXISTS (SELECT 1 FROM delivered d WHERE d.sequence = payloads.sequence)"
    )


def _say(release: RoundKey) -> str:
    return f"round {release.round} of study {release.study} on dataset {release.dataset}"
