"""Codes go out to GGUF files unchanged, and only beside a template whose weights agree."""

import json
import math

import gguf
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import fewbits
from fewbits.checkpoint.reading import Checkpoint
from fewbits.cli.commands import cli
from fewbits.errors import ArgumentError, CheckpointError, FewbitsError, MismatchError
from fewbits.extend import GGUF
from fewbits.selection.progress import no_progress
from support.gguf_files import gguf_name, keys_of, permuted, quantized, read_bytes, tiny_llama, write, write_llama

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture(scope="module")
def template(scratch, llama):
    return write_llama(scratch / "template.gguf", llama)


def saved(path, model, scheme="int4", **settings):
    """Quantize the tensors of a model into a file."""
    given = {"group_size": 32, "scale_dtype": torch.float16, "min_elements": 0} | settings
    given = {name: value for name, value in given.items() if value is not None}
    state = dict(model.state_dict()) if isinstance(model, torch.nn.Module) else model
    fewbits.quantize(state, scheme, validate=False, **given).save(path)
    return path


def decoded(path):
    return {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(path).tensors}


def assert_holds(path, source, model):
    """Each quantized tensor decodes to the numbers of the source, in the row order of llama.cpp."""
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    found = decoded(path)
    for name, value in fewbits.load(source, dequantize=True).items():
        layer = name.split(".")[-2]
        value = permuted(value, heads[layer]) if layer in heads else value
        assert torch.equal(found[gguf_name(name)], value.float()), name


@pytest.mark.parametrize("scheme", ["int4", "int8", "int5"])
def test_transformers_reads_the_numbers_of_the_result(scratch, llama, template, scheme):
    source = saved(scratch / f"{scheme}.safetensors", llama, scheme, group_size=32 if scheme != "int8" else None)
    target = scratch / f"{scheme}.gguf"
    exported = fewbits.convert(source, target, GGUF(template))
    assert (exported.format, exported.quantized, exported.nbytes) == (
        "gguf",
        15 if scheme == "int4" else 16,
        target.stat().st_size,
    )
    reference = tiny_llama(seed=1)
    reference.load_state_dict(fewbits.load(source, dequantize=True))
    model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=target.name)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, reference(tokens).logits)


INTEGERS = [
    # scheme, settings, expected type of the blocks
    ("int2", {}, "Q4_0"),
    ("int3", {"symmetric": False}, "Q4_0"),
    ("int4", {}, "Q4_0"),
    ("int4", {"symmetric": False}, "Q5_0"),
    ("int5", {"group_size": 64}, "Q5_0"),
    ("int5", {"symmetric": False}, "Q8_0"),
    ("int7", {"symmetric": False, "group_size": 96}, "Q8_0"),
    ("int8", {"group_size": None}, "Q8_0"),
    ("int8-tensor", {"group_size": None}, "Q8_0"),
]


@pytest.mark.parametrize(("scheme", "settings", "expected"), INTEGERS, ids=lambda value: str(value))
def test_every_integer_scheme_goes_out_exactly(scratch, llama, template, scheme, settings, expected):
    settings = {"include": ["model.layers"], "ragged": "shorter"} | settings
    source = saved(scratch / "integers.safetensors", llama, scheme, **settings)
    fewbits.convert(source, scratch / "integers.gguf", GGUF(template), replace=True)
    types = {name: kind for name, (kind, _) in read_bytes(scratch / "integers.gguf").items()}
    assert {kind for name, kind in types.items() if "ffn_up" in name or "attn_q" in name} == {expected}
    assert types["token_embd.weight"] == "F32"
    assert_holds(scratch / "integers.gguf", source, llama)


@pytest.mark.parametrize("type_name", ["Q4_0", "Q5_0", "Q8_0"])
def test_a_gguf_file_comes_back_with_the_same_bytes(scratch, type_name):
    model = tiny_llama(tied=True)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 0  # llama.cpp gives blocks of zeros the scale -0.0
    path = write_llama(scratch / f"first-{type_name}.gguf", model, type_name, embeddings="Q8_0")
    fewbits.convert(path, scratch / f"between-{type_name}")
    fewbits.convert(scratch / f"between-{type_name}", scratch / f"last-{type_name}.gguf", GGUF(path))
    assert read_bytes(scratch / f"last-{type_name}.gguf") == read_bytes(path)


@pytest.mark.parametrize(("type_name", "bits"), [("Q4_1", 4), ("Q5_1", 5)])
def test_zero_points_become_offsets_where_float16_holds_them(scratch, type_name, bits):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(0, 2**bits, (8, 64), generator=generator).float()
    weight[:, ::32], weight[:, 1::32] = 0, 2**bits - 1
    weight = (weight - torch.randint(0, 2**bits, (8, 1), generator=generator)) / 64
    keys = {"general.architecture": "t5"}
    path = write(scratch / f"{type_name}.gguf", {"a.weight": (quantized(weight, type_name), type_name)}, keys)
    fewbits.convert(path, scratch / f"between-{type_name}")
    assert str(fewbits.load(scratch / f"between-{type_name}")["a.weight"].spec).startswith(f"int{bits} group 32 asym")
    fewbits.convert(scratch / f"between-{type_name}", scratch / f"last-{type_name}.gguf", GGUF(path))
    assert read_bytes(scratch / f"last-{type_name}.gguf") == read_bytes(path)


OBSTACLES = {
    "nf4": ("nf4", {"group_size": 32}, "nf4 group 32.*whole numbers"),
    "small groups": ("int4", {"group_size": 16}, "multiples of 32"),
    "float32 scales": ("int4", {"scale_dtype": torch.float32}, "float32 scales.*--scale-dtype float16"),
    "two levels": ("int4", {"scale_bits": 6}, "scales that float16 does not hold.*without scale_bits"),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_what_no_block_holds_is_refused_by_name_and_written_as_floats_if_allowed(scratch, llama, template, case):
    scheme, settings, reason = OBSTACLES[case]
    source = saved(scratch / "obstacle.safetensors", llama, scheme, include=["model.layers.1.mlp"], **settings)
    with pytest.raises(ArgumentError, match=f"model.layers.1.mlp.*{reason}"):
        fewbits.convert(source, scratch / "obstacle.gguf", GGUF(template))
    assert not (scratch / "obstacle.gguf").exists()
    fewbits.convert(source, scratch / f"{case}.gguf", GGUF(template, allow=True))
    assert read_bytes(scratch / f"{case}.gguf")[gguf_name(UP)][0] == "F32"
    assert_holds(scratch / f"{case}.gguf", source, llama)


class AsymmetricInt8(fewbits.Int8PerChannel):
    """A scheme from outside."""

    spec = fewbits.QuantSpec(8, "channel", symmetric=False)


def test_codes_with_too_many_bits_are_refused(scratch, llama, template):
    scheme = AsymmetricInt8(scale_dtype=torch.float16, selector=fewbits.LayerSelector(include=[UP]))
    fewbits.quantize(dict(llama.state_dict()), scheme).save(scratch / "wide.safetensors")
    with pytest.raises(ArgumentError, match=f"{UP} is int8 channel asymmetric, and no block of GGUF has codes"):
        fewbits.convert(scratch / "wide.safetensors", scratch / "wide.gguf", GGUF(template))


def test_rounding_of_inputs_is_lost_only_if_allowed(scratch, llama, template):
    source = saved(scratch / "inputs.safetensors", llama, "int8", group_size=None, activations="dynamic")
    with pytest.raises(ArgumentError, match=r"dynamic int8 inputs.*GGUF does not say"):
        fewbits.convert(source, scratch / "inputs.gguf", GGUF(template))
    fewbits.convert(source, scratch / "inputs.gguf", GGUF(template, allow=True))
    assert read_bytes(scratch / "inputs.gguf")[gguf_name(UP)][0] == "Q8_0"


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_allowed_floats_have_the_dtype_of_the_weight(scratch, dtype, expected):
    model = tiny_llama().to(dtype)
    template = write_llama(scratch / f"{expected}.gguf", model, expected)
    source = saved(scratch / "floats.safetensors", model, "nf4", include=[UP])
    fewbits.convert(source, scratch / f"allowed-{expected}.gguf", GGUF(template, allow=True))
    assert read_bytes(scratch / f"allowed-{expected}.gguf")[gguf_name(UP)][0] == expected
    assert_holds(scratch / f"allowed-{expected}.gguf", source, model)


DIFFERENT = {
    "other weights": (lambda s: s | {UP: s[UP].flip(0)}, "up_proj.*in no order"),
    "one row": (lambda s: s | {UP: torch.cat([s[UP][:-1], s[UP][:1]])}, "up_proj.*in no order"),
    "another layer": (lambda s: s | {UP: s[UP.replace("1", "0")]}, "up_proj.*in no order"),
    "half a head": (
        lambda s: (
            s | {"model.layers.0.self_attn.q_proj.weight": s["model.layers.0.self_attn.q_proj.weight"].roll(8, 0)}
        ),
        "q_proj.*in no order",
    ),
    "rows in two orders": (
        lambda s: s | {"model.layers.0.self_attn.k_proj.weight": torch.ones(32, 64)},
        "k_proj.*in two orders",
    ),
    "a norm": (lambda s: s | {"model.norm.weight": s["model.norm.weight"] * 1.01}, "model.norm.weight.*other values"),
    "an embedding": (
        lambda s: s | {"model.embed_tokens.weight": s["model.embed_tokens.weight"].flip(0)},
        "embed_tokens.*other values",
    ),
    "another shape": (lambda s: s | {UP: s[UP][:64]}, "up_proj.*shape"),
    "a tensor less": (
        lambda s: {n: t for n, t in s.items() if n != UP},
        "blk.1.ffn_up.weight, which has no counterpart",
    ),
    "a tensor more": (lambda s: s | {"model.layers.7.mlp.up_proj.weight": s[UP].clone()}, "layers.7.*no counterpart"),
}


@pytest.mark.parametrize("case", DIFFERENT)
@pytest.mark.parametrize("type_name", ["F32", "Q4_0"])
def test_a_template_of_other_values_is_refused_by_name(scratch, llama, case, type_name):
    change, reason = DIFFERENT[case]
    template = write_llama(scratch / f"{type_name}.gguf", llama, type_name)
    # The template stays; the source has the other values.
    state = change(dict(llama.state_dict()))
    if case == "rows in two orders":
        twin = tiny_llama()
        twin.load_state_dict(state)
        template = write_llama(scratch / f"twin-{type_name}.gguf", twin, type_name)
    source = saved(scratch / "different.safetensors", state, include=["model.layers"])
    with pytest.raises(MismatchError, match=reason):
        fewbits.convert(source, scratch / "different.gguf", GGUF(template))
    assert not (scratch / "different.gguf").exists()


def test_a_template_may_be_quantized_and_keeps_its_embeddings(scratch, llama, events):
    template = write_llama(scratch / "rough.gguf", llama, "Q4_1", embeddings="Q8_0")
    source = saved(scratch / "rough.safetensors", llama, "int2")
    fewbits.convert(source, scratch / "finer.gguf", GGUF(template))
    found, before = read_bytes(scratch / "finer.gguf"), read_bytes(template)
    assert {name for name in found if found[name] == before[name]} == {
        name for name in found if "norm" in name or name == "token_embd.weight"
    }
    (event,) = [event for event in events if event["event"] == "kept_from_template"]
    assert event["tensors"] == ["token_embd.weight"]


class Tuned:
    """A checkpoint whose embedding was tuned."""

    def __init__(self, path):
        self.checkpoint, self.path = Checkpoint(path), path
        self.ledger = self.checkpoint.ledger.with_tuned({"model.embed_tokens.weight"})

    def value(self, name):
        return self.checkpoint.value(name)


def test_a_tuned_tensor_is_not_replaced_by_a_rough_one_of_the_template(scratch, llama):
    template = write_llama(scratch / "before.gguf", llama, "Q8_0")
    source = Tuned(saved(scratch / "tuned.safetensors", llama))
    with pytest.raises(MismatchError, match=r"model.embed_tokens.weight .* has other values than token_embd.weight"):
        GGUF(template).write(source, scratch / "tuned.gguf", no_progress)


def test_a_buffer_without_counterpart_is_left_out_only_if_allowed(scratch, llama, template):
    state = llama.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    source = saved(scratch / "buffer.safetensors", state)
    with pytest.raises(ArgumentError, match=r"inv_freq has no counterpart in the template"):
        fewbits.convert(source, scratch / "buffer.gguf", GGUF(template))
    exported = fewbits.convert(source, scratch / "buffer.gguf", GGUF(template, allow=True))
    assert list(exported.remarks) == ["model.layers.0.self_attn.rotary_emb.inv_freq"]


def test_tied_tensors_go_to_both_places_of_the_template(scratch):
    model = tiny_llama(tied=True)
    state = model.state_dict()
    model.config.tie_word_embeddings = False
    template = write_llama(scratch / "untied.gguf", model)
    source = saved(scratch / "tied.safetensors", state, "int8", group_size=None)
    fewbits.convert(source, scratch / "tied.gguf", GGUF(template))
    found = read_bytes(scratch / "tied.gguf")
    assert found["output.weight"] == found["token_embd.weight"]
    assert found["output.weight"][0] == "Q8_0"


def test_keys_come_from_the_template_except_those_that_would_be_untrue(scratch, llama, template):
    source = saved(scratch / "keys.safetensors", llama)
    fewbits.convert(source, scratch / "keys.gguf", GGUF(template))
    fields = {name: f.contents() for name, f in gguf.GGUFReader(scratch / "keys.gguf").fields.items()}
    expected = keys_of(llama.config)
    del expected["quantize.imatrix.file"]
    expected |= {
        "general.architecture": "llama",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q4_0,
        "general.quantization_version": 2,
        "general.quantized_by": f"fewbits {fewbits.__version__}",
    }
    found = {name: value for name, value in fields.items() if not name.startswith("GGUF.")}
    assert found.keys() == expected.keys()
    assert all(
        math.isclose(v, expected[k], rel_tol=1e-6) if type(v) is float else v == expected[k] for k, v in found.items()
    )


def test_the_command_line_takes_a_template(scratch, llama, template):
    source = saved(scratch / "cli.safetensors", llama)
    arguments = ["convert", str(source), "-o", str(scratch / "cli.gguf"), "--format", "gguf", "--json"]
    result = CliRunner().invoke(cli, [*arguments, "--template", str(template)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["quantized"] == 15
    with pytest.raises(ArgumentError, match=r"needs a template.*--template FILE"):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)


def test_a_template_that_is_no_gguf_file_is_refused(scratch, llama):
    source = saved(scratch / "none.safetensors", llama)
    with pytest.raises(FewbitsError, match=r"none.safetensors is not a GGUF file"):
        GGUF(source)
    with pytest.raises(CheckpointError, match=r"absent.gguf cannot be read"):
        GGUF(scratch / "absent.gguf")


def test_bytes_that_change_while_they_are_written_are_found(scratch, llama, template, monkeypatch):
    source = saved(scratch / "written.safetensors", llama)
    honest = gguf.GGUFWriter.write_tensor_data

    def damaging(self, tensor, *args):
        tensor = tensor.copy()
        tensor.reshape(-1)[5] += 1
        honest(self, tensor, *args)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", damaging)
    with pytest.raises(CheckpointError, match="does not have the bytes that were written"):
        fewbits.convert(source, scratch / "written.gguf", GGUF(template))
    assert not (scratch / "written.gguf").exists()
