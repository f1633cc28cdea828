"""The rules that hold the code base together: who may import whom, and what may stand nowhere."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("client", "common", "server", "simulations")
MODELS = {"torch", "peft", "opacus", "transformers"}
NEVER = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def sources(*directories: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for d in directories for p in (ROOT / d).rglob("*.py"))


OURS = sources(*PARTS)
ALL = [*OURS, *sources("tests", "benchmarks", ".ci", "docs")]


@lru_cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), file)


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def imports_in(nodes: Iterator[ast.AST] | list[ast.stmt]) -> Iterator[str]:
    """Yield the dotted name of everything that is imported: `from a import b` is `a.b`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(file: str) -> set[str]:
    return set(imports_in(ast.walk(tree(file))))


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from outside_functions(child)


def packages_of(file: str) -> set[str]:
    return {name.split(".")[0] for name in imports(file)}


def parts_of(file: str) -> set[str]:
    return {name.split(".")[1] for name in imports(file) if name.startswith("privet.")}


def test_the_rules_are_checked_on_something() -> None:
    assert len(OURS) > 20
    assert {file.split("/")[0] for file in OURS} == set(PARTS)
    assert "privet.common.study.Study" in imports("server/rounds.py")


# Imports


@pytest.mark.parametrize("file", OURS)
def test_a_part_imports_only_what_it_may(file: str) -> None:
    allowed = {"common": {"common"}, "server": {"server", "common"}, "client": {"client", "common"}}
    part = file.split("/")[0]
    assert parts_of(file) <= allowed.get(part, set(PARTS))


@pytest.mark.parametrize("file", ALL)
def test_nobody_imports_a_bare_part(file: str) -> None:
    assert packages_of(file).isdisjoint(PARTS)
    if not file.startswith("tests/"):
        assert "tests" not in packages_of(file)


# What touches Flower beyond its public API, each covered by the tests of the same name.
INTERNALS = tuple(f"common/flower_{part}.py" for part in ("fleet", "link", "objects", "store"))


def may_use_flower(file: str) -> bool:
    return file.endswith("/app.py") or file in ("common/flower.py", "common/wire.py", *INTERNALS)


@pytest.mark.parametrize("file", OURS)
def test_flower_stays_in_its_modules(file: str) -> None:
    if not may_use_flower(file):
        assert "flwr" not in packages_of(file)


@pytest.mark.parametrize("file", [file for file in OURS if may_use_flower(file)])
def test_flowers_internals_stay_in_the_adapter_modules(file: str) -> None:
    public = ("flwr.app.", "flwr.clientapp.", "flwr.serverapp.")
    internal = {name for name in imports(file) if name.startswith("flwr") and not name.startswith(public)}
    if file not in INTERNALS:
        assert internal == set()


@pytest.mark.parametrize("file", OURS)
def test_the_command_line_stays_in_its_modules(file: str) -> None:
    if not (file.endswith("commands.py") or file == "common/cli.py"):
        assert packages_of(file).isdisjoint({"typer", "click"})


@pytest.mark.parametrize("file", sources("common"))
def test_common_loads_no_model_library_when_imported(file: str) -> None:
    at_import = {name.split(".")[0] for name in imports_in(outside_functions(tree(file)))}
    assert at_import.isdisjoint(MODELS)


def test_importing_all_of_common_loads_no_torch() -> None:
    modules = ["privet." + file.removesuffix(".py").replace("/", ".") for file in sources("common")]
    modules = [module.removesuffix(".__init__") for module in modules]
    code = (
        f"import importlib, json, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print(json.dumps(sorted({MODELS!r} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) == []


# What stands nowhere


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def forbidden(module: ast.Module) -> list[str]:
    found = [name for name in imports_in(ast.walk(module)) if name.split(".")[0] in NEVER]
    for node in ast.walk(module):
        name = dotted(node)
        if name == "torch.load" or name.split(".")[-1] in ("read_pickle", "to_pickle"):
            found.append(name)
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [f"torch.{alias.name}" for alias in node.names if alias.name == "load"]
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "compile", "__import__"):
                found.append(node.func.id)
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg == "trust_remote_code" and value is not False:
                    found.append("trust_remote_code")
                if keyword.arg == "allow_pickle" and value is not False:
                    found.append("allow_pickle")
                if keyword.arg == "shell" and value is not False:
                    found.append("shell")
    return found


@pytest.mark.parametrize("file", [file for file in ALL if not file.startswith("tests/")])
def test_nothing_reads_pickles_or_runs_foreign_code(file: str) -> None:
    assert forbidden(tree(file)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import dill.source",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "exec('1')",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "np.load('x', allow_pickle=True)",
        "subprocess.run('x', shell=True)",
        "frame.read_pickle('x')",
    ],
)
def test_the_check_finds_what_it_looks_for(code: str) -> None:
    assert len(forbidden(ast.parse(code))) == 1
    assert forbidden(ast.parse("model.eval()\nf(trust_remote_code=False)\nre.compile('x')")) == []


@pytest.mark.parametrize("file", OURS)
def test_assert_only_narrows_types_and_says_so(file: str) -> None:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Assert):
            line = lines[node.lineno - 1]
            _, mark, reason = line.partition("# noqa: S101 - ")
            assert mark, f"{file}:{node.lineno}: an assert without a reason"
            assert len(reason) > 10


@pytest.mark.parametrize("file", OURS)
def test_the_generators_of_python_and_numpy_draw_nothing_that_leaves_a_site(file: str) -> None:
    # Simulations may make up data with them; what sites and coordinator draw comes from privet.common.noise.
    if not file.startswith("simulations/"):
        assert "random" not in packages_of(file)
        names = {dotted(node) for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute)}
        assert not {name for name in names if name.startswith(("np.random", "numpy.random"))}


# Packaging


def test_the_packages_listed_are_those_in_the_tree() -> None:
    listed = pyproject()["tool"]["setuptools"]
    found = {
        str(p.parent.relative_to(ROOT)).replace("/", ".") for part in PARTS for p in (ROOT / part).rglob("__init__.py")
    }
    assert set(listed["packages"]) == {f"privet.{name}" for name in found}
    assert listed["package-dir"] == {f"privet.{name}": name.replace(".", "/") for name in found}
    top = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"tests"}
    assert top == set(PARTS)


@pytest.mark.parametrize("file", OURS)
def test_every_module_lies_in_a_package(file: str) -> None:
    assert (ROOT / file).parent.joinpath("__init__.py").is_file()


@pytest.mark.parametrize("part", PARTS)
def test_every_package_is_typed_and_seen_by_type_checkers(part: str) -> None:
    assert (ROOT / part / "py.typed").is_file()
    link = ROOT / "typings" / "privet" / part
    assert link.is_symlink()
    assert link.readlink() == Path("..", "..", part)
    assert link.resolve() == (ROOT / part).resolve()


def test_the_typings_hold_nothing_else() -> None:
    assert sorted(p.name for p in (ROOT / "typings" / "privet").iterdir()) == sorted(PARTS)
    assert [p.name for p in (ROOT / "typings").iterdir()] == ["privet"]


def defined_in(module: str) -> set[str]:
    """Return the names that a module of ours assigns or defines at its top."""
    file = module.removeprefix("privet.").replace(".", "/") + ".py"
    names = set()
    for node in tree(file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_every_entry_point_names_something_that_exists() -> None:
    project = pyproject()["project"]
    points = {**project["scripts"], **project.get("entry-points", {}).get("privet.commands", {})}
    assert points
    for name, target in points.items():
        module, _, attribute = target.partition(":")
        assert attribute in defined_in(module), name


def test_the_flower_bundle_names_our_apps_and_carries_no_code() -> None:
    app = pyproject()["tool"]["flwr"]["app"]
    assert app["components"] == {"serverapp": "privet.server.app:app", "clientapp": "privet.client.app:app"}
    assert {pattern.removesuffix("/**") for pattern in app["fab-exclude"]} >= set(PARTS)
    for target in app["components"].values():
        module, _, attribute = target.partition(":")
        # Flower looks for a plain assignment.
        assert attribute in defined_in(module)


def test_flower_is_pinned_to_one_minor_version() -> None:
    dependencies = pyproject()["project"]["dependencies"]
    assert [d for d in dependencies if d.startswith("flwr")] == ["flwr>=1.41,<1.42"]
