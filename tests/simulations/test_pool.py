"""A pool of records: it is read whole, dealt out without loss, and written as it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from privet.common.errors import DataError, StudyError
from privet.common.study.study import Study
from privet.simulations.data.pool import Rows, Table, deal_out, read_pool, require_file, write_rows
from privet.simulations.data.scenario import Partition
from tests.support import tiny
from tests.support.tiny import class_rows, tiny_study


def section(split: str = "iid", **more: Any) -> Partition:
    return Partition.model_validate({"split": split, **({} if split == "column" else {"sites": 3}), **more})


def table(rows: Sequence[Mapping[str, Any]], *columns: str) -> Table:
    return {name: [row[name] for row in rows] for name in columns}


@pytest.fixture
def study(bert: Path) -> Study:
    return tiny_study(bert, **{"data.unit": "patient"})


def dealt(study: Study, split: Partition, train: Table, test: Table) -> tuple[dict[str, Rows], list[str]]:
    lines: list[str] = []
    return deal_out(study, split, train, test, lines.append), lines


# Reading


def test_all_files_of_a_part_are_one_table_with_the_columns_that_are_needed(study: Study, tmp_path: Path) -> None:
    rows = [{**row, "ward": "w", "secret": "s"} for row in class_rows(9)]
    tiny.write_rows(tmp_path / "a.jsonl", rows[:6])
    tiny.write_rows(tmp_path / "b.jsonl", rows[6:])
    split = section("column", column="ward", train=["a.jsonl", "b.jsonl"])
    found = read_pool(study, split, "files", tmp_path, "train")
    assert {name: list(values) for name, values in found.items()} == table(rows, "text", "label", "patient", "ward")
    assert read_pool(study, split, "files", tmp_path, "test") == {}


def test_a_file_or_column_that_is_missing_is_named(study: Study, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"there is no file .*a\.jsonl"):
        read_pool(study, section(train=["a.jsonl"]), "files", tmp_path, "train")
    tiny.write_rows(tmp_path / "a.jsonl", class_rows(3))
    with pytest.raises(DataError, match="ward"):
        read_pool(study, section("column", column="ward", train=["a.jsonl"]), "files", tmp_path, "train")
    with pytest.raises(StudyError, match="somewhere: there is no file"):
        require_file(tmp_path, "somewhere")  # a directory is no file
    assert require_file(tmp_path / "a.jsonl", "somewhere") == tmp_path / "a.jsonl"


def test_a_split_by_labels_needs_a_task_with_labels(llama: Path, tmp_path: Path) -> None:
    study = tiny_study(llama, **{"task.kind": "causal-lm"})
    with pytest.raises(StudyError, match="records of the task causal-lm have no labels"):
        read_pool(study, section("dirichlet", concentration=1.0), "files", tmp_path, "train")


def test_generated_notes_are_a_pool_of_all_styles_and_lack_other_columns(bert: Path, tmp_path: Path) -> None:
    columns = {"data.columns": {"text": "note", "label": "specialty"}, "data.unit": "patient"}
    study = tiny_study(bert, **columns)
    split = section("column", column="style", patients=40)
    found = read_pool(study, split, "notes", tmp_path, "train")
    assert set(found) == {"note", "specialty", "patient", "style"}
    assert len(set(found["patient"])) == 40
    assert len(set(found["style"])) == 4
    assert found == read_pool(study, split, "notes", tmp_path, "train")
    assert not set(found["patient"]) & set(read_pool(study, split, "notes", tmp_path, "test")["patient"])
    with pytest.raises(StudyError, match="generated notes have no column ward"):
        read_pool(study, section("column", column="ward"), "notes", tmp_path, "train")


# Dealing out


@pytest.mark.parametrize(
    "split",
    [section(), section("dirichlet", concentration=0.5), section("quantity", exponent=1.0)],
    ids=lambda split: split.split,
)
def test_every_row_is_at_one_site_and_units_stay_whole(split: Partition, study: Study) -> None:
    train, test = (table(class_rows(count, seed), "text", "label", "patient") for count, seed in ((90, 1), (30, 2)))
    found, lines = dealt(study, split, train, test)
    assert list(found) == ["site-001", "site-002", "site-003"]
    assert lines == []
    for part, pool in enumerate((train, test)):
        rows = [row for site in found.values() for row in site[part]]
        assert sorted(rows) == list(range(len(pool["text"])))
        homes: dict[str, set[str]] = {}
        for name, site in found.items():
            for row in site[part]:
                homes.setdefault(pool["patient"][row], set()).add(name)
        assert all(len(names) == 1 for names in homes.values())
    assert found == dealt(study, split, train, test)[0]
    assert all(len({train["patient"][row] for row in site[0]}) >= split.least_units for site in found.values())


def test_without_a_column_of_units_equal_rows_are_one_unit(bert: Path) -> None:
    rows = class_rows(30) * 2
    found, _ = dealt(tiny_study(bert), section(), table(rows, "text", "label"), {})
    for train, test in found.values():
        assert {row + 30 for row in train if row < 30} == {row for row in train if row >= 30}
        assert list(test) == []


def test_values_of_too_few_units_are_left_out_and_a_line_says_so(study: Study) -> None:
    rows = [
        {**row, "ward": "rare" if index >= 87 else "ab"[index // 3 % 2]}  # the last patient
        for index, row in enumerate(class_rows(90))
    ]
    pool = table(rows, "text", "label", "patient", "ward")
    tests = table(
        [{**row, "ward": "aab"[index // 3]} for index, row in enumerate(class_rows(9, 5))],
        "text",
        "label",
        "patient",
        "ward",
    )
    found, lines = dealt(study, section("column", column="ward"), pool, tests)
    assert sorted(found) == ["a", "b"]
    assert {row for site in found.values() for row in site[0]} == set(range(87))
    assert lines == ["partition: left out 3 rows, whose value of column ward has fewer than 4 units"]
    assert (list(found["a"][1]), list(found["b"][1])) == (list(range(6)), [6, 7, 8])


def test_too_few_units_are_refused(study: Study) -> None:
    with pytest.raises(StudyError, match="need 12 units, the pool has 3"):
        dealt(study, section(), table(class_rows(9), "text", "label", "patient"), {})


# Writing


def test_rows_are_written_as_they_are_and_no_rows_make_no_file(tmp_path: Path) -> None:
    rows = [{"text": "é\n“x”", "label": 1, "patient": None}, {"text": "b", "label": 2, "patient": "p"}]
    pool = table(rows, "text", "label", "patient")
    assert write_rows(tmp_path / "none.jsonl", pool, []) == ()
    assert not (tmp_path / "none.jsonl").exists()
    (file,) = write_rows(tmp_path / "some.jsonl", pool, [1, 0])
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]] == rows[::-1]
