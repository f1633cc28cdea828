"""Generate answers with a mounted adapter: sampling, stop tokens, streaming.

An answer ends where `privet.client.training.tasks.answer_ends` says: at an end token of the base, or at the marker with
which the chat template ends a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from privet.client.training.features import prompt_ids
from privet.client.training.forms import Turn
from privet.client.training.host import ModelHost
from privet.client.training.tasks import answer_ends, left_padded
from privet.common.study.study import Study

# Logits divided by less overflow, which on an accelerator ends the process's use of it.
_COLDEST = 1e-4
_UNFINISHED = "\ufffd"  # what a decoder writes for a character of which it has seen only some bytes


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and how many there may be.

    Attributes:
        temperature: Divisor of the logits. Below 0.0001 the most probable token is taken each time (greedy).
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


def room_for(host: ModelHost) -> int | None:
    """Return the most tokens of prompt and answer that the base has positions for; None without a limit."""
    positions = getattr(host.model.config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def stop_tokens(host: ModelHost, study: Study) -> list[str]:
    """Return the tokens, or the text, that end an answer, as a person reads them."""
    ends, marker = answer_ends(host, study)
    names = [str(host.tokenizer.convert_ids_to_tokens(end)) for end in ends]
    return [*names, marker] if marker else names


def _config(host: ModelHost, study: Study, sampling: Sampling, stops: Sequence[int]) -> GenerationConfig:
    drawn = sampling.temperature >= _COLDEST
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
    stops, marker = answer_ends(host, study)
    ids, mask = left_padded(host, prompts)
    devices = [host.device] if host.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), host.computing():
        torch.manual_seed(sampling.seed + offset)
        config = _config(host, study, sampling, stops)
        full = host.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [_answer(host, row, stops, marker) for row in full[:, ids.shape[1] :].tolist()]


def greedy_answers(host: ModelHost, study: Study, prompts: Sequence[str | Sequence[Turn]], size: int = 16) -> list[str]:
    """Return the most probable answer to each prompt, up to the end of the turn.

    Args:
        host: The model; its lock is held by the caller.
        study: What was agreed.
        prompts: What a user says, or conversations that end with what a user says.
        size: Prompts of a batch.

    Raises:
        DataError: The chat template does not take a conversation, or leaves no room for its question.
    """
    found: list[str] = []
    for start in range(0, len(prompts), size):
        rows = [
            prompt_ids(study, host.tokenizer, prompt, study.data.max_length) for prompt in prompts[start : start + size]
        ]
        found += [answer.text for answer in answers(host, study, rows, Sampling())]
    return found


def _answer(host: ModelHost, row: list[int], stops: Sequence[int], marker: str) -> Answer:
    end = next((place for place, token in enumerate(row) if token in stops), None)
    kept = row if end is None else row[:end]
    text = host.tokenizer.decode(kept, skip_special_tokens=True)
    text, found, _ = text.partition(marker) if marker else (text, "", "")
    return Answer(text.strip(), len(row) if end is None else end + 1, end is not None or bool(found))


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
    stops, marker = answer_ends(host, study)
    pieces = _Stream(host.tokenizer, stops, (*texts, marker) if marker else tuple(texts), say, cancelled)
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
