"""Records to tokens, with the label of every token.

What is trained is what the base's chat template writes, as one text, up to the end of the last answer. Of a record that
is longer than the study's `max_length`, these go, in this order, until it fits: whole earlier turns, after the system
message; the start of the last question, since what is asked usually stands at its end; the end of the answer. The
template's own words, the system message and the header of the last question stay. An answer that is cut loses its end
marker as well, because the model must not learn to end there. Control tokens that a record spells stay text
(`privet.client.training.spelled`).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from privet.client.training.data import Records
from privet.client.training.forms import Turn, turns_of, with_system
from privet.client.training.spelled import AS_TEXT, Unspelled
from privet.client.training.template import Span, Template, TurnsRefused, Written, open_template
from privet.client.training.tokenizer import labels_last_piece
from privet.common.errors import DataError
from privet.common.study.sections import GENERATING
from privet.common.study.study import Study

_log = logging.getLogger("privet.site")

IGNORED = -100
"""Label of tokens that are not part of the loss."""

PERCENTILES = (50, 90, 95, 99)
TURNS, QUESTION, ANSWER, TEXT = "earlier turns", "part of the question", "part of the answer", "the end of the text"
# Each cut of a question may join pieces anew, so the text is measured again, at most so often.
_TRIES = 6


@dataclass(frozen=True)
class Feature:
    """One record as tokens: ids [t], and one class or one label per token [t]."""

    ids: tuple[int, ...]
    labels: int | tuple[int, ...]


@dataclass(frozen=True)
class Pair(Feature):
    """A record of preference as tokens. Its ids and labels are the prompt with the chosen answer.

    Attributes:
        rejected: The same prompt with the rejected answer.
    """

    rejected: Feature

    @property
    def sequences(self) -> tuple[Feature, Feature]:
        """The prompt with the chosen answer, and with the rejected one."""
        return Feature(self.ids, self.labels), self.rejected


@dataclass(frozen=True)
class Lengths:
    """How long records are, and what the study's `max_length` cuts. Exact counts are private to the site.

    Attributes:
        tokens: Tokens of each record before anything is cut; of a pair, those of the longer answer with its prompt.
        limit: The study's `max_length`.
        cuts: Records by what they lose; a record may lose several things.
    """

    tokens: tuple[int, ...]
    limit: int
    cuts: dict[str, int]

    @property
    def cut(self) -> int:
        """Number of records that are cut."""
        return sum(tokens > self.limit for tokens in self.tokens)

    def document(self) -> dict[str, Any]:
        """Return the figures as JSON values. A percentile is the least length that so many percent do not exceed."""
        ordered = sorted(self.tokens)
        ranks = {f"p{p}": ordered[math.ceil(p / 100 * len(ordered)) - 1] for p in PERCENTILES} if ordered else {}
        return {
            "records": len(ordered),
            **ranks,
            "longest": ordered[-1] if ordered else 0,
            "max_length": self.limit,
            "cut": self.cut,
            "cuts": self.cuts,
        }


def length_lines(found: Mapping[str, Any]) -> list[str]:
    """Return a document of `Lengths` as text, one fact a line."""
    if not found["records"]:
        return ["tokens of a record: no records"]
    shares = ", ".join(f"{p} %: {found[f'p{p}']}" for p in PERCENTILES)
    lost = ", ".join(f"{name}: {count}" for name, count in found["cuts"].items())
    return [
        f"tokens of a record: {shares}, longest: {found['longest']}",
        f"data.max_length = {found['max_length']} cuts {found['cut']} of {found['records']} records"
        + (f" (lost: {lost})" if lost else ""),
    ]


@dataclass(frozen=True)
class Encoded:
    """Records as features, with the number of tokens that each had, and what each lost."""

    features: list[Feature]
    tokens: list[int]
    cuts: list[set[str]]


def encode_records(study: Study, tokenizer: Any, records: Records, *, blank: bool = False) -> list[Feature]:
    """Return records as features, truncated to the study's length. Each has at least one token.

    Args:
        study: The study.
        tokenizer: Of the base.
        records: The records.
        blank: Whether a record that the chat template does not take, or leaves no room for an answer to, becomes a
            feature without labels, which teaches nothing, and is counted in the site's log. A template is a program of
            whoever made the base. If one record could end training, the template could ask whether a site has it.

    Raises:
        StudyError: The tokenizer or its chat template cannot be used.
        DataError: The chat template takes none of the conversations; without `blank`, it does not take some, or leaves
            no room for an answer.
    """
    features: Sequence[Feature] = _encode(study, tokenizer, records, blank=blank).features if len(records) else []
    return [feature if feature.ids else _blank(feature, tokenizer) for feature in features]


def measure_records(study: Study, tokenizer: Any, records: Records) -> Lengths:
    """Return how long records are in tokens, and what the study's length cuts. Raises as `encode_records`."""
    found = _encode(study, tokenizer, records) if len(records) else Encoded([], [], [])
    counts = Counter(name for lost in found.cuts for name in lost)
    cuts = {name: counts[name] for name in (TEXT, TURNS, QUESTION, ANSWER) if counts[name]}
    return Lengths(tuple(found.tokens), study.data.max_length, cuts)


def token_lengths(study: Study, tokenizer: Any, records: Records) -> list[int]:
    """Return the length of each record in tokens, before it is cut; of one that a chat template does not take, too."""
    return list(_encode(study, tokenizer, records, blank=True).tokens) if len(records) else []


def _blank(feature: Feature, tokenizer: Any) -> Feature:
    """Return a feature of one padding token, for a record of which the tokenizer leaves nothing."""
    labels = feature.labels if isinstance(feature.labels, int) else (IGNORED,)
    return Feature((int(tokenizer.pad_token_id),), labels)


def _encode(study: Study, tokenizer: Any, records: Records, *, blank: bool = False) -> Encoded:
    limit = study.data.max_length
    if study.task.kind == "preference":
        return _encode_pairs(study, tokenizer, records, blank)
    if study.task.generates:
        return _encode_turns(study, tokenizer, [turns_of(study, row) for row in records.rows], blank)
    if study.task.kind == "text-classification":
        encoded, tokens = _cut_texts(tokenizer, [row["text"] for row in records.rows], limit)
        features = [Feature(tuple(ids), row["label"]) for ids, row in zip(encoded, records.rows, strict=True)]
    else:
        words = encode_words(tokenizer, records.rows, limit)
        features, tokens = [], []
        for (ids, places, length), row in zip(words, records.rows, strict=True):
            labels = [IGNORED] * len(ids)
            for place, tag in zip(places, row["tags"], strict=True):
                if place is not None:
                    labels[place] = tag
            features.append(Feature(ids, tuple(labels)))
            tokens.append(length)
    return Encoded(features, tokens, [{TEXT} if length > limit else set() for length in tokens])


def _encode_turns(study: Study, tokenizer: Any, conversations: Sequence[list[Turn]], blank: bool) -> Encoded:
    template = open_template(tokenizer, study.task)
    unspelled = _unspelled(tokenizer, template)
    conversations = [unspelled.turns(turns) for turns in conversations]
    if template is None:
        return _encode_plain(study, tokenizer, conversations)
    return _encode_chats(study.data.max_length, tokenizer, template, conversations, blank)


def _encode_pairs(study: Study, tokenizer: Any, records: Records, blank: bool) -> Encoded:
    """Encode each pair as two conversations that differ in the answer alone.

    Where a cut leaves less of the prompt beside one answer, both keep what that one has: the loss compares answers to
    one prompt.
    """
    chosen, rejected = (
        _encode_turns(study, tokenizer, [turns_of(study, row, answer) for row in records.rows], blank)
        for answer in ("chosen", "rejected")
    )
    features: list[Feature] = []
    cuts = [mine | other for mine, other in zip(chosen.cuts, rejected.cuts, strict=True)]
    for first, second, lost in zip(chosen.features, rejected.features, cuts, strict=True):
        if empty := next((each for each in (first, second) if not each.ids), None):
            first = second = _blank(empty, tokenizer)
        heads = [_head(sequence) for sequence in (first, second)]
        shared = min(heads, key=len)
        if lost & {TURNS, QUESTION} and heads[0] != heads[1]:
            first, second = (
                Feature((*shared, *whole.ids[len(head) :]), (*[IGNORED] * len(shared), *_labels(whole)[len(head) :]))
                for whole, head in zip((first, second), heads, strict=True)
            )
        features.append(Pair(first.ids, first.labels, second))
    tokens = [max(pair) for pair in zip(chosen.tokens, rejected.tokens, strict=True)]
    return Encoded(features, tokens, cuts)


def _labels(feature: Feature) -> tuple[int, ...]:
    return () if isinstance(feature.labels, int) else feature.labels


def _head(feature: Feature) -> tuple[int, ...]:
    """Return the tokens before the first label."""
    labels = _labels(feature)
    return feature.ids[: next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))]


# --- texts and words -------------------------------------------------------------------------------------


def _cut_texts(tokenizer: Any, texts: Sequence[str], limit: int) -> tuple[list[list[int]], list[int]]:
    """Return the tokens of texts, cut to a limit, and the number of tokens of each before."""
    if tokenizer.is_fast:
        encoded = tokenizer(list(texts), truncation=True, max_length=limit, return_overflowing_tokens=True, **AS_TEXT)
        return _first_parts(encoded, tokenizer, limit)[0]
    whole = tokenizer(list(texts), **AS_TEXT)["input_ids"]
    kept = tokenizer(list(texts), truncation=True, max_length=limit, **AS_TEXT)["input_ids"]
    return kept, [len(ids) for ids in whole]


def _first_parts(encoded: Any, tokenizer: Any, limit: int) -> tuple[tuple[list[list[int]], list[int]], list[int]]:
    """Return (tokens, lengths) of records that overflow into parts, and the index of each record's first part."""
    kept: list[list[int]] = []
    lengths: list[int] = []
    first: list[int] = []
    special = tokenizer.num_special_tokens_to_add(pair=False)
    for index, record in enumerate(encoded["overflow_to_sample_mapping"]):
        ids = encoded["input_ids"][index]
        if record == len(kept):
            kept.append(ids)
            lengths.append(len(ids))
            first.append(index)
        else:
            lengths[record] += len(ids) - special
    return (kept, lengths), first


def encode_words(
    tokenizer: Any, rows: Sequence[dict[str, Any]], limit: int
) -> list[tuple[tuple[int, ...], list[int | None], int]]:
    """Return each row's tokens, the place of each of its words in them, and the number of tokens before they were cut.

    Words are tokenised in running text: that which the row has, or else the words with single spaces between. A
    tokenizer whose pieces depend on a space before them gets one before the first word. A word is placed at its first
    piece; where the model sees no later tokens, at its last.

    Args:
        tokenizer: A fast one.
        rows: With `tokens`, and maybe with `text` and `places`.
        limit: Most tokens.
    """
    lead = _lead(tokenizer)
    texts, spans = zip(*(_running(row, lead) for row in rows), strict=True)
    encoded = tokenizer(list(texts), truncation=True, max_length=limit, return_overflowing_tokens=True, **AS_TEXT)
    (kept, lengths), first = _first_parts(encoded, tokenizer, limit)
    last = labels_last_piece(tokenizer)
    found = []
    for ids, length, part, words in zip(kept, lengths, first, spans, strict=True):
        places = _places(encoded.encodings[part], words, last=last)
        found.append((tuple(ids), places, length))
    return found


def _lead(tokenizer: Any) -> str:
    """Return what must come before a text so that its first word gets the pieces of a later one."""
    for lead in ("", " "):
        pieces = tokenizer(f"{lead}a a", add_special_tokens=False)["input_ids"]
        half = len(pieces) // 2
        if pieces[:half] == pieces[half:]:
            return lead
    return ""


def _running(row: dict[str, Any], lead: str) -> tuple[str, list[Span]]:
    """Return a row as running text, and the characters of each word. A word without characters has none."""
    if "places" in row:
        return lead + row["text"], [(start + len(lead), end + len(lead)) for start, end in row["places"]]
    at, parts, spans = len(lead), [], []
    for word in row["tokens"]:
        spans.append((at, at + len(word)))
        if word:
            parts.append(word)
            at += len(word) + 1
    return lead + " ".join(parts), spans


def _places(encoding: Any, words: Sequence[Span], *, last: bool) -> list[int | None]:
    """Return the place of each word in an encoding, at its first or its last piece; None past its end."""
    # A piece without characters is the mark of a space that the tokenizer puts before a text.
    pieces = [
        (start, max(end, start + 1), place)
        for place, ((start, end), special) in enumerate(
            zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
        )
        if not special
    ]
    places: list[int | None] = []
    at, taken, before = 0, -1, 0
    for start, end in words:
        if start == end:
            places.append(None)
            continue
        # A space before a word may be a piece of its own, and is then the word's first.
        start, before = max(before, start - 1), end
        while at < len(pieces) and pieces[at][1] <= start:
            at += 1
        here, found, stop = at, None, end
        while here < len(pieces) and pieces[here][0] < end:
            _, stop, place = pieces[here]
            if place > taken and (last or found is None):
                found = place
            here += 1
        if last and stop < end and here == len(pieces):  # the word is cut, and its last piece with it
            found = None
        places.append(found)
        taken = taken if found is None else found
    return places


# --- conversations that a template writes ----------------------------------------------------------------


def prompt_ids(study: Study, tokenizer: Any, prompt: str | Sequence[Turn], limit: int | None = None) -> list[int]:
    """Return a prompt's tokens, with the tokenizer's chat template if it has one.

    Args:
        study: The study. Its system prompt comes first, unless the prompt has a system message.
        tokenizer: Of the base.
        prompt: What a user says, or a conversation that ends with what a user says.
        limit: Most tokens. A longer prompt loses earlier turns, then the start of its last question.

    Raises:
        StudyError: The tokenizer or its chat template cannot be used.
        DataError: The chat template does not take the conversation, or its own text is longer than the limit.
    """
    plain = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    template = open_template(tokenizer, study.task)
    turns = _unspelled(tokenizer, template).turns(with_system(study, plain))
    if template is None:
        ids = [token for part, _ in _segments(tokenizer, turns) for token in part]
        return ids if limit is None else ids[-limit:]
    try:
        while True:
            encoding, length = _prompt_encoding(tokenizer, template, turns)
            if limit is None or length <= limit:
                return list(encoding.ids[:length])
            fewer = _without_first(turns)
            if fewer is None:
                return _cut_prompt(tokenizer, template, turns, limit)
            turns = fewer
    except TurnsRefused:
        raise _refused(1, 1) from None


def text_ids(study: Study, tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a plain text that a language model continues, without a template. Raises as `prompt_ids`."""
    found = tokenizer(_unspelled(tokenizer, open_template(tokenizer, study.task))(text))["input_ids"]
    return list(found)


def _unspelled(tokenizer: Any, template: Template | None) -> Unspelled:
    return Unspelled(tokenizer) if template is None else template.unspelled


def _prompt_encoding(tokenizer: Any, template: Template, turns: Sequence[Turn]) -> tuple[Any, int]:
    """Return an encoding that begins with a prompt, and the number of the prompt's tokens.

    A generation prompt may end in a space that would be part of an answer's first piece. So the prompt's tokens are
    those before an answer, as in training.
    """
    text = template.prompt(turns)
    encoding = _encodings(tokenizer, [text + "a"])[0]
    return encoding, _tokens_in(encoding, len(text), len(text) + 1)[0]


def _cut_prompt(tokenizer: Any, template: Template, turns: Sequence[Turn], limit: int) -> list[int]:
    """Return the tokens of a prompt whose question is cut at its start."""
    for _ in range(_TRIES):
        encoding, length = _prompt_encoding(tokenizer, template, turns)
        if length <= limit:
            return list(encoding.ids[:length])
        shorter = _cut_question(encoding, template, turns, length - limit, opened=True)
        if shorter is None:
            break
        turns = shorter
    raise _no_room(1, 1, limit)


def _encode_chats(
    limit: int, tokenizer: Any, template: Template, conversations: Sequence[list[Turn]], blank: bool
) -> Encoded:
    """Encode conversations as the template writes them. Only answers, with their ends, are part of the loss."""
    written: dict[int, Written] = {}
    for index, turns in enumerate(conversations):
        with suppress(TurnsRefused):
            written[index] = template.conversation(turns)
    features = [Feature((), ())] * len(conversations)
    tokens = [0] * len(conversations)
    cuts: list[set[str]] = [set() for _ in conversations]
    refused, full = len(conversations) - len(written), 0
    encodings = _encodings(tokenizer, [text.text for text in written.values()]) if written else []
    for (index, text), encoding in zip(written.items(), encodings, strict=True):
        whole = _Chat(tokenizer, text, encoding)
        tokens[index] = whole.length
        if whole.length <= limit:
            features[index] = whole.feature(limit)
            continue
        try:
            shorter, lost = _shorten(tokenizer, template, conversations[index], limit)
        except TurnsRefused:  # of what is left of the conversation
            refused += 1
            continue
        cuts[index] = set(lost)
        if shorter is None:
            full += 1
        else:
            features[index] = shorter
    faults = [_refused(refused, len(conversations))] if refused else []
    faults += [_no_room(full, len(conversations), limit)] if full else []
    if faults and (not blank or refused + full == len(conversations)):
        raise faults[0]
    for fault in faults:
        _log.warning("%s; these records teach nothing", fault.message)
    return Encoded(features, tokens, cuts)


class _Chat:
    """A conversation as the template writes it, in tokens."""

    def __init__(self, tokenizer: Any, text: Written, encoding: Any = None) -> None:
        self.encoding = encoding or _encodings(tokenizer, [text.text])[0]
        self.answers = text.answers
        self.ending = tokenizer(text.ending, add_special_tokens=False)["input_ids"] if text.ending else []
        self.length = len(self.encoding.ids) + len(self.ending)

    def feature(self, limit: int) -> Feature:
        """Return the conversation's first tokens as a feature."""
        ids = [*self.encoding.ids, *self.ending]
        labels = [IGNORED] * len(ids)
        for start, end in self.answers:
            first, stop = _tokens_in(self.encoding, start, end)
            labels[first:stop] = ids[first:stop]
        labels[len(self.encoding.ids) :] = self.ending
        return Feature(tuple(ids[:limit]), tuple(labels[:limit]))


def _encodings(tokenizer: Any, texts: Sequence[str]) -> list[Any]:
    """Return the encodings of texts that hold their own special tokens."""
    found: list[Any] = tokenizer(list(texts), add_special_tokens=False).encodings
    return found


def _tokens_in(encoding: Any, start: int, end: int) -> Span:
    """Return the tokens [first, stop) that hold any of the characters [start, end)."""
    inside = (token for place in range(start, end) if (token := encoding.char_to_token(place)) is not None)
    first = next(inside, None)
    if first is None:  # characters that belong to no token
        return 0, 0
    place = end - 1
    while (last := encoding.char_to_token(place)) is None:
        place -= 1
    stop: int = last + 1
    while stop < len(encoding) and encoding.token_to_chars(stop) == encoding.token_to_chars(last):
        stop += 1  # a character of several tokens
    return first, stop


def _shorten(tokenizer: Any, template: Template, turns: list[Turn], limit: int) -> tuple[Feature | None, list[str]]:
    """Return a conversation that is too long as a feature of at most `limit` tokens, and what it lost.

    The feature is None if the template's own text and the system message leave no room for a token of the answer.
    """
    lost: list[str] = []
    while (fewer := _without_first(turns)) is not None:
        turns, lost = fewer, [TURNS]
        chat = _Chat(tokenizer, template.conversation(turns))
        if chat.length <= limit:
            return chat.feature(limit), lost
    for _ in range(_TRIES):
        chat = _Chat(tokenizer, template.conversation(turns))
        head = _tokens_in(chat.encoding, *chat.answers[-1])[0]
        answer = chat.length - head
        asked = _tokens_in(chat.encoding, *(_question(template, turns, opened=False) or (0, 0)))
        # Question and answer share what the template's own text leaves. Neither takes more than half from the other.
        fixed = head - (asked[1] - asked[0])
        excess = head - fixed - max((limit - fixed) // 2, limit - fixed - answer)
        shorter = None if excess <= 0 else _cut_question(chat.encoding, template, turns, excess, opened=False)
        if shorter is None:
            break
        turns = shorter
        lost = [*(name for name in lost if name != QUESTION), QUESTION]
    if head >= limit:
        return None, lost
    return chat.feature(limit), [*lost, ANSWER] if chat.length > limit else lost


def _without_first(turns: Sequence[Turn]) -> list[Turn] | None:
    """Return a conversation without its first exchange, after the system message; None if it has only one."""
    system = [turn for turn in turns[:1] if turn["role"] == "system"]
    others = list(turns[len(system) :])
    begins = [i for i in range(1, len(others)) if others[i]["role"] == "user" and others[i - 1]["role"] == "assistant"]
    return [*system, *others[begins[0] :]] if begins else None


def _asked(turns: Sequence[Turn]) -> int | None:
    """Return the index of the last question."""
    return max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)


def _question(template: Template, turns: Sequence[Turn], *, opened: bool) -> Span | None:
    place = _asked(turns)
    return None if place is None else template.place_of(turns, place, opened=opened)


def _cut_question(
    encoding: Any, template: Template, turns: Sequence[Turn], excess: int, *, opened: bool
) -> list[Turn] | None:
    """Return turns whose last question has lost so many tokens at its start; None if it has none to lose."""
    asked, place = _asked(turns), _question(template, turns, opened=opened)
    if asked is None or place is None or place[0] >= place[1]:
        return None
    first, stop = _tokens_in(encoding, *place)
    rest = encoding.offsets[first + excess][0] if first + excess < stop else place[1]
    content = turns[asked]["content"]
    # The template may have trimmed the content, so the rest is counted from its end.
    kept = content[len(content) - max(0, place[1] - max(rest, place[0] + 1)) :].lstrip() if rest < place[1] else ""
    return [*turns[:asked], {"role": "user", "content": kept}, *turns[asked + 1 :]] if kept != content else None


def _refused(count: int, total: int) -> DataError:
    return DataError(
        f"in {count} of {total} records, the base's chat template does not take the turns",
        "let user and assistant alternate, beginning with the user, or choose a base whose template takes other orders",
    )


def _no_room(count: int, total: int, limit: int) -> DataError:
    return DataError(
        f"data.max_length: in {count} of {total} records, the system message and what the chat template writes leave "
        f"no room for an answer within {limit} tokens",
        "raise data.max_length in the study, or shorten the system message",
    )


# --- conversations without a template --------------------------------------------------------------------


def _encode_plain(study: Study, tokenizer: Any, conversations: Sequence[list[Turn]]) -> Encoded:
    """Join turns, each on a line of its own. Only answers and their end tokens are part of the loss.

    Of a long question the end is kept, in at most half of the length, so that part of the answer is always learned.
    """
    limit = study.data.max_length
    features: list[Feature] = []
    tokens: list[int] = []
    cuts: list[set[str]] = []
    for turns in conversations:
        segments = _segments(tokenizer, turns)
        tokens.append(sum(len(ids) for ids, _ in segments))
        lost: set[str] = set()
        while sum(len(ids) for ids, _ in segments) > limit and (fewer := _without_first(turns)) is not None:
            turns = fewer
            segments = _segments(tokenizer, turns)
            lost.add(TURNS)
        answers = [i for i, (_, learnt) in enumerate(segments) if learnt]
        head = [token for ids, _ in segments[: answers[-1]] for token in ids]
        tail = segments[-1][0]
        if len(head) + len(tail) > limit:
            room = max(limit // 2, limit - len(tail))
            lost |= {QUESTION} if len(head) > room else set()
            head = head[-room:]
            lost |= {ANSWER} if len(tail) > limit - len(head) else set()
            ids = head + tail[: limit - len(head)]
            labels = [IGNORED] * len(head) + ids[len(head) :]
        else:
            ids = head + tail
            chosen = answers[-1:] if study.task.last_only else answers
            labels = [token if i in chosen else IGNORED for i, (part, _) in enumerate(segments) for token in part]
        cuts.append(lost)
        features.append(Feature(tuple(ids), tuple(labels)))
    return Encoded(features, tokens, cuts)


def _segments(tokenizer: Any, turns: Sequence[Turn]) -> list[tuple[list[int], bool]]:
    """Return the tokens of what comes before each answer, and of each answer with its end token; and which is which."""
    segments: list[tuple[list[int], bool]] = []
    lines: list[str] = []
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def ask() -> None:
        ids = tokenizer("\n".join(lines) + "\n", add_special_tokens=False)["input_ids"] if lines else []
        segments.append(([*(start if not segments else []), *ids], False))
        lines.clear()

    for turn in turns:
        if turn["role"] == "assistant":
            ask()
            segments.append(([*tokenizer(turn["content"], add_special_tokens=False)["input_ids"], *end], True))
        else:
            lines.append(turn["content"])
    if lines:
        ask()
    return segments


def row_labels(kind: str, feature: Feature) -> Sequence[int]:
    """Return the label of each of a record's rows [t]. A text's class stands at its first row.

    The logits at a token predict the next one, so a language model's labels move one row up.

    Args:
        kind: Kind of task.
        feature: The record.
    """
    if isinstance(feature.labels, int):
        return (feature.labels, *[IGNORED] * (len(feature.ids) - 1))
    return (*feature.labels[1:], IGNORED) if kind in GENERATING else feature.labels
