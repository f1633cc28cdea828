"""The statements of the round log that follow from a study and its rounds. Everyone who has these derives the same.

All functions are pure, except `software`, which reads the installed files.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from privet.common.canonical import canonical_json, digest, file_sha256
from privet.common.errors import StudyError
from privet.common.log.encoding import one_line
from privet.common.log.statements import Mechanism, Privacy, RoundAbort, RoundClose, RunOpen, StatedGate
from privet.common.log.statements import RoundOpened as OpenedStatement
from privet.common.log.tiles import MAX_LEAF_BYTES
from privet.common.privacy.accounting import PrivacyEvent, plan
from privet.common.study.messages import RoundOpen
from privet.common.study.study import Study

RoundStatement = Mapping[str, Any]
"""The coordinator's statement of a round that ended: a JSON file of the run directory."""

# Largest number of characters of all failure reasons of a round together. Sites write them, and a leaf must hold them.
_FAILURES = 10_000
SPOILED_NAMES = 4_000
"""Largest number of characters of the names in `spoiled`. They take the room of failure reasons."""
# Replacements for the characters that take two characters in JSON, so that the length of a reason is known.
_UNESCAPED = str.maketrans('"\\', "'/")
# Bytes of everything else in a leaf, besides names, costs and reasons.
_REST = 2_000
# Characters of a second signature in an envelope, with its key id.
_SECOND = 4_600
# Characters of one count in JSON, besides its name: a number has 24 at most.
_COUNT = 30
_PARTS = ("common", "server", "client")
_USED = (
    "cryptography",
    "flwr",
    "numpy",
    "opacus",
    "peft",
    "pydantic",
    "rfc8785",
    "safetensors",
    "torch",
    "transformers",
)


# Versions do not change while the process runs, and reading the metadata takes milliseconds.
_installed = lru_cache(maxsize=64)(version)


def mechanism_of(event: PrivacyEvent) -> Mechanism:
    """Return the releases of a round of one kind in the form of statements."""
    return Mechanism.model_validate(event.document())


def promise_of(study: Study) -> Privacy | None:
    """Return the promise of a run of the study and its mechanisms; None if the study is not private."""
    mechanism = plan(study)
    if mechanism is None:
        return None
    return Privacy(
        epsilon=mechanism.target,
        delta=mechanism.delta,
        clip_norm=study.privacy.promise.clip_norm,
        accountant=f"prv, opacus {_installed('opacus')}",
        training=mechanism_of(mechanism.training),
        validation=None if mechanism.validation is None else mechanism_of(mechanism.validation),
        head=None if mechanism.head is None else mechanism_of(mechanism.head),
    )


def gate_of(study: Study) -> StatedGate | None:
    """Return the conditions of a run of the study under which its adapter may leave; None if the study has no gate."""
    gate = study.gate
    if gate is None:
        return None
    claim = gate.epsilon or (study.privacy.epsilon if gate.canaries is not None else None)
    return StatedGate(**{**gate.model_dump(), "epsilon": claim})


def base_digests(study: Study) -> tuple[str, str | None]:
    """Return the digest of the base's weights, and that of all other pinned files; None if there are no others."""
    pins = study.model.sha256
    weights = {name: value for name, value in pins.items() if name.endswith(".safetensors")}
    rest = {name: value for name, value in pins.items() if name not in weights}
    return digest(canonical_json(weights)), digest(canonical_json(rest)) if rest else None


def keys_digest(identities: Mapping[str, str]) -> str:
    """Return the digest of the cohort's identity keys, hexadecimal by site: they authenticate a round's masks."""
    return digest(canonical_json(dict(identities)))


@lru_cache(maxsize=1)
def software() -> dict[str, Any]:
    """Return the software of this process: SHA-256 of each module of privet, and the versions of its libraries."""
    sources: dict[str, str] = {}
    for part in _PARTS:
        spec = find_spec(f"privet.{part}")
        for root in (spec.submodule_search_locations or ()) if spec else ():
            files = sorted(Path(root).rglob("*.py"))
            sources |= {f"{part}/{file.relative_to(root).as_posix()}": file_sha256(file) for file in files}
    versions = {name: found for name in ("privet", *_USED) if (found := _version(name)) is not None}
    return {"sources": sources, "versions": versions}


def _version(name: str) -> str | None:
    try:
        return _installed(name)
    except PackageNotFoundError:  # an optional library that is not installed
        return None


def run_opened(name: str, study: Study, adapter: str, now: int) -> RunOpen:
    """Return the statement that a study is started as run `name`, from the adapter of that digest."""
    base, tokenizer = base_digests(study)
    return RunOpen(
        time=now,
        run=name,
        study=study.digest,
        base=base,
        tokenizer=tokenizer,
        software=digest(canonical_json(software())),
        adapter=adapter,
        rounds=study.rounds,
        min_sites=study.cohort.min_sites,
        secure_aggregation=study.secure_aggregation.mode,
        privacy=promise_of(study),
        gate=gate_of(study),
    )


def follows(opened: RunOpen, study: Study) -> bool:
    """Return whether a `run-open` follows from the study. Adapter and software are the coordinator's own claims."""
    base, tokenizer = base_digests(study)
    return opened == opened.model_copy(
        update={
            "study": study.digest,
            "base": base,
            "tokenizer": tokenizer,
            "rounds": study.rounds,
            "min_sites": study.cohort.min_sites,
            "secure_aggregation": study.secure_aggregation.mode,
            "privacy": promise_of(study),
            "gate": gate_of(study),
        }
    )


def round_opened(
    run: str, opened: RoundOpen, keys: Mapping[str, str] | None, now: int, participants: Collection[str] = ()
) -> OpenedStatement:
    """Return the statement that a round is opened. `keys` are the cohort's identity keys; None in plain mode.

    `participants` are the sites from which the cohort was drawn.
    """
    return OpenedStatement(
        time=now,
        run=run,
        round=opened.round,
        nonce=opened.nonce,
        adapter=opened.adapter_digest,
        cohort=opened.cohort,
        parameters=None if keys is None else keys_digest(keys),
        participants=tuple(sorted(participants)) if set(participants) > set(opened.cohort) else None,
    )


def round_ended(run: str, opened: str, statement: RoundStatement, ended: bool, now: int) -> RoundClose | RoundAbort:
    """Return the log's statement of a round that has ended, from the run's own statement of it."""
    spoiled = tuple(map(tuple, statement.get("spoiled", ()))) or None
    named = sum(len(name) + 3 for names in spoiled or () for name in names)
    room = (_FAILURES - named) // max(len(statement["failures"]), 1)
    failures = {site: one_line(reason).translate(_UNESCAPED)[:room] for site, reason in statement["failures"].items()}
    privacy = statement["privacy"]
    epsilon = None if privacy is None else {site: _upwards(spent) for site, spent in privacy["epsilon"].items()}
    left_out = tuple(statement.get("left_out", ())) or None
    if statement["type"] == "round-abort":
        return RoundAbort(
            time=now,
            run=run,
            round=statement["round"],
            opened=opened,
            adapter=statement["adapter_before"],
            failures=failures,
            reason=one_line(statement["reason"]),
            epsilon=epsilon,
            spoiled=spoiled,
            left_out=left_out,
        )
    masked = statement["secure_aggregation"] == "masked"
    return RoundClose(
        time=now,
        run=run,
        round=statement["round"],
        opened=opened,
        survivors=tuple(statement["survivors"]),
        failures=failures,
        adapter_before=statement["adapter_before"],
        adapter_after=statement["adapter_after"],
        adapter_published=statement["adapter_published"],
        aggregation=statement["aggregation"],
        transcript=transcript_of(statement) if masked else None,
        metrics=statement["metrics"],
        epsilon=epsilon,
        ended=ended,
        spoiled=spoiled,
        left_out=left_out,
        average=statement.get("average"),
    )


def _upwards(epsilon: float) -> float:
    """Return an epsilon with four places, rounded up: a rounded bound must stay a bound.

    It takes at most nine characters below a billion, so that the size of a leaf can be bounded.
    """
    places = 10_000 if epsilon < 10_000 else 1
    found = math.ceil(epsilon * places)
    # Floating point may have rounded the product down to a whole number, so that `ceil` did not raise it.
    return (found if found / places >= epsilon else found + 1) / places


def check_leaf_size(
    cohort: Collection[str],
    charged: Collection[str],
    participants: Collection[str] = (),
    *,
    hybrid: bool = False,
    counts: Collection[str] = (),
) -> None:
    """Check, before sites are asked into a round, that a leaf can hold the statement of its end.

    Args:
        cohort: The round's sites.
        charged: All sites of the run so far, whose cost that statement names; none if the run is not private.
        participants: The sites from which the cohort was drawn, which the statement of its beginning names.
        hybrid: Whether the statement is signed with ML-DSA-65 as well.
        counts: Names of the counts that the statement of the round's end holds, of a study that counts.

    Raises:
        StudyError: The statement could be too long.
    """
    most = 3 * (MAX_LEAF_BYTES - (_SECOND if hybrid else 0)) // 4
    names = sum(len(site) + 6 for site in cohort)
    needed = _FAILURES + _REST + names + sum(len(site) + 13 for site in charged)
    needed += sum(len(name) + _COUNT for name in counts)
    needed = max(needed, _REST + names + sum(len(site) + 3 for site in participants))
    if needed > most:
        raise StudyError(
            f"the statement about a round of {len(cohort)} sites may need {needed} bytes in the round log, at most "
            f"{most} bytes fit",
            "lower cohort.fraction in the study, so that a round has fewer sites"
            + (f"; or name fewer labels or lengths than make {len(counts)} counts" if counts else ""),
        )


def transcript_of(statement: RoundStatement) -> str:
    """Return the digest of a round's `masking` part, as the log holds it."""
    return digest(canonical_json({"masking": list(statement["masking"])}))
