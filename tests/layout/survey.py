"""What the layout tests look at: who imports whom, and a few figures about the code.

Run by itself, it prints the package graph and the figures of a tree (this one, unless a directory is given)::

    python -m tests.layout.survey [DIRECTORY]
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("client", "common", "server", "simulations")
LONG_MODULE = 450
COMPLEX = 21
"""Cyclomatic complexity from which a function is graded D (radon's scale)."""

# What serves one side and belongs to both all the same.
SHARED_BY_NATURE = {
    "privet.common.cli": "the command itself",
    "privet.common.audit": "an auditor is a third side, who has this package alone",
    "privet.common.secagg.block": "the other half of the protocol in `privet.common.secagg.block_sums`",
    "privet.common.secagg.block_sums": "the other half of the protocol in `privet.common.secagg.block`",
    "privet.common.secagg.dealt": "the other half of the protocol in `privet.common.secagg.dealt_sums`",
    "privet.common.secagg.dealt_sums": "the other half of the protocol in `privet.common.secagg.dealt`",
    "privet.common.secagg.coordinator": "the other half of the protocol in `privet.common.secagg.site`",
    "privet.common.secagg.site": "the other half of the protocol in `privet.common.secagg.coordinator`",
}

_BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp, ast.comprehension, ast.match_case)


def sources(*directories: str, root: Path = ROOT) -> list[str]:
    """Return the Python files below some directories of a tree, as paths relative to its root."""
    return sorted(str(path.relative_to(root)) for name in directories for path in (root / name).rglob("*.py"))


@lru_cache(maxsize=1024)
def tree(file: str, root: Path = ROOT) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse((root / file).read_text(encoding="utf-8"), file)


def imports_in(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Yield the dotted name of everything that is imported: `from a import b` is `a.b`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names)


@lru_cache(maxsize=1024)
def imports(file: str, root: Path = ROOT) -> frozenset[str]:
    """Return the dotted names that a file imports, wherever in it."""
    return frozenset(imports_in(ast.walk(tree(file, root))))


def packages_of(file: str) -> set[str]:
    """Return the top-level packages that a file imports from."""
    return {name.split(".")[0] for name in imports(file)}


def module_of(file: str) -> str:
    """Return the module that a file of a part is."""
    return "privet." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(module: str) -> str:
    """Return a module's package; a module that lies directly in a part is a room of its own."""
    part, _, rest = module.removeprefix("privet.").partition(".")
    return f"{part}.{rest.partition('.')[0]}"


def uses(root: Path = ROOT) -> dict[str, set[str]]:
    """Return by module of ours the modules of ours that it imports."""
    files = sources(*PARTS, root=root)
    modules = {module_of(file): file for file in files}
    found = {}
    for module, file in modules.items():
        named = imports(file, root)
        reached = {name if name in modules else name.rpartition(".")[0] for name in named}
        found[module] = {name for name in reached if name in modules and name != module}
    return found


def rooms(root: Path = ROOT) -> dict[str, set[str]]:
    """Return the package graph: by room, the rooms that it imports from."""
    graph: dict[str, set[str]] = defaultdict(set)
    for module, used in uses(root).items():
        graph[room_of(module)] |= {room_of(other) for other in used} - {room_of(module)}
    return dict(graph)


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return a cycle of a graph, or an empty list where it has none."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def one_sided(root: Path = ROOT) -> dict[str, str]:
    """Return the modules of `common` that one part alone uses, with that part. Simulations are on both sides.

    Left out: `SHARED_BY_NATURE`, and packages, whose `__init__` nobody imports by itself.
    """
    used_by: dict[str, set[str]] = defaultdict(set)
    graph = uses(root)
    reached: dict[str, set[str]] = {}
    for module in graph:
        part = module.split(".")[1]
        if part == "common":
            continue
        for name in _reach(module, graph, reached):
            used_by[name].add(part)
    return {
        module: next(iter(used_by[module] - {"simulations"}), "simulations")
        for module in graph
        if module.startswith("privet.common.")
        and not {"client", "server"} <= used_by[module]
        and not (root / module.removeprefix("privet.").replace(".", "/")).is_dir()
        and not any(f"{module}.".startswith(f"{name}.") for name in SHARED_BY_NATURE)
    }


def _reach(module: str, graph: Mapping[str, set[str]], known: dict[str, set[str]]) -> set[str]:
    if module not in known:
        known[module] = set()
        for other in graph[module]:
            known[module] |= {other} | _reach(other, graph, known)
    return known[module]


# Figures


def public_names(root: Path = ROOT) -> dict[str, list[str]]:
    """Return by public name the modules that define it at their top."""
    found: dict[str, list[str]] = defaultdict(list)
    for file in sources(*PARTS, root=root):
        for name in sorted(defined_in(file, root)):
            if not name.startswith("_"):
                found[name].append(module_of(file))
    return dict(found)


def defined_in(file: str, root: Path = ROOT) -> set[str]:
    """Return the names that a module assigns or defines at its top."""
    names: set[str] = set()
    for node in tree(file, root).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def long_modules(root: Path = ROOT) -> dict[str, int]:
    """Return the modules that are longer than `LONG_MODULE` lines, with their lengths."""
    lengths = {file: len((root / file).read_text("utf-8").splitlines()) for file in sources(*PARTS, root=root)}
    return {file: length for file, length in lengths.items() if length > LONG_MODULE}


def complex_functions(root: Path = ROOT) -> dict[str, int]:
    """Return the functions whose cyclomatic complexity is D or worse, with it."""
    found = {}
    for file in sources(*PARTS, root=root):
        for node in ast.walk(tree(file, root)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and complexity(node) >= COMPLEX:
                found[f"{file}:{node.name}"] = complexity(node)
    return found


def complexity(function: ast.AST) -> int:
    """Return the cyclomatic complexity of a function (McCabe 1976): 1 and its branches."""
    branches = 1
    for node in ast.walk(function):
        branches += isinstance(node, _BRANCHES)
        branches += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
        branches += len(node.ifs) if isinstance(node, ast.comprehension) else 0
    return branches


def comment_share(root: Path = ROOT) -> float:
    """Return the comment lines per 100 lines of code, docstrings and directives for tools left out of both."""
    comments = code = 0
    for file in sources(*PARTS, root=root):
        text = (root / file).read_text("utf-8")
        strings = {
            line
            for node in ast.walk(tree(file, root))
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                own = not token.line[: token.start[1]].strip()
                comments += own and not token.string.startswith(("# noqa", "# type:", "# ruff", "# fmt"))
            elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
                lines.update(range(token.start[0], token.end[0] + 1))
        code += len({line for line in lines if line not in strings})
    return 100 * comments / code


def report(root: Path = ROOT) -> str:
    """Return the package graph and the figures as text."""
    graph = rooms(root)
    several = {name: modules for name, modules in public_names(root).items() if len(modules) > 1}
    sided = one_sided(root)
    lines = [f"{room:28} -> {', '.join(sorted(used)) or '-'}" for room, used in sorted(graph.items())]
    lines += [
        "",
        f"cycles: {' -> '.join(cycle(graph)) or 0}",
        f"modules of common that one side alone uses: {len(sided)} {sorted(sided) if sided else ''}",
        f"public names: {len(public_names(root))}, in more than one module: {len(several)}",
        *(f"    {name}: {', '.join(sorted(modules))}" for name, modules in sorted(several.items())),
        f"modules over {LONG_MODULE} lines: {len(long_modules(root))} {long_modules(root) or ''}",
        f"functions graded D or worse: {len(complex_functions(root))} {complex_functions(root) or ''}",
        f"comment lines per 100 of code: {comment_share(root):.1f}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(Path(sys.argv[1]).resolve() if sys.argv[1:] else ROOT))  # noqa: T201
