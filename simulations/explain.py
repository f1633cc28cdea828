"""What a study means before it runs: its noise, its cost, its size."""

from __future__ import annotations

import math
from typing import Any

from privet.client.model import ModelHost, choose_autocast, choose_device, open_host
from privet.common.masking import bits_of, corrupt_sites
from privet.common.privacy import plan as privacy_plan
from privet.common.quantize import lane_bits
from privet.common.study import Study
from privet.simulations.federation import Plan


def explain(plan: Plan) -> dict[str, Any]:
    """Return what the study derives to, checking the base on the way.

    Raises:
        StudyError, RefusedError, VerificationError: The study cannot run on this machine.
    """
    study, resources = plan.study, plan.simulation.resources
    host = open_host(study, resources)
    mechanism = privacy_plan(study)
    trained = host.spec.trained(study.aggregation.method)
    trainable = sum(tensor.size for tensor in trained)
    device = choose_device(resources)
    precision = "bf16" if choose_autocast(resources, device) is not None else "fp32"
    meaning: dict[str, Any] = {
        "study": study.name,
        "digest": study.digest,
        "task": study.task.kind,
        "base": study.model.base,
        "base_parameters": host.base_parameters,
        "adapter_parameters": sum(tensor.size for tensor in host.spec.tensors),
        "trainable_parameters": trainable,
        "rounds": study.training.rounds,
        "steps_per_round": study.training.steps,
        "total_steps": study.total_steps,
        "passes_over_data": round(study.total_steps * study.training.sampling_rate, 3),
        "aggregation": f"{study.aggregation.method}, {study.aggregation.optimizer}",
        "secure_aggregation": study.secure_aggregation.mode,
        "bytes_down_per_round_and_site": 4 * sum(tensor.size for tensor in host.spec.tensors),
        "bytes_up_per_round_and_site": bytes_up(study, trainable),
        "device": device.type,
        "precision": precision,
        "memory_bytes": memory_bytes(study, host, trainable, resources.physical_batch),
        "corrupt_sites": corrupt_sites(study, study.cohort.min_sites),
        "privacy": None,
    }
    if mechanism is not None:
        meaning["privacy"] = {
            "unit": study.privacy.unit,
            "epsilon": round(mechanism.spent(study.training.rounds), 4),
            "epsilon_after_one_round": round(mechanism.spent(1), 4),
            "target": mechanism.target,
            "delta": mechanism.delta,
            "noise_multiplier": round(mechanism.training.noise_multiplier, 4),
            "clip_norm": study.privacy.clip_norm,
            "sampling_rate": study.training.sampling_rate,
        }
    return meaning


def bytes_up(study: Study, trainable: int) -> int:
    """Return what a site sends in a round of the smallest cohort: float32 values, or under masking packed words."""
    if study.secure_aggregation.mode == "plain":
        return 4 * trainable
    sites = study.cohort.min_sites
    return 8 * math.ceil(trainable / (64 // lane_bits(bits_of(study, sites), sites)))


def memory_bytes(study: Study, host: ModelHost, trainable: int, batch: int) -> int:
    """Estimate a site's peak memory in training: weights, activations, per-sample gradients, optimizer.

    Activations follow Korthikanti et al. (2022), equation 1, for 16-bit values, t·n·h·(34 + 5·a·t/h) per
    layer, doubled for 32 bits; gradient checkpointing keeps one layer's and the layers' inputs.
    """
    config = host.model.get_base_model().config
    wide = 1 if host.autocast is not None else 2
    weights: int = sum(p.numel() * p.element_size() for p in host.model.parameters())
    layers, hidden = int(config.num_hidden_layers), int(config.hidden_size)
    heads, tokens = int(config.num_attention_heads), study.data.max_length
    layer = tokens * batch * hidden * (34 + 5 * heads * tokens / hidden) * wide
    checkpointed = bool(getattr(host.model.get_base_model(), "is_gradient_checkpointing", False))
    activations = layer + layers * tokens * batch * hidden * 2 * wide if checkpointed else layers * layer
    if study.task.kind == "causal-lm":
        activations += 3 * 4 * tokens * batch * int(config.vocab_size)
    per_sample = 4 * batch * trainable if study.private else 0
    return int(weights + activations + 2 * per_sample + 16 * trainable)
