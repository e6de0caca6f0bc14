"""What comes with the library passes the kit that outside authors are given."""

import pytest
from torch import nn

from fewbits import (
    FP16Cast,
    HistogramObserver,
    Int4Grouped,
    Int8PerChannel,
    Int8PerTensor,
    LayerSelector,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MSEObserver,
    PercentileObserver,
    SafetensorsSerializer,
)
from fewbits.kernels.reference import Reference
from fewbits.observers import OBSERVERS
from fewbits.quantizers.schemes import SCHEMES
from fewbits.testing import (
    SmallModel,
    check_kernel,
    check_observer,
    check_quantizer,
    check_selector,
    check_serializer,
)

SUBJECTS = {
    "int8-tensor": check_quantizer(Int8PerTensor()),
    "int8": check_quantizer(Int8PerChannel()),
    "int8-dynamic": check_quantizer(Int8PerChannel(activations="dynamic")),
    "int8-static": check_quantizer(Int8PerTensor(activations="static")),
    "int4": check_quantizer(Int4Grouped()),
    "int4-asymmetric": check_quantizer(Int4Grouped(32, symmetric=False, observer=MSEObserver(), ragged="shorter")),
    "fp16": check_quantizer(FP16Cast()),
    "minmax": check_observer(MinMaxObserver()),
    "moving-average": check_observer(MovingAverageMinMaxObserver()),
    "histogram": check_observer(HistogramObserver()),
    "percentile": check_observer(PercentileObserver()),
    "percentile-90": check_observer(PercentileObserver(90.0)),
    "mse": check_observer(MSEObserver()),
    "selector": check_selector(LayerSelector()),
    "selector-with-rules": check_selector(
        LayerSelector(include=["up"], exclude_types=[nn.LayerNorm], overrides={"down": {"group_size": 16}}),
    ),
    "selector-of-a-model": check_selector(LayerSelector(exclude=["0.norm"]), model=nn.Sequential(SmallModel())),
    "safetensors": check_serializer(SafetensorsSerializer(), suffix=".safetensors"),
    "reference": check_kernel(Reference()),
}

CASES = [pytest.param(check, id=f"{subject}-{check}") for subject, found in SUBJECTS.items() for check in found]


@pytest.mark.parametrize("check", CASES)
def test_it_conforms(check):
    check()


def test_no_scheme_and_no_observer_is_left_out():
    assert SUBJECTS.keys() >= SCHEMES.keys() | OBSERVERS.keys()
