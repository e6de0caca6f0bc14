"""Kernels that are wrong in one way each, and the check that finds it."""

import attrs
import pytest
import torch
import torch.nn.functional as F
from caught import caught, covered

from fewbits.extend import Kernel
from fewbits.kernels.int8_rows import Int8Rows
from fewbits.kernels.integers import FloatSums
from fewbits.kernels.reference import Reference
from fewbits.kernels.tracing import is_traced
from fewbits.kernels.weight_layouts import PackedInt32
from fewbits.testing import check_kernel
from fewbits.testing.kernel_outputs import as_multiplied, decoded


class Right(Reference):
    name = "right"


class SupportsNothing(Right):
    def supports(self, weight):
        return "not today"


class TakesNothing(Right):
    def takes(self, x, rows, weight):
        return "not today"


class AnswersFalse(Right):
    def supports(self, weight):
        return False


class GivesNoReason(Right):
    def takes(self, x, rows, weight):
        return "" if rows > 1 else None


class OnBytes(Kernel):
    """Right where it says that it is: a kernel need not support everything."""

    name = "on_bytes"
    weight_layout = Int8Rows

    def supports(self, weight):
        return Int8Rows.refuses(weight)

    def takes(self, x, rows, weight):
        return None if x.dtype == torch.float32 else f"it computes in float32, not {x.dtype}"

    def linear(self, x, weight):
        return F.linear(x, weight.dequantize(x.dtype))


class WantsWords(OnBytes):
    def supports(self, weight):
        return super().supports(weight) or (None if isinstance(weight, PackedInt32) else "it is no words")


class PrepacksNothing(OnBytes):
    def prepack(self, weight, *, reuse_memory=False):
        return weight


class NoLowestCode(OnBytes):
    """Takes -127 for -128, as symmetric int8 often does."""

    def prepack(self, weight, *, reuse_memory=False):
        layout = super().prepack(weight, reuse_memory=reuse_memory)
        return attrs.evolve(layout, signed=layout.signed.clamp(min=-127))


class LosesTheScale(OnBytes):
    def prepack(self, weight, *, reuse_memory=False):
        layout = super().prepack(weight, reuse_memory=reuse_memory)
        return attrs.evolve(layout, scale=layout.scale / 2)


class PrepacksInPlace(OnBytes):
    def prepack(self, weight, *, reuse_memory=False):
        weight.scale.mul_(2).div_(4)
        return super().prepack(weight, reuse_memory=reuse_memory)


class WritesOverTooMuch(OnBytes):
    """Right unless it may write over the words."""

    def prepack(self, weight, *, reuse_memory=False):
        if reuse_memory:
            weight.packed.zero_()
        return super().prepack(weight)


class RoundsWeightsAgain(OnBytes):
    def linear(self, x, weight):
        return F.linear(x, weight.dequantize(torch.float32).to(torch.float8_e4m3fn).to(x.dtype))


class AlwaysFloat64(Right):
    def linear(self, x, weight):
        return super().linear(x, weight).double()


class Flattens(Right):
    def linear(self, x, weight):
        return super().linear(x, weight).flatten()


class InBlocksOfEight(OnBytes):
    """Leaves out the columns that do not fill a block."""

    def linear(self, x, weight):
        whole = x.shape[-1] // 8 * 8 or x.shape[-1]
        return F.linear(x[..., :whole], weight.dequantize(x.dtype)[:, :whole])


class TakesNoughtForOne(OnBytes):
    """One code in many: too little to be heard, and within the bound of a long sum."""

    def linear(self, x, weight):
        dense = weight.dequantize(x.dtype)
        dense[-1, -1] += weight.params(slice(None)).scale.flatten()[-1]
        return F.linear(x, dense)


class OffByOne(FloatSums):
    def linear(self, x, weight):
        return super().linear(x, attrs.evolve(weight, signed=weight.signed.clamp(min=-127)))


class SumsInFloat16(Right):
    def linear(self, x, weight):
        output = super().linear(x, weight)
        return output if weight.spec.activations is None else output.half().to(x.dtype)


class RoundsWeightsTooMuch(Right):
    rounds_inputs = rounds_weights = True

    def linear(self, x, weight):
        dense = decoded(weight)
        step = dense.abs().amax(1, keepdim=True) / 31
        return (as_multiplied(weight, x, rounds=True) @ (dense / step).round().mul(step).t()).float()


class InPlace(Right):
    def linear(self, x, weight):
        output = super().linear(x, weight)
        x.mul_(0.5)
        return output


class WeightInPlace(OnBytes):
    def linear(self, x, weight):
        output = super().linear(x, weight)
        weight.signed.neg_()
        return output


class Noisy(Right):
    def linear(self, x, weight):
        output = super().linear(x, weight)
        return output * (1 + 2 * torch.finfo(x.dtype).eps * torch.randint(0, 2, output.shape, dtype=x.dtype))


class WantsContiguous(Right):
    def linear(self, x, weight):
        return super().linear(torch.as_strided(x, x.shape, torch.empty(x.shape).stride()), weight)


class RefusesWhatItLetsTrace(OnBytes):
    def takes(self, x, rows, weight):
        return f"{rows} rows are more than 4" if rows > 4 else super().takes(x, rows, weight)

    def traced_rows(self, weight):
        return 5


class LeavesTheGraph(OnBytes):
    def traced_rows(self, weight):
        return 5

    def linear(self, x, weight):
        return super().linear(x, weight) * (1 if float(x.sum()) < 1e30 else 0)


class KnowsTheCompiler(OnBytes):
    def traced_rows(self, weight):
        return 5

    def traced(self, x, weight):
        return super().traced(x, weight) * (2 if is_traced(x) else 1)


class TracesSomethingElse(OnBytes):
    def traced_rows(self, weight):
        return 5

    def traced(self, x, weight):
        return self.linear(x, weight) * 1.1


CASES = [
    pytest.param(SupportsNothing, "prepacking_loses_nothing", "it accepts none of the weights", id="nothing"),
    pytest.param(TakesNothing, "prepacking_loses_nothing", "it accepts none of the weights", id="no-input"),
    pytest.param(AnswersFalse, "prepacking_loses_nothing", "returns False, neither None nor a reason", id="false"),
    pytest.param(GivesNoReason, "prepacking_loses_nothing", "returns '', neither None nor a reason", id="no-reason"),
    pytest.param(
        WantsWords, "prepacking_loses_nothing", "once prepacked, supports.. returns 'it is no words'", id="only-words"
    ),
    pytest.param(PrepacksNothing, "prepacking_loses_nothing", "prepacked as PackedInt32, not Int8Rows", id="no-form"),
    pytest.param(NoLowestCode, "prepacking_loses_nothing", "gives another value back", id="lost-code"),
    pytest.param(LosesTheScale, "prepacking_loses_nothing", "gives another value back", id="lost-scale"),
    pytest.param(PrepacksInPlace, "prepacking_loses_nothing", "changed the given weight", id="prepacks-in-place"),
    pytest.param(WritesOverTooMuch, "prepacking_loses_nothing", "gives another value back", id="written-over"),
    pytest.param(RoundsWeightsAgain, "outputs_are_accurate", "dB against float64", id="rounds-again"),
    pytest.param(AlwaysFloat64, "any_size_is_computed", "has shape .* in float64", id="float64"),
    pytest.param(Flattens, "any_size_is_computed", "the output has shape", id="flattens"),
    pytest.param(InBlocksOfEight, "any_size_is_computed", "exceeds the allowed rounding by", id="blocks"),
    pytest.param(TakesNoughtForOne, "every_code_is_read_right", "a code is read as another code", id="one-code"),
    pytest.param(OffByOne, "integer_sums_are_exact", "differs from that of the reference", id="off-by-one"),
    pytest.param(SumsInFloat16, "integer_sums_are_exact", "differs from that of the reference", id="float16-sums"),
    pytest.param(RoundsWeightsTooMuch, "rounded_weights_are_near", "exceeds the allowed rounding", id="too-coarse"),
    pytest.param(InPlace, "outputs_are_reproducible", "an argument has changed", id="in-place"),
    pytest.param(WeightInPlace, "outputs_are_reproducible", "an argument has changed", id="weight-in-place"),
    pytest.param(Noisy, "outputs_are_reproducible", "other bits", id="noisy"),
    pytest.param(RefusesWhatItLetsTrace, "compilers_trace_few_rows", "but it refuses the input", id="refuses-traced"),
    pytest.param(LeavesTheGraph, "compilers_trace_few_rows", "torch.compile cannot trace", id="leaves-the-graph"),
    pytest.param(KnowsTheCompiler, "compilers_trace_few_rows", "other bits when compiled", id="knows-the-compiler"),
    pytest.param(TracesSomethingElse, "any_size_is_computed", "exceeds the allowed rounding by", id="traces-else"),
    pytest.param(WantsContiguous, "outputs_are_reproducible", "exceeds the allowed rounding|other bits", id="strides"),
]


@pytest.mark.usefixtures("first_failure")
@pytest.mark.parametrize(("make", "name", "match"), CASES)
def test_the_fault_is_found(make, name, match):
    caught(check_kernel(make(), max_examples=60), name, match)


def test_every_check_fails_for_some_fault():
    covered(check_kernel(Right()), CASES)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [Right(), OnBytes(), FloatSums()], ids=lambda kernel: kernel.name)
def test_the_kernels_pass_without_their_faults(kernel):
    for check in check_kernel(kernel):
        check()


@pytest.mark.parametrize(("make", "expected"), [(OnBytes, {None}), (FloatSums, {None, "dynamic", "static"})])
def test_only_kernels_that_round_inputs_get_specs_with_int8_inputs(make, expected):
    asked = set()

    class Asks(make):
        def supports(self, weight):
            asked.add((weight.spec.activations, weight.spec.symmetric))
            return super().supports(weight)

    check_kernel(Asks())[0]()
    assert {activations for activations, _ in asked} == expected
    assert {symmetric for _, symmetric in asked} == {True, False}
