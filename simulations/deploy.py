"""Deploy a consortium on this machine: a coordinator and sites as processes of their own, over TLS on loopback.

Every step runs the command that an operator types: enrolment with tokens and compared words, policies, approvals,
ledgers, one study with secure aggregation and differential privacy, and an audit of the finished run. Only one step is
replaced: the phone calls in which two people compare words.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Protocol

from privet.client.editing import changed
from privet.client.network.consortium import ConsortiumClient
from privet.client.network.enrolment import Enrolment, confirm, keep_terms
from privet.client.site import rounded_count
from privet.common.clock import now
from privet.common.errors import StateError, StudyError
from privet.common.files import require_free, write_durably
from privet.common.progress import Say
from privet.common.study.study import load_study
from privet.server.consortium.coordinator import open_coordinator
from privet.server.network.service import link_of
from privet.server.rounds.state import RunDirectory
from privet.simulations.data.clinical_notes import HOSPITALS, NOTE_COLUMNS, generate_notes, write_site

_AT_ONCE = 2
_PRIVET = "import sys; from privet.common.cli import main; sys.argv[0] = 'privet'; main()"
_QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


@dataclass(frozen=True)
class SitePlan:
    """The data of a site.

    Attributes:
        train: Its training file.
        units: The number of units that it declares.
        labels: The study's label for a label of the file that is spelt otherwise.
    """

    train: Path
    units: int
    labels: Mapping[str, str] = field(default_factory=dict)


class Program(Protocol):
    """A running command, as `subprocess.Popen` is one."""

    @property
    def returncode(self) -> int | None:
        """The exit code, once `poll` or `wait` has seen the end."""

    def poll(self) -> int | None:
        """Return the exit code, or None while the command runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code.

        Raises:
            subprocess.TimeoutExpired: The command still runs after `timeout` seconds.
        """

    def send_signal(self, sig: int) -> None:
        """Send a signal, unless the command has ended."""

    def terminate(self) -> None:
        """Ask the command to end."""

    def kill(self) -> None:
        """End the command."""


class Starter(Protocol):
    """Starts `privet` commands as processes."""

    def run(self, arguments: Sequence[object], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""

    def start(self, arguments: Sequence[object], environment: Mapping[str, str], output: IO[bytes]) -> Program:
        """Start a command with its output and errors in a file."""


class Interpreters:
    """Starts each command in a Python of its own."""

    def run(self, arguments: Sequence[object], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(_command(arguments), env=environment, capture_output=True, text=True, check=False)

    def start(self, arguments: Sequence[object], environment: Mapping[str, str], output: IO[bytes]) -> Program:
        """Start a command with its output and errors in a file."""
        return subprocess.Popen(
            _command(arguments), env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )


_INTERPRETERS = Interpreters()


@dataclass
class Deployment:
    """A consortium in a folder.

    Attributes:
        folder: Holds `coordinator/` and one directory per site.
        say: Receives a line for each step.
        starter: Starts the commands.
        programs: The running processes, by name.
    """

    folder: Path
    say: Say = lambda line: None
    starter: Starter = _INTERPRETERS
    programs: dict[str, Program] = field(default_factory=dict)

    @property
    def coordinator(self) -> Path:
        """The coordinator's directory."""
        return self.folder / "coordinator"

    def site(self, name: str) -> Path:
        """Return the path of a site's file."""
        return self.folder / name / "site.toml"

    def privet(self, *arguments: object) -> str:
        """Run one command to its end, and return its standard output.

        Raises:
            StateError: The command failed.
        """
        done = self.starter.run(arguments, self._environment())
        if done.returncode:
            raise StateError(
                f"a step of the deployment, `privet {' '.join(map(str, arguments[:2]))}`, ended with exit code "
                f"{done.returncode}: " + done.stderr.strip(),
                "correct the cause, and run `privet deploy` again with a new --out",
            )
        return done.stdout

    def start(self, name: str, *arguments: object) -> None:
        """Start a command that runs until it is ended. Its output goes to `NAME.log` in the folder."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.programs[name] = self.starter.start(arguments, self._environment(), log)

    def end(self, name: str, *, kill: bool = False) -> None:
        """Terminate a program; kill it if asked, or if it has not ended after 30 seconds."""
        program = self.programs.pop(name)
        program.kill() if kill else program.terminate()
        try:
            program.wait(30)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()

    def end_all(self) -> None:
        """End all programs that were started."""
        for name in list(self.programs):
            self.end(name)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **_QUIET, "FLWR_HOME": str(self.folder / "flwr"), "COLUMNS": "200"}

    # Steps

    def found(self, ports: Sequence[int]) -> None:
        """Create the coordinator, and serve its network."""
        member, joining, fleet = (f"127.0.0.1:{port}" for port in ports)
        self.privet(
            *("coordinator", "init", self.coordinator, "--name", "demo", "--no-passphrase"),
            *("--address", member, "--enrolment", joining, "--fleet", fleet),
        )
        self.say("coordinator: root certificate, keys and an empty round log created")
        self.serve()

    def serve(self) -> None:
        """Start the coordinator's service, and wait until it listens on all its ports."""
        self.start("coordinator", "coordinator", "serve", "-C", self.coordinator)
        settings = (self.coordinator / "coordinator.toml").read_text()
        for port in re.findall(r'(?:address|enrolment|fleet) = "127\.0\.0\.1:(\d+)"', settings):
            self._until(partial(_listens, int(port)), f"the coordinator listens on port {port}", "coordinator")

    def enrol(self, name: str) -> None:
        """Enrol a site: invitation token, keys made at the site, compared words, certificate."""
        token = self.privet("coordinator", "invite", name, "-C", self.coordinator).strip()
        file = self.folder / f"{name}.token"
        file.write_text(token)
        asked = self.privet("site", "join", f"@{file}", self.folder / name, "--wait", 0)
        words = next(line.removeprefix("words").strip() for line in asked.splitlines() if line.startswith("words"))
        # Two people compare these words on the phone: a stolen token alone must not make a member.
        self.privet("coordinator", "approve", name, "--words", words, "-C", self.coordinator)
        self.privet("site", "join", f"@{file}", self.folder / name)
        self.say(f"{name}: enrolled with keys made at the site, {' '.join(words.split()[:3])}...")

    def compare(self, names: Sequence[str]) -> None:
        """Let every site confirm the charter and all members, by the words that each side has of its own keys.

        Raises:
            PrivetError: As `confirm`.
        """
        charter = open_coordinator(self.coordinator).charter
        own = {name: Enrolment(self.folder / name).asked.keys.words for name in names}
        for name in names:
            directory = self.folder / name
            keep_terms(directory, ConsortiumClient(Enrolment(directory), now).roster())
            confirm(directory, None, charter.words)
            for other in own.keys() - {name}:
                confirm(directory, other, own[other])
        self.say(f"every site confirmed the consortium ({' '.join(charter.words.split()[:3])}...) and all members")

    def equip(self, name: str, plan: SitePlan, study: Path) -> None:
        """Complete the file, policy and ledger of a site, and approve the study there."""
        asked = load_study(study)
        site = self.site(name)
        text = site.read_text()
        text = text.replace('train = ["data/train.csv"]', f"train = [{json.dumps(str(plan.train.resolve()))}]")
        text = text.replace("# declared_count = 1200 ", f"declared_count = {plan.units} ")
        text = text.replace('# anchor = "/mnt/other-disk/ledger-head.json"', 'anchor = "anchor/ledger-head.json"')
        text = text.replace("# anchor_same_disk = true ", "anchor_same_disk = true ")
        if asked.privacy.unit == "patient":
            line = f"patient_column = {json.dumps(asked.data.unit)}"
            text = text.replace('# patient_column = "patient_id"', line)
        unit = asked.privacy.unit
        delta = asked.privacy.delta or 1e-5
        text += f'[limit]\nunit = "{unit}"\nepsilon = {2 * (asked.privacy.epsilon or 1)}\ndelta = {delta}\n'
        text += '[resources]\ndevice = "cpu"\nthreads = 1\n'
        site.write_text(text)
        self.privet("site", "policy", site, "--init")
        policy = site.parent / "policy.toml"
        policy.write_text(_policy_for(policy.read_text(), study, plan.units))
        self.privet("site", "init", site)
        if plan.labels:  # a file of a form of its own: the set-up proposes how it is written
            spelled = (f"--label={label}={meant}" for label, meant in plan.labels.items())
            self.privet("site", "setup", site, "--yes", "--study", study, *spelled)
        self.privet("site", "approve", site, study)
        self.say(f"{name}: policy, ledger and witness created, study approved")

    def _until(self, held: Callable[[], bool], what: str, name: str, seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while not held():
            program = self.programs.get(name)
            if program is not None and program.poll() is not None:
                log = (self.folder / f"{name}.log").read_text(errors="replace")[-2000:]
                raise StateError(
                    f"the deployment waited until {what}, but the process {name!r} ended with exit code "
                    f"{program.returncode}; the end of its log:\n{log}",
                    "correct the cause, and run `privet deploy` again with a new --out",
                )
            if time.monotonic() > deadline:
                raise StateError(
                    f"the deployment waited {seconds:g} s until {what}, but this did not happen",
                    f"read {self.folder}/{name}.log for the reason",
                )
            time.sleep(0.1)

    def connected(self, count: int) -> None:
        """Wait until `count` sites are connected."""
        link = link_of(self.coordinator)  # Asked in this process, because a command takes seconds to start.
        self._until(
            lambda: sum(node.online for node in link.nodes()) >= count, f"{count} sites are connected", "coordinator"
        )


@contextmanager
def deployment(
    folder: Path, study: Path, sites: Mapping[str, SitePlan], say: Say, starter: Starter = _INTERPRETERS
) -> Iterator[Deployment]:
    """Run a consortium with all sites enrolled, configured and connected, until the block ends.

    Raises:
        StateError: A step failed. Its output is in the message, or in the logs in `folder`.
    """
    folder.mkdir(parents=True)
    made = Deployment(folder, say, starter)
    try:
        made.found(free_ports(3))
        with ThreadPoolExecutor(_AT_ONCE) as pool:  # Each command is a process; a few at a time keep the cores busy.
            list(pool.map(made.enrol, sites))
            made.compare(list(sites))
            list(pool.map(lambda name: made.equip(name, sites[name], study), sites))
        for name in sites:
            made.start(name, "site", "serve", made.site(name))
        made.connected(len(sites))
        say(f"{len(sites)} sites are connected")
        yield made
    finally:
        made.end_all()


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback interface that no process uses."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        # All are held at once, or the system could return the same port twice.
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def _command(arguments: Sequence[object]) -> list[str]:
    return [sys.executable, "-P", "-c", _PRIVET, *map(str, arguments)]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _policy_for(text: str, study: Path, units: int) -> str:
    """Return the policy that `site policy --init` writes, changed to admit this study and nothing more."""
    from privet.client.policy.rules import base_digest

    asked = load_study(study)
    changes = {
        "model.bases": [base_digest(asked)],
        "privacy.unit": asked.privacy.unit,
        "privacy.max_epsilon": asked.privacy.epsilon or 1.0,
        "privacy.max_delta": asked.privacy.delta or 1e-6,
        "privacy.max_epsilon_alone": "any" if asked.distributed else asked.privacy.epsilon or 1.0,
        "privacy.min_noise_multiplier": 0.4,
        "privacy.min_units": units,
        "cohort.min_threshold": 2,
        "metrics.allow": [asked.kind] if asked.counts else ["validation"] if asked.data.validation_fraction else [],
    }
    return changed(text, changes, "policy.toml")


def run_deployment(study: Path, out: Path, say: Say) -> dict[str, object]:
    """Run a study with three synthetic hospitals on this machine, each a process of its own, and audit the run.

    Args:
        study: File of a study on the generated notes.
        out: Directory to create.
        say: Receives a line for each step.

    Raises:
        StateError: A step failed.
    """
    require_free(out, "choose another directory with --out, or remove this one")
    started = time.perf_counter()
    asked = load_study(study)
    needed = {*asked.data.columns.values()} | ({asked.data.unit} if asked.data.unit is not None else set())
    if unknown := sorted(needed - set(NOTE_COLUMNS)):
        raise StudyError(
            f"the study needs the columns {', '.join(unknown)}, but `privet deploy` trains on generated notes, which "
            f"have the columns {', '.join(NOTE_COLUMNS)}",
            "deploy a study on generated notes, such as simulations/studies/deploy.toml; to train on your own files, "
            "use `privet simulate STUDY`",
        )
    plans = {}
    for hospital in HOSPITALS[:3]:
        records = generate_notes(hospital, seed=asked.seed, part="train")
        path = out / "data" / f"{hospital.name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_site(records, path)
        units = len({note.patient for note in records}) if asked.privacy.unit == "patient" else len(records)
        plans[hospital.name] = SitePlan(path, rounded_count(units))
    with deployment(out / "consortium", study, plans, say) as made:
        run = made.coordinator / "runs" / asked.name
        output = made.privet(
            *("coordinator", "run", study, "--yes"),  # founds the consortium, and makes the adapter to start from
            *("-C", made.coordinator, "--gather", 120),
        )
        for line in output.splitlines():
            say(line)
        # An auditor who trusted the coordinator's policy would trust the party under audit; a site's copy is
        # independent.
        policy = made.folder / next(iter(plans)) / "consortium" / "log.policy"
        made.privet("audit", "bundle", run, "--out", out / "run.tar")
        verdict = json.loads(made.privet("audit", "verify", out / "run.tar", "--policy", policy, "--json"))
        say(f"audit: {verdict['leaves']} leaves verified, cosigned by {', '.join(verdict['cosigners'])}")
    statements = RunDirectory.open(run).load().statements
    summary: dict[str, object] = {
        "study": asked.digest,
        "rounds": [{"type": each["type"], "seconds": each["seconds"]} for each in statements],
        "log_verified": verdict["ok"],
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_durably(out / "summary.json", (json.dumps(summary, indent=2, sort_keys=True) + "\n").encode())
    return summary
