"""The content of a file: the parts of every tensor, decoded without fewbits, and the strings in the header."""

import json
import math
import platform

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits.checkpoint.reading import Checkpoint
from support.checkpoints import AnyScheme, decoded, forged, metadata_of, read_codes, save, specs, split, state
from support.lifecycle_helpers import quantize_small


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("files") / "file.safetensors"


def words(count, bits):
    return math.ceil(count * bits / 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@given(spec=specs(), rows=st.integers(1, 40), columns=st.integers(1, 70))
def test_parts_have_the_names_dtypes_and_shapes_of_pack_quantized(scratch, dtype, spec, rows, columns):
    save(scratch, {"m.weight": torch.randn(rows, columns).to(dtype)}, AnyScheme(spec))
    group = min(spec.group_size or columns, columns)
    scale = (1,) if spec.granularity == "tensor" else (rows, math.ceil(columns / group))
    expected = {
        "m.weight_packed": (torch.int32, (rows, words(columns, spec.bits))),
        "m.weight_scale": (dtype, scale),
        "m.weight_shape": (torch.int64, (2,)),
    }
    if not spec.symmetric:
        expected["m.weight_zero_point"] = (torch.int32, (words(scale[0], spec.bits), *scale[1:]))
    stored = safetensors.torch.load_file(scratch)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == expected
    assert stored["m.weight_shape"].tolist() == [rows, columns]


@given(spec=specs(), shape=st.tuples(st.integers(1, 40), st.integers(1, 70)), seed=st.integers(0, 99))
def test_an_independent_decoder_gets_what_load_gets_and_what_went_in(scratch, spec, shape, seed):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    save(scratch, {"m.weight": weight}, AnyScheme(spec))
    values = decoded(scratch, "m.weight")
    assert torch.equal(values.float(), fewbits.load(scratch)["m.weight"].dequantize())
    scale = safetensors.torch.load_file(scratch)["m.weight_scale"].double()
    group = min(spec.group_size or shape[1], shape[1])
    scale = scale.reshape(1, 1) if spec.granularity == "tensor" else scale.repeat_interleave(group, 1)[:, : shape[1]]
    assert ((values - weight).abs() <= scale / 2 + weight.double().abs() * 2.0**-23).all()


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(lambda: nn.Linear(70, 9), id="linear"),
        pytest.param(lambda: nn.Conv1d(6, 4, 5, groups=2), id="conv1d-groups"),
        pytest.param(lambda: nn.Conv2d(6, 4, (3, 2)), id="conv2d"),
        pytest.param(lambda: nn.Conv3d(2, 4, 3), id="conv3d"),
        pytest.param(lambda: nn.ConvTranspose1d(6, 4, 5), id="transposed1d"),
        pytest.param(lambda: nn.ConvTranspose2d(6, 8, (3, 2), groups=2), id="transposed2d-groups"),
        pytest.param(lambda: nn.ConvTranspose3d(4, 2, 3), id="transposed3d"),
        pytest.param(lambda: nn.Embedding(11, 70), id="embedding"),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_layout_decodes_into_the_true_shape(scratch, layer, symmetric):
    torch.manual_seed(0)
    layer = layer()
    spec = fewbits.QuantSpec(5, "group", group_size=12, symmetric=symmetric)
    result = save(scratch, layer, AnyScheme(spec))
    assert torch.equal(decoded(scratch, "weight").float(), result.model.weight)
    error = (decoded(scratch, "weight") - layer.weight.double()).abs().max()
    assert 0 < error < layer.weight.abs().max() / 15


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_the_last_word_has_left_over_is_zero(scratch, symmetric):
    spec = fewbits.QuantSpec(3, "channel", symmetric=symmetric)
    save(scratch, {"m.weight": torch.randn(5, 7)}, AnyScheme(spec))
    stored = safetensors.torch.load_file(scratch)
    for word in stored["m.weight_packed"].flatten().tolist():
        assert not any(read_codes([word], bits=1, count=32)[7 * 3 :])
    for word in [] if symmetric else stored["m.weight_zero_point"].flatten().tolist():
        assert not any(read_codes([word], bits=1, count=32)[5 * 3 :])


def test_a_cast_tensor_keeps_its_name(scratch):
    source = state()
    save(scratch, source, "fp16")
    stored = safetensors.torch.load_file(scratch)
    assert torch.equal(stored["layers.0.weight"], source["layers.0.weight"].half())
    assert torch.equal(stored["layers.0.bias"], source["layers.0.bias"])


def test_the_keys_are_these_and_all_values_are_json(scratch):
    save(scratch, state())
    assert metadata_of(scratch).keys() == {
        "format_version", "ledger", "architecture", "versions", "metrics", "digests", "header_digest",
    }  # fmt: skip
    assert metadata_of(scratch)["versions"] == {"fewbits": fewbits.__version__, "torch": torch.__version__}


def test_the_architecture_is_the_class_of_the_model(scratch):
    save(scratch, nn.Sequential(nn.Linear(4, 4)))
    assert metadata_of(scratch)["architecture"] == "torch.nn.modules.container.Sequential"
    save(scratch, state())
    assert metadata_of(scratch)["architecture"] is None


def test_the_ledger_in_the_file_is_the_ledger(scratch):
    result = save(scratch, state(), "int4", group_size=64)
    rows = [json.loads(json.dumps(row.to_dict())) for row in result.ledger]
    assert metadata_of(scratch)["ledger"] == rows
    assert fewbits.Ledger(map(fewbits.LedgerRow.from_dict, rows)) == result.ledger


def test_metrics_in_the_file_are_those_of_the_report(scratch):
    result = save(scratch, state())
    metrics = metadata_of(scratch)["metrics"]
    measured = {t.name: t.measurement for t in result.report.tensors if t.measurement is not None}
    assert metrics.keys() == measured.keys()
    for name, measurement in measured.items():
        assert metrics[name]["sqnr_db"] == float(f"{measurement.sqnr_db:.6g}")
        assert metrics[name]["worst_bound_ratio"] == float(f"{measurement.worst_bound_ratio:.6g}")


def test_a_tensor_without_error_has_no_figure_in_decibels(scratch):
    save(scratch, {"m.weight": torch.zeros(4, 8), "n.weight": torch.eye(4)})
    assert metadata_of(scratch)["metrics"]["m.weight"]["sqnr_db"] is None


def test_figures_that_are_not_finite_do_not_stop_a_file_from_being_written(scratch):
    save(scratch, {"m.weight": torch.randn(4, 8, dtype=torch.float64) * 1e200})
    assert fewbits.load(scratch)["m.weight"].dequantize().isfinite().all()


def test_nothing_in_a_file_tells_where_it_was_made(tmp_path):
    save(tmp_path / "file.safetensors", state())
    data = (tmp_path / "file.safetensors").read_bytes()
    for secret in (str(tmp_path), tmp_path.name, "file.safetensors", f'"{platform.node()}"'):
        assert secret.encode() not in data


def test_strings_of_the_source_are_carried_over_and_ours_win(tmp_path):
    strings = {"license": "mit", "note": 'quotes " and é', "format": "np"}
    safetensors.torch.save_file({"m.weight": torch.randn(4, 8)}, tmp_path / "in", strings)
    quantize_small(tmp_path / "in", "int8", output=tmp_path / "out")
    kept = split((tmp_path / "out").read_bytes())[0]["__metadata__"]
    assert (kept["license"], kept["note"], kept["format"]) == ("mit", 'quotes " and é', "pt")
    fewbits.load(tmp_path / "out")


def test_strings_that_pose_as_ours_are_not_carried_over(tmp_path):
    strings = {"fewbits.header_digest": "0", "fewbits.note": "x"}
    safetensors.torch.save_file({"m.weight": torch.randn(4, 8)}, tmp_path / "in", strings)
    quantize_small(tmp_path / "in", "int8", output=tmp_path / "out")
    assert "note" not in metadata_of(tmp_path / "out")


def test_strings_from_a_newer_release_are_ignored_if_the_version_is_ours(scratch):
    save(scratch, state())
    scratch.write_bytes(forged(scratch.read_bytes(), lambda strings: strings.update({"fewbits.novelty": "1"})))
    fewbits.load(scratch)


@pytest.mark.parametrize("part", ["packed", "scale", "shape"])
@pytest.mark.parametrize("kind", ["mapping", "path"])
def test_a_tensor_with_the_name_of_a_part_is_refused_before_anything_is_written(tmp_path, part, kind):
    source = {"a.weight": torch.randn(4, 8), f"a.weight_{part}": torch.ones(3)}
    if kind == "path":
        safetensors.torch.save_file(source, tmp_path / "in")

    def run():
        if kind == "path":
            quantize_small(tmp_path / "in", "int8", output=tmp_path / "out")
        else:
            quantize_small(source, "int8", validate=False).save(tmp_path / "out")

    with pytest.raises(fewbits.FewbitsError, match=f"a.weight_{part}"):
        run()
    assert {entry.name for entry in tmp_path.iterdir()} <= {"in"}


def test_the_name_of_a_part_that_this_scheme_does_not_write_is_free(scratch):
    source = {"a.weight": torch.randn(4, 8), "a.weight_zero_point": torch.ones(3)}
    save(scratch, source)
    assert torch.equal(fewbits.load(scratch)["a.weight_zero_point"], torch.ones(3))


def test_output_figures_are_read_back_and_an_exact_output_is_infinite(scratch):
    save(scratch, state())
    name = next(row["name"] for row in metadata_of(scratch)["ledger"] if row["fate"] == "quantized")
    assert not {"output_sqnr_db", "model_metrics"} & metadata_of(scratch).keys()
    figures = {"fewbits.output_sqnr_db": json.dumps({name: None}), "fewbits.model_metrics": '{"kl": 0.5, "sqnr": null}'}
    scratch.write_bytes(forged(scratch.read_bytes(), lambda strings: strings.update(figures)))
    metadata = Checkpoint(scratch).metadata
    assert metadata.output_sqnr_db == {name: math.inf}
    assert metadata.model_metrics == {"kl": 0.5, "sqnr": None}


@pytest.mark.parametrize("key", ["output_sqnr_db", "model_metrics"])
@pytest.mark.parametrize("text", ["[]", "7", '{"m.weight": "good"}', '{"m.weight": 1e999}', '{"m.weight": [1]}', "{"])
def test_output_figures_that_are_no_figures_are_refused(scratch, key, text):
    save(scratch, {"m.weight": torch.randn(4, 8)})
    scratch.write_bytes(forged(scratch.read_bytes(), lambda strings: strings.update({f"fewbits.{key}": text})))
    with pytest.raises(fewbits.errors.FormatError, match=key):
        fewbits.load(scratch)


def test_output_figures_of_a_tensor_that_is_not_quantized_are_refused(scratch):
    save(scratch, {"m.weight": torch.randn(4, 8), "m.bias": torch.randn(4)})
    figures = {"fewbits.output_sqnr_db": '{"m.bias": 30.0}'}
    scratch.write_bytes(forged(scratch.read_bytes(), lambda strings: strings.update(figures)))
    with pytest.raises(fewbits.errors.FormatError, match=r"outputs of m\.bias were measured.*not quantized"):
        fewbits.load(scratch)
