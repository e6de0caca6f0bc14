"""The names that transformers has for the tensors of a GGUF file, and the order of their rows."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fewbits.errors import FormatError
from fewbits.formats.gguf_file import GGUFFile, gguf_package

#: Architectures whose tensors transformers has under the names below, with the same values.
RENAMED = ("llama", "qwen2", "qwen3")

#: Architectures whose q and k have the rows of each head in another order.
_INTERLEAVED = ("llama",)

_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_IN_BLOCK = re.compile(r"blk\.(\d{1,6})\.(\w+)\.(\w+)")


def transformers_name(architecture: str, name: str) -> str:
    """Return the name that transformers has for a tensor; the name in the file if it is not known.

    >>> transformers_name("llama", "blk.0.attn_q.weight")
    'model.layers.0.self_attn.q_proj.weight'
    >>> transformers_name("llama", "rope_freqs.weight")
    'rope_freqs.weight'
    """
    if architecture not in RENAMED:
        return name
    if (found := _IN_BLOCK.fullmatch(name)) and found[2] in _BLOCK:
        return f"model.layers.{found[1]}.{_BLOCK[found[2]]}.{found[3]}"
    stem, _, last = name.rpartition(".")
    return f"{_MODEL[stem]}.{last}" if stem in _MODEL else name


def gguf_names(file: GGUFFile, names: list[str]) -> dict[str, str]:
    """Map names of a checkpoint to names in a file, as far as the package knows them or the file has them.

    Raises:
        FormatError: if the package does not know the architecture of the file.
    """
    gguf = gguf_package()
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    if file.architecture not in architectures:
        raise FormatError(f"{file.path}: the package gguf does not know the architecture {file.architecture!r}")
    blocks = file.number(f"{file.architecture}.block_count", 0)
    known = gguf.get_tensor_name_map(architectures[file.architecture], min(blocks, len(file.tensors)))

    def found(name: str) -> str | None:
        if name in file.tensors:
            return name
        mapped = (known.get_name(stem + name, try_suffixes=(".weight", ".bias")) for stem in ("", "model."))
        return next((other for other in mapped if other in file.tensors), None)

    return {name: other for name in names if (other := found(name)) is not None}


def row_order(file: GGUFFile, name: str, rows: int) -> Tensor | None:
    """Return, for each row of q or k in a file, the row of the same tensor in transformers; None if they are the same.

    llama.cpp turns neighbouring elements of a head as a pair, transformers elements that are half a head apart.

    Raises:
        FormatError: if the rows do not divide into heads.
    """
    found = _IN_BLOCK.fullmatch(name)
    if file.architecture not in _INTERLEAVED or not found or found[2] not in ("attn_q", "attn_k"):
        return None
    key, block = f"{file.architecture}.attention.head_count", int(found[1])
    heads = file.number(key, 0, block)
    if found[2] == "attn_k":
        heads = file.number(f"{key}_kv", heads, block)
    if not heads or rows % (2 * heads):
        raise FormatError(f"{file.path}: {name} has {rows} rows, which do not make {heads} heads")
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()
