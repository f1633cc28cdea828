"""What a study and its rounds come to in the round log: whoever has them can derive it, and must come to the same.

Pure but for `software`, which reads what is installed.
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
from privet.common.log.statements import Mechanism, Privacy, RoundAbort, RoundClose, RunOpen
from privet.common.log.statements import RoundOpened as OpenedStatement
from privet.common.log.tiles import MAX_LEAF_BYTES
from privet.common.privacy.accounting import PrivacyEvent, plan
from privet.common.study.messages import RoundOpen
from privet.common.study.study import Study

RoundStatement = Mapping[str, Any]
"""What the coordinator states of a round that ended: a file of the run directory, in JSON."""

# Characters that the reasons of a round's failures may take together: sites write them, and a leaf has to hold them.
_FAILURES = 10_000
# What takes two characters in JSON.
_UNESCAPED = str.maketrans('"\\', "'/")
# All else in a leaf but names, costs and reasons.
_REST = 2_000
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


# What is loaded does not change while it runs, and a look at its metadata takes milliseconds.
_installed = lru_cache(maxsize=64)(version)


def mechanism_of(event: PrivacyEvent) -> Mechanism:
    """Return a round's releases of one kind as statements give them."""
    return Mechanism.model_validate(event.document())


def promise_of(study: Study) -> Privacy | None:
    """Return what a run of the study promises and by which mechanism; None where it is not private."""
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
    )


def base_digests(study: Study) -> tuple[str, str | None]:
    """Return the digest of the base's weights, and that of all else the study pins; None where that is nothing."""
    pins = study.model.sha256
    weights = {name: value for name, value in pins.items() if name.endswith(".safetensors")}
    rest = {name: value for name, value in pins.items() if name not in weights}
    return digest(canonical_json(weights)), digest(canonical_json(rest)) if rest else None


def keys_digest(identities: Mapping[str, str]) -> str:
    """Return the digest of the cohort's identity keys, hexadecimal by site: the roots of a round's masks."""
    return digest(canonical_json(dict(identities)))


@lru_cache(maxsize=1)
def software() -> dict[str, Any]:
    """Return what runs here: the SHA-256 of each installed module of privet, and the versions of what it uses."""
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
    except PackageNotFoundError:  # an extra that this machine does without
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
        rounds=study.training.rounds,
        min_sites=study.cohort.min_sites,
        secure_aggregation=study.secure_aggregation.mode,
        privacy=promise_of(study),
    )


def follows(opened: RunOpen, study: Study) -> bool:
    """Whether a `run-open` is what a run of the study comes to; adapter and software are the coordinator's word."""
    base, tokenizer = base_digests(study)
    return opened == opened.model_copy(
        update={
            "study": study.digest,
            "base": base,
            "tokenizer": tokenizer,
            "rounds": study.training.rounds,
            "min_sites": study.cohort.min_sites,
            "secure_aggregation": study.secure_aggregation.mode,
            "privacy": promise_of(study),
        }
    )


def round_opened(run: str, opened: RoundOpen, keys: Mapping[str, str] | None, now: int) -> OpenedStatement:
    """Return the statement that a round is opened; `keys` are the cohort's identity keys, None in plain mode."""
    return OpenedStatement(
        time=now,
        run=run,
        round=opened.round,
        nonce=opened.nonce,
        adapter=opened.adapter_digest,
        cohort=opened.cohort,
        parameters=None if keys is None else keys_digest(keys),
    )


def round_ended(run: str, opened: str, statement: RoundStatement, ended: bool, now: int) -> RoundClose | RoundAbort:
    """Return what the log says of a round that has ended, from the run's own statement of it."""
    room = _FAILURES // max(len(statement["failures"]), 1)
    failures = {site: one_line(reason).translate(_UNESCAPED)[:room] for site, reason in statement["failures"].items()}
    privacy = statement["privacy"]
    epsilon = None if privacy is None else {site: _upwards(spent) for site, spent in privacy["epsilon"].items()}
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
    )


def _upwards(epsilon: float) -> float:
    """Return an epsilon with four places, rounded up: in the log it takes nine characters at most, below a billion."""
    places = 10_000 if epsilon < 10_000 else 1
    found = math.ceil(epsilon * places)
    # The product may have been rounded down, to a whole number.
    return (found if found / places >= epsilon else found + 1) / places


def check_leaf_size(cohort: Collection[str], charged: Collection[str]) -> None:
    """Check, before sites are asked into a round, that a leaf will hold its end.

    Args:
        cohort: The round's sites.
        charged: All sites of the run so far, whose cost the end names; none where the run is not private.

    Raises:
        StudyError: It would not.
    """
    needed = _FAILURES + _REST + sum(len(site) + 6 for site in cohort) + sum(len(site) + 13 for site in charged)
    if needed > 3 * MAX_LEAF_BYTES // 4:
        raise StudyError(
            f"a round of {len(cohort)} sites does not fit a statement of the round log", "lower cohort.fraction"
        )


def transcript_of(statement: RoundStatement) -> str:
    """Return the digest under which the log holds what was masked with what."""
    return digest(canonical_json({"masking": list(statement["masking"])}))
