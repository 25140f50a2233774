"""Charts as SVG text: lines, points, bands, stacked areas. No library, no script, nothing loaded from elsewhere.

Colours follow the reader's light or dark setting (`prefers-color-scheme`), in a page as in an image.
Knows numbers and labels; knows nothing of requests or policies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

# Hues that stay apart for colour-blind readers (the first eight after Okabe and Ito), for light and for dark.
_LIGHT = (
    "#0b63b0",
    "#c45500",
    "#00795c",
    "#a3307c",
    "#7a6a00",
    "#6a4fbf",
    "#b3261e",
    "#4a5a68",
    "#0097a7",
    "#8d5a2b",
)
_DARK = (
    "#69b1f5",
    "#ff9d4d",
    "#3fcfa6",
    "#f08cc9",
    "#e3cf4a",
    "#b49cff",
    "#ff8a80",
    "#a9bac8",
    "#5fd4e0",
    "#cfa077",
)

STYLE = (
    ".chart{--ink:#1c2126;--soft:#5b6670;--grid:#e3e7ea;--paper:#ffffff;"
    + "".join(f"--s{n}:{colour};" for n, colour in enumerate(_LIGHT))
    + "font:12px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}"
    + "@media(prefers-color-scheme:dark){.chart{--ink:#e6eaee;--soft:#9aa7b2;--grid:#343c44;--paper:#171b1f;"
    + "".join(f"--s{n}:{colour};" for n, colour in enumerate(_DARK))
    + "}}"
    + ".chart text{fill:var(--soft)}.chart .title{fill:var(--ink);font-size:14px;font-weight:600}"
    + ".chart .grid{stroke:var(--grid)}.chart .axis{stroke:var(--soft)}.chart .paper{fill:var(--paper)}"
    + ".chart .rule{stroke:var(--ink);stroke-dasharray:5 4}.chart .ink{fill:var(--ink)}"
    + "".join(
        f".chart .l{n}{{stroke:var(--s{n});fill:none;stroke-width:2}}.chart .f{n}{{fill:var(--s{n})}}"
        for n in range(len(_LIGHT))
    )
    + ".chart .label{paint-order:stroke;stroke:var(--paper);stroke-width:4px}"
    + ".chart .dash{stroke-dasharray:6 4}.chart .band{opacity:.18}.chart .area{opacity:.85}"
)

_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 18, 40, 46  # margins


@dataclass(frozen=True, slots=True)
class Series:
    """One thing drawn in one colour. Points whose y is NaN are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    kind: str = "line"  # line | dashed | points | both | area (between `low` and y)
    low: Sequence[float] = ()  # with `high`: a band around the line; of an area: its lower edge
    high: Sequence[float] = ()
    colour: int | None = None  # None: the place among the series


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with two axes. `rules` are horizontal lines with a label."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    y_range: tuple[float, float] | None = None
    x_range: tuple[float, float] | None = None
    rules: Sequence[tuple[float, str]] = ()
    diagonal: bool = False  # the line y = x
    width: int = 640
    height: int = 340

    def svg(self, *, standalone: bool = True) -> str:
        """The drawing; `standalone` brings its own style, else the page has STYLE."""
        return _Drawing(self).svg(standalone)


class _Scale:
    """Numbers to pixels, linearly or by their logarithm."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        self.log = log
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-12:
            middle, spread = 0.5 * (low + high), max(abs(low), 1.0) * 0.05
            low, high = middle - spread, middle + spread
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        if self.log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            steps = (1, 2, 5) if self.high - self.low < 2.5 else (1,)
            values = [step * 10.0**power for power in powers for step in steps]
            return [
                (value, f"{value:g}")
                for value in values
                if self.low - 1e-9 <= math.log10(value) <= self.high + 1e-9
            ]
        raw = (self.high - self.low) / 5
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        values = [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]
        digits = max(0, -math.floor(math.log10(step) + 1e-9) + (step / size == 2.5))
        return [(value, _number(value, digits)) for value in values]


def _number(value: float, digits: int) -> str:
    text = f"{value:,.{digits}f}"
    return text[1:] if text.startswith("-") and float(text.replace(",", "")) == 0 else text


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


class _Drawing:
    def __init__(self, chart: Chart) -> None:
        self._chart = chart
        xs = [x for series in chart.series for x in series.x]
        ys = [
            y for series in chart.series for y in (*series.y, *series.low, *series.high) if not math.isnan(y)
        ]
        ys += [value for value, _ in chart.rules]
        low, high = (min(ys), max(ys)) if ys else (0.0, 1.0)
        margin = 0.06 * (high - low)
        low, high = chart.y_range or (low - margin, high + margin)
        left, right = chart.x_range or ((min(xs), max(xs)) if xs else (0.0, 1.0))
        self._legend = self._legend_rows()
        self._top = _TOP + 18 * len(self._legend)
        self._x = _Scale(left, right, _LEFT, chart.width - _RIGHT, chart.log_x)
        self._y = _Scale(low, high, chart.height - _BOTTOM, self._top)

    def _legend_rows(self) -> list[list[tuple[int, Series]]]:
        rows: list[list[tuple[int, Series]]] = []
        used = math.inf
        most = int((self._chart.width - _LEFT - 34) / 7.5)  # letters that fit into a row
        named = [
            (self._colour(n, series), replace(series, name=_shortened(series.name, most)))
            for n, series in enumerate(self._chart.series)
        ]
        if len(named) == 1 and not self._chart.rules:
            return []  # the title and axes say what a single line is
        for entry in named:
            if not entry[1].name:
                continue
            need = 34 + 7.2 * len(entry[1].name)
            if used + need > self._chart.width - _LEFT:
                rows.append([])
                used = 0.0
            rows[-1].append(entry)
            used += need
        return rows

    @staticmethod
    def _colour(number: int, series: Series) -> int:
        return (number if series.colour is None else series.colour) % len(_LIGHT)

    def svg(self, standalone: bool) -> str:
        chart = self._chart
        parts = [
            f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {chart.width} {chart.height}" '
            f'width="{chart.width}" height="{chart.height}" role="img" aria-label="{escape(chart.title)}">'
        ]
        if standalone:
            parts.append(f"<style>{STYLE}</style>")
            parts.append('<rect class="paper" width="100%" height="100%"/>')
        parts.append(f'<text class="title" x="{_LEFT}" y="22">{escape(chart.title)}</text>')
        parts += self._draw_legend()
        parts += self._draw_axes()
        for number, series in enumerate(chart.series):
            parts += self._draw(series, self._colour(number, series))
        parts += self._draw_rules()
        parts.append("</svg>\n")
        return "\n".join(parts)

    def _draw_legend(self) -> list[str]:
        parts = []
        for row, entries in enumerate(self._legend):
            x, y = float(_LEFT), 42 + 18 * row
            for colour, series in entries:
                if series.kind in ("points", "area"):
                    parts.append(
                        f'<rect class="f{colour}" x="{x}" y="{y - 9}" width="11" height="11" rx="2"/>'
                    )
                else:
                    dash = " dash" if series.kind == "dashed" else ""
                    parts.append(
                        f'<line class="l{colour}{dash}" x1="{x}" x2="{x + 16}" y1="{y - 4}" y2="{y - 4}"/>'
                    )
                parts.append(f'<text class="ink" x="{x + 20:.0f}" y="{y}">{escape(series.name)}</text>')
                x += 34 + 7.2 * len(series.name)
        return parts

    def _draw_axes(self) -> list[str]:
        chart, bottom = self._chart, self._chart.height - _BOTTOM
        right = chart.width - _RIGHT
        parts = []
        for value, label in self._y.ticks():
            y = f"{self._y(value):.1f}"
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
            parts.append(
                f'<text x="{_LEFT - 7}" y="{float(y) + 4:.1f}" text-anchor="end">{escape(label)}</text>'
            )
        for value, label in self._x.ticks():
            x = f"{self._x(value):.1f}"
            parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>')
            parts.append(f'<text x="{x}" y="{bottom + 17}" text-anchor="middle">{escape(label)}</text>')
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        middle = 0.5 * (_LEFT + right)
        parts.append(
            f'<text x="{middle:.0f}" y="{chart.height - 9}" text-anchor="middle">{escape(chart.x_label)}</text>'
        )
        height = 0.5 * (self._top + bottom)
        parts.append(
            f'<text x="14" y="{height:.0f}" text-anchor="middle" transform="rotate(-90 14 {height:.0f})">'
            f"{escape(chart.y_label)}</text>"
        )
        if chart.diagonal:
            low, high = max(self._x.low, self._y.low), min(self._x.high, self._y.high)
            parts.append(
                f'<line class="axis dash" x1="{self._x(low):.1f}" y1="{self._y(low):.1f}" '
                f'x2="{self._x(high):.1f}" y2="{self._y(high):.1f}"/>'
            )
        return parts

    def _draw_rules(self) -> list[str]:
        right = self._chart.width - _RIGHT
        parts = []
        for value, label in self._chart.rules:
            y = self._y(value)
            parts.append(f'<line class="rule" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text class="ink label" x="{right}" y="{y - 5:.1f}" text-anchor="end">'
                f"{escape(_shortened(label, 48))}</text>"
            )
        return parts

    def _points(self, xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
        return [(self._x(x), self._y(y)) for x, y in zip(xs, ys, strict=True) if not math.isnan(y)]

    def _draw(self, series: Series, colour: int) -> list[str]:
        points = self._points(series.x, series.y)
        if not points:
            return []
        parts = []
        if series.kind == "area":
            edge = [*points, *reversed(self._points(series.x, series.low))]
            return [f'<path class="f{colour} area" d="{_path(edge)}Z"/>']
        if series.high and len(points) > 1:
            edge = [
                *self._points(series.x, series.high),
                *reversed(self._points(series.x, series.low)),
            ]
            parts.append(f'<path class="f{colour} band" d="{_path(edge)}Z"/>')
        if series.kind in ("line", "dashed", "both"):
            dash = " dash" if series.kind == "dashed" else ""
            parts.append(f'<path class="l{colour}{dash}" d="{_path(points)}"/>')
        if series.kind in ("points", "both"):
            if series.high:
                for x, low, high in zip(series.x, series.low, series.high, strict=True):
                    if not math.isnan(low):
                        at = f"{self._x(x):.1f}"
                        parts.append(
                            f'<line class="l{colour}" x1="{at}" x2="{at}" y1="{self._y(low):.1f}" '
                            f'y2="{self._y(high):.1f}"/>'
                        )
            parts += [f'<circle class="f{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in points]
        return parts


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def interval_picture(low: float, mean: float, high: float, target: float | None) -> str:
    """An interval of accuracy as a bar on a scale, its mean as a point, and a target as a line."""
    marks = [low, mean, high, *(() if target is None else (target,))]
    spread = max(0.02, max(marks) - min(marks))
    scale = _Scale(max(0.0, min(marks) - 0.4 * spread), min(1.0, max(marks) + 0.4 * spread), 14, 466)
    parts = [
        '<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 62" role="img" '
        f'aria-label="interval {low:.4f} to {high:.4f}">',
        '<line class="axis" x1="14" x2="466" y1="40" y2="40"/>',
    ]
    for value, label in scale.ticks():
        at = f"{scale(value):.1f}"
        parts.append(f'<line class="axis" x1="{at}" x2="{at}" y1="40" y2="44"/>')
        parts.append(f'<text x="{at}" y="57" text-anchor="middle">{label}</text>')
    tone = 2 if target is None or mean >= target else 6
    left, right = scale(low), scale(high)
    parts.append(
        f'<rect class="f{tone} band" x="{left:.1f}" y="22" width="{max(1.0, right - left):.1f}" height="12"/>'
    )
    parts.append(f'<circle class="f{tone}" cx="{scale(mean):.1f}" cy="28" r="5"/>')
    if target is not None:
        x = scale(target)
        anchor = "start" if x < 240 else "end"
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="40"/>')
        parts.append(
            f'<text class="ink" x="{x + (5 if x < 240 else -5):.1f}" y="15" text-anchor="{anchor}">'
            f"promised {target:g}</text>"
        )
    parts.append("</svg>")
    return "".join(parts)
