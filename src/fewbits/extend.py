"""Names for authors of strategies, and for frameworks that embed fewbits.

To write a scheme, subclass `fewbits.Quantizer`. This module has the other base classes, and the values they exchange.
"""

from fewbits.calibration import Observed
from fewbits.checkpoint.safetensors import SafetensorsSerializer
from fewbits.checkpoint.serializer import (
    ChunkReader,
    ChunkWriter,
    Entry,
    Header,
    Reader,
    ResumableWriter,
    Serializer,
    Writer,
)
from fewbits.checkpoint.shards import Shard
from fewbits.conversion.file_writer import Share
from fewbits.kernels.base import Kernel, Operand
from fewbits.numerics.layout import Layout, WeightMatrix
from fewbits.numerics.params import QuantParams
from fewbits.numerics.spec import Spec
from fewbits.observers.base import Observer
from fewbits.selection.info import TensorInfo
from fewbits.selection.progress import Progress
from fewbits.selection.selector import Decision

__all__ = [
    "ChunkReader",
    "ChunkWriter",
    "Decision",
    "Entry",
    "Header",
    "Kernel",
    "Layout",
    "Observed",
    "Observer",
    "Operand",
    "Progress",
    "QuantParams",
    "Reader",
    "ResumableWriter",
    "SafetensorsSerializer",
    "Serializer",
    "Shard",
    "Share",
    "Spec",
    "TensorInfo",
    "WeightMatrix",
    "Writer",
]
