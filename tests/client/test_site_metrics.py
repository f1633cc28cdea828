"""What a site and the coordinator count: bytes alike at both ends, and what the ledger says is spent."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from privet.client.budget.ledger import Ledger
from privet.client.budget.releases import limit_of
from privet.client.network.fleet import FleetLink, connected
from privet.client.network.telemetry import SiteMetrics
from privet.client.site import load_site
from privet.client.training.meter import PHASES, Meter
from privet.common.study.messages import RoundOpen
from tests.client.test_ledger import release, train
from tests.support.fleet_world import LARGEST, World
from tests.support.synthetic import study_of
from tests.support.tiny import (
    RECORDS,
    class_rows,
    private,
    random_adapter,
    rows_for,
    site_toml,
    tiny_study,
    worker_of,
)


def value(metrics: SiteMetrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(name, labels)
    assert found is not None
    return found


def test_both_ends_count_the_same_bytes(tmp_path: Path) -> None:
    world, metrics = World(tmp_path), SiteMetrics()
    key = world.node_key()
    with world.server() as server:
        link = FleetLink(f"127.0.0.1:{server.port}", world.authority.root(), key, LARGEST, metrics.moved)
        with connected(link):
            node = link.activate()
            assert link.beat()
            link.deactivate(node)
        sent, received = (value(metrics, "privet_site_bytes_total", direction=each) for each in ("sent", "received"))
        assert server.gate.bytes == {"received": sent, "sent": received}
        assert sent > received > 0


def test_what_is_spent_is_what_the_ledger_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = load_site(site_toml(tmp_path, "alder", class_rows(3), seed=None, limit=RECORDS))
    limit = limit_of(site)
    assert site.ledger is not None
    assert limit is not None
    ledger, metrics = Ledger.open(site.ledger, site.anchor, site.ledger_key), SiteMetrics()
    metrics.watch_budget(site)
    assert value(metrics, "privet_site_epsilon_limit") == RECORDS["epsilon"]
    assert value(metrics, "privet_site_epsilon") == 0
    train(ledger, release())
    spent = value(metrics, "privet_site_epsilon")
    assert spent == ledger.statement("notes", limit).epsilon > 0
    assert value(metrics, "privet_site_epsilon_everybody") == spent  # no noise is shared
    assert value(metrics, "privet_site_epsilon_counted") == ledger.statement("notes", limit).counted
    # Nothing is accounted anew while the ledger stays as it is.
    monkeypatch.setattr(Ledger, "statement", None)
    assert value(metrics, "privet_site_epsilon") == spent


def test_a_ledger_that_cannot_be_read_has_no_number(tmp_path: Path) -> None:
    site = load_site(site_toml(tmp_path, "alder", class_rows(3), seed=None, limit=RECORDS))
    metrics = SiteMetrics()
    metrics.watch_budget(site)
    assert site.ledger is not None
    site.ledger.write_bytes(b"no database")
    assert math.isnan(value(metrics, "privet_site_epsilon"))


@pytest.mark.parametrize("is_private", [False, True])
def test_a_rounds_training_is_counted_and_its_loss_is_not_under_privacy(
    bert: Path, tmp_path: Path, is_private: bool
) -> None:
    study = tiny_study(bert, **({"privacy": private()} if is_private else {}))
    worker, metrics = worker_of(site_toml(tmp_path, "alder", rows_for(study, 30))), SiteMetrics()
    worker.trained = metrics.trained
    adapter = random_adapter(worker.open(study)[1].spec)
    assert math.isnan(value(metrics, "privet_site_tokens_per_second"))
    worker.update(RoundOpen(study.document(), 1, "1" * 32, adapter.digest, ("alder",), adapter.data))
    seconds = {phase: value(metrics, "privet_site_training_seconds_total", phase=phase) for phase in PHASES}
    assert seconds["passes"] > 0
    assert (seconds["noise"] > 0) is is_private
    speed, loss = (value(metrics, f"privet_site_{name}") for name in ("tokens_per_second", "training_loss"))
    assert speed > 0
    assert math.isnan(loss) if is_private else 0 < loss < 20


def test_the_speed_says_nothing_of_how_much_was_drawn() -> None:
    study, metrics = study_of(privacy=private()), SiteMetrics()

    def after(tokens: int, passes: float) -> float:
        metrics.trained(study, Meter(tokens, tokens // 10, 2.5, {"passes": passes, "clipping": 1.0, "noise": 9.0}))
        return value(metrics, "privet_site_tokens_per_second")

    assert after(123_456, 10.0) == 12_000  # two digits
    assert after(12_346, 1.0) == 12_000
    assert after(0, 0.0) == 12_000  # an empty draw leaves it
    assert value(metrics, "privet_site_training_seconds_total", phase="noise") == 27


def test_the_loss_of_a_study_without_privacy_does_not_stay_under_the_next_one() -> None:
    metrics = SiteMetrics()
    for study, found in ((study_of(), 2.0), (study_of(privacy=private()), None)):
        metrics.trained(study, Meter(100, 10, 20.0, dict.fromkeys(PHASES, 1.0)))
        loss = value(metrics, "privet_site_training_loss")
        assert math.isnan(loss) if found is None else loss == found


def test_a_site_without_a_limit_reports_none() -> None:
    metrics = SiteMetrics()
    assert value(metrics, "privet_site_epsilon_limit") == 0
    assert value(metrics, "privet_site_gpu_bytes") >= 0
