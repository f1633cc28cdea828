"""Flower's apps in one process, without its transport.

Flower 1.41 gives a message its id and its sender in the transport, and reads the running task's identity
from a process global. A grid of our own has to do both; `tests/system/test_flower.py` fails when they move.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

from privet.simulations.engines.ray_client import SIMULATED

_RAISED = 2  # Flower's error code for a ClientApp that raised
_RUN = 1
_SERVER_NODE = 1


class MemoryGrid(Grid):
    """Flower's Grid in one process: each message is answered at once by the very ClientApp, one at a time."""

    def __init__(self, app: ClientApp, node_configs: Mapping[int, Mapping[str, Any]]) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = _RUN, _RUN, _SERVER_NODE
        self._app = app
        self._contexts = {
            node: Context(_RUN, node, node_config={**config, SIMULATED: True}, state=RecordDict(), run_config={})
            for node, config in node_configs.items()
        }
        self._replies: dict[str, Message] = {}
        self._sent = 0

    def set_run(self, run: Any) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Any:
        """There is no run record."""
        raise NotImplementedError("an in-memory grid has no run record")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message, as Flower's own constructor makes it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver messages, and keep the answers until they are pulled."""
        ids = []
        for message in messages:
            self._sent += 1
            identity = f"message-{self._sent}"
            message.metadata.__dict__["_message_id"] = identity
            message.metadata.__dict__["_run_id"] = _RUN
            try:
                reply = self._app(message, self._contexts[message.metadata.dst_node_id])
            except Exception as error:  # Flower's own contract: an app's exception becomes an error reply
                reply = Message(Error(code=_RAISED, reason=type(error).__name__), reply_to=message)
            self._replies[identity] = reply
            ids.append(identity)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers to these messages."""
        return [self._replies.pop(identity) for identity in list(message_ids) if identity in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Deliver messages and return their answers."""
        return self.pull_messages(self.push_messages(messages))


def run_in_memory(
    server: ServerApp,
    client: ClientApp,
    node_configs: Mapping[int, Mapping[str, Any]],
    run_config: Mapping[str, Any],
) -> None:
    """Run a ServerApp against a ClientApp in this process, over a `MemoryGrid`."""
    grid = MemoryGrid(client, node_configs)
    context = Context(
        run_id=_RUN, node_id=_SERVER_NODE, node_config={}, state=RecordDict(), run_config=dict(run_config)
    )
    server(grid, context)
