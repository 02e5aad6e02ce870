"""Deployment: this script imports numpy and `matmorph.runtime` only, so a machine with numpy and onnxruntime runs it.

Shows what a service does: check the folder once, look at the inputs, run. python examples/deploy.py FOLDER
"""

import sys

import numpy as np

from matmorph.runtime import Session
from matmorph.runtime.check import check

DTYPES = {"float32": np.float32, "int64": np.int64, "int32": np.int32, "bool": np.bool_}


def made_up(dtype: str, shape: tuple[int | str, ...], rng: np.random.Generator) -> np.ndarray:
    """An input of the right type; every named axis is 4 long."""
    sizes = [size if isinstance(size, int) else 4 for size in shape]
    if dtype.startswith("float"):
        return rng.standard_normal(sizes).astype(DTYPES[dtype])
    return np.ones(sizes, DTYPES[dtype])


def main() -> None:
    folder = sys.argv[1]
    result = check(folder)  # files, hashes, and outputs beside those that torch gave
    print("\n".join((*result.lines, *result.problems)))
    if not result.ok:
        sys.exit(1)
    session = Session(folder)
    rng = np.random.default_rng(0)
    feeds = {info.name: made_up(info.dtype, info.shape, rng) for info in session.inputs}
    for name, array in session.run(feeds).items():
        print(f"{name}: {array.dtype} {array.shape}")
    print("torch was imported:", "torch" in sys.modules)


if __name__ == "__main__":
    main()
