"""Whole models: the quantized layers, the kept parts, and the way back to floats."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn

import fewbits
from fewbits.errors import NonFiniteError, SelectionError, SourceError
from fewbits.nn.base import _registered, made_class, quantized_form
from nn.cases import (
    CASES,
    COMBINATIONS,
    IDS,
    SCHEMES,
    TYPICAL,
    Mixed,
    Tied,
    convert,
    converted,
    fewbits_classes,
    keeping,
    pickled,
    reloaded,
    same_bits,
    same_state,
    seeded,
    snapshot,
    storages,
    tensors_in,
)

pytestmark = pytest.mark.usefixtures("reference_only")

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
either_place = pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])


def mixed() -> nn.Module:
    return seeded(Mixed).eval()


def tied() -> nn.Module:
    return seeded(Tied).eval()


# The source.


@pytest.mark.parametrize("make", [mixed, tied], ids=["mixed", "tied"])
@every_scheme
def test_the_source_is_untouched_and_shares_nothing_with_the_result(make, scheme):
    source = make()
    source.first_hook = source.register_forward_hook(lambda *_: None)
    before = snapshot(source)
    result = convert(source, scheme)
    assert snapshot(source).equals(before)
    assert not storages(source) & storages(result)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_module_leaves_its_source_untouched(case):
    source = case.module()
    before = snapshot(source)
    result = convert(source, "int4-asymmetric")
    result.requires_grad_(False)
    for tensor in tensors_in(result):
        tensor.zero_()
    assert snapshot(source).equals(before)


def test_running_the_prepared_model_leaves_the_sources_buffers_untouched():
    source = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = snapshot(source)
    prepared = keeping().prepare(source)
    prepared(torch.randn(8, 4))
    assert snapshot(source).equals(before)


def test_weights_are_read_when_they_are_converted():
    source = nn.Linear(4, 4)
    quantizer = keeping()
    quantizer.prepare(source)
    source.weight.data.fill_(2.0)
    assert torch.equal(quantizer.convert().weight, source.weight)


# The result.


@either_place
def test_hooks_flags_attributes_and_gradients_survive(inplace):
    source = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))).train()
    calls = []
    source[0].register_forward_hook(lambda *_: calls.append("after"))
    source[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    source[1].eval()
    source[0].note = {"owner": "somebody"}
    source[1][0].bias.requires_grad_(False)
    gradients = {name: p.requires_grad for name, p in source.named_parameters() if not name.endswith("0.weight")}
    result = convert(source, inplace=inplace)
    result(torch.randn(2, 4))
    assert calls == ["before", "after"]
    assert result[0].note == {"owner": "somebody"}
    assert {name: p.requires_grad for name, p in result.named_parameters()} == gradients
    assert [result.training, result[0].training, result[1].training, result[1][0].training] == [
        True,
        True,
        False,
        False,
    ]


@either_place
def test_no_module_of_an_evaluated_model_is_in_training(inplace):
    assert not any(module.training for module in convert(mixed(), inplace=inplace).modules())


@pytest.mark.parametrize(
    ("float_class", "base"),
    [(cls, form) for cls, form in _registered.items() if isinstance(cls, type) and cls.__module__.startswith("torch.")],
    ids=str,
)
def test_a_quantized_class_is_a_subclass_of_the_one_it_replaces(float_class, base):
    def quantized_class(float_class):
        return made_class(float_class, *quantized_form(float_class, ["weight"]))

    for replaced in (float_class, type("Own", (float_class,), {})):
        made = quantized_class(replaced)
        assert issubclass(made, replaced)
        assert issubclass(made, base)
        assert made.float_class is replaced
        assert quantized_class(replaced) is made
    assert quantized_class(float_class) is base


def test_a_bare_layer_is_a_model():
    source = nn.Linear(4, 4)
    result = convert(source)
    assert isinstance(result, nn.Linear)
    assert type(source) is nn.Linear
    assert list(result.state_dict()) == ["bias", "weight_packed", "weight_scale", "weight_shape"]


def test_layers_in_nested_containers_are_all_replaced():
    result = convert(mixed())
    assert isinstance(result.blocks, nn.ModuleList)
    assert {type(block["up"]).__name__ for block in result.blocks} == {"QuantizedLinear"}


def test_a_reference_outside_of_the_tree_is_to_the_same_quantized_layer():
    source = tied()
    result = convert(source)
    assert result.beside[0] is result.first is result.again
    assert source.beside[0] is source.first
    assert fewbits.dequantize(result).beside[0] is not result.first
    assert fewbits_classes(fewbits.dequantize(result).beside[0]) == []


def test_a_layer_outside_of_the_tree_stays_float_and_is_copied():
    source = nn.Sequential(nn.Linear(4, 4))
    source.hidden = [nn.Linear(4, 4)]
    result, ledger = converted(source, keeping())
    assert type(result.hidden[0]) is nn.Linear
    assert [row.name for row in ledger] == ["0.weight", "0.bias"]
    assert not storages(source) & storages(result)


def test_a_plain_reference_to_a_kept_parameter_follows_it_into_the_copy():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.gain = nn.Parameter(torch.ones(4))
            self.trained = [self.gain]

    source = Listed()
    result = convert(source)
    assert result.trained[0] is result.gain
    assert result.trained[0].data_ptr() != source.gain.data_ptr()


@every_scheme
def test_a_traced_graph_is_quantized_like_any_model(scheme):
    result = convert(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), scheme)
    x = torch.randn(2, 8)
    assert same_bits(result(x), fewbits.dequantize(result)(x))


def test_a_compiled_model_computes_with_the_quantized_weights_after_an_inplace_conversion():
    torch._dynamo.reset()
    source = nn.Sequential(nn.Linear(8, 8))
    compiled = torch.compile(source, backend="eager")
    x = torch.randn(2, 8)
    before = compiled(x)
    convert(source, "int4", inplace=True)
    assert not torch.equal(compiled(x), before)
    assert torch.equal(compiled(x), source(x))


# Modules with parameters of any name, and forwards of their own.


class Shifted(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


def _weight_norm_of_old() -> nn.Module:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(8, 8))


ODD = {
    "subclass": (lambda: Shifted(8, 8), ["weight"]),
    "LSTM": (lambda: nn.LSTM(8, 8), ["weight_ih_l0", "weight_hh_l0"]),
    "GRU": (lambda: nn.GRU(8, 8), ["weight_ih_l0", "weight_hh_l0"]),
    "bilinear": (lambda: nn.Bilinear(8, 8, 8), ["weight"]),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        ["parametrizations.weight.original0", "parametrizations.weight.original1"],
    ),
    "spectral norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
        ["parametrizations.weight.original"],
    ),
    "spectral norm of old": (lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), ["weight_orig"]),
    "weight norm of old": (_weight_norm_of_old, ["weight_v", "weight_g"]),
}


@pytest.mark.parametrize(("make", "names"), ODD.values(), ids=ODD)
@every_scheme
@either_place
@torch.no_grad()  # torch cannot copy modules whose weight has been computed with gradients
def test_the_parameters_of_any_module_are_quantized_and_it_computes_with_them(make, names, scheme, inplace):
    source = nn.ModuleDict({"odd": seeded(make), "head": nn.Linear(8, 8)}).eval()
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    inputs = (x,) * 2 if isinstance(source["odd"], nn.Bilinear) else (x,)

    def run(model):
        output = model["odd"](*inputs)
        return (output[0] if isinstance(output, tuple) else output).clone()

    before = run(source)
    result, ledger = converted(source, SCHEMES[scheme](), inplace=inplace)
    quantized = {row.name.removeprefix("odd.") for row in ledger if row.spec is not None}
    assert quantized == {*names, "head.weight"}
    output = run(result)
    assert same_bits(output, run(fewbits.dequantize(result).requires_grad_(False)))
    assert not same_bits(output, before)
    torch.testing.assert_close(output, before, rtol=0.5, atol=0.5)


class Marked(nn.Parameter):
    """A parameter of a class of its own, which may mean anything."""


def _with_marked_weight() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = Marked(layer.weight.data)
    return layer


def _with_a_child_in_the_way() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight_stored = nn.Identity()
    return layer


def _with_its_weight_in_a_list() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.also = [layer.weight]
    return layer


KEPT = {
    "a parameter of another class": (_with_marked_weight, "it is a Marked, not a plain parameter"),
    "a child of the name": (_with_a_child_in_the_way, "it has an attribute weight_stored"),
    "held in a list too": (_with_its_weight_in_a_list, "odd.also holds it too"),
}


@pytest.mark.parametrize(("make", "reason"), KEPT.values(), ids=KEPT)
@either_place
def test_what_cannot_be_stored_is_kept_with_a_reason_and_runs(make, reason, inplace):
    source = nn.ModuleDict({"odd": make(), "head": nn.Linear(8, 8)}).eval()
    x = torch.randn(2, 8)
    expected = source["odd"](x)
    result, ledger = converted(source, keeping(), inplace=inplace)
    assert ledger["odd.weight"].fate == "kept"
    assert reason in ledger["odd.weight"].reason
    assert ledger["head.weight"].fate == "quantized"
    assert same_bits(result["odd"](x), expected)


@every_scheme
@torch.no_grad()  # torch takes another path where a weight requires gradients
def test_both_projections_of_attention_are_quantized(scheme):
    source = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    result, ledger = converted(source, SCHEMES[scheme]())
    assert ledger["in_proj_weight"].spec is not None
    assert ledger["out_proj.weight"].spec is not None
    x = torch.randn(2, 3, 8)
    plain = fewbits.dequantize(result).requires_grad_(False)
    assert type(plain.out_proj) is type(source.out_proj)
    assert same_bits(result(x, x, x)[0], plain(x, x, x)[0])


@every_scheme
@pytest.mark.parametrize("fast", [True, False], ids=["fast path", "slow path"])
def test_a_transformer_layer_runs_on_both_paths(scheme, fast):
    source = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    result = convert(source, scheme)
    plain = fewbits.dequantize(result).requires_grad_(False)  # torch takes another path where weights require gradients
    x = torch.randn(2, 3, 8, requires_grad=not fast)
    with torch.set_grad_enabled(not fast):
        assert same_bits(result(x), plain(x))


def test_the_fast_path_is_the_one_that_runs(monkeypatch):
    source = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    calls = []
    fused = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(a) or fused(*a))
    with torch.no_grad():
        convert(source)(torch.randn(2, 3, 8))
    assert len(calls) == 1


@torch.no_grad()
def test_an_encoder_runs_with_a_padding_mask():
    source = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    )
    result = convert(source.eval())
    plain = fewbits.dequantize(result).requires_grad_(False)
    mask = torch.tensor([[False, False, True], [False, False, False]])
    x = torch.randn(2, 3, 8)
    assert same_bits(result(x, src_key_padding_mask=mask), plain(x, src_key_padding_mask=mask))


# The way back.


@pytest.mark.parametrize("case", TYPICAL, ids=str)
@pytest.mark.parametrize(("scheme", "dtype"), COMBINATIONS, ids=str)
def test_dequantize_gives_a_plain_module_with_the_weight_as_it_reads(case, scheme, dtype):
    source = case.module(dtype)
    quantized = convert(source, scheme)
    before = snapshot(quantized)
    plain = fewbits.dequantize(quantized)
    assert type(plain) is type(source)
    assert same_bits(plain.weight, quantized.weight)
    assert list(vars(plain)) == list(vars(source))
    assert snapshot(quantized).equals(before)
    assert not storages(plain) & storages(quantized)


@pytest.mark.parametrize("make", [mixed, tied], ids=["mixed", "tied"])
@every_scheme
def test_a_dequantized_model_has_the_structure_of_the_source(make, scheme):
    source = make()
    source.get_parameter("first.weight" if make is tied else "conv.weight").requires_grad_(False)
    plain = fewbits.dequantize(convert(source, scheme))
    assert snapshot(plain).classes == snapshot(source).classes
    assert dict(snapshot(plain).gradients) == dict(snapshot(source).gradients)
    assert fewbits_classes(plain) == []
    mine, theirs = plain.state_dict(), source.state_dict()
    assert {name: (t.shape, t.dtype) for name, t in mine.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    source.load_state_dict(mine)
    assert same_bits(source(IDS), plain(IDS))


@pytest.mark.parametrize("make", [mixed, lambda: nn.LSTM(8, 8, 2)], ids=["mixed", "two layers of an LSTM"])
def test_a_dequantized_model_has_its_parameters_in_the_order_of_the_source(make):
    source = make()
    plain = fewbits.dequantize(convert(source))
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in source.named_parameters()]


@every_scheme
def test_dequantized_weights_are_contiguous(scheme):
    plain = fewbits.dequantize(convert(nn.ModuleList([nn.Linear(10, 3), nn.ConvTranspose1d(4, 6, 3)]), scheme))
    assert all(parameter.is_contiguous() for parameter in plain.parameters())


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32], ids=str)
def test_a_dequantized_model_shares_nothing_with_a_quantized_one_of_the_same_dtype(dtype):
    quantized = convert(nn.Linear(8, 8), "fp16").half()
    assert not storages(fewbits.dequantize(quantized, dtype=dtype)) & storages(quantized)


def test_dequantize_to_another_dtype_changes_the_quantized_weights_only():
    plain = fewbits.dequantize(convert(nn.Linear(8, 8)), dtype=torch.bfloat16)
    assert (plain.weight.dtype, plain.bias.dtype) == (torch.bfloat16, torch.float32)


def test_dequantize_keeps_hooks_and_flags():
    quantized = convert(nn.Sequential(nn.Linear(4, 4)).eval())
    quantized[0].register_forward_hook(lambda module, args, output: output + 1)
    plain = fewbits.dequantize(quantized)
    x = torch.randn(2, 4)
    assert same_bits(plain(x), quantized(x))
    assert not plain[0].training


def test_dequantize_of_a_float_model_is_a_copy():
    source = mixed()
    plain = fewbits.dequantize(source)
    assert same_state(plain, source)
    assert not storages(plain) & storages(source)


def test_a_dequantized_model_trains_and_is_quantized_again():
    source = convert(nn.Linear(4, 4), "int8")
    plain = fewbits.dequantize(source)
    plain(torch.ones(1, 4)).sum().backward()
    assert plain.weight.grad is not None
    assert same_bits(convert(plain, "int8").weight, source.weight)


# Tied weights.

JOURNEYS = {
    "nothing": lambda model: model,
    "to": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "state dict": reloaded,
    "assigned state dict": lambda model: reloaded(model, assign=True),
    "to_empty": lambda model: model.to_empty(device="cpu"),
}


@pytest.mark.parametrize("journey", JOURNEYS.values(), ids=JOURNEYS)
@either_place
@every_scheme
def test_tied_weights_stay_tied(scheme, inplace, journey):
    model = journey(convert(tied(), scheme, inplace=inplace))
    assert model.embed.weight_stored is model.head.weight_stored
    assert model.first is model.again
    plain = fewbits.dequantize(model)
    assert plain.embed.weight is plain.head.weight


@every_scheme
def test_a_tied_model_computes_like_its_dequantized_form_and_counts_its_bytes_once(scheme):
    source = tied()
    model, ledger = converted(source, SCHEMES[scheme]())
    assert same_bits(model(IDS), fewbits.dequantize(model)(IDS))
    assert ledger.bytes_before == sum(parameter.nbytes for parameter in source.parameters())
    assert ledger["head.weight"].alias_of == "embed.weight"
    shape_parts = 16 * ledger.count("quantized")
    assert sum(t.nbytes for t in (*model.parameters(), *model.buffers())) == ledger.bytes_after - shape_parts


def test_a_tied_weight_of_two_classes_that_cut_it_differently_serves_both():
    source = nn.ModuleList([nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3)])
    source[1].weight = source[0].weight
    model = convert(source, "int4")
    x = torch.randn(1, 4, 6)
    plain = fewbits.dequantize(model)
    assert all(same_bits(model[i](x), plain[i](x)) for i in range(2))
    assert plain[0].weight is plain[1].weight


def test_one_layer_twice_in_a_sequence_is_one_layer_still():
    layer = nn.Linear(4, 4)
    model, ledger = converted(nn.Sequential(layer, nn.ReLU(), layer), keeping())
    assert model[0] is model[2]
    assert (ledger["2.weight"].fate, ledger["2.bias"].fate) == ("alias", "alias")
    assert copy.deepcopy(model)[0] is not model[0]


def test_parameters_over_one_storage_are_tied_even_if_they_are_two_objects():
    source = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    source[1].weight = nn.Parameter(source[0].weight.detach())
    model = convert(source)
    assert model[0].weight_stored is model[1].weight_stored


def test_a_weight_that_is_a_part_of_another_is_kept():
    source = nn.ModuleList([nn.Linear(4, 8), nn.Linear(4, 4), nn.Linear(4, 4)])
    source[1].weight = nn.Parameter(source[0].weight.detach()[:4])
    _, ledger = converted(source, keeping())
    assert [ledger[f"{i}.weight"].fate for i in range(3)] == ["kept", "kept", "quantized"]
    assert "overlaps" in ledger["1.weight"].reason


def test_a_tied_embedding_that_int4_skips_keeps_the_output_layer_too():
    model, ledger = converted(tied(), keeping(fewbits.Int4Grouped, 4))
    assert (ledger["embed.weight"].fate, ledger["head.weight"].fate) == ("kept", "alias")
    assert model.embed.weight is model.head.weight
    assert isinstance(model.embed.weight, nn.Parameter)


@pytest.mark.parametrize("name", ["embed", "head"])
def test_a_rule_that_names_one_of_two_tied_tensors_quantizes_both(name):
    _, ledger = converted(tied(), keeping(fewbits.Int4Grouped, 4, include=[name]))
    assert ledger["embed.weight"].fate == "quantized"
    assert ledger["head.weight"].alias_of == "embed.weight"


def test_rules_that_contradict_each_other_on_tied_tensors_are_an_error():
    with pytest.raises(SelectionError, match=r"one storage, two fates: .*embed.*head"):
        keeping(include=["embed"], exclude=["head"]).prepare(tied())


def test_an_excluded_name_keeps_what_is_tied_to_it():
    model, ledger = converted(tied(), keeping(exclude=["head"]))
    assert ledger["embed.weight"].fate == "kept"
    assert model.embed.weight is model.head.weight


def test_a_weight_tied_to_one_that_cannot_be_stored_is_kept():
    source = nn.ModuleList([nn.Linear(8, 8), _with_a_child_in_the_way(), nn.Linear(8, 8)])
    source[1].weight = source[0].weight
    _, ledger = converted(source, keeping())
    assert ledger["0.weight"].fate == "kept"
    assert "weight_stored" in ledger["0.weight"].reason


# In place.


@every_scheme
def test_in_place_the_same_objects_come_back_quantized(scheme):
    source = mixed()
    layers = dict(source.named_modules())
    kept = source.lstm.bias_ih_l0
    expected = convert(mixed(), scheme)(IDS)
    result = convert(source, scheme, inplace=True)
    assert result is source
    assert all(dict(result.named_modules())[name] is module for name, module in layers.items())
    assert result.lstm.bias_ih_l0 is kept
    assert same_bits(result(IDS), expected)


@every_scheme
def test_a_failure_halfway_in_place_leaves_a_model_that_runs_and_can_be_finished(scheme):
    source = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    source[2].weight.data[1, 2] = float("nan")
    quantizer = SCHEMES[scheme]()
    quantizer.prepare(source, inplace=True)
    with pytest.raises(NonFiniteError, match=r"2\.weight"):
        quantizer.convert()
    assert fewbits_classes(source[0])
    assert type(source[2]) is nn.Linear
    assert source[:2](torch.randn(2, 8)).isfinite().all()
    source[2].weight.data[1, 2] = 0
    result = quantizer.convert()
    assert result is source
    assert len(fewbits_classes(result)) == 6
    assert quantizer.validate().ok


def test_a_failure_out_of_place_leaves_the_source_as_it_was_and_can_be_finished():
    source = nn.Sequential(*[nn.Linear(8, 8) for _ in range(2)])
    source[1].weight.data[1, 2] = float("inf")
    before = snapshot(source)
    quantizer = keeping()
    quantizer.prepare(source)
    with pytest.raises(NonFiniteError, match=r"1\.weight"):
        quantizer.convert()
    assert snapshot(source).equals(before)
    source[1].weight.data[1, 2] = 0
    quantizer.convert()
    assert quantizer.validate().ok


def test_a_weight_replaced_after_prepare_is_the_one_that_is_quantized_in_place():
    source = nn.Linear(4, 4)
    quantizer = keeping()
    quantizer.prepare(source, inplace=True)
    source.weight = nn.Parameter(torch.full((4, 4), 0.5))
    assert torch.equal(quantizer.convert().weight, torch.full((4, 4), 0.5))


def test_a_model_that_cannot_be_copied_can_be_quantized_in_place():
    source = nn.Sequential(nn.Linear(4, 4))
    source.lock = threading.Lock()
    with pytest.raises(SourceError, match="inplace=True"):
        keeping().prepare(source)
    assert fewbits_classes(convert(source, inplace=True))
