"""Work on several threads, its results in order, and no more of them at a time than are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

_Made = TypeVar("_Made")


def in_order(tasks: Iterable[Callable[[], _Made]], threads: int) -> Iterator[_Made]:
    """The results of some tasks, in their order.

    With several threads each of them computes alone: torch's own, for one operation, would only get in their way. At
    most one result more than there are threads waits to be taken, so that memory stays bounded.

    Args:
        tasks: taken one after the other, on the thread that takes the results.
        threads: how many work at a time; with one, the calling thread does it, with torch's own threads.
    """
    if threads == 1:
        for task in tasks:
            yield task()
        return
    before, grad = torch.get_num_threads(), torch.is_grad_enabled()
    waiting: deque[Future[_Made]] = deque()
    pool = ThreadPoolExecutor(threads, "fewbits", initializer=torch.set_num_threads, initargs=(1,))
    try:
        for task in tasks:
            waiting.append(pool.submit(_with_grad, task, grad))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        # What a thread sets for itself becomes the start value of threads that come later.
        torch.set_num_threads(before)


def _with_grad(task: Callable[[], _Made], grad: bool) -> _Made:
    """Do a task as the calling thread would: whether gradients are recorded is a matter of each thread."""
    with torch.set_grad_enabled(grad):
        return task()
