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
from tests.client.test_ledger import release, train
from tests.support.fleet_world import LARGEST, World
from tests.support.tiny import RECORDS, class_rows, site_toml


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


def test_a_site_without_a_limit_reports_none() -> None:
    metrics = SiteMetrics()
    assert value(metrics, "privet_site_epsilon_limit") == 0
    assert value(metrics, "privet_site_gpu_bytes") >= 0
