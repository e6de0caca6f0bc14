"""``save_pretrained`` for models that `FewbitsHfQuantizer` has loaded."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewbits._sizes import parse_size
from fewbits.checkpoint.chunks import Chunk
from fewbits.checkpoint.codec import CODEC, Value
from fewbits.checkpoint.folder import WEIGHT_SUFFIXES
from fewbits.checkpoint.metadata import Metadata
from fewbits.checkpoint.output import MAX_SHARD_SIZE
from fewbits.checkpoint.safetensors import SafetensorsSerializer
from fewbits.checkpoint.saving import CheckpointWriter
from fewbits.checkpoint.shards import Shard, plan_shards, write_index
from fewbits.errors import ArgumentError
from fewbits.formats.model_config import Readers, vocabularies_of
from fewbits.nn.base import QuantizedModule
from fewbits.nn.stored import StoredWeight, stored_weights
from fewbits.numerics.spec import CastSpec
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import Fate, LedgerRow

#: Arguments of transformers' `save_pretrained` that change nothing here.
_HARMLESS = ("safe_serialization", "save_peft_format", "save_original_format", "token")


def save_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    **others: Any,
) -> None:
    """Write a quantized model to a directory, as ``fewbits quantize`` does.

    Args:
        model: the model.
        save_directory: the directory. Other files in it stay, such as those of a tokenizer.
        is_main_process: whether this process writes.
        max_shard_size: the most bytes of tensors in one file.
        others: other arguments of transformers.

    Raises:
        ArgumentError: for an argument that cannot be followed, or if the directory has other weights.
        CheckpointError: if the directory cannot be written.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        # Transformers writes adapters alone.
        type(model).save_pretrained(model, save_directory, is_main_process, max_shard_size=max_shard_size, **others)
        return
    if refused := [name for name, value in others.items() if value and name not in _HARMLESS]:
        raise ArgumentError(f"{', '.join(refused)}: a quantized model is saved without these arguments")
    if is_main_process:
        _write(model, Path(save_directory), parse_size(max_shard_size, "max_shard_size"))


def _write(model: Any, folder: Path, max_shard_size: int) -> None:
    tensors = dict(_tensors(model))
    ledger = Ledger(_rows(tensors))
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    readers = Readers.of(ledger, vocabularies_of(json.loads(config.to_json_string())) or ())
    serializer = SafetensorsSerializer()
    shards = plan_shards(ledger, max_shard_size, serializer.suffix, readers.stem)
    _refuse_other_weights(folder, shards, readers.stem)
    config.save_pretrained(folder)
    digests = {shard.file: _write_shard(serializer, folder, shard, tensors, model) for shard in shards}
    write_index(folder, shards, digests, serializer.suffix, readers.stem)
    if settings := readers.naming(shards[0].file).settings:
        config.quantization_config = dict(settings)
        config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _write_shard(
    serializer: SafetensorsSerializer, folder: Path, shard: Shard, tensors: dict[str, Tensor | StoredWeight], model: Any
) -> str:
    about = Metadata(shard.ledger, architecture=f"{type(model).__module__}.{type(model).__qualname__}")
    with CheckpointWriter(serializer, folder / shard.file, about) as writer:
        for row in shard.ledger.stored:
            writer.append(Chunk.whole(row), _value(tensors[row.name]))
        return writer.close({})


def _value(tensor: Tensor | StoredWeight) -> Value:
    return tensor.value() if isinstance(tensor, StoredWeight) else tensor.detach()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor | StoredWeight]]:
    """Yield all tensors of the state dict, quantized weights as they are stored."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, StoredWeight):
            continue
        held: dict[str, Any] = {**module._parameters, **module._buffers}
        if isinstance(module, QuantizedModule):
            held |= stored_weights(module)
        for local, tensor in held.items():
            if tensor is not None and local not in module._non_persistent_buffers_set:
                yield f"{path}.{local}" if path else local, tensor


def _rows(tensors: dict[str, Tensor | StoredWeight]) -> Iterator[LedgerRow]:
    holders: dict[int, str] = {}
    for name, tensor in tensors.items():
        holder = holders.setdefault(id(tensor), name)
        row = _row(name, tensor)
        if holder == name:
            yield CODEC.sized(row)
        else:
            reason = f"shares its storage with {holder}"
            yield LedgerRow(name, row.shape, row.dtype, "alias", reason, 0, 0, alias_of=holder)


def _row(name: str, tensor: Tensor | StoredWeight) -> LedgerRow:
    value = _value(tensor)
    shape, dtype = tuple(value.shape), tensor.dtype
    size = math.prod(shape) * dtype.itemsize
    if isinstance(tensor, Tensor):
        return LedgerRow(name, shape, dtype, "kept", "not quantized", size, 0)
    fate: Fate = "cast" if isinstance(tensor.spec, CastSpec) else "quantized"
    reason = "quantized when from_pretrained loaded it, or before"
    return LedgerRow(name, shape, dtype, fate, reason, size, 0, tensor.spec, tensor.layout)


def _refuse_other_weights(folder: Path, shards: tuple[Shard, ...], stem: str) -> None:
    """Remove the shards of an earlier result, and refuse a directory with weights of another kind.

    Raises:
        ArgumentError: if there are other weights.
    """
    new = {shard.file for shard in shards}
    stale = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index(\.map)?\.json)?")
    names = [file.name for file in folder.iterdir() if file.name not in new]
    others = [name for name in names if name.endswith(WEIGHT_SUFFIXES) or ".safetensors.index." in name]
    if kept := sorted(name for name in others if not stale.fullmatch(name)):
        raise ArgumentError(
            f"{folder} has other weights, which a loader might take for those of this model: {', '.join(kept)}; give "
            "another directory"
        )
    for name in others:
        (folder / name).unlink()
