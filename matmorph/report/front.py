"""The front of a budget as a table, as pareto.json and as pareto.svg, a picture that stands by itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console

from matmorph.report.charts import Frame, dot, path, text, tick_text, ticks, x_axis, y_axis
from matmorph.report.listing import plain_table
from matmorph.report.table import count, error_text, size
from matmorph.runtime.format.artifact import PARETO, PARETO_PICTURE

if TYPE_CHECKING:
    from matmorph.passes.budget.pareto import Front, Point

_STYLE = (
    "text{font:11px sans-serif;fill:#444}.end{text-anchor:end}.mid{text-anchor:middle}.grid{stroke:#ddd}.base{stroke:#888}"
    ".curve{fill:none;stroke:#0072b2;stroke-width:1.5}.front{fill:#0072b2}"
)


def front_files(front: Front) -> Mapping[str, bytes]:
    """Both files by name; the same front gives the same bytes."""
    return {PARETO: (json.dumps(front.to_dict(), indent=1) + "\n").encode(), PARETO_PICTURE: front_svg(front).encode()}


def print_front(console: Console, front: Front) -> None:
    """One line per point, the smallest first."""
    console.print(f"pareto: {front.resource}, % of the {_whole(front)}; error: root of the mean squared error that the budget minimises")
    table = plain_table(console)
    for name in (front.resource, "%", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("sites")
    unit = size if front.resource == "bytes" else count
    for point in front.points:
        table.add_row(unit(point.total), f"{100 * front.share(point):.1f}", error_text(point.error), _methods(point))
    console.print(table)
    if len(front.points) < front.asked:
        console.print(f"{front.asked} budgets make {len(front.points)} points: the candidates allow no other choice between them")


def _methods(point: Point) -> str:
    """`24 low_rank, 12 keep`."""
    counts = Counter(" + ".join(part.split()[0] for part in chosen.split(" + ")) for chosen in point.chosen.values())
    return ", ".join(f"{number} {name}" for name, number in counts.most_common())


def front_svg(front: Front) -> str:
    """Error over size, in percent."""
    across = ticks(100 * max((front.share(point) for point in front.points), default=0.0), 5)
    up = ticks(max((point.error for point in front.points), default=0.0))
    frame = Frame(460, 300, 0.0, across[-1] or 1.0, 0.0, up[-1] or 1.0, left=52, bottom=40)
    places = [(frame.x(100 * front.share(point)), frame.y(point.error)) for point in front.points]
    named = [f"{100 * front.share(point):.1f} %: {point.error:.4g} ({_methods(point)})" for point in front.points]
    marks = [
        x_axis(frame, [(value, tick_text(value)) for value in across]),
        y_axis(frame, [(value, tick_text(value)) for value in up]),
        path(places, "curve"),
        *(dot(x, y, 4, "front", title) for (x, y), title in zip(places, named, strict=True)),
        text(frame.width / 2, frame.height - 6, f"{front.resource}, % of the {_whole(front)}; up: error", "mid"),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{frame.width}" height="{frame.height}" viewBox="0 0 {frame.width} {frame.height}">'
    )
    return f"{head}\n<style>{_STYLE}</style>\n" + "\n".join(map(str, marks)) + "\n</svg>\n"


def _whole(front: Front) -> str:
    return "matched matmuls" if front.of == "matched" else "model"
