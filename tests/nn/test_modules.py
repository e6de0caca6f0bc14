"""One quantized module at a time: its outputs, its memory, and its state dict."""

import io
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits.errors import ReadOnlyWeightError
from fewbits.numerics.dtypes import FLOAT_DTYPES
from nn.cases import (
    CASES,
    COMBINATIONS,
    SCHEMES,
    TYPICAL,
    Case,
    convert,
    converted,
    in_turn,
    padding_left_out,
    same_bits,
    storages,
    tensors_in,
    through_torch_save,
)

pytestmark = pytest.mark.usefixtures("reference_only")

every_case = pytest.mark.parametrize("case", CASES, ids=str)
typical_case = pytest.mark.parametrize("case", TYPICAL, ids=str)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
schemes_in_turn = pytest.mark.parametrize(("case", "scheme"), in_turn(CASES, SCHEMES))
every_combination = pytest.mark.parametrize(("scheme", "dtype"), COMBINATIONS, ids=str)


def refused_by_torch(what, act) -> bool:
    """Whether the float module cannot do it either, which is then all there is to say."""
    try:
        act()
    except Exception as error:
        print(f"torch refuses: {what} ({type(error).__name__}: {str(error).splitlines()[0]})")
        return True
    return False


def assert_forward_is_that_of_the_dequantized_module(case: Case, scheme: str, dtype: torch.dtype) -> None:
    source = case.module(dtype)
    quantized = convert(source, scheme)
    plain = fewbits.dequantize(quantized)
    if refused_by_torch(f"{case} in {dtype}", lambda: case.run(source, dtype)):
        with pytest.raises(Exception):  # noqa: B017, PT011  (any error of torch)
            case.run(quantized, dtype)
        return
    output = case.run(quantized, dtype)
    assert same_bits(output, case.run(plain, dtype))
    assert same_bits(output, case.run(quantized, dtype)), "a forward has changed the module"


@schemes_in_turn
def test_forward_is_that_of_the_float_module_with_the_dequantized_weight(case, scheme):
    assert_forward_is_that_of_the_dequantized_module(case, scheme, torch.float32)


@typical_case
@every_combination
def test_forward_in_every_dtype_is_that_of_the_dequantized_module(case, scheme, dtype):
    assert_forward_is_that_of_the_dequantized_module(case, scheme, dtype)


@given(st.data())
def test_linear_of_any_size_is_that_of_the_dequantized_module(data):
    features = st.integers(1, 40)
    scheme, dtype = data.draw(st.sampled_from(COMBINATIONS))
    source = nn.Linear(data.draw(features), data.draw(features), bias=data.draw(st.booleans()), dtype=dtype)
    quantized = convert(source, scheme)
    x = torch.randn(data.draw(st.integers(0, 3)), source.in_features, dtype=dtype)
    assert same_bits(quantized(x), fewbits.dequantize(quantized)(x))


@given(st.data())
def test_convolutions_with_any_options_are_those_of_the_dequantized_module(data):
    draw = data.draw
    rank, transposed, groups = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.integers(1, 3))
    cls = getattr(nn, f"Conv{'Transpose' * transposed}{rank}d")
    small = st.integers(1, 3)
    stride = draw(small)
    options = {"output_padding": draw(st.integers(0, stride - 1))} if transposed else {}
    source = cls(
        groups * draw(small),
        groups * draw(small),
        tuple(draw(small) for _ in range(rank)),
        stride=stride,
        padding=draw(st.integers(0, 1)),
        dilation=draw(st.integers(1, 2)) if stride == 1 else 1,
        groups=groups,
        bias=draw(st.booleans()),
        **options,
    )
    quantized = convert(source, draw(st.sampled_from(sorted(SCHEMES))))
    x = torch.randn(2, source.in_channels, *[7] * rank)
    assert same_bits(quantized(x), fewbits.dequantize(quantized)(x))


@given(st.data())
def test_an_embedding_looks_up_the_rows_of_its_weight(data):
    scheme = data.draw(st.sampled_from(sorted(SCHEMES)))
    rows, columns = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    quantized = convert(nn.Embedding(rows, columns), scheme)
    index = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), max_size=9)), dtype=torch.int64)
    assert same_bits(quantized(index), quantized.weight[index])


@pytest.mark.parametrize("index", [10, -1])
def test_an_index_outside_of_an_embedding_is_an_error_as_in_torch(index):
    source = nn.Embedding(10, 6)
    for module in (source, convert(source, "int8"), convert(source, "fp16")):
        with pytest.raises((IndexError, RuntimeError)):
            module(torch.tensor([0, index]))


@pytest.mark.parametrize("case", [case for case in TYPICAL if case.reads_floats], ids=str)
@pytest.mark.parametrize("given_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@every_scheme
def test_arithmetic_is_in_the_dtype_of_the_input(case, scheme, given_dtype):
    quantized = convert(case.module(), scheme)
    plain = fewbits.dequantize(quantized, dtype=given_dtype).to(given_dtype)
    output = case.run(quantized, given_dtype)
    assert output.dtype == given_dtype
    assert same_bits(output, case.run(plain, given_dtype))


@typical_case
@every_scheme
def test_gradients_of_floating_inputs_are_those_of_the_dequantized_module(case, scheme):
    quantized = convert(case.module(), scheme)
    gradients = []
    for module in (quantized, fewbits.dequantize(quantized)):
        arguments = (*case.inputs, *case.kwargs.values())
        floats = [x for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
        for x in floats:
            x.grad = None
            x.requires_grad_()
        if floats:
            case.run(module).square().sum().backward()
        gradients.append([x.grad for x in floats])
        for x in floats:
            x.requires_grad_(False)
    assert all(same_bits(mine, theirs) for mine, theirs in zip(*gradients, strict=True))


def test_the_gradient_of_a_bias_is_that_of_the_dequantized_module():
    quantized = convert(nn.Linear(6, 3))
    plain = fewbits.dequantize(quantized)
    for module in (quantized, plain):
        module(torch.ones(2, 6)).square().sum().backward()
    assert same_bits(quantized.bias.grad, plain.bias.grad)


@typical_case
@every_scheme
def test_autocast_works_as_on_the_dequantized_module(case, scheme):
    quantized = convert(case.module(), scheme)
    plain = fewbits.dequantize(quantized)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, expected = case.run(quantized), case.run(plain)
    assert same_bits(output, expected)


@typical_case
@every_scheme
def test_the_output_lies_in_memory_as_that_of_the_float_module(case, scheme):
    source = case.module()
    assert case.run(convert(source, scheme)).stride() == case.run(source).stride()


# The memory of a module.


@schemes_in_turn
def test_a_module_holds_its_weight_in_stored_form_only(case, scheme):
    model, ledger = converted(case.module(), SCHEMES[scheme]())
    held = [*model.parameters(), *model.buffers()]
    shape_part = 8 * len(ledger["weight"].shape) if ledger["weight"].fate == "quantized" else 0
    assert sum(tensor.nbytes for tensor in held) == ledger.bytes_after - shape_part - padding_left_out(model)
    assert {id(tensor) for tensor in tensors_in(model)} == {id(tensor) for tensor in held}


@typical_case
@every_scheme
def test_no_storage_is_larger_than_the_tensor_in_it(case, scheme):
    for tensor in tensors_in(convert(case.module(), scheme)):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@typical_case
@every_combination
def test_the_weight_reads_as_a_float_tensor(case, scheme, dtype):
    source = case.module(dtype)
    weight = convert(source, scheme).weight
    assert (weight.shape, weight.dtype) == (source.weight.shape, dtype)
    assert not weight.requires_grad


@typical_case
@every_scheme
def test_the_weight_that_is_read_is_contiguous(case, scheme):
    assert convert(case.module(), scheme).weight.is_contiguous()


@typical_case
@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_writing_into_the_weight_that_was_read_is_refused_and_changes_nothing(case, scheme, dtype):
    module = convert(case.module(), scheme).to(dtype)
    before = module.weight.clone()
    with pytest.raises(ReadOnlyWeightError, match="weight is quantized"):
        module.weight.zero_()
    assert same_bits(module.weight, before)


@pytest.mark.parametrize("case", [case for case in CASES if "norm" in case.name], ids=str)
@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_maximal_norm_never_changes_the_stored_weight(case, scheme, dtype):
    module = convert(case.module(), scheme).to(dtype)
    before = {name: part.clone() for name, part in module.state_dict().items()}
    case.run(module, dtype)
    assert all(same_bits(part, before[name]) for name, part in module.state_dict().items())


@every_scheme
@pytest.mark.parametrize("value", [torch.zeros(5, 12), nn.Parameter(torch.zeros(5, 12)), None], ids=repr)
def test_assigning_to_the_weight_is_refused_and_changes_nothing(scheme, value):
    module = convert(nn.Linear(12, 5), scheme)
    before = {name: part.clone() for name, part in module.state_dict().items()}
    with pytest.raises(ReadOnlyWeightError, match=r"QuantizedLinear\.weight is quantized"):
        module.weight = value
    assert list(dict(module.named_parameters())) == ["bias"]
    assert all(same_bits(part, before[name]) for name, part in module.state_dict().items())


def test_a_weight_cannot_be_registered_or_deleted():
    module = convert(nn.Linear(12, 5))
    with pytest.raises(ReadOnlyWeightError):
        module.register_parameter("weight", nn.Parameter(torch.zeros(5, 12)))
    with pytest.raises(KeyError):
        module.register_buffer("weight", torch.zeros(5, 12))
    with pytest.raises(AttributeError):
        del module.weight
    assert module.weight.shape == (5, 12)


def test_a_bias_can_be_assigned():
    module = convert(nn.Linear(12, 5))
    module.bias = nn.Parameter(torch.ones(5))
    assert torch.equal(module(torch.zeros(12)), torch.ones(5))


@every_case
def test_the_text_of_a_module_shows_its_options_and_how_its_weight_is_stored(case):
    source = case.module()
    quantized = convert(source, "int8")
    assert repr(quantized).startswith(f"Quantized{type(source).__name__}(")
    assert source.extra_repr() in repr(quantized)
    assert "(weight_stored): PackedWeight(int8 channel, reads as float32)" in repr(quantized)


# Changes of dtype and device.


def _stored(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in module.weight_stored.named_buffers()}


@given(
    scheme=st.sampled_from(sorted(SCHEMES)),
    magnitude=st.sampled_from([1e-30, 1.0, 1e30]),
    steps=st.lists(st.sampled_from(FLOAT_DTYPES), min_size=1, max_size=5),
)
def test_changes_of_dtype_never_touch_codes_and_scales(scheme, magnitude, steps):
    source = nn.Linear(10, 3)
    if scheme != "fp16":
        source.weight.data *= magnitude
    module = convert(source, scheme)
    before = _stored(module)
    for dtype in steps:
        module.to(dtype)
    assert module.weight.dtype == module.bias.dtype == steps[-1]
    after = _stored(module)
    assert all(same_bits(after[name], part) for name, part in before.items())


@pytest.mark.parametrize("change", ["half", "bfloat16", "double", "float"])
@every_scheme
def test_methods_that_change_the_dtype_change_what_is_read_and_what_is_computed(scheme, change):
    module = convert(nn.Linear(10, 3), scheme)
    expected = fewbits.dequantize(module)
    getattr(module, change)()
    getattr(expected, change)()
    x = torch.randn(2, 10, dtype=expected.weight.dtype)
    assert same_bits(module.weight, expected.weight)
    assert same_bits(module(x), expected(x))


@every_scheme
def test_another_memory_format_changes_no_bit_of_the_weight(scheme):
    module = convert(nn.Conv2d(4, 6, 3), scheme)
    before = _stored(module)
    x = torch.randn(1, 4, 5, 5).to(memory_format=torch.channels_last)
    expected = fewbits.dequantize(module)(x)
    module.to(memory_format=torch.channels_last)
    assert all(same_bits(part, before[name]) for name, part in _stored(module).items())
    torch.testing.assert_close(module(x), expected)


@every_scheme
def test_a_module_on_the_meta_device_has_a_meta_weight_and_a_meta_output(scheme):
    module = convert(nn.Conv2d(4, 6, 3), scheme).to("meta")
    assert module.weight.is_meta
    assert module(torch.empty(1, 4, 5, 5, device="meta")).shape == (1, 6, 3, 3)


# State dicts.


@every_scheme
def test_a_state_dict_has_the_parts_that_a_file_has(scheme):
    parts = {
        "int8": ["_packed", "_scale", "_shape"],
        "int8-tensor": ["_packed", "_scale", "_shape"],
        "int4": ["_packed", "_scale", "_shape"],
        "int4-asymmetric": ["_packed", "_scale", "_zero_point", "_shape"],
        "fp16": [""],
    }
    state = convert(nn.Linear(12, 5, bias=False), scheme).state_dict(prefix="layer.")
    assert list(state) == [f"layer.weight{part}" for part in parts[scheme]]
    assert not any(part.requires_grad for part in state.values())


@every_scheme
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_loads_into_another_quantized_module(scheme, assign):
    first, second = (convert(nn.Linear(12, 5), scheme) for _ in range(2))
    assert not same_bits(first.weight, second.weight)
    second.load_state_dict(through_torch_save(first.state_dict()), assign=assign)
    assert same_bits(first.weight, second.weight)


@every_scheme
def test_assigned_parts_are_used_as_they_are_and_others_are_copied(scheme):
    state = dict(convert(nn.Linear(12, 5), scheme).state_dict())
    given_storages = storages({name: part for name, part in state.items() if not name.endswith("_shape")})
    assigned, copied = (convert(nn.Linear(12, 5), scheme) for _ in range(2))
    assigned.load_state_dict(state, assign=True)
    copied.load_state_dict(state)
    assert storages(assigned) == given_storages
    assert not storages(copied) & given_storages


def _without(key):
    return lambda state: {name: part for name, part in state.items() if name != key}


def _with(key, tensor):
    return lambda state: {**state, key: tensor}


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (_without("weight_scale"), r"Missing key\(s\).*weight_scale"),
        (_without("weight_shape"), r"Missing key\(s\).*weight_shape"),
        (_with("weight_shape", torch.tensor([12, 5])), r"weight.*\(12, 5\)"),
        (_with("weight_packed", torch.zeros(5, 9, dtype=torch.int32)), r"packed has shape \(5, 9\)"),
        (_with("weight_packed", torch.zeros(5, 3)), r"packed has shape \(5, 3\) and dtype float32"),
        (_with("weight_scale", torch.zeros(5, 1, dtype=torch.float16)), r"scale has shape \(5, 1\) and dtype float16"),
    ],
)
def test_parts_that_do_not_fit_are_reported_and_leave_the_weight_as_it_was(edit, complaint):
    module = convert(nn.Linear(12, 5), "int8")
    before = module.weight
    with pytest.raises(RuntimeError, match=f"(?s){complaint}"):
        module.load_state_dict(edit(convert(nn.Linear(12, 5), "int8").state_dict()))
    assert same_bits(module.weight, before)


@pytest.mark.parametrize("key", ["weight", "weight_zero_point", "weight_stored.packed", "weight_stored", "typo"])
def test_a_key_that_belongs_to_nothing_is_reported(key):
    module = convert(nn.Linear(12, 5), "int8")
    with pytest.raises(RuntimeError, match=rf'Unexpected key\(s\).*"{key}"'):
        module.load_state_dict({**module.state_dict(), key: torch.zeros(5, 12)})


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("scheme", ["int8", "int4-asymmetric", "fp16"])
def test_a_float_state_dict_is_refused_in_one_sentence_with_the_way_out(scheme, strict):
    def layers() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 4), nn.LSTM(4, 4))

    model = convert(layers(), scheme)
    before = model.state_dict()
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(layers().state_dict(), strict=strict)
    message = str(caught.value)
    assert "0.weight is float32 in the state dict, and stored as " in message
    assert "into the float model, and quantize that" in message
    assert "fewbits.load(path, into=model)" in message
    assert message.count("\n") == 1
    assert "issing" not in message
    assert "nexpected" not in message
    assert all(same_bits(before[f"0.weight{suffix}"], model.state_dict()[f"0.weight{suffix}"])
               for suffix in ([""] if scheme == "fp16" else ["_packed", "_scale"]))  # fmt: skip


def test_codes_of_another_scheme_are_refused_as_such_even_if_parts_are_missing():
    model = convert(nn.Linear(12, 5), "int4-asymmetric")
    with pytest.raises(RuntimeError, match=r"weight is stored as .* in the state dict, here as"):
        model.load_state_dict(convert(nn.Linear(12, 5), "int8").state_dict(), strict=False)


def test_a_cast_weight_takes_no_other_dtype():
    module = convert(nn.Linear(12, 5), "fp16")
    before = module.weight
    with pytest.raises(RuntimeError, match="weight is float32 in the state dict, and stored as float16"):
        module.load_state_dict(nn.Linear(12, 5).state_dict())
    assert same_bits(module.weight, before)


def test_a_state_dict_can_be_loaded_in_part():
    module = convert(nn.Linear(12, 5), "int8")
    before = module.weight
    found = module.load_state_dict({"bias": torch.ones(5)}, strict=False)
    assert found.missing_keys == ["weight_packed", "weight_scale", "weight_shape"]
    assert same_bits(module.weight, before)
    assert torch.equal(module.bias, torch.ones(5))


# Torch's compilers.


def _compiled(module: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def _exported(strict: bool):
    def export(module: nn.Module, case: Case) -> nn.Module:
        program = torch.export.export(module, case.inputs, case.kwargs, strict=strict)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        return torch.export.load(file).module()

    return export


COMPILERS = {
    "compile": lambda module, case: _compiled(module),
    "strict export": _exported(strict=True),
    "export": _exported(strict=False),
}


def assert_comes_through_a_compiler(case: Case, scheme: str, compiler) -> None:
    if refused_by_torch(f"{compiler} of {case}", lambda: case.run(COMPILERS[compiler](case.module().eval(), case))):
        return
    module = convert(case.module().eval(), scheme)
    torch.testing.assert_close(case.run(COMPILERS[compiler](module, case)), case.run(module))


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("case", [TYPICAL[i] for i in (3, 9)], ids=str)
def test_asymmetric_int4_comes_through_a_compiler(case, compiler):
    assert_comes_through_a_compiler(case, "int4-asymmetric", compiler)


@pytest.mark.parametrize(("scheme", "compiler"), list(zip(SCHEMES, itertools.cycle(COMPILERS), strict=False)))
def test_every_scheme_comes_through_a_compiler(scheme, compiler):
    assert_comes_through_a_compiler(TYPICAL[0], scheme, compiler)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
@every_scheme
def test_every_module_comes_through_a_compiler(scheme, compiler):
    for case in CASES:
        assert_comes_through_a_compiler(case, scheme, compiler)


def test_an_exported_module_holds_codes_and_no_float_weight():
    module = convert(nn.Linear(64, 32, bias=False), "int4")
    program = torch.export.export(module, (torch.randn(2, 64),))
    held = [*program.state_dict.values(), *program.constants.values()]
    assert sum(tensor.nbytes for tensor in held) == sum(buffer.nbytes for buffer in module.buffers())
