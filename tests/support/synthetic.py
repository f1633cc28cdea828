"""A federation without a model: sites that step towards optima of their own, over an exchange in memory.

What the sites send are real messages; only the transport and the training are stand-ins. Nothing is random.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privet.client.rounds.received import completed
from privet.common.errors import PrivetError
from privet.common.study.adapter import Adapter, AdapterSpec, TensorSpec
from privet.common.study.messages import Consent, Contribution, Failure, Message, Offer, RoundOpen
from privet.common.study.study import Study
from privet.server.rounds.run_log import Unlogged
from privet.server.rounds.state import RunDirectory

A, B, HEAD = "m.lora_A.weight", "m.lora_B.weight", "m.classifier.weight"
RANK, D_IN, D_OUT = 2, 5, 4
SPEC = AdapterSpec.of(
    [
        TensorSpec(A, (RANK, D_IN), "lora_A"),
        TensorSpec(B, (D_OUT, RANK), "lora_B"),
        TensorSpec(HEAD, (3,), "full"),
    ]
)
PEFT_CONFIG = '{"peft_type": "LORA"}\n'
NAMES = ("alder", "birch", "cedar", "dogwood")

Array = NDArray[np.float64]
Learner = Callable[[Study, Adapter], Array]
"""From the study and the received adapter to the update, float64 [d]."""

BASE: dict[str, Any] = {
    "name": "synthetic",
    "model": {"base": "nowhere", "sha256": {"model.safetensors": "0" * 64}},
    "task": {"kind": "text-classification", "labels": ["no", "maybe", "yes"]},
    "data": {"columns": {"text": "text", "label": "label"}},
    "lora": {"rank": RANK, "targets": ["m"]},
    "training": {"learning_rate": 0.1, "rounds": 4, "local_steps": 2, "sampling_rate": 0.1},
    "aggregation": {"max_norm": 1e300},
    "cohort": {"min_sites": 2},
    "privacy": {"mode": "none"},
    "secure_aggregation": {"mode": "plain"},
}


def study_of(**sections: Mapping[str, Any]) -> Study:
    """Return the synthetic study with some keys of some sections replaced."""
    document = copy.deepcopy(BASE)
    for name, values in sections.items():
        document[name] = {**document.get(name, {}), **values}
    return Study.parse(document)


def start_adapter(seed: int = 0) -> Adapter:
    """Return an adapter as studies start from: orthonormal A, zero B, zero head."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((D_IN, RANK)))
    zeros = {B: np.zeros((D_OUT, RANK), np.float32), HEAD: np.zeros(3, np.float32)}
    return Adapter(SPEC, {A: np.ascontiguousarray(q.T, np.float32), **zeros})


def size(study: Study) -> int:
    """Return the number of values that a site trains."""
    return sum(tensor.size for tensor in SPEC.trained(study.aggregation.method))


def flat(study: Study, adapter: Adapter) -> Array:
    """Return what a site trains, as one float64 vector."""
    names = [tensor.name for tensor in SPEC.trained(study.aggregation.method)]
    return adapter.flatten(names).astype(np.float64)


def product(adapter: Adapter) -> Array:
    """Return B·A, float64 [d_out, d_in]."""
    return adapter.values[B].astype(np.float64) @ adapter.values[A].astype(np.float64)


def towards(optimum: Array, rate: float = 0.5) -> Learner:
    """One exact gradient step on |x - optimum|^2 / 2 over all trained values."""
    return lambda study, adapter: rate * (optimum - flat(study, adapter))


def towards_product(target: Array, rate: float = 0.5) -> Learner:
    """One exact gradient step of B on |B A - target|^2 / 2, and of the head towards 1; A stays."""

    def learn(study: Study, adapter: Adapter) -> Array:
        a = adapter.values[A].astype(np.float64)
        step = {
            B: rate * (target - product(adapter)) @ a.T,
            HEAD: rate * (1.0 - adapter.values[HEAD].astype(np.float64)),
        }
        return np.concatenate([step[t.name].ravel() for t in SPEC.trained(study.aggregation.method)])

    return learn


@dataclass
class Site:
    """Answers offers with consent and rounds with contributions, unless `answer` decides otherwise."""

    name: str
    learn: Learner
    weight: int = 1
    metrics: Callable[[int], Sequence[float]] = lambda number: ()
    answer: Callable[[Message, Message], Message | None] = lambda asked, honest: honest
    spec: AdapterSpec = SPEC
    kept: dict[str, bytes] = field(default_factory=dict)
    first: Callable[[], Adapter] = start_adapter

    def reply(self, asked: Message) -> Message | None:
        """Return the answer to a message, or None for silence."""
        return self.answer(asked, self.honest(asked))

    def honest(self, asked: Message) -> Message:
        """Return what a site that follows the protocol answers."""
        if isinstance(asked, Offer):
            return Consent(self.name, Study.parse(dict(asked.study)).digest, SPEC.digest, self.weight)
        if not isinstance(asked, RoundOpen):
            return Failure("ProtocolError", "unexpected message", "")
        study = Study.parse(dict(asked.study))
        try:
            asked = completed(self, study, asked, self.first)
        except PrivetError as error:
            return Failure(type(error).__name__, error.message, error.hint)
        weight = study.aggregation.weight(self.weight)
        update = weight * self.learn(study, Adapter.read(SPEC, asked.adapter))
        metrics = np.asarray(self.metrics(asked.round), np.float64)
        return Contribution(self.name, asked.round, asked.nonce, weight, update.astype(np.float32), metrics)


@dataclass
class MemoryExchange:
    """An exchange in memory. Keeps what was asked and what was answered; a message to a node without a
    site, or to a silent one, stays unanswered."""

    sites: Mapping[int, Site]
    slowness: float = 0.0
    asked: list[dict[int, Message]] = field(default_factory=list)
    replies: list[dict[int, Message]] = field(default_factory=list)

    def nodes(self) -> Sequence[int]:
        """Return all nodes, in ascending order."""
        return sorted(self.sites)

    def ask(self, requests: Mapping[int, Message], *, timeout: float) -> Iterable[tuple[int, Message]]:
        """Ask the sites one by one, the last node first."""
        time.sleep(self.slowness)
        answers = {node: self.sites[node].reply(request) for node, request in sorted(requests.items())[::-1]}
        self.asked.append(dict(requests))
        self.replies.append({node: answer for node, answer in answers.items() if answer is not None})
        return self.replies[-1].items()

    @property
    def rounds(self) -> list[dict[int, RoundOpen]]:
        """The rounds that were opened."""
        opened = [{n: m for n, m in asked.items() if isinstance(m, RoundOpen)} for asked in self.asked]
        return [messages for messages in opened if messages]


def exchange_of(*sites: Site, slowness: float = 0.0) -> MemoryExchange:
    """Return an exchange with these sites at nodes 2, 3, ..."""
    return MemoryExchange(dict(enumerate(sites, start=2)), slowness)


def optima(study: Study, count: int, seed: int = 1) -> list[Array]:
    """Return `count` fixed optima over what a site trains."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(size(study)) for _ in range(count)]


def quadratic(study: Study, count: int = 3, slowness: float = 0.0) -> MemoryExchange:
    """Return `count` sites with optima of their own and weights 10, 20, ..."""
    found = optima(study, count)
    sites = [Site(NAMES[i], towards(x), weight=10 * (i + 1)) for i, x in enumerate(found)]
    return exchange_of(*sites, slowness=slowness)


def continue_run(path: Path, slowness: float = 0.0) -> None:
    """Run or resume the run at `path` over `quadratic` sites; for a process of its own."""
    from privet.server.rounds.rounds import run_study

    run = RunDirectory.open(path)
    run_study(Unlogged(run), quadratic(run.study, slowness=slowness))


def unlogged(study: Study) -> Unlogged:
    """Return a run without a log, for what looks at its study and not at its directory."""
    return Unlogged(RunDirectory(Path("nowhere"), study, PEFT_CONFIG))
