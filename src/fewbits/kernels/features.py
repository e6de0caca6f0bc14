"""Features of this torch and this CPU: found by trial where names and versions do not tell, or as torch lists them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

#: The rows of a tile of four-bit codes, with AVX512 and without.
WIDTHS = (64, 32)

NO_TILES = "this torch has no _weight_int4pack_mm_for_cpu, or it reads codes in another order"
NO_BYTES = "this torch has no _weight_int8pack_mm for the CPU, or it computes something else"
INEXACT = "_int_mm is not exact on this CPU"
INEXACT_CONVOLUTION = "a float32 convolution does not sum integers exactly on this CPU"


def _tried(probe: Callable[[], Any]) -> Callable[[], Any]:
    """Run a probe once; an error of torch means that the feature is missing."""

    @functools.cache
    @functools.wraps(probe)
    def answer() -> Any:
        # Outside of any tracing, differentiation or profiling.
        with (
            _disable_current_modes(),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            try:
                return probe()
            except (RuntimeError, AttributeError, NotImplementedError, TypeError):
                return None

    return answer


@_tried
def tile_width() -> int | None:
    """Return the rows in a tile of ``_weight_int4pack_mm_for_cpu``; None if the order of its codes is unknown."""
    rows, columns = max(WIDTHS), 64
    codes = (torch.arange(rows * columns, dtype=torch.int32) * 7 // 3 % 16).view(rows, columns)
    scales_and_offsets = torch.tensor([1, 0], dtype=torch.bfloat16).repeat(columns // 32, rows, 1)
    one = torch.eye(columns, dtype=torch.bfloat16)
    for width in WIDTHS:
        low, high = codes.to(torch.uint8).view(-1, 2, width // 2, columns).unbind(1)
        tiles = (low | high << 4).transpose(1, 2).contiguous().view(rows, -1)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(one, tiles, 32, scales_and_offsets)
        if torch.equal(product.t().int(), codes - 8):
            return width
    return None


@_tried
def has_int8pack() -> bool | None:
    """Whether ``_weight_int8pack_mm`` computes on the CPU, for one row and for several."""
    codes = (torch.arange(48 * 80) * 37 % 255 - 127).to(torch.int8).reshape(48, 80)
    one, ones = torch.eye(80, dtype=torch.bfloat16), torch.ones(48, dtype=torch.bfloat16)
    every = torch._weight_int8pack_mm(one, codes, ones)
    each = torch.cat([torch._weight_int8pack_mm(row.unsqueeze(0), codes, ones) for row in one])
    return torch.equal(every.t().to(torch.int8), codes) and torch.equal(each, every)


@_tried
def int_mm_is_exact() -> bool | None:
    """Whether ``_int_mm`` is exact for extreme codes; without VNNI, pairs of products may saturate."""
    for rows, inputs, outputs in ((1, 256, 64), (5, 64, 65), (64, 512, 32), (33, 1024, 16), (64, 256, 1), (65, 64, 5)):
        x = torch.full((rows, inputs), 127, dtype=torch.int8)
        x[::2] = -128
        weight = torch.full((outputs, inputs), -128, dtype=torch.int8)
        weight[1::3] = 127
        exact = (x.double() @ weight.double().t()).to(torch.int32)
        if not torch.equal(torch._int_mm(x, weight.t()), exact):
            return False
    return True


@_tried
def convolution_is_exact() -> bool | None:
    """Whether a float32 convolution sums integers exactly; algorithms such as Winograd's divide in between."""
    for batch, groups, kernel in ((1, 1, 3), (16, 1, 3), (16, 1, 5), (1, 8, 3), (16, 8, 3), (16, 2, 5)):
        x = (torch.arange(batch * 8 * 8 * 8, dtype=torch.float64) * 37 % 256 - 128).view(batch, 8, 8, 8)
        weight = torch.arange(64 // groups * kernel**2, dtype=torch.float64) * 91 % 256 - 128
        weight = weight.view(8, -1, kernel, kernel)
        exact = F.conv2d(x, weight, groups=groups, padding=1)
        if not torch.equal(F.conv2d(x.float(), weight.float(), groups=groups, padding=1).double(), exact):
            return False
    return True


def found() -> list[str]:
    """Return the names and answers of all features that decide between kernels."""
    asked = tile_width, has_int8pack, int_mm_is_exact, has_vnni, has_bf16
    return [f"{feature.__name__}: {feature()}" for feature in asked]


def _has_any(*instructions: str) -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in instructions)


def has_vnni() -> bool:
    """Whether the CPU multiplies bytes with VNNI, according to torch; without it, such products are slow."""
    return _has_any("avx512_vnni", "avx_vnni", "amx_int8")


@functools.cache
def has_bf16() -> bool:
    """Whether torch multiplies bfloat16 with AVX512 or AMX instructions of this CPU, according to its list of features.

    Such products are two or three times as fast as in float32.
    """
    return _has_any("avx512_bf16", "amx_bf16") and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
