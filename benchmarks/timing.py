"""Time contenders in turns, round by round, so that a disturbance of the machine reaches all of them."""

from __future__ import annotations

import itertools
import math
import statistics
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor

#: Numbers for the names of compiled functions.
_numbers = itertools.count()
Call = Callable[[], object]
T = TypeVar("T")

#: Seconds between two contenders, in which the threads of the first stop spinning.
PAUSE = 0.03
#: Least seconds of a turn.
TURN = 0.1
#: Least calls in a turn, so that their median is robust; a call longer than `LONG` seconds runs once.
CALLS, LONG = 3, 0.3


class Cycle:
    def __init__(self, layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> None:
        self._next, self._x, self.length = itertools.cycle(layers), x, len(layers)

    def __call__(self) -> Tensor:
        return next(self._next)(self._x)


@attrs.frozen
class Timed:
    seconds: dict[str, list[float]]
    failures: dict[str, str]


def compile_alone(method: Callable[..., T]) -> Callable[..., T]:
    """Compile a method of one object: its graphs are apart from those for other objects of its class."""
    # torch keeps graphs by the code of a function, limits their number, and looks through them at every call.
    shared: Any = method
    code = shared.__code__.replace(co_name=f"{shared.__name__}_{next(_numbers)}")
    own = types.FunctionType(code, shared.__globals__, shared.__name__, shared.__defaults__, shared.__closure__)
    own.__kwdefaults__ = shared.__kwdefaults__
    return torch.compile(types.MethodType(own, shared.__self__), fullgraph=True)


def timed(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(calls: Mapping[str, Call], rounds: int, *, turn: float = TURN, pause: float = PAUSE) -> Timed:
    failures: dict[str, str] = {}
    tried = {name: _tried(failures, name, _calls_in_turn, call, turn) for name, call in calls.items()}
    counts = {name: count for name, count in tried.items() if count is not None}
    seconds: dict[str, list[float]] = {name: [] for name in counts}
    for r in range(rounds):
        for name in rotated(list(seconds), r):
            once = _tried(failures, name, _turn, calls[name], counts[name], pause)
            if once is None:
                del seconds[name]
            else:
                seconds[name].append(once)
    return Timed(seconds, failures)


def rotated(names: Sequence[str], by: int) -> list[str]:
    start = by * 3 % len(names) if names else 0
    return [*names[start:], *names[:start]]


def _tried(failures: dict[str, str], name: str, act: Callable[..., T], *arguments: object) -> T | None:
    try:
        return act(*arguments)
    except Exception as error:  # one failure must not stop the others
        failures[name] = reason(error)
        return None


def reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _calls_in_turn(call: Call, turn: float) -> int:
    for _ in range(getattr(call, "length", 1)):
        call()
    once = max(timed(call), 1e-7)
    return max(CALLS if once < LONG else 1, math.ceil(turn / once))


def _turn(call: Call, count: int, pause: float) -> float:
    time.sleep(pause)
    call()  # wakes the threads up
    return statistics.median(timed(call) for _ in range(count))
