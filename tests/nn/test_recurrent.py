"""Recurrent layers compute few time steps from codes, and give what torch gives with the dequantized weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fewbits
from fewbits.nn.packed import PackedWeight
from fewbits.nn.recurrent import MOST_STEPS

KINDS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}


def quantized(layer, scheme="int8", **settings):
    return fewbits.quantize(layer.eval(), scheme, min_elements=0, validate=False, **settings).model


def parts(result):
    """The tensors of a result: the output, and the states after the last step."""
    output, states = result
    return [output, *(states if isinstance(states, tuple) else (states,))]


def assert_close(found, expected):
    """Each product has 50 dB, or 10 dB more than rounded weights; the errors of steps and layers add up."""
    for own, other in zip(parts(found), parts(expected), strict=True):
        assert own.shape == other.shape
        assert float((own - other).norm()) <= 3e-2 * float(other.norm()) + 1e-5


@pytest.fixture
def decoded(monkeypatch):
    """The number of weights that were decoded."""
    calls = []
    for name in ("dequantize", "matrix_rows"):
        original = getattr(PackedWeight, name)
        monkeypatch.setattr(PackedWeight, name, lambda *args, method=original: (calls.append(1), method(*args))[1])
    return calls


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@given(st.data())
@settings(max_examples=60)
def test_few_steps_give_what_torch_gives(data):
    kind = data.draw(st.sampled_from(list(KINDS)))
    options = {
        "num_layers": data.draw(st.integers(1, 2)),
        "bidirectional": data.draw(st.booleans()),
        "bias": data.draw(st.booleans()),
        "batch_first": data.draw(st.booleans()),
    }
    if kind == "lstm":
        options["proj_size"] = data.draw(st.sampled_from([0, 16]))
    torch.manual_seed(0)
    layer = KINDS[kind](32, 48, **options)
    module = quantized(layer)
    plain = fewbits.dequantize(module)
    steps = data.draw(st.integers(1, MOST_STEPS + 2))
    shape = data.draw(st.sampled_from([(steps,), (3, steps) if options["batch_first"] else (steps, 3)]))
    x, given_states = torch.randn(*shape, 32), ()
    if data.draw(st.booleans()):
        with torch.no_grad():
            given_states = (plain(x)[1],)
    with torch.no_grad():
        assert_close(module(x, *given_states), plain(x, *given_states))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_few_steps_decode_nothing_and_many_steps_decode_each_weight_once(kind, scheme, decoded):
    torch.manual_seed(0)
    settings = {"group_size": 32} if scheme == "int4" else {}
    module = quantized(KINDS[kind](64, 128, num_layers=2), scheme, **settings)
    plain = fewbits.dequantize(module)
    for steps, expected in ((1, 0), (MOST_STEPS, 0), (MOST_STEPS + 1, 4)):
        decoded.clear()
        with torch.no_grad():
            found = module(torch.ones(steps, 1, 64))
        assert len(decoded) == expected
        with torch.no_grad():
            assert_close(found, plain(torch.ones(steps, 1, 64)))


def test_a_stream_is_the_sequence_step_by_step():
    torch.manual_seed(0)
    module, x = quantized(nn.LSTM(32, 48, 2)), torch.randn(6, 2, 32)
    with torch.no_grad():
        whole, _ = module(x)
        states, outputs = None, []
        for step in x:
            output, states = module(step[None], states)
            outputs.append(output)
    assert torch.allclose(torch.cat(outputs), whole, atol=1e-2)


def test_gradients_are_those_of_the_dequantized_weights():
    torch.manual_seed(0)
    module = quantized(nn.LSTM(32, 48))
    gradients = []
    for each in (module, fewbits.dequantize(module)):
        x = torch.ones(4, 2, 32, requires_grad=True)
        each(x)[0].square().sum().backward()
        gradients.append(x.grad)
    assert torch.allclose(*gradients, atol=2e-2)


def test_packed_sequences_and_dropout_in_training_are_torch_s_own():
    torch.manual_seed(0)
    layer = nn.LSTM(32, 48, 2, dropout=0.5)
    module = quantized(layer)
    plain = fewbits.dequantize(module)
    packed = pack_padded_sequence(torch.randn(5, 2, 32), torch.tensor([5, 3]))
    with torch.no_grad():
        assert torch.equal(module(packed)[0].data, plain(packed)[0].data)
        outputs = []
        for each in (module.train(), plain.train()):
            torch.manual_seed(1)
            outputs.append(each(torch.ones(4, 2, 32))[0])
    assert torch.equal(*outputs)


def test_exact_computes_as_torch_does_bit_for_bit():
    torch.manual_seed(0)
    module = quantized(nn.GRU(32, 48), compute="exact")
    x = torch.randn(3, 2, 32)
    with torch.no_grad():
        assert torch.equal(module(x)[0], fewbits.dequantize(module)(x)[0])


def test_autocast_gives_one_dtype_for_any_number_of_steps():
    module = quantized(nn.LSTM(32, 48))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        dtypes = {module(torch.ones(steps, 2, 32))[0].dtype for steps in (1, MOST_STEPS, MOST_STEPS + 1)}
    assert len(dtypes) == 1
