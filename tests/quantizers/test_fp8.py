"""FP8 checkpoints as sources: weights are read as bfloat16, and the ledger has a row for every tensor, scales too."""

import json
import logging
import math

import jsonschema
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits.checkpoint.shards import plan_shards
from fewbits.conversion.budget import Budget, Demand
from fewbits.errors import SourceError
from support.checkpoints import forged_ledger, write_shards
from support.fp8 import codes, expected, scale_shape, scales
from support.lifecycle_helpers import FEWER_EXAMPLES, files_in, quantize_small, small, snapshot
from test_reader import ROOT, read

BLOCK = (128, 128)


def blocks(name, *shape, dtype=torch.float8_e4m3fn, suffix="_scale_inv", block=BLOCK):
    return {name: codes(shape, dtype), name + suffix: scales(scale_shape(shape, block))}


def one_scale(name, *shape, scale=(), dtype=torch.float8_e4m3fn, scale_dtype=torch.float32):
    return {name: codes(shape, dtype), f"{name}_scale": scales(scale, scale_dtype)}


def checkpoint():
    """FP8 weights with every kind of scale, and other tensors of such checkpoints."""
    return {
        **blocks("layers.0.weight", 140, 130),
        **blocks("layers.1.weight", 130, 50, suffix="_scale"),
        **blocks("groups.weight", 7, 300, block=(1, 128)),
        **blocks("experts.gate_up_proj", 3, 130, 40),
        **one_scale("row.weight", 70, 31, scale=(70, 1), dtype=torch.float8_e5m2),
        **one_scale("rows.weight", 33, 20, scale=(33,), scale_dtype=torch.bfloat16),
        **one_scale("embed_tokens.weight", 50, 64),
        **one_scale("conv.weight", 40, 6, 3, 3, scale=(40, 1, 1, 1)),
        **one_scale("norm.weight", 77, scale=(1,)),
        "row.input_scale": scales(()),
        "self_attn.k_scale": scales((4, 200)),
        "plain.weight": torch.linspace(-1, 1, 40 * 30).reshape(40, 30),
        "unscaled.weight": codes((20, 20)),
        "ids": torch.arange(30),
    }


DEQUANTIZED = {
    "layers.0.weight": BLOCK, "layers.1.weight": BLOCK, "groups.weight": (1, 128), "experts.gate_up_proj": BLOCK,
    "row.weight": None, "rows.weight": None, "embed_tokens.weight": None, "conv.weight": None, "norm.weight": None,
}  # fmt: skip


def scale_of(tensors, name):
    return next(name + suffix for suffix in ("_scale_inv", "_scale") if name + suffix in tensors)


def dequantized(tensors):
    """The checkpoint as another tool would dequantize it, without its scales."""
    found = {n: expected(tensors[n], tensors[scale_of(tensors, n)], block) for n, block in DEQUANTIZED.items()}
    merged = {scale_of(tensors, name) for name in DEQUANTIZED}
    return {name: found.get(name, tensor) for name, tensor in tensors.items() if name not in merged}


def values(mapping):
    """The tensors of a loaded or quantized mapping, with quantized values split into their parts."""
    parts = {}
    for name, value in mapping.items():
        held = value.parts() if isinstance(value, fewbits.QuantizedTensor) else {"": value}
        parts |= {f"{name} {part}": tensor for part, tensor in held.items()}
    return snapshot(parts)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    safetensors.torch.save_file(checkpoint(), folder / "one.safetensors")
    torch.save(checkpoint(), folder / "one.pt")
    # Weights and their scales in different files.
    return {"one": folder / "one.safetensors", "torch": folder / "one.pt",
            "many": write_shards(folder / "many", checkpoint(), 3)}  # fmt: skip


SCHEMES = {
    "int8": small,
    "int8-tensor": lambda: small(fewbits.Int8PerTensor),
    "int4": lambda: small(fewbits.Int4Grouped, 8),
    "int4-asymmetric": lambda: small(fewbits.Int4Grouped, 7, symmetric=False),
    "fp16": lambda: small(fewbits.FP16Cast),
}


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory):
    """The files of the result in memory, by scheme and block size."""
    made = {}

    def make(scheme, block):
        if (scheme, block) not in made:
            folder = tmp_path_factory.mktemp("memory") / "many"
            result = fewbits.quantize(checkpoint(), SCHEMES[scheme](), on_failure="ignore")
            result.save(folder, max_shard_size=12_000)
            made[scheme, block] = files_in(folder)
        return made[scheme, block]

    return make


@FEWER_EXAMPLES
@given(
    scheme=st.sampled_from(list(SCHEMES)),
    source=st.sampled_from(["one", "torch", "many"]),
    threads=st.integers(1, 3),
    chunk=st.integers(1, 40),
    block=st.sampled_from([1 << 18, 400]),
    piece=st.sampled_from([1 << 18, 300]),
)
def test_quantizing_a_file_writes_the_same_bytes_as_saving_a_result_in_memory(
    tmp_path_factory, sources, in_memory, scheme, source, threads, chunk, block, piece
):
    folder = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbits.numerics.layout.BLOCK_ELEMENTS", block)
        patch.setattr("fewbits.checkpoint.chunks.CHUNK_ELEMENTS", chunk * block)
        made = in_memory(scheme, block)
        patch.setattr("fewbits.numerics.scaled.BLOCK_ELEMENTS", piece)
        output = fewbits.Output(folder / "file", max_shard_size=12_000, threads=threads)
        result = fewbits.quantize(sources[source], SCHEMES[scheme](), output=output, on_failure="ignore")
        for against in (sources[source], checkpoint()):
            assert result.report.to_dict() == fewbits.verify(folder / "file", against).to_dict()
    assert files_in(folder / "file") == made


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_equal_those_of_weights_dequantized_by_another_tool(sources, tmp_path, scheme):
    theirs = fewbits.quantize(dequantized(checkpoint()), SCHEMES[scheme](), on_failure="ignore").model
    fewbits.quantize(sources["many"], SCHEMES[scheme](), output=tmp_path / "out", on_failure="ignore")
    kept = {"self_attn.k_scale"}  # without FP8 weights beside it, this scale is quantized like a weight
    mine = values({name: value for name, value in fewbits.load(tmp_path / "out").items() if name not in kept})
    assert mine == values({name: value for name, value in theirs.items() if name not in kept})


@pytest.mark.parametrize("inplace", [False, True])
def test_the_result_of_a_mapping_has_dequantized_weights_and_no_fp8_scales(inplace):
    tensors = checkpoint()
    before = snapshot(tensors)
    result = quantize_small(tensors, "int8", inplace=inplace, exclude=["layers.0"])
    assert result.model.keys() == dequantized(checkpoint()).keys()
    kept = result.model["layers.0.weight"]
    assert torch.equal(kept, dequantized(checkpoint())["layers.0.weight"])
    assert torch.equal(result.model["unscaled.weight"].view(torch.uint8), codes((20, 20)).view(torch.uint8))
    if inplace:
        assert result.model is tensors
    else:
        assert snapshot(tensors) == before


def test_a_failure_in_place_leaves_scales_beside_exactly_the_unconverted_weights():
    tensors = {**blocks("a.weight", 200, 130), "b.weight": torch.full((8, 8), math.nan), **blocks("c.weight", 130, 200)}
    quantizer = small()
    quantizer.prepare(tensors, inplace=True)
    with pytest.raises(fewbits.errors.NonFiniteError, match=r"b\.weight"):
        quantizer.convert()
    assert tensors.keys() == {"a.weight", "b.weight", "c.weight", "c.weight_scale_inv"}
    assert isinstance(tensors["a.weight"], fewbits.QuantizedTensor)
    assert tensors["c.weight"].dtype == torch.float8_e4m3fn
    tensors["b.weight"] = torch.ones(8, 8)
    quantizer.convert()
    assert tensors.keys() == {"a.weight", "b.weight", "c.weight"}
    assert quantizer.validate().ok


def test_a_kept_fp8_weight_is_stored_dequantized_with_that_reason(sources, tmp_path):
    result = quantize_small(sources["many"], "int8", output=tmp_path / "out", exclude=["layers.0", "norm"])
    row = result.ledger["layers.0.weight"]
    assert (row.fate, row.reason) == ("kept", "excluded by 'layers.0'; dequantized from float8_e4m3fn")
    assert (row.bytes_before, row.bytes_after) == (18_200, 36_400)
    assert (row.dtype, row.dequantized_from) == (torch.bfloat16, torch.float8_e4m3fn)
    loaded = fewbits.load(tmp_path / "out")
    for name in ("layers.0.weight", "norm.weight"):
        assert torch.equal(loaded[name], dequantized(checkpoint())[name])


@pytest.mark.parametrize("source", ["one", "torch", "many"])
def test_every_tensor_has_a_row_and_bytes_add_up(sources, tmp_path, source):
    output = fewbits.Output(tmp_path / "out", max_shard_size=12_000)
    result = quantize_small(sources[source], "int8", output=output)
    ledger, tensors = result.ledger, checkpoint()
    assert [row.name for row in ledger] == sorted(tensors)
    assert {row.name: row.bytes_before for row in ledger} == {name: tensor.nbytes for name, tensor in tensors.items()}
    merged = {row.name: row for row in ledger if row.fate == "merged"}
    assert {row.merged_into: name for name, row in merged.items()} == {n: scale_of(tensors, n) for n in DEQUANTIZED}
    for row in merged.values():
        assert row.reason == f"scale of {row.merged_into}, which is dequantized with it"
        assert (row.bytes_after, row.shape, row.dtype) == (0, tuple(tensors[row.name].shape), tensors[row.name].dtype)
        assert row.dequantized_from is None
    files = [safetensors.torch.load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    assert ledger.bytes_after == sum(tensor.nbytes for file in files for tensor in file.values())
    assert ledger.count("merged") == len(DEQUANTIZED)
    assert result.report.bytes_before == sum(tensor.nbytes for tensor in tensors.values())
    assert "9 merged" in repr(ledger)
    assert ledger.summary().count("scales of dequantized weights") == 1


def test_scales_of_activations_and_weights_without_scales_are_kept_unchanged(sources, tmp_path):
    result = quantize_small(sources["one"], "int8", output=tmp_path / "out")
    reasons = {name: result.ledger[name].reason for name in ("row.input_scale", "self_attn.k_scale", "unscaled.weight")}
    assert reasons == {
        "row.input_scale": "a scale of activations, beside FP8 weights",
        "self_attn.k_scale": "a scale of activations, beside FP8 weights",
        "unscaled.weight": "float8_e4m3fn is a quantized dtype already",
    }
    loaded, tensors = fewbits.load(tmp_path / "out"), checkpoint()
    assert snapshot({name: loaded[name] for name in reasons}) == snapshot({name: tensors[name] for name in reasons})


def test_fp8_without_scales_gives_one_warning(sources, tmp_path, caplog):
    def told():
        found = [record.getMessage() for record in caplog.records if "fp8_without_scale" in record.getMessage()]
        caplog.clear()
        return found

    quantize_small(sources["one"], "int8", output=tmp_path / "out")
    (message,) = told()
    assert "tensors=1 first='unscaled.weight'" in message
    output = fewbits.Output(tmp_path / "fleet", max_shard_size="10kB")
    run = fewbits.FleetRun(sources["one"], "int8", output=output, on_failure="ignore")
    run.finish([run.write(file) for file in run.begin()])
    assert told() == [message]
    quantize_small(checkpoint(), "int8")
    assert told() == [message]
    quantize_small({"w": torch.ones(8, 256), "x": torch.ones(8, 256)}, "int8")
    assert told() == []


def test_a_tensor_named_like_an_activation_scale_is_quantized_if_no_weight_is_fp8():
    assert quantize_small({"self_attn.k_scale": torch.rand(8, 80)}, "int8").ledger.count("quantized") == 1


def test_a_result_loads_into_a_bfloat16_model(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding(50, 128)
            self.up_proj = nn.Linear(128, 200, bias=False)
            self.norm = nn.LayerNorm(200)

        def forward(self, ids):
            return self.norm(self.up_proj(self.embed_tokens(ids)))

    model = Model().bfloat16()
    tensors = model.state_dict() | blocks("up_proj.weight", 200, 128) | one_scale("embed_tokens.weight", 50, 128)
    safetensors.torch.save_file(tensors, tmp_path / "in")
    fewbits.quantize(tmp_path / "in", "int4", output=tmp_path / "out")
    with torch.device("meta"):
        empty = Model().bfloat16()
    weight = expected(tensors["up_proj.weight"], tensors["up_proj.weight_scale_inv"], BLOCK)
    embedding = expected(tensors["embed_tokens.weight"], tensors["embed_tokens.weight_scale"])
    model.load_state_dict({**model.state_dict(), "up_proj.weight": weight, "embed_tokens.weight": embedding})
    theirs = fewbits.quantize(model, "int4", compute="exact").model
    ids = torch.arange(50)
    for into in (empty, Model().bfloat16()):
        mine = fewbits.load(tmp_path / "out", into=into, compute="exact")
        assert torch.equal(mine(ids), theirs(ids))


def test_the_scales_of_source_and_result_may_have_the_same_name(tmp_path):
    tensors = one_scale("l.weight", 40, 60, scale=(40, 1))
    quantize_small(tensors, "int8").save(tmp_path / "out")
    assert set(safetensors.torch.load_file(tmp_path / "out")) == {"l.weight_packed", "l.weight_scale", "l.weight_shape"}
    assert list(fewbits.load(tmp_path / "out")) == ["l.weight"]
    assert list(read(tmp_path / "out")) == ["l.weight"]
    with pytest.raises(fewbits.errors.ArgumentError, match=r"l\.weight_scale is not in .*merged into l\.weight"):
        fewbits.checkpoint.reading.Checkpoint(tmp_path / "out").value("l.weight_scale")


def test_the_reader_in_34_lines_and_the_schema_accept_merged_scales(sources, tmp_path):
    quantize_small(sources["one"], "int4", output=tmp_path / "out", exclude=["layers.0"])
    mine = fewbits.load(tmp_path / "out")
    mine = {n: v.dequantize() if isinstance(v, fewbits.QuantizedTensor) else v for n, v in mine.items()}
    assert snapshot(mine) == snapshot(read(tmp_path / "out"))
    with safetensors.safe_open(tmp_path / "out", framework="pt") as file:
        metadata = file.metadata()
    parsed = {k: v if k in ("format", "fewbits.header_digest") else json.loads(v) for k, v in metadata.items()}
    schema = json.loads((ROOT / "docs" / "metadata.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(parsed)


@pytest.mark.parametrize("size", [1, 3000, 20_000, 10**9])
def test_a_merged_scale_is_in_the_shard_of_its_weight(sources, size):
    ledger = fewbits.plan(sources["one"], "int8").ledger
    for shard in plan_shards(ledger, size, ".safetensors"):
        for row in shard.ledger:
            assert row.merged_into is None or row.merged_into in shard.ledger
    shards = plan_shards(ledger, size, ".safetensors")
    assert sorted(row.name for shard in shards for row in shard.ledger) == [row.name for row in ledger]


@pytest.mark.parametrize("kind", ["mapping", "file"])
def test_fp8_weights_are_tied_if_codes_and_scales_are(tmp_path, kind):
    weight, scale = codes((40, 64)), scales((40, 1))
    tied = {"a.weight": weight, "b.weight": weight, "a.weight_scale": scale, "b.weight_scale": scale}
    apart = tied | {"b.weight_scale": scale * 2}
    made = {}
    for name, tensors in (("tied", tied), ("apart", apart)):
        torch.save(tensors, tmp_path / name)
        if kind == "mapping":
            result = quantize_small(tensors, "int8")
            result.save(tmp_path / f"{name}.out")
        else:
            result = quantize_small(tmp_path / name, "int8", output=tmp_path / f"{name}.out")
        assert result.report.ok
        assert fewbits.verify(tmp_path / f"{name}.out", tensors).ok
        made[name] = result.ledger, fewbits.load(tmp_path / f"{name}.out")
    ledger, loaded = made["tied"]
    assert (ledger["b.weight"].alias_of, ledger["b.weight"].dequantized_from) == ("a.weight", torch.float8_e4m3fn)
    assert [ledger[f"{n}.weight_scale"].merged_into for n in "ab"] == ["a.weight", "b.weight"]
    assert ledger.bytes_before == weight.nbytes + scale.nbytes
    assert loaded["a.weight"] is loaded["b.weight"]
    ledger, loaded = made["apart"]
    assert ledger.count("alias") == 0
    assert not torch.equal(loaded["a.weight"].dequantize(), loaded["b.weight"].dequantize())
    shard = plan_shards(made["tied"][0], 1, ".x")
    assert len(shard) == 1


MALFORMED = {
    "another block": (blocks("l.weight", 300, 200, block=(100, 50)), r"l\.weight_scale_inv \(float32, shape \(3, 4\)\) "
                      r"does not fit l\.weight \(float8_e4m3fn, shape \(300, 200\)\).*128 by 128"),
    "a scale for each column": (one_scale("l.weight", 300, 200, scale=(200,)), r"l\.weight_scale .* does not fit"),
    "transposed": ({"l.weight": codes((300, 200)), "l.weight_scale_inv": scales((2, 3))}, "does not fit"),
    "for one expert": ({"e.down": codes((3, 200, 300)), "e.down_scale_inv": scales((2, 3))}, "does not fit"),
    "no scales": ({"l.weight": codes((30, 20)), "l.weight_scale": torch.empty(0)}, "does not fit"),
    "whole numbers": ({"l.weight": codes((30, 20)), "l.weight_scale": torch.ones(30, 1, dtype=torch.uint8)},
                      r"l\.weight_scale \(uint8, .* cannot be its scale: scales are in float64, float32"),
    "FP8 scales": ({"l.weight": codes((30, 20)), "l.weight_scale": codes((30, 1))}, "cannot be its scale"),
    "both": ({**one_scale("l.weight", 30, 20), "l.weight_scale_inv": scales(())},
             r"l\.weight_scale_inv and l\.weight_scale beside it"),
    "a lost weight": ({"l.weight_scale_inv": scales((3, 2)), "m.weight": torch.rand(8, 8)},
                      r"l\.weight_scale_inv .* is the scale of l\.weight, which is missing.*give its directory"),
    "a lost weight of another layer": ({**one_scale("l.weight", 30, 20), "m.weight_scale": scales((3, 2))},
                                       r"m\.weight_scale .* is the scale of m\.weight, which is missing"),
    "a float weight": ({"l.weight": torch.rand(30, 20), "l.weight_scale_inv": scales(())},
                              r"l\.weight \(float32, shape \(30, 20\)\) is quantized already.*its dtype is not FP8"),
    "two levels": ({**one_scale("l.weight", 30, 20), "l.weight_scale_2": scales(())}, "FP8 with scales of scales"),
    "zero points": ({**one_scale("l.weight", 30, 20), "l.weight_zero_point": scales(())}, "FP8 with zero points"),
    "reordered": ({**one_scale("l.weight", 30, 20), "l.weight_g_idx": torch.arange(20)}, "in another order"),
}  # fmt: skip


@pytest.mark.parametrize("how", MALFORMED)
def test_scales_that_do_not_fit_are_refused_by_plan(tmp_path, how):
    tensors, message = MALFORMED[how]
    with pytest.raises(SourceError, match=message):
        quantize_small(tensors, "int8")
    safetensors.torch.save_file(tensors, tmp_path / "in")
    with pytest.raises(SourceError, match=message):
        fewbits.plan(tmp_path / "in", "int8")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 0.0, 1e38])
@pytest.mark.parametrize("exclude", [[], ["a"]], ids=["quantized", "kept"])
def test_a_bad_scale_is_an_error_that_names_it_and_leaves_nothing(tmp_path, bad, exclude):
    tensors = {**blocks("a.weight", 300, 200), **blocks("b.weight", 300, 200)}
    tensors["a.weight_scale_inv"][2, 1] = bad
    safetensors.torch.save_file(tensors, tmp_path / "in")
    for source, output in ((tensors, {}), (tmp_path / "in", {"output": tmp_path / "out"})):
        with pytest.raises(fewbits.errors.NumericsError, match=r"a\.weight .*, with a\.weight_scale_inv .*: "):
            quantize_small(source, "int8", exclude=exclude, **output)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


@pytest.mark.parametrize("exclude", [[], ["a"]], ids=["quantized", "kept"])
def test_a_nan_code_is_an_error_that_names_its_index(tmp_path, monkeypatch, exclude):
    monkeypatch.setattr("fewbits.numerics.layout.BLOCK_ELEMENTS", 100)
    monkeypatch.setattr("fewbits.checkpoint.chunks.CHUNK_ELEMENTS", 300)
    tensors = {**blocks("a.weight", 50, 200), **blocks("b.weight", 50, 200)}
    tensors["a.weight"].view(torch.uint8)[47, 131] = 0xFF
    safetensors.torch.save_file(tensors, tmp_path / "in")
    for source, output in ((tensors, {}), (tmp_path / "in", {"output": tmp_path / "out"})):
        with pytest.raises(fewbits.errors.NonFiniteError, match=r"a\.weight .*index \(47, 131\) is nan"):
            quantize_small(source, "int8", exclude=exclude, **output)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"l.weight": torch.rand(30, 20)}),
        lambda t: t.update({"l.weight_scale": torch.rand(1, 30)}),
        lambda t: t.pop("l.weight_scale"),
        lambda t: t.pop("l.weight"),
    ],
    ids=["dequantized", "another scale", "no scale", "no weight"],
)
def test_a_mapping_that_changes_after_it_was_prepared_is_refused(change):
    tensors = one_scale("l.weight", 30, 20, scale=(30, 1))
    quantizer = small()
    quantizer.prepare(tensors)
    change(tensors)
    with pytest.raises(SourceError, match="prepare it again"):
        quantizer.convert()


def test_weights_may_have_any_strides():
    tensors = {"l.weight": codes((60, 300)).T, "l.weight_scale_inv": scales((1, 3)).T}
    result = quantize_small(tensors | {"other": torch.rand(8, 8)}, "int8", exclude=["l"])
    assert torch.equal(result.model["l.weight"], expected(tensors["l.weight"], tensors["l.weight_scale_inv"], BLOCK))


def test_verify_finds_another_weight_and_another_scale(sources, tmp_path):
    quantize_small(sources["one"], "int8", output=tmp_path / "out", exclude=["layers.1"])
    assert fewbits.verify(tmp_path / "out", dequantized(checkpoint())).ok
    for name in ("layers.0.weight_scale_inv", "layers.1.weight_scale"):
        changed = checkpoint()
        changed[name] *= 1.5
        report = fewbits.verify(tmp_path / "out", changed)
        assert {failure.split(":")[0] for failure in report.failures} == {name.partition("_scale")[0]}
    del changed["layers.0.weight_scale_inv"]
    assert "float8_e4m3fn" in fewbits.verify(tmp_path / "out", changed).failures[0]


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda rows: rows["l.weight_scale"].update(merged_into="nowhere"), id="into nothing"),
        pytest.param(lambda rows: rows["l.weight_scale"].update(merged_into="o.weight"), id="into a float weight"),
        pytest.param(lambda rows: rows["l.weight_scale"].update(merged_into="l.weight_scale"), id="into itself"),
        pytest.param(lambda rows: rows["l.weight_scale"].update(merged_into=None), id="into null"),
        pytest.param(lambda rows: rows["l.weight_scale"].update(fate="kept"), id="kept after all"),
        pytest.param(lambda rows: rows["l.weight_scale"].update(bytes_before=3), id="other bytes"),
        pytest.param(lambda rows: rows["l.weight_scale"].update(bytes_after=4), id="stored"),
        pytest.param(lambda rows: rows["l.weight_scale"].update(dequantized_from="float8_e5m2"), id="dequantized"),
        pytest.param(lambda rows: rows["o.weight"].update(merged_into="l.weight"), id="stored and merged"),
        pytest.param(lambda rows: rows["l.weight"].update(dequantized_from=None), id="not dequantized"),
        pytest.param(lambda rows: rows["l.weight"].update(dequantized_from="float16"), id="from two bytes"),
        pytest.param(lambda rows: rows["l.weight"].update(dequantized_from="nn"), id="from no dtype"),
        pytest.param(lambda rows: rows["l.weight"].update(dequantized_from=8), id="from a number"),
    ],
)
def test_a_ledger_that_contradicts_itself_is_refused(tmp_path, edit):
    quantize_small(one_scale("l.weight", 30, 20) | {"o.weight": torch.rand(8, 8)}, "int8").save(tmp_path / "out")
    (tmp_path / "out").write_bytes(forged_ledger((tmp_path / "out").read_bytes(), edit))
    with pytest.raises(fewbits.errors.FormatError):
        fewbits.load(tmp_path / "out")


def test_a_ledger_without_the_fields_for_fp8_is_read(tmp_path):
    def forget(rows):
        for row in rows.values():
            del row["merged_into"], row["dequantized_from"]

    quantize_small({"o.weight": torch.rand(8, 8)}, "int8").save(tmp_path / "out")
    before = values(fewbits.load(tmp_path / "out"))
    (tmp_path / "out").write_bytes(forged_ledger((tmp_path / "out").read_bytes(), forget))
    assert values(fewbits.load(tmp_path / "out")) == before


def with_config(folder, config, tensors=None):
    folder.mkdir()
    safetensors.torch.save_file(tensors or blocks("l.weight", 300, 200), folder / "model.safetensors")
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config, indent=1))
    return folder


FP8_CONFIG = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def test_the_copied_configuration_has_no_fp8_settings(tmp_path, caplog):
    config = {"hidden_size": 200, "eps": 1e-06, "name": "é", "quantization_config": FP8_CONFIG, "list": [{"a": 1}],
              "text_config": {"vocab": 3, "quantization_config": FP8_CONFIG}}  # fmt: skip
    folder = with_config(tmp_path / "in", config)
    (folder / "hf_quant_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"quantization_config": 1}')
    before = files_in(folder)
    with caplog.at_level(logging.WARNING, "fewbits"):
        result = quantize_small(folder, "int8", output=tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(written.items()) == [
        ("hidden_size", 200), ("eps", 1e-06), ("name", "é"), ("list", [{"a": 1}]), ("text_config", {"vocab": 3}),
    ]  # fmt: skip
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == before["tokenizer.json"]
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert result.quantizer.left_behind == ("hf_quant_config.json",)
    assert "removed=['quantization_config', 'text_config.quantization_config']" in caplog.text
    assert files_in(folder) == before


@pytest.mark.parametrize("tensors", [None, {"l.weight": torch.rand(30, 20)}], ids=["FP8", "float"])
def test_a_configuration_without_fp8_settings_is_copied_unchanged(tmp_path, tensors, caplog):
    text = '{"a":   1,\n\n "b": [1.50]}' if tensors is None else '{"quantization_config": {"weight_block_size": 0}}'
    with_config(tmp_path / "in", text, tensors)
    (tmp_path / "in" / "sub").mkdir()
    (tmp_path / "in" / "sub" / "config.json").write_text("no JSON")
    with caplog.at_level(logging.WARNING, "fewbits"):
        quantize_small(tmp_path / "in", "int8", output=tmp_path / "out")
    for name in ("config.json", "sub/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    assert "config_changed" not in caplog.text


@pytest.mark.parametrize("inner", [lambda value: value, lambda value: {"text_config": value}], ids=["plain", "inner"])
def test_the_configuration_sets_the_block_size(tmp_path, inner):
    tensors = blocks("l.weight", 300, 200, block=(32, 64))
    config = inner({"quantization_config": FP8_CONFIG | {"weight_block_size": [32, 64]}})
    folder = with_config(tmp_path / "in", config, tensors)
    quantize_small(folder, "fp16", output=tmp_path / "out")
    weight = expected(tensors["l.weight"], tensors["l.weight_scale_inv"], (32, 64))
    assert torch.equal(fewbits.load(tmp_path / "out")["l.weight"].float(), weight.half().float())


def test_scales_of_default_blocks_are_refused_if_the_configuration_states_others(tmp_path):
    folder = with_config(tmp_path / "in", {"quantization_config": FP8_CONFIG | {"weight_block_size": [64, 64]}})
    with pytest.raises(SourceError, match=r"does not fit l\.weight.*64 by 64"):
        fewbits.plan(folder, "int8")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("no JSON", r"config\.json: its text"),
        ('{"a": 1, "a": 2}', "'a' is in its text twice"),
        ({"quantization_config": {"weight_block_size": [128]}}, r"weight_block_size is \[128\]"),
        ({"quantization_config": {"weight_block_size": [128, 0]}}, "two positive integers"),
        ({"quantization_config": {"weight_block_size": "128x128"}}, "two positive integers"),
        ({"quantization_config": {"weight_block_size": [128, True]}}, "two positive integers"),
    ],
)
def test_an_invalid_configuration_is_refused_if_weights_are_fp8(tmp_path, config, message):
    folder = with_config(tmp_path / "in", config)
    with pytest.raises(fewbits.errors.FormatError, match=message):
        fewbits.plan(folder, "int8")


@pytest.mark.parametrize("config", [{"quantization_config": None}, {"quantization_config": {"quant_method": "fp8"}}])
def test_without_a_stated_block_size_the_common_sizes_are_tried(tmp_path, config):
    ledger = quantize_small(with_config(tmp_path / "in", config), "int8", output=tmp_path / "out").ledger
    assert ledger["l.weight"].fate == "quantized"
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {}


def test_a_memory_limit_includes_the_memory_for_dequantizing(sources, tmp_path):
    quantizer = small()
    quantizer.prepare(one_scale("l.weight", 2000, 1000))
    row = quantizer.ledger["l.weight"]
    observers = {"l.weight": fewbits.MinMaxObserver()}
    plain = fewbits.Ledger([fewbits.LedgerRow.from_dict(row.to_dict() | {"dequantized_from": None})])
    for budget in (Budget(1, 1 << 18), Budget(3, 1 << 20)):
        for by_rows in (True, False):
            more = Demand(quantizer.ledger, observers, by_rows, True).needed(row, budget)
            less = Demand(plain, observers, by_rows, True).needed(plain["l.weight"], budget)
            assert more - less == budget.threads * 32 * (1 << 18)
    output = fewbits.Output(tmp_path / "bound", max_memory="200MB")
    quantize_small(sources["one"], "int8", output=output)
    quantize_small(sources["one"], "int8", output=tmp_path / "free")
    assert (tmp_path / "bound").read_bytes() == (tmp_path / "free").read_bytes()


@pytest.mark.parametrize("threads", [1, 3])
def test_progress_counts_every_byte_once(sources, tmp_path, threads):
    steps = []
    output = fewbits.Output(tmp_path / "out", threads=threads)
    ledger = quantize_small(sources["many"], "int4", output=output, progress=steps.append).ledger
    steps = [step for step in steps if step.activity == "convert"]
    assert steps[-1].done == steps[-1].total == sum(row.bytes_before for row in ledger.stored)
    assert {step.name for step in steps} == {row.name for row in ledger.stored}
