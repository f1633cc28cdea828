"""The arms of an attack: federations over chosen records, through the deployed code paths.

An attack chooses the records and the updates of each site, and the study. All steps between are those of `privet
simulate`: files are read, sites train, updates are summed, adapters are released. No arm keeps a round log.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from privet.client.site import Resources
from privet.client.training.counts import finite_loss
from privet.client.training.data import Records, concatenate, load_files
from privet.client.training.features import encode_records
from privet.client.training.forms import written_row
from privet.client.training.host import ModelHost
from privet.client.training.model import initial_adapter, open_host, peft_config_text
from privet.client.training.preference import judge
from privet.common.errors import StudyError
from privet.common.log.agreement import RoundStatement
from privet.common.study.adapter import Adapter
from privet.common.study.sections import CohortSection, PrivacySection, SecureAggregationSection
from privet.common.study.study import Study
from privet.server.rounds.state import RunDirectory
from privet.simulations.engines.memory import Behaviour, DataPool, open_fleet
from privet.simulations.runs.simulate import run_over
from privet.simulations.sites import load_simulated, simulated_identity


@dataclass(frozen=True)
class Trail:
    """The releases of an arm: its first adapter, the adapter of each closed round, and the rounds' statements."""

    adapters: tuple[Adapter, ...]
    statements: tuple[RoundStatement, ...]

    @property
    def released(self) -> Adapter:
        """The last adapter."""
        return self.adapters[-1]


@dataclass(frozen=True)
class Workshop:
    """The directory and the machine for the arms of an attack.

    Attributes:
        directory: An empty directory. Each arm creates its own directory in it.
        resources: The machine.
    """

    directory: Path
    resources: Resources

    def host(self, study: Study) -> ModelHost:
        """Return the model of a study."""
        return open_host(study, self.resources)

    def run(
        self,
        name: str,
        study: Study,
        sites: Mapping[str, Records],
        *,
        declared: Mapping[str, int] | None = None,
        behaviours: Mapping[str, Behaviour] | None = None,
        seed: int | None = None,
    ) -> Trail:
        """Train a study over the given records and return its releases.

        Args:
            name: Name of the arm. A directory of that name must not exist yet.
            study: Its study.
            sites: Training records of each site.
            declared: Counts that sites declare, independent of their records.
            behaviours: Changes that malicious sites make to their data and updates.
            seed: Seed of the sites' batches and noise. None: the seed of the study, which also gives the first adapter.

        Raises:
            PrivetError: As the study's rounds raise it.
        """
        files = self._write(name, study, sites, declared or {}, study.seed if seed is None else seed)
        host = self.host(study)
        start = initial_adapter(study, host)
        run = RunDirectory.create(self.directory / name / "run", study, start, peft_config_text(host, study))
        adapters = [start]
        # Every arm has its own files, so a pool shared by all arms would only grow.
        exchange = open_fleet(files, DataPool(), behaviours).exchange()
        state = run_over(run, exchange, lambda statement, adapter: adapters.append(adapter))
        return Trail(tuple(adapters), state.statements)

    def _write(
        self, name: str, study: Study, sites: Mapping[str, Records], declared: Mapping[str, int], seed: int
    ) -> list[Path]:
        folder = self.directory / name / "sites"
        folder.mkdir(parents=True)
        keys = {site: simulated_identity(seed, site).public_key().public_bytes_raw().hex() for site in sorted(sites)}
        peers = [f"{site} = {json.dumps(key)}" for site, key in keys.items()]
        machine = self.resources.model_dump(exclude_none=True)
        resources = [f"{key} = {json.dumps(value)}" for key, value in machine.items()]
        files = []
        for site in keys:
            write_records(folder / f"{site}.jsonl", study, sites[site])
            lines = [f"name = {json.dumps(site)}", f"reproducible_seed = {seed}", f'train = ["{site}.jsonl"]']
            lines += [f"declared_count = {declared[site]}"] if site in declared else []
            lines.append('patient_ids = "case"')  # records were read by a rule; their units keep their names
            lines += ["[peers]", *peers, "[resources]", *resources]
            file = folder / f"{site}.toml"
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
            files.append(file)
        return files

    def kept(self, name: str) -> Trail:
        """Return the releases of an arm that ended early: its last adapter, and all statements."""
        state = RunDirectory.open(self.directory / name / "run").load()
        return Trail((state.adapter,), state.statements)

    def losses(self, study: Study, adapter: Adapter, records: Records) -> list[float]:
        """Return each record's loss with an adapter. Non-finite losses are the cap of validation losses."""
        return self._scores(study, adapter, records)[0]

    def accuracy(self, study: Study, adapter: Adapter, records: Records) -> tuple[int, int]:
        """Return the number of records that an adapter predicts right, and the number of records."""
        correct = self._scores(study, adapter, records)[1]
        return round(sum(correct)), len(correct)

    def _scores(self, study: Study, adapter: Adapter, records: Records) -> tuple[list[float], list[float]]:
        host = self.host(study)
        with host.lock:
            host.mount(adapter)
            scores = judge(host, encode_records(study, host.tokenizer, records))
        return [finite_loss(found) for found in scores], [found.correct for found in scores]


def write_records(path: Path, study: Study, records: Records) -> Path:
    """Write records as JSON Lines in the study's columns. `load_records` reads the same records from the file."""
    lines = []
    for row, unit in zip(records.rows, records.units, strict=True):
        roles = written_row(study, row)
        if roles is None:
            raise StudyError(
                "data.columns: an attack plants records of words and tags, which the form text and spans cannot hold",
                "attack a study whose data.columns are tokens and tags",
            )
        written = {column: roles[role] for role, column in study.data.columns.items()}
        if study.data.unit is not None:
            written[study.data.unit] = unit
        lines.append(json.dumps(written))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read_sites(files: Sequence[Path], study: Study, *, part: str = "train") -> dict[str, Records]:
    """Return the records of each site's training or test files. Sites without such files are omitted.

    Raises:
        StudyError, DataError: A site file or a data file does not fit the study.
    """
    found = {}
    for file in files:
        site = load_simulated(file)
        if site.train if part == "train" else site.test:
            found[site.name] = concatenate(load_files(site, study, training=part == "train")[0])
    return found


def pooled_records(parts: Sequence[Records]) -> Records:
    """Return all records of several sites. Equal unit names are the same unit."""
    return concatenate(parts)


def without_privacy(study: Study) -> Study:
    """Return the study without differential privacy and gate, and otherwise unchanged."""
    return study.model_copy(update={"privacy": PrivacySection(mode="none"), "gate": None})


def at_epsilon(study: Study, epsilon: float) -> Study:
    """Return the study with another epsilon, and no gate. One without privacy gets clip norm 1 and delta 1e-5."""
    promise = {"epsilon": epsilon}
    if not study.private:
        privacy = PrivacySection(mode="local", epsilon=epsilon, delta=1e-5, clip_norm=1.0)
        return study.model_copy(update={"privacy": privacy, "gate": None})
    return study.model_copy(update={"privacy": study.privacy.model_copy(update=promise), "gate": None})


def in_the_clear(study: Study) -> Study:
    """Return the study without masks and for any number of sites. The sum is the same, except for its rounding."""
    update = {"cohort": CohortSection(min_sites=1), "secure_aggregation": SecureAggregationSection(mode="plain")}
    return study.model_copy(update=update)
