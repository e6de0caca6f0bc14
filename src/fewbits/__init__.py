"""fewbits makes any PyTorch model or checkpoint smaller, accounts for every tensor, and checks what it wrote.

>>> import torch, fewbits
>>> result = fewbits.quantize(torch.nn.Linear(256, 64), "int8")
>>> result.report.ok, result.ledger["weight"].fate, result.ledger["bias"].reason
(True, 'quantized', 'a bias is never quantized')
"""

from fewbits._version import __version__
from fewbits.api import Plan, Result, plan, quantize, verify
from fewbits.calibration import Observed
from fewbits.checkpoint.loading import load
from fewbits.checkpoint.output import Output
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
from fewbits.config.config import QuantizationConfig
from fewbits.errors import (
    ArgumentError,
    CalibrationError,
    CheckpointError,
    DigestError,
    FewbitsError,
    FormatError,
    MismatchError,
    NonFiniteError,
    NumericsError,
    RangeError,
    RankError,
    ReadOnlyWeightError,
    SelectionError,
    SourceError,
    StateError,
    ValidationError,
)
from fewbits.fleet import FleetRun
from fewbits.kernels.base import Kernel, Operand
from fewbits.nn.compute import set_compute
from fewbits.nn.explain import explain
from fewbits.nn.swap import dequantize
from fewbits.numerics.layout import Layout, WeightMatrix
from fewbits.numerics.metrics import Measurement, measure
from fewbits.numerics.spec import CastSpec, QuantSpec, Spec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.observers.base import Observer
from fewbits.observers.histogram import HistogramObserver
from fewbits.observers.min_max import MinMaxObserver
from fewbits.observers.moving_average import MovingAverageMinMaxObserver
from fewbits.observers.mse import MSEObserver
from fewbits.observers.percentile import PercentileObserver
from fewbits.quantizers.base import Quantizer
from fewbits.quantizers.job import Share
from fewbits.quantizers.lifecycle import State
from fewbits.quantizers.schemes import FP16Cast, Int4Grouped, Int8PerChannel, Int8PerTensor
from fewbits.selection.info import TensorInfo
from fewbits.selection.ledger import Ledger, LedgerRow
from fewbits.selection.progress import Progress, Step
from fewbits.selection.rules import Override
from fewbits.selection.selector import Decision, LayerSelector, Selector
from fewbits.validation.report import Report, TensorReport

__all__ = [
    "ArgumentError",
    "CalibrationError",
    "CastSpec",
    "CheckpointError",
    "ChunkReader",
    "ChunkWriter",
    "Decision",
    "DigestError",
    "Entry",
    "FP16Cast",
    "FewbitsError",
    "FleetRun",
    "FormatError",
    "Header",
    "HistogramObserver",
    "Int4Grouped",
    "Int8PerChannel",
    "Int8PerTensor",
    "Kernel",
    "LayerSelector",
    "Layout",
    "Ledger",
    "LedgerRow",
    "MSEObserver",
    "Measurement",
    "MinMaxObserver",
    "MismatchError",
    "MovingAverageMinMaxObserver",
    "NonFiniteError",
    "NumericsError",
    "Observed",
    "Observer",
    "Operand",
    "Output",
    "Override",
    "PercentileObserver",
    "Plan",
    "Progress",
    "QuantSpec",
    "QuantizationConfig",
    "QuantizedTensor",
    "Quantizer",
    "RangeError",
    "RankError",
    "ReadOnlyWeightError",
    "Reader",
    "Report",
    "Result",
    "ResumableWriter",
    "SafetensorsSerializer",
    "SelectionError",
    "Selector",
    "Serializer",
    "Shard",
    "Share",
    "SourceError",
    "Spec",
    "State",
    "StateError",
    "Step",
    "TensorInfo",
    "TensorReport",
    "ValidationError",
    "WeightMatrix",
    "Writer",
    "__version__",
    "dequantize",
    "explain",
    "load",
    "measure",
    "plan",
    "quantize",
    "set_compute",
    "verify",
]
