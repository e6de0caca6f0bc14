"""The kernel under test, and the checks of its outputs against float64."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor

from fewbits.kernels.base import Kernel
from fewbits.kernels.reference import Reference
from fewbits.kernels.weight_layouts import PackedInt32, WeightLayout
from fewbits.numerics.affine import decode, dynamic_scale, encode_input
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.layout import Layout
from fewbits.numerics.metrics import measure
from fewbits.numerics.params import QuantParams
from fewbits.numerics.quantize import quantize
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.testing.check import Contract, expect, for_all
from fewbits.testing.strategies import FLOATS

_OUTPUT = Contract("fewbits.extend.Kernel.linear", "(rows, outputs), in float32")
_NEAR = Contract("fewbits.testing.check_kernel", "times the sum of the magnitudes of the addends")
_WHOLE = Contract("fewbits.testing.check_kernel", "the output is exact")
_EXACT = Contract("fewbits.testing.check_kernel", "the bits of `fewbits.kernels.reference.Reference`")

LEVELS = (-1.0, -0.7, -0.5, -0.35, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)

#: Specs of the weights.
SPECS: tuple[QuantSpec, ...] = (
    QuantSpec(bits=8, granularity="tensor"),
    QuantSpec(bits=8, granularity="channel"),
    QuantSpec(bits=8, granularity="channel", symmetric=False),
    QuantSpec(bits=8, granularity="group", group_size=64),
    QuantSpec(bits=4, granularity="channel"),
    QuantSpec(bits=4, granularity="group", group_size=32),
    QuantSpec(bits=4, granularity="group", group_size=128, symmetric=False),
    QuantSpec(bits=6, granularity="group", group_size=64),
    QuantSpec(bits=4, granularity="group", group_size=64, levels=LEVELS),
    QuantSpec(bits=8, granularity="channel", activations="dynamic"),
    QuantSpec(bits=8, granularity="tensor", activations="dynamic"),
    QuantSpec(bits=8, granularity="channel", symmetric=False, activations="dynamic"),
    QuantSpec(bits=4, granularity="channel", activations="dynamic"),
    QuantSpec(bits=8, granularity="channel", activations="static"),
)

#: Dtypes of inputs.
INPUTS = (torch.float32, torch.bfloat16, torch.float16)

#: Dtypes of a weight and its input.
PAIRS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float16),
    (torch.float64, torch.float32),
)

#: Rows of inputs: many kernels accept only few or only many.
ROWS = (1, 7, 40, 200)

#: The largest relative error of one rounding to bfloat16.
_BF16 = torch.finfo(torch.bfloat16).eps / 2


@attrs.frozen
class KernelSetup:
    """A kernel to check. The checks use copies of `recipe`."""

    recipe: Kernel[Any]
    device: torch.device
    examples: int

    def make(self) -> Kernel[Any]:
        return copy.deepcopy(self.recipe)

    def specs(self) -> Iterator[QuantSpec]:
        """Yield the specs for this kernel; specs with int8 inputs only if the kernel rounds inputs."""
        follows = self.recipe.rounds_inputs or isinstance(self.recipe, Reference)
        return (spec for spec in SPECS if follows or spec.activations is None)

    def rounds(self, weight: WeightLayout) -> bool:
        """Whether the kernel rounds the inputs of a layer with this weight."""
        return self.recipe.rounds_inputs or weight.spec.activations is not None

    def weight(self, spec: QuantSpec, outputs: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> PackedInt32:
        """Make a weight from normally distributed values, as packed int32 words."""
        value = quantize(self.normal((outputs, inputs), dtype, seed), spec.weight_only())
        return PackedInt32.of_value(with_inputs(value, spec))

    def measured(
        self, spec: QuantSpec, outputs: int, inputs: int, dtype: torch.dtype, seed: int = 0
    ) -> tuple[PackedInt32, float]:
        """Make the same weight, and measure the SQNR of its codes in dB."""
        weight = self.weight(spec, outputs, inputs, dtype, seed)
        return weight, measure(self.normal((outputs, inputs), dtype, seed), weight.value(dtype)).sqnr_db

    def with_codes(self, codes: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None) -> PackedInt32:
        codes, scale = codes.to(self.device), scale.to(self.device)
        zero_point = None if zero_point is None else zero_point.to(self.device)
        layout, resolved = Layout.of(codes.shape), spec.weight_only()
        params = QuantParams(scale, zero_point)
        value = QuantizedTensor.from_codes(codes, params, spec=resolved, layout=layout, dtype=scale.dtype)
        return PackedInt32.of_value(with_inputs(value, spec))

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
        return torch.randn(shape, generator=generator(seed)).to(dtype).to(self.device)

    def packed(self, weight: PackedInt32) -> tuple[Kernel[Any], WeightLayout] | None:
        """Prepack a weight with a new kernel; None if the kernel refuses it."""
        kernel = self.make()
        return (kernel, kernel.prepack(weight)) if kernel.supports(weight) is None else None

    def computed(self, weight: PackedInt32, inputs: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every input that the kernel accepts, with its output."""
        packed = self.packed(weight)
        if packed is None:
            return
        for x in inputs:
            if packed[0].takes(x, x.shape[0]) is None:
                yield x, packed[0].linear(x, packed[1])


def any_size_is_computed(setup: KernelSetup) -> None:
    """Odd sizes, one row and many rows give outputs with the right shape, dtype and elements."""

    def right(
        spec: QuantSpec, dtype: torch.dtype, kind: torch.dtype, sizes: tuple[int, int], rows: int, seed: int
    ) -> None:
        weight = setup.weight(spec, *sizes, dtype, seed)
        _check_outputs(setup, weight, [setup.normal((rows, sizes[1]), kind, seed + 1)])

    size = st.sampled_from([1, 7, 33, 40, 64, 65, 129, 160, 200])
    drawn = st.sampled_from(FLOATS), st.sampled_from(INPUTS), st.tuples(size, size), st.sampled_from(ROWS)
    for spec in setup.specs():
        for_all(setup.examples, right, st.just(spec), *drawn, st.integers(0, 99))


def every_code_is_read_right(setup: KernelSetup) -> None:
    """An input with one power of two and zeros picks out codes, and each is exact."""
    for spec in setup.specs():
        for outputs, inputs in ((5, 33), (70, 160)):
            if spec.levels is None:
                weight = of_whole_numbers(setup, spec, outputs, inputs)
                if not setup.rounds(weight):
                    _check_picked(setup, weight)


def integer_sums_are_exact(setup: KernelSetup) -> None:
    """With int8 inputs, all codes, extremes included, give the bits of the reference."""
    for spec in setup.specs():
        for inputs in (1, 33, 1025, 4096):
            for dtype, kind in PAIRS:
                weight = of_extremes(setup, spec, inputs, dtype)
                if setup.rounds(weight):
                    _check_outputs(setup, weight, (extreme_inputs(setup, r, inputs).to(kind) for r in (3, 200)))


def in_parts(rows: int, x: Tensor) -> list[Tensor]:
    """Cut an input into parts of that many rows; zeros fill the last part."""
    parts = [x[start : start + rows] for start in range(0, x.shape[0], rows)]
    return [*parts[:-1], torch.cat([parts[-1], x.new_zeros(rows - parts[-1].shape[0], x.shape[1])])]


def _check_outputs(setup: KernelSetup, weight: PackedInt32, inputs: Iterable[Tensor]) -> None:
    for x, found in setup.computed(weight, inputs):
        check_result(setup, weight, x, found)


def check_result(setup: KernelSetup, weight: WeightLayout, x: Tensor, found: Tensor) -> None:
    """Check shape, dtype, and every element of an output."""
    what, shape = words(weight, x), (x.shape[0], weight.layout.rows)
    right = found.dtype in (torch.float32, x.dtype, torch.bfloat16) and found.device == x.device
    expect(
        right and tuple(found.shape) == shape,
        f"{what}: the output has shape {tuple(found.shape)} in {dtype_name(found.dtype)}",
        _OUTPUT,
    )
    rounds = setup.rounds(weight)
    if rounds and weight.spec.granularity != "group" and weight.spec.levels is None:
        reference = Reference().linear(x, as_dynamic(PackedInt32.of(weight)))
        same = torch.equal(found.to(x.dtype), reference)
        expect(same, f"{what}: the output differs from that of the reference", _EXACT)
        return
    expected, size = exact(weight, x, rounds=rounds)
    worst = float(((found.double() - expected).abs() - bound(size, x.shape[1], found.dtype, rounds=rounds)).amax())
    expect(worst <= 0, f"{what}: the error of an element exceeds the allowed rounding by {worst:.3g}", _NEAR)


def _check_picked(setup: KernelSetup, weight: PackedInt32) -> None:
    columns = weight.layout.columns
    powers = 2.0 ** torch.arange(-3, 4, device=setup.device).repeat(columns)[:columns]
    inputs = (x for rows in ROWS for x in in_parts(rows, torch.diag(powers)))
    for x, found in setup.computed(weight, inputs):
        expected, _ = exact(weight, x, rounds=False)
        same = torch.equal(found.double(), expected)
        expect(same, f"{words(weight, x)}: a code is read as another code", _WHOLE)


def with_inputs(value: QuantizedTensor, spec: QuantSpec) -> QuantizedTensor:
    """Return the same codes for a layer with the activations of `spec`."""
    scale = torch.tensor([0.02], device=value.scale.device) if spec.activations == "static" else None
    return attrs.evolve(value, spec=attrs.evolve(value.spec, activations=spec.activations), input_scale=scale)


def as_dynamic(weight: PackedInt32) -> PackedInt32:
    """Return the same codes for a layer that rounds its inputs."""
    if weight.spec.activations is not None:
        return weight
    return attrs.evolve(weight, spec=attrs.evolve(weight.spec, activations="dynamic"))


def decoded(weight: WeightLayout, codes: Tensor | None = None) -> Tensor:
    """Decode the codes of a weight, or other codes with its scales, to float64."""
    codes = weight.codes(slice(None)) if codes is None else codes
    return decode(codes, weight.params(slice(None)), weight.spec, torch.float64)


def exact(weight: WeightLayout, x: Tensor, *, rounds: bool) -> tuple[Tensor, Tensor]:
    """Compute the product in float64, and the sum of the magnitudes of its addends.

    Codes and zero points count as separate addends, because a kernel may sum them separately.
    """
    if rounds:
        wide = x.float()
        scale = dynamic_scale(wide, (-1,)) if weight.input_scale is None else weight.input_scale
        wide = encode_input(wide, scale).double() * scale.double()
    else:
        wide = x.double()
    dense = decoded(weight)
    none = torch.full_like(weight.codes(slice(None)), -weight.spec.code_min)
    offset = torch.zeros_like(dense) if weight.zero_point is None else decoded(weight, none)
    magnitudes = (dense - offset).abs() + offset.abs()
    return wide @ dense.t(), wide.abs() @ magnitudes.t()


def bound(size: Tensor, inputs: int, dtype: torch.dtype, *, rounds: bool) -> Tensor:
    """Bound the error of each element by its sum of magnitudes, `size`, as `check_kernel` documents."""
    if rounds:
        # Sums of at least 16 inputs in int8 are exact.
        share = torch.finfo(dtype).eps / 2 + (4 + inputs / 16) * 2.0**-24
    else:
        share = (1 + _BF16) ** 4 - 1 + inputs * 2.0**-23
    return size * share + torch.finfo(dtype).tiny


def of_whole_numbers(setup: KernelSetup, spec: QuantSpec, outputs: int, inputs: int) -> PackedInt32:
    """Make a weight of random codes and zero points, with scales that are powers of two of both signs."""
    shape, draws = spec.scale_shape(outputs, inputs), generator(2)
    scale = 2.0 ** torch.randint(-7, 3, shape, generator=draws) * (1 - 2 * torch.randint(2, shape, generator=draws))
    codes = any_codes((outputs, inputs), spec, draws)
    zero_point = None if spec.symmetric else any_codes(shape, spec, draws)
    return setup.with_codes(codes, spec, scale, zero_point)


def of_extremes(setup: KernelSetup, spec: QuantSpec, inputs: int, dtype: torch.dtype) -> PackedInt32:
    """Make a weight with rows of the least code, the largest code, and random codes; zero points are the largest."""
    codes = any_codes((40, inputs), spec, generator(3))
    codes[::4], codes[1::4] = spec.code_min, spec.code_max
    shape = spec.scale_shape(*codes.shape)
    scale = torch.rand(shape, generator=generator(4)).add_(0.1).to(dtype)
    zero_point = None if spec.symmetric else torch.full(shape, spec.code_max, dtype=torch.int32)
    return setup.with_codes(codes, spec, scale, zero_point)


def extreme_inputs(setup: KernelSetup, rows: int, inputs: int) -> Tensor:
    """Make rows at the lower end of int8, at the upper end, and random rows."""
    x = setup.normal((rows, inputs), torch.float32, 4)
    x[0], x[1] = 2.0, -2.0
    x[rows // 2 + 1] = -3.0
    return x


def any_codes(shape: tuple[int, ...], spec: QuantSpec, draws: torch.Generator) -> Tensor:
    """Draw codes from the whole range."""
    return torch.randint(spec.code_min, spec.code_max + 1, shape, generator=draws, dtype=torch.int16)


def generator(seed: int) -> torch.Generator:
    """Make a generator of the same numbers on every machine."""
    return torch.Generator().manual_seed(seed)


def words(weight: WeightLayout, x: Tensor) -> str:
    """Describe a weight and an input, for messages."""
    return f"{weight.spec}, {weight.layout.shape}, input {tuple(x.shape)} in {dtype_name(x.dtype)}"
