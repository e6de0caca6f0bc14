"""Files into models: fresh ones, ones on the meta device, and ones that do not fit."""

import gc
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fewbits
from fewbits.errors import ArgumentError, MismatchError, SelectionError
from nn.cases import (
    CASES,
    IDS,
    SCHEMES,
    TYPICAL,
    Mixed,
    Tied,
    converted,
    keeping,
    same_bits,
    same_state,
    seeded,
    snapshot,
    storages,
    tensors_in,
)

pytestmark = pytest.mark.usefixtures("reference_only")

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def saved(source, scheme, path: Path):
    """Quantize and write; the result."""
    quantizer = SCHEMES[scheme]() if isinstance(scheme, str) else scheme
    quantizer.prepare(source)
    result = quantizer.convert()
    quantizer.save(path)
    return result


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def on_meta(make) -> nn.Module:
    with torch.device("meta"):
        return make()


# Files that fit the model.


@pytest.mark.parametrize("place", ["fresh", "meta"])
@pytest.mark.parametrize("case", TYPICAL, ids=str)
@every_scheme
def test_a_file_loads_into_a_module_of_the_same_class(case, scheme, place, path):
    result = saved(case.module(), scheme, path)
    into = on_meta(case.make) if place == "meta" else seeded(case.make, 1)
    loaded = fewbits.load(path, into=into)
    assert loaded is into
    assert same_state(loaded, result)
    assert same_bits(case.run(loaded), case.run(result))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_file_made_from_a_state_dict_loads_into_the_class(case, path):
    source = case.module()
    saved(dict(source.state_dict()), "int4-asymmetric", path)
    loaded = fewbits.load(path, into=seeded(case.make, 1))
    assert type(loaded.weight_stored).__name__ == "PackedWeight"
    assert same_bits(case.run(loaded), case.run(fewbits.dequantize(loaded)))
    assert (loaded.weight - source.weight).abs().max() < source.weight.abs().max() / 5


@every_scheme
def test_a_state_dict_and_a_model_make_codes_of_the_same_linear_layers(scheme, path):
    source = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3))
    saved(dict(source.state_dict()), scheme, path)
    loaded = fewbits.load(path, into=nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3)))
    assert same_state(loaded, converted(source, SCHEMES[scheme]())[0])


@pytest.mark.parametrize("place", ["fresh", "meta"])
@every_scheme
def test_every_tensor_of_a_mixed_model_is_defined_after_loading(scheme, place, path):
    source = seeded(Mixed).eval()
    source.offset += 1
    result = saved(source, scheme, path)
    into = (on_meta(Mixed) if place == "meta" else seeded(Mixed, 1)).eval()
    loaded = fewbits.load(path, into=into)
    assert not any(tensor.is_meta for tensor in tensors_in(loaded))
    assert same_state(loaded, result)
    assert torch.equal(loaded.offset, source.offset)
    assert same_bits(loaded(IDS), result(IDS))


def test_a_loaded_model_lets_go_of_the_weights_it_had(path):
    saved(seeded(Mixed), "int8", path)
    into = seeded(Mixed, 1)
    before = storages(into)
    fewbits.load(path, into=into, compute="exact")
    assert not storages(into) & before


def test_a_buffer_that_no_state_dict_holds_stays_as_the_model_made_it(path):
    source = seeded(Mixed)
    saved(dict(source.state_dict()), keeping(exclude=["lstm", "attention"]), path)
    into = seeded(Mixed, 1)
    offset = into.offset
    assert fewbits.load(path, into=into).offset is offset


def test_hooks_flags_and_attributes_of_the_model_are_kept(path):
    saved(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "int8", path)
    into = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    into[0].eval()
    into[0].note = "mine"
    into[1].bias.requires_grad_(False)
    calls = []
    into[0].register_forward_hook(lambda *_: calls.append("hook"))
    loaded = fewbits.load(path, into=into)
    loaded(torch.zeros(1, 4))
    assert calls == ["hook"]
    assert (loaded.training, loaded[0].training, loaded[0].note) == (True, False, "mine")
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == {
        "0.bias": True, "1.weight": True, "1.bias": False,
    }  # fmt: skip


def test_a_model_takes_the_dtypes_of_the_file(path):
    result = saved(nn.Linear(4, 4, dtype=torch.bfloat16), "int8", path)
    loaded = fewbits.load(path, into=nn.Linear(4, 4))
    assert (loaded.weight.dtype, loaded.bias.dtype) == (torch.bfloat16, torch.bfloat16)
    assert same_state(loaded, result)


def test_a_quantized_model_that_was_moved_saves_what_was_quantized(path, tmp_path):
    quantizer = keeping()
    quantizer.prepare(nn.Linear(8, 8, bias=False))
    result = quantizer.convert()
    quantizer.save(path)
    result.half()
    quantizer.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_loaded_model_takes_another_state_dict(path):
    first = saved(seeded(lambda: nn.Linear(8, 8)), "int8", path)
    second = converted(seeded(lambda: nn.Linear(8, 8), 1), keeping())[0]
    loaded = fewbits.load(path, into=nn.Linear(8, 8))
    content = path.read_bytes()
    loaded.load_state_dict(second.state_dict())
    assert same_state(loaded, second)
    assert path.read_bytes() == content
    assert same_state(fewbits.load(path, into=nn.Linear(8, 8)), first)


def test_writing_into_loaded_tensors_never_changes_the_file(path):
    saved(seeded(Mixed), "int8", path)
    content = path.read_bytes()
    loaded = fewbits.load(path, into=seeded(Mixed, 1))
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        tensor.data.zero_()
    assert path.read_bytes() == content


def test_a_loaded_model_dequantizes_to_a_model_that_trains(path):
    saved(nn.Linear(4, 4), "int8", path)
    plain = fewbits.dequantize(fewbits.load(path, into=nn.Linear(4, 4)))
    plain(torch.ones(1, 4)).sum().backward()
    with torch.no_grad():
        plain.weight -= plain.weight.grad
    assert type(plain) is nn.Linear


def _mapping_of(path: Path) -> list[range]:
    """Where a file is mapped in this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    bounds = [line.split()[0].split("-") for line in lines if line.endswith(f" {path.resolve()}")]
    return [range(int(start, 16), int(stop, 16)) for start, stop in bounds]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists mapped files, in /proc/self/maps")
@pytest.mark.parametrize("place", ["fresh", "meta"])
@every_scheme
def test_what_is_loaded_aliases_the_mapped_file(scheme, place, path):
    saved(seeded(Mixed), scheme, path)
    into = on_meta(Mixed) if place == "meta" else seeded(Mixed, 1)
    loaded = fewbits.load(path, into=into, compute="exact")
    mapped = _mapping_of(path)
    buffers = {name: buffer for name, buffer in loaded.named_buffers() if "_stored." in name}
    assert buffers
    assert all(any(buffer.data_ptr() in region for region in mapped) for buffer in buffers.values())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists mapped files, in /proc/self/maps")
def test_the_file_is_let_go_with_the_last_tensor_from_it(path):
    saved(nn.Linear(64, 64), "int8", path)
    loaded = fewbits.load(path, into=nn.Linear(64, 64))
    assert _mapping_of(path)
    del loaded
    gc.collect()
    assert not _mapping_of(path)


# Tied weights.


@pytest.mark.parametrize("place", ["fresh", "meta"])
@every_scheme
def test_tied_weights_are_stored_once_and_come_back_tied(scheme, place, path):
    result = saved(seeded(Tied), scheme, path)
    loaded = fewbits.load(path, into=on_meta(Tied) if place == "meta" else seeded(Tied, 1))
    assert loaded.embed.weight_stored is loaded.head.weight_stored
    assert loaded.first is loaded.again is loaded.beside[0]
    assert same_bits(loaded(IDS), result(IDS))


def test_kept_weights_that_are_tied_come_back_tied(path):
    saved(seeded(Tied), keeping(fewbits.Int4Grouped, 4), path)
    loaded = fewbits.load(path, into=on_meta(Tied))
    assert isinstance(loaded.head.weight, nn.Parameter)
    assert loaded.embed.weight is loaded.head.weight


@pytest.mark.parametrize("absent", ["embed.weight", "head.weight"])
@pytest.mark.parametrize("place", ["fresh", "meta"])
def test_one_of_two_tied_names_in_the_file_fills_both(absent, place, path):
    state = dict(seeded(Tied).state_dict())
    del state[absent]
    saved(state, "int8", path)
    loaded = fewbits.load(path, into=on_meta(Tied) if place == "meta" else seeded(Tied, 1))
    assert loaded.embed.weight_stored is loaded.head.weight_stored
    assert loaded(IDS).isfinite().all()


def test_weights_that_are_tied_in_the_file_become_tied_in_the_model(path):
    def untied() -> nn.Module:
        model = Tied()
        model.head = nn.Linear(8, 12, bias=False)
        return model

    saved(seeded(Tied), "int8", path)
    loaded = fewbits.load(path, into=seeded(untied, 1))
    assert loaded.embed.weight_stored is loaded.head.weight_stored


def test_weights_that_the_file_has_twice_stop_being_tied(path):
    state = dict(seeded(Tied).state_dict())
    state["head.weight"] = 2 * state["head.weight"]
    saved(state, "int8", path)
    loaded = fewbits.load(path, into=seeded(Tied, 1))
    torch.testing.assert_close(loaded.head.weight, loaded.embed.weight * 2)


def _with_copies(state: dict[str, torch.Tensor], factor: float = 1.0) -> dict[str, torch.Tensor]:
    """As many tools write a model that has one layer at two paths: its tensors twice."""
    return {name: tensor * (factor if name.startswith("again.") else 1) for name, tensor in state.items()}


@every_scheme
def test_one_layer_at_two_paths_loads_from_a_file_that_has_its_tensors_twice(scheme, path):
    source = seeded(Tied)
    saved(_with_copies(source.state_dict()), scheme, path)
    loaded = fewbits.load(path, into=seeded(Tied, 1))
    assert loaded.first is loaded.again
    assert same_bits(loaded.first.weight, converted(source, SCHEMES[scheme]())[0].first.weight)


def test_one_layer_at_two_paths_cannot_take_two_different_weights(path):
    saved(_with_copies(seeded(Tied).state_dict(), factor=2.0), "int8", path)
    into = seeded(Tied, 1)
    before = snapshot(into)
    with pytest.raises(MismatchError, match=r"first\.weight and again\.weight are one tensor in the model"):
        fewbits.load(path, into=into)
    assert snapshot(into).equals(before)


# Files that do not fit the model.


def layers(**changes) -> nn.Module:
    """Two layers and a normalization; a change of None leaves one out."""
    made = {"a": nn.Linear(4, 4), "b": nn.Conv1d(4, 4, 3), "norm": nn.BatchNorm1d(4)} | changes
    return nn.ModuleDict({name: module for name, module in made.items() if module is not None})


class OwnForward(nn.Linear):
    def forward(self, input):
        return 2 * input @ self.weight.T + self.bias


def occupied() -> nn.Module:
    """A layer that has something else in the place where its quantized weight would go."""
    layer = nn.Linear(4, 4)
    layer.weight_stored = nn.Identity()
    return layer


class WithParameter(nn.Module):
    def __init__(self, value: nn.Parameter) -> None:
        super().__init__()
        self.value = value


class Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("late", torch.zeros(2), persistent=False)


MISFITS = {
    "a layer too few": (lambda: layers(a=None), ["a.weight is in the file, not in the model", "a.bias is in the file"]),
    "a layer too many": (lambda: layers(c=nn.Linear(2, 2)), ["c.weight is in the model, not in the file", "c.bias is"]),
    "no bias": (lambda: layers(a=nn.Linear(4, 4, bias=False)), ["a.bias is in the file, not in the model"]),
    "another shape": (
        lambda: layers(a=nn.Linear(4, 5)),
        ["a.weight has shape (4, 4) in the file, (5, 4) in the model", "a.bias has shape (4,) in the file, (5,)"],
    ),
    "another class": (
        lambda: layers(a=occupied()),
        ["a.weight is int8 channel in the file, but it has an attribute weight_stored"],
    ),
    "another buffer": (lambda: layers(norm=nn.BatchNorm1d(3)), ["norm.running_mean has shape (4,)", "norm.weight"]),
    "a buffer of the meta device": (
        lambda: layers(c=on_meta(Late)),
        ["c.late is a buffer that no state dict holds, and is on the meta device"],
    ),
    "several at once": (
        lambda: layers(a=nn.Linear(4, 5), b=None, c=nn.Linear(2, 2)),
        ["a.weight has shape", "b.weight is in the file", "b.bias is in the file", "c.weight is in the model"],
    ),
    "a layer that was never run": (lambda: layers(a=nn.LazyLinear(4)), ["a.weight is not initialized"]),
}


@pytest.mark.parametrize(("make", "complaints"), MISFITS.values(), ids=MISFITS)
def test_every_misfit_is_named_at_once_and_the_model_is_unchanged(make, complaints, path):
    saved(layers(), "int8", path)
    into = make()
    held = {id(tensor) for tensor in tensors_in(into)}
    classes = [type(module) for module in into.modules()]
    with pytest.raises(MismatchError) as caught:
        fewbits.load(path, into=into)
    assert all(complaint in str(caught.value) for complaint in complaints)
    assert {id(tensor) for tensor in tensors_in(into)} == held
    assert [type(module) for module in into.modules()] == classes


@pytest.mark.parametrize("ignored", [["a"], ["a.weight", "a.bias"], ["re:a"]], ids=str)
def test_what_a_model_may_lack_stays_in_the_file(ignored, path):
    source = layers()
    result = saved(source, "int8", path)
    loaded = fewbits.load(path, into=layers(a=None), ignore=ignored)
    expected = {name: value for name, value in result.state_dict().items() if not name.startswith("a.")}
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_tied_name_that_a_model_may_lack_is_loaded_under_its_other_name(path):
    linear = nn.Linear(4, 4, bias=False)
    saved(nn.ModuleDict({"a": linear, "b": linear}), "int8", path)
    loaded = fewbits.load(path, into=nn.ModuleDict({"b": nn.Linear(4, 4, bias=False)}), ignore=["a"])
    x = torch.randn(3, 4)
    dequantized = fewbits.load(path)["a.weight"].dequantize()
    torch.testing.assert_close(loaded["b"](x), x @ dequantized.T)


@pytest.mark.parametrize(
    ("ignored", "error", "message"),
    [
        (["c"], SelectionError, "model.safetensors has and the model lacks: 'c' matches nothing"),
        (["a", "b"], SelectionError, "'b' matches nothing"),  # the model has it
        (
            ["a.weight"],
            MismatchError,
            r"Dict: a\.bias is in the file, not in the model \(with ignore=",
        ),
        ("a", SelectionError, "ignore must be a sequence of patterns"),
        (["a..b"], SelectionError, "empty component"),
    ],
    ids=str,
)
def test_patterns_of_what_a_model_may_lack_are_checked_before_it_is_changed(ignored, error, message, path):
    saved(layers(), "int8", path)
    into = layers(a=None)
    before = snapshot(into)
    with pytest.raises(error, match=message):
        fewbits.load(path, into=into, ignore=ignored)
    assert snapshot(into).equals(before)


def test_a_mapping_lacks_nothing(path):
    saved(layers(), "int8", path)
    with pytest.raises(ArgumentError, match="without into= the mapping has every tensor"):
        fewbits.load(path, ignore=["a"])


def test_a_tensor_of_a_dtype_that_the_model_cannot_take_leaves_the_model_unchanged(path):
    saved(layers(c=WithParameter(nn.Parameter(torch.arange(3), requires_grad=False))), "int8", path)
    into = layers(c=WithParameter(nn.Parameter(torch.zeros(3))))
    before = snapshot(into)
    with pytest.raises(MismatchError, match=r"c\.value"):
        fewbits.load(path, into=into)
    assert snapshot(into).equals(before)


def test_a_weight_that_is_kept_in_the_file_loads_into_any_class(path):
    saved(layers(a=OwnForward(4, 4)), keeping(exclude=["a"]), path)
    loaded = fewbits.load(path, into=layers())
    assert type(loaded["a"]) is nn.Linear
    assert type(loaded["b"]).__name__ == "QuantizedConv1d"


def test_a_second_load_into_the_same_model_says_that_it_is_quantized_already(path):
    result = saved(layers(), "int8", path)
    loaded = fewbits.load(path, into=layers())
    with pytest.raises(MismatchError, match="quantized already"):
        fewbits.load(path, into=loaded)
    assert same_state(loaded, result)


def test_a_dequantized_model_can_be_loaded_into_again(path):
    result = saved(layers(), "int8", path)
    again = fewbits.load(path, into=fewbits.dequantize(fewbits.load(path, into=layers())))
    assert same_state(again, result)


def test_a_damaged_file_leaves_the_model_unchanged(path):
    saved(layers(), "int8", path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    into = layers()
    before = snapshot(into)
    with pytest.raises(fewbits.errors.DigestError):
        fewbits.load(path, into=into)
    assert snapshot(into).equals(before)


def test_the_error_names_the_file_and_the_class(path):
    saved(layers(), "int8", path)
    with pytest.raises(MismatchError, match=rf"{re.escape(str(path))} does not fit Linear"):
        fewbits.load(path, into=nn.Linear(4, 4))


@pytest.mark.parametrize(
    "make", [lambda: nn.LSTM(8, 8), lambda: nn.MultiheadAttention(8, 2), lambda: OwnForward(8, 8)],
    ids=["LSTM", "MHA", "subclass"],
)  # fmt: skip
@pytest.mark.parametrize("place", ["fresh", "meta"])
@every_scheme
@torch.no_grad()  # torch takes another path where a weight requires gradients
def test_a_file_made_from_a_state_dict_loads_into_any_module(make, place, scheme, path):
    source = seeded(make).eval()
    saved(dict(source.state_dict()), scheme, path)
    loaded = fewbits.load(path, into=(on_meta(make) if place == "meta" else seeded(make, 1)).eval())
    state, expected = loaded.state_dict(), converted(source, SCHEMES[scheme]())[0].state_dict()
    assert state.keys() == expected.keys()
    assert all(same_bits(part, expected[name]) for name, part in state.items())
    x = torch.randn(2, 8)
    inputs = (x,) * 3 if isinstance(source, nn.MultiheadAttention) else (x,)
    outputs = [model(*inputs) for model in (loaded, fewbits.dequantize(loaded).requires_grad_(False))]
    assert same_bits(*(output[0] if isinstance(output, tuple) else output for output in outputs))


def test_what_a_module_cannot_hold_is_refused_with_what_to_do(path):
    saved(dict(occupied().state_dict()), "int8", path)
    into = occupied()
    before = snapshot(into)
    with pytest.raises(
        MismatchError, match=r"weight is int8 channel in the file, but it has an attribute .*: exclude it"
    ):
        fewbits.load(path, into=into)
    assert snapshot(into).equals(before)
