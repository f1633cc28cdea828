"""Correlated noise at real sites: memory, classes and the ledger, through whole rounds, drop-outs and restarts."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from privet.client.budget.accounts import Cost, Item, Limit, RoundKey, check_budget, paid_rounds, spending
from privet.client.budget.ledger import Ledger, cost_of
from privet.client.budget.noise_memory import NoiseMemory
from privet.client.budget.releases import Releases, open_ledger
from privet.client.budget.sealing import Sealer
from privet.client.training.train import TrainingSet, draw_step
from privet.common.audit.bundle import history_of, read_archive
from privet.common.audit.privacy_statement import privacy_document
from privet.common.audit.privacy_text import privacy_markdown
from privet.common.errors import (
    BudgetExhaustedError,
    PolicyError,
    RefusedError,
    StateError,
    TooFewSitesError,
    VerificationError,
)
from privet.common.log.statements import SiteRound
from privet.common.masking.noise_shares import shared_noise
from privet.common.privacy.accounting import PrivacyEvent, epsilon, plan
from privet.common.privacy.noise import SecretRandomness, SeededRandomness, cut
from privet.common.privacy.shared_noise import contribute_correlated
from privet.common.study.adapter import Adapter
from privet.common.study.messages import Contribution, RoundOpen
from privet.common.study.study import Study
from tests.support.logged_world import world_of
from tests.support.masked_world import MaskedSite, sharing_study
from tests.support.sharing_world import SITES, Workers, initial, real_sites, worker_study
from tests.support.synthetic import SPEC
from tests.support.tiny import class_rows, worker_of, write_policy, write_rows

Array = NDArray[Any]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def banded(bert: Path, **more: Any) -> Study:
    return worker_study(
        bert,
        **{
            "privacy.noise": "banded",
            "privacy.band": 3,
            "cohort.sites": list(SITES),
            "training.sampling_rate": 0.25,
            "privacy.epsilon": 4.0,
            **more,
        },
    )


def banded_sites(folder: Path, study: Study) -> list[Path]:
    """Write the files of sites that admit correlated noise."""
    files = real_sites(folder, study)
    for name in SITES:
        write_policy(folder / f"{name}.policy.toml", **{"privacy.banded_noise": True})
    return files


# --- classes -----------------------------------------------------------------------------------------------------


def test_a_unit_is_drawn_in_the_steps_of_its_class_alone(bert: Path) -> None:
    study = banded(bert)
    data = TrainingSet([], [[i] for i in range(300)], 300, [i % 3 for i in range(300)])
    drawn = [set(draw_step(study, data, SeededRandomness(1, step), step)) for step in range(60)]
    for step, units in enumerate(drawn):
        assert {unit % 3 for unit in units} == {step % 3}
    # Never twice within the band, and as often in all as at the study's sampling rate.
    for near, far in itertools.combinations(range(60), 2):
        assert far - near >= 3 or not drawn[near] & drawn[far]
    assert sum(map(len, drawn)) == pytest.approx(300 * 60 * 0.25, rel=0.05)


def test_a_unit_less_changes_no_others_class(bert: Path, tmp_path: Path) -> None:
    study = banded(bert)
    files = banded_sites(tmp_path, study)
    rows = class_rows(30, seed=0)
    whole = worker_of(files[0]).open(study)[0].training
    write_rows(tmp_path / "ash-train.jsonl", rows[1:])
    without = worker_of(files[0]).open(study)[0].training
    assert list(whole.classes[1:]) == list(without.classes)
    assert set(whole.classes) == {0, 1, 2}


# --- whole rounds ------------------------------------------------------------------------------------------------


class Watched(Workers):
    """Workers whose noise is seen: what each took back and what it kept, by site and round."""

    taken: dict[tuple[str, int], tuple[int, ...]]
    kept: dict[tuple[str, int], Array]


@pytest.fixture
def world(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Study, Watched, Adapter]]:
    def made(**more: Any) -> tuple[Study, Watched, Adapter]:
        study = banded(bert, **more)
        files = banded_sites(tmp_path, study)
        exchange = Watched({name: worker_of(file) for name, file in zip(SITES, files, strict=True)})
        exchange.taken, exchange.kept = {}, {}
        past, keep = NoiseMemory.past, NoiseMemory.keep

        def name_of(memory: NoiseMemory) -> str:
            (name,) = (name for name, each in exchange.workers.items() if each.site.memory is memory)
            return name

        def looked(memory: NoiseMemory, of: Study, opened: RoundOpen) -> dict[int, Array]:
            found = past(memory, of, opened)
            exchange.taken[name_of(memory), opened.round] = tuple(sorted(found))
            for lag, noise in found.items():
                assert np.array_equal(noise, exchange.kept[name_of(memory), opened.round - lag])
            return found

        def kept(memory: NoiseMemory, of: Study, opened: RoundOpen, noise: Array) -> None:
            exchange.kept[name_of(memory), opened.round] = noise
            keep(memory, of, opened, noise)

        monkeypatch.setattr(NoiseMemory, "past", looked)
        monkeypatch.setattr(NoiseMemory, "keep", kept)
        return study, exchange, initial(exchange.workers["ash"], study)

    return made


def after(adapter: Adapter, steps: int) -> Adapter:
    """Return an adapter as so many steps would leave it."""
    tensor = adapter.spec.trained("ffa")[0]
    return adapter.replace({tensor.name: np.full(tensor.shape, steps * 1e-3, np.float32)})


def test_sites_take_back_the_noise_of_steps_in_which_they_took_part(world: Any) -> None:
    study, exchange, start = world()
    for number in range(1, 7):
        cohort = SITES[:3] if number == 2 else SITES
        assert exchange.play(study, after(start, number), number, cohort).survivors == cohort
    for name in SITES[:3]:
        assert [exchange.taken[name, t] for t in range(1, 7)] == [(), (1,), (1, 2), (1, 2), (1, 2), (1, 2)]
    # The clock goes on while a site is away: round 3 is two steps after round 1.
    assert [exchange.taken["yew", t] for t in (1, 3, 4, 5, 6)] == [(), (2,), (1,), (1, 2), (1, 2)]
    # After the last round nothing is left.
    for worker in exchange.workers.values():
        folder = worker.site.config.ledger.with_name(f"{worker.name}.{worker.name}.noise")
        assert list(folder.iterdir()) == []
    # A unit pays for its class: two rounds of three.
    mechanism = plan(study)
    assert mechanism is not None
    limit = Limit("record", 5.0, 1e-3)
    for name, rounds in (("ash", 2), ("yew", 2)):
        found = open_ledger(exchange.workers[name].site.config).statement(name, limit)
        assert found.epsilon == found.committed == epsilon([mechanism.training] * rounds, 1e-3) <= 4.0
        assert found.everybody > found.epsilon


def test_a_head_start_comes_before_the_noise_that_is_taken_back(world: Any) -> None:
    study, exchange, start = world(**{"training.head_start": "class-means"})
    mechanism = plan(study)
    assert mechanism is not None
    assert mechanism.head is not None
    for number in range(1, 8):
        assert exchange.play(study, after(start, number), number, SITES).survivors == SITES
    # The head start has fresh noise, which no step takes back; the six rounds after it are those of a band.
    assert [exchange.taken.get(("ash", t)) for t in range(1, 8)] == [None, (), (1,), (1, 2), (1, 2), (1, 2), (1, 2)]
    own = mechanism.sides(7)[0]
    assert own == [mechanism.head, mechanism.training, mechanism.training]
    found = open_ledger(exchange.workers["ash"].site.config).statement("ash", Limit("record", 5.0, 1e-3))
    assert found.epsilon == found.committed == pytest.approx(epsilon(own, 1e-3), rel=1e-12)
    assert found.epsilon <= 4.0
    # Before the head start, the ledger reserves it together with the whole band: a limit that covers less refuses.
    tight = [Item(study.digest, Cost(mechanism.head), True, 1)]
    limit = Limit("record", epsilon([mechanism.head, mechanism.training], 1e-3) + 1e-9, 1e-3)
    release = RoundKey("ash", study.digest, 1)
    check_budget(release, limit, Cost(mechanism.head), [], 1, [(Cost(mechanism.training), 3)])
    with pytest.raises(BudgetExhaustedError):
        check_budget(release, limit, Cost(mechanism.head), [], 1, [(Cost(mechanism.training), 4)])
    with pytest.raises(BudgetExhaustedError):
        check_budget(release, limit, Cost(mechanism.training), tight, 4)


def test_noise_of_a_sum_that_was_not_used_is_never_taken_back(world: Any) -> None:
    study, exchange, start = world()
    exchange.play(study, start, 1, SITES)
    exchange.play(study, start, 2, SITES)  # from the same adapter: the sum of round 1 was revealed and not used
    exchange.play(study, after(start, 2), 3, SITES)
    assert [exchange.taken["ash", t] for t in (1, 2, 3)] == [(), (), (1,)]


def test_a_site_that_restarts_finds_its_noise_and_one_that_lost_it_goes_on_without(world: Any, tmp_path: Path) -> None:
    study, exchange, start = world()
    exchange.play(study, start, 1, SITES)
    exchange.workers["ash"] = worker_of(tmp_path / "ash.toml")
    exchange.workers["elm"] = worker_of(tmp_path / "elm.toml")
    folder = tmp_path / "elm.elm.noise"
    (file,) = folder.iterdir()
    assert folder.stat().st_mode & 0o077 == file.stat().st_mode & 0o077 == 0
    file.unlink()
    # Whoever reads the disk reads no noise, and no file takes another's place.
    (other,) = (tmp_path / "oak.oak.noise").iterdir()
    assert exchange.kept["oak", 1].astype("<i8").tobytes()[:64] not in other.read_bytes()
    (tmp_path / "yew.yew.noise" / other.name).write_bytes(other.read_bytes())
    exchange.play(study, after(start, 1), 2, SITES)
    assert [exchange.taken[name, 2] for name in SITES] == [(1,), (), (1,), ()]


def test_a_share_that_entered_no_sum_is_not_taken_back(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, exchange, start = world()

    def full(releases: Releases, of: Study, contribution: Contribution) -> None:
        raise StateError("the disk is full", "")

    with monkeypatch.context() as patched:  # killed after the noise was kept, and before the share was charged
        patched.setattr(Releases, "charge", full)
        with pytest.raises(TooFewSitesError):
            exchange.play(study, start, 1, SITES)
    assert [file.suffix for file in (tmp_path / "ash.ash.noise").iterdir()] == [".kept"]
    exchange.play(study, after(start, 1), 2, SITES)
    assert exchange.taken["ash", 2] == ()


def test_rounds_come_in_their_order(world: Any) -> None:
    study, exchange, start = world()
    exchange.play(study, start, 2, SITES)
    opened = RoundOpen(study.document(), 1, "f" * 32, start.digest, SITES, start.data)
    with pytest.raises(RefusedError, match="is earlier than round 2, which has begun"):
        exchange.workers["ash"]._contribution(opened)


def test_records_that_change_during_a_study_keep_the_site_out(world: Any, tmp_path: Path) -> None:
    study, exchange, start = world()
    exchange.play(study, start, 1, SITES)
    rows = class_rows(30, seed=0)
    write_rows(tmp_path / "ash-train.jsonl", [{**rows[0], "text": "another text"}, *rows[1:]])
    exchange.workers["ash"] = worker_of(tmp_path / "ash.toml")
    total = exchange.play(study, after(start, 1), 2, SITES)
    assert total.survivors == SITES[1:]
    assert "one of them has changed" in total.failures["ash"].message
    write_rows(tmp_path / "ash-train.jsonl", rows)
    exchange.workers["ash"] = worker_of(tmp_path / "ash.toml")
    assert exchange.play(study, after(start, 2), 3, SITES).survivors == SITES


def test_a_site_admits_correlated_noise_only_by_its_policy(bert: Path, tmp_path: Path) -> None:
    study = banded(bert)
    files = banded_sites(tmp_path, study)
    write_policy(tmp_path / "ash.policy.toml")
    with pytest.raises(PolicyError) as caught:
        worker_of(files[0]).offer(study)
    assert [finding.code for finding in caught.value.findings] == ["E_BANDED"]
    assert worker_of(files[1]).offer(study)
    # Cohorts that may have no honest site in common could settle late who is in a sum.
    unnamed = banded(bert, **{"cohort.sites": []})
    with pytest.raises(PolicyError) as caught:
        worker_of(banded_sites(tmp_path / "unnamed", unnamed)[0]).offer(unnamed)
    assert [finding.code for finding in caught.value.findings] == ["E_BANDED_COHORT"]


def test_a_study_with_correlated_noise_leaves_a_log_that_an_auditor_verifies(tmp_path: Path) -> None:
    privacy = {"noise": "banded", "band": 3}
    study = sharing_study(training={"rounds": 4}, aggregation={"learning_rate": 0.01}, privacy=privacy)
    world = world_of(tmp_path, study, 5)
    for site in world.sites.values():
        site.contribute = partial(share_of, study, site)  # type: ignore[method-assign]
    state = world.play()
    assert [statement["type"] for statement in state.statements] == ["round-close"] * 4
    verdict, found = history_of(read_archive(tmp_path / "run" / "public"), world.policy)
    assert verdict.ok, verdict
    stated = [each.charge.training for _, each in found if isinstance(each, SiteRound) and each.charge]
    assert {(each.mechanism, each.band) for each in stated} == {("poisson-subsampled-shared-banded-gaussian", 3)}
    mechanism = plan(study)
    assert mechanism is not None
    costs = [set(statement["privacy"]["epsilon"].values()) for statement in state.statements]
    assert costs == [{epsilon([mechanism.training] * draws, 1e-4)} for draws in (1, 1, 1, 2)]
    document = privacy_document(study, state.statements)
    assert document["epsilon"]["run"] == epsilon([mechanism.training] * 2, 1e-4) <= 4.0
    text = " ".join(privacy_markdown(document).split())
    assert "draws each record of its class independently with probability 0.3" in text
    assert "Noise is correlated over 3 steps" in text
    with pytest.raises(VerificationError, match="spent epsilon"):
        privacy_document(study, [state.statements[0], {**state.statements[1], "round": 4}])
    with pytest.raises(VerificationError, match="must have the number of its round"):
        privacy_document(study, [{**state.statements[0], "round": None}])


def share_of(study: Study, site: MaskedSite, opened: RoundOpen) -> Contribution:
    shares = shared_noise(study, len(opened.cohort))
    gradient = -site.learn(study, Adapter.read(SPEC, opened.adapter))
    numbers, _ = contribute_correlated(cut(gradient, shares.lattice), shares, {}, SecretRandomness())
    return Contribution(site.name, opened.round, opened.nonce, float(site.weight), numbers, np.empty(0))


# --- the memory --------------------------------------------------------------------------------------------------


def opened_at(study: Study, number: int, adapter: str = "a") -> RoundOpen:
    return RoundOpen(study.document(), number, "f" * 32, f"sha256:{adapter * 64}", SITES, b"")


@pytest.mark.parametrize("on_disk", [True, False])
def test_memory_holds_what_the_next_steps_take_back_and_no_more(bert: Path, tmp_path: Path, on_disk: bool) -> None:
    study = banded(bert)
    memory = NoiseMemory(tmp_path / "noise" if on_disk else None, Sealer(None))
    for number in range(1, 6):
        opened = opened_at(study, number, "0123456"[number])
        assert {lag: int(noise[0]) for lag, noise in memory.past(study, opened).items()} == {
            lag: number - lag for lag in (1, 2) if number - lag >= 1
        }
        memory.keep(study, opened, np.full(4, number))
        assert memory.past(study, opened_at(study, number + 1)).keys() <= {2}  # kept, and not yet in a sum
        memory.added(study, number)
        memory.added(study, number)
    other = banded(bert, seed=9)
    assert memory.past(other, opened_at(other, 3)) == {}
    memory.keep(study, opened_at(study, 6), np.zeros(4, np.int64))
    assert memory._files.names("") == []


def test_memory_that_cannot_be_written_is_an_error_of_the_site(bert: Path, tmp_path: Path) -> None:
    study = banded(bert)
    (tmp_path / "noise").write_text("a file")
    memory = NoiseMemory(tmp_path / "noise", Sealer(None))
    with pytest.raises(StateError, match=r"the noise memory .* cannot be read or written"):
        memory.keep(study, opened_at(study, 1), np.zeros(4, np.int64))


# --- the ledger --------------------------------------------------------------------------------------------------

A, B = (f"sha256:{digit * 64}" for digit in "ab")
EVENT = PrivacyEvent(2.0, 1.0, 1, "record", True, 3)
LIMIT = Limit("record", 3.0, 1e-5)


def cost(drawn: int | None) -> Cost:
    return Cost(EVENT, own_multiplier=1.0, corrupt=1, drawn=drawn)


def test_a_study_costs_its_largest_class() -> None:
    items = [
        Item(A, cost(0), True, 2),
        Item(A, cost(1), True, 3),
        Item(A, cost(2), False, 3),
        Item(B, cost(0), True, 1),
    ]
    assert sum(rounds for _, rounds in paid_rounds(items)) == 3 + 1
    found = spending("notes", LIMIT, items, (1, ""))
    assert found.epsilon == epsilon([EVENT] * 4, 1e-5)
    assert [each.epsilon for each in found.studies] == [epsilon([EVENT] * 3, 1e-5), epsilon([EVENT], 1e-5)]
    assert [each.charged for each in found.studies] == [5, 1]


def test_a_limit_must_cover_the_largest_class_of_the_whole_study() -> None:
    one = epsilon([EVENT] * 2, 1e-5)
    limit = replace(LIMIT, epsilon=one + 1e-9)
    first = RoundKey("notes", A, 1)
    check_budget(first, limit, cost(1), [], 6)
    with pytest.raises(BudgetExhaustedError):
        check_budget(first, limit, cost(1), [], 7)
    check_budget(RoundKey("notes", A, 4), limit, cost(1), [Item(A, cost(c), True, 1) for c in (0, 1, 2)], 3)
    ledger = Ledger.in_memory()
    assert cost_of(ledger, "notes", LIMIT, [(cost(None), 7)])[0] == epsilon([EVENT] * 3, 1e-5)


def test_a_cost_states_its_class() -> None:
    assert Cost.parse(cost(2).document()) == cost(2)
    assert "drawn" not in cost(None).document()
    for wrong in (3, -1, True):
        with pytest.raises(RefusedError, match="one of the classes"):
            cost(wrong)
    with pytest.raises(RefusedError, match="one of the classes"):
        Cost(replace(EVENT, band=1), drawn=0)
