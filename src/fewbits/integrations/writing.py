"""Let a causal language model of transformers write text."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import CalibrationError


@torch.no_grad()
def write(
    model: Any, first: Tensor, sequence: int, generator: torch.Generator, written: Callable[[int], object]
) -> Tensor:
    """Sample texts from the model's own distribution, at temperature 1.

    Args:
        model: a causal language model of transformers.
        first: the first token of each text, (texts,).
        sequence: the number of tokens of each text.
        generator: draws the tokens.
        written: called with the number of tokens of each text so far.

    Returns:
        the texts, int64, (texts, sequence).

    Raises:
        CalibrationError: if the model keeps no cache of keys and values, or its logits are not finite.
    """
    # Earlier releases of transformers call it "past_key_values".
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    texts, cache = [first[:, None]], None
    while len(texts) < sequence:
        written(len(texts))
        output = model(input_ids=texts[-1], use_cache=True, **{name: cache})
        cache = getattr(output, name, None)
        if cache is None:
            raise CalibrationError(f"{type(model).__name__} has no cache, without which writing takes too long")
        logits = output.logits[:, -1].float()
        if not bool(torch.isfinite(logits).all()):
            raise CalibrationError(f"{type(model).__name__} gives logits that are NaN or Inf")
        texts.append(torch.multinomial(logits.softmax(-1), 1, generator=generator))
    written(sequence)
    return torch.cat(texts, 1)
