"""Hand the codes of a quantized model to torchao, and through it to ExecuTorch and Core ML."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import ArgumentError
from fewbits.nn.base import QuantizedModule
from fewbits.nn.packed import PackedWeight
from fewbits.nn.stored import StoredWeight, stored_weights
from fewbits.nn.swap import dequantize
from fewbits.numerics.dtypes import compute_dtype, dtype_name
from fewbits.numerics.layout import Layout
from fewbits.numerics.spec import QuantSpec

#: The dtypes that torchao takes, for weights and for scales.
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

#: How many refused weights a message names.
_NAMED = 5


def to_torchao(model: nn.Module, *, int8_inputs: bool = False, dequantize_others: bool = False) -> nn.Module:
    """Return a copy of a quantized model whose codes are torchao's `IntxUnpackedToInt8Tensor`.

    Linear layers and embeddings become plain modules of torch. Their weights hold one byte per code, and dequantize to
    the same numbers bit for bit. `torch.export` of the copy shows ExecuTorch and Core ML the codes.

    Args:
        model: A quantized model; it is not changed.
        int8_inputs: Whether linear layers round their inputs to int8, with a scale and a zero point for each token, as
            the XNNPACK backend of ExecuTorch needs it. Outputs then differ from those of `model`.
        dequantize_others: Whether weights that torchao cannot hold become float weights; otherwise they are refused.

    Raises:
        ArgumentError: If torchao is not installed, nothing is quantized, or torchao cannot hold a weight.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"to_torchao takes a quantized model, not a {type(model).__name__}")
    places = {
        f"{name}.{local}".lstrip("."): (name, local, stored)
        for name, module in model.named_modules(remove_duplicate=False)
        for local, stored in stored_weights(module).items()
    }
    if not places:
        raise ArgumentError(f"no layer of this {type(model).__name__} is quantized; quantize it first")
    reasons = {name: _refusal(model.get_submodule(at[0]), *at[1:], int8_inputs) for name, at in places.items()}
    _refuse({name: reason for name, reason in reasons.items() if reason and not dequantize_others})
    tensor_class = _tensor_class()
    copied, made = dequantize(model), dict[StoredWeight, nn.Parameter]()
    for name, (module, local, stored) in places.items():
        if reasons[name] is None:
            rounds = int8_inputs and isinstance(model.get_submodule(module), nn.Linear)
            if stored not in made:
                made[stored] = nn.Parameter(_tensor(tensor_class, stored, rounds), requires_grad=False)
            setattr(copied.get_submodule(module), local, made[stored])
    return copied  # type: ignore[no-any-return]


def _tensor_class() -> Any:
    if importlib.util.find_spec("torchao") is None:
        raise ArgumentError("to_torchao needs torchao: pip install 'fewbits[torchao]'")
    return importlib.import_module("torchao.quantization").IntxUnpackedToInt8Tensor


def _refuse(reasons: Mapping[str, str]) -> None:
    if reasons:
        named = "; ".join(f"{name} {reason}" for name, reason in list(reasons.items())[:_NAMED])
        more = f"; and {len(reasons) - _NAMED} more weights" if len(reasons) > _NAMED else ""
        raise ArgumentError(
            f"torchao cannot hold {len(reasons)} of the quantized weights: {named}{more}. dequantize_others=True turns "
            "them into float weights"
        )


def _refusal(module: nn.Module, local: str, stored: StoredWeight, int8_inputs: bool) -> str | None:
    """Say why torchao cannot hold a weight; None if it can."""
    is_layer = isinstance(module, QuantizedModule) and isinstance(module, (nn.Linear, nn.Embedding))
    if not is_layer or local != "weight":
        return f"belongs to a {getattr(module, 'float_class', type(module)).__name__}, not to a Linear or an Embedding"
    if not isinstance(stored, PackedWeight):
        return f"is stored as {stored.spec}, without codes"
    spec, columns = stored.spec, stored.layout.columns
    obstacles = {
        "has a table of levels; torchao takes integer codes": spec.levels is not None,
        "rounds its inputs to int8 in another way than torchao (int8_inputs=True accepts that)": bool(
            spec.activations and not int8_inputs
        ),
        f"is {dtype_name(stored.dtype)}; torchao takes float32, float16 and bfloat16": stored.dtype not in _FLOATS,
        "has float64 scales; torchao takes float32, float16 and bfloat16": spec.scale_dtype == torch.float64,
        f"is not a matrix of outputs by inputs, but of shape {stored.layout.shape}": not _is_matrix(stored.layout),
        f"has rows of {columns} elements, not a multiple of the group size {spec.group_size}": bool(
            columns % spec.width(columns)
        ),
    }
    found = next((obstacle for obstacle, holds in obstacles.items() if holds), None)
    if found is None and stored.dtype == torch.float16 and _overflows(stored):
        return "has codes that float16 cannot hold once they are multiplied by their scales"
    return found


def _is_matrix(layout: Layout) -> bool:
    return len(layout.shape) == 2 and layout == Layout.of(layout.shape)


def _overflows(stored: PackedWeight) -> bool:
    """Whether a decoded number is larger than float16 holds: fewbits clips it, and torchao makes it Inf."""
    return bool((stored.dequantize(torch.float32).abs() > torch.finfo(torch.float16).max).any())


def _tensor(tensor_class: Any, stored: Any, int8_inputs: bool) -> Tensor:
    value, spec = stored.value(), stored.spec
    rows, columns = value.layout.matrix_shape
    params, block = value.params(), _block(spec, rows, columns)
    shape = rows // block[0], columns // block[1]
    dtype = params.scale.dtype if params.scale.dtype in _FLOATS else compute_dtype(params.scale.dtype)
    zero_point = torch.zeros(1, dtype=torch.int8) if params.zero_point is None else params.zero_point
    made: Tensor = tensor_class(
        qdata=value.codes(),
        scale=params.scale.to(dtype).reshape(shape),
        zero_point=zero_point.to(value.scale.device, torch.int8).expand(params.scale.shape).reshape(shape).contiguous(),
        target_dtype=getattr(torch, f"int{spec.bits}"),
        block_size=block,
        dtype=stored.dtype,
        activation_quantization="int8_asym_per_token" if int8_inputs else None,
    )
    return made


def _block(spec: QuantSpec, rows: int, columns: int) -> tuple[int, int]:
    """Return the shape of the part of a matrix that shares one scale."""
    return (rows if spec.granularity == "tensor" else 1), spec.width(columns)
