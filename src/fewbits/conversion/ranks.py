"""`Ranks`: how the processes of one run exchange results and errors, and share the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch

from fewbits.errors import ArgumentError, RankError

_Made = TypeVar("_Made")

#: One rank may write for days while another waits. The others notice a dead rank at once, not after the timeout.
_TIMEOUT = timedelta(days=365)


class Ranks(AbstractContextManager["Ranks"]):
    """A single process.

    Attributes:
        rank: the number of this process; rank 0 leads.
        count: how many processes there are.
    """

    rank = 0
    count = 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an error, leave the group. Ranks that wait for this one notice at once."""

    def lead(self, act: Callable[[], _Made]) -> _Made:
        """Call `act` on rank 0, and return its result on all ranks.

        Raises:
            RankError: on the others, if rank 0 fails.
        """
        return act()

    def gather(self, value: _Made) -> list[_Made]:
        """Wait for all ranks, and return the value of each, in order.

        Raises:
            RankError: if a rank is gone.
        """
        return [value]


class Group(Ranks):
    """The processes of `torch.distributed`'s default group.

    Raises:
        ArgumentError: if there is no such group.
    """

    def __init__(self) -> None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise ArgumentError(
                "distributed=True needs a process group: start with torchrun, and call "
                "torch.distributed.init_process_group('gloo') first"
            )
        import torch.distributed as dist

        self._dist = dist
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._group: Any = dist.new_group(backend="gloo", timeout=_TIMEOUT)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._dist.destroy_process_group(self._group)
            self._group = None

    def lead(self, act: Callable[[], _Made]) -> _Made:
        if self.rank:
            error, made = self._broadcast([None])
            if error is not None:
                raise RankError(f"ended, because rank 0 did: {error}")
            return made  # type: ignore[no-any-return]
        try:
            made = act()
        except BaseException as error:
            with suppress(RankError):  # `error` says more
                self._broadcast([(str(error) or type(error).__name__, None)])
            raise
        self._broadcast([(None, made)])
        return made

    def gather(self, value: _Made) -> list[_Made]:
        found: list[Any] = [None] * self.count
        self._call(lambda: self._dist.all_gather_object(found, value, group=self._group))
        return found

    def _broadcast(self, message: list[Any]) -> Any:
        self._call(lambda: self._dist.broadcast_object_list(message, src=0, group=self._group))
        return message[0]

    def _call(self, act: Callable[[], object]) -> None:
        try:
            act()
        except RuntimeError as error:
            raise RankError(
                "another rank has ended before the result was complete; its own error says why. Finished work is kept: "
                f"continue with --resume, with any number of ranks ({_reason(error)})"
            ) from None


def _reason(error: RuntimeError) -> str:
    """The message of gloo, without the source location in front and the advice behind."""
    line = str(error).partition("\n")[0]
    return (line.partition("] ")[2] or line).partition(". ")[0]


def spread(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Spread files over ranks: the largest first, each to the rank with the smallest load so far.

    Args:
        sizes: the size of each file.
        count: the number of ranks.

    Returns:
        the files of each rank, in the order of `sizes`.

    >>> spread({"a": 4, "b": 3, "c": 3, "d": 2}, 2)
    [['a', 'd'], ['b', 'c']]
    """
    shares: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for file in sorted(sizes, key=lambda file: (-sizes[file], file)):
        rank = loads.index(min(loads))
        shares[rank].append(file)
        loads[rank] += sizes[file]
    return [[file for file in sizes if file in share] for share in shares]
