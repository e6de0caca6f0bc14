"""`InputCapture` sees the inputs of weights in any product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fewbits.calibration.capture import InputCapture, Watched
from fewbits.extend import Layout, WeightMatrix
from fewbits.nn.eligibility import layout_of


def captured(weight, layout, run):
    """The (rows, inputs) that `InputCapture` saw during `run`, and the output of `run`."""
    seen = []
    with torch.no_grad(), InputCapture([Watched("w", weight, layout)], lambda _, rows, x: seen.append((rows, x))):
        output = run()
    return seen, output


def outputs(weight, layout, seen):
    """The products of the seen rows with the seen inputs, one after the other."""
    matrix = WeightMatrix(weight, layout).whole()
    return torch.cat([(x @ matrix[rows].mT).flatten() for rows, x in seen])


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    axes = draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    groups = draw(st.sampled_from([1, 2]))
    stride = draw(st.integers(1, 2))
    settings = {
        "stride": stride,
        "padding": draw(st.integers(0, 2)),
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
        "bias": False,
    }
    if transposed:
        settings["output_padding"] = draw(st.integers(0, stride - 1))
    cls = getattr(nn, f"Conv{'Transpose' if transposed else ''}{axes}d")
    torch.manual_seed(draw(st.integers(0, 99)))
    module = cls(4, 6, draw(st.integers(1, 3)), **settings)
    batch = (2,) if draw(st.booleans()) else ()
    return module, torch.randn(*batch, 4, *(7 + axis for axis in range(axes)))


@settings(max_examples=min(100, settings.default.max_examples))
@given(case=convolutions())
def test_the_seen_inputs_of_a_convolution_give_its_output(case):
    module, x = case
    layout, _ = layout_of(module, "weight", module.weight)
    seen, output = captured(module.weight, layout, lambda: module(x))
    matrix = WeightMatrix(module.weight.detach(), layout).whole()
    samples = output if x.dim() == output.dim() == module.weight.dim() else output.unsqueeze(0)
    parts = [x @ matrix[rows].mT for rows, x in seen]
    per_sample = [torch.cat(parts[at : at + module.groups], 1).mT for at in range(0, len(parts), module.groups)]
    torch.testing.assert_close(torch.stack(per_sample).reshape(samples.shape), samples, atol=1e-5, rtol=1e-5)


W = torch.randn(6, 4)
X = torch.randn(5, 4)
LINEAR = Layout.of((6, 4))
EXPERTS = torch.randn(3, 6, 4)
SWAPPED = torch.randn(3, 4, 6)


@pytest.mark.parametrize(
    ("weight", "layout", "run", "rows"),
    [
        (W, LINEAR, lambda: F.linear(X, W), [(0, 6)]),
        (W, LINEAR, lambda: F.linear(X, W, torch.zeros(6)), [(0, 6)]),
        (W, LINEAR, lambda: F.linear(X.view(1, 5, 4), W), [(0, 6)]),
        (W, LINEAR, lambda: F.linear(X[0], W), [(0, 6)]),
        (W, LINEAR, lambda: F.linear(X[0], W, torch.zeros(6)), [(0, 6)]),
        (W, LINEAR, lambda: W @ X.mT, [(0, 6)]),
        (W, LINEAR, lambda: torch.einsum("ni,oi->no", X, W), [(0, 6)]),
        (W, LINEAR, lambda: F.linear(X, W[2:5]), [(2, 5)]),
        (W, LINEAR, lambda: [F.linear(X, part) for part in W.chunk(3)], [(0, 2), (2, 4), (4, 6)]),
        (W.mT.contiguous(), Layout.of((4, 6), inputs=(0,)), None, [(0, 6)]),
        (EXPERTS, Layout.of((3, 6, 4)), lambda: F.linear(X, EXPERTS[1]), [(6, 12)]),
        (EXPERTS, Layout.of((3, 6, 4)), lambda: torch.bmm(X.expand(3, 5, 4), EXPERTS.mT), [(0, 6), (6, 12), (12, 18)]),
        (SWAPPED, Layout.of((3, 4, 6), inputs=(1,)), lambda: X @ SWAPPED[2], [(12, 18)]),
    ],
)
def test_the_rows_of_a_weight_are_seen_with_their_inputs(weight, layout, run, rows):
    seen, output = captured(weight, layout, run or (lambda: X @ weight))
    assert [(part.start, part.stop) for part, _ in seen] == rows
    expected = torch.cat([part.flatten() for part in output]) if isinstance(output, list) else output
    found = outputs(weight, layout, seen)
    torch.testing.assert_close(found.sort().values, expected.flatten().sort().values)


@pytest.mark.parametrize(
    "run",
    [
        lambda: F.linear(X, W * 1),  # another tensor, computed from the weight
        lambda: F.linear(torch.ones(2, 6), W.mT),  # the other way round
        lambda: F.linear(X[:, :2], W[:, :2]),  # some columns only
        lambda: F.linear(X, W[::2]),  # rows that are not consecutive
        lambda: F.embedding(torch.tensor([1, 2]), W),
        lambda: F.linear(X[:0], W),
    ],
)
def test_products_with_other_operands_are_not_taken_for_the_weight(run):
    assert captured(W, LINEAR, run)[0] == []


def test_attention_shows_its_projections_apart():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    layout = Layout.of((24, 8))
    query, key = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    seen, _ = captured(attention.in_proj_weight, layout, lambda: attention(query, key, key))
    assert [(rows.start, rows.stop, len(x)) for rows, x in seen] == [(0, 8, 6), (8, 24, 10)]


def test_the_experts_of_a_grouped_product_are_seen_one_by_one():
    weight, x = torch.randn(3, 16, 32, dtype=torch.bfloat16), torch.randn(9, 16, dtype=torch.bfloat16)
    ends = torch.tensor([2, 2, 9], dtype=torch.int32)
    layout = Layout.of((3, 16, 32), inputs=(1,))
    try:
        seen, _ = captured(weight, layout, lambda: torch._grouped_mm(x, weight, offs=ends))
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this build of torch has no grouped product for the CPU: {error}")
    assert [(rows.start, rows.stop, len(x)) for rows, x in seen] == [(0, 32, 2), (64, 96, 7)]
