"""What every test may rely on: one thread per worker, no network, the same random numbers in each run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

# Before torch or a tokenizer is imported: they read these once.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}.items():
    os.environ.setdefault(_name, _value)

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# No deadline: the first example of a worker pays for imports. Derandomized: a failure is the same failure everywhere.
settings.register_profile(
    "default", deadline=None, derandomize=True, database=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("full", settings.get_profile("default"), max_examples=400)
settings.load_profile("full" if os.environ.get("MATMORPH_FULL") else "default")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line: words -> (exit code, stdout, stderr)."""
    from matmorph.cli.main import main

    def call(*words: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        done = capsys.readouterr()
        return int(ended.value.code or 0), done.out, done.err

    return call


@pytest.fixture
def rng() -> np.random.Generator:
    """A fresh generator with a fixed seed."""
    return np.random.default_rng(0)
