"""Small SVG charts: a frame with ticks, and marks in it. Colours are classes of page.css, so that one picture serves light and dark.

Coordinates are written with one decimal: a tenth of a pixel, and the same text on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import floor, log10

from markupsafe import Markup, escape

TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True, slots=True)
class Frame:
    """A drawing area of `width` x `height` pixels with margins, and what its edges stand for."""

    width: int
    height: int
    x0: float
    x1: float
    y0: float
    y1: float
    left: int = 38
    right: int = 16
    top: int = 8
    bottom: int = 22

    def x(self, value: float) -> float:
        share = (value - self.x0) / (self.x1 - self.x0) if self.x1 != self.x0 else 0.5
        return self.left + share * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        share = (value - self.y0) / (self.y1 - self.y0) if self.y1 != self.y0 else 0.5
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)


def ticks(high: float, count: int = 4) -> list[float]:
    """0 and at most `count` round steps (1, 2 or 5 times a power of ten) that reach `high`."""
    if high <= 0:
        return [0.0]
    power = 10.0 ** floor(log10(high / count))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor * count >= high * (1 - 1e-9))
    reached = next(k for k in range(1, count + 1) if k * step >= high * (1 - 1e-9))
    return [k * step for k in range(reached + 1)]


def tick_text(value: float) -> str:
    """`0.05`, `2`, `1e-06`: as short as it can be."""
    return f"{value:.6g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.0e}"


def svg(frame: Frame, label: str, *marks: Markup) -> Markup:
    """A picture of fixed size; `label` is what a screen reader says in its place."""
    return Markup('<svg class="chart" width="{}" height="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        frame.width, frame.height, frame.width, frame.height, label, Markup("").join(marks)
    )


def y_axis(frame: Frame, values: Iterable[tuple[float, str]]) -> Markup:
    """Horizontal grid lines with their numbers in the left margin."""
    right = frame.width - frame.right
    return Markup("").join(
        line(frame.left, frame.y(value), right, frame.y(value), "grid") + text(frame.left - 6, frame.y(value) + 3.5, name, "tick end")
        for value, name in values
    )


def x_axis(frame: Frame, values: Iterable[tuple[float, str]]) -> Markup:
    """Numbers below, and the base line."""
    base = frame.height - frame.bottom
    names = (text(frame.x(value), base + 14, name, "tick mid") for value, name in values)
    return line(frame.left, base, frame.width - frame.right, base, "base") + Markup("").join(names)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(kind, x1, y1, x2, y2)


def text(x: float, y: float, content: str, kind: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(kind, x, y, content)


def dot(x: float, y: float, radius: float, kind: str, title: str = "") -> Markup:
    return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{:.1f}">{}</circle>').format(kind, x, y, radius, hint(title))


def path(points: Sequence[tuple[float, float]], kind: str, title: str = "", style: str = "") -> Markup:
    """A line through the points."""
    steps = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    styled = Markup(' style="{}"').format(style) if style else Markup("")
    return Markup('<polyline class="{}" points="{}"{}>{}</polyline>').format(kind, steps, styled, hint(title))


def hint(words: str) -> Markup:
    """What shows under the pointer."""
    return Markup("<title>{}</title>").format(escape(words)) if words else Markup("")


def even(numbers: Sequence[int], at_most: int) -> list[int]:
    """At most that many of the sorted numbers, evenly spread, the first and the last among them."""
    last = len(numbers) - 1
    step = max(1, -(-last // (at_most - 1)))
    return [*(numbers[k] for k in range(0, last - step + 1, step)), numbers[last]]
