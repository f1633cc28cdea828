"""A curious coordinator: it follows the protocol, and keeps all that it sees of single sites.

Its files lie under `view/` in the run directory.

::

    view/0001.safetensors     `SITE/update` (plain) or `SITE/masked` (under secure aggregation), as it arrived
    view/index.json           number of messages and bytes, by round and kind of message

The masked vectors alone reveal nothing about the update of one site: see docs/secure-aggregation.md. The coordinator
also learns the sum of a round; the state of the run holds it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from privet.common.secagg.encoding import decode, kind_of
from privet.common.secagg.messages import Masked
from privet.common.study.messages import Contribution, Message, Secured
from privet.server.exchange import Exchange
from privet.simulations.scenarios.network import size_of


@dataclass(frozen=True)
class CuriousExchange:
    """An exchange that keeps the replies of the sites as the coordinator sees them."""

    inner: Exchange
    names: Mapping[int, str]
    directory: Path

    def nodes(self) -> Sequence[int]:
        """Return the addresses that the inner exchange reaches."""
        return self.inner.nodes()

    def ask(self, requests: Mapping[int, Message], *, timeout: float) -> Iterator[tuple[int, Message]]:
        """Pass requests and replies on, and keep the replies on disk."""
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        seen: dict[tuple[int, str], list[int]] = {}
        for node, reply in self.inner.ask(requests, timeout=timeout):
            if isinstance(reply, Contribution | Secured):
                kind = kind_of(reply.body) if isinstance(reply, Secured) else None
                name = reply.kind if kind is None else kind.__name__.lower()
                seen.setdefault((reply.round, name), []).append(size_of(reply))
                if isinstance(reply, Contribution):
                    arrays[f"{self.names[node]}/update"] = reply.update / np.float32(reply.weight)
                elif kind is Masked:
                    arrays[f"{self.names[node]}/masked"] = np.asarray(decode(Masked, reply.body).words)
            yield node, reply
        for (number, name), sizes in seen.items():
            self._keep(number, name, sizes, arrays)

    def _keep(self, number: int, name: str, sizes: Sequence[int], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        self.directory.mkdir(exist_ok=True)
        if arrays:
            save_file(dict(arrays), self.directory / f"{number:04d}.safetensors")
        index = read_index(self.directory)
        index.setdefault(f"{number:04d}", {})[name] = {"messages": len(sizes), "bytes": sum(sizes)}
        (self.directory / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def read_index(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the number and bytes of the messages that the coordinator saw, by round and kind of message."""
    file = directory / "index.json"
    found: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found
