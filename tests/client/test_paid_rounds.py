"""Nothing is drawn twice unpaid: a round that fails after its first draw is charged, and never trained again."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privet.client.budget import accounts
from privet.client.budget.draws import Paid, Payment
from privet.client.budget.releases import open_ledger
from privet.client.policy.rules import MOST_LOST
from privet.client.rounds import worker as client_worker
from privet.client.rounds.worker import Worker
from privet.client.site import load_site
from privet.client.training.train import train_round
from privet.common.errors import DivergedError, PolicyError, SpentRoundError, StateError
from privet.common.pki.keyfile import make_key, public_key
from privet.common.privacy.noise import SeededRandomness
from privet.common.study.study import Study
from tests.support.faulty_rounds import (
    Attempts,
    Point,
    _free,
    asked,
    attempt,
    begun,
    failing_at,
    killed_at,
    path_of,
)
from tests.support.forks import training_processes
from tests.support.tiny import class_rows, private, random_adapter, site_toml, tiny_study, worker_of, write_policy

SITES = ("ash", "elm", "oak", "yew")
MASKED = {"secure_aggregation": {"mode": "masked"}, "cohort.min_sites": 3, "aggregation.largest_count": 30}
ROUNDS = {"training.rounds": 2000, "training.local_steps": 2}
STUDIES: dict[str, dict[str, Any]] = {
    "plain": {"privacy": private(), **ROUNDS},
    "plain, validated": {"privacy": private(), "data.validation_fraction": 0.3, **ROUNDS},
    "masked, validated": {"privacy": private(), "data.validation_fraction": 0.3, **ROUNDS, **MASKED},
    "distributed": {
        "privacy": private(epsilon=4.0, mode="distributed"),
        "training": {"optimizer": "sgd", "local_steps": 1, "learning_rate": 1.0, "rounds": 2000},
        **MASKED,
        "aggregation": {"method": "ffa", "learning_rate": 0.01, "largest_count": 60},
    },
    "no privacy": {"privacy": {"mode": "none"}, **ROUNDS},
}

HEAD = {"training.head_start": "class-means"}
HEAD_STARTS: dict[str, dict[str, Any]] = {
    "plain": {"privacy": private(), **HEAD, "training.rounds": 20, "training.local_steps": 1},
    "distributed": {**STUDIES["distributed"], **HEAD},
}


@dataclass(frozen=True)
class Place:
    """A site with a study that it agreed to."""

    study: Study
    file: Path

    def worker(self) -> Worker:
        return worker_of(self.file)


def place(folder: Path, base: Path, name: str, studies: dict[str, dict[str, Any]] = STUDIES) -> Place:
    folder.mkdir(exist_ok=True)
    study = tiny_study(base, **studies[name])
    keys = {site: public_key(make_key(folder / f"{site}.pem")) for site in SITES}
    limit = {"unit": "record", "epsilon": 50.0, "delta": 1e-3} if study.private else None
    more: dict[str, Any] = {"studies": [study.digest], "declared_count": 30, "limit": limit, "identity": "ash.pem"}
    file = site_toml(folder, "ash", class_rows(30), seed=None, witnesses=SITES, **more)
    file.write_text(file.read_text() + "[peers]\n" + "".join(f'{site} = "{key}"\n' for site, key in keys.items()))
    return Place(study, file)


@pytest.fixture(autouse=True)
def _not_about_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "epsilon", _free)


def check(worker: Worker, number: int, found: Attempts, point: Point | str, private: bool) -> None:
    """Check what came of asking for a round again and again."""
    assert len(set(found.sent)) <= 1, f"{point}: two releases of one round"
    if not private:
        assert found.sent, point
        return
    assert sum(found.drew) <= begun(worker, number) <= 1, f"{point}: drawn unpaid"
    again = found.errors[1:] if found.errors else []
    assert again in ([], ["SpentRoundError"] * 3), (point, found.errors)
    assert len(found.sent) in (0, 3, 4), point


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("name", "first", "every"),
    [
        ("plain, validated", 0, 6),
        ("distributed", 3, 6),
        # Most functions are on the way of every study, so each study takes another third of its points.
        *(pytest.param(name, first % 3, 3, marks=pytest.mark.slow) for first, name in enumerate(STUDIES)),
    ],
)
def test_a_round_that_fails_anywhere_is_drawn_once_and_paid(
    bert: Path, tmp_path: Path, name: str, first: int, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    here = place(tmp_path, bert, name)
    worker = here.worker()
    points = path_of(worker, asked(here.study, worker, 1, SITES))[first::every]
    outcomes = set()
    for number, point in enumerate(points, 2):
        found, opened = Attempts(), asked(here.study, worker, number, SITES)
        attempt(worker, opened, found, failing_at(point))
        for _ in range(3):
            attempt(worker, opened, found)
        check(worker, number, found, point, here.study.private)
        outcomes.add((len(found.sent), tuple(found.errors[1:])))
    assert len(points) > 140 / every
    if here.study.private:  # some fail before the first draw or after the charge, some in between
        assert {(3, ()), (0, ("SpentRoundError",) * 3)} <= outcomes


@pytest.mark.slow
@pytest.mark.parametrize("name", HEAD_STARTS)
def test_a_head_start_that_fails_anywhere_is_drawn_once_and_paid(
    bert: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is one round of its own, so each attempt has a site of its own: some fail before the draw, and some after."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    here = place(tmp_path / "whole", bert, name, HEAD_STARTS)
    assert here.study.is_head_start(1)
    points = path_of(here.worker(), asked(here.study, here.worker(), 1, SITES))
    begins = next(n for n, point in enumerate(points) if point[0].endswith("Releases.begin"))
    charges = next(n for n, point in enumerate(points) if point[0].endswith("Releases.charge"))
    outcomes = []
    for number in (begins - 1, begins + 1, (begins + charges) // 2, charges, len(points) - 1):
        here = place(tmp_path / str(number), bert, name, HEAD_STARTS)
        worker, found = here.worker(), Attempts()
        opened = asked(here.study, worker, 1, SITES)
        attempt(worker, opened, found, failing_at(points[number]))
        for _ in range(3):
            attempt(worker, opened, found)
        check(worker, 1, found, points[number], private=True)
        outcomes.append(len(found.sent))
    assert outcomes[0] == outcomes[-1] == 3
    assert 0 in outcomes


def test_the_checks_find_a_worker_that_draws_unpaid(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = place(tmp_path, bert, "plain")
    worker, found = here.worker(), Attempts()
    monkeypatch.setattr(client_worker, "Paid", lambda source, payment: source)
    for _ in range(2):
        attempt(worker, asked(here.study, worker, 1, SITES), found)
    with pytest.raises(AssertionError, match="drawn unpaid"):
        check(worker, 1, found, "", private=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain, validated", "distributed"])
def test_a_site_that_is_killed_anywhere_draws_once_and_pays(bert: Path, tmp_path: Path, name: str) -> None:
    here = place(tmp_path, bert, name)
    worker = here.worker()
    # Of a round without one before it, as those below are: the first round of a study calls some functions once more.
    points = path_of(worker, asked(here.study, worker, 1000, SITES))
    server = training_processes("tests.support.faulty_rounds")
    chosen = random.Random(7).sample(list(enumerate(points, 2)), 6)
    for number, point in chosen:
        child = server.Process(
            target=killed_at, args=(here.file, here.study.document(), SITES, number, point), daemon=True
        )
        child.start()
        child.join(120)
        assert child.exitcode == -9, (point, child.exitcode)
        found, after = Attempts(), here.worker()
        found.drew.append(here.file.with_suffix(f".{number}.drew").exists())
        found.errors.append("killed")
        for _ in range(3):
            attempt(after, asked(here.study, after, number, SITES), found)
        check(after, number, found, point, private=True)


def test_what_fails_before_the_first_draw_costs_nothing(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = place(tmp_path, bert, "plain, validated")
    worker = here.worker()
    opened = asked(here.study, worker, 1, SITES)

    def broken(*arguments: Any) -> Any:
        raise StateError("out of memory while scoring")

    with monkeypatch.context() as patched:
        patched.setattr(client_worker, "validation_points", broken)
        for _ in range(2):
            with pytest.raises(StateError, match="while scoring"):
                worker._contribution(opened)
    (item,) = open_ledger(worker.site.config).items("notes")
    assert (item.charged, item.rounds) == (False, 1)
    assert worker._contribution(opened).update.any()
    (item,) = open_ledger(worker.site.config).items("notes")
    assert (item.charged, item.rounds) == (True, 1)


@pytest.mark.parametrize("name", ["plain", "distributed"])
def test_an_update_that_is_too_large_costs_nothing_and_one_that_is_held_back_leaves_later(
    bert: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = place(tmp_path, bert, name)
    worker, policy = here.worker(), tmp_path / "ash.policy.toml"
    opened = asked(here.study, worker, 1, SITES)
    values = sum(tensor.size for tensor in worker.open(here.study)[1].spec.trained(here.study.aggregation.method))
    write_policy(policy, **{"limits.max_upload_bytes": 4 * values - 1})
    with pytest.raises(PolicyError, match="E_UPLOAD"):
        worker._contribution(opened)
    assert begun(worker, 1) == 0
    write_policy(policy, **{"limits.max_upload_bytes": 4 * values})
    train = "release_step" if here.study.distributed else "train_round"
    original = getattr(client_worker, train)

    def closing(*arguments: Any, **more: Any) -> Any:
        found = original(*arguments, **more)
        write_policy(policy, **{"limits.max_upload_bytes": 4 * values - 1})
        return found

    with monkeypatch.context() as patched:
        patched.setattr(client_worker, train, closing)
        with pytest.raises(PolicyError, match="E_UPLOAD"):  # the last look, with the update in hand
            worker._contribution(opened)
    with pytest.raises(PolicyError, match="E_UPLOAD"):  # stored bytes get that look as well
        worker._contribution(opened)
    write_policy(policy, **{"limits.max_upload_bytes": 4 * values})
    found = worker._contribution(opened)
    assert np.array_equal(found.update, worker._contribution(opened).update)
    assert begun(worker, 1) == 1


def test_a_coordinator_that_restarts_in_mid_round_gets_what_the_site_was_training(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = place(tmp_path, bert, "plain")
    worker, original = here.worker(), train_round
    opened = asked(here.study, worker, 1, SITES)
    training, restarted = threading.Event(), threading.Event()

    def slowly(*arguments: Any, **more: Any) -> Any:
        update = original(*arguments, **more)
        training.set()
        assert restarted.wait(10)
        return update

    monkeypatch.setattr(client_worker, "train_round", slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(worker._contribution, opened)
        assert training.wait(10)
        second = pool.submit(worker._contribution, replace(opened, nonce="2" * 32))
        restarted.set()
        one, other = first.result(), second.result()
    assert other.nonce == "2" * 32
    assert np.array_equal(one.update, other.update)
    assert begun(worker, 1) == 1


def test_an_update_that_is_not_finite_is_charged_and_not_trained_again(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = place(tmp_path, bert, "plain")
    worker, original = here.worker(), train_round
    opened = asked(here.study, worker, 1, SITES)
    # Finite itself, but not once it is weighted by the declared count.
    monkeypatch.setattr(client_worker, "train_round", lambda *a, **m: np.full_like(original(*a, **m), 3e38))
    with pytest.raises(DivergedError, match="the round is charged"):
        worker._contribution(opened)
    for _ in range(200):
        with pytest.raises(SpentRoundError):
            worker._contribution(opened)
    ledger = open_ledger(worker.site.config)
    (item,) = ledger.items("notes")
    assert (item.charged, item.rounds) == (True, 1)


@pytest.mark.parametrize("name", ["plain", "distributed"])
def test_rounds_without_a_result_are_paid_only_so_often(bert: Path, tmp_path: Path, name: str) -> None:
    """A member that spoils every sum, or a coordinator that aborts every round, spends no more of a site's budget."""
    here = place(tmp_path, bert, name)
    worker = here.worker()
    site = worker.site
    for number in range(1, MOST_LOST + 1):
        opened = asked(here.study, worker, number, SITES if number % 2 else SITES[:3])
        site.check_lost(here.study, opened)
        worker._contribution(opened)
    again = asked(here.study, worker, MOST_LOST + 1, SITES)
    with pytest.raises(PolicyError, match="E_LOST_ROUNDS"):
        site.check_lost(here.study, again)
    # Asked again for a round that is paid, the site sends the same bytes; and another adapter shows that one led on.
    site.check_lost(here.study, asked(here.study, worker, MOST_LOST, SITES))
    moved = random_adapter(worker.open(here.study)[1].spec, scale=0.2)
    site.check_lost(here.study, replace(again, adapter=moved.data, adapter_digest=moved.digest))


def test_a_policy_may_allow_fewer_rounds_without_a_result_and_none_without_privacy_count(
    bert: Path, tmp_path: Path
) -> None:
    here = place(tmp_path, bert, "plain")
    policy = load_site(here.file).policy
    assert policy is not None
    write_policy(policy, **{"limits.max_lost_rounds": 1, "approval": "person"})
    worker = here.worker()
    worker._contribution(asked(here.study, worker, 1, SITES))
    with pytest.raises(PolicyError, match="round 2 in a row without a result, allowed 1"):
        worker.site.check_lost(here.study, asked(here.study, worker, 2, SITES))


def test_streams_pay_once_together_and_draw_nothing_unpaid() -> None:
    paid: list[int] = []
    payment = Payment(lambda: paid.append(1))
    streams = [Paid(SeededRandomness(1, name), payment) for name in ("a", "b")]
    assert paid == []
    for stream, name in zip(streams, ("a", "b"), strict=True):
        same = SeededRandomness(1, name)
        assert np.array_equal(stream.normal(3), same.normal(3))
        assert np.array_equal(stream.uniform(3), same.uniform(3))
        assert np.array_equal(stream.words(3), same.words(3))
        assert paid == [1]

    def refuse() -> None:
        raise SpentRoundError("spent")

    unpaid = Paid(SeededRandomness(1, "a"), Payment(refuse))
    for draw in (unpaid.normal, unpaid.uniform, unpaid.words, unpaid.lattice_normal):
        with pytest.raises(SpentRoundError):
            draw(1)
