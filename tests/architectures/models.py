"""Tiny models of many architectures, with random weights, and inputs for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import attrs
import torch
import transformers
from torch import Tensor, nn

#: Arguments that most text models share.
_TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@attrs.frozen
class Architecture:
    """A model of transformers.

    Attributes:
        name: the class of its config, less "Config".
        model: the class of the model.
        config: the arguments of its config.
        inputs: makes the keyword arguments of a call.
    """

    name: str
    model: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]]

    def build(self, seed: int = 0) -> nn.Module:
        """The model in float32 and eval mode, all of whose parameters are random."""
        config = getattr(transformers, f"{self.name}Config")(**self.config)
        model: nn.Module = getattr(transformers, self.model)(config).eval()
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if not parameter.is_meta:  # the usual zeros and ones hide lost values
                parameter.data.normal_(0, 0.05, generator=generator)
        return model

    def run(self, model: nn.Module) -> list[Tensor]:
        """All tensors of the output."""
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' own, on random weights
            torch.manual_seed(0)
            output = model(**self.inputs())
        return [value for value in output.values() if isinstance(value, Tensor)]

    def __str__(self) -> str:
        return self.name


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _ids(length: int = 7) -> Tensor:
    return torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(3))


def _text() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "use_cache": False}


def _both() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(5), "use_cache": False}


def _text_only() -> dict[str, Tensor]:
    return {"input_ids": _ids()}


def _image(size: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": _random(2, 3, size, size)}


def _decoder(name: str, **config: Any) -> Architecture:
    return Architecture(name, f"{name}ForCausalLM", {**_DECODER, **_TOKENS, **config}, _text)


_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

ARCHITECTURES = (
    _decoder("Llama"),
    _decoder("Gemma"),
    _decoder("Gemma2", sliding_window=4),
    _decoder("Qwen2"),
    _decoder("Mistral"),
    _decoder("Phi3"),
    _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    _decoder("Qwen3Moe", num_experts=4, **_EXPERTS),
    _decoder("GptOss", num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2),
    Architecture(
        "Llama4Text",
        "Llama4ForCausalLM",
        {**_DECODER, **_TOKENS, "num_local_experts": 4, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1},
        _text,
    ),
    _decoder(
        "DeepseekV3",
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
        **_EXPERTS,
    ),
    _decoder("GPTNeoX"),
    Architecture(
        "Falcon", "FalconForCausalLM", {**_TEXT, **_TOKENS, "new_decoder_architecture": True, "num_kv_heads": 2}, _text
    ),
    Architecture(
        "GPT2", "GPT2LMHeadModel", {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, **_TOKENS}, _text
    ),
    Architecture("OPT", "OPTForCausalLM", {**_TEXT, **_TOKENS, "ffn_dim": 96, "word_embed_proj_dim": 64}, _text),
    Architecture(
        "Bloom", "BloomForCausalLM", {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4, **_TOKENS}, _text
    ),
    Architecture(
        "Mamba",
        "MambaForCausalLM",
        {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, **_TOKENS},
        _text,
    ),
    Architecture("Bert", "BertModel", _TEXT, _text_only),
    Architecture("Roberta", "RobertaForMaskedLM", {**_TEXT, "pad_token_id": 0}, _text_only),
    Architecture(
        "DistilBert",
        "DistilBertModel",
        {"vocab_size": 96, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4},
        _text_only,
    ),
    Architecture(
        "DebertaV2",
        "DebertaV2Model",
        {**_TEXT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
        _text_only,
    ),
    Architecture(
        "T5",
        "T5ForConditionalGeneration",
        {
            "vocab_size": 96,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            **_TOKENS,
            "decoder_start_token_id": 0,
        },
        _both,
    ),
    Architecture(
        "Bart",
        "BartForConditionalGeneration",
        {
            "vocab_size": 96,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "max_position_embeddings": 64,
            **_TOKENS,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": 2,
        },
        _both,
    ),
    Architecture(
        "Whisper",
        "WhisperForConditionalGeneration",
        {
            "vocab_size": 96,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "num_mel_bins": 16,
            "max_source_positions": 16,
            "max_target_positions": 16,
            **_TOKENS,
            "decoder_start_token_id": 1,
            "begin_suppress_tokens": None,
        },
        lambda: {"input_features": _random(2, 16, 32), "decoder_input_ids": _ids(5), "use_cache": False},
    ),
    Architecture("ViT", "ViTModel", {**_TEXT, "image_size": 16, "patch_size": 4}, _image),
    Architecture(
        "ConvNext",
        "ConvNextModel",
        {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "patch_size": 4},
        lambda: _image(32),
    ),
    Architecture(
        "ResNet", "ResNetModel", {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1]}, lambda: _image(32)
    ),
    Architecture(
        "Swin",
        "SwinModel",
        {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        lambda: _image(32),
    ),
    Architecture(
        "CLIP",
        "CLIPModel",
        {
            "text_config": {**_TEXT, **_TOKENS, "projection_dim": 32},
            "vision_config": {**_TEXT, "image_size": 16, "patch_size": 4, "projection_dim": 32},
            "projection_dim": 32,
        },
        lambda: _image() | {"input_ids": _ids()},
    ),
    Architecture(
        "Wav2Vec2",
        "Wav2Vec2ForCTC",
        {
            "vocab_size": 96,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "conv_dim": [32, 32],
            "conv_stride": [4, 2],
            "conv_kernel": [8, 3],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        lambda: {"input_values": _random(2, 400)},
    ),
)

_LARGE = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    **_TOKENS,
}
MODELS_OF_EXPERTS = (
    Architecture("Mixtral", "MixtralForCausalLM", {**_LARGE, "num_local_experts": 8}, _text),
    Architecture("Qwen3Moe", "Qwen3MoeForCausalLM", {**_LARGE, "num_experts": 8, "moe_intermediate_size": 512}, _text),
)
