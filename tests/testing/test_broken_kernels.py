"""Kernels that are wrong in one way each, and the check that finds it."""

import pytest
import torch
import torch.nn.functional as F
from caught import caught, covered

from fewbits import Kernel, QuantSpec
from fewbits.kernels.reference import Reference, rounds_inputs
from fewbits.testing import check_kernel


class Right(Reference):
    name = "right"


class SupportsNothing(Right):
    def supports(self, weight, x):
        return "not today"


class AnswersFalse(Right):
    def supports(self, weight, x):
        return False


class GivesNoReason(Right):
    def supports(self, weight, x):
        return "" if rounds_inputs(weight) else None


class FloatsOnly(Kernel):
    """Right where it says that it is: a kernel need not support everything."""

    name = "floats"

    def supports(self, weight, x):
        if rounds_inputs(weight):
            return "it does not round inputs"
        return None if x.dtype == torch.float32 else f"it computes in float32, not {x.dtype}"

    def linear(self, x, weight, bias):
        return F.linear(x, weight.operand(x.dtype), bias)


class RoundsWeightsAgain(FloatsOnly):
    def linear(self, x, weight, bias):
        return F.linear(x, weight.operand(torch.float32).to(torch.float8_e4m3fn).to(x.dtype), bias)


class AlwaysFloat32(Right):
    def linear(self, x, weight, bias):
        return super().linear(x, weight, bias).float()


class ForgetsTheBias(Right):
    def linear(self, x, weight, bias):
        return super().linear(x, weight, None)


class Flattens(Right):
    def linear(self, x, weight, bias):
        return super().linear(x.reshape(-1, x.shape[-1]), weight, bias)


class InBlocksOfEight(Right):
    """Leaves out the columns that do not fill a block."""

    def linear(self, x, weight, bias):
        whole = x.shape[-1] // 8 * 8 or x.shape[-1]
        if rounds_inputs(weight):
            return super().linear(x, weight, bias)
        return F.linear(x[..., :whole], weight.operand(x.dtype)[:, :whole], bias)


class NoLowestCode(Right):
    """Takes -127 for -128, as symmetric int8 often does."""

    def linear(self, x, weight, bias):
        return super().linear(x, _Clamped(weight) if rounds_inputs(weight) else weight, bias)


class _Clamped:
    def __init__(self, weight):
        self.spec, self.input_scale, self._weight = weight.spec, weight.input_scale, weight

    def steps(self):
        steps, scale = self._weight.steps()
        return steps.clamp(min=-127), scale


class SumsInFloat16(Right):
    def linear(self, x, weight, bias):
        if not rounds_inputs(weight):
            return super().linear(x, weight, bias)
        return super().linear(x.half().to(x.dtype), weight, bias).half().to(x.dtype)


class InPlace(Right):
    def linear(self, x, weight, bias):
        output = super().linear(x, weight, bias)
        x.mul_(0.5)
        return output


class Noisy(Right):
    def linear(self, x, weight, bias):
        output = super().linear(x, weight, bias)
        return output * (1 + 2 * torch.finfo(x.dtype).eps * torch.randint(0, 2, output.shape, dtype=x.dtype))


class WantsContiguous(Right):
    def linear(self, x, weight, bias):
        return super().linear(torch.as_strided(x, x.shape, torch.empty(x.shape).stride()), weight, bias)


CASES = [
    pytest.param(SupportsNothing, "supports_says_why_not", "it supports none of the weights", id="nothing"),
    pytest.param(AnswersFalse, "supports_says_why_not", "it says False, neither None nor words", id="false"),
    pytest.param(GivesNoReason, "supports_says_why_not", "it says '', neither None nor words", id="no-reason"),
    pytest.param(RoundsWeightsAgain, "outputs_are_accurate", "dB against float64", id="rounds-again"),
    pytest.param(AlwaysFloat32, "any_size_is_computed", "has shape .* in float32", id="float32"),
    pytest.param(ForgetsTheBias, "any_size_is_computed", "with bias", id="no-bias"),
    pytest.param(Flattens, "any_size_is_computed", "the output has shape", id="flattens"),
    pytest.param(InBlocksOfEight, "any_size_is_computed", "an element is off by", id="blocks"),
    pytest.param(NoLowestCode, "integer_sums_are_exact", "other bits than the reference", id="off-by-one"),
    pytest.param(SumsInFloat16, "integer_sums_are_exact", "other bits than the reference", id="float16-sums"),
    pytest.param(InPlace, "arguments_stay", "an argument has changed", id="in-place"),
    pytest.param(Noisy, "outputs_are_reproducible", "other bits", id="noisy"),
    pytest.param(WantsContiguous, "outputs_are_reproducible", "an element is off|other bits", id="strides"),
]


@pytest.mark.usefixtures("first_failure")
@pytest.mark.parametrize(("make", "name", "match"), CASES)
def test_it_is_found(make, name, match):
    caught(check_kernel(make(), max_examples=60), name, match)


def test_every_check_is_seen_to_fail():
    covered(check_kernel(Right()), CASES)


@pytest.mark.parametrize("kernel", [Right(), FloatsOnly()], ids=lambda kernel: kernel.name)
def test_the_kernels_that_are_broken_here_are_right_otherwise(kernel):
    for check in check_kernel(kernel):
        check()


def test_int8_inputs_are_among_what_a_kernel_is_tried_on():
    asked = []

    class Asks(Right):
        def supports(self, weight, x):
            asked.append(weight.spec)
            return super().supports(weight, x)

    check_kernel(Asks())[0]()
    found = {(spec.activations, spec.symmetric) for spec in asked if isinstance(spec, QuantSpec)}
    assert found >= {(None, True), (None, False), ("dynamic", True), ("dynamic", False), ("static", True)}
