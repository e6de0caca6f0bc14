"""Weights that other forwards read: products with them, and with parts of them, are computed from the codes."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fewbits
from fewbits.errors import ReadOnlyWeightError
from fewbits.kernels.stack import Stack
from fewbits.nn.coded import CodedTensor
from fewbits.nn.packed import PackedWeight
from fewbits.numerics.layout import Layout

EXPERTS, OUTPUTS, INPUTS = 3, 128, 64
SCHEMES = {
    "int8": {},
    "int4": {"group_size": 32},
    "int4 asymmetric": {"group_size": 32, "symmetric": False},
    "nf4": {},
    "fp8": {},
    "int6": {},
}


class Reads(nn.Module):
    """Reads a weight, and passes it on to a function."""

    def __init__(self, shape=(EXPERTS, OUTPUTS, INPUTS)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(shape) / 8)

    def forward(self, x: Tensor, use):
        return use(x, self.weight)


class Transposed(Reads):
    """Experts as (experts, inputs, outputs), as some models of transformers have them."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__((EXPERTS, INPUTS, OUTPUTS))


def quantized(module, scheme="int8", **settings):
    settings = {**SCHEMES[scheme], "min_elements": 0, "validate": False, **settings}
    return fewbits.quantize(module, scheme.split()[0], **settings).model


def x(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def assert_close(found, expected):
    """Kernels compute with 50 dB, or 10 dB more than rounded weights have."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert float((found.double() - expected.double()).norm()) <= 1e-2 * float(expected.double().norm())


class Decoded:
    """Counts the elements of a weight that were decoded."""

    def __init__(self, monkeypatch) -> None:
        self.elements = 0
        for name in ("dequantize", "matrix_rows"):
            monkeypatch.setattr(PackedWeight, name, self._counting(getattr(PackedWeight, name)))

    def _counting(self, method):
        def counted(*args):
            found = method(*args)
            self.elements += found.numel()
            return found

        return counted


@pytest.fixture
def decoded(monkeypatch):
    return Decoded(monkeypatch)


#: Uses of a stack that kernels compute: (the shape of the input, the function).
STACK = {
    "an expert": ((5, INPUTS), lambda x, w: F.linear(x, w[1])),
    "an expert with a bias": ((5, INPUTS), lambda x, w: F.linear(x, w[-1], torch.ones(OUTPUTS))),
    "three axes": ((2, 5, INPUTS), lambda x, w: F.linear(x, w[1], torch.ones(OUTPUTS))),
    "three axes with gaps": ((5, 2, INPUTS), lambda x, w: F.linear(x.transpose(0, 1), w[1])),
    "each expert": ((5, INPUTS), lambda x, w: torch.stack([x @ each.T for each in w])),
    "unbound": ((5, INPUTS), lambda x, w: torch.stack([x @ each.mT for each in w.unbind()])),
    "some experts": ((5, INPUTS), lambda x, w: x @ w[1:][1].t()),
    "a vector": ((INPUTS,), lambda x, w: w[2] @ x),
    "from the left": ((INPUTS, 5), lambda x, w: w[2] @ x),
    "a batch": ((EXPERTS, 5, INPUTS), lambda x, w: torch.bmm(x, w.mT)),
    "grouped": ((7, INPUTS), lambda x, w: torch._grouped_mm(x, w.mT, offs=torch.tensor([2, 2, 7], dtype=torch.int32))),
    "a split expert": ((5, INPUTS), lambda x, w: torch.cat([x @ half.T for half in w[0].chunk(2)], 1)),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("shape", "use"), STACK.values(), ids=STACK)
@torch.no_grad()
def test_products_with_parts_of_a_stack_decode_nothing(shape, use, scheme, decoded):
    assert_decodes_nothing(quantized(Reads(), scheme), shape, use, decoded)


def assert_decodes_nothing(module, shape, use, decoded):
    expected = fewbits.dequantize(module)(x(*shape), use)
    decoded.elements = 0
    assert_close(module(x(*shape), use), expected)
    assert decoded.elements == 0


TRANSPOSED = {
    "an expert": ((5, INPUTS), lambda x, w: x @ w[1]),
    "a batch": ((EXPERTS, 5, INPUTS), torch.bmm),
    "grouped": ((7, INPUTS), lambda x, w: torch._grouped_mm(x, w, offs=torch.tensor([1, 4, 7], dtype=torch.int32))),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("shape", "use"), TRANSPOSED.values(), ids=TRANSPOSED)
@torch.inference_mode()
def test_products_with_transposed_experts_decode_nothing(shape, use, scheme, decoded):
    assert_decodes_nothing(quantized(Transposed(), scheme), shape, use, decoded)


#: Uses that need numbers.
NUMBERS = {
    "a sum": lambda x, w: w.sum(),
    "a product by element": lambda x, w: x * w[1, 0],
    "a reshaped weight": lambda x, w: x @ w.reshape(-1, INPUTS).T,
    "a column": lambda x, w: w[:, :, 3],
    "every other row": lambda x, w: w[0, ::2],
    "a mask": lambda x, w: w[torch.tensor([True, False, True])],
    "an inverse order of axes": lambda x, w: w.permute(2, 1, 0),
    "contiguous": lambda x, w: w.mT.contiguous(),
    "clone": lambda x, w: w.clone() + 1,
    "a scaled product": lambda x, w: torch.addmm(torch.ones(OUTPUTS), x, w[0].T, alpha=2),
    "einsum": lambda x, w: torch.einsum("ti,eoi->teo", x, w),
    "no experts": lambda x, w: w[1:1],
    "numpy": lambda x, w: torch.from_numpy(w[0].numpy().copy()),
    "a list": lambda x, w: torch.tensor(w[0, 0].tolist()),
}


@pytest.mark.parametrize("use", NUMBERS.values(), ids=NUMBERS)
@torch.no_grad()
def test_other_operations_give_what_they_give_with_the_dequantized_weight(use):
    module = quantized(Reads())
    found, expected = (each(x(5, INPUTS), use) for each in (module, fewbits.dequantize(module)))
    assert type(found) is Tensor
    assert torch.equal(found, expected)


@given(st.lists(st.integers(-EXPERTS, EXPERTS - 1), max_size=5), st.booleans())
def test_an_index_decodes_the_experts_that_it_names(index, is_transposed):
    module = quantized(Transposed() if is_transposed else Reads())
    pick = torch.tensor(index, dtype=torch.long)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        expected = fewbits.dequantize(module).weight[pick]
        decoded = Decoded(patch)
        assert torch.equal(module(x(1), lambda _, w: w[pick]), expected)
    assert decoded.elements == len({at % EXPERTS for at in index}) * OUTPUTS * INPUTS


@pytest.mark.parametrize("index", [EXPERTS, -EXPERTS - 1, torch.tensor([0, EXPERTS])], ids=str)
def test_an_index_outside_the_stack_is_an_error_of_torch(index):
    with torch.no_grad(), pytest.raises(IndexError):
        quantized(Reads())(x(1), lambda _, w: w[index])


def test_what_a_forward_writes_to_a_weight_counts_in_its_later_products():
    def use(x, w):
        w[1].zero_()
        w[2][:OUTPUTS] *= 2
        torch.nn.init.constant_(w[0], 0.5)
        return torch.stack([F.linear(x, w[at]) for at in range(EXPERTS)])

    module = quantized(Reads())
    with torch.no_grad():
        found = module(x(5, INPUTS), use)
        expected = fewbits.dequantize(module)(x(5, INPUTS), use)
        assert torch.allclose(found, expected, atol=1e-5)
        # The next forward reads the stored weight again.
        plain = fewbits.dequantize(module)
        assert_close(module(x(5, INPUTS), lambda x, w: F.linear(x, w[1])), F.linear(x(5, INPUTS), plain.weight[1]))


@pytest.mark.parametrize("module", [Reads(), Transposed()], ids=["in order", "transposed"])
def test_strides_are_those_of_the_dequantized_weight(module):
    def uses(_, w):
        return [part.stride() for part in (w, w.mT, w[1], w[1].T, w[1:], w[0].mT[:5], w[0][:5])]

    quantized_module = quantized(module)
    with torch.no_grad():
        assert quantized_module(x(1), uses) == fewbits.dequantize(quantized_module)(x(1), uses)


def test_an_operation_in_place_returns_the_weight_itself():
    def use(_, w):
        assert w.mul_(2) is w
        return w.sum()

    with torch.no_grad():
        quantized(Reads())(x(1), use)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_of_inputs_are_those_of_the_dequantized_weight(scheme):
    module = quantized(Reads(), scheme)
    gradients = []
    for each in (module, fewbits.dequantize(module)):
        given = x(5, INPUTS).requires_grad_()
        each(given, lambda x, w: F.linear(torch.tanh(F.linear(x, w[0]))[:, :INPUTS], w[1])).square().sum().backward()
        gradients.append(given.grad)
    assert_close(*gradients)


def test_autocast_decides_the_dtype():
    module = quantized(Reads())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = (m(x(5, INPUTS), STACK["an expert"][1]) for m in (module, fewbits.dequantize(module)))
    assert found.dtype == expected.dtype == torch.bfloat16
    assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_computes_in_it(dtype):
    module = quantized(Reads()).to(dtype)
    with torch.no_grad():
        found, expected = (
            m(x(5, INPUTS).to(dtype), STACK["an expert"][1]) for m in (module, fewbits.dequantize(module))
        )
    assert found.dtype == dtype
    assert_close(found, expected)


def test_an_input_of_another_dtype_is_the_same_error_as_with_a_float_weight():
    module = quantized(Reads())
    with torch.no_grad(), pytest.raises(RuntimeError, match="same dtype"):
        module(x(5, INPUTS).double(), STACK["an expert"][1])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies_of_a_stack_keep_its_codes(scheme):
    module = quantized(Reads(), scheme)
    state = module.state_dict()
    loaded = quantized(Reads(), scheme)
    for each in loaded.buffers():
        each.zero_()
    loaded.load_state_dict(state)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
        assert torch.equal(fewbits.dequantize(other).weight, fewbits.dequantize(module).weight)


def test_a_pickle_does_not_grow_with_the_parts_that_were_used():
    module = quantized(Reads())
    before = len(pickle.dumps(module))
    with torch.no_grad():
        module(x(5, INPUTS), lambda x, w: torch.stack([F.linear(x, each) for each in w]))
    assert len(pickle.dumps(module)) == before


def test_exact_computes_with_the_decoded_part_bit_for_bit(decoded):
    module = quantized(Reads(), compute="exact")
    plain = fewbits.dequantize(module)
    for name in ("an expert", "grouped"):
        shape, use = STACK[name]
        decoded.elements = 0
        with torch.no_grad():
            assert torch.equal(module(x(*shape), use), plain(x(*shape), use))
        assert 0 < decoded.elements < EXPERTS * OUTPUTS * INPUTS


def test_exact_reads_a_matrix_as_a_plain_tensor():
    module = quantized(Reads((OUTPUTS, INPUTS)), compute="exact")
    with torch.no_grad():
        assert module(x(1), lambda _, w: type(w)) is Tensor


def test_a_weight_that_is_cast_is_read_as_a_plain_tensor():
    module = fewbits.quantize(Reads(), "fp16", min_elements=0, validate=False).model
    with torch.no_grad():
        assert module(x(1), lambda _, w: type(w)) is Tensor


def test_memory_of_a_weight_is_that_of_its_numbers():
    def use(_, w):
        w[0].numpy()[:] = 1
        return w.untyped_storage().nbytes(), w.data_ptr() == w[0].data_ptr(), float(w[0].sum())

    with torch.no_grad():
        assert quantized(Reads())(x(1), use) == (4 * EXPERTS * OUTPUTS * INPUTS, True, OUTPUTS * INPUTS)


def test_compiled_forwards_read_plain_tensors():
    class Linear(Reads):
        def forward(self, x):
            return F.linear(x, self.weight[1])

    module = quantized(Linear())
    with torch.no_grad():
        found = torch.compile(module, backend="eager", fullgraph=True)(x(5, INPUTS))
        assert_close(found, module(x(5, INPUTS)))


def test_explain_names_the_kernels_of_parts_once():
    class Routed(Reads):
        def forward(self, x):
            return torch.stack([F.linear(x, self.weight[at]) for at in range(EXPERTS)])

    (row,) = fewbits.explain(quantized(Routed()), x(5, INPUTS)).rows
    assert row.of_part
    assert (row.name, row.rows) == ("weight", 5)
    assert row.kernel != "reference"


def test_attention_and_its_layer_compute_from_codes(decoded):
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True).eval()
    module = quantized(layer)
    plain = fewbits.dequantize(module)
    decoded.elements = 0
    with torch.no_grad():
        assert_close(module(x(2, 7, 128)), plain(x(2, 7, 128)))
        attention, floats = module.self_attn, plain.self_attn
        for query, key in ((x(2, 7, 128), x(2, 7, 128)), (x(2, 7, 128), x(2, 9, 128))):
            assert_close(attention(query, key, key)[0], floats(query, key, key)[0])
    assert decoded.elements == 0


@given(st.data())
def test_a_stack_knows_the_rows_of_its_parts(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=3))
    is_transposed = data.draw(st.booleans())
    layout = Layout.of(shape, inputs=(-2 if is_transposed else -1,))
    stack = Stack.of(layout)
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    matrix = layout.permuted(tensor).reshape(layout.matrix_shape)
    assert stack.tensor_shape == tuple(shape)
    assert stack.rows == slice(0, layout.rows)
    if len(shape) == 3:
        index = data.draw(st.integers(0, shape[0] - 1))
        part, expected = stack.matrix(index), tensor[index].mT if is_transposed else tensor[index]
    else:
        first = data.draw(st.integers(0, layout.rows - 1))
        part = stack.part(first, data.draw(st.integers(1, layout.rows - first)))
        expected = matrix[first : first + part.shape[0]]
    assert torch.equal(matrix[part.rows], expected)


@pytest.mark.parametrize(
    "layout",
    [
        Layout.of((4, 3, 2, 2), inputs=(1, 2, 3)),
        Layout.of((4, 3, 2), inputs=(1, 2)),
        Layout.of((4, 3, 2), inputs=(0,)),
        Layout.of((4,)),
        Layout.of((0, 4)),
        Layout.of((6, 4), view=(3, 2, 4), inputs=(1,)),
    ],
    ids=str,
)
def test_other_weights_are_no_stacks(layout):
    assert Stack.of(layout) is None


def test_a_coded_tensor_prints_its_numbers():
    module = quantized(Reads())
    with torch.no_grad():
        text = module(x(1), lambda _, w: repr(w) if isinstance(w, CodedTensor) else "")
    assert text == repr(fewbits.dequantize(module).weight.data)


#: Uses that torch refuses: (the shape of the input, the function).
REFUSED = {
    "a wide input": ((5, INPUTS + 1), lambda x, w: F.linear(x, w[0])),
    "a narrow input": ((5, INPUTS // 2), lambda x, w: x @ w[0].T),
    "a vector of another size": ((INPUTS + 1,), lambda x, w: w[0] @ x),
    "another batch": ((2, 3, INPUTS), lambda x, w: torch.bmm(x, w[0].T.expand(4, -1, -1))),
    "fewer groups": ((7, INPUTS), lambda x, w: torch._grouped_mm(x, w.mT, offs=torch.tensor([7], dtype=torch.int32))),
    "three axes in mm": ((2, 5, INPUTS), lambda x, w: torch.mm(x, w[0].T)),
    "a bias of another size": ((5, INPUTS), lambda x, w: F.linear(x, w[0], torch.ones(OUTPUTS + 1))),
    "an axis that is not there": ((1,), lambda x, w: w.transpose(0, 5)),
    "a list as a shape": ((1,), lambda x, w: w.permute(0, 1, 7)),
}


@pytest.mark.parametrize("compute", ["auto", "exact"])
@pytest.mark.parametrize(("shape", "use"), REFUSED.values(), ids=REFUSED)
def test_what_torch_refuses_of_the_dequantized_weight_is_refused(shape, use, compute):
    module = quantized(Reads(), compute=compute)
    for each in (module, fewbits.dequantize(module)):
        with torch.no_grad(), pytest.raises((RuntimeError, IndexError)):
            each(x(*shape), use)


def _write_to_slice(x, w):
    part = w[1][3:40]
    part[:, 3] = 70
    return F.linear(x, part)


def _write_to_chunk(x, w):
    first, _ = w[0].chunk(2)
    first[0] = 70
    return F.linear(x, w[0])


def _write_to_transposed(x, w):
    turned = w[2].T
    turned[:, 0] = 70
    return x @ turned


def _write_to_view(x, w):
    w[0].detach().view(-1)[:64] = 0
    return F.linear(x, w[0])


def _write_to_select(x, w):
    w[1].select(1, 2).fill_(9)
    return F.linear(x, w[1])


@pytest.mark.parametrize(
    "use", [_write_to_slice, _write_to_chunk, _write_to_transposed, _write_to_view, _write_to_select]
)
def test_what_a_forward_writes_through_a_view_of_a_weight_counts(use):
    module = quantized(Reads())
    with torch.no_grad():
        assert torch.allclose(module(x(5, INPUTS), use), fewbits.dequantize(module)(x(5, INPUTS), use), atol=1e-4)


def test_a_weight_that_was_decoded_is_freed_without_the_garbage_collector():
    def use(x, w):
        read.append(weakref.ref(w))
        return x * w.sum()

    read, module = [], quantized(Reads())
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            module(x(1), use)
        assert read[0]() is None
    finally:
        gc.enable()


def test_a_mask_of_bytes_is_a_mask():
    mask = torch.tensor([1, 0, 1], dtype=torch.uint8)
    module = quantized(Reads())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates such masks
        assert module(x(1), lambda _, w: w[mask]).shape == (2, OUTPUTS, INPUTS)


@pytest.mark.parametrize("compute", ["auto", "exact"])
def test_a_cast_up_keeps_the_rounding_of_a_narrow_weight(compute):
    module = quantized(Reads().to(torch.bfloat16), compute=compute)
    plain = fewbits.dequantize(module)
    with torch.no_grad():
        assert torch.equal(module(x(1), lambda _, w: w[1].float() * 1), plain(x(1), lambda _, w: w[1].float() * 1))


@pytest.mark.parametrize(
    "use",
    [
        lambda _, w: setattr(w, "data", torch.ones(2)),
        lambda _, w: w.detach().set_(torch.ones(2)),
        lambda _, w: w[0].t_(),
        lambda _, w: w.unsqueeze_(0),
    ],
    ids=["data", "set", "transposed", "unsqueezed"],
)
def test_replacing_the_memory_or_the_shape_of_a_weight_is_refused(use):
    with torch.no_grad(), pytest.raises(ReadOnlyWeightError, match="is quantized"):
        quantized(Reads())(x(1), use)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own rules use torch.jit.script
@pytest.mark.parametrize("use", [lambda x, w: F.linear(x, w[1]), lambda x, w: x @ w[1].mT], ids=["linear", "matmul"])
def test_transforms_of_torch_func_give_what_they_give_with_the_dequantized_weight(use):
    module = quantized(Reads())
    plain = fewbits.dequantize(module).requires_grad_(False)
    found, expected = (torch.vmap(lambda row, m=m: m(row, use))(x(5, INPUTS)) for m in (module, plain))
    assert_close(found, expected)
    found, expected = (
        torch.func.jvp(lambda v, m=m: m(v, use), (x(5, INPUTS),), (x(5, INPUTS),))[1] for m in (module, plain)
    )
    assert_close(found, expected)


def test_sparse_inputs_multiply_with_the_decoded_weight():
    module = quantized(Reads())
    with torch.no_grad():
        found, expected = (
            m(x(5, INPUTS), lambda x, w: x.to_sparse() @ w[1].T) for m in (module, fewbits.dequantize(module))
        )
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_forward_may_differentiate_with_respect_to_its_own_copy_of_a_weight():
    def use(x, w):
        leaf = w[1].detach().requires_grad_()
        return torch.autograd.grad(F.linear(x, leaf).sum(), leaf)[0]

    module = quantized(Reads())
    assert torch.allclose(module(x(5, INPUTS), use), fewbits.dequantize(module)(x(5, INPUTS), use))


def test_an_index_into_a_repeated_matrix_is_the_matrix():
    module = quantized(Reads())
    with torch.no_grad():
        found = module(x(5, INPUTS), lambda x, w: F.linear(x, w[0].expand(3, OUTPUTS, INPUTS)[1]))
        assert_close(found, F.linear(x(5, INPUTS), fewbits.dequantize(module).weight[0]))


def test_copies_and_results_of_a_forward_are_plain_tensors():
    module = quantized(Reads())
    with torch.no_grad():
        for use in (lambda _, w: w, lambda _, w: copy.deepcopy(w), lambda _, w: pickle.loads(pickle.dumps(w))):
            found = module(x(1), use)
            assert type(found) is Tensor
            assert torch.equal(found, fewbits.dequantize(module).weight)
