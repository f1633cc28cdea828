"""The privacy promise to the last bit: what one unit adds to a sum is its own term, whoever else is in the sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from privet.client.site import Resources
from privet.client.training.features import Feature
from privet.client.training.host import ModelHost
from privet.client.training.model import open_host
from privet.client.training.packing import Shape
from privet.client.training.probe import choose_shape
from privet.client.training.train import Draws, TrainingSet, train_round
from privet.common.errors import StudyError
from privet.common.privacy.accounting import PrivacyEvent
from privet.common.privacy.noise import SeededRandomness
from privet.common.study.study import Study
from tests.support.families import FAMILIES, family_base, family_study
from tests.support.invariance import (
    ADAPTERS,
    Bench,
    changed,
    check_invariance,
    checkpointing,
    drawn_adapter,
    drawn_features,
    poison,
)
from tests.support.tiny import private

LONGEST = 48
CLIPPINGS = ("flat", "automatic", "adaptive")
ENGINES: dict[str, Callable[[ModelHost], AbstractContextManager[None]]] = {
    "as opened": lambda host: nullcontext(),
    "one record a pass": lambda host: changed(host, shape=Shape()),
    # As on an accelerator: attention takes several records at a time, and padding makes up for missing ones.
    "grouped": lambda host: changed(
        host, shape=Shape((512, 1024), together=128, alignment=16) if host.shape.packed else host.shape
    ),
    "re-entrant checkpointing": lambda host: checkpointing(host, reentrant=True),
    "other checkpointing": lambda host: checkpointing(host, reentrant=False),
}


@dataclass(frozen=True)
class Case:
    """A model and a task."""

    family: str
    kind: str
    precision: str = "fp32"
    pooling: str = "mean"
    clipping: str = "flat"

    def __str__(self) -> str:
        return f"{self.family}-{self.kind}-{self.precision}"


Open = Callable[[Case], tuple[ModelHost, Study]]


@pytest.fixture(scope="module")
def open_case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Open a case's host, each once, on one thread."""
    root = tmp_path_factory.mktemp("families")
    paths: dict[str, Path] = {}
    hosts: dict[Case, ModelHost] = {}

    def open_(case: Case) -> tuple[ModelHost, Study]:
        if case.family not in paths:
            paths[case.family] = family_base(root / case.family, case.family)
        pooled = {"task.pooling": case.pooling} if case.kind == "text-classification" else {}
        study = family_study(
            paths[case.family],
            case.family,
            privacy=private(clip_norm=0.5, clipping=case.clipping),
            **{"task.kind": case.kind, "data.max_length": LONGEST, **pooled},
        )
        model = replace(case, clipping="")
        if model not in hosts:
            hosts[model] = open_host(study, Resources(device="cpu", precision=case.precision))
        return hosts[model], study

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield open_
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Draw:
    """What is drawn for a case. Lengths in tokens, those of the joining unit last."""

    lengths: tuple[int, ...]
    joining: int
    per_unit: int
    adapter: str
    engine: str
    most: int
    seed: int

    @property
    def units(self) -> dict[int, list[int]]:
        """Rows of each unit: one, or up to `per_unit`; the last has `joining`, all numbered in a drawn order."""
        rng = np.random.default_rng(self.seed)
        rows = [int(row) for row in rng.permutation(len(self.lengths))]
        mine, rest = sorted(rows[: self.joining]), rows[self.joining :]
        found = [mine]
        while rest:
            size = int(rng.integers(1, self.per_unit + 1))
            found.append(sorted(rest[:size]))
            rest = rest[size:]
        return {int(unit): found[index] for index, unit in enumerate(rng.permutation(len(found)))}

    @property
    def joins(self) -> int:
        """The joining unit."""
        rng = np.random.default_rng(self.seed)
        first = int(rng.permutation(len(self.lengths))[0])
        return next(unit for unit, rows in self.units.items() if first in rows)


lengths = st.one_of(
    st.lists(st.integers(1, LONGEST), min_size=1, max_size=40),
    st.lists(st.sampled_from([1, 7, 8, 9, LONGEST]), min_size=20, max_size=60),  # over several passes
).map(tuple)


def draws(engines: Sequence[str] = tuple(ENGINES), adapters: Sequence[str] = ADAPTERS) -> st.SearchStrategy[Draw]:
    return st.builds(
        Draw,
        lengths=lengths,
        joining=st.sampled_from([1, 1, 5]),
        per_unit=st.sampled_from([1, 1, 4]),
        adapter=st.sampled_from(adapters),
        engine=st.sampled_from(engines),
        most=st.sampled_from([1, 2, 8, 32]),
        seed=st.integers(0, 2**32 - 1),
    )


def check(open_case: Open, case: Case, draw: Draw) -> None:
    host, study = open_case(case)
    features = drawn_features(host, len(study.task.labels), draw.lengths, draw.seed)
    units, joining = draw.units, draw.joins
    others = [features[row] for unit, rows in units.items() if unit != joining for row in rows]
    adapter = drawn_adapter(host, others or features, draw.adapter, draw.seed)
    with ENGINES[draw.engine](host):
        check_invariance(Bench(host, study, features, adapter, draw.most), units, joining)


TASKS = [
    Case("bert", "text-classification", "fp32", "mean", "flat"),
    Case("roberta", "text-classification", "bf16", "cls", "automatic"),
    Case("distilbert", "token-classification", "fp32", clipping="adaptive"),
    Case("modernbert", "text-classification", "fp32", "mean", "automatic"),
    Case("electra", "token-classification", "bf16", clipping="flat"),
    Case("gpt2", "causal-lm", "fp32", clipping="automatic"),
    Case("llama", "text-classification", "bf16", "last", "adaptive"),
    Case("qwen2", "causal-lm", "bf16", clipping="flat"),
    Case("mistral", "causal-lm", "fp32", clipping="adaptive"),
    Case("gemma2", "causal-lm", "bf16", clipping="automatic"),
    Case("phi3", "text-classification", "fp32", "last", "flat"),
    Case("bloom", "causal-lm", "fp32", clipping="adaptive"),
    Case("deberta-v2", "token-classification", "bf16", clipping="flat"),
    Case("mixtral", "causal-lm", "fp32", clipping="automatic"),
]
EVERY = [
    Case(family, kind, precision, pooling, CLIPPINGS[(n + m) % 3])
    for n, (family, found) in enumerate(FAMILIES.items())
    for kind in found.kinds
    for m, pooling in enumerate(("mean", "cls", "last"))
    if kind == "text-classification" or m == 0
    for precision in ("fp32", "bf16")
    if kind != "text-classification" or (n + m + (precision == "bf16")) % 2 == 0
]
hypothesis_quick = settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
hypothesis_slow = settings(hypothesis_quick, max_examples=4)


@pytest.mark.parametrize("case", TASKS, ids=str)
@hypothesis_quick
@given(draw=draws())
def test_a_unit_adds_its_own_term_and_nothing_else(open_case: Open, case: Case, draw: Draw) -> None:
    check(open_case, case, draw)


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY, ids=lambda case: f"{case}-{case.pooling}")
@hypothesis_slow
@given(draw=draws())
def test_a_unit_adds_its_own_term_and_nothing_else_in_any_family(open_case: Open, case: Case, draw: Draw) -> None:
    check(open_case, case, draw)
