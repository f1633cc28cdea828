"""Simulated sites: what they do otherwise than real ones, and that a real site's code takes none of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from privet.client.budget.releases import Bookkeeping
from privet.client.rounds.site import RealSite
from privet.client.site import load_site
from privet.common.errors import StudyError
from privet.simulations.sites import SimulatedSite, Unmetered, load_simulated
from tests.support.tiny import class_rows, site_toml


def site(folder: Path, name: str = "alder", seed: int = 7) -> SimulatedSite:
    return SimulatedSite(load_simulated(site_toml(folder, name, class_rows(3), seed=seed)))


def test_a_simulated_sites_file_is_none_of_a_real_site_and_the_reverse(tmp_path: Path) -> None:
    simulated = site_toml(tmp_path / "simulated", "alder", class_rows(3))
    real = site_toml(tmp_path / "real", "alder", class_rows(3), seed=None)
    with pytest.raises(StudyError, match="reproducible_seed: unknown key"):
        load_site(simulated)
    with pytest.raises(StudyError, match="reproducible_seed: is missing"):
        load_simulated(real)


def test_what_a_simulated_site_draws_follows_from_seed_name_round_and_purpose(tmp_path: Path) -> None:
    def words(folder: str, name: str = "alder", seed: int = 7, number: int = 1, purpose: str = "noise") -> bytes:
        return site(tmp_path / folder, name, seed).randomness(number, purpose).words(4).tobytes()

    first = words("a")
    assert words("b") == first
    others = {words("c", seed=8), words("d", name="birch"), words("e", number=2), words("f", purpose="sampling")}
    assert len(others) == 4
    assert first not in others
    assert site(tmp_path / "g").random_bytes(1)(13) == site(tmp_path / "h").random_bytes(1)(13)
    assert site(tmp_path / "i").random_bytes(1)(13) != site(tmp_path / "j").random_bytes(2)(13)


def test_what_a_real_site_draws_follows_from_nothing(tmp_path: Path) -> None:
    real = RealSite(load_site(site_toml(tmp_path, "alder", class_rows(3), seed=None)))
    assert real.randomness(1, "noise").words(4).tobytes() != real.randomness(1, "noise").words(4).tobytes()
    assert real.random_bytes(1)(16) != real.random_bytes(1)(16)
    # But for the units held out, which have to be the same in all studies on a dataset.
    renamed = RealSite(load_site(site_toml(tmp_path / "again", "birch", class_rows(3), seed=None)))
    assert real.split_key() == renamed.split_key()


def test_simulated_sites_that_name_no_peers_have_those_beside_them(tmp_path: Path) -> None:
    files = [site_toml(tmp_path, name, class_rows(3)) for name in ("alder", "birch", "cedar")]
    found = load_simulated(files[0]).peers
    assert sorted(found) == ["alder", "birch", "cedar"]
    assert load_simulated(files[2]).peers == found
    named = site_toml(tmp_path / "other", "alder", class_rows(3), peers=("alder", "birch"))
    assert sorted(load_simulated(named).peers) == ["alder", "birch"]


def test_a_simulated_site_keeps_no_ledger_and_commits_to_nothing(tmp_path: Path) -> None:
    found = site(tmp_path)
    releases: Bookkeeping = found.releases
    assert releases.began() == {}
    assert releases.head(0, "") is None
    assert isinstance(releases, Unmetered)
    assert found.committed({"units": 3}) == {}
    assert found.logbook is None
