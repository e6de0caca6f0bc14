"""Which quantized class a module gets, and what that class can do."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from fewbits.nn.base import QuantizedModule, made_class
from fewbits.nn.modules import CAREFUL_CLASSES, OWN_CLASSES


def quantized_class(float_class: type[nn.Module], names: Collection[str]) -> type[QuantizedModule]:
    """The class of modules of `float_class` whose parameters of these names are stored.

    Raises:
        TypeError: if there cannot be one.
    """
    candidates = (*(OWN_CLASSES if "weight" in names else ()), *CAREFUL_CLASSES)
    base = next((base for base in candidates if issubclass(float_class, base.float_class)), QuantizedModule)
    return made_class(float_class, base)


def rounds_inputs(module: nn.Module, name: str, parent: nn.Module | None) -> bool:
    """Whether this module, once quantized, would round its inputs to int8 if its weight's spec says so.

    Attention and the encoder layers of torch read the weights of their linear layers themselves.
    """
    if name != "weight" or isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return False
    bases = [base.float_class for base in OWN_CLASSES if issubclass(type(module), base.float_class)]
    own = [base for base in bases if base not in (nn.Embedding, nn.EmbeddingBag)]
    parts = ("forward", "_conv_forward", "_output_padding")
    return (
        bool(own)
        and "forward" not in vars(module)
        and all(getattr(type(module), part, None) is getattr(own[0], part, None) for part in parts)
    )
