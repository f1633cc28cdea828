"""Chat templates as programs of a stranger: what they may do, and how much of it.

A template comes with the base. Jinja's sandbox keeps it from Python's objects. Two things remain. A template could
write something else each time: what chance, a clock or the address of an object gives. That depends on what the process
did before, and so on other records. And it could run or write without end. So there is no chance here, only plain
values are written, and a template that takes too many steps or makes too long a text has failed.

Bounds hold for loops, calls, `+`, `~`, `*` and `**`. A filter or a method of texts can still take much memory at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from jinja2 import Template, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template

STEPS = 1_000_000
"""Most passes of loops and calls in one rendering."""

LONGEST = 50_000_000
"""Most characters or items of one value."""

# Largest integers that are multiplied or raised to a power, and the largest power.
_LARGEST, _POWER = 10**9, 64

_BY_CHANCE = "random", "lipsum"
_PLAIN = (str, int, float, list, tuple, dict, type(None), Undefined)


class _Counted(NodeTransformer):
    """Lets every pass of a loop, and every concatenation, go through the environment."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - the name is jinja's
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("passed", [], node.lineno), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("joined", node.nodes, node.lineno)


def _call(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    called = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(called, arguments, [], None, None, lineno=line)


class _Bounded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_written, **options)
        self._taken = threading.local()

    def begin(self) -> None:
        """Begin a rendering in this thread."""
        self._taken.steps = 0

    def passed(self) -> None:
        """Count a pass of a loop: `call` does."""

    def joined(self, *parts: Any) -> str:
        """Return values as one text."""
        texts = [str(_written(part)) for part in parts]
        _check_length(sum(map(len, texts)))
        return "".join(texts)

    def call(__self, __context: Context, __obj: Any, *arguments: Any, **named: Any) -> Any:  # noqa: N805 - jinja's names
        __self._taken.steps = steps = getattr(__self._taken, "steps", 0) + 1
        if steps > STEPS:
            raise SecurityError("the template takes too many steps")
        return super().call(__context, __obj, *arguments, **named)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`, if the result is no larger than it may be."""
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_length(len(left) + len(right))
        elif operator == "*" and (hasattr(left, "__len__") or hasattr(right, "__len__")):
            sized, times = (left, right) if hasattr(left, "__len__") else (right, left)
            _check_length(len(sized) * max(0, times) if isinstance(times, int) else 0)
        elif operator != "+":
            most = (_LARGEST, _LARGEST if operator == "*" else _POWER)
            if any(isinstance(x, int) and abs(x) > bound for x, bound in zip((left, right), most, strict=True)):
                raise SecurityError("the template computes with too large numbers")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        found: nodes.Template = _Counted().visit(super()._parse(source, name, filename))
        return found


def _check_length(length: int) -> None:
    if length > LONGEST:
        raise SecurityError("the template makes too long a text")


def _written(value: Any) -> Any:
    """Return a value that is to be written. Other objects than plain ones are written with their address."""
    if not isinstance(value, _PLAIN):
        raise SecurityError(f"the template writes a {type(value).__name__}")
    return value


@lru_cache(maxsize=8)
def bounded(source: str) -> Callable[..., str]:
    """Return what renders a chat template, with the filters and functions that `transformers` gives it, but for chance.

    It raises what Jinja raises, and what the template's own operations do.
    """
    known = _compile_jinja_template("").environment  # it computes constants of a template without any bound
    environment = _Bounded(
        trim_blocks=known.trim_blocks,
        lstrip_blocks=known.lstrip_blocks,
        extensions=[type(extension) for extension in known.extensions.values()],
    )
    environment.filters = {name: found for name, found in known.filters.items() if name not in _BY_CHANCE}
    environment.globals = {name: found for name, found in known.globals.items() if name not in _BY_CHANCE}
    template: Template = environment.from_string(source)

    def render(**values: Any) -> str:
        environment.begin()
        return template.render(**values)

    return render
