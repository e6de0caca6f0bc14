"""The kernel under test, and the checks of its outputs against float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor

from fewbits.kernels.base import Kernel
from fewbits.kernels.reference import Reference
from fewbits.kernels.weight_layouts import PackedInt32, WeightLayout
from fewbits.numerics.affine import decode, encode_input
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.layout import Layout
from fewbits.numerics.levels import E4M3
from fewbits.numerics.params import QuantParams, group_scales
from fewbits.numerics.quantize import quantize
from fewbits.numerics.scales import dynamic_scale
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.testing.check import Setup, expect, for_all
from fewbits.testing.strategies import FLOATS

LEVELS = (-1.0, -0.7, -0.5, -0.35, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)

_WHOLE_ROWS = (
    QuantSpec(bits=8, granularity="tensor"),
    QuantSpec(bits=8, granularity="channel"),
    QuantSpec(bits=8, granularity="channel", symmetric=False),
    QuantSpec(bits=4, granularity="channel"),
)

#: Specs of the weights.
SPECS: tuple[QuantSpec, ...] = (
    *_WHOLE_ROWS,
    QuantSpec(bits=8, granularity="group", group_size=64),
    QuantSpec(bits=4, granularity="group", group_size=32),
    QuantSpec(bits=4, granularity="group", group_size=32, scale_bits=6),
    QuantSpec(bits=4, granularity="group", group_size=128, symmetric=False),
    QuantSpec(bits=6, granularity="group", group_size=64),
    QuantSpec(bits=4, granularity="group", group_size=64, levels=LEVELS),
    QuantSpec(bits=3, granularity="group", group_size=32, scale_bits=5, symmetric=False),
    QuantSpec(bits=8, granularity="channel", levels=E4M3),
    *(attrs.evolve(spec, activations="dynamic") for spec in _WHOLE_ROWS),
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

#: A kernel, and a weight in the layout that it reads.
Layer = tuple[Kernel[Any], WeightLayout]


@attrs.frozen
class KernelSetup(Setup[Kernel[Any]]):
    """A kernel to check.

    Attributes:
        device: The device of weights and inputs.
    """

    device: torch.device

    def specs(self) -> Iterator[QuantSpec]:
        """Yield the specs for this kernel; specs with int8 inputs only if the kernel rounds inputs."""
        follows = self.recipe.rounds_inputs or isinstance(self.recipe, Reference)
        return (spec for spec in SPECS if follows or spec.activations is None)

    def rounds(self, spec: QuantSpec) -> bool:
        """Whether the kernel rounds the inputs of a layer with a weight of this spec."""
        return self.recipe.rounds_inputs or spec.activations is not None

    def weight(self, spec: QuantSpec, outputs: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> PackedInt32:
        """Make a weight from normally distributed values, as packed int32 words."""
        value = quantize(self.normal((outputs, inputs), dtype, seed), spec.weight_only())
        return PackedInt32.of_value(with_inputs(value, spec))

    def weight_of_codes(self, spec: QuantSpec, outputs: int, inputs: int) -> PackedInt32:
        """Make a weight with rows of the least code, rows of the largest code, and rows of random codes.

        The scales are powers of two of both signs. With two levels of scales, those of the rows are powers of two.
        """
        draws, shape = generator(2), spec.scale_shape(outputs, inputs)
        scale = 2.0 ** torch.randint(-7, 3, shape, generator=draws) * (1 - 2 * torch.randint(2, shape, generator=draws))
        codes = any_codes((outputs, inputs), spec, draws)
        codes[::4], codes[1::4] = spec.code_min, spec.code_max
        zero_point = None if spec.symmetric else any_codes(shape, spec, draws).to(self.device)
        if zero_point is not None:
            zero_point[::4] = spec.code_max
        row_scale = None
        if spec.scale_bits is not None:
            row_scale = scale[:, :1].abs().to(self.device)
            parts = torch.randint(1, spec.scale_parts + 1, shape, generator=draws)
            scale = group_scales(row_scale, parts.to(self.device) * (scale.sign() if spec.symmetric else 1), spec)
        params = QuantParams(scale.to(self.device), zero_point, row_scale)
        value = QuantizedTensor.from_codes(
            codes.to(self.device), params, spec=spec.weight_only(), layout=Layout.of(codes.shape), dtype=scale.dtype
        )
        return PackedInt32.of_value(with_inputs(value, spec))

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
        """Draw numbers from a normal distribution."""
        return torch.randn(shape, generator=generator(seed)).to(dtype).to(self.device)

    def weights(self, sizes: list[tuple[int, int]]) -> Iterator[PackedInt32]:
        """Make weights of all specs and dtypes in these sizes, (outputs, inputs)."""
        for spec in self.specs():
            for dtype in FLOATS:
                yield from (self.weight(spec, outputs, inputs, dtype) for outputs, inputs in sizes)

    def packed(self, weight: PackedInt32) -> Layer | None:
        """Prepack a weight with a new kernel; None if the kernel refuses it."""
        kernel = self.make()
        return (kernel, kernel.prepack(weight)) if accepts(kernel.supports(weight), "supports", weight) else None

    def layers(self, outputs: int, inputs: int) -> Iterator[tuple[PackedInt32, torch.dtype, Layer]]:
        """Yield every weight of this size that the kernel accepts, the dtype of its inputs, and the layer."""
        for spec in self.specs():
            for dtype, kind in PAIRS:
                weight = self.weight(spec, outputs, inputs, dtype)
                layer = self.packed(weight)
                if layer is not None:
                    yield weight, kind, layer


def accepts(why: object, call: str, weight: WeightLayout) -> bool:
    """Tell whether the answer of a kernel is None. Another answer must be a reason."""
    is_reason = isinstance(why, str) and why.strip() != ""
    expect(why is None or is_reason, f"for {weight.spec} {call}() returns {why!r}, neither None nor a reason")
    return why is None


def takes(layer: Layer, x: Tensor) -> bool:
    """Tell whether a kernel computes with an input."""
    kernel, weight = layer
    return accepts(kernel.takes(x, x.shape[0], weight), "takes", weight)


def computed(layer: Layer | None, inputs: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return every input that a kernel accepts, with its output; once more with the output that is traced."""
    if layer is None:
        return []
    (kernel, weight), taken = layer, [x for x in inputs if takes(layer, x)]
    traced = [x for x in taken if x.shape[0] <= kernel.traced_rows(weight)]
    return [(x, kernel.linear(x, weight)) for x in taken] + [(x, kernel.traced(x, weight)) for x in traced]


def any_size_is_computed(setup: KernelSetup) -> None:
    """For any size, the output of `Kernel.linear`, and of `Kernel.traced`, has the right shape, dtype and elements."""

    def right(spec: QuantSpec, dtype: torch.dtype, kind: torch.dtype, sizes: tuple[int, int, int], seed: int) -> None:
        outputs, inputs, rows = sizes
        weight = setup.weight(spec, outputs, inputs, dtype, seed)
        x = setup.normal((rows, inputs), kind, seed + 1)
        check_outputs(setup, weight, computed(setup.packed(weight), [x]))

    size = st.sampled_from([1, 7, 33, 40, 64, 65, 129, 160, 200])
    sizes = st.tuples(size, size, st.sampled_from(ROWS))
    for spec in setup.specs():
        drawn = st.just(spec), st.sampled_from(FLOATS), st.sampled_from(INPUTS), sizes, st.integers(0, 99)
        for_all(setup.examples, right, *drawn)


def every_code_is_read_right(setup: KernelSetup) -> None:
    """An input with one power of two and zeros picks out codes, and the output is exact."""
    simple = [spec for spec in setup.specs() if spec.levels is None and not setup.rounds(spec)]
    for spec in simple:
        for outputs, inputs in ((5, 33), (70, 160)):
            weight = setup.weight_of_codes(spec, outputs, inputs)
            dense = decoded(weight).t()
            picks = torch.diag(2.0 ** torch.arange(-3, 4, device=setup.device).repeat(inputs)[:inputs])
            for x, found in computed(setup.packed(weight), (x for rows in ROWS for x in in_parts(rows, picks))):
                same = torch.equal(found.double(), x.double() @ dense)
                expect(same, f"{words(weight, x)}: a code is read as another code")


def in_parts(rows: int, x: Tensor) -> list[Tensor]:
    """Cut an input into parts of that many rows; zeros fill the last part."""
    parts = [x[start : start + rows] for start in range(0, x.shape[0], rows)]
    return [*parts[:-1], torch.cat([parts[-1], x.new_zeros(rows - parts[-1].shape[0], x.shape[1])])]


def check_outputs(setup: KernelSetup, weight: WeightLayout, outputs: list[tuple[Tensor, Tensor]]) -> None:
    """Check shape, dtype, and every element of some outputs.

    Args:
        setup: The kernel under test.
        weight: The weight, in any layout.
        outputs: Inputs of one dtype, with their outputs.
    """
    for x, output in outputs:
        right = output.dtype in (torch.float32, x.dtype, torch.bfloat16) and output.device == x.device
        expect(
            right and tuple(output.shape) == (x.shape[0], weight.layout.rows),
            f"{words(weight, x)}: the output has shape {tuple(output.shape)} in {dtype_name(output.dtype)}",
        )
    for dtype in dict.fromkeys(output.dtype for _, output in outputs):
        _check_elements(setup, weight, [pair for pair in outputs if pair[1].dtype == dtype])


def _check_elements(setup: KernelSetup, weight: WeightLayout, outputs: list[tuple[Tensor, Tensor]]) -> None:
    # One comparison for all, because decoding the weight takes longer than most products.
    x, found = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    what, rounds = words(weight, x), setup.rounds(weight.spec)
    if rounds and weight.spec.granularity != "group" and weight.spec.levels is None:
        reference = Reference().linear(x, as_dynamic(PackedInt32.of(weight)))
        expect(torch.equal(found.to(x.dtype), reference), f"{what}: the output differs from that of the reference")
        return
    expected, size = exact(weight, x, rounds=rounds)
    precision = torch.finfo(found.dtype)
    # Sums of at least 16 inputs in int8 are exact.
    rounded_inputs = precision.eps / 2 + (4 + x.shape[1] / 16) * 2.0**-24
    share = rounded_inputs if rounds else (1 + _BF16) ** 4 - 1 + x.shape[1] * 2.0**-23
    allowed = size * share + precision.tiny
    if setup.recipe.rounds_weights:
        allowed += as_multiplied(weight, x, rounds=rounds).abs().sum(1, keepdim=True) * _half_steps(weight)
    worst = float(((found.double() - expected).abs() - allowed).amax())
    expect(worst <= 0, f"{what}: the error of an element exceeds the allowed rounding by {worst:.3g}")


def _half_steps(weight: WeightLayout) -> Tensor:
    """Return half the distance of int8 codes that span the range of a row: float64, (rows,)."""
    spec, zeros = weight.spec, torch.zeros_like(weight.codes(slice(None)))
    ends = [decoded(weight, zeros + code).abs().amax(1) for code in (0, spec.code_max - spec.code_min)]
    return torch.maximum(*ends) / 127 * (0.5 + 2.0**-16)


def with_inputs(value: QuantizedTensor, spec: QuantSpec) -> QuantizedTensor:
    """Return the same codes for a layer with the activations of `spec`."""
    scale = torch.tensor([0.02], device=value.scale.device) if spec.activations == "static" else None
    return attrs.evolve(value, spec=attrs.evolve(value.spec, activations=spec.activations), input_scale=scale)


def as_dynamic(weight: PackedInt32) -> PackedInt32:
    """Return the same codes for a layer that rounds its inputs."""
    activations = weight.spec.activations or "dynamic"
    return attrs.evolve(weight, spec=attrs.evolve(weight.spec, activations=activations))


def decoded(weight: WeightLayout, codes: Tensor | None = None) -> Tensor:
    """Decode the codes of a weight, or other codes with its scales, to float64."""
    codes = weight.codes(slice(None)) if codes is None else codes
    return decode(codes, weight.params(slice(None)), weight.spec, torch.float64)


def as_multiplied(weight: WeightLayout, x: Tensor, *, rounds: bool) -> Tensor:
    """Return an input in float64, rounded to int8 where a kernel rounds it."""
    if not rounds:
        return x.double()
    scale = dynamic_scale(x.float(), (-1,)) if weight.input_scale is None else weight.input_scale
    return encode_input(x.float(), scale).double() * scale.double()


def exact(weight: WeightLayout, x: Tensor, *, rounds: bool) -> tuple[Tensor, Tensor]:
    """Compute the product in float64, and the sum of the magnitudes of its addends.

    Codes and zero points count as separate addends, because a kernel may sum them separately.
    """
    wide, dense = as_multiplied(weight, x, rounds=rounds), decoded(weight)
    magnitudes = dense.abs()
    if weight.zero_point is not None:
        offset = decoded(weight, torch.full_like(weight.codes(slice(None)), -weight.spec.code_min))
        magnitudes = (dense - offset).abs() + offset.abs()
    return wide @ dense.t(), wide.abs() @ magnitudes.t()


def any_codes(shape: tuple[int, ...], spec: QuantSpec, draws: torch.Generator) -> Tensor:
    """Draw codes from the whole range."""
    return torch.randint(spec.code_min, spec.code_max + 1, shape, generator=draws, dtype=torch.int16)


def generator(seed: int) -> torch.Generator:
    """Make a generator of the same numbers on every machine."""
    return torch.Generator().manual_seed(seed)


def words(weight: WeightLayout, x: Tensor) -> str:
    """Describe a weight and an input, for messages."""
    return f"{weight.spec}, {weight.layout.shape}, input {tuple(x.shape)} in {dtype_name(x.dtype)}"
