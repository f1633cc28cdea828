"""What a site knows of an adapter that it received: where it came from, and whether it may still be used.

The file lies beside the adapter. It is written when the adapter was verified, and again when the round log says that it
was superseded, retired or revoked. Who opens an adapter looks into it first: a revoked one is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from privet.common.canonical import canonical_json
from privet.common.errors import RefusedError, StateError, VerificationError
from privet.common.files import write_durably
from privet.common.log.statements import Digest, Natural, PrintableLine, StatementPart, Time
from privet.common.study.sections import Name

RECEIVED = "received.json"
State = Literal["released", "superseded", "retired", "revoked"]


class Received(StatementPart):
    """An adapter that a site received from its coordinator, and verified."""

    format: Literal[1] = 1
    consortium: Name
    run: Name
    round: Annotated[int, Field(ge=1, lt=2**53)]
    adapter: Digest
    leaf: Natural
    """Number of the leaf that exports it."""
    time: Time
    """When it was received."""
    state: State = "released"
    """As the round log said when this site last asked."""
    by: Name | None = None
    """The run whose release supersedes it."""
    reason: PrintableLine = ""

    @property
    def note(self) -> str:
        """A note for whoever uses it all the same; empty while it is in use."""
        if self.state == "superseded":
            return f"note: this adapter is superseded by that of run {self.by}: {self.reason}"
        return f"note: the coordinator retired this adapter: {self.reason}" if self.state == "retired" else ""


def keep_received(directory: Path, received: Received) -> None:
    """Write what is known of the adapter in a directory."""
    write_durably(directory / RECEIVED, canonical_json(received.model_dump(mode="json")) + b"\n")


def read_received(directory: Path) -> Received | None:
    """Return what is known of the adapter in a directory; None if it was not received by `privet site get`.

    Raises:
        StateError: The file cannot be read.
    """
    try:
        return Received.model_validate_json((directory / RECEIVED).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise StateError(
            f"{directory / RECEIVED} cannot be read ({type(error).__name__})",
            "move the directory away, and receive the adapter again: `privet site get SITE RUN`",
        ) from None


def check_received(directory: Path, adapter: str) -> Received | None:
    """Check that an adapter is the one that was received, and that it was not revoked.

    Args:
        directory: Where it lies.
        adapter: Digest of its file.

    Returns:
        What is known of it; None if it was not received by `privet site get`.

    Raises:
        RefusedError: It was revoked.
        VerificationError: The file was changed since.
        StateError: As `read_received`.
    """
    received = read_received(directory)
    if received is None:
        return None
    if received.state == "revoked":
        raise RefusedError(
            f"{directory}: the coordinator revoked this adapter: {received.reason}",
            "do not use it; `privet site adapters SITE` lists the adapters that are in use",
        )
    if received.adapter != adapter:
        raise VerificationError(
            f"{directory}: the adapter is not the one that was received: expected digest {received.adapter}, found "
            f"{adapter}",
            "move the directory away, and receive the adapter again: `privet site get SITE RUN`",
        )
    return received
