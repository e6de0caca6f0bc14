"""Names for authors of strategies, and for frameworks that embed fewbits.

To write a scheme, subclass `fewbits.Quantizer`. This module has the other base classes, and the values they exchange.
"""

from fewbits.calibration.batches import Observed
from fewbits.calibration.tuning import Tuned, Tuning
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
from fewbits.conversion.coordinator import Coordinator, Written
from fewbits.conversion.exporting import Exported
from fewbits.conversion.file_writer import Share
from fewbits.formats.base import Described, DirectoryExporter, Exporter, ForeignCheckpoint, Readable
from fewbits.formats.gguf_export import GGUF
from fewbits.kernels.base import Kernel
from fewbits.kernels.byte_pairs import BytePairs
from fewbits.kernels.int4_tiles import Int4Tiles
from fewbits.kernels.int8_rows import Int8Rows
from fewbits.kernels.weight_layouts import PackedInt32, WeightLayout
from fewbits.nn.base import QuantizedModule
from fewbits.nn.convolutions import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
)
from fewbits.nn.modules import QuantizedEmbedding, QuantizedEmbeddingBag, QuantizedLinear
from fewbits.numerics.affine import decode, encode
from fewbits.numerics.layout import Layout, WeightMatrix
from fewbits.numerics.params import QuantParams
from fewbits.numerics.spec import Spec
from fewbits.observers.base import Observer
from fewbits.observers.moving_average import MovingAverageMinMaxObserver
from fewbits.pages.curve import Curve
from fewbits.pages.rendering import HtmlPage
from fewbits.planning.allocation import Allocated, Allocation
from fewbits.rounding.base import Rounding, RowInputs
from fewbits.rounding.statistics import InputStatistics
from fewbits.selection.info import TensorInfo
from fewbits.selection.progress import Progress, Step
from fewbits.selection.selector import Decision
from fewbits.validation.evaluation import compare_outputs
from fewbits.validation.outputs import ModelReport

__all__ = [
    "GGUF",
    "Allocated",
    "Allocation",
    "BytePairs",
    "ChunkReader",
    "ChunkWriter",
    "Coordinator",
    "Curve",
    "Decision",
    "Described",
    "DirectoryExporter",
    "Entry",
    "Exported",
    "Exporter",
    "ForeignCheckpoint",
    "Header",
    "HtmlPage",
    "InputStatistics",
    "Int4Tiles",
    "Int8Rows",
    "Kernel",
    "Layout",
    "ModelReport",
    "MovingAverageMinMaxObserver",
    "Observed",
    "Observer",
    "PackedInt32",
    "Progress",
    "QuantParams",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvTranspose1d",
    "QuantizedConvTranspose2d",
    "QuantizedConvTranspose3d",
    "QuantizedEmbedding",
    "QuantizedEmbeddingBag",
    "QuantizedLinear",
    "QuantizedModule",
    "Readable",
    "Reader",
    "ResumableWriter",
    "Rounding",
    "RowInputs",
    "SafetensorsSerializer",
    "Serializer",
    "Shard",
    "Share",
    "Spec",
    "Step",
    "TensorInfo",
    "Tuned",
    "Tuning",
    "WeightLayout",
    "WeightMatrix",
    "Writer",
    "Written",
    "compare_outputs",
    "decode",
    "encode",
]
