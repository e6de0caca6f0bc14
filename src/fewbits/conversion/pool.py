"""Run tasks on several threads, with results in order and bounded memory."""

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
    """Run tasks, and yield their results in the order of the tasks.

    Torch's own threads are off, because they would compete with these. At most `threads` + 1 results wait, so that
    memory stays bounded. Each thread reuses its scratch memory from task to task.

    Args:
        tasks: iterated on the thread that takes the results.
        threads: how many tasks run at a time; 1 runs them on the calling thread.
    """
    before, grad, memory = torch.get_num_threads(), torch.is_grad_enabled(), _OfThread()

    def act(task: Callable[[], _Made]) -> _Made:
        # Torch keeps the gradient mode per thread.
        with torch.set_grad_enabled(grad), working_in(memory.kept):
            return task()

    torch.set_num_threads(1)
    try:
        yield from map(act, tasks) if threads == 1 else _in_threads(tasks, threads, act)
    finally:
        torch.set_num_threads(before)


def _in_threads(
    tasks: Iterable[Callable[[], _Made]], threads: int, act: Callable[[Callable[[], _Made]], _Made]
) -> Iterator[_Made]:
    waiting: deque[Future[_Made]] = deque()
    # A number that another thread sets now would become the start value of these threads.
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
    def __init__(self) -> None:
        self.kept = Scratch()
