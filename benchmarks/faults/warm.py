"""Imported by the process from which all others are forked: it loads the libraries and fills the accountant's cache.

A forked process then starts in a fraction of a second; a new interpreter takes five seconds.
"""

from __future__ import annotations

import os
from pathlib import Path

import faults.actions  # noqa: F401 - loaded once for all processes
from faults.child import warm

STUDY = "PRIVET_FAULTS_STUDY"
"""Environment variable with the folder of the consortium whose study fills the cache."""

if STUDY in os.environ:
    warm(Path(os.environ[STUDY]))
