"""A first record that stands for the names of columns is in no output: of scans, errors, set-up and drafts."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privet.client.commands import scan
from privet.client.commands.columns import take_columns
from privet.client.commands.data import report_data
from privet.client.commands.doctor import _patients
from privet.client.release.tables import survey
from privet.client.site import load_site
from privet.client.training.files import read_columns, read_rows
from privet.client.training.glance import check_column, lacking_columns
from privet.client.training.headings import believed, is_number, listed, numbered
from privet.common.errors import PrivetError
from privet.common.study.study import load_study
from privet.simulations.drafts.draft import Proposals, Wishes, draft_study
from tests.client.test_policy_commands import SITE, STUDY
from tests.client.test_scan import leaked
from tests.support.consortium_world import run

WORDS = st.text("BCDFGHJKLMNPQRSTVWXYZ", min_size=5, max_size=12).map(str.title)
RECORD = st.tuples(
    st.tuples(WORDS, WORDS).map(" ".join),  # a name
    st.lists(WORDS.map(str.lower), min_size=1, max_size=7).map(" ".join),  # a note, short or long
    st.integers(10**5, 10**6 - 1).map(str),
)
SUFFIXES = (".csv", ".jsonl", ".parquet")
HEADER = ("name", "note", "case_id")


def write(path: Path, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Path:
    """Write a file as a program does that takes `header` for the names of columns."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows))
    else:
        columns = dict(zip(header, zip(*rows, strict=True), strict=True))
        pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)
    return path


def outputs(path: Path, folder: Path) -> list[str]:
    """Return all that commands say of a file whose columns are not the study's."""
    study, site = folder / "study.toml", folder / "site.toml"
    study.write_text(STUDY)
    text = SITE.replace("notes.csv", path.name)
    site.write_text(text)
    config, page = load_site(site), folder / "page.html"
    other = config.model_copy(update={"patient_column": "whoever"})
    guide: Any = SimpleNamespace(site=config, file=site)
    said: list[str] = []

    def note(*each: object) -> None:
        said.append(" ".join(map(str, each)))

    tries: list[Callable[[], Any]] = [
        lambda: run(scan.scan_files, path, "--html", page, "--exact").output,
        lambda: run(scan.scan_files, path, "--json", "--exact").output,
        lambda: run(scan.scan_files, path, "--study", study).output,
        lambda: run(scan.scan_site, site).output,
        lambda: report_data(str(study), [path], None, as_json=False),
        lambda: read_columns(path, load_study(study), ["t", "l"]),
        lambda: check_column(config, path, "whoever", "x"),
        lambda: _patients(other),
        lambda: lacking_columns(config, load_study(study))[1],
        lambda: take_columns(guide, {"whoever": "t"}),
        lambda: survey(path, ["t"], None),
        lambda: draft_study([path], Wishes(), folder, Proposals(), note),
    ]
    for each in tries:
        try:
            said.append(str(each()))
        except PrivetError as error:
            said.append(f"{error.message} {error.hint}")
    kept = folder / "scan.json"
    said += [file.read_text() for file in (page, kept) if file.exists()]
    return said


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(RECORD, min_size=14, max_size=14, unique_by=lambda row: row[2]), suffix=st.sampled_from(SUFFIXES)
)
def test_a_record_without_a_line_of_names_is_in_no_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
    records: list[tuple[str, ...]], suffix: str,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    path = write(tmp_path / f"a{suffix}", records[0], records[1:])
    assert next(read_rows(path)).keys() == {*records[0]}  # the first record is taken for the names
    secrets = [word for row in records for value in row for word in value.split()]
    said = "\n".join(outputs(path, tmp_path)) + "".join(capsys.readouterr()) + caplog.text
    assert leaked(secrets, said, tmp_path) == []
    assert "(column 2)" in said or "names of columns in the first line" in said  # refused, or shown by number
    # The same search finds a name that is printed.
    assert leaked(secrets, f"{said}\nfound only {records[0][0]}", tmp_path)


def test_names_are_shown_where_they_are_names(tmp_path: Path) -> None:
    rows = [(f"Ada {n}", f"cough since day {n}", str(n)) for n in range(12)]
    for suffix in SUFFIXES:
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        said = "\n".join(outputs(write(folder / f"a{suffix}", HEADER, rows), folder))
        assert "name, note, case_id" in said
        assert not is_number(said)
        assert numbered(0) not in said


@pytest.mark.parametrize(
    ("names", "known", "good"),
    [
        (["note", "specialty"], [], True),
        (["PatientID", "Befund"], [], True),
        (["Fach", "Größe", "x"], [], True),
        (["compte_rendu", "spécialité"], [], True),
        (["date of birth"], [], True),
        (["t", "l"], [], False),
        (["t", "l"], ["l"], True),
        (["Amelia Smithson", "cough since monday", "17"], [], False),
        (["Ward", "Amelia"], [], False),
        (["note", "a", "b", "c"], [], False),  # fewer than a third
        (["note " * 20], [], False),
        ([], [], False),
    ],
)
def test_names_are_believed_by_what_is_known_of_names(names: list[str], known: list[str], good: bool) -> None:
    assert believed(names, known) is good
    assert (listed(names, known) == ", ".join(names)) is (good or not names) or not names


def test_keys_of_few_rows_are_not_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"note": "calm", "kind": "x"}] * 20 + [{"note": "calm", "Amelia Smithson": "came"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "study.toml").write_text(STUDY)
    with pytest.raises(PrivetError, match="found only note, kind") as found:
        read_columns(path, load_study(tmp_path / "study.toml"), ["t", "l"])
    assert "Smithson" not in str(found.value)
