"""SHA-256 of tensors, in memory and in files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fewbits.checkpoint.codec import CODEC, Value
from fewbits.checkpoint.serializer import ChunkReader, Entry, Reader
from fewbits.errors import DigestError
from fewbits.numerics.tensor import in_memory, tensor_bytes

#: Bytes of a tensor that are read and hashed at a time.
_PIECE = 1 << 20


def digest(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor, in hexadecimal."""
    tensor = in_memory(tensor)  # perhaps a copy, which has to live as long as its bytes are read
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def value_digest(value: Value) -> str:
    """One SHA-256 over all tensors of a value, in hexadecimal."""
    return hashlib.sha256("".join(map(digest, CODEC.encode("", value).values())).encode()).hexdigest()


def wrong_digests(reader: Reader, digests: Mapping[str, str], threads: int | None = None) -> list[str]:
    """Return the names of the tensors of a file whose bytes do not match their digest.

    Args:
        reader: an open reader of the file.
        digests: the SHA-256 of every tensor in the file, in hexadecimal, by name; there may be others.
        threads: the number of tensors that are read at a time, if the format allows several; None means as many as
            torch has threads.
    """
    threads = (threads or torch.get_num_threads()) if isinstance(reader, ChunkReader) else 1
    if threads == 1:  # a thread takes memory of its own
        return [name for name in reader.entries if digest_in(reader, name) != digests[name]]
    with ThreadPoolExecutor(threads, "fewbits") as pool:
        found = pool.map(lambda name: digest_in(reader, name), reader.entries)
        return [name for name, is_now in zip(reader.entries, found, strict=True) if is_now != digests[name]]


def digest_in(reader: Reader, name: str) -> str:
    """SHA-256 of the bytes of a tensor in a file, read a piece at a time where the format allows it."""
    if not isinstance(reader, ChunkReader):
        return digest(reader.read(name))
    entry, found = reader.entries[name], hashlib.sha256()
    for start, out in pieces(entry, 0, entry.numel):
        reader.read_into(name, start, out)
        found.update(tensor_bytes(out))
    return found.hexdigest()


def pieces(entry: Entry, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
    """Yield, in order, the first element of each piece of a tensor from `start` to `stop`, and memory for the piece.

    The next piece reuses that memory.
    """
    step = max(1, _PIECE // entry.dtype.itemsize)
    memory = torch.empty(min(max(stop - start, 0), step), dtype=entry.dtype, device="cpu")
    for first in range(start, stop, step):
        yield first, memory[: stop - first]


def refuse_damaged(names: Sequence[str], where: object) -> None:
    """Refuse a file with damaged tensors.

    Raises:
        DigestError: if there is a damaged tensor; the message names all of them.
    """
    if names:
        raise DigestError(
            f"{where}: the bytes of {', '.join(names)} are not the bytes that were written; the file is damaged: "
            "quantize again, or fetch it again"
        )
