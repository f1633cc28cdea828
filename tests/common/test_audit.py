"""Every way to tamper with a log is found, and the verdict says what and where."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.common.audit.verify import Verdict, prove_leaf, verify_bundle
from privet.common.canonical import canonical_json
from privet.common.errors import ProtocolError, VerificationError
from privet.common.log import envelope
from privet.common.log.checkpoint import verify_leaf
from privet.common.log.merkle import leaf_hash
from privet.common.log.statements import (
    Charge,
    Join,
    LedgerHead,
    Privacy,
    Revoke,
    RunOpen,
    SeenCheckpoint,
    SiteRound,
    StatedFloor,
    Statement,
)
from tests.support.log_world import (
    ORIGIN,
    World,
    digest,
    flips,
    member,
    private,
    public,
    sign_head,
    signed,
    story,
    witness_key,
)

WORLD = story()
LEAVES = WORLD.leaves
NOTE = WORLD.checkpoint()
POLICY = WORLD.policy
KINDS = [statement.type for statement, _ in WORLD.said]


def check(leaves: list[bytes], note: bytes = NOTE, *, stated: bool = False) -> Verdict:
    tiles = (lambda: [leaf_hash(leaf) for leaf in LEAVES]) if stated else None
    return verify_bundle(lambda: leaves, note, POLICY, tiles)


def test_a_log_by_the_book_is_verified() -> None:
    seen: list[tuple[int, Statement]] = []
    verdict = verify_bundle(lambda: LEAVES, NOTE, POLICY, None, lambda leaf, what: seen.append((leaf.index, what)))
    assert verdict.ok, str(verdict)
    assert str(verdict) == "verified: 28 leaves, cosigned by berlin.example, lyon.example, oslo.example"
    assert seen == list(enumerate(statement for statement, _ in WORLD.said))
    assert set(verdict.history.members) == set(WORLD.sites)
    assert verdict.history.epsilon["oslo", digest("account of oslo")] == (WORLD.epsilon["oslo"], 1e-5)
    assert verdict.history.runs["flu"].published[3] == WORLD.adapters["flu"]


@pytest.mark.parametrize("private_run", [True, False])
def test_every_length_of_a_log_is_verified(private_run: bool) -> None:
    world = World(private=private_run)
    world.found()
    world.play("flu", 1)
    for size in range(1, len(world.leaves) + 1):
        leaves = world.leaves[:size]
        assert verify_bundle(partial(list, leaves), sign_head(leaves, world.sites), POLICY).ok


# Tampering: with the leaves, with the leaves and the checkpoint, and by a coordinator who signs everything anew


def edited(at: int, change: Callable[[Statement], Statement], author: str | None = None) -> list[bytes]:
    """Return the leaves with one statement changed and signed again by `author`, its own by default."""
    statement, by = WORLD.said[at]
    return [*LEAVES[:at], envelope.sign_envelope(change(statement), private(author or by)), *LEAVES[at + 1 :]]


def change(**fields: object) -> Callable[[Statement], Statement]:
    return lambda statement: statement.model_copy(update=fields)


CLOSE = KINDS.index("round-close")
SITE = KINDS.index("site-round")
OPEN = KINDS.index("round-open")


def cheaper(statement: Statement) -> Statement:
    assert isinstance(statement, SiteRound)
    assert statement.charge is not None
    return statement.model_copy(update={"charge": statement.charge.model_copy(update={"epsilon": 0.00001})})


def flipped(at: int) -> list[bytes]:
    """Change one letter inside a payload, so that the envelope still has its form."""
    leaf = bytearray(LEAVES[at])
    leaf[200] = leaf[200] + 1 if chr(leaf[200]) in "ABCDabcd0123" else ord("A")
    return [*LEAVES[:at], bytes(leaf), *LEAVES[at + 1 :]]


TAMPERS: dict[str, tuple[list[bytes], int | None]] = {
    "edit a leaf": (flipped(7), 7),
    "edit the first leaf": (flipped(0), 0),
    "edit the last leaf": (flipped(27), 27),
    "delete the first leaf": (LEAVES[1:], 0),
    "delete a round-open": ([*LEAVES[:OPEN], *LEAVES[OPEN + 1 :]], OPEN),
    "delete a site's statement": ([*LEAVES[:SITE], *LEAVES[SITE + 1 :]], SITE),
    "delete a round-close": ([*LEAVES[:CLOSE], *LEAVES[CLOSE + 1 :]], CLOSE),
    "delete a refusal": ([*LEAVES[:2], *LEAVES[3:]], 2),
    "truncate": (LEAVES[:-1], 27),
    "truncate all": ([], 0),
    "append a leaf": ([*LEAVES, LEAVES[-1]], None),
    "insert a stranger's leaf": (
        [*LEAVES[:5], envelope.sign_envelope(WORLD.said[5][0], private("mallory")), *LEAVES[5:]],
        5,
    ),
    "insert a leaf twice": ([*LEAVES[:6], LEAVES[5], *LEAVES[6:]], 6),
    "reorder two sites": ([*LEAVES[:4], LEAVES[5], LEAVES[4], *LEAVES[6:]], 4),
    "reorder two rounds": ([*LEAVES[:3], *LEAVES[11:16], *LEAVES[3:11], *LEAVES[16:]], 3),
    "replay a round": ([*LEAVES[:8], *LEAVES[3:8], *LEAVES[8:]], 8),
    "swap an adapter": (edited(CLOSE, change(adapter_after=digest("x"), adapter_published=digest("x"))), CLOSE),
    "swap the adapter that a round starts from": (edited(OPEN, change(adapter=digest("x"))), OPEN),
    "change epsilon": (edited(SITE + 1, cheaper), SITE + 1),
    "change epsilon with a foreign key": (edited(SITE + 1, cheaper, "mallory"), SITE + 1),
    "state a site's part with the coordinator's key": (edited(SITE, lambda s: s, "coordinator"), SITE),
    "close a round with a site's key": (edited(CLOSE, lambda s: s, "oslo"), CLOSE),
    "an empty leaf": ([*LEAVES[:4], b"", *LEAVES[5:]], 4),
    "something else for a leaf": ([*LEAVES[:4], b"{}", *LEAVES[5:]], 4),
}


@pytest.mark.parametrize("name", TAMPERS)
def test_a_tampered_log_fails_under_its_checkpoint(name: str) -> None:
    leaves, at = TAMPERS[name]
    exact = check(leaves, stated=True)
    assert not exact.ok
    # With the tiles at hand the first leaf that differs is named, without them the first that says so itself.
    differs = next((i for i, leaf in enumerate(leaves[:28]) if leaf != LEAVES[i]), min(len(leaves), 28))
    assert exact.leaf == differs
    verdict = check(leaves)
    assert not verdict.ok
    assert verdict.reason
    if at is not None and verdict.leaf is not None:
        assert at <= verdict.leaf <= at + 12, str(verdict)


# Even with every witness on the liar's side, what the sites signed contradicts a changed past: it quotes checkpoints.
# Only a log cut short is right in itself; whoever saw more of it knows better, and that is what witnesses are for.
@pytest.mark.parametrize("name", sorted(TAMPERS.keys() - {"truncate"}))
def test_a_tampered_log_that_was_signed_and_cosigned_anew_still_contradicts_itself(name: str) -> None:
    leaves, _ = TAMPERS[name]
    verdict = check(leaves, sign_head(leaves, WORLD.sites))
    assert not verdict.ok, name


@pytest.mark.parametrize("name", sorted(TAMPERS))
def test_a_tampered_log_that_the_coordinator_alone_signs_anew_has_no_quorum(name: str) -> None:
    leaves, _ = TAMPERS[name]
    verdict = check(leaves, sign_head(leaves, ("berlin",)))
    assert "expected cosignatures of 2 of 3 witnesses, found 1" in verdict.reason


def test_a_checkpoint_under_another_key_or_of_another_log_fails() -> None:
    for note, says in [
        (sign_head(LEAVES, WORLD.sites, signer="mallory"), "expected a signature by"),
        (NOTE.replace(ORIGIN.encode(), b"example.org/other"), "expected a signature by"),
        (NOTE.replace(b"\n28\n", b"\n27\n"), "does not match"),
        (b"", "expected a text, an empty line"),
        (sign_head(LEAVES[:27], WORLD.sites), "commits to 27 leaves, found 28"),
        (sign_head([*LEAVES, LEAVES[3]], WORLD.sites), "commits to 29 leaves, found 28"),
    ]:
        verdict = check(LEAVES, note)
        assert not verdict.ok
        assert says in verdict.reason


@pytest.mark.parametrize("size", [27, 29])
def test_a_checkpoint_whose_size_is_not_that_of_its_root_fails_though_all_signed_it(size: int) -> None:
    head = replace(WORLD.head, size=size)
    verdict = check(LEAVES, signed(head, WORLD.sites))
    assert f"commits to {size} leaves, found 28" in verdict.reason


def test_another_consortiums_log_fails_though_its_checkpoint_is_right() -> None:
    world = World()
    world.say(world.genesis(log=replace(POLICY.log, name="example.org/other").text))
    verdict = verify_bundle(lambda: world.leaves, world.checkpoint(), POLICY)
    assert verdict.leaf == 0
    assert "leaf 0 is not the genesis of that log" in verdict.reason


def test_a_fork_fails_for_whoever_holds_the_other_branch() -> None:
    """Both branches are right in themselves; each lacks the quorum that the other has."""
    fork = World()
    fork.found()
    fork.play("flu", 1)
    assert not check(fork.leaves).ok
    assert not check(LEAVES, sign_head(fork.leaves, ("oslo",))).ok


def test_a_site_that_saw_the_other_branch_says_so_in_its_statement() -> None:
    world = World()
    world.found()
    opened = world.say(world.round_open("flu", 1))
    other = SeenCheckpoint(size=3, root="ab" * 32)
    world.say(world.site_round("oslo", "flu", 1, opened, checkpoint=other), "oslo")
    verdict = verify_bundle(lambda: world.leaves, world.checkpoint(), POLICY)
    assert verdict.leaf == 3
    assert "root hash of the checkpoint of 3 leaves that the site quotes" in verdict.reason


def missed(count: int, seed: int) -> Iterator[str]:
    """Flip bits of leaves and checkpoint at random; yield those that go unnoticed."""
    generator = random.Random(seed)
    for number in range(count):
        if number % 8 == 0:
            (note,) = flips(NOTE, iter([generator.randrange(8 * len(NOTE))]))
            verdict = check(LEAVES, note)
            # A line that becomes that of nobody we know is passed over, and two cosignatures are a quorum.
            if verdict.ok and len(verdict.cosigners) == 3:
                yield f"seed {seed}, checkpoint, number {number}"
        else:
            at = generator.randrange(len(LEAVES))
            (leaf,) = flips(LEAVES[at], iter([generator.randrange(8 * len(LEAVES[at]))]))
            verdict = check([*LEAVES[:at], leaf, *LEAVES[at + 1 :]], stated=True)
            if verdict.ok or verdict.leaf != at:
                yield f"seed {seed}, leaf {at}, number {number}"


def test_no_flipped_bit_goes_unnoticed() -> None:
    assert list(missed(300, seed=1)) == []


@pytest.mark.slow
def test_none_of_10_000_flipped_bits_goes_unnoticed() -> None:
    assert list(missed(10_000, seed=2)) == []


def test_no_flipped_bit_goes_unnoticed_where_everything_is_signed_anew() -> None:
    """Then each leaf's own signature, which the coordinator cannot make for a site, is what is left."""
    generator = random.Random(3)
    for _ in range(40):
        at = generator.choice([i for i, (_, author) in enumerate(WORLD.said) if author != "coordinator"])
        (leaf,) = flips(LEAVES[at], iter([generator.randrange(8 * len(LEAVES[at]))]))
        leaves = [*LEAVES[:at], leaf, *LEAVES[at + 1 :]]
        verdict = check(leaves, sign_head(leaves, WORLD.sites))
        assert verdict.leaf == at, str(verdict)


# Nothing a log holds makes the verifier do anything but fail


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=50) | st.sampled_from(LEAVES), max_size=6), st.booleans())
def test_any_bytes_for_leaves_give_a_verdict(leaves: list[bytes], signed: bool) -> None:
    verdict = check(leaves, sign_head(leaves, WORLD.sites) if signed else NOTE)
    assert verdict.ok == (
        signed and 0 < len(leaves) == len([a for a, b in zip(leaves, LEAVES, strict=False) if a == b])
    )


def test_an_error_that_nobody_foresaw_is_a_failure() -> None:
    def broken() -> Iterator[bytes]:
        yield from LEAVES[:3]
        raise ZeroDivisionError("secret content")

    def unreadable() -> Iterator[bytes]:
        yield from LEAVES[:3]
        raise FileNotFoundError("tile/entries/000")

    for leaves, says in ((broken, "ZeroDivisionError"), (unreadable, "cannot be read (FileNotFoundError)")):
        verdict = verify_bundle(leaves, NOTE, POLICY)
        assert not verdict.ok
        assert verdict.leaf == 3
        assert says in verdict.reason
        assert "secret" not in str(verdict)


@pytest.mark.parametrize(
    ("second", "leaf", "says"),
    [
        (flipped(7), 7, "the leaf has other bytes now: the file was changed while it was verified"),
        ([*LEAVES, LEAVES[0]], 28, "the leaf has other bytes now: the file was changed while it was verified"),
        (LEAVES[:10], 10, "the leaf is missing now: the file was changed while it was verified"),
        (LEAVES[:27], 27, "the leaf is missing now: the file was changed while it was verified"),
        ([], 0, "the leaf is missing now: the file was changed while it was verified"),
    ],
)
def test_leaves_that_change_while_they_are_read_are_noticed(second: list[bytes], leaf: int, says: str) -> None:
    passes = iter([LEAVES, second])
    verdict = verify_bundle(lambda: next(passes), NOTE, POLICY)
    assert (verdict.leaf, verdict.reason) == (leaf, says)


def test_damaged_tiles_are_no_help_and_no_harm() -> None:
    def damaged() -> Iterator[bytes]:
        yield leaf_hash(LEAVES[0])
        raise FileNotFoundError("tile/0/001")

    assert verify_bundle(lambda: LEAVES, NOTE, POLICY, damaged).ok
    for stated in (damaged, lambda: [leaf_hash(leaf) for leaf in flipped(3)], list):
        verdict = verify_bundle(lambda: flipped(7), NOTE, POLICY, stated)
        assert verdict.leaf == 7
        assert "does not match" in verdict.reason or "envelope" in verdict.reason


def test_a_generator_that_runs_dry_is_no_pass() -> None:
    once = iter(LEAVES)
    assert not verify_bundle(lambda: once, NOTE, POLICY).ok


def test_deep_json_is_refused_and_not_recursed_into() -> None:
    payload = b'{"predicate":' * 3000
    signature = private("oslo").sign(envelope.pae(envelope.PAYLOAD_TYPE, payload))
    leaves = [*LEAVES[:4], envelope.Envelope(payload, public("oslo"), signature).encode()]
    verdict = check(leaves, sign_head(leaves, WORLD.sites))
    assert verdict.leaf == 4
    assert verdict.reason.startswith("statement:")


# The history


def told(*steps: Callable[[World], object]) -> Verdict:
    """Verify a log in which, after genesis and run, these statements stand, all hashes and signatures right."""
    world = World()
    world.found()
    for step in steps:
        step(world)
    return verify_bundle(lambda: world.leaves, world.checkpoint(), POLICY)


def play(number: int, run: str = "flu") -> Callable[[World], object]:
    return lambda world: world.play(run, number)


def opens(number: int, **changes: object) -> Callable[[World], object]:
    return lambda world: world.say(world.round_open("flu", number, **changes))


def last_open(world: World) -> tuple[int, str]:
    """Return round and hash of the last round-open."""
    at = max(i for i, (statement, _) in enumerate(world.said) if statement.type == "round-open")
    statement = world.said[at][0]
    assert statement.type == "round-open"
    return statement.round, "sha256:" + leaf_hash(world.leaves[at]).hex()


def states(site: str, author: str | None = None, **changes: object) -> Callable[[World], object]:
    def step(world: World) -> None:
        number, opened = last_open(world)
        given = {"opened": opened} | changes
        statement = world.site_round(site, "flu", number, str(given.pop("opened")), **given)
        world.say(statement, author or site)

    return step


def closes(**changes: object) -> Callable[[World], object]:
    def step(world: World) -> None:
        number, opened = last_open(world)
        world.say(world.round_close("flu", number, opened).model_copy(update=changes))

    return step


def aborts(**changes: object) -> Callable[[World], object]:
    def step(world: World) -> None:
        number, opened = last_open(world)
        world.say(world.round_abort("flu", number, opened, **changes))

    return step


ALL = [states("berlin"), states("lyon"), states("oslo")]


def charge(**changes: object) -> Charge:
    statement = next(s for s, _ in WORLD.said if isinstance(s, SiteRound))
    assert statement.charge is not None
    return statement.charge.model_copy(update={"account": digest("account of oslo")} | changes)


MECHANISM = charge().training
RULES: dict[str, tuple[list[Callable[[World], object]], str]] = {
    "a second genesis": (
        [lambda w: w.say(w.genesis())],
        "only leaf 0 of the round log may be a statement of type genesis, found another as leaf 2",
    ),
    "a run twice": ([lambda w: w.say(w.run_open("flu"))], "has a run named flu already"),
    "epsilon above the floor": (
        [lambda w: w.say(w.run_open("b", privacy=privacy_of(w).model_copy(update={"epsilon": 11.0})))],
        r"allows epsilon up to 10.0, found 11.0",
    ),
    "no privacy under a floor": ([lambda w: w.say(w.run_open("b", privacy=None))], "found no privacy"),
    "too few sites for the floor": (
        [lambda w: w.say(w.run_open("b", min_sites=1))],
        "demands at least 2 sites in a sum, found 1",
    ),
    "a round of no run": (
        [lambda w: w.say(w.round_open("flu", 1).model_copy(update={"run": "other"}))],
        "run other: the log has no run-open statement that opens this run",
    ),
    "a round ahead": ([opens(2)], "number of the opened round: expected 1, found 2"),
    "a round again": ([play(1), opens(1)], "number of the opened round: expected 2, found 1"),
    "a masked round again after an abort": (
        [opens(1), aborts(), opens(1)],
        "number of the opened round: expected 2, found 1",
    ),
    "a round beyond the last": (
        [lambda w: w.say(w.run_open("b", rounds=1)), play(1, "b"), lambda w: w.say(w.round_open("b", 2))],
        "after the run had ended",
    ),
    "two rounds open": ([opens(1), opens(1)], "while round 1 was still open"),
    "another adapter": (
        [opens(1, adapter=digest("x"))],
        "digest of the adapter with which the round was opened: expected",
    ),
    "a nonce again": (
        [opens(1, nonce="0" * 32), aborts(), opens(2, nonce="0" * 32)],
        "an earlier round of the run had the same nonce",
    ),
    "a stranger in the cohort": ([opens(1, cohort=("berlin", "paris"))], "paris takes part, but is not a member"),
    "a small cohort": ([opens(1, cohort=("berlin",))], "expected at least 2 sites in the cohort, found 1"),
    "no parameters of secure aggregation": (
        [opens(1, parameters=None)],
        "if the run uses secure aggregation, and none if it does not",
    ),
    "a site outside the cohort": (
        [opens(1, cohort=("berlin", "lyon")), states("oslo")],
        "the site is not in the round's cohort, or the log has its statement",
    ),
    "a site twice": ([opens(1), states("oslo"), states("oslo")], "the log has its statement about this round already"),
    "a site for another": ([opens(1), states("oslo", author="lyon")], "is not the current identity key of site oslo"),
    "the coordinator for a site": (
        [opens(1), states("oslo", author="coordinator")],
        "is not the current identity key of site oslo",
    ),
    "a stranger": ([opens(1), states("oslo", author="mallory")], "is not the current identity key of site oslo"),
    "an answer to nothing": (
        [opens(1), states("oslo", opened=digest("x"))],
        "that the log does not have for this round",
    ),
    "another round's number": ([opens(1), states("oslo", round=2)], "that the log does not have for this round"),
    "a checkpoint from the future": (
        [opens(1), states("oslo", checkpoint=SeenCheckpoint(size=4, root="0" * 64))],
        "at least 3 and at most 3 leaves, found 4",
    ),
    "a checkpoint before the round": (
        [opens(1), lambda w: states("oslo", checkpoint=SeenCheckpoint(size=2, root=w.roots[2].hex()))(w)],
        "at least 3 and at most 3 leaves, found 2",
    ),
    "a checkpoint before one quoted earlier": (
        [
            lambda w: remember(w, w.say(w.round_open("flu", 1))),
            *ALL[:2],
            closes(survivors=("berlin", "lyon")),
            opens(2),
            states("oslo"),
            lambda w: w.say(w.site_round("oslo", "flu", 1, w.note, checkpoint=seen(w, 5)), "oslo"),
        ],
        "at least 7 and at most 8 leaves, found 5",
    ),
    "no ledger any more": (
        [play(1), opens(2), states("oslo", ledger=None)],
        "named the state of its ledger, but this statement does not",
    ),
    "a wiped ledger": (
        [play(1), opens(2), states("oslo", ledger=LedgerHead(sequence=9, head=digest("new"), previous=None))],
        "hash of the newest ledger entry in the site's last statement: expected sha256:.* found None",
    ),
    "a ledger rolled back": (
        [
            play(1),
            opens(2),
            lambda w: states("oslo", ledger=LedgerHead(sequence=2, head=digest("x"), previous=w.ledgers["oslo"][1]))(w),
        ],
        "expected it to continue after entry 3, found a different history that ends with entry 2",
    ),
    "a ledger rewritten": (
        [
            play(1),
            opens(2),
            lambda w: states("oslo", ledger=LedgerHead(sequence=3, head=digest("x"), previous=w.ledgers["oslo"][1]))(w),
        ],
        "expected it to continue after entry 3, found a different history that ends with entry 3",
    ),
    "no cost": (
        [opens(1), states("oslo", charge=None)],
        "the run is private, but the site's statement has no privacy cost",
    ),
    "epsilon that falls": (
        [play(1), opens(2), states("oslo", charge=charge(epsilon=0.00001))],
        "cannot fall: it was 0.0001, found 1e-05",
    ),
    "epsilon above the limit": (
        [opens(1), states("oslo", charge=charge(epsilon=20.5))],
        r"epsilon 20.5, which is above its limit of 20.0",
    ),
    "another delta": (
        [play(1), opens(2), states("oslo", charge=charge(delta=1e-4))],
        "delta of the site's ledger account",
    ),
    "less noise than agreed": (
        [opens(1), states("oslo", charge=charge(training=MECHANISM.model_copy(update={"noise_multiplier": 0.1})))],
        "mechanism \\(noise, sampling rate, steps\\) in the site's statement: expected",
    ),
    "a close of nothing": ([opens(1), *ALL, aborts(), closes()], "round-close is about a round that is not open"),
    "a close twice": ([opens(1), *ALL, closes(), closes()], "round-close is about a round that is not open"),
    "a close of another round": ([opens(1), *ALL, closes(round=2)], "round-close is about a round that is not open"),
    "an adapter from elsewhere": (
        [opens(1), *ALL, closes(adapter_before=digest("x"))],
        "digest of the adapter before the round, in its round-close: expected",
    ),
    "a survivor who said nothing": (
        [opens(1), *ALL[:2], closes()],
        "oslo is a survivor, but the log has no site-round statement of it",
    ),
    "a survivor outside the cohort": (
        [opens(1, cohort=("berlin", "lyon")), *ALL[:2], closes()],
        "must be in the cohort",
    ),
    "a survivor who failed": ([opens(1), *ALL, closes(failures={"oslo": "late"})], "and no site may be both"),
    "too few survivors": (
        [opens(1), *ALL, closes(survivors=("oslo",))],
        r"expected at least 2 survivors \(sites in the sum\), found 1",
    ),
    "no epsilons": ([opens(1), *ALL, closes(epsilon=None)], "must state each site's epsilon if the run is private"),
    "a round after the end": ([opens(1), *ALL, closes(ended=True), opens(2)], "after the run had ended"),
    "an abort of nothing": ([opens(1), *ALL, closes(), aborts()], "round-abort is about a round that is not open"),
    "an abort that changes the adapter": (
        [opens(1), aborts(adapter=digest("x"))],
        "digest of the adapter in its round-abort: expected",
    ),
    "an abort without its cost": (
        [opens(1), aborts(epsilon=None)],
        "must state each site's epsilon if the run is private",
    ),
    "a refusal of no run": (
        [lambda w: w.say(w.refusal("oslo", "other"), "oslo")],
        "the log has no run-open statement that opens this run",
    ),
    "a refusal of another study": (
        [lambda w: w.say(w.refusal("oslo", "flu", study=digest("other")), "oslo")],
        "study: expected",
    ),
    "a refusal of a round that cannot be": (
        [lambda w: w.say(w.refusal("oslo", "flu", round=50_001), "oslo")],
        "rounds, but the refusal is of round",
    ),
    "a refusal in another's name": (
        [lambda w: w.say(w.refusal("oslo", "flu"), "lyon")],
        "is not the current identity key of site oslo",
    ),
    "an export of a round to come": (
        [play(1), lambda w: w.say(w.export("flu", 2))],
        "the export names round 2, but the log has no round-close of it",
    ),
    "an export of an aborted round": (
        [play(1), opens(2), aborts(), lambda w: w.say(w.export("flu", 2))],
        "but the log has no round-close of it",
    ),
    "an export of another adapter": (
        [play(1), lambda w: w.say(w.export("flu", 1, adapter=digest("x")))],
        "exported adapter of round 1: expected",
    ),
}


def remember(world: World, opened: str) -> None:
    world.note = opened


def seen(world: World, size: int) -> SeenCheckpoint:
    return SeenCheckpoint(size=size, root=world.roots[size].hex())


def privacy_of(world: World) -> Privacy:
    opened = world.said[1][0]
    assert isinstance(opened, RunOpen)
    assert opened.privacy is not None
    return opened.privacy


@pytest.mark.parametrize("name", RULES)
def test_a_statement_that_cannot_stand_there_is_found(name: str) -> None:
    steps, says = RULES[name]
    verdict = told(*steps)
    assert not verdict.ok
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(verdict.reason)
    # The wrong statement is the last one, and everything before it holds.
    assert told(*steps[:-1]).ok
    world = World()
    world.found()
    for step in steps:
        step(world)
    assert verdict.leaf == len(world.leaves) - 1


def test_the_genesis_comes_first() -> None:
    world = World()
    world.say(world.run_open("flu"))
    verdict = verify_bundle(lambda: world.leaves, world.checkpoint(), POLICY)
    assert (verdict.leaf, verdict.reason) == (
        0,
        "leaf 0 of the round log must be a statement of type genesis, found type run-open",
    )


def test_a_late_statement_and_a_round_opened_again_are_no_fault() -> None:
    late = [opens(1), *ALL[:2], closes(survivors=("berlin", "lyon"), failures={"oslo": "deadline"}), states("oslo")]
    assert told(*late, play(2)).ok
    assert told(opens(1), states("oslo"), aborts(), opens(2), *ALL, closes(), play(3)).ok
    same = told(play(1), opens(2), lambda w: states("oslo", ledger=resent(w))(w))
    assert same.ok, str(same)


def test_a_plain_round_may_be_opened_again() -> None:
    world = World()
    world.say(world.genesis())
    world.say(world.run_open("flu", secure_aggregation="plain"))
    endings = (world.round_abort, lambda *which: world.round_close(*which, transcript=None))
    for ending in endings:
        opened = world.say(world.round_open("flu", 1, parameters=None))
        for site in ("berlin", "lyon", "oslo"):
            world.say(world.site_round(site, "flu", 1, opened), site)
        world.say(ending("flu", 1, opened))
    assert verify_bundle(lambda: world.leaves, world.checkpoint(), POLICY).ok


def test_a_site_without_a_limit_is_under_none() -> None:
    assert told(opens(1), states("oslo", charge=charge(epsilon=99.0, limit=None))).ok


def resent(world: World) -> LedgerHead:
    """Return the ledger of a site that sends a round's bytes again: nothing was added."""
    _, head = world.ledgers["oslo"]
    return LedgerHead(sequence=3, head=str(head), previous=head)


def test_members_come_and_go() -> None:
    world = World()
    world.found()
    world.say(Join(time=1, member=member("paris"), quorum=3))
    world.sites = (*world.sites, "paris")
    world.play("flu", 1)
    policy = world.policy
    assert policy.needed == 3
    assert verify_bundle(lambda: world.leaves, world.checkpoint(), policy).ok
    world.say(Revoke(time=2, site="lyon", key=public("lyon").hex(), reason="key-compromise", quorum=2))
    leaves, note = list(world.leaves), world.checkpoint(("berlin", "lyon", "oslo"))
    verdict = verify_bundle(lambda: leaves, note, policy)
    assert verdict.leaf is None
    assert "keys that are not revoked, found 2" in verdict.reason
    assert verify_bundle(lambda: leaves, world.checkpoint(("berlin", "oslo", "paris")), policy).ok
    opened = world.say(world.round_open("flu", 2, cohort=("berlin", "oslo")))
    world.say(world.site_round("lyon", "flu", 2, opened), "lyon")
    assert (
        "is not the current identity key of site lyon"
        in verify_bundle(lambda: world.leaves, world.checkpoint(), policy).reason
    )


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        (Join(time=1, member=member("oslo"), quorum=3), "is a member already"),
        (Join(time=1, member=member("oslo").model_copy(update={"site": "paris"}), quorum=3), "was used before"),
        (Join(time=1, member=member("paris"), quorum=2), "quorum: 2 of 4"),
        (Join(time=1, member=member("paris"), quorum=5), "quorum: 5 of 4"),
        (Revoke(time=1, site="paris", key=public("paris").hex(), reason="left", quorum=2), "no member has the name"),
        (Revoke(time=1, site="oslo", key=public("lyon").hex(), reason="left", quorum=2), "no member has the name"),
        (Revoke(time=1, site="oslo", key=public("oslo").hex(), reason="left", quorum=1), "quorum: 1 of 2"),
    ],
)
def test_membership_has_rules_too(statement: Statement, says: str) -> None:
    verdict = told(lambda world: world.say(statement))
    assert verdict.leaf == 2
    assert says in verdict.reason
    assert "is not the coordinator's key" in told(lambda world: world.say(statement, "oslo")).reason


def test_a_refused_statement_changes_nothing() -> None:
    """The coordinator asks the same rules before it appends, and goes on after a refusal."""
    world = World()
    world.found()
    for steps, _ in RULES.values():
        before = told(*steps[:-1])
        after = told(*steps)
        for name in ("members", "revoked", "quorum", "epsilon", "keys"):
            assert getattr(before.history, name) == getattr(after.history, name)
        assert {
            name: (run.published, run.adapter, run.next, run.open, run.ended)
            for name, run in before.history.runs.items()
        } == {
            name: (run.published, run.adapter, run.next, run.open, run.ended)
            for name, run in after.history.runs.items()
        }


def test_a_consortium_without_a_floor_leaves_it_to_the_sites() -> None:
    world = World()
    world.say(world.genesis(floor=StatedFloor()))
    world.say(world.run_open("flu", privacy=None, min_sites=1, secure_aggregation="plain"))
    assert verify_bundle(lambda: world.leaves, world.checkpoint(), POLICY).ok


# Proofs for one leaf


def test_one_leaf_is_proved_without_the_others() -> None:
    for index in (0, 7, 27):
        proof = prove_leaf(lambda: LEAVES, NOTE, POLICY, index)
        assert verify_leaf(proof, LEAVES[index], POLICY).size == 28
    with pytest.raises(ProtocolError, match="has no leaf 28"):
        prove_leaf(lambda: LEAVES, NOTE, POLICY, 28)
    with pytest.raises(VerificationError, match="do not belong to the checkpoint"):
        prove_leaf(lambda: LEAVES[:-1], NOTE, POLICY, 3)


def test_the_genesis_names_every_key_that_counts() -> None:
    document = json.loads(envelope.Envelope.decode(LEAVES[0]).payload)
    keys = {entry["witness"] for entry in document["predicate"]["members"]}
    assert keys == {witness_key(site).text for site in WORLD.sites}
    assert canonical_json(document) == envelope.Envelope.decode(LEAVES[0]).payload
