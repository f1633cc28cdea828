"""The result of one check, as `privet site doctor` prints it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: Subject of the check.
        ok: Whether the check passed.
        text: What was found.
        hint: What to do if it did not pass.
        made: Whether the check could be made at all. One that could not is no fault of its own.
    """

    name: str
    ok: bool
    text: str
    hint: str = ""
    made: bool = True
