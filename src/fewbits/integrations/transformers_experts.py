"""Fused experts of transformers, one at a time: a token uses only the experts that it is routed to."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.nn.base import QuantizedModule

_moe: Any = importlib.import_module("transformers.integrations.moe")

#: The name of this implementation in transformers.
IMPLEMENTATION = "fewbits"


def use_codes_in_experts(model: Any) -> None:
    """Let the experts of a model of transformers read codes, if any of them are quantized."""
    quantized = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    if any(hasattr(module, "is_transposed") and hasattr(module, "has_gate") for module in quantized):
        model.set_experts_implementation(IMPLEMENTATION)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute a layer of experts, one expert at a time.

    Args:
        self: the module of the experts.
        hidden_states: (tokens, hidden).
        top_k_index: the experts of each token, (tokens, k). Numbers from ``num_experts`` up stand for no expert.
        top_k_weights: the weights of these experts, (tokens, k).
    """
    first = "gate_up_proj" if self.has_gate else "up_proj"
    result = torch.zeros_like(hidden_states)
    for expert in sorted(set(top_k_index.flatten().tolist())):
        if expert < self.num_experts:
            token, position = torch.where(top_k_index == expert)
            inner = _linear(self, first, expert, hidden_states[token])
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
            outer = _linear(self, "down_proj", expert, inner)
            if self.has_post_expert_norm:
                outer = self.post_expert_norm(outer)
            result.index_add_(0, token, (outer * top_k_weights[token, position, None]).to(result.dtype))
    return result


def _linear(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    """Multiply with the weight of one expert; only that is read from the codes."""
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return F.linear(x, weight.mT if module.is_transposed else weight, bias)


_moe.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
