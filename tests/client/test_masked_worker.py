"""Workers in masked rounds, with a real model: what they refuse, what they repeat, and whole rounds through Flower."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import Context
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from pydantic import ValidationError

from privet.client.app import app as client_app
from privet.client.app import find_worker
from privet.client.budget.releases import Releases
from privet.client.rounds import worker as client_worker
from privet.client.rounds.site import RealSite
from privet.client.rounds.worker import Worker
from privet.client.training.model import initial_adapter, peft_config_text
from privet.client.training.train import train_round
from privet.common.errors import (
    DivergedError,
    PrivetError,
    ProtocolError,
    RefusedError,
    StateError,
    StudyError,
    VerificationError,
)
from privet.common.masking.parameters import parameters_of
from privet.common.pki.keyfile import make_key, public_key, read_key
from privet.common.secagg.encoding import decode, encode
from privet.common.secagg.messages import Advertise
from privet.common.secagg.site import RecordedStep
from privet.common.study.adapter import Adapter
from privet.common.study.messages import Failure, Message, Offer, RoundOpen, Secured
from privet.common.study.study import Study
from privet.server.app import app as server_app
from privet.server.network.grid import GridExchange
from privet.server.rounds.consent import gather_participants
from privet.server.rounds.masked import Waits, collect_masked
from privet.server.rounds.participants import Participant, RoundSum
from privet.server.rounds.state import RunDirectory, RunState
from privet.simulations.engines.ray_client import RecallingWorker, open_recalling
from privet.simulations.engines.ray_client import app as simulated_app
from privet.simulations.sites import SimulatedSite, load_simulated
from tests.support.masked_world import STAGES, stage_of
from tests.support.memory_grid import MemoryGrid, run_in_memory
from tests.support.site_log import logged
from tests.support.synthetic import unlogged
from tests.support.tiny import (
    class_rows,
    make_ledger,
    private,
    random_adapter,
    site_of,
    site_toml,
    tiny_study,
    worker_of,
)

SITES = ("ash", "elm", "oak")
NODES = (11, 12, 13)
MASKED = {
    "secure_aggregation": {"mode": "masked"},
    "cohort": {"min_sites": 3},
    "aggregation": {"largest_count": 30},
}
WATCHED = {"data.validation_fraction": 0.3}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What survives a power cut is not the subject here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def masked_study(base: Path, **overrides: Any) -> Study:
    return tiny_study(base, **{**MASKED, **overrides})


def site_file(folder: Path, name: str, tables: Mapping[str, Mapping[str, Any]], **more: Any) -> Path:
    """Write a site's file with further tables, such as its peers."""
    path = site_toml(folder, name, class_rows(30, seed=SITES.index(name)), **more)
    lines = [f"[{t}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in rows.items()) for t, rows in tables.items()]
    path.write_text(path.read_text() + "".join(lines))
    return path


def simulated(folder: Path) -> list[Path]:
    """Write the files of simulated sites."""
    return [site_file(folder, name, {}, peers=SITES) for name in SITES]


def real(folder: Path, study: Study, **tables: Mapping[str, Any]) -> list[Path]:
    """Write the files of sites that are no simulation, each with a key and a ledger of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = {name: public_key(make_key(folder / f"{name}.pem")) for name in SITES}
    more = {"peers": keys, **tables}
    return [site_file(folder, n, more, identity=f"{n}.pem", **agreed(folder, n, study)) for n in SITES]


def agreed(folder: Path, name: str, study: Study) -> dict[str, Any]:
    """Return the keys by which a site's file agrees to a study, and make the ledger that they name."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {"dataset": name, **make_ledger(folder, name), "witnesses": SITES}
    return {"seed": None, "studies": [study.digest], "declared_count": 30, **own}


def workers(files: Iterable[Path]) -> dict[int, Worker]:
    return dict(zip(NODES, (worker_of(file) for file in files), strict=True))


def ask(worker: Worker, asked: Message) -> Message:
    """Answer a message as the app does, without Flower."""
    if isinstance(asked, Offer):
        return worker.offer(Study.parse(dict(asked.study)))
    if isinstance(asked, RoundOpen):
        return worker.advertise(asked) if asked.masking else worker.update(asked)
    assert isinstance(asked, Secured)
    return worker.answer(asked)


@dataclass
class Workers:
    """An exchange with workers in this process. Keeps, by node, what was asked and answered in rounds."""

    sites: Mapping[int, Worker]

    def __post_init__(self) -> None:
        self.asked: dict[int, list[Any]] = {node: [] for node in self.sites}
        self.answers: dict[int, list[Message]] = {node: [] for node in self.sites}

    def nodes(self) -> Sequence[int]:
        return sorted(self.sites)

    def ask(self, requests: Mapping[int, Message], *, timeout: float) -> Iterable[tuple[int, Message]]:
        for node, asked in requests.items():
            answer = self.answer(node, asked)
            self.asked[node].append(asked)
            self.answers[node].append(answer)
            yield node, answer

    def answer(self, node: int, asked: Message) -> Message:
        try:
            return ask(self.sites[node], asked)
        except PrivetError as error:
            return Failure(type(error).__name__, error.message, error.hint)


def opened_for(study: Study, adapter: Adapter, number: int = 1, nonce: str = "1" * 32) -> RoundOpen:
    return RoundOpen(study.document(), number, nonce, adapter.digest, SITES, adapter.data)


def in_log(sites: Mapping[int, Worker], opened: RoundOpen) -> RoundOpen:
    """Return the round as it stands in the sites' log, where they are no simulation."""
    named = {worker.name: worker for worker in sites.values()}
    real = all(isinstance(worker.site, RealSite) for worker in named.values())
    return logged(named, opened) if real else opened


def one_round(
    study: Study,
    sites: Mapping[int, Worker],
    number: int = 1,
    nonce: str = "1" * 32,
    exchange: Workers | None = None,
) -> tuple[RoundSum, Workers, Adapter]:
    """Run one masked round over workers from an adapter without zeros."""
    exchange = exchange or Workers(sites)
    adapter = random_adapter(next(iter(sites.values())).open(study)[1].spec, scale=0.1)
    members = {worker.name: Participant(node, worker.offer(study)) for node, worker in sites.items()}
    opened = in_log(sites, opened_for(study, adapter, number, nonce))
    total = collect_masked(exchange, study, adapter.spec, members, opened, Waits(60, 60))
    return total, exchange, adapter


def proposed(study: Study, sites: Mapping[int, Worker], adapter: Adapter) -> RoundOpen:
    """Return an opened round with the parameters that follow from the study."""
    opened = in_log(sites, opened_for(study, adapter))
    keys = {w.name: bytes.fromhex(w.offer(study).identity) for w in sites.values()}
    return replace(opened, declared=30, masking=encode(parameters_of(study, adapter.spec, opened, keys)))


# --- whole rounds ----------------------------------------------------------------------------------------


def test_a_masked_round_gives_the_sum_of_what_the_workers_would_send_in_the_clear(bert: Path, tmp_path: Path) -> None:
    study, plain = masked_study(bert, **WATCHED), tiny_study(bert, cohort={"min_sites": 3}, **WATCHED)
    total, exchange, adapter = one_round(study, workers(simulated(tmp_path / "masked")))
    clear = [w.update(opened_for(plain, adapter)) for w in workers(simulated(tmp_path / "plain")).values()]
    assert total.survivors == SITES
    assert total.failures == {}
    assert total.weight == sum(sent.weight for sent in clear)
    group = total.groups[0]
    assert group["values_cut"] == 0
    # Three sites, each less than one level off, and single precision.
    level = max(sent.weight for sent in clear) * 4 * 0.02 * 3 / 2 ** (group["bits"] - 1)
    expected = np.sum([sent.update.astype(np.float64) for sent in clear], axis=0)
    assert np.abs(total.update - expected).max() < 3.1 * level
    assert np.abs(expected).max() > 1000 * level
    assert total.metrics == pytest.approx(np.sum([sent.metrics for sent in clear], axis=0), abs=1e-3)
    assert {type(answer) for answers in exchange.answers.values() for answer in answers} == {Secured}


def start_run(folder: Path, study: Study, files: Sequence[Path]) -> RunDirectory:
    host = worker_of(files[0]).open(study)[1]
    return RunDirectory.create(folder, study, initial_adapter(study, host), peft_config_text(host, study))


def through_flower(run: RunDirectory, files: Sequence[Path], app: ClientApp = simulated_app) -> RunState:
    nodes = {node: {"site": str(file)} for node, file in zip(NODES, files, strict=True)}
    run_in_memory(server_app, app, nodes, {"run": str(run.path), "round-timeout": 60, "step-timeout": 60})
    return run.load()


def forgetful() -> ClientApp:
    """Return a client app that answers every message in a new process, as far as workers can tell."""
    app = ClientApp()

    def answer(message: FlowerMessage, context: Context) -> FlowerMessage:
        open_recalling.cache_clear()
        return simulated_app(message, context)

    app.query("offer")(answer)
    app.query("shown")(answer)
    app.train("update")(answer)
    app.train("secured")(answer)
    return app


def test_a_study_through_the_flower_apps_ends_where_the_plain_one_does(bert: Path, tmp_path: Path) -> None:
    study, plain = masked_study(bert, **WATCHED), tiny_study(bert, cohort={"min_sites": 3}, **WATCHED)
    states = []
    for name, chosen in (("masked", study), ("plain", plain)):
        files = simulated(tmp_path / name / "sites")
        states.append(through_flower(start_run(tmp_path / name / "run", chosen, files), files))
    masked, clear = states
    assert [s["type"] for s in masked.statements] == ["round-close"] * 2
    for here, there in zip(masked.statements, clear.statements, strict=True):
        assert here["survivors"] == there["survivors"] == list(SITES)
        assert here["metrics"] == pytest.approx(there["metrics"], abs=1e-3)
        assert here["masking"][0]["values_cut"] == 0
    distance = max(np.abs(v - clear.adapter.values[name]).max() for name, v in masked.adapter.values.items())
    moved = max(np.abs(v).max() for v in masked.adapter.values.values())
    assert 0 < distance < 1e-4 < 0.01 < moved


@pytest.mark.slow
def test_whichever_process_answers_simulated_sites_send_the_same_bytes(bert: Path, tmp_path: Path) -> None:
    study = masked_study(bert, **WATCHED)
    digests = set()
    for name, app in (("one", simulated_app), ("many", forgetful()), ("again", simulated_app)):
        files = simulated(tmp_path / name / "sites")
        state = through_flower(start_run(tmp_path / name / "run", study, files), files, app)
        assert [s["type"] for s in state.statements] == ["round-close"] * 2
        digests.add(state.adapter.digest)
    assert len(digests) == 1


@pytest.mark.slow
def test_a_private_study_is_masked_too(bert: Path, tmp_path: Path) -> None:
    study = masked_study(bert, privacy=private(), **WATCHED, **{"training.sampling_rate": 1.0})
    files = simulated(tmp_path / "sites")
    state = through_flower(start_run(tmp_path / "run", study, files), files)
    assert [s["survivors"] for s in state.statements] == [list(SITES)] * 2
    assert state.statements[0]["privacy"]["epsilon"].keys() == set(SITES)


# --- another process -------------------------------------------------------------------------------------


def test_a_second_process_takes_a_simulated_sites_round_up_from_what_was_asked(bert: Path, tmp_path: Path) -> None:
    study, files = masked_study(bert), simulated(tmp_path)
    _, exchange, _ = one_round(study, workers(files))
    asked, answers = exchange.asked[12], exchange.answers[12]
    assert [stage_of(message) for message in asked] == list(STAGES)
    for position in range(1, len(STAGES)):
        second = RecallingWorker(SimulatedSite(load_simulated(files[1])))
        # And it goes on from where it stands.
        for now in range(position, len(STAGES)):
            second.heard = asked[:now]
            assert second.answer(asked[now]) == answers[now]
    with pytest.raises(ProtocolError, match="has restarted since it began"):
        worker_of(files[1]).answer(asked[1])


def test_messages_of_two_studies_wait_for_no_model_of_the_other(bert: Path, tmp_path: Path) -> None:
    study, files = masked_study(bert), simulated(tmp_path)
    _, exchange, _ = one_round(study, workers(files))
    other = masked_study(bert, name="another", **{"training.learning_rate": 0.5})
    worker = worker_of(files[1])
    answers = [worker.advertise(exchange.asked[12][0])]
    _, host = worker.open(other)
    answered = threading.Event()

    def answer() -> None:
        answers.append(worker.answer(exchange.asked[12][1]))
        answered.set()

    with host.lock:  # the other study is training
        asking = threading.Thread(target=answer)
        asking.start()
        assert answered.wait(20)
    asking.join()
    assert answers == exchange.answers[12][:2]


def test_a_confirmation_that_is_withdrawn_in_mid_round_keeps_the_update_at_home(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, files = masked_study(bert), simulated(tmp_path)
    _, exchange, _ = one_round(study, workers(files))
    worker = worker_of(files[1])
    answers = [worker.advertise(exchange.asked[12][0]), worker.answer(exchange.asked[12][1])]
    assert answers == exchange.answers[12][:2]
    kept = {name: key for name, key in worker.site.config.pins().items() if name != "ash"}
    monkeypatch.setattr(type(worker.site.config), "pins", lambda self: kept)
    with pytest.raises(RefusedError, match="has not pinned"):
        worker.answer(exchange.asked[12][2])


def test_a_site_that_is_not_simulated_takes_nothing_up(bert: Path, tmp_path: Path) -> None:
    study = masked_study(bert)
    files = real(tmp_path, study)
    total, exchange, _ = one_round(study, workers(files))
    assert total.survivors == SITES
    for position in range(1, len(STAGES)):
        restarted = worker_of(files[1])
        restarted.offer(study)
        with pytest.raises(ProtocolError, match="has restarted since it began"):
            restarted.answer(exchange.asked[12][position])


def test_a_site_that_is_not_simulated_leaves_nothing_of_a_round_in_flowers_context(bert: Path, tmp_path: Path) -> None:
    study = masked_study(bert)
    for app, files, kept in (
        (client_app, real(tmp_path / "real", study), 0),
        (simulated_app, simulated(tmp_path / "simulated"), 1),
    ):
        grid = MemoryGrid(app, {n: {"site": str(f)} for n, f in zip(NODES, files, strict=True)})
        sites = workers(files)
        opened = proposed(study, sites, random_adapter(sites[11].open(study)[1].spec))
        replies = dict(GridExchange(grid, poll=0.001).ask(dict.fromkeys(NODES, opened), timeout=60))
        assert {type(reply) for reply in replies.values()} == {Secured}
        assert {len(context.state) for context in grid._contexts.values()} == {kept}


def test_flower_runs_no_trainer_apart(bert: Path, tmp_path: Path) -> None:
    """It may start a process for each message, and each would start a trainer."""
    file = real(tmp_path / "real", masked_study(bert))[0]
    text = file.read_text()
    assert "[resources]\n" in text
    file.write_text(text.replace("[resources]\n", '[resources]\ntrainer = "process"\n'))
    with pytest.raises(StudyError, match="which a SuperNode of Flower does not run"):
        find_worker(SimpleNamespace(node_config={"site": str(file)}))  # type: ignore[arg-type]


def test_keys_of_real_sites_are_fresh_and_those_of_simulated_ones_follow_from_the_seed(
    bert: Path, tmp_path: Path
) -> None:
    study = masked_study(bert)
    for files, fresh in ((real(tmp_path / "real", study), True), (simulated(tmp_path / "simulated"), False)):
        sites = workers(files)
        opened = proposed(study, sites, random_adapter(sites[11].open(study)[1].spec))
        adverts = [
            decode(Advertise, worker_of(files[0]).advertise(in_log(sites, replace(opened, nonce=nonce))).body)
            for nonce in ("1" * 32, "2" * 32)
        ]
        for key in ("share_key", "kem_key", "nonce"):
            assert (getattr(adverts[0], key) != getattr(adverts[1], key)) == fresh


# --- what a worker refuses -------------------------------------------------------------------------------


def app_says(file: Path, asked: Message) -> Message:
    app = client_app if isinstance(site_of(file), RealSite) else simulated_app
    grid = MemoryGrid(app, {11: {"site": str(file)}})
    return dict(GridExchange(grid, poll=0.001).ask({11: asked}, timeout=60))[11]


def test_a_masked_study_is_never_answered_in_the_clear(bert: Path, tmp_path: Path) -> None:
    study = masked_study(bert)
    for files in (simulated(tmp_path / "simulated"), real(tmp_path / "real", study)):
        worker = worker_of(files[0])
        opened = in_log(workers(files), opened_for(study, random_adapter(worker.open(study)[1].spec)))
        with pytest.raises(ProtocolError, match="the study masks updates, so this site sends none in the clear"):
            worker.update(opened)
        # With parameters, update is no way around either.
        with pytest.raises(ProtocolError, match="sends none in the clear"):
            worker.update(replace(opened, masking=b"PSA"))
        reply = app_says(files[0], opened)
        assert isinstance(reply, Failure)
        assert (reply.error, "in the clear" in reply.message) == ("ProtocolError", True)


def test_a_plain_study_is_not_masked(bert: Path, tmp_path: Path) -> None:
    study, files = masked_study(bert), simulated(tmp_path)
    sites = workers(files)
    opened = proposed(study, sites, random_adapter(sites[11].open(study)[1].spec))
    plain = tiny_study(bert)
    with pytest.raises(ProtocolError, match="the study does not mask updates"):
        sites[11].advertise(replace(opened, study=plain.document()))
    reply = app_says(files[0], replace(opened, study=plain.document()))
    assert isinstance(reply, Failure)
    assert "does not mask" in reply.message


def test_a_round_that_is_not_this_sites_is_not_begun(bert: Path, tmp_path: Path) -> None:
    study = masked_study(bert)
    sites = workers(real(tmp_path, study))
    worker = sites[11]
    adapter = random_adapter(worker.open(study)[1].spec)
    good = proposed(study, sites, adapter)
    broken = adapter.replace({adapter.spec.names[0]: np.full_like(adapter.values[adapter.spec.names[0]], np.nan)})
    other = masked_study(bert, seed=8)
    for wrong, error, text in (
        (replace(good, cohort=("elm", "oak")), ProtocolError, "not in the round's cohort"),
        (replace(good, cohort=(*SITES, "yew")), RefusedError, "1 sites whose public keys this site has not pinned"),
        (replace(good, cohort=("ash", "elm")), RefusedError, "at least 3 different sites"),
        (
            replace(good, cohort=("ash", "elm", "elm", "oak")),
            VerificationError,
            "the round log does not hold the cohort that this site expects",
        ),
        (
            replace(good, cohort=("oak", "elm", "ash")),
            VerificationError,
            "the round log does not hold the cohort that this site expects",
        ),
        (replace(good, round=0), ProtocolError, "expected a round from 1 to 2"),
        (replace(good, round=3), ProtocolError, "expected a round from 1 to 2"),
        (replace(good, round=2), ProtocolError, "do not follow from the study"),
        (replace(good, masking=b"PSA\x01\x01"), ProtocolError, "bytes"),
        (replace(good, masking=good.masking + b"\0"), ProtocolError, "too many"),
        (replace(good, adapter_digest="sha256:" + "0" * 64), VerificationError, "expected adapter"),
        (replace(good, adapter=good.adapter[:-4]), ProtocolError, "layout"),
        (replace(good, adapter=broken.data, adapter_digest=broken.digest), DivergedError, "not finite"),
        (replace(good, study=other.document()), RefusedError, "has not approved"),
    ):
        with contextlib.suppress(ValidationError):  # some lies cannot be told in a statement
            wrong = in_log(sites, wrong)
        with pytest.raises(error, match=text):
            worker.advertise(wrong)
    assert isinstance(worker.advertise(in_log(sites, good)), Secured)


def test_a_site_takes_no_part_without_a_key_and_peers(bert: Path, tmp_path: Path) -> None:
    study = masked_study(bert)
    key, other = (public_key(make_key(tmp_path / f"{name}.pem")) for name in ("ash", "other"))
    lacking: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "no identity": ({"ash": key}, {}),
        "no peers": ({}, {"identity": "../ash.pem"}),
        "own key not among them": ({"elm": key}, {"identity": "../ash.pem"}),
        "another key pinned": ({"ash": other}, {"identity": "../ash.pem"}),
        "simulated": ({"elm": key}, {}),
    }
    for what, (peers, keys) in lacking.items():
        folder = tmp_path / what.replace(" ", "-")
        if what != "simulated":
            keys = {**keys, **agreed(folder, "ash", study)}
        file = site_file(folder, "ash", {"peers": peers}, **keys)
        (file.parent / "ash-train.jsonl").unlink()  # whoever opened the data would fail otherwise
        with pytest.raises(RefusedError) as caught:
            worker_of(file).offer(study)
        assert "must name this site's identity key and pin the public keys of all sites" in caught.value.message, what
        assert re.search(r"privet( site)? identity", caught.value.hint)
        assert "[peers]" in caught.value.hint
        reply = app_says(file, Offer(study.document()))
        assert isinstance(reply, Failure)
        assert (reply.error, reply.hint) == ("RefusedError", caught.value.hint)
    # A plain study needs none of it.
    simulated_site = site_of(site_file(tmp_path / "f", "ash", {}))
    own = simulated_site.config.identity_key()
    assert own is not None
    assert Worker(simulated_site).offer(tiny_study(bert)).identity == public_key(own)


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o620, 0o644, 0o601])
def test_a_key_that_others_may_read_is_refused(bert: Path, tmp_path: Path, mode: int) -> None:
    study = masked_study(bert)
    file = real(tmp_path, study)[0]
    (tmp_path / "ash.pem").chmod(mode)
    with pytest.raises(PrivetError, match="other users of this machine can read this private key") as caught:
        worker_of(file).offer(study)
    assert caught.value.hint == f"run `chmod 600 {tmp_path / 'ash.pem'}`"
    reply = app_says(file, Offer(study.document()))
    assert isinstance(reply, Failure)
    assert str(tmp_path) not in f"{reply.message}{reply.hint}"  # where the site keeps it is its own business
    (tmp_path / "ash.pem").chmod(0o400)
    worker_of(file).offer(study)


def test_a_file_that_is_no_identity_key_says_how_to_make_one(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    secret = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEI not base64\n-----END PRIVATE KEY-----\n"
    pem = X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "text.pem").write_text(secret)
    (tmp_path / "x25519.pem").write_bytes(pem)
    (tmp_path / "empty.pem").touch()
    (tmp_path / "folder.pem").mkdir(mode=0o700)
    for name in ("text", "x25519", "empty", "folder", "missing"):
        path = tmp_path / f"{name}.pem"
        if path.is_file():
            path.chmod(0o600)
        with pytest.raises(PrivetError) as caught:
            read_key(path, "identity")
        assert re.search(r"privet( site)? identity", caught.value.hint)
        assert "MC4CAQ" not in str(caught.value)


def test_an_identity_is_written_for_its_owner_alone_and_never_over_another(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    key = make_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert isinstance(read_key(path, "identity"), Ed25519PrivateKey)
    assert public_key(read_key(path, "identity")) == public_key(key)
    before = path.read_bytes()
    with pytest.raises(StateError, match="exists already"):
        make_key(path)
    assert path.read_bytes() == before
    with pytest.raises(StateError, match="cannot be written"):
        make_key(tmp_path / "nowhere" / "identity.pem")


def test_a_peer_that_the_site_does_not_know_or_knows_by_another_key_is_refused(bert: Path, tmp_path: Path) -> None:
    study = masked_study(bert)
    files = real(tmp_path, study)
    sites = workers(files)
    good = proposed(study, sites, random_adapter(sites[11].open(study)[1].spec))
    peers = sites[11].site.config.peers
    for changed, error, text in (
        (
            {name: key for name, key in peers.items() if name != "oak"},
            RefusedError,
            "its cohort holds 1 sites whose public keys this site has not pinned",
        ),
        (
            {**peers, "oak": "ab" * 32},
            VerificationError,
            "the round log does not hold the identity keys of the cohort that this site expects",
        ),
    ):
        site = sites[11].site.config.model_copy(update={"peers": changed})
        with pytest.raises(error, match=text):
            Worker(RealSite(site)).advertise(good)


@pytest.mark.parametrize(
    ("floor", "text"),
    [
        ({"cohort": 4}, "cohort must be at least 4, the coordinator proposed 3"),
        ({"survivors": 4}, "least number of survivors must be at least 4, the coordinator proposed 3"),
        ({"threshold": 4}, "threshold must be at least 4, the coordinator proposed 3"),
        ({"corrupt": 2}, "corrupt sites that it withstands must be at least 2, the coordinator proposed 1"),
        ({"corrupt_fraction": 0.7}, "corrupt sites that it withstands must be at least 2, the coordinator proposed 1"),
        ({"bits": 20}, "bits for one value must be at least 20, the coordinator proposed 19"),
    ],
)
def test_a_sites_own_floor_stands_in_its_file(bert: Path, tmp_path: Path, floor: Mapping[str, Any], text: str) -> None:
    study = masked_study(bert)
    sites = workers(real(tmp_path, study, floor=floor))
    opened = proposed(study, sites, random_adapter(sites[11].open(study)[1].spec))
    with pytest.raises(RefusedError, match=text):
        sites[11].advertise(opened)


@pytest.mark.parametrize(
    ("floor", "suite", "text"),
    [
        ({}, "x25519", "E_SUITE: floor.classical: asked x25519, allowed p256-mlkem768, x25519-mlkem768"),
        ({"fips": True}, None, "E_SUITE: floor.fips: asked x25519-mlkem768, allowed p256-mlkem768"),
        ({"fips": True}, "p256-mlkem768", None),
        ({"classical": True}, "x25519", None),
    ],
)
def test_a_site_refuses_a_weaker_key_agreement_before_it_opens_a_file(
    bert: Path, tmp_path: Path, floor: Mapping[str, Any], suite: str | None, text: str | None
) -> None:
    named = {} if suite is None else {"secure_aggregation.suite": suite}
    study = masked_study(bert, **named)
    worker = worker_of(real(tmp_path, study, floor=floor)[0])
    if text is None:
        assert worker.offer(study).study_digest == study.digest
        return
    with pytest.raises(RefusedError, match=text):
        worker.offer(study)
    assert worker._open is None


def test_a_site_consents_to_no_study_without_room_for_its_units(bert: Path, tmp_path: Path) -> None:
    study = masked_study(bert, **{"aggregation.largest_count": 29})
    worker = worker_of(real(tmp_path / "real", study)[0])
    with pytest.raises(RefusedError, match="E_LARGEST_COUNT: declared_count: asked at most 29 units of a site"):
        worker.offer(study)
    assert worker._open is None  # what is declared is judged before a file is opened
    plain = tiny_study(bert, **{"aggregation.largest_count": 3})
    with pytest.raises(RefusedError, match=r"the study allows at most 3 \(aggregation\.largest_count\)"):
        worker_of(site_file(tmp_path / "simulated", "ash", {})).offer(plain)


# --- once, and again -------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the times that workers train."""
    times: list[int] = []

    def train(*args: Any, **keys: Any) -> Any:
        times.append(1)
        return train_round(*args, **keys)

    monkeypatch.setattr(client_worker, "train_round", train)
    return times


class Twice(Workers):
    """Asks everything twice."""

    def answer(self, node: int, asked: Message) -> Message:
        first = super().answer(node, asked)
        assert super().answer(node, asked) == first
        return first


def test_a_message_asked_again_is_answered_with_the_same_bytes_and_trained_once(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, trained = masked_study(bert), counted(monkeypatch)
    sites = workers(real(tmp_path, study))
    total, exchange, _ = one_round(study, sites, exchange=Twice(sites))
    assert total.survivors == SITES
    assert all(len(answers) == len(STAGES) for answers in exchange.answers.values())
    assert len(trained) == len(SITES)


@dataclass
class TwiceThroughFlower:
    """An exchange with the client app that sends every message twice."""

    grid: GridExchange

    def nodes(self) -> Sequence[int]:
        return self.grid.nodes()

    def ask(self, requests: Mapping[int, Message], *, timeout: float) -> Iterable[tuple[int, Message]]:
        first = dict(self.grid.ask(requests, timeout=timeout))
        assert dict(self.grid.ask(requests, timeout=timeout)) == first
        return first.items()


@pytest.mark.parametrize(
    "kind",
    [
        "real",
        "simulated",
    ],
)
def test_messages_that_flower_delivers_twice_harm_no_round(bert: Path, tmp_path: Path, kind: str) -> None:
    study = masked_study(bert)
    files = real(tmp_path, study) if kind == "real" else simulated(tmp_path)
    app = client_app if kind == "real" else simulated_app
    grid = MemoryGrid(app, {n: {"site": str(f)} for n, f in zip(NODES, files, strict=True)})
    exchange = TwiceThroughFlower(GridExchange(grid, poll=0.001))
    adapter = random_adapter(worker_of(files[0]).open(study)[1].spec, scale=0.1)
    members = gather_participants(exchange, unlogged(study), adapter, 0.0, {})
    opened = in_log(workers(files), opened_for(study, adapter))
    total = collect_masked(exchange, study, adapter.spec, members, opened, Waits(60, 60))
    assert total.survivors == SITES


def test_a_real_site_masks_a_round_once_whatever_it_is_told_and_also_after_a_restart(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, trained = masked_study(bert), counted(monkeypatch)
    files = real(tmp_path, study)
    sites = workers(files)
    first, _, _ = one_round(study, sites)
    for again in (sites, workers(files)):
        exchange = Workers(again)
        with pytest.raises(PrivetError, match="mask step of this round already"):
            one_round(study, again, nonce="2" * 32, exchange=exchange)
        kinds = [[type(answer) for answer in answers] for answers in exchange.answers.values()]
        assert kinds == [[Secured, Secured, Failure]] * 3
    assert len(trained) == len(SITES)
    later, _, _ = one_round(study, workers(files), number=2)
    assert later.survivors == SITES
    assert not np.array_equal(later.update, first.update)


def test_simulated_sites_repeat_a_round_as_often_as_it_is_run(bert: Path, tmp_path: Path) -> None:
    study, sites = masked_study(bert), workers(simulated(tmp_path))
    totals = [one_round(study, sites, nonce=nonce)[0] for nonce in ("1" * 32, "2" * 32)]
    assert np.array_equal(totals[0].update, totals[1].update)


class Spoilt(Workers):
    """Delivers shares that cannot be decrypted."""

    def answer(self, node: int, asked: Message) -> Message:
        if stage_of(asked) == "mask" and isinstance(asked, Secured):
            asked = replace(asked, body=asked.body[:-1] + bytes([asked.body[-1] ^ 1]))
        return super().answer(node, asked)


def test_a_delivery_that_does_not_verify_costs_no_training_and_the_round_can_be_opened_again(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, trained = masked_study(bert), counted(monkeypatch)
    sites = workers(real(tmp_path, study))
    with pytest.raises(PrivetError, match="cannot be decrypted"):
        one_round(study, sites, nonce="1" * 32, exchange=Spoilt(sites))
    assert trained == []
    assert one_round(study, sites, nonce="2" * 32)[0].survivors == SITES


def test_a_round_that_was_trained_and_not_masked_is_taken_up_with_the_same_bytes(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, trained = masked_study(bert), counted(monkeypatch)
    files = real(tmp_path, study)

    def full(releases: Releases, entry: RecordedStep) -> None:
        raise StateError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(Releases, "take", full)
        with pytest.raises(PrivetError, match="the disk is full"):
            one_round(study, workers(files), nonce="1" * 32)
    sites = workers(files)
    total, _, adapter = one_round(study, sites, nonce="2" * 32)
    assert len(trained) == len(SITES)
    released = [site.site.releases.reserve(study, opened_for(study, adapter)) for site in sites.values()]
    expected = np.sum([sent.update.astype(np.float64) for sent in released if sent is not None], axis=0)
    level = 30 * 4 * 0.02 * 3 / 2 ** (total.groups[0]["bits"] - 1)
    assert np.abs(total.update - expected).max() < 3.1 * level
