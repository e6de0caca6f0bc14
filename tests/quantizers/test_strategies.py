"""Strategies of an outside author: observer, selector, serializer."""

import attrs
import pytest
import torch
from hypothesis import given
from safetensors.torch import save_file
from torch import nn

import fewbits
from fewbits import LayerSelector, MinMaxObserver, QuantizedTensor
from fewbits.errors import CalibrationError, NumericsError, SelectionError
from fewbits.extend import Decision, Observer
from support.lifecycle_helpers import (
    FEWER_EXAMPLES,
    JsonSerializer,
    Watcher,
    files_in,
    mlp,
    quantize_small,
    random_models,
    small,
    snapshot,
)


def data(count=2):
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(3, 16, generator=generator) for _ in range(count)]


def test_an_observer_sees_the_inputs_of_each_layer():
    seen = []
    quantizer = small(observer=Watcher(seen.append))
    model, batches = mlp(), data()
    quantizer.prepare(model)
    quantizer.observe(batches)
    expected = [x for batch in batches for x in (batch, model[:2](batch))]
    assert [x.shape for x in seen] == [x.shape for x in expected]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_an_observer_sees_inputs_of_a_loop_of_the_users_own():
    seen = []
    quantizer = small(observer=Watcher(seen.append))
    prepared = quantizer.prepare(mlp())
    prepared(data()[0])
    assert len(seen) == 2
    assert not any(x.requires_grad for x in seen)
    assert isinstance(quantizer.convert(), nn.Module)


def test_a_layer_that_is_called_with_keywords_is_seen():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 4)

        def forward(self, x):
            return self.linear(input=x)

    seen = []
    quantizer = small(observer=Watcher(seen.append))
    quantizer.prepare(Keywords())
    quantizer.observe(data())
    assert len(seen) == 2


def test_an_observer_changes_the_result():
    plain = quantize_small(mlp(), "int8").model
    watched = quantize_small(mlp(), "int8", observer=Watcher(), data=data()).model
    peak = 1 + max(batch.abs().max() for batch in data())
    assert torch.equal(watched[0].weight_stored.scale, plain[0].weight_stored.scale * peak)


def test_every_layer_has_its_own_copy_of_the_observer():
    recipe = Watcher()
    result = quantize_small(mlp(), "int8", observer=recipe, data=data()).model
    plain = quantize_small(mlp(), "int8").model
    widened = [result[i].weight_stored.scale / plain[i].weight_stored.scale for i in (0, 2)]
    assert widened[0].mean() != widened[1].mean()
    assert torch.equal(
        *(quantize_small(mlp(), "int8", observer=recipe, data=data()).model[2].weight_stored.scale for _ in range(2))
    )


def test_observing_twice_adds_up():
    first, second = data()
    once = quantize_small(mlp(), "int8", observer=Watcher(), data=[first, second]).model
    quantizer = small(observer=Watcher())
    quantizer.prepare(mlp())
    quantizer.observe([second])
    quantizer.observe([first])
    assert snapshot(quantizer.convert().state_dict()) == snapshot(once.state_dict())


def test_reset_forgets_the_observed_inputs():
    quantizer = small(observer=Watcher())
    quantizer.prepare(mlp())
    quantizer.observe(data())
    quantizer.reset()
    quantizer.prepare(mlp())
    with pytest.raises(CalibrationError):
        quantizer.convert()


def test_convert_names_the_layers_without_data():
    quantizer = small(observer=Watcher())
    quantizer.prepare(mlp())
    with pytest.raises(CalibrationError, match=r"0\.weight, 2\.weight.*call observe"):
        quantizer.convert()


def test_convert_names_only_the_layers_that_the_data_did_not_reach():
    quantizer = small(observer=Watcher())
    prepared = quantizer.prepare(mlp())
    prepared[0](data()[0])
    with pytest.raises(CalibrationError, match=r"2\.weight") as caught:
        quantizer.convert()
    assert "0.weight" not in str(caught.value)
    prepared[2](torch.rand(1, 32))
    quantizer.convert()


def test_data_for_one_of_the_layers_that_share_a_weight_is_enough():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    model["b"].weight = model["a"].weight
    quantizer = small(observer=Watcher())
    prepared = quantizer.prepare(model)
    prepared["b"](data()[0])
    assert quantizer.convert()["a"].weight_stored is not None


@pytest.mark.parametrize("as_file", [False, True])
def test_an_observer_that_needs_data_is_refused_without_a_forward(tmp_path, as_file):
    source = dict(mlp().state_dict())
    if as_file:
        save_file(source, tmp_path / "model.safetensors")
        source = tmp_path / "model.safetensors"
    with pytest.raises(CalibrationError, match="Watcher needs data, and a state dict or a file has no forward"):
        small(observer=Watcher()).prepare(source)


class Broken(Observer):
    def __init__(self, scale, zero_point=None):
        self._returned = scale, zero_point

    def observe_weight(self, weight, spec):
        return self._returned


@pytest.mark.parametrize(
    ("scale", "zero_point"),
    [
        (torch.zeros(32, 1), None),
        (torch.full((32, 1), float("nan")), None),
        (torch.full((32, 1), float("inf")), None),
        (torch.ones(32), None),
        (torch.ones(31, 1), None),
        (torch.ones(32, 1, dtype=torch.float64), None),
        (torch.ones(32, 1), torch.zeros(32, 1, dtype=torch.int32)),
    ],
)
def test_invalid_scales_of_an_observer_are_refused_with_the_name_of_the_tensor(scale, zero_point):
    quantizer = small(observer=Broken(scale, zero_point))
    quantizer.prepare(mlp())
    with pytest.raises(NumericsError, match=r"0\.weight, .*an observer"):
        quantizer.convert()


def test_an_observer_may_clip_and_the_bound_becomes_wider():
    class Clips(MinMaxObserver):
        def observe_weight(self, weight, spec):
            params = super().observe_weight(weight, spec)
            return attrs.evolve(params, scale=params.scale / 2)

    result = quantize_small(mlp(), "int8", observer=Clips(), fail_under=0)
    assert result.report.ok
    assert {t.measurement.code_min for t in result.report.tensors if t.measurement} == {-128}


class Chooses(LayerSelector):
    def __init__(self, choose):
        self._choose = choose

    def select(self, infos):
        return self._choose(infos)


def test_a_selector_decides_which_tensors_are_quantized():
    def only_wide(infos):
        return [Decision(info.shape[-1] > 16, "wide" if info.shape[-1] > 16 else "narrow") for info in infos]

    ledger = quantize_small(mlp(), "int8", selector=Chooses(only_wide)).ledger
    assert (ledger["0.weight"].fate, ledger["0.weight"].reason) == ("kept", "narrow")
    assert (ledger["2.weight"].fate, ledger["2.weight"].reason) == ("quantized", "wide")


def test_a_selector_cannot_choose_what_cannot_be_quantized():
    quantizer = small(selector=Chooses(lambda infos: [Decision(True, "all", named=True)] * len(infos)))
    quantizer.prepare(mlp())
    assert [row.name for row in quantizer.ledger if row.fate == "quantized"] == ["0.weight", "2.weight"]


@pytest.mark.parametrize("surplus", [-4, -1, 1])
def test_a_selector_with_a_wrong_number_of_decisions_is_refused(surplus):
    selector = Chooses(lambda infos: [Decision(True, "all")] * (len(infos) + surplus))
    with pytest.raises(SelectionError, match=f"made {4 + surplus} decisions for 4 tensors"):
        small(selector=selector).prepare(mlp())


def test_a_selector_gets_names_shapes_classes_and_default_skips():
    told = []

    def listen(infos):
        told.extend(infos)
        return [Decision(True, "all")] * len(infos)

    model = nn.ModuleDict({"e": nn.Embedding(4, 16), "l": nn.Linear(16, 4)})
    small(fewbits.Int4Grouped, 16, selector=Chooses(listen)).prepare(model)
    assert [(i.name, i.shape, i.owner) for i in told] == [
        ("e.weight", (4, 16), nn.Embedding),
        ("l.weight", (4, 16), nn.Linear),
        ("l.bias", (4,), nn.Linear),
    ]
    assert [(i.skip is not None, i.obstacle is not None) for i in told] == [
        (True, False),
        (False, False),
        (False, True),
    ]


@given(random_models())
@FEWER_EXAMPLES
def test_any_model_survives_a_custom_serializer(tmp_path_factory, model):
    serializer = JsonSerializer()
    result = quantize_small(model, "int8", serializer=serializer, fail_under=0)
    path = tmp_path_factory.mktemp("json") / "model.json"
    result.save(path)
    loaded = fewbits.load(path, serializer=serializer)
    quantized = {row.name for row in result.ledger if row.fate == "quantized"}
    assert {name for name, value in loaded.items() if isinstance(value, QuantizedTensor)} >= quantized
    assert loaded.keys() == {row.name for row in result.ledger}


def test_the_serializer_is_used_to_save_to_validate_and_to_load(tmp_path):
    serializer = JsonSerializer()
    quantizer = small(serializer=serializer)
    quantizer.prepare(mlp())
    result = quantizer.convert()
    assert not serializer.written
    quantizer.validate()
    assert len(serializer.written) == 1
    quantizer.save(tmp_path / "model.json")
    assert serializer.written[1:] == ["model.json"]
    loaded = fewbits.load(tmp_path / "model.json", into=mlp(seed=1), serializer=serializer)
    assert "model.json" in serializer.opened
    assert snapshot(loaded.state_dict()) == snapshot(result.state_dict())


def test_the_serializer_writes_the_result_of_a_file(tmp_path):
    save_file(mlp().state_dict(), tmp_path / "model.safetensors")
    serializer = JsonSerializer()
    result = quantize_small(
        tmp_path / "model.safetensors", "int8", serializer=serializer, output=tmp_path / "model.json"
    )
    assert result.report.ok
    assert (tmp_path / "model.json").read_bytes().startswith(b"{")
    assert set(files_in(tmp_path)) == {"model.safetensors", "model.json"}


def test_a_serializer_that_loses_a_bit_is_detected():
    class Lossy(JsonSerializer):
        def reader(self, path):
            reader = super().reader(path)
            read = reader.read
            reader.read = lambda name: read(name) ^ 1 if name == "0.weight_packed" else read(name)
            return reader

    with pytest.raises(fewbits.errors.ValidationError, match=r"0\.weight"):
        quantize_small(mlp(), "int8", serializer=Lossy())
