"""A state dict as source, a mapping as result."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence

import attrs
import torch
from torch import Tensor

from fewbits.checkpoint.saving import Value
from fewbits.errors import ArgumentError, SourceError
from fewbits.nn.storage import View, overlaps, storage_key
from fewbits.numerics.dtypes import FLOAT_DTYPES, dtype_name
from fewbits.numerics.metrics import Measurement
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.selection.info import TensorInfo, layout_by_shape, numeric_obstacle
from fewbits.selection.ledger import Ledger, LedgerRow
from fewbits.sources.base import LiveSource, Target


class MappingSource(LiveSource):
    """A state dict, or any mapping from name to tensor. By name, so that a file of the same tensors gives the same."""

    def __init__(self, tensors: Mapping[str, object], *, inplace: bool) -> None:
        if inplace and not isinstance(tensors, MutableMapping):
            raise ArgumentError(f"inplace=True needs a mapping that can be changed, not {type(tensors).__name__}")
        self.inplace = inplace
        self._given = tensors
        checked = _checked(tensors)
        overlapping = overlaps({name: View.of(tensor) for name, tensor in checked.items()})
        self.infos = tuple(
            entry_info(name, tuple(t.shape), t.dtype, storage=storage_key(t), obstacle=overlapping.get(name))
            for name, t in sorted(checked.items())
        )
        refuse_quantized_entries(self.infos)

    def read(self, name: str) -> Tensor:
        """One of its tensors, as the mapping has it now.

        Raises:
            SourceError: if it has none of that name any more.
        """
        tensor = self._given.get(name)
        if not isinstance(tensor, Tensor):
            raise SourceError(f"{name} has been removed from the mapping since it was prepared; prepare it again")
        return tensor.detach()

    def prepared(self) -> Mapping[str, object]:
        """The mapping that was handed in: there is nothing to run."""
        return self._given

    def target(self, ledger: Ledger) -> Target:
        """A new dict, or the mapping itself."""
        added = sorted(map(str, self._given.keys() - {row.name for row in ledger}))
        if added:
            raise SourceError(f"the mapping has gained {', '.join(added)} since it was prepared; prepare it again")
        return _MappingTarget(self, ledger)

    def replace(self, name: str, value: Value) -> None:
        """Put the stored form in the place of the source's tensor, and let go of that."""
        if isinstance(self._given, MutableMapping):
            self._given[name] = value


class _MappingTarget(Target):
    def __init__(self, source: MappingSource, ledger: Ledger) -> None:
        self._source = source
        self._values: dict[str, Value] = {}
        self._names = ledger.names_by_holder()

    def put(self, row: LedgerRow, value: Value, measurement: Measurement | None) -> None:
        if isinstance(value, Tensor) and row.fate == "kept" and not self._source.inplace:
            value = value.clone()
        for name in self._names[row.name]:
            self._values[name] = value
            if self._source.inplace and row.fate != "kept":
                self._source.replace(name, value)

    def finish(self) -> object:
        if self._source.inplace:
            self._values = self._source.prepared()  # type: ignore[assignment]
        else:
            self._values = {name: self._values[name] for name in self._source.prepared()}
        return self._values

    def value(self, name: str) -> Value:
        value = self._values.get(name)
        if not isinstance(value, (QuantizedTensor, Tensor)):
            raise SourceError(f"{name} has been removed from the quantized mapping")
        return value


def entry_info(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    storage: object = None,
    obstacle: str | None = None,
) -> TensorInfo:
    """What is known of a tensor that has a name and no class."""
    obstacle = numeric_obstacle(name, shape, dtype) or obstacle
    info = TensorInfo(
        name=name,
        shape=shape,
        dtype=dtype,
        storage=storage or name,
        layout=None if obstacle else layout_by_shape(shape),
        declared=len(shape) == 2,
        obstacle=obstacle,
    )
    return attrs.evolve(info, rounds_inputs=not info.is_embedding_by_name)


def refuse_quantized_entries(infos: Sequence[TensorInfo]) -> None:
    """Refuse a checkpoint that another tool (or this one) has quantized: its scales would be taken for weights.

    Raises:
        SourceError: naming the first such tensor and what lies beside it.
    """
    names = {info.name for info in infos}
    for info in infos:
        stem = info.name.rpartition(".")[0] + "." if "." in info.name else ""
        beside = [f"{info.name}_scale_inv"]
        beside += [] if info.dtype in FLOAT_DTYPES else [f"{info.name}_scale", f"{stem}SCB"]
        beside += [f"{stem}scales"] if info.name.endswith("qweight") else []
        beside += [f"{info.name.removesuffix('_packed')}_scale"] if info.name.endswith("_packed") else []
        found = [name for name in beside if name in names]
        if found:
            raise SourceError(
                f"{info.name} ({dtype_name(info.dtype)}) has {found[0]} beside it, so it is quantized already; "
                "dequantize the checkpoint first"
            )


def _checked(tensors: Mapping[str, object]) -> dict[str, Tensor]:
    """The mapping's entries, if all of them are dense tensors with data, under names.

    Raises:
        SourceError: naming what is not.
    """
    checked: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantizedTensor):
            raise SourceError(f"{name} is quantized already; dequantize() it first")
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            inner = f"; pass the state dict itself, [{name!r}]?" if isinstance(tensor, Mapping) else ""
            raise SourceError(
                f"the entry {name!r} is a {type(tensor).__name__}; a state dict maps names to tensors{inner}"
            )
        if tensor.is_meta or tensor.layout != torch.strided:
            raise SourceError(
                f"{name} is on {tensor.device} with layout {tensor.layout}; only dense tensors with data can be stored"
            )
        checked[name] = tensor
    return checked
