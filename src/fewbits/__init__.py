"""fewbits makes any PyTorch model or checkpoint smaller, accounts for every tensor, and checks its own output.

>>> import torch, fewbits
>>> result = fewbits.quantize(torch.nn.Linear(256, 64), "int8")
>>> result.report.ok, result.ledger["weight"].fate, result.ledger["bias"].reason
(True, 'quantized', 'a bias is never quantized')
"""

from fewbits import errors, extend
from fewbits._version import __version__
from fewbits.api import Plan, Result, plan, quantize, verify
from fewbits.calibration.tuning import tune
from fewbits.checkpoint.output import Output
from fewbits.config.config import QuantizationConfig
from fewbits.conversion.exporting import convert
from fewbits.errors import FewbitsError
from fewbits.fleet import FleetRun
from fewbits.formats.loading import load
from fewbits.nn.computing import set_compute
from fewbits.nn.explain import explain
from fewbits.nn.swap import dequantize
from fewbits.numerics.metrics import Measurement, measure
from fewbits.numerics.spec import CastSpec, QuantSpec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.observers.histogram import HistogramObserver
from fewbits.observers.min_max import MinMaxObserver
from fewbits.observers.mse import MSEObserver
from fewbits.observers.percentile import PercentileObserver
from fewbits.planning.allocate import allocate
from fewbits.quantizers.base import Quantizer
from fewbits.quantizers.lifecycle import State
from fewbits.quantizers.schemes import FP16Cast, Int4Grouped, Int8PerChannel, Int8PerTensor
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow
from fewbits.selection.rules import Override
from fewbits.selection.selector import LayerSelector
from fewbits.validation.report import Report
from fewbits.validation.tensors import TensorReport

__all__ = [
    "CastSpec",
    "FP16Cast",
    "FewbitsError",
    "FleetRun",
    "HistogramObserver",
    "Int4Grouped",
    "Int8PerChannel",
    "Int8PerTensor",
    "LayerSelector",
    "Ledger",
    "LedgerRow",
    "MSEObserver",
    "Measurement",
    "MinMaxObserver",
    "Output",
    "Override",
    "PercentileObserver",
    "Plan",
    "QuantSpec",
    "QuantizationConfig",
    "QuantizedTensor",
    "Quantizer",
    "Report",
    "Result",
    "State",
    "TensorReport",
    "__version__",
    "allocate",
    "convert",
    "dequantize",
    "errors",
    "explain",
    "extend",
    "load",
    "measure",
    "plan",
    "quantize",
    "set_compute",
    "tune",
    "verify",
]
