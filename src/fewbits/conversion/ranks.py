"""Several processes at one result: who does what, and how they hear of one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch

from fewbits.errors import ArgumentError, RankError

_Made = TypeVar("_Made")

#: One rank may write for days while another waits; that a rank has died is noticed at once, whatever this is.
_PATIENCE = timedelta(days=365)


class Ranks:
    """One process, at everything.

    Attributes:
        rank: which of them this is; 0 leads.
        count: how many there are.
    """

    rank = 0
    count = 1

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.leave()

    def leave(self) -> None:
        """Do no more with the others, who hear of it at once wherever they wait for this one."""

    def lead(self, act: Callable[[], _Made]) -> _Made:
        """Let rank 0 do something, and give all of them what it made.

        Raises:
            RankError: on the others, if rank 0 fails.
        """
        return act()

    def gather(self, value: _Made) -> list[_Made]:
        """What each rank has, in their order. They wait for one another here.

        Raises:
            RankError: if one of them is gone.
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
                "distributed=True goes with a process group: start with torchrun, and call "
                "torch.distributed.init_process_group('gloo') first"
            )
        import torch.distributed as dist

        self._dist = dist
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def leave(self) -> None:
        self._dist.destroy_process_group(self._group)
        self._group = None

    def lead(self, act: Callable[[], _Made]) -> _Made:
        if self.rank:
            error, made = self._told([None])
            if error is not None:
                raise RankError(f"ended, because rank 0 did: {error}")
            return made  # type: ignore[no-any-return]
        try:
            made = act()
        except BaseException as error:
            with suppress(RankError):  # its own error says more
                self._told([(str(error) or type(error).__name__, None)])
            raise
        self._told([(None, made)])
        return made

    def gather(self, value: _Made) -> list[_Made]:
        found: list[Any] = [None] * self.count
        self._call(lambda: self._dist.all_gather_object(found, value, group=self._group))
        return found

    def _told(self, message: list[Any]) -> Any:
        self._call(lambda: self._dist.broadcast_object_list(message, src=0, group=self._group))
        return message[0]

    def _call(self, act: Callable[[], object]) -> None:
        try:
            act()
        except RuntimeError as error:
            raise RankError(
                "another rank has ended before the result was complete, and says why; what is done is kept: --resume "
                f"goes on with any number of ranks ({_reason(error)})"
            ) from None


def _reason(error: RuntimeError) -> str:
    """What gloo says, without the place in its source before it and the advice behind it."""
    line = str(error).partition("\n")[0]
    return (line.partition("] ")[2] or line).partition(". ")[0]


def spread(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Spread files over ranks: the largest first, each to the rank that has least so far.

    Args:
        sizes: of each file.
        count: of ranks.

    Returns:
        the files of each rank, in the order they came in.

    >>> spread({"a": 4, "b": 3, "c": 3, "d": 2}, 2)
    [['a', 'd'], ['b', 'c']]
    """
    shares: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for file in sorted(sizes, key=lambda file: (-sizes[file], file)):
        rank = loads.index(min(loads))
        shares[rank].append(file)
        loads[rank] += sizes[file]
    return [_as_given(sizes, share) for share in shares]


def _as_given(sizes: Mapping[str, int], share: Sequence[str]) -> list[str]:
    chosen = set(share)
    return [file for file in sizes if file in chosen]
