"""Facts about a tensor that follow from its name, shape and dtype."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fewbits.selection.info import TensorInfo, layout_by_shape, numeric_obstacle
from support.lifecycle_helpers import DTYPES, entry


@pytest.mark.parametrize(
    ("name", "module"), [("weight", ""), ("head.weight", "head"), ("a.b.c.weight", "a.b.c"), ("", "")]
)
def test_the_module_of_a_tensor_is_all_but_its_last_component(name, module):
    assert entry(name).module == module


@given(st.lists(st.integers(0, 5), max_size=4).map(tuple), st.sampled_from([*DTYPES, torch.int64, torch.bool]))
def test_nbytes_is_what_torch_would_allocate(shape, dtype):
    assert entry("w", shape, dtype=dtype).nbytes == torch.empty(shape, dtype=dtype).nbytes


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "reason"),
    [
        ("w", (4, 4), torch.float32, None),
        ("w", (1, 1), torch.bfloat16, None),
        ("w", (2, 2, 2, 2, 2, 2), torch.float64, None),
        ("w", (4,), torch.float32, "1 dimension; two are needed"),
        ("w", (), torch.float32, "0 dimensions; two are needed"),
        ("w", (0, 4), torch.float32, "it has no elements"),
        ("w", (4, 4), torch.int8, "int8 is not a floating dtype"),
        ("w", (4, 4), torch.bool, "bool is not a floating dtype"),
        ("w", (4, 4), torch.complex64, "complex64 is not a floating dtype"),
        ("w", (4, 4), torch.float8_e4m3fn, "float8_e4m3fn is a quantized dtype already"),
        ("a.bias", (4,), torch.float32, "a bias is never quantized"),
        ("a.bias", (4, 4), torch.float32, "a bias is never quantized"),
        ("bias_ih_l0", (4,), torch.float32, "a bias is never quantized"),
        ("attention.bias_k", (1, 1, 8), torch.float32, "a bias is never quantized"),
        ("relative_attention_bias.weight", (32, 8), torch.float32, None),
        ("bias.weight", (4, 4), torch.float32, None),
        ("biased", (4, 4), torch.float32, None),
    ],
)
def test_a_tensor_that_can_never_be_quantized_has_a_reason(name, shape, dtype, reason):
    assert numeric_obstacle(name, shape, dtype) == reason


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((5, 7), (5, 7)),
        ((5, 1), (5, 1)),
        ((8, 4, 31), (8, 124)),
        ((8, 4, 32), (32, 32)),
        ((8, 4, 3, 3), (8, 36)),
        ((8, 4, 3, 3, 3), (8, 108)),
        ((2, 2, 2, 2, 2, 2), (32, 2)),
        ((8, 3, 64, 64), (1536, 64)),
    ],
)
def test_short_last_axes_of_3_to_5_dimensions_are_convolution_kernels(shape, matrix):
    assert layout_by_shape(shape).matrix_shape == matrix


@given(st.lists(st.integers(1, 40), min_size=2, max_size=6).map(tuple))
def test_the_first_axis_is_never_an_input(shape):
    rows, columns = layout_by_shape(shape).matrix_shape
    assert rows % shape[0] == 0
    assert rows * columns == math.prod(shape)


@pytest.mark.parametrize(
    ("name", "owner", "is_embedding"),
    [
        ("model.embed_tokens.weight", None, True),
        ("wte.weight", None, True),
        ("shared.weight", None, True),
        ("embeddings.word_embeddings.weight", None, True),
        ("model.embed_tokens_proj.weight", None, False),
        ("embedder.weight", None, False),
        ("model.embed_tokens.weight", nn.Linear, False),
    ],
)
def test_names_identify_an_embedding_only_without_a_class(name, owner, is_embedding):
    assert entry(name, owner=owner).is_embedding_by_name is is_embedding


@pytest.mark.parametrize(
    ("name", "shape", "owner", "is_embedding"),
    [
        ("embeddings.patch_embeddings.projection.weight", (64, 3, 8, 8), None, False),
        ("patch_embedding.position_embedding.weight", (64, 3, 1, 1), None, False),
        ("embeddings.embedding.weight", (8, 64, 3), None, False),
        ("embeddings.position_embeddings", (1, 17, 64), None, True),
        ("pos_embed", (1, 17, 64), nn.Module, True),
        ("embeddings.cls", (1, 17, 64), nn.Module, False),
    ],
)
def test_a_table_of_positions_is_an_embedding_and_a_convolution_kernel_is_not(name, shape, owner, is_embedding):
    info = TensorInfo(name, shape, torch.float32, owner=owner)
    assert info.is_embedding_by_name is is_embedding
