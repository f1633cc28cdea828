"""When Python looks for garbage."""

from __future__ import annotations

import gc

import pytest

from privet.common import starting


def test_garbage_is_looked_for_rarely_until_a_model_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[int] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(1))
    starting._leave_out_libraries.cache_clear()
    before, usual = gc.get_threshold(), starting._USUAL  # a command of another test may have begun in this process
    try:
        for _ in range(2):
            starting.begin()
            assert gc.get_threshold()[0] > usual[0]
            starting.settle()
            assert gc.get_threshold() == usual
    finally:
        gc.set_threshold(*before)
    assert frozen == [1]  # what comes later may be a model, and has to be freed
