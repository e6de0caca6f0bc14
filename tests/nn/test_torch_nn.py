"""All of torch.nn: every class with parameters works the same after quantization.

Where torch refuses the float original, the quantized module has to be refused too; the test is then skipped with
torch's error, so that the summary of a run lists all of these.
"""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits.errors import ReadOnlyWeightError, SelectionError, SourceError
from nn.any_cases import (
    ANY_CASES,
    EVERYTHING,
    NOT_RUN,
    AnyCase,
    as_the_original,
    assert_fates,
    build_by_guess,
    converted,
    plain,
    quietly,
    same_outputs,
    torch_nn_classes,
    wanted,
)
from nn.cases import (
    fewbits_classes,
    in_turn,
    padding_left_out,
    same_bits,
    snapshot,
    storages,
    tensors_in,
    through_torch_save,
)
from nn.combinations import ALL, ALL_IN_TURN, ONE_OF_A_CLASS, QUANTIZABLE, SOME, parts, same_tensors, unless_refused

pytestmark = pytest.mark.usefixtures("reference_only")

every_combination = pytest.mark.parametrize(("case", "scheme"), ALL, ids=str)
schemes_in_turn = pytest.mark.parametrize(("case", "scheme"), ALL_IN_TURN)
every_case = pytest.mark.parametrize(("case", "scheme"), SOME, ids=str)
every_class = pytest.mark.parametrize(("case", "scheme"), ONE_OF_A_CLASS, ids=str)
every_scheme = pytest.mark.parametrize("scheme", EVERYTHING)


# Nothing is overlooked.


def test_every_class_of_torch_nn_that_has_parameters_is_a_case():
    known = {case.cls for case in ANY_CASES}
    for cls in torch_nn_classes():
        if cls not in known and cls.__name__ not in NOT_RUN:
            assert not list(build_by_guess(cls).parameters()), f"{cls.__name__} has parameters, and is no case"


@pytest.mark.parametrize(("case", "scheme"), in_turn(ANY_CASES, EVERYTHING))
def test_all_weights_are_quantized_and_all_else_is_kept_with_a_reason(case, scheme):
    source = case.module()
    if wanted(source):
        assert_fates(converted(source, scheme)[1], source)
        return
    with pytest.raises(SelectionError, match="nothing is left to quantize"):
        converted(source, scheme)


@pytest.mark.parametrize("case", [case for case in ANY_CASES if not wanted(case.module())], ids=str)
def test_a_module_with_nothing_to_quantize_stays_as_it_is_beside_others(case):
    source = nn.ModuleList([case.module(), nn.Linear(4, 4)])
    model, ledger = converted(source, "int8")
    assert all(row.fate == "kept" and row.reason for row in ledger if row.name.startswith("0."))
    assert type(model[0]) is type(source[0])
    assert same_outputs(case.run(model[0]), case.run(source[0]))


# Outputs.


@every_combination
def test_a_forward_is_that_of_the_dequantized_module(case, scheme):
    module, _ = converted(case.module(), scheme)
    expected = case.run(plain(module))
    assert same_outputs(case.run(module), expected)
    assert same_outputs(case.run(module), expected), "a forward has changed the module"


@schemes_in_turn
def test_training_mode_computes_as_the_dequantized_module_does(case, scheme):
    module = converted(case.module(), scheme)[0].train()
    assert all(child.training for child in module.modules())
    expected = case.run(plain(module))
    assert same_outputs(case.run(module), expected)
    assert not any(child.training for child in module.eval().modules())


@every_class
def test_in_place_gives_what_a_copy_gives(case, scheme):
    copied, _ = converted(case.module(), scheme)
    source = case.module()
    module, _ = converted(source, scheme, inplace=True)
    assert module is source
    assert same_tensors(parts(module), parts(copied))
    assert same_outputs(case.run(module), case.run(copied))


@schemes_in_turn
def test_the_source_is_untouched_and_shares_nothing_with_the_result(case, scheme):
    source = case.module()
    before = snapshot(source)
    module, _ = converted(source, scheme)
    case.run(module)
    assert snapshot(source).equals(before)
    assert not storages(source) & storages(module)


@schemes_in_turn
def test_a_module_holds_codes_and_no_float_weight(case, scheme):
    module, ledger = converted(case.module(), scheme)
    case.run(module)
    held = [*module.parameters(), *module.buffers()]
    assert {id(tensor) for tensor in tensors_in(module)} == {id(tensor) for tensor in held}
    shapes = sum(8 * len(row.shape) for row in ledger if row.fate == "quantized")
    assert sum(tensor.nbytes for tensor in held) == ledger.bytes_after - shapes - padding_left_out(module)


@pytest.mark.parametrize(("case", "scheme"), in_turn([case for case in QUANTIZABLE if case.has_floats], EVERYTHING))
def test_gradients_of_inputs_are_those_of_the_dequantized_module(case, scheme):
    module, _ = converted(case.module(), scheme)
    expected, their_gradients = case.run_with_gradients(plain(module))
    output, gradients = case.run_with_gradients(module.requires_grad_(False))
    assert same_outputs(output, expected)
    assert same_outputs(gradients, their_gradients)


@every_class
def test_every_weight_is_read_only(case, scheme):
    model, ledger = converted(case.module(), scheme)
    for row in ledger:
        if row.spec is not None:
            path, _, local = row.name.rpartition(".")
            holder = model.get_submodule(path)
            assert getattr(holder, local).shape == row.shape
            with pytest.raises(ReadOnlyWeightError, match="is quantized"):
                setattr(holder, local, nn.Parameter(torch.zeros(row.shape)))


@every_class
def test_autocast_computes_as_on_the_dequantized_module(case, scheme):
    module, _ = converted(case.module(), scheme)

    def run(each: nn.Module) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return case.run(each)

    expected, output = as_the_original(f"{case} under autocast", run, plain(module), module)
    assert same_outputs(output, expected)


# State dicts, files and changes of dtype.


@every_case
def test_a_file_fills_a_fresh_module_and_one_on_the_meta_device(case, scheme, tmp_path):
    quantizer = EVERYTHING[scheme]()
    quantizer.prepare(case.module())
    module = quantizer.convert()
    assert quantizer.validate().ok
    quantizer.save(tmp_path / "saved.safetensors")
    fresh = fewbits.load(tmp_path / "saved.safetensors", into=case.module(seed=8))
    assert same_tensors(fresh.state_dict(), module.state_dict())
    assert same_outputs(case.run(fresh), case.run(module))
    with torch.device("meta"):
        empty = case.module()
    loaded = fewbits.load(tmp_path / "saved.safetensors", into=empty)
    assert same_tensors(loaded.state_dict(), module.state_dict())
    assert same_outputs(case.run(loaded), case.run(module))


@every_case
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_fills_another_quantized_module(case, scheme, assign):
    module, other = (converted(case.module(seed), scheme)[0] for seed in (7, 8))
    assert not same_tensors(parts(module), parts(other))
    other.load_state_dict(through_torch_save(module.state_dict()), strict=True, assign=assign)
    assert same_tensors(other.state_dict(), module.state_dict())
    assert same_outputs(case.run(other), case.run(module))


MOVES = {
    "half": (lambda module: module.half(), torch.float16),
    "bfloat16": (lambda module: module.bfloat16(), torch.bfloat16),
    "double": (lambda module: module.double(), torch.float64),
    "half, float, bfloat16": (lambda module: module.half().float().to(torch.bfloat16), torch.bfloat16),
    "half and back": (lambda module: module.to(torch.float16).to("cpu", torch.float32), torch.float32),
}


def assert_dtype_changes_nothing_stored(case: AnyCase, scheme: str, move: str) -> None:
    act, dtype = MOVES[move]
    module, _ = converted(case.module(), scheme)
    before = parts(module)
    act(module)
    assert same_tensors(parts(module), before)
    floats = plain(module)
    assert all(parameter.dtype == dtype for parameter in floats.parameters())
    expected, output = as_the_original(f"{case} in {dtype}", lambda each: case.run(each, dtype), floats, module)
    assert same_outputs(output, expected)


@pytest.mark.parametrize(
    ("case", "scheme", "move"),
    [(*some, move) for i, some in enumerate(SOME) for j, move in enumerate(MOVES) if (i + j) % 2],
    ids=str,
)
def test_changes_of_dtype_never_touch_codes_and_scales(case, scheme, move):
    assert_dtype_changes_nothing_stored(case, scheme, move)


@pytest.mark.slow
@pytest.mark.parametrize("move", MOVES)
def test_changes_of_dtype_never_touch_codes_and_scales_of_any_combination(move):
    for case, scheme in ALL:
        with unless_refused():
            assert_dtype_changes_nothing_stored(case, scheme, move)


@schemes_in_turn
def test_dequantize_gives_the_structure_of_the_source(case, scheme):
    source = case.module()
    module, _ = converted(source, scheme)
    before = snapshot(module)
    floats = fewbits.dequantize(module)
    assert fewbits_classes(floats) == []
    assert snapshot(floats).classes == snapshot(source).classes
    assert snapshot(floats).gradients == snapshot(source).gradients
    assert [*floats.state_dict()] == [*source.state_dict()]
    source.load_state_dict(floats.state_dict(), strict=True)
    assert same_outputs(case.run(source.requires_grad_(False)), case.run(module))
    assert snapshot(module).equals(before)
    assert not storages(floats) & storages(module)


# Torch's compilers.


def _compiled(case: AnyCase, backend: str):
    def run(module: nn.Module):
        torch._dynamo.reset()
        return case.run(torch.compile(module, fullgraph=True, backend=backend))

    return run


def _exported(case: AnyCase, strict: bool):
    def run(module: nn.Module):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, case.args, case.kwargs, strict=strict)
        return case.run(program.module())

    return run


COMPILERS = {
    "compile": lambda case: _compiled(case, "eager"),
    "compile, aot": lambda case: _compiled(case, "aot_eager"),
    "export": lambda case: _exported(case, strict=False),
    "strict export": lambda case: _exported(case, strict=True),
}


def assert_comes_through_a_compiler(case: AnyCase, scheme: str, compiler: str) -> None:
    module, _ = converted(case.module(), scheme)
    act = COMPILERS[compiler](case)
    expected, output = as_the_original(f"{compiler} of {case}", act, plain(module), module)
    torch.testing.assert_close(output, expected)


#: Classes whose forward is torch's own, with a weight read in it; those with forwards of ours are in test_modules.py.
COMPILED = [
    (case, scheme)
    for case, scheme in ONE_OF_A_CLASS
    if case.cls
    in {
        nn.Bilinear, nn.LSTMCell, nn.MultiheadAttention, nn.ParameterDict, nn.ParameterList, nn.TransformerEncoderLayer,
        nn.utils.parametrize.ParametrizationList,
    }
]  # fmt: skip


@pytest.mark.parametrize(
    ("compiler", "case", "scheme"),
    [
        pytest.param(compiler, case, scheme, marks=[pytest.mark.slow] * ((i + j) % 2), id=f"{case}-{scheme}-{compiler}")
        for i, compiler in enumerate(COMPILERS)
        for j, (case, scheme) in enumerate(COMPILED)
    ],
)
def test_a_module_comes_through_a_compiler(compiler, case, scheme):
    assert_comes_through_a_compiler(case, scheme, compiler)


@pytest.mark.parametrize("compiler", ["export", "strict export"])
def test_a_recurrent_layer_is_exported(compiler):
    case = next(case for case in ANY_CASES if case.name == "LSTM, layers")
    assert_comes_through_a_compiler(case, "int4", compiler)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
@every_scheme
def test_every_case_comes_through_a_compiler(scheme, compiler):
    for case in QUANTIZABLE:
        with unless_refused():
            assert_comes_through_a_compiler(case, scheme, compiler)


# Any options.


@given(st.data())
def test_recurrent_layers_with_any_options_are_those_of_the_dequantized_module(data):
    draw = data.draw
    cls, layers = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN])), draw(st.integers(1, 3))
    inputs, hidden = draw(st.integers(1, 9)), draw(st.integers(2, 9))
    options = {"proj_size": draw(st.integers(0, hidden - 1))} if cls is nn.LSTM else {}
    options |= {name: draw(st.booleans()) for name in ("bias", "batch_first", "bidirectional")}
    source = quietly(lambda: cls(inputs, hidden, layers, **options))
    module, ledger = converted(source, draw(st.sampled_from(sorted(EVERYTHING))))
    assert_fates(ledger, source)
    case = AnyCase("", cls, lambda: source, (torch.randn(2, 3, inputs),))
    assert same_outputs(case.run(module), case.run(plain(module)))


@given(st.data())
def test_attention_with_any_options_is_that_of_the_dequantized_module(data):
    draw = data.draw
    heads, dims = draw(st.integers(1, 3)), st.one_of(st.none(), st.integers(1, 9))
    embed = heads * draw(st.integers(1, 5))
    options = {name: draw(st.booleans()) for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    source = nn.MultiheadAttention(embed, heads, kdim=draw(dims), vdim=draw(dims), **options).eval()
    module, ledger = converted(source, draw(st.sampled_from(sorted(EVERYTHING))))
    assert_fates(ledger, source)
    keys, values = torch.randn(2, 2, source.kdim), torch.randn(2, 2, source.vdim)
    args = (torch.randn(2, 2, embed), keys, values)
    case = AnyCase("", nn.MultiheadAttention, lambda: source, args, {"need_weights": draw(st.booleans())})
    assert same_outputs(case.run(module), case.run(plain(module)))


# Lazy modules.


LAZY = {
    "Linear": (lambda: nn.LazyLinear(4), torch.randn(2, 6)),
    "Conv2d": (lambda: nn.LazyConv2d(4, 3), torch.randn(1, 3, 5, 5)),
    "inside": (lambda: nn.Sequential(nn.Linear(6, 6), nn.LazyLinear(4)), torch.randn(2, 6)),
}


@pytest.mark.parametrize(("make", "x"), LAZY.values(), ids=LAZY)
def test_a_lazy_module_is_refused_until_it_has_run(make, x):
    source = quietly(make)
    with pytest.raises(SourceError, match=r"weight is not initialized; run the model once"):
        converted(source, "int8")
    with torch.no_grad():
        source(x)
        module, ledger = converted(source, "int8")
        assert_fates(ledger, source)
        assert same_bits(module(x), plain(module)(x))


def test_a_file_does_not_fill_a_lazy_module(tmp_path):
    quantizer = EVERYTHING["int8"]()
    quantizer.prepare(nn.Linear(6, 4))
    quantizer.convert()
    quantizer.save(tmp_path / "saved.safetensors")
    with pytest.raises(fewbits.errors.MismatchError, match="weight is not initialized in the model"):
        fewbits.load(tmp_path / "saved.safetensors", into=quietly(lambda: nn.LazyLinear(4)))
