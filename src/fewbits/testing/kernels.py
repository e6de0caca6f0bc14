"""`check_kernel`: check a kernel against the promises of `Kernel`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs
import torch
from torch import Tensor

from fewbits.kernels.base import Compute, Kernel
from fewbits.kernels.ops import describe
from fewbits.kernels.weight_layouts import WeightLayout
from fewbits.numerics.tensor import same_bits
from fewbits.testing.check import EXAMPLES, Check, checks_of, copy_of, expect
from fewbits.testing.environment import snapshot, sqnr_of
from fewbits.testing.kernel_outputs import (
    INPUTS,
    PAIRS,
    ROWS,
    KernelSetup,
    as_multiplied,
    check_outputs,
    computed,
    decoded,
    generator,
    in_parts,
    takes,
    words,
)


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
      `activations`. For grouped weights, integers are added exactly, and scaled sums in float32. With `rounds_weights`,
      weights in groups or with levels may be off by half a step of int8 codes that span the row.
    - The same input gives the same bits.
    - With up to `traced_rows` rows, all of this holds for `traced` too. `torch.compile` makes one graph of its
      operations, which gives the same bits. This check empties the cache of `torch.compile`.

    Args:
        kernel: A new kernel.
        device: The device of weights and inputs.
        max_examples: The number of examples that a check draws.

    Raises:
        ArgumentError: if `kernel` is not an instance of `Kernel`.
    """
    setup = KernelSetup(copy_of(kernel, Kernel, "check_kernel"), max_examples, torch.device(device))
    return checks_of(setup, __name__, "fewbits.testing.kernel_outputs")


def prepacking_loses_nothing(setup: KernelSetup) -> None:
    """`Kernel.prepack` returns the layout `weight_layout`, which reads like the given weight and gives its codes back.

    It does not change the given weight, unless it may reuse its memory. `Kernel.supports` accepts a prepacked weight.
    `supports` and `Kernel.takes` return None or a reason, and None for at least one weight and input.
    """
    accepted = 0
    for weight in setup.weights([(1, 1), (7, 33), (70, 130), (128, 256)]):
        what, original, before = f"{weight.spec}, {weight.layout.shape}", _read(weight), snapshot(weight.tensors())
        layer = setup.packed(weight)
        expect(snapshot(weight.tensors()) == before, f"{what}: prepacking changed the given weight")
        if layer is None:
            continue
        kernel, layout = layer
        right, found = kernel.weight_layout.__name__, type(layout).__name__
        expect(isinstance(layout, kernel.weight_layout), f"{what}: prepacked as {found}, not {right}")
        why = kernel.supports(layout)
        expect(why is None, f"{what}, once prepacked, supports() returns {why!r}")
        again = kernel.prepack(layout)
        spare = kernel.prepack(attrs.evolve(weight, packed=weight.packed.clone()), reuse_memory=True)
        for one in (layout, spare) if again is layout else (layout, spare, again):
            same = one.value(weight.scale.dtype).equal(weight.value(weight.scale.dtype))
            expect(same, f"{what}: it gives another value back")
            other = [name for name, tensor in _read(one).items() if not same_bits(tensor, original[name])]
            expect(not other, f"{what}: it gives other {', '.join(other)}")
        inputs = (setup.normal((rows, weight.layout.columns), dtype, 1) for rows in ROWS for dtype in INPUTS)
        accepted += sum(takes(layer, x) for x in inputs)
    expect(accepted > 0, "it accepts none of the weights and inputs of this check")


def outputs_are_accurate(setup: KernelSetup) -> None:
    """`Kernel.linear` has at least 50 dB against float64 with the same codes, or 10 dB more than the codes."""
    for weight, kind, layer in setup.layers(256, 256):
        dense, dtype = decoded(weight), weight.scale.dtype
        least = min(50.0, 10 + sqnr_of(dense, setup.normal((256, 256), dtype, 0)))
        for rows in ROWS:
            # Many rows, so that chance plays no part.
            found = computed(layer, in_parts(rows, setup.normal((max(rows, 16), 256), kind, 1)))
            if found:
                x, output = (torch.cat(parts) for parts in zip(*found, strict=True))
                expected = as_multiplied(weight, x, rounds=setup.rounds(weight.spec)) @ dense.t()
                noise, what = sqnr_of(output, expected), f"{words(weight, found[0][0])} and others"
                expect(noise >= least, f"{what}: {noise:.1f} dB against float64, not {least:.1f}")


def integer_sums_are_exact(setup: KernelSetup) -> None:
    """With inputs rounded to int8, all codes, extremes included, give the bits of the reference."""
    for spec in filter(setup.rounds, setup.specs()):
        for inputs in (1, 33, 1025, 4096):
            weight = setup.weight_of_codes(spec, 40, inputs)
            extremes = [setup.normal((rows, inputs), torch.float32, 4) for rows in (3, 200)]
            for x in extremes:
                x[0], x[1], x[len(x) // 2 + 1] = 2.0, -2.0, -3.0
            for dtype, kind in PAIRS:
                one = attrs.evolve(weight, scale=weight.scale.to(dtype))
                check_outputs(setup, one, computed(setup.packed(one), (x.to(kind) for x in extremes)))


def rounded_weights_are_near(setup: KernelSetup) -> None:
    """With `rounds_weights`, no weight moves by more than half a step; inputs of a one and zeros pick weights out."""
    in_groups = (spec for spec in setup.specs() if spec.granularity == "group" or spec.levels is not None)
    for spec in in_groups if setup.recipe.rounds_weights else ():
        weight, picks = setup.weight_of_codes(spec, 70, 160), torch.eye(160, device=setup.device)
        for rows in ROWS:
            check_outputs(setup, weight, computed(setup.packed(weight), in_parts(rows, picks)))


def outputs_are_reproducible(setup: KernelSetup) -> None:
    """`Kernel.linear` gives the same bits in a second call and in a new kernel; inputs with other strides are right.

    Neither `supports` nor `linear` changes the input or the weight.
    """
    for _, kind, (kernel, layout) in setup.layers(64, 256):
        for x in (setup.normal((rows, 256), kind, 1) for rows in ROWS):
            if not takes((kernel, layout), x):
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


def compilers_trace_few_rows(setup: KernelSetup) -> None:
    """With up to `Kernel.traced_rows` rows, `Kernel.takes` returns None and `torch.compile` traces `Kernel.traced`."""
    for _, kind, (kernel, layout) in setup.layers(256, 256):
        most = kernel.traced_rows(layout)
        for rows in {1, most} if most else ():
            x = setup.normal((rows, 256), kind, 1)
            expect(takes((kernel, layout), x), f"{words(layout, x)}: traced_rows is {most}, but it refuses the input")
        if most:
            _check_compiled(kernel, layout, [setup.normal((rows, 256), kind, 1) for rows in (1, most)])
            return  # a compiler takes seconds


def _check_compiled(kernel: Kernel[Any], layout: WeightLayout, inputs: Iterable[Tensor]) -> None:
    torch.compiler.reset()
    type(layout).register()
    compute: Compute = "int8" if kernel.rounds_inputs else "auto"
    tensors = list(layout.tensors().values())
    description = describe(layout, compute, [kernel])
    operation = torch.ops.fewbits.compiled_linear
    compiled = torch.compile(lambda x: operation(x, tensors, description), backend="aot_eager", fullgraph=True)
    for x in inputs:
        try:
            output = compiled(x)
        except RuntimeError as error:
            raise AssertionError(f"{words(layout, x)}: torch.compile cannot trace traced(): {error}") from error
        right = kernel.traced(x, layout).float()
        expect(same_bits(output, right), f"{words(layout, x)}: other bits when compiled")
    torch.compiler.reset()


def _read(weight: WeightLayout) -> dict[str, Tensor]:
    """Read codes and numbers in every way that a layout offers."""
    rows = weight.layout.rows
    index = torch.randint(rows, (5,), generator=generator(5)).to(weight.scale.device)
    found = {"numbers": weight.dequantize(weight.scale.dtype), "centered codes": weight.centered_codes()}
    some: dict[str, slice | Tensor] = {"all rows": slice(None), "a slice": slice(rows // 3, rows // 3 + 2)}
    for what, where in (some | {"an index": index}).items():
        found |= {f"codes of {what}": weight.codes(where), f"numbers of {what}": weight.decoded(where)}
    return found
