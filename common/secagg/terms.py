"""The parameters that a site accepts: the rules that make a round safe, and the site's own floor above them.

The rules hold for every site and cannot be switched off. The coordinator's numbers are only checked against them,
so it cannot lower them. The floor is the site's policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from privet.common.errors import PrivetError, RefusedError, VerificationError
from privet.common.secagg import graph
from privet.common.secagg.messages import (
    MAX_BLOCK,
    MAX_DEALT,
    MAX_SITES,
    MAX_WORDS,
    DealtParameters,
    Parameters,
    SeveralRounds,
)
from privet.common.secagg.quantize import MIN_BITS
from privet.common.secagg.suites import Suite

_WEAK = "take part in no round of this run: compare the study with [floor] of the site file, or gather more sites"

Pins = Mapping[str, bytes]
"""The Ed25519 public key (32 bytes) of every site that this one knows, by name. It never comes from the coordinator."""


@dataclass(frozen=True)
class Floor:
    """A site's own minima.

    Attributes:
        cohort: Least number of sites asked.
        survivors: Least number of sites in a sum.
        threshold: Least number of shares that reconstruct a secret.
        corrupt: Least number of colluding sites that the parameters must withstand.
        corrupt_fraction: The same as a fraction of the cohort, rounded down. The larger of the two counts.
        security: Least statistical security of a masking graph that is not complete, in bits.
        bits: Least resolution of real values.
        max_words: Largest vector, in 64-bit words.
        classical: Whether the suite x25519 is accepted. What it masks can be read once X25519 is broken.
        fips: Whether only the suite of FIPS-approved algorithms is accepted.
    """

    cohort: int = 3
    survivors: int = 3
    threshold: int = 2
    corrupt: int = 1
    corrupt_fraction: float = 0.1
    security: int = graph.SECURITY
    bits: int = MIN_BITS
    max_words: int = MAX_WORDS
    classical: bool = False
    fips: bool = False


def least_survivors(sites: int, corrupt: int) -> int:
    """Return the least number of survivors that the rules allow.

    A quorum must confirm the list. And a sum must hold at least two honest sites, or it would be the vector of one.
    """
    return max(graph.quorum(sites, corrupt), corrupt + 2)


def check_parameters(parameters: Parameters, pins: Pins, floor: Floor) -> None:
    """Check the coordinator's parameters against the rules, the pinned keys and the site's floor.

    Raises:
        VerificationError: A site's key is not the pinned one (substituted identities).
        RefusedError: A number is outside the limits of the rules or the floor.
    """
    check_suite(parameters.suite, floor)
    n, c = len(parameters.cohort), parameters.corrupt
    for member in parameters.cohort:
        pinned = pins.get(member.name)
        if pinned is None:
            raise RefusedError(
                f"the cohort names site {member.name}, but the site file has no identity key for it",
                "add the public key of that site to [peers] of the site file; ask its operator for the key",
            )
        if pinned != member.identity:
            raise VerificationError(
                f"the cohort lists another identity key for site {member.name} than the key pinned in the site file",
                "ask that site's operator for its key by telephone; until it matches, take part in no round: the "
                "coordinator may pose as that site",
            )
    if len({member.identity for member in parameters.cohort}) != n:
        raise RefusedError(
            "two sites of the cohort have the same identity key", "do not take part; ask the coordinator why"
        )
    _at_least("number of sites in the cohort", n, max(2, floor.cohort))
    _at_most("number of sites in the cohort", n, MAX_SITES)
    _at_least(
        "number of corrupt sites that it withstands", c, max(floor.corrupt, fraction_of(floor.corrupt_fraction, n))
    )
    _at_most("number of corrupt sites that it withstands", c, n - 2)
    if parameters.degree:
        _at_least("statistical security in bits", parameters.security, floor.security)
    check_sharing(parameters, n)
    _at_least("threshold", parameters.threshold, floor.threshold)
    _at_least("least number of survivors", parameters.min_survivors, max(least_survivors(n, c), floor.survivors))
    _at_most("least number of survivors", parameters.min_survivors, n)
    _at_least("number of bits for one value", parameters.bits, floor.bits)
    if isinstance(parameters, SeveralRounds):
        _at_least("number of rounds in a block", parameters.rounds, 1)
        _at_most("number of rounds in a block", parameters.rounds, MAX_BLOCK)
        _at_most("number of neighbours that are fewer than all others (degree), in a block,", parameters.degree, 0)
    if isinstance(parameters, DealtParameters):
        _check_dealt(parameters)
    elif isinstance(parameters, SeveralRounds):
        # Each pair's mask cancels only if both sites are in the sum, and nothing could remove the mask of a drop-out.
        _at_least("least number of survivors in a block", parameters.min_survivors, n)
    try:
        words = parameters.layout.words
    except PrivetError as error:
        raise RefusedError(
            f"secure aggregation: the proposed layout of the vector is not valid: {error.message}", error.hint
        ) from None
    _at_most("number of 64-bit words of the vector", words, min(floor.max_words, MAX_WORDS))


def _check_dealt(parameters: DealtParameters) -> None:
    """Check what a block with drop-outs needs besides the rules of a round. Raises as `check_parameters`."""
    n = len(parameters.cohort)
    if not parameters.suite.hybrid:
        raise RefusedError(
            f"secure aggregation: a block that tolerates drop-outs has no suite {parameters.suite.value}",
            "remove suite under [secure_aggregation] in the study, or remove block",
        )
    # One quorum decides on lists and reconstructs secrets: the argument that excludes a second sum counts with it.
    _at_most("threshold in a block", parameters.threshold, graph.quorum(n, parameters.corrupt))
    _at_most("product of sites and rounds of a block", n * parameters.rounds, MAX_DEALT)


def accepted_suites(floor: Floor) -> tuple[Suite, ...]:
    """Return the key agreements that a site accepts."""
    if floor.fips:
        return (Suite.P256_MLKEM768,)
    return tuple(suite for suite in Suite if suite.hybrid or floor.classical)


def check_suite(suite: Suite, floor: Floor) -> None:
    """Check the key agreement of a round against the site's floor.

    Raises:
        RefusedError: The site does not accept the suite.
    """
    if suite in accepted_suites(floor):
        return
    if floor.fips:
        raise RefusedError(
            f"secure aggregation: this site accepts only the suite {Suite.P256_MLKEM768.value} ([floor] fips), the "
            f"coordinator proposed {suite.value}",
            f'set suite = "{Suite.P256_MLKEM768.value}" under [secure_aggregation] in the study',
        )
    raise RefusedError(
        f"secure aggregation: this site accepts only suites with ML-KEM-768, the coordinator proposed {suite.value}",
        "remove suite under [secure_aggregation] in the study; or set classical = true under [floor] of the site "
        "file, after which recorded rounds can be read by whoever breaks X25519",
    )


def fraction_of(fraction: float, sites: int) -> int:
    """Return `fraction` of `sites`, rounded down from its decimal value: 0.29 of 100 are 29."""
    return math.floor(Fraction(str(fraction)) * sites)


def check_sharing(parameters: Parameters, sites: int) -> None:
    """Check degree and threshold for a roster of `sites` of the cohort.

    A site checks this for the size of the cohort, and again for that of the roster: in a smaller roster, the same
    number of corrupt sites is a larger part.

    Raises:
        RefusedError: Both secrets of a site could be reconstructed, or no secret could.
    """
    degree = parameters.degree
    if degree % 2:
        raise RefusedError(
            f"secure aggregation: the number of neighbours of each site (degree) must be even, got {degree}", _WEAK
        )
    least = graph.least_threshold(sites, parameters.corrupt, degree, parameters.security)
    _at_least(f"threshold for {sites} sites", parameters.threshold, least)
    if graph.is_complete(sites, degree):
        _at_most("threshold", parameters.threshold, sites)
        return
    _at_most("threshold", parameters.threshold, degree + 1)
    window = graph.window_minimum(sites, parameters.corrupt, degree, parameters.security)
    _at_least(f"half the number of neighbours of each of {sites} sites", degree // 2, window)


def _at_least(what: str, got: int, least: int) -> None:
    if got < least:
        raise RefusedError(
            f"secure aggregation: {what} must be at least {least}, the coordinator proposed {got}", _WEAK
        )


def _at_most(what: str, got: int, most: int) -> None:
    if got > most:
        raise RefusedError(f"secure aggregation: {what} must be at most {most}, the coordinator proposed {got}", _WEAK)
