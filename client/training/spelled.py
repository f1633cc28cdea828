"""Control tokens that a text spells: they stay text.

A tokenizer reads some strings as one token each: `<|im_end|>`, `</s>`, `[SEP]`. They are for whoever writes around a
text: the chat template, the tokenizer itself. A record, a prompt or a system message that spells one could end its turn
and speak in another's name. So a text never gets these tokens, in training, prediction and serving alike.

Texts and words are tokenised with `AS_TEXT`. A conversation is tokenised with what the template writes around it, so
there a space breaks the spelling: `<|im_end|>` becomes `< |im_end|>`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

AS_TEXT = {"split_special_tokens": True}
"""Options with which a tokenizer reads no special token in what it is given."""

# Each break may leave a shorter token whole.
_TRIES = 16


class Unspelled:
    """Breaks the control tokens of a tokenizer in texts."""

    def __init__(self, tokenizer: Any, others: Collection[str] = ()) -> None:
        """Take the tokenizer's special tokens, and other tokens that its chat template writes around turns."""
        added = {str(token): (place, token) for place, token in tokenizer.added_tokens_decoder.items()}
        special = {text for text, (_, token) in added.items() if token.special} | set(tokenizer.all_special_tokens)
        tokens = {text for text in (*special, *others) if text.strip()}
        self._pattern = _pattern(tuple(sorted(tokens, key=lambda text: (-len(text), text))))
        self._tokenizer = tokenizer
        # The tokenizer looks for these after its normalisation, so that other spellings mean them as well.
        self._folded: set[int] = set()
        if tokenizer.is_fast and tokenizer.backend_tokenizer.normalizer is not None:
            self._folded = {added[text][0] for text in tokens if text in added and added[text][1].normalized}

    def __call__(self, text: str) -> str:
        """Return a text with every control token broken."""
        while self._pattern.search(text):
            text = self._pattern.sub(lambda found: _broken(found.group()), text)
        for _ in range(_TRIES if self._folded else 0):
            encoding = self._tokenizer(text, add_special_tokens=False).encodings[0]
            spans = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token in self._folded]
            if not spans:
                return text
            for start, end in reversed(spans):
                text = text[:start] + _broken(text[start:end]) + text[end:]
        return text

    def turns(self, turns: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        """Return a conversation with every control token in its contents broken."""
        return [{**turn, "content": self(turn["content"])} for turn in turns]


def _broken(text: str) -> str:
    lead = len(text) - len(text.lstrip()) + 1
    return f"{text[:lead]} {text[lead:]}" if text[lead:].strip() else text[: lead - 1] + " "


@lru_cache(maxsize=8)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")
