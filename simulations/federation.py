"""A simulated federation: where its data comes from, and the site files that the workers read.

The `[simulation]` table of a study file says what is simulated. It is no part of the study.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, model_validator

from privet.client.logbook import create_witness
from privet.client.site import load_site, simulated_identity, simulated_witness_key
from privet.common.checkpoint import least_quorum
from privet.common.errors import StudyError
from privet.common.keyfile import public_key
from privet.common.noise import derive_key
from privet.common.note import COSIGNATURE, NoteKey
from privet.common.resources import Resources
from privet.common.statements import Floor, Genesis, Join, Member
from privet.common.study import Name, Section, Study, read_toml, validate
from privet.server.app import LOG
from privet.server.journal import POLICY, Keys, create_journal, write_keys
from privet.simulations.notes import HOSPITALS, generate_notes, write_site

_MOST_WITNESSES = 15

Baseline = Literal["local", "pooled"]


class SiteFiles(Section):
    """One site's files, relative to the study file."""

    train: Annotated[tuple[Path, ...], Field(min_length=1)]
    test: tuple[Path, ...] = ()


class Simulation(Section):
    """The `[simulation]` table."""

    data: Literal["notes", "files"] = "notes"
    """notes: generated triage notes of four hospitals. files: the files under `sites`."""
    sites: dict[Name, SiteFiles] = Field(default={})
    """For data = "files": each site's files."""
    baselines: tuple[Baseline, ...] = ()
    """What to train beside the federation: each site alone (`local`), all data in one place (`pooled`)."""
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    """Rounds between two evaluations on the all-site test."""
    test_records: Annotated[int, Field(ge=1)] | None = None
    """Test records per site used in those evaluations; the final one uses all. None: all."""
    answers: Annotated[int, Field(ge=0)] = 0
    """For causal-lm: greedy answers per site that the final evaluation scores with ROUGE-L and BLEU."""
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _source(self) -> Simulation:
        if (self.data == "files") != bool(self.sites):
            raise ValueError('sites: goes with data = "files", and data = "files" needs it')
        return self


@dataclass(frozen=True)
class Plan:
    """A study file read for simulation: the study, what to simulate, and where relative paths start."""

    study: Study
    simulation: Simulation
    root: Path


def load_plan(path: Path) -> Plan:
    """Read a study file with its `[simulation]` table.

    Raises:
        StudyError: The file is missing, or a part of it is not valid.
    """
    document = read_toml(path, what="study")
    simulation = validate(Simulation, document.get("simulation", {}), what="simulation table")
    return Plan(Study.parse(document), simulation, path.resolve().parent)


def write_federation(plan: Plan, directory: Path) -> list[Path]:
    """Write one site file per site into `directory`/sites, generating data where asked, in name order.

    Raises:
        StudyError: A named data file does not exist.
    """
    sites = directory / "sites"
    sites.mkdir(parents=True)
    files = _generate(plan, directory / "data") if plan.simulation.data == "notes" else _existing(plan)
    peers = {name: public_key(simulated_identity(plan.study.seed, name)) for name in sorted(files)}
    speaker = write_log(directory, plan.study.seed, sorted(files))
    table = ["[log]", f'policy = "../{LOG}/{POLICY}"', f"coordinator = {json.dumps(speaker)}"]
    written = []
    for name in peers:
        path = write_site_file(sites / f"{name}.toml", name, files[name], plan, peers)
        with path.open("a", encoding="utf-8") as file:
            file.write("\n".join([*table, f'state = "../witnesses/{name}"']) + "\n")
        site = load_site(path)
        create_witness(site)
        written.append(path)
    return written


def write_log(directory: Path, seed: int, names: Sequence[str]) -> str:
    """Create the round log of a simulated consortium; return the key of its coordinator's statements.

    A checkpoint has room for 99 cosignatures, so in a large simulation some sites witness for all.
    """
    log = directory / LOG
    own, speaker = (Ed25519PrivateKey.from_private_bytes(derive_key(seed, "log", n)) for n in ("log", "coordinator"))
    keys = Keys(f"privet.simulation/{seed}", own, speaker, ec.generate_private_key(ec.SECP256R1()))
    members = [simulated_member(seed, name, witnesses=index < _MOST_WITNESSES) for index, name in enumerate(names)]
    witnesses = members[:_MOST_WITNESSES]
    now = int(time.time())
    genesis = Genesis(
        time=now,
        consortium="simulation",
        log=keys.public.text,
        coordinator=public_key(keys.coordinator),
        members=tuple(witnesses),
        quorum=least_quorum(len(witnesses), 0),
        floor=Floor(),
    )
    joins = [Join(time=now, member=member, quorum=genesis.quorum) for member in members[_MOST_WITNESSES:]]
    create_journal(log, keys, [genesis, *joins])
    write_keys(log, keys)
    return genesis.coordinator


def simulated_member(seed: int, name: str, *, witnesses: bool) -> Member:
    """Return a simulated site as the log knows it."""
    key = public_key(simulated_identity(seed, name))
    cosigning = NoteKey(name, COSIGNATURE, bytes.fromhex(public_key(simulated_witness_key(seed, name))))
    return Member(site=name, key=key, witness=cosigning.text if witnesses else None)


def site_files(directory: Path) -> list[Path]:
    """Return the site files that `write_federation` wrote, in name order."""
    return sorted((directory / "sites").glob("*.toml"))


def _generate(plan: Plan, directory: Path) -> dict[str, SiteFiles]:
    files = {}
    for number, hospital in enumerate(HOSPITALS):
        suffix = (".csv", ".jsonl", ".parquet")[number % 3]
        (directory / hospital.name).mkdir(parents=True)
        paths: dict[str, Path] = {}
        for part in ("train", "test"):
            paths[part] = directory / hospital.name / f"{part}{suffix}"
            write_site(generate_notes(hospital, seed=plan.study.seed, part=part), paths[part])
        files[hospital.name] = SiteFiles(train=(paths["train"],), test=(paths["test"],))
    return files


def _existing(plan: Plan) -> Mapping[str, SiteFiles]:
    for name, entry in plan.simulation.sites.items():
        for path in (*entry.train, *entry.test):
            if not (plan.root / path).is_file():
                raise StudyError(f"simulation.sites.{name}: no file {plan.root / path}", "check the path")
    return plan.simulation.sites


def write_site_file(
    path: Path, name: str, files: SiteFiles, plan: Plan, peers: Mapping[str, str] | None = None
) -> Path:
    """Write a simulated site's configuration, reproducible by the study's seed.

    Generated data lies in the run directory and is named relative to it, so that the directory can move.
    """
    run = path.parent.parent
    lines = [f"name = {json.dumps(name)}", f"reproducible_seed = {plan.study.seed}"]
    for key, paths in (("train", files.train), ("test", files.test)):
        whole = [(plan.root / file).resolve() for file in paths]
        named = [os.path.relpath(p, path.parent.resolve()) if p.is_relative_to(run.resolve()) else p for p in whole]
        lines.append(f"{key} = {json.dumps([str(p) for p in named])}")
    if peers:
        lines += ["[peers]", *(f"{peer} = {json.dumps(key)}" for peer, key in peers.items())]
    lines.append("[resources]")
    lines += [f"{k} = {json.dumps(v)}" for k, v in plan.simulation.resources.model_dump(exclude_none=True).items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_pooled_site(files_of_sites: Sequence[Path], path: Path, plan: Plan) -> Path:
    """Write the configuration of one site that holds the data of all: the pooled baseline."""
    sites = [load_site(file) for file in files_of_sites]
    files = SiteFiles(
        train=tuple(p for site in sites for p in site.train),
        test=tuple(p for site in sites for p in site.test),
    )
    written = write_site_file(path, "pooled", files, plan)
    text = written.read_text(encoding="utf-8")
    written.write_text("distinct_files = true\n" + text, encoding="utf-8")
    return written
