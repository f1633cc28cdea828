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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from privet.client.site import Resources
from privet.client.training import probe
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
APART = {"clipping": "automatic", "head_clip_share": 0.2}
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
    all_layers: bool = False

    def __str__(self) -> str:
        name = f"{self.family}-{self.kind}-{self.precision}" + ("-apart" if self.clipping == "apart" else "")
        return name + ("-all-layers" if self.all_layers else "")


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
        if case.all_layers:
            pooled = {"task.head_reads": "all-layers"}
        study = family_study(
            paths[case.family],
            case.family,
            privacy=private(clip_norm=0.5, **APART if case.clipping == "apart" else {"clipping": case.clipping}),
            **{"task.kind": case.kind, "data.max_length": LONGEST, **pooled},
        )
        model = replace(case, clipping="")
        if model not in hosts:
            hosts[model] = open_host(study, Resources.model_validate({"device": "cpu", "precision": case.precision}))
        return hosts[model], study

    with threads(1):
        yield open_


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
    Case("bert", "text-classification", "fp32", "mean", "apart"),
    Case("bert", "token-classification", "fp32", clipping="flat", all_layers=True),
    Case("qwen2", "token-classification", "bf16", clipping="automatic", all_layers=True),
    Case("llama", "preference", "fp32", clipping="flat"),
    Case("qwen2", "preference", "bf16", clipping="automatic"),
    Case("mixtral", "preference", "fp32", clipping="adaptive"),
]
PAIRS = TASKS[-3:]
EVERY = [
    Case(
        family,
        kind,
        "bf16" if (n + m) % 2 else "fp32",
        pooling,
        CLIPPINGS[(n + m) % 3],
        all_layers=kind == "token-classification" and n % 2 == 0,
    )
    for n, (family, found) in enumerate(FAMILIES.items())
    for m, (kind, pooling) in enumerate(
        [("text-classification", pooling) for pooling in ("mean", "cls", "last")]
        + [(kind, "mean") for kind in ("token-classification", "causal-lm")]
    )
    if kind in found.kinds
]
hypothesis_quick = settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
hypothesis_slow = settings(hypothesis_quick, max_examples=3)


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


# --- units of several rows, and records without a finite loss --------------------------------------------


@pytest.mark.parametrize("case", [TASKS[0], TASKS[5], TASKS[11], PAIRS[0]], ids=str)
def test_a_unit_of_many_rows_over_several_passes_adds_its_own_term(open_case: Open, case: Case) -> None:
    for most, longest in ((2, LONGEST), (32, LONGEST), (32, 9)):
        draw = Draw(tuple(range(1, longest + 1)), longest // 2, 7, "ties", "as opened", most, seed=most)
        assert max(map(len, draw.units.values())) > 2
        check(open_case, case, draw)


FINITE = [case for case in TASKS[:-3] if not (case.kind == "causal-lm" and FAMILIES[case.family].tied)]


@pytest.mark.parametrize("engine", ["as opened", "one record a pass", "grouped"])
@pytest.mark.parametrize("case", [FINITE[0], FINITE[1], FINITE[6], FINITE[-1], PAIRS[0]], ids=str)
def test_a_record_without_a_finite_loss_changes_nothing(open_case: Open, case: Case, engine: str) -> None:
    host, study = open_case(case)
    features = drawn_features(host, len(study.task.labels), [3, 17, 9, LONGEST, 1, 30, 8], seed=4)
    with poison(host) as token, ENGINES[engine](host):
        for row in (1, 3):
            ids = (token, *features[row].ids[1:])
            mixed = [*features]
            mixed[row] = replace(features[row], ids=ids)
            bench = Bench(host, study, mixed, drawn_adapter(host, features, "ordinary", 5))
            units = {unit: [unit] for unit in range(len(mixed))}
            check_invariance(bench, units, row)
            (term,) = bench.terms({row: [row]})
            assert not term.total.any()
            assert term.balance == 0
            # Nor does it change anything as one of a unit's rows: the unit is zero, and others are as they were.
            check_invariance(bench, {0: [0], 1: [1, 2, 3], 2: [4, 5, 6]}, 1)


# --- order, grouping, threads ----------------------------------------------------------------------------


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Use so many threads inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bench_of(open_case: Open, case: Case, adapter: str) -> Bench:
    """Return a bench of records of many lengths."""
    host, study = open_case(case)
    features = drawn_features(host, len(study.task.labels), [LONGEST, 1, 30, 7, 8, 9] * 6, seed=6)
    return Bench(host, study, features, drawn_adapter(host, features, adapter, 7))


@pytest.mark.parametrize("adapter", ["ties", *(pytest.param(name, marks=pytest.mark.slow) for name in ADAPTERS[:2])])
@pytest.mark.parametrize("case", [TASKS[0], TASKS[3], TASKS[6], TASKS[7], TASKS[11], PAIRS[1]], ids=str)
def test_the_sum_is_the_same_bits_in_any_order_and_grouping(open_case: Open, case: Case, adapter: str) -> None:
    bench = bench_of(open_case, case, adapter)
    units = {unit: [unit] for unit in range(len(bench.features))}
    (first,) = bench.terms(units)
    assert first.total.any()
    order = np.random.default_rng(8).permutation(len(units))
    shuffled = replace(bench, features=[bench.features[unit] for unit in order])
    for most in (1, 8, 32):
        for (found,) in (replace(bench, most=most).terms(units), replace(shuffled, most=most).terms(units)):
            assert torch.equal(found.total, first.total)
            assert found.balance == first.balance


def check_threads(bench: Bench) -> None:
    units = {unit: [unit] for unit in range(len(bench.features))}
    (one,) = bench.terms(units)
    with threads(2):
        (two,) = bench.terms(units)
    assert torch.equal(one.total, two.total)


# Passes of one record, of its own odd length, are another matter: MKL splits a product of 7 rows by the number of
# threads. That number is the same for all records of a process, so the promise stands.
@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("case", [case for case in TASKS if not FAMILIES[case.family].verdict], ids=str)
def test_the_sum_is_the_same_bits_on_one_thread_and_on_two_in_any_family(
    open_case: Open, case: Case, adapter: str
) -> None:
    check_threads(bench_of(open_case, case, adapter))


def digest_of_round(bench: Bench) -> str:
    """Return the digest of the adapter after a round in which all units take part."""
    section = bench.study.training.model_copy(update={"sampling_rate": 1.0})
    study = bench.study.model_copy(update={"training": section})
    data = TrainingSet(bench.features, [[row] for row in range(len(bench.features))], len(bench.features))
    sources = Draws(SeededRandomness(1, "sampling"), SeededRandomness(1, "noise"))
    mechanism = PrivacyEvent(0.7, 1.0, section.steps, "record")
    train_round(
        bench.host, study, bench.adapter, data, sources, first_step=0, mechanism=mechanism, physical_batch=bench.most
    )
    return bench.adapter.replace({n: p.detach().numpy().copy() for n, p in bench.host.parameters.items()}).digest


@pytest.mark.parametrize("case", [TASKS[2], TASKS[5], TASKS[11], PAIRS[0]], ids=str)
def test_a_round_gives_the_same_adapter_in_any_order_and_grouping(open_case: Open, case: Case) -> None:
    bench = bench_of(open_case, case, "large")
    first = digest_of_round(bench)
    assert first != bench.adapter.digest
    others = [replace(bench, most=1), replace(bench, most=8, features=bench.features[::-1])]
    assert {digest_of_round(other) for other in others} == {first}


@pytest.mark.slow
@pytest.mark.parametrize("case", [TASKS[0], TASKS[2], TASKS[5], TASKS[7]], ids=str)
def test_a_round_gives_the_same_adapter_on_one_thread_and_on_two(open_case: Open, case: Case) -> None:
    bench = bench_of(open_case, case, "large")
    first = digest_of_round(bench)
    with threads(2):
        assert digest_of_round(bench) == first


# --- do these tests have teeth? --------------------------------------------------------------------------


def test_the_adapters_that_make_ties_make_last_bits_count(open_case: Open) -> None:
    """Packed and single passes differ by rounding, which these adapters turn into other classes."""
    for case in (TASKS[0], TASKS[5]):
        host, study = open_case(case)
        features = drawn_features(host, len(study.task.labels), [30] * 12, seed=11)
        moved = {}
        for kind in ("ordinary", "ties"):
            bench = Bench(host, study, features, drawn_adapter(host, features, kind, 12))
            units = {unit: [unit] for unit in range(len(features))}
            (packed,) = bench.terms(units)
            with ENGINES["one record a pass"](host):
                (single,) = bench.terms(units)
            difference = float((packed.total - single.total).double().norm())
            moved[kind] = difference * bench.clipping.lattice / bench.clipping.norm
        assert moved["ordinary"] < 1e-3
        assert moved["ties"] > 0.5


def test_passes_of_any_number_of_rows_would_fail_these_tests(open_case: Open) -> None:
    """As in padded batches, the number of rows would follow from what is in a pass."""
    host, study = open_case(TASKS[0])
    features = drawn_features(host, len(study.task.labels), [1, *[30, 5, 17] * 3, 48], seed=13)
    bench = Bench(host, study, features, drawn_adapter(host, features, "ties", 14))
    units = {unit: [unit] for unit in range(len(features))}
    with changed(host, shape=Shape(tuple(range(1, 600)), alignment=1)), pytest.raises(AssertionError):
        check_invariance(bench, units, 0)


# --- the probe -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_packs_the_families_that_can_be_packed(open_case: Open, family: str) -> None:
    known = {case.family: case for case in reversed(TASKS)}  # those that are open already
    host, _ = open_case(known.get(family, Case(family, FAMILIES[family].kinds[0])))
    assert host.verdict.startswith(FAMILIES[family].verdict)
    assert host.shape.packed == (host.verdict == "") == (not FAMILIES[family].verdict)


Forward = Callable[[torch.Tensor], torch.Tensor]
Fake = Callable[[nn.Module, Forward, torch.Tensor], torch.Tensor]
MIXED = "a record's loss or gradient changes in its last bits"
COMPUTES = "the model computes something else on records laid end to end"


def mixes_rows(_: nn.Module, forward: Forward, x: torch.Tensor) -> torch.Tensor:
    return forward(x) + x.mean((0, 1))


def mixes_rows_a_little(_: nn.Module, forward: Forward, x: torch.Tensor) -> torch.Tensor:
    return forward(x) + 1e-6 * x.mean((0, 1))


def counts_places(_: nn.Module, forward: Forward, x: torch.Tensor) -> torch.Tensor:
    return forward(x) + 1e-6 * torch.arange(x.shape[1])[:, None]


def counts_busy_rows(_: nn.Module, forward: Forward, x: torch.Tensor) -> torch.Tensor:
    return forward(x) * (1 + 1e-6 * (x > 0.5).float().mean())


def mixes_rows_in_scoring(_: nn.Module, forward: Forward, x: torch.Tensor) -> torch.Tensor:
    return forward(x) if torch.is_grad_enabled() else mixes_rows_a_little(_, forward, x)


def sorts_rows(_: nn.Module, forward: Forward, x: torch.Tensor) -> torch.Tensor:
    order = x[0, :, 0].argsort()
    return forward(x[:, order])[:, order.argsort()]


def takes_busy_rows(_: nn.Module, forward: Forward, x: torch.Tensor) -> torch.Tensor:
    busy = (x[0, :, 0] > 0) | (torch.arange(x.shape[1]) == 0)
    return forward(x) + 0 * forward(x[:, busy]).mean()


def reads_beyond_rows(_: nn.Module, forward: Forward, x: torch.Tensor) -> torch.Tensor:
    """As a matrix unit that takes the next row's first value times zero."""
    return forward(x) + 0.0 * torch.cat([x[:, 1:], x[:, :1]], 1)[..., :1]


@pytest.fixture
def faked(open_case: Open) -> Callable[[Fake], AbstractContextManager[ModelHost]]:
    """Replace the forward of a frozen layer inside the context."""
    host, _ = open_case(TASKS[0])
    base: Any = host.model.get_base_model()
    layer = base.backbone.encoder.layer[0].attention.output.dense

    @contextmanager
    def fake(how: Fake) -> Iterator[ModelHost]:
        forward = type(layer).forward.__get__(layer)
        vars(layer)["forward"] = lambda x: how(layer, forward, x)
        try:
            yield host
        finally:
            del vars(layer)["forward"]

    return fake


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (mixes_rows, COMPUTES),
        (mixes_rows_a_little, MIXED),
        (counts_places, MIXED),
        (counts_busy_rows, MIXED),
        (mixes_rows_in_scoring, MIXED),
        (reads_beyond_rows, "a record whose values are not finite changes the terms of others"),
        (sorts_rows, "the model has operations that are not known to treat each row by itself: sort"),
        (takes_busy_rows, "the model computes in shapes that depend on the records of a pass"),
    ],
    ids=lambda value: getattr(value, "__name__", "as"),
)
def test_a_model_that_mixes_rows_is_run_one_record_at_a_time(
    faked: Callable[[Fake], AbstractContextManager[ModelHost]], how: Fake, reason: str
) -> None:
    with faked(how) as host:
        shape, verdict = choose_shape(host, LONGEST, 3)
        assert not shape.packed
        assert verdict.startswith(reason)
    assert choose_shape(host, LONGEST, 3) == (host.shape, "")


def test_a_forward_pass_in_which_places_differ_is_seen_by_itself(
    faked: Callable[[Fake], AbstractContextManager[ModelHost]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_check_same", lambda *_: None)
    with faked(counts_places) as host:
        shape, verdict = choose_shape(host, LONGEST, 3)
        assert not shape.packed
        assert "with its place in a pass" in verdict


def counts_calls(layer: nn.Module, forward: Forward, x: torch.Tensor) -> torch.Tensor:
    calls: int = vars(layer).get("calls", 0) + 1
    vars(layer)["calls"] = calls
    return forward(x) * (1 + 1e-5 * calls)


def drops_out(_: nn.Module, forward: Forward, x: torch.Tensor) -> torch.Tensor:
    dropped: torch.Tensor = nn.functional.dropout(forward(x), 0.1, training=True)
    return dropped


@pytest.mark.parametrize("how", [counts_calls, drops_out])
def test_a_model_with_state_or_dropout_of_its_own_is_refused(
    faked: Callable[[Fake], AbstractContextManager[ModelHost]], how: Fake
) -> None:
    with faked(how) as host, pytest.raises(StudyError, match="does not give the same loss and gradient twice"):
        choose_shape(host, LONGEST, 3)


def test_dropout_that_ignores_the_configuration_is_harmless_or_refused(open_case: Open) -> None:
    """OPT's is a function and has a rate of its own; layers that recompute are in training mode."""
    host, _ = open_case(Case("opt", "causal-lm"))
    base: Any = host.model.get_base_model()
    for layer in base.model.decoder.layers:
        layer.dropout = 0.3
    try:
        assert choose_shape(host, LONGEST, 0) == (host.shape, "")
        draw = Draw((5, 30, 17, 9), 1, 1, "ordinary", "as opened", 32, seed=1)
        check(open_case, Case("opt", "causal-lm"), draw)
        with checkpointing(host, reentrant=True), pytest.raises(StudyError, match="twice"):
            choose_shape(host, LONGEST, 0)
    finally:
        for layer in base.model.decoder.layers:
            layer.dropout = 0.0
