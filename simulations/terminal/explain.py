"""What follows from a study before it runs: its noise, privacy cost, traffic and memory."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from privet.client.training.footprint import measured_bytes
from privet.client.training.host import ModelHost
from privet.client.training.model import check_terms, choose_autocast, choose_device, open_host
from privet.client.training.packing import Shape
from privet.common.masking.groups import corrupt_sites, survivors_of
from privet.common.masking.noise_shares import bits_of, deviation_of_sum, momentum_of, shared_noise
from privet.common.privacy.accounting import PrivacyPlan, epsilon, multipliers
from privet.common.privacy.accounting import plan as privacy_plan
from privet.common.privacy.correlated import Band, error_of_sums
from privet.common.secagg.messages import DEALT_BYTES, DIGEST_BYTES, LINK_BYTES, SECRET_BYTES, TAG_BYTES
from privet.common.secagg.quantize import lane_bits
from privet.common.secagg.shamir import SHARE_BYTES
from privet.common.secagg.suites import CIPHERTEXT_BYTES
from privet.common.study.adapter import AdapterSpec
from privet.common.study.counts import cells_of
from privet.common.study.sections import SQUARING
from privet.common.study.study import Study
from privet.simulations.data.federation import Plan
from privet.simulations.terminal.lengths import training_lengths

_EXCHANGES = {"masked": 5, "plain": 1}
# Of a block, before its first round.
_SET_UP = 3
NETWORKS = {"10 Mbit/s, 50 ms": (10.0, 0.05), "100 Mbit/s, 20 ms": (100.0, 0.02), "1 Gbit/s, 2 ms": (1000.0, 0.002)}
"""Example networks by name: (Mbit/s, seconds of a round trip)."""


def explain_study(plan: Plan, host: ModelHost | None = None) -> dict[str, Any]:
    """Return the figures that follow from a study, as JSON values.

    Args:
        plan: The study and its simulation.
        host: Its model; None opens the base and verifies its digest.

    Raises:
        StudyError, RefusedError, VerificationError: The study cannot run on this machine.
    """
    study, resources = plan.study, plan.simulation.resources
    check_terms(study)
    host = host or open_host(study, resources)
    if study.counts:
        return _explain_counts(plan)
    mechanism = privacy_plan(study)
    lengths = training_lengths(plan, host.tokenizer)
    trained = study.trained(host.spec)
    trainable = sum(tensor.size for tensor in trained)
    device = choose_device(resources)
    precision = "bf16" if choose_autocast(resources, device) is not None else "fp32"
    sites = _sites_of(plan)
    shares_down, shares_up = shares_bytes(study, sites)
    down, up = bytes_down(study, host.spec) + shares_down, bytes_up(study, trainable) + shares_up
    exchanges = exchanges_of(study, sites)
    sent = exchanges, down + up
    meaning: dict[str, Any] = {
        "study": study.name,
        "digest": study.digest,
        "task": study.task.kind,
        "base": study.model.base,
        "base_parameters": host.base_parameters,
        **({} if study.model.quantisation is None else {"quantisation": study.model.quantisation}),
        "adapter_parameters": sum(tensor.size for tensor in host.spec.tensors),
        "trainable_parameters": trainable,
        "rounds": study.rounds,
        **({"head_start": True} if study.training.starts_head else {}),
        "steps_per_round": study.training.steps,
        "total_steps": study.total_steps,
        "passes_over_data": round(study.total_steps * study.training.sampling_rate, 3),
        "aggregation": f"{study.aggregation.method}, {study.aggregation.optimizer}",
        "secure_aggregation": study.secure_aggregation.mode,
        "bytes_down_per_round_and_site": down,
        "bytes_up_per_round_and_site": up,
        "exchanges_per_round": exchanges,
        "network_seconds_per_round": {
            name: round(seconds_on(*network, *sent), 3) for name, network in NETWORKS.items()
        },
        "device": device.type,
        "precision": precision,
        "passes": {"rows": list(host.shape.sizes), "objection": host.verdict},
        "memory_bytes": measured_bytes(study, host, resources.physical_batch)
        or memory_bytes(study, host, trainable, resources.physical_batch),
        "token_lengths": None if lengths is None else lengths.document(),
        "corrupt_sites": corrupt_sites(study, study.cohort.min_sites),
        "privacy": None,
    }
    if mechanism is not None:
        meaning["privacy"] = {
            "unit": study.privacy.unit,
            "epsilon": round(mechanism.spent(study.rounds), 4),
            "epsilon_after_one_round": round(mechanism.spent(1), 4),
            "target": mechanism.target,
            "delta": mechanism.delta,
            "noise_multiplier": round(mechanism.training.noise_multiplier, 4),
            **(
                {}
                if mechanism.head is None
                else {"noise_multiplier_head_start": round(mechanism.head.noise_multiplier, 4)}
            ),
            "clip_norm": study.privacy.clip_norm,
            "sampling_rate": study.training.sampling_rate,
            "mode": study.privacy.mode,
        }
        if study.distributed:
            meaning["shared_noise"] = sharing(study, mechanism, sites)
    return meaning


def _explain_counts(plan: Plan) -> dict[str, Any]:
    """Return the figures of a study that counts: what it counts, its cost, and the noise on each count."""
    study, sites = plan.study, _sites_of(plan)
    mechanism, cells = privacy_plan(study), cells_of(study)
    return {
        "study": study.name,
        "digest": study.digest,
        "kind": study.kind,
        "task": study.task.kind,
        "base": study.model.base,
        "rounds": study.rounds,
        "cells": list(cells.titles.values()),
        "secure_aggregation": study.secure_aggregation.mode,
        "sites": sites,
        "deviation_of_a_count": round(deviation_of_sum(study, sites, sites) / cells.scale, 3),
        "privacy": None
        if mechanism is None
        else {
            "unit": study.privacy.unit,
            "epsilon": round(mechanism.spent(1), 4),
            "target": mechanism.target,
            "delta": mechanism.delta,
            "noise_multiplier": round(mechanism.training.noise_multiplier, 4),
            "mode": study.privacy.mode,
        },
    }


def bytes_down(study: Study, spec: AdapterSpec) -> int:
    """Return the bytes of an adapter's values that a site receives in a round, on the mean over the study's rounds.

    Tensors that no round changes are sent once.
    """
    frozen = sum(tensor.size for tensor in spec.frozen(study.aggregation.method))
    rounds = study.rounds
    return 4 * (sum(tensor.size for tensor in spec.tensors) - frozen + -(-frozen // rounds))


def _sites_of(plan: Plan) -> int:
    """Return the number of sites that a plan names, or the fewest that its study admits."""
    simulation = plan.simulation
    dealt = simulation.partition.sites if simulation.partition is not None else None
    return dealt or len(simulation.sites) or len(plan.study.cohort.sites) or plan.study.cohort.min_sites


def sharing(study: Study, mechanism: PrivacyPlan, sites: int) -> dict[str, Any]:
    """Return how a cohort of `sites` shares the noise of a step, and the noise if each site added all of its own.

    The noise is that of a step's sum in which no site drops out, in clip norms. Divide it by the expected batch size
    for the noise of the mean.
    """
    shares = shared_noise(study, sites, head=not study.training.rounds)
    trained = mechanism.training.counted_rounds(study.training.rounds or 1)
    own = [replace(mechanism.training, noise_multiplier=shares.own_multiplier)] * trained
    if mechanism.head is not None:
        own.append(replace(mechanism.head, noise_multiplier=shared_noise(study, sites, head=True).own_multiplier))
    alone = epsilon(own, mechanism.delta)
    independent, spread = shares.noise_multiplier, 1.0
    if shares.band is not None:
        fresh = study.privacy.model_copy(update={"noise": "independent", "band": None})
        independent = multipliers(study.model_copy(update={"privacy": fresh}), study.privacy.promise.epsilon).training
        spread = shares.band.norm * shares.band.spread(study.total_steps)
    return {
        "sites": sites,
        "survivors": shares.survivors,
        "corrupt": shares.corrupt,
        "helpers": shares.helpers,
        "noise_of_a_step": round(shares.own_multiplier * spread * sites**0.5, 4),
        "noise_of_a_step_if_local": round(independent * sites**0.5, 4),
        "epsilon_of_a_share_alone": round(alone, 4) if math.isfinite(alone) else None,
        **({} if shares.band is None else {"band": _banded(study, shares.band, independent / shares.noise_multiplier)}),
    }


def _banded(study: Study, band: Band, less: float) -> dict[str, Any]:
    """Return a band's number of steps, and by what factor it lowers the error of sums, if the server is linear.

    Args:
        study: The study.
        band: Its band.
        less: Noise multiplier of independent noise, divided by that of the band.
    """
    momentum = momentum_of(study)
    independent, correlated = (error_of_sums(each, study.total_steps, momentum) for each in (None, band))
    return {
        "steps": band.steps,
        "error_lower_by": round(less * independent / (correlated * band.norm), 3),
        "linear_server": study.aggregation.optimizer not in SQUARING,
    }


def exchanges_of(study: Study, sites: int) -> float:
    """Return the exchanges of a round: in each, a message goes to a site and an answer comes back.

    With `secure_aggregation.block`, the mean over a block of a cohort of `sites` that all answer: one for each round,
    two where a site may drop out, and the set-up.
    """
    block = study.secure_aggregation.block
    if block is None:
        return _EXCHANGES[study.secure_aggregation.mode]
    return (2 if _tolerates(study, sites) else 1) + _SET_UP / min(block, study.rounds)


def _tolerates(study: Study, sites: int) -> bool:
    """Return whether a block of a cohort of `sites` tolerates drop-outs."""
    return study.secure_aggregation.block is not None and survivors_of(study, sites, sites) < sites


def shares_bytes(study: Study, sites: int) -> tuple[int, int]:
    """Return the bytes of shares and tags that a site receives and sends in a round, on the mean over a block.

    Only a block that tolerates drop-outs has them in each round (docs/secure-aggregation.md, section 15).
    """
    block = study.secure_aggregation.block
    if block is None or not _tolerates(study, sites):
        return 0, 0
    others, rounds = sites - 1, min(block, study.rounds)
    dealt = others * (DIGEST_BYTES + DEALT_BYTES + (CIPHERTEXT_BYTES + LINK_BYTES) / rounds)
    tags = others * TAG_BYTES
    wraps = others / 2 * SECRET_BYTES
    return math.ceil(dealt + tags), math.ceil(dealt + 2 * DIGEST_BYTES + tags + wraps + sites * SHARE_BYTES)


def seconds_on(megabits: float, delay: float, exchanges: float, size: int) -> float:
    """Return the seconds that a site's messages of a round take on a network.

    Args:
        megabits: Rate of the network, in Mbit/s.
        delay: Seconds of a round trip.
        exchanges: Exchanges of a round.
        size: Bytes of all messages.
    """
    return exchanges * delay + 8 * size / (megabits * 1e6)


def bytes_up(study: Study, trainable: int) -> int:
    """Return the bytes that a site sends in a round of the smallest cohort: float32 values, or packed masked words."""
    if study.secure_aggregation.mode == "plain":
        return 4 * trainable
    sites = study.cohort.min_sites
    return 8 * math.ceil(trainable / (64 // lane_bits(bits_of(study, sites), sites)))


def memory_bytes(study: Study, host: ModelHost, trainable: int, batch: int) -> int:
    """Estimate a site's peak memory in training: program and weights, activations, per-sample gradients, optimizer.

    Activations follow Korthikanti et al. (2022), equation 1: t·h·(34 + 5·a·w/h) bytes per layer for 16-bit values, and
    twice that for 32-bit values, with t rows of a pass and w tokens of a record. Gradient checkpointing keeps the
    activations of one layer and the inputs of all. On a CPU, the program and the weights are what this process holds.

    Args:
        study: The study.
        host: Its model, loaded.
        trainable: Number of trained values.
        batch: Most records of a pass.
    """
    config = host.model.get_base_model().config
    wide = 1 if host.autocast is not None else 2
    held = resident_bytes() if host.device.type == "cpu" else 0
    values = [*host.model.parameters(), *host.model.buffers()]  # quantised layers are buffers
    weights: int = sum(each.numel() * each.element_size() for each in values)
    layers, hidden = int(config.num_hidden_layers), int(config.hidden_size)
    heads, tokens = int(getattr(config, "num_attention_heads", 0)), study.data.max_length  # 0: state-space models
    rows = most_rows(host.shape, tokens, batch)
    layer = rows * hidden * (34 + 5 * heads * tokens / hidden) * wide
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in host.model.modules())
    activations = layer + layers * rows * hidden * 2 * wide if checkpointed else layers * layer
    if study.task.generates and host.vocabulary is None:
        # A language model whose last layer is not taken in parts holds float32 logits over its whole vocabulary.
        activations += 3 * 4 * rows * int(config.vocab_size)
    per_sample = 4 * min(batch, rows // host.shape.alignment) * trainable if study.private else 0
    return int(max(held, weights) + activations + 2 * per_sample + 16 * trainable)


def most_rows(shape: Shape, tokens: int, batch: int) -> int:
    """Return the rows of the largest pass of at most `batch` records."""
    if not shape.packed:
        return tokens
    needed = batch * shape.width(tokens)
    return next((size for size in shape.sizes if size >= needed), shape.sizes[-1])


def resident_bytes() -> int:
    """Return this process's resident memory; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
