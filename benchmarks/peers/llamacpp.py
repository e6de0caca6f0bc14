"""llama.cpp, through the xllamacpp wheel: its quantizer here, its decoding in `benchmarks.model`.

The wheel's Python interface has no quantizer, but the library inside exports ggml's C function. Rows are shared
among threads, as llama.cpp's own tool does it.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import attrs
import torch
from torch import Tensor, nn

from benchmarks.contender import Contender
from benchmarks.timing import Call

PACKAGE = "xllamacpp"
MODULES = ("xllamacpp",)


@attrs.frozen
class Type:
    """A type of ggml: its number, and the weights and bytes of a block."""

    number: int
    block: int
    nbytes: int

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.nbytes / self.block


TYPES = {
    "Q8_0": Type(8, 32, 34),
    "Q4_0": Type(2, 32, 18),
    "Q5_0": Type(6, 32, 22),
    "Q4_K": Type(12, 256, 144),
    "Q6_K": Type(14, 256, 210),
}

#: What llama.cpp takes for rows that are not whole blocks.
FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}


def contenders(dtype: torch.dtype, group_size: int) -> list[Contender]:
    if dtype != torch.float32:
        return []
    return [Contender(f"llama.cpp {name}", PACKAGE, dtype, start=partial(_start, name)) for name in ("Q8_0", "Q4_0")]


def q4_k_m(name: str, columns: int, at: int, layers: int) -> str:
    """Return the type that llama.cpp's mixture Q4_K_M gives a layer of a llama; the rules are those of its quantizer.

    Args:
        name: the name of the layer in transformers.
        columns: its inputs.
        at: the index of its block.
        layers: the number of blocks.
    """
    eighth = layers // 8
    more = at < eighth or at >= 7 * layers // 8 or (at - eighth) % 3 == 2
    kind = "Q6_K" if more and name.endswith(("v_proj", "down_proj")) else "Q4_K"
    return kind if columns % TYPES[kind].block == 0 else FALLBACK[kind]


def encoded(name: str, layer: nn.Linear) -> Tensor:
    """Return the bytes of the weight, (rows, bytes of a row)."""
    result: Tensor = _start(name, layer)()
    return result


def _start(name: str, layer: nn.Linear) -> Call:
    rows, columns = layer.weight.shape
    kind = TYPES[name]
    if columns % kind.block:
        raise ValueError(f"rows of {columns} weights are not whole blocks of {kind.block}")
    target = torch.zeros(rows, columns // kind.block * kind.nbytes, dtype=torch.uint8)
    return partial(quantize, _library(), name, layer.weight.detach(), target)


def quantize(library: ctypes.CDLL, name: str, source: Tensor, target: Tensor) -> Tensor:
    chunks = list(zip(source.chunk(threads()), target.chunk(threads()), strict=True))
    with ThreadPoolExecutor(threads()) as pool:
        for written, (_, part) in zip(pool.map(partial(_chunk, library, name), chunks), chunks, strict=True):
            if written != part.numel():
                raise ValueError(f"ggml wrote {written} bytes of {part.numel()}")
    return target


def threads() -> int:
    return torch.get_num_threads()


def _chunk(library: ctypes.CDLL, name: str, chunk: tuple[Tensor, Tensor]) -> int:
    source, target = chunk
    call = library.ggml_quantize_chunk
    return int(call(TYPES[name].number, source.data_ptr(), target.data_ptr(), 0, *source.shape, None))


def _library() -> ctypes.CDLL:
    from xllamacpp import xllamacpp

    library = ctypes.CDLL(xllamacpp.__file__)
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library
