"""Buffers through a result: caches that a forward grows, buffers on the meta device, codes for buffers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits.checkpoint.reading import Checkpoint
from fewbits.errors import ArgumentError, MismatchError, SourceError
from fewbits.nn.base import QuantizedModule
from fewbits.nn.walk import slots
from nn.cases import same_bits, same_state, seeded, snapshot, tensors_in


class Growing(nn.Module):
    """A layer whose forward has three caches: one grows, one appears, one is given up."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("cache", torch.ones(1), persistent=False)
        self.register_buffer("late", None, persistent=False)
        self.register_buffer("early", torch.ones(3), persistent=False)
        self.again = nn.ParameterDict()
        self.again.register_buffer("cache", self.cache, persistent=False)

    def forward(self, x):
        if len(x) > len(self.cache):
            self.cache = torch.arange(1.0, len(x) + 1)
            self.late = self.cache * 2
            self.early = None
        return self.linear(x) * self.cache[: len(x), None]


def on_meta(make) -> nn.Module:
    with torch.device("meta"):
        return make()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def held(model: nn.Module) -> list[object]:
    """The tensor objects and classes of a model, on the meta device too."""
    return [*((slot.name, id(slot.tensor)) for slot in slots(model)), *map(type, model.modules())]


def calibrated(model, path, *, rows=7, inplace=False):
    """Static inputs: the forward is run between `prepare` and `convert`, and again on the result before it is saved."""
    quantizer = fewbits.Int8PerChannel(activations="static", selector=fewbits.LayerSelector(min_elements=0))
    quantizer.prepare(model, inplace=inplace)
    quantizer.observe([torch.randn(rows, 8)])
    result = quantizer.convert()
    result(torch.randn(rows + 2, 8))
    report = quantizer.validate()
    quantizer.save(path)
    return result, report


def stored_as(scheme):
    """Schemes that take everything; one rounds inputs too, which no buffer has."""
    selector = fewbits.LayerSelector(min_elements=0)
    return {
        "int8": lambda: fewbits.Int8PerChannel(selector=selector),
        "int8-dynamic": lambda: fewbits.Int8PerChannel(activations="dynamic", selector=selector),
        "int4": lambda: fewbits.Int4Grouped(selector=selector, symmetric=False),
        "fp16": lambda: fewbits.FP16Cast(selector=selector),
    }[scheme]()


def saved(state, scheme, path) -> None:
    quantizer = stored_as(scheme)
    quantizer.prepare(state)
    quantizer.convert()
    quantizer.save(path)


# Caches.


@pytest.mark.parametrize("inplace", [False, True])
def test_a_forward_may_grow_add_and_remove_non_persistent_buffers_while_it_is_observed(path, inplace):
    result, report = calibrated(seeded(Growing), path, inplace=inplace)
    assert report.ok
    assert result.cache.shape == (9,)
    held = fewbits.load(path)
    assert {name: tuple(held[name].shape) for name in ("cache", "again.cache", "early")} == {
        "cache": (1,), "again.cache": (1,), "early": (3,),
    }  # fmt: skip


@settings(max_examples=20)
@given(rows=st.integers(1, 12), before=st.integers(0, 12))
def test_predicted_bytes_are_written_bytes_whatever_a_cache_grows_to(rows, before, tmp_path_factory):
    path = tmp_path_factory.mktemp("grown") / "model.safetensors"
    source = seeded(Growing)
    if before:
        source(torch.randn(before, 8))
    calibrated(source, path, rows=rows)
    checkpoint = Checkpoint(path)
    assert checkpoint.ledger["cache"].shape == (max(before, 1),)
    assert checkpoint.nbytes == checkpoint.ledger.bytes_after


@pytest.mark.parametrize("before", [0, 7])
@pytest.mark.parametrize("place", ["fresh", "meta"])
def test_a_file_loads_into_a_model_whose_cache_has_another_length(before, place, path):
    source = seeded(Growing)
    if before:
        source(torch.randn(before, 8))
    result, _ = calibrated(source, path, rows=5)
    into = on_meta(Growing) if place == "meta" else seeded(Growing, 1)
    own = into.cache
    # The source gave up `early` in its first forward, so the file may lack it.
    loaded = fewbits.load(path, into=into, init_buffers=lambda module: module.early.fill_(1))
    assert not any(tensor.is_meta for tensor in tensors_in(loaded))
    if place == "fresh" and before:
        assert same_bits(loaded.cache, own)
    x = torch.randn(9, 8)
    assert same_bits(loaded(x), result(x))


def test_the_cache_of_a_model_on_the_meta_device_is_that_of_the_file(path):
    source = seeded(Growing)
    source(torch.randn(7, 8))
    calibrated(source, path)
    into = on_meta(Growing)
    del into.early
    loaded = fewbits.load(path, into=into)
    assert torch.equal(loaded.cache, torch.arange(1.0, 8))


def test_a_non_persistent_buffer_named_by_ignore_stays_as_the_model_made_it(path):
    calibrated(seeded(Growing), path)
    into = seeded(Growing, 1)
    into.early += 1
    assert fewbits.load(path, into=into, ignore=["early"]).early.tolist() == [2, 2, 2]
    assert fewbits.load(path, into=seeded(Growing, 1)).early.tolist() == [1, 1, 1]


def test_a_model_may_lack_a_non_persistent_buffer_of_the_file(path):
    calibrated(seeded(Growing), path)
    into = seeded(Growing, 1)
    del into.early
    fewbits.load(path, into=into)
    assert not hasattr(into, "early")


def test_a_persistent_buffer_that_changes_its_shape_is_still_refused():
    model = seeded(Growing)
    model._non_persistent_buffers_set.remove("cache")
    quantizer = stored_as("int8")
    quantizer.prepare(model)(torch.randn(7, 8))
    with pytest.raises(SourceError, match=r"cache was float32 of shape \(1,\) when it was prepared"):
        quantizer.convert()


def test_a_persistent_buffer_that_appears_is_still_refused():
    quantizer = stored_as("int8")
    quantizer.prepare(seeded(Growing)).register_buffer("more", torch.ones(2))
    with pytest.raises(SourceError, match="gained or lost more"):
        quantizer.convert()


# Codes for buffers.


class Tables(nn.Module):
    """Buffers that look like weights, in a file; one of them is the very tensor of a parameter."""

    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64, dtype=dtype)
        self.register_buffer("matrix", torch.randn(64, 64, dtype=dtype))
        self.register_buffer("kernel", torch.randn(16, 8, 3, 3, dtype=dtype))
        self.register_buffer("row", torch.randn(1, 4096, dtype=dtype))
        self.register_buffer("same", self.matrix)

    def forward(self, x):
        return self.linear(x) @ self.matrix + self.kernel.sum() + self.row[0, :64]


@pytest.mark.parametrize(
    ("place", "device", "dtype"),
    [("fresh", None, torch.float32), ("meta", None, torch.float64), ("meta", "cpu", torch.float32)],
)
@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int4", "fp16"])
def test_a_buffer_that_a_file_has_as_codes_is_dequantized_into_the_model(scheme, place, device, dtype, path):
    saved(dict(seeded(lambda: Tables(dtype)).state_dict()), scheme, path)
    assert {"matrix", "kernel", "row"} <= {row.name for row in Checkpoint(path).ledger if row.spec is not None}
    stored = fewbits.load(path)
    loaded = fewbits.load(path, into=on_meta(Tables) if place == "meta" else seeded(Tables, 1), device=device)
    buffers = dict(loaded.named_buffers(remove_duplicate=False))
    for name in ("matrix", "kernel", "row", "same"):
        value = stored[name]
        expected = value.dequantize() if isinstance(value, fewbits.QuantizedTensor) else value.to(dtype)
        assert same_bits(buffers[name], expected)
    assert loaded.same is loaded.matrix
    assert isinstance(loaded.linear, QuantizedModule)
    assert loaded(torch.randn(2, 64, dtype=dtype)).isfinite().all()


def test_a_tensor_that_is_a_parameter_here_and_a_buffer_there_becomes_both(path):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64, bias=False)
            self.register_buffer("copy", self.linear.weight.detach())

    saved(dict(seeded(Both).state_dict()), "int8", path)
    loaded = fewbits.load(path, into=seeded(Both, 1))
    assert same_bits(loaded.copy, loaded.linear.weight)
    assert [name for name, _ in loaded.named_buffers() if "stored" not in name] == ["copy"]


def test_a_non_persistent_buffer_stays_exact_where_the_file_has_codes_for_it(path):
    def model() -> nn.Module:
        made = Tables()
        made._non_persistent_buffers_set.add("row")
        return made

    saved(dict(seeded(Tables).state_dict()), "int8", path)
    into = seeded(model, 1)
    own = into.row
    assert fewbits.load(path, into=into).row is own
    assert not fewbits.load(path, into=on_meta(model)).row.is_meta


# The meta device.


class Rope(nn.Module):
    """Buffers that no state dict holds, which `reset` computes; one in part of its elements, one by chance."""

    def __init__(self, size=6) -> None:
        super().__init__()
        self.size = size
        for name in ("frequencies", "mask", "partly", "chance"):
            self.register_buffer(
                name, torch.zeros(size, dtype=torch.bool if name == "mask" else None), persistent=False
            )

    def reset(self, names=("frequencies", "mask")) -> None:
        values = {
            "frequencies": torch.arange(self.size) / 3,
            "mask": torch.arange(self.size) > 2,
            "chance": torch.rand(self.size),
        }
        for name in names:
            if name == "partly":
                self.partly[:2] = 1
            elif name == "mask":
                self.mask = values[name]
            else:
                self._buffers[name].data.copy_(values[name])


class Model(nn.Module):
    """A layer beside `Rope`, and a parameter of its own beside buffers."""

    def __init__(self, names=("frequencies", "mask")) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.rope = Rope()
        for name in {"frequencies", "mask", "partly", "chance"} - set(names):
            del self.rope._buffers[name]


class Initialized(Model):
    """As `_init_weights` does in models of transformers, set weights and buffers of one module."""

    def _init_weights(self, module) -> None:
        if isinstance(module, Rope):
            module.reset()
        for parameter in module.parameters():
            nn.init.ones_(parameter)


@pytest.fixture
def state_path(path):
    """A file that has no buffer of any model here."""
    saved(dict(seeded(Model).state_dict()), "int8", path)
    return path


@pytest.mark.parametrize("within", [torch.device("cpu"), torch.device("meta")], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_init_weights_of_the_model_sets_the_buffers_that_the_file_lacks(nested, within, path):
    def make(cls):
        return nn.Sequential(nn.Identity(), cls()) if nested else cls()

    source = seeded(lambda: make(Initialized))
    saved(dict(source.state_dict()), "int8", path)
    with within:
        loaded = fewbits.load(path, into=on_meta(lambda: make(Initialized)))
    rope = (loaded[1] if nested else loaded).rope
    assert torch.equal(rope.frequencies, torch.arange(6) / 3)
    assert rope.mask.tolist() == [False] * 3 + [True] * 3
    assert same_state(loaded, fewbits.load(path, into=seeded(lambda: make(Initialized), 1)))


def test_init_weights_changes_nothing_else_in_the_model(state_path):
    into = seeded(Initialized, 1)
    into.rope.to("meta")
    ropes = into.rope
    into.register_buffer("late", torch.zeros(2, device="meta"), persistent=False)
    before = snapshot(into.linear)
    with pytest.raises(MismatchError, match="late is a buffer that no state dict holds"):
        fewbits.load(state_path, into=into)
    assert snapshot(into.linear).equals(before)
    assert into.rope is ropes
    assert into.rope.frequencies.is_meta


@pytest.mark.parametrize("device", [None, "cpu"])
def test_init_buffers_sets_the_buffers_that_the_file_lacks(device, state_path):
    seen = []

    def init_buffers(module):
        seen.append(type(module))
        module.reset()

    loaded = fewbits.load(state_path, into=on_meta(Model), device=device, init_buffers=init_buffers)
    assert torch.equal(loaded.rope.frequencies, torch.arange(6) / 3)
    assert loaded.rope.mask.tolist() == [False] * 3 + [True] * 3
    assert set(seen) == {Rope}
    assert not any(tensor.is_meta for tensor in tensors_in(loaded))


def test_init_buffers_comes_after_init_weights(state_path):
    def init_buffers(module):
        module.frequencies += 1

    loaded = fewbits.load(state_path, into=on_meta(Initialized), init_buffers=init_buffers)
    assert torch.equal(loaded.rope.frequencies, torch.arange(6) / 3 + 1)


@pytest.mark.parametrize("name", ["partly", "chance"])
def test_a_buffer_that_is_set_in_part_or_by_chance_is_not_taken_for_set(name, state_path):
    names = ("frequencies", "mask", name)
    into = on_meta(lambda: Model(names))
    before = held(into)
    with pytest.raises(MismatchError) as caught:
        fewbits.load(state_path, into=into, init_buffers=lambda module: module.reset(names))
    assert f"rope.{name} is a buffer that no state dict holds, and is on the meta device; build" in str(caught.value)
    assert "frequencies" not in str(caught.value)
    assert held(into) == before


def test_buffers_that_nothing_sets_are_named_with_the_ways_out(state_path):
    advice = "; build the model on the CPU, or give a function that sets it as init_buffers="
    with pytest.raises(MismatchError) as caught:
        fewbits.load(state_path, into=on_meta(Model))
    for name in ("rope.frequencies", "rope.mask"):
        assert f"{name} is a buffer that no state dict holds, and is on the meta device{advice}" in str(caught.value)


def test_an_init_weights_that_fails_is_told_of(state_path):
    class Failing(Model):
        def _init_weights(self, module) -> None:
            raise ValueError("no such scale")

    with pytest.raises(
        MismatchError, match=r"rope\.mask .*meta device \(ValueError in its _init_weights: no such scale"
    ):
        fewbits.load(state_path, into=on_meta(Failing))


def test_an_init_buffers_that_fails_leaves_the_model_unchanged(state_path):
    into = on_meta(Model)
    before = held(into)
    with pytest.raises(ZeroDivisionError):
        fewbits.load(state_path, into=into, init_buffers=lambda module: 1 / 0)
    assert held(into) == before


def test_a_model_that_cannot_be_copied_says_so(state_path):
    class Stubborn(Model):
        def __deepcopy__(self, memo):
            raise TypeError("there can be only one")

    with pytest.raises(MismatchError, match=r"meta device \(Stubborn cannot be copied .*there can be only one"):
        fewbits.load(state_path, into=on_meta(Stubborn), init_buffers=lambda module: module.reset())


def test_buffers_that_are_one_tensor_stay_one(state_path):
    def shared() -> nn.Module:
        model = Model()
        model.rope.register_buffer("again", model.rope.frequencies, persistent=False)
        return model

    loaded = fewbits.load(state_path, into=on_meta(shared), init_buffers=lambda module: module.reset())
    assert loaded.rope.again is loaded.rope.frequencies


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_buffers": print}, "without into="),
        ({"into": nn.Linear(1, 1), "init_buffers": "reset"}, "init_buffers= takes a function of a module, not a str"),
    ],
    ids=str,
)
def test_init_buffers_is_checked_before_the_file_is_opened(arguments, message, path):
    with pytest.raises(ArgumentError, match=message):
        fewbits.load(path, **arguments)


# Names that only the model ties.


class Tying(nn.Module):
    def __init__(self, *, ties=True) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.head = nn.Linear(64, 64, bias=False)
        self.ties = ties

    def tie_weights(self) -> None:
        if self.ties:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("place", ["fresh", "meta"])
@pytest.mark.parametrize("absent", ["embed.weight", "head.weight"])
def test_a_name_that_only_tie_weights_would_tie_is_told_so(absent, place, path):
    state = dict(seeded(Tying).state_dict())
    del state[absent]
    saved(state, "int8", path)
    into = on_meta(Tying) if place == "meta" else seeded(Tying, 1)
    before = held(into)
    (other,) = state
    with pytest.raises(MismatchError) as caught:
        fewbits.load(path, into=into)
    advice = f"(call the model's tie_weights() first, which ties it to {other})"
    assert f"{absent} is in the model, not in the file {advice}" in str(caught.value)
    assert held(into) == before
    into.tie_weights()
    loaded = fewbits.load(path, into=into)
    assert loaded.embed.weight_stored is loaded.head.weight_stored


def test_a_model_whose_tie_weights_ties_nothing_gets_no_such_advice(path):
    state = dict(seeded(Tying).state_dict())
    del state["head.weight"]
    saved(state, "int8", path)
    with pytest.raises(MismatchError, match=r"head\.weight is in the model, not in the file$"):
        fewbits.load(path, into=on_meta(lambda: Tying(ties=False)))
