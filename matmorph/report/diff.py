"""What a rewrite did to the graph around one matmul: the nodes near it before and after, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path

from matmorph.errors import InputError
from matmorph.ir.core import Const, Graph, Node, Origin, Value
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.text.printing import format_node, format_value
from matmorph.ir.text.reading import read_graph
from matmorph.report.reading import listed_file
from matmorph.runtime.format.artifact import GRAPH, SOURCE_GRAPH


@dataclass(frozen=True, slots=True)
class DiffSide:
    """The nodes near the matmul in one of the graphs, in order; `changed`: those that the other graph does not have."""

    nodes: tuple[Node, ...]
    changed: frozenset[Node]

    @property
    def weights(self) -> tuple[Const, ...]:
        """The weights that the changed nodes read, in order."""
        return tuple(
            dict.fromkeys(value for node in self.nodes if node in self.changed for value in node.inputs() if isinstance(value, Const))
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """Around the site `path`."""

    path: str
    before: DiffSide
    after: DiffSide


def difference(source: Graph, graph: Graph, path: str, around: int = 1) -> Difference:
    """The nodes of a matmul, what stands in their place, and `around` steps of their neighbours along the data flow.

    `path`: of a site, as `matmorph inspect` prints it, or of a module, then all its nodes. InputError for a path that is neither, with the
    nearest that is.
    """
    gone, new = changes(source, graph)
    start = _focus(source, path)
    names = {value.name for node in start for value in node.outputs}
    grown = _grown(graph, [node for node in graph.nodes if any(value.name in names for value in node.outputs)], frozenset(new))
    before, after = _near(source, start, around), _near(graph, grown, around)
    return Difference(path, DiffSide(before, frozenset(gone) & frozenset(before)), DiffSide(after, frozenset(new) & frozenset(after)))


def read_graphs(folder: Path, verify: bool = True) -> tuple[Graph, Graph]:
    """The graphs of an artefact folder, of the source and as rewritten; their weights cannot be loaded. InputError where they are missing
    or damaged; with `verify` also where they are not those that the manifest lists."""
    return _read(listed_file(folder, SOURCE_GRAPH, verify)), _read(listed_file(folder, GRAPH, verify))


def _read(path: Path) -> Graph:
    if not path.is_file():
        raise InputError(f"{path}: missing", ["folders that `matmorph compile` writes hold it since version 0.1"])
    # what the model is called with does not matter here, and its classes may be those of a package that is not installed
    return read_graph(path, lambda line: not line.startswith(("call ", "result ")))


def changes(source: Graph, graph: Graph) -> tuple[list[Node], list[Node]]:
    """Nodes of the source that the rewritten graph does not have, and nodes that are new in it."""
    before, after = ({_statement(node): node for node in one.nodes} for one in (source, graph))
    return [node for text, node in before.items() if text not in after], [node for text, node in after.items() if text not in before]


def summary(source: Graph, graph: Graph) -> list[str]:
    """Lines on the whole graph: how many nodes, and which operators went and came."""
    gone, new = changes(source, graph)
    lines = [f"{len(source.nodes)} nodes before, {len(graph.nodes)} after"]
    for name, nodes in (("removed", gone), ("added", new)):
        counts = Counter(short(node.op) for node in nodes)
        lines.append(f"{name}: {', '.join(f'{number} {op}' for op, number in counts.most_common()) or 'none'}")
    return lines


def changed_sites(source: Graph, graph: Graph) -> list[str]:
    """Paths of the source's matmuls whose own nodes are no longer there as they were."""
    gone = set(changes(source, graph)[0])
    return [site.path for site in find_sites(source) if any(application.node in gone for application in site.applications)]


def lines(found: Difference) -> list[str]:
    """The difference as text: `-` before, `+` after, nothing for what is the same."""
    before, after = _listed(found.before), _listed(found.after)
    result: list[str] = []
    for tag, i1, i2, j1, j2 in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if tag == "equal":
            result += [f"  {line}" for line in before[i1:i2]]
        else:
            result += [*(f"- {line}" for line in before[i1:i2]), *(f"+ {line}" for line in after[j1:j2])]
    return result


def _listed(side: DiffSide) -> list[str]:
    weights = [f"{weight.kind} {format_value(weight)}: {weight.type}" for weight in side.weights]
    return [*weights, *(_statement(node) for node in side.nodes)]


def _statement(node: Node) -> str:
    """The node without where it comes from."""
    return format_node(replace(node, origin=Origin()))


def short(op: str) -> str:
    """`aten.linear.default` -> "linear"."""
    parts = op.split(".")
    return parts[1] if len(parts) > 1 else op


def _focus(graph: Graph, path: str) -> list[Node]:
    """The nodes of the site, or of the module, at a path."""
    sites = {site.path: site for site in find_sites(graph)}
    if path in sites:
        site = sites[path]
        return [*(application.node for application in site.applications), *site.gathers]
    inside = [node for node in graph.nodes if node.origin.path == path or node.origin.path.startswith(f"{path}.")]
    if not path or not inside:
        near = get_close_matches(path, sites, 1, 0.4)
        raise InputError(f"no matmul or module at {path!r}" + (f"; did you mean {near[0]}?" if near else ""))
    return inside


def _grown(graph: Graph, start: Sequence[Node], new: frozenset[Node]) -> list[Node]:
    """The start and the new nodes that lead to it."""
    makers = graph.producers()
    found, left = dict.fromkeys(start), list(start)
    while left:
        for value in left.pop().inputs():
            maker = makers.get(value)
            if maker in new and maker is not None and maker not in found:
                found[maker] = None
                left.append(maker)
    return list(found)


def _near(graph: Graph, start: Iterable[Node], around: int) -> tuple[Node, ...]:
    """The start and its neighbours up to `around` steps, in the graph's order."""
    makers, users = graph.producers(), graph.users()

    def neighbours(node: Node) -> Iterator[Node]:
        yield from (makers[value] for value in node.inputs() if value in makers)
        yield from (user for value in node.outputs for user in users.get(value, ()))

    found = dict.fromkeys(start)
    ring = list(found)
    for _ in range(around):
        ring = list(dict.fromkeys(other for node in ring for other in neighbours(node) if other not in found))
        found.update(dict.fromkeys(ring))
    return tuple(node for node in graph.nodes if node in found)


def outside(side: DiffSide) -> tuple[Value, ...]:
    """What the nodes read that none of them makes, weights left out."""
    made = {value for node in side.nodes for value in node.outputs}
    return tuple(
        dict.fromkeys(value for node in side.nodes for value in node.inputs() if value not in made and not isinstance(value, Const))
    )
