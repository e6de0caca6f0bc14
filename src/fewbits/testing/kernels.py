"""`check_kernel`: check a kernel against the promises of `Kernel`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from fewbits.kernels.base import Kernel
from fewbits.kernels.weight_layouts import PackedInt32, WeightLayout
from fewbits.numerics.tensor import same_bits
from fewbits.testing.check import EXAMPLES, Check, checks_of, copy_of, expect
from fewbits.testing.environment import snapshot, sqnr_of
from fewbits.testing.kernel_outputs import (
    INPUTS,
    ROWS,
    KernelSetup,
    check_outputs,
    computed,
    exact,
    generator,
    in_parts,
    words,
)
from fewbits.testing.strategies import FLOATS


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
        kernel: A new kernel.
        device: The device of weights and inputs.
        max_examples: The number of examples that a check draws.

    Raises:
        ArgumentError: if `kernel` is not an instance of `Kernel`.
    """
    setup = KernelSetup(copy_of(kernel, Kernel, "check_kernel"), max_examples, torch.device(device))
    return checks_of(setup, __name__, "fewbits.testing.kernel_outputs")


def it_says_why_not(setup: KernelSetup) -> None:
    """`Kernel.supports` and `Kernel.takes` return None or a reason, and None for at least one weight and input.

    `supports` returns None for a weight that the kernel has prepacked.
    """
    can = 0
    for weight in _weights(setup, [(1, 1), (3, 33), (128, 256)]):
        kernel, why = setup.make(), setup.make().supports(weight)
        _check_reason(why, f"for {weight.spec} supports()")
        if why is not None:
            continue
        again = kernel.supports(kernel.prepack(weight))
        expect(again is None, f"for {weight.spec}, once prepacked, supports() returns {again!r}")
        for dtype in INPUTS:
            for rows in ROWS:
                x = setup.normal((rows, weight.layout.columns), dtype, 1)
                why = kernel.takes(x, rows)
                _check_reason(why, f"for {words(weight, x)} takes()")
                can += why is None
    expect(can > 0, "it accepts none of the weights and inputs of this check")


def prepacking_loses_nothing(setup: KernelSetup) -> None:
    """`Kernel.prepack` returns the layout `weight_layout`, and does not change the given weight.

    A prepacked weight reads like the original, and gives its packed codes back.
    """
    for weight in _weights(setup, [(1, 1), (7, 33), (70, 130), (128, 256)]):
        original, before = _everything_in(weight), snapshot(weight.tensors())
        packed = setup.packed(weight)
        expect(snapshot(weight.tensors()) == before, f"{weight.spec}: prepacking changed the given weight")
        if packed is None:
            continue
        kernel, layout = packed
        right, found = kernel.weight_layout.__name__, type(layout).__name__
        expect(isinstance(layout, kernel.weight_layout), f"{weight.spec}: prepacked as {found}, not {right}")
        spare = attrs.evolve(weight, packed=weight.packed.clone())
        again = kernel.prepack(layout)
        for one in (layout, kernel.prepack(spare, reuse_memory=True), *([] if again is layout else [again])):
            what = f"{weight.spec}, {weight.layout.shape}"
            same = one.value(weight.scale.dtype).equal(weight.value(weight.scale.dtype))
            expect(same, f"{what}: it gives another value back")
            other = [name for name, tensor in _everything_in(one).items() if not same_bits(tensor, original[name])]
            expect(not other, f"{what}: it gives other {', '.join(other)}")


def outputs_are_accurate(setup: KernelSetup) -> None:
    """`Kernel.linear` has at least 50 dB against float64 with the same codes, or 10 dB more than the codes."""
    for weight, kind, layer in setup.layers(256, 256):
        dtype = weight.scale.dtype
        least = min(50.0, 10 + sqnr_of(weight.dequantize(dtype), setup.normal((256, 256), dtype, 0)))
        for rows in ROWS:
            # Many rows, so that chance plays no part.
            found = computed(layer, in_parts(rows, setup.normal((max(rows, 32), 256), kind, 1)))
            if found:
                x, output = (torch.cat(parts) for parts in zip(*found, strict=True))
                noise = sqnr_of(output, exact(weight, x, rounds=setup.rounds(weight.spec))[0])
                what = f"{words(weight, found[0][0])} and others"
                expect(noise >= least, f"{what}: {noise:.1f} dB against float64, not {least:.1f}")


def outputs_are_reproducible(setup: KernelSetup) -> None:
    """`Kernel.linear` gives the same bits in a second call and in a new kernel; inputs with other strides are right.

    Neither `supports` nor `linear` changes the input or the weight.
    """
    for _, kind, (kernel, layout) in setup.layers(64, 256):
        for x in (setup.normal((rows, 256), kind, 1) for rows in ROWS):
            if kernel.takes(x, x.shape[0]) is not None:
                continue
            held = {"x": x} | {f"weight.{name}": tensor for name, tensor in layout.tensors().items()}
            before, what = snapshot(held), words(layout, x)
            kernel.supports(layout)
            first = kernel.linear(x, layout)
            expect(snapshot(held) == before, f"{what}: an argument has changed")
            for other in (kernel, setup.make()):
                expect(same_bits(other.linear(x, layout), first), f"{what}: other bits")
            strided = (x.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2], x[:1].expand_as(x))
            check_outputs(setup, layout, computed((kernel, layout), strided))


def _weights(setup: KernelSetup, sizes: list[tuple[int, int]]) -> Iterator[PackedInt32]:
    """Make weights of all specs and dtypes in these sizes."""
    for spec in setup.specs():
        for dtype in FLOATS:
            yield from (setup.weight(spec, outputs, inputs, dtype) for outputs, inputs in sizes)


def _check_reason(why: object, call: str) -> None:
    right = why is None or (isinstance(why, str) and why.strip() != "")
    expect(right, f"{call} returns {why!r}, neither None nor a reason")


def _everything_in(weight: WeightLayout) -> dict[str, Tensor]:
    """Read codes and numbers in every way that a layout offers."""
    rows = weight.layout.rows
    index = torch.randint(rows, (5,), generator=generator(5)).to(weight.scale.device)
    found = {"numbers": weight.dequantize(weight.scale.dtype), "centered codes": weight.centered_codes()}
    some: dict[str, slice | Tensor] = {"all rows": slice(None), "a slice": slice(rows // 3, rows // 3 + 2)}
    for what, where in (some | {"an index": index}).items():
        found |= {f"codes of {what}": weight.codes(where), f"numbers of {what}": weight.decoded(where)}
    return found
