"""Only plain tensors (dense, with memory) are read or written. Others are refused; the message gives name and class."""

import contextlib
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import fewbits
from fewbits.errors import MismatchError, SourceError
from fewbits.nn.storage import View, overlaps
from support.lifecycle_helpers import as_bytes, mlp, quantize_small, small

pytestmark = [
    # Torch's warnings about its own quantized, nested and sparse tensors.
    pytest.mark.filterwarnings("ignore:.*quantized:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning"),
]


class Wrapper(torch.Tensor):
    """A tensor without memory that wraps another tensor, like those of torchao and FSDP2."""

    @staticmethod
    def __new__(cls, inner):
        wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = tree_map_only(Wrapper, lambda wrapper: wrapper.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, func(*plain[0], **plain[1]))


def ones():
    return torch.ones(4, 8)


def freed():
    tensor = ones()
    tensor.untyped_storage().resize_(0)
    return tensor


def cut_short():
    tensor = ones()
    tensor.untyped_storage().resize_(16)
    return tensor


def fake():
    with FakeTensorMode() as mode:
        return mode.from_tensor(ones())


def out_of_a_transform():
    seen = []

    def total(x):
        seen.append(x)
        return x.sum()

    torch.func.grad(total)(ones())
    return seen[0]


#: Tensors whose bytes cannot be read, by the expected message.
NOT_PLAIN = {
    r"is a \S*\.Wrapper; only plain tensors": lambda: Wrapper(ones()),
    r"is a torch\._subclasses\.fake_tensor\.FakeTensor; .*outside of FakeTensorMode": fake,
    r"is a torch\.nested\._internal\.nested_tensor\.NestedTensor": lambda: torch.nested.nested_tensor(
        [ones(), ones()[:2]], layout=torch.jagged
    ),
    "is a nested tensor": lambda: torch.nested.nested_tensor([ones(), ones()[:2]]),
    r"is quantized already, in torch\.qint8": lambda: torch.quantize_per_tensor(ones(), 0.1, 0, torch.qint8),
    r"is quantized already, in torch\.quint8": lambda: torch.quantize_per_channel(
        ones(), torch.ones(4), torch.zeros(4), 0, torch.quint8
    ),
    r"has layout torch\.sparse_coo": lambda: ones().to_sparse(),
    r"has layout torch\.sparse_csr": lambda: ones().to_sparse_csr(),
    r"has layout torch\._mkldnn": lambda: ones().to_mkldnn(),
    "is on the meta device and has no data": lambda: ones().to("meta"),
    "is not initialized": nn.parameter.UninitializedBuffer,
    "has no memory for its elements": freed,
    "has no memory for its elements, or too little": cut_short,
    "has no memory for its elements, or ": lambda: torch._to_functional_tensor(ones()),
    "has no memory for its elements, or too": out_of_a_transform,
    "has 65 axes; at most 64": lambda: torch.ones((1,) * 65),
    r"is of dtype torch\.uint4": lambda: torch.ones(4, dtype=torch.uint8).view(torch.uint4),
}
#: Messages about tensors that a model must not hold even if a file replaces their values.
KINDS = [words for words in NOT_PLAIN if words.startswith(("is a ", "is quantized", "has layout"))]

not_plain = pytest.mark.parametrize("words", NOT_PLAIN)


@not_plain
def test_an_entry_that_is_not_a_plain_tensor_is_refused_by_name(words):
    with pytest.raises(SourceError, match=f"^odd {words}"):
        quantize_small({"w": torch.rand(8, 8), "odd": NOT_PLAIN[words]()}, "int8")


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
@not_plain
def test_a_buffer_that_is_not_a_plain_tensor_is_refused_by_name(words, inplace):
    model = mlp()
    model[0].register_buffer("odd", NOT_PLAIN[words]())
    with pytest.raises(SourceError, match=rf"^0\.odd {words}"):
        small().prepare(model, inplace=inplace)


def test_a_parameter_that_wraps_another_tensor_is_refused_by_name():
    model = mlp()
    model[2].weight = nn.Parameter(Wrapper(model[2].weight.detach()))
    with pytest.raises(SourceError, match=r"^2\.weight is a .*Wrapper"):
        small().prepare(model)


@pytest.mark.parametrize("words", KINDS)
def test_a_file_is_not_loaded_into_a_model_with_such_a_tensor(words, tmp_path):
    quantize_small(mlp(), "int8").quantizer.save(tmp_path / "m.safetensors")
    model = mlp()
    model[0].register_buffer("odd", NOT_PLAIN[words](), persistent=False)
    with pytest.raises(MismatchError, match=rf"^0\.odd {words}"):
        fewbits.load(tmp_path / "m.safetensors", into=model)


def test_a_file_is_loaded_into_a_model_whose_memory_was_freed(tmp_path):
    quantize_small(mlp(), "int8").quantizer.save(tmp_path / "m.safetensors")
    model = mlp(seed=1)
    for parameter in model.parameters():
        parameter.untyped_storage().resize_(0)
    loaded = fewbits.load(tmp_path / "m.safetensors", into=model)
    assert torch.equal(
        loaded(torch.ones(1, 16)), fewbits.load(tmp_path / "m.safetensors", into=mlp())(torch.ones(1, 16))
    )


# After `prepare`.


@not_plain
def test_a_tensor_replaced_by_one_that_is_not_plain_after_prepare_is_refused_by_name(words):
    quantizer, model = small(), mlp()
    model[0].register_buffer("late", ones())
    prepared = quantizer.prepare(model)
    prepared[0]._buffers["late"] = NOT_PLAIN[words]()
    with pytest.raises(SourceError, match=rf"^0\.late {words}"):
        quantizer.convert()

    quantizer, tensors = small(), {"w": torch.rand(8, 8), "late": ones()}
    quantizer.prepare(tensors)
    tensors["late"] = NOT_PLAIN[words]()
    with pytest.raises(SourceError, match=f"^late {words}"):
        quantizer.convert()


@pytest.mark.parametrize("call", ["validate", "save"])
@not_plain
def test_a_result_whose_tensor_was_replaced_by_one_that_is_not_plain_is_refused_by_name(words, call, tmp_path):
    model = mlp()
    model[0].register_buffer("late", ones())
    for source, name, put in (
        (model, r"0\.late", lambda result, tensor: result[0]._buffers.__setitem__("late", tensor)),
        ({"w": torch.rand(8, 8), "late": ones()}, "late", lambda result, tensor: result.update(late=tensor)),
    ):
        quantizer = small()
        quantizer.prepare(source)
        put(quantizer.convert(), NOT_PLAIN[words]())
        with pytest.raises(SourceError, match=f"^{name} {words}"):
            quantizer.validate() if call == "validate" else quantizer.save(tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_scheme_that_makes_codes_that_are_not_plain_is_refused_by_name():
    class Wrapping(fewbits.Int8PerChannel):
        min_elements = 0

        def quantize_tensor(self, weight, spec, observer):
            value = super().quantize_tensor(weight, spec, observer)
            object.__setattr__(value, "packed", Wrapper(value.packed))
            return value

    quantizer = Wrapping()
    quantizer.prepare({"w": torch.rand(8, 8)})
    with pytest.raises(
        fewbits.errors.NumericsError,
        match=r"^w.*Wrapping\.quantize_tensor returned a QuantizedTensor whose part 'packed' is a ",
    ):
        quantizer.convert()


@pytest.mark.parametrize("call", ["validate", "save"])
def test_codes_replaced_by_a_tensor_that_is_not_plain_are_refused_by_name(call, tmp_path):
    quantizer = small()
    quantizer.prepare({"w": torch.rand(8, 8)})
    value = quantizer.convert()["w"]
    object.__setattr__(value, "packed", Wrapper(value.packed))
    with pytest.raises(SourceError, match=r"^w_packed is a \S*\.Wrapper; only plain tensors"):
        quantizer.validate() if call == "validate" else quantizer.save(tmp_path / "m.safetensors")
    with pytest.raises(SourceError, match=r"^a tensor is a \S*\.Wrapper"):
        value.equal(value)


# Tensors and modules of other quantizing tools.


def of_module(cls, module):
    """A subclass that claims to be defined in another module."""
    return type(cls.__name__, (cls,), {"__module__": module})


TOOLS = {
    "torchao.quantization": "torchao",
    "optimum.quanto.tensor.weights.qbytes": "quanto",
    "bitsandbytes.nn.modules": "bitsandbytes",
    "hqq.core.quantize": "HQQ",
}


@pytest.mark.parametrize(("module", "tool"), TOOLS.items())
@pytest.mark.parametrize("base", [Wrapper, nn.Parameter], ids=["wrapper", "parameter"])
def test_a_tensor_of_a_quantizing_tool_is_refused_with_the_name_of_the_tool(module, tool, base, tmp_path):
    model, cls = mlp(), of_module(base, module)
    model[2].register_parameter("weight", nn.Parameter(cls(ones())) if base is Wrapper else cls(ones()))
    words = f"2.weight is a {cls.__name__} of {tool}: it is quantized already"
    for source in (model, model.state_dict(keep_vars=True)):
        with pytest.raises(SourceError, match=f"^{words}"):
            small().prepare(source)
    quantize_small(mlp(), "int8").quantizer.save(tmp_path / "m.safetensors")
    with pytest.raises(MismatchError, match=f"^{words}"):
        fewbits.load(tmp_path / "m.safetensors", into=model)


@pytest.mark.parametrize(
    ("module", "tool"),
    [
        ("optimum.quanto.nn.qlinear", "quanto"),
        ("hqq.core.quantize", "HQQ"),
        ("torchao.quantization.qat.linear", "torchao"),
        ("torch.ao.nn.quantized.dynamic.modules.linear", "torch.ao"),
        ("torch.ao.nn.qat.modules.linear", "torch.ao"),
        ("torch.ao.quantization.fake_quantize", "torch.ao"),
    ],
)
def test_a_module_of_a_quantizing_tool_is_refused_with_the_name_of_the_tool(module, tool):
    class QLinear(nn.Linear):
        pass

    class Derived(of_module(QLinear, module)):
        pass

    for layer in (of_module(QLinear, module)(8, 8), Derived(8, 8)):
        with pytest.raises(SourceError, match=rf"^1 is a {type(layer).__name__} of {tool}:"):
            small().prepare(nn.Sequential(nn.Linear(8, 8), layer))


FLOAT_MODULES = (
    "torch.ao.nn.quantized.modules.functional_modules",
    "torch.ao.quantization.stubs",
    "bitsandbytes.nn.modules",
)


@pytest.mark.parametrize("module", FLOAT_MODULES)
def test_modules_of_quantizing_tools_that_float_models_contain_are_accepted(module):
    layer = of_module(nn.Linear, module)(8, 8)
    assert quantize_small(layer, "int8").ledger["weight"].fate == "quantized"


def test_a_sharded_model_is_refused_with_advice_to_gather_it():
    wrapper = type("FullyShardedDataParallel", (nn.Sequential,), {})
    wrapper.__module__ = "torch.distributed.fsdp.fully_sharded_data_parallel"
    with pytest.raises(SourceError, match=r"root module is a FullyShardedDataParallel.*get_model_state_dict"):
        small().prepare(wrapper(nn.Linear(8, 8)))


def test_distributed_tensors_are_refused_by_name_and_quantized_once_gathered():
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available():
        pytest.skip("torch was built without torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = mlp()
        for layer in (model[0], model[2]):
            layer.weight = nn.Parameter(DTensor.from_local(layer.weight.detach(), mesh, [Replicate()]))
        for source in (model, model.state_dict()):
            with pytest.raises(SourceError, match=r"^0\.weight is a .*DTensor; .*get_model_state_dict"):
                small().prepare(source)
        gathered = {name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in model.state_dict().items()}
        assert quantize_small(gathered, "int8").ledger.count("quantized") == 2
    finally:
        dist.destroy_process_group()


# Tensors that count as plain.


class Tagged(torch.Tensor):
    """An empty subclass."""


class Stubborn(torch.Tensor):
    """A subclass that raises an error in every torch function."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("a function of torch was called")


@pytest.mark.parametrize("cls", [Tagged, Stubborn])
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
def test_a_subclass_with_plain_memory_is_quantized_like_a_plain_tensor(cls, inplace, tmp_path):
    tensors = {"w": torch.rand(8, 8), "kept": torch.rand(8)}
    expected = quantize_small(dict(tensors), "int8").model
    quantizer = small()
    quantizer.prepare({name: tensor.as_subclass(cls) for name, tensor in tensors.items()}, inplace=inplace)
    model = quantizer.convert()
    assert quantizer.validate().ok
    assert model["w"].equal(expected["w"])
    quantizer.save(tmp_path / "m.safetensors")
    assert torch.equal(fewbits.load(tmp_path / "m.safetensors")["kept"], tensors["kept"])


@pytest.mark.parametrize("words", NOT_PLAIN)
def test_an_attribute_of_a_module_may_be_any_tensor(words):
    model = mlp()
    model[0].__dict__["beside"] = [NOT_PLAIN[words](), ones().as_subclass(Stubborn)]
    assert quantize_small(model, "int8", inplace=True, validate=False).ledger.count("quantized") == 2


def test_a_buffer_of_torchs_own_class_for_buffers_is_kept():
    model = mlp()
    model[0].extra = nn.Buffer(torch.arange(4.0))
    result = quantize_small(model, "int8")
    assert result.ledger["0.extra"].fate == "kept"
    assert torch.equal(result.model[0].extra, model[0].extra)


class MadeAnew(Mapping):
    """A mapping that makes a new tensor on each access."""

    def __init__(self, tensors):
        self.tensors = tensors

    def __getitem__(self, name):
        return self.tensors[name].clone()

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


@pytest.mark.parametrize("shape", [(8, 8), (0, 8)])
def test_tensors_that_a_mapping_makes_on_access_are_not_tied(shape):
    tensors = MadeAnew({"w": torch.rand(8, 8)} | {f"t{index}": torch.rand(shape) for index in range(20)})
    assert quantize_small(tensors, "int8").ledger.count("alias") == 0


PLAIN = ("plain", "tie", "same", "subclass", "empty")


@st.composite
def assorted(draw):
    """Tensors of all kinds by name, the names of those that are not plain, and each plain tensor's first name."""
    tensors, odd, first = {}, [], {}
    kinds = st.sampled_from(PLAIN) | st.sampled_from([*NOT_PLAIN]) if draw(st.booleans()) else st.sampled_from(PLAIN)
    for index, kind in enumerate(draw(st.lists(kinds, min_size=1, max_size=6))):
        name = f"t{index}"
        others = [other for other in first if other == first[other] and tensors[other].numel()]
        if kind in NOT_PLAIN:
            tensors[name] = NOT_PLAIN[kind]()
            odd.append(name)
        elif kind in ("tie", "same") and others:
            first[name] = draw(st.sampled_from(others))
            tensors[name] = tensors[first[name]] if kind == "same" else tensors[first[name]].detach()
        else:
            tensor = torch.rand(0, 4) if kind == "empty" else torch.rand(8, 8)
            tensors[name] = tensor.as_subclass(Tagged) if kind == "subclass" else tensor
            first[name] = name
    return tensors, odd, first


@given(assorted())
def test_a_mapping_is_refused_by_name_or_every_tensor_in_it_is_accounted_for(given_tensors):
    tensors, odd, first = given_tensors
    tensors["w"] = torch.rand(8, 8)
    if odd:
        with pytest.raises(SourceError, match=f"^{odd[0]} "):
            quantize_small(tensors, "int8")
        return
    result = quantize_small(tensors, "int8")
    assert {row.name for row in result.ledger} == tensors.keys() == result.model.keys()
    assert {row.name: row.alias_of or row.name for row in result.ledger} == {**first, "w": "w"}
    assert result.ledger.bytes_before == sum(tensors[name].nbytes for name in {*first.values(), "w"})


@given(st.lists(st.sampled_from(["meta", "empty", "freed", "plain"]), min_size=2, max_size=6))
def test_tensors_without_memory_are_not_tied_and_do_not_overlap(kinds):
    make = {"meta": lambda: ones().to("meta"), "empty": lambda: torch.ones(0, 8), "freed": freed, "plain": ones}
    tensors = {f"t{index}": make[kind]() for index, kind in enumerate(kinds)}
    assert len({View.of(tensor) for tensor in tensors.values()}) == len(tensors)
    assert overlaps({name: View.of(tensor) for name, tensor in tensors.items()}) == {}


# Global settings of torch.


@contextlib.contextmanager
def default(setter, value, before):
    setter(value)
    try:
        yield
    finally:
        setter(before)


SETTINGS = {
    "torch.device('meta')": lambda: torch.device("meta"),
    "default device meta": lambda: default(torch.set_default_device, "meta", None),
    "default dtype float64": lambda: default(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bfloat16": lambda: default(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("scheme", ["int8", "fp16"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_results_do_not_depend_on_the_settings_of_torch(setting, scheme, tmp_path):
    model = mlp()
    for source in (model, model.state_dict()):
        expected, found = tmp_path / "expected.safetensors", tmp_path / "found.safetensors"
        quantize_small(source, scheme).quantizer.save(expected)
        into = mlp(seed=1)
        with SETTINGS[setting]():
            quantize_small(source, scheme).quantizer.save(found)
            assert fewbits.verify(found, source).ok
            fewbits.load(found, into=into)
        assert found.read_bytes() == expected.read_bytes()
        loaded = zip(into.state_dict().values(), fewbits.load(expected, into=mlp()).state_dict().values(), strict=True)
        assert all(as_bytes(a) == as_bytes(b) for a, b in loaded)
