"""The words that the documents of a dossier use, in the meanings that privet's glossary gives them."""

from __future__ import annotations

from privet.simulations.dossier.sources import Claim, Document, Section, Sentence

_PAGE = "docs/glossary.md"
_WORDS: dict[str, tuple[str, dict[str, str]]] = {
    "parties-and-studies": (
        "Parties and studies",
        {
            "site": "An institution that holds records and trains on them, and its process.",
            "coordinator": "The party that relays messages, sums updates, and runs studies. It holds no data and no "
            "base model.",
            "consortium": "The sites and the coordinator that share a root certificate and a round log.",
            "study": "One validated file that fixes everything that changes what is computed or released. Its digest "
            "identifies it.",
            "run": "One execution of a study, with a name in the round log.",
            "round": "One exchange between the coordinator and a cohort, which ends with a new adapter or is aborted.",
            "policy (of a site)": "The file that says which studies the site agrees to.",
        },
    ),
    "model-and-training": (
        "Model and training",
        {
            "adapter": "The named tensors that training changes: LoRA's A and B, and the head.",
            "update": "What a site contributes to a round: a vector, the change of the adapter or a gradient sum.",
        },
    ),
    "privacy": (
        "Privacy",
        {
            "differential privacy": "A bound on how much one unit's data can change the probability of anything "
            "released.",
            "unit of privacy": "Whose data the bound protects: a record, or all records of one patient.",
            "epsilon": "The bound's main number: probabilities differ by a factor of at most exp(epsilon). Smaller is "
            "more private.",
            "delta": "The small probability by which the bound may be exceeded.",
            "ledger": "A site's record of the privacy that was spent on a dataset, over all studies.",
            "clip norm": "The L2 norm to which each unit's gradient is clipped.",
            "clipping": "What one unit adds to a sum is cut to the clip norm, so that noise of a known size hides it.",
            "lattice": "The evenly spaced numbers to which sums and noise are rounded, so that their last digits tell "
            "nothing.",
            "Rényi differential privacy": "Another way to compute epsilon. It is coarser: its bound is larger, and "
            "holds as well.",
            "AUC": "How well an attack tells training records from others: 0.5 is guessing, 1 is always right.",
            "canary": "A made-up record, inserted to measure how much training memorises.",
        },
    ),
    "logs-and-audit": (
        "Logs and audit",
        {
            "round log": "The Merkle log of a consortium: signed statements about every run and round.",
            "statement": "One signed fact in the round log, such as `round-open` or `site-round`.",
            "leaf": "One entry of the round log: a statement in its signed envelope.",
            "quorum (of the log)": "How many witnesses must cosign a checkpoint before a reader accepts it: more than "
            "half. Commands and log policies mean this one.",
            "witness": "A site that cosigns a checkpoint only if it follows from the last one it cosigned.",
            "commitment": "A digest that binds a site to a value without revealing it.",
            "candidate": "The adapter with which a run ends whose study has a gate. It is tested, and used for nothing "
            "else.",
            "gate": "The conditions of a study under which its candidate becomes a release.",
            "egress decision": "The coordinator's statement whether a candidate may leave. All its figures follow from "
            "the log.",
        },
    ),
}


def words() -> Document:
    """Return the document that says what the other documents' words mean."""
    return Document(
        "words",
        "Words that these documents use",
        tuple(
            Section(title, tuple(_meaning(anchor, *each) for each in found.items()))
            for anchor, (title, found) in _WORDS.items()
        ),
    )


def _meaning(anchor: str, term: str, meaning: str) -> Sentence:
    return Sentence(f"{term[0].upper()}{term[1:]}: {meaning}", Claim(_PAGE, anchor))
