"""Read, decode, edit and sign files without fewbits. The quantizer and the strategies at the end make the files."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import Tensor

import fewbits

DTYPE_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "U8": "uint8", "I8": "int8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "C64": "complex64",
}  # fmt: skip
DIGEST_KEY = "fewbits.header_digest"


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the payload of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any], payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def metadata_of(path: Path) -> dict[str, Any]:
    """The parsed metadata of fewbits, without the prefix of its keys."""
    strings = split(path.read_bytes())[0]["__metadata__"]
    return {
        key.removeprefix("fewbits."): value if key == DIGEST_KEY else json.loads(value)
        for key, value in strings.items()
        if key.startswith("fewbits.")
    }


def sign(header: dict[str, Any]) -> None:
    """Give an edited header a valid digest."""
    strings = {key: value for key, value in header["__metadata__"].items() if key != DIGEST_KEY}
    described = {
        name: [DTYPE_NAMES[entry["dtype"]], *entry["shape"]] for name, entry in header.items() if name != "__metadata__"
    }
    canonical = json.dumps([strings, described], sort_keys=True).encode()
    header["__metadata__"][DIGEST_KEY] = hashlib.sha256(canonical).hexdigest()


def forged(data: bytes, edit: Callable[[dict[str, str]], None]) -> bytes:
    """A file with edited metadata and a valid digest."""
    header, payload = split(data)
    edit(header["__metadata__"])
    sign(header)
    return joined(header, payload)


def forged_tensor(data: bytes, name: str, content: bytes) -> bytes:
    """A file in which one tensor has other bytes, with valid digests."""
    header, payload = split(data)
    start, stop = header[name]["data_offsets"]
    digests = json.loads(header["__metadata__"]["fewbits.digests"])
    digests[name] = hashlib.sha256(content).hexdigest()
    header["__metadata__"]["fewbits.digests"] = json.dumps(digests)
    sign(header)
    return joined(header, payload[:start] + content + payload[stop:])


def forged_ledger(data: bytes, edit: Callable[[dict[str, Any]], Any]) -> bytes:
    """A file with an edited ledger and a valid digest; `edit` gets the rows by name."""

    def change(strings: dict[str, str]) -> None:
        rows = {row["name"]: row for row in json.loads(strings["fewbits.ledger"])}
        edit(rows)
        strings["fewbits.ledger"] = json.dumps(list(rows.values()))

    return forged(data, change)


def decoded(path: Path, name: str) -> Tensor:
    """A quantized tensor in float64, decoded by the layout in the file."""
    row = next(row for row in metadata_of(path)["ledger"] if row["name"] == name)
    stored, spec, layout = safetensors.torch.load_file(path), row["spec"], row["layout"]
    bits, offset = spec["bits"], 1 << (spec["bits"] - 1)
    cut = [layout["view"][axis] for axis in layout["permutation"]]
    columns = math.prod(cut[layout["row_axes"] :])
    scale = stored[f"{name}_scale"].double()
    scale = scale.reshape(1, 1) if spec["granularity"] == "tensor" else scale
    codes = torch.tensor([read_codes(words, bits, columns) for words in stored[f"{name}_packed"].tolist()])
    zero = torch.zeros(scale.shape)
    if not spec["symmetric"]:
        packed = stored[f"{name}_zero_point"].reshape(-1, scale.shape[1])
        zero = torch.tensor([read_codes(words, bits, len(scale)) for words in packed.T.tolist()]).T - offset
    group = torch.arange(columns) // min(spec["group_size"] or columns, columns)
    matrix = (codes - offset - zero[:, group]) * scale[:, group]
    inverse = sorted(range(len(cut)), key=layout["permutation"].__getitem__)
    return matrix.reshape(cut).permute(inverse).reshape(stored[f"{name}_shape"].tolist())


def read_codes(words: list[int], bits: int, count: int) -> list[int]:
    """The codes of one row: a stream of bits, the least significant first."""
    stream = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))
    return [stream >> (bits * index) & ((1 << bits) - 1) for index in range(count)]


class AnyScheme(fewbits.Quantizer):
    """Rounds to nearest with any spec, for tensors of any size and rows of any length."""

    name = "any"

    def __init__(self, spec: fewbits.extend.Spec, **strategies: Any) -> None:
        self.spec = spec
        everything = {"selector": fewbits.LayerSelector(min_elements=1), "ragged": "shorter"}
        super().__init__(**everything | strategies)


def specs() -> st.SearchStrategy[fewbits.QuantSpec]:
    """Every width from 2 to 8 bits, every granularity, with and without zero points."""

    def build(bits: int, granularity: str, group: int, symmetric: bool) -> fewbits.QuantSpec:
        size = group if granularity == "group" else None
        return fewbits.QuantSpec(bits, granularity, group_size=size, symmetric=symmetric)

    return st.builds(
        build, st.integers(2, 8), st.sampled_from(["tensor", "channel", "group"]), st.integers(1, 40), st.booleans()
    )


def state(seed: int = 0) -> dict[str, Tensor]:
    """A small state dict: matrices, a kernel, an embedding, kept tensors, and two names for one storage."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        "embeddings.weight": normal(20, 48),
        "layers.0.weight": normal(24, 200),
        "layers.0.bias": normal(24),
        "layers.1.weight": normal(8, 6, 3, 3),
        "half.weight": normal(12, 136).half(),
        "steps": torch.tensor(7),
        "norm.weight": normal(24),
    }
    return tensors | {"head.weight": tensors["embeddings.weight"]}


def write_shards(folder: Path, tensors: dict[str, Tensor], count: int) -> Path:
    """A checkpoint of several files, as other tools write them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for index in range(count):
        file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        shard = {name: tensors[name].contiguous() for name in names[index::count]}
        safetensors.torch.save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def save(path: Path, source: object, scheme: object = "int8", **options: Any) -> fewbits.Result:
    """Quantize a source in memory, and write it. Schemes given by name have no minimum size."""
    rules = {"min_elements": 1} if isinstance(scheme, str) and "selector" not in options else {}
    result = fewbits.quantize(source, scheme, on_failure="ignore", **rules | options)
    result.save(path)
    return result
