"""Observers that are wrong in one way each, and the check that finds it."""

import attrs
import pytest
import torch
from caught import caught, covered

from fewbits import MinMaxObserver
from fewbits.errors import CalibrationError
from fewbits.extend import Observer, QuantParams
from fewbits.testing import check_observer


class Plain(Observer):
    """Looks at weights alone."""

    def observe_weight(self, weight, spec):
        return MinMaxObserver().observe_weight(weight, spec)


class InFloat32(Plain):
    def observe_weight(self, weight, spec):
        params = super().observe_weight(weight, spec)
        return attrs.evolve(params, scale=params.scale.float())


class NoZeroPoint(Plain):
    def observe_weight(self, weight, spec):
        return QuantParams(super().observe_weight(weight, spec).scale)


class Refuses(Plain):
    def observe_weight(self, weight, spec):
        if weight.abs().max() > 1:
            from fewbits.errors import RangeError

            raise RangeError("too large for me")
        return super().observe_weight(weight, spec)


class OneScaleForABlock(Plain):
    def observe_weight(self, weight, spec):
        params = super().observe_weight(weight, spec)
        parts = attrs.astuple(params, recurse=False)
        return QuantParams(*(None if part is None else part.amax().expand_as(part) for part in parts))


class Drifts(Plain):
    asked = 0

    def observe_weight(self, weight, spec):
        self.asked += 1
        params = super().observe_weight(weight, spec)
        return attrs.evolve(params, scale=(params.scale * (1 + 0.1 * self.asked)).to(params.scale.dtype))


class ClipsInPlace(Plain):
    def observe_weight(self, weight, spec):
        params = super().observe_weight(weight, spec)
        weight.mul_(0.9)
        return params


class SortsInputs(Plain):
    def observe_input(self, x):
        x.copy_(x.sort(0).values)


class Peaks(Plain):
    """Widens scales by the largest input."""

    needs_data = True
    peak = 0.0

    def observe_input(self, x):
        self.peak = max(self.peak, float(x.abs().max()))

    def observe_weight(self, weight, spec):
        params = super().observe_weight(weight, spec)
        wider = params.scale * (1 + min(self.peak, 10) / 10)
        return params.with_scale(torch.where(torch.isfinite(wider), wider, params.scale), spec)


class NeverForgets(Peaks):
    pass


class RightPeaks(Peaks):
    def reset(self):
        self.peak = 0.0


class GivesItselfAway(RightPeaks):
    def fresh(self):
        return self


class SaysNothing(RightPeaks):
    needs_data = False


class NeedsNothing(Plain):
    needs_data = True


class ZeroForZeros(MinMaxObserver):
    def input_params(self, spec):
        params = super().input_params(spec)
        return attrs.evolve(params, scale=torch.where(params.scale < 1e-30, 0.0, params.scale))


class AScalar(MinMaxObserver):
    def input_params(self, spec):
        params = super().input_params(spec)
        return attrs.evolve(params, scale=params.scale[0])


class NegativeScale(MinMaxObserver):
    def input_params(self, spec):
        params = super().input_params(spec)
        return attrs.evolve(params, scale=-params.scale)


class Guesses(MinMaxObserver):
    def input_params(self, spec):
        try:
            return super().input_params(spec)
        except CalibrationError:
            return QuantParams(torch.ones(1), None if spec.symmetric else torch.zeros(1, dtype=torch.int32))


class MergesNothing(MinMaxObserver):
    def merge(self, other):
        pass


class MergesInto(MinMaxObserver):
    def merge(self, other):
        super().merge(other)
        other._seen = self._seen


class Hoards(MinMaxObserver):
    def observe_input(self, x):
        super().observe_input(x)
        self._batches = [*getattr(self, "_batches", ()), x]

    def reset(self):
        super().reset()
        self._batches = []


class Hundreds(Plain):
    def observe_weight(self, weight, spec):
        params = super().observe_weight(weight, spec)
        return attrs.evolve(params, scale=torch.full_like(params.scale, 100))


CASES = [
    pytest.param(InFloat32, "scales_fit_the_spec", "in float32 for", id="in-float32"),
    pytest.param(NoZeroPoint, "scales_fit_the_spec", "zero point", id="no-zero-point"),
    pytest.param(Refuses, "scales_fit_the_spec", "is refused: too large for me", id="refuses"),
    pytest.param(OneScaleForABlock, "rows_stand_alone", "row by row it gives other scales", id="blocks"),
    pytest.param(Drifts, "rows_stand_alone", "a second call gives other scales", id="drifts"),
    pytest.param(ClipsInPlace, "rows_stand_alone", "is written to", id="writes-to-weights"),
    pytest.param(SortsInputs, "needs_data_is_true", "is written to", id="writes-to-inputs"),
    pytest.param(NeverForgets, "fresh_forgets", "a fresh copy remembers inputs", id="never-forgets"),
    pytest.param(GivesItselfAway, "fresh_forgets", "not a copy", id="no-copy"),
    pytest.param(SaysNothing, "needs_data_is_true", "set needs_data = True", id="says-nothing"),
    pytest.param(NeedsNothing, "needs_data_is_true", "inputs change no scale", id="needs-nothing"),
    pytest.param(ZeroForZeros, "inputs_get_one_positive_scale", "zero, NaN or Inf", id="zero-for-zeros"),
    pytest.param(AScalar, "inputs_get_one_positive_scale", "needs shape", id="a-scalar"),
    pytest.param(NegativeScale, "inputs_get_one_positive_scale", "the scale of inputs is -", id="negative"),
    pytest.param(Guesses, "inputs_get_one_positive_scale", "before it has seen any", id="guesses"),
    pytest.param(MergesNothing, "merging_equals_seeing_all", "merged it gives", id="merges-nothing"),
    pytest.param(MergesInto, "merging_equals_seeing_all", "changes its argument", id="merges-into"),
    pytest.param(Hoards, "it_keeps_little", "bytes after 200", id="hoards"),
    pytest.param(Hundreds, "it_is_of_use", "normal weights in", id="hundreds"),
    pytest.param(InFloat32, "a_model_can_be_quantized_with_it", "NumericsError: .*bfloat16", id="no-model"),
]


@pytest.mark.usefixtures("first_failure")
@pytest.mark.parametrize(("make", "name", "match"), CASES)
def test_the_fault_is_found(make, name, match):
    caught(check_observer(make(), max_examples=60), name, match)


def test_every_check_fails_for_some_fault():
    covered(check_observer(Plain()), CASES)


@pytest.mark.parametrize("observer", [Plain(), RightPeaks()], ids=lambda observer: type(observer).__name__)
def test_the_observers_pass_without_their_faults(observer):
    for check in check_observer(observer):
        check()
