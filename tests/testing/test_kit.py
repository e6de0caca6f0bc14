"""Checks: their names and messages, and the state that they leave unchanged."""

import copy
import re
import subprocess
import sys

import pytest
import torch

import fewbits
import fewbits.testing
from fewbits import FewbitsError, Int8PerChannel, MinMaxObserver
from fewbits.errors import ArgumentError
from fewbits.extend import SafetensorsSerializer
from fewbits.kernels.reference import Reference
from fewbits.rounding import GPTQ
from fewbits.testing import (
    Check,
    ConformanceError,
    check_kernel,
    check_module,
    check_observer,
    check_quantizer,
    check_rounding,
    check_selector,
    check_serializer,
)
from fewbits.testing.check import fail

ALL = (check_quantizer, check_observer, check_rounding, check_selector, check_serializer, check_kernel)


CHECKS = [
    *check_quantizer(Int8PerChannel()),
    *check_observer(MinMaxObserver()),
    *check_rounding(GPTQ()),
    *check_selector(fewbits.LayerSelector()),
    *check_serializer(SafetensorsSerializer()),
    *check_kernel(Reference()),
    *check_module(torch.nn.Linear(64, 8), torch.zeros(1, 64)),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: f"{check.subject}-{check}")
def test_every_check_states_its_promise(check):
    assert re.fullmatch(r"[A-Z`].*\.", check.promise, re.DOTALL)


def test_checks_have_names_of_their_own():
    names = [str(check) for check in check_quantizer(Int8PerChannel())]
    assert len(names) == len(set(names)) > 10
    assert all(re.fullmatch(r"[a-z_]+", name) for name in names)


def test_a_failed_check_names_the_fault_and_the_promise():
    check = Check("some_name", "MyObserver", "Scales are not zero.", lambda: fail("the scale is 0"))
    with pytest.raises(ConformanceError) as caught:
        check()
    assert str(caught.value) == "MyObserver, some_name: the scale is 0\n    Promise: Scales are not zero."
    assert isinstance(caught.value, AssertionError)
    assert isinstance(caught.value, FewbitsError)


def test_any_other_error_is_a_failure_with_its_cause():
    def breaks():
        raise KeyError("scale")

    with pytest.raises(ConformanceError, match="MyObserver, some_name: KeyError: 'scale'") as caught:
        Check("some_name", "MyObserver", "Scales are not zero.", breaks)()
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("function", ALL, ids=lambda function: function.__name__)
@pytest.mark.parametrize("given", [Int8PerChannel, object(), None], ids=["class", "object", "None"])
def test_other_objects_than_instances_of_the_interface_are_refused(function, given):
    with pytest.raises(ArgumentError, match=f"{function.__name__} takes an instance of"):
        function(given)


def test_a_selector_is_checked_on_models_only():
    with pytest.raises(ArgumentError, match="model= takes a model"):
        check_selector(fewbits.LayerSelector(), model={"weight": torch.ones(2, 2)})


def test_rules_that_do_not_fit_the_model_ask_for_another_model():
    checks = check_selector(fewbits.LayerSelector(include=["layers"]))
    with pytest.raises(ConformanceError, match="pass a model that they fit as model="):
        checks[0]()


def test_checks_use_a_copy_of_the_strategy():
    class Counts(MinMaxObserver):
        calls = 0

        def observe_weight(self, weight, spec):
            self.calls += 1
            return super().observe_weight(weight, spec)

    given = Counts()
    checks = {str(check): check for check in check_observer(given)}
    checks["rows_stand_alone"]()
    checks["a_model_can_be_quantized_with_it"]()
    assert given.calls == 0


def test_max_examples_sets_the_number_of_examples():
    seen = []

    class Shows(MinMaxObserver):
        def observe_weight(self, weight, spec):
            seen.append(spec)
            return super().observe_weight(weight, spec)

    counts = []
    for examples in (3, 30):
        seen.clear()
        check_observer(Shows(), max_examples=examples)[0]()
        counts.append(len(seen))
    assert 3 <= counts[0] < 30 <= counts[1]


def test_an_observer_can_be_checked_for_some_specs_only():
    class Symmetric(MinMaxObserver):
        def observe_weight(self, weight, spec):
            if not spec.symmetric:
                raise NotImplementedError
            return super().observe_weight(weight, spec)

    for check in check_observer(Symmetric(), specs=fewbits.testing.specs(symmetric=True)):
        check()
    with pytest.raises(ConformanceError, match="NotImplementedError"):
        check_observer(Symmetric())[0]()


def test_threads_blocks_and_modules_are_restored():
    from fewbits.numerics import layout

    before = torch.get_num_threads(), layout.BLOCK_ELEMENTS, sys.modules[__name__]
    checks = {str(check): check for check in check_quantizer(fewbits.Int4Grouped(32))}
    checks["results_are_reproducible"]()
    checks["files_give_back_every_bit"]()
    assert (torch.get_num_threads(), layout.BLOCK_ELEMENTS, sys.modules[__name__]) == before


def test_a_small_model_has_the_documented_parts():
    model = fewbits.testing.SmallModel()
    assert model.lm_head.weight is model.embed_tokens.weight
    assert model.second.weight is model.first.weight
    assert model.again is model.up
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    other = copy.deepcopy(model)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids), other(ids))
    assert not torch.equal(model(ids), fewbits.testing.SmallModel(seed=1)(ids))


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_without_hypothesis_the_error_names_the_extra():
    done = python("import sys; sys.modules['hypothesis'] = None; import fewbits; import fewbits.testing")
    assert done.returncode != 0
    assert "ModuleNotFoundError: fewbits.testing needs hypothesis: pip install 'fewbits[testing]'" in done.stderr


def test_importing_fewbits_does_not_import_the_kit():
    done = python("import sys, fewbits; assert not {'hypothesis', 'fewbits.testing'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr
