"""The report: nothing in it runs or fetches, small cells stay hidden, and what is not known is said to be unknown."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from privet.client.pages.charts import WIDTH, Level, bar_chart, line_chart, nice_ticks
from privet.client.pages.html import Html, element, joined, paragraph, table, text
from privet.client.pages.suppression import SMALLEST, hidden
from privet.common.audit.privacy_statement import privacy_document
from privet.common.cli import build_command
from privet.common.errors import StateError, StudyError
from privet.common.study.study import Study
from privet.simulations.reporting.gather import RunFacts, Traffic, gather
from privet.simulations.reporting.page import as_share, conclusion, page, strength
from privet.simulations.reporting.subgroups import evaluate_groups, grouped, thirds
from privet.simulations.runs.simulate import prepare, run_simulation
from tests.simulations.test_simulate import study_file
from tests.support.tiny import class_rows, private, tiny_study, write_rows

HOSTILE = "<script>alert(1)</script>\"'>&<img src=x onerror=alert(1)>\u202e\x1b[31m"


class Reader(HTMLParser):
    """Collects tags, attributes and text, and whether tags are closed in order."""

    VOID = frozenset({"meta"})

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(document)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.words).split())


def inert(document: str) -> Reader:
    """Check that a page is well-formed and neither runs nor fetches anything."""
    read = Reader(document)
    assert set(read.tags).isdisjoint({"script", "img", "link", "iframe", "object", "embed", "base", "form", "a"})
    for name, value in read.attributes:
        assert name not in ("href", "src", "srcset", "style", "action", "data")
        assert not name.startswith("on")
        assert not (value or "").lower().startswith(("http:", "https:", "javascript:", "data:", "//"))
    assert "url(" not in document
    assert "@import" not in document
    assert "default-src 'none'" in document.replace("&#x27;", "'")
    return read


def summary(study: Study, sites: Mapping[str, int], **more: Any) -> dict[str, Any]:
    return {
        "study": study.name,
        "study_digest": study.digest,
        "adapter_digest": "sha256:ab",
        "metric": "accuracy",
        "accuracy": {"before": 0.3, "federated": 0.8, "local": {}, "local_mean": None, "pooled": None},
        "intervals": {"federated": [0.7, 0.9]},
        "federated_per_site": {site: {"records": float(count), "accuracy": 0.5} for site, count in sites.items()},
        "rounds": 2,
        "epsilon": None,
        "curve": [{"round": 1, "accuracy": 0.5}, {"round": 2, "accuracy": 0.8}],
        "seconds": 36.0,
        "peak_memory_mb": 900,
        **more,
    }


def facts(study: Study, sites: Mapping[str, int], **more: Any) -> RunFacts:
    return RunFacts(
        name=more.pop("name", "run"),
        study=study,
        summary=summary(study, sites, **more.pop("summary", {})),
        statements=(),
        privacy=privacy_document(study, (), simulated=True),
        attacks=more.pop("attacks", {}),
        traffic=Traffic(10, 20),
        groups=more.pop("groups", {}),
        no_groups="",
    )


# Markup


@given(st.text())
def test_text_comes_back_as_it_was_and_makes_no_tags(words: str) -> None:
    read = Reader(element("p", {"title": words}, words))
    assert read.tags == ["p"]
    kept = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", words)
    assert "".join(read.words) == kept
    assert read.attributes == [("title", kept)]


@pytest.mark.parametrize("attribute", ["onclick", "href", "SRC", "style", "x y", 'a"b', "a=b"])
def test_attributes_that_could_run_or_fetch_are_refused(attribute: str) -> None:
    with pytest.raises(ValueError, match="report"):
        element("p", {attribute: "x"})


def test_only_elements_are_markup() -> None:
    assert joined(["<b>", Html("<b>")]) == "&lt;b&gt;<b>"
    assert text("a & b") == "a &amp; b"
    made = table(HOSTILE, [HOSTILE, "n"], [[HOSTILE, HOSTILE]], numbers=(1,))
    assert Reader(made).tags == ["div", "table", "caption", "thead", "tr", "th", "th", "tbody", "tr", "th", "td"]


# The page


def test_hostile_names_stay_text_in_every_section(bert: Path) -> None:
    study = tiny_study(bert, **{"task.labels": [HOSTILE, "b"], "privacy": private()})
    attacks = {
        "poisoning": {
            "sites": 4, "malicious": 1, "trigger": HOSTILE, "target": HOSTILE,
            "arms": [{"attack": HOSTILE, "defence": HOSTILE, "accuracy": 0.5, "success": 0.5,
                      "rounds_aborted": 0, "groups_left_out": 0}],
        }
    }  # fmt: skip
    run = facts(study, {HOSTILE: 50, "b": 60}, name=HOSTILE, attacks=attacks, groups={HOSTILE: [(HOSTILE, 20, 0.5)]},
                summary={"adapter_digest": HOSTILE, "epsilon": 3.0})  # fmt: skip
    for document in (page([run]), page([run, run])):
        read = inert(document)
        assert "alert(1)" in read.said
        assert "\x1b" not in document
        assert "\u202e" not in document


def test_what_is_not_known_is_said(bert: Path) -> None:
    study = tiny_study(bert)
    said = inert(page([facts(study, {"a": 50})])).said
    assert "No signed round log was verified" in said
    assert "promises no differential privacy" in said
    assert "No attack was tried" in said
    assert "assuming that the machine draws 100 W" in said
    assert "about 1.0 Wh" in said
    for value, words in ((True, "was verified when the run ended"), (False, "did not verify"), (None, "not verified")):
        assert words in inert(page([facts(study, {"a": 50}, summary={"log_verified": value})])).said
    timed = facts(study, {"a": 50}, summary={"scenario": {"virtual": {"seconds": 1234.0}}})
    assert "1,234 seconds on the virtual clock" in inert(page([timed])).said


def test_a_promise_about_sums_is_not_told_as_one_about_each_site(bert: Path) -> None:
    alone = tiny_study(bert, privacy=private())
    told = inert(page([facts(alone, {"a": 20})])).said
    assert "by itself, against everyone" in told
    assert "each site adds by itself" in told
    shared = tiny_study(
        bert,
        privacy=private(mode="distributed"),
        training={"local_steps": 1, "optimizer": "sgd", "learning_rate": 1.0},
        aggregation={"method": "ffa", "optimizer": "adam", "learning_rate": 0.02, "largest_count": 100},
        **{"secure_aggregation.mode": "masked", "cohort.min_sites": 3},
    )
    told = inert(page([facts(shared, {"a": 20})])).said
    assert "against everyone" not in told
    assert "added at each site" not in told
    assert "the coordinator together with 1 of 3 sites, if 2 or more of the others add their share" in told
    assert "noise that the sites share" in told


def test_a_group_of_all_is_none_and_a_curve_on_fewer_records_says_so(bert: Path) -> None:
    study = tiny_study(bert)
    curve = [{"round": 1, "accuracy": 0.5, "records": 30.0}]
    more = {"federated": {"records": 90.0}, "curve": curve}
    told = inert(page([facts(study, {"a": 90}, summary=more, groups={"length": [("shortest third", 90, 0.5)]})])).said
    assert "all test records are in one group" in told
    assert "by round. The curve is on a sample of the records" in told
    curve[0]["records"] = 90.0
    assert "on a sample of the records" not in inert(page([facts(study, {"a": 90}, summary=more)])).said


def test_rounds_that_went_alike_are_one_row(bert: Path) -> None:
    def course(number: int, lost: int) -> dict[str, Any]:
        return {"type": "round-close", "round": number, "cohort": ["a", "b"], "survivors": ["a", "b"][lost:]}

    aborted = {"type": "round-abort", "round": 5, "cohort": ["a", "b"], "failures": [], "reason": "0 of 2 delivered"}
    statements = (*(course(number, lost) for number, lost in ((1, 0), (2, 0), (3, 1), (4, 0))), aborted)
    told = inert(page([replace(facts(tiny_study(bert), {"a": 90}), statements=statements)])).said
    assert "1 to 2 2 2 closed 3 2 1 closed 4 2 2 closed 5 2 0 aborted: 0 of 2 delivered" in told


def test_sites_of_few_records_are_not_shown_and_the_gap_leaves_them_out(bert: Path) -> None:
    run = facts(tiny_study(bert), {"large": 100, "middle": 40, "small": 9})
    run.summary["federated_per_site"]["small"]["accuracy"] = 0.123
    run.summary["federated_per_site"]["middle"]["accuracy"] = 0.456
    said = inert(page([run])).said
    assert "12.3 %" not in said
    assert "45.6 %" not in said  # or the small one would follow from the total
    assert said.count("not shown") >= 4
    assert "worst" not in said.split("Results by site")[1].split("Results by group")[0]


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 40), max_size=8))
def test_no_small_cell_is_shown_or_follows_from_a_total(counts: dict[str, int]) -> None:
    secret = hidden(counts)
    assert all(name in secret for name, count in counts.items() if 0 < count < SMALLEST)
    hidden_sum = sum(counts[name] for name in secret)
    assert not secret or len(secret) > 1 or len([c for c in counts.values() if c]) == 1
    assert hidden_sum >= SMALLEST or not secret or hidden_sum == sum(counts.values())


def test_attacks_of_every_kind_are_shown(bert: Path) -> None:
    told = {"auc": 0.61, "interval": [0.5, 0.7], "rates": [{"at": 0.01, "tpr": 0.05, "resolved": False}]}
    audit = {"epsilon": 3.3, "guesses": 100, "right": 99}
    attacks: dict[str, Any] = {
        "canaries": {"canaries": 100, "included": 51, "arms": [
            {"arm": "no privacy", "claimed_epsilon": None, "holds": None, "audit": audit},
            {"arm": "epsilon 2", "claimed_epsilon": 2.0, "holds": False, "audit": audit}]},
        "membership": {"scored": 10, "shadows": 4, "arms": [
            {"arm": "no privacy", "target": "game", "loss": told, "lira": told, "blind": told}]},
        "reconstruction": {"rank": 64, "arms": [
            {"arm": "one site", "recovered": 1.0, "interval": [0.9, 1.0], "records": 2, "records_exact": 2,
             "control": 0.0}]},
    }  # fmt: skip
    said = inert(page([facts(tiny_study(bert), {"a": 50}, attacks=attacks)])).said
    assert "REFUTED" in said
    assert "99 of 100" in said
    assert "5.0 % *" in said
    assert "2 of 2" in said


def test_the_page_begins_with_its_conclusion_and_ends_with_what_is_technical(bert: Path) -> None:
    study = tiny_study(bert, privacy=private())
    scores = {"before": 0.3, "federated": 0.8, "local": {"a": 0.5}, "local_mean": 0.5, "pooled": 0.9}
    run = replace(
        facts(study, {"a": 50, "b": 50}, summary={"epsilon": 8.0, "accuracy": scores}), data="files of 2 sites"
    )
    begun = {"type": "round-close", "round": 1, "cohort": [], "survivors": [], "failures": [], "started": 1.6e9}
    said = inert(page([replace(run, statements=(begun,))])).said
    told = (
        "2 sites trained one model together: accuracy 80.0 % on the test records of all sites. There, a site alone "
        "reaches 50.0 % on average, and all data in one place 90.0 %."
    )
    assert said.index(told) < said.index("Date 13")
    for words in ("Date 13 September 2020", "Sites a, b", "Data files of 2 sites", "8.00 · reasonable"):
        assert words in said
    assert "up to 1 is called strong, up to 10 reasonable, above 10 weak" in said
    assert "What is proved: an attacker who begins with even odds" in said
    assert "99.97 % sure" in said
    assert "What is a convention: the word “reasonable”." in said
    assert "A simulation protects nobody" in said
    assert said.index("Attacks") < said.index("Appendix: privacy statement") < said.index(study.digest)
    assert [strength(value) for value in (1.0, 1.1, 10.0, 10.1)] == [
        "strong",
        "reasonable",
        "reasonable",
        "weak or none",
    ]
    assert [as_share(value) for value in (73.1, 99.966, 99.9999)] == ["73 %", "99.97 %", "more than 99.99 %"]


OWN = {
    "a": {"records": 50.0, "together": 0.8, "alone": 0.5},
    "b": {"records": 60.0, "together": 0.6, "alone": 0.7},
    "c": {"records": 70.0, "together": 0.9, "alone": 0.9},
}


def test_each_site_reads_what_training_together_is_worth_on_its_own_records(bert: Path) -> None:
    study = tiny_study(bert, privacy=private(), **{"data.unit": "pid", "privacy.unit": "patient"})
    scores = {"before": 0.3, "federated": 0.8, "local": {"a": 0.5}, "local_mean": 0.5, "pooled": 0.9}
    more = {
        "own_records": OWN, "epsilon": 8.0,
        "personal": {"per_site": {site: {"chosen": 1.0, "share": 1.0, "records": 50.0} for site in OWN}},
        "accuracy": scores,
        "privacy": {"target": 8.0, "training": {"unit": "patient"}},
        "training_records": {
            "a": {"records": 1200, "patients": 300}, "b": {"records": 90, "patients": 9},
            "c": {"records": 95, "patients": 80},
        },
    }  # fmt: skip
    said = inert(page([facts(study, {"a": 50, "b": 60, "c": 70}, summary=more)])).said
    told = "1 of 3 sites do better together than alone on their own test records."
    assert said.count(told) == 2  # in the conclusion, and beside the table
    assert f"{told} Not better together: b (60.0 %, alone 70.0 %), c (90.0 %, alone 90.0 %)." in said
    assert (
        "site test records together alone own adapter (no privacy) a 50 80.0 % 50.0 % 100.0 % b 60 60.0 % 70.0 % "
        "100.0 % c 70 90.0 % 90.0 % 100.0 %"
    ) in said
    assert "Own adapter (no privacy): every site 100.0 %." in said
    assert "All 3 sites chose their own adapter" in said
    assert "on the site's records without privacy" in said
    assert "1 of 3 sites better together, on their own records" in said
    assert "Training alone and pooled keeps the same promise as together: at most epsilon 8 per patient." in said
    assert "needs no noise" in said
    assert "site training records patients a 1,200 300 b not shown not shown c not shown not shown" in said
    assert "each step takes each patient with probability" in said
    assert "protects no patient" in said


def test_the_first_sentences_name_labels_that_are_hardly_found_and_no_small_group(bert: Path) -> None:
    labels = [("heart", 40, 0.02), ("skin", 40, 0.9), ("lung", 40, 0.19), ("rare", 7, 0.0), ("seldom", 8, 0.0)]
    told = facts(tiny_study(bert), {"a": 50, "b": 60, "c": 70}, groups={"label": labels, "length": [("short", 9, 0.0)]})
    assert conclusion(told).endswith("The model finds hardly any record of the labels heart, lung.")
    well = facts(tiny_study(bert), {"a": 50, "b": 60, "c": 70}, groups={"label": labels[1:2]})
    assert "hardly any" not in conclusion(well)


def test_prose_marks_up_commands_and_nothing_else() -> None:
    assert paragraph("run `privet <x>` now", element("b", {}, "`")) == (
        "<p>run <code>privet &lt;x&gt;</code> now<b>`</b></p>"
    )
    assert paragraph("one ` alone") == "<p>one ` alone</p>"


def test_a_figure_leaves_out_what_would_flatten_it_and_says_so(bert: Path) -> None:
    scores = {"before": 83000.0, "federated": 12.0, "local": {}, "local_mean": 5e7, "pooled": 11.0}
    curve = [{"round": number, "perplexity": value} for number, value in ((1, 900.0), (2, 14.0), (3, 12.0))]
    per_site = {"a": {"records": 50.0, "perplexity": 12.0}}
    more = {"metric": "perplexity", "perplexity": scores, "curve": curve, "federated_per_site": per_site}
    read = inert(page([facts(tiny_study(bert), {"a": 50}, summary=more)]))
    assert "Beyond the axis: round 0 (83,000), round 1 (900.00), a site alone (mean) (over 1,000,000)" in read.said
    assert read.tags.count("circle") == 2


def test_wide_tables_name_each_cell_for_a_narrow_screen() -> None:
    names = [f"column {letter}" for letter in "abcde"]
    wide = table("t", names, [["1", "2", "3", "4", "5"]])
    assert [value for name, value in Reader(wide).attributes if name == "data-name"] == names[1:]
    assert ("class", "wide many") in Reader(wide).attributes
    for few in (names[:4], list("abcde")):
        assert ("class", "wide") in Reader(table("t", few, [["1"] * len(few)])).attributes


# Charts


@given(st.lists(st.text("abcdefghij klm", min_size=1, max_size=40), min_size=1, max_size=4), st.floats(0.1, 100))
def test_charts_have_legends_and_keep_inside_their_frame(names: list[str], value: float) -> None:
    limit = Level("limit", value)
    bars = bar_chart("t", dict.fromkeys(names, value / 2), limit=limit, described="d", name="spent")
    levels = [Level(name, value) for name in names[:2]]
    lines = line_chart(
        "t", [(0.0, 0.0), (1.0, value)], x_name="x", y_name="y", levels=levels, described="d", name="own"
    )
    for chart, legend in (
        (bars, ["spent", f"limit, {value:g}"]),
        (lines, ["own", *(text(name) for name in names[:2])]),
    ):
        for words in legend:
            assert f">{words}</text>" in chart
        for place in re.findall(r' (?:x|x1|x2|cx)="([^"]+)"', chart):
            assert 0 <= float(place) <= WIDTH


@given(st.floats(0, 1e6, allow_nan=False))
def test_ticks_are_round_and_reach_the_top(high: float) -> None:
    ticks = nice_ticks(0.0, high)
    assert ticks[0] == 0
    assert ticks[-1] >= high * (1 - 1e-9)
    assert 2 <= len(ticks) <= 8


def test_charts_say_what_they_show_and_leave_out_what_is_no_number() -> None:
    chart = line_chart(
        "t",
        [(0.0, 1.0), (1.0, math.nan), (2.0, 3.0)],
        x_name="x",
        y_name="y",
        levels=[Level("<l>", 2.0)],
        described="d",
    )
    read = Reader(chart)
    assert ("role", "img") in read.attributes
    assert {"title", "desc", "figcaption"} <= set(read.tags)
    assert read.tags.count("circle") == 2
    assert "nan" not in chart
    assert Reader(bar_chart("t", {}, limit=None, described="d")).tags[0] == "figure"


# Groups


def test_groups_are_counted_and_averaged() -> None:
    assert grouped(["b", "a", "b"], [1.0, 0.0, 0.0]) == [("a", 1, 0.0), ("b", 2, 0.5)]
    assert [thirds([1, 2, 3, 4, 5, 6]).count(name) for name in ("shortest third", "middle third", "longest third")] == [
        2, 2, 2,
    ]  # fmt: skip
    assert set(thirds([5, 5, 5])) == {"shortest third"}


@pytest.mark.slow
def test_a_run_becomes_a_page(bert: Path, tmp_path: Path) -> None:
    file = study_file(tmp_path, bert, {"privacy": private(), "training.rounds": 1})
    for number, name in enumerate(("alpha", "beta", "gamma")):
        rows = [{**row, "sex": "fm"[i % 2]} for i, row in enumerate(class_rows(20, seed=100 + number))]
        write_rows(tmp_path / f"{name}-test.jsonl", rows)
    run = tmp_path / "run"
    with pytest.raises(StateError, match="not a run directory"):
        gather(run)
    done = run_simulation(prepare(file, run))
    groups = evaluate_groups(run, ["sex"])
    assert [(name, count) for name, count, _ in groups["sex"]] == [("f", 30), ("m", 30)]
    total = sum(count * right for _, count, right in groups["label"]) / 60
    assert total == pytest.approx(done["accuracy"]["federated"])
    out = run / "report.html"  # where a report is written unless --out says otherwise
    result = CliRunner().invoke(build_command(), ["report", str(run), "--by", "sex"])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1].startswith(f"next: open {out} in a browser")
    read = inert(out.read_text(encoding="utf-8"))
    assert "By sex" in read.said
    assert "epsilon" in read.said
    assert page([gather(run, groups)]) == page([gather(run, groups)])
    absent = CliRunner().invoke(build_command(), ["report", str(run), "--out", str(tmp_path / "no dir" / "a.html")])
    assert isinstance(absent.exception, StudyError)
    assert f"mkdir -p '{tmp_path / 'no dir'}'" in absent.exception.hint
    (run / "summary.json").rename(run / "summary")
    unfinished = CliRunner().invoke(build_command(), ["report", str(run)]).exception
    assert isinstance(unfinished, StateError)
    assert unfinished.hint == f"run `privet simulate --resume {run}`"
    (run / "summary").rename(run / "summary.json")
    (run / "attacks").mkdir()
    (run / "attacks" / "canaries.json").write_text("[]", encoding="utf-8")
    with pytest.raises(StateError, match="canaries"):
        gather(run)
    (run / "attacks" / "canaries.json").write_text(json.dumps({"attacked": "sha256:other"}), encoding="utf-8")
    with pytest.raises(StateError, match="belongs to another study"):
        gather(run)
    own = {"attacked": done["study_digest"], "arms": "none"}
    (run / "attacks" / "canaries.json").write_text(json.dumps(own), encoding="utf-8")
    with pytest.raises(StateError, match="run the attack again"):
        page([gather(run)])
    (run / "summary.json").write_text(json.dumps({**done, "study_digest": "sha256:other"}), encoding="utf-8")
    with pytest.raises(StateError, match="belongs to another study"):
        gather(run)
