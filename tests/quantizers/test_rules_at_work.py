"""Rules of selection, applied to models and state dicts, and their traces in the ledger."""

import json

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits import CastSpec, Int4Grouped, Int8PerChannel, LayerSelector, QuantSpec
from fewbits.errors import ArgumentError, SelectionError
from fewbits.numerics.spec import SPECS
from support.lifecycle_helpers import TiedLM, mlp, quantize_small, small


class Bag(nn.Module):
    """A module with parameters and no forward."""


def ledger_of(source, scheme=Int8PerChannel, *args, **options):
    quantizer = small(scheme, *args, **options)
    quantizer.prepare(source)
    return quantizer.ledger


def matrix(rows=8, columns=96, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def resolved(spec, dtype=torch.float32):
    return spec.for_dtype(dtype)


# Names.


def test_excluding_layer_1_of_twelve_keeps_only_layer_1():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(12)])

    for ledger in (ledger_of(Model(), exclude=["layers.1"]), ledger_of(Model().state_dict(), exclude=["layers.1"])):
        kept = {row.name for row in ledger if row.fate == "kept" and row.name.endswith("weight")}
        assert kept == {"layers.1.weight"}
        assert ledger.count("quantized") == 11


def test_a_part_of_a_component_is_an_error_that_names_the_component():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(SelectionError, match=r"exclude: 'gate' matches nothing \(did you mean 'gate_proj'"):
        ledger_of(model, exclude=["gate"])
    ledger = ledger_of(model, exclude=["gate_proj"])
    kept = {row.name for row in ledger if row.fate == "kept" and row.name.endswith("proj.weight")}
    assert kept == {f"model.layers.{i}.mlp.gate_proj.weight" for i in range(2)}


# Sizes.


@pytest.mark.parametrize("scheme", ["int8", "int8-tensor", "int4"])
@pytest.mark.parametrize("as_module", [True, False])
def test_by_default_tensors_below_512_elements_are_kept(scheme, as_module):
    model = Bag()
    for name, shape in {"below": (7, 73), "at": (16, 32), "above": (27, 19)}.items():
        model.register_parameter(name, nn.Parameter(torch.rand(shape)))
    assert [parameter.numel() for parameter in model.parameters()] == [511, 512, 513]
    source = model if as_module else dict(model.state_dict())

    def quantized(**rules):
        ledger = fewbits.quantize(source, scheme, validate=False, **rules).ledger
        return {row.name for row in ledger if row.fate == "quantized"}, ledger["below"].reason

    assert quantized() == ({"at", "above"}, "fewer than 512 elements")
    assert quantized(min_elements=513) == ({"above"}, "fewer than 513 elements")
    for rules in ({"min_elements": 0}, {"min_elements": 511}):
        assert quantized(**rules)[0] == {"below", "at", "above"}
    assert quantized(include=["below"])[0] == {"below"}
    assert quantized(overrides={"below": "int8"}) == ({"below", "at", "above"}, "override 'below'")


def test_a_cast_has_no_minimum_size_unless_asked():
    tensors = {"one": torch.ones(1, 1), "more": torch.ones(8, 8)}
    assert fewbits.quantize(tensors, "fp16").ledger.count("cast") == 2
    assert fewbits.quantize(tensors, "fp16", min_elements=2).ledger.count("cast") == 1


def test_a_scheme_may_set_its_own_minimum_size():
    class Coarse(fewbits.Quantizer):
        spec = QuantSpec(bits=4, granularity="tensor")
        min_elements = 100

    tensors = {"small": torch.ones(9, 11), "large": torch.ones(10, 10)}
    quantizer = Coarse()
    quantizer.prepare(tensors)
    assert (quantizer.ledger["small"].reason, quantizer.ledger["large"].fate) == (
        "fewer than 100 elements",
        "quantized",
    )
    assert ledger_of(tensors, Coarse).count("quantized") == 2


# Overrides.

OVERRIDES = {
    "a scheme": ("int8-tensor", SPECS["int8-tensor"]),
    "a spec": (QuantSpec(bits=3, granularity="channel"), QuantSpec(bits=3, granularity="channel")),
    "a cast": (CastSpec(torch.bfloat16), CastSpec(torch.bfloat16)),
    "a cast by name": ("fp16", CastSpec(torch.float16)),
    "a group size": ({"group_size": 24}, QuantSpec(bits=4, granularity="group", group_size=24)),
    "a scheme with a group size": (
        {"scheme": "int8", "group_size": 48},
        QuantSpec(bits=8, granularity="group", group_size=48),
    ),
    "a zero point": ({"symmetric": False}, QuantSpec(bits=4, granularity="group", group_size=32, symmetric=False)),
}


@pytest.mark.parametrize(("rule", "spec"), OVERRIDES.values(), ids=OVERRIDES)
@pytest.mark.parametrize("as_module", [True, False])
def test_an_override_changes_only_the_specs_of_the_tensors_it_names(rule, spec, as_module):
    model = nn.ModuleDict({"a": nn.Linear(96, 8), "b": nn.Linear(96, 8)})
    source = model if as_module else dict(model.state_dict())
    result = quantize_small(source, small(Int4Grouped, 32, overrides={"a": rule}))
    assert result.report.ok
    assert (result.ledger["a.weight"].spec, result.ledger["a.weight"].reason) == (resolved(spec), "override 'a'")
    assert result.ledger["b.weight"].spec == resolved(QuantSpec(bits=4, granularity="group", group_size=32))
    assert result.ledger["b.weight"].reason == "selected"


def test_an_override_gives_the_same_codes_as_its_scheme():
    tensors = {"a": matrix(), "b": matrix(seed=1)}
    mixed = quantize_small(tensors, small(Int4Grouped, 32, overrides={"b": "int8"})).model
    assert mixed["a"].equal(quantize_small(tensors, "int4", group_size=32).model["a"])
    assert mixed["b"].equal(quantize_small(tensors, "int8").model["b"])


@pytest.mark.parametrize(
    ("asked", "rule", "expected"),
    [
        (torch.float16, "int8", torch.float16),
        (torch.float16, {"bits": 5}, torch.float16),
        (torch.float16, {"scale_dtype": "bfloat16"}, torch.bfloat16),
        (torch.float16, QuantSpec(8, "tensor", scale_dtype=torch.float64), torch.float64),
        (None, "int8", torch.float32),
    ],
    ids=str,
)
def test_an_override_without_a_scale_dtype_takes_that_of_the_quantizer(asked, rule, expected):
    ledger = ledger_of({"w": matrix()}, scale_dtype=asked, overrides={"w": rule})
    assert ledger["w"].spec.scale_dtype == expected


def test_an_override_outranks_spec_for():
    class Mixed(fewbits.Quantizer):
        spec = QuantSpec(bits=4, granularity="channel")

        def spec_for(self, info):
            return self.spec if info.name == "a" else QuantSpec(bits=6, granularity="tensor")

    tensors = {name: matrix() for name in ("a", "b", "c", "d")}
    ledger = ledger_of(tensors, Mixed, overrides={"c": "int8", "d": {"symmetric": False}})
    found = {row.name: (str(row.spec), row.reason) for row in ledger}
    assert found == {
        "a": ("int4 channel", "selected"),
        "b": ("int6 tensor", "Mixed chose int6 tensor for it"),
        "c": ("int8 channel", "override 'c'"),
        "d": ("int6 tensor asymmetric", "override 'd'"),
    }


def test_prepare_refuses_fields_that_contradict_the_scheme():
    quantizer = small(overrides={"0": {"granularity": "group"}})
    with pytest.raises(SelectionError, match=r"overrides\['0'\].* does not fit int8 channel: group_size"):
        quantizer.prepare(mlp())
    assert quantizer.state is fewbits.State.CREATED


def test_overrides_survive_save_and_load(tmp_path):
    model = mlp()
    result = quantize_small(model, small(overrides={"0": {"scheme": "int4", "group_size": 8}, "2": "fp16"}))
    result.save(tmp_path / "f")
    loaded = fewbits.load(tmp_path / "f", into=mlp(seed=1))
    assert [str(loaded[i].weight_stored.spec) for i in (0, 2)] == ["int4 group 8", "float16"]
    with torch.no_grad():
        x = torch.ones(2, 16)
        assert torch.equal(loaded(x), result.model(x))


# Overrides of tied tensors.

TIED = ["embed_tokens", "lm_head"]


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("scheme", [Int8PerChannel, lambda **o: Int4Grouped(16, **o)], ids=["int8", "int4"])
def test_an_override_of_one_name_holds_for_all_names_of_a_tensor(name, scheme):
    row = ledger_of(TiedLM(), scheme, overrides={name: "int8-tensor"})["embed_tokens.weight"]
    assert (row.spec, row.reason) == (resolved(SPECS["int8-tensor"]), f"override {name!r}")


@pytest.mark.parametrize("included", TIED)
@pytest.mark.parametrize("overridden", TIED)
def test_an_override_of_one_name_outranks_an_inclusion_of_another(included, overridden):
    ledger = ledger_of(TiedLM(), include=[included], overrides={overridden: "int8-tensor"})
    assert ledger["embed_tokens.weight"].spec == resolved(SPECS["int8-tensor"])


@pytest.mark.parametrize("name", TIED)
def test_keeping_one_name_keeps_all_names_of_a_tensor(name):
    row = ledger_of(TiedLM(), overrides={name: "keep"})["embed_tokens.weight"]
    assert (row.fate, row.reason) == ("kept", f"override {name!r}")


@pytest.mark.parametrize("same", ["int8-tensor", {"group_size": 8}, QuantSpec(bits=3, granularity="channel")], ids=str)
def test_names_of_one_tensor_may_have_the_same_override(same):
    ledger = ledger_of(TiedLM(), overrides=dict.fromkeys(TIED, same))
    assert ledger["embed_tokens.weight"].fate == "quantized"
    assert ledger["lm_head.weight"].alias_of == "embed_tokens.weight"


@pytest.mark.parametrize(
    "rules",
    [
        {"overrides": {"embed_tokens": "int8", "lm_head": "int8-tensor"}},
        {"overrides": {"embed_tokens": "int8", "lm_head": {"bits": 4}}},
        {"overrides": {"embed_tokens": "int8", "lm_head": "keep"}},
        {"overrides": {"embed_tokens": "fp16"}, "exclude": ["lm_head"]},
        {"overrides": {"embed_tokens": "keep"}, "include": ["lm_head"]},
    ],
    ids=str,
)
def test_rules_that_contradict_each_other_on_one_tensor_are_refused(rules):
    with pytest.raises(SelectionError, match=r"one storage, two fates: embed_tokens\.weight \(.*lm_head\.weight \("):
        ledger_of(TiedLM(), **rules)


# Input axes.


@pytest.mark.parametrize("as_module", [True, False])
def test_declared_input_axes_change_the_layout_and_the_ledger(as_module, tmp_path):
    model = Bag()
    for name in ("experts", "plain"):
        model.register_parameter(name, nn.Parameter(torch.rand(3, 8, 64)))
    source = model if as_module else dict(model.state_dict())
    result = quantize_small(source, small(input_axes={"experts": 1}))
    declared, plain = result.ledger["experts"], result.ledger["plain"]
    assert declared.layout == fewbits.extend.Layout.of((3, 8, 64), inputs=(1,))
    assert (declared.layout.matrix_shape, plain.layout.matrix_shape) == ((192, 8), (24, 64))
    assert (declared.reason, plain.reason) == ("selected", "selected; cut by its shape, which input_axes can correct")
    result.save(tmp_path / "f")
    assert fewbits.load(tmp_path / "f")["experts"].layout == declared.layout
    assert fewbits.verify(tmp_path / "f", model).ok


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple), st.data())
def test_any_axes_can_be_the_inputs(shape, data):
    axes = data.draw(st.lists(st.integers(-len(shape), len(shape) - 1), min_size=1, unique_by=lambda a: a % len(shape)))
    tensor = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
    result = quantize_small({"w": tensor}, small(input_axes={"w": axes}))
    inputs = {axis % len(shape) for axis in axes}
    rows = tuple(axis for axis in range(len(shape)) if axis not in inputs)
    largest = tensor.amax([*inputs]).flatten()
    assert result.model["w"].scale.flatten().tolist() == pytest.approx((largest / 127).tolist(), rel=1e-6)
    assert result.ledger["w"].layout.permutation[: len(rows)] == rows


@pytest.mark.parametrize("axes", [2, -3, [0, 2], [0, 0], [1, -1]], ids=str)
@pytest.mark.parametrize("as_module", [True, False])
def test_axes_that_a_tensor_does_not_have_raise_an_error_with_its_name(axes, as_module):
    model = nn.ModuleDict({"a": nn.Linear(16, 4), "b": nn.Linear(8, 4)})
    source = model if as_module else dict(model.state_dict())
    with pytest.raises(SelectionError, match=r"input_axes: a\.weight, shape \(4, 16\): "):
        ledger_of(source, input_axes={"a": axes})


def test_axes_of_one_name_hold_for_all_names_of_a_tensor():
    ledger = ledger_of(TiedLM(), input_axes={"lm_head": 0})
    assert ledger["embed_tokens.weight"].layout.matrix_shape == (32, 50)


def test_axes_that_contradict_each_other_on_one_tensor_are_refused_with_both_names():
    with pytest.raises(SelectionError, match=r"embed_tokens\.weight.*lm_head\.weight"):
        ledger_of(TiedLM(), input_axes={"embed_tokens": 1, "lm_head": 0})


def test_input_axes_work_with_overrides_and_groups():
    rules = {"input_axes": {"w": 0}, "overrides": {"w": {"scheme": "int4", "group_size": 4}}}
    value = quantize_small({"w": matrix(8, 96)}, small(**rules)).model["w"]
    assert value.scale.shape == (96, 2)


def test_axes_of_a_tensor_that_is_cast_change_nothing():
    row = ledger_of({"w": matrix()}, input_axes={"w": 0}, overrides={"w": "fp16"})["w"]
    assert (row.fate, row.layout) == ("cast", None)


# Decisions of a selector by an outside author.


def test_a_selector_may_decide_on_specs_and_axes():
    class Chooses(fewbits.LayerSelector):
        def select(self, infos):
            keep, take = LayerSelector(overrides={"a": "keep", "b": "int4"}, input_axes={"b": 0}).select(infos)
            return [keep, attrs.evolve(take, reason="by lot")]

    ledger = ledger_of({"a": matrix(), "b": matrix()}, selector=Chooses())
    assert (ledger["a"].fate, ledger["b"].reason, str(ledger["b"].spec)) == (
        "kept",
        "rows of 8 are shorter than one group of 128",
        "int8 channel",
    )
    assert json.loads(ledger.to_json())["rows"][1]["layout"]["permutation"] == [1, 0]


def test_an_obstacle_outranks_every_rule():
    model = nn.ModuleDict({"a": nn.Linear(16, 4), "b": nn.Linear(8, 4)})
    model["a"].held = [model["a"].weight]
    for rules in ({"include": ["*"]}, {"overrides": {"*": "int8"}}, {"include_types": [nn.Linear]}):
        row = ledger_of(model, **rules)["a.weight"]
        assert (row.fate, row.reason) == ("kept", "a.held holds it too, and would keep using the float tensor")


# Embeddings.


class LanguageModel(nn.Module):
    """An embedding, a linear layer, and an output layer that may share the weight of the embedding."""

    def __init__(self, *, tied):
        super().__init__()
        self.embed, self.layer = nn.Embedding(64, 32), nn.Linear(32, 32, bias=False)
        self.output = nn.Linear(32, 64, bias=False)
        self.bag = nn.EmbeddingBag(40, 32)
        if tied:
            self.output.weight = self.embed.weight

    def forward(self, ids):
        return self.output(self.layer(self.embed(ids)) + self.bag(ids))


INT4 = QuantSpec(bits=4, granularity="group", group_size=32)
RULES_FOR_EMBEDDINGS = {
    "a scheme": ("int8", SPECS["int8"]),
    "a table": ({"scheme": "int3", "group_size": 16}, QuantSpec(bits=3, granularity="group", group_size=16)),
    "the scheme": ("quantize", INT4),
    "a cast": ("fp16", CastSpec(torch.float16)),
    "keep": ("keep", None),
    "none": (None, None),
}


def specs_of(model, rule, **settings):
    settings = {"group_size": 32, "min_elements": 1, "embeddings": rule, **settings}
    ledger = fewbits.quantize(model, "int4", validate=False, **settings).ledger
    return {row.name: row.spec and attrs.evolve(row.spec, **NO_DTYPE.get(type(row.spec), {})) for row in ledger}


NO_DTYPE = {QuantSpec: {"scale_dtype": None}}


@pytest.mark.parametrize(("rule", "spec"), RULES_FOR_EMBEDDINGS.values(), ids=RULES_FOR_EMBEDDINGS)
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_have_a_rule_of_their_own_with_the_output_layer_that_shares_their_weight(rule, spec, tied):
    found = specs_of(LanguageModel(tied=tied), rule)
    assert found["embed.weight"] == found["bag.weight"] == spec
    assert found["layer.weight"] == INT4
    assert tied or found["output.weight"] == INT4


def test_embeddings_of_a_mapping_are_known_by_name():
    tensors = {"model.embed_tokens.weight": torch.rand(64, 32), "layer.weight": torch.rand(32, 32)}
    assert specs_of(tensors, "int8") == {"model.embed_tokens.weight": SPECS["int8"], "layer.weight": INT4}


@pytest.mark.parametrize(
    ("rules", "spec"),
    [
        ({"exclude": ["embed"]}, None),
        ({"overrides": {"embed": {"bits": 3}}}, attrs.evolve(INT4, bits=3)),
        ({"overrides": {"embed": "quantize"}}, INT4),
        ({"include": ["layer"]}, SPECS["int8"]),
        ({"include": ["embed", "layer"]}, INT4),
        ({"min_elements": 5000}, SPECS["int8"]),
    ],
)
def test_the_rule_for_embeddings_comes_after_names_and_before_sizes(rules, spec):
    rules = {"overrides": {"layer": "int4"}} | rules
    assert specs_of(LanguageModel(tied=False), "int8", **rules)["embed.weight"] == spec


def test_a_rule_for_embeddings_needs_one_and_must_not_contradict_another():
    with pytest.raises(SelectionError, match=r"^embeddings: there is no embedding"):
        fewbits.plan({"layer.weight": torch.rand(32, 32)}, "int4", embeddings="int8")
    with pytest.raises(SelectionError, match=r"one storage, two fates"):
        fewbits.plan(LanguageModel(tied=True), "int4", embeddings="int8", exclude=["output"])
    model = LanguageModel(tied=False).to(torch.float64)
    del model.bag
    model.embed.to(torch.float8_e4m3fn)
    with pytest.raises(SelectionError, match=r"^embeddings: no embedding can be quantized: embed.weight, "):
        fewbits.plan(model, "int4", embeddings="int8")
    assert fewbits.plan(model, "int4", embeddings="keep", min_elements=1).ledger["embed.weight"].fate == "kept"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("int9", "^embeddings: .*'int9'"),
        (8, "^embeddings: a rule must be a scheme's name"),
        ({"scheme": "keep", "bits": 4}, "^embeddings: 'keep' takes no other settings; write 'keep' alone"),
        ({"scheme": "quantize"}, "^embeddings: 'quantize' takes no other settings; write 'quantize' alone"),
        ({"scheme": "int4", "group_size": 0}, "^embeddings: this does not fit"),
        ({"scale_dtype": "half16"}, "^embeddings: 'half16'"),
    ],
)
def test_a_malformed_rule_for_embeddings_is_named(rule, message):
    with pytest.raises((SelectionError, ArgumentError), match=message):
        fewbits.QuantizationConfig(scheme="int4", embeddings=rule)
    if "half16" not in message and rule != {"scheme": "int4", "group_size": 0}:
        with pytest.raises(SelectionError, match=message):
            fewbits.LayerSelector(embeddings=rule)


def test_a_tied_output_layer_computes_with_int8_codes():
    model = LanguageModel(tied=True).eval()
    quantized = fewbits.quantize(model, "int4", embeddings="int8", group_size=32, min_elements=1).model
    assert quantized.embed.weight_stored is quantized.output.weight_stored
    ids = torch.arange(12).view(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(quantized.embed(ids), model.embed(ids), rtol=0.02, atol=0.02)
