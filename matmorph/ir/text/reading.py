"""A graph from its text in a file. A file may be damaged, which is no fault of the IR: whatever its parser or the verifier find is an error
of the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from matmorph.errors import InputError, MatmorphError
from matmorph.ir.core import Graph
from matmorph.ir.text.printing import parse_graph
from matmorph.runtime.format.reading import StoredError, read_text


def read_graph(path: Path, keep: Callable[[str], bool] = lambda line: True, weights: Mapping[str, torch.Tensor] | None = None) -> Graph:
    """The graph of the lines that are kept. `weights`: by dotted name, None = they cannot be loaded. InputError names the file."""
    try:
        text = "".join(line for line in read_text(path).splitlines(keepends=True) if keep(line))
        return parse_graph(text) if weights is None else parse_graph(text, weights)
    except StoredError as error:
        raise InputError(str(error)) from error
    except MatmorphError as error:
        raise InputError(f"{path}: cannot be read: {error.message}", error.details) from error
    except RecursionError as error:
        raise InputError(f"{path}: cannot be read: nested too deep") from error
    except Exception as error:  # of torch, which is asked for operators, types and pytrees by name
        line = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cannot be read: {type(error).__name__}: {line}") from error
