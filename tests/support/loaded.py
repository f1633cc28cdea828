"""Importing this imports what commands and training processes import: for a process from which others are forked."""

from __future__ import annotations

import importlib
import pkgutil

import privet
from tests.support import divergences

for _module in pkgutil.walk_packages(privet.__path__, "privet."):
    if not _module.name.endswith("__main__"):
        importlib.import_module(_module.name)
divergences.remember()
for _name in ("auto", "bert.modeling_bert", "llama.modeling_llama"):  # which Transformers imports when it needs them
    importlib.import_module(f"transformers.models.{_name}")
