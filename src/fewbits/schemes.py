"""All built-in schemes, the table of their short names, and levels fitted to weights."""

from fewbits.numerics.fitting import fit_levels
from fewbits.quantizers.fp8_blocks import FP8Blocks
from fewbits.quantizers.schemes import (
    SCHEMES,
    FP8PerChannel,
    FP16Cast,
    Int2Grouped,
    Int3Grouped,
    Int4Grouped,
    Int5Grouped,
    Int6Grouped,
    Int7Grouped,
    Int8PerChannel,
    Int8PerTensor,
    IntNGrouped,
    LevelsGrouped,
    MXFP4Grouped,
    NF4Grouped,
)

__all__ = [
    "SCHEMES",
    "FP8Blocks",
    "FP8PerChannel",
    "FP16Cast",
    "Int2Grouped",
    "Int3Grouped",
    "Int4Grouped",
    "Int5Grouped",
    "Int6Grouped",
    "Int7Grouped",
    "Int8PerChannel",
    "Int8PerTensor",
    "IntNGrouped",
    "LevelsGrouped",
    "MXFP4Grouped",
    "NF4Grouped",
    "fit_levels",
]
