"""Refuse models whose layers cannot be replaced where they are: TorchScript, and wrappers that run in parallel."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fewbits.errors import FewbitsError

#: The child in which `torch.compile(model)` holds the model; it is part of the names of all tensors.
COMPILED = "_orig_mod"


def refuse_wrapped(model: nn.Module, error: type[FewbitsError]) -> None:
    """Refuse a TorchScript module, and a model that contains a wrapper for data parallelism.

    A TorchScript module inside of a model is accepted: its weights are kept, with the reason in the ledger.

    Raises:
        FewbitsError: an error of the given class that names the module to pass instead.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise error(
            f"the model is a TorchScript module ({type(model).__name__}), whose layers cannot be replaced; pass the "
            "nn.Module that it was made from, before torch.jit.script or torch.jit.trace"
        )
    for name, module in model.named_modules():
        if isinstance(module, (DataParallel, DistributedDataParallel)):
            way = f"put model.{name}.module in its place" if name else "pass model.module, and wrap the result"
            raise error(f"{name or 'the model'} is wrapped in {type(module).__name__}; {way}")


def compiled_hint(model: nn.Module, missed: Iterable[str]) -> str:
    """Explain names of a file that a model does not have, if only one of the two comes from a compiled model.

    Returns:
        the model to load into instead, in parentheses; "" if there is another cause.
    """
    if COMPILED in model._modules:
        return f" (the model is a compiled one: load into model.{COMPILED})"
    if any(name.startswith(f"{COMPILED}.") for name in missed):
        return " (the file was made from a compiled model: load into torch.compile(model))"
    return ""
