"""Of every field of every statement: how a verification checks it, and what stays its author's word.

One table, which `privet audit verify --json` prints and `docs/audit.md` shows. A test mutates every field of every
statement alone, has its author sign it and the whole log made anew: a verification refuses the result, or the field has
a `word` here.
"""

from __future__ import annotations

from dataclasses import dataclass

from privet.common.log.statements import (
    AdapterState,
    EgressDecision,
    EgressReview,
    Export,
    Genesis,
    Join,
    Refusal,
    Renew,
    Revoke,
    Rotate,
    RoundAbort,
    RoundClose,
    RoundOpened,
    RunOpen,
    SiteRound,
    StatedGate,
    StatementPart,
)


@dataclass(frozen=True)
class Field:
    """How one field is checked.

    Attributes:
        checked: What a verification holds it against; empty if nothing.
        word: What of it nobody can check, and is its author's word; empty if nothing.
    """

    checked: str = ""
    word: str = ""

    def __str__(self) -> str:
        """The field's cell in the table."""
        said = f"author's word: {self.word}" if self.word else ""
        return "; ".join(part for part in (self.checked, said) if part)


MODELS: dict[str, type[StatementPart]] = {
    "genesis": Genesis,
    "join": Join,
    "revoke": Revoke,
    "renew": Renew,
    "rotate": Rotate,
    "run-open": RunOpen,
    "round-open": RoundOpened,
    "site-round": SiteRound,
    "round-close": RoundClose,
    "round-abort": RoundAbort,
    "refusal": Refusal,
    "export": Export,
    "adapter-state": AdapterState,
    "egress-review": EgressReview,
    "egress-decision": EgressDecision,
}
"""The statement types, in the order of the table."""

_HEAD = {
    "type": Field("one of the known types"),
    "format": Field("the one format of the type"),
    "time": Field(word="the author's clock"),
}
_MEMBER = {
    "site": Field("one name for each member; signs its own statements", "that it is this institution"),
    "key": Field("one owner and one purpose; signs the site's statements", "whose key it is, until it signs"),
    "witness": Field("one owner and one purpose; verifies the cosignatures", "whose key it is, until it cosigns"),
}
_QUORUM = Field("more than half of the witnesses; so many members cosigned the last checkpoint", "a larger one before")
_ROUND = {
    "run": Field("a run that the log opened"),
    "round": Field("the number of the round that is open"),
    "opened": Field("leaf of that round's round-open"),
}
_FAILURES = Field("sites of the cohort that are no survivors", "which are named, and why they are missing")
_SPOILED = {
    "spoiled": Field("sites of the cohort", "that the sum could not be used"),
    "left_out": Field("computed from the spoiled and the usable sums of the run"),
}
_EPSILON = Field("computed from the run's mechanisms and the cohorts, aborted rounds included")


def _within(name: str, fields: dict[str, Field]) -> dict[str, Field]:
    return {f"{name}.{field}": how for field, how in fields.items()}


def _each(name: str, how: Field) -> dict[str, Field]:
    """Return the same answer for each field of a mechanism."""
    fields = ("mechanism", "version", "neighbouring", "unit", "noise_multiplier", "sampling_rate", "steps", "band")
    return _within(name, dict.fromkeys(fields, how))


_STUDY = Field("follows from the study")
_OF_STUDY = _each("training", _STUDY) | _each("validation", _STUDY) | _each("head", _STUDY)
_PROMISED = Field("equal to the mechanism of the run-open")

FIELDS: dict[str, dict[str, Field]] = {
    "genesis": _HEAD
    | {
        "consortium": Field(word="its name"),
        "log": Field("the log of the policy, until a rotation", "after a rotation, which key was replaced"),
        "coordinator": Field("signs the coordinator's statements"),
        **_within("members", _MEMBER),
        "quorum": _QUORUM,
        "floor.max_epsilon": Field("every run is within it", "a looser one"),
        "floor.max_delta": Field("every run is within it", "a looser one"),
        "floor.min_sites": Field("every run is within it", "a looser one"),
    },
    "join": _HEAD | _within("member", _MEMBER) | {"quorum": _QUORUM},
    "revoke": _HEAD
    | {
        "site": Field("a member"),
        "key": Field("that member's identity key"),
        "reason": Field(word="the reason"),
        "quorum": _QUORUM,
    },
    "renew": _HEAD
    | {
        "member.site": Field("a member"),
        "member.key": Field("that member's identity key, as before"),
        "member.witness": Field("its cosigning key, as before, with a new ML-DSA-65 key, which has signed this"),
        "proof": Field("signatures by identity key and new key over what changes"),
    },
    "rotate": _HEAD
    | {
        "log": Field("a new key, under the same name; signs the checkpoints from here on"),
        "coordinator": Field("a new key; signs the coordinator's statements from here on"),
        "charter": Field("signed by both new keys", "root certificate and tolerated collusion in it; sites compare it"),
        "log_proof": Field("signature by the new key over its place in this log"),
        "coordinator_proof": Field("signature by the new key over its place in this log"),
    },
    "run-open": _HEAD
    | {
        "run": Field("a new name, which all statements of the run repeat", "the name"),
        "study": Field("digest of the study"),
        "base": _STUDY,
        "tokenizer": _STUDY,
        "software": Field("digest of the file of software", "that this software ran"),
        "adapter": Field("the first round starts from it", "that it was made from the base and the seed"),
        "rounds": _STUDY,
        "min_sites": _STUDY,
        "secure_aggregation": _STUDY,
        "privacy.epsilon": Field("follows from the study; what the mechanisms of all rounds cost is not more"),
        "privacy.delta": _STUDY,
        "privacy.clip_norm": _STUDY,
        "privacy.accountant": Field("name and version of the auditor's accountant"),
        **_within("privacy", _OF_STUDY),
        **_within("gate", dict.fromkeys(StatedGate.model_fields, _STUDY)),
    },
    "round-open": _HEAD
    | {
        "run": Field("a run that the log opened"),
        "round": Field("the next number"),
        "nonce": Field("new in the run; the nonce in the bundle's statement", "that it was drawn at random"),
        "adapter": Field("the adapter that the last round published"),
        "cohort": Field("members, as many as the study needs; sites that state the round", "which others were asked"),
        "parameters": Field("digest of the cohort's identity keys as the log has them"),
        "participants": Field("members; the cohort is drawn from them by the study's seed", "who else was online"),
    },
    "site-round": _HEAD
    | {
        "site": Field("a site of the cohort, whose key signs the statement, once"),
        "run": _ROUND["run"],
        "round": Field("the number of that round-open"),
        "opened": Field("leaf of a round-open"),
        "policy": Field(word="its policy"),
        "ledger.sequence": Field("not below that of the site's last statement", "the number"),
        "ledger.head": Field("quoted by the site's next statement", "what its ledger holds"),
        "ledger.previous": Field("the head in the site's last statement"),
        "charge.account": Field("one in a run; its statements add up", "that another run's account is of other people"),
        **_each("charge.training", _PROMISED),
        **_each("charge.validation", _PROMISED),
        "charge.delta": Field("one for an account; its epsilon is computed at it", "which delta it accounts at"),
        "charge.epsilon": Field("not below the computed cost of the account", "more, for rounds outside the log"),
        "charge.limit": Field("not below the account's epsilon", "the limit"),
        "upload": Field(word="that it sent these bytes, and how it trained"),
        "checkpoint.size": Field("holds the round-open; does not fall", "which of those it saw"),
        "checkpoint.root": Field("the root of this log at that size"),
        "commitments": Field(word="the values; the site can open them"),
    },
    "round-close": _HEAD
    | _ROUND
    | {
        "survivors": Field("each has a site-round; as many as the study needs", "that the sum holds their updates"),
        "failures": _FAILURES,
        "adapter_before": Field("the adapter of the round-open"),
        "adapter_after": Field("published, or the study stops early", "that it is the sum of the survivors' updates"),
        "adapter_published": Field(
            "the next round or the export uses it; the new one, at an early stop an earlier one, or an average",
            "of the last round without an export; an average without the weights",
        ),
        "average": Field("follows from the study; computed from the adapters in a bundle with the weights"),
        "aggregation": _STUDY,
        "transcript": Field("digest of the masking in the bundle's statement", "how the sum was unmasked"),
        "metrics": Field(
            "equal to the bundle's statement; of a study that counts, its cells, in whole levels of shared noise",
            "the values",
        ),
        "epsilon": _EPSILON,
        "ended": Field("after the study's last round, or at an early stop", "that the study stopped early"),
        **_SPOILED,
    },
    "round-abort": _HEAD
    | _ROUND
    | {
        "adapter": Field("the adapter of the round-open"),
        "failures": Field("sites of the cohort", "which are named, and why they are missing"),
        "reason": Field(word="the reason"),
        "epsilon": _EPSILON,
        **_SPOILED,
    },
    "refusal": _HEAD
    | {
        "site": Field("a member, whose key signs the statement"),
        "run": Field("a run that the log opened"),
        "study": Field("that run's study"),
        "round": Field("a round of the run, or 0", "which"),
        "code": Field(word="the reason"),
        "rule": Field(word="the reason"),
        "asked": Field(word="the reason"),
        "allowed": Field(word="the reason"),
        "policy": Field(word="its policy"),
    },
    "export": _HEAD
    | {
        "run": Field("a run that the log opened"),
        "round": Field("a round that was closed", "another that published the same adapter"),
        "adapter": Field("the adapter that this round published"),
        "files": Field("digests of the released files", "card, lineage and adapter_config"),
    },
    "adapter-state": _HEAD
    | {
        "run": Field("a run that released this adapter"),
        "adapter": Field("an adapter that this run released"),
        "state": Field("later than the state before", "that it is so"),
        "by": Field("another run that released an adapter, which is in use", "that its adapter takes the place"),
        "reason": Field(word="the reason"),
    },
    "egress-review": _HEAD
    | {
        "site": Field("a site that answered a round and has not left since, whose key signs the statement; once"),
        "run": Field("a run that the log opened, with a gate, that has ended"),
        "study": Field("that run's study"),
        "adapter": Field("that run's candidate"),
        "verdict": Field("no signature after a refusal; counted by the decision", "that its test said so"),
        "tested": Field("of a signature: the conditions that the gate asks of each signer", "that it tested them"),
        "failed": Field(
            "conditions that it tested; none in a signature; the decision accepts none", "that they failed"
        ),
        "canaries.planted": Field("of one signer at least: as many as the gate asks for", "the number"),
        "canaries.guesses": Field("at most the canaries; the bound is computed", "the number"),
        "canaries.right": Field(
            "at most the guesses; the bound is computed, and no signer's is above the gate's", "the number"
        ),
        "test": Field("there is one if it tested", "the figures; the site can open them"),
        "reason": Field("there is one exactly with a refusal", "the reason"),
        "expires": Field("within the days of the gate; not before the decision that counts it", "an earlier one"),
    },
    "egress-decision": _HEAD
    | {
        "run": Field("a run that the log opened, with a gate, that has ended; not decided before, or expired"),
        "study": Field("that run's study"),
        "adapter": Field("that run's candidate"),
        "verdict": Field("accepted: every condition is met; nothing is exported without it", "a refusal"),
        "epsilon": Field("the largest in the last round-close or round-abort, which is computed"),
        "bound": Field("computed from the canaries of the reviews that count"),
        "quality": Field("the gate's metric in the last round-close that has it"),
        "signed": Field("the sites whose signatures count then and that have not left since"),
        "refused": Field("the sites that refuse"),
        "reason": Field("there is one exactly with a refusal", "the reason"),
        "expires": Field("when the first counted signature ends; the export is before it"),
    },
}
"""For each statement type, every field of it; those of parts by their path."""


def authors_word() -> dict[str, list[str]]:
    """Return the fields that are, in part or whole, their author's word, by statement type."""
    return {kind: [name for name, how in fields.items() if how.word] for kind, fields in FIELDS.items()}


def table() -> dict[str, dict[str, str]]:
    """Return the table as plain text by statement type and field."""
    return {kind: {name: str(how) for name, how in fields.items()} for kind, fields in FIELDS.items()}


def markdown() -> str:
    """Return the table as `docs/audit.md` shows it."""
    lines = ["| statement | field | checked against | author's word |", "|---|---|---|---|"]
    for kind, fields in FIELDS.items():
        lines += [f"| `{kind}` | `{name}` | {how.checked} | {how.word} |" for name, how in fields.items()]
    return "\n".join(lines) + "\n"
