"""Memory that is reused for every block."""

import pytest
import torch
from hypothesis import given

from fewbits.numerics.affine import encode
from fewbits.numerics.packing import pack, packed_words
from fewbits.numerics.scales import choose_params, extremes
from fewbits.numerics.scratch import Scratch
from support.strategies import problems

CPU = torch.device("cpu")


def test_memory_is_reused_for_the_same_and_smaller_shapes():
    scratch = Scratch()
    first = scratch.take("codes", (4, 6), torch.int8, CPU)
    for shape in [(4, 6), (3, 2, 4), (1,), (0, 5)]:
        again = scratch.take("codes", shape, torch.int8, CPU)
        assert (tuple(again.shape), again.data_ptr()) == (shape, first.data_ptr() if again.numel() else 0)
        assert again.is_contiguous()


@pytest.mark.parametrize(("shape", "dtype"), [((5, 6), torch.int8), ((4, 6), torch.uint8), ((2, 2), torch.float64)])
def test_larger_tensors_and_other_dtypes_get_new_memory(shape, dtype):
    scratch = Scratch()
    first = scratch.take("codes", (4, 6), torch.int8, CPU)
    other = scratch.take("codes", shape, dtype, CPU)
    assert (tuple(other.shape), other.dtype) == (shape, dtype)
    assert other.data_ptr() != first.data_ptr()


def test_each_name_has_its_own_memory():
    scratch = Scratch()
    one, other = (scratch.take(name, (4,), torch.int8, CPU) for name in ("codes", "steps"))
    assert one.data_ptr() != other.data_ptr()


@given(problems(levels=None), problems())
def test_earlier_results_in_the_same_memory_change_nothing(before, problem):
    scratch = Scratch()
    for weight, spec, _ in (before, problem):
        rows = weight.reshape(-1, weight.shape[-1])
        spec = spec.for_dtype(weight.dtype)
        params = choose_params(*extremes(rows, spec), spec)
        codes = encode(rows, params, spec, scratch)
        assert torch.equal(codes, encode(rows, params, spec))
        words = torch.full((len(rows), packed_words(rows.shape[1], spec.bits)), -1, dtype=torch.int32)
        assert pack(codes, spec.bits, words, scratch) is words
        assert torch.equal(words, pack(codes, spec.bits))
