"""The tokenizer of a base: opened, and refused where it lacks what the task needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from privet.client.training.boundary import library_errors
from privet.client.training.template import open_template
from privet.common.errors import StudyError
from privet.common.privacy.accounting import quiet_warnings
from privet.common.study.sections import TaskSection

# Files that hold a tokenizer's words.
_VOCABULARIES = ("tokenizer.json", "*vocab*", "merges*", "*.model", "*.tiktoken", "tekken.json", "*bpe*")
_LAST_PIECE = "privet_labels_last_piece"


def open_tokenizer(base: Path, task: TaskSection) -> Any:
    """Return the tokenizer of a base, with a padding token.

    Raises:
        StudyError: It cannot be read, lacks what the task needs, or its chat template cannot be used.
    """
    with (
        quiet_warnings(),
        library_errors(
            "model.base: the tokenizer of the base cannot be read",
            "check that the base has its tokenizer.json and tokenizer_config.json, as published",
        ),
    ):
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False, local_files_only=True)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    # Without files, the library makes a tokenizer that knows no words.
    if tokenizer.vocab_files_names and not any(found for kind in _VOCABULARIES for found in base.glob(kind)):
        raise StudyError(
            f"model.base: {base.name} has no tokenizer: expected tokenizer.json or a vocabulary, found neither",
            "copy the complete model directory",
        )
    if tokenizer.is_fast and getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        raise StudyError(
            f"model.base: the tokenizer of {base.name} cuts words by chance (dropout in tokenizer.json), so that a "
            "record would get other tokens each time",
            "choose a base whose tokenizer.json has no dropout",
        )
    if task.kind == "token-classification" and not tokenizer.is_fast:
        raise StudyError(
            "model.base: token-classification needs a fast tokenizer, which knows the place of each token in the text; "
            f"this base has {type(tokenizer).__name__}, which does not",
            "choose a base with a tokenizer.json",
        )
    if task.generates:
        open_template(tokenizer, task)
    return tokenizer


def label_last_piece(tokenizer: Any) -> None:
    """Say that the model behind a tokenizer sees no later tokens, so that a word is labelled at its last piece.

    A causal model has not read a word before its last piece. The mark is at the tokenizer, which everything that
    encodes records holds, so that no caller can forget it.
    """
    setattr(tokenizer, _LAST_PIECE, True)


def labels_last_piece(tokenizer: Any) -> bool:
    """Return whether words are labelled at their last piece, and not at their first."""
    return bool(getattr(tokenizer, _LAST_PIECE, False))
