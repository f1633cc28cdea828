"""The rules that hold the code base together: who may import whom, and what may stand nowhere.

One case a rule; its message lists every offender.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.layout.survey import (
    PARTS,
    ROOT,
    cycle,
    defined_in,
    imports,
    imports_in,
    module_of,
    one_sided,
    packages_of,
    rooms,
    sources,
    tree,
)

MODELS = {"torch", "peft", "opacus", "transformers"}
NEVER = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
OURS = sources(*PARTS)
ALL = [*OURS, *sources("tests", "benchmarks", ".ci", "docs")]


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from outside_functions(child)


def parts_of(file: str) -> set[str]:
    return {name.split(".")[1] for name in imports(file) if name.startswith("privet.")}


def test_the_rules_are_checked_on_something() -> None:
    assert len(OURS) > 20
    assert {file.split("/")[0] for file in OURS} == set(PARTS)
    assert "privet.common.study.study.Study" in imports("server/rounds/rounds.py")


# Imports


def test_a_part_imports_only_what_it_may() -> None:
    allowed = {"common": {"common"}, "server": {"server", "common"}, "client": {"client", "common"}}
    strays = {file: parts_of(file) - allowed.get(file.split("/")[0], set(PARTS)) for file in OURS}
    assert {file: found for file, found in strays.items() if found} == {}


def test_the_package_graph_has_no_cycle() -> None:
    assert cycle(rooms()) == []


def test_common_holds_nothing_that_one_side_alone_uses() -> None:
    assert one_sided() == {}


def test_nobody_imports_a_bare_part() -> None:
    assert [file for file in ALL if packages_of(file) & set(PARTS)] == []
    assert [file for file in ALL if "tests" in packages_of(file) and not file.startswith("tests/")] == []


def test_imports_are_absolute() -> None:
    assert [file for file in ALL if any(name.startswith(".") for name in imports(file))] == []


# What touches Flower beyond its public API; `tests/system/test_fleet.py` fails when that moves.
INTERNALS = (
    "client/network/fleet.py",
    "common/flower/objects.py",
    "server/network/link.py",
    "server/network/store.py",
)
FLOWER = (
    "client/app.py",
    "server/app.py",
    "server/network/grid.py",
    "common/flower/records.py",
    "simulations/engines/ray_client.py",
    *INTERNALS,
)


def test_flower_stays_in_its_modules() -> None:
    assert [file for file in OURS if "flwr" in packages_of(file) and file not in FLOWER] == []


def test_flowers_internals_stay_in_the_adapter_modules() -> None:
    public = ("flwr.app.", "flwr.clientapp.", "flwr.serverapp.")
    found = {file: {n for n in imports(file) if n.startswith("flwr") and not n.startswith(public)} for file in OURS}
    assert {file: names for file, names in found.items() if names and file not in INTERNALS} == {}


def test_the_command_line_stays_in_its_modules() -> None:
    def may(file: str) -> bool:
        return "/commands/" in file or file.endswith("commands.py") or file in ("common/cli.py", "common/options.py")

    assert [file for file in OURS if packages_of(file) & {"typer", "click"} and not may(file)] == []


def test_common_loads_no_model_library_when_imported() -> None:
    loaded = {
        file: {name.split(".")[0] for name in imports_in(outside_functions(tree(file)))} & MODELS
        for file in sources("common")
    }
    assert {file: found for file, found in loaded.items() if found} == {}


def test_importing_all_of_common_loads_no_torch() -> None:
    modules = [module_of(file) for file in sources("common")]
    code = (
        f"import importlib, json, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print(json.dumps(sorted({MODELS!r} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) == []


def test_the_coordinator_loads_no_model_library() -> None:
    assert {
        file: packages_of(file) & (MODELS - {"torch"}) for file in sources("server") if packages_of(file) & MODELS
    } == {
        "server/rounds/aggregate.py": set()  # PyTorch's optimizers, and nothing of a model
    }


def test_production_code_knows_nothing_of_simulated_sites() -> None:
    named = [
        file
        for file in sources("client")
        if any(isinstance(node, ast.Attribute) and node.attr == "reproducible_seed" for node in ast.walk(tree(file)))
    ]
    assert named == []


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
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and value is not False:
                    found.append(keyword.arg)
    return found


def test_nothing_reads_pickles_or_runs_foreign_code() -> None:
    found = {file: forbidden(tree(file)) for file in ALL if not file.startswith("tests/")}
    # A process of its own, without network, that takes tensors only.
    assert found.pop("client/bases/unpickle.py") == ["torch.load"]
    loads = [node for node in ast.walk(tree("client/bases/unpickle.py")) if isinstance(node, ast.Call)]
    (load,) = [node for node in loads if dotted(node.func) == "torch.load"]
    assert {keyword.arg: ast.unparse(keyword.value) for keyword in load.keywords}["weights_only"] == "True"
    assert {file: names for file, names in found.items() if names} == {}


def test_that_check_finds_what_it_looks_for() -> None:
    for code in (
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
    ):
        assert len(forbidden(ast.parse(code))) == 1, code
    assert forbidden(ast.parse("model.eval()\nf(trust_remote_code=False)\nre.compile('x')")) == []


def test_assert_only_narrows_types_and_says_so() -> None:
    found = []
    for file in OURS:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Assert):
                _, mark, reason = lines[node.lineno - 1].partition("# noqa: S101 - ")
                found += [f"{file}:{node.lineno}"] if not mark or len(reason) <= 10 else []
    assert found == []


def test_the_generators_of_python_and_numpy_draw_nothing_that_leaves_a_site() -> None:
    # Simulations may make up data with them; what sites and coordinator draw comes from privet.common.privacy.noise.
    found = []
    for file in sources("client", "common", "server"):
        names = {dotted(node) for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute)}
        if "random" in packages_of(file) or any(name.startswith(("np.random", "numpy.random")) for name in names):
            found.append(file)
    assert found == []


# Packaging


def test_every_module_lies_in_a_typed_package() -> None:
    assert [file for file in OURS if not (ROOT / file).parent.joinpath("__init__.py").is_file()] == []
    assert [part for part in PARTS if not (ROOT / part / "py.typed").is_file()] == []
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(PARTS)


def test_src_holds_links_to_the_parts_and_the_root_package() -> None:
    package = ROOT / "src" / "privet"
    files = {path.name for path in package.iterdir() if not path.is_symlink() and path.suffix == ".py"}
    assert files == {"__init__.py", "__main__.py"}
    links = {path.name: path.readlink() for path in package.iterdir() if path.is_symlink()}
    assert links == {part: Path("..", "..", part) for part in PARTS}


def test_an_installation_without_links_stops_with_a_sentence(tmp_path: Path) -> None:
    # What Git writes where it may not make links: a file that holds the link's target.
    (tmp_path / "src" / "privet").mkdir(parents=True)
    for part in PARTS:
        (tmp_path / "src" / "privet" / part).write_text(f"../../{part}")
    (tmp_path / "setup.py").write_text((ROOT / "setup.py").read_text())
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "symbolic links" in done.stderr
    assert "core.symlinks=true" in done.stderr
    assert "Traceback" not in done.stderr


def test_python_m_privet_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "privet", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("privet ")


def test_every_entry_point_names_something_that_exists() -> None:
    project = pyproject()["project"]
    points = {**project["scripts"], **project["entry-points"]["privet.commands"]}
    missing = []
    for name, target in points.items():
        module, _, attribute = target.partition(":")
        file = module.removeprefix("privet.").replace(".", "/") + ".py"
        if file not in OURS or attribute not in defined_in(file):
            missing.append(f"{name} = {target}")
    assert missing == []


def test_the_flower_bundle_names_our_apps_and_carries_no_code() -> None:
    app = pyproject()["tool"]["flwr"]["app"]
    assert app["components"] == {"serverapp": "privet.server.app:app", "clientapp": "privet.client.app:app"}
    assert {pattern.removesuffix("/**") for pattern in app["fab-exclude"]} >= {*PARTS, "src"}
    for file in ("server/app.py", "client/app.py"):
        assert "app" in defined_in(file)  # Flower looks for a plain assignment


def test_flower_is_pinned_to_one_minor_version() -> None:
    dependencies = pyproject()["project"]["dependencies"]
    assert [d for d in dependencies if d.startswith("flwr")] == ["flwr>=1.41,<1.42"]


@pytest.mark.slow
def test_a_wheel_holds_the_files_of_the_tree(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    done = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True, check=True
    )
    held = {line.split()[0].removeprefix("privet/") for line in done.stdout.splitlines() if line.startswith("privet/")}
    data = [*(ROOT / "simulations/studies").glob("*.toml"), *(ROOT / "common/web/texts").glob("*.toml")]
    data += [*(ROOT / "common/web/static").iterdir(), *ROOT.glob("*/**/templates/*.html")]
    wanted = {*OURS, *(str(path.relative_to(ROOT)) for path in data if path.relative_to(ROOT).parts[0] in PARTS)}
    assert wanted - held == set()


def test_the_longest_tests_are_there() -> None:
    from tests.conftest import LONGEST

    texts = [(ROOT / file).read_text(encoding="utf-8") for file in sources("tests")]
    assert [name for name in LONGEST if not any(f"def {name}(" in text for text in texts)] == []
