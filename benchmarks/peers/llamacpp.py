"""llama.cpp, through the xllamacpp wheel: its quantizer here, its decoding in `benchmarks.model`.

The wheel's Python interface has no quantizer, but the library inside exports ggml's C function. Rows are shared
among threads, as llama.cpp's own tool does it.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.contender import Contender
from benchmarks.timing import Call

PACKAGE = "xllamacpp"
MODULES = ("xllamacpp",)

#: Name -> (ggml's number for the type, bytes of a block of 32 weights).
TYPES = {"Q8_0": (8, 34), "Q4_0": (2, 18)}
BLOCK = 32


def contenders(dtype: torch.dtype, group_size: int) -> list[Contender]:
    if dtype != torch.float32:
        return []
    return [Contender(f"llama.cpp {name}", PACKAGE, dtype, start=partial(_start, name)) for name in TYPES]


def encoded(name: str, layer: nn.Linear) -> Tensor:
    """Return the bytes of the weight, (rows, bytes of a row)."""
    result: Tensor = _start(name, layer)()
    return result


def _start(name: str, layer: nn.Linear) -> Call:
    rows, columns = layer.weight.shape
    if columns % BLOCK:
        raise ValueError(f"rows of {columns} weights are not whole blocks of {BLOCK}")
    target = torch.zeros(rows, columns // BLOCK * TYPES[name][1], dtype=torch.uint8)
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
    return int(call(TYPES[name][0], source.data_ptr(), target.data_ptr(), 0, *source.shape, None))


def _library() -> ctypes.CDLL:
    from xllamacpp import xllamacpp

    library = ctypes.CDLL(xllamacpp.__file__)
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library
