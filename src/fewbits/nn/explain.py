"""`explain`: which kernel computes each layer, and why a faster one does not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fewbits._table import render_table
from fewbits.errors import ArgumentError
from fewbits.kernels.base import Compute, Kernel, PreparedWeight
from fewbits.kernels.choose import choose, refusal
from fewbits.kernels.convolution import BF16, LINEAR, places, way_of_sums
from fewbits.kernels.reference import REFERENCE
from fewbits.kernels.run import chosen, rows_of
from fewbits.kernels.weight_layouts import WeightLayout
from fewbits.nn.base import QuantizedModule
from fewbits.nn.coded import noted_by
from fewbits.nn.convolutions import QuantizedConvolution
from fewbits.nn.modules import QuantizedLinear
from fewbits.nn.packed import PackedWeight
from fewbits.nn.stored import StoredWeight, stored_weights
from fewbits.nn.walk import feed


@attrs.frozen
class Computed:
    """How one call of one layer was computed.

    Attributes:
        name: The name of the layer.
        scheme: The spec of its weight.
        weight_layout: The layout of the weight in memory.
        rows: The number of rows of its input.
        dtype: The dtype of its input.
        kernel: The kernel that computed it.
        refused: The reason why a preferred kernel did not compute, by its name.
        of_part: Whether the forward of another module read the weight, and multiplied with it or with a part of it.
    """

    name: str
    scheme: str
    weight_layout: str
    rows: int
    dtype: torch.dtype
    kernel: str
    refused: Mapping[str, str] = attrs.field(hash=False)
    of_part: bool = False


@attrs.frozen
class Explanation:
    """The answer of `explain`: a row for each call of a quantized layer, in the order of calls.

    Products of parts of a weight that were computed alike, such as those of experts, have one row.
    """

    rows: Sequence[Computed]

    def __str__(self) -> str:
        head = ("layer", "scheme", "layout", "rows", "input", "kernel")
        table = [
            (r.name, r.scheme, r.weight_layout, str(r.rows), str(r.dtype).removeprefix("torch."), r.kernel)
            for r in self.rows
        ]
        return "\n".join([render_table([head, *table], right=(3,)), *self.notes()])

    def notes(self) -> list[str]:
        """Return the reasons why preferred kernels did not compute, each distinct reason once with its first layer."""
        reasons: dict[tuple[str, str, str], str] = {}
        for row in self.rows:
            for kernel, why in row.refused.items():
                reasons.setdefault((row.kernel, kernel, why), row.name)
        return [f"{kernel}, not {other} (as for {name}): {why}" for (kernel, other, why), name in reasons.items()]


@torch.no_grad()
def explain(model: nn.Module, example_input: Any) -> Explanation:
    """Run a model once; report which kernel computed each quantized layer, and why preferred kernels did not.

    Args:
        model: A quantized model. It runs in its current mode, without gradients.
        example_input: A tensor, a tuple of arguments, or a mapping. The entries of a mapping are keyword arguments,
            unless the model takes the whole mapping as one argument, as `SentenceTransformer` does.

    Returns:
        An explanation: rows for programs; ``str()`` of it is a table.

    Raises:
        ArgumentError: If `model` is not a model or has no quantized layer, or `example_input` is None.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"explain takes a model, not a {type(model).__name__}")
    names = {module: name for name, module in model.named_modules() if isinstance(module, QuantizedModule)}
    if not names:
        raise ArgumentError("no layer of this model is quantized")
    if example_input is None:
        raise ArgumentError(
            "explain runs the model and needs an input: a tensor, a tuple of arguments or a mapping of keyword "
            "arguments, not None; () calls a model without arguments"
        )
    parameters = {
        weight: ".".join(filter(None, (name, parameter)))
        for module, name in names.items()
        for parameter, weight in stored_weights(module).items()
    }
    found: list[Computed] = []

    def note(module: QuantizedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.extend(_computed(names[module], module, [*args, *kwargs.values()]))

    def note_part(weight: PackedWeight, part: PreparedWeight, x: Tensor) -> None:
        found.append(_of_part(parameters.get(weight, ""), weight, part, x))

    with ExitStack() as hooks:
        for module in names:
            hooks.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
        hooks.callback(noted_by.reset, noted_by.set(note_part))
        feed(model, example_input)
    return Explanation(tuple(_without_repeats(found)))


def _without_repeats(found: Sequence[Computed]) -> Iterator[Computed]:
    """Drop rows of a weight that was read, if there are rows of its parts; and equal rows of parts, as of experts."""
    parts, seen = {row.name for row in found if row.of_part}, set()
    for row in found:
        if row.of_part and row not in seen:
            seen.add(row)
            yield row
        elif row.name not in parts:
            yield row


def _of_part(name: str, weight: PackedWeight, part: PreparedWeight, x: Tensor) -> Computed:
    kernel = choose(part.kernels, x, rows_of(x), part.weight)
    return Computed(name, str(weight.spec), part.weight.name, rows_of(x), x.dtype, kernel.name, {}, of_part=True)


def _computed(name: str, module: QuantizedModule, inputs: Sequence[Any]) -> Iterator[Computed]:
    x = next((value for value in inputs if isinstance(value, Tensor)), None)
    if x is None:
        return
    for parameter, weight in stored_weights(module).items():
        path = ".".join(filter(None, (name, parameter)))
        layout = weight.weight_layout().name if isinstance(weight, PackedWeight) else str(weight.spec)
        kernel, refused, rows = _choice(module, weight if parameter == module.own_weight else None, x)
        yield Computed(path, str(weight.spec), layout, rows, x.dtype, kernel, refused)


#: The name of a kernel, the reasons against preferred ones, and the number of rows that it multiplies.
_Choice = tuple[str, Mapping[str, str], int]


def _choice(module: QuantizedModule, weight: StoredWeight | None, x: Tensor) -> _Choice:
    """Name the kernel that computes with a layer's own weight for this input, and say why preferred kernels do not."""
    if isinstance(weight, PackedWeight) and isinstance(module, QuantizedConvolution):
        return _choice_of_convolution(module, weight, x)
    if not isinstance(weight, PackedWeight) or not isinstance(module, QuantizedLinear) or not weight.computes:
        return REFERENCE.name, {}, rows_of(x)
    prepared = weight.prepared()
    return _choice_of_linear(weight, prepared, chosen(x, prepared), x, rows_of(x))


def _choice_of_convolution(module: QuantizedConvolution, weight: PackedWeight, x: Tensor) -> _Choice:
    if weight.spec.activations:
        return *way_of_sums(module, weight.weight_layout(), x, weight.compute), rows_of(x)
    matrix, reason = module.matrix, module.refuses_linear(x)
    if reason is None and matrix is not None:
        rows = places(module, x)
        return _choice_of_linear(weight, matrix, choose(matrix.kernels, x, rows, matrix.weight), x, rows)
    refused = {LINEAR: reason} if reason is not None and weight.is_pointwise else {}
    if (reason := module.refuses_bf16(x, weight.weight_layout())) is None:
        return BF16, refused, rows_of(x)
    return REFERENCE.name, refused | {BF16: reason}, rows_of(x)


def _choice_of_linear(
    weight: PackedWeight, prepared: PreparedWeight, kernel: Kernel[Any], x: Tensor, rows: int
) -> _Choice:
    preferred = itertools.takewhile(lambda other: other is not kernel, weight.candidates)
    reasons = {k: _refusal_of_call(k, prepared.weight, weight.compute, x, rows) for k in preferred}
    otherwise = f"the weight is in {prepared.weight.name}" if rows else "there are no rows"
    if x.dtype == torch.float64:
        otherwise = "inputs in float64 need float64 products"
    return kernel.name, {k.name: why or otherwise for k, why in reasons.items()}, rows


def _refusal_of_call(kernel: Kernel[Any], weight: WeightLayout, compute: Compute, x: Tensor, rows: int) -> str | None:
    """Say why a kernel does not compute a call; None if it does, or if only the layout of the weight forbids it."""
    if reason := refusal(kernel, weight, compute):
        return reason
    return kernel.takes(x, rows, weight) if isinstance(weight, kernel.weight_layout) else None
