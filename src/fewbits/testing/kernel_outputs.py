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
from fewbits.numerics.quantize import quantize
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.testing.check import Contract, expect, for_all
from fewbits.testing.strategies import FLOATS

_OUTPUT = Contract("fewbits.extend.Kernel.linear", "(rows, outputs), in float32")
_NEAR = Contract("fewbits.testing.check_kernel", "times the sum of the magnitudes that are added up")
_WHOLE = Contract("fewbits.testing.check_kernel", "the output is exact")
_EXACT = Contract("fewbits.testing.check_kernel", "the bits of `fewbits.kernels.reference.Reference`")
LEVELS = (-1.0, -0.7, -0.5, -0.35, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)

#: The specs of the weights that a kernel is tried on.
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

#: What an input can be.
INPUTS = (torch.float32, torch.bfloat16, torch.float16)

#: Dtypes of a weight and of an input.
PAIRS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float16),
    (torch.float64, torch.float32),
)

#: How many rows a kernel is asked to compute at a time: many kernels are made for few, or for many.
ROWS = (1, 7, 40, 200)

#: What a rounding to bfloat16 takes away at most, as a share of a number.
_BF16 = torch.finfo(torch.bfloat16).eps / 2


@attrs.frozen
class KernelSetup:
    """A kernel to check.

    Attributes:
        recipe: the kernel that was given; never used itself.
        device: where weights and inputs are.
        examples: how many a check that draws them looks at.
    """

    recipe: Kernel[Any]
    device: torch.device
    examples: int

    def make(self) -> Kernel[Any]:
        """A kernel."""
        return copy.deepcopy(self.recipe)

    def specs(self) -> Iterator[QuantSpec]:
        """Those that a layer would ask this kernel about: of layers with int8 inputs, only if it rounds them."""
        follows = self.recipe.rounds_inputs or isinstance(self.recipe, Reference)
        return (spec for spec in SPECS if follows or spec.activations is None)

    def rounds(self, weight: WeightLayout) -> bool:
        """Whether it rounds inputs of a layer with this weight."""
        return self.recipe.rounds_inputs or weight.spec.activations is not None

    def weight(self, spec: QuantSpec, outputs: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> PackedInt32:
        """A weight with normally distributed values, in the canonical form."""
        value = quantize(self.normal((outputs, inputs), dtype, seed), spec.weight_only())
        return PackedInt32.of_value(with_inputs(value, spec))

    def measured(
        self, spec: QuantSpec, outputs: int, inputs: int, dtype: torch.dtype, seed: int = 0
    ) -> tuple[PackedInt32, float]:
        """The same, with the SQNR of its codes in dB."""
        weight = self.normal((outputs, inputs), dtype, seed)
        value = quantize(weight, spec.weight_only())
        return PackedInt32.of_value(with_inputs(value, spec)), measure(weight, value).sqnr_db

    def with_codes(self, codes: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None) -> PackedInt32:
        """A weight with these codes."""
        codes, scale = codes.to(self.device), scale.to(self.device)
        zero_point = None if zero_point is None else zero_point.to(self.device)
        layout, resolved = Layout.of(codes.shape), spec.weight_only()
        value = QuantizedTensor.from_codes(codes, scale, zero_point, spec=resolved, layout=layout, dtype=scale.dtype)
        return PackedInt32.of_value(with_inputs(value, spec))

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
        """Numbers from a normal distribution."""
        return torch.randn(shape, generator=generator(seed)).to(dtype).to(self.device)

    def packed(self, weight: PackedInt32) -> tuple[Kernel[Any], WeightLayout] | None:
        """A kernel, and the weight in its form; None if it cannot compute with it."""
        kernel = self.make()
        return (kernel, kernel.prepack(weight)) if kernel.supports(weight) is None else None

    def computed(self, weight: PackedInt32, inputs: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Every input that a kernel computes with, and what it makes of it."""
        packed = self.packed(weight)
        for x in inputs if packed is not None else ():
            if packed is not None and packed[0].takes(x, x.shape[0]) is None:
                yield x, packed[0].linear(x, packed[1])


def any_size_is_computed(setup: KernelSetup) -> None:
    """Odd sizes, one row and many: shape, dtype and every element are right."""

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
    """An input that is zero but for one power of two picks out codes; each is there, exactly."""
    for spec in setup.specs():
        for outputs, inputs in ((5, 33), (70, 160)):
            if spec.levels is None:
                weight = of_whole_numbers(setup, spec, outputs, inputs)
                if not setup.rounds(weight):
                    _check_picked(setup, weight)


def integer_sums_are_exact(setup: KernelSetup) -> None:
    """With int8 inputs, codes at both ends of their range and everywhere else give the bits of the reference."""
    for spec in setup.specs():
        for inputs in (1, 33, 1025, 4096):
            for dtype, kind in PAIRS:
                weight = of_extremes(setup, spec, inputs, dtype)
                if setup.rounds(weight):
                    _check_outputs(setup, weight, (extreme_inputs(setup, r, inputs).to(kind) for r in (3, 200)))


def in_parts(rows: int, x: Tensor) -> list[Tensor]:
    """An input in parts of that many rows; the last is filled up with zeros."""
    parts = [x[start : start + rows] for start in range(0, x.shape[0], rows)]
    return [*parts[:-1], torch.cat([parts[-1], x.new_zeros(rows - parts[-1].shape[0], x.shape[1])])]


def _check_outputs(setup: KernelSetup, weight: PackedInt32, inputs: Iterable[Tensor]) -> None:
    for x, found in setup.computed(weight, inputs):
        check_result(setup, weight, x, found)


def check_result(setup: KernelSetup, weight: WeightLayout, x: Tensor, found: Tensor) -> None:
    """Shape, dtype, and every element."""
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
        expect(same, f"{what}: the output has other bits than the reference", _EXACT)
        return
    expected, size = exact(weight, x, rounds=rounds)
    worst = float(((found.double() - expected).abs() - bound(size, x.shape[1], found.dtype, rounds=rounds)).amax())
    expect(worst <= 0, f"{what}: an element is off by {worst:.3g} more than rounding allows", _NEAR)


def _check_picked(setup: KernelSetup, weight: PackedInt32) -> None:
    columns = weight.layout.columns
    powers = 2.0 ** torch.arange(-3, 4, device=setup.device).repeat(columns)[:columns]
    inputs = (x for rows in ROWS for x in in_parts(rows, torch.diag(powers)))
    for x, found in setup.computed(weight, inputs):
        expected, _ = exact(weight, x, rounds=False)
        same = torch.equal(found.double(), expected)
        expect(same, f"{words(weight, x)}: a code is taken for another", _WHOLE)


def with_inputs(value: QuantizedTensor, spec: QuantSpec) -> QuantizedTensor:
    """The same codes for a layer that rounds its inputs as `spec` says."""
    scale = torch.tensor([0.02], device=value.scale.device) if spec.activations == "static" else None
    return attrs.evolve(value, spec=attrs.evolve(value.spec, activations=spec.activations), input_scale=scale)


def as_dynamic(weight: PackedInt32) -> PackedInt32:
    """The same codes for a layer that rounds its inputs, if it did not anyway."""
    if weight.spec.activations is not None:
        return weight
    return attrs.evolve(weight, spec=attrs.evolve(weight.spec, activations="dynamic"))


def decoded(weight: WeightLayout, codes: Tensor | None = None) -> Tensor:
    """What the codes of a weight, or others in their place, stand for: float64."""
    scale, zero_point = weight.params(slice(None))
    codes = weight.codes(slice(None)) if codes is None else codes
    return decode(codes, scale, zero_point, weight.spec, torch.float64)


def exact(weight: WeightLayout, x: Tensor, *, rounds: bool) -> tuple[Tensor, Tensor]:
    """The product in float64, and the sum of the magnitudes that are added up.

    Codes and zero points count as added up each for itself: a kernel may sum over them apart.
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
    """How far an element may be off: see `fewbits.testing.check_kernel`.

    Args:
        size: the sums of magnitudes.
        inputs: how many of them were added up.
        dtype: of the output.
        rounds: whether inputs were rounded to int8: their sums are exact then, for 16 inputs at least.
    """
    if rounds:
        share = torch.finfo(dtype).eps / 2 + (4 + inputs / 16) * 2.0**-24
    else:
        share = (1 + _BF16) ** 4 - 1 + inputs * 2.0**-23
    return size * share + torch.finfo(dtype).tiny


def of_whole_numbers(setup: KernelSetup, spec: QuantSpec, outputs: int, inputs: int) -> PackedInt32:
    """Any codes, with scales that are powers of two, of both signs, and any zero points."""
    shape, draws = spec.scale_shape(outputs, inputs), generator(2)
    scale = 2.0 ** torch.randint(-7, 3, shape, generator=draws) * (1 - 2 * torch.randint(2, shape, generator=draws))
    codes = any_codes((outputs, inputs), spec, draws)
    zero_point = None if spec.symmetric else any_codes(shape, spec, draws)
    return setup.with_codes(codes, spec, scale, zero_point)


def of_extremes(setup: KernelSetup, spec: QuantSpec, inputs: int, dtype: torch.dtype) -> PackedInt32:
    """Rows with all codes at one end of their range, at the other, and any; zero points at the far end."""
    codes = any_codes((40, inputs), spec, generator(3))
    codes[::4], codes[1::4] = spec.code_min, spec.code_max
    shape = spec.scale_shape(*codes.shape)
    scale = torch.rand(shape, generator=generator(4)).add_(0.1).to(dtype)
    zero_point = None if spec.symmetric else torch.full(shape, spec.code_max, dtype=torch.int32)
    return setup.with_codes(codes, spec, scale, zero_point)


def extreme_inputs(setup: KernelSetup, rows: int, inputs: int) -> Tensor:
    """Rows at one end of the range of int8, at the other, and anything."""
    x = setup.normal((rows, inputs), torch.float32, 4)
    x[0], x[1] = 2.0, -2.0
    x[rows // 2 + 1] = -3.0
    return x


def any_codes(shape: tuple[int, ...], spec: QuantSpec, draws: torch.Generator) -> Tensor:
    """Codes of the whole range."""
    return torch.randint(spec.code_min, spec.code_max + 1, shape, generator=draws, dtype=torch.int16)


def generator(seed: int) -> torch.Generator:
    """Of the same numbers everywhere."""
    return torch.Generator().manual_seed(seed)


def words(weight: WeightLayout, x: Tensor) -> str:
    """A weight and an input, for messages."""
    return f"{weight.spec}, {weight.layout.shape}, input {tuple(x.shape)} in {dtype_name(x.dtype)}"


OUTPUT_CHECKS = (
    any_size_is_computed,
    every_code_is_read_right,
    integer_sums_are_exact,
)
