"""The checks of a bundle by name: what the page in a browser does of each, and what only `privet audit verify` does.

One table, which the page shows. A test holds it against the parts of `privet.common.audit.bundle`, and against what
both verifiers say about tampered bundles.
"""

from __future__ import annotations

from dataclasses import dataclass

from privet.common.audit.bundle import MANIFEST, PROOFS, RELEASE, ROUNDS, SOFTWARE, STUDY
from privet.common.study.average import AVERAGED


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: Its name in the page's program.
        text: What is checked, or what is not, as a sentence.
        where: The parts of a bundle that `Report.where` names if it fails; none for the log.
    """

    name: str
    text: str
    where: tuple[str, ...] = ()


IN_PAGE = (
    Check("checkpoint", "The checkpoint is a signed note of the log, in its one form."),
    Check("tree", "The leaves, hashed with SHA-256, give the root hash in the checkpoint (RFC 6962)."),
    Check(
        "history",
        "Each leaf is a statement in its one form, with the Ed25519 signature of an author who may make it at this "
        "point of the history. Sites quote earlier checkpoints of this same log. Each round starts from the adapter "
        "that the round before published. Ledgers continue, and stated epsilons never fall.",
    ),
    Check(
        "quorum",
        "The log's key and a quorum of members signed the checkpoint with Ed25519, by the keys in the log itself.",
    ),
    Check("tiles", "Each file of the log holds what the leaves give.", ("tile/",)),
    Check("manifest", "The bundle is of a run that the log has, and holds no unknown file.", (MANIFEST,)),
    Check("study", "The study has the digest that the log states.", (STUDY,)),
    Check("software", "The list of the coordinator's software has the digest that the log states.", (SOFTWARE,)),
    Check("rounds", "Each round's own statement agrees with the log, field by field.", (ROUNDS,)),
    Check("release", "Each released file in this page has the digest that the log exports.", (RELEASE,)),
    Check("proofs", "The inclusion proofs in the bundle are those of the log.", (PROOFS,)),
)
"""What the page checks, in its order."""

NOT_IN_PAGE = (
    Check(
        "ml-dsa",
        "ML-DSA-65 signatures: they are there, and name their author's key, but browsers cannot verify them. Only this "
        "half withstands an attacker who breaks Ed25519.",
        ("tile/", "checkpoint"),
    ),
    Check("epsilon", "Privacy costs: every epsilon shown here is as stated, and none is computed.", ("tile/",)),
    Check(
        "terms",
        "That the run's terms (base, rounds, least number of sites, masking, privacy, way of summing, end) follow from "
        "the study.",
        (STUDY, ROUNDS),
    ),
    Check(
        "draws", "That the study's seed draws each cohort, and that each spoiled sum is one of its round.", (ROUNDS,)
    ),
    Check("counts", "That released counts are those of the round's statement.", (ROUNDS, RELEASE)),
    Check("average", "That a published average is that of the rounds' adapters.", (AVERAGED,)),
    Check("weights", "The adapter's weights, and the signature over the release.", (RELEASE,)),
    Check("privacy-statement", "That the released privacy statement is what study and rounds give.", (RELEASE,)),
    Check("canaries", "The bound on epsilon that canaries show, in reviews and egress decisions.", ("tile/",)),
    Check("receipts", "Whether refusals that a site keeps as receipts are in the log.", ("receipts",)),
)
"""What only `privet audit verify` checks. The page names those that concern the bundle."""
