"""Files as hospitals hold them: every setting of `[format]`, what is refused without it, and what is proposed."""

from __future__ import annotations

import gzip
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from privet.client.formats import FileFormat, FormatSection, load_format
from privet.client.site import load_site
from privet.client.training import decoding
from privet.client.training.data import load_files, load_records
from privet.client.training.examination import proposed_count
from privet.client.training.files import read_rows
from privet.client.training.overlap import Part, overlaps, part_of
from privet.client.training.proposals import proposed
from privet.common.errors import DataError, StudyError
from tests.client.test_data import SECRET, make_records, make_study

STUDY = make_study(labels=("no", "yes"), unit="patient")
NEEDED = ["text", "label", "patient"]
ROWS = [("Schmerzen über Nacht", "yes", "101"), ('sagt "nein";\nkein Fieber, 37,5', "no", "102"), ("Öl", "yes", "103")]


def table(separator: str = ",", end: str = "\r\n", header: str = "text,label,patient") -> str:
    """Return the rows as separated values, each value quoted."""
    lines = [header.replace(",", separator)]
    lines += [separator.join('"' + value.replace('"', '""') + '"' for value in row) for row in ROWS]
    return "".join(line + end for line in lines)


def objects() -> list[dict[str, str]]:
    return [dict(zip(NEEDED, row, strict=True)) for row in ROWS]


Kind = tuple[str, Callable[[], bytes], dict[str, Any]]
KINDS: dict[str, Kind] = {
    "comma": ("a.csv", lambda: table().encode(), {}),
    "UTF-8 with a mark": ("a.csv", lambda: b"\xef\xbb\xbf" + table().encode(), {}),
    "semicolon": ("a.csv", lambda: table(";").encode(), {"delimiter": "semicolon"}),
    "pipe": ("a.csv", lambda: table("|").encode(), {"delimiter": "pipe"}),
    "tab": ("a.csv", lambda: table("\t").encode(), {"delimiter": "tab"}),
    "TSV": ("a.tsv", lambda: table("\t").encode(), {}),
    "Latin-1": ("a.csv", lambda: table().encode("latin-1"), {"encoding": "latin-1"}),
    "Windows-1252": ("a.csv", lambda: table().replace("Öl", "\u2013 Öl").encode("cp1252"), {"encoding": "cp1252"}),
    "UTF-16": ("a.csv", lambda: table().encode("utf-16"), {"encoding": "utf-16"}),
    "UTF-16, big end first": ("a.csv", lambda: b"\xfe\xff" + table().encode("utf-16-be"), {"encoding": "utf-16"}),
    "UTF-16 without a mark": ("a.csv", lambda: table().encode("utf-16-le"), {"encoding": "utf-16-le"}),
    "Excel": (
        "a.csv",
        lambda: ("\ufeffsep=;\r\n" + table(";")).encode(),
        {"delimiter": "semicolon"},
    ),
    "Excel's Unicode text": ("a.tsv", lambda: table("\t").encode("utf-16"), {"encoding": "utf-16"}),
    "old Macintosh": ("a.csv", lambda: table(end="\r").encode(), {}),
    "blanks in names": ("a.csv", lambda: table(header=" text,label\u00a0, patient ").encode(), {"strip_header": True}),
    "gzip": ("a.csv.gz", lambda: gzip.compress(table().encode()), {}),
    "gzip, all at once": (
        "a.csv.gz",
        lambda: gzip.compress(("sep=;\n" + table(";", "\n", "text , label,patient")).encode("latin-1")),
        {"delimiter": "semicolon", "encoding": "latin-1", "strip_header": True},
    ),
    "JSON Lines, gzip": ("a.jsonl.gz", lambda: gzip.compress("\n".join(map(json.dumps, objects())).encode()), {}),
    "JSON Lines": ("a.ndjson", lambda: "\r\n".join(map(json.dumps, objects())).encode(), {}),
    "JSON": ("a.json", lambda: b"\xef\xbb\xbf" + json.dumps(objects(), indent=1, ensure_ascii=False).encode(), {}),
    "JSON in Latin-1": (
        "a.json",
        lambda: json.dumps(objects(), ensure_ascii=False).encode("latin-1"),
        {"encoding": "latin-1"},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, kind: str) -> None:
    name, data, settings = KINDS[kind]
    path = tmp_path / name
    path.write_bytes(data())
    records, report = load_records(path, STUDY, form=FileFormat(**settings))
    texts = [" ".join(text.split()) for text, _, _ in ROWS]
    assert [row["text"].removeprefix("\u2013 ") for row in records.rows] == texts
    assert [row["label"] for row in records.rows] == [1, 0, 1]
    assert records.units == ("101", "102", "103")
    assert report.format == "".join(path.suffixes).removeprefix(".").replace("ndjson", "jsonl")
    # The same reader serves predictions.
    assert [row["patient"] for row in read_rows(path, FileFormat(**settings))] == ["101", "102", "103"]


@pytest.mark.parametrize("kind", [kind for kind, (_, _, settings) in KINDS.items() if settings])
def test_nothing_is_guessed_and_everything_is_proposed(tmp_path: Path, kind: str) -> None:
    name, data, settings = KINDS[kind]
    path = tmp_path / name
    path.write_bytes(data())
    with pytest.raises(DataError) as caught:
        load_records(path, STUDY)
    assert str(path) in caught.value.message
    assert not any(word in str(caught.value) for text, _, _ in ROWS for word in (text, "Schmerzen"))
    assert proposed(path, NEEDED, FileFormat()) == settings
    assert proposed(path, NEEDED, FileFormat(**settings)) == {}
    lines = FormatSection(**settings).lines()
    assert FormatSection(**tomllib.loads("\n".join(lines))["format"]) == FormatSection(**settings)


def test_a_file_for_which_there_is_no_proposal(tmp_path: Path) -> None:
    for name, data in {
        "a.csv": b"nothing\n1\n",
        "b.csv": b"\x81\x8d",
        "c.csv": b"a\0b",
        "d.parquet": b"",
        "e.xlsx": b"",
        "f.csv": b"sep=^\n",
    }.items():
        (tmp_path / name).write_bytes(data)
        assert proposed(tmp_path / name, NEEDED, FileFormat()) == {}
    assert proposed(tmp_path / "absent.csv", NEEDED, FileFormat()) == {}
    # Names that are none of the study's: the delimiter alone, from the shape of the rows.
    (tmp_path / "g.csv").write_bytes(b"befund;art\na, b;c\nd;e\n")
    assert proposed(tmp_path / "g.csv", NEEDED, FileFormat()) == {"delimiter": "semicolon"}


Bad = tuple[str, bytes, dict[str, Any], str]
BAD: dict[str, Bad] = {
    "mixed line ends": ("a.csv", b"text,label,patient\r\na,no,1\r\nb,yes,2\nc,no,3\n", {}, "line 3: it ends with LF"),
    "a lone CR in a value": ("a.csv", b"text,label,patient\na\rb,no,1\n", {}, "line 2: it ends with CR"),
    "a NUL": ("a.csv", b"text,label,patient\na,no,1\nb\0,yes,2\n", {}, "line 3: found a NUL character"),
    "a NUL in JSON Lines": ("a.jsonl", b'{"text": "a"}\n\0\n', {}, "line 2: found a NUL character"),
    "a quote that never closes": ("a.csv", b'text,label,patient\na,no,1\n"b,yes,2\n', {}, "line 3: a quote that is"),
    "a quote that closes rows later": (
        "a.csv",
        b'text,label,patient\na,no,1\n"b,yes,2\nc,no,"3"\n',
        {},
        "line 4: text after a closing quote",
    ),
    "the header twice": ("a.csv", b"text,label,patient\na,no,1\ntext,label,patient\n", {}, "line 3: the column names"),
    "the header twice, with a mark": (
        "a.csv",
        "text,label,patient\na,no,1\n\ufefftext,label,patient\n".encode(),
        {},
        "line 3: the column names",
    ),
    "a short row": ("a.csv", b"text,label,patient\na,no,1\n\nb,yes\n", {}, "line 4: expected at least 3 values"),
    "a long row": ("a.csv", b"text,label,patient\na,no,1,x\n", {}, "line 2: expected at most 3 values, found 4"),
    "two columns of a name": ("a.csv", b"text, text,label,patient\na,b,no,1\n", {"strip_header": True}, "named text"),
    "two names in JSON": (
        "a.jsonl",
        b'{"text": "a", " text": "b", "label": "no", "patient": "1"}\n',
        {"strip_header": True},
        "line 1 is not one JSON object",
    ),
    "a name twice in JSON": ("a.jsonl", b'{"text": "a", "text": "b"}\n', {}, "line 1 is not one JSON object"),
    "UTF-16 without a mark": ("a.csv", table().encode("utf-16-be"), {"encoding": "utf-16"}, "no byte order mark"),
    "UTF-16 read as one byte": ("a.csv", table().encode("utf-16"), {"encoding": "latin-1"}, "NUL"),
    "half a character": ("a.csv", table().encode("utf-16")[:-1], {"encoding": "utf-16"}, "line 5: found bytes"),
    "UTF-8 read as Windows-1252": ("a.csv", table().encode(), {"encoding": "cp1252"}, "found text in UTF-8"),
    "Windows-1252 read as Latin-1": (
        "a.csv",
        "text,label,patient\na,no,1\n\u2013 b,yes,2\n".encode("cp1252"),
        {"encoding": "latin-1"},
        "line 3: found a control character",
    ),
    "no character of Windows-1252": ("a.csv", b"text\n\x81", {"encoding": "cp1252"}, "line 2: found bytes"),
    "another mark of Excel": ("a.csv", b"sep=;\ntext,label\n", {}, "line 1: the file says that semicolons"),
    "gzip that is none": ("a.csv.gz", b"text,label\n", {}, "not a readable gzip file"),
    "gzip without its end": ("a.csv.gz", gzip.compress(table().encode())[:-9], {}, "not a readable gzip file"),
    "gzip without its name": ("a.csv", gzip.compress(table().encode()), {}, "is compressed with gzip"),
    "gzip of nothing": ("a.csv.gz", gzip.compress(b""), {}, "0 bytes"),
    "a workbook": ("a.csv", b"PK\x03\x04" + bytes(20), {}, "a workbook or an archive"),
    "JSON Lines as JSON": ("a.json", b'{"text": "a"}\n', {}, "expected an array of objects"),
    "JSON that ends early": ("a.json", b'[{"text": "a"},\n', {}, "is not a JSON array of objects in line 2"),
    "JSON of texts": ("a.json", f'[{{"text": "a"}}, "{SECRET}"]'.encode(), {}, "row 2 is not one JSON object"),
    "JSON that is deep": ("a.json", b"[" * 100_000, {}, "is not a JSON array"),
}


@pytest.mark.parametrize("kind", BAD)
def test_hostile_files_are_refused_with_their_line(tmp_path: Path, kind: str) -> None:
    name, data, settings, says = BAD[kind]
    path = tmp_path / name
    path.write_bytes(data)
    for read in (
        lambda: load_records(path, STUDY, form=FileFormat(**settings)),
        lambda: list(read_rows(path, FileFormat(**settings))),
    ):
        with pytest.raises(DataError) as caught:
            read()
        assert str(path) in caught.value.message
        assert SECRET not in str(caught.value)
        if says not in caught.value.message:  # predictions need no columns of the study
            assert "several columns" in caught.value.message


def test_a_compressed_file_is_not_read_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MOST_BYTES", 2**21)
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"text,label,patient\n" + b"a" * 2**24))
    assert path.stat().st_size < 2**15
    with pytest.raises(DataError, match="holds more than 2,097,152 bytes when it is decompressed"):
        load_records(path, STUDY)


def test_a_row_may_lack_columns_that_the_study_does_not_need(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label,patient,ward\r\na,no,1\r\nb,yes,2,x\r\n")
    assert len(load_records(tmp_path / "a.csv", STUDY)[0]) == 2


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_columns_are_read_under_the_names_of_the_study(tmp_path: Path, kind: str) -> None:
    rows = [{" Befund": "a", "label": "no", "Patient": "1"}, {" Befund": "b", "label": "yes", "Patient": "2"}]
    form = FileFormat(strip_header=True, columns={"Befund": "text", "Patient": "patient"})
    path = tmp_path / f"a.{kind}"
    if kind == "csv":
        path.write_text(" Befund;label;Patient\na;no;1\nb;yes;2\n")
        assert proposed(path, ["text", "patient"], form) == {"delimiter": "semicolon"}
        form = FileFormat(**vars(form) | {"delimiter": "semicolon"})
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    records, _ = load_records(path, STUDY, form=form)
    assert list(records.units) == ["1", "2"]
    # A column that the file has under this name already is not another one in silence.
    with pytest.raises(DataError):
        load_records(path, STUDY, form=FileFormat(**vars(form) | {"columns": {"Befund": "label"}}))


# --- labels and numbers ----------------------------------------------------------------------------------


def test_labels_are_mapped_and_several_may_become_one(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label,patient\na,J,1\nb,ja,2\nc,N,3\nd,no,4\ne,,5\n")
    form = FileFormat(labels={"J": "yes", "ja": "yes", "N": "no", "never": "unknown"})
    records, report = load_records(path, STUDY, form=form)
    assert [row["label"] for row in records.rows] == [1, 1, 0, 0]
    assert report.dropped == {"missing value": 1}  # an empty value is not a label, unless it is mapped
    assert len(load_records(path, STUDY, form=FileFormat(labels={**form.labels, "": "no"}))[0]) == 5
    # A mapping onto a label that the study does not have is refused where it is used: other studies may have it.
    with pytest.raises(DataError, match=r"found others in 1 of 5 rows: row 3 \(line 4\)"):
        load_records(path, STUDY, form=FileFormat(labels={**form.labels, "N": "unknown"}))


def test_labels_of_numbers_tags_and_spans_are_mapped(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a", "label": 1, "patient": 1}, {"text": "b", "label": 2, "patient": 2}]))
    records, _ = load_records(path, STUDY, form=FileFormat(labels={"1": "no", "2": "yes"}))
    assert [row["label"] for row in records.rows] == [0, 1]
    words = make_study("token-classification")
    path.write_text(json.dumps([{"tokens": ["a", "b"], "tags": ["KEIN", "B-d"]}]))
    assert load_records(path, words, form=FileFormat(labels={"KEIN": "O"}))[0].rows[0]["tags"] == [0, 1]
    spans = make_study("token-classification", {"text": "text", "spans": "spans"})
    path.write_text(json.dumps([{"text": "a b", "spans": [{"start": 2, "end": 3, "label": "Diagnose"}]}]))
    assert load_records(path, spans, form=FileFormat(labels={"Diagnose": "d"}))[0].rows[0]["tags"] == [0, 1]


def test_a_decimal_comma_in_ids_and_labels_and_never_in_texts(tmp_path: Path) -> None:
    study = make_study(labels=("0.5", "1.5"), unit="patient")
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\tpatient\n37,5\t0,5\t101,0\n38,5\t1,5\t102,0\n")
    form = FileFormat(decimal="comma")
    records, _ = load_records(path, study, rule="number", form=form)
    assert [row["text"] for row in records.rows] == ["37,5", "38,5"]
    assert records.units == ("101", "102")
    with pytest.raises(DataError, match="2 of 2 rows"):
        load_records(path, study, rule="number")


def test_every_fault_of_a_file_is_named_with_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "a", "label": "no", "patient": 1.5}, {"text": "b", "label": SECRET, "patient": "2"}]
    path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows * 4))
    with pytest.raises(DataError) as caught:
        load_records(path, STUDY)
    labels, ids = caught.value.message.split("\n  ")
    assert labels.endswith("found others in 4 of 8 rows: rows 2, 4, 6, 8 (lines 3, 5, 7, 9)")
    assert "in 4 of 8 rows (ids with a decimal, such as 101.0): rows 1, 3, 5, 7 (lines 2, 4, 6, 8)" in ids
    assert SECRET not in str(caught.value)
    pq.write_table(pa.Table.from_pylist([{"text": "a", "label": "x", "patient": "p"}] * 7), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"in 7 of 7 rows: rows 1, 2, 3, 4, 5 and 2 more \("):
        load_records(tmp_path / "a.parquet", STUDY)


# --- the site file ---------------------------------------------------------------------------------------


def site_file(folder: Path, text: str) -> Path:
    path = folder / "site.toml"
    path.write_text(f'name = "north"\n{text}', encoding="utf-8")
    return path


def test_a_site_says_how_its_files_are_written(tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_bytes(table(";").encode("latin-1"))
    (tmp_path / "old.csv").write_bytes(table("|").encode("latin-1"))
    (tmp_path / "test.csv").write_bytes(table().encode())
    site = load_site(
        site_file(
            tmp_path,
            """train = ["new.csv", "old.csv"]
test = ["test.csv"]
[format]
delimiter = "semicolon"
encoding = "latin-1"
[format.files."old.csv"]
delimiter = "pipe"
[format.files."test.csv"]
delimiter = "comma"
encoding = "utf-8"
""",
        )
    )
    digest = STUDY.digest
    assert [len(records) for records in load_files(site, STUDY)[0]] == [3, 3]
    assert len(load_files(site, STUDY, training=False)[0][0]) == 3
    assert STUDY.digest == digest
    (tmp_path / "new.csv").write_bytes(b"text;label;patient\na;x;1\n")
    (tmp_path / "old.csv").write_bytes(b'text|label|patient\n"a|x|1\n')
    with pytest.raises(DataError) as caught:
        load_files(site, STUDY)
    assert [str(tmp_path / name) in caught.value.message for name in ("new.csv", "old.csv")] == [True, True]
    loaded = load_format(tmp_path / "site.toml").of((tmp_path / "old.csv").resolve())
    assert loaded == FileFormat(delimiter="pipe", encoding="latin-1")


@pytest.mark.parametrize(
    ("format_", "says"),
    [
        ('[format]\ndelimiter = ";"', "format.delimiter: input should be 'comma', 'semicolon', 'tab' or 'pipe'"),
        ('[format]\nencoding = "utf8"', "format.encoding"),
        ("[format]\nquote = false", "format.quote: unknown key"),
        ("[format]\nlabels = { J = 1 }", "format.labels.J"),
        ('[format.files."b.csv"]\ndelimiter = "tab"', "format.files: expected files that `train` or `test` names"),
        ('format = "excel"', "format: "),
    ],
)
def test_settings_that_are_not_valid(tmp_path: Path, format_: str, says: str) -> None:
    with pytest.raises(StudyError) as caught:
        load_site(site_file(tmp_path, f'train = ["a.csv"]\n{format_}'))
    assert says in str(caught.value)


def test_a_site_file_without_settings_is_written_as_before(tmp_path: Path) -> None:
    site = load_site(site_file(tmp_path, 'train = ["a.csv"]\n'))
    assert "format" not in site.model_dump()
    assert site.form_of(site.train[0]) == FileFormat()


# --- counts and overlaps ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "declared"), [(1, 10), (14, 10), (15, 20), (99, 100), (104, 100), (1187, 1200), (98765, 99000)]
)
def test_a_count_to_declare_tells_no_person(units: int, declared: int) -> None:
    assert proposed_count(units) == declared
    assert tomllib.loads(f"declared_count = {proposed_count(units)}")


def part(tmp_path: Path, site: str, units: str, *, test: bool = False, file: str = "") -> Part:
    path = tmp_path / (file or f"{site}{test}")
    path.touch()
    records = make_records(list(units))
    rows = tuple({"text": f"{site} {unit}"} for unit in units)
    return part_of(site, [path], [type(records)(rows, records.units)], test=test)


def test_what_is_apart_gives_no_warning(tmp_path: Path) -> None:
    parts = [part(tmp_path, "a", "12"), part(tmp_path, "b", "34"), part(tmp_path, "a", "5", test=True)]
    assert overlaps(STUDY, parts) == []
    assert overlaps(make_study(), [part(tmp_path, "a", "1"), part(tmp_path, "b", "1")]) == []


def test_what_is_in_two_places_is_counted(tmp_path: Path) -> None:
    parts = [
        part(tmp_path, "a", "123", file="one"),
        part(tmp_path, "b", "234", file="one"),
        part(tmp_path, "a", "34", test=True),
        part(tmp_path, "b", "4", test=True, file="one"),
    ]
    found = "\n".join(overlaps(STUDY, parts))
    assert "a test file is also a training file, at b" in found
    assert "1 training files are at more than one site: a, b" in found
    assert "2 of 3 test records are equal to training records, at a, b" in found
    assert "2 values of patient are at more than one site: a, b" in found
    assert "2 values of patient are in training and in test files, at a, b" in found
    twice = part_of("a", [tmp_path / "one"] * 2, [make_records("1")] * 2)
    assert "a training file is named twice, at a" in overlaps(STUDY, [twice])[0]
    same = [part_of(site, [tmp_path / "one"], [make_records("12")]) for site in "ab"]
    assert "2 training records are at more than one site: a, b" in "\n".join(overlaps(STUDY, same))
