"""Reading: saved values come back, and files that fewbits did not write are refused with a reason."""

import os
import pickle

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from support.checkpoints import save, state
from support.lifecycle_helpers import quantize_small

KEPT = {
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(-0.0),
    "flags": torch.tensor([True, False]),
    "count": torch.tensor(2**62),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "wide": torch.tensor([2**16 - 1], dtype=torch.uint16),
    "complex": torch.tensor([1 + 2j, float("nan")], dtype=torch.complex64),
    "eight": torch.ones(3).to(torch.float8_e4m3fn),
    "five": torch.ones(2, 3).to(torch.float8_e5m2),
    "nan": torch.tensor([float("nan"), float("inf")]),
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("files") / "file.safetensors"


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("scheme", ["int8", "int8-tensor", "int4", "fp16"])
def test_load_gives_what_convert_gave(scratch, scheme):
    result = save(scratch, state(), scheme)
    loaded = fewbits.load(scratch)
    assert loaded.keys() == result.model.keys()
    for name, value in result.model.items():
        same = (
            value.equal if isinstance(value, fewbits.QuantizedTensor) else lambda t, value=value: torch.equal(t, value)
        )
        assert same(loaded[name])


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_tensor_of_any_dtype_and_shape_round_trips(scratch, name):
    save(scratch, {"m.weight": torch.randn(4, 8), name: KEPT[name]})
    assert bits(fewbits.load(scratch)[name]) == bits(KEPT[name])


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_tensor_round_trips_from_file_to_file(tmp_path, name):
    safetensors.torch.save_file({"m.weight": torch.randn(4, 8), name: KEPT[name]}, tmp_path / "in")
    report = quantize_small(tmp_path / "in", "int8", output=tmp_path / "out").report
    assert report.ok
    assert bits(fewbits.load(tmp_path / "out")[name]) == bits(KEPT[name])


@pytest.mark.parametrize("lazily", [torch.conj, lambda t: t.conj().imag], ids=["conjugated", "negated"])
def test_a_kept_tensor_with_a_pending_operation_is_stored_as_it_reads(scratch, lazily):
    tensor = lazily(torch.tensor([1 + 2j, 3 - 4j]))
    quantize_small({"m.weight": torch.randn(4, 8), "lazy": tensor}, "int8").save(scratch)
    assert fewbits.load(scratch)["lazy"].tolist() == tensor.tolist()


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=5, unique=True))
def test_any_name_that_json_can_hold_round_trips(scratch, names):
    names = [f"{name}." for name in names]
    save(scratch, {f"{name}w": torch.randn(4, 8) for name in names} | {f"{name}bias": torch.ones(2) for name in names})
    assert fewbits.load(scratch).keys() == {f"{name}{end}" for end in ("w", "bias") for name in names}


@pytest.mark.parametrize(
    "name",
    ["x" * 5000, "é.ü.漢字.🙂", 'quo"ted', "back\\slash", "new\nline", "tab\t", "nul\0", " ", ".", "__metadata__.w"],
)
def test_an_odd_name_round_trips(scratch, name):
    save(scratch, {name: torch.randn(4, 8)})
    assert list(fewbits.load(scratch)) == [name]


def test_codes_alias_the_mapped_file_and_a_change_stays_in_memory(scratch):
    save(scratch, state())
    before = scratch.read_bytes()
    fewbits.load(scratch)["layers.0.weight"].packed.zero_()
    assert scratch.read_bytes() == before


def test_loading_into_a_model_restores_tied_names_and_shapes(scratch):
    model = nn.Sequential(nn.Embedding(30, 70), nn.Linear(70, 30, bias=False))
    model[1].weight = model[0].weight
    result = save(scratch, model)
    bare = nn.Sequential(nn.Embedding(30, 70), nn.Linear(70, 30, bias=False))
    bare[1].weight = bare[0].weight
    loaded = fewbits.load(scratch, into=bare)
    assert loaded is bare
    assert loaded[0].weight_stored is loaded[1].weight_stored
    index = torch.arange(30)
    assert torch.equal(loaded(index), result.model(index))


def test_a_model_that_does_not_fit_is_named_in_full_and_unchanged(scratch):
    save(scratch, nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)))
    model = nn.Sequential(nn.Linear(8, 5), nn.Identity(), nn.Linear(2, 2))
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(fewbits.errors.MismatchError) as caught:
        fewbits.load(scratch, into=model)
    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"):
        assert name in str(caught.value)
    after = model.state_dict(keep_vars=True)
    assert all(id(after[name]) == key and torch.equal(after[name], value) for name, (key, value) in before.items())


def test_check_header_reads_a_file_whose_payload_has_changed(scratch):
    save(scratch, state())
    with open(scratch, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert fewbits.load(scratch, check="header").keys() == state().keys()
    with pytest.raises(fewbits.errors.DigestError):
        fewbits.load(scratch, check="digests")


@pytest.mark.parametrize("check", ["none", "", None, True, "Digests", ["header"]])
@pytest.mark.parametrize("into", [None, lambda: nn.Linear(8, 4)], ids=["mapping", "model"])
def test_another_value_of_check_is_a_named_error(scratch, check, into):
    save(scratch, nn.Linear(8, 4))
    with pytest.raises(fewbits.errors.ArgumentError, match="check must be"):
        fewbits.load(scratch, check=check, into=into and into())


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"fewbits": "1"}])
def test_a_plain_safetensors_file_is_said_not_to_be_ours(scratch, metadata):
    safetensors.torch.save_file({"m.weight": torch.randn(4, 8)}, scratch, metadata)
    with pytest.raises(fewbits.errors.FormatError, match="not written by fewbits"):
        fewbits.load(scratch)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda path: None, id="missing"),
        pytest.param(lambda path: path.mkdir(), id="a directory"),
        pytest.param(lambda path: os.mkfifo(path), id="a pipe"),
        pytest.param(lambda path: path.symlink_to(path), id="a link to itself"),
        pytest.param(lambda path: path.symlink_to("nowhere"), id="a dangling link"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(pickle.dumps({"w": [1.0]})), id="a pickle"),
        pytest.param(
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), id="a git-lfs pointer"
        ),
    ],
)
def test_what_is_no_checkpoint_is_a_named_error(tmp_path, make):
    make(tmp_path / "f")
    with pytest.raises(fewbits.errors.CheckpointError, match="/f "):
        fewbits.load(tmp_path / "f")
    with pytest.raises(fewbits.errors.CheckpointError, match="/f "):
        quantize_small(tmp_path / "f", "int8", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["", "x" * 300, "nul\0"])
def test_a_path_that_no_file_can_have_is_a_named_error(path):
    with pytest.raises((fewbits.errors.CheckpointError, fewbits.errors.ArgumentError)):
        fewbits.load(path)


def test_our_own_file_is_not_quantized_again(tmp_path):
    save(tmp_path / "f", state())
    with pytest.raises(fewbits.errors.SourceError, match="quantized already"):
        quantize_small(tmp_path / "f", "int8", output=tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_our_own_mapping_is_not_quantized_again(scratch):
    save(scratch, state())
    with pytest.raises(fewbits.errors.SourceError, match="quantized already"):
        quantize_small(fewbits.load(scratch), "int8")
