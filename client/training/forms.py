"""The forms in which people hold records, and what each becomes: labels, spans, conversations.

Functions named `*_fault` say what is wrong with a value in words that quote nothing of it, so that faults can be
counted.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from privet.common.study.study import Study

Turn = dict[str, str]
"""One message of a conversation: `role` and `content`."""

TURN_ROLES = ("system", "user", "assistant")
# Fields of a message that change what it means. They are refused rather than ignored.
_CALLS = ("tool_calls", "function_call", "tool_call_id")
_ASCII_WORD = re.compile(r"\w+|[^\w\s]")


# --- labels ----------------------------------------------------------------------------------------------


class Places:
    """The places of labels: by name, or by number where no name is a number.

    A number counts from 0, as data sets with integers as classes do. Where the study's labels are themselves numbers,
    a value is a name: `1` is then the label "1", wherever it stands.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        """Take the study's labels, in order."""
        self._of: dict[str, int] = {label: place for place, label in enumerate(labels)}
        if not any(label.strip().isdigit() for label in labels):
            self._of = {str(place): place for place in range(len(labels))} | self._of

    def __contains__(self, value: object) -> bool:
        """Return whether a value is the name or the place of a label."""
        return str(value) in self._of

    def __getitem__(self, value: str | int) -> int:
        """Return the place of a label."""
        return self._of[str(value)]


# --- lists -----------------------------------------------------------------------------------------------


def read_list(value: Any) -> Any:
    """Return a value; a string that holds a JSON list, as CSV files do, as that list."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


# --- texts with spans ------------------------------------------------------------------------------------


def kinds_of(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the kinds of spans that the labels of token classification name, in order."""
    return tuple(label[2:] for label in labels if label.startswith("B-"))


def span_fault(text: str, spans: Sequence[Any], kinds: Sequence[str]) -> str:
    """Return what is wrong with the spans of a text; empty if nothing is."""
    if not all(isinstance(span, Mapping) and _is_span(span) for span in spans):
        return "a span without integers start and end and a string label"
    if any(span["label"] not in kinds for span in spans):
        return f"a span whose label is not {' or '.join(kinds)}"
    places = sorted((span["start"], span["end"]) for span in spans)
    if any(not 0 <= start < end <= len(text) for start, end in places):
        return "a span outside its text, or of no length"
    if any(end > start for (_, end), (start, _) in pairwise(places)):
        return "spans that overlap"
    if any(not text[start:end].strip() for start, end in places):
        return "a span of white space alone"
    return ""


def _is_span(span: Mapping[str, Any]) -> bool:
    whole = all(isinstance(span.get(key), int) and not isinstance(span.get(key), bool) for key in ("start", "end"))
    return whole and isinstance(span.get("label"), str)


def tagged(
    text: str, spans: Sequence[Mapping[str, Any]], labels: Sequence[str], normalise: Callable[[str], str]
) -> dict[str, Any]:
    """Return a text with spans as words with tags: `text`, and of each word its token, tag and `places` in the text.

    Args:
        text: As the file gives it. Spans count its code points.
        spans: Without faults.
        labels: Of the study.
        normalise: Unicode normalisation. It may change lengths, so places are counted again in its result.
    """
    clean = normalise(text)
    cuts = {0: 0, len(text): len(clean)}
    for span in spans:
        for place in (span["start"], span["end"]):
            cuts[place] = place if clean == text else min(len(normalise(text[:place])), len(clean))
    bounds = sorted((cuts[span["start"]], cuts[span["end"]], span["label"]) for span in spans)
    words = split_words(clean, [place for start, end, _ in bounds for place in (start, end)])
    tags = [labels.index("O")] * len(words)
    word = 0
    for start, end, kind in bounds:
        first = True
        while word < len(words) and words[word][0] < end:
            if words[word][0] >= start:
                tags[word] = labels.index(f"{'B' if first else 'I'}-{kind}")
                first = False
            word += 1
    return {"tokens": [clean[s:e] for s, e in words], "tags": tags, "text": clean, "places": [list(w) for w in words]}


def split_words(text: str, cuts: Sequence[int] = ()) -> list[tuple[int, int]]:
    """Return the places of a text's words and marks [start, end), each cut at `cuts` as well.

    A word is a run of letters, digits, `_` and combining marks. Every other character but white space is its own word.
    """
    found = [match.span() for match in _ASCII_WORD.finditer(text)] if text.isascii() else _wide_words(text)
    if not cuts:
        return found
    inner = sorted(set(cuts))
    pieces: list[tuple[int, int]] = []
    place = 0
    for start, end in found:
        while place < len(inner) and inner[place] <= start:
            place += 1
        while place < len(inner) and inner[place] < end:
            pieces.append((start, inner[place]))
            start = inner[place]
            place += 1
        pieces.append((start, end))
    return pieces


def _wide_words(text: str) -> list[tuple[int, int]]:
    words: list[tuple[int, int]] = []
    joined = False
    for place, character in enumerate(text):
        inside = character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")
        if inside and joined:
            words[-1] = words[-1][0], place + 1
        elif not character.isspace():
            words.append((place, place + 1))
        joined = inside
    return words


# --- conversations ---------------------------------------------------------------------------------------


def turns_fault(turns: Any) -> str:
    """Return what is wrong with a conversation; empty if nothing is."""
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        return "a value that is not a list of messages"
    if any("from" in turn and "role" not in turn for turn in turns):
        return "messages with `from` and `value` (rename them to `role` and `content`)"
    if any(turn.get(key) for turn in turns for key in _CALLS) or any(turn.get("role") == "tool" for turn in turns):
        return "messages that call tools, which are not supported"
    if any(turn.get("role") not in TURN_ROLES for turn in turns):
        return f"a role that is not {', '.join(TURN_ROLES)}"
    if any(turn.get("weight") not in (None, 1) for turn in turns):
        return "a message with a weight (remove it, and set task.train_on)"
    if any(_content(turn) is None for turn in turns):
        return "a message whose content is not text"
    if any(turn["role"] == "system" for turn in turns[1:]):
        return "a system message that is not the first message, or a second one"
    return ""


def _content(turn: Mapping[str, Any]) -> str | None:
    """Return the text of a message; None if it has none. A list of parts, all of them text, is joined."""
    content = turn.get("content")
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        texts = [part.get("text") for part in content]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else None
    return content if isinstance(content, str) else None


def cleaned(turns: Sequence[Mapping[str, Any]], clean: Callable[[str], str], last: str = "assistant") -> list[Turn]:
    """Return a conversation without faults as turns, up to the last turn of a role.

    What follows the assistant's last turn is context of no answer. A system message without text is left out.

    Args:
        turns: The conversation.
        clean: Cleans a text.
        last: The role, `assistant` or `user`.
    """
    found = [{"role": str(turn["role"]), "content": clean(_content(turn) or "")} for turn in turns]
    while found and found[-1]["role"] != last:
        found.pop()
    return found[1:] if found and found[0]["role"] == "system" and not found[0]["content"] else found


def instruction_prompt(instruction: str, context: str | None) -> str:
    """Return the prompt of an instruction: its input, if it has one, follows after an empty line."""
    return f"{instruction}\n\n{context}" if context else instruction


# --- records of causal-lm and preference -----------------------------------------------------------------


def plain_turns(row: Mapping[str, Any], answer: str = "chosen") -> list[Turn]:
    """Return a record of a language model as a conversation, as it stands in the data.

    Args:
        row: A record of causal-lm or preference.
        answer: Of a record of preference: which answer ends the conversation, `chosen` or `rejected`.
    """
    before = [dict(turn) for turn in row.get("messages", ())]
    if "chosen" in row:
        before = before or [{"role": "user", "content": row["prompt"]}]
        return [*before, {"role": "assistant", "content": row[answer]}]
    if before:
        return before
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]


def with_system(study: Study, turns: Sequence[Turn]) -> list[Turn]:
    """Return a conversation with the study's system prompt, unless it has a system message of its own."""
    own = bool(turns) and turns[0]["role"] == "system"
    system = [] if own or not study.task.system_prompt else [{"role": "system", "content": study.task.system_prompt}]
    return [*system, *turns]


def turns_of(study: Study, row: Mapping[str, Any], answer: str = "chosen") -> list[Turn]:
    """Return the conversation that a record is trained as, the system message included. Arguments as `plain_turns`."""
    return with_system(study, plain_turns(row, answer))


def prompt_of(row: Mapping[str, Any]) -> list[Turn]:
    """Return the turns of a record of a language model before its last answer, as they stand in the data."""
    return plain_turns(row)[:-1]


def reference_of(row: Mapping[str, Any]) -> str:
    """Return the last answer of a record of a language model; of a record of preference, the chosen one."""
    return plain_turns(row)[-1]["content"]


def written_row(study: Study, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a record by role, in the form of the study's columns; None if that form cannot hold it.

    Reading it again gives the same record.
    """
    roles = study.data.columns
    if "label" in row:
        return {"text": row["text"], "label": study.task.labels[row["label"]]}
    if "tags" in row:
        tags = [study.task.labels[tag] for tag in row["tags"]]
        if "tokens" in roles:
            return {"tokens": list(row["tokens"]), "tags": tags}
        return {"text": row["text"], "spans": _spans(row["places"], tags)} if "text" in row else None
    if "chosen" in roles:
        before = {"messages": prompt_of(row)} if "messages" in roles else {"prompt": row["prompt"]}
        return {**before, "chosen": row["chosen"], "rejected": row["rejected"]}
    if "messages" in roles:
        return {"messages": plain_turns(row)}
    if "instruction" in roles:
        return {"instruction": row["prompt"], "output": row["answer"], **({"input": ""} if "input" in roles else {})}
    return {"prompt": row["prompt"], "answer": row["answer"]}


def _spans(places: Sequence[Sequence[int]], tags: Sequence[str]) -> list[dict[str, Any]]:
    spans: list[dict[str, Any]] = []
    for (start, end), tag in zip(places, tags, strict=True):
        if tag.startswith("B-"):
            spans.append({"start": start, "end": end, "label": tag[2:]})
        elif tag != "O":
            spans[-1]["end"] = end
    return spans
