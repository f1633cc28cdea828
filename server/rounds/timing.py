"""How long the coordinator waits for the sites.

A module of its own that imports nothing: the commands take their defaults from here without loading the round loop.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """How long the coordinator waits, in seconds."""

    gathering: float = 600.0
    """For enough sites to consent, and for enough of them to cosign the round log."""
    round: float = 3600.0
    """For a round's contributions."""
    step: float = 120.0
    """For each other exchange of a round under secure aggregation."""


PATIENT = Timing()
"""For real sites: what a coordinator waits unless its operator says otherwise."""
