"""The consoles: time of the first page, bytes of every page, and memory, for 1,000 sites and 2,000 rounds.

The coordinator has 1,000 members, of which 950 are connected, and a run of 2,000 rounds of 100 sites each. Its state
names what each of the 1,000 sites has spent after each round: 80 MB, near the most that safetensors reads. The log's
genesis names 150 members, as a log has at most 99 cosignatures that count. The run is written by privet's own
functions; rows of members and cosignatures, and the nodes' time of contact, straight into their databases. The site is
one that took part in a study, with 2,000 rounds in its ledger.

Each console is the command in a process of its own. Seconds are those from the request to the whole answer, on
loopback. Memory is the resident set of the console's process, in MB of 10^6 bytes. The site's console has epsilons
composed by a second process, which ends 10 s after it was needed, and is measured apart.
"""

from __future__ import annotations

import re
import socket
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from harness import ROOT, Bench, Check, start

from privet.client.budget.accounts import Cost, Limit, RoundKey
from privet.client.budget.ledger import Ledger
from privet.client.site import load_site
from privet.common.canonical import digest
from privet.common.log import mldsa
from privet.common.log.note import COSIGNATURE, public_of
from privet.common.log.statements import StatedFloor
from privet.common.pki.certificates import request, to_pem
from privet.common.pki.enrolment import SiteKeys
from privet.common.privacy.accounting import PrivacyEvent
from privet.common.study.adapter import Adapter, AdapterSpec, TensorSpec
from privet.common.study.study import Study
from privet.server.consortium.coordinator import Coordinator, Settings, create, log_due, open_coordinator
from privet.server.log.roundlog import log_file
from privet.server.network.nodes import LINK
from privet.server.network.service import link_of
from privet.server.rounds.state import RunDirectory, RunState
from privet.server.rounds.wait import Wait

COHORT, FAILED, WITNESSES = 100, 3, 150
MOST_SECONDS, MOST_BYTES, MOST_MB = 0.3, 200_000, 80.0
WORLD = ROOT / "tests/compat/data/world.tar.xz"
A, B = TensorSpec("m.lora_A.weight", (8, 64), "lora_A"), TensorSpec("m.lora_B.weight", (64, 8), "lora_B")
STUDY: dict[str, Any] = {
    "name": "large",
    "model": {"base": "nowhere", "sha256": {"model.safetensors": "0" * 64}},
    "task": {"kind": "text-classification", "labels": ["no", "yes"]},
    "data": {"columns": {"text": "text", "label": "label"}},
    "lora": {"rank": 8, "targets": ["m"]},
    "training": {"learning_rate": 0.1, "local_steps": 1, "sampling_rate": 0.01},
    "aggregation": {"max_norm": 1e300},
    "cohort": {"min_sites": 2},
    "privacy": {"mode": "none"},
    "secure_aggregation": {"mode": "plain"},
}


# The coordinator


def keys_of(site: str) -> SiteKeys:
    """Make the public keys of a site. Nobody needs the private ones."""
    node, tls = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP256R1())
    return SiteKeys(
        site=site,
        identity=Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex(),
        witness=public_of(site, COSIGNATURE, Ed25519PrivateKey.generate(), mldsa.new_key()).text,
        node=node.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(),
        request=request(tls),
    )


def consortium(folder: Path, sites: Sequence[str], port: int) -> Coordinator:
    """Make a coordinator with members, a founded log that all of them cosigned, and nodes of which 19 in 20 are online.

    Args:
        folder: Its directory.
        sites: The members' names.
        port: The fleet port.
    """
    present = datetime.now(UTC)
    settings = Settings(
        name="large",
        origin="example.org/large",
        address="127.0.0.1:9443",
        enrolment="127.0.0.1:9444",
        fleet=f"127.0.0.1:{port}",
    )
    create(folder, settings, None, present)
    made = open_coordinator(folder)
    with sqlite3.connect(folder / "members.db") as database:
        for site in sites:
            keys, time_ = keys_of(site), int(present.timestamp())
            number, certificate = digest(keys.encode()), made.certify(keys, present)
            row = (number, site, keys.encode().decode(), time_, "member", time_, None)
            database.execute("INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            issued = (f"{certificate.serial_number:x}", number, to_pem(certificate), time_)
            database.execute("INSERT INTO certificates VALUES (?, ?, ?, ?)", issued)
        later = "UPDATE requests SET state = ? WHERE state = ? AND site >= ?"
        database.execute(later, ("revoked", "member", sites[min(WITNESSES, len(sites) - 1)]))
    made.members.found(StatedFloor(), present)
    log_due(made)
    with sqlite3.connect(folder / "members.db") as database:
        database.execute(later, ("member", "revoked", ""))
    with sqlite3.connect(log_file(made.log_directory)) as database:
        size = database.execute("SELECT max(size) FROM checkpoints").fetchone()[0]
        line = "\u2014 " + "x" * 4_600  # as long as the two lines of a hybrid key
        database.executemany("INSERT INTO cosignatures VALUES (?, ?, ?)", [(size, site, line) for site in sites])
    link = link_of(folder)
    for each in made.members.listed():
        link.register(each.node.encode())
    with sqlite3.connect(folder / LINK) as database:
        database.execute("UPDATE node SET status = 'online', online_until = ?", (time.time() + 1e6,))
        database.execute(
            "UPDATE node SET status = 'offline', online_until = ? WHERE rowid % 20 = 0", (time.time() - 1e5,)
        )
    return made


def statement(number: int, sites: Sequence[str], study: Study, adapter: str) -> dict[str, Any]:
    """Return the statement about a round, with everything that pages show."""
    cohort = [sites[(number * 37 + index) % len(sites)] for index in range(min(COHORT, len(sites)))]
    failures = dict.fromkeys(cohort[:FAILED], "TimeoutError: the site did not answer within the round's time")
    spent = 8 * (number / 2000) ** 0.5
    return {
        "format": 1,
        "study": study.digest,
        "round": number,
        "nonce": f"{number:032x}",
        "cohort": sorted(cohort),
        "survivors": sorted(cohort[FAILED:]),
        "failures": failures,
        "masking": [],
        "adapter_before": adapter,
        "adapter_after": adapter,
        "adapter_published": adapter,
        "aggregation": "fedavg",
        "secure_aggregation": "plain",
        "privacy": {"unit": "record", "delta": 1e-5, "target": 8.0, "epsilon": dict.fromkeys(sites, spent)},
        "started": 1.8e9 + 60 * number,
        "seconds": 50 + number % 17,
        "type": "round-close",
        "metrics": {"validation_loss": 1.2, "validation_accuracy": 0.8},
    }


def begun(made: Coordinator, sites: Sequence[str], rounds: int) -> tuple[RunDirectory, RunState]:
    """Make a run that has closed all its rounds but one, and waits for sites in the last."""
    document = {**STUDY, "training": {**STUDY["training"], "rounds": rounds + 1}}
    study, spec = Study.parse(document), AdapterSpec.of([A, B])
    adapter = Adapter(spec, {each.name: np.zeros(each.shape, np.float32) for each in (A, B)})
    run = RunDirectory.create(made.directory / "runs/large", study, adapter, '{"peft_type": "LORA"}')
    stated = tuple(statement(number, sites, study, adapter.digest) for number in range(1, rounds))
    state = RunState(rounds - 1, adapter, statements=stated)
    run.store(state)
    run.publish(state, every=True)
    missing = dict.fromkeys(sites[:COHORT], "the connection was lost")
    run.note_wait(Wait("train", rounds, 0, tuple(sites[COHORT : 2 * COHORT]), missing, time.time()))
    return run, state


# A site


def spent_site(folder: Path, rounds: int) -> Path:
    """Unpack a site that has taken part in a study, and charge its ledger with further rounds."""
    with tarfile.open(WORLD) as archive:
        inside = [each for each in archive if each.name.startswith("world/consortium/alpha")]
        archive.extractall(folder, inside, filter="tar")
    file = folder / "world/consortium/alpha/site.toml"
    site = load_site(file)
    if site.ledger is None or site.limit is None:
        raise SystemExit("the site of the archive has no ledger or no limit")
    cost = Cost(PrivacyEvent(100.0, 0.1, 1, site.limit.unit))
    limit = Limit(site.limit.unit, 1000.0, site.limit.delta)
    ledger = Ledger.open(site.ledger, site.anchor)
    for number in range(1, rounds + 1):
        release = RoundKey(str(site.dataset), digest(b"a study of many rounds"), number)
        ledger.reserve(release, cost, digest(b"inputs"), limit, rounds)
        ledger.begin(release)
        ledger.charge(release, bytes(1000))
    ledger.close()
    return file


# Asking


class Asked:
    """A console's process, and a session in it."""

    def __init__(self, process: subprocess.Popen[str], link: str) -> None:
        self.process, self._host, self._cookie = process, link.split("/")[2], ""
        self._secret = link.rsplit("/", 1)[1]

    def memory(self) -> float:
        """Return the process's resident set in MB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", text)[0]) * 1024 / 1e6

    def enter(self) -> None:
        """Use the link."""
        self._cookie = self._answer(f"/enter/{self._secret}")[2].split(";")[0]

    def get(self, path: str) -> tuple[float, int]:
        """Ask for a page; return the seconds until all of it was there, and its bytes."""
        seconds, body, _ = self._answer(path)
        return seconds, len(body)

    def _answer(self, path: str) -> tuple[float, bytes, str]:
        line = HTTPConnection("127.0.0.1", int(self._host.split(":")[1]), timeout=120)
        began = time.perf_counter()
        line.request("GET", path, None, {"Host": self._host, "Sec-Fetch-Site": "same-origin", "Cookie": self._cookie})
        answer = line.getresponse()
        body = answer.read()
        if answer.status >= 400:
            raise SystemExit(f"{path}: {answer.status}")
        return time.perf_counter() - began, body, answer.headers.get("set-cookie", "")


@contextmanager
def served(*arguments: object) -> Iterator[Asked]:
    """Run the command of a console."""
    command = [sys.executable, "-m", "privet", "console", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    try:
        if process.stdout is None:
            raise SystemExit("the console has no output")
        yield Asked(process, next(line.split()[1] for line in process.stdout if line.startswith("link")))
    finally:
        process.terminate()
        process.wait(30)


def visited(bench: Bench, name: str, asked: Asked, paths: Sequence[str]) -> tuple[list[Check], dict[str, Any]]:
    """Visit every page; return the checks, and the figures of each page."""
    time.sleep(1)
    idle = asked.memory()
    asked.enter()
    first = asked.get(paths[0])
    pages = {path: asked.get(path) for path in paths}
    again = median(asked.get(paths[0])[0] for _ in range(9))
    time.sleep(12)  # what a page needed for a moment has ended
    after, largest = asked.memory(), max(pages, key=lambda path: pages[path][1])
    bench.say(f"{name}: the largest page is {largest}")
    bound = f"< {MOST_SECONDS:g}" if name == "coordinator" else ""
    checks = [
        Check(f"{name}: first page", first[0], "s", bound, first[0] < MOST_SECONDS if bound else None),
        Check(f"{name}: first page, again (median of 9)", again, "s", f"< {MOST_SECONDS:g}", again < MOST_SECONDS),
        Check(f"{name}: slowest page", max(each[0] for each in pages.values()), "s", "", None),
        Check(f"{name}: largest page", pages[largest][1] / 1e3, "kB", "< 200", pages[largest][1] < MOST_BYTES),
        Check(f"{name}: memory, before the first page", idle, "MB", f"< {MOST_MB:g}", idle < MOST_MB),
        Check(f"{name}: memory, after every page", after, "MB", f"< {MOST_MB:g}", after < MOST_MB),
    ]
    return checks, {path: {"seconds": round(each[0], 4), "bytes": each[1]} for path, each in pages.items()}


def coordinators(bench: Bench, folder: Path) -> tuple[list[Check], dict[str, Any]]:
    """Measure the console of a coordinator."""
    count, rounds = (100, 100) if bench.quick else (1000, 2000)
    sites = [f"site-{number:04d}" for number in range(count)]
    with socket.create_server(("127.0.0.1", 0)) as fleet:  # stands for the service
        bench.say(f"making a coordinator with {count} sites, and a run of {rounds} rounds")
        made = consortium(folder / "coordinator", sites, fleet.getsockname()[1])
        run, state = begun(made, sites, rounds)
        size = (run.path / "state.safetensors").stat().st_size / 1e6
        paths = ["/", *(f"/sites?page={number}" for number in range(1, -(-count // 100) + 1))]
        paths += ["/sites?search=9", *(f"/run/large?page={number}" for number in range(1, -(-rounds // 50) + 1))]
        bench.say(f"asking for {len(paths)} pages; the run's state has {size:.0f} MB")
        with served("coordinator", "-C", made.directory) as asked:
            checks, pages = visited(bench, "coordinator", asked, paths)
            stated = (*state.statements, statement(rounds, sites, run.study, state.adapter.digest))
            run.commit(RunState(rounds, state.adapter, statements=stated))
            changed = asked.get("/")[0]
    checks.insert(2, Check("coordinator: first page after a round has closed", changed, "s", "", None))
    return checks, {"sites": count, "rounds": rounds, "state_mb": round(size, 1), "pages": pages}


def sites_console(bench: Bench, folder: Path) -> tuple[list[Check], dict[str, Any]]:
    """Measure the console of a site."""
    rounds = 50 if bench.quick else 2000
    bench.say(f"charging a site's ledger with {rounds} rounds")
    file = spent_site(folder, rounds)
    left = [f"/left?page={number}" for number in range(1, -(-rounds // 100) + 1)]
    with served("site", file) as asked:
        checks, pages = visited(bench, "site", asked, ["/", *left, "/budget", "/privacy", "/checks"])
    return checks, {"rounds": rounds, "pages": pages}


def main() -> None:
    """Measure and print the checks."""
    bench = start("console", __doc__)
    with TemporaryDirectory() as name:
        checks, details = coordinators(bench, Path(name))
        more, own = sites_console(bench, Path(name))
    bench.finish([*checks, *more], {"coordinator": details, "site": own})


if __name__ == "__main__":
    main()
