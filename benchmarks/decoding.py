"""Decoding with a language model, a token at a time: through transformers' `generate`, and through llama.cpp."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn


@attrs.frozen
class Decoded:
    """What decoding gave.

    Attributes:
        seconds: for one token, after the first.
        tokens: that were generated; none where only their text is known.
        text: what they say, where that is known.
    """

    seconds: float
    tokens: Sequence[int] = ()
    text: str = ""


class Watch:
    """A stopping criterion that never stops anything: it notes when each token is there."""

    def __init__(self, first: Callable[[], object] = lambda: None) -> None:
        self.times: list[float] = []
        self._first = first

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        if not self.times:
            self._first()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    @property
    def seconds(self) -> float:
        """For one token, the first left out: that one waits for the prompt."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def generate(model: nn.Module, prompt: Sequence[int], tokens: int, watch: Watch | None = None) -> Decoded:
    """Decode greedily, through `generate` with a static cache, eagerly."""
    watch = watch or Watch()
    ids = torch.tensor([list(prompt)])
    every: Any = model
    with torch.inference_mode():
        output = every.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            cache_implementation="static",
            disable_compile=True,
            stopping_criteria=[watch],
            pad_token_id=0,
        )
    return Decoded(watch.seconds, output[0, ids.shape[1] :].tolist())


class LlamaCpp:
    """llama.cpp with one model, in this process; it reads the clock itself."""

    def __init__(self, path: Path, threads: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 512, 1, 0, -1
        self._server = xllamacpp.Server(params)

    def generate(self, prompt: Sequence[int], tokens: int) -> Decoded:
        """Decode greedily. Its clock, too, starts at the first token."""
        asked = {"prompt": list(prompt), "n_predict": tokens, "temperature": 0, "ignore_eos": True}
        answer = self._server.handle_completions({**asked, "cache_prompt": False, "stream": False})
        if "timings" not in answer:
            raise RuntimeError(f"llama.cpp answered without timings: {answer}")
        timings = answer["timings"]
        text = answer["choices"][0]["text"]
        return Decoded(timings["predicted_ms"] / 1e3 / (timings["predicted_n"] - 1), text=text)
