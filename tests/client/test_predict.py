"""`privet predict`: every row gets one result, in order; spans, answers, sampling, stop tokens and streaming."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from privet.client.commands.release import _readable
from privet.client.release.applied import REASON, _reason, predict, spans_of
from privet.client.release.generation import Sampling, answers, greedy_answers, stop_tokens, stream
from privet.client.release.opened import caution, mounted, open_release
from privet.client.release.tables import writing
from privet.client.training.features import prompt_ids
from privet.client.training.forms import split_words
from privet.client.training.model import open_host
from privet.client.training.tasks import predict_tags
from privet.common.audit.release import ADAPTER, STUDY
from privet.common.errors import StateError
from tests.conftest import Run
from tests.support.released import CPU, run_of
from tests.support.tiny import tiny_study, write_rows

TEXTS = ("man chest pain since monday", "itchy rash after work", "swollen knee")


def results_of(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_every_row_of_a_file_gets_one_result_in_order(privet: Run, tmp_path: Path, bert: Path) -> None:
    run, _ = run_of(tmp_path / "run", bert, "text-classification")
    rows = [{"id": n, "text": TEXTS[n % 3], "note": "kept"} for n in range(70)]
    rows[5]["text"], rows[6]["text"] = None, "   "
    del rows[7]["text"]
    rows[8]["text"] = 5
    file = write_rows(tmp_path / "in.jsonl", rows)
    code, out, err = privet("predict", run, "--data", file)
    assert code == 0, err
    found = results_of(out)
    assert [row["id"] for row in found] == list(range(70))
    assert {row["note"] for row in found} == {"kept"}
    reasons = {n: row["prediction"][REASON] for n, row in enumerate(found) if REASON in row["prediction"]}
    assert reasons == {5: "no text", 6: "no text", 7: "no text", 8: "not text, but int"}
    assert "predicted 66 of 70 rows" in err
    one = json.loads(privet("predict", run, "--text", TEXTS[0], "--json")[1])[0]
    assert found[0]["prediction"]["label"] == max(one["probabilities"], key=one["probabilities"].__getitem__)
    assert found[0]["prediction"]["probabilities"] == pytest.approx(one["probabilities"], rel=1e-3)


def test_csv_in_and_csv_out(privet: Run, tmp_path: Path, bert: Path) -> None:
    run, study = run_of(tmp_path / "run", bert, "text-classification")
    file = tmp_path / "in.csv"
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([["id", "text"], ["007", 'he said "ow",\nthen left'], ["008", ""]])
    assert privet("predict", run, "--data", file, "--out", tmp_path / "out.csv")[0] == 0
    with (tmp_path / "out.csv").open(newline="") as opened:
        first, second = csv.DictReader(opened)
    assert (first["id"], first["text"]) == ("007", 'he said "ow",\nthen left')
    assert first["prediction"] in study.task.labels
    assert float(first[f"prediction_{first['prediction']}"]) > 1 / 3
    assert (second["prediction"], second["prediction_reason"]) == ("", "no text")
    # The same, written by Excel, as a site file says.
    (tmp_path / "site.toml").write_text('[format.files."own.csv"]\ndelimiter = "semicolon"\nencoding = "cp1252"\n')
    (tmp_path / "own.csv").write_bytes('sep=;\r\nid;text\r\n007;"sagt „au“"\r\n'.encode("cp1252"))
    code, _, err = privet("predict", run, "--data", tmp_path / "own.csv")
    assert code == 2
    assert "add `--format format.toml`:\n  [format]\n" in err
    (tmp_path / "format.toml").write_text(err.split("format.toml`:\n")[1])
    assert privet("predict", run, "--data", tmp_path / "own.csv", "--format", tmp_path / "format.toml")[0] == 0
    # A column of another name: the settings that the error writes are right once the name is filled in.
    (tmp_path / "named.csv").write_text("id,note\n007,pain\n", encoding="utf-8")
    code, _, err = privet("evaluate", run, "--data", tmp_path / "named.csv")
    assert code == 2
    assert "with the file's own names in place of COLUMN-1" in err
    settings = err.split("format.toml`:\n")[1]
    assert settings.splitlines()[0].strip() == "[format]"
    (tmp_path / "named.toml").write_text(settings.replace("COLUMN-1", "id").replace("COLUMN-2", "note"))
    code, _, err = privet("evaluate", run, "--data", tmp_path / "named.csv", "--format", tmp_path / "named.toml")
    assert (code, "in the column label, found others in 1 of 1 rows" in err) == (2, True)
    code, out, _ = privet("predict", run, "--data", tmp_path / "own.csv", "--format", tmp_path / "site.toml")
    assert (code, results_of(out)[0]["text"]) == (0, "sagt „au“")
    (run / "rounds" / "0001.json").write_text('{"type": "round-close"}')
    assert "note" not in privet("predict", run, "--text", "a")[2]
    (run / "study.toml").touch()  # as a simulation that was interrupted
    assert f"note: {run} is not finished" in privet("predict", run, "--text", "a")[2]
    code, _, err = privet("predict", run, "--data", file, "--out", tmp_path / "out.csv")
    assert code == 6
    assert "exists already" in err


def test_an_adapter_without_a_complete_round_is_said_to_be_untrained(tmp_path: Path, bert: Path) -> None:
    run, _ = run_of(tmp_path / "run", bert, "text-classification")
    for name in ("0001.json", "0002.json"):
        (run / "rounds" / name).write_text('{"type": "round-abort"}')
    assert "is untrained" in caution(open_release(run))
    assert "--resume" not in caution(open_release(run))  # a coordinator's
    (run / "study.toml").touch()
    assert caution(open_release(run)).endswith(f"`privet simulate --resume {run}` trains it")
    (run / "rounds" / "0002.json").write_text('{"type": "round-close"}')
    assert "its last complete round; " in caution(open_release(run))


def test_what_a_model_writes_is_no_formula_in_a_spreadsheet(tmp_path: Path) -> None:
    written = ["=1+1", "+cmd", "-2+3", "@SUM(1)", "\t=1", "\uff1d1", "-5", "+0.5", "rest - 2", "", "rash"]
    out = tmp_path / "out.csv"
    with writing(out, io.StringIO(), ["own"], lambda result: {"prediction": result.get("answer")}) as write:
        write([{"own": "=1+1", "prediction": {"answer": text}} for text in written])
    with out.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["prediction"].removeprefix("'") for row in rows] == written
    assert [row["prediction"].startswith("'") for row in rows] == [True] * 6 + [False] * 5
    assert {row["own"] for row in rows} == {"=1+1"}, "a person's own columns stay as they are"


def test_results_are_written_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "diary").write_text("mine")
    (tmp_path / ".out.jsonl.partial").symlink_to(tmp_path / "diary")
    with writing(tmp_path / "out.jsonl", io.StringIO(), ["own"], lambda result: {}) as write:
        write([{"own": "1"}])
    assert (tmp_path / "diary").read_text() == "mine"
    assert (tmp_path / "out.jsonl").read_text() == '{"own": "1"}\n'


@pytest.mark.parametrize("role", ["system<|im_end|>", "tool", "", None])
def test_a_role_is_one_that_training_knows(role: str | None) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]
    assert _reason("causal-lm", turns).startswith("not text")


def test_a_temperature_too_small_to_divide_by_is_greedy(llama: Path) -> None:
    study = tiny_study(llama, **{"task.kind": "causal-lm"})
    host = open_host(study, CPU, training=False)
    (cold,), (greedy,) = (answers(host, study, [[5, 6, 7]], Sampling(temperature=t)) for t in (1e-40, 0.0))
    assert cold == greedy


def test_parquet_in_and_one_column_kept(privet: Run, tmp_path: Path, bert: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    run, _ = run_of(tmp_path / "run", bert, "text-classification")
    pq.write_table(pa.table({"key": [1, 2], "words": list(TEXTS[:2]), "more": [0, 0]}), tmp_path / "in.parquet")
    code, out, err = privet("predict", run, "--data", tmp_path / "in.parquet", "--column", "words", "--id", "key")
    assert code == 0, err
    assert [sorted(row) for row in results_of(out)] == [["key", "prediction"]] * 2


BAD = {
    "no column": ("in.jsonl", '{"id": 1}\n', "expected the column text"),
    "no rows": ("in.jsonl", "\n", "no rows"),
    "not JSON": ("in.jsonl", '{"text": "a"}\n{"text": secret\n', "line 2 is not one JSON object"),
    "an open quote": ("in.csv", 'id,text\n1,"secret\n2,b\n', "not a readable CSV"),
    "a long row": ("in.csv", "id,text\n1,secret,c\n", "line 2: expected at most 2 values, found 3"),
    "two of a name": ("in.csv", "text,text\nsecret,b\n", "several columns"),
    "a taken name": ("in.csv", "text,prediction\nsecret,b\n", "a name that results get"),
    "an unknown kind": ("in.xlsx", "secret", "ends in .csv"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_file_is_refused_and_leaves_nothing(privet: Run, tmp_path: Path, bert: Path, case: str) -> None:
    name, text, says = BAD[case]
    run, _ = run_of(tmp_path / "run", bert, "text-classification")
    (tmp_path / name).write_text(text)
    code, out, err = privet("predict", run, "--data", tmp_path / name, "--out", tmp_path / "out.jsonl")
    assert (code, out) == (2, "")
    assert says in err
    assert "secret" not in err
    assert not [file for file in tmp_path.iterdir() if "out" in file.name]


def test_a_directory_of_released_files_is_enough(privet: Run, tmp_path: Path, bert: Path) -> None:
    run, _ = run_of(tmp_path / "run", bert, "text-classification")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / ADAPTER).write_bytes((run / "adapter" / ADAPTER).read_bytes())
    (alone / STUDY).write_bytes((run / STUDY).read_bytes())
    asked = ("--text", TEXTS[0], "--json")
    assert privet("predict", alone, *asked)[1] == privet("predict", run, *asked)[1]
    (alone / STUDY).unlink()
    with pytest.raises(StateError, match="neither a run directory nor a release"):
        open_release(alone)


# --- spans ---------------------------------------------------------------------------------------------------


def test_words_and_spans_are_places_in_the_text() -> None:
    text = "Chest  pain, unspecific (since Monday)."
    words = [text[start:end] for start, end in split_words(text)]
    assert words == ["Chest", "pain", ",", "unspecific", "(", "since", "Monday", ")", "."]
    tags = ["B-sign", "I-sign", "O", "I-sign", "O", "O", "B-time", "I-sign", "O"]
    spans = spans_of(text, split_words(text), tags, [0.9, 0.8] + [0.7] * 7)
    assert [(span["label"], span["text"], span["probability"]) for span in spans] == [
        ("sign", "Chest  pain", 0.8),
        ("sign", "unspecific", 0.7),
        ("time", "Monday", 0.7),
        ("sign", ")", 0.7),
    ]
    assert all(text[span["start"] : span["end"]] == span["text"] for span in spans)


def test_tags_are_those_of_one_sentence_at_a_time(tmp_path: Path, bert: Path) -> None:
    run, study = run_of(tmp_path / "run", bert, "token-classification")
    lists = [text.split() for text in (*TEXTS, "xylography of the wrist")]
    release = open_release(run)
    with mounted(release, CPU) as host:
        results = predict(host, study, [*lists, TEXTS[0], ["  "]])
        assert [result["tags"] for result in results[:4]] == [predict_tags(host, study, words) for words in lists]
        assert results[4]["tags"] == results[0]["tags"]
        assert results[5] == {REASON: "no text"}
        (long,) = predict(host, study, [["man"] * 40])
        assert len(long["tags"]) == 40
        assert long["cut"]


# --- answers -------------------------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_the_evaluation(tmp_path: Path, bases: Mapping[str, Path]) -> None:
    run, study = run_of(tmp_path / "run", bases["llama-chat"], "causal-lm", {"task.system_prompt": "one two"})
    with mounted(open_release(run), CPU) as host:
        found = predict(host, study, [*TEXTS, None, [{"role": "user", "content": TEXTS[1]}], [{"role": "system"}]])
        assert [row["answer"] for row in found[:3]] == greedy_answers(host, study, TEXTS)
        assert found[3] == {REASON: "no text"}
        assert found[4]["answer"] == found[1]["answer"]
        assert REASON in found[5]
        begun = [{"role": "assistant", "content": "one"}, {"role": "user", "content": "two"}]
        assert predict(host, study, [begun, TEXTS[0]])[1] == found[0]
        (long,) = predict(host, study, ["man " * 200])
        assert "room for 122" in long[REASON]


def test_a_seed_decides_what_is_drawn(tmp_path: Path, llama: Path) -> None:
    run, study = run_of(tmp_path / "run", llama, "causal-lm")
    with mounted(open_release(run), CPU) as host:
        prompts = [prompt_ids(study, host.tokenizer, text) for text in TEXTS]

        def drawn(seed: int, **more: Any) -> list[str]:
            return [a.text for a in answers(host, study, prompts, Sampling(2.0, max_new_tokens=20, seed=seed, **more))]

        assert drawn(1) == drawn(1) != drawn(2)
        greedy = [a.text for a in answers(host, study, prompts, Sampling(max_new_tokens=20))]
        assert drawn(1, top_p=1e-6) == greedy


def test_answers_end_with_the_turn(tmp_path: Path, bases: Mapping[str, Path]) -> None:
    run, study = run_of(tmp_path / "run", bases["llama-chat"], "causal-lm")
    with mounted(open_release(run), CPU, scoring=False) as host:
        assert stop_tokens(host, study) == [host.tokenizer.eos_token]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_stream_says_what_the_answer_is(tmp_path: Path, bases: Mapping[str, Path], family: str) -> None:
    run, study = run_of(tmp_path / "run", bases[family], "causal-lm")
    with mounted(open_release(run), CPU) as host:
        prompt, asked = prompt_ids(study, host.tokenizer, TEXTS[0]), Sampling(max_new_tokens=30)
        (whole,) = answers(host, study, [prompt], asked)
        pieces: list[str] = []
        streamed = stream(host, study, prompt, asked, pieces.append)
        assert "".join(pieces).strip() == streamed.text == whole.text
        assert (streamed.tokens, streamed.finished) == (whole.tokens, whole.finished)
        assert len(pieces) > 3
        stop = whole.text[10:14]
        early = stream(host, study, prompt, asked, lambda piece: None, (stop,))
        assert early.text == whole.text[: whole.text.find(stop)].strip()
        assert early.finished
        some: list[str] = []
        stopped = stream(host, study, prompt, asked, some.append, cancelled=lambda: len(some) >= 2)
        assert stopped.tokens < whole.tokens


@pytest.mark.parametrize("form", ["messages", "instruction"])
def test_a_file_in_the_study_s_form_needs_no_answers(
    privet: Run, tmp_path: Path, bases: Mapping[str, Path], form: str
) -> None:
    columns = {"messages": ["messages"], "instruction": ["instruction", "input", "output"]}[form]
    change = {"data.columns": {name: name for name in columns}}
    run, _ = run_of(tmp_path / "run", bases["llama-chat"], "causal-lm", change)
    chat = [{"role": "user", "content": "one\n\ntwo"}, {"role": "assistant", "content": "never read"}]
    row: dict[str, Any] = {"messages": chat} if form == "messages" else {"instruction": "one", "input": "two"}
    code, out, err = privet("predict", run, "--data", write_rows(tmp_path / "in.jsonl", [row]))
    assert code == 0, err
    asked = json.loads(privet("predict", run, "--text", "one\n\ntwo", "--json")[1])
    assert results_of(out)[0]["prediction"] == asked[0]


def test_a_chat_that_the_template_refuses_is_one_row_s_reason(tmp_path: Path, bases: Mapping[str, Path]) -> None:
    base = shutil.copytree(bases["llama-chat"], tmp_path / "base")
    template = base / "chat_template.jinja"
    rule = "{% if messages[-1].content == 'six' %}{{ raise_exception('no') }}{% endif %}"
    template.write_text(rule + template.read_text())
    run, study = run_of(tmp_path / "run", base, "causal-lm")
    with mounted(open_release(run), CPU, scoring=False) as host:
        refused, answered = predict(host, study, ["six", "one"])
    assert "template" in refused[REASON]
    assert "six" not in refused[REASON]
    assert "answer" in answered


def test_all_labels_are_shown_up_to_ten_and_the_rest_are_counted() -> None:
    shown = _readable({"probabilities": {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}})
    assert shown == "d 40.0 %   c 30.0 %   b 20.0 %   a 10.0 %"
    many = _readable({"probabilities": {f"label {number}": 1 / 12 for number in range(12)}})
    assert many.count("%") == 10
    assert many.endswith("and 2 less probable labels")
