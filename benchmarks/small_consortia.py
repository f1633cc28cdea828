"""Small consortia with a unit of many records: what a head start and an average of adapters gain at each epsilon.

Triage notes: 600 generated patients over five sites, unit patient. MedQuAD: 1,000 answers over its nine institutions,
by kind of question, unit record, and again with whole documents, unit document. NCBI disease: named entities, four
sites, unit document; the set does not mark abstracts, so nine sentences in a row, about one abstract, are a document.
Sites share the noise, at epsilon 8, 3 and 1, with delta 1e-4. For each: the study as it is, with a head start, with
correlated noise, with an average of the last adapters, and with all; without privacy beside; the head start alone
(`rounds = 0`); with a head that stays as it starts; and with settings of `privet plan`. The sizes of steps and the
constants of the head start were chosen on test records of notes and MedQuAD with one seed, which flatters their figures
somewhat.

`--only TEXT` runs the arms whose names contain it. `--seeds N` repeats them with N seeds. `--keep DIR` keeps each arm's
summary there, and a later run with the same settings takes it from there.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from harness import Check, kept, start
from ner import NCBI
from studies import LABELS, MEDQUAD, MINILM, medquad_sites, require, write

from privet.client.training.data import load_records
from privet.common.privacy.noise import derive_seed
from privet.common.study.study import Study
from privet.simulations.data.clinical_words import SPECIALTIES
from privet.simulations.runs.simulate import prepare, run_simulation

EPSILONS = (8.0, 3.0, 1.0)
DELTA = 1e-4
ROUNDS, RATE = 40, 0.1
PATIENTS, SITES = 600, 5
RECORDS, TESTS = 1000, 500
NCBI_SITES, SENTENCES = 4, 9
# The most points that a private study may lose to the same one without privacy, by its epsilon: with everything.
TARGETS = {8.0: 3.0, 3.0: 6.0, 1.0: 10.0}
# Student's t for 95 %, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}

# A head that starts at class means needs smaller steps than one at zero: larger ones let noise undo it.
GENTLE = {"learning_rate": 1e-3, "head_learning_rate": 1e-3}
# Each unit is drawn once in so many steps, with certainty.
BANDED = {"noise": "banded", "band": round(1 / RATE)}
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "as it is": {},
    "head start": {"training": {"head_start": "class-means"}, "aggregation": GENTLE},
    "average": {"aggregation": {"average": "tail"}},
    "correlated": {"privacy": BANDED},
    "all": {
        "training": {"head_start": "class-means"},
        "aggregation": {**GENTLE, "average": "tail"},
        "privacy": BANDED,
    },
    "head start alone": {"training": {"head_start": "class-means", "rounds": 0}},
    "head fixed": {
        "training": {"head_start": "class-means", "train_head": False},
        "aggregation": {"learning_rate": 1e-3, "head_learning_rate": None},
    },
    "planned": {
        "lora": {"rank": 4},
        "training": {"head_start": "class-means", "rounds": 80, "sampling_rate": 0.2},
        "aggregation": {"learning_rate": 6e-3, "head_learning_rate": 6e-3},
        "privacy": {"clipping": "automatic", "head_clip_share": 0.3},
    },
}
"""What is added to a study, by section. A further arm is a further line."""
LONG = ("head fixed", "planned")
"""Parts that a quick run leaves out."""


@dataclass(frozen=True)
class Arm:
    """One study to run.

    Attributes:
        data: A name of `SETTINGS`.
        part: A name of `PARTS`.
        epsilon: None: without privacy.
        seed: Of everything random.
    """

    data: str
    part: str
    epsilon: float | None
    seed: int

    @property
    def name(self) -> str:
        """The arm in words, without its seed."""
        return f"{self.data}, {promise(self.epsilon)}, {self.part}"


def promise(epsilon: float | None) -> str:
    """Return an epsilon in words."""
    return "non-private" if epsilon is None else f"epsilon {epsilon:g}"


def base(arm: Arm, unit: str, largest: int) -> dict[str, Any]:
    """Return what all studies share: one step a round, B alone is trained, and sites share the noise."""
    privacy: dict[str, Any] = {"mode": "none"}
    if arm.epsilon is not None:
        privacy = {"mode": "distributed", "unit": unit, "epsilon": arm.epsilon, "delta": DELTA, "clip_norm": 1.0}
    return {
        "seed": arm.seed,
        "model": MINILM,
        "lora": {"rank": 8, "alpha": 16, "targets": ["query", "value"], "layers": 2, "start": "inputs"},
        "training": {
            "rounds": ROUNDS, "local_steps": 1, "sampling_rate": RATE, "optimizer": "sgd", "learning_rate": 1.0,
        },
        "aggregation": {
            "method": "ffa", "optimizer": "adam", "learning_rate": 3e-3, "head_learning_rate": 1e-2, "tau": 1e-8,
            "schedule": {"shape": "linear", "floor": 0.1}, "largest_count": largest,
        },
        "privacy": privacy,
    }  # fmt: skip


def notes(arm: Arm, folder: Path) -> dict[str, Any]:
    """Return the study of generated triage notes."""
    return {
        **base(arm, "patient", 2 * PATIENTS // SITES),
        "name": "triage-small",
        "task": {"kind": "text-classification", "labels": list(SPECIALTIES), "pooling": "mean"},
        "data": {"columns": {"text": "note", "label": "specialty"}, "unit": "patient", "max_length": 48},
        "simulation": {
            "data": "notes", "evaluate_every": 1000, "resources": {"threads": 1},
            "partition": {"split": "dirichlet", "sites": SITES, "concentration": 5.0, "patients": PATIENTS},
        },
    }  # fmt: skip


def medquad(arm: Arm, folder: Path, unit: str = "record") -> dict[str, Any]:
    """Return the study of MedQuAD's answers, of which each site keeps its share of the records or documents."""
    document = {
        **base(arm, "record" if unit == "record" else "patient", RECORDS // 2),
        "name": "medquad-small",
        "task": {"kind": "text-classification", "labels": list(LABELS), "pooling": "mean"},
        "data": {"columns": {"text": "answer", "label": "question_type"}, "max_length": 64},
    }
    if unit != "record":
        document["data"]["unit"] = unit
    table: dict[str, Any] = {"data": "files", "evaluate_every": 1000, "resources": {"threads": 1}}
    return document | {"simulation": table | {"sites": _few(Study.parse(document), arm.seed, folder)}}


def documents(arm: Arm, folder: Path) -> dict[str, Any]:
    """Return the study of MedQuAD's answers by document: a document answers several questions."""
    return medquad(arm, folder, "document") | {"name": "medquad-documents"}


def ncbi(arm: Arm, folder: Path) -> dict[str, Any]:
    """Return the study of NCBI disease, whose documents are dealt to four sites in turn."""
    sites: dict[str, dict[str, list[str]]] = {}
    for number in range(NCBI_SITES):
        rows = [json.loads(line) for line in (NCBI / "train.jsonl").read_text(encoding="utf-8").splitlines()]
        mine = [row | {"document": str(i // SENTENCES)} for i, row in enumerate(rows) if i // SENTENCES % 4 == number]
        path = folder / f"ncbi-{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in mine), encoding="utf-8")
        sites[f"site-{number}"] = {"train": [str(path)], "test": []}
    lines = (NCBI / "test.jsonl").read_text(encoding="utf-8").splitlines()
    path = folder / "ncbi-test.jsonl"
    path.write_text(
        "".join(json.dumps(json.loads(x) | {"document": str(i // SENTENCES)}) + "\n" for i, x in enumerate(lines)),
        encoding="utf-8",
    )
    sites["site-0"]["test"] = [str(path)]
    document = base(arm, "patient", 200)
    return {
        **document,
        "name": "ncbi-documents",
        "task": {"kind": "token-classification", "labels": ["O", "B-Disease", "I-Disease"]},
        "data": {"columns": {"tokens": "tokens", "tags": "tags"}, "unit": "document", "max_length": 96},
        "simulation": {
            "data": "files", "evaluate_every": 1000, "test_records": 300, "resources": {"threads": 1}, "sites": sites,
        },
    }  # fmt: skip


def _few(study: Study, seed: int, folder: Path) -> dict[str, dict[str, list[str]]]:
    """Write a sample of each site's units, of the same fraction at every site; return the files by site."""
    read = {
        (site, part): load_records(Path(files[part][0]), study, training=False)[0]
        for site, files in medquad_sites().items()
        for part in ("train", "test")
    }
    table: dict[str, dict[str, list[str]]] = {}
    for (site, part), records in read.items():
        every = sum(len(found) for (_, kind), found in read.items() if kind == part)
        most = max(1, round(len(records) * (RECORDS if part == "train" else TESTS) / every))
        units, drawn = records.by_unit(), list[int]()
        names = list(units)
        for place in np.random.default_rng(derive_seed(seed, site, part)).permutation(len(names)):
            if len(drawn) >= most:
                break
            drawn += units[names[place]]
        lines = [
            json.dumps(
                {
                    "answer": records.rows[place]["text"],
                    "question_type": LABELS[records.rows[place]["label"]],
                    "document": records.units[place],
                }
            )
            for place in sorted(drawn)
        ]
        path = folder / f"{site}-{part}-{seed}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        table.setdefault(site, {})[part] = [str(path)]
    return table


SETTINGS = {"notes": notes, "medquad": medquad, "documents": documents, "ncbi": ncbi}


def document_of(arm: Arm, folder: Path, *, quick: bool) -> dict[str, Any]:
    """Return an arm's study with its simulation table."""
    document = SETTINGS[arm.data](arm, folder)
    if quick:
        document["training"]["rounds"] = 4
    for section, values in PARTS[arm.part].items():
        document[section] = {**document[section], **values}
    if "band" in document["privacy"]:
        document["privacy"]["band"] = min(document["privacy"]["band"], document["training"]["rounds"])
    return document


def arms(seeds: range, only: str, *, quick: bool) -> Iterator[Arm]:
    """Yield what is run, seed by seed, so that an interrupted benchmark has whole seeds."""
    for seed in seeds:
        for data in ("notes",) if quick else SETTINGS:
            found = [Arm(data, "as it is", None, seed)]
            parts = [part for part in PARTS if not (quick and part in LONG)]
            found += [Arm(data, part, epsilon, seed) for epsilon in EPSILONS[: 1 if quick else None] for part in parts]
            yield from (arm for arm in found if only in arm.name)


def run_arm(arm: Arm, folder: str, keep: Path | None, quick: bool) -> tuple[Arm, dict[str, Any]]:
    """Run one arm, or take it as it was kept."""
    place = Path(folder) / f"{arm.name}, {arm.seed}".replace(", ", "-").replace(" ", "-")
    place.mkdir()
    document = document_of(arm, place, quick=quick)
    settings = {key: value for key, value in document.items() if key not in ("model", "simulation")}

    def run() -> dict[str, Any]:
        summary: dict[str, Any] = run_simulation(prepare(write(place / "study.toml", document), place / "run"))
        return summary

    return arm, kept(keep, place.name, settings, run)


def score(summary: Mapping[str, Any]) -> float:
    """Return an arm's accuracy, or its entity F1, in percent."""
    found = summary["federated"]
    return 100 * float(found["accuracy"]) if "f1" not in summary else 100 * float(summary["f1"]["federated"])


def cell(scores: list[float]) -> tuple[float, str]:
    """Return the mean of some scores, and the unit with half the width of its 95 % interval if there are several."""
    half = STUDENT.get(len(scores) - 1)
    if half is None:
        return statistics.mean(scores), "%"
    return statistics.mean(scores), f"% +-{half * statistics.stdev(scores) / len(scores) ** 0.5:.1f}"


def checks_of(results: Mapping[Arm, dict[str, Any]], *, quick: bool) -> list[Check]:
    """Return each arm's accuracy or F1, each part's gain over the study as it is, and what is lost with everything."""
    scores: dict[str, list[float]] = {}
    for arm, summary in sorted(results.items(), key=lambda item: (item[0].name, item[0].seed)):
        scores.setdefault(arm.name, []).append(score(summary))
    found = [
        Check(f"{'F1' if name.startswith('ncbi') else 'accuracy'}, {name}", *cell(values), "", None)
        for name, values in scores.items()
    ]
    for data in SETTINGS:
        for epsilon, target in TARGETS.items():
            before = scores.get(Arm(data, "as it is", epsilon, 0).name)
            for part in PARTS:
                after = scores.get(Arm(data, part, epsilon, 0).name)
                if part != "as it is" and before is not None and after is not None and len(before) == len(after):
                    gain = statistics.mean(b - a for a, b in zip(before, after, strict=True))
                    found.append(Check(f"gain, {Arm(data, part, epsilon, 0).name}", gain, "points", "", None))
            clear, whole = (
                scores.get(Arm(data, "as it is", None, 0).name),
                scores.get(Arm(data, "all", epsilon, 0).name),
            )
            if clear is not None and whole is not None:
                lost = statistics.mean(clear) - statistics.mean(whole)
                bound = "" if data == "ncbi" else f"<= {target:g}"
                met = None if quick or not bound else lost <= target
                found.append(Check(f"lost, {data}, {promise(epsilon)}, all", lost, "points", bound, met))
    return found


def main() -> None:
    """Run the arms and print the checks."""
    bench = start("small_consortia", __doc__, seeds=1)
    if not bench.quick:
        require(MEDQUAD)
        require(NCBI)
    chosen = arms(range(bench.seed, bench.seed + bench.seeds), bench.only, quick=bench.quick)
    results: dict[Arm, dict[str, Any]] = {}
    with TemporaryDirectory() as folder, ProcessPoolExecutor(2, get_context("spawn")) as pool:
        running = [pool.submit(run_arm, arm, folder, bench.keep, bench.quick) for arm in chosen]
        for future in as_completed(running):
            arm, summary = future.result()
            results[arm] = summary
            bench.say(f"seed {arm.seed}  {arm.name:<44} {score(summary):.1f} %   {summary['seconds']:.0f} s")
    details = {f"{arm.name}, seed {arm.seed}": json.loads(json.dumps(found)) for arm, found in results.items()}
    bench.finish(checks_of(results, quick=bench.quick), details)


if __name__ == "__main__":
    main()
