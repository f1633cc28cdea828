"""Kinds of wrong input: what a person did, what the command says, and what mends it.

A kind is a generator. It makes something wrong and yields the words of a command, which ends with an error. It receives
what was said, does what the hint says, and yields the words of a command that works then.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.common.test_hints import objection
from tests.conftest import Run

SECRET = "geheim"
"""Is part of each text, id, unknown label and passphrase in these tests. Nobody may read it in what a command says."""

_COMMAND = re.compile("`([^`]+)`")
_HELP = re.compile(r"^Try '\S.* --help' for help\.$", re.MULTILINE)


@dataclass(frozen=True)
class Said:
    """What a command said."""

    out: str
    err: str

    @property
    def commands(self) -> list[str]:
        """The command lines between backquotes, and those after `next:`."""
        following = re.findall(r"^next: (privet .*)$", self.out + self.err, re.MULTILINE)
        return [*_COMMAND.findall(self.out + self.err), *following]

    def command(self, beginning: str, **values: object) -> list[str]:
        """Return the words after `privet` of the named command that begins so, with values for words in capitals."""
        found = [line for line in self.commands if line.startswith(f"privet {beginning}")]
        assert found, f"no command {beginning} in {self.err}{self.out}"
        return [str(values.get(word, word)) for word in shlex.split(found[0])[1:]]

    def run(self, beginning: str) -> None:
        """Run the command of the shell that begins so, as `chmod`."""
        (line,) = [line for line in self.commands if line.startswith(beginning)]
        subprocess.run(shlex.split(line), check=True)


Words = Sequence[object]
Story = Generator[Words, Said, None]
Make = Callable[[Any], Story]


@dataclass(frozen=True)
class Kind:
    """One kind of wrong input.

    Attributes:
        story: What happens.
        code: Exit code, as common/errors.py lists them.
        says: What is wrong, as a regular expression.
        hint: What to do, as one.
    """

    story: Make
    code: int
    says: str
    hint: str
    verdict: bool = False
    """Whether the command's result says it, on standard output, as that of `privet site doctor`."""


@dataclass
class Table:
    """The kinds of one part."""

    kinds: list[Kind] = field(default_factory=list)

    def __call__(self, code: int, says: str, hint: str, *, verdict: bool = False) -> Callable[[Make], Make]:
        """Return a decorator that adds a kind."""

        def add(story: Make) -> Make:
            self.kinds.append(Kind(story, code, says, hint, verdict))
            return story

        return add

    @property
    def each(self) -> pytest.MarkDecorator:
        """The decorator that runs a test once for each kind."""
        return pytest.mark.parametrize("kind", self.kinds, ids=lambda kind: kind.story.__name__)


def play(kind: Kind, privet: Run, place: object) -> None:
    """Let a kind happen at a place, check what is said, and that the command works once its hint was followed."""
    story = kind.story(place)
    code, out, err = privet(*next(story))
    said = Said(out, err)
    _check(kind, code, said)
    try:
        words = story.send(said)
    except StopIteration:
        return
    while True:  # the last of these commands is one that the fault would have refused
        code, out, err = privet(*words)
        assert code == 0, f"{words} does not mend it: {out}{err}"
        assert SECRET not in out + err
        try:
            words = story.send(Said(out, err))
        except StopIteration:
            return


def _check(kind: Kind, code: int, said: Said) -> None:
    """Check the exit code, that there is one error with a hint, and that nothing is said that must not be."""
    everything = said.out + said.err
    assert code == kind.code, everything
    for word in ("Traceback", SECRET, "PRIVATE KEY", "privet1."):
        assert word not in everything
    lines = [line for line in said.commands if line.startswith("privet ")]
    assert not {line: wrong for line in lines if (wrong := objection(line))}
    if kind.verdict:
        assert "error: " not in everything.lower()
        assert re.search(kind.says, said.out), everything
        assert re.search(kind.hint, said.out), everything
        return
    before, found, error = said.err.partition("error: ")
    error, hinted, hint = error.partition("\n hint: ")
    if not found:  # words that the command line does not know
        before, found, error = said.err.partition("Error: ")
        hint, hinted = "\n".join(_HELP.findall(before)) + error, "Try"
    assert (bool(found), bool(hinted), bool(hint)) == (True, True, True), everything
    assert "error: " not in before.lower() + error.lower()
    assert re.search(kind.says, error), everything
    assert re.search(kind.hint, hint), everything
