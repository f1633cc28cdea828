"""A trainer's job without a cluster: sealed files that nobody replays, and what becomes of a job and its record."""

from __future__ import annotations

import json
import os
import shlex
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import ValidationError

from privet.client.site import Resources, SlurmSection
from privet.client.trainer.mailbox import ATTACHED, KEY, MailboxChannel, MailboxEnd, State, name_of, put
from privet.client.trainer.places import discard, make_private, unguarded
from privet.client.trainer.slurm import SlurmJob, SlurmJobs, drop_job, options, script
from privet.client.trainer.wire import ANSWER, ASK, Packet, Seal, agreed, lists, pack, ragged, unpack
from privet.client.waiting import awaited
from privet.common.errors import StateError, StudyError, VerificationError
from privet.simulations.data.federation import Simulation
from privet.simulations.sites import load_simulated
from tests.support.tiny import class_rows, site_toml

SECRET = b"a sum without its noise"
THEIRS = X25519PrivateKey.from_private_bytes(b"t" * 32).public_key().public_bytes_raw()
"""A job's public key."""


@dataclass
class PaperJob:
    """A job that is a thread, or nothing."""

    folder: Path
    key: bytes = field(default_factory=lambda: os.urandom(32))
    name: str = "paper"
    now: State = "running"

    def state(self) -> State:
        return self.now

    def fate(self) -> str:
        return "TIMEOUT"

    def take(self) -> PaperJob:
        return self

    def drop(self) -> None:
        self.now = "ended"


def job_in(folder: Path) -> PaperJob:
    folder.mkdir(mode=0o700)
    job = PaperJob(folder)
    put(folder / KEY, job.key)
    put(folder / ATTACHED, b"")
    return job


def end_of(job: PaperJob, idle: float = 20.0) -> MailboxEnd:
    return MailboxEnd(job.folder, idle, name_of(job.key))


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


def answering(end: MailboxEnd, count: int) -> threading.Thread:
    """Answer requests with themselves turned round."""

    def run() -> None:
        for _ in range(count):
            asked = end.receive()
            assert asked is not None
            end.send(asked[::-1])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_messages_are_sealed_files_that_are_gone_once_they_were_read(tmp_path: Path) -> None:
    job = job_in(tmp_path / "job")
    channel = MailboxChannel(job)
    channel.open()
    channel.send(SECRET, soon())
    (asked,) = job.folder.glob("*.ask")
    assert SECRET not in asked.read_bytes()
    assert asked.stat().st_mode & 0o777 == 0o600
    end = end_of(job)
    assert not (job.folder / KEY).exists()
    with pytest.raises(StateError, match="no key"):  # a second process cannot be the job
        end_of(job)
    thread = answering(end, 2)
    assert channel.receive(100, soon()) == SECRET[::-1]
    channel.send(b"again", soon())
    assert channel.receive(100, soon()) == b"niaga"
    thread.join(20)
    assert {path.name for path in job.folder.iterdir()} == {ATTACHED}


def test_copies_of_the_directory_hold_no_sum(tmp_path: Path) -> None:
    """Attack: one copy is made while the job is queued, with its key; the others while it works."""
    job = job_in(tmp_path / "job")
    channel = MailboxChannel(job)
    channel.open()
    key, public = (job.folder / KEY).read_bytes(), bytes.fromhex((job.folder / ATTACHED).read_text())
    copies: dict[str, bytes] = {}

    def copied() -> None:
        copies.update({path.name: path.read_bytes() for path in job.folder.glob(f"{public.hex()}-*")})

    end = end_of(job)
    for _ in range(2):
        channel.send(SECRET, soon())
        copied()
        asked = end.receive()
        assert asked == SECRET
        end.send(SECRET[::-1])
        copied()
        assert channel.receive(100, soon()) == SECRET[::-1]
    thief = Seal(key, public)
    opened = thief.open(ANSWER, 0, copies[f"{public.hex()}-0.answer"])
    assert opened[32:] == SECRET[::-1]  # the first answer says what is enforced
    mine = X25519PrivateKey.generate()
    for seal in (thief, Seal(key, public, agreed(mine, opened[:32])), Seal(key, public, agreed(mine, public))):
        for way, name in ((ASK, "1.ask"), (ANSWER, "1.answer")):
            with pytest.raises(VerificationError):
                seal.open(way, 1, copies[f"{public.hex()}-{name}"])


def test_a_job_obeys_no_key_but_its_own(tmp_path: Path) -> None:
    """The directory may be another one by now, whose maker would have the job read files for him."""
    job = job_in(tmp_path / "job")
    job.folder.rename(tmp_path / "away")
    strange = job_in(tmp_path / "job")
    for key in (strange.key, job.key[:-1], b"", job.key + b"\0"):
        put(job.folder / KEY, key)
        with pytest.raises(StateError, match="no key of its own"):
            end_of(job)
        (job.folder / KEY).unlink(missing_ok=True)
    (job.folder / KEY).symlink_to(tmp_path / "away" / KEY)
    with pytest.raises(StateError, match="no key of its own"):
        end_of(job)
    (job.folder / KEY).unlink()
    os.mkfifo(job.folder / KEY)  # on which a reader would wait
    with pytest.raises(StateError, match="no key of its own"):
        end_of(job)
    (job.folder / KEY).unlink()
    put(job.folder / KEY, job.key)
    end_of(job)


def test_an_answer_of_another_session_request_or_job_is_refused(tmp_path: Path) -> None:
    job, key = job_in(tmp_path / "job"), os.urandom(32)
    channel = MailboxChannel(job)
    nonces = []
    answers = []
    for _ in range(2):
        channel.open()
        nonces.append(bytes.fromhex((job.folder / ATTACHED).read_text()))
        answers.append(Seal(job.key, nonces[-1]).close(ANSWER, 0, THEIRS + SECRET))
    now, first = Seal(job.key, nonces[1]), THEIRS + SECRET
    forged = {
        "earlier session": answers[0],
        "other request": now.close(ANSWER, 1, first),
        "own request": now.close(ASK, 0, first),
        "other job": Seal(key, nonces[1]).close(ANSWER, 0, first),
        "of a key that is none": now.close(ANSWER, 0, bytes(32) + SECRET),
        "without a key": now.close(ANSWER, 0, b""),
        "changed": bytes([answers[1][0] ^ 1]) + answers[1][1:],
        "cut": answers[1][:-1],
        "empty": b"",
    }
    for name, sealed in forged.items():
        put(job.folder / f"{nonces[1].hex()}-0.answer", sealed)
        with pytest.raises(VerificationError) as caught:
            channel.receive(100, soon())
        assert caught.value.private, name
    put(job.folder / f"{nonces[1].hex()}-0.answer", answers[1])
    assert channel.receive(100, soon()) == SECRET
    # Under the old name nobody looks for it.
    put(job.folder / f"{nonces[0].hex()}-1.answer", answers[0])
    with pytest.raises(StateError, match="did not answer within hours"):
        channel.receive(100, soon(0.05))


def test_a_job_goes_on_with_a_new_session_and_never_with_an_old_one(tmp_path: Path) -> None:
    job = job_in(tmp_path / "job")
    first, second = MailboxChannel(job), MailboxChannel(job)
    first.open()
    old = (job.folder / ATTACHED).read_bytes()
    first.send(b"of a process that is killed", soon())
    end = end_of(job)
    assert end.receive() == b"of a process that is killed"
    second.open()
    second.send(b"of the next", soon())
    end.send(b"too late")  # to the dead process
    thread = answering(end, 1)
    assert second.receive(100, soon()) == b"txen eht fo"
    thread.join(20)
    put(job.folder / ATTACHED, old)
    assert end.receive() is None


def test_a_job_ends_when_nobody_asks_or_its_directory_is_gone(tmp_path: Path) -> None:
    end = end_of(job_in(tmp_path / "idle"), idle=0.05)
    assert end.receive() is None
    job = job_in(tmp_path / "gone")
    end = end_of(job)
    (job.folder / ATTACHED).unlink()
    assert end.receive() is None


def test_a_queued_job_is_waited_for_and_one_that_ended_is_not(tmp_path: Path) -> None:
    job = job_in(tmp_path / "job")
    job.now = "queued"
    channel = MailboxChannel(job)
    channel.open()
    assert channel.alive
    channel.send(b"x", soon())
    with pytest.raises(StateError, match="waits in the queue") as caught:
        channel.receive(100, soon(0.1))
    assert channel.queued
    assert not caught.value.private  # the coordinator may know it
    with awaited(soon(0.1)), pytest.raises(StateError, match="waits in the queue"):  # the coordinator waits no longer
        channel.receive(100, soon(60))
    job.now = "running"  # a job that runs is not ended by that
    channel.open()
    channel.send(b"x", soon())
    answer = Seal(job.key, bytes.fromhex((job.folder / ATTACHED).read_text())).close(ANSWER, 0, THEIRS + SECRET)
    late = threading.Timer(0.3, put, (job.folder / f"{(job.folder / ATTACHED).read_text()}-0.answer", answer))
    late.start()
    with awaited(soon(0.01)):
        assert channel.receive(100, soon(60)) == SECRET
    job.now = "ended"
    channel.open()
    channel.send(b"x", soon())
    with pytest.raises(StateError, match="paper ended: TIMEOUT"):
        channel.receive(100, soon())
    assert not channel.alive


def test_what_is_too_large_is_not_read(tmp_path: Path) -> None:
    job = job_in(tmp_path / "job")
    channel = MailboxChannel(job)
    channel.open()
    put(job.folder / f"{(job.folder / ATTACHED).read_text()}-0.answer", bytes(200))
    with pytest.raises(StateError, match="at most 148 bytes"):
        channel.receive(100, soon())


def test_a_job_cannot_have_the_site_read_or_wait_for_another_file(tmp_path: Path) -> None:
    job = job_in(tmp_path / "job")
    channel = MailboxChannel(job)
    channel.open()
    answer = job.folder / f"{(job.folder / ATTACHED).read_text()}-0.answer"
    pipe, link = partial(os.mkfifo, answer), partial(answer.symlink_to, "/etc/passwd")
    makes: list[Callable[[], object]] = [link, pipe, answer.mkdir]
    for make in makes:
        make()
        with pytest.raises(StateError, match="no file of its own"):
            channel.receive(100, soon())
        answer.rmdir() if answer.is_dir() and not answer.is_symlink() else answer.unlink()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (job.folder / "link").symlink_to(outside)
    discard(job.folder)
    assert (outside / "kept").exists()
    assert not job.folder.exists()


def test_messages_that_are_none_are_refused() -> None:
    good = pack(Packet("terms", {"a": 1}, ragged("rows", [[1, 2], [], [3]])))
    assert lists(unpack(good), "rows") == [[1, 2], [], [3]]
    assert lists(unpack(pack(Packet("x", {}, ragged("rows", [])))), "rows") == []
    for bad in (b"", good[:3], good[:9], good[:-1], b"\xff\xff\xff\xff{}", pack(Packet("x"))[:4] + b"[]", good + b"x"):
        with pytest.raises(StateError, match="do not understand each other"):
            lists(unpack(bad), "rows")


# --- Slurm's commands, by programs that write down how they are called -----------------------------------

PROGRAM = """#!/bin/sh
echo "$0 $*" >> {folder}/calls
case "$0" in
*sbatch) cat > {folder}/script; cat {folder}/refused >&2 2>/dev/null && exit 1; echo 7 ;;
*squeue) cat {folder}/state ;;
esac
exit 0
"""


@dataclass(frozen=True)
class Paper:
    """A Slurm of paper, in a folder."""

    folder: Path

    def says(self, state: str) -> None:
        (self.folder / "state").write_text(state)

    @property
    def calls(self) -> list[str]:
        found = (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []
        return [Path(line).name if " " not in line else line.rpartition("/bin/")[2] for line in found]


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paper:
    found = Paper(tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "squeue", "scancel"):
        program = tmp_path / "bin" / name
        program.write_text(PROGRAM.format(folder=tmp_path))
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    found.says("PENDING")
    return found


def jobs_of(tmp_path: Path, opening: str = "a", **more: Any) -> SlurmJobs:
    shared = tmp_path / "shared"
    shared.mkdir(exist_ok=True)
    return SlurmJobs(SlurmSection(directory=shared, **more), tmp_path / "kept/job.json", opening)


def test_a_job_is_taken_over_if_it_is_of_use_and_cancelled_if_not(tmp_path: Path, paper: Paper) -> None:
    job = jobs_of(tmp_path).take()
    assert job.folder.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "kept/job.json").stat().st_mode & 0o777 == 0o600
    for state in ("PENDING", "RUNNING", "CONFIGURING"):
        paper.says(state)
        assert jobs_of(tmp_path).take() == job
    assert sum(call.startswith("sbatch") for call in paper.calls) == 1
    other = jobs_of(tmp_path, "another study").take()
    assert other != job
    assert not job.folder.exists()
    assert f"scancel --me --name={job.name}" in paper.calls
    paper.says("")  # it has ended
    third = jobs_of(tmp_path, "another study").take()
    assert third not in (job, other)
    jobs_of(tmp_path).drop()
    assert not (tmp_path / "kept/job.json").exists()
    assert list((tmp_path / "shared").iterdir()) == []


def test_a_process_that_is_killed_while_it_submits_leaves_nothing_that_stays(tmp_path: Path, paper: Paper) -> None:
    record = tmp_path / "kept/job.json"
    first = jobs_of(tmp_path).take()
    # Killed before the directory was made, or before the job was known to Slurm.
    (first.folder / ATTACHED).unlink()
    second = jobs_of(tmp_path).take()
    assert second != first
    paper.says("")
    third = jobs_of(tmp_path).take()
    assert third != second
    assert [path.name for path in (tmp_path / "shared").iterdir()] == [third.name]
    record.write_text("{")
    paper.says("RUNNING")
    assert jobs_of(tmp_path).take() != third
    assert json.loads(record.read_bytes())["name"] != third.name


def test_a_directory_that_others_can_rename_holds_no_job(tmp_path: Path, paper: Paper) -> None:
    jobs = jobs_of(tmp_path)
    assert unguarded(tmp_path / "shared") is None
    for mode, at in ((0o770, "shared"), (0o707, "shared"), (0o775, ".")):
        (tmp_path / at).chmod(mode)
        with pytest.raises(StateError, match="can be changed by others") as caught:
            jobs.take()
        assert f"chmod go-w {(tmp_path / at).resolve()}" in caught.value.hint
        (tmp_path / at).chmod(0o755)
    (tmp_path / "shared").chmod(0o1777)  # in which nobody renames what is not his
    jobs.take()
    assert len(paper.calls) == 1


def test_a_link_on_the_way_to_a_directory_is_refused(tmp_path: Path, paper: Paper) -> None:
    """Attack: it leads to a good directory while it is looked at, and to another one afterwards."""
    (tmp_path / "others").mkdir()
    (tmp_path / "others").chmod(0o1777)
    (tmp_path / "shared/deeper").mkdir(parents=True)
    (tmp_path / "others/jobs").symlink_to(tmp_path / "shared")
    for path in (tmp_path / "others/jobs", tmp_path / "others/jobs/deeper"):
        assert unguarded(path) == tmp_path / "others/jobs"
    with pytest.raises(StateError, match="is a link"):
        SlurmJobs(SlurmSection(directory=tmp_path / "others/jobs"), tmp_path / "kept/job.json", "a").take()
    assert paper.calls == []


def test_a_job_that_cannot_be_cancelled_is_cancelled_later(tmp_path: Path, paper: Paper) -> None:
    jobs = jobs_of(tmp_path)
    first = jobs.take()
    scancel = (tmp_path / "bin/scancel").read_text()
    (tmp_path / "bin/scancel").write_text("#!/bin/sh\nexit 1\n")
    jobs.drop()
    assert not first.folder.exists()
    second = jobs.take()
    jobs.drop()
    left = tmp_path / "kept/cancel"
    assert left.read_text().split() == [first.name, second.name]
    assert left.stat().st_mode & 0o777 == 0o600
    (tmp_path / "bin/scancel").write_text(scancel)
    third = jobs.take()
    assert not left.exists()
    assert [call for call in paper.calls if "scancel" in call] == [
        f"scancel --me --name={name}" for name in (first.name, second.name)
    ]
    drop_job(tmp_path / "kept/job.json")  # of a site file that says nothing of Slurm by now
    assert f"scancel --me --name={third.name}" in paper.calls


def test_whatever_a_trainer_leaves_behind_can_be_deleted(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        os.mkdir("deep", dir_fd=here)
        at = os.open("deep", os.O_RDONLY, dir_fd=here)
        for _ in range(1500):
            os.mkdir("d" * 200, dir_fd=at)
            inner = os.open("d" * 200, os.O_RDONLY, dir_fd=at)
            os.close(at)
            at = inner
        os.close(at)
    finally:
        os.close(here)
    (tmp_path / "kept").write_text("x")
    (tmp_path / "cache").symlink_to(tmp_path / "kept")
    discard(tmp_path / "deep")
    discard(tmp_path / "missing")
    assert not (tmp_path / "deep").exists()
    make_private(tmp_path / "cache")
    make_private(tmp_path / "cache")
    assert (tmp_path / "cache").is_dir()
    assert not (tmp_path / "cache").is_symlink()
    assert (tmp_path / "kept").read_text() == "x"
    make_private(tmp_path / "kept")
    assert (tmp_path / "kept").is_dir()


def test_variables_that_are_options_of_slurm_are_not_passed_on(
    tmp_path: Path, paper: Paper, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin/sbatch"
    program.write_text(f"#!/bin/sh\nenv > {tmp_path}/environment\n")
    for name in ("SBATCH_ARRAY_INX", "SQUEUE_FORMAT", "SCANCEL_USER", "SLURM_CONF"):
        monkeypatch.setenv(name, "x")
    jobs_of(tmp_path).take()
    names = {line.partition("=")[0] for line in (tmp_path / "environment").read_text().splitlines()}
    assert "SLURM_CONF" in names
    assert not {name for name in names if name.startswith(("SBATCH_", "SQUEUE_", "SCANCEL_"))}


def test_what_slurm_refuses_leaves_no_directory(tmp_path: Path, paper: Paper) -> None:
    (tmp_path / "refused").write_text("sbatch: error: invalid partition\n")
    with pytest.raises(StateError, match="invalid partition"):
        jobs_of(tmp_path, partition="none").take()
    assert list((tmp_path / "shared").iterdir()) == []
    assert not (tmp_path / "kept/job.json").exists()


def test_no_name_breaks_the_script_or_an_option(tmp_path: Path) -> None:
    folder = Path("/x/'; touch y; '$(touch z) \"`a`\" #SBATCH --array=1-9/job")
    text = script(SlurmJob("n", folder, b"k" * 32, "o"), 60)
    assert text.startswith("#!/bin/sh\nexec ")
    assert text.count("\n") == 2
    assert shlex.split(text.splitlines()[1])[5:] == [str(folder), "60", name_of(b"k" * 32)]
    assert b"k".hex() * 8 not in text
    with pytest.raises(StateError, match="cannot be printed"):
        script(SlurmJob("n", Path("/x\n#SBATCH --array=1-9"), b"k" * 32, "o"), 60)
    found = options(
        SlurmSection(directory=tmp_path, gres="gpu:1", time="1-12:00:00", extra=("--account=a b",)), "n", folder
    )
    assert found[-3:] == ["--gres=gpu:1", "--time=1-12:00:00", "--account=a b"]
    assert "--export=NIL" in found
    assert "--output=/dev/null" in found


@pytest.mark.parametrize(
    "wrong",
    [
        {"extra": ["-A x"]},
        {"extra": ["--wrap=id"]},
        {"extra": ["--output=/tmp/x"]},
        {"extra": ["--array=1-9"]},
        # What `sbatch` would complete.
        {"extra": ["--outpu=/tmp/x"]},
        {"extra": ["--arr=1-9"]},
        {"extra": ["--wra=id"]},
        {"extra": ["--export=ALL"]},
        {"extra": ["--chdir=/tmp"]},
        {"extra": ["--clusters=other"]},
        {"extra": ["--get-user-env"]},
        {"extra": ["--no-requeue"]},
        {"extra": ["--comment=a\nb"]},
        {"partition": "a b"},
        {"partition": "--wrap"},
        {"gres": "gpu:1;id"},
        {"time": "soon"},
        {"idle": -1},
        {"directory": None},
    ],
)
def test_options_that_could_be_something_else_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SlurmSection.model_validate({"directory": "/x", **wrong})


def test_a_trainer_is_set_up_completely_or_not_at_all() -> None:
    plain = Resources()
    assert plain.model_dump_json() == Resources(trainer="inside").model_dump_json()
    assert "trainer" not in plain.model_dump_json()
    for wrong in ({"trainer": "slurm"}, {"slurm": {"directory": "/x"}}, {"devices": 2}, {"trainer": "elsewhere"}):
        with pytest.raises(ValidationError):
            Resources.model_validate(wrong)
    slurm = Resources.model_validate({"trainer": "slurm", "slurm": {"directory": "here"}})
    assert slurm.within(Path("/site")).slurm == SlurmSection(directory=Path("/site/here"))
    assert slurm.inside == plain


def test_a_simulated_site_trains_inside(tmp_path: Path) -> None:
    file = site_toml(tmp_path, "north", class_rows(4), resources={"trainer": "process"})
    with pytest.raises(StudyError, match=r"resources.trainer: expected \"inside\""):
        load_simulated(file)
    with pytest.raises(ValidationError, match=r"resources.trainer: expected \"inside\""):
        Simulation.model_validate({"data": "notes", "resources": {"trainer": "process"}})
