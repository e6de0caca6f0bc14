"""Take tiny models of every transformers type through files: ``python tests/stress/transformers_types.py [TYPE...]``.

Each model takes the path of a user: ``save_pretrained``, ``fewbits quantize DIR -o OUT``, and then ``fewbits.load``
into a new model, and ``from_pretrained``. Every loaded tensor is compared bit for bit with the tensor that transformers
makes of the dequantized weights. Types whose files have other names than their modules are counted apart. The exit code
is 1 if a type failed.
"""

import collections
import contextlib
import copy
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PretrainedConfig

import fewbits
import fewbits.integrations.transformers
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


def expected_state(result: Path, folder: Path, source: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict that transformers makes of the dequantized weights of a result."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    tensors = {name: tensor.clone() for name, tensor in fewbits.load(result, dequantize=True).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return from_pretrained(folder, model).state_dict()


def from_pretrained(folder: Path, model: nn.Module) -> nn.Module:
    """Load a directory into a class, with the config of a model if that in the directory contradicts itself."""
    config = None
    try:
        type(model.config).from_pretrained(folder)
    except Exception:  # the settings above do not fit others of the config
        config = copy.deepcopy(model.config)
        settings = json.loads((folder / "config.json").read_text()).get("quantization_config")
        if settings is not None:
            config.quantization_config = settings
    return type(model).from_pretrained(folder, config=config)


def differences(loaded: nn.Module, expected: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the names of tensors of a loaded model that differ from the expected ones."""
    found = fewbits.dequantize(loaded).state_dict()
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected or not same(found[name], expected[name]):
            yield name


def same(tensor: Tensor, other: Tensor) -> bool:
    if tensor.shape != other.shape or tensor.dtype != other.dtype:
        return False
    return torch.equal(tensor, other) or bool(((tensor == other) | (tensor != tensor) & (other != other)).all())


def through_files(kind: str, folder: Path, scheme: str = "int8") -> str:
    """Take one type through files.

    Returns:
        the outcome.
    """
    try:
        source = build(kind)
        source.save_pretrained(folder / "float")
    except Exception as error:
        return f"not built: {type(error).__name__}: {first_line(error)}"
    result = folder / "result"
    code, said = command("quantize", str(folder / "float"), "-o", str(result), "--scheme", scheme, "--quiet")
    if said.startswith("nothing is left to quantize"):
        return "nothing to quantize"
    if code:
        return f"FAILED: quantize exits {code}: {said}"
    try:
        expected = expected_state(result, folder / "dense", folder / "float", source)
    except Exception as error:
        return f"not loaded by transformers: {type(error).__name__}: {first_line(error)}"
    doors = {
        "load": lambda: fewbits.load(result, into=build(kind)),
        "from_pretrained": lambda: from_pretrained(result, source),
    }
    for door, load in doors.items():
        try:
            wrong = list(differences(load(), expected))
        except Exception as error:
            return f"FAILED: {door}: {type(error).__name__}: {first_line(error)}"
        if wrong:
            return f"FAILED: {door}: other values in {', '.join(wrong[:3])}"
    return "loads under other names" if saved_names(folder / "float") - set(source.state_dict()) else "loads"


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
    return 1 if counts["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
