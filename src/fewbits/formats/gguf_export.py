"""`GGUF`: writes a quantized checkpoint for llama.cpp, with everything else from a GGUF file of the same model."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from fewbits._events import emit
from fewbits._version import __version__
from fewbits.checkpoint.codec import Value
from fewbits.checkpoint.raw import as_checkpoint_error
from fewbits.errors import ArgumentError, CheckpointError
from fewbits.formats.base import Described, Exporter, Readable
from fewbits.formats.gguf_blocks import BlockType, block_type, spec_problem, write_blocks
from fewbits.formats.gguf_checkpoint import GGUFCheckpoint
from fewbits.formats.gguf_file import GGUFFile, StoredTensor, gguf_package
from fewbits.formats.gguf_template import Match, as_matrix, match, prove_kept, proved_order
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.selection.progress import Progress, followed, no_progress
from fewbits.selection.row import LedgerRow

#: Keys of a template that would not be true of a result begin so, and those that the writer adds by itself.
_LEFT_OUT = (
    "GGUF.",
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
    "general.quantized_by",
    "quantize.",
)

_FLOAT_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
_DTYPES = {name: dtype for dtype, name in _FLOAT_TYPES.items()}


@attrs.frozen
class _Planned:
    """A tensor of the result.

    Attributes:
        stored: the tensor in the template.
        match: the tensor of the checkpoint for it; None if the template alone has it.
        type: the name of the type that it is written in.
        blocks: the type of its blocks, if it is written as codes.
    """

    stored: StoredTensor
    match: Match | None
    type: str
    blocks: BlockType | None = None


@attrs.frozen(eq=False)
class _Content:
    """What to write for a tensor.

    Attributes:
        name: its name in the template.
        data: an array of numbers, or of the bytes of blocks.
        numbers: the numbers that it must decode to, in float32; None for a copy of the template's tensor.
        differs: whether it is a copy, and the checkpoint has other values.
    """

    name: str
    data: Any
    numbers: Tensor | None = None
    differs: bool = False


class GGUF(Exporter):
    """A GGUF file for llama.cpp and the tools around it.

    Keys, tokenizer, and all tensors that are not quantized come from a template: a GGUF file of the same model, such as
    llama.cpp's converter makes. Names are matched with the ``gguf`` package. Values prove each match: a quantized
    weight must agree with the template's in every row, and every other tensor must be equal up to rounding. The
    template may itself be quantized; then embeddings and the output layer stay as it has them.

    Codes are written as they are, in the smallest type of blocks that holds them. With `allow`, tensors that no type
    holds are written as floats, and tensors without a counterpart in the template are left out.

    Args:
        template: the template.
        allow: whether to write a checkpoint that has obstacles.

    Raises:
        ArgumentError: if there is no template, or the package ``gguf`` is not installed.
        FormatError: if the template is malformed.
        CheckpointError: if the template cannot be read.
    """

    name = "gguf"
    suffix = ".gguf"

    def __init__(self, template: str | os.PathLike[str] | None = None, *, allow: bool = False) -> None:
        super().__init__(allow=allow)
        if template is None:
            raise ArgumentError(
                "the format gguf needs a template: a GGUF file of the same model, for example from "
                "convert_hf_to_gguf.py of llama.cpp (--template FILE, template=FILE)"
            )
        self._template = GGUFFile(template)

    def obstacles(self, source: Described) -> dict[str, str]:
        """Explain, by the name of each tensor, what GGUF cannot hold. Scales are read too, if they exist already.

        Raises:
            MismatchError: if a quantized tensor has no counterpart in the template, or a matrix of the template none in
                the checkpoint.
        """
        matches = match(self._template, source)
        placed = {matched.row.name for matched in matches.values()}
        problems = {}
        for row in source.ledger.stored:
            if row.name not in placed:
                problems[row.name] = "has no counterpart in the template, and would be left out"
            elif problem := _problem(row, source):
                problems[row.name] = problem
        return problems

    def write(self, source: Readable, target: Path, progress: Progress) -> None:
        """Write all tensors of the template, one at a time, with the codes of the checkpoint.

        Raises:
            MismatchError: if a tensor does not agree with its counterpart in the template.
            CheckpointError: if the file cannot be written.
        """
        plan = self._plan(source)
        writer = self._begin(plan, target)
        differing: list[str] = []
        try:
            with as_checkpoint_error(f"{target} cannot be written"):
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for content in self._contents(source, plan, progress):
                    writer.write_tensor_data(content.data)
                    differing += [content.name] if content.differs else []
                writer.flush()
                os.fsync(writer.fout[0].fileno())
        finally:
            writer.close()
        if differing:
            emit("warning", "kept_from_template", file=str(self._template.path), tensors=differing)

    def open(self, target: Path) -> GGUFCheckpoint:
        """Open a result."""
        return GGUFCheckpoint(target)

    def check(self, source: Readable, target: Path, progress: Progress) -> None:
        """Read a result back: its bytes must be those to write, and the package must decode the numbers of the source.

        Raises:
            CheckpointError: naming the first tensor that differs.
        """
        found = self.open(target).file.tensors
        for content in self._contents(source, self._plan(source), no_progress):
            stored = found.get(content.name)
            if stored is None or stored.data.tobytes() != content.data.tobytes():
                raise CheckpointError(f"{target}: {content.name} does not have the bytes that were written")
            if content.numbers is not None and not torch.equal(stored.decode().float(), content.numbers):
                raise CheckpointError(f"{target}: {content.name} decodes to other values than {source.path} has")

    def _plan(self, source: Readable) -> list[_Planned]:
        matches = match(self._template, source)
        return [_planned(stored, matches.get(name), source) for name, stored in self._template.tensors.items()]

    def _begin(self, plan: list[_Planned], target: Path) -> Any:
        """Return a writer of the package that knows all keys, and the shape and type of every tensor."""
        import numpy as np

        gguf = gguf_package()
        writer = gguf.GGUFWriter(target, self._template.architecture)
        writer.data_alignment = self._template.alignment
        for key, field in self._template.fields.items():
            if not key.startswith(_LEFT_OUT):
                _copy_key(writer, key, field)
        writer.add_file_type(_file_type(plan))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_quantized_by(f"fewbits {__version__}")
        for planned in plan:
            kind = gguf.GGMLQuantizationType[planned.type]
            elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
            shape = planned.stored.shape
            # The package takes shapes for those of bytes if the dtype is uint8.
            any_other = np.dtype("float32")
            writer.add_tensor_info(
                planned.stored.name, shape, any_other, math.prod(shape) // elements * nbytes, raw_dtype=kind
            )
        return writer

    def _contents(self, source: Readable, plan: list[_Planned], progress: Progress) -> Iterator[_Content]:
        """Yield what to write, one tensor at a time. Each weight is compared with the template first."""
        steps = followed("convert", [planned.match.row for planned in plan if planned.match], progress)
        for planned in plan:
            if planned.match is None:
                yield _Content(planned.stored.name, planned.stored.data)
                continue
            next(steps)
            value = source.value(planned.match.row.name)
            if isinstance(value, QuantizedTensor):
                yield _coded(planned, value, proved_order(self._template, planned.match, value))
            else:
                same = prove_kept(self._template, planned.match, value)
                yield _Content(planned.stored.name, planned.stored.data, differs=not same)
        next(steps, None)  # reports the last tensor as done


def _problem(row: LedgerRow, source: Described) -> str:
    """Return why a weight cannot be written as it is; "" if it can, as far as its codes are known."""
    spec, layout = row.spec, row.layout
    if not isinstance(spec, QuantSpec) or layout is None:
        return ""
    problem = spec_problem(spec, layout.columns)
    read: Callable[[str], Value] | None = getattr(source, "value", None)  # a planned checkpoint has no codes yet
    if not problem and read is not None:
        value = read(row.name)
        kind = block_type(value) if isinstance(value, QuantizedTensor) else ""
        problem = kind if isinstance(kind, str) else ""
    if problem:
        return f"{problem}; if allowed (--allow, allow=True), it is written as floats"
    if spec.activations is not None:
        return f"is {spec}, and GGUF does not say that a layer rounds its inputs; if allowed, that is lost"
    return ""


def _planned(stored: StoredTensor, matched: Match | None, source: Readable) -> _Planned:
    value = None if matched is None else source.value(matched.row.name)
    if not isinstance(value, QuantizedTensor):
        return _Planned(stored, matched, stored.type)
    kind = block_type(value)
    if isinstance(kind, str):
        return _Planned(stored, matched, _FLOAT_TYPES.get(value.dtype, "F32"))
    return _Planned(stored, matched, kind.name, kind)


def _coded(planned: _Planned, value: QuantizedTensor, order: Tensor | None) -> _Content:
    """Encode a quantized weight: its codes as blocks, or its numbers where no block can hold the codes."""
    numbers = as_matrix(value)
    if planned.blocks is not None:
        data = write_blocks(planned.blocks, value)
    else:
        data = numbers.to(_DTYPES[planned.type])
        numbers = data.float()
    if order is not None:
        data, numbers = data[order], numbers[order]
    if planned.type == "BF16":  # numpy has no such dtype
        data = data.view(torch.uint8)
    return _Content(planned.stored.name, data.contiguous().numpy(), numbers.reshape(planned.stored.shape))


def _copy_key(writer: Any, key: str, field: Any) -> None:
    """Copy a key of the template. The package cannot write an empty list, and no reader needs one."""
    main, *inner = field.types
    value = field.contents()
    if value != []:
        writer.add_key_value(key, value, main, sub_type=inner[-1] if inner else None)


def _file_type(plan: list[_Planned]) -> int:
    """Return the number for the type that most elements have; tensors of one axis do not count."""
    types = gguf_package().LlamaFileType
    elements: Counter[str] = Counter()
    for planned in plan:
        elements[planned.type] += math.prod(planned.stored.shape) if len(planned.stored.shape) > 1 else 0
    most = max(elements, key=elements.__getitem__, default="F32")
    name = "ALL_F32" if most == "F32" else f"MOSTLY_{most}"
    return int(getattr(types, name, types.GUESSED))
