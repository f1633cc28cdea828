"""Apply a trained adapter to texts: classes with probabilities, tagged spans, or answers.

A row without text gets an empty result with a reason, so every row has one result.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, TextIO

import torch

from privet.client.formats import FileFormat
from privet.client.release.counts import CUT, FINISHED, NO_SPAN, Counts, Outcome
from privet.client.release.generation import Answer, Sampling, answers, room_for
from privet.client.release.tables import PREDICTION, Survey, survey, writing
from privet.client.training.data import Records
from privet.client.training.features import Feature, encode_records, prompt_ids
from privet.client.training.files import PLAIN, Row, read_rows
from privet.client.training.forms import TURN_ROLES, instruction_prompt, read_list, split_words
from privet.client.training.host import ModelHost
from privet.client.training.spelled import AS_TEXT
from privet.client.training.tasks import collate, forward
from privet.common.errors import DataError
from privet.common.study.sections import GENERATING
from privet.common.study.study import Study

Result = dict[str, Any]
Tell = Callable[[int], None]
"""Called with the number of rows that are done."""
REASON = "reason"
NO_TEXT, NO_TURN, LONG = "no text", "no user's turn", "the prompt has"
_BATCH = dict.fromkeys(GENERATING, 16)
_GREEDY = Sampling()
# Roles of the columns that predictions are made from, and names that are tried where the study's is absent.
_ROLES = ("text", "tokens", "messages", "prompt", "instruction")
_OTHERS = {"text-classification": ("text",), "token-classification": ("text", "tokens")}


def wanted_columns(study: Study, column: str | None = None) -> tuple[str, ...]:
    """Return the names of columns that may hold what is predicted from, best first. No label is needed."""
    if column is not None:
        return (column,)
    named = [study.data.columns[role] for role in _ROLES if role in study.data.columns]
    return tuple(dict.fromkeys([*named[:1], *_OTHERS.get(study.task.kind, ("prompt", "messages"))]))


def predict(host: ModelHost, study: Study, inputs: Sequence[Any], sampling: Sampling = _GREEDY) -> list[Result]:
    """Return one result for each input.

    Args:
        host: The model with the adapter mounted, its lock held by the caller.
        study: What was agreed.
        inputs: Texts; for token-classification also lists of words; for language models also chats (lists of messages).
        sampling: How answers are generated.

    Returns:
        The most probable `label`, and `probabilities` by label; or `words`, `tags` and `spans`, whose `start` and `end`
        are characters of the text (of the words joined by spaces, where there is no text); or an `answer`, whether it
        `finished`, and its number of `tokens`. `cut` says that a text was longer than the study's length. Without a
        text, `reason` says so, and all else is missing.
    """
    kind, size = study.task.kind, _BATCH.get(study.task.kind, 32)
    found: list[Result] = [{REASON: _reason(kind, value)} for value in inputs]
    todo = [index for index, result in enumerate(found) if not result[REASON]]
    for start in range(0, len(todo), size):
        rows = todo[start : start + size]
        batch = [inputs[row] for row in rows]
        if kind == "text-classification":
            results = _classified(host, study, batch)
        elif kind == "token-classification":
            results = _tagged(host, study, batch)
        else:
            results = _answered(host, study, batch, sampling, start)
        for row, result in zip(rows, results, strict=True):
            found[row] = result
    return found


def _reason(kind: str, value: Any) -> str:
    """Return why there can be no result for a value; empty if there can."""
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return NO_TEXT
    if isinstance(value, str):
        return ""
    if isinstance(value, list) and kind == "token-classification" and all(isinstance(word, str) for word in value):
        return "" if any(word.strip() for word in value) else NO_TEXT
    if isinstance(value, list) and kind in GENERATING and all(map(_is_message, value)):
        return "" if any(turn["role"] == "user" for turn in value) else NO_TURN
    return f"not text, but {type(value).__name__}"


def _is_message(value: Any) -> bool:
    # A template writes the role as it is, so no other text may stand there.
    return isinstance(value, dict) and value.get("role") in TURN_ROLES and isinstance(value.get("content"), str)


def _normal(study: Study, text: str) -> str:
    return text if study.data.unicode == "none" else unicodedata.normalize(study.data.unicode, text)


def _records(rows: Sequence[Row]) -> Records:
    return Records(tuple(rows), tuple(map(str, range(len(rows)))))


@torch.no_grad()
def _logits(host: ModelHost, features: Sequence[Feature]) -> torch.Tensor:
    return forward(host, collate(host, features)).float()


def _classified(host: ModelHost, study: Study, texts: Sequence[str]) -> list[Result]:
    rows: list[Row] = [{"text": " ".join(_normal(study, text).split()), "label": 0} for text in texts]
    features = encode_records(study, host.tokenizer, _records(rows))
    probabilities = _logits(host, features).softmax(-1).tolist()
    return [
        {
            "label": max(zip(found, study.task.labels, strict=True), key=itemgetter(0))[1],
            "probabilities": dict(zip(study.task.labels, found, strict=True)),
            **_cut(host, study, feature, row["text"]),
        }
        for found, feature, row in zip(probabilities, features, rows, strict=True)
    ]


def _cut(host: ModelHost, study: Study, feature: Feature, text: str) -> Result:
    size = len(feature.ids)
    long = size >= study.data.max_length and len(host.tokenizer(text, **AS_TEXT)["input_ids"]) > size
    return {"cut": True} if long else {}


def _tagged(host: ModelHost, study: Study, values: Sequence[str | list[str]]) -> list[Result]:
    texts = [value if isinstance(value, str) else " ".join(value) for value in values]
    places = [split_words(value) if isinstance(value, str) else _joined(value) for value in values]
    words = [[text[start:end] for start, end in where] for text, where in zip(texts, places, strict=True)]
    # The number of a word stands where its tag would, so the features say at which token each word's tag is decided.
    rows: list[Row] = []
    for value, where, each in zip(values, places, words, strict=True):
        row = {"tokens": [_normal(study, word).strip() for word in each], "tags": list(range(len(each)))}
        # Normalisation may change lengths. The words then stand in a text of their own.
        same = isinstance(value, str) and _normal(study, value) == value
        rows.append({**row, "text": value, "places": where} if same else row)
    features = encode_records(study, host.tokenizer, _records(rows))
    probabilities = _logits(host, features).softmax(-1)
    results = []
    for text, where, own, feature, row in zip(texts, places, words, features, probabilities, strict=True):
        tags, sure = ["O"] * len(own), [0.0] * len(own)
        labels = () if isinstance(feature.labels, int) else feature.labels
        for position, word in enumerate(labels):
            if word >= 0:
                best = int(row[position].argmax())
                tags[word], sure[word] = study.task.labels[best], float(row[position][best])
        cut = {"cut": True} if sum(word >= 0 for word in labels) < len(own) else {}
        results.append({"words": own, "tags": tags, "spans": spans_of(text, where, tags, sure), **cut})
    return results


def _joined(words: Sequence[str]) -> list[tuple[int, int]]:
    """Return where each word lies in the words joined by spaces."""
    places, start = [], 0
    for word in words:
        places.append((start, start + len(word)))
        start += len(word) + 1
    return places


def spans_of(
    text: str, places: Sequence[tuple[int, int]], tags: Sequence[str], sure: Sequence[float]
) -> list[dict[str, Any]]:
    """Join tagged words (IOB2) to spans. An I-tag that continues nothing begins a span, as it does in scoring.

    Args:
        text: The text.
        places: Where each word begins and ends in it, in characters.
        tags: One for each word.
        sure: Probability of each tag.

    Returns:
        For each span `label`, `start`, `end`, `text`, and the lowest `probability` of its tags.
    """
    spans: list[dict[str, Any]] = []
    before = "O"
    for (start, end), tag, probability in zip(places, tags, sure, strict=True):
        mark, _, label = tag.partition("-")
        if mark == "I" and before[2:] == label:
            spans[-1] |= {"end": end, "probability": min(spans[-1]["probability"], probability)}
        elif label:
            spans.append({"label": label, "start": start, "end": end, "probability": probability})
        before = tag
    return [{**span, "text": text[span["start"] : span["end"]]} for span in spans]


def _answered(host: ModelHost, study: Study, values: Sequence[Any], sampling: Sampling, offset: int) -> list[Result]:
    room = room_for(host)
    most = None if room is None else room - sampling.most(study)
    results: list[Result] = []
    prompts: dict[int, list[int]] = {}
    for row, value in enumerate(values):
        try:
            ids = prompt_of(host, study, value)
        except DataError as error:  # of this conversation; an unusable template is an error for all
            results.append({REASON: error.message})
            continue
        long = most is not None and len(ids) > most
        results.append({REASON: f"{LONG} {len(ids)} tokens, and the model has room for {most}"} if long else {})
        if not long:
            prompts[row] = ids
    found = answers(host, study, list(prompts.values()), sampling, offset) if prompts else []
    for row, answer in zip(prompts, found, strict=True):
        results[row] = _answer_row(answer)
    return results


def _answer_row(answer: Answer) -> Result:
    return {"answer": answer.text, "finished": answer.finished, "tokens": answer.tokens}


def prompt_of(host: ModelHost, study: Study, value: str | list[dict[str, str]]) -> list[int]:
    """Return the tokens of a prompt, or of a chat up to the last user's turn, normalised as in training."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    last = max(place for place, turn in enumerate(value) if turn["role"] == "user")
    turns = [
        {"role": turn["role"], "content": _normal(study, turn["content"]).replace("\r\n", "\n").strip()}
        for turn in value[: last + 1]
    ]
    return list(prompt_ids(study, host.tokenizer, turns))


def flat(study: Study, result: Result) -> Row:
    """Return a result as values of CSV columns: the same columns for every result of a study."""
    reason = {f"{PREDICTION}_{REASON}": result.get(REASON)}
    if study.task.kind == "text-classification":
        every = result.get("probabilities", {})
        best = max(every, key=every.__getitem__) if every else None
        by_label = {f"{PREDICTION}_{label}": every.get(label) for label in study.task.labels}
        return {PREDICTION: best, **by_label, **reason}
    if study.task.kind == "token-classification":
        return {PREDICTION: result.get("spans"), **reason}
    return {PREDICTION: result.get("answer"), f"{PREDICTION}_finished": result.get("finished"), **reason}


def count(counts: Counts, value: Any, result: Result) -> None:
    """Count a result, and of its input the length alone."""
    if reason := result.get(REASON):
        none = reason in (NO_TEXT, NO_TURN)
        counts.refused("no_text" if none else "too_long" if reason.startswith(LONG) else "malformed")
        return
    size = characters(value)
    if "probabilities" in result:
        label, sure = max(result["probabilities"].items(), key=lambda item: item[1])
        counts.answered(Outcome(size, (label,), (sure,)))
    elif "spans" in result:
        spans = result["spans"]
        labels = tuple(span["label"] for span in spans) or (NO_SPAN,)
        counts.answered(Outcome(size, labels, tuple(span["probability"] for span in spans)))
    else:
        counts.answered(Outcome(size, (FINISHED if result["finished"] else CUT,), tokens=result["tokens"]))


def characters(value: Any) -> int:
    """Return the length of an input: of a text, of words joined by spaces, or of all messages of a chat."""
    if isinstance(value, str):
        return len(value)
    parts = [part if isinstance(part, str) else part["content"] for part in value]
    return sum(map(len, parts)) + (len(parts) - 1 if isinstance(value[0], str) else 0)


def _input(study: Study, column: str, row: Row) -> Any:
    """Return what a row is predicted from: a text, words or a chat; of an instruction, with its input."""
    value = row.get(column)
    if study.task.kind == "text-classification" or column == study.data.columns.get("prompt"):
        return value
    if isinstance(value, str) and column == study.data.columns.get("instruction"):
        context = row.get(study.data.columns.get("input", ""))
        return instruction_prompt(value, context if isinstance(context, str) else None)
    listed = read_list(value)  # CSV holds lists as JSON
    return listed if isinstance(listed, list) else value


def look(data: Path, study: Study, column: str | None, kept: str | None, form: FileFormat = PLAIN) -> Survey:
    """Read the file to predict on once, before the base is loaded. Raises as `survey`."""
    return survey(data, wanted_columns(study, column), kept, form)


def predict_file(
    host: ModelHost,
    study: Study,
    data: Path,
    found: Survey,
    out: Path | None,
    screen: TextIO,
    tell: Tell,
    sampling: Sampling = _GREEDY,
    form: FileFormat = PLAIN,
    counts: Counts | None = None,
) -> int:
    """Predict on every row of a file, in order, and write each with its result. Return the number of rows without one.

    Args:
        host: The model with the adapter mounted, its lock held by the caller.
        study: What was agreed.
        data: A data file of any kind.
        found: What `look` found in it.
        out: New CSV or JSON Lines file; None writes JSON Lines to `screen`.
        screen: Standard output.
        tell: Told the number of finished rows, after each batch.
        sampling: How answers are generated.
        form: How the file is written.
        counts: Counts the results, if they are counted.

    Raises:
        DataError: The file is malformed.
        StateError: `out` exists, or cannot be written.
        StudyError: `out` has another ending.
    """
    size, done, empty = _BATCH.get(study.task.kind, 32), 0, 0
    rows: Iterator[Row] = read_rows(data, form)
    with writing(out, screen, found.names, lambda result: flat(study, result)) as write:
        while batch := list(islice(rows, size)):
            own = Sampling(sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.seed + done)
            inputs = [_input(study, found.column, row) for row in batch]
            results = predict(host, study, inputs, own)
            empty += sum(bool(result.get(REASON)) for result in results)
            kept = [{name: row[name] for name in found.names if name in row} for row in batch]
            write([{**row, PREDICTION: result} for row, result in zip(kept, results, strict=True)])
            if counts is not None:
                for value, result in zip(inputs, results, strict=True):
                    count(counts, value, result)
            done += len(batch)
            tell(done)
    return empty
