"""Which kernels ONNX Runtime's providers have: writes `matmorph/runtime/targets/kernels.txt` from ONNX Runtime's own list.

Without an argument the list is that of the installed ONNX Runtime (`get_all_opkernel_def`), which knows of each kernel what it takes
together. That call creates every provider of the package: a GPU package needs the libraries of CUDA and TensorRT for it, and a package for
CPUs lists no CUDA kernel. With an argument it is the page that ONNX Runtime generates from the same list, docs/OperatorKernels.md of its
repository at the tag of the release; that says for each type name what all kernels of a version take between them.

    python tools/kernel_table.py [OperatorKernels.md] [--version 1.31.1] [--out FILE]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

import matmorph.runtime.targets

OUT = Path(matmorph.runtime.targets.__file__).parent / "kernels.txt"
PROVIDERS = {"CUDAExecutionProvider": "cuda", "CPUExecutionProvider": "cpu"}
DOMAINS = ("ai.onnx", "com.microsoft")
"""Others are ONNX Runtime's own inventions for one provider, or ai.onnx.ml, whose trees and text no network is made of."""
NEWEST = 2**31 - 1
NUMPY = {"float": "float32", "double": "float64"}

Types = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Row:
    """One kernel. `last` None: registered without an end."""

    domain: str
    operator: str
    provider: str
    first: int
    last: int | None
    types: Types


def element(text: str) -> str:
    """tensor(float) as float32, seq(tensor(int64)) as seq(int64)."""
    inner = re.sub(r"tensor\((\w+)\)", lambda match: NUMPY.get(match[1], match[1]), text)
    return inner.replace(" ", "")


def of_installed() -> Iterator[Row]:
    """The list of the installed package."""
    for kernel in onnxruntime.capi.onnxruntime_pybind11_state.get_all_opkernel_def():
        domain = kernel.domain or "ai.onnx"
        if domain in DOMAINS and kernel.provider in PROVIDERS:
            first, last = kernel.version_range
            types = {name: frozenset(map(element, of)) for name, of in kernel.type_constraints.items()}
            yield Row(domain, kernel.op_name, PROVIDERS[kernel.provider], first, None if last == NEWEST else last, types)


def of_page(text: str) -> Iterator[Row]:
    """The list of docs/OperatorKernels.md."""
    provider = domain = operator = ""
    for line in text.splitlines():
        if found := re.match(r"## Operators implemented by (\w+)", line):
            provider = PROVIDERS.get(found[1], "")
        elif found := re.match(r"\|\*\*Operator Domain:\*\* \*([\w.]+)\*", line):
            domain = found[1]
        elif len(cells := line.split("|")) == 6 and "**" in cells[4] and provider and domain in DOMAINS:
            operator = cells[1] or operator
            yield Row(domain, operator, provider, *_versions(cells[3]), _page_types(cells[4]))


def _versions(text: str) -> tuple[int, int | None]:
    """13+ | [6, 12] | 13"""
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    return numbers[0], None if text.endswith("+") else numbers[-1]


def _page_types(cell: str) -> Types:
    pairs = re.findall(r"\*\*([^*]+)\*\* = (.*?)(?=<br|$)", cell)
    return {name: frozenset(element(one) for one in of.split(", ")) for name, of in pairs}


def merged(kernels: Iterable[Types]) -> list[Types]:
    """Fewer kernels that take the same: those that differ in what they take for one name become one."""
    waiting = list(dict.fromkeys(tuple(sorted(one.items())) for one in kernels))
    for place in range(max(map(len, waiting), default=0)):
        groups: dict[Any, frozenset[str]] = {}
        for one in waiting:
            if place < len(one):
                key = (one[:place], one[place][0], one[place + 1 :])
                groups[key] = groups.get(key, frozenset()) | one[place][1]
        waiting = [
            *(one for one in waiting if place >= len(one)),
            *((*before, (name, of), *after) for (before, name, after), of in groups.items()),
        ]
    return [dict(one) for one in waiting]


def signatures() -> dict[tuple[str, str], dict[int, tuple[list[str], list[str]]]]:
    """Type names of inputs and outputs of every version of every operator that the installed ONNX Runtime knows, by domain and name."""
    found: dict[tuple[str, str], dict[int, tuple[list[str], list[str]]]] = {}
    for schema in onnxruntime.capi.onnxruntime_pybind11_state.get_all_operator_schema():
        domain = schema.domain or "ai.onnx"
        if domain in DOMAINS:
            ports = ([_port(one) for one in schema.inputs], [_port(one) for one in schema.outputs])
            found.setdefault((domain, schema.name), {})[schema.since_version] = ports
    return found


def _port(parameter: Any) -> str:
    many = str(parameter.option).endswith("Variadic")
    return element(parameter.typeStr) + ("..." if many else "")


def table(rows: Iterable[Row], known: Mapping[tuple[str, str], Any], head: str) -> str:
    """The text of kernels.txt. A constraint on a parameter whose type the operator itself fixes says nothing and is left out."""
    by_operator: dict[tuple[str, str], dict[tuple[str, int, int | None], list[Types]]] = {key: {} for key in known}
    for row in rows:
        key = (row.domain, row.operator)
        names = {name.removesuffix("...") for ports in known.get(key, {}).values() for side in ports for name in side}
        types = {name: of for name, of in row.types.items() if name in names}
        by_operator.setdefault(key, {}).setdefault((row.provider, row.first, row.last), []).append(types)
    lines = [f"# {line}" for line in head.splitlines()]
    for key in sorted(by_operator):
        lines.append(" ".join(key))
        for since, (inputs, outputs) in sorted(known.get(key, {}).items()):
            lines.append(f" {' '.join([str(since), *inputs])} -> {' '.join(outputs)}".rstrip())
        for (provider, first, last), kernels in sorted(by_operator[key].items(), key=lambda item: item[0][:2]):
            versions = f"{first}+" if last is None else f"{first}-{last}"
            texts = (" ".join(f"{name}={','.join(sorted(of))}" for name, of in sorted(types.items())) for types in merged(kernels))
            lines += [f" {provider} {versions} {text}".rstrip() for text in sorted(texts)]
    return "\n".join(lines) + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("page", nargs="?", type=Path, metavar="OperatorKernels.md")
    options.add_argument("--version", default=onnxruntime.__version__, help="the release that the list is of")
    options.add_argument("--commit", help="the commit that the page was read at")
    options.add_argument("--out", type=Path, default=OUT)
    given = options.parse_args()
    build = re.search(r"git-commit-id=(\w+)", onnxruntime.get_build_info())
    commit = given.commit or (build[1] if build and not given.page else "not given")
    origin = "docs/OperatorKernels.md" if given.page else "the list that the package gives of itself, no device was used"
    rows = of_page(given.page.read_text(encoding="utf-8")) if given.page else of_installed()
    head = f"Kernels of ONNX Runtime {given.version} (commit {commit}): {origin}.\nWritten by tools/kernel_table.py."
    given.out.write_text(table(rows, signatures(), head), encoding="utf-8")
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
