"""Several threads on one Trainer or Session. Oracle: the same updates one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny_training
from adapting import X, compiled, trained

from matmorph.exporters.adapters import adapter_arrays
from matmorph.passes.methods import all_methods
from matmorph.runtime.adapters import read_slots, save_adapter
from matmorph.runtime.errors import AdapterError, InputMismatch
from matmorph.runtime.manifest import read_manifest
from matmorph.runtime.session import Session
from matmorph.runtime.trainer import Trainer


def in_thread(call: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tiny_training.write_training(tmp_path / "t"), "cpu")


def test_updates_of_eight_threads_are_all_there(trainer: Trainer, tmp_path: Path) -> None:
    """All step on one batch, so any order gives the same: to the bit what one thread gives."""
    batch, begin = tiny_training.batch(8), threading.Barrier(8)

    def work() -> list[float]:
        begin.wait()
        return [trainer.step(batch) for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        losses = sorted((loss for found in [pool.submit(work) for _ in range(8)] for loss in found.result()), reverse=True)
    alone = Trainer(tiny_training.write_training(tmp_path / "alone"), "cpu")
    expected = [alone.step(batch) for _ in range(160)]
    assert trainer.updates == 160
    assert losses == sorted(expected, reverse=True)
    assert all(np.array_equal(value, alone.parameters()[name]) for name, value in trainer.parameters().items())
    assert all(np.array_equal(a, b) for name, pair in trainer.moments().items() for a, b in zip(pair, alone.moments()[name], strict=True))


def test_a_checkpoint_of_another_thread_fits_its_state(trainer: Trainer, tmp_path: Path) -> None:
    """Saved while `fit` runs: resumed, it ends where the fit did."""
    loader, path = [tiny_training.batch(4, seed) for seed in range(6)], tmp_path / "run.safetensors"

    def halfway(at: Trainer, info: object) -> None:
        if at.updates == 3:
            in_thread(lambda: at.save(path))

    trainer.fit(loader, callbacks=[halfway])
    resumed = Trainer.resume(tmp_path / "t", path, "cpu")
    resumed.fit(loader)
    assert all(np.array_equal(value, trainer.parameters()[name]) for name, value in resumed.parameters().items())


def test_one_fit_at_a_time(trainer: Trainer) -> None:
    loader, seen = [tiny_training.batch(4)], []

    def again(at: Trainer, info: object) -> None:
        for call in (lambda: at.fit(loader), lambda: in_thread(lambda: at.fit(loader))):
            with pytest.raises(InputMismatch, match="this Trainer is in a fit already; one at a time") as caught:
                call()
            seen.append(caught)

    trainer.fit(loader, callbacks=[again])
    assert len(seen) == 2
    assert trainer.updates == 1
    trainer.fit(loader)
    assert trainer.updates == 2


def test_a_thread_never_computes_with_what_another_has_switched_to(tmp_path: Path) -> None:
    found = compiled({"lora": {"rank": 2}}, export={"adapters": "inputs", "target": ["cpu"]})
    folder = found.save(tmp_path / "served")
    session, feeds = Session(folder, ["cpu"]), {"input": X.numpy()}
    slots = read_slots(read_manifest(folder).adapters, str(folder))
    mine, other = ("a.onnx_adapter", "b.onnx_adapter")
    for seed, name in enumerate((mine, other)):
        save_adapter(tmp_path / name, adapter_arrays(found.adapters, trained(found, seed), all_methods()), slots)
    first, second = (session.load_adapter(tmp_path / name) for name in (mine, other))
    wanted = [session.run(feeds, adapter=one)["output"] for one in (first, second)]
    session.switch(first)
    in_thread(lambda: session.switch(second))
    with pytest.raises(AdapterError, match=r"another thread has switched the adapter since this one did: name the adapter with run\("):
        session.run(feeds)
    np.testing.assert_array_equal(session.run(feeds, adapter=first)["output"], wanted[0])
    np.testing.assert_array_equal(in_thread(lambda: session.run(feeds)["output"]), wanted[1], "a thread that never switched")
    session.switch(first)
    np.testing.assert_array_equal(session.run(feeds)["output"], wanted[0])
