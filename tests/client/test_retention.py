"""Retention: nothing is deleted before its time, log and ledger never, and each deletion leaves a signed record."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from privet.client.commands.retention import retention as at_site
from privet.client.site import load_site
from privet.common.errors import RefusedError, StateError, StudyError, VerificationError
from privet.common.retention import RECORD, Item, Kind, RetentionSection, delete, report
from privet.common.signed import open_document
from privet.server.commands.retention import retention as at_coordinator
from tests.support.consortium_world import make_coordinator, run
from tests.support.tiny import site_toml

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(31) + b"\x07")
PUBLIC = KEY.public_key().public_bytes_raw()
RULES = RetentionSection()


def old(path: Path, years: float) -> Path:
    """Make a file, or a directory's files, look so old."""
    time = datetime.now(UTC).timestamp() - years * 366 * 86400
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        os.utime(file, (time, time))
    return path


def dossier_in(folder: Path, name: str) -> Path:
    made = folder / name
    (made / "sources").mkdir(parents=True)
    (made / "dossier.json").write_text("{}")
    (made / "sources/study.json").write_text("{}")
    return made


@given(
    kind=st.sampled_from(get_args(Kind)),
    age=st.integers(0, 20 * 366),
    years=st.integers(1, 20),
    seconds=st.integers(-1, 1),
)
def test_nothing_is_deleted_before_its_time(kind: Kind, age: int, years: int, seconds: int) -> None:
    rules = RetentionSection(**dict.fromkeys(("log", "ledger", "receipts", "dossiers"), years))
    item = Item(kind, (Path("/nonexistent/x"),), NOW - timedelta(days=age))
    until = item.due(rules)
    assert until >= item.last + timedelta(days=365 * years)
    assert item.removable is (kind in ("receipts", "dossiers"))
    now = until + timedelta(seconds=seconds)
    if item.removable and now >= until:
        return  # what is due is deleted below, where there is a file
    with pytest.raises(RefusedError, match=r"is kept until|is never deleted"):
        delete(item, rules, now, "berlin", KEY, Path("/nonexistent/deleted"))


def test_a_day_that_another_year_lacks_is_due_a_day_later() -> None:
    item = Item("receipts", (Path("x"),), datetime(2024, 2, 29, tzinfo=UTC))
    assert item.due(RULES) == datetime(2030, 3, 1, tzinfo=UTC)
    with pytest.raises(StudyError, match="retention"):
        load_site_with("[retention]\nlog = 0\n")


def load_site_with(table: str) -> None:
    from privet.client.site import SiteConfig
    from privet.common.study.reading import validate

    years = int(table.split("=")[1])
    validate(SiteConfig, {"name": "berlin", "train": ["a.csv"], "retention": {"log": years}}, what="site")


def test_a_record_is_signed_and_names_what_was_deleted(tmp_path: Path) -> None:
    made = dossier_in(tmp_path, "flu")
    item = Item("dossiers", (made,), NOW - timedelta(days=3700))
    record = delete(item, RULES, NOW, "berlin", KEY, tmp_path / "deleted")
    assert not made.exists()
    document = open_document(record.read_bytes(), RECORD, PUBLIC)
    empty = hashlib.sha256(b"{}").hexdigest()
    assert document["files"] == {"flu/dossier.json": empty, "flu/sources/study.json": empty}
    assert (document["owner"], document["kind"], document["deleted"]) == ("berlin", "dossiers", NOW.isoformat())
    with pytest.raises(VerificationError):
        open_document(record.read_bytes(), "application/json", PUBLIC)
    again = dossier_in(tmp_path, "flu")
    assert delete(Item("dossiers", (again,), item.last), RULES, NOW, "berlin", KEY, tmp_path / "deleted") != record
    assert record.is_file()


def test_without_a_record_nothing_is_deleted(tmp_path: Path) -> None:
    made = dossier_in(tmp_path, "flu")
    (tmp_path / "deleted").write_text("in the way")
    with pytest.raises(StateError, match="cannot be read, written or deleted"):
        delete(Item("dossiers", (made,), NOW - timedelta(days=3700)), RULES, NOW, "b", KEY, tmp_path / "deleted")
    assert (made / "dossier.json").is_file()


def test_a_site_reports_what_it_keeps_and_deletes_what_is_due(tmp_path: Path) -> None:
    site = site_toml(tmp_path, "north", [{"text": "x"}], seed=None)
    config = load_site(site)
    assert config.ledger is not None
    recent, ancient = dossier_in(tmp_path, "dossiers/recent"), old(dossier_in(tmp_path, "dossiers/ancient"), 11)
    (tmp_path / "certificates").mkdir()
    for suffix in ("json", "txt"):
        file = tmp_path / f"certificates/withdrawal-000002.{suffix}"
        file.write_text("{}")
        old(file, 7)
    old(config.ledger, 30)
    rows = {row["paths"][0]: row for row in json.loads(run(at_site, site, "--json").output)["items"]}
    assert {row["kind"] for row in rows.values()} == {"ledger", "log", "dossiers", "receipts"}
    assert [rows[str(path)]["due"] for path in (recent, ancient, config.ledger)] == [False, True, True]
    said = run(at_site, site).output
    assert "due; privet does not delete it" in said
    assert "no table [retention]" in said
    with pytest.raises(StateError, match=r"no table \[retention\]"):
        run(at_site, site, "--delete")
    text = site.read_text()
    site.write_text(f"{text}\n[retention]\ndossiers = 12\n")
    assert run(at_site, site, "--delete").exit_code == 0
    assert ancient.exists()
    assert not (tmp_path / "certificates/withdrawal-000002.txt").exists()
    site.write_text(f"{text}\n[retention]\ndossiers = 10\n")
    assert "deleted; the record is" in run(at_site, site, "--delete").output
    assert (ancient.exists(), recent.exists(), config.ledger.exists()) == (False, True, True)
    key = load_site(site).identity_key()
    assert key is not None
    records = [
        open_document(file.read_bytes(), RECORD, key.public_key().public_bytes_raw())
        for file in sorted((tmp_path / "deleted").iterdir())
    ]
    assert [each["kind"] for each in records] == ["receipts", "dossiers"]
    assert run(at_site, site, "--delete").exit_code == 0
    assert len(list((tmp_path / "deleted").iterdir())) == 2


def test_a_coordinator_deletes_dossiers_that_are_due_and_nothing_else(tmp_path: Path) -> None:
    made = make_coordinator(tmp_path / "c")
    ancient = old(dossier_in(made.directory / "runs/flu", "dossier"), 11)
    with pytest.raises(StateError, match="no table"):
        run(at_coordinator, "-C", made.directory, "--delete")
    file = made.directory / "coordinator.toml"
    file.write_text(file.read_text() + "\n[retention]\nlog = 2\n")
    assert run(at_coordinator, "-C", made.directory, "--delete").exit_code == 0
    assert not ancient.exists()
    (record,) = (made.directory / "deleted").iterdir()
    public = made.keys.coordinator.public_key().public_bytes_raw()
    assert open_document(record.read_bytes(), RECORD, public)["owner"] == "north"
    assert report([], RULES, NOW) == []
