"""Messages, statements and digests with fixed content, as bytes: what sites, coordinators and auditors agree on.

The imports are the only lines that a move of modules may change.
"""

from __future__ import annotations

import hashlib
import importlib.resources
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privet.common.canonical import canonical_json
from privet.common.flower.records import pack, unpack
from privet.common.log.checkpoint import Checkpoint, Policy
from privet.common.log.encoding import encode_statement, parse_statement
from privet.common.log.envelope import commit, sign_envelope, verify_envelope
from privet.common.log.note import COSIGNATURE, ED25519, Note, NoteKey, cosign, sign_note
from privet.common.log.statements import (
    Charge,
    Export,
    Genesis,
    Join,
    LedgerHead,
    Mechanism,
    Member,
    Privacy,
    Refusal,
    Revoke,
    RoundAbort,
    RoundClose,
    RoundOpened,
    RunOpen,
    SeenCheckpoint,
    SiteRound,
    StatedFloor,
    Statement,
)
from privet.common.pki.enrolment import (
    CheckpointReply,
    ConsistencyRequest,
    InclusionRequest,
    JoinRequest,
    LeavesReply,
    LeavesRequest,
    Nothing,
    ProofReply,
    RenewReply,
    RenewRequest,
    ReturnRequest,
    Spoken,
    Status,
    Terms,
)
from privet.common.privacy.noise import SeededRandomness, derive_key
from privet.common.secagg import encoding, transcript
from privet.common.secagg import messages as secagg
from privet.common.secagg.quantize import WORD, Segment
from privet.common.study.messages import (
    Consent,
    Contribution,
    Cosigned,
    Evidence,
    Failure,
    Message,
    Offer,
    RoundOpen,
    Secured,
    Shown,
)
from privet.common.study.study import Study, load_study

STUDIES = ("demo", "deploy", "medquad")
TIME = 1_800_000_000


def key(name: str) -> Ed25519PrivateKey:
    """Return the key that a name stands for."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def public(name: str) -> bytes:
    """Return its public half."""
    return key(name).public_key().public_bytes_raw()


def digest(text: str) -> str:
    """Return a digest that a statement may quote."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def some(count: int, what: str) -> bytes:
    """Return bytes that follow from a text."""
    return hashlib.shake_256(what.encode()).digest(count)


# --- messages --------------------------------------------------------------------------------------------

EVIDENCE = Evidence(b"run", b"run proof", b"opened", b"opened proof", 12, digest("head"))
MESSAGES: tuple[Message, ...] = (
    Offer({"name": "x", "nested": {"b": [1, 2.5, None, True], "a": "ü"}}, "run"),
    Consent("alder", digest("study"), digest("spec"), 120, public("alder").hex()),
    Shown(b"note", 7, some(64, "proof")),
    Cosigned("— alder AAAA", 7),
    RoundOpen({"name": "x"}, 3, "0" * 32, digest("adapter"), ("alder", "birch"), b"adapter", b"masking", 120, EVIDENCE),
    RoundOpen({"name": "x"}, 1, "1" * 32, digest("adapter"), ("alder",), b"adapter"),
    Secured(digest("study"), 3, "0" * 32, some(40, "body"), b"statement"),
    Contribution(
        "alder", 3, "0" * 32, 120.0, np.array([0.5, -1.25, 3e-8], np.float32), np.array([1.0, 0.25]), b"statement"
    ),
    Failure("RefusedError", "no", "ask again", b"statement"),
)


def wire(message: Message) -> bytes:
    """Return a message as it stands in Flower's record: the record's items, one after the other."""
    ((name, record),) = pack(message).items()
    parts = [name.encode()]
    for item, value in record.items():
        parts += [str(item).encode(), value if isinstance(value, bytes) else repr(value).encode()]
    return b"\n".join(len(part).to_bytes(4, "big") + part for part in parts)


# --- secure aggregation ----------------------------------------------------------------------------------

_ADVERTS = tuple(
    secagg.Advertise(
        some(32, "parameters"), n, some(32, f"share {n}"), some(32, f"mask {n}"), some(16, f"{n}"), some(64, f"s{n}")
    )
    for n in range(3)
)
_TAGS = tuple(secagg.Tag(n, some(secagg.TAG_BYTES, f"tag {n}")) for n in (1, 2))
_SEALED = tuple(secagg.Sealed(n, some(secagg.SEALED_BYTES, f"sealed {n}")) for n in (1, 2))
_ROSTER, _LISTS, _SIGNATURE = some(32, "roster"), some(32, "lists"), some(64, "signature")
PARAMETERS = secagg.Parameters(
    session=some(32, "session"),
    round=3,
    inputs=some(32, "inputs"),
    cohort=tuple(secagg.CohortMember(name, public(name)) for name in ("alder", "birch", "cedar")),
    degree=0,
    threshold=2,
    corrupt=1,
    security=80,
    min_survivors=2,
    bits=19,
    segments=(Segment("m.lora_B.weight", 6, 0.5), Segment("units", 1, 4096.0, count=True)),
)
SECAGG: tuple[secagg.ProtocolMessage, ...] = (
    PARAMETERS,
    _ADVERTS[1],
    secagg.Roster(_ADVERTS),
    secagg.Shares(_ROSTER, 0, some(32, "commitment"), _SEALED, _SIGNATURE),
    secagg.Delivery(_ROSTER, 0, (0, 1, 2), _SEALED),
    secagg.Masked(_ROSTER, 0, some(32, "sharers"), _TAGS, np.array([n << 40 for n in range(5)], WORD), _SIGNATURE),
    secagg.Survivors(_ROSTER, 0, (0, 1, 2), _TAGS),
    secagg.Confirm(_ROSTER, 0, _LISTS, _TAGS, _SIGNATURE),
    secagg.Proof(_ROSTER, 0, _TAGS, (secagg.Confirm(_ROSTER, 2, _LISTS, (), _SIGNATURE),)),
    secagg.Reveal(_ROSTER, 0, _LISTS, tuple(secagg.Share(n, some(33, f"share {n}")) for n in range(3)), _SIGNATURE),
)
SIGNED = tuple(each for each in SECAGG if isinstance(each, secagg.Signed))

# --- statements ------------------------------------------------------------------------------------------

ORIGIN = "example.org/north"
LOG_KEY = NoteKey(ORIGIN, ED25519, public("log"))


def member(site: str, *, witness: bool = True) -> Member:
    """Return a site as the log knows it."""
    cosigns = NoteKey(site, COSIGNATURE, public(f"witness {site}")).text if witness else None
    return Member(site=site, key=public(site).hex(), witness=cosigns)


MECHANISM = Mechanism(
    mechanism="poisson-subsampled-gaussian",
    version=1,
    neighbouring="add-or-remove-one-unit",
    unit="record",
    noise_multiplier=1.1,
    sampling_rate=0.01,
    steps=10,
)
STATEMENTS: tuple[Statement, ...] = (
    Genesis(
        time=TIME,
        consortium="north",
        log=LOG_KEY.text,
        coordinator=public("coordinator").hex(),
        members=(member("berlin"), member("lyon"), member("oslo", witness=False)),
        quorum=2,
        floor=StatedFloor(max_epsilon=8.0, max_delta=1e-5, min_sites=2),
    ),
    Join(time=TIME, member=member("turin"), quorum=3),
    Revoke(time=TIME, site="turin", key=public("turin").hex(), reason="key-compromise", quorum=2),
    RunOpen(
        time=TIME,
        run="flu",
        study=digest("study"),
        base=digest("base"),
        tokenizer=digest("tokenizer"),
        software=digest("software"),
        adapter=digest("adapter 0"),
        rounds=50,
        min_sites=2,
        secure_aggregation="masked",
        privacy=Privacy(
            epsilon=8.0, delta=1e-5, clip_norm=1.0, accountant="prv", training=MECHANISM, validation=MECHANISM
        ),
    ),
    RoundOpened(
        time=TIME,
        run="flu",
        round=1,
        nonce="0" * 32,
        adapter=digest("adapter 0"),
        cohort=("berlin", "lyon"),
        parameters=digest("parameters"),
    ),
    SiteRound(
        time=TIME,
        site="berlin",
        run="flu",
        round=1,
        opened=digest("opened"),
        policy=digest("policy"),
        ledger=LedgerHead(sequence=3, head=digest("head"), previous=None),
        charge=Charge(
            account=digest("account"), training=MECHANISM, validation=None, delta=1e-5, epsilon=0.125, limit=20.0
        ),
        upload=digest("upload"),
        checkpoint=SeenCheckpoint(size=5, root=some(32, "root").hex()),
        commitments={"units": digest("units")},
    ),
    RoundClose(
        time=TIME,
        run="flu",
        round=1,
        opened=digest("opened"),
        survivors=("berlin", "lyon"),
        failures={"oslo": "deadline"},
        adapter_before=digest("adapter 0"),
        adapter_after=digest("adapter 1"),
        adapter_published=digest("adapter 1"),
        aggregation="fedsvd",
        transcript=digest("transcript"),
        metrics={"validation_loss": 0.1 + 0.2, "accuracy": 1e-7},
        epsilon={"berlin": 0.5, "lyon": 1.0},
        ended=True,
    ),
    RoundAbort(
        time=TIME,
        run="flu",
        round=2,
        opened=digest("opened 2"),
        adapter=digest("adapter 1"),
        failures={"lyon": "deadline"},
        reason="too few sites",
        epsilon=None,
    ),
    Refusal(
        time=TIME,
        site="oslo",
        run="flu",
        study=digest("study"),
        round=0,
        code="E_BUDGET",
        rule="limit",
        asked="8",
        allowed="<= 2",
        policy=digest("policy"),
    ),
    Export(
        time=TIME, run="flu", round=1, adapter=digest("adapter 1"), files={"adapter_model.safetensors": digest("a")}
    ),
)

# --- enrolment -------------------------------------------------------------------------------------------

SPOKEN: tuple[Spoken, ...] = (
    Nothing(),
    Status(site="oslo", valid_until=TIME + 1, time=TIME, members=3, leaves=28),
    RenewRequest(request="request"),
    ReturnRequest.make("oslo", "request", key("oslo"), datetime.fromtimestamp(TIME, UTC)),
    RenewReply(certificate="certificate"),
    CheckpointReply(note="note"),
    LeavesRequest(first=3),
    LeavesReply(leaves=("AAAA", "BBBB")),
    ConsistencyRequest(old=3, new=5),
    InclusionRequest(index=3, size=5),
    ProofReply(hashes=("0" * 64,)),
)

PAPERS: dict[str, type[Spoken]] = {"roster.json": Terms, "request.json": JoinRequest}
"""What a site has of its consortium, by the file's name."""


def studies() -> Mapping[str, Study]:
    """Return the studies that come with the package, as they were when the bytes were made: with pinned weights."""
    folder = importlib.resources.files("privet.simulations") / "studies"
    found = {}
    for name in STUDIES:
        with importlib.resources.as_file(folder / f"{name}.toml") as file:
            study = load_study(file)
            weights = {name: pin for name, pin in study.model.sha256.items() if name.endswith(".safetensors")}
            found[name] = study.model_copy(update={"model": study.model.model_copy(update={"sha256": weights})})
    return found


def note() -> bytes:
    """Return a checkpoint, signed and cosigned."""
    text = Checkpoint(ORIGIN, 28, some(32, "root")).text
    lines = [sign_note(text, ORIGIN, key("log"))]
    lines += [cosign(text, site, key(f"witness {site}"), TIME) for site in ("berlin", "lyon")]
    return Note(text, tuple(lines)).encode()


def policy() -> Policy:
    """Return the policy that goes with it."""
    return Policy(LOG_KEY, tuple(NoteKey(s, COSIGNATURE, public(f"witness {s}")) for s in ("berlin", "lyon")), 2)


def build() -> dict[str, bytes]:
    """Return everything as bytes."""
    found = {f"message {n} {message.kind}": wire(message) for n, message in enumerate(MESSAGES)}
    found |= {f"secagg {type(each).__name__}": encoding.encode(each) for each in SECAGG}
    binding = transcript.Binding(PARAMETERS.session, 3, transcript.parameters_digest(PARAMETERS)).with_roster(_ROSTER)
    found |= {f"secagg signed {type(each).__name__}": transcript.signed_bytes(each, binding) for each in SIGNED}
    found["secagg digests"] = b"".join(
        (
            transcript.parameters_digest(PARAMETERS),
            transcript.roster_digest(some(32, "parameters"), secagg.Roster(_ADVERTS)),
            transcript.sharers_digest(_ROSTER, (0, 2)),
            transcript.lists_digest(some(32, "sharers"), (0, 2)),
        )
    )
    found |= {f"statement {each.type}": encode_statement(each) for each in STATEMENTS}
    found |= {f"envelope {each.type}": sign_envelope(each, key("author")) for each in STATEMENTS}
    found["commitment"] = commit("units", 100, some(32, "salt")).encode()
    found["checkpoint"], found["policy"] = note(), policy().text.encode()
    found |= {f"enrolment {type(each).__name__}": each.encode() for each in SPOKEN}
    found |= {f"study {name}": study.digest.encode() for name, study in studies().items()}
    found |= {f"study {name} document": canonical_json(study.document()) for name, study in studies().items()}
    found["derived key"] = derive_key(7, "noise", "alder", 3)
    stream = SeededRandomness(7, "noise", "alder", 3)
    found["randomness"] = b"".join((stream.words(4).tobytes(), stream.uniform(4).tobytes(), stream.normal(4).tobytes()))
    return found


def errors() -> dict[str, list[Any]]:
    """Return the classes of errors by name: their exit codes, and what they are a kind of.

    Failures name the class on the wire, and scripts go by the code.
    """
    from privet.common import errors as module

    classes = {n: c for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, module.PrivetError)}
    return {n: [c.exit_code, [b.__name__ for b in c.__mro__[1:-3]]] for n, c in sorted(classes.items())}


def reread() -> list[tuple[str, bytes, Callable[[], bytes]]]:
    """Return for what has a reader: a name, the bytes, and what reading and writing them again gives."""
    found: list[tuple[str, bytes, Callable[[], bytes]]] = []
    for n, message in enumerate(MESSAGES):
        found.append((f"message {n}", wire(message), partial(_wired, message)))
    for each in SECAGG:
        data = encoding.encode(each)
        found.append((type(each).__name__, data, partial(_decoded, type(each), data)))
    for statement in STATEMENTS:
        signed, text = sign_envelope(statement, key("author")), encode_statement(statement)
        found.append((f"{statement.type}, signed", signed, partial(_verified, signed)))
        found.append((statement.type, text, partial(_parsed, text)))
    for spoken in SPOKEN:
        said = spoken.encode()
        found.append((type(spoken).__name__, said, partial(again, type(spoken), said)))
    return found


def again(kind: type[Spoken], data: bytes) -> bytes:
    """Return what a message of enrolment comes to that was read."""
    return kind.decode(data).encode()


def _wired(message: Message) -> bytes:
    return wire(unpack(pack(message)))


def _decoded(kind: Any, data: bytes) -> bytes:
    return encoding.encode(encoding.decode(kind, data))


def _verified(data: bytes) -> bytes:
    return sign_envelope(verify_envelope(data, {public("author")})[1], key("author"))


def _parsed(data: bytes) -> bytes:
    return encode_statement(parse_statement(data))
