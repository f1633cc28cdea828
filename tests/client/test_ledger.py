"""The ledger: no release without a charge, never two payloads for one, never beyond the limit, whatever happens."""

from __future__ import annotations

import functools
import hashlib
import hmac
import itertools
import json
import math
import os
import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from opacus.accountants import PRVAccountant

from privet.client.budget import accounts, chain
from privet.client.budget.accounts import Cost, Item, Limit, RoundKey, composed_epsilon
from privet.client.budget.ledger import Ledger, cost_of
from privet.client.budget.sealing import Sealer
from privet.common.canonical import canonical_json, digest
from privet.common.errors import (
    BudgetExhaustedError,
    PrivetError,
    RefusedError,
    SpentRoundError,
    StateError,
    VerificationError,
)
from privet.common.privacy.accounting import PrivacyEvent, quiet_warnings
from privet.common.secagg.site import RecordedStep, Recorder
from tests.support.ledger_model import MUTANTS, RARE, Model, class_epsilon, gaussian_epsilon, paid

A, B, C = (digest(name) for name in (b"study a", b"study b", b"study c"))
X, Y = digest(b"inputs x"), digest(b"inputs y")
DELTA = 1e-5


def event(z: float = 8.0, rate: float = 1.0, steps: int = 1, unit: str = "record") -> PrivacyEvent:
    return PrivacyEvent(z, rate, steps, unit)


def gaussian(rounds: int, z: float = 8.0) -> float:
    return gaussian_epsilon([event(z)] * rounds, DELTA)


COST = Cost(event())
# Covers twenty rounds of that, and not one more.
LIMIT = Limit("record", gaussian(20) + 0.03, DELTA)


def release(number: int = 1, study: str = A, dataset: str = "notes") -> RoundKey:
    return RoundKey(dataset, study, number)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Account by a closed form, where a test is about the books and not about the accountant."""
    account_exactly(monkeypatch)


def account_exactly(patch: pytest.MonkeyPatch) -> None:
    # Of Gaussian noise without sampling, composition is as tight if each may depend on those before (Smith and
    # Thakurta 2022, theorem 1.1). So one closed form stands for both ways to count.
    patch.setattr(accounts, "epsilon", gaussian_epsilon)
    patch.setattr(accounts, "filtered_epsilon", lambda events, delta, limit: gaussian_epsilon(events, delta))


@pytest.fixture
def path(tmp_path: Path, exact: None) -> Path:
    return tmp_path / "ledger" / "site.db"


@pytest.fixture
def anchor(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere" / "head"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    path.parent.mkdir()
    opened = Ledger.create(path)
    yield opened
    opened.close()


def reserve(ledger: Ledger, what: RoundKey, inputs: str = X, planned: int = 5) -> bytes | None:
    return ledger.reserve(what, COST, inputs, LIMIT, planned)


def train(ledger: Ledger, what: RoundKey, payload: bytes = b"noised", planned: int = 5) -> None:
    assert reserve(ledger, what, planned=planned) is None
    ledger.begin(what)
    ledger.charge(what, payload)


def drop_begins(path: Path) -> None:
    """Turn the reservations of a ledger, one that is closed, into those of the version that wrote no begin."""
    with sqlite3.connect(path) as database:
        (trigger,) = database.execute("SELECT sql FROM sqlite_schema WHERE name = 'entries_keep'").fetchone()
        database.execute("DROP TRIGGER entries_keep")
        head = ""
        for sequence, content in database.execute("SELECT sequence, content FROM entries ORDER BY sequence").fetchall():
            old = canonical_json({key: value for key, value in json.loads(content).items() if key != "begins"})
            head = digest(head.encode() + old)
            database.execute(
                "UPDATE entries SET content = ?, head = ? WHERE sequence = ?", (old.decode(), head, sequence)
            )
        database.execute(trigger)


def rows(path: Path) -> list[dict[str, Any]]:
    with sqlite3.connect(path) as database:
        return [json.loads(row[0]) for row in database.execute("SELECT content FROM entries ORDER BY sequence")]


def kinds(path: Path) -> list[str]:
    return [row["kind"] for row in rows(path)]


# --- the life of a release -------------------------------------------------------------------------------


def test_a_charged_release_is_sent_again_byte_for_byte(ledger: Ledger, path: Path) -> None:
    train(ledger, release(), b"noised once")
    assert reserve(ledger, release()) == b"noised once"
    assert ledger.stored(release()) == b"noised once"
    ledger.close()
    again = Ledger.open(path)
    assert reserve(again, release()) == b"noised once"
    assert kinds(path) == ["genesis", "reserve", "begin", "charge"]


def test_a_charge_holds_what_was_released_at_what_cost(ledger: Ledger, path: Path) -> None:
    cost = Cost(event(2.0, 0.25, 7), event(5.0, 1.0, 1), 0.125)
    ledger.reserve(release(3), cost, X, None, 9)
    ledger.begin(release(3))
    ledger.charge(release(3), b"noised")
    row = rows(path)[-1]
    assert row.pop("time")
    assert row == {
        "kind": "charge",
        "dataset": "notes",
        "study": A,
        "round": 3,
        "inputs": X,
        "cost": {
            "training": event(2.0, 0.25, 7).document(),
            "validation": event(5.0, 1.0, 1).document(),
            "validation_fraction": 0.125,
            "split": "",
        },
        "payload": Sealer(path.with_suffix(".key")).mark(b"noised"),
        "bytes": 6,
    }
    assert ledger.items("notes") == (Item(A, cost, True, 1),)


def test_a_round_is_trained_once(ledger: Ledger) -> None:
    assert reserve(ledger, release()) is None
    with pytest.raises(RefusedError, match="for the adapter and cohort with digest"):
        reserve(ledger, release(), Y)
    ledger.begin(release())
    ledger.charge(release(), b"noised")
    with pytest.raises(RefusedError, match="would be an uncharged release"):
        reserve(ledger, release(), Y)


def test_a_site_that_died_before_its_first_draw_takes_its_reservation_up_again(ledger: Ledger, path: Path) -> None:
    assert reserve(ledger, release()) is None
    ledger.close()
    again = Ledger.open(path)
    with pytest.raises(RefusedError, match="for the adapter and cohort with digest"):
        reserve(again, release(), Y)
    with pytest.raises(RefusedError, match="with another privacy cost"):
        again.reserve(release(), Cost(event(9.0)), X, LIMIT, 5)
    assert reserve(again, release()) is None
    again.begin(release())
    again.charge(release(), b"noised")
    assert kinds(path) == ["genesis", "reserve", "begin", "charge"]


def test_a_round_that_began_is_spent_and_is_never_trained_again(ledger: Ledger, path: Path) -> None:
    assert reserve(ledger, release()) is None
    with pytest.raises(StateError, match="is private and never began"):
        ledger.charge(release(), b"drawn before it was paid")
    ledger.begin(release())
    assert rows(path)[-1] == rows(path)[-1] | {"kind": "begin", "round": 1, "inputs": X, "cost": COST.document()}
    ledger.close()
    again = Ledger.open(path)
    for inputs in (X, Y, X):
        with pytest.raises(SpentRoundError, match=r"the round was charged, and its update was lost") as caught:
            reserve(again, release(), inputs)
        assert "takes part again in the next one" in caught.value.hint
    with pytest.raises(SpentRoundError):
        again.begin(release())
    with pytest.raises(RefusedError, match="its cost is spent and it cannot be cancelled"):
        again.cancel(release())
    statement = again.statement("notes", LIMIT)
    assert (statement.studies[0].charged, statement.studies[0].reserved) == (1, 0)
    assert statement.epsilon == statement.committed == pytest.approx(gaussian(1))
    assert again.receipts("notes") == ()  # nothing left
    train(again, release(2))
    again.verify()
    assert kinds(path) == ["genesis", "reserve", "begin", "reserve", "begin", "charge"]


def test_a_round_begins_in_one_process_alone(ledger: Ledger, path: Path) -> None:
    assert reserve(ledger, release()) is None
    others = [ledger, *(Ledger.open(path) for _ in range(3))]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: outcome(lambda one: one.begin(release()), each), others))
    assert sorted(map(str, found)) == sorted(map(str, [None, *[SpentRoundError] * 3]))


def test_a_private_round_that_an_earlier_version_reserved_counts_as_begun(ledger: Ledger, path: Path) -> None:
    assert reserve(ledger, release()) is None
    assert ledger.reserve(release(1, B, "images"), None, X, None, 3) is None
    ledger.close()
    drop_begins(path)
    old = Ledger.open(path)
    assert [item.charged for name in ("notes", "images") for item in old.items(name)] == [True, False]
    with pytest.raises(SpentRoundError):
        reserve(old, release())
    with pytest.raises(SpentRoundError):
        old.begin(release())
    with pytest.raises(RefusedError, match="its cost is spent"):
        old.cancel(release())
    # Without privacy there was no noise to draw.
    assert old.reserve(release(1, B, "images"), None, X, None, 3) is None
    old.charge(release(1, B, "images"), b"plain")
    train(old, release(2))
    assert old.items("notes") == (Item(A, COST, True, 2),)


def test_a_study_without_privacy_may_be_trained_as_often_as_it_is_asked_for(ledger: Ledger, path: Path) -> None:
    for _ in range(3):
        assert ledger.reserve(release(), None, X, None, 3) is None
        ledger.begin(release())
    assert kinds(path) == ["genesis", "reserve"]


def test_a_charge_is_for_one_payload(ledger: Ledger, path: Path) -> None:
    train(ledger, release())
    ledger.charge(release(), b"noised")
    with pytest.raises(StateError, match="differs from the update that the ledger charged"):
        ledger.charge(release(), b"noised again")
    assert kinds(path) == ["genesis", "reserve", "begin", "charge"]
    assert ledger.stored(release()) == b"noised"


def test_nothing_is_charged_that_was_not_reserved(ledger: Ledger, path: Path) -> None:
    with pytest.raises(StateError, match="has no open reservation for"):
        ledger.charge(release(), b"noised")
    with pytest.raises(StateError, match="has no open reservation for"):
        ledger.begin(release())
    with pytest.raises(StateError, match="holds no charge for"):
        ledger.acknowledge(release())
    with pytest.raises(StateError, match=r"has no reservation for .* nothing to cancel"):
        ledger.cancel(release())
    assert kinds(path) == ["genesis"]
    assert ledger.stored(release()) is None


def test_a_cancelled_round_is_given_up(ledger: Ledger) -> None:
    assert reserve(ledger, release()) is None
    ledger.cancel(release())
    ledger.cancel(release())
    with pytest.raises(StateError, match="has no open reservation for"):
        ledger.begin(release())
    with pytest.raises(StateError, match="has no open reservation for"):
        ledger.charge(release(), b"from a process that did not know")
    for inputs in (X, Y):
        with pytest.raises(RefusedError, match="cancelled"):
            reserve(ledger, release(), inputs)
    assert ledger.items("notes") == ()
    assert reserve(ledger, release(2)) is None


def test_a_charge_is_never_taken_back(ledger: Ledger) -> None:
    train(ledger, release())
    with pytest.raises(RefusedError, match="was charged, so it cannot be cancelled"):
        ledger.cancel(release())
    assert ledger.items("notes") == (Item(A, COST, True, 1),)


def test_bytes_are_dropped_once_they_arrived_and_a_later_round_was_charged(ledger: Ledger, path: Path) -> None:
    train(ledger, release(1), b"one")
    ledger.acknowledge(release(1))
    assert reserve(ledger, release(1)) == b"one"
    train(ledger, release(5, B), b"another study's later round does not count")
    assert ledger.stored(release(1)) == b"one"
    train(ledger, release(2), b"two")
    assert ledger.stored(release(1)) is None
    with pytest.raises(RefusedError, match="no longer keeps the update"):
        reserve(ledger, release(1))
    with pytest.raises(StateError, match="differs from the update that the ledger charged"):
        ledger.charge(release(1), b"trained again")
    train(ledger, release(3), b"three")
    assert ledger.stored(release(2)) == b"two"
    ledger.acknowledge(release(2))
    assert ledger.stored(release(2)) is None
    ledger.acknowledge(release(2))
    ledger.verify()
    assert rows(path)[-1] == rows(path)[-1] | {"kind": "acknowledge", "round": 2}


def test_a_study_without_privacy_is_released_once_as_well(ledger: Ledger) -> None:
    assert ledger.reserve(release(), None, X, None, 3) is None
    ledger.charge(release(), b"plain")
    assert ledger.reserve(release(), None, X, None, 3) == b"plain"
    with pytest.raises(RefusedError, match="would be an uncharged release"):
        ledger.reserve(release(), None, Y, None, 3)


def test_a_step_of_secure_aggregation_is_taken_once(ledger: Ledger, path: Path) -> None:
    record: Recorder = ledger.take
    record(RecordedStep(b"session", 1, "mask", b"roster", b"lists"))
    for roster, lists in ((b"roster", b"lists"), (b"other roster", b"other lists")):
        with pytest.raises(StateError, match="step of this round already"):
            ledger.take(RecordedStep(b"session", 1, "mask", roster, lists))
    ledger.close()
    again = Ledger.open(path)
    with pytest.raises(StateError, match="step of this round already"):
        again.take(RecordedStep(b"session", 1, "mask", b"roster", b"lists"))
    again.take(RecordedStep(b"session", 1, "reveal", b"roster", b"lists"))
    again.take(RecordedStep(b"session", 2, "mask", b"roster", b"lists"))
    again.take(RecordedStep(b"another session", 1, "mask", b"roster", b"lists"))
    assert rows(path)[1] == rows(path)[1] | {
        "kind": "take",
        "session": b"session".hex(),
        "round": 1,
        "step": "mask",
        "roster": b"roster".hex(),
        "lists": b"lists".hex(),
    }


def test_there_is_no_verb_that_gives_budget_back() -> None:
    verbs = {name for name in vars(Ledger) if not name.startswith("_")}
    files = {"create", "open", "in_memory", "close", "verify", "head", "check_anchor", "start_anchor"}
    assert verbs == files | {
        "reserve",
        "reserved",
        "inputs",
        "begin",
        "charge",
        "acknowledge",
        "cancel",
        "take",
        "stored",
        "counts",
        "holds",
        "check_key",
        "replace_key",
        "items",
        "statement",
        "began",
        "receipts",
        "paid",
        "datasets",
    }


# --- the limit -------------------------------------------------------------------------------------------


def test_a_study_that_cannot_end_is_refused_at_its_first_round(ledger: Ledger, path: Path) -> None:
    train(ledger, release(1, B), planned=1)
    with pytest.raises(BudgetExhaustedError) as refused:
        reserve(ledger, release(1), planned=20)
    planned = [Item(B, COST, True, 1), Item(A, COST, False, 20)]
    least = accounts.admitting_epsilon(planned, LIMIT)
    assert least is not None
    for part in (
        "limit.epsilon of dataset notes",
        f"{gaussian(1):.4g} is",
        "The 20 remaining rounds of study",
        f"the least limit that admits them is epsilon {least:g}",
        f"the limit is epsilon {LIMIT.epsilon:g} for each record",
    ):
        assert part in refused.value.message
    assert refused.value.exit_code == 3
    assert kinds(path) == ["genesis", "reserve", "begin", "charge"]
    for number in range(1, 20):
        train(ledger, release(number), planned=19)
    assert ledger.statement("notes", LIMIT).epsilon == pytest.approx(gaussian(20))
    with pytest.raises(BudgetExhaustedError):
        reserve(ledger, release(20), planned=19)


def test_a_study_may_spend_exactly_what_is_left(ledger: Ledger) -> None:
    exactly = Limit("record", gaussian(5), DELTA)
    with pytest.raises(BudgetExhaustedError):
        ledger.reserve(release(), COST, X, exactly, 6)
    assert ledger.reserve(release(), COST, X, exactly, 5) is None


def test_reservations_count_until_they_are_cancelled(ledger: Ledger) -> None:
    for number in range(20):
        assert reserve(ledger, release(1, digest(bytes([number]))), planned=1) is None
    with pytest.raises(BudgetExhaustedError):
        reserve(ledger, release(1, A), planned=1)
    ledger.cancel(release(1, digest(bytes([7]))))
    assert reserve(ledger, release(1, A), planned=1) is None
    with pytest.raises(BudgetExhaustedError):
        reserve(ledger, release(1, B), planned=1)


def test_a_lowered_limit_holds_for_a_reservation_but_not_for_bytes_that_left(ledger: Ledger) -> None:
    low = Limit("record", gaussian(1) / 2, DELTA)
    assert reserve(ledger, release(1), planned=1) is None
    with pytest.raises(BudgetExhaustedError):
        ledger.reserve(release(1), COST, X, low, 1)
    ledger.begin(release(1))
    ledger.charge(release(1), b"noised")
    assert ledger.reserve(release(1), COST, X, low, 1) == b"noised"


def test_each_dataset_has_its_own_books(ledger: Ledger) -> None:
    train(ledger, release(1), planned=20)
    assert reserve(ledger, release(1, dataset="images"), planned=20) is None
    assert ledger.items("notes") == (Item(A, COST, True, 1),)
    assert ledger.items("images") == (Item(A, COST, False, 1),)


def test_a_limit_admits_only_mechanisms_that_protect_its_unit(ledger: Ledger) -> None:
    patient = Cost(event(unit="patient"))
    for limit, cost in ((Limit("patient", 3.0, DELTA), COST), (LIMIT, patient)):
        with pytest.raises(RefusedError, match=r"limit\.unit of dataset notes"):
            ledger.reserve(release(), cost, X, limit, 1)
    assert ledger.reserve(release(), patient, X, Limit("patient", 3.0, DELTA), 1) is None
    assert composed_epsilon([(patient, 1)], LIMIT) == math.inf


def test_one_record_more_can_move_its_patients_sum_twice_as_far_as_the_patient_does() -> None:
    # Why a patient's epsilon is not a record's: g is the clipped gradient of a patient with one record, h with two.
    clip, first, second = 1.0, 1.0, -5.0
    g, h = (max(min(total, clip), -clip) for total in (first, first + second))
    assert abs(g - 0) == clip
    assert abs(g - h) == 2 * clip
    assert gaussian_epsilon([event(8.0 / 2)], DELTA) > 1.9 * gaussian_epsilon([event(8.0)], DELTA)


def test_a_dataset_with_a_limit_takes_no_study_without_privacy(ledger: Ledger) -> None:
    with pytest.raises(RefusedError, match="limit of dataset notes"):
        ledger.reserve(release(), None, X, LIMIT, 1)
    assert ledger.items("notes") == ()


def test_after_a_release_without_privacy_no_limit_holds(ledger: Ledger) -> None:
    ledger.reserve(release(), None, X, None, 1)
    ledger.charge(release(), b"plain")
    with pytest.raises(BudgetExhaustedError, match="inf is spent"):
        reserve(ledger, release(1, B))
    statement = ledger.statement("notes", LIMIT)
    assert statement.epsilon == math.inf
    assert statement.document()["epsilon"] is None


WRONG_EVENTS = [
    *({"z": z} for z in (0.0, -1.0, math.nan, math.inf, -math.inf, True)),
    *({"rate": rate} for rate in (0.0, -0.1, 1.1, math.nan, True)),
    *({"steps": steps} for steps in (0, -1, 2**53, 1.0, True)),
    {"unit": "hospital"},
]


@pytest.mark.parametrize("wrong", WRONG_EVENTS)
@pytest.mark.parametrize("validation", [False, True])
def test_a_cost_that_would_cost_nothing_is_refused(wrong: dict[str, Any], validation: bool) -> None:
    with pytest.raises(RefusedError, match="expected"):
        Cost(event(), event(**wrong), 0.5) if validation else Cost(event(**wrong))


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0, math.nan, True])
def test_a_fraction_lies_below_one(fraction: float) -> None:
    with pytest.raises(RefusedError, match="fraction"):
        Cost(event(), event(), fraction)


def test_validation_is_paid_for_exactly_where_units_are_held_out() -> None:
    # Or a study that holds out nearly everybody, and says that it does not validate, would cost nearly nobody.
    for validation, fraction in ((None, 0.1), (event(), 0.0)):
        with pytest.raises(RefusedError, match="expected a validation mechanism exactly where"):
            Cost(event(), validation, fraction)
    with pytest.raises(RefusedError, match="same unit"):
        Cost(event(), event(unit="patient"), 0.1)


@pytest.mark.parametrize(
    "make",
    [
        *(lambda e=e: Limit("record", e, DELTA) for e in (0.0, -1.0, math.nan, math.inf, True)),
        *(lambda d=d: Limit("record", 1.0, d) for d in (0.0, 1.0, -0.1, math.nan)),
        lambda: Limit("hospital", 1.0, DELTA),  # type: ignore[arg-type]
        *(lambda n=n: RoundKey("notes", A, n) for n in (0, -1, 2**53, True)),
        *(lambda n=n: RoundKey(n, A, 1) for n in ("", "/data/notes.csv", "Notes", "a" * 64, "notes\n")),
        *(lambda s=s: RoundKey("notes", s, 1) for s in ("", "a" * 64, "sha256:xy", A + "\n", A.upper())),
    ],
)
def test_limits_and_releases_must_make_sense(make: Callable[[], object]) -> None:
    with pytest.raises(RefusedError, match="expected"):
        make()


def test_inputs_and_plan_must_make_sense(ledger: Ledger) -> None:
    for inputs, planned in (("", 1), ("adapter", 1), (X, 0), (X, -1)):
        with pytest.raises(RefusedError, match="expected"):
            ledger.reserve(release(), COST, inputs, LIMIT, planned)


# --- composition -----------------------------------------------------------------------------------------

events = st.builds(event, st.sampled_from([1.0, 2.0, 4.0, 8.0]), st.just(1.0), st.integers(1, 3))
fractions = st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.9])
costs = st.one_of(st.builds(Cost, events), st.builds(Cost, events, events, fractions))


def work(events: Iterable[PrivacyEvent], delta: float) -> float:
    """Stand in for an accountant: it grows with the events, and nothing else is asked of it here."""
    return sum(event.steps / event.noise_multiplier**2 for event in events)


@given(st.lists(st.tuples(costs, st.integers(1, 4)), max_size=6), st.lists(st.floats(0, 1, exclude_max=True)))
@settings(deadline=None)
def test_every_unit_is_within_the_epsilon_and_one_reaches_it(
    history: list[tuple[Cost, int]], units: list[float]
) -> None:
    each = [cost for cost, rounds in history for _ in range(rounds)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accounts, "epsilon", work)
        found = composed_epsilon(history, LIMIT)
    assert found == pytest.approx(class_epsilon(each, DELTA, work), rel=1e-9)
    for unit in units:
        assert work([paid(cost, unit) for cost in each], DELTA) <= found * (1 + 1e-9)


def test_units_that_validate_in_one_study_and_train_in_another_pay_for_both_mechanisms() -> None:
    first, second = Cost(event(1.0), event(8.0), 0.2), Cost(event(8.0), event(2.0), 0.6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accounts, "epsilon", gaussian_epsilon)
        # Below 0.2: 8 and 2. From 0.2: 1 and 2, the worst, and the largest single costs. From 0.6: 1 and 8.
        assert composed_epsilon([(first, 1), (second, 1)], LIMIT) == pytest.approx(
            gaussian_epsilon([event(1.0), event(2.0)], DELTA)
        )
        # Twice the same split: nobody pays for training in one and validation in the other.
        assert composed_epsilon([(first, 1), (first, 1)], LIMIT) == pytest.approx(
            gaussian_epsilon([event(1.0)] * 2, DELTA)
        )


def test_units_named_otherwise_may_be_in_any_class_of_each_study() -> None:
    first, second = (Cost(event(1.0), event(2.0), 0.2, split) for split in ("patient", "rows"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accounts, "epsilon", gaussian_epsilon)
        assert composed_epsilon([(first, 1), (second, 1)], LIMIT) == pytest.approx(
            gaussian_epsilon([event(1.0)] * 2, DELTA)
        )
        mixed = [Cost(event(1.0), event(3.0), 0.2, "patient"), Cost(event(3.0), event(1.0), 0.2, "rows")]
        # Under one name no unit pays 1 twice: below 0.2 it pays 3 and 1, above 1 and 3.
        alike = [replace(cost, split="patient") for cost in mixed]
        assert composed_epsilon([(cost, 1) for cost in alike], LIMIT) == pytest.approx(
            gaussian_epsilon([event(1.0), event(3.0)], DELTA)
        )
        assert composed_epsilon([(cost, 1) for cost in mixed], LIMIT) == pytest.approx(
            gaussian_epsilon([event(1.0)] * 2, DELTA)
        )
        many = [(Cost(event(), event(), 0.1, f"name {n}"), 1) for n in range(7)]
        assert composed_epsilon(many[:6], LIMIT) < math.inf
        assert composed_epsilon(many, LIMIT) == math.inf


def test_an_accountant_that_fails_counts_as_infinite() -> None:
    answers = itertools.cycle([math.nan, 0.1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accounts, "epsilon", lambda events, delta: next(answers))
        for _ in range(2):
            assert composed_epsilon([(Cost(event(), event(), 0.5), 1)], LIMIT) == math.inf


def test_rounds_and_studies_compose_as_one_accountant_over_all_of_it() -> None:
    """Three rounds each of two studies, with Opacus's accountant stepped beside it, step by step."""
    ledger, limit = Ledger.in_memory(), Limit("patient", 20.0, DELTA)
    both = {A: Cost(event(1.0, 1 / 32, 64, "patient")), B: Cost(event(1.5, 0.05, 40, "patient"))}
    one = PRVAccountant()
    for number in (1, 2, 3):
        for study, cost in both.items():
            what = release(number, study)
            assert ledger.reserve(what, cost, X, limit, 3) is None
            ledger.begin(what)
            ledger.charge(what, b"noised")
            for _ in range(cost.training.steps):
                one.step(noise_multiplier=cost.training.noise_multiplier, sample_rate=cost.training.sampling_rate)
    with quiet_warnings():
        expected = one.get_epsilon(delta=DELTA)
    statement = ledger.statement("notes", limit)
    assert statement.epsilon == pytest.approx(expected, abs=1e-6)
    assert [(each.study, each.charged) for each in statement.studies] == [(A, 3), (B, 3)]
    # Adding what the studies spent would say more than was spent.
    assert statement.epsilon < sum(each.epsilon for each in statement.studies) - 0.5


def test_what_a_study_would_cost_is_what_it_then_costs(ledger: Ledger) -> None:
    train(ledger, release(1), planned=3)
    other = Cost(event(4.0), event(3.0), 0.2)
    foreseen = cost_of(ledger, "notes", LIMIT, [(other, 2)])
    for number in (1, 2):
        ledger.reserve(release(number, B), other, X, LIMIT, 2)
        ledger.begin(release(number, B))
        ledger.charge(release(number, B), b"noised")
    statement = ledger.statement("notes", LIMIT)
    assert (statement.epsilon, statement.counted, LIMIT.epsilon) == foreseen
    assert foreseen[0] == pytest.approx(gaussian_epsilon([event(8.0), *[event(3.0)] * 2], DELTA))


def test_the_statement_says_what_was_spent_on_what(ledger: Ledger) -> None:
    for number in (1, 2):
        train(ledger, release(number))
    other = Cost(event(4.0))
    ledger.reserve(release(1, B), other, X, LIMIT, 3)
    statement = ledger.statement("notes", LIMIT)
    assert statement.epsilon == pytest.approx(gaussian(2))
    assert statement.committed == pytest.approx(gaussian_epsilon([event()] * 2 + [event(4.0)], DELTA))
    first, second = statement.studies
    assert (first.study, first.charged, first.reserved, first.events) == (A, 2, 0, ((COST, 2),))
    assert first.epsilon == pytest.approx(gaussian(2))
    assert (second.study, second.charged, second.reserved, second.events, second.epsilon) == (B, 0, 1, (), 0.0)
    assert statement.head == ledger.head
    document = json.loads(canonical_json(statement.document()))
    assert document["studies"][0]["events"] == [{"cost": COST.document(), "rounds": 2}]
    assert document["limit"] == {"unit": "record", "epsilon": LIMIT.epsilon, "delta": DELTA}


def sharing(own: float | None = 2.0, corrupt: int | None = 2, z: float = 8.0) -> Cost:
    return Cost(replace(event(z), shared=True), own_multiplier=own, corrupt=corrupt)


def test_shared_noise_has_one_total_against_the_coordinator_and_one_against_everybody(ledger: Ledger) -> None:
    for number in (1, 2):
        ledger.reserve(release(number, B), sharing(), X, LIMIT, 2)
        ledger.begin(release(number, B))
        ledger.charge(release(number, B), b"noised")
    train(ledger, release(1))
    found = ledger.statement("notes", LIMIT)
    assert found.epsilon == pytest.approx(gaussian(3))
    assert found.everybody == pytest.approx(gaussian_epsilon([event(2.0)] * 2 + [event()], DELTA))
    assert (found.shared, found.corrupt) == (True, 2)
    # The limit is as strict as it was: everything counts as charged.
    assert found.counted == pytest.approx(gaussian(3))
    ledger.reserve(release(1, C), sharing(corrupt=1), X, LIMIT, 1)
    found = ledger.statement("notes", LIMIT)
    assert found.corrupt == 1
    assert found.everybody_committed > found.everybody
    document = json.loads(canonical_json(found.document()))
    assert document["everybody"] == {"epsilon": found.everybody, "committed": found.everybody_committed}


def test_without_shared_noise_there_is_one_total(ledger: Ledger) -> None:
    train(ledger, release(1))
    found = ledger.statement("notes", LIMIT)
    assert (found.shared, found.corrupt) == (False, None)
    assert (found.everybody, found.everybody_committed) == (found.epsilon, found.committed)


def test_a_share_of_unknown_worth_is_worth_nothing_against_everybody(ledger: Ledger, path: Path) -> None:
    old = sharing(None, None)  # as an earlier version wrote it
    assert old.document().keys() == COST.document().keys()
    assert ledger.reserve(release(1, B), old, X, LIMIT, 1) is None
    assert ledger.reserve(release(1, B), sharing(), X, LIMIT, 1) is None  # it resumes what the old version reserved
    ledger.begin(release(1, B))
    ledger.charge(release(1, B), b"noised")
    found = ledger.statement("notes", LIMIT)
    assert found.epsilon == pytest.approx(gaussian(1))
    assert (found.everybody, found.everybody_committed, found.corrupt) == (math.inf, math.inf, None)
    assert found.document()["everybody"] == {"epsilon": None, "committed": None}
    assert ledger.reserve(release(2, B), sharing(), X, LIMIT, 2) is None
    with pytest.raises(RefusedError, match="with another privacy cost"):
        ledger.reserve(release(2, B), sharing(3.0), X, LIMIT, 2)


@pytest.mark.parametrize("wrong", [{"own": 0.0}, {"own": -1.0}, {"own": math.nan}, {"corrupt": -1}, {"corrupt": True}])
def test_a_share_is_worth_something_that_makes_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match="shared noise"):
        sharing(**wrong)
    with pytest.raises(RefusedError, match="shared noise"):
        Cost(event(), own_multiplier=1.0)


def test_costs_of_shared_noise_are_read_as_they_were_written() -> None:
    for cost in (sharing(), sharing(None, None), COST):
        assert Cost.parse(json.loads(canonical_json(cost.document()))) == cost


def test_one_study_counts_by_composition_and_several_by_a_filter() -> None:
    sampled = Cost(event(1.0, 1 / 32, 192))
    one, limit = Item(A, sampled, True, 1), Limit("record", 4.5, DELTA)
    assert accounts.counted_epsilon([one], limit) == composed_epsilon([(sampled, 1)], limit)
    both = [one, Item(B, sampled, False, 1)]
    composed, counted = composed_epsilon([(sampled, 2)], limit), accounts.counted_epsilon(both, limit)
    assert composed < limit.epsilon < counted
    assert accounts.counted_epsilon([one, Item(A, sampled, False, 1)], limit) == composed
    with pytest.raises(BudgetExhaustedError, match=r"the least limit that admits them is epsilon 4\.66 \(ask the"):
        accounts.check_budget(release(1, B), limit, sampled, [one], 1)
    accounts.check_budget(release(2, A), limit, sampled, [one], 1)


def test_a_refusal_names_the_least_limit_that_admits_the_study_whatever_the_limit_is() -> None:
    sampled = Cost(event(1.0, 1 / 32, 192))
    both = [Item(A, sampled, True, 1), Item(B, sampled, False, 1)]
    named = {accounts.admitting_epsilon(both, Limit("record", epsilon, DELTA)) for epsilon in (0.5, 2.0, 4.5)}
    assert len(named) == 1
    least = named.pop()
    assert least is not None
    accounts.check_budget(release(1, B), Limit("record", least, DELTA), sampled, both[:1], 1)
    with pytest.raises(BudgetExhaustedError, match=f"is epsilon {least:g}"):
        accounts.check_budget(release(1, B), Limit("record", least - 0.01, DELTA), sampled, both[:1], 1)
    assert accounts.admitting_epsilon([Item(A, None, True, 1)], LIMIT) is None


def test_a_mechanism_of_another_version_is_not_guessed_at() -> None:
    document = COST.document()
    assert Cost.parse(json.loads(canonical_json(document))) == COST
    for change in ({"version": 2}, {"mechanism": "laplace"}, {"neighbouring": "replace-one"}, {"more": 1}):
        with pytest.raises(StateError, match="does not know"):
            Cost.parse({**document, "training": {**document["training"], **change}})
    with pytest.raises(StateError, match="does not know"):
        Cost.parse({})


def test_shared_noise_is_told_apart_from_own_noise_and_composes_with_it() -> None:
    shared = Cost(replace(COST.training, shared=True))
    document = json.loads(canonical_json(shared.document()))
    assert Cost.parse(document) == shared != COST
    assert document["training"]["mechanism"] == "poisson-subsampled-shared-gaussian"
    # What they cost is the same; against whom it holds is for the statement to say.
    assert composed_epsilon([(shared, 1), (COST, 1)], LIMIT) == composed_epsilon([(COST, 2)], LIMIT)


# --- the file --------------------------------------------------------------------------------------------


def test_a_new_ledger_belongs_to_its_owner_alone(ledger: Ledger, path: Path) -> None:
    train(ledger, release())
    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == ["site.db", "site.db-shm", "site.db-wal", "site.key"]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600] * 4
    ledger.close()
    path.chmod(0o640)
    with pytest.raises(StateError, match="other users"):
        Ledger.open(path)


def test_a_ledger_is_created_once_and_never_by_opening_it(ledger: Ledger, path: Path) -> None:
    train(ledger, release())
    with pytest.raises(StateError, match="exists already"):
        Ledger.create(path)
    assert reserve(ledger, release()) == b"noised"
    with pytest.raises(StateError, match="no ledger") as missing:
        Ledger.open(path.with_name("other.db"))
    assert missing.value.hint
    assert not list(path.parent.glob("other*"))
    assert not list(path.parent.glob("*.partial"))


def test_what_is_not_a_ledger_is_not_opened(path: Path) -> None:
    path.parent.mkdir()
    for content in (b"", b"not a database" * 100):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(StateError):
            Ledger.open(path)
        assert path.read_bytes() == content
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE entries (sequence INTEGER PRIMARY KEY)")
    path.chmod(0o600)
    with pytest.raises(StateError, match="not a ledger"):
        Ledger.open(path)


def test_a_ledger_of_another_version_is_not_opened(ledger: Ledger, path: Path) -> None:
    ledger.close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 3")
    with pytest.raises(StateError, match="found format 3"):
        Ledger.open(path)


def test_it_is_written_through_to_the_disk(ledger: Ledger) -> None:
    database = ledger._chain._database
    found = {name: database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")}
    assert found == {"journal_mode": "wal", "synchronous": 2}  # 2 is FULL


MOUNTS = """\
/dev/vda / ext4 rw 0 0
server:/export /mnt/share nfs4 rw 0 0
/dev/vdb /mnt/share/local xfs rw 0 0
//server/c /mnt/with\\040space cifs rw 0 0
host: /home/me/remote fuse.sshfs rw 0 0
tmpfs /tmp tmpfs rw 0 0
server:/tmp /tmp nfs rw 0 0
"""


@pytest.mark.parametrize(
    ("where", "network"),
    [
        ("/var/lib/privet/site.db", False),
        ("/mnt/share/site.db", True),
        ("/mnt/shared/site.db", False),
        ("/mnt/share/local/site.db", False),
        ("/mnt/with space/site.db", True),
        ("/home/me/remote/site.db", True),
        ("/tmp/site.db", True),  # noqa: S108 - the later mount hides the earlier one
    ],
)
def test_network_file_systems_are_known(where: str, network: bool) -> None:
    assert chain.is_network(Path(where), MOUNTS) == network


def test_network_file_systems_are_refused(ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "is_network", lambda path, mounts: True)
    for verb in (Ledger.open, Ledger.create):
        with pytest.raises(StateError, match="network file system"):
            verb(path.with_name("new.db") if verb == Ledger.create else path)
    assert not path.with_name("new.db").exists()


def test_the_chain_is_what_it_says(ledger: Ledger, path: Path) -> None:
    """Recompute every head with the standard library alone."""
    train(ledger, release())
    ledger.take(RecordedStep(b"session", 1, "mask", b"roster", b"lists"))
    ledger.acknowledge(release())
    head = ""
    with sqlite3.connect(path) as database:
        found = database.execute("SELECT sequence, content, head FROM entries ORDER BY sequence").fetchall()
    for number, (sequence, content, stored) in enumerate(found, 1):
        assert sequence == number
        assert content.encode() == canonical_json(json.loads(content))
        head = "sha256:" + hashlib.sha256(head.encode() + content.encode()).hexdigest()
        assert stored == head
    assert ledger.head == (6, head)


def test_two_new_ledgers_have_different_heads(path: Path) -> None:
    path.parent.mkdir()
    heads = [Ledger.create(path.with_name(name)).head for name in ("one.db", "two.db")]
    assert [number for number, _ in heads] == [1, 1]
    assert heads[0] != heads[1]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET content = '{}' WHERE sequence = 2",
        "DELETE FROM entries WHERE sequence = 3",
        "INSERT OR REPLACE INTO entries (sequence, content, head) VALUES (3, '{}', 'x')",
        "UPDATE payloads SET bytes = x'00'",
        "DELETE FROM payloads",
    ],
)
def test_rows_are_final(ledger: Ledger, path: Path, statement: str) -> None:
    train(ledger, release())
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA recursive_triggers = ON")
        with pytest.raises(sqlite3.IntegrityError, match=r"final|stay"):
            database.execute(statement)
    ledger.verify()


SWAP = (
    "UPDATE entries SET sequence = 99 WHERE sequence = 4; UPDATE entries SET sequence = 4 WHERE sequence = 5;"
    "UPDATE entries SET sequence = 5 WHERE sequence = 99"
)


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE entries SET content = replace(content, '\"round\":1', '\"round\":2') WHERE sequence = 3", "row 3 "),
        ("UPDATE entries SET content = '{}' WHERE sequence = 2", "row 2 "),
        ("UPDATE entries SET head = 'sha256:00' WHERE sequence = 5", "row 5 "),
        ("DELETE FROM entries WHERE sequence = 3", "row 3 is missing"),
        ("DELETE FROM entries WHERE sequence = 1", "row 1 is missing"),
        ("DELETE FROM entries WHERE sequence = 6", "row 6 is missing"),
        ("DELETE FROM entries WHERE sequence > 2", "row 3 is missing"),
        ("DELETE FROM entries", "row 1 is missing"),
        (SWAP, "row 4 "),
        ("INSERT INTO entries (content, head) VALUES ('{}', 'sha256:00')", "row 7 "),
        ("UPDATE payloads SET bytes = x'00'", "payload of row 4 "),
        ("DELETE FROM payloads", "payload of row 4 "),
        ("SELECT 1", "tables or triggers"),
    ],
)
def test_tampering_shows_and_names_the_row(ledger: Ledger, path: Path, statement: str, named: str) -> None:
    train(ledger, release())
    for number in (1, 2):
        ledger.take(RecordedStep(b"session", number, "mask", b"roster", b"lists"))
    with sqlite3.connect(path) as database:
        for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            database.execute(f"DROP TRIGGER {name}")
        database.execute("DROP INDEX once")
        database.execute("DROP INDEX taken")
        database.executescript(statement)
    if "payload" in named:
        restore_schema(path)
    with pytest.raises(VerificationError, match=named):
        ledger.verify()
    if "payload" not in named:
        with pytest.raises(VerificationError, match=named):
            Ledger.open(path)
    else:
        with pytest.raises((VerificationError, RefusedError), match=f"{named}|no longer keeps the update"):
            reserve(ledger, release())


def restore_schema(path: Path) -> None:
    """Put triggers and indexes back, as somebody would who knows."""
    wanted = Ledger.in_memory()._chain._database.execute(
        "SELECT sql FROM sqlite_schema WHERE type IN ('index', 'trigger')"
    )
    with sqlite3.connect(path) as database:
        for (sql,) in wanted.fetchall():
            if sql:
                database.execute(sql)


@pytest.mark.parametrize("other", [b'"inputs":"SHA256', b'"inputs":\xff\xffha256', b"\0" * 16])
def test_bytes_changed_in_the_file_show(ledger: Ledger, path: Path, other: bytes) -> None:
    train(ledger, release())
    ledger.close()
    data = path.read_bytes()
    assert data.count(b'"inputs":"sha256') == 3  # rows 2 to 4; SQLite fills pages from their end
    path.write_bytes(data.replace(b'"inputs":"sha256', other, 1))
    with pytest.raises(VerificationError, match="row 4 "):
        Ledger.open(path)


def test_an_index_that_does_not_fit_its_table_shows(ledger: Ledger, path: Path) -> None:
    # Rows are found by it: one that leads past a charge would let the round be trained again.
    train(ledger, release())
    ledger.close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA writable_schema = ON")
        database.execute("UPDATE sqlite_schema SET sql = replace(sql, 'IS NOT NULL', 'IS NULL') WHERE name = 'once'")
    with sqlite3.connect(path) as database:
        database.execute("REINDEX once")
        database.execute("PRAGMA writable_schema = ON")
        database.execute("UPDATE sqlite_schema SET sql = replace(sql, 'IS NULL', 'IS NOT NULL') WHERE name = 'once'")
    with pytest.raises(VerificationError, match="indexes"):
        Ledger.open(path)


# --- what a thief reads ----------------------------------------------------------------------------------


def remains(path: Path) -> bytes:
    """Return all that a thief of the ledger, its write-ahead log and its index finds."""
    return b"".join(file.read_bytes() for file in sorted(path.parent.glob("site.db*")))


def test_a_thief_of_the_ledger_reads_no_update_and_cannot_confirm_a_guess(ledger: Ledger, path: Path) -> None:
    update = b"the exact update " * 500
    train(ledger, release(1), update)
    for _ in range(2):
        held = remains(path)
        assert b"exact update" not in held
        assert hashlib.sha256(update).hexdigest().encode() not in held
        ledger.close()
    again = Ledger.open(path)
    assert again.stored(release(1)) == update
    assert path.with_suffix(".key").read_text().strip() not in held.decode("latin-1")


def test_what_was_delivered_leaves_the_file(ledger: Ledger, path: Path) -> None:
    train(ledger, release(1), b"first")
    with closing(sqlite3.connect(path)) as database, database:
        (sealed,) = database.execute("SELECT bytes FROM payloads").fetchone()
    assert sealed in remains(path)
    ledger.acknowledge(release(1))
    train(ledger, release(2), b"second")
    ledger.close()  # empties the write-ahead log
    assert sealed not in remains(path)


def rewrite_rows(path: Path, sql: str) -> None:
    """Run SQL on a ledger as somebody who knows its triggers, and puts them back."""
    with closing(sqlite3.connect(path)) as database, database:
        for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            database.execute(f"DROP TRIGGER {name}")
        database.executescript(sql)
    restore_triggers(path)


def restore_triggers(path: Path) -> None:
    wanted = Ledger.in_memory()._chain._database.execute("SELECT sql FROM sqlite_schema WHERE type = 'trigger'")
    with closing(sqlite3.connect(path)) as database, database:
        for (sql,) in wanted.fetchall():
            database.execute(sql)


@pytest.mark.parametrize("other", [release(2), release(1, B), release(1, A, "letters")])
def test_stored_updates_cannot_be_swapped(ledger: Ledger, path: Path, other: RoundKey) -> None:
    train(ledger, release(1), b"the first")
    train(ledger, other, b"the other")
    ledger.close()
    swap = "UPDATE payloads SET bytes = (SELECT p.bytes FROM payloads p WHERE p.sequence = 11 - payloads.sequence)"
    rewrite_rows(path, swap)
    with closing(sqlite3.connect(path)) as database, database:
        assert [row[0] for row in database.execute("SELECT sequence FROM payloads")] == [4, 7]
    again = Ledger.open(path)
    with pytest.raises(VerificationError, match="payload of row 4 was changed"):
        again.verify()
    with pytest.raises(VerificationError, match="payload of row 4 was changed"):
        reserve(again, release(1))
    with pytest.raises(VerificationError, match="payload of row 4 was changed"):
        again.stored(release(1))


def test_each_seal_has_its_own_nonce_and_belongs_to_one_charge() -> None:
    sealer, charge = Sealer(None), {"round": 1, "sequence": 4}
    sealed = [sealer.seal(b"same", charge) for _ in range(200)]
    assert len({each[:12] for each in sealed}) == 200
    assert all(sealer.open(each, charge) == b"same" for each in sealed)
    whole = sealed[0]
    for broken in (b"", whole[:12], whole[:-1], bytes(len(whole)), *(_flipped(whole, at) for at in range(len(whole)))):
        assert sealer.open(broken, charge) is None
    assert sealer.open(whole, {"round": 2, "sequence": 4}) is None
    assert Sealer(None).open(whole, charge) is None


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_seals_are_aes_256_gcm_under_keys_of_hkdf(tmp_path: Path) -> None:
    """Open one with the standard library's HKDF and another interface to AES."""
    (tmp_path / "ledger.key").write_text("07" * 32 + "\n")
    (tmp_path / "ledger.key").chmod(0o600)
    sealer = Sealer(tmp_path / "ledger.key")
    root = hmac.digest(bytes(32), bytes([7]) * 32, "sha256")
    name, key, marking = (
        hmac.digest(root, b"privet ledger 1: " + label + b"\x01", "sha256")
        for label in (b"name of the key", b"AES-256-GCM of updates", b"HMAC of updates")
    )
    assert sealer.mark(b"noised") == f"hmac-sha256:{name[:8].hex()}:{hmac.digest(marking, b'noised', 'sha256').hex()}"
    sealed = sealer.seal(b"noised", {"round": 1})
    opener = Cipher(AES(key), GCM(sealed[:12], sealed[-16:])).decryptor()
    opener.authenticate_additional_data(b'{"round":1}')
    assert opener.update(sealed[12:-16]) + opener.finalize() == b"noised"


def test_without_its_key_a_ledger_reserves_nothing_and_never_draws_again(ledger: Ledger, path: Path) -> None:
    train(ledger, release(1), b"on its way")
    ledger.close()
    key = path.with_suffix(".key")
    kept = key.rename(key.with_name("safe"))
    without = Ledger.open(path)
    for number in (1, 2):
        with pytest.raises(StateError, match=r"the ledger's key .*site.key is missing") as caught:
            reserve(without, release(number))
        assert "privet site init SITE --ledger-key" in caught.value.hint
    with pytest.raises(StateError, match="is missing"):
        without.verify()
    assert not key.exists()
    assert without.replace_key() == 1
    with pytest.raises(StateError, match=r"key .* exists"):
        without.replace_key()
    for _ in range(2):
        with pytest.raises(SpentRoundError, match="the key that sealed it is lost"):
            reserve(without, release(1))
    with pytest.raises(SpentRoundError):
        without.begin(release(1))
    assert without.stored(release(1)) is None
    assert without.holds(release(1))
    without.acknowledge(release(1))
    train(without, release(2), b"next")
    assert not without.holds(release(1))
    without.verify()
    assert kinds(path).count("begin") == kinds(path).count("charge") == 2
    assert kept.exists()


def test_a_key_that_others_can_read_or_that_is_none_is_refused(ledger: Ledger, path: Path) -> None:
    ledger.close()
    key = path.with_suffix(".key")
    key.chmod(0o640)
    with pytest.raises(StateError, match="other users"):
        reserve(Ledger.open(path), release())
    key.chmod(0o600)
    for text in ("", "00" * 31, "00" * 33, "zz" * 32):
        key.write_text(text)
        with pytest.raises(StateError, match="malformed"):
            reserve(Ledger.open(path), release())


def test_a_ledger_of_the_version_that_sealed_nothing_goes_on(ledger: Ledger, path: Path) -> None:
    train(ledger, release(1), b"in the clear")
    ledger.close()
    make_plain(path, b"in the clear")
    path.with_suffix(".key").unlink()
    old = Ledger.open(path)
    old.verify()
    assert not path.with_suffix(".key").exists()
    assert reserve(old, release(1)) == b"in the clear"
    old.charge(release(1), b"in the clear")
    with pytest.raises(StateError, match="differs from the update"):
        old.charge(release(1), b"another")
    train(old, release(2), b"sealed from here on")
    assert b"sealed from" not in remains(path)
    assert [reserve(old, release(number)) for number in (1, 2)] == [b"in the clear", b"sealed from here on"]
    old.verify()
    old.acknowledge(release(1))
    old.close()
    assert b"in the clear" not in remains(path)
    assert Ledger.open(path).stored(release(2)) == b"sealed from here on"


def make_plain(path: Path, payload: bytes) -> None:
    """Turn a closed ledger with one charge, in row 4, into one of the version that sealed nothing."""
    with closing(sqlite3.connect(path)) as database, database:
        content = json.loads(database.execute("SELECT content FROM entries WHERE sequence = 4").fetchone()[0])
        (before,) = database.execute("SELECT head FROM entries WHERE sequence = 3").fetchone()
    text = canonical_json({**content, "payload": digest(payload)})
    head = digest(before.encode() + text)
    rewrite = (
        f"UPDATE entries SET content = '{text.decode()}', head = '{head}' WHERE sequence = 4;"  # noqa: S608
        f"UPDATE payloads SET bytes = x'{payload.hex()}'; PRAGMA user_version = 1;"
    )
    rewrite_rows(path, rewrite)


# --- old, wiped and other files --------------------------------------------------------------------------


def copy(path: Path, to: str) -> Path:
    return Path(shutil.copytree(path.parent, path.parent.with_name(to)))


def put_back(path: Path, back: Path) -> None:
    shutil.rmtree(path.parent)
    shutil.copytree(back, path.parent)


@pytest.fixture
def anchored(path: Path, anchor: Path) -> Ledger:
    path.parent.mkdir()
    ledger = Ledger.create(path, anchor)
    train(ledger, release(1))
    return ledger


def test_the_anchor_holds_the_last_head_that_let_something_leave(anchored: Ledger, path: Path, anchor: Path) -> None:
    sequence, head = anchored.head
    assert json.loads(anchor.read_bytes()) == {"sequence": sequence, "head": head}
    anchored.take(RecordedStep(b"session", 1, "mask", b"roster", b"lists"))
    assert json.loads(anchor.read_bytes())["sequence"] == sequence + 1
    anchored.close()
    Ledger.open(path, anchor)


def test_an_old_copy_is_refused(anchored: Ledger, path: Path, anchor: Path) -> None:
    old = copy(path, "old")
    train(anchored, release(2))
    receipt = anchored.head
    anchored.close()
    put_back(path, old)
    with pytest.raises(VerificationError, match="ends at row 4, but row 7 is on record elsewhere"):
        Ledger.open(path, anchor)
    without = Ledger.open(path)
    with pytest.raises(VerificationError, match="on record elsewhere"):
        without.check_anchor(*receipt)
    # The copy has gone its own way and is as long.
    train(without, release(2), b"trained again")
    with pytest.raises(VerificationError, match="row 7 is on record elsewhere with head"):
        without.check_anchor(*receipt)
    without.close()
    with pytest.raises(VerificationError, match="rewritten or replaced"):
        Ledger.open(path, anchor)


def test_heads_seen_before_stay_part_of_the_chain(ledger: Ledger) -> None:
    heads = [ledger.head]
    for number in (1, 2, 3):
        train(ledger, release(number))
        heads.append(ledger.head)
    for head in heads:
        ledger.check_anchor(*head)
    digests = [seen for _, seen in heads]
    for sequence, seen in ((heads[1][0], digests[2]), (0, digests[0]), (-1, ""), (99, digests[0])):
        with pytest.raises(VerificationError):
            ledger.check_anchor(sequence, seen)


def test_an_old_copy_that_is_put_back_while_the_process_runs_lets_nothing_leave(
    anchored: Ledger, path: Path, anchor: Path
) -> None:
    step = RecordedStep(b"session", 1, "mask", b"roster", b"lists")
    with closing(sqlite3.connect(path)) as live, closing(sqlite3.connect(":memory:")) as old:
        live.backup(old)
        anchored.take(step)
        kept = anchor.read_bytes()
        old.backup(live)
        # The same row is missing, so that the ledger takes the step again; its row has the number of the lost one.
        with pytest.raises(VerificationError, match="on record elsewhere"):
            anchored.take(replace(step, lists=b"other"))
    assert anchor.read_bytes() == kept


def test_a_wiped_ledger_is_not_begun_again(anchored: Ledger, path: Path, anchor: Path) -> None:
    anchored.close()
    shutil.rmtree(path.parent)
    path.parent.mkdir()
    with pytest.raises(StateError, match="no ledger"):
        Ledger.open(path, anchor)
    with pytest.raises(StateError, match="there was a ledger before, or it is another site's") as caught:
        Ledger.create(path, anchor)
    assert "`privet site setup SITE --anchor PATH`" in caught.value.hint
    assert not list(path.parent.iterdir())
    Ledger.create(path).close()
    with pytest.raises(VerificationError, match="ends at row 1"):
        Ledger.open(path, anchor)


def test_a_lost_write_ahead_log_is_noticed(anchored: Ledger, path: Path, anchor: Path) -> None:
    copied = copy(path, "copied")
    anchored.close()
    put_back(path, copied)
    path.with_name("site.db-wal").unlink()
    with pytest.raises(VerificationError, match="on record elsewhere"):
        Ledger.open(path, anchor)


def test_a_missing_or_broken_anchor_is_refused(anchored: Ledger, path: Path, anchor: Path) -> None:
    anchored.close()
    for content in (b"", b"[]", b"{}", b'{"sequence": "x", "head": 1}'):
        anchor.write_bytes(content)
        with pytest.raises(StateError, match="anchor"):
            Ledger.open(path, anchor)
    anchor.unlink()
    with pytest.raises(StateError, match="anchor"):
        Ledger.open(path, anchor)
    assert not anchor.exists()


def test_an_anchor_may_be_behind_and_catches_up(anchored: Ledger, path: Path, anchor: Path) -> None:
    # As after a crash between the two.
    before = anchor.read_bytes()
    train(anchored, release(2))
    last = anchored.head
    anchored.close()
    anchor.write_bytes(before)
    Ledger.open(path, anchor)
    assert json.loads(anchor.read_bytes())["sequence"] == last[0]


def test_an_anchor_is_begun_once_and_elsewhere(ledger: Ledger, path: Path, anchor: Path) -> None:
    with pytest.raises(StateError, match="in the ledger's directory"):
        ledger.start_anchor(path.with_name("head"))
    ledger.start_anchor(anchor)
    with pytest.raises(StateError, match="before"):
        ledger.start_anchor(anchor)
    with pytest.raises(StateError, match="in the ledger's directory"):
        Ledger.in_memory().start_anchor(anchor.with_name("other"))


def test_nothing_leaves_while_the_anchor_cannot_be_written(anchored: Ledger, anchor: Path) -> None:
    assert reserve(anchored, release(2)) is None
    anchored.begin(release(2))
    anchor.parent.rename(anchor.parent.with_name("unplugged"))
    with pytest.raises(StateError):
        anchored.charge(release(2), b"noised")
    with pytest.raises(StateError):
        anchored.charge(release(2), b"noised")
    with pytest.raises(StateError):
        reserve(anchored, release(2))
    anchor.parent.with_name("unplugged").rename(anchor.parent)
    assert reserve(anchored, release(2)) == b"noised"
    assert json.loads(anchor.read_bytes())["sequence"] == anchored.head[0]


# --- disks, clocks and other processes -------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond `size`, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 100, 4_200, 9_000, 13_000, 20_000, 60_000])
def test_a_full_disk_releases_nothing_and_breaks_nothing(ledger: Ledger, path: Path, room: int) -> None:
    train(ledger, release(1), planned=20)
    secret = b"the noised update" * 1_000
    size = max(file.stat().st_size for file in path.parent.iterdir())
    sent = [1]

    def fill() -> None:
        for number in itertools.count(2):
            train(ledger, release(number), secret, planned=20)
            sent.append(number)

    with largest_file(size + room), pytest.raises(StateError) as full:
        fill()
    number = sent[-1] + 1
    assert "the noised" not in str(full.value)
    assert full.value.__cause__ is None
    ledger.verify()
    ledger.close()
    again = Ledger.open(path)
    assert {row["round"] for row in rows(path) if row["kind"] == "charge"} >= set(sent)
    finished(again, release(number), secret)


def finished(ledger: Ledger, what: RoundKey, payload: bytes) -> None:
    """Go on with a round that was interrupted anywhere: it is charged with these bytes, or was begun and is lost."""
    try:
        if reserve(ledger, what, planned=20) is None:
            ledger.begin(what)
            ledger.charge(what, payload)
    except SpentRoundError:
        assert ledger.stored(what) is None
        assert ledger.items(what.dataset)[-1].charged
    else:
        assert ledger.stored(what) == payload


class Failing:
    """A connection whose n-th statement fails."""

    def __init__(self, database: sqlite3.Connection, left: int) -> None:
        self.database = database
        self.left = left

    def execute(self, sql: str, values: Any = ()) -> sqlite3.Cursor:
        self.left -= 1
        if self.left == 0 and sql != "ROLLBACK":
            raise sqlite3.OperationalError("disk I/O error with a secret in it")
        return self.database.execute(sql, values)

    @property
    def in_transaction(self) -> bool:
        return self.database.in_transaction


def test_a_step_that_fails_anywhere_is_not_done_at_all_and_can_be_repeated(ledger: Ledger, path: Path) -> None:
    def at(number: int) -> RoundKey:
        return release(dataset=f"notes-{number}")

    real = ledger._chain._database
    for number in itertools.count(1):
        before = kinds(path)
        ledger._chain._database = Failing(real, number)  # type: ignore[assignment]
        found = outcome(functools.partial(train, what=at(number), planned=20), ledger)
        ledger._chain._database = real
        assert kinds(path)[len(before) :] in [["reserve", "begin", "charge"][:done] for done in range(4)]
        ledger.verify()
        if found is None:
            break
        assert found is StateError
        finished(ledger, at(number), b"noised")
    assert number > 10


def test_another_process_that_holds_the_ledger_too_long_is_an_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "_BUSY_SECONDS", 0.05)
    path.parent.mkdir()
    ledger = Ledger.create(path)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StateError, match="SQLITE_BUSY") as busy:
        reserve(ledger, release())
    assert "process that has held the ledger" in busy.value.hint
    holder.execute("ROLLBACK")
    assert reserve(ledger, release()) is None


def test_threads_at_the_limit_do_not_pass_it(ledger: Ledger, path: Path) -> None:
    second = Ledger.open(path)  # as another process would

    def attempt(number: int) -> bool:
        try:
            train((ledger, second)[number % 2], release(1, digest(bytes([number]))), bytes([number]), planned=1)
        except BudgetExhaustedError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(40))) == 20
    assert ledger.statement("notes", LIMIT).epsilon == pytest.approx(gaussian(20))
    ledger.verify()


def test_of_two_that_train_the_same_round_one_is_released(ledger: Ledger, path: Path) -> None:
    others = [ledger, *(Ledger.open(path) for _ in range(3))]
    for each in others:
        assert reserve(each, release()) is None
    gate = threading.Barrier(len(others))

    def charge(number: int) -> bytes | None:
        gate.wait()
        try:
            others[number].begin(release())
        except SpentRoundError:
            return None
        try:
            others[number].charge(release(), bytes([number]))
        except StateError:
            return None
        return bytes([number])

    with ThreadPoolExecutor(len(others)) as pool:
        charged = [payload for payload in pool.map(charge, range(len(others))) if payload is not None]
    assert len(charged) == 1
    assert [each.stored(release()) for each in others] == charged * len(others)


def test_a_jumping_clock_changes_nothing(ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Jumping:
        years = itertools.cycle([2099, 1970, 2026, 9999])

        @classmethod
        def now(cls, zone: object) -> datetime:
            return datetime(next(cls.years), 1, 1, tzinfo=UTC)

    monkeypatch.setattr(chain, "datetime", Jumping)
    for number in range(1, 21):
        train(ledger, release(number), planned=20)
    with pytest.raises(BudgetExhaustedError):
        reserve(ledger, release(1, B), planned=1)
    assert reserve(ledger, release(20), planned=20) == b"noised"
    assert [row["time"][:4] for row in rows(path)[1:5]] == ["2099", "1970", "2026", "9999"]
    ledger.verify()


def test_a_simulated_site_keeps_the_same_rules(exact: None) -> None:
    ledger = Ledger.in_memory()
    train(ledger, release(1), planned=20)
    assert reserve(ledger, release(1), planned=20) == b"noised"
    with pytest.raises(BudgetExhaustedError):
        reserve(ledger, release(1, B), planned=20)
    with pytest.raises(StateError, match="differs from the update that the ledger charged"):
        ledger.charge(release(1), b"again")
    ledger.verify()


# --- any order of anything -------------------------------------------------------------------------------

studies, rounds, inputs = st.sampled_from([A, B, C]), st.integers(1, 3), st.sampled_from([X, Y])
STUDY_COSTS = {A: Cost(event(8.0)), B: Cost(event(4.0)), C: Cost(event(8.0), event(4.0), 0.25)}
PLANS = {A: 2, B: 1, C: 3}
# Between the epsilons of 8 and of 9 rounds at noise 8: the three studies do not all fit.
TIGHT = Limit("record", (gaussian(8) + gaussian(9)) / 2, DELTA)


class Sites(RuleBasedStateMachine):
    """Two processes of one site, a coordinator that asks for anything, and crashes at any moment.

    `subject` is the ledger under test. With `compare`, each step must end as the model's does; the invariants hold
    what got out against what was charged, and know nothing of the model.
    """

    make: ClassVar[Callable[[Path], Any]]
    compare: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.root = Path(self.directory.name)
        self.subject = type(self).make(self.root)
        self.model = Model()
        self.wire: dict[RoundKey, set[bytes]] = {}
        self.training: list[RoundKey] = []
        self.drawn: dict[RoundKey, int] = {}
        self.serial = 0

    def teardown(self) -> None:
        self.directory.cleanup()

    def both(self, step: Callable[[Any], bytes | None]) -> tuple[bool, bytes | None]:
        """Do a step; return whether it succeeded, and with what."""
        found, expected = (outcome(step, each) for each in (self.subject, self.model))
        if self.compare:
            assert found == expected
        return not isinstance(found, type), None if isinstance(found, type) else found

    def send(self, what: RoundKey, payload: bytes) -> None:
        self.wire.setdefault(what, set()).add(payload)

    @rule(study=studies, number=rounds, inputs=inputs)
    def asked(self, study: str, number: int, inputs: str) -> None:
        what = release(number, study)
        done, payload = self.both(lambda each: each.reserve(what, STUDY_COSTS[study], inputs, TIGHT, PLANS[study]))
        if payload is not None:
            self.send(what, payload)
        elif done:
            self.training.append(what)

    @precondition(lambda self: self.training)
    @rule(data=st.data(), ending=st.sampled_from(["sent", "sent", "died", "failed"]))
    def trained(self, data: st.DataObject, ending: str) -> None:
        what = data.draw(st.sampled_from(self.training))
        self.training.remove(what)
        self.serial += 1
        payload = self.serial.to_bytes(4, "big")
        begun, _ = self.both(lambda each: each.begin(what))
        if begun:
            self.drawn[what] = self.drawn.get(what, 0) + 1
            if ending == "failed":
                return
        elif self.subject.stored(what) is None:
            return
        # Where it was charged before, these are bytes of a process that did not ask.
        done, _ = self.both(lambda each: each.charge(what, payload))
        if ending == "died":
            self.died()
        elif done:
            self.send(what, payload)

    @precondition(lambda self: self.wire)
    @rule(data=st.data())
    def arrived(self, data: st.DataObject) -> None:
        what = data.draw(st.sampled_from(sorted(self.wire, key=str)))
        self.both(lambda each: each.acknowledge(what))

    @rule(study=studies, number=rounds)
    def cancelled(self, study: str, number: int) -> None:
        self.both(lambda each: each.cancel(release(number, study)))

    @rule()
    def died(self) -> None:
        self.training.clear()
        self.subject = self.subject.reopen()

    @invariant()
    def what_left_is_charged(self) -> None:
        for what, payloads in self.wire.items():
            kept = self.subject.stored(what)
            assert kept in payloads or (kept is None and self.subject.gone(what)), "a release without a charge"

    @invariant()
    def one_payload_each(self) -> None:
        assert all(len(payloads) == 1 for payloads in self.wire.values()), "two payloads for one charge"

    @invariant()
    def drawn_once(self) -> None:
        assert all(times == 1 for times in self.drawn.values()), "drawn twice for one charge"

    @invariant()
    def within_the_limit(self) -> None:
        costs = [STUDY_COSTS[what.study] for what in self.drawn]
        assert not costs or class_epsilon(costs, DELTA, gaussian_epsilon) <= TIGHT.epsilon, "beyond the limit"


def outcome(step: Callable[[Any], bytes | None], subject: Any) -> bytes | type[PrivetError] | None:
    try:
        return step(subject)
    except PrivetError as error:
        return type(error)


class OnDisk(Ledger):
    """The ledger, as the machine drives it."""

    where: Path

    @classmethod
    def make(cls, root: Path) -> OnDisk:
        Ledger.create(root / "site.db").close()
        return cls.at(root / "site.db")

    @classmethod
    def at(cls, path: Path) -> OnDisk:
        found = cls.open(path)
        assert isinstance(found, OnDisk)
        found.where = path
        return found

    def reopen(self) -> OnDisk:
        return self.at(self.where)

    def gone(self, what: RoundKey) -> bool:
        """Tell whether a charge is there whose bytes are not."""
        return any(row["kind"] == "charge" and row["round"] == what.round for row in rows(self.where))


def machine(make: Callable[[Path], Any], compare: bool) -> type[Sites]:
    return type("Case", (Sites,), {"make": staticmethod(make), "compare": compare})


def drive(make: Callable[[Path], Any], compare: bool, examples: int, phases: Collection[Phase] = tuple(Phase)) -> None:
    with pytest.MonkeyPatch.context() as patch:
        account_exactly(patch)
        run_state_machine_as_test(
            machine(make, compare),
            settings=settings(
                max_examples=examples,
                stateful_step_count=30,
                phases=phases,
                report_multiple_bugs=False,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )


def test_any_order_of_anything_keeps_the_promises() -> None:
    drive(OnDisk.make, compare=True, examples=8)


@pytest.mark.slow
def test_any_order_of_anything_keeps_the_promises_longer() -> None:
    drive(OnDisk.make, compare=True, examples=200)


def test_the_model_itself_keeps_the_promises() -> None:
    drive(lambda root: Model(), compare=True, examples=30)


@pytest.mark.parametrize(
    "mutant", [pytest.param(each, marks=pytest.mark.slow if each in RARE else ()) for each in MUTANTS]
)
def test_the_same_machine_finds_every_broken_ledger(mutant: type[Model]) -> None:
    # By what gets out alone, without comparing with the model.
    with pytest.raises(AssertionError, match=r"without a charge|two payloads|drawn twice|beyond the limit"):
        drive(lambda root: mutant(), compare=False, examples=1000, phases=[Phase.generate])


@pytest.mark.slow
def test_killed_sites_crowds_and_full_disks() -> None:
    """The quick run of the benchmark: real processes, real kills, and a naive ledger that fails them."""
    program = Path(__file__).parents[2] / "benchmarks" / "ledger_faults.py"
    done = subprocess.run(
        [sys.executable, str(program), "--quick", "--json"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert [check["name"] for check in found["checks"] if check["met"] is False] == []
    assert sum(check["name"].startswith("naive") for check in found["checks"]) == 4
