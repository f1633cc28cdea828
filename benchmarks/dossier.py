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
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from arms import simulation
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from harness import ROOT, Bench, Check, start
from studies import MEDQUAD, medquad_sites, require, write
from utility import study as small

from privet.common.log.tiles import read_leaves
from privet.common.privacy.accounting import SAMPLER_DELTA, PrivacyEvent, epsilon, replacing_epsilon
from privet.server.rounds.archive import published_log
from privet.simulations.dossier.bom import MLBOM, SBOM
from privet.simulations.dossier.folder import WHOLE
from privet.simulations.runs.simulate import prepare, run_simulation

ROUNDS = 6
SITE = "cdc"
"""Any site: all are asked into all rounds."""
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

    def events(self, count: int) -> list[list[PrivacyEvent]]:
        """Return the same as events of privet."""
        return [[PrivacyEvent(z, q, steps, "record") for z, q, steps in side] for side in self.sides(count)]

    def everywhere(self, count: int) -> float:
        """Return the epsilon of a unit that is in the files of every site: it may pay for both sides at each."""
        return self.composed([each for side in self.sides(count) for each in side])

    def corrupt(self) -> int:
        """Return how many sites of the first round may help the coordinator."""
        terms = self.study["secure_aggregation"]
        sites = len(self.all("round-open")[0]["cohort"])
        return max(int(terms["corrupt"]), math.floor((terms.get("corrupt_fraction") or 0) * sites))

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

    def computed(self, keys: frozenset[str], text: str, section: str) -> dict[str, float] | None:
        """Return the figures of a sentence, computed anew; None for a sentence that is not known here."""
        terms, study, end = self.opened["privacy"], self.study, self.all("round-close")[-1]
        count = len(self.all("round-open"))
        site = next((word for word in text.replace(":", "").split(" ")[:2] if word in end["survivors"]), section)
        spent = max(self.epsilon(self.rounds(each)) for each in end["survivors"])
        kind = terms["validation" if text.startswith("Validation") else "training"]
        sums = [each for each in self.all("round-close") if site in each["survivors"]]
        stated = [each for each in self.all("site-round") if each["site"] == site]
        delta = {"delta": terms["delta"]}
        known: dict[frozenset[str], dict[str, Any]] = {
            frozenset(each): each
            for each in (
                {"leaves": self.size},
                {"round": end["round"]},
                {"signatures": study["gate"]["signatures"]},
                {name: value for name, value in self.opened["gate"].items() if isinstance(value, int | float)},
                {"rounds": study["training"]["rounds"], "steps": study["training"]["local_steps"]}
                | {"sampling_rate": study["training"]["sampling_rate"]},
                {"files": len(study["model"]["sha256"])},
                delta | {"promised": terms["epsilon"]},
                {"spent": spent},
                delta | {"factor": math.exp(spent)},
                {"rank": study["lora"]["rank"]},
                {"factor": math.exp(spent)},
                {"sure": 1 / (1 + math.exp(-spent))},
                {"units": 2, "units_epsilon": 2 * spent, "units_delta": terms["delta"] * (1 + math.exp(spent))}
                | {"vacuous": vacuous(spent, terms["delta"])},
                {
                    "needed": study["gate"]["signatures"],
                    "sites": len({each["site"] for each in self.all("site-round")}),
                },
                {"sites": len({each["site"] for each in self.all("site-round")})},
                {"asked": len(self.all("round-open")[0]["cohort"]), "corrupt": self.corrupt()},
                {"max_length": study["data"]["max_length"]},
                {"round": end["round"], **end["metrics"]},
                {"rounds": self.opened["rounds"], "closed": len(self.all("round-close"))}
                | {"aborted": len(self.all("round-abort"))}
                | {"sites": len({name for each in self.all("round-close") for name in each["survivors"]})},
                {"policies": len({each["policy"] for each in self.all("site-round")})}
                | {"sites": len({each["site"] for each in self.all("site-round")})},
                {"refusals": len(self.all("refusal"))},
                {"rounds": self.rounds(site), "epsilon": self.epsilon(count)},
                {"epsilon_rdp": self.epsilon(count, "rdp")},
                {"at_every_site": self.everywhere(count * len(end["survivors"]))},
                delta | {"replacing": replacing_epsilon(self.events(count), terms["delta"])},
                {name: kind[name] for name in ("noise_multiplier", "sampling_rate", "steps")},
                {"clip_norm": terms["clip_norm"]},
                delta
                | {"computed": self.epsilon(len(stated)), "stated": stated[-1]["charge"]["epsilon"] if stated else 0.0},
                delta
                | {"asked": self.rounds(site), "stated": len(stated), "summed": len(sums)}
                | {"epsilon": stated[-1]["charge"]["epsilon"] if stated else 0.0},
                {"opened": count, "stated": len(self.all("site-round")), "closed": len(self.all("round-close"))},
                {"updates": len(stated)},
                {"within": float(all(day(each) <= PURPOSE["permit"]["expires"] for each in self.all("round-open")))},
            )
        }
        return known.get(keys)


def vacuous(spent: float, delta: float) -> int:
    """Return from how many units on group privacy has a delta of 1 or more, summed term by term."""
    size, total = 1, delta
    while total < 1:
        total += delta * math.exp(size * spent)
        size += 1
    return size


def day(statement: Mapping[str, Any]) -> str:
    """Return the day of a statement."""
    return datetime.fromtimestamp(statement["time"], UTC).strftime("%Y-%m-%d")


# --- the dossier, as a reader has it ----------------------------------------------------------------------------------

QUOTED = re.compile(
    r"“[^”]*”|`[^`]*`|sha256:[0-9a-f]{64}|[0-9]{4}-[0-9]{2}-[0-9]{2}(?: [0-9:]{8} UTC)?|privet [0-9.]+|"
    r"[A-Za-z_-]+[0-9][\w.-]*"
)
"""Others' words, commands, digests, days and names, whose digits are no figures."""
NUMBER = re.compile(r"\d+(?:\.\d+)?")
FIXED: Mapping[str, tuple[str, ...]] = {
    "The closer the factor is to 1,": ("1",),
    "where 0.5 is guessing": ("0.5",),
    "each for ": (),
    "lattice of 2^-40 deviations": ("2", "40"),
    "AES-256-CTR": ("256",),
    "18 kinds of identifiers": ("18",),
    "who thought it 50 : 50": ("50",),
    "0.5 is guessing, 1 is always right": ("0.5", "1"),
    "Articles 13 and 14": ("13", "14"),
    "Articles 15 to 22": ("15", "22"),
    "Articles 26 and 28": ("26", "28"),
    "Articles 33 and 34": ("33", "34"),
}
"""Parts of sentences that privet's documentation says, with the numbers in them."""
LAW = re.compile(r"(?:Article|Articles|CFR|Regulation \(EU\)|Opinion|SP) [\d./()a-zA-Z-]+|\d+\.\d+\([a-z0-9()]+\)")


def sentences(document: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each sentence of a dossier with the title of its section."""
    for each in (document["first"], *document["documents"]):
        for section in each["sections"]:
            yield from ((section["title"], said) for said in section["sentences"])


def wrong_figures(document: Mapping[str, Any], log: Log) -> tuple[int, list[str]]:
    """Return how many figures there are, and the sentences of which one is not the one that follows from the log."""
    count, wrong = 0, []
    for section, said in sentences(document):
        figures = said.get("figures", {})
        count += len(figures)
        if not figures:
            continue
        right = log.computed(frozenset(figures), said["text"], section)
        same = right is not None and all(math.isclose(figures[name], right[name], rel_tol=1e-9) for name in figures)
        if not same or any(not shown(value, said["text"]) for name, value in figures.items() if name != "within"):
            wrong.append(said["text"])
    return count, wrong


def shown(value: float, text: str) -> bool:
    """Return whether a sentence shows a figure, rounded up or to the nearest, as a number, per cent or power."""
    if value == 0 and "none" in text:
        return True
    for number in NUMBER.findall(QUOTED.sub("", text)):
        places = len(number.partition(".")[2])
        if any(abs(float(number) - each) < 10.0**-places * (1 + 1e-9) for each in (value, 100 * value)):
            return True
    return False


def loose_numbers(document: Mapping[str, Any]) -> list[str]:
    """Return the sentences with a number that is neither a figure nor part of a fixed sentence."""
    found = []
    for _, said in sentences(document):
        text = said["text"]
        fixed = [number for part, numbers in FIXED.items() if part in text for number in numbers]
        plain = LAW.sub("", QUOTED.sub("", text))
        values = [float(value) for value in said.get("figures", {}).values() if value is not None]
        for number in NUMBER.findall(plain):
            if number not in fixed and not any(shown(value, f" {number} ") for value in values):
                found.append(f"{number}: {text}")
    return found


class Links(HTMLParser):
    """The links and the ids of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what a link leads to, and the id of an element."""
        for name, value in attrs:
            if name == "href":
                self.targets.append(value or "")
            if name == "id":
                self.ids.add(value or "")


def links(folder: Path) -> tuple[int, list[str]]:
    """Return how many links the pages have, and those that lead nowhere."""
    pages = {file.name: Links(file.read_text(encoding="utf-8")) for file in folder.glob("*.html")}
    dead = []
    for name, page in pages.items():
        for target in page.targets:
            file, _, anchor = target.partition("#")
            there = (folder / (file or name)).is_file() and (not anchor or anchor in pages[file or name].ids)
            dead += [] if there else [f"{name}: {target}"]
    return sum(len(page.targets) for page in pages.values()), dead


def claims(document: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Return how many sections of the documentation are cited, and those that it has not."""
    cited = {
        (source["page"], source["anchor"])
        for _, said in sentences(document)
        for source in said["sources"]
        if source["kind"] == "claim"
    }
    lost = []
    for page, anchor in sorted(cited):
        headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        slugs = {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", each.lower()).strip()) for each in headings}
        lost += [] if anchor in slugs else [f"{page}#{anchor}"]
    return len(cited), lost


def invalid_bills(folder: Path) -> list[str]:
    """Return the bills of materials that the schema of CycloneDX 1.6 does not admit."""
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    return [bill for bill in (SBOM, MLBOM) if validator.validate_str((folder / bill).read_text()) is not None]


def main() -> None:
    """Run the study, write its dossier with the command, and check what a reader has."""
    bench = start("dossier", __doc__)
    require(MEDQUAD)
    with TemporaryDirectory() as place:
        run, out = simulate(bench, Path(place)), Path(place) / "dossier"
        began = time.perf_counter()
        command = [sys.executable, "-P", "-c", "from privet.common.cli import main; main()", "dossier", str(run)]
        subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
        seconds = time.perf_counter() - began
        document, log = json.loads((out / WHOLE).read_bytes()), Log(run)
        checks, details = examined(document, out, log)
    checks.append(Check("dossier: the command", seconds, "s", "", None))
    for name, wrong in details["wrong"].items():
        for each in wrong:
            bench.say(f"{name}: {each}")
    bench.finish(checks, details)


def examined(document: Mapping[str, Any], out: Path, log: Log) -> tuple[list[Check], dict[str, Any]]:
    """Return the checks of a dossier, and what they found."""
    said = [each for _, each in sentences(document)]
    bare = [each["text"] for each in said if not each["sources"]]
    gaps = [source for each in said for source in each["sources"] if source["kind"] == "gap"]
    figures, wrong = wrong_figures(document, log)
    targets, dead = links(out)
    sections, lost = claims(document)
    ours, theirs = (max(log.composed(side, each) for side in log.sides(log.rounds(SITE))) for each in ("prv", "google"))
    apart = abs(ours - theirs) / theirs
    found = {
        "without a source": bare, "figure": wrong, "number": loose_numbers(document), "link": dead, "section": lost,
        "bill": invalid_bills(out),
    }  # fmt: skip

    def none(name: str, key: str) -> Check:
        return Check(name, len(found[key]), "", "= 0", not found[key])

    return [
        Check("dossier: sentences", len(said), "", "", None),
        none("dossier: sentences without a source", "without a source"),
        Check("dossier: gaps that are named", len(gaps), "", "", None),
        Check("dossier: different gaps", len({(each["who"], each["what"]) for each in gaps}), "", "", None),
        Check("dossier: figures", figures, "", "", None),
        none("dossier: figures unlike those of the log", "figure"),
        none("dossier: numbers in sentences that are no figure", "number"),
        Check("dossier: epsilon, privet against dp-accounting", 100 * apart, "%", "<= 1", apart <= 0.01),
        Check("dossier: links in pages", targets, "", "", None),
        none("dossier: links that lead nowhere", "link"),
        Check("dossier: cited sections of the documentation", sections, "", "", None),
        none("dossier: cited sections that are not there", "section"),
        none("dossier: bills that CycloneDX 1.6 refuses", "bill"),
    ], {"wrong": found, "documents": [each["name"] for each in document["documents"]], "leaves": log.size}


if __name__ == "__main__":
    main()
