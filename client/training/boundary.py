"""Where errors of other libraries end: each becomes one sentence that says what was done, and what to do.

Libraries raise errors of every class while they load, wrap and run a model. Nothing that they are given here is a
record: they get a base model, and tokens that were drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from privet.common.errors import PrivetError, StudyError

_LONGEST = 160


@contextmanager
def library_errors(what: str, hint: str) -> Iterator[None]:
    """Turn every error of a library inside the context into a `StudyError`. Errors raised on purpose pass.

    Args:
        what: The field, and what failed, such as "model.base: the tokenizer in DIR cannot be loaded".
        hint: What to do.

    Raises:
        StudyError: A library raised an error; the message is `what` with the error's first sentence.
    """
    try:
        yield
    except PrivetError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise StudyError(
            f"{what}: this machine has too little memory",
            "choose a smaller base model, lower data.max_length in the study, or keep the base in few bits: `privet "
            "base DIRECTORY --quantisation nf4` prints the keys",
        ) from error
    except Exception as error:  # libraries share no base class of errors
        raise StudyError(f"{what} ({first_sentence(error)})", hint) from error


def first_sentence(error: Exception) -> str:
    """Return an error's class and its first sentence, in at most 160 characters."""
    lines = str(error).strip().splitlines()
    text = lines[0].partition(". ")[0].strip().rstrip(".") if lines else ""
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
