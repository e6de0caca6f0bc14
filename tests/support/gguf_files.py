"""GGUF files as llama.cpp's converter and quantizer make them, written with the ``gguf`` package."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)


def tiny_llama(seed: int = 0, *, tied: bool = False, attention_bias: bool = False) -> LlamaForCausalLM:
    """Make a llama with random weights; norms and biases are not all equal."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_bias=attention_bias,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def gguf_name(name: str) -> str:
    return NAMES.get_name(name, try_suffixes=(".weight", ".bias"))


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Order the rows of q or k as llama.cpp's converter does."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def in_file_order(state: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """Rename and reorder the tensors of a llama."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = {}
    for name, tensor in state.items():
        layer = name.split(".")[-2]
        found[gguf_name(name)] = permuted(tensor, heads[layer]) if layer in heads else tensor
    return found


def quantized(tensor: Tensor, type_name: str) -> np.ndarray:
    return gguf.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[type_name])


def write(path: Path, tensors: Mapping[str, tuple[np.ndarray, str]], keys: Mapping[str, object] = {}) -> Path:
    """Write arrays with the names of their types, and some keys."""
    writer = gguf.GGUFWriter(path, str(keys.get("general.architecture", "llama")))
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif key != "general.architecture":
            add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
            add[type(value)](key, value)
    for name, (array, type_name) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def keys_of(config: LlamaConfig) -> dict[str, object]:
    return {
        "general.name": "tiny",
        "general.file_type": 0,
        "quantize.imatrix.file": "data.txt",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(config.vocab_size)],
        "tokenizer.ggml.add_bos_token": False,
        "llama.context_length": config.max_position_embeddings,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.embedding_length": config.hidden_size,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.vocab_size": config.vocab_size,
    }


def write_llama(path: Path, model: LlamaForCausalLM, type_name: str = "F32", embeddings: str | None = None) -> Path:
    """Write a llama with all matrices in one type, or embeddings and the output layer in another one."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    arrays = {}
    for name, tensor in in_file_order(state, model.config).items():
        chosen = embeddings if embeddings and name in ("token_embd.weight", "output.weight") else type_name
        chosen = "F32" if tensor.dim() == 1 else chosen
        arrays[name] = (quantized(tensor, chosen), chosen)
    return write(path, arrays, keys_of(model.config))


def read_bytes(path: Path) -> dict[str, tuple[str, bytes]]:
    """Return the type and the bytes of every tensor."""
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}
