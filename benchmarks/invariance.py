"""What one record more changes in a private step's sum, beyond its own term: nothing, or the promise is void.

A step adds each record's clipped gradient, of norm at most C. The noise covers the sum's change by one record only if
the others' gradients stay the same to the last bit. Here S(D + x) - S(D) is compared with x's own term, on MiniLM and
31 records of mixed lengths, under honest adapters (as a study starts, and random values as training gives them) and one
that a coordinator might send: a head of rows ±K·v with v orthogonal to the records' pooled vectors but not to what x
changes in them, so that last bits decide their classes. The largest of several x is reported, over C.

With `--against DIR`, a checkout of commit 88891e7, which padded batches to their longest record and added in floating
point, the same is measured there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch
from harness import Bench, Check, start
from train_step import EARLIER, NOISE_MULTIPLIER, earlier, minilm

from privet.client.site import Resources
from privet.client.training.dp import per_sample_gradients
from privet.client.training.features import Feature
from privet.client.training.model import initial_adapter, open_host
from privet.client.training.passes import score
from privet.client.training.train import Steps, TrainingSet, clipping_of, term_sum
from privet.common.privacy.accounting import quiet_warnings

RECORDS = 31
ADAPTERS = ("as a study starts", "random", "making ties")
PRECISIONS: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
FACTOR = {"fp32": 1e8, "bf16": 1e5}

Vectors = np.ndarray[Any, Any]
Values = Mapping[str, Vectors]


@dataclass(frozen=True)
class Engine:
    """One version of privet with MiniLM.

    Attributes:
        sums: Returns S of each of these sets of records, float64 [d], under these adapter values.
        norm: C, in the unit of `sums`.
        pooled: Returns the pooled vectors [n, h] of records under these adapter values.
        start: The adapter that a study starts from.
    """

    sums: Callable[[Values, Sequence[Sequence[Feature]]], list[torch.Tensor]]
    pooled: Callable[[Values, Sequence[Feature]], np.ndarray[Any, Any]]
    start: Values
    norm: float


def engine_now(precision: Literal["fp32", "bf16"]) -> Engine:
    """Return the version in use. Its sums are integers, in multiples of the noise lattice: exact below 2^53."""
    study = minilm()
    host = open_host(study, Resources(device="cpu", precision=precision))
    adapter = initial_adapter(study, host)
    clipping = clipping_of(study.privacy, study.privacy.promise.clip_norm, NOISE_MULTIPLIER)

    def sums(values: Values, sets: Sequence[Sequence[Feature]]) -> list[torch.Tensor]:
        host.mount(adapter.replace(values))
        parameters = [parameter for _, parameter in host.train_only(host.spec.trained(study.aggregation.method))]
        collecting = per_sample_gradients(host.model, parameters, packed=host.shape.packed)
        found = []
        with host.passing(training=True), collecting as per_sample, quiet_warnings():
            for features in sets:
                data = TrainingSet(features, [[row] for row in range(len(features))], len(features))
                drawn = {row: [row] for row in range(len(features))}
                total = term_sum(Steps(host, study, data, parameters, 32), drawn, per_sample, clipping).total
                if int(total.abs().max()) > 2**53:
                    raise OverflowError("a sum is not exact in float64")
                found.append(total.double())
        return found

    def pooled(values: Values, features: Sequence[Feature]) -> np.ndarray[Any, Any]:
        host.mount(adapter.replace(values))
        with given_to(host.model.get_base_model().classifier) as found:
            score(host, features)
        rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in found])
        return rows[rows.abs().sum(1) > 0].numpy()

    return Engine(sums, pooled, adapter.values, clipping.norm / clipping.lattice)


def engine_before(precision: Literal["fp32", "bf16"]) -> Engine:
    """Return the version of commit 88891e7."""
    with earlier():
        dp, model, tasks, train, resources, studies = (
            import_module(f"privet.{name}")
            for name in ("client.dp", "client.model", "client.tasks", "client.train", "common.resources",
                         "common.study")
        )  # fmt: skip
        study = studies.Study.parse(minilm().model_dump(mode="json", exclude_none=True))
        host = model.open_host(study, resources.Resources(device="cpu", precision=precision))
        adapter = model.initial_adapter(study, host)
    norm = study.privacy.promise[2]

    def old(features: Sequence[Feature]) -> list[Any]:
        return [tasks.Feature(feature.ids, feature.labels) for feature in features]

    def sums(values: Values, sets: Sequence[Sequence[Feature]]) -> list[torch.Tensor]:
        host.mount(adapter.replace(values))
        parameters = [parameter for _, parameter in host.train_only(host.spec.trained(study.aggregation.method))]
        host.model.train()
        found = []
        with dp.per_sample_gradients(host.model, parameters) as per_sample, quiet_warnings():
            for features in sets:
                batches = train.step_batches(old(features), {row: [row] for row in range(len(features))}, 32)
                summed = train.gradient_sum(host, study, batches, parameters, dp.Clipping(per_sample, norm))
                found.append(summed.gradient)
        return found

    def pooled(values: Values, features: Sequence[Feature]) -> np.ndarray[Any, Any]:
        host.mount(adapter.replace(values))
        with given_to(host.model.get_base_model().classifier) as found, torch.no_grad():
            tasks.forward(host, tasks.collate(host, old(features)))
        return torch.cat(found).numpy()

    return Engine(sums, pooled, adapter.values, norm)


@contextmanager
def given_to(layer: Any) -> Iterator[list[torch.Tensor]]:
    """Collect what a layer is given inside the context, in float32."""
    found: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach().float()))
    try:
        yield found
    finally:
        handle.remove()


def records(seed: int, joining: int) -> tuple[list[Feature], list[Feature]]:
    """Return the records of a set, and some that may join it, one longer than all and one shorter first."""
    rng = np.random.default_rng(seed)
    lengths = [int(min(max(length, 8), 60)) for length in rng.lognormal(np.log(40), 0.5, RECORDS)]
    more = [128, 8, 100, 64][:joining]
    drawn = [
        Feature(tuple(int(i) for i in rng.integers(200, 20_000, n)), k // RECORDS)
        for k, n in enumerate([*lengths, *more])
    ]
    return drawn[:RECORDS], drawn[RECORDS:]


def tie_direction(before: Vectors, after: Vectors) -> Vectors:
    """Return v [h] for which v·p is a rounding error, and as much as it can be from -1 to 1 where x has moved p.

    Args:
        before: Pooled vectors p of records [n, h].
        after: The same records' with one more record among them [n + 1, h].
    """
    same = {row.tobytes() for row in after}
    moved = [row for row in range(len(before)) if before[row].tobytes() not in same]
    if not moved:
        found: Vectors = np.linalg.svd(before.astype(np.float64))[2][-1]
        return found
    vectors = np.concatenate([before, after[moved]]).astype(np.float64)
    wanted = np.concatenate([np.where(np.isin(np.arange(len(before)), moved), -1.0, 0.0), np.ones(len(moved))])
    found = np.asarray(np.linalg.lstsq(vectors, wanted, rcond=1e-12)[0])
    return np.asarray(found / np.linalg.norm(found))


def adapter_values(
    engine: Engine, kind: str, features: Sequence[Feature], joining: Feature, precision: str, seed: int
) -> Values:
    """Return the values of one of `ADAPTERS`; one that makes ties makes them for these records and this x."""
    if kind == "as a study starts":
        return engine.start
    rng = np.random.default_rng(seed)
    drawn = {name: 0.05 * rng.standard_normal(value.shape) for name, value in engine.start.items()}
    values = {name: np.asarray(value, np.float32) for name, value in drawn.items()}
    if kind == "random":
        return values
    weight = next(name for name in values if name.endswith("classifier.weight"))
    v = tie_direction(engine.pooled(values, features), engine.pooled(values, [*features, joining]))
    head = np.zeros(values[weight].shape)
    head[0], head[1] = FACTOR[precision] * v, -FACTOR[precision] * v
    bias = weight.replace("weight", "bias")
    low = np.full(len(head), -1e4)  # only the first two classes count
    low[:2] = 0
    return {**values, weight: head.astype(np.float32), bias: low.astype(np.float32)}


def measure(engine: Engine, kind: str, precision: str, bench: Bench) -> dict[str, float]:
    """Return the largest change beyond the own term, and the largest change, both over C."""
    features, joining = records(bench.seed, 1 if bench.quick else 4)
    values = adapter_values(engine, kind, features, joining[0], precision, bench.seed)
    sets = [features, *[[*features, x] for x in joining], *[[x] for x in joining]]
    without, *rest = engine.sums(values, sets)
    changes = [whole - without for whole in rest[: len(joining)]]
    beyond = [float((change - own).norm()) for change, own in zip(changes, rest[len(joining) :], strict=True)]
    whole = max(float(change.norm()) for change in changes)
    return {"beyond its own term": max(beyond) / engine.norm, "in all": whole / engine.norm}


def run(bench: Bench) -> tuple[list[Check], dict[str, Any]]:
    """Measure every precision, version and adapter."""
    checks: list[Check] = []
    details: dict[str, Any] = {}
    engines = {"": engine_now, **({" in 88891e7": engine_before} if EARLIER else {})}
    for precision in PRECISIONS:
        for version, open_engine in engines.items():
            engine = open_engine(precision)
            for kind in ADAPTERS:
                name = f"{kind}, {precision}{version}"
                found = measure(engine, kind, precision, bench)
                bench.say(f"{name}: {found}")
                details[name] = found
                change = found["beyond its own term"]
                exact = None if version else change == 0
                checks.append(Check(f"change beyond x's term, {name}", change, "C", "" if version else "0", exact))
    return checks, details


def main() -> None:
    """Run the comparison and print its checks."""
    bench = start("invariance", __doc__, against="checkout of commit 88891e7, to measure the same there")
    if bench.against is not None:
        EARLIER.append(bench.against)
    torch.set_num_threads(1)
    bench.finish(*run(bench))


if __name__ == "__main__":
    main()
