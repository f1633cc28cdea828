"""A simulated federation: its data, and the site files that the workers read.

The `[simulation]` table of a study file describes the simulation. It is not part of the study.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, model_validator

from privet.client.bases.names import kept_bases, on_this_machine
from privet.client.formats import FileFormat, FormatSection, Formatted
from privet.client.site import IdRule, Resources
from privet.client.training.data import load_records
from privet.common.errors import DataError, PrivetError, StudyError, together
from privet.common.log.checkpoint import least_quorum
from privet.common.log.note import COSIGNATURE, NoteKey
from privet.common.log.statements import Genesis, Join, Member, StatedFloor
from privet.common.pki.keyfile import public_key
from privet.common.privacy.noise import derive_key
from privet.common.study.reading import read_toml, validate
from privet.common.study.sections import Name, Section
from privet.common.study.study import Study
from privet.server.app import LOG
from privet.server.log.journal import create_journal
from privet.server.log.keys import POLICY, Keys, write_keys
from privet.simulations.data.clinical_notes import generate_notes, scaled_hospitals, write_site
from privet.simulations.data.pool import (
    PARTS,
    deal_out,
    hold_out,
    read_files,
    read_pool,
    require_file,
    rows_of,
    wanted_columns,
    write_rows,
)
from privet.simulations.data.scenario import Faults, Malicious, Network, Partition, complaints
from privet.simulations.engines.memory import load_sites
from privet.simulations.sites import simulated_identity, simulated_witness_key

_MOST_WITNESSES = 15
_LISTED = 20  # sites

Baseline = Literal["local", "pooled", "personal"]


class SiteFiles(Formatted):
    """One site's files, relative to the study file."""

    train: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Training files."""
    test: tuple[Path, ...] = ()
    """Test files. Without them: see `test_fraction`."""


class Simulation(Section):
    """What simulations need. It is no part of the study: real sites ignore it."""

    data: Literal["notes", "files"] | None = None
    """Needed to simulate. notes: generated triage notes of four hospitals. files: the files under `sites` or
    `partition`."""
    patients: Annotated[int, Field(ge=40, le=100_000)] | None = None
    """For data = "notes" without `partition`: number of patients of the four hospitals together, each with 2.2 training
    notes on average. Without it: 1120."""
    sites: dict[Name, SiteFiles] = Field(default={})
    """For data = "files": each site's files, unless `partition` pools them."""
    partition: Partition | None = None
    """Pool the records and distribute them to sites. Without it: the four hospitals, or the files of each site."""
    patient_ids: IdRule | None = None
    """How the ids in the study's `data.unit` are written, at all sites: number, text or case. Without it, files with
    two spellings that may be one patient are refused, as by a real site."""
    network: Network | None = None
    """Connections and machines of the sites, for the virtual clock. Without it: the defaults if faults need one."""
    faults: Faults | None = None
    """Faults of honest sites."""
    malicious: tuple[Malicious, ...] = ()
    """Sites that do not follow the study."""
    curious: bool = False
    """Store what the coordinator receives from each site, under `view/` in the run directory."""
    activations_mb: Annotated[int, Field(ge=0)] = 1024
    """Memory in MB for the outputs of frozen layers, if dropout is off and `lora.layers` leaves any; 0: no cache."""
    baselines: tuple[Baseline, ...] = ()
    """Baselines to train besides the federation: each site alone (`local`) and all data in one place (`pooled`), both
    under the privacy of the study; and each site on its own from the federated adapter (`personal`), which has no
    privacy. That is allowed because a personal adapter never leaves its site: privacy is owed for what others see."""
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    """Number of rounds between two evaluations on the test records of all sites."""
    test_fraction: Annotated[float | None, Field(gt=0, le=0.5, exclude_if=lambda value: value is None)] = None
    """Fraction of the units that is held out for the test where no test file is named: of each site, or of the pool of
    `partition`. The study's seed decides which units. Without it, test files are needed."""
    test_records: Annotated[int, Field(ge=1)] | None = None
    """Test records per site in these evaluations. The final evaluation uses all. Without it: all."""
    answers: Annotated[int, Field(ge=0)] = 0
    """For causal-lm and preference: number of greedy answers per site that the final evaluation scores with ROUGE-L and
    BLEU."""
    resources: Resources = Resources()
    """The machine that simulates."""

    @model_validator(mode="after")
    def _trains_inside(self) -> Simulation:
        if self.resources.trainer != "inside":
            raise ValueError('resources.trainer: expected "inside", as simulated sites train in one process')
        return self

    @model_validator(mode="after")
    def _source(self) -> Simulation:
        if self.patients is not None and (self.data != "notes" or self.partition is not None):
            raise ValueError('patients: needs data = "notes" without `partition`, which has a field of that name')
        pooled = self.partition is not None and bool(self.partition.train)
        if self.sites and self.partition is not None:
            raise ValueError(
                "sites: the table cannot be combined with `partition`, which creates its own sites; remove one of them"
            )
        if self.data is None and (self.sites or pooled):
            raise ValueError('data: set data = "files", as the table names files')
        if (self.data == "files") != (bool(self.sites) or pooled):
            raise ValueError(
                'sites, partition.train: with data = "files", give exactly one of them; with other data, give neither'
            )
        if self.partition is not None and self.partition.test and not pooled:
            raise ValueError("partition.test: give `partition.train`, too, or leave `partition.test` out")
        return self

    @property
    def hostile(self) -> bool:
        """Whether sites may drop out or act maliciously, so that an early end of the federation is a valid result."""
        return self.faults is not None or bool(self.malicious)


@dataclass(frozen=True)
class Plan:
    """A study file read for simulation.

    Attributes:
        study: The study. Its base has a name, and every file of the base is pinned.
        simulation: Its simulation, with the directory of the base if the file gives one.
        root: The directory of relative paths.
        added: Names of the base's files that the study file does not pin.
    """

    study: Study
    simulation: Simulation
    root: Path
    added: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return what was added to the study when it was read, in words."""
        if not self.added:
            return []
        return [
            f"model.sha256: pinned here, as the study file does not: {', '.join(self.added)}. For other machines, "
            "paste the table that `privet base DIRECTORY` prints."
        ]


def load_plan(path: Path) -> Plan:
    """Read a study file with its `[simulation]` table.

    Raises:
        StudyError: The file is missing, or a part of it is not valid.
    """
    return plan_of(read_toml(path, what="study"), path.resolve().parent)


def plan_of(document: dict[str, Any], root: Path) -> Plan:
    """Return the plan of a study file's values, its `[simulation]` table included.

    A base that the file gives as a path gets the directory's name, so that the study does not depend on the machine.
    Files of the base that the study does not pin are pinned as they are here. If the base is not on this machine, the
    study stays as it is, and cannot be opened.

    Raises:
        StudyError: As `load_plan`.
    """
    faults: list[StudyError] = []
    try:
        simulation = validate(Simulation, document.get("simulation", {}), what="simulation table")
    except StudyError as error:
        faults.append(error)
    try:
        study = Study.parse(document)
    except StudyError as error:
        faults.append(error)
    if faults:
        raise together(faults)
    simulation = simulation.model_copy(update={"resources": simulation.resources.within(root)})
    resources = simulation.resources
    model, bases, added = on_this_machine(study.model, root, resources.bases)
    simulation = simulation.model_copy(update={"resources": resources.model_copy(update={"bases": bases})})
    return Plan(study.model_copy(update={"model": model}), simulation, root, added)


def plan_of_run(run: Path, begun: Study) -> Plan:
    """Return the plan of a simulated run, as it was begun.

    Args:
        run: The run directory, with a copy of the study file.
        begun: The run's study. The file may give its base as a path, and may pin fewer files.

    Raises:
        StudyError: As `load_plan`, or the file names another base, or pins other bytes of it.
    """
    document = read_toml(run / "study.toml", what="study")
    wrote = Study.parse(document).model
    pins = begun.model.sha256
    same_name = Path(begun.model.base).name == Path(wrote.base).expanduser().resolve().name
    if same_name and all(pins.get(name) == value for name, value in wrote.sha256.items()):
        document = {**document, "model": begun.model.model_dump(mode="json")}
    # Runs of earlier versions may not say so: without a word on data, those were generated notes.
    table = {"data": "notes", **document.get("simulation", {})}
    simulation = validate(Simulation, table, what="simulation table")
    resources = simulation.resources
    resources = resources.model_copy(update={"bases": {**resources.within(run).bases, **kept_bases(run)}})
    return Plan(Study.parse(document), simulation.model_copy(update={"resources": resources}), run)


def write_federation(plan: Plan, directory: Path, say: Callable[[str], None] = lambda line: None) -> list[Path]:
    """Write one site file per site into `directory`/sites, in name order. Generate data where the plan asks for it.

    Raises:
        StudyError: The plan names no data, a named data file does not exist, or the scenario does not fit these sites.
    """
    files = lay_out(plan, directory, say)
    if faults := faults_of(plan, [file.stem for file in files]):
        raise together(faults)
    return files


def require_data(plan: Plan) -> None:
    """Check that a plan says what its sites train on: no data are invented unasked. Raises `StudyError`."""
    if plan.simulation.data is None:
        raise StudyError(
            "the study: expected simulation.data, which says what the simulated sites train on; found none",
            'make a study from your files with `privet new FILES`; or add the table [simulation] with data = "files" '
            'and a table [simulation.sites.NAME] with the files of each site; data = "notes" trains on generated notes',
        )


def faults_of(plan: Plan, names: Sequence[str]) -> list[StudyError]:
    """Return what is wrong with a plan over sites of these names, their data apart: missing files, and the scenario."""
    faults = []
    for path, where in _named_files(plan):
        try:
            require_file(path, where)
        except StudyError as error:
            faults.append(error)
    if found := complaints(plan.study, plan.simulation.malicious, names):
        faults.append(
            StudyError(
                "the study and its simulated sites do not fit together:\n  " + "\n  ".join(found),
                "correct these fields in the study file",
            )
        )
    return faults


def lay_out(plan: Plan, directory: Path, say: Callable[[str], None]) -> list[Path]:
    """Write the files of `write_federation`, without its checks. The owner alone may read the directory.

    Raises:
        StudyError, DataError: The plan names no data, or records cannot be pooled, dealt out or divided.
    """
    require_data(plan)
    sites, data = directory / "sites", directory / "data"
    sites.mkdir(parents=True)
    directory.chmod(0o700)  # before the first record is written
    if plan.simulation.partition is not None:
        files = _partitioned(plan, plan.simulation.partition, data, say)
    else:
        files = _generate(plan, data) if plan.simulation.data == "notes" else _existing(plan, data, say)
    for path in (data, *data.rglob("*")) if data.is_dir() else ():  # a later chmod of the run must not open the records
        path.chmod(0o700 if path.is_dir() else 0o600)
    names = sorted(files)
    speaker = write_log(directory, plan.study.seed, names)
    return [write_site_file(sites / f"{name}.toml", name, files[name], plan, speaker) for name in names]


def write_log(directory: Path, seed: int, names: Sequence[str]) -> str:
    """Create the round log of a simulated consortium. Return the public key of its coordinator's statements.

    A checkpoint can hold 99 cosignatures, so in a large simulation only some of the sites are witnesses.
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
        floor=StatedFloor(),
    )
    joins = [Join(time=now, member=member, quorum=genesis.quorum) for member in members[_MOST_WITNESSES:]]
    create_journal(log, keys, [genesis, *joins])
    write_keys(log, keys)
    return genesis.coordinator


def simulated_member(seed: int, name: str, *, witnesses: bool) -> Member:
    """Return the member that a simulated site is in the log."""
    key = public_key(simulated_identity(seed, name))
    cosigning = NoteKey(name, COSIGNATURE, bytes.fromhex(public_key(simulated_witness_key(seed, name))))
    return Member(site=name, key=key, witness=cosigning.text if witnesses else None)


def site_files(directory: Path) -> list[Path]:
    """Return the site files that `write_federation` wrote, in name order."""
    return sorted((directory / "sites").glob("*.toml"))


def _generate(plan: Plan, directory: Path) -> dict[str, SiteFiles]:
    files = {}
    for number, hospital in enumerate(scaled_hospitals(plan.simulation.patients)):
        suffix = (".csv", ".jsonl", ".parquet")[number % 3]
        (directory / hospital.name).mkdir(parents=True)
        paths: dict[str, Path] = {}
        for part in ("train", "test"):
            paths[part] = directory / hospital.name / f"{part}{suffix}"
            write_site(generate_notes(hospital, seed=plan.study.seed, part=part), paths[part])
        files[hospital.name] = SiteFiles(train=(paths["train"],), test=(paths["test"],))
    return files


def _partitioned(plan: Plan, section: Partition, directory: Path, say: Callable[[str], None]) -> dict[str, SiteFiles]:
    """Pool the records, distribute them, and write each site's part."""
    section = section.within(plan.root)
    check_pool(plan, section)
    pools = [read_pool(plan.study, section, plan.simulation.data, plan.root, part) for part in PARTS]
    fraction = plan.simulation.test_fraction
    if fraction is not None and not pools[1]:
        rows = rows_of(pools[0])
        pools = list(hold_out(plan.study, pools[0], fraction, plan.simulation.patient_ids))
        say(f"rows held out for the test (test_fraction = {fraction:g}): {rows_of(pools[1])} of {rows}")
    parts = deal_out(plan.study, section, pools[0], pools[1], say, plan.simulation.patient_ids)
    directory.mkdir()
    files = {}
    for name, places in parts.items():
        train, test = (
            write_rows(directory / f"{name}-{part}.jsonl", pool, chosen)
            for part, pool, chosen in zip(PARTS, pools, places, strict=True)
        )
        files[name] = SiteFiles(train=train, test=test)
    return files


def check_pool(plan: Plan, section: Partition) -> None:
    """Check the records of the files that are pooled: what is wrong is told of these files, not of the sites' parts.

    Raises:
        StudyError: A file is missing.
        DataError: A file does not fit the study.
    """
    faults = []
    for training, paths in ((True, section.train), (False, section.test)):
        for path in paths:
            require_file(path, "simulation.partition")
            rule, form = plan.simulation.patient_ids, section.form_of(path)
            try:
                load_records(path, plan.study, training=training, rule=rule, form=form)
            except DataError as error:
                faults.append(error)
    if faults:
        raise together(faults)


def _existing(plan: Plan, directory: Path, say: Callable[[str], None]) -> dict[str, SiteFiles]:
    """Return each site's files. A site without a test file gets two new ones, where the plan holds records out.

    A site whose files cannot be read keeps them: `faults_of` and whoever loads them say what is wrong.
    """
    simulation, fraction = plan.simulation, plan.simulation.test_fraction
    files, held = dict(simulation.sites), []
    for name, entry in simulation.sites.items():
        if entry.test or fraction is None:
            continue
        own = entry.within(plan.root)
        named = [(path, own.form_of(path)) for path in own.train]
        try:
            for path, form in named:  # what is wrong is told of this file, not of its copies
                load_records(path, plan.study, rule=simulation.patient_ids, form=form)
            table = read_files(plan.study, named, wanted_columns(plan.study), f"simulation.sites.{name}")
        except PrivetError:
            continue
        pools = hold_out(plan.study, table, fraction, simulation.patient_ids)
        held.append(f"{name} {rows_of(pools[1])} of {rows_of(table)}")
        directory.mkdir(exist_ok=True)
        train, test = (
            write_rows(directory / f"{name}-{part}.jsonl", pool, range(rows_of(pool)))
            for part, pool in zip(PARTS, pools, strict=True)
        )
        files[name] = SiteFiles(train=train, test=test)
    if held:
        more = f" and {len(held) - _LISTED} other sites" if len(held) > _LISTED else ""
        say(f"rows held out for the test (test_fraction = {fraction:g}): {', '.join(held[:_LISTED])}{more}")
    return files


def _named_files(plan: Plan) -> list[tuple[Path, str]]:
    """Return the files of the sites that a plan names, and where it names them."""
    return [
        (plan.root / path, f"simulation.sites.{name}")
        for name, entry in plan.simulation.sites.items()
        for path in (*entry.train, *entry.test)
    ]


def check_files(plan: Plan) -> None:
    """Check that a plan says what its sites train on, and that all its files exist. Raises `StudyError`."""
    require_data(plan)
    for path, where in _named_files(plan):
        require_file(path, where)
    section = plan.simulation.partition
    for path in () if section is None else (*section.train, *section.test):
        require_file(plan.root / path, "simulation.partition")


def write_site_file(path: Path, name: str, files: SiteFiles, plan: Plan, speaker: str | None = None) -> Path:
    """Write a simulated site's configuration, reproducible by the study's seed.

    With a coordinator's key, the site witnesses the round log of the directory.

    Generated data is in the run directory and has relative paths, so that the directory can be moved.
    """
    here, run = path.parent.resolve(), path.parent.parent.resolve()
    lines = [f"name = {json.dumps(name)}", f"reproducible_seed = {plan.study.seed}"]
    for key, paths in (("train", files.train), ("test", files.test)):
        whole = [(plan.root / file).resolve() for file in paths]
        named = [os.path.relpath(p, here) if p.is_relative_to(run) else p for p in whole]
        lines.append(f"{key} = {json.dumps([str(p) for p in named])}")
    if plan.simulation.patient_ids is not None:
        lines.append(f"patient_ids = {json.dumps(plan.simulation.patient_ids)}")
    resources = plan.simulation.resources
    lines.append("[resources]")
    lines += [f"{k} = {json.dumps(v)}" for k, v in resources.model_dump(exclude_none=True, exclude={"bases"}).items()]
    if resources.bases:
        lines.append("[resources.bases]")
        lines += [f"{json.dumps(k)} = {json.dumps(str(v))}" for k, v in sorted(resources.bases.items())]
    if speaker is not None:
        lines += ["[log]", f'policy = "../{LOG}/{POLICY}"', f"coordinator = {json.dumps(speaker)}"]
        lines.append(f'state = "../witnesses/{name}"')
    if (form := files.within(plan.root).format) is not None:
        lines += form.lines()
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _formats(forms: Sequence[tuple[FileFormat, Path]]) -> FormatSection | None:
    """Return one format for files of several sites; None if all of them are written plainly."""
    return (
        FormatSection(files={path: form for form, path in forms}) if any(f != FileFormat() for f, _ in forms) else None
    )


def write_pooled_site(files_of_sites: Sequence[Path], path: Path, plan: Plan) -> Path:
    """Write the configuration of one site with the data of all sites: the pooled baseline."""
    sites = load_sites(files_of_sites)
    files = SiteFiles(
        train=tuple(p for site in sites for p in site.train),
        test=tuple(p for site in sites for p in site.test),
        format=_formats([(site.form_of(p), p) for site in sites for p in (*site.train, *site.test)]),
    )
    written = write_site_file(path, "pooled", files, plan)
    text = written.read_text(encoding="utf-8")
    written.write_text("distinct_files = true\n" + text, encoding="utf-8")
    return written
