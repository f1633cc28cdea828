"""What a trainer computes: sums over drawn units, as functions of a request and of the files that it was given.

It draws nothing, and knows neither noise nor keys. It has one study open for its whole life.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from privet.client.budget.withdrawals import Withdrawn
from privet.client.site import SiteConfig
from privet.client.trainer.wire import Packet, lists, pack, ragged
from privet.client.training.canaries import Planting
from privet.client.training.counts import count_rows, score_sum
from privet.client.training.dp import Clipping
from privet.client.training.headstart import class_sums
from privet.client.training.host import ModelHost
from privet.client.training.loading import SiteData, load_data
from privet.client.training.meter import Meter
from privet.client.training.model import initial_adapter, open_host
from privet.client.training.train import Drawn, Stepping, stepping
from privet.client.training.validation import validation_points
from privet.common.errors import PrivetError, StateError
from privet.common.study.adapter import Adapter
from privet.common.study.study import Study


def clipping_head(clipping: Clipping) -> dict[str, Any]:
    """Return how units are clipped, as JSON values. Floats keep all their bits."""
    return asdict(clipping)


def read_clipping(head: Mapping[str, Any]) -> Clipping:
    """Read what `clipping_head` wrote."""
    return Clipping(**{**head, "head": tuple((int(first), int(last)) for first, last in head["head"])})


def rows_of(drawn: Drawn) -> dict[str, NDArray[Any]]:
    """Return drawn rows as arrays, by unit."""
    return {"units": np.array(list(drawn), np.int64), **ragged("rows", list(drawn.values()))}


@dataclass
class _Opened:
    study: Study
    host: ModelHost
    data: SiteData
    physical_batch: int
    round: ExitStack = field(default_factory=ExitStack)
    stepping: Stepping | None = None


class Work:
    """Answers requests, one at a time."""

    def __init__(self) -> None:
        self._opened: _Opened | None = None
        self._asked: tuple[Mapping[str, Any], Packet] | None = None

    def answer(self, packet: Packet) -> bytes:
        """Return the answer to a request. Never raises: an error is an answer."""
        try:
            found = self._answer(packet)
        except PrivetError as error:
            head = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
            return pack(Packet("error", head))
        except Exception as error:  # its text may hold a record
            return pack(Packet("error", {"type": "InternalError", "message": type(error).__name__, "hint": ""}))
        opened = self._opened
        meter = Meter() if opened is None else opened.host.meter
        return pack(Packet("done", {**found.head, "meter": asdict(meter)}, found.arrays))

    def _answer(self, packet: Packet) -> Packet:
        if packet.kind == "open":
            return self._open(packet.head)
        opened = self._opened
        if opened is None:
            raise StateError(
                f"the trainer was asked for {packet.kind} before a study was opened", "report this as a bug"
            )
        with opened.host.lock:
            match packet.kind:
                case "start":
                    adapter = initial_adapter(opened.study, opened.host)
                    return Packet("", {}, {"adapter": np.frombuffer(adapter.data, np.uint8)})
                case "begin":
                    return _begin(opened, packet)
                case "terms" | "plain":
                    return _step(opened, packet)
                case "sum":
                    return Packet("", {}, {"points": _sum(opened, packet)})
                case "validate":
                    adapter, lattice = _adapter(opened, packet), float(packet.head["lattice"])
                    return Packet("", {}, {"points": validation_points(opened.host, adapter, opened.data, lattice)})
        raise StateError(f"the trainer was asked for {packet.kind}, which it does not know", "update privet there")

    def _open(self, head: Mapping[str, Any]) -> Packet:
        """Load model and records; at once where the very same was asked before."""
        if self._asked is not None and self._opened is not None and self._asked[0] == head:
            self._opened.round.close()
            return self._asked[1]
        study, site = Study.parse(dict(head["study"])), SiteConfig.model_validate(head["site"])
        host = open_host(study, site.resources, begun=bool(head["begun"]))
        planted, gone = head["planting"], head["withdrawn"]
        data = load_data(
            site,
            study,
            host,
            bytes.fromhex(head["split"]),
            distinct=bool(head["distinct"]),
            planting=None if planted is None else Planting(int(planted["count"]), bytes.fromhex(planted["key"])),
            withdrawn=lambda _: None if gone is None else Withdrawn.read(gone),
        )
        self._opened = _Opened(study, host, data, site.resources.physical_batch)
        facts = {
            "spec": host.spec.document(),
            "declared": data.training.declared,
            "held-out": len(data.validation_units),
            "names": data.names,
            "device": host.device.type,
            "verdict": host.verdict,
        }
        arrays = ragged("units", data.training.units)
        arrays["classes"] = np.array(data.training.classes, np.int64)
        self._asked = head, Packet("", facts, arrays)
        return self._asked[1]


def _adapter(opened: _Opened, packet: Packet) -> Adapter:
    return Adapter.read(opened.host.spec, packet.arrays["adapter"].tobytes())


def _begin(opened: _Opened, packet: Packet) -> Packet:
    """Begin a round: mount its adapter, and prepare what its steps share."""
    opened.round.close()
    opened.round, own = ExitStack(), packet.arrays.get("own")
    opened.stepping = opened.round.enter_context(
        stepping(
            opened.host,
            opened.study,
            _adapter(opened, packet),
            opened.data.training,
            opened.physical_batch,
            own,
            private=bool(packet.head["private"]),
        )
    )
    return Packet("")


def _step(opened: _Opened, packet: Packet) -> Packet:
    """Compute a step's sum, at the values that the request holds."""
    at = opened.stepping
    if at is None:
        raise StateError("the trainer was asked for a step before a round was begun", "report this as a bug")
    _lay_out(at, packet.arrays["values"])
    drawn = dict(zip(packet.arrays["units"].tolist(), lists(packet, "rows"), strict=True))
    if packet.kind == "plain":
        return Packet("", {}, {"total": at.plain(drawn).cpu().numpy()})
    terms = at.terms(drawn, read_clipping(packet.head["clipping"]))
    return Packet("", {"balance": terms.balance}, {"total": terms.total.cpu().numpy()})


def _lay_out(at: Stepping, values: NDArray[np.float32]) -> None:
    parameters = [parameter for _, parameter in at.trained]
    parts = torch.split(torch.from_numpy(values.copy()), [parameter.numel() for parameter in parameters])
    with torch.no_grad():
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.copy_(part.view(parameter.shape))


def _sum(opened: _Opened, packet: Packet) -> NDArray[np.int64]:
    """Return the sum over all units, of a round that is one sum."""
    study, host, data = opened.study, opened.host, opened.data
    clipping = read_clipping(packet.head["clipping"])
    if data.counts is not None:
        return count_rows(study, data.counts, lists(packet, "rows"), clipping)
    adapter = _adapter(opened, packet)
    if study.kind == "evaluate":
        return score_sum(host, study, adapter, data.training.features, data.training.units, clipping)
    return class_sums(host, study, adapter, data.training, opened.physical_batch, clipping)
