"""A trainer apart from the keys: the same bits, no draw unpaid, and no answer that no records could give."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.numpy

from privet.client.rounds.answers import _failure
from privet.client.rounds.worker import Worker
from privet.client.site import Resources, SiteConfig, load_site
from privet.client.trainer.apart import Opening, Trainer
from privet.client.trainer.confinement import available
from privet.client.trainer.opening import opening, trainer_of
from privet.client.trainer.pipe import PipeChannel
from privet.client.trainer.reviewed import UNREVIEWED
from privet.client.trainer.wire import VERSION, Packet, ragged, unpack
from privet.common.errors import PrivetError, RefusedError, ScanError, SpentRoundError, StateError
from privet.common.study.messages import Contribution
from privet.common.study.study import Study
from tests.support.faulty_rounds import asked, begun, counted_draws
from tests.support.tiny import class_rows, counting_document, private, tiny_study
from tests.support.trainer_world import SITES, HereChannel, place, trainer_here, worker_at

MASKED = {"secure_aggregation": {"mode": "masked"}, "cohort.min_sites": 3, "aggregation.largest_count": 30}
ROUNDS = {"training.rounds": 20, "training.local_steps": 3}
SHARED: dict[str, Any] = {
    "privacy": private(epsilon=4.0, mode="distributed"),
    "training": {"optimizer": "sgd", "local_steps": 1, "learning_rate": 1.0, "rounds": 20},
    **MASKED,
    "aggregation": {"method": "ffa", "learning_rate": 0.01, "largest_count": 60},
}
PATIENTS = private(unit="patient")
STUDIES: dict[str, dict[str, Any]] = {
    "validated": {"privacy": private(), "data.validation_fraction": 0.3, **ROUNDS},
    "adaptive, of patients, proximal": {
        "privacy": {**PATIENTS, "clipping": "adaptive"},
        "data.unit": "patient",
        "training.fedprox_mu": 0.1,
        **ROUNDS,
    },
    "shared noise": SHARED,
    "head start": {"privacy": private(), "training.head_start": "class-means", **ROUNDS},
    "of a site with a rank of its own": {
        "privacy": private(),
        "aggregation.method": "ffa",
        "lora.site_ranks": {"ash": 1},
        **ROUNDS,
    },
    "banded noise": {
        **SHARED,
        "privacy": private(epsilon=4.0, mode="distributed", noise="banded", band=3),
        "cohort.sites": list(SITES),
        "training.sampling_rate": 0.25,
    },
    "no privacy": {"privacy": {"mode": "none"}, **ROUNDS},
}


def same(one: Contribution, other: Contribution) -> bool:
    kept = one.update.dtype == other.update.dtype and one.weight == other.weight
    return kept and one.update.tobytes() == other.update.tobytes() and one.metrics.tobytes() == other.metrics.tobytes()


@pytest.mark.parametrize("name", STUDIES)
def test_a_trainer_apart_gives_the_same_bits(
    bert: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, rows = tiny_study(bert, **STUDIES[name]), class_rows(36)
    inside = worker_at(place(tmp_path / "inside", study, rows))
    numbers = (1, 2) if study.training.head_start is not None else (1,)
    opened = [asked(study, inside, number, SITES) for number in numbers]
    expected = [inside._contribution(each) for each in opened]
    trainer_here(monkeypatch, HereChannel())
    apart = worker_at(place(tmp_path / "apart", study, rows, trainer="process"))
    for each, wanted in zip(opened, expected, strict=True):
        assert same(apart._contribution(each), wanted), name
    apart.close()


@pytest.mark.parametrize("kind", ["statistics", "evaluate"])
def test_a_trainer_apart_counts_the_same(
    bert: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = private(epsilon=1.0, unit="patient", max_records_per_unit=2)  # so that records of a patient are drawn
    more = {"evaluation": {"adapter": f"sha256:{'a' * 64}"}} if kind == "evaluate" else {}
    study = Study.parse(counting_document(bert, kind, {"data.unit": "patient", "privacy": few, **more}))
    inside = worker_at(place(tmp_path / "inside", study, class_rows(36)))
    opened = asked(study, inside, 1, SITES)
    trainer_here(monkeypatch, HereChannel())
    apart = worker_at(place(tmp_path / "apart", study, class_rows(36), trainer="process"))
    assert same(apart._contribution(opened), inside._contribution(opened))
    apart.close()


@pytest.mark.slow
def test_several_processes_share_the_units_of_a_step_and_give_the_same_bits(bert: Path, tmp_path: Path) -> None:
    study, rows = tiny_study(bert, **STUDIES["adaptive, of patients, proximal"]), class_rows(60)
    inside = worker_at(place(tmp_path / "inside", study, rows))
    opened = asked(study, inside, 1, SITES)
    expected = inside._contribution(opened)
    for devices in (2, 4):
        apart = worker_at(place(tmp_path / str(devices), study, rows, trainer="process", devices=devices))
        try:
            assert same(apart._contribution(opened), expected), devices
        finally:
            apart.close()


# --- a trainer that dies, and what was paid --------------------------------------------------------------


@pytest.mark.parametrize("name", ["validated", "shared noise"])
def test_a_trainer_that_dies_at_any_request_leaves_no_draw_unpaid(
    bert: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten points and more: before, between and after all of its answers."""
    study = tiny_study(bert, **STUDIES[name])
    opened = asked(study, worker_at(place(tmp_path / "inside", study)), 1, SITES)
    whole = HereChannel()
    trainer_here(monkeypatch, whole)
    worker = worker_at(place(tmp_path / "whole", study, trainer="process"))
    expected = worker._contribution(opened)
    worker.close()
    kinds = [packet.kind for packet in whole.asked]
    assert kinds[:2] == ["confine", "open"]
    outcomes = set()
    for point in range(len(kinds)):
        trainer_here(monkeypatch, HereChannel(dies_at=point))
        here = place(tmp_path / str(point), study, trainer="process")
        worker = worker_at(here)
        with counted_draws() as drawn, pytest.raises(StateError):
            worker._contribution(opened)
        assert begun(worker, 1) == bool(drawn), kinds[point]
        # A new process of the site asks a new trainer.
        trainer_here(monkeypatch, HereChannel())
        worker = worker_at(here)
        with counted_draws() as again:
            if drawn:
                with pytest.raises(SpentRoundError):
                    worker._contribution(opened)
            else:
                assert same(worker._contribution(opened), expected)
        worker.close()
        assert bool(again) != bool(drawn)
        assert begun(worker, 1) == 1
        outcomes.add((kinds[point], bool(drawn)))
    # Only a step, and what follows the first draw, comes after it.
    free = {"confine", "open"} | ({"validate"} if name == "validated" else {"begin"})
    assert {kind for kind, drew in outcomes if not drew} == free
    assert ("terms", True) in outcomes
    assert ("terms", False) not in outcomes


# --- a trainer that lies ---------------------------------------------------------------------------------


def bent(kind: str, change: Any) -> Any:
    def answer(asked: Packet, honest: Packet) -> Packet:
        return change(honest) if asked.kind == kind else honest

    return answer


def with_array(name: str, change: Any) -> Any:
    return lambda packet: replace(packet, arrays={**packet.arrays, name: change(packet.arrays[name])})


def with_head(**more: Any) -> Any:
    return lambda packet: replace(packet, head={**packet.head, **more})


def with_units(packet: Packet, count: int) -> Packet:
    more = {**ragged("units", [[0]] * count), "classes": np.zeros(0, np.int64)}
    return replace(packet, arrays={**packet.arrays, **more})


def metered(packet: Packet, **more: Any) -> Packet:
    return replace(packet, head={**packet.head, "meter": {**packet.head["meter"], **more}})


LIES: dict[str, tuple[str, Any]] = {
    "a sum longer than its units' can be": ("terms", with_array("total", lambda total: total + 2**55)),
    "a sum of other length": ("terms", with_array("total", lambda total: total[:-1])),
    "a sum of floats": ("terms", with_array("total", lambda total: total.astype(np.float64))),
    "no sum": ("terms", lambda packet: Packet("done", packet.head)),
    "a balance of more units than were drawn": ("terms", with_head(balance=31.0)),
    "a balance that is no half": ("terms", with_head(balance=0.25)),
    "a balance that is not finite": ("terms", with_head(balance=None)),
    "a validation beyond its units": ("validate", with_array("points", lambda points: points + 2**50)),
    "a negative validation": ("validate", with_array("points", lambda points: -points)),
    "other classes than units": ("open", with_array("classes", lambda found: np.zeros(3, np.int64))),
    "units that overlap their ends": ("open", with_array("units-ends", lambda ends: ends[::-1].copy())),
    "a layout that is none": ("open", with_head(spec={"tensors": [["a"]]})),
    "a count that is none": ("open", with_head(**{"held-out": "many"})),
    "more units held out than a study admits": ("open", with_head(**{"held-out": 10**6 + 1})),
    "more units than a site declares": ("open", lambda packet: with_units(packet, 10_100)),
    "names that are no digest": ("open", with_head(names="Maria Muster")),
    "a negative count": ("open", with_head(**{"held-out": -1})),
    "figures that are none": ("begin", with_head(meter={"seconds": {}})),
    "figures that fall": ("begin", lambda packet: metered(packet, tokens=-1)),
    "figures without end": ("begin", lambda packet: metered(packet, records=2**52, tokens=2**52, loss=1e300)),
    "an error of the ledger": (
        "terms",
        lambda _: Packet("error", {"type": "BudgetExhaustedError", "message": "row 7"}),
    ),
    "an error of no kind": ("terms", lambda _: Packet("error", {"type": "print", "message": "row 7"})),
}


@pytest.mark.parametrize("name", LIES)
def test_an_answer_that_no_records_could_give_is_refused_and_says_nothing_to_others(
    bert: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(bert, **STUDIES["validated"])
    opened = asked(study, worker_at(place(tmp_path / "inside", study)), 1, SITES)
    trainer_here(monkeypatch, HereChannel(bent(*LIES[name])))
    worker = worker_at(place(tmp_path / "apart", study, trainer="process"))
    with counted_draws() as drawn, pytest.raises(StateError) as caught:
        worker._contribution(opened)
    assert caught.value.private
    assert begun(worker, 1) == bool(drawn)
    worker.close()


def test_heads_that_are_no_numbers_are_refused(bert: Path) -> None:
    """Which JSON can write, though privet's own never holds them."""
    study = tiny_study(bert, **STUDIES["validated"])
    good = {"spec": {"tensors": []}, "declared": 5, "held-out": 3, "names": "", "verdict": None, "device": "cpu"}
    bad = [
        ("held-out", "Infinity"), ("held-out", "1e400"), ("verdict", "NaN"), ("verdict", str(2**60)), ("declared", "0"),
        ("declared", "-7"), ("spec", '{"tensors": [["a", ["x", 2], "full"]]}'), ("verdict", "[" * 9999 + "]" * 9999),
    ]  # fmt: skip
    body = safetensors.numpy.save({**ragged("units", [[0]] * 5), "classes": np.zeros(0, np.int64)})
    for name, value in [("declared", "5"), *bad]:
        text = json.dumps({"kind": "done", "head": {**good, name: "HERE"}}).replace('"HERE"', value).encode()
        trainer = Trainer(Opening(study, [], {}, None), [])
        if value == "5":
            trainer._learn(unpack(struct.pack(">I", len(text)) + text + body))
            continue
        with pytest.raises(StateError, match=r"cannot be read|no records can have"):
            trainer._learn(unpack(struct.pack(">I", len(text)) + text + body))


def test_a_layout_that_a_trainer_states_is_named_to_nobody(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers could be a record."""
    study, hidden = tiny_study(bert, **STUDIES["validated"]), 1_987_654
    opened = asked(study, worker_at(place(tmp_path / "inside", study)), 1, SITES)
    more = ["zzz", [hidden, 1], "full"]
    spec = with_head(spec={"tensors": [more]})
    longer: Any = lambda packet: with_head(spec={"tensors": [*packet.head["spec"]["tensors"], more]})(packet)  # noqa: E731
    for name, change in (("other", spec), ("longer", longer)):
        trainer_here(monkeypatch, HereChannel(bent("open", change)))
        worker = worker_at(place(tmp_path / name, study, trainer="process"))
        with pytest.raises(PrivetError, match=r"795\d{4} bytes") as caught:
            worker._contribution(opened)
        assert caught.value.private
        assert "795" not in str(_failure(caught.value))
        worker.close()


def apart_by(channel: HereChannel, bert: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Study, Worker]:
    """Return a validated study, and a site whose trainer apart is reached by a channel."""
    study = tiny_study(bert, **STUDIES["validated"])
    trainer_here(monkeypatch, channel)
    return study, worker_at(place(folder / "apart", study, trainer="process"))


def test_a_trainer_of_another_version_is_ended(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    channel = HereChannel()
    study, worker = apart_by(channel, bert, tmp_path, monkeypatch)
    channel.version = "0.9.0"
    with pytest.raises(StateError, match="another version of privet"):
        worker.offer(study)
    assert not channel.alive
    channel.version = VERSION
    assert worker.offer(study).weight == 30


def test_files_that_change_before_a_trainer_reads_them_again_are_noticed(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = HereChannel()
    study, worker = apart_by(channel, bert, tmp_path, monkeypatch)
    opened = asked(study, worker_at(place(tmp_path / "inside", study)), 1, SITES)
    worker.offer(study)
    channel.close()  # it dies, and a new one reads the files

    def changed(study: Study) -> None:
        raise ScanError("the files are others")

    monkeypatch.setattr(worker.site, "check_files", changed)
    with counted_draws() as drawn, pytest.raises(ScanError):
        worker._contribution(opened)
    assert not drawn
    assert not channel.alive
    monkeypatch.undo()
    worker.close()


class QueuedChannel(HereChannel):
    """A job that is queued until somebody cancels it."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.cancelled = threading.Event(), threading.Event()

    def receive(self, most: int, until: float) -> bytes:
        self.entered.set()
        assert self.cancelled.wait(60)
        raise StateError("the trainer's job ended")

    def close(self) -> None:
        self.cancelled.set()


def test_a_site_that_stops_cancels_a_job_that_a_message_waits_for(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = QueuedChannel()
    study, worker = apart_by(channel, bert, tmp_path, monkeypatch)
    waiting = threading.Thread(target=lambda: suppressed(lambda: worker.offer(study)), daemon=True)
    waiting.start()
    assert channel.entered.wait(60)
    worker.close()  # at once, though the message holds the lock
    assert channel.cancelled.is_set()
    waiting.join(60)
    with pytest.raises(StateError, match="process ends"):
        worker.offer(study)


def suppressed(what: Callable[[], object]) -> None:
    with suppress(PrivetError):
        what()


def test_errors_of_a_trainer_stay_at_the_site(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = tiny_study(bert, **STUDIES["validated"])
    for kind, message in (("StudyError", "Maria Muster"), ("RefusedError", "Maria Muster"), ("ValueError", "Maria")):
        head = {"type": kind, "message": message, "hint": "her file"}
        trainer_here(monkeypatch, HereChannel(bent("open", lambda _, head=head: Packet("error", head))))
        folder = tmp_path / kind
        worker = worker_at(place(folder, study, trainer="process"))
        with pytest.raises(PrivetError) as caught:
            worker.offer(study)
        assert caught.value.private
        assert not isinstance(caught.value, RefusedError)  # which a site signs


def test_a_trainer_that_ends_after_its_last_answer_costs_no_round(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update is paid and stored, so nothing more is asked of a trainer before it leaves."""
    channel = HereChannel()
    study, worker = apart_by(channel, bert, tmp_path, monkeypatch)
    opened = asked(study, worker_at(place(tmp_path / "inside", study)), 1, SITES)
    contribution = worker._contribution(opened)
    channel.close()
    count = len(channel.asked)
    units = worker._units(study)
    assert units["units"] > 0
    assert len(channel.asked) == count
    assert same(worker._contribution(opened), contribution)
    worker.close()


def test_a_trainer_beside_a_gpu_does_not_fall_back_to_the_processor_in_silence(bert: Path) -> None:
    study = tiny_study(bert, **STUDIES["validated"])
    head = {"spec": {"tensors": []}, "declared": 5, "held-out": 3, "names": "", "verdict": "", "device": "cpu"}
    answer = Packet("done", head, {**ragged("units", [[0]] * 5), "classes": np.zeros(0, np.int64)})
    Trainer(Opening(study, [], {}, None), [])._learn(answer)
    with pytest.raises(StateError, match="sees a GPU and the trainer does not"):
        Trainer(Opening(study, [], {}, None, gpus=1), [])._learn(answer)
    Trainer(Opening(study, [], {}, None, gpus=1), [])._learn(replace(answer, head={**head, "device": "cuda"}))


def test_a_base_with_a_link_to_a_key_makes_no_key_readable(bert: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bert, base)
    study = tiny_study(base, **STUDIES["validated"])
    file = place(tmp_path / "apart", study, trainer="process")
    config = load_site(file)
    (base / "NOTICE").symlink_to(tmp_path / "apart/ash.pem")
    told = {"begun": False, "split_key": b"", "distinct": False, "planting": None, "withdrawn": None}
    opened = opening(config, study, **told)  # type: ignore[arg-type]
    assert str(tmp_path / "apart/ash.pem") not in opened.readable
    assert str((base / "config.json").resolve()) in opened.readable
    trainer_of(config, opened, lambda: None).close()
    with pytest.raises(StateError, match="lies where a trainer reads"):
        trainer_of(config, replace(opened, readable=[*opened.readable, str(tmp_path / "apart")]), lambda: None)


def test_other_files_are_another_opening(bert: Path, tmp_path: Path) -> None:
    """A job that has read them as they were is not taken over."""
    study = tiny_study(bert, **STUDIES["validated"])
    config = load_site(place(tmp_path / "apart", study, trainer="process"))
    told = {"begun": False, "split_key": b"", "distinct": False, "planting": None, "withdrawn": None}
    before = opening(config, study, **told).digest  # type: ignore[arg-type]
    assert opening(config, study, **told).digest == before  # type: ignore[arg-type]
    os.utime(config.train[0], ns=(0, 0))
    assert opening(config, study, **told).digest != before  # type: ignore[arg-type]


# --- a process of its own --------------------------------------------------------------------------------


def test_a_process_of_its_own_has_pipes_and_nothing_else_of_the_site(
    bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "privet.site")
    study = tiny_study(bert, **STUDIES["validated"])
    inside = worker_at(place(tmp_path / "inside", study))
    opened = [asked(study, inside, number, SITES) for number in (1, 2)]
    worker = worker_at(place(tmp_path / "apart", study, trainer="process"))
    assert same(worker._contribution(opened[0]), inside._contribution(opened[0]))
    channel = channel_of(worker)
    child, can = channel._child, available()
    assert child is not None
    proc = Path(f"/proc/{child.pid}")
    opened_files = [str(link.readlink()) for link in (proc / "fd").iterdir() if link.is_symlink()]
    assert sum(name.startswith("pipe:") for name in opened_files) == 2
    strays = {name for name in opened_files if not name.startswith(("pipe:", "/dev/", "/proc/", str(bert.resolve())))}
    assert not any("ash" in name or name.startswith("socket:") for name in strays)
    for status in [task.read_text() for task in (proc / "task").glob("*/status")]:  # of every thread
        assert ("Seccomp:\t2" in status) == can.network
        assert "NoNewPrivs:\t1" in status
    assert [record.getMessage() for record in caplog.records if "apart" in record.getMessage()] == [
        f"the trainer runs apart from the keys; {can.text}"
    ]
    environment = (proc / "environ").read_bytes().split(b"\0")
    assert not any(name.startswith((b"AWS", b"SSH", b"HTTPS_PROXY", b"PYTEST")) for name in environment)
    assert (proc / "cwd").readlink() == channel.home
    assert channel.home.parent.parent == tmp_path / "apart/ash.state/trainer"
    # Killed in the middle of a step: the round is begun, so it is lost; the next one has a new trainer.
    killed = sending("terms", lambda: os.kill(child.pid, signal.SIGKILL))
    with killed, pytest.raises(StateError, match="ended with signal 9"):
        worker._contribution(opened[1])
    assert begun(worker, 2) == 1
    with pytest.raises(SpentRoundError):
        worker._contribution(opened[1])
    worker.close()
    assert channel._child is None
    assert not proc.exists()


def channel_of(worker: Worker) -> PipeChannel:
    assert worker._open is not None
    trainer = worker._open[3]
    assert isinstance(trainer, Trainer)
    (channel,) = trainer.channels
    assert isinstance(channel, PipeChannel)
    return channel


@contextmanager
def sending(kind: str, then: Callable[[], None]) -> Iterator[None]:
    """Do something after a request of this kind was sent."""
    with pytest.MonkeyPatch.context() as patch:
        original = PipeChannel.send

        def send(self: PipeChannel, body: bytes, until: float) -> None:
            original(self, body, until)
            if unpack(body).kind == kind:
                then()

        patch.setattr(PipeChannel, "send", send)
        yield


def test_a_trainer_that_answers_too_late_or_too_much_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privet.client.trainer.pipe.MODULE", "tests_no_such_module")
    channel = PipeChannel(tmp_path / "none")
    channel.open()
    with pytest.raises(StateError, match="ended with exit code 1"):
        channel.receive(10, time.monotonic() + 20)
    channel.close()
    with pytest.raises(StateError, match="does not run"):
        channel.send(b"", time.monotonic() + 1)
    monkeypatch.setattr("privet.client.trainer.pipe.MODULE", "this")  # it prints 856 bytes, and ends
    channel.open()
    with pytest.raises(StateError, match="at most 10 bytes"):
        channel.receive(10, time.monotonic() + 20)
    channel.close()
    monkeypatch.setattr("privet.client.trainer.pipe.MODULE", "http.server")  # it says nothing
    channel.open()
    with pytest.raises(StateError, match="did not answer within hours"):
        channel.receive(10, time.monotonic() + 0.2)
    channel.close()


@pytest.mark.parametrize("given", [None, "0", "yes"])
def test_a_trainer_apart_is_refused_until_its_review_has_ended(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    monkeypatch.delenv(UNREVIEWED)
    if given is not None:
        monkeypatch.setenv(UNREVIEWED, given)
    config = SiteConfig(name="ash", train=(Path("notes.csv"),), resources=Resources(trainer="process"))
    with pytest.raises(StateError, match="its review is not complete") as caught:
        trainer_of(config, cast("Opening", None), lambda: None)
    assert 'trainer = "inside"' in caught.value.hint
