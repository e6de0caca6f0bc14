"""Observers by name: every scheme accepts the names and mappings that `quantize` and configs accept."""

import attrs
import pytest
import torch

import fewbits
from fewbits import FP16Cast, Int4Grouped, Int8PerChannel, Int8PerTensor, MinMaxObserver, PercentileObserver, QuantSpec
from fewbits.errors import ArgumentError
from fewbits.observers import OBSERVERS
from support.lifecycle_helpers import mlp, small

SCHEMES = [Int8PerTensor, Int8PerChannel, Int4Grouped, FP16Cast]


class Own(fewbits.Quantizer):
    """A scheme of an outside author."""

    spec = QuantSpec(bits=8, granularity="channel")


@pytest.mark.parametrize("setting", ["observer", "activation_observer"])
@pytest.mark.parametrize("scheme", [*SCHEMES, Own])
def test_every_scheme_takes_observers_by_name_and_as_tables(scheme, setting):
    for name, cls in OBSERVERS.items():
        assert type(getattr(scheme(**{setting: name}), setting)) is cls
    made = getattr(scheme(**{setting: {"name": "percentile", "percentile": 99.5}}), setting)
    assert isinstance(made, PercentileObserver)
    assert made.percentile == 99.5


def test_a_named_observer_makes_the_codes_that_quantize_makes_with_that_name():
    by_scheme = fewbits.quantize(mlp(), small(Int4Grouped, observer="mse")).model
    by_call = fewbits.quantize(mlp(), "int4", observer="mse", min_elements=1).model
    plain = fewbits.quantize(mlp(), "int4", min_elements=1).model
    assert torch.equal(by_scheme[0].weight, by_call[0].weight)
    assert not torch.equal(by_scheme[0].weight, plain[0].weight)


@pytest.mark.parametrize("setting", ["observer", "activation_observer"])
@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("percentil", r"there is no {} 'percentil' \(did you mean 'percentile'\?\); there are 'minmax', .*'mse'"),
        ("gptq", r"there is no {} 'gptq'; there are 'minmax', .*'mse'"),
        ({"percentile": 99}, "there is no {} None; there are 'minmax'"),
        ({"name": "percentile", "percentage": 9}, r"{}: 'percentile' does not take 'percentage' .*'percentile'"),
        ({"name": "percentile", "percentile": 300}, "percentile"),
        (MinMaxObserver, "{} must be an instance of Observer, or the name of one: 'minmax', .*'mse'"),
        (3, "{} must be an instance of Observer, or the name of one"),
    ],
    ids=str,
)
def test_an_unknown_observer_is_refused_with_a_list_of_observers(setting, recipe, message):
    with pytest.raises(ArgumentError, match=message.format(setting)):
        Int4Grouped(**{setting: recipe})


def test_quantizers_of_one_recipe_by_name_share_no_observer():
    first, second = Int8PerChannel(observer="histogram"), Int8PerChannel(observer="histogram")
    assert first.observer is not second.observer


def test_a_config_hands_its_named_observer_to_the_scheme():
    config = fewbits.QuantizationConfig(scheme="int4", observer={"name": "percentile", "percentile": 99.5})
    assert config.quantizer().observer.percentile == 99.5
    assert type(config.quantizer(observer="mse").observer) is OBSERVERS["mse"]
    assert attrs.evolve(config, observer=None).quantizer().observer.__class__ is OBSERVERS["minmax"]
