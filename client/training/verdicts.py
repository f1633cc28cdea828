"""What the probe found before, kept on disk, so that a command on a large base need not repeat it.

A verdict holds for the software, hardware, settings and base that it was found on. Its name is a digest of all of
these, so a change of any of them has the probe run again. `privet site doctor` always runs it.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from privet.common.canonical import canonical_json, digest
from privet.common.files import write_durably
from privet.common.log.agreement import software

# Variables with these prefixes choose other kernels.
_CHOOSING = ("MKL_", "ONEDNN_", "DNNL_", "OMP_", "KMP_", "GOMP_", "ATEN_", "TORCH_", "PYTORCH_", "CUDA_", "CUBLAS_",
             "NVIDIA_", "OPENBLAS_", "LD_")  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What the probe chose for a host.

    Attributes:
        packed: Whether passes hold several records.
        objection: Why they do not; empty if they do.
        threads: Threads of a packed pass; None leaves their number as it is.
        in_parts: Whether losses take a language model's last layer in parts.
    """

    packed: bool
    objection: str
    threads: int | None
    in_parts: bool


# Of this process: a host is opened again after another took its place.
_known: dict[str, Verdict] = {}
_asking = {"anew": False}


@lru_cache(maxsize=1)
def _machine() -> dict[str, object]:
    """Return what decides which kernels run, of this process."""
    processor: set[str] = set()
    if (told := Path("/proc/cpuinfo")).is_file():
        lines = told.read_text(encoding="utf-8", errors="replace").splitlines()
        processor = {line for line in lines if line.partition("\t")[0].strip() in ("model name", "flags", "Features")}
    devices = [
        [torch.cuda.get_device_name(n), list(torch.cuda.get_device_capability(n))]
        for n in range(torch.cuda.device_count())
    ]
    return {
        "software": software(),
        "build": torch.__config__.show(),
        "machine": [platform.machine(), platform.release(), sorted(processor), torch.get_num_interop_threads()],
        "devices": devices,
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_CHOOSING)},
    }


def name_of(asked: object) -> str:
    """Return the name of a verdict, in hexadecimal.

    Args:
        asked: What is probed, as JSON values: base, recipe, resources.
    """
    # Other code of this process may set these at any time.
    settings = {"threads": torch.get_num_threads(), "precision": torch.get_float32_matmul_precision()}
    document = {"asked": asked, **settings, "onednn": bool(torch.backends.mkldnn.enabled), **_machine()}
    return digest(canonical_json(document)).removeprefix("sha256:")


@contextmanager
def anew() -> Iterator[None]:
    """Recall nothing inside the context, so that the probe runs."""
    before, _asking["anew"] = _asking["anew"], True
    try:
        yield
    finally:
        _asking["anew"] = before


def recall(name: str) -> Verdict | None:
    """Return a verdict; None where there is none, or where another user could have written it."""
    if _asking["anew"]:
        return None
    return _known.get(name) or _read(_place(name))


def keep(name: str, verdict: Verdict) -> None:
    """Keep a verdict, on disk where that is possible: without it, the probe runs again."""
    _known[name] = verdict
    place = _place(name)
    if place is None:
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_durably(place, json.dumps(asdict(verdict)).encode(), 0o600)
    except OSError:
        return


def _place(name: str) -> Path | None:
    """Return the file of a verdict; None where this user has no directory for caches."""
    home = os.environ.get("HOME")
    given = os.environ.get("XDG_CACHE_HOME") or (f"{home}/.cache" if home else "")
    return Path(given) / "privet" / "probes" / f"{name}.json" if Path(given).is_absolute() else None


def _read(place: Path | None) -> Verdict | None:
    if place is None:
        return None
    try:
        for path in (place, place.parent, place.parent.parent):
            found = path.lstat()
            if found.st_uid != os.geteuid() or found.st_mode & 0o022:
                return None
        verdict = Verdict(**json.loads(place.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    types = isinstance(verdict.packed, bool), isinstance(verdict.objection, str), isinstance(verdict.in_parts, bool)
    return verdict if all(types) and isinstance(verdict.threads, int | None) else None
