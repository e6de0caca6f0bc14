"""Each promise of a rounding strategy is checked: a strategy that breaks one fails."""

import pytest
import torch

from fewbits.errors import ArgumentError
from fewbits.extend import QuantParams, encode
from fewbits.rounding import GPTQ, RoundToNearest
from fewbits.testing import ConformanceError, check_rounding


class Written(RoundToNearest):
    def choose(self, weight, spec, params, inputs):
        return super().choose(weight.mul_(1.01), spec, params, inputs)


class WrongScales(RoundToNearest):
    def choose(self, weight, spec, params, inputs):
        params, codes = super().choose(weight, spec, params, inputs)
        return QuantParams(params.scale.double(), params.zero_point), codes


class SignedCodes(RoundToNearest):
    def choose(self, weight, spec, params, inputs):
        params, codes = super().choose(weight, spec, params, inputs)
        return params, codes.to(torch.int16)


class MovesTheScaleOfATensor(RoundToNearest):
    def choose(self, weight, spec, params, inputs):
        return super().choose(weight, spec, QuantParams(params.scale * 1.5, params.zero_point), inputs)


class AlwaysUp(RoundToNearest):
    nearest = False

    def choose(self, weight, spec, params, inputs):
        codes = encode(weight, params, spec)
        return params, codes.clamp(max=2**spec.bits - 2) + 1


class LooksAtOtherRows(RoundToNearest):
    nearest = False

    def choose(self, weight, spec, params, inputs):
        return params, encode(weight + 0.4 * weight.mean(0), params, spec)

    def error(self, weight, decoded, inputs):
        return torch.zeros(len(weight), dtype=torch.float64)


class Random(RoundToNearest):
    nearest = False

    def choose(self, weight, spec, params, inputs):
        return params, encode(weight + torch.rand_like(weight) * weight.abs().max(), params, spec)

    def error(self, weight, decoded, inputs):
        return torch.zeros(len(weight), dtype=torch.float64)


class IgnoresData(RoundToNearest):
    needs = "mean_square"


class SaysNearest(GPTQ):
    nearest = True


class Anonymous(GPTQ):
    def __repr__(self):
        return "the best"


BROKEN = {
    Written: "parameters_and_codes_fit_the_spec",
    WrongScales: "parameters_and_codes_fit_the_spec",
    SignedCodes: "parameters_and_codes_fit_the_spec",
    MovesTheScaleOfATensor: "parameters_and_codes_fit_the_spec",
    AlwaysUp: "no_row_is_worse_than_plain_rounding",
    LooksAtOtherRows: "rows_stand_alone",
    Random: "rows_stand_alone",
    IgnoresData: "needed_data_has_an_effect",
    SaysNearest: "elements_keep_the_bound_of_the_spec",
    Anonymous: "a_model_can_be_quantized_with_it",
}


@pytest.mark.parametrize(("broken", "check"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_promise_is_found_by_its_check(broken, check):
    checks = {str(found): found for found in check_rounding(broken())}
    with pytest.raises(ConformanceError, match=check):
        checks[check]()


def test_only_instances_are_checked():
    with pytest.raises(ArgumentError, match="takes an instance of Rounding"):
        check_rounding(GPTQ)
