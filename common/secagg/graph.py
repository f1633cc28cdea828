"""Which sites mask together, how many shares reconstruct a secret, and the bounds behind both numbers.

Notation: n sites, c of them corrupt and colluding with the coordinator, k neighbours per site (so k + 1
holders of a site's secrets, itself included), threshold t, drop-outs d, h = k / 2. All probabilities are
exact sums of hypergeometric terms in integers, never floating point. HG(N, K, m) is the number of marked
items among m drawn from N of which K are marked.

**Complete graph** (up to 64 sites). It needs 2t > n + c. Of a site's n holders, an honest one reveals a share of
at most one of its two secrets. So at most n + c shares of both together are revealed, and the coordinator never
gets t of each (the condition of Bonawitz et al. 2017, section 6.2, for the active adversary). A round can finish
with n - t drop-outs.

**Harary graph** (above 64 sites). The roster's digest puts the sites on a ring, and each site is a neighbour of
the h nearest on either side. Bell et al. 2020 (ePrint 2020/704, sections 3 and 4) ask that, except with
probability 2^-sigma: (1) no honest site has too many corrupt neighbours, (2) the honest survivors stay connected,
(3) enough neighbours survive. The paper's text was not at hand when this was written. The events and union bounds
below were checked against the authors' own parameter search in
google-parfait/federated-compute, fcp/secagg/server/graph_parameter_finder.cc (commit e7157f0). They differ
from it in three places, on purpose:

* (1) uses HG(n - 1, c, k) per honest site and a union over n sites, as there; but 2t > k + 1 + c_max with
  the owner counted as a holder (there: the neighbours alone), because here the owner keeps a share.
* (2) there assumes that drop-outs are random. Here no such assumption is made, since an active coordinator
  *chooses* them after it has seen the ring. Instead every site checks that each h consecutive places of the ring
  hold more than w survivors, where n * Pr[HG(n, c, h) > w] <= 2^-(sigma + 2). Then every window holds an honest
  survivor. So the next honest survivor on the ring is always a neighbour, and the honest survivors are one
  component. (This excludes a single cut, although two would be needed: it is simpler and stricter.)
* sigma is 80, not 40 as there: a coordinator can try rosters (the keys of its own sites enter the digest), and
  2^40 tries succeed with a probability of 2^-40.

Sites must be corrupted before the ring is known. A coordinator that corrupts sites afterwards is not covered.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass

from privet.common.errors import StudyError

COMPLETE_UP_TO = 64
SECURITY = 80
CORRECTNESS = 20


def quorum(sites: int, corrupt: int) -> int:
    """Return the least q with 2q > sites + corrupt: two sets of q sites share an honest one."""
    return (sites + corrupt) // 2 + 1


@functools.lru_cache(maxsize=4096)
def tail_quantile(population: int, marked: int, drawn: int, tries: int, bits: int) -> int:
    """Return the least m with tries * Pr[HG(population, marked, drawn) > m] <= 2^-bits, computed exactly."""
    budget = math.comb(population, drawn)
    tail = 0
    for m in range(min(marked, drawn), -1, -1):
        tail += math.comb(marked, m) * math.comb(population - marked, drawn - m)
        if (tail * tries) << bits > budget:
            return m
    return 0


def most_corrupt_neighbours(sites: int, corrupt: int, degree: int, security: int) -> int:
    """Return c_max: no honest site has more corrupt neighbours, except with probability 2^-(security + 2)."""
    return tail_quantile(sites - 1, corrupt, degree, sites, security + 2)


def window_minimum(sites: int, corrupt: int, degree: int, security: int) -> int:
    """Return how many survivors each degree / 2 places of the ring must hold: w + 1 of the module's text."""
    return tail_quantile(sites, corrupt, degree // 2, sites, security + 2) + 1


def least_threshold(sites: int, corrupt: int, degree: int, security: int) -> int:
    """Return the least threshold at which no site's two secrets can both be reconstructed.

    Args:
        sites: Sites on the roster.
        corrupt: How many of them may collude with the coordinator.
        degree: Neighbours per site. 0, or at least `sites` - 1, is the complete graph.
        security: Statistical security in bits, for the Harary graph.
    """
    if is_complete(sites, degree):
        return quorum(sites, corrupt)
    return quorum(degree + 1, most_corrupt_neighbours(sites, corrupt, degree, security))


def is_complete(sites: int, degree: int) -> bool:
    """Return whether `degree` neighbours per site (0: all other sites) make the complete graph."""
    return degree == 0 or degree >= sites - 1


@dataclass(frozen=True)
class Choice:
    """Parameters of the sharing.

    Attributes:
        degree: Neighbours per site; 0 for all.
        threshold: Shares that reconstruct a secret.
    """

    degree: int
    threshold: int


@functools.lru_cache(maxsize=256)
def choose(sites: int, corrupt: int, dropouts: int, security: int = SECURITY) -> Choice:
    """Return the cheapest safe degree and threshold for a cohort.

    Args:
        sites: Size of the cohort.
        corrupt: How many sites may collude with the coordinator.
        dropouts: How many sites must be able to drop out, at any stage. In the complete graph a round always
            survives them. In the Harary graph it survives drop-outs that do not depend on the ring, except
            with probability 2^-20.
        security: Statistical security in bits. The text of the module says why it is 80.

    Raises:
        StudyError: No parameters allow so many corrupt sites and drop-outs together.
    """
    if sites < 2 or corrupt < 0 or dropouts < 0:
        raise StudyError(
            f"secure aggregation needs at least 2 sites, and 0 or more corrupt sites and drop-outs; got {sites} sites, "
            f"{corrupt} corrupt sites and {dropouts} drop-outs",
            "gather more sites, and set no number under secure_aggregation in the study below 0",
        )
    q = quorum(sites, corrupt)
    if sites - dropouts < max(q, corrupt + 2):
        raise StudyError(
            f"secure aggregation: {sites} sites, {corrupt} of them corrupt, can lose at most "
            f"{sites - max(q, corrupt + 2)} sites in a round; the study allows {dropouts} drop-outs",
            "lower secure_aggregation.corrupt or secure_aggregation.dropout_fraction in the study, or gather more "
            "sites",
        )
    if sites <= COMPLETE_UP_TO:
        return Choice(0, q)
    for degree in range(2, sites - 1, 2):
        threshold = least_threshold(sites, corrupt, degree, security)
        if _survives(sites, corrupt, dropouts, degree, threshold, security):
            return Choice(degree, threshold)
    return Choice(0, q)


def _survives(sites: int, corrupt: int, dropouts: int, degree: int, threshold: int, security: int) -> bool:
    """Whether random drop-outs leave every site enough holders and every window enough survivors."""
    lost = tail_quantile(sites - 1, dropouts, degree, sites, CORRECTNESS + 1)
    gaps = tail_quantile(sites, dropouts, degree // 2, sites, CORRECTNESS + 1)
    least = window_minimum(sites, corrupt, degree, security)
    # A site that dropped out reveals no share of its own secret, so its neighbours must be enough.
    return degree - lost >= threshold and degree // 2 - gaps >= least


@dataclass(frozen=True)
class Graph:
    """The masking graph of one roster.

    Attributes:
        ring: The roster's sites in ring order; in any order if the graph is complete.
        degree: Neighbours per site; 0 for all other sites.
        window: Survivors that each degree / 2 consecutive places must hold; 0 for the complete graph.
    """

    ring: tuple[int, ...]
    degree: int
    window: int

    @functools.cached_property
    def _place(self) -> dict[int, int]:
        return {site: place for place, site in enumerate(self.ring)}

    def neighbours(self, site: int) -> tuple[int, ...]:
        """Return the sites that `site` shares masks with, ascending."""
        if not self.degree:
            return tuple(sorted(other for other in self.ring if other != site))
        place, n = self._place[site], len(self.ring)
        steps = range(1, self.degree // 2 + 1)
        return tuple(sorted({self.ring[(place + s) % n] for s in steps} | {self.ring[(place - s) % n] for s in steps}))

    def holders(self, site: int) -> tuple[int, ...]:
        """Return the sites that hold shares of the secrets of `site`: its neighbours and itself."""
        neighbours = self.neighbours(site)
        at = bisect.bisect(neighbours, site)
        return (*neighbours[:at], site, *neighbours[at:])

    def thinnest_window(self, present: Collection[int]) -> int:
        """Return the fewest sites of `present` on any degree / 2 consecutive places of the ring."""
        h, n = self.degree // 2, len(self.ring)
        flags = [site in present for site in self.ring]
        count = sum(flags[:h])
        least = count
        for place in range(n - 1):
            count += flags[(place + h) % n] - flags[place]
            least = min(least, count)
        return least

    def holds_together(self, present: Collection[int]) -> bool:
        """Return whether the honest sites among `present` are connected, by the module's rule on windows."""
        return not self.degree or self.thinnest_window(set(present)) >= self.window


def build_graph(roster: bytes, sites: tuple[int, ...], corrupt: int, degree: int, security: int) -> Graph:
    """Return the graph that `roster`, the roster's digest, determines.

    The ring sorts the sites by SHA-256("privet-secagg/1 ring" || roster || site as u16), so nobody chooses their
    places.
    """
    if is_complete(len(sites), degree):
        return Graph(tuple(sorted(sites)), 0, 0)

    def key(site: int) -> bytes:
        return hashlib.sha256(b"privet-secagg/1 ring" + roster + site.to_bytes(2, "big")).digest()

    ring = tuple(sorted(sites, key=key))
    return Graph(ring, degree, window_minimum(len(sites), corrupt, degree, security))
