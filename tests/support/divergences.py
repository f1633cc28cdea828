"""Rényi divergences of one step, computed once in a session: they take most of the time of a calibration.

Opacus computes them from the noise multiplier and the sampling rate alone, to the same bits in each process. The many
processes of the tests ask for the same ones again and again.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from threading import get_ident

import numpy as np
from numpy.typing import NDArray

from privet.common.privacy import accounting


def remember() -> None:
    """Let this process read divergences that another one of the session has computed, and write those it computes."""
    folder = Path(os.environ["XDG_CACHE_HOME"], "divergences")
    folder.mkdir(exist_ok=True)
    compute = accounting._rdp

    @lru_cache(maxsize=512)
    def remembered(noise_multiplier: float, sampling_rate: float) -> NDArray[np.float64]:
        file = folder / f"{float(noise_multiplier).hex()}-{float(sampling_rate).hex()}.npy"
        if file.exists():
            return np.asarray(np.load(file))
        found = compute(noise_multiplier, sampling_rate)
        part = file.with_suffix(f".{os.getpid()}-{get_ident()}.npy")
        np.save(part, found)
        part.rename(file)
        return found

    accounting._rdp = remembered
