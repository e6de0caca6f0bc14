"""`check_module`: whether a quantized form that is registered for a class of modules keeps its promises."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fewbits.errors import ArgumentError
from fewbits.nn.base import QuantizedModule, form_of
from fewbits.nn.computing import set_compute
from fewbits.nn.swap import dequantize
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import same_bits
from fewbits.quantizers.base import Quantizer
from fewbits.selection.selector import LayerSelector
from fewbits.testing.check import EXAMPLES, Check, Setup, checks_of, expect
from fewbits.testing.environment import sqnr_of

_WEIGHTS = (
    QuantSpec(bits=8, granularity="channel"),
    QuantSpec(bits=4, granularity="group", group_size=32, symmetric=False),
    QuantSpec(bits=4, granularity="group", group_size=32, scale_bits=6),
)


class _Everything(Quantizer):
    """Quantize every tensor that can be quantized, with one spec."""

    def __init__(self, spec: QuantSpec) -> None:
        self.spec = spec
        super().__init__(selector=LayerSelector(min_elements=1))


@attrs.frozen
class ModuleSetup(Setup[nn.Module]):
    """A float module to check.

    Attributes:
        inputs: Positional arguments of its forward.
    """

    inputs: tuple[Any, ...]

    def quantized(self, spec: QuantSpec) -> QuantizedModule:
        """Quantize a copy.

        Raises:
            ConformanceError: if no parameter of the module is quantized.
        """
        quantizer = _Everything(spec)
        quantizer.prepare(self.recipe)
        module: QuantizedModule = quantizer.convert()
        reasons = "; ".join(f"{row.name} is kept, {row.reason}" for row in quantizer.ledger)
        expect(isinstance(module, QuantizedModule), f"no parameter is quantized: {reasons}")
        return module

    @torch.no_grad()
    def output(self, module: nn.Module) -> Tensor:
        """Run a module on copies of the inputs."""
        output = module(*copy.deepcopy(self.inputs))
        if not isinstance(output, Tensor):
            raise ArgumentError(f"check_module takes a module that returns a tensor, not a {type(output).__name__}")
        return output


def check_module(module: nn.Module, *inputs: Any) -> list[Check]:
    """Return the checks of the quantized form that is registered for the class of a float module.

    Beyond the docstring of `QuantizedModule`, the checks require:

    - The output has an SQNR of at least 50 dB against the float module with the dequantized weights, or, where kernels
      compute, 10 dB more than the dequantized weights have against the float ones.
    - Copies, pickles and state dicts give the same output, bit for bit.
    - `fewbits.dequantize` gives a module of the float class back.

    Args:
        module: A float module that returns a tensor; it is not changed.
        inputs: Positional arguments of its forward, in float32 where they are floating.

    Raises:
        ArgumentError: if `module` is no float module.
    """
    if not isinstance(module, nn.Module) or isinstance(module, QuantizedModule):
        raise ArgumentError(f"check_module takes a float module, not a {type(module).__name__}")
    return checks_of(ModuleSetup(copy.deepcopy(module), EXAMPLES, inputs), __name__)


def a_form_is_registered(setup: ModuleSetup) -> None:
    """`QuantizedModule.register` was called for the class: a module gets a quantized form of its own."""
    form = form_of(type(setup.quantized(_WEIGHTS[0])))
    expect(form is not QuantizedModule, f"{type(setup.recipe).__name__} is quantized without a form of its own")


def outputs_are_those_of_the_dequantized_weights(setup: ModuleSetup) -> None:
    """The output has an SQNR of at least 50 dB against the float module with the dequantized weights.

    With `compute="auto"` a lower SQNR can suffice: 10 dB above that of this module's output against the output with the
    original weights. The output has the same shape, in float32. If this fails, the layout or the forward probably does
    not suit the class.
    """
    floats = setup.output(setup.recipe)
    for spec in _WEIGHTS:
        module = setup.quantized(spec)
        expected = setup.output(dequantize(module))
        least = {"exact": 50.0, "auto": min(50.0, sqnr_of(expected, floats) + 10)}
        for compute in ("exact", "auto"):
            set_compute(module, compute)
            output = setup.output(module)
            same_kind = (output.shape, output.dtype) == (expected.shape, torch.float32)
            expect(same_kind, f"{spec}: shape {tuple(output.shape)} in {output.dtype}")
            noise = sqnr_of(output, expected)
            expect(noise >= least[compute], f"{spec}, {compute}: {noise:.1f} dB against the dequantized weights")


def inputs_are_rounded_as_declared(setup: ModuleSetup) -> None:
    """A form with `rounds_inputs` rounds inputs to int8: the output differs by about the error of 8 bits."""
    spec = attrs.evolve(_WEIGHTS[0], activations="dynamic")
    module = setup.quantized(spec)
    if not form_of(type(module)).rounds_inputs:
        return
    noise = sqnr_of(setup.output(module), setup.output(dequantize(module)))
    floats = [x for x in setup.inputs if isinstance(x, Tensor) and x.is_floating_point()]
    expect(bool(floats), "it declares that it rounds its inputs, and takes no floating input")
    # 8 bits leave about 40 dB; equal outputs, far above 100 dB, show that nothing was rounded.
    expect(20 <= noise < 100, f"{noise:.1f} dB: its inputs are not rounded to int8")


def copies_compute_the_same(setup: ModuleSetup) -> None:
    """Deepcopy, state dicts, and pickle if it takes the float module, carry everything that the output depends on."""
    for spec in _WEIGHTS:
        module = setup.quantized(spec)
        expected = setup.output(module)
        filled = setup.quantized(spec)
        for tensor in (*filled.parameters(), *filled.buffers()):
            tensor.data.zero_()
        filled.load_state_dict(module.state_dict())
        copies = {
            "deepcopy": copy.deepcopy(module),
            "load_state_dict": filled,
            ".to": copy.deepcopy(module).to(torch.float64).to(torch.float32),
        }
        if _can_be_pickled(setup.recipe):
            copies["pickle"] = pickle.loads(pickle.dumps(module))
        for way, copied in copies.items():
            expect(type(copied) is type(module), f"{way} gives a {type(copied).__name__}")
            expect(same_bits(setup.output(copied), expected), f"{spec}: {way} gives another output")


def dequantizing_gives_the_class_back(setup: ModuleSetup) -> None:
    """`fewbits.dequantize` gives a module of the float class back, with the parameters it had."""
    floats = dequantize(setup.quantized(_WEIGHTS[0]))
    expect(type(floats) is type(setup.recipe), f"dequantize gives a {type(floats).__name__}")
    names = [name for name, _ in floats.named_parameters()]
    expect(names == [name for name, _ in setup.recipe.named_parameters()], f"it has the parameters {names}")


def _can_be_pickled(module: nn.Module) -> bool:
    try:
        pickle.dumps(module)
    except Exception:  # pickle raises many types
        return False
    return True
