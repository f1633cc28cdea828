"""The run directory: a run killed anywhere continues to the very bits it would have reached, or says why not."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from privet.common.canonical import canonical_json
from privet.common.errors import StateError, VerificationError
from privet.common.files import staged, write_durably
from privet.common.log.agreement import RoundStatement
from privet.common.study.adapter import Adapter, read_layout
from privet.common.study.study import Study
from privet.server.rounds import sealed
from privet.server.rounds.folder import RunFolder
from privet.server.rounds.rounds import run_study
from privet.server.rounds.run_log import Unlogged
from privet.server.rounds.state import TAKEN, RunDirectory, RunState
from tests.support.synthetic import PEFT_CONFIG, SPEC, quadratic, start_adapter, study_of

ROUNDS = 5
STATE = "state.safetensors"
PLANS: dict[str, dict[str, Any]] = {
    "fedavg": {"method": "fedavg"},
    "fedsvd": {"method": "fedsvd", "refactor_every": 2},
    "fedsvd-fedavgm": {"method": "fedsvd", "optimizer": "fedavgm"},
    "ffa-fedadam": {"method": "ffa", "optimizer": "fedadam", "learning_rate": 0.1},
}


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package may catch it."""


def plan(name: str, rounds: int = ROUNDS) -> Study:
    return study_of(training={"rounds": rounds}, aggregation=PLANS[name], cohort={"fraction": 0.7})


def create(path: Path, study: Study) -> RunDirectory:
    return RunDirectory.create(path, study, start_adapter(), PEFT_CONFIG)


def uninterrupted(path: Path, study: Study) -> RunState:
    return run_study(Unlogged(create(path, study)), quadratic(study))


def same_state(one: RunState, other: RunState) -> bool:
    """Whether two states continue alike; nonces and times may differ."""
    if (one.round, one.adapter.digest, one.stopped) != (other.round, other.adapter.digest, other.stopped):
        return False
    if (one.optimizer is None) != (other.optimizer is None):
        return False
    if one.optimizer is not None and other.optimizer is not None:
        (document, arrays), (document_, arrays_) = one.optimizer, other.optimizer
        if document != document_ or {k: v.tobytes() for k, v in arrays.items()} != {
            k: v.tobytes() for k, v in arrays_.items()
        }:
            return False
    told = ("round", "cohort", "survivors", "adapter_before", "adapter_after")
    return [[s[k] for k in told] for s in one.statements] == [[s[k] for k in told] for s in other.statements]


def check_published(path: Path) -> RunState:
    """Check that everything readers use agrees with the committed state, and return that."""
    run = RunDirectory.open(path)
    state = run.load()
    files = sorted(p.name for p in (path / "rounds").iterdir())
    assert files == [f"{n:04d}.json" for n in range(1, state.round + 1)]
    for name, statement in zip(files, state.statements, strict=True):
        assert (path / "rounds" / name).read_bytes() == canonical_json(statement) + b"\n"
    lines = (path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == list(range(1, state.round + 1))
    assert (path / "adapter" / "adapter_model.safetensors").read_bytes() == state.adapter.data
    assert (path / "adapter" / "adapter_config.json").read_text() == PEFT_CONFIG
    chain = [s["adapter_before"] for s in state.statements] + [state.adapter.digest]
    assert chain[1:] == [s["adapter_after"] for s in state.statements]
    return state


# Kill and resume


@pytest.mark.parametrize("name", PLANS)
def test_stopping_after_any_round_and_resuming_changes_no_bit(name: str, tmp_path: Path) -> None:
    study = plan(name)
    whole = uninterrupted(tmp_path / "whole", study)
    for stop in range(1, ROUNDS + 1):
        path = tmp_path / str(stop)

        def kill(statement: RoundStatement, adapter: Adapter, stop: int = stop) -> None:
            if statement["round"] == stop:
                raise Killed

        with pytest.raises(Killed):
            run_study(Unlogged(create(path, study)), quadratic(study), kill)
        assert RunDirectory.open(path).load().round == stop
        resumed = run_study(Unlogged(RunDirectory.open(path)), quadratic(study))
        assert same_state(resumed, whole)
        assert same_state(check_published(path), whole)


def test_stopping_after_every_round_changes_no_bit(tmp_path: Path) -> None:
    study = plan("fedsvd-fedavgm")
    whole = uninterrupted(tmp_path / "whole", study)
    create(tmp_path / "run", study)

    def kill(statement: RoundStatement, adapter: Adapter) -> None:
        raise Killed

    for _ in range(ROUNDS):
        with pytest.raises(Killed):
            run_study(Unlogged(RunDirectory.open(tmp_path / "run")), quadratic(study), kill)
    assert same_state(run_study(Unlogged(RunDirectory.open(tmp_path / "run")), quadratic(study)), whole)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("call", ["fsync", "replace", "write"])
def test_dying_at_any_step_of_any_write_loses_no_closed_round(
    call: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = plan("fedsvd-fedavgm", rounds=2)
    whole = uninterrupted(tmp_path / "whole", study)
    left = 0

    def deadly(real: Any) -> Any:
        def step(*args: Any, **keys: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and moment == "before":
                raise Killed
            result = real(*args, **keys)
            if left == 0:
                raise Killed
            return result

        return step

    def torn(path: Path, data: bytes) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            path.with_name(f".{path.name}.partial").write_bytes(data[: len(data) // 2 if moment == "before" else None])
            raise Killed
        write_durably(path, data)

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", deadly(lambda descriptor: None))
    else:
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    if call == "replace":
        monkeypatch.setattr(Path, "replace", deadly(Path.replace))
    if call == "write":
        monkeypatch.setattr("privet.server.rounds.state.write_durably", torn)
    deaths = 0
    for number in range(1, 1000):
        path = tmp_path / str(number)
        left = 0
        create(path, study)
        left = number
        try:
            run_study(Unlogged(RunDirectory.open(path)), quadratic(study))
            finished = True
        except Killed:
            finished = False
        left = 0
        rounds = RunDirectory.open(path).load().round
        # Nothing is published before it is durable: a resumed run could close that round otherwise.
        assert len(list((path / "rounds").glob("0*.json"))) <= rounds
        assert same_state(run_study(Unlogged(RunDirectory.open(path)), quadratic(study)), whole)
        check_published(path)
        if finished:
            assert rounds == 2
            break
        deaths += 1
    # Each round writes five files; every write renames once and syncs twice.
    assert deaths >= 2 * 5


ROOT = Path(__file__).parents[2]
# Forks a process per line that it reads; prints its id, then how it ended. Runs a study itself before that, so
# that all of torch is loaded once and not in each process.
FORKER = """
import os, sys
from pathlib import Path
from tests.support.synthetic import continue_run
continue_run(Path(sys.argv[2]))
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        continue_run(Path(sys.argv[1]), slowness=0.01)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    study = plan("fedsvd-fedavgm", rounds=12)
    whole = uninterrupted(tmp_path / "whole", study)
    path = tmp_path / "run"
    create(path, study)
    create(tmp_path / "warm", plan("fedsvd-fedavgm", rounds=1))
    reached: list[int] = [0]
    ends: list[int] = []
    with subprocess.Popen(
        [sys.executable, "-c", FORKER, path, tmp_path / "warm"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as forker:
        assert forker.stdin is not None
        assert forker.stdout is not None
        while not ends or ends[-1] != 0:
            print("go", file=forker.stdin, flush=True)
            pid = int(forker.stdout.readline())
            # Longer each time: a resumed run first publishes again, and must get beyond that on a slow disk.
            time.sleep(rng.uniform(0.02, 0.3) * 1.1 ** len(ends))
            # Its parent has not waited for it where no line is there yet, so the id is still its own.
            if not select.select([forker.stdout], [], [], 0)[0]:
                os.kill(pid, signal.SIGKILL)
            ends.append(int(forker.stdout.readline()))
            reached.append(RunDirectory.open(path).load().round)
            assert ends[-1] in (0, -signal.SIGKILL), f"seed {seed}"
    assert reached == sorted(reached), f"seed {seed}"
    assert ends.count(-signal.SIGKILL) >= 1, f"seed {seed}"
    assert same_state(check_published(path), whole), f"seed {seed}: {reached}"


# What is refused


def test_the_state_survives_the_way_through_the_file(tmp_path: Path) -> None:
    run = create(tmp_path / "run", plan("ffa-fedadam"))
    state = run_study(Unlogged(run), quadratic(run.study))
    again = run.load()
    assert same_state(again, state)
    assert again.statements == tuple(json.loads(json.dumps(s)) for s in state.statements)
    best = RunState(2, state.adapter, state.optimizer, state.statements[:2], (1.5, 1, start_adapter()), True)
    run.commit(best)
    loaded = run.load()
    assert loaded.best is not None
    assert loaded.best[:2] == (1.5, 1)
    assert loaded.best[2].digest == start_adapter().digest
    assert loaded.stopped


def test_the_state_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    create(tmp_path / "run", plan("fedavg"))
    tensors = safetensors.numpy.load_file(tmp_path / "run" / STATE)
    assert {name.removeprefix("adapter/") for name in tensors} == set(SPEC.names)


def test_a_new_run_is_complete(tmp_path: Path) -> None:
    run = create(tmp_path / "deep" / "run", plan("fedavg"))
    assert check_published(run.path).round == 0
    data = (run.path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert read_layout(data) == SPEC
    assert RunDirectory.open(run.path) == run
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["run"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    uninterrupted(path, plan("fedsvd-fedavgm"))
    return path


def with_state(finished: Path, directory: Path, data: bytes) -> RunDirectory:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / STATE).write_bytes(data)
    run = RunDirectory.open(finished)
    return RunDirectory(directory, run.study, run.peft_config)


def without_adapter(run: RunDirectory) -> tuple[int, bool]:
    """Read all of a state, as whoever shows a run does."""
    return run.standing(sealed=True)


@given(st.data())
def test_any_flipped_bit_is_noticed(
    finished: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    state = bytearray((finished / STATE).read_bytes())
    state[data.draw(st.integers(0, len(state) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    directory = tmp_path_factory.getbasetemp() / "flipped"
    for read in (RunDirectory.load, without_adapter):
        with pytest.raises(StateError, match="state") as caught:
            read(with_state(finished, directory, bytes(state)))
        assert caught.value.hint == "restore the newest backup of the run directory"


@given(st.floats(0, 1, exclude_max=True))
def test_a_truncated_state_is_noticed(finished: Path, tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    state = (finished / STATE).read_bytes()
    directory = tmp_path_factory.getbasetemp() / "truncated"
    for read in (RunDirectory.load, without_adapter):
        with pytest.raises(StateError, match="cannot be read"):
            read(with_state(finished, directory, state[: int(share * len(state))]))


@pytest.mark.parametrize("metadata", [None, {}, {"state": "{}"}, {"state": "[]", "seal": "x"}])
def test_a_file_that_is_no_state_is_noticed(finished: Path, tmp_path: Path, metadata: dict[str, str] | None) -> None:
    data = safetensors.numpy.save({"adapter/x": np.zeros(2, np.float32)}, metadata)
    for read in (RunDirectory.load, without_adapter):
        with pytest.raises(StateError):
            read(with_state(finished, tmp_path, data))


def test_a_missing_state_is_noticed(tmp_path: Path) -> None:
    run = create(tmp_path / "run", plan("fedavg"))
    (run.path / STATE).unlink()
    with pytest.raises(StateError, match="cannot be read"):
        run_study(Unlogged(run), quadratic(run.study))


def test_the_state_of_another_study_is_refused(tmp_path: Path) -> None:
    one, other = create(tmp_path / "one", plan("fedavg")), create(tmp_path / "other", plan("fedsvd"))
    (other.path / STATE).write_bytes((one.path / STATE).read_bytes())
    with pytest.raises(VerificationError, match=f"the run directory has study {other.study.digest}"):
        without_adapter(RunDirectory.open(other.path))
    with pytest.raises(VerificationError, match=f"the run directory has study {other.study.digest}") as caught:
        run_study(Unlogged(RunDirectory.open(other.path)), quadratic(other.study))
    assert one.study.digest in caught.value.message


def test_the_optimizer_state_of_another_study_is_refused(tmp_path: Path) -> None:
    run = create(tmp_path / "run", plan("ffa-fedadam"))
    run.commit(RunState(0, start_adapter(), ({"optimizer": "fedavgm", "arrays": []}, {})))
    with pytest.raises(StateError, match="the study has fedadam"):
        run_study(Unlogged(run), quadratic(run.study))


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"3", b"\xff"])
def test_what_is_no_run_directory_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = create(tmp_path / "run", plan("fedavg")).path
    if content is None:
        (path / "study.json").unlink()
    else:
        (path / "study.json").write_bytes(content)
    with pytest.raises(StateError, match="is not a run directory"):
        RunDirectory.open(path)
    with pytest.raises(StateError, match="is not a run directory"):
        RunDirectory.open(tmp_path / "absent")


# One process at a time


def test_a_run_held_elsewhere_in_the_process_is_refused(tmp_path: Path) -> None:
    run = create(tmp_path / "run", plan("fedavg"))
    with run.locked(), pytest.raises(StateError, match="another process is using the run directory"):
        run_study(Unlogged(RunDirectory.open(run.path)), quadratic(run.study))
    assert run_study(Unlogged(run), quadratic(run.study)).stopped


def test_a_run_held_by_another_process_is_refused_until_that_dies(tmp_path: Path) -> None:
    run = create(tmp_path / "run", plan("fedavg"))
    code = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from privet.server.rounds.state import RunDirectory
        with RunDirectory.open(Path(sys.argv[1])).locked():
            print("held", flush=True)
            time.sleep(60)
        """
    )
    with subprocess.Popen([sys.executable, "-c", code, run.path], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StateError, match="another process is using the run directory"):
            run_study(Unlogged(run), quadratic(run.study))
        assert run.load().round == 0
        holder.kill()
    assert run_study(Unlogged(run), quadratic(run.study)).stopped


# Complete or not at all


def names_in(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_an_existing_run_is_never_overwritten(tmp_path: Path) -> None:
    run = create(tmp_path / "run", plan("fedavg"))
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    with pytest.raises(StateError, match="exists already"):
        create(run.path, plan("fedsvd"))
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before
    assert names_in(tmp_path) == ["run"]


def test_nor_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(StateError, match="exists already"):
        create(tmp_path / "run", plan("fedavg"))
    assert (tmp_path / "run").read_text() == "mine"
    assert names_in(tmp_path) == ["run"]


def test_an_empty_directory_may_become_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert create(tmp_path / "run", plan("fedavg")).load().round == 0


@pytest.mark.parametrize("error", [Killed, ValueError, KeyboardInterrupt])
def test_a_failure_while_staging_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> Iterator[None]:
        with staged(tmp_path / "run", TAKEN) as directory:
            (directory / "sub").mkdir()
            (directory / "sub" / "file").write_text("half")
            assert not (tmp_path / "run").exists()
            raise error

    with pytest.raises(error):
        fail()
    assert names_in(tmp_path) == []


def test_what_is_created_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    def race() -> None:
        with staged(tmp_path / "run", TAKEN) as directory:
            (directory / "file").write_text("ours")
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "file").write_text("theirs")

    with pytest.raises(OSError, match="not empty"):
        race()
    assert (tmp_path / "run" / "file").read_text() == "theirs"
    assert names_in(tmp_path) == ["run"]


def test_leftovers_of_a_killed_attempt_do_not_matter(tmp_path: Path) -> None:
    leftover = tmp_path / f".run.{os.getpid()}.partial"
    leftover.mkdir()
    (leftover / "study.json").write_text("half")
    assert create(tmp_path / "run", plan("fedavg")).load().round == 0
    assert names_in(tmp_path) == ["run"]


# A limit on the size of files does what a full disk does, for root as well.
FULL_DISK = """
import resource, sys
from pathlib import Path
from tests.support.synthetic import continue_run
import privet.server.rounds.rounds
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    continue_run(Path(sys.argv[1]))
except OSError:
    sys.exit(7)
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_round_as_it_was(tmp_path: Path) -> None:
    study = plan("fedsvd-fedavgm")
    whole = uninterrupted(tmp_path / "whole", study)
    run = create(tmp_path / "run", study)

    def kill(statement: RoundStatement, adapter: Adapter) -> None:
        if statement["round"] == 2:
            raise Killed

    with pytest.raises(Killed):
        run_study(Unlogged(run), quadratic(study), kill)
    before = (run.path / STATE).read_bytes()
    limit = str(len(before) - 1)
    ended = subprocess.run([sys.executable, "-c", FULL_DISK, run.path, limit], cwd=ROOT, timeout=60, check=False)
    assert ended.returncode == 7
    assert (run.path / STATE).read_bytes() == before
    assert run.load().round == 2
    assert same_state(run_study(Unlogged(run), quadratic(study)), whole)
    check_published(run.path)


def test_a_write_that_fails_keeps_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_durably(file, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_durably(file, b"new and longer")
    assert file.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


_WRITERS = """
import os, sys
from pathlib import Path
from threading import Thread
from privet.common.files import write_durably, write_whole
os.fsync = lambda descriptor: None  # it takes longer than all the rest
write = write_durably if sys.argv[2] == "durably" else write_whole
def repeat(letter):
    for number in range(200):
        write(Path(sys.argv[1]), letter * (1 + number * 500))
threads = [Thread(target=repeat, args=(letter,)) for letter in sys.argv[3].encode().split()]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


@pytest.mark.parametrize("how", ["durably", "whole"])
def test_writers_of_one_file_in_threads_and_processes_tear_nothing(tmp_path: Path, how: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"a")
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITERS, str(file), how, letters], stderr=subprocess.PIPE)
        for letters in ("a b", "c d")
    ]
    while any(writer.poll() is None for writer in writers):
        found = file.read_bytes()
        assert found == found[:1] * len(found)
        assert len(found) % 500 == 1
    assert [writer.communicate()[1] for writer in writers] == [b"", b""]
    assert names_in(tmp_path) == ["file"]


def test_what_a_killed_writer_left_is_taken_away_and_lends_its_mode_to_nothing(tmp_path: Path) -> None:
    left = tmp_path / ".file.partial"
    left.write_bytes(b"a long beginning")
    left.chmod(0o666)
    write_durably(tmp_path / "file", b"key", 0o600)
    assert names_in(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"key"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_a_wait_for_another_writer_that_ends_by_an_error_keeps_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, how: int) -> None:
        raise KeyboardInterrupt

    before = len(list(Path("/dev/fd").iterdir()))
    with monkeypatch.context() as patched:
        patched.setattr("privet.common.files.fcntl.flock", fail)
        with pytest.raises(KeyboardInterrupt):
            write_durably(tmp_path / "file", b"new")
    assert len(list(Path("/dev/fd").iterdir())) == before
    write_durably(tmp_path / "file", b"new")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_nothing_is_written_through_a_link_that_somebody_placed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / ".file.partial").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic"):
        write_durably(tmp_path / "file", b"new")
    assert (tmp_path / "other").read_bytes() == b"other"


# Read without the adapter


def test_a_state_is_read_in_pieces_as_it_is_read_whole(finished: Path) -> None:
    folder = RunFolder.open(finished)
    assert folder.standing() == folder.standing(sealed=True) == (ROUNDS, True)
    assert list(folder.rounds()) == list(range(ROUNDS, 0, -1))
    stated = RunDirectory.open(finished).load().statements
    assert [folder.statement(number) for number in range(1, ROUNDS + 1)] == [*stated]


@pytest.mark.parametrize(
    "reason", [', "stopped": false}', '", "stopped": false}', '\\", "stopped": false}\\', "\u2028\\\\", '{"round": 9']
)
def test_what_a_site_says_ends_no_text_and_names_no_field(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory.create(tmp_path / "run", study_of(), start_adapter(), PEFT_CONFIG)
    said = {"round": 1, "type": "round-abort", "reason": reason, "metrics": None}
    run.store(RunState(1, start_adapter(), statements=(said,) * 3, stopped=True))
    assert run.load().stopped
    for size in range(1, 60):  # pieces end anywhere
        monkeypatch.setattr(sealed, "_PIECE", size)
        assert run.standing(sealed=True) == (1, True)
