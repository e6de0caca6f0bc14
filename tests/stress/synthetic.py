"""Write a bfloat16 checkpoint from a seed, with the names and shapes of a transformers decoder.

    PYTHONPATH=.:tests python -m stress.synthetic DIR --size 6GB --shards 3 --largest 1.5GB --seed 0

`lm_head` is the largest tensor, layers have projections and norms, and `embed_tokens` fills the rest. Values are
normal. Each tensor has its own generator, so values do not depend on the cut into files, and the same seed gives the
same bytes. Memory holds a block of one tensor.

With ``--sparse`` the payload is a hole: headers, index and lengths are the same, but the files take no space on most
file systems. Use it for dry runs, which read nothing else. With ``--equal`` there are only layers, the same number in
every file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import attrs
import torch
from benchmarks import cli, disk

from fewbits.numerics.tensor import tensor_bytes

#: Elements per written block. Another number gives other values, so it is not an option.
BLOCK = 1 << 22
ITEM = torch.bfloat16.itemsize
#: The least number of layers.
LAYERS = 4
#: Default bytes of the largest tensor, which is at most one part in `SHARE` of all bytes.
LARGEST, SHARE = 1_500_000_000, 4


@attrs.frozen
class Shape:
    """The sizes of a checkpoint.

    Attributes:
        hidden: width of the layers, a power of two.
        layers: number of layers.
        embedded: rows of the embedding; 0 for none.
        head: rows of the largest tensor; 0 for none.
    """

    hidden: int
    layers: int
    embedded: int
    head: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield names and shapes, in the order of the files."""
        if self.embedded:
            yield "model.embed_tokens.weight", (self.embedded, self.hidden)
        for index in range(self.layers):
            yield from layer(self.hidden, f"model.layers.{index}.")
        if self.head:
            yield "model.norm.weight", (self.hidden,)
            yield "lm_head.weight", (self.head, self.hidden)

    def config(self) -> dict[str, object]:
        """Make the contents of ``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": intermediate(self.hidden),
            "num_hidden_layers": self.layers,
            "vocab_size": self.embedded,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def intermediate(hidden: int) -> int:
    """Compute the width of the inner projections."""
    return hidden * 11 // 4


def layer(hidden: int, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of one layer; keys and values have a quarter of the heads."""
    few, inner = hidden // 4, intermediate(hidden)
    yield f"{prefix}input_layernorm.weight", (hidden,)
    for name, rows in (("q", hidden), ("k", few), ("v", few), ("o", hidden)):
        yield f"{prefix}self_attn.{name}_proj.weight", (rows, hidden)
    yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        yield f"{prefix}mlp.{name}_proj.weight", shape


def layer_size(hidden: int) -> int:
    """Count the bytes of one layer."""
    return sum(map(nbytes, dict(layer(hidden, "")).values()))


def nbytes(shape: tuple[int, ...]) -> int:
    """Count the bytes of a tensor of this shape."""
    return math.prod(shape) * ITEM


def shape_of(size: int, largest: int | None = None, *, shards: int = 1) -> Shape:
    """Find the widest model with about this size and largest tensor, in bytes.

    Args:
        size: of all tensors.
        largest: of the largest tensor; by default `LARGEST`, or less so that it fits into one file.
        shards: number of files.

    Raises:
        ValueError: if no room is left for layers.
    """
    largest = min(LARGEST, size // max(SHARE, shards)) if largest is None else largest
    # The embedding fills the rest, up to one layer. If it had the size of two files, one file would have no tensor.
    hidden = _widest(size - largest, largest, most=2 * size // shards)
    head, each = -(-largest // (hidden * ITEM)), layer_size(hidden)
    left = size - head * hidden * ITEM
    layers = (left - hidden * ITEM) // each
    return Shape(hidden, layers, (left - layers * each) // (hidden * ITEM), head)


def equal_shape(size: int, shards: int) -> Shape:
    """Find a shape of layers only, the same number for every file."""
    hidden = _widest(size * LAYERS // shards, size, most=size)
    return Shape(hidden, shards * max(1, size // layer_size(hidden) // shards), 0, 0)


def _widest(left: int, largest: int, *, most: int) -> int:
    """Find the largest width: layers fit into `left` bytes, a tensor into `largest`, one layer into `most`."""
    fitting = [
        width
        for width in (1 << power for power in range(5, 15))
        if LAYERS * layer_size(width) < left
        and intermediate(width) * width * ITEM <= largest
        and layer_size(width) + width * ITEM < most
    ]
    if not fitting:
        raise ValueError(f"{left:,} bytes beside a largest tensor of {largest:,} are too few for {LAYERS} layers")
    return fitting[-1]


def cut(shape: Shape, shards: int) -> list[dict[str, tuple[int, ...]]]:
    """Cut the tensors, in order, into files of about equal bytes.

    Raises:
        ValueError: if a file would be empty, because a tensor is larger than two files.
    """
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    total, start = sum(nbytes(each) for _, each in shape.tensors()), 0
    for name, each in shape.tensors():
        # The middle of a tensor decides its file.
        parts[(2 * start + nbytes(each)) * shards // (2 * total)][name] = each
        start += nbytes(each)
    if not all(parts):
        raise ValueError(f"{shards} files of {total:,} bytes in all would leave some without a tensor; ask for fewer")
    return parts


def write(folder: Path, shape: Shape, *, shards: int, seed: int = 0, sparse: bool = False) -> None:
    """Write a checkpoint into a new directory.

    Raises:
        ValueError: if it cannot be cut into so many files.
        FileExistsError: if the directory exists.
    """
    parts = cut(shape, shards)
    folder.mkdir(parents=True)
    names = [f"model-{index + 1:05d}-of-{shards:05d}.safetensors" for index in range(shards)]
    for name, part in zip(names, parts, strict=True):
        _write_file(folder / name, part, seed, sparse)
    index = {
        "metadata": {"total_size": sum(nbytes(each) for part in parts for each in part.values())},
        "weight_map": {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part},
    }
    _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", shape.config())


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, part: dict[str, tuple[int, ...]], seed: int, sparse: bool) -> None:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in part.items():
        fields[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + nbytes(shape)]}
        end += nbytes(shape)
    header = json.dumps(fields, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    with open(path, "xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        if sparse:
            file.truncate(file.tell() + end)
        else:
            for name, shape in part.items():
                _write_values(file, name, shape, seed)


def _write_values(file: BinaryIO, name: str, shape: tuple[int, ...], seed: int) -> None:
    """Write normal values: around zero with the usual width in matrices, around one in norms."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    center, width = (0.0, shape[-1] ** -0.5) if len(shape) > 1 else (1.0, 0.1)
    left = math.prod(shape)
    drawn = torch.empty(min(left, BLOCK))
    stored = torch.empty(len(drawn), dtype=torch.bfloat16)
    while left:
        count = min(left, BLOCK)
        stored[:count].copy_(drawn[:count].normal_(center, width, generator=generator))
        file.write(tensor_bytes(stored[:count]))
        left -= count


def add_shape(made: argparse.ArgumentParser, size: str, shards: int) -> None:
    """Add the options for the sizes."""
    made.add_argument("--size", type=disk.size, default=disk.size(size), help=f"of all tensors; {size}")
    made.add_argument("--shards", type=cli.positive, default=shards, metavar="N", help=f"files; {shards}")
    made.add_argument("--largest", type=disk.size, metavar="SIZE", help="of the largest tensor; 1.5GB, or less")
    made.add_argument("--seed", type=int, default=0, help="of the values")


def main(argv: Sequence[str] | None = None) -> int:
    """Write a checkpoint."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path, metavar="DIR", help="a new directory")
    add_shape(made, "6GB", 3)
    made.add_argument("--sparse", action="store_true", help="real headers and index; tensors are holes")
    made.add_argument("--equal", action="store_true", help="layers only, equally many in every file")
    arguments = made.parse_args(argv)
    size, shards = arguments.size, arguments.shards
    try:
        shape = equal_shape(size, shards) if arguments.equal else shape_of(size, arguments.largest, shards=shards)
        cut(shape, shards)
    except ValueError as error:
        made.error(str(error))
    if arguments.folder.exists():
        made.error(f"{arguments.folder} exists; give the path of a new directory")
    if not arguments.sparse:
        disk.need_room(made, next(path for path in arguments.folder.absolute().parents if path.exists()), size)
    write(arguments.folder, shape, shards=shards, seed=arguments.seed, sparse=arguments.sparse)
    total = disk.folder_size(arguments.folder)
    print(f"{arguments.folder}: {total:,} bytes in {shards} files, hidden {shape.hidden}, {shape.layers} layers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
