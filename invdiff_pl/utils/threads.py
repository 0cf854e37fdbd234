"""Mapping a function over many items, in threads."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_CHUNK = 1024


def map_in_threads(
    function: Callable[[_Item], _Result],
    items: Sequence[_Item],
    threads: int | None = None,
    at_once: int = _CHUNK,
) -> Iterator[_Result]:
    """Yield results in the order of the items.

    Items are handed out ``at_once`` at a time, since a pool would queue all of a million.
    """
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(items), at_once):
            yield from pool.map(function, items[start : start + at_once])


def map_in_torch_threads(
    function: Callable[[_Item], _Result], items: Sequence[_Item]
) -> Iterator[_Result]:
    """Yield results in the order of the items, computing as many at once as torch has threads.

    Many small operations gain more from this than from having all threads for each of them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from map_in_threads(function, items, threads, at_once=threads)
    finally:
        torch.set_num_threads(threads)
