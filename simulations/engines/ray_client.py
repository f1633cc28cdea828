"""The ClientApp of simulated sites under Flower's simulation engine.

The engine answers each message in any free process, and passes Flower's context along. So a site stores the messages of
the round in the context, and another process repeats the steps of the round from them. That works because a simulated
site's secrets follow from its seed.
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
"""Variable in the environment of the processes that a simulation starts, and of no others."""

SIMULATED = "simulated"
"""Key in a node's configuration, which only the node's operator writes: the site that it names is simulated."""


class RecallingWorker(Worker):
    """A worker that repeats the steps of a round that its site took in other processes.

    Attributes:
        heard: The messages of the round that the site received so far.
    """

    heard: Sequence[RoundOpen | Secured] = ()

    def answer(self, asked: Secured) -> Secured:
        """Repeat the earlier steps, then answer. Raises as `Worker.answer`."""
        taken = 0 if self._masked is None else self._masked.steps(asked)
        for message in self.heard[taken:]:
            if isinstance(message, RoundOpen):
                self.advertise(message)
            elif self._masked is not None:
                _replay(self._masked, message)
        return super().answer(asked)


def _replay(rounds: MaskedRounds, asked: Secured) -> None:
    """Repeat a step, as far as later steps need it. Raises as `MaskedRounds.answer`."""
    live = rounds._live[asked.study]
    if isinstance(live.state, protocol.Shared):
        # The vector was sent by the other process and is not needed here, so zeros replace it.
        zeros = np.zeros(live.parameters.layout.words, WORD)
        live.state, _ = protocol.mask(live.state, decode(Delivery, asked.body), zeros, lambda entry: None)
        live.steps += 1
    else:
        rounds.answer(asked, _no_training)


def _no_training(opened: RoundOpen) -> Contribution:
    raise ProtocolError(
        f"round {opened.round}: a process that only repeats earlier steps of this round was asked to train",
        "report this as a bug",
    )


@lru_cache(maxsize=2048)
def open_recalling(file: Path) -> RecallingWorker:
    """Return the process's worker for a simulated site's file, built once. Raises as `load_simulated`."""
    return RecallingWorker(SimulatedSite(load_simulated(file)))


def find_simulated_worker(context: Context) -> RecallingWorker:
    """Return the worker of a node: of the site file that it names, or of its partition of a simulation's directory.

    A bundle can name this app to a real site's SuperNode. It finds no worker there: only the operator's configuration,
    or the environment of a process that a simulation started, makes a node a simulated one.

    Raises:
        StudyError: The node is not part of a simulation.
    """
    if "site" in context.node_config and context.node_config.get(SIMULATED):
        return open_recalling(Path(str(context.node_config["site"])))
    # The coordinator names this directory. A node outside a simulation must not open files that a coordinator names.
    if SIMULATION in os.environ and "partition-id" in context.node_config and context.run_config.get("sites"):
        files = sorted(Path(str(context.run_config["sites"])).glob("*.toml"))
        return open_recalling(files[int(context.node_config["partition-id"])])
    raise StudyError(
        "this process was started as a simulated site, but its configuration is not part of a simulation",
        "start a real site with `privet site serve SITE`, or a simulation with `privet simulate STUDY`",
    )


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
        return  # the message came twice
    if isinstance(asked, RoundOpen):
        context.state.clear()
    context.state[f"asked-{len(context.state):02d}"] = record


def _recalled(context: Context) -> list[RoundOpen | Secured]:
    records = (record for _, record in sorted(context.state.items()))
    messages = (unpack(RecordDict({RECORD: record})) for record in records)
    return [message for message in messages if isinstance(message, RoundOpen | Secured)]


app = client_app(_respond)
