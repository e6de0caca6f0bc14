"""The scheme under test, and the checks of its lifecycle on every kind of source."""

from __future__ import annotations

import copy
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
from fewbits.numerics.spec import QuantSpec
from fewbits.quantizers.base import Quantizer
from fewbits.quantizers.lifecycle import TRANSITIONS, State
from fewbits.selection.selector import LayerSelector
from fewbits.testing.check import Contract, expect, fail, for_all
from fewbits.testing.environment import files_in, folder, snapshot
from fewbits.testing.models import SmallModel, ids, models

_LIFE = Contract("fewbits.Quantizer", "prepare, observe, convert, validate, save")
_UNTOUCHED = Contract("fewbits.Quantizer.prepare", "It is not modified.")
_RESULT = Contract(
    "fewbits.Quantizer.convert",
    "the quantized model, mapping {name: Tensor or QuantizedTensor}, or path, like the source",
)
_INPLACE = Contract("fewbits.Quantizer.prepare", "quantize the model or mapping itself")
_VALID = Contract("fewbits.Quantizer.validate", "Check the result against the source, element by element")
_STATE = Contract("fewbits.errors.StateError", "called in a state that does not allow it; the call changed nothing.")
_COVERED = Contract("fewbits.Quantizer.ledger", "The fate of every tensor.")
_NO_FORWARD = Contract("fewbits.errors.CalibrationError", "Calibration data is missing, or the model cannot run it.")


@attrs.frozen(slots=False)
class QuantizerSetup:
    """A scheme to check. The checks use copies of `recipe`."""

    recipe: Quantizer
    examples: int

    def make(self) -> Quantizer:
        """Copy the quantizer, for tensors of any size; for Linear layers only if its observer needs data."""
        quantizer = copy.deepcopy(self.recipe)
        types = ["Linear"] if quantizer.observer.needs_data else []
        quantizer.selector = LayerSelector(include_types=types, min_elements=1)
        return quantizer

    def make_for_tensors(self) -> Quantizer:
        """Copy the quantizer, for sources without module classes."""
        quantizer = copy.deepcopy(self.recipe)
        quantizer.selector = LayerSelector(min_elements=1)
        return quantizer

    @cached_property
    def needs_forward(self) -> bool:
        """Whether it needs a model, because it must see the inputs of layers."""
        quantizer = self.make()
        quantizer.prepare(SmallModel())
        specs = [row.spec for row in quantizer.ledger]
        static = any(isinstance(spec, QuantSpec) and spec.activations == "static" for spec in specs)
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

    def of_weight(self, weight: Tensor) -> Quantizer:
        """Prepare a quantizer for a source with this weight, under the name ``"weight"``."""
        if self.needs_forward:
            return self.prepared(linear(weight))
        quantizer = self.make_for_tensors()
        # Casting the weight to its own dtype leaves nothing to do, which is an error. The other tensor prevents that.
        quantizer.prepare({"weight": weight, "other": torch.ones(2, 32, dtype=torch.float64)})
        return quantizer


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
    """A model passes all states and comes back quantized; the original does not change."""
    model = SmallModel()
    before = snapshot(model)
    quantizer = setup.make()
    _step(quantizer, State.PREPARED, lambda: quantizer.prepare(model))
    _step(quantizer, State.OBSERVED, lambda: quantizer.observe(batches(model)))
    result = _step(quantizer, State.CONVERTED, quantizer.convert)
    expect(type(result) is SmallModel, f"a model came back as {type(result).__name__}", _RESULT)
    with folder() as there:
        _validate_and_save(quantizer, model, there / "model.out")
    expect(snapshot(model) == before, "the prepared model has changed", _UNTOUCHED)
    _step(quantizer, State.CREATED, quantizer.reset)


def lifecycle_of_a_state_dict(setup: QuantizerSetup) -> None:
    """A state dict passes all states; a scheme that needs data refuses it."""
    source = dict(SmallModel().state_dict())
    before = snapshot(source)
    quantizer = setup.make_for_tensors()
    if _is_refused(setup, quantizer, source):
        return
    _step(quantizer, State.PREPARED, lambda: quantizer.prepare(source))
    result = _step(quantizer, State.CONVERTED, quantizer.convert)
    expect(isinstance(result, Mapping) and result.keys() == source.keys(), "other names came back", _RESULT)
    with folder() as there:
        _validate_and_save(quantizer, source, there / "model.out")
    expect(snapshot(source) == before, "the prepared state dict has changed", _UNTOUCHED)


def lifecycle_of_a_file(setup: QuantizerSetup) -> None:
    """A file passes all states, into another file."""
    with folder() as there:
        source, output = there / "model.safetensors", there / "quantized.out"
        save_file({name: tensor.clone() for name, tensor in SmallModel().state_dict().items()}, source)
        before = files_in(there)
        quantizer = setup.make_for_tensors()
        if _is_refused(setup, quantizer, source):
            return
        _step(quantizer, State.PREPARED, lambda: quantizer.prepare(source))
        result = _step(quantizer, State.CONVERTED, lambda: quantizer.convert(output=output))
        expect(Path(result) == output and output.is_file(), f"the result is {result!r}, not {output}", _RESULT)
        _validate_and_save(quantizer, source, there / "copy.out")
        expect(files_in(there).items() >= before.items(), "the prepared file has changed", _UNTOUCHED)


def illegal_calls_change_nothing(setup: QuantizerSetup) -> None:
    """Every call that the state does not allow raises `StateError` and changes nothing."""
    model, quantizer = SmallModel(), setup.make()
    with folder() as there:
        calls: dict[str, Callable[[], object]] = {
            "prepare": lambda: quantizer.prepare(model),
            "observe": lambda: quantizer.observe(batches(model)),
            "convert": quantizer.convert,
            "validate": lambda: quantizer.validate(fail_under=-math.inf),
            "save": lambda: quantizer.save(there / "model.out"),
        }
        _refuses(quantizer, calls, there)
        for call in ("prepare", "observe", "convert", "validate"):
            calls[call]()
            _refuses(quantizer, calls, there)


def in_place_gives_the_same(setup: QuantizerSetup) -> None:
    """In place, the same model object is quantized to the same bits."""
    model = SmallModel()
    _, expected = setup.converted(SmallModel())
    _, result = setup.converted(model, inplace=True)
    expect(result is model, "in-place quantization returns another model", _INPLACE)
    expect(snapshot(result) == snapshot(expected), "in-place quantization gives other bits", _INPLACE)


def one_call_gives_the_same(setup: QuantizerSetup) -> None:
    """`fewbits.quantize` gives the same bits as the single steps."""
    _, expected = setup.converted(SmallModel())
    result = quantize(SmallModel(), setup.make(), data=batches(expected), validate=False)
    expect(snapshot(result.model) == snapshot(expected), "fewbits.quantize gives other bits than the steps", _LIFE)


def any_model_is_covered(setup: QuantizerSetup) -> None:
    """Every tensor of any model has one row in the ledger, and tensors with the fate "kept" do not change."""

    def covered(model: nn.Module) -> None:
        quantizer = setup.make()
        quantizer.prepare(model)
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )
        rows = {row.name for row in quantizer.ledger}
        expect(rows == tensors.keys(), f"the ledger lacks or invents {sorted(rows ^ tensors.keys())}", _COVERED)
        if setup.needs_forward:
            return
        result = quantizer.convert()
        kept = {row.name for row in quantizer.ledger if row.fate == "kept" and row.persistent}
        before, after = snapshot(model), snapshot(result)
        changed = sorted(name for name in kept if before[name] != after.get(name))
        expect(not changed, f"the ledger says kept, but changed: {', '.join(changed)}", _COVERED)

    for_all(setup.examples, covered, models())


def _step(quantizer: Quantizer, leads_to: State, call: Callable[[], Any]) -> Any:
    result = call()
    expect(quantizer.state is leads_to, f"the state is {quantizer.state.name}, not {leads_to.name}", _LIFE)
    return result


def _validate_and_save(quantizer: Quantizer, source: object, path: Path) -> None:
    """Validate and verify without a limit on the SQNR."""
    report = _step(quantizer, State.VALIDATED, lambda: quantizer.validate(on_failure="ignore", fail_under=-math.inf))
    expect(report.ok, f"validate found: {'; '.join(report.failures)}", _VALID)
    _step(quantizer, State.VALIDATED, lambda: quantizer.save(path))
    verified = verify(path, source, serializer=quantizer.serializer, fail_under=-math.inf)
    expect(verified.ok, f"verify found: {'; '.join(verified.failures)}", _VALID)


def _is_refused(setup: QuantizerSetup, quantizer: Quantizer, source: Mapping[str, Tensor] | Path) -> bool:
    """Whether the scheme needs data. If so, check that it refuses a source without a forward."""
    if not setup.needs_forward:
        return False
    try:
        quantizer.prepare(source)
    except CalibrationError:
        expect(quantizer.state is State.CREATED, f"a refused prepare leaves state {quantizer.state.name}", _STATE)
    else:
        fail("it needs data, but accepts a source without a forward", _NO_FORWARD)
    return True


def _refuses(quantizer: Quantizer, calls: Mapping[str, Callable[[], object]], there: Path) -> None:
    for name, call in calls.items():
        if quantizer.state in TRANSITIONS[name][0]:
            continue
        before = _visible(quantizer, there)
        try:
            call()
        except StateError:
            expect(_visible(quantizer, there) == before, f"{name}() raises StateError but changes something", _STATE)
        except Exception as error:
            fail(f"{name}() in state {before[0]} raises {type(error).__name__}: {error}", _STATE)
        else:
            fail(f"{name}() works in state {before[0]}", _STATE)


def _visible(quantizer: Quantizer, there: Path) -> tuple[object, ...]:
    ledger = None if quantizer.state is State.CREATED else quantizer.ledger
    return quantizer.state, ledger, files_in(there)
