"""`explain`: which kernel computes each layer, and why not a faster one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fewbits._table import render_table
from fewbits.errors import ArgumentError
from fewbits.kernels.choose import KERNELS, refusal
from fewbits.kernels.convolution import way_of_sums
from fewbits.kernels.reference import REFERENCE, rounds_inputs
from fewbits.kernels.run import chosen
from fewbits.nn.base import QuantizedModule, stored_weights
from fewbits.nn.feeding import feed
from fewbits.nn.modules import QuantizedConvolution, QuantizedLinear
from fewbits.nn.stored import PackedWeight, StoredWeight


@attrs.frozen
class Computed:
    """How one call of one layer was computed.

    Attributes:
        name: the layer.
        scheme: how its weight is stored.
        form: the form that the weight is in.
        rows: rows of its input.
        dtype: of its input.
        kernel: the kernel that computed it.
        refused: the kernels that were preferred, by name, and why each did not.
    """

    name: str
    scheme: str
    form: str
    rows: int
    dtype: torch.dtype
    kernel: str
    refused: Mapping[str, str]


@attrs.frozen
class Explanation:
    """What `explain` found: one row for each call of a quantized layer, in the order of calls."""

    rows: Sequence[Computed]

    def __str__(self) -> str:
        head = ("layer", "scheme", "form", "rows", "input", "kernel")
        table = [
            (r.name, r.scheme, r.form, str(r.rows), str(r.dtype).removeprefix("torch."), r.kernel) for r in self.rows
        ]
        reasons: dict[tuple[str, str, str], str] = {}
        for row in self.rows:
            for kernel, why in row.refused.items():
                reasons.setdefault((row.kernel, kernel, why), row.name)
        notes = [f"{kernel}, not {other} (as for {name}): {why}" for (kernel, other, why), name in reasons.items()]
        return "\n".join([render_table([head, *table], right=(3,)), *notes])


@torch.no_grad()
def explain(model: nn.Module, example_input: Any) -> Explanation:
    """Run a model once, and tell which kernel computed each quantized layer, and why the preferred ones did not.

    Args:
        model: a quantized model; it is run in its own mode, without gradients.
        example_input: a tensor, a tuple of arguments, or a mapping: its entries are keyword arguments, unless the
            model takes the whole mapping as one argument, as `SentenceTransformer` does.

    Returns:
        rows for programs, and a table as text.

    Raises:
        ArgumentError: if it is no model, nothing in it is quantized, or `example_input` is None.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"explain takes a model, not a {type(model).__name__}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedModule)}
    if not layers:
        raise ArgumentError("no layer of this model is quantized")
    if example_input is None:
        raise ArgumentError(
            "explain runs the model and needs an input: a tensor, a tuple of arguments or a mapping of keyword "
            "arguments, not None; () calls a model without arguments"
        )
    found: list[Computed] = []
    with _watched(layers, found):
        feed(model, example_input)
    return Explanation(tuple(found))


@contextmanager
def _watched(layers: Mapping[str, QuantizedModule], found: list[Computed]) -> Iterator[None]:
    def watch(name: str) -> Any:
        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.extend(_computed(name, module, [*args, *kwargs.values()]))

        return seen

    handles = [
        module.register_forward_pre_hook(watch(name), with_kwargs=True, prepend=False)
        for name, module in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _computed(name: str, module: nn.Module, inputs: Sequence[Any]) -> Iterator[Computed]:
    x = next((value for value in inputs if isinstance(value, Tensor)), None)
    if x is None:
        return
    rows = x.numel() // x.shape[-1] if x.dim() and x.shape[-1] else 0
    for parameter, weight in stored_weights(module).items():
        path = ".".join(filter(None, (name, parameter)))
        form = weight.form().name if isinstance(weight, PackedWeight) else str(weight.spec)
        kernel, refused = _way(module, parameter, weight, x, rows)
        yield Computed(path, str(weight.spec), form, rows, x.dtype, kernel, refused)


def _way(
    module: nn.Module, parameter: str, weight: StoredWeight, x: Tensor, rows: int
) -> tuple[str, Mapping[str, str]]:
    """What computes one call, and why what is preferred does not."""
    if isinstance(weight, PackedWeight):
        if weight.computes and isinstance(module, QuantizedLinear):
            return _chosen(x, weight, rows)
        if isinstance(module, QuantizedConvolution) and parameter == "weight" and rounds_inputs(weight):
            return way_of_sums(module, weight.form(), x, weight.compute)
    return REFERENCE.name, {}


def _chosen(x: Tensor, weight: PackedWeight, rows: int) -> tuple[str, dict[str, str]]:
    """The kernel of one call, and what the ones before it in the tuple say."""
    prepared = weight.prepared()
    kernel, form = chosen(x, prepared), prepared.form
    preferred = itertools.takewhile(
        lambda other: other is not kernel, KERNELS if weight.offered is None else weight.offered
    )
    reasons = {other: refusal(other, form, weight.compute) or other.takes(x, rows) for other in preferred}
    otherwise = f"the weight lies in {form.name}" if rows else "there are no rows"
    return kernel.name, {other.name: why or otherwise for other, why in reasons.items()}
