"""`check_selector`: whether a selector keeps what `Selector` promises."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import attrs
from torch import nn

from fewbits.errors import ArgumentError, SelectionError
from fewbits.quantizers.schemes import Int8PerChannel
from fewbits.selection.info import TensorInfo
from fewbits.selection.selector import Decision, Selector
from fewbits.sources.open import open_source
from fewbits.testing.check import EXAMPLES, Check, Contract, checks, copy_of, expect, fail, for_all
from fewbits.testing.models import SmallModel, models

_EACH = Contract("fewbits.extend.Selector.select", "One decision for every tensor, in the same order.")
_REASON = Contract("fewbits.extend.Decision", "reason: why, in words for the ledger.")
_FIELDS = Contract("fewbits.extend.Decision", "quantize: whether the scheme is applied to it; otherwise it is kept.")
_RULES = Contract("fewbits.extend.Selector.select", "SelectionError: if a rule fits no tensor.")
_OBSTACLE = Contract("fewbits.extend.Selector.select", "A tensor with an `obstacle` cannot be quantized")
_PURE = Contract("fewbits.testing.check_selector", "The same tensors get the same decisions")
_INFOS = Contract("fewbits.testing.check_selector", "What it is told is not changed.")
_LEDGER = Contract("fewbits.Quantizer.ledger", "The fate of every tensor, known once a source is prepared.")


@attrs.frozen
class _Setup:
    recipe: Selector
    model: nn.Module
    examples: int

    def make(self) -> Selector:
        return copy.deepcopy(self.recipe)

    def infos(self) -> tuple[TensorInfo, ...]:
        """What is known of the model's tensors."""
        return open_source(self.model, inplace=False).infos

    def select(self) -> Sequence[Decision]:
        """The decisions on the model.

        Raises:
            ConformanceError: if its rules do not go with the model.
        """
        try:
            return self.make().select(self.infos())
        except SelectionError as error:
            fail(f"its rules do not fit this model, pass one that they fit as model=: {error}", _RULES)


def check_selector(selector: Selector, *, model: nn.Module | None = None, max_examples: int = EXAMPLES) -> list[Check]:
    """The checks of a selector.

    What is asked beyond the docstrings of `Selector`:

    - The same tensors get the same decisions, whatever was decided before.
    - What it is told is not changed.
    - Of tensors that its rules do not fit it says so with a `SelectionError`, and with no other error.

    Args:
        selector: newly made.
        model: one that its rules fit; None stands for `SmallModel`.
        max_examples: how many examples a check that draws them looks at.

    Raises:
        ArgumentError: if `selector` is no instance of `Selector`, or `model` no model.
    """
    if not isinstance(model, (nn.Module, type(None))):
        raise ArgumentError(f"model= takes a model, not a {type(model).__name__}")
    setup = _Setup(copy_of(selector, Selector, "check_selector"), model or SmallModel(), max_examples)
    return checks(selector, _CHECKS, setup)


def every_tensor_gets_a_decision(setup: _Setup) -> None:
    """One `Decision` for each tensor of the model, with a reason in words."""
    _check_decisions(setup.select(), setup.infos())


def any_tensors_get_decisions_or_an_error(setup: _Setup) -> None:
    """The tensors of any model, with classes and without, get decisions, or a `SelectionError`."""

    def decided(model: nn.Module) -> None:
        infos = open_source(model, inplace=False).infos
        without_classes = open_source(dict(model.state_dict()), inplace=False).infos
        for told in (infos, without_classes, list(infos[:1]), ()):
            try:
                decisions = setup.make().select(told)
            except SelectionError:
                continue
            _check_decisions(decisions, told)

    for_all(setup.examples, decided, models())


def decisions_are_reproducible(setup: _Setup) -> None:
    """Asked again, and asked about other tensors in between, it decides the same."""
    selector, infos, expected = setup.make(), setup.infos(), list(setup.select())
    expect(list(selector.select(infos)) == expected, "another copy decides otherwise", _PURE)
    expect(list(selector.select(infos)) == expected, "asked a second time, it decides otherwise", _PURE)
    try:
        selector.select(infos[:1])
    except SelectionError as error:
        expect(str(error) != "", "the error of a rule that does not fit has no message", _RULES)
    expect(list(selector.select(infos)) == expected, "asked about others in between, it decides otherwise", _PURE)


def what_it_is_told_stays(setup: _Setup) -> None:
    """Neither the sequence nor what is in it is changed, and any sequence will do."""
    expected = list(setup.select())
    told = list(setup.infos())
    found = list(setup.make().select(told))
    expect(told == list(setup.infos()), "the list of tensors that it was given has changed", _INFOS)
    expect(found == expected, "it decides otherwise on a list than on a tuple", _PURE)


def the_ledger_covers_everything(setup: _Setup) -> None:
    """A quantizer makes a ledger of its decisions, in which every tensor has its row."""
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
    expect(isinstance(decisions, Sequence), f"select returned a {type(decisions).__name__}, no sequence", _EACH)
    expect(len(decisions) == len(infos), f"{len(decisions)} decisions for {len(infos)} tensors", _EACH)
    for info, decision in zip(infos, decisions, strict=True):
        expect(isinstance(decision, Decision), f"for {info.name} there is {decision!r}, no Decision", _EACH)
        reason = decision.reason
        expect(isinstance(reason, str) and reason.strip() != "", f"the reason for {info.name} is {reason!r}", _REASON)
        flags = {"quantize": decision.quantize, "named": decision.named}
        wrong = {name: value for name, value in flags.items() if not isinstance(value, bool)}
        expect(not wrong, f"of the decision on {info.name}, not True or False: {wrong}", _FIELDS)


_CHECKS: tuple[Callable[[_Setup], None], ...] = (
    every_tensor_gets_a_decision,
    any_tensors_get_decisions_or_an_error,
    decisions_are_reproducible,
    what_it_is_told_stays,
    the_ledger_covers_everything,
)
