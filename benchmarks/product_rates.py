"""The constants by which contraction plans are costed, fitted to this machine: times of single MatMul nodes under ONNX Runtime.

Measured are the nodes of all plans of the trains below, each in a session of its own with bound inputs and outputs; the least of many runs
counts, since other work on the machine only adds. The constants are those of `runtime.targets.rates.Rates`, fitted to the logarithms of the
times. Bounds of the caches are not fitted: they stay those of the table.

    python benchmarks/product_rates.py [--ranks 4 8 16 64] [--tokens 1 16 256] [--passes 3] [--largest 1e9]
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
from _common import finish, parser, session_options, tell
from onnx import TensorProto, helper, numpy_helper
from scipy.optimize import least_squares

from matmorph.passes.linalg.contraction import TrainShape, candidate_plans, matrix_train
from matmorph.passes.linalg.contraction_cost import products
from matmorph.runtime.targets.cpu import CPU, CPU_RATES
from matmorph.runtime.targets.rates import Product, Rates

MODES = (
    ((8, 8, 16), (8, 8, 16)),
    ((16, 16, 16), (16, 16, 16)),
    ((12, 8, 8), (16, 12, 16)),
    ((16, 12, 16), (12, 8, 8)),
    ((32, 32), (32, 32)),
)
FIELDS = ("node", "call", "work", "panel", "copy", "left", "result")
SAMPLE_SECONDS = 1e-3


def nodes(ranks: Iterable[int], tokens: Sequence[int], modes: Iterable[Any], largest: float) -> list[Product]:
    """The distinct products of all plans, of at most `largest` multiply-adds."""
    trains = [matrix_train(out, into, (1, *(rank,) * (len(out) - 1), 1)) for out, into in modes for rank in ranks]
    found = {item for train in trains for count in tokens for item in _of_train(train, count)}
    small = [item for item in found if item.batch * item.rows * item.inner * item.columns <= largest]
    return sorted(small, key=lambda item: (item.batch, item.rows, item.inner, item.columns))


def _of_train(train: TrainShape, tokens: int) -> list[Product]:
    return [item for plan in candidate_plans(train) for item in products(plan, train, tokens)]


def least(item: Product, threads: int, runs: int = 5) -> float:
    """Seconds of one run of a session with the one node."""
    batch = (item.batch,) if item.batch > 1 else ()
    right, left, result = (item.inner, item.columns), (item.rows, item.inner), (*batch, item.rows, item.columns)
    constant, value = (right, left) if item.packed else (left, (*batch, *right))
    generator = np.random.default_rng(0)
    weight = numpy_helper.from_array(generator.standard_normal(constant, dtype=np.float32), "c")
    names = ("x", "c") if item.packed else ("c", "x")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", value), ("y", result)))
    graph = helper.make_graph([helper.make_node("MatMul", names, ["y"])], "node", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, session_options(threads), providers=[CPU.provider])
    bound = session.io_binding()
    held = [onnxruntime.OrtValue.ortvalue_from_numpy(generator.standard_normal(shape, dtype=np.float32)) for shape in (value, result)]
    bound.bind_ortvalue_input("x", held[0])
    bound.bind_ortvalue_output("y", held[1])
    session.run_with_iobinding(bound)
    repeats = max(1, min(300, round(SAMPLE_SECONDS / _seconds(session, bound, 1))))
    return min(_seconds(session, bound, repeats) for _ in range(runs))


def _seconds(session: Any, bound: Any, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        session.run_with_iobinding(bound)
    return (time.perf_counter() - start) / repeats


def features(items: Sequence[Product], base: Rates) -> tuple[list[str], np.ndarray]:
    """The time of each product is linear in the constants: what it is with one of them at 1 and all others at 0. Named `constants[0]` ...
    are the tiers. `node` here includes what a run of the session costs."""
    zero = replace(base, **dict.fromkeys(FIELDS, 0.0), constants=(), values=())
    units = {name: replace(zero, **{name: 1.0}) for name in FIELDS}
    for tiers in ("constants", "values"):
        units |= {f"{tiers}[{k}]": replace(zero, **{tiers: ((limit, 1.0),)}) for k, (limit, _) in enumerate(getattr(base, tiers))}
    return list(units), np.array([[unit.product(item) for unit in units.values()] for item in items], dtype=float)


def fit(table: np.ndarray, seconds: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(constants, logarithm of predicted over measured per node); constants are positive, outliers count less."""

    def errors(logs: np.ndarray) -> np.ndarray:
        return np.asarray(np.log(table @ np.exp(logs) / seconds))

    found = least_squares(errors, np.log(start), bounds=(-60, 0), loss="soft_l1", f_scale=0.2)
    return np.exp(found.x), errors(found.x)


def constants_of(base: Rates) -> np.ndarray:
    """Of a row of the table, in the order of `features`."""
    return np.array([*(getattr(base, name) for name in FIELDS), *(cost for tiers in (base.constants, base.values) for _, cost in tiers)])


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 64])
    options_of.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    options_of.add_argument("--passes", type=int, default=3, help="each node is measured so many times, minutes apart")
    options_of.add_argument("--largest", type=float, default=1e9, help="multiply-adds of the largest product that is measured")
    options = options_of.parse_args(arguments)
    modes = MODES
    if options.tiny:
        options.ranks, options.tokens, options.passes, modes = [2], [1, 3], 1, (((2, 3, 2), (2, 3, 2)),)
    say = tell(options)
    items = nodes(options.ranks, options.tokens, modes, options.largest)
    times = np.full(len(items), np.inf)
    for turn in range(options.passes):
        say(f"{len(items)} nodes, pass {turn + 1} ...")
        times = np.minimum(times, [least(item, options.threads) for item in items])
    base = CPU_RATES
    names, table = features(items, base)
    constants, errors = fit(table, times, constants_of(base))
    rows = [{"constant": name, "seconds": float(value)} for name, value in zip(names, constants, strict=True)]
    middle, most = np.quantile(np.abs(errors), (0.5, 0.9))
    finish(
        options, rows, [f"{len(items)} nodes: half within {middle:.0%}, nine tenths within {most:.0%}; node includes a run of the session"]
    )


if __name__ == "__main__":
    main()
