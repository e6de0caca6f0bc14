"""Selectors that are wrong in one way each, and the check that finds it."""

import pytest
from caught import caught, covered

from fewbits import LayerSelector
from fewbits.extend import Decision
from fewbits.testing import check_selector


class Everything(LayerSelector):
    def select(self, infos):
        return [Decision(True, "everything") for _ in infos]


class ParametersOnly(LayerSelector):
    def select(self, infos):
        return [Decision(True, "a parameter") for info in infos if info.kind == "parameter"]


class WithoutReasons(LayerSelector):
    def select(self, infos):
        return [Decision(True, "") for _ in infos]


class NoBooleans(LayerSelector):
    def select(self, infos):
        return [Decision(1, "one") for _ in infos]


class BareBooleans(LayerSelector):
    def select(self, infos):
        return [True for _ in infos]


class AGenerator(LayerSelector):
    def select(self, infos):
        return (Decision(True, "everything") for _ in infos)


class KnowsClasses(LayerSelector):
    def select(self, infos):
        return [Decision(info.owner.__name__ == "Linear", f"a {info.owner.__name__}") for info in infos]


class OnlyOnce(LayerSelector):
    asked = 0

    def select(self, infos):
        self.asked += 1
        return [Decision(self.asked == 1, f"call {self.asked}") for _ in infos]


class Remembers(LayerSelector):
    largest = 0

    def select(self, infos):
        self.largest = len(infos) if self.largest in (0, len(infos)) else -1
        return [Decision(True, f"one of {self.largest}") for _ in infos]


class SortsInPlace(LayerSelector):
    def select(self, infos):
        if isinstance(infos, list):
            infos.sort(key=lambda info: info.elements)
        return [Decision(True, "everything") for _ in infos]


class ByName(LayerSelector):
    """Has contradictory wishes for names that share a weight."""

    def select(self, infos):
        return [Decision("second" not in info.name, f"called {info.name}", named=True) for info in infos]


CASES = [
    pytest.param(ParametersOnly, "every_tensor_gets_a_decision", r"\d+ decisions for \d+ tensors", id="too-few"),
    pytest.param(WithoutReasons, "every_tensor_gets_a_decision", "the reason for .* is ''", id="without-reasons"),
    pytest.param(NoBooleans, "every_tensor_gets_a_decision", "not True or False: .*quantize", id="no-booleans"),
    pytest.param(BareBooleans, "every_tensor_gets_a_decision", "True, not a Decision", id="bare-booleans"),
    pytest.param(AGenerator, "every_tensor_gets_a_decision", "a generator, not a sequence", id="a-generator"),
    pytest.param(KnowsClasses, "any_tensors_get_decisions_or_an_error", "AttributeError", id="knows-classes"),
    pytest.param(OnlyOnce, "decisions_are_reproducible", "a second call decides otherwise", id="only-once"),
    pytest.param(Remembers, "decisions_are_reproducible", "a call for other tensors changes", id="remembers"),
    pytest.param(
        SortsInPlace, "decisions_are_reproducible", "it changes the list of descriptions", id="sorts-in-place"
    ),
    pytest.param(ByName, "the_ledger_covers_everything", "one storage, two fates", id="by-name"),
]


@pytest.mark.usefixtures("first_failure")
@pytest.mark.parametrize(("make", "name", "match"), CASES)
def test_the_fault_is_found(make, name, match):
    caught(check_selector(make(), max_examples=60), name, match)


def test_every_check_fails_for_some_fault():
    covered(check_selector(LayerSelector()), CASES)


def test_the_selector_passes_without_its_faults():
    for check in check_selector(Everything()):
        check()
