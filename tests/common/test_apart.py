"""Accounting in another process: the same numbers to the last bit, and the process ends by itself."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest

from privet.common.errors import StateError
from privet.common.privacy import accounting, apart
from privet.common.privacy.accounting import PrivacyEvent, epsilon, filtered_epsilon, noise_multiplier
from privet.common.privacy.apart import Accountant, compute_apart

EVENTS = [PrivacyEvent(0.7, 0.5, 20, "record"), PrivacyEvent(1.1, 0.01, 200, "record")]
LITTLE = [PrivacyEvent(0.2, 0.5, 1, "record")]


def figures() -> list[float]:
    for cached in (accounting._epsilon, accounting._rdp, accounting._calibrated):
        cached.cache_clear()
    return [
        epsilon(EVENTS, 1e-5),
        epsilon(EVENTS, 1e-5, "rdp"),
        epsilon(LITTLE, 1e-5),
        filtered_epsilon(EVENTS, 1e-5, 8.0),
        noise_multiplier(4.0, 1e-5, 0.5, 10),
        noise_multiplier(4.0, 1e-5, 0.5, 10, beside=3.0),
    ]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accountant]:
    monkeypatch.setattr(apart, "_accountant", None)
    accountant = compute_apart()
    assert compute_apart() is accountant
    yield accountant
    accountant.rest()


def test_numbers_computed_apart_are_the_same_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    here = figures()
    monkeypatch.setattr(apart, "_accountant", Accountant())
    there = figures()
    assert here == there
    assert math.isinf(there[2])
    compute_apart().rest()
    assert figures() == here  # it is started again


def test_the_process_ends_when_it_is_not_asked(elsewhere: Accountant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "IDLE_SECONDS", 0.2)
    elsewhere.ask("_epsilon", [((1.0, 0.5, 1),), 1e-5, "rdp"])
    process = elsewhere._process
    assert process is not None
    ends = time.monotonic() + 20
    while elsewhere._process is not None and time.monotonic() < ends:
        time.sleep(0.05)
    process.wait(20)


def test_a_process_that_dies_is_said_and_replaced(elsewhere: Accountant) -> None:
    question = ("_epsilon", [((1.0, 0.5, 1),), 1e-5, "rdp"])
    found = elsewhere.ask(*question)
    process = elsewhere._process
    assert process is not None
    process.kill()
    process.wait()
    with pytest.raises(StateError, match="ended before it answered"):
        elsewhere.ask(*question)
    assert elsewhere.ask(*question) == found
