"""Makes what `test_compat.py` reads. It runs with OLD code: that of the release whose files newer code must go on with.

In a checkout of that code, with this folder copied into it, on a quiet machine::

    python -m tests.compat.make

It uses the `privet` command alone, so that it runs with any version, and `vectors.py`, whose imports are to be set to
that version's. Everything is random but what follows from a simulation's seed, so made anew it is other data: make it
anew only when a change of what is stored or sent is meant, and say so.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

DATA = Path(__file__).parent / "data"
CODE = Path(__file__).parents[2] / "src"
"""The package of this checkout, whichever one is installed."""
WORLD, EXPECTED, VECTORS = DATA / "world.tar.xz", DATA / "expected.json", DATA / "vectors.json"

BASE = "privet_compat_base"
"""A package on no index: the folder of this name in `inputs/`, which is on the path of whoever runs these studies."""
SITES = ("alpha", "beta", "gamma")
LABELS = ("heart", "skin", "bone")
PAD, UNKNOWN, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
COMMAND = "import sys; from privet.common.cli import main; sys.argv[0] = 'privet'; main()"
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "FLWR_TELEMETRY_ENABLED": "0", "COLUMNS": "200"}
QUIET |= {"FLWR_DISABLE_UPDATE_CHECK": "1", "HF_HUB_OFFLINE": "1"}

# What only looks. Each is run in the world's folder; what it prints is in `expected.json`.
POLICY = "--policy consortium/alpha/consortium/log.policy"
LOOKS = (
    "check simulated.toml --json",
    "adapter simulated.toml made/adapter",
    "data simulated.toml test.jsonl consortium/alpha/data/train.csv",
    "privacy finished --json",
    "privacy finished",
    "audit bundle finished --out made/again.tar",
    "audit verify finished.tar --policy finished/log/policy --json",
    "audit verify finished.tar --policy finished/log/policy",
    "audit show finished.tar --policy finished/log/policy",
    "audit prove finished.tar --policy finished/log/policy --leaf 3",
    "audit diff finished.tar finished/public --policy finished/log/policy",
    "audit bundle consortium/coordinator/runs/first --public consortium/coordinator/public --out made/first.tar",
    f"audit verify first.tar {POLICY} --json",
    f"audit show first.tar {POLICY}",
    f"audit prove consortium/coordinator/public {POLICY} --leaf 0",
    f"audit diff first.tar consortium/coordinator/public {POLICY}",
    "privacy consortium/coordinator/runs/first --json",
    "coordinator members -C consortium/coordinator",
    "coordinator status -C consortium/coordinator",
    "coordinator status -C consortium/coordinator --json",
    "site budget consortium/alpha/site.toml",
    "site budget consortium/alpha/site.toml --study third.toml",
    "site budget consortium/beta/site.toml --study third.toml --json",
    "site budget consortium/gamma/site.toml --json",
    "site receipts consortium/alpha/site.toml",
    "site receipts consortium/beta/site.toml --json",
    "site policy consortium/alpha/site.toml",
    "site check consortium/alpha/site.toml first.toml",
    "site check consortium/alpha/site.toml second.toml --json",
    "site check consortium/alpha/site.toml third.toml --json",
    "site check consortium/alpha/site.toml fourth.toml --json",
    'predict finished --text "man chest pain since monday" --text "itchy rash after work" --json',
)
# Files of a database that a command makes anew: what tables they have.
MADE = {"ledger.db": "made/site/state/ledger.db", "members.db": "made/coordinator/members.db"}
MADE |= {"log.sqlite": "made/coordinator/log/log.sqlite"}


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a command of this checkout that works on the world in `folder`."""
    path = os.pathsep.join(map(str, (folder / "inputs", CODE)))
    return {**os.environ, **QUIET, "PYTHONPATH": path, "FLWR_HOME": str(folder / "flwr")}


def command(arguments: Sequence[object]) -> list[str]:
    """Return how to start `privet` in this Python."""
    return [sys.executable, "-c", COMMAND, *map(str, arguments)]


def schema(database: Path) -> list[str]:
    """Return what a database is made of: its pragmas that programs go by, its tables, indexes and triggers."""
    with closing(sqlite3.connect(database)) as opened:
        pragmas = [f"{n} = {opened.execute(f'PRAGMA {n}').fetchone()[0]}" for n in ("application_id", "user_version")]
        rows = opened.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY type, name").fetchall()
    return [*pragmas, *(row[0] for row in rows)]


def machine() -> list[str]:
    """Return what the last bits of a computation depend on."""
    import torch

    models = {line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")}
    return [torch.__version__, torch.backends.cpu.get_cpu_capability(), *sorted(models)]


def closed(run: Path) -> int:
    """Return how many rounds a run has published."""
    return len(list((run / "rounds").glob("*.json"))) if run.is_dir() else 0


class World:
    """A folder in which everything is made, and the programs that run meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs: dict[str, Any] = {}  # as `subprocess.Popen`

    def privet(self, *arguments: object, ok: Sequence[int] = (0,)) -> str:
        """Run one command to its end, in the folder, and return what it printed."""
        done = subprocess.run(
            command(arguments), cwd=self.folder, env=environment(self.folder), capture_output=True, text=True
        )
        if done.returncode not in ok:
            raise RuntimeError(f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def start(self, name: str, *arguments: object) -> None:
        """Start a command that goes on, with its output in `logs/`."""
        (self.folder / "logs").mkdir(exist_ok=True)
        with (self.folder / "logs" / f"{name}.log").open("ab") as log:
            self.programs[name] = subprocess.Popen(
                command(arguments),
                cwd=self.folder,
                env=environment(self.folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def serve(self) -> None:
        """Start the coordinator's service and the sites."""
        self.start("coordinator", "coordinator", "serve", "-C", "consortium/coordinator")
        for name in SITES:
            self.start(name, "site", "serve", f"consortium/{name}/site.toml")

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """End a program."""
        program = self.programs.pop(name)
        program.send_signal(number)
        program.wait(60)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """End all programs with the block."""
        try:
            yield
        finally:
            for name in list(self.programs):
                self.kill(name)

    def until_closed(self, run: str, rounds: int, seconds: float = 300) -> None:
        """Wait until a run has closed so many rounds."""
        deadline = time.monotonic() + seconds
        while closed(self.folder / run) < rounds:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{run}: no {rounds} rounds in {seconds} s")
            time.sleep(0.005)

    def until_listening(self, seconds: float = 60) -> None:
        """Wait until the coordinator's service can be connected to."""
        settings = (self.folder / "consortium" / "coordinator" / "coordinator.toml").read_text()
        deadline = time.monotonic() + seconds
        for port in re.findall(r'(?:address|enrolment|fleet) = "127\.0\.0\.1:(\d+)"', settings):
            while not listens(int(port)):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"nobody listens on port {port}")
                time.sleep(0.05)


def listens(port: int) -> bool:
    """Return whether somebody listens on a port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


# --- inputs ----------------------------------------------------------------------------------------------


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Return texts with a label and a patient; two words tell the label."""
    signs = {"heart": ("chest pain", "fast pulse"), "skin": ("itchy rash", "red patch"), "bone": ("stiff back", "knee")}
    filler, chance = ("man", "woman", "child", "since", "monday", "after", "work", "again"), random.Random(seed)
    found = []
    for index in range(count):
        label = LABELS[index % 3]
        words = [*chance.sample(filler, 3), chance.choice(signs[label]), *f"{seed}{index}"]
        found.append({"text": " ".join(words), "label": label, "patient": f"p{index // 3}"})
    return found


def make_base(folder: Path) -> None:
    """Write a random encoder of one layer with its tokenizer, as `save_pretrained` does."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=[PAD, UNKNOWN, BOS, EOS], show_progress=False)
    tokenizer.train_from_iterator([row["text"] for row in rows(60, 0)], trainer)
    ends = [(BOS, 2), (EOS, 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=ends)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, bos_token=BOS, eos_token=EOS
    )
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(fast),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.2,
    )
    transformers.BertModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def study(name: str, pins: str, seed: int, rounds: int, more: str = "", training: str = "") -> str:
    """Return a masked and private study as TOML."""
    return f"""\
name = "{name}"
seed = {seed}
[model]
base = "package:{BASE}"
[model.sha256]
{pins}
[task]
kind = "text-classification"
labels = {json.dumps(LABELS)}
[data]
columns = {{ text = "text", label = "label" }}
max_length = 32
validation_fraction = 0.2
[lora]
rank = 2
alpha = 4
targets = ["query", "value"]
[training]
rounds = {rounds}
local_steps = 2
sampling_rate = 0.5
learning_rate = 0.02
{training}
[aggregation]
optimizer = "fedavgm"
[cohort]
min_sites = 3
[privacy]
mode = "local"
unit = "record"
epsilon = 8.0
delta = 1e-3
clip_norm = 1.0
[secure_aggregation]
mode = "masked"
{more}"""


SIMULATION = """\
[simulation]
data = "files"
[simulation.partition]
split = "iid"
sites = 4
train = ["train.jsonl"]
test = ["test.jsonl"]
[simulation.resources]
device = "cpu"
precision = "fp32"
threads = 1
"""


def make_inputs(world: World) -> None:
    """Write base, records and studies."""
    folder = world.folder
    make_base(folder / "inputs" / BASE)
    table = world.privet("base", f"inputs/{BASE}")
    pins = table.partition("[model.sha256]\n")[2].partition("#")[0]
    for name, count, seed in (("train", 120, 1), ("test", 30, 2)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(count, seed)))
    (folder / "simulated.toml").write_text(study("simulated", pins, 7, 8, SIMULATION))
    (folder / "first.toml").write_text(study("first", pins, 1, 2))
    (folder / "second.toml").write_text(study("second", pins, 2, 4))
    (folder / "third.toml").write_text(study("third", pins, 3, 2))
    (folder / "fourth.toml").write_text(study("fourth", pins, 4, 30, training='optimizer = "sgd"'))


# --- simulated -------------------------------------------------------------------------------------------


def make_simulated(world: World) -> str:
    """Make a finished run and one killed midway; return the adapter's digest that both have to end at."""
    world.privet("simulate", "simulated.toml", "--out", "finished")
    world.start("interrupted", "simulate", "simulated.toml", "--out", "interrupted")
    with world.ending():
        world.until_closed("interrupted", 3)
    if closed(world.folder / "interrupted") > 6:
        raise RuntimeError("the kill came too late")
    world.privet("audit", "bundle", "finished", "--out", "finished.tar")
    return str(json.loads((world.folder / "finished" / "summary.json").read_text())["adapter_digest"])


# --- deployed --------------------------------------------------------------------------------------------


def enrol(world: World, name: str) -> None:
    """Let a site join."""
    coordinator = ("-C", "consortium/coordinator")
    token, site = f"consortium/{name}.token", f"consortium/{name}"
    (world.folder / token).write_text(world.privet("coordinator", "invite", name, *coordinator).strip())
    asked = world.privet("site", "join", f"@{token}", site)
    (told,) = re.findall(r"^fingerprint +(.+)$", asked, re.MULTILINE)
    world.privet("coordinator", "approve", name, "--fingerprint", told.strip(), *coordinator)
    world.privet("site", "join", f"@{token}", site)
    (world.folder / token).unlink()


def equip(world: World, name: str, seed: int, peers: dict[str, str]) -> None:
    """Complete a site's file, policy and ledger, and approve two studies."""
    folder, site = world.folder / "consortium" / name, f"consortium/{name}/site.toml"
    (folder / "data").mkdir()
    lines = ["text,label,patient", *(",".join(row.values()) for row in rows(90, seed))]
    (folder / "data" / "train.csv").write_text("\n".join(lines) + "\n")
    text = (folder / "site.toml").read_text().split("[peers]")[0]
    text = text.replace("# declared_count = 1200 ", "declared_count = 90 ")
    text = text.replace('# anchor = "/mnt/other-disk/ledger-head.json"', 'anchor = "anchor/ledger-head.json"')
    text = text.replace("# anchor_same_disk = true ", "anchor_same_disk = true ")
    text += '[limit]\nunit = "record"\nepsilon = 24.0\ndelta = 0.001\n[peers]\n'
    text += "".join(f'{peer} = "{key}"\n' for peer, key in sorted(peers.items()))
    text += '[resources]\ndevice = "cpu"\nthreads = 1\n'
    (folder / "site.toml").write_text(text)
    world.privet("site", "policy", site, "--init")
    world.privet("site", "roster", site, "--accept")
    world.privet("site", "init", site)
    base = re.findall(r"base +(sha256:\w+)", world.privet("site", "check", site, "first.toml", ok=(3,)))[0]
    policy = (folder / "policy.toml").read_text()
    changes = {
        "bases = []": f'bases = ["{base}"]',
        'unit = "patient"': 'unit = "record"',
        "max_epsilon = 2.0": "max_epsilon = 8.0",
        "max_delta = 1e-6": "max_delta = 1e-3",
        "max_epsilon_alone = 2.0": "max_epsilon_alone = 8.0",
        "min_noise_multiplier = 0.6": "min_noise_multiplier = 0.4",
        "min_units = 500": "min_units = 90",
        "min_threshold = 3": "min_threshold = 2",
        "allow = []": 'allow = ["validation"]',
        "max_studies_per_day = 2": "max_studies_per_day = 9",
    }
    for old, new in changes.items():
        policy = policy.replace(old, new, 1)
    (folder / "policy.toml").write_text(policy)
    for each in ("first.toml", "second.toml", "third.toml"):
        world.privet("site", "approve", site, each)


def make_consortium(world: World) -> list[int]:
    """Make a coordinator and three sites, a study that they ended, and one in which all were killed."""
    ports = free_ports(3)
    member, joining, fleet = (f"127.0.0.1:{port}" for port in ports)
    addresses = ("--address", member, "--enrolment", joining, "--fleet", fleet)
    world.privet("coordinator", "init", "consortium/coordinator", "--name", "demo", "--no-passphrase", *addresses)
    with world.ending():
        world.start("coordinator", "coordinator", "serve", "-C", "consortium/coordinator")
        world.until_listening()
        for name in SITES:
            enrol(world, name)
        world.privet("coordinator", "found", "-C", "consortium/coordinator")
        requests = {name: f"consortium/{name}/consortium/request.json" for name in SITES}
        peers = {n: json.loads((world.folder / file).read_text())["keys"]["identity"] for n, file in requests.items()}
        for seed, name in enumerate(SITES):
            equip(world, name, 10 + seed, peers)
        for each in ("first", "second", "third"):
            world.privet("adapter", f"{each}.toml", f"start/{each}")
        for name in SITES:
            world.start(name, "site", "serve", f"consortium/{name}/site.toml")
        run = ("coordinator", "run", "-C", "consortium/coordinator", "--gather", 120)
        world.privet(*run, "first.toml", "--adapter", "start/first")
        world.start("run", *run, "second.toml", "--adapter", "start/second")
        world.until_closed("consortium/coordinator/runs/second", 2)
        for name in ("run", *SITES, "coordinator"):
            world.kill(name)
    if closed(world.folder / "consortium/coordinator/runs/second") == 4:
        raise RuntimeError("the kill came too late")
    let_expire(world)
    first = ("consortium/coordinator/runs/first", "--public", "consortium/coordinator/public")
    world.privet("audit", "bundle", *first, "--out", "first.tar")
    return ports


def let_expire(world: World) -> None:
    """Leave each site with a certificate that holds for seconds: whenever it is looked at, it has expired."""
    settings = world.folder / "consortium" / "coordinator" / "coordinator.toml"
    text = settings.read_text()
    settings.write_text(re.sub(r"^certificate_days = .*$", "certificate_days = 0.0002", text, flags=re.MULTILINE))
    world.start("coordinator", "coordinator", "serve", "-C", "consortium/coordinator")
    with world.ending():
        world.until_listening()
        for name in SITES:
            world.privet("site", "renew", f"consortium/{name}/site.toml", "--force")
    settings.write_text(text)


# --- what is expected ------------------------------------------------------------------------------------


def make_anew(world: World) -> None:
    """Make a ledger, a members' file and a log, whose tables are looked at."""
    addresses = ("--address", "127.0.0.1:9443")
    world.privet("coordinator", "init", "made/coordinator", "--name", "north", "--no-passphrase", *addresses)
    site = world.folder / "made" / "site"
    site.mkdir()
    world.privet("site", "identity", site / "identity.pem")
    (site / "train.jsonl").write_text("")
    keys = 'name = "oslo"\ntrain = ["train.jsonl"]\ndataset = "notes"\nledger = "state/ledger.db"\n'
    keys += 'anchor = "anchor/ledger-head.json"\nanchor_same_disk = true\n'
    (site / "site.toml").write_text(keys + 'identity = "identity.pem"\n')
    world.privet("site", "init", site / "site.toml")


def make() -> None:
    """Write the files in `data/`."""
    from tests.compat import vectors

    DATA.mkdir(exist_ok=True)
    VECTORS.write_text(json.dumps({name: data.hex() for name, data in vectors.build().items()}, indent=1) + "\n")
    with TemporaryDirectory() as name:
        world = World(Path(name) / "world")
        world.folder.mkdir()
        make_inputs(world)
        digest = make_simulated(world)
        ports = make_consortium(world)
        for left in ("logs", "flwr", "made"):
            shutil.rmtree(world.folder / left, ignore_errors=True)
        for figure in world.folder.glob("*/curves.png"):
            figure.unlink()
        pack(world.folder)
        expected: dict[str, Any] = {"adapter": digest, "ports": ports, "machine": machine(), "errors": vectors.errors()}
        (world.folder / "made").mkdir()
        expected["looks"] = {look: world.privet(*shlex.split(look), ok=(0, 3)) for look in LOOKS}
        told = json.loads(expected["looks"]["privacy finished --json"])
        expected["versions"] = told["versions"]
        make_anew(world)
        expected["schemas"] = {file: schema(world.folder / path) for file, path in MADE.items()}
    EXPECTED.write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


def pack(folder: Path) -> None:
    """Pack the world, its files' modes among it."""
    with tarfile.open(WORLD, "w:xz", preset=9) as archive:
        archive.add(folder, "world", filter=lambda entry: None if entry.name.endswith("-shm") else entry)


if __name__ == "__main__":
    make()
