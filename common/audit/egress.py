"""May this adapter leave? The one place that answers, for coordinator, site and auditor (docs/decisions/0023).

Where there is a round log, the log decides: `check_logged`. Where there are only files, such as a run directory or a
release that was copied, the egress decision among them decides: `check_carried`. It is the leaf of the log, signed by
the coordinator. Nothing is believed of it that its holder could not change, so it stops mistakes and no thieves.
"""

from __future__ import annotations

from pathlib import Path

from privet.common.audit.release import EGRESS
from privet.common.errors import PrivetError, RefusedError
from privet.common.log.encoding import parse_statement
from privet.common.log.envelope import Envelope
from privet.common.log.replay import LoggedRun, Replay
from privet.common.log.statements import EgressDecision
from privet.common.study.study import Study

_WAY = (
    "sites that took part test and sign the candidate: `privet gate test SITE RUN`, `privet gate sign SITE RUN`; "
    "`privet gate status RUN` at the coordinator shows what is missing"
)
_ANEW = "it stays in this run; begin a new study, which the sites approve anew: `privet coordinator run STUDY`"


def check_logged(run: LoggedRun, time: int) -> None:
    """Check that the log lets the adapter of a run leave: its study has no gate, or the gate let it out.

    Args:
        run: The run, as the log has it.
        time: Unix seconds.

    Raises:
        RefusedError: It does not. The hint names the commands that help.
    """
    gate = run.gate
    if gate is None or gate.exported:
        return
    if why := gate.withheld(time):
        raise RefusedError(why, _ANEW if gate.state(time) == "refused" else _WAY)


def check_origin(history: Replay, adapter: str) -> None:
    """Check that no gate withholds an adapter that a study is to begin from, or that another run released.

    Raises:
        RefusedError: One does.
    """
    run = history.withholding(adapter)
    if run is not None:
        name = run.statement.run
        raise RefusedError(f"the gate of run {name} withholds this adapter: it was not released", _WAY)


def check_kept(study: Study, adapter: str, path: Path) -> None:
    """Check that a run directory, or a directory of released files, holds the decision that lets its adapter leave.

    Raises:
        RefusedError: As `check_carried`.
    """
    for folder in (path, path / "release"):
        try:
            evidence = (folder / EGRESS).read_bytes()
        except OSError:
            continue
        check_carried(study, adapter, evidence, str(path))
        return
    check_carried(study, adapter, None, str(path))


def check_carried(study: Study, adapter: str, evidence: bytes | None, where: str) -> None:
    """Check that the decision among an adapter's files lets it leave.

    Args:
        study: Its study.
        adapter: Digest of the adapter's file.
        evidence: The file `EGRESS`; None if there is none.
        where: What the files are, for the error.

    Raises:
        RefusedError: The study has a gate, and they do not.
    """
    if study.gate is None:
        return
    if evidence is None:
        raise RefusedError(
            f"{where}: the study {study.name} has a gate, and this adapter has no egress decision ({EGRESS}): it is a "
            "candidate, for tests alone",
            _WAY,
        )
    try:
        envelope = Envelope.decode(evidence)
        envelope.check_first()
        decision = parse_statement(envelope.payload)
    except PrivetError as error:
        raise RefusedError(f"{where}: {EGRESS} is not a signed egress decision: {error.message}", _WAY) from None
    if not isinstance(decision, EgressDecision) or decision.verdict != "accepted":
        raise RefusedError(f"{where}: {EGRESS} accepts no adapter", _WAY)
    if (decision.study, decision.adapter) != (study.digest, adapter):
        raise RefusedError(f"{where}: {EGRESS} accepts another adapter, or one of another study", _WAY)
