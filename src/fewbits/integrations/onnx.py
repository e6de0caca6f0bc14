"""Write quantized modules as ONNX files.

``torch.onnx.export(model, args, path, dynamo=True)`` writes them too, with one `MatMulNBits` of ONNX Runtime for each
linear layer. `export` gives tensors the names of their layers, and can write standard operators instead.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import nn

from fewbits.errors import ArgumentError
from fewbits.nn.packed import PackedWeight
from fewbits.nn.stored import SUFFIX
from fewbits.numerics.dtypes import POWERS_OF_TWO

#: The operator that computes linear layers in a graph.
Operator = Literal["MatMulNBits", "DequantizeLinear"]

#: The first opset whose `DequantizeLinear` takes int4 and blocks.
_OPSET_OF_BLOCKS = 21

#: The constants of a `MatMulNBits` after its input, as their names end.
_CONSTANTS = ("weight", "weight_scale", "weight_zero_point")

#: The ending of the constants of `DequantizeLinear`, until those of `MatMulNBits` are gone.
_OF_COLUMNS = "_of_columns"


def export(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    path: str | os.PathLike[str] | None = None,
    *,
    operator: Operator = "MatMulNBits",
    accuracy_level: int | None = None,
    **options: Any,
) -> Any:
    """Export a quantized module to ONNX.

    A linear layer with integer codes becomes one `MatMulNBits` of 4 or 8 bits, or `DequantizeLinear` and `MatMul`.
    Every other weight is stored as one byte per code, and decoded by the graph.

    Args:
        model: A quantized module.
        args: Example inputs, as `torch.onnx.export` takes them.
        path: The file to write; None writes none.
        operator: ``"MatMulNBits"``, which only ONNX Runtime knows, or ``"DequantizeLinear"``: standard operators, with
            blocks of INT4 or INT8. ONNX Runtime turns them into a `MatMulNBits` that rounds inputs to int8, unless
            the session option ``session.qdq_matmulnbits_accuracy_level`` is ``"0"``.
        accuracy_level: How `MatMulNBits` may round inputs, 0 to 4; 4 stands for int8. None means not at all.
        options: Other arguments of `torch.onnx.export`, such as `dynamic_shapes` and `external_data`.

    Returns:
        The `torch.onnx.ONNXProgram`.

    Raises:
        ArgumentError: If a package is missing, an argument is invalid, or a weight cannot be written.
    """
    _check(model, operator, accuracy_level, options)
    onnx_ir = _packages()
    import torch.onnx

    saving = {name: options.pop(name) for name in ("external_data", "keep_initializers_as_inputs") if name in options}
    if operator == "DequantizeLinear":
        options = {"opset_version": _OPSET_OF_BLOCKS, **options}
    program: Any = torch.onnx.export(model, args, dynamo=True, **options)
    graph = program.model.graph
    for node in list(_products(graph)):
        _name_constants(graph, node)
        if operator == "DequantizeLinear":
            _replace(onnx_ir, graph, node)
        elif accuracy_level is not None:
            node.attributes["accuracy_level"] = onnx_ir.AttrInt64("accuracy_level", accuracy_level)
    if operator == "DequantizeLinear":
        _tidy(program.model)
    if path is not None:
        program.save(path, **saving)
    return program


def _check(model: object, operator: object, accuracy_level: object, options: Mapping[str, Any]) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"export takes a quantized module, not a {type(model).__name__}")
    weights = {name: weight for name, weight in model.named_modules() if isinstance(weight, PackedWeight)}
    if not weights:
        raise ArgumentError("no layer of this model is quantized; write it with torch.onnx.export")
    refused = [name.removesuffix(SUFFIX) for name, weight in weights.items() if _has_powers_of_two(weight)]
    if refused:
        more = f" and {len(refused) - 1} more" if refused[1:] else ""
        raise ArgumentError(
            f"torch.onnx.export has no float8_e8m0fnu, the dtype of the scales of {refused[0]}{more}; quantize to nf4 "
            "or int4, or export a float model, fewbits.dequantize(model)"
        )
    if operator not in get_args(Operator):
        raise ArgumentError(f"operator must be 'MatMulNBits' or 'DequantizeLinear', not {operator!r}")
    if accuracy_level is not None and (accuracy_level not in range(5) or operator != "MatMulNBits"):
        raise ArgumentError(f"accuracy_level must be 0 to 4, and needs operator 'MatMulNBits'; not {accuracy_level!r}")
    if options.get("dynamo") is False:
        raise ArgumentError("dynamo=False is the exporter of TorchScript, which cannot write quantized layers")
    opset = options.get("opset_version")
    if operator == "DequantizeLinear" and opset is not None and opset < _OPSET_OF_BLOCKS:
        raise ArgumentError(f"DequantizeLinear takes blocks from opset {_OPSET_OF_BLOCKS} on, not in opset {opset}")


def _has_powers_of_two(weight: PackedWeight) -> bool:
    return POWERS_OF_TWO is not None and weight.spec.scale_dtype == POWERS_OF_TWO


def _packages() -> Any:
    """Return onnx_ir; refuse an environment that cannot export."""
    try:
        importlib.import_module("onnxscript")
        importlib.import_module("torch.onnx.ops")
        return importlib.import_module("onnx_ir")
    except ModuleNotFoundError as error:
        if error.name == "torch.onnx.ops":
            raise ArgumentError("the export of quantized layers needs torch 2.8 or newer") from None
        raise ArgumentError(f"the export needs {error.name}: pip install 'fewbits[onnx]'") from None


def _products(graph: Any) -> Iterator[Any]:
    return (node for node in graph if (node.domain, node.op_type) == ("com.microsoft", "MatMulNBits"))


def _name_constants(graph: Any, node: Any) -> None:
    """Give the constants of a product the names of their layer, unless another product has done so."""
    for value, ending in zip(node.inputs[1:], _CONSTANTS, strict=False):
        layer, lifted, _ = value.name.rpartition("lifted_tensor_")
        if lifted and layer + ending not in graph.initializers:
            value.name = layer + ending


def _replace(onnx_ir: Any, graph: Any, node: Any) -> None:
    """Replace a `MatMulNBits` with `DequantizeLinear` and `MatMul`."""
    codes, scale, *zero_point = _dequantize_inputs(node)
    made, prefix = [], node.inputs[1].name
    for array, value in zip([codes, scale, *zero_point], node.inputs[1:], strict=True):
        name = value.name + _OF_COLUMNS
        if name not in graph.initializers:
            tensor = onnx_ir.Tensor(array, name=name)
            held = onnx_ir.Value(name=name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype))
            held.const_value = tensor
            graph.initializers[name] = held
        made.append(graph.initializers[name])
    blocks = scale.ndim > 1
    attributes = {"axis": 0, "block_size": node.attributes["block_size"].as_int()} if blocks else {"axis": 1}
    weight = onnx_ir.node("DequantizeLinear", made, attributes, version=_OPSET_OF_BLOCKS)
    product = onnx_ir.node("MatMul", [node.inputs[0], weight.outputs[0]], version=_OPSET_OF_BLOCKS)
    weight.outputs[0].name = f"{prefix}_dequantized_for_{node.outputs[0].name}"
    weight.outputs[0].dtype = product.outputs[0].dtype = node.outputs[0].dtype
    product.outputs[0].shape = node.outputs[0].shape
    onnx_ir.convenience.replace_nodes_and_values(graph, node, [node], [weight, product], node.outputs, product.outputs)


def _tidy(model: Any) -> None:
    """Drop what only `MatMulNBits` needed, and give its names to the new constants."""
    model.opset_imports.pop("com.microsoft", None)
    held = model.graph.initializers
    for name in [name for name, value in held.items() if not value.uses()]:
        del held[name]
    for value in list(held.values()):
        value.name = value.name.removesuffix(_OF_COLUMNS)


def _dequantize_inputs(node: Any) -> Sequence[Any]:
    """Return codes (inputs, outputs), scales and zero points for `DequantizeLinear`, from those of `MatMulNBits`."""
    columns, rows, bits = (node.attributes[name].as_int() for name in ("K", "N", "bits"))
    words, scale, *zero_point = (value.const_value.numpy() for value in node.inputs[1:])
    blocks = words.shape[1]
    codes = [_signed(words.reshape(rows, -1), bits)[:, :columns]]
    points = [_signed(array.reshape(rows, -1), bits)[:, :blocks] for array in zero_point]
    scales = [scale.reshape(rows, blocks)]
    # One block per row has no block size, but an axis.
    of_rows = [array if blocks > 1 else array[:, 0] for array in (*scales, *points)]
    return [codes[0].T.copy(), *[array.T.copy() for array in of_rows]]


def _signed(packed: Any, bits: int) -> Any:
    """Unpack bytes, (rows, bytes), to signed codes: int8, or int4 of ml_dtypes."""
    if bits == 8:
        return (packed ^ 0x80).view("int8")
    ml_dtypes = importlib.import_module("ml_dtypes")
    numpy = importlib.import_module("numpy")
    codes = numpy.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
    return (codes.astype("int8") - 8).astype(ml_dtypes.int4)
