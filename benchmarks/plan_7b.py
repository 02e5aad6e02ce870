"""Seconds and peak resident memory of a plan of Llama-2-7B's configuration on the meta device: no weight exists, none is read.

A process of its own is measured, imports included in its memory and not in its seconds.

    python benchmarks/plan_7b.py
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from _common import finish, parser

SPEC = {
    "version": 1,
    "name": "plan-7b",
    "rules": [
        {
            "name": "blocks",
            "match": {"role": ["attention.*", "mlp.*"]},
            "expect": 224,  # 32 layers of q, k, v, o, gate, up, down
            "rewrite": {"low_rank": {"rank": {"ratio": 0.5}, "whiten": True}},
        }
    ],
}


def measure_here(tiny: bool) -> dict[str, Any]:
    """Build, plan and measure in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import matmorph as mm

    layers = 2 if tiny else 32
    config = LlamaConfig(num_hidden_layers=layers)  # the defaults of the class are Llama-2-7B's sizes
    spec = {**SPEC, "rules": [{**SPEC["rules"][0], "expect": 7 * layers}]}
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
        ids = torch.zeros(2, 16, dtype=torch.int64)
    built = _peak_bytes()
    start = time.perf_counter()
    report = mm.plan(model, spec, {"input_ids": ids}, dynamic_shapes={"input_ids": {0: "batch", 1: "seq"}})
    seconds = time.perf_counter() - start
    return {
        "layers": layers,
        "parameters": report.totals.parameters[0],
        "sites": sum(row.status == "rewritten" for row in report.sites),
        "plan_s": seconds,
        "peak_gib": _peak_bytes() / 2**30,
        "before_plan_gib": built / 2**30,
    }


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--inner", *(["--tiny"] if options.tiny else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the measured process failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    options = options_of.parse_args(arguments)
    if options.inner:
        print(json.dumps(measure_here(options.tiny)))
        return
    finish(options, [measure(options)], ["plan_s: trace, select and cost; peak_gib: the whole process, torch and transformers included"])


if __name__ == "__main__":
    main()
