"""A result in several files: which tensor goes where, and the index that says so.

The names and the index are those of transformers: ``model-00001-of-00003.safetensors`` and so on, and
``model.safetensors.index.json`` with a ``weight_map`` from tensor to file. Results that transformers cannot read have
other names: ``fewbits-00001-of-00003.safetensors`` and ``fewbits.safetensors.index.map.json``. Every shard is a valid
file of fewbits, with a ledger of its tensors. The index holds the header digests of all shards, so that shards of two
results cannot be mixed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from fewbits.checkpoint.metadata import FORMAT_VERSION, VERSION_KEY, stored_entries
from fewbits.checkpoint.raw import write_durably
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow

#: The stem of the names of tensor files in a directory, as loaders look for them.
STEM = "model"

#: The same for tensors that only fewbits reads. No loader takes files of this name for a model's.
OWN_STEM = "fewbits"

#: The key of the index's metadata that maps each file to the digest of its header.
SHARDS_KEY = "fewbits.shards"


@attrs.frozen
class Shard:
    """One file of a result.

    Attributes:
        file: the name of the file.
        ledger: the rows of the tensors in the file, in order. An alias is in the shard of its tensor, a merged scale in
            the shard of its weight.
    """

    file: str
    ledger: Ledger


def plan_shards(ledger: Ledger, max_shard_size: int, suffix: str, stem: str = STEM) -> tuple[Shard, ...]:
    """Cut a result into files, of at most so many bytes each unless one tensor alone has more.

    It depends on nothing else: the same ledger gives the same files, wherever its tensors come from.
    """
    names = divided({row.name: row.bytes_after for row in ledger.stored}, max_shard_size)
    count = len(names)
    number = {name: index for index, together in enumerate(names) for name in together}
    rows: list[list[LedgerRow]] = [[] for _ in names]
    for row in ledger:
        at = row if row.merged_into is None else ledger[row.merged_into]
        rows[number[at.holder]].append(row)
    return tuple(Shard(shard_name(index, count, suffix, stem), Ledger(rows[index])) for index in range(count))


def divided(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Divide names in order, so that each list has at most `most` bytes or one name only; at least one list."""
    lists: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if total and total + size > most:
            lists.append([])
            total = 0
        lists[-1].append(name)
        total += size
    return lists


def shard_name(index: int, count: int, suffix: str, stem: str = STEM) -> str:
    """Return the name of one of several files, as transformers numbers them; a single file has no number."""
    return f"{stem}-{index + 1:05d}-of-{count:05d}{suffix}" if count > 1 else f"{stem}{suffix}"


def write_index(
    folder: Path, shards: Sequence[Shard], digests: Mapping[str, str], suffix: str, stem: str = STEM
) -> None:
    """Write the index of several shards; a single file needs none.

    Args:
        folder: the directory of the shards.
        shards: all shards.
        digests: the digest in each file's header, by file name.
        suffix: the end of the names of the files.
        stem: the beginning of the names of the files.
    """
    if len(shards) == 1:
        return
    index = {
        "metadata": {
            "total_size": sum(shard.ledger.bytes_after for shard in shards),
            VERSION_KEY: str(FORMAT_VERSION),
            SHARDS_KEY: {shard.file: digests[shard.file] for shard in shards},
        },
        "weight_map": {name: shard.file for shard in shards for name in stored_entries(shard.ledger)},
    }
    # Accelerate opens any index that ends in ".index.json", and leaves unknown tensors as they were.
    name = f"{stem}{suffix}.index{'' if stem == STEM else '.map'}.json"
    write_durably(folder / name, (json.dumps(index, indent=2) + "\n").encode())
