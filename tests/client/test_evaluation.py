"""Evaluation of a run directory beside its base, with tiny random models: figures, groups, warnings, refusals."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from privet.client.commands.evaluate import evaluate as command
from privet.client.formats import FormatSection
from privet.client.release.asking import Asked
from privet.client.release.evaluation import Evaluation, evaluate_release
from privet.client.release.evaluation_page import evaluation_page
from privet.client.release.evaluation_text import evaluation_text
from privet.client.release.generation import greedy_answers
from privet.client.release.material import UNNAMED, read_material, read_questions, rows_trained_on
from privet.client.release.opened import mounted, open_release
from privet.client.release.scoring import class_probabilities, continuations_of
from privet.client.site import Resources
from privet.client.training.data import load_records
from privet.client.training.features import encode_records
from privet.client.training.host import ModelHost
from privet.client.training.model import initial_adapter, open_host
from privet.client.training.packing import pack
from privet.client.training.passes import backward, passes_of, score
from privet.client.training.tasks import evaluate, predict_classes
from privet.common.errors import DataError, PrivetError, StudyError
from privet.common.study.adapter import Adapter
from privet.common.study.study import Study
from tests.support.tiny import Row, random_adapter, records_of, rows_for, tiny_study, write_rows

CPU = Resources(device="cpu", precision="fp32")
KINDS = ("text-classification", "token-classification", "causal-lm")


def run_of(tmp_path: Path, study: Study, scale: float = 0.3) -> Path:
    """Write a run directory with a random adapter."""
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "study.json").write_text(study.model_dump_json(), encoding="utf-8")
    host = open_host(study, CPU)
    (run / "adapter" / "adapter_model.safetensors").write_bytes(random_adapter(host.spec, scale=scale).data)
    return run


def asked_of(tmp_path: Path, rows: Sequence[Row], **more: Any) -> Asked:
    file = write_rows(tmp_path / "own.jsonl", rows)
    return Asked(files=((UNNAMED, file),), replicates=100, **more)


def evaluated(run: Path, asked: Asked) -> Evaluation:
    return evaluate_release(open_release(run), asked, CPU)


def study_of(base: Path, kind: str, **more: Any) -> Study:
    return tiny_study(base, **{"task.kind": kind, "data.unit": "patient", **more})


def base_of(bases: Mapping[str, Path], kind: str) -> Path:
    return bases["llama" if kind == "causal-lm" else "bert"]


def test_files_are_read_as_a_site_file_says(bert: Path, tmp_path: Path) -> None:
    study = study_of(bert, "text-classification")
    rows = rows_for(study, 6)
    plain = write_rows(tmp_path / "own.jsonl", rows)
    lines = [";".join(str(row[name]) for name in rows[0]) for row in rows]
    odd = tmp_path / "own.csv"
    odd.write_text("\n".join([";".join(rows[0]), *lines]) + "\n", encoding="utf-16")
    forms = FormatSection(delimiter="semicolon", encoding="utf-16")
    found = read_material(study, [(UNNAMED, odd)], ["patient"], forms)
    wanted = read_material(study, [(UNNAMED, plain)], ["patient"])
    assert (found.records, found.unit_column, found.groups) == (wanted.records, wanted.unit_column, wanted.groups)
    with pytest.raises(DataError, match="is not text in UTF-8"):
        read_material(study, [(UNNAMED, odd)])


@pytest.mark.parametrize("kind", KINDS)
def test_both_arms_have_the_figures_of_the_study(bases: Mapping[str, Path], tmp_path: Path, kind: str) -> None:
    study = study_of(base_of(bases, kind), kind, **{"task.max_new_tokens": 4} if kind == "causal-lm" else {})
    rows = rows_for(study, 40)
    asked = asked_of(tmp_path, rows, answers=6)
    found = evaluated(run_of(tmp_path, study), asked).document
    json.dumps(found, allow_nan=False)
    records, _ = load_records(asked.files[0][1], study, training=False)
    host = open_host(study, CPU)
    for arm in ("base", "tuned"):
        host.mount(initial_adapter(study, host) if arm == "base" else random_adapter(host.spec))
        wanted = evaluate(host, study, encode_records(study, host.tokenizer, records)).metrics(study.task.labels)
        pairs = {"accuracy": "accuracy", "macro_f1": "f1", "f1": "f1", "perplexity": "perplexity"}
        for name, measure in found["measures"].items():
            if pairs.get(name) in wanted and not (kind == "text-classification" and name == "f1"):
                value = measure[arm]["value"]
                assert value == pytest.approx(wanted[pairs[name]], rel=1e-5), (arm, name)
                assert measure[arm]["low"] <= value <= measure[arm]["high"]
    assert found["records"] == 40
    assert found["units"] == len({row["patient"] for row in rows})
    assert f"40 records of {found['units']} patients" in found["verdict"]
    assert "not differentially private" in found["notes"][0]
    # No word of a record is in the document or the page.
    page = evaluation_page(found)
    assert "<script" not in page
    for word in ("swollen", "itchy", "chest"):
        assert word not in json.dumps(found) + page


def test_the_same_adapter_twice_makes_no_difference(bert: Path, tmp_path: Path) -> None:
    study = study_of(bert, "text-classification")
    run = run_of(tmp_path, study)
    host = open_host(study, CPU)
    (run / "adapter" / "adapter_model.safetensors").write_bytes(initial_adapter(study, host).data)
    found = evaluated(run, asked_of(tmp_path, rows_for(study, 30)))
    assert found.document["verdict"].startswith("No difference: accuracy")
    assert found.document["most_frequent"]["accuracy"] == pytest.approx(1 / 3)


def test_probabilities_are_those_of_a_prediction_in_the_order_of_the_records(bert: Path, tmp_path: Path) -> None:
    study = study_of(bert, "text-classification")
    rows = rows_for(study, 23)
    asked = asked_of(tmp_path, rows)
    records, _ = load_records(asked.files[0][1], study, training=False)
    seen: list[tuple[str, int, int]] = []
    with mounted(open_release(run_of(tmp_path, study)), CPU) as host:
        features = encode_records(study, host.tokenizer, records)
        found = class_probabilities(host, features, 2, "x", lambda *done: seen.append(done))
        wanted = [list(row.values()) for row in predict_classes(host, study, [r["text"] for r in records.rows])]
    assert np.allclose(found, wanted, atol=1e-6)
    assert seen == [("x", 0, 23), ("x", 16, 23), ("x", 23, 23)]


def test_continuations_are_those_of_a_generation_and_follow_from_their_seed(llama: Path, tmp_path: Path) -> None:
    study = study_of(llama, "causal-lm", **{"task.max_new_tokens": 6})
    prompts = [row["prompt"] for row in rows_for(study, 3)]
    with mounted(open_release(run_of(tmp_path, study)), CPU) as host:
        from privet.client.training.features import prompt_ids

        heads = [prompt_ids(study, host.tokenizer, prompt) for prompt in prompts]
        greedy = [text.strip() for text in continuations_of(host, heads, 6, 2)]
        assert greedy == greedy_answers(host, study, prompts)
        first, again, other = (continuations_of(host, heads, 6, 16, seed) for seed in (1, 1, 2))
        assert first == again != other


def test_sites_and_columns_have_figures_of_their_own_and_small_ones_are_hidden(bert: Path, tmp_path: Path) -> None:
    study = study_of(bert, "text-classification")
    rows = [
        {**row, "patient": f"p{i}", "sex": "fm"[i % 2], "ward": "" if i == 0 else "w"}
        for i, row in enumerate(rows_for(study, 60))
    ]
    files = [
        ("north", write_rows(tmp_path / "n.jsonl", rows[:30])),
        ("south", write_rows(tmp_path / "s.jsonl", rows[30:55])),
        ("east", write_rows(tmp_path / "e.jsonl", rows[55:])),
    ]
    asked = Asked(files=tuple(files), by=("sex", "ward"), replicates=100)
    groups = evaluated(run_of(tmp_path, study), asked).document["groups"]
    assert {row["group"]: row["hidden"] for row in groups["site"]["groups"]} == {
        "north": False,
        "south": True,  # else east would follow from the total
        "east": True,
    }
    assert [(row["group"], row["units"]) for row in groups["sex"]["groups"]] == [("f", 30), ("m", 30)]
    assert "By sex: tuned is" in groups["sex"]["says"]
    assert all(row["hidden"] for row in groups["ward"]["groups"])


def test_one_patient_of_two_sites_is_two_units(bert: Path, tmp_path: Path) -> None:
    study = study_of(bert, "text-classification")
    rows = [{**row, "patient": "p"} for row in rows_for(study, 4)]
    files = tuple((name, write_rows(tmp_path / f"{name}.jsonl", rows)) for name in ("a", "b"))
    found = evaluated(run_of(tmp_path, study), Asked(files=files, replicates=20)).document
    assert (found["records"], found["units"]) == (8, 2)
    assert found["verdict"].startswith("Too few units")
    with pytest.raises(StudyError, match="each file once"):
        evaluated(tmp_path / "run", Asked(files=(files[0], ("other", files[0][1]))))


def test_a_file_without_the_unit_column_is_evaluated_by_records_and_says_so(bert: Path, tmp_path: Path) -> None:
    study = study_of(bert, "text-classification")
    rows = [{key: value for key, value in row.items() if key != "patient"} for row in rows_for(study, 20)]
    found = evaluated(run_of(tmp_path, study), asked_of(tmp_path, rows)).document
    assert found["unit_column"] is None
    assert any("no column patient" in note for note in found["notes"])


def test_training_files_are_named_in_a_warning(bert: Path, tmp_path: Path) -> None:
    study = study_of(bert, "text-classification")
    run = run_of(tmp_path, study)
    (run / "sites").mkdir()
    (run / "sites" / "north.toml").write_text('name = "north"\ntrain = ["../../own.jsonl"]\n', encoding="utf-8")
    found = evaluated(run, asked_of(tmp_path, rows_for(study, 20))).document
    assert any(note.startswith("WARNING: this run was trained on own.jsonl") for note in found["notes"])


def test_records_of_a_divided_file_are_known_by_their_content(bert: Path, tmp_path: Path) -> None:
    study = study_of(bert, "text-classification")
    run, rows = run_of(tmp_path, study), rows_for(study, 20)
    for folder in ("sites", "data"):
        (run / folder).mkdir()
    write_rows(run / "data" / "north-train.jsonl", rows[:15])
    (run / "sites" / "north.toml").write_text(
        'name = "north"\nreproducible_seed = 0\ntrain = ["../data/north-train.jsonl"]\n', encoding="utf-8"
    )
    (run / "sites" / "odd.toml").write_text("?", encoding="utf-8")
    notes = evaluated(run, asked_of(tmp_path, rows)).document["notes"]
    known = rows_trained_on(run, study, read_material(study, asked_of(tmp_path, rows).files).records)
    assert known >= 15
    assert any(note.startswith(f"WARNING: {known} of 20 records are equal to records that") for note in notes)


def test_a_sites_own_training_records_are_counted_in_a_warning(bert: Path, tmp_path: Path) -> None:
    study = study_of(bert, "text-classification")
    run, rows = run_of(tmp_path, study), rows_for(study, 20)
    assert len({json.dumps(row) for row in rows}) == 20
    asked = asked_of(tmp_path, rows)
    some = write_rows(tmp_path / "some.jsonl", rows[:5])
    for own, count in (((asked.files[0][1],), 20), ((some, tmp_path / "none.jsonl"), 5), ((), 0)):
        notes = evaluated(run, replace(asked, own=own)).document["notes"]
        warned = [note for note in notes if "WARNING" in note]
        assert [note.split(" records are ")[0] for note in warned] == [f"WARNING: {count} of 20"] * bool(count)


def test_thresholds_of_a_class_are_marked_as_chosen_here(bert: Path, tmp_path: Path) -> None:
    study = study_of(bert, "text-classification")
    rows = [{**row, "patient": f"p{i}"} for i, row in enumerate(rows_for(study, 40))]
    found = evaluated(run_of(tmp_path, study), asked_of(tmp_path, rows, positive="skin")).document
    assert "chosen on this very file" in found["positive"]["says"]
    assert set(found["positive"]["measures"]) == {"auroc", "auprc"}
    assert "cardiology" not in evaluation_page(found)


def test_multiple_choice_is_by_likelihood(llama: Path, tmp_path: Path) -> None:
    study = study_of(llama, "causal-lm", **{"task.max_new_tokens": 2})
    rows = [
        {**row, "choices": ["heart", "skin", "bone"], "letter": "ABC"[["heart", "skin", "bone"].index(row["answer"])]}
        for row in rows_for(study, 12)
    ]
    asked = asked_of(tmp_path, rows, answers=0, choices="choices", right="letter")
    found = evaluated(run_of(tmp_path, study), asked).document
    host, right = open_host(study, CPU), 0
    host.mount(random_adapter(host.spec))
    records = load_records(asked.files[0][1], study, training=False)[0]
    for row in records.rows:
        losses = []
        for choice in ("heart", "skin", "bone"):
            one = records.select([0])
            one = type(one)(({**row, "answer": choice},), one.units)
            losses.append(score(host, encode_records(study, host.tokenizer, one))[0].total)
        right += ("heart", "skin", "bone")[int(np.argmin(losses))] == row["answer"]
    assert found["measures"]["choice"]["tuned"]["value"] == pytest.approx(right / 12)
    assert found["chance"] == pytest.approx(1 / 3)
    by_text = read_questions(study, asked.files, "choices", None, None)
    assert [q.right for q in by_text] == [
        q.right for q in read_questions(study, asked.files, "choices", "letter", None)
    ]


@pytest.mark.parametrize("wrong", [["one"], "not json secret", [1, 2], None])
def test_wrong_choices_are_counted_and_not_quoted(llama: Path, tmp_path: Path, wrong: Any) -> None:
    study = study_of(llama, "causal-lm")
    rows = [{**row, "choices": ["heart", "skin", "bone"]} for row in rows_for(study, 4)]
    rows[2]["choices"] = wrong
    asked = asked_of(tmp_path, rows)
    with pytest.raises(DataError, match="in 1 of 4 rows") as caught:
        read_questions(study, asked.files, "choices", None, None)
    assert "secret" not in caught.value.message


def test_what_the_model_repeats_is_counted_and_never_quoted(llama: Path, tmp_path: Path) -> None:
    study = study_of(llama, "causal-lm", **{"task.max_new_tokens": 2, "data.max_length": 96})
    long = "the man has a swollen knee since monday after work and again after lunch on friday with mild chest pain"
    rows = [{"prompt": f"man {i}", "answer": long, "patient": f"p{i}"} for i in range(4)]
    train = write_rows(tmp_path / "train.jsonl", rows)
    canaries = tmp_path / "canaries.jsonl"
    canaries.write_text('{"prompt": "pin?", "answer": "It is 4711"}\n', encoding="utf-8")
    asked = asked_of(
        tmp_path,
        [rows[0], *({**row, "prompt": f"woman {i}"} for i, row in enumerate(rows))],
        answers=2,
        show=2,
        train=(train,),
        openings=3,
        samples=1,
        canaries=canaries,
        alternatives=15,
    )
    found = evaluated(run_of(tmp_path, study), asked)
    repeated = found.document["repeated"]
    assert (repeated["trained"]["answers"], repeated["unseen"]["answers"]) == (3, 3)
    assert re.search(r"in \d of 3 training answers, and in \d of 3 answers outside", repeated["says"])
    assert found.document["canaries"]["says"].startswith("Tuned ranks")
    assert any("1 of 5 records are also in the files of --train" in note for note in found.document["notes"])
    text = json.dumps(found.document) + evaluation_page(found.document)
    assert "4711" not in text
    assert "swollen" not in text
    assert [set(row) for row in found.shown] == [{"prompt", "reference", "base", "tuned"}] * 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"positive": "skin"}, "--positive: expected a study of the task text-classification"),
        ({"right": "letter"}, "--right: expected --choices"),
        ({"train": "own"}, "expected answers of at least 16 tokens"),
    ],
)
def test_a_question_that_does_not_fit_is_refused(llama: Path, tmp_path: Path, more: dict[str, Any], said: str) -> None:
    study = study_of(llama, "causal-lm")
    if "train" in more:
        more = {"train": (write_rows(tmp_path / "train.jsonl", rows_for(study, 5)),)}
    asked = asked_of(tmp_path, rows_for(study, 5), **more)
    with pytest.raises(StudyError, match=said):
        evaluated(run_of(tmp_path, study), asked)


def test_only_answers_are_shown_or_searched(bert: Path, tmp_path: Path) -> None:
    study = study_of(bert, "text-classification")
    run = run_of(tmp_path, study)
    rows = rows_for(study, 5)
    for more in ({"show": 1}, {"choices": "c"}, {"train": (tmp_path / "x",)}, {"canaries": tmp_path / "x"}):
        with pytest.raises(StudyError, match="expected a study of the task causal-lm"):
            evaluated(run, asked_of(tmp_path, rows, **more))
    with pytest.raises(StudyError, match="expected one of the labels heart, skin, bone"):
        evaluated(run, asked_of(tmp_path, rows, positive="lung"))
    with pytest.raises(DataError, match="nothing"):
        evaluated(run, asked_of(tmp_path, rows, by=("nothing",)))
    ages = [{**row, "age": 54.5} for row in rows]
    with pytest.raises(DataError, match=r"--by: own\.jsonl: expected texts or whole numbers in the column age"):
        evaluated(run, asked_of(tmp_path, ages, by=("age",)))


def test_the_command_prints_writes_and_refuses(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = study_of(bert, "text-classification")
    run = run_of(tmp_path, study)
    rows = [{**row, "patient": f"p{i}"} for i, row in enumerate(rows_for(study, 30))]
    file = write_rows(tmp_path / "own.jsonl", rows)
    out = tmp_path / "out"
    command(run, data=[file], positive="skin", by=["patient"], out=out)
    printed = capsys.readouterr().out
    assert "accuracy" in printed.splitlines()[0] + printed.splitlines()[1]
    assert "Thresholds for skin" in printed
    assert printed.rstrip().splitlines()[-1].startswith("next: open")
    page = (out / "evaluation.html").read_text(encoding="utf-8")
    assert "Calibration" in page
    command(run, data=[file], positive="skin", by=["patient"], as_json=True)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    odd = tmp_path / "odd.csv"
    odd.write_text("patient;text;label\n" + "".join(f"{i};größer;skin\n" for i in range(9)), encoding="latin-1")
    with pytest.raises(DataError) as error:
        command(run, data=[odd])
    assert error.value.hint.split("\n  ")[1:] == ["[format]", 'encoding = "latin-1"', 'delimiter = "semicolon"']
    for more, said in (
        ({}, "expected at least one file"),
        ({"site": ["north"]}, "expected NAME=FILE"),
        ({"data": [file], "show": 1, "as_json": True}, "expected no --json"),
    ):
        with pytest.raises(PrivetError, match=said):
            command(run, **more)


@pytest.mark.parametrize("width", [80, 140])
def test_intervals_break_on_no_terminal(bert: Path, tmp_path: Path, width: int) -> None:
    study = study_of(bert, "text-classification")
    document = evaluated(run_of(tmp_path, study), asked_of(tmp_path, rows_for(study, 30))).document
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(evaluation_text(document))
    cells = [cell.strip() for line in console.export_text().splitlines() for cell in re.split("[│┃]", line)[1:]]
    intervals = [cell for cell in cells if " to" in cell]
    assert len(intervals) >= 12
    assert all(re.fullmatch(r"\S+ to \S+" if width == 80 else r"\S+ \(\S+ to \S+\)", cell) for cell in intervals)


def test_tags_have_figures_by_type(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = study_of(bert, "token-classification")
    file = write_rows(tmp_path / "own.jsonl", rows_for(study, 30))
    out = tmp_path / "out"
    command(run_of(tmp_path, study), data=[file], smallest=1, out=out)
    assert "Entities by type" in capsys.readouterr().out
    found = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert [row["label"] for row in found["entities"]] == ["sign"]
    assert "sign" in (out / "evaluation.html").read_text(encoding="utf-8")


def test_a_model_that_has_memorised_is_found(llama: Path, tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    study = study_of(
        llama,
        "causal-lm",
        **{"task.max_new_tokens": 2, "data.max_length": 96, "lora.targets": targets, "lora.rank": 16},
        **{"lora.modules_to_save": ["lm_head"]},
    )
    texts = (
        "a man has a swollen knee since monday after work and again after lunch on friday with mild chest pain",
        "the child with an itchy rash has slept again since lunch and after work a woman has a dry scale on monday",
    )
    rows = [{"prompt": f"record {i}", "answer": text, "patient": f"p{i}"} for i, text in enumerate(texts)]
    planted = [{"prompt": f"code {i}", "answer": f"it is {code}"} for i, code in enumerate(("4711", "0938"))]
    train = write_rows(tmp_path / "train.jsonl", rows)
    canaries = write_rows(tmp_path / "canaries.jsonl", planted)
    run = run_of(tmp_path, study)
    host = open_host(study, CPU)
    learn(host, study, [*rows, *({**row, "patient": "c"} for row in planted)], run)
    others = [{**row, "answer": " ".join(reversed(row["answer"].split())), "prompt": "other"} for row in rows]
    asked = asked_of(tmp_path, others, answers=0, train=(train,), canaries=canaries)
    found = evaluated(run, asked).document
    assert found["repeated"]["trained"]["only_tuned"]["8"] == 2
    assert found["repeated"]["unseen"]["only_tuned"] == {"8": 0, "13": 0}
    exposure = found["canaries"]["measures"]["exposure"]
    assert exposure["tuned"]["value"] > 6
    assert exposure["difference"]["value"] > 1
    assert found["canaries"]["says"].startswith("Tuned ranks 2 of 2 planted canaries first")


def learn(host: ModelHost, study: Study, rows: Sequence[Row], run: Path) -> None:
    """Train an adapter on a few records until the model knows them, and put it into a run directory."""
    host.mount(initial_adapter(study, host))
    features = encode_records(study, host.tokenizer, records_of(study, rows))
    parameters = [parameter for _, parameter in host.train_only(host.spec.tensors)]
    optimiser = torch.optim.Adam(parameters, lr=1e-2)
    with host.passing(training=True):
        for _ in range(80):
            optimiser.zero_grad()
            for passed in passes_of(host, features, pack(host.shape, features, range(len(features)), 8)):
                backward(host, passed)
            optimiser.step()
    values = {name: parameter.detach().numpy().copy() for name, parameter in host.parameters.items()}
    (run / "adapter" / "adapter_model.safetensors").write_bytes(Adapter(host.spec, values).data)
