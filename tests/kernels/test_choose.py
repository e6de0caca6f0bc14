"""The choice of kernels for a layer, and the accuracy of their outputs."""

import attrs
import pytest
import torch
from torch import nn

import fewbits
from fewbits import QuantSpec
from fewbits.errors import ArgumentError
from fewbits.kernels import features
from fewbits.kernels.base import Kernel
from fewbits.kernels.byte_pairs import BytePairs
from fewbits.kernels.choose import KERNELS, check_compute, choose, kernels_reading, preferred, refusal
from fewbits.kernels.int8_rows import Int8Rows
from fewbits.kernels.reference import REFERENCE
from fewbits.kernels.run import chosen
from fewbits.kernels.weight_layouts import PackedInt32
from fewbits.numerics.metrics import measure
from fewbits.numerics.quantize import quantize
from fewbits.numerics.spec import SPECS as BUILT_IN
from fewbits.testing.kernel_outputs import decoded, exact
from kernels.kernel_cases import BY_NAME, FLOAT8, INT4, INT8, NF4, any_words, linear, noise_db, normal, quantized

ASYMMETRIC8 = QuantSpec(bits=8, granularity="channel", symmetric=False)
GROUPS8 = QuantSpec(bits=8, granularity="group", group_size=64)
GROUPS6 = QuantSpec(bits=6, granularity="group", group_size=64)
ASYMMETRIC4 = QuantSpec(bits=4, granularity="group", group_size=64, symmetric=False)
MXFP4 = BUILT_IN["mxfp4"]
LEVELS = QuantSpec(bits=4, granularity="group", group_size=64, levels=[(code - 8) / 8 for code in range(16)])
SPECS = [
    INT8,
    QuantSpec(bits=8, granularity="tensor"),
    ASYMMETRIC8,
    GROUPS8,
    INT4,
    ASYMMETRIC4,
    QuantSpec(bits=4, granularity="channel"),
    QuantSpec(bits=4, granularity="group", group_size=128),
    QuantSpec(bits=4, granularity="group", group_size=40),
    GROUPS6,
    QuantSpec(bits=2, granularity="group", group_size=64, symmetric=False),
    QuantSpec(bits=3, granularity="group", group_size=32),
    QuantSpec(bits=5, granularity="group", group_size=64),
    QuantSpec(bits=7, granularity="group", group_size=128),
    LEVELS,
    NF4,
    MXFP4,
    FLOAT8,
]
ROWS = (1, 2, 5, 13, 40, 200)


def kernels_for(words, compute, kernels=KERNELS):
    """The kernels that compute with a weight once the most preferred of them has prepacked it."""
    return kernels_reading(preferred(words, compute, kernels).prepack(words), compute, kernels)


@pytest.fixture(params=[True, False], ids=["bf16", "float32"])
def bf16(request, monkeypatch):
    """CPUs with instructions for bfloat16, and without."""
    monkeypatch.setattr(features, "has_bf16", lambda: request.param)
    return request.param


def test_the_reference_is_last():
    assert KERNELS[-1] is REFERENCE
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("activations", [None, "dynamic", "static"])
@pytest.mark.parametrize("compute", ["auto", "exact", "int8"])
def test_inputs_are_rounded_where_the_scheme_or_the_setting_says_so(spec, activations, compute):
    if activations is not None and (spec.granularity == "group" or spec.levels):
        return
    words = any_words(attrs.evolve(spec, activations=activations), 64, 256)
    kernels = kernels_for(words, compute)
    assert kernels[-1] is REFERENCE
    others = kernels[:-1]
    if compute == "exact":
        assert not others
    elif activations is not None:
        assert all(kernel.rounds_inputs for kernel in others)
    elif compute == "auto":
        assert not any(kernel.rounds_inputs for kernel in others)
    assert all(refusal(kernel, words, compute) is None for kernel in kernels)


def test_int8_rounds_inputs_of_schemes_that_leave_them_alone():
    names = {kernel.name for kernel in kernels_for(any_words(INT8, 64, 256), "int8")}
    assert "float_sums" in names


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("compute", ["auto", "int8"])
def test_all_kernels_of_a_layer_read_the_layout_that_it_has(spec, compute):
    words = any_words(spec, 64, 256)
    kernels = kernels_for(words, compute)
    layout = kernels[0].prepack(words)
    assert all(isinstance(layout, kernel.weight_layout) for kernel in kernels)
    for rows in ROWS:
        x = normal(rows, 256)
        assert choose(kernels, x, rows, layout).takes(x, rows, layout) is None


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_some_kernel_besides_the_reference_takes_any_number_of_rows(spec):
    words = any_words(spec, 64, 256)
    kernels = kernels_for(words, "auto")
    layout = kernels[0].prepack(words)
    assert all(choose(kernels, normal(rows, 256), rows, layout) is not REFERENCE for rows in ROWS)


@pytest.mark.parametrize("spec", [spec for spec in BUILT_IN.values() if isinstance(spec, QuantSpec)], ids=str)
def test_layers_of_every_built_in_scheme_take_a_kernel_for_their_codes(spec):
    layer = quantized(linear(128, 128), spec)
    for rows in ROWS:
        kernel = chosen(normal(rows, 128), layer.weight_stored.prepared())
        assert kernel.name not in ("reference", "word_blocks") or features.tile_width() is None


def test_nothing_to_compute_is_the_reference_s():
    assert choose(KERNELS, normal(0, 256), 0, any_words(INT8, 64, 256)) is REFERENCE


@pytest.mark.parametrize(
    ("kernel", "words", "compute", "why"),
    [
        ("int8pack_mm", any_words(INT8, 64, 64), "exact", "compute is 'exact'"),
        ("int8pack_mm", any_words(attrs.evolve(INT8, activations="static"), 64, 64), "auto", "has static int8 inputs"),
        ("float_sums", any_words(INT8, 64, 64), "auto", "the scheme does not round inputs"),
        ("int8pack_mm", any_words(ASYMMETRIC8, 64, 64), "auto", "it takes no zero points"),
        ("int8pack_mm", any_words(GROUPS8, 64, 64), "auto", "it takes no scales for groups"),
        ("float_sums", any_words(GROUPS8, 64, 64), "int8", "the weight has groups"),
        ("tile_int_mm", any_words(NF4, 64, 64), "auto", "the scheme does not round inputs"),
        ("int8pack_mm", any_words(INT8, 31, 64), "auto", "too few for 50 dB"),
        ("word_blocks", any_words(INT8, 64, 64, dtype=torch.float64), "auto", "float64 scales"),
    ],
)
def test_a_kernel_says_why_not(kernel, words, compute, why):
    assert why in refusal(BY_NAME[kernel], words, compute)


@pytest.mark.parametrize("value", ["fast", "", None, 8, True, "AUTO", ["auto"], {"auto": 1}])
def test_what_is_no_setting_is_refused(value):
    with pytest.raises(ArgumentError, match="compute must be 'auto', 'exact' or 'int8', not"):
        check_compute(value)


class Mine(Kernel):
    """A kernel from outside."""

    name, weight_layout = "mine", PackedInt32

    def supports(self, weight):
        return None

    def takes(self, x, rows, weight):
        return None if rows == 3 else "only three rows"

    def linear(self, x, weight):
        return x.new_full((x.shape[0], weight.layout.rows), 3.0)


def test_kernels_of_others_come_first_if_they_are_put_first():
    module = quantized(linear(64, 64, bias=False), INT8)
    fewbits.set_compute(module, "auto", [Mine()])
    with torch.no_grad():
        assert bool((module(normal(3, 64)) == 3).all())
        assert not bool((module(normal(2, 64)) == 3).any())
    assert kernels_for(any_words(INT8, 64, 64), "auto", [Mine()])[-1] is REFERENCE


# Nearness.


def inputs(kind, rows, columns, seed):
    x = normal(rows, columns, seed=seed)
    if kind == "off zero":
        return x + 3
    if kind == "outliers":
        return x * torch.where(torch.arange(columns) % 97 == 5, 100.0, 1.0)
    if kind == "one at a time":
        one = torch.zeros(rows, columns)
        return one.scatter_(1, torch.arange(rows).unsqueeze(1) * 7 % columns, x[:, :1])
    if kind == "positive":
        return x.relu()
    return x


class Pool:
    """Layers of one shape, as many as have 256 outputs together, so that chance plays no part."""

    def __init__(self, spec, shape, dtype=torch.float32):
        weights = [normal(*shape, dtype=dtype, seed=seed) for seed in range(-(-256 // shape[0]))]
        values = [quantize(weight, spec) for weight in weights]
        self.own = min(measure(*pair).sqnr_db for pair in zip(weights, values, strict=True))
        self.words = [PackedInt32.of_value(value) for value in values]
        self.kernels = kernels_for(self.words[0], "auto")
        self.layouts = [self.kernels[0].prepack(words) for words in self.words]
        self.dense = [decoded(words) for words in self.words]
        self.inputs, self.dtype = shape[1], dtype

    def heard(self, kind, rows):
        """SQNR of the outputs in dB, so many rows at a time."""
        found, expected = [], []
        for seed, (layout, dense) in enumerate(zip(self.layouts, self.dense, strict=True)):
            x = inputs(kind, max(16, rows), self.inputs, seed).to(self.dtype)
            parts = [x[start : start + rows] for start in range(0, len(x) - rows + 1, rows)]
            found += [
                choose(self.kernels, part, rows, layout).linear(part, layout).double().flatten() for part in parts
            ]
            expected += [(part.double() @ dense.t()).flatten() for part in parts]
        return noise_db(torch.cat(found), torch.cat(expected))


@pytest.mark.parametrize("spec", [INT8, ASYMMETRIC8, GROUPS8, GROUPS6, INT4, ASYMMETRIC4, NF4, MXFP4, FLOAT8], ids=str)
@pytest.mark.parametrize(
    "shape", [(64, 64), (33, 130), (256, 576), pytest.param((8, 256), marks=pytest.mark.slow)], ids=str
)
@torch.no_grad()
def test_outputs_read_50_db_or_10_more_than_the_weights(spec, shape, bf16):
    pool = Pool(spec, shape)
    for kind in ("plain", "off zero", "outliers", "one at a time", "positive"):
        for rows in (1, 5, 60):
            heard = pool.heard(kind, rows)
            assert heard >= min(50.0, pool.own + 10), f"{kind}, {rows} rows: {heard:.1f} dB, weights {pool.own:.1f}"


@pytest.mark.parametrize("spec", [INT8, GROUPS8, INT4, NF4], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_outputs_of_narrow_inputs_read_50_db_or_10_more_than_the_weights(spec, dtype, bf16):
    pool = Pool(spec, (128, 256), dtype)
    for rows in (1, 60):
        heard = pool.heard("plain", rows)
        assert heard >= min(50.0, pool.own + 10), f"{rows} rows: {heard:.1f} dB, weights {pool.own:.1f}"


@torch.no_grad()
def test_few_outputs_of_8_bits_are_computed_in_float32(bf16):
    words = any_words(INT8, 31, 256)
    kernels, x = kernels_for(words, "auto"), normal(40, 256)
    layout = kernels[0].prepack(words)
    found = choose(kernels, x, 40, layout).linear(x, layout)
    assert noise_db(found, exact(words, x, rounds=False)[0]) > 120


@torch.no_grad()
def test_without_instructions_for_bfloat16_blocks_are_computed_in_float32(monkeypatch):
    monkeypatch.setattr(features, "has_bf16", lambda: False)
    for spec, name in ((INT8, "byte_blocks"), (GROUPS8, "byte_blocks"), (INT4, "tile_blocks"), (LEVELS, "word_blocks")):
        words, x = any_words(spec, 130, 256), normal(40, 256)
        kernel = BY_NAME[name]
        assert noise_db(kernel.linear(x, kernel.prepack(words)), exact(words, x, rounds=False)[0]) > 120


@pytest.fixture(scope="module")
def minilm(minilm_path, sentences):
    """A real model, and the inputs of its layers."""
    transformers = pytest.importorskip("transformers")
    import safetensors.torch

    model = transformers.BertModel(transformers.BertConfig.from_json_file(minilm_path.parent / "config.json")).eval()
    model.load_state_dict(safetensors.torch.load_file(minilm_path), strict=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(minilm_path.parent / "tokenizer.json"), pad_token="[PAD]"
    )
    given = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: given.__setitem__(name, args[0].flatten(0, -2)))
    tokens = tokenizer(list(sentences[:12]), padding=True, return_tensors="pt")
    with torch.no_grad():
        model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    for module in model.modules():
        module._forward_pre_hooks.clear()
    return model, given


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@torch.no_grad()
def test_layers_of_a_real_model_read_50_db_or_10_more_than_the_weights(minilm, scheme, bf16):
    model, given = minilm
    layers = dict(fewbits.quantize(model, scheme, validate=False).model.named_modules())
    for name, x in given.items():
        stored = layers[name].weight_stored
        kernels, layout = stored.prepared().kernels, stored.weight_layout()
        dense = decoded(layout)
        own = measure(model.get_submodule(name).weight, stored.value()).sqnr_db
        for rows in (1, 8, len(x)):
            rounds = [part for part in x[: max(64, rows)].split(rows) if len(part) == rows]
            found = torch.cat([choose(kernels, part, rows, layout).linear(part, layout).double() for part in rounds])
            heard = noise_db(found, torch.cat(rounds).double() @ dense.t())
            assert heard >= min(50.0, own + 10), f"{name}, {rows} rows: {heard:.1f} dB, weights {own:.1f}"
    assert len(given) >= 37


def test_a_layer_is_in_bytes_or_tiles_where_torch_has_them():
    assert isinstance(quantized(linear(64, 64), INT8).weight_stored.weight_layout(), Int8Rows)
    assert isinstance(quantized(linear(64, 64), FLOAT8).weight_stored.weight_layout(), BytePairs)
    expected = "int4_tiles" if features.tile_width() else "packed_int32"
    for spec in (INT4, NF4, *(attrs.evolve(INT4, bits=bits) for bits in (2, 3, 5, 6, 7))):
        assert quantized(linear(64, 64), spec).weight_stored.weight_layout().name == expected
