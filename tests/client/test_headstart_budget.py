"""A head start at a real site: reserved, charged and limited as a release of its own, with the rounds that follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from privet.client.budget.ledger import cost_of
from privet.client.budget.releases import cost_of_study, limit_of, open_ledger
from privet.client.rounds.worker import Worker
from privet.common.errors import BudgetExhaustedError, RefusedError
from privet.common.privacy.accounting import plan
from privet.common.study.messages import RoundOpen
from privet.common.study.study import Study
from tests.support.site_log import logged
from tests.support.tiny import private, random_adapter, rows_for, site_toml, tiny_study, worker_of

# Without sampling, calibration is fast.
HEAD = {"training.head_start": "class-means", "training.sampling_rate": 1.0, "training.local_steps": 1}


def study_of(base: Path, **more: Any) -> Study:
    return tiny_study(base, privacy=private(), **{**HEAD, **more})


def site(folder: Path, study: Study, limit: float) -> Worker:
    """Return a real site with a limit, whose operator approved the study."""
    limits = {"unit": "record", "epsilon": limit, "delta": 1e-3}
    rows = rows_for(study, 30)
    return worker_of(
        site_toml(folder, "north", rows, seed=None, studies=[study.digest], declared_count=30, limit=limits)
    )


def asked(worker: Worker, study: Study, number: int, seed: int = 0, nonce: str = "1" * 32) -> RoundOpen:
    adapter = random_adapter(worker.open(study)[1].spec, seed, scale=0.1)
    opened = RoundOpen(study.document(), number, nonce, adapter.digest, ("north", "south"), adapter.data)
    return logged({worker.name: worker}, opened)


def spent(worker: Worker) -> float:
    limit = limit_of(worker.site.config)
    assert limit is not None
    ledger = open_ledger(worker.site.config)
    try:
        return ledger.statement("notes", limit).epsilon
    finally:
        ledger.close()


def test_the_ledger_counts_it_and_the_rounds_that_train_within_the_studys_epsilon(bert: Path, tmp_path: Path) -> None:
    study = study_of(bert)
    mechanism = plan(study)
    assert mechanism is not None
    assert mechanism.head is not None
    worker = site(tmp_path, study, mechanism.target)  # nothing to spare
    first = worker.update(asked(worker, study, 1))
    assert first.update.shape == (3 * (worker.open(study)[1].spec.class_sums().shape[1]),)
    assert spent(worker) == pytest.approx(mechanism.spent(1))
    # Asked again, the same bytes leave; for another adapter, none.
    again = worker.update(asked(worker, study, 1, nonce="2" * 32))
    assert again.update.tobytes() == first.update.tobytes()
    with pytest.raises(RefusedError, match="uncharged release"):
        worker.update(asked(worker, study, 1, seed=5))
    for number in (2, 3):
        worker.update(asked(worker, study, number, seed=number))
        assert spent(worker) == pytest.approx(mechanism.spent(number))
    assert spent(worker) <= mechanism.target


def test_a_site_that_missed_it_trains_within_the_same_limit(bert: Path, tmp_path: Path) -> None:
    study = study_of(bert)
    mechanism = plan(study)
    assert mechanism is not None
    worker = site(tmp_path, study, mechanism.target)
    for number in (2, 3):
        worker.update(asked(worker, study, number, seed=number))
    assert spent(worker) == pytest.approx(mechanism.spent([2, 3]))
    worker.offer(study)


def test_a_limit_below_head_start_and_training_refuses_before_a_record_is_read(bert: Path, tmp_path: Path) -> None:
    study = study_of(bert)
    mechanism = plan(study)
    assert mechanism is not None
    # Enough for either of them.
    limit = mechanism.spent([2, 3]) * 1.001
    assert mechanism.spent(1) < limit < mechanism.spent(3)
    worker = site(tmp_path, study, limit)
    (tmp_path / "north-train.jsonl").unlink()
    with pytest.raises(BudgetExhaustedError, match="3 remaining rounds"):
        worker.offer(study)


def test_what_a_study_would_cost_is_told_with_its_head_start(bert: Path, tmp_path: Path) -> None:
    for rounds, parts in ((2, [1, 2]), (0, [1])):
        study = study_of(bert, **{"training.rounds": rounds})
        mechanism = plan(study)
        assert mechanism is not None
        worker = site(tmp_path / str(rounds), study, 9.0)
        costs = cost_of_study(study, worker.site.config)
        assert [count for _, count in costs] == parts
        assert costs[0][0].training == mechanism.event(head=True)
        limit = limit_of(worker.site.config)
        assert limit is not None
        after, *_ = cost_of(open_ledger(worker.site.config), "notes", limit, costs)
        assert after == pytest.approx(mechanism.spent(study.rounds))
