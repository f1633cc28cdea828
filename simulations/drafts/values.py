"""Values of a new study that fit its task and the size of its data: steps, sampling rate, noise.

They are where to begin, taken from the studies that our results were measured on, and scaled. `privet sweep` tries
others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from privet.common.study.sections import GENERATING

Values = dict[str, dict[str, Any]]


def sampling_rate(units: int, share: float) -> float:
    """Return the rate at which a step draws `share` of a site's units: no fewer than 16 and no more than 128 of them.

    Two significant digits, at most 0.5.
    """
    drawn = min(128.0, max(16.0, share * units))
    return float(f"{min(0.5, drawn / max(units, 1)):.2g}")


def training_values(kind: str, mode: str, units: int, layers: int | None) -> Values:
    """Return the tables `lora`, `training` and `aggregation`.

    Args:
        kind: The task.
        mode: `privacy.mode`.
        units: Units of privacy of a typical site.
        layers: Layers of the base, where they are known.
    """
    if kind == "text-classification" and mode != "distributed":
        return _many_local_steps(units)
    generates = kind in GENERATING
    rate = sampling_rate(units, 0.25 if generates else 0.1)
    passes, fewest, most = (2.5, 10, 60) if generates else (3.0, 16, 96)
    rounds = min(most, max(fewest, round(passes / rate)))
    server: dict[str, Any] = {"optimizer": "adam", "learning_rate": 5e-3, "tau": 1e-8}
    if generates:
        server["learning_rate"] = 8e-3
    else:
        server["head_learning_rate"] = 1e-2
    if rounds >= 20:
        server["schedule"] = {"shape": "linear", "floor": 0.1}
    lora: dict[str, Any] = {"rank": 8, "alpha": 16, "start": "inputs"}
    if generates and layers is not None and layers > 8:
        lora["layers"] = 8
    if kind == "token-classification":
        lora |= {"rank": 16, "alpha": 32}
    training = {"rounds": rounds, "local_steps": 1, "sampling_rate": rate, "optimizer": "sgd", "learning_rate": 1.0}
    return {"lora": lora, "training": training, "aggregation": {"method": "ffa", **server}}


def _many_local_steps(units: int) -> Values:
    rate = sampling_rate(units, 0.1)
    steps = min(100, max(16, round(1.6 / rate)))
    rounds = 4 if steps <= 16 else min(10, math.ceil(steps / 8))
    training = {
        "rounds": rounds,
        "local_steps": math.ceil(steps / rounds),
        "sampling_rate": rate,
        "learning_rate": 2e-3,
        "head_learning_rate": 2e-2,
    }
    return {"lora": {"rank": 8, "alpha": 16}, "training": training, "aggregation": {"method": "fedsvd"}}


def delta_for(units: int) -> float:
    """Return a delta well below 1 / units: the largest power of ten of at most 0.1 / units, and of at most 1e-5."""
    return float(f"1e-{max(5, math.ceil(math.log10(10 * max(units, 1))))}")


def largest_count(units: int) -> int:
    """Return a round bound on the units of a site, with room for twice as many: 1, 2 or 5 times a power of ten."""
    power: int = 10 ** int(math.log10(max(2 * units, 10)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 2 * units)


def length_for(tokens: Sequence[int], most: int) -> int:
    """Return a multiple of 16, at most `most`, with room for records a quarter longer than 99 % of those here."""
    ordered = sorted(tokens)
    covering = ordered[math.ceil(0.99 * len(ordered)) - 1] if ordered else 100
    return min(most, max(16, 16 * math.ceil(1.25 * covering / 16)))


FORMAT_COMMENT = "How these files are written. A real site has this table in its own file."
COMMENTS: Mapping[str, str] = {
    "name": "of the study, and by default of its run with real sites",
    "model.base": "every site maps this name to its own copy of the model",
    "model.sha256": "Each site compares its copy with these digests: every file that decides a token.",
    "task.kind": "what the model learns",
    "task.labels": "The classes. They are part of the study: all sites and the coordinator see their names.",
    "task.pooling": "how the vectors of tokens become one; last: for decoders",
    "task.head_reads": "the head sees each word in all layers, and finds more; remove the key to export the result",
    "task.max_new_tokens": "longest answer in evaluation; raise it if answers are cut",
    "data.columns": "The column of each role, in every site's files.",
    "data.unit": "rows with one value here belong to one patient",
    "data.validation_fraction": "part of the units that sites measure the model on, and do not train on",
    "data.max_length": "tokens; longer records are cut; memory and time grow with it",
    "lora.rank": "size of the adapter; bytes per round grow with it",
    "lora.alpha": "scale of the adapter",
    "lora.targets": "the layers that get an adapter",
    "lora.layers": "the top layers alone: less to learn under noise",
    "lora.start": "where A starts: along what the layers read",
    "training.rounds": "in a private study, more rounds need more noise in each",
    "training.local_steps": "steps of a site in a round",
    "training.sampling_rate": "chance of each unit to enter a step; more of them drown noise, but cost time",
    "training.optimizer": "the server's optimizer takes the step",
    "training.learning_rate": "lower it if training diverges",
    "training.head_learning_rate": "of the new layer that gives the labels",
    "aggregation.method": "fedsvd: sites train B, and the server splits B·A anew. ffa: sites train B alone",
    "aggregation.optimizer": "the server's optimizer",
    "aggregation.learning_rate": "of the server; lower it if training diverges",
    "aggregation.tau": "added to the denominator of a step",
    "aggregation.schedule": "How the learning rate falls over the study.",
    "aggregation.schedule.shape": "along a line",
    "aggregation.schedule.floor": "part of the rate that is left after the last step",
    "aggregation.head_learning_rate": "of the new layer that gives the labels",
    "aggregation.largest_count": "most units that a site may declare; set near the largest site",
    "cohort.min_sites": "with fewer sites, a round is aborted",
    "privacy.mode": "local: each site adds all its noise. distributed: sites share it. none: no privacy",
    "privacy.unit": "who is protected: a record (row), or a patient with all rows",
    "privacy.epsilon": "of the whole study; smaller is more private and learns less",
    "privacy.delta": "keep it well below 1 / units of a site",
    "privacy.clip_norm": "longest gradient of a unit; noise is in proportion",
    "privacy.max_records_per_unit": "most rows of one patient in a step",
    "privacy.dropouts": "sites that a step may lose; more of them need more noise",
    "privacy.dropout_fraction": "the same, as a fraction of the sites",
    "kind": "statistics: counts units, labels and lengths. evaluate: measures an adapter. Both train nothing",
    "statistics.lengths": "upper ends of the bins of lengths, in tokens of the base",
    "evaluation.adapter": "its digest, or base: the base alone",
    "evaluation.files": "train or test: which of a site's files are measured on",
    "secure_aggregation.block": "rounds with one agreement on keys: a fifth of the messages",
    "secure_aggregation.corrupt": "sites that may collude with the coordinator; of two sites, none",
    "simulation": "For `privet simulate` on one machine. No part of the study: real sites ignore it.",
    "simulation.data": "the files below",
    "simulation.baselines": "train for comparison: each site alone, all data in one place",
    "simulation.test_fraction": "part of the units that is held out for the test, where no test file is named",
    "simulation.evaluate_every": "rounds between two evaluations",
    "simulation.patient_ids": "how the ids of patients are written",
    "simulation.resources.bases": "Where the base is on this machine. A real site has this table in its own file.",
    "simulation.partition.format": FORMAT_COMMENT,
    "simulation.partition": "One pool of rows for all simulated sites.",
    "simulation.partition.sites": "number of sites",
    "simulation.partition.split": "how the rows are dealt out to simulated sites",
    "simulation.partition.column": "each value becomes a site",
}
"""What each line of a new study changes."""
