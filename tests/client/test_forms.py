"""The forms in which records are held: what each becomes, and what is refused with counts and without contents."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.client.training.data import load_records
from privet.client.training.forms import (
    prompt_of,
    reference_of,
    split_words,
    tagged,
    turns_of,
    written_row,
)
from privet.common.errors import StudyError
from privet.common.study.sections import FORMS
from privet.common.study.study import Study
from tests.client.test_data import SECRET, make_study, refusal, write

USER, ASSISTANT = {"role": "user", "content": "Is it a rash?"}, {"role": "assistant", "content": "Yes."}
SYSTEM = {"role": "system", "content": "Be brief."}
MESSAGES = {"messages": "messages"}
SPANS = {"text": "text", "spans": "spans"}
SUFFIXES = (".csv", ".jsonl", ".parquet")


def chats(tmp_path: Path, *conversations: Any, suffix: str = ".jsonl") -> Path:
    as_text = suffix == ".csv"
    rows = [{"messages": json.dumps(turns) if as_text else turns} for turns in conversations]
    return write(tmp_path, suffix, rows)


def with_prompt(study: Study, prompt: str) -> Study:
    return Study.parse({**study.document(), "task": {**study.document()["task"], "system_prompt": prompt}})


# --- conversations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_messages_become_turns_up_to_the_last_answer(tmp_path: Path, suffix: str) -> None:
    turns = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": " ﬁne?\r\n now "}, ASSISTANT, USER]
    study = make_study("causal-lm", MESSAGES)
    records, report = load_records(chats(tmp_path, turns, [USER, ASSISTANT], suffix=suffix), study)
    (first, second) = records.rows
    assert first == {"messages": [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "fine?\n now"}, ASSISTANT]}
    assert prompt_of(first) == first["messages"][:-1]
    assert reference_of(first) == "Yes."
    assert (report.rows_read, report.kept, report.dropped) == (2, 2, {})
    prompted = with_prompt(study, "Long.")
    assert turns_of(prompted, first)[0] == SYSTEM, "a conversation's own system message wins"
    assert turns_of(prompted, second) == [{"role": "system", "content": "Long."}, USER, ASSISTANT]
    assert turns_of(study, second) == [USER, ASSISTANT]


def test_text_parts_are_joined_and_empty_system_messages_left_out(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Is it"}, {"type": "text", "text": " a rash?"}]
    turns = [{"role": "system", "content": " "}, {"role": "user", "content": parts}, {**ASSISTANT, "tool_calls": []}]
    records, _ = load_records(chats(tmp_path, turns), make_study("causal-lm", MESSAGES))
    assert records.rows == ({"messages": [USER, ASSISTANT]},)


def test_conversations_without_an_answer_are_dropped_and_counted(tmp_path: Path) -> None:
    empty = {"role": "assistant", "content": " "}
    conversations = [[USER], [], [ASSISTANT], [SYSTEM, ASSISTANT], [USER, empty], [USER, ASSISTANT], None]
    _, report = load_records(chats(tmp_path, *conversations), make_study("causal-lm", MESSAGES))
    assert report.dropped == {
        "missing value": 1,
        "empty text": 1,
        "no user's turn before the answer": 2,
        "no assistant's turn": 2,
    }


@pytest.mark.parametrize(
    ("turns", "fault"),
    [
        ([{"role": SECRET, "content": "a"}, ASSISTANT], "a role that is not system, user, assistant"),
        ([USER, SYSTEM, ASSISTANT], "a system message that is not the first message, or a second one"),
        ([SYSTEM, SYSTEM, USER, ASSISTANT], "a system message that is not the first message, or a second one"),
        ([USER, {"role": "tool", "content": SECRET}, ASSISTANT], "call tools, which are not supported"),
        ([USER, {**ASSISTANT, "tool_calls": [{"name": SECRET}]}], "call tools, which are not supported"),
        ([USER, {**ASSISTANT, "weight": 0}], "a message with a weight"),
        ([USER, {"role": "assistant", "content": [{"type": "image", "url": SECRET}]}], "content is not text"),
        ([{"from": "human", "value": SECRET}], "rename them to `role` and `content`"),
        ([SECRET], "a value that is not a list of messages"),
    ],
)
def test_conversations_that_are_none_are_refused_with_counts(tmp_path: Path, turns: list[Any], fault: str) -> None:
    message = refusal(chats(tmp_path, turns, [USER, ASSISTANT]), make_study("causal-lm", MESSAGES))
    assert "the column messages holds " in message
    assert fault in message
    assert "in 1 of 2 rows" in message


def test_a_string_that_is_no_list_is_of_the_wrong_type(tmp_path: Path) -> None:
    path = write(tmp_path, ".csv", [{"messages": f"[{SECRET}"}])
    assert "expected lists of {role, content}" in refusal(path, make_study("causal-lm", MESSAGES))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_instructions_become_prompts(tmp_path: Path, suffix: str) -> None:
    columns = {"instruction": "instruction", "input": "input", "output": "output"}
    rows = [
        {"instruction": "Translate.", "input": "Haut", "output": "skin"},
        {"instruction": "Translate Haut.", "input": "", "output": "skin"},
        {"instruction": " ", "input": "Haut", "output": "skin"},
    ]
    path = write(tmp_path, suffix, rows)
    records, report = load_records(path, make_study("causal-lm", columns))
    assert [row["prompt"] for row in records.rows] == ["Translate.\n\nHaut", "Translate Haut."]
    assert report.dropped == {"empty text": 1}
    del columns["input"]
    records, _ = load_records(path, make_study("causal-lm", columns))
    assert records.rows[0] == {"prompt": "Translate.", "answer": "skin"}


def test_a_file_in_another_form_says_how_a_study_reads_it(tmp_path: Path) -> None:
    message = refusal(chats(tmp_path, [USER, ASSISTANT]), make_study("causal-lm"))
    assert 'a study of kind causal-lm reads these with data.columns = { messages = "messages" }' in message


def test_columns_of_two_forms_are_refused_with_all_forms() -> None:
    with pytest.raises(StudyError, match="prompt; or messages; or instruction, output") as caught:
        make_study("causal-lm", {"prompt": "p", "messages": "m"})
    assert "optional: input" in str(caught.value)


# --- labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_integers_are_places_of_labels(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix, [{"text": text, "label": label} for text, label in (("a", 2), ("b", 0))])
    records, _ = load_records(path, make_study(labels=("skin", "heart", "bone")))
    assert [row["label"] for row in records.rows] == [2, 0]
    beyond = write(tmp_path, suffix, [{"text": "a", "label": 3}])
    assert "others in 1 of 1 rows" in refusal(beyond, make_study(labels=("skin", "heart", "bone")))


def test_labels_that_are_digits_are_names(tmp_path: Path) -> None:
    path = write(tmp_path, ".jsonl", [{"text": "a", "label": 2}, {"text": "b", "label": "1"}])
    assert [row["label"] for row in load_records(path, make_study(labels=("1", "2")))[0].rows] == [1, 0]
    zero = write(tmp_path, ".jsonl", [{"text": "a", "label": 0}])
    assert "others in 1 of 1 rows" in refusal(zero, make_study(labels=("1", "2")))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_integers_are_places_of_tags(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix, [{"tokens": ["a", "b", "c"], "tags": [0, 1, 2]}])
    assert load_records(path, make_study("token-classification"))[0].rows[0]["tags"] == [0, 1, 2]


# --- texts with spans ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_spans_become_tags_of_words(tmp_path: Path, suffix: str) -> None:
    spans: list[dict[str, Any]] = [{"start": 9, "end": 19, "label": "d"}, {"start": 21, "end": 26, "label": "d"}]
    text = "No acute rash-fever, cough."
    assert [text[span["start"] : span["end"]] for span in spans] == ["rash-fever", "cough"]
    row = {"text": text, "spans": json.dumps(spans) if suffix == ".csv" else spans}
    records, _ = load_records(write(tmp_path, suffix, [row]), make_study("token-classification", SPANS))
    (found,) = records.rows
    assert found["tokens"] == ["No", "acute", "rash", "-", "fever", ",", "cough", "."]
    assert found["tags"] == [0, 0, 1, 2, 2, 0, 1, 0]
    assert [text[s:e] for s, e in found["places"]] == found["tokens"]
    assert written_row(make_study("token-classification", SPANS), found) == {"text": text, "spans": spans}


def test_a_span_inside_a_word_cuts_it(tmp_path: Path) -> None:
    row = {"text": "prekidney1", "spans": [{"start": 3, "end": 9, "label": "d"}]}
    records, _ = load_records(write(tmp_path, ".jsonl", [row]), make_study("token-classification", SPANS))
    assert (records.rows[0]["tokens"], records.rows[0]["tags"]) == (["pre", "kidney", "1"], [0, 1, 0])


@pytest.mark.parametrize(
    ("spans", "fault"),
    [
        ([{"start": 0, "end": 3, "label": "d"}, {"start": 2, "end": 4, "label": "d"}], "spans that overlap"),
        ([{"start": 0, "end": 99, "label": "d"}], "a span outside its text"),
        ([{"start": 2, "end": 2, "label": "d"}], "or of no length"),
        ([{"start": -1, "end": 2, "label": "d"}], "a span outside its text"),
        ([{"start": 3, "end": 4, "label": "d"}], "a span of white space alone"),
        ([{"start": 0, "end": 3, "label": SECRET}], "a span whose label is not d"),
        ([{"start": 0, "end": "3", "label": "d"}], "without integers start and end"),
        ([{"start": 0, "end": True, "label": "d"}], "without integers start and end"),
    ],
)
def test_spans_that_do_not_fit_are_refused_with_counts(tmp_path: Path, spans: list[Any], fault: str) -> None:
    rows = [{"text": "one two", "spans": spans}, {"text": "one", "spans": []}]
    message = refusal(write(tmp_path, ".jsonl", rows), make_study("token-classification", SPANS))
    assert fault in message
    assert "in 1 of 2 rows" in message


@given(
    st.text(st.sampled_from("aé\u0301ﬁ㎏ xy.-1"), min_size=1, max_size=20),
    st.data(),
)
def test_normalisation_shifts_no_span(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    joined = any(place < len(text) and unicodedata.combining(text[place]) for place in (start, end))
    if joined or not text[start:end].strip():
        return
    row = tagged(text, [{"start": start, "end": end, "label": "d"}], ("O", "B-d", "I-d"), as_nfkc)
    inside = "".join(token for token, tag in zip(row["tokens"], row["tags"], strict=True) if tag)
    assert inside == "".join(as_nfkc(text[start:end]).split())
    assert row["text"] == as_nfkc(text)
    assert [row["text"][s:e] for s, e in row["places"]] == row["tokens"]


def as_nfkc(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def test_words_keep_their_combining_marks() -> None:
    text = "ज्वर है, 5 mg"  # fever is, 5 mg
    assert [text[s:e] for s, e in split_words(text)] == ["ज्वर", "है", ",", "5", "mg"]


def test_words_and_tags_do_not_fit_a_study_of_spans() -> None:
    assert written_row(make_study("token-classification", SPANS), {"tokens": ["a"], "tags": [1]}) is None


def test_a_conversation_is_written_back_as_it_was_read(tmp_path: Path) -> None:
    for columns, row in (
        (MESSAGES, {"messages": [SYSTEM, USER, ASSISTANT]}),
        ({"instruction": "instruction", "output": "output"}, {"instruction": "a", "output": "b"}),
        ({"prompt": "prompt", "answer": "answer"}, {"prompt": "a", "answer": "b"}),
        ({role: role for role in ("prompt", "chosen", "rejected")}, {"prompt": "a", "chosen": "b", "rejected": "c"}),
        (
            {role: role for role in ("messages", "chosen", "rejected")},
            {"messages": [SYSTEM, USER], "chosen": "b", "rejected": "c"},
        ),
    ):
        study = make_study("preference" if "chosen" in columns else "causal-lm", columns)
        (found,) = load_records(write(tmp_path, ".jsonl", [row]), study)[0].rows
        assert written_row(study, found) == row


def documented() -> list[tuple[str, dict[str, Any]]]:
    """Return the task and the example of each row of the table in the docs."""
    text = (Path(__file__).parents[2] / "docs" / "researcher.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if any(f"| {kind} |" in line for kind in FORMS)]
    return [(kind.strip(), json.loads(example.strip().strip("`"))) for kind, _, example in rows]


def test_the_docs_show_every_form_by_an_example_that_is_read(tmp_path: Path) -> None:
    examples = documented()
    assert len(examples) == sum(map(len, FORMS.values()))
    for kind, row in examples:
        labels = {"text-classification": ["skin", "bone"], "token-classification": ["O", "B-sign", "I-sign"]}.get(kind)
        study = make_study(kind, {role: role for role in row}, labels=labels)
        records, report = load_records(write(tmp_path, ".jsonl", [row]), study)
        assert (len(records), report.dropped) == (1, {})
