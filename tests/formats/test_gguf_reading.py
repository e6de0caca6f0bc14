"""A GGUF file is loaded and converted with its codes unchanged, and under the names of transformers."""

import json
import struct
import sys

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import fewbits
from fewbits.checkpoint.reading import Checkpoint
from fewbits.cli.commands import cli
from fewbits.errors import ArgumentError, FewbitsError, FormatError
from fewbits.extend import GGUF
from fewbits.formats.gguf_names import RENAMED, transformers_name
from support.gguf_files import tiny_llama, write, write_llama

CODED = {"Q4_0": "int4", "Q4_1": "int4", "Q5_0": "int5", "Q5_1": "int5", "Q8_0": "int8"}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


def blocks(type_name, rows, columns, seed, scales=None):
    """Random bytes as blocks, with these scales (and offsets)."""
    generator = np.random.default_rng(seed)
    size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    data = generator.integers(0, 256, (rows, columns // size, nbytes), dtype=np.uint8)
    if scales is None:
        scales = generator.normal(size=(rows, columns // size)).astype(np.float16)
    data[..., :2] = scales[..., None].view(np.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("type_name", ["Q4_0", "Q5_0", "Q8_0"])
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.0, -0.0, 1e-7, -0.5, 65504.0]))
def test_codes_decode_to_the_numbers_of_the_gguf_package(scratch, type_name, seed, scale):
    scales = np.array([[scale, 0.01], [-0.02, 3.0]], np.float16)
    data = blocks(type_name, 2, 64, seed, scales)
    loaded = fewbits.load(write(scratch / "codes.gguf", {"a.weight": (data, type_name)}))["a.weight"]
    assert str(loaded.spec).startswith(CODED[type_name])
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType[type_name])
    assert torch.equal(loaded.dequantize(), torch.from_numpy(expected))


@pytest.mark.parametrize("type_name", ["Q4_1", "Q5_1"])
@given(seed=st.integers(0, 2**32 - 1))
def test_offsets_that_are_zero_points_keep_their_codes(scratch, type_name, seed):
    data = blocks(type_name, 3, 64, seed)
    generator = np.random.default_rng(seed)
    scales = 2.0 ** generator.integers(-8, 2, (3, 2))
    scales[0, 0] = 0
    offsets = -scales * generator.integers(0, 2 ** int(type_name[1]), (3, 2))
    pairs = np.stack([scales, offsets], -1).astype(np.float16) + np.float16(0)
    data.reshape(3, 2, -1)[..., :4] = pairs.view(np.uint8)
    loaded = fewbits.load(write(scratch / "offsets.gguf", {"a.weight": (data, type_name)}))["a.weight"]
    assert str(loaded.spec).startswith(f"{CODED[type_name]} group 32 asymmetric")
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType[type_name])
    assert torch.equal(loaded.dequantize(), torch.from_numpy(expected))


@pytest.mark.parametrize("type_name", ["Q4_1", "Q5_1", "Q4_K", "Q6_K", "IQ4_NL", "MXFP4"])
def test_other_blocks_are_dequantized_and_the_ledger_says_so(scratch, type_name):
    data = blocks(type_name, 2, 256, 0)
    path = write(scratch / "other.gguf", {"a.weight": (data, type_name)})
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[type_name]))
    assert torch.equal(fewbits.load(path)["a.weight"].nan_to_num(), expected.nan_to_num())
    fewbits.convert(path, scratch / type_name)
    row = Checkpoint(scratch / type_name).ledger["a.weight"]
    assert row.fate == "kept"
    assert row.reason.startswith(f"{type_name} of GGUF, dequantized")


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])
def test_floats_are_read_as_they_are(scratch, type_name, llama):
    loaded = fewbits.load(write_llama(scratch / "floats.gguf", llama, type_name))
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[type_name]
    for name, weight in llama.state_dict().items():
        assert torch.equal(loaded[name], weight if weight.dim() == 1 else weight.to(dtype)), name


def test_names_and_rows_are_those_of_transformers(scratch):
    model = tiny_llama(attention_bias=True)
    loaded = fewbits.load(write_llama(scratch / "names.gguf", model))
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("architecture", RENAMED)
def test_the_gguf_package_agrees_with_every_name(architecture):
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(known, 1)
    tensors = [gguf.TENSOR_NAMES[tensor].format(bid=0) for tensor in gguf.MODEL_TENSORS[known]]
    others = {f"{name}.x": transformers_name(architecture, f"{name}.x") for name in tensors}
    renamed = {name: other for name, other in others.items() if name != other}
    assert len(renamed) >= 12
    assert all(names.get_name(other, try_suffixes=(".x",)) == name for name, other in renamed.items())


def test_tensors_of_other_architectures_keep_their_names(scratch):
    array = np.ones((4, 32), np.float32)
    path = write(scratch / "t5.gguf", {"enc.blk.0.attn_q.weight": (array, "F32")}, {"general.architecture": "t5"})
    assert list(fewbits.load(path)) == ["enc.blk.0.attn_q.weight"]


@pytest.mark.parametrize("type_name", ["Q4_0", "Q8_0"])
def test_the_command_line_converts_a_gguf_file_for_a_model(scratch, type_name, llama):
    path = write_llama(scratch / f"{type_name}.gguf", llama, type_name, embeddings="F32")
    result = CliRunner().invoke(
        cli, ["convert", str(path), "-o", str(scratch / f"from-{type_name}"), "--format", "fewbits", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["quantized"] == 14
    model = fewbits.load(scratch / f"from-{type_name}", into=tiny_llama(seed=1), compute="exact")
    reference = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=path.name)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, reference(tokens).logits, atol=1e-5)


def test_a_model_is_loaded_with_the_codes_of_the_file(scratch, llama):
    path = write_llama(scratch / "into.gguf", llama, "Q8_0", embeddings="F32")
    model = fewbits.load(path, into=tiny_llama(seed=1), compute="exact")
    reference = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=path.name)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, reference(tokens).logits, atol=1e-5)


def test_dequantized_tensors_can_be_quantized_again(scratch, llama):
    floats = fewbits.load(write_llama(scratch / "again.gguf", llama, "Q8_0"), dequantize=True)
    result = fewbits.quantize(floats, "int4", group_size=32, min_elements=0)
    assert result.ledger["model.layers.0.mlp.up_proj.weight"].spec.bits == 4
    with pytest.raises(FewbitsError, match=r"GGUF file.*fewbits.load\(path, dequantize=True\)"):
        fewbits.quantize(scratch / "again.gguf", "int4", output=scratch / "again.safetensors")


def test_a_scale_that_is_no_number_is_refused_by_name(scratch):
    data = blocks("Q4_0", 2, 64, 0, np.array([[1, np.nan], [1, 1]], np.float16))
    path = write(scratch / "nan.gguf", {"a.weight": (data, "Q4_0")})
    with pytest.raises(FormatError, match=r"a.weight: a scale of its Q4_0 blocks is NaN or Inf"):
        fewbits.load(path)


def test_blocks_without_a_decoder_are_refused_by_name(scratch):
    data = blocks("Q8_1", 1, 32, 0)
    with pytest.raises(FormatError, match=r"a.weight: the package gguf does not decode Q8_1"):
        fewbits.load(write(scratch / "q81.gguf", {"a.weight": (data, "Q8_1")}))


def test_a_part_of_a_file_is_refused(scratch):
    path = write(scratch / "part.gguf", {"a": (np.ones((1, 32), np.float32), "F32")}, {"split.count": 2})
    with pytest.raises(FormatError, match="one of several parts; join them"):
        fewbits.load(path)


def test_two_tensors_with_one_name_in_transformers_are_refused(scratch):
    array = np.ones((1, 32), np.float32)
    path = write(scratch / "twice.gguf", {"output.weight": (array, "F32"), "lm_head.weight": (array, "F32")})
    with pytest.raises(FormatError, match="under the same name"):
        fewbits.load(path)


@pytest.mark.parametrize("heads", [3, 0, "four"])
def test_rows_that_do_not_make_the_heads_are_refused(scratch, heads):
    array = np.ones((64, 32), np.float32)
    keys = {"llama.attention.head_count": heads}
    path = write(scratch / "heads.gguf", {"blk.0.attn_q.weight": (array, "F32")}, keys)
    with pytest.raises(FormatError, match="head"):
        fewbits.load(path)


def test_an_array_that_claims_more_than_the_file_has_is_refused(scratch):
    key = b"general.architecture"
    array = struct.pack("<IIQ", 9, 0, 1 << 60)
    head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + array
    (scratch / "claims.gguf").write_bytes(head + bytes(64))
    with pytest.raises(FormatError, match="ends too early"):
        fewbits.load(scratch / "claims.gguf")


@given(data=st.data())
def test_a_damaged_file_is_refused_or_read(scratch, data, small_file):
    damaged = bytearray(small_file)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(4, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (scratch / "damaged.gguf").write_bytes(damaged[: data.draw(st.integers(4, len(damaged)))])
    try:
        loaded = fewbits.load(scratch / "damaged.gguf")
    except FewbitsError:
        return
    assert len(loaded) <= 3


@pytest.fixture(scope="module")
def small_file(scratch):
    tensors = {
        "blk.0.attn_q.weight": (blocks("Q4_0", 4, 32, 0), "Q4_0"),
        "blk.0.ffn_up.weight": (blocks("Q4_1", 2, 32, 0), "Q4_1"),
        "output_norm.weight": (np.ones(8, np.float32), "F32"),
    }
    keys = {"llama.attention.head_count": 2, "tokenizer.ggml.tokens": ["a", "b"]}
    return write(scratch / "small.gguf", tensors, keys).read_bytes()


def test_without_the_gguf_package_the_error_names_the_extra(scratch, llama, monkeypatch):
    path = write_llama(scratch / "needs.gguf", llama)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ArgumentError, match=r"pip install 'fewbits\[gguf\]'"):
        fewbits.load(path)
    with pytest.raises(ArgumentError, match=r"pip install 'fewbits\[gguf\]'"):
        GGUF(path)
