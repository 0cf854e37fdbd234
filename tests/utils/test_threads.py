"""A function over many items, in threads."""

import threading

import pytest
import torch

from invdiff_pl.utils.threads import map_in_threads, map_in_torch_threads


def test_results_come_in_the_order_of_items_a_part_at_a_time() -> None:
    assert list(map_in_threads(lambda number: number**2, range(10), 3, at_once=4)) == [
        number**2 for number in range(10)
    ]


def test_as_many_run_at_once_as_torch_has_threads_each_on_one() -> None:
    before = torch.get_num_threads()
    together = threading.Barrier(3, timeout=30)

    def work(number: int) -> int:
        together.wait()  # only passes where three are running
        return torch.get_num_threads() * 10 + number

    torch.set_num_threads(3)
    try:
        assert list(map_in_torch_threads(work, range(3))) == [10, 11, 12]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_torch_has_its_threads_again_where_results_are_left_or_work_fails() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for result in map_in_torch_threads(lambda number: number, range(4)):
            if result == 1:
                break
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            list(map_in_torch_threads(lambda number: 1 // number, range(2)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
