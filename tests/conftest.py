"""What the tests share: tiny bases, built once a session, and the command."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from privet.common.cli import main

Run = Callable[..., tuple[int, str, str]]
"""Runs the command with these arguments, and returns exit code, stdout and stderr."""

# Importing torch and all else makes millions of objects that stay, and looking through them for garbage again and again
# takes half of the time. So nobody looks during collection, and what there is by then is left out for good.
gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: "tests/system/" not in item.nodeid)


def pytest_collection_finish() -> None:
    """Look for garbage again, among what the tests make."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Tiny bases by family, and `llama-chat`, which has a chat template. Read only."""
    from tests.support.tiny import FAMILIES, tiny_base  # here, so that tests without a model do not load torch

    root = tmp_path_factory.mktemp("bases")
    found = {family: tiny_base(root / family, family) for family in FAMILIES}
    return {**found, "llama-chat": tiny_base(root / "llama-chat", "llama", chat=True)}


@pytest.fixture(scope="session")
def bert(bases: Mapping[str, Path]) -> Path:
    """A tiny encoder. Read only."""
    return bases["bert"]


@pytest.fixture(scope="session")
def llama(bases: Mapping[str, Path]) -> Path:
    """A tiny decoder. Read only."""
    return bases["llama"]


@pytest.fixture
def privet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process and return exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["privet", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run
