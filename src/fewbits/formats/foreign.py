"""Recognize tensors that other tools quantized, by names and dtypes, and refuse the formats that fewbits cannot read.

Without this check, their codes would silently be kept as integers, and their scales quantized as if they were weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch

from fewbits.checkpoint.serializer import Entry
from fewbits.errors import SourceError
from fewbits.numerics.dtypes import FLOAT_DTYPES, dtype_name
from fewbits.numerics.scaled import FP8_DTYPES


@attrs.frozen
class ForeignFormat:
    """How to recognize the codes of a format.

    Attributes:
        what: the name of the format, for messages.
        codes: suffix of the name of the codes. It must be a whole last component, unless it is empty or begins with
            "_" or ".".
        beside: suffixes that replace `codes` in the names of the other tensors of the format. All must exist.
        dtypes: allowed dtypes of the codes; empty allows all but floating-point dtypes.
        loadable: whether `fewbits.load` reads a checkpoint of this format.
    """

    what: str
    codes: str
    beside: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = ()
    loadable: bool = False

    def found_beside(self, name: str, entry: Entry, entries: Mapping[str, Entry]) -> list[str]:
        """Return the names of the other tensors if a tensor holds codes of this format; empty if not."""
        fits = entry.dtype in self.dtypes if self.dtypes else entry.dtype not in (*FLOAT_DTYPES, *FP8_DTYPES)
        if not fits or not name.endswith(self.codes):
            return []
        stem = name.removesuffix(self.codes)
        whole_component = self.codes[:1] in ("", "_", ".") or stem[-1:] in ("", ".")
        beside = [stem + ending for ending in self.beside]
        return beside if whole_component and all(other in entries for other in beside) else []


_U8, _I8, _I32 = (torch.uint8,), (torch.int8,), (torch.int32,)

#: Known formats, the most specific first: the first match counts.
FOREIGN_FORMATS = (
    ForeignFormat("GPTQ", "qweight", ("qzeros", "scales", "g_idx"), loadable=True),
    ForeignFormat("AWQ, or GPTQ without g_idx", "qweight", ("qzeros", "scales"), loadable=True),
    ForeignFormat("GPTQ, AWQ, or a format like these", "qweight", ("scales",)),
    ForeignFormat("NVFP4 of compressed-tensors", "_packed", ("_scale", "_global_scale"), _U8),
    ForeignFormat("MXFP4 of compressed-tensors", "_packed", ("_scale",), _U8),
    ForeignFormat(
        "compressed-tensors' pack-quantized, which fewbits writes too", "_packed", ("_scale",), _I32, loadable=True
    ),
    ForeignFormat("packed codes with scales", "_packed", ("_scale",)),
    ForeignFormat("NVFP4 of ModelOpt", "", ("_scale", "_scale_2"), _U8),
    ForeignFormat("MXFP4, as in gpt-oss", "_blocks", ("_scales",), _U8),
    ForeignFormat("bitsandbytes, NF4", "", (".quant_state.bitsandbytes__nf4",), _U8),
    ForeignFormat("bitsandbytes, FP4", "", (".quant_state.bitsandbytes__fp4",), _U8),
    ForeignFormat("bitsandbytes, 4 bits", "", (".absmax",)),
    ForeignFormat("bitsandbytes, LLM.int8()", "weight", ("SCB",)),
    ForeignFormat("HQQ", "W_q", ("scale",)),
    ForeignFormat("torchao", "_qdata", ("_scale",), (torch.int8, torch.uint8, torch.int32, *FP8_DTYPES)),
    ForeignFormat("quanto, 4 or 2 bits", "._data._data", ("._scale", "._shift"), _U8),
    ForeignFormat("quanto", "._data", ("._scale",), (torch.int8, torch.uint8, *FP8_DTYPES)),
    ForeignFormat("int8 of compressed-tensors, or a format like it", "", ("_scale",), _I8, loadable=True),
    ForeignFormat("codes with scales", "", ("_scale",)),
    ForeignFormat("codes with scales", "", ("_scale_inv",)),
    ForeignFormat("FP8 codes with scales, except that its dtype is not FP8", "", ("_scale_inv",), FLOAT_DTYPES),
    ForeignFormat("FP8 with scales of scales", "", ("_scale", "_scale_2"), FP8_DTYPES),
    ForeignFormat("FP8 with zero points", "", ("_scale", "_zero_point"), FP8_DTYPES),
    ForeignFormat("FP8 with its columns in another order", "", ("_scale", "_g_idx"), FP8_DTYPES),
)

_ADVICE = "cannot be read yet; give the float checkpoint it was made from, or dequantize it with the tool that wrote it"
_LOADABLE_ADVICE = (
    "must be dequantized before it is quantized again; give the float checkpoint it was made from, or "
    "fewbits.load(path, dequantize=True)"
)


def refuse_foreign(entries: Mapping[str, Entry]) -> None:
    """Refuse tensors that another tool or fewbits quantized, except FP8 weights with scales.

    Raises:
        SourceError: naming the first such tensor, its format, and the tensors that belong to it.
    """
    for name, entry in entries.items():
        for format in FOREIGN_FORMATS:
            if beside := format.found_beside(name, entry, entries):
                advice = _LOADABLE_ADVICE if format.loadable else _ADVICE
                raise SourceError(
                    f"{name} ({dtype_name(entry.dtype)}, shape {entry.shape}) is quantized already: with "
                    f"{', '.join(beside)} beside it, it looks like {format.what}, which {advice}"
                )
