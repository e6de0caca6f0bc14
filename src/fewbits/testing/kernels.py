"""`check_kernel`: whether a kernel computes what `Kernel` promises."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import attrs
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from fewbits.kernels.base import Kernel
from fewbits.kernels.reference import Reference, rounds_inputs
from fewbits.nn.stored import StoredWeight, store
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.layout import Layout
from fewbits.numerics.metrics import sqnr_db
from fewbits.numerics.quantize import cast, quantize
from fewbits.numerics.spec import CastSpec, QuantSpec, Spec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.testing.check import EXAMPLES, Check, Contract, checks, copy_of, expect, for_all
from fewbits.testing.strategies import FLOATS
from fewbits.testing.surroundings import snapshot

_WHY = Contract("fewbits.Kernel.supports", "Why this kernel cannot compute with this weight and this input")
_OUTPUT = Contract("fewbits.Kernel.linear", "The layer's output, in the dtype of `x`.")
_UNCHANGED = Contract("fewbits.Kernel.linear", "Neither argument is changed.")
_ACCURATE = Contract("fewbits.testing.check_kernel", "an SQNR of at least 50 dB")
_NEAR = Contract("fewbits.testing.check_kernel", "times the sum of the magnitudes that are added up")
_EXACT = Contract("fewbits.testing.check_kernel", "the bits of `fewbits.kernels.reference.Reference`")
_SOME = Contract("fewbits.testing.check_kernel", "It supports at least one of these weights.")
_SAME = Contract("fewbits.testing.check_kernel", "The same input gives the same bits")

LEVELS = (-1.0, -0.7, -0.5, -0.35, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)

#: The specs of the weights that a kernel is tried on.
SPECS: tuple[Spec, ...] = (
    QuantSpec(bits=8, granularity="tensor"),
    QuantSpec(bits=8, granularity="channel"),
    QuantSpec(bits=8, granularity="channel", symmetric=False),
    QuantSpec(bits=4, granularity="group", group_size=32),
    QuantSpec(bits=4, granularity="group", group_size=128, symmetric=False),
    QuantSpec(bits=6, granularity="group", group_size=64),
    QuantSpec(bits=4, granularity="group", group_size=64, levels=LEVELS),
    QuantSpec(bits=8, granularity="channel", activations="dynamic"),
    QuantSpec(bits=8, granularity="tensor", activations="dynamic"),
    QuantSpec(bits=8, granularity="channel", symmetric=False, activations="dynamic"),
    QuantSpec(bits=8, granularity="channel", activations="static"),
    CastSpec(torch.float16),
    CastSpec(torch.bfloat16),
)

#: Of an input without its last axis.
BATCHES = ((), (1,), (5,), (0,), (2, 3), (1, 2, 1, 3))


@attrs.frozen
class _Setup:
    recipe: Kernel
    device: torch.device
    examples: int

    def make(self) -> Kernel:
        return copy.deepcopy(self.recipe)

    def weight(self, spec: Spec, outputs: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> StoredWeight:
        """A stored weight with normally distributed values."""
        return _stored(_normal((outputs, inputs), dtype, seed), spec).to(self.device)

    def input(self, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> Tensor:
        return _normal(shape, dtype, seed).to(self.device)

    def supported(
        self, outputs: int, inputs: int, batch: tuple[int, ...]
    ) -> Iterator[tuple[Spec, StoredWeight, Tensor]]:
        """Every weight and input of these sizes that the kernel can compute with."""
        for spec in SPECS:
            for dtype in FLOATS:
                weight, x = self.weight(spec, outputs, inputs, dtype), self.input((*batch, inputs), dtype)
                if self.make().supports(weight, x) is None:
                    yield spec, weight, x


def check_kernel(kernel: Kernel, *, device: str | torch.device = "cpu", max_examples: int = EXAMPLES) -> list[Check]:
    """The checks of a kernel.

    What is asked beyond the docstrings of `Kernel`, of the weights and inputs that it supports:

    - It supports at least one of these weights.
    - With weights and inputs from a normal distribution, 64 outputs of 256 inputs, the output has an SQNR of at least
      50 dB against float64 and the same codes.
    - Of any size and strides, each element of the output is off by at most ``(4 * eps + inputs * min(eps, 2**-24))``
      times the sum of the magnitudes that are added up, with `eps` of the input's dtype.
    - If the layer rounds its inputs to int8, the output has the bits of `fewbits.kernels.reference.Reference`.
    - The same input gives the same bits.

    Args:
        kernel: newly made.
        device: where weights and inputs are.
        max_examples: how many examples a check that draws them looks at.

    Raises:
        ArgumentError: if it is no instance of `Kernel`.
    """
    setup = _Setup(copy_of(kernel, Kernel, "check_kernel"), torch.device(device), max_examples)
    return checks(kernel, _CHECKS, setup)


def supports_says_why_not(setup: _Setup) -> None:
    """`supports` gives None or a reason in words, of every weight and input, and None at least once."""
    can = 0
    for spec in SPECS:
        for dtype in FLOATS:
            for outputs, inputs in ((1, 1), (3, 33), (64, 256)):
                weight = setup.weight(spec, outputs, inputs, dtype)
                why = setup.make().supports(weight, setup.input((2, inputs), dtype))
                words = why is None or (isinstance(why, str) and why.strip() != "")
                expect(words, f"of {spec} in {dtype_name(dtype)} it says {why!r}, neither None nor words", _WHY)
                can += why is None
    expect(can > 0, "it supports none of the weights that it is tried on", _SOME)


def outputs_are_accurate(setup: _Setup) -> None:
    """At least 50 dB against float64."""
    for _, weight, x in setup.supported(64, 256, (16,)):
        found, expected = setup.make().linear(x, weight, None).double(), _expected(x, weight, None)
        noise = sqnr_db(float(expected.square().sum()), float((found - expected).square().sum()))
        expect(noise >= 50, f"{_words(weight, x)}: {noise:.1f} dB against float64", _ACCURATE)


def any_size_is_computed(setup: _Setup) -> None:
    """Odd sizes, one row, none, more axes, with and without bias: shape, dtype and every element are right."""

    def right(
        spec: Spec, dtype: torch.dtype, sizes: tuple[int, int], batch: tuple[int, ...], biased: bool, seed: int
    ) -> None:
        outputs, inputs = sizes
        weight, x = setup.weight(spec, outputs, inputs, dtype, seed), setup.input((*batch, inputs), dtype, seed + 1)
        if setup.make().supports(weight, x) is None:
            _check_output(setup, x, weight, setup.input((outputs,), dtype, seed + 2) if biased else None)

    size = st.sampled_from([1, 2, 3, 7, 8, 31, 33, 64, 65, 129])
    strategies = st.sampled_from(FLOATS), st.tuples(size, size), st.sampled_from(BATCHES), st.booleans()
    for spec in dict.fromkeys(spec for spec, _, _ in setup.supported(64, 256, (2,))):
        for_all(setup.examples, right, st.just(spec), *strategies, st.integers(0, 99))


def integer_sums_are_exact(setup: _Setup) -> None:
    """With int8 inputs, codes at both ends of their range and everywhere else give the bits of the reference."""
    for spec in SPECS:
        if isinstance(spec, QuantSpec) and spec.activations is not None:
            for inputs in (1, 33, 4096):
                for dtype in FLOATS:
                    for sign in (-1, 1):
                        _check_extremes(setup, spec, inputs, dtype, sign)


def arguments_stay(setup: _Setup) -> None:
    """Neither input nor weight nor bias is changed, and asking changes nothing either."""
    for _, weight, x in setup.supported(8, 64, (3,)):
        bias = setup.input((8,), x.dtype)
        held = {"x": x, "bias": bias} | {f"weight{name}": part for name, part in weight.parts().items()}
        before = snapshot(held)
        setup.make().supports(weight, x)
        setup.make().linear(x, weight, bias)
        expect(snapshot(held) == before, f"{_words(weight, x)}: an argument has changed", _UNCHANGED)


def outputs_are_reproducible(setup: _Setup) -> None:
    """Two calls, of one kernel or of two, give the same bits; an input of other strides is computed too."""
    for _, weight, x in setup.supported(64, 256, (16,)):
        kernel = setup.make()
        first = kernel.linear(x, weight, None)
        for other in (kernel, setup.make()):
            expect(torch.equal(other.linear(x, weight, None), first), f"{_words(weight, x)}: other bits", _SAME)
        strided = x.t().contiguous().t()
        if kernel.supports(weight, strided) is None:
            _check_output(setup, strided, weight, None)


def _check_output(setup: _Setup, x: Tensor, weight: StoredWeight, bias: Tensor | None) -> None:
    found, expected = setup.make().linear(x, weight, bias), _expected(x, weight, bias)
    what = f"{_words(weight, x)}{'' if bias is None else ', with bias'}"
    same = found.dtype == x.dtype and found.shape == expected.shape and found.device == x.device
    expect(same, f"{what}: the output has shape {tuple(found.shape)} in {dtype_name(found.dtype)}", _OUTPUT)
    if rounds_inputs(weight):
        exact = torch.equal(found, Reference().linear(x, weight, bias))
        expect(exact, f"{what}: the output has other bits than the reference", _EXACT)
        return
    # What is added up, all of it positive. Sums are taken in float32 at least, and may round at every step.
    size = F.linear(
        x.double().abs(), weight.operand(torch.float64).abs(), None if bias is None else bias.double().abs()
    )
    bound = (4 * _eps(x) + x.shape[-1] * min(_eps(x), 2.0**-24)) * size
    worst = float(((found.double() - expected).abs() - bound).amax()) if found.numel() else 0.0
    expect(worst <= 0, f"{what}: an element is off by {worst:.3g} more than rounding allows", _NEAR)


def _check_extremes(setup: _Setup, spec: QuantSpec, inputs: int, dtype: torch.dtype, sign: int) -> None:
    """All codes at one end of their range, then each row a mixture."""
    codes = torch.full((5, inputs), spec.code_min, dtype=torch.int16)
    codes[1:3] = spec.code_max
    codes[3:] = torch.randint(spec.code_min, spec.code_max + 1, (2, inputs), generator=_generator(3))
    weight = store(_with_codes(codes, spec, dtype), dtype).to(setup.device)
    x = torch.full((3, inputs), 2.0 * sign)
    x[1] = -x[1]
    x[2] = torch.randn(inputs, generator=_generator(4))
    x = x.to(dtype).to(setup.device)
    if setup.make().supports(weight, x) is None:
        _check_output(setup, x, weight, None)


def _with_codes(codes: Tensor, spec: QuantSpec, dtype: torch.dtype) -> QuantizedTensor:
    layout = Layout.of(codes.shape)
    scale = torch.full(spec.scale_shape(*layout.matrix_shape), 2.0**-7, dtype=dtype)
    zero_point = None if spec.symmetric else torch.full(scale.shape, spec.code_max, dtype=torch.int32)
    weight_only = spec.weight_only()
    value = QuantizedTensor.from_codes(codes, scale, zero_point, spec=weight_only, layout=layout, dtype=dtype)
    return _with_inputs(value, spec)


def _stored(weight: Tensor, spec: Spec) -> StoredWeight:
    if isinstance(spec, CastSpec):
        return store(cast(weight, spec.dtype), weight.dtype)
    return store(_with_inputs(quantize(weight, spec.weight_only()), spec), weight.dtype)


def _with_inputs(value: QuantizedTensor, spec: QuantSpec) -> QuantizedTensor:
    """The same codes for a layer that rounds its inputs as `spec` says."""
    scale = torch.tensor([0.02]) if spec.activations == "static" else None
    return attrs.evolve(value, spec=attrs.evolve(value.spec, activations=spec.activations), input_scale=scale)


def _expected(x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
    """The output in float64; of a layer that rounds its inputs, the reference's."""
    if rounds_inputs(weight):
        return Reference().linear(x, weight, bias).double()
    return F.linear(x.double(), weight.operand(torch.float64), None if bias is None else bias.double())


def _normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=_generator(seed)).to(dtype)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _eps(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps


def _words(weight: StoredWeight, x: Tensor) -> str:
    return f"{weight.spec}, input {tuple(x.shape)} in {dtype_name(x.dtype)}"


_CHECKS: tuple[Callable[[_Setup], None], ...] = (
    supports_says_why_not,
    outputs_are_accurate,
    any_size_is_computed,
    integer_sums_are_exact,
    arguments_stay,
    outputs_are_reproducible,
)
