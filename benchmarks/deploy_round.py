"""The cost of deployment in a round: three resident sites on loopback, over TLS, against Flower's stock SuperNodes.

* exchange: one small message to each of three sites and back, median; for the stock engine Flower's own
  `send_and_receive` against three `flower-supernode`s, without TLS and node authentication, which favours it.
* round: all five exchanges of a round under secure aggregation with nothing to train, from opening to closing.
* 64 MB: an update of that size from each of three sites, all at once, from asking to having all.

Sites are processes of their own. Wall-clock time: see the load in the result.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from harness import Bench, Check, start

from privet.client.network.fleet import FleetLink, connected
from privet.client.network.node import Connection, NodeState
from privet.client.rounds.masked import MaskedRounds
from privet.common.errors import PrivetError
from privet.common.secagg.site import Identity
from privet.common.secagg.terms import Floor
from privet.common.study.adapter import Adapter, AdapterSpec, TensorSpec
from privet.common.study.messages import Consent, Contribution, Failure, Message, Offer, RoundOpen, Secured
from privet.common.study.study import Study
from privet.server.network.grid import GridExchange
from privet.server.network.link import Link
from privet.server.network.superlink import Endpoint, FleetServer
from privet.server.rounds.consent import gather_participants
from privet.server.rounds.rounds import open_round, run_round
from privet.server.rounds.run_log import Unlogged
from privet.server.rounds.state import RunDirectory, RunState
from privet.server.rounds.timing import Timing
from privet.simulations.deploy import free_ports

SITES = 3
NAMES = ("alder", "birch", "cedar")
# About what MiniLM's adapter of rank 16 has: 74 thousand values to train, 0.6 MB to send.
SPEC = AdapterSpec.of(
    [TensorSpec(f"layer.{i}.lora_A.weight", (16, 384), "lora_A") for i in range(12)]
    + [TensorSpec(f"layer.{i}.lora_B.weight", (384, 16), "lora_B") for i in range(12)]
)
STUDY = Study.parse(
    {
        "name": "deploy-round",
        "model": {"base": "nowhere", "sha256": {"model.safetensors": "0" * 64}},
        "task": {"kind": "text-classification", "labels": ["no", "yes"]},
        "data": {"columns": {"text": "text", "label": "label"}},
        "lora": {"rank": 16, "targets": ["m"]},
        "training": {"learning_rate": 0.1, "rounds": 50, "local_steps": 2, "sampling_rate": 0.1},
        "aggregation": {"max_norm": 1e9, "largest_count": 60},
        "cohort": {"min_sites": SITES},
        "privacy": {"mode": "none"},
        "secure_aggregation": {"mode": "masked", "bound": 8.0},
    }
)
# The stock engine's apps, as anybody would write them.
STOCK = """
import json, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()

@client.query()
def query(message, context):
    return Message(RecordDict({"a": ConfigRecord({"b": b""})}), reply_to=message)

@server.main()
def main(grid, context):
    config, seconds = context.run_config, []
    while len(nodes := list(grid.get_node_ids())) < config["sites"]:
        time.sleep(0.5)
    for _ in range(config["exchanges"]):
        began = time.perf_counter()
        asked = [Message(RecordDict({"a": ConfigRecord({"b": b""})}), node, "query") for node in nodes]
        replies = list(grid.send_and_receive(asked, timeout=120))
        seconds.append(time.perf_counter() - began)
        if len(replies) < len(nodes) or any(reply.has_error() for reply in replies):
            raise RuntimeError("a reply is missing")
    Path(config["result"]).write_text(json.dumps(seconds))
"""
STOCK_PROJECT = """
[project]
name = "stock"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "stock:server"
clientapp = "stock:client"
[tool.flwr.app.config]
sites = 3
exchanges = 3
result = ""
"""


class Site:
    """A site without a model: consents, takes part in masked rounds with a fixed update, and sends what it is asked."""

    def __init__(self, name: str) -> None:
        self.name, self.key = name, identity(name)
        pins = {other: identity(other).public_key().public_bytes_raw() for other in NAMES}
        self.rounds = MaskedRounds(Identity(name, self.key), pins, Floor(), lambda entry: None)

    def answer(self, read: Callable[[], Message]) -> Message:
        """Return the answer to a message."""
        try:
            return self._answer(read())
        except PrivetError as error:
            return Failure(type(error).__name__, error.message, error.hint)

    def _answer(self, asked: Message) -> Message:
        if isinstance(asked, Offer):
            consent = Consent(self.name, STUDY.digest, SPEC.digest, 10, self.key.public_key().public_bytes_raw().hex())
            return replace(consent, proof=self.key.sign(consent.signed(asked.run, asked.node)).hex())
        if isinstance(asked, RoundOpen):
            return self.rounds.open(STUDY, SPEC, asked, 10, os.urandom, self.contribute)
        if isinstance(asked, Secured) and asked.study == "size":
            return Secured("size", 1, "nonce", os.urandom(asked.round))
        if isinstance(asked, Secured):
            return self.rounds.answer(asked, self.contribute)
        return Failure("Unexpected", asked.kind, "")

    def contribute(self, opened: RoundOpen) -> Contribution:
        """Return the same small update each round."""
        trained = sum(tensor.size for tensor in SPEC.trained(STUDY.aggregation.method))
        update = np.full(trained, 0.01, np.float32)
        return Contribution(self.name, opened.round, opened.nonce, 10.0, 10 * update, np.empty(0))

    def answered(self, kind: str, seconds: float) -> None:
        """Count nothing."""

    def connected(self, up: bool) -> None:
        """Count nothing."""

    def retried(self) -> None:
        """Count nothing."""


def identity(name: str) -> Ed25519PrivateKey:
    """Return a site's key; for measuring only."""
    return Ed25519PrivateKey.from_private_bytes(name.encode().ljust(32, b"."))


def serve(folder: Path, name: str, port: int) -> None:
    """Be one site, until killed."""
    site = Site(name)
    key = load_pem_private_key((folder / f"{name}.key").read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("not a node key")
    with connected(FleetLink(f"127.0.0.1:{port}", (folder / "server.pem").read_bytes(), key, 2**30)) as link:
        Connection(link, site.answer, NodeState(folder / f"{name}.state"), site).serve()


def write_certificate(folder: Path) -> None:
    """Write a server certificate that is its own root."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "benchmark")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=1))
    local = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = builder.add_extension(local, critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    (folder / "server.pem").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    (folder / "server.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def flowers_programs() -> Path:
    """Return the directory of Flower's commands, wherever it is installed."""
    found = [file for file in distribution("flwr").files or () if file.name == "flower-superlink"]
    if not found:
        raise FileNotFoundError("flower-superlink was not found: install flwr with its commands")
    return Path(str(found[0].locate())).resolve().parent


@contextmanager
def process(*command: str, folder: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program with its output in a file, and end it with the block."""
    path = f"{flowers_programs()}:{os.environ['PATH']}"
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "FLWR_TELEMETRY_ENABLED": "0", "PATH": path}
    with (folder / f"{Path(command[0]).name}.log").open("ab") as log:
        started = subprocess.Popen(
            command, env={**os.environ, **quiet, **environment}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(10)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


@contextmanager
def deployment(folder: Path) -> Iterator[GridExchange]:
    """Serve three sites in processes of their own, and yield an exchange with them."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    write_certificate(folder)
    link = Link(folder / "link.db")
    for name in NAMES:
        key = ec.generate_private_key(ec.SECP384R1())
        (folder / f"{name}.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        link.register(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    endpoint = Endpoint("127.0.0.1", 0, folder / "server.pem", folder / "server.key")
    with FleetServer(link, endpoint) as server, link.run() as grid, ExitStack() as stack:
        for name in NAMES:
            command = (sys.executable, __file__, "site", str(folder), name, str(server.port))
            stack.enter_context(process(*command, folder=folder))
        exchange = GridExchange(grid, 0.02)
        wait_for(lambda: len(exchange.nodes()) == SITES)
        yield exchange


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the sites did not connect in time")
        time.sleep(0.05)


def exchanges(exchange: GridExchange, size: int, count: int) -> list[float]:
    """Return the seconds that each of `count` exchanges took in which every site sends `size` bytes."""
    seconds = []
    for number in range(count):
        began = time.perf_counter()
        asked = {node: Secured("size", size, f"{number}", b"") for node in exchange.nodes()}
        replies = dict(exchange.ask(asked, timeout=120))
        seconds.append(time.perf_counter() - began)
        if [len(r.body) for r in replies.values() if isinstance(r, Secured)] != [size] * SITES:
            raise RuntimeError(f"not all sites answered: {replies.keys()}")
    return seconds


def rounds(exchange: GridExchange, count: int) -> list[float]:
    """Return the seconds of each of `count` masked rounds without training."""
    values = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in SPEC.tensors}
    values |= {t.name: np.full(t.shape, 0.05, np.float32) for t in SPEC.tensors if t.role == "lora_A"}
    state, seconds = RunState(0, Adapter(SPEC, values)), []
    members = gather_participants(exchange, Unlogged(RunDirectory(Path(), STUDY, "")), state.adapter, 60.0, {})
    for _ in range(count):
        began = time.perf_counter()
        opened = open_round(STUDY, state, members)
        state = run_round(STUDY, state, exchange, members, opened, Timing(60, 60, 60))
        seconds.append(time.perf_counter() - began)
        if state.statements[-1]["type"] != "round-close":
            raise RuntimeError(str(state.statements[-1]))
    return seconds


def stock(folder: Path, count: int) -> list[float]:
    """Return the seconds of each of `count` exchanges with three of Flower's own SuperNodes."""
    home, app, result = folder / "home", folder / "app", folder / "stock.json"
    for made in (home, app):
        made.mkdir()
    (app / "pyproject.toml").write_text(STOCK_PROJECT)
    (app / "stock.py").write_text(STOCK)
    link, *nodes = free_ports(1 + SITES)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    environment = {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
    }

    def flower(*command: str) -> Any:
        return process(*command, folder=folder, **environment)

    with ExitStack() as stack:
        superlink = ("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(link))
        offline = ("--disable-runtime-dependency-installation", "--database", str(folder / "stock.db"))
        stack.enter_context(flower(*superlink, *offline))
        wait_for(lambda: answers(link))
        for port in nodes:
            supernode = ("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}")
            stack.enter_context(flower(*supernode, "--host", "127.0.0.1", "--port", str(port)))
        config = f"exchanges={count} result={str(result)!r}".replace("'", '"')
        submitted = stack.enter_context(flower("flwr", "run", str(app), "here", "-c", config))
        if submitted.wait(120):
            raise RuntimeError(f"flwr run: {(folder / 'flwr.log').read_text()[-2000:]}")
        wait_for(result.is_file, 180.0 + 30 * count)
        time.sleep(0.2)
    seconds: list[float] = json.loads(result.read_text())
    return seconds


def answers(port: int) -> bool:
    """Return whether something listens on a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def main() -> None:
    """Measure everything in one run."""
    bench: Bench = start("deploy_round", __doc__)
    large = (8 if bench.quick else 64) * 2**20
    with TemporaryDirectory() as name:
        folder = Path(name)
        with deployment(folder) as exchange:
            cpu, count = time.process_time(), 8 if bench.quick else 30
            small = exchanges(exchange, 1, count)
            cpu = (time.process_time() - cpu) / count
            bench.say(f"exchange            median {statistics.median(small):.2f} s, most {max(small):.2f} s")
            bench.say(f"                    {1000 * cpu:.0f} ms of CPU at the coordinator")
            masked = rounds(exchange, 2 if bench.quick else 7)
            bench.say(f"round, five stages  median {statistics.median(masked):.2f} s, most {max(masked):.2f} s")
            large_cpu, count = time.process_time(), 1 if bench.quick else 3
            moved = exchanges(exchange, large, count)
            large_cpu = (time.process_time() - large_cpu) / count
            bench.say(f"{large >> 20} MB per site      median {statistics.median(moved):.2f} s")
            bench.say(f"                    {large_cpu:.1f} s of CPU at the coordinator, for all three")
        slow = [] if bench.quick else stock(folder, 5)
    checks = [
        Check("one exchange with three sites, median", statistics.median(small), "s", "<= 1.0", None),
        Check("a masked round beyond training, median", statistics.median(masked), "s", "<= 6.0", None),
        Check(f"{large >> 20} MB per site, median", statistics.median(moved), "s", "< 10", None),
    ]
    met = [value.value < limit for value, limit in zip(checks, (1.0, 6.0, 10.0), strict=True)]
    checks = [Check(c.name, c.value, c.unit, c.target, ok) for c, ok in zip(checks, met, strict=True)]
    if slow:
        bench.say(f"stock SuperNodes    median {statistics.median(slow):.2f} s")
        checks.append(Check("the stock engine's exchange, median", statistics.median(slow), "s", "", None))
    cost = {"coordinator_cpu_per_exchange": cpu, "coordinator_cpu_large": large_cpu}
    bench.finish(checks, {"exchange": small, "round": masked, "large": moved, "stock": slow, **cost})


if __name__ == "__main__":
    if sys.argv[1:2] == ["site"]:
        serve(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        main()
