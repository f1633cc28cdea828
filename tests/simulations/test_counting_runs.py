"""Studies that count, in whole simulations: with noise of every kind and with none; audited, reported and compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from privet.client.release.opened import open_release
from privet.common.audit.bundle import check_bundle
from privet.common.audit.counts import COUNTS
from privet.common.audit.release import ADAPTER
from privet.common.canonical import canonical_json
from privet.common.errors import StateError, StudyError
from privet.common.log.checkpoint import Policy
from privet.server.app import LOG, PUBLIC
from privet.server.log.keys import POLICY
from privet.server.rounds.archive import bundle_files
from privet.server.rounds.state import RunDirectory
from privet.simulations.dossier.evidence import gather as evidence_of
from privet.simulations.dossier.folder import documents
from privet.simulations.dossier.records import model_card
from privet.simulations.reporting.gather import gather
from privet.simulations.reporting.page import page
from privet.simulations.runs.simulate import prepare, run_simulation
from privet.simulations.terminal.sentences import result_sentence
from tests.simulations.test_simulate import SITES, study_file, write_study
from tests.support.tiny import class_rows, counting_document, private, write_rows

pytestmark = pytest.mark.slow
KINDS: dict[str, dict[str, Any]] = {
    "local": {"privacy": private(epsilon=1.0)},
    "shared": {"privacy": private(epsilon=1.0, mode="distributed"), "aggregation.largest_count": 100},
    "none": {},
}
MASKED = {"cohort.min_sites": 3, "secure_aggregation.mode": "masked"}


def counting_file(folder: Path, base: Path, kind: str, overrides: dict[str, Any]) -> Path:
    """Write a study that counts over three tiny sites without test records, and return its path."""
    folder.mkdir()
    sites = {
        name: {"train": [write_rows(folder / f"{name}.jsonl", class_rows(60, seed=number)).name]}
        for number, name in enumerate(SITES)
    }
    document = counting_document(base, kind, {**MASKED, **overrides})
    return write_study(folder / "study.toml", {**document, "simulation": {"data": "files", "sites": sites}})


@pytest.mark.parametrize("kind", list(KINDS))
def test_sites_count_their_records_together(tmp_path: Path, bert: Path, kind: str) -> None:
    file = counting_file(tmp_path / "study", bert, "statistics", KINDS[kind])
    summary = run_simulation(prepare(file, tmp_path / "run"))
    assert summary["log_verified"]
    assert summary["epsilon"] is None or 0.98 < summary["epsilon"] <= 1.0
    found = {cell["name"]: cell for cell in summary["counts"]["cells"]}
    expected = {"units": 180, "missing": 0, "label.0": 60, "label.1": 60, "label.2": 60}
    evidence = evidence_of(tmp_path / "run")
    texts = [each.text for made in documents(evidence) for each in made.sentences()]
    assert any("Nothing is trained" in text for text in texts)
    assert sum("Over all sites, " in text for text in texts) >= len(expected)
    if kind == "none":  # masks carry them exactly
        (statement,) = evidence.statements
        few = {**statement, "metrics": {**statement["metrics"], "label.0": 3.0, "label.1": 117.0}}
        said = [each.text for each in model_card(replace(evidence, statements=[few])).sentences()]
        assert any("counts are not shown" in text for text in said)
        assert not any(": 3.0," in text for text in said)
        assert {name: found[name]["value"] for name in expected} == expected
    else:
        for name, count in expected.items():  # within 6 deviations
            assert abs(found[name]["value"] - count) < 3.1 * (found[name]["high"] - found[name]["value"])
    assert "nothing was trained" in result_sentence(summary)
    state = RunDirectory.open(tmp_path / "run").load()
    assert (state.round, state.stopped, state.adapter.spec.tensors) == (1, True, ())
    text = page([gather(tmp_path / "run")])
    assert "All sites together" in text
    assert "records of label heart" in text
    with pytest.raises(StateError, match="counts of records, and no adapter"):
        open_release(tmp_path / "run")


def test_an_auditor_computes_the_result_again_and_finds_every_changed_field(tmp_path: Path, bert: Path) -> None:
    file = counting_file(tmp_path / "study", bert, "statistics", KINDS["shared"])
    run_simulation(prepare(file, tmp_path / "run"))
    run = RunDirectory.open(tmp_path / "run")
    files = bundle_files(run, run.path / PUBLIC, with_weights=True)
    policy = Policy.parse((run.path / LOG / POLICY).read_text())
    assert check_bundle(files, policy).ok
    rounds, result = "rounds/0001.json", f"release/{COUNTS}"
    assert result in files
    for name in (rounds, result):
        document = json.loads(files[name])
        for path in paths(document):
            if name == rounds and path[0] in ("started", "seconds"):
                continue  # the coordinator's own clock, which no rule relies on
            changed = {**files, name: canonical_json(mutated(document, path)) + b"\n"}
            assert not check_bundle(changed, policy).ok, f"{name}: {path}"
    assert not check_bundle({name: data for name, data in files.items() if name != result}, policy).ok


def paths(document: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to each value of a document: of tables and lists, to the values in them."""
    if isinstance(document, dict | list) and document:
        keys = document if isinstance(document, dict) else range(len(document))
        return [path for key in keys for path in paths(document[key], (*before, key))]
    return [before]


def mutated(document: Any, path: tuple[Any, ...]) -> Any:
    """Return a copy of a document with one value changed."""
    if not path:
        return document + 1 if isinstance(document, int | float) else "changed"
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = mutated(document[path[0]], path[1:])
    return copy


def test_two_results_are_compared_in_one_report(tmp_path: Path, bert: Path) -> None:
    for name, rows in (("first", 0), ("later", 30)):
        file = counting_file(tmp_path / name, bert, "statistics", {"name": name})
        for site in SITES[:rows]:
            write_rows(tmp_path / name / f"{site}.jsonl", [{**row, "label": "heart"} for row in class_rows(60, seed=9)])
        run_simulation(prepare(file, tmp_path / f"run-{name}"))
    text = page([gather(tmp_path / "run-first"), gather(tmp_path / "run-later")])
    assert "What moved since run-first" in text
    assert "0.667" in text  # all labels heart instead of a third


def test_sites_measure_a_released_adapter_together(tmp_path: Path, bert: Path) -> None:
    means = {"training.head_start": "class-means", "training.sampling_rate": 1.0, "training.rounds": 0}
    trained = run_simulation(prepare(study_file(tmp_path / "train", bert, means), tmp_path / "trained"))
    asked = {**KINDS["shared"], "evaluation": {"adapter": trained["adapter_digest"]}}
    file = counting_file(tmp_path / "study", bert, "evaluate", asked)
    summary = run_simulation(prepare(file, tmp_path / "run", tmp_path / "trained"))
    assert summary["log_verified"]
    assert summary["adapter_digest"] == trained["adapter_digest"]
    figures = {each["title"]: each for each in summary["counts"]["figures"]}
    assert figures["accuracy"]["low"] < figures["accuracy"]["value"] < figures["accuracy"]["high"]
    assert "accuracy" in page([gather(tmp_path / "run")])
    # Adapters of others come as PEFT wrote them.
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / ADAPTER).write_bytes(RunDirectory.open(tmp_path / "trained").load().adapter.data)
    again = run_simulation(prepare(file, tmp_path / "again", tmp_path / "foreign"))
    assert again["counts"] == summary["counts"]
    with pytest.raises(StudyError, match="the study measures sha256"):
        prepare(file, tmp_path / "other")
