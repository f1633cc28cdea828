"""What a run tells while it waits: who is missing and why, by name, and how a terminal and a file are told."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import get_args

import pytest

from privet.common.errors import TooFewSitesError
from privet.common.secagg.encoding import KIND_NUMBERS
from privet.common.secagg.messages import (
    BlockParameters,
    DealDelivery,
    DealtParameters,
    Delivery,
    Expected,
    Finish,
    LinkDelivery,
    Parameters,
    Proof,
    Roster,
    Signed,
    Step,
    Survivors,
)
from privet.common.study.messages import Failure
from privet.server.commands.screen import Screen
from privet.server.rounds.consent import _why
from privet.server.rounds.rounds import run_study
from privet.server.rounds.state import RunDirectory
from privet.server.rounds.wait import CONSENT, Wait, details, sentence, several
from privet.server.rounds.watch import _SECURED, COSIGN, TRAIN, Watch
from privet.simulations.scenarios import network
from tests.support.logged_world import QUICK, LoggedWorld, world_of
from tests.support.masked_world import masked_study


def played(world: LoggedWorld) -> list[Wait]:
    """Return what a run told, with its sites' names known by their nodes."""
    told: list[Wait] = []
    owners = {node: site.name for node, site in world.exchange.sites.items()}
    with world.journal() as journal:
        run_study(world.log(journal), world.exchange, timing=QUICK, watch=Watch(told.append, lambda: owners))
    return told


def test_every_message_to_a_site_has_a_stage() -> None:
    """Also of the kinds of block; the simulated network knows them all too."""
    sent = {Roster, Delivery, LinkDelivery, DealDelivery, Step, Expected, Finish, Survivors, Proof}
    assert set(_SECURED) == sent
    assert set(network._ASKED) == sent
    # All others are a site's, or open a round.
    assert set(KIND_NUMBERS) - sent - set(get_args(Signed)) == {Parameters, BlockParameters, DealtParameters}


def test_every_stage_of_a_round_is_told_with_the_sites_by_name(tmp_path: Path) -> None:
    told = played(world_of(tmp_path, masked_study(training={"rounds": 1})))
    stages = [stage for stage, _ in groupby((wait.stage, wait.round) for wait in told)]
    assert stages == [
        (CONSENT, 0),
        (COSIGN, 0),
        ("send keys for the masks", 1),
        ("exchange shares of the masks", 1),
        (TRAIN, 1),
        ("confirm whose updates arrived", 1),
        ("reveal shares of the masks", 1),
        (COSIGN, 0),
    ]
    training = [wait for wait in told if wait.stage == TRAIN]
    assert [len(wait.missing) for wait in training] == [3, 2, 1, 0]
    assert set(training[0].missing) == {"site-0000", "site-0001", "site-0002"} == set(training[-1].answered)


def test_a_site_that_does_not_consent_is_told_with_its_reason(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 1}))
    world.sites["site-0001"].refuses = True
    world.exchange.sites = {node: site for node, site in world.exchange.sites.items() if site.name != "site-0002"}
    told: list[Wait] = []
    owners = {node: site.name for node, site in world.exchange.sites.items()}
    with world.journal() as journal, pytest.raises(TooFewSitesError) as caught:
        run_study(world.log(journal), world.exchange, timing=QUICK, watch=Watch(told.append, lambda: owners))
    assert told[-1].answered == ("site-0000",)
    assert told[-1].missing == {"site-0001": "not today", "site-0002": "not connected"}
    assert "\n  site-0001: not today\n  site-0002: not connected" in caught.value.message
    assert "node" not in caught.value.message


def test_the_hint_of_a_site_does_not_steer_the_terminal() -> None:
    """Attack: a site answers as if the coordinator itself had refused, with a hint that moves the cursor."""
    said = _why(Failure("ProtocolError", "no room", "raise it\x1b[2J"))
    assert said == "no room (raise it?[2J)"
    assert _why(Failure("PolicyError", "not today", "ask")) == "not today"


def test_a_refusal_is_asked_about_again_while_there_are_too_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privet.server.rounds.consent._AGAIN", 0.0)
    monkeypatch.setattr("privet.server.rounds.consent._POLL", 0.01)
    world = world_of(tmp_path, masked_study(training={"rounds": 1}))
    world.sites["site-0001"].refuses = True

    told: list[str] = []

    def approves(wait: Wait) -> None:
        told.append(wait.missing.get("site-0001", "gone") if wait.stage == CONSENT else "gone")
        if told[-1] == "not today":
            world.sites["site-0001"].refuses = False

    owners = {node: site.name for node, site in world.exchange.sites.items()}
    with world.journal() as journal:
        timing = replace(QUICK, gathering=20.0)
        state = run_study(world.log(journal), world.exchange, timing=timing, watch=Watch(approves, lambda: owners))
    assert state.stopped
    reasons = [why for why in told if why != "gone"]
    assert set(reasons[reasons.index("not today") :]) == {"not today"}  # shown while it is asked again, too


def test_a_repeated_stage_has_been_waited_for_since_it_began() -> None:
    told: list[Wait] = []
    watch = Watch(told.append)
    watch.waits(Wait(COSIGN, missing={"lyon": ""}))
    watch.waits(Wait(COSIGN, answered=("lyon",)))
    watch.waits(Wait(COSIGN, answered=("lyon",)))  # no news
    watch.waits(Wait(TRAIN, 1))
    assert len(told) == 3
    assert told[0].since == told[1].since > 0
    assert watch.names([7, 3]) == {3: "unnamed site 1", 7: "unnamed site 2"}


def test_sentences() -> None:
    wait = Wait(TRAIN, 2, 0, ("berlin",), {"lyon": "", "paris": ""}, since=0.0)
    assert sentence(wait, 200.0).startswith("round 2: waiting for lyon, paris to train, since ")
    assert sentence(wait, 200.0).endswith("(3 min); 1 of 3 have")
    assert "every site has answered; computing" in sentence(replace(wait, missing={}), 1.0)
    consent = Wait(CONSENT, 0, 3, ("berlin",), {"lyon": "", "paris": "no\x1b[2J"}, since=0.0)
    assert sentence(consent, 5.0).endswith("(5 s); 1 of the 3 sites needed have agreed")
    nobody = replace(consent, answered=())
    assert sentence(nobody, 5.0).endswith("; none of the 3 sites needed has agreed yet")
    assert details(consent) == ["  lyon: connected, has not answered yet", "  paris: no?[2J"]
    long = details(replace(consent, missing={"paris": "allowed a study " * 80}))
    assert long[0].endswith(("allowed a study ...", "allowed a ...", "allowed ..."))
    assert several([str(n) for n in range(8)]) == "0, 1, 2, 3, 4 and 3 others"


def test_a_file_gets_a_line_for_news_of_consent_and_for_what_lasts() -> None:
    out, now = io.StringIO(), [100.0]
    screen = Screen(out, lambda: now[0], terminal=False)
    consent = Wait(CONSENT, 0, 2, (), {"lyon": "not connected"}, since=100.0)
    screen.tell(consent)
    assert out.getvalue().splitlines()[1:] == ["  lyon: not connected"]
    screen.tell(replace(consent, answered=("berlin",)))  # who is missing, and why, has not changed
    assert len(out.getvalue().splitlines()) == 2
    for stage in ("send keys for the masks", TRAIN):  # passes in no time: no line
        screen.tell(Wait(stage, 1, 0, (), {"lyon": ""}, since=100.0))
    assert len(out.getvalue().splitlines()) == 2
    for now[0] in (101.0, 103.0, 110.0, 164.0):
        screen.tick()
    lines = out.getvalue().splitlines()[2:]
    assert [line.split(",")[0] for line in lines] == ["round 1: waiting for lyon to train"] * 2
    assert "\x1b" not in out.getvalue()


def test_a_file_repeats_once_a_minute_who_has_not_consented() -> None:
    out, now = io.StringIO(), [100.0]
    screen = Screen(out, lambda: now[0], terminal=False)
    screen.tell(Wait(CONSENT, 0, 2, (), {"lyon": "not connected"}, since=100.0))
    for now[0] in (102.0, 159.0, 161.0, 219.0):
        screen.tick()
    assert out.getvalue().splitlines()[1::2] == ["  lyon: not connected"] * 2


def test_a_terminal_has_one_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out, now = io.StringIO(), [100.0]
    screen = Screen(out, lambda: now[0], terminal=True)
    screen.tell(Wait(TRAIN, 1, 0, (), {"lyon": ""}, since=100.0))
    with screen.ticking():
        screen.say("round 1: done")
    assert "\n" not in out.getvalue()
    assert all(len(part.removesuffix("\x1b[K")) <= 39 for part in out.getvalue().split("\r"))


def test_a_run_without_room_for_its_note_goes_on(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 1}))
    run = RunDirectory.open(world.folder / "run")
    (run.path / "waiting.json").mkdir()
    run.note_wait(Wait(TRAIN, 1))
    assert run.waiting is None
