"""Valid cases that the fuzzer starts from: files that fewbits wrote, and files to quantize."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import fewbits
from case import Case, Item
from fewbits.numerics.dtypes import POWERS_OF_TWO
from fewbits.numerics.levels import E2M1
from targets import Net


class _Scheme(fewbits.Quantizer):
    """Plain rounding to the given spec."""

    name = "seed"

    def __init__(self, spec: fewbits.extend.Spec) -> None:
        self.spec = spec
        super().__init__(selector=fewbits.LayerSelector(min_elements=1), ragged="shorter")


def seeds() -> dict[str, Case]:
    """All seeds, by descriptive names."""
    return dict([*_ours(), *_foreign()])


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "embed.weight": torch.randn(6, 20, generator=generator),
        "up.weight": torch.randn(4, 40, generator=generator),
        "up.bias": torch.randn(4, generator=generator),
        "conv.weight": torch.randn(2, 3, 3, 3, generator=generator).half(),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 5),
    }
    return tensors | {"head.weight": tensors["embed.weight"]}


def _net() -> Net:
    torch.manual_seed(0)
    return Net()


def _ours() -> Iterator[tuple[str, Case]]:
    levels = tuple(float(level) for level in range(-3, 5))
    specs: dict[str, fewbits.extend.Spec] = {
        "int8-channel": fewbits.QuantSpec(8, "channel"),
        "int4-groups-asymmetric": fewbits.QuantSpec(4, "group", group_size=16, symmetric=False),
        "int5-tensor-asymmetric": fewbits.QuantSpec(5, "tensor", symmetric=False, scale_dtype=torch.bfloat16),
        "int4-two-levels": fewbits.QuantSpec(4, "group", group_size=16, scale_bits=5),
        "levels": fewbits.QuantSpec(3, "group", group_size=7, levels=levels),
        "few-levels": fewbits.QuantSpec(4, "group", group_size=16, levels=E2M1, scale_dtype=POWERS_OF_TWO),
        "fp16": fewbits.CastSpec(torch.float16),
    }
    for name, spec in specs.items():
        yield f"ours-{name}", _saved(_tensors(), _Scheme(spec))
    yield "ours-model", _saved(_net(), "int8", min_elements=1)
    batches = [torch.randn(2, 24, generator=torch.Generator().manual_seed(1))]
    static = {"min_elements": 1, "activations": "static", "activation_observer": "minmax", "data": batches}
    yield "ours-model-static", _saved(_net(), "int8", **static)
    yield "ours-folder", _saved(_tensors(), "int4", max_shard_size=300, min_elements=1)


def _saved(source: Any, scheme: Any, max_shard_size: int | None = None, **settings: Any) -> Case:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("model.safetensors" if max_shard_size is None else "model")
        result = fewbits.quantize(source, scheme, on_failure="ignore", **settings)
        result.save(path, max_shard_size=max_shard_size)
        if path.is_file():
            return Case("load", "int8", path.name, (Item("file", path.name, path.read_bytes()),))
        items = (Item("file", file.name, file.read_bytes()) for file in sorted(path.iterdir()))
        return Case("load", "int8", ".", tuple(items))


def _foreign() -> Iterator[tuple[str, Case]]:
    file = Item("file", "model.safetensors", safetensors_file(_tensors()))
    yield "safetensors", Case("quantize", "int8", file.name, (file,))
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in _tensors().items()}
    yield "safetensors-float64", Case("quantize", "int8-tensor", file.name, (_named(file, safetensors_file(wide)),))
    brain = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in _tensors().items()}
    yield "safetensors-bfloat16", Case("quantize", "fp16", file.name, (_named(file, safetensors_file(brain)),))
    yield "folder", Case("quantize", "int4", ".", _folder())
    yield "folder-of-the-hub", Case("quantize", "int8", "snapshots/main", _hub(file))
    yield "folder-of-float8", Case("quantize", "int8", ".", _float8_folder())
    yield "float8-with-codes", Case("load", "int8", ".", _float8_folder())
    yield "gptq", Case("load", "int8", ".", _packed_folder(words=(12, 32), index=torch.arange(96).int() // 32))
    yield "gptq-in-another-order", Case("load", "int8", ".", _packed_folder((12, 32), torch.arange(96).int() % 3))
    yield "awq", Case("load", "int8", ".", _packed_folder(words=(96, 4)))
    for name, data in _torch_files().items():
        yield f"torch-{name}", Case("quantize", "int8", "model.bin", (Item("file", "model.bin", data),))
    yield "torch-folder", Case("quantize", "int8", ".", _torch_folder())


def _named(item: Item, data: bytes) -> Item:
    return Item(item.kind, item.name, data)


def safetensors_file(tensors: dict[str, Tensor]) -> bytes:
    """The bytes of a file that the safetensors library writes."""
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    return safetensors.torch.save(copies, {"format": "pt", "a": "b"})


def _halves(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [dict([*tensors.items()][::2]), dict([*tensors.items()][1::2])]


def _folder() -> tuple[Item, ...]:
    files = {f"model-0000{i}-of-00002.safetensors": half for i, half in enumerate(_halves(_tensors()), 1)}
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file in files for name in files[file]}}
    return (
        *(Item("file", name, safetensors_file(half)) for name, half in files.items()),
        Item("file", "model.safetensors.index.json", json.dumps(index).encode()),
        Item("file", "config.json", b'{"model_type": "seed"}'),
        Item("file", "sub/words.txt", b"words"),
        Item("file", "other.gguf", b"GGUF"),
        Item("link", "readme.md", b"config.json"),
        Item("link", "elsewhere", b"../.."),
    )


def _packed_folder(words: tuple[int, int], index: Tensor | None = None) -> tuple[Item, ...]:
    """A weight of 32 rows and 96 columns in the format of GPTQ, or of AWQ if there is no `index`."""
    generator = torch.Generator().manual_seed(3)

    def packed(*shape: int) -> Tensor:
        return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).int()

    tensors = {"l.qweight": packed(*words), "l.qzeros": packed(3, 4), "l.scales": torch.full((3, 32), 0.1).half()}
    tensors |= {} if index is None else {"l.g_idx": index}
    method = {"quant_method": "awq" if index is None else "gptq", "bits": 4, "group_size": 32}
    config = json.dumps({"model_type": "seed", "quantization_config": method})
    return (
        Item("file", "model.safetensors", safetensors_file(tensors)),
        Item("file", "config.json", config.encode()),
    )


def _float8_folder() -> tuple[Item, ...]:
    """FP8 weights with scales per block, per row and per tensor; some scales are in another file than their weights."""
    generator = torch.Generator().manual_seed(2)

    def codes(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)

    files = {
        "model-00001-of-00002.safetensors": {
            "a.weight": codes(5, 12),
            "a.weight_scale_inv": torch.rand(3, 3, generator=generator),
            "b.weight": codes(4, 6),
            "c.weight": codes(4, 6),
            "c.input_scale": torch.tensor(1.0),
        },
        "model-00002-of-00002.safetensors": {
            "b.weight_scale": torch.rand(4, 1, generator=generator),
            "c.weight_scale": torch.tensor(0.5),
        },
    }
    index = {"metadata": {}, "weight_map": {name: file for file in files for name in files[file]}}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 5]}}
    return (
        *(Item("file", name, safetensors_file(tensors)) for name, tensors in files.items()),
        Item("file", "model.safetensors.index.json", json.dumps(index).encode()),
        Item("file", "config.json", json.dumps(config).encode()),
    )


def _hub(file: Item) -> tuple[Item, ...]:
    return (
        Item("file", "blobs/0123", file.data),
        Item("link", "snapshots/main/model.safetensors", b"../../blobs/0123"),
        Item("link", "snapshots/main/config.json", b"../../blobs/4567"),
        Item("file", "blobs/4567", b"{}"),
    )


def _torch_files() -> dict[str, bytes]:
    tensors = _tensors()
    views = tensors | {
        "transposed.weight": tensors["up.weight"].t(),
        "part.weight": tensors["up.weight"][:2, ::2],
        "wide.weight": torch.ones(1, 8).expand(4, 8),
    }
    return {
        "file": torch_file(tensors),
        "views": torch_file(views),
        "module": torch_file(nn.Linear(24, 4).state_dict()),
        "parameters": torch_file(dict(nn.Linear(24, 4).named_parameters())),
        "training": torch_file({"epoch": 3, "states": {"model": {**tensors}}, "optimizer": {"state": {0: {}}}}),
        "old": torch_file({"up.weight": torch.ones(2, 3)}, _use_new_zipfile_serialization=False),
    }


def torch_file(tensors: Any, **options: Any) -> bytes:
    """The bytes of a file that `torch.save` writes."""
    made = io.BytesIO()
    torch.save(tensors, made, **options)
    return made.getvalue()


def _torch_folder() -> tuple[Item, ...]:
    files = {f"pytorch_model-0000{i}-of-00002.bin": half for i, half in enumerate(_halves(_tensors()), 1)}
    index = {"metadata": {}, "weight_map": {name: file for file in files for name in files[file]}}
    return (
        *(Item("file", name, torch_file(half)) for name, half in files.items()),
        Item("file", "pytorch_model.bin.index.json", json.dumps(index).encode()),
    )
