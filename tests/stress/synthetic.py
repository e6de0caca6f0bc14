"""A checkpoint in bfloat16 out of a seed, with the names and shapes of a decoder of transformers.

    python -m stress.synthetic DIR --size 6GB --shards 3 --largest 1.5GB --seed 0

`lm_head` is the largest tensor, layers have projections and norms, `embed_tokens` takes what is left. Values are
normal, each tensor's from a generator of its own, so that they do not depend on how the checkpoint is cut into files.
Memory holds a block of one tensor. The same seed gives the same bytes.

With ``--sparse`` the payload is left as holes: headers, index and lengths are the same, and nothing takes room on a
file system that knows holes. That is for dry runs, which read nothing else. With ``--equal`` there are only layers, as
many in every file.
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

from fewbits.checkpoint.raw import tensor_bytes

#: Elements that are made and written at a time. Another number gives other values, so it is no option.
BLOCK = 1 << 22
ITEM = torch.bfloat16.itemsize
#: Layers that there are at least.
LAYERS = 4
#: The largest tensor, unless another size is asked for, and the part of all bytes that is its most then.
LARGEST, SHARE = 1_500_000_000, 4


@attrs.frozen
class Shape:
    """How large everything is.

    Attributes:
        hidden: width of the layers, a power of two.
        layers: how many.
        embedded: rows of the embedding; 0 for none.
        head: rows of the largest tensor; 0 for none.
    """

    hidden: int
    layers: int
    embedded: int
    head: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of the files."""
        if self.embedded:
            yield "model.embed_tokens.weight", (self.embedded, self.hidden)
        for index in range(self.layers):
            yield from layer(self.hidden, f"model.layers.{index}.")
        if self.head:
            yield "model.norm.weight", (self.hidden,)
            yield "lm_head.weight", (self.head, self.hidden)

    def config(self) -> dict[str, object]:
        """What a ``config.json`` says of it."""
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
    """Width of the inner projections."""
    return hidden * 11 // 4


def layer(hidden: int, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of one layer; keys and values have a quarter of the heads."""
    few, inner = hidden // 4, intermediate(hidden)
    yield f"{prefix}input_layernorm.weight", (hidden,)
    for name, rows in (("q", hidden), ("k", few), ("v", few), ("o", hidden)):
        yield f"{prefix}self_attn.{name}_proj.weight", (rows, hidden)
    yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        yield f"{prefix}mlp.{name}_proj.weight", shape


def layer_size(hidden: int) -> int:
    """Bytes of one layer."""
    return sum(map(nbytes, dict(layer(hidden, "")).values()))


def nbytes(shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this shape."""
    return math.prod(shape) * ITEM


def shape_of(size: int, largest: int | None = None, *, shards: int = 1) -> Shape:
    """The widest model with some layers and a largest tensor of these sizes in bytes, to a row more or less.

    Args:
        size: of all tensors.
        largest: of the largest; None stands for what is usual, and goes into one of so many files.
        shards: files that it will be cut into.

    Raises:
        ValueError: if that leaves no room for layers.
    """
    largest = min(LARGEST, size // max(SHARE, shards)) if largest is None else largest
    # The embedding takes what layers leave, up to one of them; of two files' size it would leave one without a tensor.
    hidden = _widest(size - largest, largest, most=2 * size // shards)
    head, each = -(-largest // (hidden * ITEM)), layer_size(hidden)
    left = size - head * hidden * ITEM
    layers = (left - hidden * ITEM) // each
    return Shape(hidden, layers, (left - layers * each) // (hidden * ITEM), head)


def equal_shape(size: int, shards: int) -> Shape:
    """Nothing but layers, so many that each file has the same number of them."""
    hidden = _widest(size * LAYERS // shards, size, most=size)
    return Shape(hidden, shards * max(1, size // layer_size(hidden) // shards), 0, 0)


def _widest(left: int, largest: int, *, most: int) -> int:
    """The width of which some layers fit into so many bytes, a tensor has at most `largest`, and a layer `most`."""
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
    """The tensors of each file: neighbours, and about as many bytes in one as in the other.

    Raises:
        ValueError: if a file would have none, because a tensor is larger than two files should be.
    """
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    total, start = sum(nbytes(each) for _, each in shape.tensors()), 0
    for name, each in shape.tensors():
        # By its middle: a file ends where the next tensor lies mostly in the next one.
        parts[(2 * start + nbytes(each)) * shards // (2 * total)][name] = each
        start += nbytes(each)
    if not all(parts):
        raise ValueError(f"{shards} files of {total:,} bytes in all would leave some without a tensor; ask for fewer")
    return parts


def write(folder: Path, shape: Shape, *, shards: int, seed: int = 0, sparse: bool = False) -> None:
    """Write a checkpoint into a new directory.

    Raises:
        ValueError: if it cannot be cut into so many files.
        FileExistsError: if there is something there.
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
    """Normal values: about zero in matrices, as wide as weights usually are, and about one in norms."""
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
    """The options that say what is made."""
    made.add_argument("--size", type=disk.size, default=disk.size(size), help=f"of all tensors; {size}")
    made.add_argument("--shards", type=cli.positive, default=shards, metavar="N", help=f"files; {shards}")
    made.add_argument("--largest", type=disk.size, metavar="SIZE", help="of the largest tensor; 1.5GB, or less")
    made.add_argument("--seed", type=int, default=0, help="of the values")


def main(argv: Sequence[str] | None = None) -> int:
    """Write what the command line asks for."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path, metavar="DIR", help="a new directory")
    add_shape(made, "6GB", 3)
    made.add_argument("--sparse", action="store_true", help="headers and index alone; the rest is holes")
    made.add_argument("--equal", action="store_true", help="nothing but layers, as many in every file")
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
