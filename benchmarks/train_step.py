"""The cost of differential privacy per training step: DP-SGD against plain LoRA on the same batches.

Three hosts hold the same model: two train plainly, one with per-sample gradients, clipping and noise. They take turns
in random order within one process, so that the machine's other work falls on all alike; the two plain ones measure the
noise of the comparison itself. With `--against DIR`, a checkout of commit 88891e7, that version's private step takes
turns with them, on the same records. A ratio is the
median over turns of a variant's time to that of the first plain one in the same turn, by the wall clock and,
which other work disturbs less, by the process's CPU time.

On a CPU: MiniLM (batch 32, adapters on query and value) and a randomly initialised Llama of 100 million parameters
(batch 4, adapters on all linear layers), in fp32 and bf16, each with records of 128 tokens and with records of mixed
lengths, as MedQuAD's questions have; `train_step_cuda.py` has a GPU's. Peak memory is that of processes of their own,
which load the model, reset the kernel's high-water mark (VmHWM) and take three steps.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from harness import Bench, Check, start
from studies import MINILM

from privet.client.bases.files import pins_of
from privet.client.site import Resources
from privet.client.training.dp import noisy, per_sample_gradients
from privet.client.training.features import Feature
from privet.client.training.host import ModelHost
from privet.client.training.model import initial_adapter, open_host
from privet.client.training.train import (
    Steps,
    TrainingSet,
    clipping_of,
    gradient_sum,
    local_optimizer,
    noise_ahead,
    release,
    set_gradients,
    term_sum,
)
from privet.common.privacy.accounting import quiet_warnings
from privet.common.privacy.noise import LATTICE, SecretRandomness
from privet.common.study.study import Study

TARGET, MEMORY_TARGET = 1.06, 1.10
VARIANTS = ("plain", "plain again", "private")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NOISE_MULTIPLIER = 0.6
BEFORE = "private in 88891e7"
EARLIER: list[Path] = []
"""Checkout of commit 88891e7, where one is given."""


@dataclass(frozen=True)
class Case:
    """One model to compare on.

    Attributes:
        batch: Records of a step.
        physical: Most records of a forward pass; None sets no limit.
        mixed: Whether lengths are drawn, log-normal like those of MedQuAD's questions. Otherwise all are the longest.
    """

    name: str
    study: Study
    resources: Resources
    batch: int
    repeats: int
    physical: int | None = None
    mixed: bool = False


def study_of(base: str, sha256: dict[str, str], kind: str, targets: list[str], tokens: int) -> Study:
    """Return a private study with rank-8 adapters on `targets`."""
    head = {"labels": [f"class-{n}" for n in range(13)]} if kind == "text-classification" else {}
    roles = {"text": "text", "label": "label"} if head else {"prompt": "prompt", "answer": "answer"}
    return Study.parse(
        {
            "name": "train-step",
            "model": {"base": base, "sha256": sha256},
            "task": {"kind": kind, **head},
            "data": {"columns": roles, "max_length": tokens},
            "lora": {"rank": 8, "alpha": 16, "targets": targets},
            "training": {"rounds": 1, "local_steps": 1, "sampling_rate": 0.01, "learning_rate": 1e-4},
            "aggregation": {"method": "fedavg"},
            "privacy": {"mode": "local", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0},
            "secure_aggregation": {"mode": "plain"},
        }
    )


def features_of(case: Case, seed: int) -> list[Feature]:
    """Return a batch of random tokens."""
    generator = np.random.default_rng(seed)
    longest = case.study.data.max_length
    drawn = generator.lognormal(np.log(longest / 2), 0.5, case.batch)
    features = []
    for index in range(case.batch):
        length = int(np.clip(drawn[index], 8, longest)) if case.mixed else longest
        ids = tuple(int(i) for i in generator.integers(200, 20_000, length))
        features.append(Feature(ids, index % 13 if case.study.task.labels else ids))
    return features


def stepper(
    case: Case, variant: str, features: list[Feature], stack: ExitStack
) -> tuple[Callable[[], tuple[float, float]], int]:
    """Return a function that takes one optimizer step and returns its wall-clock and CPU seconds, and what it trains.

    The second is the number of trained values.
    """
    study = case.study
    # Sites share a host; with a physical batch of its own, which nothing here reads, each variant loads one.
    host = open_host(study, case.resources.model_copy(update={"physical_batch": 1000 + VARIANTS.index(variant)}))
    host.mount(initial_adapter(study, host))
    trained = host.train_only(host.spec.trained(study.aggregation.method))
    parameters = [parameter for _, parameter in trained]
    optimizer = local_optimizer(study.training, trained)
    steps = Steps(
        host, study, TrainingSet(features, [[index] for index in range(len(features))], len(features)), parameters,
        case.physical or len(features),
    )  # fmt: skip
    stack.enter_context(host.passing(training=True))
    private = variant == "private"
    collected = None
    if private:
        collected = stack.enter_context(per_sample_gradients(host.model, parameters, packed=host.shape.packed))
    clipping = clipping_of(study.privacy, study.privacy.promise.clip_norm, NOISE_MULTIPLIER)
    noise, drawn = SecretRandomness(), {index: [index] for index in range(len(features))}

    def step() -> tuple[float, float]:
        _wait(host)
        started, worked = time.perf_counter(), time.process_time()
        if collected is None:
            total = gradient_sum(steps, drawn)
        else:
            variates = noise_ahead(host.device, study.privacy, steps.size, noise)
            terms = term_sum(steps, drawn, collected, clipping)
            total, _ = release(study.privacy, NOISE_MULTIPLIER, terms, len(features), variates())
        set_gradients(parameters, total / len(features))
        optimizer.step()
        _wait(host)
        return time.perf_counter() - started, time.process_time() - worked

    size = steps.size
    return step, size


@contextmanager
def earlier() -> Iterator[None]:
    """Import `privet` from the earlier checkout inside the context, beside the one in use."""
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "privet"}
    for name in ours:
        del sys.modules[name]
    with TemporaryDirectory() as folder:
        root = Path(folder) / "privet"
        root.mkdir()
        (root / "__init__.py").touch()
        for part in ("client", "common", "server", "simulations"):
            (root / part).symlink_to((EARLIER[0] / part).resolve())
        sys.path.insert(0, folder)
        try:
            yield
        finally:
            sys.path.remove(folder)
            for name in [name for name in sys.modules if name.partition(".")[0] == "privet"]:
                del sys.modules[name]
            sys.modules.update(ours)


def stepper_before(
    case: Case, features: Sequence[Feature], stack: ExitStack
) -> tuple[Callable[[], tuple[float, float]], int]:
    """Return what `stepper` returns, of the private step of commit 88891e7."""
    with earlier():
        dp, model, tasks, train, resources, studies = (
            import_module(f"privet.{name}")
            for name in (
                "client.dp",
                "client.model",
                "client.tasks",
                "client.train",
                "common.resources",
                "common.study",
            )
        )
        study = studies.Study.parse(case.study.model_dump(mode="json", exclude_none=True))
        host = model.open_host(
            study, resources.Resources(device=case.resources.device, precision=case.resources.precision)
        )
        host.mount(model.initial_adapter(study, host))
        trained = host.train_only(host.spec.trained(study.aggregation.method))
        parameters = [parameter for _, parameter in trained]
        optimizer = train.local_optimizer(study.training, trained)
        collected = stack.enter_context(dp.per_sample_gradients(host.model, parameters))
        clipping = dp.Clipping(collected, study.privacy.promise[2])
        host.model.train()
    old = [tasks.Feature(feature.ids, feature.labels) for feature in features]
    noise, size = SecretRandomness(), sum(parameter.numel() for parameter in parameters)
    units = {index: [index] for index in range(len(old))}

    def step() -> tuple[float, float]:
        started, worked = time.perf_counter(), time.process_time()
        batches = train.step_batches(old, units, case.physical or len(old))
        variates = train.noise_ahead(host.device, study.privacy, size, noise)
        summed = train.gradient_sum(host, study, batches, parameters, clipping)
        total, _ = train.release(study.privacy, NOISE_MULTIPLIER, clipping.norm, summed, len(old), variates())
        train.set_gradients(parameters, total / len(old))
        optimizer.step()
        return time.perf_counter() - started, time.process_time() - worked

    return step, size


def _wait(host: ModelHost) -> None:
    if host.device.type == "cuda":
        torch.cuda.synchronize()


def compare(case: Case, seed: int, variants: Sequence[str] = VARIANTS) -> dict[str, Any]:
    """Return median seconds of each variant and the ratios to the first, which is plain."""
    features = features_of(case, seed)
    generator = np.random.default_rng(seed)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    with ExitStack() as stack, quiet_warnings():
        made = {
            name: stepper_before(case, features, stack) if name == BEFORE else stepper(case, name, features, stack)
            for name in variants
        }
        steps = {name: step for name, (step, _) in made.items()}
        trainable = made["plain"][1]
        found = {name: step_memory(step) for name, step in steps.items()}
        order = list(variants)
        for _ in range(case.repeats):
            generator.shuffle(order)
            for name in order:
                times[name].append(steps[name]())
    ratios = {
        name: np.median(np.divide(times[name], times["plain"]), axis=0).round(4).tolist() for name in variants[1:]
    }
    before = times.get(BEFORE)
    to_before = np.median(np.divide(times["private"], before), axis=0).tolist() if before else None
    return {
        **({} if to_before is None else {"ratio_to_before": to_before[0], "cpu_ratio_to_before": to_before[1]}),
        **({"device_step_mb": found} if torch.cuda.is_available() else {}),
        "seconds": {name: round(statistics.median(wall for wall, _ in pairs), 4) for name, pairs in times.items()},
        "ratios": {name: wall for name, (wall, _) in ratios.items()},
        "cpu_ratios": {name: cpu for name, (_, cpu) in ratios.items()},
        "noise_seconds": round(noise_seconds(trainable), 4),
        "buffer_mb": round(4e-6 * (case.physical or case.batch) * trainable, 1),
        "batch": case.batch,
        "physical_batch": case.physical or case.batch,
        "tokens": case.study.data.max_length,
        "repeats": case.repeats,
        "trainable": trainable,
    }


def step_memory(step: Callable[[], Any]) -> int:
    """Take a step twice, and return the device memory in MB that the second one allocates beyond what lies there."""
    step()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6)


def noise_seconds(size: int) -> float:
    """Return the median time of drawing one step's noise, which is part of a private step."""
    noise, zeros, times = SecretRandomness(), torch.zeros(size, dtype=torch.int64), []
    for _ in range(5):
        started = time.perf_counter()
        noisy(zeros, LATTICE, noise.lattice_normal(size))
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _measure(case: Case, variant: str, sender: Any) -> None:
    """Send the peak memory of three steps in this fresh process, and its memory before them, in MB."""
    with ExitStack() as stack, quiet_warnings():
        step, _ = stepper(case, variant, features_of(case, 0), stack)
        status = Path("/proc/self/status")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _megabytes(status, "VmRSS")
        for _ in range(3):
            step()
        sender.send((_megabytes(status, "VmHWM"), before))


def _megabytes(status: Path, field: str) -> float:
    line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def memory(case: Case) -> dict[str, Any]:
    """Return peak memory of plain and private steps, each in a process of its own, and its growth over the model."""
    context = multiprocessing.get_context("spawn")
    found = {}
    for variant in ("plain", "private"):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_measure, args=(case, variant, sender))
        process.start()
        sender.close()
        found[variant] = receiver.recv()
        process.join()
    (plain, plain_before), (private, private_before) = found["plain"], found["private"]
    return {
        "peak_mb": {"plain": round(plain), "private": round(private)},
        "step_mb": {"plain": round(plain - plain_before), "private": round(private - private_before)},
        "peak_ratio": round(private / plain, 4),
        "step_ratio": round((private - private_before) / (plain - plain_before), 4),
    }


def llama(directory: Path, layers: int, hidden: int, targets: list[str], tokens: int) -> Study:
    """Write a randomly initialised Llama, with 64 values per head, and return a study on it.

    Its widths are multiples of 64, as those of real ones are (docs/privacy.md, "Records that overflow", says why it
    matters).
    """
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=32_000, hidden_size=hidden, intermediate_size=-(-2752 * hidden // 1024 // 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="20GB")
    del model
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(directory)
    pinned = pins_of(directory)
    return study_of(str(directory), pinned, "causal-lm", targets, tokens)


def minilm() -> Study:
    """Return a study on MiniLM, of 128 tokens."""
    return study_of(MINILM["base"], MINILM["sha256"], "text-classification", ["query", "value"], 128)


def cases(quick: bool, directory: Path) -> list[Case]:
    """Return what to compare on: MiniLM alone in the quick run."""
    encoder = minilm()
    cpu = {precision: Resources(device="cpu", precision=precision) for precision in ("fp32", "bf16")}
    repeats = {"fp32": 9, "bf16": 15}
    batch = 8 if quick else 32
    found = [
        Case(f"MiniLM {p}{', mixed lengths' if mixed else ''}", encoder, cpu[p], batch, 5 if quick else repeats[p],
             mixed=mixed)
        for p in cpu for mixed in (False, True)
    ]  # fmt: skip
    if quick:
        return found
    small = llama(directory / "100m", 12, 640, LINEAR, 128)
    found += [Case(f"Llama 100M {p}", small, cpu[p], 4, repeats[p]) for p in cpu]
    found += [Case(f"Llama 100M {p}, mixed lengths", small, cpu[p], 8, repeats[p], mixed=True) for p in cpu]
    return found


def checks_of(case: Case, result: dict[str, Any]) -> list[Check]:
    """Return the figures of one case against their targets."""
    ratios, cpu = result["ratios"], result["cpu_ratios"]
    checks = [
        Check(f"DP step / plain step, {case.name}", ratios["private"], "x", "<= 1.06", ratios["private"] <= TARGET),
        Check(f"DP step / plain step, {case.name}, CPU time", cpu["private"], "x", "", None),
        Check(f"plain step / plain step, {case.name} (noise)", ratios["plain again"], "x", "about 1", None),
    ]
    if BEFORE in ratios:
        before = ratios["private"] / ratios[BEFORE]
        checks.append(
            Check(f"DP step / DP step of 88891e7, {case.name}", round(before, 4), "x", "<= 1.10", before <= 1.10)
        )
    if "memory" in result:
        peak = result["memory"]["peak_ratio"]
        checks.append(
            Check(f"DP peak memory / plain peak memory, {case.name}", peak, "x", "<= 1.10", peak <= MEMORY_TARGET)
        )
    return checks


def against_before(case: Case, result: dict[str, Any]) -> Check:
    """Return the ratio of the private step to the earlier one."""
    found = round(result["ratio_to_before"], 4)
    return Check(f"DP step / DP step of 88891e7, {case.name}", found, "x", "<= 1.10", found <= 1.10)


def run(bench: Bench, directory: Path) -> tuple[list[Check], dict[str, Any]]:
    """Compare on every case, and measure memory where that can be done."""
    checks: list[Check] = []
    details = {}
    variants = (*VARIANTS, BEFORE) if EARLIER else VARIANTS
    for case in cases(bench.quick, directory):
        result = compare(case, bench.seed, variants)
        if not bench.quick and case.resources.device == "cpu" and Path("/proc/self/clear_refs").exists():
            result["memory"] = memory(case)
        bench.say(f"{case.name}: {result}")
        details[case.name] = result
        checks += checks_of(case, result)
    return checks, details


def main() -> None:
    """Run the comparison and print its checks."""
    bench = start("train_step", __doc__, against="checkout of commit 88891e7, to compare with its private step")
    if bench.against is not None:
        EARLIER.append(bench.against)
    with TemporaryDirectory() as directory:
        bench.finish(*run(bench, Path(directory)))


if __name__ == "__main__":
    main()
