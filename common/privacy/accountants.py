"""Opacus's accountants without the rest of Opacus, whose import loads PyTorch.

An accountant is arithmetic on numpy arrays. `import opacus.accountants` runs `opacus/__init__.py`, which imports
optimizers and models, for each command that computes an epsilon: 2.2 s of CPU time. So the installed package's own
files are loaded here, under a name of ours, and `sys.modules["opacus"]` stays as it is.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

_NAME = "_privet_opacus_accountants"
_loading = Lock()

ORDERS = (*(1 + tenths / 10.0 for tenths in range(1, 100)), *range(12, 64))
"""The orders of Rényi divergences that Opacus computes: `RDPAccountant.DEFAULT_ALPHAS`."""


def rdp() -> Any:
    """Return the module `opacus.accountants.analysis.rdp`: Rényi divergences (Mironov et al. 2019)."""
    return _load("analysis.rdp")


def prv() -> Any:
    """Return the module `opacus.accountants.analysis.prv`: numerical composition (Gopi et al. 2021)."""
    return _load("analysis.prv")


@cache
def _load(name: str) -> ModuleType:
    """Return a module of the package `opacus.accountants`. It takes its siblings by relative imports."""
    with _loading:
        if _NAME not in sys.modules:
            found = find_spec("opacus")  # finds the package, and does not run it
            if found is None or found.origin is None:
                raise ModuleNotFoundError("No module named 'opacus'", name="opacus")
            package, accountant = ModuleType(_NAME), ModuleType(f"{_NAME}.rdp")
            package.__path__ = [str(Path(found.origin).parent / "accountants")]
            # `analysis.prv.domain` names it, for a function that is not called here. The real module imports PyTorch.
            vars(accountant)["RDPAccountant"] = None
            sys.modules |= {_NAME: package, accountant.__name__: accountant}
        return import_module(f"{_NAME}.{name}")
