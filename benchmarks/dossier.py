"""The dossier of a study over MedQuAD's nine institutions: its sources, its links, its bills, and every figure in it.

The study is the one of `utility.py` at epsilon 8, with six rounds, a purpose, a permit, terms and a gate, so that every
document has something to say. It is simulated: nothing is signed, and the dossier says so.

Every sentence is read from `dossier.json`, as another program reads it. Each figure is computed anew from the leaves of
the log, and epsilons by Google's dp-accounting, which is not the accountant that wrote them. A figure that this program
does not know how to compute counts as wrong.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from arms import simulation
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from harness import Bench
from studies import medquad_sites, write
from utility import study as small

from privet.common.log.tiles import read_leaves
from privet.common.privacy.accounting import SAMPLER_DELTA, PrivacyEvent, epsilon
from privet.server.rounds.archive import published_log
from privet.simulations.runs.simulate import prepare, run_simulation

ROUNDS = 6
PURPOSE: dict[str, Any] = {
    "text": "Sort answers about health by the kind of question that they answer, so that a help desk finds the right "
    "leaflet.",
    "legal_basis": "Example: Article 6(1)(e) and Article 9(2)(j) GDPR, research in the public interest. The texts of "
    "MedQuAD are public.",
    "contacts": [
        "Controller: Nine Institutions Research Group, office@controller.example",
        "Data protection officer: Dr. A. Example, dpo@controller.example, +00 30 5550 0100",
    ],
    "permit": {
        "number": "EXAMPLE-2026-0042",
        "purpose": "Research that improves information for patients",
        "expires": "2036-12-31",
    },
}
RELEASE = {"to": "participants", "purpose": "help desks of the nine institutions", "until": "2036-12-31"}
GATE = {"signatures": 5, "canaries": 400, "membership": 0.6, "metric": "validation_accuracy", "least": 0.2}


def study(seed: int, rounds: int) -> dict[str, Any]:
    """Return the study as plain values, without its simulation table."""
    document = small(("ffa", "record", 8.0, seed), rounds)
    document["name"] = "medquad-dossier"
    document["data"]["validation_fraction"] = 0.1
    return document | {"purpose": PURPOSE, "release": RELEASE, "gate": GATE}


def simulate(bench: Bench, folder: Path) -> Path:
    """Run the study and return the run's directory."""
    rounds = 2 if bench.quick else ROUNDS
    document = study(bench.seed, rounds) | simulation(medquad_sites(bench.quick))
    run_simulation(prepare(write(folder / "study.toml", document), folder / "run"))
    return folder / "run"


# --- what the log says, read without the code that wrote the dossier --------------------------------------------------


class Log:
    """The statements of a log, as plain JSON values.

    Attributes:
        size: Number of leaves.
        told: The statements about the run, in order.
        study: The run's study, as plain values.
    """

    def __init__(self, run: Path) -> None:
        public = published_log(run)
        self.size = int((public / "checkpoint").read_text().split("\n")[1])
        leaves = read_leaves(self.size, lambda name: (public / name).read_bytes())
        self.told = [json.loads(base64.b64decode(json.loads(leaf)["payload"]))["predicate"] for leaf in leaves]
        self.study: dict[str, Any] = json.loads((run / "study.json").read_bytes())

    def all(self, kind: str) -> list[dict[str, Any]]:
        """Return the statements of a type, in order."""
        return [each for each in self.told if each["type"] == kind]

    @property
    def opened(self) -> dict[str, Any]:
        """The statement that opened the run."""
        return self.all("run-open")[-1]

    def rounds(self, site: str) -> int:
        """Return in how many rounds a site was asked."""
        return sum(site in each["cohort"] for each in self.all("round-open"))

    def sides(self, count: int) -> list[list[tuple[float, float, int]]]:
        """Return noise multiplier, sampling rate and steps of the rounds of a site, by what one unit pays for."""
        terms = self.opened["privacy"]
        kinds = [terms["training"], *([terms["validation"]] if terms["validation"] else [])]
        return [[(each["noise_multiplier"], each["sampling_rate"], each["steps"] * count)] for each in kinds]

    def epsilon(self, count: int, accountant: Any = "prv") -> float:
        """Return the epsilon of a site that was asked into some rounds."""
        return max(self.composed(side, accountant) for side in self.sides(count))

    def composed(self, history: list[tuple[float, float, int]], accountant: Any = "prv") -> float:
        """Return the epsilon of mechanisms together."""
        delta = self.opened["privacy"]["delta"]
        if accountant == "google":
            found = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-4)
            for z, q, steps in history:
                gaussian = GaussianDpEvent(z)
                found.compose(gaussian if q == 1 else PoissonSampledDpEvent(q, gaussian), steps)
            return float(found.get_epsilon(delta - SAMPLER_DELTA))
        return epsilon([PrivacyEvent(z, q, steps, "record") for z, q, steps in history], delta, accountant)
