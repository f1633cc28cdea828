"""The locks name all that an installation downloads, each file by its hash; the bills of materials name the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib import metadata

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import lock as locks
from tools import sbom

LOCKS = {path.stem: path.read_text(encoding="utf-8") for path in locks.FOLDER.glob("*.txt")}
RUNTIME = [locks.name_of(build, python, dev=False) for build in locks.BUILDS for python in locks.PYTHONS]
PROJECT = tomllib.loads((locks.ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def versions(name: str) -> dict[str, str]:
    return {each.name: each.version for each in locks.read_lock(LOCKS[name]).values()}


def wanted(*, dev: bool) -> list[Requirement]:
    """Return what `pyproject.toml` asks for, with the extras if a lock is for development."""
    project = PROJECT["project"]
    locked = [lines for name, lines in project["optional-dependencies"].items() if name not in locks.UNLOCKED]
    extras = [line for lines in locked for line in lines] if dev else []
    return [each for each in map(Requirement, [*project["dependencies"], *extras]) if each.name != "privet"]


@cache
def needs(name: str, extras: frozenset[str], python: str) -> frozenset[tuple[str, frozenset[str]]]:
    """Return what an installed package needs under a version of Python, with extras, by its own metadata."""
    environment = {key: str(value) for key, value in default_environment().items()}
    environment |= {"python_version": python, "python_full_version": locks.PYTHONS[python]}
    found = set()
    for line in metadata.requires(name) or ():
        need = Requirement(line)
        if need.marker is None or any(need.marker.evaluate({**environment, "extra": e}) for e in (extras or {""})):
            found.add((str(canonicalize_name(need.name)), frozenset(need.extras)))
    return frozenset(found)


def closure(python: str, *, dev: bool) -> set[str]:
    """Return the names of all packages that privet needs, by the metadata of the installed ones."""
    todo = {(str(canonicalize_name(each.name)), frozenset(each.extras)) for each in wanted(dev=dev)}
    done: set[tuple[str, frozenset[str]]] = set()
    while todo:
        one = todo.pop()
        done.add(one)
        todo |= needs(*one, python) - done
    return {name for name, _ in done}


def test_there_is_a_lock_for_each_platform_and_nothing_else() -> None:
    names = {f"{build}-py3{minor}{dev}" for build in ("cpu", "cuda") for minor in (11, 12, 13) for dev in ("", "-dev")}
    assert set(LOCKS) == {*names, "build", "model"}
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.14"


def test_every_line_is_one_package_one_version_and_one_hash() -> None:
    sizes = {name: len(locks.read_lock(text)) for name, text in LOCKS.items()}
    assert min(sizes[name] for name in RUNTIME) > 60
    assert not re.search(r"://|--(?!hash=sha256:)", "".join(LOCKS.values()).replace("--no-deps", ""))


@pytest.mark.parametrize(
    "line",
    [
        "numpy==2.4.6",
        "numpy>=2.4.6 --hash=sha256:" + "0" * 64,
        "numpy==2.4.6 --hash=md5:" + "0" * 32,
        "numpy==2.4.6 --hash=sha256:" + "0" * 63,
        "numpy==2.4.6 --hash=sha256:" + "0" * 64 + " --hash=sha256:" + "1" * 64,
        "numpy @ file:///tmp/numpy.whl --hash=sha256:" + "0" * 64,
        "--index-url https://example.org",
        "numpy==2.4.6 --hash=sha256:" + "0" * 64 + "\nNumPy==2.4.6 --hash=sha256:" + "1" * 64,
    ],
)
def test_a_line_that_is_not_is_refused(line: str) -> None:
    with pytest.raises(locks.LockError):
        locks.read_lock(line)


def test_all_locks_agree_on_versions_and_a_runtime_lock_is_part_of_the_one_for_development() -> None:
    base = versions("cpu-py311-dev")
    for name in LOCKS:
        own = {package: version.removesuffix("+cpu") for package, version in versions(name).items()}
        shared = {package: version.removesuffix("+cpu") for package, version in base.items()}
        assert {p: v for p, v in own.items() if shared.get(p, v) != v} == {}, name
    for name in RUNTIME:
        small, large = locks.read_lock(LOCKS[name]), locks.read_lock(LOCKS[f"{name}-dev"])
        assert {package: line for package, line in small.items() if large.get(package) != line} == {}, name


@pytest.mark.parametrize("name", sorted(set(LOCKS) - {"build", "model"}))
def test_a_lock_meets_the_ranges_of_the_project(name: str) -> None:
    found = versions(name)
    for need in wanted(dev=name.endswith("-dev")):
        assert need.specifier.contains(found[canonicalize_name(need.name)]), need


@pytest.mark.parametrize("python", locks.PYTHONS)
@pytest.mark.parametrize("dev", [False, True])
def test_a_lock_holds_what_privet_needs_and_no_more(python: str, dev: bool) -> None:
    """The other side of `--require-hashes`, for the Pythons that CI does not install. CUDA adds NVIDIA's packages."""
    needed = closure(python, dev=dev)
    assert set(versions(locks.name_of("cpu", python, dev=dev))) == needed
    more = set(versions(locks.name_of("cuda", python, dev=dev))) - needed
    assert {name for name in more if not name.startswith(("nvidia-", "cuda-"))} == {"triton"}


def test_an_installation_runs_no_code_of_a_source_archive() -> None:
    """`make setup` builds two packages that have no wheel; the locks of privet alone have none of them."""
    assert {name for lock in RUNTIME for name in versions(lock)} & {"seqeval", "rouge-score"} == set()


def test_what_builds_is_locked_as_well() -> None:
    requires = PROJECT["build-system"]["requires"]
    assert requires == [f"setuptools=={versions('build')['setuptools']}"]
    assert "setuptools-scm" in versions("build")
    assert set(versions("model")) == set(locks.MODELS)


def test_pytorch_for_the_cpu_is_never_the_build_of_another_index() -> None:
    for python in locks.PYTHONS:
        cpu = locks.read_lock(LOCKS[locks.name_of("cpu", python, dev=False)])["torch"]
        cuda = locks.read_lock(LOCKS[locks.name_of("cuda", python, dev=False)])["torch"]
        assert (cpu.version, cpu.sha256) == (f"{locks.TORCH}+cpu", locks.TORCH_CPU[python])
        assert cuda.version == locks.TORCH
        assert cuda.sha256 not in locks.TORCH_CPU.values()


def test_what_is_installed_here_is_what_the_lock_names() -> None:
    build = "cpu" if metadata.version("torch").endswith("+cpu") else "cuda"
    name = f"{build}-py{sys.version_info.major}{sys.version_info.minor}-dev"
    found = {package: metadata.version(package) for package in versions(name)}
    assert found == versions(name), "run `make setup`"


# Which file of a package is locked


def package(*names: str, sdist: bool = False) -> dict[str, object]:
    files = [{"url": f"x/{name}", "hashes": {"sha256": name}} for name in names]
    source = {"sdist": {"hashes": {"sha256": "source"}}} if sdist else {}
    return {"name": "p", "version": "1", "wheels": files, **source}


def test_the_best_wheel_is_locked_and_a_source_only_without_one() -> None:
    ranks = locks.tags("3.12")
    own = "p-1-cp312-cp312-manylinux_2_28_x86_64.whl"
    older = "p-1-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"
    stable = "p-1-cp311-abi3-manylinux_2_17_x86_64.whl"
    anywhere = "p-1-py3-none-any.whl"
    others = ["p-1-cp311-cp311-manylinux_2_28_x86_64.whl", "p-1-cp312-cp312-manylinux_2_28_aarch64.whl"]
    others += ["p-1-cp312-cp312-manylinux_2_39_x86_64.whl", "p-1-cp312-cp312-musllinux_1_2_x86_64.whl"]
    for better, *worse in ((own, older, stable, anywhere), (older, stable, anywhere), (stable, anywhere), (anywhere,)):
        assert locks.chosen(package(*others, *worse, better, sdist=True), ranks) == better
    assert locks.chosen(package(*others, sdist=True), ranks) == "source"
    with pytest.raises(locks.LockError):
        locks.chosen(package(*others), ranks)


# Bills of materials


@pytest.mark.parametrize("name", sorted(LOCKS))
def test_a_bill_of_materials_is_valid_and_equal_to_its_lock(name: str) -> None:
    text = sbom.bill(name, LOCKS[name], "1.2.3", 1_700_000_000)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert text == sbom.bill(name, LOCKS[name], "1.2.3", 1_700_000_000)
    found = json.loads(text)
    lines = re.findall(r"^(\S+)==(\S+) --hash=sha256:(\w+)$", LOCKS[name], re.MULTILINE)
    entries = {
        (c["name"], c["version"], c["purl"], *(h["alg"] + h["content"] for h in c["hashes"]))
        for c in found["components"]
    }
    expected = {(n, v, f"pkg:pypi/{n}@{v.replace('+', '%2B')}", f"SHA-256{digest}") for n, v, digest in lines}
    assert entries == expected
    assert len(found["components"]) == len(lines)
    assert found["metadata"]["component"]["purl"] == "pkg:pypi/privet@1.2.3"
    (root,) = [each for each in found["dependencies"] if each["ref"] == "pkg:pypi/privet@1.2.3"]
    assert set(root["dependsOn"]) == {each["bom-ref"] for each in found["components"]}


def test_another_lock_has_another_serial_number() -> None:
    first, second = (
        json.loads(sbom.bill("model", text, "1", 0))["serialNumber"]
        for text in (LOCKS["model"], LOCKS["model"].replace("0.1.0", "0.1.1"))
    )
    assert first != second


def test_nothing_but_the_locks_decides_what_is_installed() -> None:
    """No installation in the repository takes a package by a name or a range alone."""
    files = subprocess.check_output(["git", "ls-files"], cwd=locks.ROOT, text=True).splitlines()
    assert [name for name in files if name.endswith("constraints.txt")] == []
    for name in ("Makefile", ".ci/run", "deploy/Containerfile"):
        text = (locks.ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
        for command in re.findall(r"(?:pip|\$\(PIP\)) install.*?(?=;|&&|\|\||$)", text, re.MULTILINE):
            assert "--no-build-isolation" in command, f"{name}: {command}"
            assert "--require-hashes" in command or "--no-deps -e ." in command, f"{name}: {command}"
        for command in re.findall(r"\$\(HASHED\).*?(?=;|&&|\|\||$)", text, re.MULTILINE):
            assert " -r " in command, f"{name}: {command}"
    assert makefile("HASHED").startswith("$(PIP) install ")


def makefile(name: str) -> str:
    """Return what a variable of the Makefile is set to."""
    found = re.search(rf"^{name} := (.*)$", (locks.ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else ""
