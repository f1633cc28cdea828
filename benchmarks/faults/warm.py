"""Imported by the process that all others are forked from: libraries are loaded and the accountant has done its work.

A process then starts in a fraction of a second, where a new interpreter takes five.
"""

from __future__ import annotations

import os
from pathlib import Path

import faults.actions  # noqa: F401 - loaded here once
from faults.child import warm

STUDY = "PRIVET_FAULTS_STUDY"
"""Variable that names the folder of a consortium whose study is to be warmed up."""

if STUDY in os.environ:
    warm(Path(os.environ[STUDY]))
