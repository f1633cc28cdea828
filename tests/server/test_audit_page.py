"""The page that verifies a bundle in a browser: it agrees with `privet audit verify`, and shows no text as markup."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import rfc8785
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privet.common.audit import bundle, page
from privet.common.audit.bundle import STUDY, check_bundle
from privet.common.audit.checks import IN_PAGE, NOT_IN_PAGE
from privet.common.audit.verify import Tree
from privet.common.canonical import digest
from privet.common.errors import VerificationError
from privet.common.log import checkpoint, gate, mldsa, note
from privet.common.log.checkpoint import Checkpoint
from privet.common.log.merkle import leaf_hash
from privet.common.log.note import COSIGNATURE, ED25519, Note, NoteKey, cosign, parse_note, sign_note
from privet.common.log.statements import AdapterState, RoundClose
from privet.common.log.tiles import Tile, bundle_bytes, read_bundle
from privet.common.masking.isolation import Isolation, Sums
from privet.common.pki.words import words_of
from privet.common.study.average import AVERAGED, averaged_name
from tests.conftest import Run
from tests.support import chromium
from tests.support.browser import axe
from tests.support.chromium import Tab, browser
from tests.support.lies import Archive, archive_of, rotated_of
from tests.support.log_world import World, flips, member, private, public
from tests.support.tampered import Tampered, kinds_of, log_files, tampered

ANY = st.characters(exclude_categories=["Cs"])


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=4) | st.dictionaries(st.text(ANY, max_size=5), inner, max_size=4)


UNCOMPARED = "Not yet verified: consistent with itself"
VERIFIER = tuple(name for name in page.SCRIPTS if name != "view.js")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return archive_of(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def rotated(archive: Archive) -> Archive:
    return rotated_of(archive)


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser(Tab) as found:
        yield found


# Two verifiers


class NoAccounts:
    """Stands for accounts of which nothing is computed."""

    def observe(self, *_: object) -> None: ...
    def finish(self) -> None: ...
    def costs(self) -> tuple[()]:
        return ()

    def together(self) -> dict[str, float]:
        return {}


def _same_study(files: Mapping[str, bytes], run: Any) -> str:
    if digest(files[STUDY].removesuffix(b"\n")) != run.opened.study:
        raise VerificationError("another study")
    return ""


def _of_closed_rounds(files: Mapping[str, bytes], run: Any) -> str:
    named = {averaged_name(end.round) for end in run.ends.values() if isinstance(end, RoundClose)}
    if any(name.startswith(AVERAGED) and name not in named for name in files):
        raise VerificationError("an adapter of no round")
    return ""


def _nothing(*_: object) -> str:
    return ""


LEFT_OUT: dict[str, list[Callable[[], Any]]] = {
    "ml-dsa": [partial(patch.object, mldsa, "verifies", lambda *_: True)],
    "epsilon": [partial(patch.object, bundle, "Accounts", NoAccounts)],
    "terms": [
        partial(patch.dict, bundle._CHECKS, {STUDY: _same_study}),
        partial(patch.object, bundle, "_check_ends", _nothing),
    ],
    "draws": [partial(patch.object, bundle, "_check_draws", _nothing)],
    "counts": [
        partial(patch.object, bundle, "check_counts", _nothing),
        partial(patch.object, bundle, "_check_result", _nothing),
    ],
    "average": [partial(patch.dict, bundle._CHECKS, {AVERAGED: _of_closed_rounds})],
    "weights": [partial(patch.object, bundle, "verify_files", _nothing)],
    "privacy-statement": [partial(patch.object, bundle, "_check_privacy", _nothing)],
    "canaries": [
        partial(patch.object, gate, "_bound", lambda *_: 0.0),
        partial(patch.object, gate, "_same_bound", lambda stated, computed: (stated is None) == (computed is None)),
    ],
    "receipts": [],
}
"""What has to be taken out of Python's verification, so that it checks as little as the page does."""


@contextmanager
def without(names: set[str]) -> Iterator[None]:
    """Leave checks out of Python's verification."""

    def forget() -> None:  # signatures that were found to match
        note._check_signature.cache_clear()
        checkpoint.accept_checkpoint.cache_clear()

    with ExitStack() as stack:
        stack.callback(forget)
        for name in names:
            for each in LEFT_OUT[name]:
                stack.enter_context(each())
        forget()
        yield


Result = tuple[bool, int | None, str]
"""Whether a bundle holds; otherwise the leaf, or the file, that is wrong."""


def in_python(case: Tampered, leaving_out: set[str]) -> Result:
    files = case.files
    if "weights" in leaving_out:
        files = {name: data for name, data in files.items() if name != "release/adapter_model.safetensors"}
    with without(leaving_out):
        report = check_bundle(files, case.policy)
    return report.holds, report.verdict.leaf, report.where


def in_browser(tab: Tab, cases: list[Tampered], folder: Path, script: str = "") -> list[dict[str, Any]]:
    """Verify bundles with the page's program, or with another. Equal files are written once."""
    pool: dict[str, str] = {}
    told = []
    for case in cases:
        files, absent = {}, [name for name in case.files if name.endswith(".safetensors")]
        for name, data in case.files.items():
            if name not in absent:
                files[name] = hashlib.sha256(data).hexdigest()
                pool.setdefault(files[name], base64.b64encode(data).decode())
        told.append({"files": files, "absent": absent, "policy": case.policy.text})
    script = script or page.program(VERIFIER)
    file = folder / "harness.html"
    inert = page._inert({"pool": pool, "cases": told})
    file.write_text(f'<script type="application/json" id="data">{inert}</script><script>{script}</script>')
    tab.open(file.as_uri())
    found: list[dict[str, Any]] = tab.run(
        """(async () => {
          const { pool, cases } = JSON.parse(document.getElementById("data").textContent), results = [];
          for (const { files, absent, policy } of cases) {
            const held = new Map(Object.entries(files).map(([name, sum]) => [name, decodeBase64(pool[sum], name)]));
            const found = await verifyBundle(held, { policy, absent });
            results.push({ result: [found.ok, found.leaf, found.where], fault: found.fault?.message ?? "",
              elsewhere: elsewhere(found, new Map(absent.map((name) => [name, 0]))).map((check) => check.name) });
          }
          return results;
        })()"""
    )
    return found


def compare(tab: Tab, cases: list[Tampered], folder: Path) -> Counter[str]:
    """Compare both verifiers. Return how many faults both find, and how many Python alone, by the check it takes."""
    everything = {check.name for check in NOT_IN_PAGE}
    wrong, found = list[tuple[object, ...]](), Counter[str]()
    for case, told in zip(cases, in_browser(tab, cases, folder), strict=True):
        expected = in_python(case, everything)
        if tuple(told["result"]) != expected:
            wrong.append((case.name, expected, told["result"], told["fault"]))
            continue
        if not expected[0]:
            found["both"] += 1
        elif in_python(case, set())[0]:
            found["no fault"] += 1
        else:
            alone = {name for name in everything if not in_python(case, everything - {name})[0]}
            if not alone or not alone <= set(told["elsewhere"]):
                wrong.append((case.name, alone, told["elsewhere"]))
            found.update(alone)
    assert wrong == []
    return found


def test_the_page_agrees_with_python_about_tampered_bundles(
    archive: Archive, rotated: Archive, tab: Tab, tmp_path: Path
) -> None:
    found = compare(tab, tampered(archive, rotated, seed=1, most=60), tmp_path)
    assert found["both"] > 30


@pytest.mark.slow
def test_the_page_agrees_with_python_about_500_tampered_bundles(
    archive: Archive, rotated: Archive, tab: Tab, tmp_path: Path
) -> None:
    cases = tampered(archive, rotated, seed=2, most=500)
    assert len(cases) == 500
    found = compare(tab, cases, tmp_path)
    assert found["both"] > 300
    assert found.keys() <= {"both", "no fault", *LEFT_OUT}
    assert {"ml-dsa", "epsilon"} <= found.keys(), found
    print(found)  # noqa: T201


# A rule of the program, what takes it out, and the kind of tampering that shows it.
BROKEN = {
    "if (equalBytes(root, head.root)) return;": ("return;", "changed_leaves"),
    "if (!(await signedBy(envelope.key, ": ("if (false && !(await signedBy(envelope.key, ", "hybrid"),
    "if (found.length < needed) throw": ("if (false) throw", "other_policies"),
    "if (run.nonces.has(said.nonce)) throw": ("if (false) throw", "broken_rules"),
    "if (this.owners.get(leaf.key) !== author) {": ("if (false) {", "broken_rules"),
    "if (!equalBytes(right, files.get(name))) wrong(name);": ("", "rearranged"),
    "if (again !== text) throw": ("if (false) throw", "other_forms"),
    "expectEqual(`SHA-256 of release/${name}`, expected, ": ("((..._) => 0)(", "rearranged"),
}


@pytest.mark.slow
def test_a_page_that_lacks_a_rule_does_not_agree(archive: Archive, rotated: Archive, tab: Tab, tmp_path: Path) -> None:
    kinds = kinds_of(archive, rotated, seed=1)
    cases = {kind: list(islice(kinds[kind], 60)) for kind in {kind for _, kind in BROKEN.values()}}
    told = {kind: [each["result"] for each in in_browser(tab, some, tmp_path)] for kind, some in cases.items()}
    script = page.program(VERIFIER)
    for rule, (other, kind) in BROKEN.items():
        assert script.count(rule) == 1, rule
        broken = in_browser(tab, cases[kind], tmp_path, script.replace(rule, other))
        assert [each["result"] for each in broken] != told[kind], rule


# The parts of the program against those of Python


def test_trees_and_proofs_are_those_of_python(tab: Tab, tmp_path: Path) -> None:
    """For sizes around powers of two, and proofs of first, middle and last leaf (RFC 6962, section 2.1)."""
    leaves = [leaf_hash(b"%d" % n) for n in range(130)]
    tree = Tree()
    for leaf in leaves:
        tree.append(leaf)
    blank(tab, tmp_path)
    roots = tab.run(
        f"""(async () => {{
          const leaves = {json.dumps([leaf.hex() for leaf in leaves])}.map(unhex), tree = await Tree.of(leaves);
          return Promise.all(leaves.map(async (_, n) => hex(await tree.rootAt(n + 1))));
        }})()"""
    )
    assert roots == [tree.root_at(size + 1).hex() for size in range(130)]
    for size in (1, 2, 3, 7, 8, 9, 130):
        part = Tree()
        for leaf in leaves[:size]:
            part.append(leaf)
        proofs = tab.run(
            f"""(async () => {{
              const leaves = {json.dumps([leaf.hex() for leaf in leaves[:size]])}.map(unhex);
              const tree = await Tree.of(leaves);
              return Promise.all(leaves.map(async (_, n) => (await tree.inclusion(n)).map(hex)));
            }})()"""
        )
        assert proofs == [[each.hex() for each in part.prove(n)] for n in range(size)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(ANY), nested)
)
def test_canonical_json_is_that_of_python(tab: Tab, tmp_path: Path, value: Any) -> None:
    if tab.run("typeof canonical") != "function":
        blank(tab, tmp_path)
    text = rfc8785.dumps(value).decode()
    assert tab.run(f"canonical(JSON.parse({json.dumps(text)}))") == text


def test_who_spoils_is_found_as_in_python(tab: Tab, tmp_path: Path) -> None:
    generator, names = random.Random(5), [f"site-{n}" for n in range(7)]
    histories = []
    for _ in range(60):
        rounds = [(generator.random() < 0.6, generator.sample(names, generator.randint(1, 7))) for _ in range(12)]
        histories.append([Sums(*(((frozenset(who),), ()) if bad else ((), (frozenset(who),)))) for bad, who in rounds])
    blank(tab, tmp_path)
    given = [[[list(map(sorted, each.spoiled)), list(map(sorted, each.usable))] for each in one] for one in histories]
    found = tab.run(
        f"""{json.dumps(given)}.map((rounds) => {{
          let state = new Isolation();
          return rounds.map(([spoiled, usable]) => {{
            state = state.after(spoiled, usable);
            return [state.leftOut, [...state.benched].sort(), [...state.suspects].sort(), [...state.cleared].sort()];
          }});
        }})"""
    )
    for history, states in zip(histories, found, strict=True):
        isolation = Isolation()
        for sums, state in zip(history, states, strict=True):
            isolation.note(sums)
            benched, suspects = sorted(isolation.benched), sorted(isolation.suspects)
            assert state == [list(isolation.left_out), benched, suspects, sorted(isolation.cleared)]


def blank(tab: Tab, folder: Path) -> None:
    """Open a page that holds the verifier, and nothing else."""
    file = folder / "blank.html"
    file.write_text(f"<script>{page.program(VERIFIER)}</script>")
    tab.open(file.as_uri())


# What a person sees


def opened(tab: Tab, folder: Path, data: bytes, name: str = "page") -> str:
    """Open a page, wait for its verdict, and return that."""
    file = folder / f"{name}.html"
    file.write_bytes(data)
    tab.events.clear()
    tab.open(file.as_uri())
    tab.wait(
        "document.title.includes(': ') || document.getElementById('verdict-word').textContent === 'Could not check'"
    )
    verdict: str = tab.run("document.getElementById('verdict-word').textContent")
    return verdict


def text(tab: Tab, name: str) -> str:
    found: str = tab.run(f"document.getElementById({json.dumps(name)}).innerText")
    return found


def typed(tab: Tab, name: str, words: str) -> None:
    tab.run(
        f"(() => {{ const field = document.getElementById({json.dumps(name)}); field.value = {json.dumps(words)}; "
        "field.dispatchEvent(new Event('input')); })()"
    )


def chosen(tab: Tab, file: Path) -> None:
    """Choose a file of the reader's own, and wait for what the page says of it."""
    tab.run("document.getElementById('own-result').textContent = ''")
    root = tab.call("DOM.getDocument")["root"]["nodeId"]
    node = tab.call("DOM.querySelector", nodeId=root, selector="#own-file")["nodeId"]
    tab.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])
    tab.wait("document.getElementById('own-result').textContent !== ''")


def test_a_true_bundle_is_consistent_and_green_only_once_it_is_compared(
    archive: Archive, rotated: Archive, tab: Tab, tmp_path: Path
) -> None:
    assert opened(tab, tmp_path, page.page(archive.files, "run.tar")) == UNCOMPARED
    for part in ("consortium north", "run run", "23 leaves", "cosigned by site-0000"):
        assert part in text(tab, "subtitle")
    assert text(tab, "checks-table").count("passed") == len(IN_PAGE)
    assert "every epsilon shown here is as stated" in text(tab, "elsewhere")
    assert "released: adapter" in text(tab, "chains")
    head = parse_note(archive.files["checkpoint"]).text.encode()
    words = words_of(head)
    assert tab.run("document.getElementById('head-words').textContent") == words
    assert text(tab, "site-command") == "privet site head SITE --size 23"
    typed(tab, "head-told", "button lemmon zebra")
    assert text(tab, "head-result") == "lemmon is no word of the list"
    typed(tab, "head-told", " ".join(words.split()[:11]))
    assert (text(tab, "head-result"), text(tab, "verdict-word")) == (
        "11 of 12 words",
        UNCOMPARED,
    )
    typed(tab, "head-told", words.upper().replace(" ", ", "))
    assert text(tab, "verdict-word") == "\u2713 Consistent, and compared"
    typed(tab, "head-told", words.replace(words.split()[3], "zebra"))
    assert text(tab, "verdict-word") == "\u2717 Differs from what you compared"
    typed(tab, "head-told", "")
    for name, data, says, verdict in (
        ("own.policy", archive.policy.text.encode(), "is the one of this policy", "\u2713 Consistent, and compared"),
        (
            "other.policy",
            rotated.policy.text.encode(),
            "signatures by the log",
            "\u2717 Differs from what you compared",
        ),
        ("card", archive.files["release/README.md"], "The log exports this file: README.md", ""),
        ("text", archive.files["release/privacy_statement.md"], "The log exports this file: privacy_statement.md", ""),
        ("other", b"x", "No release in this log", ""),
        ("head", archive.files["checkpoint"], "It is the log of this checkpoint", ""),
    ):
        (tmp_path / name).write_bytes(data)
        chosen(tab, tmp_path / name)
        assert says.lower() in text(tab, "own-result").lower()
        assert text(tab, "verdict-word") == verdict or not verdict
    assert tab.complaints() == []


def test_one_flipped_bit_makes_it_red_at_the_right_leaf(archive: Archive, tab: Tab, tmp_path: Path) -> None:
    name = next(each for each in archive.files if each.startswith("tile/entries"))
    leaves = read_bundle(Tile.parse(name), archive.files[name])
    other = [*leaves[:7], next(flips(leaves[7], iter([4000]))), *leaves[8:]]
    verdict = opened(tab, tmp_path, page.page({**archive.files, name: bundle_bytes(other)}, "run.tar"))
    assert verdict == "\u2717 Fails at leaf 7"
    for part in (leaf_hash(leaves[7]).hex(), leaf_hash(other[7]).hex(), "Expected", "Found"):
        assert part in text(tab, "fault")
    assert tab.run("document.getElementById('compare').hidden")
    assert "Leaves 2 to 6 of 7 that passed" in text(tab, "leaf-list")
    assert tab.complaints() == []


SCRIPT = "</script><script>globalThis.ran=1</script><img src=x onerror=globalThis.ran=1><!--"


def test_no_text_of_a_log_runs_or_becomes_markup(tab: Tab, tmp_path: Path) -> None:
    """Attack: whoever may choose a text in the log, a name of a file, or the bundle's, writes a script into it."""
    world = World()
    named = NoteKey("<img/src=x/onerror=globalThis.ran=1>", ED25519, public("log"))
    witness = NoteKey("<svg/onload=globalThis.ran=1>", COSIGNATURE, public("witness berlin"))
    members = [member(site) for site in world.sites]
    members[0] = members[0].model_copy(update={"witness": witness.text})
    world.say(world.genesis(log=named.text, members=tuple(members)))
    promise = world.run_open("flu").privacy
    assert promise is not None
    world.say(world.run_open("flu", privacy=promise.model_copy(update={"accountant": SCRIPT})))
    world.say(world.refusal("oslo", "flu", rule=SCRIPT, asked=SCRIPT, allowed=SCRIPT), "oslo")
    aborted = world.say(world.round_open("flu", 1))
    world.say(world.round_abort("flu", 1, aborted, failures={"lyon": SCRIPT}, reason=SCRIPT))
    world.play("flu", 2)
    world.say(world.export("flu", 2))
    state = {"time": 1, "run": "flu", "adapter": world.adapters["flu"], "state": "revoked", "by": None}
    world.say(AdapterState.model_validate({**state, "reason": SCRIPT}))
    text_of = Checkpoint(named.name, world.frontier.size, world.frontier.root).text
    lines = [
        sign_note(text_of, named.name, private("log")),
        cosign(text_of, witness.name, private("witness berlin"), 1),
    ]
    lines += [cosign(text_of, f"{site}.example", private(f"witness {site}"), 1) for site in ("lyon", "oslo")]
    files = log_files(world.leaves, Note(text_of, tuple(lines)).encode())
    strange = {"red": {f"tile/{SCRIPT}": b"x"}, "run": {SCRIPT: b"x"}, "green": {}}
    for name, more in strange.items():
        verdict = opened(tab, tmp_path, page.page(files | more, SCRIPT), name)
        assert verdict == UNCOMPARED if name == "green" else verdict.startswith("\u2717 Fails at")
        tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert tab.run("[document.scripts.length, document.images.length, typeof globalThis.ran]") == [
            2,
            0,
            "undefined",
        ]
        assert tab.run("document.querySelectorAll('[onerror], [onload]').length") == 0
        assert SCRIPT in text(tab, "runs")
        assert witness.name in text(tab, "subtitle") or name != "green"
        assert tab.complaints() == []


def test_another_program_or_style_does_not_run(archive: Archive, tab: Tab, tmp_path: Path) -> None:
    """The policy pins the program by its hash, and lets nothing out: the page's reader needs no trust in the bundle."""
    data = page.page(archive.files, "run.tar")
    (tmp_path / "other.html").write_bytes(
        data.replace(b'setVerdict("even", "Checking"', b'setVerdict("good", "Checking"')
    )
    tab.events.clear()
    tab.open((tmp_path / "other.html").as_uri())
    assert text(tab, "verdict-word") == "Not checked"
    assert any("Content Security Policy" in each for each in tab.complaints())
    assert opened(tab, tmp_path, data) == UNCOMPARED
    for attempt in (
        "fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')",
        "new Promise((end) => { const image = new Image(); image.onload = () => end('sent'); "
        "image.onerror = () => end('refused'); image.src = 'http://127.0.0.1:9/x'; })",
        "(() => { try { document.body.innerHTML = 'x'; return 'sent'; } catch { return 'refused'; } })()",
    ):
        assert tab.run(attempt) == "refused"


def test_the_page_is_readable_on_a_phone_and_by_keyboard(archive: Archive, tab: Tab, tmp_path: Path) -> None:
    tab.size(390, 844)
    opened(tab, tmp_path, page.page(archive.files, "run.tar"))
    assert tab.run("document.documentElement.scrollWidth") <= 390
    assert axe(tab) == []
    tab.size(1200, 900)
    assert tab.run("[...document.querySelectorAll('input')].every((each) => each.labels.length > 0)")
    assert tab.run("[...document.querySelectorAll('svg[role=img]')].every((each) => each.getAttribute('aria-label'))")
    levels = tab.run("[...document.querySelectorAll('h1, h2, h3')].map((each) => Number(each.tagName[1]))")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert tab.run("document.querySelectorAll('[tabindex]:not([tabindex=\"0\"])').length") == 0


def test_a_browser_that_lacks_the_signatures_says_so(archive: Archive, tab: Tab, tmp_path: Path) -> None:
    script = "crypto.subtle.importKey = () => Promise.reject(new Error());"
    number = tab.call("Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"]
    try:
        assert opened(tab, tmp_path, page.page(archive.files, "run.tar")) == "Could not check"
    finally:
        tab.call("Page.removeScriptToEvaluateOnNewDocument", identifier=number)


# The file and the command


def test_the_program_reaches_for_nothing_outside() -> None:
    script = page.program()
    assert script.isascii()
    forbidden = ("</script", "<!--", "innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(")
    network = ("fetch(", "XMLHttpRequest", "WebSocket", "EventSource", "sendBeacon", "import(", "localStorage")
    assert [word for word in (*forbidden, *network) if word in script] == []


def test_the_checks_are_those_of_python(archive: Archive) -> None:
    """Each part of a bundle that Python checks is one of the page's, or is named as not checked there."""
    names = [check.name for check in (*IN_PAGE, *NOT_IN_PAGE)]
    assert len(set(names)) == len(names)
    assert {check.name for check in NOT_IN_PAGE} == LEFT_OUT.keys()
    parts = {where for check in (*IN_PAGE, *NOT_IN_PAGE) for where in check.where}
    assert parts >= {*bundle._CHECKS, bundle.MANIFEST, bundle.PROOFS, bundle._TILES}
    begun = re.findall(r'begin\(report, "([a-z]+)"\)|^ {4}\["([a-z]+)", "', page.program(), re.MULTILINE)
    assert [one or other for one, other in begun] == [check.name for check in IN_PAGE]


def test_the_same_bundle_gives_the_same_page(archive: Archive) -> None:
    data = page.page(archive.files, "run.tar")
    assert page.page(dict(reversed(archive.files.items())), "run.tar") == data
    assert archive.files["release/adapter_model.safetensors"] not in data
    assert len(data) < 400_000


def test_the_command_writes_the_page(archive: Archive, tmp_path: Path, privet: Run) -> None:
    bundle.write_archive(tmp_path / "run.tar", archive.files)
    code, out, _ = privet("audit", "page", tmp_path / "run.tar", "--out", tmp_path / "run.html")
    data = (tmp_path / "run.html").read_bytes()
    assert (code, data) == (0, page.page(archive.files, "run.tar"))
    assert f"SHA-256 {digest(data)[7:]}." in out
    assert "next: open" in out
    code, _, err = privet("audit", "page", tmp_path / "run.tar", "--out", tmp_path / "run.html")
    assert code != 0
    assert "exists already" in err
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "run.html", tmp_path / "empty", tmp_path / "none"):
        code, _, err = privet("audit", "page", path, "--out", tmp_path / "x.html")
        assert (code, "name a file that `privet audit bundle" in err) == (2, True)


def test_without_a_browser_the_tests_are_skipped_or_fail_as_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chromium, "path", lambda: None)
    monkeypatch.delenv("PRIVET_REQUIRE_CHROMIUM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install"):
        chromium.required()
    monkeypatch.setenv("PRIVET_REQUIRE_CHROMIUM", "1")
    with pytest.raises(pytest.fail.Exception, match="apt-get install"):
        chromium.required()
