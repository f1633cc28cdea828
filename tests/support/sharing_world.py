"""Real workers that share noise, in one process, with keys, ledgers and secret noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privet.client.rounds.worker import Worker
from privet.client.training.model import initial_adapter
from privet.common.errors import PrivetError
from privet.common.pki.keyfile import make_key, public_key
from privet.common.study.adapter import Adapter
from privet.common.study.messages import Failure, Message, RoundOpen, Secured
from privet.common.study.study import Study
from privet.server.rounds.masked import Waits, collect_masked
from privet.server.rounds.participants import Participant, RoundSum
from tests.support.masked_world import STEP
from tests.support.site_log import log_table, logged
from tests.support.tiny import class_rows, make_ledger, private, site_toml, tiny_study

SITES = ("ash", "elm", "oak", "yew")


def real_sites(folder: Path, study: Study) -> list[Path]:
    """Write the files of sites with keys, ledgers and secret noise."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = {name: public_key(make_key(folder / f"{name}.pem")) for name in SITES}
    files = []
    log_table(folder, SITES[0], SITES)
    for number, name in enumerate(SITES):
        more: dict[str, Any] = {
            "declared_count": 30,
            "identity": f"{name}.pem",
            "dataset": name,
            **make_ledger(folder, name),
        }
        limit = {"unit": "record", "epsilon": 5.0, "delta": 1e-3}
        peers = "".join(f'{n} = "{key}"\n' for n, key in keys.items())
        rows = class_rows(30, seed=number)
        file = site_toml(folder, name, rows, seed=None, studies=[study.digest], limit=limit, **more)
        file.write_text(file.read_text() + "[peers]\n" + peers)
        files.append(file)
    return files


@dataclass
class Workers:
    """An exchange with workers in this process."""

    workers: dict[str, Worker]

    def nodes(self) -> list[int]:
        return list(range(len(SITES)))

    def ask(self, requests: Mapping[int, Message], *, timeout: float) -> list[tuple[int, Message]]:
        return [(node, self.answer(self.workers[SITES[node]], asked)) for node, asked in requests.items()]

    def answer(self, worker: Worker, asked: Message) -> Message:
        try:
            if isinstance(asked, RoundOpen):
                return worker.advertise(asked)
            assert isinstance(asked, Secured)
            return worker.answer(asked)
        except PrivetError as error:
            return Failure(type(error).__name__, error.message, error.hint)

    def play(self, study: Study, start: Adapter, number: int, cohort: Sequence[str]) -> RoundSum:
        """Play one round that stands in the sites' log."""
        nonce = f"{number:032x}"
        opened = RoundOpen(study.document(), number, nonce, start.digest, tuple(cohort), start.data)
        members = {name: Participant(SITES.index(name), self.workers[name].offer(study)) for name in cohort}
        return collect_masked(self, study, start.spec, members, logged(self.workers, opened), Waits(60, 60))


def worker_study(bert: Path, **more: Any) -> Study:
    return tiny_study(
        bert,
        **{
            "privacy": private(epsilon=4.0, delta=1e-3, mode="distributed"),
            "training": {**STEP, "rounds": 6},
            "secure_aggregation.mode": "masked",
            "cohort.min_sites": 3,
            "aggregation": {"method": "ffa", "learning_rate": 0.01, "largest_count": 60},
            **more,
        },
    )


def initial(worker: Worker, study: Study) -> Adapter:
    return initial_adapter(study, worker.open(study)[1])
