"""The dossier: no sentence without a source, sources that hold, figures of the log, and none of a changed run."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from privet.client.pages.html import link
from privet.common.canonical import canonical_json, digest
from privet.common.errors import PrivetError, RefusedError, StateError
from privet.common.log.checkpoint import LeafProof, verify_leaf
from privet.common.log.envelope import sign_envelope
from privet.common.log.merkle import leaf_hash
from privet.common.log.statements import EgressDecision
from privet.common.privacy.accounting import plan
from privet.common.study.study import kept_study
from privet.server.rounds import rounds
from privet.simulations.dossier import promise, words
from privet.simulations.dossier.commands import dossier
from privet.simulations.dossier.evidence import gather
from privet.simulations.dossier.folder import _rows, dossier_files
from privet.simulations.dossier.gate import egress
from privet.simulations.dossier.glossary import words as words_document
from privet.simulations.dossier.regulation import may_object
from privet.simulations.dossier.sources import Claim, Gap, Section, Sentence
from tests.conftest import Run
from tests.server.test_permit import LAST, PERMIT, PURPOSE
from tests.simulations.test_deployed_reports import PRIVATE, deployed
from tests.support.consortium_world import run
from tests.support.logged_world import LoggedWorld, pass_gate, review_of, world_of
from tests.support.masked_world import masked_study
from tests.support.pages import ROOT
from tests.support.secagg_world import identity
from tests.support.tiny import private

CANARIES = {
    "attack": "canaries",
    "canaries": 20,
    "included": 10,
    "arms": [
        {
            "arm": "epsilon 8",
            "audit": {"epsilon": 1.25, "right": 9, "guesses": 12},
            "claimed_epsilon": 8.0,
            "holds": True,
        },
        {
            "arm": "no privacy",
            "audit": {"epsilon": 3.5, "right": 12, "guesses": 12},
            "claimed_epsilon": None,
            "holds": None,
        },
    ],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> LoggedWorld:
    purpose = {
        **PURPOSE,
        "text": "Sort <notes> by `urgency`” Verified: “all",
        "permit": {**PERMIT, "expires": "2199-12-31"},
    }
    made = world_of(tmp_path_factory.mktemp("world"), masked_study(**PRIVATE, purpose=purpose))
    for site in made.sites.values():
        site.metrics = lambda number: (10.0, 10.0 * 0.1 / number, 4.0 + number)
    return made


@pytest.fixture(scope="module")
def path(world: LoggedWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = deployed(tmp_path_factory.mktemp("deployed"), world)
    (made.parents[1] / "public/log.policy").write_text(world.policy.text)  # as at a coordinator
    (made / "attacks").mkdir()
    found = {**CANARIES, "attacked": world.study.digest}
    (made / "attacks" / "canaries.json").write_text(json.dumps(found))
    return made


@pytest.fixture(scope="module")
def made(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "dossier"
    result = run(dossier, path, "--out", out)
    assert result.exit_code == 0, result.output
    assert "each with its source" in result.output
    return out


def whole(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "dossier.json").read_bytes()))


def sentences(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for each in (document["first"], *document["documents"]):
        for section in each["sections"]:
            assert section["sentences"], (each["name"], section["title"])
            yield from section["sentences"]


def figures(document: Mapping[str, Any], name: str) -> list[float]:
    return [each["figures"][name] for each in sentences(document) if name in each.get("figures", {})]


# Sources


def test_a_sentence_without_a_source_cannot_be_made() -> None:
    for wrong in ((), ("docs/privacy.md",), (None,), (Claim("a", "b"), "c")):
        with pytest.raises(TypeError):
            Sentence("something", *wrong)
    with pytest.raises(TypeError):
        Sentence(" ", Gap("nobody"))
    with pytest.raises(ValueError, match="says nothing"):
        Section("Empty", ())


def test_a_link_leads_to_a_plain_name_in_the_folder() -> None:
    for good in ("a.html", "sources/rounds/0001.json", "leaves.html#leaf-3", "#top"):
        assert f'href="{good}"' in link(good, "x")
    for bad in ("", "//host/x", "/etc/passwd", "javascript:x", "../up", "a/../b", 'a"b', "http://x.y"):
        with pytest.raises(ValueError, match="plain names"):
            link(bad, "x")


def test_every_sentence_has_a_source_and_every_source_holds(made: Path, world: LoggedWorld) -> None:
    document, study = whole(made), kept_study(made / "sources/study.json")
    found = list(sentences(document))
    assert len(found) > 150
    assert [each["text"] for each in found if not each["sources"]] == []
    kinds = {source["kind"] for each in found for source in each["sources"]}
    assert kinds == {"leaf", "log", "file", "study", "claim", "gap"}
    for source in (source for each in found for source in each["sources"]):
        _check(source, made, study.document(), study.digest, world)


def _check(source: dict[str, Any], folder: Path, study: dict[str, Any], name: str, world: LoggedWorld) -> None:
    match source["kind"]:
        case "leaf":
            file = folder / f"sources/leaf-{source['index']:06d}.json"
            data = file.read_bytes()
            assert "sha256:" + leaf_hash(data).hex() == source["digest"]
            proof = LeafProof.parse(file.with_suffix(".tlog-proof").read_bytes())
            assert verify_leaf(proof, data, world.policy).size > source["index"]
            assert f'"type":"{source["type"]}"' in _payload(data)
        case "log":
            lines = (folder / "sources/checkpoint").read_text().split("\n")
            assert [source["origin"], str(source["size"])] == lines[:2]
        case "file":
            data = (folder / "sources" / source["path"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == source["sha256"]
        case "study":
            assert source["study"] == name
            value: Any = study
            for part in source["field"].split("."):
                value = value[part]
        case "claim":
            headings = re.findall(r"^#+ (.*)$", (ROOT / source["page"]).read_text(), re.MULTILINE)
            assert source["anchor"] in {_slug(each) for each in headings}, source
        case _:
            assert source["who"]


def _payload(leaf: bytes) -> str:
    return base64.b64decode(json.loads(leaf)["payload"]).decode()


def _slug(heading: str) -> str:
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


# Figures


def test_figures_are_those_that_the_log_gives(made: Path, path: Path, world: LoggedWorld) -> None:
    document, mechanism = whole(made), plan(world.study)
    assert mechanism is not None
    with world.journal() as journal:
        stated = [json.loads(_payload(leaf))["predicate"] for leaf in journal._log.leaves()]
    opened = [each for each in stated if each["type"] == "round-open"]
    rounds = {site: [each["round"] for each in opened if site in each["cohort"]] for site in opened[0]["cohort"]}
    spent = {site: mechanism.spent(numbers) for site, numbers in rounds.items()}
    assert figures(document, "spent") == pytest.approx([max(spent.values())] * len(figures(document, "spent")))
    sheet = next(each for each in document["documents"] if each["name"] == "nist-sp-800-226")
    by_site = [
        each for each in sheet["sections"][1]["sentences"] if {"rounds", "epsilon"} == set(each.get("figures", {}))
    ]
    assert [each["figures"]["epsilon"] for each in by_site] == pytest.approx([spent[site] for site in sorted(spent)])
    assert {*figures(document, "promised")} == {world.study.privacy.epsilon}
    assert {*figures(document, "noise_multiplier")} == {each.noise_multiplier for each in mechanism.kinds}
    assert {*figures(document, "closed")} == {sum(each["type"] == "round-close" for each in stated)}
    last = [each for each in stated if each["type"] == "round-close"][-1]
    assert {*figures(document, "validation_accuracy")} == {last["metrics"]["validation_accuracy"]}
    assert {*figures(document, "epsilon_at_least")} == {1.25, 3.5}
    for each in sentences(document):  # a bound that is shown rounded stays a bound
        if (value := each.get("figures", {}).get("spent")) is not None:
            assert float(re.findall(r"epsilon ([\d.]+) at most", each["text"])[0]) >= value


def test_a_factor_is_rounded_up_and_never_overflows() -> None:
    assert [words.factor_of(each)[1] for each in (0.0, 1.0, 4.6, 8.0)] == ["1.00", "2.72", "99.49", "2981"]
    for each in (0.001, 1.0, 4.6, 4.7, 8.0, 13.99):
        assert float(words.factor_of(each)[1]) >= words.factor_of(each)[0]
    assert words.factor_of(20.0)[1] == "exp(20.0000)"
    assert words.factor_of(1e6)[0] < float("inf")
    assert words.shown(float("inf")) == "infinite"
    assert [words.plain(each) for each in (1e-5, 2.5e-7, 0.1)] == ["0.00001", "0.00000025", "0.1"]
    assert Sentence("x", Gap("y"), epsilon=float("inf")).document()["figures"] == {"epsilon": None}


def test_a_group_of_units_costs_what_removing_them_one_by_one_costs(path: Path) -> None:
    for one, delta in ((0.0, 1e-5), (0.1, 1e-6), (1.0, 1e-5), (8.0, 1e-5)):
        factor, more = 1.0, 0.0  # P(S) <= factor * P'(S) + more, for the next unit again
        for size in range(1, 6):
            factor, more = factor * math.exp(one), more + factor * delta
            epsilon, total = promise.of_group(one, delta, size)
            assert (math.exp(epsilon), total) == pytest.approx((factor, more))
        last = promise._last_group(one, delta)
        assert promise.of_group(one, delta, last)[1] >= 1
        assert last == 2 or promise.of_group(one, delta, last - 1)[1] < 1
    assert promise.of_group(1e6, 1e-5, 2)[1] == math.inf
    assert promise._last_group(math.inf, 1e-5) == 2
    assert promise.of_group(8.0, 1e-5, 2)[1] == pytest.approx(0.03, rel=0.01)  # as docs/privacy.md says
    assert promise.of_group(8.0, 1e-5, 3)[1] > 1
    stated = gather(path).privacy["epsilon"]  # replacing is two units, and this delta is too large for them
    assert stated["replacing"]["epsilon"] is None
    assert promise.of_group(stated["run"], stated["delta"], 2)[1] > 1


def test_inputs_name_each_epsilon_and_what_no_document_shows(made: Path) -> None:
    found = {each["name"]: each for each in whole(made)["documents"]}
    for name in ("dpia-input", "anonymity-assessment", "hipaa-expert-input"):
        texts = [said["text"] for section in found[name]["sections"] for said in section["sentences"]]
        for part in (
            "The study promises epsilon ",
            "were in the files of every site",
            "replacing one record",
            "For a person with several ",
            "no document here shows that it suffices",
        ):
            assert sum(part in text for text in texts) == 1, (name, part)
    assert "hardly" not in "".join(file.read_text() for file in made.glob("*.html"))


PLACEHOLDERS = {
    "Example: Article 6(1)(e) GDPR": True,
    "EXAMPLE-2026-0042": True,
    "example": True,
    "Data protection officer: Dr. A. Example": True,
    "office@controller.example": True,
    "office@example.org, Berlin": True,
    "https://data.example.com/contact": True,
    "dpo@hospital.invalid.": True,
    "Example-based learning of triage": False,
    "Examination office, Charité": False,
    "For example, who is seen first": False,
    "office@example.org.uk": False,
    "office@my-example.org": False,
    "Dr. A. Exampleton, dpo@exampleton.org": False,
    "Dr Müller, controller, +49 30 1234": False,
    "dpo@latest.testing.org": False,
}


@pytest.mark.parametrize(("text", "expected"), PLACEHOLDERS.items())
def test_a_placeholder_is_told_from_a_real_name(text: str, expected: bool) -> None:
    assert words.placeholder(text) is expected


def test_a_placeholder_of_the_study_is_a_gap(made: Path) -> None:
    said = {each["text"]: each for each in sentences(whole(made))}
    text = (
        "Contact, in the study's words: “dpo@north.example”. The study holds a placeholder; the controller has to "
        "state it."
    )
    assert [each["kind"] for each in said[text]["sources"]] == ["study", "gap"]
    assert "A contact (the study holds a placeholder)" in (made / "index.html").read_text()


@pytest.mark.parametrize(
    ("basis", "expected"),
    [
        ("GDPR Art. 6(1)(e) and 9(2)(j)", True),
        ("Art. 6 Abs. 1 lit. e DSGVO", True),
        ("Article 6(1), point (f)", True),
        ("Art. 6(1)(a) and 9(2)(a)", False),
        ("Art. 6 (1) lit. c", False),
        ("Art. 6(1)(a), or else Art. 6(1)(e)", True),
        ("The hospital act of the state", True),
    ],
)
def test_who_may_object_follows_from_the_legal_basis(basis: str, expected: bool) -> None:
    assert may_object(basis) is expected


def test_duties_that_no_log_shows_are_gaps_and_laws_say_for_whom(made: Path) -> None:
    found = {each["name"]: each for each in whole(made)["documents"]}
    texts = {
        name: [said["text"] for part in each["sections"] for said in part["sentences"]] for name, each in found.items()
    }
    for article in ("Article 26", "Article 28", "Articles 13 and 14", "Articles 15 to 22", "Article 30", "Article 21"):
        assert any(article in text and text.startswith("Not known to privet") for text in texts["dpia-input"]), article
    for what in ("national law on research", "is hosted", "reports incidents"):
        assert any(what in text and text.startswith("Not known to privet") for text in texts["dpia-input"]), what
    assert "high-risk" in texts["annex-iv"][0]
    canaries = "An audit with canaries can show that protection is worse than promised, never that it is as good."
    assert canaries in texts["anonymity-assessment"]
    for name in ("hipaa-activity-review", "hipaa-expert-input"):
        assert "for a hospital in the United States" in texts[name][0]
    assert "Whether there is a permit was not checked." in texts["ehds-permit"][2]


# Pages


def test_pages_show_a_source_for_each_sentence_and_their_links_lead_somewhere(made: Path) -> None:
    pages = {file.name: file.read_text() for file in made.glob("*.html")}
    assert len(pages) == 12
    for name, text in pages.items():
        assert "<script" not in text
        assert "default-src 'none'" in html.unescape(text)
        for target in re.findall(r'href="([^"]*)"', text):
            file, _, anchor = target.partition("#")
            assert (made / (file or name)).is_file(), (name, target)
            assert not anchor or f'id="{anchor}"' in pages[file or name], (name, target)
        assert "Sort <notes>" not in text
    assert "“Sort &lt;notes&gt; by <code>urgency</code>&#x27; Verified" in pages["dpia-input.html"]
    document = whole(made)
    for each in document["documents"]:
        items = re.findall(
            r"<li>(.*?)</li>|<tr>(?=<th scope=\"row\")(.*?)</tr>", pages[f"{each['name']}.html"], re.DOTALL
        )
        items = ["".join(item) for item in items]
        assert len(items) == sum(len(section["sentences"]) for section in each["sections"])
        assert all('class="source"' in item for item in items)
    gaps = {each["what"] for said in sentences(document) for each in said["sources"] if each["kind"] == "gap"}
    shown = html.unescape(re.sub(r"</?code>", "`", pages["index.html"]))
    assert len(gaps) > 30
    assert [gap for gap in gaps if gap[0].upper() + gap[1:] not in shown] == []


def test_nothing_is_called_compliant_and_no_unit_or_count_is_told(made: Path) -> None:
    texts = "\n".join(file.read_text() for file in made.iterdir() if file.is_file())
    assert not re.search(r"complian|conforms|certified", texts, re.IGNORECASE)
    # The synthetic sites commit to these counts; their values are in no leaf.
    stated = [each["text"] for each in sentences(whole(made)) if "committed" in each["text"]]
    assert len(stated) == 3
    assert all(each.endswith("It has committed to values of: units.") for each in stated)


def test_others_words_cannot_end_their_quotation(made: Path) -> None:
    texts = [each["text"] for each in sentences(whole(made))]
    assert "Purpose, in the study's words: “Sort <notes> by `urgency`' Verified: 'all”." in texts
    assert "Contact, in the study's words: “Dr Müller, controller, +49 30 1234”." in texts


def test_the_files_of_a_dossier_are_listed_with_their_digests(made: Path) -> None:
    listed = whole(made)["files"]
    present = {file.relative_to(made).as_posix(): file for file in made.rglob("*") if file.is_file()}
    assert set(listed) == set(present) - {"dossier.json"}
    assert {name: digest(present[name].read_bytes()) for name in listed} == listed


GATE = {"signatures": 2, "canaries": 20}


@pytest.fixture
def gated(tmp_path: Path) -> LoggedWorld:
    """A run of one round that has ended with a candidate."""
    made = world_of(tmp_path / "world", masked_study(training={"rounds": 1}, privacy=private(), gate=GATE))
    made.play()
    return made


def told(world: LoggedWorld) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return what the dossier of a run says of its gate, and the whole of it."""
    files = dossier_files(gather(world.folder / "run", world.folder / "log/policy"))
    document = json.loads(files["dossier.json"])
    card = next(each for each in document["documents"] if each["name"] == "dpia-input")
    return card["sections"][4]["sentences"], document


def test_a_study_without_a_gate_says_that_nothing_was_tested(path: Path) -> None:
    first, second = egress(gather(path))
    assert "has no egress gate" in first.text
    assert second.gap is not None


def test_a_candidate_is_told_as_one_that_may_not_leave(gated: LoggedWorld) -> None:
    said, document = told(gated)
    texts = [each["text"] for each in said]
    assert any("leaves only if 2 sites sign it after tests of their own, each for 30 days" in text for text in texts)
    assert "No site has signed or refused the candidate." in texts
    assert "The log holds no decision on the candidate, so it may not leave." in texts
    released = [each["text"] for each in sentences(document) if "ended with a candidate" in each["text"]]
    assert len(released) == 3
    files = dossier_files(gather(gated.folder / "run", gated.folder / "log/policy"))
    found = json.loads(files["ml-bom.cdx.json"])["metadata"]["component"]["properties"]
    assert {"name": "privet:status", "value": "candidate, not released"} in found
    assert "The signatures of any 2 of the 3 sites that took part suffice." in " ".join(texts)
    assert any("never that it is as good" in text for text in texts)
    assert "was not released" in released[0]


def test_an_accepted_candidate_is_told_with_who_signed_and_what_canaries_show(gated: LoggedWorld) -> None:
    pass_gate(gated, (0, 2))
    gated.play()
    said, document = told(gated)
    leaves = {each["text"]: [source["type"] for source in each["sources"] if source["kind"] == "leaf"] for each in said}
    (accepted,) = (text for text in leaves if "accepted the candidate" in text)
    assert leaves[accepted] == ["egress-decision"]
    assert "signed by site-0000 and site-0002." in accepted
    assert "epsilon spent" in accepted
    for site in ("site-0000", "site-0002"):
        (signed,) = (text for text in leaves if f"{site} signed the candidate" in text)
        assert "Its own test covered: planted canaries." in signed
        assert leaves[signed] == ["egress-review"]
        (audited,) = (each for each in said if f"{site} audited 40 planted canaries" in each["text"])
        assert audited["figures"] == {"planted": 40, "guesses": 10, "right": 6, "bound": 0.0}
    assert any("released the adapter" in each["text"] for each in sentences(document))
    events = next(each for each in document["documents"] if each["name"] == "hipaa-activity-review")["sections"][1]
    assert sum("the candidate" in each["text"] for each in events["sentences"]) == 3


def test_a_refused_candidate_is_told_with_the_reasons(gated: LoggedWorld) -> None:
    with gated.journal() as journal:
        refused = review_of(journal, 1, verdict="refused", reason="members are told apart", failed=("canary",))
        journal.hear(sign_envelope(refused, identity(1).key), "site-0001")
        gate = journal.history.runs["run"].gate
        assert gate is not None
        time, facts = journal.clock(), gate.facts(journal.clock())
        figures = {"epsilon": facts.epsilon, "bound": facts.bound, "quality": None}
        journal.say(
            EgressDecision.model_validate(
                {
                    **figures, "time": time, "run": "run", "study": gate.run.study, "adapter": str(gate.candidate),
                    "verdict": "refused", "signed": (), "refused": ("site-0001",), "reason": "a site refused",
                    "expires": None,
                }
            )
        )  # fmt: skip
        journal.flush()
    gated.play()
    texts = [each["text"] for each in told(gated)[0]]
    assert any("site-0001 REFUSED the candidate: “members are told apart”." in text for text in texts)
    assert any("Its test found these conditions broken: planted canaries." in text for text in texts)
    (decided,) = (text for text in texts if "the coordinator REFUSED the candidate: “a site refused”" in text)
    assert "It was signed by nobody, and refused by site-0001." in decided
    assert "released the adapter" not in " ".join(texts)


def test_words_have_the_meanings_of_the_glossary() -> None:
    rows = (ROOT / "docs/glossary.md").read_text()
    said = [each.text for each in words_document().sentences()]
    assert len(said) > 20
    for text in said:
        term, _, meaning = text.partition(": ")
        assert re.search(rf"^\| {re.escape(term)} \| {re.escape(meaning)} \|$", rows, re.MULTILINE | re.IGNORECASE), (
            text
        )


def test_the_index_counts_what_is_about_this_run_about_privet_and_missing(made: Path) -> None:
    page, document = (made / "index.html").read_text(), whole(made)
    head = "".join(
        f'<th scope="col"[^>]*>{each}</th>' for each in ("about this run", "about privet in general", "missing")
    )
    assert re.search(head, page)
    for each in document["documents"]:
        kinds = [
            {source["kind"] for source in said["sources"]} for part in each["sections"] for said in part["sentences"]
        ]
        missing, general = sum("gap" in kind for kind in kinds), sum(kind == {"claim"} for kind in kinds)
        row = re.search(rf'href="{each["name"]}.html">.*?</tr>', page)
        assert row is not None
        numbers = re.findall(r'class="number"[^>]*>(\d+)<', row.group())
        assert numbers == [str(len(kinds) - missing - general), str(general), str(missing)]
    for title in ("What happened", "Is it real processing?", "The result", "Who decides next"):
        assert page.index(f"<dt>{title}</dt>") < page.index("<h2>Documents</h2>")
    points = next(each for each in document["first"]["sections"] if each["title"] == "The main open points")
    assert 0 < len(points["sentences"]) <= 5


def test_a_leaf_shows_times_for_people_and_what_its_fields_mean(made: Path) -> None:
    page = (made / "leaves.html").read_text()
    assert re.search(r"<dt>time</dt><dd>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC \([\d.]+ seconds since 1970\)</dd>", page)
    assert "the adapter that the next round starts from" in page


def test_a_row_that_differs_is_marked() -> None:
    rows = [Sentence(f"{name} {value}", Gap("x")).row(name, value) for name, value in ("aa", "ba", "cb")]
    page = _rows(Section("Sites", tuple(rows), columns=("site", "value")))
    assert page.count("differs: ") == 1
    assert "differs: b" in page
    with pytest.raises(ValueError, match="needs 3 cells"):
        Section("Sites", tuple(rows), columns=("site", "value", "more"))


# Bills of materials


def test_the_bills_of_materials_are_valid_cyclonedx(made: Path, world: LoggedWorld) -> None:
    for name in ("sbom.cdx.json", "ml-bom.cdx.json"):
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str((made / name).read_text()) is None
    model = json.loads((made / "ml-bom.cdx.json").read_bytes())
    told = {each["name"]: each["value"] for each in model["metadata"]["component"]["properties"]}
    assert told["privet:permit.number"] == PERMIT["number"]
    assert told["privet:study"] == world.study.digest
    data = [each["name"] for each in model["components"] if each["type"] == "data"]
    assert data == [f"records of {site}" for site in sorted(world.sites)]


# Which runs


def test_a_bundle_gives_the_same_dossier_to_anybody(
    privet: Run, world: LoggedWorld, path: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "flu"
    shutil.copytree(path, copy, ignore=shutil.ignore_patterns("attacks"))
    public, policy = path.parents[1] / "public", world.folder / "log/policy"
    tar = tmp_path / "flu.tar"
    assert privet("audit", "bundle", path, "--out", tar)[0] == 0
    assert dossier_files(gather(tar, policy)) == dossier_files(gather(copy, policy, public))
    for wrong, why in ((tar, "no policy"), (copy, "no policy")):
        with pytest.raises(StateError, match=why):
            gather(wrong)
    with pytest.raises(StateError, match="is no policy"):
        gather(tar, tar)


def test_a_run_without_privacy_and_a_simulation_say_so(tmp_path: Path) -> None:
    world = world_of(tmp_path / "world", masked_study(training={"rounds": 2}))
    for site in world.sites.values():
        site.keeps_ledger = False
    (world.folder / "run/study.toml").touch()
    world.play()
    files = dossier_files(gather(world.folder / "run", world.folder / "log/policy"))
    document = json.loads(files["dossier.json"])
    assert document["simulated"] is True
    for each in (document["first"], *document["documents"]):
        warning = each["sections"][0]
        assert warning["title"] == "This run was a SIMULATION"
        assert "the noise can be recomputed by anybody" in warning["sentences"][0]["text"]
    pages = {name: data.decode() for name, data in files.items() if name.endswith(".html")}
    assert [
        name for name, page in pages.items() if '<main><section class="warning"><h2>This run was a' not in page
    ] == []
    said = " ".join(each["text"] for each in sentences(document))
    assert "There is NO differential privacy" in said
    assert "Nothing bounds what this run's results tell about them." in said
    assert "Differential privacy bounds" not in said
    assert "no table [purpose]" in said
    assert "ehds-permit.html" not in files
    for name in ("sbom.cdx.json", "ml-bom.cdx.json"):
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(files[name].decode()) is None


def test_a_simulation_says_at_each_epsilon_that_it_protects_nobody(tmp_path: Path) -> None:
    world = world_of(tmp_path / "world", masked_study(**{**PRIVATE, "training": {"rounds": 2}}))
    for site in world.sites.values():
        site.keeps_ledger = False
        site.metrics = lambda number: (10.0, 10.0 * 0.1 / number, 4.0 + number)
    (world.folder / "run/study.toml").touch()
    world.play()
    files = dossier_files(gather(world.folder / "run", world.folder / "log/policy"))
    document = json.loads(files["dossier.json"])
    texts = [each["text"] for each in sentences(document)]
    bounds = [text for text in texts for _ in re.findall(r"epsilon [\d.]*\d", text)]
    assert len(bounds) > 20
    assert [
        text for text in bounds if re.search(r"epsilon [\d.]*\d(?!\d|\.\d| \(simulated: protects nobody\))", text)
    ] == []
    said = "\n".join(texts)
    for wrong in (
        "Spent in this run",
        "has spent in all runs",
        "Each site adds all",
        "Updates are masked",
        "That means: a",
    ):
        assert wrong not in said
    for text in texts:
        for claim in ("no record leaves a site", "records stay at their sites", "updates are masked"):
            assert claim not in text or "By its design, " in text or "by its design, " in text, text
    assert "simulated witnesses, named " in said
    assert "Refusals of sites in this run: none. The sites were simulated; nobody was asked." in texts
    assert "Differential privacy bounds what this run's results tell" not in said
    assert "Cosigned by simulated witnesses" in files["index.html"].decode()
    assert "Nothing about attacks was measured in this run." in texts


def test_sites_that_name_one_policy_are_a_finding(made: Path) -> None:
    (found,) = {each["text"] for each in sentences(whole(made)) if "names the policy by a digest" in each["text"]}
    assert "sites named the same policy" in found
    assert "somebody has to explain why they are equal" in found
    assert "nobody was asked" not in found


def _edited(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], None]:
    def edit(run: Path, public: Path) -> None:
        document = json.loads((run / name).read_bytes())
        change(document)
        (run / name).write_bytes(canonical_json(document) + b"\n")

    return edit


def _in_the_log(run: Path, public: Path) -> None:
    for entries in public.glob("tile/entries/*.p/*"):
        entries.write_bytes(entries.read_bytes().replace(b'"payload":"', b'"payl0ad":"', 1))


def _not_json(run: Path, public: Path) -> None:
    (run / "rounds/0001.json").write_bytes(b"[]\n")


def _lost(run: Path, public: Path) -> None:
    (run / "rounds/0002.json").unlink()


def _card(run: Path, public: Path) -> None:
    (run / "release/README.md").write_text("# better\n")


TAMPERED: dict[str, Callable[[Path, Path], None]] = {
    "an epsilon": _edited("rounds/0003.json", lambda each: each["privacy"]["epsilon"].update({"site-0001": 0.1})),
    "a metric": _edited("rounds/0002.json", lambda each: each["metrics"].update(validation_accuracy=0.99)),
    "the software": _edited("software.json", lambda each: each["versions"].update(privet="9.9")),
    "the study": _edited("study.json", lambda each: each["purpose"].update(text="Sell notes.")),
    "a leaf": _in_the_log,
    "a statement that is none": _not_json,
    "a lost statement": _lost,
    "the card": _card,
}


@pytest.mark.parametrize("what", TAMPERED)
def test_there_is_no_dossier_of_a_changed_run(
    what: str, privet: Run, world: LoggedWorld, path: Path, tmp_path: Path
) -> None:
    home = tmp_path / "coordinator"
    shutil.copytree(path.parents[1] / "public", home / "public")
    shutil.copytree(path, home / "runs/flu")
    TAMPERED[what](home / "runs/flu", home / "public")
    policy = world.folder / "log/policy"
    code, out, err = privet("dossier", home / "runs/flu", "--policy", policy, "--out", tmp_path / "dossier")
    assert (code, out) == (5, ""), err
    assert "Traceback" not in err
    assert not (tmp_path / "dossier").exists()


def test_an_attack_s_result_that_is_malformed_or_of_another_study_is_refused(path: Path, tmp_path: Path) -> None:
    home = tmp_path / "coordinator"
    shutil.copytree(path.parents[1] / "public", home / "public")
    shutil.copytree(path, home / "runs/flu")
    file = home / "runs/flu/attacks/canaries.json"
    good = json.loads(file.read_bytes())
    for bad in ({**good, "arms": [{}]}, {**good, "attacked": "sha256:0"}):
        file.write_text(json.dumps(bad))
        with pytest.raises(PrivetError, match=r"lacks a field|another study"):
            dossier_files(gather(home / "runs/flu"))


def test_a_run_that_has_not_ended_says_so_and_so_does_its_permit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    purpose = {**PURPOSE, "permit": PERMIT}
    world = world_of(tmp_path / "world", masked_study(training={"rounds": 3}, purpose=purpose))
    times = iter([LAST, LAST, LAST + timedelta(seconds=1)])
    monkeypatch.setattr(rounds, "now", lambda: next(times))
    with pytest.raises(RefusedError, match="has expired"):
        world.play()
    files = dossier_files(gather(world.folder / "run", world.folder / "log/policy"))
    said = {each["name"]: each for each in json.loads(files["dossier.json"])["documents"]}
    heads = [section["text"] for section in said["ehds-permit"]["sections"][0]["sentences"]]
    assert any("has not ended" in text for text in heads)
    stated = " ".join(each["text"] for each in said["ehds-permit"]["sections"][1]["sentences"])
    # By the coordinator's clock in the log, which is another one than that of this test: the year 2027.
    assert "NOT all of them by this day" in stated
    assert "Whether there is a permit was not checked." in stated
    released = [each["text"] for each in said["model-card"]["sections"][1]["sentences"]]
    assert "No adapter of run run was released." in released


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT.parent / "shared/data/medquad").is_dir(), reason="needs MedQuAD")
def test_the_dossier_of_a_study_on_real_texts_holds_against_its_log() -> None:
    """The quick run of the benchmark: three institutions, another accountant, and a parser of pages of its own."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "dossier.py"), "--quick", "--json"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert [check["name"] for check in found["checks"] if check["met"] is False] == [], found["details"]["wrong"]
    assert sum(check["met"] is True for check in found["checks"]) == 7
