"""The cases of a folder's check.npz as JSON, for programs that do not read numpy's format: python vectors.py FOLDER > cases.json

[{"inputs": {name: {"dtype", "shape", "data"}}, "outputs": {...}}, ...]; integers as strings, because JSON numbers end at 2^53.
"""

import json
import sys
from pathlib import Path

import numpy as np

from matmorph.runtime.check import read_cases
from matmorph.runtime.manifest import read_manifest


def plain(array: np.ndarray) -> dict:
    data = array.reshape(-1).tolist()
    exact = [str(item) for item in data] if array.dtype.kind in "iu" else data
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": exact}


folder = Path(sys.argv[1])
cases = read_cases(folder, read_manifest(folder))
sides = ("inputs", "outputs")
json.dump([{side: {name: plain(array) for name, array in getattr(case, side).items()} for side in sides} for case in cases], sys.stdout)
