"""The scheme under test, and the checks of its lifecycle on every kind of source."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewbits.api import quantize, verify
from fewbits.errors import CalibrationError, StateError
from fewbits.quantizers.base import Quantizer
from fewbits.quantizers.lifecycle import TRANSITIONS, State
from fewbits.selection.selector import LayerSelector
from fewbits.testing.check import Setup, expect, expect_error, for_all
from fewbits.testing.environment import files_in, folder, snapshot
from fewbits.testing.models import SmallModel, ids, models

Source = nn.Module | Mapping[str, Tensor] | Path


@attrs.frozen(slots=False)
class QuantizerSetup(Setup[Quantizer]):
    """A scheme to check."""

    def make(self, *, for_model: bool = True) -> Quantizer:
        """Copy the quantizer, for tensors of any size; if its observer needs data, for Linear layers of a model."""
        quantizer = super().make()
        types = ["Linear"] if for_model and quantizer.observer.needs_data else []
        quantizer.selector = LayerSelector(include_types=types, min_elements=1)
        return quantizer

    @cached_property
    def needs_forward(self) -> bool:
        """Whether it needs a model, because it must see the inputs of layers."""
        quantizer = self.make()
        quantizer.prepare(SmallModel())
        static = any(row.spec is not None and row.spec.activations == "static" for row in quantizer.ledger)
        return static or quantizer.observer.needs_data

    def prepared(self, model: nn.Module, *, inplace: bool = False) -> Quantizer:
        """Prepare a quantizer and show it two batches."""
        quantizer = self.make()
        quantizer.prepare(model, inplace=inplace)
        quantizer.observe(batches(model))
        return quantizer

    def converted(self, model: nn.Module, *, inplace: bool = False) -> tuple[Quantizer, Any]:
        """Quantize a model; return the quantizer and the result."""
        quantizer = self.prepared(model, inplace=inplace)
        return quantizer, quantizer.convert()


def linear(weight: Tensor) -> nn.Linear:
    """Make a Linear layer with this weight, (outputs, inputs)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    return layer


def batches(model: nn.Module) -> list[Tensor]:
    """Draw two batches for a model of the kit."""
    if isinstance(model, nn.Linear):
        generator = torch.Generator().manual_seed(1)
        shape = (4, model.in_features)
        return [torch.randn(shape, generator=generator).to(model.weight.dtype) for _ in range(2)]
    return [ids(seed) for seed in range(2)]


def lifecycle_of_a_model(setup: QuantizerSetup) -> None:
    """A model passes all states of `Quantizer` and comes back quantized; the original does not change.

    Every call that a state does not allow raises `StateError` and changes nothing.
    """
    model = SmallModel()
    with folder() as there:
        result = _lives(setup.make(), model, there, data=batches(model))
    expect(type(result) is SmallModel, f"a model came back as {type(result).__name__}")


def lifecycle_of_a_state_dict(setup: QuantizerSetup) -> None:
    """A state dict passes all states, and does not change; a scheme that needs data refuses it."""
    source = dict(SmallModel().state_dict())
    if setup.needs_forward:
        _check_refused(setup, source)
        return
    with folder() as there:
        result = _lives(setup.make(for_model=False), source, there)
    expect(isinstance(result, Mapping) and result.keys() == source.keys(), "other names came back")


def lifecycle_of_a_file(setup: QuantizerSetup) -> None:
    """A file passes all states into another file, and does not change; a scheme that needs data refuses it."""
    with folder() as there:
        source, output = there / "model.safetensors", there / "quantized.out"
        save_file({name: tensor.clone() for name, tensor in SmallModel().state_dict().items()}, source)
        if setup.needs_forward:
            _check_refused(setup, source)
            return
        result = _lives(setup.make(for_model=False), source, there, output=output)
        expect(Path(result) == output and output.is_file(), f"the result is {result!r}, not {output}")


def other_ways_give_the_same(setup: QuantizerSetup) -> None:
    """In place, the same model object is quantized to the same bits; so is a model by `fewbits.quantize`."""
    model = SmallModel()
    expected = snapshot(setup.converted(SmallModel())[1])
    _, result = setup.converted(model, inplace=True)
    expect(result is model, "in-place quantization returns another model")
    expect(snapshot(result) == expected, "in-place quantization gives other bits")
    result = quantize(SmallModel(), setup.make(), data=batches(model), validate=False).model
    expect(snapshot(result) == expected, "fewbits.quantize gives other bits than the steps")


def any_model_is_covered(setup: QuantizerSetup) -> None:
    """Every tensor of any model has one row in the ledger, and tensors with the fate "kept" do not change."""

    def covered(model: nn.Module) -> None:
        quantizer = setup.make()
        quantizer.prepare(model)
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        names |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
        rows = {row.name for row in quantizer.ledger}
        expect(rows == names, f"the ledger lacks or invents {sorted(rows ^ names)}")
        if setup.needs_forward:
            return
        before, after = snapshot(model), snapshot(quantizer.convert())
        kept = [row.name for row in quantizer.ledger if row.fate == "kept" and row.persistent]
        changed = [name for name in kept if before[name] != after.get(name)]
        expect(not changed, f"the ledger says kept, but changed: {', '.join(changed)}")

    for_all(setup.examples, covered, models())


def _lives(
    quantizer: Quantizer, source: Source, there: Path, *, data: list[Tensor] | None = None, output: Path | None = None
) -> Any:
    """Take a source through all states, without a limit on the SQNR, and return the result.

    The source does not change. In every state, a call that the state does not allow raises `StateError` and changes
    nothing.
    """
    unchanged, saved = _contents(source), there / "saved.out"
    calls: dict[str, Callable[[], Any]] = {
        "prepare": lambda: quantizer.prepare(source),
        "observe": lambda: quantizer.observe(data or []),
        "convert": lambda: quantizer.convert(output=output),
        "validate": lambda: quantizer.validate(on_failure="ignore", fail_under=-math.inf),
        "save": lambda: quantizer.save(saved),
    }

    def visible() -> tuple[object, ...]:
        return quantizer.state, None if quantizer.state is State.CREATED else quantizer.ledger, files_in(there)

    results = {}
    for name in calls:
        if name == "observe" and data is None:
            continue
        before = visible()
        for illegal in (call for call in calls if quantizer.state not in TRANSITIONS[call][0]):
            expect_error(StateError, f"{illegal}() in state {quantizer.state}", calls[illegal])
            expect(visible() == before, f"{illegal}() raises StateError but changes something")
        expected = TRANSITIONS[name][1] or quantizer.state
        results[name] = calls[name]()
        expect(quantizer.state is expected, f"the state is {quantizer.state.name}, not {expected.name}")
    verified = verify(saved, source, serializer=quantizer.serializer, fail_under=-math.inf)
    for way, report in (("validate", results["validate"]), ("verify", verified)):
        expect(report.ok, f"{way} found: {'; '.join(report.failures)}")
    expect(_contents(source) == unchanged, "the prepared source has changed")
    quantizer.reset()
    expect(quantizer.state is State.CREATED, f"the state after reset is {quantizer.state.name}")
    return results["convert"]


def _contents(source: Source) -> object:
    return source.read_bytes() if isinstance(source, Path) else snapshot(source)


def _check_refused(setup: QuantizerSetup, source: Source) -> None:
    """Check that a scheme that needs data refuses a source without a forward."""
    quantizer = setup.make(for_model=False)
    expect_error(CalibrationError, "prepare() with a source that has no forward", lambda: quantizer.prepare(source))
    expect(quantizer.state is State.CREATED, f"a refused prepare leaves state {quantizer.state.name}")
