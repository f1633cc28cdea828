"""The adapter that a round starts from: as it was sent, or completed with the tensors that no round changes.

These tensors are those of the study's last whole adapter. A process that has received none makes them from base and
seed, as the coordinator's operator did. On another machine the values may differ in the last bits. The digest shows it,
and the coordinator then sends the whole adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from privet.common.errors import VerificationError
from privet.common.study.adapter import Adapter, AdapterSpec
from privet.common.study.messages import RoundOpen
from privet.common.study.study import Study

# Studies of which a process keeps an adapter.
_MOST = 4


class Keeper(Protocol):
    """What keeps the last whole adapter of each study, by the study's digest: a `ModelHost`, or a trainer apart."""

    kept: dict[str, bytes]

    @property
    def spec(self) -> AdapterSpec:
        """The layout of adapters."""


def read_adapter(host: Keeper, opened: RoundOpen) -> Adapter:
    """Return the whole adapter that a round starts from, after checking it.

    Raises:
        ProtocolError: The bytes are not the layout's adapter.
        VerificationError: It is not the announced one.
        DivergedError: A value is not finite.
    """
    return _checked(Adapter.read(host.spec, opened.adapter), opened)


def completed(host: Keeper, study: Study, opened: RoundOpen, first: Callable[[], Adapter]) -> RoundOpen:
    """Return a round's message with the whole adapter, after checking that.

    Only the digest of the whole adapter decides: a wrong copy never passes for the right one.

    Args:
        host: Holds the layout and the study's last whole adapter, and keeps this one.
        study: The round's study.
        opened: The message, with the whole adapter or what sites train alone.
        first: Makes the adapter that the study starts from.

    Raises:
        ProtocolError, VerificationError, DivergedError: As `read_adapter`.
    """
    method = study.aggregation.method
    if not host.spec.frozen(method):
        read_adapter(host, opened)
        return opened
    part, digest = host.spec.part(method), study.digest
    kept = host.kept.get(digest, b"")
    if opened.adapter[: len(part.header)] != part.header:
        adapter = read_adapter(host, opened)
    else:
        known = Adapter.read(host.spec, kept) if kept else first()
        adapter = _checked(known.replace(Adapter.read(part, opened.adapter).values), opened)
    # One object for all sites of a process: a site keeps the message of a masked round.
    whole = kept if kept == adapter.data else adapter.data
    host.kept.pop(digest, None)
    host.kept[digest] = whole
    for old in list(host.kept)[:-_MOST]:
        host.kept.pop(old, None)
    return replace(opened, adapter=whole)


def _checked(adapter: Adapter, opened: RoundOpen) -> Adapter:
    if adapter.digest != opened.adapter_digest:
        raise VerificationError(
            f"round {opened.round}: expected adapter {opened.adapter_digest}, as the coordinator's message states, "
            f"found {adapter.digest}",
            "the message was changed on the way; the coordinator must send the round again",
        )
    adapter.check_finite(f"round {opened.round}: the received adapter")
    return adapter
