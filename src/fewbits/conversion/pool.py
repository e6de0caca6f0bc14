"""Work on several threads, its results in order, and no more of them at a time than are asked for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from fewbits.numerics.scratch import Scratch, working_in

_Made = TypeVar("_Made")


def in_order(tasks: Iterable[Callable[[], _Made]], threads: int) -> Iterator[_Made]:
    """The results of some tasks, in their order.

    Each thread computes alone: torch's own, for one operation, would only get in their way. At most one result more
    than there are threads waits to be taken, so that memory stays bounded, and each thread works in the same memory
    from task to task.

    Args:
        tasks: taken one after the other, on the thread that takes the results.
        threads: how many work at a time; with one, the calling thread does it.
    """
    before, grad = torch.get_num_threads(), torch.is_grad_enabled()
    memory = _OfThread()
    torch.set_num_threads(1)
    try:
        if threads == 1:
            for task in tasks:
                yield _act(task, grad, memory)
        else:
            yield from _in_order(tasks, threads, lambda task: _act(task, grad, memory))
    finally:
        torch.set_num_threads(before)


def _in_order(
    tasks: Iterable[Callable[[], _Made]], threads: int, act: Callable[[Callable[[], _Made]], _Made]
) -> Iterator[_Made]:
    waiting: deque[Future[_Made]] = deque()
    # What a thread sets for itself becomes the start value of threads that come later.
    pool = ThreadPoolExecutor(threads, "fewbits", initializer=torch.set_num_threads, initargs=(1,))
    try:
        for task in tasks:
            waiting.append(pool.submit(act, task))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class _OfThread(threading.local):
    """Memory of its own for each thread."""

    def __init__(self) -> None:
        self.kept = Scratch()


def _act(task: Callable[[], _Made], grad: bool, memory: _OfThread) -> _Made:
    """Do a task as the calling thread would: whether gradients are recorded is a matter of each thread."""
    with torch.set_grad_enabled(grad), working_in(memory.kept):
        return task()
