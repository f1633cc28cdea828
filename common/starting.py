"""The first seconds of a command: Python does not look for garbage among libraries that stay."""

from __future__ import annotations

import gc
from functools import cache

_USUAL = gc.get_threshold()
_RARELY = (10_000, *_USUAL[1:])
"""New objects between two searches. Importing PyTorch and its companions makes 400,000, and none of them is garbage."""


def begin() -> None:
    """Look for garbage less often, until `settle`. A sixth of the time that large libraries take to load is saved."""
    gc.set_threshold(*_RARELY)


def settle() -> None:
    """Look for garbage as usual, but no longer in what was loaded. To be called before a model or a service is opened.

    Cycles of objects can hold large tensors, so a search must not wait for many of them.
    """
    _leave_out_libraries()
    gc.set_threshold(*_USUAL)


@cache  # later on, garbage could be among what is left out, with a whole model in it
def _leave_out_libraries() -> None:
    gc.freeze()
