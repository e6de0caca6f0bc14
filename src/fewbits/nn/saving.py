"""Refuse `save_pretrained` of a model with quantized layers: its files could not be read back.

Transformers and sentence-transformers write the tensors of a model's state dict. On reading they find no ``weight``,
and fill it with random numbers; only their log says so.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from fewbits.errors import CheckpointError
from fewbits.nn.base import QuantizedModule

_METHODS = ("save_pretrained", "save")


def _refuse(*_: Any, **__: Any) -> NoReturn:
    """Replaces `save_pretrained` and `save`.

    Raises:
        CheckpointError: always.
    """
    raise CheckpointError(
        "this model holds quantized layers, which from_pretrained would fill with random numbers. Save it with the "
        "quantizer or the result that made it, .save(path), and load it with fewbits.load(path, into=model); or save "
        "a float model, fewbits.dequantize(model).save_pretrained(path)"
    )


def refuse_save_pretrained(model: nn.Module) -> None:
    """Make `save_pretrained` raise an error, for a model and for every module in it that contains a quantized one."""
    for module in model.modules():
        if _writes_weights(module) and any(isinstance(inner, QuantizedModule) for inner in module.modules()):
            module.__dict__.update((name, _refuse) for name in _METHODS if callable(getattr(module, name, None)))


def allow_save_pretrained(model: nn.Module) -> None:
    """Undo `refuse_save_pretrained`."""
    for module in model.modules():
        for name in _METHODS:
            if module.__dict__.get(name) is _refuse:
                del module.__dict__[name]


def _writes_weights(module: nn.Module) -> bool:
    # A peft model writes its adapters alone, which are not quantized.
    return callable(getattr(module, "save_pretrained", None)) and not hasattr(module, "peft_config")
