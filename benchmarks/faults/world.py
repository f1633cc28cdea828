"""A consortium in a folder: enrolled sites, policies, ledgers, approvals, and a study to run.

To make one takes seconds, so one of each kind is made and then copied. The functions behind the commands of an operator
make all of it. Only the base is tiny and random.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from faults.study import DELTA, ROUNDS, UNITS, make_study, write_notes
from privet.client.budget.accounts import Limit, composed_epsilon
from privet.client.budget.ledger import Ledger
from privet.client.budget.releases import cost_of_round
from privet.client.editing import changed
from privet.client.network.enrolment import (
    Enrolment,
    accept_membership,
    confirm,
    keep_terms,
    prepare_request,
)
from privet.client.policy.consent import record_approval
from privet.client.policy.rules import base_digest
from privet.client.policy.text import EXAMPLE
from privet.client.rounds.logbook import create_witness
from privet.client.site import Resources, load_site
from privet.client.training.model import initial_adapter, open_host, peft_config_text
from privet.common.audit.release import ADAPTER
from privet.common.canonical import canonical_json
from privet.common.log.statements import StatedFloor
from privet.common.pki.enrolment import JoinRequest
from privet.common.study.study import Study
from privet.server.consortium.coordinator import Coordinator, Settings, create, log_members, open_coordinator
from privet.server.log.journal import open_journal
from privet.server.network.service import link_of
from privet.simulations.deploy import free_ports

RUN = "study"
_NAMES = ("alder", "birch", "cedar", "dogwood")
_PORTS = ("address", "enrolment", "fleet")


@dataclass(frozen=True)
class Kind:
    """A kind of consortium.

    Attributes:
        name: Name in the table.
        sites: Number of sites. Masking needs at least three, so of four one may drop out.
        masked: Whether updates are masked.
    """

    name: str
    sites: int
    masked: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The sites' names."""
        return _NAMES[: self.sites]


KINDS = {kind.name: kind for kind in (Kind("three", 3, True), Kind("four", 4, True), Kind("plain", 3, False))}


@dataclass(frozen=True)
class World:
    """A consortium in a folder.

    Attributes:
        folder: Holds `coordinator/`, one directory per site, and `events.jsonl`, the events of the processes.
        kind: Its kind.
        seed: Seed of the sites' draws.
    """

    folder: Path
    kind: Kind
    seed: int

    @property
    def coordinator(self) -> Path:
        """The coordinator's directory."""
        return self.folder / "coordinator"

    @property
    def run(self) -> Path:
        """The run's directory."""
        return self.coordinator / "runs" / RUN

    @property
    def study(self) -> Study:
        """The study."""
        return read_study(self.folder)

    @property
    def fleet_port(self) -> int:
        """The port of the coordinator that sites connect to."""
        return int(open_coordinator(self.coordinator).settings.fleet.rpartition(":")[2])

    def site_file(self, name: str) -> Path:
        """Return a site's file."""
        return self.folder / name / "site.toml"


def read_study(folder: Path) -> Study:
    """Return the study in the folder of a consortium."""
    return Study.parse(json.loads((folder / "study.json").read_text()))


def make_template(folder: Path, kind: Kind, base: Path) -> Path:
    """Make a consortium of a kind: sites enrolled and founded, the study approved by all, nothing run yet."""
    now, study = datetime.now(UTC), make_study(base, masked=kind.masked)
    folder.mkdir(parents=True)
    (folder / "study.json").write_bytes(canonical_json(study.document()))
    settings = Settings(
        name="north",
        origin="example.org/north",
        address="127.0.0.1:1",
        enrolment="127.0.0.1:2",
        fleet="127.0.0.1:3",
    )
    create(folder / "coordinator", settings, None, now)
    made = open_coordinator(folder / "coordinator")
    asked = [_enrol(made, folder / name, name, now) for name in kind.names]
    made.members.found(StatedFloor(max_epsilon=100.0, max_delta=0.1, min_sites=3), now)
    for request in asked:
        directory = folder / request.keys.site
        keep_terms(directory, made.members.terms())
        confirm(directory, None, made.charter.words)
        for other in asked:
            confirm(directory, other.keys.site, other.keys.words)
        _equip(directory, study, base, now)
    with open_journal(made.log_directory, made.keys) as journal:
        log_members(made, journal)
    link_of(made.directory)
    _write_start(folder / "start", study, base)
    return folder


def _enrol(made: Coordinator, directory: Path, name: str, now: datetime) -> JoinRequest:
    """Enrol a site without a network."""
    token = made.invite(name, now)
    asked = prepare_request(directory, token)
    made.answer(asked, now)
    made.approve(name, asked.keys.fingerprint, now)
    accept_membership(directory, made.answer(asked, now), now)
    return asked


def _equip(directory: Path, study: Study, base: Path, now: datetime) -> None:
    """Complete the file of a site, write data and policy, make ledger and witness, and approve the study.

    The limit is exactly the cost of the study, so that a second charge for a round would exceed it.
    """
    name, file = directory.name, directory / "site.toml"
    cost = cost_of_round(study, load_site(file))
    epsilon = composed_epsilon([(cost, ROUNDS)], Limit("record", 1.0, DELTA)) * (1 + 1e-9)
    write_notes(directory / "train.jsonl", _NAMES.index(name))
    text = file.read_text()
    text = text.replace('train = ["data/train.csv"]', 'train = ["train.jsonl"]')
    text = text.replace("# declared_count = 1200 ", f"declared_count = {UNITS} ")
    text = text.replace('# anchor = "/mnt/other-disk/ledger-head.json"', 'anchor = "anchor/head.json"')
    text = text.replace("# anchor_same_disk = true ", "anchor_same_disk = true ")
    text += f'[limit]\nunit = "record"\nepsilon = {epsilon!r}\ndelta = {DELTA}\n'
    text += '[resources]\ndevice = "cpu"\nprecision = "fp32"\nthreads = 1\n'
    file.write_text(text + f"[resources.bases]\n{json.dumps(base.name)} = {json.dumps(str(base.resolve()))}\n")
    changes = {
        "model.bases": [base_digest(study)],
        "privacy.unit": "record",
        "privacy.max_epsilon": 100.0,
        "privacy.max_epsilon_alone": 100.0,
        "privacy.max_delta": 1e-3,
        "privacy.min_noise_multiplier": 0.1,
        "privacy.min_units": UNITS,
        "cohort.secure_aggregation": "optional",
        "cohort.min_threshold": 2 if study.secure_aggregation.mode == "masked" else 1,
    }
    policy = changed(EXAMPLE, changes, "policy.toml")
    (directory / "policy.toml").write_text(policy)
    (directory / "policy.toml").chmod(0o644)
    site = load_site(file)
    if site.ledger is None or site.anchor is None:
        raise ValueError("the site file names no ledger")
    site.anchor.parent.mkdir()
    create_witness(site)
    Ledger.create(site.ledger, site.anchor, site.ledger_key).close()
    record_approval(site, study, now)


def _write_start(directory: Path, study: Study, base: Path) -> None:
    """Write the adapter that the study starts from, as `privet adapter` does."""
    host = open_host(study, Resources(device="cpu", precision="fp32", bases={base.name: base}))
    directory.mkdir()
    (directory / ADAPTER).write_bytes(initial_adapter(study, host).data)
    (directory / "adapter_config.json").write_text(peft_config_text(host, study))


def copy_world(template: Path, folder: Path, kind: Kind, seed: int) -> World:
    """Copy a consortium, with ports of its own."""
    shutil.copytree(template, folder, dirs_exist_ok=True)  # The folder may exist already: a disk may be mounted in it.
    ports = free_ports(len(_PORTS))
    file = folder / "coordinator/coordinator.toml"
    text = file.read_text()
    for key, port in zip(_PORTS, ports, strict=True):
        text = re.sub(rf'(?m)^{key} = "127\.0\.0\.1:\d+"', f'{key} = "127.0.0.1:{port}"', text)
    file.write_text(text)
    world = World(folder, kind, seed)
    address, enrolment, fleet = (f"127.0.0.1:{port}" for port in ports)
    for name in kind.names:
        point_at(world.site_file(name), ports[-1])
        directory = folder / name
        terms = Enrolment(directory).terms.model_copy(
            update={"address": address, "enrolment": enrolment, "fleet": fleet}
        )
        keep_terms(directory, terms)
    return world


def point_at(site: Path, port: int) -> None:
    """Change the port of the coordinator in the file of a site."""
    site.write_text(re.sub(r'(?m)^address = "127\.0\.0\.1:\d+"', f'address = "127.0.0.1:{port}"', site.read_text()))
