"""What the tests share: tiny bases, built once a session."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Tiny bases by family, and `llama-chat`, which has a chat template. Read only."""
    from tests.tiny import FAMILIES, tiny_base  # here, so that tests without a model do not load torch

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
