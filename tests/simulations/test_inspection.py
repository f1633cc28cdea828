"""What `privet simulate` would refuse, `privet check` names in the same words, all of it at once."""

from __future__ import annotations

import gzip
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from privet.common.errors import PrivetError, StudyError
from privet.simulations.data.federation import load_plan, plan_of, write_federation, write_pooled_site
from privet.simulations.runs.inspection import check_simulation
from privet.simulations.runs.simulate import prepare, run_simulation
from privet.simulations.runs.toml import absolute_paths, to_toml
from privet.simulations.sites import load_simulated
from tests.conftest import Run
from tests.simulations.test_simulate import SITES, study_file
from tests.support.tiny import class_rows, private

Change = Callable[[dict[str, Any], Path], None]


def changed(folder: Path, base: Path, change: Change, overrides: dict[str, Any] | None = None) -> Path:
    """Write a study over three tiny sites, change its values or its files, and return its path."""
    path = study_file(folder, base, overrides)
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    change(document, folder)
    path.write_text(to_toml(document), encoding="utf-8")
    return path


def sites(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["simulation"]["sites"]
    return found


def written(name: str, text: str) -> Change:
    def write(document: dict[str, Any], folder: Path) -> None:
        (folder / name).write_text(text)

    return write


def also(*changes: Change) -> Change:
    def all_of_them(document: dict[str, Any], folder: Path) -> None:
        for change in changes:
            change(document, folder)

    return all_of_them


def without_tests(document: dict[str, Any], folder: Path) -> None:
    for site in sites(document).values():
        del site["test"]


def semicolons(document: dict[str, Any], folder: Path) -> None:
    (folder / "odd.csv").write_text("text;label\nhello;x\n")
    sites(document)[SITES[0]]["train"] = ["odd.csv"]


def bomb(document: dict[str, Any], folder: Path) -> None:
    (folder / "odd.csv.gz").write_bytes(gzip.compress(b"text,label\n")[:-4])
    sites(document)[SITES[1]]["train"] = ["odd.csv.gz"]


def ids(document: dict[str, Any], folder: Path) -> None:
    document["data"]["unit"] = "patient"
    document["privacy"] = {**document["privacy"], "unit": "patient"}
    for name in SITES:
        rows = [{**row, "patient": ["a-1", "A1"][number % 2]} for number, row in enumerate(class_rows(8))]
        for file in (f"{name}.jsonl", f"{name}-test.jsonl"):
            (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def held_out(document: dict[str, Any], folder: Path) -> None:
    without_tests(document, folder)
    document["simulation"]["test_fraction"] = 0.25


def pool_of(*files: str) -> Change:
    def change(document: dict[str, Any], folder: Path) -> None:
        del document["simulation"]["sites"]
        document["simulation"] |= {"test_fraction": 0.25, "partition": {"split": "iid", "sites": 3, "train": [*files]}}

    return change


def setting(table: str, name: str, value: Any) -> Change:
    return lambda document, folder: document.setdefault(table, {}).update({name: value})


def pool(file: str, split: str, **more: Any) -> Change:
    def change(document: dict[str, Any], folder: Path) -> None:
        del document["simulation"]["sites"]
        document["simulation"]["partition"] = {"split": split, "train": [file], "test": [file], **more}
        document["simulation"]["partition"] |= {} if split == "column" else {"sites": 3}

    return change


REFUSED: dict[str, tuple[Change, tuple[str, ...]]] = {
    "a missing file": (lambda document, folder: (folder / f"{SITES[0]}.jsonl").unlink(), ("there is no file",)),
    "no column": (written(f"{SITES[0]}.jsonl", '{"text": "a"}\n'), ("site alpha", "expected the columns label")),
    "a label": (written(f"{SITES[1]}-test.jsonl", '{"text": "a", "label": "?"}\n'), ("site beta", "row 1 (line 1)")),
    "no line of JSON": (written(f"{SITES[2]}.jsonl", "secret\n"), ("site gamma", "line 1 is not one JSON object")),
    "no record": (written(f"{SITES[2]}.jsonl", '{"text": " ", "label": "x"}\n'), ("site gamma",)),
    "an empty file": (written(f"{SITES[2]}.jsonl", ""), ("site gamma", "0 bytes")),
    "a separator": (semicolons, ("site alpha", "separated by commas")),
    "half a file": (bomb, ("site beta", "gzip")),
    "no test": (without_tests, ("no site has test records",)),
    "spellings of ids": (ids, ("spellings that may name only 1 patients",)),
    "too few sites": (setting("cohort", "min_sites", 4), ("cohort.min_sites: the study demands 4 sites",)),
    "other sites": (setting("cohort", "sites", ["alpha", "delta", "epsilon"]), ("cohort.sites: the study demands",)),
    "too many units": (setting("aggregation", "largest_count", 8), ("aggregation.largest_count",)),
    "a delta": (setting("privacy", "delta", 0.09), ("privacy.delta: expected a value below 1/n",)),
    "an epsilon": (setting("privacy", "epsilon", 0.001), ("privacy.epsilon: 0.001 at delta",)),
    "a pool": (pool("absent.jsonl", "iid"), ("simulation.partition: there is no file",)),
    "a pool's column": (pool(f"{SITES[0]}.jsonl", "column", column="ward"), ("expected the columns ward",)),
    "too many corrupt sites": (setting("secure_aggregation", "corrupt", 2), ("secure_aggregation",)),
    "dropout": (setting("training", "dropout", 0.1), ("training.dropout: expected 0 in a private study",)),
    "a fraction": (setting("data", "validation_fraction", 0.999), ("data.validation_fraction",)),
    "a format": (
        lambda document, folder: sites(document)[SITES[0]].update(format={"files": {"no.csv": {"delimiter": "tab"}}}),
        ("format.files: expected files that `train` or `test` names",),
    ),
    "a label of a file that is divided": (
        also(held_out, setting("task", "labels", ["x", "y"])),
        (f"site {SITES[0]}: ", f"{SITES[0]}.jsonl: expected the labels x, y", f"{SITES[2]}.jsonl: expected the labels"),
    ),
    "a label of a pool that is dealt out": (
        also(pool_of(f"{SITES[0]}.jsonl", f"{SITES[1]}.jsonl"), setting("task", "labels", ["x", "y"])),
        (f"{SITES[0]}.jsonl: expected the labels x, y", f"{SITES[1]}.jsonl: expected the labels"),
    ),
    "everything": (
        also(
            lambda document, folder: (folder / f"{SITES[0]}.jsonl").unlink(),
            written(f"{SITES[1]}-test.jsonl", '{"text": "a", "label": "?"}\n'),
            written(f"{SITES[2]}.jsonl", "secret\n"),
            setting("cohort", "min_sites", 4),
        ),
        ("there is no file", "site beta", "row 1 (line 1)", "site gamma", "cohort.min_sites"),
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_check_and_simulate_refuse_in_the_same_words(tmp_path: Path, bert: Path, kind: str) -> None:
    change, says = REFUSED[kind]
    file = changed(tmp_path, bert, change, {"privacy": private()})
    with pytest.raises(PrivetError) as simulated:
        prepare(file, tmp_path / "run")
    with pytest.raises(PrivetError) as checked:
        check_simulation(load_plan(file), lambda line: None)
    assert str(checked.value) == str(simulated.value)
    assert type(checked.value) is type(simulated.value)
    assert not [part for part in says if part not in checked.value.message]
    assert "secret" not in str(checked.value)
    assert not (tmp_path / "run").exists()


def test_a_divided_file_is_named_itself_and_no_missing_test_is_added(tmp_path: Path, bert: Path) -> None:
    file = changed(tmp_path, bert, also(held_out, setting("task", "labels", ["x", "y"])))
    with pytest.raises(PrivetError) as checked:
        check_simulation(load_plan(file), lambda line: None)
    assert "no site has test records" not in checked.value.message
    assert "-train.jsonl" not in checked.value.message


def test_what_is_in_two_places_is_told_by_check_and_by_simulate(tmp_path: Path, bert: Path, privet: Run) -> None:
    def shared(document: dict[str, Any], folder: Path) -> None:
        sites(document)[SITES[0]]["train"] = sites(document)[SITES[1]]["train"]
        sites(document)[SITES[2]]["test"] = sites(document)[SITES[2]]["train"]

    file = changed(tmp_path, bert, shared)
    said: list[str] = []
    prepare(file, tmp_path / "run", say=said.append)
    warned = [line.removeprefix("WARNING: ") for line in said if line.startswith("WARNING: ")]
    assert any("at more than one site: alpha, beta" in line for line in warned)
    assert any("a test file is also a training file, at gamma" in line for line in warned)
    code, out, _ = privet("check", file, "--json")
    assert (code, json.loads(out)["warnings"]) == (0, warned)
    code, out, _ = privet("data", file)
    assert code == 0
    assert "WARNING: 60 of 60 test records are equal to training records, at gamma" in out
    assert "warnings" not in json.loads(privet("check", study_file(tmp_path / "apart", bert), "--json")[1])


# --- files as hospitals hold them, in a simulation ---------------------------------------------------------


def as_hospitals_hold_them(document: dict[str, Any], folder: Path) -> None:
    """Write the same records as semicolons in Latin-1, as text of a spreadsheet, and compressed."""
    labels = {label: f"Klasse {number}" for number, label in enumerate(document["task"]["labels"])}
    for name, separator, encoding, ending, more in (
        (SITES[0], ";", "latin-1", ".csv", {"delimiter": "semicolon", "encoding": "latin-1"}),
        (SITES[1], "\t", "utf-16", ".tsv", {"encoding": "utf-16", "strip_header": True}),
        (SITES[2], "|", "utf-8", ".csv.gz", {"delimiter": "pipe"}),
    ):
        for part in ("train", "test"):
            rows = [json.loads(line) for line in (folder / sites(document)[name][part][0]).read_text().splitlines()]
            lines = [f" text{separator}label ", *(f"{row['text']}{separator}{labels[row['label']]}" for row in rows)]
            if not more.get("strip_header"):
                lines[0] = lines[0].strip()
            data = "\r\n".join(lines).encode(encoding)
            path = folder / f"{name}-{part}{ending}"
            path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
            sites(document)[name][part] = [path.name]
        sites(document)[name]["format"] = {**more, "labels": {own: label for label, own in labels.items()}}


@pytest.mark.slow
def test_formats_change_neither_the_study_nor_the_result(tmp_path: Path, bert: Path) -> None:
    plain = run_simulation(prepare(study_file(tmp_path / "plain", bert), tmp_path / "one"))
    file = changed(tmp_path / "odd", bert, as_hospitals_hold_them)
    odd = run_simulation(prepare(file, tmp_path / "two"))
    assert odd["study_digest"] == plain["study_digest"]
    assert odd["adapter_digest"] == plain["adapter_digest"]


def test_pooled_records_and_moved_studies_keep_the_formats(tmp_path: Path, bert: Path) -> None:
    file = changed(tmp_path / "odd", bert, as_hospitals_hold_them)
    plan = load_plan(file)
    files = write_federation(plan, tmp_path / "run")
    (tmp_path / "run" / "baselines").mkdir()
    pooled = load_simulated(write_pooled_site(files, tmp_path / "run" / "baselines" / "pooled.toml", plan))
    separate = [load_simulated(path) for path in files]
    assert {path: pooled.form_of(path) for path in pooled.train} == {
        path: site.form_of(path) for site in separate for path in site.train
    }
    # A sweep writes the study's paths in full: also those that have a format of their own.
    document = {"simulation": {"sites": {"a": {"train": ["x.csv"], "format": {"files": {"x.csv": {}}}}}}}
    moved = absolute_paths(document, tmp_path)["simulation"]["sites"]["a"]
    assert list(moved["format"]["files"]) == moved["train"]


def test_a_partition_has_a_format(tmp_path: Path, bert: Path) -> None:
    def pooled(document: dict[str, Any], folder: Path) -> None:
        as_hospitals_hold_them(document, folder)
        own = sites(document)[SITES[0]]
        document["simulation"].pop("sites")
        document["simulation"]["partition"] = {"split": "dirichlet", "concentration": 1.0, "sites": 3, **own}

    file = changed(tmp_path / "odd", bert, pooled)
    check_simulation(load_plan(file), lambda line: None)
    document = tomllib.loads(file.read_text(encoding="utf-8"))
    document["simulation"]["partition"]["format"]["delimiter"] = ";"
    with pytest.raises(StudyError, match=r"partition\.format\.delimiter"):
        plan_of(document, tmp_path)
