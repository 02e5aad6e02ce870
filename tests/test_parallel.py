"""Independent matrices on several threads: in order, bounded, the same numbers, one thread each, errors in their place."""

from __future__ import annotations

import threading

import pytest
import torch

from matmorph.passes.linalg.parallel import ordered_map


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order_and_do_not_depend_on_the_workers(workers: int) -> None:
    matrices = [torch.randn(20, 30, generator=torch.Generator().manual_seed(k)) for k in range(7)]
    expected = [torch.linalg.svdvals(matrix) for matrix in matrices]
    found = list(ordered_map(torch.linalg.svdvals, matrices, workers))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))  # the same routine on one thread: exact


def test_no_more_is_begun_than_there_are_workers() -> None:
    begun: list[int] = []
    results = ordered_map(lambda item: begun.append(item) or item, range(10), 2)
    assert next(results) == 0
    assert len(begun) <= 3  # two at the start, one more for the result that was taken
    results.close()
    assert len(begun) <= 3


def test_each_worker_has_one_thread_and_the_count_comes_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert list(ordered_map(lambda _: torch.get_num_threads(), range(4), 2)) == [1] * 4
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_error_stands_in_the_place_of_its_result() -> None:
    def work(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item

    results = ordered_map(work, range(6), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)


def test_workers_run_beside_the_caller() -> None:
    assert threading.current_thread().name not in set(ordered_map(lambda _: threading.current_thread().name, range(3), 2))
