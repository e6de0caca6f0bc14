"""`check_kernel`: check a kernel against the promises of `Kernel`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from fewbits.kernels.base import Kernel
from fewbits.kernels.weight_layouts import PackedInt32, WeightLayout
from fewbits.numerics.metrics import sqnr_db
from fewbits.numerics.tensor import same_bits
from fewbits.testing.check import EXAMPLES, Check, Contract, check_functions, checks, copy_of, expect
from fewbits.testing.environment import snapshot
from fewbits.testing.kernel_outputs import (
    INPUTS,
    PAIRS,
    ROWS,
    KernelSetup,
    check_result,
    exact,
    generator,
    in_parts,
    words,
)
from fewbits.testing.strategies import FLOATS

_WHY = Contract("fewbits.extend.Kernel.supports", "Say why this kernel cannot compute with a weight")
_FORMS = Contract("fewbits.extend.Kernel.supports", "which may be in any layout")
_TAKES = Contract("fewbits.extend.Kernel.takes", "Say why this kernel does not compute with an input of so many rows")
_FORM = Contract("fewbits.extend.Kernel.prepack", "Convert a weight to the layout that this kernel reads")
_UNCHANGED = Contract("fewbits.extend.Kernel.linear", "Neither argument is changed")
_ROUND_TRIP = Contract("fewbits.testing.check_kernel", "gives the packed int32 codes back, bit for bit")
_ACCURATE = Contract("fewbits.testing.check_kernel", "an SQNR of at least 50 dB")
_SOME = Contract("fewbits.testing.check_kernel", "The kernel accepts at least one of the weights.")
_SAME = Contract("fewbits.testing.check_kernel", "The same input gives the same bits")


def check_kernel(
    kernel: Kernel[Any], *, device: str | torch.device = "cpu", max_examples: int = EXAMPLES
) -> list[Check]:
    """Make the checks of a kernel.

    Beyond the docstrings of `Kernel`, the checks require of all weights and inputs that the kernel accepts:

    - The kernel accepts at least one of the weights.
    - A prepacked weight gives the packed int32 codes back, bit for bit. Codes, rows and numbers read from it equal
      those of the original weight.
    - With weights and inputs from a normal distribution, 256 outputs of 256 inputs, the output has an SQNR of at least
      50 dB against float64 with the same codes; 10 dB more than the SQNR of the codes is enough.
    - For any size and strides, the error of an output element is at most ``(1 + 2**-8) ** 4 - 1 + inputs * 2**-23``
      times the sum of the magnitudes of the addends. This allows four roundings to bfloat16, and sums in float32.
    - If a row of the input is one power of two and zeros, and scales are powers of two, the output is exact.
    - A kernel that rounds inputs to int8 gives the bits of `fewbits.kernels.reference.Reference` with a spec that has
      `activations`. For grouped weights, integers are added exactly, and scaled sums in float32.
    - The same input gives the same bits.

    Args:
        kernel: a new kernel.
        device: of weights and inputs.
        max_examples: number of examples that a check draws.

    Raises:
        ArgumentError: if `kernel` is not an instance of `Kernel`.
    """
    setup = KernelSetup(copy_of(kernel, Kernel, "check_kernel"), torch.device(device), max_examples)
    return checks(kernel, check_functions(__name__, "fewbits.testing.kernel_outputs"), setup)


def it_says_why_not(setup: KernelSetup) -> None:
    """`supports` and `takes` return None or a reason for every weight and input, and None at least once."""
    can = 0
    for weight in _weights(setup, [(1, 1), (3, 33), (128, 256)]):
        kernel, why = setup.make(), setup.make().supports(weight)
        expect(_is_reason(why), f"for {weight.spec} supports() returns {why!r}, neither None nor a reason", _WHY)
        if why is not None:
            continue
        again = kernel.supports(kernel.prepack(weight))
        expect(again is None, f"for {weight.spec}, once prepacked, supports() returns {again!r}", _FORMS)
        for x in _inputs(setup, weight.layout.columns):
            why = kernel.takes(x, x.shape[0])
            expect(
                _is_reason(why), f"for {words(weight, x)} takes() returns {why!r}, neither None nor a reason", _TAKES
            )
            can += why is None
    expect(can > 0, "it accepts none of the weights and inputs of this check", _SOME)


def prepacking_loses_nothing(setup: KernelSetup) -> None:
    """A prepacked weight reads like the original, and gives its packed codes back; the original is unchanged."""
    for weight in _weights(setup, [(1, 1), (7, 33), (70, 130), (128, 256)]):
        before = snapshot(weight.tensors())
        packed = setup.packed(weight)
        expect(snapshot(weight.tensors()) == before, f"{weight.spec}: prepacking changed the given weight", _FORM)
        if packed is not None:
            kernel, layout = packed
            fits = isinstance(layout, kernel.weight_layout)
            expect(
                fits, f"{weight.spec}: prepacked as {type(layout).__name__}, not {kernel.weight_layout.__name__}", _FORM
            )
            _check_layout(weight, layout)
            _check_layout(weight, kernel.prepack(layout))
            _check_layout(weight, kernel.prepack(attrs.evolve(weight, packed=weight.packed.clone()), reuse_memory=True))


def outputs_are_accurate(setup: KernelSetup) -> None:
    """Outputs have 50 dB against float64, or 10 dB more than the codes."""
    for spec in setup.specs():
        for dtype, kind in PAIRS:
            weight, own = setup.measured(spec, 256, 256, dtype)
            for rows in ROWS:
                x = setup.normal((max(rows, 32), 256), kind, 1)
                _check_accuracy(setup, weight, in_parts(rows, x), min(50.0, own + 10))


def arguments_stay(setup: KernelSetup) -> None:
    """Neither `supports` nor `linear` changes the input or the weight."""
    for kernel, layout, x in _computed(setup, 8, 64):
        held = {"x": x} | {f"weight.{name}": tensor for name, tensor in layout.tensors().items()}
        before = snapshot(held)
        kernel.supports(layout)
        kernel.linear(x, layout)
        expect(snapshot(held) == before, f"{words(layout, x)}: an argument has changed", _UNCHANGED)


def outputs_are_reproducible(setup: KernelSetup) -> None:
    """Two calls, of one kernel or of two, give the same bits; inputs with other strides are right too."""
    for kernel, layout, x in _computed(setup, 64, 256):
        first = kernel.linear(x, layout)
        for other in (kernel, setup.make()):
            expect(same_bits(other.linear(x, layout), first), f"{words(layout, x)}: other bits", _SAME)
        for strided in (x.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2], x[:1].expand_as(x)):
            if kernel.takes(strided, x.shape[0]) is None:
                check_result(setup, layout, strided, kernel.linear(strided, layout))


def _weights(setup: KernelSetup, sizes: list[tuple[int, int]]) -> Iterator[PackedInt32]:
    """Make weights of all specs and dtypes in these sizes."""
    for spec in setup.specs():
        for dtype in FLOATS:
            yield from (setup.weight(spec, outputs, inputs, dtype) for outputs, inputs in sizes)


def _inputs(setup: KernelSetup, inputs: int) -> Iterator[Tensor]:
    return (setup.normal((rows, inputs), dtype, 1) for dtype in INPUTS for rows in ROWS)


def _computed(setup: KernelSetup, outputs: int, inputs: int) -> Iterator[tuple[Kernel[Any], WeightLayout, Tensor]]:
    """Yield every weight and input of these sizes that the kernel accepts."""
    for spec in setup.specs():
        for dtype, kind in PAIRS:
            packed = setup.packed(setup.weight(spec, outputs, inputs, dtype))
            for rows in ROWS if packed is not None else ():
                x = setup.normal((rows, inputs), kind, 1)
                if packed is not None and packed[0].takes(x, rows) is None:
                    yield *packed, x


def _is_reason(why: object) -> bool:
    return why is None or (isinstance(why, str) and why.strip() != "")


def _check_accuracy(setup: KernelSetup, weight: PackedInt32, inputs: Iterable[Tensor], least: float) -> None:
    """Measure over many rows, so that chance plays no part."""
    found = list(setup.computed(weight, inputs))
    if not found:
        return
    x, output = (torch.cat(parts) for parts in zip(*found, strict=True))
    expected, _ = exact(weight, x, rounds=setup.rounds(weight))
    noise = sqnr_db(float(expected.square().sum()), float((output.double() - expected).square().sum()))
    what = f"{words(weight, found[0][0])} and others"
    expect(noise >= least, f"{what}: {noise:.1f} dB against float64, not {least:.1f}", _ACCURATE)


def _check_layout(weight: PackedInt32, layout: WeightLayout) -> None:
    what, rows, dtype = f"{weight.spec}, {weight.layout.shape}", weight.layout.rows, weight.scale.dtype
    same = layout.value(dtype).equal(weight.value(dtype))
    expect(same, f"{what}: it gives another value back", _ROUND_TRIP)
    some = torch.randint(rows, (5,), generator=generator(5)).to(weight.scale.device)
    for where in (slice(None), slice(rows // 3, rows // 3 + 2), some):
        expect(same_bits(layout.codes(where), weight.codes(where)), f"{what}: other codes of rows {where}", _ROUND_TRIP)
        alike = same_bits(layout.decoded(where), weight.decoded(where))
        expect(alike, f"{what}: rows {where} decode to other numbers", _ROUND_TRIP)
    alike = same_bits(layout.dequantize(dtype), weight.dequantize(dtype))
    alike &= same_bits(layout.centered_codes(), weight.centered_codes())
    expect(alike, f"{what}: it dequantizes to other numbers", _ROUND_TRIP)
