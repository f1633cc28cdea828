"""What a site's file becomes: exactness of reading, refusals, cleaning, and the split by unit."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.client.training.csvrows import csv_rows
from privet.client.training.data import DataReport, Records, concatenate, load_records, split_records
from privet.common.errors import DataError
from privet.common.study.sections import ROLES
from privet.common.study.study import Study

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data of ../shared/data is not on this machine")
SECRET = "Zanzibar-Quux"  # stands in files where a record's content would; must never be seen outside

Rows = Sequence[dict[str, Any]]


def make_study(
    kind: str = "text-classification",
    columns: dict[str, str] | None = None,
    unit: str | None = None,
    labels: Sequence[str] | None = None,
    unicode: str = "NFKC",
) -> Study:
    standard = {
        "text-classification": ("NA", "001", "x"),
        "token-classification": ("O", "B-d", "I-d"),
        "causal-lm": (),
        "preference": (),
    }
    return Study.parse(
        {
            "name": "study",
            "model": {"base": "base", "sha256": {"model.safetensors": "0" * 64}},
            "task": {"kind": kind, "labels": list(standard[kind] if labels is None else labels)},
            "data": {
                "columns": columns or {role: role for role in ROLES[kind]},
                "unit": unit,
                "unicode": unicode,
            },
            "lora": {"targets": ["query"]},
            "training": {"learning_rate": 0.1, "rounds": 1, "local_steps": 1, "sampling_rate": 0.1},
            "privacy": {"mode": "none"},
            "secure_aggregation": {"mode": "plain"},
        }
    )


def write(folder: Path, suffix: str, rows: Rows, name: str = "site") -> Path:
    path = folder / f"{name}{suffix}"
    if suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(path: Path, study: Study) -> str:
    """Return the text of the error that `path` ends in, having checked that it names the file only."""
    with pytest.raises(DataError) as caught:
        load_records(path, study)
    text = str(caught.value)
    assert path.name in text
    assert SECRET not in text
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


# --- reading ---------------------------------------------------------------------------------------------

FORMATS = (".csv", ".CSV", ".jsonl", ".json-lines", ".parquet")


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_strings_that_stand_in_the_file(tmp_path: Path, suffix: str) -> None:
    texts = ["NA", "None", "001", "1e5", "2020-01-01", "true", "nan", 'two "quoted", lines\nhere', "ﬁn é"]
    rows: Rows = [
        {"id": i, "patient": f"00{i}", "text": t, "label": ("NA", "001", "x")[i % 3]} for i, t in enumerate(texts)
    ]
    path = write(tmp_path, suffix if suffix != ".CSV" else ".csv", rows)
    path = path.rename(path.with_suffix(suffix))

    records, report = load_records(path, make_study(unit="patient", unicode="none"))

    assert [row["text"] for row in records.rows] == [" ".join(t.split()) for t in texts]
    assert [row["label"] for row in records.rows] == [i % 3 for i in range(len(texts))]
    assert records.units == tuple(f"00{i}" for i in range(len(texts)))
    assert report == DataReport(
        file=path.name,
        format={".csv": "csv", ".parquet": "parquet"}.get(suffix.lower(), "jsonl"),
        rows_read=9,
        kept=9,
        units=9,
        dropped={},
        labels={"NA": 3, "001": 3, "x": 3},
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_units_that_look_like_dates_are_not_rewritten(tmp_path: Path, suffix: str) -> None:
    units = ["2020-01-01", "2020-01-01T00:00:00", "2020-01-01 00:00:00"]
    rows: Rows = [{"text": "same", "label": "x", "visit": unit} for unit in units]
    records, _ = load_records(write(tmp_path, suffix, rows), make_study(unit="visit"))
    assert list(records.units) == units


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_labels_and_units_may_be_integers(tmp_path: Path, suffix: str) -> None:
    rows: Rows = [{"text": "a", "label": 1, "patient": 7}, {"text": "b", "label": 0, "patient": 10**15}]
    records, report = load_records(write(tmp_path, suffix, rows), make_study(labels=("0", "1"), unit="patient"))
    assert [row["label"] for row in records.rows] == [1, 0]
    assert records.units == ("7", "1000000000000000")
    assert report.labels == {"0": 1, "1": 1}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_tokens_and_tags(tmp_path: Path, suffix: str) -> None:
    rows: Rows = [
        {"tokens": ["ﬁbrosis", "", "hurts"], "tags": ["B-d", "I-d", "O"]},
        {"tokens": [], "tags": []},
        {"tokens": [" ", ""], "tags": ["O", "O"]},
        {"tokens": None, "tags": ["O"]},
    ]
    records, report = load_records(write(tmp_path, suffix, rows), make_study("token-classification"))
    assert records.rows == ({"tokens": ["fibrosis", "", "hurts"], "tags": [1, 2, 0]},)
    assert report.dropped == {"missing value": 1, "empty text": 2}
    assert report.labels == {"O": 1, "B-d": 1, "I-d": 1}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_prompts_keep_their_inner_lines(tmp_path: Path, suffix: str) -> None:
    rows: Rows = [{"prompt": " what  is\r\n\nit? \n", "answer": "\tthis\n"}, {"prompt": "?", "answer": " \n"}]
    records, report = load_records(write(tmp_path, suffix, rows), make_study("causal-lm"))
    assert records.rows == ({"prompt": "what  is\n\nit?", "answer": "this"},)
    assert report.dropped == {"empty text": 1}
    assert report.labels == {}


@pytest.mark.parametrize("name", ["study[1]/x*y", "a::b/x", "http://host/x", "x?{1,2}", ".hidden/~x"])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_path_is_never_a_pattern(tmp_path: Path, name: str, suffix: str) -> None:
    folder = (tmp_path / name).parent
    folder.mkdir(parents=True, exist_ok=True)
    stem = Path(name).name
    write(folder, suffix, [{"text": "wrong file", "label": "x"}], name="x-and-y")
    path = write(folder, suffix, [{"text": "right file", "label": "x"}], name=stem)
    records, _ = load_records(path, make_study())
    assert records.rows == ({"text": "right file", "label": 2},)


def test_relative_paths_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ".csv", [{"text": "a", "label": "x"}])
    monkeypatch.chdir(tmp_path)
    assert len(load_records(Path("site.csv"), make_study())[0]) == 1


def test_csv_of_spreadsheets(tmp_path: Path) -> None:
    path = tmp_path / "site.csv"
    path.write_bytes(b'\xef\xbb\xbftext,label,extra,extra\r\n"a,\r\nb",x,1,s\r\n\r\nc,x\r\nd,\r\n')
    records, report = load_records(path, make_study())
    assert records.rows == ({"text": "a, b", "label": 2}, {"text": "c", "label": 2})
    assert report.dropped == {"missing value": 1}


def test_csv_holds_documents_of_any_length(tmp_path: Path) -> None:
    path = write(tmp_path, ".csv", [{"text": "word " * 60_000, "label": "x"}])
    assert len(load_records(path, make_study())[0].rows[0]["text"]) == 299_999


def test_columns_outside_the_contract_may_hold_anything(tmp_path: Path) -> None:
    path = tmp_path / "site.csv"
    mixed = "".join(f"t{i},x,{i if i % 2 else 'word'}\n" for i in range(12_000))
    path.write_text("text,label,other\n" + mixed)
    assert len(load_records(path, make_study())[0]) == 12_000


def test_parquet_written_by_datasets_and_with_categories(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": pa.array(["a", "b"], pa.large_string()),
            "label": pa.array(["x", "NA"]).dictionary_encode(),
            "image": pa.array([b"0", b"1"]),
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})})
    path = tmp_path / "site.parquet"
    pq.write_table(table, path)
    assert [row["label"] for row in load_records(path, make_study())[0].rows] == [2, 0]


def test_nothing_is_left_behind_printed_or_sent(tmp_path: Path) -> None:
    home, temporary, data = (tmp_path / name for name in ("home", "tmp", "data"))
    for folder in (home, temporary, data):
        folder.mkdir()
    rows: Rows = [{"text": f"{SECRET} {i}", "label": "x"} for i in range(50)]
    for suffix in (".csv", ".jsonl", ".parquet"):
        write(data, suffix, rows)
    (data / "broken.csv").write_text(f"text,label\na,x\n{SECRET},x,{SECRET}\n")
    study = data / "study.json"
    study.write_text(json.dumps(make_study().document()))
    program = """
        import json, os, sys
        from pathlib import Path
        def no_network(event, arguments):
            if event in ("socket.connect", "socket.getaddrinfo"):
                raise RuntimeError(event)
        sys.addaudithook(no_network)
        from privet.client.training.data import load_records
        from privet.common.errors import DataError
        from privet.common.study.study import Study
        data = Path(sys.argv[1])
        study = Study.parse(json.loads((data / "study.json").read_text()))
        import pyarrow.parquet
        threads = set(os.listdir("/proc/self/task"))
        for name in ("site.csv", "site.jsonl", "site.parquet"):
            assert len(load_records(data / name, study)[0]) == 50
        # A thread that is left could be starting when the process ends, which aborts it.
        assert set(os.listdir("/proc/self/task")) <= threads
        try:
            load_records(data / "broken.csv", study)
        except DataError:
            sys.exit(7)
        """
    before = sorted(data.iterdir())
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(data)],
        env=environment | {"HOME": str(home), "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 7)
    assert [*home.rglob("*"), *temporary.rglob("*")] == []
    assert sorted(data.iterdir()) == before


# --- the contract ----------------------------------------------------------------------------------------


def test_files_that_are_not_there_or_not_known(tmp_path: Path) -> None:
    assert "it does not exist" in refusal(tmp_path / "absent.csv", make_study())
    (tmp_path / "folder.csv").mkdir()
    assert "folder" in refusal(tmp_path / "folder.csv", make_study())
    for name in ("site.xlsx", "site", "site.parquet.gz", "csv"):
        (tmp_path / name).write_text(SECRET)
        assert ".csv, .tsv, .jsonl, .json-lines, .ndjson, .json, .parquet" in refusal(tmp_path / name, make_study())


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_corrupt_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"site{suffix}"
    path.write_bytes(b"")
    assert "0 bytes" in refusal(path, make_study())
    path.write_bytes(f"text,label\n{SECRET}\xe9,x\n".encode("latin-1"))
    assert "is not" in refusal(path, make_study())
    whole = write(tmp_path, suffix, [{"text": f'{SECRET} "{i}"', "label": "x"} for i in range(99)])
    whole.write_bytes(whole.read_bytes()[:-10])
    if suffix != ".csv":  # a CSV file that ends early outside quotes is a CSV file
        assert "is not" in refusal(path, make_study())


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_fault_of_the_disk_is_not_blamed_on_the_file(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, suffix, [{"text": SECRET, "label": "x"}])

    def broken(*_: object, **__: object) -> object:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", broken)
    monkeypatch.setattr(Path, "read_bytes", broken)
    assert "cannot be read (Input/output error)" in refusal(path, make_study())


@pytest.mark.parametrize(
    "body",
    [
        f"{SECRET},x,{SECRET}\na,x\n",  # long first row: would shift or lose values
        f"a,x\n{SECRET},x,{SECRET}\n",
        f'a,x\n"{SECRET},x\n',  # a quote that never closes swallows the rest
    ],
)
def test_csv_rows_that_do_not_fit_their_header(tmp_path: Path, body: str) -> None:
    path = tmp_path / "site.csv"
    path.write_text("text,label\n" + body)
    assert "not a readable CSV" in refusal(path, make_study())


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (f'a,x\n"{SECRET} 5" wide,x\n', "line 3: text after a closing quote"),
        (f'"{SECRET}\nb\n"c,x\n', "line 4: text after a closing quote"),
        (f'"said \\"{SECRET}\\" now",x\n', "line 2: text after a closing quote"),
        (f'5" {SECRET},x\n', "line 2: a quote inside a value that does not begin with one"),
        (f'"a\r\nb",x\n"{SECRET},x\nb,x\n', "line 4: a quote that is not closed"),
        (f"a,x\n{SECRET},x,\n", "line 3: expected at most 2 values, found 3"),
    ],
)
def test_malformed_quotes_never_move_text_between_records(tmp_path: Path, body: str, fault: str) -> None:
    path = tmp_path / "site.csv"
    path.write_text("text,label\n" + body, newline="")
    assert f"site.csv is not a readable CSV file: {fault}" in refusal(path, make_study())


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=2), max_size=8))
def test_what_the_standard_library_writes_is_read_back(rows: list[list[str]]) -> None:
    file = io.StringIO(newline="")
    csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    assert [row for _, row in csv_rows(Path("x"), file.getvalue())] == rows


@pytest.mark.parametrize(
    "line", [SECRET, f'["{SECRET}"]', f'{{"text": "{SECRET}"', "[" * 100_000, f'"{SECRET}"', "null"]
)
def test_json_lines_names_the_line_that_is_not_one(tmp_path: Path, line: str) -> None:
    path = tmp_path / "site.jsonl"
    path.write_text('\ufeff{"text": "a", "label": "x"}\n\n' + line + "\n")
    assert "line 3" in refusal(path, make_study())


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_missing_columns_are_named_and_the_others_listed(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix, [{"text": SECRET, "diagnosis": "x"}])
    message = refusal(path, make_study(unit="patient"))
    assert "expected the columns label, patient, found only text, diagnosis" in message
    assert "did you mean" not in message
    path = write(tmp_path, suffix, [{"text": SECRET, "Labels": "x"}])
    assert "; did you mean Labels for label?" in refusal(path, make_study())


def test_a_csv_file_without_header_does_not_show_its_first_record(tmp_path: Path) -> None:
    path = tmp_path / "site.csv"
    path.write_text(f"{SECRET},x\nother,x\n")
    assert "first line" in refusal(path, make_study())


def test_many_columns_are_not_all_listed(tmp_path: Path) -> None:
    names = [*(f"note {i}" for i in range(10)), *(f"c{i}" * 90 for i in range(15))]
    message = refusal(write(tmp_path, ".jsonl", [dict.fromkeys(names, 1)]), make_study())
    assert "and 5 more" in message
    assert len(message) < 2500


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_needed_column_that_stands_twice(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"site{suffix}"
    if suffix == ".csv":
        path.write_text(f"text,text,label\n{SECRET},b,x\n")
    else:
        pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 3, names=["text", "text", "label"]), path)
    assert "several columns named text" in refusal(path, make_study())


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("kind", "role", "value"),
    [
        ("text-classification", "text", 5),
        ("text-classification", "text", [SECRET]),
        ("text-classification", "label", 1.0),
        ("text-classification", "label", True),
        ("text-classification", "unit", 1.5),
        ("text-classification", "unit", [SECRET]),
        ("causal-lm", "prompt", {"role": SECRET}),
        ("causal-lm", "answer", False),
        ("token-classification", "tokens", SECRET),
        ("token-classification", "tokens", [None, "a"]),
        ("token-classification", "tags", [0.0, 1.0]),
        ("token-classification", "tags", [True, False]),
    ],
)
def test_wrong_types(tmp_path: Path, suffix: str, kind: str, role: str, value: object) -> None:
    good: dict[str, object] = {
        "text": "t", "label": "x", "unit": "u", "prompt": "p", "answer": "a",
        "tokens": ["a", "b"], "tags": ["O", "O"],
    }  # fmt: skip
    rows: Rows = [good | {role: value}, good | {role: value}]
    message = refusal(write(tmp_path, suffix, rows), make_study(kind, unit="unit"))
    assert f"in the column {role}, found other types in" in message
    assert "2 of 2 rows" in message


def test_wrong_types_in_some_rows_of_json_lines_are_counted(tmp_path: Path) -> None:
    rows: Rows = [{"text": "a", "label": "x"}, {"text": 3, "label": "x"}, {"text": None, "label": "x"}]
    assert "1 of 3 rows" in refusal(write(tmp_path, ".jsonl", rows), make_study())


def test_tokens_and_tags_of_different_lengths(tmp_path: Path) -> None:
    rows: Rows = [{"tokens": ["a", "b"], "tags": ["O"]}, {"tokens": ["a"], "tags": ["O"]}]
    message = refusal(write(tmp_path, ".jsonl", rows), make_study("token-classification"))
    assert "differ in length in 1 of 2 rows" in message


def test_csv_cannot_hold_lists(tmp_path: Path) -> None:
    path = write(tmp_path, ".csv", [{"tokens": SECRET, "tags": "O"}])
    message = refusal(path, make_study("token-classification"))
    assert "JSON Lines" in message
    assert "Parquet" in message


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_unknown_labels_are_counted_not_shown(tmp_path: Path, suffix: str) -> None:
    rows: Rows = [{"text": "a", "label": label} for label in ("x", SECRET, SECRET, "X", " x", "NA")]
    message = refusal(write(tmp_path, suffix, rows), make_study())
    assert "4 of 6 rows" in message
    assert "NA, 001, x" in message


def test_unknown_tags_are_counted_not_shown(tmp_path: Path) -> None:
    rows: Rows = [{"tokens": ["a", "b"], "tags": ["O", SECRET]}, {"tokens": ["a"], "tags": ["O"]}]
    message = refusal(write(tmp_path, ".jsonl", rows), make_study("token-classification"))
    assert "1 of 2 rows" in message
    assert "O, B-d, I-d" in message


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("unit", [None, "", "  "])
def test_a_row_without_its_unit_never_trains(tmp_path: Path, suffix: str, unit: str | None) -> None:
    rows: Rows = [{"text": "a", "label": "x", "patient": "p"}, {"text": "b", "label": "x", "patient": unit}]
    path = write(tmp_path, suffix, rows)
    records, report = load_records(path, make_study(unit="patient"))
    assert records.units == ("p",)
    assert report.dropped == {"no unit": 1}
    assert len(load_records(path, make_study(unit="patient"), training=False)[0]) == 2
    only = write(tmp_path, suffix, rows[1:])
    assert "no unit: 1" in refusal(only, make_study(unit="patient"))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_no_rows_left(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix, [{"text": " ", "label": "x"}, {"text": "\n", "label": "x"}])
    assert "empty text: 2" in refusal(path, make_study())


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_no_rows_at_all(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"site{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}), path)
    else:
        path.write_text("text,label\n\n" if suffix == ".csv" else "\n\n")
    assert "0 rows read" in refusal(path, make_study())


# --- cleaning --------------------------------------------------------------------------------------------


def test_cleaning_and_what_it_drops(tmp_path: Path) -> None:
    rows: Rows = [
        {"text": "  ﬁ\t\n one ", "label": "x", "patient": "p"},
        {"text": "fi one", "label": "x", "patient": "p"},  # the same after cleaning
        {"text": "fi one", "label": "x", "patient": "q"},  # somebody else's
        {"text": "fi one", "label": "NA", "patient": "p"},  # another label
        {"text": None, "label": "x", "patient": "p"},
        {"text": "a", "label": None, "patient": "p"},
        {"text": "a", "label": "", "patient": "p"},
        {"text": " \u00a0", "label": "x", "patient": "r"},
        {"patient": "s", "label": "x"},
    ]
    records, report = load_records(write(tmp_path, ".jsonl", rows), make_study(unit="patient"))
    assert [row["text"] for row in records.rows] == ["fi one"] * 3
    assert records.units == ("p", "q", "p")
    assert (report.rows_read, report.kept, report.units) == (9, 3, 2)
    assert report.dropped == {"missing value": 4, "empty text": 1, "exact duplicate": 1}
    assert report.labels == {"NA": 1, "001": 0, "x": 2}
    assert report.lines() == [
        f"{tmp_path}/site.jsonl (jsonl): 3 of 9 rows kept, units: 2",
        "  dropped, missing value: 4: rows 5, 6, 7, 9 (lines 5, 6, 7, 9)",
        "  dropped, empty text: 1: row 8 (line 8)",
        "  dropped, exact duplicate: 1: row 2 (line 2)",
        "  NA   1",
        "  001  0",
        "  x    2",
    ]


def test_without_a_unit_column_rows_are_named_by_their_content(tmp_path: Path) -> None:
    rows: Rows = [{"text": text, "label": "x"} for text in ("a", "", "a", "b")]
    path = write(tmp_path, ".jsonl", rows)
    records, report = load_records(path, make_study())
    assert len(set(records.units)) == 2
    assert report.dropped == {"empty text": 1, "exact duplicate": 1}
    assert len(load_records(path, make_study(), training=False)[0]) == 3
    # Removing a row renames no other: the split of the rest stays what it was.
    fewer, _ = load_records(write(tmp_path, ".jsonl", rows[3:]), make_study())
    assert fewer.units == records.units[1:]


@pytest.mark.parametrize(("form", "text"), [("NFC", "ﬁ é"), ("NFKC", "fi é"), ("none", "ﬁ e\u0301")])
def test_unicode_forms(tmp_path: Path, form: str, text: str) -> None:
    path = write(tmp_path, ".jsonl", [{"text": "ﬁ e\u0301", "label": "x"}])
    records, _ = load_records(path, make_study(unicode=form))
    assert records.rows[0]["text"] == text


def test_one_patient_spelt_two_ways_is_one_unit(tmp_path: Path) -> None:
    rows: Rows = [{"text": str(i), "label": "x", "p": p} for i, p in enumerate(("Zoé", "Zoe\u0301 ", "zoé"))]
    records, _ = load_records(write(tmp_path, ".jsonl", rows), make_study(unit="p"))
    assert records.by_unit() == {"Zoé": [0, 1], "zoé": [2]}


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "site.jsonl"
    path.write_text('{"text": "a\\ud800b", "label": "x", "p": "\\ud800"}\n')
    records, _ = load_records(path, make_study(unit="p"))
    assert (records.rows[0]["text"], records.units) == ("a?b", ("?",))
    split_records(records, 0.5, b"key")


# --- records and splits ----------------------------------------------------------------------------------


def make_records(units: Sequence[str]) -> Records:
    return Records(tuple({"text": str(i), "label": 0} for i in range(len(units))), tuple(units))


def test_records_select_and_group() -> None:
    records = make_records(["b", "a", "b"])
    assert records.by_unit() == {"b": [0, 2], "a": [1]}
    chosen = records.select([2, 1])
    assert [row["text"] for row in chosen.rows] == ["2", "1"]
    assert chosen.units == ("b", "a")
    assert len(chosen) == 2
    with pytest.raises(DataError, match="3 rows and 1 units"):
        Records(records.rows, ("a",))


def test_a_unit_in_two_files_is_one_unit() -> None:
    pooled = concatenate([make_records(["a", "b"]), make_records([]), make_records(["a"])])
    assert pooled.by_unit() == {"a": [0, 2], "b": [1]}
    assert [row["text"] for row in pooled.rows] == ["0", "1", "0"]
    assert len(concatenate([])) == 0


unit_lists = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=30)
fractions = st.floats(0, 1)
keys = st.binary(min_size=1, max_size=40)


@given(units=unit_lists, added=unit_lists, fraction=fractions, key=keys)
def test_adding_units_never_moves_another(units: list[str], added: list[str], fraction: float, key: bytes) -> None:
    """Neighbouring data sets: their parts differ in the added units alone, whatever comes in between."""
    old = set(units)
    both = [unit for pair in zip(units, added, strict=False) for unit in pair]
    both += units[len(added) :] + added[len(units) :]
    before = split_records(make_records(units), fraction, key)
    after = split_records(make_records(both), fraction, key)
    for part_before, part_after in zip(before, after, strict=True):
        assert set(part_before.units) == set(part_after.units) & old


@given(units=unit_lists, fraction=fractions, key=keys)
def test_a_split_keeps_every_row_once_units_whole_and_file_order(units: list[str], fraction: float, key: bytes) -> None:
    records = make_records(units)
    train, validation = split_records(records, fraction, key)
    assert not set(train.units) & set(validation.units)
    for part in (train, validation):
        places = [int(row["text"]) for row in part.rows]
        assert places == sorted(places)
        assert part.units == tuple(units[place] for place in places)
    assert len(train) + len(validation) == len(records)


@given(units=unit_lists, low=fractions, high=fractions, key=keys)
def test_a_larger_fraction_only_adds_to_validation(units: list[str], low: float, high: float, key: bytes) -> None:
    low, high = sorted((low, high))
    small, large = (set(split_records(make_records(units), f, key)[1].units) for f in (low, high))
    assert small <= large


def test_split_known_answer_fraction_and_ends() -> None:
    # First 64 bits of HMAC-SHA256("key", "The quick brown fox jumps over the lazy dog"), a published vector:
    # f7bc83f430538424..., as a share of 2^64: 0.96772...
    fox = make_records(["The quick brown fox jumps over the lazy dog"])
    edge = 0xF7BC83F430538424 / 2**64
    assert len(split_records(fox, edge - 1e-9, b"key")[1]) == 0
    assert len(split_records(fox, edge + 1e-9, b"key")[1]) == 1

    many = make_records([f"patient-{i}" for i in range(20_000)])
    drawn = len(split_records(many, 0.1, b"key")[1])
    assert abs(drawn - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5
    other = set(split_records(many, 0.1, b"another key")[1].units)
    assert len(other & set(split_records(many, 0.1, b"key")[1].units)) < 400  # 200 expected if independent
    assert len(split_records(many, 0.0, b"key")[1]) == 0
    assert len(split_records(many, 1.0, b"key")[0]) == 0


@pytest.mark.parametrize(("fraction", "key"), [(-0.1, b"k"), (1.1, b"k"), (float("nan"), b"k"), (0.5, b"")])
def test_splits_that_cannot_be(fraction: float, key: bytes) -> None:
    with pytest.raises(DataError):
        split_records(make_records(["a"]), fraction, key)


# --- real files ------------------------------------------------------------------------------------------

QUESTION_TYPES = (
    "causes", "considerations", "exams and tests", "frequency", "genetic changes", "information",
    "inheritance", "outlook", "prevention", "research", "susceptibility", "symptoms", "treatment",
)  # fmt: skip


def stated_counts() -> dict[str, tuple[str, int, int]]:
    """Return format, train rows and test rows of each MedQuAD site, as the data's README states them."""
    counts = {}
    for line in (SHARED / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[2].isdigit():
            counts[cells[0]] = (cells[1], int(cells[2]), int(cells[3]))
    return counts


@real_data
@pytest.mark.parametrize("kind", ["text-classification", "causal-lm"])
def test_all_nine_medquad_sites(kind: str) -> None:
    columns = {"text-classification": ("answer", "question_type"), "causal-lm": ("question", "answer")}
    study = make_study(
        kind,
        columns=dict(zip(ROLES[kind], columns[kind], strict=True)),
        unit=None,
        labels=QUESTION_TYPES if kind == "text-classification" else (),
    )
    sites = stated_counts()
    assert len(sites) == 9
    for site, (format_, train, test) in sites.items():
        for name, count in (("train", train), ("test", test)):
            records, report = load_records(SHARED / "medquad" / site / f"{name}.{format_}", study)
            assert report.rows_read == count
            assert report.kept == len(records) == count - sum(report.dropped.values())
            assert sum(report.labels.values()) == (len(records) if report.labels else 0)
            assert report.kept > 0.85 * count


@real_data
def test_medquad_units_are_documents_and_rows_without_one_stay_out() -> None:
    study = make_study(columns={"text": "answer", "label": "question_type"}, unit="document", labels=QUESTION_TYPES)
    _, report = load_records(SHARED / "medquad" / "GHR" / "train.parquet", study)
    assert (report.rows_read, report.units, report.dropped) == (4555, 911, {})
    # Five rows of this site name no document.
    _, report = load_records(SHARED / "medquad" / "CDC" / "train.csv", study)
    assert (report.rows_read, report.dropped["no unit"]) == (242, 5)


@real_data
def test_4500_rows_take_well_under_a_second() -> None:
    study = make_study("causal-lm", {"prompt": "question", "answer": "answer"}, unit="document")
    path = SHARED / "medquad" / "GARD" / "train.parquet"
    load_records(path, study)  # imports pyarrow
    start = time.process_time()
    load_records(path, study)
    assert time.process_time() - start < 1


@real_data
@pytest.mark.parametrize(("part", "rows"), [("train", 5424), ("dev", 923), ("test", 940)])
def test_ncbi_disease(part: str, rows: int) -> None:
    study = make_study("token-classification", labels=("O", "B-Disease", "I-Disease"))
    records, report = load_records(SHARED / "ncbi_disease" / f"{part}.jsonl", study)
    assert report.rows_read == rows
    assert report.dropped.keys() <= {"exact duplicate"}
    assert report.kept == rows - report.dropped.get("exact duplicate", 0)
    assert sum(report.labels.values()) == sum(len(row["tokens"]) for row in records.rows)
