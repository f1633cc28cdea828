"""The ClientApp of simulated sites under Flower's simulation engine.

The engine answers each message in whichever process is free. Flower's context travels along, so a site keeps there what
it was asked in the round, and another process takes the round up from it: a simulated site's secrets follow from its
seed, so that its steps can be taken again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from flwr.app import Context, Message, RecordDict

from privet.client.app import client_app
from privet.client.rounds.answers import answer
from privet.client.rounds.masked import MaskedRounds
from privet.client.rounds.worker import Worker
from privet.common.errors import ProtocolError, StudyError
from privet.common.flower.records import RECORD, pack, unpack
from privet.common.secagg import site as protocol
from privet.common.secagg.encoding import decode
from privet.common.secagg.messages import Delivery
from privet.common.secagg.quantize import WORD
from privet.common.study.messages import Contribution, Failure, RoundOpen, Secured
from privet.common.study.messages import Message as Spoken
from privet.simulations.sites import SimulatedSite, load_simulated

SIMULATION = "PRIVET_RAY_RUN"
"""In the environment of the processes that a simulation starts, and of no others."""

SIMULATED = "simulated"
"""In a node's configuration, which its operator writes and no coordinator: the site that it names is simulated."""


class RecallingWorker(Worker):
    """A worker that takes the steps of a round again which its site took in other processes.

    Attributes:
        heard: What the site was asked in the round so far.
    """

    heard: Sequence[RoundOpen | Secured] = ()

    def answer(self, asked: Secured) -> Secured:
        """Catch up, then answer. Raises as `Worker.answer`."""
        taken = 0 if self._masked is None else self._masked.steps(asked)
        for message in self.heard[taken:]:
            if isinstance(message, RoundOpen):
                self.advertise(message)
            elif self._masked is not None:
                _replay(self._masked, message)
        return super().answer(asked)


def _replay(rounds: MaskedRounds, asked: Secured) -> None:
    """Take a step again as far as the steps after it need it. Raises as `MaskedRounds.answer`."""
    live = rounds._live[asked.study]
    if isinstance(live.state, protocol.Shared):
        # The vector went out then and is not needed, so zeros stand for it.
        zeros = np.zeros(live.parameters.layout.words, WORD)
        live.state, _ = protocol.mask(live.state, decode(Delivery, asked.body), zeros, lambda entry: None)
        live.steps += 1
    else:
        rounds.answer(asked, _no_training)


def _no_training(opened: RoundOpen) -> Contribution:
    raise ProtocolError(f"round {opened.round}: a replay does not train")


@lru_cache(maxsize=2048)
def open_recalling(file: Path) -> RecallingWorker:
    """Return the process's worker for a simulated site's file, built once. Raises as `load_simulated`."""
    return RecallingWorker(SimulatedSite(load_simulated(file)))


def find_simulated_worker(context: Context) -> RecallingWorker:
    """Return the worker of a node: of the site file that it names, or by its partition of a simulation's directory.

    A bundle can name this app to a real site's SuperNode. There it finds no worker: what makes a node a simulated one
    is its operator's configuration, or the environment of a process that a simulation started.

    Raises:
        StudyError: This is no simulation.
    """
    if "site" in context.node_config and context.node_config.get(SIMULATED):
        return open_recalling(Path(str(context.node_config["site"])))
    # The coordinator names this directory, so a node outside a simulation does not look there.
    if SIMULATION in os.environ and "partition-id" in context.node_config and context.run_config.get("sites"):
        files = sorted(Path(str(context.run_config["sites"])).glob("*.toml"))
        return open_recalling(files[int(context.node_config["partition-id"])])
    raise StudyError("this node is not part of a simulation", "start a real site with `privet site serve SITE`")


def _respond(message: Message, context: Context) -> Message:
    heard: list[Spoken] = []

    def read() -> Spoken:
        heard.append(unpack(message.content))
        return heard[0]

    def recalling() -> Worker:
        worker = find_simulated_worker(context)
        worker.heard = _recalled(context)
        return worker

    reply = answer(read, recalling)
    if heard and not isinstance(reply, Failure):
        _remember(context, heard[0])
    return Message(pack(reply), reply_to=message)


def _remember(context: Context, asked: Spoken) -> None:
    if not isinstance(asked, Secured) and not (isinstance(asked, RoundOpen) and asked.masking):
        return
    record = pack(asked)[RECORD]
    if record in context.state.values():
        return  # it came twice
    if isinstance(asked, RoundOpen):
        context.state.clear()
    context.state[f"asked-{len(context.state):02d}"] = record


def _recalled(context: Context) -> list[RoundOpen | Secured]:
    records = (record for _, record in sorted(context.state.items()))
    messages = (unpack(RecordDict({RECORD: record})) for record in records)
    return [message for message in messages if isinstance(message, RoundOpen | Secured)]


app = client_app(_respond)
