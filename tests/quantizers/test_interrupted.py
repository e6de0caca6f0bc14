"""In place, an error halfway leaves a partly quantized source: a warning says so, and how to continue or undo it."""

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits import QuantizedTensor
from fewbits.errors import NonFiniteError, SourceError
from support.lifecycle_helpers import (
    FEWER_EXAMPLES,
    TiedLM,
    hook_count,
    mlp,
    named_tensors,
    quantize_small,
    small,
    snapshot,
)

MODELS = {"mlp": lambda: mlp(), "tied": lambda: TiedLM(), "mapping": lambda: mlp().state_dict()}


def interrupting(after):
    """A `progress` that raises after some tensors."""
    names = set()

    def progress(step):
        names.add((step.activity, step.name))
        if len(names) > after:
            raise KeyboardInterrupt

    return progress


def floats(source):
    return named_tensors(source) if isinstance(source, nn.Module) else source


@FEWER_EXAMPLES
@given(st.sampled_from(sorted(MODELS)), st.sampled_from(["int8", "int4", "fp16"]), st.integers(0, 6))
def test_a_partly_quantized_source_can_be_dequantized_and_quantized_again(kind, scheme, after):
    torch.manual_seed(0)
    source = MODELS[kind]()
    before = {name: tensor.detach().clone() for name, tensor in floats(source).items()}
    with contextlib.suppress(KeyboardInterrupt):  # the last parameters are larger than the number of tensors
        quantize_small(source, scheme, inplace=True, validate=False, progress=interrupting(after))
    back = fewbits.dequantize(source)
    assert floats(back).keys() == before.keys()
    whole = quantize_small(before, scheme)
    for name, tensor in floats(back).items():
        rounded = whole.model[name]
        rounded = rounded.dequantize() if isinstance(rounded, QuantizedTensor) else rounded.to(tensor.dtype)
        assert torch.equal(tensor, before[name]) or torch.equal(tensor, rounded)
    assert quantize_small(back).report.ok


@pytest.mark.parametrize(("kind", "after"), [("mlp", 2), ("tied", 4), ("mapping", 2)])
def test_an_interruption_in_place_warns_and_says_how_to_dequantize(kind, after, events):
    source = MODELS[kind]()
    with pytest.raises(KeyboardInterrupt):
        quantize_small(source, inplace=True, progress=interrupting(after))
    (told,) = [event for event in events if event["event"] == "quantized_in_part"]
    assert told["log_level"] == "warning"
    assert 0 < told["left"] < told["tensors"]
    assert "fewbits.dequantize(model)" in told["advice"]
    left = floats(source).keys()
    assert told["first"] in left
    if isinstance(source, nn.Module):
        assert hook_count(source) == 0


@pytest.mark.parametrize("after", [0, 99])
def test_no_warning_where_nothing_or_everything_was_converted(after, events):
    source = mlp()
    before = snapshot(named_tensors(source))
    try:
        quantize_small(source, inplace=True, progress=interrupting(after)).quantizer.reset()
    except KeyboardInterrupt:
        assert snapshot(named_tensors(source)) == before
    assert "quantized_in_part" not in {event["event"] for event in events}


def test_a_nonfinite_number_halfway_warns_too_and_a_second_try_says_what_to_do(events):
    source = mlp()
    source[2].weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"2\.weight"):
        quantize_small(source, inplace=True)
    assert [event["first"] for event in events if event["event"] == "quantized_in_part"] == ["2.weight"]
    source[2].weight.data[0, 0] = 0
    with pytest.raises(SourceError, match=r"0 is quantized already; .*fewbits\.dequantize\(model\)"):
        quantize_small(source, inplace=True)
    assert quantize_small(fewbits.dequantize(source)).report.ok


def test_a_quantizer_continues_where_it_was_interrupted():
    source, quantizer = mlp(), small()
    with pytest.raises(KeyboardInterrupt):
        fewbits.quantize(source, quantizer, inplace=True, progress=interrupting(2))
    assert quantizer.convert() is source
    assert quantizer.validate().ok
    whole = quantize_small(mlp()).model
    assert all(torch.equal(source[i].weight, whole[i].weight) for i in (0, 2))


def test_an_interruption_that_is_not_in_place_leaves_the_source_unchanged():
    source = mlp()
    before = snapshot(named_tensors(source))
    with pytest.raises(KeyboardInterrupt):
        quantize_small(source, progress=interrupting(2))
    assert snapshot(named_tensors(source)) == before
