"""A study that counts or measures, made from one that trains for the same sites."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from privet.common.errors import StudyError
from privet.simulations.data.federation import load_plan
from privet.simulations.drafts.counting import EPSILON, draft_counting
from privet.simulations.drafts.values import COMMENTS
from privet.simulations.runs.simulate import prepare, run_simulation
from tests.conftest import Run
from tests.simulations.test_drafts import made, write_sites
from tests.support.tiny import answer_rows, class_rows

DIGEST = "sha256:" + "0" * 64


@pytest.fixture
def study(tmp_path: Path, bert: Path) -> Path:
    """A study that trains."""
    made(tmp_path, write_sites(tmp_path, class_rows), base=str(bert), epsilon=4.0, mode="distributed")
    return tmp_path / "study.toml"


def test_it_counts_at_the_same_sites_for_a_small_epsilon(privet: Run, study: Path) -> None:
    out = study.with_name("counts.toml")
    code, said, err = privet("new", "--from", study, "--kind", "statistics", "--out", out)
    assert code == 0, err
    assert f"privet check {out}" in said
    document, trains = tomllib.loads(out.read_text()), tomllib.loads(study.read_text())
    assert {"training", "lora", "aggregation"} & document.keys() == {"aggregation"}
    for table in ("model", "task", "data", "cohort"):
        assert document[table] == trains[table]
    assert document["name"] == trains["name"] + "-counts"
    assert document["privacy"]["epsilon"] == EPSILON["statistics"]
    assert document["privacy"]["unit"] == "patient"
    assert "block" not in document.get("secure_aggregation", {})
    assert document["statistics"]["lengths"][-1] >= document["data"]["max_length"]
    assert document["statistics"]["lengths"][-1] < 2 * document["data"]["max_length"]
    assert load_plan(out).study.counts
    assert {"kind", "statistics.lengths", "evaluation.adapter", "evaluation.files"} <= COMMENTS.keys()
    assert privet("new", "--from", study, "--kind", "statistics", "--out", out)[0] != 0  # it exists


@pytest.mark.slow
def test_what_is_made_can_be_simulated(study: Path) -> None:
    out = study.with_name("counts.toml")
    out.write_text(draft_counting(study, "statistics", name=None, epsilon=8.0, adapter=None, files=None).text())
    assert "counts" in run_simulation(prepare(out, study.parent / "run"))


def test_it_measures_an_adapter_that_is_named(study: Path) -> None:
    draft = draft_counting(study, "evaluate", name="looking", epsilon=2.0, adapter=DIGEST, files="test")
    assert draft.document["evaluation"] == {"adapter": DIGEST, "files": "test"}
    assert draft.document["lora"] == tomllib.loads(study.read_text())["lora"]
    assert (draft.document["name"], draft.document["privacy"]["epsilon"]) == ("looking", 2.0)
    with pytest.raises(StudyError, match="expected the digest") as refused:
        draft_counting(study, "evaluate", name=None, epsilon=None, adapter=None, files=None)
    assert "--adapter base" not in (refused.value.hint or "")  # a classifier has a head, which the base has not
    with pytest.raises(StudyError, match="has no head"):
        draft_counting(study, "evaluate", name=None, epsilon=None, adapter="base", files=None)


def test_the_base_of_a_language_model_is_measured_alone(tmp_path: Path, llama: Path) -> None:
    made(tmp_path, write_sites(tmp_path, answer_rows), base=str(llama))
    draft = draft_counting(tmp_path / "study.toml", "evaluate", name=None, epsilon=None, adapter="base", files=None)
    assert draft.document["evaluation"] == {"adapter": "base"}
    with pytest.raises(StudyError) as refused:
        draft_counting(tmp_path / "study.toml", "evaluate", name=None, epsilon=None, adapter=None, files=None)
    assert "--adapter base" in (refused.value.hint or "")


def test_what_cannot_be_meant_is_refused_with_a_command(
    privet: Run, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study.parent)
    (study.parent / "sub").mkdir()
    assert privet("new", "--from", study, "--kind", "statistics", "--out", "counts.toml")[0] == 0
    for given, said in (
        (("--kind", "statistics"), "expected --from and --kind together"),
        (("--from", study), "expected --from and --kind together"),
        (("north-train.jsonl", "--from", study, "--kind", "statistics"), "and no data files"),
        (("--from", study, "--kind", "statistics", "--out", "sub/c.toml"), "expected a file beside"),
        (("--from", "counts.toml", "--kind", "statistics"), "found one of kind statistics"),
        (("--from", "absent.toml", "--kind", "statistics"), "there is no study file"),
    ):
        code, _, err = privet("new", *(given if "--out" in given else (*given, "--out", "c.toml")))
        assert code != 0
        assert said in " ".join(err.split())
        assert not Path("c.toml").exists()
