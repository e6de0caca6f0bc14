"""Modules that people write: each is quantized and computes as its dequantized form, or is kept with a reason."""

import contextlib
import copy
import functools
import itertools
import threading
import warnings

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fewbits
from fewbits.errors import ReadOnlyWeightError, SourceError
from fewbits.nn.packed import PackedWeight
from fewbits.nn.stored import StoredWeight
from nn.any_cases import EVERYTHING, converted, plain, quietly
from nn.any_modules import MODULES, Bare, Final, OverState, Reducing, Residual, X, matrix
from nn.cases import fewbits_classes, in_turn, pickled, same_bits, snapshot, storages, through_torch_save

pytestmark = pytest.mark.usefixtures("reference_only")

every_scheme = pytest.mark.parametrize("scheme", EVERYTHING)
either_place = pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])

#: Reasons to keep the parameters of a module.
KEPT = {
    "final": {"matrix": "Final cannot be subclassed"},
    "sequential with a matrix": {"matrix": "WithSequential is a container"},
    "list with a matrix": {"matrix": "WithList is a container"},
    "dict with a matrix": {"matrix": "WithDict is a container"},
    "over its parameters": dict.fromkeys(("first", "second"), "OverParameters.forward goes through its parameters"),
}

#: Modules whose output does not depend on their input smoothly, or that torch cannot differentiate.
WITHOUT_GRADIENTS = {"embedding of its own", "another module's weight"}

every_module = pytest.mark.parametrize("name", MODULES)


@contextlib.contextmanager
def no_grad_in_eval():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build(name: str, seed: int = 0) -> nn.Module:
    with torch.no_grad():  # torch cannot copy a module whose weight has been computed with gradients
        return quietly(MODULES[name], seed).eval()


def run(model: nn.Module, x: Tensor = X) -> Tensor:
    with no_grad_in_eval():
        return model(x)


def quantize(name: str, scheme: str = "int8", **options) -> tuple[nn.Module, fewbits.Ledger]:
    with no_grad_in_eval():
        return converted(build(name), scheme, **options)


@pytest.mark.parametrize(("name", "way"), in_turn(list(MODULES), itertools.product([False, True], EVERYTHING)))
def test_it_computes_as_its_dequantized_form(name, way):
    inplace, scheme = way
    model, ledger = quantize(name, scheme, inplace=inplace)
    expected = run(plain(model))
    assert same_bits(run(model), expected)
    assert same_bits(run(model), expected), "a forward has changed the module"
    assert ledger.count("quantized") + ledger.count("cast") > 0


@every_module
def test_whatever_can_be_quantized_is(name):
    source = build(name)
    _, ledger = quantize(name)
    reasons = KEPT.get(name, {})
    for row in ledger:
        if row.fate == "kept" and len(row.shape) >= 2:
            known = reasons.get(row.name, "a buffer" if row.name in dict(source.named_buffers()) else "a bias")
            assert known in row.reason, row


@every_module
def test_the_source_is_untouched(name):
    source = build(name)
    before = snapshot(source)
    with no_grad_in_eval():
        model, _ = converted(source, "int4")
    run(model)
    assert snapshot(source).equals(before)
    assert not storages(source) & storages(model)
    assert same_bits(run(source), run(build(name)))


@every_module
def test_dequantize_gives_what_it_was_made_from(name):
    source = build(name)
    floats = fewbits.dequantize(quantize(name)[0])
    assert [n for n, _ in floats.named_modules()] == [n for n, _ in source.named_modules()]
    assert fewbits_classes(floats) == []
    assert {n: p.shape for n, p in floats.named_parameters()} == {n: p.shape for n, p in source.named_parameters()}
    assert list(floats.state_dict()) == list(source.state_dict())


@pytest.mark.parametrize(("name", "scheme"), in_turn(list(MODULES), EVERYTHING))
def test_a_file_fills_a_fresh_one(name, scheme, tmp_path):
    quantizer = EVERYTHING[scheme]()
    with no_grad_in_eval():
        quantizer.prepare(build(name))
        model = quantizer.convert()
        assert quantizer.validate().ok
        quantizer.save(tmp_path / "saved.safetensors")
    other = fewbits.load(tmp_path / "saved.safetensors", into=build(name, seed=1))
    assert same_bits(run(other), run(model))


@every_module
def test_a_state_dict_fills_another(name):
    model, _ = quantize(name)
    with no_grad_in_eval():
        other, _ = converted(build(name, seed=1), "int8")
    other.load_state_dict(through_torch_save(model.state_dict()), strict=True)
    assert same_bits(run(other), run(model))


@every_module
@pytest.mark.parametrize("way", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_it_is_copied_and_pickled_if_its_original_is(name, way):
    try:
        way(build(name))
    except Exception as error:
        pytest.skip(f"{name}: torch refuses it: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    model, _ = quantize(name)
    expected = run(model)
    arrived = way(model)
    assert type(arrived).__name__ == type(model).__name__
    assert same_bits(run(arrived), expected)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (i % 5 > 0)) for i, name in enumerate(MODULES)]
)
def test_torch_compiles_it(name):
    torch._dynamo.reset()
    model, _ = quantize(name)
    expected = run(model)
    torch.testing.assert_close(run(torch.compile(model, backend="eager")), expected)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in WITHOUT_GRADIENTS])
def test_gradients_reach_the_input(name):
    model, _ = quantize(name)
    gradients = []
    for each in (model.requires_grad_(False), plain(model)):
        x = X.clone().requires_grad_()
        each(x).float().square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@every_module
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_it_computes_in_other_dtypes_as_its_dequantized_form(name, dtype):
    model, _ = quantize(name)
    state = {key: part.clone() for key, part in model.state_dict().items() if key.endswith(("_packed", "_scale"))}
    model.to(dtype)
    assert all(same_bits(model.state_dict()[key], part) for key, part in state.items())
    floats = plain(model)
    with contextlib.suppress(RuntimeError):  # a quantized layer may cast dtypes that torch refuses to mix
        expected = run(floats, X.to(dtype))
        assert same_bits(run(model, X.to(dtype)), expected)


@every_module
def test_autocast_computes_as_on_its_dequantized_form(name):
    model, _ = quantize(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(run(model), run(plain(model)))


# Reading weights.


@pytest.fixture
def decoded(monkeypatch) -> list[StoredWeight]:
    """Record each stored weight whenever it is dequantized."""
    calls: list[StoredWeight] = []
    dequantize = PackedWeight.dequantize

    def counted(self, dtype=None):
        calls.append(self)
        return dequantize(self, dtype)

    monkeypatch.setattr(PackedWeight, "dequantize", counted)
    return calls


class Greedy(nn.Module):
    """Reads its matrix often, and one of a child."""

    def __init__(self, unused=False):
        super().__init__()
        self.matrix, self.other, self.child = matrix(), matrix(), Bare()
        self.fails = False

    def forward(self, x):
        for _ in range(5):
            x = x @ self.matrix + self.matrix.sum() + self.child(x)
        if self.fails:
            raise RuntimeError("no")
        return x @ self.child.matrix


def test_a_forward_dequantizes_a_weight_once_however_often_it_is_read(decoded):
    model, _ = converted(Greedy(), "int8")
    model(X)
    assert [stored is model.matrix_stored for stored in decoded].count(True) == 1
    assert [stored is model.other_stored for stored in decoded].count(True) == 0, (
        "a weight that is not read is not dequantized"
    )
    assert [stored is model.child.matrix_stored for stored in decoded].count(True) == 5 + 1


def test_the_next_forward_and_every_reading_outside_dequantize_anew(decoded):
    model, _ = converted(Greedy(), "int8")
    for calls in (1, 2):
        model(X)
        assert decoded.count(model.matrix_stored) == calls
    first, second = model.matrix, model.matrix
    assert decoded.count(model.matrix_stored) == 4
    assert first.data_ptr() != second.data_ptr()


def test_a_forward_that_fails_leaves_nothing_behind(decoded):
    model, _ = converted(Greedy(), "int8")
    model.fails = True
    with pytest.raises(RuntimeError, match="no"):
        model(X)
    before = len(decoded)
    assert model.matrix.data_ptr() != model.matrix.data_ptr()
    assert len(decoded) == before + 2


def test_a_forward_sees_what_was_loaded_since_the_last(decoded):
    model, other = (converted(quietly(Bare, seed), "int8")[0] for seed in (0, 1))
    model(X)
    model.load_state_dict(other.state_dict())
    assert same_bits(run(model), run(other))


def test_attention_dequantizes_each_projection_once(decoded):
    model, _ = converted(nn.MultiheadAttention(8, 2, batch_first=True).eval(), "int8")
    run(lambda x: model(x[None], x[None], x[None])[0])
    assert len(decoded) == 2


def test_threads_that_run_one_module_at_once_get_what_one_gets():
    model, _ = converted(quietly(Greedy), "int4")
    inputs = [X * i for i in range(8)]
    expected = [run(model, x) for x in inputs]
    outputs: list[list[Tensor]] = [[] for _ in inputs]
    barrier = threading.Barrier(len(inputs))

    def work(i: int) -> None:
        barrier.wait()
        outputs[i].extend(run(model, inputs[i]) for _ in range(20))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, theirs in zip(outputs, expected, strict=True):
        assert len(mine) == 20
        assert all(same_bits(output, theirs) for output in mine)


def test_a_recomputed_forward_gives_the_same_gradient():
    model, _ = converted(quietly(Greedy), "int8")
    gradients = []
    for checkpointed in (False, True):
        x = X.clone().requires_grad_()
        output = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        output.square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


# Assigning weights.


@pytest.mark.parametrize("value", [torch.zeros(8, 8), nn.Parameter(torch.zeros(8, 8)), None, nn.Linear(8, 8)], ids=type)
def test_assigning_to_a_quantized_parameter_is_an_error_and_changes_nothing(value):
    model, _ = converted(quietly(Bare), "int8")
    expected = run(model)
    with pytest.raises(ReadOnlyWeightError, match=r"QuantizedBare\.matrix is quantized"):
        model.matrix = value
    with pytest.raises(ReadOnlyWeightError):
        model.matrix = value
    assert same_bits(run(model), expected)


def test_what_was_kept_can_be_assigned_and_trained():
    model, _ = converted(quietly(Bare), "int8")
    assert list(dict(model.named_parameters())) == ["gain"]
    model(X).sum().backward()
    assert model.gain.grad is not None
    model.gain = nn.Parameter(torch.zeros(8))
    assert not run(model).any()
    model.new = nn.Parameter(torch.ones(2))
    assert "new" in dict(model.named_parameters())


def test_an_attribute_that_is_not_there_is_an_error_as_before():
    model, _ = converted(Bare(), "int8")
    assert not hasattr(model, "absent")
    with pytest.raises(AttributeError, match="'QuantizedBare' object has no attribute 'absent'"):
        _ = model.absent


# Torch's functional forms.


def test_functional_call_runs_with_other_parameters_and_refuses_other_weights():
    model, _ = converted(quietly(Bare), "int8")
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        assert same_bits(torch.func.functional_call(model, state, (X,)), model(X))
        doubled = torch.func.functional_call(model, {"gain": model.gain * 2}, (X,))
        assert same_bits(doubled, model(X) * 2)
        with pytest.raises(ReadOnlyWeightError):
            torch.func.functional_call(model, {"matrix": torch.zeros(8, 8)}, (X,))
        assert same_bits(run(model), run(plain(model)))


@every_scheme
def test_vmap_gives_what_a_batch_gives(scheme):
    model, _ = converted(quietly(Residual), scheme)
    batch = torch.stack([X, X + 1])
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(model)(batch), torch.stack([model(x) for x in batch]))


def test_jacobians_are_those_of_the_dequantized_module():
    model, _ = converted(quietly(Bare), "int8")
    torch.testing.assert_close(torch.func.jacrev(model)(X), torch.func.jacrev(plain(model))(X))


# Hooks.


@either_place
def test_hooks_of_all_kinds_are_kept_and_run(inplace):
    source, calls = quietly(Residual), []
    for module, name in ((source, "root"), (source.inner, "inner")):
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(f"before {name}"))
        module.register_forward_hook(lambda *_, name=name: calls.append(f"after {name}"))
        module.register_full_backward_hook(lambda *_, name=name: calls.append(f"backward {name}"))
        module.register_state_dict_post_hook(lambda *_, name=name: calls.append(f"state {name}"))
    model, _ = converted(source, "int8", inplace=inplace)
    calls.clear()
    model(X.clone().requires_grad_()).sum().backward()
    assert calls[:4] == ["before root", "before inner", "after inner", "after root"]
    assert sorted(calls[4:]) == ["backward inner", "backward root"]
    calls.clear()
    model.state_dict()
    assert set(calls) == {"state root", "state inner"}


def test_a_hook_may_read_the_weight():
    source, seen = Bare(), []
    source.register_forward_hook(lambda module, *_: seen.append(module.matrix))
    model, _ = converted(source, "int8")
    model(X)
    assert same_bits(seen[0], plain(model).matrix.detach())


# Layouts.


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("transposed experts", {"weight": (4 * 40, 8), "down": (4 * 8, 40)}),
        ("experts", {"weight": (4 * 8, 40), "down": (4 * 40, 8)}),
    ],
)
def test_experts_are_cut_as_they_say(name, shapes):
    _, ledger = quantize(name, "int4")
    assert {row.name: row.layout.matrix_shape for row in ledger} == shapes
    assert all("cut by its shape" not in row.reason for row in ledger)


def test_what_is_cut_by_its_shape_alone_says_so():
    class Cube(nn.Module):
        def __init__(self):
            super().__init__()
            self.cube, self.matrix = matrix(2, 8, 64), matrix()

    _, ledger = converted(Cube(), "int4")
    assert "cut by its shape, which input_axes can correct" in ledger["cube"].reason
    assert "cut by its shape" not in ledger["matrix"].reason


# Tied and untied.


def test_a_parameter_of_several_classes_is_stored_once():
    model, ledger = quantize("tied across classes")
    assert model[0].weight_stored is model[1].matrix_stored is model[2].weight_stored
    assert [row.fate for row in ledger if row.name.endswith(("weight", "matrix"))] == ["quantized", "alias", "alias"]
    floats = fewbits.dequantize(model)
    assert floats[0].weight is floats[1].matrix is floats[2].weight


def test_two_names_in_one_module_share_one_weight():
    source = Bare()
    source.again = source.matrix
    model, ledger = converted(source, "int8")
    assert ledger["again"].alias_of == "matrix"
    assert model.again_stored is model.matrix_stored
    assert copy.deepcopy(model).again_stored is not model.matrix_stored
    floats = fewbits.dequantize(model)
    assert floats.again is floats.matrix


def test_equal_tensors_in_memory_of_their_own_stay_separate(tmp_path):
    source = nn.ModuleList([Bare(), Bare()])
    source[1].matrix.data.copy_(source[0].matrix.data)
    model, ledger = converted(source, "int8")
    assert ledger.count("alias") == 0
    assert model[0].matrix_stored is not model[1].matrix_stored
    assert not storages(model[0]) & storages(model[1])
    model[0].load_state_dict(converted(Bare(), "int8")[0].state_dict())
    assert not same_bits(model[0].matrix, model[1].matrix)


def test_views_that_overlap_are_kept_with_a_reason():
    source, memory = nn.ModuleList([Bare(), Bare(), Bare()]), torch.randn(12, 8)
    source[0].matrix, source[1].matrix = nn.Parameter(memory[:8]), nn.Parameter(memory[4:])
    model, ledger = converted(source, "int8")
    assert [ledger[f"{i}.matrix"].fate for i in range(3)] == ["kept", "kept", "quantized"]
    assert "its memory overlaps that of 0.matrix" in ledger["1.matrix"].reason
    assert same_bits(run(model[1]), run(source[1]))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.sampled_from(sorted(EVERYTHING)), st.booleans())
def test_parameters_are_tied_after_as_they_were_before(groups, scheme, inplace):
    """Whoever shares a parameter before shares a stored weight after, and a parameter when it is float again."""
    weights = {group: matrix(4, 4) for group in set(groups)}
    source = nn.ModuleList([Bare() for _ in groups])
    for module, group in zip(source, groups, strict=True):
        module.matrix = weights[group]
    model, ledger = converted(source, scheme, inplace=inplace)
    floats = fewbits.dequantize(copy.deepcopy(model))
    for i, first in enumerate(groups):
        for j, second in enumerate(groups):
            tied = first == second
            assert (model[i].matrix_stored is model[j].matrix_stored) == tied
            assert (floats[i].matrix is floats[j].matrix) == tied
    assert ledger.count("alias") == len(groups) - len(weights)


@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    scheme=st.sampled_from(sorted(EVERYTHING)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    name=st.sampled_from(["w", "weight", "W_0", "_hidden", "stored", "packed", "bias_free"]),
)
def test_a_parameter_of_any_shape_and_name_reads_as_its_dequantized_form(shape, scheme, dtype, name):
    source = nn.ModuleDict({"odd": Bare(), "linear": nn.Linear(4, 4, dtype=dtype)})
    source["odd"].register_parameter(name, nn.Parameter(torch.randn(shape, dtype=dtype)))
    model, ledger = converted(source, scheme)
    row = ledger[f"odd.{name}"]
    assert (row.spec is not None) == (len(shape) >= 2 and not name.startswith("bias"))
    read = getattr(model["odd"], name).detach()
    assert (read.shape, read.dtype) == (torch.Size(shape), dtype)
    assert same_bits(read, getattr(fewbits.dequantize(model)["odd"], name).detach())


# Parameters that cannot be quantized, and the reasons.


def _refusals():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.matrix_stored = matrix(), nn.Linear(8, 8)

    class Strict(nn.Module):
        def __init_subclass__(cls, *, name):
            super().__init_subclass__()

    class Own(nn.Parameter):
        pass

    def strict():
        module = Strict()
        module.matrix = matrix()
        return module

    def with_parameter(parameter):
        module = nn.Module()
        module.matrix = parameter
        return module

    def held(where):
        module = Bare()
        module.held = where(module.matrix)
        return module

    def scripted():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.script(nn.Linear(8, 8))

    yield "final", Final, "matrix", "Final cannot be subclassed"
    yield "subclassed with arguments", strict, "matrix", "Strict cannot be subclassed"
    yield "a child of that name", Named, "matrix", "it has an attribute matrix_stored"
    yield "a parameter of its own class", lambda: with_parameter(Own(torch.randn(8, 8))), "matrix", "it is a Own, not"
    yield "TorchScript", scripted, "weight", "TorchScript"
    yield "held in a list", lambda: held(lambda w: [w]), "matrix", "held holds it too"
    yield "held in a dict", lambda: held(lambda w: {"w": w}), "matrix", "held holds it too"
    yield "held in a tuple in a dict", lambda: held(lambda w: {"w": (w, 1)}), "matrix", "held holds it too"
    yield "held in a key", lambda: held(lambda w: {w: 1}), "matrix", "held holds it too"
    yield "integers", lambda: with_parameter(nn.Parameter(torch.ones(8, 8).long(), False)), "matrix", "int64"
    yield "complex", lambda: with_parameter(nn.Parameter(torch.ones(8, 8) * 1j)), "matrix", "complex64"
    yield "nothing in it", lambda: with_parameter(nn.Parameter(torch.ones(0, 8))), "matrix", "it has no elements"


REFUSALS = {name: rest for name, *rest in _refusals()}


@pytest.mark.parametrize(("make", "parameter", "reason"), REFUSALS.values(), ids=REFUSALS)
@either_place
def test_what_cannot_be_quantized_is_kept_with_a_reason_and_all_beside_it_is(make, parameter, reason, inplace):
    source = nn.ModuleDict({"odd": make(), "linear": nn.Linear(8, 8)})
    weight = source["odd"].state_dict()[parameter].clone()
    model, ledger = converted(source, "int8", inplace=inplace)
    row = ledger[f"odd.{parameter}"]
    assert (row.fate, ledger["linear.weight"].fate) == ("kept", "quantized")
    assert reason in row.reason
    assert torch.equal(model["odd"].state_dict()[parameter], weight)


def test_the_root_may_be_what_cannot_be_quantized():
    with pytest.raises(SourceError, match="the model is a TorchScript module"):
        converted(REFUSALS["TorchScript"][0](), "int8")


@pytest.mark.parametrize("where", ["in the module", "in another"])
def test_a_parameter_that_another_attribute_holds_too_is_kept_and_named(where):
    source = nn.ModuleDict({"a": Bare(), "b": Bare()})
    holder = source["a" if where == "in the module" else "b"]
    holder.groups = [{"params": [source["a"].matrix]}]
    model, ledger = converted(source, "int8")
    holder_name = "a" if where == "in the module" else "b"
    assert f"{holder_name}.groups holds it too" in ledger["a.matrix"].reason
    assert ledger["b.matrix"].fate == "quantized"
    assert model[holder_name].groups[0]["params"][0] is model["a"].matrix


def test_a_reference_that_cannot_be_seen_is_an_error_in_convert():
    class Hidden:
        def __init__(self, weight):
            self.weight = weight

    source = Bare()
    source.hidden = Hidden(source.matrix)
    quantizer = EVERYTHING["int8"]()
    quantizer.prepare(source)
    with pytest.raises(SourceError, match="something in the model refers to matrix"):
        quantizer.convert()


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), Bare, lambda: nn.Sequential(Bare(), nn.Linear(8, 8))])
def test_a_model_on_the_meta_device_is_refused_with_a_reason(make):
    with torch.device("meta"):
        source = make()
    with pytest.raises(SourceError, match="is on the meta device and has no data"):
        converted(source, "int8")


def test_two_tensors_that_would_have_one_name_are_refused_in_prepare():
    source = Bare()
    source.matrix_scale = nn.Parameter(torch.ones(8))
    with pytest.raises(fewbits.errors.FormatError, match="matrix_scale"):
        EVERYTHING["int8"]().prepare(source)


@pytest.mark.parametrize("replace", [lambda old: lambda x: old(x) + 1, lambda old: functools.partial(_plus_one, old)])
@either_place
def test_a_forward_replaced_on_the_instance_uses_the_quantized_weight_or_is_refused(replace, inplace):
    source = quietly(Bare)
    source.forward = replace(source.forward)
    model = nn.Sequential(source, nn.Linear(8, 8))
    if not inplace and not isinstance(source.forward, functools.partial):
        with pytest.raises(SourceError, match=r"0\.forward is a function that is set on the instance"):
            converted(model, "int8")
        return
    model, _ = converted(model, "int8", inplace=inplace)
    with torch.no_grad():
        assert same_bits(model[0](X), X @ model[0].matrix * model[0].gain + 1)


def _plus_one(forward, x):
    return forward(x) + 1


def test_a_module_that_makes_itself_anew_is_refused_where_it_would_lose_its_codes():
    """Its `__reduce__` knows of a float weight alone: copies and pickles fail, aloud."""
    model, _ = converted(quietly(lambda: Reducing(8, 8)), "int8", inplace=True)
    assert torch.isfinite(run(model)).all()
    for way in (copy.deepcopy, pickled):
        with pytest.raises(RuntimeError, match="weight"):
            way(model)
    with pytest.raises(SourceError, match="cannot be copied"):
        fewbits.dequantize(model)


def test_a_module_that_reads_where_torch_keeps_parameters_is_kept():
    _, ledger = converted(nn.Sequential(OverState(), nn.Linear(8, 8)), "int8")
    assert "OverState.forward goes through its parameters" in ledger["0.matrix"].reason


def test_a_plain_module_that_only_holds_parameters_is_quantized():
    source = nn.Module()
    source.layer = nn.Module()
    source.layer.matrix = matrix()
    model, ledger = converted(source, "int8")
    assert ledger["layer.matrix"].fate == "quantized"
    assert same_bits(model.layer.matrix, fewbits.dequantize(model).layer.matrix.detach())
    assert type(fewbits.dequantize(model).layer) is nn.Module
