"""`check_selector`: check a selector against the promises of its interface."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from torch import nn

from fewbits.errors import ArgumentError, SelectionError
from fewbits.quantizers.schemes import Int8PerChannel
from fewbits.selection.info import TensorInfo
from fewbits.selection.selector import Decision, LayerSelector
from fewbits.sources.open import open_source
from fewbits.testing.check import EXAMPLES, Check, Setup, checks_of, copy_of, expect, fail, for_all
from fewbits.testing.models import SmallModel, models


@attrs.frozen
class SelectorSetup(Setup[LayerSelector]):
    """A selector to check.

    Attributes:
        model: A model that the rules of the selector fit.
    """

    model: nn.Module

    def infos(self) -> tuple[TensorInfo, ...]:
        """Describe the tensors of the model."""
        return open_source(self.model, inplace=False).infos

    def select(self) -> list[Decision]:
        """Let a copy of the selector decide on the model's tensors, and check the form of its decisions.

        Raises:
            ConformanceError: if the selector raises `SelectionError` for this model, or does not return one well-formed
                `Decision` for each tensor.
        """
        infos = self.infos()
        try:
            decisions = self.make().select(infos)
        except SelectionError as error:
            fail(f"its rules do not fit this model; pass a model that they fit as model=: {error}")
        _check_decisions(decisions, infos)
        return list(decisions)


def check_selector(
    selector: LayerSelector, *, model: nn.Module | None = None, max_examples: int = EXAMPLES
) -> list[Check]:
    """Make the checks of a selector.

    Beyond the docstrings of the selector, the checks require:

    - The same tensors get the same decisions, independent of earlier calls.
    - The descriptions of the tensors do not change.
    - Rules that do not fit the tensors raise a `SelectionError`, and no other error.

    Args:
        selector: A new selector.
        model: A model that its rules fit; `SmallModel` by default.
        max_examples: The number of examples that a check draws.

    Raises:
        ArgumentError: if `selector` is not an instance of `LayerSelector`, or `model` is not a module.
    """
    if not isinstance(model, (nn.Module, type(None))):
        raise ArgumentError(f"model= takes a model, not a {type(model).__name__}")
    setup = SelectorSetup(copy_of(selector, LayerSelector, "check_selector"), max_examples, model or SmallModel())
    return checks_of(setup, __name__)


def every_tensor_gets_a_decision(setup: SelectorSetup) -> None:
    """`LayerSelector.select` returns one `Decision` with a reason for every tensor of the model, in order."""
    setup.select()


def any_tensors_get_decisions_or_an_error(setup: SelectorSetup) -> None:
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


def decisions_are_reproducible(setup: SelectorSetup) -> None:
    """A second call, also after a call for other tensors, gives the same decisions.

    The sequence of descriptions does not change, and any sequence works.
    """
    selector, infos, expected = setup.make(), setup.infos(), setup.select()
    expect(list(selector.select(infos)) == expected, "another copy decides otherwise")
    expect(list(selector.select(infos)) == expected, "a second call decides otherwise")
    try:
        selector.select(infos[:1])
    except SelectionError as error:
        expect(str(error) != "", "the error of a rule that does not fit has no message")
    expect(list(selector.select(infos)) == expected, "a call for other tensors changes its decisions")
    given = list(infos)
    found = list(setup.make().select(given))
    expect(given == list(setup.infos()), "it changes the list of descriptions")
    expect(found == expected, "it decides otherwise on a list than on a tuple")


def the_ledger_covers_everything(setup: SelectorSetup) -> None:
    """`Quantizer.ledger` has a row for every tensor, as the selector decided; a tensor with an `obstacle` is kept."""
    infos, decisions = setup.infos(), setup.select()
    quantizer = Int8PerChannel(selector=setup.make())
    quantizer.prepare(setup.model)
    names = [row.name for row in quantizer.ledger]
    expect(names == [info.name for info in infos], f"the ledger has the rows {names}")
    for info, decision in zip(infos, decisions, strict=True):
        row = quantizer.ledger[quantizer.ledger[info.name].holder]
        expect(row.reason != "", f"{info.name} has no reason in the ledger")
        unwanted = decision.reason if decision.named and not decision.quantize else None
        why = info.obstacle or unwanted
        expect(why is None or row.fate == "kept", f"{info.name} is {row.fate}, although: {why}")


def _check_decisions(decisions: Sequence[Decision], infos: Sequence[TensorInfo]) -> None:
    expect(isinstance(decisions, Sequence), f"select returns a {type(decisions).__name__}, not a sequence")
    expect(len(decisions) == len(infos), f"{len(decisions)} decisions for {len(infos)} tensors")
    for info, decision in zip(infos, decisions, strict=True):
        expect(isinstance(decision, Decision), f"for {info.name} it returns {decision!r}, not a Decision")
        reason = decision.reason
        expect(isinstance(reason, str) and reason.strip() != "", f"the reason for {info.name} is {reason!r}")
        wrong = {name: flag for name in ("quantize", "named") if not isinstance(flag := getattr(decision, name), bool)}
        expect(not wrong, f"the decision on {info.name} has fields that are not True or False: {wrong}")
