"""Where the time of decoding goes: by part of the model, and by ATen operation."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.decoding import Watch, generate

LAYERS, OUTPUT, FORWARD = "linear layers", "output layer", "forward"


class Clock:
    """Adds up the time spent in modules, by key."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._started: list[float] = []

    def watch(self, module: nn.Module, key: str) -> list[Any]:
        """Time this module from now on; the handles end it."""
        before = module.register_forward_pre_hook(lambda *_: self._started.append(time.perf_counter()))
        return [before, module.register_forward_hook(lambda *_: self._stop(key))]

    def _stop(self, key: str) -> None:
        self.totals[key] += time.perf_counter() - self._started.pop()  # type: ignore[assignment]
        self.calls[key] += 1

    def clear(self) -> None:
        """Begin again."""
        self.totals.clear()
        self.calls.clear()


@contextmanager
def watched(model: nn.Module) -> Iterator[Clock]:
    """Time a language model's linear layers, its output layer (`lm_head`), and the whole of it."""
    clock = Clock()
    output = getattr(model, "lm_head", None)
    handles = clock.watch(model, FORWARD)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            handles += clock.watch(module, OUTPUT if module is output else LAYERS)
    try:
        yield clock
    finally:
        for handle in handles:
            handle.remove()


def parts(model: nn.Module, prompt: Sequence[int], tokens: int) -> dict[str, float]:
    """Seconds for one token: in linear layers, the output layer, the rest of the model, and around it.

    Hooks do the timing, and cost a few microseconds for each layer themselves.
    """
    with watched(model) as clock:
        seconds = generate(model, prompt, tokens, Watch(first=clock.clear)).seconds
    count = tokens - 1
    each = {key: clock.totals[key] / count for key in (LAYERS, OUTPUT, FORWARD)}
    return {
        LAYERS: each[LAYERS],
        OUTPUT: each[OUTPUT],
        "rest of the model": each[FORWARD] - each[LAYERS] - each[OUTPUT],
        "around the model": seconds - each[FORWARD],
    }


@attrs.frozen
class Operation:
    """An ATen operation, or what is none, in one token.

    Attributes:
        name: of it.
        share: of the time.
        seconds: spent in itself, for one token.
        calls: for one token.
    """

    name: str
    share: float
    seconds: float
    calls: float


def operations(run: Callable[[int], object], tokens: int, most: int = 12) -> list[Operation]:
    """The most expensive operations of decoding, and what is spent outside of all of them: in Python.

    Args:
        run: decodes so many tokens.
        tokens: that many.
        most: how many operations to list.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        run(tokens)
        wall = time.perf_counter() - start
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    inside = sum(event.self_cpu_time_total for event in events) / 1e6
    found = [
        _operation(event.key, event.self_cpu_time_total / 1e6, event.count, wall, tokens) for event in events[:most]
    ]
    return [_operation("outside of ATen", max(0.0, wall - inside), 0, wall, tokens), *found]


def _operation(name: str, seconds: float, calls: int, wall: float, tokens: int) -> Operation:
    return Operation(name, seconds / wall, seconds / tokens, calls / tokens)
