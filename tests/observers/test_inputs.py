"""The scales that observers choose for the inputs of a layer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits import MinMaxObserver, QuantSpec
from fewbits.errors import ArgumentError, CalibrationError, RangeError
from fewbits.extend import Observer
from fewbits.numerics.affine import decode, encode
from fewbits.numerics.params import QuantParams
from fewbits.numerics.scales import choose_params
from fewbits.numerics.spec import INPUT_SPEC
from fewbits.observers import OBSERVERS
from fewbits.observers.histogram import HistogramObserver
from fewbits.observers.moving_average import MovingAverageMinMaxObserver
from fewbits.observers.mse import MSEObserver
from fewbits.observers.percentile import PercentileObserver
from support.lifecycle_helpers import FEWER_EXAMPLES
from support.strategies import FLOATS, contents, shapes

ASYMMETRIC = QuantSpec(bits=8, granularity="tensor", symmetric=False)
SPECS = st.sampled_from(
    [
        INPUT_SPEC,
        ASYMMETRIC,
        QuantSpec(bits=8, granularity="tensor"),
        QuantSpec(bits=8, granularity="tensor", scale_dtype=torch.bfloat16),
        QuantSpec(bits=4, granularity="tensor", symmetric=False, scale_dtype=torch.float64),
    ]
)

# Small histograms, so that Hypothesis finds the places where bins are merged.
ALL = [
    MinMaxObserver(),
    MovingAverageMinMaxObserver(0.25),
    HistogramObserver(bins=64),
    PercentileObserver(90, bins=64),
    MSEObserver(bins=64),
]
MERGING = [observer for observer in ALL if not isinstance(observer, MovingAverageMinMaxObserver)]

every = pytest.mark.parametrize("recipe", ALL, ids=repr)
every_merging = pytest.mark.parametrize("recipe", MERGING, ids=repr)


@st.composite
def batches(draw, limit=1e37):
    dtype = draw(st.sampled_from(FLOATS))
    return [
        draw(contents(draw(shapes(max_dims=3, max_elements=60)), dtype, limit)) for _ in range(draw(st.integers(1, 4)))
    ]


def after(recipe, tensors):
    observer = recipe.fresh()
    for x in tensors:
        observer.observe_input(x)
    return observer


def chosen(recipe, tensors, spec=INPUT_SPEC):
    """Scale and zero point as Python numbers."""
    return numbers(after(recipe, tensors).input_params(spec))


def numbers(params):
    return params.scale.item(), 0 if params.zero_point is None else params.zero_point.item()


def noise(recipe, x, spec=INPUT_SPEC):
    """Return the mean square error of rounding with the chosen scale."""
    return noise_with(after(recipe, [x]).input_params(spec), x, spec)


def noise_with(params, x, spec):
    rows = x.reshape(1, -1).double()
    return (decode(encode(rows, params, spec), params, spec, torch.float64) - rows).square().mean().item()


def normal(count=100_000, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@every
@FEWER_EXAMPLES
@given(batches(), SPECS)
def test_scales_can_be_used_whatever_was_seen(recipe, tensors, spec):
    params = after(recipe, tensors).input_params(spec)
    scale, zero_point = params.scale, params.zero_point
    assert scale.shape == (1,)
    assert scale.dtype == (spec.scale_dtype or torch.float32)
    assert 0 < scale.item() < math.inf
    if spec.symmetric:
        assert zero_point is None
    else:
        assert zero_point.shape == (1,)
        assert zero_point.dtype == torch.int32
        assert spec.code_min <= zero_point.item() <= spec.code_max


@every_merging
@FEWER_EXAMPLES
@given(batches(), SPECS, st.randoms(use_true_random=False))
def test_order_and_batches_do_not_matter(recipe, tensors, spec, random):
    values = torch.cat([x.flatten() for x in tensors])
    mixed = values[torch.tensor(random.sample(range(len(values)), len(values)))]
    pieces = mixed.split(random.randint(1, len(values)))
    assert chosen(recipe, tensors, spec) == chosen(recipe, [values], spec) == chosen(recipe, pieces, spec)


@every_merging
@FEWER_EXAMPLES
@given(batches(), batches(), SPECS)
def test_merged_copies_equal_one_that_saw_all_inputs(recipe, one, other, spec):
    observer = after(recipe, one)
    observer.merge(after(recipe, other))
    params = observer.input_params(spec)
    expected = after(recipe, [*one, *other]).input_params(spec)
    assert torch.equal(params.scale, expected.scale)
    assert params.zero_point is None or torch.equal(params.zero_point, expected.zero_point)


@every_merging
def test_merging_with_a_copy_that_saw_nothing_changes_nothing(recipe):
    x = normal(100)
    observer, empty = after(recipe, [x]), recipe.fresh()
    observer.merge(recipe.fresh())
    empty.merge(observer)
    assert numbers(observer.input_params(INPUT_SPEC)) == numbers(empty.input_params(INPUT_SPEC)) == chosen(recipe, [x])


@pytest.mark.parametrize(
    ("observer", "other"),
    [
        (MinMaxObserver(), HistogramObserver()),
        (HistogramObserver(), MSEObserver()),
        (HistogramObserver(bins=64), HistogramObserver(bins=128)),
        (PercentileObserver(99), PercentileObserver(98)),
        (MSEObserver(steps=8), MSEObserver(steps=9)),
    ],
)
def test_only_copies_of_one_recipe_merge(observer, other):
    observer.observe_input(torch.ones(3))
    other.observe_input(torch.ones(3) * 5)
    before = numbers(observer.input_params(INPUT_SPEC))
    with pytest.raises(ArgumentError, match="the class and arguments must be equal"):
        observer.merge(other)
    assert numbers(observer.input_params(INPUT_SPEC)) == before


def test_a_moving_average_cannot_be_merged():
    observer = MovingAverageMinMaxObserver()
    with pytest.raises(CalibrationError, match=r"cannot be merged .* HistogramObserver"):
        observer.merge(observer.fresh())


@every
def test_the_inputs_seen_change_the_scale_of_inputs(recipe):
    small, large = normal(), normal(seed=1) * 10
    assert chosen(recipe, [large])[0] > 5 * chosen(recipe, [small])[0]
    assert chosen(recipe, [small, large])[0] > chosen(recipe, [small])[0]
    skewed = chosen(recipe, [small.abs()], ASYMMETRIC), chosen(recipe, [-small.abs()], ASYMMETRIC)
    assert skewed[0][1] == -128
    assert skewed[1][1] == 127


@every
def test_the_inputs_seen_do_not_change_the_scale_of_a_weight(recipe):
    spec = QuantSpec(bits=4, granularity="channel", scale_dtype=torch.float32)
    weight = normal(64).reshape(4, 16)
    assert not recipe.needs_data
    before = recipe.observe_weight(weight, spec).scale
    assert torch.equal(after(recipe, [normal() * 100]).observe_weight(weight, spec).scale, before)


@every
@pytest.mark.parametrize("inputs", [[], [torch.empty(0, 4)], [torch.arange(5)], [torch.ones(2, dtype=torch.bool)]])
def test_without_data_there_is_no_scale(recipe, inputs):
    with pytest.raises(CalibrationError, match=r"has seen no input.*observe\(batches\)"):
        after(recipe, inputs).input_params(INPUT_SPEC)


@every
def test_inputs_without_floating_numbers_change_nothing(recipe):
    x = normal(100)
    assert chosen(recipe, [torch.arange(9), x, torch.empty(0)]) == chosen(recipe, [x])


@every
def test_reset_forgets_and_fresh_copies_nothing(recipe):
    observer = after(recipe, [normal(100)])
    copy = observer.fresh()
    observer.reset()
    for one in (observer, copy):
        with pytest.raises(CalibrationError, match="seen no input"):
            one.input_params(INPUT_SPEC)
    assert repr(copy) == repr(recipe)


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_are_refused_and_change_no_statistics(recipe, bad):
    x = normal(100)
    observer = after(recipe, [x])
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        observer.observe_input(torch.tensor([1e6, bad]))
    assert observer.input_params(INPUT_SPEC).scale.item() == chosen(recipe, [x])[0]


@every
@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(bits=8, granularity="channel"),
        QuantSpec(bits=8, granularity="group", group_size=4),
        QuantSpec(bits=2, granularity="tensor", levels=(-1, 0, 0.5, 1)),
    ],
    ids=str,
)
def test_specs_that_do_not_suit_inputs_are_refused(recipe, spec):
    with pytest.raises(ArgumentError, match="inputs need a spec with granularity"):
        after(recipe, [torch.ones(3)]).input_params(spec)


@every
def test_inputs_beyond_the_range_of_the_scale_are_an_error(recipe):
    with pytest.raises(RangeError, match="wider scale_dtype"):
        chosen(recipe, [torch.tensor([1e300, -1e300], dtype=torch.float64)])


@every
@pytest.mark.parametrize("x", [torch.zeros(3), torch.full((3,), 1e-40), torch.tensor(-2.0), torch.full((5,), 65504.0)])
def test_constants(recipe, x):
    params = after(recipe, [x.half() if x.max() > 1e4 else x]).input_params(ASYMMETRIC)
    rows = x.reshape(1, -1)
    decoded = decode(encode(rows, params, ASYMMETRIC), params, ASYMMETRIC, torch.float64)
    assert (decoded - rows).abs().max() <= params.scale / 2


def test_all_elements_of_a_strided_input_are_seen():
    x = normal(24).reshape(2, 3, 4)
    for view in (x.permute(2, 0, 1), x.flip(0), x[:, :1].expand(2, 3, 4)):
        assert chosen(HistogramObserver(), [view]) == chosen(HistogramObserver(), [view.contiguous()])
        assert chosen(MinMaxObserver(), [view]) == chosen(MinMaxObserver(), [view.contiguous()])


def test_an_input_that_requires_gradients_keeps_no_graph():
    x = torch.ones(3, requires_grad=True) * 2
    for recipe in ALL:
        assert not after(recipe, [x]).input_params(INPUT_SPEC).scale.requires_grad


# The purpose of each observer.


@given(batches())
def test_min_max_clips_nothing(tensors):
    scale, _ = chosen(MinMaxObserver(), tensors)
    largest = max(x.double().abs().max().item() for x in tensors)
    assert scale == max(
        torch.tensor(largest / 127, dtype=torch.float64).float().item(), torch.finfo(torch.float32).tiny
    )


def test_a_moving_average_moves_by_its_constant():
    observer = MovingAverageMinMaxObserver(0.25)
    low, high = None, None
    for index, x in enumerate(normal(300).reshape(10, 30) * torch.arange(1, 11).unsqueeze(1)):
        observer.observe_input(x)
        ends = x.min().item(), x.max().item()
        low, high = ends if not index else (0.75 * low + 0.25 * ends[0], 0.75 * high + 0.25 * ends[1])
        assert observer.input_params(INPUT_SPEC).scale.item() == pytest.approx(max(-low, high) / 127, rel=1e-6)
        assert observer.input_params(ASYMMETRIC).scale.item() == pytest.approx((high - low) / 255, rel=1e-6)


def test_a_moving_average_does_not_follow_a_single_outlier():
    tensors = [normal(1000, seed) for seed in range(20)]
    tensors[10] = tensors[10].clone()
    tensors[10][0] = 1000.0
    assert chosen(MinMaxObserver(), tensors)[0] > 7
    assert chosen(MovingAverageMinMaxObserver(), tensors)[0] < 0.12


def test_an_average_of_positive_extremes_still_has_zero_in_range():
    scale, zero_point = chosen(MovingAverageMinMaxObserver(), [torch.tensor([2.0, 4.0])], ASYMMETRIC)
    assert (scale, zero_point) == (pytest.approx(4 / 255), -128)


@pytest.mark.parametrize("percentile", [50, 90, 99.9, 99.99, 100])
def test_the_range_of_a_percentile_holds_its_share(percentile):
    x = normal()
    scale, _ = chosen(PercentileObserver(percentile), [x])
    exact = x.abs().sort().values[math.ceil(len(x) * percentile / 100) - 1].item()
    width = 2.0 ** (math.frexp(x.abs().max().item())[1] - 11)
    assert exact <= 127 * scale * (1 + 1e-6)
    assert 127 * scale <= (exact + width) * (1 + 1e-6)


OUTLIERS = torch.cat([normal(), torch.tensor([300.0, -200.0])])
SKEWED = torch.nn.functional.gelu(torch.cat([normal() * 2, torch.tensor([150.0])]))


@pytest.mark.parametrize("recipe", [HistogramObserver(), MSEObserver()], ids=repr)
@pytest.mark.parametrize("spec", [INPUT_SPEC, ASYMMETRIC], ids=str)
@pytest.mark.parametrize("x", [normal(), OUTLIERS, SKEWED], ids=["normal", "outliers", "gelu"])
def test_the_noise_is_within_a_twentieth_of_the_minimum(recipe, spec, x):
    """The minimum is over ranges narrowed equally on both sides, in 60ths of an octave, by rounding the numbers."""
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    params = (
        choose_params(torch.tensor([low * share]), torch.tensor([high * share]), spec.for_dtype(torch.float32))
        for share in (2 ** (-i / 60) for i in range(600))
    )
    assert noise(recipe, x, spec) <= 1.05 * min(noise_with(pair, x, spec) for pair in params)


@pytest.mark.parametrize("recipe", [HistogramObserver(), MSEObserver(), PercentileObserver(99.9)], ids=repr)
def test_outliers_do_not_set_the_scale(recipe):
    x = torch.cat([normal(1_000_000), torch.tensor([30.0])])
    assert chosen(recipe, [x])[0] < chosen(MinMaxObserver(), [x])[0] / 2
    assert noise(recipe, x) < noise(MinMaxObserver(), x) / (1 if isinstance(recipe, PercentileObserver) else 2)


@given(batches())
def test_the_least_error_is_not_above_that_of_the_extremes(tensors):
    """Both errors are of the histogram, whose numbers count as spread evenly over their bin."""
    observer = MSEObserver(bins=64)
    x = torch.cat([x.flatten() for x in tensors]).double()
    lower, upper, counts = after(observer, [x])._seen.occupied()
    points = lower + (upper - lower) * (torch.arange(256, dtype=torch.float64).unsqueeze(1) + 0.5) / 256

    def total(recipe):
        spec = QuantSpec(bits=8, granularity="tensor", scale_dtype=torch.float64)
        scale = after(recipe, [x]).input_params(spec).scale
        steps = points / scale
        return ((steps - steps.round().clamp(-128, 127)).square().mean(0) * counts[0]).sum().item() * scale.item() ** 2

    assert total(observer) <= total(MinMaxObserver()) * 1.001


# The arguments of observers.


def test_the_short_names():
    assert list(OBSERVERS) == ["minmax", "moving-average", "histogram", "percentile", "mse"]
    assert all(issubclass(cls, Observer) and isinstance(cls(), Observer) for cls in OBSERVERS.values())


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (HistogramObserver, {"bins": 100}, "bins must be a power of two from 64 to 65536, not 100"),
        (HistogramObserver, {"bins": 32}, "not 32"),
        (HistogramObserver, {"bins": 64.0}, "not 64.0"),
        (HistogramObserver, {"bins": True}, "not True"),
        (MSEObserver, {"steps": 1}, "steps must be an integer from 2 up, not 1"),
        (MSEObserver, {"steps": 20.0}, "not 20.0"),
        (MSEObserver, {"bins": 3}, "bins must be"),
        (PercentileObserver, {"percentile": 0}, "percentile must be above 0 and at most 100, not 0"),
        (PercentileObserver, {"percentile": 100.1}, "not 100.1"),
        (PercentileObserver, {"percentile": math.nan}, "not nan"),
        (PercentileObserver, {"percentile": "99"}, "not '99'"),
        (MovingAverageMinMaxObserver, {"averaging_constant": 0.0}, "above 0 and at most 1, not 0.0"),
        (MovingAverageMinMaxObserver, {"averaging_constant": 1.5}, "not 1.5"),
        (MovingAverageMinMaxObserver, {"averaging_constant": None}, "not None"),
    ],
)
def test_arguments_outside_their_range_are_refused(cls, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        cls(**arguments)


def test_an_observer_prints_as_its_recipe():
    assert repr(MSEObserver(steps=8)) == "MSEObserver(bins=2048, steps=8)"
    assert repr(after(MinMaxObserver(), [torch.ones(2)])) == "MinMaxObserver()"


def test_an_outside_observer_refuses_optional_calls_by_name():
    class Fixed(Observer):
        def observe_weight(self, weight, spec):
            return QuantParams(torch.ones(spec.scale_shape(*weight.shape)))

    observer = Fixed()
    observer.observe_input(torch.ones(3))
    with pytest.raises(CalibrationError, match=r"Fixed\(\) does not pick scales for inputs"):
        observer.input_params(INPUT_SPEC)
    with pytest.raises(CalibrationError, match=r"Fixed\(\) cannot be merged"):
        observer.merge(Fixed())
