"""Sources: models, mappings and files, and tensors that share memory."""

import types
from collections import OrderedDict, UserDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import fewbits
from fewbits import QuantizedTensor
from fewbits.errors import ArgumentError, SourceError
from fewbits.nn.storage import View, overlaps
from support.lifecycle_helpers import (
    TiedLM,
    as_bytes,
    files_in,
    mlp,
    named_tensors,
    quantize_small,
    read_header,
    small,
    snapshot,
    stored,
)


@st.composite
def views_of_one_storage(draw):
    """Named views, many overlapping; each element's value is its position in the storage."""
    flat = torch.arange(24)
    views = {}
    for index in range(draw(st.integers(1, 5))):
        if views and draw(st.booleans()):
            views[f"view{index}"] = draw(st.sampled_from(list(views.values()))).detach()
            continue
        rows, columns = draw(st.integers(0, 3)), draw(st.integers(1, 3))
        strides = draw(st.sampled_from([(columns, 1), (1, max(rows, 1)), (4, 1)]))
        views[f"view{index}"] = flat.as_strided((rows, columns), strides, draw(st.integers(0, 12)))
    return views


@given(views_of_one_storage())
def test_different_views_overlap_if_their_extents_do(views):
    extents = {n: (int(v.min()), int(v.max())) for n, v in views.items() if v.numel()}

    def differ_and_overlap(a, b):
        (low, high), (other_low, other_high) = extents[a], extents[b]
        return View.of(views[a]) != View.of(views[b]) and low <= other_high and other_low <= high

    expected = {a for a in extents if any(differ_and_overlap(a, b) for b in extents)}
    found = set(overlaps({name: View.of(view) for name, view in views.items()}))
    assert found <= expected
    # Finding one name of each view is enough: all names of a view share one fate.
    assert {View.of(views[name]) for name in found} == {View.of(views[name]) for name in expected}


@given(views_of_one_storage())
def test_two_views_have_the_same_key_exactly_if_they_are_the_same_view(views):
    for a in views.values():
        for b in views.values():
            same = (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())
            assert (View.of(a) == View.of(b)) == (same if a.numel() else a is b)


def test_overlapping_views_are_kept_with_a_reason_that_names_the_other():
    flat = torch.arange(96.0)
    tensors = {"a": flat[:64].view(8, 8), "b": flat[32:].view(8, 8), "c": torch.ones(8, 8)}
    result = quantize_small(tensors, "int8")
    assert result.ledger["a"].reason == "its memory overlaps that of b"
    assert result.ledger["b"].reason == "its memory overlaps that of a"
    assert [row.fate for row in result.ledger] == ["kept", "kept", "quantized"]
    assert torch.equal(result.model["b"], tensors["b"])


def test_a_tensor_and_its_transpose_are_kept():
    tensors = {"a": torch.rand(8, 4), "other": torch.rand(8, 4)}
    ledger = quantize_small(tensors | {"b": tensors["a"].T}, "int8").ledger
    assert (ledger["a"].fate, ledger["b"].fate) == ("kept", "kept")


def test_adjacent_slices_of_one_storage_are_independent():
    flat = torch.arange(128.0)
    result = quantize_small({"a": flat[:64].view(8, 8), "b": flat[64:].view(8, 8)}, "int8")
    assert result.ledger.count("quantized") == 2
    assert result.ledger.bytes_before == flat.nbytes


def test_equal_tensors_in_separate_storages_are_not_merged():
    tensor = torch.rand(8, 8)
    result = quantize_small({"a": tensor, "b": tensor.clone()}, "int8")
    assert result.ledger.count("quantized") == 2
    assert result.model["a"] is not result.model["b"]


def test_names_of_one_storage_share_one_result():
    model = TiedLM()
    for source in (model.state_dict(), dict(model.named_parameters(remove_duplicate=False))):
        result = quantize_small(source, "int8")
        assert result.ledger["lm_head.weight"].alias_of == "embed_tokens.weight"
        assert result.model["lm_head.weight"] is result.model["embed_tokens.weight"]


def test_a_module_under_two_names_is_one_module():
    model = mlp()
    model.add_module("again", model[2])
    result = quantize_small(model, "int8")
    assert result.model.again is result.model[2]
    assert result.ledger["again.weight"].alias_of == "2.weight"


def test_parameters_that_share_memory_stay_tied():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight = nn.Parameter(model["a"].weight.data)
    result = quantize_small(model, "int8").model
    assert result["a"].weight_stored is result["b"].weight_stored


@pytest.mark.parametrize("inplace", [False, True])
def test_buffers_that_share_memory_share_it_in_the_result_too(inplace):
    model = mlp()
    model.register_buffer("table", torch.ones(10))
    model.register_buffer("again", model.table.view(10))
    result = quantize_small(model, "int8", inplace=inplace).model
    assert result.again.data_ptr() == result.table.data_ptr()


@pytest.mark.parametrize("wrap", [dict, OrderedDict, UserDict, types.MappingProxyType], ids=lambda wrap: wrap.__name__)
def test_any_mapping_is_a_source(wrap):
    source = wrap(mlp().state_dict())
    result = quantize_small(source, "int8").model
    assert list(result) == list(source)
    assert isinstance(result["0.weight"], QuantizedTensor)
    assert isinstance(source["0.weight"], torch.Tensor)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"epoch": 3}, "'epoch' is a int"),
        ({"optimizer": {"lr": 1}}, "'optimizer' is a dict"),
        ({"config": None}, "'config' is a NoneType"),
        ({3: torch.ones(2, 2)}, "entry 3 is a Tensor"),
        ({("a", "b"): torch.ones(2, 2)}, r"entry \('a', 'b'\)"),
        ({"sparse": torch.eye(3).to_sparse()}, "sparse has layout torch.sparse_coo"),
        ({"nowhere": torch.ones(2, 2, device="meta")}, "nowhere is on the meta device"),
    ],
)
def test_an_entry_that_is_not_a_named_dense_tensor_is_refused(entries, message):
    with pytest.raises(SourceError, match=message):
        small().prepare(mlp().state_dict() | entries)


def test_a_mapping_that_is_quantized_already_is_refused():
    with pytest.raises(SourceError, match=r"0\.weight is quantized already"):
        small().prepare(quantize_small(mlp().state_dict(), "int8").model)


@pytest.mark.parametrize("scheme", ["int8", "fp16"])
def test_a_model_that_is_quantized_already_is_refused(scheme):
    with pytest.raises(SourceError, match="quantized already"):
        small().prepare(quantize_small(mlp(), scheme).model)


def test_a_file_that_is_quantized_already_is_refused(tmp_path):
    quantize_small(mlp(), "int8").save(tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="quantized already"):
        small().prepare(tmp_path / "model.safetensors")


@pytest.mark.parametrize("junk", [None, 3, nn.Linear, [torch.ones(2, 2)], torch.ones(2, 2), b"model.safetensors"])
def test_objects_that_are_not_sources_are_refused(junk):
    with pytest.raises(ArgumentError, match=r"cannot be quantized; give an nn\.Module, a state dict, or the path"):
        small().prepare(junk)


def test_in_place_a_mapping_holds_the_result():
    source = dict(mlp().state_dict())
    bias = source["0.bias"]
    result = quantize_small(source, "int8", inplace=True)
    assert result.model is source
    assert isinstance(source["0.weight"], QuantizedTensor)
    assert source["0.bias"] is bias
    assert result.report.ok
    assert result.report.sqnr_db > 30


def test_in_place_needs_a_mapping_that_can_be_changed():
    with pytest.raises(ArgumentError, match="inplace=True needs a mapping that can be changed, not mappingproxy"):
        small().prepare(types.MappingProxyType(mlp().state_dict()), inplace=True)


def test_a_file_is_never_changed_in_place(tmp_path):
    save_file(mlp().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ArgumentError, match="never changed in place"):
        small().prepare(tmp_path / "model.safetensors", inplace=True)


def test_in_place_a_mapping_is_converted_tensor_by_tensor_and_can_be_retried():
    source = dict(mlp().state_dict())
    source["2.weight"][3, 5] = float("nan")
    quantizer = small()
    quantizer.prepare(source, inplace=True)
    with pytest.raises(fewbits.errors.NonFiniteError):
        quantizer.convert()
    assert isinstance(source["0.weight"], QuantizedTensor)
    source["2.weight"][3, 5] = 0
    assert quantizer.convert() is source
    assert isinstance(source["2.weight"], QuantizedTensor)


@pytest.mark.parametrize("kind", ["module", "module in place", "mapping", "mapping in place", "path"])
@pytest.mark.parametrize("scheme", ["int8-tensor", "int8", "int4", "fp16"])
def test_every_kind_of_source_gives_the_same_tensors(tmp_path, kind, scheme):
    options = {"group_size": 8} if scheme == "int4" else {}
    if kind == "path":
        save_file(mlp().state_dict(), tmp_path / "source.safetensors")
        source, options = tmp_path / "source.safetensors", options | {"output": tmp_path / "out.safetensors"}
    else:
        source = mlp() if "module" in kind else dict(mlp().state_dict())
    result = quantize_small(source, scheme, inplace="in place" in kind, **options)
    result.save(tmp_path / "saved.safetensors")
    expected = quantize_small(mlp().state_dict(), scheme, **{k: v for k, v in options.items() if k != "output"})
    expected.save(tmp_path / "expected.safetensors")
    assert stored(tmp_path / "saved.safetensors") == stored(tmp_path / "expected.safetensors")


@pytest.mark.parametrize(
    "stride", [lambda t: t, lambda t: t.T.contiguous().T, lambda t: torch.stack([t, t], -1)[..., 0]]
)
@pytest.mark.parametrize("scheme", ["int8", "fp16"])
def test_strides_of_a_source_do_not_change_the_result(stride, scheme):
    tensors = mlp().state_dict()
    strided = {name: stride(t) if t.dim() == 2 else t for name, t in tensors.items()}
    results = [quantize_small(source, scheme).model["0.weight"] for source in (tensors, strided)]
    if scheme == "int8":
        assert results[0].equal(results[1])
    else:
        assert torch.equal(*results)


def test_an_expanded_weight_is_quantized_like_a_dense_one():
    wide = torch.arange(8.0).expand(4, 8)
    assert quantize_small({"w": wide}, "int8").report.ok


def test_a_model_that_cannot_be_copied_is_refused_with_the_advice_to_use_inplace():
    class Locked(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    with pytest.raises(SourceError, match=r"no copies.*inplace=True"):
        small().prepare(nn.Sequential(Locked(4, 4), nn.Linear(4, 4)))


def test_metadata_of_a_file_is_copied_to_the_result(tmp_path):
    save_file(mlp().state_dict(), tmp_path / "in.safetensors", metadata={"author": "someone", "format": "pt"})
    quantize_small(tmp_path / "in.safetensors", "int8", output=tmp_path / "out.safetensors")
    assert read_header(tmp_path / "out.safetensors")[1]["author"] == "someone"


@pytest.mark.parametrize("place", ["same", "relative", "link"])
def test_a_file_is_not_overwritten_by_its_own_result(tmp_path, place, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file(mlp().state_dict(), path)
    before = path.read_bytes()
    monkeypatch.chdir(tmp_path)
    if place == "link":
        (tmp_path / "link").symlink_to(path)
    output = {"same": path, "relative": "model.safetensors", "link": tmp_path / "link"}[place]
    quantizer = small()
    quantizer.prepare(path)
    with pytest.raises(ArgumentError, match="is the source itself"):
        quantizer.convert(output=output)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("output", "error"), [("missing/out.safetensors", fewbits.errors.CheckpointError), (".", ArgumentError)]
)
def test_an_output_that_cannot_be_written_is_an_error_and_can_be_retried(tmp_path, output, error):
    save_file(mlp().state_dict(), tmp_path / "in.safetensors")
    quantizer = small()
    quantizer.prepare(tmp_path / "in.safetensors")
    with pytest.raises(error, match=r"out\.safetensors|directory"):
        quantizer.convert(output=tmp_path / output)
    assert list(files_in(tmp_path)) == ["in.safetensors"]
    quantizer.convert(output=tmp_path / "out.safetensors")


def test_a_file_is_given_as_text_or_path_and_an_error_names_a_damaged_file(tmp_path):
    path = tmp_path / "in.safetensors"
    save_file(mlp().state_dict(), path)
    assert small().prepare(str(path)) == path
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(fewbits.errors.FormatError, match=r"in\.safetensors"):
        small().prepare(path)


def test_training_flags_and_gradients_survive():
    model = mlp().train()
    model[0].bias.requires_grad = False
    result = quantize_small(model, "int8").model
    assert result.training
    assert [result[0].bias.requires_grad, result[2].bias.requires_grad] == [False, True]
    assert isinstance(result[2].bias, nn.Parameter)


def test_kept_tensors_do_not_change_and_buffers_stay_buffers():
    model = TiedLM()
    result = quantize_small(model, "int8").model
    kept = {n: t for n, t in named_tensors(model).items() if n in named_tensors(result)}
    assert snapshot({n: named_tensors(result)[n] for n in kept}) == snapshot(kept)
    assert as_bytes(result.inv_freq) == as_bytes(model.inv_freq)
    assert "inv_freq" not in result.state_dict()


def test_parameters_of_a_bare_module_are_quantized():
    model = nn.Module()
    model.table = nn.Parameter(torch.rand(8, 8))
    result = quantize_small(model)
    assert result.ledger["table"].fate == "quantized"
    assert (result.model.table - model.table).abs().max() < 0.01
    assert type(fewbits.dequantize(result.model)) is nn.Module
