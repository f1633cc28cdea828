"""Attacks on the privacy of a site, each tried for real: what a hostile coordinator or study would do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from privet.client.site import Resources
from privet.client.training.data import load_records
from privet.client.training.dp import Clipping, clip_units, per_sample_gradients
from privet.client.training.model import open_host
from privet.client.training.packing import Block, Layout
from privet.common.errors import PolicyError, RefusedError, StateError, StudyError
from privet.common.privacy.accounting import quiet_warnings
from privet.common.privacy.noise import lattice_unit
from privet.common.study.messages import Failure, Offer, RoundOpen
from privet.common.study.study import Study
from privet.server.network.grid import GridExchange
from tests.client.test_dp import is_within
from tests.support.memory_grid import MemoryGrid
from tests.support.tiny import (
    RECORDS,
    class_rows,
    private,
    random_adapter,
    site_toml,
    tiny_study,
    worker_of,
    write_policy,
    write_rows,
)

CPU = Resources(device="cpu", precision="fp32")


def real_site(folder: Path, studies: list[Study], **more: Any) -> Path:
    """Write a site that is no simulation."""
    rows = class_rows(60)
    more = {"limit": RECORDS if any(study.private for study in studies) else None, **more}
    return site_toml(folder, "north", rows, seed=None, studies=[study.digest for study in studies], **more)


def test_a_study_that_the_operator_has_not_agreed_to_opens_nothing(bert: Path, tmp_path: Path) -> None:
    agreed = tiny_study(bert, privacy=private())
    worker = worker_of(real_site(tmp_path, [agreed], declared_count=60))
    assert worker.offer(agreed).study_digest == agreed.digest
    adapter = random_adapter(worker.open(agreed)[1].spec, scale=0.1)
    (tmp_path / "north-train.jsonl").unlink()  # whoever opened the data now would fail otherwise
    for change in (
        {"privacy": {"mode": "none"}},
        {"privacy": private(epsilon=80.0)},
        {"privacy": private(), "data.unit": "text"},
        {"privacy": private(), "seed": 8},
    ):
        weaker = tiny_study(bert, **change)
        with pytest.raises(RefusedError, match="has not approved"):
            worker.offer(weaker)
        with pytest.raises(RefusedError, match="has not approved"):
            worker.update(RoundOpen(weaker.document(), 1, "nonce", adapter.digest, ("north",), adapter.data))


def test_a_site_that_lists_no_study_refuses_all(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert)
    with pytest.raises(RefusedError, match="has not approved"):
        worker_of(real_site(tmp_path, [])).offer(study)


def test_a_private_study_needs_a_declared_count(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, privacy=private())
    with pytest.raises(RefusedError, match="E_UNITS"):
        worker_of(real_site(tmp_path, [study])).offer(study)


def test_a_policys_refusal_reaches_the_coordinator_word_for_word(bert: Path, tmp_path: Path) -> None:
    from privet.client.app import app

    study = tiny_study(bert, privacy=private(epsilon=9.0))
    site = real_site(tmp_path, [study], declared_count=60)
    write_policy(tmp_path / "north.policy.toml", **{"privacy.max_epsilon": 8.0})
    (tmp_path / "north-train.jsonl").unlink()
    with pytest.raises(PolicyError) as caught:
        worker_of(site).offer(study)
    grid = GridExchange(MemoryGrid(app, {2: {"site": str(site)}}))
    reply = dict(grid.ask({2: Offer(study.document())}, timeout=60))[2]
    assert isinstance(reply, Failure)
    assert (reply.message, reply.hint) == (caught.value.message, caught.value.hint)
    assert "E_EPSILON: privacy.max_epsilon: asked 9, allowed at most 8" in reply.message


@pytest.mark.parametrize("labels", [["Ann Lee", "~"], ["p-1", "p-2"]])
def test_failures_answer_no_questions_about_the_data(bert: Path, tmp_path: Path, labels: list[str]) -> None:
    # Were counts sent back, "how many rows hold this label" would be a query on any column of the file.
    from privet.client.app import app

    said = set()
    for column in ("patient", "text", "no-such-column"):
        study = tiny_study(
            bert, **{"task.labels": labels, "data.columns": {"text": "text", "label": column}, "data.unit": None}
        )
        site = real_site(tmp_path / column, [study])
        reply = dict(
            GridExchange(MemoryGrid(app, {2: {"site": str(site)}})).ask({2: Offer(study.document())}, timeout=60)
        )[2]
        assert isinstance(reply, Failure)
        said.add((reply.error, reply.message, reply.hint))
    assert len(said) == 1
    assert not any(character.isdigit() for character in "".join(said.pop()))


def test_tiny_gradients_are_clipped_to_a_tiny_norm() -> None:
    # In float32 the squares of these would underflow, the norm would be 0 and nothing would be clipped.
    clipping = Clipping(1e-30, lattice_unit(1e-30))
    terms = clip_units(torch.full((1, 1000), 1e-24), clipping)[0]
    assert terms.any()
    assert is_within(terms, clipping)


def test_long_constant_gradients_stay_within_the_clip_norm() -> None:
    for size in (300_000, 2_000_000):
        clipping = Clipping(1.0, lattice_unit(1.0))
        terms = clip_units(torch.full((1, size), 0.37), clipping)[0]
        assert terms.any()
        assert is_within(terms, clipping)


@pytest.mark.parametrize("clip_norm", [1e-34, 0.0, 1e7])
def test_clip_norms_beyond_floating_point_are_refused(bert: Path, clip_norm: float) -> None:
    with pytest.raises(StudyError, match=r"privacy\.clip_norm"):
        tiny_study(bert, privacy=private(clip_norm=clip_norm))


def test_a_layer_that_also_works_on_something_shared_is_refused() -> None:
    class Relative(nn.Module):
        """As in DeBERTa: one projection for the records and for positions that all records share."""

        def __init__(self) -> None:
            super().__init__()
            self.key = nn.Linear(4, 4, bias=False)
            self.positions = torch.randn(1, 3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            projected: torch.Tensor = self.key(self.positions)
            return torch.matmul(self.key(x), projected.transpose(1, 2))

    model = Relative().train()
    layout = Layout(15, tuple(Block(3 * record, 3, (3,)) for record in range(5)))
    with quiet_warnings(), per_sample_gradients(model, list(model.parameters()), packed=True) as watching:
        watching.begin(layout)
        model(torch.randn(5, 3, 4)).square().sum().backward()
        with pytest.raises(StateError, match="other than the rows of the pass"):
            watching.take()


def changed_base(base: Path, folder: Path, **changes: Any) -> Study:
    """Return a study on a copy of `base` whose config.json says something else."""
    import shutil

    copy = shutil.copytree(base, folder)
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    return tiny_study(copy)


def test_records_longer_than_the_base_takes_are_refused_beforehand(bert: Path) -> None:
    with pytest.raises(StudyError, match=r"data\.max_length"):
        open_host(tiny_study(bert, **{"data.max_length": 100_000}), CPU)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_positions_that_follow_the_batch_are_refused(llama: Path, tmp_path: Path, kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 8}
    study = changed_base(llama, tmp_path / "base", rope_parameters=rope, rope_scaling=rope)
    with pytest.raises(StudyError, match="longest record of a batch"):
        open_host(study, CPU)


def test_two_spellings_of_a_patient_are_one_unit(bert: Path, tmp_path: Path) -> None:
    rows = [{**class_rows(2)[i], "patient": name} for i, name in enumerate(("José", "Jose\u0301"))]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    study = tiny_study(bert, **{"data.unicode": "none", "data.unit": "patient"})
    records, _ = load_records(path, study)
    assert len(set(records.units)) == 1


def test_the_same_noise_is_never_used_for_two_purposes(bert: Path, tmp_path: Path) -> None:
    worker = worker_of(site_toml(tmp_path, "north", class_rows(30), seed=4))
    draws = {
        (number, purpose): worker.site.randomness(number, purpose).words(64).tobytes()
        for number in range(1, 6)
        for purpose in ("sampling", "noise", "validation-noise")
    }
    assert len(set(draws.values())) == len(draws)
    assert np.frombuffer(b"".join(draws.values()), np.uint8).mean() == pytest.approx(127.5, abs=5)
