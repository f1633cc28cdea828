"""What our texts tell people to run exists: each `privet ...` command in a hint, an error or a help text."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import lru_cache

import click
import pytest
import typer

from privet.common.cli import build_command
from tests.layout.survey import PARTS, sources, tree

_QUOTED = re.compile(r"`(privet(?:\s[^`]*)?)`")
_VALUE = "{}"
"""Stands where a text inserts a value."""


def texts(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the content of each string, docstrings included; values in it are left open."""
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else _VALUE for part in node.values]
        yield node.lineno, "".join(map(str, parts))
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                yield from texts(part.value)
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.lineno, node.value
    for child in ast.iter_child_nodes(node):
        yield from texts(child)


def commands() -> dict[str, list[str]]:
    """Return each command line that a text quotes, with the places that do."""
    found: dict[str, list[str]] = {}
    for file in sources(*PARTS):
        for line, text in texts(tree(file)):
            for quoted in _QUOTED.findall(text):
                found.setdefault(" ".join(quoted.split()), []).append(f"{file}:{line}")
    return found


@lru_cache(maxsize=1)
def root() -> click.Command:
    return typer.main.get_command(build_command())


def objection(line: str) -> str:
    """Return what is wrong with a command line that a text quotes; empty if nothing is. Arguments may be left out."""
    command, path = root(), "privet"
    arguments = 0
    words = iter(shlex.split(line)[1:])
    for word in words:
        if word.startswith("-") and word != "-":
            name, equals, _ = word.partition("=")
            known = {flag: each for each in command.params for flag in (*each.opts, *each.secondary_opts)}
            if name not in known and name != "--help":
                return f"{path} has no option {name}"
            if name in known and not equals and not getattr(known[name], "is_flag", False):
                next(words, None)
        elif word == _VALUE and isinstance(command, click.Group):
            return ""  # which command it is only shows when the text is made
        elif isinstance(command, click.Group):
            if word not in command.commands and "pin" in command.commands:  # an argument of the group's own command
                command, arguments = command.commands["pin"], 1
                continue
            if word not in command.commands:
                return f"{path} has no command {word}"
            command, path = command.commands[word], f"{path} {word}"
        else:
            arguments += 1
    takes = [each.nargs for each in command.params if isinstance(each, click.Argument)]
    return f"{path} takes no {arguments} arguments" if -1 not in takes and arguments > sum(takes) else ""


def test_every_command_that_a_text_names_exists() -> None:
    quoted = commands()
    assert len(quoted) > 20
    wrong = [
        f"{place}: `{line}`: {said}" for line, places in quoted.items() if (said := objection(line)) for place in places
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("privet simulate --resume RUN", ""),
        ("privet audit verify BUNDLE --policy=FILE", ""),
        ("privet coordinator run STUDY -C DIRECTORY", ""),
        ("privet --version", ""),
        ("privet audit", ""),
        ("privet attack {} --help", ""),
        ("privet audit sign RUN", "privet audit has no command sign"),
        ("privet resume RUN", "privet has no command resume"),
        ("privet simulate --continue RUN", "privet simulate has no option --continue"),
        ("privet audit prove BUNDLE --leaf 3 OTHER", "privet audit prove takes no 2 arguments"),
        ("privet audit --policy FILE verify BUNDLE", "privet audit has no option --policy"),
    ],
)
def test_a_command_or_option_that_does_not_exist_is_found(line: str, said: str) -> None:
    assert objection(line) == said
