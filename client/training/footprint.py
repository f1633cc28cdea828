"""The memory that training takes at a site, measured: one full pass on drawn tokens, through the code that trains."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from privet.client.training.dp import Clipping, per_sample_gradients
from privet.client.training.features import IGNORED, Feature
from privet.client.training.host import ModelHost, release_memory
from privet.client.training.model import initial_adapter
from privet.client.training.train import Steps, TrainingSet, gradient_sum, term_sum
from privet.common.privacy.accounting import quiet_warnings
from privet.common.privacy.noise import LATTICE, SeededRandomness
from privet.common.study.study import Study

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measured_bytes(study: Study, host: ModelHost, batch: int) -> int | None:
    """Return the peak memory of this process, or of its accelerator, in a step of training; None if unknown here.

    Args:
        study: The study.
        host: Its model.
        batch: Most records of a pass.
    """
    on_cpu = host.device.type == "cpu"
    if study.task.kind == "preference" or (on_cpu and not _CLEAR.exists()):
        return None
    release_memory()
    if on_cpu:
        _CLEAR.write_text("5", encoding="ascii")  # the kernel's mark of the largest resident set begins anew
    else:
        torch.cuda.reset_peak_memory_stats(host.device)
    trained = full_step(study, host, batch)
    found = high_water() if on_cpu else torch.cuda.max_memory_allocated(host.device)
    # What a round adds to the step: the optimizer's two means and the values before the round, in float32, and the
    # noise of a step as float64 and as integers.
    return None if found is None else found + trained * (12 + 16 * study.private)


def full_step(study: Study, host: ModelHost, batch: int) -> int:
    """Take the gradients of one full pass, and return the number of trained values."""
    features = _features(study, host, batch)
    adapter = initial_adapter(study, host)
    with host.lock, quiet_warnings():
        host.mount(adapter)
        parameters = [parameter for _, parameter in host.train_only(study.trained(adapter.spec))]
        data = TrainingSet(features, [[row] for row in range(len(features))], len(features))
        steps, drawn = Steps(host, study, data, parameters, batch), {row: [row] for row in range(len(features))}
        kept = host.meter
        host.meter = type(kept)()
        try:
            with host.passing(training=True):
                if study.private:
                    with per_sample_gradients(host.model, parameters, packed=host.shape.packed) as collected:
                        term_sum(steps, drawn, collected, Clipping(study.privacy.promise.clip_norm, LATTICE, None))
                else:
                    gradient_sum(steps, drawn)
        finally:
            host.meter = kept
            for parameter in parameters:
                parameter.grad = None
    release_memory()
    return steps.size


def _features(study: Study, host: ModelHost, batch: int) -> list[Feature]:
    """Return records of drawn tokens, as long as can be, as many as fill a pass."""
    tokens = study.data.max_length
    fit = max(1, host.shape.sizes[-1] // host.shape.width(tokens)) if host.shape.packed else 1
    stream, features = SeededRandomness(0, "footprint"), []
    for _ in range(min(batch, fit)):
        ids = tuple(int(x) for x in np.floor(stream.uniform(tokens) * len(host.tokenizer)))
        features.append(Feature(ids, _labels(host.kind, ids)))
    return features


def _labels(kind: str, ids: tuple[int, ...]) -> int | tuple[int, ...]:
    if kind == "text-classification":
        return 0
    return (0,) * len(ids) if kind == "token-classification" else (IGNORED, *ids[1:])


def high_water() -> int | None:
    """Return the largest resident set of this process so far, in bytes; None where the system does not tell."""
    if not _STATUS.is_file():
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    return None if found is None else 1024 * int(found.group(1))
