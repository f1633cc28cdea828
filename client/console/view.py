"""The site's view: its pages, and the one action that it has. An approval is a signature, never a session's right."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

from privet.client.budget.accounts import Spending
from privet.client.checks import Check
from privet.client.console import reading
from privet.client.console.officer import Budgets, Story, page_values
from privet.client.console.reading import Accounts, Ask, Coordinator, OwnLog
from privet.client.network.lock import is_served
from privet.client.network.proposals import Proposed
from privet.client.policy.agreement import advice, agreement
from privet.client.policy.decisions import decide, decisions, end_of, newest
from privet.client.policy.opinion import judged, price_of, unfit_of
from privet.client.policy.rules import PERSONAL, load_policy
from privet.client.rounds.logbook import COPY
from privet.client.site import SiteConfig, load_site
from privet.client.training.glance import lacking_columns
from privet.common.clock import now
from privet.common.errors import StateError
from privet.common.web.app import Asked, Shown, View
from privet.common.web.events import stamps
from privet.common.web.pages import bars
from privet.common.web.paging import piece
from privet.common.web.sessions import Bucket

_TRIES, _TRY_RATE = 5, 1 / 60
_ROWS, _STUDIES = 100, 50
"""Rounds, and proposed studies, of a page."""
_POINTS = 300
"""Most points of a curve, about."""
_TEMPLATES = Path(__file__).with_name("templates")


class SiteView:
    """What the console of one site shows.

    Args:
        file: The site file. It is read for each page, so a change shows at once.
        ask: Asks the coordinator for its studies.
        examine: Checks the site as `privet site doctor` does.
    """

    def __init__(self, file: Path, ask: Ask, examine: Callable[[], Sequence[Check]]) -> None:
        self._file, self._coordinator, self._examine = file, Coordinator(ask), examine
        self._accounts: Accounts | None = None
        self._officer: tuple[Budgets, Story] | None = None
        # A passphrase can be guessed through an open session: this bounds how often, whatever the session.
        self._tries = Bucket(_TRIES, _TRY_RATE, time.monotonic)
        self._deciding = threading.Lock()

    def view(self) -> View:
        """Return its routes."""
        return View(
            _TEMPLATES,
            {
                "/": self._inbox,
                "/study/{digest}": self._study,
                "/left": self._left,
                "/budget": self._budget,
                "/privacy": self._privacy,
                "/checks": self._checks,
            },
            {"/study/{digest}/decide": self._decide},
            self._look,
        )

    def _look(self) -> object:
        site = load_site(self._file)
        files: list[Path | None] = [self._file, site.policy, site.approvals, *reading.ledger_files(site)]
        if site.approvals is not None:
            files.append(site.approvals.with_name(f"{site.approvals.name}.signed"))
        if site.log is not None:
            files.append(site.log.state / COPY)
        return stamps(each for each in files if each is not None), self._coordinator.version

    def _own(self) -> tuple[SiteConfig, Accounts]:
        site = load_site(self._file)
        if self._accounts is None or self._accounts.site != site:
            self._accounts, self._officer = Accounts(site, OwnLog(site)), (Budgets(site), Story(site))
        return site, self._accounts

    def _common(self, site: SiteConfig, active: str) -> dict[str, Any]:
        return {"site": site.name, "active": active, "served": is_served(site), "place": str(self._file)}

    def _names(self) -> Mapping[str, str]:
        return {each.study.digest: each.study.name for each in self._coordinator.heard().proposals}

    # Pages

    def _inbox(self, asked: Asked) -> Shown:
        site, accounts = self._own()
        heard = self._coordinator.heard()
        books = accounts.books(self._coordinator.heard().said)
        found = reading.offered(site, heard)
        values = {
            "listed": piece(found, asked.query, _STUDIES, lambda each: each.proposed.study.name),
            "heard": heard,
            "books": books,
            "bar_segments": _bar(books),
            "left": books.left[:5],
        }
        return Shown("inbox.html", {**self._common(site, "inbox"), **values})

    def _study(self, asked: Asked) -> Shown:
        site, _ = self._own()
        return self._shown(site, self._proposed(asked.path["digest"]), asked)

    def _shown(self, site: SiteConfig, proposed: Proposed, asked: Asked, wrong: str = "") -> Shown:
        study, heard = proposed.study, self._coordinator.heard()
        opinion = judged(site, study)
        price, lacking = price_of(site, study), lacking_columns(site, study)[0]
        before = reading.last_approved(site, heard.proposals, study)
        persons = 1 if site.policy is None else load_policy(site.policy).persons
        made = decisions(site) if site.approvers else ()
        values = {
            "proposed": proposed,
            "study": study,
            "lines": agreement(site, study, f"the coordinator, as run {proposed.run}.", price, lacking),
            "rules": reading.verdict_lines(site, [each for each in opinion.findings if each.code not in PERSONAL]),
            "against": opinion.against,
            "advice": advice(site, opinion.against, str(self._file), proposed.run),
            "budget": opinion.budget,
            "price": price,
            "bar_segments": _price_bar(price),
            "before": before,
            "changes": [] if before is None else reading.differences(before.study, study),
            "approvers": sorted(site.approvers),
            "persons": persons,
            "decided": newest(made, study.digest).values(),
            "waits": opinion.waits,
            "tomorrow": (now() + timedelta(days=1)).date().isoformat(),
            "wrong": wrong,
            "kept": asked.form if wrong else {},
        }
        return Shown("study.html", {**self._common(site, "inbox"), **values}, 409 if wrong else 200)

    def _left(self, asked: Asked) -> Shown:
        site, accounts = self._own()
        books = accounts.books(self._coordinator.heard().said)
        values = {"books": books, "log": accounts.log, "listed": piece(books.left, asked.query, _ROWS)}
        return Shown("left.html", {**self._common(site, "left"), **values})

    def _budget(self, asked: Asked) -> Shown:
        site, accounts = self._own()
        books, names = accounts.books(self._coordinator.heard().said), self._names()
        values = {"books": books, "bar_segments": _bar(books), "names": names, "curve": _curve(books)}
        return Shown("budget.html", {**self._common(site, "budget"), **values})

    def _privacy(self, asked: Asked) -> Shown:
        site, _ = self._own()
        budgets, story = self._officer or (Budgets(site), Story(site))
        values = page_values(site, self._file, budgets, story, self._coordinator.heard().said, now())
        bars_of = {each.name: _spent_bar(each.spending) for each in values["datasets"].value or ()}
        return Shown(
            "privacy.html", {**self._common(site, "privacy"), **values, "bars": bars_of, "names": self._names()}
        )

    def _checks(self, asked: Asked) -> Shown:
        site, _ = self._own()
        return Shown("checks.html", {**self._common(site, "checks"), "checks": self._examine()})

    # The action

    def _decide(self, asked: Asked) -> Shown:
        site, _ = self._own()
        proposed, form = self._proposed(asked.path["digest"]), asked.form
        try:
            self._signed(site, proposed, form)
        except StateError as error:
            return self._shown(site, proposed, asked, error.message)
        return Shown(to=f"/study/{proposed.study.digest.removeprefix('sha256:')}")

    def _signed(self, site: SiteConfig, proposed: Proposed, form: Mapping[str, str]) -> None:
        """Check what `privet site approve` checks, and sign as it does."""
        if not self._tries.take():
            raise StateError("too many passphrases were tried", "wait a minute")
        approves = form.get("decision") == "approve"
        if not approves and form.get("decision") != "refuse":
            raise StateError("expected to approve or to refuse", "choose one")
        if approves and proposed.ended:
            raise StateError("the run has ended", "approve another one")
        if approves:
            opinion = judged(site, proposed.study)
            objection = opinion.budget or (None if opinion.against else unfit_of(site, proposed.study))
            if opinion.against:
                codes = ", ".join(each.code for each in opinion.against)
                raise StateError(f"the policy refuses it: {codes}", "see what would admit it")
            if objection is not None:
                raise StateError(objection.message, objection.hint)
        with self._deciding:
            decide(
                site,
                proposed.study,
                form.get("by", ""),
                form.get("passphrase", "").strip().encode(),
                "approve" if approves else "refuse",
                reason=form.get("reason", ""),
                until=_day(form.get("until", "")) if approves else None,
                now=now(),
            )
        self._tries.give_back()

    def _proposed(self, digest: str) -> Proposed:
        """Return the proposed study with exactly this digest."""
        for each in self._coordinator.heard().proposals:
            if each.study.digest == f"sha256:{digest}":
                return each
        raise StateError(
            "the coordinator does not propose this study now", "list what is proposed: `privet site studies SITE`"
        )


def _day(text: str) -> datetime | None:
    """Return the end of a day, as a form sends it; None where none was chosen."""
    if not text:
        return None
    if not re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        raise StateError(f"the last day: expected a date such as 2027-01-31, found {text[:20]!r}", "choose a day")
    try:
        return end_of(date.fromisoformat(text))
    except ValueError:
        raise StateError("the last day is no day of the calendar", "choose a day") from None


def _bar(books: reading.Books) -> list[dict[str, Any]]:
    return [] if books.spending is None else _spent_bar(books.spending)


def _spent_bar(spending: Spending) -> list[dict[str, Any]]:
    reserved = max(spending.counted - spending.epsilon, 0.0)
    return bars([("spent", spending.epsilon), ("reserved", reserved)], spending.limit.epsilon)


def _price_bar(price: Any) -> list[dict[str, Any]]:
    if price is None:
        return []
    more = max(price.after - price.counted, 0.0)
    return bars([("spent", price.counted), ("asked", more)], max(price.limit.epsilon, price.after))


def _curve(books: reading.Books) -> list[tuple[str, str]]:
    """Return the points of the epsilon over the rounds that the round log states, in a box of 600 by 160."""
    stated = [each.stated.epsilon for each in reversed(books.left) if each.stated and each.stated.epsilon is not None]
    if books.spending is None or len(stated) < 2:
        return []
    stated = [*stated[: -1 : -(-len(stated) // _POINTS)], stated[-1]]
    top, step = max(books.spending.limit.epsilon, max(stated)), 600 / (len(stated) - 1)
    return [(f"{number * step:.1f}", f"{160 - 150 * each / top:.1f}") for number, each in enumerate(stated)]
