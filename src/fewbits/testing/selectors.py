"""`check_selector`: check a selector against the promises of its interface."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import attrs
from torch import nn

from fewbits.errors import ArgumentError, SelectionError
from fewbits.quantizers.schemes import Int8PerChannel
from fewbits.selection.info import TensorInfo
from fewbits.selection.selector import Decision, LayerSelector
from fewbits.sources.open import open_source
from fewbits.testing.check import EXAMPLES, Check, Contract, check_functions, checks, copy_of, expect, fail, for_all
from fewbits.testing.models import SmallModel, models

_EACH = Contract("fewbits.LayerSelector.select", "One decision for every tensor, in the same order.")
_REASON = Contract("fewbits.extend.Decision", "reason: the reason that the ledger shows.")
_FIELDS = Contract("fewbits.extend.Decision", "quantize: True to quantize the tensor, False to keep it.")
_RULES = Contract("fewbits.LayerSelector.select", "SelectionError: if a rule fits no tensor.")
_OBSTACLE = Contract("fewbits.LayerSelector.select", "A tensor with an `obstacle` cannot be quantized")
_PURE = Contract("fewbits.testing.check_selector", "The same tensors get the same decisions")
_INFOS = Contract("fewbits.testing.check_selector", "The descriptions of the tensors do not change.")
_LEDGER = Contract("fewbits.Quantizer.ledger", "The fate of every tensor.")


@attrs.frozen
class _Setup:
    recipe: LayerSelector
    model: nn.Module
    examples: int

    def make(self) -> LayerSelector:
        return copy.deepcopy(self.recipe)

    def infos(self) -> tuple[TensorInfo, ...]:
        """Describe the tensors of the model."""
        return open_source(self.model, inplace=False).infos

    def select(self) -> Sequence[Decision]:
        """Decide on the tensors of the model.

        Raises:
            ConformanceError: if its rules do not fit the model.
        """
        try:
            return self.make().select(self.infos())
        except SelectionError as error:
            fail(f"its rules do not fit this model; pass a model that they fit as model=: {error}", _RULES)


def check_selector(
    selector: LayerSelector, *, model: nn.Module | None = None, max_examples: int = EXAMPLES
) -> list[Check]:
    """Make the checks of a selector.

    Beyond the docstrings of the selector, the checks require:

    - The same tensors get the same decisions, independent of earlier calls.
    - The descriptions of the tensors do not change.
    - Rules that do not fit the tensors raise a `SelectionError`, and no other error.

    Args:
        selector: a new selector.
        model: a model that its rules fit; `SmallModel` by default.
        max_examples: number of examples that a check draws.

    Raises:
        ArgumentError: if `selector` is not an instance of `LayerSelector`, or `model` is not a module.
    """
    if not isinstance(model, (nn.Module, type(None))):
        raise ArgumentError(f"model= takes a model, not a {type(model).__name__}")
    setup = _Setup(copy_of(selector, LayerSelector, "check_selector"), model or SmallModel(), max_examples)
    return checks(selector, check_functions(__name__), setup)


def every_tensor_gets_a_decision(setup: _Setup) -> None:
    """Each tensor of the model gets one `Decision` with a reason."""
    _check_decisions(setup.select(), setup.infos())


def any_tensors_get_decisions_or_an_error(setup: _Setup) -> None:
    """The tensors of any model, with classes and without, get decisions, or a `SelectionError`."""

    def decided(model: nn.Module) -> None:
        infos = open_source(model, inplace=False).infos
        without_classes = open_source(dict(model.state_dict()), inplace=False).infos
        for given in (infos, without_classes, list(infos[:1]), ()):
            try:
                decisions = setup.make().select(given)
            except SelectionError:
                continue
            _check_decisions(decisions, given)

    for_all(setup.examples, decided, models())


def decisions_are_reproducible(setup: _Setup) -> None:
    """A second call, also after a call for other tensors, gives the same decisions."""
    selector, infos, expected = setup.make(), setup.infos(), list(setup.select())
    expect(list(selector.select(infos)) == expected, "another copy decides otherwise", _PURE)
    expect(list(selector.select(infos)) == expected, "a second call decides otherwise", _PURE)
    try:
        selector.select(infos[:1])
    except SelectionError as error:
        expect(str(error) != "", "the error of a rule that does not fit has no message", _RULES)
    expect(list(selector.select(infos)) == expected, "a call for other tensors changes its decisions", _PURE)


def the_descriptions_stay(setup: _Setup) -> None:
    """The sequence of descriptions does not change, and any sequence works."""
    expected = list(setup.select())
    given = list(setup.infos())
    found = list(setup.make().select(given))
    expect(given == list(setup.infos()), "it changes the list of descriptions", _INFOS)
    expect(found == expected, "it decides otherwise on a list than on a tuple", _PURE)


def the_ledger_covers_everything(setup: _Setup) -> None:
    """The ledger of a quantizer has a row for every tensor, as the selector decided."""
    infos, decisions = setup.infos(), setup.select()
    quantizer = Int8PerChannel(selector=setup.make())
    quantizer.prepare(setup.model)
    names = [row.name for row in quantizer.ledger]
    expect(names == [info.name for info in infos], f"the ledger has the rows {names}", _LEDGER)
    for info, decision in zip(infos, decisions, strict=True):
        row = quantizer.ledger[quantizer.ledger[info.name].holder]
        expect(row.reason != "", f"{info.name} has no reason in the ledger", _REASON)
        if info.obstacle is not None:
            expect(row.fate == "kept", f"{info.name} is {row.fate}, although: {info.obstacle}", _OBSTACLE)
        elif decision.named and not decision.quantize:
            expect(row.fate == "kept", f"{info.name} is {row.fate}, although: {decision.reason}", _FIELDS)


def _check_decisions(decisions: Sequence[Decision], infos: Sequence[TensorInfo]) -> None:
    expect(isinstance(decisions, Sequence), f"select returns a {type(decisions).__name__}, not a sequence", _EACH)
    expect(len(decisions) == len(infos), f"{len(decisions)} decisions for {len(infos)} tensors", _EACH)
    for info, decision in zip(infos, decisions, strict=True):
        expect(isinstance(decision, Decision), f"for {info.name} it returns {decision!r}, not a Decision", _EACH)
        reason = decision.reason
        expect(isinstance(reason, str) and reason.strip() != "", f"the reason for {info.name} is {reason!r}", _REASON)
        flags = {"quantize": decision.quantize, "named": decision.named}
        wrong = {name: value for name, value in flags.items() if not isinstance(value, bool)}
        expect(not wrong, f"the decision on {info.name} has fields that are not True or False: {wrong}", _FIELDS)
