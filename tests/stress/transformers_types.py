"""Take tiny models of every transformers type through files: ``python tests/stress/transformers_types.py [TYPE...]``.

Each model takes the path of a user: ``save_pretrained``, ``fewbits quantize DIR -o OUT``, and ``fewbits.load`` into a
new model. Every loaded tensor is compared with the source. A type whose files have other names than its modules is
listed: transformers converts these names while it loads, fewbits does not yet. The exit code is 1 if a type failed for
any other reason.
"""

import collections
import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PretrainedConfig

import fewbits
from fewbits.cli.commands import cli

#: Attributes of a config that are reduced to these numbers.
SMALL = {
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "embed_dim": 64, "hidden_dim": 64, "emb_dim": 64,
    "word_embed_proj_dim": 64, "embedding_size": 64, "projection_dim": 64, "encoder_hidden_size": 64,
    "intermediate_size": 96, "ffn_dim": 96, "d_ff": 96, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "n_inner": 96,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "ffn_hidden_size": 96, "dim_feedforward": 96,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_encoder_layers": 2, "num_decoder_layers": 2, "depth": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "attention_head_size": 16,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2,
    "vocab_size": 128, "max_position_embeddings": 64, "n_positions": 64, "image_size": 32, "patch_size": 8,
    "type_vocab_size": 2,
}  # fmt: skip
MOST_PARAMETERS = 30_000_000
#: Numbers of tokens that a config names must lie in its vocabulary.
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id")


def shrink(config: PretrainedConfig) -> None:
    """Make a config small, and the configs inside it."""
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            shrink(value)
        elif name in SMALL and type(value) is int and value > SMALL[name]:
            setattr(config, name, SMALL[name])
        elif name in TOKENS and type(value) is int and value >= SMALL["vocab_size"]:
            setattr(config, name, 1)
        elif name == "layer_types" and isinstance(value, list):
            setattr(config, name, value[: SMALL["num_hidden_layers"]])


def build(kind: str) -> nn.Module:
    """A tiny model of a type, with random weights."""
    config = CONFIG_MAPPING[kind]()
    shrink(config)
    cls = class_of(config)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters remain with the settings above")
    torch.manual_seed(0)
    model = cls(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)
    return model


def class_of(config: PretrainedConfig) -> type[nn.Module]:
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            cls = mapping[type(config)]
            return cls[0] if isinstance(cls, tuple) else cls
    raise ValueError("it has neither a causal language model nor a base model")


def saved_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    return names


def differences(loaded: nn.Module, source: nn.Module) -> Iterator[str]:
    """Yield the names of tensors that differ from the source by more than 8 bits allow."""
    before = source.state_dict()
    for name, tensor in fewbits.dequantize(loaded).state_dict().items():
        if not near(tensor, before[name]):
            yield name


def near(tensor: Tensor, other: Tensor) -> bool:
    if tensor.shape != other.shape or tensor.dtype != other.dtype:
        return False
    if not tensor.is_floating_point() or tensor.dim() < 2:
        return torch.equal(tensor, other)
    return float((tensor - other).norm()) <= 0.05 * float(other.norm())


def through_files(kind: str, folder: Path) -> str:
    """Take one type through files.

    Returns:
        the outcome.
    """
    try:
        source = build(kind)
        source.save_pretrained(folder / "float")
    except Exception as error:
        return f"not built: {type(error).__name__}: {first_line(error)}"
    code, said = command("quantize", str(folder / "float"), "-o", str(folder / "int8"), "--scheme", "int8", "--quiet")
    if said.startswith("nothing is left to quantize"):
        return "nothing to quantize"
    if code:
        return f"FAILED: quantize exits {code}: {said}"
    foreign = sorted(saved_names(folder / "float") - set(source.state_dict()))
    try:
        loaded = fewbits.load(folder / "int8", into=build(kind))
    except fewbits.errors.MismatchError as error:
        if foreign:
            return f"names: files have {foreign[0]}"
        return f"FAILED: {type(error).__name__}: {first_line(error)}"
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {first_line(error)}"
    wrong = list(differences(loaded, source))
    return f"FAILED: other values in {', '.join(wrong[:3])}" if wrong else "loads"


def command(*arguments: str) -> tuple[int, str]:
    """Run the command line in this process."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return cli(list(arguments), standalone_mode=False), ""
        except fewbits.FewbitsError as error:
            return 2, first_line(error)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def main() -> int:
    """Run all types, or those named."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    outcomes: dict[str, str] = {}
    for kind in sys.argv[1:] or list(CONFIG_MAPPING):
        with tempfile.TemporaryDirectory() as folder:
            outcomes[kind] = through_files(kind, Path(folder))
        print(f"{kind}: {outcomes[kind]}", flush=True)
    counts = collections.Counter(outcome.partition(":")[0] for outcome in outcomes.values())
    print(f"{len(outcomes)} types: " + ", ".join(f"{number} {what}" for what, number in counts.items()))
    print("need other names: " + ", ".join(kind for kind, outcome in outcomes.items() if outcome.startswith("names")))
    return 1 if counts["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
