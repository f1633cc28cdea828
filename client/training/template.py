"""What the base's chat template writes, and which part of it is the assistant's.

A template is a program that comes with the base. It decides the words around a turn, whether there is a system message,
and which token ends a turn. So the text of a conversation is the template's own, and the places of the answers in it
are found by writing it again: the text before an answer with the template's generation prompt, and the whole with marks
around contents. Both are compared with the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from privet.client.training.forms import Turn
from privet.client.training.sandbox import bounded
from privet.client.training.spelled import Unspelled
from privet.common.errors import StudyError
from privet.common.study.sections import TaskSection

# The date that the template of Llama 3 writes where it is given none.
_DATE = "2024-07-26"
# Words of the trial conversation, which no template writes on its own.
_SYSTEM, _USER, _ASSISTANT = "qzsystemqz", "qzuserqz", "qzassistantqz"

Span = tuple[int, int]
"""Characters [start, end) of a text."""


class TurnsRefused(Exception):  # noqa: N818 - a result that the caller counts, not an error that a person sees
    """The template does not take these turns."""


@dataclass(frozen=True)
class Written:
    """A conversation as text, up to the end of its last answer.

    Attributes:
        text: What the template writes, up to `ending`.
        answers: Of each answer that is learnt, the characters from the end of the generation prompt to the end of the
            turn, its end marker included.
        ending: The end marker of the last answer where it is plain text. It is tokenised on its own, so that every
            record ends in the same tokens, whatever its last word is. Otherwise empty.
    """

    text: str
    answers: tuple[Span, ...]
    ending: str = ""


class Template:
    """The chat template of a tokenizer that has one.

    Attributes:
        end: The marker that the template writes at the end of an answer, with what is between; it may be empty.
        takes_system: Whether the template writes system messages.
        unspelled: Breaks the control tokens that a content spells. Every conversation goes through it first.
    """

    def __init__(self, tokenizer: Any, task: TaskSection) -> None:
        """Try the template on a conversation of two turns, with and without a system message.

        Raises:
            StudyError: The template fails, or does not write what the turns say.
        """
        self._tokenizer = tokenizer
        now = datetime.fromisoformat(task.template_date or _DATE).replace(tzinfo=UTC)
        # `apply_chat_template` takes no function, and gives templates the clock of this machine.
        self._given: dict[str, Any] = {**tokenizer.special_tokens_map, "strftime_now": now.strftime}
        if task.template_date is not None:
            self._given["date_string"] = now.strftime("%d %b %Y")
        self._all = not task.last_only
        added = {str(token) for token in (*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens)}
        self._markers = sorted((token for token in added if token.strip()), key=len, reverse=True)
        self.takes_system = True
        user, assistant = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}
        try:
            whole = self._render([user, assistant])
            opened = self._render([user], opened=True)
        except TurnsRefused as error:
            raise _unusable(f"it fails on a prompt and an answer ({error})") from None
        if whole.count(_ASSISTANT) != 1 or whole.count(_USER) != 1 or opened.count(_USER) != 1:
            raise _unusable("it does not write the text of a prompt and of an answer once each")
        self._tail = whole.partition(_ASSISTANT)[2]
        self.end = self._marker(self._tail) or self._tail.rstrip()
        try:
            self.takes_system = _SYSTEM in self._render([{"role": "system", "content": _SYSTEM}, user], opened=True)
        except TurnsRefused:
            self.takes_system = False
        self.unspelled = Unspelled(tokenizer, self._around(user))

    def _around(self, user: Turn) -> set[str]:
        """Return the added tokens that the template writes around turns, special or not.

        Those that it writes at the start of an answer alone, such as the mark of a thought, may be an answer's own.
        """
        try:
            asked = self._render([user])
        except TurnsRefused:
            asked = ""
        return {token for token in self._markers if token in asked or token in self.end}

    def prompt(self, turns: Sequence[Turn]) -> str:
        """Return the text of turns with the generation prompt after them.

        Raises:
            TurnsRefused: The template does not take them.
        """
        return self._render(turns, opened=True)

    def conversation(self, turns: Sequence[Turn]) -> Written:
        """Return the text of a conversation that ends with an answer, and the places of the answers to learn.

        Raises:
            TurnsRefused: The template does not take these turns, or writes them so that an answer cannot be found.
        """
        places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        learnt = places if self._all else places[-1:]
        full = self._render(turns)
        heads = [self._render(turns[:i], opened=True) for i in learnt]
        starts = [len(head) if full.startswith(head) else None for head in heads]
        first = starts[0]
        end = len(full) - len(self._tail)
        if len(learnt) == 1 and first is not None and first <= end and full.endswith(self._tail):
            return self._written(full, [(first, end)], self.end)
        contents = self._contents(turns, learnt, full)
        answers: list[Span] = []
        for start, (begin, stop) in zip(starts, contents, strict=True):
            known = start if start is not None and (begin is None or start <= begin) else begin
            if known is None or known > stop:
                raise TurnsRefused
            answers.append((known, stop + len(self._end_at(full, stop))))
        last = self._end_at(full, contents[-1][1])
        return self._written(full, [*answers[:-1], (answers[-1][0], answers[-1][1] - len(last))], last)

    def _written(self, full: str, answers: Sequence[Span], ending: str) -> Written:
        """Return a text whose last answer, without its end marker, is the last of `answers`."""
        start, end = answers[-1]
        if self._marker(ending):
            end, ending = end + len(ending), ""
        return Written(full[:end], (*answers[:-1], (start, end)), ending)

    def place_of(self, turns: Sequence[Turn], turn: int, *, opened: bool) -> Span | None:
        """Return the characters of one turn's content in the text of the turns; None if they cannot be told.

        Args:
            turns: A conversation.
            turn: Index of the turn.
            opened: Whether the text ends with the generation prompt.
        """
        try:
            ((start, end),) = self._contents(turns, [turn], self._render(turns, opened=opened), opened=opened)
        except TurnsRefused:
            return None
        return None if start is None else (start, end)

    def _contents(
        self, turns: Sequence[Turn], indices: Sequence[int], full: str, *, opened: bool = False
    ) -> list[tuple[int | None, int]]:
        """Return the characters of some contents in a text, found by marks around them.

        A template may look at how a content begins, so where marks around it change the text, marks behind it must do:
        the start is None.
        """
        opening, closing = _marks(turns)
        for before in (opening, ""):
            marked = [
                {**turn, "content": before + turn["content"] + closing} if i in indices else dict(turn)
                for i, turn in enumerate(turns)
            ]
            text = self._render(marked, opened=opened)
            if text.replace(opening, "").replace(closing, "") != full or text.count(closing) != len(indices):
                continue
            pieces = text.split(closing)
            ends, starts = [], []
            at = 0
            for piece in pieces[:-1]:
                head, mark, _ = piece.partition(opening)
                starts.append(at + len(head) if mark else None)
                at += len(piece) - len(mark)
                ends.append(at)
            return list(zip(starts, ends, strict=True))
        raise TurnsRefused

    def _render(self, turns: Sequence[Turn], *, opened: bool = False) -> str:
        try:
            return bounded(self._tokenizer.get_chat_template())(
                messages=self._adapted(turns),
                tools=None,
                documents=None,
                add_generation_prompt=opened,
                **self._given,
            )
        except Exception as error:  # it is a program, and may raise anything; one record must not end training
            raise TurnsRefused(type(error).__name__) from None

    def _adapted(self, turns: Sequence[Turn]) -> list[Turn]:
        """Return turns that the template takes: without a system role, its text comes before the first user's.

        An empty line separates them, as in the template of Gemma 3.
        """
        if self.takes_system or not turns or turns[0]["role"] != "system":
            return [dict(turn) for turn in turns]
        system, *others = turns
        place = next((i for i, turn in enumerate(others) if turn["role"] == "user"), None)
        if place is None:
            raise TurnsRefused
        first = {"role": "user", "content": f"{system['content']}\n\n{others[place]['content']}"}
        return [*others[:place], first, *others[place + 1 :]]

    def _end_at(self, text: str, place: int) -> str:
        """Return the end marker that stands at a place of a text; empty if none does."""
        if self.end and text.startswith(self.end, place):
            return self.end
        # Some templates end an inner turn otherwise than the last one.
        return self._marker(text[place : place + 200], directly=True)

    def _marker(self, text: str, *, directly: bool = False) -> str:
        """Return a text up to the end of the first token in it that the tokenizer never splits; empty without one.

        Args:
            text: What follows a content.
            directly: Whether only white space may come before the token.
        """
        found = [(text.find(token), token) for token in self._markers]
        first = min(((place, -len(token), token) for place, token in found if place >= 0), default=None)
        if first is None or (directly and text[: first[0]].strip()):
            return ""
        return text[: first[0]] + first[2]


def _marks(turns: Sequence[Turn]) -> tuple[str, str]:
    """Return two characters for private use that occur in no turn.

    Raises:
        TurnsRefused: The turns have all of them.
    """
    used = set().union(*(turn["content"] for turn in turns))
    free = [chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used]
    if len(free) < 2:
        raise TurnsRefused
    return free[0], free[1]


def _unusable(fault: str) -> StudyError:
    return StudyError(
        f"model.base: the chat template of the base cannot be used: {fault}",
        "choose a base whose chat template writes text messages of a user and an assistant",
    )


def open_template(tokenizer: Any, task: TaskSection) -> Template | None:
    """Return the chat template of a tokenizer; None if it has none.

    Raises:
        StudyError: The template cannot be used, or the tokenizer cannot tell the places of its tokens.
    """
    if not tokenizer.chat_template:
        return None
    if not tokenizer.is_fast:
        raise StudyError(
            "model.base: a base with a chat template needs a fast tokenizer, which knows the place of each token in "
            f"the text; this base has {type(tokenizer).__name__}, which does not",
            "choose a base with a tokenizer.json",
        )
    return Template(tokenizer, task)
