"""Authors who lie consistently: a statement is changed, signed by its author, and the whole log is made anew after it.

Whatever could be computed is computed, so the archive is refused; or the field is its author's word, and the table of
`privet.common.audit.fields` says so.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from privet.client.rounds import refusals
from privet.client.rounds.refusals import keep_refusal, kept_refusals, omitted_refusals, warn_of_omitted
from privet.common.audit import bundle
from privet.common.audit.accounts import Accounts, _gap
from privet.common.audit.bundle import Report, check_bundle, read_archive
from privet.common.audit.fields import FIELDS, MODELS, authors_word, markdown, table
from privet.common.audit.receipts import receipts_file
from privet.common.canonical import digest
from privet.common.errors import VerificationError
from privet.common.log import note
from privet.common.log.agreement import keys_digest
from privet.common.log.checkpoint import Checkpoint, Policy
from privet.common.log.envelope import Envelope, sign_envelope
from privet.common.log.merkle import leaf_hash
from privet.common.log.note import Note, NoteKey
from privet.common.log.replay import Leaf
from privet.common.log.statements import (
    Charge,
    Genesis,
    Join,
    Mechanism,
    Privacy,
    Refusal,
    RoundOpened,
    SiteRound,
    Statement,
)
from privet.common.privacy.accounting import PrivacyEvent, epsilon, plan
from tests.conftest import Run
from tests.support.lies import (
    PRIVATE,
    Archive,
    archive_of,
    changed,
    instead,
    key_of,
    relogged,
    rotated_of,
    told_instead,
    unreleased,
    value_at,
)
from tests.support.log_world import MECHANISM, ORIGIN, World, member, private, public
from tests.support.logged_world import world_of
from tests.support.masked_world import masked_study
from tests.support.secagg_world import identity

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return archive_of(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def rotated(archive: Archive) -> Archive:
    return rotated_of(archive)


CASES = [(kind, name) for kind, fields in FIELDS.items() for name, how in fields.items() if not how.word]


def escapes(archive: Archive, kind: str, path: str, most: int) -> list[Any]:
    """Return values of a field that a verification accepts in place of the true one."""
    found = []
    tried = 0
    archive = archive if kind in ("export", "adapter-state") else unreleased(archive)
    places = [n for n, (each, _) in enumerate(archive.said) if each.type == kind]
    for at in places:
        for value in instead(value_at(archive.said[at][0], path)):
            false = changed(archive.said[at][0], path, value)
            if false is None:
                continue
            tried += 1
            if told_instead(archive, at, false).ok:
                found.append((at, value))
            if tried >= most:
                return found
    return found


def test_the_archive_made_anew_without_a_lie_verifies(archive: Archive) -> None:
    report = check_bundle(relogged(archive, archive.said), archive.policy)
    assert report.ok, report
    assert {each.type for each, _ in archive.said} == FIELDS.keys() - {"rotate"}


@pytest.mark.parametrize("kind", FIELDS)
def test_a_lie_about_a_field_is_refused_or_the_field_is_its_authors_word(
    archive: Archive, rotated: Archive, kind: str
) -> None:
    archive = rotated if kind == "rotate" else archive
    found = {name: escapes(archive, kind, name, 8) for of, name in CASES if of == kind}
    assert {name: values for name, values in found.items() if values} == {}


# Fields that nothing contradicts in this archive, whose author may say what it likes: so lies do get as far as this.
# The consortium's name is one where no member has renewed its keys: they sign it.
BELIEVED = {
    "genesis": {"time", "floor.min_sites", "floor.max_epsilon"},
    "join": {"time", "quorum"},
    "revoke": {"time", "reason"},
    "renew": {"time"},
    "rotate": {"time", "charter"},
    "run-open": {"time"},
    "round-open": {"time", "nonce"},
    "site-round": {"time", "policy", "upload", "charge.limit", "charge.epsilon", "commitments"},
    "round-close": {"time", "metrics"},
    "round-abort": {"time", "reason", "failures"},
    "refusal": {"time", "code", "rule", "asked", "allowed", "policy", "round"},
    "export": {"time"},
    "adapter-state": {"time", "reason"},
    "egress-review": {"time", "test", "canaries.planted", "canaries.guesses", "canaries.right"},
    "egress-decision": {"time"},
}


@pytest.mark.parametrize("kind", FIELDS)
def test_a_lie_that_nothing_contradicts_is_believed_and_listed(archive: Archive, rotated: Archive, kind: str) -> None:
    archive = rotated if kind == "rotate" else archive
    assert authors_word().keys() == BELIEVED.keys()
    assert set(authors_word()[kind]) >= BELIEVED[kind]
    assert {name for name in BELIEVED[kind] if not escapes(archive, kind, name, 8)} == set()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_no_value_of_a_field_that_is_checked_can_be_another(
    archive: Archive, rotated: Archive, kind: str, name: str
) -> None:
    assert escapes(rotated if kind == "rotate" else archive, kind, name, 60) == []


@pytest.mark.parametrize("name", [*FIELDS["genesis"], *FIELDS["join"]])
def test_a_rotation_hides_no_lie_about_what_is_before_or_after_it(rotated: Archive, name: str) -> None:
    for kind in ("genesis", "join"):
        if name in FIELDS[kind] and not FIELDS[kind][name].word:
            assert escapes(rotated, kind, name, 8) == []


def test_without_a_rotation_the_genesis_names_the_log_of_the_policy(archive: Archive) -> None:
    genesis, _ = archive.said[0]
    false = changed(genesis, "log", NoteKey(ORIGIN, note.ED25519, public("other")).text)
    assert false is not None
    report = told_instead(archive, 0, false)
    assert "leaf 0 is not the genesis of that log" in report.verdict.reason


# --- attacks that worked ---------------------------------------------------------------------------------


def charged(archive: Archive, **changes: Any) -> Report:
    """Return the verdict on an archive where one site states another charge in every round, numbered from 1."""
    said, number = [], 0
    for each, author in archive.said:
        if isinstance(each, SiteRound) and each.charge is not None and each.site == "site-0001":
            number += 1
            new = {name: value(number) if callable(value) else value for name, value in changes.items()}
            each = each.model_copy(update={"charge": each.charge.model_copy(update=new)})
        said.append((each, author))
    return check_bundle(relogged(archive, said), archive.policy)


def test_rounds_at_epsilon_nothing_with_a_new_account_each_are_found(archive: Archive) -> None:
    report = charged(archive, epsilon=0.0, account=lambda n: digest(b"%d" % n))
    assert (report.holds, report.verdict.leaf) == (False, archive.first("site-round", lambda s: s.site == "site-0001"))  # type: ignore[union-attr]
    assert "cost epsilon" in report.verdict.reason


def test_a_new_account_each_round_is_found_though_each_pays_for_its_round(archive: Archive) -> None:
    report = charged(archive, account=lambda n: digest(b"%d" % n))
    assert "a site has one account in a run" in report.verdict.reason


def test_an_account_that_changes_with_its_delta_pays_for_the_whole_run(archive: Archive) -> None:
    new = {"account": lambda n: digest(b"%d" % n), "delta": lambda n: 1e-5 / n}
    cost = next(cost for cost in check_bundle(archive.files, archive.policy).costs if cost.site == "site-0001")
    assert "states" in charged(archive, epsilon=lambda n: cost.computed * 0.7, **new).verdict.reason
    report = charged(archive, epsilon=20.0, **new)
    assert report.ok, report
    assert [each.rounds for each in report.costs if each.site == "site-0001"] == [1, 2]
    assert report.together["site-0001"] > cost.computed
    assert "says that its accounts are of different people" in str(report)
    # The site charged more than it stated: for a round that was aborted, or for another log. The audit cannot know.
    assert "also counts rounds that are not stated in this log: rounds that it began and that were aborted" in str(
        report
    )


def test_an_account_that_pays_for_other_studies_states_more_and_never_less(archive: Archive) -> None:
    assert charged(archive, epsilon=lambda n: 9.0).ok
    mechanism = plan(masked_study(training={"rounds": 3}, privacy=PRIVATE))
    assert mechanism is not None
    assert not charged(archive, epsilon=lambda n: mechanism.spent(n) * 0.9999).ok
    assert charged(archive, epsilon=lambda n: mechanism.spent(n) * (1 - 1e-9)).ok


@pytest.mark.parametrize("held", [True, False])
def test_several_runs_of_an_account_add_up(held: bool) -> None:
    cost = epsilon([PrivacyEvent.parse(MECHANISM.model_dump())] * 2, 1e-5)
    world, accounts = World(sites=("berlin", "lyon")), Accounts()
    world.say(world.genesis())
    for run, stated in (("flu", cost), ("copd", cost * (1 if held else 0.999))):
        world.say(world.run_open(run, rounds=2))
        opened = world.say(world.round_open(run, 1))
        given = Charge(
            account=digest(b"account"),
            training=MECHANISM,
            validation=None,
            delta=1e-5,
            epsilon=stated,
            limit=None,
        )
        world.say(world.site_round("berlin", run, 1, opened, charge=given), "berlin")

    def observe() -> None:
        for number, (statement, _) in enumerate(world.said):
            accounts.observe(Leaf(number, f"sha256:{leaf_hash(world.leaves[number]).hex()}", b""), statement)

    if held:
        return observe()
    with pytest.raises(VerificationError, match="the mechanisms of the 2 statements of account"):
        observe()
    return None


@pytest.mark.parametrize(("numbers", "draws"), [((1, 2), 1), ((1, 3), 2), ((1, 2, 3, 4), 2), ((2, 4, 5, 6), 3)])
def test_rounds_of_correlated_noise_are_counted_by_class(numbers: tuple[int, ...], draws: int) -> None:
    event = PrivacyEvent(2.0, 0.5, 1, "record", True, 2)
    mechanism = Mechanism.model_validate(event.document())
    cost = epsilon([event] * draws, 1e-5)
    promise = Privacy(
        epsilon=8.0, delta=1e-5, clip_norm=1.0, accountant="prv opacus 1.6.0", training=mechanism, validation=None
    )
    for lower, held in ((1.0, True), (0.99, False)):
        world, accounts = World(sites=("berlin", "lyon")), Accounts()
        world.say(world.genesis())
        world.say(world.run_open("flu", rounds=6, privacy=promise))
        for number in numbers:
            opened = world.say(world.round_open("flu", number))
            stated = cost * lower if number == numbers[-1] else cost
            given = Charge(
                account=digest(b"a"), training=mechanism, validation=None, delta=1e-5, epsilon=stated, limit=None
            )
            world.say(world.site_round("berlin", "flu", number, opened, charge=given), "berlin")
            paid = [event] * event.counted_rounds(numbers[: numbers.index(number) + 1])
            costs = dict.fromkeys(("berlin", "lyon"), epsilon(paid, 1e-5))
            world.say(world.round_close("flu", number, opened, epsilon=costs))
        leaves = [Leaf(n, f"sha256:{leaf_hash(data).hex()}", b"") for n, data in enumerate(world.leaves)]
        for leaf, (statement, _) in zip(leaves, world.said, strict=True):
            if held or not (isinstance(statement, SiteRound) and statement.round == numbers[-1]):
                accounts.observe(leaf, statement)
            else:
                with pytest.raises(VerificationError, match="the mechanisms of the"):
                    accounts.observe(leaf, statement)
                break
        if held:
            accounts.finish()
            assert [each.computed for each in accounts.costs()] == [cost]


def test_a_long_run_is_computed_at_few_places_and_at_its_end() -> None:
    assert [_gap(count) for count in (1, 255, 256, 511, 512, 10_000)] == [1, 1, 2, 2, 4, 64]


# Policies


def with_keys(policy: Policy, strangers: int, needed: int) -> Policy:
    """Return a policy where keys of the coordinator stand in for the last witnesses."""
    kept = policy.witnesses[: len(policy.witnesses) - strangers]
    own = [NoteKey(key.name, key.kind, public(f"other {key.name}")) for key in policy.witnesses[len(kept) :]]
    return Policy(policy.log, (*kept, *own), needed)


def cosigned_by(archive: Archive, policy: Policy, others: str = "other") -> dict[str, bytes]:
    """Return the archive's log with a checkpoint that the witnesses of this policy cosigned."""
    head = Checkpoint.parse(note.parse_note(archive.files["checkpoint"]).text)
    lines = [note.sign_note(head.text, ORIGIN, private("log"))]
    for key in policy.witnesses:
        owned = key in archive.policy.witnesses
        signer = private(f"witness {key.name}" if owned else f"{others} {key.name}")
        lines.append(note.cosign(head.text, key.name, signer, 1))
    return archive.files | {"checkpoint": Note(head.text, tuple(lines)).encode()}


@pytest.mark.parametrize("strangers", [1, 2, 3, 4])
def test_a_policy_of_keys_that_no_member_ever_had_is_refused(archive: Archive, strangers: int) -> None:
    policy = with_keys(archive.policy, strangers, 3)
    report = check_bundle(cosigned_by(archive, policy), policy)
    assert not report.holds
    assert "no member of the log ever had this cosigning key" in report.verdict.reason


def test_a_policy_of_one_member_does_not_stand_for_the_quorum_of_the_log(archive: Archive) -> None:
    alone = Policy(archive.policy.log, archive.policy.witnesses[:1], 1)
    report = check_bundle(cosigned_by(archive, alone), alone)
    assert "needs cosignatures of 3 members, as the log states, found 1" in report.verdict.reason
    assert check_bundle(archive.files, alone).ok  # where the others cosigned too


@pytest.mark.parametrize("own", ["log", "coordinator"])
def test_the_coordinator_is_not_its_own_witness(archive: Archive, own: str) -> None:
    genesis = archive.said[0][0]
    assert isinstance(genesis, Genesis)
    document = json.loads(genesis.model_dump_json())
    document["members"][0]["witness"] = NoteKey("site-0000", 4, public(own)).text
    with pytest.raises(ValueError, match="one purpose and one owner"):
        Genesis.model_validate_json(json.dumps(document))
    joins = archive.said[archive.first("join")][0]
    assert isinstance(joins, Join)
    false = joins.model_copy(
        update={"member": member("zealand").model_copy(update={"witness": NoteKey("zealand", 4, public(own)).text})}
    )
    report = told_instead(archive, archive.first("join"), false)
    assert "was used before in this round log" in report.verdict.reason


# Files


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("README", "README"),
        ("log.policy", "log.policy"),
        ("study.json.bak", "study.json.bak"),
        ("rounds/evil.json", "rounds/"),
        ("release/x", "release/"),
        ("proofs/000099-export.tlog-proof", "proofs/"),
        ("tile/0/001", "tile/0/001"),
        ("tile/entries/x001/000", "tile/entries/x001/000"),
        ("tile/0/000.p/5", "tile/0/000.p/5"),
        ("tile/note.txt", "tile/note.txt"),
    ],
)
def test_a_file_that_has_no_place_is_refused_and_named(archive: Archive, name: str, where: str) -> None:
    report = check_bundle({**archive.files, name: b"{}"}, archive.policy)
    assert (report.holds, report.where) == (False, where)


def test_every_file_is_needed_and_every_byte_of_it(archive: Archive) -> None:
    for name in archive.files:
        rest = {other: data for other, data in archive.files.items() if other != name}
        without = check_bundle(rest, archive.policy)
        assert not without.ok or name == "release/adapter_model.safetensors", name
        changed_file = check_bundle({**archive.files, name: archive.files[name] + b"\n"}, archive.policy)
        assert not changed_file.holds or name.endswith(".json"), name  # a line may end


def test_a_log_alone_is_no_verified_run(archive: Archive, tmp_path: Path, privet: Run) -> None:
    only = {name: data for name, data in archive.files.items() if name == "checkpoint" or name.startswith("tile/")}
    bundle.write_archive(tmp_path / "log.tar", only)
    (tmp_path / "policy").write_text(archive.policy.text)
    code, out, _ = privet("audit", "verify", tmp_path / "log.tar", "--policy", tmp_path / "policy")
    assert (code, out.splitlines()[0].split(":")[0]) == (7, "LOG ALONE")
    assert "not checked: study, software, statements and release of: run run" in out
    code, out, _ = privet("audit", "verify", tmp_path / "log.tar", "--policy", tmp_path / "policy", "--json")
    document = json.loads(out)
    assert (code, document["ok"], document["verdict"]) == (7, False, "log-alone")
    assert document["fields"] == table()


def test_another_digest_of_keys_is_refused(archive: Archive) -> None:
    at = archive.first("round-open")
    opened = archive.said[at][0]
    assert isinstance(opened, RoundOpened)
    keys = {site: identity(int(site[-4:])).key.public_key().public_bytes_raw().hex() for site in opened.cohort}
    assert opened.parameters == keys_digest(keys)
    false = opened.model_copy(update={"parameters": keys_digest(keys | {"site-0001": public("mallory").hex()})})
    assert "digest of the cohort's identity keys" in told_instead(archive, at, false).verdict.reason


# Refusals


def receipts_of(archive: Archive, tmp_path: Path, site: str = "site-0001", **changes: Any) -> Path:
    refusal = archive.said[archive.first("refusal", lambda each: getattr(each, "site", "") == site)][0]
    signed = sign_envelope(refusal.model_copy(update=changes), key_of(site))
    (tmp_path / "receipts.json").write_bytes(receipts_file(site, [signed]))
    return tmp_path / "receipts.json"


def audited(privet: Run, folder: Path, files: dict[str, bytes], policy: Policy, receipts: Path) -> tuple[int, str]:
    bundle.write_archive(folder / "run.tar", files)
    (folder / "policy").write_text(policy.text)
    code, out, err = privet(
        "audit", "verify", folder / "run.tar", "--policy", folder / "policy", "--receipts", receipts, "--json"
    )
    return code, out or err


@pytest.mark.parametrize(
    ("kind", "spoiled", "why"),
    [
        ("round-close", ("site-0000",), "a survivor is said"),
        ("round-close", ("site-0000", "site-0001"), "a survivor is said"),
        ("round-close", (), "had no such sum"),
        ("round-abort", ("site-0000", "site-0001"), "had no such sum"),
    ],
)
def test_no_sum_is_said_to_be_spoiled_that_the_round_did_not_have(
    archive: Archive, kind: str, spoiled: tuple[str, ...], why: str
) -> None:
    """Attack: the coordinator names one honest site as the whole of a spoiled sum, and has it left out for it."""
    at = archive.first(kind)
    false = archive.said[at][0].model_copy(update={"spoiled": (spoiled,)})
    report = told_instead(archive, at, false)
    assert why in report.reason + report.verdict.reason


def test_a_refusal_in_the_log_is_found_there(archive: Archive, tmp_path: Path, privet: Run) -> None:
    code, out = audited(privet, tmp_path, archive.files, archive.policy, receipts_of(archive, tmp_path))
    assert code == 0, out
    assert json.loads(out)["receipts"] == {"site": "site-0001", "logged": 1, "omitted": [], "later": []}


def test_a_refusal_that_was_left_out_is_proved_by_its_receipt(archive: Archive, tmp_path: Path, privet: Run) -> None:
    receipt = receipts_of(archive, tmp_path, round=3)  # the log has none of round 3
    code, out = audited(privet, tmp_path, archive.files, archive.policy, receipt)
    document = json.loads(out)
    assert (code, document["verdict"], document["where"]) == (1, "failed", "receipts")
    assert "run run, round 3 (E_REFUSED)" in document["reason"]


def test_a_refusal_that_the_log_has_not_come_to_proves_nothing(archive: Archive, tmp_path: Path, privet: Run) -> None:
    receipt = receipts_of(archive, tmp_path, run="later")
    code, out = audited(privet, tmp_path, archive.files, archive.policy, receipt)
    assert (code, json.loads(out)["receipts"]["later"]) == (0, ["run later, round 2 (E_REFUSED)"])


@pytest.mark.parametrize("damage", ["not json", "another's", "no refusal"])
def test_false_receipts_prove_nothing(archive: Archive, tmp_path: Path, privet: Run, damage: str) -> None:
    path = receipts_of(archive, tmp_path)
    if damage == "not json":
        path.write_bytes(b"{")
    elif damage == "another's":
        refusal = archive.said[archive.first("refusal")][0]
        path.write_bytes(receipts_file("site-0003", [sign_envelope(refusal, key_of("site-0001"))]))
    else:
        path.write_bytes(receipts_file("site-0001", [sign_envelope(archive.said[0][0], key_of("site-0001"))]))
    code, out = audited(privet, tmp_path, archive.files, archive.policy, path)
    assert (code, json.loads(out)["message"][:16]) == (2, "could not check:")


def test_a_site_keeps_its_refusals_and_looks_for_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 2}), 4)
    site = next(iter(world.sites.values()))
    site.refuses_rounds = (2,)
    world.play()
    folder = tmp_path / site.name
    ((kept, envelope),) = kept_refusals(folder)
    assert (kept.run, kept.round, Envelope.decode(envelope).key) == (
        "run",
        2,
        identity(0).key.public_key().public_bytes_raw(),
    )
    verdict, _ = bundle.history_of(read_archive(tmp_path / "run" / "public"), world.policy)
    assert omitted_refusals(folder, verdict.history) == []
    warn_of_omitted(folder, verdict.history)
    assert caplog.messages == []
    # A coordinator that has the site refuse many runs of which the log has none does not crowd the true one out.
    monkeypatch.setattr(refusals, "_MOST", 6)
    for number in range(5):
        keep_refusal(folder, kept.model_copy(update={"run": f"junk-{number}"}), envelope_of(kept, number))
    assert len(list((folder / "refusals").iterdir())) == 6
    del verdict.history.refusals[site.name, "run", 2]
    warn_of_omitted(folder, verdict.history)
    assert "run run, round 2 (E_REFUSED)" in caplog.messages[0]
    assert [each.run for each, _ in kept_refusals(folder)] == ["run"]


def envelope_of(refusal: Refusal, number: int) -> bytes:
    return sign_envelope(refusal.model_copy(update={"run": f"junk-{number}"}), key_of("site-0001"))


# --- the table -------------------------------------------------------------------------------------------


def paths(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        part = part_of(field.annotation)
        if part is None:
            yield name
        else:
            yield from (f"{name}.{path}" for path in paths(part))


def part_of(annotation: Any) -> type[BaseModel] | None:
    """Return the model inside an annotation; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        return next((found for each in get_args(annotation) if (found := part_of(each))), None)
    return None


def test_the_table_has_every_field_of_every_statement() -> None:
    assert {model.model_fields["type"].default: model for model in get_args(Statement)} == MODELS
    for kind, model in MODELS.items():
        assert sorted(FIELDS[kind]) == sorted(paths(model)), kind
    assert all(how.checked or how.word for fields in FIELDS.values() for how in fields.values())
    assert all("time" in words for words in authors_word().values())
    assert table()["refusal"]["time"] == "author's word: the author's clock"


def test_the_documentation_shows_the_table() -> None:
    assert markdown() in (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
