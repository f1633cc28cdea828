"""Faults at a site's privacy ledger: count the releases that are uncharged, charged twice, or beyond the limit.

    python benchmarks/ledger_faults.py [--quick] [--json] [--seed N] [--save]

The same faults are injected into the ledger and into a naive one (a JSON file, charged after sending). The naive ledger
fails, which shows that the benchmark detects failures. A site releases round after round: reserve, begin, train (1 ms,
with bytes that are never the same), charge, send. A directory stands in for the network. To send is to create a file
whose name holds round and mark. Afterwards the files are compared with the charges.

* SIGKILL at a random moment within 30 ms of work. The next process begins with the last round sent, as if its answer
  had been lost. A round that began and was not charged is lost, and the process goes on with the next one.
* Eight processes, 20 attempts each, at a limit of 10 releases.
* A disk that is full, by a limit on the file size, in the middle of the work.
* An old copy of the file put back, the file wiped, another one in its place, its write-ahead log deleted: with an
  anchor, none of them may open.

A kill does not test power loss: data in the system's file cache survives a kill.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import statistics
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Protocol

from harness import Bench, Check, start

from privet.client.budget.accounts import Cost, Item, Limit, RoundKey, composed_epsilon, counted_epsilon
from privet.client.budget.ledger import Ledger
from privet.client.budget.sealing import Sealer, key_beside
from privet.common.canonical import digest
from privet.common.errors import BudgetExhaustedError, PrivetError, RefusedError, SpentRoundError, StateError
from privet.common.privacy.accounting import PrivacyEvent

STUDY = digest(b"study")
INPUTS = digest(b"inputs")
PLANNED = 10_000
# So much noise that all of them are within the limit: the kills are not about it.
LONG = (Cost(PrivacyEvent(100.0, 1.0, 1, "record")), Limit("record", 10.0, 1e-5))
DEAR = Cost(PrivacyEvent(8.0, 1.0, 1, "record"))
AT_MOST = 10
WORKERS, ATTEMPTS = 8, 20


def _tight() -> Limit:
    """Return a limit that covers so many studies of one dear round, and not one more."""
    items = [Item(digest(bytes([number])), DEAR, False, 1) for number in range(AT_MOST + 1)]
    limit = Limit("record", 1.0, 1e-5)
    while counted_epsilon(items[:AT_MOST], limit) > limit.epsilon:
        limit = replace(limit, epsilon=limit.epsilon * 1.01)
    if counted_epsilon(items, limit) <= limit.epsilon:
        raise SystemExit("the limit covers more rounds than this benchmark counts on")
    return limit


TIGHT = _tight()


class Book(Protocol):
    """A ledger under test. `pay` calls `send` with what it releases."""

    def pay(self, release: RoundKey, send: Callable[[bytes], None]) -> None:
        """Release a round of the long study."""

    def buy(self, release: RoundKey, send: Callable[[bytes], None]) -> None:
        """Release one of the dear rounds, if the limit covers it."""

    def charges(self) -> dict[tuple[str, int], str]:
        """Return the mark charged for each study and round."""

    def mark(self, payload: bytes) -> str:
        """Return the mark of a payload."""


class Ours:
    """The ledger, with an anchor."""

    name = "ledger"

    def __init__(self, root: Path) -> None:
        self.file, self.anchor = root / "ledger" / "site.db", root / "anchor" / "head"
        if not self.file.parent.exists():
            self.file.parent.mkdir()
            self.anchor.parent.mkdir()
            Ledger.create(self.file, self.anchor).close()
        self.ledger = Ledger.open(self.file, self.anchor)

    def pay(self, release: RoundKey, send: Callable[[bytes], None]) -> None:
        """Reserve, begin, train, charge, send, acknowledge."""
        self._release(release, *LONG, PLANNED, send)

    def buy(self, release: RoundKey, send: Callable[[bytes], None]) -> None:
        """Do the same for a study of one round."""
        self._release(release, DEAR, TIGHT, 1, send)

    def _release(
        self, release: RoundKey, cost: Cost, limit: Limit, planned: int, send: Callable[[bytes], None]
    ) -> None:
        payload = self.ledger.reserve(release, cost, INPUTS, limit, planned)
        if payload is None:
            self.ledger.begin(release)
            payload = train()
            self.ledger.charge(release, payload)
        send(payload)
        self.ledger.acknowledge(release)

    def charges(self) -> dict[tuple[str, int], str]:
        """Verify the file and read the charges out of it."""
        self.ledger.verify()
        with sqlite3.connect(f"{self.file.as_uri()}?mode=ro", uri=True) as database:
            rows = database.execute("SELECT study, round, payload FROM entries WHERE kind = 'charge'").fetchall()
        return {(study, number): payload for study, number, payload in rows}

    def mark(self, payload: bytes) -> str:
        """Return its HMAC under the ledger's key."""
        return Sealer(key_beside(self.file)).mark(payload)


class Naive:
    """What one writes first: a JSON file, read before and written after sending; what cannot be read is new."""

    name = "naive"

    def __init__(self, root: Path) -> None:
        self.file = root / "ledger.json"

    def pay(self, release: RoundKey, send: Callable[[bytes], None]) -> None:
        """Train, send, then charge."""
        self._release(release, PLANNED, send)

    def buy(self, release: RoundKey, send: Callable[[bytes], None]) -> None:
        """Do the same up to the limit."""
        self._release(release, AT_MOST, send)

    def _release(self, release: RoundKey, most: int, send: Callable[[bytes], None]) -> None:
        spent = self._read()
        if len(spent) >= most:
            raise BudgetExhaustedError("the limit is reached")
        payload = train()
        send(payload)
        spent[f"{release.study} {release.round}"] = digest(payload)
        self.file.write_text(json.dumps(spent), encoding="utf-8")

    def mark(self, payload: bytes) -> str:
        """Return its digest."""
        return digest(payload)

    def _read(self) -> dict[str, str]:
        try:
            found: dict[str, str] = json.loads(self.file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return found

    def charges(self) -> dict[tuple[str, int], str]:
        """Read the charges."""
        pairs = ((key.split(" "), value) for key, value in self._read().items())
        return {(study, int(number)): value for (study, number), value in pairs}


def train() -> bytes:
    """Stand in for a round of training: a millisecond, and noise that is never the same."""
    time.sleep(0.001)
    return os.urandom(256)


@dataclass(frozen=True)
class Network:
    """What has left the site: an empty file for each time something was sent, as a name is whole or not there."""

    directory: Path

    def sender(self, release: RoundKey, book: Book) -> Callable[[bytes], None]:
        """Return what sends a release."""
        self.directory.mkdir(exist_ok=True)

        def send(payload: bytes) -> None:
            when = f"{time.time_ns()}.{os.getpid()}"
            (self.directory / f"{release.study} {release.round} {book.mark(payload)} {when}").touch(exist_ok=False)

        return send

    def sent(self) -> list[tuple[tuple[str, int], str]]:
        """Return study, round and mark of all that was sent."""
        if not self.directory.exists():
            return []
        names = (file.name.split(" ") for file in self.directory.iterdir())
        return [((study, int(number)), found) for study, number, found, _ in names]


def judge(book: Book, network: Network) -> Counter[str]:
    """Hold what was sent against what was charged."""
    sent, charges = network.sent(), book.charges()
    payloads: dict[tuple[str, int], set[str]] = {}
    for key, found in sent:
        payloads.setdefault(key, set()).add(found)
    return Counter(
        sent=len(sent),
        releases=len(payloads),
        charges=len(charges),
        uncharged=sum(len(found - {charges.get(key, "")}) for key, found in payloads.items()),
        two_payloads=sum(len(found) > 1 for found in payloads.values()),
        sent_again=len(sent) - sum(map(len, payloads.values())),
    )


@contextmanager
def room() -> Iterator[Path]:
    """Give a directory that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="ledger-faults-") as name:
        yield Path(name)


def spawn(work: Callable[[Callable[[], object]], None]) -> tuple[int, int]:
    """Run `work(ready)` in a forked process; return its id and a pipe that holds a byte once it has called `ready`."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    code = 1
    try:
        work(lambda: os.write(writer, b"!"))
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)


def wait(child: int) -> int:
    """Wait for a process and return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def serve(make: Callable[[Path], Book], root: Path, ready: Callable[[], object]) -> None:
    """Release rounds until the end, beginning with the last one sent: its answer may have been lost."""
    network, book = Network(root / "network"), make(root)
    last = max((number for (_, number), _ in network.sent()), default=1)
    ready()
    for number in count(last):
        release = RoundKey("notes", STUDY, number)
        try:
            book.pay(release, network.sender(release, book))
        except SpentRoundError:
            continue  # it was killed in training
        except RefusedError:
            if number != last:  # that one alone may be gone, as it arrived and the next was charged
                raise


def kills(make: Callable[[Path], Book], times: int, rng: random.Random) -> Counter[str]:
    """Kill a working site again and again."""
    with room() as root:
        for _ in range(times):
            child, reader = spawn(lambda ready: serve(make, root, ready))
            begun = os.read(reader, 1)
            os.close(reader)
            time.sleep(rng.uniform(0, 0.030))
            os.kill(child, signal.SIGKILL)
            if wait(child) != -signal.SIGKILL or not begun:
                raise SystemExit("a site process ended with an error: read it above")
        return judge(make(root), Network(root / "network"))


def crowd(make: Callable[[Path], Book]) -> Counter[str]:
    """Let eight processes run for the last releases that a limit covers."""
    with room() as root:
        make(root)
        gate, go = os.pipe()

        def attempt(worker: int, ready: Callable[[], object]) -> None:
            os.close(go)
            book, network = make(root), Network(root / "network")
            ready()
            os.read(gate, 1)  # returns in all of them once the parent closes its end
            for number in range(1, ATTEMPTS + 1):
                release = RoundKey("notes", digest(f"{worker} {number}".encode()), 1)
                try:
                    book.buy(release, network.sender(release, book))
                except BudgetExhaustedError:
                    continue

        children = [spawn(lambda ready, worker=worker: attempt(worker, ready)) for worker in range(WORKERS)]  # type: ignore[misc]
        for _, reader in children:
            os.read(reader, 1)
            os.close(reader)
        os.close(go)
        failed = sum(wait(child) != 0 for child, _ in children)
        if failed:
            raise SystemExit("a process failed with an error: read it above")
        os.close(gate)
        return judge(make(root), Network(root / "network"))


def full_disk(make: Callable[[Path], Book], room_left: int) -> Counter[str]:
    """Let no file grow beyond `room_left` more bytes than the largest has, and see what gets out."""
    with room() as root:

        def work(ready: Callable[[], object]) -> None:
            network, book = Network(root / "network"), make(root)
            for number in range(1, 6):
                release = RoundKey("notes", STUDY, number)
                book.pay(release, network.sender(release, book))
            largest = max(file.stat().st_size for file in root.rglob("*") if file.is_file())
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest + room_left, largest + room_left))
            try:
                for number in count(6):
                    release = RoundKey("notes", STUDY, number)
                    book.pay(release, network.sender(release, book))
            except (StateError, OSError):
                ready()

        child, reader = spawn(work)
        failed = os.read(reader, 1)
        os.close(reader)
        if wait(child) or not failed:
            raise SystemExit("the process did not report the full disk: read the error above")
        return judge(make(root), Network(root / "network"))


def old_files() -> dict[str, str]:
    """Put back, wipe and replace a file under its anchor; return what each attempt to go on met."""
    found: dict[str, str] = {}
    with room() as root:
        book = Ours(root)
        names = [RoundKey("notes", STUDY, number) for number in range(1, 7)]

        def copy(to: str) -> None:
            shutil.copytree(book.file.parent, root / to)

        def attempt(name: str, go_on: Callable[[], object]) -> None:
            try:
                go_on()
                found[name] = "opened"
            except PrivetError as error:
                found[name] = type(error).__name__

        for name in names[:3]:
            book.pay(name, lambda payload: None)
        copy("old")
        for name in names[3:]:
            book.pay(name, lambda payload: None)
        copy("new")

        def put(back: str) -> None:
            shutil.rmtree(book.file.parent)
            shutil.copytree(root / back, book.file.parent)

        book.ledger.close()
        put("old")
        attempt("backup put back", lambda: Ledger.open(book.file, book.anchor))
        put("new")
        book.file.with_name("site.db-wal").unlink()
        attempt("write-ahead log deleted", lambda: Ledger.open(book.file, book.anchor))
        put("new")
        book.file.write_bytes(b"")
        attempt("emptied", lambda: Ledger.open(book.file, book.anchor))
        shutil.rmtree(book.file.parent)
        book.file.parent.mkdir()
        attempt("deleted", lambda: Ledger.open(book.file, book.anchor))
        attempt("created again", lambda: Ledger.create(book.file, book.anchor))
        Ledger.create(book.file).close()
        attempt("new file in its place", lambda: Ledger.open(book.file, book.anchor))
        book.anchor.unlink()
        attempt("anchor deleted", lambda: Ledger.open(book.file, book.anchor))
    return found


def speed(payload: bytes, rounds: int) -> dict[str, float]:
    """Return the milliseconds of a reserve and a charge, median and worst."""
    with room() as root:
        ledger, taken = Ours(root).ledger, []
        for number in range(1, rounds + 1):
            release, begin = RoundKey("notes", STUDY, number), time.perf_counter()
            ledger.reserve(release, LONG[0], INPUTS, LONG[1], PLANNED)
            ledger.begin(release)
            ledger.charge(release, payload)
            taken.append(1e3 * (time.perf_counter() - begin))
            ledger.acknowledge(release)
    return {"bytes": len(payload), "rounds": rounds, "median_ms": statistics.median(taken), "worst_ms": max(taken)}


def run(bench: Bench) -> None:
    """Do all of it for both, and print what was found."""
    times, trials, disks = (30, 1, 3) if bench.quick else (300, 10, 20)
    for rounds in range(AT_MOST + 2):
        composed_epsilon([(DEAR, rounds)], TIGHT)  # known before the processes part
    composed_epsilon([(LONG[0], PLANNED)], LONG[1])
    details: dict[str, object] = {}
    checks: list[Check] = []
    for make in (Ours, Naive):
        rng = random.Random(bench.seed)  # noqa: S311 - chooses moments
        bad = "0" if make is Ours else "> 0 (found)"
        killed = kills(make, times, rng)
        bench.say(f"{make.name}: {times} kills: {dict(killed)}")
        crowds = [crowd(make) for _ in range(trials)]
        released = [each["releases"] for each in crowds]
        bench.say(f"{make.name}: {trials} crowds at a limit of {AT_MOST}: released {released}")
        filled: Counter[str] = sum((full_disk(make, rng.randrange(100, 60_000)) for _ in range(disks)), Counter())
        bench.say(f"{make.name}: {disks} full disks: {dict(filled)}")
        details[make.name] = {"kills": killed, "crowds": released, "full_disks": filled}
        over = sum(max(number - AT_MOST, 0) for number in released)
        figures = {
            f"{times} kills, uncharged releases": killed["uncharged"],
            f"{times} kills, charges with two payloads": killed["two_payloads"],
            f"{trials} x {WORKERS} processes, releases beyond the limit": over,
            f"{disks} full disks, uncharged releases": filled["uncharged"],
        }
        for name, value in figures.items():
            checks.append(Check(f"{make.name}: {name}", value, "", bad, (value == 0) == (make is Ours)))
        if make is Ours:
            short = sum(max(AT_MOST - number, 0) for number in released)
            checks.append(Check(f"ledger: {trials} crowds, releases short of the limit", short, "", "0", short == 0))
    outcomes = old_files()
    bench.say(f"ledger: {outcomes}")
    opened = sum(outcome == "opened" for outcome in outcomes.values())
    checks.append(Check(f"ledger: {len(outcomes)} old, wiped or new files, opened", opened, "", "0", opened == 0))
    small, large = speed(os.urandom(1000), 200), speed(os.urandom(64 << 20), 1 if bench.quick else 5)
    checks.append(Check("ledger: reserve and charge, 1 kB", small["median_ms"], "ms", "", None))
    checks.append(Check("ledger: reserve and charge, 64 MiB", large["median_ms"], "ms", "", None))
    bench.finish(checks, {**details, "old_files": outcomes, "speed": [small, large]})


if __name__ == "__main__":
    run(start("ledger_faults", __doc__))
