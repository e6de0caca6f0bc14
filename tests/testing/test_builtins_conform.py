"""The built-in strategies pass the conformance kit."""

import pytest
import torch
from hypothesis import settings
from torch import nn

from fewbits import (
    FP16Cast,
    HistogramObserver,
    Int4Grouped,
    Int8PerChannel,
    Int8PerTensor,
    LayerSelector,
    MinMaxObserver,
    MSEObserver,
    PercentileObserver,
    QuantSpec,
)
from fewbits.extend import BytePairs, MovingAverageMinMaxObserver, SafetensorsSerializer
from fewbits.kernels import features
from fewbits.kernels.choose import KERNELS
from fewbits.kernels.int8_rows import Int8Rows
from fewbits.kernels.weight_layouts import PackedInt32
from fewbits.numerics.dtypes import POWERS_OF_TWO
from fewbits.numerics.quantize import quantize
from fewbits.observers import OBSERVERS
from fewbits.rounding import ROUNDINGS
from fewbits.schemes import (
    SCHEMES,
    FP8PerChannel,
    Int2Grouped,
    Int3Grouped,
    Int5Grouped,
    Int6Grouped,
    Int7Grouped,
    LevelsGrouped,
    MXFP4Grouped,
    NF4Grouped,
    fit_levels,
)
from fewbits.testing import (
    SmallModel,
    check_kernel,
    check_observer,
    check_quantizer,
    check_rounding,
    check_selector,
    check_serializer,
)

#: Examples of the checks that take longest; in `make test-all` as many as an author gets.
EXAMPLES = min(10, settings.default.max_examples // 6)
FITTED = fit_levels([torch.randn(64, 64, generator=torch.Generator().manual_seed(0))], bits=3, group_size=16)
SUBJECTS = {
    "int8-tensor": check_quantizer(Int8PerTensor()),
    "int8": check_quantizer(Int8PerChannel()),
    "int8-dynamic": check_quantizer(Int8PerChannel(activations="dynamic")),
    "int8-static": check_quantizer(Int8PerTensor(activations="static")),
    "int4": check_quantizer(Int4Grouped()),
    "int4-asymmetric": check_quantizer(Int4Grouped(32, symmetric=False, observer=MSEObserver(), ragged="shorter")),
    "nf4": check_quantizer(NF4Grouped(), max_examples=EXAMPLES),
    "fp8": check_quantizer(FP8PerChannel(), max_examples=EXAMPLES),
    "mxfp4": [] if POWERS_OF_TWO is None else check_quantizer(MXFP4Grouped(), max_examples=EXAMPLES),
    **{
        cls.name: check_quantizer(cls(), max_examples=EXAMPLES)
        for cls in (Int2Grouped, Int3Grouped, Int5Grouped, Int6Grouped, Int7Grouped)
    },
    "fitted": check_quantizer(LevelsGrouped(FITTED, 16, ragged="shorter"), max_examples=EXAMPLES),
    "fp16": check_quantizer(FP16Cast()),
    "minmax": check_observer(MinMaxObserver()),
    "moving-average": check_observer(MovingAverageMinMaxObserver()),
    "histogram": check_observer(HistogramObserver(), max_examples=EXAMPLES),
    "percentile": check_observer(PercentileObserver()),
    "percentile-90": check_observer(PercentileObserver(90.0)),
    "mse": check_observer(MSEObserver(), max_examples=EXAMPLES),
    **{name: check_rounding(cls(), max_examples=EXAMPLES) for name, cls in ROUNDINGS.items()},
    "selector": check_selector(LayerSelector()),
    "selector-with-rules": check_selector(
        LayerSelector(include=["up"], exclude_types=[nn.LayerNorm], overrides={"down": {"group_size": 16}}),
    ),
    "selector-of-a-model": check_selector(LayerSelector(exclude=["0.norm"]), model=nn.Sequential(SmallModel())),
    "safetensors": check_serializer(SafetensorsSerializer(), suffix=".safetensors"),
}

CASES = [pytest.param(check, id=f"{subject}-{check}") for subject, found in SUBJECTS.items() for check in found]


@pytest.mark.parametrize("check", CASES)
def test_it_conforms(check):
    check()


#: With and without instructions for bfloat16, where the results differ.
BF16 = dict.fromkeys(("byte_blocks", "pair_blocks", "tile_blocks", "word_blocks"), (True, False))
KERNEL_CHECKS = [
    pytest.param(
        kernel,
        check,
        bf16,
        id=f"{kernel.name}-{'bf16' if bf16 else 'float32'}-{check}",
        marks=[pytest.mark.slow] if not bf16 and True in BF16[kernel.name] else [],
    )
    for kernel in KERNELS
    for bf16 in BF16.get(kernel.name, (True,))
    for check in check_kernel(kernel, max_examples=EXAMPLES)
]


#: A spec that a layout holds.
SIMPLE = {
    Int8Rows: QuantSpec(bits=8, granularity="channel"),
    BytePairs: FP8PerChannel.spec,
}


def absent(kernel):
    """The feature that this CPU or torch lacks for a kernel; None if it has all."""
    spec = SIMPLE.get(kernel.weight_layout, QuantSpec(bits=4, granularity="channel"))
    why = kernel.supports(PackedInt32.of_value(quantize(torch.ones(64, 64), spec)))
    lacking = features.NO_TILES, features.NO_BYTES, features.INEXACT, "_int_mm is slow on a CPU without VNNI"
    return why if why in lacking else None


@pytest.mark.parametrize(("kernel", "check", "bf16"), KERNEL_CHECKS)
def test_a_kernel_conforms(kernel, check, bf16, monkeypatch):
    if why := absent(kernel):
        pytest.skip(why)
    monkeypatch.setattr(features, "has_bf16", lambda: bf16)
    check()


def test_every_scheme_and_observer_is_checked():
    assert SUBJECTS.keys() >= SCHEMES.keys() | OBSERVERS.keys()


def test_every_cpu_has_a_kernel_for_every_weight_layout():
    assert [kernel.weight_layout.__name__ for kernel in KERNELS if absent(kernel) is None][-1] == "WeightLayout"
    assert {"byte_blocks", "word_blocks", "float_sums"} <= {kernel.name for kernel in KERNELS if absent(kernel) is None}
