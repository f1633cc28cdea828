"""Charts as inline SVG, in the colours of the page. Each has a title and a description for screen readers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from privet.client.pages.html import Attributes, Html, element

WIDTH, HEIGHT = 480.0, 260.0
"""Units of a chart. They are few, so that a telephone shows its text at a size that can be read."""
_LEFT, _RIGHT, _BOTTOM = 48.0, 12.0, 40.0
_NAMES = 160.0
"""Room for the names of rows."""
_LETTER = 7.2
"""Width of a letter, at most on average."""
_LINE = 18.0
_TICKS = 5


@dataclass(frozen=True)
class Level:
    """A reference value, drawn as a dashed line."""

    name: str
    value: float


def line_chart(
    title: str,
    points: Sequence[tuple[float, float]],
    *,
    x_name: str,
    y_name: str,
    levels: Sequence[Level] = (),
    described: str,
    name: str = "measured",
) -> Html:
    """Return one curve over whole numbers, with reference lines. The vertical axis begins at 0.

    Args:
        title: Title of the chart.
        points: (x, y) in order of x; points that are not finite are left out.
        x_name: Name of the horizontal axis.
        y_name: Name and unit of the vertical axis.
        levels: Reference lines, two at most that look different.
        described: The content of the chart in words, for screen readers.
        name: Name of the curve in the legend.
    """
    shown = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    lines = [level for level in levels if math.isfinite(level.value)]
    ticks = nice_ticks(0.0, max([y for _, y in shown] + [level.value for level in lines] + [1e-9]))
    last = max([x for x, _ in shown] + [1.0])
    kinds = [f"level{'' if number == 0 else '-other'}" for number in range(len(lines))]
    legend, top = _legend([("curve", name), *((kind, level.name) for kind, level in zip(kinds, lines, strict=True))])
    top += _LINE + 6  # the name of the vertical axis

    def across(x: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * x / last

    def down(y: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - top - _BOTTOM) * y / ticks[-1]

    parts = [*legend]
    for tick in ticks:
        parts.append(_across(down(tick), "grid"))
        parts.append(_label(_LEFT - 8, down(tick) + 4, f"{tick:g}", "end"))
    step = max(1, math.ceil(last / 10))
    parts += [_label(across(x), HEIGHT - _BOTTOM + 18, str(x), "middle") for x in range(0, int(last) + 1, step)]
    parts += [_across(down(level.value), kind) for kind, level in zip(kinds, lines, strict=True)]
    if shown:
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in shown)
        parts.append(element("polyline", {"points": path, "class": "curve"}))
        parts += [element("circle", {"cx": across(x), "cy": down(y), "r": 3.5, "class": "dot"}) for x, y in shown]
    parts.append(_label((WIDTH + _LEFT) / 2, HEIGHT - 4, x_name, "middle"))
    parts.append(_label(4, top - 14, y_name, "start"))
    return _picture(title, described, HEIGHT, parts)


def bar_chart(
    title: str, values: Mapping[str, float], *, limit: Level | None, described: str, name: str = "value"
) -> Html:
    """Return one bar from 0 for each name, with a reference line for the limit. Long names are cut."""
    ticks = nice_ticks(0.0, max([*values.values(), limit.value if limit else 0.0, 1e-9]))
    row = 26.0
    legend, top = _legend([("bar", name), *([("level", f"{limit.name}, {limit.value:g}")] if limit else [])])
    height = top + row * len(values) + 30
    room = WIDTH - _NAMES - 52

    def across(value: float) -> float:
        return _NAMES + room * value / ticks[-1]

    parts = [*legend]
    parts += [_upright(across(tick), top, height - 26, "grid") for tick in ticks]
    parts += [_label(across(tick), height - 8, f"{tick:g}", "middle") for tick in ticks]
    for number, (own, value) in enumerate(values.items()):
        y = top + 4 + row * number
        parts.append(_label(_NAMES - 8, y + 14, _short(own), "end"))
        bar: Attributes = {
            "x": _NAMES,
            "y": y,
            "width": max(across(value) - _NAMES, 1.0),
            "height": row - 8,
            "rx": 2,
            "class": "bar",
        }
        parts.append(element("rect", bar))
        parts.append(_label(across(value) + 6, y + 14, f"{value:.2f}", "start"))
    if limit is not None:
        parts.append(_upright(across(limit.value), top, height - 26, "level"))
    return _picture(title, described, height, parts)


@dataclass(frozen=True)
class Span:
    """A value with its interval."""

    value: float
    low: float
    high: float

    @property
    def finite(self) -> bool:
        """Whether all three can be drawn."""
        return math.isfinite(self.value) and math.isfinite(self.low) and math.isfinite(self.high)


def interval_chart(title: str, rows: Mapping[str, tuple[Span, Span]], names: tuple[str, str], described: str) -> Html:
    """Return two values with their intervals for each name, one above the other.

    Args:
        title: Title of the chart.
        rows: By name, the two values. Long names are cut.
        names: What the two values are.
        described: The content of the chart in words, for screen readers.
    """
    drawn = [span for pair in rows.values() for span in pair if span.finite]
    lowest, highest = min([span.low for span in drawn] + [0.0]), max([span.high for span in drawn] + [1e-9])
    ticks = nice_ticks(math.floor(lowest), highest)
    row = 38.0
    legend, top = _legend(list(zip(("other", "dot"), names, strict=True)))
    height = top + row * len(rows) + 30
    room = WIDTH - _NAMES - 24

    def across(value: float) -> float:
        return _NAMES + room * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = [*legend]
    parts += [_upright(across(tick), top, height - 24, "grid") for tick in ticks]
    parts += [_label(across(tick), height - 8, f"{tick:g}", "middle") for tick in ticks]
    for number, (name, pair) in enumerate(rows.items()):
        middle = top + row * number + row / 2
        parts.append(_label(_NAMES - 8, middle + 4, _short(name), "end"))
        for span, y, kind in zip(pair, (middle - 7, middle + 7), ("-other", ""), strict=True):
            if span.finite:
                line: Attributes = {
                    "x1": across(span.low),
                    "x2": across(span.high),
                    "y1": y,
                    "y2": y,
                    "class": f"span{kind}",
                }
                parts.append(element("line", line))
                dot = "other" if kind else "dot"
                parts.append(element("circle", {"cx": across(span.value), "cy": y, "r": 4, "class": dot}))
    return _picture(title, described, height, parts)


def reliability_chart(title: str, points: Sequence[tuple[float, float]], described: str) -> Html:
    """Return the share that is right over the stated probability, both from 0 to 1, with the diagonal."""
    side, left = 240.0, 60.0
    legend, top = _legend([("curve", "right in %"), ("level", "perfectly calibrated")])
    top += 6

    def place(x: float, y: float) -> tuple[float, float]:
        return left + side * x, top + side * (1 - y)

    parts = [*legend]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        (x, y), (_, bottom), (right, _) = place(tick, tick), place(0, 0), place(1, 1)
        parts.append(element("line", {"x1": left, "x2": right, "y1": y, "y2": y, "class": "grid"}))
        parts.append(_label(left - 8, y + 4, f"{100 * tick:g}", "end"))
        parts.append(_label(x, bottom + 16, f"{100 * tick:g}", "middle"))
    (x0, y0), (x1, y1) = place(0, 0), place(1, 1)
    parts.append(element("line", {"x1": x0, "x2": x1, "y1": y0, "y2": y1, "class": "level"}))
    shown = [place(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    parts.append(element("polyline", {"points": " ".join(f"{x:.1f},{y:.1f}" for x, y in shown), "class": "curve"}))
    parts += [element("circle", {"cx": x, "cy": y, "r": 3.5, "class": "dot"}) for x, y in shown]
    parts.append(_label(left + side / 2, top + side + 34, "stated probability in %", "middle"))
    return _picture(title, described, top + side + 42, parts)


def nice_ticks(low: float, high: float) -> list[float]:
    """Return about `_TICKS` round numbers from `low` to at least `high`."""
    raw = max(high - low, 1e-9) / _TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    count = math.ceil((high - low) / step - 1e-9)
    return [low + step * number for number in range(max(count, 1) + 1)]


def _across(y: float, kind: str) -> Html:
    return element("line", {"x1": _LEFT, "x2": WIDTH - _RIGHT, "y1": y, "y2": y, "class": kind})


def _upright(x: float, top: float, bottom: float, kind: str) -> Html:
    return element("line", {"x1": x, "x2": x, "y1": top, "y2": bottom, "class": kind})


def _short(name: str) -> str:
    most = int(_NAMES / _LETTER) - 1
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _legend(entries: Sequence[tuple[str, str]]) -> tuple[list[Html], float]:
    """Return a legend of kinds of marks and their names, in as many lines as it needs, and where it ends."""
    parts: list[Html] = []
    x, y = 4.0, 12.0
    for kind, name in entries:
        width = 30 + _LETTER * len(name)
        if x > 4 and x + width > WIDTH:
            x, y = 4.0, y + _LINE
        if kind == "bar":
            parts.append(element("rect", {"x": x + 4, "y": y - 9, "width": 12, "height": 10, "rx": 2, "class": kind}))
        elif kind in ("dot", "other"):
            parts.append(element("circle", {"cx": x + 10, "cy": y - 4, "r": 4, "class": kind}))
        else:
            parts.append(element("line", {"x1": x, "x2": x + 20, "y1": y - 4, "y2": y - 4, "class": kind}))
        parts.append(_label(x + 25, y, name, "start"))
        x += width + 8
    return parts, y + 10


def _label(x: float, y: float, words: str, anchor: str) -> Html:
    return element("text", {"x": x, "y": y, "text-anchor": anchor}, words)


def _picture(title: str, described: str, height: float, parts: Sequence[Html]) -> Html:
    box = {"viewBox": f"0 0 {WIDTH:g} {height:g}", "role": "img", "aria-label": f"{title}. {described}"}
    drawn = element("svg", box, element("title", {}, title), element("desc", {}, described), *parts)
    return element("figure", {}, drawn, element("figcaption", {}, title))
