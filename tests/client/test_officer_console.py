"""The privacy officer's page: promises, costs over the years, tests, releases, decisions, withdrawals and terms."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from privet.client.budget.accounts import Item, Limit, composed_epsilon, paid_rounds
from privet.client.budget.releases import limit_of, open_ledger
from privet.client.console import officer
from privet.client.console.officer import Budgets, Story, by_year, factor_of, own_tests, releases, statements
from privet.client.console.reading import Said
from privet.client.console.view import SiteView
from privet.client.network.candidates import FOLDER, TEST
from privet.client.rounds.history import kept_leaves
from privet.client.rounds.logbook import COPY
from privet.client.site import load_site
from privet.common.clock import now
from privet.common.errors import StateError
from privet.common.log.replay import Replay
from privet.common.web.app import Console
from privet.server.commands import gate as deciding
from privet.server.consortium.registry import logged_history
from tests.client.test_adapters import play, study_of
from tests.client.test_candidates import GATE, said_by, write_reviews
from tests.support.console import HOST, Visitor
from tests.support.consortium_world import World, run
from tests.support.finished import finished_site
from tests.support.site_world import ready
from tests.support.synthetic import start_adapter

HOSTILE = "<img src=x onerror=alert(1)>"
FIGURES = {
    "canary": {"epsilon": 0.7, "canaries": 500, "guesses": 100, "right": 60},
    "membership": {"upper": 0.55, "loss": {"auc": 0.5, "interval": [0.4, 0.55]}},
    "repeated": {"answers": 64, "repeated": 1, "upper": 0.08},
}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_site(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def file(unpacked: Path, tmp_path: Path) -> Path:
    """The site file of a site whose one run has finished."""
    return Path(shutil.copytree(unpacked.parent, tmp_path / "site")) / unpacked.name


def visit(file: Path, said: Said | None = None) -> Visitor:
    view = SiteView(file, lambda: said or Said(), lambda: ())
    return Visitor(Console(view.view(), {HOST}))


def page_of(file: Path, said: Said | None = None) -> str:
    """Return the officer's page, without marks of HTML."""
    answer = visit(file, said).get("/privacy")
    assert answer.status_code == 200
    assert "<img" not in answer.text
    return " ".join(re.sub("<[^>]+>", " ", answer.text).split())


def keep_test(file: Path, name: str, **changes: object) -> None:
    """Keep a test of a candidate, as `privet gate test` does."""
    folder = file.parent / FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    document = {"adapter": "a", "tested": sorted(FIGURES), "failed": [], "canaries": None, "figures": FIGURES}
    (folder / TEST).write_text(json.dumps(document | changes))


# Budgets


def test_years_are_composed_and_end_at_what_the_ledger_has_spent(file: Path) -> None:
    site = load_site(file)
    (dataset,) = Budgets(site).all()
    assert (dataset.name, dataset.present) == (site.dataset, True)
    assert dataset.years[-1].epsilon == dataset.spending.epsilon > 0
    assert sum(each.rounds for each in dataset.years) == sum(each.charged for each in dataset.spending.studies)
    # The same history over three years: each year adds its rounds, and no year's epsilon is added to another's.
    ledger, limit = open_ledger(site), limit_of(site)
    assert limit is not None
    try:
        items = ledger.items(str(site.dataset))
        assert ledger.datasets() == (site.dataset,)
    finally:
        ledger.close()
    charged = [each for each in items if each.charged]
    years = by_year([(year, each) for year in (2024, 2025, 2027) for each in charged], limit)
    assert [each.year for each in years] == [2024, 2025, 2027]
    assert years[0].epsilon == composed_epsilon(paid_rounds(charged), limit)
    assert years[0].epsilon < years[1].epsilon < years[2].epsilon < 3 * years[0].epsilon
    assert by_year([(2024, Item("s", None, True, 1))], limit)[0].epsilon == float("inf")
    assert by_year([], Limit("record", 1.0, 1e-5)) == ()


def test_a_site_without_limit_or_with_a_changed_ledger_says_so_and_shows_the_rest(file: Path) -> None:
    site = load_site(file)
    assert Budgets(site.model_copy(update={"limit": None})).all() == ()
    assert site.ledger is not None
    for path in site.ledger.parent.glob(f"{site.ledger.name}*"):  # a write-ahead log beside it would mend it
        path.write_bytes(b"broken")
    found = page_of(file)
    assert "This part cannot be read" in found
    assert "Withdrawals This site has recorded no withdrawal." in found
    # The promise stands in the round log; what this site paid does not.
    assert "so this repeats what the study promised" in found


# Statements


def test_a_finished_run_has_a_statement_in_plain_words(file: Path) -> None:
    site = load_site(file)
    history = Story(site).history(Said())
    (dataset,) = Budgets(site).all()
    made = statements(history, site.name, dataset.spending)
    assert [each.run for each in made] == [name for name, each in history.runs.items() if each.ended]
    (said,) = made
    paid = next(each for each in dataset.spending.studies if each.charged)
    assert said.paid == paid.charged
    assert said.epsilon == paid.epsilon
    assert float(said.factor) >= 2.718**said.epsilon
    found = page_of(file)
    assert f"differs by a factor of at most {said.factor}, and by at most {said.delta} more" in found
    assert ("holds for the sum over sites" if said.shared else "holds against everybody outside the site") in found
    assert statements(history, "nobody", dataset.spending) == []
    assert statements(Replay(), site.name, dataset.spending) == []


def test_a_factor_is_never_rounded_down() -> None:
    assert [factor_of(each) for each in (0.0, 0.1, 1.0, 8.0, 21.0, float("inf"))] == [
        "1.00", "1.11", "2.72", "2981", "\u221e", "\u221e",
    ]  # fmt: skip


def test_a_log_that_this_site_did_not_cosign_tells_nothing(file: Path) -> None:
    copy = file.parent / "state/log" / COPY
    leaves, data = tuple(kept_leaves(copy)), copy.read_bytes()
    assert Story(load_site(file)).history(Said()).runs
    copy.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(StateError, match="holds no checkpoint that the site cosigned"):
        Story(load_site(file)).history(Said())
    found = page_of(file)
    assert "holds no checkpoint that the site cosigned" in found
    assert "differs by a factor" not in found
    copy.unlink()
    with pytest.raises(StateError, match=f"has 9 of the {len(leaves)} leaves"):
        Story(load_site(file)).history(Said((), 0, leaves[:9]))
    assert Story(load_site(file)).history(Said((), 0, leaves)).runs  # the same leaves, from the coordinator


# Tests and releases


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A consortium of two: one run without a gate, one that both signed, and one that a site refuses."""
    with ready(tmp_path_factory.mktemp("consortium")) as made:
        play(made, "free", start_adapter(3))
        for number, name in enumerate(("flu", "copd")):
            play(made, name, start_adapter(number), study_of(name, gate=GATE))
        home = made.coordinator.directory
        for site in ("berlin", "lyon"):
            made.service(site).review(said_by(made, site, "flu"))
        refusal = {"verdict": "refused", "failed": ("membership",), "reason": HOSTILE}
        made.service("lyon").review(said_by(made, "lyon", "copd", **refusal))
        write_reviews(made)
        run(deciding.decide, "flu", "-C", home)
        run(deciding.decide, "copd", "--refuse", "a site refuses it", "-C", home)
        yield made


def test_releases_say_who_signed_and_who_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    history = logged_history(world.coordinator)
    found = {each.run: each for each in releases(history, now())}
    assert list(found) == ["copd", "flu", "free"]
    assert (found["flu"].state, found["flu"].signed, found["flu"].needed) == ("accepted", ("berlin", "lyon"), 2)
    assert (found["copd"].state, found["copd"].signed, found["copd"].reason) == ("refused", (), "a site refuses it")
    assert (found["free"].state, found["free"].needed) == ("released", 0)
    late = {each.run: each.state for each in releases(history, datetime(2099, 1, 1, tzinfo=UTC))}
    assert late["flu"] == "expired"
    monkeypatch.setattr(officer.Story, "history", lambda *_: history)
    page = page_of(world.folder / "berlin/site.toml")
    assert "2 of 2 needed signatures: berlin, lyon" in page
    assert f"lyon refuses: {HOSTILE.replace('<', '&lt;').replace('>', '&gt;')} (membership)" in page
    assert "The study had no gate" in page


def test_attacks_stand_beside_the_claim(world: World, tmp_path: Path) -> None:
    history = logged_history(world.coordinator)
    for name, claim, refuted in (("flu", 1.0, False), ("copd", 0.5, True)):
        keep_test(tmp_path / "site.toml", name, failed=["membership"])
        opened = history.runs[name].statement
        private = Replay()
        private.runs = {
            name: replace(history.runs[name], statement=opened.model_copy(update={"privacy": _Claim(claim)}))
        }
        found = {each.attack: each for each in own_tests(tmp_path / FOLDER, private) if each.run == name}
        assert found["canary"].contradicts is refuted
        assert (found["membership"].failed, found["membership"].allowed) == (True, 0.6)
        assert found["repeated"].allowed is None
    # Of a run that the log does not hold, the figures are shown and no claim.
    assert [each.claim for each in own_tests(tmp_path / FOLDER, Replay())] == [None] * 6


class _Claim:
    """The privacy of a run, as far as a claim needs it."""

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon


def test_figures_have_intervals_and_a_broken_test_hides_no_other_part(file: Path) -> None:
    keep_test(file, "first", failed=["repeated"])
    found = page_of(file)
    assert "ε is at least 0.7; 60 of 100 guesses about 500 canaries were right" in found
    assert "AUC 0.500 (0.400 to 0.550); at most 0.550 over all attacks" in found
    assert "1 of 64 answers repeat training text; at most a share of 0.080" in found
    assert "not refuted" in found
    wrong: list[dict[str, object]] = [
        {"figures": {"canary": {}}},
        {"figures": {HOSTILE: {}}},
        {"figures": []},
        {"failed": None},
    ]
    for each in wrong:
        keep_test(file, "first", **each)
        with pytest.raises(StateError, match="cannot be read"):
            own_tests(file.parent / FOLDER, Replay())
    found = page_of(file)
    assert "test.json cannot be read" in found
    assert "Privacy statements of finished runs" in found


# The rest


def test_what_is_kept_falls_due_and_nobody_withdrawn_is_shown(file: Path) -> None:
    found = page_of(file)
    assert "Nothing is due" in found
    assert "these are privet's defaults" in found.replace("&#39;", "'")
    shutil.copytree(file.parent / "state/log", file.parent / "dossiers/old")
    (file.parent / "dossiers/old/dossier.json").write_text("{}")
    for path in (file.parent / "dossiers/old").rglob("*"):
        os.utime(path, (1e9, 1e9))
    found = page_of(file)
    assert "Due: 1." in found
    assert "dossier 2001-09-09 2011-09-09 due" in found
    site = load_site(file)
    assert officer.withdrawal(site) == "nobody"
    assert officer.decided(site).signed == ()


def test_a_console_loads_no_model_and_no_library_before_it_is_needed() -> None:
    code = (
        "import sys, privet.client.console.view, privet.client.commands.console, privet.client.commands.doctor;"
        "import privet.common.web.app, privet.common.web.serving;"
        "print(*sorted({'torch', 'transformers', 'peft', 'scipy', 'grpc', 'flwr', 'tokenizers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_console_has_epsilons_computed_apart_and_stays_small(file: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from unittest import mock;"
        "from privet.client.commands.console import _view; from privet.common.web.app import Asked;"
        "from privet.common.web.sessions import Role, Session; from privet.common.web.texts import Texts;"
        "view = _view(Path(sys.argv[1])); asked = Asked(Session(Role.VIEWER, 0, 0), Texts('en'));"
        "shown = {path: view.pages[path](asked).values for path in ('/', '/left', '/budget', '/privacy', '/checks')};"
        "print(shown['/budget']['books'].spending.epsilon);"
        "print(*sorted({'torch', 'transformers', 'peft', 'scipy', 'flwr', 'tokenizers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    told, loaded = done.stdout.splitlines()
    site = load_site(file)
    ledger, limit = open_ledger(site), limit_of(site)
    assert limit is not None
    assert float(told) == ledger.statement(str(site.dataset), limit).epsilon
    ledger.close()
    assert loaded == ""
