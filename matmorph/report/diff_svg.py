"""A difference drawn: the graph before on the left, after on the right, data flowing down. One file that stands by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean

from markupsafe import Markup

from matmorph.ir.core import Const, Node, Value
from matmorph.report.charts import hint, line, text
from matmorph.report.diff import Difference, DiffSide, outside, short
from matmorph.runtime.format.printable import printable

_CHAR, _LINE, _PAD = 6.7, 15, 9
"""Width of a character and height of a line of the 11 px monospace face, and the margin in a box."""
_GAP, _STEP, _MARGIN, _TOP = 20, 30, 24, 62
_WORDS = 46
"""Longer words are cut in the middle; the whole of them shows under the pointer."""
_STYLE = """
svg { --paper: #fff; --ink: #1a1f24; --soft: #59636e; --line: #b9c1c9; --same: #f3f5f7;
  --gone: #c2540a; --new: #0072b2; --gone-in: #fdf0e7; --new-in: #e8f3fb; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #14181c; --ink: #e5e8eb; --soft: #9aa5b0; --line: #56616c; --same: #1e2328;
    --gone: #f0883e; --new: #4ea3dd; --gone-in: #33231a; --new-in: #17293a; }
}
.paper { fill: var(--paper); }
text { font: 11px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", "Liberation Mono", monospace; fill: var(--ink); }
.head { font: 600 14px system-ui, "Segoe UI", "Liberation Sans", sans-serif; } .soft, .out { fill: var(--soft); } .op { font-weight: 600; }
rect { fill: var(--same); stroke: var(--line); } .in rect { fill: none; stroke-dasharray: 2 3; } .in text { fill: var(--soft); }
.gone rect { fill: var(--gone-in); stroke: var(--gone); stroke-dasharray: 6 3; stroke-width: 1.5; }
.new rect { fill: var(--new-in); stroke: var(--new); stroke-width: 1.8; }
path { fill: none; stroke: var(--line); stroke-width: 1.4; } .rule { stroke: var(--line); }
"""


@dataclass(eq=False, slots=True)
class _Box:
    """A node, or a value that comes from outside, with its lines of words. The layout gives it a row, the place of its upper edge, and
    how tall it is there."""

    words: tuple[str, ...]
    kind: str
    hint: str
    above: list[_Box] = field(default_factory=list)
    row: int = 0
    x: float = 0.0
    y: float = 0.0
    tall: float = 0.0

    @property
    def width(self) -> float:
        return max(len(word) for word in self.words) * _CHAR + 2 * _PAD

    @property
    def height(self) -> float:
        return len(self.words) * _LINE + 2 * _PAD - 4


def difference_svg(found: Difference) -> str:
    """The picture as the text of an .svg file. Equal arguments give equal text."""
    left = _placed(_boxes(found.before, "gone", found.path))
    right = _placed(_boxes(found.after, "new", found.path))
    widths = [max((abs(box.x) + box.width / 2 for box in boxes), default=100.0) * 2 for boxes in (left, right)]
    centres = (_MARGIN + widths[0] / 2, _MARGIN * 3 + widths[0] + widths[1] / 2)
    width = max(widths[0] + widths[1] + 4 * _MARGIN, len(found.path) * 8.6 + 2 * _MARGIN)
    height = max((box.y + box.height for box in (*left, *right)), default=_TOP) + _MARGIN
    middle = _MARGIN * 2 + widths[0]
    parts = [
        Markup('<rect class="paper" width="{:.0f}" height="{:.0f}" stroke="none"/>').format(width, height),
        text(_MARGIN, 28, found.path, "head"),
        text(_MARGIN, 48, f"before: {_count(left)}", "soft"),
        text(middle + _MARGIN, 48, f"after: {_count(right)}", "soft"),
        line(middle, 40, middle, height - _MARGIN, "rule"),
        *(_edges(boxes, centre) for boxes, centre in zip((left, right), centres, strict=True)),
        *(_drawn(box, centre) for boxes, centre in zip((left, right), centres, strict=True) for box in boxes),
    ]
    open_tag = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" width="{:.0f}" height="{:.0f}" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">'
    ).format(width, height, width, height, f"The graph around {found.path} before and after")
    return printable(f"{open_tag}<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n")  # XML has no control characters


def _count(boxes: Sequence[_Box]) -> str:
    nodes = [box for box in boxes if box.kind not in ("in", "way")]
    changed = sum(box.kind in ("gone", "new") for box in nodes)
    return f"{len(nodes)} nodes, {changed} that the other side does not have"


# ---- what is drawn


def _boxes(side: DiffSide, kind: str, path: str) -> list[_Box]:
    """A box per value from outside, then one per node, each below what it reads."""
    makers: dict[Value, _Box] = {value: _Box((_cut(f"%{value.name}"), _cut(str(value.type))), "in", value.name) for value in outside(side)}
    found = list(makers.values())
    for node in side.nodes:
        box = _node_box(node, kind if node in side.changed else "same", path)
        box.above = list(dict.fromkeys(makers[value] for value in node.inputs() if value in makers))
        makers.update(dict.fromkeys(node.outputs, box))
        found.append(box)
    return found


def _node_box(node: Node, kind: str, path: str) -> _Box:
    weights = [value for value in dict.fromkeys(node.inputs()) if isinstance(value, Const)]
    named = (f"{_relative(weight.path, path)} {_dims(weight)}" for weight in weights)
    words = (short(node.op), *map(_cut, named), *(_cut(str(value.type)) for value in node.outputs))
    return _Box(words, kind, "; ".join([node.op, *(weight.path for weight in weights), *(f"%{value.name}" for value in node.outputs)]))


def _relative(name: str, path: str) -> str:
    """A weight's name without the path of the matmul that the picture is about."""
    return name.removeprefix(f"{path}.") if name.startswith(f"{path}.") else name


def _dims(weight: Const) -> str:
    return "x".join(str(dim) for dim in weight.tensor.shape) or "scalar"


def _cut(words: str) -> str:
    half = _WORDS // 2 - 1
    return words if len(words) <= _WORDS else f"{words[:half]}..{words[-half:]}"


# ---- layout


def _placed(boxes: list[_Box]) -> list[_Box]:
    """Rows by the longest way from above; in a row by the mean place of what each box reads, side by side around 0."""
    for box in boxes:  # in topological order
        box.row = max((other.row + 1 for other in box.above), default=0)
    for box in boxes:
        readers = [other.row for other in boxes if box in other.above]
        if box.kind == "in" and readers:
            box.row = min(readers) - 1  # what comes from outside stands right above its first reader
    boxes = _with_ways(boxes)
    y = float(_TOP)
    for number in sorted({box.row for box in boxes}):
        row = [box for box in boxes if box.row == number]
        wanted = {box: mean(other.x for other in box.above) if box.above else 0.0 for box in row}
        row.sort(key=lambda box: wanted[box])
        _spread(row, mean(wanted.values()))
        for box in row:
            box.y = y
            box.tall = max(other.height for other in row) if box.kind == "way" else box.height
        y += max(box.height for box in row) + _STEP
    return boxes


def _with_ways(boxes: Sequence[_Box]) -> list[_Box]:
    """An edge over several rows goes through a place of its own in each, so that it crosses no box."""
    found = []
    for box in boxes:
        for place, other in enumerate(box.above):
            for row in range(other.row + 1, box.row):
                other = _Box(("",), "way", "", [other], row)
                found.append(other)
            box.above[place] = other
        found.append(box)
    return found


def _spread(row: Sequence[_Box], middle: float) -> None:
    """Side by side, the row as a whole around `middle`."""
    x = middle - (sum(box.width for box in row) + _GAP * (len(row) - 1)) / 2
    for box in row:
        box.x = x + box.width / 2
        x += box.width + _GAP


# ---- drawing


def _edges(boxes: Sequence[_Box], centre: float) -> Markup:
    parts = []
    for box in boxes:
        for other in box.above:
            x1, y1, x2, y2 = centre + other.x, other.y + other.tall, centre + box.x, box.y
            bend = (y1 + y2) / 2
            parts.append(
                Markup('<path d="M{:.1f} {:.1f} C{:.1f} {:.1f} {:.1f} {:.1f} {:.1f} {:.1f}"/>').format(x1, y1, x1, bend, x2, bend, x2, y2)
            )
    return Markup("").join(parts)


def _drawn(box: _Box, centre: float) -> Markup:
    x = centre + box.x
    if box.kind == "way":
        return Markup('<path d="M{:.1f} {:.1f} V{:.1f}"/>').format(x, box.y, box.y + box.tall)
    words = Markup("").join(
        Markup('<text class="{}" text-anchor="middle" x="{:.1f}" y="{:.1f}">{}</text>').format(
            "op" if number == 0 and box.kind != "in" else "out", x, box.y + _PAD + 9 + number * _LINE, word
        )
        for number, word in enumerate(box.words)
    )
    return Markup('<g class="{}"><rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="5"/>{}{}</g>').format(
        box.kind, x - box.width / 2, box.y, box.width, box.height, hint(box.hint), words
    )
