"""One round's collection: an exact sum of what is valid, and a named reason for everything else."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.common.errors import TooFewSitesError
from privet.common.study.messages import Consent, Contribution, Failure, Message, Offer, RoundOpen
from privet.common.study.sections import AggregationSection
from privet.server.rounds.collect import Shape, collect
from privet.server.rounds.participants import Participant, RoundSum

D, K = 6, 3
SITES = ("alder", "birch", "cedar", "dogwood")
OPENED = RoundOpen({"name": "x"}, 3, "nonce", "digest", SITES, b"adapter")
seeds = st.integers(0, 2**32 - 1)


@dataclass
class Replies:
    """An exchange that answers with what it was given, in that order."""

    replies: Mapping[int, Message]
    asked: Mapping[int, Message] | None = None
    timeout: float | None = None

    def nodes(self) -> Sequence[int]:
        return sorted(self.replies)

    def ask(self, requests: Mapping[int, Message], *, timeout: float) -> Iterable[tuple[int, Message]]:
        self.asked, self.timeout = requests, timeout
        return self.replies.items()


# Node numbers fall as names rise, so that neither order can stand in for the other.
COHORT = {site: Participant(9 - i, Consent(site, "study", "spec", 2 * i + 1)) for i, site in enumerate(SITES)}


def contributions(seed: int = 0, scale: float = 1.0) -> dict[str, Contribution]:
    rng = np.random.default_rng(seed)
    return {
        site: Contribution(
            site,
            OPENED.round,
            OPENED.nonce,
            float(member.consent.weight),
            (scale * rng.standard_normal(D)).astype(np.float32),
            rng.standard_normal(K),
        )
        for site, member in COHORT.items()
    }


def run(
    replies: Mapping[str, Message], min_sites: int = 1, weighting: Literal["declared", "equal"] = "declared"
) -> RoundSum:
    exchange = Replies({COHORT[site].node: reply for site, reply in replies.items()})
    return collect(
        exchange,
        COHORT,
        OPENED,
        Shape(D, K, AggregationSection(weighting=weighting).weight),
        min_sites=min_sites,
        timeout=5,
    )


@given(seeds, st.permutations(SITES), st.sampled_from([1e-20, 1.0, 1e20]))
def test_the_sum_is_numpys_in_name_order_whatever_the_order_of_replies(
    seed: int, order: list[str], scale: float
) -> None:
    sent = contributions(seed, scale)
    total = run({site: sent[site] for site in order})
    update, metrics = np.zeros(D), np.zeros(K)
    for site in sorted(SITES):
        update = update + sent[site].update.astype(np.float64)
        metrics = metrics + sent[site].metrics
    assert total.update.dtype == np.float64
    assert total.update.tobytes() == update.tobytes()
    assert total.metrics.tobytes() == metrics.tobytes()
    assert total.weight == 1 + 3 + 5 + 7
    assert total.survivors == SITES
    assert total.failures == {}


def test_every_member_is_asked_the_same_at_its_own_address() -> None:
    exchange = Replies({COHORT[site].node: reply for site, reply in contributions().items()})
    collect(exchange, COHORT, OPENED, Shape(D, K, float), min_sites=1, timeout=5)
    assert exchange.asked == {member.node: OPENED for member in COHORT.values()}
    assert exchange.timeout == 5


def of_nan(values: np.ndarray) -> np.ndarray:
    return np.where(np.arange(values.size) == 1, np.nan, values).astype(values.dtype)


Spoil = Callable[[Contribution], Message | None]
BAD: dict[str, tuple[Spoil, str]] = {
    "silence": (lambda c: None, "the site did not answer before the deadline of the round"),
    "another site": (lambda c: replace(c, site="alder"), "another value in its field site than"),
    "an unknown site": (lambda c: replace(c, site="elder"), "another value in its field site than"),
    "another round": (lambda c: replace(c, round=2), "another value in its field round than"),
    "another nonce": (lambda c: replace(c, nonce="other"), "another value in its field nonce than"),
    "another weight": (lambda c: replace(c, weight=c.weight + 1), "another value in its field weight than"),
    "no weight": (lambda c: replace(c, weight=0.0), "another value in its field weight than"),
    "nan weight": (lambda c: replace(c, weight=float("nan")), "another value in its field weight than"),
    "short update": (
        lambda c: replace(c, update=c.update[:-1]),
        f"must have {D} values in its field update, found {D - 1}",
    ),
    "long update": (
        lambda c: replace(c, update=np.zeros(D + 1, np.float32)),
        f"must have {D} values in its field update, found {D + 1}",
    ),
    "no update": (lambda c: replace(c, update=c.update[:0]), f"must have {D} values in its field update, found 0"),
    "nan update": (lambda c: replace(c, update=of_nan(c.update)), "field update that are infinite or not a number"),
    "inf update": (
        lambda c: replace(c, update=c.update / np.float32(0)),
        "field update that are infinite or not a number",
    ),
    "no metrics": (lambda c: replace(c, metrics=c.metrics[:0]), f"must have {K} values in its field metrics, found 0"),
    "nan metrics": (lambda c: replace(c, metrics=of_nan(c.metrics)), "field metrics that are infinite or not a number"),
    "vast metrics": (lambda c: replace(c, metrics=np.full(K, 1e308)), "has a validation sum above 2^53"),
    "a failure": (lambda c: Failure("DataError", "empty", "look"), "empty"),
    "an offer": (lambda c: Offer({}), "found a message of type offer"),
    "a consent": (lambda c: Consent(c.site, "s", "s", 1), "found a message of type consent"),
    "an echo": (lambda c: OPENED, "found a message of type round-open"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("bad", ["birch", "dogwood"])
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_bad_contribution_is_left_out_and_named(kind: str, bad: str) -> None:
    spoil, said = BAD[kind]
    sent = contributions()
    replies: dict[str, Message | None] = {**sent, bad: spoil(sent[bad])}
    total = run({site: reply for site, reply in replies.items() if reply is not None})
    rest = [site for site in SITES if site != bad]
    assert total.survivors == tuple(rest)
    assert list(total.failures) == [bad]
    assert said in total.failures[bad].message
    assert np.array_equal(total.update, sum((sent[s].update.astype(np.float64) for s in rest), np.zeros(D)))
    assert total.weight == sum(sent[s].weight for s in rest)


def test_sites_cannot_swap_their_contributions() -> None:
    sent = contributions()
    total = run({**sent, "alder": sent["birch"], "birch": sent["alder"]})
    assert total.survivors == ("cedar", "dogwood")


def test_a_failure_keeps_its_own_words() -> None:
    failure = Failure("DataError", "no rows", "add some")
    assert run({**contributions(), "cedar": failure}).failures == {"cedar": failure}


def test_equal_weighting_takes_one_and_nothing_else() -> None:
    sent = {site: replace(c, weight=1.0) for site, c in contributions().items()}
    assert run(sent, weighting="equal").weight == 4.0
    # Only alder declared the weight 1.
    assert run(sent, weighting="declared").survivors == ("alder",)


def test_an_answer_from_a_stranger_is_not_looked_at() -> None:
    exchange = Replies({**{COHORT[s].node: c for s, c in contributions().items()}, 77: Failure("X", "y", "z")})
    total = collect(exchange, COHORT, OPENED, Shape(D, K, float), min_sites=4, timeout=5)
    assert total.survivors == SITES
    assert total.failures == {}


@pytest.mark.parametrize("min_sites", [1, 2, 3, 4])
@pytest.mark.parametrize("delivered", [0, 1, 2, 3, 4])
def test_too_few_sites_end_the_round_with_every_reason(min_sites: int, delivered: int) -> None:
    sent = contributions()
    replies: dict[str, Message] = {site: sent[site] for site in SITES[:delivered]}
    if delivered < 4:
        replies[SITES[delivered]] = Failure("BudgetExhaustedError", "nothing left", "ask the site")
    if delivered >= min_sites:
        assert run(replies, min_sites).survivors == SITES[:delivered]
        return
    with pytest.raises(TooFewSitesError) as caught:
        run(replies, min_sites)
    message = caught.value.message
    assert f"round 3: {delivered} of 4 sites delivered, the study demands {min_sites}" in message
    assert f"\n  {SITES[delivered]}: nothing left" in message
    assert all(
        f"\n  {site}: the site did not answer before the deadline of the round" in message
        for site in SITES[delivered + 1 :]
    )
    assert not any(f"\n  {site}:" in message for site in SITES[:delivered])
    assert caught.value.hint == "ask the site"


@given(seeds)
def test_which_sites_fail_does_not_change_how_the_rest_is_summed(seed: int) -> None:
    sent = contributions(seed)
    for chosen in itertools.combinations(SITES, 2):
        total = run({site: sent[site] for site in chosen})
        expected = sent[chosen[0]].update.astype(np.float64) + sent[chosen[1]].update.astype(np.float64)
        assert total.update.tobytes() == expected.tobytes()
