"""Who spoils: a site that spoils masked sums is found by whom the spoiled sums have in common, and is left out.

Masks hide what each site sends, so a sum that cannot be used names nobody. But the cohorts are public:

1. *Search.* After a spoiled sum, the sites in it are suspects. The next round takes half of the suspects that no usable
   sum has cleared, beside all others. A spoiled sum leaves only the suspects that were in it; a usable one clears, for
   the time being, those that were in it. Either halves those in question (group testing: Dorfman 1943; binary
   splitting: Hwang 1972). The suspect that all spoiled sums have in common is *benched*: it sits out.
2. *Check.* The next round takes everybody who is not benched. If its sum is usable and one site is benched, that site
   is convicted, named, and left out of the run. If the sum is spoiled, several sites spoil: another search begins.
3. *Trials.* Once a sum without the benched is usable and several are benched, each takes part in one round beside the
   sites of that sum. A spoiled sum convicts it, a usable one frees it.

So, of n sites,

* one that spoils every sum it is in sits out at most ceil(log2 n) + 2 rounds after the first spoiled sum, if half of
  the sites are enough for a round, and is named by the first usable sum after that;
* one that spoils now and then spoils at most ceil(log2 n) + 1 sums under the same condition, and while the same sites
  stay, as each halves the suspects, however often it stays quiet. Where a round needs nearly all sites, each spoiled
  sum leaves one suspect less;
* nobody else is convicted, as long as one site alone spoils, whatever it knows of the cohorts. Two that take turns can
  have a third one convicted; the public record then shows who was in every spoiled sum.

All of it follows from the public statements of rounds, so sites and auditors compute the same as the coordinator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from privet.common.masking.groups import corrupt_sites
from privet.common.privacy.noise import SeededRandomness
from privet.common.study.study import Study


@dataclass(frozen=True)
class Sums:
    """The sums of one round, by the sites in each.

    Attributes:
        spoiled: Those that could not be used.
        usable: Those that could.
    """

    spoiled: tuple[frozenset[str], ...] = ()
    usable: tuple[frozenset[str], ...] = ()


@dataclass
class Isolation:
    """What the rounds so far say about who spoils.

    Attributes:
        suspects: The sites that all spoiled sums of the present search have in common; empty without a search.
        cleared: Suspects in a usable sum since.
        benched: Sites that sit out until it is known whether they spoil, in the order in which they were found.
        proven: Sites of a usable sum without the benched, beside which these are tried; empty before there is one.
        left_out: Sites that are left out for good, in the order of their conviction.
    """

    suspects: frozenset[str] = frozenset()
    cleared: frozenset[str] = frozenset()
    benched: tuple[str, ...] = ()
    proven: frozenset[str] = frozenset()
    left_out: tuple[str, ...] = ()

    @classmethod
    def after(cls, rounds: Iterable[Sums]) -> Isolation:
        """Return what these rounds say, in their order."""
        found = cls()
        for each in rounds:
            found.note(each)
        return found

    def note(self, sums: Sums) -> None:
        """Take the sums of the next round into account."""
        for spoiled in sums.spoiled:
            self._spoiled(spoiled - set(self.left_out))
        for usable in sums.usable:
            self._usable(usable)

    def _spoiled(self, sites: frozenset[str]) -> None:
        tried = sites & set(self.benched)
        if self.proven and len(tried) == 1 and sites - tried <= self.proven:
            self._end_trial(*tried, guilty=True)
            return
        self.proven = frozenset()
        sites -= set(self.benched)
        common = self.suspects & sites
        # Nobody in common: more than one spoils. The last sum is the best that is known.
        self.suspects, self.cleared = common or sites, self.cleared & common
        if len(self.suspects) == 1:
            self.benched += tuple(self.suspects)
            self.suspects = self.cleared = frozenset()

    def _usable(self, sites: frozenset[str]) -> None:
        tried = sites & set(self.benched)
        if self.proven and len(tried) == 1:
            self._end_trial(*tried, guilty=False)
        elif self.benched and not tried and not self.suspects:
            self.proven = sites
            if len(self.benched) == 1:
                self._end_trial(*self.benched, guilty=True)
        self.cleared |= self.suspects & sites
        if self.cleared == self.suspects:
            # Each was in a usable sum since: whoever spoils does so now and then. The next spoiled sum halves again.
            self.cleared = frozenset()

    def _end_trial(self, site: str, *, guilty: bool) -> None:
        self.benched = tuple(other for other in self.benched if other != site)
        self.left_out += (site,) if guilty else ()
        if not self.benched:
            self.proven = frozenset()

    def choose(self, names: Sequence[str], least: int, seed: int, number: int) -> tuple[str, ...]:
        """Return the sites to draw a round's cohort from, in name order.

        Args:
            names: The participants.
            least: Least number of sites in a cohort.
            seed: The study's.
            number: The round's.
        """
        present = sorted(set(names) - set(self.left_out) - set(self.benched))
        if not self.suspects:
            on_trial = [site for site in self.benched if site in names][:1] if self.proven else []
            beside = [name for name in present if name in self.proven]
            return tuple(sorted([*beside, *on_trial] if on_trial and len(beside) + 1 >= least else present))
        suspects = [name for name in present if name in self.suspects]
        if not suspects or len(present) <= least:
            return tuple(present)
        order = _shuffled([name for name in suspects if name not in self.cleared], seed, number)
        others = [name for name in present if name not in self.suspects]
        cleared = _shuffled([name for name in suspects if name in self.cleared], seed, number)
        # A round needs `least` sites. It gets them from those that are cleared before from those in question.
        taken = order[: max(len(order) // 2, 1)]
        missing = least - len(others) - len(taken)
        if missing > 0:
            taken = [*taken, *[*cleared, *order[len(taken) :]][:missing]]
        return tuple(sorted([*others, *taken]))


def drawn_cohort(study: Study, number: int, participants: Sequence[str], isolation: Isolation) -> tuple[str, ...]:
    """Return a round's cohort: the study's fraction of the sites, at least its minimum, drawn by the public seed.

    Args:
        study: The study.
        number: The round's number.
        participants: The sites that consented.
        isolation: What the rounds before say about who spoils.

    Returns:
        In name order.
    """
    # Masking protects against so many corrupt sites only among two more.
    least = max(study.cohort.min_sites, corrupt_sites(study, len(participants)) + 2)
    names = isolation.choose(participants, least, study.seed, number)
    size = cohort_size(study, len(names))
    if size < len(names):
        order = np.argsort(SeededRandomness(study.seed, "cohort", number).uniform(len(names)), kind="stable")
        names = tuple(sorted(names[index] for index in order[:size]))
    return names


def cohort_size(study: Study, participants: int) -> int:
    """Return the size of a round's cohort for this number of participants."""
    return min(participants, max(study.cohort.min_sites, round(study.cohort.fraction * participants)))


def _shuffled(names: Sequence[str], seed: int, number: int) -> list[str]:
    draws = SeededRandomness(seed, "isolation", number).uniform(len(names))
    return [names[index] for index in sorted(range(len(names)), key=lambda index: draws[index])]
