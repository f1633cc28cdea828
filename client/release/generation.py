"""Generate answers with a mounted adapter: prompts from chats, sampling, stop tokens, streaming.

An answer ends at a stop token: one that the base's generation configuration names, the tokenizer's end of sequence, or
the token with which the chat template ends the assistant's turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import GenerationConfig, StoppingCriteriaList

from privet.client.training.features import prompt_ids
from privet.client.training.host import ModelHost
from privet.common.errors import StudyError
from privet.common.study.study import Study

Message = Mapping[str, str]
"""One turn of a chat: `role` (system, user or assistant) and `content`."""
_MARK = "privetmark"
_UNFINISHED = "\ufffd"  # what a decoder writes for a character of which it has seen only some bytes


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and how many there may be.

    Attributes:
        temperature: Divisor of the logits. 0 takes the most probable token each time (greedy).
        top_p: Probability mass of the most probable tokens that are drawn from, above 0 up to 1.
        max_new_tokens: Most tokens of an answer; None: `task.max_new_tokens` of the study.
        seed: Seed of the draws. The same seed and prompts give the same answers.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    seed: int = 0

    def most(self, study: Study) -> int:
        """Return the most tokens of an answer."""
        return self.max_new_tokens or study.task.max_new_tokens


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        text: Without special tokens, and without the stop text.
        tokens: Number of tokens that were generated, the stop token included.
        finished: Whether it ended by itself, and not at the most tokens that it may have.
    """

    text: str
    tokens: int
    finished: bool


def chat_ids(study: Study, tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the tokens of a chat, up to where the assistant's next turn begins.

    The study's system prompt comes first where the chat has no system message. A single user's turn gets the tokens
    that training gave it.

    Raises:
        StudyError: The chat template takes no such sequence of roles.
    """
    turns = list(messages)
    if len(turns) == 1 and turns[0]["role"] == "user":
        return list(prompt_ids(study, tokenizer, turns[0]["content"]))
    if turns[0]["role"] != "system" and study.task.system_prompt:
        turns.insert(0, {"role": "system", "content": study.task.system_prompt})
    if not tokenizer.chat_template:
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        text = "".join(turn["content"] + "\n" for turn in turns)
        return start + list(tokenizer(text, add_special_tokens=False)["input_ids"])
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        text = _without_system(tokenizer, turns)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _without_system(tokenizer: Any, turns: Sequence[Message]) -> str:
    """Render a chat with a template that takes no system message: its text comes before the first user's."""
    first, *others = turns
    if first["role"] == "system" and others and others[0]["role"] == "user":
        joined = {"role": "user", "content": f"{first['content']}\n\n{others[0]['content']}"}
        others = [joined, *others[1:]]
    else:
        others = list(turns)
    try:
        return str(tokenizer.apply_chat_template(others, tokenize=False, add_generation_prompt=True))
    except TemplateError:
        raise StudyError(
            "the chat template of the base takes no such sequence of roles: "
            + ", ".join(turn["role"] for turn in turns),
            "begin with the user's turn or one system message, and let user and assistant take turns",
        ) from None


def stop_ids(host: ModelHost) -> tuple[int, ...]:
    """Return the ids of the tokens that end an answer."""
    tokenizer = host.tokenizer
    named = getattr(getattr(host.model, "generation_config", None), "eos_token_id", None)
    found = list(named) if isinstance(named, list | tuple) else [named]
    found += [tokenizer.eos_token_id, _end_of_turn(tokenizer)]
    return tuple(dict.fromkeys(int(token) for token in found if token is not None))


def _end_of_turn(tokenizer: Any) -> int | None:
    """Return the special token with which the chat template ends the assistant's turn; None without one."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
    try:
        _, found, after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_MARK)
    except TemplateError:
        return None
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if found and after else []
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return int(ids[0]) if ids and ids[0] in special else None


def room_for(host: ModelHost) -> int | None:
    """Return the most tokens of prompt and answer that the base has positions for; None without a limit."""
    positions = getattr(host.model.config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _config(host: ModelHost, study: Study, sampling: Sampling, stops: Sequence[int]) -> GenerationConfig:
    drawn = sampling.temperature > 0
    choice: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if drawn else {}
    return GenerationConfig(
        max_new_tokens=sampling.most(study),
        do_sample=drawn,
        eos_token_id=list(stops) or None,
        pad_token_id=host.tokenizer.pad_token_id,
        **choice,
    )


@torch.no_grad()
def answers(
    host: ModelHost, study: Study, prompts: Sequence[Sequence[int]], sampling: Sampling, offset: int = 0
) -> list[Answer]:
    """Return an answer to each prompt. All are one batch, padded on the left.

    Args:
        host: The model, its lock held by the caller.
        study: What was agreed.
        prompts: Tokens of each prompt; there is at least one prompt.
        sampling: How tokens are chosen.
        offset: Number of the batch's first row. It enters the seed, so that batches draw differently.
    """
    stops, pad = stop_ids(host), host.tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts], device=host.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=host.device)
    devices = [host.device] if host.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), host.computing():
        torch.manual_seed(sampling.seed + offset)
        config = _config(host, study, sampling, stops)
        full = host.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [_answer(host, row, stops) for row in full[:, width:].tolist()]


def _answer(host: ModelHost, row: list[int], stops: Sequence[int]) -> Answer:
    end = next((place for place, token in enumerate(row) if token in stops), None)
    kept = row if end is None else row[:end]
    text = host.tokenizer.decode(kept, skip_special_tokens=True).strip()
    return Answer(text, len(row) if end is None else end + 1, end is not None)


@dataclass
class _Stream:
    """Turns tokens into pieces of text as they are generated. It has the methods that `generate` calls.

    Text is held back while it may be part of a stop text, or of a character of which bytes are missing.
    """

    tokenizer: Any
    stops: Sequence[int]
    texts: Sequence[str]
    say: Callable[[str], None]
    cancelled: Callable[[], bool]
    ids: list[int] = field(default_factory=list)
    held: str = ""
    said: str = ""
    done: bool = False
    finished: bool = False
    _from: int = 0
    _read: int = 0
    _prompt: bool = True

    def put(self, value: torch.Tensor) -> None:
        """Take the next token; the first call brings the prompt."""
        if self._prompt:
            self._prompt = False
            return
        if self.done:  # `generate` may take one token more before it asks whether to stop
            return
        (token,) = value.reshape(-1).tolist()
        self.ids.append(token)
        if token in self.stops:
            self.done = self.finished = True
            return
        before = self._decoded(self._from, self._read)
        whole = self._decoded(self._from, len(self.ids))
        if len(whole) > len(before) and not whole.endswith(_UNFINISHED):
            self._from, self._read = self._read, len(self.ids)
            self._add(whole[len(before) :])

    def end(self) -> None:
        """Take the end of generation."""

    def close(self) -> Answer:
        """Say what was held back, and return the answer."""
        ended = bool(self.ids) and self.ids[-1] in self.stops
        if ended or not self.done:
            last = len(self.ids) - (1 if self.finished else 0)
            rest = self._decoded(self._from, last)[len(self._decoded(self._from, self._read)) :]
            self._add(rest)
            self._say(self.held)
            self.held = ""
        return Answer(self.said.strip(), len(self.ids), self.finished)

    def stopping(self, ids: torch.Tensor, scores: object, **more: object) -> torch.Tensor:
        """Return whether to stop, as `generate` asks after each token: [1], boolean."""
        return torch.full((ids.shape[0],), self.done or self.cancelled(), device=ids.device, dtype=torch.bool)

    def _decoded(self, start: int, end: int) -> str:
        return str(self.tokenizer.decode(self.ids[start:end], skip_special_tokens=True))

    def _add(self, text: str) -> None:
        if not self.said:
            text = text if self.held else text.lstrip()
        self.held += text
        places = [place for stop in self.texts if (place := self.held.find(stop)) >= 0]
        if places:
            self._say(self.held[: min(places)])
            self.held, self.done, self.finished, self.texts = "", True, True, ()
            return
        keep = max((_overlap(self.held, stop) for stop in self.texts), default=0)
        self._say(self.held[: len(self.held) - keep])
        self.held = self.held[len(self.held) - keep :]

    def _say(self, text: str) -> None:
        if text:
            self.said += text
            self.say(text)


def _overlap(text: str, stop: str) -> int:
    """Return how many of the last characters of a text are the first ones of a stop text."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)


@torch.no_grad()
def stream(
    host: ModelHost,
    study: Study,
    prompt: Sequence[int],
    sampling: Sampling,
    say: Callable[[str], None],
    texts: Sequence[str] = (),
    cancelled: Callable[[], bool] = lambda: False,
) -> Answer:
    """Generate one answer, and hand on its text piece by piece. Returns the whole answer.

    Args:
        host: The model, its lock held by the caller.
        study: What was agreed.
        prompt: Tokens of the prompt.
        sampling: How tokens are chosen.
        say: Called with each piece of text.
        texts: Stop texts: the answer ends before the first of them.
        cancelled: Asked after each token; generation stops when it returns true.
    """
    stops = stop_ids(host)
    pieces = _Stream(host.tokenizer, stops, tuple(texts), say, cancelled)
    ids = torch.tensor([list(prompt)], device=host.device)
    devices = [host.device] if host.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), host.computing():
        torch.manual_seed(sampling.seed)
        host.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_config(host, study, sampling, stops),
            streamer=pieces,
            stopping_criteria=StoppingCriteriaList([pieces.stopping]),
        )
    return pieces.close()
