"""How long a site or a coordinator keeps what shows what happened, and the evidence of what it deleted afterwards.

`[retention]` gives years. Log and ledger are only reported: the log is the consortium's, and without its ledger a site
could not say what its dataset has spent. Receipts and dossiers can be deleted when they are due, and not before. A
signed record of each deletion is on the disk before anything is removed, and privet deletes no record.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from privet.common.errors import RefusedError, StateError
from privet.common.files import write_durably
from privet.common.signed import sign_document
from privet.common.study.sections import Section

RECORD = "application/vnd.privet.deletion+json"
DELETED = "deleted"
"""Directory of the records, beside the site file or in the coordinator's directory."""

Kind = Literal["log", "ledger", "receipts", "dossiers"]
Years = Annotated[int, Field(ge=1, le=1000)]
_REMOVABLE: frozenset[Kind] = frozenset({"receipts", "dossiers"})
_LEAP = (2, 29)


class RetentionSection(Section):
    """Years for which each is kept, from its last change. Nothing is deleted unless somebody asks for it."""

    log: Years = 10
    """The round log, or a site's side of it."""
    ledger: Years = 10
    """A site's ledger. It is never deleted: it says what the dataset has spent."""
    receipts: Years = 6
    """Signed refusals, and certificates of withdrawals."""
    dossiers: Years = 10
    """Dossiers of runs."""


@dataclass(frozen=True)
class Item:
    """Something that is kept.

    Attributes:
        kind: What it is.
        paths: Its files or directories.
        last: When it changed last.
    """

    kind: Kind
    paths: tuple[Path, ...]
    last: datetime

    @property
    def removable(self) -> bool:
        """Whether it may be deleted once it is due."""
        return self.kind in _REMOVABLE

    def due(self, rules: RetentionSection) -> datetime:
        """Return the time until which it is kept."""
        year = self.last.year + int(getattr(rules, self.kind))
        if year > datetime.max.year:
            return datetime.max.replace(tzinfo=UTC)
        try:
            return self.last.replace(year=year)
        except ValueError:  # a 29th of February is due on the 1st of March
            return self.last.replace(year=year, month=3, day=1)


def changed(path: Path) -> datetime:
    """Return when a file, or the newest file in a directory, changed last; the start of 1970 if there is none."""
    times = [file.lstat().st_mtime for file in _files(path)]
    return datetime.fromtimestamp(max(times, default=0.0), UTC)


def kept_dossiers(folders: Iterator[Path] | Sequence[Path]) -> list[Item]:
    """Return the dossiers among some directories."""
    return [Item("dossiers", (path,), changed(path)) for path in folders if (path / "dossier.json").is_file()]


def report(items: Sequence[Item], rules: RetentionSection, now: datetime) -> list[dict[str, Any]]:
    """Return what is kept until when, as plain JSON values, what is due first."""
    rows = [
        {
            "kind": each.kind,
            "paths": [str(path) for path in each.paths],
            "last": each.last.isoformat(timespec="seconds"),
            "until": each.due(rules).isoformat(timespec="seconds"),
            "due": each.due(rules) <= now,
            "removable": each.removable,
        }
        for each in items
    ]
    return sorted(rows, key=lambda row: (row["until"], row["paths"]))


def printed(rows: Sequence[Mapping[str, Any]], records: Sequence[str], *, as_json: bool) -> str:
    """Return what a command prints of a report, and of the records of what it deleted."""
    if as_json:
        return json.dumps({"items": list(rows), "records": list(records)})
    found = []
    for row in rows:
        state = "kept"
        if row["due"]:
            state = "DUE" if row["removable"] else "due; privet does not delete it"
        found.append(f"{row['kind']:<9} until {row['until'][:10]}  {state}  {row['paths'][0]}")
    found += [f"deleted; the record is {record}" for record in records]
    return "\n".join(found or ["nothing is kept yet"])


def delete(
    item: Item, rules: RetentionSection, now: datetime, owner: str, key: Ed25519PrivateKey, records: Path
) -> Path:
    """Delete something that is due, and return the signed record of it, which was written before.

    Args:
        item: What is deleted.
        rules: How long it is kept.
        now: The present time.
        owner: Who deletes it: the name of the site or of the consortium.
        key: Signs the record.
        records: Directory of the records.

    Raises:
        RefusedError: It is not due, or of a kind that is never deleted.
        StateError: It cannot be read, written or deleted; what was recorded may then still be there.
    """
    until = item.due(rules)
    if not item.removable or now < until:
        why = "is never deleted" if not item.removable else f"is kept until {until:%Y-%m-%d}"
        raise RefusedError(f"{item.paths[0]} {why}, by [retention]", "nothing is to be done")
    try:
        files = {
            file.relative_to(path.parent).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
            for path in item.paths
            for file in _files(path)
        }
        document = {
            "type": "deletion-record",
            "format": 1,
            "owner": owner,
            "kind": item.kind,
            "files": files,
            "last": item.last.isoformat(timespec="seconds"),
            "kept_until": until.isoformat(timespec="seconds"),
            "deleted": now.astimezone(UTC).isoformat(timespec="seconds"),
        }
        records.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = _next(records)
        write_durably(target, sign_document(document, RECORD, key), 0o600)
        for path in item.paths:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        raise StateError(
            f"{error.filename or item.paths[0]} cannot be read, written or deleted ({error.strerror})",
            "check who may write the directory, then run the command again",
        ) from None
    return target


def _next(records: Path) -> Path:
    numbers = [int(path.stem) for path in records.glob("*.json") if path.stem.isdigit()]
    return records / f"{max(numbers, default=0) + 1:06d}.json"


def _files(path: Path) -> list[Path]:
    """Return a file, or the files of a directory; links are files of their own, and are not followed."""
    if path.is_dir() and not path.is_symlink():
        return sorted(file for file in path.rglob("*") if file.is_symlink() or file.is_file())
    return [path] if path.exists() or path.is_symlink() else []
